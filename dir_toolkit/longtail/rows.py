"""Samples of several steps or pixels, (N, T, ...), as rows (M, ...), and the way back."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from .._checks import real, same_device, shaped
from .readouts import LongTailOutput

_Output = TypeVar("_Output", bound=LongTailOutput | Tensor)


def as_rows(output: _Output, axes: int) -> tuple[_Output, torch.Size]:
    """What a model says, row by row, and the shape of its samples. ``axes`` are those of the scores of one row."""
    scores = output.scores if isinstance(output, LongTailOutput) else output
    shape = scores.shape[: max(scores.ndim - axes, 1)] if isinstance(scores, Tensor) else torch.Size()
    if len(shape) < 2:
        return output, shape
    if isinstance(output, LongTailOutput):
        rows: Any = LongTailOutput(output.loss, *(part.flatten(0, len(shape) - 1) for part in output[1:]))
    else:
        rows = output.flatten(0, len(shape) - 1)
    return rows, shape


def of_shape(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows (M, ...) as those of samples, (N, T, ...)."""
    return rows if len(shape) < 2 else rows.reshape(*shape, *rows.shape[1:])


def one_per_row(name: str, value: Tensor, shape: torch.Size, rows: Tensor | None = None) -> Tensor:
    """One value per row, (M,), of values (N, T), or of values (N,), which all steps of a sequence share. They must be
    on the device of ``rows``, if these are given."""
    real(**{name: value})
    if len(shape) > 1 and value.shape == shape[:1]:
        value = value.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)
    meaning = "one per sample" if len(shape) < 2 else f"one per step, or {tuple(shape[:1])}, one per sequence"
    if len(shape) < 2 and value.ndim == 2 and value.shape[1] > 1:
        meaning += ", where MultiTargetModel takes several targets"
    shaped(shape, meaning, **{name: value})
    if rows is not None:
        same_device(output=rows, **{name: value})
    return value.flatten()
