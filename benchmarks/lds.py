"""What LDS costs, as ratios within one run.

    python benchmarks/lds.py

Prints weights for a million labels against a Python loop over them, as the public DIR code does it. Takes seconds.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import convolve1d
from timing import Report, medians, milliseconds

import dir_toolkit as dt

NUM_LABELS, NUM_BINS = 1_000_000, 121


def weights_by_loop(labels: np.ndarray) -> list[float]:
    """The public code's way: a dictionary of counts, then lists with one entry per label."""
    last = NUM_BINS - 1
    counts: dict[int, float] = dict.fromkeys(range(NUM_BINS), 0)
    for label in labels:
        counts[min(last, int(label))] += 1
    roots = {b: np.sqrt(n) for b, n in counts.items()}
    density = [roots[min(last, int(label))] for label in labels]
    smoothed = convolve1d(np.asarray(list(roots.values())), weights=dt.gaussian(5, 2, folded=True), mode="constant")
    density = [smoothed[min(last, int(label))] for label in labels]
    weights = [np.float32(1 / x) for x in density]
    scale = len(weights) / np.sum(weights)
    return [scale * w for w in weights]


def main(report: Report) -> None:
    labels = np.random.default_rng(0).gamma(4, 8, NUM_LABELS).clip(0, NUM_BINS).astype(np.float32)
    bins = dt.Bins.uniform(0, NUM_BINS, width=1)
    tensor = torch.from_numpy(labels)
    ours = dt.LDS.reference(bins).fit(labels).sample_weight(labels)
    np.testing.assert_allclose(ours, weights_by_loop(labels), rtol=1e-5)
    times = medians(
        {"loop": lambda: weights_by_loop(labels), "LDS": lambda: dt.LDS.reference(bins).fit(tensor)(tensor)},
        repeats=9,
        warmup=2,
    )
    what = f"loop over labels / LDS fit and weigh, {NUM_LABELS:,} labels"
    report.add(what, times["loop"] / times["LDS"], ">= 100", milliseconds(times))


if __name__ == "__main__":
    main(Report())
