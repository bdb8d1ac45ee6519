"""What FDS costs, as ratios within one run.

    python benchmarks/fds.py

Prints calibration against a loop over labels, as the public DIR code does it, and against one multiply-add on as many
numbers; full and low-rank covariances against diagonal ones; and a training epoch with FDS, of each form and compiled,
against the same epoch without. Takes about four minutes on two CPU cores.
"""

from __future__ import annotations

import statistics
import time
import warnings
from functools import partial
from typing import Any

import torch
from timing import Report, medians, milliseconds
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.backbones import small_resnet

BATCH, NUM_BINS = 256, 100
BINS = dt.Bins.classes(NUM_BINS)


def calibrate_by_loop(features: Tensor, labels: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """Label by label, with the steps that the public code takes for each: is it on the axis, is it the first or the
    last, a mask to read and a mask to write, are there statistics, is a variance zero, then the map of equation 2."""
    first, last = 0, NUM_BINS - 1
    for label in torch.unique(labels):
        if label > last or label < first:
            continue
        if label == first:
            rows = features[labels <= label]
        elif label == last:
            rows = features[labels >= label]
        else:
            rows = features[labels == label]
        mean, variance = tables["mean"][int(label - first)], tables["variance"][int(label - first)]
        new_mean = tables["smoothed_mean"][int(label - first)]
        new_variance = tables["smoothed_variance"][int(label - first)]
        if torch.sum(variance) >= 1e-10 and not (variance == 0).any():
            rows = (rows - mean) * torch.sqrt(torch.clamp(new_variance / variance, 0.1, 10)) + new_mean
        if label == first:
            features[labels <= label] = rows
        elif label == last:
            features[labels >= label] = rows
        else:
            features[labels == label] = rows
    return features


def calibrating(num_features: int, generator: torch.Generator, **settings: Any) -> dt.FDS:
    """FDS with the settings of the public code, two epochs of all bins behind it."""
    fds = dt.FDS(BINS, num_features, kernel=dt.gaussian(5, 2, folded=True), edges="mirror", outside="clip", **settings)
    every_bin = torch.arange(NUM_BINS).repeat_interleave(50)
    for _ in range(2):
        fds.update(torch.randn(len(every_bin), num_features, generator=generator), every_bin)
        fds.end_epoch()
    return fds


def calibration(report: Report, num_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fds = calibrating(num_features, generator)
    features = torch.randn(BATCH, num_features, generator=generator)
    labels = torch.randint(0, NUM_BINS, (BATCH,), generator=generator)
    floats = {name: value.float() for name, value in fds.statistics().items()}
    by_loop = calibrate_by_loop(features.clone(), labels, floats)
    torch.testing.assert_close(fds.calibrate(features, labels), by_loop, rtol=1e-4, atol=1e-5)

    row = BINS.index(labels)
    scratch = features.clone()
    scale, shift = torch.rand(BATCH, num_features), torch.rand(BATCH, num_features)
    layer = torch.nn.Identity()
    fds.attach(layer, "input")

    def hook() -> Tensor:
        with fds.labels(labels):
            return layer(features)

    times = medians(
        {
            "loop": lambda: calibrate_by_loop(scratch, labels, floats),
            "calibrate": lambda: fds._calibrate(features, row),
            "multiply-add": lambda: torch.addcmul(shift, features, scale),
            "hook": hook,
        },
        repeats=300,
    )
    where = f"{BATCH} x {num_features}, {NUM_BINS} bins"
    report.add(f"loop over labels / FDS calibration, {where}", times["loop"] / times["calibrate"], ">= 50")
    told = milliseconds(times)
    report.add(f"FDS calibration / multiply-add, {where}", times["calibrate"] / times["multiply-add"], "<= 3", told)
    # The hook also places labels and gathers statistics, for which the loop needs a second pass.
    report.add(f"loop over labels / whole FDS hook, {where}", times["loop"] / times["hook"])


def forms(report: Report, num_features: int = 512) -> None:
    """One step, labels and statistics included, and the end of an epoch."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, num_features, generator=generator)
    labels = torch.randint(0, NUM_BINS, (BATCH,), generator=generator)
    by_form = {form: calibrating(num_features, generator, covariance=form) for form in ("diagonal", "full", "low_rank")}

    def steps_of(fds: dt.FDS) -> None:
        for _ in range(64):  # after which full covariances take in what they hold
            fds.update(features, labels)
            fds.calibrate(features, labels)

    steps = medians({form: partial(steps_of, fds) for form, fds in by_form.items()}, repeats=5, warmup=1)
    ends = {}
    for form, fds in by_form.items():
        start = time.perf_counter()
        fds.end_epoch()
        ends[form] = time.perf_counter() - start
    where = f"{BATCH} x {num_features}, {NUM_BINS} bins"
    for form in ("full", "low_rank"):
        told = f"64 steps: {milliseconds(steps)}; end of an epoch: {milliseconds(ends)}"
        report.add(f"64 FDS steps, {form} / diagonal, {where}", steps[form] / steps["diagonal"], "", told)


def epoch(report: Report, num_images: int = 2560, size: int = 48, batch: int = 128, pairs: int = 7) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    labels = torch.randint(0, NUM_BINS, (num_images,), generator=generator).float()
    bins = dt.Bins.uniform(0, NUM_BINS, width=1)

    def run(form: Any, compiled: bool) -> float:
        torch.manual_seed(0)
        backbone = small_resnet()
        fds = dt.FDS(bins, backbone.num_features, covariance=form) if form else None
        model = dt.LongTailModel(backbone, backbone.num_features, bins, head="regression", fds=fds).train()
        if compiled:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):  # the first epoch compiles and gathers; the third, which is timed, calibrates
            start = time.perf_counter()
            for at in range(0, num_images, batch):
                x, y = images[at : at + batch], labels[at : at + batch]
                loss = model(x, y).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if fds is not None:
                fds.end_epoch()
        return time.perf_counter() - start

    run("diagonal", False)
    where = f"{num_images} images of {size} px"
    for compiled, forms in ((False, ("diagonal", "full", "low_rank")), (True, ("diagonal",))):
        seconds: dict[Any, list[float]] = {form: [] for form in (None, *forms)}
        for turn in range(pairs):  # the order alternates: none always runs first
            for form in list(seconds)[:: 1 if turn % 2 else -1]:
                seconds[form].append(run(form, compiled))
        for form in forms:
            ratios = [a / b for a, b in zip(seconds[form], seconds[None], strict=True)]
            goal = "<= 1.03" if form == "diagonal" else ""
            what = f"epoch with / without FDS, {form}{', compiled' * compiled}, {where}"
            told = f"median of {pairs} pairs, which lie between {min(ratios):.3f} and {max(ratios):.3f}"
            report.add(what, statistics.median(ratios), goal, told)


def main(report: Report) -> None:
    warnings.simplefilter("ignore", dt.DirToolkitWarning)  # that batches repeat and no epoch ends
    calibration(report, 512)
    calibration(report, 2048)
    forms(report)
    epoch(report)


if __name__ == "__main__":
    main(Report())
