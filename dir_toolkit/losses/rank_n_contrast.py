"""Rank-N-Contrast: features as far from each other as their labels rank."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._checks import number, warn
from .._numerics import wide_dtype
from ._inputs import of_features
from ._loss import FeatureLoss, Reduction, reduce
from ._pairs import pairs_of

__all__ = ["RankNContrast", "rank_n_contrast"]

_temperature = partial(number, "temperature", low=0, open_low=True, float32=True)


def rank_n_contrast(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast of every pair of samples with all samples whose labels lie at least as far from the first one's.

    .. math::
        L = \frac1N \sum_i \frac{w_i}{N-1} \sum_{j \ne i}
            -\log \frac{\exp(s_{ij} / \tau)}{\sum_{k \in S_{ij}} \exp(s_{ik} / \tau)}, \qquad
        S_{ij} = \{k \ne i : d(y_i, y_k) \ge d(y_i, y_j)\}

    with :math:`s_{ij} = -\lVert z_i - z_j \rVert_2` between features and :math:`d` the L1 distance between labels.
    Distances that are equal as floats are ties, and a tie belongs to :math:`S_{ij}`. The loss trains an encoder. A head
    from features to predictions is trained with another loss; the paper trains it afterwards.

    It takes memory for N × N numbers, not for N × N × N. Each rank of a distributed run contrasts its own batch. To
    contrast two augmented views, as the paper does, hand both over as 2N samples: ``torch.cat([z1, z2])`` with the
    labels repeated. A batch of one sample has no pair and adds nothing, and a warning says so.

    A weight scales the sample's term as the anchor i. A sample of weight 0 is no other sample's j or k either, and
    N - 1 becomes the number of the others that are there.

    Args:
        temperature: :math:`\tau`, > 0, in units of the features.
    Shape:
        features: (N, D). target: (N,) or (N, K). weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        none; it is a log-probability.
    Source:
        Zha et al. 2023, section 3 (arXiv:2210.01189).

    >>> round(rank_n_contrast(torch.zeros(3, 2), torch.tensor([0, 1, 3])).item(), 4)  # log(2) / 2
    0.3466
    """
    temperature = _temperature(temperature)
    features, gone = of_features(features, {"target": target}, weight, reduction, several=True)
    samples = len(features)
    if samples < 2:
        warn("a batch of one sample has no pair, and adds nothing. Drop a last batch of one (drop_last=True).")
    labels = target.to(wide_dtype(target)).reshape(samples, -1)  # (N, K)
    pairs = pairs_of(features, gone)
    # By differences and not by products, which would round the distances of near neighbors away.
    exact = "donot_use_mm_for_euclid_dist"
    similarity = torch.cdist(features, features, compute_mode=exact) / -temperature  # (N, N)
    # What is not a pair comes first in the order of distances, so that no set S reaches back to it.
    distance, order = torch.cdist(labels, labels, p=1.0).masked_fill(~pairs, -1.0).sort(dim=1)
    similarity = similarity.gather(1, order)
    onward = similarity.flip(1).logcumsumexp(1).flip(1)  # over a place in the row and all after it
    first = torch.searchsorted(distance, distance)  # the place where each tie begins
    values = (onward.gather(1, first) - similarity).masked_fill(distance < 0, 0.0).sum(1)
    return reduce(values / pairs.sum(1).clamp_min(1), weight, reduction)


class RankNContrast(FeatureLoss):
    """:func:`rank_n_contrast` as a module, called with features or with an output that holds them.

    >>> features, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 1, 3])
    >>> RankNContrast(temperature=0.1)(features, labels) < 1e-4 < RankNContrast()(features, labels)
    tensor(True)
    """

    def __init__(self, *, temperature: float = 2.0) -> None:
        super().__init__(rank_n_contrast, temperature=_temperature(temperature))
