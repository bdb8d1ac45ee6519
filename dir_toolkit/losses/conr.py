"""ConR: contrastive regularization for imbalanced regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import drop_alike, instance, number, require
from .._numerics import full_precision, unit_rows, wide_dtype
from ..labels.bins import Missing
from ..labels.weights import LDS
from ._inputs import counted, of_features, present
from ._loss import Loss, Reduction, drops_missing, held, reduce
from ._pairs import label_dtype, pairs_of, rounding_of, spread_of
from .regression import weighted_l1

__all__ = ["ConRLoss", "conr_loss"]


@drops_missing("number")
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
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast samples with similar labels against samples with similar predictions but different labels.

    .. math::
        L = \frac1N \sum_{j \in A} \frac{w_j}{|P_j|} \sum_{i \in P_j} -\log \frac{\exp(c_{ji} / \tau)}
            {\sum_{p \in P_j} \exp(c_{jp} / \tau) + \sum_{q \in Q_j} S_{jq} \exp(c_{jq} / \tau)}, \qquad
        S_{jq} = r_j\, e^{\eta |y_j - y_q|}

    ================= ================================================================================================
    symbol            meaning
    ================= ================================================================================================
    :math:`c`         cosine of two features; it is 0 without gradient for a feature of zero
    :math:`P_j`       positives: the other samples with :math:`|y_j - y_p| \le \omega`
    :math:`Q_j`       negatives: those with :math:`|y_j - y_q| > \omega` though :math:`|\hat y_j - \hat y_q| \le \omega`
    :math:`A`         anchors: the samples that have both a negative and a positive
    :math:`S`         pushing weight of a negative, larger for rare anchors and large label differences
    ================= ================================================================================================

    It is a regularizer to be added to a loss of the predictions, as :class:`ConRLoss` does. ``pred`` gets no gradient.
    The loss and its gradients are zero if there is no anchor. To contrast two augmented views, as in the paper, pass
    both as 2N samples: ``torch.cat([z1, z2])``, with the other arguments repeated. With one view a sample without a
    similar label in the batch is not an anchor. Each rank of a distributed run contrasts its own batch.

    A weight scales the sample's term as an anchor. A sample of weight 0 is also excluded from the pairs of others. A
    prediction that is not finite is similar to no other.

    Args:
        pred: the predictions, in label units.
        push_weight: r, dimensionless, >= 0, one number per sample, larger for rare labels, such as ``lds(labels)`` of a
            fitted :class:`~dir_toolkit.LDS`; None means ones. It gets no gradient.
        omega: :math:`\omega`, > 0, in label units: the largest difference of similar labels. The paper uses 1 for ages
            in years. None takes a twentieth of the standard deviation of the batch's labels, which is about as much.
        temperature: :math:`\tau`, > 0.
        eta: :math:`\eta`, >= 0, per label unit. None takes 0.01 per :math:`\omega`.
    Shape:
        features: (N, D). target, pred, weight, push_weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        nats.
    Source:
        Keramati et al. 2024, section 3 (arXiv:2309.06651). The form of the mean and of S, and the use of :math:`\le
        \omega`, follow the authors' code (github.com/BorealisAI/ConR).

    >>> features, labels = torch.ones(3, 2), torch.tensor([20.0, 20.5, 60.0])
    >>> conr_loss(features, labels, pred=torch.tensor([20.0, 20.0, 60.0])).item()  # there is no negative
    0.0
    >>> values = conr_loss(features, labels, pred=torch.tensor([20.0, 20.0, 20.0]), eta=0.0, reduction="none")
    >>> values.exp()  # 1 positive, 1 negative; the third has no positive
    tensor([2., 2., 1.])
    """
    omega, temperature, eta = _scales(omega, temperature, eta).values()
    columns = {"target": target, "pred": pred}
    if push_weight is not None:
        columns["push_weight"] = push_weight
    features, gone = of_features(features, columns, weight, reduction)
    dtype = wide_dtype(features, target, pred)
    labels = present(target.to(label_dtype(target)), gone)
    pairs = pairs_of(features, gone)
    distance = _distances(labels)
    near = omega
    if near is None:
        near = 0.05 * spread_of(labels.detach(), None if gone is None else ~gone).nan_to_num(0.0)
    reach = near + rounding_of(labels, target)
    positive = pairs & (distance <= reach)
    negative = pairs & (distance > reach) & (_distances(pred.detach().to(dtype)) <= reach)
    anchor = positive.any(1) & negative.any(1)
    push = ((0.01 * distance / near).nan_to_num(0.0) if eta is None else eta * distance).to(dtype)  # log S
    if push_weight is not None:
        push = push + push_weight.detach().to(dtype).log()[:, None]
    with full_precision(features.device):
        unit = unit_rows(features.to(dtype))
        logits = unit @ unit.t() / temperature  # (N, N)
    among = torch.where(negative, logits + push, logits).masked_fill(~(positive | negative), -torch.inf)
    # Rows that are not anchors are masked first, since a row without pairs would have a gradient of NaN.
    total = among.masked_fill(~anchor[:, None], 0.0).logsumexp(1)
    drawn = logits.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp_min(1)
    # A feature that is not finite makes all gradients NaN, and so its own term, which shows it.
    return reduce((total - drawn).masked_fill(~anchor, 0.0) + 0 * unit.sum(1), weight, reduction)


class ConRLoss(Loss):
    r"""A regression loss plus ConR: :math:`L = L_\text{base} + \beta L_\text{ConR}`.

    A sample's weight scales both terms.

    Args:
        base: called as ``base(prediction, target, weight)``. If it is a module, its parameters are trained as well.
        coefficient: :math:`\beta`, >= 0, in units of the base loss.
        omega: as in :func:`conr_loss`.
        temperature: as in :func:`conr_loss`.
        eta: as in :func:`conr_loss`.
        weights: a fitted LDS for r, ``weights(target)``; None means ones.
        missing: as for all losses, in both terms. The base loss gets weight 0 for a missing label. If labels are
            dropped, ``weights`` must also drop them.
    Shape:
        forward: output.prediction (N,) in label units, output.features (N, D), target (N,), weight (N,). Returns ().
    Units:
        those of the base loss.
    Source:
        Keramati et al. 2024, section 3 (arXiv:2309.06651).

    >>> from types import SimpleNamespace
    >>> output = SimpleNamespace(prediction=torch.tensor([20.0, 60.0]), features=torch.ones(2, 3))
    >>> ConRLoss(coefficient=4.0)(output, torch.tensor([22.0, 60.0])).item()  # there is no negative
    1.0
    """

    base: Callable[..., Tensor]
    coefficient: float
    omega: float | None
    temperature: float
    eta: float | None
    weights: LDS | None
    missing: Missing

    def __init__(
        self,
        base: Callable[..., Tensor] = weighted_l1,
        *,
        coefficient: float = 1.0,
        omega: float | None = None,
        temperature: float = 0.2,
        eta: float | None = None,
        weights: LDS | None = None,
        missing: Missing = "raise",
    ) -> None:
        require(callable(base), "base must be callable", got=type(base))
        if weights is not None:
            instance(LDS, weights=weights)
        coefficient = number("coefficient", coefficient, low=0, float32=True)
        scales = _scales(omega, temperature, eta)
        super().__init__(conr_loss, base=base, coefficient=coefficient, **scales, weights=weights, missing=missing)
        if weights is not None:
            drop_alike("weights", weights, "loss", missing=missing)

    def forward(self, output: Any, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._sum(output, target, weight, missing=self.missing)

    @drops_missing("number")
    def _sum(self, output: Any, target: Tensor, weight: Tensor | None, *, missing: Missing = "raise") -> Tensor:
        prediction, features = (held(output, name) for name in ("prediction", "features"))
        labels = counted(target, weight)
        contrast = conr_loss(
            features,
            target,
            weight,
            pred=prediction,
            push_weight=None if self.weights is None or labels is None else self.weights(labels),
            omega=self.omega,
            temperature=self.temperature,
            eta=self.eta,
        )
        return self.base(prediction, target, weight) + self.coefficient * contrast


def _scales(omega: float | None, temperature: float, eta: float | None) -> dict[str, Any]:
    return {
        "omega": None if omega is None else number("omega", omega, low=0, open_low=True, float32=True),
        "temperature": number("temperature", temperature, low=0, open_low=True, float32=True),
        "eta": None if eta is None else number("eta", eta, low=0, float32=True),
    }


def _distances(values: Tensor) -> Tensor:
    """|v_i - v_j|, (N, N)."""
    return (values[:, None] - values).abs()
