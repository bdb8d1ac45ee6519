"""How long ``LongTailRegressor()`` takes to fit, as ratios to scikit-learn's ``MLPRegressor`` within one run.

    python benchmarks/regressor.py
    python benchmarks/regressor.py --root DIR

Without ``--root`` the tables have the 10 columns of ``make_friedman1``, and a label y becomes exp(y / 5), which has a
long tail. With ``--root`` they are the first 5,000 rows of concrete, abalone and appliances_energy, which DIR holds as
CSV packed with gzip, the label in the first column. The perceptron has its defaults, or stops early, on standardized
columns. Seconds are those of the processor, with one thread. Takes half a minute.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from timing import Report, medians, milliseconds

from dir_toolkit.integrations.scikit_learn import LongTailRegressor

MOST = 5000


def made(rows: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = make_friedman1(rows, noise=1.0, random_state=0)
    return x, np.exp(y / 5)


def read(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    table = pd.read_csv(root / f"{name}.csv.gz", encoding="utf-8-sig", nrows=MOST)
    y = table.pop(table.columns[0]).to_numpy(float)
    return pd.get_dummies(table).to_numpy(float), y


def main(report: Report, root: Path | None = None) -> None:
    if root is None:
        tables = {f"{rows:,} rows": made(rows) for rows in (400, 1500, MOST)}
    else:
        tables = {name: read(root, name) for name in ("concrete", "abalone", "appliances_energy")}
    for name, (x, y) in tables.items():
        fits = {
            "LongTailRegressor": LongTailRegressor(random_state=0),
            "MLPRegressor": make_pipeline(StandardScaler(), MLPRegressor(random_state=0)),
            "MLPRegressor, early stopping": make_pipeline(
                StandardScaler(), MLPRegressor(early_stopping=True, random_state=0)
            ),
        }
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)
            functions = {key: partial(model.fit, x, y) for key, model in fits.items()}
            times = medians(functions, repeats=3, warmup=0, clock=time.process_time)
        detail, own = milliseconds(times), times.pop("LongTailRegressor")
        for key, seconds in times.items():
            report.add(f"{name}: LongTailRegressor / {key}", own / seconds, "<= 2", detail)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder of the tables")
    main(Report(), parser.parse_args().root)
