"""Files from outside, in a tar archive or in a folder: each is checked before any is read, and none is extracted."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from .._checks import problem
from ..errors import DataError

__all__ = ["Files", "FolderFiles", "TarFiles", "stays_inside"]

MOST_BYTES_EACH = 2**25
_BLOCK = 512
_MOST_LONG_NAME = 2**16
_CHUNK = 2**16
_REGULAR, _FOLDER, _GNU_NAME, _PAX, _PAX_GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"
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

    Members may be regular files and folders in the ustar, GNU or pax format. The standard ``tarfile`` ends a listing
    silently at a damaged header, and reads a long name of any size into memory; here both are refused.

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
            for count, (name, kind, start, size) in enumerate(self._members(stream, most_bytes), 1):
                plain = "/".join(part for part in name.split("/") if part not in ("", "."))
                if count > most_files:
                    raise self._refusal(name, f"must be among the first {most_files:,} members")
                if not stays_inside(name) or (not plain and kind != _FOLDER):
                    raise self._refusal(name, "must have a name inside the archive, without '..'")
                if kind not in (_FOLDER, *_REGULAR):
                    raise self._refusal(name, "must be a regular file or a folder", got=_REFUSED.get(kind, repr(kind)))
                most = 0 if kind == _FOLDER else most_bytes_each
                if size > most:
                    raise self._refusal(name, f"must hold at most {most:,} bytes", got=f"{size:,}")
                if plain in self._places or (kind != _FOLDER and plain in folders):
                    raise self._refusal(name, "must stand in the archive once", got="it twice")
                if kind == _FOLDER:
                    folders.add(plain)
                else:
                    self._places[plain] = (start, size)

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
        with self._stream() as stream:
            for name in names:
                start, size = self._places[name]
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
        except (OSError, EOFError, zlib.error) as error:
            raise problem(
                str(self.path),
                "the archive must be whole and readable",
                got=f"{type(error).__name__}: {error}",
                fix="Download it again.",
                error=DataError,
            ) from None

    def _members(self, stream: BinaryIO, most_bytes: int) -> Iterator[tuple[str, bytes, int, int]]:
        """Name, kind, first byte and length of each member; what a member holds is passed over once it was accepted."""
        at, long_name = 0, ""
        while (block := _take(stream, _BLOCK)) != bytes(_BLOCK):
            size, checksum = _octal(block[124:136]), _octal(block[148:156])
            if size is None or checksum != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
                raise problem(
                    str(self.path),
                    f"the member header at byte {at:,} must be whole",
                    got="a damaged one",
                    fix="Download the archive again.",
                    error=DataError,
                )
            kind, start = block[156:157], at + _BLOCK
            padded = -(-size // _BLOCK) * _BLOCK
            if start + size > most_bytes:
                rule = f"must end within the first {most_bytes:,} bytes"
                raise self._refusal(_text(block[:100]), rule, got=f"{start + size:,}")
            if kind in (_GNU_NAME, _PAX, _PAX_GLOBAL):
                if size > _MOST_LONG_NAME:
                    raise self._refusal(
                        _text(block[:100]), f"must be at most {_MOST_LONG_NAME:,} bytes of names", got=f"{size:,}"
                    )
                data = _take(stream, padded)[:size]
                if kind == _GNU_NAME:
                    long_name = _text(data)
                else:
                    path = self._pax_path(data, at)
                    if path and kind == _PAX_GLOBAL:
                        raise self._refusal(path, "must be named in a header of its own", got="a name for all members")
                    long_name = path or long_name
            else:
                name = _text(block[:100])
                if block[257:263] == b"ustar\0" and block[345] != 0:
                    name = f"{_text(block[345:500])}/{name}"
                yield long_name or name, kind, start, size
                long_name = ""
                for done in range(0, padded, _CHUNK):
                    _take(stream, min(_CHUNK, padded - done))
            at = start + padded
        padding = 0
        while chunk := stream.read(_CHUNK):  # to the last byte, for gzip's check sum stands behind it
            padding += len(chunk)
            if any(chunk) or padding > 2**24:
                raise problem(str(self.path), "nothing but zeros may follow the archive's end mark", error=DataError)

    def _pax_path(self, data: bytes, at: int) -> str:
        """The name that pax records give to the next member, or nothing."""
        path = ""
        while data:
            length, _, _ = data[:8].partition(b" ")
            end = int(length) if length.isdigit() else 0
            record = data[len(length) + 1 : end]
            if not record.endswith(b"\n") or end > len(data):
                raise problem(str(self.path), f"the pax records at byte {at:,} must be whole", error=DataError)
            key, _, value = record[:-1].partition(b"=")
            if key == b"size" or key.startswith(b"GNU.sparse"):
                raise problem(
                    str(self.path),
                    "members must be plain files of less than 8 GiB",
                    got=f"the pax record {_text(key)!r} at byte {at:,}",
                    error=DataError,
                )
            if key == b"path":
                path = _text(value)
            data = data[end:]
        return path

    def _refusal(self, name: str, rule: str, *, got: object = None) -> Exception:
        return problem(
            str(self.path),
            f"member {name!r} {rule}",
            got=got,
            fix="Nothing was read from this archive.",
            error=DataError,
        )


class FolderFiles:
    """Files below a folder, links followed only as long as they stay inside.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise problem("FolderFiles", "root must be a folder", got=str(root), error=DataError)
        self._real = os.path.realpath(self.root)
        self._safe_folders: set[str] = set()

    def has(self, name: str, *, where: str) -> bool:
        """Whether there is a file of this name, relative to the folder.

        Args:
            where: who asks, to begin the error with: a file and its line, for example.
        Raises:
            DataError: the name leads out of the folder, through ``..`` or a link or from the file system's root; or
                what it names is no regular file or larger than 32 MiB.
        """
        path = self.root / name
        try:
            if not stays_inside(name) or not self._is_inside(path):
                raise problem(where, f"path must stay inside {self.root}", got=repr(name), error=DataError)
            status = path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise problem(where, "path must name a file", got=f"{name!r} ({error.strerror})", error=DataError) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES_EACH:
            got = f"{name!r} of {status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else repr(name)
            raise problem(
                where, f"path must name a regular file of at most {MOST_BYTES_EACH:,} bytes", got=got, error=DataError
            )
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
                    str(self.root / name), "the file must be readable", got=error.strerror, error=DataError
                ) from None
            yield name, data


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("it ends too early")
    return data


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(b"[0-7]*", digits) and digits else None


def _text(field: bytes) -> str:
    """A name up to its first NUL; bytes that are no UTF-8 are shown escaped, so that they name nothing by accident."""
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
