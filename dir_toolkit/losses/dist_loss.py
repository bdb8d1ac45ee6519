"""Dist loss: predictions of a batch drawn to where labels of their ranks lie in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import instance, labels_array, number, shaped
from .._numerics import default_dtype
from ..labels.bins import Bins, Missing, continuous
from ..labels.decoding import quantiles_of
from ._inputs import absent, checked_prior, finite_target, kinds, one_per_sample, pairs, present
from ._loss import PointLoss, Reduction, drops_missing, reduce

__all__ = ["DistLoss", "dist_loss"]


@drops_missing("number")
def dist_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins,
    prior: Any,
    coefficient: float = 1.0,
    squared: bool = False,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The error of each prediction, plus its distance from the label that training has at its rank in the batch.

    .. math:: L = \frac1N \sum_i w_i \left[\rho(\hat y_i - y_i) + \beta \rho(\hat y_i - q_{r_i})\right], \qquad
              q_r = F^{-1}\Big(\frac{r - 1/2}{N}\Big)

    with :math:`\rho` the absolute or the squared value, :math:`r_i` the rank of the i-th prediction, from 1 for the
    least, and F the cumulative distribution of the training labels. So the predictions of a batch are drawn to be
    distributed as labels are, and not to shrink to the common ones. Batches are to be drawn as the prior says: neither
    from a balanced sampler nor from few labels. Each rank of a distributed run has its own batch.

    Weights scale the terms and change no rank, but samples of weight 0 have none. The paper sorts with a relaxed sort;
    this is its limit, an exact one. Its labels of the ranks repeat each label as often as a batch is expected to hold
    it; here they lie evenly within their bin.

    Args:
        bins: the label axis, which must not be classes.
        prior: (B,), the share of the training labels in each bin, such as ``density.smooth(gaussian(5, 2)).prior()``;
            the paper smooths it, too.
        coefficient: :math:`\beta`, >= 0.
        squared: whether errors are squared.
    Shape:
        pred, target, weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        those of the label, squared if errors are.
    Source:
        Nie, Tang and Hong 2025 (arXiv:2411.15216).

    >>> bins = Bins.uniform(0, 2, width=1)
    >>> pred, labels = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.5])  # of which 0.5 and 1.5 are the quartiles
    >>> dist_loss(pred, labels, bins=bins, prior=[0.5, 0.5]).item()
    1.0
    """
    prior, coefficient = _checked(bins, prior, coefficient, squared)
    kinds(reduction, weight, pred=pred, target=target)
    pred, target = pairs(pred, target, None, reduction)
    shaped(("N",), pred=pred)
    one_per_sample(len(pred), weight=weight)
    gone = absent(weight)
    finite_target(target, gone)
    pred, target = present(pred, gone), present(target, gone)
    there = torch.ones_like(pred, dtype=torch.bool) if gone is None else ~gone
    order = pred.detach().masked_fill(~there, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    wide = bins.wide_dtype(pred)
    levels = ((rank.to(wide) + 0.5) / there.sum().clamp_min(1)).clamp_max(1.0)
    drawn_to = quantiles_of(prior.to(levels), bins, levels, "closed").to(pred.dtype)

    def size(error: Tensor) -> Tensor:
        return error.square() if squared else error.abs()

    return reduce(present(size(pred - target) + coefficient * size(pred - drawn_to), gone), weight, reduction)


class DistLoss(PointLoss):
    """:func:`dist_loss` as a module, which holds the prior as a buffer."""

    def __init__(
        self, bins: Bins, prior: Any, *, coefficient: float = 1.0, squared: bool = False, missing: Missing = "raise"
    ) -> None:
        shares, coefficient = _checked(bins, prior, coefficient, squared)
        shares = shares if isinstance(prior, Tensor) else shares.to(default_dtype())
        options = {"coefficient": coefficient, "squared": squared, "missing": missing}
        super().__init__(dist_loss, bins=bins, prior=shares, **options)


def _checked(bins: Bins, prior: Any, coefficient: float, squared: bool) -> tuple[Tensor, float]:
    """The checked shares of labels and the checked coefficient."""
    continuous(bins, "Classes have no distances.")
    if not isinstance(prior, Tensor):
        prior = torch.from_numpy(labels_array(prior, "prior").astype(np.float64))
    shares = checked_prior(prior, zeros=True)
    shaped((len(bins),), "one share of labels per bin", prior=shares)
    instance(bool, squared=squared)
    return shares, number("coefficient", coefficient, low=0, float32=True)
