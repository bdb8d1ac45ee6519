"""Regression errors by region and by bin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import alike, as_tensors, finite, number, require, same_shape
from .._numerics import readable
from ..labels.bins import Missing, Outside
from ..labels.density import LabelDensity
from ..labels.grid import AnyBins, BinGrid
from ._metric import Metric
from ._regions import Axis, RegionMetrics
from ._sums import check_samples, check_some, placed
from .relevance import Relevance

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["RegressionMetrics", "regression_metrics"]

_PIECE = 2**20  # labels at a time, which bounds the memory for maps with one label per pixel
_SMALL, _MOST_WAITING = 2**9, 32  # samples of a small batch, and how many of these wait to be added together


def _recorded(tensor: Tensor) -> bool:
    """Whether what is done to a tensor now is recorded, to be done again later."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _contributions(
    pred: Tensor, target: Tensor, origin: float, floor: float, median: float, relevance: Relevance
) -> dict[str, Tensor]:
    """The terms that each sample adds to the sums of its bin, by name. A metric may use any of these."""
    error = pred - target
    size, squared = error.abs(), error.square()
    p, t = pred - origin, target - origin
    return {
        "count": torch.ones_like(p),
        "abs": size,
        "squared": squared,
        "log": size.clamp_min(floor).log(),
        "error": error,
        "pred": p,
        "target": t,
        "pred2": p.square(),
        "target2": t.square(),
        "product": p * t,
        "of_median": (target - median).abs(),
        "relevant": relevance(target) * squared,
    }


def _pearson(
    n: np.ndarray, pred: np.ndarray, target: np.ndarray, pred2: np.ndarray, target2: np.ndarray, product: np.ndarray
) -> np.ndarray:
    """Pearson's correlation from sums over n samples; NaN if a side does not vary."""
    covariance = product - pred * target / n
    spread_pred, spread_target = pred2 - pred**2 / n, target2 - target**2 / n
    # The variance of a constant is not exactly zero: it is within n rounding errors of the sum of squares.
    noise = 1e-15 * n
    varied = (spread_pred > noise * pred2) & (spread_target > noise * target2)
    return np.clip(np.where(varied, covariance / np.sqrt(spread_pred * spread_target), np.nan), -1, 1)


_METRICS = (
    Metric(
        "mae", "MAE", "label", ("abs", "count"), np.divide,
        over=("region", "bin"), low=0, watched=("all", "many", "medium", "few"),
    ),
    Metric("rmse", "RMSE", "label", ("squared", "count"), lambda s, n: np.sqrt(s / n), pooled=True, low=0),
    Metric("gm", "GM", "label", ("log", "count"), lambda s, n: np.exp(s / n), pooled=True, low=0),
    Metric("bmae", "bMAE", "label", ("abs", "count"), np.divide, mean_over_bins=True, low=0, watched=("all",)),
    Metric(
        "bmase", "bMASE", "1", ("abs", "of_median", "count"), lambda s, m, n: np.stack([s / n, m / n]),
        mean_over_bins=True, ratio=True, low=0, may_be_nan=True,
    ),
    Metric(
        "sera", "SERA", "label^2", ("relevant", "count"), lambda s, n: np.where(n > 0, s, np.nan),
        pooled=True, low=0, may_be_nan=True,
    ),
    Metric("bias", "bias", "label", ("error", "count"), np.divide, over=("region", "bin")),
    Metric(
        "pearson", "Pearson's r", "1", ("count", "pred", "target", "pred2", "target2", "product"), _pearson,
        low=-1, high=1, may_be_nan=True,
    ),
)  # fmt: skip
_SUMS = tuple(dict.fromkeys(("count", *(name for metric in _METRICS for name in metric.sums))))


class RegressionMetrics(RegionMetrics):
    """MAE, RMSE, GM, bMAE, bMASE, SERA, bias and Pearson's r, over all labels and by region of the training density.

    All are computed from float64 sums per bin, so that merging is exact and regions can be chosen afterwards. The bMAE
    is the mean of the MAE of each tested bin, weighted by the bin's width. The bMASE is the bMAE divided by that of a
    constant prediction, the median of the training labels. It is comparable across data sets, and NaN where the
    constant has no error. SERA is the sum over samples of the squared error times the relevance of the label, which
    equals its integral over thresholds. :class:`~dir_toolkit.metrics.relevance.Relevance` is computed from the training
    density. It is zero everywhere if there are no extreme labels.

    Over a grid of K axes the joint bin decides the region, and each number is the mean over the K dimensions with equal
    weights. Scale labels with different units first. ``compute`` also returns the numbers of each dimension.

    Args:
        density: the density of the training labels, which defines the label axis, or the grid, and the region of each
            bin. ``(bins, density)``, in two arguments, means the same.
        floor: the smallest absolute error in the geometric mean, in label units, so that one perfect prediction does
            not make it zero. None takes a hundredth of the median bin width. Over a grid it is one number, or one per
            axis.
        outside: ``"raise"``, ``"clip"`` or ``"drop"``. The error of a clipped target is exact.
        missing: ``"raise"``, or ``"drop"``, which ignores targets that are NaN. Over a grid a row with one NaN is
            ignored in all dimensions. To judge each dimension alone, use metrics of its own axis.

    Source:
        Ribeiro and Moniz 2020, doi:10.1007/s10994-020-05900-9, for SERA.

    >>> from dir_toolkit import Bins
    >>> metrics = RegressionMetrics(LabelDensity(Bins.classes(2), [200, 5]))
    >>> metrics.update(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]))
    >>> metrics.compute().mae.sel(region=["all", "many", "few"]).values.tolist()
    [1.0, 0.5, 2.0]
    """

    metrics: ClassVar[tuple[Metric, ...]] = _METRICS
    selects: ClassVar[str] = "bmae/all"
    takes: ClassVar[str] = "prediction"
    kept: ClassVar[tuple[str, ...]] = ("sums", "refused")

    def __init__(
        self,
        density: Axis,
        counted: LabelDensity | None = None,
        *,
        floor: float | Sequence[float] | None = None,
        outside: Outside = "raise",
        missing: Missing = "raise",
    ) -> None:
        super().__init__(density, counted, outside, missing, grids=True)
        bins = self.bins
        self._floors = _floor_per_axis(floor, bins)
        self.floor = self._floors if isinstance(bins, BinGrid) else self._floors[0]
        # Correlation is computed relative to the middle of the axis, which avoids cancellation.
        self._origins = [float(axis.edges[0] + axis.edges[-1]) / 2 for axis in bins.axes]
        self._relevances = [Relevance.of(marginal) for marginal in _marginals(self.density)]
        self._medians = [relevance.median for relevance in self._relevances]
        axes = (len(bins.axes),) if isinstance(bins, BinGrid) else ()
        self._begin(sums=(*axes, len(_SUMS), len(bins)), refused=(2,))

    @property
    def settings(self) -> dict[str, Any]:
        return {"density": self.density, "floor": self.floor, "outside": self.outside, "missing": self.missing}

    def update(self, pred: Any, target: Any) -> None:
        """Add a batch, without waiting for an accelerator. Copies of small batches, at most 16,384 samples, are held
        back, since adding many together takes hardly longer than adding one.

        Args:
            pred, target: tensors, or NumPy arrays, pandas columns and lists of numbers.
        Shape:
            pred, target: any shape, both the same. Over a grid they are (..., K). An empty batch adds nothing.
        Units:
            those of the label.
        Raises:
            ShapeError: shapes differ. LabelError: a target is NaN, or lies beyond the axis under ``outside="raise"``.
            ValueError: a prediction or a clipped target is not finite. On an accelerator such values make results NaN
                or infinite.
        """
        if not (alike(pred, target) and readable(pred) and readable(target)):
            pred, target = as_tensors(pred=pred, target=target)
            check_samples(pred=pred, target=target)
            same_shape(pred=pred, target=target)
        finite(pred=pred)
        index, refused = placed(self.bins, target, self.outside, self.missing)
        if self.outside == "clip":
            finite(target=target if self.missing == "raise" else target.masked_fill(target.isnan(), 0))
        if refused is not None:
            self._ready(index.device, "refused")
            self.refused[0].add_(refused)
        of_bin, p, t = index.flatten(), pred.detach().flatten(), target.detach().flatten()
        if len(of_bin) <= _SMALL and not _recorded(of_bin):
            if len(self._waiting) == _MOST_WAITING or (self._waiting and self._waiting[0][0].device != of_bin.device):
                self._add_waiting()
            p, t = (x.clone() if x.dtype == torch.float64 else x.double() for x in (p, t))
            self._waiting.append((of_bin, p, t))
            return
        self._add_waiting()
        many = _PIECE * len(self.bins.axes)
        for piece in zip(of_bin.split(_PIECE), p.split(many), t.split(many), strict=True):
            self._add(*piece)

    @property
    def sums(self) -> Tensor:
        """(S, B), or over a grid (K, S, B), float64: the sums of all samples so far."""
        self._add_waiting()
        return self._sums

    @sums.setter
    def sums(self, sums: Tensor) -> None:
        self._sums = sums
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # arguments of _add

    def _add_waiting(self) -> None:
        if self._waiting:
            waiting = tuple(self._waiting)
            self._waiting.clear()  # not replaced: a shallow copy shares it, as it shares the sums
            try:
                self._add(*map(torch.cat, zip(*waiting, strict=True)))
            except BaseException:  # an interrupt, or no memory: nothing is lost
                self._waiting[:0] = waiting
                raise

    def _add(self, of_bin: Tensor, pred: Tensor, target: Tensor) -> None:
        """Add predictions and targets, (N,) or over a grid (N * K,), to the sums of their bins (N,), unless these are
        negative."""
        self._ready(of_bin.device)
        shape = (-1, len(self.bins.axes))
        rows = self._rows(pred.double().view(shape), target.double().view(shape))
        ignored = of_bin < 0
        if not readable(of_bin) or ignored.any():
            of_bin, rows = of_bin.clamp_min(0), rows.masked_fill_(ignored, 0)
        self._sums.view(-1, len(self.bins)).index_add_(1, of_bin, rows)

    def _rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """The terms that samples (N, K) add to the sums of their bins, (K * S, N)."""
        rows: list[Tensor] = []
        for k, about in enumerate(zip(self._origins, self._floors, self._medians, self._relevances, strict=True)):
            added = _contributions(pred[:, k], target[:, k], *about)
            rows += [added[name] for name in _SUMS]
        return torch.stack(rows)

    def _sums_by_bin(self) -> dict[str, np.ndarray]:
        rows = self.sums.view(-1, *self.sums.shape[-2:]).cpu().numpy()  # (K, S, B)
        return dict(zip(_SUMS, rows.swapaxes(0, 1), strict=True))

    def _widths(self) -> np.ndarray:
        return self.bins.relative_widths


def _floor_per_axis(floor: Any, bins: AnyBins) -> tuple[float, ...]:
    """The floor of each axis."""
    if floor is None:
        return tuple(float(np.median(np.diff(axis.edges))) / 100 for axis in bins.axes)
    floors = floor if isinstance(bins, BinGrid) and isinstance(floor, Sequence) else [floor] * len(bins.axes)
    fits, rule = len(floors) == len(bins.axes), f"floor must be one number, or one for each of {len(bins.axes)} axes"
    require(fits, rule, got=repr(floor))
    return tuple(number("floor", value, low=0, open_low=True) for value in floors)


def _marginals(density: LabelDensity) -> list[LabelDensity]:
    """The density of each axis."""
    joint, axes = density.counts.reshape(density.bins.shape), density.bins.axes
    return [LabelDensity(a, np.moveaxis(joint, k, 0).reshape(len(a), -1).sum(1)) for k, a in enumerate(axes)]


def regression_metrics(
    pred: Any,
    target: Any,
    density: Axis,
    counted: LabelDensity | None = None,
    *,
    floor: float | Sequence[float] | None = None,
    outside: Outside = "raise",
    missing: Missing = "raise",
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`RegressionMetrics` of one whole data set, with the arguments of the class, ``update`` and ``compute``."""
    (pred,) = as_tensors(pred=pred)
    check_some(pred=pred)
    metrics = RegressionMetrics(density, counted, floor=floor, outside=outside, missing=missing)
    metrics.update(pred, target)
    return metrics.compute(many=many, few=few)
