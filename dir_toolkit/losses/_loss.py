"""The reduction of losses, and the module around a loss function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .._checks import one_of, problem, require
from .._numerics import wide_dtype
from .._settings import shown
from .._state import SoundModule, WideBuffers
from ..labels.bins import MISSING

Reduction = Literal["none", "mean", "sum"]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def reduce(values: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Multiply values by weights and reduce them."""
    if weight is not None:
        values = values * (weight if weight.dtype == values.dtype else weight.to(values.dtype))
    return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()


def drops_missing(label: Literal["number", "row", "shares"]) -> Callable[[_Function], _Function]:
    """Make a loss heed its ``missing``: under ``"drop"`` labels that are missing have weight zero, and the mean is over
    the others. All is done by masks, so that no accelerator is waited for.

    Args:
        label: what of the target is one label: each number of it; a row of numbers, of which any may be missing; or a
            distribution, which is missing where it holds NaN or only zeros.
    """

    def around(loss: _Function) -> _Function:
        place = list(signature(loss).parameters).index("weight")

        @wraps(loss)
        def dropping(*args: Any, missing: Any = "raise", **options: Any) -> Tensor:
            if (isinstance(missing, str) and missing == "raise") or len(args) > place + 1:
                return loss(*args, **options)
            if not (isinstance(missing, str) and missing in MISSING):
                rule = f"missing must be one of {', '.join(map(repr, MISSING))}"
                raise problem(rule, got=repr(missing), source=loss.__name__)
            target = args[place - 1] if len(args) >= place else options.get("target")
            weight = args[place] if len(args) > place else options.pop("weight", None)
            there = _present_labels(target, label)
            if target is None or there is None or not (weight is None or _fits(weight, there)):
                return loss(*args[:place], weight=weight, **options)  # which says what is wrong
            one = torch.ones_like(there, dtype=wide_dtype(target)) if weight is None else weight
            value = loss(*args[:place], weight=torch.where(there, one, torch.zeros_like(one)), **options)
            if options.get("reduction", "mean") != "mean":
                return value
            return value * there.numel() / there.sum().clamp_min(1)

        return dropping  # type: ignore[return-value]

    return around


def _present_labels(target: Any, label: str) -> Tensor | None:
    """Which labels are there; None where the target is no tensor of floats, of which none can be missing."""
    if not (isinstance(target, Tensor) and target.is_floating_point() and target.layout == torch.strided):
        return None
    gone = target.isnan()
    if label == "shares" and target.ndim > 0:
        gone = (gone | (target == 0)).all(-1) | gone.any(-1)
    elif label == "row" and target.ndim > 1:
        gone = gone.flatten(1).any(1)
    return ~gone


def _fits(weight: Any, there: Tensor) -> bool:
    plain = isinstance(weight, Tensor) and weight.layout == torch.strided and weight.dtype != torch.bool
    return plain and weight.shape == there.shape and weight.device == there.device


def part_of(output: Any, name: str) -> Tensor:
    """The output itself if it is a tensor, else its attribute ``name``."""
    if isinstance(output, Tensor):
        return output
    rule = f"output must be a torch.Tensor, or hold one as {name}"
    require(hasattr(output, name), rule, got=type(output), fix="Use torch.as_tensor(output).")
    return held(output, name)


def held(output: Any, name: str) -> Tensor:
    """The tensor in the attribute ``name`` of an output."""
    value = getattr(output, name, None)
    came, fix = type(output if value is None else value), f"Let the model also return its {name}."
    if not isinstance(value, Tensor):
        raise problem(f"output must hold a torch.Tensor as {name}", got=came, fix=fix)
    return value


class Loss(WideBuffers, SoundModule):
    """A loss as a module: its constructor takes the options of ``function``, and a call gives the mean over the batch.

    Options that are tensors become buffers, which are not rounded where a model is cast to half precision.
    """

    reads: ClassVar[str]  # the attribute to read from an output that is not a tensor

    @torch.inference_mode(False)  # buffers must be usable in training
    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        one_of("missing", options.get("missing", "raise"), MISSING)
        self.function, self._options = function, tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value.detach().clone())
            else:
                setattr(self, name, value)

    def forward(self, output: Any, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._reduced(output, target, weight, "mean")

    def _reduced(self, output: Any, target: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
        return self.function(part_of(output, self.reads), target, weight, reduction=reduction, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:  # modules among the options appear as children
        return shown({name: value for name, value in self.settings.items() if not isinstance(value, nn.Module)})


class PointLoss(Loss):
    """A loss of predictions in label units."""

    reads = "prediction"


class ScoreLoss(Loss):
    """A loss of scores, one per class or bin."""

    reads = "scores"


class FeatureLoss(Loss):
    """A loss of features, one row per sample."""

    reads = "features"
