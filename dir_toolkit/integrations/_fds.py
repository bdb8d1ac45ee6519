"""The common part of the FDS callbacks: provide labels in each step, end epochs, and save statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from .._checks import instance, keys, problem, require
from ..errors import CheckpointError
from ..features.fds import FDS
from ..features.select import form

LabelsOf = Callable[[Any], Tensor] | str | int | None

_TRAINER_HINT = (
    " With label smoothing or a compute_loss_func the Hugging Face Trainer removes `labels`: pass them to the model "
    "under a second name."
)


class Driver:
    """One or several FDS, and the keys of their labels in a batch."""

    def __init__(self, fds: FDS | Sequence[FDS], labels_of: LabelsOf | Sequence[LabelsOf]) -> None:
        self.all: list[FDS] = list(fds) if isinstance(fds, Sequence) else [fds]
        require(len(self.all) > 0, "fds must be an FDS or several", got=repr(fds))
        for one in self.all:
            instance(FDS, fds=one)
        several = isinstance(labels_of, Sequence) and not isinstance(labels_of, str)
        self._labels_of: list[LabelsOf] = list(labels_of) if several else [labels_of] * len(self.all)  # type: ignore[arg-type, list-item]
        known = all(key is None or callable(key) or isinstance(key, (str, int)) for key in self._labels_of)
        if not known or len(self._labels_of) != len(self.all):
            rule = "labels_of must be a function of the batch, a key, an index or None, or a list with one per FDS"
            raise problem(rule, got=f"{labels_of!r} for {len(self.all)} FDS", error=ValueError if known else TypeError)
        self.places = any(key is not None for key in self._labels_of)
        self._placed: ExitStack | None = None

    def start(self, *, resumed: bool) -> None:
        """Prepare training. The statistics of an unfinished epoch are dropped unless it is ``resumed``."""
        self.leave(broken_off=True)
        for fds in self.all:
            rule, fix = "fds must be attached to a module of the model", 'Call fds.attach(model.head, "input") first.'
            require(fds.attached, rule, got="one that is not attached", fix=fix, error=RuntimeError)
            fds.train()
            fds.warns_of_forgotten_end = False  # evaluations may run within an epoch
            if not resumed:
                fds.drop_epoch()

    def end_overdue_epoch(self) -> None:
        """End an epoch that was saved after its last step but before its end, when the next epoch begins."""
        for fds in self.all:
            if fds.has_open_epoch:
                fds.end_epoch()

    def enter(self, batch: Any) -> None:
        """Enter the label context of this batch until :meth:`leave`."""
        self.leave(broken_off=True)
        with ExitStack() as stack:
            for fds, key in zip(self.all, self._labels_of, strict=True):
                if key is not None:
                    stack.enter_context(fds.labels(self._labels(batch, key)))
            self._placed = stack.pop_all()

    def leave(self, *, broken_off: bool = False) -> None:
        """Leave the label context, if any. In an aborted step the attached module need not have run."""
        stack, self._placed = self._placed, None
        if stack is not None:
            error = RuntimeError("the step was aborted") if broken_off else None
            stack.__exit__(type(error) if error else None, error, None)

    def end_epoch(self) -> None:
        """End the epoch of each FDS."""
        self.leave(broken_off=True)
        for fds in self.all:
            fds.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The state of all FDS. The current epoch is merged over ranks, which must all call this."""
        return {"fds": [fds.merged_state() for fds in self.all]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`, on any number of ranks."""
        keys("the saved state", state, ("fds",))
        saved, own = len(state["fds"]), len(self.all)
        require(saved == own, f"the saved state must be of {own} FDS", got=saved, error=CheckpointError)
        for fds, saved in zip(self.all, state["fds"], strict=True):
            fds.load_merged_state(saved)

    def _labels(self, batch: Any, key: Callable[[Any], Tensor] | str | int) -> Tensor:
        """The labels in a batch."""
        if isinstance(batch, Mapping):
            within = key in batch
        else:
            within = isinstance(batch, Sequence) and isinstance(key, int) and -len(batch) <= key < len(batch)
        fix = "Pass labels_of: the key or index of the labels, or a function of the batch that returns them."
        if not callable(key) and not within:
            fix += _TRAINER_HINT * (key == "labels")
            raise problem(f"a batch must hold its labels under {key!r}", got=form(batch), fix=fix)
        return key(batch) if callable(key) else batch[key]
