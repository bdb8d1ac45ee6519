"""Checkpoints of tensors and plain values, written atomically and loaded without running code."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import problem, require
from ..._files import write_atomically
from ...errors import CheckpointError
from ..files import unwritable

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a state atomically: readers see either the old or the new file, also after a crash.

    Args:
        state: tensors, None, bool, int, float and str, in dicts (keyed by str or int), lists and tuples of any depth.
    Raises:
        CheckpointError: the state holds other values, such as NumPy numbers, or the disk is full. An earlier file does
            not change. FileNotFoundError: the folder does not exist.
    """
    require(isinstance(state, dict), "state must be a dict", got=type(state), error=CheckpointError)
    check_plain("state", state)
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        # torch replaces the error of the file system by its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        then = "The checkpoint before is intact: continue with --resume."
        raise unwritable(path, cause, kind=CheckpointError, then=then) from error


def load_checkpoint(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint of :func:`save_checkpoint`. Checksums are verified, and no code in the file is run.

    Args:
        map_location: the device of the tensors.
    Raises:
        CheckpointError: the file is missing, damaged or truncated, or holds other values.
    """
    name = repr(os.fspath(path))
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
            whole = not packed and archive.testzip() is None
        # Checked before torch reads the archive: no compression and equal checksums.
        state = torch.load(path, map_location=map_location, weights_only=True) if whole else None
    except FileNotFoundError:
        raise problem("the checkpoint must exist", got=f"no file {name}", error=CheckpointError) from None
    except Exception as error:
        state, reason = None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
    else:
        reason = f"a {type(state).__name__}" if whole else "bytes that have changed since it was written"
    if not isinstance(state, dict):
        rule = f"{name} must be a whole checkpoint of tensors and plain values"
        fix = "Nothing in it was run. Put an intact copy in its place, or start in another folder."
        raise problem(rule, got=reason, fix=fix, error=CheckpointError)
    return state


def check_plain(key: str, value: object) -> None:
    """Raise unless a value can be saved in a checkpoint: tensors and plain values, in dicts, lists and tuples."""
    if value is None or type(value) in (bool, int, float, str, Tensor, nn.Parameter):
        return
    nested, fix = type(value), "Use .item() or .tolist() for NumPy, and state_dict() for modules."
    plain = nested in (dict, OrderedDict, list, tuple)
    require(plain, f"{key} must be a tensor or a plain value", got=nested, fix=fix, error=CheckpointError)
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):  # type: ignore[arg-type]
        rule = f"keys of {key} must be str or int"
        require(type(name) in (str, int), rule, got=repr(name), error=CheckpointError)
        check_plain(f"{key}[{name!r}]", item)
