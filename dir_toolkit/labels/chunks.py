"""Labels in dask, of which one chunk at a time is in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._checks import require
from .grid import AnyBins, BinGrid


def in_dask(labels: Any) -> Any:
    """The labels if dask holds them, or the array of dask that an ``xarray.DataArray`` wraps; otherwise None."""
    held = [labels] if isinstance(labels, np.ndarray) else [labels, getattr(labels, "data", None)]
    return next((own for own in held if hasattr(own, "to_delayed")), None)


def chunked(labels: Any, bins: AnyBins) -> Any:
    """An array or a column of dask as an array. Over a grid, no chunk holds a part of a label."""
    if hasattr(labels, "to_dask_array"):  # which would make objects of nullable numbers and of those of Arrow
        labels = labels.map_partitions(np.asarray, meta=np.asarray(labels._meta))
    rule, fix = "labels in dask must be an array or a column", "Use .to_dataframe()."  # not a bag
    require(hasattr(labels, "map_blocks"), rule, got=type(labels), fix=fix)
    if isinstance(bins, BinGrid) and labels.ndim > 0 and labels.numblocks[-1] > 1:
        rule = f"the last axis, of {len(bins.axes)} numbers per label, must not be in chunks of unknown size"
        known = not np.isnan(labels.shape[-1])
        require(known, rule, got=str(labels.chunks[-1]), fix="Call labels.compute_chunk_sizes().")
        labels = labels.rechunk({-1: -1})
    return labels
