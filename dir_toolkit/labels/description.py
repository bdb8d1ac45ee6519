"""What a density says about its labels, in words and numbers, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .bins import Bins
from .density import REGIONS, LabelDensity, crowded_bins
from .kernels import usual_kernel

__all__ = ["Description"]

_EVEN, _HARSH = 0.8, 0.1  # shares of labels that inverse weights leave: labels are nearly even, or few rule the loss
_TOO_FEW = 5  # labels per bin
_BRIDGED = 4  # empty bins in a row that the usual window of five still fills


@dataclass(frozen=True)
class Description:
    """What :meth:`LabelDensity.describe` finds. Printed, it is a text to read.

    Attributes:
        labels, bins: how many there are.
        per_bin: the median number of labels over the bins that hold any.
        empty: the number of bins without a label.
        gap: the most empty bins in a row that lie between labels. It is 0 over a grid and over classes.
        ratio: how many times as dense labels are in the densest bin as in the sparsest that holds any.
        effective: the effective sample size of a loss with weights inverse to the density, which is smoothed as
            :class:`LDS` does by default. Labels that spread evenly keep all of theirs.
        regions: how many bins are many, medium, few and unseen, as :meth:`LabelDensity.regions` has them.
        why: what :meth:`Bins.auto` has recognised; None of other axes.
        advice: what to do, in sentences.
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
            f"labels per bin    {self.per_bin:,.6g}, the median of bins that hold any",
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
    kernel, per_width = usual_kernel(bins), density._per_width()[held]
    smoothed = density if kernel is None else density.smooth(kernel)
    weights, of_held = 1 / smoothed._per_width()[held], counts[held].astype(np.float64)
    one_axis = isinstance(bins, Bins) and not bins.categorical
    gaps = np.diff(np.flatnonzero(held)) if one_axis else np.empty(0)
    regions = density.regions()
    found = Description(
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
    return replace(found, advice=tuple(_advice(found, one_axis, crowded_bins(bins, counts))))


def _advice(found: Description, one_axis: bool, crowded: list[str]) -> Iterator[str]:
    left = found.effective / found.labels
    if left >= _EVEN:
        yield "Labels are nearly even over the axis: plain training will do."
    else:
        scheme = "" if left < _HARSH else ', or scheme="inverse" to go further'
        yield f"Weigh the loss by LDS(bins).fit(labels){scheme}."
        if left < _HARSH:
            yield 'Leave scheme="inverse" alone, or bound it by clip=: few rare labels would rule the loss.'
        if one_axis:
            yield "Or score bins with LongTailModel(..., bins), and choose tau on validation data."
        else:
            yield "Or learn under the prior of the labels and predict under an even one, by logit adjustment."
    yield from (f"{clause}: unless they are equal, use narrower bins there, as Bins.auto does." for clause in crowded)
    if one_axis and found.per_bin < _TOO_FEW:
        yield "Bins hold few labels: use wider ones, or get more labels."
    size = 2 * ((found.gap + 1) // 2) + 1
    if found.gap > _BRIDGED and size <= found.bins // 6:
        yield f"Widen the kernel to bridge empty bins: gaussian({size}, {size / 2.5:.3g})."
    elif found.gap > _BRIDGED and found.why is None:
        yield "No kernel bridges so many empty bins: make bins wider where labels are rare, as Bins.auto does."
    if found.regions["many"] == 0:
        yield "No bin has more than 100 labels: regions(relative=True) sorts bins by what an even spread would give."
