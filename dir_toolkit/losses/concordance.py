"""One minus the concordance correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, warn
from ..errors import ShapeError
from ..labels.bins import Missing
from ._inputs import absent, finite_target, pairs, present
from ._loss import PointLoss, Reduction, drops_missing, reduce

__all__ = ["CCCLoss", "ccc_loss"]


@drops_missing("number")
def ccc_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One minus the concordance correlation coefficient of a batch.

    .. math::
        L = 1 - \frac{2\, s_{\hat y y}}{s_{\hat y}^2 + s_y^2 + (m_{\hat y} - m_y)^2}
          = \frac{\sum_i w_i (\hat y_i - y_i)^2}{\sum_i w_i \left[(\hat y_i - m_y)^2 + (y_i - m_y)^2\right]}

    with means m, variances and covariances s that divide by the number of samples, or by the sum of the weights. It is
    0 for perfect predictions, 1 for constant ones or others that vary independently of the labels, and 2 at worst. A
    constant is as bad as noise, and so shrinking towards the common labels, which pays under other losses, costs here.

    The second form gives a value per sample. Its mean is 1 - CCC, times the mean weight. Use large batches: the
    variance is estimated within the batch. One label alone, or one left by ``missing`` or by weights of zero, has the
    loss 1, or 0 if it is predicted exactly, and no gradient. A warning says so for a batch of one sample, but not for a
    longer batch with one label left, since that would read the labels in each step. Each rank of a distributed run has
    its own batch. Predictions that all equal their labels have the loss 0, even if those are all the same.

    Shape:
        pred, target, weight: (N,) or (N, K), all equal. Each column is judged by itself. Returns (), or the input's
        shape for ``reduction="none"``.
    Units:
        none.
    Source:
        Lin 1989, for the coefficient (doi:10.2307/2532051).

    >>> labels = torch.tensor([1.0, 2.0, 3.0])
    >>> ccc_loss(labels, labels).item(), ccc_loss(torch.full((3,), 2.0), labels).item()
    (0.0, 1.0)
    >>> round(ccc_loss(labels + 1, labels).item(), 4)  # 1 - 2 (2/3) / (2/3 + 2/3 + 1)
    0.4286
    """
    pred, target = pairs(pred, target, weight, reduction)
    require(pred.ndim >= 1, "pred must be (N,) or (N, K)", got=pred.shape, error=ShapeError)
    if len(pred) == 1:
        warn("a batch of one sample has no spread, and nothing is learnt from it. Drop a last batch of one.")
    gone = absent(weight)
    finite_target(target, gone)
    if gone is not None:  # here the samples that are gone agree with their labels
        pred, target = pred.masked_fill(gone, 0.0), target.masked_fill(gone, 0.0)
    share = torch.ones_like(target) if weight is None else weight.to(target.dtype)
    total = share.sum(0).clamp_min(torch.finfo(target.dtype).tiny)

    def mean(values: Tensor) -> Tensor:
        return (share * values).sum(0) / total

    middle = mean(target)
    parts = torch.stack([pred - middle, target - middle])
    # In units of the largest deviation, so that no square overflows or vanishes. The value does not depend on it.
    largest = torch.cat([parts.detach().abs().flatten(0, 1), torch.zeros_like(middle)[None]]).amax(0)
    tiny = torch.finfo(largest.dtype).tiny
    parts = parts / largest.clamp_min(tiny)
    scale = mean(parts.square().sum(0))
    values = ((pred - target) / largest.clamp_min(tiny)).square() / scale.clamp_min(tiny)
    return reduce(present(values, gone), weight, reduction)


class CCCLoss(PointLoss):
    """:func:`ccc_loss` as a module.

    Args:
        missing: ``"raise"``, or ``"drop"``, which leaves out labels that are NaN.
    Shape:
        forward: output.prediction, target, weight: (N,) or (N, K). Returns ().
    """

    def __init__(self, *, missing: Missing = "raise") -> None:
        super().__init__(ccc_loss, missing=missing)
