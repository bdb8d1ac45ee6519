"""A summary of a label density with advice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .bins import Bins
from .density import REGIONS, LabelDensity, crowded_bins

__all__ = ["Description"]

_EVEN, _HARSH = (
    0.8,
    0.1,
)  # shares of effective labels: above the first labels are nearly uniform, below the second a few dominate
_TOO_FEW = 5  # labels per bin
_BRIDGED = 4  # adjacent empty bins that the default window of five still fills


@dataclass(frozen=True)
class Description:
    """The result of :meth:`LabelDensity.describe`. Its ``str`` and ``repr`` are a readable summary.

    Attributes:
        labels, bins: the number of labels and of bins.
        per_bin: the median number of labels over the bins that are not empty.
        empty: the number of bins without a label.
        gap: the largest number of adjacent empty bins between labels. It is 0 for grids and classes.
        ratio: the imbalance: the density of the densest bin divided by that of the sparsest bin that is not empty.
        effective: the effective sample size under weights inverse to the density, smoothed as in :class:`LDS` by
            default. It equals ``labels`` for a uniform distribution.
        regions: the number of bins in each region of :meth:`LabelDensity.regions`.
        why: the reason for the bins that :meth:`Bins.auto` chose; None for other axes.
        advice: recommendations, one sentence each.
    """

    labels: float
    bins: int
    per_bin: float
    empty: int
    gap: int
    ratio: float
    effective: float
    regions: dict[str, int]
    why: str | None
    advice: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"labels            {self.labels:,.6g} in {self.bins:,} bins",
            f"labels per bin    {self.per_bin:,.6g}, the median of bins that are not empty",
            f"empty bins        {self.empty:,}, at most {self.gap:,} in a row between labels",
            f"imbalance         {self.ratio:,.3g} times as dense in the densest bin as in the sparsest",
            f"effective labels  {self.effective:,.0f} under inverse weights, {self.effective / self.labels:.0%}",
            "regions           " + ", ".join(f"{count:,} {name}" for name, count in self.regions.items()),
            *([f"axis              {self.why}"] if self.why else []),
            *(f"- {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)

    __repr__ = __str__


def described(density: LabelDensity) -> Description:
    """The description of a density with at least one label."""
    bins, counts = density.bins, density.counts
    held = counts > 0
    per_width = density._per_width()[held]
    smoothed = density.smooth("auto")
    weights, of_held = 1 / smoothed._per_width()[held], counts[held].astype(np.float64)
    one_axis = isinstance(bins, Bins) and not bins.categorical
    gaps = np.diff(np.flatnonzero(held)) if one_axis else np.empty(0)
    regions = density.regions()
    summary = Description(
        labels=float(of_held.sum()),
        bins=len(bins),
        per_bin=float(np.median(of_held)),
        empty=int((~held).sum()),
        gap=int(gaps.max(initial=1)) - 1,
        ratio=float(per_width.max() / per_width.min()),
        effective=float((weights * of_held).sum() ** 2 / (weights**2 * of_held).sum()),
        regions={name: int((regions == name).sum()) for name in REGIONS},
        why=bins.why if isinstance(bins, Bins) else None,
        advice=(),
    )
    return replace(summary, advice=tuple(_advice(summary, one_axis, crowded_bins(bins, counts))))


def _advice(summary: Description, one_axis: bool, crowded: list[str]) -> Iterator[str]:
    """Sentences on what suits labels that are distributed in this way."""
    left = summary.effective / summary.labels
    if left >= _EVEN:
        where = "the bins that hold any" if summary.empty else "the axis"
        yield f"Labels are nearly uniform over {where}: plain training is enough."
    else:
        scheme = "" if left < _HARSH else ', or by scheme="inverse" for a stronger effect'
        yield f"Weight the loss by LDS(bins).fit(labels){scheme}."
        if left < _HARSH:
            yield 'Avoid scheme="inverse", or bound it by clip=: a few rare labels would dominate the loss.'
        if one_axis:
            yield "Or predict a distribution over bins, LongTailModel(..., bins), and choose tau on validation data."
        else:
            yield "Or use logit adjustment: train under the prior of the labels and predict under a uniform one."
    yield from (f"{clause}: unless they are equal, use narrower bins there, as Bins.auto does." for clause in crowded)
    if one_axis and summary.per_bin < _TOO_FEW:
        yield "Bins hold few labels: use wider bins, or collect more labels."
    size = 2 * ((summary.gap + 1) // 2) + 1
    if summary.gap > _BRIDGED and size <= summary.bins // 6:
        yield f"Widen the kernel to bridge empty bins: gaussian({size}, {size / 2.5:.3g})."
    elif summary.gap > _BRIDGED and summary.why is None:
        yield "No kernel bridges so many empty bins: make bins wider where labels are rare, as Bins.auto does."
    if summary.regions["many"] == 0:
        yield "No bin has more than 100 labels: regions(relative=True) compares bins with a uniform distribution."
