"""A callback of the Hugging Face Trainer that drives FDS."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .._checks import missing_package, require
from ..errors import CheckpointError
from ..experiment.training.checkpoint import load_checkpoint, save_checkpoint
from ..features.fds import FDS
from ._fds import Driver, LabelsOf

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise missing_package("transformers[torch]>=4.57", error) from error

__all__ = ["FDSCallback"]

_FILE = "fds.pt"


class FDSCallback(TrainerCallback):
    """Drives FDS in a training of the Hugging Face Trainer. It places the labels that the model gets around each
    training pass, ends the epochs, and saves the statistics beside the Trainer's checkpoints.

    .. code-block:: python

        fds = FDS(bins, num_features=768)
        fds.attach(model.classifier, "input")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[FDSCallback(fds)])
        trainer.train()

    The Trainer shows a callback no batch. Hooks on the model therefore take the labels from its keyword inputs while
    it trains, and evaluation passes untouched. An epoch ends before the evaluation at its end. Keep ``fds`` outside the
    model's tree, as :meth:`FDS.attach` does, since the Trainer's files hold nothing but tensors. Each checkpoint folder
    gets a file ``fds.pt`` of its own, from which ``train(resume_from_checkpoint=...)`` goes on as if training had never
    stopped. On several ranks, a checkpoint in mid-epoch leads to the same numbers but for rounding. Under
    ``ignore_data_skip`` an epoch is begun again, and what was gathered of it is dropped. A hyperparameter search saves
    no statistics. Gradient checkpointing works, too.

    Args:
        fds: one FDS or several, each attached by the time training starts.
        labels_of: where the labels are among the model's keyword inputs: a key, or a function of the dict of them. Pass
            one for all FDS, or a list with one per FDS. Pass None where the model places them itself. With label
            smoothing or a ``compute_loss_func`` the Trainer keeps ``labels`` to itself, so hand them to the model under
            another name, too.
        resume_from: the folder of the checkpoint to go on from, if it is not in ``output_dir``.
    Raises:
        ValueError: the model gets no labels there. TypeError: they are no tensor. UsageError: an FDS is attached
        nowhere or is a part of the model, or one process trains on several GPUs. CheckpointError: the checkpoint to go
        on from has no statistics, those of another run, or those of other bins. Further errors are those of
        :meth:`FDS.labels` and :meth:`FDS.end_epoch`.
    Source:
        Yang et al. 2021, section 3.2 (arXiv:2102.09554), for FDS.
    """

    def __init__(
        self,
        fds: FDS | Sequence[FDS],
        labels_of: LabelsOf | Sequence[LabelsOf] = "labels",
        *,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self._driver = Driver(fds, labels_of)
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        got, fix = f"{args.n_gpu} in one", "Start one process per GPU (torchrun), or set CUDA_VISIBLE_DEVICES to one."
        require(args.n_gpu <= 1, "each process must train on one GPU", got=got, fix=fix, error=RuntimeError)
        inside = any(part is fds for part in model.modules() for fds in self._driver.all)
        rule = "fds must be no part of the model, whose buffers each rank overwrites with those of the first"
        fix = "Keep it in a variable and attach it; this callback saves it."
        require(not inside, rule, got="one that is", fix=fix, error=RuntimeError)
        resumed = state.global_step > 0
        if resumed:
            self._load(args, state)
        over = float(state.epoch or 0).is_integer()  # It was saved after an epoch's last step, perhaps before its end.
        self._driver.start(resumed=resumed and (over or not args.ignore_data_skip))
        if over:
            self._driver.end_overdue_epoch()
        self._remove_hooks()
        if self._driver.places:
            self._hooks = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, always_call=True),
            ]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._driver.end_epoch()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_hyper_param_search:
            return
        saved = self._driver.state_dict() | {"of": _fingerprint(state)}  # All ranks do this, since it sums over them.
        if args.should_save:
            save_checkpoint(_folder(args, state) / _FILE, saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()

    def _load(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = self._resume_from or _folder(args, state)
        rule, got = "the checkpoint to go on from must hold FDS statistics", f"no file {str(folder / _FILE)!r}"
        fix = (
            "Pass resume_from= the folder of the checkpoint if it lies elsewhere. If it was saved without this "
            "callback, load its weights into the model and train without resume_from_checkpoint."
        )
        require((folder / _FILE).exists(), rule, got=got, fix=fix, error=CheckpointError)
        saved = load_checkpoint(folder / _FILE)
        same = saved.pop("of", None) == _fingerprint(state)
        rule = "the FDS statistics must be of the checkpoint to go on from"
        got, fix = f"those of another in {str(folder)!r}", "Pass resume_from= the folder that train() resumes from."
        require(same, rule, got=got, fix=fix, error=CheckpointError)
        self._driver.load_state_dict(saved)

    @torch.compiler.disable
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if model.training:
            self._driver.enter(kwargs)

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._driver.leave(broken_off=output is None)

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _fingerprint(state: TrainerState) -> str:
    """What tells the ``trainer_state.json`` of a checkpoint from that of any other run or step."""
    content = json.dumps([state.global_step, state.epoch, state.total_flos, state.log_history], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
