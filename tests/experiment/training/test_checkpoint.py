from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

from dir_toolkit._files import write_atomically
from dir_toolkit.errors import CheckpointError
from dir_toolkit.experiment.training import checkpoint
from dir_toolkit.experiment.training.checkpoint import load_checkpoint, save_checkpoint


def state() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "name": "run",
        "history": [{"loss": 0.5, "nan": float("nan")}],
        "pair": (1, None, True),
    }


class Malicious:
    """What an attacker's pickle does: make a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved = state()
    save_checkpoint(tmp_path / "c.pt", saved)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded["pair"] == (1, None, True)
    assert loaded["history"][0]["loss"] == 0.5
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    moments = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, saved["optimizer"]["state"][0]["exp_avg"])
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"a": {"b": [1, np.float64(2)]}}, r"state\['a'\]\['b'\]\[1\] must be a tensor or a plain value, got float64"),
        ({"rng": np.zeros(2)}, r"state\['rng'\] .* got ndarray"),
        ({"a": {2.5: 1}}, r"keys of state\['a'\] must be str or int, got 2.5"),
        ({"size": torch.zeros(2).shape}, r"state\['size'\] .* got Size"),
        ({"model": nn.Linear(1, 1)}, r"state\['model'\] .* got Linear"),
        ([1], "state must be a dict, got list"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path: Path, value: Any, key: str) -> None:
    save_checkpoint(tmp_path / "c.pt", {"old": 1})
    with pytest.raises(CheckpointError, match=key):
        save_checkpoint(tmp_path / "c.pt", value)
    assert load_checkpoint(tmp_path / "c.pt") == {"old": 1}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file .*absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "c.pt", tmp_path / "trace"
    torch.save({"model": Malicious(trace)}, file)
    with pytest.raises(CheckpointError, match=r"c\.pt.*Nothing in it was run.*another folder"):
        load_checkpoint(file)
    file.write_bytes(pickle.dumps({"model": Malicious(trace)}))
    with pytest.raises(CheckpointError, match="tensors and plain values"):
        load_checkpoint(file)
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists(), "the attack itself must work, or this test shows nothing"


def test_a_state_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="got a list"):
        load_checkpoint(tmp_path / "c.pt")


def test_damaged_bytes_never_pass_and_only_our_error_comes_out(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    save_checkpoint(file, {"weight": torch.arange(200.0), "epoch": 3})
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    refusals = []
    for _ in range(60):
        start = int(random.integers(len(whole)))
        flipped = whole[:start] + bytes([whole[start] ^ int(random.integers(1, 256))]) + whole[start + 1 :]
        for damaged in (flipped, whole[:start], whole + random.bytes(9)):
            file.write_bytes(damaged)
            try:
                loaded = load_checkpoint(file)
            except CheckpointError as error:
                refusals.append(str(error))
            else:  # a byte that carries nothing, such as padding or a date
                assert torch.equal(loaded["weight"], torch.arange(200.0))
                assert loaded["epoch"] == 3
    assert len(refusals) > 60
    assert all(str(file) in message for message in refusals)


def test_a_flipped_weight_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    save_checkpoint(file, {"weight": torch.full((100,), 1.5)})
    data = file.read_bytes()
    start = data.index(torch.full((100,), 1.5).numpy().tobytes())
    file.write_bytes(data[:start] + b"\x01" + data[start + 1 :])
    with pytest.raises(CheckpointError, match="bytes that have changed"):
        load_checkpoint(file)


class FullDisk:
    """A file on a disk with room for a hundred bytes more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._room = file, 100

    def write(self, data: bytes) -> int:
        if len(data) > self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def test_a_full_disk_is_named_and_spares_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint-last.pt"
    save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(
        checkpoint, "write_atomically", lambda path, writer: write_atomically(path, lambda file: writer(FullDisk(file)))
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-last\.pt' must be writable to its end.*No space left"):
        save_checkpoint(path, {"step": 2, "weights": torch.zeros(10_000)})
    assert load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["checkpoint-last.pt"]  # noqa: PTH208
