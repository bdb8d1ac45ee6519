"""Sums over the ranks of ``torch.distributed``."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def summed(*sums: Tensor) -> tuple[Tensor, ...]:
    """Each tensor summed over all ranks, which must all call this; as they are outside ``torch.distributed``."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    if dist.get_backend() == "nccl":  # knows no CPU, where a rank without samples has its sums
        sums = tuple(tensor.cuda() for tensor in sums)
    for tensor in sums:
        dist.all_reduce(tensor)
    return sums
