"""What the benchmarks write: verdicts, the table and the result. The timing itself is not tested."""

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
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


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Results of the suite on three sets, on which ``lds`` is better, ``mse`` worse, and trees read only two."""
    pytest.importorskip("matplotlib")
    bmae = {"l1": 1.0, "lds": 0.8, "mse": 1.3, "boosting": 0.9}
    for name in ("a", "b", "c"):
        rows, differences = [], ["method,metric,region,difference_low,difference_high,ratio,ratio_low,ratio_high"]
        for method, error in list(bmae.items())[: 3 if name == "c" else 4]:
            rows += [f'{method},{seed},1.0,{error},0.5,0.9,,,36,72,"{{""lr"": 0.1}}",100,4,2' for seed in (0, 1)]
            for metric, region in (("bmae", "all"), ("mae", "few"), ("mae", "all")):
                low, high = error - 1.05, error - 0.95
                differences.append(f"{method},{metric},{region},{low},{high},{error},{error - 0.05},{error + 0.05}")
        head = "method,seed,mae,bmae,few,bmase,crps,coverage,seconds,tuning_seconds,setting,rows,epochs,trials"
        (tmp_path / f"{name}.csv").write_text("\n".join(["# command | versions", head, *rows]))
        (tmp_path / f"{name}-differences.csv").write_text("\n".join(differences))
    return tmp_path


def test_the_page_of_the_suite_says_what_its_results_hold(suite: Path) -> None:
    report = runpy.run_path(str(FOLDER / "suite/report.py"))
    read = report["read"](suite)
    table = report["ranks"](read)
    assert table.columns.tolist() == ["l1", "lds", "mse"]  # trees did not run on every set
    assert report["average_ranks"](table)["rank"].to_dict() == {"lds": 1.0, "l1": 2.0, "mse": 3.0}
    # Demšar 2006, table 5: q is 2.343 for three classifiers.
    assert report["critical_difference"](3, 3) == pytest.approx(2.343 * (3 * 4 / (6 * 3)) ** 0.5, rel=1e-3)
    assert report["geometric"](pd.Series([0.5, 2.0]))[0] == pytest.approx(1.0)
    assert report["hours"](read) == pytest.approx((22 * 36 + 11 * 72) / 3600)
    assert report["fails"](read, "lds") == "no failure seen on these sets"
    assert "bMAE rises: a 1.30 [1.25, 1.35], b" in report["fails"](read, "mse")
    report["main"](suite, suite)
    page = (suite / "which-method.md").read_text(encoding="utf-8")
    assert "| A network; its head is one number and stays | `lds` (of 2) | 0.80 [0.80, 0.80] |" in page
    assert "| lds | **0.80** [0.75, 0.85] | **0.80** [0.75, 0.85] | **0.80** [0.75, 0.85] |" in page
    assert "0.44 hours" in page
    assert "| lds | 0.8 ± 0 |" in (suite / "tables.md").read_text(encoding="utf-8")
    assert (suite / "which-method.png").stat().st_size > 5_000


def test_the_page_of_the_suite_needs_three_sets(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in suite.glob("c*.csv"):
        path.unlink()
    runpy.run_path(str(FOLDER / "suite/report.py"))["main"](suite, suite / "docs")
    assert "The page needs 3 sets" in capsys.readouterr().out
    assert "| lds | 0.8 ± 0 |" in (suite / "tables.md").read_text(encoding="utf-8")
