"""Errors of files, locks between processes, and a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import naming, unwritable

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["FolderLock", "naming", "one_at_a_time", "progress_bar", "unwritable"]


class FolderLock:
    """A lock on a folder. It creates no file, and is released when the process ends, even if it is killed.

    On Windows, on some network drives, and for folders that cannot be read there is no lock, and ``held`` is always
    true.

    Attributes:
        held: whether this object holds the lock. If not, another process or object holds it.
    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.held = True
        self._descriptor: int | None = None
        if os.name != "posix":  # other systems cannot open a folder
            return
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:  # a folder that can be written but not read
            return
        if _lock(self._descriptor, wait=False) is False:
            self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self.held, self._descriptor = False, None


@contextmanager
def one_at_a_time(path: Path) -> Iterator[bool]:
    """A context that waits for and holds the lock on a file, which is created if missing. Yields whether locks
    exist."""
    with path.open("ab") as file:
        yield _lock(file.fileno(), wait=True) is not None


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether this process has the lock; None if there are no locks, as on Windows and some network drives."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def progress_bar() -> Progress | None:
    """A progress bar on stderr, or None unless it is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    return Progress(console=Console(stderr=True), transient=True)
