"""The comparison of all methods on a few faces, and the methods themselves."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
import xarray as xr
from running import RUN_FILES, Outcome, equal_bits, files, make_faces, numbers

from dir_toolkit.experiment.results.schema import load_results
from dir_toolkit.experiment.study import Study
from dir_toolkit.experiment.training.runtime import Runtime

sys.path.insert(0, str(running.RECIPES / "studies"))  # as Python does for a script

import faces

RECIPE = running.RECIPES / "studies/compare.py"
SHORT = ["--data", "utkface", "--root", "faces", "--size", 16, "--epochs", 1, "--batch-size", 64, "--replicates", 100]
METHODS = ["--methods", "soft+tau", "vanilla", "soft", "--seeds", 2]
AGES: dict[str, Any] = {"ages": range(2, 117, 4), "each": 6}  # near every bin of the axis, so that nothing is warned of
FIGURES = {
    *("label-density", "error-by-region", "difference-to-vanilla--mae", "difference-to-vanilla--bmae"),
    *("interval-coverage-by-region", "error-and-cost", "error-by-age--some-methods", "tau-on-validation"),
    *("predicted-against-true--some-methods", "examples"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished comparison, named by an absolute path, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    make_faces(folder / "faces", **AGES)
    return folder / "made", running.run(RECIPE, folder, *SHORT, *METHODS, "--out", folder / "made").out


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the comparison, to go on with."""
    (tmp_path / "faces").symlink_to(finished[0].parent / "faces")
    return shutil.copytree(finished[0], tmp_path / "copied")


@pytest.fixture
def bare(sketched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons without the figures that ``finished`` has."""
    for name in ("region", "difference", "error", "coverage", "cost", "density"):
        monkeypatch.setattr(f"dir_toolkit.experiment.results.summary.{name}_figure", lambda *_, **__: None)


def same_comparison(one: Path, two: Path) -> bool:
    """Whether two folders hold the same errors and differences, whatever the minutes."""
    results = [numbers(load_results(out / "results.nc")) for out in (one, two)]
    return (
        results[0].identical(results[1])
        and (one / "differences.csv").read_bytes() == (two / "differences.csv").read_bytes()
    )


def test_help_answers_without_torch_and_says_what_every_method_is(tmp_path: Path) -> None:
    words = ("--baseline", "--replicates", "soft bins, prior adjusted", *faces.METHODS, *faces.GROUPS)
    running.check_help_answers_without_torch(RECIPE, tmp_path, *words)


def test_a_comparison_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, text = finished
    trained = {f"{method}/seed{seed}/{name}" for method in ("vanilla", "soft") for seed in (0, 1) for name in RUN_FILES}
    not_trained = ("config.json", "results.nc", "model.safetensors")
    adjusted = {f"soft+tau/seed{seed}/{name}" for seed in (0, 1) for name in not_trained}
    summary = {"results.nc", "table.md", "report.html", "differences.csv", "events"}
    assert set(files(out)) == trained | adjusted | summary | {f"figures/{name}.png" for name in FIGURES}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(FIGURES)
    assert "soft bins, prior adjusted after training" in page
    runs = re.findall(r"^(\S+), seed (\d) \(\d of 6\)$", text, re.MULTILINE)
    assert runs == [(method, seed) for seed in "01" for method in ("soft+tau", "vanilla", "soft")]


def test_the_result_holds_all_methods_in_their_order(finished: tuple[Path, str]) -> None:
    out, text = finished
    ds = load_results(out / "results.nc")
    assert ds["method"].values.tolist() == ["vanilla", "soft", "soft+tau", "constant"]
    assert ds["completed"].values.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]
    for table in (text, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert "Bold: better than vanilla" in table
    with (out / "differences.csv").open() as file:
        for row in (row for row in csv.DictReader(file) if row["difference"]):  # no test sample is of many or medium
            means = ds[row["metric"]].sel(region=row["region"]).mean("seed")
            off = float(means.sel({"method": row["method"]}) - means.sel({"method": "vanilla"}))
            assert float(row["difference"]) == pytest.approx(off, abs=1e-4)


def test_no_result_tells_where_things_lie_on_this_machine(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for name in ("results.nc", "vanilla/seed0/results.nc", "report.html", "table.md", "differences.csv"):
        for place in (out.parent, RECIPE.parents[2], Path.home(), sys.prefix):
            assert f"{place}/".encode() not in (out / name).read_bytes(), (name, place)


def test_the_helper_that_compares_sees_a_difference(finished: tuple[Path, str], copied: Path) -> None:
    assert same_comparison(finished[0], copied)
    (copied / "differences.csv").write_text("other")
    assert not same_comparison(finished[0], copied)


@pytest.mark.usefixtures("bare")
def test_resume_adds_methods_and_baselines_and_repeats_nothing(copied: Path, here: Callable[..., Outcome]) -> None:
    def trained() -> dict[str, bytes]:  # what follows without training is made anew
        return {name: made for name, made in files(copied).items() if "/seed" in name and "soft+tau" not in name}

    before = trained()
    refused = here(*SHORT, "--methods", "vanilla", "bins", "--out", copied)
    assert "must hold no earlier run" in refused.err
    outcome = here(*SHORT, "--methods", "bins", "--baseline", "soft", "--seeds", 1, "--resume", "--out", copied)
    assert (outcome.code, outcome.err) == (0, "")
    assert "better than soft" in outcome.out
    assert set(trained()) - set(before) == {f"bins/seed0/{name}" for name in RUN_FILES}
    assert {name for name in before if trained()[name] != before[name]} == set()
    ds = load_results(copied / "results.nc")
    assert ds["method"].values.tolist() == ["vanilla", "bins", "soft", "soft+tau", "constant"]
    assert ds["completed"].values.tolist() == [[1, 1], [1, 0], [1, 1], [1, 1], [1, 0]]


@pytest.mark.usefixtures("bare")
def test_a_run_that_fails_costs_the_others_nothing_and_is_made_up_for(
    finished: tuple[Path, str], copied: Path, here: Callable[..., Outcome]
) -> None:
    words = [*SHORT, *METHODS, "--resume", "--out", copied]
    (copied / "soft/seed1/checkpoint-last.pt").write_bytes(b"damaged")
    for name in ("soft/seed1/results.nc", "soft+tau/seed1/results.nc", "report.html"):
        (copied / name).unlink()
    outcome = here(*words)
    assert outcome.code == 1
    first, *named = outcome.err.splitlines()
    assert first == "these runs failed; --resume tries them again:"
    assert [re.match(r"  (\S+, seed \d): CheckpointError: .*checkpoint-last\.pt", one)[1] for one in named] == [  # type: ignore[index]
        "soft+tau, seed 1",
        "soft, seed 1",
    ]
    assert load_results(copied / "results.nc")["completed"].values.tolist() == [[1, 1], [1, 0], [1, 0], [1, 0]]
    assert "Failed: soft, seed 1: CheckpointError: " in (copied / "report.html").read_text()
    shutil.rmtree(copied / "soft/seed1")
    outcome = here(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert same_comparison(finished[0], copied)
    assert "Failed:" not in (copied / "report.html").read_text()


@pytest.mark.usefixtures("bare")
def test_runs_of_another_budget_and_a_missing_baseline_are_told(copied: Path, here: Callable[..., Outcome]) -> None:
    config = copied / "soft/seed1/config.json"
    usual = config.read_text()
    config.write_text(usual.replace('"lr": 0.002', '"lr": 0.1').replace('"compile": false', '"compile": true'))
    text = here(*SHORT, "--methods", "soft+tau", "--resume", "--out", copied)
    assert "all runs in --out must have the same budget; these had another one:" in text.err
    assert "soft/seed1: --lr 0.1, now 0.002\n" in text.err
    assert re.search(r"soft/seed1: --compile True, now False\n?$", text.err)
    config.write_text(usual)
    for seed in (0, 1):
        (copied / f"vanilla/seed{seed}/results.nc").unlink()
    outcome = here(*SHORT, "--methods", "soft+tau", "--resume", "--out", copied)
    rule = (
        r"recipes/studies/compare\.py: --baseline must have a finished run in .*copied, got vanilla, which has none\. "
    )
    assert re.fullmatch(rf"{rule}Add it to --methods\.\n", outcome.err)


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ("--replicates 10", ["--replicates must be at least 100, got 10."]),
        ("--methods soft bins", ["--methods must include the baseline vanilla, got soft bins."]),
        ("--baseline default", ["--baseline must be one method, got default."]),
        (
            "--methods vanila --baseline sofft",
            ["--baseline must name methods that --help lists, got sofft. Did", "--methods must name methods that --h"],
        ),
        ("--methods vanilla bsam ccc --loss mse", ["--loss must be l1 with bsam ccc, got mse."]),
        ("--methods vanilla soft --tau 0.5", ["--tau needs a method that is adjusted after training"]),
        (
            "--seeds 0 --epochs 0 --kernel-size 4 --fds-momentum 2 --root x --listing y --label-sigma nan "
            "--stage-two-epochs 0 --checkpoint-minutes -1",
            [
                *("--root must", "--listing needs", "--seeds must be finite and at least 1, got 0.", "--stage-two"),
                *("--checkpoint-minutes must", "--label-sigma must be finite and at least 0, got nan", "Optimization"),
                *("epochs must be", "gaussian: size must be odd", "FDS: momentum must be"),
            ],
        ),
    ],
)
def test_all_bad_settings_are_told_at_once(
    tmp_path: Path, here: Callable[..., Outcome], words: str, rules: list[str]
) -> None:
    outcome = here(*words.split())
    assert outcome.code == 1
    first, *text = outcome.err.splitlines()
    assert first == "recipes/studies/compare.py: these settings cannot run:"
    assert len(text) == len(rules), text
    for one, rule in zip(text, rules, strict=True):
        assert one.strip().startswith(rule)
    assert files(tmp_path) == {}


@pytest.mark.usefixtures("bare")
def test_a_list_of_agedb_is_read(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    images = sorted(make_faces(tmp_path / "AgeDB").glob("*.chip.jpg"))
    rows = ["age,path,split"]
    for i, split in enumerate(["train"] * 8 + ["val"] * 2 + ["test"] * 3):
        rows.append(f"{20 + i % 3},AgeDB/{images[i].name},{split}")
    rows.append("50,AgeDB/none.jpg,train")
    (tmp_path / "agedb.csv").write_text("\n".join(rows))
    words = ["--data", "agedb", "--root", ".", "--size", 16, "--epochs", 1, "--batch-size", 4, "--replicates", 100]
    words += ["--methods", "unsmoothed", "--baseline", "unsmoothed", "--augmentation", "strong", "--seeds", 1]
    refused = here(*words)
    assert refused.code == 1
    assert re.fullmatch(r"agedb.csv, line 15: path must name an image.*\n", refused.err)
    outcome = here(*words, "--on-error", "skip", "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "8 samples to train on, 2 to validate, 3 to test; 1 skipped: missing file" in outcome.out
    assert load_results(tmp_path / "out/results.nc")["method"].values.tolist() == ["unsmoothed", "constant"]


@pytest.mark.usefixtures("bare")
def test_a_model_of_timm_is_trained_stopped_and_resumed(
    finished: tuple[Path, str], here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    (tmp_path / "faces").symlink_to(finished[0].parent / "faces")
    words = [*SHORT, "--methods", "vanilla", "--seeds", 1, "--backbone", "mobilenetv3_small_050"]
    assert here(*words, "--out", "whole").code == 0
    with monkeypatch.context() as patched:
        press = partial(signal.raise_signal, signal.SIGINT)
        patched.setattr("dir_toolkit.experiment.training.log.RunLog.step", lambda *_: press())
        assert here(*words, "--out", "made").code == 130
    assert not (tmp_path / "made/results.nc").exists()
    assert here(*words, "--out", "made", "--resume").code == 0
    assert equal_bits(*(tmp_path / place / "vanilla/seed0/checkpoint-last.pt" for place in ("whole", "made")))
    one, two = (load_results(tmp_path / place / "results.nc") for place in ("whole", "made"))
    xr.testing.assert_identical(numbers(one), numbers(two))
    assert json.loads((tmp_path / "made/vanilla/seed0/config.json").read_text())["backbone"] == words[-1]


def test_a_package_that_is_missing_is_told_in_one_line(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    outcome = here("--backbone", "resnet18")
    assert re.fullmatch(r'backbone_of: timm .* must be .* pip install "dir_toolkit\[models\]"\n', outcome.err)


# ---- the methods ----


def test_the_names_of_methods_are_all_known() -> None:
    assert {name for group in faces.GROUPS.values() for name in group} == set(faces.METHODS)
    assert faces.named(["vanilla", "default"]) == ["vanilla", faces.WINNER]
    assert faces.named(["soft", "all", "soft"]) == ["soft", *(name for name in faces.GROUPS["all"] if name != "soft")]
    titles = [method.title for method in faces.METHODS.values()]
    assert len(set(titles)) == len(titles)
    for method in faces.METHODS.values():
        assert method.start is None or faces.METHODS[method.start].start is None
        assert not method.tau or method.start is not None


@pytest.fixture(scope="module")
def tried(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of every method, on faces that are as tall as the network allows."""
    folder = tmp_path_factory.mktemp("tried")
    settings = faces.Settings(
        data="utkface", root=finished[0].parent / "faces", size=16, epochs=1, batch_size=64, stage_two_epochs=1
    )
    task = replace(faces.task(settings), data=lambda seed: faces.load(settings))
    runtime = Runtime(torch.device("cpu"))
    return Study(folder / "out", task, faces.methods(settings), runtime, faces.optimization(settings), resume=True)


@pytest.mark.parametrize("name", faces.METHODS)
def test_every_method_trains_and_predicts_ages(name: str, tried: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIR_TOOLKIT_CACHE", str(Path(tried.folder) / "cache"))
    method = faces.METHODS[name]
    tried.run([name], keep=lambda trial, trained, output: trained)
    assert [why for key, why in tried.failed.items() if key[1] == name] == []
    ((_, run),) = [(key, run) for key, run in tried.runs.items() if key[1] == name]
    assert np.isfinite(run.errors["prediction"]).all()
    assert ("lower" in run.errors) == (method.head != "regression" or method.tau)
    if "lower" in run.errors:
        assert (run.errors["lower"] <= run.errors["upper"]).all()
    assert run.extra.method == (name if not method.tau else method.start)
    assert (run.extra.fds is None) == (faces.METHODS[run.extra.method].fds is None)
    assert (run.extra.tau is not None) == method.tau
    if method.start is not None and not method.tau:
        spot = Path(tried.folder)
        first, second = (running.tensors(spot / n / "seed0/checkpoint-last.pt") for n in (method.start, name))
        moved = {key for key in first if key.startswith(".model.") and not torch.equal(first[key], second[key])}
        assert moved == {".model.head.weight", ".model.head.bias"}


def test_the_networks_that_are_averaged_are_those_of_five_seeds_and_their_minutes_are_added(tried: Study) -> None:
    trial = tried.trial(tried.tasks[0], "soft+ensemble+tau", 1)  # type: ignore[index]
    mean = faces.averaged("soft", 2, trial)
    every = [trial.study.trial(trial.task, "soft", seed).result() for seed in (2, 3)]
    assert mean.minutes == pytest.approx(sum(one.minutes for one in every))
    images = torch.rand(3, 3, 16, 16)
    each = torch.stack([one.model.eval()(images).distribution for one in every])
    assert torch.allclose(mean.model(images).distribution, each.mean(0), atol=1e-5)
    assert not torch.allclose(each[0], each[1], atol=1e-5)


@pytest.mark.parametrize("name", ["fds", "fds-permuted", "fds-noise"])
def test_controls_of_fds_get_the_features_and_the_labels_of_the_head(
    name: str, tried: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fds = faces.network(faces.METHODS[name], faces.Settings(), tried.trial(tried.tasks[0], name, 0))  # type: ignore[index]
    ages = torch.tensor([10.0, 60.0]).repeat(64)
    features = ages[:, None].repeat(1, 128)
    monkeypatch.setattr(model.backbone, "forward", lambda images: features)
    assert fds is not None
    with fds.labels(ages) if name != "fds" else nullcontext():
        model(torch.zeros(128, 3, 16, 16), ages)
    fds.end_epoch()
    mean = fds.statistics()["mean"][[10, 60], 0].tolist()
    assert mean == ([10, 60] if name != "fds-permuted" else [pytest.approx(35, abs=8)] * 2)


def test_settings_reach_the_network(tried: Study) -> None:
    def of(name: str, **settings: Any) -> Any:
        changed = replace(faces.Settings(), **settings)
        trial = tried.trial(tried.tasks[0], name, 0)  # type: ignore[index]
        return faces.network(faces.METHODS[name], changed, trial)

    assert of("soft", label_sigma=3.5)[0].readout.sigma == 3.5
    assert of("bins", label_sigma=3.5)[0].readout.sigma is None
    assert of("soft+expectation")[0].readout.expectation_weight == 1
    assert of("vanilla", loss="focal-mse")[0].settings["loss"] == "weighted_focal_mse"
    assert of("vanilla")[1] is None
    assert not faces.backbone(faces.Settings())._compiled_call_impl
    assert faces.backbone(faces.Settings(compile=True))._compiled_call_impl
