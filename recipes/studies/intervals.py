"""Whether 90 % intervals hold 90 % of the rare labels: calibrated for all labels at once, and region by region.

    python recipes/studies/intervals.py --root DIR                          # eight sets, 5 seeds, 1 thread
    python recipes/studies/intervals.py --root DIR --sets abalone --seeds 1

DIR holds the sets, and ``forecasts.py`` describes the training on each. The rows that the network has not seen are
halved 5 times into rows to calibrate and rows to test, and numbers are means over these halvings. All rows from
elsewhere are tested, although calibration data are distributed differently. There "adapted" passes the labels of each
day to ``adapt`` before the next day. Regions are those of the training density, where "few" includes bins without a
training label.
Coverage is that of the prediction sets, and widths are those of their hulls, the intervals, which end with the axis.
``OUT/rows.csv`` has a row per set, halving, method and region, ``OUT/tables.md`` has tables, and
``OUT/intervals.png`` a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from command_line import parse, refuse, run, too_low, unfit_folder, unknown, write


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the sets."""
    sets: tuple[str, ...] = (
        "house16H", "abalone", "appliances", "rain", "beijing", "beijing_time", "utkface", "sts_b",
    )  # fmt: skip
    """Any of these and emobank."""
    seeds: int = 5
    """The number of seeds 0, 1, ... A seed decides the training rows and the random choices of a method."""
    rows: int = 3000
    """The largest number of rows of a table to train on."""
    forecasts: Path = Path("runs/forecasts")
    """Folder of the forecasts, which both studies share."""
    out: Path = Path("runs/intervals")
    """Folder of the results."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import pandas as pd
import torch
from forecasts import SETS, Forecasts, Part, forecasts, halved
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
"""By name: the forecast that is calibrated, and the options. In addition, "network, own" is the central interval of the
network's distribution."""
SHOWN = {
    "network, one threshold": "C1o", "network, per region": "C0o",
    "boosting, one threshold": "C1^", "boosting, per region": "C0^",
}  # fmt: skip
"""The methods in the picture and in the first columns of the tables, and their marks."""
ADAPTED = ", adapted"


def judge(name: str, seed: int, said: Forecasts) -> Iterator[dict[str, Any]]:
    """Coverage and width of each method's sets and of their hulls, in each region."""
    rng, density, bins = np.random.default_rng(seed), said.density, said.bins
    regions = np.where(density.counts > 0, density.regions(), "few")
    held, elsewhere = shares(said.held), {test: shares(new) for test, new in said.elsewhere.items()}
    known = [name for name, (kind, _) in METHODS.items() if kind == "network" or not np.isnan(held.boosted).any()]

    def calibration_of(method: str, part: Part) -> Any:
        kind, options = METHODS[method]
        calibration: Any
        if kind == "network":
            calibration = BinsConformal(density, regions=regions, prior=said.prior, **options)
        else:
            calibration = PointConformal(density, regions=regions, **options)
        calibration.update(given(method, part), part.labels)
        return calibration

    def given(method: str, part: Part) -> np.ndarray:
        return part.scores if METHODS[method][0] == "network" else part.boosted

    def judged(method: str, calibration: Any, new: Part) -> tuple[np.ndarray, ...]:
        """The ends of the intervals of new rows, whether the sets hold their labels, and the lengths of the sets."""
        output = given(method, new)
        return *calibration.interval(output, LEVEL), *sets(calibration, output, new.labels)

    def by_region(name: str, method: str, y: np.ndarray, *numbers: Any) -> Iterator[dict[str, Any]]:
        lower, upper, held, length = map(np.asarray, numbers)
        width = np.clip(upper, None, bins.edges[-1]) - np.clip(lower, bins.edges[0], None)
        columns = {"held": held, "length": length, "covered": (lower <= y) & (y <= upper), "width": width}
        for region in ("all", *REGIONS):
            own = (regions[bins.index(y, "clip")] == region) | (region == "all")
            row = {"set": name, "seed": seed, "method": method, "region": region, "rows": own.sum()}
            yield row | {key: value[own].mean() if own.any() else np.nan for key, value in columns.items()}

    for _ in range(HALVINGS):
        own, rest = halved(held, rng)
        for test, new in (elsewhere or {name: rest}).items():
            lower, upper = map(np.asarray, dt.interval(torch.from_numpy(new.scores), bins, LEVEL, ends=said.ends))
            inside = (lower <= new.labels) & (new.labels <= upper)
            yield from by_region(test, "network, own", new.labels, lower, upper, inside, upper - lower)
            for method in known:
                yield from by_region(test, method, new.labels, *judged(method, calibration_of(method, own), new))
    for test, new in elsewhere.items():
        for method in SHOWN:
            calibration, days = calibration_of(method, held), []
            for start in range(0, len(new.labels), DAY):
                day = Part(*(values[start : start + DAY] for values in new))
                days.append(judged(method, calibration, day))
                calibration.adapt(given(method, day), day.labels, LEVEL)
            yield from by_region(test + ADAPTED, method, new.labels, *map(np.concatenate, zip(*days, strict=True)))


def shares(part: Part) -> Part:
    """The same rows with probabilities in place of scores."""
    return part._replace(scores=softmax(part.scores.astype(float), axis=1))


def sets(calibration: Any, output: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each set holds its label, and the total length of its parts."""
    bins, row = calibration.bins, calibration.bins.index(y, "clip")
    if isinstance(calibration, BinsConformal):
        inside = calibration.sets(output, LEVEL)
        return inside[np.arange(len(y)), row], inside @ np.diff(bins.edges)
    reach = -calibration.thresholds(LEVEL)
    parts = np.minimum(output[:, None] + reach, bins.edges[1:]) - np.maximum(output[:, None] - reach, bins.edges[:-1])
    return np.abs(y - output) <= reach[row], parts.clip(min=0).sum(1)


def tables(rows: pd.DataFrame) -> str:
    """Tables of coverage and of widths, of the methods in the picture and of the others."""
    others = [method for method in dict.fromkeys(rows.method) if method not in SHOWN]
    there = [method for method in SHOWN if method in set(rows.method)]
    return "\n".join(table(rows, methods, widths) for methods in (there, others) for widths in (False, True))


def table(rows: pd.DataFrame, methods: list[str], widths: bool) -> str:
    """Coverage by region in %, means and standard deviations over seeds; or mean lengths of sets, widths of intervals,
    and how many of all labels in % the intervals hold."""
    by_seed = rows.groupby(["set", "method", "region", "seed"], sort=False).mean()
    mean, spread = (getattr(by_seed.groupby(level=[0, 1, 2], sort=False), kind)() for kind in ("mean", "std"))

    def cell(name: str, method: str) -> str:
        if (name, method) not in mean.index:
            return ""
        of_method, error = mean.loc[name, method], spread.loc[name, method]
        if widths:
            whole = of_method.loc["all"]
            return f"{whole.length:.3g}; {whole.width:.3g}; {100 * whole.covered:.0f}"
        return " / ".join(f"{100 * of_method.held[of]:.0f} ± {100 * error.held[of]:.0f}" for of in REGIONS)

    lines = [["set: test rows many / medium / few", *methods], ["---"] * (1 + len(methods))]
    for name in dict.fromkeys(rows.set):
        if (name, methods[0]) in mean.index:
            counts = mean.loc[name, methods[0]].rows
            size = f": {' / '.join(f'{counts[of]:,.0f}' for of in REGIONS)}" * (not widths)
            lines.append([name.replace("_", " ") + size, *(cell(name, method) for method in methods)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Coverage of the sets by region, with the standard deviation over seeds, and widths of the intervals beside those
    of one threshold of the network."""
    names = list(dict.fromkeys(rows.set))
    mean = rows.groupby(["set", "method", "region", "seed"]).mean()
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
    faults = unknown("--sets", settings.sets, SETS) + unfit_folder("--out", settings.out)
    refuse("recipes/studies/intervals.py", faults + too_low(settings, seeds=1, rows=20))
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in settings.sets:
        for seed in range(settings.seeds):
            rows += judge(name, seed, forecasts(settings.forecasts, settings.root, name, seed, settings.rows))
            write(settings.out / "rows.csv", pd.DataFrame(rows).to_csv(index=False))
            print(f"{name}, seed {seed}", flush=True)
    picture(pd.DataFrame(rows), settings.out / "intervals.png")
    (settings.out / "tables.md").write_text(tables(pd.DataFrame(rows)), encoding="utf-8")
    print(tables(pd.DataFrame(rows)))


if __name__ == "__main__":
    run(main, SETTINGS)
