"""Losses of a distribution over bins: against a soft label, or against the label itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    checked_tau,
    distributions,
    finite,
    floats,
    instance,
    is_tensor,
    not_empty,
    not_negative,
    one_of,
    problem,
    real,
    same_device,
)
from .._numerics import wide_dtype
from ..errors import ShapeError
from ..labels.bins import Bins, Outside
from ..labels.soft_labels import limits
from ._reduce import Reduction, checked_prior, checked_rows, present, reduce, weight_on_axis
from .cross_entropy import of_classes

__all__ = ["crps", "soft_cross_entropy", "squared_emd"]


def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    prior: Any = None,
    tau: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of the softmax against a distribution over bins, each sample scaled by its weight.

    .. math:: L = -\frac1N \sum_i w_i \sum_b t_{ib} \log \mathrm{softmax}(s_i + \tau \log \pi)_b

    Args:
        target: a distribution over bins, such as :func:`~dir_toolkit.labels.soft_labels.soft_labels` gives, or a row of
            zeros, as it gives for a dropped label, whose loss is 0; or the numbers of classes as int64, for which this
            is ``cross_entropy`` or ``logit_adjusted_cross_entropy`` to the bit.
        weight: dimensionless, >= 0, one a label; None means ones. Divides by the number of labels, not by the sum of
            weights. A label of weight 0 adds nothing, and has the gradient 0, whatever its logits are.
        prior: the share of training labels in each bin, positive, summing to one: adjusts the logits in training, so
            that plain logits predict balanced. A tensor on the logits' device; outside compiled graphs any array. None
            adjusts nothing.
        tau: strength of the adjustment, >= 0; without a prior of no effect.
    Shape:
        logits: (..., B). target: (..., B), or (...) of classes. weight: (...). prior: (B,). Returns (), or (...) for
        ``reduction="none"``.
    Units:
        nats.
    Raises:
        ShapeError: shapes do not fit. LabelError: a class is not in 0..B-1. TypeError: logits are no floats, or classes
        not int64. ValueError: a target is negative or does not sum to one within 1e-3, a weight is negative, one of
        them is not finite, there is no label, the prior is not positive or does not sum to one within 1e-4, or tau is
        negative. A logit that is NaN or ``inf`` makes the loss NaN; one that is ``-inf`` makes it infinite where the
        target is not zero. On accelerators values are not looked at.
    Source:
        Gao et al. 2017, for soft labels (arXiv:1611.01731); Menon et al. 2021, equation 10, for the adjustment
        (arXiv:2007.07314).

    >>> loss = soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.25, 0.5, 0.25, 0.0]]))
    >>> round(loss.item(), 4)  # log 4
    1.3863
    """
    rows, target, weight = _checked(logits, target, weight, reduction)
    tau = checked_tau(tau)
    if prior is not None:
        rows = rows + (tau * checked_prior(prior, rows).log()).to(rows.dtype)
    if target.ndim == 1:
        values = of_classes(rows, target)
    else:
        # Zero times the log-probability of an impossible bin would be NaN.
        values = -(target * rows.log_softmax(1).masked_fill(target == 0, 0.0)).sum(1)
    return _reduced(values, weight, reduction, logits)


def crps(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins,
    outside: Outside = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Continuous ranked probability score of the softmax over bins, each sample scaled by its weight.

    .. math:: L = \frac1N \sum_i w_i \int \big(F_i(t) - [t \ge y_i]\big)^2 \, dt

    F is the cumulative distribution, a line in each bin: the softmax's mass of a bin is spread evenly between its
    :func:`~dir_toolkit.labels.soft_labels.limits`. The integral is exact, over the whole real line. As bins
    narrow, one that is certain scores its absolute error.

    Args:
        weight: as in :func:`soft_cross_entropy`.
        outside: what a label beyond the axis does: ``"raise"``; ``"clip"``, to count by its distance; ``"drop"``, to
            have weight 0.
    Shape:
        logits: (..., B). target, weight: (...). Returns (), or (...) for ``reduction="none"``.
    Units:
        those of the label.
    Raises:
        ShapeError: shapes do not fit. LabelError: a label of a weight above zero is NaN, or lies outside the axis under
        ``"raise"``; on accelerators, where values are not looked at, the loss is NaN then. TypeError: logits are no
        floats. ValueError: a weight is negative or not finite, there is no label, or bins are classes, which have no
        distances. A logit that is NaN or ``inf`` makes the loss NaN.
    Source:
        Gneiting and Raftery 2007, section 4.2, doi:10.1198/016214506000001437.

    >>> bins = Bins.uniform(0, 2, width=1)
    >>> round(crps(torch.zeros(1, 2), torch.tensor([1.0]), bins=bins).item(), 4)  # uniform on [0, 2]
    0.1667
    """
    _ordered(bins, "Use soft_cross_entropy.")
    one_of("outside", outside, ("raise", "clip", "drop"))
    rows, y, _ = _checked(logits, target, weight, reduction, bins, number=True)
    weight = weight_on_axis("target", target, bins, weight, outside)
    weight = None if weight is None else weight.reshape(-1)
    rows, y = present(rows, weight), present(y, weight).unsqueeze(1)  # (M, 1)
    knots = limits(bins, rows)
    widths = knots.diff()
    y, p = y.to(knots.dtype), rows.softmax(1)
    upper = p.cumsum(1)  # F at the upper limit of each bin
    lower = torch.nn.functional.pad(upper[:, :-1], (1, 0))
    before = ((y - knots[:-1]) / widths).clamp(0, 1)  # the share of each bin that lies below the label
    at = lower + before * p
    below, above = before * _mean_square(lower, at), (1 - before) * _mean_square(1 - at, 1 - upper)
    beyond = (knots[0] - y).clamp_min(0) + (y - knots[-1]).clamp_min(0)
    values = ((below + above) * widths).sum(1) + beyond.squeeze(1)
    return _reduced(values, weight, reduction, logits)


def squared_emd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of the softmax's cumulative distribution from the target's, each sample scaled by its weight.

    .. math:: L = \frac1N \sum_i w_i \sum_b h_b
              \Big(\sum_{j \le b} \mathrm{softmax}(s_i)_j - \sum_{j \le b} t_{ij}\Big)^2

    Args:
        target: a distribution over bins, or a row of zeros, as in :func:`soft_cross_entropy`.
        bins: makes :math:`h_b` the way from the middle of bin b to that of the next, which is the width of equally wide
            bins; None, which suits classes that have an order, makes it one.
        weight: as in :func:`soft_cross_entropy`.
    Shape:
        logits, target: (..., B). weight: (...). Returns (), or (...) for ``reduction="none"``.
    Units:
        those of the label; none without bins.
    Raises:
        ShapeError: shapes do not fit. TypeError: logits or targets are no floats. ValueError: a target is negative or
        does not sum to one within 1e-3, a weight is negative, one of them is not finite, there is no label, or bins
        are classes. A logit that is NaN or ``inf`` makes the loss NaN. On accelerators values are not looked at.
    Source:
        Hou et al. 2016 (arXiv:1611.05916).

    >>> target = torch.tensor([[0.0, 0.0, 1.0]])
    >>> round(squared_emd(torch.zeros(1, 3), target).item(), 4)  # (1/3)^2 + (2/3)^2
    0.5556
    """
    if bins is not None:
        _ordered(bins, "Use bins=None if the classes have an order, which then counts one for each step.")
    is_tensor(target=target)
    if not target.is_floating_point():
        fix = "Use soft_labels(labels, bins, sigma)."
        raise problem("target must be floats", got=f"dtype {target.dtype}", fix=fix, error=TypeError)
    rows, target, weight = _checked(logits, target, weight, reduction, bins)
    squares = (rows.softmax(1) - target).cumsum(1)[:, :-1].square()  # the last is zero but for rounding
    if bins is not None:
        knots = limits(bins, rows)
        squares = squares * ((knots[2:] - knots[:-2]) / 2)
    return _reduced(squares.sum(1).masked_fill(_dropped(target), 0.0), weight, reduction, logits)


def _mean_square(first: Tensor, last: Tensor) -> Tensor:
    """The mean of the square of a line from ``first`` to ``last``."""
    return (first.square() + first * last + last.square()) / 3


def _ordered(bins: Bins, fix: str) -> None:
    instance(Bins, bins=bins)
    if bins.categorical:
        rule = "bins must not be classes, which have no distances"
        raise problem(rule, got=repr(bins), fix=fix)


def _checked(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    bins: Bins | None = None,
    *,
    number: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (M, B), the target (M, B), or (M,) of labels where it is a ``number``, in at least float32.

    With them the weights (M,). What has weight zero is zero.
    """
    one_of("reduction", reduction, ("none", "mean", "sum"))
    weights = {} if weight is None else {"weight": weight}
    is_tensor(logits=logits, target=target, **weights)
    floats(logits=logits)
    if logits.ndim == 0 or (bins is not None and logits.shape[-1] != len(bins)):
        rule = f"logits must have {'one value a bin' if bins is None else f'{len(bins)} values'} in the last axis"
        raise problem(rule, got=f"shape {tuple(logits.shape)}", error=ShapeError)
    real(target=target, **weights)
    for name, value in (("target", target), *weights.items()):
        shape = logits.shape if name == "target" and not number and value.is_floating_point() else logits.shape[:-1]
        if value.shape != shape:
            rule = f"{name} must be {tuple(shape)} for logits of shape {tuple(logits.shape)}"
            fix = f"Use {name}.squeeze({len(shape)})." if value.shape == (*shape, 1) else ""
            raise problem(rule, got=f"shape {tuple(value.shape)}", fix=fix, error=ShapeError)
    same_device(logits=logits, target=target, **weights)
    not_empty(logits=logits)
    finite(**weights)
    not_negative(**weights)
    weight = None if weight is None else weight.reshape(-1)
    if not target.is_floating_point() and not number:
        rows = logits.reshape(-1, logits.shape[-1])
        return checked_rows("logits", rows, target.reshape(-1), weight, reduction), target.reshape(-1), weight
    if not number:
        distributions(zeros=True, target=target)
    dtype = wide_dtype(logits, target)
    rows = logits.to(dtype).reshape(-1, logits.shape[-1])
    target = target.to(dtype).reshape(-1, *target.shape[logits.ndim - 1 :])
    if not number:
        rows = rows.masked_fill(_dropped(target)[:, None], 0.0)
    return present(rows, weight), present(target, weight), weight


def _dropped(target: Tensor) -> Tensor:
    """Which rows of (M, B) hold nothing."""
    return (target == 0).all(1)


def _reduced(values: Tensor, weight: Tensor | None, reduction: str, logits: Tensor) -> Tensor:
    values = reduce(values, weight, reduction)
    return values.reshape(logits.shape[:-1]) if reduction == "none" else values
