"""ConR: features of samples that the predictions confuse are pushed apart, rare labels hardest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import instance, number, problem
from .._numerics import full_precision, unit_rows, wide_dtype
from .._settings import shown
from .._state import SoundModule
from ..labels.weights import LDS
from ._reduce import Reduction, checked_samples, field, pairs_of, present, reduce, spread_of
from .regression import weighted_l1

__all__ = ["ConRLoss", "conr_loss"]


def conr_loss(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    pred: Tensor,
    push_weight: Tensor | None = None,
    omega: float | None = None,
    temperature: float = 0.2,
    eta: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast of samples alike in label with those that only the predictions take to be alike.

    .. math::
        L = \frac1N \sum_{j \in A} \frac{w_j}{|P_j|} \sum_{i \in P_j} -\log \frac{\exp(c_{ji} / \tau)}
            {\sum_{p \in P_j} \exp(c_{jp} / \tau) + \sum_{q \in Q_j} S_{jq} \exp(c_{jq} / \tau)}, \qquad
        S_{jq} = r_j\, e^{\eta |y_j - y_q|}

    ================= ================================================================================================
    symbol            meaning
    ================= ================================================================================================
    :math:`c`         cosine of two features; that of a feature of zero is 0, without gradient
    :math:`P_j`       positives: the other samples with :math:`|y_j - y_p| \le \omega`
    :math:`Q_j`       negatives: those with :math:`|y_j - y_q| > \omega` though :math:`|\hat y_j - \hat y_q| \le \omega`
    :math:`A`         anchors: the samples that have a negative, and a positive to be drawn to
    :math:`S`         pushing weight: how much a negative counts, more with a rare anchor and a gross confusion
    ================= ================================================================================================

    A regularizer, to be added to a loss of the predictions, as :class:`ConRLoss` does: no gradient passes to ``pred``.
    Zero, with zero gradients, where nothing is confused. Of the paper's two augmented views, hand both over as 2N
    samples, ``torch.cat([z1, z2])`` with the rest repeated; with one view a sample without a neighbor in label is no
    anchor. Each rank of a distributed run contrasts its own batch.

    Args:
        weight: dimensionless, >= 0, one a sample; None means ones. Scales the sample's term as an anchor. Divides by N,
            not by the sum of weights. A sample of weight 0 takes no part, in pairs with others neither, whatever its
            features are.
        push_weight: r, dimensionless, >= 0, one a sample, larger for rare labels, such as ``lds(labels)`` of a fitted
            :class:`~dir_toolkit.LDS`; None means ones. No gradient passes to it.
        omega: :math:`\omega`, > 0, in label units. At 1, labels in whole years are alike if a year apart at most. None
            takes a twentieth of the standard deviation of the batch's labels, about as much.
        temperature: :math:`\tau`, > 0.
        eta: :math:`\eta`, >= 0, per label unit. None takes 0.01 per :math:`\omega`.
    Shape:
        features: (N, D). target, pred, weight, push_weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        none; it is a log-probability.
    Raises:
        ShapeError: shapes do not fit. TypeError: features are no floats. ValueError: there is no sample, labels or a
        weight are not finite, or a weight is negative. A feature in a pair that is not finite makes the loss so; a
        prediction that is not finite is alike to none. On accelerators values are not looked at.
    Source:
        Keramati et al. 2024, section 3 (arXiv:2309.06651). The form of the mean and of S, and that pairs at
        :math:`\omega` are alike, follow the authors' code (github.com/BorealisAI/ConR).

    >>> features, labels = torch.ones(3, 2), torch.tensor([20.0, 20.5, 60.0])
    >>> conr_loss(features, labels, pred=torch.tensor([20.0, 20.0, 60.0])).item()  # nothing is confused
    0.0
    >>> values = conr_loss(features, labels, pred=torch.tensor([20.0, 20.0, 20.0]), eta=0.0, reduction="none")
    >>> values.exp()  # 1 positive, 1 negative; the third has no positive
    tensor([2., 2., 1.])
    """
    omega, eta = _checked_scales(omega, eta)
    temperature = number("temperature", temperature, low=0, open_low=True, float32=True)
    columns = {"target": target, "pred": pred}
    if push_weight is not None:
        columns["push_weight"] = push_weight
    features = checked_samples(features, columns, weight, reduction)
    dtype = wide_dtype(features, target, pred)
    pairs = pairs_of(features, weight)
    distance = _distances(present(target.to(dtype), weight))
    there = None if weight is None else weight > 0
    near = 0.05 * spread_of(target.detach().to(dtype), there).nan_to_num(0.0) if omega is None else omega
    positive = pairs & (distance <= near)
    negative = pairs & (distance > near) & (_distances(pred.detach().to(dtype)) <= near)
    anchor = positive.any(1) & negative.any(1)
    push = (0.01 * distance / near).nan_to_num(0.0) if eta is None else eta * distance  # log S
    if push_weight is not None:
        push = push + push_weight.detach().to(dtype).log()[:, None]
    with full_precision(features.device):
        unit = unit_rows(features.to(dtype))
        logits = unit @ unit.t() / temperature  # (N, N)
    among = torch.where(negative, logits + push, logits).masked_fill(~(positive | negative), -torch.inf)
    # A row without any pair would be infinite, with a gradient of NaN.
    total = among.masked_fill(~anchor[:, None], 0.0).logsumexp(1)
    drawn = logits.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp_min(1)
    return reduce((total - drawn).masked_fill(~anchor, 0.0), weight, reduction)


class ConRLoss(SoundModule):
    r"""A regression loss with ConR added to it: :math:`L = L_\text{base} + \beta L_\text{ConR}`.

    Called as ``loss(output, labels, weight, reduction=...)``; r of :func:`conr_loss` is ``weights(labels)``. A sample's
    weight scales both terms.

    Args:
        base: called as ``base(prediction, labels, weight, reduction=...)``; a module's parameters are ours, too.
        coefficient: :math:`\beta`, >= 0, in units of the base loss.
        omega, temperature, eta: as in :func:`conr_loss`.
        weights: fitted; None pushes with all labels alike.
    Shape:
        forward: output.prediction (N,) in label units, output.features (N, D), labels (N,), weight (N,). Returns (), or
        (N,) for ``reduction="none"``.
    Units:
        those of the base loss.
    Raises:
        TypeError: output lacks an attribute. Besides, what base, ``weights`` and :func:`conr_loss` raise.
    Source:
        Keramati et al. 2024, section 3 (arXiv:2309.06651).

    >>> from types import SimpleNamespace
    >>> output = SimpleNamespace(prediction=torch.tensor([20.0, 60.0]), features=torch.ones(2, 3))
    >>> ConRLoss(coefficient=4.0)(output, torch.tensor([22.0, 60.0])).item()  # nothing is confused
    1.0
    """

    def __init__(
        self,
        base: Callable[..., Tensor] = weighted_l1,
        *,
        coefficient: float = 1.0,
        omega: float | None = None,
        temperature: float = 0.2,
        eta: float | None = None,
        weights: LDS | None = None,
    ) -> None:
        super().__init__()
        if not callable(base):
            raise problem("base must be a loss to call", got=type(base).__name__, error=TypeError)
        if weights is not None:
            instance(LDS, weights=weights)
        self.base, self.weights = base, weights
        self.coefficient = number("coefficient", coefficient, low=0, float32=True)
        self.omega, self.eta = _checked_scales(omega, eta)
        self.temperature = number("temperature", temperature, low=0, open_low=True, float32=True)

    def forward(
        self, output: Any, labels: Tensor, weight: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        prediction, features = (field(output, name) for name in ("prediction", "features"))
        contrast = conr_loss(
            features,
            labels,
            weight,
            pred=prediction,
            push_weight=None if self.weights is None else self.weights(labels),
            omega=self.omega,
            temperature=self.temperature,
            eta=self.eta,
            reduction=reduction,
        )
        return self.base(prediction, labels, weight, reduction=reduction) + self.coefficient * contrast

    @property
    def settings(self) -> dict[str, Any]:
        """What the loss was made with."""
        return {
            "base": self.base,
            "coefficient": self.coefficient,
            "omega": self.omega,
            "temperature": self.temperature,
            "eta": self.eta,
            "weights": self.weights,
        }

    def extra_repr(self) -> str:  # a base or weights that are modules are shown as children
        return shown({name: value for name, value in self.settings.items() if not isinstance(value, nn.Module)})


def _checked_scales(omega: float | None, eta: float | None) -> tuple[float | None, float | None]:
    if omega is not None:
        omega = number("omega", omega, low=0, open_low=True, float32=True)
    return omega, None if eta is None else number("eta", eta, low=0, float32=True)


def _distances(values: Tensor) -> Tensor:
    """|v_i - v_j|, (N, N)."""
    return (values[:, None] - values).abs()
