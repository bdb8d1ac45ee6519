"""Helpers for losses of pairs of samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numerics import wide_dtype
from .._ranks import summed


def pairs_of(features: Tensor, gone: Tensor | None) -> Tensor:
    """The mask (N, N) of pairs: two different samples, neither of which is ``gone``."""
    pairs = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    return pairs if gone is None else pairs & ~gone & ~gone[:, None]


def label_dtype(target: Tensor) -> torch.dtype:
    """The dtype for distances of labels: wide enough for whole numbers beyond those of float32, as in time stamps."""
    whole = not target.is_floating_point() and target.device.type != "mps"
    return torch.float64 if whole else wide_dtype(target)


def rounding_of(labels: Tensor, given: Tensor) -> Tensor:
    """A bound (N, N) of how much rounding changes the distance of two labels (N,) or (N, K), in the dtype in which they
    were given. It is 0 if all labels are whole numbers."""
    labels = labels.detach().reshape(len(labels), -1)
    size = labels.abs().amax(1)
    eps = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
    bound = 2 * labels.shape[1] * eps * torch.maximum(size[:, None], size)
    return torch.where((labels == labels.round()).all(), 0.0, bound)


def spread_of(labels: Tensor, weight: Tensor | None, *, ranks: bool = False) -> Tensor:
    """The standard deviation of labels (N,), or its mean over the D dimensions of labels (N, D), as (). It is NaN if
    all labels are equal. Labels of weight zero must be zero.
    """
    dtype, labels = labels.dtype, labels.reshape(len(labels), -1)
    if labels.device.type != "mps":
        labels = labels.double()  # squares of large or small numbers leave float32
    share = torch.ones_like(labels[:, :1]) if weight is None else weight.to(labels.dtype)[:, None]

    def mean(values: Tensor) -> Tensor:
        sums = torch.cat([(share * values).sum(0), share.sum()[None]])
        sums = summed(sums)[0] if ranks else sums
        return sums[:-1] / sums[-1]

    variance = mean((labels - mean(labels)).square()).mean()
    return torch.where(variance > 0, variance, math.nan).sqrt().to(dtype)
