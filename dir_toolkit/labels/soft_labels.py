"""Soft labels: a label spread over the bins around it, as the target of a head that scores bins."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .._checks import instance, is_tensor, number, one_of, problem, wide_dtype
from .bins import Bins

__all__ = ["LabelKernel", "limits", "soft_labels"]

LabelKernel = Literal["gaussian", "laplace", "triangular"]

_WIDEST = 100  # axes; on one axis so wide a kernel is flat, and float32 no longer tells its tails apart


def soft_labels(labels: Tensor, bins: Bins, sigma: float | None, *, kernel: LabelKernel = "gaussian") -> Tensor:
    r"""The distribution over bins that a label spread by a kernel has.

    .. math:: t_{ib} = \frac{K((k_{b+1} - y_i)/\sigma) - K((k_b - y_i)/\sigma)}
              {K((k_B - y_i)/\sigma) - K((k_0 - y_i)/\sigma)}

    K is the kernel's cumulative distribution and :math:`k` are the :func:`limits` of the bins. The kernel stands on the
    label itself, not on its bin, and a bin gets the mass between its limits, whatever the widths; what would fall
    beyond the axis is shared out in proportion.

    Args:
        sigma: standard deviation of the kernel, of each of the three, so that they compare: a Laplace kernel falls by
            e every :math:`\sigma / \sqrt 2`, a triangle reaches zero at :math:`\sqrt 6\,\sigma`. In label units, at
            most 100 times the axis. None or 0 gives 1 in the bin that ``bins.index`` names, the only choice for
            classes.
    Shape:
        labels: any. Returns (..., B), float64 for float64 labels, else float32, each row summing to one.
    Raises:
        LabelError: a label is NaN or lies outside the axis. On accelerators labels are not looked at; the row of such a
        label is NaN there. ValueError: sigma is negative or too large, is positive where bins are classes, or the
        kernel has another name.
    Source:
        Gao et al. 2017, for the Gaussian at bin centres (arXiv:1611.01731).

    >>> soft_labels(torch.tensor([2.0]), Bins.uniform(0, 5, width=1, integer=True), 0.5).round(decimals=3)
    tensor([[0.0010, 0.1570, 0.6830, 0.1570, 0.0010]])
    """
    where = "soft_labels"
    is_tensor(where, labels=labels)
    instance(where, Bins, bins=bins)
    one_of(where, "kernel", kernel, ("gaussian", "laplace", "triangular"))
    if sigma is not None and not torch.compiler.is_compiling():
        sigma = checked_sigma(where, sigma, bins)
    if sigma and bins.categorical:
        rule = "sigma must be None or 0 where bins are classes, which have no distances"
        raise problem(where, rule, got=sigma, fix="Smooth classes by label_smoothing of cross_entropy.")
    on_host = labels.device.type == "cpu"
    index = bins._place(where, labels, "raise" if on_host else "drop")
    values = labels.to(wide_dtype(labels))
    if not sigma:
        soft = (index.unsqueeze(-1) == torch.arange(len(bins), device=labels.device)).to(values.dtype)
    else:
        soft = _masses(values, limits(bins, values), sigma, kernel)
    if on_host and not torch.compiler.is_compiling():
        return soft
    return soft.masked_fill((index < 0).unsqueeze(-1), torch.nan)


def checked_sigma(where: str, sigma: float, bins: Bins) -> float:
    """By how much labels may be spread over an axis."""
    return number(where, "sigma", sigma, low=0, high=_WIDEST * float(bins.edges[-1] - bins.edges[0]), float32=True)


def limits(bins: Bins, like: Tensor) -> Tensor:
    """Where each bin of an axis begins and ends so that its centre lies in the middle.

    They are the edges, moved by as much as the centres of the bins on either side lie off the middle, on average. With
    the whole-number centres of ``Bins.uniform(..., integer=True)`` bin [26, 27) so becomes [25.5, 26.5). Where limits
    moved like this would not rise, the edges stay.

    Args:
        like: gives device and dtype, at least float32.
    Shape:
        Returns (B + 1,).
    Units:
        those of the label.

    >>> limits(Bins.uniform(0, 30, width=10, integer=True), torch.zeros(()))
    tensor([-0.5000,  9.5000, 19.5000, 29.5000])
    """
    like = like.detach().to(wide_dtype(like))
    edges, centers = bins._tensor("edges", like), bins._tensor("centers", like)
    off = centers - (edges[:-1] + edges[1:]) / 2
    moved = edges + torch.cat([off[:1], (off[:-1] + off[1:]) / 2, off[-1:]])
    return torch.where((moved[1:] > moved[:-1]).all(), moved, edges)


def _masses(labels: Tensor, knots: Tensor, sigma: float, kernel: LabelKernel) -> Tensor:
    """(..., B): the mass of each label's kernel between neighbouring knots, scaled to sum to one."""
    # Whole-number axes end half a bin early: a label there must not leave a narrow kernel without any mass.
    labels = labels.clamp(knots[0], knots[-1])
    distance = (knots - labels.unsqueeze(-1)) / sigma  # (..., B + 1)
    tail = _tail(distance.abs(), kernel)
    # Tails are subtracted on the side where they are small, so that both sides are equally exact.
    above = distance >= 0
    cumulative = torch.where(above, -tail, tail)
    holds_label = above[..., 1:] & ~above[..., :-1]
    mass = (cumulative.diff(dim=-1) + holds_label).clamp_min(0)
    return mass / mass.sum(-1, keepdim=True)


def _tail(distance: Tensor, kernel: LabelKernel) -> Tensor:
    """The mass of a kernel of standard deviation one beyond a distance >= 0 on one side."""
    if kernel == "gaussian":
        return torch.erfc(distance * math.sqrt(0.5)) / 2
    if kernel == "laplace":
        return torch.exp(distance * -math.sqrt(2)) / 2
    return (1 - distance / math.sqrt(6)).clamp_min(0).square() / 2
