"""Regression errors by region and by bin, from sums that merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import finite, instance, is_tensor, number, problem, real, same_device, same_shape
from ..errors import ShapeError
from ..labels.bins import Bins
from ..labels.density import LabelDensity
from . import _regions
from ._ranks import summed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["RegressionMetrics", "regression_metrics"]

_SUMS = ("count", "abs", "squared", "log", "error", "pred", "target", "pred2", "target2", "product")


class RegressionMetrics:
    """MAE, RMSE, GM, bMAE, bias and Pearson's correlation, over all labels and by region of the training density.

    Everything follows from ten float64 sums a bin, so batches, ranks and objects merge exactly, and regions can be
    chosen afterwards.

    Args:
        bins: the label axis; a target beyond it raises.
        density: of the training labels, which decides the region of each bin.
        floor: least absolute error that enters the geometric mean, in label units, so that one perfect prediction does
            not zero it; None takes a hundredth of the median bin width.

    >>> metrics = RegressionMetrics(Bins.classes(2), LabelDensity(Bins.classes(2), [200, 5]))
    >>> metrics.update(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]))
    >>> metrics.compute().mae.sel(region=["all", "many", "few"]).values.tolist()
    [1.0, 0.5, 2.0]
    """

    selects: ClassVar[str] = "bmae/all"
    """The number of :meth:`summary` by which training chooses an epoch: the less, the better."""

    def __init__(self, bins: Bins, density: LabelDensity, *, floor: float | None = None) -> None:
        where = "RegressionMetrics"
        _regions.check_axis(where, bins, density)
        self.bins, self.density = bins, density
        widths = np.diff(bins.edges)
        floor = float(np.median(widths)) / 100 if floor is None else floor
        self.floor = number(where, "floor", floor, low=0, open_low=True)
        # Correlation is taken about the middle of the axis, so that a far-away origin costs no digits.
        self._origin = float(bins.edges[0] + bins.edges[-1]) / 2
        self.sums: Tensor = torch.zeros(len(_SUMS), len(bins), dtype=torch.float64)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch.

        Shape:
            pred, target: any shape, equal; an empty batch adds nothing.
        Units:
            those of the label.
        Raises:
            ShapeError: shapes differ. LabelError: a target is NaN or beyond the axis. ValueError: a prediction is not
            finite (on an accelerator it shows in the result instead). In each case nothing has been added.
        """
        where = "RegressionMetrics.update"
        is_tensor(where, pred=pred, target=target)
        real(where, pred=pred, target=target)
        same_shape(where, pred=pred, target=target)
        same_device(where, pred=pred, target=target)
        finite(where, pred=pred)
        index = self.bins._place(where, target, "raise", "target").flatten()
        p, t = pred.detach().double().flatten(), target.detach().double().flatten()
        error = p - t
        p, t = p - self._origin, t - self._origin
        size = error.abs()
        rows = torch.stack(
            [
                torch.ones_like(p),
                size,
                error.square(),
                size.clamp_min(self.floor).log(),
                error,
                p,
                t,
                p.square(),
                t.square(),
                p * t,
            ]
        )  # (10, N)
        if self.sums.device != rows.device:
            self.sums = self.sums.to(rows.device)
        self.sums.index_add_(1, index, rows)

    def fresh(self) -> RegressionMetrics:
        """One of the same settings that has seen nothing."""
        return RegressionMetrics(self.bins, self.density, floor=self.floor)

    def summary(self) -> dict[str, float]:
        """The numbers to watch in training: MAE over all and by region, and bMAE; NaN where there is no sample."""
        result = self.compute()
        shown = [("mae", "all"), ("mae", "many"), ("mae", "medium"), ("mae", "few"), ("bmae", "all")]
        return {f"{name}/{region}": float(result[name].sel(region=region)) for name, region in shown}

    def merge(self, other: RegressionMetrics) -> RegressionMetrics:
        """Add what another object has seen; returns self."""
        where = "RegressionMetrics.merge"
        instance(where, RegressionMetrics, other=other)
        if other.density != self.density or other.floor != self.floor:
            raise problem(
                where,
                "both must have the same bins, training density and floor",
                got=f"{self.density!r}, floor {self.floor:g} and {other.density!r}, floor {other.floor:g}",
            )
        self.sums = self.sums + other.sums.to(self.sums.device)
        return self

    def all_reduce(self) -> RegressionMetrics:
        """Sum over all ranks, which must all call this, once, after their last update; returns self.

        Does nothing outside ``torch.distributed``.
        """
        (self.sums,) = summed(self.sums)
        return self

    def compute(self, *, many: int = 100, few: int = 20) -> xr.Dataset:
        """The errors so far, as a dataset over ``region`` (all, many, medium, few, unseen) and ``bin``.

        A region or bin without a test sample is missing (NaN), not zero, and its count says so. Units are attributes.

        Args:
            many, few: limits of the regions, as in :meth:`LabelDensity.regions`.
        """
        regions = self.density.regions(many=many, few=few)
        sums = dict(zip(_SUMS, self.sums.cpu().numpy(), strict=True))
        inside = _regions.membership(regions)  # (5, B)
        total = {name: np.where(inside, row, 0.0).sum(1) for name, row in sums.items()}
        tested = sums["count"] > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            bin_mae, bin_bias = sums["abs"] / sums["count"], sums["error"] / sums["count"]
            n = total["count"]
            covariance = total["product"] - total["pred"] * total["target"] / n
            spread_pred = total["pred2"] - total["pred"] ** 2 / n
            spread_target = total["target2"] - total["target"] ** 2 / n
            # What cancellation leaves of a constant is noise, not spread: n roundings of the sum of squares.
            noise = 1e-15 * n
            varied = (spread_pred > noise * total["pred2"]) & (spread_target > noise * total["target2"])
            pearson = np.where(varied, covariance / np.sqrt(spread_pred * spread_target), np.nan)
            values = {
                "mae": total["abs"] / n,
                "rmse": np.sqrt(total["squared"] / n),
                "gm": np.exp(total["log"] / n),
                "bmae": _regions.bin_mean(bin_mae, inside & tested),
                "bias": total["error"] / n,
                "pearson": np.clip(pearson, -1, 1),
            }
        data = {name: ("region", value) for name, value in values.items()}
        data["count"] = ("region", n.astype(np.int64))
        data["bins"] = ("region", (inside & tested).sum(1).astype(np.int64))
        data |= {
            "bin_mae": ("bin", bin_mae),
            "bin_bias": ("bin", bin_bias),
            "bin_count": ("bin", sums["count"].astype(np.int64)),
        }
        units = ("mae", "rmse", "gm", "bmae", "bias", "bin_mae", "bin_bias")
        return _regions.dataset(data, self.density, regions, label_units=units)


def regression_metrics(
    pred: Tensor,
    target: Tensor,
    bins: Bins,
    density: LabelDensity,
    *,
    floor: float | None = None,
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`RegressionMetrics` of one whole set: update and compute in one call."""
    is_tensor("regression_metrics", pred=pred, target=target)
    if pred.numel() == 0:
        raise problem(
            "regression_metrics",
            "pred must hold at least one value",
            got=f"shape {tuple(pred.shape)}",
            error=ShapeError,
        )
    metrics = RegressionMetrics(bins, density, floor=floor)
    metrics.update(pred, target)
    return metrics.compute(many=many, few=few)
