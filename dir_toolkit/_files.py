"""Atomic writing of files, and errors of files that cannot be written."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ._checks import problem

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EIO, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context that adds ``path`` to errors of the file system, which keep their class."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # the package's own, which names it
            raise
        raise unwritable(path, error, kind=type(error)) from error


def unwritable(
    path: str | os.PathLike[str], error: BaseException, *, kind: type[Exception], then: str = ""
) -> Exception:
    """The error for a file or folder that could not be written, with advice for a full disk or a wrong path.

    Args:
        error: the error of the file system.
        kind: the class of the returned error.
        then: the last sentence of the advice.
    """
    folder = next((place for place in (Path(path), *Path(path).parents) if place.exists()), Path())
    if isinstance(error, (FileExistsError, NotADirectoryError)) and not folder.is_dir():
        rule, got, fix = "must be a folder, or lie in one", f"the file {folder}", "Choose another folder."
    else:
        rule, got = "must be writable to its end", f"{type(error).__name__}: {error}"
        full = getattr(error, "errno", None) in _FULL
        fix = "Free the disk, or choose another folder." if full else "Choose a folder that can be written to."
    return problem(f"{os.fspath(path)!r} {rule}", got=got, fix=" ".join(filter(None, (fix, then))), error=kind)


def write_atomically(path: str | os.PathLike[str], writer: Callable[[BinaryIO], object]) -> None:
    """Replace the file ``path`` atomically. Readers see either the old or the new file, also after a crash.

    Args:
        path: a file in an existing folder. Links are followed.
        writer: called with a binary file. If it raises, the old file stays.
    Raises:
        FileNotFoundError: the folder does not exist. IsADirectoryError: ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise problem(
            "path must lie in an existing folder",
            got=repr(os.fspath(path)),
            fix=f"Make {target.parent} first.",
            error=FileNotFoundError,
        )
    if target.is_dir():
        raise problem("path must be a file", got=f"the folder {os.fspath(path)!r}", error=IsADirectoryError)
    # Not tempfile, whose files only their owner can read.
    start = target.name.encode()[:200].decode(errors="ignore")  # file names have at most 255 bytes
    temporary = target.with_name(f".{start}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # other systems cannot open a folder
        try:
            folder = os.open(target.parent, os.O_RDONLY)
        except PermissionError:  # a folder that can be written but not read
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
