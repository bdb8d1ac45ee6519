from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dir_toolkit.experiment.files import progress_bar
from dir_toolkit.experiment.training.log import RunLog
from dir_toolkit.experiment.training.runtime import Runtime

MAIN = Runtime(torch.device("cpu"))


def row(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 5 * epoch,
        "lr": 0.002,
        "loss": 7.0 / epoch,
        "val_mae": 9.0,
        "val_mae_many": 5.0,
        "val_mae_medium": 8.0,
        "val_mae_few": float("nan"),
        "val_bmae": 13.0 + epoch,
        "seconds": 1.5 * epoch,
    }


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(folder: Path, epochs: range, history: list[dict[str, Any]]) -> None:
    with RunLog(folder, MAIN, steps_per_epoch=5, history=history, step=5 * len(history)) as log:
        for epoch in epochs:
            log.start_epoch(epoch)
            for _ in range(5):
                log.step()
            log.end_epoch(row(epoch), best=epoch == 1)


def test_one_row_an_epoch_and_a_header_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, range(1, 4), [])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert len(lines) == 4
    assert lines[0].split() == ["epoch", "loss", "lr", "MAE", "many", "medium", "few", "bMAE", "seconds"]
    assert lines[1].split() == ["1", "7.000", "2.0e-03", "9.00", "5.00", "8.00", "nan", "14.00", "2", "*"]
    assert len(lines[0]) == len(lines[2])
    rows = read_history(tmp_path)
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3]
    assert float(rows[2]["loss"]) == 7.0 / 3


def test_classification_errors_have_their_own_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, MAIN, steps_per_epoch=5) as log:
        plain = {name: value for name, value in row(1).items() if not name.startswith("val_")}
        errors = {"val_error": 0.02, "val_balanced_error": 0.03, "val_balanced_error_few": 0.05}
        log.end_epoch({**plain, **errors})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "loss", "lr", "error", "BER", "few", "seconds"]
    assert lines[1].split() == ["1", "7.000", "2.0e-03", "0.0200", "0.0300", "0.0500", "2"]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"val/error/all", "val/balanced_error/all", "val/balanced_error/few"} < set(events.Tags()["scalars"])


def test_a_row_of_other_columns_is_refused_and_not_written(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), MAIN, steps_per_epoch=5)
    with pytest.raises(ValueError, match=r"RunLog.end_epoch: row must hold .* got missing \['lr'\], unknown \[\]"):
        log.end_epoch({name: value for name, value in row(1).items() if name != "lr"})
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['mae', 'val_luck', 'val_mae_dozens'\]"):
        log.end_epoch({**row(1), "mae": 1.0, "val_luck": 1.0, "val_mae_dozens": 1.0})
    assert read_history(tmp_path) == []


def test_rows_after_the_resumed_epoch_are_dropped(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4), [])
    with RunLog(tmp_path, MAIN, steps_per_epoch=5, history=[row(1)], step=7):
        assert [int(r["epoch"]) for r in read_history(tmp_path)] == [1]


def test_tensorboard_holds_the_promised_tags_and_each_epoch_once_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4), [])
    run(tmp_path, range(2, 5), [row(1)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {"train/loss", "train/lr", "val/mae/all", "val/mae/many", "val/mae/medium", "val/mae/few", "val/bmae/all"}
    assert set(events.Tags()["scalars"]) == tags
    assert [event.step for event in events.Scalars("val/bmae/all")] == [5, 10, 15, 20]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, Runtime(torch.device("cpu"), rank=1, world=2), steps_per_epoch=5) as log:
        log.start_epoch(1)
        log.step()
        log.end_epoch(row(1))
        log.say("stopped")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(tmp_path, range(1, 2), [])
    assert "epoch 1" in terminal.getvalue()


def test_without_rich_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setitem(__import__("sys").modules, "rich.progress", None)
    assert progress_bar() is None
