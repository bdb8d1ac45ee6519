"""Regression losses, each sample scaled by its weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._checks import floats, is_tensor, not_empty, not_negative, number, one_of, real, same_device, same_shape
from .._numerics import wide_dtype
from ._reduce import Reduction, finite_targets, present, reduce

__all__ = ["weighted_focal_l1", "weighted_focal_mse", "weighted_huber", "weighted_l1", "weighted_mse"]

FocalVariant = Literal["paper", "reference"]


def weighted_l1(pred: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: Reduction = "mean") -> Tensor:
    r"""Absolute error, each sample scaled by its weight.

    .. math:: L = \frac1N \sum_i w_i\,|\hat y_i - y_i|

    Args:
        weight: dimensionless, >= 0; None means ones. Divides by N, as the DIR paper does, not by the sum of weights.
            A sample of weight 0 adds nothing, and has the gradient 0, whatever its prediction and its target are, NaN
            too: a mask of missing labels is ``mask.float()``.
    Shape:
        pred, target, weight: any shape, all equal. Returns (), or the input's shape for ``reduction="none"``.
    Units:
        those of the label.
    Raises:
        ShapeError: shapes differ (labels are never broadcast). ValueError: a weight, or a target of a weight above
        zero, is not finite, a weight is negative, or there is no sample. A prediction that is not finite makes the loss
        so; training loops stop there. On accelerators values are not looked at.
    Source:
        Yang et al. 2021, section 4.1 (arXiv:2102.09554).

    >>> weighted_l1(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
    1.0
    """
    error = _error(pred, target, weight, reduction)
    return reduce(error.abs(), weight, reduction)


def weighted_mse(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared error, each sample scaled by its weight: :math:`L = \frac1N \sum_i w_i (\hat y_i - y_i)^2`.

    Arguments, shapes and errors are those of :func:`weighted_l1`; units are those of the label, squared.

    >>> weighted_mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
    2.0
    """
    error = _error(pred, target, weight, reduction)
    return reduce(error.square(), weight, reduction)


def weighted_huber(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, delta: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    r"""Huber's loss scaled to slope one: :math:`e^2 / 2\delta` where :math:`|e| < \delta`, else :math:`|e| - \delta/2`.

    The public DIR code calls it Huber and so do we; divide Huber's own by ``delta`` (``torch.nn.functional``:
    ``smooth_l1_loss``). Other arguments, shapes, units and errors are those of :func:`weighted_l1`.

    Args:
        delta: where the parabola meets the line, > 0, in label units: of other labels than ages another one is right.
    Source:
        Huber 1964; Yang et al. 2021, appendix (arXiv:2102.09554).

    >>> weighted_huber(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none").tolist()
    [0.125, 2.5]
    """
    error = _error(pred, target, weight, reduction).abs()
    delta = number("delta", delta, low=0, open_low=True)
    return reduce(torch.where(error < delta, error.square() / (2 * delta), error - delta / 2), weight, reduction)


def weighted_focal_l1(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 0.2,
    gamma: float = 1.0,
    variant: FocalVariant = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal-R on the absolute error: :math:`L = \frac1N \sum_i w_i\,\sigma(|\beta e_i|)^\gamma\,|e_i|`.

    Other arguments, shapes, units and errors are those of :func:`weighted_l1`.

    Args:
        beta: how fast an error counts as hard, > 0, per label unit; the paper's 0.2 is for ages.
        gamma: focus, >= 0; 0 gives the plain loss.
        variant: ``"paper"`` scales by sigmoid, from 1/2; ``"reference"`` by ``2 sigmoid - 1``, from 0, as the public
            code does.
    Source:
        Yang et al. 2021, section 4 (arXiv:2102.09554).
    """
    error = _error(pred, target, weight, reduction).abs()
    return reduce(_focus(error, beta, gamma, variant) * error, weight, reduction)


def weighted_focal_mse(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 0.2,
    gamma: float = 1.0,
    variant: FocalVariant = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal-R on the squared error: :math:`L = \frac1N \sum_i w_i\,\sigma(|\beta e_i|)^\gamma\,e_i^2`.

    Arguments, shapes and errors are those of :func:`weighted_focal_l1`; units are those of the label, squared.
    """
    error = _error(pred, target, weight, reduction).abs()
    return reduce(_focus(error, beta, gamma, variant) * error.square(), weight, reduction)


def _error(pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """pred - target in at least float32, after checking everything that can be checked without a host sync.

    Zero where the weight is.
    """
    one_of("reduction", reduction, ("none", "mean", "sum"))
    weights = {} if weight is None else {"weight": weight}
    is_tensor(pred=pred, target=target, **weights)
    floats(pred=pred)
    real(target=target, **weights)
    same_shape(pred=pred, target=target, **weights)
    same_device(pred=pred, target=target, **weights)
    not_empty(pred=pred)
    finite_targets(weight, target=target)
    not_negative(**weights)
    wide = wide_dtype(pred, target)
    return present(pred.to(wide) - target.to(wide), weight)


def _focus(error: Tensor, beta: float, gamma: float, variant: str) -> Tensor:
    beta = number("beta", beta, low=0, open_low=True)
    gamma = number("gamma", gamma, low=0)
    one_of("variant", variant, ("paper", "reference"))
    hardness = torch.sigmoid(beta * error)
    if variant == "reference":
        hardness = torch.tanh(beta * error / 2)  # = 2 sigmoid - 1, without the cancellation near zero
    if gamma == 1:
        return hardness
    # Below gamma 1 the slope of the power at zero is infinite, and infinity times an error of zero is NaN.
    return hardness.clamp_min(torch.finfo(hardness.dtype).tiny).pow(gamma)
