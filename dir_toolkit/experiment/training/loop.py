"""Training on labelled images: one loop, on one process or many, that can be stopped and resumed."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import instance, number, problem, warn, whole
from ...errors import NonFiniteLossError, SettingsError, ShapeError
from ...features.fds import FDS
from ...labels.sampling import BinSampler
from ...labels.weights import LDS
from ...losses.regression import weighted_l1
from ...metrics.classification import ClassificationMetrics
from ...metrics.regression import RegressionMetrics
from ..data.augment import augment, to_float
from ..data.images import ImageSet
from .checkpoint import check_plain
from .identity import run_identity
from .log import RunLog
from .optimization import Optimization, learning_rate, make_optimizer
from .run_files import Progress, RunFiles
from .runtime import Runtime

__all__ = ["Metrics", "Optimization", "evaluate", "fit", "predict"]

Metrics = RegressionMetrics | ClassificationMetrics

# On an accelerator the host looks at the loss, and the ranks agree whether to stop, once in so many steps.
_CHECK_EVERY = 50

_EARLY = 3  # epochs; where none after them is better, a training has done little good


def fit(
    model: nn.Module,
    train: ImageSet,
    val: ImageSet,
    *,
    metrics: Metrics,
    loss: Callable[..., Tensor] = weighted_l1,
    weights: LDS | None = None,
    weights_from: int = 0,
    sampler: BinSampler | None = None,
    fds: FDS | None = None,
    optimization: Optimization,
    runtime: Runtime,
    folder: Path,
    resume: bool = False,
    augmentation: bool | Callable[..., Tensor] = True,
    checkpoint_minutes: float = 5.0,
    fingerprint: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train a model, keep the weights of the epoch with the least validation error, and load them at the end.

    Everything random follows from the seed and the place in the run: the order of an epoch from (seed, epoch), the
    augmentation and what the model draws from (seed, epoch, step, rank). So on the CPU a run that was stopped anywhere,
    and resumed in a new process with as many threads, ends with the bits of a run that was not stopped. With another
    number of threads it warns, and CUDA adds up in no fixed order.

    Each global batch is dealt to the ranks in turn, and a rank's loss counts in proportion to its share of the batch,
    so that n ranks step as one does where the loss is a mean over samples. What looks at several samples at once, such
    as BatchNorm or a loss of pairs, sees those of its rank. An epoch's last, short batch is kept unless it holds fewer
    than two samples per rank. Only as many ranks as started a run may go on with it.

    Ctrl-C ends the step, writes a checkpoint, and raises ``KeyboardInterrupt``; a second one kills the process.
    SIGTERM, by which schedulers end a job, ends it like the first Ctrl-C, however often it comes, unless the program
    has a handler of its own.

    Args:
        model: from float images (N, C, H, W) in [-1, 1] to what the loss takes; moved to the runtime's device.
        metrics: without samples; of its kind are the validation errors, and its ``selects`` decides the best epoch.
        loss: called as ``loss(output, labels, weight)``, with None as weight where samples are not weighed; it returns
            the mean over the samples of the batch, or any other number that is made of the batch as a whole. A
            module's parameters are trained, too.
        weights: fitted; None weighs all samples alike.
        weights_from: epochs before the weights count, as in deferred reweighting (Cao et al. 2019).
        sampler: whose ``order(epoch)`` decides what an epoch holds; None takes every sample once, shuffled.
        fds: attached to a part of the model, and no part of it, since ranks would then overwrite its statistics.
        folder: of the run; made if missing.
        resume: go on from ``checkpoint-last.pt`` where there is one; a finished run is left as it is.
        augmentation: whether to flip and shift; or a function called as ``augmentation(images, generator=generator)``
            with uint8 images.
        checkpoint_minutes: most time between two checkpoints; 0 writes one each step. One is written each epoch anyway.
        fingerprint: plain values that tell this run from others, beside the settings of all that is passed here; a
            checkpoint with other ones is refused. Of the model count its modules' classes and settings. An entry named
            after an argument takes that one's place, for what cannot be told from another by itself, such as a lambda:
            ``{"loss": "huber, delta 2"}``.
    Returns:
        the history, a row per epoch: ``epoch`` and ``step``, counted from 1; ``lr`` of the epoch's last step; ``loss``;
        what ``metrics.summary()`` tells of the validation set (``"mae/all"`` and ``"mae/few"`` as ``val_mae`` and
        ``val_mae_few``); and ``seconds`` since the start, not counting pauses.
    Raises:
        RunExistsError: the folder holds a run and ``resume`` is false, or another process trains in it, of which a
        lock tells that ends with the process, even a killed one. CheckpointError: its checkpoint is damaged, of
        another run or of another release; nothing has been changed then. NonFiniteLossError: the loss or its gradient
        became NaN or infinite. SettingsError: the sets are too small for the batches, nothing can be trained, the FDS
        is a part of the model, or nothing but its place in memory tells an argument from another. ShapeError: the loss
        is not one number. UsageError: another thread of the process trains, gradients are off, or the loss has none.
        LabelError: a validation label lies beyond the axis. TypeError: an argument is of another kind. OSError: the
        folder cannot be made or written to.
    """
    _check(model, train, val, metrics, loss, weights, sampler, fds, optimization, runtime, augmentation)
    instance((str, os.PathLike), folder=folder)
    instance(bool, resume=resume)
    # Now, not when the first epoch has ended.
    metrics.bins.index(val.labels, name="val.labels")
    weights_from = whole("weights_from", weights_from, low=0)
    if fingerprint is not None:
        instance(Mapping, fingerprint=fingerprint)
        check_plain("fingerprint", dict(fingerprint))
    checkpoint_seconds = 60 * number("checkpoint_minutes", checkpoint_minutes, low=0)
    folder = Path(folder)
    samples = len(train) if sampler is None else sampler.num_samples
    batches = _batches(samples, optimization.batch_size, runtime.world)
    total_steps = optimization.epochs * len(batches)
    weights = weights.to(runtime.device) if weights is not None else None
    fds = fds.to(runtime.device).train() if fds is not None else None
    step = _Step(model, loss, runtime).to(runtime.device)
    step.zero_grad()  # what an earlier training left, on frozen parts too, would count in the first step and its norm
    optimizer = make_optimizer(step, optimization)
    at = Progress(loss_sum=torch.zeros((), dtype=torch.float64, device=runtime.device))
    parts = {
        "seed": runtime.seed,
        "world": runtime.world,
        "precision": runtime.precision,
        "train": train.digest,
        "val": val.digest,
        "metrics": metrics,
        "weights": weights,
        "weights_from": weights_from,
        "sampler": None if sampler is None else sampler.settings,
        "fds": fds,
        "fds_attached": _attached(fds, model),
        "augmentation": augmentation,
        "optimization": asdict(optimization),
    }
    files = RunFiles(
        folder,
        runtime,
        model=model,
        loss=loss if isinstance(loss, nn.Module) else None,
        optimizer=optimizer,
        fds=fds,
        at=at,
        identity=run_identity(parts, model=model, loss=loss, fingerprint=fingerprint or {}),
        selects=_column(metrics.selects),
        columns=("epoch", "step", "lr", "loss", *map(_column, metrics.fresh().summary()), "seconds"),
        epochs=optimization.epochs,
        batches=batches,
    )
    files.open(resume)
    if at.epoch == optimization.epochs:
        if runtime.is_main:
            print(f"finished before: best {files.selects} {at.best:.4g} at epoch {at.best_epoch}", flush=True)
        with files:
            files.load_best()
        return at.history

    with (
        files,
        runtime.seeded("fit"),
        RunLog(folder, runtime, steps_per_epoch=len(batches), history=at.history, step=at.steps_done(batches)) as log,
        _Interrupts() as interrupts,
    ):
        network = runtime.parallel(step)
        check_every = 1 if runtime.device.type == "cpu" else _CHECK_EVERY
        started = time.monotonic() - at.seconds
        saved = time.monotonic()
        while at.epoch < optimization.epochs:
            step.train()
            if sampler is not None:
                order = sampler.order(at.epoch)
            else:
                order = torch.randperm(samples, generator=runtime.generator("order", at.epoch), device="cpu")
            watch = _LossWatch(runtime.device)
            log.start_epoch(at.epoch + 1, at.step)
            while at.step < len(batches):
                done = at.steps_done(batches)
                key = (at.epoch, at.step, runtime.rank)
                batch = order[batches[at.step]]
                images, labels = (part.to(runtime.device) for part in train.batch(batch[runtime.rank :: runtime.world]))
                if augmentation:
                    change = augment if augmentation is True else augmentation
                    images = change(images, generator=runtime.generator("augmentation", *key))

                torch.manual_seed(runtime.derive("model", *key))
                weight = weights(labels) if weights is not None and at.epoch >= weights_from else None
                with fds.labels(labels) if fds is not None else nullcontext():
                    mean = _checked_loss(network(to_float(images), labels, weight))
                # Ranks are averaged: so that each counts by its samples, whose number differs in an uneven batch.
                (mean * (len(labels) * runtime.world / len(batch))).backward()

                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(optimization, done, total_steps)
                norm = nn.utils.clip_grad_norm_(step.parameters(), optimization.clip_norm or math.inf)
                watch.see(done, mean.detach(), norm)
                optimizer.step()
                optimizer.zero_grad()
                at.loss_sum += len(labels) * mean.detach().double()
                at.samples += len(batch)
                at.step += 1
                log.step()

                last = at.step == len(batches)
                if last or at.step % check_every == 0 or (runtime.world == 1 and interrupts.noted):
                    at.seconds = time.monotonic() - started
                    due = runtime.is_main and time.monotonic() - saved >= checkpoint_seconds
                    broken, stop, due = runtime.any([watch.broken(), interrupts.noted, due])
                    if broken:
                        raise watch.error(optimization, total_steps, files)
                    if stop or due:
                        files.save_last()
                        saved = time.monotonic()
                    if stop:
                        _stop(files, log)

            if fds is not None:
                fds.end_epoch()
            runtime.share_buffers(step)
            found = evaluate(model, val, metrics=metrics, runtime=runtime)
            at.seconds = time.monotonic() - started
            done = at.steps_done(batches)
            row = _row(at, found, runtime, lr=learning_rate(optimization, done - 1, total_steps), step=done)
            best = at.end_epoch(row, files.selects)
            if best:
                files.save_best()
            log.end_epoch(row, best=best)
            files.save_last()
            saved = time.monotonic()
            if any(runtime.any([interrupts.noted])):
                _stop(files, log)
        files.load_best()
    if runtime.is_main and 0 < at.best_epoch <= _EARLY < optimization.epochs // 2:
        warn(
            f"{files.selects} was least at epoch {at.best_epoch} of {optimization.epochs}, and these weights are "
            "loaded. Lower the learning rate, look for odd labels in the validation set, or train for fewer epochs.",
        )
    return at.history


def evaluate(model: nn.Module, data: ImageSet, *, metrics: Metrics, runtime: Runtime, batch_size: int = 512) -> Metrics:
    """A model's errors over a set, each sample counted once whatever the number of ranks, which must all call this.

    Modules run in eval mode and get their own modes back. All ranks must hold the same weights and buffers.

    Args:
        model: from float images in [-1, 1] to what ``metrics`` takes, or to something that names it: ``prediction``
            for regression, ``scores`` for classes.
        metrics: of the kind wanted; it is left as it is.
        batch_size: images per forward pass of one rank.
    Returns:
        metrics of all ranks; ``.compute()`` makes the numbers.
    """
    instance((RegressionMetrics, ClassificationMetrics), metrics=metrics)
    found = metrics.fresh()
    for _, output, labels in _outputs(model, data, runtime, batch_size):
        found.update(getattr(output, metrics.takes, output), labels)
    return found.all_reduce()


def predict(model: nn.Module, data: ImageSet, *, runtime: Runtime, batch_size: int = 512) -> Any:
    """What a model makes of each image of a set, in the set's order, on every rank; all must call this.

    Modules run in eval mode and get their own modes back. All ranks must hold the same weights and buffers.

    Returns:
        a tensor (N, ...) on the runtime's device; or, of a model that returns a tuple, such a tuple of tensors, None
        where the model's is None, and of a number per batch that of the first.
    Raises:
        ValueError: there are fewer images than ranks.
    """
    instance(ImageSet, data=data)
    instance(Runtime, runtime=runtime)
    if len(data) < runtime.world:  # a rank without images would know no shapes
        raise problem(f"data must hold at least one image per rank, {runtime.world}", got=f"{len(data)}")
    parts = list(_outputs(model, data, runtime, batch_size))
    at = torch.cat([indices for indices, _, _ in parts])

    def whole_set(pieces: list[Any]) -> Tensor | None:
        if pieces[0] is None or pieces[0].ndim == 0:
            return pieces[0]
        own = torch.cat(pieces)
        everyone = own.new_zeros(len(data), *own.shape[1:])
        everyone[at.to(own.device)] = own
        return runtime.sum(everyone)

    outputs = [output for _, output, _ in parts]
    if isinstance(outputs[0], tuple):
        pieces: list[Any] = [whole_set(list(parts)) for parts in zip(*outputs, strict=True)]
        kind = type(outputs[0])
        return kind(*pieces) if hasattr(kind, "_fields") else kind(pieces)
    return whole_set(outputs)


@torch.no_grad()
def _outputs(
    model: nn.Module, data: ImageSet, runtime: Runtime, batch_size: int
) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """This rank's share of a set: indices, what the model makes of their images in eval mode, their labels."""
    instance(nn.Module, model=model)
    instance(ImageSet, data=data)
    instance(Runtime, runtime=runtime)
    batch_size = whole("batch_size", batch_size, low=1)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for indices in torch.arange(len(data), device="cpu")[runtime.rank :: runtime.world].split(batch_size):
            if len(indices) == 0:  # more ranks than images
                continue
            images, labels = (part.to(runtime.device) for part in data.batch(indices))
            with runtime.autocast():
                output = model(to_float(images))
            yield indices, output, labels
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Step(nn.Module):
    """Model and loss as one module, so that DistributedDataParallel sees the parameters of both."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], runtime: Runtime) -> None:
        super().__init__()
        self.model, self.loss, self._runtime = model, loss, runtime

    def forward(self, images: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        with self._runtime.autocast():
            output = self.model(images)
        return self.loss(output, labels, weight)


class _LossWatch:
    """Keeps the first step whose loss or gradient is not finite, on the device, until it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((3,), -1.0, dtype=torch.float64, device=device)  # step, loss, gradient norm

    def see(self, step: int, loss: Tensor, norm: Tensor) -> None:
        now = torch.stack([torch.full_like(self._first[0], step), loss.double(), norm.double()])
        new = ~now.isfinite().all() & (self._first[0] < 0)
        self._first = torch.where(new, now, self._first)

    def broken(self) -> bool:
        return self._first[0].item() >= 0

    def error(self, optimization: Optimization, steps: int, files: RunFiles) -> Exception:
        step, loss, norm = self._first.tolist()
        what = "another rank's"
        if step >= 0:
            lr = learning_rate(optimization, int(step), steps)
            what = f"{loss:g} with a gradient norm of {norm:g} at step {int(step) + 1} of {steps}, learning rate {lr:g}"
        good = (
            f"The last good checkpoint, {files.last_place}, is {files.last}."
            if files.last_place
            else ("There is no checkpoint yet.")
        )
        return problem(
            "the loss and its gradient must be finite",
            got=what,
            fix=f"{good} Lower the learning rate or set clip_norm, and start in another folder.",
            error=NonFiniteLossError,
        )


class _Interrupts(AbstractContextManager["_Interrupts"]):
    """Notes Ctrl-C, the second of which kills, and SIGTERM. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            # Handlers that were not set by Python are None, and could not be put back.
            before = {sort: signal.getsignal(sort) for sort in (signal.SIGINT, signal.SIGTERM)}
            if before[signal.SIGTERM] is not signal.SIG_DFL:
                del before[signal.SIGTERM]
            for sort, handler in before.items():
                if handler is not None:
                    self._before[sort] = handler
                    signal.signal(sort, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for sort, handler in self._before.items():
            signal.signal(sort, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(files: RunFiles, log: RunLog) -> None:
    log.say(f"Stopped; {files.place()}. Go on with --resume.")
    raise KeyboardInterrupt


def _checked_loss(loss: object) -> Tensor:
    """The loss, which is one number and has a gradient."""
    if not isinstance(loss, Tensor):
        raise problem("loss must return a tensor", got=type(loss).__name__, error=TypeError)
    if loss.ndim:
        got, fix = f"shape {tuple(loss.shape)}", "Return the mean over samples."
        raise problem("loss must return one number", got=got, fix=fix, error=ShapeError)
    if not loss.requires_grad:
        fix = "Leave out .detach() and torch.no_grad(), and use the output it is handed."
        raise problem("loss must depend on what is trained", got="one without a gradient", fix=fix, error=RuntimeError)
    return loss


def _attached(fds: FDS | None, model: nn.Module) -> list[tuple[str, str]]:
    """Where in the model an FDS works: the names of modules, and on which of their ends."""
    return [
        (name, end)
        for name, module in model.named_modules()
        for end, hooks in (("input", module._forward_pre_hooks), ("output", module._forward_hooks))
        if any(fds is not None and getattr(hook, "fds", None) is fds for hook in hooks.values())
    ]


def _check(
    model: nn.Module,
    train: ImageSet,
    val: ImageSet,
    metrics: Metrics,
    loss: Callable[..., Tensor],
    weights: LDS | None,
    sampler: BinSampler | None,
    fds: FDS | None,
    optimization: Optimization,
    runtime: Runtime,
    augmentation: bool | Callable[..., Tensor],
) -> None:
    instance(nn.Module, model=model)
    instance(ImageSet, train=train, val=val)
    instance((RegressionMetrics, ClassificationMetrics), metrics=metrics)
    instance(Callable, loss=loss)
    if weights is not None:
        instance(LDS, weights=weights)
    if sampler is not None:
        instance(BinSampler, sampler=sampler)
    if fds is not None:
        instance(FDS, fds=fds)
    if not callable(augmentation):
        instance(bool, augmentation=augmentation)
    instance(Optimization, optimization=optimization)
    instance(Runtime, runtime=runtime)
    if not torch.is_grad_enabled():
        raise problem(
            "gradients must be on",
            got="torch.no_grad() or torch.inference_mode() around it",
            fix="Call it outside of these.",
            error=RuntimeError,
        )
    least = 2 * runtime.world
    faults = []
    samples = len(train) if sampler is None else sampler.num_samples
    if sampler is not None and sampler.num_labels != len(train):
        faults.append(f"sampler must draw from the {len(train)} labels of train, got one of {sampler.num_labels}.")
    if samples < least or optimization.batch_size < least:
        got = f"{samples} images in batches of {optimization.batch_size}"
        faults.append(f"train and its batches must hold at least two images per rank, {least}, got {got}.")
    if len(val) == 0:
        faults.append("val must hold at least one image, got none.")
    if not any(p.requires_grad for part in (model, loss) if isinstance(part, nn.Module) for p in part.parameters()):
        faults.append("model must have parameters that are trained, got none. Call model.requires_grad_(True).")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        faults.append("model must have weights, got lazy layers that have none yet. Run it once on a few images first.")
    if fds is not None and any(module is fds for module in model.modules()):
        faults.append("fds must be no part of the model. Keep it outside and attach it.")
    if fds is not None and not fds.attached:
        faults.append('fds must be attached to a part of the model. Call fds.attach(model.head, "input") first.')
    if faults:
        raise SettingsError("\n  ".join(["fit: this cannot be trained:", *faults]))


def _batches(samples: int, batch_size: int, world: int) -> list[slice]:
    """The places of each global batch in an epoch's order."""
    batches = [slice(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size)]
    return [batch for batch in batches if batch.stop - batch.start >= 2 * world]


def _column(name: str) -> str:
    """What a history calls a number of ``metrics.summary()``: ``val_mae`` for "mae/all", ``val_mae_few``."""
    return "val_" + name.removesuffix("/all").replace("/", "_")


def _row(at: Progress, metrics: Metrics, runtime: Runtime, *, lr: float, step: int) -> dict[str, Any]:
    return {
        "epoch": at.epoch + 1,
        "step": step,
        "lr": lr,
        "loss": runtime.sum(at.loss_sum).item() / at.samples,
        **{_column(name): value for name, value in metrics.summary().items()},
        "seconds": round(at.seconds, 3),
    }
