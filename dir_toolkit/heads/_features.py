"""What every head does with the features it is given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import is_tensor, problem, real, wide_dtype
from ..errors import ShapeError


def checked_features(features: Tensor, num_features: int) -> Tensor:
    """``features`` if they are real numbers of shape (N, ``num_features``)."""
    is_tensor(features=features)
    real(features=features)
    if features.ndim != 2 or features.shape[1] != num_features:
        fix = "Use features.flatten(1)." if features.ndim > 2 else ""
        if features.ndim > 2 and features.shape[-1] == num_features:
            fix = f"Use features.flatten(0, {features.ndim - 2})."
        rule = f"features must be (N, {num_features})"
        raise problem(rule, got=tuple(features.shape), fix=fix, error=ShapeError)
    return features


def linear_scores(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in at least float32, or what autocast makes of that."""
    dtype = wide_dtype(features, weight)
    return F.linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast, where it is on, is off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) scaled to length one. A row shorter than 1e-12 becomes zero and has the gradient zero."""
    # Squares of large numbers overflow. The result does not depend on the size, and so has no gradient by it.
    size = rows.detach().abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows / size
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    there = norm * size > 1e-12
    return rows * torch.where(there, 1 / torch.where(there, norm, 1.0), 0.0)


def squared_distances(features: Tensor, points: Tensor) -> Tensor:
    """Squared Euclidean distances (N, P) of features (N, D) to points (P, D), by one matrix product."""
    partial = torch.addmm(points.square().sum(1), features, points.t(), alpha=-2)
    return (partial + features.square().sum(1, keepdim=True)).clamp_min(0)
