"""Images with one label each, and the three parts they are split into."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..._checks import instance, label_problem, problem
from ...errors import ShapeError

__all__ = ["ImageSet", "Splits", "content_digest"]

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one label each: a view of rows of one array, which may be a read-only memmap.

    Attributes:
        images: (M, C, H, W) uint8, C being 1 for grey, 3 for red, green, blue; several sets may share one array.
        labels: (N,) float32, in label units, or int64, class indices; ``labels[i]`` belongs to ``images[rows[i]]``.
        rows: (N,) int64, each in 0 ... M - 1.
        digest: hex SHA-256 that identifies the content, images, labels and rows; see :func:`content_digest`.
    Raises:
        ShapeError: an array has the wrong number of axes, or labels and rows differ in length.
        TypeError: an array has another dtype than above, or is none.
        LabelError: a label is NaN or infinite, or a class index negative.
        ValueError: a row lies outside, or the digest is no SHA-256.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    digest: str

    def __post_init__(self) -> None:
        _array("images", self.images, np.uint8)
        _array("labels", self.labels, np.float32, np.int64)
        _array("rows", self.rows, np.int64)
        if self.images.ndim != 4 or 0 in self.images.shape[1:]:
            raise problem("images must have shape (M, C, H, W)", got=self.images.shape, error=ShapeError)
        for name, array in (("labels", self.labels), ("rows", self.rows)):
            if array.ndim != 1:
                raise problem(f"{name} must have shape (N,)", got=array.shape, error=ShapeError)
        if len(self.labels) != len(self.rows):
            raise problem(
                "labels and rows must be equally long",
                got=f"{len(self.labels)} and {len(self.rows)}",
                error=ShapeError,
            )
        broken = ~np.isfinite(self.labels)
        if broken.any():
            at = int(broken.argmax())
            got = f"{self.labels[at]} at index [{at}] ({int(broken.sum())} such labels)"
            raise label_problem("labels must be finite", got=got, fix="Remove these samples first.")
        if self.labels.dtype == np.int64 and (self.labels < 0).any():
            at = int((self.labels < 0).argmax())
            raise label_problem("class indices must not be negative", got=f"{self.labels[at]} at index [{at}]")
        _inside("rows", self.rows, len(self.images))
        if not isinstance(self.digest, str) or not re.fullmatch("[0-9a-f]{64}", self.digest):
            raise problem(
                "digest must be 64 hexadecimal digits",
                got=repr(self.digest),
                fix="Use content_digest(images, labels, rows).",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Copies of some images and their labels, in the order asked for.

        Shape:
            indices: (n,) int64, positions in 0 ... N - 1. Returns (n, C, H, W) uint8 and (n,) of the labels' dtype.
        Raises:
            ShapeError: indices are not one row. TypeError: they are not int64. ValueError: one lies outside.
        """
        at = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else indices
        _array("indices", at, np.int64)
        if at.ndim != 1:
            raise problem("indices must have shape (n,)", got=at.shape, error=ShapeError)
        _inside("indices", at, len(self))
        images = np.ascontiguousarray(self.images[self.rows[at]])
        return torch.from_numpy(images), torch.from_numpy(self.labels[at])


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test images of one source, with the number of files left out for each reason.

    Attributes:
        source: where the images come from, ``"portraits"`` or ``"mnist"`` for example.
        skipped: reason -> number of files left out; empty if none.
    Raises:
        TypeError: a part is no ImageSet, ``source`` is no text, or ``skipped`` no dict.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    source: str
    skipped: dict[str, int]

    def __post_init__(self) -> None:
        instance(ImageSet, train=self.train, val=self.val, test=self.test)
        instance(str, source=self.source)
        instance(dict, skipped=self.skipped)


def content_digest(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> str:
    """Hex SHA-256 of the images a set shows, in its order, with their shape, and of its labels.

    It depends on what is seen and not on how it is stored: two sets with equal ``images[rows]`` and equal labels have
    one digest, on machines of either byte order.

    Shape:
        images: (M, C, H, W) uint8. labels: (N,) float32 or int64. rows: (N,) int64.

    >>> content_digest(np.zeros((2, 3, 1, 1), np.uint8), np.zeros(1, np.float32), np.array([1]))[:8]
    '8b3d6fbe'
    """
    digest = hashlib.sha256(f"{len(rows)} {tuple(images.shape[1:])}".encode())
    digest.update(labels.astype("<f4" if labels.dtype.kind == "f" else "<i8").tobytes())
    for start in range(0, len(rows), _CHUNK):
        digest.update(images[rows[start : start + _CHUNK]].tobytes())
    return digest.hexdigest()


def _array(name: str, value: object, *dtypes: type[np.generic]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes:
        got = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        allowed = " or ".join(dtype.__name__ for dtype in dtypes)
        raise problem(f"{name} must be a NumPy array of {allowed}", got=got, error=TypeError)


def _inside(name: str, index: np.ndarray, length: int) -> None:
    bad = (index < 0) | (index >= length)
    if bad.any():
        at = int(bad.argmax())
        rule = f"{name} must lie in 0 to {length - 1}" if length else f"{name} must be empty, for there is nothing"
        raise problem(rule, got=f"{index[at]} at index [{at}] ({int(bad.sum())} such values)")
