"""Rank-N-Contrast: features are ordered by the distances of their labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._checks import number, warn
from ..labels.bins import Missing
from ._inputs import of_features, present
from ._loss import FeatureLoss, Reduction, drops_missing, reduce
from ._pairs import label_dtype, pairs_of, rounding_of

__all__ = ["RankNContrast", "rank_n_contrast"]

_temperature = partial(number, "temperature", low=0, open_low=True, float32=True)


@drops_missing("row")
def rank_n_contrast(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 2.0,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast every pair of samples (i, j) against all samples whose labels are at least as far from label i as label
    j.

    .. math::
        L = \frac1N \sum_i \frac{w_i}{N-1} \sum_{j \ne i}
            -\log \frac{\exp(s_{ij} / \tau)}{\sum_{k \in S_{ij}} \exp(s_{ik} / \tau)}, \qquad
        S_{ij} = \{k \ne i : d(y_i, y_k) \ge d(y_i, y_j)\}

    with :math:`s_{ij} = -\lVert z_i - z_j \rVert_2` between features and :math:`d` the L1 distance between labels. Ties
    of distances, also those that differ by rounding alone, belong to :math:`S_{ij}`. The loss trains an encoder. Train
    a head from features to predictions with another loss; the paper trains it afterwards.

    Memory is O(N²). Each rank of a distributed run contrasts its own batch. To contrast two augmented views, as in the
    paper, pass both as 2N samples: ``torch.cat([z1, z2])``, with the labels repeated. A batch of one sample has no
    pair; its loss is zero, and a warning is issued.

    A weight scales the sample's term as the anchor i. A sample of weight 0 is also excluded as j and k, and from the
    count N - 1.

    Args:
        temperature: :math:`\tau`, > 0, in units of the features.
    Shape:
        features: (N, D). target: (N,) or (N, K). weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        nats.
    Source:
        Zha et al. 2023, section 3 (arXiv:2210.01189).

    >>> round(rank_n_contrast(torch.zeros(3, 2), torch.tensor([0, 1, 3])).item(), 4)  # log(2) / 2
    0.3466
    """
    temperature = _temperature(temperature)
    features, gone = of_features(features, {"target": target}, weight, reduction, several=True)
    samples = len(features)
    if samples < 2:
        warn("a batch of one sample has no pair, and has zero loss. Drop a last batch of one (drop_last=True).")
    labels = target.to(label_dtype(target)).reshape(samples, -1)  # (N, K)
    pairs = pairs_of(features, gone)
    # By differences and not by matrix products, which would round small distances away.
    exact = "donot_use_mm_for_euclid_dist"
    similarity = torch.cdist(features, features, compute_mode=exact) / -temperature  # (N, N)
    # Entries that are not pairs come first in the order of distances, so that no set S includes them.
    distance, order = torch.cdist(labels, labels, p=1.0).masked_fill(~pairs, -1.0).sort(dim=1)
    similarity = similarity.gather(1, order)
    onward = similarity.flip(1).logcumsumexp(1).flip(1)  # over a position in the row and all after it
    # The position where each tie begins. Ties may differ by rounding.
    least = (distance - rounding_of(present(labels, gone), target).gather(1, order)).clamp_min(0.0)
    first = torch.searchsorted(distance, torch.where(distance < 0, distance, least))
    values = (onward.gather(1, first) - similarity).masked_fill(distance < 0, 0.0).sum(1)
    return reduce(values / pairs.sum(1).clamp_min(1), weight, reduction)


class RankNContrast(FeatureLoss):
    """:func:`rank_n_contrast` as a module, called with features or with an output that holds them.

    >>> features, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 1, 3])
    >>> RankNContrast(temperature=0.1)(features, labels) < 1e-4 < RankNContrast()(features, labels)
    tensor(True)
    """

    def __init__(self, *, temperature: float = 2.0, missing: Missing = "raise") -> None:
        super().__init__(rank_n_contrast, temperature=_temperature(temperature), missing=missing)
