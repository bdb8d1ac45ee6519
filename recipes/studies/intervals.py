"""Whether 90 % intervals hold 90 % of the rare labels: calibrated for all labels at once, and region by region.

    python recipes/studies/intervals.py --root DIR                          # seven sets, 5 seeds, 1 thread
    python recipes/studies/intervals.py --root DIR --sets abalone --seeds 1

DIR holds ``tables/`` and ``series/``: the tables of ``data_cards/tables.md`` and the series of
``data_cards/beijing.md``. A seed draws the rows to train on, at most ``--rows`` and half of all. The other rows are
halved into rows to calibrate and rows to test 20 times, and numbers are means over these halvings. ``beijing_time``
trains and calibrates on earlier years and tests on the last one, as ``beijing_year``, and on that of another station,
as ``beijing_station``; the other sets are exchangeable. Regions are those of the training density, with bins without a
training label among the few. Widths end with the axis. ``OUT/rows.csv`` has a row per set, halving, method and region.
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
    """Folder of ``tables`` and ``series``."""
    sets: tuple[str, ...] = ("house16H", "abalone", "appliances", "rain", "beijing", "beijing_time")
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
from matplotlib.figure import Figure
from sklearn.ensemble import HistGradientBoostingRegressor
from tables import read

import dir_toolkit as dt
from dir_toolkit.conformal import BinsConformal, PointConformal
from dir_toolkit.experiment.data.series import beijing
from dir_toolkit.integrations.scikit_learn import LongTailRegressor

LEVEL, HALVINGS = 0.9, 20
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
SHOWN = {"bins, own": "k:s", BASE: "C1-o", "bins, one threshold, p/prior^.5": "C2--v", "bins, per region": "C0-D"}
"""The methods in the picture, and their lines."""
Rows = tuple[np.ndarray, np.ndarray]


def rows_of(root: Path, name: str, rng: np.random.Generator) -> tuple[Rows, Rows, dict[str, Rows]]:
    """The rows to train on, the others, and those to test on where these are from elsewhere."""
    if not name.startswith("beijing"):
        x, y = read(root / "tables", name)
        return *halved((x, np.log1p(y) if name == "appliances" else y), rng), {}
    parts, far = (beijing(root / "series", station, hours=1) for station in ("Aotizhongxin", "Wanshouxigong"))
    train, val, test, other = (
        (part.inputs[part.rows][:, 0], part.labels) for part in (parts.train, parts.val, parts.test, far.test)
    )
    if name == "beijing_time":
        return train, val, {"beijing_year": test, "beijing_station": other}
    return *halved([np.concatenate(part) for part in zip(train, val, test, strict=True)], rng), {}


def halved(rows: Any, rng: np.random.Generator) -> tuple[Rows, Rows]:
    first, second = np.array_split(rng.permutation(len(rows[1])), 2)
    return (rows[0][first], rows[1][first]), (rows[0][second], rows[1][second])


def judge(root: Path, name: str, seed: int, most: int) -> Iterator[dict[str, Any]]:
    """What each method covers in each region by its sets and by their hulls, and how wide both are."""
    rng = np.random.default_rng(seed)
    (x, y), others, elsewhere = rows_of(root, name, rng)
    chosen = rng.permutation(len(y))[:most]
    x, y = x[chosen], y[chosen]
    bins = dt.Bins.auto(y)
    density = dt.LabelDensity.count(y, bins)
    regions = np.where(density.counts > 0, density.regions(), "few")
    trees = HistGradientBoostingRegressor(random_state=seed).fit(x, y)
    network: Any = LongTailRegressor(bins=bins, head="linear", tau=0.0, random_state=seed).fit(x, y)

    def forecasts(rows: Rows) -> tuple[dict[str, np.ndarray], np.ndarray]:
        shares = network._predicted(rows[0], lambda x: network.model_(x).distribution)
        return {"number": trees.predict(rows[0]), "bins": shares}, rows[1]

    def found(name: str, method: str, y: np.ndarray, ends: Any, held: Any, size: Any) -> Iterator[dict[str, Any]]:
        lower, upper = map(np.asarray, ends)
        width = np.clip(upper, None, bins.edges[-1]) - np.clip(lower, bins.edges[0], None)
        numbers = {"held": held, "size": size, "covered": (lower <= y) & (y <= upper), "width": width}
        for region in REGIONS:
            own = (regions[bins.index(y)] == region) | (region == "all")
            row = {"set": name, "seed": seed, "method": method, "region": region, "rows": own.sum()}
            yield row | {key: value[own].mean() for key, value in numbers.items()}

    known, labels = forecasts(others)
    tests = {test: forecasts(rows) for test, rows in elsewhere.items()}
    for _ in range(HALVINGS):
        own, new = np.array_split(rng.permutation(len(labels)), 2)
        for test, (said, y) in (tests or {name: ({k: v[new] for k, v in known.items()}, labels[new])}).items():
            ends = dt.interval(torch.from_numpy(said["bins"]), bins, LEVEL, ends=network.model_.readout.ends)
            yield from found(test, "bins, own", y, ends, np.full(len(y), np.nan), np.full(len(y), np.nan))
            for method, (kind, options) in METHODS.items():
                calibration = {"number": PointConformal, "bins": BinsConformal}[kind](
                    density, regions=regions, **options
                )
                calibration.update(known[kind][own], labels[own])
                yield from found(test, method, y, calibration.interval(said[kind], LEVEL), *sets(calibration, said, y))


def sets(calibration: Any, said: dict[str, np.ndarray], y: np.ndarray) -> Rows:
    """Whether each set holds its label, and how long its parts are together."""
    bins, row = calibration.bins, calibration.bins.index(y)
    if isinstance(calibration, BinsConformal):
        inside = calibration.sets(said["bins"], LEVEL)
        return inside[np.arange(len(y)), row], inside @ np.diff(bins.edges)
    reach, pred = -calibration.thresholds(LEVEL), said["number"]
    parts = np.minimum(pred[:, None] + reach, bins.edges[1:]) - np.maximum(pred[:, None] - reach, bins.edges[:-1])
    return np.abs(y - pred) <= reach[row], parts.clip(min=0).sum(1)


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
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(SHOWN), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=100)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in settings.sets:
        for seed in range(settings.seeds):
            rows += judge(settings.root, name, seed, settings.rows)
            pd.DataFrame(rows).to_csv(settings.out / "rows.csv", index=False)
            print(f"{name}, seed {seed}", flush=True)
    picture(pd.DataFrame(rows), settings.out / "intervals.png")
    print(summary(pd.DataFrame(rows)))


if __name__ == "__main__":
    run(main, SETTINGS)
