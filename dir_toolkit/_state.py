"""The extra state of modules as one tensor of bytes, since much code that saves models handles only tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import problem, require
from ._settings import shown
from .errors import CheckpointError

_FORMAT = 1
_TENSOR, _TUPLE = "tensor", "tuple"  # keys of the dicts that encode a tensor or a tuple in the header
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16,
           torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}  # fmt: skip


def pack(state: dict[str, Any]) -> Tensor:
    """Encode plain values and tensors, in dicts with str keys, lists and tuples, as (n,) uint8 on the CPU.

    The length depends on plain values and on the shapes of tensors. Put values that change in training into tensors,
    since averaging models needs constant shapes.
    """
    parts: list[bytes] = []
    header = {"format": _FORMAT, "state": _encoded(state, parts)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    blob = b"".join([len(text).to_bytes(8, "little"), text, *parts])
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def unpack(packed: object) -> dict[str, Any]:
    """Decode the state from :func:`pack`. No code in it is run.

    Raises:
        CheckpointError: the bytes are damaged, truncated or of another format.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.ndim != 1 or packed.is_meta:
        got = f"{packed.dtype} of shape {tuple(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        raise _damaged(got)
    blob = packed.detach().cpu().contiguous().numpy().tobytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    try:
        header = json.loads(blob[8:start])
        version, state = header["format"], header["state"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged("a header that cannot be read") from None
    rule, fix = f"the saved state must be of format {_FORMAT}", "Load it with the release of dir_toolkit that saved it."
    require(version == _FORMAT, rule, got=f"format {version!r}", fix=fix, error=CheckpointError)
    try:
        decoded = _decoded(state, BytesIO(blob[start:]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(str(error)) from None
    if not isinstance(decoded, dict):
        raise _damaged(type(decoded).__name__)
    return decoded


@contextmanager
def whole_or_not_at_all(*modules: nn.Module) -> Iterator[None]:
    """A context for loading states into modules. If it raises, the modules do not change. It holds their tensors
    twice."""
    parts = [part for module in modules for part in module.modules()]
    attributes = [
        (part, {**vars(part), "_parameters": {**part._parameters}, "_buffers": {**part._buffers}}) for part in parts
    ]
    tensors = {id(x): x for part in parts for x in (*part._parameters.values(), *part._buffers.values())}
    copies = [(x, x.detach().clone()) for x in tensors.values() if x is not None and not nn.parameter.is_lazy(x)]
    try:
        yield
    except BaseException:
        for part, before in attributes:
            vars(part).clear()
            vars(part).update(before)
        for x, value in copies:
            with torch.inference_mode(x.is_inference()), torch.no_grad():
                x.copy_(value)
        raise


class SoundModule(nn.Module):
    """A module that does not change if ``load_state_dict`` raises, where torch would leave it partly loaded. It can be
    trained after it was moved or cast in inference mode. Its repr shows its ``settings``, if it has them."""

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        with whole_or_not_at_all(self):
            return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        return shown(getattr(self, "settings", {}))


class WideBuffers(nn.Module):
    """A module whose own buffers are not rounded where it is cast to half precision."""

    _bytes_kept = 4  # per number; a dtype with fewer is not taken, unless the buffer had it before

    @torch.inference_mode(False)  # buffers must be usable in training
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.itemsize < min(self._bytes_kept, old.itemsize):
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(new.device, copy=old.is_inference())
        return self


class Float64Module(SoundModule):
    """A module whose buffers follow ``.to(device)`` but stay float64 when the module is cast."""

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, buffer in self._buffers.items():
            assert buffer is not None
            own = fn(buffer).to(buffer.dtype) if buffer.is_meta else buffer.to(fn(buffer[:0]).device)
            self._buffers[name] = own
        for child in self.children():
            child._apply(fn)
        return self


def _encoded(value: Any, parts: list[bytes]) -> Any:
    """``value`` for the header, where each tensor is replaced by its place in ``parts``."""
    if isinstance(value, np.generic):
        value = value.item()
    elif hasattr(value, "__array__") and not isinstance(value, Tensor):  # such as a column of pandas
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))  # a copy, since the array may be read-only
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        name = str(value.dtype).removeprefix("torch.")
        start = sum(map(len, parts))
        parts.append(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        return {_TENSOR: [name, list(value.shape), start]}
    if isinstance(value, dict):
        assert not {_TENSOR, _TUPLE} & value.keys()
        return {key: _encoded(item, parts) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(item, parts) for item in value]}
    if isinstance(value, list):
        return [_encoded(item, parts) for item in value]
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return value


def _decoded(value: Any, blob: BytesIO) -> Any:
    """The inverse of :func:`_encoded`, for the bytes of all parts. Each byte is read once, in order, so that no more
    memory is taken than these bytes have."""
    if isinstance(value, dict) and value.keys() == {_TENSOR}:
        name, shape, start = value[_TENSOR]
        dtype = _DTYPES[name]
        if not all(isinstance(size, int) and size >= 0 for size in (*shape, start)):
            raise ValueError("a tensor of no shape")
        numbers = math.prod(shape)
        if start != blob.tell():
            raise ValueError("tensors that overlap")
        part = bytearray(blob.read(size := numbers * dtype.itemsize))
        if len(part) < size:
            raise ValueError("bytes that end too early")
        return torch.frombuffer(part, dtype=dtype).reshape(shape) if numbers else torch.empty(shape, dtype=dtype)
    if isinstance(value, dict) and value.keys() == {_TUPLE}:
        return tuple(_decoded(item, blob) for item in value[_TUPLE])
    if isinstance(value, dict):
        return {key: _decoded(item, blob) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item, blob) for item in value]
    return value


def _damaged(got: str) -> Exception:
    rule = "the saved state must be the bytes from state_dict()"
    return problem(rule, got=got, fix="Load an intact copy.", error=CheckpointError)
