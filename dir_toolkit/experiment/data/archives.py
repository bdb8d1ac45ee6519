"""Untrusted files in a tar archive or a folder. All are checked before any is read, and none is extracted.

The checks of members are our own, since the ``data`` filter of ``tarfile`` is about extraction: it renames absolute
members, and it lets through links and ``..`` that stay inside, backslashes and sparse files.
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

from ...errors import DataError
from ._checks import data_error

__all__ = ["Files", "FolderFiles", "TarFiles", "stays_inside"]

MOST_BYTES_EACH = 2**25
_BLOCK = 512
_MOST_HEADERS = 2**14
_GNU_NAME, _PAX = b"L", (b"x", b"g")  # types of headers that describe the next member
_CHUNK = 2**16
_ALLOWED = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Files(Protocol):
    """A named set of files that has a digest and is read one file after the other."""

    def digest(self, names: Iterable[str]) -> str:
        """A hex SHA-256 that changes whenever the bytes of one of ``names`` change."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each name with its bytes, one at a time. ``names`` have the order of the set."""


def stays_inside(name: str) -> bool:
    """Whether a relative path names something below the folder where it starts, on every operating system."""
    parts = name.split("/")
    return not (parts[0] == "" or ".." in parts or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name))


class TarFiles:
    """The regular files of a ``.tar`` or ``.tar.gz``, all of whose members are checked when it is opened.

    Members may be regular files and folders in the ustar, GNU or pax format, each with at most 16 KiB of headers.

    Args:
        most_files, most_bytes, most_bytes_each: limits on the number of members, on the bytes of the archive and on
            the bytes per file, when decompressed.
    Attributes:
        names: the names of the regular files, in the order of the archive, without a leading ``./``.
    Raises:
        DataError: the archive is missing, damaged, truncated or over a limit; or a member is not a regular file or
            folder; or its name is absolute, contains ``..`` or occurs twice.
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
                most, got = 0 if info.isdir() else most_bytes_each, ""
                if count > most_files:
                    rule = f"must be among the first {most_files:,} members"
                elif end > most_bytes:
                    rule, got = f"must end within the first {most_bytes:,} bytes", f"{end:,}"
                elif not stays_inside(name) or (not plain and not info.isdir()):
                    rule = "must have a name inside the archive, without '..'"
                elif info.type not in _ALLOWED:
                    rule, got = "must be a regular file or a folder", _REFUSED.get(info.type, repr(info.type))
                elif info.size > most:
                    rule, got = f"must hold at most {most:,} bytes", f"{info.size:,}"
                elif plain in self._places or (not info.isdir() and plain in folders):
                    rule, got = "must stand in the archive once", "it twice"
                elif info.isdir():
                    folders.add(plain)
                    continue
                else:
                    self._places[plain] = (info.offset_data, info.size)
                    continue
                raise self._refusal(name, rule, got)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def digest(self, names: Iterable[str] = ()) -> str:
        """The hex SHA-256 of the archive as it is stored, whichever names are given."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of ``names`` with its bytes, in one pass from front to back. ``names`` have the order of the archive."""
        places = [(name, *self._places[name]) for name in names]
        with self._stream() as stream:
            for name, start, size in places:
                stream.seek(start)
                yield name, _take(stream, size)

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        """The decompressed bytes of the archive. Any exception in reading them becomes a DataError."""
        try:
            with self.path.open("rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
        except DataError:
            raise
        except Exception as error:  # tarfile may raise anything on damaged bytes
            rule, got = "the archive must be whole and readable", f"{type(error).__name__}: {error}"
            raise data_error(rule, got=got, fix="Download it again.", source=self.path) from None

    def _members(self, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
        """The members that tarfile lists.

        tarfile takes a damaged header or the end of the file for the end of the archive. So this also checks that the
        list ends with an end mark and that only zeros follow the mark; otherwise members would be missing unnoticed.
        """
        headers = _Headers(stream)
        file = cast(BinaryIO, headers)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            for info in tar:
                if info.size < 0:
                    raise tarfile.ReadError(f"the member header at byte {info.offset:,} must be whole")
                if "path" in (tar.pax_headers or {}):
                    raise self._refusal(info.name, "must be named in a header of its own", "a name for all members")
                if keys := [key for key in info.pax_headers if key == "size" or key.startswith("GNU.sparse")]:
                    rule, got = "must be a plain file of less than 8 GiB", f"the pax record {keys[0]!r}"
                    raise self._refusal(info.name, rule, got)
                yield info
                info.pax_headers, tar.pax_headers = {}, {}  # otherwise each member gets a copy of all before it
                headers.left = _MOST_HEADERS
        if headers.last != bytes(_BLOCK):
            raise tarfile.ReadError(f"the member header at byte {stream.tell() - _BLOCK:,} must be whole")
        padding = 0
        while chunk := stream.read(_CHUNK):  # to the last byte, since the check sum of gzip stands behind it
            padding += len(chunk)
            if any(chunk) or padding > 2**24:
                raise data_error("nothing but zeros may follow the end mark of the archive", source=self.path)

    def _refusal(self, name: str, rule: str, got: str = "") -> Exception:
        fix = "Nothing was read from this archive."
        return data_error(f"member {name!r} {rule}", got=got or None, fix=fix, source=self.path)


class FolderFiles:
    """Files below a folder. Links are followed only if they stay inside.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise data_error("root must be a folder", got=root)
        self._real = os.path.realpath(self.root)
        self._safe_folders: set[str] = set()

    def has(self, name: str, *, source: str) -> bool:
        """Whether there is a file with this name, which is relative to the folder.

        Args:
            source: the place where the name stands, with which the error begins; for example a list and its line.
        Raises:
            DataError: the name leads out of the folder, because it is absolute or through ``..`` or a link; or the file
                is not a regular file or is larger than 32 MiB.
        """
        path, got = self.root / name, repr(name)
        try:
            if not stays_inside(name) or not self._is_inside(path):
                raise data_error(f"path must stay inside {self.root}", got=got, source=source)
            status = path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise data_error("path must name a file", got=f"{got} ({error.strerror})", source=source) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES_EACH:
            rule = f"path must name a regular file of at most {MOST_BYTES_EACH:,} bytes"
            raise data_error(rule, got=f"{got} of {status.st_size:,} bytes", source=source)
        return True

    def _is_inside(self, path: Path) -> bool:
        parent = os.path.dirname(path)  # noqa: PTH120 - a string is faster, for half a million names
        if parent not in self._safe_folders:
            if not self._leads_inside(parent):
                return False
            self._safe_folders.add(parent)
        return not path.is_symlink() or self._leads_inside(path)

    def _leads_inside(self, path: str | Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._real)

    def digest(self, names: Iterable[str]) -> str:
        """The hex SHA-256 of names and contents."""
        digest = hashlib.sha256()
        for name, data in self.read(names):
            digest.update(f"{name}\0{len(data)}\0".encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of ``names``, which :meth:`has` accepted, with its bytes."""
        for name in names:
            path = self.root / name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise data_error("the file must be readable", got=error.strerror, source=path) from None
            yield name, data


class _Headers:
    """An archive for tarfile to read, whose headers are checked on the way.

    By itself, tarfile reads names of whatever size a header claims, passes over pax records that do not parse, and
    takes the end of the file for the end of the archive. Here each of these is an error.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.tell, self.seek = stream, stream.tell, stream.seek
        self.left = _MOST_HEADERS  # bytes, for the next member
        self.last = self._kind = b""

    def read(self, count: int) -> bytes:
        if self._kind in (b"K", b"X"):  # a file with a damaged type would vanish in them
            raise tarfile.ReadError("a GNU link name or Solaris records, which no regular file needs")
        if not 0 <= count <= self.left:
            raise tarfile.ReadError(f"a member may have {_MOST_HEADERS:,} bytes of names, one claims {count:,} more")
        self.left -= count
        self.last = _take(self._stream, count)
        if self._kind in _PAX and not _is_pax(self.last):
            header = self.tell() - count - _BLOCK
            raise tarfile.ReadError(f"the pax records at byte {header:,} must be whole")
        self._kind = b"" if self._kind in (_GNU_NAME, *_PAX) else self.last[156:157]  # of the header, if this was one
        return self.last


def _is_pax(data: bytes) -> bool:
    """Whether these are records ``<length> <key>=<value>\\n``, up to the end or to a zero behind a record."""
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
