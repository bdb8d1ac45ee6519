"""Affinity loss: the affinity of the true class must exceed every other by a margin."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .._checks import number, require
from ._inputs import of_classes
from ._loss import Reduction, ScoreLoss, reduce

__all__ = ["AffinityLoss", "affinity_loss"]

_margin = partial(number, "margin", low=0, open_low=True)


def affinity_loss(
    affinities: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 0.75,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Max-margin loss on affinities.

    .. math:: L = \frac1N \sum_i w_i \sum_{j \ne y_i} \max(0, \lambda + d_{ij} - d_{i y_i})

    For the paper's diversity term add ``head.diversity()`` of an ``AffinityHead``.

    Args:
        margin: :math:`\lambda`, > 0, in units of the affinities, which the Gaussian similarity keeps in (0, 1].
    Shape:
        affinities: (N, C), C >= 2. target: (N,) class indices. weight: (N,). Returns (), or (N,) for
        ``reduction="none"``.
    Units:
        those of the affinities.
    Source:
        Hayat et al. 2019, the max-margin term (arXiv:1901.07711).

    >>> import torch
    >>> affinity_loss(torch.tensor([[0.75, 0.5, 0.125]]), torch.tensor([0]), margin=0.5).item()  # 0.5 + 0.5 - 0.75
    0.25
    """
    affinities = of_classes(affinities, target, weight, reduction, name="affinities")
    rule = "affinities must be (N, C) with C >= 2, else there is no other class"
    require(affinities.shape[1] >= 2, rule, got=affinities.shape)
    own = target[:, None]
    lead = affinities - affinities.gather(1, own)  # (N, C), zero for the true class
    values = (_margin(margin) + lead).relu().scatter(1, own, 0.0).sum(1)
    return reduce(values, weight, reduction)


class AffinityLoss(ScoreLoss):
    """:func:`affinity_loss` as a module, with its options."""

    def __init__(self, *, margin: float = 0.75) -> None:
        super().__init__(affinity_loss, margin=_margin(margin))
