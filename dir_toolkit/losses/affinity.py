"""Affinity loss: the true class must lead every other by a margin."""

from __future__ import annotations

from torch import Tensor

from .._checks import number, problem
from ..errors import ShapeError
from ._reduce import Reduction, checked_rows, reduce

__all__ = ["affinity_loss"]


def affinity_loss(
    affinities: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 0.75,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Max-margin loss on affinities, each sample scaled by its weight.

    .. math:: L = \frac1N \sum_i w_i \sum_{j \ne y_i} \max(0, \lambda + d_{ij} - d_{i y_i})

    The paper's diversity term belongs to the prototypes: add ``head.diversity()`` of an ``AffinityHead``.

    Args:
        weight: dimensionless, >= 0, one a sample; None means ones. Divides by N, not by the sum of weights. A sample
            of weight 0 adds nothing, whatever its affinities are.
        margin: :math:`\lambda`, > 0, in units of the affinities, which Gaussian similarity keeps in (0, 1].
    Shape:
        affinities: (N, C), C >= 2. target: (N,) int64, class indices. weight: (N,). Returns (), or (N,) for
        ``reduction="none"``.
    Units:
        those of the affinities.
    Raises:
        ShapeError: shapes do not fit, or there is one class only. TypeError: target is not int64. LabelError: a class
        is not in 0..C-1. ValueError: a weight is negative or not finite, or there is no sample. An affinity that is
        NaN makes the loss so. On accelerators values are not looked at.
    Source:
        Hayat et al. 2019, the max-margin term (arXiv:1901.07711).

    >>> import torch
    >>> affinity_loss(torch.tensor([[0.75, 0.5, 0.125]]), torch.tensor([0]), margin=0.5).item()  # 0.5 + 0.5 - 0.75
    0.25
    """
    affinities = checked_rows("affinities", affinities, target, weight, reduction)
    if affinities.shape[1] < 2:
        rule = "affinities must be (N, C) with C >= 2, else there is no other class"
        raise problem(rule, got=f"shape {tuple(affinities.shape)}", error=ShapeError)
    margin = number("margin", margin, low=0, open_low=True)
    own = target[:, None]
    lead = affinities - affinities.gather(1, own)  # (N, C), zero at the true class
    values = (margin + lead).relu().scatter(1, own, 0.0).sum(1)
    return reduce(values, weight, reduction)
