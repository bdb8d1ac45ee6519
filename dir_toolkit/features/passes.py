"""The bins of each forward, for activation checkpointing, which runs a part of the forward again in backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import problem
from .._numerics import is_wrapped, wide_dtype

__all__ = ["Pass", "Passes", "in_backward"]

_MOST, _MOST_NUMBERS = 256, 2**24  # of passes that are kept, and of numbers in them
_ALIKE, _APART = 1e-2, 10.0  # features run again differ by less than this share; those of other passes by so much more


@dataclass(eq=False)
class Pass:
    """One run of a hook: what tells its features from others, and the row of each sample, None for those that pass
    untouched."""

    hook: object
    shape: torch.Size
    mark: Tensor
    row: Tensor | None
    maps: int | None
    """Which maps carried the features; None if they passed untouched."""
    repeated: bool = False
    over: bool = False
    """Whether backward had come to it before a later forward, so that others are more likely to be repeated."""


class Passes:
    """The latest forwards that activation checkpointing may repeat, found again by their features.

    A checkpoint drops what it has computed and runs the same code again, in any order, as often as need be, without a
    word on which forward it repeats. It computes the same features, which no other forward has.
    """

    def __init__(self) -> None:
        self._kept: list[Pass] = []

    def keep(self, hook: object, features: Tensor, row: Tensor | None, maps: int | None) -> None:
        """Note a forward, if a checkpoint may be around it."""
        if not _may_be_repeated() or is_wrapped(features):
            return
        for kept in self._kept:
            kept.over = kept.repeated
        self._kept.append(Pass(hook, features.shape, _mark(features), row, maps))
        numbers = 0
        for first in range(len(self._kept) - 1, -1, -1):
            kept = self._kept[first]
            numbers += kept.mark.numel() + (0 if kept.row is None else kept.row.numel())
            if numbers > _MOST_NUMBERS or len(self._kept) - first > _MOST:
                del self._kept[: min(first + 1, len(self._kept) - 2)]
                break

    def find(self, hook: object, features: Tensor, maps: int, *, must: bool) -> Pass | None:
        """The forward that is being repeated. This waits for an accelerator.

        Raises:
            UsageError: it ``must`` be known and is not, or two forwards of equal features had other labels.
        """
        mark = _mark(features)
        same = [kept for kept in self._kept if kept.hook is hook and kept.shape == features.shape]
        same = [kept for kept in same if kept.mark.device == mark.device and kept.mark.dtype == mark.dtype]
        if same and not mark.numel():
            return same[-1]
        if same:
            marks = torch.stack([kept.mark for kept in same])
            equal = (marks == mark) | (marks.isnan() & mark.isnan())
            away = torch.where(equal, 0.0, (marks - mark).abs()).nan_to_num(torch.inf).flatten(1).amax(1)
            size = mark.abs().amax()
            *aways, scale = torch.cat([away, size[None]]).tolist()
            least = min(aways)
            if least == 0 or least <= _ALIKE * scale:
                near = [kept for kept, far in zip(same, aways, strict=True) if far <= _APART * least]
                near = [kept for kept in near if not kept.over] or near
                near = [kept for kept in near if kept.maps in (None, maps)] or near
                broken = scale - scale != 0  # so that no gradient can be right
                if broken or all(_equal(kept.row, near[0].row) for kept in near):
                    near[-1].repeated = True
                    return near[-1]
                raise problem(
                    "with activation checkpointing forwards of one backward must differ in their features where they "
                    "differ in their labels",
                    got="two of equal features and other labels",
                    fix="Run backward after each of them, or attach to a part that is not checkpointed.",
                    error=RuntimeError,
                )
        if not must:
            return None
        raise problem(
            "with activation checkpointing backward must compute the features of a forward again",
            got="others than those of the latest forwards" if self._kept else "no forward within a checkpoint",
            fix="Keep the checkpoint's preserve_rng_state=True and the model in training mode until then, or attach to "
            "a part that is not checkpointed.",
            error=RuntimeError,
        )


def in_backward() -> bool:
    """Whether autograd is running, within which it is activation checkpointing that runs a module."""
    return torch._C._current_graph_task_id() != -1


def _may_be_repeated() -> bool:
    """A checkpoint of one kind runs the forward without gradients, one of the other holds what autograd saves."""
    if torch.is_inference_mode_enabled():
        return False
    holders = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return not torch.is_grad_enabled() or holders is None or holders(False) is not None


@torch.no_grad()
def _mark(features: Tensor) -> Tensor:
    """A number per sample that hangs on each of its features, (N,)."""
    x = features.detach().to(wide_dtype(features)).movedim(1, -1)
    weights = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).cos_()
    return (x * weights).flatten(1).sum(1)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))
