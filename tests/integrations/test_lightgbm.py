"""Boosters of LightGBM, adjusted from the prior of their labels: unfitted, fitted, over bins and over quantiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")
pytest.importorskip("lightgbm")

import lightgbm
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.frozen import FrozenEstimator

import dir_toolkit as dt
from dir_toolkit.integrations.scikit_learn import PriorAdjusted, SampleWeighted
from dir_toolkit.labels import bin_shares

AXIS = dt.Bins.uniform(0, 50, count=25)
OPTIONS = {"n_estimators": 40, "num_leaves": 8, "min_child_samples": 10, "n_jobs": 1, "verbose": -1}
BOOSTER = lightgbm.LGBMRegressor(**OPTIONS)
LEVELS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])


class Quantiles(RegressorMixin, BaseEstimator):
    """A booster per quantile."""

    def fit(self, X: Any, y: Any) -> Quantiles:  # noqa: N803
        self.each_ = [clone(BOOSTER).set_params(objective="quantile", alpha=level).fit(X, y) for level in LEVELS]
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        return np.sort([one.predict(X) for one in self.each_], 0).T


def shares_of_quantiles(estimator: Any, rows: Any, bins: dt.Bins) -> np.ndarray:
    return bin_shares(estimator.predict(rows), LEVELS, bins)


def long_tailed(n: int, seed: int, *, even: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy readings of a label that is exponential with a mean of five, or even over the axis."""
    random = np.random.default_rng(seed)
    y = random.uniform(0, 49, n) if even else np.minimum(random.exponential(5, n), 49)
    return y[:, None] + 5 * random.normal(size=(n, 2)), y


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (BOOSTER, {}),
        (SampleWeighted(BOOSTER, bins=AXIS), {}),
        (lightgbm.LGBMClassifier(**OPTIONS), {"forecast": "predict_proba"}),
        (Quantiles(), {"forecast": shares_of_quantiles}),
    ],
    ids=["number", "LDS weights", "bins", "quantiles"],
)
def test_even_labels_are_predicted_better_with_the_adjustment_than_without(estimator: Any, options: Any) -> None:
    (x, y), (x_test, y_test) = long_tailed(1000, 0), long_tailed(500, 1, even=True)
    model = PriorAdjusted(estimator, bins=AXIS, cv=3, random_state=0, **options)
    plain = np.abs(clone(model).set_params(tau=0.0).fit(x, y).predict(x_test) - y_test).mean()
    assert np.abs(model.fit(x, y).predict(x_test) - y_test).mean() < 0.99 * plain
    lower, upper = model.predict_interval(x_test)
    assert np.all(lower <= upper)
    assert model.scores(x_test).shape == (500, 25)


def test_a_fitted_booster_stays_as_it_is() -> None:
    x, y = long_tailed(1200, 0)
    booster = clone(BOOSTER).fit(x[:800], y[:800])
    before = booster.booster_.model_to_string()
    model = PriorAdjusted(FrozenEstimator(booster), bins=AXIS).fit(x[800:], y[800:])
    assert model.predict(x).shape == (1200,)
    assert booster.booster_.model_to_string() == before
