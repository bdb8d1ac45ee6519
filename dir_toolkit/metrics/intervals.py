"""Coverage and mean width of prediction intervals, by region and by bin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensors, finite, require, same_shape
from .._numerics import readable
from ..labels.bins import Missing, Outside
from ..labels.density import LabelDensity
from ._metric import Metric
from ._regions import Axis, RegionMetrics
from ._sums import check_samples, check_some, placed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["IntervalMetrics", "interval_metrics"]

_SUMS = ("count", "covered", "width")


class IntervalMetrics(RegionMetrics):
    """Coverage and mean width of prediction intervals, over all labels and by region of the training density.

    Coverage is the share of labels in their interval, ends included. Intervals that cover 90 % of all labels may cover
    far fewer rare ones, which only the regions show. :mod:`dir_toolkit.conformal` calibrates per region. In the width
    an infinite end counts as the end of the axis.

    Args:
        density: the density of the training labels, which defines the label axis and the region of each bin. ``(bins,
            density)``, in two arguments, means the same.
        outside: ``"raise"``, ``"clip"`` or ``"drop"``.
        missing: ``"raise"``, or ``"drop"``, which ignores targets that are NaN.
    Attributes:
        sums: (3, B) float64, per bin: the number of labels, the number of covered labels, and the sum of widths.

    >>> from dir_toolkit import Bins
    >>> metrics = IntervalMetrics(LabelDensity(Bins.uniform(0, 10, width=5), [200, 5]))
    >>> metrics.update([0.0, 2.0, 4.0], [4.0, 5.0, torch.inf], [1.0, 6.0, 9.0])
    >>> result = metrics.compute().sel(region=["all", "many", "few"])
    >>> result.coverage.values.round(2).tolist(), result.width.values.round(2).tolist()
    ([0.67, 1.0, 0.5], [4.33, 4.0, 4.5])
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "coverage", "coverage", "%", ("covered", "count"), np.divide, over=("region", "bin"),
            low=0, high=1, may_be_nan=True,
        ),
        Metric(
            "width", "width", "label", ("width", "count"), np.divide, over=("region", "bin"), low=0, may_be_nan=True
        ),
    )  # fmt: skip
    kept: ClassVar[tuple[str, ...]] = ("sums", "refused")

    sums: Tensor
    refused: Tensor

    def __init__(
        self,
        density: Axis,
        counted: LabelDensity | None = None,
        *,
        outside: Outside = "raise",
        missing: Missing = "raise",
    ) -> None:
        super().__init__(density, counted, outside, missing, grids=False)
        self._begin(sums=(len(_SUMS), len(self.bins)), refused=(2,))

    @property
    def settings(self) -> dict[str, Any]:
        return {"density": self.density, "outside": self.outside, "missing": self.missing}

    def update(self, lower: Any, upper: Any, target: Any) -> None:
        """Add a batch, without waiting for an accelerator.

        Args:
            lower, upper, target: tensors, or NumPy arrays, pandas columns and lists of numbers.
        Shape:
            lower, upper, target: any shape, all the same. An empty batch adds nothing.
        Units:
            those of the label.
        Raises:
            ShapeError: shapes differ. LabelError: a target is NaN, or lies beyond the axis under ``outside="raise"``.
            ValueError: an end is NaN, or a lower end is above its upper end. On an accelerator the width is NaN then.
        """
        lower, upper, target = as_tensors(lower=lower, upper=upper, target=target)
        check_samples(lower=lower, upper=upper, target=target)
        same_shape(lower=lower, upper=upper, target=target)
        low, high, label = (x.detach().flatten().double() for x in (lower, upper, target))
        if readable(low):
            for name, ends in (("lower", lower), ("upper", upper)):
                finite(**{name: torch.where(ends.isinf(), 0, ends)})
            require(bool((low <= high).all()), "lower must not exceed upper", got=lambda: _crossed(low, high))
        index, refused = placed(self.bins, target, self.outside, self.missing)
        index = index.flatten()
        self._ready(index.device)
        if refused is not None:
            self.refused[0].add_(refused)
        first, last = (float(edge) for edge in self.bins.edges[[0, -1]])
        length = torch.where(high == torch.inf, low.clamp_min(last), high) - torch.where(
            low == -torch.inf, high.clamp_max(first), low
        )
        width = torch.where(low == high, 0.0, length)  # also of infinite ends
        # In the lowest of the given precisions, so that a label on an end counts as inside, as in Bins.index.
        dtypes = [x.dtype for x in (lower, upper, target) if x.is_floating_point()]
        narrow = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float64)
        rounded = ((x, x.to(narrow).double()) for x in (low, high, label))
        begin, end, at = (torch.where(y.isfinite(), y, x) for x, y in rounded)  # what is too large keeps its own
        covered = ((begin <= at) & (at <= end)).double()
        rows = torch.stack([torch.ones_like(low), covered, width.masked_fill(~(low <= high), torch.nan)])
        rows = rows.masked_fill(index < 0, 0)
        self.sums.index_add_(1, index.clamp_min(0), rows)

    def _sums_by_bin(self) -> dict[str, np.ndarray]:
        return dict(zip(_SUMS, self.sums[:, None].cpu().numpy(), strict=True))


def interval_metrics(
    lower: Any,
    upper: Any,
    target: Any,
    density: Axis,
    counted: LabelDensity | None = None,
    *,
    outside: Outside = "raise",
    missing: Missing = "raise",
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`IntervalMetrics` of one whole data set, with the arguments of the class, ``update`` and ``compute``."""
    (target,) = as_tensors(target=target)
    check_some(target=target)
    metrics = IntervalMetrics(density, counted, outside=outside, missing=missing)
    metrics.update(lower, upper, target)
    return metrics.compute(many=many, few=few)


def _crossed(lower: Tensor, upper: Tensor) -> str:
    first = int((lower > upper).to(torch.uint8).argmax())
    return f"{lower[first]:g} and {upper[first]:g} at index [{first}]"
