"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ._checks import problem


def write_atomically(path: str | os.PathLike[str], writer: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``writer`` writes. A reader, or a crash, meets the whole old file or the whole new one.

    Args:
        path: a file whose folder exists. A link is followed, so that what it points to is replaced.
        writer: called with a binary file. Where it raises, the old file stays, and nothing else is left.
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
    # tempfile would make a file that its owner alone can read. Opened like this it gets the mode of any new file.
    start = target.name.encode()[:200].decode(errors="ignore")  # the name of a file has at most 255 bytes
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
    if os.name == "posix":  # elsewhere a folder cannot be opened
        try:
            folder = os.open(target.parent, os.O_RDONLY)
        except PermissionError:  # a folder that may be written to and not read
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
