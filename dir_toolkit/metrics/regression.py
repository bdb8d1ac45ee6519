"""Regression errors by region and by bin, from sums that merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import finite, is_tensor, number, one_of, problem, real, same_device, same_shape
from ..errors import ShapeError
from ..labels.bins import Outside
from ..labels.density import LabelDensity
from ..labels.grid import AnyBins, BinGrid
from . import _regions
from ._sums import MergingSums, check_tensors, placed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["RegressionMetrics", "regression_metrics"]

_PIECE = 2**20  # labels at a time, so that maps of one label per pixel need no ten copies
_SUMS = ("count", "abs", "squared", "log", "error", "pred", "target", "pred2", "target2", "product")


class RegressionMetrics(MergingSums):
    """MAE, RMSE, GM, bMAE, bias and Pearson's correlation, over all labels and by region of the training density.

    Everything follows from ten float64 sums per bin, so batches, ranks and objects merge exactly, and regions can be
    chosen afterwards. The bMAE is the mean of the bins' own MAE over the bins that were tested, each as wide as it is
    on the label axis, so that all labels of the axis weigh alike.

    Over a grid of K axes the joint bin decides the region, and each number is the mean over the K dimensions: absolute
    and squared errors, logarithms (for GM), bias and correlation of a sample's dimensions weigh alike, so bring labels
    of different units to one scale first. The numbers of each dimension by itself stand beside.

    Args:
        bins: the label axis, or a grid of several.
        density: of the training labels, which decides the region of each bin.
        floor: least absolute error that enters the geometric mean, in label units, so that one perfect prediction does
            not zero it; None takes a hundredth of the median bin width. Over a grid one for all axes or one per axis.
        outside: what a target beyond the axis does: ``"raise"``; ``"clip"``, which counts it in the end bin and leaves
            its error exact; ``"drop"``, which counts it nowhere.

    >>> from dir_toolkit import Bins
    >>> metrics = RegressionMetrics(Bins.classes(2), LabelDensity(Bins.classes(2), [200, 5]))
    >>> metrics.update(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]))
    >>> metrics.compute().mae.sel(region=["all", "many", "few"]).values.tolist()
    [1.0, 0.5, 2.0]
    """

    selects: ClassVar[str] = "bmae/all"
    """The number of :meth:`summary` by which training chooses an epoch: the less, the better."""
    takes: ClassVar[str] = "prediction"
    """What :meth:`update` takes of a model's output, by name."""

    kept: ClassVar[tuple[str, ...]] = ("sums", "refused")

    sums: Tensor

    def __init__(
        self,
        bins: AnyBins,
        density: LabelDensity,
        *,
        floor: float | Sequence[float] | None = None,
        outside: Outside = "raise",
    ) -> None:
        _regions.check_axis(bins, density, grid=True)
        one_of("outside", outside, ("raise", "clip", "drop"))
        self.bins, self.density, self.outside = bins, density, outside
        self._floors = _checked_floors(floor, bins)
        self.floor = self._floors if isinstance(bins, BinGrid) else self._floors[0]
        # Correlation is taken about the middle of the axis, so that a far-away origin costs no digits.
        self._origins = [float(axis.edges[0] + axis.edges[-1]) / 2 for axis in bins.axes]
        axes = (len(bins.axes),) if isinstance(bins, BinGrid) else ()
        self._begin(sums=(*axes, len(_SUMS), len(bins)), refused=(2,))

    @property
    def settings(self) -> dict[str, Any]:
        return {"bins": self.bins, "density": self.density, "floor": self.floor, "outside": self.outside}

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch. On an accelerator nothing waits for the host.

        Shape:
            pred, target: any shape, equal, such as maps of one label per pixel; over a grid (..., K). An empty batch
            adds nothing. Pixels without a label are left out by the caller: ``update(pred[valid], target[valid])``.
        Units:
            those of the label.
        Raises:
            ShapeError: shapes differ. LabelError: a target is NaN, or beyond the axis under ``outside="raise"``.
            ValueError: a prediction is not finite, or a target that is clipped. In each case nothing has been added.
            On an accelerator targets without a bin are counted, and :meth:`compute` and ``all_reduce`` raise for
            them; what is not finite shows in the result.
        """
        is_tensor(pred=pred, target=target)
        check_tensors(pred=pred, target=target)
        real(pred=pred, target=target)
        same_shape(pred=pred, target=target)
        same_device(pred=pred, target=target)
        finite(pred=pred)
        index, refused = placed(self.bins, target, self.outside)
        if self.outside == "clip":
            finite(target=target)
        some_lack_a_bin = refused is not None or self.outside == "drop"
        self._ready(index.device)
        if refused is not None:
            self.refused[0].add_(refused)
        sums = self.sums.view(-1, len(self.bins))  # (K * 10, B)
        p, t = (x.detach().reshape(-1, len(self.bins.axes)) for x in (pred, target))  # (N, K)
        pieces = (x.split(_PIECE) for x in (p, t, index.flatten()))
        for p_piece, t_piece, of_bin in zip(*pieces, strict=True):
            rows = self._rows(p_piece.double(), t_piece.double())
            if some_lack_a_bin:
                rows = rows.masked_fill(of_bin < 0, 0)
            sums.index_add_(1, of_bin.clamp_min(0) if some_lack_a_bin else of_bin, rows)

    def _rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """What each sample (N, K) adds to the sums of its bin, (K * 10, N)."""
        rows = []
        for k, (origin, floor) in enumerate(zip(self._origins, self._floors, strict=True)):
            p, t = pred[:, k], target[:, k]
            error = p - t
            p, t = p - origin, t - origin
            size = error.abs()
            rows += [
                torch.ones_like(p),
                size,
                error.square(),
                size.clamp_min(floor).log(),
                error,
                p,
                t,
                p.square(),
                t.square(),
                p * t,
            ]
        return torch.stack(rows)

    def summary(self) -> dict[str, float]:
        """The numbers to watch in training: MAE over all and by region, and bMAE; NaN where there is no sample."""
        result = self.compute()
        shown = [("mae", "all"), ("mae", "many"), ("mae", "medium"), ("mae", "few"), ("bmae", "all")]
        return {f"{name}/{region}": float(result[name].sel(region=region)) for name, region in shown}

    def compute(self, *, many: int = 100, few: int = 20) -> xr.Dataset:
        """The errors so far, as a dataset over ``region`` (all, many, medium, few, unseen) and ``bin``.

        A region or bin without a test sample is missing (NaN), not zero, and its count says so. Units are attributes.
        Over a grid there is ``axis``, too: ``axis_mae``, ``axis_rmse`` and so on hold each dimension by itself, and the
        bounds and centres of bins have one value per dimension.

        Args:
            many, few: limits of the regions, as in :meth:`LabelDensity.regions`.
        Raises:
            LabelError: targets on an accelerator were NaN, or beyond the axis under ``outside="raise"``.
        """
        self._check_refused()
        regions = self.density.regions(many=many, few=few)
        rows = self.sums.view(-1, *self.sums.shape[-2:]).cpu().numpy()  # (K, 10, B)
        sums = dict(zip(_SUMS, rows.swapaxes(0, 1), strict=True))
        inside = _regions.membership(regions)  # (5, B)
        total = {name: np.stack([np.where(inside, r, 0.0).sum(1) for r in row]) for name, row in sums.items()}
        tested = inside & (sums["count"][0] > 0)
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
            of_axis = {
                "mae": total["abs"] / n,
                "rmse": np.sqrt(total["squared"] / n),
                "gm": np.exp(total["log"] / n),
                "bmae": np.stack([_regions.bin_mean(row, tested, self.bins.relative_widths) for row in bin_mae]),
                "bias": total["error"] / n,
                "pearson": np.clip(pearson, -1, 1),
            }  # each (K, 5)
            values = {name: row.mean(0) for name, row in of_axis.items()}
            values["rmse"] = np.sqrt((total["squared"] / n).mean(0))
            values["gm"] = np.exp((total["log"] / n).mean(0))
        data: dict[str, Any] = {name: ("region", value) for name, value in values.items()}
        data["count"] = ("region", n[0].astype(np.int64))
        data["bins"] = ("region", tested.sum(1).astype(np.int64))
        data |= {
            "bin_mae": ("bin", bin_mae.mean(0)),
            "bin_bias": ("bin", bin_bias.mean(0)),
            "bin_count": ("bin", sums["count"][0].astype(np.int64)),
        }
        units = ["mae", "rmse", "gm", "bmae", "bias", "bin_mae", "bin_bias"]
        if isinstance(self.bins, BinGrid):
            data |= {f"axis_{name}": (("axis", "region"), row) for name, row in of_axis.items()}
            units += [f"axis_{name}" for name in of_axis if name != "pearson"]
        return _regions.dataset(data, self.density, regions, label_units=units)


def _checked_floors(floor: float | Sequence[float] | None, bins: AnyBins) -> tuple[float, ...]:
    """The least error of each axis."""
    if floor is None:
        floor = [float(np.median(np.diff(axis.edges))) / 100 for axis in bins.axes]
    elif not (isinstance(bins, BinGrid) and isinstance(floor, Sequence)):
        floor = [number("floor", floor, low=0, open_low=True)] * len(bins.axes)
    if len(floor) != len(bins.axes):
        raise problem(f"floor must be one number, or one for each of {len(bins.axes)} axes", got=repr(floor))
    return tuple(number("floor", value, low=0, open_low=True) for value in floor)


def regression_metrics(
    pred: Tensor,
    target: Tensor,
    bins: AnyBins,
    density: LabelDensity,
    *,
    floor: float | Sequence[float] | None = None,
    outside: Outside = "raise",
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`RegressionMetrics` of one whole set: update and compute in one call."""
    is_tensor(pred=pred, target=target)
    if pred.numel() == 0:
        raise problem(
            "pred must hold at least one value",
            got=f"shape {tuple(pred.shape)}",
            error=ShapeError,
        )
    metrics = RegressionMetrics(bins, density, floor=floor, outside=outside)
    metrics.update(pred, target)
    return metrics.compute(many=many, few=few)
