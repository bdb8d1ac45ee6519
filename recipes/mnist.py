"""Long-tailed digits: what margins, logit adjustment and decoupling do to the errors of rare classes.

    python recipes/mnist.py                                                  # scikit-learn's digits, under a minute
    python recipes/mnist.py --data mnist --root DIR --study remedies         # real MNIST, every remedy
    python recipes/mnist.py --data mnist --root DIR --study imbalance --resume

Trains a network per method and seed and ends with a table, figures and a report in
``runs/mnist/<data>/<study>-<how the data were thinned>``.
Studies share their runs: with ``--resume`` what was trained before is taken, and what was stopped goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from command_line import run, typed_command

if TYPE_CHECKING:  # torch and the toolkit load in main(), so that --help answers at once
    import numpy as np
    import xarray as xr
    from matplotlib.figure import Figure
    from torch import Tensor

    import dir_toolkit as dt
    from dir_toolkit.experiment.backbones import ImageClassifier, Scored
    from dir_toolkit.experiment.data.images import Splits
    from dir_toolkit.experiment.training.loop import Optimization
    from dir_toolkit.experiment.training.runtime import Runtime

Head = Literal["softmax", "cosine", "affinity"]
Loss = Literal["cross-entropy", "balanced", "focal", "ldam", "ldam-drw", "logit-adjusted", "equalized", "center"]
After = Literal["post-hoc", "post-hoc-chosen", "tau-norm", "ncm", "crt", "lws"]
Study = Literal["remedies", "imbalance", "noise", "prototypes", "sigma", "similarity", "features", "tau", "decoupling"]
COLUMNS = (("balanced_error", "all"), ("balanced_error", "few"), ("balanced_error", "many"), ("error", "all"))
REMEDIES: tuple[Loss, ...] = ("cross-entropy", "balanced", "focal", "ldam-drw", "logit-adjusted", "equalized", "center")
AFTERS: tuple[After, ...] = ("post-hoc", "post-hoc-chosen", "tau-norm", "ncm", "crt", "lws")
RETENTIONS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.025)
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
PROTOTYPES = (1, 2, 3, 5, 10, 20)
SIGMAS = (0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 50.0)

# What decides the numbers of a loss, beside the network and its optimization.
DECISIVE: dict[str, tuple[str, ...]] = {
    "affinity": ("margin", "feature_scale"),
    "focal": ("focal_gamma",),
    "ldam": ("ldam_margin",),
    "ldam-drw": ("ldam_margin", "ldam_start"),
    "logit-adjusted": ("tau",),
    "equalized": ("equalized_drop",),
    "center": ("center_strength",),
}

# What a study varies, or keeps at a value of its own.
VARIED: dict[Study, tuple[str, ...]] = {
    "remedies": ("prototypes",),
    "imbalance": ("retention",),
    "noise": ("noise", "retention"),
    "prototypes": ("prototypes",),
    "sigma": ("sigma",),
    "similarity": ("distance", "similarity"),
}

PLACES = ("root", "out")  # settings that say where things lie on this machine; no result shows them


@dataclass(frozen=True)
class Settings:
    """Long-tailed digits: what margins, logit adjustment and decoupling do to the errors of rare classes."""

    data: Literal["digits", "mnist"] = "digits"
    """Digits of 8x8 pixels that come with scikit-learn, or MNIST's files in --root."""
    root: Path | None = None
    """Folder of MNIST's four idx files, packed or not."""
    download: bool = False
    """Fetch MNIST's files into --root first, where they are missing."""
    verify: bool = False
    """Refuse files in --root that are not MNIST's official ones."""
    study: Study | None = None
    """A whole study, in place of --head, --loss and --after."""
    head: tuple[Head, ...] = ("softmax", "affinity")
    """What turns features into scores."""
    loss: tuple[Loss, ...] = ("cross-entropy", "logit-adjusted")
    """What softmax and cosine heads are trained with; affinity has its own."""
    after: tuple[After, ...] = ()
    """What is done to a network trained with a softmax head and cross-entropy."""
    profile: Literal["step", "exponential"] = "step"
    """Which digits are thinned: 0 to 4 alike, or all, ever more from 0 to 9."""
    retention: float = 0.1
    """Share kept of the digits that are thinned most, in (0, 1]."""
    noise: float = 0.0
    """Share of training labels made wrong, in [0, 1); validation and test labels stay right."""
    train_per_class: int | None = None
    """Images a digit of MNIST before any is thinned; by default all."""
    val_per_class: int | None = None
    """Validation images a digit; by default 20 of digits and 200 of MNIST."""
    seeds: int = 1
    """How many seeds: 0, 1, ... A seed decides the network, the order, and which images are kept."""
    prototypes: int = 5
    """Prototypes a class of the affinity head."""
    sigma: float = 10.0
    """Width of its similarity."""
    distance: Literal["l2", "l1"] = "l2"
    """From feature to prototype: the squared Euclidean distance, or the sum of absolute differences."""
    similarity: Literal["gaussian", "inverse"] = "gaussian"
    """What it makes of the distance."""
    feature_scale: float = 1.0
    """What it multiplies features by; 1 is the paper's formula, for features of the paper's network."""
    margin: float = 0.75
    """Between the affinities of the true class and the others."""
    tau: float = 1.0
    """Strength of the logit-adjusted loss and of post-hoc adjustment."""
    focal_gamma: float = 2.0
    """How much focal loss favours hard samples."""
    ldam_margin: float = 0.5
    """Largest margin of LDAM, between cosines."""
    ldam_start: float = 0.8
    """Share of the epochs after which LDAM-DRW weighs classes."""
    center_strength: float = 0.01
    """Weight of the center loss beside cross-entropy."""
    equalized_drop: float = 0.9
    """How often equalization spares a rare class from the pull of another class's sample."""
    epochs: int | None = None
    """Passes over the training images; by default 40 for digits and 15 for MNIST."""
    batch_size: int | None = None
    """Images a step, over all processes together; by default 32 for digits and 128 for MNIST."""
    lr: float = 0.05
    """Highest learning rate."""
    weight_decay: float = 5e-4
    """Pull of weights towards zero."""
    clip_norm: float = 5.0
    """Longest gradient; without a limit LDAM, whose scores are scaled by 30, and high learning rates diverge."""
    stage_two_epochs: int = 5
    """Passes in which crt and lws retrain the head."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the forward pass."""
    checkpoint_minutes: float = 5.0
    """Most time between two checkpoints."""
    resume: bool = False
    """Take what an earlier run in --out has trained, and go on where it was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/mnist/<data>."""


@dataclass(frozen=True)
class Variant:
    """What one row of a table stands for: data, head, loss, and what is done afterwards."""

    retention: float
    noise: float
    head: Head = "softmax"
    loss: Loss = "cross-entropy"
    after: After | None = None
    prototypes: int = 5
    sigma: float = 10.0
    distance: Literal["l2", "l1"] = "l2"
    similarity: Literal["gaussian", "inverse"] = "gaussian"
    num_features: int = 128

    @property
    def method(self) -> str:
        """Its name among others on the same data."""
        if self.after is not None:
            return self.after
        if self.head == "affinity":
            name = f"affinity-m{self.prototypes}" + (f"-sigma{self.sigma:g}" if self.sigma != 10 else "")
            if (self.distance, self.similarity) != ("l2", "gaussian"):
                name += f"-{self.distance}-{self.similarity}"
        elif self.loss == "cross-entropy":
            name = self.head
        else:
            name = self.loss if self.head == "softmax" else f"{self.head}+{self.loss}"
        return name if self.num_features == 128 else f"{name}-{self.num_features}d"

    @property
    def trained(self) -> Variant:
        """The one whose network this one is made from: itself, if nothing is done afterwards."""
        return replace(self, after=None)


@dataclass(frozen=True)
class Trained:
    """A network with its best weights, and what it makes of the images."""

    model: ImageClassifier
    history: list[dict[str, Any]]
    val: Scored
    test: Scored


@dataclass(frozen=True)
class Run:
    """What one variant with one seed came to."""

    errors: xr.Dataset
    """On the test set."""
    trained: Trained
    scores: Tensor
    """Of the test images."""
    norms: np.ndarray | None = None
    """Length of each class's weights, where scores are linear in the features."""
    choice: Any = None
    """Which tau was chosen, and from what curve."""


Runs = Mapping[tuple[Variant, int], Run]


def main(settings: Settings) -> None:
    from dir_toolkit.experiment.data.mnist import download_mnist
    from dir_toolkit.experiment.results.tables import as_text, results_table
    from dir_toolkit.experiment.training.runtime import start_runtime

    out = settings.out or Path("runs/mnist") / settings.data
    variants = plan(settings)
    check(settings, variants, out)
    with start_runtime(settings.device, settings.precision) as runtime:
        if settings.download and runtime.is_main:
            assert settings.root is not None
            download_mnist(settings.root)
        runtime.barrier()
        splits: dict[tuple[str, int], Splits] = {}
        trained: dict[tuple[Variant, int], Trained] = {}
        runs: dict[tuple[Variant, int], Run] = {}
        for variant in variants:
            for seed in range(settings.seeds):
                here = replace(runtime, seed=seed)
                place = out / data_name(settings, variant)
                if (place.name, seed) not in splits:
                    splits[place.name, seed] = load(settings, variant, seed)
                data = splits[place.name, seed]
                if runtime.is_main:
                    print(f"\n{variant.method} on {place.name}, seed {seed}: {len(data.train):,} images", flush=True)
                base = (variant.trained, seed)
                if base not in trained:
                    trained[base] = train(settings, variant.trained, here, data, place)
                runs[variant, seed] = finish(settings, variant, here, data, place, trained[base])
        if runtime.is_main:
            folder = out / summary_name(settings, variants)
            ds = summarise(settings, folder, variants, splits, runs, runtime)
            print(f"\n{as_text(results_table(ds, columns=columns(settings)))}\nReport: {folder / 'report.html'}")


# ----------------------------------------------------------------------------------------------- what is to be compared


def plan(settings: Settings) -> list[Variant]:
    """The rows of the table, each once, in their order."""
    base = Variant(settings.retention, settings.noise)
    affinity = replace(
        base,
        head="affinity",
        prototypes=settings.prototypes,
        sigma=settings.sigma,
        distance=settings.distance,
        similarity=settings.similarity,
    )
    afters = [replace(base, after=after) for after in AFTERS]
    adjusted = replace(base, loss="logit-adjusted")
    study = settings.study
    if study == "remedies":
        losses = [replace(base, loss=loss) for loss in REMEDIES]
        found = [*losses, replace(affinity, prototypes=1), replace(affinity, prototypes=5), *afters]
    elif study == "imbalance":
        found = [replace(v, retention=r) for v in (base, adjusted, affinity) for r in RETENTIONS]
    elif study == "noise":  # noise alone: nothing is thinned
        found = [replace(v, noise=noise, retention=1.0) for v in (base, affinity) for noise in NOISES]
    elif study == "prototypes":
        found = [replace(affinity, prototypes=count) for count in PROTOTYPES]
    elif study == "sigma":
        found = [replace(affinity, sigma=sigma) for sigma in SIGMAS]
    elif study == "similarity":
        pairs = [("l2", "gaussian"), ("l2", "inverse"), ("l1", "gaussian"), ("l1", "inverse")]
        found = [replace(affinity, distance=d, similarity=s) for d, s in pairs]  # type: ignore[arg-type]
    elif study == "features":
        plane = [base, replace(base, loss="center"), replace(affinity, prototypes=1), affinity]
        found = [replace(v, num_features=2) for v in plane]
    elif study == "tau":
        found = [base, *(v for v in afters if v.after in ("post-hoc", "post-hoc-chosen")), adjusted]
    elif study == "decoupling":
        kept = [v for v in afters if v.after in ("ncm", "tau-norm", "crt", "lws")]
        found = [base, *kept, replace(base, loss="balanced"), adjusted]
    else:
        linear = [replace(base, head=h, loss=loss) for h in settings.head if h != "affinity" for loss in settings.loss]
        found = [*linear, *([affinity] if "affinity" in settings.head else [])]
        found += [replace(base, after=after) for after in settings.after]
    return list(dict.fromkeys(found))


def data_name(settings: Settings, variant: Variant) -> str:
    """Folder of the runs on one data set."""
    name = f"{settings.profile}-{variant.retention:g}"
    name += f"-noise-{variant.noise:g}" if variant.noise else ""
    return name + (f"-of-{settings.train_per_class}" if settings.train_per_class else "")


def summary_name(settings: Settings, variants: list[Variant]) -> str:
    """Folder of a study's table and figures: one for each data set it is made on, unless it compares those."""
    places = {data_name(settings, v) for v in variants}
    several = settings.profile + (f"-of-{settings.train_per_class}" if settings.train_per_class else "")
    return f"{settings.study or 'comparison'}-{places.pop() if len(places) == 1 else several}"


def thinned(settings: Settings) -> range:
    """The digits that a profile makes rare."""
    return range(5) if settings.profile == "step" else range(5, 10)


def unused(settings: Settings) -> tuple[str, ...]:
    """Settings that a study does not look at."""
    return ("head", "loss", "after", *VARIED.get(settings.study, ())) if settings.study is not None else ()


def check(settings: Settings, variants: list[Variant], out: Path) -> None:
    """All faults at once, before anything is loaded."""
    from dir_toolkit.errors import RunExistsError, SettingsError

    faults = []
    if settings.data == "mnist" and settings.root is None:
        faults.append("--root must name the folder of MNIST's files. See data_cards/mnist.md, or add --download.")
    for name in ("root", "download", "verify", "train_per_class"):
        if settings.data == "digits" and getattr(settings, name):
            faults.append(f"--{name.replace('_', '-')} needs --data mnist; digits come with scikit-learn.")
    for name in ("head", "loss", "after"):
        words = getattr(settings, name)
        if len(set(words)) < len(words) or (name != "after" and not words):
            faults.append(f"--{name} must name each once, got {' '.join(words) or 'none'}.")
    for name in unused(settings):
        if getattr(settings, name) != getattr(Settings, name):
            faults.append(f"--{name} has no say in --study {settings.study}, which takes values of its own.")
    if "cosine" in settings.head and {"ldam", "ldam-drw"} & set(settings.loss):
        faults.append("--loss ldam has a cosine head of its own: run it with --head softmax, apart from --head cosine.")
    for name, low, high in (
        ("seeds", 1, math.inf),
        ("prototypes", 1, math.inf),
        ("stage_two_epochs", 1, math.inf),
        ("train_per_class", 1, math.inf),
        ("val_per_class", 1, math.inf),
        ("checkpoint_minutes", 0, math.inf),
        ("ldam_start", 0, 1),
        ("equalized_drop", 0, 1),
        ("focal_gamma", 0, math.inf),
        ("tau", 0, math.inf),
    ):
        value = getattr(settings, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limit = f"between {low} and {high:g}" if math.isfinite(high) else f"finite and at least {low}"
            faults.append(f"--{name.replace('_', '-')} must be {limit}, got {value:g}.")
    for name in ("sigma", "feature_scale", "margin", "ldam_margin", "center_strength", "retention"):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            faults.append(f"--{name.replace('_', '-')} must be > 0, got {value:g}.")
    if not 0 <= settings.noise < 1:
        faults.append(f"--noise must be at least 0 and below 1, got {settings.noise:g}.")
    if settings.retention > 1:
        faults.append(f"--retention must be at most 1, got {settings.retention:g}.")
    try:
        optimization(settings)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        listed = "\n".join(["these settings cannot run:", *faults]).replace("\n", "\n  ")
        raise SettingsError(f"recipes/mnist.py: {listed}")
    places = [out / data_name(settings, v) / v.trained.method for v in variants]
    if not settings.resume and (found := [last for place in places for last in place.glob("seed*/checkpoint-last.pt")]):
        raise RunExistsError(
            f"recipes/mnist.py: --out must not hold these runs yet, for none is overwritten, got {found[0]}. "
            "Take what is there with --resume, or choose another folder."
        )


# ---------------------------------------------------------------------------------------------------- data and training


def load(settings: Settings, variant: Variant, seed: int) -> Splits:
    from dir_toolkit.experiment.data.digits import digits
    from dir_toolkit.experiment.data.long_tail import exponential_profile, step_profile
    from dir_toolkit.experiment.data.mnist import mnist

    if settings.profile == "step":
        shares = step_profile(10, variant.retention, thinned=thinned(settings))
    else:
        shares = exponential_profile(10, 1 / variant.retention)
    if settings.data == "digits":
        return digits(
            shares=shares, noise=variant.noise, val_per_class=first_given(settings.val_per_class, 20), seed=seed
        )
    assert settings.root is not None
    return mnist(
        settings.root,
        shares=shares,
        noise=variant.noise,
        train_per_class=settings.train_per_class,
        val_per_class=first_given(settings.val_per_class, 200),
        verify=settings.verify,
        seed=seed,
    )


def first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def optimization(settings: Settings, epochs: int | None = None) -> Optimization:
    from dir_toolkit.experiment.training.loop import Optimization

    small = settings.data == "digits"
    return Optimization(
        epochs=first_given(epochs, settings.epochs, 40 if small else 15),
        batch_size=first_given(settings.batch_size, 32 if small else 128),
        lr=settings.lr,
        optimizer="sgd",
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def metrics_of(settings: Settings, data: Splits) -> dt.ClassificationMetrics:
    """With the thinned digits as the region "few" and the others as "many", however many there are of them."""
    import dir_toolkit as dt

    bins = dt.Bins.classes(10)
    regions = ["few" if digit in thinned(settings) else "many" for digit in range(10)]
    return dt.ClassificationMetrics(dt.LabelDensity.count(data.train.labels, bins), regions=regions)


def objective(settings: Settings, variant: Variant, model: ImageClassifier, density: dt.LabelDensity) -> Any:
    """The loss of a variant, called as ``loss(scored, target, weight)``."""
    import torch

    import dir_toolkit as dt

    prior = dt.class_prior(density).to(next(model.parameters()).device)
    counts = torch.tensor(density.counts, device=prior.device)

    def margin_loss(out: Scored, target: Tensor, weight: Tensor | None = None) -> Tensor:
        loss = dt.affinity_loss(out.scores, target, weight, margin=settings.margin)
        # In the plane only three prototypes can be equally far apart, and the term would pull all others together.
        even: Tensor | float = model.head.diversity() if variant.num_features > 2 else 0.0  # type: ignore[operator]
        return loss + even

    class WithCenters(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers = dt.CenterLoss(variant.num_features, 10, strength=settings.center_strength)

        def forward(self, out: Scored, target: Tensor, weight: Tensor | None = None) -> Tensor:
            # By the mean, so that a center's gradient is the paper's step whatever the batch size. SGD takes that step
            # as it does all others, with its rate, momentum and decay.
            return self.centers(out.features, target, weight) + dt.cross_entropy(out.scores, target, weight)

    if variant.head == "affinity":
        return margin_loss
    if variant.loss == "center":
        return WithCenters()

    def ldam(s: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        return dt.ldam_loss(s, y, w, counts=counts, max_margin=settings.ldam_margin)

    losses: dict[Loss, Callable[..., Tensor]] = {
        "cross-entropy": dt.cross_entropy,
        "balanced": dt.cross_entropy,  # with weights
        "focal": lambda s, y, w: dt.focal_loss(s, y, w, gamma=settings.focal_gamma),
        "ldam": ldam,
        "ldam-drw": ldam,  # with weights from a later epoch on
        "logit-adjusted": lambda s, y, w: dt.logit_adjusted_cross_entropy(s, y, prior, settings.tau, weight=w),
        "equalized": lambda s, y, w: dt.equalization_loss(
            # Rare is what is rarer than if all were alike. The global generator is seeded anew in every step.
            s,
            y,
            w,
            prior=prior,
            threshold=0.1,
            drop=settings.equalized_drop,
            generator=global_generator(s),
        ),
    }
    chosen = losses[variant.loss]
    return lambda out, target, weight=None: chosen(out.scores, target, weight)


def global_generator(near: Tensor) -> Any:
    """Torch's own generator of random numbers on a tensor's device."""
    import torch

    return torch.default_generator if near.device.type == "cpu" else torch.cuda.default_generators[near.device.index]


def network(settings: Settings, variant: Variant, size: int) -> ImageClassifier:
    """The affinity paper's network, with the head of a variant."""
    import dir_toolkit as dt
    from dir_toolkit.experiment.backbones import ImageClassifier, digit_cnn

    features = variant.num_features
    backbone = digit_cnn(features, size=size, activation=features > 2)
    if variant.head == "affinity":
        head: Any = dt.AffinityHead(
            features,
            10,
            variant.prototypes,
            variant.sigma,
            variant.distance,
            variant.similarity,
            feature_scale=settings.feature_scale,
        )
    elif variant.loss in ("ldam", "ldam-drw"):  # whose paper normalises features and weights
        head = dt.CosineHead(features, 10, scale=1.0)
    else:
        head = dt.CosineHead(features, 10) if variant.head == "cosine" else dt.LinearHead(features, 10)
    return ImageClassifier(backbone, head, return_features=True)


def train(settings: Settings, variant: Variant, runtime: Runtime, data: Splits, place: Path) -> Trained:
    """A variant with one seed, from a fresh network to its best weights."""
    import dir_toolkit as dt

    bins = dt.Bins.classes(10)
    how = optimization(settings)
    with runtime.seeded("network"):
        model = network(settings, variant, data.train.images.shape[2])
    weights = None
    if variant.loss == "balanced":
        weights = dt.LDS(bins, kernel=None, scheme="inverse").fit(data.train.labels)
    elif variant.loss == "ldam-drw":
        weights = dt.LDS(bins, kernel=None, scheme="effective_number", beta=0.9999).fit(data.train.labels)
    return fit_and_predict(
        settings,
        variant,
        runtime,
        data,
        place,
        model,
        how,
        weights=weights,
        weights_from=round(settings.ldam_start * how.epochs) if variant.loss == "ldam-drw" else 0,
    )


def retrain(
    settings: Settings, variant: Variant, runtime: Runtime, data: Splits, place: Path, first: Trained
) -> Trained:
    """The second stage of a variant: the encoder frozen, the head trained on classes that are drawn alike."""
    import dir_toolkit as dt

    assert variant.after in ("crt", "lws")
    model = deepcopy(first.model)
    dt.stage_two(model, variant.after, seed=runtime.derive("head"))
    sampler = dt.BinSampler(data.train.labels, dt.Bins.classes(10), q=0.0, seed=runtime.seed)
    how = optimization(settings, settings.stage_two_epochs)
    return fit_and_predict(settings, variant, runtime, data, place, model, how, sampler=sampler)


def fit_and_predict(
    settings: Settings,
    variant: Variant,
    runtime: Runtime,
    data: Splits,
    place: Path,
    model: ImageClassifier,
    how: Optimization,
    **options: Any,
) -> Trained:
    from dir_toolkit.experiment.training.loop import fit, predict
    from dir_toolkit.experiment.training.provenance import environment, write_json

    metrics = metrics_of(settings, data)
    folder = place / variant.method / f"seed{runtime.seed}"
    model.to(runtime.device)
    # What decides the numbers, beside what fit() is handed; a checkpoint of a run with other values is refused.
    kind = "affinity" if variant.head == "affinity" else variant.loss
    decisive = {name: getattr(settings, name) for name in DECISIVE.get(kind, ())}
    if runtime.is_main and not (folder / "checkpoint-last.pt").exists():
        write_json(folder / "config.json", {**asdict(settings), **asdict(variant), **decisive, **asdict(how)})
        write_json(folder / "env.json", environment(runtime, data))
    history = fit(
        model,
        data.train,
        data.val,
        metrics=metrics,
        loss=objective(settings, variant, model, metrics.density),
        optimization=how,
        runtime=runtime,
        folder=folder,
        resume=settings.resume,
        augmentation=False,
        checkpoint_minutes=settings.checkpoint_minutes,
        fingerprint={"recipe": asdict(variant), "loss": {"kind": kind, **decisive}},
        **options,
    )
    return Trained(
        model, history, predict(model, data.val, runtime=runtime), predict(model, data.test, runtime=runtime)
    )


def finish(settings: Settings, variant: Variant, runtime: Runtime, data: Splits, place: Path, trained: Trained) -> Run:
    """What is done after training, and the errors on the test set."""
    import torch
    from torch import nn

    import dir_toolkit as dt
    from dir_toolkit.experiment.results.schema import save_results
    from dir_toolkit.experiment.training.loop import predict
    from dir_toolkit.experiment.training.provenance import environment

    metrics = metrics_of(settings, data)
    prior = dt.class_prior(metrics.density)
    val_labels, test_labels = (torch.from_numpy(part.labels).to(runtime.device) for part in (data.val, data.test))
    choice = None
    if variant.after in ("crt", "lws"):
        trained = retrain(settings, variant, runtime, data, place, trained)
    head: nn.Module = trained.model.head
    scores = trained.test.scores
    if variant.after == "post-hoc":
        scores = dt.adjust_logits(scores, prior, tau=settings.tau)
    elif variant.after == "post-hoc-chosen":
        choice = dt.choose_tau(trained.val.scores, val_labels, prior)
        scores = dt.adjust_logits(scores, prior, tau=choice.tau)
    elif variant.after == "tau-norm":
        assert isinstance(head, nn.Linear)
        choice = dt.choose_normalization(head, trained.val.features, val_labels)
        head = dt.tau_normalized(head, choice.tau)
        scores = head(trained.test.features).detach()
    elif variant.after == "ncm":
        features = predict(trained.model, data.train, runtime=runtime).features
        head = dt.NearestMeanHead(features.shape[1], 10).to(runtime.device)
        head.update(features, torch.from_numpy(data.train.labels).to(runtime.device))
        head.finish()
        scores = head(trained.test.features)

    metrics.update(scores, test_labels)
    selected = min(trained.history, key=lambda row: row["val_balanced_error"])
    errors = metrics.compute().assign(minutes=trained.history[-1]["seconds"] / 60, best_epoch=selected["epoch"])
    norms = None
    if isinstance(head, (nn.Linear, dt.ScaledHead)):  # scores are logits
        calibration = dt.calibration_metrics(scores.double().softmax(1), test_labels)
        errors = errors.assign({name: calibration[name] for name in ("ece", "classwise_ece", "log_loss")})
        if variant.after not in ("post-hoc", "post-hoc-chosen"):  # which leave the weights as they are
            scale = head.scale[:, None] if isinstance(head, dt.ScaledHead) else 1.0
            weight = head.linear.weight if isinstance(head, dt.ScaledHead) else head.weight
            norms = (scale * weight).detach().norm(dim=1).cpu().numpy()
    if choice is not None:
        errors = errors.assign(tau=choice.tau)
        errors["tau"].attrs["units"] = "1"
    path = place / variant.method / f"seed{runtime.seed}" / "results.nc"
    # A run that was finished before keeps its provenance; what follows without training is always made anew.
    if runtime.is_main and (variant.after not in (None, "crt", "lws") or not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"Long-tailed {settings.data}: {variant.method} on {place.name}, seed {runtime.seed}"
        save_results(combined({(variant.method, runtime.seed): errors}, title, environment(runtime, data)), path)
    return Run(errors, trained, scores, norms, choice)


# -------------------------------------------------------------------------------------------------------- what it shows


def combined(runs: dict[tuple[str, int], xr.Dataset], title: str, attrs: dict[str, Any]) -> xr.Dataset:
    from dir_toolkit.experiment.results.schema import combine_runs

    command = typed_command("recipes/mnist.py", PLACES)
    return combine_runs(runs, title=title, command=command, label_name="digit", label_units="1", attrs=attrs)


def summarise(
    settings: Settings,
    folder: Path,
    variants: list[Variant],
    splits: dict[tuple[str, int], Splits],
    runs: Runs,
    runtime: Runtime,
) -> xr.Dataset:
    """All runs as one result, with its table, figures and report."""
    from dir_toolkit.experiment.results import class_figures as draw
    from dir_toolkit.experiment.results.figures import history_figure
    from dir_toolkit.experiment.results.summary import write_summary
    from dir_toolkit.experiment.training.provenance import environment

    shown = names(variants)
    env = environment(runtime, next(iter(splits.values())))
    env["data"] = {f"{name}, seed {seed}": environment(runtime, data)["data"] for (name, seed), data in splits.items()}
    title = f"Long-tailed {settings.data}: {summary_name(settings, variants)}"
    ds = combined({(shown[variant], seed): run.errors for (variant, seed), run in runs.items()}, title, env)
    pictures = STUDIES[settings.study](settings, variants, splits, runs) if settings.study else {}
    if len(variants) <= 16:
        pictures["Error by digit"] = draw.class_error_figure(ds)
    histories = {(shown[v], seed): run.trained.history for (v, seed), run in runs.items() if v.after is None}
    if len({name for name, _ in histories}) <= 10:
        pictures["Training"] = history_figure(
            histories,
            metric="val_balanced_error",
            metric_name="validation balanced error",
            percent=True,
            label_units="1",
        )
    rare, others = list(thinned(settings)), [digit for digit in range(10) if digit not in thinned(settings)]
    notes = [
        f"Balanced error is the mean over digits of each digit's share of wrong answers; few: over the digits "
        f"{rare[0]} to {rare[-1]}, which are thinned; many: over {others[0]} to {others[-1]}.",
        "A seed decides the network, the order of the images, and which of them are kept.",
        "The epoch of each run, and tau where it is chosen, follow from the balanced error on clean, balanced "
        "validation images that were cut before anything was thinned; the test set was used once, at the end.",
    ]
    told = {
        name: value for name, value in asdict(settings).items() if name not in (*PLACES, *unused(settings), "resume")
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_summary(folder, ds, pictures, notes=notes, settings=told, columns=columns(settings))
    return ds


def columns(settings: Settings) -> list[tuple[str, str | None]]:
    """Of the table: metrics and regions."""
    calibration = [("ece", None), ("log_loss", None), ("tau", None)] if settings.study == "tau" else []
    return [*COLUMNS, *calibration]


def names(variants: list[Variant]) -> dict[Variant, str]:
    """What tables call the variants: the method, with what else differs between them."""
    several = {key for key in asdict(variants[0]) if len({getattr(v, key) for v in variants}) > 1}

    def name(v: Variant) -> str:
        plain = v.head == "affinity"  # whose usual values a method's name leaves out
        told = v.method
        told += f"-sigma{v.sigma:g}" if plain and "sigma" in several and v.sigma == 10 else ""
        usual = plain and {"distance", "similarity"} & several and (v.distance, v.similarity) == ("l2", "gaussian")
        told += "-l2-gaussian" if usual else ""
        told += f", {100 * v.retention:g} % kept" if "retention" in several else ""
        return told + (f", {100 * v.noise:g} % noise" if "noise" in several else "")

    return {v: name(v) for v in variants}


def by_seed(runs: Runs, variant: Variant, region: str) -> list[float]:
    """A variant's balanced error in a region, of each seed."""
    return [float(run.errors["balanced_error"].sel(region=region)) for (v, _), run in runs.items() if v == variant]


def curve_picture(
    runs: Runs, variants: list[Variant], varied: str, xlabel: str, region: str = "few", *, log_x: bool = False
) -> Figure:
    """The balanced error in a region against one field of the variants."""
    from dir_toolkit.experiment.results.class_figures import study_figure

    curves: dict[str, dict[float, list[float]]] = {}
    for v in variants:
        series = "affinity" if varied in ("prototypes", "sigma") else v.method
        curves.setdefault(series, {})[getattr(v, varied)] = by_seed(runs, v, region)
    where = {"few": "thinned digits", "all": "all digits"}[region]
    return study_figure(curves, xlabel=xlabel, ylabel=f"balanced error of {where}", log_x=log_x)


def show_imbalance(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    kept = "share kept of the thinned digits"
    return {
        f"Balanced error of {'the thinned' if region == 'few' else 'all'} digits": curve_picture(
            runs, variants, "retention", kept, region, log_x=True
        )
        for region in ("few", "all")
    }


def show_noise(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    return {"Error under label noise": curve_picture(runs, variants, "noise", "share of wrong training labels", "all")}


def show_prototypes(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    return {"Number of prototypes": curve_picture(runs, variants, "prototypes", "prototypes a class", "all")}


def show_sigma(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    return {"Width of the similarity": curve_picture(runs, variants, "sigma", "sigma", "all", log_x=True)}


def show_similarity(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    from dir_toolkit.experiment.results.class_figures import bar_figure

    bars = {f"{v.distance}, {v.similarity}": by_seed(runs, v, "all") for v in variants}
    return {"Distance and similarity": bar_figure(bars, ylabel="balanced error of all digits")}


def show_features(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    import torch

    from dir_toolkit.experiment.results.class_figures import feature_space_figure

    panels = {}
    for v in variants:
        run, labels = runs[v, 0], splits[data_name(settings, v), 0].test.labels
        points, places, owners = run.trained.test.features.cpu(), None, None
        if v.head == "affinity":  # features as the head sees them
            head: Any = run.trained.model.head
            points = points * head.feature_scale.cpu()
            places = head.weight.detach().cpu().flatten(0, 1)
            owners = torch.arange(10).repeat_interleave(v.prototypes)
        panels[v.method] = (points, labels, places, owners)
    return {"Feature space of the test images": feature_space_figure(panels)}


def show_tau(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    import torch

    import dir_toolkit as dt
    from dir_toolkit.experiment.results.class_figures import reliability_figure, tau_figure
    from dir_toolkit.metrics.reliability import CalibrationMetrics

    base, place = variants[0], data_name(settings, variants[0])
    curves: dict[str, dict[int, Any]] = {"validation": {}, "test": {}, "log-loss": {}}
    chosen: dict[str, dict[int, float]] = {"validation": {}, "test": {}, "log-loss": {}}
    for seed in range(settings.seeds):
        data, first = splits[place, seed], runs[base, seed].trained
        prior = dt.class_prior(metrics_of(settings, data).density)
        val, test = (torch.from_numpy(part.labels).to(first.val.scores.device) for part in (data.val, data.test))
        choices = {
            "validation": dt.choose_tau(first.val.scores, val, prior),
            "test": dt.choose_tau(first.test.scores, test, prior),
            "log-loss": dt.choose_tau(first.val.scores, val, prior, by="log_loss"),
        }
        for name, choice in choices.items():
            curves[name][seed] = (choice.taus, choice.scores)
            # On test images the curve is only looked at: what is marked was chosen on validation images.
            chosen[name][seed] = choices["validation" if name == "test" else name].tau
    diagrams = {}
    for v in variants:
        metrics = CalibrationMetrics(10)
        target = torch.from_numpy(splits[place, 0].test.labels).to(runs[v, 0].scores.device)
        metrics.update(runs[v, 0].scores.double().softmax(1), target)
        diagrams[v.method] = metrics.reliability()

    def over_seeds(name: str) -> tuple[dict[Any, Any], dict[Any, float]]:
        return (
            {f"seed {seed}": curve for seed, curve in curves[name].items()},
            {f"seed {seed}": tau for seed, tau in chosen[name].items()},
        )

    return {
        "Balanced error over tau on validation images": tau_figure(*over_seeds("validation"), ylabel="balanced error"),
        "Balanced error over tau on test images": tau_figure(*over_seeds("test"), ylabel="balanced error"),
        "Balanced log-loss over tau on validation images": tau_figure(
            *over_seeds("log-loss"), ylabel="log-loss, every class alike (nats)", percent=False
        ),
        "Reliability on test images, seed 0": reliability_figure(diagrams),
    }


def show_decoupling(settings: Settings, variants: list[Variant], splits: Any, runs: Runs) -> dict[str, Figure]:
    import numpy as np

    from dir_toolkit.experiment.results.class_figures import norms_figure

    norms: dict[str, Any] = {}
    for v in variants:
        found = [run.norms for (w, _), run in runs.items() if w == v]
        if all(rows is not None for rows in found):
            norms[v.method] = np.stack([rows for rows in found if rows is not None])
    counts = metrics_of(settings, splits[data_name(settings, variants[0]), 0]).density.counts
    return {"Length of each class's weights": norms_figure(norms, counts)}


STUDIES: dict[Study, Callable[[Settings, list[Variant], Any, Runs], dict[str, Figure]]] = {
    "remedies": show_decoupling,
    "imbalance": show_imbalance,
    "noise": show_noise,
    "prototypes": show_prototypes,
    "sigma": show_sigma,
    "similarity": show_similarity,
    "features": show_features,
    "tau": show_tau,
    "decoupling": show_decoupling,
}


if __name__ == "__main__":
    run(main, Settings)
