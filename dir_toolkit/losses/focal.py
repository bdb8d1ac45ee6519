"""Focal loss: samples that are classified well get less weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import number
from ._inputs import of_classes, per_class
from ._loss import Reduction, ScoreLoss, reduce

__all__ = ["FocalLoss", "focal_loss"]


def focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: Any = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal loss: cross-entropy scaled by a power of one minus the probability of the true class.

    .. math:: L = \frac1N \sum_i -w_i\,\alpha_{y_i} (1 - p_i)^\gamma \log p_i, \quad
              p_i = \mathrm{softmax}(s_i)_{y_i}

    The paper defines it for sigmoids; here it is for a softmax over C classes. Shapes and units are those of
    :func:`~dir_toolkit.losses.cross_entropy.cross_entropy`.

    Args:
        gamma: the focus, >= 0; 0 gives cross-entropy.
        alpha: (C,), a factor >= 0 per true class; None means ones.
    Source:
        Lin et al. 2017, equation 5 (arXiv:1708.02002).

    >>> round(focal_loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)  # log 2 / 4
    0.1733
    """
    logits = of_classes(logits, target, weight, reduction)
    gamma = number("gamma", gamma, low=0)
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    # For gamma < 1 the slope of the power at zero is infinite, and infinity times a loss of zero is NaN.
    miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    values = -miss.pow(gamma) * log_p
    if alpha is not None:
        values = values * per_class("alpha", alpha, logits).to(values.dtype).index_select(0, target)
    return reduce(values, weight, reduction)


class FocalLoss(ScoreLoss):
    """:func:`focal_loss` as a module, which holds ``alpha`` as a buffer.

    Args:
        gamma: the focus, >= 0.
        alpha: (C,), a factor >= 0 per true class; None means ones.
    Shape:
        forward: output.scores (N, C), target (N,), weight (N,). Returns ().
    """

    def __init__(self, *, gamma: float = 2.0, alpha: Any = None) -> None:
        alpha = None if alpha is None else per_class("alpha", alpha)
        super().__init__(focal_loss, gamma=number("gamma", gamma, low=0), alpha=alpha)
