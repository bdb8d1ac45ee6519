"""Select and replace one part of a tuple, a dict, or an object with attributes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .._checks import problem

__all__ = ["Select", "form", "picked", "replaced"]

Select = int | str | None


def picked(whole: Any, select: Select) -> Tensor:
    """The tensor with an index, a key or the name of an attribute; ``whole`` itself if ``select`` is None.

    Raises:
        TypeError: it is not a tensor.
    """
    part = whole if select is None else None
    if isinstance(whole, Mapping):
        part = whole.get(select, part)
    elif isinstance(whole, (tuple, list)) and isinstance(select, int):
        part = whole[select] if -len(whole) <= select < len(whole) else None
    elif isinstance(select, str) and not isinstance(whole, Tensor):
        part = getattr(whole, select, None)
    if isinstance(part, Tensor):
        return part
    rule = "features must be a torch.Tensor" + ("" if select is None else f", which select={select!r} must select")
    fix = "Pass attach the index, the key or the attribute's name of a tensor as select=."
    if isinstance(whole, Tensor):
        fix = "Omit select=."
    raise problem(rule, got=form(whole), fix=fix, error=TypeError)


def replaced(whole: Any, select: Select, part: Tensor) -> Any:
    """A copy of ``whole``, of the same type, in which ``part`` replaces the result of :func:`picked`."""
    if select is None:
        return part
    if isinstance(whole, tuple):
        place = type(whole).__match_args__.index(select) if isinstance(select, str) else range(len(whole))[select]  # type: ignore[attr-defined]
        values = (*whole[:place], part, *whole[place + 1 :])
        return whole._make(values) if hasattr(whole, "_make") else type(whole)(values)
    other = copy.copy(whole)
    if isinstance(whole, (Mapping, list)):
        other[select] = part
    else:
        object.__setattr__(other, str(select), part)  # dataclasses may be frozen
    return other


def form(whole: Any) -> str:
    """A description of an object for error messages."""
    if isinstance(whole, Mapping):
        return f"a {type(whole).__name__} with the keys {sorted(map(str, whole))}"
    if isinstance(whole, Sequence) and not isinstance(whole, str):
        return f"a {type(whole).__name__} of {len(whole)}"
    return f"a {type(whole).__name__}"
