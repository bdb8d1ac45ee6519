"""Read idx files, the format of MNIST and similar data sets, without trusting their headers."""

from __future__ import annotations

import gzip
import io
import math
import os
import stat
import zlib
from pathlib import Path

import numpy as np

from ..._checks import whole
from ._checks import data_error

__all__ = ["read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_AXES = 32  # as many as every version of NumPy has
_MOST_PACKED = 1032  # bytes that deflate can make of one byte
_CHUNK = 1 << 20


def read_idx(path: str | os.PathLike[str], *, max_bytes: int = 2**31) -> np.ndarray:
    """The array in an idx file, which may be compressed by gzip.

    The header is two zeros, the type of the numbers, the number of axes and the length of each axis as 32 bits, all
    big-endian. What it claims is compared with the size of the file before any memory of that size is allocated, and no
    more of a packed file is unpacked than the header claims. A small file therefore cannot fill the memory. Zeros may
    follow a gzip stream, as in the tool of that name.

    Args:
        max_bytes: the largest size of the unpacked numbers.
    Shape:
        Returns the shape in the header, as uint8, int8, int16, int32, float32 or float64 in native byte order.
    Raises:
        DataError: the file is missing or is not a regular file; it does not begin with a header of this format; the
            header has an unknown type of numbers, no axis or an axis of length zero; the file is shorter or longer than
            the header says or larger than ``max_bytes``; or the gzip stream is damaged. The error names the byte.
        ValueError: ``max_bytes`` is below one.
    Source:
        LeCun, Cortes, Burges 1998, The MNIST database of handwritten digits, "File formats".
    """
    max_bytes = whole("max_bytes", max_bytes, low=1)
    path = Path(path)
    try:
        # The kind comes first, since opening a named pipe waits for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise data_error("path must name a regular file", source=path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed:
                return _array(file, f"{path}, byte", size, max_bytes)
            stream = gzip.GzipFile(fileobj=file)
            try:
                return _array(stream, f"{path}, unpacked byte", size * _MOST_PACKED, max_bytes)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                place = f"{path}, unpacked byte {stream.tell():,}"
                raise data_error("the gzip stream must be whole", got=error, source=place) from None
    except OSError as error:
        raise data_error("the file must be readable", got=error.strerror, source=path) from None


def _array(stream: io.BufferedIOBase, place: str, most: int, max_bytes: int) -> np.ndarray:
    """The array in an open stream that holds at most ``most`` bytes; ``place`` begins the errors."""

    def refusal(byte: int, rule: str, *, got: object) -> Exception:
        fix = "The file is damaged or is not an idx file: get it again."
        return data_error(rule, got=got, fix=fix, source=f"{place} {byte:,}")

    def fill(target: memoryview, start: int) -> None:
        done = 0
        while done < len(target) and (count := stream.readinto(target[done : done + _CHUNK])):
            done += count
        if done < len(target):
            raise refusal(start + done, f"the file must go on for {len(target) - done:,} more bytes", got="its end")

    start = bytearray(4)
    fill(memoryview(start), 0)
    zeros, kind, count = bytes(start[:2]), start[2], start[3]
    if zeros != b"\0\0":
        raise refusal(0, "an idx file must begin with two zeros", got=zeros.hex(" "))
    listed = ", ".join(f"{code:02x}" for code in _TYPES)
    if kind not in _TYPES:
        raise refusal(2, f"the type of the numbers must be one of {listed}", got=f"{kind:02x}")
    if not 1 <= count <= _MOST_AXES:
        raise refusal(3, f"there must be 1 to {_MOST_AXES} axes", got=count)
    axes = bytearray(4 * count)
    fill(memoryview(axes), 4)
    shape = tuple(int(length) for length in np.frombuffer(axes, ">u4"))
    if 0 in shape:
        raise refusal(4 + 4 * shape.index(0), "each axis must be at least 1 long", got=shape)
    header, claimed = 4 + len(axes), math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
    allowed = min(max_bytes, most - header)
    reason = "the limit" if allowed == max_bytes else "since the file holds no more"
    if claimed > allowed:
        rule = f"the numbers must take at most {allowed:,} bytes, {reason}"
        raise refusal(4, rule, got=f"{claimed:,} in shape {shape}")
    numbers = np.empty(claimed, np.uint8)
    fill(numbers.data, header)
    if stream.read(1):  # which also compares the check sum at the end of a gzip stream
        raise refusal(header + claimed, "the file must end where its header says", got="more bytes")
    array = numbers.view(_TYPES[kind]).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
