"""Age estimation from faces: what remedies for long-tailed labels do to the errors of rare ages.

    python recipes/age.py                                             # synthetic portraits, no download, about a minute
    python recipes/age.py --data utkface --root DIR --seeds 3         # real faces
    python recipes/age.py --methods soft --tune sigma,lr              # settings chosen on validation, then one run
    torchrun --nproc_per_node 2 recipes/age.py ...                    # several processes or GPUs

Each run trains a network per method and seed and ends with a table, figures and a report in ``runs/age/<data>``.
A run that was stopped goes on with ``--resume``; its finished parts are not done again. ``compare.py`` compares all
methods, ``age_methods.py`` says what they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from age_methods import METHODS, Method, named, network, objective, overview, unknown
from age_tuning import TUNABLE, chosen, curves, knobs, moved
from command_line import run, typed_command, unfit_folder

if TYPE_CHECKING:  # torch and the toolkit load in main(), so that --help answers at once
    import numpy as np
    import xarray as xr
    from matplotlib.figure import Figure
    from torch import nn

    import dir_toolkit as dt
    from dir_toolkit.experiment.data.images import Splits
    from dir_toolkit.experiment.training.loop import Optimization
    from dir_toolkit.experiment.training.runtime import Runtime
    from dir_toolkit.experiment.training.search import Search

LEVEL = 0.9  # of the intervals
NOTES = (
    "Ages fall into regions by their training faces: many (more than 100 an age), medium (20 to 100), few (1 to 19). "
    "MAE is the mean over faces, bMAE the mean over ages of each age's MAE: the two are the same where all ages have "
    "equally many test faces. The constant predictor answers the training median whatever it sees.",
    "Each run is judged at the epoch of its least validation bMAE. A method that goes on from another's network takes "
    "it as it was after its last epoch. The test set was used once, at the end.",
)
PLACES = ("root", "listing", "out")  # settings that say where things lie on this machine; no result shows them


@dataclass(frozen=True)
class Settings:
    """Age estimation from faces: what remedies for long-tailed labels do to the errors of rare ages."""

    data: Literal["portraits", "utkface", "agedb", "imdb-wiki"] = "portraits"
    """Faces: drawn by the package, or real ones in --root."""
    root: Path | None = None
    """Folder of the images, or the UTKFace archive."""
    listing: Path | None = None
    """CSV list (age,path,split) of agedb and imdb-wiki; by default agedb.csv or imdb_wiki.csv in --root."""
    on_error: Literal["raise", "skip"] = "raise"
    """What an image that cannot be read does: stop, or be skipped and counted."""
    size: int | None = None
    """Side of the images in pixels; by default 32 for portraits and 64 for photographs."""
    methods: tuple[str, ...] = ("vanilla", "lds", "default")
    """What to train, of the names above."""
    seeds: int = 1
    """How many seeds a method is trained with: 0, 1, ..."""
    backbone: str = "small_resnet"
    """The network: small_resnet, or the name of any timm model (needs the extra "models")."""
    loss: Literal["l1", "mse", "huber", "focal-l1", "focal-mse"] = "l1"
    """What regression minimises, where a method does not say otherwise."""
    epochs: int = 12
    """Passes over the training faces."""
    batch_size: int = 128
    """Faces a step, over all processes together."""
    lr: float = 2e-3
    """Highest learning rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """How parameters are moved."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """How the learning rate falls."""
    augmentation: Literal["plain", "strong"] = "plain"
    """Flips and shifts; or turns, zooms, light and colors too, which long trainings ask for."""
    scheme: Literal["inverse", "sqrt_inverse", "effective_number", "dense"] = "sqrt_inverse"
    """How LDS turns the smoothed density into weights."""
    kernel_size: int = 5
    """Width of the Gaussian window of LDS and FDS, in years, odd."""
    kernel_sigma: float = 2.0
    """Its standard deviation, in years."""
    label_sigma: float = 2.0
    """How far labels are spread over neighbouring bins, in years."""
    tau: float | None = None
    """Strength of the adjustment after training; by default what validation finds best."""
    stage_two_epochs: int = 4
    """Passes over the training faces where a head is trained again on a frozen encoder."""
    fds_momentum: float = 0.9
    """Weight of the old statistics when an epoch is folded in; 0 uses the last epoch only."""
    fds_covariance: Literal["diagonal", "full", "low_rank"] = "diagonal"
    """What of the features' covariances is smoothed."""
    fds_map: Literal["paper", "transport"] = "transport"
    """How features go over to a covariance that is not diagonal."""
    fds_rank: int = 32
    """Directions of low_rank."""
    fds_shrinkage: float | None = None
    """Pseudo-samples that pull the covariance of each age towards the pooled one; by default none for a diagonal, else
    as many as the matrices have rows."""
    fds_count_weighted: bool = False
    """Smooth statistics in proportion to the samples behind them."""
    fds_start_epoch: int = 1
    """Epochs before features are calibrated."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the forward pass."""
    tune: str = ""
    """What to choose on validation before training, separated by commas: kernel,sigma,scheme,momentum,lr,tau."""
    checkpoint_minutes: float = 5.0
    """Most time between two checkpoints."""
    resume: bool = False
    """Go on where an earlier run in --out was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/age/<data>."""


@dataclass(frozen=True)
class Trained:
    """A network at the end of its training."""

    model: dt.LongTailModel
    fds: dt.FDS | None
    """With its statistics at the end of training."""
    history: list[dict[str, Any]]
    """A row an epoch; of a method in two stages, of the second."""
    epoch: int
    """Of the weights."""
    minutes: float
    """Spent on all its stages."""


@dataclass(frozen=True)
class Run:
    """What one method with one seed came to."""

    errors: xr.Dataset
    """On the test set, sample by sample, too."""
    history: list[dict[str, Any]]
    """A row an epoch."""
    fds: dt.FDS | None
    """With its statistics at the end of training."""
    tau: dt.TauChoice | None
    """Of a method that is adjusted after training, and what it was chosen from."""


def main(settings: Settings) -> None:
    from dir_toolkit.experiment.results.tables import as_text, results_table
    from dir_toolkit.experiment.training.runtime import start_runtime

    out = settings.out or Path("runs/age") / settings.data
    check("recipes/age.py", settings, out)
    with start_runtime(settings.device, settings.precision) as runtime:
        splits = load(settings, runtime)
        search = tune(settings, runtime, splits, out) if settings.tune else None
        if search is not None:
            settings = replace(settings, **search.settings)
        runs: dict[tuple[str, int], Run] = {}
        for method in named(settings.methods):
            for seed in range(settings.seeds):
                if runtime.is_main:
                    print(f"\n{method}, seed {seed}", flush=True)
                runs[method, seed] = train(settings, method, replace(runtime, seed=seed), splits, out)
        if runtime.is_main:
            ds = summarise(settings, out, splits, runs, runtime, search)
            print(f"\n{as_text(results_table(ds, columns=columns(ds)))}\n{ending(out)}")


def check(recipe: str, settings: Settings, out: Path, others: Sequence[str] = ()) -> None:
    """All faults at once, those of ``others`` too, before anything is loaded."""
    import dir_toolkit as dt
    from dir_toolkit.errors import RunExistsError, SettingsError

    strange = unknown("--methods", settings.methods)
    faults = [*others, *unfit_folder("--out", out), *strange]
    methods = [name for name in named(settings.methods) if name in METHODS]
    if settings.data != "portraits" and settings.root is None:
        faults.append(f"--root must name the folder of the images of {settings.data}. See data_cards/.")
    if settings.data == "portraits" and settings.root is not None:
        faults.append("--root needs --data utkface, agedb or imdb-wiki; portraits are drawn.")
    if settings.data in ("portraits", "utkface") and settings.listing is not None:
        faults.append("--listing needs --data agedb or imdb-wiki.")
    if not settings.methods:
        faults.append("--methods must name a method, got none.")
    known = (*TUNABLE, "tau")
    if not set(knobs(settings.tune)) <= set(known) or len(set(knobs(settings.tune))) < len(knobs(settings.tune)):
        faults.append(
            f"--tune must name some of {', '.join(known)}, each once, separated by commas, got {settings.tune}."
        )
    if settings.tune and len(named(settings.methods)) != 1:
        faults.append("--tune needs one method in --methods, for each has settings of its own.")
    idle = [knob for knob in knobs(settings.tune) if knob in TUNABLE and not moved(knob, methods)]
    if idle and methods and not strange:
        faults.append(f"--tune {','.join(idle)} would change nothing in {' '.join(settings.methods)}.")
    adjusted = bool(strange) or any(METHODS[method].tau for method in methods)
    if "tau" in knobs(settings.tune) and (settings.tau is not None or not adjusted):
        faults.append("--tune tau needs a method that is adjusted after training, such as soft+tau, and no --tau.")
    if settings.tau is not None and not adjusted:
        faults.append("--tau needs a method that is adjusted after training, such as soft+tau.")
    if settings.tau is not None and not 0 <= settings.tau < math.inf:
        faults.append(f"--tau must be finite and at least 0, got {settings.tau:g}.")
    if not 0 <= settings.label_sigma < math.inf:
        faults.append(f"--label-sigma must be finite and at least 0, got {settings.label_sigma:g}.")
    if settings.stage_two_epochs < 1:
        faults.append(f"--stage-two-epochs must be at least 1, got {settings.stage_two_epochs}.")
    if settings.seeds < 1:
        faults.append(f"--seeds must be at least 1, got {settings.seeds}.")
    if settings.size is not None and settings.size < 16:
        faults.append(f"--size must be at least 16, got {settings.size}.")
    if not settings.checkpoint_minutes >= 0:
        faults.append(f"--checkpoint-minutes must be at least 0, got {settings.checkpoint_minutes:g}.")
    usual = replace(settings, kernel_size=Settings.kernel_size, kernel_sigma=Settings.kernel_sigma)
    makers: tuple[Callable[[], object], ...] = (
        lambda: optimization(settings),
        lambda: dt.LDS(label_axis(settings), kernel=window(settings)),
        lambda: smoother(
            usual, max(usual.fds_rank, 1) + 1
        ),  # so that a fault of the window is not told twice, and hides none
        lambda: backbone(settings),
    )
    for make in makers:
        try:
            make()
        except (ValueError, TypeError) as error:
            faults.append(str(error))
    if faults:
        listed = "\n".join(["these settings cannot run:", *faults]).replace("\n", "\n  ")
        raise SettingsError(f"{recipe}: {listed}")
    earlier = ("*/seed*/checkpoint-last.pt", "tune/**/checkpoint-last.pt", "tune/search.db")
    if not settings.resume and (found := sorted(path for name in earlier for path in out.glob(name))):
        raise RunExistsError(
            f"{recipe}: --out must hold no earlier run, for none is overwritten, got {found[0]}. "
            "Go on with --resume, which also adds methods and seeds, or choose another folder."
        )


def load(settings: Settings, runtime: Runtime) -> Splits:
    from dir_toolkit.experiment.data.dir_lists import dir_list
    from dir_toolkit.experiment.data.portraits import portraits
    from dir_toolkit.experiment.data.utkface import utkface

    if settings.data == "portraits":
        splits = portraits(size=settings.size or 32)
    elif settings.data == "utkface":
        assert settings.root is not None
        splits = utkface(settings.root, size=settings.size or 64, on_error=settings.on_error)
    else:
        assert settings.root is not None
        name = {"agedb": "agedb", "imdb-wiki": "imdb_wiki"}[settings.data]
        listing = settings.listing or settings.root / f"{name}.csv"
        splits = dir_list(
            listing, settings.root, source=f"{name}_dir", size=settings.size or 64, on_error=settings.on_error
        )
    if runtime.is_main:
        print(
            f"{settings.data}: {len(splits.train):,} faces to train on, {len(splits.val):,} to validate, "
            f"{len(splits.test):,} to test" + "".join(f"; {n} skipped: {why}" for why, n in splits.skipped.items()),
            flush=True,
        )
    return splits


def label_axis(settings: Settings) -> dt.Bins:
    """One bin a year, from 0 to the highest age that the data can hold."""
    import dir_toolkit as dt

    highest = {"portraits": 101, "utkface": 117, "agedb": 201, "imdb-wiki": 201}[settings.data]
    return dt.Bins.uniform(0, highest, width=1, integer=True)


def optimization(settings: Settings) -> Optimization:
    from dir_toolkit.experiment.training.loop import Optimization

    return Optimization(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
    )


def window(settings: Settings) -> np.ndarray:
    import dir_toolkit as dt

    return dt.gaussian(settings.kernel_size, settings.kernel_sigma)


def smoother(
    settings: Settings, num_features: int, *, kernel: tuple[int, float] | None = None, **changes: Any
) -> dt.FDS:
    """FDS as the settings say, with the changes that a method makes to them."""
    import dir_toolkit as dt

    usual = {
        "kernel": window(settings) if kernel is None else dt.gaussian(*kernel),
        "momentum": settings.fds_momentum,
        "covariance": settings.fds_covariance,
        "map": settings.fds_map,
        "rank": settings.fds_rank,
        "shrinkage": settings.fds_shrinkage,
        "count_weighted": settings.fds_count_weighted,
        "start_epoch": settings.fds_start_epoch,
    }
    return dt.FDS(label_axis(settings), num_features, **{**usual, **changes})


def backbone(settings: Settings) -> nn.Module:
    from dir_toolkit.experiment.backbones import small_resnet, timm_backbone

    return small_resnet() if settings.backbone == "small_resnet" else timm_backbone(settings.backbone)


def fresh(
    settings: Settings, method: Method, runtime: Runtime, density: dt.LabelDensity, weights: dt.LDS | None = None
) -> tuple[dt.LongTailModel, dt.FDS | None]:
    """A network of a method, not trained yet, and the FDS in it."""

    with runtime.seeded("network"):
        return network(
            method,
            backbone(settings),
            label_axis(settings),
            density,
            regression_loss=f"weighted_{settings.loss.replace('-', '_')}",
            sigma=settings.label_sigma,
            smoother=None if method.fds is None else partial(smoother, settings, **method.fds),
            weights=weights,
        )


def trained(settings: Settings, name: str, runtime: Runtime, splits: Splits, out: Path) -> Trained:
    """The network of a method, trained now or in an earlier run."""
    import dir_toolkit as dt
    from dir_toolkit.experiment.data.augment import augment_strongly
    from dir_toolkit.experiment.training.checkpoint import load_checkpoint
    from dir_toolkit.experiment.training.loop import fit
    from dir_toolkit.experiment.training.provenance import environment, write_json

    method = METHODS[name]
    labels, bins = splits.train.labels, label_axis(settings)
    density = dt.LabelDensity.count(labels, bins)
    how, earlier, fds = optimization(settings), 0.0, None
    weights = None
    if method.weights is not None:
        kernel = window(settings) if method.weights == "smoothed" else None
        weights = dt.LDS(bins, kernel=kernel, scheme=method.scheme or settings.scheme).fit(density)
    if method.start is None:
        model, fds = fresh(settings, method, runtime, density, weights)
    else:
        if runtime.is_main:
            print(f"{name} goes on from {method.start}:", flush=True)
        first = trained(settings, method.start, runtime, splits, out)
        # As it was at the end: which epoch errs least before the prior is adjusted says little of what it does after.
        last = out / method.start / f"seed{runtime.seed}" / "checkpoint-last.pt"
        first.model.load_state_dict(load_checkpoint(last)["model"])
        if method.tau:
            return replace(first, epoch=settings.epochs)
        model, earlier = first.model, first.minutes
        dt.stage_two(model, "rrt" if method.head == "regression" else "crt", seed=runtime.derive("head"))
        how = replace(how, epochs=settings.stage_two_epochs)
    sampler = None if method.q is None else dt.BinSampler(labels, bins, q=method.q, seed=runtime.seed)

    folder = out / name / f"seed{runtime.seed}"
    # What decides the numbers, beside what fit() is handed; a checkpoint of a run with other values is refused.
    decisive = ["backbone", "loss", "scheme", "kernel_size", "kernel_sigma", "label_sigma"]
    decisive += ["stage_two_epochs"] if method.start is not None else []
    plain = asdict(METHODS["vanilla"])
    decided = {
        "method": name,
        **{key: str(value) for key, value in asdict(method).items() if key != "title" and value != plain[key]},
        "size": splits.train.images.shape[2],
        **{name: value for name, value in asdict(settings).items() if name in decisive or name.startswith("fds_")},
    }
    if runtime.is_main and not (folder / "checkpoint-last.pt").exists():
        write_json(folder / "config.json", {**asdict(settings), **decided, **asdict(how)})
        write_json(folder / "env.json", environment(runtime, splits))
    history = fit(
        model,
        splits.train,
        splits.val,
        metrics=dt.RegressionMetrics(density),
        loss=objective(method, model, density),
        weights=weights,
        sampler=sampler,
        fds=fds,
        optimization=how,
        runtime=runtime,
        folder=folder,
        resume=True,  # a method may go on from another's network; check() refused what was there before all of them
        augmentation=augment_strongly if settings.augmentation == "strong" else True,
        checkpoint_minutes=settings.checkpoint_minutes,
        fingerprint={"recipe": decided},
    )
    best = min(history, key=lambda row: (math.isnan(row["val_bmae"]), row["val_bmae"]))["epoch"]
    return Trained(model, fds, history, best, earlier + history[-1]["seconds"] / 60)


def train(settings: Settings, name: str, runtime: Runtime, splits: Splits, out: Path) -> Run:
    """One method with one seed, from a fresh network to its errors on the test set."""
    import torch

    import dir_toolkit as dt
    from dir_toolkit.experiment.results.schema import save_results
    from dir_toolkit.experiment.training.loop import predict

    end = trained(settings, name, runtime, splits, out)
    model = end.model
    found: dict[str, Any] = {}
    choice = None
    if METHODS[name].tau:
        choice = best_tau(settings, model, splits, runtime)
        if runtime.is_main:
            print(f"tau {choice.tau:g}" + ", chosen on validation" * (settings.tau is None), flush=True)
        model.set_prior("uniform", choice.tau)
        found["tau"] = ((), choice.tau, {"units": "1"})
    output = predict(model, splits.test, runtime=runtime)
    metrics = dt.RegressionMetrics(dt.LabelDensity.count(splits.train.labels, model.bins))
    metrics.update(output.prediction, torch.from_numpy(splits.test.labels).to(runtime.device))
    errors = metrics.compute().assign(minutes=end.minutes, best_epoch=end.epoch, **found)
    errors = errors.assign(by_sample(model, output, splits.test.labels))
    folder = out / name / f"seed{runtime.seed}"
    # A run that was finished before keeps its provenance; what follows without training is always made anew.
    if runtime.is_main and (METHODS[name].tau or not (folder / "results.nc").exists()):
        folder.mkdir(parents=True, exist_ok=True)
        one = as_result(settings, f"{name}, seed {runtime.seed}", {(name, runtime.seed): errors}, runtime, splits)
        save_results(one, folder / "results.nc")
    return Run(errors, end.history, end.fds, choice)


def by_sample(model: dt.LongTailModel, output: dt.LongTailOutput, labels: np.ndarray) -> dict[str, Any]:
    """Each test face's age, what was predicted, and where the head tells a distribution the interval of 90 %."""
    columns: dict[str, Any] = {"target": ("sample", labels), "prediction": ("sample", output.prediction.cpu().numpy())}
    if output.scores.ndim == 2:
        for side, ends in zip(("lower", "upper"), model.interval(output, LEVEL), strict=True):
            columns[side] = ("sample", ends.cpu().numpy(), {"interval_level": LEVEL})
    return columns


def tune(settings: Settings, runtime: Runtime, splits: Splits, out: Path) -> Search | None:
    """The settings of one method that do best on validation faces, by successive halving; curves go to ``out/tune``.

    None where tau alone is to be chosen, which :func:`train` does anyway. Tau needs no training, so that every
    candidate is judged at the tau that suits it best, or that is given.
    """
    from dir_toolkit.errors import SettingsError
    from dir_toolkit.experiment.results.drawing import save_figure
    from dir_toolkit.experiment.training.search import search

    if runtime.world > 1:
        raise SettingsError("recipes/age.py: --tune must run in one process; drop torchrun, and use it afterwards.")
    (name,) = named(settings.methods)
    tried = {knob: TUNABLE[knob] for knob in knobs(settings.tune) if knob != "tau"}
    if not tried:
        return None

    def score(candidate: dict[str, Any], epochs: int) -> float:
        words = "-".join(f"{setting}={value}" for setting, value in candidate.items())
        print(f"  {words}, {epochs} epochs:", flush=True)
        trial = replace(settings, **candidate, epochs=epochs)
        place = out / "tune" / words / f"{epochs}-epochs"
        end = trained(trial, name, runtime, splits, place)
        if METHODS[name].tau:
            return float(best_tau(settings, end.model, splits, runtime).scores.min())
        return min(row["val_bmae"] for row in end.history)

    decided = {key: str(value) for key, value in shown(settings).items() if key not in ("seeds", "methods", "epochs")}
    found = search(
        tried,
        score,
        epochs=settings.epochs,
        folder=out / "tune",
        resume=settings.resume,
        fingerprint={"method": name, **decided},
    )
    save_figure(curves(found), out / "tune/tuning.png")
    print(f"{chosen(found)} Curves: {out / 'tune/tuning.png'}", flush=True)
    return found


def best_tau(settings: Settings, model: dt.LongTailModel, splits: Splits, runtime: Runtime) -> dt.TauChoice:
    """How strongly to adjust predictions: what validation faces find best, or what the settings say."""
    import torch

    from dir_toolkit.experiment.training.loop import predict

    labels = torch.from_numpy(splits.val.labels).to(runtime.device)
    taus = None if settings.tau is None else [settings.tau]
    return model.choose_tau(predict(model, splits.val, runtime=runtime).scores, labels, taus=taus)


def constant_predictor(splits: Splits, bins: dt.Bins) -> xr.Dataset:
    """What one reaches without looking at a face: the median age of the training set for everyone."""
    import numpy as np
    import torch

    import dir_toolkit as dt

    target = torch.from_numpy(splits.test.labels)
    pred = torch.full_like(target, float(np.median(splits.train.labels)))
    density = dt.LabelDensity.count(splits.train.labels, bins)
    samples = {"target": ("sample", splits.test.labels), "prediction": ("sample", pred.numpy())}
    return dt.regression_metrics(pred, target, density).assign(samples)


def as_result(
    settings: Settings, title: str, runs: dict[tuple[str, int], xr.Dataset], runtime: Runtime, splits: Splits
) -> xr.Dataset:
    """Runs as one result of the schema."""
    from dir_toolkit.experiment.results.schema import combine_runs
    from dir_toolkit.experiment.training.provenance import environment

    return combine_runs(
        runs,
        title=f"Age estimation on {settings.data}: {title}",
        command=command(),
        label_name="age",
        label_units="years",
        attrs=environment(runtime, splits),
    )


def summarise(
    settings: Settings,
    out: Path,
    splits: Splits,
    runs: dict[tuple[str, int], Run],
    runtime: Runtime,
    search: Search | None,
) -> xr.Dataset:
    """All runs as one result, with its table, figures and report."""
    import dir_toolkit as dt
    from dir_toolkit.experiment.results import figures as draw
    from dir_toolkit.experiment.results.drawing import method_colors
    from dir_toolkit.experiment.results.summary import write_summary

    bins = label_axis(settings)
    errors = {key: run.errors for key, run in runs.items()}
    constant = {("constant", 0): constant_predictor(splits, bins)}
    ds = as_result(settings, "methods", {**errors, **constant}, runtime, splits)
    histories = {key: run.history for key, run in runs.items()}
    density = dt.LabelDensity.count(splits.train.labels, bins)
    colors = method_colors(ds["method"].values.tolist())
    pictures = {
        "Error by region": draw.region_figure(ds, colors=colors),
        "Error by age": draw.error_figure(ds, window=5, colors=colors),
        **density_picture(settings, density),
        "Training": draw.history_figure(histories, label_units="years", colors=colors),
        **tau_picture({key: run.tau for key, run in runs.items() if run.tau is not None}),
    }
    notes = list(NOTES)
    if search is not None:
        pictures["Settings tried on validation"] = curves(search)
        notes.append(chosen(search))
    for (method, seed), one in runs.items():
        if seed == 0 and one.fds is not None:
            pictures[f"Feature statistics of {method}"] = statistics_picture(one.fds, bins, density)
    write_summary(out, ds, pictures, notes=notes, titles=titles(ds), settings=shown(settings), columns=columns(ds))
    return ds


def titles(ds: xr.Dataset) -> dict[str, str]:
    """What the methods of a result are, in a few words."""
    return {name: method.title for name, method in METHODS.items() if name in ds["method"].values}


def columns(ds: xr.Dataset) -> list[tuple[str, str | None]]:
    """Of the table: errors by region, and the tau of methods that are adjusted after training."""
    regions = ("all", "many", "medium", "few")
    errors: list[tuple[str, str | None]] = [(metric, region) for metric in ("mae", "bmae") for region in regions]
    return [*errors, ("tau", None)] if "tau" in ds else errors


def ending(out: Path) -> str:
    """What to look at."""
    return (
        "Compare few with many: ages with few training faces are where plain regression fails.\n"
        f"Figures, settings and what the methods are: {out / 'report.html'}\n"
        f"All numbers: {out / 'results.nc'}. Curves: tensorboard --logdir {out}"
    )


def tau_picture(choices: dict[tuple[str, int], dt.TauChoice]) -> dict[str, Figure]:
    """What validation faces say of each strength of the adjustment, a line a method, its mean over seeds."""
    import numpy as np

    from dir_toolkit.experiment.results.class_figures import tau_figure

    by_method: dict[str, list[dt.TauChoice]] = {}
    for (method, _), choice in choices.items():
        if len(choice.taus) > 1:  # not given, but chosen
            by_method.setdefault(method, []).append(choice)
    if not by_method:
        return {}
    curves = {method: (many[0].taus, np.mean([c.scores for c in many], 0)) for method, many in by_method.items()}
    chosen = {method: float(np.mean([c.tau for c in many])) for method, many in by_method.items()}
    return {"Tau on validation": tau_figure(curves, chosen, ylabel="validation bMAE (years)", percent=False)}


def density_picture(settings: Settings, density: dt.LabelDensity) -> dict[str, Figure]:
    """Training labels along the axis and, where a method has them, what weights LDS makes of them."""
    import dir_toolkit as dt
    from dir_toolkit.experiment.results.figures import density_figure

    draw = partial(density_figure, density, label_name="age", label_units="years")
    if not moved("scheme", settings.methods):
        return {"Label density": draw()}
    kernel = window(settings)
    weights = dt.LDS(density.bins, kernel=kernel, scheme=settings.scheme).fit(density)
    each = weights.sample_weight(density.bins.centers)
    return {"Label density and LDS weights": draw(each, effective=density.smooth(kernel))}


def statistics_picture(fds: dt.FDS, bins: dt.Bins, density: dt.LabelDensity) -> Figure:
    """How alike the features of all ages are to those of the age with most faces, before and after smoothing."""
    from dir_toolkit.experiment.results.figures import similarity_figure

    s = {name: value.cpu().numpy() for name, value in fds.statistics().items()}
    return similarity_figure(
        s["mean"],
        s["smoothed_mean"],
        bins,
        anchor=bins.centers[density.counts.argmax()],
        variance_before=s["variance"],
        variance_after=s["smoothed_variance"],
        label_name="age",
        label_units="years",
    )


def shown(settings: Settings) -> dict[str, Any]:
    """The settings that a report shows."""
    return {name: value for name, value in asdict(settings).items() if name not in (*PLACES, "resume")}


def command() -> str:
    """What was typed, without the places on this machine."""
    return typed_command(f"recipes/{Path(sys.argv[0]).name}", PLACES)


if __name__ == "__main__":
    run(main, Settings, description=f"{Settings.__doc__}\n\n{overview()}")
