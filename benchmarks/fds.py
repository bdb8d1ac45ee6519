"""What FDS costs, as ratios within one run.

    python benchmarks/fds.py

Prints calibration against a loop over labels, as the public DIR code does it, and against one multiply-add on as many
numbers; and a training epoch with FDS against the same epoch without. Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import statistics
import time

import torch
from timing import line, medians
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.backbones import ImageRegressor, small_resnet

BATCH, NUM_BINS = 256, 100


def calibrate_by_loop(features: Tensor, labels: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    """One masked read and one masked write a label, the way the public code works (on a copy, to be fair to both)."""
    features = features.clone()
    for label in torch.unique(labels):
        here = labels == label
        b = int(label)
        ratio = (statistics["smoothed_variance"][b] / statistics["variance"][b]).clamp(0.1, 10)
        features[here] = (features[here] - statistics["mean"][b]) * ratio.sqrt() + statistics["smoothed_mean"][b]
    return features


def calibration(num_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bins = dt.Bins.classes(NUM_BINS)
    fds = dt.FDS.reference(bins, num_features)
    fds.update(
        torch.randn(50 * NUM_BINS, num_features, generator=generator), torch.arange(NUM_BINS).repeat_interleave(50)
    )
    fds.end_epoch()
    features = torch.randn(BATCH, num_features, generator=generator)
    labels = torch.randint(0, NUM_BINS, (BATCH,), generator=generator)
    floats = {name: value.float() for name, value in fds.statistics().items()}
    torch.testing.assert_close(
        fds.calibrate(features, labels), calibrate_by_loop(features, labels, floats), rtol=1e-4, atol=1e-5
    )
    scale, shift = torch.rand(BATCH, num_features), torch.rand(BATCH, num_features)
    layer = torch.nn.Identity().train()
    fds.attach(layer, "input")
    plain = torch.nn.Identity().train()

    def placed() -> Tensor:
        with fds.labels(labels):
            return layer(features)

    with fds.labels(labels):
        row = fds._row
    assert row is not None
    times = medians(
        {
            "loop": lambda: calibrate_by_loop(features, labels, floats),
            "calibrate": lambda: fds._calibrate(features, row),
            "with labels placed": lambda: fds.calibrate(features, labels),
            "multiply-add": lambda: torch.addcmul(shift, features, scale),
        },
        repeats=300,
    )
    where = f"{BATCH} x {num_features}, {NUM_BINS} bins"
    print(line(f"loop over labels / calibrate, {where}", times["loop"] / times["calibrate"], ">= 50", times))
    print(line(f"calibrate / multiply-add, {where}", times["calibrate"] / times["multiply-add"], "<= 3", times))
    step = medians({"hooked": placed, "plain": lambda: plain(features)}, repeats=300)
    print(f"{'  the whole hook: labels placed, gathered, calibrated':<58} {1e3 * step['hooked']:8.3f} ms a batch")


def epoch(num_images: int = 2560, size: int = 48, batch: int = 128, pairs: int = 9) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    labels = torch.randint(0, NUM_BINS, (num_images,), generator=generator).float()
    bins = dt.Bins.uniform(0, NUM_BINS, width=1)

    def run(with_fds: bool) -> float:
        torch.manual_seed(0)
        backbone = small_resnet()
        model = ImageRegressor(backbone).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        fds = dt.FDS(bins, backbone.num_features) if with_fds else None
        if fds is not None:
            fds.attach(model.head, "input")
        for number in range(2):  # the first epoch only gathers; the second, which is timed, calibrates as well
            start = time.perf_counter()
            for at in range(0, num_images, batch):
                x, y = images[at : at + batch], labels[at : at + batch]
                if fds is None:
                    loss = dt.weighted_l1(model(x), y)
                else:
                    with fds.labels(y):
                        loss = dt.weighted_l1(model(x), y)
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
    times = {"with": statistics.median(with_fds), "without": statistics.median(without)}
    what = f"epoch with / without FDS, {num_images} images of {size} px"
    print(line(what, times["with"] / times["without"], "<= 1.03", times))
    print(f"  pair by pair: {min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {'cpu'}")
    calibration(512)
    calibration(2048)
    epoch()
