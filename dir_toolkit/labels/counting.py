"""Count the labels per bin, in arrays, in iterables of arrays and in dask arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .._checks import digits, labels_array, problem, require, warn
from ..errors import LabelError
from .bins import Bins, Missing, Outside
from .chunks import chunked, in_dask
from .grid import AnyBins, BinGrid

_PIECE = 2**15  # labels at a time: they fit into the cache, and torch starts no threads for so few


def count_labels(labels: Any, bins: AnyBins, outside: Outside, missing: Missing) -> np.ndarray:
    """The number of labels in each bin, (B,) int64, for anything that :meth:`LabelDensity.count` takes."""
    counts = np.zeros(len(bins) + 2, dtype=np.int64)
    for piece in _pieces(labels):
        counted = _counted if in_dask(piece) is None else _counted_by_dask
        counts += counted(piece, bins, outside, missing)
    at_end, every = counts[-2:].tolist()
    require(every > 0, "labels must hold at least one label", got="none")
    if at_end and outside != "clip":
        (end,) = (digits(axis.edges[-1]) for axis in bins.axes)
        warn(
            f"labels equal to {end}, the end of the axis ({at_end} of them), count in the bin of the whole number "
            "before. Give them a bin of their own: high must exceed all labels."
        )
    return counts[:-2]


def _counted(labels: Any, bins: AnyBins, outside: Outside, missing: Missing, name: str = "labels") -> np.ndarray:
    """The number of labels in each bin, of those at the end of an axis of whole numbers, and of all labels: (B + 2,)
    int64."""
    plain = isinstance(labels, np.ndarray) and not np.ma.is_masked(labels)
    array = np.asarray(labels) if plain else labels_array(labels, name)
    counts = np.zeros(len(bins) + 2, dtype=np.int64)
    whole_axes = int(isinstance(bins, BinGrid))
    try:
        for part in _parts(array, max(_PIECE, len(bins)), whole_axes=whole_axes):
            counts[:-2] += bins.tally(part, outside, missing=missing, name=name)
            if isinstance(bins, Bins) and bins._of_whole_numbers:
                counts[-2] += np.count_nonzero(part == bins.edges[-1])
    except LabelError:
        bins.index(array, outside, missing=missing, name=name)  # raises with the index of the label among all labels
        raise
    counts[-1] = math.prod(array.shape[: array.ndim - whole_axes])
    return counts


def _parts(array: np.ndarray, size: int, *, whole_axes: int) -> Iterator[np.ndarray]:
    """Views of an array with about ``size`` values each. None is cut along its last ``whole_axes`` axes."""
    if array.size <= size or array.ndim <= whole_axes:
        yield array
        return
    rows = size // (array.size // len(array))
    if rows > 0:
        yield from (array[start : start + rows] for start in range(0, len(array), rows))
    else:
        for row in array:
            yield from _parts(row, size, whole_axes=whole_axes)


def _counted_by_dask(labels: Any, bins: AnyBins, outside: Outside, missing: Missing) -> np.ndarray:
    """:func:`_counted` of labels in dask. Each chunk is counted in its own task, and the counts are summed."""
    labels = chunked(labels, bins)
    counts = labels.map_blocks(
        partial(_counted_in_chunk, bins=bins, outside=outside, missing=missing),
        chunks=(*((1,) * count for count in labels.numblocks), (len(bins) + 2,)),
        new_axis=labels.ndim,
        meta=np.empty((0,) * (labels.ndim + 1), dtype=np.int64),
    )
    return counts.sum(axis=tuple(range(labels.ndim))).compute()


def _counted_in_chunk(
    chunk: Any, bins: AnyBins, outside: Outside, missing: Missing, block_id: tuple[int, ...]
) -> np.ndarray:
    counts = _counted(chunk, bins, outside, missing, f"labels of chunk {block_id[:-1]}")
    return counts.reshape(*(1,) * np.ndim(chunk), -1)


def _pieces(labels: Any, *, of_several: bool = False) -> Iterator[Any]:
    """Labels as arrays in order, each of which fits into memory or belongs to dask. ``of_several`` is whether they are
    one piece of an iterable."""
    _refuse_inputs(labels, of_several=of_several)
    of_numbers = isinstance(labels, (list, tuple)) and all(
        not isinstance(item, (list, tuple)) and np.ndim(item) == 0 for item in labels[:1]
    )
    if (lazy := in_dask(labels)) is not None:
        yield lazy
    elif hasattr(labels, "__array__") or of_numbers:
        yield labels
    elif isinstance(labels, Iterable) and not isinstance(labels, (str, bytes, dict)):
        for piece in labels:
            yield from _pieces(piece, of_several=True)
    else:
        fix = "Gather single numbers into a list."
        raise problem("labels must be an array or an iterable of arrays", got=type(labels), fix=fix)


def _refuse_inputs(labels: Any, *, of_several: bool) -> None:
    """Refuse a loader, and a pair of inputs and labels. A pair is recognised by equal numbers of rows and different
    shapes, or as a piece of several arrays."""
    got = ""
    if isinstance(labels, (DataLoader, _BaseDataLoaderIter)):
        got = "a DataLoader, whose batches hold inputs too"
    elif isinstance(labels, (list, tuple)):
        shapes = [shape for item in labels if isinstance(shape := getattr(item, "shape", None), tuple)]
        if len(shapes) == len(labels) > 1 and all(shapes) and (of_several or _are_inputs_and_labels(shapes)):
            got = f"arrays of shapes {', '.join(map(str, map(tuple, shapes[:3])))}"
        elif shapes and any(shapes) and (not all(shapes) or any(isinstance(item, (int, float)) for item in labels)):
            got = "arrays together with single numbers"
    rule = "labels must be labels alone, without their inputs"
    fix = "Pass the labels of each batch: (y for x, y in loader)."
    require(not got, rule, got=got, fix=fix, error=TypeError)


def _are_inputs_and_labels(shapes: list[tuple[int, ...]]) -> bool:
    """Whether arrays have the same number of rows, but not all of them one number per row. Maps may differ in width."""
    alone = {math.prod(shape[1:]) == 1 for shape in shapes}
    alike = len({len(shape) for shape in shapes}) == 1
    return len({shape[0] for shape in shapes}) == 1 and len(set(shapes)) > 1 and (not alike or len(alone) == 2)
