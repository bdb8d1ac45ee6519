"""The label density: labels counted per bin, merged, smoothed, and read as a prior or as regions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

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
from .grid import AnyBins, BinGrid, Windows, chosen_windows
from .kernels import EDGES, Edges, smooth_axes

if TYPE_CHECKING:
    from .description import Description
    from .weights import LDS

__all__ = ["REGIONS", "LabelDensity"]

REGIONS = ("many", "medium", "few", "unseen")

_FEWEST_LABELS, _FEWEST_BINS = 20, 10  # an axis with fewer is never reported as crowded


class LabelDensity:
    """Labels counted per bin.

    Attributes:
        bins: the label axis, or a grid of several.
        counts: (B,), read-only. Counted labels are int64. A smoothed density holds effective numbers of labels as
            float64. Over a grid, ``counts.reshape(bins.shape)`` has one dimension per axis.

    >>> density = LabelDensity.count([0, 0, 1], Bins.classes(3))
    >>> density.counts.tolist(), density.regions(many=1, few=1).tolist()
    ([2, 1, 0], ['many', 'medium', 'unseen'])
    """

    # Whether samples were counted by weights: then counts are not whole numbers although they were not smoothed. A bin
    # without samples causes no warning in this case.
    _of_weighted_rows = False

    def __init__(self, bins: AnyBins, counts: Sequence[float] | np.ndarray | Tensor) -> None:
        instance((Bins, BinGrid), bins=bins)
        counts = counts_array(counts)
        shaped((len(bins),), "one per bin", counts=counts)
        counts.setflags(write=False)
        self.bins, self.counts = bins, counts
        self._warned_crowded = False  # so that the warning about crowded bins is issued once

    @classmethod
    def count(
        cls, labels: Any, bins: AnyBins, *, outside: Outside = "raise", missing: Missing = "raise"
    ) -> LabelDensity:
        """Count labels, which may come in several pieces.

        A dask array or column, or an xarray over an array, is counted by dask, one task per chunk. Only counts leave a
        worker, and each worker holds one chunk in memory at a time. Chunks may be of unknown size. Errors of a task are
        passed on.

        A warning is issued if a single bin holds more than half of the labels on a continuous axis of ten bins or more.

        Args:
            labels: an array, a tensor, an ``xarray.DataArray``, a dask array or column, a list of numbers, or an
                iterable of any of these, which is read one piece at a time. Labels have any shape, such as maps with
                one label per pixel. For a loader of inputs and labels pass ``(y for x, y in loader)``.
            outside, missing: as in :meth:`Bins.index`. ``"drop"`` does not count these labels.
        Raises:
            LabelError: as :meth:`Bins.index`; it names the chunk of a dask array. ValueError: there is no label.
            ShapeError: over a grid, the last axis is not K long.
        """
        instance((Bins, BinGrid), bins=bins)
        density = cls(bins, count_labels(labels, bins, outside, missing))
        for crowding in crowded_bins(bins, density.counts):
            density._warned_crowded = True
            warn(
                f"{crowding}, which does not resolve them. Take the logarithm of the labels, or bins that are narrow "
                "where labels are many (Bins.quantile, Bins.from_edges). Also check for mistyped labels."
            )
        return density

    def all_reduce(self, *, group: dist.ProcessGroup | None = None) -> LabelDensity:
        """The sum of the densities of all ranks, on each rank. All ranks must call this. Outside ``torch.distributed``
        it returns the density itself.

        A rank without labels uses ``LabelDensity(bins, [0] * len(bins))``.

        Args:
            group: the ranks that hold different labels; None means all ranks. Tensor and pipeline parallel layouts need
                it.
        Raises:
            ValueError: the bins of the ranks differ. Every rank raises it. TypeError: ``group`` is no process group.
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

    def __reduce__(self) -> tuple[Any, ...]:  # A copy is built again, since copies of NumPy arrays are writable.
        return LabelDensity, (self.bins, self.counts), {"_of_weighted_rows": self._of_weighted_rows}

    @property
    def settings(self) -> dict[str, Any]:
        """The values that define this density."""
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

    def smooth(self, kernel: Windows | Literal["auto"] | None = "auto", *, edges: Edges = "reflect") -> LabelDensity:
        """The effective density: counts averaged over neighbouring bins (:func:`dir_toolkit.labels.kernels.smooth`).

        Args:
            kernel: one window, or over a grid also one window per axis. A grid is smoothed along each axis in turn, and
                ``[1.0]`` does not smooth an axis. ``"auto"`` and None are as in :class:`LDS`.
        Source:
            Yang et al. 2021, equation 1 (arXiv:2102.09554).
        """
        one_of("edges", edges, EDGES)
        if (windows := chosen_windows(kernel, self.bins)) is None:
            return self
        smoothed = smooth_axes(self._per_width().reshape(self.bins.shape), windows, edges=edges)
        return LabelDensity(self.bins, smoothed.ravel() * self.bins.relative_widths)

    def _per_width(self) -> np.ndarray:
        """The counts that bins of the mean width would hold, (B,) float64. They are proportional to the density."""
        return self.counts / self.bins.relative_widths

    def weighted(self, lds: LDS) -> LabelDensity:
        """The counts of each bin times the mean weight of its labels. A model trained with these weights has the prior
        of this density.

        Args:
            lds: fitted, over these bins or over other bins of the same axes. If its bins differ, labels are assumed to
                be spread uniformly within each bin of the density.
        Raises:
            TypeError: lds is not an LDS. NotFittedError: it is not fitted. ValueError: it weighs labels of another
            kind, or a bin with labels reaches beyond its axis and it has ``outside="raise"``.
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
        """The probability of each bin: its share of the labels, (B,) float64, summing to one.

        Args:
            floor: the smallest count of a bin, in labels; smaller counts are raised to it. It applies to a bin of mean
                width where widths differ. A positive floor keeps log-priors finite.
        Raises:
            ValueError: the floor is negative, or no label was counted and the floor is zero.
        """
        floor = number("floor", floor, low=0)
        counts = np.maximum(self.counts, floor * self.bins.relative_widths)
        require(counts.any(), "at least one label must have been counted", got="none, all were outside the bins")
        return to_shares(counts)

    def describe(self) -> Description:
        """A summary of the label distribution with advice. Print it, or read its numbers as attributes.

        Raises:
            ValueError: no label was counted.

        >>> tail = np.repeat(np.arange(8), [900, 500, 250, 100, 40, 15, 4, 1])
        >>> LabelDensity.count(tail, Bins.uniform(0, 8, width=1)).describe()
        labels            1,810 in 8 bins
        labels per bin    70, the median of bins that are not empty
        empty bins        0, at most 0 in a row between labels
        imbalance         900 times as dense in the densest bin as in the sparsest
        effective labels  227 under inverse weights, 13%
        regions           3 many, 2 medium, 3 few, 0 unseen
        - Weight the loss by LDS(bins).fit(labels), or by scheme="inverse" for a stronger effect.
        - Or predict a distribution over bins, LongTailModel(..., bins), and choose tau on validation data.
        """
        from .description import described

        if not self.counts.any():
            raise problem("at least one label must have been counted", got="none")
        return described(self)

    def regions(self, *, many: int = 100, few: int = 20, relative: bool = False) -> np.ndarray:
        """The region of each bin, (B,) of str: ``"many"`` with more than ``many`` labels, ``"medium"`` with ``few`` to
        ``many``, ``"few"`` with fewer than ``few``, ``"unseen"`` with none.

        Args:
            relative: whether ``many`` and ``few`` are percentages of the count that each bin would have under a uniform
                distribution. Use it for small data sets.
        Source:
            Yang et al. 2021, section 4 (arXiv:2102.09554).
        """
        few = whole("few", few, low=1)
        many, fix = whole("many", many), "This is few, which can be lowered as well."
        require(many >= few, f"many must be at least {few}", got=many, fix=fix)
        names = np.full(len(self.bins), "medium", dtype="<U6")
        instance(bool, relative=relative)
        per_width, most = self._per_width(), 2**63  # larger whole numbers may not fit into float64
        if relative and self.counts.any():
            per_width = per_width * 100 * len(self.bins) / self.counts.sum(dtype=np.float64)
        names[per_width > min(many, most)] = "many"
        names[per_width < min(few, most)] = "few"
        names[self.counts == 0] = "unseen"
        return names


def crowded_bins(bins: AnyBins, counts: np.ndarray) -> list[str]:
    """One clause for each continuous axis of ten bins or more, one of which holds more than half of all labels."""
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
    """Checked counts (B,), finite and not negative, as int64 or float64."""
    counts = labels_array(counts, "counts")
    shaped(("B",), "one per bin", counts=counts)
    not_empty(counts=counts)
    finite(counts=counts)
    fits = counts.dtype.kind != "u" or counts.max() < 2**63
    require(fits, "counts must be below 2^63", got=counts.max(), fix="Pass floats.")
    require(counts.min() >= 0, "counts must not be negative", got=f"a minimum of {counts.min():g}")
    return counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)


def to_shares(counts: np.ndarray) -> np.ndarray:
    """Counts, not all zero, divided by their sum, even where the sum exceeds float64."""
    counts = np.ldexp(counts, -np.frexp(counts.max())[1])  # by a power of two, so that no bit changes
    return counts / counts.sum()


def _digest(bins: AnyBins) -> str:
    return hashlib.sha256(b"".join(map(axis_bytes, bins.axes))).hexdigest()
