from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.experiment.data.images import ImageSet, SampleSet, Splits, content_digest


def parts(**changes: Any) -> dict[str, Any]:
    fields = {
        "images": np.arange(4 * 3 * 2 * 1, dtype=np.uint8).reshape(4, 3, 2, 1),
        "labels": np.array([5, 7, 9], dtype=np.float32),
        "rows": np.array([3, 0, 3], dtype=np.int64),
        "digest": "0" * 64,
    }
    return {**fields, **changes}


def test_a_batch_follows_rows_and_order() -> None:
    data = ImageSet(**parts())
    images, labels = data.batch(np.array([2, 1, 1]))
    assert len(data) == 3
    assert labels.tolist() == [9.0, 7.0, 7.0]
    assert labels.dtype == torch.float32
    assert images.dtype == torch.uint8
    assert images.flatten(1).tolist() == [list(range(18, 24)), list(range(6)), list(range(6))]
    again = data.batch(torch.tensor([2, 1, 1]))
    assert again[0].equal(images)
    assert again[1].equal(labels)


def test_digest_is_computed_if_it_is_not_given() -> None:
    images, labels, rows = (parts()[name] for name in ("images", "labels", "rows"))
    assert ImageSet(images, labels, rows).digest == content_digest(images, labels, rows)
    assert ImageSet(**parts()).digest == "0" * 64


def test_a_batch_is_a_copy() -> None:
    data = ImageSet(**parts())
    images, labels = data.batch(np.arange(3))
    images.zero_()
    labels.zero_()
    assert data.images.max() == 23
    assert data.labels.tolist() == [5, 7, 9]


def test_sets_and_batches_may_be_empty() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert ImageSet(**parts()).batch(none)[0].shape == (0, 3, 2, 1)
    empty = ImageSet(**parts(images=np.zeros((0, 3, 2, 1), np.uint8), labels=np.zeros(0, np.float32), rows=none))
    assert len(empty) == 0
    assert empty.batch(none)[1].shape == (0,)


def test_a_read_only_memmap_is_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", parts()["images"])
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    batch, _ = ImageSet(**parts(images=images)).batch(np.array([0]))
    batch.add_(1)
    assert images[3].ravel().tolist() == list(range(18, 24))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_images_and_class_indices_are_taken(channels: int) -> None:
    images = np.arange(4 * channels * 2, dtype=np.uint8).reshape(4, channels, 2, 1)
    data = ImageSet(**parts(images=images, labels=np.array([2, 0, 2**40])))
    batch, labels = data.batch(np.array([2, 1]))
    assert batch.shape == (2, channels, 2, 1)
    np.testing.assert_array_equal(batch.numpy(), images[[3, 0]])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2**40, 0]
    labels.zero_()
    assert data.labels.tolist() == [2, 0, 2**40]


def test_the_digest_of_class_indices_is_that_worked_out_by_hand() -> None:
    images, rows, labels = np.array([7, 9], np.uint8).reshape(2, 1, 1, 1), np.array([1, 0]), np.array([3, 258])
    bytes_seen = b"2 (1, 1, 1)" + bytes([3, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]) + bytes([9, 7])
    assert content_digest(images, labels, rows) == hashlib.sha256(bytes_seen).hexdigest()
    assert content_digest(images, labels.astype(">i8"), rows) == content_digest(images, labels, rows)
    assert content_digest(images, labels.astype(np.float32), rows) != content_digest(images, labels, rows)


def test_digest_tells_what_is_seen_and_not_how_it_is_stored() -> None:
    images, labels, rows = parts()["images"], parts()["labels"], parts()["rows"]
    digest = content_digest(images, labels, rows)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert content_digest(images[rows], labels, np.arange(3)) == digest
    assert content_digest(images, labels.astype(">f4"), rows) == digest
    changed = images.copy()
    changed[0, 0, 0, 0] += 1
    assert content_digest(changed, labels, rows) != digest
    assert content_digest(images, labels + 1, rows) != digest
    assert content_digest(images, labels, rows[::-1]) == digest  # rows 3, 0, 3 read the same from behind
    assert content_digest(images, labels[[1, 0, 2]], rows[[1, 0, 2]]) != digest
    assert content_digest(images.reshape(4, 3, 1, 2), labels, rows) != digest


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(4, 3, 2, 1)}, TypeError, "images must be a NumPy array of uint8, got Tensor."),
        ({"images": np.zeros((4, 3, 2, 1))}, TypeError, "images must be a NumPy array of uint8, got dtype float64."),
        ({"images": np.zeros((4, 0, 2, 1), np.uint8)}, ShapeError, "images must have shape (M, C, H, W)"),
        ({"images": np.zeros((4, 3, 0, 1), np.uint8)}, ShapeError, "images must have shape (M, C, H, W)"),
        ({"images": np.zeros((3, 2, 1), np.uint8)}, ShapeError, "images must have shape (M, C, H, W), got (3, 2, 1)."),
        ({"labels": np.zeros(3)}, TypeError, "labels must be a NumPy array of float32 or int64, got dtype float64."),
        ({"labels": np.zeros(3, np.int32)}, TypeError, "labels must be a NumPy array of float32 or int64, got dtype"),
        ({"labels": np.array([0, 2, -1])}, LabelError, "labels must be class indices >= 0, got -1 at index [2]"),
        ({"labels": np.zeros((3, 1), np.float32)}, ShapeError, "labels must have shape (N,), got (3, 1)."),
        ({"labels": np.zeros(2, np.float32)}, ShapeError, "labels and rows must be equally long, got 2 and 3."),
        (
            {"labels": np.array([0, np.inf, 1], np.float32)},
            LabelError,
            "labels must not be infinite, got inf at index [1]",
        ),
        ({"rows": np.zeros(3, np.int32)}, TypeError, "rows must be a NumPy array of int64, got dtype int32."),
        ({"rows": np.array([0, 4, -1])}, ValueError, "rows must lie in [0, 4), got 4 at index [1] (2 such values)."),
        ({"images": np.zeros((0, 3, 2, 1), np.uint8)}, ValueError, "rows must lie in [0, 0), got 3"),
        ({"digest": "0" * 63 + "G"}, ValueError, "digest must be 64 hexadecimal digits"),
        ({"digest": 5}, ValueError, "digest must be 64 hexadecimal digits"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^ImageSet: " + re.escape(message)):
        ImageSet(**parts(**changes))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 1], TypeError, "indices must be a NumPy array of int64, got list."),
        (np.array([0.0]), TypeError, "indices must be a NumPy array of int64, got dtype float64."),
        (torch.tensor([True]), TypeError, "indices must be a NumPy array of int64, got dtype bool."),
        (np.array([[0]]), ShapeError, "indices must have shape (N,), got (1, 1)."),
        (np.array([0, -1]), ValueError, "indices must lie in [0, 3), got -1 at index [1] (1 such values)."),
        (np.array([3]), ValueError, "indices must lie in [0, 3), got 3 at index [0] (1 such values)."),
    ],
)
def test_a_batch_refuses_bad_indices(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^ImageSet.batch: " + re.escape(message)):
        ImageSet(**parts()).batch(indices)


def test_splits_hold_image_sets() -> None:
    data = ImageSet(**parts())
    assert Splits(data, data, data, source="x", skipped={}).val is data
    with pytest.raises(TypeError, match=r"^Splits: val must be a SampleSet, got list\."):
        Splits(data, [], data, source="x", skipped={})
    with pytest.raises(TypeError, match=r"^Splits: source must be a str, got NoneType\."):
        Splits(data, data, data, source=None, skipped={})
    with pytest.raises(TypeError, match=r"^Splits: skipped must be a dict, got NoneType\."):
        Splits(data, data, data, source="x", skipped=None)


def test_rows_and_sequences_are_samples_too():
    labels, rows = np.array([1.0, 2.0], np.float32), np.array([2, 0])
    table, words = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(15).reshape(3, 5)
    digests = set()
    for inputs in (table, table.astype(np.int64), words):
        data = SampleSet(inputs, labels, rows, content_digest(inputs, labels, rows))
        batch, chosen = data.batch(np.array([1, 0]))
        assert batch.dtype == torch.from_numpy(inputs).dtype
        np.testing.assert_array_equal(batch, inputs[[0, 2]])
        assert chosen.tolist() == [2.0, 1.0]
        digests.add(data.digest)
    assert len(digests) == 3
    with pytest.raises(TypeError, match=r"^SampleSet: inputs must be a NumPy array of float32 or uint8 or int64"):
        SampleSet(table.astype(np.float64), labels, rows, "0" * 64)
    with pytest.raises(ShapeError, match=r"^SampleSet: inputs must have shape \(M, ...\), got \(3,\)\."):
        SampleSet(table[:, 0], labels, rows, "0" * 64)
