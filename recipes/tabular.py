"""A table with long-tailed labels: what gradient boosting and a perceptron make of the rare ones.

    python recipes/tabular.py        # a table drawn by this recipe, no download; lightgbm joins in where installed

The table holds each patient's findings at admission, the label is the length of the stay in days. Most are short, and a
model answers too short for the others. LDS weights, which any library takes, and an adjustment by the prior help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from command_line import parse, run


@dataclass(frozen=True)
class Settings:
    samples: int = 6000
    """Patients to train on."""
    trees: int = 100
    """Of gradient boosting."""
    epochs: int = 40
    """Most passes of a perceptron over the patients."""
    seeds: int = 3
    """How many tables are drawn and learnt from with every method: 0, 1, ..."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

import dir_toolkit as dt
from dir_toolkit.integrations.scikit_learn import LongTailRegressor

TOLD = """Errors in days, mean ± standard deviation over {} table(s) of {:,} patients.
MAE of 6,000 new ones as they come; then, of 6,000 whose stays are evenly spread,
bMAE and MAE by training patients per day: many (more than 100), medium (20 to 100), few (under 20), unseen."""


def draw(n: int, seed: int, *, even: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Findings (n, 12), and stays in days (n,) in [0, 60], exponential with a mean of six days unless ``even``.

    Six findings rise or fall with it and saturate; two are yes or no; four have nothing to do with it."""
    random = np.random.default_rng(seed)
    share = random.random(n)
    stay = 60 * share if even else -6 * np.log1p(share * np.expm1(-10))
    severity = (np.log1p(stay / 4) + 0.3 * random.normal(size=n))[:, None]
    slopes, starts = np.array([1.0, -1.0, 0.7, 1.5, -0.5, 1.2]), np.array([1.0, 2.0, 1.5, 2.5, 1.0, 1.5])
    measured = np.tanh(slopes * (severity - starts) / 2) + 0.3 * random.normal(size=(n, 6))
    flags = random.random((n, 2)) < 1 / (1 + np.exp(3 - severity * np.array([1.0, 1.6])))
    return np.hstack([measured, flags, random.normal(size=(n, 4))]), stay


def methods(settings: Settings, seed: int, bins: dt.Bins) -> dict[str, tuple[Any, bool]]:
    """Regressors by name, and whether each is given LDS weights; all but the last minimise absolute errors."""
    gbm: dict[str, Any] = {"loss": "absolute_error", "max_iter": settings.trees, "early_stopping": False}
    network: dict[str, Any] = {"bins": bins, "epochs": settings.epochs, "batch_size": 128, "random_state": seed}
    found: dict[str, tuple[Any, bool]] = {"boosting": (HistGradientBoostingRegressor(**gbm, random_state=seed), False)}
    found["boosting, LDS"] = (HistGradientBoostingRegressor(**gbm, random_state=seed), True)
    try:
        from lightgbm import LGBMRegressor
    except (ImportError, OSError):  # the latter where a library that it links to is missing
        if seed == 0:
            print('lightgbm is left out, since it cannot be loaded: pip install "dir_toolkit[integrations]"')
    else:
        found["lightgbm, LDS"] = (
            LGBMRegressor(objective="l1", n_estimators=settings.trees, verbosity=-1, n_jobs=1),
            True,
        )
    return found | {
        "perceptron": (LongTailRegressor(head="regression", **network), False),
        "perceptron, LDS": (LongTailRegressor(head="regression", **network), True),
        "LongTailRegressor": (LongTailRegressor(**network), False),
    }


def main(settings: Settings) -> None:
    bins = dt.Bins.uniform(0, 60, width=1)
    usual, even = draw(6000, 10**6), draw(6000, 10**6 + 1, even=True)
    table: dict[str, list[list[float]]] = {}
    for seed in range(settings.seeds):
        x, y = draw(settings.samples, seed)
        density = dt.LabelDensity.count(y, bins)
        weight = dt.LDS(bins).fit(density).sample_weight(y)
        for name, (model, weighted) in methods(settings, seed, bins).items():
            model.fit(x, y, sample_weight=weight if weighted else None)
            pred, stay = torch.from_numpy(model.predict(even[0])), torch.from_numpy(even[1])
            errors = dt.regression_metrics(pred, stay, density)
            as_drawn = np.abs(model.predict(usual[0]) - usual[1]).mean()
            row = [as_drawn, errors.bmae.sel(region="all"), *errors.mae]
            table.setdefault(name, []).append([float(value) for value in row])
    print(TOLD.format(settings.seeds, settings.samples))
    print(" " * 18 + "".join(f"{name:>13}" for name in ("as they come", "bMAE", *errors.region.values)))
    for name, rows in table.items():
        mean, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1) if len(rows) > 1 else np.full(len(rows[0]), np.nan)
        cells = (f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, spread, strict=True))
        print(f"{name:18}" + "".join(f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    run(main, SETTINGS)
