"""A callback of Lightning that drives FDS."""

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
    raise missing_package("lightning>=2.5", error) from error

__all__ = ["FDSCallback"]


class FDSCallback(pl.Callback):
    """Drives FDS in a training of Lightning. It places the labels of each batch around the training step, ends the
    epochs, and saves the statistics.

    .. code-block:: python

        fds = FDS(bins, num_features=512)
        fds.attach(module.head, "input")        # anywhere before fit, or in configure_model
        trainer = lightning.Trainer(callbacks=[FDSCallback(fds, labels_of="age")])
        trainer.fit(module, loader)

    Labels are placed for backward, too, so that activation checkpointing works. They are not placed for validation,
    whether it comes in mid-epoch or before training. An epoch ends after its last validation. The statistics go into
    Lightning's checkpoints whether or not ``fds`` is a part of the module. With ``fit(ckpt_path=...)`` training goes on
    as if it had never stopped. On several ranks, a checkpoint in mid-epoch leads to the same numbers but for
    rounding. If ``fit`` is called again without a checkpoint, an epoch that was broken off is dropped, and the
    statistics of whole epochs stay. The callbacks of ``pytorch_lightning`` are of another class, so that this one does
    not work there.

    Args:
        fds: one FDS or several, each attached by the time training starts.
        labels_of: where the labels are in a batch as it arrives at ``training_step``: an index (of a tuple), a key (of
            a dict), or a function of the batch. Pass one for all FDS, or a list with one per FDS. Pass None where the
            module places them itself, as :class:`dir_toolkit.LongTailModel` does when it is given labels.
    Raises:
        ValueError: a batch has no labels there. TypeError: they are no tensor. UsageError: an FDS is attached nowhere,
        or ``training_step`` takes ``dataloader_iter``. CheckpointError: the checkpoint to go on from has no statistics,
        or those of other bins. Further errors are those of :meth:`FDS.labels` and :meth:`FDS.end_epoch`.
    Source:
        Yang et al. 2021, section 3.2 (arXiv:2102.09554), for FDS.
    """

    def __init__(self, fds: FDS | Sequence[FDS], labels_of: LabelsOf | Sequence[LabelsOf] = 1) -> None:
        self._driver = Driver(fds, labels_of)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        unseen = self._driver.places and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
        rule, got = "training_step must take the batch", "a dataloader_iter, whose batch no callback sees in time"
        fix = "Let it take (self, batch), or place the labels in it yourself and pass labels_of=None."
        require(not unseen, rule, got=got, fix=fix, error=RuntimeError)
        self._driver.start(resumed=trainer.ckpt_path is not None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # Lightning skips the end of an epoch that was saved at its last batch
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
        rule, got = "the checkpoint to go on from must hold FDS statistics", "one that was saved without this callback"
        fix = "Load its weights into the module, and call fit without ckpt_path."
        require(held, rule, got=got, fix=fix, error=CheckpointError)

    def state_dict(self) -> dict[str, Any]:
        return self._driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._driver.load_state_dict(state_dict)
