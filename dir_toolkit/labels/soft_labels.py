"""Soft labels: distributions over the bins around a label, as training targets."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import instance, is_tensor, number, one_of, require
from .._numerics import readable, wide_dtype
from .bins import Bins, Missing, Outside, lookup
from .kernels import KernelUnit

__all__ = ["Ends", "KernelUnit", "LabelKernel", "limits", "soft_labels"]

Ends = Literal["closed", "open"]
LabelKernel = Literal["gaussian", "laplace", "triangular"]
ENDS, _UNITS, _KERNELS = map(get_args, (Ends, KernelUnit, LabelKernel))  # torch 2.4 cannot compile get_args

_REACH = {"gaussian": 9.0, "laplace": 28.0, "triangular": 2.5}  # in sigmas; less than 1e-17 of a kernel lies beyond
_ROWS, _CELLS = 64, 2**20  # of a piece of the matrix in spread_counts
_WIDEST = 100  # lengths of the axis; a wider kernel is flat within float32 precision


def soft_labels(
    labels: Tensor,
    bins: Bins,
    sigma: float | None,
    *,
    kernel: LabelKernel = "gaussian",
    unit: KernelUnit = "label",
    outside: Outside = "raise",
    missing: Missing = "raise",
    ends: Ends = "closed",
) -> Tensor:
    r"""Soft labels: the distribution over bins of a kernel centred on each label.

    .. math:: t_{ib} = \frac{K(c_i(k_{b+1} - y_i)/\sigma) - K(c_i(k_b - y_i)/\sigma)}{K(d_i/\sigma) - K(-d_i/\sigma)},
              \quad c_i(x) = \min(\max(x, -d_i), d_i), \quad d_i = \min(y_i - k_0, k_B - y_i)

    K is the cumulative distribution of the kernel, and :math:`k` are the :func:`limits` of the bins. The kernel is
    centred on the label itself, not on its bin, and a bin gets the mass between its limits. The kernel is truncated on
    both sides at the distance :math:`d_i` to the nearer end of the axis, so that it stays symmetric and decodes to the
    label.

    Args:
        sigma: the standard deviation of the kernel, at most 100 times the length of the axis. The scale of a Laplace
            kernel is :math:`\sigma / \sqrt 2`, and a triangle reaches zero at :math:`\sqrt 6\,\sigma`. None or 0 gives
            one-hot labels. Classes allow only these.
        unit: the unit of sigma, ``"label"`` or ``"bin"``. Where bins differ in width, a kernel in bins widens with
            them. The median then still decodes a row to its label, while the expectation is biased towards wider bins.
        outside: ``"raise"``; ``"clip"``, which moves the label to the end of the axis; or ``"drop"``, which gives a row
            of zeros, whose cross entropy is 0 for every prediction.
        missing: ``"raise"``; or ``"drop"``, which gives a row of zeros for NaN.
        ends: ``"closed"`` ends the first and the last bin at the ends of the axis. A label within half a bin of an end
            then decodes to the middle of the end bin. With ``"open"`` both bins reach one width beyond the axis, so
            that the median decodes labels at the ends and at every edge exactly. Decode with the same ``ends``.
    Shape:
        labels: any. Returns (..., B), float64 for float64 labels, else float32. Each row sums to one.
    Raises:
        LabelError: a label is NaN, or lies outside the axis under ``"raise"``. On accelerators the row of such a label
            is NaN. ValueError: sigma is negative or too large, or is positive where bins are classes, or the kernel or
            unit is unknown.
    Source:
        Gao et al. 2017, for the Gaussian at bin centres (arXiv:1611.01731).

    >>> soft_labels(torch.tensor([2.0]), Bins.uniform(0, 5, width=1, integer=True), 0.5).round(decimals=3)
    tensor([[0.0010, 0.1570, 0.6830, 0.1570, 0.0010]])
    """
    is_tensor(labels=labels)
    instance(Bins, bins=bins)
    one_of("kernel", kernel, _KERNELS)
    one_of("unit", unit, _UNITS)
    one_of("ends", ends, ENDS)
    if sigma is not None and not torch.compiler.is_compiling():
        sigma = checked_sigma(sigma, bins, unit)
    spreads = sigma and not bins.categorical
    fix = "For classes use label_smoothing of cross_entropy."
    require(spreads or not sigma, "sigma must be None or 0 where bins are classes", got=sigma, fix=fix)
    looked_at = readable(labels)
    index = bins.place(labels, outside, missing)
    if not sigma:
        soft = (index.unsqueeze(-1) == torch.arange(len(bins), device=labels.device)).to(wide_dtype(labels))
    else:
        soft = spread(labels, bins, sigma, kernel, unit, ends)
    if "drop" in (outside, missing):
        soft = soft.masked_fill((index == -1).unsqueeze(-1), 0)
    return soft if looked_at else soft.masked_fill((index == -2).unsqueeze(-1), torch.nan)


def spread(labels: Tensor, bins: Bins, sigma: float, kernel: LabelKernel, unit: KernelUnit, ends: Ends) -> Tensor:
    """:func:`soft_labels` without checks, (..., B), for labels on the axis and a positive sigma."""
    values, knots, sigma = _measured(labels.to(bins.wide_dtype(labels)), bins, sigma, unit, ends)
    return _masses(values, knots, sigma, kernel).to(wide_dtype(labels))


def spread_counts(
    counts: np.ndarray, bins: Bins, sigma: float, *, kernel: LabelKernel, unit: KernelUnit, ends: Ends
) -> np.ndarray:
    """The sum of the soft labels of ``counts`` labels at the centres of the bins.

    Shape:
        counts: (..., B). Returns the same, float64.
    """
    centers = torch.from_numpy(bins.centers.astype(np.float64))
    values, knots, sigma = _measured(centers, bins, sigma, unit, ends)
    reach, middles, places = _REACH[kernel] * sigma, values.numpy(), knots.numpy()
    first = np.maximum(np.searchsorted(places, middles - reach) - 2, 0)
    last = np.minimum(np.searchsorted(places, middles + reach) + 2, len(bins))
    spread = np.zeros(counts.shape)
    start = 0
    while start < len(bins):  # in pieces, since the whole matrix would be (B, B)
        stop = min(len(bins), start + max(1, min(_ROWS, _CELLS // int(last[start] - first[start]))))
        if (piece := counts[..., start:stop]).any():
            near = slice(int(first[start]), int(last[stop - 1]))
            masses = _masses(values[start:stop], knots, sigma, kernel, slice(near.start, near.stop + 1))
            spread[..., near] += piece @ masses.numpy()
        start = stop
    return spread


def checked_sigma(sigma: float, bins: Bins, unit: KernelUnit = "label") -> float:
    """Sigma, checked for an axis."""
    axis = len(bins) if unit == "bin" else float(bins.edges[-1] - bins.edges[0])
    return number("sigma", sigma, low=0, high=_WIDEST * axis, float32=True)


def limits(bins: Bins, like: Tensor, *, ends: Ends = "closed") -> Tensor:
    """Bin edges moved so that each bin's centre lies in its middle.

    With the whole-number centres of ``Bins.uniform(..., integer=True)`` bin [26, 27) becomes [25.5, 26.5). In general
    an edge moves by the mean distance between the centres and the middles of the bins on its two sides. If the moved
    edges would not rise, the edges themselves are returned.

    Args:
        like: a tensor with the device and the dtype of the result. The dtype is raised to float32, and to float64 where
            float32 does not resolve the bins.
        ends: ``"open"`` moves the first and the last limit outwards by the width of their bin.
    Shape:
        Returns (B + 1,).
    Units:
        those of the label.

    >>> limits(Bins.uniform(0, 30, width=10, integer=True), torch.zeros(()))
    tensor([-0.5000,  9.5000, 19.5000, 29.5000])
    """
    instance(Bins, bins=bins)
    is_tensor(like=like)
    one_of("ends", ends, ENDS)
    return knots_of(bins, like, ends).clone()  # the axis keeps its own


def knots_of(bins: Bins, like: Tensor, ends: Ends) -> Tensor:
    """:func:`limits` without checks."""
    knots = bins.tensor("limits", like.detach().to(bins.wide_dtype(like)))
    return _opened(knots) if ends == "open" else knots


def _measured(labels: Tensor, bins: Bins, sigma: float, unit: KernelUnit, ends: Ends) -> tuple[Tensor, Tensor, float]:
    """Labels, limits and sigma in one unit."""
    knots = knots_of(bins, labels, "closed")
    if unit == "bin" and bins._even:
        sigma = sigma * bins._width
    elif unit == "bin":
        labels, knots = _in_bins(labels, knots)
    return labels, _opened(knots) if ends == "open" else knots, sigma


def _opened(knots: Tensor) -> Tensor:
    """The knots, with the first and the last moved outwards by the width of their bin."""
    return torch.cat([2 * knots[:1] - knots[1:2], knots[1:-1], 2 * knots[-1:] - knots[-2:-1]])


def _in_bins(labels: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and knots measured along the axis in bins."""
    labels = labels.clamp(knots[0], knots[-1])
    index = torch.searchsorted(knots[1:-1].contiguous(), labels.detach().contiguous(), right=True)
    along = index + (labels - lookup(knots, index)) / lookup(knots.diff(), index)
    return along, torch.arange(len(knots), dtype=knots.dtype, device=knots.device)


def _masses(labels: Tensor, knots: Tensor, sigma: float, kernel: LabelKernel, part: slice = slice(None)) -> Tensor:
    """(..., B): the mass of each label's kernel between adjacent knots, scaled to sum to one.

    Args:
        part: the knots that enclose all of the mass.
    """
    # Beyond the middle of an end bin the truncated kernel lies within this bin.
    labels = labels.clamp((knots[0] + knots[1]) / 2, (knots[-2] + knots[-1]) / 2).unsqueeze(-1)
    reach = torch.minimum(labels - knots[0], knots[-1] - labels) / sigma
    distance = ((knots[part] - labels) / sigma).clamp(-reach, reach)  # (..., B + 1)
    tail = _tail(distance.abs(), kernel)
    # Tails are subtracted on the side where they are small, for equal precision on both sides.
    above = distance >= 0
    cumulative = torch.where(above, -tail, tail)
    holds_label = (above[..., 1:] & ~above[..., :-1]).to(tail.dtype)
    # Rounding errors of a wide kernel go to the bin of the label.
    mass = torch.maximum(cumulative.diff(dim=-1) + holds_label, holds_label * torch.finfo(tail.dtype).tiny)
    return mass / mass.sum(-1, keepdim=True)


def _tail(distance: Tensor, kernel: LabelKernel) -> Tensor:
    """The mass of a kernel with standard deviation one that lies beyond a distance >= 0 on one side."""
    if kernel == "gaussian":
        return torch.erfc(distance * math.sqrt(0.5)) / 2
    if kernel == "laplace":
        return torch.exp(distance * -math.sqrt(2)) / 2
    return (1 - distance / math.sqrt(6)).clamp_min(0).square() / 2
