"""The log of a run: history.csv, TensorBoard, a table on the terminal and a progress bar."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._checks import require
from ..._files import write_atomically
from ...labels.density import REGIONS
from ...metrics._declared import METRICS
from ...metrics._metric import Metric
from ..files import naming, progress_bar
from .runtime import Runtime

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunLog"]

_COLUMNS = {
    "epoch": ("epoch", "{:d}"),
    "loss": ("loss", "{:.3f}"),
    "lr": ("lr", "{:.1e}"),
    "seconds": ("seconds", "{:.0f}"),
}
_WIDTH = 8


class RunLog:
    """A context manager that writes and prints a run's history on the main rank, and does nothing on the others.

    ``history.csv`` is rewritten after each epoch, so that it has one row per epoch even after a resume. TensorBoard
    drops entries beyond ``step``. Its file is created at the end of the first epoch.

    Args:
        folder: the folder of the run, which must exist.
        history: the rows of finished epochs, if a run is resumed.
        step: the number of finished training steps.
        steps_per_epoch: the length of the progress bar, which is shown if stderr is a terminal and rich is installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        runtime: Runtime,
        *,
        steps_per_epoch: int,
        history: Sequence[dict[str, Any]] = (),
        step: int = 0,
    ) -> None:
        self._folder, self._history, self._steps_per_epoch = Path(folder), list(history), steps_per_epoch
        self._main = runtime.is_main
        self._header_due = True
        self._step = step
        self._board: SummaryWriter | None = None
        self._bar: Progress | None = None
        if self._main:
            self._write_history()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_bar()
        if self._board is not None:
            self._board.close()

    def start_epoch(self, epoch: int, done: int = 0) -> None:
        """Show the progress bar of an epoch, of which ``done`` steps are finished."""
        if self._main:
            self._bar = progress_bar()
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(f"epoch {epoch}", total=self._steps_per_epoch, completed=done)

    def step(self) -> None:
        """Advance the progress bar by one step."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def end_epoch(self, row: dict[str, Any], *, best: bool = False) -> None:
        """Add one epoch.

        Args:
            row: plain values: ``epoch``, ``step``, ``loss``, ``lr`` and ``seconds``, and the numbers of a metric on the
                validation set, as ``val_mae`` over all and ``val_mae_few`` for a region.
            best: whether to mark it as the best epoch so far.
        Raises:
            ValueError: the row has other columns. Nothing is written then.
        """
        metrics = {column: _metric_of(column) for column in row if column not in (*_COLUMNS, "step")}
        missing = [column for column in ("step", *_COLUMNS) if column not in row]
        unknown = [column for column, known in metrics.items() if known is None]
        rule = "row must hold step, epoch, loss, lr, seconds and metrics of the validation set"
        require(not missing and not unknown, rule, got=f"missing {missing}, unknown {unknown}")
        self._close_bar()
        if not self._main:
            return
        self._history.append(row)
        self._write_history()
        tags = {"loss": "train/loss", "lr": "train/lr"}
        shown = {name: _COLUMNS[name] for name in ("epoch", "loss", "lr")}
        for column, known in metrics.items():
            assert known is not None
            metric, region = known
            tags[column] = f"val/{metric.name}/{region}"
            title = (metric.short or metric.title) if region == "all" else region
            shown[column] = (title, "{:.2f}" if metric.unit == "label" else "{:.4f}")
        shown["seconds"] = _COLUMNS["seconds"]
        with naming(self._folder):
            self._write_board({tag: row[column] for column, tag in tags.items()}, row["step"])
        if self._header_due:
            print("".join(title.rjust(_WIDTH) for title, _ in shown.values()))
            self._header_due = False
        cells = (pattern.format(row[column]).rjust(_WIDTH) for column, (_, pattern) in shown.items())
        print("".join(cells) + (" *" if best else ""), flush=True)

    def say(self, message: str) -> None:
        """Print a line, on the main rank alone."""
        self._close_bar()
        if self._main:
            print(message, flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write_board(self, scalars: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board = self._board or SummaryWriter(str(self._folder), purge_step=self._step + 1 if self._step else None)
        self._board = None  # after an error it cannot be closed
        for tag, value in scalars.items():
            board.add_scalar(tag, value, step)
        board.flush()
        self._board = board

    def _write_history(self) -> None:
        text = io.StringIO()
        names = list(self._history[0]) if self._history else ["epoch"]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._history)
        path = self._folder / "history.csv"
        with naming(path):
            write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _metric_of(column: str) -> tuple[Metric, str] | None:
    """The metric and the region of a column: ``val_mae_few`` is the MAE and "few"."""
    if not column.startswith("val_"):
        return None
    name = column.removeprefix("val_")
    start, _, end = name.rpartition("_")
    name, region = (start, end) if end in REGIONS else (name, "all")
    return (METRICS[name], region) if name in METRICS else None
