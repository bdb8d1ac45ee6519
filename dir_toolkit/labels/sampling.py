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

from .._checks import finite, instance, keys, labels_array, length, not_empty, number, on_host, problem, warn, whole
from .._settings import described, differing, shown
from ..errors import CheckpointError, ShapeError
from .bins import Bins
from .density import LabelDensity, to_shares

__all__ = ["BinSampler", "bin_probabilities", "progressive_probabilities"]

Counts = LabelDensity | Tensor | np.ndarray | Sequence[float]


def bin_probabilities(density_or_counts: Counts, q: float) -> np.ndarray:
    r"""How likely each bin is drawn: :math:`p_j = n_j^q / \sum_i n_i^q`.

    Where the bins of a density differ in width, :math:`p_j \propto w_j (n_j / w_j)^q`, w being widths: q = 0 then draws
    labels evenly along the axis.

    Args:
        density_or_counts: a density, or the number of samples per bin.
        q: in [0, 1]: 1 draws every sample alike (instance-balanced), 0 every bin (class-balanced), 1/2 is the square
            root. Bins without a sample have probability zero at every q.
    Shape:
        counts: (B,). Returns (B,) float64, summing to one.
    Raises:
        ShapeError: counts are no row. ValueError: q lies outside [0, 1], a count is negative or not finite, or all are
        zero.
    Source:
        Kang et al. 2020, equation 1 (arXiv:1910.09217).

    >>> bin_probabilities([16, 4, 0], 0.5).round(3).tolist()
    [0.667, 0.333, 0.0]
    """
    counts, widths = _checked_counts(density_or_counts)
    return _power(counts, number("q", q, low=0, high=1), widths)


def progressive_probabilities(density_or_counts: Counts, epoch: int, epochs: int) -> np.ndarray:
    r"""How likely each bin is drawn on the way from instance-balanced to class-balanced sampling:
    :math:`(1 - t/T)\, p^{q=1} + (t/T)\, p^{q=0}`.

    Args:
        density_or_counts: as in :func:`bin_probabilities`, whose shapes and errors hold too.
        epoch: from 0 to ``epochs - 1``. t/T is ``epoch / (epochs - 1)``, so that the first epoch is purely
            instance-balanced and the last purely class-balanced, which a single one is too.
    Raises:
        ValueError: the epoch is not one of the epochs.
    Source:
        Kang et al. 2020, equation 3 (arXiv:1910.09217).

    >>> [progressive_probabilities([3, 1], epoch, 3).tolist() for epoch in range(3)]
    [[0.75, 0.25], [0.625, 0.375], [0.5, 0.5]]
    """
    counts, widths = _checked_counts(density_or_counts)
    epochs = whole("epochs", epochs, low=1)
    epoch = whole("epoch", epoch, low=0)
    if epoch >= epochs:
        raise problem(f"epoch must be below epochs={epochs}", got=epoch, fix="Epochs count from 0.")
    return _progressive(counts, epoch, epochs, widths)


class BinSampler(Sampler[int]):
    """Sample numbers for a ``DataLoader``, drawn by bin: first a bin, then one of its samples, all alike.

    An epoch's order is a pure function of the settings and the epoch, and the same on every rank; a rank yields every
    ``world``-th of it. Shares neither overlap nor are padded, so that they differ by one sample where ``num_samples``
    is no multiple of ``world``: under DistributedDataParallel choose one that is, or use its ``join``.

    A pass starts at the epoch's first sample, except once after :meth:`load_state_dict` or :meth:`start`. Call
    :meth:`set_epoch` before each epoch; a pass that begins without it goes on to the next epoch, which is said once.

    Share the samples out once. Lightning takes both this sampler with ``rank`` and ``world`` and one without, whatever
    its ``use_distributed_sampler``, which shares out the latter. Accelerate, and with it the Trainer of transformers,
    shares out every sampler: leave ``rank`` and ``world`` out there.

    Args:
        labels: of the training set, in label units; sample i has ``labels[i]``.
        q: as in :func:`bin_probabilities`; 0 is class-balanced.
        progressive_epochs: go from instance-balanced to class-balanced in so many epochs
            (:func:`progressive_probabilities`) and stay there; takes the place of q.
        num_samples: an epoch, of all ranks together; None means as many as there are labels.
        replacement: whether an epoch may hold a sample twice. Without, each draw is from what is left, so that the
            closer ``num_samples`` comes to the number of labels, the less the order's bins are balanced.
        seed: at least 0. rank, world: of this process, and how many there are.
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
        num_samples: int | None = None,
        replacement: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        instance(Bins, bins=bins)
        instance(bool, replacement=replacement)
        # Not named by the argument alone, since Bins would then advise what a sampler does not take.
        labels = on_host("labels", labels) if isinstance(labels, Tensor) else labels
        index = torch.as_tensor(bins.index(labels, name="the labels"), device="cpu")
        if index.ndim != 1:
            raise problem("labels must be (N,)", got=f"shape {tuple(index.shape)}", error=ShapeError)
        not_empty(labels=index)
        self.bins = bins
        self.q = number("q", q, low=0, high=1)
        self.progressive_epochs = progressive_epochs
        if progressive_epochs is not None:
            self.progressive_epochs = whole("progressive_epochs", progressive_epochs, low=1)
            if self.q != 0:
                raise problem("give q or progressive_epochs, and not both", got=f"{q} and {progressive_epochs}")
        self.seed = whole("seed", seed, low=0)
        self.world = whole("world", world, low=1)
        self.rank = whole("rank", rank, low=0)
        if self.rank >= self.world:
            raise problem(f"rank must be below world={self.world}", got=self.rank)
        if self.world > 1 and type(self) is BinSampler:
            self.__class__ = _SharedBinSampler
        self.num_samples = len(index) if num_samples is None else length("num_samples", num_samples)
        if self.num_samples < self.world:
            rule = f"num_samples must be at least one a rank, {self.world}"
            raise problem(rule, got=self.num_samples)
        self.replacement = replacement
        if not replacement and self.num_samples > len(index):
            raise problem(
                f"without replacement num_samples must be at most {len(index)}, the number of labels",
                got=self.num_samples,
                fix="Use replacement=True.",
            )
        if not replacement and self.num_samples == len(index) and (self.q < 1 or progressive_epochs is not None):
            warn(
                "without replacement all samples are drawn once, so that an epoch is reordered but not balanced. Use "
                "replacement=True, or a smaller num_samples.",
            )
        self._digest = hashlib.sha256(index.numpy().astype("<i8").tobytes()).hexdigest()[:12]
        self._counts = torch.bincount(index, minlength=len(bins))
        self._members = torch.argsort(index, stable=True)  # by bin
        self.epoch = 0
        self._yielded = self._skip = 0
        self._passed = self._said = False  # whether a pass has begun at this epoch since it was set

    def order(self, epoch: int) -> Tensor:
        """The sample numbers of an epoch, over all ranks: (num_samples,) int64."""
        epoch = whole("epoch", epoch, low=0)
        generator = torch.Generator("cpu").manual_seed(_derived(self.seed, epoch))
        uniform = partial(torch.rand, dtype=torch.float64, generator=generator, device="cpu")
        probabilities = torch.from_numpy(self._probabilities(epoch))
        if not self.replacement:
            # The sample that comes first in a race of exponential clocks is drawn in proportion to the clocks' rates.
            # From uniform numbers, since torch's own exponential ones depend on how it was built.
            waits = -torch.log1p(-uniform(len(self._members)))
            rates = (probabilities / self._counts).repeat_interleave(self._counts)
            return self._members[torch.argsort(waits / rates, stable=True)[: self.num_samples]]
        chances = uniform(2, self.num_samples)
        reach = probabilities.cumsum(0)
        drawn = torch.searchsorted(reach / reach[-1], chances[0], right=True)  # never a bin of no width
        counts = self._counts[drawn]
        within = (chances[1] * counts).long()
        return self._members[(self._counts.cumsum(0) - self._counts)[drawn] + within]

    def __iter__(self) -> Iterator[int]:
        if self._passed:
            self._go_on()
        self._passed = True
        share = self.order(self.epoch)[self.rank :: self.world].tolist()
        self._yielded, self._skip = self._skip, 0
        for place in range(self._yielded, len(share)):
            self._yielded = place + 1
            yield share[place]

    def _go_on(self) -> None:
        if not self._said:
            self._said = True
            warn(
                "set_epoch was not called since the last pass, so that this one draws the next epoch. Call "
                "sampler.set_epoch(epoch) before each epoch, as a resumed run needs it.",
            )
        self.set_epoch(self.epoch + 1)

    def __len__(self) -> int:
        """This rank's samples an epoch."""
        return len(range(self.rank, self.num_samples, self.world))

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass draws. The epoch it stands at is not started anew."""
        epoch = whole("epoch", epoch, low=0)
        self._passed = False
        if epoch != self.epoch:
            self.epoch = epoch
            self._yielded = self._skip = 0

    def start(self, consumed: int) -> None:
        """Let the next pass begin after ``consumed`` samples of this rank's share.

        For a ``DataLoader`` with workers, which asks for samples before they are used: count what was trained on, and
        hand that number over after loading the state.
        """
        consumed = whole("consumed", consumed, low=0)
        if consumed > len(self):
            raise problem(f"consumed must be at most {len(self)}, this rank's share", got=consumed)
        self._passed = False
        self._yielded = self._skip = consumed

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as plain values; it counts what was yielded, be it used or not (:meth:`start`)."""
        return {
            "epoch": self.epoch,
            "yielded": self._yielded,
            "settings": self._described(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on this rank or another of the same run.

        Raises:
            CheckpointError: the state belongs to a sampler of other settings or labels.
        """
        keys("state", state, ("epoch", "yielded", "settings"))
        if got := differing(state["settings"], self._described()):
            rule = "the state must belong to a sampler of the same settings and labels"
            raise problem(rule, got=got, error=CheckpointError)
        epoch = whole("epoch", state["epoch"], low=0)
        yielded = whole("yielded", state["yielded"], low=0)
        largest_share = len(range(0, self.num_samples, self.world))
        if yielded > largest_share:
            raise problem(f"yielded must be at most {largest_share}", got=yielded, error=CheckpointError)
        self.set_epoch(epoch)
        self.start(min(yielded, len(self)))

    def __repr__(self) -> str:
        return f"<BinSampler: {shown(self.settings)}, rank={self.rank}>"

    def _probabilities(self, epoch: int) -> np.ndarray:
        counts = self._counts.numpy().astype(np.float64)
        widths = self.bins.relative_widths
        if self.progressive_epochs is None:
            return _power(counts, self.q, widths)
        return _progressive(counts, min(epoch, self.progressive_epochs - 1), self.progressive_epochs, widths)

    @property
    def num_labels(self) -> int:
        """How many samples the orders are drawn from."""
        return len(self._members)

    def _described(self) -> dict[str, Any]:
        return described("settings", self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What the orders follow from, the same on every rank; of the labels, how many and a digest of their bins."""
        return {
            "labels": f"{len(self._members)} ({self._digest})",
            "bins": self.bins,
            "q": self.q,
            "progressive_epochs": self.progressive_epochs,
            "num_samples": self.num_samples,
            "replacement": self.replacement,
            "seed": self.seed,
            "world": self.world,
        }


class _SharedBinSampler(BinSampler, DistributedSampler[int]):
    """One that Lightning can tell is shared out over ranks already, by its class."""


def _checked_counts(density_or_counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and the relative widths of their bins."""
    if isinstance(density_or_counts, LabelDensity):
        counts, widths = density_or_counts.counts, density_or_counts.bins.relative_widths
    else:
        counts = labels_array(density_or_counts, "counts")
        if counts.ndim != 1:
            raise problem("counts must be one row of numbers", got=f"shape {counts.shape}", error=ShapeError)
        not_empty(counts=counts)
        finite(counts=counts)
        if counts.min() < 0:
            raise problem("counts must not be negative", got=f"a minimum of {counts.min():g}")
        widths = np.ones(len(counts))
    if not counts.any():
        raise problem("at least one bin must hold a sample", got="counts of zero")
    return counts.astype(np.float64), widths


def _power(counts: np.ndarray, q: float, widths: np.ndarray) -> np.ndarray:
    return to_shares(np.where(counts > 0, widths * (counts / widths) ** q, 0.0))


def _progressive(counts: np.ndarray, epoch: int, epochs: int, widths: np.ndarray) -> np.ndarray:
    done = epoch / (epochs - 1) if epochs > 1 else 1.0
    return (1 - done) * _power(counts, 1.0, widths) + done * _power(counts, 0.0, widths)


def _derived(seed: int, epoch: int) -> int:
    """A seed that depends on these two only."""
    digest = hashlib.sha256(repr((seed, "sampler", epoch)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
