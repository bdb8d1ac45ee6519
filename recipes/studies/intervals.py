"""Whether 90 % intervals hold 90 % of the rare labels: calibrated for all labels at once, and region by region.

    python recipes/studies/intervals.py --root DIR                          # eight sets, 5 seeds, 1 thread
    python recipes/studies/intervals.py --root DIR --sets abalone --seeds 1

DIR holds the sets, and ``forecasts.py`` tells how each is trained on. The rows that the network has not seen are halved
into rows to calibrate and rows to test 5 times, and numbers are means over these halvings. Rows from elsewhere are all
tested, where calibration data are not drawn as new data are. There "rolling" calibrates anew each day, in the order of
time, on the labels of as many hours as the held-out rows had at first. Regions are those of the training density, with
bins without a training label among the few. Coverage is that of the prediction sets, and widths are those of their
hulls, the intervals, which end with the axis. ``OUT/rows.csv`` has a row per set, halving, method and region,
``OUT/tables.md`` has tables, and ``OUT/intervals.png`` a picture.
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
        "house16H", "abalone", "appliances", "rain", "beijing", "beijing_time", "utkface", "sts_b",
    )  # fmt: skip
    """Any of these and emobank."""
    seeds: int = 5
    """Seeds 0, 1, ... decide which rows train, and what a method draws."""
    rows: int = 3000
    """Most rows of a table to train on."""
    forecasts: Path = Path("runs/forecasts")
    """Folder of the forecasts, which both studies share."""
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

LEVEL, HALVINGS, DAY = 0.9, 5, 24  # rows of an hour each
REGIONS = ("many", "medium", "few")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "network, one threshold": ("network", {"per_region": 0.0, "gamma": 0.0}),
    "network, per region": ("network", {}),
    "boosting, one threshold": ("boosting", {"per_region": 0.0}),
    "boosting, per region": ("boosting", {}),
    "network, one threshold, p/prior^.5": ("network", {"per_region": 0.0}),
    "network, half way": ("network", {"per_region": 0.5}),
}
"""By name: what is calibrated, and with which options. Besides, "network, own" is the central interval of the
network's distribution."""
SHOWN = {
    "network, one threshold": "C1o", "network, per region": "C0o",
    "boosting, one threshold": "C1^", "boosting, per region": "C0^",
}  # fmt: skip
"""The methods in the picture and in the first columns of the tables, and their marks."""
ROLLING = ", rolling"


def judge(name: str, seed: int, said: Forecasts) -> Iterator[dict[str, Any]]:
    """What each method covers in each region by its sets and by their hulls, and how wide both are."""
    rng, density, bins = np.random.default_rng(seed), said.density, said.bins
    regions = np.where(density.counts > 0, density.regions(), "few")
    known = [name for name, (kind, _) in METHODS.items() if kind == "network" or not np.isnan(said.held.boosted).any()]

    def calibrated(method: str, part: Part, new: Part) -> tuple[np.ndarray, ...]:
        """The ends of the intervals of new rows, whether the sets hold their labels, and the lengths of the sets."""
        kind, options = METHODS[method]
        calibration: Any
        if kind == "boosting":
            calibration, read = PointConformal(density, regions=regions, **options), lambda part: part.boosted
        else:
            calibration, read = BinsConformal(density, regions=regions, prior=said.prior, **options), shares
        calibration.update(read(part), part.labels)
        return *calibration.interval(read(new), LEVEL), *sets(calibration, read(new), new.labels)

    def by_region(name: str, method: str, y: np.ndarray, *numbers: Any) -> Iterator[dict[str, Any]]:
        lower, upper, held, length = map(np.asarray, numbers)
        width = np.clip(upper, None, bins.edges[-1]) - np.clip(lower, bins.edges[0], None)
        columns = {"held": held, "length": length, "covered": (lower <= y) & (y <= upper), "width": width}
        for region in ("all", *REGIONS):
            own = (regions[bins.index(y, "clip")] == region) | (region == "all")
            row = {"set": name, "seed": seed, "method": method, "region": region, "rows": own.sum()}
            yield row | {key: value[own].mean() if own.any() else np.nan for key, value in columns.items()}

    for _ in range(HALVINGS):
        own, rest = halved(said.held, rng)
        for test, new in (said.elsewhere or {name: rest}).items():
            lower, upper = map(np.asarray, dt.interval(torch.from_numpy(shares(new)), bins, LEVEL, ends=said.ends))
            held, length = (lower <= new.labels) & (new.labels <= upper), upper - lower
            yield from by_region(test, "network, own", new.labels, lower, upper, held, length)
            for method in known:
                yield from by_region(test, method, new.labels, *calibrated(method, own, new))
    for test, new in said.elsewhere.items():
        both, first = Part(*map(np.concatenate, zip(said.held, new, strict=True))), len(said.held.labels)
        for method in SHOWN:
            days = [
                calibrated(
                    method, between(both, start, first + start), between(both, first + start, first + start + DAY)
                )
                for start in range(0, len(new.labels), DAY)
            ]
            yield from by_region(test + ROLLING, method, new.labels, *map(np.concatenate, zip(*days, strict=True)))


def between(part: Part, first: int, last: int) -> Part:
    return Part(*(values[first:last] for values in part))


def shares(part: Part) -> np.ndarray:
    return softmax(part.scores.astype(float), axis=1)


def sets(calibration: Any, output: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each set holds its label, and how long its parts are together."""
    bins, row = calibration.bins, calibration.bins.index(y, "clip")
    if isinstance(calibration, BinsConformal):
        inside = calibration.sets(output, LEVEL)
        return inside[np.arange(len(y)), row], inside @ np.diff(bins.edges)
    reach = -calibration.thresholds(LEVEL)
    parts = np.minimum(output[:, None] + reach, bins.edges[1:]) - np.maximum(output[:, None] - reach, bins.edges[:-1])
    return np.abs(y - output) <= reach[row], parts.clip(min=0).sum(1)


def tables(rows: pd.DataFrame) -> str:
    """Coverage by region in %, and the lengths of sets and widths of intervals over all labels: means and standard
    deviations over seeds."""
    methods = [*SHOWN, *(method for method in dict.fromkeys(rows.method) if method not in SHOWN)]
    by_seed = rows.groupby(["set", "method", "region", "seed"], sort=False).mean()
    mean, spread = (getattr(by_seed.groupby(level=[0, 1, 2], sort=False), kind)() for kind in ("mean", "std"))
    coverage, widths = [], []
    for name in dict.fromkeys(rows.set):
        title = name.replace("_", " ")
        counts = mean.rows[name, methods[0]].round()
        cells = [f"{title}: {' / '.join(f'{counts[region]:,.0f}' for region in REGIONS)}"]
        sizes = [title]
        for method in methods:
            if (name, method) not in mean.index:
                cells.append("")
                sizes.append("")
                continue
            of_method, error = mean.loc[name, method], 100 * spread.held[name, method]
            shares = [f"{100 * of_method.held[region]:.0f} ± {error[region]:.0f}" for region in REGIONS]
            cells.append(" / ".join(shares))
            whole = of_method.loc["all"]
            sizes.append(f"{whole.length:.3g}; {whole.width:.3g}; {100 * whole.covered:.0f}")
        coverage.append(cells)
        widths.append(sizes)
    return markdown(["set: test rows many / medium / few", *methods], coverage) + markdown(["set", *methods], widths)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n\n"


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Coverage of the sets by region, with the standard deviation over seeds, and widths of the intervals beside those
    of one threshold of the network."""
    names = list(dict.fromkeys(rows.set))
    mean = rows.groupby(["set", "method", "region", "seed"], sort=False).mean()
    figure = Figure(figsize=(11, 1.4 + 0.38 * len(names)))
    panels = figure.subplots(1, 4, sharey=True)
    for i, (method, mark) in enumerate(SHOWN.items()):
        for place, name in enumerate(names):
            if (name, method) not in mean.index:
                continue
            of_set, height = mean.loc[name], place + 0.12 * (i - 1.5)
            base = of_set.loc[(next(iter(SHOWN)), "all")].width.mean()
            numbers = [100 * of_set.loc[(method, region)].held for region in REGIONS]
            for panel, values in zip(panels, [*numbers, of_set.loc[(method, "all")].width / base], strict=True):
                label = method if place == 0 else None
                panel.errorbar(
                    values.mean(), height, xerr=values.std(), fmt=mark, markersize=4, linewidth=1, label=label
                )
    for panel, title in zip(panels, [*(f"{region}: labels held, %" for region in REGIONS), "width"], strict=True):
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    for panel in panels[:3]:
        panel.axvspan(88, 92, color="0.85", zorder=0)
    panels[3].set_title("width / network, one threshold", fontsize=10)
    panels[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(SHOWN), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=100)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in settings.sets:
        for seed in range(settings.seeds):
            rows += judge(name, seed, forecasts(settings.forecasts, settings.root, name, seed, settings.rows))
            pd.DataFrame(rows).to_csv(settings.out / "rows.csv", index=False)
            print(f"{name}, seed {seed}", flush=True)
    picture(pd.DataFrame(rows), settings.out / "intervals.png")
    (settings.out / "tables.md").write_text(tables(pd.DataFrame(rows)), encoding="utf-8")
    print(tables(pd.DataFrame(rows)))


if __name__ == "__main__":
    run(main, SETTINGS)
