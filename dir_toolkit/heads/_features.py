"""Checks and helpers that all heads share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .._checks import problem, real
from .._numerics import wide_dtype


def checked_features(features: Tensor, num_features: int) -> Tensor:
    """Return ``features``, checked to be real numbers of shape (N, ``num_features``)."""
    real(features=features)
    if features.ndim != 2 or features.shape[1] != num_features:
        fix = "Use features.flatten(1)." if features.ndim > 2 else ""
        if features.ndim > 2 and features.shape[-1] == num_features:
            fix = f"Use features.flatten(0, {features.ndim - 2})."
        raise problem(f"features must be (N, {num_features})", got=features.shape, fix=fix)
    return features


def linear_scores(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in at least float32, or in the dtype of autocast."""
    dtype = wide_dtype(features, weight)
    return F.linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
