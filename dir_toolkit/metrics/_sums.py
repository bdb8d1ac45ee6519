"""The base of all metrics: sums on the device of the samples, which add up over objects and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import (
    classes_exist,
    instance,
    integers,
    is_tensor,
    not_empty,
    on_one_device,
    one_of,
    real,
    require,
    same_device,
)
from .._numerics import is_wrapped, readable
from .._ranks import check_group, summed
from .._settings import shown
from ..errors import LabelError
from ..labels.bins import MISSING, OUTSIDE, Missing, Outside
from ..labels.grid import AnyBins

_Sums = TypeVar("_Sums", bound="MergingSums")


class MergingSums(ABC):
    """A metric whose state is tensors of sums."""

    kept: ClassVar[tuple[str, ...]]
    """The names of these tensors."""

    refused: Tensor
    """(2,) int64, in classes that have it: the numbers of invalid targets and of invalid predictions on an
    accelerator."""

    def __init__(self, outside: Outside, missing: Missing = "raise") -> None:
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        self.outside, self.missing = outside, missing

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.settings)})"

    def fresh(self: _Sums) -> _Sums:
        """An empty object with the same settings."""
        return type(self)(**self.settings)

    def merge(self: _Sums, other: _Sums) -> _Sums:
        """Add the samples of another object with the same settings, and return self."""
        instance(_own_kind(self), other=other)
        mine, theirs = self.settings, other.settings
        differ = [name for name in mine if not _equal(mine[name], theirs[name])]
        both = (shown({name: settings[name] for name in differ}) for settings in (mine, theirs))
        require(not differ, "both must have the same settings", got=" and ".join(both))
        with torch.inference_mode(False):
            for name in self.kept:
                own: Tensor = getattr(self, name)
                setattr(self, name, own + getattr(other, name).to(own.device))
        return self

    def all_reduce(self: _Sums, *, group: dist.ProcessGroup | None = None) -> _Sums:
        """Sum over the ranks of ``torch.distributed`` and return self. Without it this does nothing.

        All ranks must call this once, after their last update.

        Args:
            group: the ranks that saw different samples; None means all ranks. Tensor parallelism needs it.
        Raises:
            as ``compute``, on every rank. TypeError: ``group`` is not a process group.
        """
        check_group(group)
        with torch.inference_mode(False):
            sums = summed(*(getattr(self, name) for name in self.kept), group=group)
        for name, tensor in zip(self.kept, sums, strict=True):
            setattr(self, name, tensor)
        self._check_refused()
        return self

    def _begin(self, **shapes: tuple[int, ...]) -> None:
        """Set sums to zeros of these shapes, on the CPU until the first update."""
        with torch.inference_mode(False):
            for name, shape in shapes.items():
                dtype = torch.int64 if name in ("confusion", "refused") else torch.float64
                setattr(self, name, torch.zeros(shape, dtype=dtype, device="cpu"))

    def _ready(self, device: torch.device, *names: str) -> None:
        """Move the sums, or those with these names, to this device, as tensors that can be updated inside and outside
        of inference mode."""
        for name in names or self.kept:
            kept: Tensor = getattr(self, name)
            if kept.device != device or kept.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, kept.to(device, copy=True))

    def _check_refused(self) -> None:
        """Raise if invalid samples were counted on an accelerator."""
        targets, predictions = self.refused.tolist() if "refused" in self.kept else (0, 0)
        fix = "Remove or repair these samples, and measure again."
        rule = "every target must be a label of the axis"
        require(not targets, rule, got=f"{targets} that are not", fix=fix, error=LabelError)
        rule = "every prediction must be a bin, or scores that are not NaN"
        require(not predictions, rule, got=f"{predictions} that are not", fix=fix)


def check_samples(**tensors: Tensor) -> None:
    """Raise unless these are real tensors on one device with float64, outside of torch.func."""
    real(**tensors)
    on_one_device(**tensors)
    same_device(**tensors)
    for name, value in tensors.items():
        fix = f"Return {name} from the function (has_aux=True), and update afterwards."
        rule = "must not be called inside torch.func transforms, since sums cannot leave them"
        require(not is_wrapped(value), rule, fix=fix, error=RuntimeError)
        rule = f"{name} must be on a device with float64, which sums need"
        require(value.device.type != "mps", rule, got="mps", fix=f"Use {name}.cpu().")


def check_some(**tensors: Tensor) -> None:
    """Raise unless there is a sample."""
    is_tensor(**tensors)
    not_empty(**tensors)


def placed(bins: AnyBins, target: Tensor, outside: Outside, missing: Missing) -> tuple[Tensor, Tensor | None]:
    """The bin of each target, or -1 for ignored targets. On an accelerator invalid targets also get -1, and their
    number, () int64, is returned."""
    index = bins._index(target, outside, missing, "target", wait=False)
    return index, None if readable(target) else (index == -2).sum()


def class_indices(name: str, index: Tensor, num_classes: int) -> Tensor:
    """``index`` as int64 from 0 to ``num_classes`` - 1, and -1 for those that are invalid but not checked."""
    integers(**{name: index})
    classes = index.detach().long()
    classes_exist(name, classes, num_classes)
    return classes.masked_fill((classes < 0) | (classes >= num_classes), -1)


def _own_kind(metric: MergingSums) -> type:
    """The class of this package that its class is or inherits from."""
    return next(kind for kind in type(metric).__mro__ if kind.__module__.startswith(__package__))


def _equal(a: object, b: object) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else a == b  # type: ignore[arg-type]
