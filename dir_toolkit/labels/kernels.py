"""Smoothing kernels over neighbouring bins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from .._checks import MOST_BINS, instance, labels_array, length, not_empty, number, one_of, require

if TYPE_CHECKING:
    from .bins import Bins, LabelAxes

__all__ = [
    "Edges",
    "KernelUnit",
    "LabelWindow",
    "Window",
    "gaussian",
    "laplace",
    "smooth",
    "smoothing_matrix",
    "triangular",
]

KernelUnit = Literal["label", "bin"]
Edges = Literal["reflect", "mirror", "zero"]
EDGES = get_args(Edges)
A_WINDOW = "Use dir_toolkit.gaussian(5, 2)."
_SCIPY_MODE = {"reflect": "reflect", "mirror": "mirror", "zero": "constant"}


@dataclass(frozen=True)
class LabelWindow:
    """A window in label units, from :func:`gaussian`, :func:`laplace` or :func:`triangular` with ``unit="label"``. It
    is converted to bins where it is used.

    Attributes:
        make: the function that made it.
        size, widths: the arguments of that function, in label units.
        folded: as in :func:`gaussian`.
    """

    make: Callable[..., np.ndarray]
    size: float
    widths: tuple[float, ...]
    folded: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The values that define this window."""
        return {"make": self.make.__name__, "size": self.size, "widths": self.widths, "folded": self.folded}

    def over(self, axis: Bins) -> np.ndarray:
        """The window in bins of this axis. Its length is the odd number of bins nearest to the size.

        Raises:
            ValueError: bins differ in width, or are classes, or the window is longer than the axis.
        """
        rule = "a kernel in label units needs bins of one width, and not classes"
        fix = "Pass gaussian(5, 2) in bins: it widens with them, so that it smooths alike wherever labels lie."
        require(not axis.categorical and (axis.relative_widths == 1).all(), rule, got=axis, fix=fix)
        width = float(np.median(np.diff(axis.edges)))
        size, *widths = (float(f"{x / width:.12g}") for x in (self.size, *self.widths))
        bins, most = 2 * int(size / 2) + 1, len(axis) - 1 + len(axis) % 2
        got, fix = f"{bins} bins for an axis of {len(axis)}", f"Use a size of at most {most * width:g}."
        require(bins <= most, "the window of kernel must not be longer than the label axis", got=got, fix=fix)
        return self.make(bins, *widths, **({"folded": True} if self.folded else {}))


Window = Sequence[float] | np.ndarray | LabelWindow


def _in_labels(
    unit: str, make: Callable[..., np.ndarray], size: float, folded: bool = False, **widths: float
) -> LabelWindow | None:
    """The window in label units; None if the unit is a bin."""
    one_of("unit", unit, get_args(KernelUnit))
    if unit == "bin":
        return None
    size, *others = (number(name, x, low=0, open_low=True) for name, x in {"size": size, **widths}.items())
    return LabelWindow(make, size, tuple(others), folded)


def _offsets(size: int) -> np.ndarray:
    size = length("size", size, most=MOST_BINS)
    require(size % 2 == 1, "size must be odd, so that the window has a middle", got=size, fix=f"Use {size - 1}.")
    return np.arange(size) - size // 2


@overload
def gaussian(size: int, sigma: float, *, folded: bool = ..., unit: Literal["bin"] = ...) -> np.ndarray: ...
@overload
def gaussian(size: float, sigma: float, *, folded: bool = ..., unit: Literal["label"]) -> LabelWindow: ...
def gaussian(size: Any, sigma: float, *, folded: bool = False, unit: KernelUnit = "bin") -> np.ndarray | LabelWindow:
    """A Gaussian window, ``exp(-d^2 / (2 sigma^2))`` at ``d`` bins from the middle.

    Args:
        size: the number of bins, odd; with ``unit="label"`` a length in label units.
        sigma: the standard deviation, in bins; with ``unit="label"`` in label units.
        folded: whether to return the window of the authors' DIR code. It filters a unit impulse of length ``size`` with
            reflecting ends, which folds the tails back and makes the window nearly flat.
        unit: the unit of size and sigma. A window in label units is the same for bins of any width.
    Returns:
        (size,) float64, at most 1; with ``unit="label"`` a :class:`LabelWindow`, for any ``kernel=``.
    Source:
        Yang et al. 2021, section 3.1 (arXiv:2102.09554).

    >>> gaussian(5, 2).round(3).tolist()
    [0.607, 0.882, 1.0, 0.882, 0.607]
    >>> gaussian(5, 2, folded=True).round(3).tolist()
    [0.858, 0.946, 1.0, 0.946, 0.858]
    """
    instance(bool, folded=folded)
    if window := _in_labels(unit, gaussian, size, folded, sigma=sigma):
        return window
    offsets = _offsets(size)
    sigma = number("sigma", sigma, low=0, open_low=True)
    if folded and sigma > 0.1:  # a narrower window is the impulse itself
        reach = int(4 * sigma + 0.5)  # the radius of SciPy's filter, which that code uses
        impulse = np.pad((offsets == 0).astype(np.float64), reach, mode="symmetric")
        flat = np.convolve(impulse, np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2), "valid")
        return flat / flat.max()
    with np.errstate(over="ignore"):
        return np.exp(-0.5 * (offsets / sigma) ** 2)


@overload
def triangular(size: int, *, unit: Literal["bin"] = ...) -> np.ndarray: ...
@overload
def triangular(size: float, *, unit: Literal["label"]) -> LabelWindow: ...
def triangular(size: Any, *, unit: KernelUnit = "bin") -> np.ndarray | LabelWindow:
    """A triangular window that reaches zero one bin beyond its ends. Arguments and result are as in :func:`gaussian`.

    >>> triangular(3).tolist()
    [0.5, 1.0, 0.5]
    """
    if window := _in_labels(unit, triangular, size):
        return window
    offsets = _offsets(size)
    return (size // 2 + 1 - np.abs(offsets)) / (size // 2 + 1)  # each rounded once, as SciPy's are


@overload
def laplace(size: int, scale: float, *, unit: Literal["bin"] = ...) -> np.ndarray: ...
@overload
def laplace(size: float, scale: float, *, unit: Literal["label"]) -> LabelWindow: ...
def laplace(size: Any, scale: float, *, unit: KernelUnit = "bin") -> np.ndarray | LabelWindow:
    """A Laplace window, ``exp(-|d| / scale)`` at ``d`` bins from the middle. Arguments and result are as in
    :func:`gaussian`.

    >>> laplace(3, 1).round(3).tolist()
    [0.368, 1.0, 0.368]
    """
    if window := _in_labels(unit, laplace, size, scale=scale):
        return window
    offsets = _offsets(size)
    scale = number("scale", scale, low=0, open_low=True)
    with np.errstate(over="ignore"):
        return np.exp(-np.abs(offsets) / scale)


DEFAULT_KERNEL = gaussian(5, 2)
FOLDED_KERNEL = gaussian(5, 2, folded=True)
for _window in (DEFAULT_KERNEL, FOLDED_KERNEL):
    _window.setflags(write=False)


def usual_kernel(bins: LabelAxes, window: np.ndarray = DEFAULT_KERNEL) -> np.ndarray | tuple[np.ndarray, ...] | None:
    """The default kernel for these bins. Classes, which have no neighbours, and axes shorter than the window are not
    smoothed. Over a grid it is one window per axis. It is None where no axis is smoothed."""
    windows = [not axis.categorical and len(axis) >= len(window) for axis in bins.axes]
    if not any(windows):
        return None
    return window if len(windows) == 1 else tuple(window if smoothed else np.ones(1) for smoothed in windows)


def checked_window(kernel: Window, num_bins: int) -> np.ndarray:
    """The window as float64, checked for an axis of ``num_bins`` bins."""
    window = labels_array(kernel, "kernel").astype(np.float64)
    size, came = window.size, window.tolist()
    require(window.ndim == 1 and size > 0, "kernel must be a row of numbers", got=window.shape, fix=A_WINDOW)
    require(size % 2 == 1, "kernel must have odd length, so that it has a middle", got=f"{size} values")
    sound = np.isfinite(window).all() and (window >= 0).all() and window[size // 2] > 0
    require(sound, "kernel must be finite, not negative, and positive in the middle", got=came)
    require(np.allclose(window, window[::-1], rtol=1e-9, atol=0), "kernel must be symmetric", got=came)
    got, fix = f"{size} values for {num_bins} bins", f"Use at most {num_bins - 1 + num_bins % 2}."
    require(size <= num_bins, "kernel must not be longer than the label axis", got=got, fix=fix)
    return window


def smooth(values: np.ndarray, kernel: Window, *, edges: Edges = "reflect") -> np.ndarray:
    """Average ``values`` over neighbouring bins, by a window that is scaled to sum to one.

    Args:
        values: (B, ...), smoothed along the first axis.
        kernel: of odd length, symmetric, at most B long.
        edges: the values beyond the axis: ``"reflect"`` (b a | a b c), ``"mirror"`` (c b | a b c) or ``"zero"``.
    Returns:
        float64, of the shape of ``values``. ``"reflect"`` keeps the sum.
    Source:
        Yang et al. 2021, equation 1 (arXiv:2102.09554).

    >>> smooth(np.array([4.0, 0.0, 0.0]), triangular(3)).tolist()
    [3.0, 1.0, 0.0]
    """
    one_of("edges", edges, EDGES)
    values = np.atleast_1d(labels_array(values, "values").astype(np.float64))
    not_empty(values=values)
    return smooth_axes(values, [checked_window(kernel, len(values))], edges=edges)


def smooth_axes(values: np.ndarray, windows: Sequence[np.ndarray], *, edges: Edges) -> np.ndarray:
    """:func:`smooth` of float64 ``values`` along their first axes in turn, by one checked window per axis."""
    from scipy.ndimage import correlate1d

    for axis, window in enumerate(windows):
        values = correlate1d(values, window / window.sum(), axis=axis, mode=_SCIPY_MODE[edges], cval=0.0)
    return values


def smoothing_window(kernel: Window, num_bins: int) -> np.ndarray:
    """The checked window for :func:`smooth_rows`, scaled to sum to one."""
    window = checked_window(kernel, num_bins)
    return window / window.sum()


def smooth_rows(values: Tensor, window: np.ndarray, edges: Edges) -> Tensor:
    """:func:`smooth` of a tensor (B, ...) along its first axis, by a window from :func:`smoothing_window`. It needs
    three times the memory of the values, while :func:`smoothing_matrix` needs B x B."""
    reach, count = len(window) // 2, len(values)
    if edges == "zero":
        first = last = values.new_zeros(reach, *values.shape[1:])
    elif edges == "reflect":
        first, last = values[:reach].flip(0), values[count - reach :].flip(0)
    else:
        first, last = values[1 : 1 + reach].flip(0), values[count - 1 - reach : count - 1].flip(0)
    beyond = torch.cat([first, values, last])
    smoothed = values * float(window[reach])
    for d in range(1, reach + 1):
        lower, upper = beyond[reach - d : reach - d + count], beyond[reach + d : reach + d + count]
        smoothed.add_(lower + upper, alpha=float(window[reach + d]))
    return smoothed


def smoothing_matrix(num_bins: int, kernel: Window, *, edges: Edges = "reflect") -> np.ndarray:
    """The (B, B) matrix that :func:`smooth` multiplies by."""
    return smooth(np.eye(length("num_bins", num_bins)), kernel, edges=edges)
