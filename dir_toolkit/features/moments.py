"""Mean, variance and covariance of features in each bin: streaming, mergeable, summed over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import instance, is_tensor, keys, length, not_negative, problem, real, same_device
from .._numerics import readable
from .._ranks import is_parallel, summed
from ..errors import CheckpointError, ShapeError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BinMoments", "BinScatters", "SubspaceMoments"]

_PIECE = 2**24  # float64 numbers at a time: maps with a sample a pixel are many


class BinMoments:
    """Count, mean and sum of squared deviations of features per bin, in float64 and about each bin's own mean.

    Nothing here waits for an accelerator. Tensors live where the features do. Batches may come in inference mode, which
    is left for what is kept, since tensors made in it could not be written to afterwards.

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

    @torch.inference_mode(False)
    def __init__(self, num_bins: int, num_features: int, *, device: torch.device | str | None = None) -> None:
        num_bins = length("num_bins", num_bins)
        num_features = length("num_features", num_features)
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
        self._check_batch(features, index)
        self._update(features, index)

    def _check_batch(self, features: Tensor, index: Tensor) -> None:
        is_tensor(features=features, index=index)
        real(features=features)
        same_device(features=features, index=index)
        num_bins, num_features = self.mean.shape
        if features.ndim != 2 or features.shape[1] != num_features or index.shape != features.shape[:1]:
            raise problem(
                f"features must be (N, {num_features}) and index (N,)",
                got=f"{tuple(features.shape)} and {tuple(index.shape)}",
                error=ShapeError,
            )
        if index.dtype != torch.int64:
            raise problem("index must be int64", got=f"dtype {index.dtype}", error=TypeError)
        if readable(index) and index.numel() and int(index.max()) > num_bins:
            raise problem(f"index must be at most {num_bins}", got=f"a maximum of {int(index.max())}")

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
        away = mean.index_select(0, row).sub_(x).square_()  # in place: fresh memory is most of what a batch costs
        deviations = torch.zeros_like(mean).index_add_(0, row, away)
        self._add(count[:-1], mean[:-1], deviations[:-1])

    def merge(self, other: BinMoments) -> BinMoments:
        """Add what another object has seen; returns self."""
        instance(BinMoments, other=other)
        if other.deviations.shape != self.deviations.shape:
            raise problem(
                "both must have the same bins and features",
                got=f"{tuple(self.deviations.shape)} and {tuple(other.deviations.shape)}",
                error=ShapeError,
            )
        device = self.mean.device
        self._add(other.count.to(device), other.mean.to(device), other.deviations.to(device))
        return self

    @torch.inference_mode(False)
    def _add(self, count: Tensor, mean: Tensor, deviations: Tensor) -> None:
        total = self.count + count
        share = (count.double() / total.clamp_min(1))[:, None]  # int / int would be float32
        step = mean - self.mean
        self.mean.addcmul_(step, share)
        self.deviations += deviations
        self._spread(step, self.count[:, None] * share)
        self.count = total

    def _spread(self, step: Tensor, weight: Tensor) -> None:
        """Add to the deviations what steps (B, D) between means make of them, each bin's weighed by (B, 1)."""
        self.deviations.addcmul_(step.square(), weight)

    @torch.inference_mode(False)
    def all_reduce(self, group: ProcessGroup | None = None) -> BinMoments:
        """Merge the moments of all ranks of a group (None: all) into each, which must all call this; returns self.

        Means first, then deviations about the common mean, so that no digits cancel. Does nothing outside
        ``torch.distributed``.
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
        """Unbiased variance, (B, D) float64; NaN in bins with fewer than two samples."""
        degrees = (self.count - 1).to(torch.float64)[:, None]
        return torch.where(degrees > 0, self.deviations / degrees, torch.nan)

    def finite(self) -> Tensor:
        """Whether all that a bin has seen was finite, (B,) bool."""
        return self.mean.isfinite().all(1) & self.deviations.isfinite().flatten(1).all(1)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> BinMoments:
        """Move to a device; returns self."""
        self.count, self.mean = self.count.to(device), self.mean.to(device)
        self.deviations = self.deviations.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that :meth:`load_state_dict` restores to the bit."""
        return {"count": self.count.clone(), "mean": self.mean.clone(), "deviations": self.deviations.clone()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` saved, on the present device; a state that is refused changes nothing."""
        keys("state", state, ("count", "mean", "deviations"))
        is_tensor(**state)
        for name, expected in (("count", self.count), ("mean", self.mean), ("deviations", self.deviations)):
            if state[name].shape != expected.shape or state[name].dtype != expected.dtype:
                raise problem(
                    f"{name} must be {expected.dtype} of shape {tuple(expected.shape)}",
                    got=f"{state[name].dtype} of shape {tuple(state[name].shape)}",
                    error=ShapeError,
                )
        not_negative(count=state["count"])
        if self.deviations.ndim == 2:  # sums of squares
            not_negative(deviations=state["deviations"])
        device = self.mean.device
        self.count, self.mean = state["count"].to(device, copy=True), state["mean"].to(device, copy=True)
        self.deviations = state["deviations"].to(device, copy=True)


class BinScatters(BinMoments):
    """Count, mean and scatter matrix of features per bin: :class:`BinMoments` with covariances.

    A matrix costs far more to touch than a batch does. So batches are held, copied, up to 8 million numbers, and taken
    in together; only then does this wait for an accelerator. :meth:`settle` takes in the rest; call it before reading.

    Attributes:
        count: (B,) int64. mean: (B, D) float64. deviations: (B, D, D) float64, the sum of outer products of deviations
            from the mean.

    >>> scatters = BinScatters(1, 2)
    >>> scatters.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 0]))
    >>> scatters.settle().deviations[0].tolist()
    [[2.0, 4.0], [4.0, 8.0]]
    """

    @torch.inference_mode(False)
    def __init__(self, num_bins: int, num_features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(num_bins, num_features, device=device)
        self.deviations = torch.zeros(*self.mean.shape, num_features, dtype=torch.float64, device=device)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._room = _PIECE // 2

    def _update(self, features: Tensor, index: Tensor) -> None:
        self._held.append((features.detach().clone(), index))  # a layer after the hook may write to features
        self._room -= features.numel()
        if self._room <= 0:
            self.settle()

    @torch.inference_mode(False)
    def settle(self) -> BinScatters:
        """Take in the batches that are held; returns self."""
        if not self._held:
            return self
        features = torch.cat([x for x, _ in self._held])
        index = torch.cat([i for _, i in self._held])
        self._held, self._room = [], _PIECE // 2
        if self.mean.device != features.device:
            self.to(features.device)
        num_bins = len(self.mean)
        index = torch.where(index < 0, num_bins, index)
        sizes = index.bincount(minlength=num_bins + 1).tolist()
        for b, some in enumerate(features[index.argsort(stable=True)].split(sizes)[:num_bins]):
            if not len(some):
                continue
            x = some.double()
            mean = x.mean(0)
            x -= mean
            share = len(x) / (self.count[b].double() + len(x))  # int / int would be float32
            step = mean - self.mean[b]
            self.deviations[b].addmm_(x.T, x).addr_(step, step * (self.count[b] * share))
            self.mean[b] += step * share
            self.count[b] += len(x)
        return self

    def _spread(self, step: Tensor, weight: Tensor) -> None:
        self.deviations.addcmul_(step[:, :, None], (step * weight)[:, None, :])

    def merge(self, other: BinMoments) -> BinMoments:
        if isinstance(other, BinScatters):
            other.settle()
        self.settle()
        return super().merge(other)

    def all_reduce(self, group: ProcessGroup | None = None) -> BinMoments:
        self.settle()
        return super().all_reduce(group)

    def to(self, device: torch.device | str) -> BinMoments:
        self._held = [(x.to(device), i.to(device)) for x, i in self._held]
        return super().to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """What is held goes along as it is: taken in now, sums would end in other digits than without saving."""
        state = super().state_dict()
        if self._held:
            features, index = zip(*self._held, strict=True)
            state |= {"held": torch.cat(features), "held_index": torch.cat(index)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        instance(dict, state=state)
        held = {name: value for name, value in state.items() if name in ("held", "held_index")}
        if held:
            keys("state", held, ("held", "held_index"))
            is_tensor(**held)
            held = {name: value.to(self.mean.device) for name, value in held.items()}
            self._check_batch(held["held"], held["held_index"])
        super().load_state_dict({name: value for name, value in state.items() if name not in held})
        self._held, self._room = [], _PIECE // 2
        if held:
            self._update(held["held"], held["held_index"])


class SubspaceMoments:
    """Moments of features per bin whose covariance is kept within a subspace.

    Three parts: mean and variance of each feature in each bin; one scatter matrix over all samples, whatever their bin,
    from which the next subspace follows; and, once there is a subspace, the scatter matrix of each bin within it.

    Args:
        basis: (D, r) float64, orthonormal columns; None while there is no subspace.
    Attributes:
        bins, overall, within: the three parts.
    """

    def __init__(
        self,
        num_bins: int,
        num_features: int,
        rank: int,
        *,
        basis: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.basis = basis
        self.bins = BinMoments(num_bins, num_features, device=device)
        self.overall = BinScatters(1, num_features, device=device)
        self.within = BinScatters(num_bins, rank, device=device)

    @property
    def parts(self) -> dict[str, BinMoments]:
        return {"bins": self.bins, "overall": self.overall, "within": self.within}

    @property
    def count(self) -> Tensor:
        return self.bins.count

    @property
    def mean(self) -> Tensor:
        return self.bins.mean

    def _update(self, features: Tensor, index: Tensor) -> None:
        self.bins._update(features, index)
        nowhere = (index < 0) | (index == len(self.count))
        self.overall._update(features, torch.where(nowhere, -1, 0))
        if self.basis is not None:
            if self.basis.device != features.device:
                self.basis = self.basis.to(features.device)
            self.within._update(features.detach().double() @ self.basis, index)

    def pooled_scatter(self) -> Tensor:
        """Scatter of all samples about the means of their own bins, (D, D) float64."""
        step = self.bins.mean - self.overall.mean
        return self.overall.deviations[0] - step.T @ (step * self.count[:, None])

    def all_reduce(self, group: ProcessGroup | None = None) -> SubspaceMoments:
        """As :meth:`BinMoments.all_reduce`."""
        for part in self.parts.values():
            part.all_reduce(group)
        return self

    def finite(self) -> Tensor:
        """Whether all that a bin has seen was finite, (B,) bool."""
        return self.bins.finite()

    def to(self, device: torch.device | str) -> SubspaceMoments:
        """Move to a device; returns self."""
        for part in self.parts.values():
            part.to(device)
        self.basis = None if self.basis is None else self.basis.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that :meth:`load_state_dict` restores to the bit."""
        state = {
            f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.state_dict().items()
        }
        return state if self.basis is None else {**state, "basis": self.basis.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` saved, on the present device."""
        instance(dict, state=state)
        of_part: dict[str, dict[str, Tensor]] = {name: {} for name in self.parts}
        for name, value in state.items():
            part, _, key = str(name).partition(".")
            if part in of_part:
                of_part[part][key] = value
            elif name != "basis":
                raise problem("state must be of a SubspaceMoments", got=f"the key {name!r}", error=CheckpointError)
        device, (num_bins, num_features) = self.mean.device, self.mean.shape
        if (basis := state.get("basis")) is not None:
            is_tensor(basis=basis)
            basis = basis.to(device, torch.float64, copy=True)
            shape = (num_features, self.within.mean.shape[1])
            if basis.shape != shape:
                raise problem(f"basis must be {shape}", got=tuple(basis.shape), error=ShapeError)
        fresh = SubspaceMoments(num_bins, num_features, self.within.mean.shape[1], basis=basis, device=device)
        for name, part_state in of_part.items():
            fresh.parts[name].load_state_dict(part_state)
        self.__dict__.update(fresh.__dict__)
