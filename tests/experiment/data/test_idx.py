"""idx files: every type by hand, and that anything else ends in a DataError that names the byte."""

from __future__ import annotations

import gzip
import os
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dir_toolkit.errors import DataError
from dir_toolkit.experiment.data.idx import read_idx

HAND = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes([1, 2, 3, 4, 5, 255])


def write(folder: Path, data: bytes, name: str = "some.idx") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def claims(shape: Sequence[int], body: bytes = b"", *, code: int = 8, start: bytes = b"\0\0") -> bytes:
    """An idx file whose header claims this shape."""
    return start + bytes([code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bytes_written_by_hand_are_read_whatever_the_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for name in ("a", "a.gz", "a.idx"):
        array = read_idx(write(tmp_path, pack(HAND), name))
        assert array.dtype == np.uint8
        assert array.tolist() == [[1, 2, 3], [4, 5, 255]]
        assert array.flags.writeable


@pytest.mark.parametrize(
    ("code", "form", "values", "dtype"),
    [
        (0x08, "B", [0, 200, 255], np.uint8),
        (0x09, "b", [0, -3, 127], np.int8),
        (0x0B, "h", [0, -300, 32767], np.int16),
        (0x0C, "i", [0, -70000, 2**31 - 1], np.int32),
        (0x0D, "f", [0.5, -1e30, float("inf")], np.float32),
        (0x0E, "d", [0.1, -1e300, 5e-324], np.float64),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_types_come_in_native_order(
    tmp_path: Path, code: int, form: str, values: list[Any], dtype: Any, pack: Callable[[bytes], bytes]
) -> None:
    array = read_idx(write(tmp_path, pack(claims([3], struct.pack(f">3{form}", *values), code=code))))
    assert array.dtype == np.dtype(dtype)
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, np.array(values, dtype))


def test_arrays_of_more_than_one_chunk_are_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1, 1000), np.uint8)
    data = claims(pixels.shape, pixels.tobytes())
    for packed in (data, gzip.compress(data, 1, mtime=0)):
        np.testing.assert_array_equal(read_idx(write(tmp_path, packed)), pixels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "byte 0: the file must go on for 4 more bytes, got its end."),
        (b"\0\0\x08", "byte 3: the file must go on for 1 more bytes, got its end."),
        (claims([3], b"123", start=b"\0\1"), "byte 0: an idx file must begin with two zeros, got 00 01."),
        (b"PK\3\4....", "byte 0: an idx file must begin with two zeros, got 50 4b."),
        (
            claims([3], b"123", code=10),
            "byte 2: the type of the numbers must be one of 08, 09, 0b, 0c, 0d, 0e, got 0a.",
        ),
        (claims([]), "byte 3: there must be 1 to 32 axes, got 0."),
        (claims([1] * 33, b"1"), "byte 3: there must be 1 to 32 axes, got 33."),
        (claims([2, 3])[:10], "byte 10: the file must go on for 2 more bytes, got its end."),
        (claims([3, 0, 0]), "byte 8: each axis must be at least 1 long, got shape (3, 0, 0)."),
        (
            HAND[:-1],
            "byte 4: the numbers must take at most 5 bytes, since the file holds no more, got 6 in shape (2, 3).",
        ),
        (HAND + b"\0", "byte 18: the file must end where its header says, got more bytes."),
        (
            claims([2**30], b"1"),
            "byte 4: the numbers must take at most 1 bytes, since the file holds no more, got 1,073,741,824",
        ),
        (
            claims([2**31], b"1", code=9),
            "byte 4: the numbers must take at most 1 bytes, since the file holds no more, got 2,147,483,648 in",
        ),
        (claims([2**31 + 1], b"1"), "byte 4: the numbers must take at most 1 bytes, since"),
        (claims([2**29], b"1", code=14), "byte 4: the numbers must take at most 1 bytes, since"),
        (claims([2**32 - 1] * 32, b"1"), "byte 4: the numbers must take at most"),  # 64 bits would overflow
        (claims([2**16, 2**16, 2**16, 2**16], b""), "byte 4: the numbers must take at most"),  # to 0, in 64 bits
    ],
)
def test_plain_files_that_lie_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(DataError, match="^" + re.escape(f"{path}, {message}")):
        read_idx(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(HAND, mtime=0)[:-1], "unpacked byte 18: the gzip stream must be whole, got Compressed"),
        (gzip.compress(HAND, mtime=0)[:14], "the gzip stream must be whole"),
        (gzip.compress(HAND, mtime=0)[:-8] + bytes(8), "the gzip stream must be whole, got CRC check failed"),
        (gzip.compress(HAND[:-1], mtime=0), "unpacked byte 17: the file must go on for 1 more bytes, got its end."),
        (
            gzip.compress(HAND + b"1", mtime=0),
            "unpacked byte 18: the file must end where its header says, got more bytes.",
        ),
        (
            gzip.compress(HAND, mtime=0) + b"more",
            "unpacked byte 18: the gzip stream must be whole, got Not a gzipped file",
        ),
        (gzip.compress(HAND, mtime=0) * 2, "unpacked byte 18: the file must end where its header says, got more"),
        (gzip.compress(claims([2**30]), mtime=0), "unpacked byte 4: the numbers must take at most"),
        (b"\x1f\x8b\x08", "unpacked byte 0: the gzip stream must be whole, got Compressed file ended before"),
        (b"\x1f\x8b\x00" + bytes(30), "unpacked byte 0: the gzip stream must be whole, got Unknown compression method"),
    ],
)
def test_packed_files_that_lie_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_idx(write(tmp_path, data))


def test_the_last_chunk_may_lie_in_the_engine_when_the_file_has_ended(tmp_path: Path) -> None:
    zeros = claims([5 << 20], bytes(5 << 20))
    for level in (1, 9):
        assert read_idx(write(tmp_path, gzip.compress(zeros, level, mtime=0))).shape == (5 << 20,)


def test_zeros_may_follow_the_gzip_stream(tmp_path: Path) -> None:
    assert read_idx(write(tmp_path, gzip.compress(HAND, mtime=0) + bytes(600))).tolist() == [[1, 2, 3], [4, 5, 255]]


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    engine = zlib.compressobj(9, wbits=31)
    bomb = engine.compress(claims([4], b"1234")) + b"".join(engine.compress(bytes(1 << 20)) for _ in range(256))
    path = write(tmp_path, bomb + engine.flush())
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="unpacked byte 12: the file must end where its header says"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_limits_hold_and_paths_of_any_kind_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path, HAND)
    assert read_idx(str(path), max_bytes=6).shape == (2, 3)
    with pytest.raises(DataError, match="byte 4: the numbers must take at most 5 bytes, the limit, got 6 in"):
        read_idx(path, max_bytes=5)
    with pytest.raises(ValueError, match=r"^read_idx: max_bytes must be at least 1, got 0\."):
        read_idx(path, max_bytes=0)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: path must name a regular file.")):
        read_idx(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none'}: the file must be readable, got No such file")):
        read_idx(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="path must name a regular file"):
        read_idx(tmp_path / "pipe")


@pytest.mark.parametrize("pack", [bytes, lambda data: gzip.compress(data, mtime=0)])
def test_mutations_are_refused_or_read_right(
    tmp_path: Path, pack: Callable[[bytes], bytes], mutations: Callable[..., Iterator[bytes]]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (5, 6, 7), np.uint8)
    data, refused = claims(pixels.shape, pixels.tobytes()), 0
    packed = pack(data)
    for changed in mutations(packed, count=600, longest=40):
        path = write(tmp_path, changed)
        try:
            array = read_idx(path)
        except DataError:
            refused += 1
            continue
        plain = changed if pack is bytes else gzip.decompress(changed)
        assert array.size * array.itemsize + 4 + 4 * array.ndim == len(plain)
        assert array.astype(array.dtype.newbyteorder(">")).tobytes() == plain[4 + 4 * array.ndim :]
        assert pack is bytes or plain == data  # a check sum stands behind
    assert refused > 300
