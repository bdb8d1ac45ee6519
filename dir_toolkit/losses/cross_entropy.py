r"""Cross-entropy and its long-tailed family: logit-adjusted, pairwise margins, and the members that have a name.

Class weights come from the label axis, here by the effective number of samples (Cui et al. 2019, arXiv:1901.05555):

>>> import dir_toolkit as dt
>>> labels = torch.tensor([0, 0, 0, 0, 1])
>>> weights = dt.LDS(dt.Bins.classes(2), kernel=None, scheme="effective_number", beta=0.9).fit(labels)
>>> loss = cross_entropy(torch.zeros(5, 2), labels, weights(labels))
>>> round(loss.item(), 4)  # log 2, since the weights average one over the labels
0.6931
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import checked_tau, instance, is_tensor, number, problem, real, same_device
from .._numerics import readable
from ..errors import ShapeError
from ._reduce import Reduction, checked_prior, checked_rows, per_class, reduce

__all__ = [
    "balanced_cross_entropy",
    "cross_entropy",
    "equalization_loss",
    "ldam_loss",
    "logit_adjusted_cross_entropy",
    "pairwise_cross_entropy",
]

_SLACK = 1e-3  # what rounding may add to a cosine


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of the softmax, each sample scaled by its weight.

    .. math:: L = \frac1N \sum_i w_i \left[-(1 - \varepsilon) \log p_{i,y_i}
              - \frac{\varepsilon}{C} \sum_j \log p_{ij}\right], \quad p_i = \mathrm{softmax}(s_i)

    Args:
        weight: dimensionless, >= 0, one a sample; None means ones. Divides by N, not by the sum of weights, unlike
            ``torch.nn.functional.cross_entropy``, whose weights are one a class. A sample of weight 0 adds nothing,
            and has the gradient 0, whatever its logits are.
        label_smoothing: :math:`\varepsilon`, in [0, 1]: how much of each target is spread over all classes alike.
    Shape:
        logits: (N, C). target: (N,) int64, class indices. weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        nats.
    Raises:
        ShapeError: shapes do not fit. TypeError: target is not int64. LabelError: a class is not in 0..C-1.
        ValueError: a weight is negative or not finite, or there is no sample. A logit that is NaN or ``inf`` makes
        the loss NaN; training loops stop there. One that is ``-inf`` makes its class impossible: the loss is infinite
        if that is the true class, or if labels are smoothed. On accelerators values are not looked at.
    Source:
        Szegedy et al. 2016, section 7, for the smoothing (arXiv:1512.00567).

    >>> round(cross_entropy(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([0, 1])).item(), 4)  # log 2
    0.6931
    """
    logits = checked_rows("logits", logits, target, weight, reduction)
    return reduce(of_classes(logits, target, _smoothing(label_smoothing)), weight, reduction)


def logit_adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    prior: Any,
    tau: float = 1.0,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of logits to which the log-prior is added in training, so that plain logits predict balanced.

    .. math:: L = -\log \mathrm{softmax}(s + \tau \log \pi)_y
              = \log\Big(1 + \sum_{y' \ne y} (\pi_{y'} / \pi_y)^\tau e^{s_{y'} - s_y}\Big)

    Predict with ``logits.argmax(1)``, the logits as they are. Other arguments, shapes, units and errors are those of
    :func:`cross_entropy`.

    Args:
        prior: (C,), the share of training labels in each class: positive, summing to one. A tensor on the logits'
            device; outside compiled graphs any array.
        tau: strength, >= 0; 1 aims at the balanced error, 0 gives plain cross-entropy.
    Raises:
        ValueError: besides, the prior is not positive or does not sum to one within 1e-4.
    Source:
        Menon et al. 2021, equation 10 (arXiv:2007.07314).

    >>> logits, prior = torch.zeros(1, 2), torch.tensor([0.75, 0.25])
    >>> round(logit_adjusted_cross_entropy(logits, torch.tensor([1]), prior).item(), 4)  # log 4
    1.3863
    """
    logits = checked_rows("logits", logits, target, weight, reduction)
    prior = checked_prior(prior, logits)
    tau = checked_tau(tau)
    smoothing = _smoothing(label_smoothing)
    adjusted = logits + (tau * prior.log()).to(logits.dtype)
    return reduce(of_classes(adjusted, target, smoothing), weight, reduction)


def pairwise_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margins: Tensor,
    alpha: Any = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The family that the losses of this file belong to: a margin for every pair of classes.

    .. math:: L = \alpha_y \log\Big(1 + \sum_{y' \ne y} e^{\Delta_{yy'}} e^{s_{y'} - s_y}\Big)

    Other arguments, shapes, units and errors are those of :func:`cross_entropy`.

    Args:
        margins: (C, C), :math:`\Delta`: row the true class, column the other. The diagonal is not used; ``-inf`` leaves
            a pair out.
        alpha: (C,), a factor >= 0 for each true class; None means ones.
    Raises:
        ValueError: besides, a margin is NaN or ``inf``, or an alpha is negative or not finite.
    Source:
        Menon et al. 2021, equation 11 (arXiv:2007.07314).

    >>> logits, target = torch.zeros(1, 3), torch.tensor([2])
    >>> margins = torch.full((3, 3), -torch.inf)
    >>> margins[2, 0] = 0.0  # classes 2 and 0 alone compete: log 2
    >>> round(pairwise_cross_entropy(logits, target, margins=margins).item(), 4)
    0.6931
    """
    logits = checked_rows("logits", logits, target, weight, reduction)
    margins = _checked_margins(margins, logits)
    own = target[:, None]
    rows = margins.to(logits.dtype).index_select(0, target).scatter(1, own, 0.0)
    values = of_classes(logits + rows, target)
    if alpha is not None:
        alpha = per_class("alpha", alpha, logits)
        values = values * alpha.to(values.dtype).index_select(0, target)
    return reduce(values, weight, reduction)


def balanced_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, prior: Any, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy with every class weighing alike: :math:`L = -\frac{1}{C \pi_y} \log \mathrm{softmax}(s)_y`.

    Weighting by :math:`1 / \pi_y` is divided by the number of classes, so that a uniform prior gives
    :func:`cross_entropy`, whose other arguments, shapes, units and errors apply; ``prior`` is as in
    :func:`logit_adjusted_cross_entropy`.

    Source:
        Menon et al. 2021, equation 11 with no margins (arXiv:2007.07314), up to the factor 1/C.

    >>> loss = balanced_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), prior=[0.75, 0.25])
    >>> round(loss.item(), 4)  # log 2 / (2 * 0.25)
    1.3863
    """
    logits = checked_rows("logits", logits, target, weight, reduction)
    prior = checked_prior(prior, logits)
    alpha = (1 / (logits.shape[1] * prior)).to(logits.dtype)
    return reduce(of_classes(logits, target) * alpha.index_select(0, target), weight, reduction)


def ldam_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    counts: Any,
    max_margin: float = 0.5,
    scale: float = 30.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Label-distribution-aware margin: the rarer the true class, the farther its cosine must lead.

    .. math:: L = -\log \mathrm{softmax}\big(a\,(s - m_y\,\mathbf 1_y)\big)_y, \quad
              m_y = m_{\max}\, \frac{n_y^{-1/4}}{\max_j n_j^{-1/4}}

    The logits are cosines in [-1, 1], as ``CosineHead(scale=1)`` gives them; this loss scales them. Deferred
    reweighting is a ``weight`` handed over from a late epoch on: that of ``LDS(bins, kernel=None,
    scheme="effective_number", beta=0.9999)``, by ``fit(..., weights_from=...)`` of
    :mod:`dir_toolkit.experiment.training.loop`.
    Other arguments, shapes, units and errors are those of :func:`cross_entropy`.

    Args:
        counts: (C,), training labels in each class, > 0; only their ratios matter, so a prior serves as well.
        max_margin: :math:`m_{\max}`, the margin of the rarest class, in units of the cosine, >= 0.
        scale: :math:`a`, > 0, the inverse temperature of the softmax.
    Raises:
        ValueError: besides, a count is not positive, or a logit is no cosine: above 1.001 in size.
    Source:
        Cao et al. 2019, sections 3.2 and 3.3 (arXiv:1906.07413).

    >>> loss = ldam_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([0]), counts=[1, 16])
    >>> round(loss.item(), 4)  # the margin of 0.5 takes the lead away: log 2
    0.6931
    """
    logits = checked_rows("logits", logits, target, weight, reduction)
    counts = per_class("counts", counts, logits, positive="Raise the counts of unseen classes to one.")
    max_margin = number("max_margin", max_margin, low=0)
    scale = number("scale", scale, low=0, open_low=True, float32=True)
    if readable(logits) and (largest := logits.detach().abs().amax().item()) > 1 + _SLACK:
        fix = "Use CosineHead(num_features, num_classes, scale=1)."
        raise problem("logits must be cosines, in [-1, 1]", got=f"one of size {largest:g}", fix=fix)
    margin = (max_margin * (counts.min() / counts).pow(0.25)).to(logits.dtype)
    own = target[:, None]
    led = logits.scatter_add(1, own, -margin.index_select(0, target)[:, None])
    return reduce(of_classes(scale * led, target), weight, reduction)


def equalization_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    prior: Any,
    threshold: float,
    drop: float = 1.0,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax equalization: rare classes are spared the pressure of samples of other classes.

    .. math:: L = -\log \frac{e^{s_y}}{\sum_j \tilde w_j e^{s_j}}, \quad
              \tilde w_j = 1 - \beta_j\, [\pi_j < \lambda]\, [j \ne y]

    Each :math:`\beta_j` is one with probability ``drop``, else zero, and drawn anew for every sample and class. Other
    arguments, shapes, units and errors are those of :func:`logit_adjusted_cross_entropy`.

    Args:
        threshold: :math:`\lambda`, in [0, 1]; a class with a smaller prior counts as rare.
        drop: the probability of :math:`\beta = 1`, in [0, 1]; at 0 and at 1 nothing is drawn.
        generator: what :math:`\beta` is drawn from, on the logits' device; needed where ``drop`` lies between 0 and 1.
    Raises:
        ValueError: besides, the generator is missing or on another kind of device.
    Source:
        Tan et al. 2020, the softmax form (arXiv:2003.05176).

    >>> loss = equalization_loss(torch.zeros(1, 3), torch.tensor([0]), prior=[0.6, 0.3, 0.1], threshold=0.2)
    >>> round(loss.item(), 4)  # the third class is left out: log 2
    0.6931
    """
    logits = checked_rows("logits", logits, target, weight, reduction)
    prior = checked_prior(prior, logits)
    threshold = number("threshold", threshold, low=0, high=1)
    drop = number("drop", drop, low=0, high=1)
    dropped = (prior < threshold).expand_as(logits)
    if 0 < drop < 1:
        dropped = dropped & (_uniform(logits, generator) < drop)
    elif drop == 0:
        dropped = torch.zeros_like(dropped)
    dropped = dropped.scatter(1, target[:, None], False)
    # Added, not filled in, so that a logit that is not finite shows.
    offset = torch.zeros_like(logits).masked_fill(dropped, -torch.inf)
    return reduce(of_classes(logits + offset, target), weight, reduction)


def of_classes(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each sample, (N,), of what has been checked."""
    log_p = logits.log_softmax(1)
    values = -log_p.gather(1, target[:, None]).squeeze(1)
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * log_p.mean(1)
    return values


def _smoothing(label_smoothing: float) -> float:
    return number("label_smoothing", label_smoothing, low=0, high=1)


def _checked_margins(margins: Tensor, logits: Tensor) -> Tensor:
    classes = logits.shape[1]
    is_tensor(margins=margins)
    real(margins=margins)
    same_device(logits=logits, margins=margins)
    if margins.shape != (classes, classes):
        rule = f"margins must be ({classes}, {classes}), true class by other class"
        raise problem(rule, got=f"shape {tuple(margins.shape)}", error=ShapeError)
    if readable(margins):
        bad = (margins.isnan() | (margins == torch.inf)).fill_diagonal_(False)
        if bool(bad.any()):
            row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), classes)
            got = f"{margins[row, column].item():g} at index [{row}, {column}] ({int(bad.sum())} such values)"
            raise problem("margins must be finite or -inf", got=got)
    return margins


def _uniform(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        raise problem(
            "generator must be given where drop lies between 0 and 1",
            got="None",
            fix="Use torch.Generator(logits.device).manual_seed(seed), one for all steps.",
        )
    instance(torch.Generator, generator=generator)
    if generator.device.type != logits.device.type:
        raise problem(
            "generator must be on the logits' kind of device",
            got=f"{generator.device.type} for {logits.device.type}",
            fix="Use torch.Generator(logits.device).",
        )
    return torch.rand(logits.shape, generator=generator, device=logits.device)
