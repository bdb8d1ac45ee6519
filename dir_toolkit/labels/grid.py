"""Labels with several dimensions: a grid of joint bins with one label axis per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._checks import MOST_BINS, instance, is_tensor, keys, problem, require, shaped, whole
from ..errors import ShapeError
from .bins import Bins, LabelAxes, Missing, Outside
from .kernels import A_WINDOW, DEFAULT_KERNEL, LabelWindow, Window, checked_window, usual_kernel

__all__ = ["AnyBins", "BinGrid", "Windows"]

Windows = Window | Sequence[Window]
_ALONE = np.ones(1)


class BinGrid(LabelAxes):
    """The product of K label axes. Labels are (..., K), and each falls into one of the B joint bins.

    Joint bins are numbered with the last axis running fastest, so that ``counts.reshape(grid.shape)`` has one dimension
    per axis. Make a grid with :meth:`Bins.grid`. A grid is immutable. Two grids of equal axes are equal.

    Attributes:
        axes: the K label axes.

    Raises:
        TypeError: an axis is not a :class:`Bins`. ValueError: there is no axis, or there would be more than ten million
            joint bins.

    >>> grid = BinGrid(Bins.uniform(0, 100, width=10), Bins.classes(3))
    >>> len(grid), grid.index([[0, 0], [15, 2], [100, 1]]).tolist()
    (30, [0, 5, 28])
    """

    def __init__(self, *axes: Bins) -> None:
        require(len(axes) > 0, "axes must hold at least one Bins", got="none")
        for i, axis in enumerate(axes):
            instance(Bins, **{f"axes[{i}]": axis})
        self._axes = axes
        whole("the number of joint bins", len(self), high=MOST_BINS, fix="Widen the bins of an axis.")

    @property
    def axes(self) -> tuple[Bins, ...]:
        return self._axes

    @cached_property
    def centers(self) -> np.ndarray:
        """(B, K) float64, in label units; read-only: the centre of each joint bin."""
        centers = self._corners([axis.centers for axis in self.axes])
        centers.setflags(write=False)
        return centers

    @cached_property
    def relative_widths(self) -> np.ndarray:
        relative = self._corners([axis.relative_widths for axis in self.axes]).prod(1)
        relative.setflags(write=False)
        return relative

    @property
    def edges(self) -> np.ndarray:
        """Always raises AttributeError, since only a single axis has edges."""
        raise problem("edges belong to one axis", got=repr(self), fix="Use grid.axes[0].", error=AttributeError)

    def _corners(self, of_axes: Sequence[np.ndarray]) -> np.ndarray:
        """One value per bin of each axis, as (B, K)."""
        return np.stack(np.meshgrid(*of_axes, indexing="ij"), -1).reshape(len(self), len(self.axes))

    def __len__(self) -> int:
        return math.prod(self.shape)

    def __eq__(self, other: object) -> bool:
        return self.axes == other.axes if isinstance(other, BinGrid) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.axes)

    def __reduce__(self) -> tuple[Any, ...]:
        return BinGrid, self.axes

    def __repr__(self) -> str:
        return f"<BinGrid: {' x '.join(map(repr, self.axes))}>"

    def _index(self, labels: Tensor, outside: Outside, missing: Missing, name: str, *, wait: bool) -> Tensor:
        is_tensor(**{name: labels})
        shaped((..., len(self.axes)), "one number per dimension in the last axis", **{name: labels})
        index = torch.zeros_like(labels[..., 0], dtype=torch.int64)
        worst = torch.zeros_like(index)
        for k, axis in enumerate(self.axes):
            of_axis = axis._index(labels[..., k], outside, missing, f"{name}[..., {k}]", wait=wait)
            index, worst = index * len(axis) + of_axis, torch.minimum(worst, of_axis)
        return torch.where(worst < 0, worst, index)

    def _mean(self, shares: Tensor) -> Tensor:
        """The mean of each marginal distribution, (..., K)."""
        joint = shares.unflatten(-1, self.shape)  # (..., B_1, ..., B_K)
        first = joint.ndim - len(self.axes)
        means = []
        for k, axis in enumerate(self.axes):
            others = [first + i for i in range(len(self.axes)) if i != k]
            marginal = joint.sum(others) if others else joint
            means.append(axis._mean(marginal))
        return torch.stack(means, -1)

    @property
    def settings(self) -> dict[str, Any]:
        """The values that define this grid. :meth:`from_dict` makes an equal grid from them."""
        return {"axes": [axis.settings for axis in self.axes]}

    def to_dict(self) -> dict[str, Any]:
        """:attr:`settings` as plain Python values, for JSON and checkpoints."""
        return {"axes": [axis.to_dict() for axis in self.axes]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BinGrid:
        """The grid that this :meth:`to_dict` defines."""
        keys("values", values, ("axes",))
        instance((list, tuple), axes=values["axes"])
        return cls(*map(Bins.from_dict, values["axes"]))


AnyBins = Bins | BinGrid


def saved_bins(values: dict[str, Any]) -> AnyBins:
    """The axis or the grid that ``to_dict`` gave these values for."""
    return BinGrid.from_dict(values) if isinstance(values, dict) and "axes" in values else Bins.from_dict(values)


def checked_windows(kernel: Windows, bins: AnyBins) -> tuple[np.ndarray, ...]:
    """One checked window per axis. ``kernel`` is one window per axis, or one window for all continuous axes."""
    axes = bins.axes
    windows: Any = kernel if isinstance(kernel, (Sequence, np.ndarray)) else ()
    if not (isinstance(bins, BinGrid) and any(np.ndim(window) > 0 for window in windows)):
        # Classes of a grid have no neighbours, and so are not smoothed.
        windows = [kernel if len(axes) == 1 or not axis.categorical else _ALONE for axis in axes]
        alone, fix = all(window is _ALONE for window in windows), "Use kernel=None, or one window per axis."
        require(
            not alone, "kernel must be None for a grid of classes, which have no neighbours", got="one window", fix=fix
        )
    if len(windows) != len(axes):
        rule, got = f"kernel must be one window, or one for each of {len(axes)} label axes", f"{len(windows)} windows"
        raise problem(rule, got=got, fix="Use [1.0] for an axis that is not to be smoothed.", error=ShapeError)
    pairs = list(zip(windows, axes, strict=True))
    made = [window.over(axis) if isinstance(window, LabelWindow) else window for window, axis in pairs]
    return tuple(checked_window(window, len(axis)) for window, axis in zip(made, axes, strict=True))


def chosen_windows(
    kernel: Windows | Literal["auto"] | None, bins: AnyBins, usual: np.ndarray = DEFAULT_KERNEL
) -> tuple[np.ndarray, ...] | None:
    """:func:`checked_windows` of a kernel that may also be None, or ``"auto"`` for :func:`usual_kernel`. It is None
    where nothing is smoothed."""
    if isinstance(kernel, str):
        if kernel != "auto":
            raise problem('kernel must be a window, "auto" or None', got=repr(kernel), fix=A_WINDOW, error=TypeError)
        kernel = usual_kernel(bins, usual)
    return None if kernel is None else checked_windows(kernel, bins)
