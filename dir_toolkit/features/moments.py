"""Mean and variance of features in each bin: streaming, mergeable, summed over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import instance, is_tensor, keys, problem, readable, real, same_device, whole
from ..errors import ShapeError

__all__ = ["BinMoments"]

_PIECE = 2**24  # float64 numbers at a time: maps with a sample a pixel are many


class BinMoments:
    """Count, mean and sum of squared deviations of features per bin, in float64 and about each bin's own mean.

    Nothing here waits for an accelerator. Tensors live where the features do.

    Attributes:
        count: (B,) int64. mean: (B, D) float64, zero where a bin is empty.
        deviations: (B, D) float64, the sum of squared deviations from the mean.
    Source:
        Chan, Golub and LeVeque 1983, equation 1.5b, for the merging.

    >>> moments = BinMoments(2, 1)
    >>> moments.update(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, -1]))
    >>> moments.count.tolist(), moments.mean[0].item(), moments.variance()[0].item()
    ([2, 0], 2.0, 2.0)
    """

    def __init__(self, num_bins: int, num_features: int, *, device: torch.device | str | None = None) -> None:
        num_bins = whole("BinMoments", "num_bins", num_bins, low=1)
        num_features = whole("BinMoments", "num_features", num_features, low=1)
        self.count = torch.zeros(num_bins, dtype=torch.int64, device=device)
        self.mean = torch.zeros(num_bins, num_features, dtype=torch.float64, device=device)
        self.deviations = torch.zeros_like(self.mean)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Add features (N, D) whose labels fall into the bins ``index`` (N,) int64; a sample with -1 or B is
        left out.

        Raises:
            ShapeError: the shapes do not fit. TypeError: index is not int64. ValueError: an index is beyond B, or on
            another device; on an accelerator the former is not looked for.
        """
        where = "BinMoments.update"
        is_tensor(where, features=features, index=index)
        real(where, features=features)
        same_device(where, features=features, index=index)
        num_bins, num_features = self.mean.shape
        if features.ndim != 2 or features.shape[1] != num_features or index.shape != features.shape[:1]:
            raise problem(
                where,
                f"features must be (N, {num_features}) and index (N,)",
                got=f"{tuple(features.shape)} and {tuple(index.shape)}",
                error=ShapeError,
            )
        if index.dtype != torch.int64:
            raise problem(where, "index must be int64", got=f"dtype {index.dtype}", error=TypeError)
        if readable(index) and index.numel() and int(index.max()) > num_bins:
            raise problem(where, f"index must be at most {num_bins}", got=f"a maximum of {int(index.max())}")
        self._update(features, index)

    def _update(self, features: Tensor, index: Tensor) -> None:
        """:meth:`update` of what has been checked; waits for nothing on a CPU either."""
        num_bins, num_features = self.mean.shape
        rows = max(_PIECE // num_features, 1)
        if len(features) > rows:
            for some, of_bin in zip(features.split(rows), index.split(rows), strict=True):
                self._update(some, of_bin)
            return
        if self.mean.device != features.device:
            self.to(features.device)
        x = features.detach().double()
        row = torch.where(index < 0, num_bins, index)  # a last row, cut off again, takes what is left out
        count = torch.zeros(num_bins + 1, dtype=torch.int64, device=x.device)
        count.index_add_(0, row, torch.ones_like(row))
        mean = torch.zeros(num_bins + 1, num_features, dtype=torch.float64, device=x.device)
        mean.index_add_(0, row, x)
        mean /= count.clamp_min(1)[:, None]
        x = (x - mean.index_select(0, row)).square_()
        deviations = torch.zeros_like(mean).index_add_(0, row, x)
        self._add(count[:-1], mean[:-1], deviations[:-1])

    def merge(self, other: BinMoments) -> BinMoments:
        """Add what another object has seen; returns self."""
        instance("BinMoments.merge", BinMoments, other=other)
        if other.mean.shape != self.mean.shape:
            raise problem(
                "BinMoments.merge",
                "both must have the same bins and features",
                got=f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}",
                error=ShapeError,
            )
        device = self.mean.device
        self._add(other.count.to(device), other.mean.to(device), other.deviations.to(device))
        return self

    def _add(self, count: Tensor, mean: Tensor, deviations: Tensor) -> None:
        total = self.count + count
        share = (count.double() / total.clamp_min(1))[:, None]  # int / int would be float32
        step = mean - self.mean
        self.deviations = self.deviations + deviations + step.square() * (self.count[:, None] * share)
        self.mean = self.mean + step * share
        self.count = total

    def all_reduce(self) -> BinMoments:
        """Merge the moments of all ranks into each, which must all call this; returns self.

        Means first, then deviations about the common mean, so that no digits cancel. Does nothing outside
        ``torch.distributed``.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        if dist.get_backend() == "nccl":  # knows no CPU, where a rank without samples has its moments
            self.to("cuda")
        total, sums = self.count.clone(), self.mean * self.count[:, None]
        dist.all_reduce(total)
        dist.all_reduce(sums)
        mean = sums / total.clamp_min(1)[:, None]
        deviations = self.deviations + (self.mean - mean).square() * self.count[:, None]
        dist.all_reduce(deviations)
        self.count, self.mean, self.deviations = total, mean, deviations
        return self

    def variance(self) -> Tensor:
        """Unbiased variance, (B, D) float64; NaN in bins with fewer than two samples."""
        degrees = (self.count - 1).to(torch.float64)[:, None]
        return torch.where(degrees > 0, self.deviations / degrees, torch.nan)

    def to(self, device: torch.device | str) -> BinMoments:
        """Move to a device; returns self."""
        self.count, self.mean = self.count.to(device), self.mean.to(device)
        self.deviations = self.deviations.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that :meth:`load_state_dict` restores to the bit."""
        return {"count": self.count.clone(), "mean": self.mean.clone(), "deviations": self.deviations.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` saved, on the present device."""
        keys("BinMoments.load_state_dict", "state", state, ("count", "mean", "deviations"))
        is_tensor("BinMoments.load_state_dict", **state)
        for name, expected in (("count", self.count), ("mean", self.mean), ("deviations", self.deviations)):
            if state[name].shape != expected.shape or state[name].dtype != expected.dtype:
                raise problem(
                    "BinMoments.load_state_dict",
                    f"{name} must be {expected.dtype} of shape {tuple(expected.shape)}",
                    got=f"{state[name].dtype} of shape {tuple(state[name].shape)}",
                    error=ShapeError,
                )
        device = self.mean.device
        self.count, self.mean = state["count"].to(device, copy=True), state["mean"].to(device, copy=True)
        self.deviations = state["deviations"].to(device, copy=True)
