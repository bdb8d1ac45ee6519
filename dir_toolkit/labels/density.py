"""How many labels each bin holds: counted in pieces, merged, smoothed, and read as a prior or as regions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import finite, instance, labels_array, number, problem, whole
from ..errors import ShapeError
from .bins import Bins, Outside
from .grid import AnyBins, BinGrid, Windows, checked_windows
from .kernels import Edges, smooth_axes

__all__ = ["REGIONS", "LabelDensity"]

REGIONS = ("many", "medium", "few", "unseen")


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

    def __init__(self, bins: AnyBins, counts: np.ndarray) -> None:
        instance("LabelDensity", (Bins, BinGrid), bins=bins)
        counts = labels_array("LabelDensity", counts, "counts")
        if counts.shape != (len(bins),):
            raise problem(
                "LabelDensity",
                f"counts must have one number a bin, shape ({len(bins)},)",
                got=counts.shape,
                error=ShapeError,
            )
        finite("LabelDensity", counts=counts)
        if counts.min() < 0:
            raise problem("LabelDensity", "counts must not be negative", got=f"a minimum of {counts.min():g}")
        counts = counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)
        counts.setflags(write=False)
        self.bins, self.counts = bins, counts

    @classmethod
    def count(cls, labels: Any, bins: AnyBins, *, outside: Outside = "raise") -> LabelDensity:
        """Count labels, which may come in pieces.

        Args:
            labels: an array, a tensor, an ``xarray.DataArray`` (a dask-backed one is read block by block), a list of
                numbers, or an iterable of any of these, of which one piece at a time is held. Any shape, such as maps
                of one label a pixel; over a grid of K axes (..., K).
            outside: as in :meth:`Bins.index`; ``"drop"`` leaves labels beyond the axis uncounted.
        Raises:
            LabelError: as :meth:`Bins.index`. ValueError: there is no label at all. ShapeError: over a grid, the last
            axis is not K long.
        """
        instance("LabelDensity.count", (Bins, BinGrid), bins=bins)
        counts = np.zeros(len(bins), dtype=np.int64)
        seen = 0
        for piece in _pieces(labels, rows=isinstance(bins, BinGrid)):
            # On the host, where bad labels raise whatever device they came from.
            index = bins._place("LabelDensity.count", piece.cpu() if isinstance(piece, Tensor) else piece, outside)
            index = (index.numpy() if isinstance(index, Tensor) else index).ravel()
            seen += index.size
            index = index[index >= 0] if outside == "drop" else index
            counts += torch.bincount(torch.from_numpy(index), minlength=len(bins)).numpy()  # faster than numpy's
        if seen == 0:
            raise problem("LabelDensity.count", "labels must hold at least one label", got="none")
        return cls(bins, counts)

    def __reduce__(self) -> tuple[Any, ...]:  # copies are built anew, since NumPy's are no longer read-only
        return LabelDensity, (self.bins, self.counts)

    def __add__(self, other: LabelDensity) -> LabelDensity:
        if not isinstance(other, LabelDensity):
            return NotImplemented
        if self.bins != other.bins:
            raise problem(
                "LabelDensity", "only densities over the same bins can be added", got=f"{self.bins} and {other.bins}"
            )
        return LabelDensity(self.bins, self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LabelDensity):
            return NotImplemented
        return self.bins == other.bins and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<LabelDensity: {self.counts.sum():g} labels in {len(self.bins)} bins>"

    def smooth(self, kernel: Windows, *, edges: Edges = "reflect") -> LabelDensity:
        """The effective density: counts averaged over neighbouring bins (:func:`dir_toolkit.labels.kernels.smooth`).

        Args:
            kernel: one window; over a grid, smoothed along each axis in turn, also one an axis (``[1.0]`` leaves an
                axis as it is).
        Source:
            Yang et al. 2021, equation 1 (arXiv:2102.09554).
        """
        windows = checked_windows("LabelDensity.smooth", kernel, self.bins)
        smoothed = smooth_axes(self.counts.reshape(self.bins.shape), windows, edges=edges)
        return LabelDensity(self.bins, smoothed.ravel())

    def prior(self, *, floor: float = 0.0) -> np.ndarray:
        """The share of labels in each bin, (B,) float64, summing to one.

        Args:
            floor: least count that a bin is taken to have, in labels; above zero it keeps log-priors finite.
        Raises:
            ValueError: the floor is negative, or no label was counted and the floor is zero.
        """
        floor = number("LabelDensity.prior", "floor", floor, low=0)
        counts = np.maximum(self.counts, floor)
        if not counts.any():
            raise problem(
                "LabelDensity.prior",
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
        few = whole("LabelDensity.regions", "few", few, low=1)
        many = whole("LabelDensity.regions", "many", many, low=few)
        names = np.full(len(self.bins), "medium", dtype="<U6")
        names[self.counts > many] = "many"
        names[self.counts < few] = "few"
        names[self.counts == 0] = "unseen"
        return names


def to_shares(counts: np.ndarray) -> np.ndarray:
    """Counts divided by their sum, which may lie beyond float64; not all of them zero."""
    counts = np.ldexp(counts, -np.frexp(counts.max())[1])  # by a power of two, so that no bit changes
    return counts / counts.sum()


def _pieces(labels: Any, *, rows: bool) -> Iterator[Any]:
    """Labels as arrays that fit in memory, in order; with ``rows`` none is cut along its last axis."""
    if isinstance(labels, (str, bytes, dict)) or labels is None:
        raise problem(
            "LabelDensity.count",
            "labels must be an array or an iterable of arrays",
            got=type(labels).__name__,
            error=TypeError,
        )
    # A DataArray hands over what it wraps; the data of an array would be its bytes.
    blocks: Any = labels if isinstance(labels, np.ndarray) else getattr(labels, "data", labels)
    if hasattr(blocks, "to_delayed"):
        blocks = blocks.rechunk({-1: -1}) if rows and blocks.ndim > 0 else blocks
        for block in blocks.to_delayed().ravel():
            yield block.compute()
    elif hasattr(labels, "__array__") or (
        isinstance(labels, (list, tuple)) and all(np.ndim(item) == 0 for item in labels[:1])
    ):
        yield labels
    elif isinstance(labels, Iterable):
        for piece in labels:
            yield from _pieces(piece, rows=rows)
    else:
        raise problem(
            "LabelDensity.count",
            "labels must be an array or an iterable of arrays",
            got=type(labels).__name__,
            fix="Gather single numbers into a list.",
            error=TypeError,
        )
