"""Files from outside, in a tar archive or in a folder: each is checked before any is read, and none is extracted.

The filters of :mod:`tarfile` look at members as they are extracted; here nothing is extracted. What tarfile does not
notice is found by reading headers again: an archive that was cut short, and members hidden behind a damaged header.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from ..._checks import problem
from ...errors import DataError

__all__ = ["Files", "FolderFiles", "TarFiles", "stays_inside"]

MOST_BYTES_EACH = 2**25
_BLOCK = 512
_MOST_HEADERS = 2**14
_GNU_NAME, _PAX = b"L", (b"x", b"g")  # types of headers that tell of the next member
_CHUNK = 2**16
_ALLOWED = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Files(Protocol):
    """A named set of files that can be told from any other and read one after another."""

    def digest(self, names: Iterable[str]) -> str:
        """Hex SHA-256 that changes when the bytes of one of ``names`` do."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each name with its bytes, one at a time. ``names`` come in the set's own order."""


def stays_inside(name: str) -> bool:
    """Whether a relative path names something below the folder it starts from, on any system."""
    parts = name.split("/")
    return not (parts[0] == "" or ".." in parts or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name))


class TarFiles:
    """The regular files of a ``.tar`` or ``.tar.gz``, all of its members checked when it is opened.

    Members may be regular files and folders in the ustar, GNU or pax format, each with at most 16 KiB of headers.

    Args:
        most_files, most_bytes, most_bytes_each: limits on members, bytes in all and bytes a file, when decompressed.
    Attributes:
        names: of the regular files, in the archive's order, without a leading ``./``.
    Raises:
        DataError: the archive is missing, damaged, cut short or over a limit; or a member is a link, a device or
            anything else, has an absolute name or one with ``..``, or a name that was there before.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        most_files: int = 2**20,
        most_bytes: int = 2**36,
        most_bytes_each: int = MOST_BYTES_EACH,
    ) -> None:
        self.path = Path(path)
        self._places: dict[str, tuple[int, int]] = {}  # name -> first byte, length
        folders: set[str] = set()
        with self._stream() as stream:
            for count, info in enumerate(self._members(stream), 1):
                name, end = info.name, info.offset_data + info.size
                plain = "/".join(part for part in name.split("/") if part not in ("", "."))
                if count > most_files:
                    raise self._refusal(name, f"must be among the first {most_files:,} members")
                if end > most_bytes:
                    raise self._refusal(name, f"must end within the first {most_bytes:,} bytes", got=f"{end:,}")
                if not stays_inside(name) or (not plain and not info.isdir()):
                    raise self._refusal(name, "must have a name inside the archive, without '..'")
                if info.type not in _ALLOWED:
                    got = _REFUSED.get(info.type, repr(info.type))
                    raise self._refusal(name, "must be a regular file or a folder", got=got)
                most = 0 if info.isdir() else most_bytes_each
                if info.size > most:
                    raise self._refusal(name, f"must hold at most {most:,} bytes", got=f"{info.size:,}")
                if plain in self._places or (not info.isdir() and plain in folders):
                    raise self._refusal(name, "must stand in the archive once", got="it twice")
                if info.isdir():
                    folders.add(plain)
                else:
                    self._places[plain] = (info.offset_data, info.size)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def digest(self, names: Iterable[str] = ()) -> str:
        """Hex SHA-256 of the archive as it is stored, whichever names are asked for."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of ``names`` with its bytes, in one pass from front to back; ``names`` in the archive's order."""
        places = [(name, *self._places[name]) for name in names]
        with self._stream() as stream:
            for name, start, size in places:
                stream.seek(start)
                yield name, _take(stream, size)

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        """The archive's bytes, decompressed; whatever breaks while they are read comes out as our error."""
        try:
            with self.path.open("rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
        except DataError:
            raise
        except Exception as error:  # tarfile may raise anything on damaged bytes
            raise problem(
                "the archive must be whole and readable",
                got=f"{type(error).__name__}: {error}",
                fix="Download it again.",
                error=DataError,
                source=str(self.path),
            ) from None

    def _members(self, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
        """What tarfile lists, which takes a damaged header for the end; here that must be one, with nothing behind."""
        headers = _Headers(stream)
        file = cast(BinaryIO, headers)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for info in tar:
                if info.size < 0:
                    raise tarfile.ReadError(f"the member header at byte {info.offset:,} must be whole")
                if "path" in (tar.pax_headers or {}):
                    raise self._refusal(info.name, "must be named in a header of its own", got="a name for all members")
                if keys := [key for key in info.pax_headers if key == "size" or key.startswith("GNU.sparse")]:
                    rule = "must be a plain file of less than 8 GiB"
                    raise self._refusal(info.name, rule, got=f"the pax record {keys[0]!r}")
                yield info
                info.pax_headers, tar.pax_headers = {}, {}  # or they pile up, each member with a copy of all before
                headers.left = _MOST_HEADERS
        if headers.last != bytes(_BLOCK):
            raise tarfile.ReadError(f"the member header at byte {stream.tell() - _BLOCK:,} must be whole")
        padding = 0
        while chunk := stream.read(_CHUNK):  # to the last byte, for gzip's check sum stands behind it
            padding += len(chunk)
            if any(chunk) or padding > 2**24:
                raise problem(
                    "nothing but zeros may follow the archive's end mark", error=DataError, source=str(self.path)
                )

    def _refusal(self, name: str, rule: str, *, got: object = None) -> Exception:
        return problem(
            f"member {name!r} {rule}",
            got=got,
            fix="Nothing was read from this archive.",
            error=DataError,
            source=str(self.path),
        )


class FolderFiles:
    """Files below a folder, links followed only as long as they stay inside.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise problem("root must be a folder", got=str(root), error=DataError)
        self._real = os.path.realpath(self.root)
        self._safe_folders: set[str] = set()

    def has(self, name: str, *, source: str) -> bool:
        """Whether there is a file of this name, relative to the folder.

        Args:
            source: what names the file, to begin the error with: a list and its line, for example.
        Raises:
            DataError: the name leads out of the folder, through ``..`` or a link or from the file system's root; or
                what it names is no regular file or larger than 32 MiB.
        """
        path = self.root / name
        try:
            if not stays_inside(name) or not self._is_inside(path):
                raise problem(f"path must stay inside {self.root}", got=repr(name), error=DataError, source=source)
            status = path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            got = f"{name!r} ({error.strerror})"
            raise problem("path must name a file", got=got, error=DataError, source=source) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES_EACH:
            got = f"{name!r} of {status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else repr(name)
            rule = f"path must name a regular file of at most {MOST_BYTES_EACH:,} bytes"
            raise problem(rule, got=got, error=DataError, source=source)
        return True

    def _is_inside(self, path: Path) -> bool:
        parent = os.path.dirname(path)  # noqa: PTH120 - a string, for half a million of them
        if parent not in self._safe_folders:
            if not self._leads_inside(parent):
                return False
            self._safe_folders.add(parent)
        return not path.is_symlink() or self._leads_inside(path)

    def _leads_inside(self, path: str | Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._real)

    def digest(self, names: Iterable[str]) -> str:
        """Hex SHA-256 over names and contents."""
        digest = hashlib.sha256()
        for name, data in self.read(names):
            digest.update(f"{name}\0{len(data)}\0".encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of ``names``, which :meth:`has` has let pass, with its bytes."""
        for name in names:
            try:
                data = (self.root / name).read_bytes()
            except OSError as error:
                raise problem(
                    "the file must be readable", got=error.strerror, error=DataError, source=str(self.root / name)
                ) from None
            yield name, data


class _Headers:
    """An archive as tarfile may read it: what its headers claim is not believed.

    By itself tarfile reads names of any claimed size, passes over pax records that do not parse, and takes the end of
    the file for the end of the archive; here each is an error.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.tell, self.seek = stream, stream.tell, stream.seek
        self.left = _MOST_HEADERS  # bytes, for the next member
        self.last = self._kind = b""

    def read(self, count: int) -> bytes:
        if self._kind in (b"K", b"X"):  # they would swallow a file whose type was damaged
            raise tarfile.ReadError("a GNU link name or Solaris records, which no regular file needs")
        if not 0 <= count <= self.left:
            raise tarfile.ReadError(f"a member may have {_MOST_HEADERS:,} bytes of names, one claims {count:,} more")
        self.left -= count
        self.last = _take(self._stream, count)
        if self._kind in _PAX and not _is_pax(self.last):
            at = self.tell() - count - _BLOCK
            raise tarfile.ReadError(f"the pax records at byte {at:,} must be whole")
        self._kind = b"" if self._kind in (_GNU_NAME, *_PAX) else self.last[156:157]  # of the header, if this was one
        return self.last


def _is_pax(data: bytes) -> bool:
    """Whether these are records ``<length> <key>=<value>\\n``, up to the first zero behind one or to the end."""
    while start := re.match(b"([0-9]{1,5}) [^=]+=", data):
        end = int(start[1])
        if start.end() >= end or data[end - 1 : end] != b"\n":
            return False
        data = data[end:]
    return not data or data[0] == 0


def _take(stream: BinaryIO, count: int) -> bytes:
    if len(data := stream.read(count)) < count:
        raise EOFError("it ends too early")
    return data
