"""Samples of any map-style dataset, whose inputs are tensors, tuples or dicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import default_collate

from ..._checks import instance, require
from ...errors import LabelError, ShapeError
from ._checks import check_array
from .images import SampleSet, check_positions

__all__ = ["MappedSet"]

_CHUNK = 256


class MappedSet(SampleSet):
    """The samples of a map-style dataset: ``dataset[i]`` is a pair of inputs and a label, for i below ``len(dataset)``.

    A model is called with the inputs of a batch as one argument: a tensor, or the tuple or dict that ``collate`` makes.
    A label may be one number, or one per step or pixel. It may be missing (NaN) if the training drops missing labels:
    ``fit(..., missing="drop")``.

    If a sample depends only on its number, a run that is resumed or shared by ranks has the same bits as an unbroken
    one. So random changes of samples belong in the ``augmentation`` of ``fit``, which draws by the place in the run.

    Args:
        dataset: as above. Each sample is read once here, in order, for its label and for the digest.
        collate: makes a batch of inputs and labels from a list of samples, as the ``collate_fn`` of a ``DataLoader``.
        loader: makes the batches in place of ``collate``, for example with workers. ``loader(dataset, batches)`` is
            called with the batches that are left in an epoch, as lists of sample numbers. It returns an iterable with
            one pair of inputs and labels per batch, in this order, such as ``DataLoader(dataset,
            batch_sampler=batches, num_workers=4)``.
        digest: 64 hexadecimal digits that identify the samples. None computes them from the samples, so they differ
            between runs if the dataset draws random numbers.
    Attributes:
        labels: (N, ...), as the dataset has them; float64 becomes float32.
    Raises:
        TypeError: the dataset has no length or no samples by number, or a sample is not a pair of inputs and labels.
        LabelError: a label is infinite.
        ShapeError: a loader gives another number of samples or batches.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    loader: Callable[[Any, list[list[int]]], Iterable[Any]] | None

    def __init__(
        self,
        dataset: Any,
        *,
        collate: Callable[[list[Any]], Any] = default_collate,
        loader: Callable[[Any, list[list[int]]], Iterable[Any]] | None = None,
        digest: str | None = None,
    ) -> None:
        sound = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        fix = "Use a list of (inputs, label), or a torch.utils.data.Dataset."
        require(sound, "dataset must have a length and samples by number", got=type(dataset), fix=fix)
        instance(Callable, collate=collate)
        if loader is not None:
            instance(Callable, loader=loader)
        for name, value in {"dataset": dataset, "collate": collate, "loader": loader}.items():
            object.__setattr__(self, name, value)
        read, labels = hashlib.sha256(), []
        chunks = [list(range(start, min(start + _CHUNK, len(dataset)))) for start in range(0, len(dataset), _CHUNK)]
        for inputs, some in self._read(chunks):
            labels.append(some)
            leaves, structure = tree_flatten((inputs, some))
            read.update(str(structure).encode())
            for leaf in leaves:
                text = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                read.update(text.encode())
                if isinstance(leaf, Tensor):
                    read.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        array = torch.cat(labels).numpy() if labels else np.zeros(0, np.float32)
        require(not np.isinf(array).any(), "labels must not be infinite", got="infinity", error=LabelError)
        super().__init__(array[:, None], array, np.arange(len(array)), digest or read.hexdigest())

    def __post_init__(self) -> None:
        self._take_digest(self.digest)  # The other checks of SampleSet are for arrays.

    def batch(self, indices: np.ndarray | Tensor) -> tuple[Any, Tensor]:
        return next(self.batches([torch.as_tensor(indices)]))

    def batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        for positions in map(np.asarray, batches):
            check_array("indices", positions, 1, np.int64)
            check_positions("indices", positions, len(self))
        return self._read([batch.tolist() for batch in batches])

    def _read(self, batches: list[list[int]]) -> Iterator[tuple[Any, Tensor]]:
        """The inputs and labels of each batch of sample numbers, checked."""
        if self.loader is None:
            made: Iterable[Any] = (self.collate([self.dataset[place] for place in batch]) for batch in batches)
        else:
            made = self.loader(self.dataset, batches)
        count = 0
        for count, batch in enumerate(made, 1):
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
            require(pair, "a batch must be a pair of inputs and a tensor of labels", got=type(batch), error=TypeError)
            inputs, labels = batch
            asked = len(batches[count - 1]) if count <= len(batches) else 0
            rule, fix = f"batch {count} must hold {asked} samples", "Use DataLoader(dataset, batch_sampler=batches)."
            require(len(labels) == asked, rule, got=f"{len(labels)}", fix=fix, error=ShapeError)
            yield inputs, labels.float() if labels.dtype == torch.float64 else labels
        rule = f"loader must make {len(batches)} batches"
        require(count == len(batches), rule, got=f"{count}", error=ShapeError)
