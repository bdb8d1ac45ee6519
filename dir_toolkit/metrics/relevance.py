"""The relevance of labels for SERA: 0 at the median of the training labels, 1 for extreme labels."""

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
    r"""The relevance function of SERA: 0 at the median, 1 at or above ``high`` and at or below ``low``.

    In between it is the cubic :math:`u^2 (3 - 2u)`, where u is the distance from the median as a share of the distance
    to ``low`` or ``high``. On a side without extreme labels the limit is infinite, and the relevance is 0.

    Attributes:
        low, median, high: its control points, in label units.
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
        """The relevance from a box plot of the training labels.

        ``low`` and ``high`` are the ends of the whiskers, at most 1.5 interquartile ranges beyond the quartiles. They
        are infinite on a side without labels beyond the whisker. Labels are assumed to be spread uniformly within their
        bin; for classes the median is a class. Without labels all three are NaN.
        """
        instance(LabelDensity, density=density)
        bins, counts = density.bins, density.counts
        if not isinstance(bins, Bins):
            raise problem("density must be over one axis", got=repr(bins))
        if not counts.any():
            return cls(math.nan, math.nan, math.nan)
        knots = bins._placed_limits()
        cumulative = np.concatenate([[0.0], density.prior().cumsum()])
        # Where the cumulative distribution is flat, the smallest label is taken, as in quantiles.
        rising = np.append(True, np.diff(cumulative) > 0)
        first, median, third = np.interp([0.25, 0.5, 0.75], cumulative[rising], knots[rising])
        if bins.categorical:
            median = bins.centers[np.searchsorted(cumulative[1:], 0.5)]
        fences = first - 1.5 * (third - first), third + 1.5 * (third - first)
        lows, highs = knots[:-1][counts > 0], knots[1:][counts > 0]  # limits of the bins with labels
        low = max(fences[0], lows[highs > fences[0]].min()) if lows.min() < fences[0] else -math.inf
        high = min(fences[1], highs[lows < fences[1]].max()) if highs.max() > fences[1] else math.inf
        return cls(float(low), float(median), float(high))

    def __call__(self, labels: Tensor) -> Tensor:
        """The relevance of each label, in [0, 1], of the shape of the labels."""
        distance = labels - self.median
        ways = (distance / (end - self.median) for end in (self.low, self.high))
        below, above = (u.clamp(0, 1) for u in ways)
        u = torch.maximum(below, above)
        return u.square() * (3 - 2 * u)
