"""The spread of features in each bin, in three forms: what is kept of it, and how features are carried by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import problem
from .._memory import free_memory
from .._numerics import keepable
from .._ranks import is_parallel, reduce_device
from .calibration import Map, covariance_map, diagonal_map
from .moments import BinMoments, BinScatters, SubspaceMoments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BinCovariance",
    "DiagonalCovariance",
    "Float64Module",
    "FullCovariance",
    "LowRankCovariance",
    "Settings",
    "blend",
]

Smooth = Callable[[Tensor], Tensor]


class Settings(NamedTuple):
    """As in :class:`dir_toolkit.FDS`."""

    momentum: float = 0.9
    shrinkage: float | None = None
    clip: tuple[float, float] = (0.1, 10.0)
    map: Map = "transport"


def blend(old: Tensor, new: Tensor, present: Tensor, momentum: float) -> Tensor:
    """momentum * old + (1 - momentum) * new in the bins (B,) that are present; new alone where old is NaN."""
    mixed = torch.where(old.isnan(), new, momentum * old + (1 - momentum) * new)
    return torch.where(_a_bin(present, old), mixed, old)


def _a_bin(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to stand beside ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


class Float64Module(nn.Module):
    """A module whose buffers follow ``.to(device)`` and stay float64, whatever dtype it is cast to."""

    @torch.inference_mode(False)  # whose tensors training could not use
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        for child in self.children():
            child._apply(fn)
        return self


class BinCovariance(Float64Module, ABC):
    """Running covariances of B bins, and the maps that carry features to the smoothed ones.

    The maps have one row per bin, and a last one, for samples that have no bin, which leaves features alone.
    :meth:`begin` makes the buffers.
    """

    form: str
    shift: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings, *, shrinkage: float) -> None:
        super().__init__()
        self.num_bins, self.num_features, self.settings = num_bins, num_features, settings
        self.shrinkage = shrinkage if settings.shrinkage is None else settings.shrinkage
        self._cast: dict[torch.dtype, list[Tensor]] = {}

    def begin(self, device: torch.device) -> None:
        """Make all buffers, as of no sample, on a device."""
        shape = (self.num_bins + 1, self.num_features)
        self._map("shift", torch.zeros(shape, dtype=torch.float64, device=device))
        self._cast.clear()

    def extra_repr(self) -> str:
        return f"clip={self.settings.clip}, shrinkage={self.shrinkage}"

    def _map(self, name: str, value: Tensor) -> None:
        """A buffer that :meth:`refresh` makes from the running statistics, and so is not saved with them."""
        self.register_buffer(name, value, persistent=False)

    @abstractmethod
    def moments(self, device: torch.device | None = None) -> Any:
        """What gathers an epoch's features, on a device, or where the maps are."""

    @abstractmethod
    def fold(self, moments: Any, group: ProcessGroup | None) -> None:
        """Mix an epoch's covariances, summed over the ranks of a group, into the running ones."""

    @abstractmethod
    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        """Running covariances after shrinkage, and those smoothed over bins."""

    @abstractmethod
    def refresh(self, statistics: dict[str, Tensor]) -> None:
        """Make the maps from all statistics, means included."""

    @abstractmethod
    def calibrate(self, features: Tensor, row: Tensor) -> Tensor:
        """Features (N, D) or (N, D, H, W) carried by the map of the bin ``row``, (N,) or (N, H, W); same dtype."""

    def _blend(self, old: Tensor, new: Tensor, count: Tensor) -> Tensor:
        return blend(old, new, count > 1, self.settings.momentum)

    def _shrunk(self, values: Tensor, count: Tensor) -> Tensor:
        """Covariances (B, ...) pulled towards the pooled one by so many pseudo-samples."""
        if self.shrinkage == 0:
            return values.clone()
        degrees = _a_bin((count - 1).clamp_min(0), values)
        known = values.nan_to_num()
        pooled = (degrees * known).sum(0) / degrees.sum()
        shrunk = (degrees * known + self.shrinkage * pooled) / (degrees + self.shrinkage)
        return torch.where(_a_bin(count > 0, values), shrunk, torch.nan)

    def _tables(self, features: Tensor, *names: str) -> list[Tensor]:
        """Maps in the dtype in which features are carried."""
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
        """The FDS that this is a part of has loaded it, once all was checked."""


class DiagonalCovariance(BinCovariance):
    """A variance a feature."""

    form = "diagonal"
    running_variance: Tensor
    scale: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings) -> None:
        super().__init__(num_bins, num_features, settings, shrinkage=0.0)

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        self.register_buffer("running_variance", _unknown(self.num_bins, self.num_features, device=device))
        self._map("scale", torch.ones_like(self.shift))

    def moments(self, device: torch.device | None = None) -> BinMoments:
        return BinMoments(self.num_bins, self.num_features, device=device or self.shift.device)

    def fold(self, moments: BinMoments, group: ProcessGroup | None) -> None:
        self.running_variance = self._blend(self.running_variance, moments.variance(), moments.count)

    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        variance = self._shrunk(self.running_variance, count)
        return {"variance": variance, "smoothed_variance": smooth(variance)}

    def refresh(self, statistics: dict[str, Tensor]) -> None:
        s = statistics
        scale, shift = diagonal_map(
            s["mean"], s["variance"], s["smoothed_mean"], s["smoothed_variance"], clip=self.settings.clip
        )
        self.scale[:-1] = scale
        self.shift[:-1] = shift
        self._cast.clear()

    def calibrate(self, features: Tensor, row: Tensor) -> Tensor:
        flat = row.flatten().to(features.device)
        scale, shift = (table.index_select(0, flat) for table in self._tables(features, "scale", "shift"))
        wide = features.to(scale.dtype)
        if features.ndim == 4:
            shape = (*row.shape, self.num_features) if row.ndim == 3 else (len(row), 1, 1, self.num_features)
            scale, shift = scale.view(shape).movedim(3, 1), shift.view(shape).movedim(3, 1)
            return torch.addcmul(shift, wide, scale).to(features.dtype)
        # In place on the freshly gathered shift: one allocation less, which at 2,048 features is most of the time.
        return shift.addcmul_(wide, scale).to(features.dtype)


class _MatrixCovariance(BinCovariance):
    """What full and low rank share: a (K, K) covariance a bin, and maps that take features one row a sample."""

    running_covariance: Tensor
    matrix: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings, *, side: int) -> None:
        _check_memory(self.form, num_bins, num_features, side)
        super().__init__(num_bins, num_features, settings, shrinkage=float(side))
        self.side = side

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        self.register_buffer("running_covariance", _unknown(self.num_bins, self.side, self.side, device=device))

    def calibrate(self, features: Tensor, row: Tensor) -> Tensor:
        row, device = row.to(features.device), features.device.type
        autocast = torch.amp.is_autocast_available(device)  # which would take the products in half precision
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if features.ndim == 2:
                return self._carry(features, row).to(features.dtype)
            n, _, h, w = features.shape
            rows = row.flatten() if row.ndim == 3 else row.repeat_interleave(h * w)
            carried = self._carry(features.movedim(1, 3).flatten(0, 2), rows)  # (N * H * W, D)
            return carried.view(n, h, w, self.num_features).movedim(3, 1).to(features.dtype)

    def extra_repr(self) -> str:
        return f"{self.side} directions, map={self.settings.map!r}, {super().extra_repr()}"

    @abstractmethod
    def _carry(self, features: Tensor, row: Tensor) -> Tensor:
        """(N, D), in the dtype of the maps."""

    def _maps(self, covariance: Tensor, smoothed: Tensor) -> tuple[Tensor, Tensor]:
        """The map of each bin, (B, K, K), and where it is known, (B,); elsewhere one that changes nothing."""
        known = (covariance[:, 0, 0] + smoothed[:, 0, 0]).isfinite()
        maps = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device).repeat(len(known), 1, 1)
        for b in known.nonzero().flatten().tolist():
            maps[b] = covariance_map(covariance[b], smoothed[b], clip=self.settings.clip, map=self.settings.map)
        return maps, known


class FullCovariance(_MatrixCovariance):
    """A (D, D) covariance matrix a bin."""

    form = "full"

    def __init__(self, num_bins: int, num_features: int, settings: Settings) -> None:
        super().__init__(num_bins, num_features, settings, side=num_features)

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        own = torch.eye(self.num_features, dtype=torch.float64, device=device)
        self._map("matrix", own.repeat(self.num_bins, 1, 1))

    def moments(self, device: torch.device | None = None) -> BinScatters:
        return BinScatters(self.num_bins, self.num_features, device=device or self.shift.device)

    def fold(self, moments: BinScatters, group: ProcessGroup | None) -> None:
        moments.deviations /= _a_bin(moments.count - 1, moments.deviations)  # in place: memory is what is short here
        self.running_covariance = self._blend(self.running_covariance, moments.deviations, moments.count)

    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        covariance = self._shrunk(self.running_covariance, count)
        smoothed = _by_row(smooth, covariance)
        return {
            "covariance": covariance,
            "smoothed_covariance": smoothed,
            "variance": covariance.diagonal(dim1=1, dim2=2),
            "smoothed_variance": smoothed.diagonal(dim1=1, dim2=2),
        }

    def refresh(self, statistics: dict[str, Tensor]) -> None:
        s = statistics
        self.matrix, _ = self._maps(s["covariance"], s["smoothed_covariance"])
        shift = s["smoothed_mean"] - torch.einsum("bij,bj->bi", self.matrix, s["mean"])
        self.matrix[~shift.isfinite().all(1)] = torch.eye(self.num_features, dtype=torch.float64, device=shift.device)
        self.shift[:-1] = shift.nan_to_num()
        self._cast.clear()

    def _carry(self, features: Tensor, row: Tensor) -> Tensor:
        matrix, shift = self._tables(features, "matrix", "shift")
        order = row.argsort()
        sizes = row.bincount(minlength=self.num_bins + 1).tolist()
        pieces = features.to(matrix.dtype).index_select(0, order).split(sizes)  # one product a bin, none a sample
        carried = [piece @ matrix[b].T if b < self.num_bins else piece for b, piece in enumerate(pieces) if len(piece)]
        return shift.index_select(0, row).index_add_(0, order, torch.cat([*carried, pieces[0][:0]]))


class LowRankCovariance(_MatrixCovariance):
    r"""A full covariance within a subspace of r directions that all bins share, and one variance beyond it:
    :math:`\Sigma_b = Q C_b Q^T + s_b (I - Q Q^T)`, a form that smoothing keeps.

    An epoch's features are taken within the subspace of the epoch before; the running covariances then go over to the
    subspace of the leading directions of this epoch's pooled covariance.
    """

    form = "low_rank"
    basis: Tensor
    running_rest: Tensor
    scale: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings, *, rank: int) -> None:
        super().__init__(num_bins, num_features, settings, side=rank)
        self.rank = rank

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        rows, like = self.num_bins + 1, {"dtype": torch.float64, "device": device}
        self.register_buffer("basis", _unknown(self.num_features, self.rank, device=device))
        self.register_buffer("running_rest", _unknown(self.num_bins, device=device))
        self._map("matrix", torch.zeros(rows, self.rank, self.rank, **like))  # type: ignore[call-overload]
        self._map("scale", torch.ones(rows, 1, **like))  # type: ignore[call-overload]

    def moments(self, device: torch.device | None = None) -> SubspaceMoments:
        basis = None if self.basis.is_meta or bool(self.basis.isnan().any()) else self.basis
        device = device or self.shift.device
        return SubspaceMoments(self.num_bins, self.num_features, self.rank, basis=basis, device=device)

    def fold(self, moments: SubspaceMoments, group: ProcessGroup | None) -> None:
        beyond = self.num_features - self.rank
        if moments.basis is not None:
            covariance = moments.within.deviations / _a_bin(moments.count - 1, moments.within.deviations)
            rest = (moments.bins.variance().sum(1) - _trace(covariance)).clamp_min(0) / beyond
            self.running_covariance = self._blend(self.running_covariance, covariance, moments.count)
            self.running_rest = self._blend(self.running_rest, rest, moments.count)
        _, vectors = torch.linalg.eigh(moments.pooled_scatter())
        basis = vectors[:, -self.rank :].contiguous()
        basis = _of_first_rank(basis, group)  # signs of eigenvectors may differ between machines
        if moments.basis is not None:
            turn = basis.T @ moments.basis
            total = _trace(self.running_covariance) + beyond * self.running_rest
            own = torch.eye(self.rank, dtype=torch.float64, device=basis.device)
            lost = _a_bin(self.running_rest, self.running_covariance) * (own - turn @ turn.T)
            self.running_covariance = turn @ self.running_covariance @ turn.T + lost
            self.running_rest = (total - _trace(self.running_covariance)) / beyond
        self.basis = basis

    def statistics(self, count: Tensor, smooth: Smooth) -> dict[str, Tensor]:
        covariance, rest = self._shrunk(self.running_covariance, count), self._shrunk(self.running_rest, count)
        smoothed = _by_row(smooth, covariance)
        smoothed_rest = smooth(rest[:, None])[:, 0]
        return {
            "basis": self.basis.clone(),
            "covariance": covariance,
            "rest": rest,
            "smoothed_covariance": smoothed,
            "smoothed_rest": smoothed_rest,
            "variance": self._variance(covariance, rest),
            "smoothed_variance": self._variance(smoothed, smoothed_rest),
        }

    def _variance(self, covariance: Tensor, rest: Tensor) -> Tensor:
        """Of each feature, (B, D)."""
        within = torch.einsum("di,bij,dj->bd", self.basis, covariance, self.basis)
        return within + rest[:, None] * (1 - self.basis.square().sum(1))

    def refresh(self, statistics: dict[str, Tensor]) -> None:
        s = statistics
        maps, known = self._maps(s["covariance"], s["smoothed_covariance"])
        ratio = (s["smoothed_rest"] / s["rest"]).clamp(*self.settings.clip)
        scale = torch.where(known & (s["rest"] > 0) & ratio.isfinite(), ratio.sqrt(), 1.0)[:, None]
        own = torch.eye(self.rank, dtype=torch.float64, device=scale.device)
        matrix = torch.where(_a_bin(known, maps), maps - scale[:, :, None] * own, 0.0)
        mean = s["mean"]
        carried = scale * mean + torch.einsum("bij,bj->bi", matrix, mean @ self.basis) @ self.basis.T
        shift = s["smoothed_mean"] - carried
        there = shift.isfinite().all(1)
        self.matrix[:-1] = torch.where(_a_bin(there, matrix), matrix, 0.0)
        self.scale[:-1] = torch.where(there[:, None], scale, 1.0)
        self.shift[:-1] = shift.nan_to_num()
        self._cast.clear()

    def _carry(self, features: Tensor, row: Tensor) -> Tensor:
        matrix, scale, shift, basis = self._tables(features, "matrix", "scale", "shift", "basis")
        x = features.to(shift.dtype)
        within = torch.einsum("nij,nj->ni", matrix.index_select(0, row), x @ basis)
        return torch.addmm(shift.index_select(0, row) + scale.index_select(0, row) * x, within, basis.T)


def _unknown(*shape: int, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device)


def _by_row(smooth: Smooth, matrices: Tensor) -> Tensor:
    """Matrices (B, K, K) smoothed over bins, with memory for the result alone."""
    smoothed = torch.empty_like(matrices)
    for i in range(matrices.shape[1]):
        smoothed[:, i] = smooth(matrices[:, i])
    return smoothed


def _of_first_rank(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    if not is_parallel():
        return tensor
    shared = tensor.to(reduce_device(tensor, group))
    dist.broadcast(shared, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return shared.to(tensor.device)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def _check_memory(form: str, num_bins: int, num_features: int, side: int) -> None:
    """Before statistics of matrices are taken."""
    needed = _bytes(form, num_bins, num_features, side)
    free = free_memory()
    if free is not None and needed > free:
        smaller = 'covariance="low_rank" or "diagonal"' if form == "full" else 'a smaller rank, covariance="diagonal"'
        raise problem(
            f"covariance {form!r} over {num_bins} bins of {num_features} features takes {needed / 2**30:.1f} GiB, "
            "which must be free",
            got=f"{free / 2**30:.1f} GiB",
            fix=f"Pass {smaller}, or wider bins.",
        )


def _bytes(form: str, num_bins: int, num_features: int, side: int) -> int:
    """At the end of an epoch, when most is taken; as measured."""
    if form == "full":
        return 80 * num_bins * side**2
    return 165 * num_bins * side**2 + 80 * num_features**2 + 200 * num_bins * num_features
