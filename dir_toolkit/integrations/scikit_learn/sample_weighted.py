"""LDS sample weights for any scikit-learn regressor."""
# ruff: noqa: N803, since scikit-learn's tables are called X

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, RegressorMixin, clone
from sklearn.utils import Tags, get_tags
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    has_fit_parameter,
    validate_data,
)

from ..._checks import instance, labels_array, require
from ...labels.bins import Bins
from ...labels.density import LabelDensity
from ...labels.weights import LDS, Scheme
from ._estimator import all_or_nothing

__all__ = ["SampleWeighted"]


class SampleWeighted(RegressorMixin, MetaEstimatorMixin, BaseEstimator):
    """A meta-estimator that fits any regressor with LDS weights of its training labels as ``sample_weight``.

    In cross-validation the weights of each fold come from its training labels alone. In a pipeline wrap the last step:
    ``make_pipeline(StandardScaler(), SampleWeighted(Ridge()))``.

    Args:
        estimator: a regressor, which is cloned.
        bins: the label axis, which must hold all labels. None takes :meth:`dir_toolkit.Bins.auto` in each fit.
        scheme: as in :class:`dir_toolkit.LDS`.
    Attributes:
        estimator_: the fitted regressor.
        lds_: the fitted :class:`dir_toolkit.LDS`.
        bins_: the label axis.
    Raises:
        TypeError: ``fit`` of the estimator takes no ``sample_weight``. LabelError: a label lies beyond ``bins``.

    >>> from sklearn.linear_model import LinearRegression
    >>> x, y = np.arange(50.0)[:, None], np.arange(50.0) ** 2
    >>> weighted = SampleWeighted(LinearRegression()).fit(x, y)
    >>> bool(weighted.predict([[49]]) > LinearRegression().fit(x, y).predict([[49]]))
    True
    """

    def __init__(self, estimator: Any, *, bins: Bins | None = None, scheme: Scheme = "sqrt_inverse") -> None:
        self.estimator = estimator
        self.bins = bins
        self.scheme = scheme

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **options: Any) -> SampleWeighted:
        """Compute the weights from the labels, then fit the estimator with them.

        Args:
            sample_weight: >= 0. It multiplies the LDS weights, and the label density counts it.
            options: further arguments of the estimator's ``fit``.
        """
        takes, fix = has_fit_parameter(self.estimator, "sample_weight"), "In a pipeline wrap its last step."
        require(takes, "fit of the estimator must take sample_weight", got=type(self.estimator), fix=fix)
        labels = labels_array(validate_data(self, y=y, y_numeric=True, reset=False), "y")
        check_consistent_length(X, labels)
        require(len(labels) > 1, "y must hold at least two labels", got="1 sample")
        own = _check_sample_weight(sample_weight, labels, dtype=np.float64, ensure_non_negative=True)
        present = own > 0
        if self.bins is not None:
            instance(Bins, bins=self.bins)
        self.bins_ = Bins.auto(labels[present]) if self.bins is None else self.bins
        index = self.bins_.index(labels[present])
        counted = LabelDensity(self.bins_, np.bincount(index, weights=own[present], minlength=len(self.bins_)))
        self.lds_ = LDS(self.bins_, kernel=None, scheme=self.scheme).fit(counted.smooth("auto"))
        weight = own.copy()
        weight[present] *= self.lds_.sample_weight(labels[present])
        weight *= own.sum() / weight.sum()
        self.estimator_ = clone(self.estimator).fit(X, y, sample_weight=weight, **options)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The predictions of the fitted estimator."""
        check_is_fitted(self)
        return self.estimator_.predict(X)

    @property
    def n_features_in_(self) -> int:
        """The number of columns."""
        check_is_fitted(self)
        return self.estimator_.n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        """The names of the columns, if they have names."""
        check_is_fitted(self)
        return self.estimator_.feature_names_in_

    def __sklearn_tags__(self) -> Tags:
        tags, own = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.input_tags, tags.non_deterministic = own.input_tags, own.non_deterministic
        return tags
