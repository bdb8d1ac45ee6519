"""The linear classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import instance, length, same_device
from .._state import SoundModule
from ._features import checked_features, linear_scores

__all__ = ["LinearHead"]


class LinearHead(SoundModule, nn.Linear):
    r"""Linear scores, :math:`w_j \cdot z + b_j`: ``torch.nn.Linear`` with checks of its input.

    Outside autocast scores are in the wider dtype of features and weights, at least float32.

    Args:
        num_features: the number of features, D.
        num_classes: the number of classes, C.
        bias: whether there is a bias :math:`b_j`.
    Attributes:
        weight: (C, D). bias: (C,) or None.
    Shape:
        forward: features (N, D). Returns (N, C).

    >>> head = LinearHead(64, 10)
    >>> head(torch.zeros(3, 64)).shape
    torch.Size([3, 10])
    """

    @torch.inference_mode(False)  # buffers must be usable in training
    def __init__(self, num_features: int, num_classes: int, *, bias: bool = True) -> None:
        num_features = length("num_features", num_features)
        num_classes = length("num_classes", num_classes)
        instance(bool, bias=bias)
        super().__init__(num_features, num_classes, bias=bias)
        self.num_features, self.num_classes = num_features, num_classes

    def forward(self, features: Tensor) -> Tensor:
        checked_features(features, self.num_features)
        same_device(weight=self.weight, features=features)
        return linear_scores(features, self.weight, self.bias)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        shape = {"num_features": self.num_features, "num_classes": self.num_classes}
        return {**shape, "bias": self.bias is not None}


def linear_of(weight: Tensor, bias: Tensor | None, *, trainable: bool) -> LinearHead:
    """A head with these tensors as its weight and bias. It draws no random numbers."""
    num_classes, num_features = weight.shape
    with torch.device("meta"):
        head = LinearHead(num_features, num_classes, bias=bias is not None)
    head.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=trainable)
    return head
