"""Draw training samples by their bin: instance-balanced, class-balanced, between the two, or from one to the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Sampler

from .._checks import (
    MOST_LONG,
    instance,
    keys,
    labels_array,
    not_empty,
    number,
    require,
    shaped,
    warn,
    whole,
)
from .._settings import described, differing, shown
from ..errors import CheckpointError
from .bins import Bins, Missing
from .density import LabelDensity, counts_array, to_shares

__all__ = ["BinSampler", "bin_probabilities", "progressive_probabilities"]

Counts = LabelDensity | Tensor | np.ndarray | Sequence[float]


def bin_probabilities(density_or_counts: Counts, q: float) -> np.ndarray:
    r"""The probability with which each bin is drawn: :math:`p_j = n_j^q / \sum_i n_i^q`.

    Where the bins of a density differ in width, it is :math:`p_j \propto w_j (n_j / w_j)^q` with the widths w, so that
    q = 0 draws labels evenly along the axis. Bins without a sample have probability zero at every q.

    Args:
        density_or_counts: a density, or the number of samples per bin.
        q: in [0, 1]. 1 draws every sample alike (instance-balanced), 0 draws every bin alike (class-balanced), and 1/2
            is the square root.
    Shape:
        counts: (B,). Returns (B,) float64, summing to one.
    Raises:
        ShapeError: counts are no row. ValueError: q lies outside [0, 1], a count is negative or not finite, or all
        counts are zero.
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
        density_or_counts: as in :func:`bin_probabilities`, whose shapes and errors hold here, too.
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
    """Sample numbers for a ``DataLoader``. Each draw takes a bin and then one of its samples, all of them alike.

    The order of an epoch is a pure function of the settings and the epoch, and is the same on every rank. A rank yields
    every ``world``-th sample of it. Shares neither overlap nor are padded, so that they differ by one sample where
    ``num_samples`` is no multiple of ``world``. Under DistributedDataParallel choose a multiple, or use its ``join``.

    A pass starts at the first sample of the epoch, except once after :meth:`load_state_dict` or :meth:`start`. Call
    :meth:`set_epoch` before each epoch. A pass that begins without it goes on to the next epoch and warns once.

    Share the samples out once. Lightning leaves a sampler with ``rank`` and ``world`` as it is, and shares out one
    without them where its ``use_distributed_sampler`` says so. Accelerate, and with it the Trainer of transformers,
    shares out every sampler: leave ``rank`` and ``world`` out there. With a ``world`` above 1 the sampler is also a
    ``DistributedSampler``, by which Lightning knows that it is shared out already.

    Args:
        labels: of the training set, in label units. Sample i has ``labels[i]``.
        missing: what happens to NaN: ``"raise"``; or ``"drop"``, which never draws a sample whose label is missing.
        q: as in :func:`bin_probabilities`. 0 is class-balanced.
        progressive_epochs: takes the place of q. The sampler goes from instance-balanced to class-balanced in so many
            epochs (:func:`progressive_probabilities`) and stays there.
        num_samples: the samples per epoch, of all ranks together. None means as many as there are labels that
            are not missing.
        replacement: whether an epoch may hold a sample twice. Without replacement each draw is from the samples that
            are left, so that bins are less balanced the closer ``num_samples`` comes to the number of labels.
        seed: at least 0.
        rank: the number of this process.
        world: the number of processes.
    Shape:
        labels: (N,).
    Raises:
        LabelError: as :meth:`Bins.index`. ShapeError: labels are no row. ValueError: there is no label; q and
        ``progressive_epochs`` are both given; there are fewer samples than ranks, or more than labels without
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
            require(self.q == 0, "give q or progressive_epochs, and not both", got=f"{q} and {progressive_epochs}")
        self.seed = whole("seed", seed, low=0)
        self.world = whole("world", world, low=1)
        self.rank = whole("rank", rank, low=0, high=self.world - 1, fix="Ranks count from 0 and lie below world.")
        if self.world > 1 and type(self) is BinSampler:
            # Lightning asks for the class. A __new__ that chose it would hide the signature of __init__.
            self.__class__ = _SharedBinSampler
        most, fix = MOST_LONG if replacement else count, "Use replacement=True to draw more than there are."
        num_samples = count if num_samples is None else num_samples
        self.num_samples = whole("num_samples", num_samples, low=self.world, high=most, fix=fix)
        self.replacement = replacement
        if not replacement and self.num_samples == count and (self.q < 1 or progressive_epochs is not None):
            warn(
                "without replacement all samples are drawn once, so that an epoch is reordered but not balanced. Use "
                "replacement=True, or a smaller num_samples."
            )
        self.epoch = 0
        self._yielded = self._skip = 0
        self._passed = False  # whether a pass has begun at this epoch since it was set
        self._warned = False

    def order(self, epoch: int) -> Tensor:
        """The sample numbers of an epoch, over all ranks: (num_samples,) int64."""
        epoch = whole("epoch", epoch, low=0)
        generator = torch.Generator("cpu").manual_seed(_derived(self.seed, epoch))
        uniform = partial(torch.rand, dtype=torch.float64, generator=generator, device="cpu")
        probabilities = torch.from_numpy(self._probabilities(epoch))
        if not self.replacement:
            # The sample that comes first in a race of exponential clocks is drawn in proportion to their rates. The
            # clocks come from uniform numbers, since torch's own exponential numbers depend on how it was built.
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
                    "set_epoch was not called since the last pass, so that this one draws the next epoch. Call "
                    "sampler.set_epoch(epoch) before each epoch, as a resumed run needs it."
                )
            self.set_epoch(self.epoch + 1)
        self._passed = True
        share = self.order(self.epoch)[self.rank :: self.world].tolist()
        self._yielded, self._skip = self._skip, 0
        for place in range(self._yielded, len(share)):
            self._yielded = place + 1
            yield share[place]

    def __len__(self) -> int:
        """The samples of this rank per epoch."""
        return len(range(self.rank, self.num_samples, self.world))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next pass draws. The epoch at which the sampler stands is not started anew."""
        epoch = whole("epoch", epoch, low=0)
        self._passed = False
        if epoch != self.epoch:
            self.epoch = epoch
            self._yielded = self._skip = 0

    def start(self, consumed: int) -> None:
        """Let the next pass begin after ``consumed`` samples of this rank's share.

        A ``DataLoader`` with workers asks for samples before they are used. Count the samples that were trained on, and
        hand that number over after loading the state.
        """
        consumed = whole("consumed", consumed, low=0, high=len(self))
        self._passed = False
        self._yielded = self._skip = consumed

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as plain values. It counts what was yielded, whether used or not (:meth:`start`)."""
        return {"epoch": self.epoch, "yielded": self._yielded, "settings": self._described()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on this rank or another of the same run.

        Raises:
            CheckpointError: the state belongs to a sampler of other settings or labels.
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
        """What the orders follow from, which is the same on every rank. For the labels stand their number and a digest
        of their bins."""
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
    """A sampler that is shared out over ranks already, which Lightning tells by its class."""


def _counts_and_widths(density_or_counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and the relative widths of their bins."""
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
