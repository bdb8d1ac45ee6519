"""LDS weights inside each fit, and scorers of rare labels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import dir_toolkit as dt
from dir_toolkit.errors import ArgumentTypeError, LabelError
from dir_toolkit.integrations.scikit_learn import SampleWeighted, bmae_scorer, few_shot_scorer


@parametrize_with_checks([SampleWeighted(LinearRegression())])
def test_the_checks_of_scikit_learn_pass(estimator: Any, check: functools.partial[Any]) -> None:
    check(estimator)


class Recorder(LinearRegression):
    """Keeps what it was handed."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Recorder:  # noqa: N803
        self.seen_ = sample_weight
        return super().fit(X, y, sample_weight)


def long_tailed(n: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    y = np.minimum(random.exponential(5, n), 49)
    return y[:, None] + random.normal(size=(n, 2)), y


@pytest.mark.filterwarnings("ignore:.*the weights reduce the effective sample:dir_toolkit.errors.DirToolkitWarning")
def test_weights_are_those_of_lds_over_the_labels_of_the_fit() -> None:
    x, y = long_tailed(300)
    axis = dt.Bins.uniform(0, 50, count=50)
    for scheme in ("sqrt_inverse", "inverse"):
        fitted = SampleWeighted(Recorder(), bins=axis, scheme=scheme).fit(x, y)
        by_hand = dt.LDS(axis, scheme=scheme).fit(y).sample_weight(y)
        np.testing.assert_allclose(fitted.estimator_.seen_, by_hand, rtol=1e-6)  # the table is float32
        assert abs(fitted.estimator_.seen_.mean() - 1) < 1e-12
    folds = cross_validate(SampleWeighted(Recorder()), x, y, cv=3, return_estimator=True, return_indices=True)
    for model, rows in zip(folds["estimator"], folds["indices"]["train"], strict=True):
        assert len(model.estimator_.seen_) == len(rows)
        np.testing.assert_array_equal(
            model.estimator_.seen_, SampleWeighted(Recorder()).fit(x[rows], y[rows]).estimator_.seen_
        )


def test_own_weights_multiply_and_a_row_of_weight_zero_is_absent() -> None:
    x, y = long_tailed(200)
    own = np.random.default_rng(1).choice([0.0, 1.0, 2.0], 200)
    axis = dt.Bins.uniform(0, 50, count=50)
    seen = SampleWeighted(Recorder(), bins=axis).fit(x, y, sample_weight=own).estimator_.seen_
    repeated = np.repeat(np.arange(200), own.astype(int))
    of_repeated = SampleWeighted(Recorder(), bins=axis).fit(x[repeated], y[repeated]).estimator_.seen_
    np.testing.assert_allclose(seen[repeated] / own[repeated], of_repeated, rtol=1e-6)
    assert not seen[own == 0].any()


def test_estimators_without_weights_and_labels_beyond_the_axis_are_refused() -> None:
    x, y = long_tailed(50)
    for estimator in (KNeighborsRegressor(), make_pipeline(StandardScaler(), LinearRegression())):
        with pytest.raises(
            ArgumentTypeError, match=r"SampleWeighted\.fit: fit of the estimator must take sample_weight, got .*wrap"
        ):
            SampleWeighted(estimator).fit(x, y)
    with pytest.raises(LabelError):
        SampleWeighted(LinearRegression(), bins=dt.Bins.uniform(0, 1, width=1)).fit(x, y)
    with pytest.raises(ValueError, match="non-zero"):
        SampleWeighted(LinearRegression()).fit(x, y, sample_weight=np.zeros(50))
    make_pipeline(StandardScaler(), SampleWeighted(LinearRegression())).fit(x, y)


@pytest.mark.filterwarnings("ignore:.*the weights reduce the effective sample:dir_toolkit.errors.DirToolkitWarning")
def test_scores_are_those_of_a_loop_over_bins_and_choose_in_a_search() -> None:
    x, y = long_tailed(400)
    axis = dt.Bins.uniform(0, 50, count=50)
    constant = DummyRegressor(strategy="median").fit(x, y)
    index, errors = axis.index(y), np.abs(np.median(y) - y)
    by_bin = [errors[index == b].mean() for b in range(50) if (index == b).any()]
    assert bmae_scorer(y, axis)(constant, x, y) == pytest.approx(-np.mean(by_bin), rel=1e-12)
    beyond = np.r_[y, 80.0]
    assert np.isfinite(bmae_scorer(y, axis)(constant, np.r_[x, x[:1]], beyond))
    few, counts = few_shot_scorer(y, axis), np.bincount(index, minlength=len(axis))
    rare = counts < 0.2 * counts.sum() / len(axis)  # a fifth of what an even spread would give
    assert 0 < rare[index].sum() < len(y) / 4
    assert few(constant, x, y) == pytest.approx(-errors[rare[index]].mean(), rel=1e-12)
    with pytest.warns(dt.DirToolkitWarning, match="no test label is rare, so that the score is NaN"):
        assert np.isnan(few(constant, x[:3], np.full(3, np.median(y))))
    with pytest.raises(ValueError, match=r"must have the same shape|target"):
        few(constant, x, y[:, None])
    for scorer in (bmae_scorer(y), few_shot_scorer(y)):
        schemes = {"scheme": ["sqrt_inverse", "inverse"]}
        search = GridSearchCV(SampleWeighted(LinearRegression()), schemes, scoring=scorer, cv=2, n_jobs=1).fit(x, y)
        assert (search.cv_results_["mean_test_score"] < 0).all()
