"""Metrics over the regions and bins of a label axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .._checks import instance, problem, require, same_bins
from ..labels.bins import Bins, Missing, Outside
from ..labels.density import REGIONS, LabelDensity
from ..labels.grid import BinGrid
from ._metric import Metric, stored_unit
from ._sums import MergingSums

if TYPE_CHECKING:
    import xarray as xr


Axis = LabelDensity | Bins | BinGrid  # bins alone only if the density follows them


class RegionMetrics(MergingSums):
    """Metrics computed from sums per bin, over all labels and by region of the training density."""

    metrics: ClassVar[tuple[Metric, ...]]
    """The declarations of the numbers that ``compute`` returns."""
    selects: ClassVar[str]
    """The key of :meth:`summary` whose smallest value marks the best model."""
    takes: ClassVar[str]
    """The part of a model's output that ``update`` takes, by name."""

    regions: np.ndarray | None = None

    def __init__(
        self, density: Axis, counted: LabelDensity | None, outside: Outside, missing: Missing, *, grids: bool
    ) -> None:
        if counted is not None:
            instance(LabelDensity, counted=counted)
            same_bins("the density", counted, density)
            density = counted
        axes = (Bins, BinGrid) if grids else Bins
        if not isinstance(density, LabelDensity) or not isinstance(density.bins, axes):
            rule = f"density must be a LabelDensity{'' if grids else ' over one axis'}"
            got = repr(density) if isinstance(density, Axis) else type(density).__name__
            raise problem(rule, got=got, fix="Use LabelDensity.count(train_labels, bins).")
        fix = "Pass the density as counted, in integers."
        require(density.counts.dtype.kind != "f", "density must be counted, not smoothed", got=density, fix=fix)
        self.density, self.bins = density, density.bins
        super().__init__(outside, missing)

    def _sums_by_bin(self) -> dict[str, np.ndarray]:
        """The sums of each bin by name, (K, B) for K axes. One of them is ``count``."""
        raise NotImplementedError

    def _widths(self) -> np.ndarray | float:
        """The weight of each bin in a mean over bins."""
        return 1.0

    def summary(self) -> dict[str, float]:
        """The numbers to watch in training, under keys such as "mae/few". They are NaN where there is no sample.
        Regions without bins are omitted."""
        result, places = self.compute().variables, ("all", *REGIONS)
        present = {"all", *result["bin_region"].values}
        watched = [(metric.name, region) for metric in self.metrics for region in metric.watched if region in present]
        return {f"{name}/{region}": float(result[name].values[places.index(region)]) for name, region in watched}

    def compute(self, *, many: int = 100, few: int = 20) -> xr.Dataset:
        """The numbers so far, as a dataset over ``region`` (all, many, medium, few, unseen) and ``bin``.

        The ``units`` attribute ``"label"`` means the unit of the labels. Over a grid there is also ``axis``:
        ``axis_mae``, ``axis_rmse`` and so on hold one value per dimension, as do the bounds and centres of bins.

        Args:
            many, few: limits of the regions, as in :meth:`LabelDensity.regions`. They are ignored if regions were
                given.
        Raises:
            LabelError, ValueError: on an accelerator, ``update`` got invalid samples.
        """
        self._check_refused()
        regions = self.density.regions(many=many, few=few) if self.regions is None else self.regions
        by_bin = self._sums_by_bin()
        inside = np.stack([np.ones(len(regions), dtype=bool)] + [regions == name for name in REGIONS])  # (5, B)
        by_region = {name: np.where(inside, rows[:, None], 0).sum(-1) for name, rows in by_bin.items()}  # (K, 5)
        tested = inside & (by_bin["count"][0] > 0)
        data: dict[str, Any] = {}
        units: dict[str, str] = {}
        with np.errstate(divide="ignore", invalid="ignore"):
            for metric in self.metrics:
                if "bin" in metric.over:
                    data[f"bin_{metric.name}"] = ("bin", metric.of(by_bin).mean(0))
                if "region" in metric.over:
                    by_axis = self._mean_over_bins(metric.of(by_bin), tested) if metric.mean_over_bins else None
                    by_axis = metric.of(by_region) if by_axis is None else by_axis  # (K, 5)
                    if metric.ratio:
                        by_axis = np.where(by_axis[1] > 0, by_axis[0] / by_axis[1], np.nan)
                    pooled = {name: by_region[name].mean(0) for name in metric.sums} if metric.pooled else None
                    data[metric.name] = ("region", by_axis.mean(0) if pooled is None else metric.of(pooled))
                    if isinstance(self.bins, BinGrid):
                        data[f"axis_{metric.name}"] = (("axis", "region"), by_axis)
                names = (*metric.variables, f"axis_{metric.name}")
                units |= {name: stored_unit(metric.unit) for name in names if name in data}
        data |= {
            "count": ("region", by_region["count"][0].astype(np.int64)),
            "bins": ("region", tested.sum(1)),
            "bin_count": ("bin", by_bin["count"][0].astype(np.int64)),
            "train_count": ("bin", np.asarray(self.density.counts)),
        }
        return self._dataset(data, units, regions)

    def _mean_over_bins(self, values: np.ndarray, tested: np.ndarray) -> np.ndarray:
        """The mean of ``values`` (..., K, B) over the tested bins of each region, (..., K, 5)."""
        widths = self._widths()
        return np.where(tested, (values * widths)[..., None, :], 0.0).sum(-1) / (tested * widths).sum(1)

    def _dataset(self, data: dict[str, Any], units: dict[str, str], regions: np.ndarray) -> xr.Dataset:
        """Variables over regions and bins as a dataset with the coordinates of both."""
        import xarray as xr

        bins = self.bins
        if isinstance(bins, BinGrid):
            dims: Any = ("bin", "axis")
            low, high = (bins._corners([axis.edges[i : len(axis) + i] for axis in bins.axes]) for i in (0, 1))
        else:
            dims, low, high = "bin", bins.edges[:-1], bins.edges[1:]
        label = {"units": stored_unit("label")}
        return xr.Dataset(
            {name: (*variable, {"units": units.get(name, "1")}) for name, variable in data.items()},
            coords={
                "region": ["all", *REGIONS],
                "bin": np.arange(len(bins)),
                "bin_low": (dims, low, label),
                "bin_high": (dims, high, label),
                "bin_center": (dims, bins.centers, label),
                "bin_region": ("bin", regions),
            },
        )
