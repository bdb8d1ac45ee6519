"""A Lightning callback for FDS."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from .._checks import missing_package, require
from ..errors import CheckpointError
from ..features.fds import FDS
from ._fds import Driver, LabelsOf

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise missing_package("lightning", error, "integrations") from error

__all__ = ["FDSCallback"]


class FDSCallback(pl.Callback):
    """A Lightning callback for FDS: it provides labels in each training step, ends epochs, and saves statistics.

    .. code-block:: python

        fds = FDS(bins, num_features=512)
        fds.attach(module.head, "input")        # anywhere before fit, or in configure_model
        trainer = lightning.Trainer(callbacks=[FDSCallback(fds, labels_of="age")])
        trainer.fit(module, loader)

    Activation checkpointing works. Validation does not change the statistics. An epoch ends after its last validation.
    The statistics are saved in Lightning's checkpoints, and ``fit(ckpt_path=...)`` continues exactly; on several ranks,
    after a checkpoint within an epoch, up to rounding. If ``fit`` is called again without a checkpoint, the statistics
    of an unfinished epoch are dropped. Import ``lightning``, not ``pytorch_lightning``, whose callbacks have another
    base class.

    Args:
        fds: one FDS or several, attached before training starts.
        labels_of: the labels in a batch of ``training_step``: an index (of a tuple), a key (of a dict), or a function
            of the batch. Pass one for all FDS, or a list with one per FDS. Pass None if the module provides labels
            itself, as :class:`dir_toolkit.LongTailModel` does when it is called with labels.
    Raises:
        ValueError: a batch has no such labels. TypeError: they are not a tensor. UsageError: an FDS is not attached, or
            ``training_step`` takes ``dataloader_iter``. CheckpointError: the checkpoint has no statistics, or those of
            other bins. Further errors are those of :meth:`FDS.labels` and :meth:`FDS.end_epoch`.
    Source:
        Yang et al. 2021, section 3.2 (arXiv:2102.09554), for FDS.
    """

    def __init__(self, fds: FDS | Sequence[FDS], labels_of: LabelsOf | Sequence[LabelsOf] = 1) -> None:
        self._driver = Driver(fds, labels_of)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        unseen = self._driver.places and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
        rule, got = "training_step must take the batch", "a dataloader_iter, from which callbacks get no batch"
        fix = "Use the signature (self, batch), or use fds.labels in it and pass labels_of=None."
        require(not unseen, rule, got=got, fix=fix, error=RuntimeError)
        self._driver.start(resumed=trainer.ckpt_path is not None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # Lightning does not end an epoch that was saved at its last batch
            self._driver.end_overdue_epoch()
        self._driver.enter(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._driver.leave()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._driver.end_epoch()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._driver.leave(broken_off=True)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        inside = all(any(part is fds for part in pl_module.modules()) for fds in self._driver.all)
        resumes = trainer.state.fn == "fit" and not inside
        held = not resumes or self.state_key in checkpoint.get("callbacks", {})
        rule, got = "the checkpoint must hold FDS statistics", "one that was saved without this callback"
        fix = "Load its weights into the module, and call fit without ckpt_path."
        require(held, rule, got=got, fix=fix, error=CheckpointError)

    def state_dict(self) -> dict[str, Any]:
        return self._driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._driver.load_state_dict(state_dict)
