"""Training steps for ``fit`` and the scikit-learn estimators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import problem
from ...errors import NonFiniteLossError
from .optimization import Optimization, learning_rate, make_optimizer
from .runtime import Runtime
from .sharpness import uphill

__all__ = ["LossWatch", "Step", "Steps"]


class Step(NamedTuple):
    """A finished step: its index in the epoch, this rank's number of labels and mean loss, and the gradient norm."""

    place: int
    labels: int
    loss: Tensor
    norm: Tensor | None


class Steps:
    """The steps of a training. Each updates the parameters of a module by the gradient of one batch.

    The samples of a batch are distributed to the ranks in turn. Each rank's loss is multiplied by its share of the
    labels, so that the average of DistributedDataParallel equals the gradient of a single process.

    Args:
        module: the module to train. Existing gradients are dropped.
        samples: the number of samples of an epoch.
        fewest: the smallest batch; a smaller last batch of an epoch is skipped.
        counts: the number of labels of each sample; None means equal numbers.
        fused: as in :func:`make_optimizer`.
        norms: whether to compute the norm of each gradient even without clipping.
    Attributes:
        batches: the positions of each batch in the order of an epoch.
        total: the number of steps of the whole training.
    """

    def __init__(
        self,
        module: nn.Module,
        optimization: Optimization,
        samples: int,
        runtime: Runtime,
        *,
        fewest: int = 1,
        norms: bool = False,
        counts: Tensor | None = None,
        fused: bool | None = None,
    ) -> None:
        ends = (*range(0, samples, optimization.batch_size), samples)
        self.batches = [slice(a, b) for a, b in pairwise(ends) if b - a >= fewest]
        self.total = optimization.epochs * len(self.batches)
        self.optimizer = make_optimizer(module, optimization, fused=fused)
        self._module, self._parameters = module, list(module.parameters())
        self._optimization, self._runtime = optimization, runtime
        self._counts = counts
        self._norms = norms or optimization.clip_norm is not None
        module.zero_grad()  # also of frozen parameters, whose gradients would enter the norm

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over all epochs."""
        return learning_rate(self._optimization, step, self.total)

    def all_batches(self, order: Tensor, start: int = 0) -> list[tuple[Tensor, int]]:
        """The samples of each batch of an epoch in this order, from this step on, and their number of labels."""
        return [(batch, self._labels(batch)) for batch in (order[place] for place in self.batches[start:])]

    def own_batches(self, order: Tensor, start: int = 0) -> list[tuple[Tensor, int]]:
        """This rank's part of :meth:`all_batches`."""
        rank, world = self._runtime.rank, self._runtime.world
        return [(own, self._labels(own)) for own in (batch[rank::world] for batch, _ in self.all_batches(order, start))]

    def _labels(self, samples: Tensor) -> int:
        return len(samples) if self._counts is None else int(self._counts[samples].sum())

    def epoch(
        self, epoch: int, order: Tensor, loss_of: Callable[[int, Tensor], Tensor], *, start: int = 0
    ) -> Iterator[Step]:
        """An iterator that makes the steps of an epoch.

        Args:
            epoch: counted from 0.
            order: the indices of its samples.
            loss_of: called with the index of a batch in the epoch and this rank's sample indices; returns their mean
                loss.
            start: the number of finished steps of the epoch.
        """
        world = self._runtime.world
        parts = zip(self.all_batches(order, start), self.own_batches(order, start), strict=True)
        for place, ((_, labels), (own, own_labels)) in enumerate(parts, start):
            share = own_labels * world / max(labels, 1)
            loss = loss_of(place, own)
            (loss if world == 1 else loss * share).backward()
            if self._optimization.sharpness is not None:
                with uphill(self._parameters, self._optimization.sharpness, self._module):
                    self.optimizer.zero_grad()
                    (loss_of(place, own) * share).backward()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(epoch * len(self.batches) + place)
            norm = None
            if self._norms:
                norm = nn.utils.clip_grad_norm_(self._parameters, self._optimization.clip_norm or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield Step(place, own_labels, loss.detach(), norm)


class LossWatch:
    """Records on the device the first step whose loss or gradient is not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((3,), -1.0, dtype=torch.float64, device=device)  # step, loss, gradient norm

    def see(self, number: int, step: Step) -> None:
        """Check a step. ``number`` counts it from 0 over all epochs."""
        assert step.norm is not None
        now = torch.stack([torch.full_like(self._first[0], number), step.loss.double(), step.norm.double()])
        new = ~now.isfinite().all() & (self._first[0] < 0)
        self._first = torch.where(new, now, self._first)

    def broken(self) -> bool:
        """Whether there was such a step. This waits for an accelerator."""
        return self._first[0].item() >= 0

    def error(self, steps: Steps, checkpoint: str) -> Exception:
        """The error for this step. ``checkpoint`` is a sentence on the last checkpoint."""
        number, loss, norm = self._first.tolist()
        got = "another rank's"
        if number >= 0:
            place = f"step {int(number) + 1} of {steps.total}, learning rate {steps.rate(int(number)):g}"
            got = f"{loss:g} with a gradient norm of {norm:g} at {place}"
        return problem(
            "the loss and its gradient must be finite",
            got=got,
            fix=f"{checkpoint} Lower the learning rate or set clip_norm, and start in another folder.",
            error=NonFiniteLossError,
        )
