"""Losses of a predicted distribution over bins, for soft labels or for the labels themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from .._checks import (
    all_distributions,
    checked_tau,
    class_indices,
    distributions,
    is_tensor,
    not_empty,
    one_of,
    require,
    shaped,
)
from .._numerics import readable, wide_dtype
from ..labels.bins import Bins, Missing, Outside, continuous
from ..labels.soft_labels import limits
from ..priors import log_prior_offset
from ._inputs import absent, are_shares, checked_prior, finite_target, kinds, on_axis, present
from ._loss import Reduction, ScoreLoss, drops_missing, reduce
from .cross_entropy import negative_log

_ONE_PER_ROW = "one value per row of logits"

__all__ = [
    "CRPS",
    "CoralLoss",
    "SoftCrossEntropy",
    "SquaredEMD",
    "coral_loss",
    "crps",
    "soft_cross_entropy",
    "squared_emd",
]


@drops_missing("shares")
def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    prior: Any = None,
    tau: float = 1.0,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of the softmax against a target distribution over bins.

    .. math:: L = -\frac1N \sum_i w_i \sum_b t_{ib} \log \mathrm{softmax}(s_i + \tau \log \pi)_b

    A logit of ``-inf`` makes the loss infinite where the target is not zero.

    Args:
        target: a distribution over bins, which sums to one within 1e-3, as from
            :func:`~dir_toolkit.labels.soft_labels.soft_labels`. A row of zeros, a dropped label, has loss 0. It may
            also be class indices as int64. The loss then equals ``cross_entropy`` or ``logit_adjusted_cross_entropy``.
        prior: (B,), the share of training labels in each bin, for logit adjustment in training. None does not adjust.
        tau: the strength of the adjustment, >= 0.
    Shape:
        logits: (..., B). target: (..., B), or (...) of classes. weight: (...). Returns (), or (...) for
        ``reduction="none"``.
    Units:
        nats.
    Source:
        Gao et al. 2017, for soft labels (arXiv:1611.01731); Menon et al. 2021, equation 10, for the adjustment
        (arXiv:2007.07314).

    >>> import torch
    >>> loss = soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.25, 0.5, 0.25, 0.0]]))
    >>> round(loss.item(), 4)  # log 4
    1.3863
    """
    rows, flat, flat_weight = _flat(logits, target, weight, reduction)
    tau = checked_tau(tau)
    if prior is not None:
        rows = rows + log_prior_offset(checked_prior(prior, rows), tau).to(rows.dtype)
    if flat_weight is None and reduction != "none" and readable(rows) and readable(flat):
        loss = functional.cross_entropy(rows, flat, reduction=reduction)
        if math.isfinite(loss.item()):
            return loss
    values = negative_log(rows, flat) if flat.ndim == 1 else _soft(rows, flat)
    return _reduced(values, flat_weight, reduction, logits)


def _soft(rows: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy (M,) of each row."""
    if readable(rows) and readable(target):
        values = functional.cross_entropy(rows, target, reduction="none")
        if math.isfinite(values.sum().item()):
            return values
    # Zero times the log-probability of an impossible bin would be NaN.
    return -(target * rows.log_softmax(1).masked_fill(target == 0, 0.0)).sum(1)


class SoftCrossEntropy(ScoreLoss):
    """:func:`soft_cross_entropy` as a module, which holds the prior as a buffer."""

    def __init__(self, *, prior: Any = None, tau: float = 1.0, missing: Missing = "raise") -> None:
        prior = None if prior is None else checked_prior(prior)
        super().__init__(soft_cross_entropy, prior=prior, tau=checked_tau(tau), missing=missing)


@drops_missing("shares")
def coral_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Binary cross-entropy at each border of two bins, of the softmax's probability to lie above it.

    .. math:: L = -\frac1N \sum_i w_i \sum_{b < B - 1} T_{ib} \log P_i(y > b) + (1 - T_{ib}) \log P_i(y \le b)

    Here :math:`T_{ib}` is the target's own probability above the border, which is zero or one for a class. It is least
    where the softmax is the target, as the cross-entropy is, and a distant bin costs more than a near one. With
    :class:`~dir_toolkit.heads.CoralHead` it is CORAL's loss with all of its borders weighted alike.

    Args:
        target: a distribution over bins, or a row of zeros, or class indices, as in :func:`soft_cross_entropy`.
    Shape:
        logits: (..., B). target: (..., B), or (...) of classes. weight: (...). Returns (), or (...) for
        ``reduction="none"``.
    Units:
        nats.
    Source:
        Cao, Mirjalili and Raschka 2020 (arXiv:1901.07884).

    >>> import torch
    >>> round(coral_loss(torch.zeros(1, 3), torch.tensor([2])).item(), 4)  # -log(2/3) - log(1/3)
    1.5041
    """
    rows, flat, flat_weight = _flat(logits, target, weight, reduction)
    # Impossible bins have no slope: minus infinity would give a gradient of NaN.
    log_shares = rows.log_softmax(1).clamp_min(torch.finfo(rows.dtype).min)
    below, above = log_shares.logcumsumexp(1)[:, :-1], log_shares.flip(1).logcumsumexp(1).flip(1)[:, 1:]
    if flat.ndim == 1:
        beyond = (flat[:, None] > torch.arange(rows.shape[1] - 1, device=flat.device)).to(rows.dtype)
        under = 1 - beyond
    else:
        beyond, under = flat.flip(1).cumsum(1).flip(1)[:, 1:], flat.cumsum(1)[:, :-1]
    values = -(beyond * above + under * below).sum(1)
    return _reduced(values, flat_weight, reduction, logits)


class CoralLoss(ScoreLoss):
    """:func:`coral_loss` as a module, with its options."""

    def __init__(self, *, missing: Missing = "raise") -> None:
        super().__init__(coral_loss, missing=missing)


@drops_missing("number")
def crps(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins,
    outside: Outside = "raise",
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Continuous ranked probability score (CRPS) of the softmax over bins.

    .. math:: L = \frac1N \sum_i w_i \int \big(F_i(t) - [t \ge y_i]\big)^2 \, dt

    F is the cumulative distribution. It is linear in each bin: the probability of a bin is spread uniformly between its
    :func:`~dir_toolkit.labels.soft_labels.limits`. The integral is exact, over the whole real line. For a distribution
    in one narrow bin the score approaches the absolute error.

    Args:
        bins: the label axis, which must not be classes, since these have no distances.
        outside: for a label beyond the axis ``"raise"`` raises an error, or on an accelerator makes the loss NaN;
            ``"clip"`` uses the label unchanged; ``"drop"`` gives it weight 0.
    Shape:
        logits: (..., B). target, weight: (...). Returns (), or (...) for ``reduction="none"``.
    Units:
        those of the label.
    Source:
        Gneiting and Raftery 2007, section 4.2, doi:10.1198/016214506000001437.

    >>> import torch
    >>> bins = Bins.uniform(0, 2, width=1)
    >>> round(crps(torch.zeros(1, 2), torch.tensor([1.0]), bins=bins).item(), 4)  # uniform on [0, 2]
    0.1667
    """
    _continuous(bins, outside)
    rows, y, _ = _flat(logits, target, weight, reduction, bins, numbers=True)
    weight = on_axis(target, bins, weight, outside)
    weight = None if weight is None else weight.reshape(-1)
    gone = None if weight is None else weight == 0
    rows, y = present(rows, gone), present(y, gone)
    finite_target(y, None)
    knots = limits(bins, rows)
    values = crps_of(rows.softmax(1), y.to(knots.dtype), knots)
    return _reduced(values, weight, reduction, logits)


def crps_of(shares: Tensor, y: Tensor, knots: Tensor) -> Tensor:
    """The CRPS (M,) of labels (M,) for probabilities (M, B) spread uniformly between knots (B + 1,)."""
    y, widths = y.unsqueeze(1), knots.diff()
    upper = shares.cumsum(1)  # F at the upper limit of each bin
    lower = pad(upper[:, :-1], (1, 0))
    before = ((y - knots[:-1]) / widths).clamp(0, 1)  # the fraction of each bin below the label
    here = lower + before * shares
    below, above = before * _mean_square(lower, here), (1 - before) * _mean_square(1 - here, 1 - upper)
    beyond = (knots[0] - y).clamp_min(0) + (y - knots[-1]).clamp_min(0)
    return ((below + above) * widths).sum(1) + beyond.squeeze(1)


class CRPS(ScoreLoss):
    """:func:`crps` as a module, with its options."""

    def __init__(self, bins: Bins, *, outside: Outside = "raise", missing: Missing = "raise") -> None:
        _continuous(bins, outside)
        super().__init__(crps, bins=bins, outside=outside, missing=missing)


@drops_missing("shares")
def squared_emd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins | None = None,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared earth mover's distance (EMD): the squared difference of the two cumulative distributions.

    .. math:: L = \frac1N \sum_i w_i \sum_b h_b
              \Big(\sum_{j \le b} \mathrm{softmax}(s_i)_j - \sum_{j \le b} t_{ij}\Big)^2

    Args:
        target: a distribution over bins, or a row of zeros, as in :func:`soft_cross_entropy`.
        bins: with bins :math:`h_b` is the distance from the middle of bin b to the middle of the next bin. None sets it
            to one, which suits ordinal classes.
    Shape:
        logits, target: (..., B). weight: (...). Returns (), or (...) for ``reduction="none"``.
    Units:
        those of the label; none without bins.
    Source:
        Hou et al. 2016 (arXiv:1611.05916).

    >>> import torch
    >>> target = torch.tensor([[0.0, 0.0, 1.0]])
    >>> round(squared_emd(torch.zeros(1, 3), target).item(), 4)  # (1/3)^2 + (2/3)^2
    0.5556
    """
    _ordered(bins)
    is_tensor(target=target)
    soft, fix = target.is_floating_point(), "Use soft_labels(labels, bins, sigma)."
    require(soft, "target must be floats", got=target.dtype, fix=fix)
    rows, flat, flat_weight = _flat(logits, target, weight, reduction, bins)
    squares = (rows.softmax(1) - flat).cumsum(1)[:, :-1].square()  # the last is zero up to rounding
    if bins is not None:
        knots = limits(bins, rows)
        squares = squares * ((knots[2:] - knots[:-2]) / 2)
    return _reduced(squares.sum(1).masked_fill(_dropped(flat), 0.0), flat_weight, reduction, logits)


class SquaredEMD(ScoreLoss):
    """:func:`squared_emd` as a module, with its options."""

    def __init__(self, bins: Bins | None = None, *, missing: Missing = "raise") -> None:
        _ordered(bins)
        super().__init__(squared_emd, bins=bins, missing=missing)


def _mean_square(first: Tensor, last: Tensor) -> Tensor:
    """The mean of the square of a line from ``first`` to ``last``."""
    return (first.square() + first * last + last.square()) / 3


def _continuous(bins: Bins, outside: str, fix: str = "Use soft_cross_entropy.") -> None:
    continuous(bins, fix)
    one_of("outside", outside, ("raise", "clip", "drop"))


def _ordered(bins: Bins | None) -> None:
    if bins is not None:
        _continuous(bins, "raise", "Use bins=None for ordinal classes, which are then one unit apart.")


def _flat(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    bins: Bins | None = None,
    *,
    numbers: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (M, B), the target (M, B), or (M,) of classes or of ``numbers``, and weights (M,).

    Logits and targets are in at least float32, and zero where the weight is.
    """
    if weight is not None or bins is not None or not are_shares(logits, target, reduction):
        kinds(reduction, weight, logits=logits, target=target)
        _check_shapes(logits, target, weight, bins, numbers)
    soft = target.is_floating_point() and not numbers
    weight = None if weight is None else weight.reshape(-1)
    gone = absent(weight)
    rows = logits.to(wide_dtype(logits, *((target,) if target.is_floating_point() else ())))
    rows = present(rows.reshape(-1, logits.shape[-1]), gone)
    target = target.reshape(-1, *target.shape[logits.ndim - 1 :])
    if not (soft or numbers):
        class_indices("target", target, rows.shape[1])
        return rows, target, weight
    sound = soft and all_distributions(there := present(target, gone))
    if soft and not sound:
        distributions(zeros=True, target=there)
    target = target.to(rows.dtype)
    if soft and not sound:
        dropped = target.sum(1) == 0 if readable(target) else _dropped(target)  # checked shares are not negative
        if not readable(dropped) or bool(dropped.any()):
            rows = rows.masked_fill(dropped[:, None], 0.0)
    return rows, present(target, gone), weight


def _check_shapes(logits: Tensor, target: Tensor, weight: Tensor | None, bins: Bins | None, numbers: bool) -> None:
    soft = target.is_floating_point() and not numbers
    shaped((..., "B" if bins is None else len(bins)), "one value per bin", logits=logits)
    shaped(logits.shape if soft else logits.shape[:-1], "as the logits are" if soft else _ONE_PER_ROW, target=target)
    if weight is not None:
        shaped(logits.shape[:-1], _ONE_PER_ROW, weight=weight)
    not_empty(logits=logits)


def _dropped(target: Tensor) -> Tensor:
    """The mask of rows of (M, B) that are all zero."""
    return (target == 0).all(1)


def _reduced(values: Tensor, weight: Tensor | None, reduction: str, logits: Tensor) -> Tensor:
    values = reduce(values, weight, reduction)
    return values.reshape(logits.shape[:-1]) if reduction == "none" else values
