"""Any regressor, with a distribution over the label axis that is adjusted towards rare labels."""
# ruff: noqa: N803, N806, since scikit-learn's tables are called X

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import check_cv
from sklearn.utils import Tags, _safe_indexing, check_random_state, get_tags, indexable
from sklearn.utils.validation import (
    _check_sample_weight,
    _num_samples,
    check_consistent_length,
    check_is_fitted,
    has_fit_parameter,
    validate_data,
)
from torch import Tensor

from ..._checks import distributions, finite, labels_array, number, one_of, require, whole
from ...labels.bins import Bins
from ...labels.decoding import Decoding
from ._blended import FEWEST, Blended, counted, model_of_forecasts, model_of_shares
from ._estimator import all_or_nothing, folds

__all__ = ["PriorAdjusted"]

Forecast = Literal["predict", "predict_proba"] | Callable[[Any, Any, Bins], Any]


class PriorAdjusted(Blended, MetaEstimatorMixin, BaseEstimator):
    """Any regressor or binned forecaster, whose predictions are adjusted from the training prior to a uniform prior.

    The rows are cut into ``cv`` parts. For each part a clone of the estimator is trained on the others and forecasts
    it, so that no forecast is of a row that was trained on. These forecasts are used to learn the label distribution
    given a forecast, over the bins of a label axis. This distribution is adjusted towards rare labels by ``tau``. The
    prediction is a weighted mean of this distribution's median and the estimator's number. The weight and ``tau`` are
    chosen on the same forecasts, as :class:`LongTailRegressor` chooses them. For ``predict_proba`` there is no number.
    A new row is forecast by the mean of all clones.

    The choice keeps the mean absolute error at most ``most_mae`` times the smallest one, and at most that of the median
    label. If no setting does, the one with the least mean absolute error is taken. A number as ``tau`` is used as it
    is, and then only the weight is chosen.

    The estimator may know rare labels already, as ``PriorAdjusted(SampleWeighted(booster))`` does. Wrap a fitted
    estimator: ``PriorAdjusted(FrozenEstimator(booster))``. Then pass rows to ``fit`` that it was **not** trained on.

    Args:
        estimator: a regressor, or whatever ``forecast`` reads; it is cloned and not fitted itself.
        bins: the label axis, which must hold all labels. None takes :meth:`dir_toolkit.Bins.auto`.
        forecast: what is read off the estimator: ``"predict"``, one number per row; ``"predict_proba"``, the
            probabilities of a classifier that is then trained on the numbers of bins; or a function, called as
            ``forecast(estimator, X, bins)``, that returns a number per row (N,) or the shares of the bins (N, B). For
            quantiles and for bins of another axis, :func:`dir_toolkit.labels.decoding.bin_shares` makes shares. The
            temperature of shares is chosen without ``sample_weight``.
        cv: the number of parts, each of which holds labels of all sizes; or a splitter of scikit-learn, or a list of
            pairs of rows to train on and rows to forecast.
        tau, by, most_mae, decode: as those of :class:`LongTailRegressor`.
        random_state: decides the parts.
    Attributes:
        estimators_: the estimators that were fitted.
        bins_: the label axis.
        model_: a :class:`dir_toolkit.LongTailModel` over forecasts, (N, 1) or (N, B).
        share_, tau_, choice_: as those of :class:`LongTailRegressor`.
        scores_, labels_: the scores of the rows that were forecast, as ``scores(X)`` gives them, (M, B), and their
            labels, (M,). Each comes from clones that were not trained on its row, but ``scores(X)`` from the mean of
            all clones. So do not pass ``scores_`` to :func:`dir_toolkit.estimate_prior` as ``source``: it may find a
            shift where there is none. Pass rows (X_held, y_held) that were not used in ``fit``:
            ``estimate_prior(adjusted.scores(X), source=adjusted.scores(X_held), labels=y_held, bins=adjusted.bins_)``.
            Or fit with a ``FrozenEstimator``, whose ``scores_`` come from the same estimator as ``scores(X)``.
    Shape:
        X: whatever the estimator takes. y, sample_weight: (N,), one label per row.
    Raises:
        TypeError: the estimator is a classifier with ``forecast="predict"``, or lacks the method.
        ValueError: a forecast is NaN or infinite, labels are all equal, a setting is out of range, or a frozen
        estimator is given fewer than 20 rows. ShapeError: a forecast is neither (N,) nor (N, B). LabelError: a label
        lies beyond ``bins``.
    Source:
        Menon et al. 2021 (arXiv:2007.07314) for the adjustment.

    >>> from sklearn.tree import DecisionTreeRegressor
    >>> X = np.linspace(0, 1, 400)[:, None]
    >>> adjusted = PriorAdjusted(DecisionTreeRegressor(max_depth=4), random_state=0).fit(X, 60 * X[:, 0] ** 3)
    >>> lower, upper = adjusted.predict_interval(X, level=0.9)
    >>> bool((lower <= adjusted.predict(X)).all()), adjusted.predict(X).shape
    (True, (400,))
    """

    def __init__(
        self,
        estimator: Any,
        *,
        bins: Bins | None = None,
        forecast: Forecast = "predict",
        cv: Any = 5,
        tau: float | Literal["auto"] = "auto",
        by: Literal["bmae", "mae", "bmse", "mse"] = "bmae",
        most_mae: float | None = 1.5,
        decode: Decoding = "median",
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.bins = bins
        self.forecast = forecast
        self.cv = cv
        self.tau = tau
        self.by = by
        self.most_mae = most_mae
        self.decode = decode
        self.random_state = random_state

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PriorAdjusted:
        """Train the clones, learn the label distribution given a forecast, and choose the weight and ``tau``.

        Args:
            X: rows as the estimator takes them.
            y: (N,), the labels, in label units.
            sample_weight: (N,), >= 0, handed on to the estimator. A row of weight zero counts as absent.
        Raises:
            as the class. TypeError: the estimator takes no ``sample_weight``, and one is given.
        """
        self._check_choice()
        own = self.estimator.estimator if isinstance(self.estimator, FrozenEstimator) else self.estimator
        fix = "Use one around it, such as lightgbm.LGBMRegressor for a Booster."
        rule = "estimator must be one of scikit-learn, with get_params"
        require(hasattr(own, "get_params"), rule, got=type(own), fix=fix, error=TypeError)
        if not isinstance(self.tau, str):
            number("tau", self.tau, low=0)
        else:
            one_of("tau", self.tau, ("auto",))
        if not callable(self.forecast):
            one_of("forecast", self.forecast, ("predict", "predict_proba"))
            has, fix = hasattr(self.estimator, self.forecast), "Pass a function as forecast."
            require(has, f"estimator must have {self.forecast}", got=type(self.estimator), fix=fix)
            numbers = self.forecast != "predict" or not is_classifier(self.estimator)
            fix = 'Pass forecast="predict_proba" for one that scores bins.'
            require(numbers, "estimator must be a regressor", got=type(self.estimator), fix=fix)
        labels = labels_array(validate_data(self, y=y, y_numeric=True, reset=False), "y").astype(np.float64)
        check_consistent_length(X, labels)
        require(len(labels) > 1, "y must hold at least two labels", got="1 sample")
        weight = _check_sample_weight(sample_weight, labels, dtype=np.float64, ensure_non_negative=True)
        present = weight > 0
        require(present.sum() > 1, "sample_weight must be positive for at least two rows", got=present.sum())
        self._take_axis(labels[present])
        (X,) = indexable(X)
        forecasts, held = self._cross_fitted(X, labels, weight, sample_weight is not None)
        weight = weight / weight[present].mean()
        own, options = labels[held], {"decode": self.decode}
        density = counted(self.bins_, labels[present], weight[present])
        of_rows: Tensor | None = None
        if forecasts.ndim == 1:
            of_rows = torch.from_numpy(forecasts)
            self.model_, scores = model_of_forecasts(self.bins_, forecasts, own, weight[held], density, **options)
        else:
            self.model_, scores = model_of_shares(self.bins_, forecasts, own, density, self.by, **options)
        self._choose(own, weight[held], of_rows, scores)
        self.scores_, self.labels_ = scores.numpy(), own
        return self

    def _cross_fitted(
        self, X: Any, labels: np.ndarray, weight: np.ndarray, weighted: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Forecasts of rows, and which rows they are."""
        present = np.flatnonzero(weight)
        if isinstance(self.estimator, FrozenEstimator):
            rule, rows = f"a frozen estimator needs {FEWEST} rows that it was not trained on", len(present)
            require(rows >= FEWEST, rule, got=rows, fix="Keep some from its training.")
            self.estimators_ = [self.estimator]
            return self._forecasts(self.estimator, _safe_indexing(X, present), rows), present
        splits: Any = self.cv
        if isinstance(splits, Integral):
            parts = min(whole("cv", splits, low=2), len(present))
            fold = folds(check_random_state(self.random_state), labels[present], parts)
            splits = [(present[fold != k], present[fold == k]) for k in range(parts)]
        else:
            splits = check_cv(splits).split(X, labels)
        takes = not weighted or has_fit_parameter(self.estimator, "sample_weight")
        fix = "In a pipeline wrap its last step."
        require(takes, "the fit of estimator must take sample_weight", got=type(self.estimator), fix=fix)
        forecasts, held, estimators, every = [], [], [], np.arange(len(labels))
        for train, test in splits:
            # The rows of a part may be given as a list or a mask, too.
            train, test = (every[np.asarray(rows) if len(rows) else slice(0)] for rows in (train, test))
            train, test = (rows[weight[rows] > 0] for rows in (train, test))
            apart = len(train) and len(test) and not np.isin(test, train).any()
            got = f"{len(train)} and {len(test)} rows, {np.isin(test, train).sum()} of them in both"
            require(bool(apart), "each part of cv must have rows to train on and other rows to forecast", got=got)
            target = labels[train] if self.forecast != "predict_proba" else self.bins_.index(labels[train])
            options = {"sample_weight": weight[train]} if weighted else {}
            estimators.append(clone(self.estimator).fit(_safe_indexing(X, train), target, **options))
            forecasts.append(self._forecasts(estimators[-1], _safe_indexing(X, test), len(test)))
            held.append(test)
        self.estimators_ = estimators
        numbers, place, count = np.unique(np.concatenate(held), return_inverse=True, return_counts=True)
        total = np.zeros((len(numbers), *forecasts[0].shape[1:]))
        np.add.at(total, place, np.concatenate(forecasts))
        # One forecast per row, the mean of those it has. With several a row would lie in its own window.
        return (total.T / count).T, numbers

    def _forecasts(self, estimator: Any, X: Any, rows: int) -> np.ndarray:
        """What an estimator forecasts, (N,) or (N, B)."""
        if isinstance(self.forecast, str):
            name, values = f"what {self.forecast} of estimator gives", getattr(estimator, self.forecast)(X)
        else:
            name, values = "what forecast returns", self.forecast(estimator, X, self.bins_)
        values, bins = labels_array(values, name).astype(np.float64), len(self.bins_)
        if self.forecast == "predict_proba" and values.shape == (rows, len(estimator.classes_)):
            of_classes, values = values, np.zeros((rows, bins))
            values[:, np.asarray(estimator.classes_, dtype=np.int64)] = of_classes
        shapes = [(rows,)] * (self.forecast != "predict_proba") + [(rows, bins)] * (self.forecast != "predict")
        rule = f"{name} must have the shape {' or '.join(map(str, shapes))}"
        require(values.shape in shapes, rule, got=values.shape)
        finite(**{name: values})
        if values.ndim == 2:
            distributions(zeros=True, **{name: torch.from_numpy(values)})
        return values

    def _predicted(self, X: Any, read: Callable[[Tensor], Tensor]) -> np.ndarray:
        check_is_fitted(self)
        rows = _num_samples(X)
        forecasts = np.mean([self._forecasts(one, X, rows) for one in self.estimators_], 0)
        with torch.no_grad():
            return read(torch.from_numpy(forecasts.reshape(rows, -1))).numpy()

    def _number(self, x: Tensor) -> Tensor | None:
        return x[:, 0] if x.shape[1] == 1 else None

    def _of_model(self, x: Tensor) -> Tensor:
        return x

    @property
    def n_features_in_(self) -> int:
        """The number of columns, as the fitted estimators know it."""
        check_is_fitted(self)
        return self.estimators_[0].n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        """The names of the columns, where they have names."""
        check_is_fitted(self)
        return self.estimators_[0].feature_names_in_

    def __sklearn_tags__(self) -> Tags:
        tags, own = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.input_tags, tags.non_deterministic = own.input_tags, own.non_deterministic
        return tags
