"""Where does FDS pay, and can that be told after one epoch? FDS, LDS and two controls over many sets and sizes.

    python recipes/studies/where_fds_pays.py --root DIR               # tables, series and pooled words: an hour
    python recipes/studies/where_fds_pays.py --root DIR --sets sts_b_dir_gru emobank_gru --rows 100000
    python recipes/studies/where_fds_pays.py --root DIR --sets concrete --rows 400 --bins 200 --methods vanilla fds

DIR, the sets, their axes and their networks are those of ``recipes/studies/suite.py``. ``sts_b_dir_gru`` and
``emobank_gru`` are the recurrent networks of ``recipes/text.py`` and train with squared errors, the others with
absolute ones. All methods of a set share one setting. The figures of FDS are computed from its statistics after the
first epoch, before it has changed anything:

- ``agreement``: which share of the variance between the means of bins is left after smoothing. At 1, neighbouring bins
  have equal means already.
- ``noise``: the sampling noise of the means over what smoothing would change. Near 0, smoothing removes what tells
  labels apart; at 1 or more, noise may be all that it removes.
- ``size``: the change of a bin's mean, in standard deviations of a feature, averaged over bins.

Beside them are two figures of plain training: ``reach``, its bMAE in widths of a bin, and ``skill``, 1 minus the ratio
of its MAE to that of the median of the training labels.

Errors and figures are in ``OUT/runs.csv``, one line per set, size, number of bins, method and seed. ``--resume`` adds
to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from command_line import PLACES, parse, refuse, run, shown, too_low, typed_command, unfit_folder, unknown, write


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the sets."""
    sets: tuple[str, ...] = (
        "concrete", "airfoil", "abalone", "rain", "appliances", "house16H", "sts_b_dir", "emobank", "beijing",
    )  # fmt: skip
    """Any of the suite's, sts_b_dir_gru and emobank_gru."""
    rows: tuple[int, ...] = (400, 4000)
    """Most training rows; half as many validate. Each size is a case of its own."""
    bins: int = 50
    """The number of bins of tables, series and pooled word vectors."""
    methods: tuple[str, ...] = ("vanilla", "fds", "permuted", "noise", "lds", "lds+fds")
    """What to train, with vanilla among them. All are compared with it, and lds+fds with lds, too."""
    seeds: int = 10
    """The number of seeds per method: 0, 1, ..."""
    epochs: int | None = None
    """Passes over the training rows; by default 40, and 12 for the recurrent networks of sentences."""
    resume: bool = False
    """Go on where an earlier study was stopped, or add to it."""
    out: Path = Path("runs/fds")
    """Folder of all results."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import comparing
import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import spearmanr
from suite import FACES, LABELS, SERIES, TEXT, fewer, task_of
from text import Reader
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.errors import StudyError
from dir_toolkit.experiment.data.text import word_vectors
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import start_runtime

RECURRENT = {"sts_b_dir_gru": "sts_b_dir", "emobank_gru": "emobank"}
FIGURES = ("agreement", "noise", "size")
OF_CASES = (*FIGURES, "reach", "skill")
METHODS = tuple(comparing.methods("weighted_l1"))
words = cache(word_vectors)


def figures(statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """The figures of FDS, from :meth:`dir_toolkit.FDS.statistics`, over bins with two samples or more."""
    known = statistics["count"] >= 2
    count, mean, variance, smoothed = (
        statistics[name][known] for name in ("count", "mean", "variance", "smoothed_mean")
    )
    center = (count[:, None] * mean).sum(0) / count.sum()
    between = (mean - center).square()
    total = (count[:, None] * (variance + between)).sum(0) / count.sum()
    alive = total > 1e-8 * total.max()  # units that never fire tell nothing
    moved = (((smoothed - mean).square() / total)[:, alive]).mean(1)
    noise = ((variance / count[:, None] / total)[:, alive]).mean(1)
    spread = ((between / total)[:, alive]).mean(1)
    return {
        "agreement": 1 - float(moved.sum() / spread.sum()),
        "noise": float(noise.sum() / moved.sum()),
        "size": float(moved.sqrt().mean()),
    }


class Watched(dt.FDS):
    """FDS that keeps its figures of the first epoch, in its state too, since a run that goes on has no first epoch."""

    figures: dict[str, float] | None = None

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.epoch == 1:
            self.figures = figures(self.statistics())

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**super().state_dict(*args, **options), "figures": self.figures}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        state = dict(state_dict)
        self.figures = state.pop("figures")
        return super().load_state_dict(state, strict, assign)


def measured(trial: Trial, trained: Trained, output: Any) -> Mapping[str, xr.DataArray]:
    """The figures of a run with FDS."""
    own = getattr(trained.fds, "figures", None) or {}
    return {f"fds_{name}": xr.DataArray(value, attrs={"units": "1"}) for name, value in own.items()}


def task_with(name: str, settings: Settings, rows: int) -> Task:
    """A set with at most so many rows, and its network."""
    if name not in RECURRENT:
        task = task_of(name, settings.root, rows)
        low, high = task.bins.edges[[0, -1]]
        return replace(task, bins=dt.Bins.uniform(low, high, count=settings.bins))
    number, vectors = words(settings.root / "text")
    splits = fewer(TEXT[RECURRENT[name]](settings.root / "text", number), rows)
    pairs = name == "sts_b_dir_gru"
    bins = dt.Bins.uniform(0 if pairs else 1, 5, width=0.1)
    return Task(lambda _: splits, bins, lambda _: Reader(vectors, pairs=pairs), name, "label", folder=f"{name}-{rows}")


def budget(name: str, task: Task, epochs: int | None) -> Optimization:
    if name in RECURRENT:
        return Optimization(epochs=epochs or 12, lr=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0)
    batch = min(max(len(task.data(0).train) // 12, 32), 256)
    return Optimization(epochs=epochs or 40, batch_size=batch, lr=3e-3, weight_decay=1e-4)


def compared(rows: pd.DataFrame) -> tuple[str, str]:
    """A table of cases, with what each method changes of the bMAE; and how each figure goes with what FDS changes."""
    keyed = rows.set_index(["set", "rows", "bins", "seed"])
    error = {name: keyed[keyed.method == name].bmae for name in dict.fromkeys(rows.method)}
    pairs = [(name, "vanilla") for name in error if name != "vanilla"]
    pairs += [("lds+fds", "lds")] if {"lds", "lds+fds"} <= set(error) else []
    ratio = {f"{a} / {b}": (error[a] / error[b]).dropna() for a, b in pairs}
    grouped = {name: of.groupby(level=[0, 1, 2], sort=False) for name, of in ratio.items()}
    mean = pd.DataFrame({name: of.mean() for name, of in grouped.items()})
    sem = pd.DataFrame({name: of.sem() for name, of in grouped.items()})
    if "fds / vanilla" in mean:  # from the largest gain to the largest loss
        mean = mean.sort_values("fds / vanilla")
    told = keyed[keyed.method == "fds"][list(FIGURES)].groupby(level=[0, 1, 2], sort=False).mean().reindex(mean.index)
    plain = keyed[keyed.method == "vanilla"]
    for name, values in {"reach": plain.bmae / plain.bin_width, "skill": 1 - plain.mae / plain.mae_of_median}.items():
        told[name] = values.groupby(level=[0, 1, 2], sort=False).mean().reindex(mean.index)
    lines = [
        ["set", "training rows", "bins", *mean.columns, *OF_CASES],
        ["---"] * (3 + len(mean.columns) + len(OF_CASES)),
    ]
    for case in mean.index:
        both = [(mean.loc[case, name], sem.loc[case, name]) for name in mean.columns]
        ratios = ["" if math.isnan(value) else f"{value:.3f} ± {error:.3f}" for value, error in both]
        lines.append(
            [case[0], f"{case[1]:,}", str(case[2]), *ratios, *(f"{told.loc[case, name]:.2f}" for name in OF_CASES)]
        )
    gains = mean.get("fds / vanilla", pd.Series(dtype=float)).dropna()
    goes = "\n".join(
        f"{name}: Spearman {test.statistic:+.2f}, p = {test.pvalue:.3f}, over {len(gains)} cases"
        for name in OF_CASES
        if len(gains) > 2
        for test in [spearmanr(told.loc[gains.index, name], gains)]
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines), goes


def main(settings: Settings) -> None:
    faults = unknown("--sets", settings.sets, [*LABELS, *SERIES, *TEXT, *FACES, *RECURRENT])
    faults += unknown("--methods", settings.methods, METHODS) + unfit_folder("--out", settings.out)
    faults += too_low(settings, seeds=1, epochs=1, bins=5) + [
        f"--rows must be at least 20, got {rows}." for rows in settings.rows if rows < 20
    ]
    if "vanilla" not in settings.methods:
        faults.append(f"--methods must name vanilla, with which all are compared, got {' '.join(settings.methods)}.")
    table = settings.out / "runs.csv"
    if table.exists() and not settings.resume:
        faults.append(f"--out must hold no {table.name} yet. Use --resume to add to it.")
    refuse("recipes/studies/where_fds_pays.py", faults)
    cases = dict.fromkeys((name, rows) for name in settings.sets for rows in settings.rows)
    old = pd.read_csv(table) if settings.resume and table.exists() else pd.DataFrame()
    failed: list[str] = []
    with start_runtime() as runtime:
        # All are read before anything trains.
        tasks = [replace(task_with(name, settings, rows), measure=measured) for name, rows in cases]
        for (name, rows), task in zip(cases, tasks, strict=True):
            loss = "weighted_mse" if name in RECURRENT else "weighted_l1"
            methods = comparing.methods(loss, "mae/all" if name in RECURRENT else None, fds=Watched)
            study = Study(
                settings.out / f"{name}-{rows}-{settings.bins}",
                task,
                methods,
                runtime,
                budget(name, task, settings.epochs),
                settings=shown(settings),
                command=typed_command("recipes/studies/where_fds_pays.py", PLACES),
                resume=settings.resume,
            )
            study.run(settings.methods, seeds=settings.seeds)
            failed += [f"{name}, {rows} rows, {key[1]}, seed {key[2]}: {why}" for key, why in study.failed.items()]
            if not study.runs:
                continue
            new = pd.DataFrame([row_of(name, study, key) for key in study.runs])
            old = pd.concat([old, new]).drop_duplicates(["set", "rows", "bins", "method", "seed"])
            write(table, old.to_csv(index=False, float_format="%.6g"))
    if "vanilla" in set(old.get("method", ())):
        lines, goes = compared(old)
        write(settings.out / "cases.md", f"{lines}\n{goes}\n")
        print(f"{lines}\n{goes}")
    if failed:
        raise StudyError("\n  ".join(["these runs failed; --resume tries them again:", *failed]))


def row_of(name: str, study: Study, key: tuple[Task, str, int]) -> dict[str, Any]:
    errors, (_, method, seed) = study.runs[key].errors, key
    task = study.tasks[0]
    row = {"set": name, "rows": len(task.data(0).train), "bins": len(task.bins)}
    train, test = task.data(0).train.labels, task.data(0).test.labels
    row |= {"bin_width": np.diff(task.bins.edges)[0], "mae_of_median": np.abs(test - np.median(train)).mean()}
    row |= {"method": method, "seed": seed, "best_epoch": errors.best_epoch.item()}
    row |= {kind: errors[kind].sel(region="all").item() for kind in ("mae", "rmse", "bmae")}
    row |= {"few": errors.mae.sel(region="few").item()}
    return row | {figure: float(errors.get(f"fds_{figure}", math.nan)) for figure in FIGURES}


if __name__ == "__main__":
    run(main, SETTINGS)
