"""What conformal intervals of a million predictions cost, against MAPIE within one run.

    python benchmarks/conformal.py

Prints calibration on a million predictions and labels, and intervals of a million others, with one threshold for all
labels, as MAPIE's split conformal prediction with absolute errors has it, and with one per region. MAPIE is left out
where it is missing: ``pip install mapie``. Takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from timing import Report, medians, milliseconds

import dir_toolkit as dt
from dir_toolkit.conformal import PointConformal

NUM_ROWS, NUM_BINS, LEVEL = 1_000_000, 121, 0.9
ONE, PER_REGION = "PointConformal, one threshold", "PointConformal, one per region"


def with_mapie() -> Callable[..., Any]:
    """MAPIE's intervals, (2, N), around predictions that are given."""
    from mapie.regression import SplitConformalRegressor
    from sklearn.base import BaseEstimator, RegressorMixin

    class Given(RegressorMixin, BaseEstimator):
        is_fitted = True

        def fit(self, x: np.ndarray, y: np.ndarray) -> Any:
            raise NotImplementedError

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x[:, 0]

    def intervals(pred: np.ndarray, calibration_pred: np.ndarray, calibration_labels: np.ndarray) -> np.ndarray:
        regressor = SplitConformalRegressor(Given(), confidence_level=LEVEL, prefit=True)
        regressor.conformalize(calibration_pred[:, None], calibration_labels)
        return regressor.predict_interval(pred[:, None])[1][:, :, 0].T

    return intervals


def main(report: Report) -> None:
    generator = np.random.default_rng(0)
    labels = generator.gamma(4, 8, (2, NUM_ROWS)).clip(0, NUM_BINS)
    pred = labels + generator.normal(0, 1 + labels / 10)
    density = dt.LabelDensity.count(labels[1], dt.Bins.uniform(0, NUM_BINS, width=1))
    given = pred[1], pred[0], labels[0]

    def ours(per_region: float) -> tuple[np.ndarray, np.ndarray]:
        calibration = PointConformal(density, per_region=per_region)
        calibration.update(*given[1:])
        return calibration.interval(given[0], LEVEL)

    functions: dict[str, Callable[[], Any]] = {ONE: partial(ours, 0), PER_REGION: partial(ours, 1)}
    try:
        functions["MAPIE"] = partial(with_mapie(), *given)
    except ImportError:
        report.leave_out("MAPIE")
    times = medians(functions, repeats=15)
    what = f"{NUM_ROWS:,} rows calibrated and {NUM_ROWS:,} intervals"
    if "MAPIE" in functions:
        difference = np.abs(np.subtract(functions["MAPIE"](), functions[ONE]())).max()
        detail = f"{milliseconds(times)}; ends differ by at most {difference:.1g}"
        report.add(f"{ONE} / MAPIE, {what}", times[ONE] / times["MAPIE"], "<= 2", detail)
    report.add(f"{PER_REGION} / one, {what}", times[PER_REGION] / times[ONE], "", milliseconds(times))


if __name__ == "__main__":
    main(Report())
