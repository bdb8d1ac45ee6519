"""A table with a long-tailed label: the errors of gradient boosting and of a network at rare labels.

    python recipes/table.py                                # a table drawn by this recipe, no download
    python recipes/table.py --file CSV --label COLUMN      # your own; a fifth of its rows is the test

The drawn table holds each patient's findings at admission, and the label is the length of the stay in days. Most
training stays are short, and test stays are uniform. LDS weights and an adjustment by the prior help long stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import parse, refuse, run, too_low, typed_command


@dataclass(frozen=True)
class Settings:
    file: Path | None = None
    """A CSV file with the names of its columns in the first line; the data card ``tables`` names some."""
    label: str = ""
    """The column of the file that holds the labels."""
    drop: tuple[str, ...] = ()
    """Columns of the file that are not features."""
    samples: int = 6000
    """The number of patients to draw and train on."""
    trees: int = 100
    """The number of trees in gradient boosting."""
    seeds: int = 3
    """The number of seeds per method: 0, 1, ..."""
    out: Path = Path("runs/table")
    """Folder of all results; what an earlier run left there is replaced."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

import dir_toolkit as dt
from dir_toolkit.experiment.data.tables import table
from dir_toolkit.experiment.results.figures import error_figure
from dir_toolkit.experiment.results.schema import combine_runs
from dir_toolkit.experiment.results.summary import write_summary
from dir_toolkit.experiment.results.tables import as_text, results_table, verdict
from dir_toolkit.integrations.scikit_learn import LongTailRegressor, PriorAdjusted


def draw(n: int, seed: int, *, even: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Findings (n, 12), and stays in days (n,) in [0, 60], exponential with a mean of six days unless ``even``.

    Six findings rise or fall with the stay and saturate, two are yes or no, and four do not depend on it."""
    random = np.random.default_rng(seed)
    share = random.random(n)
    stay = 60 * share if even else -6 * np.log1p(share * np.expm1(-10))
    severity = (np.log1p(stay / 4) + 0.3 * random.normal(size=n))[:, None]
    slopes, starts = np.array([1.0, -1.0, 0.7, 1.5, -0.5, 1.2]), np.array([1.0, 2.0, 1.5, 2.5, 1.0, 1.5])
    measured = np.tanh(slopes * (severity - starts) / 2) + 0.3 * random.normal(size=(n, 6))
    flags = random.random((n, 2)) < 1 / (1 + np.exp(3 - severity * np.array([1.0, 1.6])))
    return np.hstack([measured, flags, random.normal(size=(n, 4))]), stay


def methods(trees: int, seed: int) -> dict[str, tuple[Any, bool]]:
    """Regressors by name, and whether each is given LDS weights."""
    boosting = HistGradientBoostingRegressor(max_iter=trees, loss="absolute_error", random_state=seed)
    network = LongTailRegressor(head="regression", random_state=seed)
    adjusted = PriorAdjusted(boosting).set_params(random_state=seed)
    models = {"boosting": boosting, "boosting, LDS": boosting, "network, LDS": network}
    models |= {"boosting, adjusted": adjusted, "LongTailRegressor": LongTailRegressor(random_state=seed)}
    return {name: (model, name.endswith("LDS")) for name, model in models.items()}


def main(settings: Settings) -> None:
    faults = too_low(settings, samples=1, trees=1, seeds=1)
    if settings.file is None:
        faults += [f"--{name} needs --file." for name in ("label", "drop") if getattr(settings, name)]
    elif not settings.label:
        faults += ["--file needs --label, the column that holds the labels."]
    refuse("recipes/table.py", faults)
    train, test, name, units = draw(settings.samples, 0), draw(6000, 10**6, even=True), "stay", "days"
    if settings.file is not None:
        splits, name, units = table(settings.file, settings.label, drop=settings.drop), settings.label, "1"
        train, test = ((part.inputs[part.rows], part.labels) for part in (splits.train, splits.test))
    bins = dt.Bins.auto(train[1])
    density = dt.LabelDensity.count(train[1], bins)
    weight, target = dt.LDS(bins).fit(density).sample_weight(train[1]), torch.from_numpy(test[1])
    runs = {}
    for seed in range(settings.seeds):
        for method, (model, weighted) in methods(settings.trees, seed).items():
            pred = model.fit(*train, sample_weight=weight if weighted else None).predict(test[0])
            runs[method, seed] = dt.regression_metrics(torch.from_numpy(pred), target, density, outside="clip")
            print(f"{method}, seed {seed}: bMAE {float(runs[method, seed].bmae[0]):.3g}")
    title, command = f"A table: {name}", typed_command("recipes/table.py", ("file", "out"))
    ds = combine_runs(runs, title=title, command=command, label_name=name, label_units=units)
    settings.out.mkdir(parents=True, exist_ok=True)
    said = verdict(ds, "LongTailRegressor", "boosting")
    write_summary(settings.out, ds, {"Error by label": error_figure(ds)}, notes=[said])
    print(f"\n{bins.why}\n\n{as_text(results_table(ds))}\nFigures: {settings.out / 'report.html'}\n{said}")


if __name__ == "__main__":
    run(main, SETTINGS)
