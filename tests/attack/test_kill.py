"""Training that is killed, meets a full disk or is started twice; also the process that is killed.

``pytest tests/attack/test_kill.py --kills 20`` is the full attack.
"""

from __future__ import annotations

import csv
import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from forked import Forked
from torch import nn

from dir_toolkit import FDS, LDS, Bins, LabelDensity, RegressionMetrics, weighted_l1
from dir_toolkit._files import write_atomically
from dir_toolkit.errors import CheckpointError, RunExistsError
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.files import FolderLock
from dir_toolkit.experiment.training.checkpoint import load_checkpoint, save_checkpoint
from dir_toolkit.experiment.training.log import RunLog
from dir_toolkit.experiment.training.loop import Optimization, fit
from dir_toolkit.experiment.training.runtime import Runtime

BINS = Bins.uniform(0, 20, width=1)
CHECKPOINTS = ("checkpoint-last.pt", "checkpoint-best.pt")
EPOCHS, STEPS = 6, 4


def image_set(samples: int, seed: int) -> ImageSet:
    chance = np.random.default_rng(seed)
    labels = np.minimum(chance.exponential(5, samples), 19).astype(np.float32)
    images = (chance.integers(0, 60, (samples, 3, 8, 8)) + labels[:, None, None, None] * 9).astype(np.uint8)
    rows = np.arange(samples)
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 5 + self.head(self.backbone(images)).squeeze(1)


def train(folder: Path, *, resume: bool = False, epochs: int = EPOCHS, loss: Any = weighted_l1) -> None:
    """Weights, FDS, dropout, BatchNorm and augmentation; a checkpoint is written at each step, so one is hit often."""
    runtime = Runtime(torch.device("cpu"), seed=3)
    data = image_set(40, 0)
    with runtime.seeded("init"):
        model = Regressor()
    fds = FDS(BINS, 8)
    fds.attach(model.head, "input")
    fit(
        model,
        data,
        image_set(20, 1),
        metrics=RegressionMetrics(LabelDensity.count(data.labels, BINS)),
        loss=loss,
        weights=LDS(BINS).fit(data.labels),
        fds=fds,
        optimization=Optimization(epochs=epochs, batch_size=10, lr=0.01),
        runtime=runtime,
        folder=folder,
        resume=resume,
        checkpoint_minutes=0,
    )


def start(what: str, folder: Path, room: int = 0) -> Forked:
    """``main`` in a process, which says "ready" before it trains, and "step" in each step until it is told to go on."""
    process = Forked(__file__, "main", what, folder, room)
    assert (said := process.receive()) == "ready", said
    return process


def to_the_end(process: Forked) -> list[str]:
    """What it says from here, of which a run that ends well says nothing but its steps."""
    with suppress(OSError):  # it may have been killed
        process.connection.send("to the end")
    return process.finish()


def errors_of(process: Forked) -> str:
    return "".join(said for said in to_the_end(process) if said != "step")


def same(a: Any, b: Any) -> bool:
    """Nested states with equal bits, whatever time they took."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a if name != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


def same_runs(one: Path, two: Path) -> bool:
    return all(same(load_checkpoint(one / name), load_checkpoint(two / name)) for name in CHECKPOINTS)


def torn_files(folder: Path) -> list[str]:
    """Files that cannot be read to their end; what a kill left half written has a name of its own, ending in .tmp."""
    torn = []
    for path in folder.iterdir():
        try:
            if path.suffix == ".pt":
                load_checkpoint(path)
            elif path.name == "history.csv":
                rows = list(csv.DictReader(path.read_text().splitlines()))
                assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
                assert all(None not in row.values() for row in rows)
            elif not path.name.startswith("events.") and not path.name.endswith(".tmp"):
                torn.append(f"{path.name}, which is of no known kind")
        except (AssertionError, CheckpointError, KeyError, ValueError) as error:
            torn.append(f"{path.name}: {error}")
    return torn


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unkilled run."""
    folder = tmp_path_factory.mktemp("whole")
    assert to_the_end(start("train", folder)) == EPOCHS * STEPS * ["step"]
    return folder


def test_the_helpers_see_what_they_are_to_see(tmp_path: Path, whole: Path) -> None:
    assert torn_files(whole) == []
    assert same_runs(whole, whole)
    folder = shutil.copytree(whole, tmp_path / "copy")
    state = load_checkpoint(folder / CHECKPOINTS[0])
    state["model"]["head.bias"] += 1e-6
    save_checkpoint(folder / CHECKPOINTS[0], state)
    assert not same_runs(folder, whole)
    (folder / CHECKPOINTS[1]).write_bytes((folder / CHECKPOINTS[1]).read_bytes()[:-100])
    (folder / "history.csv").write_text((folder / "history.csv").read_text()[:-20])
    assert len(torn_files(folder)) == 2


def kill_in_step(process: Forked, step: int, chance: random.Random) -> None:
    """Kill a process at a random moment of its step so many, of 0 before the first, if it gets that far."""
    took = 0.3  # seconds, from "ready" to the first step
    for _ in range(step):
        before = time.monotonic()
        if process.receive() is None:
            return
        took = time.monotonic() - before
        process.connection.send("one more")
    time.sleep(chance.uniform(0, 2 * took))  # the epoch's last step takes longer, and validation follows
    process.process.kill()


def test_killed_at_any_moment_and_resumed_gives_equal_bits(tmp_path: Path, whole: Path, kills: int) -> None:
    """Each run is killed and resumed until it ends by itself; steps and the moments in them are drawn."""
    chance = random.Random(5)
    killed, runs, places = 0, 0, []
    while killed < kills:
        folder = tmp_path / str(runs)
        last = folder / CHECKPOINTS[0]
        runs += 1
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            process = start("resume" if last.exists() else "train", folder)
            if killed < kills:
                kill_in_step(process, chance.randrange(3 * STEPS) if killed else 3, chance)
            errors, code = errors_of(process), process.code
            assert code in (0, -signal.SIGKILL), errors
            if folder.exists():
                assert torn_files(folder) == []
            if code:
                killed += 1
                progress = load_checkpoint(last)["progress"] if last.exists() else {"epoch": 0, "step": 0}
                places.append((progress["epoch"], progress["step"]))
        assert same_runs(folder, whole)
    print(f"{killed} kills in {runs} runs, after (epoch, step): {', '.join(map(str, places))}")
    assert any(step > 0 for _, step in places)
    assert len({*places}) > killed // 3


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path, whole: Path) -> None:
    first = start("wait", tmp_path)
    try:
        for resume in (False, True):
            with pytest.raises(RunExistsError, match=f"one process at a time.* at work in {tmp_path}.*--resume"):
                train(tmp_path, resume=resume)
    finally:
        first.kill()
    for _ in range(2):  # a lock ends with its holder, however that ends, and is free after a finished run
        again = start("resume", tmp_path)
        assert (errors_of(again), again.code) == ("", 0)
    assert same_runs(tmp_path, whole)


def test_a_refused_run_leaves_no_lock(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    with pytest.raises(RunExistsError, match="never overwritten") as refused:
        train(tmp_path, epochs=1)
    assert FolderLock(tmp_path).held, refused  # whose frames are still alive


class Attack:
    """What an attacker's pickle does: make a folder when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_run_is_not_resumed_from_a_checkpoint_with_code_in_it(tmp_path: Path) -> None:
    run, trace = tmp_path / "run", tmp_path / "trace"
    train(run, epochs=1)
    torch.save({**load_checkpoint(run / CHECKPOINTS[0]), "more": Attack(trace)}, run / CHECKPOINTS[0])
    with pytest.raises(CheckpointError, match=r"checkpoint-last\.pt.*Nothing in it was run"):
        train(run, resume=True, epochs=1)
    assert not trace.exists()
    torch.load(run / CHECKPOINTS[0], weights_only=False)
    assert trace.exists(), "the attack itself must work, or this test shows nothing"


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= len(data)
        return self._file.write(data)


@pytest.mark.parametrize("room", [0, 1, 150])
def test_a_full_disk_spares_the_old_file(tmp_path: Path, room: int) -> None:
    path = tmp_path / "results.nc"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        disk = FullDisk(file, room)
        for _ in range(2):
            disk.write(bytes(100))

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert [left.name for left in tmp_path.iterdir()] == ["results.nc"]


def test_a_disk_that_fills_up_in_training_is_named_and_spares_the_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    """Checkpoints grow with the history, so that the first ones are written and a later one is not."""
    size = (whole / CHECKPOINTS[0]).stat().st_size
    errors = errors_of(start("limited", tmp_path, size - 300))
    assert "CheckpointError: fit: " in errors
    assert "must be writable to its end, got OSError: [Errno 27] File too large" in errors
    assert torn_files(tmp_path) == []
    assert not list(tmp_path.glob(".*"))
    assert 1 < load_checkpoint(tmp_path / CHECKPOINTS[0])["progress"]["epoch"] < EPOCHS
    assert errors_of(start("resume", tmp_path)) == ""
    assert same_runs(tmp_path, whole)


@pytest.mark.parametrize(("room", "says"), [(3, "RunLog: '{}/history.csv'"), (150, "RunLog.end_epoch: '{}'")])
def test_a_log_that_meets_a_full_disk_names_it(tmp_path: Path, room: int, says: str) -> None:
    """The history, and TensorBoard's events, whose own thread meets it."""
    errors = errors_of(start("log", tmp_path, room))
    assert f"OSError: {says.format(tmp_path)} must be writable to its end, got OSError: [Errno 27]" in errors
    assert torn_files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, error in (("file/run", NotADirectoryError), ("file", FileExistsError)):
        says = (
            f"fit: '{tmp_path}/{place}' must be a folder, or lie in one, got the file {tmp_path}/file. Choose another"
        )
        with pytest.raises(error, match=f"^{re.escape(says)}"):
            train(tmp_path / place)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are those of POSIX")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """By a mode where that binds; root is stopped by a file system that takes no files."""
    folder = tmp_path
    if os.geteuid() == 0:
        folder = Path("/proc/self")
        if not folder.is_dir():
            pytest.skip("root may write everywhere, and there is no /proc")
    else:
        folder.chmod(0o500)
    with pytest.raises(OSError, match=r"Permission denied|No such file|not permitted|Read-only"):
        write_atomically(folder / "checkpoint-last.pt", lambda file: file.write(b"new"))
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"checkpoint-last\.pt"):
        save_checkpoint(folder / "checkpoint-last.pt", {"step": 1})
    with pytest.raises(OSError, match=rf"^fit: '{folder}/history\.csv' must be writable"):
        train(folder)
    if folder == tmp_path:
        folder.chmod(0o700)


TALK: dict[str, Any] = {}  # with whom a process talks, and whether it waits for answers


def step_by_step(*arguments: Any, **options: Any) -> torch.Tensor:
    """A loss that says "step" and waits for an answer, until it is told to go on to the end."""
    TALK["connection"].send("step")
    TALK["waits"] = TALK["waits"] and TALK["connection"].recv() == "one more"
    return weighted_l1(*arguments, **options)


def main(connection: Connection, what: str, folder: Path, room: int) -> None:
    lock = FolderLock(folder) if what == "wait" else None
    connection.send("ready")
    if room:  # bytes that a file may take
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    TALK.update(connection=connection, waits=True)
    if lock is not None:
        assert lock.held
        time.sleep(600)
    elif what == "log":
        with RunLog(folder, Runtime(torch.device("cpu"), seed=0), steps_per_epoch=1) as log:
            log.end_epoch({"epoch": 1, "step": 1, "loss": 1.0, "lr": 1.0, "seconds": 1.0, "val_mae": 1.0})
    else:
        train(folder, resume=what == "resume", loss=step_by_step)
