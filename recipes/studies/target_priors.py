"""The prior of new data: whether a model's scores suffice to estimate it, and how much predictions gain by it.

    python recipes/studies/target_priors.py --root DIR                          # eight sets, 5 seeds, 1 thread
    python recipes/studies/target_priors.py --root DIR --sets abalone --seeds 1

DIR holds the sets, and ``forecasts.py`` describes the training on each. Rows that the network has not seen are halved
into held-out rows and a pool, from which new rows are drawn with replacement: as the training rows are distributed
(``none``), uniformly over the bins that hold a label (``even``), from the highest 30 % of the labels (``high``), and in
proportion to the rank of the label (``tilted``). For faces and sentences the held-out rows are those withheld from
training, and the pool consists of the validation and test parts. Rows from elsewhere, of Beijing's last year and of
another station, are natural shifts. Errors are those of the median as trained, under the estimate, and under the true
prior of the new rows. ``OUT/rows.csv`` has a row per set, seed and shift, ``OUT/table.md`` has the table, and
``OUT/target-prior.png`` shows the priors of the first seed under the even shift.
"""

from __future__ import annotations

import sys
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
        "abalone", "house16H", "appliances", "rain", "beijing", "beijing_time", "utkface", "sts_b",
    )  # fmt: skip
    """Any of these and emobank."""
    seeds: int = 5
    """The number of seeds 0, 1, ... A seed decides the training rows and the random choices of a method."""
    rows: int = 3000
    """The largest number of rows of a table to train on."""
    new: int = 2000
    """The number of rows per shift."""
    forecasts: Path = Path("runs/forecasts")
    """Folder of the forecasts, which both studies share."""
    out: Path = Path("runs/target_priors")
    """Folder of the results."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import warnings

import numpy as np
import pandas as pd
import torch
from forecasts import SETS, Forecasts, Part, forecasts, halved
from matplotlib.figure import Figure

import dir_toolkit as dt

SHOWN = "even"  # the shift in the picture
Curves = dict[str, np.ndarray]


def shifts(forecast: Forecasts, most: int, rng: np.random.Generator) -> tuple[Part, dict[str, Part]]:
    """Held-out rows, and new ones by the name of their shift."""

    def drawn(part: Part, weight: np.ndarray) -> Part:
        rows = rng.choice(len(part.labels), most, p=weight / weight.sum())
        return Part(*(values[rows] for values in part))

    if forecast.elsewhere:
        return forecast.held, {
            name: drawn(part, np.ones(len(part.labels))) for name, part in forecast.elsewhere.items()
        }
    held, pool = halved(forecast.held, rng) if forecast.withheld is None else (forecast.withheld, forecast.held)
    row, rising = forecast.bins.index(pool.labels, "clip"), np.sort(held.labels)
    here = np.bincount(row, minlength=len(forecast.bins))
    natural = (np.ones_like(here) if forecast.withheld is None else forecast.density.counts / here.clip(1))[row]
    weights = {
        "none": natural,
        "even": 1 / here[row],
        "high": natural * (pool.labels >= np.quantile(held.labels, 0.7)),
        "tilted": natural * np.searchsorted(rising, pool.labels, "right"),
    }
    return held, {name: drawn(pool, weight) for name, weight in weights.items()}


def judge(name: str, seed: int, forecast: Forecasts, most: int) -> tuple[list[dict[str, Any]], Curves]:
    """The errors of the estimate under each shift, and the priors along the axis under the shift in the picture."""
    bins, prior = forecast.bins, forecast.prior
    trained = forecast.density.counts / forecast.density.counts.sum()
    held, tests = shifts(forecast, most, np.random.default_rng(1000 + seed))
    rows, curves = [], {}
    for shift, new in tests.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dt.DirToolkitWarning)  # that the source prior is kept, which a column says
            estimate = dt.estimate_prior(
                new.scores, source=held.scores, labels=held.labels, bins=bins,
                features=new.features, source_features=held.features,
            )  # fmt: skip
        truth = np.bincount(bins.index(new.labels, "clip"), minlength=len(bins)) / len(new.labels)
        estimated = estimate.estimated.numpy()

        def error(target: Any, new: Part = new) -> float:
            logits = torch.from_numpy(new.scores.astype(float))
            logits = logits if target is None else dt.adjust_logits(logits, prior, target=target)
            pred = dt.decode(logits.softmax(1), bins, "median", ends=forecast.ends).numpy()
            return float(np.abs(pred - new.labels).mean())

        rows.append(
            {
                "set": name, "seed": seed, "shift": shift,
                "tv_training": variation(trained, truth), "tv_estimate": variation(estimated, truth),
                "mae_trained": error(None), "mae_adjusted": error(estimated if estimate.accepted else None),
                "mae_estimate": error(estimated), "mae_true": error(truth),
                "auc": estimate.auc, "gain": estimate.gain / estimate.gain_error,
                "kept": not estimate.shifted, "refused": estimate.refused,
            }
        )  # fmt: skip
        if shift == SHOWN:
            curves = {"true": truth, "training": trained, "estimated": estimated}
    return rows, curves


def variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum() / 2)


def table(rows: pd.DataFrame) -> str:
    """Means and standard deviations over seeds, and how many estimates were accepted."""
    numbers = {
        "tv_training": "TV of training prior", "tv_estimate": "TV of estimate", "mae_trained": "MAE as trained",
        "mae_estimate": "MAE under estimate", "mae_true": "MAE under true prior",
        "auc": "AUC", "gain": "gain in standard errors",
    }  # fmt: skip
    lines = [f"| set | shift | {' | '.join(numbers.values())} | accepted |", "|---|---" + "|---:" * 8 + "|"]
    for (name, shift), group in rows.groupby(["set", "shift"], sort=False):
        cells = [shown(group[column].mean(), group[column].std()) for column in numbers]
        refused, kept = int(group.refused.sum()), int((group.kept & ~group.refused).sum())
        why = [f"{count} {word}" for count, word in ((refused, "refused"), (kept, "no shift")) if count]
        accepted = f"{len(group) - refused - kept} of {len(group)}" + (f" ({', '.join(why)})" if why else "")
        lines.append(f"| {name.replace('_', ' ')} | {shift} | {' | '.join(cells)} | {accepted} |")
    return "\n".join([*lines, ""])


def shown(mean: float, spread: float) -> str:
    """Both with the decimals at which the mean has three digits, and with two at most."""
    decimals = int(np.clip(2 - np.floor(np.log10(max(abs(mean), 1e-9))), 0, 2))
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def picture(curves: dict[str, tuple[dt.Bins, Curves]], path: Path) -> None:
    """The true, the training and the estimated prior of each set, as shares per label unit."""
    columns = min(4, len(curves))
    figure = Figure(figsize=(2.7 * columns, 0.5 + 2.1 * -(-len(curves) // columns)))
    panels = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flat
    lines: list[Any] = []
    for panel, (name, (bins, priors)) in zip(panels, curves.items(), strict=False):
        widths = np.diff(bins.edges)
        lines = [
            panel.stairs(shares / widths, bins.edges, color=color, linewidth=width, label=label, fill=fill, baseline=0)
            for (label, shares), color, width, fill in zip(
                priors.items(), ("0.85", "C1", "C0"), (0, 1.2, 1.8), (True, False, False), strict=True
            )
        ]
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlim(bins.edges[0], bins.edges[-1])
    for panel in figure.axes[len(curves) :]:
        panel.remove()
    for panel in figure.axes:
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.supylabel("share per label unit", fontsize=9)
    figure.legend(handles=lines, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=100)


def main(settings: Settings) -> None:
    faults = unknown("--sets", settings.sets, SETS) + unfit_folder("--out", settings.out)
    refuse("recipes/studies/target_priors.py", faults + too_low(settings, seeds=1, rows=20, new=1))
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    curves: dict[str, tuple[dt.Bins, Curves]] = {}
    for name in settings.sets:
        for seed in range(settings.seeds):
            forecast = forecasts(settings.forecasts, settings.root, name, seed, settings.rows)
            more, priors = judge(name, seed, forecast, settings.new)
            rows += more
            if priors and name not in curves:
                curves[name] = forecast.bins, priors
            write(settings.out / "rows.csv", pd.DataFrame(rows).to_csv(index=False))
            print(f"{name}, seed {seed}", flush=True)
    if curves:
        picture(curves, settings.out / "target-prior.png")
    (settings.out / "table.md").write_text(table(pd.DataFrame(rows)), encoding="utf-8")
    print(table(pd.DataFrame(rows)))


if __name__ == "__main__":
    run(main, SETTINGS)
