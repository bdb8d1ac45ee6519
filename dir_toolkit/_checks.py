"""Checks of arguments, and the error messages of the package.

Every message names the function that the user called, the argument, the rule, the value, and what to do.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import EllipsisType, FrameType, FunctionType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ._numerics import readable, wide_dtype
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    DirToolkitWarning,
    LabelError,
    MissingPackageError,
    ShapeError,
    UsageError,
)

MOST_BINS = 10_000_000
MOST_LONG = 2**31 - 1  # the length of any other axis
PLAIN = (torch.float32, torch.float64)
MOST_TAU = 1e30  # its product with any log-share fits into float32

_FLOAT32 = torch.finfo(torch.float32)
_HERE = str(Path(__file__).parent) + os.sep
# Files of frames between the user and this package that belong to neither.
_BETWEEN = (str(Path(torch.__file__).parent) + os.sep, contextlib.__file__, functools.__file__, "<string>")
_OTHERS = ("builtins", "torch", "abc", "typing")  # modules with base classes of our classes

_OURS: dict[type[Exception], type[Exception]] = {
    ValueError: ArgumentError,
    TypeError: ArgumentTypeError,
    ImportError: MissingPackageError,
    RuntimeError: UsageError,
}


def require(
    sound: bool | np.bool_,
    rule: str | Callable[[], str],
    *,
    got: object = None,
    fix: str | Callable[[], str] = "",
    error: type[Exception] | None = None,
) -> None:
    """Raise :func:`problem` unless ``sound``. ``rule``, ``got`` and ``fix`` may be functions, which are called only
    then. Use one if computing the value takes time or reads a device."""
    if not sound:
        raise problem(_value(rule), got=_value(got), fix=_value(fix), error=error)


def _value(words: Any) -> Any:
    return words() if isinstance(words, FunctionType) else words


def problem(
    rule: str, *, got: object = None, fix: str = "", error: type[Exception] | None = None, source: str = ""
) -> Exception:
    """The exception to raise: ``<who>: <rule>, got <got>. <fix>``.

    Args:
        got: the invalid value. A shape, a dtype or a class is written as such.
        error: None means ShapeError for a shape, TypeError for a dtype or a class, and ValueError for the rest.
        source: an invalid file with its line or byte, which replaces ``<who>``. By default it is :func:`caller`.
    """
    if isinstance(got, tuple):
        got, error = f"{'' if 'shape' in rule else 'shape '}{tuple(got)}", error or ShapeError
    elif isinstance(got, (torch.dtype, np.dtype)):
        got, error = f"dtype {got}", error or TypeError
    elif isinstance(got, type):
        got, error = got.__name__, error or TypeError
    sentence = f"{source or caller()[0]}: {rule}"
    if got is not None:
        sentence += f", got {got}"
    sentence += "."
    if fix:
        sentence += f" {fix}"
    error = error or ValueError
    return _OURS.get(error, error)(sentence)


def missing_package(package: str, error: Exception, extra: str = "recipes") -> Exception:
    """The error to raise if the import of an optional package failed, which ``extra`` of this package installs."""
    fix = f'pip install "dir_toolkit[{extra}]"'
    return problem(f"{package} must be installed", got=f"{type(error).__name__}: {error}", fix=fix, error=ImportError)


def caller() -> tuple[str, int]:
    """The name of the function that the user called in this package, and the number of frames to the user's frame.

    Both are read from the stack. A method has its class in its name, as in ``LDS.fit``. Methods that Python or torch
    call, such as ``__init__``, ``forward`` or a hook, have the name of their class.
    """
    name, depth = "dir_toolkit", 0
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_HERE):
            name = _public_name(frame) or name
        elif not code.co_filename.startswith(_BETWEEN):
            break
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return name, depth


# A compiled graph has no stack, so this function runs outside of it.
caller._torchdynamo_disable = True  # type: ignore[attr-defined]
_REFUSED = "dir_toolkit refuses an argument. Call it without torch.compile to read why."
caller._torchdynamo_disable_msg = _REFUSED  # type: ignore[attr-defined]


def _public_name(frame: FrameType) -> str | None:
    """The name that a frame adds to a message, or None for private functions."""
    code = frame.f_code
    first = code.co_varnames[0] if code.co_argcount else ""
    own = frame.f_locals.get(first) if first in ("self", "cls") else None
    if own is None:
        private = Path(code.co_filename).name.startswith("_") or code.co_name.startswith(("_", "<"))
        return None if private else getattr(code, "co_qualname", code.co_name).rpartition("<locals>.")[2]
    kinds = (own if isinstance(own, type) else type(own)).__mro__
    kind = next((k.__name__ for k in kinds if k.__name__[0] != "_" and k.__module__.split(".")[0] not in _OTHERS), None)
    if kind is None:
        return None
    return kind if code.co_name.startswith("_") or code.co_name == "forward" else f"{kind}.{code.co_name}"


def digits(x: float) -> str:
    """A number for a message, with six digits if these are exact, and else with all digits, so that different numbers
    never print the same."""
    x = float(x)
    return short if float(short := f"{x:g}") == x or x != x else repr(x).removesuffix(".0")


def warn(message: str) -> None:
    """Issue a :class:`DirToolkitWarning`. Callers make sure that it is issued once."""
    name, depth = caller()
    warnings.warn(f"{name}: {message}", DirToolkitWarning, stacklevel=depth + 1)


def instance(kind: Any, fix: str = "", /, **values: object) -> None:
    """Raise unless every value is an instance of ``kind``, a class or a tuple of classes."""
    for name, value in values.items():
        if not isinstance(value, kind):
            kinds = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            with_article = [f"{'an' if k[0] in 'AEIOaeio' or k.isupper() else 'a'} {k}" for k in kinds]  # an LDS
            rule = f"{name} must be {' or '.join(with_article)}"
            raise problem(rule, got=type(value), fix=fix)


def is_tensor(**tensors: object) -> None:
    """Raise unless each value is a dense ``torch.Tensor``."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            array = f"{name}.to_numpy()" if hasattr(value, "to_numpy") else name
            rule, fix = f"{name} must be a torch.Tensor", f"Use torch.as_tensor({array})."
            if isinstance(getattr(value, name, None), Tensor):  # such as the scores of an output
                fix = f"Use output.{name}."
            raise problem(rule, got=type(value), fix=fix)
        if value.is_nested:
            got, fix = "a nested tensor", f"Use torch.cat({name}.unbind())."
            raise problem(f"{name} must be one dense tensor", got=got, fix=fix, error=TypeError)
        if value.layout != torch.strided:
            rule, fix = f"{name} must be dense", f"Use {name}.to_dense()."
            raise problem(rule, got=str(value.layout), fix=fix, error=TypeError)
        if value.is_quantized:
            raise problem(f"{name} must not be quantized", got=value.dtype, fix=f"Use {name}.dequantize().")


def alike(first: object, *others: object) -> bool:
    """Whether these are dense tensors of float32 or float64, not empty, and all of one dtype, shape and device, so that
    checks with detailed messages can be skipped."""
    if not (is_plain(first) and first.dtype in PLAIN and first.numel()):
        return False
    dtype, shape, device = first.dtype, first.shape, first.device
    for other in others:
        if not (is_plain(other) and other.dtype == dtype and other.shape == shape and other.device == device):
            return False
    return True


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether this is a dense tensor, which may be quantized."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def on_one_device(**tensors: Tensor) -> None:
    """Raise if a tensor is distributed over devices, such as a DTensor."""
    for name, value in tensors.items():
        if is_distributed(value):
            got, fix = f"a {type(value).__name__}", f"Use {name}.to_local(), or {name}.full_tensor()."
            raise problem(f"{name} must be a plain tensor", got=got, fix=fix, error=TypeError)


def is_distributed(value: Tensor) -> bool:
    """Whether a tensor is distributed over devices, such as a DTensor."""
    return type(value) not in (Tensor, nn.Parameter) and hasattr(value, "full_tensor")


def gathered(module: nn.Module) -> None:
    """Raise if a parameter of a module is sharded. FSDP2 gathers parameters only while their module runs."""
    for name, value in module.named_parameters():
        if is_distributed(value):
            rule, got = f"parameters must be gathered, also {name}", f"a {type(value).__name__}"
            fix = "Call fully_shard on the backbone and on the model, not on its head, and "
            fix += "register_fsdp_forward_method(model, name) for methods besides forward."
            raise problem(rule, got=got, fix=fix, error=RuntimeError)


def on_host(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU, detached."""
    if tensor.is_meta:
        raise no_values(name)
    return tensor.detach().cpu()


def no_values(name: str) -> Exception:
    """The error for a meta tensor whose values are needed."""
    rule, got = f"{name} must hold values", "a tensor on the meta device"
    return problem(rule, got=got, fix="Load or compute it first.")


def real(**tensors: Tensor) -> None:
    """Raise unless all are tensors of integers or floats."""
    is_tensor(**tensors)
    for name, value in tensors.items():
        if value.is_complex() or value.dtype == torch.bool:
            fix = "" if value.is_complex() else f"Use {name}.float()."
            rule = f"{name} must be integers or floats"
            raise problem(rule, got=value.dtype, fix=fix)


def floats(**tensors: Tensor) -> None:
    """Raise unless all are tensors with a floating-point dtype."""
    is_tensor(**tensors)
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise problem(f"{name} must be floats", got=value.dtype)


def integers(**tensors: Tensor) -> None:
    """Raise unless all are tensors of integers."""
    is_tensor(**tensors)
    for name, value in tensors.items():
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            fix = f"Use {name}.long()." if value.is_floating_point() else ""
            raise problem(f"{name} must be integers", got=value.dtype, fix=fix)


def same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors are on the device of the first."""
    names, devices = list(tensors), [t.device for t in tensors.values()]
    for name, device in zip(names[1:], devices[1:], strict=True):
        if device != devices[0]:
            got, fix = f"{devices[0]} and {device}", f"Use {name}.to({names[0]}.device)."
            raise problem(f"{names[0]} and {name} must be on the same device", got=got, fix=fix)


def same_shape(**tensors: Tensor) -> None:
    """Raise unless all shapes are equal. The advice covers the usual cause, an extra axis of length one."""
    names, shapes = list(tensors), [tuple(t.shape) for t in tensors.values()]
    for name, shape in zip(names[1:], shapes[1:], strict=True):
        if shape == shapes[0]:
            continue
        fix = "Labels are never broadcast: bring both to one shape."
        if shapes[0] == (*shape, 1):
            fix = f"Use {names[0]}.squeeze({len(shape)})."
        elif shape == (*shapes[0], 1):
            fix = f"Use {name}.squeeze({len(shapes[0])})."
        rule = f"{names[0]} and {name} must have the same shape"
        raise problem(rule, got=f"{shapes[0]} and {shape}", fix=fix, error=ShapeError)


def shaped(expected: Sequence[Any], meaning: str = "", **arrays: Any) -> None:
    """Raise unless all arrays have this shape. A letter in it allows any length, and three dots any leading axes.
    ``meaning`` describes the values, as in "one per sample"."""
    expected = tuple(expected)
    open_front = len(expected) > 0 and isinstance(expected[0], EllipsisType)
    last = expected[1:] if open_front else expected
    for name, array in arrays.items():
        have = tuple(array.shape)
        tail = have[-len(last) :] if open_front else have
        if len(tail) != len(last) or any(not isinstance(e, str) and h != e for h, e in zip(tail, last, strict=True)):
            shown = str(expected).replace("'", "").replace("Ellipsis", "...")
            stray = len(have) == len(expected) + 1 and have[-1] == 1
            fix = f"Use {name}.squeeze({len(expected)})." if stray else ""
            raise problem(f"{name} must be {shown}" + f", {meaning}" * bool(meaning), got=have, fix=fix)


def one_per_sample(name: str, samples: Tensor, **values: object) -> None:
    """Raise unless all values are tensors (N,) on the device of the samples (N, ...), whose name is ``name``."""
    is_tensor(**values)
    shaped(samples.shape[:1], "one per sample", **values)
    for value_name, value in values.items():
        same_device(**{name: samples, value_name: value})  # type: ignore[arg-type]


def same_bins(name: str, part: Any, bins: Any, *, error: type[Exception] = ValueError) -> None:
    """Raise unless ``part``, which is bins or has bins, such as a density, has these bins."""
    if (own := getattr(part, "bins", part)) != bins:
        raise problem(f"{name} must be over the same bins", got=f"{own} for {bins}", error=error)


def not_empty(**arrays: Any) -> None:
    """Raise unless each array holds at least one value."""
    for name, value in arrays.items():
        if math.prod(value.shape) == 0:
            raise problem(f"{name} must hold at least one value", got=tuple(value.shape))


def finite(**tensors: Tensor | np.ndarray) -> None:
    """Raise at NaN or infinity, with the index of the first. Tensors on an accelerator are not checked."""
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            if not readable(value):
                continue
            value = (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy(force=True)
        sound = np.isfinite(value)
        if np.count_nonzero(sound) < sound.size:
            bad = ~sound
            first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
            got = f"{value[first]} at index {list(first)} ({int(bad.sum())} such values)"
            raise problem(f"{name} must be finite", got=got, fix="Remove or repair these samples first.")


def no_bad(rule: str, values: Tensor, bad: Tensor, *, fix: str = "") -> None:
    """Raise if a value is bad, with the index of the first. Tensors on an accelerator are not checked."""
    if readable(values) and bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        got = f"{values[tuple(first)].item():g} at index {first} ({int(bad.sum())} such values)"
        raise problem(rule, got=got, fix=fix)


def not_negative(**tensors: Tensor) -> None:
    """Raise if a value is below zero. Tensors on an accelerator are not checked."""
    for name, value in tensors.items():
        value = value.float() if value.is_floating_point() and value.itemsize < 4 else value
        if not (value.dtype.is_signed and readable(value) and value.numel()) or value.min().item() >= 0:
            continue
        if bool((value < 0).any()):  # not so if there is only NaN
            raise problem(f"{name} must not be negative", got=f"a minimum of {digits(value.min().item())}")


def class_indices(name: str, index: Tensor, num_classes: int) -> None:
    """Raise unless ``index`` is int64 from 0 to ``num_classes`` - 1. Tensors on an accelerator are not checked."""
    if index.dtype != torch.int64:
        fix = f"Use {name}.long()."
        raise problem(f"{name} must hold class indices as int64", got=index.dtype, fix=fix)
    classes_exist(name, index, num_classes)


def classes_exist(name: str, index: Tensor, num_classes: int) -> None:
    """Raise unless integers (N,) are from 0 to ``num_classes`` - 1. Tensors on an accelerator are not checked."""
    if readable(index) and index.numel():
        least, most = index.aminmax()
        if not 0 <= int(least) <= int(most) < num_classes:
            bad = (index < 0) | (index >= num_classes)
            first = int(bad.to(torch.uint8).argmax())
            rule = f"{name} must hold class indices from 0 to {num_classes - 1}"
            got = f"{int(index[first])} at index [{first}] ({int(bad.sum())} such values)"
            raise label_problem(rule, got=got, fix="Count classes from zero, and give the model one output for each.")


def distributions(*, zeros: bool = False, **values: Tensor) -> None:
    """Raise unless floats (..., B) are >= 0 and sum to one along the last axis, up to rounding. With ``zeros`` a row
    may also be all zeros. Tensors on an accelerator are not checked."""
    for name, value in values.items():
        if not readable(value) or value.numel() == 0 or all_distributions(value):
            continue
        shares = value.detach().to(wide_dtype(value))
        total = shares.sum(-1)
        sound = (total - 1).abs() <= _slack(value)
        if not (bool(sound.all()) or (zeros and bool((sound | (shares == 0).all(-1)).all()))):
            finite(**{name: shares})
            got = f"sums from {total.min().item():g} to {total.max().item():g}"
            fix = "Apply softmax to logits, or take the distribution of a model's output."
            raise problem(f"{name} must sum to one along the last axis", got=got, fix=fix)
        not_negative(**{name: shares})


def all_distributions(values: Tensor) -> bool:
    """Whether it is clear that values (..., B), not empty, are distributions without rows of zeros. It is faster than
    :func:`distributions`, and False for sums at the very bound and for values on an accelerator."""
    if not readable(values):
        return False
    shares, slack = values.detach().to(wide_dtype(values)), _slack(values)
    least, most = shares.sum(-1).aminmax()
    return 1 - slack <= least.item() and most.item() <= 1 + slack and shares.amin().item() >= 0


def _slack(shares: Tensor) -> float:
    """The rounding error of a sum of shares."""
    return 1e-3 if shares.itemsize >= 4 else 1e-2


def positive_classes(name: str, values: Tensor, *, zeros: bool, fix: str = "") -> None:
    """Raise unless values (C,) on the CPU are positive, or with ``zeros`` not negative."""
    bad = values < 0 if zeros else values <= 0
    if bool(bad.any()):
        first = int(bad.to(torch.uint8).argmax())
        rule = f"{name} must not be negative" if zeros else f"{name} must be positive"
        raise problem(rule, got=f"{values[first].item():g} for class {first}", fix=fix)


def prior_shares(name: str, prior: Tensor, *, zeros: bool = False) -> None:
    """Raise unless a prior is positive, or with ``zeros`` not negative, and sums to one. Tensors on an accelerator are
    not checked."""
    if not readable(prior):
        return
    total = prior.sum(dtype=torch.float64).item()
    if prior.numel() and prior.min().item() > 0 and abs(total - 1) <= 1e-4:  # so that all are finite
        return
    finite(**{name: prior})
    fix = f"Use dt.class_prior(counts{', floor=0' if zeros else ''}), which floors counts and divides by their sum."
    positive_classes(name, prior, zeros=zeros, fix=fix)
    if abs(total - 1) > 1e-4:
        raise problem(f"{name} must sum to one", got=f"a sum of {digits(total)}", fix=fix)


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    float32: bool = False,
) -> float:
    """A checked finite number between ``low`` and ``high``. With ``float32`` it must be zero or a normal float32."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise problem(f"{name} must be a number", got=repr(value), error=TypeError)
    try:
        x = float(value)
    except OverflowError:
        raise problem(f"{name} must fit into float64", got=f"a larger {type(value).__name__}") from None
    below = x <= low if open_low else x < low
    above = x >= high if open_high else x > high
    if not math.isfinite(x) or below or above:
        left = "" if low == -math.inf else f" {'>' if open_low else '>='} {digits(low)}"
        right = "" if high == math.inf else f" {'<' if open_high else '<='} {digits(high)}"
        rule = " and".join(part for part in (left, right) if part) or " finite"
        raise problem(f"{name} must be{rule}", got=repr(value))
    if float32 and x != 0 and not _FLOAT32.tiny <= abs(x) <= _FLOAT32.max:
        rule = f"{name} must fit into float32, from {_FLOAT32.tiny:.2g} to {_FLOAT32.max:.2g} in size"
        raise problem(rule, got=repr(value))
    return x


def checked_tau(tau: object) -> float:
    """A checked tau, the strength of an adjustment by a prior."""
    return number("tau", tau, low=0, high=MOST_TAU)


def whole(name: str, value: object, *, low: int | None = None, high: int | None = None, fix: str = "") -> int:
    """A checked whole number from ``low`` to ``high``. ``fix`` is the advice if it is too high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise problem(f"{name} must be a whole number", got=repr(value), error=TypeError)
    number = int(value)
    if low is not None and number < low:
        raise problem(f"{name} must be at least {low}", got=_shown(value))
    if high is not None and number > high:
        raise problem(f"{name} must be at most {high:,}", got=_shown(value), fix=fix)
    return number


def length(name: str, value: object, *, most: int = MOST_LONG) -> int:
    """A checked length of an axis, from 1 to ``most``."""
    return whole(name, value, low=1, high=most)


def _shown(value: object) -> str:
    """``repr``, except for very large whole numbers, some of which Python cannot print."""
    bits = value.bit_length() if isinstance(value, int) else 0
    return repr(value) if bits <= 64 else f"a whole number of {bits:,} bits"


def one_of(name: str, value: object, allowed: Collection[str], *, fix: str = "") -> None:
    """Raise unless ``value`` is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise problem(f"{name} must be one of {listed}", got=repr(value), fix=fix)


def drop_alike(name: str, part: Any, owner: str, **of_owner: str) -> None:
    """Raise if the owner drops labels, by ``missing="drop"`` or ``outside="drop"``, that this part does not."""
    for what, word in of_owner.items():
        own = getattr(part, what)
        require(word != "drop" or own == "drop", f'{name} must have {what}="drop", as the {owner} has', got=repr(own))


def word(name: str, value: object, *allowed: str, fix: str = "") -> None:
    """Raise if ``value`` is a str but none of the allowed words. Other types pass."""
    if isinstance(value, str):
        one_of(name, value, allowed, fix=fix)


def interval(name: str, value: object, *, low: float = 0.0) -> tuple[float, float]:
    """A checked pair ``(a, b)`` with ``low <= a < b``."""
    rule = f"{name} must be a pair (low, high) with {digits(low)} <= low < high"
    try:
        pair: tuple[Any, ...] = tuple(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pair = ()
    real_pair = len(pair) == 2 and all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in pair)
    if not real_pair or not low <= pair[0] < pair[1]:
        raise problem(rule, got=repr(value))
    return float(pair[0]), float(pair[1])


def keys(name: str, value: object, expected: Collection[str], *, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` unless ``value`` is a mapping with exactly the expected keys."""
    if not isinstance(value, Mapping):
        raise problem(f"{name} must be a dict", got=type(value))
    missing, extra = sorted(set(expected) - set(value)), sorted(set(value) - set(expected), key=str)
    if missing or extra:
        got = f"missing {missing}, unknown {extra}"
        raise problem(f"{name} must have the keys {sorted(expected)}", got=got, error=error)


def labels_array(labels: object, name: str = "labels") -> np.ndarray:
    """Labels, or values called ``name``, as a NumPy array of integers or floats that torch can convert."""
    labels = without_tensors(labels, name)
    try:
        array = np.asarray(labels)
    except ValueError:
        raise problem(f"{name} must form one array of numbers", got="rows of different lengths") from None
    except (TypeError, RuntimeError):  # from an object that claims to be an array
        rule, got = f"{name} must form one array of numbers", type(labels).__name__
        raise problem(rule, got=got, fix="Pass its values.", error=TypeError) from None
    if array.dtype.kind not in "iuf":
        got = type(labels).__name__ if array.shape == () and array.dtype == object else f"dtype {array.dtype}"
        fix = f"Use numpy.asarray({name}, dtype=float), if they stand for numbers."
        raise problem(f"{name} must be integers or floats", got=got, fix=fix, error=TypeError)
    # Torch supports neither big-endian numbers, as in NetCDF and FITS files, nor floats of 80 bits.
    return array.astype(np.float64 if array.itemsize > 8 else array.dtype.newbyteorder("="), copy=False)


def as_tensors(**values: Any) -> tuple[Tensor, ...]:
    """Tensors unchanged, and other arrays of numbers (:func:`labels_array`) as tensors on the CPU."""
    arrays = (value if isinstance(value, Tensor) else labels_array(value, name) for name, value in values.items())
    return tuple(value if isinstance(value, Tensor) else torch.from_numpy(value.copy()) for value in arrays)


def without_tensors(labels: Any, name: str) -> Any:
    """Labels with tensors, also in lists, converted to arrays. Raises at masked values."""
    if isinstance(labels, Tensor):
        is_tensor(**{name: labels})
        on_one_device(**{name: labels})
        labels = on_host(name, labels)
        return (labels.float() if labels.is_floating_point() and labels.itemsize < 4 else labels).numpy(force=True)
    if isinstance(labels, (list, tuple)):
        kinds = set(map(type, labels))
        if any(issubclass(kind, (Tensor, list, tuple, np.ndarray)) for kind in kinds):
            return [without_tensors(item, name) for item in labels]
    if np.ma.is_masked(labels):
        raise problem(f"{name} must not be masked", got="masked values", fix=f"Use {name}.compressed().")
    return labels


def scalar(name: str, value: Any) -> Any:
    """The number in a tensor or array without dimensions, in its own precision."""
    if isinstance(value, (bool, numbers.Real)) or getattr(value, "ndim", None) != 0:
        return value
    return labels_array(value, name)[()]


def label_problem(rule: str, *, got: object, fix: str = "") -> Exception:
    """The :class:`LabelError` of a label that is not finite or lies outside its axis."""
    return problem(rule, got=got, fix=fix, error=LabelError)
