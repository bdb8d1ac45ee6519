"""The studies of digits with trainings of one epoch."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
from running import Outcome, files, make_mnist

from dir_toolkit.experiment.data.digits import digits
from dir_toolkit.experiment.results.schema import load_results
from dir_toolkit.experiment.study import Study
from dir_toolkit.experiment.training.checkpoint import load_checkpoint

sys.path.insert(0, str(running.RECIPES / "studies"))  # as Python does for a script

import digit_methods

pytest.importorskip("sklearn")

RECIPE = running.RECIPES / "studies/digits.py"
SHORT = ["--epochs", 1, "--batch-size", 256, "--stage-two-epochs", 1]
SUMMARY = {"results.nc", "table.md", "report.html", "events"}


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies put their runs."""
    return tmp_path_factory.mktemp("studied")


def test_help_answers_without_torch(tmp_path: Path) -> None:
    words = ("--retention", "stage-two-epochs", "imbalance", "ldam-drw", *digit_methods.METHODS)
    running.check_help_answers_without_torch(RECIPE, tmp_path, *words)


@pytest.mark.filterwarnings("ignore:.* the best tau is the largest")  # of one epoch
@pytest.mark.parametrize(
    ("summary", "rows", "figures"),
    [
        ("remedies-step-0.1", 15, ["length-of-each-class-s-weights", "error-by-digit", "training"]),
        ("imbalance-step", 18, ["balanced-error-of-the-thinned-digits", "balanced-error-of-all-digits"]),
        ("noise-step", 12, ["error-under-label-noise", "error-by-digit", "training"]),
        ("prototypes-step-0.1", 6, ["number-of-prototypes", "error-by-digit", "training"]),
        ("sigma-step-0.1", 7, ["width-of-the-similarity", "error-by-digit", "training"]),
        ("similarity-step-0.1", 4, ["distance-and-similarity", "error-by-digit", "training"]),
        ("features-step-0.1", 4, ["feature-space-of-the-test-images", "error-by-digit", "training"]),
        (
            "tau-step-0.1",
            4,
            [
                "balanced-error-over-tau-on-validation-images",
                "balanced-error-over-tau-on-test-images",
                "balanced-log-loss-over-tau-on-validation-images",
                "reliability-on-test-images--seed-0",
                "error-by-digit",
                "training",
            ],
        ),
        ("decoupling-step-0.1", 7, ["length-of-each-class-s-weights", "error-by-digit", "training"]),
    ],
)
def test_a_study_runs_to_its_end(
    studied: Path,
    here: Callable[..., Outcome],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    summary: str,
    rows: int,
    figures: list[str],
) -> None:
    study = summary.partition("-")[0]
    if study not in ("remedies", "imbalance", "features", "tau"):  # whose figures are of the same kinds
        request.getfixturevalue("sketched")
    if study == "imbalance":  # which has more runs than some figures show
        monkeypatch.setattr("dir_toolkit.experiment.study._MOST_IN_A_FIGURE", {"history": 5, "classes": 5})
    seeds = 2 if study == "tau" else 1  # whose figures show each seed
    planned, whole, done = [], Study.run, list[str]()

    def short(self: Study, names: tuple[str, ...], **options: Any) -> None:
        planned.append((len(names), len(self.tasks)))
        self.tasks = self.tasks[:: max(1, len(self.tasks) - 1)]
        done.extend(names[:: len(names) - 1] if study in ("prototypes", "sigma") else names)
        whole(self, done, **options)

    monkeypatch.setattr(Study, "run", short)  # at the first and the last of the values that a study varies
    outcome = here(*SHORT, "--study", study, "--seeds", seeds, "--resume", "--out", studied)
    assert (outcome.code, outcome.err) == (0, "")
    assert set(files(studied / summary)) == SUMMARY | {f"figures/{name}.png" for name in figures}
    ((methods, tasks),) = planned
    assert methods * tasks == rows
    rows = len(done) * min(tasks, 2)
    ds = load_results(studied / summary / "results.nc")
    assert (ds.sizes["method"], ds.sizes["seed"], int(ds["completed"].sum())) == (rows, seeds, rows * seeds)
    assert np.isfinite(ds["balanced_error"].sel(region=["all", "few", "many"])).all()
    if study == "imbalance":
        assert ds["method"].values[:2].tolist() == ["softmax, 100 % kept", "softmax, 2.5 % kept"]
        assert ds["train_count"].sel({"seed": 0}).values[1, :5].tolist() == [3] * 5


@pytest.mark.filterwarnings("ignore:.* the best tau is the largest")  # of one epoch
@pytest.mark.usefixtures("sketched")
def test_the_second_stage_leaves_the_encoder_alone(studied: Path, here: Callable[..., Outcome]) -> None:
    words = ["--methods", "softmax", "crt", "lws", "post-hoc", "tau-norm"]
    outcome = here(*SHORT, *words, "--resume", "--out", studied)
    assert (outcome.code, outcome.err) == (0, "")
    first, crt, lws = (
        load_checkpoint(studied / f"step-0.1/{method}/seed0/checkpoint-best.pt")["model"]
        for method in ("softmax", "crt", "lws")
    )
    encoder = {name for name in first if name.startswith("backbone.")}
    assert all(torch.equal(first[name], crt[name]) and torch.equal(first[name], lws[name]) for name in encoder)
    assert not torch.equal(first["head.weight"], crt["head.weight"])
    assert torch.equal(lws["head.linear.weight"], first["head.weight"])
    assert not torch.equal(lws["head.scale"], torch.ones(10))
    # What follows without training is made anew, in the run's own result, too; the tau of post-hoc is given.
    result = []
    for tau in (2.0, 0.5):
        assert here(*SHORT, *words, "--tau", tau, "--resume", "--out", studied).code == 0
        ds = load_results(studied / "comparison-step-0.1/results.nc").sel({"seed": 0})
        assert ds["tau"].isnull().values.tolist() == [True, True, True, True, False]
        one = load_results(studied / "step-0.1/post-hoc/seed0/results.nc")
        result.append(float(ds["log_loss"].sel({"method": "post-hoc"})))
        assert one["log_loss"].values.item() == result[-1]
    assert result[0] != result[1]


@pytest.mark.usefixtures("sketched")
def test_another_margin_is_refused_for_affinity_and_means_nothing_to_softmax(
    studied: Path, here: Callable[..., Outcome]
) -> None:
    words = [*SHORT, "--margin", 0.5, "--resume", "--out", studied, "--methods"]
    assert here(*SHORT, "--methods", "affinity-m5", "softmax", "--resume", "--out", studied).code == 0
    outcome = here(*words, "affinity-m5")
    assert outcome.code == 1
    assert "margin was 0.75 and is 0.5" in outcome.err
    assert here(*words, "softmax").code == 0


@pytest.mark.usefixtures("sketched")
def test_data_are_thinned_and_made_noisy_as_asked(here: Callable[..., Outcome], tmp_path: Path) -> None:
    words = [*SHORT, "--profile", "exponential", "--retention", 0.02, "--noise", 0.4, "--methods", "cosine+balanced"]
    outcome = here(*words, "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    ds = load_results(tmp_path / "out/comparison-exponential-0.02-noise-0.4/results.nc")
    whole = digits(seed=0)
    expected = np.rint(np.bincount(whole.train.labels) * 0.02 ** (np.arange(10) / 9)).astype(int)
    assert ds["train_count"].values.sum() == expected.sum()
    assert ds["bin_region"].values.tolist() == ["many"] * 5 + ["few"] * 5
    env = json.loads((tmp_path / "out/exponential-0.02-noise-0.4/cosine+balanced/seed0/env.json").read_text())
    assert env["data"]["digests"]["val"] == whole.val.digest


@pytest.mark.usefixtures("sketched")
def test_files_of_mnist_are_read(here: Callable[..., Outcome], tmp_path: Path) -> None:
    words = ["--data", "mnist", "--root", "mnist", "--epochs", 1, "--batch-size", 16, "--val-per-class", 1]
    outcome = here(*words)
    assert re.fullmatch(r"mnist: root must hold the four files of MNIST.*download_mnist.*\n", outcome.err)
    make_mnist(tmp_path / "mnist")
    outcome = here(*words, "--verify")
    assert re.fullmatch(r"mnist/.*: SHA-256 of the unpacked file must be the official.*\n", outcome.err)
    outcome = here(*words, "--train-per-class", 4, "--retention", 0.5, "--methods", "softmax", "ncm")
    assert (outcome.code, outcome.err) == (0, "")
    ds = load_results(tmp_path / "runs/mnist/mnist/comparison-step-0.5-of-4/results.nc")
    assert ds["train_count"].values[0, 0].tolist() == [2] * 5 + [4] * 5
    assert ds["bin_count"].values[0, 0].tolist() == [2] * 10


def test_all_bad_settings_are_told_at_once(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    words = (
        "--root x --download --verify --train-per-class 5 --seeds 0 --stage-two-epochs 0 --val-per-class 0 --noise 1 "
        "--checkpoint-minutes -1 --ldam-start 2 --equalized-drop -1 --focal-gamma -1 --tau nan --weight-decay -1 "
        "--feature-scale inf --margin 0 --ldam-margin -1 --center-strength 0 --retention 1.5 --lr 0 --methods sofmax "
        "--study all"
    )
    outcome = here(*words.split())
    assert outcome.code == 1
    for part in (
        *("--root must", "--download needs", "--verify needs", "--train-per-class needs", "--seeds must be"),
        *("--stage-two-epochs must", "--val-per-class must", "--noise must", "--checkpoint-minutes must"),
        *("--ldam-start must be between 0 and 1", "--equalized-drop must", "--focal-gamma must", "lr must be > 0"),
        *("--tau must be finite and at least 0, got nan", "weight_decay must", "--feature-scale must", "--margin must"),
        *("--ldam-margin must", "--center-strength must", "--retention must be at most 1, got 1.5"),
        *("--methods must name methods that --help lists, got sofmax", "--study must be one of remedies, "),
    ):
        assert part in outcome.err
    assert files(tmp_path) == {}
