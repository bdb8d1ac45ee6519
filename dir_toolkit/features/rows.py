"""Convert features of any layout to rows, one per label, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

__all__ = ["Channels", "as_rows", "beside"]

Channels = Literal["first", "last"]


def as_rows(features: Tensor, index: Tensor, axis: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Features as rows (M, D), the index of each row, (M,), and a function that converts rows back.

    Shape:
        features: (N, ...), with D channels in ``axis``. index: (N,), or the shape of the features without ``axis``, or
            any number of its first axes. Steps or pixels of the other axes share an index.
    """
    last = features.movedim(axis, -1)  # (N, ..., D)
    of_each = index.view(*index.shape, *[1] * (last.ndim - 1 - index.ndim)).expand(last.shape[:-1])
    return last.flatten(0, -2), of_each.flatten(), lambda rows: rows.view(last.shape).movedim(-1, axis)


def beside(features: Tensor, values: Tensor, axis: int) -> Tensor:
    """Values (..., D), one row per label, reshaped to broadcast against features of :func:`as_rows`."""
    ones = [1] * (features.ndim - values.ndim)
    return values.view(*values.shape[:-1], *ones, values.shape[-1]).movedim(-1, axis)
