"""What is kept of the spread of features in each bin, and how features are carried by it."""

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
    """As in :class:`dir_toolkit.FDS`."""

    momentum: float = 0.9
    shrinkage: float | None = None
    clip: tuple[float, float] = (0.1, 10.0)
    map: Map = "transport"
    rank: int = 32


def blend(old: Tensor, new: Tensor, present: Tensor, momentum: float) -> Tensor:
    """``momentum * old + (1 - momentum) * new`` in the bins (B,) that are present, and ``new`` alone where ``old`` is
    NaN."""
    mixed = torch.where(old.isnan(), new, momentum * old + (1 - momentum) * new)
    return torch.where(per_bin(present, old), mixed, old)


def per_bin(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as (B, 1, ...), so that they broadcast against ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def unknown(*shape: int, device: torch.device) -> Tensor:
    """Statistics of which nothing is known."""
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device)


class BinCovariance(Float64Module, ABC):
    """Running covariances of B bins, and the maps that carry features to the smoothed ones.

    The maps have one row per bin, and a last row for samples without a bin, which leaves features alone. :meth:`begin`
    makes the buffers.
    """

    form: str
    shift: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings, *, shrinkage: float) -> None:
        super().__init__()
        self.num_bins, self.num_features, self.settings = num_bins, num_features, settings
        self.shrinkage = shrinkage if settings.shrinkage is None else settings.shrinkage
        self._cast: dict[torch.dtype, list[Tensor]] = {}

    def begin(self, device: torch.device) -> None:
        """Make all buffers on a device, as before any sample."""
        shape = (self.num_bins + 1, self.num_features)
        self._add_map("shift", torch.zeros(shape, dtype=torch.float64, device=device))
        self._cast.clear()

    def extra_repr(self) -> str:
        return f"clip={self.settings.clip}, shrinkage={self.shrinkage}"

    def _add_map(self, name: str, value: Tensor) -> None:
        """Add a buffer that :meth:`refresh` makes from the running statistics. It is therefore not saved with them."""
        self.register_buffer(name, value, persistent=False)

    @abstractmethod
    def moments(self, device: torch.device | None = None) -> Any:
        """An object that gathers the features of an epoch, on a device, or on that of the maps."""

    @abstractmethod
    def fold(self, moments: Any, group: ProcessGroup | None) -> None:
        """Mix the covariances of an epoch, summed over the ranks of a group, into the running ones."""

    @abstractmethod
    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        """The running covariances after shrinkage, and those smoothed over bins."""

    @abstractmethod
    def refresh(self, statistics: dict[str, Tensor]) -> None:
        """Make the maps from all statistics, means included."""

    @abstractmethod
    def calibrate(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        """Features in their own form and dtype, each sample carried by the map of its row, as in ``as_rows``."""

    def _blend(self, old: Tensor, new: Tensor, count: Tensor) -> Tensor:
        return blend(old, new, count > 1, self.settings.momentum)

    def _shrunk(self, values: Tensor, count: Tensor) -> Tensor:
        """Covariances (B, ...) that as many pseudo-samples as ``shrinkage`` says have pulled towards the pooled one."""
        if self.shrinkage == 0:
            return values.clone()
        degrees = per_bin((count - 1).clamp_min(0), values)
        known = values.nan_to_num()
        pooled = (degrees * known).sum(0) / degrees.sum()
        shrunk = (degrees * known + self.shrinkage * pooled) / (degrees + self.shrinkage)
        return torch.where(per_bin(count > 0, values), shrunk, torch.nan)

    def _tables(self, features: Tensor, *names: str) -> list[Tensor]:
        """The maps in the dtype in which these features are carried."""
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
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
        """Nothing is left to do here, since the FDS that this is a part of has loaded it."""


class DiagonalCovariance(BinCovariance):
    """One variance per feature in each bin."""

    form = "diagonal"
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
        self.scale[:-1] = scale
        self.shift[:-1] = shift
        self._cast.clear()

    def calibrate(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        flat = rows.flatten().to(features.device)
        scale, shift = (table.index_select(0, flat) for table in self._tables(features, "scale", "shift"))
        wide = features.to(scale.dtype)
        if features.ndim > 2:
            scale, shift = (beside(features, t.view(*rows.shape, self.num_features), axis) for t in (scale, shift))
            return torch.addcmul(shift, wide, scale).to(features.dtype)
        # This writes into the shift that was just gathered. It saves an allocation, which takes most of the time.
        return shift.addcmul_(wide, scale).to(features.dtype)
