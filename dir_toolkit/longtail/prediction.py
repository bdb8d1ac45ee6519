"""What a model says of many inputs, batch by batch, and a table of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .._checks import finite, require
from .readouts import LongTailOutput

if TYPE_CHECKING:
    import xarray as xr

    from .model import LongTailModel

T = TypeVar("T")


def predict(model: LongTailModel, inputs: Any, level: float | None) -> xr.Dataset:
    import xarray as xr

    ends = level is not None or model.readout.has_interval

    def read(output: LongTailOutput, _: Any) -> list[np.ndarray]:
        finite(predictions=output.prediction.cpu())
        columns = [output.prediction, *(model.interval(output, level) if ends else ())]
        return [column.cpu().numpy() for column in columns]

    names = ("prediction", "lower", "upper") if ends else ("prediction",)
    columns = [np.concatenate(parts) for parts in zip(*read_batches(model, inputs, read), strict=True)]
    table = xr.Dataset({name: ("sample", column) for name, column in zip(names, columns, strict=True)})
    for name in names[1:]:
        table[name].attrs["interval_level"] = level or model.readout.intervals.exact_level or 0.9
    if model.density is not None:
        row = model.bins.index(columns[0], "clip", name="predictions")
        table["region"] = ("sample", model.density.regions()[row])
    return table


@torch.no_grad()
def read_batches(model: LongTailModel, batches: Any, read: Callable[[LongTailOutput, Any], T]) -> list[T]:
    """What ``read`` takes from the output and the labels of each batch. The model runs in eval mode, on its own device,
    and every module gets its own mode back.

    Args:
        batches: an iterable of inputs, of lists of inputs alone, or of pairs of inputs and labels; or one batch of
            inputs as a tensor. Inputs are what the backbone takes, such as a tensor or a dict of tensors.
        read: called with labels of None where there are none.
    """
    rule, fix = "a tensor or a loader of batches is needed", "Use a DataLoader, or [(inputs, labels)]."
    require(isinstance(batches, Iterable), rule, got=type(batches), fix=fix, error=TypeError)
    device = next(chain(model.parameters(), model.buffers())).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        parts = []
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            inputs, labels = _split(batch)
            parts.append(read(model(tree_map_only(Tensor, lambda x: x.to(device), inputs)), labels))
    finally:
        for module, mode in modes.items():
            module.training = mode
    require(bool(parts), "there must be at least one batch", got="none")
    return parts


def _split(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (list, tuple)):
        return batch, None
    rule, fix = "a batch must be inputs, or a pair of inputs and labels", "Join several inputs in a tuple or a dict."
    require(1 <= len(batch) <= 2, rule, got=f"{len(batch)} values", fix=fix, error=TypeError)
    return batch[0], batch[1] if len(batch) == 2 else None
