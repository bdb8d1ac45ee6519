"""The comparison of all methods, started as a user would start it. One small comparison is shared."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import running
import xarray as xr
from running import RUN_FILES, Outcome, files, numbers

from dir_toolkit.experiment.results.schema import load_results, validate_results

RECIPE = running.RECIPES / "compare.py"
SHORT = ["--size", 16, "--epochs", 1, "--batch-size", 1024, "--replicates", 100]
METHODS = ["--methods", "soft+tau", "vanilla", "soft"]
FIGURES = {
    "label-density",
    "error-by-region",
    "difference-to-vanilla--mae",
    "difference-to-vanilla--bmae",
    "interval-coverage-by-region",
    "error-and-cost",
    "error-by-age--some-methods",
    "tau-on-validation",
}
run = partial(running.run, RECIPE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished comparison, named by an absolute path, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "made", run(folder, *SHORT, *METHODS, "--seeds", 2, "--out", folder / "made").out


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the comparison, to go on with."""
    return shutil.copytree(finished[0], tmp_path / "copied")


def runs(out: Path) -> dict[str, bytes]:
    """The files of all runs."""
    return {name: content for name, content in files(out).items() if "/seed" in name}


def same_comparison(one: Path, two: Path) -> bool:
    """Whether two folders hold the same errors and differences, whatever the minutes."""
    results = [numbers(load_results(out / "results.nc")) for out in (one, two)]
    return (
        results[0].identical(results[1])
        and (one / "differences.csv").read_bytes() == (two / "differences.csv").read_bytes()
    )


def damage(out: Path, method: str, seed: int) -> None:
    (out / method / f"seed{seed}/checkpoint-last.pt").write_bytes(b"damaged")


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--baseline", "--replicates", "soft+tau")


def test_a_comparison_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, told = finished
    trained = {f"{method}/seed{seed}/{name}" for method in ("vanilla", "soft") for seed in (0, 1) for name in RUN_FILES}
    adjusted = {f"soft+tau/seed{seed}/results.nc" for seed in (0, 1)}
    summary = {"results.nc", "table.md", "report.html", "differences.csv", "events"}
    assert set(files(out)) == trained | adjusted | summary | {f"figures/{name}.png" for name in FIGURES}
    assert told.rstrip().endswith(f"Report: {out / 'report.html'}")


def test_all_methods_have_a_seed_before_the_next_one_starts(finished: tuple[Path, str]) -> None:
    told = re.findall(r"^(\S+), seed (\d) \((\d) of 6\)$", finished[1], re.MULTILINE)
    named = [(method, seed) for seed in "01" for method in ("soft+tau", "vanilla", "soft")]
    assert told == [(*one, str(place + 1)) for place, one in enumerate(named)]
    assert finished[1].count("finished before") == 2  # the network of soft, with both seeds


def test_the_result_holds_all_methods_in_their_order(finished: tuple[Path, str]) -> None:
    out, told = finished
    ds = load_results(out / "results.nc")
    validate_results(ds)
    assert ds["method"].values.tolist() == ["vanilla", "soft", "soft+tau", "constant"]
    assert ds["seed"].values.tolist() == [0, 1]
    assert ds["completed"].values.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]
    assert ds["tau"].notnull().all("seed").values.tolist() == [False, False, True, False]
    for path in out.glob("*/seed*/results.nc"):
        one = load_results(path)
        name, seed = one["method"].values.tolist(), one["seed"].values.tolist()
        assert path.parent == out / name[0] / f"seed{seed[0]}"
        part = ds.sel({"method": name, "seed": seed})
        xr.testing.assert_identical(numbers(one), numbers(part)[list(numbers(one).data_vars)])
    for table in (told, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert "Bold: better than vanilla" in table
        assert re.search(r"vanilla.*soft.*soft\+tau.*constant", table, re.DOTALL)


def test_differences_are_those_of_the_results(finished: tuple[Path, str]) -> None:
    out, _ = finished
    ds = load_results(out / "results.nc")
    with (out / "differences.csv").open() as file:
        rows = {(row["method"], row["metric"], row["region"]): row for row in csv.DictReader(file)}
    assert {method for method, _, _ in rows} == {"vanilla", "soft", "soft+tau", "constant"}
    for (method, metric, region), row in rows.items():
        own = ds[metric].sel({"method": method, "region": region}).mean("seed")
        off = float(own - ds[metric].sel({"method": "vanilla", "region": region}).mean("seed"))
        assert float(row["difference"]) == pytest.approx(off, abs=1e-4)
        assert float(row["difference_low"]) - 1e-9 <= float(row["difference"]) <= float(row["difference_high"]) + 1e-9
        assert row["baseline"] == "vanilla"


def test_the_report_says_what_methods_are_and_shows_every_figure(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text()
    for part in ("plain regression", "soft bins, prior adjusted after training", "Difference to vanilla: bMAE"):
        assert part in page
    assert page.count("<svg") == len(FIGURES)
    assert "Failed:" not in page


def test_no_result_tells_where_things_lie_on_this_machine(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for name in ("results.nc", "vanilla/seed0/results.nc", "report.html", "table.md", "differences.csv"):
        content = (out / name).read_bytes()
        for place in (out.parent, RECIPE.parents[1], Path.home(), sys.prefix):
            assert f"{place}/".encode() not in content, (name, place)
    command = " ".join(map(str, ["python recipes/compare.py", *SHORT, *METHODS, "--seeds", 2, "--out", "DIR"]))
    assert load_results(out / "results.nc").attrs["command"] == command


def test_the_helper_that_compares_sees_a_difference(finished: tuple[Path, str], copied: Path) -> None:
    assert same_comparison(finished[0], copied)
    (copied / "differences.csv").write_text("other")
    assert not same_comparison(finished[0], copied)


def test_an_earlier_comparison_is_refused_and_nothing_is_touched(
    finished: tuple[Path, str], here: Callable[..., Outcome]
) -> None:
    out, _ = finished
    before = files(out)
    outcome = here(*SHORT, "--methods", "vanilla", "bins", "--out", out)
    assert outcome.code == 1
    assert re.fullmatch(
        r"recipes/compare\.py: --out must hold no earlier run.* got .*checkpoint-last\.pt\. Go on with --resume.*\n",
        outcome.err,
    )
    assert files(out) == before


def test_resume_adds_methods_and_seeds_and_baselines_and_repeats_nothing(
    copied: Path, here: Callable[..., Outcome]
) -> None:
    def changed(before: dict[str, bytes]) -> set[str]:
        # What follows without training is made anew.
        return {name for name in before if not name.startswith("soft+tau/") if runs(copied)[name] != before[name]}

    before = runs(copied)
    outcome = here(*SHORT, "--methods", "bins", "--baseline", "soft", "--seeds", 1, "--resume", "--out", copied)
    assert (outcome.code, outcome.err) == (0, "")
    assert "better than soft" in outcome.out
    assert (copied / "figures/difference-to-soft--mae.png").exists()
    assert set(runs(copied)) - set(before) == {f"bins/seed0/{name}" for name in RUN_FILES}
    assert changed(before) == set()
    ds = load_results(copied / "results.nc")
    assert ds["method"].values.tolist() == ["vanilla", "bins", "soft", "soft+tau", "constant"]
    assert ds["completed"].values.tolist() == [[1, 1], [1, 0], [1, 1], [1, 1], [1, 0]]
    before = runs(copied)
    outcome = here(*SHORT, "--methods", "vanilla", "soft+tau", "--seeds", 3, "--resume", "--out", copied)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("finished before") == 4
    assert changed(before) == set()
    assert load_results(copied / "results.nc")["completed"].values.tolist() == [
        *([1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0])  # soft has the network, but was not asked for
    ]


def test_a_run_that_fails_costs_the_others_nothing_and_is_made_up_for(
    finished: tuple[Path, str], copied: Path, here: Callable[..., Outcome]
) -> None:
    words = [*SHORT, *METHODS, "--seeds", 2, "--resume", "--out", copied]
    damage(copied, "soft", 1)
    for name in ("soft/seed1/results.nc", "soft+tau/seed1/results.nc", "vanilla/seed1/results.nc", "report.html"):
        (copied / name).unlink()
    outcome = here(*words)
    assert outcome.code == 1
    first, *named = outcome.err.splitlines()
    assert first == "recipes/compare.py: these runs failed; --resume tries them again:"
    assert [re.match(r"  (\S+, seed \d): CheckpointError: .*checkpoint-last\.pt", one)[1] for one in named] == [  # type: ignore[index]
        "soft+tau, seed 1",
        "soft, seed 1",
    ]
    assert "Traceback" in outcome.out  # where the run stood, for a fault of our own
    ds = load_results(copied / "results.nc")
    assert ds["completed"].values.tolist() == [[1, 1], [1, 0], [1, 0], [1, 0]]
    page = (copied / "report.html").read_text()
    assert "Failed: soft, seed 1: CheckpointError: " in page
    assert f"{copied.parent}/" not in page
    shutil.rmtree(copied / "soft/seed1")
    outcome = here(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert same_comparison(finished[0], copied)
    assert "Failed:" not in (copied / "report.html").read_text()


def test_runs_of_another_budget_are_told(copied: Path, here: Callable[..., Outcome]) -> None:
    config = copied / "soft/seed1/config.json"
    config.write_text(config.read_text().replace('"lr": 0.002', '"lr": 0.1'))
    told = here(*SHORT, *METHODS, "--seeds", 2, "--resume", "--out", copied)
    assert told.code != 0
    assert "all runs in --out must have had one budget; these had another:" in told.err
    assert re.search(r"soft/seed1: --lr 0\.1, now 0\.002\n?$", told.err)


def test_a_comparison_without_its_baseline_says_so(copied: Path, here: Callable[..., Outcome]) -> None:
    for seed in (0, 1):
        (copied / f"vanilla/seed{seed}/results.nc").unlink()
    outcome = here(*SHORT, "--methods", "soft", "--seeds", 1, "--resume", "--out", copied)
    assert outcome.code == 1
    rule = r"recipes/compare\.py: --baseline must have a finished run in .*copied, got vanilla, which has none\. "
    assert re.fullmatch(rf"{rule}Add it to --methods\.\n", outcome.err)
    damage(copied, "vanilla", 0)
    outcome = here(*SHORT, "--methods", "vanilla", "--seeds", 1, "--resume", "--out", copied)
    assert outcome.code == 1
    assert re.fullmatch(
        rf"{rule}These runs failed; --resume tries them again:\n  vanilla, seed 0: CheckpointError: .*\n", outcome.err
    )


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ("--tune lr", ["--tune is of age.py; give what it chose as settings."]),
        ("--replicates 10", ["--replicates must be at least 100, got 10."]),
        ("--methods soft bins", ["--methods must include the baseline vanilla, got soft bins."]),
        ("--baseline default", ["--baseline must be one method, got default."]),
        (
            "--methods vanila --baseline sofft",
            ["--baseline must name methods that --help lists, got sofft. Did", "--methods must name methods that --h"],
        ),
        ("--methods vanilla --baseline soft", ["--methods must include the baseline soft, got vanilla."]),
        (
            "--replicates 0 --tune x --methods soft --seeds 0 --tau 1",
            ["--tune is", "--replicates must", "--methods must include", "--tau needs", "--seeds must be at least 1"],
        ),
    ],
)
def test_all_bad_settings_are_told_at_once(
    tmp_path: Path, here: Callable[..., Outcome], words: str, rules: list[str]
) -> None:
    outcome = here(*words.split())
    assert outcome.code == 1
    first, *told = outcome.err.splitlines()
    assert first == "recipes/compare.py: these settings cannot run:"
    assert len(told) == len(rules)
    for one, rule in zip(told, rules, strict=True):
        assert one.strip().startswith(rule)
    assert files(tmp_path) == {}
