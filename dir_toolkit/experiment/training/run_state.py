"""The content of a run's last checkpoint, and checks of all of it before it is used."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._checks import problem
from ...errors import CheckpointError
from .identity import is_plain

__all__ = ["Progress", "check_progress", "foreign", "optimizer_state", "rank_state"]

_OPTIMIZER_STATE = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@dataclass
class Progress:
    """The progress of a run."""

    selects: str
    """The column of the history that selects the best epoch."""
    batches: Sequence[slice]
    """Of an epoch."""
    loss_sum: Tensor
    """The sum of the losses of this rank's samples in the current epoch."""
    step: int = 0
    """Finished steps of the current epoch."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per finished epoch."""

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def steps_done(self) -> int:
        """The number of finished steps over all epochs."""
        return self.epoch * len(self.batches) + self.step

    @property
    def best(self) -> tuple[int, float]:
        """The first epoch with the smallest error, and that error; 0 and infinity if there is none."""
        return min(
            ((row[self.selects], row["epoch"]) for row in self.history if row[self.selects] < math.inf),
            default=(math.inf, 0),
        )[::-1]

    def end_epoch(self, row: dict[str, Any]) -> bool:
        """Add a row and start the next epoch. Returns whether this epoch is the best so far."""
        self.history.append(row)
        self.step = 0
        self.loss_sum.zero_()
        return self.best[0] == row["epoch"]

    def shared(self) -> dict[str, Any]:
        """The state common to all ranks."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "history": self.history}


def foreign(path: Path, got: str) -> Exception:
    """The error for a checkpoint that ``fit`` cannot have written."""
    fix = "Put an intact copy in its place, or start in another folder."
    return problem(f"{path} must hold what fit() wrote there", got=got, fix=fix, error=CheckpointError)


def require_own(path: Path, sound: bool | Tensor, came: str) -> None:
    """Raise :func:`foreign` unless ``sound``."""
    if not sound:
        raise foreign(path, came)


def check_progress(path: Path, saved: Any, own: Progress, epochs: int, columns: Collection[str]) -> None:
    """Raise unless the progress is possible and the history has as many epochs."""
    steps = len(own.batches)
    alike = isinstance(saved, dict) and saved.keys() == own.shared().keys()
    require_own(path, alike, "a place in the run with other entries")
    epoch, step, seconds, history = (saved[name] for name in ("epoch", "step", "seconds", "history"))
    placed = is_whole(epoch, 0, epochs) and is_whole(step, 0, steps if epoch < epochs else 0)
    require_own(path, placed, f"epoch {epoch!r} and step {step!r} of {epochs} times {steps}")
    require_own(path, is_number(seconds) and 0 <= seconds < math.inf, f"{seconds!r} seconds")
    require_own(path, isinstance(history, list) and len(history) == epoch, f"a history of other than {epoch} rows")
    for number, row in enumerate(history, 1):
        sound = isinstance(row, dict) and row.keys() == columns and all(map(is_number, row.values()))
        sound = sound and (row["epoch"], row["step"]) == (number, number * steps)
        require_own(path, sound, f"a history whose row {number} is none of this run")


def rank_state(path: Path, saved: Any, rank: int, world: int, *, with_fds: bool) -> dict[str, Any]:
    """The checked state of one rank."""
    expected = {"loss_sum", "threads", *(("fds",) if with_fds else ())}
    require_own(path, isinstance(saved, list) and len(saved) == world, f"other than {world} ranks")
    for own in saved:
        require_own(path, isinstance(own, dict) and own.keys() == expected, "a rank with other entries")
        loss_sum, threads = own["loss_sum"], own["threads"]
        require_own(path, is_number(loss_sum) and math.isfinite(loss_sum), f"{loss_sum!r} as a sum of losses")
        require_own(path, is_whole(threads, 1, 2**31), f"{threads!r} threads")
        for name, value in own["fds"].items() if isinstance(own.get("fds"), dict) else ():
            if isinstance(value, Tensor):
                sound = not (value.isinf().any() or (name == "running_count" and (value < 0).any()))
                require_own(path, sound, f"{name} of an FDS that no features have")
    state = saved[rank]
    assert isinstance(state, dict)
    return state


def optimizer_state(path: Path, saved: Any, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """The checked state of the optimizer, with its own parameter groups.

    Args:
        steps: the number of steps of the whole run.
    """
    own = optimizer.state_dict()
    groups = saved["param_groups"] if isinstance(saved, dict) and saved.keys() == {"state", "param_groups"} else ()
    alike = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    require_own(path, alike, "no state of an optimizer")
    numbered = [group.get("params") for group in groups]
    same = is_plain(numbered) and numbered == [group["params"] for group in own["param_groups"]]
    require_own(path, same, "an optimizer of other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = saved["state"]
    same = isinstance(entries, dict) and list(entries) == list(range(len(parameters)))
    require_own(path, same, "a state of the optimizer for other parameters")
    expected = _OPTIMIZER_STATE[type(optimizer).__name__.lower()]
    for entry, parameter in zip(entries.values(), parameters, strict=True):
        same = isinstance(entry, dict) and (not entry or entry.keys() == expected)
        require_own(path, same, "a state of another optimizer")
        for name, value in entry.items():
            if name == "momentum_buffer" and value is None:
                continue
            fits = isinstance(value, Tensor) and value.shape == (() if name == "step" else parameter.shape)
            require_own(path, fits, f"{name} of the optimizer in another shape than its parameter")
            require_own(path, value.is_floating_point(), f"{name} of the optimizer as {value.dtype}")
            if name == "step":
                require_own(path, 0 < value.item() <= steps, f"step {value.item():g} of the optimizer")
            require_own(path, value.isfinite().all(), f"{name} of the optimizer that is not finite")
    return {"state": {i: entry for i, entry in entries.items() if entry}, "param_groups": own["param_groups"]}


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
