"""Samples of any map-style dataset, whose inputs are tensors, tuples or dicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import default_collate

from ..._checks import instance, require
from ...errors import LabelError
from ._checks import check_array
from .images import SampleSet, check_positions

__all__ = ["MappedSet"]

_CHUNK = 256


class MappedSet(SampleSet):
    """The samples of a map-style dataset: ``dataset[i]`` is a pair of inputs and a label, for i below ``len(dataset)``.

    A model is called with the inputs of a batch as one argument: a tensor, or the tuple or dict that ``collate`` makes.
    A label may be one number, or one per step or pixel, and may be missing (NaN): then let the loss, the weights, the
    FDS and the metrics drop what is missing.

    Args:
        dataset: as above. Each sample is read once here, in order, for its label and for the digest.
        collate: makes a batch of inputs and labels of a list of samples, as that of a ``DataLoader`` does.
        digest: 64 hexadecimal digits that tell these samples from others. None takes those of what was read, which
            differ from run to run where the dataset draws random numbers.
    Attributes:
        labels: (N, ...), as the dataset has them; float64 becomes float32.
    Raises:
        TypeError: the dataset has no length or no samples by number, or a sample is not a pair of inputs and labels.
        LabelError: a label is infinite.
    """

    def __init__(
        self, dataset: Any, *, collate: Callable[[list[Any]], Any] = default_collate, digest: str | None = None
    ) -> None:
        sound = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        fix = "Use a list of (inputs, label), or a torch.utils.data.Dataset."
        require(sound, "dataset must have a length and samples by number", got=type(dataset), fix=fix)
        instance(Callable, collate=collate)
        for name, value in {"dataset": dataset, "collate": collate}.items():
            object.__setattr__(self, name, value)
        read, labels = hashlib.sha256(), []
        for start in range(0, len(dataset), _CHUNK):
            inputs, some = self._read(range(start, min(start + _CHUNK, len(dataset))))
            labels.append(some)
            leaves, structure = tree_flatten((inputs, some))
            read.update(str(structure).encode())
            for leaf in leaves:
                told = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                read.update(told.encode())
                if isinstance(leaf, Tensor):
                    read.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        array = torch.cat(labels).numpy() if labels else np.zeros(0, np.float32)
        require(not np.isinf(array).any(), "labels must not be infinite", got="infinity", error=LabelError)
        super().__init__(array[:, None], array, np.arange(len(array)), digest or read.hexdigest())

    def __post_init__(self) -> None:
        self._take_digest(self.digest)  # All else that SampleSet checks is of arrays.

    def batch(self, indices: np.ndarray | Tensor) -> tuple[Any, Tensor]:
        positions = np.asarray(indices)
        check_array("indices", positions, 1, np.int64)
        check_positions("indices", positions, len(self))
        return self._read(positions.tolist())

    def _read(self, places: Sequence[int]) -> tuple[Any, Tensor]:
        batch = self.collate([self.dataset[place] for place in places])  # type: ignore[attr-defined]
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
        require(pair, "a batch must be a pair of inputs and a tensor of labels", got=type(batch), error=TypeError)
        inputs, labels = batch
        return inputs, labels.float() if labels.dtype == torch.float64 else labels
