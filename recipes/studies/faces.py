"""The settings, data and methods of the studies of faces. Each method is an entry of ``METHODS``."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.append(str(Path(__file__).parents[1]))

from command_line import shown, typed_command, unfit_folder

if TYPE_CHECKING:  # torch and the toolkit load within functions, so that --help answers at once
    from torch import Tensor, nn

    import dir_toolkit as dt
    from dir_toolkit.experiment.data.images import Splits
    from dir_toolkit.experiment.study import Study, Task, Trained, Trial
    from dir_toolkit.experiment.training.loop import Optimization
    from dir_toolkit.experiment.training.runtime import Runtime

NOTES = (
    "Ages fall into regions by their training faces: many (more than 100 per age), medium (20 to 100), few (1 to 19). "
    "MAE is the mean over faces, bMAE the mean over ages of the MAE of each age: the two are the same where all ages "
    "have equally many test faces. The constant predictor always predicts the training median.",
    "Each run is judged at the epoch of its least validation bMAE. A method that starts from the network of another "
    "takes it as it was after its last epoch. Nothing is chosen on the test set.",
)


@dataclass(frozen=True)
class Data:
    """Faces, and what is done to them."""

    data: Literal["portraits", "utkface", "agedb", "imdb-wiki"] = "portraits"
    """Faces: drawn by the package, or real ones in --root."""
    root: Path | None = None
    """Folder of the images, or the UTKFace archive."""
    listing: Path | None = None
    """CSV list (age,path,split) of agedb and imdb-wiki; by default agedb.csv or imdb_wiki.csv in --root."""
    on_error: Literal["raise", "skip"] = "raise"
    """What happens if an image cannot be read: the study stops, or the image is skipped and counted."""
    size: int | None = None
    """Side of the images in pixels; by default 32 for portraits and 64 for photographs."""
    augmentation: Literal["plain", "strong"] = "plain"
    """Flips and shifts; strong adds rotation, zoom, brightness and color, which long trainings need."""


@dataclass(frozen=True)
class Training:
    """The network, and how it is trained."""

    backbone: str = "small_resnet"
    """The network: small_resnet, or the name of any timm model (needs the extra "models")."""
    loss: Literal["l1", "mse", "huber", "focal-l1", "focal-mse"] = "l1"
    """The loss of regression, unless the method has one of its own."""
    epochs: int = 12
    """Passes over the training faces."""
    batch_size: int = 128
    """Faces per step, over all processes together."""
    lr: float = 2e-3
    """The highest learning rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """How the learning rate falls."""
    stage_two_epochs: int = 4
    """Passes over the training faces where a head is trained again on a frozen encoder."""
    compile: bool = False
    """Compile the backbone by torch.compile, which takes up to a minute once and pays off in long trainings."""


@dataclass(frozen=True)
class Smoothing:
    """LDS, the window of LDS and FDS, soft labels, and the adjustment by the prior."""

    scheme: Literal["inverse", "sqrt_inverse", "effective_number", "dense"] = "sqrt_inverse"
    """How LDS turns the smoothed density into weights."""
    kernel_size: int = 5
    """Width of the Gaussian window of LDS and FDS, in years, odd."""
    kernel_sigma: float = 2.0
    """Standard deviation of this window, in years."""
    label_sigma: float = 2.0
    """How far labels are spread over neighbouring bins, in years."""
    tau: float | None = None
    """Strength of the adjustment after training; by default the one that is best on validation data."""


@dataclass(frozen=True)
class FDS:
    """Feature distribution smoothing."""

    fds_momentum: float = 0.9
    """Weight of the old statistics when an epoch is folded in; 0 uses the last epoch only."""
    fds_covariance: Literal["diagonal", "full", "low_rank"] = "diagonal"
    """Which part of the covariances of the features is smoothed."""
    fds_map: Literal["paper", "transport"] = "transport"
    """How features are mapped to the smoothed covariance if it is not diagonal."""
    fds_rank: int = 32
    """The number of directions of low_rank."""
    fds_shrinkage: float | None = None
    """Pseudo-samples that pull the covariance of each age towards the pooled one; by default none for a diagonal, and
    otherwise as many as the matrices have rows."""
    fds_count_weighted: bool = False
    """Weight statistics by their numbers of samples when they are smoothed."""
    fds_start_epoch: int = 1
    """The number of epochs before features are calibrated."""


@dataclass(frozen=True)
class Run:
    """What is run, and where."""

    methods: tuple[str, ...] = ("all",)
    """The methods to train, by the names above."""
    seeds: int = 3
    """The number of seeds per method: 0, 1, ..."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["float32", "bf16"] = "float32"
    """The precision of the forward pass."""
    checkpoint_minutes: float = 5.0
    """The longest time between two checkpoints."""
    resume: bool = False
    """Continue an earlier study in --out that was stopped."""
    out: Path | None = None
    """Folder of all results."""


@dataclass(frozen=True)
class Settings(Run, FDS, Smoothing, Training, Data):
    """All settings of a study of faces."""


PARTS = (Data, Training, Smoothing, FDS)
"""The parts that all studies of faces share. Each study has a ``Run`` of its own."""


@dataclass(frozen=True)
class Method:
    """One way to train and to predict. The defaults are plain L1 regression."""

    title: str
    """A description in a few words."""
    head: Literal["regression", "gaussian", "linear", "cosine", "affinity", "coral", "corn"] = "regression"
    """The head of ``LongTailModel``; all but the first two score bins of the label axis."""
    loss: str | None = None
    """A loss of ``LongTailModel`` or of ``objective``; None is the setting for regression, else the head's default."""
    hard: bool = False
    """Whether labels are not spread over neighbouring bins."""
    expectation: float = 0.0
    """The factor of the absolute error of the expectation in the loss."""
    weights: Literal["counts", "smoothed"] | None = None
    """The density from which samples are weighted."""
    scheme: Literal["inverse"] | None = None
    """The scheme of these weights; None is the setting."""
    fds: Mapping[str, Any] | None = None
    """If not None, features are smoothed, and these options replace the settings."""
    normalized: bool = False
    """Whether features pass a BatchNorm before they are smoothed."""
    bottleneck: bool = False
    """Whether there is a layer of 32 features between the backbone and the head."""
    fds_before: bool = False
    """Whether features are smoothed before that layer and not after it."""
    control: Literal["permuted", "noise"] | None = None
    """What takes the place of FDS, to tell what FDS does from what any change of features does."""
    in_loss: bool = False
    """Whether the prior is adjusted in the loss, with tau 1."""
    q: float | None = None
    """Ages are drawn in proportion to their counts to this power."""
    start: str | None = None
    """The method from whose trained network this one starts."""
    tau: bool = False
    """Whether that network is only adjusted, with the tau that is best on validation data, and not trained again."""
    members: int = 1
    """How many networks of ``start`` are averaged. For seed s they have the seeds from members * s on."""
    teacher: str | None = None
    """The method of the networks whose mean distribution takes the place of the labels, as many as ``members``."""
    suite: str | None = None
    """The method of ``suite.py`` that this is, with L1 where it takes a loss. Nothing else here then counts."""


MAIN: dict[str, Method] = {
    "vanilla": Method("plain regression"),
    "unsmoothed": Method("weights of the density as counted", weights="counts"),
    "lds": Method(
        "label distribution smoothing (LDS): loss weights from the smoothed label density", weights="smoothed"
    ),
    "fds": Method("feature distribution smoothing (FDS)", fds={}),
    "lds+fds": Method("LDS and FDS", weights="smoothed", fds={}),
    "sampling": Method("ages drawn by the root of their counts", q=0.5),
    "rrt": Method(
        "frozen encoder of vanilla, regressor trained again with inverse weights",
        start="vanilla",
        weights="counts",
        scheme="inverse",
    ),
    "bmc": Method("balanced MSE over the batch", loss="bmc"),
    "gai": Method("balanced MSE with a Gaussian mixture", loss="gai"),
    "bni": Method("balanced MSE over bins", loss="balanced_mse"),
    "conr": Method("L1 and the contrastive regularizer ConR", loss="conr"),
    "rnc": Method("encoder by Rank-N-Contrast, regressor on what it gives", loss="rnc"),
    "nll": Method("Gaussian mean and variance", head="gaussian"),
    "bins": Method("hard bins of a year", head="linear", hard=True),
    "soft": Method("soft bins", head="linear"),
    "soft+cosine": Method("soft bins, cosine head", head="cosine"),
    "soft+affinity": Method("soft bins, Gaussian affinities to one prototype per bin", head="affinity"),
    "soft+emd": Method("bins, squared earth mover's distance", head="linear", loss="squared_emd"),
    "soft+crps": Method("bins, CRPS", head="linear", loss="crps"),
    "soft+in-loss": Method("soft bins, prior adjusted in the loss", head="linear", in_loss=True),
    "soft+tau": Method("soft bins, prior adjusted after training", start="soft", tau=True),
    "soft+expectation": Method(
        "soft bins, with the absolute error of their expectation in the loss", head="linear", expectation=1.0
    ),
    "soft+expectation+tau": Method(
        "the same, prior adjusted after training", head="linear", start="soft+expectation", tau=True
    ),
    "soft+fds": Method("soft bins, FDS", head="linear", fds={}),
    "soft+lds": Method("soft bins, LDS weights", head="linear", weights="smoothed"),
    "soft+lds+tau": Method("soft bins, LDS weights, prior adjusted after training", start="soft+lds", tau=True),
    "soft+lds+fds": Method("soft bins, LDS weights, FDS", head="linear", weights="smoothed", fds={}),
    "soft+crt": Method(
        "frozen encoder of soft bins, head trained again on even ages", head="linear", start="soft", q=0.0
    ),
}
"""The methods that the short training of all compares."""

CONTROLS: dict[str, Method] = {
    "fds-permuted": Method("FDS by the labels of other samples of the batch", fds={}, control="permuted"),
    "fds-noise": Method("noise as large as what FDS would change", fds={}, control="noise"),
}
"""What a gain of FDS must exceed."""

VARIANTS: dict[str, Method] = {
    "lds+fds-m0": Method("LDS and FDS of the last epoch's statistics alone", weights="smoothed", fds={"momentum": 0.0}),
    "lds+fds-shrunk": Method(
        "LDS and FDS, variances shrunk towards the pooled one", weights="smoothed", fds={"shrinkage": 20.0}
    ),
    "lds+fds-counts": Method(
        "LDS and FDS, smoothing weighted by counts", weights="smoothed", fds={"count_weighted": True}
    ),
    "lds+fds-wide": Method("LDS and FDS with a window of 15 years", weights="smoothed", fds={"kernel": (15, 6.0)}),
    "lds+fds-full": Method("LDS and FDS with full covariances", weights="smoothed", fds={"covariance": "full"}),
    "lds+fds-full-paper": Method(
        "the same, by the map that the paper writes", weights="smoothed", fds={"covariance": "full", "map": "paper"}
    ),
    "lds+fds-low-rank": Method(
        "LDS and FDS with covariances in 32 directions", weights="smoothed", fds={"covariance": "low_rank"}
    ),
    "lds-normalized": Method("LDS, features normalized", weights="smoothed", normalized=True),
    "lds+fds-normalized": Method(
        "LDS, features normalized, then smoothed", weights="smoothed", normalized=True, fds={}
    ),
    "lds-bottleneck": Method("LDS, a bottleneck of 32 features", weights="smoothed", bottleneck=True),
    "lds+fds-bottleneck": Method("LDS and FDS after that bottleneck", weights="smoothed", bottleneck=True, fds={}),
    "lds+fds-before-bottleneck": Method(
        "LDS and FDS before that bottleneck", weights="smoothed", bottleneck=True, fds={}, fds_before=True
    ),
}

RIVALS: dict[str, Method] = {
    "ccc": Method("concordance correlation of the batch as the loss", suite="ccc"),
    "dist_loss": Method("Dist loss, towards the distribution of the labels", suite="dist_loss"),
    "srl": Method("surrogate-driven representation learning (SRL)", suite="srl"),
    "c_mixup": Method("C-Mixup", suite="c_mixup"),
    "bsam": Method("balanced sharpness-aware steps (BSAM)", suite="bsam"),
    "uvote": Method("uncertainty voting (UVOTE)", suite="uvote"),
    "corn": Method("soft bins, ordinal head CORN", head="corn"),
    "coral": Method("soft bins, ordinal head CORAL", head="coral"),
    "coral+tau": Method("soft bins, ordinal head CORAL, prior adjusted after training", start="coral", tau=True),
}
"""Methods of later papers. Those of ``suite.py`` have the first settings that are tried there."""

ENSEMBLES: dict[str, Method] = {
    "soft+ensemble+tau": Method(
        "mean of five networks of soft bins, prior adjusted after training",
        start="soft",
        tau=True,
        members=5,
    ),
    "soft+distilled": Method(
        "one network that learns the mean distribution of five networks of soft bins",
        head="linear",
        teacher="soft",
        members=5,
    ),
    "soft+distilled+tau": Method(
        "one network that learns the mean of five, prior adjusted after training",
        start="soft+distilled",
        tau=True,
    ),
}
"""Several networks that are averaged, and one that learns from their mean."""

METHODS = MAIN | CONTROLS | VARIANTS | RIVALS | ENSEMBLES

WINNER = "soft+tau"
"""The best single network in the short training of all."""

GROUPS: dict[str, tuple[str, ...]] = {
    "default": (WINNER,),
    "all": tuple(MAIN),
    "fds-controls": ("vanilla", "fds", *CONTROLS),
    "fds-study": ("lds", "lds+fds", *VARIANTS, "soft+lds", "soft+lds+fds"),
    "rivals": tuple(RIVALS),
    "ensembles": tuple(ENSEMBLES),
}
"""Names that stand for several methods. The study of FDS asks whether feature smoothing improves LDS or bins."""


def named(methods: Sequence[str]) -> list[str]:
    """The names of single methods, each once. A given name may stand for several methods."""
    return list(dict.fromkeys(name for method in methods for name in GROUPS.get(method, (method,))))


def unknown(option: str, methods: Sequence[str]) -> list[str]:
    """One fault per name that is neither a method nor a group of methods."""
    strange = [name for name in named(methods) if name not in METHODS]
    near = [difflib.get_close_matches(name, (*METHODS, *GROUPS), n=2) for name in strange]
    return [
        f"{option} must name methods that --help lists, got {name}."
        + f" Did you mean {' or '.join(close)}?" * bool(close)
        for name, close in zip(strange, near, strict=True)
    ]


def overview() -> str:
    """All methods and groups of them, for ``--help``."""

    def listed(methods: Mapping[str, Method]) -> list[str]:
        return [f"  {name:26}{method.title}" for name, method in methods.items()]

    return "\n".join(
        [
            "methods; LDS and FDS are label and feature distribution smoothing (Yang et al. 2021):",
            *listed(MAIN),
            "",
            "controls of fds:",
            *listed(CONTROLS),
            "",
            "variants of lds and lds+fds:",
            *listed(VARIANTS),
            "",
            "methods of later papers:",
            *listed(RIVALS),
            "",
            "averages of networks:",
            *listed(ENSEMBLES),
            "",
            "names that stand for several:",
            f"  {'default':26}{WINNER}, the best single network",
            f"  {'all':26}all methods of the first list",
            f"  {'fds-controls':26}FDS, its controls, and plain regression",
            f"  {'fds-study':26}the variants, and the methods that they are compared with",
            f"  {'rivals':26}the methods of later papers",
            f"  {'ensembles':26}the averages of networks",
        ]
    )


def faults(settings: Settings, out: Path) -> list[str]:
    """All faults of the settings, which are collected before any data is loaded."""
    import dir_toolkit as dt

    problems = [*unfit_folder("--out", out), *unknown("--methods", settings.methods)]
    methods = [METHODS[name] for name in named(settings.methods) if name in METHODS]
    if (settings.data == "portraits") != (settings.root is None):
        problems.append("--root must name the folder of the images of other --data than portraits, which are drawn.")
    if settings.data in ("portraits", "utkface") and settings.listing is not None:
        problems.append("--listing needs --data agedb or imdb-wiki.")
    if not settings.methods:
        problems.append("--methods must name a method, got none.")
    own = [name for name in named(settings.methods) if name in METHODS and METHODS[name].suite is not None]
    if settings.loss != "l1" and own:
        problems.append(f"--loss must be l1 with {' '.join(own)}, got {settings.loss}.")
    if settings.tau is not None and not any(method.tau for method in methods):
        problems.append("--tau needs a method that is adjusted after training, such as soft+tau.")
    for name, low in (("seeds", 1), ("stage_two_epochs", 1), ("checkpoint_minutes", 0), ("label_sigma", 0), ("tau", 0)):
        value = getattr(settings, name)
        if value is not None and not low <= value < math.inf:
            problems.append(f"--{name.replace('_', '-')} must be finite and at least {low}, got {value:g}.")
    makers: tuple[Callable[[], object], ...] = (
        lambda: optimization(settings),
        lambda: dt.LDS(label_axis(settings), kernel=dt.gaussian(settings.kernel_size, settings.kernel_sigma)),
        lambda: smoother(replace(settings, kernel_size=5, kernel_sigma=2.0), max(settings.fds_rank, 1) + 1),
        lambda: backbone(settings),
    )
    for make in makers:
        try:
            make()
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    return problems


@cache
def load(settings: Settings) -> Splits:
    from dir_toolkit.experiment.data.dir_lists import dir_list
    from dir_toolkit.experiment.data.portraits import portraits
    from dir_toolkit.experiment.data.utkface import utkface

    size = settings.size or (32 if settings.data == "portraits" else 64)
    if settings.root is None:
        return portraits(size=size)
    if settings.data == "utkface":
        return utkface(settings.root, size=size, on_error=settings.on_error)
    name = settings.data.replace("-", "_")
    listing = settings.listing or settings.root / f"{name}.csv"
    return dir_list(listing, settings.root, source=f"{name}_dir", size=size, on_error=settings.on_error)


def label_axis(settings: Settings) -> dt.Bins:
    """One bin per year, from 0 to the highest age that the data can hold."""
    import dir_toolkit as dt

    highest = {"portraits": 101, "utkface": 117, "agedb": 201, "imdb-wiki": 201}[settings.data]
    return dt.Bins.uniform(0, highest, width=1, integer=True)


def backbone(settings: Settings) -> nn.Module:
    import torch

    from dir_toolkit.experiment.backbones import backbone_of

    network = backbone_of(settings.backbone)
    if settings.compile:
        torch.compiler.reset()  # else many runs reach the limit of compilations, and later ones are not compiled
        network.compile(dynamic=False)
    return network


def task(settings: Settings) -> Task:
    from dir_toolkit.experiment.data.augment import augment_strongly
    from dir_toolkit.experiment.study import Task

    return Task(
        data=lambda seed: load(settings),
        bins=label_axis(settings),
        network=lambda splits: backbone(settings),
        title=f"Age estimation on {settings.data}",
        label_name="age",
        label_units="years",
        augmentation=augment_strongly if settings.augmentation == "strong" else True,
    )


def study(settings: Settings, out: Path, runtime: Runtime, recipe: str) -> Study:
    from dir_toolkit.experiment.study import Study

    return Study(
        out,
        task(settings),
        methods(settings),
        runtime,
        optimization(settings),
        settings=shown(settings),
        command=typed_command(f"recipes/studies/{recipe}"),
        resume=settings.resume,
        checkpoint_minutes=settings.checkpoint_minutes,
    )


def optimization(settings: Settings) -> Optimization:
    from dir_toolkit.experiment.training.loop import Optimization

    names = ("epochs", "batch_size", "lr", "optimizer", "schedule")
    return Optimization(**{name: getattr(settings, name) for name in names})


def smoother(
    settings: Settings,
    num_features: int,
    *,
    kernel: tuple[int, float] | None = None,
    control: Literal["permuted", "noise"] | None = None,
    **changes: Any,
) -> dt.FDS:
    """FDS or a control of it with these settings, some of which a method changes."""
    import comparing

    import dir_toolkit as dt

    names = ("momentum", "covariance", "map", "rank", "shrinkage", "count_weighted", "start_epoch")
    usual = {name: getattr(settings, f"fds_{name}") for name in names}
    window = dt.gaussian(*(kernel or (settings.kernel_size, settings.kernel_sigma)))
    make = {None: dt.FDS, "permuted": comparing.Permuted, "noise": comparing.Noisy}[control]
    return make(label_axis(settings), num_features, kernel=window, **{**usual, **changes})


def methods(settings: Settings) -> dict[str, Callable[[Trial], Trained]]:
    """The functions that a study runs, by name."""
    return {name: partial(trained, method, settings) for name, method in METHODS.items()}


def trained(method: Method, settings: Settings, trial: Trial) -> Trained:
    """Train the network of a method with the seed of the trial."""
    import dir_toolkit as dt

    if method.suite is not None:
        import suite

        knobs, make = suite.METHODS[method.suite]
        assert knobs is not None
        own = {**knobs[0], "lr": settings.lr, "weight_decay": trial.study.optimization.weight_decay}
        return make(trial, own=own)
    options: dict[str, Any] = {"weights": None}
    model: Any
    if method.weights is not None:
        kernel = dt.gaussian(settings.kernel_size, settings.kernel_sigma) if method.weights == "smoothed" else None
        options["weights"] = dt.LDS(trial.bins, kernel=kernel, scheme=method.scheme or settings.scheme).fit(
            trial.density
        )
    if method.start is None:
        model, options["fds"] = network(method, settings, trial, options["weights"])
        if method.teacher is not None:
            return distilled(method, model, trial)
    else:
        one = method.members == 1
        first = trial.trained(method.start, epoch="last") if one else averaged(method.start, method.members, trial)
        if method.tau:
            return trial.adjusted(first, tau=settings.tau)
        model = first.model
        dt.stage_two(model, "rrt" if method.head == "regression" else "crt", seed=trial.runtime.derive("head"))
        options |= {"after": first, "optimization": replace(trial.study.optimization, epochs=settings.stage_two_epochs)}
    if method.q is not None:
        options["sampler"] = dt.BinSampler(trial.splits.train.labels, trial.bins, q=method.q, seed=trial.runtime.seed)
    return trial.fit(model, loss=objective(method, model, trial.density), **options)


def averaged(method: str, members: int, trial: Trial) -> Trained:
    """The mean of the distributions of several networks, whose seeds no other seed of the trial has."""
    import dir_toolkit as dt

    own = (trial.study.trial(trial.task, trial.method, members * trial.runtime.seed + k) for k in range(members))
    every: list[Any] = [one.trained(method, epoch="last") for one in own]
    model, minutes = dt.longtail.ensemble([one.model for one in every]), sum(one.minutes for one in every)
    return replace(every[0], model=model, minutes=minutes)


def distilled(method: Method, model: dt.LongTailModel, trial: Trial) -> Trained:
    """A network that learns, on each augmented image, what the mean of others says (Hinton et al. 2015)."""
    import torch

    import dir_toolkit as dt

    assert method.teacher is not None
    teacher = averaged(method.teacher, method.members, trial)

    def answered(images: Tensor, labels: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return images, teacher.model(images).distribution

    def loss(output: dt.LongTailOutput, shares: Tensor, weight: Tensor | None) -> Tensor:
        return dt.losses.soft_cross_entropy(output.scores, shares)

    told = {"loss": "soft_cross_entropy", "mixing": f"{method.members} of {method.teacher}"}
    return trial.fit(model, loss=loss, mixing=answered, after=teacher, fingerprint=told)


def network(
    method: Method, settings: Settings, trial: Trial, weights: dt.LDS | None = None
) -> tuple[dt.LongTailModel, dt.FDS | None]:
    """A new model for a method, and the FDS in it."""
    import numpy as np
    from torch import nn

    import dir_toolkit as dt

    body: Any = trial.network()
    num_features, fds = body.num_features, None
    if method.bottleneck:
        if method.fds is not None and method.fds_before:
            fds = smoother(settings, num_features, **method.fds)
            fds.attach(body, "output")
        body, num_features = nn.Sequential(body, nn.Linear(num_features, 32), nn.ReLU()), 32
    if method.normalized:
        body = nn.Sequential(body, nn.BatchNorm1d(num_features, affine=False))
    if method.fds is not None and fds is None:
        fds = smoother(settings, num_features, control=method.control, **method.fds)
    # A model hands its own FDS bins in place of labels, and a control could not permute these.
    attached = method.fds_before or method.control is not None
    loss: Any = method.loss
    if loss == "bmc":
        loss = dt.losses.BatchMCLoss(gather=True)
    elif loss == "gai":
        loss = dt.losses.GaussianMixtureLoss.fit(np.repeat(trial.bins.centers, trial.density.counts))
    elif method.head == "regression" and loss != "balanced_mse":
        loss = f"weighted_{settings.loss.replace('-', '_')}"
    spreads = method.head not in ("regression", "gaussian") and loss != "crps"
    options: dict[str, Any] = {"sigma": None if method.hard else settings.label_sigma} if spreads else {}
    if method.expectation:
        options["expectation_weight"] = method.expectation
    if method.in_loss:
        options |= {"target_prior": "uniform", "adjust": "in_loss"}
    model = dt.LongTailModel(
        body,
        num_features,
        trial.bins,
        density=trial.density,
        head=method.head,
        loss=loss,
        fds=None if attached else fds,
        weights=weights,
        **options,
    )
    if method.control is not None and fds is not None:
        fds.attach(model.head, "input")
    return model, fds


def objective(method: Method, model: dt.LongTailModel, density: dt.LabelDensity) -> Callable[..., Tensor]:
    """The loss, a function of the model's output and the labels."""
    import dir_toolkit as dt

    if method.loss == "conr":
        return dt.losses.ConRLoss(coefficient=4.0, weights=dt.LDS(density.bins).fit(density))
    if method.loss == "rnc":

        def rank_and_probe(output: dt.LongTailOutput, labels: Tensor, weight: Tensor | None) -> Tensor:
            """The loss of the regressor does not reach the encoder, so both are trained side by side."""
            probe = model.read(output.features.detach())
            return dt.losses.rank_n_contrast(output.features, labels, weight) + model.criterion(probe, labels, weight)

        return rank_and_probe
    return model.criterion
