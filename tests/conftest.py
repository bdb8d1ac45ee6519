"""What tests of several folders share, and the program that ``two_ranks`` starts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dir_toolkit.errors import ShapeError

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
    attack.addoption("--mutations", type=int, default=200, help="mutations of each kind of file (default: 200)")
    attack.addoption("--kills", type=int, default=2, help="kills of a training run (default: 2)")


@pytest.fixture
def mutations(request: pytest.FixtureRequest) -> int:
    """How many mutations of each kind of file are tried; a quarter as many wrong arguments of each function."""
    return int(request.config.getoption("--mutations"))


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How many times a training run is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(params=NOT_COUNTS)
def not_counts(request: pytest.FixtureRequest) -> tuple[Any, type[Exception], str]:
    """What no function takes for counts, the error it raises, and how its message goes on after the function's name."""
    return request.param


class Ranks:
    """Two processes joined by gloo, which run one function after another: starting them takes longer than most tests.

    A pair in which a function failed or hung is not used again.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pair: list[subprocess.Popen[str]] = []

    def run(self, file: Path, function: str, folder: Path, timeout: float) -> list[Any]:
        if not self._pair:
            self._start()
        for process in self._pair:
            assert process.stdin is not None
            print(json.dumps([str(file), function, str(folder)]), file=process.stdin, flush=True)
        sound = False
        try:
            with ThreadPoolExecutor(2) as pool:
                answers = [pool.submit(process.stdout.readline) for process in self._pair]  # type: ignore[union-attr]
                done = futures.wait(answers, timeout, return_when=futures.FIRST_EXCEPTION)[0]
                sound = len(done) == 2 and all(answer.result() == "done\n" for answer in done)
                if not sound:
                    self.stop()  # which ends the lines that are waited for
        finally:
            if not sound:
                self.stop()
        assert sound, "a rank failed, which its traceback above tells, or the two have hung"
        return [torch.load(folder / f"returned{rank}.pt", weights_only=True) for rank in range(2)]

    def _start(self) -> None:
        program = [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", __file__]
        meeting = str(Path(tempfile.mkdtemp(dir=self._folder.name)) / "meet")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._pair = [
            subprocess.Popen(
                [*program, meeting, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank in range(2)
        ]

    def stop(self) -> None:
        for process in self._pair:
            process.kill()
        for process in self._pair:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
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

    Returns what it returned in each, which ``torch.load`` must be able to read. With ``fresh`` the processes are new
    and not used again, for what keeps global state.
    """

    def run(main: Callable[[int], object], *, timeout: float = 60, fresh: bool = False) -> list[Any]:
        if fresh:
            ranks.stop()
        try:
            return ranks.run(request.path, main.__name__, tmp_path, timeout)
        finally:
            if fresh:
                ranks.stop()

    return run


def be_rank(meeting: str, rank: int) -> None:
    """One of the two processes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a test prints is no answer
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for line in sys.stdin:
        file, function, folder = json.loads(line)
        os.chdir(folder)
        sys.path.insert(0, str(Path(file).parent))
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        torch.save(getattr(module, function)(rank), f"returned{rank}.pt")
        dist.barrier()
        sys.path.pop(0)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    be_rank(sys.argv[1], int(sys.argv[2]))
