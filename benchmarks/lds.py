"""What LDS costs, as ratios within one run.

    python benchmarks/lds.py

Prints weights for a million labels against a Python loop over them, as the public DIR code does it, and against two
public packages: DenseWeight of its authors, whose kernel density has a bandwidth that LDS is given too, and tsai's LDS.
Each is left out where it is missing: ``pip install denseweight tsai``. Takes seconds, and half a minute with both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.ndimage import convolve1d
from timing import Report, medians, milliseconds
from torch import Tensor

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


def beside_denseweight(report: Report, labels: np.ndarray) -> None:
    """Weights from a density that is smoothed by a Gaussian of Silverman's bandwidth. DenseWeight evaluates it at 4,096
    points, and LDS in bins of a sixteenth, a binary fraction, whose bins need no search."""
    try:
        from denseweight import DenseWeight
    except ImportError:
        return report.leave_out("denseweight")
    bins, tensor = dt.Bins.uniform(0, NUM_BINS, width=1 / 16), torch.from_numpy(labels)

    def ours() -> Tensor:
        bandwidth = 1.06 * float(labels.std()) * len(labels) ** -0.2
        kernel = dt.gaussian(8 * bandwidth, bandwidth, unit="label")
        return dt.LDS(bins, kernel=kernel, scheme="dense", edges="zero", epsilon=1e-6).fit(tensor)(tensor)

    theirs = DenseWeight().fit(labels)
    difference = np.abs(ours().numpy() - theirs).max()
    functions: dict[str, Callable[[], object]] = {"DenseWeight": lambda: DenseWeight().fit(labels), "LDS": ours}
    times = medians(functions, repeats=3, warmup=0)
    detail = f"{milliseconds(times)}; weights up to {theirs.max():.3g} differ by at most {difference:.2g}"
    what = f'fit of DenseWeight / LDS(scheme="dense") fit and weigh, {len(labels):,} labels'
    report.add(what, times["DenseWeight"] / times["LDS"], ">= 1", detail)


def beside_tsai(report: Report, labels: np.ndarray) -> None:
    try:
        from tsai.callback.core import prepare_LDS_weights
    except ImportError:
        return report.leave_out("tsai")
    bins, tensor = dt.Bins.uniform(0, NUM_BINS, width=1), torch.from_numpy(labels)

    def ours() -> Tensor:
        return dt.LDS.reference(bins).fit(tensor)(tensor)

    def theirs() -> Tensor:
        axis: dict[str, Any] = {"n_bins": NUM_BINS, "label_range": (0, NUM_BINS)}
        return prepare_LDS_weights(labels, **axis, reweight="sqrt_inv", lds_ks=5, lds_sigma=2, show_plot=False)

    on_edge = tensor == tensor.round()  # which tsai places in the bin below
    difference = (ours() / theirs() - 1).abs()[~on_edge].max()
    times = medians({"tsai": theirs, "LDS": ours}, repeats=9, warmup=2)
    what = f"prepare_LDS_weights of tsai / LDS fit and weigh, {len(labels):,} labels"
    detail = (
        f"{milliseconds(times)}; weights differ by at most {difference:.2g} of a weight, apart from {on_edge.sum()} "
        "labels on an edge, which tsai places in the bin below"
    )
    report.add(what, times["tsai"] / times["LDS"], ">= 1", detail)


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
    beside_denseweight(report, labels)
    beside_tsai(report, labels)


if __name__ == "__main__":
    main(Report())
