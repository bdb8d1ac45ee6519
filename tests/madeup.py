"""A device made up in Python: its numbers are computed by the CPU, and it is as strict as an accelerator.

Tensors of the device and of the CPU do not mix, NumPy cannot read them, and nothing looks at their values without a
copy. So the tests for accelerators run where there is none, with numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor

NAME = "madeup"
EXISTS = hasattr(registration, "_setup_privateuseone_for_python_backend")  # not before torch 2.10
_COPIES = {"aten::_copy_from", "aten::_copy_from_and_resize"}
_INDEXES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
_kept: list[Any] = []  # what lives until the process ends, the memory of all tensors among it


def start() -> None:
    """Register the device, for the rest of the process."""
    registration._DummyBackendModule.get_amp_supported_dtype = lambda self: [torch.bfloat16, torch.float16]
    registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    for name in ("convolution_overrideable", "convolution_backward_overrideable"):
        own.impl(name, partial(_compute, getattr(torch.ops.aten, name).default), "PrivateUse1")
    _kept.extend([library, own])
    of_others = torch.UntypedStorage.clone

    def clone(self: Any) -> Any:  # which would take memory that Python cannot fill
        if self.device.type != NAME:
            return of_others(self)
        _kept.append(copied := _storage(self, "cpu").clone())
        return _storage(copied, f"{NAME}:0")

    torch.UntypedStorage.clone = clone


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operation: on the CPU, on the same memory."""
    name, theirs = op._schema.name, {}

    def to_host(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(to_host, value))
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{name}: a generator of {value.device.type} for a device of another kind")
        if isinstance(value, torch.UntypedStorage):
            return _storage(value, "cpu")
        if not isinstance(value, Tensor):
            return value
        if value.device.type == NAME:
            host = _host(value)
            theirs[id(host)] = (value, host)
            return host
        if value.ndim and name not in _COPIES | _INDEXES:  # CUDA, too, takes indices from the CPU
            raise RuntimeError(f"{name}: two devices in one operation, {NAME} and {value.device.type}")
        return value

    def to_device(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(to_device, value))
        if not isinstance(value, Tensor):
            return value
        return theirs[id(value)][0] if id(value) in theirs else _device(value)

    given, named = to_host(args), {key: to_host(value) for key, value in kwargs.items()}
    if name in _COPIES:
        source, target = given[:2]
        (target.resize_(source.shape) if "resize" in name else target).copy_(source)
        return args[1]
    if name == "aten::_local_scalar_dense":
        return given[0].item()
    if name == "aten::convolution_overrideable":
        op = torch.ops.aten.convolution.default
    elif name == "aten::convolution_backward_overrideable":
        op, rest, sizes = torch.ops.aten.convolution_backward.default, given[3:-1], [given[0].shape[1]]
        given = (*given[:3], sizes, *rest, given[-1])
    result = op(*given, **named)
    for own, host in theirs.values():
        memory = own.untyped_storage().data_ptr() != host.untyped_storage().data_ptr()
        if memory or own.shape != host.shape or own.stride() != host.stride():
            _fill(own, host)
    return to_device(result)


def _host(tensor: Tensor) -> Tensor:
    """The CPU's view of a tensor of the device."""
    storage = tensor.untyped_storage()
    host = torch.empty(0, dtype=tensor.dtype, device="cpu")
    if storage.nbytes():
        host.set_(_storage(storage, "cpu"), tensor.storage_offset(), tensor.size(), tensor.stride())
        return host
    return host.new_empty(0).as_strided(tensor.size(), tensor.stride())


def _device(host: Tensor) -> Tensor:
    """A tensor of the device with the memory of one of the CPU."""
    return _fill(torch._C._acc.create_empty_tensor((0,), host.dtype), host)


def _fill(tensor: Tensor, host: Tensor) -> Tensor:
    _kept.append(host)
    own = _storage(host.untyped_storage(), f"{NAME}:0")
    op, keys = torch.ops.aten.set_.source_Storage_storage_offset, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return op.redispatch(keys, tensor, own, host.storage_offset(), host.size(), host.stride())


def _storage(storage: Any, kind: str) -> Any:
    return torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device(kind), storage.nbytes())
