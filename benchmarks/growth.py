"""How costs grow: with samples N, bins B, features D, prototypes m, ranks, rows of scores and labels, a picture each.

    python benchmarks/growth.py
    python benchmarks/growth.py rows labels

Draws into ``runs/benchmarks``, all pictures or those that are named. Times are medians on the machine it runs on, so
only their slopes carry over. Takes about four minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dask.array
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.ticker import LogLocator
from timing import Report, medians

import dir_toolkit as dt

FORMS = ("diagonal", "full", "low_rank")
N, B, D = 256, 100, 256
HELD_BINS, ROWS = 50, (1_000, 10_000, 50_000)
UNLABELLED, LABELLED = (1000, 10_000, 1_000_000), 5000
LABELS, CHUNK = (100_000, 1_000_000, 10_000_000), 250_000
OUT = Path("runs/benchmarks")
Curves = dict[str, tuple[Sequence[int], list[float]]]


def fds(num_bins: int = B, num_features: int = D, form: Any = "diagonal") -> dt.FDS:
    """With statistics of two epochs, so that it calibrates."""
    smoothing = dt.FDS(dt.Bins.uniform(0, num_bins, width=1), num_features, covariance=form)
    every_bin = torch.arange(num_bins).repeat_interleave(20)
    for _ in range(2):
        smoothing.update(torch.randn(len(every_bin), num_features), every_bin)
        smoothing.end_epoch()
    return smoothing


def step(smoothing: dt.FDS, num_samples: int = N) -> Callable[[], object]:
    """A batch gathered and calibrated; 16 of them, since full covariances take batches in together."""
    features = torch.randn(num_samples, smoothing.num_features)
    labels = torch.randint(0, len(smoothing.bins), (num_samples,))

    def run() -> None:
        for _ in range(16):
            smoothing.update(features, labels)
            smoothing.calibrate(features, labels)
        smoothing._moments.all_reduce()  # takes in what is held

    return run


def timed(runs: dict[str, Callable[[], object]], parts: int, repeats: int = 7, warmup: int = 3) -> dict[str, float]:
    """Seconds of one of the equal parts that each run has."""
    return {name: value / parts for name, value in medians(runs, repeats=repeats, warmup=warmup).items()}


def with_samples() -> Curves:
    sizes = (64, 256, 1024, 4096)
    kept = {form: fds(form=form) for form in FORMS}
    return {form: (sizes, [timed({"": step(kept[form], n)}, 16)[""] for n in sizes]) for form in FORMS}


def with_bins() -> Curves:
    sizes = (10, 30, 100, 300)
    return {form: (sizes, [timed({"": step(fds(num_bins=b, form=form))}, 16)[""] for b in sizes]) for form in FORMS}


def with_features() -> Curves:
    sizes = {"diagonal": (64, 128, 256, 512, 1024, 2048), "full": (64, 128, 256, 512), "low_rank": (64, 128, 256, 512)}
    return {
        form: (sizes[form], [timed({"": step(fds(num_features=d, form=form))}, 16)[""] for d in sizes[form]])
        for form in FORMS
    }


def with_prototypes() -> Curves:
    sizes = (1, 2, 5, 10, 20)
    features = torch.randn(N, D)

    def run(head: torch.nn.Module) -> None:
        head(features).sum().backward()

    seconds = [timed({"": partial(run, dt.AffinityHead(D, B, m))}, 1)[""] for m in sizes]
    return {f"affinity head, {B} classes": (sizes, seconds)}


def with_ranks() -> Curves:
    sizes = (1, 2, 4)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for world in sizes:
        with tempfile.TemporaryDirectory() as folder:
            if world == 1:
                end_epochs(0, 1, folder)
            else:
                mp.spawn(end_epochs, (world, folder), nprocs=world)
            for form, value in torch.load(Path(folder) / "seconds.pt", weights_only=True).items():
                seconds[form].append(value)
    return {form: (sizes, seconds[form]) for form in FORMS}


def end_epochs(rank: int, world: int, folder: str) -> None:
    """One rank: the median time of the end of an epoch."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    out = {}
    for form in FORMS:
        smoothing = fds(form=form)
        features, labels = torch.randn(N, D), torch.randint(0, B, (N,))
        taken = []
        for _ in range(5):
            smoothing.update(features, labels)
            start = time.perf_counter()
            smoothing.end_epoch()
            taken.append(time.perf_counter() - start)
        out[form] = sorted(taken)[2]
    if rank == 0:
        torch.save(out, Path(folder) / "seconds.pt")
    if world > 1:
        dist.destroy_process_group()


def with_rows() -> Curves:
    """What is fitted and read after training, on scores of ``HELD_BINS`` bins, each by a fresh object."""
    bins = dt.Bins.uniform(0, HELD_BINS, width=1)
    density = dt.LabelDensity(bins, (10_000 * 0.9 ** torch.arange(HELD_BINS)).round().long())
    seconds: dict[str, list[float]] = {}
    for n in ROWS:
        scores, labels = forecasts(density, n)
        shifted, _ = forecasts(dt.LabelDensity(bins, [1] * HELD_BINS), n)
        for name, value in timed(
            after_training(bins, density, scores, labels, shifted), 1, repeats=3, warmup=1
        ).items():
            seconds.setdefault(name, []).append(value)
    curves: Curves = {name: (ROWS, values) for name, values in seconds.items()}
    scores, labels = forecasts(density, LABELLED)
    priors: list[float] = []
    for n in UNLABELLED:
        shifted, _ = forecasts(dt.LabelDensity(bins, [1] * HELD_BINS), n)
        estimate = partial(dt.estimate_prior, shifted, source=scores, labels=labels, bins=bins)
        priors += timed({"estimate": estimate}, 1, repeats=1, warmup=0).values()
    return curves | {f"estimate_prior, {LABELLED:,} labelled rows": (UNLABELLED, priors)}


def forecasts(density: dt.LabelDensity, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a model that is off by two bins, and labels, drawn from a density."""
    labels = torch.multinomial(torch.from_numpy(density.prior()), n, replacement=True) + torch.rand(n)
    seen = labels + 2 * torch.randn(n)
    return -(seen[:, None] - torch.tensor(density.bins.centers, dtype=torch.float32)).square() / 8, labels


def after_training(
    bins: dt.Bins, density: dt.LabelDensity, scores: torch.Tensor, labels: torch.Tensor, shifted: torch.Tensor
) -> dict[str, Callable[[], object]]:
    model = dt.LongTailModel(torch.nn.Identity(), 8, bins, density=density)
    shares = scores.softmax(1)
    fitted = dt.conformal.BinsConformal(density)
    fitted.update(shares, labels)

    def intervals() -> object:
        conformal = dt.conformal.BinsConformal(density)
        conformal.update(shares, labels)
        return conformal.thresholds()

    return {
        "calibrate: temperature and tau": lambda: model.calibrate(scores, labels, most_mae=None, bias=False),
        "calibrate with biases": lambda: model.calibrate(scores, labels, most_mae=None, bias=True),
        "estimate_prior": lambda: dt.estimate_prior(shifted, source=scores, labels=labels, bins=bins),
        "BinsConformal: update and thresholds": intervals,
        "BinsConformal.interval": lambda: fitted.interval(shares),
    }


def with_labels() -> Curves:
    """Labels counted and weighed in one array, and in dask in chunks of ``CHUNK``, of which none is kept."""
    bins = dt.Bins.uniform(0, 121, width=1)
    lds = dt.LDS(bins).fit(dt.LabelDensity(bins, [10] * 121))
    seconds: dict[str, list[float]] = {}
    for n in LABELS:
        labels = np.random.default_rng(0).gamma(4, 8, n).clip(0, 121).astype(np.float32)
        lazy = dask.array.from_array(labels, chunks=CHUNK)
        runs: dict[str, Callable[[], object]] = {
            "LabelDensity.count": partial(dt.LabelDensity.count, labels, bins),
            "LabelDensity.count, dask": partial(dt.LabelDensity.count, lazy, bins),
            "LDS.sample_weight": partial(lds.sample_weight, labels),
            "LDS.sample_weight, dask": lambda lazy=lazy: lds.sample_weight(lazy).sum().compute(),  # type: ignore[misc]
        }
        for name, value in timed(runs, 1, repeats=3, warmup=1).items():
            seconds.setdefault(name, []).append(value)
    return {name: (LABELS, values) for name, values in seconds.items()}


def draw(curves: Curves, what: str, x: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name, (sizes, seconds) in curves.items():
        axes.plot(sizes, [1e3 * s for s in seconds], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel="ms", title=what)
    axes.set_xticks(sorted({size for sizes, _ in curves.values() for size in sizes}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if len(curves) > 3:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    else:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


PICTURES: dict[str, tuple[Callable[[], Curves], str, str]] = {
    "samples": (with_samples, f"FDS step, {B} bins of {D} features", "samples in the batch, N"),
    "bins": (with_bins, f"FDS step, {N} samples of {D} features", "bins, B"),
    "features": (with_features, f"FDS step, {N} samples, {B} bins", "features, D"),
    "prototypes": (with_prototypes, f"forward and backward, {N} samples", "prototypes a class, m"),
    "ranks": (with_ranks, f"end of an epoch with FDS, {B} bins of {D} features", "processes on this machine"),
    "rows": (with_rows, f"after training, {HELD_BINS} bins", "rows of scores, N"),
    "labels": (with_labels, f"labels counted and weighed, chunks of {CHUNK:,}", "labels, N"),
}


def main(report: Report, names: Sequence[str] = tuple(PICTURES)) -> None:
    warnings.simplefilter("ignore", dt.DirToolkitWarning)  # that batches repeat and no epoch ends
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names:
        measure, what, x = PICTURES[name]
        curves = measure()
        draw(curves, what, x, OUT / f"growth-{name}.png")
        for label, (sizes, seconds) in curves.items():
            detail = ", ".join(f"{size}: {1e3 * s:.3g} ms" for size, s in zip(sizes, seconds, strict=True))
            grown = seconds[-1] / seconds[0]
            report.add(f"{what}, {label}: {x} {sizes[-1]} / {sizes[0]}", grown, "", detail)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    main(Report(), parser.parse_args().names or tuple(PICTURES))
