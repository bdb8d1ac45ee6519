"""The two checkpoints of a run: what they hold, and what is checked before anything of it is used."""

from __future__ import annotations

import copy
import math
import numbers
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import problem, warn
from ...errors import CheckpointError, RunExistsError
from ...features.fds import FDS
from ..files import FolderLock, naming
from .checkpoint import load_checkpoint, save_checkpoint
from .identity import check_same_run, is_plain
from .runtime import Runtime

__all__ = ["Progress", "RunFiles"]

_FORMAT = 2  # 1, which was not written down, had no settings of what a run was made of
# Held while a run's files are open: each step seeds torch's random numbers, which all threads share.
_AT_WORK = threading.RLock()
_OPTIMIZER_STATE = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@dataclass
class Progress:
    """Where a run stands."""

    loss_sum: Tensor
    """This rank's, over the epoch so far."""
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in the epoch under way."""
    samples: int = 0
    """Seen by all ranks in the epoch under way."""
    seconds: float = 0.0
    best_epoch: int = 0
    best: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)

    def steps_done(self, batches: Sequence[slice]) -> int:
        return self.epoch * len(batches) + self.step

    def end_epoch(self, row: dict[str, Any], selects: str) -> bool:
        """Add a row and go on to the next epoch; returns whether this was the best."""
        self.history.append(row)
        self.epoch, self.step, self.samples = self.epoch + 1, 0, 0
        self.loss_sum.zero_()
        best = row[selects] < self.best
        if best:
            self.best_epoch, self.best = row["epoch"], row[selects]
        return best

    def shared(self) -> dict[str, Any]:
        """What all ranks share."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "loss_sum"}


class RunFiles(AbstractContextManager["RunFiles"]):
    """The two checkpoints of a run, and the lock on its folder from when they are opened to the end of the context.

    Args:
        loss: a module whose parameters are trained too, else None.
        batches: of an epoch, by which a place in the run is told from one that cannot be.
        selects: the column of the history that decides which epoch is the best. columns: all of its columns.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        *,
        model: nn.Module,
        loss: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        fds: FDS | None,
        progress: Progress,
        identity: dict[str, Any],
        selects: str,
        columns: Collection[str],
        epochs: int,
        batches: Sequence[slice],
    ) -> None:
        self.last, self.best = folder / "checkpoint-last.pt", folder / "checkpoint-best.pt"
        self._saved: tuple[int, int] | None = None  # epoch and step of the last checkpoint
        self.selects, self._columns = selects, set(columns)
        self._runtime, self._model, self._loss, self._optimizer, self._fds = runtime, model, loss, optimizer, fds
        self._progress, self._identity, self._epochs, self._batches = progress, identity, epochs, batches
        self._lock: FolderLock | None = None
        self._at_work = False

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._at_work:
            _AT_WORK.release()
        self._at_work = False

    def open(self, resume: bool) -> None:
        """Start afresh, or from the last checkpoint."""
        self._at_work = _AT_WORK.acquire(blocking=False)
        if not self._at_work:
            raise problem(
                "one thread of a process may train at a time, since all draw from the same random numbers",
                got="another one at work",
                fix='Start processes in place of threads, as joblib does with backend="loky".',
                error=RuntimeError,
            )
        try:
            self._open(resume)
        except BaseException:
            self.__exit__()
            raise

    def _open(self, resume: bool) -> None:
        folder = self.last.parent
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder) if self._runtime.is_main else None
        if any(self._runtime.any([self._lock is not None and not self._lock.held])):
            raise problem(
                "one process at a time may train in a folder",
                got=f"another one at work in {folder}",
                fix="Wait for its end, then go on with --resume (resume=True), or choose another folder.",
                error=RunExistsError,
            )
        if not any(self._runtime.any([self.last.exists()])):
            return
        if not resume:
            raise problem(
                "a run is never overwritten",
                got=f"one in {self.last.parent}",
                fix="Go on with it by --resume (resume=True), or choose another folder.",
                error=RunExistsError,
            )
        try:
            self._resume()
        except RecursionError:
            raise self._foreign(self.last, "values that are nested too deep") from None

    def _resume(self) -> None:
        state = self._read(self.last, ("model", "loss", "optimizer", "ranks", "progress"))
        self._check_progress(state["progress"])
        own = self._own(state["ranks"])
        saved = [(self._model, state["model"]), (self._optimizer, self._optimizer_state(state["optimizer"]))]
        if (state["loss"] is None) != (self._loss is None):
            raise self._foreign(self.last, f"{'no' if state['loss'] is None else 'a'} loss with parameters")
        if self._loss is not None:
            saved.append((self._loss, state["loss"]))
        if self._fds is not None:
            saved.append((self._fds, own["fds"]))
        self._load(self.last, saved)
        for name, value in state["progress"].items():
            setattr(self._progress, name, value)
        self._progress.loss_sum.fill_(own["loss_sum"])
        threads = torch.get_num_threads()
        if self._runtime.device.type == "cpu" and own["threads"] != threads and self._progress.epoch < self._epochs:
            warn(
                f"this run used {own['threads']} threads and goes on with {threads}, so that sums are rounded "
                f"otherwise and it ends in other bits. Call torch.set_num_threads({own['threads']}) first.",
            )
        self._note_saved()

    def save_last(self) -> None:
        """Write all that is needed to go on; all ranks must call this."""
        own: dict[str, Any] = {"loss_sum": self._progress.loss_sum.item(), "threads": torch.get_num_threads()}
        if self._fds is not None:
            own["fds"] = _on_cpu(self._fds.state_dict())
        ranks = self._runtime.gather(own)
        if self._runtime.is_main:
            optimizer = self._optimizer.state_dict()
            groups = [{"params": group["params"]} for group in optimizer["param_groups"]]
            count = sum(len(group["params"]) for group in groups)
            state = {
                "format": _FORMAT,
                "fingerprint": self._identity,
                "model": self._model.state_dict(),
                "loss": self._loss.state_dict() if self._loss is not None else None,
                # With an empty entry for what never had a gradient, so that a missing one is seen.
                "optimizer": {
                    "state": {i: optimizer["state"].get(i, {}) for i in range(count)},
                    "param_groups": groups,
                },
                "ranks": ranks,
                "progress": self._progress.shared(),
            }
            save_checkpoint(self.last, state)
        self._runtime.barrier()
        self._note_saved()

    def save_best(self) -> None:
        """Write the model's weights."""
        if self._runtime.is_main:
            state = {
                "format": _FORMAT,
                "fingerprint": self._identity,
                "model": self._model.state_dict(),
                "epoch": self._progress.best_epoch,
                self.selects: self._progress.best,
            }
            save_checkpoint(self.best, state)

    def load_best(self) -> None:
        """Give the model the best weights; all ranks must call this."""
        self._runtime.barrier()
        if not self._progress.best_epoch:
            return
        state = self._read(self.best, ("model", "epoch", self.selects))
        error = state[self.selects]
        # A better one is left by a run that was killed before the last checkpoint was written, and on an accelerator
        # did not find it again.
        if (
            not _is_whole(state["epoch"], 1, self._epochs)
            or not _is_number(error)
            or not (
                error < self._progress.best
                or (state["epoch"], error) == (self._progress.best_epoch, self._progress.best)
            )
        ):
            expected = f"epoch {self._progress.best_epoch} with {self.selects} {self._progress.best:g}"
            raise self._foreign(self.best, f"{self.selects} {error!r} of epoch {state['epoch']!r}, not {expected}")
        self._load(self.best, [(self._model, state["model"])])

    def state(self) -> str:
        """What the last checkpoint holds, in a sentence."""
        if self._saved is None:
            return "There is no checkpoint yet."
        epoch, step = self._saved
        place = f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"
        return f"The last good checkpoint, {place}, is {self.last}."

    def _note_saved(self) -> None:
        self._saved = self._progress.epoch, self._progress.step

    def _read(self, path: Path, expected: Sequence[str]) -> dict[str, Any]:
        """A checkpoint of this format and of this run, with these keys."""
        state = load_checkpoint(path)
        if (version := state.get("format")) != _FORMAT or isinstance(version, bool):
            raise problem(
                f"{path} must be of format {_FORMAT}",
                got="none" if version is None else f"format {version!r}",
                fix="Go on with the release of dir_toolkit that wrote it, or start in another folder.",
                error=CheckpointError,
            )
        if not isinstance(state.get("fingerprint"), dict) or not is_plain(state["fingerprint"]):
            raise self._foreign(path, "no settings of a run")
        check_same_run(path, state["fingerprint"], self._identity)
        missing = [repr(key) for key in expected if key not in state]
        unknown = [repr(key) for key in state if key not in ("format", "fingerprint", *expected)]
        if missing or unknown:
            raise self._foreign(path, f"no {', '.join(missing)}" if missing else f"{', '.join(unknown)} besides")
        return state

    def _check_progress(self, progress: object) -> None:
        """A place at which a run may stand, and rows of as many epochs."""
        steps = len(self._batches)
        if not isinstance(progress, dict) or progress.keys() != self._progress.shared().keys():
            raise self._foreign(self.last, "a place in the run with other entries")
        epoch, step = progress["epoch"], progress["step"]
        if not _is_whole(epoch, 0, self._epochs) or not _is_whole(step, 0, steps if epoch < self._epochs else 0):
            raise self._foreign(self.last, f"epoch {epoch!r} and step {step!r} of {self._epochs} times {steps}")
        seen = sum(batch.stop - batch.start for batch in self._batches[:step])
        if not _is_whole(progress["samples"], seen, seen):
            raise self._foreign(self.last, f"{progress['samples']!r} samples after {step} steps")
        if not _is_number(progress["seconds"]) or not 0 <= progress["seconds"] < math.inf:
            raise self._foreign(self.last, f"{progress['seconds']!r} seconds")
        history = progress["history"]
        if not isinstance(history, list) or len(history) != epoch:
            raise self._foreign(self.last, f"a history of other than {epoch} rows")
        best_epoch, best = 0, math.inf
        for number, row in enumerate(history, 1):
            if (
                not isinstance(row, dict)
                or row.keys() != self._columns
                or not all(map(_is_number, row.values()))
                or (row["epoch"], row["step"]) != (number, number * steps)
            ):
                raise self._foreign(self.last, f"a history whose row {number} is none of this run")
            if row[self.selects] < best:
                best_epoch, best = number, row[self.selects]
        if (
            not _is_whole(progress["best_epoch"], best_epoch, best_epoch)
            or not _is_number(progress["best"])
            or progress["best"] != best
        ):
            raise self._foreign(self.last, f"epoch {progress['best_epoch']!r} as the best, which the history denies")

    def _own(self, ranks: object) -> dict[str, Any]:
        """What this rank keeps of its own."""
        expected = {"loss_sum", "threads", *(("fds",) if self._fds is not None else ())}
        if not isinstance(ranks, list) or len(ranks) != self._runtime.world:
            raise self._foreign(self.last, f"other than {self._runtime.world} ranks")
        for own in ranks:
            if not isinstance(own, dict) or own.keys() != expected:
                raise self._foreign(self.last, "a rank with other entries")
            if not _is_number(own["loss_sum"]) or not math.isfinite(own["loss_sum"]):
                raise self._foreign(self.last, f"{own['loss_sum']!r} as a sum of losses")
            if not _is_whole(own["threads"], 1, 2**31):
                raise self._foreign(self.last, f"{own['threads']!r} threads")
            for name, value in own["fds"].items() if isinstance(own.get("fds"), dict) else ():
                if isinstance(value, Tensor) and (
                    bool(value.isinf().any()) or (name == "running_count" and not bool((value >= 0).all()))
                ):
                    raise self._foreign(self.last, f"{name} of an FDS that no features have")
        own = ranks[self._runtime.rank]
        assert isinstance(own, dict)
        return own

    def _optimizer_state(self, saved: object) -> dict[str, Any]:
        """What the optimizer remembers, for its own groups, whose settings the fingerprint told."""
        own = self._optimizer.state_dict()
        sound = isinstance(saved, dict) and saved.keys() == {"state", "param_groups"}
        groups = saved["param_groups"] if sound else None  # type: ignore[index]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise self._foreign(self.last, "no state of an optimizer")
        assert isinstance(saved, dict)
        numbered = [group.get("params") for group in groups]
        if not is_plain(numbered) or numbered != [group["params"] for group in own["param_groups"]]:
            raise self._foreign(self.last, "an optimizer of other parameters")
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        entries = saved["state"]
        if not isinstance(entries, dict) or list(entries) != list(range(len(parameters))):
            raise self._foreign(self.last, "a state of the optimizer for other parameters")
        expected = _OPTIMIZER_STATE[type(self._optimizer).__name__.lower()]
        for entry, parameter in zip(entries.values(), parameters, strict=True):
            if not isinstance(entry, dict) or (entry and entry.keys() != expected):
                raise self._foreign(self.last, "a state of another optimizer")
            for name, value in entry.items():
                if name == "momentum_buffer" and value is None:
                    continue
                shape = () if name == "step" else parameter.shape
                if not isinstance(value, Tensor) or value.shape != shape:
                    raise self._foreign(self.last, f"{name} of the optimizer in another shape than its parameter")
                if not value.is_floating_point():
                    raise self._foreign(self.last, f"{name} of the optimizer as {value.dtype}")
                if name == "step" and not 0 < value.item() <= self._epochs * len(self._batches):
                    raise self._foreign(self.last, f"step {value.item():g} of the optimizer")
                if not bool(value.isfinite().all()):
                    raise self._foreign(self.last, f"{name} of the optimizer that is not finite")
        return {"state": {i: entry for i, entry in entries.items() if entry}, "param_groups": own["param_groups"]}

    def _load(self, path: Path, saved: Sequence[tuple[Any, Any]]) -> None:
        """Load each state into its object; where one does not fit, all objects stay as they were."""
        for _, state in saved:
            if not isinstance(state, Mapping) or not all(isinstance(name, (str, int)) for name in state):
                raise self._foreign(path, f"a {type(state).__name__} as the state of a module")
        before = [(one, copy.deepcopy(one.state_dict())) for one, _ in saved]
        try:
            for one, state in saved:
                one.load_state_dict(state)
        except Exception as error:  # which ones, a module decides that loads itself
            for one, state in before:
                one.load_state_dict(state)
            raise problem(
                f"{path} must fit this model",
                got=" ".join(str(error).split()) or type(error).__name__,
                fix="Was it made by other code?",
                error=CheckpointError,
            ) from error

    def _foreign(self, path: Path, got: str) -> Exception:
        fix = "Put an intact copy in its place, or start in another folder."
        return problem(f"{path} must hold what fit() wrote there", got=got, fix=fix, error=CheckpointError)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _on_cpu(value: Any) -> Any:
    """Nested state with its tensors on the CPU, so that another rank can hold it."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value
