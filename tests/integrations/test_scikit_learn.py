"""scikit-learn's own checks of the estimators, and what these promise beyond them."""

from __future__ import annotations

import functools
import pickle
import re
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

pytest.importorskip("sklearn", minversion="1.6")

from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import dir_toolkit as dt
from dir_toolkit.errors import ArgumentTypeError, DirToolkitError, LabelError, NonFiniteLossError, SettingsError
from dir_toolkit.integrations.scikit_learn import LongTailClassifier, LongTailRegressor, PriorAdjusted, SampleWeighted
from dir_toolkit.integrations.scikit_learn._columns import Columns
from dir_toolkit.integrations.scikit_learn._estimator import folds, validation_rows
from dir_toolkit.integrations.scikit_learn._members import MemberHead, Members

QUICK: dict[str, Any] = {"hidden": (16,), "epochs": 15, "lr": 3e-2, "batch_size": 64}
QUICKER: dict[str, Any] = {**QUICK, "epochs": 4, "lr": 0.1}
REGRESSOR = LongTailRegressor(**QUICK, head="linear", members=1, random_state=0)
CLASSIFIER = LongTailClassifier(**QUICK, random_state=0)
NOT_APPLICABLE = {
    # Weight two is twice the gradient, not two places in the order of rows; whole batches are tested below.
    "check_sample_weight_equivalence_on_dense_data": "training is stochastic: its batches are of rows, not of weights",
    "check_sample_weight_equivalence_on_sparse_data": "as on dense data",
}


# Tables of these tests are small.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* tau is chosen on :dir_toolkit.errors.DirToolkitWarning"),
    pytest.mark.filterwarnings("ignore:.*the weights reduce the effective sample:dir_toolkit.errors.DirToolkitWarning"),
]


@pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning")  # many of their tables are noise
@parametrize_with_checks(
    [LongTailRegressor(**QUICKER, members=2), LongTailClassifier(**QUICKER)],
    expected_failed_checks=lambda estimator: NOT_APPLICABLE,
)
def test_the_checks_of_scikit_learn_pass(estimator: Any, check: functools.partial[Any]) -> None:
    check(estimator)


def long_tailed(n: int, seed: int, *, even: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Labels in [0, 50], mostly small, seen through two noisy columns."""
    random = np.random.default_rng(seed)
    y = random.uniform(0, 50, n) if even else np.minimum(random.exponential(5, n), 50)
    return np.log1p(y / 4)[:, None] + random.normal(size=(n, 2)) * [0.4, 1.0], y


def two_classes(n: int, seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds; ``share`` of the rows are rare."""
    random = np.random.default_rng(seed)
    rare = np.arange(n) < share * n
    return random.normal(size=(n, 2)) + 1.5 * rare[:, None], np.where(rare, "rare", "usual")


@pytest.fixture(scope="module")
def regressor() -> LongTailRegressor:
    bins = dt.Bins.uniform(0, 50, width=1)
    return LongTailRegressor(**QUICK, head="linear", members=2, most_mae=None, bins=bins, random_state=0).fit(
        *long_tailed(1000, 0)
    )


@pytest.fixture(scope="module")
def classifier() -> LongTailClassifier:
    return clone(CLASSIFIER).fit(*two_classes(1000, 0, 0.05))


def test_few_shot_labels_are_predicted_better_than_by_the_median_and_than_under_the_training_prior(
    regressor: LongTailRegressor,
) -> None:
    (_, y), (x_test, y_test) = long_tailed(1000, 0), long_tailed(2000, 1, even=True)
    density = dt.LabelDensity.count(y, regressor.bins_)
    few = density.regions()[regressor.bins_.index(y_test)] == "few"
    assert few.sum() > 300
    plain = pickle.loads(pickle.dumps(regressor))
    plain.model_.set_prior(None)

    def error(pred: Any) -> float:
        return float(np.abs(pred - y_test)[few].mean())

    assert error(regressor.predict(x_test)) < 0.9 * error(plain.predict(x_test)) < 0.9 * error(np.median(y))


def test_tau_is_chosen_on_held_out_rows_and_moves_predictions_to_rare_labels(regressor: LongTailRegressor) -> None:
    x, y = long_tailed(1000, 0)
    assert regressor.tau_choice_.tau == regressor.tau_ > 0
    assert regressor.tau_choice_.by == "bmae"
    plain, full = (clone(regressor).set_params(tau=tau).fit(x, y) for tau in (0, 1.0))
    assert (plain.tau_, plain.tau_choice_) == (0, None)
    # The same network, since the same rows are held out: at tau 0 it speaks under the training prior.
    assert plain.predict(x).mean() + 0.5 < full.predict(x).mean()
    copied = pickle.loads(pickle.dumps(regressor))
    copied.model_.set_prior("uniform", 1.0)
    np.testing.assert_array_equal(copied.predict(x), full.predict(x))


def test_intervals_hold_labels_as_often_as_they_say() -> None:
    x, y = long_tailed(1000, 0)
    plain = LongTailRegressor(**QUICK, head="linear", members=2, tau=0, sigma=0.5, random_state=0).fit(x, y)
    x_test, y_test = long_tailed(4000, 2)
    for level in (0.5, 0.9):
        lower, upper = plain.predict_interval(x_test, level=level)
        assert abs(((lower <= y_test) & (y_test <= upper)).mean() - level) < 0.06
    narrow, wide = (np.subtract(*plain.predict_interval(x_test, level)[::-1]) for level in (0.5, 0.9))
    assert (narrow < wide).all()


def test_the_axis_is_the_one_given_or_that_of_the_labels() -> None:
    x = np.arange(300.0)[:, None]
    short = clone(REGRESSOR).set_params(epochs=1, patience=None, tau=0)
    assert short.fit(x, x[:, 0] ** 2).bins_ == dt.Bins.auto(x[:, 0] ** 2)
    own = dt.Bins.from_edges([0, 10, 100, 400])
    assert clone(short).set_params(bins=own, sigma=5).fit(x, x[:, 0]).bins_ == own


@pytest.mark.parametrize("estimator", [REGRESSOR, CLASSIFIER])
def test_weight_zero_is_as_good_as_absent_and_the_scale_of_weights_does_not_matter(estimator: Any) -> None:
    x, y = long_tailed(200, 0)
    y = y if estimator is REGRESSOR else y > 5
    weight = np.random.default_rng(0).choice([0.0, 1.0, 2.0], 200)
    weight[np.argmax(y)] = 0  # the axis, too, must not know of it
    one = clone(estimator).fit(x, y, sample_weight=weight).predict(x)
    without = clone(estimator).fit(x[weight > 0], y[weight > 0], sample_weight=8 * weight[weight > 0]).predict(x)
    np.testing.assert_array_equal(one, without)
    assert not np.array_equal(one, clone(estimator).fit(x, y).predict(x))


@pytest.mark.parametrize("estimator", [REGRESSOR, CLASSIFIER])
def test_in_whole_batches_weight_two_is_seen_twice(estimator: Any) -> None:
    x, y = long_tailed(60, 0)
    y = y if estimator is REGRESSOR else y > 5
    twice = np.arange(60) < 25
    whole = clone(estimator).set_params(batch_size=1000, patience=None, tau=0, epochs=15)
    if estimator is REGRESSOR:  # The axis that labels are given depends on how many they are.
        whole.set_params(bins=dt.Bins.uniform(0, 50, count=50))
    weighted = clone(whole).fit(x, y, sample_weight=1.0 + twice)
    repeated = clone(whole).fit(np.r_[x, x[twice]], np.r_[y, y[twice]])
    read = "predict" if estimator is REGRESSOR else "predict_proba"
    printed = [getattr(one, read)(x) for one in (weighted, repeated, clone(whole).fit(x, y))]
    np.testing.assert_allclose(printed[0], printed[1], atol=2e-3)
    assert np.abs(printed[0] - printed[2]).max() > 10 * np.abs(printed[0] - printed[1]).max()


def test_weights_of_lds_raise_predictions() -> None:
    x, y = long_tailed(300, 0)
    usual = clone(REGRESSOR).set_params(bins=dt.Bins.uniform(0, 50, width=1), head="regression", patience=None)
    means = [clone(usual).set_params(weights=weights).fit(x, y).predict(x).mean() for weights in (None, "inverse")]
    assert means[0] + 0.5 < means[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "gaussian"},
        {"head": "regression", "loss": "balanced_mse"},
        {"head": "affinity", "loss": "crps", "epochs": 40},
        {"adjust": "in_loss", "tau": 0.5},
        {"hidden": (), "patience": None, "decode": "expectation", "weights": "dense", "epochs": 40},
    ],
)
def test_regressors_of_every_kind_learn(changes: dict[str, Any]) -> None:
    x, y = long_tailed(400, 0)
    model = clone(REGRESSOR).set_params(**{"epochs": 10, **changes}).fit(x, y)
    assert np.corrcoef(model.predict(x), y)[0, 1] > 0.6
    if changes.get("head") == "gaussian":
        lower, upper = model.predict_interval(x, 0.5)
        assert ((lower < model.predict(x)) & (model.predict(x) < upper)).all()


def test_probabilities_sum_to_one_and_agree_with_decisions(classifier: LongTailClassifier) -> None:
    x, _ = two_classes(500, 1, 0.5)
    shares, odds = classifier.predict_proba(x), classifier.decision_function(x)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(odds, np.log(shares[:, 1] / shares[:, 0]), rtol=1e-9)
    assert classifier.classes_.tolist() == ["rare", "usual"]
    np.testing.assert_array_equal(classifier.predict(x), np.where(odds > 0, "usual", "rare"))


@pytest.mark.filterwarnings("ignore:.* epoch 3 of .* had the least loss:dir_toolkit.errors.DirToolkitWarning")
def test_logit_adjustment_finds_rare_classes(classifier: LongTailClassifier) -> None:
    (x, y), (x_test, y_test) = two_classes(1000, 0, 0.05), two_classes(1000, 1, 0.5)
    after = clone(classifier).set_params(adjust="after", tau="auto").fit(x, y)
    plain = clone(classifier).set_params(tau=0).fit(x, y)
    weighed = clone(plain).set_params(weights="inverse").fit(x, y)
    margin = clone(plain).set_params(head="affinity", adjust="after").fit(*two_classes(400, 0, 0.5))
    assert after.tau_choice_.by == "balanced_error"
    assert after.tau_ == after.tau_choice_.tau > 0
    result = {
        name: (model.predict(x_test) == y_test).mean() for name, model in locals().items() if hasattr(model, "tau_")
    }
    assert result["plain"] + 0.1 < min(result["classifier"], result["after"], result["weighed"])
    assert result["margin"] > 0.7


@pytest.mark.parametrize("estimator", [REGRESSOR, CLASSIFIER])
def test_a_seed_decides_all_and_torchs_own_random_numbers_go_on(estimator: Any) -> None:
    x, y = long_tailed(100, 0)
    y = y if estimator is REGRESSOR else y > 5
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode():  # which a caller may have entered
        one, again = (clone(estimator).fit(x, y) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = clone(estimator).set_params(random_state=1).fit(x, y)
    drawn = np.random.RandomState(0)
    first, second = (clone(estimator).set_params(random_state=drawn).fit(x, y) for _ in range(2))
    assert one.history_ == again.history_ == first.history_
    assert len({str(model.history_) for model in (one, other, second)}) == 3


@pytest.mark.parametrize("estimator", [REGRESSOR, CLASSIFIER])
def test_it_goes_through_pipelines_searches_folds_and_pickle(estimator: Any) -> None:
    x, y = long_tailed(120, 0)
    y = y if estimator is REGRESSOR else y > 5
    piped = make_pipeline(QuantileTransformer(n_quantiles=50), clone(estimator).set_params(epochs=5))
    assert np.isfinite(cross_val_score(piped, x, y, cv=2)).all()
    name = estimator.__class__.__name__.lower()
    search = GridSearchCV(piped, {f"{name}__tau": [0.0, 1.0], f"{name}__hidden": [(), (8,)]}, cv=2).fit(x, y)
    assert len(search.cv_results_["params"]) == 4
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    copied = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(copied.predict(x), search.predict(x))


def test_patience_keeps_the_best_epoch_and_verbose_prints_each(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = long_tailed(100, 0)
    model = clone(REGRESSOR).set_params(patience=3, epochs=300, verbose=True).fit(x, y)
    losses = [row["val_loss"] for row in model.history_]
    assert len(losses) == model.best_epochs_.max() + 3 < 300
    assert min(losses) == losses[model.best_epochs_.max() - 1]
    assert len(capsys.readouterr().out.splitlines()) == len(losses)
    patient = clone(REGRESSOR).set_params(patience=None, epochs=4, tau=1).fit(x, y)
    assert patient.best_epochs_.max() == len(patient.history_) == 4
    assert "val_loss" not in patient.history_[0]  # nothing is held out


def test_rows_are_held_out_along_the_labels_and_no_class_loses_its_last() -> None:
    random, axis = np.random.RandomState(0), dt.Bins.uniform(0, 1000, count=10)
    labels = random.permutation(1000.0 * np.arange(100) / 99)
    held = np.sort(labels[validation_rows(random, labels, 0.1, axis)])
    assert (dt.LabelDensity.count(held, axis).counts == 1).all()
    classes = np.array([0] * 50 + [1, 1, 2])
    for _ in range(50):
        rows = validation_rows(random, classes, 0.5, dt.Bins.classes(3))
        assert set(np.delete(classes, rows)) == {0, 1, 2}
    assert len(validation_rows(random, np.array([0.0, 1.0]), 0.01, axis)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "forest"}, r"LongTailRegressor\.fit: head must be one of 'auto', 'linear', .*got 'forest'"),
        ({"loss": "l1"}, "loss must be one of 'cross_entropy'"),
        ({"weights": "lds"}, r"LongTailRegressor\.fit: weights must be one of 'inverse', .*got 'lds'"),
        ({"tau": -1}, r"LongTailRegressor\.fit: tau must be >= 0, got -1"),
        ({"tau": "best"}, r"LongTailRegressor\.fit: tau must be one of 'auto', got 'best'"),
        ({"tau": 1.0, "head": "gaussian"}, 'tau must be "auto" .not used. with head='),
        ({"adjust": "in_loss"}, 'tau must be a number with adjust="in_loss"'),
        ({"adjust": "before"}, r"LongTailRegressor\.fit: adjust must be one of 'after', 'in_loss', got 'before'"),
        ({"hidden": (0,)}, r"LongTailRegressor\.fit: hidden must be at least 1, got 0"),
        ({"hidden": 64}, r"LongTailRegressor\.fit: hidden must be a tuple of whole numbers, got 64\. Use \(64,\)"),
        ({"by": "rmse"}, r"LongTailRegressor\.fit: by must be one of 'bmae', 'mae', 'bmse', 'mse', got"),
        ({"most_mae": 0.5}, r"LongTailRegressor\.fit: most_mae must be >= 1, got 0.5"),
        ({"members": 0}, r"LongTailRegressor\.fit: members must be at least 1, got 0"),
        ({"members": 2, "head": "cosine"}, "members must be 1 with heads whose scores are not linear, got 2"),
        ({"batch_size": "all"}, "batch_size must be one of 'auto', got 'all'"),
        ({"bins": 50}, r"LongTailRegressor\.fit: bins must be a Bins, got int"),
        ({"bins": dt.Bins.classes(3)}, r"LongTailRegressor\.fit: bins must cut a continuous label axis"),
        ({"validation_fraction": 0.6}, "validation_fraction must be > 0 and <= 0.5, got 0.6"),
        ({"patience": 0}, r"LongTailRegressor\.fit: patience must be at least 1, got 0"),
        ({"device": "abacus"}, 'device must be "auto", "cpu"'),
        ({"head": "auto", "loss": "weighted_mse"}, r'loss must be None with head="auto".* or head="regression"\.$'),
        ({"head": "regression", "decode": "mode"}, "decode must be left out with head='regression', which has no bins"),
        ({"head": "gaussian", "sigma": 2.0}, "sigma must be left out with head='gaussian', which has no bins, got 2.0"),
    ],
)
def test_bad_settings_of_a_regressor_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DirToolkitError, match=message):
        clone(REGRESSOR).set_params(**changes).fit(*long_tailed(50, 0))


def test_bad_settings_of_training_are_all_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"epochs must be at least 1, got 0.\n  lr must be > 0, got -1"):
        clone(CLASSIFIER).set_params(epochs=0, lr=-1).fit([[0.0], [1.0]], [0, 1])
    with pytest.raises(
        DirToolkitError, match=r"LongTailClassifier\.fit: head must be one of 'linear', 'cosine', 'affinity'"
    ):
        clone(CLASSIFIER).set_params(head="regression").fit([[0.0], [1.0]], [0, 1])


def test_bad_labels_are_refused() -> None:
    x, y = long_tailed(50, 0)
    with pytest.raises(ValueError, match="y must hold at least two different labels, got only 3"):
        REGRESSOR.fit(x, np.full(50, 3.0))
    with pytest.raises(ArgumentTypeError, match=r"LongTailRegressor\.fit: y must be integers or floats, got dtype <U2"):
        REGRESSOR.fit(x, np.full(50, "30"))
    with pytest.raises(ValueError, match="the largest label must fit into float32"):
        REGRESSOR.fit(x, 1e300 * y)
    with pytest.raises(LabelError, match="index"):
        clone(REGRESSOR).set_params(bins=dt.Bins.uniform(0, 2, width=1)).fit(x, y)
    with pytest.raises(ValueError, match="Found array with dim 3"):
        REGRESSOR.fit(x, np.zeros((50, 2, 2)))
    with pytest.raises(ValueError, match="Input y contains NaN"):
        REGRESSOR.fit(x, np.where(y > 5, np.nan, y))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        REGRESSOR.fit(np.where(x > 1, np.nan, x), y)
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        CLASSIFIER.fit(x[:1], [1])
    with pytest.raises(ValueError, match="y must hold at least two classes, got one class, "):
        CLASSIFIER.fit(x, np.ones(50))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        CLASSIFIER.fit(x, y)
    with pytest.raises(
        ValueError, match=r"y must hold a label twice, to validate on, got each once. Pass patience=None"
    ):
        CLASSIFIER.fit(x[:3], [0, 1, 2])


def test_bad_weights_and_untrained_or_diverging_models_are_refused() -> None:
    x, y = long_tailed(50, 0)
    with pytest.raises(ValueError, match=r"(?i)weights? .*(zero|positive)"):
        REGRESSOR.fit(x, y, sample_weight=np.zeros(50))
    with pytest.raises(ValueError, match="Negative values"):
        REGRESSOR.fit(x, y, sample_weight=-np.ones(50))
    with pytest.raises(NotFittedError):
        LongTailRegressor().predict_interval(x)
    with pytest.raises(NotFittedError):
        LongTailClassifier().predict(x)
    with pytest.raises(
        NonFiniteLossError, match=r"LongTailRegressor\.fit: the loss must be finite, got .* in epoch .* Lower lr"
    ):
        clone(REGRESSOR).set_params(head="regression", loss="weighted_mse", lr=1e30, hidden=()).fit(x, y)
    point = clone(REGRESSOR).set_params(head="regression", epochs=1).fit(x, y)
    with pytest.raises(RuntimeError, match=r"must give intervals of a label.* Call calibrate_intervals first, or"):
        point.predict_interval(x)
    with pytest.raises(ValueError, match="level must be > 0 and < 1, got 1"):
        clone(REGRESSOR).set_params(epochs=1).fit(x, y).predict_interval(x, level=1)


# ---- weights and prior ----


@pytest.mark.parametrize(
    ("weights", "adjust", "sampled"),
    [
        *((None, *way) for way in (("in_loss", False), ("after", False), ("after", True))),
        ("sqrt_inverse", "after", False),
        ("inverse", "after", True),
        ("effective_number", "in_loss", False),
        ("dense", "after", True),
    ],
)
def test_with_columns_that_tell_nothing_classes_come_out_even_under_any_weights(
    weights: Any, adjust: Any, sampled: bool
) -> None:
    y = np.repeat([0, 1, 2], [180, 40, 20])
    model = LongTailClassifier(
        hidden=(), weights=weights, tau=1.0, adjust=adjust, patience=None, batch_size=240, random_state=0
    )
    model.set_params(**{"epochs": 400, "lr": 2.0} if weights == "dense" else {"epochs": 150, "lr": 0.3})
    model.fit(np.zeros((240, 1)), y, sample_weight=np.where(y == 1, 3.0, 1.0) if sampled else None)
    np.testing.assert_allclose(model.predict_proba([[0.0]]), 1 / 3, atol=1e-3)
    model.model_.set_prior(None)
    if weights is None and not sampled:  # and without the adjustment they do not
        np.testing.assert_allclose(model.predict_proba([[0.0]]), [[0.75, 1 / 6, 1 / 12]], atol=1e-3)


@pytest.mark.parametrize(
    ("weights", "spread", "sampled"),
    [
        *((None, *way) for way in (({"sigma": 0}, False), ({}, False), ({}, True))),
        ("sqrt_inverse", {}, True),
        ("inverse", {"sigma": 0}, False),
        ("effective_number", {}, False),
        ("dense", {"sigma": 0}, True),
    ],
)
def test_with_columns_that_tell_nothing_labels_come_out_even_under_any_weights(
    weights: Any, spread: dict[str, Any], sampled: bool
) -> None:
    counts = np.array([60] * 6 + [20] * 6 + [5] * 6)
    axis = dt.Bins.uniform(0, 18, width=1)
    y = np.repeat(axis.centers, counts)
    settings: dict[str, Any] = {"hidden": (), "head": "linear", "patience": None, "batch_size": 600, **spread}
    model = LongTailRegressor(
        **settings, bins=axis, weights=weights, tau=1.0, members=1, weight_decay=0.0, random_state=0
    )
    model.set_params(**{"epochs": 500, "lr": 2.0} if weights == "dense" else {"epochs": 200, "lr": 3.0})
    model.fit(np.zeros((len(y), 1)), y, sample_weight=np.where(y < 9, 3.0, 1.0) if sampled else None)
    one = torch.zeros(1, 1, dtype=torch.float64)
    np.testing.assert_allclose(model.model_(one).distribution[0].detach().numpy(), 1 / 18, rtol=1e-2)
    assert abs(model.predict([[0.0]])[0] - 9) < 0.05
    copied = pickle.loads(pickle.dumps(model))
    copied.model_.set_prior("uniform")
    np.testing.assert_array_equal(copied.predict([[0.0]]), model.predict([[0.0]]))
    model.model_.set_prior(None)
    if weights is None:
        assert model.predict([[0.0]])[0] < 5


# ---- what tables hold ----


def sentinels(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two columns that tell the label and four that do not, in one of which 9999 stands for a missing value; the labels
    and the rows that hold no such value. The rows held out are known, since they are drawn first."""
    random, drawn = np.random.default_rng(seed), np.random.RandomState(seed)
    x = random.normal(size=(400, 6))
    y = 30 + 10 * x[:, 0] + 3 * x[:, 1] ** 2 + 0.1 * random.normal(size=400)
    drawn.randint(2**31 - 1)
    held = validation_rows(drawn, y, 0.15, dt.Bins.uniform(-1000, 1000, count=2))
    own = np.setdiff1d(np.arange(400), held)
    rows = {"held out": held[3:4], "trained on": own[3:4], "both": np.r_[held[3], own[3]], "many": own[:20]}
    place, which = kind.split(", ")
    if place == "constant column":
        x[:, 5] = 0
    x[rows[which], 0 if place == "column that tells" else 5] = 9999
    return x, y, np.setdiff1d(np.arange(400), rows[which])


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("constant column, held out", "linear"),
        ("constant column, trained on", "auto"),
        ("constant column, both", "linear"),
        ("useless column, held out", "auto"),
        ("useless column, trained on", "linear"),
        ("column that tells, held out", "linear"),
        ("column that tells, trained on", "auto"),
        ("column that tells, many", "linear"),
        ("column that tells, many", "auto"),
    ],
)
def test_sentinels_in_a_few_rows_do_not_spoil_the_others(kind: str, head: Any) -> None:
    members = 2 if head == "auto" else 1
    settings: dict[str, Any] = {**QUICK, "hidden": (32,), "epochs": 20}
    model = LongTailRegressor(**settings, head=head, members=members, random_state=0)
    x, y, usual = sentinels(kind, 0)
    error = np.abs(model.fit(x, y).predict(x[usual]) - y[usual]).mean()
    assert error < (4 if "many" in kind else 2.5)  # where a constant errs by 8
    wild = model.predict(np.full((3, 6), [[1e300], [9999.0], [-9999.0]]))
    assert (wild >= model.bins_.edges[0]).all()
    assert (wild <= model.bins_.edges[-1]).all()


def test_a_column_that_was_constant_in_training_says_nothing_later() -> None:
    x, y = long_tailed(200, 0)
    x = np.c_[x, np.full(200, 0.3)]
    for estimator, labels in ((REGRESSOR, y), (CLASSIFIER, y > 5)):
        model = clone(estimator).fit(x, labels)
        np.testing.assert_array_equal(model.predict(x), model.predict(np.c_[x[:, :2], np.full(200, 9999.0)]))
        assert not np.array_equal(model.predict(x), model.predict(x[:, ::-1]))


def test_columns_are_cut_off_far_from_all_others_and_cut_into_pieces() -> None:
    x, _ = long_tailed(200, 0)
    columns = Columns(x, np.ones(200))
    inputs = columns(x)
    assert inputs.shape == (200, 2 + 2 * 12)
    np.testing.assert_allclose(inputs[:, :2], (x - x.mean(0)) / x.std(0), rtol=1e-12, atol=1e-12)
    assert np.abs(columns(np.array([[1e9, -1e9]]))[:, :2]).tolist() == [[10.0, 10.0]]
    # A piece rises from -1 to 1 between two twelfths of the rows and is constant elsewhere.
    ends = np.sort(x[:, 0])[[0, *(np.ceil(200 * np.arange(1, 13) / 12).astype(int) - 1)]]
    expected = np.stack([np.interp(x[:, 0], [low, high], [-1, 1]) for low, high in pairwise(ends)], 1)
    np.testing.assert_allclose(inputs[:, 2:14], expected, atol=1e-9)
    x[7, 0] = 9999
    scaled = Columns(x, np.ones(200))(x)[:, :2]
    assert np.delete(scaled, 7, 0).std(0).min() > 0.2  # where the plain standard deviation leaves 0.001
    assert scaled[7, 0] == scaled[:, 0].max() <= 10
    twice = Columns(x[:100], np.repeat([2.0, 1.0], 50))(x)
    np.testing.assert_allclose(twice, Columns(np.r_[x[:50], x[:100]], np.ones(150))(x), rtol=1e-12, atol=1e-12)
    wide = np.random.default_rng(0).normal(size=(50, 300))
    assert Columns(wide, np.ones(50))(wide).shape == (50, 300)


def test_zeros_are_predicted_as_zeros() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(700, 3))
    y = np.maximum(0, 10 * x[:, 0] - 8 + 0.5 * random.normal(size=700))
    zero = y == 0
    assert zero.mean() > 0.7
    model = LongTailRegressor(**QUICK, members=2, random_state=0)
    pred = model.fit(x, y).predict(x)
    width = float(np.diff(model.bins_.edges)[0])
    assert np.median(np.abs(pred[zero])) < 0.1 * width
    assert np.corrcoef(pred[~zero], y[~zero])[0, 1] > 0.7


# ---- what is told ----


def printed(estimator: Any, x: np.ndarray, y: np.ndarray) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(x, y)
    assert {warning.category for warning in caught} <= {dt.errors.DirToolkitWarning}
    return [str(warning.message) for warning in caught]


def test_a_regressor_worse_than_a_constant_says_so() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(400, 3)), random.normal(size=400)
    diverged = clone(REGRESSOR).set_params(head="regression", loss="weighted_mse", patience=100, epochs=1, lr=1.0)
    (message,) = (text for text in printed(diverged, x, y) if "mean absolute error" in text)
    assert re.search(
        r"on 60 held-out rows the mean absolute error is .*, and 0\..* for a constant, the median", message
    )
    assert printed(clone(REGRESSOR), *long_tailed(400, 0)) == []


# ---- the default ----


@pytest.fixture(scope="module")
def default() -> LongTailRegressor:
    return LongTailRegressor(**QUICK, members=3, random_state=0).fit(*long_tailed(700, 0))


def test_the_default_chooses_on_held_out_rows_between_a_network_and_trees(default: LongTailRegressor) -> None:
    (x, y), (x_test, y_test) = long_tailed(700, 0), long_tailed(2000, 1, even=True)
    tried = {(row["share"], row["tau"]): row for row in default.choice_}
    chosen, least = tried[default.share_, default.tau_], min(row["mae"] for row in tried.values())
    constant = np.abs(y - np.median(y)).mean()
    allowed = [row for row in tried.values() if row["mae"] <= min(1.5 * least, constant)]
    assert chosen == min(allowed, key=lambda row: row["bmae"])
    number = default.number_(torch.from_numpy(default.columns_(x_test))).prediction
    trees = torch.from_numpy(np.mean([trees.predict(x_test) for trees in default.trees_], 0))
    assert 0 < default.trees_share_ < 1
    forecasts = default.trees_share_ * trees + (1 - default.trees_share_) * number
    binned = default.model_(forecasts[:, None]).prediction
    mean = (default.share_ * number + (1 - default.share_) * binned).detach().numpy()
    np.testing.assert_allclose(default.predict(x_test), mean.clip(y.min(), y.max()), rtol=1e-9)
    assert np.abs(default.predict(x_test) - y_test).mean() < 0.7 * np.abs(np.median(y) - y_test).mean()
    lower, upper = default.predict_interval(x_test)
    assert ((lower <= default.predict(x_test)) & (default.predict(x_test) <= upper)).all()
    by_mae = clone(default).set_params(by="mae", epochs=3).fit(x, y)
    least = min(by_mae.choice_, key=lambda row: row["mae"])
    assert (by_mae.share_, by_mae.tau_) == (least["share"], least["tau"])
    fixed = clone(default).set_params(tau=0.7, epochs=2).fit(x, y)
    assert fixed.tau_ == 0.7
    assert {row["tau"] for row in fixed.choice_} == {0.7}


def test_on_noise_with_a_long_tail_the_default_is_no_worse_than_a_constant() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2000, 3)), np.maximum(np.exp(random.normal(0, 1.5, 2000)) - 0.5, 0)
    model = LongTailRegressor(hidden=(16,), members=2, epochs=5, random_state=0).fit(x[:800], y[:800])
    constant = np.abs(np.median(y[:800]) - y[800:]).mean()
    assert np.abs(model.predict(x[800:]) - y[800:]).mean() < 1.03 * constant


def test_the_forecast_leans_on_what_errs_less() -> None:
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (400, 2))
    steps = np.floor(4 * x[:, 0]) + np.sign(x[:, 1])  # which trees know and one line does not
    shares = [
        LongTailRegressor(hidden=(), members=2, epochs=epochs, lr=lr, random_state=0).fit(x, y).trees_share_
        for y, epochs, lr in ((steps, 1, 1e-6), (10 * x[:, 0] - 3 * x[:, 1], 30, 0.03))
    ]
    assert shares[0] == 1
    assert shares[1] < 0.5


def test_a_mistyped_label_spoils_nothing() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(600, 4))
    y = 30 + 10 * x[:, 0]
    y[0] = 1e6
    model = LongTailRegressor(**QUICK, members=2, random_state=0).fit(x, y)
    assert np.median(np.abs(model.predict(x) - y)) < 1


def test_sparse_columns_are_those_of_the_dense_table() -> None:
    x, y = long_tailed(60, 0)
    x[x < 0.5] = 0
    for estimator, labels in ((REGRESSOR, y), (CLASSIFIER, y > 5)):
        one = clone(estimator).set_params(epochs=2)
        dense, sparse = clone(one).fit(x, labels), clone(one).fit(scipy.sparse.csr_matrix(x), labels)
        np.testing.assert_array_equal(dense.predict(x), sparse.predict(scipy.sparse.csc_array(x)))


def test_members_side_by_side_are_the_mean_of_each_by_itself() -> None:
    members, x = Members(3, (5, 8, 4)), torch.randn(7, 5)
    head = MemberHead(3, 4, 2)
    apart = head(members(x)).view(3, 7, 2)
    for k in range(3):
        by_hand = x
        for weight, bias in zip(members.weights, members.biases, strict=True):
            by_hand = (by_hand @ weight[k] + bias.view(3, -1)[k]).relu()
        torch.testing.assert_close(apart[k], by_hand @ head.weight[k] + head.bias.view(3, -1)[k])
    torch.testing.assert_close(head(members(x.expand(3, 7, 5))).view(3, 7, 2), apart)
    members.side_by_side = True
    torch.testing.assert_close(head.average()(members(x)), apart.mean(0))


def test_each_run_of_sorted_labels_has_one_row_in_each_fold() -> None:
    random = np.random.RandomState(0)
    labels = random.permutation(np.arange(22.0))
    fold = folds(random, labels, 4)[np.argsort(labels)]
    assert all(sorted(fold[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 20, 4))
    assert len(set(fold[20:])) == 2


@pytest.mark.parametrize("by", ["mse", "bmse"])
def test_auto_judges_by_squared_errors_where_it_is_told(by: Any) -> None:
    x, y = long_tailed(200, 0)
    chosen = LongTailRegressor(**QUICKER, members=2, random_state=0, by=by, most_mae=None).fit(x, y)
    least = min(row[by] for row in chosen.choice_)
    (row,) = [row for row in chosen.choice_ if (row["share"], row["tau"]) == (chosen.share_, chosen.tau_)]
    assert row[by] <= 1.02 * least
    with pytest.raises(DirToolkitError, match="by must be one of 'bmae', 'mae', 'bmse', 'mse', got 'rmse'"):
        LongTailRegressor(**QUICKER, by="rmse").fit(x, y)  # type: ignore[arg-type]


def test_masked_labels_are_refused_and_tensors_taken() -> None:
    x, y = long_tailed(60, 0)
    with pytest.raises(DirToolkitError, match=r"LongTailRegressor.fit: y must not be masked"):
        LongTailRegressor(**QUICKER).fit(x, np.ma.array(y, mask=y > 9))
    quick = {**QUICKER, "epochs": 1, "members": 2, "random_state": 0}
    tensor = torch.tensor(y, requires_grad=True)
    fitted = [LongTailRegressor(**quick).fit(x, labels).predict(x) for labels in (y, tensor)]
    assert np.array_equal(*fitted)


def test_several_targets_are_learnt_by_a_regressor_each() -> None:
    x, y = long_tailed(200, 0)
    both = np.stack([y, 100 - 3 * y], 1)
    options: dict[str, Any] = {**QUICKER, "members": 2, "random_state": 0}
    regressor = LongTailRegressor(**options).fit(x, both)
    alone = [LongTailRegressor(**options).fit(x, column) for column in both.T]
    assert np.array_equal(regressor.predict(x), np.stack([one.predict(x) for one in alone], 1))
    lower, upper = regressor.predict_interval(x, level=0.8)
    assert lower.shape == upper.shape == (200, 2)
    assert np.array_equal(lower[:, 1], alone[1].predict_interval(x, level=0.8)[0])
    assert regressor.score(x, both) > 0.1
    assert regressor.n_features_in_ == 2
    before = regressor.predict(x)
    with pytest.raises(DirToolkitError, match="head must be"):
        regressor.set_params(head="quantile").fit(x, y)
    assert np.array_equal(regressor.predict(x), before), "a refused fit leaves the fitted regressor as it was"
    regressor.set_params(head="auto")
    assert regressor.fit(x, both[:, :1]).predict(x).shape == (200,)
    assert regressor.estimators_ is None


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [
        (LongTailRegressor(**{**QUICKER, "epochs": 2}, members=2, random_state=0), {"epochs": 0}),
        (LongTailClassifier(**{**QUICKER, "epochs": 2}, random_state=0), {"epochs": 0}),
        (PriorAdjusted(LinearRegression(), random_state=0), {"decode": "bogus"}),
        (SampleWeighted(LinearRegression()), {"estimator": Ridge(alpha=-1)}),
    ],
)
def test_a_refused_fit_changes_nothing(estimator: Any, changes: dict[str, Any]) -> None:
    x, y = long_tailed(120, 0)
    y = y > 5 if isinstance(estimator, LongTailClassifier) else y
    model, unfitted = clone(estimator).fit(x, y), clone(estimator).set_params(**changes)
    before, attributes = model.predict(x), set(vars(model))
    with pytest.raises(ValueError, match="must be"):
        model.set_params(**changes).fit(x[:50, :1], y[:50])
    assert np.array_equal(model.predict(x), before)
    assert set(vars(model)) == attributes
    x[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        model.set_params(**estimator.get_params(deep=False)).fit(x[:50], y[:50])
    assert np.array_equal(model.predict(x[1:]), before[1:])
    with pytest.raises(ValueError, match="must be"):
        unfitted.fit(x[1:], y[1:])
    with pytest.raises(NotFittedError):
        unfitted.predict(x[1:])


def test_each_method_reaches_the_regressors_of_all_targets() -> None:
    x, y = long_tailed(120, 0)
    both = np.stack([y, 100 - 3 * y], 1)
    model = LongTailRegressor(**{**QUICKER, "epochs": 2}, members=2, random_state=0).fit(x, y)
    model.fit(x, both)
    assert not hasattr(model, "model_"), "the model of an earlier fit has gone"
    assert model.estimators_ is not None
    with pytest.raises(RuntimeError, match=r"single target, got 2 targets\. Use estimators_\[k\]\.scores"):
        model.scores(x)
    by_hand = pickle.loads(pickle.dumps(model.estimators_))
    before = model.predict(x)
    model.set_prior("uniform", 0.5)
    assert not np.array_equal(model.predict(x), before)
    model.calibrate_intervals(x, both, level=0.8)
    lower, _ = model.predict_interval(x)
    for k, one in enumerate(by_hand):
        one.set_prior("uniform", 0.5)
        one.calibrate_intervals(x, both[:, k], level=0.8)
        assert np.array_equal(one.predict_interval(x)[0], lower[:, k])
    with pytest.raises(DirToolkitError, match=r"y must have a column per target, got shape \(120,\)"):
        model.calibrate_intervals(x, y)
    both[0, 1] = np.nan
    with pytest.raises(DirToolkitError):
        model.calibrate_intervals(x, both, level=0.5)
    assert np.array_equal(model.predict_interval(x)[0], lower)
    with pytest.raises(NotFittedError):
        LongTailRegressor().set_prior("uniform")


def test_members_share_what_a_loss_learns() -> None:
    x = np.random.default_rng(0).normal(size=(200, 3))
    model = LongTailRegressor(head="regression", loss="balanced_mse", epochs=3, hidden=(8,), random_state=0)
    assert np.isfinite(model.fit(x, x[:, 0] + 3).predict(x)).all()


def test_tables_as_output_of_scikit_learn_change_nothing() -> None:
    x, y = long_tailed(80, 0)
    given = [clone(REGRESSOR).set_params(epochs=2), LongTailClassifier(epochs=2, random_state=0)]
    for estimator, labels in zip(given, (y, (y > np.median(y)).astype(int)), strict=True):
        plain = clone(estimator).fit(x, labels)
        with config_context(transform_output="pandas"):
            np.testing.assert_array_equal(clone(estimator).fit(x, labels).predict(x), plain.predict(x))
