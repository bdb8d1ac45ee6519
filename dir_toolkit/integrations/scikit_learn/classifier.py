"""A classifier for tables with long-tailed classes."""
# ruff: noqa: N803, N806, since scikit-learn's tables are called X

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from ..._checks import one_of, require
from ...labels.bins import Bins
from ...labels.weights import Scheme
from ._estimator import LongTailEstimator, all_or_nothing

__all__ = ["LongTailClassifier"]


class LongTailClassifier(ClassifierMixin, LongTailEstimator):
    """A scikit-learn classifier for long-tailed classes.

    By default it is a perceptron trained with the logit-adjusted loss, so that it predicts as if all classes were
    equally frequent. Columns are transformed as in :class:`LongTailRegressor`. Held-out rows are stratified by class,
    and each class keeps at least one training row.

    Args:
        head: ``"linear"``, ``"cosine"`` or ``"affinity"``.
        loss: as in :class:`dir_toolkit.LongTailModel`.
        weights: the scheme of :class:`dir_toolkit.LDS` for loss weights, or None. They are taken into account in the
            adjustment by ``tau``.
        tau: the strength of the adjustment towards rare classes. 0 predicts under the training prior, and 1 under equal
            class frequencies. ``"auto"`` takes the value with the smallest balanced error on held-out rows, and needs
            ``adjust="after"``.
        adjust: ``"in_loss"``, or ``"after"`` training. Affinities need ``"after"``, unless ``loss="cross_entropy"``.
        hidden, epochs, batch_size, lr, weight_decay, validation_fraction, patience, random_state, device, verbose: as
            in :class:`LongTailRegressor`.
    Attributes:
        classes_: the sorted classes.
        model_, columns_, tau_, tau_choice_, history_, best_epochs_, n_features_in_, feature_names_in_: as
            in :class:`LongTailRegressor`.
    Shape:
        X: (N, columns). y, sample_weight: (N,), one class per row, of numbers or strings.
    Raises:
        ValueError: X or y hold NaN or infinity, there is one class or one row, labels are continuous, or y has several
        columns; a setting is unknown or out of range. TypeError: a setting has the wrong type. NonFiniteLossError:
        training diverged. NotFittedError of scikit-learn: a method is called before ``fit``.

    >>> X = np.linspace(0, 1, 400)[:, None]
    >>> classifier = LongTailClassifier(epochs=20, random_state=0).fit(X, np.where(X[:, 0] < 0.9, "benign", "rare"))
    >>> classifier.predict([[0.1], [0.99]]).tolist()
    ['benign', 'rare']
    """

    members = 1

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (64, 64),
        head: Literal["linear", "cosine", "affinity"] = "linear",
        loss: str | Callable[..., Tensor] | None = None,
        weights: Scheme | None = None,
        tau: float | Literal["auto"] = 1.0,
        adjust: Literal["after", "in_loss"] = "in_loss",
        epochs: int = 100,
        batch_size: int = 64,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        validation_fraction: float = 0.15,
        patience: int | None = 15,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.hidden = hidden
        self.head = head
        self.loss = loss
        self.weights = weights
        self.tau = tau
        self.adjust = adjust
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LongTailClassifier:
        """Train on rows X and their classes y. ``sample_weight`` is as in :meth:`LongTailRegressor.fit`."""
        one_of("head", self.head, ("linear", "cosine", "affinity"))
        X, y, weight = self._checked(X, y, sample_weight)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        got = f"one class, {self.classes_[0]!r}"
        require(len(self.classes_) > 1, "y must hold at least two classes", got=got)
        self._check_settings(self.head)
        bins, optimization = Bins.classes(len(self.classes_)), self._optimization(len(y))
        random, runtime = self._start()
        chosen = isinstance(self.tau, str)
        rows = self._rows(random, X, labels, weight, bins, judged=chosen or self.patience is not None)
        options: dict[str, Any] = {"loss": self.loss, "adjust": self.adjust}
        options |= {} if chosen else {"target_prior": "uniform", "tau": self.tau}
        self.model_, scores = self._fit_model(rows, bins, self.head, self.weights, optimization, runtime, **options)
        self.tau_choice_, self.tau_ = None, self.tau
        if chosen:
            self.tau_choice_ = self.model_.choose_tau(scores, torch.from_numpy(labels[rows.held.any(0)]))
            self.tau_ = self.tau_choice_.tau
            self.model_.set_prior("uniform", self.tau_)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, (N,)."""
        place = self._predicted(X, lambda x: self.model_(x).prediction)
        return self.classes_[place]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, (N, classes), after the adjustment by ``tau``."""
        return self._predicted(X, lambda x: self.model_(x).distribution)

    def decision_function(self, X: Any) -> np.ndarray:
        """The log-probability of each class, (N, classes); for two classes the log-odds of the second, (N,)."""
        scores = np.log(self.predict_proba(X).clip(np.finfo(np.float64).tiny))
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores
