"""Atomic writing of files."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ._checks import problem


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
