"""Windows over neighbouring bins, and smoothing with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import MOST_BINS, instance, labels_array, length, not_empty, number, one_of, require

if TYPE_CHECKING:
    from .bins import LabelAxes

__all__ = ["Edges", "Window", "gaussian", "laplace", "smooth", "smoothing_matrix", "triangular"]

Window = Sequence[float] | np.ndarray
Edges = Literal["reflect", "mirror", "zero"]
EDGES = get_args(Edges)
A_WINDOW = "Use dir_toolkit.gaussian(5, 2)."
_SCIPY_MODE = {"reflect": "reflect", "mirror": "mirror", "zero": "constant"}


def _offsets(size: int) -> np.ndarray:
    size = length("size", size, most=MOST_BINS)
    require(size % 2 == 1, "size must be odd, so that the window has a middle", got=size, fix=f"Use {size - 1}.")
    return np.arange(size) - size // 2


def gaussian(size: int, sigma: float, *, folded: bool = False) -> np.ndarray:
    """A Gaussian window, ``exp(-d^2 / (2 sigma^2))`` at ``d`` bins from the middle.

    Args:
        size: the number of bins, odd.
        sigma: the standard deviation, in bins.
        folded: gives the window of the public DIR code. It filters a unit impulse of length ``size`` with reflecting
            ends, which folds the tails back and makes the window nearly flat (size 5, sigma 2: .858 .946 1 .946 .858).
    Returns:
        (size,) float64, at most 1.
    Source:
        Yang et al. 2021, section 3.1 (arXiv:2102.09554).

    >>> gaussian(5, 2).round(3).tolist()
    [0.607, 0.882, 1.0, 0.882, 0.607]
    >>> gaussian(5, 2, folded=True).round(3).tolist()
    [0.858, 0.946, 1.0, 0.946, 0.858]
    """
    offsets = _offsets(size)
    sigma = number("sigma", sigma, low=0, open_low=True)
    instance(bool, folded=folded)
    if folded and sigma > 0.1:  # a narrower window is the impulse itself
        reach = int(4 * sigma + 0.5)  # where SciPy's filter ends, which that code uses
        impulse = np.pad((offsets == 0).astype(np.float64), reach, mode="symmetric")
        window = np.convolve(impulse, np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2), "valid")
        return window / window.max()
    with np.errstate(over="ignore"):
        return np.exp(-0.5 * (offsets / sigma) ** 2)


def triangular(size: int) -> np.ndarray:
    """A triangle that would reach zero one bin beyond the window. It is (size,) float64, with 1 in the middle.

    >>> triangular(3).tolist()
    [0.5, 1.0, 0.5]
    """
    offsets = _offsets(size)
    return (size // 2 + 1 - np.abs(offsets)) / (size // 2 + 1)  # each rounded once, as SciPy's are


def laplace(size: int, scale: float) -> np.ndarray:
    """A Laplace window, ``exp(-|d| / scale)`` at ``d`` bins from the middle. It is (size,) float64, at most 1.

    >>> laplace(3, 1).round(3).tolist()
    [0.368, 1.0, 0.368]
    """
    offsets = _offsets(size)
    scale = number("scale", scale, low=0, open_low=True)
    with np.errstate(over="ignore"):
        return np.exp(-np.abs(offsets) / scale)


DEFAULT_KERNEL = gaussian(5, 2)
FOLDED_KERNEL = gaussian(5, 2, folded=True)
for _window in (DEFAULT_KERNEL, FOLDED_KERNEL):
    _window.setflags(write=False)


def usual_kernel(bins: LabelAxes, window: np.ndarray = DEFAULT_KERNEL) -> np.ndarray | tuple[np.ndarray, ...] | None:
    """What smooths over these bins by default: the window, but nothing over classes, which have no neighbours, and
    nothing over an axis of fewer bins than the window. Over a grid it is one window per axis. It is None where no axis
    is smoothed."""
    windows = [not axis.categorical and len(axis) >= len(window) for axis in bins.axes]
    if not any(windows):
        return None
    return window if len(windows) == 1 else tuple(window if smoothed else np.ones(1) for smoothed in windows)


def checked_window(kernel: Window, num_bins: int) -> np.ndarray:
    """The window as float64, once it is checked that it can smooth an axis of ``num_bins`` bins."""
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
    """``values`` averaged over neighbouring bins by a window that is scaled to sum to one.

    Args:
        values: (B, ...), smoothed along the first axis.
        kernel: of odd length, symmetric, at most B long.
        edges: what lies beyond the axis: ``"reflect"`` (b a | a b c), ``"mirror"`` (c b | a b c) or ``"zero"``.
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
    """:func:`smooth` along the first axes of float64 ``values`` in turn, by one checked window for each of them."""
    from scipy.ndimage import correlate1d

    for axis, window in enumerate(windows):
        values = correlate1d(values, window / window.sum(), axis=axis, mode=_SCIPY_MODE[edges], cval=0.0)
    return values


def smoothing_window(kernel: Window, num_bins: int) -> np.ndarray:
    """The checked window, scaled to sum to one, that :func:`smooth_rows` takes."""
    window = checked_window(kernel, num_bins)
    return window / window.sum()


def smooth_rows(values: Tensor, window: np.ndarray, edges: Edges) -> Tensor:
    """:func:`smooth` of a tensor (B, ...) along its first axis, in its own dtype and on its device, by a window of
    :func:`smoothing_window`. It needs the memory of three times the values, where :func:`smoothing_matrix` needs
    B x B."""
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
