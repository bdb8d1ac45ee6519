"""Regions of the label axis, and the form that every metric's dataset over them has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import instance, problem
from ..labels.bins import Bins
from ..labels.density import REGIONS, LabelDensity
from ..labels.grid import AnyBins, BinGrid

if TYPE_CHECKING:
    import xarray as xr


def check_axis(bins: AnyBins, density: LabelDensity, *, grid: bool = False) -> None:
    """A label axis, or a grid of several where ``grid`` says so, and what was counted on it in training."""
    instance((Bins, BinGrid) if grid else Bins, bins=bins)
    if not isinstance(density, LabelDensity) or density.bins != bins:
        raise problem("density must be a LabelDensity over the same bins", got=repr(density))
    if density.counts.dtype.kind == "f":
        raise problem("density must be as counted, not smoothed", got=repr(density))


def membership(regions: np.ndarray) -> np.ndarray:
    """Which bins all labels, and each region, take in: (5, B) bool, from the region of each bin."""
    return np.stack([np.ones(len(regions), dtype=bool)] + [regions == name for name in REGIONS])


def bin_mean(values: np.ndarray, inside: np.ndarray, widths: np.ndarray | float = 1.0) -> np.ndarray:
    """The mean of ``values`` (B,) over the bins of each row of ``inside`` (5, B), each weighted by its width; NaN for a
    row without any."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(inside, values * widths, 0.0).sum(1) / (inside * widths).sum(1)


def dataset(
    data: Mapping[str, Any], density: LabelDensity, regions: np.ndarray, *, label_units: Collection[str] = ()
) -> xr.Dataset:
    """``data`` over ``region`` and ``bin``, with training counts, coordinates and units.

    Args:
        regions: of each bin, (B,). label_units: the variables that are in label units; all others are plain numbers.
    """
    import xarray as xr

    bins = density.bins
    if isinstance(bins, BinGrid):
        dims: Any = ("bin", "axis")
        low, high = (bins._corners([axis.edges[i : len(axis) + i] for axis in bins.axes]) for i in (0, 1))
    else:
        dims, low, high = "bin", bins.edges[:-1], bins.edges[1:]
    result = xr.Dataset(
        {**data, "train_count": ("bin", np.asarray(density.counts))},
        coords={
            "region": ["all", *REGIONS],
            "bin": np.arange(len(bins)),
            "bin_low": (dims, low),
            "bin_high": (dims, high),
            "bin_center": (dims, bins.centers),
            "bin_region": ("bin", regions),
        },
    )
    for name in result.data_vars:
        result[name].attrs["units"] = "label units" if name in label_units else "1"
    for name in ("bin_low", "bin_high", "bin_center"):
        result[name].attrs["units"] = "label units"
    return result
