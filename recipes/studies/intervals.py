"""Whether 90 % intervals hold 90 % of the rare labels: calibrated for all labels at once, and region by region.

    python recipes/studies/intervals.py --root DIR                          # eight sets, 5 seeds, 1 thread
    python recipes/studies/intervals.py --root DIR --sets abalone --seeds 1

DIR holds the sets, and ``forecasts.py`` tells how each is trained on. The rows that the network has not seen are halved
into rows to calibrate and rows to test 5 times, and numbers are means over these halvings; rows from elsewhere are all
tested, which is where calibration data are not drawn as new data are. There "rolling" calibrates again each month, in
the order of time, on the labels of as many hours as the held-out rows had at first. Regions are those of the training
density, with bins without a training label among the few. Widths end with the axis. ``OUT/rows.csv`` has a row per set,
halving, method and region.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from command_line import parse, run


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the sets."""
    sets: tuple[str, ...] = (
        "house16H", "abalone", "appliances", "rain", "beijing", "beijing_time", "utkface", "emobank",
    )  # fmt: skip
    """Any of these."""
    seeds: int = 5
    """Seeds 0, 1, ... decide which rows train, and what a method draws."""
    rows: int = 3000
    """Most rows to train on."""
    out: Path = Path("runs/intervals")
    """Folder of the results."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import pandas as pd
import torch
from forecasts import Forecasts, Part, forecasts, halved
from matplotlib.figure import Figure
from scipy.special import softmax

import dir_toolkit as dt
from dir_toolkit.conformal import BinsConformal, PointConformal

LEVEL, HALVINGS, MONTH = 0.9, 5, 730  # rows of an hour each
REGIONS = ("all", "many", "medium", "few")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "boosting, one threshold": ("number", {"per_region": 0.0}),
    "boosting, per region": ("number", {}),
    "bins, one threshold": ("bins", {"per_region": 0.0, "gamma": 0.0}),
    "bins, one threshold, p/prior^.5": ("bins", {"per_region": 0.0}),
    "bins, half way": ("bins", {"per_region": 0.5}),
    "bins, per region": ("bins", {}),
}
"""By name: what is calibrated, and how. Besides, "bins, own" is the central interval of the bins' distribution."""
BASE = "bins, one threshold"
SHOWN = {
    "bins, own": "k:s", BASE: "C1-o", "bins, one threshold, p/prior^.5": "C2--v", "bins, per region": "C0-D",
    "bins, per region, rolling": "C3-^",
}  # fmt: skip
"""The methods in the picture, and their lines."""
ROLLING = "bins, per region, rolling"


def judge(name: str, seed: int, said: Forecasts) -> Iterator[dict[str, Any]]:
    """What each method covers in each region by its sets and by their hulls, and how wide both are."""
    rng, density, bins = np.random.default_rng(seed), said.density, said.bins
    regions = np.where(density.counts > 0, density.regions(), "few")

    def fresh(method: str) -> tuple[Any, Any]:
        kind, options = METHODS[method]
        if kind == "number":
            return PointConformal(density, regions=regions, **options), lambda part: part.boosted
        return BinsConformal(density, regions=regions, prior=said.prior, **options), shares

    def found(name: str, method: str, y: np.ndarray, ends: Any, held: Any, size: Any) -> Iterator[dict[str, Any]]:
        lower, upper = map(np.asarray, ends)
        width = np.clip(upper, None, bins.edges[-1]) - np.clip(lower, bins.edges[0], None)
        numbers = {"held": held, "size": size, "covered": (lower <= y) & (y <= upper), "width": width}
        for region in REGIONS:
            own = (regions[bins.index(y, "clip")] == region) | (region == "all")
            row = {"set": name, "seed": seed, "method": method, "region": region, "rows": own.sum()}
            yield row | {key: value[own].mean() if own.any() else np.nan for key, value in numbers.items()}

    known = [method for method, (kind, _) in METHODS.items() if kind == "bins" or not np.isnan(said.held.boosted).any()]
    for _ in range(HALVINGS):
        own, rest = halved(said.held, rng)
        for test, new in (said.elsewhere or {name: rest}).items():
            ends = dt.interval(torch.from_numpy(shares(new)), bins, LEVEL, ends=said.ends)
            yield from found(test, "bins, own", new.labels, ends, *np.full((2, len(new.labels)), np.nan))
            for method in known:
                calibration, read = fresh(method)
                calibration.update(read(own), own.labels)
                yield from found(
                    test, method, new.labels, calibration.interval(read(new), LEVEL),
                    *sets(calibration, read(new), new.labels),
                )  # fmt: skip
    for test, new in said.elsewhere.items():
        both = Part(*map(np.concatenate, zip(said.held, new, strict=True)))
        first, months = len(said.held.labels), []
        for start in range(0, len(new.labels), MONTH):
            calibration, read = fresh("bins, per region")
            past, now = slice(start, first + start), slice(first + start, first + start + MONTH)
            calibration.update(read(both)[past], both.labels[past])
            months.append(
                (*calibration.interval(read(both)[now], LEVEL), *sets(calibration, read(both)[now], both.labels[now]))
            )
        lower, upper, held, size = map(np.concatenate, zip(*months, strict=True))
        yield from found(test, ROLLING, new.labels, (lower, upper), held, size)


def shares(part: Part) -> np.ndarray:
    return softmax(part.scores.astype(float), axis=1)


def sets(calibration: Any, said: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each set holds its label, and how long its parts are together."""
    bins, row = calibration.bins, calibration.bins.index(y, "clip")
    if isinstance(calibration, BinsConformal):
        inside = calibration.sets(said, LEVEL)
        return inside[np.arange(len(y)), row], inside @ np.diff(bins.edges)
    reach = -calibration.thresholds(LEVEL)
    parts = np.minimum(said[:, None] + reach, bins.edges[1:]) - np.maximum(said[:, None] - reach, bins.edges[:-1])
    return np.abs(y - said) <= reach[row], parts.clip(min=0).sum(1)


def summary(rows: pd.DataFrame) -> str:
    """Means over seeds by region: coverage in % with its standard deviation, and widths."""
    numbers = ["held", "covered", "size", "width"]
    by_seed = rows.groupby(["set", "method", "region", "seed"], sort=False)[["rows", *numbers]].mean()
    by_seed[numbers[:2]] *= 100
    mean, spread = (getattr(by_seed.groupby(level=[0, 1, 2], sort=False), what)() for what in ("mean", "std"))
    shown = {name: mean[name].map("{:.3g}".format).unstack()[list(REGIONS)] for name in numbers}
    for name in numbers[:2]:
        shown[name] += " ± " + spread[name].map("{:.1f}".format).unstack()[list(REGIONS)]
    counts = mean.rows.groupby(level=[0, 2], sort=False).first().unstack()[list(REGIONS)].round()
    return f"{pd.concat(shown, axis=1).to_string()}\n\ntest rows\n{counts.to_string()}"


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Coverage of the sets by region, and mean widths of the intervals beside those of one threshold."""
    sets = list(dict.fromkeys(rows.set))
    figure = Figure(figsize=(2 * len(sets), 4.6))
    axes = figure.subplots(2, len(sets), sharex=True, sharey="row", squeeze=False)
    for (above, below), name in zip(axes.T, sets, strict=True):
        mean = rows[rows.set == name].groupby(["method", "region"])[["held", "covered", "width"]].mean()
        base = mean.loc[BASE, "width"].loc[list(REGIONS[1:])]
        for method, look in SHOWN.items():
            if method not in mean.index:
                continue
            of_method = mean.loc[method].loc[list(REGIONS[1:])]
            above.plot(REGIONS[1:], 100 * of_method.held.fillna(of_method.covered), look, label=method, markersize=4)
            below.plot(REGIONS[1:], of_method.width / base, look, markersize=4)
        above.axhspan(88, 92, color="0.9", zorder=0)
        above.set_title(name.replace("_", " "), fontsize=10)
        for panel in (above, below):
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.15)
    axes[0, 0].set_ylabel("labels held, %\n(90 intended)")
    axes[1, 0].set_ylabel("width / that of\none threshold")
    drawn = {label: line for one in axes[0] for line, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="lower center", ncols=len(SHOWN), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=100)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in settings.sets:
        for seed in range(settings.seeds):
            rows += judge(name, seed, forecasts(settings.root, name, seed, settings.rows))
            pd.DataFrame(rows).to_csv(settings.out / "rows.csv", index=False)
            print(f"{name}, seed {seed}", flush=True)
    picture(pd.DataFrame(rows), settings.out / "intervals.png")
    print(summary(pd.DataFrame(rows)))


if __name__ == "__main__":
    run(main, SETTINGS)
