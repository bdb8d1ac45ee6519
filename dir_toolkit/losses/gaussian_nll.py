"""Gaussian likelihood with a predicted variance per sample: the baseline for uncertainty in regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import floats, not_empty, number, same_shape, shaped
from .._numerics import wide_dtype
from ..labels.bins import Missing
from ._inputs import absent, finite_target, kinds, present
from ._loss import Reduction, ScoreLoss, drops_missing, reduce

_TWO_NUMBERS = "a mean and a log-variance for each label"
LEAST_VARIANCE = 1e-20

__all__ = ["GaussianNLL", "gaussian_interval", "gaussian_nll"]


@drops_missing("number")
def gaussian_nll(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 0.0,
    min_variance: float = LEAST_VARIANCE,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Negative log-likelihood of a Gaussian whose mean and variance are both predicted.

    .. math:: L = \frac1N \sum_i w_i\, \lfloor v_i^\beta \rfloor
              \left[\frac{(y_i - \mu_i)^2}{2 v_i} + \frac12 \log v_i + \frac12 \log 2\pi\right],
              \quad v_i = e^{s_i} + v_{\min}

    Here :math:`\lfloor\cdot\rfloor` stops the gradient. With :math:`\beta = 0` this is the likelihood itself, in which
    samples with a large predicted variance have small gradients. With :math:`\beta = 1` the mean has the gradient of
    half the squared error.

    Args:
        pred: the mean :math:`\mu` and the raw log-variance s, in this order in the last axis.
        beta: in [0, 1].
        min_variance: :math:`v_{\min}`, > 0, in label units squared. The default only prevents overflow in float32. A
            millionth of the labels' variance is a good choice.
    Shape:
        target, weight: any shape, equal. pred: that shape and a last axis of two. Returns (), or the target's shape for
        ``reduction="none"``.
    Units:
        nats, of a density per label unit; times the label's units to the power of two beta.
    Source:
        Nix and Weigend 1994 (doi:10.1109/ICNN.1994.374138); for beta Seitzer et al. 2022
        (arXiv:2203.09168).

    >>> round(gaussian_nll(torch.tensor([[3.0, 0.0]]), torch.tensor([3.0])).item(), 4)  # log(2 pi) / 2
    0.9189
    """
    beta, log_least = _options(beta, min_variance)
    kinds(reduction, weight, pred=pred, target=target)
    shaped((*target.shape, 2), _TWO_NUMBERS, pred=pred)
    same_shape(target=target, **({} if weight is None else {"weight": weight}))
    not_empty(target=target)
    gone = absent(weight)
    finite_target(target, gone)
    wide = wide_dtype(pred, target)
    mean, raw = pred.to(wide).unbind(-1)
    error = present(mean - target.to(wide), gone)
    log_variance = _log_variance(present(raw, gone), log_least)
    values = (error.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2
    if beta:
        values = values * (beta * log_variance.detach()).exp()
    return reduce(values, weight, reduction)


class GaussianNLL(ScoreLoss):
    """:func:`gaussian_nll` as a module. It reads ``scores``, (..., 2), from an output that is not a tensor."""

    def __init__(self, *, beta: float = 0.0, min_variance: float = LEAST_VARIANCE, missing: Missing = "raise") -> None:
        _options(beta, min_variance)
        super().__init__(gaussian_nll, beta=beta, min_variance=min_variance, missing=missing)


def gaussian_interval(
    pred: Tensor, level: float = 0.9, *, min_variance: float = LEAST_VARIANCE
) -> tuple[Tensor, Tensor]:
    r"""The central interval of a Gaussian with the probability ``level``: :math:`\mu \pm z \sqrt v`.

    Args:
        pred: the mean and the raw log-variance, as in :func:`gaussian_nll`.
        level: in (0, 1).
        min_variance: as in training.
    Shape:
        pred: (..., 2). Returns the lower and the upper end, each (...).
    Units:
        those of the label.
    Source:
        Nix and Weigend 1994 (doi:10.1109/ICNN.1994.374138).

    >>> lower, upper = gaussian_interval(torch.tensor([[30.0, 0.0]]), 0.95)
    >>> round(lower.item(), 2), round(upper.item(), 2)
    (28.04, 31.96)
    """
    level = number("level", level, low=0, high=1, open_low=True, open_high=True)
    _, log_least = _options(0.0, min_variance)
    floats(pred=pred)
    shaped((..., 2), _TWO_NUMBERS, pred=pred)
    mean, raw = pred.to(wide_dtype(pred)).unbind(-1)
    # From the lower tail, since 1 + level would round to 2 for a level close to one.
    z = -torch.special.ndtri(torch.full_like(mean, (1 - level) / 2))
    half = z * (_log_variance(raw, log_least) / 2).exp()
    return mean - half, mean + half


def _options(beta: float, min_variance: float) -> tuple[float, float]:
    """Beta and the logarithm of the minimal variance."""
    least = number("min_variance", min_variance, low=0, open_low=True, float32=True)
    return number("beta", beta, low=0, high=1), math.log(least)


def _log_variance(raw: Tensor, log_least: float) -> Tensor:
    """log(exp(raw) + the minimal variance), computed without overflow."""
    return torch.logaddexp(raw, torch.full_like(raw, log_least))
