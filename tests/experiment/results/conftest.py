"""A small result whose every number follows from its errors per test sample."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr

import dir_toolkit as dt
from dir_toolkit.experiment.results.schema import combine_runs

TRAIN = np.array([300, 50, 5, 0, 0])
TESTED = np.array([4, 3, 2, 0, 0])


LABELS = torch.arange(5.0, dtype=torch.float64).repeat_interleave(torch.from_numpy(TESTED))


def _run(errors: list[float]) -> xr.Dataset:
    """One run on five bins of a year: ``errors`` is the MAE of the three bins that have test samples."""
    bins = dt.Bins(np.arange(6.0), centers=np.arange(5.0))
    pred = LABELS - torch.tensor(errors, dtype=torch.float64).repeat_interleave(torch.from_numpy(TESTED[:3]))
    return dt.regression_metrics(pred, LABELS, dt.LabelDensity(bins, TRAIN))


def _class_run(right: list[int]) -> xr.Dataset:
    """One run of classification on the same bins: ``right`` of the 4, 3 and 2 samples; the others went to bin 3."""
    pred = torch.cat([torch.where(torch.arange(TESTED[c]) < n, c, 3) for c, n in enumerate(right)])
    return dt.classification_metrics(pred, LABELS.long(), dt.LabelDensity(dt.Bins.classes(5), TRAIN))


@pytest.fixture
def run() -> Callable[[list[float]], xr.Dataset]:
    return _run


def _combine(runs: dict[tuple[str, int], xr.Dataset], **changes: object) -> xr.Dataset:
    words = {"title": "A test", "command": "python recipes/age.py", "label_name": "age", "label_units": "years"}
    return combine_runs(runs, **{**words, **changes})


@pytest.fixture
def combine() -> Callable[..., xr.Dataset]:
    return _combine


def _made_once(make: Callable[[], xr.Dataset]) -> Callable[[], xr.Dataset]:
    """A fixture that makes a result once, and gives each test a copy of its own."""
    kept = functools.cache(make)

    @pytest.fixture
    @functools.wraps(make)
    def copied() -> xr.Dataset:
        return kept().copy(deep=True)

    return copied


@_made_once
def ds() -> xr.Dataset:
    """Two methods and a baseline; ``lds`` never finished seed 1, and the baseline has one seed."""
    runs = {
        ("vanilla", 0): _run([2.0, 4.0, 9.0]).assign(minutes=3.0, best_epoch=7),
        ("vanilla", 1): _run([3.0, 4.0, 12.0]).assign(minutes=4.0, best_epoch=5),
        ("lds", 0): _run([3.0, 3.0, 6.0]).assign(minutes=3.5, best_epoch=9),
        ("constant", 0): _run([5.0, 8.0, 20.0]),
    }
    return _combine(runs)


@pytest.fixture
def class_run() -> Callable[[list[int]], xr.Dataset]:
    return _class_run


@_made_once
def classes() -> xr.Dataset:
    """Two methods and a baseline; ``adjusted`` never finished seed 1, and has a calibration error that others lack."""
    runs = {
        ("softmax", 0): _class_run([4, 2, 0]).assign(minutes=3.0, best_epoch=7),
        ("softmax", 1): _class_run([4, 1, 1]).assign(minutes=4.0, best_epoch=5),
        ("adjusted", 0): _class_run([3, 2, 1]).assign(ece=((), 0.0625, {"units": "1"})),
        ("constant", 0): _class_run([4, 0, 0]),
    }
    return _combine(runs, label_name="digit", label_units="1")


def _predicted(target: np.ndarray, prediction: np.ndarray, *, half: float | None = None) -> xr.Dataset:
    """One run from its predictions, and half widths of its intervals where given, on five bins of a year."""
    bins = dt.Bins.uniform(0, 5, width=1)
    result = dt.regression_metrics(
        torch.from_numpy(prediction.astype(np.float64)), torch.from_numpy(target), dt.LabelDensity(bins, TRAIN)
    )
    years = {"units": "label"}
    parts = {"target": target, "prediction": prediction}
    if half is not None:
        parts |= {"lower": prediction - half, "upper": prediction + half}
    level = {"lower": {"interval_level": 0.75}, "upper": {"interval_level": 0.75}}
    return result.assign({name: ("sample", part, years | level.get(name, {})) for name, part in parts.items()})


@pytest.fixture
def predicted() -> Callable[..., xr.Dataset]:
    return _predicted


@_made_once
def compared() -> xr.Dataset:
    """Nine samples in three bins: ``half`` errs half as much as ``vanilla`` and has two seeds; ``plain`` held nothing.

    Predictions are exact in float32. ``vanilla`` has seeds 0 to 2, ``half`` 1 and 2, ``alone`` only 2.
    """
    target = np.array([0.5, 0.25, 0.75, 0.5, 1.5, 1.25, 1.75, 2.5, 2.25])
    error = np.array([1, 2, -1, 2, 4, -2, 3, 8, 4]) / 4
    runs = {("vanilla", s): _predicted(target, target + error * (1 + s / 4)).assign(minutes=3.0 + s) for s in range(3)}
    for s in (1, 2):
        runs["half", s] = _predicted(target, target + error * (1 + s / 4) / 2, half=0.5).assign(minutes=6.0)
    runs["alone", 2] = _predicted(target, target + error * 2, half=1.0)
    runs["plain", 0] = _predicted(target, target + error).drop_vars(["target", "prediction"])
    runs["constant", 0] = _predicted(target, np.full(9, 0.5))
    return _combine(runs)
