"""The place of a run: device, rank, precision and seed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..._checks import one_of, problem, require, whole
from ...errors import SettingsError

__all__ = ["Precision", "Runtime", "start_runtime"]

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Runtime:
    """The device, rank, precision and seed of a run, made by :func:`start_runtime`.

    Attributes:
        device: the device of this process.
        rank, world: the number of this process, from 0, and the number of processes.
        precision: the precision of the forward pass. It does not affect parameters and sums.
        seed: the seed of all random numbers of a run.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    precision: Precision = "float32"
    seed: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """A context in which matrix products use the precision of the run."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def derive(self, *key: str | int) -> int:
        """A seed that depends only on the run's seed and ``key``, as in ``derive("order", epoch)``.

        >>> Runtime(torch.device("cpu"), seed=1).derive("order", 0)
        954623460253835154
        """
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def generator(self, *key: str | int) -> torch.Generator:
        """A CPU generator seeded by :meth:`derive`."""
        return torch.Generator("cpu").manual_seed(self.derive(*key))

    @contextmanager
    def seeded(self, *key: str | int) -> Iterator[None]:
        """A context in which torch's global random state is seeded by ``key``. It is restored afterwards."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.set_seed(*key)
            yield

    def set_seed(self, *key: str | int) -> None:
        """Seed torch's global random state by ``key``.

        ``torch.manual_seed`` would seed every accelerator. Where none is in use, it would also keep a stack trace per
        call, which takes longer than a step of a small network.
        """
        torch.default_generator.manual_seed(self.derive(*key))
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.derive(*key))

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model for training: wrapped if there are several ranks, else itself."""
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, which must all call this. The input does not change."""
        total = value.clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is true on any rank. All ranks must call this."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks on rank 0, in rank order; an empty list on the others. Tensors must be on the CPU.
        NCCL sends the pickled values by way of the GPU's memory."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world if self.is_main else []
        dist.gather_object(value, values if self.is_main else None)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Broadcast the buffers of rank 0, which DistributedDataParallel does only in training."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def start_runtime(device: str = "auto", precision: Precision = "float32", seed: int = 0) -> Iterator[Runtime]:
    """A context that joins the processes of ``torchrun``, or runs as a single process.

    An existing process group is used and not destroyed at the end.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``, which is CUDA if available. Under torchrun
            ``"cuda"`` is the device with the number LOCAL_RANK.
        precision: ``"bf16"`` runs the forward pass under autocast.
        seed: at least 0.
    Raises:
        ValueError: the precision or the seed is invalid. SettingsError: the device or the precision is not available,
            or torchrun's environment is incomplete or inconsistent.

    >>> with start_runtime("cpu", seed=7) as runtime:
    ...     runtime
    Runtime(device=device(type='cpu'), rank=0, world=1, precision='float32', seed=7)
    """
    one_of("precision", precision, ("float32", "bf16"))
    seed = whole("seed", seed, low=0)
    joined = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (_environment("RANK", 0), _world_size())
    place = chosen_device(device, _environment("LOCAL_RANK", 0))
    if place.type == "cuda":
        torch.cuda.set_device(place)
        computes = precision == "float32" or torch.cuda.is_bf16_supported(including_emulation=False)
        rule, got = "precision bf16 needs a GPU that computes in it", torch.cuda.get_device_name(place)
        require(computes, rule, got=got, fix='Use precision="float32".', error=SettingsError)
    started = world > 1 and not joined
    if started:
        cuda = place.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)
    try:
        yield Runtime(place, rank, world, precision, seed)
    finally:
        if started:
            # Gloo's threads need the interpreter's lock to drop the tensors of finished work, and destroying the group
            # holds this lock while it waits for them. So they get it first.
            time.sleep(0.1)
            dist.destroy_process_group()


def chosen_device(name: str, local_rank: int = 0) -> torch.device:
    """The device with this name."""
    rule = 'device must be "auto", "cpu", "cuda" or "cuda:<number>"'
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise problem(rule, got=repr(name), error=SettingsError) from None
    require(device.type in ("cpu", "cuda"), rule, got=repr(name), error=SettingsError)
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = local_rank if device.index is None else device.index
    rule, got = f"device cuda:{number} must exist on this machine", f"{count} CUDA devices"
    fix = "Start fewer processes." if count else 'Use device="cpu", or a torch built for your GPU.'
    require(number < count, rule, got=got, fix=fix, error=SettingsError)
    return torch.device("cuda", number)


def _world_size() -> int:
    """The number of processes that torchrun started, or 1 without it."""
    world = _environment("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    got, fix = f"no {', '.join(missing)}", "Start with torchrun, or unset WORLD_SIZE."
    rule = f"with WORLD_SIZE={world} the environment must hold all that torchrun sets"
    require(world == 1 or not missing, rule, got=got, fix=fix, error=SettingsError)
    rank, rule = _environment("RANK", 0), "the environment variable RANK must be below WORLD_SIZE"
    got, fix = f"RANK={rank} and WORLD_SIZE={world}", "Start with torchrun, or unset both."
    require(rank < world, rule, got=got, fix=fix, error=SettingsError)  # else no process would be the one that writes
    return world


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    rule = f"the environment variable {name} must be a whole number"
    require(text.isdecimal(), rule, got=repr(text), error=SettingsError)
    return int(text)
