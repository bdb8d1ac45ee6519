"""What the benchmarks write: verdicts, the table and the result. The timing itself is not tested."""

import importlib
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from forked import load
from scipy.stats import gaussian_kde

from dir_toolkit import DirToolkitWarning, LabelDensity

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
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"all", "timing", "gpu", "tau"}
    assert set(benchmarks["all"].NAMES) == scripts


def test_the_regret_of_tau_is_told_per_table_and_over_all(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    tau = importlib.import_module("tau")
    monkeypatch.setattr(tau, "TABLES", ("diabetes",))
    monkeypatch.setattr(tau, "TAUS", tau.TAUS[::10])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirToolkitWarning)
        tau.main(FOLDER, range(2))  # diabetes is not in a folder
        (found, of_each), (again, _) = (tau.regrets(*tau.read(FOLDER, "diabetes"), seed) for seed in (0, 0))
    assert found == again
    assert min(found.values()) >= 0
    assert of_each.min() == 0
    assert found["tau 1"] == of_each[2]
    names, *rows = capsys.readouterr().out.splitlines()[1:]
    assert re.fullmatch(r" *choose_tau +calibrate +half of test +tau 1 +best fixed, [\d.]+", names)
    of_table, of_all = (row.replace("geometric mean", "mean").split() for row in rows)
    assert (of_table[0], of_all[0], len(of_table), len(of_all)) == ("diabetes", "mean", 16, 16)
    assert all(abs(float(a) - float(b)) < 0.3 for a, b in zip(of_table[1::3], of_all[1::3], strict=True))


def test_pictures_of_what_follows_training_are_drawn_from_few_numbers(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    growth = importlib.import_module("growth")
    numbers = {"ROWS": (300, 600), "UNLABELLED": (300, 600), "LABELLED": 300, "LABELS": (1000, 2000), "CHUNK": 500}
    for name, value in {**numbers, "OUT": tmp_path}.items():
        monkeypatch.setattr(growth, name, value)
    report = benchmarks["timing"].Report()
    with warnings.catch_warnings():
        growth.main(report, ["rows", "labels"])
    assert len(report.rows) == 10
    assert min(row.value for row in report.rows) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"growth-rows.png", "growth-labels.png"}


RIVALS = ("denseweight", "tsai.callback.core", "mapie.regression")


def with_few_numbers(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    lds, conformal = importlib.import_module("lds"), importlib.import_module("conformal")
    monkeypatch.setattr(lds, "NUM_LABELS", 2000)
    monkeypatch.setattr(conformal, "NUM_ROWS", 2000)
    return lds, conformal


def test_what_is_compared_with_other_packages_computes_the_same(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which stand-ins are written here, by their definition."""
    lds, conformal = with_few_numbers(monkeypatch)

    class DenseWeight:
        def fit(self, labels: np.ndarray) -> np.ndarray:
            density = gaussian_kde(labels, bw_method=1.06 * len(labels) ** -0.2)(labels)
            weights = np.maximum(1 - density / density.max(), 1e-6)
            return weights / weights.mean()

    class SplitConformalRegressor:
        def __init__(self, estimator: Any, confidence_level: float, prefit: bool) -> None:
            self.predict, self.level = estimator.predict, confidence_level

        def conformalize(self, x: np.ndarray, y: np.ndarray) -> None:
            self.reach = np.sort(np.abs(y - self.predict(x)))[math.ceil(self.level * (len(y) + 1)) - 1]

        def predict_interval(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            pred = self.predict(x)
            return pred, np.stack([pred - self.reach, pred + self.reach], 1)[:, :, None]

    def prepare_LDS_weights(labels: np.ndarray, **settings: Any) -> torch.Tensor:  # noqa: N802
        return torch.tensor(lds.weights_by_loop(labels))

    for name, rival in zip(RIVALS, (DenseWeight, prepare_LDS_weights, SplitConformalRegressor), strict=True):
        module = ModuleType(name)
        setattr(module, rival.__name__, rival)
        monkeypatch.setitem(sys.modules, name, module)
    for package in ("tsai", "tsai.callback", "mapie"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    report = benchmarks["timing"].Report()
    lds.main(report)
    conformal.main(report)
    differences = [re.search(r"by at most ([\d.e-]+\d)", row.detail) for row in report.rows]
    most = (None, 0.01, 1e-5, 1e-10, None)
    assert [found is None for found in differences] == [bound is None for bound in most]
    assert all(float(found[1]) < bound for found, bound in zip(differences, most, strict=True) if found and bound)
    assert min(row.value for row in report.rows) > 0


def test_what_is_compared_with_a_package_that_is_missing_is_left_out(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in RIVALS:
        monkeypatch.setitem(sys.modules, name, None)
    report = benchmarks["timing"].Report()
    for benchmark in with_few_numbers(monkeypatch):
        benchmark.main(report)
    assert [row.what.split(",")[0] for row in report.rows] == ["loop over labels / LDS fit and weigh", "PointConformal"]
    said = capsys.readouterr().out
    assert all(f"{name} is not installed" in said for name in ("denseweight", "tsai", "MAPIE"))


def test_a_training_step_of_a_model_is_compared_on_each_backbone_there_is(
    benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    losses, report = importlib.import_module("losses"), benchmarks["timing"].Report()
    monkeypatch.setattr(losses, "IMAGES", {"small_resnet": 2})
    monkeypatch.setattr(losses, "ROUNDS", 2)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    generator = torch.Generator().manual_seed(0)
    density = LabelDensity.count(100 * torch.rand(500, generator=generator) ** 2, losses.BINS)
    losses.of_step(report, density, generator)
    assert "torchvision for this version of torch is not installed" in capsys.readouterr().out
    whats = [row.what.split(" / ")[0] for row in report.rows]
    assert whats == ["step of LongTailModel", 'step of LongTailModel, head="regression", LDS weights']
    assert min(row.value for row in report.rows) > 0


def test_what_is_measured_on_a_gpu_runs_on_a_few_numbers(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketched: None
) -> None:
    """With all that is measured in it, the time of each stage, and how it ended."""
    gpu, running = importlib.import_module("gpu"), load(str(FOLDER.parent / "tests" / "recipes" / "running.py"))
    running.make_faces(tmp_path / "faces")
    for name, value in running.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    device, words = torch.device("cpu"), ["--data", "utkface", "--root", str(tmp_path / "faces"), "--size", "16"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirToolkitWarning)
        for stage, more in (("parts", ()), ("step", ()), ("age", (words,))):
            gpu.STAGES[stage](gpu.KeptReport(tmp_path / f"{stage}.csv"), device, True, *more)
    (tmp_path / "tests.txt").write_text("...\n==== 7 passed in 2 s ====\n")
    (tmp_path / "stages.csv").write_text("what,value,unit,detail\nparts: exit code 0; took,3,s,\n")
    gpu.table(tmp_path, device)
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert table.stage.unique().tolist() == ["stages", "parts", "step", "age"]
    parts = table[table.stage == "parts"]
    assert (parts.value > 0).all()
    assert {"GB/s", "µs", "%"} == set(parts.unit)
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "Tests: 7 passed in 2 s" in text
    for what in ("FDS, calibration, 64 rows: time", "ResNet-18", "fastest epoch of vanilla on cpu", "exit code 0"):
        assert what in text, what


def test_a_resnet_that_cannot_be_had_is_said_to_be_skipped(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = importlib.import_module("gpu")
    for library in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, library, None)
    gpu.step(gpu.KeptReport(tmp_path / "step.csv"), torch.device("cpu"), True)
    assert "skipped, since neither torchvision nor timm is installed" in (tmp_path / "step.csv").read_text()


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout, which most Linux systems have")
@pytest.mark.parametrize("failing", ["step", ""])
def test_a_stage_that_fails_leaves_the_others_and_shows_in_the_exit_code(failing: str, tmp_path: Path) -> None:
    stand_in = tmp_path / "python"  # for what takes minutes
    stand_in.write_text(f'#!/bin/sh\necho "$@"\n[ "$2" != "{failing}" ]\n')
    stand_in.chmod(0o755)
    paths = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([FOLDER / "gpu.sh", tmp_path / "out"], env=paths, capture_output=True, text=True)
    assert done.returncode == (1 if failing else 0)
    stages = pd.read_csv(tmp_path / "out" / "stages.csv")
    codes = [f"{name}: exit code {1 if name == failing else 0}" for name in ("tests", "parts", "step", "age", "table")]
    assert [what.split(" (")[0] for what in stages.what] == codes
    limits = [int(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert sum(limits) + 5 * len(limits) <= 370
    assert "-m gpu" in (tmp_path / "out" / "tests.txt").read_text()


HEAD = "method,seed,mae,bmae,few,bmase,crps,coverage,seconds,tuning_seconds,setting,rows,epochs,trials"
RATIOS = {  # of bMAE, of few and of MAE on the sets a, b and c
    "l1": [(1.0, 1.0, 1.0)] * 3,
    "lds": [(0.70, 0.50, 1.05), (0.80, 0.70, 1.12), (0.75, 0.60, 1.00)],
    "mse": [(1.30, 1.40, 0.97), (1.20, 1.10, 0.95), (1.40, 1.05, 0.96)],
    "balanced_mse": [(0.60, 0.70, 1.30), (1.25, 1.30, 1.40), (0.97, 0.80, 1.20)],
    "fds": [(0.85, 0.90, 1.02), (0.87, 0.92, 1.03), (0.86, 0.91, 1.01)],
    "boosting": [(0.90, 0.95, 0.92), (0.85, 0.91, 0.94)],
    "coral": [(0.10, 0.10, 0.10)],
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Results on three sets: ``lds`` is better, ``mse`` worse, ``balanced_mse`` uncertain, and others lack sets."""
    pytest.importorskip("matplotlib")
    for i, name in enumerate("abc"):
        rows, differences = [], ["method,metric,region,difference_low,difference_high,ratio,ratio_low,ratio_high"]
        for method, sets in RATIOS.items():
            if i >= len(sets):
                continue
            for seed in (0, 1):  # which differ by a tenth
                bmae, few, mae = (ratio * (10 + i) * (1 + seed / 10) for ratio in sets[i])
                rows.append(f'{method},{seed},{mae},{bmae},{few},0.9,,,36,72,"{{""lr"": 0.1}}",100,4,2')
            for (metric, region), ratio in zip((("bmae", "all"), ("mae", "few"), ("mae", "all")), sets[i], strict=True):
                ends = f"{ratio - 1.05:.2f},{ratio - 0.95:.2f},{ratio},{ratio - 0.05:.2f},{ratio + 0.05:.2f}"
                differences.append(f"{method},{metric},{region},{ends}")
        (tmp_path / f"{name}.csv").write_text("\n".join(["# command | versions", HEAD, *rows]))
        (tmp_path / f"{name}-differences.csv").write_text("\n".join(differences))
    (tmp_path / "b-failed.csv").write_text("method,reason\ncoral,out of memory")
    return tmp_path


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_page_of_the_suite_says_what_its_results_hold(suite: Path) -> None:
    report = runpy.run_path(str(FOLDER / "suite/report.py"))
    read = report["read"](suite)
    table = report["ranks"](read)
    assert table.columns.tolist() == ["balanced_mse", "fds", "l1", "lds", "mse"]  # the others did not run on every set
    ranks = {"lds": 1.3, "fds": 2.3, "balanced_mse": 3.0, "l1": 3.7, "mse": 4.7}
    assert report["average_ranks"](table)["rank"].to_dict() == ranks
    ranks = {"fds": 1.7, "lds": 2.2, "l1": 2.7, "mse": 3.7, "balanced_mse": 4.8}  # lds is too dear on one set
    assert report["average_ranks"](report["ranks"](read, 1.1))["rank"].to_dict() == ranks
    # Demšar 2006, table 5: q is 2.343 for three classifiers.
    assert report["critical_difference"](3, 3) == pytest.approx(2.343 * (3 * 4 / (6 * 3)) ** 0.5, rel=1e-3)
    assert report["hours"](read) == pytest.approx((36 * 36 + 18 * 72) / 3600)
    # Logarithms of 0.70, 0.80 and 0.75: mean -0.28916, deviation 0.06681; 97.5 % of Student's t with 2 degrees of
    # freedom lie below 4.3027, so half of the interval is 0.16597.
    assert report["geometric"](pd.Series([0.70, 0.80, 0.75])) == pytest.approx((0.74889, 0.63435, 0.88411), abs=2e-4)
    report["main"](suite, suite)
    page = (suite / "which-method.md").read_text(encoding="utf-8")
    rises = "MAE rises by more than a tenth: b 1.12 [1.07, 1.17]"
    best = "`lds`, best of 4 | 0.75 [0.63, 0.88] | 0.59 [0.39, 0.90] | 1.06 [0.92, 1.22]"
    coral = "not compared, without results on: `coral` (b (failed), c)"
    assert f"| A network; its head is one number and stays | {best} | {rises} |" in page
    assert f"| A network; its head may become bins | no advice: 0 methods on 3 sets | | | | {coral} |" in page
    assert f"| A network; only the rare labels matter | {best} | {rises}; {coral} |" in page
    assert "| A network; the mean error must not rise | `mse`, best of 4 | 1.30 " in page
    assert "bMAE rises: a 1.30 [1.25, 1.35], b 1.20 [1.15, 1.25], c 1.40 [1.35, 1.45]; few rises: a 1.40 " in page
    assert "| The rows are a table, and any estimator will do | no advice: 0 methods on 3 sets |" in page
    assert "| coral | 0.10 | 0.10 | 0.10 | 1 | b (failed), c |" in page
    assert "| lds | **0.70** [0.65, 0.75] | **0.80** [0.75, 0.85] | **0.75** [0.70, 0.80] |" in page
    assert "| balanced_mse | **0.60** [0.55, 0.65] | **1.25** [1.20, 1.30] | 0.97 [0.92, 1.02] |" in page
    assert ", 4 epochs and 2 seeds:\n0.72 hours" in page
    assert "| lds | 7.35 ± 0.49 |" in (suite / "tables.md").read_text(encoding="utf-8")
    assert (suite / "which-method.png").stat().st_size > 5_000


def test_results_of_some_methods_alone_have_a_section_and_enter_no_mean(suite: Path) -> None:
    report = runpy.run_path(str(FOLDER / "suite/report.py"))
    before = report["page"](report["read"](suite))
    folders = {"faces": ("a", "utkface"), "faces_untuned": ("c", "utkface"), "uci_dir": ("b", "airfoil_dir")}
    for folder, (old, name) in folders.items():
        (suite / folder).mkdir()
        for end in (".csv", "-differences.csv"):
            (suite / folder / f"{name}{end}").write_text((suite / f"{old}{end}").read_text())
    for folder in ("faces", "faces_untuned"):
        with (suite / folder / "utkface-differences.csv").open("a") as file:
            file.write("\nlds,mae,many,0.1,0.5,1.3,1.1,1.5")
    untuned = suite / "faces_untuned/utkface.csv"
    untuned.write_text(untuned.read_text().replace(",100,4,2", ",100,4,0"))
    report["main"](suite, suite)
    page = (suite / "which-method.md").read_text(encoding="utf-8")
    sections = page[page.index("## Faces") : page.index("## Average ranks")]
    assert page.replace(sections, "") == before
    tuned, fixed = re.findall(r"utkface: 100 faces .*, (.*?),\n4 epochs and 2 seeds; .* bMAE of (.*) years", sections)
    assert tuned == ("2 trials", "10.50 ± 0.71")
    assert fixed == ("no trials", "12.60 ± 0.85")
    assert sections.index("| lds | **0.70**") < sections.index("| mse | **1.30**")  # by bMAE
    assert "| lds | **0.75** [0.70, 0.80]" in sections
    assert (
        "| lds | **0.70** [0.65, 0.75] | **0.50** [0.45, 0.55] | 1.05 [1.00, 1.10] | **1.30** [1.10, 1.50] |"
        in sections
    )
    assert "| balanced_mse | 5.69; 16.17 ± 1.1 |" in sections  # 11 times 1.4, and a tenth more
    assert "| mse | 10.97 ± 0.74 |" in sections
    assert "| lds | 7.35 ± 0.49 |" in (suite / "faces/tables.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_is_not_better_beyond_chance_is_not_recommended_and_two_methods_have_no_ranks(suite: Path) -> None:
    for path in suite.glob("[abc]*.csv"):
        lines = path.read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("lds", "mse", "fds", "boosting", "coral"))]
        path.write_text("\n".join(kept))
    report = runpy.run_path(str(FOLDER / "suite/report.py"))
    report["main"](suite, suite)
    page = (suite / "which-method.md").read_text(encoding="utf-8")
    assert "its head is one number and stays | plain L1: none of 1 is better beyond chance |" in page
    assert "Ranks are compared from 3 methods on, and 2 ran on all 3 sets." in page
    assert not (suite / "which-method.png").exists()
    (suite / "c.csv").write_text((suite / "c.csv").read_text().replace(",100,4,2", ",100,8,2", 1))
    with pytest.raises(SystemExit, match=r"must have one budget, got several:\n *rows +epochs"):
        report["read"](suite)


def test_the_page_names_sets_without_rare_labels_and_sets_where_the_mean_error_is_no_price(suite: Path) -> None:
    part = suite / "c-differences.csv"
    part.write_text("\n".join(line for line in part.read_text().splitlines() if ",few," not in line))
    report = runpy.run_path(str(FOLDER / "suite/report.py"))
    page = report["page"](report["read"](suite))
    assert "fewer than 20 training rows, which c does not have. A method" in page
    assert "spread evenly, so that its MAE is no price" not in page
    for name, ratio in {"a": 1.1, "b": 1.1, "c": 0.5}.items():
        with (suite / f"{name}-differences.csv").open("a") as file:
            file.write(f"\nlong_tail_model,mae,all,0,1,{ratio},1,2")
    for end in (".csv", "-differences.csv"):
        (suite / f"c{end}").rename(suite / f"sts_b_dir{end}")
    page = report["page"](report["read"](suite))
    assert "Without it the MAE of\n`long_tail_model` is 1.10 [1.10, 1.10]." in page


def test_the_page_of_the_suite_needs_three_sets(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in suite.glob("c*.csv"):
        path.unlink()
    runpy.run_path(str(FOLDER / "suite/report.py"))["main"](suite, suite / "docs")
    assert "The page needs 3 sets" in capsys.readouterr().out
    assert "| lds | 7.35 ± 0.49 |" in (suite / "tables.md").read_text(encoding="utf-8")


def test_the_page_that_is_published_is_made_of_the_results_beside_it() -> None:
    report = runpy.run_path(str(FOLDER / "suite/report.py"))
    suite = report["read"](FOLDER / "suite")
    assert (FOLDER / "suite/tables.md").read_text(encoding="utf-8") == report["tables"](suite)
    for name, part in suite.apart.items():
        assert (FOLDER / "suite" / name / "tables.md").read_text(encoding="utf-8") == report["tables"](part)
    page = FOLDER.parent / "docs/which-method.md"
    assert page.read_text(encoding="utf-8") == report["page"](suite)
