"""Settings: the values that distinguish objects made with different arguments.

An object has one dict ``settings``, with an entry for each argument of the constructor and for values learned from
labels. The repr, checkpoints and the fingerprint of a run read this dict.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import problem
from .errors import SettingsError

_LONGEST = 64  # longer arrays are replaced by a digest
_MOST_SHOWN = 6  # the largest number of differences in one message
_LONGEST_TEXT = 200  # the largest number of characters of a value in a message


def described(name: str, value: object) -> Any:
    """A description of a setting in plain values for JSON, which differs for different settings.

    A long array becomes a digest, an object its ``settings``, a function its module and name, and a partial its
    function and arguments. A module without ``settings`` becomes its class, attributes, buffers, frozen parameters and
    children.

    Raises:
        SettingsError: the value cannot be identified, such as a lambda, or contains itself.
    """
    try:
        return _described(name, value)
    except RecursionError:
        raise _unidentifiable(re.split(r"[\[. ]", name)[0], "something that contains itself") from None


def _described(name: str, value: object) -> Any:
    """``value`` as plain values that JSON can hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, Tensor)):
        return _array(value)
    if isinstance(value, Mapping):
        return {str(key): described(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((described(name, item) for item in value), key=repr)
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    if isinstance(value, Enum):
        return f"{_qualified(type(value))}.{value.name}"
    if isinstance(value, functools.partial):
        return {
            "is": "functools.partial",
            "calls": described(name, value.func),
            "args": described(name, value.args),
            "keywords": described(name, value.keywords),
        }
    if isinstance(value, type):
        return _qualified(value)
    if inspect.ismethod(value):
        return {"is": value.__name__, "of": described(name, value.__self__)}
    if inspect.isfunction(value):
        return _function(name, value)
    if inspect.isbuiltin(value):
        return _qualified(value)
    if inspect.ismodule(value):
        return value.__name__
    own = getattr(value, "settings", None)
    if isinstance(own, Mapping):
        return {"is": _qualified(type(value)), **described(name, {**own, **_added(value, own)})}
    if isinstance(value, nn.Module):
        return _module(name, value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"is": _qualified(type(value)), **described(name, fields)}
    raise _unidentifiable(name, f"a {type(value).__name__}")


def shown(settings: Mapping[str, Any]) -> str:
    """Settings for a repr: ``name=value`` for each."""
    return ", ".join(f"{name}={_short(value)}" for name, value in settings.items())


def differing(saved: object, own: Mapping[str, Any]) -> str:
    """A sentence on the differences between a saved description and ``own``, by dotted names. It is empty if they are
    equal."""
    words = [f"{name} was {_cut(one)} and is {_cut(other)}".lstrip() for name, one, other in _differences(saved, own)]
    more = f"; and {len(words) - _MOST_SHOWN} more" if len(words) > _MOST_SHOWN else ""
    return "; ".join(words[:_MOST_SHOWN]) + more


def _differences(saved: Any, own: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """The dotted name, the saved value and the own value of each setting that differs."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        was, became = saved.get("is"), own.get("is")
        if not _same(was, became):
            return [(name, was, became)]
        return [
            difference
            for key in sorted({*saved, *own}, key=str)
            for difference in _differences(
                saved.get(key, "absent"), own.get(key, "absent"), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if _same(saved, own) else [(name, saved, own)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other or (one != one and other != other))


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."


def _short(value: Any) -> str:
    """A value for a repr, with arrays as lists of rounded numbers."""
    if isinstance(value, (np.ndarray, Tensor)):
        plain = _array(value)
        return plain if isinstance(plain, str) else repr(_rounded(plain))
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_short, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_short(item)}" for name, item in value.items()) + "}"
    if inspect.isfunction(value):
        return value.__name__
    return " ".join(repr(value).split())


def _rounded(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_rounded(item) for item in plain]
    return float(f"{plain:.6g}") if isinstance(plain, float) else plain


def _array(value: np.ndarray | Tensor) -> Any:
    """The numbers of a small array, or the dtype, shape and digest of a large one."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return f"{value.dtype} {tuple(value.shape)} without values"
        value = value.detach().cpu()
        value = value.to_dense() if value.layout != torch.strided else value
        value = value.float() if value.is_floating_point() and value.itemsize < 4 else value
        value = value.resolve_conj().resolve_neg().numpy()
    if value.dtype.kind == "c":
        return [_array(value.real), _array(value.imag)]
    if value.size <= _LONGEST:
        return value.tolist()
    return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"


def _function(name: str, function: Any) -> Any:
    """The module and name of a function. For a nested or decorated function its defaults and closure are included, as
    far as they can be described."""
    qualified = _qualified(function)
    if "<lambda>" in qualified:
        raise _unidentifiable(name, "a lambda")
    named = "<locals>" not in qualified
    if named and not hasattr(function, "__wrapped__"):
        return qualified
    takes = {}
    for key, item in inspect.getclosurevars(function).nonlocals.items():
        try:
            takes[key] = described(f"{name} (its {key})", item)
        except SettingsError:
            if not named:
                raise
            takes[key] = _qualified(type(item))
    defaults = described(name, [function.__defaults__, function.__kwdefaults__])
    return {"is": qualified, "defaults": defaults, "takes": takes}


def _added(value: object, own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a subclass adds, if it inherits ``settings``."""
    if "settings" in vars(type(value)):
        return {}
    taken = inspect.signature(type(value)).parameters
    return {name: getattr(value, name) for name in taken if name not in own and hasattr(value, name)}


def _module(name: str, module: nn.Module) -> dict[str, Any]:
    """The class, plain attributes, parameters, buffers and children of a module."""
    of_torch = type(module).__module__.startswith("torch.")  # private attributes of torch are not settings
    hidden = vars(nn.Module()).keys()
    plain = {
        key: item for key, item in vars(module).items() if key not in hidden and not (of_torch and key.startswith("_"))
    }
    return {
        "is": _qualified(type(module)),
        **described(name, plain),
        "parameters": {
            key: list(item.shape) if item.requires_grad else _array(item)
            for key, item in module.named_parameters(recurse=False)
        },
        "buffers": {key: _array(item) for key, item in module.named_buffers(recurse=False)},
        "children": {key: described(f"{name}.{key}", item) for key, item in module.named_children()},
    }


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _unidentifiable(name: str, got: str) -> Exception:
    return problem(
        f"{name} must have settings that identify it, so that a run can be resumed",
        got=got,
        fix="Use a function that a module defines, functools.partial of one, or an object with a dict `settings`.",
        error=SettingsError,
    )
