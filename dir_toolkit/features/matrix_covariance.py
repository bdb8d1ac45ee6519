"""Full and low-rank covariances of features per bin."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .._memory import check_memory
from .._numerics import full_precision
from .._ranks import is_parallel, reduce_device
from .covariance import BinCovariance, Settings, Smooth, per_bin, unknown
from .maps import covariance_map
from .matrix_moments import BinScatters, SubspaceMoments
from .rows import as_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FullCovariance", "LowRankCovariance"]


class _MatrixCovariance(BinCovariance):
    """The base of full and low rank: a (K, K) covariance per bin, and maps of features (N, D)."""

    running_covariance: Tensor
    matrix: Tensor
    smaller: str  # advice: settings that take less memory

    def __init__(self, num_bins: int, num_features: int, settings: Settings, *, side: int) -> None:
        super().__init__(num_bins, num_features, settings, shrinkage=float(side))
        self.side = side
        named = f"covariance {self.form!r} over {num_bins} bins of {num_features} features"
        check_memory(named, self.most_bytes, f"Pass {self.smaller}, or wider bins.")

    @property
    @abstractmethod
    def most_bytes(self) -> int:
        """The peak memory, at the end of an epoch. The factors were measured."""

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        self.register_buffer("running_covariance", unknown(self.num_bins, self.side, self.side, device=device))

    def calibrate(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        rows = rows.to(features.device).clamp_max(self.num_bins)
        flat, index, back = as_rows(features, rows, axis)
        with full_precision(features.device):  # autocast would compute the products in half precision
            return back(self._carry(flat, index).to(features.dtype))

    def extra_repr(self) -> str:
        return f"{self.side} directions, map={self.settings.map!r}, {super().extra_repr()}"

    @abstractmethod
    def _carry(self, features: Tensor, rows: Tensor) -> Tensor:
        """Calibrated features (N, D), in the dtype of the maps."""

    def _maps(self, covariance: Tensor, smoothed: Tensor) -> tuple[Tensor, Tensor]:
        """The map of each bin, (B, K, K), and whether it is known, (B,). An unknown map is the identity."""
        known = (covariance[:, 0, 0] + smoothed[:, 0, 0]).isfinite()
        maps = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device).repeat(len(known), 1, 1)
        for b in known.nonzero().flatten().tolist():
            maps[b] = covariance_map(covariance[b], smoothed[b], clip=self.settings.clip, map=self.settings.map)
        return maps, known


class FullCovariance(_MatrixCovariance):
    """One (D, D) covariance matrix per bin."""

    form = "full"
    smaller = 'covariance="low_rank" or "diagonal"'

    def __init__(self, num_bins: int, num_features: int, settings: Settings) -> None:
        super().__init__(num_bins, num_features, settings, side=num_features)

    @property
    def most_bytes(self) -> int:
        return 80 * self.num_bins * self.side**2

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        identity = torch.eye(self.num_features, dtype=torch.float64, device=device)
        self._add_map("matrix", identity.repeat(self.num_bins, 1, 1))

    def moments(self, device: torch.device | None = None) -> BinScatters:
        return BinScatters(self.num_bins, self.num_features, device=device or self.shift.device)

    def fold(self, moments: BinScatters, group: ProcessGroup | None) -> None:
        moments.deviations /= per_bin(moments.count - 1, moments.deviations)  # in place, to save memory
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

    def _carry(self, features: Tensor, rows: Tensor) -> Tensor:
        """Features (N, D) with the map of their bin applied to each."""
        matrix, shift = self._tables(features, "matrix", "shift")
        order = rows.argsort()
        sizes = rows.bincount(minlength=self.num_bins + 1).tolist()
        # Sorting by bin needs one product per bin instead of one per sample. Samples are the columns of each product,
        # which is faster for few of them.
        pieces = features.to(matrix.dtype).index_select(0, order).split(sizes)
        carried = [
            (matrix[b] @ piece.T).T if b < self.num_bins else piece for b, piece in enumerate(pieces) if len(piece)
        ]
        return shift.index_select(0, rows).index_add_(0, order, torch.cat([*carried, pieces[0][:0]]))


class LowRankCovariance(_MatrixCovariance):
    r"""A full covariance within a subspace of r directions common to all bins, and one variance for the rest.

    This is :math:`\Sigma_b = Q C_b Q^T + s_b (I - Q Q^T)`. Smoothing preserves this form.

    An epoch uses the subspace of the epoch before. At its end, the running covariances are projected onto the leading
    directions of this epoch's pooled covariance.
    """

    form = "low_rank"
    smaller = 'a smaller rank, covariance="diagonal"'
    basis: Tensor
    running_rest: Tensor
    scale: Tensor

    def __init__(self, num_bins: int, num_features: int, settings: Settings) -> None:
        super().__init__(num_bins, num_features, settings, side=settings.rank)
        self.rank = settings.rank

    @property
    def most_bytes(self) -> int:
        b, d = self.num_bins, self.num_features
        return 165 * b * self.side**2 + 80 * d**2 + 200 * b * d

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        rows, like = self.num_bins + 1, {"dtype": torch.float64, "device": device}
        self.register_buffer("basis", unknown(self.num_features, self.rank, device=device))
        self.register_buffer("running_rest", unknown(self.num_bins, device=device))
        self._add_map("matrix", torch.zeros(rows, self.rank, self.rank, **like))  # type: ignore[call-overload]
        self._add_map("scale", torch.ones(rows, 1, **like))  # type: ignore[call-overload]

    def moments(self, device: torch.device | None = None) -> SubspaceMoments:
        basis = None if self.basis.is_meta or bool(self.basis.isnan().any()) else self.basis
        device = device or self.shift.device
        return SubspaceMoments(self.num_bins, self.num_features, self.rank, basis=basis, device=device)

    def fold(self, moments: SubspaceMoments, group: ProcessGroup | None) -> None:
        """Fold an epoch in, and turn the running covariance into the basis of the next epoch."""
        beyond = self.num_features - self.rank
        if moments.basis is not None:
            covariance = moments.within.deviations / per_bin(moments.count - 1, moments.within.deviations)
            rest = (moments.bins.variance().sum(1) - _trace(covariance)).clamp_min(0) / beyond
            self.running_covariance = self._blend(self.running_covariance, covariance, moments.count)
            self.running_rest = self._blend(self.running_rest, rest, moments.count)
        _, vectors = torch.linalg.eigh(moments.pooled_scatter())
        basis = vectors[:, -self.rank :].contiguous()
        basis = _of_first_rank(basis, group)  # signs of eigenvectors may differ between machines
        if moments.basis is not None:
            turn = basis.T @ moments.basis
            total = _trace(self.running_covariance) + beyond * self.running_rest
            identity = torch.eye(self.rank, dtype=torch.float64, device=basis.device)
            lost = per_bin(self.running_rest, self.running_covariance) * (identity - turn @ turn.T)
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
        """The variance of each feature, (B, D)."""
        within = torch.einsum("di,bij,dj->bd", self.basis, covariance, self.basis)
        return within + rest[:, None] * (1 - self.basis.square().sum(1))

    def refresh(self, statistics: dict[str, Tensor]) -> None:
        s = statistics
        maps, known = self._maps(s["covariance"], s["smoothed_covariance"])
        ratio = (s["smoothed_rest"] / s["rest"]).clamp(*self.settings.clip)
        scale = torch.where(known & (s["rest"] > 0) & ratio.isfinite(), ratio.sqrt(), 1.0)[:, None]
        identity = torch.eye(self.rank, dtype=torch.float64, device=scale.device)
        matrix = torch.where(per_bin(known, maps), maps - scale[:, :, None] * identity, 0.0)
        mean = s["mean"]
        carried = scale * mean + torch.einsum("bij,bj->bi", matrix, mean @ self.basis) @ self.basis.T
        shift = s["smoothed_mean"] - carried
        there = shift.isfinite().all(1)
        self.matrix[:-1] = torch.where(per_bin(there, matrix), matrix, 0.0)
        self.scale[:-1] = torch.where(there[:, None], scale, 1.0)
        self.shift[:-1] = shift.nan_to_num()
        self._cast.clear()

    def _carry(self, features: Tensor, rows: Tensor) -> Tensor:
        matrix, scale, shift, basis = self._tables(features, "matrix", "scale", "shift", "basis")
        x = features.to(shift.dtype)
        within = torch.einsum("nij,nj->ni", matrix.index_select(0, rows), x @ basis)
        return torch.addmm(shift.index_select(0, rows) + scale.index_select(0, rows) * x, within, basis.T)


def _by_row(smooth: Smooth, matrices: Tensor) -> Tensor:
    """Matrices (B, K, K) smoothed over bins row by row, which saves memory."""
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
