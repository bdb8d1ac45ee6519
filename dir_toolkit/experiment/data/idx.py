"""idx files, the format in which MNIST and its relatives are published, read without trusting their headers."""

from __future__ import annotations

import math
import os
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..._checks import problem, whole
from ...errors import DataError

__all__ = ["read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_MOST_AXES = 32  # as many as every version of NumPy has
_MOST_PACKED = 1032  # bytes that deflate can make of one
_CHUNK = 1 << 20


def read_idx(path: str | os.PathLike[str], *, max_bytes: int = 2**31) -> np.ndarray:
    """The array in an idx file, packed with gzip or not, whatever its name.

    The header is two zeros, the type of the numbers, the count of axes and each axis as 32 bits, all big-endian. Its
    claim is held against the bytes there are before anything of that size is allocated, and of a packed file no byte
    more is unpacked than the header claims and one behind, so a small file cannot fill the memory.

    Args:
        max_bytes: limit on the numbers' size, unpacked.
    Shape:
        Returns the header's shape, of uint8, int8, int16, int32, float32 or float64 in this machine's byte order.
    Raises:
        DataError: the file, with the byte, is missing or no regular file, begins otherwise, has another type of
            numbers, no axis or one of length zero, is shorter or longer than its header says or larger than
            ``max_bytes``, or its gzip stream is damaged or followed by anything.
        ValueError: ``max_bytes`` is below one.
    Source:
        LeCun, Cortes, Burges 1998, The MNIST database of handwritten digits, "File formats".
    """
    max_bytes = whole("max_bytes", max_bytes, low=1)
    path = Path(path)
    try:
        # Not opened before its kind is known: opening a named pipe waits for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise problem("path must name a regular file", error=DataError, source=str(path))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            packed = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            return _array(_Packed(path, file, size) if packed else _Plain(path, file, size), max_bytes)
    except OSError as error:
        raise problem("the file must be readable", got=error.strerror, error=DataError, source=str(path)) from None


class _Plain:
    """The bytes of a file, from front to back, and where each stands."""

    kind = "byte"

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size, self._at = path, file, size, 0

    def most(self) -> int:
        """Bytes that the whole can hold."""
        return self._size

    def fill(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            if not (data := self._next(min(len(target) - done, _CHUNK))):
                rule = f"the file must go on for {len(target) - done:,} more bytes"
                raise self.refusal(self._at, rule, got="its end")
            target[done : done + len(data)] = data
            done += len(data)
            self._at += len(data)

    def end(self) -> None:
        if self._next(1):
            raise self.refusal(self._at, "the file must end where its header says", got="more bytes")

    def refusal(self, at: int, rule: str, *, got: object = None) -> Exception:
        fix = "It is no idx file, or a damaged one: get it again."
        return problem(rule, got=got, fix=fix, error=DataError, source=f"{self._path}, {self.kind} {at:,}")

    def _next(self, most: int) -> bytes:
        return self._file.read(most)


class _Packed(_Plain):
    """The same of what is packed in one gzip stream."""

    kind = "unpacked byte"

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        super().__init__(path, file, size)
        self._engine = zlib.decompressobj(wbits=31)  # with gzip's header and check sum

    def most(self) -> int:
        return self._size * _MOST_PACKED

    def end(self) -> None:
        super().end()
        if self._engine.unused_data or self._file.read(1):
            raise self.refusal(self._at, "nothing may follow the gzip stream", got="more bytes in the file")

    def _next(self, most: int) -> bytes:
        while not self._engine.eof:
            packed = self._engine.unconsumed_tail or self._file.read(_CHUNK)
            try:
                data = self._engine.decompress(packed, most)
            except zlib.error as error:
                raise self.refusal(self._at, "the gzip stream must be whole", got=error) from None
            if data:
                return data
            if not packed and not self._engine.eof:
                raise self.refusal(self._at, "the gzip stream must be whole", got="its end, too early")
        return b""


def _array(source: _Plain, max_bytes: int) -> np.ndarray:
    start = bytearray(4)
    source.fill(memoryview(start))
    if start[:2] != b"\0\0":
        raise source.refusal(0, "an idx file must begin with two zeros", got=bytes(start[:2]).hex(" "))
    if start[2] not in _TYPES:
        listed = ", ".join(f"{code:02x}" for code in _TYPES)
        raise source.refusal(2, f"the type of the numbers must be one of {listed}", got=f"{start[2]:02x}")
    if not 1 <= start[3] <= _MOST_AXES:
        raise source.refusal(3, f"there must be 1 to {_MOST_AXES} axes", got=start[3])
    axes = bytearray(4 * start[3])
    source.fill(memoryview(axes))
    shape = [int.from_bytes(axes[at : at + 4], "big") for at in range(0, len(axes), 4)]
    if 0 in shape:
        raise source.refusal(4 + 4 * shape.index(0), "each axis must be at least 1 long", got=tuple(shape))
    dtype, header = np.dtype(_TYPES[start[2]]), len(start) + len(axes)
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > max_bytes:
        raise source.refusal(4, f"the numbers must take at most {max_bytes:,} bytes", got=f"{claimed:,}")
    if header + claimed > source.most():
        rule = f"the numbers must take no more bytes than the {source.most() - header:,} there can be"
        raise source.refusal(4, rule, got=f"{claimed:,} in shape {tuple(shape)}")
    data = np.empty(claimed, np.uint8)
    source.fill(data.data)
    source.end()
    return data.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
