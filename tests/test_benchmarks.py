"""What the benchmarks write: verdicts, the table and the result. The timing itself is not tested."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import xarray as xr

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(FOLDER)
    try:
        yield {name: importlib.import_module(name) for name in ("timing", "all")}
    finally:
        for path in FOLDER.glob("*.py"):
            sys.modules.pop(path.stem, None)


def test_verdicts_follow_the_goal(benchmarks: dict[str, ModuleType]) -> None:
    row = benchmarks["timing"].Row
    values = [("<= 1.1", 1.1, "met"), ("<= 1.1", 1.2, "missed"), (">= 50", 49, "missed"), (">= 50", 51, "met")]
    assert [row("w", value, goal=goal).verdict for goal, value, _ in values] == [verdict for *_, verdict in values]
    assert row("w", 3.0).verdict == ""


def test_what_runs_in_turn_is_timed_in_turn(benchmarks: dict[str, ModuleType]) -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = benchmarks["timing"].medians(functions, repeats=3, warmup=1)
    assert calls == list("abababab")
    assert list(times) == ["a", "b"]
    assert min(times.values()) > 0


def test_the_table_and_the_result_hold_every_row(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    row = benchmarks["timing"].Row
    rows = {"one": [row("a / b", 1.25, goal="<= 1.1")], "two": [row("c", 3.0, "s", detail="d")]}
    table = benchmarks["all"].as_markdown(rows, "a machine")
    assert "| one | a / b | 1.25 x | <= 1.1 | missed |" in table
    assert "| two | c | 3.00 s |  |  |" in table
    benchmarks["all"].as_result(rows, "a machine").to_netcdf(tmp_path / "r.nc", engine="scipy")
    result = xr.load_dataset(tmp_path / "r.nc", engine="scipy")
    assert result.value.values.tolist() == [1.25, 3.0]
    assert result.benchmark.values.tolist() == ["one", "two"]
    assert result.unit.values.tolist() == ["x", "s"]
    assert result.attrs["machine"] == "a machine"


def test_every_benchmark_is_run_by_all(benchmarks: dict[str, ModuleType]) -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"all", "timing"}
    assert set(benchmarks["all"].NAMES) == scripts
