"""What all metrics have in common: sums of what was seen, kept on its device, which add up over objects and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import instance, label_problem, problem
from .._memory import free_memory
from .._numerics import is_wrapped, readable
from .._ranks import check_group, summed
from .._settings import shown
from ..labels.bins import Outside
from ..labels.grid import AnyBins

_Metric = TypeVar("_Metric", bound="MergingSums")


class MergingSums(ABC):
    """A metric whose state is tensors that add up.

    On an accelerator nothing that an update is handed is looked at, since that would stop it: what must be refused is
    counted there, and told by the first call that looks at results.
    """

    kept: ClassVar[tuple[str, ...]]
    """The names of the tensors."""

    refused: Tensor
    """(2,) int64, of those that count: targets without a bin, and predictions that name none, on an accelerator."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it was made with, by argument."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.settings)})"

    def fresh(self: _Metric) -> _Metric:
        """One of the same settings that has seen nothing."""
        return type(self)(**self.settings)

    def merge(self: _Metric, other: _Metric) -> _Metric:
        """Add what another object of the same settings has seen; returns self."""
        instance(_own_kind(self), other=other)
        mine, theirs = self.settings, other.settings
        differ = [name for name in mine if not _equal(mine[name], theirs[name])]
        if differ:
            both = (shown({name: settings[name] for name in differ}) for settings in (mine, theirs))
            raise problem("both must have the same settings", got=" and ".join(both))
        with torch.inference_mode(False):
            for name in self.kept:
                own: Tensor = getattr(self, name)
                setattr(self, name, own + getattr(other, name).to(own.device))
        return self

    def all_reduce(self: _Metric, *, group: dist.ProcessGroup | None = None) -> _Metric:
        """Sum over the ranks of ``torch.distributed``, which must all call this, once, after their last update; returns
        self. Does nothing outside of it.

        Args:
            group: the ranks that saw different samples, where some saw the same ones, as in tensor parallelism; None
                for all ranks.
        Raises:
            as ``compute``, on every rank alike. TypeError: ``group`` is no process group.
        """
        check_group(group)
        with torch.inference_mode(False):
            sums = summed(*(getattr(self, name) for name in self.kept), group=group)
        for name, tensor in zip(self.kept, sums, strict=True):
            setattr(self, name, tensor)
        self._check_refused()
        return self

    def _begin(self, **shapes: tuple[int, ...]) -> None:
        """Zeros, of float64 where the name is not one of a count. On the CPU until the first update."""
        with torch.inference_mode(False):
            for name, shape in shapes.items():
                dtype = torch.int64 if name in ("confusion", "refused") else torch.float64
                setattr(self, name, torch.zeros(shape, dtype=dtype, device="cpu"))

    def _ready(self, device: torch.device) -> None:
        """Sums on this device, and such as can be added to inside and outside of inference mode."""
        for name in self.kept:
            kept: Tensor = getattr(self, name)
            if kept.device != device or kept.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, kept.to(device, copy=True))

    def _check_refused(self) -> None:
        """Raise for what was counted on an accelerator."""
        if "refused" not in self.kept:
            return
        targets, predictions = self.refused.tolist()
        fix = "Remove or repair these samples, and measure again."
        if targets:
            rule = "every target must be a label of the axis"
            raise label_problem(rule, got=f"{targets} that are not", fix=fix)
        if predictions:
            rule = "every prediction must be a bin, or scores that are not NaN"
            raise problem(rule, got=f"{predictions} that are not", fix=fix)


def check_tensors(**tensors: Tensor) -> None:
    """Plain tensors whose values sums kept elsewhere can take in, on a device that knows float64."""
    for name, value in tensors.items():
        if not torch.compiler.is_compiling() and is_wrapped(value):
            raise problem(
                "must not be called inside torch.func transforms, out of which sums cannot be carried",
                fix=f"Return {name} from the function (has_aux=True), and update afterwards.",
                error=RuntimeError,
            )
        if hasattr(value, "full_tensor"):
            raise problem(
                f"{name} must be a plain tensor",
                got=f"a {type(value).__name__}",
                fix=f"Use {name}.full_tensor(), or {name}.to_local() on each rank and all_reduce() in the end.",
                error=TypeError,
            )
        if value.device.type == "mps":
            raise problem(
                f"{name} must be on a device that knows float64, in which sums are kept",
                got="mps",
                fix=f"Use {name}.cpu().",
            )


def check_memory(what: str, needed: int, fix: str) -> None:
    """Before so many bytes are taken, where they are many."""
    free = free_memory() if needed > 2**28 else None
    if free is not None and needed > free:
        rule = f"{what} takes {needed / 2**30:.1f} GiB, which must be free"
        raise problem(rule, got=f"{free / 2**30:.1f} GiB", fix=fix)


def placed(bins: AnyBins, target: Tensor, outside: Outside) -> tuple[Tensor, Tensor | None]:
    """The bin of each target, -1 where it has none; and how many are refused, () int64, where values are not looked at
    and so nothing is raised."""
    if readable(target):
        return bins.index(target, outside, name="target"), None
    index = bins.index(target, "drop" if outside == "raise" else outside, name="target")
    # What "drop" leaves out may be NaN as well, which is refused.
    sound = bins.index(target, "clip", name="target") if outside == "drop" else index
    return index, (sound < 0).sum()


def _own_kind(metric: MergingSums) -> type:
    """The class of this package, which subclasses of others share."""
    return next(kind for kind in type(metric).__mro__ if MergingSums in kind.__bases__)


def _equal(a: object, b: object) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else a == b  # type: ignore[arg-type]
