"""LongTailRegressor on real tables: beside gradient boosting, and beside a plain network with LDS weights.

    python recipes/studies/tables.py --root DIR                                   # seven tables, 5 splits, 1 thread
    python recipes/studies/tables.py --root DIR --tables concrete --methods default --splits 2

DIR holds the tables as CSV packed with gzip, the label in the first column; ``diabetes`` comes with scikit-learn. Every
split trains on 70 % of the rows, at most ``--rows``. All methods are judged on one axis: 50 even bins over the range of
the training labels, with test labels beyond it in the end bins. ``few`` is the mean absolute error of the tenth of the
test rows whose labels are the rarest by the smoothed training density. Rows are added to ``OUT/rows.csv``, where those
of an earlier run stay unless they are of the same data, split, method and ``--rows``.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from command_line import parse, refuse, run, too_low, unfit_folder, unknown, write


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the tables."""
    tables: tuple[str, ...] = ("diabetes", "abalone", "airfoil", "concrete", "house16H", "appliances", "rain")
    """Any of these; ``house16H_raw``, whose prices are not brought to their logarithm; and ``beijing``, hours of the
    series of the station Aotizhongxin in random order, whose file DIR must then hold."""
    methods: tuple[str, ...] = ("median", "boosting", "boosting_lds", "boosting_adjusted", "network_lds", "default")
    """Any of these, ``default_on_axis``, which is given the axis that judges, ``boosting_l1`` and ``boosting_l1_lds``,
    which minimise absolute errors, ``boosting_lds_adjusted``, ``lightgbm``, ``lightgbm_lds``, ``lightgbm_adjusted``,
    and scikit-learn's ``mlp``."""
    splits: int = 5
    """Seeds 0, 1, ... decide which rows train, and what a method draws."""
    rows: int = 5000
    """Most rows to train on, and most to test on."""
    out: Path = Path("runs/tables")
    """Folder of the results."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dir_toolkit as dt
from dir_toolkit.experiment.data.series import beijing
from dir_toolkit.integrations.scikit_learn import LongTailRegressor, PriorAdjusted, SampleWeighted

FILES = {"house16H_raw": "house16H", "appliances": "appliances_energy", "rain": "rain_ibk"}
TABLES = (
    "diabetes", "abalone", "airfoil", "concrete", "house16H", "appliances", "rain", "house16H_raw", "beijing",
)  # fmt: skip
ERRORS = ["mae", "bmae", "few", "seconds"]


def read(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The columns of a table as numbers, words as one column per word, and its labels."""
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        return load_diabetes(return_X_y=True)
    if name == "beijing":
        splits = beijing(root, hours=1)
        parts = splits.train, splits.val, splits.test
        return np.concatenate([p.inputs[p.rows][:, 0] for p in parts]), np.concatenate([p.labels for p in parts])
    table = pd.read_csv(root / f"{FILES.get(name, name)}.csv.gz", encoding="utf-8-sig")
    table = table.drop(columns="rownames", errors="ignore")
    label = table.pop(table.columns[0]).to_numpy(float)
    return pd.get_dummies(table).to_numpy(float), np.log1p(label) if name == "house16H" else label


def boosting(**settings: Any) -> Callable[..., BaseEstimator]:
    return lambda seed, bins=None: HistGradientBoostingRegressor(random_state=seed, **settings)


def lightgbm(seed: int, bins: dt.Bins | None = None) -> BaseEstimator:
    from lightgbm import LGBMRegressor

    return LGBMRegressor(random_state=seed, n_jobs=1, verbose=-1)


METHODS: dict[str, tuple[Callable[[int, dt.Bins], Any], bool]] = {
    "median": (lambda seed, bins: DummyRegressor(strategy="median"), False),
    "boosting": (boosting(), False),
    "boosting_lds": (boosting(), True),
    "boosting_l1": (boosting(loss="absolute_error"), False),
    "boosting_l1_lds": (boosting(loss="absolute_error"), True),
    "boosting_adjusted": (lambda seed, bins: PriorAdjusted(boosting()(seed), random_state=seed), False),
    "boosting_lds_adjusted": (
        lambda seed, bins: PriorAdjusted(SampleWeighted(boosting()(seed)), random_state=seed),
        False,
    ),
    "lightgbm": (lightgbm, False),
    "lightgbm_lds": (lightgbm, True),
    "lightgbm_adjusted": (lambda seed, bins: PriorAdjusted(lightgbm(seed), random_state=seed), False),
    "mlp": (
        lambda seed, bins: make_pipeline(
            StandardScaler(), MLPRegressor(hidden_layer_sizes=(64, 64), early_stopping=True, random_state=seed)
        ),
        False,
    ),
    "network_lds": (
        lambda seed, bins: LongTailRegressor(head="regression", weights="sqrt_inverse", random_state=seed),
        False,
    ),
    "default": (lambda seed, bins: LongTailRegressor(random_state=seed), False),
    "default_on_axis": (lambda seed, bins: LongTailRegressor(bins=bins, random_state=seed), False),
}
"""By name: the estimator of a seed and of the axis that judges, and whether it is handed LDS weights of that axis."""


def judge(x: np.ndarray, y: np.ndarray, method: str, seed: int, most: int) -> dict[str, float]:
    """The errors of one split, and the seconds that the processor took for the fit."""
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = np.split(order, [round(0.7 * len(y))])
    train, test = train[:most], test[:most]
    bins = dt.Bins.uniform(y[train].min(), y[train].max(), count=50)
    density = dt.LabelDensity.count(y[train], bins)
    make, weighted = METHODS[method]
    weight = {"sample_weight": dt.LDS(bins).fit(density).sample_weight(y[train])} if weighted else {}
    start = time.process_time()
    model = make(seed, bins).fit(x[train], y[train], **weight)
    seconds = time.process_time() - start
    pred = model.predict(x[test])
    errors = dt.regression_metrics(pred, y[test].astype(float), density, outside="clip").sel(region="all")
    frequency = density.smooth(dt.gaussian(5, 2)).counts[bins.index(y[test], "clip")]
    rare = np.argsort(frequency, kind="stable")[: -(-len(test) // 10)]
    few = np.abs(pred - y[test])[rare].mean()
    return {"mae": errors.mae.item(), "bmae": errors.bmae.item(), "few": few, "seconds": seconds}


def summary(rows: pd.DataFrame) -> str:
    """Errors per table and method, and their ratios to those of plain boosting: the geometric mean over tables of each
    split. Both are mean ± standard deviation over splits."""
    rows = rows.astype(dict.fromkeys(ERRORS, float))
    parts = [spread(rows.groupby(["table", "method"], sort=False)[ERRORS], ".4g", ".2g")]
    if "boosting" in set(rows.method):
        each = rows.set_index(["table", "split", "method"])[ERRORS]
        base = each.xs("boosting", level="method").reindex(each.index.droplevel("method")).set_axis(each.index)
        with np.errstate(divide="ignore"):  # a constant takes no time
            logs = np.log(each / base).groupby(["split", "method"], sort=False).mean()
        ratios = np.exp(logs).groupby("method", sort=False)
        parts.append(f"ratios to boosting, geometric means over tables\n{spread(ratios, '.3f', '.3f')}")
    return "\n\n".join(parts)


def spread(groups: Any, mean: str, deviation: str) -> str:
    means, deviations = groups.mean(), groups.std()
    columns = [
        means[name].map(f"{{:{mean}}}".format) + " ± " + deviations[name].map(f"{{:{deviation}}}".format)
        for name in ERRORS
    ]
    return pd.concat(columns, axis=1).to_string()


def main(settings: Settings) -> None:
    path = settings.out / "rows.csv"
    keys = ["table", "split", "method", "rows", "data"]
    faults = unknown("--tables", settings.tables, TABLES) + unknown("--methods", settings.methods, METHODS)
    faults += too_low(settings, splits=1, rows=20) + unfit_folder("--out", settings.out)
    if not faults:
        rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*keys, *ERRORS])
        faults = [] if set(keys) <= set(rows) else [f"{path} says neither rows nor data. Choose another --out."]
    refuse("recipes/studies/tables.py", faults)
    torch.set_num_threads(1)
    known = {table: read(settings.root, table) for table in settings.tables}  # all before anything trains
    digests = {table: content(x, y) for table, (x, y) in known.items()}
    for table, (x, y) in known.items():
        for split in range(settings.splits):
            for method in settings.methods:
                row = {"table": table, "split": split, "method": method, "rows": settings.rows, "data": digests[table]}
                row |= judge(x, y, method, split, settings.rows)
                print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
                rows = pd.concat([rows, pd.DataFrame([row])]).drop_duplicates(keys, keep="last")
                write(path, rows.to_csv(index=False))
    print(summary(rows[(rows["rows"] == settings.rows) & (rows.data == rows.table.map(digests))]))


def content(x: np.ndarray, y: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()[:12]


if __name__ == "__main__":
    run(main, SETTINGS)
