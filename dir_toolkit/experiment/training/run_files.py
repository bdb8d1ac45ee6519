"""The two checkpoints of a run, and the lock on its folder."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import problem, require, warn
from ...errors import CheckpointError, RunExistsError
from ...features.fds import FDS
from ..files import FolderLock, naming
from .checkpoint import load_checkpoint, save_checkpoint
from .identity import check_same_run, is_plain
from .run_state import Progress, check_progress, foreign, is_number, is_whole, optimizer_state, rank_state, require_own
from .runtime import Runtime

__all__ = ["RunFiles"]

_OR_RESUME = "Go on with --resume (resume=True), or choose another folder."
_FORMAT = 3  # 1, which was not written down, had no settings of what a run is made of; 2 had the best epoch, too
# Held while a run's files are open: each step seeds torch's random numbers, which all threads share.
_AT_WORK = threading.RLock()


class RunFiles(AbstractContextManager["RunFiles"]):
    """The two checkpoints of a run, and the lock on its folder from when they are opened to the end of the context.

    Args:
        loss: a module whose parameters are trained too, else None.
        progress: the progress of the run, which is set when a run is resumed.
        columns: the columns of the history.
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
        columns: Collection[str],
        epochs: int,
    ) -> None:
        self.last, self.best = folder / "checkpoint-last.pt", folder / "checkpoint-best.pt"
        self._saved: tuple[int, int] | None = None  # epoch and step of the last checkpoint
        self._runtime, self._model, self._loss, self._optimizer, self._fds = runtime, model, loss, optimizer, fds
        self._progress, self._identity, self._columns, self._epochs = progress, identity, set(columns), epochs
        self._lock: FolderLock | None = None
        self._at_work = False

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._at_work:
            _AT_WORK.release()
        self._at_work = False

    def open(self, resume: bool) -> None:
        """Start a new run, or resume from the last checkpoint."""
        self._at_work = _AT_WORK.acquire(blocking=False)
        rule = "one thread of a process may train at a time, since all draw from the same random numbers"
        fix = 'Use processes instead of threads, such as joblib with backend="loky".'
        require(self._at_work, rule, got="another one at work", fix=fix, error=RuntimeError)
        try:
            self._open(resume)
        except BaseException:
            self.__exit__()
            raise

    def _open(self, resume: bool) -> None:
        """Lock the folder, and load the run that it holds if ``resume`` allows it."""
        folder = self.last.parent
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder) if self._runtime.is_main else None
        taken = any(self._runtime.any([self._lock is not None and not self._lock.held]))
        rule, got = "one process at a time may train in a folder", f"another one at work in {folder}"
        require(not taken, rule, got=got, fix=f"Wait for its end. {_OR_RESUME}", error=RunExistsError)
        if not any(self._runtime.any([self.last.exists()])):
            return
        require(resume, "a run is never overwritten", got=f"one in {folder}", fix=_OR_RESUME, error=RunExistsError)
        try:
            self._resume()
        except RecursionError:
            raise foreign(self.last, "values that are nested too deep") from None

    def _resume(self) -> None:
        """Load the last checkpoint into all parts of the run."""
        state = self._read(self.last, ("model", "loss", "optimizer", "ranks", "progress"))
        check_progress(self.last, state["progress"], self._progress, self._epochs, self._columns)
        rank, world = self._runtime.rank, self._runtime.world
        own = rank_state(self.last, state["ranks"], rank, world, with_fds=self._fds is not None)
        steps = self._epochs * len(self._progress.batches)
        optimizer = optimizer_state(self.last, state["optimizer"], self._optimizer, steps)
        saved = [(self._model, state["model"]), (self._optimizer, optimizer)]
        alike, one = (state["loss"] is None) == (self._loss is None), "no" if state["loss"] is None else "a"
        require_own(self.last, alike, f"{one} loss with parameters")
        if self._loss is not None:
            saved.append((self._loss, state["loss"]))
        if self._fds is not None:
            saved.append((self._fds, own["fds"]))
        self._load(self.last, saved)
        for name in ("step", "seconds", "history"):
            setattr(self._progress, name, state["progress"][name])
        self._progress.loss_sum.fill_(own["loss_sum"])
        threads = torch.get_num_threads()
        if self._runtime.device.type == "cpu" and own["threads"] != threads and self._progress.epoch < self._epochs:
            warn(
                f"this run used {own['threads']} threads and goes on with {threads}, so that sums are rounded "
                f"otherwise and it ends in other bits. Call torch.set_num_threads({own['threads']}) first."
            )
        self._note_saved()

    def save_last(self) -> None:
        """Write the checkpoint for resuming. All ranks must call this."""
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
            epoch, error = self._progress.best
            state = {
                "format": _FORMAT,
                "fingerprint": self._identity,
                "model": self._model.state_dict(),
                "epoch": epoch,
                self._progress.selects: error,
            }
            save_checkpoint(self.best, state)

    def load_best(self) -> None:
        """Load the best weights into the model. All ranks must call this."""
        self._runtime.barrier()
        epoch, least = self._progress.best
        if not epoch:
            return
        selects = self._progress.selects
        state = self._read(self.best, ("model", "epoch", selects))
        error = state[selects]
        # A better one is left by a run that was killed before the last checkpoint was written, and on an accelerator
        # did not reach it again.
        sound = is_whole(state["epoch"], 1, self._epochs) and is_number(error)
        sound = sound and (error < least or (state["epoch"], error) == (epoch, least))
        came = f"{selects} {error!r} of epoch {state['epoch']!r}, not epoch {epoch} with {selects} {least:g}"
        require_own(self.best, sound, came)
        self._load(self.best, [(self._model, state["model"])])

    def state(self) -> str:
        """A sentence on the last checkpoint."""
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
        version = state.get("format")
        known, got = version == _FORMAT and version is not True, "none" if version is None else f"format {version!r}"
        fix = "Go on with the release of dir_toolkit that wrote it, or start in another folder."
        require(known, f"{path} must be of format {_FORMAT}", got=got, fix=fix, error=CheckpointError)
        settings = state.get("fingerprint")
        require_own(path, isinstance(settings, dict) and is_plain(settings), "no settings of a run")
        check_same_run(path, state["fingerprint"], self._identity)
        missing = [repr(key) for key in expected if key not in state]
        unknown = [repr(key) for key in state if key not in ("format", "fingerprint", *expected)]
        fault = f"no {', '.join(missing)}" if missing else f"{', '.join(unknown)} besides"
        require_own(path, not missing and not unknown, fault)
        return state

    def _load(self, path: Path, saved: Sequence[tuple[Any, Any]]) -> None:
        """Load each state into its object. If one does not fit, no object changes."""
        for _, state in saved:
            plain = isinstance(state, Mapping) and all(isinstance(name, (str, int)) for name in state)
            require_own(path, plain, f"a {type(state).__name__} as the state of a module")
        before = [(one, copy.deepcopy(one.state_dict())) for one, _ in saved]
        try:
            for one, state in saved:
                one.load_state_dict(state)
        except Exception as error:  # which ones, a module decides that loads itself
            for one, state in before:
                one.load_state_dict(state)
            got, fix = " ".join(str(error).split()) or type(error).__name__, "Was it made by other code?"
            raise problem(f"{path} must fit this model", got=got, fix=fix, error=CheckpointError) from error


def _on_cpu(value: Any) -> Any:
    """Nested state with its tensors on the CPU, so that another rank can hold it."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value
