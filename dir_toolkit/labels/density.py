"""How many labels each bin holds: counted, merged, smoothed, and read as a prior or as regions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import (
    finite,
    instance,
    labels_array,
    not_empty,
    number,
    one_of,
    problem,
    require,
    same_bins,
    shaped,
    warn,
    whole,
)
from .._ranks import check_group, is_parallel, summed
from .bins import Bins, Missing, Outside, axis_bytes
from .counting import count_labels
from .grid import AnyBins, BinGrid, Windows, checked_windows
from .kernels import EDGES, Edges, smooth_axes

if TYPE_CHECKING:
    from .description import Description
    from .weights import LDS

__all__ = ["REGIONS", "LabelDensity"]

REGIONS = ("many", "medium", "few", "unseen")

_FEWEST_LABELS, _FEWEST_BINS = 20, 10  # of an axis, for one bin with more than half of all labels to be warned of


class LabelDensity:
    """Labels counted per bin.

    Attributes:
        bins: the label axis, or a grid of several.
        counts: (B,), read-only: int64 as counted, and float64 once smoothed, when it is the effective number of labels.
            Over a grid, ``counts.reshape(bins.shape)`` has one dimension per axis.

    >>> density = LabelDensity.count([0, 0, 1], Bins.classes(3))
    >>> density.counts.tolist(), density.regions(many=1, few=1).tolist()
    ([2, 1, 0], ['many', 'medium', 'unseen'])
    """

    # Whether samples count by weights, so that counts are no whole numbers, though nothing has smoothed them. A bin
    # without any is no news to whoever drew them.
    _of_weighted_rows = False

    def __init__(self, bins: AnyBins, counts: Sequence[float] | np.ndarray | Tensor) -> None:
        instance((Bins, BinGrid), bins=bins)
        counts = counts_array(counts)
        shaped((len(bins),), "one per bin", counts=counts)
        counts.setflags(write=False)
        self.bins, self.counts = bins, counts
        self._warned_crowded = False  # whether count has warned of these labels, so that nothing warns of them again

    @classmethod
    def count(
        cls, labels: Any, bins: AnyBins, *, outside: Outside = "raise", missing: Missing = "raise"
    ) -> LabelDensity:
        """Count labels, which may come in pieces.

        Dask counts a dask array, or what wraps one, within the task of each chunk. Nothing but counts leaves the worker
        that holds a chunk, and as many chunks are in memory as there are workers. Chunks may be of unknown size. What
        the task of a chunk raises is passed on.

        A warning tells of a continuous axis of ten bins or more, one of which holds more than half of the labels.

        Args:
            labels: an array, a tensor, an ``xarray.DataArray``, a dask array, a list of numbers, or an iterable of any
                of these, of which one piece at a time is held. Labels have any shape, such as maps of one label per
                pixel; over a grid of K axes they are (..., K). Of a loader of inputs and labels hand over the labels
                alone: ``(y for x, y in loader)``.
            outside, missing: as in :meth:`Bins.index`. ``"drop"`` leaves labels beyond the axis, or missing ones,
                uncounted.
        Raises:
            LabelError: as :meth:`Bins.index`, naming the chunk of a dask array. ValueError: there is no label at all.
            ShapeError: over a grid, the last axis is not K long.
        """
        instance((Bins, BinGrid), bins=bins)
        density = cls(bins, count_labels(labels, bins, outside, missing))
        for crowding in crowded_bins(bins, density.counts):
            density._warned_crowded = True
            warn(
                f"{crowding}, and are not told apart there. Take the logarithm of the labels, or bins that are narrow "
                "where labels are many (Bins.quantile, Bins.from_edges). Or look for mistyped labels."
            )
        return density

    def all_reduce(self, *, group: dist.ProcessGroup | None = None) -> LabelDensity:
        """The labels of all ranks counted together, on each rank. All ranks must call this. Outside
        ``torch.distributed`` it is the density itself.

        A rank without labels brings ``LabelDensity(bins, [0] * len(bins))``.

        Args:
            group: the ranks that hold different labels, where not all ranks do, as in tensor or pipeline parallel
                layouts. None means all ranks.
        Raises:
            ValueError: the ranks' bins differ. Then it is raised on every rank. TypeError: ``group`` is no process
            group.
        """
        check_group(group)
        if not is_parallel():
            return self
        own = (_digest(self.bins), self.counts.dtype == np.float64)
        known: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(known, own, group=group)
        if differ := [rank for rank, (digest, _) in enumerate(known) if digest != known[0][0]]:
            raise problem("all ranks must count over the same bins", got=f"others on ranks {differ} than rank 0")
        dtype = torch.float64 if any(smoothed for _, smoothed in known) else torch.int64
        (counts,) = summed(torch.tensor(self.counts, dtype=dtype, device="cpu"), group=group)
        return LabelDensity(self.bins, counts.numpy())

    def __reduce__(self) -> tuple[Any, ...]:  # copies are made anew, since NumPy's are no longer read-only
        return LabelDensity, (self.bins, self.counts), {"_of_weighted_rows": self._of_weighted_rows}

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this density from others."""
        return {"bins": self.bins, "counts": self.counts}

    def __add__(self, other: LabelDensity) -> LabelDensity:
        if not isinstance(other, LabelDensity):
            return NotImplemented
        same_bins("the other density", other, self.bins)
        counts = self.counts + other.counts
        require(counts.dtype.kind != "i" or counts.min() >= 0, "counts must add up to less than 2^63", got="more")
        return LabelDensity(self.bins, counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LabelDensity):
            return NotImplemented
        return self.bins == other.bins and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<LabelDensity: {self.counts.sum(dtype=np.float64):g} labels in {len(self.bins)} bins>"

    def smooth(self, kernel: Windows, *, edges: Edges = "reflect") -> LabelDensity:
        """The effective density: counts averaged over neighbouring bins (:func:`dir_toolkit.labels.kernels.smooth`).
        Where bins differ in width it is the counts per label unit that are averaged.

        Args:
            kernel: one window, or over a grid also one window per axis. A grid is smoothed along each axis in turn,
                and ``[1.0]`` leaves an axis as it is.
        Source:
            Yang et al. 2021, equation 1 (arXiv:2102.09554).
        """
        one_of("edges", edges, EDGES)
        windows = checked_windows(kernel, self.bins)
        smoothed = smooth_axes(self._per_width().reshape(self.bins.shape), windows, edges=edges)
        return LabelDensity(self.bins, smoothed.ravel() * self.bins.relative_widths)

    def _per_width(self) -> np.ndarray:
        """What each bin would hold if it had the mean width, which is the density per label unit, (B,) float64."""
        return self.counts / self.bins.relative_widths

    def weighted(self, lds: LDS) -> LabelDensity:
        """The counts of each bin times the mean weight of its labels. A loss with these weights sees this density, and
        a model is trained under its prior.

        Args:
            lds: fitted, over these bins or over other bins of the same axes. Where its bins are others, labels are
                taken to lie evenly within each bin of the density.
        Raises:
            TypeError: lds is no LDS. NotFittedError: it is not fitted. ValueError: it weighs labels of another kind, or
            a bin with labels reaches beyond its axis and it has ``outside="raise"``.
        """
        from .weights import LDS

        instance(LDS, lds=lds)
        weights = lds._of_bins(self.bins)
        counts = np.where(self.counts > 0, self.counts * weights, 0.0)
        i = int(np.isnan(counts).argmax())
        got, fix = f"{self.counts[i]:g} labels in bin {i} of {self.bins!r}", 'Make the LDS with outside="clip".'
        require(not np.isnan(counts[i]), f"lds must weigh labels beyond its axis {lds.bins!r}", got=got, fix=fix)
        return LabelDensity(self.bins, counts)

    def prior(self, *, floor: float = 0.0) -> np.ndarray:
        """The share of labels in each bin, (B,) float64, summing to one.

        Args:
            floor: the least count that a bin is taken to have, in labels; where widths differ, a bin of mean width.
                Above zero it keeps log-priors finite.
        Raises:
            ValueError: the floor is negative, or no label was counted and the floor is zero.
        """
        floor = number("floor", floor, low=0)
        counts = np.maximum(self.counts, floor * self.bins.relative_widths)
        require(counts.any(), "at least one label must have been counted", got="none, all lay outside the bins")
        return to_shares(counts)

    def describe(self) -> Description:
        """How the labels lie over the bins, and what to do about it: a text to print, with its numbers as attributes.

        Raises:
            ValueError: no label was counted.

        >>> tail = np.repeat(np.arange(8), [900, 500, 250, 100, 40, 15, 4, 1])
        >>> LabelDensity.count(tail, Bins.uniform(0, 8, width=1)).describe()
        labels            1,810 in 8 bins
        labels per bin    70, the median of bins that hold any
        empty bins        0, at most 0 in a row between labels
        imbalance         900 times as dense in the densest bin as in the sparsest
        effective labels  227 under inverse weights, 13%
        regions           3 many, 2 medium, 3 few, 0 unseen
        - Weigh the loss by LDS(bins).fit(labels), or scheme="inverse" to go further.
        - Or score bins with LongTailModel(..., bins), and choose tau on validation data.
        """
        from .description import described

        if not self.counts.any():
            raise problem("at least one label must have been counted", got="none")
        return described(self)

    def regions(self, *, many: int = 100, few: int = 20, relative: bool = False) -> np.ndarray:
        """The region of each bin, (B,) of str: ``"many"`` with more than ``many`` labels, ``"medium"`` with ``few`` to
        ``many``, ``"few"`` with fewer than ``few``, ``"unseen"`` with none.

        Args:
            relative: takes ``many`` and ``few`` as percentages of the labels that a bin would hold if all spread evenly
                over the axis. This suits any number of labels, few above all.
        Source:
            Yang et al. 2021, section 4 (arXiv:2102.09554).
        """
        few = whole("few", few, low=1)
        many = whole("many", many, low=few)
        names = np.full(len(self.bins), "medium", dtype="<U6")
        instance(bool, relative=relative)
        per_width, most = self._per_width(), 2**63  # whole numbers need not fit into float64
        if relative and self.counts.any():
            per_width = per_width * 100 * len(self.bins) / self.counts.sum(dtype=np.float64)
        names[per_width > min(many, most)] = "many"
        names[per_width < min(few, most)] = "few"
        names[self.counts == 0] = "unseen"
        return names


def crowded_bins(bins: AnyBins, counts: np.ndarray) -> list[str]:
    """A clause on each continuous axis of ten bins or more, one of which holds more than half of all labels."""
    labels, joint, clauses = counts.sum(dtype=np.float64), counts.reshape(bins.shape), []
    for k, axis in enumerate(bins.axes):
        of_axis = np.moveaxis(joint, k, 0).reshape(len(axis), -1).sum(1)
        fullest = int(of_axis.argmax())
        many = labels >= _FEWEST_LABELS and len(axis) >= _FEWEST_BINS and not axis.categorical
        if many and labels / 2 < of_axis[fullest] < labels:
            low, high = axis.edges[fullest : fullest + 2]
            share = f"{of_axis[fullest] / labels:.0%} of the labels"
            clauses.append(f"{share} lie in one of {len(axis)} bins, from {low:.4g} to {high:.4g}")
    return clauses


def counts_array(counts: Any) -> np.ndarray:
    """One row of finite counts that are not negative, as int64 or float64."""
    counts = labels_array(counts, "counts")
    shaped(("B",), "one per bin", counts=counts)
    not_empty(counts=counts)
    finite(counts=counts)
    fits = counts.dtype.kind != "u" or counts.max() < 2**63
    require(fits, "counts must be below 2^63", got=counts.max(), fix="Hand over floats.")
    require(counts.min() >= 0, "counts must not be negative", got=f"a minimum of {counts.min():g}")
    return counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)


def to_shares(counts: np.ndarray) -> np.ndarray:
    """Counts divided by their sum, which may lie beyond float64; not all of them zero."""
    counts = np.ldexp(counts, -np.frexp(counts.max())[1])  # by a power of two, so that no bit changes
    return counts / counts.sum()


def _digest(bins: AnyBins) -> str:
    return hashlib.sha256(b"".join(map(axis_bytes, bins.axes))).hexdigest()
