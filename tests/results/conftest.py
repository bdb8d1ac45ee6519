"""A small result whose every number follows from its errors per test sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from dir_toolkit.results.schema import ALL_REGIONS, combine_runs

TRAIN = np.array([300, 50, 5, 0, 0])
REGION = np.array(["many", "medium", "few", "unseen", "unseen"])
TESTED = np.array([4, 3, 2, 0, 0])


def _run(errors: list[float]) -> xr.Dataset:
    """One run on five bins of a year: ``errors`` is the MAE of the three bins that have test samples."""
    bin_mae = np.array([*errors, np.nan, np.nan])
    inside = np.array([(region == "all") | (region == REGION) for region in ALL_REGIONS])  # (5, B)
    samples = (inside * TESTED).sum(1)
    tested = inside & (TESTED > 0)
    with np.errstate(invalid="ignore"):
        mae = (tested * np.nan_to_num(bin_mae) * TESTED).sum(1) / samples
        bmae = (tested * np.nan_to_num(bin_mae)).sum(1) / tested.sum(1)
    years, one = {"units": "label units"}, {"units": "1"}
    return xr.Dataset(
        {
            "mae": ("region", mae, years),
            "rmse": ("region", mae * 1.25, years),
            "gm": ("region", mae * 0.75, years),
            "bmae": ("region", bmae, years),
            "bias": ("region", -mae, years),
            "pearson": ("region", np.where(samples > 4, 0.5, np.nan), one),
            "count": ("region", samples, one),
            "bins": ("region", tested.sum(1), one),
            "bin_mae": ("bin", bin_mae, years),
            "bin_bias": ("bin", -bin_mae, years),
            "bin_count": ("bin", TESTED, one),
            "train_count": ("bin", TRAIN, one),
        },
        coords={
            "region": list(ALL_REGIONS),
            "bin": np.arange(5),
            "bin_low": ("bin", np.arange(5.0), years),
            "bin_high": ("bin", np.arange(5.0) + 1, years),
            "bin_center": ("bin", np.arange(5.0), years),
            "bin_region": ("bin", REGION),
        },
    )


@pytest.fixture
def run() -> Callable[[list[float]], xr.Dataset]:
    return _run


@pytest.fixture
def combine() -> Callable[..., xr.Dataset]:
    def combined(runs: dict[tuple[str, int], xr.Dataset], **changes: object) -> xr.Dataset:
        words = {"title": "A test", "command": "python recipes/age.py", "label_name": "age", "label_units": "years"}
        return combine_runs(runs, **{**words, **changes})

    return combined


@pytest.fixture
def ds(combine: Callable[..., xr.Dataset]) -> xr.Dataset:
    """Two methods and a baseline; ``lds`` never finished seed 1, and the baseline has one seed."""
    runs = {
        ("vanilla", 0): _run([2.0, 4.0, 9.0]).assign(minutes=3.0, best_epoch=7),
        ("vanilla", 1): _run([3.0, 4.0, 12.0]).assign(minutes=4.0, best_epoch=5),
        ("lds", 0): _run([3.0, 3.0, 6.0]).assign(minutes=3.5, best_epoch=9),
        ("constant", 0): _run([5.0, 8.0, 20.0]),
    }
    return combine(runs)
