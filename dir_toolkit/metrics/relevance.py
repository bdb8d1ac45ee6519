"""How much a label matters: nothing at the median of training, fully from the outliers on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import instance, problem
from ..labels.bins import Bins
from ..labels.density import LabelDensity

__all__ = ["Relevance"]


@dataclass(frozen=True)
class Relevance:
    r"""The relevance function of SERA: 0 at the median, 1 from ``high`` upwards and from ``low`` downwards.

    Between these it is the cubic that is level at both ends, :math:`u^2 (3 - 2u)` of the share u of the way. On a side
    that has no extreme, which infinity says, it is 0.

    Attributes:
        low, median, high: in label units.
    Source:
        Ribeiro and Moniz 2020, section 3, doi:10.1007/s10994-020-05900-9.

    >>> Relevance(-math.inf, 0.0, 4.0)(torch.tensor([-9.0, 0.0, 2.0, 4.0, 9.0]))
    tensor([0.0000, 0.0000, 0.5000, 1.0000, 1.0000])
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, density: LabelDensity) -> Relevance:
        """That of a box plot of the training labels: ``low`` and ``high`` are the ends of its whiskers, at most 1.5
        distances of the quartiles beyond these, and infinite on a side without labels farther out.

        Labels are taken to lie evenly within their bin; for classes the median is a class. All is NaN without labels.
        """
        instance(LabelDensity, density=density)
        bins, counts = density.bins, density.counts
        if not isinstance(bins, Bins):
            raise problem("density must be over one axis", got=repr(bins))
        if not counts.any():
            return cls(math.nan, math.nan, math.nan)
        knots = bins._placed_limits()
        cumulative = np.concatenate([[0.0], density.prior().cumsum()])
        # Where labels are missing between two bins, the smallest label is taken, as quantiles take it.
        rising = np.append(True, np.diff(cumulative) > 0)
        first, median, third = np.interp([0.25, 0.5, 0.75], cumulative[rising], knots[rising])
        if bins.categorical:
            median = bins.centers[np.searchsorted(cumulative[1:], 0.5)]
        fences = first - 1.5 * (third - first), third + 1.5 * (third - first)
        lows, highs = knots[:-1][counts > 0], knots[1:][counts > 0]  # of the bins with labels
        low = max(fences[0], lows[highs > fences[0]].min()) if lows.min() < fences[0] else -math.inf
        high = min(fences[1], highs[lows < fences[1]].max()) if highs.max() > fences[1] else math.inf
        return cls(float(low), float(median), float(high))

    def __call__(self, labels: Tensor) -> Tensor:
        """The relevance of each label, in [0, 1], of the shape of the labels."""
        ways = ((labels - self.median) / (end - self.median) for end in (self.low, self.high))
        below, above = (u.clamp(0, 1) for u in ways)
        u = torch.maximum(below, above)
        return u.square() * (3 - 2 * u)
