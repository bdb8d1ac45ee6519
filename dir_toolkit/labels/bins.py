"""The label axis: a class is a bin, and a continuous label falls into a bin."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    MOST_BINS,
    digits,
    distributions,
    floats,
    instance,
    is_tensor,
    keys,
    label_problem,
    labels_array,
    length,
    no_values,
    not_empty,
    number,
    on_one_device,
    one_of,
    problem,
    real,
    require,
    scalar,
    shaped,
    warn,
    whole,
)
from .._numerics import has_values, keepable, mean_under, readable, strict_fake_mode, wide_dtype
from ._auto import chosen_edges

if TYPE_CHECKING:
    from .grid import BinGrid

__all__ = ["Bins", "Missing", "Outside"]

Outside = Literal["raise", "clip", "drop"]
Missing = Literal["raise", "drop"]
OUTSIDE, MISSING = get_args(Outside), get_args(Missing)

_LARGEST = 4e307  # twice the length of the axis still fits into float64
_NEARER_ZERO = "Widen the bins, or subtract an offset from the labels."
_NO_NAN = 'Remove these samples first, or pass missing="drop" where it is an argument.'
_STEPS = 256  # float32 values per bin; with fewer of them rounding would show in predictions


class LabelAxes(ABC):
    """The common interface of one label axis and of a grid of axes."""

    @property
    @abstractmethod
    def axes(self) -> tuple[Bins, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of bins of each axis."""
        return tuple(len(axis) for axis in self.axes)

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def relative_widths(self) -> np.ndarray:
        """(B,) float64, read-only: the width of each bin divided by the mean width of all bins. It is exactly one where
        all bins have the same width, and for classes. Counts divided by it are densities per label unit."""

    @overload
    def index(
        self, labels: Tensor, outside: Outside = "raise", *, missing: Missing = "raise", name: str = "labels"
    ) -> Tensor: ...
    @overload
    def index(
        self, labels: Any, outside: Outside = "raise", *, missing: Missing = "raise", name: str = "labels"
    ) -> np.ndarray: ...
    def index(
        self, labels: Any, outside: Outside = "raise", *, missing: Missing = "raise", name: str = "labels"
    ) -> Any:
        """The bin of each label; over a grid, the joint bin.

        Labels are compared with the edges in their own precision, so that float32(0.7) falls into the bin of 0.7. A
        warning is issued where that precision cannot separate two edges, such as 1e9 and 1e9 + 1 in float32.

        Args:
            labels: a tensor, or anything that NumPy turns into an array.
            outside: ``"raise"``; ``"clip"`` into the first or last bin; or ``"drop"``, which returns -1. Over a grid
                each axis clips by itself, and ``"drop"`` returns -1 where a label lies beyond any axis.
            missing: ``"raise"``; or ``"drop"``, which returns -1 for NaN. Over a grid one NaN among the K numbers is
                enough.
            name: the name of the labels in error messages.
        Shape:
            labels: any; over a grid (..., K). Returns int64 of the shape of ``labels``; over a grid (...).
        Raises:
            LabelError: a label is NaN, or lies outside under ``"raise"``, or is not a whole number where bins are
                classes. On an accelerator only ``outside="raise"`` checks the labels, which costs one host sync.
                Unchecked labels that would raise get -1, as do all such labels in compiled graphs and under
                ``torch.func``.
            ShapeError: over a grid, the last axis is not K long.
        """
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        instance(str, name=name)
        if isinstance(labels, Tensor):
            index = self._index(labels, outside, missing, name, wait=True)
            return index if readable(labels) else index.clamp_min(-1)
        array = np.require(labels_array(labels, name), requirements=["C", "W"])
        return self._index(torch.from_numpy(array), outside, missing, name, wait=True).numpy()

    @abstractmethod
    def _index(self, labels: Tensor, outside: Outside, missing: Missing, name: str, *, wait: bool) -> Tensor: ...

    def place(
        self, labels: Tensor, outside: Outside = "raise", missing: Missing = "raise", *, name: str = "labels"
    ) -> Tensor:
        """:meth:`index` that never waits for an accelerator. It returns -1 for an ignored label, and -2 for an
        unchecked label that :meth:`index` would refuse."""
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        instance(str, name=name)
        is_tensor(**{name: labels})
        return self._index(labels, outside, missing, name, wait=False)

    def rows(self, labels: Tensor, outside: Outside = "raise", missing: Missing = "raise") -> Tensor:
        """The row of each label in a table of B + 2 rows: one per bin, row B for ignored labels, and row B + 1 for
        those for which :meth:`place` returns -2."""
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        is_tensor(labels=labels)
        return self._rows(labels, outside, missing)

    def _rows(self, labels: Tensor, outside: Outside, missing: Missing) -> Tensor:
        """:meth:`rows` of checked arguments."""
        index = self._index(labels, outside, missing, "labels", wait=False)
        whole = outside != "drop" and missing != "drop" and readable(labels)
        return index if whole else torch.where(index < 0, len(self) - 1 - index, index)

    def tally(
        self, labels: Any, outside: Outside = "raise", *, missing: Missing = "raise", name: str = "labels"
    ) -> np.ndarray:
        """The number of labels in each bin, (B,) int64. Labels that ``"drop"`` ignores are not counted."""
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        instance(str, name=name)
        return self._tally(labels_array(labels, name), outside, missing, name)

    def _tally(self, labels: np.ndarray, outside: Outside, missing: Missing, name: str) -> np.ndarray:
        array = torch.from_numpy(np.require(labels, requirements=["C", "W"]))
        index = self._index(array, outside, missing, name, wait=True).flatten()
        # Counted by torch, since NumPy would keep other threads waiting.
        return torch.bincount(index[index >= 0] if "drop" in (outside, missing) else index, minlength=len(self)).numpy()

    def shares(self, probabilities: Tensor) -> Tensor:
        """Checked probabilities (..., B) over the bins, in at least float32.

        Raises:
            ShapeError: the last axis is not B long. TypeError: they are not floats. ValueError: a probability is
            negative, or they do not sum to one within 1e-3 (1e-2 in half precision).
        """
        floats(probabilities=probabilities)
        shaped((..., len(self)), "one per bin", probabilities=probabilities)
        on_one_device(probabilities=probabilities)
        distributions(probabilities=probabilities)
        return probabilities.to(wide_dtype(probabilities))

    @overload
    def expectation(self, probabilities: Tensor) -> Tensor: ...
    @overload
    def expectation(self, probabilities: np.ndarray) -> np.ndarray: ...
    def expectation(self, probabilities: Any) -> Any:
        """The mean label of a distribution over bins, where each bin is represented by its centre.

        Shape:
            probabilities: (..., B), as in :meth:`shares`. Returns (...), and over a grid (..., K), in label units.
        """
        if isinstance(probabilities, Tensor):
            return self._mean(self.shares(probabilities))
        array = labels_array(probabilities, "probabilities")
        return self._mean(self.shares(torch.from_numpy(array.copy()))).numpy()

    @abstractmethod
    def _mean(self, shares: Tensor) -> Tensor: ...


class Bins(LabelAxes):
    """A label axis cut into adjacent bins: bin ``b`` holds ``edges[b] <= label < edges[b + 1]``.

    The last bin also holds its upper edge, as in ``numpy.histogram``. Make an axis with :meth:`auto`, :meth:`uniform`,
    :meth:`from_edges`, :meth:`quantile` or :meth:`classes`. :meth:`grid` joins several axes. An axis is immutable. Two
    axes with the same edges and centres are equal.

    Attributes:
        edges: (B + 1,) float64, rising, in label units; read-only.
        centers: (B,) float64, in label units; read-only. Decoding represents a bin by its centre.
        categorical: whether the bins are classes, whose labels must be whole numbers.
        unbounded: whether the first and the last bin also hold all labels beyond them, so that no label is outside.
        why: the reason for the bins that :meth:`auto` chose; None for other axes.

    >>> bins = Bins.uniform(0, 117, width=1)
    >>> len(bins), bins.index([26, 26.9, 117]).tolist()
    (117, [26, 26, 116])
    """

    def __init__(
        self,
        edges: Sequence[float] | np.ndarray | Tensor,
        *,
        centers: np.ndarray | None = None,
        categorical: bool = False,
        unbounded: bool = False,
    ) -> None:
        instance(bool, categorical=categorical, unbounded=unbounded)
        edges = _edges_array(edges)
        if centers is None:
            centers = (edges[:-1] + edges[1:]) / 2
        else:
            centers = labels_array(centers, "centers").astype(np.float64)
            if centers.shape != (len(edges) - 1,) or not np.isfinite(centers).all():
                raise problem("centers must be one finite number per bin", got=f"shape {centers.shape}")
        edges.setflags(write=False)
        centers.setflags(write=False)
        self.edges, self.centers, self.categorical, self.unbounded = edges, centers, categorical, unbounded
        self.why: str | None = None
        widths = np.diff(edges)
        whole = bool((widths == 1).all()) and np.array_equal(edges, edges.round())
        self._of_whole_numbers = whole and np.array_equal(centers, edges[:-1]) and not unbounded  # one in each bin
        self._width = float(np.median(widths))
        rounding = np.full(len(widths), 1e-9 * self._width + 4 * np.spacing(np.abs(edges).max()))
        with np.errstate(over="ignore", invalid="ignore"):
            # The bins at the ends may hold the rounding of a bound in float32.
            rounding[[0, -1]] += np.fmin(np.spacing(np.abs(edges[[0, -1]]).astype(np.float32)), 1e-3 * self._width)
            if np.array_equal(edges, edges.astype(np.float32)):  # each may be rounded to it
                rounding += np.fmin(3 * np.spacing(np.float32(np.abs(edges).max())), 1e-2 * self._width)
            steps = np.spacing(np.maximum(np.abs(edges[:-1]), np.abs(edges[1:])).astype(np.float32))
            self._collapses = bool((np.diff(edges.astype(np.float32)) <= 0).any())  # in float32
        self._even = categorical or bool((np.abs(widths - self._width) <= rounding).all())
        self._fits_float32 = bool((_STEPS * steps <= widths).all())
        with torch.inference_mode(False):
            self._edges, self._centers = torch.from_numpy(edges.copy()), torch.from_numpy(centers.copy())
            self._limits = torch.from_numpy(self._placed_limits())
        self._tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}  # copies per dtype and device
        self._scales: dict[np.dtype, tuple[float, float, float, float] | None] = {}

    def _placed_limits(self) -> np.ndarray:
        """:func:`~dir_toolkit.labels.soft_labels.limits` in float64."""
        off = self.centers - (self.edges[:-1] + self.edges[1:]) / 2
        moved = self.edges + np.concatenate([off[:1], (off[:-1] + off[1:]) / 2, off[-1:]])
        rises = np.diff(moved.astype(np.float32 if self._fits_float32 else np.float64)) > 0
        return moved if rises.all() else self.edges.copy()

    def tensor(self, what: Literal["edges", "centers", "limits"], like: Tensor) -> Tensor:
        """The edges, the centres or the :func:`~dir_toolkit.labels.soft_labels.limits` of the bins, in the dtype and on
        the device of ``like``. They are copied there once."""
        one_of("what", what, ("edges", "centers", "limits"))
        floats(like=like)
        if torch.compiler.is_compiling():  # a compiled graph keeps its own copies
            return {"edges": self._edges, "centers": self._centers, "limits": self._limits}[what].to(like)
        key = (what, like.dtype, like.device)
        if (copy := self._tensors.get(key)) is None or strict_fake_mode():
            with torch.inference_mode(False):
                array = self._placed_limits() if what == "limits" else getattr(self, what).copy()
                copy = torch.from_numpy(array).to(like.dtype).to(like.device)
            if keepable(copy):
                self._tensors[key] = copy
        return copy

    def wide_dtype(self, *tensors: Tensor) -> torch.dtype:
        """The dtype to compute labels of this axis in. It is float64 if one of these tensors is, or if float32 does not
        resolve the bins; else float32."""
        is_tensor(**{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)})
        if self._fits_float32:
            return wide_dtype(*tensors)
        known = all(t.device.type != "mps" for t in tensors)
        require(known, "such narrow bins need a device with float64", got="mps", fix=_NEARER_ZERO)
        return torch.float64

    def __reduce__(self) -> tuple[Any, ...]:  # A copy is built again, since copies of NumPy arrays are writable.
        return Bins.from_dict, (self.settings,), {"why": self.why}

    @classmethod
    def uniform(
        cls, low: float, high: float, *, width: float | None = None, count: int | None = None, integer: bool = False
    ) -> Bins:
        """Bins of one width from ``low`` to ``high``.

        Edges are the decimals one would write by hand (``0.3``, not ``0.30000000000000004``). A label that equals an
        edge then falls into the same bin in float32 and in float64. A float32 bound, such as ``labels.min()`` of
        float32 labels, moves outwards if rounding would exclude it from the axis.

        Args:
            low, high: numbers, or tensors or arrays without dimensions.
            width: the width of a bin, in label units; it must divide ``high - low``. Give this or ``count``.
            count: the number of bins.
            integer: whether labels are whole numbers, such as ages in years. The centre of a bin is then the mean of
                the whole numbers in it (26 for [26, 27)), and not its middle (26.5). ``high`` itself enters this mean
                only where the last bin holds no other whole number.
        Raises:
            ValueError: the range is empty, the width does not divide it, or there would be more than ten million bins.
        """
        instance(bool, integer=integer)
        low, high, width = (scalar(name, x) for name, x in (("low", low), ("high", high), ("width", width)))
        lowest, highest = number("low", low), number("high", high)
        largest = max(abs(lowest), abs(highest))
        require(largest <= _LARGEST, f"low and high must lie within {_LARGEST:g} of zero", got=f"{largest:g}")
        # str gives the shortest decimal that names the number, also for a float32.
        start, end = Fraction(str(low)), Fraction(str(high))
        rises, one_given = lowest < highest and start < end, (width is None) != (count is None)
        require(rises, "low must be smaller than high", got=f"low={low} and high={high}")
        require(one_given, "give either width or count", got=f"width={width}, count={count}")
        if width is not None:
            number("width", width, low=0, open_low=True)
            step = Fraction(str(width))
            number_of_bins = math.ceil((end - start) / step)
            whole("the number of bins", number_of_bins, high=MOST_BINS, fix="Widen them.")
            divides, got = start + number_of_bins * step == end, f"{width} in {digits(float(end - start))}"
            require(divides, "width must divide high - low", got=got, fix=lambda: _dividing(low, high, step))
        else:
            number_of_bins = length("count", count, most=MOST_BINS)
            start, end = _outwards(min, low), _outwards(max, high)
            step = (end - start) / number_of_bins
        # Python's int / int rounds once and correctly, and is faster than fractions.
        shared = start.denominator * step.denominator
        first, pace = int(start * shared), int(step * shared)
        edges = np.array([(first + i * pace) / shared for i in range(number_of_bins + 1)])
        edges[0], edges[-1] = min(edges[0], lowest), max(edges[-1], highest)
        resolved = (edges[1:] > edges[:-1]).all()
        require(resolved, "bins must be wider than float64 resolves", got=f"width {float(step):g}", fix=_NEARER_ZERO)
        return cls(edges, centers=_integer_centers(edges) if integer else None)

    @classmethod
    def from_edges(cls, edges: Sequence[float] | np.ndarray | Tensor) -> Bins:
        """Bins between the given edges, (B + 1,), finite and strictly rising, in label units."""
        return cls(edges)

    @classmethod
    def quantile(cls, labels: Any, n: int) -> Bins:
        """``n`` bins that hold about the same number of ``labels`` each. Repeated labels can make the bins fewer.

        Raises:
            LabelError: labels hold NaN or infinity. ValueError: labels are empty or all equal.
        """
        n = length("n", n, most=MOST_BINS)
        return cls(np.unique(np.quantile(_different(labels)[0], np.linspace(0, 1, n + 1))))

    @classmethod
    def auto(cls, labels: Any) -> Bins:
        """Bins chosen from the labels. ``bins.why`` gives the reason in a sentence or two.

        Labels that are multiples of one step, such as whole numbers, get one bin per step if there are at most 200
        steps, and at least 5 labels per step or at most 10 steps. Other labels get bins of one round width. It is half
        the width of Freedman and Diaconis, since densities are smoothed over several bins. It is adjusted so that there
        are about 10 to 200 bins with 5 labels or more on average. If a tail is longer than 8 interquartile ranges, bins
        have equal width on a logarithmic scale, or on an asinh scale where some labels are not positive. The edges are
        still in label units. A value that a tenth of the labels share, such as zero, is left out of the interquartile
        range.

        A few values are outliers if their distance from the others exceeds the range of those. A value that five labels
        or more share, such as a price of zero, is one only if the distance exceeds five times that range.

        The first and the last bin hold none of the labels except outliers. They let soft labels at the ends of the axis
        decode without bias. The axis is unbounded: its end bins also hold new labels beyond it, and outliers such as
        typing errors.

        Raises:
            LabelError: labels hold NaN or infinity. TypeError: they are not numbers. ValueError: labels are empty or
            all equal.

        >>> bins = Bins.auto([21, 34, 34, 35, 60, 33, 18, 25, 41, 52])
        >>> bins.why
        '10 whole numbers from 18 to 60: 11 bins of 5, of which the first and the last are spare.'
        """
        edges, why = chosen_edges(*_different(labels))
        bins = cls(edges, unbounded=True)
        bins.why = why
        return bins

    @classmethod
    def classes(cls, n: int) -> Bins:
        """``n`` classes, 0 to n - 1. Each is a bin whose centre is the class number."""
        n = length("n", n, most=MOST_BINS)
        return cls(np.arange(n + 1) - 0.5, centers=np.arange(n), categorical=True)

    @staticmethod
    def grid(*axes: Bins) -> BinGrid:
        """The product of several axes, for labels with several dimensions such as age and pose.

        >>> Bins.grid(Bins.uniform(0, 100, width=10), Bins.classes(3)).shape
        (10, 3)
        """
        from .grid import BinGrid

        return BinGrid(*axes)

    @property
    def axes(self) -> tuple[Bins, ...]:
        """The axis itself, alone."""
        return (self,)

    def __len__(self) -> int:
        return len(self.centers)

    @cached_property
    def relative_widths(self) -> np.ndarray:
        widths = np.diff(self.edges)
        relative = np.ones(len(self)) if self._even else widths / widths.mean()
        relative.setflags(write=False)
        return relative

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bins):
            return NotImplemented
        return (
            (self.categorical, self.unbounded) == (other.categorical, other.unbounded)
            and np.array_equal(self.edges, other.edges)
            and np.array_equal(self.centers, other.centers)
        )

    def __hash__(self) -> int:
        return hash(axis_bytes(self))

    def __repr__(self) -> str:
        middles, whole = (self.edges[:-1] + self.edges[1:]) / 2, np.add(*_whole_numbers(self.edges)) / 2
        if self.categorical and not self.unbounded and np.array_equal(self.edges, np.arange(len(self) + 1) - 0.5):
            return f"Bins.classes({len(self)})"
        kind = ""
        if self.categorical or not self._even or not np.array_equal(self.centers, middles):
            at_whole = self._even and not self.categorical and np.array_equal(self.centers, whole)
            kind = " of whole numbers" if at_whole else f" #{hashlib.sha256(axis_bytes(self)).hexdigest()[:8]}"
        beyond = ", unbounded" if self.unbounded else ""
        return f"<Bins: {len(self)}{kind} from {digits(self.edges[0])} to {digits(self.edges[-1])}{beyond}>"

    def _index(self, labels: Tensor, outside: Outside, missing: Missing, name: str, *, wait: bool) -> Tensor:
        real(**{name: labels})
        on_one_device(**{name: labels})
        if wait and outside == "raise" and labels.is_meta:
            raise no_values(name)
        if self._collapses and labels.is_floating_point() and labels.itemsize < 8:
            self._warn_of_narrow(name, labels.dtype)
        if readable(labels) and (labels.itemsize > 2 or not labels.is_floating_point()):
            quick = self._quick_index(labels.numpy(force=True))
            if quick is not None:
                return torch.from_numpy(quick)
        labels = labels.detach()
        # Apple's GPUs have no float64.
        wide = torch.float32 if labels.device.type == "mps" else torch.float64
        values = labels if labels.is_floating_point() else labels.to(wide)
        edges = self.tensor("edges", values)
        if values.itemsize < 4:
            values, edges = values.float(), edges.float()
        index = torch.searchsorted(edges, values.contiguous(), right=True) - 1
        index = torch.where(values == edges[-1], len(self) - 1, index)
        if self.unbounded:
            index = torch.where(torch.isinf(values), index, index.clamp(0, len(self) - 1))
        absent = torch.isnan(values)
        beyond = ((index < 0) | (index >= len(self))) & ~absent
        broken = (values != values.round()) & ~absent if self.categorical else torch.zeros_like(absent)
        refused = broken | beyond if outside == "raise" else broken
        refused = refused if missing == "drop" else refused | absent
        looks = readable(labels) or (wait and outside == "raise" and has_values(labels))
        if looks and bool(refused.any()):
            raise self._refusal(name, labels, broken, refused)
        index = index.clamp(0, len(self) - 1) if outside == "clip" else index.masked_fill(beyond, -1)
        return index.masked_fill(absent, -1).masked_fill(refused, -2)

    def _warn_of_narrow(self, name: str, dtype: object) -> None:
        """Warn once that labels of this dtype cannot be told apart on this axis."""
        if torch.compiler.is_compiling():
            return
        self._collapses = False  # so that the warning is issued once
        warn(
            f"{dtype} cannot separate all edges of {self!r}, so that {name} fall into fewer bins. "
            "Pass them in float64, or subtract an offset first."
        )

    def _tally(self, labels: np.ndarray, outside: Outside, missing: Missing, name: str) -> np.ndarray:
        values = labels if labels.dtype.kind == "f" else labels.astype(np.float64)
        exact = values.itemsize == 8 or (values.itemsize == 4 and not self._collapses)
        # Sorting many labels is faster than searching for the bin of each.
        if exact and not self.categorical and len(self) < values.size and self._scale(values.dtype) is None:
            with np.errstate(over="ignore"):
                counts = np.histogram(values, self.edges.astype(values.dtype))[0]
            if counts.sum() == values.size:
                return counts
        return super()._tally(labels, outside, missing, name)

    def _quick_index(self, labels: np.ndarray) -> np.ndarray | None:
        """The bins of labels, computed without a search. It is None where this is not possible: for bins of different
        widths, for labels that need an error or clipping, or where rounding could give another bin than a search."""
        if labels.size == 0 or labels.ndim == 0:  # results without dimensions would be NumPy scalars
            return None
        if self.categorical:
            if labels.dtype.kind not in "iu":
                return None
            index = labels.astype(np.int64)
            # Read as unsigned, a negative number is beyond every axis.
            unsigned = index.view(np.uint64)
            return index if unsigned.item(unsigned.argmax()) < len(self) else None
        values = labels if labels.dtype.kind == "f" else labels.astype(np.float64)
        if (scale := self._scale(values.dtype)) is None:
            return None
        offset, slope, first, last = scale
        low, high = values.item(values.argmin()), values.item(values.argmax())  # NaN if any label is
        if not first <= low <= high <= last:
            return None
        index = _scaled(values, offset, slope).astype(np.int64)
        return np.minimum(index, len(self) - 1, out=index) if high == last else index

    def _scale(self, dtype: np.dtype) -> tuple[float, float, float, float] | None:
        """(offset, slope, first edge, last edge), such that rounding ``slope * label + offset`` down gives the bin of
        every label of this dtype, or None if there is no such pair. Each step is monotone, so checking both sides of
        each edge is enough."""
        if dtype not in self._scales:
            with np.errstate(over="ignore", invalid="ignore"):
                edges = self.edges.astype(dtype)
                slope = len(self) / (self.edges[-1] - self.edges[0])
                offset, slope = np.array([-self.edges[0] * slope, slope], dtype=dtype).tolist()
                at_edge = _scaled(edges, offset, slope).astype(np.int64)
                just_below = _scaled(np.nextafter(edges[1:], dtype.type(-np.inf)), offset, slope).astype(np.int64)
            expected = np.arange(len(edges))
            exact = np.array_equal(at_edge, expected) and np.array_equal(just_below, expected[:-1])
            self._scales[dtype] = (offset, slope, float(edges[0]), float(edges[-1])) if exact else None
        return self._scales[dtype]

    def _refusal(self, name: str, labels: Tensor, broken: Tensor, refused: Tensor) -> Exception:
        """The error for the first refused label."""
        first = tuple(int(i) for i in refused.nonzero()[0])
        value = labels[first].item()
        got = f"{value} at index {list(first)} ({int(refused.sum())} such labels)"
        if value != value:
            return label_problem(f"{name} must not be NaN", got=got, fix=_NO_NAN)
        if bool(broken[first]):
            return label_problem(f"{name} must be whole numbers where bins are classes", got=got)
        axis = f"0 to {len(self) - 1}" if self.categorical else f"[{digits(self.edges[0])}, {digits(self.edges[-1])}]"
        fix = (
            "Count classes from zero, and give the model one output for each" if self.categorical else "Widen the bins"
        )
        fix += ', remove these samples, or pass outside="clip" or "drop" where it is an argument.'
        return label_problem(f"{name} must lie on the label axis {axis}", got=got, fix=fix)

    def _mean(self, shares: Tensor) -> Tensor:
        wide = shares.to(self.wide_dtype(shares))
        return mean_under(wide, self.tensor("centers", wide))

    @property
    def settings(self) -> dict[str, Any]:
        """The values that define this axis. :meth:`from_dict` makes an equal axis from them."""
        settings = {"edges": self.edges, "centers": self.centers}
        return {**settings, "categorical": self.categorical, "unbounded": self.unbounded}

    def to_dict(self) -> dict[str, Any]:
        """:attr:`settings` as plain Python values, for JSON and checkpoints."""
        return {**self.settings, "edges": self.edges.tolist(), "centers": self.centers.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Bins:
        """The axis that these :attr:`settings` or this :meth:`to_dict` define."""
        keys("values", values, ("edges", "centers", "categorical", "unbounded"))
        return cls(**values)


def _different(labels: Any) -> tuple[np.ndarray, float]:
    """Labels (N,) as float64, and the machine epsilon of their dtype, 0 for whole numbers and float64. Raises unless
    they are finite and not all equal."""
    given = labels_array(labels).ravel()
    narrow = given.dtype.kind == "f" and given.itemsize < 8
    array = _decimals(given) if narrow else given.astype(np.float64)
    not_empty(labels=array)
    if (bad := ~np.isfinite(array)).any():
        got = f"{array[bad.argmax()]} at index [{bad.argmax()}] ({bad.sum()} such labels)"
        raise label_problem("labels must be finite", got=got, fix=_NO_NAN)
    several = array.min() < array.max()
    require(several, "labels must hold at least two different values", got=f"only {digits(array[0])}")
    eps = float(np.finfo(given.dtype).eps) if narrow else 0.0
    return array, torch.finfo(torch.bfloat16).eps if getattr(labels, "dtype", None) == torch.bfloat16 else eps


def _decimals(array: np.ndarray) -> np.ndarray:
    """Floats below 64 bits as float64 of their shortest decimals: 0.1 rather than 0.10000000149."""
    different, places = np.unique(array, return_inverse=True)
    return different.astype(str).astype(np.float64)[places.reshape(array.shape)]


def _outwards(which: Any, bound: Any) -> Fraction:
    """The decimal of a bound or its value in float64: the one that is further out."""
    decimal = Fraction(str(bound))
    narrow = isinstance(bound, np.floating) and bound.itemsize < 8
    return which(decimal, Fraction(float(bound))) if narrow else decimal


def _dividing(low: Any, high: Any, step: Fraction) -> str:
    """Advice on bins that divide an axis from low to high."""
    start, end = _outwards(min, low), _outwards(max, high)
    count = math.ceil((end - Fraction(str(low))) / step)
    ends = {"high": Fraction(str(low)) + count * step}
    if not _is_decimal(*ends.values()):
        ends = {"low": math.floor(start / step) * step, "high": math.ceil(end / step) * step}
    other = " and ".join(f"{name}={digits(float(x))}" for name, x in ends.items())
    return f"Use count={count}" + (f", or {other}." if _is_decimal(*ends.values()) else ".")


def _is_decimal(*numbers: Fraction) -> bool:
    """Whether these numbers equal the decimals that their floats print as."""
    return all(Fraction(str(float(x))) == x for x in numbers)


def continuous(bins: object, fix: str, *, of: str = "") -> None:
    """Raise unless ``bins`` is one continuous axis. ``of`` names what needs it."""
    instance(Bins, bins=bins)
    rule = "bins must cut a continuous label axis" + f" for {of}" * bool(of)
    require(not bins.categorical, rule, got=bins, fix=fix)  # type: ignore[attr-defined]


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` that does not wait for an accelerator, as indexing does for an index without dimensions."""
    return table.index_select(0, index.flatten()).reshape(index.shape)


def _edges_array(edges: object) -> np.ndarray:
    """Checked edges as one row of float64."""
    array = labels_array(edges, "edges").astype(np.float64) + 0.0  # no -0.0, which hashes unlike 0.0
    require(array.ndim == 1 and len(array) > 1, "edges must be one row of at least two numbers", got=array.shape)
    sound = (array[1:] > array[:-1]) & np.isfinite(array[1:]) & np.isfinite(array[:-1])
    i = int(np.argmin(sound))
    got = f"{digits(array[i])} followed by {digits(array[i + 1])} at position {i}"
    require(sound[i], "edges must be finite and strictly rising", got=got, fix="Use numpy.unique(edges).")
    largest = np.abs(array).max()
    require(largest <= _LARGEST, f"edges must lie within {_LARGEST:g} of zero", got=f"{largest:.3g}")
    return array


def _scaled(values: np.ndarray, offset: float, slope: float) -> np.ndarray:
    values = values if slope == 1 else values * slope
    return values if offset == 0 else values + offset


def axis_bytes(bins: Bins) -> bytes:
    return bins.edges.tobytes() + bins.centers.tobytes() + bytes([bins.categorical, bins.unbounded])


def _whole_numbers(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last whole number in each bin."""
    first, last = np.ceil(edges[:-1]), np.ceil(edges[1:]) - 1
    if first[-1] == edges[-1]:  # the last bin holds its upper edge
        last[-1] = first[-1]
    return first, last


def _integer_centers(edges: np.ndarray) -> np.ndarray:
    first, last = _whole_numbers(edges)
    i = int(np.argmax(last < first))
    got, fix = f"[{digits(edges[i])}, {digits(edges[i + 1])})", "Use a width of at least 1, or integer=False."
    require(first[i] <= last[i], "every bin must hold a whole number", got=got, fix=fix)
    return (first + last) / 2
