"""Support for activation checkpointing, which runs a part of the forward again in backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import problem
from .._numerics import is_wrapped, wide_dtype

__all__ = ["Pass", "Passes", "around_graph", "in_backward"]

_MOST, _MOST_NUMBERS = 256, 2**24  # the largest numbers of recorded passes, and of values in them
_ALIKE = 1e-2  # recomputed features differ by less than this share of their size
_APART = 10.0  # features of other passes differ by at least this many times as much


@dataclass(eq=False)
class Pass:
    """One run of a hook, identified by the ``mark`` of its features."""

    hook: object
    shape: torch.Size
    mark: Tensor
    rows: Tensor | None
    """The row of each sample; None if the features had no labels."""
    maps: int | None
    """The number of the maps that were applied; None if features were not calibrated."""
    repeated: bool = False
    over: bool = False
    """Whether backward repeated it before a later forward, so that other passes are more likely matches."""


class Passes:
    """The latest forwards, which activation checkpointing may repeat.

    A checkpoint runs the same code again, in any order and any number of times, without saying which forward it
    repeats. The forward is identified by its features, which are the same up to rounding.
    """

    def __init__(self) -> None:
        self._kept: list[Pass] = []

    def keep(self, hook: object, features: Tensor, rows: Tensor | None, maps: int | None) -> None:
        """Record a forward if there may be a checkpoint around it."""
        if not _may_be_repeated() or is_wrapped(features):
            return
        for kept in self._kept:
            kept.over = kept.repeated
        self._kept.append(Pass(hook, features.shape, _mark(features), rows, maps))
        numbers = 0
        for first in range(len(self._kept) - 1, -1, -1):
            kept = self._kept[first]
            numbers += kept.mark.numel() + (0 if kept.rows is None else kept.rows.numel())
            if numbers > _MOST_NUMBERS or len(self._kept) - first > _MOST:
                del self._kept[: min(first + 1, len(self._kept) - 2)]
                break

    def find(self, hook: object, features: Tensor, maps: int, *, must: bool) -> Pass | None:
        """The forward that is repeated, or None if it is not known. This waits for an accelerator.

        Raises:
            UsageError: it ``must`` be known and is not, or two forwards with equal features had different labels.
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
                broken = scale - scale != 0  # features are not finite, so that gradients are wrong anyway
                if broken or all(_equal(kept.rows, near[0].rows) for kept in near):
                    near[-1].repeated = True
                    return near[-1]
                rule = "with activation checkpointing, forwards of one backward that differ in their labels must differ"
                fix = "Run backward after each of them, or attach to a part that is not checkpointed."
                got = "two with equal features and different labels"
                raise problem(f"{rule} in their features", got=got, fix=fix, error=RuntimeError)
        if not must:
            return None
        raise problem(
            "with activation checkpointing, backward must compute the features of a forward again",
            got="features of none of the latest forwards" if self._kept else "no forward within a checkpoint",
            fix="Keep the checkpoint's preserve_rng_state=True and the model in training mode until then, or attach to "
            "a part that is not checkpointed.",
            error=RuntimeError,
        )


def in_backward() -> bool:
    """Whether autograd is running. A module that runs then is run by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def around_graph() -> bool:
    """Whether activation checkpointing runs a compiled graph. Torch before 2.8 tells this in backward only."""
    holders = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return in_backward() or (holders is not None and holders(False) is not None)


around_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called when a graph is traced


def _may_be_repeated() -> bool:
    """Whether there may be a checkpoint. One kind runs the forward without gradients; the other kind uses hooks for
    saved tensors."""
    if torch.is_inference_mode_enabled():
        return False
    holders = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return not torch.is_grad_enabled() or holders is None or holders(False) is not None


@torch.no_grad()
def _mark(features: Tensor) -> Tensor:
    """One number per sample that depends on all of its features, (N,)."""
    x = features.detach().to(wide_dtype(features)).movedim(1, -1)
    weights = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).cos_()
    return (x * weights).flatten(1).sum(1)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))
