"""How many labels each bin holds: counted in pieces, merged, smoothed, and read as a prior or as regions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .._checks import finite, instance, labels_array, number, one_of, problem, warn, whole
from .._ranks import check_group, is_parallel, summed
from ..errors import LabelError, ShapeError
from .bins import Bins, Outside
from .grid import AnyBins, BinGrid, Windows, checked_windows
from .kernels import Edges, smooth_axes

if TYPE_CHECKING:
    from .weights import LDS

__all__ = ["REGIONS", "LabelDensity"]

REGIONS = ("many", "medium", "few", "unseen")

_FEWEST_LABELS, _FEWEST_BINS = 20, 10  # of an axis, for one bin with more than half of all labels to be warned of
_PIECE = 2**15  # labels at a time: they stay in a processor's cache, and torch takes no threads for so few


class LabelDensity:
    """Labels counted per bin.

    Attributes:
        bins: the label axis, or a grid of several.
        counts: (B,), read-only: int64 as counted, float64 once smoothed (then the effective number of labels). Over a
            grid, ``counts.reshape(bins.shape)`` has one dimension an axis.

    >>> density = LabelDensity.count([0, 0, 1], Bins.classes(3))
    >>> density.counts.tolist(), density.regions(many=1, few=1).tolist()
    ([2, 1, 0], ['many', 'medium', 'unseen'])
    """

    # Whether samples count by weights, so that no whole numbers are counts, though nothing has smoothed them; a bin
    # without any is no news to whoever drew them.
    _of_weighted_rows = False

    def __init__(self, bins: AnyBins, counts: np.ndarray) -> None:
        instance((Bins, BinGrid), bins=bins)
        counts = labels_array(counts, "counts")
        if counts.shape != (len(bins),):
            raise problem(
                f"counts must have one number a bin, shape ({len(bins)},)",
                got=counts.shape,
                error=ShapeError,
            )
        finite(counts=counts)
        if counts.min() < 0:
            raise problem("counts must not be negative", got=f"a minimum of {counts.min():g}")
        if counts.dtype.kind == "u" and counts.max() >= 2**63:
            raise problem("counts must be below 2^63", got=f"{counts.max()}", fix="Hand over floats.")
        counts = counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)
        counts.setflags(write=False)
        self.bins, self.counts = bins, counts
        self._warned_crowded = False  # whether count has warned of these labels, for what would say so again

    @classmethod
    def count(cls, labels: Any, bins: AnyBins, *, outside: Outside = "raise") -> LabelDensity:
        """Count labels, which may come in pieces.

        A dask array, or what wraps one, is counted by dask: within the task of each chunk, so that nothing but counts
        leaves the worker that holds it, and as many chunks are in memory as there are workers. Chunks of unknown size
        are fine. What a chunk's own task raises is passed on.

        Args:
            labels: an array, a tensor, an ``xarray.DataArray``, a dask array, a list of numbers, or an iterable of any
                of these, of which one piece at a time is held. Any shape, such as maps of one label per pixel; over a
                grid of K axes (..., K). Of a loader of inputs and labels hand over the labels alone:
                ``(y for x, y in loader)``. One warning if one of ten bins or more of a continuous axis holds more than
                half of them.
            outside: as in :meth:`Bins.index`; ``"drop"`` leaves labels beyond the axis uncounted.
        Raises:
            LabelError: as :meth:`Bins.index`, naming the chunk of a dask array. ValueError: there is no label at all.
            ShapeError: over a grid, the last axis is not K long.
        """
        instance((Bins, BinGrid), bins=bins)
        one_of("outside", outside, ("raise", "clip", "drop"))
        found = np.zeros(len(bins) + 1, dtype=np.int64)
        for piece in _pieces(labels):
            found += _found_in_chunks(piece, bins, outside) if _is_dask(piece) else _found(piece, bins, outside)
        if found[-1] == 0:
            raise problem("labels must hold at least one label", got="none")
        density = cls(bins, found[:-1])
        density._warn_of_crowding()
        return density

    def _warn_of_crowding(self) -> None:
        labels = self.counts.sum(dtype=np.float64)
        if labels < _FEWEST_LABELS:
            return
        joint = self.counts.reshape(self.bins.shape)
        for k, axis in enumerate(self.bins.axes):
            counts = np.moveaxis(joint, k, 0).reshape(len(axis), -1).sum(1)
            fullest = int(counts.argmax())
            if axis.categorical or len(axis) < _FEWEST_BINS or not labels / 2 < counts[fullest] < labels:
                continue
            low, high = axis.edges[fullest : fullest + 2]
            self._warned_crowded = True
            warn(
                f"{counts[fullest] / labels:.0%} of the labels lie in one of {len(axis)} bins, from {low:.4g} to "
                f"{high:.4g}, and are not told apart there. Take the logarithm of labels that reach over orders of "
                "magnitude, or bins that are narrow where labels are many, as Bins.quantile or Bins.from_edges with "
                "numpy.geomspace makes them; or look for mistyped labels.",
            )

    def all_reduce(self, *, group: dist.ProcessGroup | None = None) -> LabelDensity:
        """The labels of all ranks counted together, on each; all must call this. The density itself outside
        ``torch.distributed``.

        A rank without labels brings ``LabelDensity(bins, [0] * len(bins))``.

        Args:
            group: the ranks that hold different labels, where not all do, as in tensor or pipeline parallel layouts;
                None means all ranks.
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
            rule = "all ranks must count over the same bins"
            raise problem(rule, got=f"other bins on ranks {differ} than on rank 0")
        dtype = torch.float64 if any(smoothed for _, smoothed in known) else torch.int64
        (counts,) = summed(torch.tensor(self.counts, dtype=dtype, device="cpu"), group=group)
        return LabelDensity(self.bins, counts.numpy())

    def __reduce__(self) -> tuple[Any, ...]:  # copies are built anew, since NumPy's are no longer read-only
        return LabelDensity, (self.bins, self.counts), {"_of_weighted_rows": self._of_weighted_rows}

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this density from others."""
        return {"bins": self.bins, "counts": self.counts}

    def __add__(self, other: LabelDensity) -> LabelDensity:
        if not isinstance(other, LabelDensity):
            return NotImplemented
        if self.bins != other.bins:
            raise problem("only densities over the same bins can be added", got=f"{self.bins} and {other.bins}")
        counts = self.counts + other.counts
        if counts.dtype.kind == "i" and counts.min() < 0:
            raise problem("counts must be below 2^63 when added", got="a larger sum")
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
            kernel: one window; over a grid, smoothed along each axis in turn, also one an axis (``[1.0]`` leaves an
                axis as it is).
        Source:
            Yang et al. 2021, equation 1 (arXiv:2102.09554).
        """
        windows = checked_windows(kernel, self.bins)
        smoothed = smooth_axes(self._per_width().reshape(self.bins.shape), windows, edges=edges)
        return LabelDensity(self.bins, smoothed.ravel() * self.bins.relative_widths)

    def _per_width(self) -> np.ndarray:
        """What each bin would hold if it were of the mean width: the density per label unit, (B,) float64."""
        return self.counts / self.bins.relative_widths

    def weighted(self, lds: LDS) -> LabelDensity:
        """What a loss sees of this density whose samples these weights scale: the counts of each bin times the mean
        weight of its labels, which is the prior that a model is trained under.

        Args:
            lds: fitted, over these bins, or over others of the same axes. Where its bins are others, labels are taken
                to lie evenly within each bin of the density.
        Raises:
            TypeError: lds is no LDS. NotFittedError: it is not fitted. ValueError: it weighs labels of another kind, or
            a bin with labels reaches beyond its axis and it has ``outside="raise"``.
        """
        from .weights import LDS

        instance(LDS, lds=lds)
        weights = lds._of_bins(self.bins)
        counts = np.where(self.counts > 0, self.counts * weights, 0.0)
        if np.isnan(counts).any():
            at = int(np.isnan(counts).argmax())
            rule = f"lds must weigh all labels of the density, which reach beyond its axis {lds.bins!r}"
            fix = 'Make the LDS over the same axis, or with outside="clip".'
            raise problem(rule, got=f"{self.counts[at]:g} labels in bin {at} of {self.bins!r}", fix=fix)
        return LabelDensity(self.bins, counts)

    def prior(self, *, floor: float = 0.0) -> np.ndarray:
        """The share of labels in each bin, (B,) float64, summing to one.

        Args:
            floor: least count that a bin is taken to have, in labels, for a bin of mean width where widths differ;
                above zero it keeps log-priors finite.
        Raises:
            ValueError: the floor is negative, or no label was counted and the floor is zero.
        """
        floor = number("floor", floor, low=0)
        counts = np.maximum(self.counts, floor * self.bins.relative_widths)
        if not counts.any():
            raise problem(
                "at least one label must have been counted",
                got="none",
                fix="All labels lay outside the bins.",
            )
        return to_shares(counts)

    def regions(self, *, many: int = 100, few: int = 20) -> np.ndarray:
        """The region of each bin, (B,) of str: ``"many"`` with more than ``many`` labels, ``"medium"`` with ``few`` to
        ``many``, ``"few"`` with fewer than ``few``, ``"unseen"`` with none.

        Source:
            Yang et al. 2021, section 4 (arXiv:2102.09554).
        """
        few = whole("few", few, low=1)
        many = whole("many", many, low=few)
        names = np.full(len(self.bins), "medium", dtype="<U6")
        per_width, most = self._per_width(), 2**63  # whole numbers need not fit into float64
        names[per_width > min(many, most)] = "many"
        names[per_width < min(few, most)] = "few"
        names[self.counts == 0] = "unseen"
        return names


def to_shares(counts: np.ndarray) -> np.ndarray:
    """Counts divided by their sum, which may lie beyond float64; not all of them zero."""
    counts = np.ldexp(counts, -np.frexp(counts.max())[1])  # by a power of two, so that no bit changes
    return counts / counts.sum()


def _digest(bins: AnyBins) -> str:
    values = [part for axis in bins.axes for part in (axis.edges, axis.centers, np.array([axis.categorical]))]
    return hashlib.sha256(b"".join(part.tobytes() for part in values)).hexdigest()


def _found(labels: Any, bins: AnyBins, outside: Outside, name: str = "labels") -> np.ndarray:
    """How many labels each bin holds and, last, how many there are: (B + 1,) int64."""
    plain = isinstance(labels, np.ndarray) and not np.ma.is_masked(labels)
    array = np.asarray(labels) if plain else labels_array(labels, name)
    found = np.zeros(len(bins) + 1, dtype=np.int64)
    whole_axes = int(isinstance(bins, BinGrid))
    try:
        for part in _parts(array, max(_PIECE, len(bins)), whole_axes=whole_axes):
            found[:-1] += bins.tally(part, outside, name=name)
    except LabelError:
        bins.index(array, outside, name=name)  # to say where in all labels it lies
        raise
    found[-1] = math.prod(array.shape[: array.ndim - whole_axes])
    return found


def _parts(array: np.ndarray, size: int, *, whole_axes: int) -> Iterator[np.ndarray]:
    """Views that hold an array's values, about ``size`` each; none is cut along its last ``whole_axes`` axes."""
    if array.size <= size or array.ndim <= whole_axes:
        yield array
        return
    rows = size // (array.size // len(array))
    if rows > 0:
        yield from (array[start : start + rows] for start in range(0, len(array), rows))
    else:
        for row in array:
            yield from _parts(row, size, whole_axes=whole_axes)


def _is_dask(labels: Any) -> bool:
    return hasattr(labels, "to_delayed")


def _found_in_chunks(labels: Any, bins: AnyBins, outside: Outside) -> np.ndarray:
    """:func:`_found` of a dask array, taken in the tasks that make its chunks and summed on the way."""
    if not hasattr(labels, "map_blocks"):  # a bag or a table
        rule = "labels kept by dask must be a dask array"
        raise problem(rule, got=type(labels).__name__, fix="Use .to_dask_array().", error=TypeError)
    if isinstance(bins, BinGrid) and labels.ndim > 0 and labels.numblocks[-1] > 1:
        if np.isnan(labels.shape[-1]):
            rule = f"the last axis, of {len(bins.axes)} numbers a label, must not be in chunks of unknown size"
            raise problem(rule, got=labels.chunks[-1], fix="Call labels.compute_chunk_sizes().")
        labels = labels.rechunk({-1: -1})
    found = labels.map_blocks(
        partial(_found_in_chunk, bins=bins, outside=outside),
        chunks=(*((1,) * count for count in labels.numblocks), (len(bins) + 1,)),
        new_axis=labels.ndim,
        meta=np.empty((0,) * (labels.ndim + 1), dtype=np.int64),
    )
    return found.sum(axis=tuple(range(labels.ndim))).compute()


def _found_in_chunk(chunk: Any, bins: AnyBins, outside: Outside, block_id: tuple[int, ...]) -> np.ndarray:
    found = _found(chunk, bins, outside, f"labels of chunk {block_id[:-1]}")
    return found.reshape(*(1,) * np.ndim(chunk), -1)


def _are_inputs_and_labels(shapes: list[tuple[int, ...]]) -> bool:
    """Whether arrays have as many rows, but not one number per row each. Maps may differ in width alone."""
    alone = {math.prod(shape[1:]) == 1 for shape in shapes}
    alike = len({len(shape) for shape in shapes}) == 1
    return len({shape[0] for shape in shapes}) == 1 and len(set(shapes)) > 1 and (not alike or len(alone) == 2)


def _refuse_inputs(labels: Any, *, of_several: bool) -> None:
    """A loader, and a pair of inputs and labels, which are known by as many rows of another shape, or as a piece of
    several arrays."""
    got = ""
    if isinstance(labels, (DataLoader, _BaseDataLoaderIter)):
        got = "a DataLoader, whose batches hold inputs too"
    elif isinstance(labels, (list, tuple)):
        shapes = [shape for item in labels if isinstance(shape := getattr(item, "shape", None), tuple)]
        if len(shapes) == len(labels) > 1 and all(shapes) and (of_several or _are_inputs_and_labels(shapes)):
            got = f"arrays of shapes {', '.join(map(str, map(tuple, shapes[:3])))}"
        elif shapes and any(shapes) and (not all(shapes) or any(isinstance(item, (int, float)) for item in labels)):
            got = "arrays together with single numbers"
    if got:
        raise problem(
            "labels must be labels alone, without the inputs that they belong to",
            got=got,
            fix="Hand over the labels of each batch: (y for x, y in loader).",
            error=TypeError,
        )


def _pieces(labels: Any, *, of_several: bool = False) -> Iterator[Any]:
    """Labels as arrays, in order: each fits in memory, or is dask's. ``of_several``: they are one piece of more."""
    if isinstance(labels, (str, bytes, dict)) or labels is None:
        raise problem(
            "labels must be an array or an iterable of arrays",
            got=type(labels).__name__,
            error=TypeError,
        )
    _refuse_inputs(labels, of_several=of_several)
    # A DataArray hands over what it wraps; the data of an array would be its bytes.
    wrapped: Any = labels if isinstance(labels, np.ndarray) else getattr(labels, "data", labels)
    if _is_dask(wrapped):
        yield wrapped
    elif hasattr(labels, "__array__") or (
        isinstance(labels, (list, tuple))
        and all(not isinstance(item, (list, tuple)) and np.ndim(item) == 0 for item in labels[:1])
    ):
        yield labels
    elif isinstance(labels, Iterable):
        for piece in labels:
            yield from _pieces(piece, of_several=True)
    else:
        raise problem(
            "labels must be an array or an iterable of arrays",
            got=type(labels).__name__,
            fix="Gather single numbers into a list.",
            error=TypeError,
        )
