"""The classification recipe on digits of scikit-learn and on files like those of MNIST."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import xarray as xr
from running import RUN_FILES, Outcome, files, make_mnist, numbers
from sketching import sketch

from dir_toolkit.experiment.data.digits import digits
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.mnist import mnist
from dir_toolkit.experiment.results.schema import load_results

pytest.importorskip("sklearn")

RECIPE = running.RECIPES / "mnist.py"
METHODS = ("softmax", "logit-adjusted", "affinity")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the default methods after one epoch, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "made", running.run(RECIPE, folder, "--epochs", 1, "--out", folder / "made").out


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--retention", "post-hoc")


def test_it_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, output = finished
    runs = {f"{method}/seed0/{name}" for method in METHODS for name in RUN_FILES}
    summary = {"results.nc", "table.md", "report.html", "events"}
    assert set(files(out)) == runs | summary | {"figures/error-by-digit.png", "figures/training.png"}
    assert "digits: 601 samples to train on, 200 to validate, 500 to test" in output
    last = output.rstrip().splitlines()[-1]
    assert re.search(r"(wins with|Nobody wins beyond noise: .* has) the least balanced error, [\d.]+ %", last)
    assert "95 % interval" in last
    assert f'<p class="lead">{last}</p>' in (out / "report.html").read_text()


def test_the_table_tells_balanced_errors_of_all_few_and_many(finished: tuple[Path, str]) -> None:
    out, output = finished
    ds = load_results(out / "results.nc").sel({"seed": 0})
    table = (out / "table.md").read_text()
    columns = "balanced error all | balanced error few | balanced error many | error all"
    assert f"| method | seeds | {columns} |" in table
    assert "| test samples |  | 500 | 250 | 250 | 500 |" in table
    recall = ds["bin_recall"].values  # (method, digit)
    np.testing.assert_allclose(ds["balanced_error"].sel(region="few"), 1 - recall[:, :5].mean(1), atol=1e-12)
    for method in METHODS:
        of = ds.sel({"method": method})
        shares = [of["balanced_error"].sel(region=region) for region in ("all", "few", "many")]
        cells = [f"{100 * float(share):.2f}" for share in (*shares, of["error"].sel(region="all"))]
        assert f"| {method} | 1 | {' | '.join(cells)} |" in table
        assert re.search(rf"^{method} +1 +{' +'.join(cells)}$", output, re.MULTILINE)


def test_only_training_images_are_thinned(finished: tuple[Path, str]) -> None:
    out, _ = finished
    ds = load_results(out / "results.nc")
    assert ds["bin_region"].values.tolist() == ["few"] * 5 + ["many"] * 5
    whole = digits(seed=0)
    kept = ds["train_count"].values[0, 0] / np.bincount(whole.train.labels)
    np.testing.assert_allclose(kept, [0.1] * 5 + [1.0] * 5, atol=0.005)
    result = json.loads((out / "affinity/seed0/env.json").read_text())["data"]["digests"]
    assert (result["val"], result["test"]) == (whole.val.digest, whole.test.digest)
    assert ds.attrs["command"] == "python recipes/mnist.py --epochs 1 --out DIR"


def rank_main(rank: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        sketch(patch)
        outcome = running.run(RECIPE, Path.cwd(), "--epochs", 1, "--out", "made")
    return outcome.out.splitlines()


def test_two_processes_come_to_the_same(
    finished: tuple[Path, str], tmp_path: Path, two_ranks: Callable[..., list[Any]]
) -> None:
    output = two_ranks(rank_main, timeout=240)
    assert output[0]
    assert not output[1]
    assert set(files(tmp_path / "made")) == set(files(finished[0]))
    one, two = (load_results(out / "results.nc") for out in (finished[0], tmp_path / "made"))
    assert "2 processes" in two.attrs["device"]
    xr.testing.assert_identical(one["train_count"], two["train_count"])
    # Sums are taken in another order: a digit or two of the 500 may fall to the other side.
    np.testing.assert_allclose(two["error"].sel(region="all"), one["error"].sel(region="all"), atol=0.01)
    for method in METHODS:
        losses = [
            np.genfromtxt(out / f"{method}/seed0/history.csv", delimiter=",", names=True)["loss"]
            for out in (finished[0], tmp_path / "made")
        ]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.usefixtures("sketched")
def test_files_of_mnist_are_fetched_when_asked_for(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dir_toolkit.experiment.data.mnist.download_mnist", lambda root: make_mnist(root, train=30))
    words = ["--data", "mnist", "--root", "mnist", "--train-per-class", 20, "--retention", 0.5, "--seeds", 2]
    outcome = here(*words, "--epochs", 1, "--methods", "softmax", "post-hoc", "--download")
    assert "val_per_class must leave each class" in outcome.err  # the official files have thousands
    monkeypatch.setattr("dir_toolkit.experiment.data.mnist.download_mnist", lambda root: make_mnist(root, train=60))

    def fewer(root: Path, *, val_per_class: int, **options: Any) -> Splits:
        return mnist(root, val_per_class=val_per_class // 10, **options)

    monkeypatch.setattr("dir_toolkit.experiment.data.mnist.mnist", fewer)
    (tmp_path / "mnist").rename(tmp_path / "few")
    outcome = here(*words, "--epochs", 1, "--methods", "softmax", "post-hoc", "--download")
    assert (outcome.code, outcome.err) == (0, "")
    ds = load_results(tmp_path / "runs/mnist/mnist/results.nc")
    assert ds["method"].values.tolist() == ["softmax", "post-hoc"]
    assert ds["train_count"].values[0, 0].tolist() == [10] * 5 + [20] * 5
    assert ds.attrs["command"].startswith("python recipes/mnist.py --data mnist --root DIR --train-per-class 20")
    # Each seed cuts the data anew.
    output = json.loads(ds.attrs["data"])
    assert output["data, seed 0"]["digests"]["train"] != output["data, seed 1"]["digests"]["train"]
    one = numbers(load_results(tmp_path / "runs/mnist/mnist/softmax/seed1/results.nc"))
    xr.testing.assert_identical(one, numbers(ds.sel({"method": ["softmax"], "seed": [1]}))[list(one.data_vars)])


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--retention 1.5", "--retention must be above 0 and at most 1, got 1.5"),
        ("--data mnist", "--root must name the folder of the files of --data mnist"),
        ("--root x", "--root must name the folder of the files of --data mnist"),
    ],
)
def test_bad_settings_end_in_a_message(here: Callable[..., Outcome], words: str, rule: str) -> None:
    outcome = here(*words.split())
    assert outcome.code == 1
    assert outcome.err.startswith(f"recipes/mnist.py: these settings cannot run:\n  {rule}"), outcome.err
