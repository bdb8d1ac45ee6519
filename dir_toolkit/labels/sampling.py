"""Samplers by bin: instance-balanced, class-balanced, between the two, or progressive from one to the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

from .._checks import MOST_LONG, instance, keys, labels_array, not_empty, number, require, shaped, warn, whole
from .._settings import described, differing, shown
from ..errors import CheckpointError
from .bins import Bins, Missing
from .density import LabelDensity, counts_array, to_shares

__all__ = ["BinSampler", "bin_probabilities", "progressive_probabilities"]

Counts = LabelDensity | Tensor | np.ndarray | Sequence[float]


def bin_probabilities(density_or_counts: Counts, q: float) -> np.ndarray:
    r"""The probability with which each bin is drawn: :math:`p_j = n_j^q / \sum_i n_i^q`.

    Where the bins of a density differ in width w, it is :math:`p_j \propto w_j (n_j / w_j)^q`, so that q = 0 draws
    labels uniformly along the axis. Bins without a sample have probability zero at every q.

    Args:
        density_or_counts: a density, or the number of samples per bin.
        q: in [0, 1]. 1 draws samples with equal probability (instance-balanced), 0 draws bins with equal probability
            (class-balanced), and 1/2 is square-root sampling.
    Shape:
        counts: (B,). Returns (B,) float64, summing to one.
    Raises:
        ShapeError: counts are not one-dimensional. ValueError: q lies outside [0, 1], a count is negative or not
        finite, or all counts are zero.
    Source:
        Kang et al. 2020, equation 1 (arXiv:1910.09217).

    >>> bin_probabilities([16, 4, 0], 0.5).round(3).tolist()
    [0.667, 0.333, 0.0]
    """
    counts, widths = _counts_and_widths(density_or_counts)
    return _power(counts, number("q", q, low=0, high=1), widths)


def progressive_probabilities(density_or_counts: Counts, epoch: int, epochs: int) -> np.ndarray:
    r"""The probability with which each bin is drawn on the way from instance-balanced to class-balanced sampling:
    :math:`(1 - t/T)\, p^{q=1} + (t/T)\, p^{q=0}`.

    Args:
        density_or_counts: as in :func:`bin_probabilities`, which has the same shapes and errors.
        epoch: from 0 to ``epochs - 1``. t/T is ``epoch / (epochs - 1)``, so that the first epoch is purely
            instance-balanced and the last is purely class-balanced. A single epoch is class-balanced.
    Raises:
        ValueError: the epoch is not one of the epochs.
    Source:
        Kang et al. 2020, equation 3 (arXiv:1910.09217).

    >>> [progressive_probabilities([3, 1], epoch, 3).tolist() for epoch in range(3)]
    [[0.75, 0.25], [0.625, 0.375], [0.5, 0.5]]
    """
    counts, widths = _counts_and_widths(density_or_counts)
    epochs = whole("epochs", epochs, low=1)
    epoch = whole("epoch", epoch, low=0, high=epochs - 1, fix="Epochs count from 0.")
    return _progressive(counts, epoch, epochs, widths)


class BinSampler(Sampler[int]):
    """A sampler for a ``DataLoader``. Each draw takes a bin by its probability, and then any of its samples with equal
    probability.

    The order of an epoch depends on the settings and the epoch number alone, and is the same on every rank. A rank
    yields every ``world``-th sample. The parts of the ranks are not padded, so that they differ by one sample where
    ``num_samples`` is not a multiple of ``world``. Under DistributedDataParallel choose a multiple, or use its
    ``join``.

    Call :meth:`set_epoch` before each epoch. An iteration that starts without it draws the next epoch and warns once.
    An iteration starts at the first sample of the epoch, except after :meth:`load_state_dict` or :meth:`start`.

    Split the samples over ranks only once. Accelerate, and with it the Trainer of transformers, splits every sampler:
    do not give ``rank`` and ``world`` there. Lightning splits a sampler unless it is a ``DistributedSampler``, which
    this one is where ``world`` is above 1.

    Args:
        labels: of the training set, in label units. Sample i has ``labels[i]``.
        missing: ``"raise"``; or ``"drop"``, which never draws a sample whose label is NaN.
        q: as in :func:`bin_probabilities`. 0 is class-balanced.
        progressive_epochs: the number of epochs in which sampling changes from instance-balanced to class-balanced
            (:func:`progressive_probabilities`). Afterwards it stays class-balanced. Give this or ``q``.
        num_samples: the samples per epoch over all ranks. None means the number of labels that are not missing.
        replacement: whether an epoch may hold a sample twice. Without replacement bins are less balanced the closer
            ``num_samples`` is to the number of labels.
        seed: at least 0.
        rank: the number of this process.
        world: the number of processes.
    Shape:
        labels: (N,).
    Raises:
        LabelError: as :meth:`Bins.index`. ShapeError: labels are not one-dimensional. ValueError: there is no label; q
        and ``progressive_epochs`` are both given; there are fewer samples than ranks, or more than labels without
        replacement.
    Source:
        Kang et al. 2020, section 3 (arXiv:1910.09217); without replacement: Efraimidis and Spirakis 2006.

    >>> sampler = BinSampler([0, 0, 0, 0, 0, 1], Bins.classes(2), num_samples=1000)
    >>> share = sum(index == 5 for index in sampler) / len(sampler)
    >>> 0.45 < share < 0.55
    True
    """

    def __init__(
        self,
        labels: Any,
        bins: Bins,
        *,
        q: float = 0.0,
        progressive_epochs: int | None = None,
        missing: Missing = "raise",
        num_samples: int | None = None,
        replacement: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        instance(Bins, bins=bins)
        instance(bool, replacement=replacement)
        index = torch.from_numpy(bins.index(labels_array(labels), missing=missing))
        shaped(("N",), labels=index)
        not_empty(labels=index)
        self.num_labels, self.missing = len(index), missing
        self._digest = hashlib.sha256(index.numpy().astype("<i8").tobytes()).hexdigest()[:12]
        members = torch.argsort(index, stable=True)  # by bin
        self._members = members[(index < 0).sum() :]
        count = len(self._members)
        require(count > 0, "labels must hold at least one that is not missing", got=f"{len(index)} that are")
        self._counts = torch.bincount(index[index >= 0], minlength=len(bins))
        self.bins = bins
        self.q = number("q", q, low=0, high=1)
        self.progressive_epochs = progressive_epochs
        if progressive_epochs is not None:
            self.progressive_epochs = whole("progressive_epochs", progressive_epochs, low=1)
            require(self.q == 0, "give either q or progressive_epochs", got=f"{q} and {progressive_epochs}")
        self.seed = whole("seed", seed, low=0)
        self.world = whole("world", world, low=1)
        self.rank = whole("rank", rank, low=0, high=self.world - 1, fix="Ranks count from 0 and lie below world.")
        if self.world > 1 and type(self) is BinSampler:
            # Lightning checks the class. Choosing it in __new__ would hide the signature of __init__.
            self.__class__ = _SharedBinSampler
        most, fix = MOST_LONG if replacement else count, "Use replacement=True to draw more samples than there are."
        num_samples = count if num_samples is None else num_samples
        self.num_samples = whole("num_samples", num_samples, low=self.world, high=most, fix=fix)
        self.replacement = replacement
        if not replacement and self.num_samples == count and (self.q < 1 or progressive_epochs is not None):
            warn(
                "without replacement every sample is drawn once, so that an epoch is reordered but not balanced. Use "
                "replacement=True, or a smaller num_samples."
            )
        self.epoch = 0
        self._yielded = self._skip = 0
        self._passed = False  # whether an iteration has started since the epoch was set
        self._warned = False

    def order(self, epoch: int) -> Tensor:
        """The sample indices of an epoch, over all ranks: (num_samples,) int64."""
        epoch = whole("epoch", epoch, low=0)
        generator = torch.Generator("cpu").manual_seed(_derived(self.seed, epoch))
        uniform = partial(torch.rand, dtype=torch.float64, generator=generator, device="cpu")
        probabilities = torch.from_numpy(self._probabilities(epoch))
        if not self.replacement:
            # Of exponential variables, each is the smallest with a probability proportional to its rate. They are
            # computed from uniform numbers, since torch's exponential numbers depend on its build.
            waits = -torch.log1p(-uniform(len(self._members)))
            rates = (probabilities / self._counts).repeat_interleave(self._counts)
            return self._members[torch.argsort(waits / rates, stable=True)[: self.num_samples]]
        chances = uniform(2, self.num_samples)
        reach = probabilities.cumsum(0)
        drawn = torch.searchsorted(reach / reach[-1], chances[0], right=True)  # never a bin of probability zero
        counts = self._counts[drawn]
        within = (chances[1] * counts).long()
        return self._members[(self._counts.cumsum(0) - self._counts)[drawn] + within]

    def __iter__(self) -> Iterator[int]:
        if self._passed:
            if not self._warned:
                self._warned = True
                warn(
                    "set_epoch was not called since the last iteration, so that this one draws the next epoch. Call "
                    "sampler.set_epoch(epoch) before each epoch. Resuming a run needs it."
                )
            self.set_epoch(self.epoch + 1)
        self._passed = True
        share = self.order(self.epoch)[self.rank :: self.world].tolist()
        self._yielded, self._skip = self._skip, 0
        for place in range(self._yielded, len(share)):
            self._yielded = place + 1
            yield share[place]

    def __len__(self) -> int:
        """The number of samples of this rank per epoch."""
        return len(range(self.rank, self.num_samples, self.world))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration draws. Setting the current epoch again does not restart it."""
        epoch = whole("epoch", epoch, low=0)
        self._passed = False
        if epoch != self.epoch:
            self.epoch = epoch
            self._yielded = self._skip = 0

    def start(self, consumed: int) -> None:
        """Start the next iteration after the first ``consumed`` samples of this rank.

        A ``DataLoader`` with workers draws samples before they are used. Count the samples that were trained on, and
        pass that number after loading the state.
        """
        consumed = whole("consumed", consumed, low=0, high=len(self))
        self._passed = False
        self._yielded = self._skip = consumed

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, as plain values. It counts all samples that were yielded (see :meth:`start`)."""
        return {"epoch": self.epoch, "yielded": self._yielded, "settings": self._described()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, on this rank or another of the same run.

        Raises:
            CheckpointError: the state belongs to a sampler with other settings or labels.
        """
        keys("state", state, ("epoch", "yielded", "settings"))
        differs, rule = (
            differing(state["settings"], self._described()),
            "the state must be of the same settings and labels",
        )
        require(not differs, rule, got=differs, error=CheckpointError)
        yielded = whole("yielded", state["yielded"], low=0, high=len(range(0, self.num_samples, self.world)))
        self.set_epoch(state["epoch"])
        self.start(min(yielded, len(self)))

    def __repr__(self) -> str:
        return f"<BinSampler: {shown(self.settings)}, rank={self.rank}>"

    def _probabilities(self, epoch: int) -> np.ndarray:
        counts = self._counts.numpy().astype(np.float64)
        widths = self.bins.relative_widths
        if self.progressive_epochs is None:
            return _power(counts, self.q, widths)
        return _progressive(counts, min(epoch, self.progressive_epochs - 1), self.progressive_epochs, widths)

    def _described(self) -> dict[str, Any]:
        return described("settings", self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The values that define the order of every epoch, equal on all ranks. Labels are given by their number and a
        digest of their bins."""
        return {
            "labels": f"{self.num_labels} ({self._digest})",
            "bins": self.bins,
            "missing": self.missing,
            "q": self.q,
            "progressive_epochs": self.progressive_epochs,
            "num_samples": self.num_samples,
            "replacement": self.replacement,
            "seed": self.seed,
            "world": self.world,
        }


class _SharedBinSampler(BinSampler, DistributedSampler[int]):
    """A sampler that is already split over ranks. Lightning recognises it by its base class."""


def _counts_and_widths(density_or_counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """The counts and the relative widths of their bins."""
    if isinstance(density_or_counts, LabelDensity):
        counts, widths = density_or_counts.counts, density_or_counts.bins.relative_widths
    else:
        counts = counts_array(density_or_counts)
        widths = np.ones(len(counts))
    require(counts.any(), "at least one bin must hold a sample", got="counts of zero")
    return counts.astype(np.float64), widths


def _power(counts: np.ndarray, q: float, widths: np.ndarray) -> np.ndarray:
    return to_shares(np.where(counts > 0, widths * (counts / widths) ** q, 0.0))


def _progressive(counts: np.ndarray, epoch: int, epochs: int, widths: np.ndarray) -> np.ndarray:
    done = epoch / (epochs - 1) if epochs > 1 else 1.0
    return (1 - done) * _power(counts, 1.0, widths) + done * _power(counts, 0.0, widths)


def _derived(seed: int, epoch: int) -> int:
    """A seed that depends on these two numbers alone."""
    digest = hashlib.sha256(repr((seed, "sampler", epoch)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
