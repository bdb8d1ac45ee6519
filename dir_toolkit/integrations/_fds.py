"""What the callbacks share: labels placed around a step, epochs that end, statistics that are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .._checks import instance, keys, problem
from .._ranks import is_parallel, summed
from .._state import pack
from ..errors import CheckpointError
from ..features.fds import FDS

LabelsOf = Callable[[Any], Tensor] | str | int | None

_TRAINER_HINT = (
    " For label smoothing or a compute_loss_func the Hugging Face Trainer takes `labels` out: hand them to the model "
    "under another name, too."
)


class Driver:
    """One FDS or several, and where in a batch their labels are."""

    def __init__(self, fds: FDS | Sequence[FDS], labels_of: LabelsOf | Sequence[LabelsOf]) -> None:
        self.all: list[FDS] = list(fds) if isinstance(fds, Sequence) else [fds]
        if not self.all:
            raise problem("fds must be an FDS or several", got=repr(fds))
        for one in self.all:
            instance(FDS, fds=one)
        several = isinstance(labels_of, Sequence) and not isinstance(labels_of, str)
        self._labels_of: list[LabelsOf] = list(labels_of) if several else [labels_of] * len(self.all)  # type: ignore[arg-type, list-item]
        if len(self._labels_of) != len(self.all):
            rule = f"labels_of must be one for all FDS, or one for each of {len(self.all)}"
            raise problem(rule, got=len(self._labels_of))
        for key in self._labels_of:
            if not (key is None or callable(key) or isinstance(key, (str, int))):
                rule = "labels_of must be a function of the batch, a key, an index or None"
                raise problem(rule, got=repr(key), error=TypeError)
        self.places = any(key is not None for key in self._labels_of)
        self._placed: ExitStack | None = None

    def start(self, *, resumed: bool) -> None:
        """Make ready for training. Statistics of an epoch that was broken off are dropped, unless it is ``resumed``."""
        self.leave(broken_off=True)
        for fds in self.all:
            if not fds.attached:
                raise problem(
                    "fds must be attached to a part of the model",
                    got="one that is attached nowhere",
                    fix='Call fds.attach(model.head, "input") first.',
                    error=RuntimeError,
                )
            fds.train()
            fds._said.add("end")  # a forgotten end is guessed from evaluations; here they may come in mid-epoch
            if not resumed:
                fds._forget_epoch()

    def end_overdue_epoch(self) -> None:
        """End an epoch that was saved after its last step and before its end, once the next is about to begin."""
        for fds in self.all:
            if fds._seen:
                fds.end_epoch()

    def enter(self, batch: Any) -> None:
        """From here on, attached modules run on the samples of this batch."""
        self.leave(broken_off=True)
        with ExitStack() as stack:
            for fds, key in zip(self.all, self._labels_of, strict=True):
                if key is not None:
                    stack.enter_context(fds.labels(self._labels(batch, key)))
            self._placed = stack.pop_all()

    def leave(self, *, broken_off: bool = False) -> None:
        """The end of :meth:`enter`; does nothing without. A step that was broken off need not have run the module."""
        stack, self._placed = self._placed, None
        if stack is not None:
            error = RuntimeError("the step was broken off") if broken_off else None
            stack.__exit__(type(error) if error else None, error, None)

    def end_epoch(self) -> None:
        """Fold the epoch in."""
        self.leave(broken_off=True)
        for fds in self.all:
            fds.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Everything there is to save, the epoch so far merged over ranks, which must all call this."""
        return {"fds": [_merged_state(fds) for fds in self.all]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, on any number of ranks: the epoch so far is rank 0's from here on."""
        keys("the saved state", state, ("fds",))
        if len(state["fds"]) != len(self.all):
            rule = f"the saved state must be of {len(self.all)} FDS"
            raise problem(rule, got=len(state["fds"]), error=CheckpointError)
        for fds, saved in zip(self.all, state["fds"], strict=True):
            fds.load_state_dict(saved)
            if is_parallel() and dist.get_rank(fds._group.of) != 0:
                seen = fds._seen
                fds._forget_epoch()
                fds._seen = seen

    def _labels(self, batch: Any, key: Callable[[Any], Tensor] | str | int) -> Tensor:
        if callable(key):
            labels: Any = key(batch)
        else:
            if isinstance(batch, Mapping):
                within = key in batch
            else:
                within = isinstance(batch, Sequence) and isinstance(key, int) and -len(batch) <= key < len(batch)
            if not within:
                raise problem(
                    f"a batch must hold its labels under {key!r}",
                    got=_form(batch),
                    fix="Pass labels_of: the key or index of the labels, or a function of the batch that returns them."
                    + _TRAINER_HINT * (key == "labels"),
                )
            labels = batch[key]
        if not isinstance(labels, Tensor):
            rule = f"what labels_of={key!r} finds in a batch must be a torch.Tensor"
            raise problem(rule, got=type(labels).__name__, error=TypeError)
        return labels


def _merged_state(fds: FDS) -> dict[str, Any]:
    state = dict(fds.state_dict())
    if is_parallel():
        unsaved = fds._unsaved()
        moments = fds.covariance.moments()
        moments.load_state_dict(unsaved["moments"])
        (unplaced,) = summed(unsaved["unplaced"], group=fds._group.of)
        state["_extra_state"] = pack(
            unsaved | {"unplaced": unplaced, "moments": moments.all_reduce(fds._group.of).state_dict()}
        )
    return state


def _form(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"the keys {sorted(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
