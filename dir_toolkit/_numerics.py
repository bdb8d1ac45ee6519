"""Numerical helpers for the whole package, and properties of tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
# Looked up once, since every check calls them.
_transform, _mode = torch._C._functorch.peek_interpreter_stack, torch._C._get_dispatch_mode
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without blocking an accelerator or breaking a compiled graph."""
    return tensor.is_cpu and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether values can be read at all, if necessary by waiting for an accelerator.

    They cannot in compiled graphs, under ``torch.func`` and make_fx, in fake mode, and on the meta device.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in _PLAIN
        and not tensor.is_meta
        and _transform() is None
        and _mode(_FAKE) is None
        and _mode(_PROXY) is None
    )


def strict_fake_mode() -> bool:
    """Whether fake mode is on and does not allow real tensors."""
    mode = _mode(_FAKE)
    return mode is not None and not mode.allow_non_fake_inputs


def is_wrapped(tensor: Tensor) -> bool:
    """Whether ``torch.func`` has wrapped a tensor. It is False in compiled graphs."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def keepable(tensor: Tensor) -> bool:
    """Whether a tensor may be cached. Subclasses, such as fake and distributed tensors, wrapped tensors and inference
    tensors may not."""
    return type(tensor) in _PLAIN and not is_wrapped(tensor) and not tensor.is_inference()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if any tensor has it, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def default_dtype() -> torch.dtype:
    """torch's default dtype, or float32 if that is narrower. Buffers are made in it, as casts keep them."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def mean_under(shares: Tensor, values: Tensor) -> Tensor:
    """The mean of values (B,) under distributions (..., B)."""
    # Not a matrix product, which autocast would compute in half precision. Far from zero a rounding error in the sum of
    # shares would move the mean by many of its digits.
    return (shares * values).sum(-1) / shares.sum(-1)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) scaled to length one. A row shorter than 1e-12 becomes zero, with zero gradient."""
    # Dividing by the largest number first avoids overflow of squares. The result does not depend on it.
    size = rows.detach().abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows / size
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    there = norm * size > 1e-12
    return rows * torch.where(there, 1 / torch.where(there, norm, 1.0), 0.0)


def squared_distances(features: Tensor, points: Tensor) -> Tensor:
    """Squared Euclidean distances (N, P) of features (N, D) to points (P, D), by one matrix product."""
    partial = torch.addmm(points.square().sum(1), features, points.t(), alpha=-2)
    return (partial + features.square().sum(1, keepdim=True)).clamp_min(0)


def confidence_edges(num_bins: int, device: torch.device | str = "cpu") -> Tensor:
    """Edges of confidence bins of equal width: (num_bins + 1,) float64."""
    return torch.arange(num_bins + 1, dtype=torch.float64, device=device) / num_bins


def confidence_bin(probabilities: Tensor, edges: Tensor) -> Tensor:
    """The confidence bin of each probability. The upper edge of a bin belongs to it."""
    p = probabilities.detach()
    p = p if p.is_floating_point() else p.double()
    edges = edges.to(p.dtype).to(p.device)
    if (
        p.itemsize < 4
    ):  # both sides are rounded in the same way, and widened, since few operations support half precision
        p, edges = p.float(), edges.float()
    return (torch.searchsorted(edges, p.contiguous()) - 1).clamp(0, len(edges) - 2)
