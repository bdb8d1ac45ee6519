"""Weighted regression losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import number, one_of
from .._numerics import readable
from ..labels.bins import Missing
from ._inputs import absent, finite_target, pairs, present
from ._loss import PointLoss, Reduction, drops_missing, reduce

__all__ = [
    "WeightedFocalL1",
    "WeightedFocalMSE",
    "WeightedHuber",
    "WeightedL1",
    "WeightedMSE",
    "weighted_focal_l1",
    "weighted_focal_mse",
    "weighted_huber",
    "weighted_l1",
    "weighted_mse",
]

FocalVariant = Literal["paper", "reference"]

_positive = partial(number, low=0, open_low=True)


@drops_missing("number")
def weighted_l1(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Absolute error, each sample scaled by its weight.

    .. math:: L = \frac1N \sum_i w_i\,|\hat y_i - y_i|

    Shape:
        pred, target, weight: any shape, all equal. Returns (), or the input's shape for ``reduction="none"``.
    Units:
        those of the label.
    Source:
        Yang et al. 2021, section 4.1 (arXiv:2102.09554).

    >>> weighted_l1(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
    1.0
    """
    return _scaled(pred, target, weight, reduction, torch.abs)


class WeightedL1(PointLoss):
    """:func:`weighted_l1` as a module, with its options."""

    def __init__(self, *, missing: Missing = "raise") -> None:
        super().__init__(weighted_l1, missing=missing)


@drops_missing("number")
def weighted_mse(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared error, each sample scaled by its weight: :math:`L = \frac1N \sum_i w_i (\hat y_i - y_i)^2`.

    Shapes are those of :func:`weighted_l1`; the units are those of the label, squared.

    >>> weighted_mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
    2.0
    """
    return _scaled(pred, target, weight, reduction, torch.square)


class WeightedMSE(PointLoss):
    """:func:`weighted_mse` as a module, with its options."""

    def __init__(self, *, missing: Missing = "raise") -> None:
        super().__init__(weighted_mse, missing=missing)


@drops_missing("number")
def weighted_huber(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    delta: float = 1.0,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Huber's loss scaled to slope one: :math:`e^2 / 2\delta` where :math:`|e| < \delta`, else :math:`|e| - \delta/2`.

    The name follows the authors' DIR code. It is ``smooth_l1_loss`` of ``torch.nn.functional``; ``huber_loss`` is
    ``delta`` times this one. Shapes and units are those of :func:`weighted_l1`.

    Args:
        delta: the error at which the parabola meets the line, > 0, in label units. The default suits ages in years.
    Source:
        Huber 1964; Yang et al. 2021, appendix (arXiv:2102.09554).

    >>> weighted_huber(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none").tolist()
    [0.125, 2.5]
    """
    delta = _positive("delta", delta)

    def formula(error: Tensor) -> Tensor:
        size = error.abs()
        return torch.where(size < delta, size.square() / (2 * delta), size - delta / 2)

    return _scaled(pred, target, weight, reduction, formula)


class WeightedHuber(PointLoss):
    """:func:`weighted_huber` as a module, with its options."""

    def __init__(self, *, delta: float = 1.0, missing: Missing = "raise") -> None:
        super().__init__(weighted_huber, delta=_positive("delta", delta), missing=missing)


@drops_missing("number")
def weighted_focal_l1(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 0.2,
    gamma: float = 1.0,
    variant: FocalVariant = "paper",
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal-R loss of the absolute error: :math:`L = \frac1N \sum_i w_i\,\sigma(|\beta e_i|)^\gamma\,|e_i|`.

    Shapes and units are those of :func:`weighted_l1`.

    Args:
        beta: the scale of errors, > 0, per label unit. The paper uses 0.2 for ages.
        gamma: the exponent, >= 0; 0 gives the plain loss.
        variant: ``"paper"`` scales by the sigmoid, which is 1/2 for an error of zero. ``"reference"`` scales by ``2
            sigmoid - 1``, which is 0 there, as in the authors' code.
    Source:
        Yang et al. 2021, section 4 (arXiv:2102.09554).
    """
    settings = _focal(beta, gamma, variant)
    return _scaled(pred, target, weight, reduction, lambda error: (size := error.abs()) * _focus(size, **settings))


class WeightedFocalL1(PointLoss):
    """:func:`weighted_focal_l1` as a module, with its options."""

    def __init__(
        self, *, beta: float = 0.2, gamma: float = 1.0, variant: FocalVariant = "paper", missing: Missing = "raise"
    ) -> None:
        super().__init__(weighted_focal_l1, **_focal(beta, gamma, variant), missing=missing)


@drops_missing("number")
def weighted_focal_mse(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 0.2,
    gamma: float = 1.0,
    variant: FocalVariant = "paper",
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal-R loss of the squared error: :math:`L = \frac1N \sum_i w_i\,\sigma(|\beta e_i|)^\gamma\,e_i^2`.

    Arguments and shapes are those of :func:`weighted_focal_l1`; the units are those of the label, squared.
    """
    settings = _focal(beta, gamma, variant)
    return _scaled(pred, target, weight, reduction, lambda error: _focus(error.abs(), **settings) * error.square())


class WeightedFocalMSE(PointLoss):
    """:func:`weighted_focal_mse` as a module, with its options."""

    def __init__(
        self, *, beta: float = 0.2, gamma: float = 1.0, variant: FocalVariant = "paper", missing: Missing = "raise"
    ) -> None:
        super().__init__(weighted_focal_mse, **_focal(beta, gamma, variant), missing=missing)


def _scaled(
    pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str, formula: Callable[[Tensor], Tensor]
) -> Tensor:
    """Check the arguments, apply a formula to pred - target in at least float32, weight and reduce.

    If the loss is finite, then so are all arguments. Only otherwise, or where the loss cannot be read, they are checked
    one by one.
    """
    pred, target = pairs(pred, target, weight, reduction)
    looked_at = reduction != "none" and readable(pred)
    if looked_at and (weight is None or (weight.is_floating_point() and weight.min().item() >= 0)):
        loss = reduce(formula(pred - target), weight, reduction)
        if math.isfinite(loss.item()):
            return loss
    gone = absent(weight)
    finite_target(target, gone)
    return reduce(formula(present(pred - target, gone)), weight, reduction)


def _focal(beta: float, gamma: float, variant: str) -> dict[str, Any]:
    one_of("variant", variant, ("paper", "reference"))
    return {"beta": _positive("beta", beta), "gamma": number("gamma", gamma, low=0), "variant": variant}


def _focus(error: Tensor, beta: float, gamma: float, variant: str) -> Tensor:
    """The factor of a focal loss."""
    hardness = torch.sigmoid(beta * error)
    if variant == "reference":
        hardness = torch.tanh(beta * error / 2)  # = 2 sigmoid - 1, without the cancellation near zero
    if gamma == 1:
        return hardness
    # For gamma < 1 the slope of the power at zero is infinite, and infinity times an error of zero is NaN.
    return hardness.clamp_min(torch.finfo(hardness.dtype).tiny).pow(gamma)
