"""Point predictions, quantiles and intervals from a distribution over bins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import finite, instance, labels_array, number, one_of, real, require, same_device
from .._numerics import mean_under, readable
from .bins import Bins, continuous, lookup
from .soft_labels import ENDS, Ends, knots_of

__all__ = ["Decoding", "bin_shares", "decode", "interval", "quantiles"]

Decoding = Literal["expectation", "median", "mode"]
_POINTS = get_args(Decoding)

_ROUNDING = 1e-6  # by which a cumulated share may leave [0, 1]
_LEVELS = "levels must be one number or a row of them, each in (0, 1)"


def decode(probabilities: Tensor, bins: Bins, point: Decoding = "expectation", *, ends: Ends = "closed") -> Tensor:
    """A point prediction from a distribution over bins.

    Args:
        probabilities: >= 0, summing to one. Each row is divided by its sum, which removes rounding errors.
        point: ``"expectation"``, the mean of the bin centres, minimises the squared error. ``"median"``, the quantile
            of level 0.5 (:func:`quantiles`), minimises the absolute error. ``"mode"`` is the centre of the most
            probable bin, or the most probable class. Classes allow only the mode.
        ends: use the same value as in :func:`soft_labels`. ``"closed"`` ends the first and the last bin at the ends of
            the axis. With ``"open"`` these two bins reach one width beyond the axis, and the median and the expectation
            are clipped to the axis. The mode is the same for both.
    Shape:
        probabilities: (..., B). Returns (...), at least float32; int64 where bins are classes.
    Units:
        those of the label.
    Raises:
        ShapeError, TypeError, ValueError: as :meth:`Bins.shares`. ValueError: bins are classes and the point is not the
            mode.

    >>> bins = Bins.uniform(0, 4, width=1)
    >>> probabilities = torch.tensor([0.0, 0.75, 0.0, 0.25])
    >>> [round(decode(probabilities, bins, point).item(), 3) for point in ("expectation", "median", "mode")]
    [2.0, 1.667, 1.5]
    """
    one_of("point", point, _POINTS)
    one_of("ends", ends, ENDS)
    shares = _wide_shares(probabilities, bins, order_for="" if point == "mode" else f"point={point!r}")
    return decoded(shares, bins, point, ends)


def decoded(probabilities: Tensor, bins: Bins, point: Decoding, ends: Ends) -> Tensor:
    """:func:`decode` without checks."""
    probabilities = probabilities.to(bins.wide_dtype(probabilities))
    if point == "mode":
        index = probabilities.argmax(-1)
        return index if bins.categorical else lookup(bins.tensor("centers", probabilities), index)
    if point == "median":
        return quantiles_of(probabilities, bins, probabilities.new_full((1,), 0.5), ends).squeeze(-1)
    centers = bins.tensor("centers", probabilities)
    if ends == "open":
        knots = knots_of(bins, probabilities, "closed")
        centers = torch.cat([knots[:1], centers[1:-1], knots[-1:]]) if len(bins) > 1 else centers
    mean = mean_under(probabilities, centers)
    return mean if ends == "closed" else _held(mean, bins)


def quantiles(
    probabilities: Tensor, bins: Bins, levels: float | Sequence[float] | np.ndarray | Tensor, *, ends: Ends = "closed"
) -> Tensor:
    """Quantiles of a distribution over bins.

    The mass of a bin is spread uniformly between its :func:`~dir_toolkit.labels.soft_labels.limits`, so that the
    cumulative distribution is linear within each bin. Where it is flat, since bins have no mass, the smallest label is
    returned.

    Args:
        probabilities: as in :func:`decode`.
        levels: each in (0, 1).
        ends: as in :func:`decode`.
    Shape:
        probabilities: (..., B). levels: (L,), or one number. Returns (..., L), with L = 1 for one number.
    Units:
        those of the label.
    Raises:
        as :func:`decode`. ValueError: there is no level, a level is outside (0, 1), or bins are classes, which have no
        order.

    >>> quantiles(torch.tensor([0.5, 0.25, 0.25]), Bins.uniform(0, 30, width=10), [0.25, 0.5, 0.75])
    tensor([ 5., 10., 20.])
    """
    one_of("ends", ends, ENDS)
    probabilities = _wide_shares(probabilities, bins, order_for="quantiles")
    return quantiles_of(probabilities, bins, _levels(levels, probabilities), ends)


def interval(probabilities: Tensor, bins: Bins, level: float = 0.9, *, ends: Ends = "closed") -> tuple[Tensor, Tensor]:
    """The central interval of a distribution over bins: it holds the probability ``level``, with equal tails on both
    sides.

    Args:
        probabilities: (..., B), as in :func:`quantiles`, which has the same units and errors.
        level: in (0, 1).
        ends: as in :func:`decode`.
    Returns:
        the lower and the upper end of the interval, each (...).

    >>> lower, upper = interval(torch.full((10,), 0.1), Bins.uniform(0, 100, count=10), level=0.8)
    >>> round(lower.item(), 3), round(upper.item(), 3)
    (10.0, 90.0)
    """
    level = number("level", level, low=0, high=1, open_low=True, open_high=True)
    one_of("ends", ends, ENDS)
    probabilities = _wide_shares(probabilities, bins, order_for="an interval")
    tails = torch.stack([probabilities.new_full((), (1 + side * level) / 2) for side in (-1, 1)])
    lower, upper = quantiles_of(probabilities, bins, tails, ends).unbind(-1)
    return lower, upper


def bin_shares(points: Any, cumulative: Any, bins: Bins) -> np.ndarray:
    """The shares of bins of distributions that are known by quantiles, or over an axis of their own.

    Between two points mass is spread evenly, and so is what lies beyond the outermost ones, up to the ends of the axis.
    What lies beyond the axis counts with the end bins.

    Args:
        points: labels, not falling along the last axis: the quantiles of a quantile forest, or the borders of a
            forecaster's own bins.
        cumulative: the shares that lie below the points, in [0, 1] up to rounding, not falling along the last axis: the
            levels of the quantiles, or the cumulated probabilities of the bins with a zero before them.
    Shape:
        points, cumulative: (N, K), or (K,) if they are the same for each row. Returns (N, B) float64.
    Units:
        points: those of the label.
    Raises:
        ShapeError: the shapes do not fit. ValueError: a value is not finite, falls or is no share, or bins are classes.

    >>> quartiles = [[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]
    >>> bin_shares(quartiles, [0.25, 0.5, 0.75], Bins.uniform(0, 4, width=2)).round(6).tolist()
    [[0.5, 0.5], [0.25, 0.75]]
    """
    continuous(bins, "Use the probabilities of the classes themselves.", of="shares from points")
    knots, shares = (
        np.atleast_2d(labels_array(values, name).astype(np.float64))
        for name, values in (("points", points), ("cumulative", cumulative))
    )
    finite(points=knots, cumulative=shares)
    fits = knots.ndim == shares.ndim == 2 and knots.shape[1] == shares.shape[1] > 0
    fits = fits and (len(knots) == len(shares) or 1 in (len(knots), len(shares)))
    require(fits, f"points must fit cumulative {shares.shape}", got=knots.shape)
    rising = (np.diff(knots) >= 0).all() and (np.diff(shares) >= 0).all()
    require(rising, "points and cumulative must not fall along the last axis", got="values that do")
    within = (shares >= -_ROUNDING).all() and (shares <= 1 + _ROUNDING).all()
    require(within, "cumulative must be in [0, 1]", got=lambda: f"values from {shares.min():g} to {shares.max():g}")
    shares = shares.clip(0, 1)
    rows = np.broadcast_shapes(knots.shape[:1], shares.shape[:1])[0]
    low, high = np.minimum(knots[:, :1], bins.edges[0]), np.maximum(knots[:, -1:], bins.edges[-1])
    knots = np.hstack([low, knots, high])
    shares = np.pad(shares, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
    knots, shares = (np.broadcast_to(values, (rows, values.shape[1])) for values in (knots, shares))
    inner = np.nextafter(bins.edges[1:-1], -np.inf)  # Mass on an edge lies in the bin above it.
    below = np.array([np.interp(inner, *row) for row in zip(knots, shares, strict=True)]).reshape(rows, len(inner))
    return np.diff(below, axis=1, prepend=0.0, append=1.0)


def quantiles_of(probabilities: Tensor, bins: Bins, levels: Tensor, ends: Ends) -> Tensor:
    """:func:`quantiles` without checks: of probabilities (..., B) at levels (L,)."""
    knots = knots_of(bins, probabilities, ends)
    cumulative = probabilities.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    levels = levels.expand(*probabilities.shape[:-1], len(levels)).contiguous()  # (..., L)
    # The first bin that reaches the level has mass, unless it was lost to rounding. NaN lies beyond the last bin.
    index = torch.searchsorted(cumulative.detach().contiguous(), levels).clamp_max(len(bins) - 1)
    below = torch.nn.functional.pad(cumulative[..., :-1], (1, 0)).gather(-1, index)
    mass = cumulative.gather(-1, index) - below
    share = (levels - below) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    values = knots[index] + share.clamp(0, 1) * knots.diff()[index]
    return values if ends == "closed" else _held(values, bins)


def cumulative_at(shares: Tensor, y: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cumulative probability at each label (N,), of rows (N, B) spread uniformly between knots (B + 1,). Also
    returns the probability and the width of the bin that holds the label. Labels beyond the knots belong to the nearest
    bin."""
    index = torch.searchsorted(knots[1:-1].contiguous(), y, right=True)
    share, width = shares.gather(1, index[:, None])[:, 0], lookup(knots.diff(), index)
    within = ((y - lookup(knots, index)) / width).clamp(0, 1)
    lower = torch.nn.functional.pad(shares.cumsum(1), (1, 0)).gather(1, index[:, None])[:, 0]
    return lower + within * share, share, width


def _held(values: Tensor, bins: Bins) -> Tensor:
    """The values, clipped to the axis."""
    edges = bins.tensor("edges", values)
    return values.clamp(edges[0], edges[-1])


def _wide_shares(probabilities: Tensor, bins: Bins, *, order_for: str) -> Tensor:
    """Checked probabilities in the dtype to compute in. ``order_for`` names a result that classes do not have."""
    if order_for:
        continuous(bins, 'Use decode(..., point="mode"), or Bins.uniform if classes have an order.', of=order_for)
    instance(Bins, bins=bins)
    shares = bins.shares(probabilities)
    return shares.to(bins.wide_dtype(shares))


def _levels(levels: float | Sequence[float] | np.ndarray | Tensor, like: Tensor) -> Tensor:
    """(L,), each in (0, 1), in the dtype and on the device of ``like``."""
    if isinstance(levels, Tensor):
        real(levels=levels)
        same_device(probabilities=like, levels=levels)
        require(levels.ndim <= 1 and levels.numel() > 0, _LEVELS, got=levels.shape)
        if readable(levels):
            for level in levels.flatten().tolist():
                number("levels", level, low=0, high=1, open_low=True, open_high=True)
        return levels.detach().to(like.dtype).reshape(-1)
    if isinstance(levels, np.ndarray):
        levels = levels.tolist()
    row = list(levels) if isinstance(levels, Sequence) and not isinstance(levels, str) else [levels]
    require(len(row) > 0, _LEVELS, got="none")
    checked = [number("levels", level, low=0, high=1, open_low=True, open_high=True) for level in row]
    # Filled in one by one, since copying a list to an accelerator would wait for it.
    return torch.stack([like.new_full((), level) for level in checked])
