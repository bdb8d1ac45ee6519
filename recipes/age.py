"""Age estimation from faces: what LDS and FDS do to the errors of rare ages.

    python recipes/age.py                                             # synthetic portraits, no download, about a minute
    python recipes/age.py --data utkface --root DIR --seeds 3         # real faces
    torchrun --nproc_per_node 2 recipes/age.py ...                    # several processes or GPUs

Each run trains a network per method and seed and ends with a table, figures and a report in ``runs/age/<data>``.
A run that was stopped goes on with ``--resume``; its finished parts are not done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from command_line import run, typed_command

if TYPE_CHECKING:  # torch and the toolkit load in main(), so that --help answers at once
    import numpy as np
    import xarray as xr
    from torch import nn

    import dir_toolkit as dt
    from dir_toolkit.data.images import ImageSet, Splits
    from dir_toolkit.training.loop import Optimization
    from dir_toolkit.training.runtime import Runtime

Method = Literal["vanilla", "unsmoothed", "lds", "fds", "lds+fds"]
# The density that samples are weighed by, if any, and whether features are smoothed.
METHODS: dict[Method, tuple[Literal["counts", "smoothed"] | None, bool]] = {
    "vanilla": (None, False),
    "unsmoothed": ("counts", False),
    "lds": ("smoothed", False),
    "fds": (None, True),
    "lds+fds": ("smoothed", True),
}

PLACES = ("root", "listing", "out")  # settings that say where things lie on this machine; no result shows them


@dataclass(frozen=True)
class Settings:
    """Age estimation from faces: what LDS and FDS do to the errors of rare ages."""

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
    methods: tuple[Method, ...] = ("vanilla", "lds", "fds", "lds+fds")
    """What to compare."""
    seeds: int = 1
    """How many seeds a method is trained with: 0, 1, ..."""
    backbone: str = "small_resnet"
    """The network: small_resnet, or the name of any timm model (needs the extra "models")."""
    loss: Literal["l1", "mse", "huber", "focal-l1", "focal-mse"] = "l1"
    """What is minimised."""
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
    scheme: Literal["inverse", "sqrt_inverse", "effective_number", "dense"] = "sqrt_inverse"
    """How LDS turns the smoothed density into weights."""
    kernel_size: int = 5
    """Width of the Gaussian window of LDS and FDS, in years, odd."""
    kernel_sigma: float = 2.0
    """Its standard deviation, in years."""
    fds_momentum: float = 0.9
    """Weight of the old statistics when an epoch is folded in; 0 uses the last epoch only."""
    fds_shrinkage: float = 0.0
    """Pseudo-samples that pull the variance of each age towards the pooled one."""
    fds_count_weighted: bool = False
    """Smooth statistics in proportion to the samples behind them."""
    fds_start_epoch: int = 1
    """Epochs before features are calibrated."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the forward pass."""
    checkpoint_minutes: float = 5.0
    """Most time between two checkpoints."""
    resume: bool = False
    """Go on where an earlier run in --out was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/age/<data>."""


@dataclass(frozen=True)
class Run:
    """What one method with one seed came to."""

    errors: xr.Dataset
    """On the test set."""
    history: list[dict[str, Any]]
    """A row an epoch."""
    fds: dt.FDS | None
    """With its statistics at the end of training."""


def main(settings: Settings) -> None:
    from dir_toolkit.results.tables import text_table
    from dir_toolkit.training.runtime import start_runtime

    out = settings.out or Path("runs/age") / settings.data
    check(settings, out)
    with start_runtime(settings.device, settings.precision) as runtime:
        splits = load(settings, runtime)
        bins = label_axis(settings)
        runs: dict[tuple[str, int], Run] = {}
        for method in settings.methods:
            for seed in range(settings.seeds):
                if runtime.is_main:
                    print(f"\n{method}, seed {seed}", flush=True)
                runs[method, seed] = train(settings, method, replace(runtime, seed=seed), splits, bins, out)
        if runtime.is_main:
            ds = summarise(settings, out, splits, bins, runs, runtime)
            print(f"\n{text_table(ds)}\nReport: {out / 'report.html'}")


def check(settings: Settings, out: Path) -> None:
    """All faults at once, before anything is loaded."""
    import dir_toolkit as dt
    from dir_toolkit.errors import RunExistsError, SettingsError

    faults = []
    if settings.data != "portraits" and settings.root is None:
        faults.append(f"--root must name the folder of the images of {settings.data}. See data_cards/.")
    if settings.data == "portraits" and settings.root is not None:
        faults.append("--root needs --data utkface, agedb or imdb-wiki; portraits are drawn.")
    if settings.data in ("portraits", "utkface") and settings.listing is not None:
        faults.append("--listing needs --data agedb or imdb-wiki.")
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        faults.append(f"--methods must name each method once, got {' '.join(settings.methods) or 'none'}.")
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
        lambda: smoother(usual, 1),  # so that a fault of the window is not told twice, and hides none
        lambda: backbone(settings),
    )
    for make in makers:
        try:
            make()
        except (ValueError, TypeError) as error:
            faults.append(str(error))
    if faults:
        listed = "\n".join(["these settings cannot run:", *faults]).replace("\n", "\n  ")
        raise SettingsError(f"recipes/age.py: {listed}")
    if not settings.resume and (found := sorted(out.glob("*/seed*/checkpoint-last.pt"))):
        raise RunExistsError(
            f"recipes/age.py: --out must hold no earlier run, for none is overwritten, got {found[0]}. "
            "Go on with --resume, which also adds methods and seeds, or choose another folder."
        )


def load(settings: Settings, runtime: Runtime) -> Splits:
    from dir_toolkit.data.dir_lists import dir_list
    from dir_toolkit.data.portraits import portraits
    from dir_toolkit.data.utkface import utkface

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
    from dir_toolkit.training.loop import Optimization

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


def smoother(settings: Settings, num_features: int) -> dt.FDS:
    import dir_toolkit as dt

    return dt.FDS(
        label_axis(settings),
        num_features,
        kernel=window(settings),
        momentum=settings.fds_momentum,
        shrinkage=settings.fds_shrinkage,
        count_weighted=settings.fds_count_weighted,
        start_epoch=settings.fds_start_epoch,
    )


def backbone(settings: Settings) -> nn.Module:
    from dir_toolkit.backbones import small_resnet, timm_backbone

    return small_resnet() if settings.backbone == "small_resnet" else timm_backbone(settings.backbone)


def train(settings: Settings, method: Method, runtime: Runtime, splits: Splits, bins: dt.Bins, out: Path) -> Run:
    """One method with one seed, from a fresh network to its errors on the test set."""
    import dir_toolkit as dt
    from dir_toolkit.backbones import ImageRegressor
    from dir_toolkit.results.schema import combine_runs, save_results
    from dir_toolkit.training.loop import evaluate, fit
    from dir_toolkit.training.provenance import environment, write_json

    labels = splits.train.labels
    density = dt.LabelDensity.count(labels, bins)
    losses = {
        "l1": dt.weighted_l1,
        "mse": dt.weighted_mse,
        "huber": dt.weighted_huber,
        "focal-l1": dt.weighted_focal_l1,
        "focal-mse": dt.weighted_focal_mse,
    }

    with runtime.seeded("network"):
        model = ImageRegressor(backbone(settings), offset=median(splits.train), scale=float(labels.std()) or 1.0)
    weigh_by, smooth_features = METHODS[method]
    weights = None
    if weigh_by is not None:
        kernel = window(settings) if weigh_by == "smoothed" else None
        weights = dt.LDS(bins, kernel=kernel, scheme=settings.scheme).fit(density)
    fds = None
    if smooth_features:
        fds = smoother(settings, model.head.in_features)
        fds.attach(model.head, "input")

    folder = out / method / f"seed{runtime.seed}"
    # What decides the numbers; a checkpoint of a run with other values is refused.
    fingerprint = {
        "method": method,
        "size": splits.train.images.shape[2],
        "backbone": settings.backbone,
        "loss": settings.loss,
        "scheme": settings.scheme,
        "kernel_size": settings.kernel_size,
        "kernel_sigma": settings.kernel_sigma,
        **{name: value for name, value in asdict(settings).items() if name.startswith("fds_")},
    }
    how = optimization(settings)
    metrics = dt.RegressionMetrics(bins, density)
    env = environment(runtime, splits)
    if runtime.is_main and not (folder / "checkpoint-last.pt").exists():
        write_json(folder / "config.json", {**asdict(settings), **fingerprint, **asdict(how)})
        write_json(folder / "env.json", env)
    history = fit(
        model,
        splits.train,
        splits.val,
        metrics=metrics,
        loss=losses[settings.loss],
        weights=weights,
        fds=fds,
        optimization=how,
        runtime=runtime,
        folder=folder,
        resume=settings.resume,
        checkpoint_minutes=settings.checkpoint_minutes,
        fingerprint=fingerprint,
    )
    found = evaluate(model, splits.test, metrics=metrics, runtime=runtime)
    best = min(history, key=lambda row: (math.isnan(row["val_bmae"]), row["val_bmae"]))
    errors = found.compute().assign(minutes=history[-1]["seconds"] / 60, best_epoch=best["epoch"])
    if runtime.is_main and not (folder / "results.nc").exists():  # of a run finished before, whose provenance stays
        title = f"Age estimation on {settings.data}: {method}, seed {runtime.seed}"
        one = combine_runs(
            {(method, runtime.seed): errors},
            title=title,
            command=command(),
            label_name="age",
            label_units="years",
            attrs=env,
        )
        save_results(one, folder / "results.nc")
    return Run(errors, history, fds)


def median(faces: ImageSet) -> float:
    import numpy as np

    return float(np.median(faces.labels))


def constant_predictor(splits: Splits, bins: dt.Bins) -> xr.Dataset:
    """What one reaches without looking at a face: the median age of the training set for everyone."""
    import torch

    import dir_toolkit as dt

    target = torch.from_numpy(splits.test.labels)
    density = dt.LabelDensity.count(splits.train.labels, bins)
    return dt.regression_metrics(torch.full_like(target, median(splits.train)), target, bins, density)


def summarise(
    settings: Settings,
    out: Path,
    splits: Splits,
    bins: dt.Bins,
    runs: dict[tuple[str, int], Run],
    runtime: Runtime,
) -> xr.Dataset:
    """All runs as one result, with its table, figures and report."""
    import dir_toolkit as dt
    from dir_toolkit.results import figures as draw
    from dir_toolkit.results.drawing import method_colors
    from dir_toolkit.results.schema import combine_runs
    from dir_toolkit.results.summary import write_summary
    from dir_toolkit.training.provenance import environment

    ds = combine_runs(
        {**{key: run.errors for key, run in runs.items()}, ("constant", 0): constant_predictor(splits, bins)},
        title=f"Age estimation on {settings.data}",
        command=command(),
        label_name="age",
        label_units="years",
        attrs=environment(runtime, splits),
    )
    density = dt.LabelDensity.count(splits.train.labels, bins)
    kernel = window(settings)
    weights = dt.LDS(bins, kernel=kernel, scheme=settings.scheme).fit(density).sample_weight(bins.centers)
    histories = {key: run.history for key, run in runs.items()}
    colors = method_colors(ds["method"].values.tolist())
    pictures = {
        "Label density and LDS weights": draw.density_figure(
            density, weights, effective=density.smooth(kernel), label_name="age", label_units="years"
        ),
        "Error by age": draw.error_figure(ds, window=5, colors=colors),
        "Error by region": draw.region_figure(ds, colors=colors),
        "Training": draw.history_figure(histories, label_units="years", colors=colors),
    }
    for method in settings.methods:
        if (fds := runs[method, 0].fds) is None:
            continue
        s = {name: value.cpu().numpy() for name, value in fds.statistics().items()}
        pictures[f"Feature statistics of {method}"] = draw.similarity_figure(
            s["mean"],
            s["smoothed_mean"],
            bins,
            anchor=bins.centers[density.counts.argmax()],  # the age with most faces
            variance_before=s["variance"],
            variance_after=s["smoothed_variance"],
            label_name="age",
            label_units="years",
        )
    regions = ("all", "many", "medium", "few")
    columns = [(metric, region) for metric in ("mae", "bmae") for region in regions]
    notes = [
        "Regions by training faces an age: many more than 100, medium 20 to 100, few 1 to 19. bMAE is the mean over "
        "ages of each age's MAE. The constant predictor answers the training median whatever it sees.",
        "The epoch of each run was chosen by validation bMAE; the test set was used once, at its end.",
    ]
    shown = {name: value for name, value in asdict(settings).items() if name not in (*PLACES, "resume")}
    write_summary(out, ds, pictures, notes=notes, settings=shown, columns=columns)
    return ds


def command() -> str:
    """What was typed, without the places on this machine."""
    return typed_command("recipes/age.py", PLACES)


if __name__ == "__main__":
    run(main, Settings)
