"""What tests of several folders share, and the program that ``two_ranks`` starts."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
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
    ([[1, 2]], ShapeError, r"counts must be one row of numbers, got shape \(1, 2\)"),
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


@pytest.fixture
def two_ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a function ``main(rank)`` of the test's module in two processes in tmp_path, joined by gloo.

    Returns what it returned in each, which ``torch.load`` must be able to read.
    """

    def run(main: Callable[[int], object], *, timeout: float = 60) -> list[Any]:
        program = [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", __file__]
        # One thread each, as torchrun has it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ranks = [
            subprocess.Popen(
                [*program, str(request.path), main.__name__, str(rank)],
                cwd=tmp_path,
                env=environment,
            )
            for rank in range(2)
        ]
        try:
            assert [rank.wait(timeout=timeout) for rank in ranks] == [0, 0]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [torch.load(tmp_path / f"returned{rank}.pt", weights_only=True) for rank in range(2)]

    return run


def be_rank(file: str, function: str, rank: int) -> None:
    """One of the two processes."""
    sys.path.insert(0, str(Path(file).parent))
    main = getattr(importlib.import_module(Path(file).stem), function)
    dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/meet", rank=rank, world_size=2)
    torch.save(main(rank), f"returned{rank}.pt")
    dist.barrier()
    os._exit(0)  # taking gloo down can hang


if __name__ == "__main__":
    be_rank(sys.argv[1], sys.argv[2], int(sys.argv[3]))
