"""Predictions over batches, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._checks import finite, require
from ..errors import ShapeError
from .readouts import LongTailOutput

if TYPE_CHECKING:
    import xarray as xr

    from .model import LongTailModel

T = TypeVar("T")


def predict(model: LongTailModel, inputs: Any, level: float | None) -> xr.Dataset:
    ends = level is not None or model.readout.has_interval
    return table(model, read_batches(model, inputs, lambda output, _: columns(model, output, level, ends)), level)


def columns(model: LongTailModel, output: LongTailOutput, level: float | None, ends: bool) -> list[np.ndarray]:
    """The predictions of a batch and, with ``ends``, the ends of their intervals."""
    finite(predictions=output.prediction.cpu())
    parts = [output.prediction, *(model.interval(output, level) if ends else ())]
    return [column.cpu().numpy() for column in parts]


def table(model: LongTailModel, batches: Sequence[list[np.ndarray]], level: float | None) -> xr.Dataset:
    """The :func:`columns` of all batches, with the region of each prediction if there is a density."""
    import xarray as xr

    shapes = {part[0].shape[1:] for part in batches}
    rule, fix = "batches must have as many steps each", "Pad sequences to one length."
    require(len(shapes) == 1, rule, got=lambda: ", ".join(map(str, sorted(shapes))), fix=fix, error=ShapeError)
    whole = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    names = ("prediction", "lower", "upper")[: len(whole)]
    dims = ("sample", "step", *(f"axis_{k}" for k in range(2, whole[0].ndim)))[: whole[0].ndim]
    made = xr.Dataset({name: (dims, column) for name, column in zip(names, whole, strict=True)})
    for name in names[1:]:
        made[name].attrs["interval_level"] = level or model.readout.intervals.exact_level or 0.9
    if model.density is not None:
        row = model.bins.index(whole[0], "clip", name="predictions")
        made["region"] = (dims, model.density.regions()[row])
    return made


@torch.no_grad()
def read_batches(
    model: nn.Module, batches: Any, read: Callable[[LongTailOutput, Any], T], *, labelled: bool = False
) -> list[T]:
    """The results of ``read`` on the output and the labels of each batch. The model runs in eval mode, on its own
    device, and modes are restored.

    Args:
        batches: an iterable of inputs, of one-element lists of inputs, or of pairs of inputs and labels; or one batch
            of inputs as a tensor. Inputs are as for the backbone, such as a tensor or a dict of tensors.
        read: called with the output and the labels, or None.
        labelled: whether each batch must have labels.
    """
    rule, fix = "a tensor or a loader of batches is needed", "Use a DataLoader, or [(inputs, labels)]."
    sound = isinstance(batches, Iterable) and not isinstance(batches, (str, Mapping))
    if not isinstance(batches, Tensor) and hasattr(batches, "__array__"):  # iterating a table gives names of columns
        sound, fix = False, "Use a tensor: torch.tensor(numpy.asarray(inputs), dtype=torch.float32)."
    require(sound, rule, got=type(batches), fix=fix, error=TypeError)
    device = next(chain(model.parameters(), model.buffers())).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        parts = []
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            inputs, labels = _split(batch, labelled)
            parts.append(read(model(tree_map_only(Tensor, lambda x: x.to(device), inputs)), labels))
    finally:
        for module, mode in modes.items():
            module.training = mode
    require(bool(parts), "there must be at least one batch", got="none")
    return parts


def _split(batch: Any, labelled: bool) -> tuple[Any, Any]:
    parts = batch if isinstance(batch, (list, tuple)) else [batch]
    rule = "a batch must be " + "inputs, or " * (not labelled) + "a pair of inputs and labels"
    got, fix = f"{len(batch)} values" if parts is batch else type(batch), "Join several inputs in a tuple or a dict."
    fix = fix if len(parts) > 2 else "Pass a DataLoader of pairs, or [(inputs, labels)]."
    require(1 + labelled <= len(parts) <= 2, rule, got=got, fix=fix, error=TypeError)
    return parts[0], parts[1] if len(parts) == 2 else None
