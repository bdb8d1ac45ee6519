"""The settings, data and methods of ``digits.py``. Each method is an entry of ``METHODS``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.append(str(Path(__file__).parents[1]))

from command_line import unfit_folder

if TYPE_CHECKING:  # torch and the toolkit load within functions, so that --help answers at once
    from torch import Tensor, nn

    from dir_toolkit.experiment.data.images import Splits
    from dir_toolkit.experiment.study import Task, Trained, Trial
    from dir_toolkit.experiment.training.loop import Optimization
    from dir_toolkit.experiment.training.runtime import Runtime

Loss = Literal["cross-entropy", "balanced", "focal", "ldam", "ldam-drw", "logit-adjusted", "equalized", "center"]
LOSSES: tuple[Loss, ...] = ("balanced", "focal", "ldam", "ldam-drw", "logit-adjusted", "equalized", "center")
PROTOTYPES = (1, 2, 3, 5, 10, 20)
SIGMAS = (0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True)
class Data:
    """Digits, and which of them are kept."""

    data: Literal["digits", "mnist"] = "digits"
    """Digits of 8x8 pixels that come with scikit-learn, or the files of MNIST in --root."""
    root: Path | None = None
    """Folder of the four idx files of MNIST, packed or not."""
    download: bool = False
    """Fetch the files of MNIST into --root first, where they are missing."""
    verify: bool = False
    """Refuse files in --root that are not the official ones of MNIST."""
    profile: Literal["step", "exponential"] = "step"
    """Which digits are thinned: 0 to 4 alike, or all, increasingly from 0 to 9."""
    retention: float = 0.1
    """Share kept of the digits that are thinned most, in (0, 1]."""
    noise: float = 0.0
    """Share of training labels made wrong, in [0, 1); validation and test labels stay right."""
    train_per_class: int | None = None
    """Images per digit of MNIST before any is thinned; by default all."""
    val_per_class: int | None = None
    """Validation images per digit; by default 20 of digits and 200 of MNIST."""


@dataclass(frozen=True)
class Remedy:
    """Heads, losses and adjustments."""

    feature_scale: float = 1.0
    """The factor of the features in affinity heads; 1 is the formula of the paper, for features of its network."""
    margin: float = 0.75
    """The margin between the affinity of the true class and those of the others."""
    tau: float = 1.0
    """Strength of the logit-adjusted loss and of post-hoc adjustment."""
    focal_gamma: float = 2.0
    """How much focal loss favours hard samples."""
    ldam_margin: float = 0.5
    """The largest margin of LDAM, between cosines."""
    ldam_start: float = 0.8
    """Share of the epochs after which LDAM-DRW weights classes."""
    center_strength: float = 0.01
    """Weight of the center loss beside cross-entropy."""
    equalized_drop: float = 0.9
    """How often the equalization loss ignores the score of a rare class for a sample of another class."""


@dataclass(frozen=True)
class Training:
    """How networks are trained."""

    epochs: int | None = None
    """Passes over the training images; by default 40 for digits and 15 for MNIST."""
    batch_size: int | None = None
    """Images per step, over all processes together; by default 32 for digits and 128 for MNIST."""
    lr: float = 0.05
    """The highest learning rate."""
    weight_decay: float = 5e-4
    """The weight decay of SGD."""
    clip_norm: float = 5.0
    """The limit of the gradient norm, without which LDAM, with scores scaled by 30, and high learning rates diverge."""
    stage_two_epochs: int = 5
    """Passes in which crt and lws retrain the head."""


@dataclass(frozen=True)
class Run:
    """What is run, and where."""

    seeds: int = 1
    """The number of seeds: 0, 1, ... A seed decides the network, the order, and which images are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["float32", "bf16"] = "float32"
    """The precision of the forward pass."""
    checkpoint_minutes: float = 5.0
    """The longest time between two checkpoints."""
    resume: bool = False
    """Use what an earlier run in --out has trained, and continue it if it was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/mnist/<data>."""


@dataclass(frozen=True)
class Settings(Run, Training, Remedy, Data):
    """All settings of a study of digits except which study it is."""


PARTS = (Data, Training, Remedy)
"""All parts except ``Run``, to which a study adds settings of its own."""


@dataclass(frozen=True)
class Method:
    """One way to train and to predict. The defaults are softmax and cross-entropy."""

    head: Literal["softmax", "cosine", "affinity"] = "softmax"
    loss: Loss = "cross-entropy"
    """The loss of softmax and cosine heads; the affinity head has its own."""
    after: Literal["post-hoc", "post-hoc-chosen", "tau-norm", "ncm", "crt", "lws"] | None = None
    """If not None, what is done to the trained network of softmax."""
    prototypes: int = 5
    """The prototypes per class of the affinity head."""
    sigma: float = 10.0
    """The width of its similarity."""
    distance: Literal["l2", "l1"] = "l2"
    similarity: Literal["gaussian", "inverse"] = "gaussian"
    num_features: int = 128


METHODS: dict[str, Method] = {
    "softmax": Method(),
    "cosine": Method(head="cosine"),
    **{loss: Method(loss=loss) for loss in LOSSES},
    **{f"cosine+{loss}": Method(head="cosine", loss=loss) for loss in LOSSES if not loss.startswith("ldam")},
    **{f"affinity-m{count}": Method(head="affinity", prototypes=count) for count in PROTOTYPES},
    **{f"affinity-m5-sigma{sigma:g}": Method(head="affinity", sigma=sigma) for sigma in SIGMAS if sigma != 10},
    "affinity-m5-l2-inverse": Method(head="affinity", similarity="inverse"),
    "affinity-m5-l1-gaussian": Method(head="affinity", distance="l1"),
    "affinity-m5-l1-inverse": Method(head="affinity", distance="l1", similarity="inverse"),
    "softmax-2d": Method(num_features=2),
    "center-2d": Method(loss="center", num_features=2),
    "affinity-m1-2d": Method(head="affinity", prototypes=1, num_features=2),
    "affinity-m5-2d": Method(head="affinity", num_features=2),
    "post-hoc": Method(after="post-hoc"),
    "post-hoc-chosen": Method(after="post-hoc-chosen"),
    "tau-norm": Method(after="tau-norm"),
    "ncm": Method(after="ncm"),
    "crt": Method(after="crt"),
    "lws": Method(after="lws"),
}


def methods(settings: Settings, names: Sequence[str]) -> dict[str, Callable[[Trial], Trained]]:
    """The functions that a study runs, by name: the study's methods first and in its order, then all others."""
    return {
        name: partial(trained, METHODS[name], settings) for name in dict.fromkeys([*names, *METHODS]) if name in METHODS
    }


def trained(method: Method, settings: Settings, trial: Trial) -> Trained:
    """Train the network of a method with the seed of the trial."""
    import dir_toolkit as dt
    from dir_toolkit.experiment.backbones import digit_cnn

    if method.after is not None:
        return afterwards(method.after, settings, trial)
    features = method.num_features
    backbone = digit_cnn(features, size=trial.splits.train.inputs.shape[2], activation=features > 2)
    weights, weights_from = None, 0
    head: Any = None
    loss: Any = None
    adjusted = (
        {"target_prior": "uniform", "adjust": "in_loss", "tau": settings.tau} if method.loss == "logit-adjusted" else {}
    )
    if method.head == "affinity":
        shape = (method.prototypes, method.sigma, method.distance, method.similarity)
        head = dt.AffinityHead(features, 10, *shape, feature_scale=settings.feature_scale)
        loss = partial(margin_loss, head=head, margin=settings.margin, diversity=features > 2)
    elif method.loss in ("ldam", "ldam-drw"):  # whose paper normalises features and weights
        head = dt.heads.CosineHead(features, 10, scale=1.0)
        loss = partial(on_scores, dt.losses.ldam_loss, counts=trial.density.counts, max_margin=settings.ldam_margin)
    elif method.loss == "focal":
        loss = partial(on_scores, dt.losses.focal_loss, gamma=settings.focal_gamma)
    elif method.loss == "equalized":
        loss = partial(equalized, prior=dt.class_prior(trial.density), drop=settings.equalized_drop)
    elif method.loss == "center":
        loss = with_centers(features, settings.center_strength)
    if method.loss == "balanced":
        weights = dt.LDS(trial.bins, kernel=None, scheme="inverse").fit(trial.density)
    elif method.loss == "ldam-drw":
        weights = dt.LDS(trial.bins, kernel=None, scheme="effective_number", beta=0.9999).fit(trial.density)
        weights_from = round(settings.ldam_start * trial.study.optimization.epochs)
    model = trial.model(backbone, head=head or {"softmax": "linear", "cosine": "cosine"}[method.head], **adjusted)
    return trial.fit(model, loss=loss, weights=weights, weights_from=weights_from)


def on_scores(
    loss: Callable[..., Tensor], output: Any, labels: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """A loss of scores as a loss of the model's output."""
    return loss(output.scores, labels, weight, **options)


def margin_loss(
    output: Any, labels: Tensor, weight: Tensor | None = None, *, head: Any, margin: float, diversity: bool
) -> Tensor:
    """The affinity loss, with diversity unless features are planar.

    In the plane only three prototypes can be equally far apart, and diversity would pull all others together.
    """
    import dir_toolkit as dt

    loss = dt.affinity_loss(output.scores, labels, weight, margin=margin)
    return loss + head.diversity() if diversity else loss


def equalized(output: Any, labels: Tensor, weight: Tensor | None = None, *, prior: Tensor, drop: float) -> Tensor:
    """The equalization loss, where rare classes are those with less than the mean share.

    It draws from the generator of torch, which is seeded anew in every step.
    """
    import torch

    import dir_toolkit as dt

    device = labels.device
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    options: dict[str, Any] = {"threshold": 0.1, "drop": drop, "generator": generator}
    return dt.losses.equalization_loss(output.scores, labels, weight, prior=prior.to(device), **options)


def with_centers(num_features: int, strength: float) -> nn.Module:
    """Cross-entropy and the center loss, whose centers are trained with the network.

    The gradient of a center is the update of the paper, whatever the batch size. SGD applies it with its learning rate,
    momentum and decay.
    """
    from torch import nn

    import dir_toolkit as dt

    class WithCenters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers = dt.losses.CenterLoss(num_features, 10, strength=strength)

        def forward(self, output: Any, labels: Tensor, weight: Tensor | None = None) -> Tensor:
            return self.centers(output.features, labels, weight) + dt.losses.cross_entropy(
                output.scores, labels, weight
            )

    return WithCenters()


def afterwards(after: Any, settings: Settings, trial: Trial) -> Trained:
    """Apply a remedy to the network that was trained with softmax."""
    import torch

    import dir_toolkit as dt
    from dir_toolkit.experiment.training.loop import predict

    first = trial.trained("softmax")
    model: Any = first.model
    if after == "post-hoc-chosen":
        return trial.adjusted(first)
    if after == "post-hoc":
        model.set_prior("uniform", settings.tau)
        return first
    if after in ("crt", "lws"):  # the encoder is frozen, and classes are drawn evenly
        dt.stage_two(model, after, seed=trial.runtime.derive("head"))
        sampler = dt.BinSampler(trial.splits.train.labels, trial.bins, q=0.0, seed=trial.runtime.seed)
        budget = replace(trial.study.optimization, epochs=settings.stage_two_epochs)
        return trial.fit(model, sampler=sampler, optimization=budget, after=first)
    part = trial.splits.train if after == "ncm" else trial.splits.val
    features = predict(model, part, runtime=trial.runtime).features
    labels = torch.from_numpy(part.labels).to(features.device)
    if after == "ncm":
        model.head = dt.heads.NearestMeanHead(features.shape[1], 10).to(features.device)
        model.head.update(features, labels)
        model.head.finish()
        return first
    choice = dt.decoupling.choose_normalization(model.head, features, labels)
    model.head = dt.heads.tau_normalized(model.head, choice.tau)
    return replace(first, tau=choice)


def gives_logits(head: object) -> bool:
    """Whether scores are linear in the features, and their softmax gives probabilities."""
    from torch import nn

    import dir_toolkit as dt

    return isinstance(head, (nn.Linear, dt.heads.ScaledHead))


def calibration(trial: Trial, trained: Trained, output: Any) -> dict[str, Any]:
    import torch

    import dir_toolkit as dt

    if not gives_logits(trained.model.head):
        return {}
    model: Any = trained.model
    shares = model.readout.adjuster(output.scores).double().softmax(1)
    errors = dt.metrics.calibration_metrics(shares, torch.from_numpy(trial.splits.test.labels).to(shares.device))
    return {name: errors[name] for name in ("ece", "classwise_ece", "log_loss")}


# ---- data and budget ----


def thinned(settings: Settings) -> range:
    """The digits that a profile makes rare."""
    return range(5) if settings.profile == "step" else range(5, 10)


def task(settings: Settings, retention: float, noise: float) -> Task:
    """A task in which the thinned digits are the region "few" and the others "many", whatever their counts are."""
    import dir_toolkit as dt
    from dir_toolkit.experiment.study import Task

    bins = dt.Bins.classes(10)
    regions = ["few" if digit in thinned(settings) else "many" for digit in range(10)]
    folder = f"{settings.profile}-{retention:g}" + (f"-noise-{noise:g}" if noise else "")
    of = f", {100 * retention:g} % kept" if retention != settings.retention else ""
    return Task(
        data=lambda seed: load(settings, retention, noise, seed),
        bins=bins,
        network=lambda splits: None,  # type: ignore[arg-type,return-value]  # each method makes its own
        title=f"Long-tailed {settings.data}",
        label_name="digit",
        metrics=lambda density: dt.ClassificationMetrics(density, regions=regions),
        augmentation=False,
        measure=calibration,
        folder=folder + (f"-of-{settings.train_per_class}" if settings.train_per_class else ""),
        shown="{method}" + of + (f", {100 * noise:g} % noise" if noise != settings.noise else ""),
    )


def load(settings: Settings, retention: float, noise: float, seed: int) -> Splits:
    from dir_toolkit.experiment.data.digits import digits
    from dir_toolkit.experiment.data.long_tail import exponential_profile, step_profile
    from dir_toolkit.experiment.data.mnist import mnist

    if settings.profile == "step":
        shares = step_profile(10, retention, thinned=thinned(settings))
    else:
        shares = exponential_profile(10, 1 / retention)
    options: dict[str, Any] = {"shares": shares, "noise": noise, "seed": seed}
    options["val_per_class"] = settings.val_per_class or (20 if settings.root is None else 200)
    if settings.root is None:
        return digits(**options)
    return mnist(settings.root, train_per_class=settings.train_per_class, verify=settings.verify, **options)


def download(settings: Settings, runtime: Runtime) -> None:
    from dir_toolkit.experiment.data.mnist import download_mnist

    if settings.download and settings.root is not None and runtime.is_main:
        download_mnist(settings.root)
    runtime.barrier()


def optimization(settings: Settings) -> Optimization:
    from dir_toolkit.experiment.training.loop import Optimization

    small = settings.data == "digits"
    return Optimization(
        epochs=settings.epochs or (40 if small else 15),
        batch_size=settings.batch_size or (32 if small else 128),
        lr=settings.lr,
        optimizer="sgd",
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def notes(settings: Settings) -> list[str]:
    rare, others = thinned(settings), [digit for digit in range(10) if digit not in thinned(settings)]
    return [
        f"Balanced error is the mean over digits of the share of wrong answers; few: over the digits {rare[0]} to "
        f"{rare[-1]}, which are thinned; many: over {others[0]} to {others[-1]}.",
        "A seed decides the network, the order of the images, and which of them are kept.",
        "The epoch of each run, and tau where it is chosen, follow from the balanced error on clean, balanced "
        "validation images that were cut before anything was thinned; the test set was used once, at the end.",
    ]


def faults(settings: Any, out: Path) -> list[str]:
    """All faults of the settings, which are collected before any data is loaded."""
    problems = unfit_folder("--out", out)
    if (settings.data == "digits") != (settings.root is None):
        problems.append("--root must name the folder of the files of --data mnist; digits come with scikit-learn.")
    for name in ("download", "verify", "train_per_class"):
        if settings.data == "digits" and getattr(settings, name):
            problems.append(f"--{name.replace('_', '-')} needs --data mnist; digits come with scikit-learn.")
    if strange := [name for name in settings.methods if name not in METHODS]:
        problems.append(f"--methods must name methods that --help lists, got {' '.join(strange) or 'none'}.")
    whole, shares = ("seeds", "stage_two_epochs", "train_per_class", "val_per_class"), ("ldam_start", "equalized_drop")
    limits = {
        **dict.fromkeys(whole, (1, math.inf)),
        **dict.fromkeys(shares, (0, 1)),
        **dict.fromkeys(("checkpoint_minutes", "focal_gamma", "tau"), (0, math.inf)),
    }
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limit = f"between {low} and {high:g}" if math.isfinite(high) else f"finite and at least {low}"
            problems.append(f"--{name.replace('_', '-')} must be {limit}, got {value:g}.")
    for name in ("feature_scale", "margin", "ldam_margin", "center_strength", "retention"):
        if not 0 < getattr(settings, name) < math.inf:
            problems.append(f"--{name.replace('_', '-')} must be > 0, got {getattr(settings, name):g}.")
    if not 0 <= settings.noise < 1:
        problems.append(f"--noise must be at least 0 and below 1, got {settings.noise:g}.")
    if settings.retention > 1:
        problems.append(f"--retention must be at most 1, got {settings.retention:g}.")
    try:
        optimization(settings)
    except ValueError as error:
        problems.append(str(error))
    return problems
