"""A callback for FDS in the Hugging Face Trainer."""

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
    raise missing_package("transformers", error, "integrations") from error

__all__ = ["FDSCallback"]

_FILE = "fds.pt"


class FDSCallback(TrainerCallback):
    """A callback for FDS in the Hugging Face Trainer: it provides labels in each training step, ends epochs, and saves
    statistics with the Trainer's checkpoints.

    .. code-block:: python

        fds = FDS(bins, num_features=768)
        fds.attach(model.classifier, "input")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[FDSCallback(fds)])
        trainer.train()

    Since the Trainer passes no batch to callbacks, hooks on the model read the labels from its keyword inputs in
    training. Evaluation does not change the statistics. An epoch ends before the evaluation at its end. Do not register
    ``fds`` as a submodule of the model. Each checkpoint folder gets a file ``fds.pt``, from which
    ``train(resume_from_checkpoint=...)`` continues exactly; on several ranks, after a checkpoint within an epoch, up to
    rounding. With ``ignore_data_skip`` an epoch is restarted, and its statistics are dropped. A hyperparameter search
    saves no statistics. Gradient checkpointing works.

    Args:
        fds: one FDS or several, attached before training starts.
        labels_of: the labels among the model's keyword inputs: a key, or a function of the dict of inputs. Pass one for
            all FDS, or a list with one per FDS. Pass None if the model provides labels itself. With label smoothing or
            a ``compute_loss_func`` the Trainer removes ``labels``: pass them to the model under a second name.
        resume_from: the folder of the checkpoint to resume from, if it is not in ``output_dir``.
    Raises:
        ValueError: the model gets no such labels. TypeError: they are not a tensor. UsageError: an FDS is not attached
        or is a submodule of the model, or one process trains on several GPUs. CheckpointError: the checkpoint has no
        statistics, or those of another run or of other bins. Further errors are those of :meth:`FDS.labels` and
        :meth:`FDS.end_epoch`.
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
        rule = "fds must not be a submodule of the model, whose buffers are overwritten by those of the first rank"
        fix = "Keep it in a variable and attach it. This callback saves it."
        require(not inside, rule, got="one that is", fix=fix, error=RuntimeError)
        resumed = state.global_step > 0
        if resumed:
            self._load(args, state)
        over = float(state.epoch or 0).is_integer()  # saved after the last step of an epoch, perhaps before its end
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
        saved = self._driver.state_dict() | {"of": _fingerprint(state)}  # on all ranks, since it sums over them
        if args.should_save:
            save_checkpoint(_folder(args, state) / _FILE, saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()

    def _load(self, args: TrainingArguments, state: TrainerState) -> None:
        """Load the statistics that belong to the resumed checkpoint."""
        folder = self._resume_from or _folder(args, state)
        rule, got = "the checkpoint must hold FDS statistics", f"no file {str(folder / _FILE)!r}"
        fix = (
            "Pass resume_from= the folder of the checkpoint if it is elsewhere. If it was saved without this "
            "callback, load its weights into the model and train without resume_from_checkpoint."
        )
        require((folder / _FILE).exists(), rule, got=got, fix=fix, error=CheckpointError)
        saved = load_checkpoint(folder / _FILE)
        same = saved.pop("of", None) == _fingerprint(state)
        rule = "the FDS statistics must be those of the checkpoint"
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
    """A digest that identifies the run and the step of a ``trainer_state.json``."""
    content = json.dumps([state.global_step, state.epoch, state.total_flos, state.log_history], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
