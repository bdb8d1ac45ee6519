"""Covariances of features per bin, and the maps to the smoothed statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._numerics import keepable
from .._state import Float64Module
from .maps import Map, diagonal_map
from .moments import BinMoments
from .rows import beside

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BinCovariance", "DiagonalCovariance", "Settings", "Smooth", "blend", "per_bin", "unknown"]

Smooth = Callable[[Tensor], Tensor]


class Settings(NamedTuple):
    """The arguments of :class:`dir_toolkit.FDS` that covariances need."""

    momentum: float = 0.9
    shrinkage: float | None = None
    clip: tuple[float, float] = (0.1, 10.0)
    map: Map = "transport"
    rank: int = 32


def blend(old: Tensor, new: Tensor, present: Tensor, momentum: float) -> Tensor:
    """``momentum * old + (1 - momentum) * new`` in the bins (B,) that are present, or ``new`` where ``old`` is NaN."""
    mixed = torch.where(old.isnan(), new, momentum * old + (1 - momentum) * new)
    return torch.where(per_bin(present, old), mixed, old)


def per_bin(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as (B, 1, ...), to broadcast against ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def unknown(*shape: int, device: torch.device) -> Tensor:
    """Statistics that are not known yet: NaN."""
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device)


class BinCovariance(Float64Module, ABC):
    """Running covariances of B bins, and the maps from them to the smoothed statistics.

    The maps have one row per bin, and a last row, the identity, for samples without a bin. :meth:`begin` creates the
    buffers.

    Attributes:
        identities: the number of last rows that are the identity. With two, rows need no clamp.
    """

    form: str
    identities = 1
    shift: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings, *, shrinkage: float) -> None:
        super().__init__()
        self.num_bins, self.num_features, self.settings = num_bins, num_features, settings
        self.shrinkage = shrinkage if settings.shrinkage is None else settings.shrinkage
        self._cast: dict[torch.dtype, list[Tensor]] = {}

    def begin(self, device: torch.device) -> None:
        """Create empty buffers on a device."""
        shape = (self.num_bins + self.identities, self.num_features)
        self._add_map("shift", torch.zeros(shape, dtype=torch.float64, device=device))
        self._cast.clear()

    def extra_repr(self) -> str:
        return f"clip={self.settings.clip}, shrinkage={self.shrinkage}"

    def _add_map(self, name: str, value: Tensor) -> None:
        """Add a buffer that :meth:`refresh` computes from the running statistics, and that is not saved."""
        self.register_buffer(name, value, persistent=False)

    @abstractmethod
    def moments(self, device: torch.device | None = None) -> Any:
        """An object that accumulates the features of an epoch, on a device or on that of the maps."""

    @abstractmethod
    def fold(self, moments: Any, group: ProcessGroup | None) -> None:
        """Update the running covariances with those of an epoch, merged over the ranks of a group."""

    @abstractmethod
    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        """The running covariances after shrinkage, and the smoothed covariances."""

    @abstractmethod
    def refresh(self, statistics: dict[str, Tensor]) -> None:
        """Compute the maps from all statistics, including means."""

    @abstractmethod
    def calibrate(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        """The calibrated features: each sample is mapped by the map of its row, of :meth:`Bins.rows`. Other arguments
        are as in ``as_rows``."""

    def _blend(self, old: Tensor, new: Tensor, count: Tensor) -> Tensor:
        return blend(old, new, count > 1, self.settings.momentum)

    def _shrunk(self, values: Tensor, count: Tensor) -> Tensor:
        """Covariances (B, ...), shrunk towards the pooled covariance by ``shrinkage`` pseudo-samples."""
        if self.shrinkage == 0:
            return values.clone()
        degrees = per_bin((count - 1).clamp_min(0), values)
        known = values.nan_to_num()
        pooled = (degrees * known).sum(0) / degrees.sum()
        shrunk = (degrees * known + self.shrinkage * pooled) / (degrees + self.shrinkage)
        return torch.where(per_bin(count > 0, values), shrunk, torch.nan)

    def _tables(self, features: Tensor, *names: str) -> list[Tensor]:
        """The maps in the dtype to compute with for these features."""
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling():
            return [getattr(self, name).to(dtype) for name in names]
        if dtype in self._cast:
            return self._cast[dtype]
        with torch.inference_mode(False):
            tables = [getattr(self, name).to(dtype) for name in names]
        if all(map(keepable, tables)):
            self._cast[dtype] = tables
        return tables

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._cast.clear()
        return super()._apply(fn)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Do nothing, since the FDS that contains this module has loaded its buffers."""


class DiagonalCovariance(BinCovariance):
    """One variance per feature in each bin."""

    form = "diagonal"
    identities = 2
    running_variance: Tensor
    scale: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings) -> None:
        super().__init__(num_bins, num_features, settings, shrinkage=0.0)

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        self.register_buffer("running_variance", unknown(self.num_bins, self.num_features, device=device))
        self._add_map("scale", torch.ones_like(self.shift))

    def moments(self, device: torch.device | None = None) -> BinMoments:
        return BinMoments(self.num_bins, self.num_features, device=device or self.shift.device)

    def fold(self, moments: BinMoments, group: ProcessGroup | None) -> None:
        self.running_variance = self._blend(self.running_variance, moments.variance(), moments.count)

    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        variance = self._shrunk(self.running_variance, count)
        return {"variance": variance, "smoothed_variance": smooth(variance)}

    def refresh(self, statistics: dict[str, Tensor]) -> None:
        names = ("mean", "variance", "smoothed_mean", "smoothed_variance")
        scale, shift = diagonal_map(*(statistics[name] for name in names), clip=self.settings.clip)
        self.scale[: self.num_bins] = scale
        self.shift[: self.num_bins] = shift
        self._cast.clear()

    def reset(self) -> None:
        """Make the maps the identity."""
        self.scale.fill_(1)
        self.shift.zero_()
        self._cast.clear()

    def calibrate(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        flat = (rows if rows.ndim == 1 else rows.flatten()).to(features.device)
        scales, shifts = self._tables(features, "scale", "shift")
        scale, shift = scales.index_select(0, flat), shifts.index_select(0, flat)
        wide = features if features.dtype == scale.dtype else features.to(scale.dtype)
        if features.ndim > 2:
            scale, shift = (beside(features, t.view(*rows.shape, self.num_features), axis) for t in (scale, shift))
            mapped = torch.addcmul(shift, wide, scale)
        else:  # in place, since an allocation would take most of the time
            mapped = shift.addcmul_(wide, scale)
        return mapped if wide is features else mapped.to(features.dtype)
