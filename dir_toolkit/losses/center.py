"""Center loss: features are drawn to the center of their class, and the centers follow the features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import floats, length, number, same_device, shaped
from .._numerics import wide_dtype
from ._inputs import of_classes
from ._loss import FeatureLoss, Reduction, part_of, reduce

__all__ = ["CenterLoss", "center_loss"]


def center_loss(
    features: Tensor, target: Tensor, weight: Tensor | None = None, *, centers: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    r"""Half the squared distance of a feature to the center of its class.

    .. math:: L = \frac1N \sum_i \frac{w_i}{2} \lVert z_i - c_{y_i} \rVert^2

    It is differentiable in both features and centers.

    Args:
        centers: one row per class.
    Shape:
        features: (N, D). target: (N,) class indices. centers: (C, D). weight: (N,). Returns (), or (N,) for
        ``reduction="none"``.
    Units:
        those of the features, squared.
    Source:
        Wen et al. 2016, equation 2 (doi:10.1007/978-3-319-46478-7_31).

    >>> centers = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> center_loss(torch.zeros(1, 2), torch.tensor([1]), centers=centers).item()
    12.5
    """
    features, centers = _checked(features, target, centers, weight, reduction)
    return reduce(_half_squares(features, centers.index_select(0, target)), weight, reduction)


class CenterLoss(FeatureLoss):
    r"""Center loss with centers that follow the features at the same rate for frequent and rare classes.

    The paper moves a center by :math:`c_j \leftarrow c_j - \alpha\,\Delta_j`, :math:`\Delta_j = \sum_{i: y_i = j} (c_j
    - z_i) / (1 + n_j)` over the :math:`n_j` samples of class j in the batch. Here the centers are a parameter whose
    gradient is :math:`\Delta_j`, for any ``strength``. Plain SGD without momentum or weight decay, with the learning
    rate :math:`\alpha` (0.5 in the paper), gives the paper's update::

        center = CenterLoss(128, 10, strength=0.003)
        optimizer = SGD([{"params": model.parameters()}, {"params": center.parameters(), "lr": 0.5}], lr=0.01)
        loss = cross_entropy(logits, y) + center(features, y)

    This is not the derivative of the loss, which is :math:`N / (1 + n_j)` times smaller and would hardly move the
    centers of rare classes. For the derivative pass a parameter to :func:`center_loss`.

    Differences from the paper: centers start at zero and not at random, and a sample counts by its weight, in the sum
    as in :math:`n_j`. Under DistributedDataParallel each rank counts its own batch, and gradients are averaged. Scaling
    or clipping of gradients also changes the steps of the centers.

    Args:
        num_features: the number of features, D.
        num_classes: the number of classes, C.
        strength: the paper's :math:`\lambda`, the factor of the loss, > 0. The paper uses 0.003 for faces.
    Attributes:
        centers: (C, D), a parameter.
    Shape:
        forward: output (N, D), or an object whose ``features`` are; target (N,), weight (N,). Returns ().
    Source:
        Wen et al. 2016, equations 3 and 4 and algorithm 1 (doi:10.1007/978-3-319-46478-7_31).

    >>> center = CenterLoss(1, 2)
    >>> center(torch.tensor([[3.0], [6.0]]), torch.tensor([1, 1])).backward()
    >>> center.centers.grad.tolist()  # -(3 + 6) / (1 + 2)
    [[0.0], [-3.0]]
    """

    num_features: int
    num_classes: int
    strength: float

    def __init__(self, num_features: int, num_classes: int, *, strength: float = 1.0) -> None:
        super().__init__(
            center_loss,
            num_features=length("num_features", num_features),
            num_classes=length("num_classes", num_classes),
            strength=number("strength", strength, low=0, open_low=True, float32=True),
        )
        self.centers = nn.Parameter(torch.zeros(self.num_classes, self.num_features))

    def forward(self, output: Any, target: Tensor, weight: Tensor | None = None) -> Tensor:
        features, centers = _checked(part_of(output, "features"), target, self.centers, weight, "mean")
        each = torch.ones_like(features[:, 0]) if weight is None else weight.to(features.dtype)
        count = torch.zeros_like(centers[:, 0]).index_add(0, target, each)
        rate = len(target) / (self.strength * (1 + count.index_select(0, target)))
        rows = centers.index_select(0, target)
        still = rows.detach()
        rows = still + rate[:, None] * (rows - still)  # the value of the rows, and their gradient times the rate
        return self.strength * reduce(_half_squares(features, rows), weight, "mean")


def _checked(
    features: Tensor, target: Tensor, centers: Tensor, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """Checked features and centers, in a common dtype."""
    floats(centers=centers)
    shaped(("C", "D"), centers=centers)
    wide = of_classes(features, target, weight, reduction, name="features", num_classes=len(centers))
    shaped(("N", centers.shape[1]), "as the centers are", features=features)
    same_device(features=features, centers=centers)
    dtype = wide_dtype(features, centers)
    return wide.to(dtype), centers.to(dtype)


def _half_squares(features: Tensor, rows: Tensor) -> Tensor:
    return (features - rows).square().sum(1) / 2
