"""The recipe of long-tailed digits, started as a user would start it, on scikit-learn's digits and tiny MNIST files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import running
import torch
import xarray as xr
from running import RUN_FILES, Outcome, equal_bits, files, numbers

from dir_toolkit.experiment.data.digits import digits
from dir_toolkit.experiment.results.schema import load_results
from dir_toolkit.experiment.training.checkpoint import load_checkpoint

RECIPE = running.RECIPES / "mnist.py"
SUMMARY_FILES = {"results.nc", "table.md", "report.html", "events"}
SHORT = ["--epochs", 1, "--batch-size", 512, "--stage-two-epochs", 1]
# One that draws random numbers, and one with a sampler, behind the softmax network that it starts from.
STOPPED = ["--head", "softmax", "--loss", "equalized", "--after", "crt", "--epochs", 2, "--stage-two-epochs", 2]
STEPS = 19  # an epoch of STOPPED
# The recipe, but in its n-th step a signal comes.
WITH_SIGNAL = """
import itertools, os, pathlib, runpy, sys
from dir_toolkit.experiment.training.log import RunLog
number, at, script, *words = sys.argv[1:]
steps, usual = itertools.count(1), RunLog.step
def step(self):
    usual(self)
    if next(steps) == int(at):
        os.kill(os.getpid(), int(number))
RunLog.step = step
sys.argv = [script, *words]
sys.path.insert(0, str(pathlib.Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""

recipe, run = partial(running.start, RECIPE), partial(running.run, RECIPE)


def signalled(folder: Path, number: signal.Signals, at: int, *words: object) -> Outcome:
    """The recipe in a process of its own that gets a signal within its step ``at``."""
    python = ("-W", "error", "-c", WITH_SIGNAL, str(int(number)), str(at))
    return recipe(folder, *words, python=python)


def same_numbers(one: xr.Dataset, two: xr.Dataset) -> None:
    """Two results of one method, of which the second may have variables that only other methods of its result need."""
    xr.testing.assert_identical(numbers(one), numbers(two)[list(numbers(one).data_vars)])


def faults(outcome: Outcome) -> list[str]:
    """What keeps settings from running."""
    assert outcome.code == 1, outcome.err
    first, *told = outcome.err.splitlines()
    assert first == "recipes/mnist.py: these settings cannot run:"
    return [line.strip() for line in told]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def make_mnist(root: Path) -> None:
    """The four files with six training and two test images a digit."""
    root.mkdir()
    for part, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (root / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the default comparison, named by an absolute path, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "made", run(folder, "--epochs", 2, "--out", folder / "made").out


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the default comparison, to go on with."""
    return shutil.copytree(finished[0], tmp_path / "copied")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, Outcome]:
    """The folder of a comparison that was stopped by Ctrl-C, went on, and was killed; and how the two ended."""
    folder = tmp_path_factory.mktemp("stopped")
    words = [*STOPPED, "--resume", "--out", "made"]
    ctrl_c = signalled(folder, signal.SIGINT, STEPS + 6, *words)
    # The rest of equalized, both epochs of softmax, one of crt and a part of the next.
    at = (STEPS - 6) + 2 * STEPS + STEPS + 6
    killed = signalled(folder, signal.SIGKILL, at, *words, "--checkpoint-minutes", 0)
    return folder / "made", ctrl_c, killed


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all studies put their runs."""
    return tmp_path_factory.mktemp("studied")


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--retention", "stage-two-epochs")


def test_the_default_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, told = finished
    methods = ("softmax", "logit-adjusted", "affinity-m5")
    runs = {f"step-0.1/{method}/seed0/{name}" for method in methods for name in RUN_FILES}
    summary = {
        f"comparison-step-0.1/{name}" for name in (*SUMMARY_FILES, "figures/error-by-digit.png", "figures/training.png")
    }
    assert set(files(out)) == runs | summary
    assert told.rstrip().endswith(f"Report: {out / 'comparison-step-0.1/report.html'}")
    for method in methods:
        assert f"{method} on step-0.1, seed 0: 601 images" in told


def test_the_table_tells_balanced_errors_of_all_few_and_many(finished: tuple[Path, str]) -> None:
    out, told = finished
    ds = load_results(out / "comparison-step-0.1/results.nc").sel({"seed": 0})
    table = (out / "comparison-step-0.1/table.md").read_text()
    columns = "balanced error all | balanced error few | balanced error many | error all"
    assert f"| method | seeds | {columns} |" in table
    assert "| test samples |  | 500 | 250 | 250 | 500 |" in table
    for method in ("softmax", "logit-adjusted", "affinity-m5"):
        of = ds.sel({"method": method})
        shares = [of["balanced_error"].sel(region=region) for region in ("all", "few", "many")]
        cells = [f"{100 * float(share):.2f}" for share in (*shares, of["error"].sel(region="all"))]
        assert f"| {method} | 1 | {' | '.join(cells)} |" in table
        assert re.search(rf"^{method} +1 +{' +'.join(cells)}$", told, re.MULTILINE)


def test_the_result_follows_the_schema(finished: tuple[Path, str]) -> None:
    out, _ = finished
    ds = load_results(out / "comparison-step-0.1/results.nc")
    assert ds["method"].values.tolist() == ["softmax", "logit-adjusted", "affinity-m5"]
    assert ds["bin_region"].values.tolist() == ["few"] * 5 + ["many"] * 5
    recall = ds["bin_recall"].values  # (method, seed, digit)
    np.testing.assert_allclose(ds["balanced_error"].sel(region="all"), 1 - recall.mean(2), atol=1e-12)
    np.testing.assert_allclose(ds["balanced_error"].sel(region="few"), 1 - recall[..., :5].mean(2), atol=1e-12)
    # Affinities are no logits, and tell nothing that could be calibrated.
    assert ds["log_loss"].isnull().values.tolist() == [[False], [False], [True]]
    for method in ds["method"].values:
        one = load_results(out / f"step-0.1/{method}/seed0/results.nc")
        same_numbers(one, ds.sel({"method": [method]}))


def test_settings_versions_and_data_are_kept(finished: tuple[Path, str]) -> None:
    out, _ = finished
    config = json.loads((out / "step-0.1/affinity-m5/seed0/config.json").read_text())
    assert (config["head"], config["epochs"], config["batch_size"], config["margin"]) == ("affinity", 2, 32, 0.75)
    env = json.loads((out / "step-0.1/affinity-m5/seed0/env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
    assert env["data"]["sizes"] == {"train": 601, "val": 200, "test": 500}
    data = digits(seed=0)
    assert env["data"]["digests"]["test"] == data.test.digest
    assert env["data"]["digests"]["val"] == data.val.digest
    assert env["data"]["digests"]["train"] != data.train.digest


def test_no_result_tells_where_things_lie_on_this_machine(finished: tuple[Path, str]) -> None:
    out, _ = finished
    summary = [out / "comparison-step-0.1" / name for name in ("results.nc", "report.html", "table.md")]
    for path in (*summary, out / "step-0.1/softmax/seed0/results.nc"):
        content = path.read_bytes()
        for place in (out.parent, RECIPE.parents[1], Path.home()):
            assert f"{place}/".encode() not in content, (path, place)
    command = load_results(out / "comparison-step-0.1/results.nc").attrs["command"]
    assert command == "python recipes/mnist.py --epochs 2 --out DIR"


def test_an_earlier_run_is_refused_and_nothing_is_touched(
    finished: tuple[Path, str], here: Callable[..., Outcome]
) -> None:
    out, _ = finished
    before = files(out)
    # Of two variants one is new, and neither is trained.
    outcome = here("--epochs", 2, "--head", "softmax", "--loss", "focal", "logit-adjusted", "--out", out)
    assert outcome.code == 1
    assert re.fullmatch(
        r"recipes/mnist\.py: --out must not hold these runs yet.* got .*logit-adjusted/seed0/checkpoint-last\.pt\. "
        r"Take what is there with --resume.*\n",
        outcome.err,
    )
    # What is done after training starts from a run that is there, too.
    assert here("--epochs", 2, "--head", "affinity", "--after", "ncm", "--prototypes", 3, "--out", out).code == 1
    assert files(out) == before


def test_resume_takes_finished_runs_as_they_are(
    finished: tuple[Path, str], copied: Path, here: Callable[..., Outcome]
) -> None:
    before = files(copied / "step-0.1")
    outcome = here("--epochs", 2, "--resume", "--out", copied)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("finished before: best val_balanced_error") == 3
    assert files(copied / "step-0.1") == before
    one, two = (load_results(out / "comparison-step-0.1/results.nc") for out in (finished[0], copied))
    xr.testing.assert_identical(numbers(one), numbers(two))
    assert (finished[0] / "comparison-step-0.1/table.md").read_text() == (
        copied / "comparison-step-0.1/table.md"
    ).read_text()


def test_another_margin_is_refused_for_affinity_and_means_nothing_to_softmax(
    copied: Path, here: Callable[..., Outcome]
) -> None:
    words = ["--epochs", 2, "--margin", 0.5, "--resume", "--out", copied]
    before = files(copied)
    outcome = here(*words, "--head", "affinity")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert "margin was 0.75 and is 0.5" in outcome.err
    assert files(copied) == before
    outcome = here(*words, "--head", "softmax")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("finished before") == 2


def test_another_optimization_is_refused(copied: Path, here: Callable[..., Outcome]) -> None:
    outcome = here("--epochs", 3, "--lr", 0.01, "--resume", "--out", copied)
    assert outcome.code == 1
    assert "optimization.epochs was 2 and is 3" in outcome.err
    assert "optimization.lr was 0.05 and is 0.01" in outcome.err


@pytest.mark.filterwarnings("ignore:choose_normalization. the best tau is the largest")  # of two epochs
def test_what_is_done_afterwards_is_saved_as_the_table_tells_it(copied: Path, here: Callable[..., Outcome]) -> None:
    words = ["--epochs", 2, "--head", "softmax", "--loss", "cross-entropy", "--after", "post-hoc", "tau-norm"]
    found = []
    for tau in (2.0, 0.5):
        outcome = here(*words, "--tau", tau, "--resume", "--out", copied)
        assert (outcome.code, outcome.err) == (0, "")
        ds = load_results(copied / "comparison-step-0.1/results.nc")
        assert ds["tau"].isnull().values.tolist() == [[True], [True], [False]]  # post-hoc's is given, not chosen
        for method in ("post-hoc", "tau-norm"):
            same_numbers(load_results(copied / f"step-0.1/{method}/seed0/results.nc"), ds.sel({"method": [method]}))
        found.append(float(ds["log_loss"].sel({"method": "post-hoc", "seed": 0})))
    assert found[0] != found[1]


def test_ctrl_c_saves_and_tells_how_to_go_on(stopped: tuple[Path, Outcome, Outcome]) -> None:
    _, outcome, _ = stopped
    assert (outcome.code, outcome.err) == (130, "")
    assert "Stopped; epoch 2, step 6 is saved in made/step-0.1/equalized/seed0/checkpoint-last.pt." in outcome.out
    assert outcome.out.rstrip().endswith("Go on with --resume.")
    assert "softmax on" not in outcome.out
    assert "Report" not in outcome.out


def test_stopped_and_killed_it_ends_as_if_it_had_not_been(
    stopped: tuple[Path, Outcome, Outcome], here: Callable[..., Outcome], tmp_path: Path
) -> None:
    made, _, killed = stopped
    assert (killed.code, killed.err) == (-signal.SIGKILL, "")
    progress = load_checkpoint(made / "step-0.1/crt/seed0/checkpoint-last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 5)
    outcome = here(*STOPPED, "--resume", "--out", made)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("finished before") == 2
    whole = tmp_path / "whole"
    outcome = here(*STOPPED, "--out", whole)
    assert (outcome.code, outcome.err) == (0, "")
    for method in ("equalized", "softmax", "crt"):
        for name in ("checkpoint-last.pt", "checkpoint-best.pt"):
            one, two = (out / "step-0.1" / method / "seed0" / name for out in (whole, made))
            assert equal_bits(one, two), two
        history = (made / f"step-0.1/{method}/seed0/history.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in history] == ["epoch", "1", "2"]  # each once
    assert not equal_bits(whole / "step-0.1/softmax/seed0" / name, two)
    one, two = (load_results(out / "comparison-step-0.1/results.nc") for out in (whole, made))
    xr.testing.assert_identical(numbers(one), numbers(two))
    assert one["method"].values.tolist() == ["equalized", "crt"]
    tables = [(out / "comparison-step-0.1/table.md").read_text() for out in (whole, made)]
    assert tables[0] == tables[1]


def test_the_second_stage_leaves_the_encoder_alone(copied: Path, here: Callable[..., Outcome]) -> None:
    words = ["--epochs", 2, "--head", "softmax", "--loss", "cross-entropy", "--after", "crt", "lws"]
    outcome = here(*words, "--stage-two-epochs", 1, "--resume", "--out", copied)
    assert (outcome.code, outcome.err) == (0, "")
    first, crt, lws = (
        load_checkpoint(copied / f"step-0.1/{method}/seed0/checkpoint-best.pt")["model"]
        for method in ("softmax", "crt", "lws")
    )
    encoder = {name for name in first if name.startswith("backbone.")}
    assert {name for name in first if torch.equal(first[name], crt[name])} == encoder
    assert {name for name in encoder if torch.equal(first[name], lws[name])} == encoder
    assert torch.equal(lws["head.linear.weight"], first["head.weight"])
    assert not torch.equal(lws["head.scale"], torch.ones(10))


@pytest.mark.parametrize(
    ("summary", "rows", "figures"),
    [
        ("remedies-step-0.1", 15, ["length-of-each-class-s-weights", "error-by-digit", "training"]),
        ("imbalance-step", 18, ["balanced-error-of-the-thinned-digits", "balanced-error-of-all-digits"]),
        ("noise-step", 12, ["error-under-label-noise", "error-by-digit"]),
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
    studied: Path, here: Callable[..., Outcome], summary: str, rows: int, figures: list[str]
) -> None:
    study = summary.partition("-")[0]
    seeds = 2 if study == "tau" else 1  # whose figures show each seed
    outcome = here(*SHORT, "--study", study, "--seeds", seeds, "--resume", "--out", studied)
    assert (outcome.code, outcome.err) == (0, "")
    assert set(files(studied / summary)) == SUMMARY_FILES | {f"figures/{name}.png" for name in figures}
    ds = load_results(studied / summary / "results.nc")
    assert (ds.sizes["method"], ds.sizes["seed"], int(ds["completed"].sum())) == (rows, seeds, rows * seeds)
    assert np.isfinite(ds["balanced_error"].sel(region=["all", "few", "many"])).all()


def test_each_seed_cuts_the_data_anew(here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = here(*SHORT, "--head", "softmax", "--loss", "ldam", "--seeds", 2, "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    ds = load_results(tmp_path / "out/comparison-step-0.1/results.nc")
    assert ds["seed"].values.tolist() == [0, 1]
    env = [json.loads((tmp_path / f"out/step-0.1/ldam/seed{i}/env.json").read_text())["data"] for i in (0, 1)]
    assert env[0]["sizes"] == env[1]["sizes"]
    assert env[0]["digests"]["test"] == env[1]["digests"]["test"]
    assert env[0]["digests"]["train"] != env[1]["digests"]["train"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            "--root x --download --verify --train-per-class 5 --head softmax softmax --loss focal focal "
            "--after crt crt --seeds 0 --prototypes 0 --stage-two-epochs 0 --val-per-class 0 --noise 1 "
            "--checkpoint-minutes -1 --ldam-start 2 --equalized-drop -1 --focal-gamma -1 --tau nan --weight-decay -1 "
            "--sigma 0 --feature-scale inf --margin 0 --ldam-margin -1 --center-strength 0 --retention 1.5 --lr 0",
            [
                *("--root needs", "--download needs", "--verify needs", "--train-per-class needs"),
                *("--head must name each once", "--loss must name", "--after must name", "--seeds must be"),
                *("--prototypes must", "--stage-two-epochs must", "--val-per-class must", "--noise must"),
                *("--checkpoint-minutes must", "--ldam-start must", "--equalized-drop must", "--focal-gamma must"),
                *("--tau must be finite and at least 0, got nan", "weight_decay must", "--sigma must be > 0, got 0"),
                *("--feature-scale must", "--margin must", "--ldam-margin must", "--center-strength must"),
                *("--retention must be at most 1, got 1.5", "lr must be > 0"),
            ],
        ),
        ("--data mnist --retention -1 --lr -1", ["--root must name", "--retention must be > 0, got -1", "lr must"]),
        ("--study tau --head cosine --after crt", ["--head has no say", "--after has no say"]),
        ("--head softmax cosine --loss ldam-drw", ["--loss ldam has a cosine head"]),
    ],
)
def test_all_bad_settings_are_told_at_once(
    tmp_path: Path, here: Callable[..., Outcome], words: str, parts: list[str]
) -> None:
    told = "\n".join(faults(here(*words.split())))
    for part in parts:
        assert part in told
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch-size", 0), ("epochs", -1), ("tau", "inf"), ("focal-gamma", "inf")],
)
def test_a_number_out_of_range_is_refused(here: Callable[..., Outcome], name: str, value: object) -> None:
    words = ["--head", "softmax", "--loss", "logit-adjusted", "focal"]
    told = faults(here(*(SHORT + words), f"--{name}", value))
    assert any(name in fault.replace("_", "-") for fault in told)


def test_more_validation_images_than_there_are_is_told_in_one_line(here: Callable[..., Outcome]) -> None:
    outcome = here(*SHORT, "--val-per-class", 150)
    assert outcome.code == 1
    assert "val_per_class must leave each class at least one sample" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_fault_of_our_own_keeps_its_traceback(here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dir_toolkit.experiment.data.digits.digits", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        here()


def test_a_package_that_is_missing_is_told_in_one_line(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    outcome = here()
    assert outcome.code == 1
    assert re.fullmatch(r'digits: .*scikit-learn.* pip install "dir_toolkit\[recipes\]"\n', outcome.err)


def test_noise_touches_training_labels_alone(here: Callable[..., Outcome], tmp_path: Path) -> None:
    words = [*SHORT, "--head", "softmax", "--loss", "cross-entropy", "--noise", 0.4, "--retention", 1]
    outcome = here(*words, "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    env = json.loads((tmp_path / "out/step-1-noise-0.4/softmax/seed0/env.json").read_text())
    clean, found = digits(seed=0), env["data"]["digests"]
    assert found["val"] == clean.val.digest
    assert found["test"] == clean.test.digest
    assert found["train"] != clean.train.digest
    assert env["data"]["sizes"]["train"] == len(clean.train)


def test_the_exponential_profile_thins_ever_more(here: Callable[..., Outcome], tmp_path: Path) -> None:
    words = [*SHORT, "--profile", "exponential", "--retention", 0.02, "--head", "cosine", "--loss", "balanced"]
    outcome = here(*words, "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    ds = load_results(tmp_path / "out/comparison-exponential-0.02/results.nc")
    assert ds["method"].values.tolist() == ["cosine+balanced"]
    whole = np.bincount(digits(seed=0).train.labels)
    expected = np.rint(whole * 0.02 ** (np.arange(10) / 9)).astype(int)
    assert ds["train_count"].values[0, 0].tolist() == expected.tolist()
    assert ds["bin_region"].values.tolist() == ["many"] * 5 + ["few"] * 5
    assert "digits 5 to 9, which are thinned" in (tmp_path / "out/comparison-exponential-0.02/report.html").read_text()
    assert (tmp_path / "out/exponential-0.02/cosine+balanced/seed0/results.nc").exists()


MNIST = ["--data", "mnist", "--root", "mnist", "--epochs", 1, "--batch-size", 16]


def test_files_of_mnist(here: Callable[..., Outcome], tmp_path: Path) -> None:
    make_mnist(tmp_path / "mnist")
    words = ["--val-per-class", 1, "--train-per-class", 4, "--retention", 0.5]
    outcome = here(*MNIST, *words, "--after", "ncm")
    assert (outcome.code, outcome.err) == (0, "")
    assert "softmax on step-0.5-of-4, seed 0: 30 images" in outcome.out
    ds = load_results(tmp_path / "runs/mnist/mnist/comparison-step-0.5-of-4/results.nc")
    assert ds["method"].values.tolist() == ["softmax", "logit-adjusted", "affinity-m5", "ncm"]
    assert ds["train_count"].values[0, 0].tolist() == [2] * 5 + [4] * 5
    assert ds["bin_count"].values[0, 0].tolist() == [2] * 10
    assert ds.attrs["command"].startswith("python recipes/mnist.py --data mnist --root DIR --epochs 1")
    env = json.loads((tmp_path / "runs/mnist/mnist/step-0.5-of-4/softmax/seed0/env.json").read_text())
    assert env["data"]["sizes"] == {"train": 30, "val": 10, "test": 20}
    assert str(tmp_path) not in (tmp_path / "runs/mnist/mnist/comparison-step-0.5-of-4/report.html").read_text()


def test_files_of_mnist_that_are_missing_or_not_official_are_told_in_one_line(
    here: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = here(*MNIST)
    assert outcome.code == 1
    assert re.fullmatch(r"mnist: root must hold the four files of MNIST.*download_mnist.*\n", outcome.err)
    make_mnist(tmp_path / "mnist")
    outcome = here(*MNIST, "--val-per-class", 1, "--verify")
    assert outcome.code == 1
    assert re.fullmatch(r"mnist/.*: SHA-256 of the unpacked file must be the official.*\n", outcome.err)


def test_files_of_mnist_are_fetched_when_asked_for(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dir_toolkit.experiment.data.mnist.download_mnist", make_mnist)
    outcome = here(*MNIST, "--val-per-class", 1, "--head", "affinity", "--download")
    assert (outcome.code, outcome.err) == (0, "")
    assert (tmp_path / "runs/mnist/mnist/comparison-step-0.1/results.nc").exists()


def test_two_processes_come_to_the_same(finished: tuple[Path, str], tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    outcome = recipe(tmp_path, "--epochs", 2, "--after", "crt", "--out", "made", python=launch)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("affinity-m5 on step-0.1") == 1
    assert set(files(tmp_path / "made")) == set(files(finished[0])) | {f"step-0.1/crt/seed0/{n}" for n in RUN_FILES}
    one, two = (load_results(out / "comparison-step-0.1/results.nc") for out in (finished[0], tmp_path / "made"))
    assert "2 processes" in two.attrs["device"]
    two = two.sel({"method": one["method"].values})
    xr.testing.assert_identical(one["train_count"], two["train_count"])
    # Sums are taken in another order: a digit or two of the 500 may fall to the other side.
    np.testing.assert_allclose(two["error"].sel(region="all"), one["error"].sel(region="all"), atol=0.01)
    for method in one["method"].values:
        losses = [
            np.genfromtxt(out / f"step-0.1/{method}/seed0/history.csv", delimiter=",", names=True)["loss"]
            for out in (finished[0], tmp_path / "made")
        ]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_file_in_the_place_of_the_folder_ends_in_a_message(here: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    outcome = here("--epochs", 1, "--out", "taken")
    assert outcome.code == 1
    assert "NotADirectoryError" in outcome.err
    assert "Traceback" not in outcome.err
    assert (tmp_path / "taken").read_text() == "mine"
