"""What FDS costs, as ratios within one run.

    python benchmarks/fds.py

Prints calibration against a loop over labels, as the public DIR code does it, and against one multiply-add on as many
numbers; and a training epoch with FDS against the same epoch without. Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from timing import line, medians
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.backbones import small_resnet

BATCH, NUM_BINS = 256, 100


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


def calibration(num_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bins = dt.Bins.classes(NUM_BINS)
    fds = dt.FDS.reference(bins, num_features)
    every_bin = torch.arange(NUM_BINS).repeat_interleave(50)
    fds.update(torch.randn(len(every_bin), num_features, generator=generator), every_bin)
    fds.end_epoch()
    features = torch.randn(BATCH, num_features, generator=generator)
    labels = torch.randint(0, NUM_BINS, (BATCH,), generator=generator)
    floats = {name: value.float() for name, value in fds.statistics().items()}
    by_loop = calibrate_by_loop(features.clone(), labels, floats)
    torch.testing.assert_close(fds.calibrate(features, labels), by_loop, rtol=1e-4, atol=1e-5)

    row = bins.index(labels)
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
    print(line(f"loop over labels / calibrate, {where}", times["loop"] / times["calibrate"], ">= 50"))
    print(line(f"calibrate / multiply-add, {where}", times["calibrate"] / times["multiply-add"], "<= 3"))
    print(line(f"loop over labels / whole hook, {where}", times["loop"] / times["hook"]))
    print("  " + ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in times.items()))
    print("  (the hook also places the labels and gathers the statistics, for which the loop needs a second pass)")


def epoch(num_images: int = 2560, size: int = 48, batch: int = 128, pairs: int = 15) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    labels = torch.randint(0, NUM_BINS, (num_images,), generator=generator).float()
    bins = dt.Bins.uniform(0, NUM_BINS, width=1)

    def run(with_fds: bool) -> float:
        torch.manual_seed(0)
        backbone = small_resnet()
        fds = dt.FDS(bins, backbone.num_features) if with_fds else None
        model = dt.LongTailModel(backbone, backbone.num_features, bins, head="regression", fds=fds).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for number in range(2):  # the first epoch only gathers; the second, which is timed, calibrates as well
            start = time.perf_counter()
            for at in range(0, num_images, batch):
                x, y = images[at : at + batch], labels[at : at + batch]
                loss = model(x, y).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if fds is not None:
                fds.end_epoch()
            if number == 0:
                continue
            return time.perf_counter() - start
        raise AssertionError

    run(True)
    with_fds: list[float] = []
    without: list[float] = []
    for turn in range(pairs):  # the order alternates: neither always runs first
        for flag in (True, False) if turn % 2 else (False, True):
            (with_fds if flag else without).append(run(flag))
    ratios = [a / b for a, b in zip(with_fds, without, strict=True)]
    what = f"epoch with / without FDS, {num_images} images of {size} px"
    print(line(what, statistics.median(ratios), "<= 1.03"))
    print(f"  median of {pairs} pairs, which lie between {min(ratios):.3f} and {max(ratios):.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("ignore", dt.DirToolkitWarning)  # that batches repeat and no epoch ends
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, cpu")
    calibration(512)
    calibration(2048)
    epoch()
