"""Sums over the ranks of ``torch.distributed``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import require

_OF_THE_HOST = ("gloo", "mpi", "ucc")  # backends for tensors on the CPU


def is_parallel() -> bool:
    """Whether ``torch.distributed`` is in use."""
    return dist.is_available() and dist.is_initialized()


def check_group(group: object) -> None:
    """Raise unless ``group`` is a process group that this rank is in, or None for all ranks."""
    sound = group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup))
    rule = "group must be a torch.distributed.ProcessGroup that this rank is in, or None"
    require(sound, rule, got=repr(group), error=TypeError)


def reduce_device(like: Tensor, group: dist.ProcessGroup | None = None) -> torch.device:
    """The device on which the ranks of a group (None: all ranks) sum tensors like ``like``.

    Its type is the same on each rank: the accelerator if the group has a backend for it, such as NCCL, else the CPU. On
    an accelerator it is the device of ``like`` if that is on it, else the device of the group, else the current device.
    """
    kind = _accelerator()
    backends = dict(pair.split(":", 1) for pair in dist.get_backend_config(group).lower().split(",") if ":" in pair)
    if kind is None or backends.get(kind, "gloo") in _OF_THE_HOST:
        return torch.device("cpu")
    if like.device.type == kind:
        return like.device
    bound = (group or dist.group.WORLD).bound_device_id  # type: ignore[union-attr]
    return bound or torch.device(kind, getattr(torch, kind).current_device())


@torch.inference_mode(False)  # sums are updated in place later
def summed(*sums: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Each tensor summed over the ranks of a group (None: all ranks), on its own device. All these ranks must call
    this. Outside ``torch.distributed`` the tensors are returned."""
    if not is_parallel():
        return sums
    totals = [tensor.to(reduce_device(tensor, group), copy=True) for tensor in sums]
    for total in totals:
        dist.all_reduce(total, group=group)
    return tuple(total.to(tensor.device) for total, tensor in zip(totals, sums, strict=True))


def _accelerator() -> str | None:
    """The device type of this process's accelerator, or None."""
    if not hasattr(torch, "accelerator"):  # torch 2.4 and 2.5
        return "cuda" if torch.cuda.is_available() else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else device.type
