"""Cosine head: scores that do not depend on the norms of weights and features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import instance, length, number, same_device
from .._numerics import default_dtype, full_precision, unit_rows, wide_dtype
from .._state import SoundModule
from ._features import checked_features

__all__ = ["CosineHead"]


class CosineHead(SoundModule):
    r"""Scaled cosine scores, :math:`s \cos(z, w_j)`.

    The cosine of a vector shorter than 1e-12 is zero, without gradient. Scores are computed in at least float32 even
    under autocast.

    Args:
        num_features: the number of features, D.
        num_classes: the number of classes, C.
        scale: s, > 0. Scores lie in [-s, s].
        learn_scale: whether s is trained, as its logarithm.
    Attributes:
        weight: (C, D). scale: (). log_scale: (1,), instead of scale if it is learned.
    Shape:
        forward: features (N, D). Returns (N, C).
    Source:
        Gidaris and Komodakis 2018, section 3.2 (arXiv:1804.09458).

    >>> head = CosineHead(2, 2, scale=10.0)
    >>> _ = head.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 5.0]]), "scale": torch.tensor(10.0)})
    >>> head(torch.tensor([[0.0, 3.0]])).tolist()
    [[0.0, 10.0]]
    """

    weight: nn.Parameter
    scale: Tensor
    log_scale: nn.Parameter

    @torch.inference_mode(False)  # buffers must be usable in training
    def __init__(self, num_features: int, num_classes: int, *, scale: float = 16.0, learn_scale: bool = False) -> None:
        super().__init__()
        self.num_features = length("num_features", num_features)
        self.num_classes = length("num_classes", num_classes)
        scale = number("scale", scale, low=0, open_low=True, float32=True)
        instance(bool, learn_scale=learn_scale)
        self.learn_scale = learn_scale
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.num_features))
        self._scale, self._start = scale, math.log(scale)
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor([self._start]))
        else:
            self.register_buffer("scale", torch.tensor(scale, dtype=default_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new normal weights of length about one, and reset a learned scale."""
        nn.init.normal_(self.weight, std=self.num_features**-0.5)
        if self.learn_scale:
            nn.init.constant_(self.log_scale, self._start)

    def forward(self, features: Tensor) -> Tensor:
        checked_features(features, self.num_features)
        same_device(weight=self.weight, features=features)
        dtype = wide_dtype(features, self.weight)
        with full_precision(features.device):
            cosine = unit_rows(features.to(dtype)) @ unit_rows(self.weight.to(dtype)).t()
            scale = self.log_scale.to(dtype).exp() if self.learn_scale else self.scale
            return cosine * scale

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        shape = {"num_features": self.num_features, "num_classes": self.num_classes}
        return {**shape, "scale": self._scale, "learn_scale": self.learn_scale}
