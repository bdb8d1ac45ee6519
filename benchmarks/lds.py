"""What LDS costs, as ratios within one run.

    python benchmarks/lds.py

Prints weights for a million labels against a Python loop over them, as the public DIR code does it. Takes seconds.
"""

from __future__ import annotations

import numpy as np
import torch
from timing import line, medians

import dir_toolkit as dt

NUM_LABELS, NUM_BINS = 1_000_000, 121


def weights_by_loop(labels: np.ndarray) -> list[float]:
    """A dictionary of counts and a list of weights, one label at a time; no smoothing, which both do equally fast."""
    counts: dict[int, float] = dict.fromkeys(range(NUM_BINS), 0)
    for label in labels:
        counts[min(NUM_BINS - 1, int(label))] += 1
    roots = {b: np.sqrt(n) for b, n in counts.items()}
    weights = [1 / roots[min(NUM_BINS - 1, int(label))] for label in labels]
    scale = len(weights) / np.sum(weights)
    return [scale * w for w in weights]


def main() -> None:
    labels = np.random.default_rng(0).gamma(4, 8, NUM_LABELS).clip(0, NUM_BINS).astype(np.float32)
    bins = dt.Bins.uniform(0, NUM_BINS, width=1)
    tensor = torch.from_numpy(labels)
    ours = dt.LDS(bins, kernel=None).fit(labels).sample_weight(labels)
    np.testing.assert_allclose(ours, weights_by_loop(labels), rtol=1e-5)
    times = medians(
        {
            "loop": lambda: weights_by_loop(labels),
            "fit and weigh": lambda: dt.LDS(bins).fit(tensor)(tensor),
        },
        repeats=5,
        warmup=1,
    )
    ratio = times["loop"] / times["fit and weigh"]
    print(f"numpy {np.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, cpu")
    print(line(f"loop over labels / LDS, {NUM_LABELS:,} labels", ratio, ">= 100", times))


if __name__ == "__main__":
    main()
