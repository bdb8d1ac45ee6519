"""The training loop, for one process or several, which can be stopped and resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..._checks import drop_alike, instance, number, one_of, require, warn, whole
from ...errors import LabelError, SettingsError
from ...features.fds import FDS
from ...features.hooks import FDSHook
from ...labels.bins import MISSING, Missing
from ...labels.grid import BinGrid
from ...labels.sampling import BinSampler
from ...labels.weights import LDS
from ...losses.regression import weighted_l1
from ...metrics.classification import ClassificationMetrics
from ...metrics.distribution import DistributionMetrics
from ...metrics.regression import RegressionMetrics
from ..data.augment import augment, to_float
from ..data.images import ImageSet, SampleSet
from .checkpoint import check_plain
from .identity import run_identity
from .interrupts import Interrupts
from .log import RunLog
from .optimization import Optimization
from .run_files import RunFiles
from .run_state import Progress
from .runtime import Runtime
from .steps import LossWatch, Steps

__all__ = ["Metrics", "Optimization", "evaluate", "fit", "predict"]

Metrics = RegressionMetrics | ClassificationMetrics | DistributionMetrics

# On an accelerator the loss is checked, and the ranks agree whether to stop, once in so many steps.
_CHECK_EVERY = 50

_AS_SET = "Use MappedSet(dataset)."
_EARLY = 3  # a warning is issued if the best epoch is not after this one


def fit(
    model: nn.Module,
    train: SampleSet,
    val: SampleSet,
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
    augmentation: bool | Callable[..., Tensor] | None = None,
    mixing: Callable[..., tuple[Any, Tensor]] | None = None,
    missing: Missing = "raise",
    checkpoint_minutes: float = 5.0,
    fingerprint: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train a model, and load the weights of the epoch with the smallest validation error at the end.

    All random numbers depend on the seed and the position in the run: the order of an epoch on (seed, epoch),
    augmentation and random layers on (seed, epoch, step, rank). On the CPU a run that was stopped anywhere and resumed
    with the same number of threads is therefore bit-identical to an uninterrupted run. With another number of threads a
    warning is issued. On CUDA sums have no fixed order.

    Each batch is distributed to the ranks, and a rank's loss is weighted by its share of the batch. If the loss is a
    mean over samples, n ranks make the same steps as one. BatchNorm and losses of pairs use the samples of their rank.
    The last, smaller batch of an epoch is used unless it has fewer than two samples per rank. A run must be resumed
    with the same number of ranks.

    Ctrl-C finishes the step, writes a checkpoint, and raises ``KeyboardInterrupt``. A second Ctrl-C kills the process.
    SIGTERM, which schedulers send, acts like the first Ctrl-C, unless the program has its own handler.

    Args:
        model: a module from float images (N, C, H, W) in [-1, 1], or from rows, sequences, tuples or dicts of the data
            sets, to the input of the loss. It is moved to the runtime's device.
        metrics: empty metrics for validation errors. Its ``selects`` names the error that selects the best epoch.
        loss: called as ``loss(output, labels, weight)``; the weight is None without ``weights``. It returns the mean
            over the batch, or one number for the whole batch. If it is a module, its parameters are trained as well.
        weights: a fitted LDS; None means equal weights. Over a grid it refuses samples that lack only some of their
            labels.
        weights_from: the number of epochs without weights at the start, for deferred reweighting (Cao et al. 2019).
        sampler: its ``order(epoch)`` gives the samples of an epoch; None takes every sample once, shuffled.
        fds: an FDS that is attached to the model but is not a submodule, since ranks would then overwrite its
            statistics.
        folder: the folder of the run, which is created if missing.
        resume: whether to continue from ``checkpoint-last.pt`` if it exists. A finished run does not change.
        augmentation: whether to flip and shift images, which None does for an ``ImageSet`` only; or a function of
            inputs, called as ``augmentation(inputs, generator=generator)``.
        mixing: a function that mixes the samples of a batch after augmentation, called as ``mixing(inputs, labels,
            generator=generator)``, such as ``functools.partial(dir_toolkit.labels.c_mixup, bandwidth=2.0)``.
        missing: what a training label that is NaN does: ``"raise"``; or ``"drop"``, with which the loss is to be the
            mean over the labels of a batch that are there. Each rank counts by its share of these then, and each batch
            in the history, too. The loss, ``weights`` and ``fds`` must drop missing labels themselves, as a
            :class:`dir_toolkit.LongTailModel` made with ``missing="drop"`` does in its ``criterion``. A function that
            takes ``missing=``, as those of :mod:`dir_toolkit.losses` do, is called with it. Ranks make the same steps
            as one process only if the loss is the mean over all labels that are there. That of a
            :class:`dir_toolkit.MultiTargetModel` is not, since it is a mean of one mean per target.
        checkpoint_minutes: the longest time between two checkpoints; 0 writes one in each step. One is also written at
            the end of each epoch.
        fingerprint: plain values that identify this run, in addition to the settings of all arguments. A checkpoint
            with other values raises an error. An entry with the name of an argument replaces its settings, which a
            lambda needs: ``{"loss": "huber, delta 2"}``. A module of your own in the model is known by the name of its
            class alone, unless it has ``settings``: name here what else its numbers depend on.
    Returns:
        the history, one row per epoch: ``epoch`` and ``step``, counted from 1; ``lr`` of the epoch's last step;
        ``loss``; ``metrics.summary()`` of the validation set (``"mae/all"`` and ``"mae/few"`` as ``val_mae`` and
        ``val_mae_few``); and ``seconds`` since the start, not counting pauses.
    Raises:
        RunExistsError: the folder holds a run and ``resume`` is false, or another process trains in it, which a lock
        shows that ends with the process, even a killed one. CheckpointError: its checkpoint is damaged, of another run
        or of another release; nothing has been changed then. NonFiniteLossError: the loss or its gradient became NaN
        or infinite. SettingsError: the sets are too small for the batches, nothing can be trained, the FDS is a part
        of the model, or nothing but its place in memory tells an argument from another. ShapeError: the loss is not
        one number. UsageError: another thread of the process trains, gradients are off, or the loss has none.
        LabelError: a validation label lies beyond the axis, or a label is missing where these are not dropped, or all
        are, of training or of validation. TypeError: an argument is of another kind. OSError: the folder cannot be made
        or written to.
    """
    instance(nn.Module, model=model)
    instance(SampleSet, _AS_SET, train=train, val=val)
    instance(get_args(Metrics), metrics=metrics)
    instance(Callable, loss=loss)
    one_of("missing", missing, MISSING)
    optional = ((LDS, "weights", weights), (BinSampler, "sampler", sampler), (FDS, "fds", fds))
    for kind, name, value in (*optional, (Callable, "mixing", mixing)):
        instance(kind, **({} if value is None else {name: value}))
    augmentation = isinstance(train, ImageSet) if augmentation is None else augmentation
    instance((bool, Callable), augmentation=augmentation)
    instance(Optimization, optimization=optimization)
    instance(Runtime, runtime=runtime)
    # Now, and not when the first epoch has ended.
    placed = metrics.bins.index(val.labels, metrics.outside, missing=metrics.missing, name="val.labels")
    rule, fix = "val must hold at least one label that metrics count", "Over a grid a label is dropped if part is NaN."
    require(not len(val) or bool((placed >= 0).any()), rule, got="none", fix=fix, error=LabelError)
    one_of("metrics.selects", metrics.selects, tuple(metrics.summary()))
    got, on = "torch.no_grad() or torch.inference_mode() around it", torch.is_grad_enabled()
    require(on, "gradients must be on", got=got, fix="Call it outside of these.", error=RuntimeError)
    _check_trainable(model, train, val, loss, sampler, fds, optimization, runtime.world)
    counts = _labels_there(train, missing)
    for name, part in {"loss": getattr(loss, "__self__", loss), "weights": weights, "fds": fds}.items():
        if hasattr(part, "missing"):
            drop_alike(name, part, "training", missing=missing)
    if weights is not None and isinstance(weights.bins, BinGrid):
        gone = np.isnan(train.labels)
        rule, got = "weights over a grid need all labels of a sample or none", "samples that lack some, which weigh 0"
        fix = "Give each model of MultiTargetModel.targets its own weights=LDS(bins), and fit none."
        require(bool((gone.all(-1) == gone.any(-1)).all()), rule, got=got, fix=fix, error=LabelError)
    instance((str, os.PathLike), folder=folder)
    instance(bool, resume=resume)
    weights_from = whole("weights_from", weights_from, low=0)
    if fingerprint is not None:
        instance(Mapping, fingerprint=fingerprint)
        check_plain("fingerprint", dict(fingerprint))
    checkpoint_seconds = 60 * number("checkpoint_minutes", checkpoint_minutes, low=0)
    folder = Path(folder)
    weights = weights.to(runtime.device) if weights is not None else None
    fds = fds.to(runtime.device).train() if fds is not None else None
    both = _ModelAndLoss(model, loss, runtime, missing).to(runtime.device)
    samples = _samples(train, sampler)
    steps = Steps(both, optimization, samples, runtime, fewest=2 * runtime.world, norms=True, counts=counts)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    progress = Progress(_column(metrics.selects), steps.batches, loss_sum)
    parts = {
        "seed": runtime.seed,
        "number of processes": runtime.world,
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
        "mixing": mixing,
        "missing": missing,
        "optimization": asdict(optimization),
    }
    files = RunFiles(
        folder,
        runtime,
        model=model,
        loss=loss if isinstance(loss, nn.Module) else None,
        optimizer=steps.optimizer,
        fds=fds,
        progress=progress,
        identity=run_identity(parts, model=model, loss=loss, fingerprint=fingerprint or {}),
        columns=("epoch", "step", "lr", "loss", *map(_column, metrics.fresh().summary()), "seconds"),
        epochs=optimization.epochs,
    )
    files.open(resume)
    if progress.epoch == optimization.epochs:
        if runtime.is_main:
            epoch, error = progress.best
            print(f"This run was finished before: best {progress.selects} {error:.4g} at epoch {epoch}.", flush=True)
        with files:
            files.load_best()
        return progress.history

    with (
        files,
        runtime.seeded("fit"),
        RunLog(
            folder, runtime, steps_per_epoch=len(steps.batches), history=progress.history, step=progress.steps_done
        ) as log,
        Interrupts() as interrupts,
    ):
        network = runtime.parallel(both)
        check_every = 1 if runtime.device.type == "cpu" else _CHECK_EVERY
        started = time.monotonic() - progress.seconds
        saved = time.monotonic()

        def loss_of(place: int, indices: Tensor) -> Tensor:
            key = (progress.epoch, place, runtime.rank)
            if place not in read:  # A sharpness-aware step asks twice.
                read.clear()
                read[place] = next(batches)
            images, labels = _moved(read[place], runtime.device)
            if augmentation:
                change = augment if augmentation is True else augmentation
                images = change(images, generator=runtime.generator("augmentation", *key))
            images = _floats(images)
            if mixing is not None:
                images, labels = mixing(images, labels, generator=runtime.generator("mixing", *key))
            runtime.set_seed("model", *key)
            weight = weights(labels) if weights is not None and progress.epoch >= weights_from else None
            with fds.labels(labels) if fds is not None else nullcontext():
                return _checked_loss(network(images, labels, weight))

        while progress.epoch < optimization.epochs:
            both.train()
            if sampler is not None:
                order = sampler.order(progress.epoch)
            else:
                order = torch.randperm(samples, generator=runtime.generator("order", progress.epoch), device="cpu")
            batches = train.batches([batch for batch, _ in steps.own_batches(order, progress.step)])
            read: dict[int, tuple[Any, Tensor]] = {}
            watch = LossWatch(runtime.device)
            log.start_epoch(progress.epoch + 1, progress.step)
            for step in steps.epoch(progress.epoch, order, loss_of, start=progress.step):
                watch.see(progress.steps_done, step)
                progress.loss_sum += step.labels * step.loss.double()
                progress.step += 1
                log.step()

                last = progress.step == len(steps.batches)
                if last or progress.step % check_every == 0 or (runtime.world == 1 and interrupts.noted):
                    progress.seconds = time.monotonic() - started
                    due = runtime.is_main and time.monotonic() - saved >= checkpoint_seconds
                    broken, stop, due = runtime.any([watch.broken(), interrupts.noted, due])
                    if broken:
                        raise watch.error(steps, files.state())
                    if stop or due:
                        files.save_last()
                        saved = time.monotonic()
                    if stop:
                        _stop(files, log)

            if fds is not None:
                fds.end_epoch()
            runtime.share_buffers(both)
            errors = evaluate(model, val, metrics=metrics, runtime=runtime)
            progress.seconds = time.monotonic() - started
            seen = sum(labels for _, labels in steps.all_batches(order))
            row = _row(progress, errors, runtime, seen, lr=steps.rate(progress.steps_done - 1))
            best_yet = progress.end_epoch(row)
            if best_yet:
                files.save_best()
            log.end_epoch(row, best=best_yet)
            files.save_last()
            saved = time.monotonic()
            if any(runtime.any([interrupts.noted])):
                _stop(files, log)
        if runtime.world > 1 or progress.best[0] != progress.epoch:  # else the model has these weights
            files.load_best()
    epoch, odd = progress.best[0], ""
    if not epoch:
        odd = (
            f"{progress.selects} was finite after no epoch, and the weights are those of the last one. Look at the "
            "metrics of the history, or let another error select the epoch."
        )
    elif epoch <= _EARLY < optimization.epochs // 2:
        odd = (
            f"{progress.selects} was least at epoch {epoch} of {optimization.epochs}, and these weights are loaded. "
            "Lower the learning rate, look for odd labels in the validation set, or train for fewer epochs."
        )
    if odd and runtime.is_main:
        warn(odd)
    return progress.history


def evaluate(
    model: nn.Module, data: SampleSet, *, metrics: Metrics, runtime: Runtime, batch_size: int = 512
) -> Metrics:
    """A model's errors over a data set. All ranks must call this; each sample is counted once.

    Modules run in eval mode and get their own modes back. All ranks must hold the same weights and buffers.

    Args:
        model: from float images in [-1, 1] to what ``metrics`` takes, or to something that names it: ``prediction``
            for regression, ``scores`` for classes, ``distribution`` for distributions.
        metrics: metrics of the wanted kind, which do not change.
        batch_size: images per forward pass of one rank.
    Returns:
        the metrics of all ranks, for ``.compute()``.
    """
    instance(get_args(Metrics), metrics=metrics)
    own = metrics.fresh()
    for _, output, labels in _outputs(model, data, runtime, batch_size):
        own.update(getattr(output, metrics.takes, output), labels)
    return own.all_reduce()


def predict(model: nn.Module, data: SampleSet, *, runtime: Runtime, batch_size: int = 512) -> Any:
    """The outputs of a model for a data set, in its order, on every rank. All ranks must call this.

    Modules run in eval mode and get their own modes back. All ranks must hold the same weights and buffers.

    Returns:
        a tensor (N, ...) on the runtime's device; or, of a model that returns a tuple, such a tuple of tensors, None
        where the model's is None, and of a number per batch that of the first.
    Raises:
        ValueError: there are fewer images than ranks.
    """
    instance(SampleSet, _AS_SET, data=data)
    instance(Runtime, runtime=runtime)
    images, least = len(data), runtime.world  # a rank without images would know no shapes
    require(images >= least, f"data must hold at least one image per rank, {least}", got=images)
    parts = list(_outputs(model, data, runtime, batch_size))
    places = torch.cat([indices for indices, _, _ in parts])

    def whole_set(pieces: list[Any]) -> Tensor | None:
        if pieces[0] is None or pieces[0].ndim == 0:
            return pieces[0]
        own = torch.cat(pieces)
        everyone = own.new_zeros(len(data), *own.shape[1:])
        everyone[places.to(own.device)] = own
        return runtime.sum(everyone)

    outputs = [output for _, output, _ in parts]
    if isinstance(outputs[0], tuple):
        pieces: list[Any] = [whole_set(list(parts)) for parts in zip(*outputs, strict=True)]
        kind = type(outputs[0])
        return kind(*pieces) if hasattr(kind, "_fields") else kind(pieces)
    return whole_set(outputs)


@torch.no_grad()
def _outputs(
    model: nn.Module, data: SampleSet, runtime: Runtime, batch_size: int
) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """This rank's samples of a set: indices, the model's outputs in eval mode, and labels."""
    instance(nn.Module, model=model)
    instance(SampleSet, _AS_SET, data=data)
    instance(Runtime, runtime=runtime)
    batch_size = whole("batch_size", batch_size, low=1)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        own = torch.arange(len(data), device="cpu")[runtime.rank :: runtime.world]
        parts = own.split(batch_size) if len(own) else ()  # there may be more ranks than samples
        for indices, batch in zip(parts, data.batches(parts), strict=True):
            images, labels = _moved(batch, runtime.device)
            with runtime.autocast():
                output = model(_floats(images))
            yield indices, output, labels
    finally:
        for module, mode in modes.items():
            module.training = mode


def _moved(batch: tuple[Any, Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Inputs and labels on the device, also in tuples or dicts."""
    return tree_map_only(Tensor, lambda part: part.to(device), batch)


def _floats(inputs: Any) -> Any:
    """Pixels as floats in [-1, 1]; other inputs unchanged."""
    return to_float(inputs) if getattr(inputs, "dtype", None) == torch.uint8 else inputs


class _ModelAndLoss(nn.Module):
    """Model and loss as one module, so that DistributedDataParallel sees the parameters of both."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], runtime: Runtime, missing: Missing) -> None:
        super().__init__()
        self.model, self.loss, self._runtime = model, loss, runtime
        takes = missing == "drop" and not isinstance(loss, nn.Module) and "missing" in signature(loss).parameters
        self._options = {"missing": missing} if takes else {}

    def forward(self, images: Any, labels: Tensor, weight: Tensor | None) -> Tensor:
        with self._runtime.autocast():
            output = self.model(images)
        return self.loss(output, labels, weight, **self._options)


def _stop(files: RunFiles, log: RunLog) -> None:
    log.say(f"Stopped. {files.state()} Continue with --resume.")
    raise KeyboardInterrupt


def _checked_loss(loss: Any) -> Tensor:
    """The loss, checked to be one number with a gradient."""
    require(isinstance(loss, Tensor), "loss must return a tensor", got=type(loss))
    require(loss.ndim == 0, "loss must return one number", got=loss.shape, fix="Return the mean over samples.")
    got, fix = "one without a gradient", "Remove .detach() and torch.no_grad(), and use the output that it gets."
    require(loss.requires_grad, "loss must depend on what is trained", got=got, fix=fix, error=RuntimeError)
    return loss


def _attached(fds: FDS | None, model: nn.Module) -> list[tuple[str, str, int | str | None]]:
    """The modules that an FDS is attached to: their names, input or output, and ``select``."""
    return [
        (name, end, hook.select)
        for name, module in model.named_modules()
        for end, hooks in (("input", module._forward_pre_hooks), ("output", module._forward_hooks))
        for hook in hooks.values()
        if isinstance(hook, FDSHook) and hook.fds is fds
    ]


def _check_trainable(
    model: nn.Module,
    train: SampleSet,
    val: SampleSet,
    loss: Any,
    sampler: Any,
    fds: Any,
    optimization: Optimization,
    world: int,
) -> None:
    """Raise one error that lists everything that keeps this from being trained."""
    least, batch_size, samples = 2 * world, optimization.batch_size, _samples(train, sampler)
    faults = []
    if sampler is not None and sampler.num_labels != len(train):
        faults.append(f"sampler must draw from the {len(train)} labels of train, got one of {sampler.num_labels}.")
    if samples < least or batch_size < least:
        got = f"{samples} images in batches of {batch_size}"
        faults.append(f"train and its batches must hold at least two images per rank, {least}, got {got}.")
    faults += ["val must hold at least one image, got none."] * (len(val) == 0)
    if not any(p.requires_grad for part in (model, loss) if isinstance(part, nn.Module) for p in part.parameters()):
        faults.append("model must have parameters that are trained, got none. Call model.requires_grad_(True).")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        faults.append("model must have weights, got lazy layers that have none yet. Run it once on a few images first.")
    if fds is not None and any(module is fds for module in model.modules()):
        faults.append("fds must not be a submodule of the model. Keep it outside and attach it.")
    if fds is not None and optimization.sharpness is not None:
        faults.append("fds must be left out with sharpness, whose second pass it would count. Use sharpness=None.")
    if fds is not None and not fds.attached:
        faults.append('fds must be attached to a module of the model. Call fds.attach(model.head, "input") first.')
    if faults:
        raise SettingsError("\n  ".join(["fit: this cannot be trained:", *faults]))


def _labels_there(train: SampleSet, missing: Missing) -> Tensor:
    """The number of labels of each training sample, (N,), without those that are missing."""
    there = ~np.isnan(train.labels).reshape(len(train), -1)
    sound, rule, fix = bool(there.all()), "train.labels must not be NaN", 'Pass missing="drop".'
    if missing == "drop":
        sound, rule, fix = bool(there.any()), "train must hold at least one label that is not missing", ""
    require(sound, rule, got=lambda: f"{int((~there).sum())} that are", fix=fix, error=LabelError)
    return torch.from_numpy(there.sum(1))


def _samples(train: SampleSet, sampler: BinSampler | None) -> int:
    """The number of samples per epoch."""
    return len(train) if sampler is None else sampler.num_samples


def _column(name: str) -> str:
    """The column of a number of ``metrics.summary()``: ``val_mae`` for "mae/all", ``val_mae_few``."""
    return "val_" + name.removesuffix("/all").replace("/", "_")


def _row(progress: Progress, metrics: Metrics, runtime: Runtime, labels: int, *, lr: float) -> dict[str, Any]:
    """The row of the history for the current epoch."""
    return {
        "epoch": progress.epoch + 1,
        "step": progress.steps_done,
        "lr": lr,
        "loss": runtime.sum(progress.loss_sum).item() / labels,
        **{_column(name): value for name, value in metrics.summary().items()},
        "seconds": round(progress.seconds, 3),
    }
