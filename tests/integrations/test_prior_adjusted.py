"""Any regressor, adjusted from the prior of its labels to even ones."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, RepeatedKFold
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import dir_toolkit as dt
from dir_toolkit.errors import ArgumentError, ArgumentTypeError, LabelError, ShapeError
from dir_toolkit.integrations.scikit_learn import PriorAdjusted, SampleWeighted
from dir_toolkit.integrations.scikit_learn._windows import Windows
from dir_toolkit.labels import bin_shares, soft_labels

AXIS = dt.Bins.uniform(0, 50, count=25)
TREES = HistGradientBoostingRegressor(max_iter=30, random_state=0)


@parametrize_with_checks([PriorAdjusted(LinearRegression(), random_state=0)])
def test_the_checks_of_scikit_learn_pass(estimator: Any, check: functools.partial[Any]) -> None:
    check(estimator)


def long_tailed(n: int, seed: int, *, even: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy readings of a label that is exponential with a mean of five, or even over the axis."""
    random = np.random.default_rng(seed)
    y = random.uniform(0, 49, n) if even else np.minimum(random.exponential(5, n), 49)
    return y[:, None] + 5 * random.normal(size=(n, 2)), y


@pytest.fixture(scope="module")
def adjusted() -> PriorAdjusted:
    return PriorAdjusted(TREES, bins=AXIS, random_state=0).fit(*long_tailed(1500, 0))


def test_rare_labels_are_predicted_better_and_the_choice_is_the_best_that_was_allowed(adjusted: PriorAdjusted) -> None:
    (x, y), (x_test, y_test) = long_tailed(1500, 0), long_tailed(1000, 1, even=True)
    plain = np.abs(clone(TREES).fit(x, y).predict(x_test) - y_test).mean()
    assert np.abs(adjusted.predict(x_test) - y_test).mean() < 0.9 * plain
    assert adjusted.tau_ > 0
    most = np.abs(y - np.median(y)).mean()
    allowed = [row for row in adjusted.choice_ if row["mae"] <= most]
    assert min(allowed, key=lambda row: row["bmae"])["tau"] == adjusted.tau_


def test_each_row_is_forecast_by_a_clone_that_was_not_trained_on_it() -> None:
    x, y = long_tailed(200, 0)
    splits = list(KFold(4).split(x))
    model = PriorAdjusted(KNeighborsRegressor(1), bins=AXIS, cv=KFold(4)).fit(x, y)
    listed = PriorAdjusted(KNeighborsRegressor(1), bins=AXIS, cv=splits).fit(x, y)
    by_hand = np.empty(200)
    for train, test in splits:
        by_hand[test] = KNeighborsRegressor(1).fit(x[train], y[train]).predict(x[test])
    np.testing.assert_array_equal(model.model_.head.forecasts.numpy(), np.sort(by_hand))
    np.testing.assert_array_equal(model.predict(x), listed.predict(x))
    assert len(model.estimators_) == 4
    fewer = PriorAdjusted(LinearRegression(), bins=AXIS, cv=splits[:1]).fit(x, y)
    np.testing.assert_array_equal(fewer.labels_, y[splits[0][1]])


def test_parts_may_be_lists_masks_and_numbers_of_numpy() -> None:
    x, y = long_tailed(200, 0)
    splits = list(KFold(3).split(x))
    lists = [(train.tolist(), test.tolist()) for train, test in splits]
    masks = [(np.isin(np.arange(200), train), np.isin(np.arange(200), test)) for train, test in splits]
    first, *others = [PriorAdjusted(LinearRegression(), bins=AXIS, cv=cv).fit(x, y) for cv in (splits, lists, masks)]
    for other in others:
        np.testing.assert_array_equal(other.predict(x), first.predict(x))
    whole, of_numpy = [
        PriorAdjusted(LinearRegression(), bins=AXIS, cv=cv, random_state=0).fit(x, y) for cv in (5, np.int64(5))
    ]
    np.testing.assert_array_equal(of_numpy.predict(x), whole.predict(x))


def test_rows_that_are_forecast_more_than_once_count_once_by_the_mean() -> None:
    x, y = long_tailed(200, 0)
    cv = RepeatedKFold(n_splits=4, n_repeats=3, random_state=0)
    model = PriorAdjusted(KNeighborsRegressor(1), bins=AXIS, cv=cv).fit(x, y)
    by_hand = np.zeros(200)
    for train, test in cv.split(x):
        by_hand[test] += KNeighborsRegressor(1).fit(x[train], y[train]).predict(x[test]) / 3
    np.testing.assert_allclose(model.model_.head.forecasts.numpy(), np.sort(by_hand))
    np.testing.assert_array_equal(model.labels_, y)


def test_intervals_hold_what_they_say_and_calibrated_ones_in_every_region(adjusted: PriorAdjusted) -> None:
    x, y = long_tailed(3000, 2)
    model = pickle.loads(pickle.dumps(adjusted))
    lower, upper = model.predict_interval(x, level=0.8)
    assert 0.75 < np.mean((lower <= y) & (y <= upper)) < 0.97  # adjusted, so that common labels are held too often
    model.calibrate_intervals(x, y, level=0.9)
    x, y = long_tailed(3000, 3)
    lower, upper = model.predict_interval(x)
    assert ((lower <= model.predict(x)) & (model.predict(x) <= upper)).all()
    for region in np.unique(model.model_.density.regions()):
        own = model.model_.density.regions()[AXIS.index(y)] == region
        assert np.mean(((lower <= y) & (y <= upper))[own]) > (0.86 if own.sum() > 500 else 0.75)
    with pytest.raises(ArgumentError, match=r"level must be 0\.9, for which intervals are calibrated, got 0\.5"):
        model.predict_interval(x, level=0.5)


def test_the_prior_of_new_rows_is_estimated_and_predicted_under(adjusted: PriorAdjusted) -> None:
    model = pickle.loads(pickle.dumps(adjusted))
    x, y = long_tailed(2000, 4, even=True)
    estimate = dt.estimate_prior(model.scores(x), source=model.scores_, labels=model.labels_, bins=model.bins_)
    even = np.full(25, 1 / 25)
    before = np.abs(estimate.source.numpy() - even).sum() / 2
    assert np.abs(estimate.prior.numpy() - even).sum() / 2 < 0.5 * before
    refused, adjusted_alone = dataclasses.replace(estimate, refused=True), model.predict(x)
    model.set_prior(refused)
    np.testing.assert_array_equal(model.predict(x), adjusted_alone)
    model.set_prior(estimate.prior)
    assert (model.share_, model.tau_) == (0.0, 1.0)
    training = pickle.loads(pickle.dumps(adjusted))
    training.set_prior(None)
    assert np.abs(model.predict(x) - y).mean() < 0.9 * np.abs(training.predict(x) - y).mean()


def test_a_frozen_estimator_stays_as_it_is_and_takes_held_out_rows() -> None:
    x, y = long_tailed(600, 0)
    trees = clone(TREES).fit(x[:400], y[:400])
    model = PriorAdjusted(FrozenEstimator(trees), bins=AXIS).fit(x[400:], y[400:])
    assert model.estimators_[0].estimator is trees
    np.testing.assert_array_equal(np.sort(model.labels_), np.sort(y[400:]))
    with pytest.raises(ArgumentError, match=r"needs 20 rows that it was not trained on, got 5\. Keep some from"):
        PriorAdjusted(FrozenEstimator(trees), bins=AXIS).fit(x[:5], y[:5])


def quantile_shares(estimator: Any, x: Any, bins: dt.Bins) -> np.ndarray:
    center, levels = estimator.predict(x), np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    return bin_shares(center[:, None] + 4 * np.array([-1.3, -0.5, 0, 0.5, 1.3]), levels, bins)


@pytest.mark.parametrize(
    ("estimator", "forecast"),
    [
        (RandomForestClassifier(30, min_samples_leaf=5, random_state=0), "predict_proba"),
        (LinearRegression(), quantile_shares),
        (LinearRegression(), lambda estimator, x, bins: torch.from_numpy(estimator.predict(x)).float()),
    ],
)
def test_binned_forecasters_quantiles_and_functions(estimator: Any, forecast: Any) -> None:
    (x, y), (x_test, y_test) = long_tailed(800, 0), long_tailed(500, 1, even=True)
    model = PriorAdjusted(estimator, bins=AXIS, forecast=forecast, random_state=0).fit(x, y)
    assert np.abs(model.predict(x_test) - y_test).mean() < 0.6 * np.abs(np.median(y) - y_test).mean()
    lower, upper = model.predict_interval(x_test)
    assert np.mean((lower <= y_test) & (y_test <= upper)) > 0.5
    assert model.scores(x_test).shape == (500, 25)


def test_the_temperature_of_shares_is_judged_as_tau_is() -> None:
    def sharp(estimator: Any, x: Any, bins: dt.Bins) -> np.ndarray:
        center, levels = estimator.predict(x), np.array([0.1, 0.3, 0.5, 0.7, 0.9])
        return bin_shares(center[:, None] + 1.5 * np.array([-1.3, -0.5, 0, 0.5, 1.3]), levels, bins)

    x, y = long_tailed(400, 0)
    of_shares = functools.partial(PriorAdjusted, LinearRegression(), bins=AXIS, forecast=sharp, random_state=0)
    temperatures = {by: of_shares(by=by).fit(x, y).model_.settings["temperature"] for by in ("bmae", "mae")}
    assert temperatures == {"bmae": pytest.approx(1.27, abs=0.02), "mae": 1}


def test_weights_searches_and_weighted_boosters_go_through() -> None:
    x, y = long_tailed(300, 0)
    weight = np.random.default_rng(0).choice([0.0, 1.0, 2.0], 300)
    model = PriorAdjusted(LinearRegression(), bins=AXIS, cv=KFold(3)).fit(x, y, sample_weight=weight)
    assert len(model.labels_) == (weight > 0).sum()
    heavy = PriorAdjusted(LinearRegression(), bins=AXIS, cv=KFold(3)).fit(x, y, sample_weight=3 * weight)
    np.testing.assert_allclose(heavy.predict(x), model.predict(x), rtol=1e-9)
    inside = PriorAdjusted(SampleWeighted(TREES, bins=AXIS), bins=AXIS, cv=2)
    result = GridSearchCV(inside, {"estimator__estimator__max_depth": [1, 2], "tau": [0.0, 0.5]}, cv=2).fit(x, y)
    assert result.predict(x).shape == (300,)


def test_share_and_tau_are_judged_by_weights_while_each_bin_keeps_its_total() -> None:
    x, y = long_tailed(200, 0)
    frozen = FrozenEstimator(LinearRegression().fit(x, y))
    weight = np.where(y < 2, 4.0, 1.0)
    model = PriorAdjusted(frozen, bins=AXIS).fit(x, y, sample_weight=weight)
    blend = model.choice_[-1]  # the number alone
    assert blend["share"] == 1
    error = np.abs(np.clip(frozen.predict(x), y.min(), y.max()) - y)
    assert blend["mae"] == pytest.approx(np.average(error, weights=weight))
    assert blend["mse"] == pytest.approx(np.average(error**2, weights=weight))
    index, heavy = AXIS.index(y), np.where(np.arange(200) % 2, 3.0, 1.0)
    share = PriorAdjusted(frozen, bins=AXIS).fit(x, y)._held_out_weight(y)
    of_bins = [(share[index == b].sum(), np.average(error[index == b], weights=heavy[index == b])) for b in set(index)]
    model = PriorAdjusted(frozen, bins=AXIS).fit(x, y, sample_weight=heavy)
    assert model.choice_[-1]["bmae"] == pytest.approx(sum(total * mean for total, mean in of_bins))


def test_a_bin_without_held_out_labels_counts_as_often_as_a_test_set_has_labels_there() -> None:
    y = np.repeat([0.5, 1.5, 2.5, 3.5], [60, 6, 4, 1])
    held = np.array([0, 1, 2, 66, 67, 68])  # three labels of the first bin, and three of the third
    split = [(np.setdiff1d(np.arange(len(y)), held), held)]
    model = PriorAdjusted(LinearRegression(), bins=dt.Bins.uniform(0, 4, width=1), cv=split).fit(y[:, None], y)
    second, last = 1 - np.exp(-6 / 3), 1 - np.exp(-1 / 3)
    of_labels = np.repeat([1 + second / 2, 1 + second / 2 + last], 3) / 3 / (2 + second + last)
    np.testing.assert_allclose(model._held_out_weight(y[held]), of_labels)


class Booster:
    """A trained model that is no estimator of scikit-learn, as that of lightgbm.train."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        return np.zeros(len(x))


@pytest.mark.parametrize(
    ("estimator", "options", "error", "message"),
    [
        (LogisticRegression(), {}, ArgumentTypeError, "estimator must be a regressor, got LogisticRegression. Pass"),
        (LinearRegression(), {"forecast": "predict_proba"}, ArgumentTypeError, "must have predict_proba, got LinearR"),
        (Booster(), {}, ArgumentTypeError, r"estimator must be one of scikit-learn, .*, got Booster\. Use one around"),
        (FrozenEstimator(Booster()), {}, ArgumentTypeError, "estimator must be one of scikit-learn"),
        (LinearRegression(), {"forecast": "median"}, ArgumentError, "forecast must be one of 'predict', 'predict_pro"),
        (LinearRegression(), {"cv": 1}, ArgumentError, "cv must be"),
        (LinearRegression(), {"tau": -1}, ArgumentError, "tau must be"),
        (
            LinearRegression(),
            {"by": "rmse"},
            ArgumentError,
            "by must be one of 'bmae', 'mae', 'bmse', 'mse', got 'rmse'",
        ),
        (
            LinearRegression(),
            {"bins": dt.Bins.uniform(0, 10, count=5)},
            LabelError,
            "labels must lie on the label axis",
        ),
        (
            LinearRegression(),
            {"forecast": lambda e, x, b: np.zeros((len(x), 3))},
            ShapeError,
            r"shape \(40,\) or \(40, 25\)",
        ),
        (
            LinearRegression(),
            {"forecast": lambda e, x, b: x[:, 0] * np.nan},
            ArgumentError,
            "forecast returns must be fini",
        ),
        (LinearRegression(), {"forecast": lambda e, x, b: np.ones((len(x), 25))}, ArgumentError, "must sum to one"),
    ],
)
def test_what_does_not_fit_is_refused(estimator: Any, options: Any, error: Any, message: str) -> None:
    x, y = long_tailed(200, 0)
    with pytest.raises(error, match=message):
        PriorAdjusted(estimator, **{"bins": AXIS, **options}).fit(x, y)


def test_other_tables_than_those_of_the_fit_are_refused(adjusted: PriorAdjusted) -> None:
    with pytest.raises(ValueError, match="3 features"):
        adjusted.predict(np.zeros((2, 3)))
    x, y = long_tailed(50, 0)
    pipeline = make_pipeline(StandardScaler(), LinearRegression())
    message = r"the fit of estimator must take sample_weight, got Pipeline\. In a pipeline wrap its last step\."
    with pytest.raises(ArgumentTypeError, match=message):
        PriorAdjusted(pipeline).fit(x, y, sample_weight=np.ones(50))
    assert PriorAdjusted(pipeline).fit(x, y).predict(x).shape == (50,)


# ---- what lies beneath ----


def test_windows_are_the_labels_and_errors_of_the_nearest_rows_with_each_row_left_out() -> None:
    random = np.random.default_rng(0)
    forecasts = np.round(random.uniform(0, 50, 60), 0)  # with ties
    labels = np.clip(forecasts + random.normal(0, 3, 60), 0, 49.9)
    weight, target = random.uniform(0.5, 2, 60), soft_labels(torch.from_numpy(labels), AXIS, sigma=2.0).numpy()
    windows = Windows(*map(torch.from_numpy, (forecasts, labels, weight, target)), AXIS)
    assert windows.sizes == [8, 16, 32, 120]
    order = np.argsort(forecasts, kind="stable")
    for i in (0, 17, 59):
        below, above = (forecasts < forecasts[i]).sum(), (forecasts <= forecasts[i]).sum()
        for size, answer in zip(
            windows.sizes[:3], list(windows._answers(torch.from_numpy(forecasts), None))[:6:2], strict=True
        ):
            low, high = (
                min(max((below + above - size) // 2, 0), below),
                max(min((below + above + size + 1) // 2, 60), above),
            )
            rows = order[low:high]
            by_hand = weight[rows] @ target[rows] / weight[rows].sum()
            np.testing.assert_allclose(answer[i], by_hand, atol=1e-12)
    shares = windows(torch.from_numpy(forecasts)[:, None]).exp()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-9)


def test_no_row_is_in_its_own_windows() -> None:
    random = np.random.default_rng(0)
    forecasts = random.uniform(0, 30, 60)
    labels = np.clip(forecasts + random.normal(0, 3, 60), 0, 35)
    labels[5] = 49  # the only label in the last bin
    target = soft_labels(torch.from_numpy(labels), AXIS, sigma=1.0)
    windows = Windows(*map(torch.from_numpy, (forecasts, labels, np.ones(60))), target, AXIS)
    own = torch.from_numpy(forecasts[5:6])[:, None]
    assert windows(own).exp()[0, -1] > 1e-3, "a new row of this forecast may have this label"
    assert windows.log_shares[5, -1].exp() < 1e-9


def test_precise_forecasts_are_believed_and_useless_ones_give_the_prior() -> None:
    random = np.random.default_rng(0)
    labels = np.minimum(random.exponential(5, 2000), 49.9)
    target = soft_labels(torch.from_numpy(labels), AXIS, sigma=1.0)
    ones, values = torch.ones(2000, dtype=torch.float64), torch.from_numpy(labels)
    precise = Windows(values + 0.1 * torch.randn(2000).double(), values, ones, target, AXIS)
    place = torch.tensor([[3.0], [47.0]], dtype=torch.float64)  # where labels are rare, too
    assert precise(place).argmax(1).tolist() == [1, 23]
    useless = Windows(torch.randn(2000).double(), values, ones, target, AXIS)
    np.testing.assert_allclose(useless(torch.zeros(1, 1).double()).exp()[0], target.mean(0), atol=0.05)
    constant = Windows(torch.zeros(2000).double(), values, ones, target, AXIS)
    np.testing.assert_allclose(constant(torch.zeros(1, 1).double()).exp()[0], target.mean(0), atol=0.05)


def test_many_rows_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    forecasts = random.uniform(0, 50, 1000)
    labels = np.clip(forecasts + random.normal(0, 3, 1000), 0, 49.9)
    given = [torch.from_numpy(v) for v in (forecasts, labels, np.ones(1000))]
    target = soft_labels(given[1], AXIS, sigma=2.0)
    whole = Windows(*given, target, AXIS)
    monkeypatch.setattr("dir_toolkit.integrations.scikit_learn._windows._GROUPS", 256)
    grouped = Windows(*given, target, AXIS)
    assert len(grouped.forecasts) == 250
    place = torch.linspace(1, 49, 50).double()[:, None]
    assert (grouped(place).exp() - whole(place).exp()).abs().sum(1).mean() < 0.15


@pytest.mark.parametrize("part", [([0, 1, 2, 3], []), ([], [0, 1]), (list(range(30)), list(range(29, 40)))])
def test_a_part_without_rows_or_with_rows_of_its_training_is_refused(part: Any) -> None:
    x = np.linspace(0, 1, 60)[:, None]
    with pytest.raises(ArgumentError, match="each part of cv must have rows to train on and other rows to forecast"):
        PriorAdjusted(LinearRegression(), cv=[part]).fit(x, 9 * x[:, 0])


def test_calibrated_intervals_reach_beyond_the_labels_of_training() -> None:
    """On an unbounded axis. Cut off at the largest label of training they would hold none beyond it."""
    held = []
    for seed in range(4):
        random = np.random.default_rng(seed)
        y = random.lognormal(0, 1, 7160)
        x = (np.log(y) + random.normal(0, 0.5, len(y)))[:, None]
        base = FrozenEstimator(LinearRegression().fit(x[:100], y[:100]))
        model = PriorAdjusted(base).fit(x[100:260], y[100:260])
        assert model.predict_interval(x[3260:])[1].max() <= y[100:260].max() + 1e-5  # before they are calibrated
        model.calibrate_intervals(x[260:3260], y[260:3260], 0.9)
        lower, upper = model.predict_interval(x[3260:])
        assert (lower <= model.predict(x[3260:])).all()
        new, density = y[3260:], model.model_.density
        few = (density.regions() == "few")[density.bins.index(new)]
        held.append(((lower <= new) & (new <= upper))[few])
        assert held[-1][new[few] > y[100:260].max()].any()
    assert np.concatenate(held).mean() > 0.89  # of 4,025 labels
