"""What tests of several folders share, and what the processes of ``two_ranks`` do."""

from __future__ import annotations

import gc
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dir_toolkit.errors import ShapeError

sys.path.insert(0, str(Path(__file__).parent))  # which pytest's importlib mode does not

import madeup
from forked import Forked, load
from sketching import sketch

gc.disable()  # until all tests are collected: looking for cycles among what stays takes a third of the collection

# Tensors of tests are small, and threads that wait for one another stall on a machine with other work. What tests start
# runs on as many threads, too, since sums of other threads end in other digits.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

NOT_COUNTS: list[tuple[Any, type[Exception], str]] = [
    ([[1, 2]], ShapeError, r"counts must be \(B,\), one per bin, got shape \(1, 2\)"),
    ([], ValueError, "counts must hold at least one value"),
    ([1, -2], ValueError, "counts must not be negative, got a minimum of -2"),
    ([1, math.nan], ValueError, r"counts must be finite, got nan at index \[1\]"),
    ([1, math.inf], ValueError, "counts must be finite"),
    ("abc", TypeError, "counts must be integers or floats"),
    (torch.ones(2, device="meta"), ValueError, "counts must hold values, got a tensor on the meta device"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    attack = parser.getgroup("attack", "how hard tests/attack tries")
    attack.addoption("--mutations", type=int, default=100, help="mutations of each kind of file (default: 100)")
    attack.addoption("--kills", type=int, default=2, help="kills of a training run (default: 2)")
    accelerator = parser.getgroup("accelerator", "where tests marked gpu run")
    accelerator.addoption("--device", choices=("cuda", madeup.NAME), default="cuda", help="cuda, or one made up")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == madeup.NAME:
        if not madeup.EXISTS:
            raise pytest.UsageError(f"--device {madeup.NAME} needs torch 2.10 or newer")
        madeup.start()


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay to the end, and need not be looked at again
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that libraries end without a word of leaks


@pytest.fixture
def mutations(request: pytest.FixtureRequest) -> int:
    """How many mutations of each kind of file are tried; a third as many wrong arguments of each function."""
    return int(request.config.getoption("--mutations"))


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How many times a training run is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(params=NOT_COUNTS)
def not_counts(request: pytest.FixtureRequest) -> tuple[Any, type[Exception], str]:
    """What no function takes for counts, the error it raises, and how its message goes on after the function's name."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Files are not written through to the disk, which takes milliseconds per file and matters after a power cut only.

    Tests of processes that are killed start their own, which do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def unsynced_database() -> Iterator[None]:
    """The same for the files of searches."""
    sqlalchemy = pytest.importorskip("sqlalchemy")

    def connect(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connect)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connect)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are made and not drawn, which takes longest: for tests that look at other files."""
    sketch(monkeypatch)


class Ranks:
    """Two processes joined by gloo, which run one function after another: starting them takes longer than most tests.

    A pair in which a function failed or hung is not used again.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pair: list[Forked] = []

    def run(self, file: Path, function: str, folder: Path, timeout: float) -> list[Any]:
        if not self._pair:
            meeting = str(Path(tempfile.mkdtemp(dir=self._folder.name)) / "meet")
            self._pair = [Forked(__file__, "be_rank", meeting, rank) for rank in range(2)]
        for process in self._pair:
            process.connection.send([str(file), function, str(folder)])
        try:
            for process in self._pair:
                assert (said := process.receive(timeout)) == "done", said or "the process ended"
        except BaseException:
            self.stop()
            raise
        return [torch.load(folder / f"returned{rank}.pt", weights_only=True) for rank in range(2)]

    def stop(self) -> None:
        for process in self._pair:
            process.kill()
        self._pair = []

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.close()


@pytest.fixture
def two_ranks(request: pytest.FixtureRequest, tmp_path: Path, ranks: Ranks) -> Callable[..., list[Any]]:
    """Run a function ``main(rank)`` of the test's module in two processes in tmp_path, joined by gloo.

    Returns what it returned in each, which ``torch.load`` must be able to read.
    """

    def run(main: Callable[[int], object], *, timeout: float = 60) -> list[Any]:
        return ranks.run(request.path, main.__name__, tmp_path, timeout)

    return run


def be_rank(connection: Connection, meeting: str, rank: int) -> None:
    """One of the two processes."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    while True:
        file, function, folder = connection.recv()
        os.chdir(folder)
        module = load(file)
        torch.manual_seed(0)
        torch.save(getattr(module, function)(rank), f"returned{rank}.pt")
        dist.barrier()
        sys.path.pop(0)
        connection.send("done")
