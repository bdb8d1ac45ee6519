"""Labels in dask, of which one chunk at a time is in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._checks import require
from .grid import AnyBins, BinGrid


def in_dask(labels: Any) -> Any:
    """What dask holds of labels: they themselves, or the array that an ``xarray.DataArray`` wraps; None if it holds
    nothing of them."""
    held = [labels] if isinstance(labels, np.ndarray) else [labels, getattr(labels, "data", None)]
    return next((own for own in held if hasattr(own, "to_delayed")), None)


def chunked(labels: Any, bins: AnyBins) -> Any:
    """The dask array of labels that dask holds as an array or a column. Over a grid it holds whole labels per chunk."""
    labels = labels.to_dask_array() if hasattr(labels, "to_dask_array") else labels
    rule, fix = "labels in dask must be an array or a column", "Use .to_dataframe()."  # not a bag
    require(hasattr(labels, "map_blocks"), rule, got=type(labels), fix=fix)
    if isinstance(bins, BinGrid) and labels.ndim > 0 and labels.numblocks[-1] > 1:
        rule = f"the last axis, of {len(bins.axes)} numbers per label, must not be in chunks of unknown size"
        known = not np.isnan(labels.shape[-1])
        require(known, rule, got=str(labels.chunks[-1]), fix="Call labels.compute_chunk_sizes().")
        labels = labels.rechunk({-1: -1})
    return labels
