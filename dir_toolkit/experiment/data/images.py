"""Sets of labelled samples and images, and splits into training, validation and test sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import instance, require
from ...errors import LabelError, ShapeError
from ._checks import check_array, check_each

__all__ = ["ImageSet", "SampleSet", "Splits", "content_digest"]

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Samples with one label each: a view of rows of one array, which may be a read-only memmap.

    Attributes:
        inputs: (M, ...) float32, uint8 or int64, such as rows of a table or sequences. Several sets may share it.
        labels: (N,), float32 in label units, where NaN is a missing label, or int64 class indices. ``labels[i]``
            belongs to ``inputs[rows[i]]``.
        rows: (N,) int64, each in [0, M).
        digest: the :func:`content_digest` of the inputs, labels and rows, which is computed if it is not given.
    Raises:
        ShapeError: an array has the wrong number of axes, or labels and rows differ in length.
        TypeError: an argument is not an array, or it has another dtype.
        LabelError: a label is infinite, or a class index is negative.
        ValueError: a row lies outside its range, or the digest is not a SHA-256.
    """

    inputs: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    digest: str = ""

    def __post_init__(self) -> None:
        self._check_inputs()
        check_array("labels", self.labels, 1, np.float32, np.int64)
        check_array("rows", self.rows, 1, np.int64)
        one, other = len(self.labels), len(self.rows)
        require(one == other, "labels and rows must be equally long", got=f"{one} and {other}", error=ShapeError)
        is_class = self.labels.dtype == np.int64
        sound = self.labels >= 0 if is_class else ~np.isinf(self.labels)
        check_each(
            f"labels must {'be class indices >= 0' if is_class else 'not be infinite'}", self.labels, sound, LabelError
        )
        check_positions("rows", self.rows, len(self.inputs))
        digest = self.digest or content_digest(self.inputs, self.labels, self.rows)
        self._take_digest(digest)

    def _take_digest(self, digest: str) -> None:
        sound = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
        require(sound, "digest must be 64 hexadecimal digits", got=repr(digest), fix="Leave it out.")
        object.__setattr__(self, "digest", digest)

    def _check_inputs(self) -> None:
        check_array("inputs", self.inputs, None, np.float32, np.uint8, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Copies of some samples and their labels, in the order of ``indices``.

        Shape:
            indices: (n,) int64, each in [0, N). Returns (n, ...) and (n,) in the dtypes of the inputs and labels.
        Raises:
            ShapeError: the indices are not one row. TypeError: they are not int64. ValueError: one is out of range.
        """
        positions = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else indices
        check_array("indices", positions, 1, np.int64)
        check_positions("indices", positions, len(self))
        inputs = np.ascontiguousarray(self.inputs[self.rows[positions]])
        return torch.from_numpy(inputs), torch.from_numpy(self.labels[positions])

    def batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """:meth:`batch` of each item of a sequence of indices."""
        return map(self.batch, batches)


class ImageSet(SampleSet):
    """Samples that are images: ``images`` (M, C, H, W) uint8. C is 1 for grey images and 3 for red, green and blue."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, digest: str = "") -> None:
        super().__init__(images, labels, rows, digest)

    @property
    def images(self) -> np.ndarray:
        return self.inputs

    def _check_inputs(self) -> None:
        check_array("images", self.images, 4, np.uint8)


@dataclass(frozen=True, eq=False)
class Splits:
    """The training, validation and test samples of one source, and how many files were left out for which reason.

    Attributes:
        source: the name of the data set, for example ``"portraits"`` or ``"mnist"``.
        skipped: the number of files left out per reason; it is empty if there are none.
    Raises:
        TypeError: a part is not a SampleSet, ``source`` is not a string, or ``skipped`` is not a dict.
    """

    train: SampleSet
    val: SampleSet
    test: SampleSet
    source: str
    skipped: dict[str, int]

    def __post_init__(self) -> None:
        instance(SampleSet, train=self.train, val=self.val, test=self.test)
        instance(str, source=self.source)
        instance(dict, skipped=self.skipped)


def content_digest(inputs: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> str:
    """The hex SHA-256 of the inputs in a set, in the order of the set, with their shape, and of the labels.

    The digest does not depend on how the set is stored: two sets with equal ``inputs[rows]`` and equal labels have the
    same digest, on machines of either byte order.

    Shape:
        inputs: (M, ...). labels: (N,) float32 or int64. rows: (N,) int64.

    >>> content_digest(np.zeros((2, 3, 1, 1), np.uint8), np.zeros(1, np.float32), np.array([1]))[:8]
    '8b3d6fbe'
    """
    kind = "" if inputs.dtype == np.uint8 else f" {inputs.dtype.name}"
    digest = hashlib.sha256(f"{len(rows)} {tuple(inputs.shape[1:])}{kind}".encode())
    digest.update(labels.astype("<f4" if labels.dtype.kind == "f" else "<i8").tobytes())
    for start in range(0, len(rows), _CHUNK):
        part = inputs[rows[start : start + _CHUNK]]
        digest.update(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def check_positions(name: str, positions: np.ndarray, length: int) -> None:
    check_each(f"{name} must lie in [0, {length})", positions, (positions >= 0) & (positions < length))
