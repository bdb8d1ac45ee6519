"""Checks for several data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..._checks import labels_array, problem
from ...errors import DataError, ShapeError

_SHAPES = {None: "(M, ...)", 1: "(N,)", 4: "(M, C, H, W)"}


def data_error(rule: str, *, got: object = None, fix: str = "", source: object = "") -> Exception:
    """The error for invalid data. It names ``source``, a file with its line or byte, or else the caller."""
    return problem(rule, got=got, fix=fix, error=DataError, source=str(source))


def require_data(sound: bool, rule: str, *, got: object = None, fix: str = "", source: object = "") -> None:
    """Raise :func:`data_error` unless ``sound``."""
    if not sound:
        raise data_error(rule, got=got, fix=fix, source=source)


def check_array(name: str, value: object, axes: int | None, *dtypes: type[np.generic]) -> None:
    """Raise unless ``value`` is an array with one of these dtypes and this many axes, where samples are not empty.

    Args:
        axes: None takes two or more.
    """
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes:
        got = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        allowed = " or ".join(dtype.__name__ for dtype in dtypes)
        raise problem(f"{name} must be a NumPy array of {allowed}", got=got, error=TypeError)
    if value.ndim != (axes or max(value.ndim, 2)) or 0 in value.shape[1:]:
        raise problem(f"{name} must have shape {_SHAPES[axes]}", got=value.shape, error=ShapeError)


def check_each(rule: str, values: np.ndarray, sound: np.ndarray, error: type[Exception] = ValueError) -> None:
    """Raise unless every value is sound. The error names the first value that is not and counts all of them."""
    if not sound.all():
        first = int(sound.argmin())
        got = f"{values[first]} at index [{first}] ({int((~sound).sum())} such values)"
        raise problem(rule, got=got, error=error)


def check_parts(parts: Mapping[str, Sequence[object]], source: object) -> None:
    """Raise if a part of a split is empty."""
    if empty := [part for part, members in parts.items() if not members]:
        raise data_error(f"the {empty[0]} split must hold at least one image", got="none", source=source)


def row(name: str, values: object) -> np.ndarray:
    """The numbers in an array or sequence of any kind, which must be one row."""
    array = labels_array(values, name)
    if array.ndim != 1:
        raise problem(f"{name} must have shape (N,)", got=array.shape, error=ShapeError)
    return array
