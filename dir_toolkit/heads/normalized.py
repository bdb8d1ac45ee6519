"""Rescale the weights of a trained linear classifier per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import finite, instance, number, on_host, require, same_device
from .._state import SoundModule
from ._features import checked_features, linear_scores
from .linear import LinearHead, linear_of

__all__ = ["ScaledHead", "tau_normalized"]


@torch.no_grad()
def tau_normalized(linear: nn.Linear, tau: float) -> LinearHead:
    r"""A new head with the weights :math:`w_i / \|w_i\|^\tau` of a trained one, and without bias.

    Weights of frequent classes have larger norms, which this normalization removes. The bias, which also depends on
    class counts, is dropped, as in the paper.

    Args:
        linear: the trained classifier, which is not changed.
        tau: >= 0, chosen on validation data. 0 keeps the weights, 1 scales all to length one.
    Raises:
        TypeError: linear is not a ``torch.nn.Linear``. ValueError: tau is negative or not finite, a weight is not
        finite, or tau > 0 and the weights of a class are all zero, overflow or underflow.
    Source:
        Kang et al. 2020, section 4 (arXiv:1910.09217).

    >>> linear = torch.nn.Linear(2, 1)
    >>> _ = linear.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> tau_normalized(linear, tau=1.0).weight.tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    instance(nn.Linear, linear=linear)
    tau = number("tau", tau, low=0)
    weight = on_host("weight", linear.weight)
    finite(weight=weight)
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64)
    zero = torch.nonzero(norms[:, 0] == 0).flatten().tolist()
    got, fix = f"zeros for {zero[:10]} ({len(zero)} in all)", "Train the head first, or pass tau=0."
    require(not zero or tau == 0, "every class must have a weight that is not zero", got=got, fix=fix)
    scaled = (weight.double() / norms.pow(tau)).to(weight.dtype) if tau > 0 else weight.clone()
    vanished = scaled.abs().amax(1) < torch.finfo(weight.dtype).tiny
    fits = bool(scaled.isfinite().all()) and not (tau > 0 and bool(vanished.any()))
    require(fits, f"w / ||w||^tau must fit into {weight.dtype}", got=f"tau = {tau:g}", fix="Lower tau.")
    return linear_of(scaled.to(linear.weight.device), None, trainable=True).train(linear.training)


class ScaledHead(SoundModule):
    r"""Learnable weight scaling (LWS): scores :math:`f_i\, w_i \cdot z + b_i` with one learned scale per class.

    Weights and bias are frozen. Train the scales with class-balanced sampling on frozen features. Dtypes are those of
    :class:`~dir_toolkit.heads.linear.LinearHead`.

    Args:
        linear: the trained classifier, which is copied.
    Attributes:
        scale: (C,), initially one. linear: the frozen copy, part of the ``state_dict``.
    Shape:
        forward: features (N, D). Returns (N, C).
    Source:
        Kang et al. 2020, section 4 (arXiv:1910.09217).

    >>> head = ScaledHead(LinearHead(64, 10))
    >>> [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    ['scale']
    """

    @torch.inference_mode(False)  # buffers must be usable in training
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        instance(nn.Linear, linear=linear)
        self.num_features, self.num_classes = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.linear = linear_of(linear.weight.detach().clone(), bias, trainable=False)
        self.scale = nn.Parameter(torch.ones_like(self.linear.weight[:, 0]))

    def forward(self, features: Tensor) -> Tensor:
        checked_features(features, self.num_features)
        weight, bias = self.linear.weight, self.linear.bias
        same_device(weight=weight, features=features)
        scores = linear_scores(features, weight, None) * self.scale
        return scores if bias is None else scores + bias

    @property
    def settings(self) -> dict[str, Any]:
        """The frozen classifier's sizes."""
        return {"linear": {"weight": self.linear.weight, "bias": self.linear.bias}}
