"""Metrics of targets some of which are missing: as without these samples."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from dir_toolkit import Bins, LabelDensity, RegressionMetrics
from dir_toolkit.errors import LabelError
from dir_toolkit.metrics import calibration_metrics, classification_metrics, interval_metrics, regression_metrics

BINS = Bins.uniform(0, 10, width=1)
GRID = Bins.grid(BINS, Bins.uniform(0, 4, width=1))


def drawn(bins: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets with holes, and which samples are there."""
    generator = torch.Generator().manual_seed(0)
    shape = (50, len(bins.axes)) if len(bins.axes) > 1 else (50,)
    pred, target, chance = (4 * torch.rand(shape, generator=generator) for _ in range(3))
    target[chance < 1] = torch.nan
    there = ~target.isnan() if target.ndim == 1 else ~target.isnan().any(1)
    return pred, target, there


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
@pytest.mark.parametrize("bins", [BINS, GRID], ids=["axis", "grid"])
def test_missing_targets_count_nowhere(bins: Any, outside: Any, monkeypatch: Any) -> None:
    pred, target, there = drawn(bins)
    density = LabelDensity(bins, np.arange(len(bins)) + 1)
    expected = regression_metrics(pred[there], target[there], density, outside=outside)
    xr.testing.assert_equal(regression_metrics(pred, target, density, outside=outside, missing="drop"), expected)
    with pytest.raises(LabelError, match=r"target.* must not be NaN"):
        regression_metrics(pred, target, density, outside=outside)
    with monkeypatch.context() as patch:  # as on an accelerator, where nothing is looked at
        patch.setattr("dir_toolkit.labels.bins.readable", lambda tensor: False)
        patch.setattr("dir_toolkit.metrics._sums.readable", lambda tensor: False)
        unseen = regression_metrics(pred, target, density, outside=outside, missing="drop")
        xr.testing.assert_allclose(unseen, expected)
        with pytest.raises(LabelError, match=f"got {int((~there).sum())} that are not"):
            regression_metrics(pred, target, density, outside="drop")


def test_classes_that_are_missing_count_nowhere() -> None:
    density = LabelDensity(Bins.classes(3), [5, 3, 1])
    scores, target = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0.0, 1.0, torch.nan, 1.0])
    result = classification_metrics(scores, target, density, missing="drop")
    xr.testing.assert_equal(result, classification_metrics(scores[[0, 1, 3]], target[[0, 1, 3]], density))
    result = calibration_metrics(scores, target, missing="drop")
    xr.testing.assert_equal(result, calibration_metrics(scores[[0, 1, 3]], target[[0, 1, 3]].long()))


def test_intervals_of_missing_targets_count_nowhere() -> None:
    pred, target, there = drawn(BINS)
    density = LabelDensity(BINS, np.arange(10) + 1)
    result = interval_metrics(pred - 1, pred + 1, target, density, missing="drop")
    xr.testing.assert_equal(result, interval_metrics(pred[there] - 1, pred[there] + 1, target[there], density))


def test_without_any_target_all_is_nan_and_the_count_is_zero() -> None:
    metrics = RegressionMetrics(LabelDensity(BINS, np.arange(10) + 1), missing="drop")
    metrics.update([1.0, 2.0], [np.nan, np.nan])
    result = metrics.compute()
    assert result.mae.isnull().all()
    assert result["count"].sum() == 0
    with pytest.raises(ValueError, match=r"^RegressionMetrics: missing must be one of 'raise', 'drop', got 'ignore'"):
        RegressionMetrics(LabelDensity(BINS, np.arange(10) + 1), missing="ignore")  # type: ignore[arg-type]
