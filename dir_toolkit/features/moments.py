"""Mean and variance of features per bin, accumulated over batches, objects and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import require
from .._ranks import is_parallel, summed
from ..errors import ShapeError
from ._inputs import saved_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BinMoments"]

PIECE = 2**24
"""The largest number of float64 values to process at a time."""


class BinMoments:
    """Count, mean and sum of squared deviations from the mean of features per bin, in float64.

    Nothing here waits for an accelerator. The tensors are on the device of the features.

    Attributes:
        count: (B,) int64.
        mean: (B, D) float64, zero for empty bins.
        deviations: (B, D) float64, the sum of squared deviations from the mean.
    Source:
        Chan, Golub and LeVeque 1983, equation 1.5b, for the merging.

    >>> moments = BinMoments(2, 1)
    >>> moments.update(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, -1]))
    >>> moments.count.tolist(), moments.mean[0].item(), moments.variance()[0].item()
    ([2, 0], 2.0, 2.0)
    """

    @torch.inference_mode(False)
    def __init__(self, num_bins: int, num_features: int, *, device: torch.device | str | None = None) -> None:
        self.count = torch.zeros(num_bins, dtype=torch.int64, device=device)
        self.mean = torch.zeros(num_bins, num_features, dtype=torch.float64, device=device)
        self.deviations = torch.zeros_like(self.mean)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Add features (N, D) of the bins ``index`` (N,) int64. Samples with the index -1 or B are ignored."""
        num_bins, num_features = self.mean.shape
        rows = max(PIECE // num_features, 1)
        if len(features) > rows:
            for some, of_bin in zip(features.split(rows), index.split(rows), strict=True):
                self.update(some, of_bin)
            return
        if self.mean.device != features.device:
            self.to(features.device)
        x = features.detach().double()
        row = torch.where(index < 0, num_bins, index)  # a last row, cut off later, for ignored samples
        count = torch.zeros(num_bins + 1, dtype=torch.int64, device=x.device)
        count.index_add_(0, row, torch.ones_like(row))
        mean = torch.zeros(num_bins + 1, num_features, dtype=torch.float64, device=x.device)
        mean.index_add_(0, row, x)
        mean /= count.clamp_min(1)[:, None]
        away = mean.index_select(0, row).sub_(x).square_()  # in place, since allocation is most of the cost
        deviations = torch.zeros_like(mean).index_add_(0, row, away)
        self._add(count[:-1], mean[:-1], deviations[:-1])

    def merge(self, other: BinMoments) -> BinMoments:
        """Add the samples of another object; returns self.

        Raises:
            ShapeError: the two differ in bins, features or class.
        """
        own, others = tuple(self.deviations.shape), tuple(other.deviations.shape)
        require(own == others, "both must have the same bins and features", got=f"{own} and {others}", error=ShapeError)
        device = self.mean.device
        self._add(other.count.to(device), other.mean.to(device), other.deviations.to(device))
        return self

    @torch.inference_mode(False)
    def _add(self, count: Tensor, mean: Tensor, deviations: Tensor) -> None:
        """Merge the moments of other samples into these, in place, so that compiled graphs can do it."""
        total = self.count + count
        share = (count.double() / total.clamp_min(1))[:, None]  # int / int would be float32
        step = mean - self.mean
        self.mean.addcmul_(step, share)
        self.deviations.add_(deviations)
        self._spread(step, self.count[:, None] * share)
        self.count.add_(count)

    def _spread(self, step: Tensor, weight: Tensor) -> None:
        """Add the squares of steps (B, D) between means to the deviations, weighted by (B, 1)."""
        self.deviations.addcmul_(step.square(), weight)

    @torch.inference_mode(False)
    def all_reduce(self, group: ProcessGroup | None = None) -> BinMoments:
        """Merge the moments of all ranks of a group (None: all ranks) on each rank; returns self.

        All ranks must call this. Means are summed first, and then deviations from the common mean, which avoids
        cancellation. Outside ``torch.distributed`` it does nothing.
        """
        if not is_parallel():
            return self
        total, sums = summed(self.count, self.mean * self.count[:, None], group=group)
        mean = sums / total.clamp_min(1)[:, None]
        self._spread(self.mean - mean, self.count[:, None])
        (self.deviations,) = summed(self.deviations, group=group)
        self.count, self.mean = total, mean
        return self

    def variance(self) -> Tensor:
        """The unbiased variance, (B, D) float64. It is NaN in bins with fewer than two samples."""
        degrees = (self.count - 1).to(torch.float64)[:, None]
        return torch.where(degrees > 0, self.deviations / degrees, torch.nan)

    def finite(self) -> Tensor:
        """Whether all features of a bin were finite, (B,) bool."""
        return self.mean.isfinite().all(1) & self.deviations.isfinite().flatten(1).all(1)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> BinMoments:
        """Move to a device; returns self."""
        for name, value in self._tensors().items():
            setattr(self, name, value.to(device))
        return self

    def _tensors(self) -> dict[str, Tensor]:
        return {"count": self.count, "mean": self.mean, "deviations": self.deviations}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which :meth:`load_state_dict` restores this object exactly."""
        return {name: value.clone() for name, value in self._tensors().items()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: object) -> None:
        """Restore the result of :meth:`state_dict`, on the current device. If it raises, nothing changes.

        Raises:
            CheckpointError: the state has other keys, bins or features.
        """
        squares = ("deviations",) if self.deviations.ndim == 2 else ()
        for name, value in saved_tensors(state, self._tensors(), not_negative=("count", *squares)).items():
            setattr(self, name, value)
