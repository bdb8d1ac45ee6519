r"""Cross-entropy and its variants for long-tailed classes: logit adjustment, margins, balancing, equalization.

Class weights come from :class:`~dir_toolkit.LDS`, here by the effective number of samples (Cui et al. 2019,
arXiv:1901.05555):

>>> import dir_toolkit as dt
>>> labels = torch.tensor([0, 0, 0, 0, 1])
>>> weights = dt.LDS(dt.Bins.classes(2), kernel=None, scheme="effective_number", beta=0.9).fit(labels)
>>> loss = cross_entropy(torch.zeros(5, 2), labels, weights(labels))
>>> round(loss.item(), 4)  # log 2, since the mean weight is one
0.6931
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._checks import checked_tau, instance, no_bad, number, real, require, same_device, shaped
from .._numerics import readable
from ..priors import log_prior_offset
from ._inputs import checked_prior, of_classes, per_class
from ._loss import Reduction, ScoreLoss, part_of, reduce

__all__ = [
    "BalancedCrossEntropy",
    "CrossEntropy",
    "EqualizationLoss",
    "LDAMLoss",
    "LogitAdjustedCrossEntropy",
    "PairwiseCrossEntropy",
    "balanced_cross_entropy",
    "cross_entropy",
    "equalization_loss",
    "ldam_loss",
    "logit_adjusted_cross_entropy",
    "pairwise_cross_entropy",
]

_SLACK = 1e-3  # rounding error of a cosine
_NO_CLASS = torch.iinfo(torch.int64).min  # so that no target is ignored


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax cross-entropy.

    .. math:: L = \frac1N \sum_i w_i \left[-(1 - \varepsilon) \log p_{i,y_i}
              - \frac{\varepsilon}{C} \sum_j \log p_{ij}\right], \quad p_i = \mathrm{softmax}(s_i)

    Unlike in ``torch.nn.functional.cross_entropy``, weights are one per sample and not one per class, and the mean
    divides by N and not by their sum. A logit of ``-inf`` makes its class impossible: the loss is infinite if that is
    the true class, or if labels are smoothed.

    Args:
        label_smoothing: :math:`\varepsilon`, in [0, 1]: the share of each target that is spread uniformly over all
            classes.
    Shape:
        logits: (N, C). target: (N,) class indices. weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        nats.
    Source:
        Szegedy et al. 2016, section 7, for the smoothing (arXiv:1512.00567).

    >>> round(cross_entropy(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([0, 1])).item(), 4)  # log 2
    0.6931
    """
    logits = of_classes(logits, target, weight, reduction)
    return _reduced(logits, target, weight, reduction, _smoothing(label_smoothing))


class CrossEntropy(ScoreLoss):
    """:func:`cross_entropy` as a module, with its options."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__(cross_entropy, label_smoothing=_smoothing(label_smoothing))


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
    r"""Logit-adjusted cross-entropy: the log-prior is added to the logits in training.

    .. math:: L = -\log \mathrm{softmax}(s + \tau \log \pi)_y
              = \log\Big(1 + \sum_{y' \ne y} (\pi_{y'} / \pi_y)^\tau e^{s_{y'} - s_y}\Big)

    Predict with ``logits.argmax(1)``: logits without the prior minimise the balanced error. Shapes and units are those
    of :func:`cross_entropy`.

    Args:
        prior: (C,), the share of training labels in each class.
        tau: the strength, >= 0. 1 is consistent with the balanced error, 0 is plain cross-entropy.
        label_smoothing: as in :func:`cross_entropy`.
    Source:
        Menon et al. 2021, equation 10 (arXiv:2007.07314).

    >>> logits, prior = torch.zeros(1, 2), torch.tensor([0.75, 0.25])
    >>> round(logit_adjusted_cross_entropy(logits, torch.tensor([1]), prior).item(), 4)  # log 4
    1.3863
    """
    logits = of_classes(logits, target, weight, reduction)
    adjusted = logits + log_prior_offset(checked_prior(prior, logits), checked_tau(tau)).to(logits.dtype)
    return _reduced(adjusted, target, weight, reduction, _smoothing(label_smoothing))


class LogitAdjustedCrossEntropy(ScoreLoss):
    """:func:`logit_adjusted_cross_entropy` as a module, which holds the prior as a buffer."""

    def __init__(self, prior: Any, tau: float = 1.0, *, label_smoothing: float = 0.0) -> None:
        super().__init__(
            logit_adjusted_cross_entropy,
            prior=checked_prior(prior),
            tau=checked_tau(tau),
            label_smoothing=_smoothing(label_smoothing),
        )

    def _reduced(self, output: Any, target: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
        # The function's third argument is the prior.
        scores = part_of(output, self.reads)
        return logit_adjusted_cross_entropy(scores, target, weight=weight, reduction=reduction, **self.settings)


def pairwise_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margins: Tensor,
    alpha: Any = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with a margin for every pair of classes, the general form of the losses in this file.

    .. math:: L = \alpha_y \log\Big(1 + \sum_{y' \ne y} e^{\Delta_{yy'}} e^{s_{y'} - s_y}\Big)

    Shapes and units are those of :func:`cross_entropy`.

    Args:
        margins: (C, C), :math:`\Delta`: rows are true classes, columns are other classes. The diagonal is not used;
            ``-inf`` removes a pair.
        alpha: (C,), a factor >= 0 per true class; None means ones.
    Source:
        Menon et al. 2021, equation 11 (arXiv:2007.07314).

    >>> logits, target = torch.zeros(1, 3), torch.tensor([2])
    >>> margins = torch.full((3, 3), -torch.inf)
    >>> margins[2, 0] = 0.0  # only classes 2 and 0 compete: log 2
    >>> round(pairwise_cross_entropy(logits, target, margins=margins).item(), 4)
    0.6931
    """
    logits = of_classes(logits, target, weight, reduction)
    margins = _margins(margins, logits)
    own = target[:, None]
    rows = margins.to(logits.dtype).index_select(0, target).scatter(1, own, 0.0)
    values = negative_log(logits + rows, target)
    if alpha is not None:
        values = values * per_class("alpha", alpha, logits).to(values.dtype).index_select(0, target)
    return reduce(values, weight, reduction)


class PairwiseCrossEntropy(ScoreLoss):
    """:func:`pairwise_cross_entropy` as a module, which holds the margins and ``alpha`` as buffers."""

    def __init__(self, margins: Tensor, *, alpha: Any = None) -> None:
        alpha = None if alpha is None else per_class("alpha", alpha)
        super().__init__(pairwise_cross_entropy, margins=_margins(margins), alpha=alpha)


def balanced_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, prior: Any, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy with equal total weight for each class: :math:`L = -\frac{1}{C \pi_y} \log \mathrm{softmax}(s)_y`.

    The factor :math:`1 / \pi_y` is divided by the number of classes, so that a uniform prior gives
    :func:`cross_entropy`, whose shapes and units apply.

    Args:
        prior: (C,), the share of training labels in each class.
    Source:
        Menon et al. 2021, equation 11 with no margins (arXiv:2007.07314), up to the factor 1/C.

    >>> loss = balanced_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), prior=[0.75, 0.25])
    >>> round(loss.item(), 4)  # log 2 / (2 * 0.25)
    1.3863
    """
    logits = of_classes(logits, target, weight, reduction)
    alpha = (1 / (logits.shape[1] * checked_prior(prior, logits))).to(logits.dtype)
    return reduce(negative_log(logits, target) * alpha.index_select(0, target), weight, reduction)


class BalancedCrossEntropy(ScoreLoss):
    """:func:`balanced_cross_entropy` as a module, which holds the prior as a buffer."""

    def __init__(self, prior: Any) -> None:
        super().__init__(balanced_cross_entropy, prior=checked_prior(prior))


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
    r"""Label-distribution-aware margin (LDAM) loss: the margin of the true class is larger for rare classes.

    .. math:: L = -\log \mathrm{softmax}\big(a\,(s - m_y\,\mathbf 1_y)\big)_y, \quad
              m_y = m_{\max}\, \frac{n_y^{-1/4}}{\max_j n_j^{-1/4}}

    The logits are cosines in [-1, 1], as from ``CosineHead(scale=1)``; this loss scales them. For deferred reweighting
    (DRW) pass ``weight`` from a late epoch on: that of ``LDS(bins, kernel=None, scheme="effective_number",
    beta=0.9999)``, by ``fit(..., weights_from=...)`` of :mod:`dir_toolkit.experiment.training.loop`. Shapes and units
    are those of :func:`cross_entropy`.

    Args:
        counts: (C,), the number of training labels in each class, > 0. Only their ratios matter, so a prior can be
            used.
        max_margin: :math:`m_{\max}`, the margin of the rarest class, in units of the cosine, >= 0.
        scale: :math:`a`, > 0, the inverse temperature of the softmax.
    Source:
        Cao et al. 2019, sections 3.2 and 3.3 (arXiv:1906.07413).

    >>> loss = ldam_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([0]), counts=[1, 16])
    >>> round(loss.item(), 4)  # the margin of 0.5 cancels the difference of 0.5: log 2
    0.6931
    """
    logits = of_classes(logits, target, weight, reduction)
    counts = _counts(counts, logits)
    options = _ldam(max_margin, scale)
    if readable(logits):
        largest, fix = logits.detach().abs().amax().item(), "Use CosineHead(num_features, num_classes, scale=1)."
        require(not largest > 1 + _SLACK, "logits must be cosines, in [-1, 1]", got=f"one of size {largest:g}", fix=fix)
    margin = (options["max_margin"] * (counts.min() / counts).pow(0.25)).to(logits.dtype)
    led = logits.scatter_add(1, target[:, None], -margin.index_select(0, target)[:, None])
    return _reduced(options["scale"] * led, target, weight, reduction)


class LDAMLoss(ScoreLoss):
    """:func:`ldam_loss` as a module, which holds the counts as a buffer."""

    def __init__(self, counts: Any, *, max_margin: float = 0.5, scale: float = 30.0) -> None:
        super().__init__(ldam_loss, counts=_counts(counts), **_ldam(max_margin, scale))


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
    r"""Softmax equalization loss: samples of other classes do not push the logits of rare classes down.

    .. math:: L = -\log \frac{e^{s_y}}{\sum_j \tilde w_j e^{s_j}}, \quad
              \tilde w_j = 1 - \beta_j\, [\pi_j < \lambda]\, [j \ne y]

    Each :math:`\beta_j` is one with probability ``drop``, else zero. It is drawn for every sample and class. Shapes and
    units are those of :func:`cross_entropy`.

    Args:
        prior: (C,), the share of training labels in each class.
        threshold: :math:`\lambda`, in [0, 1]. A class with a smaller prior is rare.
        drop: the probability of :math:`\beta = 1`, in [0, 1]; at 0 and at 1 nothing is drawn.
        generator: the random generator for :math:`\beta`, on the logits' device. It is required if ``drop`` is between
            0 and 1.
    Source:
        Tan et al. 2020, the softmax form (arXiv:2003.05176).

    >>> loss = equalization_loss(torch.zeros(1, 3), torch.tensor([0]), prior=[0.6, 0.3, 0.1], threshold=0.2)
    >>> round(loss.item(), 4)  # the third class is excluded: log 2
    0.6931
    """
    logits = of_classes(logits, target, weight, reduction)
    threshold, drop = _shares(threshold, drop).values()
    dropped = (checked_prior(prior, logits) < threshold).expand_as(logits)
    if 0 < drop < 1:
        dropped = dropped & (_uniform(logits, generator) < drop)
    elif drop == 0:
        dropped = torch.zeros_like(dropped)
    dropped = dropped.scatter(1, target[:, None], False)
    # Added, not filled in, so that a NaN logit propagates.
    offset = torch.zeros_like(logits).masked_fill(dropped, -torch.inf)
    return _reduced(logits + offset, target, weight, reduction)


class EqualizationLoss(ScoreLoss):
    """:func:`equalization_loss` as a module, which holds the prior as a buffer. Settings exclude the generator."""

    def __init__(
        self, prior: Any, *, threshold: float, drop: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(equalization_loss, prior=checked_prior(prior), **_shares(threshold, drop))
        if generator is not None:
            instance(torch.Generator, generator=generator)
        self.generator = generator

    def _reduced(self, output: Any, target: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
        own = {**self.settings, "generator": self.generator, "reduction": reduction}
        return equalization_loss(part_of(output, self.reads), target, weight, **own)


def negative_log(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each sample, (N,), without checks."""
    log_p = logits.log_softmax(1)
    values = functional.nll_loss(log_p, target, reduction="none", ignore_index=_NO_CLASS)
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * log_p.mean(1)
    return values


def _reduced(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float = 0.0
) -> Tensor:
    """:func:`negative_log`, multiplied by weights and reduced."""
    if weight is None and reduction != "none" and not label_smoothing:
        return functional.cross_entropy(logits, target, reduction=reduction, ignore_index=_NO_CLASS)
    return reduce(negative_log(logits, target, label_smoothing), weight, reduction)


def _smoothing(label_smoothing: float) -> float:
    return number("label_smoothing", label_smoothing, low=0, high=1)


def _counts(counts: Any, logits: Tensor | None = None) -> Tensor:
    return per_class("counts", counts, logits, positive="Raise the counts of unseen classes to one.")


def _ldam(max_margin: float, scale: float) -> dict[str, float]:
    positive = number("scale", scale, low=0, open_low=True, float32=True)
    return {"max_margin": number("max_margin", max_margin, low=0), "scale": positive}


def _shares(threshold: float, drop: float) -> dict[str, float]:
    return {"threshold": number("threshold", threshold, low=0, high=1), "drop": number("drop", drop, low=0, high=1)}


def _margins(margins: Tensor, logits: Tensor | None = None) -> Tensor:
    """Checked margins, (C, C)."""
    real(margins=margins)
    classes = len(margins) if logits is None and margins.ndim else 0 if logits is None else logits.shape[1]
    if logits is not None:
        same_device(logits=logits, margins=margins)
    shaped((classes, classes), "true class by other class", margins=margins)
    if readable(margins):
        no_bad(
            "margins must be finite or -inf", margins, (margins.isnan() | (margins == torch.inf)).fill_diagonal_(False)
        )
    return margins


def _uniform(logits: Tensor, generator: Any) -> Tensor:
    fix = "Use torch.Generator(logits.device).manual_seed(seed), one for all steps."
    require(generator is not None, "generator must be given where drop lies between 0 and 1", got="None", fix=fix)
    instance(torch.Generator, generator=generator)
    own, needed = generator.device.type, logits.device.type
    require(own == needed, "generator must be on the device type of the logits", got=f"{own} for {needed}", fix=fix)
    return torch.rand(logits.shape, generator=generator, device=logits.device)
