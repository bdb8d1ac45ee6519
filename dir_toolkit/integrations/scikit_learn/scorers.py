"""Scorers for rare labels, for ``scoring=`` in scikit-learn's searches and cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import make_scorer

from ..._checks import as_tensors, same_shape, warn
from ...labels.bins import Bins
from ...labels.density import LabelDensity
from ...metrics import regression_metrics

__all__ = ["bmae_scorer", "few_shot_scorer"]


def bmae_scorer(labels: Any, bins: Bins | None = None) -> Callable[..., float]:
    """A scorer of the negative bMAE, the mean over bins of the mean absolute error in each bin.

    The bins are the same in all folds. A test label beyond the axis counts in the end bin.

    Args:
        labels: the training labels, anything that :meth:`dir_toolkit.LabelDensity.count` takes.
        bins: the label axis; None takes :meth:`dir_toolkit.Bins.auto`.
    Returns:
        a scorer, called as ``scorer(estimator, X, y)``. Higher is better.
    Units:
        those of the labels.

    >>> from sklearn.dummy import DummyRegressor
    >>> y = np.array([0.0] * 90 + [10.0] * 10)
    >>> median = DummyRegressor(strategy="median").fit(y[:, None], y)
    >>> float(bmae_scorer(y, Bins.uniform(0, 20, count=2))(median, y[:, None], y))
    -5.0
    """
    return make_scorer(_bmae, greater_is_better=False, density=_density(labels, bins))


def few_shot_scorer(labels: Any, bins: Bins | None = None) -> Callable[..., float]:
    """A scorer of the negative mean absolute error of rare labels.

    A label is rare if its bin is in the region "few" or "unseen" of ``LabelDensity.regions(relative=True)``: it has
    fewer labels than a fifth of the count under a uniform distribution. Without rare test labels the score is NaN, and
    a warning is issued: a search cannot compare candidates if one of its folds has the score NaN.

    Args:
        labels, bins: as in :func:`bmae_scorer`.

    >>> from sklearn.dummy import DummyRegressor
    >>> y = np.array([0.0] * 95 + [10.0] * 5)
    >>> median = DummyRegressor(strategy="median").fit(y[:, None], y)
    >>> float(few_shot_scorer(y, Bins.uniform(0, 20, count=2))(median, y[:, None], y))
    -10.0
    """
    density = _density(labels, bins)
    rare = np.isin(density.regions(relative=True), ("few", "unseen"))
    return make_scorer(_few, greater_is_better=False, bins=density.bins, rare=rare)


def _density(labels: Any, bins: Bins | None) -> LabelDensity:
    return LabelDensity.count(labels, Bins.auto(labels) if bins is None else bins)


def _bmae(target: Any, pred: Any, density: LabelDensity) -> float:
    return regression_metrics(pred, target, density, outside="clip").bmae.sel(region="all").item()


def _few(target: Any, pred: Any, bins: Bins, rare: np.ndarray) -> float:
    pred, target = as_tensors(pred=pred, target=target)
    same_shape(pred=pred, target=target)
    errors = (pred.double() - target.double()).abs()[torch.from_numpy(rare)[bins.index(target, "clip")]]
    if len(errors) == 0:
        warn("no test label is rare, so that the score is NaN. Use fewer folds, or folds that all have rare labels.")
    return errors.mean().item()
