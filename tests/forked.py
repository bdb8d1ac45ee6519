"""Processes for tests, forked from one that has loaded torch and more: loading it takes longer than most tests."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.utils.tensorboard", "dir_toolkit.experiment.training.loop"]
)


class Forked:
    """``function(connection, *arguments)`` of a file of tests in a process of its own, where warnings are errors.

    What it sends over the connection arrives here in turn, and last of all the traceback of an error that ended it.
    """

    def __init__(self, file: str | Path, function: str, *arguments: Any) -> None:
        self.connection, theirs = _FORKS.Pipe()
        self.process = _FORKS.Process(target=_run, args=(theirs, str(file), function, arguments))
        self.process.start()
        theirs.close()

    def receive(self, timeout: float = 200) -> Any:
        """What it says next, or None once it has ended."""
        try:
            assert self.connection.poll(timeout), "the process hangs"
            return self.connection.recv()
        except (EOFError, ConnectionError):
            return None

    def finish(self, timeout: float = 200) -> list[Any]:
        """What it says until it ends."""
        said = list(iter(lambda: self.receive(timeout), None))
        self.process.join(timeout)
        return said

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def load(file: str) -> Any:
    """A file of tests as a module."""
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run(connection: Connection, file: str, function: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.4 warns of its own calls
    try:
        getattr(load(file), function)(connection, *arguments)
    except BaseException:
        connection.send(traceback.format_exc())
        sys.exit(1)
