"""Files that are written whole or not at all: checkpoints, caches, results."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ._checks import problem

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], writer: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``writer`` writes; a reader, or a crash, meets the old file or the new one, whole.

    Args:
        path: its folder must exist; a link is followed, so that what it points to is replaced.
        writer: is handed a binary file. Where it raises, the old file stays and nothing is left behind.
    Raises:
        FileNotFoundError: the folder does not exist. IsADirectoryError: ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise problem(
            "write_atomically",
            "path must lie in an existing folder",
            got=repr(os.fspath(path)),
            fix=f"Make {target.parent} first.",
            error=FileNotFoundError,
        )
    if target.is_dir():
        raise problem(
            "write_atomically", "path must be a file", got=f"the folder {os.fspath(path)!r}", error=IsADirectoryError
        )
    # tempfile would make it readable by its owner alone; opened like this it gets the mode that any new file gets.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
