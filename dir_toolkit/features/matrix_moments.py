"""Covariances of features per bin, full or within a subspace, accumulated over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import is_tensor, keys, problem
from ..errors import CheckpointError
from ._inputs import saved_tensors
from .moments import PIECE, BinMoments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BinScatters", "SubspaceMoments"]


class BinScatters(BinMoments):
    """Count, mean and scatter matrix of features per bin: :class:`BinMoments` with covariances.

    Updating a matrix costs far more than copying a batch. Copies of batches, up to 8 million numbers, are therefore
    held and added together, which waits for an accelerator. :meth:`settle` adds the rest, and must be called before the
    attributes are read.

    Attributes:
        count: (B,) int64.
        mean: (B, D) float64.
        deviations: (B, D, D) float64, the sum of outer products of deviations from the mean.

    >>> scatters = BinScatters(1, 2)
    >>> scatters.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 0]))
    >>> scatters.settle().deviations[0].tolist()
    [[2.0, 4.0], [4.0, 8.0]]
    """

    @torch.inference_mode(False)
    def __init__(self, num_bins: int, num_features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(num_bins, num_features, device=device)
        self.deviations = torch.zeros(*self.mean.shape, num_features, dtype=torch.float64, device=device)
        self._hold_none()

    def _hold_none(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []
        self._room = PIECE // 2

    def update(self, features: Tensor, index: Tensor) -> None:
        self._held.append((features.detach().clone(), index))  # A later layer may modify features in place.
        self._room -= features.numel()
        if self._room <= 0:
            self.settle()

    @torch.inference_mode(False)
    def settle(self) -> BinScatters:
        """Add the batches that are held; returns self."""
        if not self._held:
            return self
        features = torch.cat([x for x, _ in self._held])
        index = torch.cat([i for _, i in self._held])
        self._hold_none()
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
        """As in :class:`BinMoments`. Held batches are saved separately, since adding them now would change rounding."""
        state = super().state_dict()
        if self._held:
            features, index = zip(*self._held, strict=True)
            state |= {"held": torch.cat(features), "held_index": torch.cat(index)}
        return state

    def load_state_dict(self, state: object) -> None:
        held = {}
        if isinstance(state, dict) and "held" in state:
            names = ("held", "held_index")
            held = {name: value for name, value in state.items() if name in names}
            state = {name: value for name, value in state.items() if name not in names}
            is_tensor(**held)
            dtype = held["held"].dtype if held["held"].is_floating_point() else torch.float64
            like = self.mean.new_empty(len(held["held"]), self.mean.shape[1], dtype=dtype)
            held = saved_tensors(held, {"held": like, "held_index": like.new_empty(len(like), dtype=torch.int64)})
            if len(like) and int(held["held_index"].max()) > len(self.mean):
                got = f"a maximum of {int(held['held_index'].max())}"
                raise problem(f"held_index must be at most {len(self.mean)}", got=got, error=CheckpointError)
        super().load_state_dict(state)
        self._hold_none()
        if held:
            self.update(held["held"], held["held_index"])


class SubspaceMoments:
    """Moments of features per bin with a covariance within a subspace.

    There are three parts: the mean and the variance of each feature in each bin; one scatter matrix over all samples,
    which gives the next subspace; and, once there is a subspace, the scatter matrix of each bin within it.

    Args:
        rank: r, the number of directions of the subspace.
        basis: (D, r) float64, orthonormal columns; None if there is no subspace yet.
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
    def _parts(self) -> dict[str, BinMoments]:
        return {"bins": self.bins, "overall": self.overall, "within": self.within}

    @property
    def count(self) -> Tensor:
        return self.bins.count

    @property
    def mean(self) -> Tensor:
        return self.bins.mean

    def update(self, features: Tensor, index: Tensor) -> None:
        """See :meth:`BinMoments.update`."""
        self.bins.update(features, index)
        nowhere = (index < 0) | (index == len(self.count))
        self.overall.update(features, torch.where(nowhere, -1, 0))
        if self.basis is not None:
            if self.basis.device != features.device:
                self.basis = self.basis.to(features.device)
            self.within.update(features.detach().double() @ self.basis, index)

    def pooled_scatter(self) -> Tensor:
        """The scatter matrix of all samples about the means of their bins, (D, D) float64."""
        step = self.bins.mean - self.overall.mean
        return self.overall.deviations[0] - step.T @ (step * self.count[:, None])

    def all_reduce(self, group: ProcessGroup | None = None) -> SubspaceMoments:
        """See :meth:`BinMoments.all_reduce`."""
        for part in self._parts.values():
            part.all_reduce(group)
        return self

    def finite(self) -> Tensor:
        """Whether all features of a bin were finite, (B,) bool."""
        return self.bins.finite()

    def to(self, device: torch.device | str) -> SubspaceMoments:
        """Move to a device; returns self."""
        for part in self._parts.values():
            part.to(device)
        self.basis = None if self.basis is None else self.basis.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Tensors from which :meth:`load_state_dict` restores this object exactly."""
        basis = None if self.basis is None else self.basis.clone()
        return {"basis": basis, **{name: part.state_dict() for name, part in self._parts.items()}}

    @torch.inference_mode(False)
    def load_state_dict(self, state: object) -> None:
        """Restore the result of :meth:`state_dict`, on the current device.

        Raises:
            CheckpointError: the state has other keys, bins, features or another rank.
        """
        keys("the saved state", state, ("basis", *self._parts), error=CheckpointError)
        assert isinstance(state, dict)
        if state["basis"] is not None:
            like = self.mean.new_empty(self.mean.shape[1], self.within.mean.shape[1])
            (self.basis,) = saved_tensors({"basis": state["basis"]}, {"basis": like}).values()
        else:
            self.basis = None
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
