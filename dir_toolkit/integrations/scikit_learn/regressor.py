"""A regressor for tables with long-tailed labels."""
# ruff: noqa: N803, N806, since scikit-learn's tables are called X

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..._checks import labels_array, one_of, require, without_tensors
from ...experiment.training.runtime import Runtime
from ...labels.bins import Bins
from ...labels.decoding import Decoding
from ...labels.weights import Scheme
from ...longtail.readouts import TargetPrior
from ._blended import SHARES, Blended, counted, model_of_forecasts
from ._estimator import LongTailEstimator, Rows, all_or_nothing

__all__ = ["LongTailRegressor"]

_HEADS = ("auto", "linear", "cosine", "affinity", "regression", "gaussian")


class LongTailRegressor(Blended, LongTailEstimator):
    """A scikit-learn regressor for long-tailed labels.

    By default it trains a network and boosted trees. The network predicts a number, with an absolute error weighted
    by LDS. Of the weighted means of trees and network, the one with the least squared error on held-out rows is the
    forecast. It becomes a distribution over bins, as in :class:`PriorAdjusted`, which ``tau`` adjusts towards rare
    labels. The prediction is a weighted mean of the number and of the median over the bins. The weight and ``tau``
    are chosen on held-out rows by the smallest bMAE. Their mean absolute error must exceed neither ``most_mae``
    times the smallest one nor that of the median label. If no setting meets this, the one with the least mean
    absolute error is taken. A number as ``tau`` is used as it is, and then only the weight is chosen.

    Network and trees are the mean of several members. Each member holds out a different fold of the rows for
    validation, so that all rows are used both for training and for validation.

    For the network columns are clipped, standardized and encoded piecewise linearly. A column that is constant in
    training has no effect. Held-out rows far outside the range of the training rows are not used for validation. A
    warning is issued if the held-out error is larger than that of a constant.

    For several targets, (N, K), one regressor per target is trained.

    Args:
        hidden: the widths of the hidden layers. ``()`` is a linear model.
        bins: the label axis, which must hold all labels. None takes :meth:`dir_toolkit.Bins.auto`.
        head: ``"auto"``, network and trees as above; ``"regression"``, which predicts a number; ``"linear"``,
            ``"cosine"`` or ``"affinity"``, which score bins; or ``"gaussian"``, which predicts mean and variance.
        loss: the loss of the named head, as in :class:`dir_toolkit.LongTailModel`.
        sigma, decode: those of the bins, as in :class:`dir_toolkit.LongTailModel`. On bins of one width, however,
            ``"auto"`` is at most the interquartile range of the labels / 1.35, where ``LongTailModel`` would warn.
        weights: the scheme of :class:`dir_toolkit.LDS` for loss weights: ``"sqrt_inverse"``, ``"inverse"``,
            ``"effective_number"`` or ``"dense"``. None means equal weights, except for the network of ``head="auto"``,
            which uses ``"sqrt_inverse"``. Weights are taken into account in the adjustment by ``tau``.
        tau: the strength of the adjustment towards rare labels. 0 predicts under the training prior, and 1 under
            uniform labels. ``"auto"`` chooses it on held-out rows. Heads without bins are not adjusted.
        by: the criterion of ``"auto"``: ``"bmae"``, the mean absolute error with equal weight per bin, or ``"mae"``;
            or ``"bmse"`` or ``"mse"``, the same with squared errors, for which ``decode="expectation"`` is best.
        most_mae: the largest allowed ratio, >= 1, of the mean absolute error over held-out rows to the smallest one
            with ``head="auto"``, or to that at tau 0 with other heads; None sets no limit.
        adjust: ``"after"`` training, or ``"in_loss"``, which needs a number as ``tau``.
        members: the number of networks to average; 1 with ``"cosine"`` and ``"affinity"``, which cannot be averaged. A
            single member does not train on its held-out rows.
        epochs: the largest number of passes over the rows.
        batch_size: the rows per step. ``"auto"`` takes a twentieth of all rows, between 32 and 512.
        lr: the peak learning rate of AdamW, after warm-up in the first twentieth of all steps and before cosine decay.
        weight_decay: the weight decay of weight matrices.
        validation_fraction: the share of held-out rows with ``members=1``, in (0, 0.5]. No rows are held out if ``tau``
            is a number, ``head`` is not ``"auto"`` and ``patience`` is None.
        patience: training stops after this number of epochs without a lower held-out loss of any member, and each
            member takes the weights of its best epoch. None trains all epochs and takes the last weights.
        random_state: the seed of held-out rows, initial weights and the order of rows.
        device: the training device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``, which is CUDA if available.
            Predictions are made on the CPU.
        verbose: whether to print a line per epoch.
    Attributes:
        bins_: the label axis.
        model_: the :class:`dir_toolkit.LongTailModel` in float64, on inputs transformed by ``columns_``, and with
            ``head="auto"`` on forecasts.
        number_: the model of the number, or None unless ``head="auto"``. share_: its weight in predictions.
        trees_: the boosted trees of each member, with ``head="auto"``; else empty. trees_share_: their weight in the
            forecast; None unless ``head="auto"``.
        tau_: the strength of the adjustment; None without bins.
        tau_choice_: the :class:`dir_toolkit.priors.TauChoice` of a head that scores bins; else None.
        choice_: the candidates of ``head="auto"``, a list of dicts with ``share``, ``tau``, ``mae``, ``bmae``,
            ``mse`` and ``bmse``.
        history_: one dict per epoch, with ``epoch``, ``loss`` and, if rows are held out, ``val_loss``.
        best_epochs_: the best epoch of each member. This and ``history_`` are those of the network.
        estimators_: one regressor per target, with the attributes above; None for a single target.
        n_features_in_, feature_names_in_: as in scikit-learn.
    Shape:
        X: (N, columns), dense or sparse; it is converted to dense. y: (N,), or (N, K) for several targets;
            sample_weight: (N,). Predictions have the shape of y, and that of (N, 1) is (N,).
    Units:
        those of the labels.
    Raises:
        ValueError: X or y hold NaN or infinity, labels are all equal or too large for float32, or there is one row
        only; a setting is unknown or out of range. LabelError: a label lies beyond ``bins``.
        TypeError: labels are not numbers, or a setting has the wrong type. NonFiniteLossError: training diverged.
            NotFittedError of scikit-learn: a method is called before ``fit``.

    >>> X = np.linspace(0, 1, 400)[:, None]
    >>> regressor = LongTailRegressor(epochs=20, random_state=0).fit(X, 60 * X[:, 0] ** 3)
    >>> lower, upper = regressor.predict_interval(X, level=0.9)
    >>> bool((lower <= regressor.predict(X)).all()), regressor.predict(X).shape
    (True, (400,))
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (64, 64),
        bins: Bins | None = None,
        head: Literal["auto", "linear", "cosine", "affinity", "regression", "gaussian"] = "auto",
        loss: str | Callable[..., Tensor] | None = None,
        sigma: float | Literal["auto"] | None = "auto",
        decode: Decoding | None = None,
        weights: Scheme | None = None,
        tau: float | Literal["auto"] = "auto",
        by: Literal["bmae", "mae", "bmse", "mse"] = "bmae",
        most_mae: float | None = 1.5,
        adjust: Literal["after", "in_loss"] = "after",
        members: int = 4,
        epochs: int = 40,
        batch_size: int | Literal["auto"] = "auto",
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        validation_fraction: float = 0.15,
        patience: int | None = 12,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.hidden = hidden
        self.bins = bins
        self.head = head
        self.loss = loss
        self.sigma = sigma
        self.decode = decode
        self.weights = weights
        self.tau = tau
        self.by = by
        self.most_mae = most_mae
        self.adjust = adjust
        self.members = members
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
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LongTailRegressor:
        """Train on rows X and their labels.

        Args:
            sample_weight: >= 0, scaled to a mean of one. A row of weight zero is ignored. The training prior counts
                weights, not rows. With a named head the choice of ``tau`` ignores weights.
        """
        if np.asarray(without_tensors(y, "y")).ndim == 2:
            values, targets = self._table(X, y=y, y_numeric=True, multi_output=True)
            if targets.shape[1] > 1:
                one_each = [clone(self).fit(values, column, sample_weight) for column in targets.T]
                self.estimators_: list[LongTailRegressor] | None = one_each
                return self
            y = targets[:, 0]
        one_of("head", self.head, _HEADS)
        self._check_choice()
        auto = self.head == "auto"
        head = "linear" if auto else self.head
        self._check_settings(head)
        if auto:
            fix = 'Use head="linear".'
            of_loss = 'Name the head of that loss, such as head="linear" or head="regression".'
            require(self.loss is None, 'loss must be None with head="auto"', got=repr(self.loss), fix=of_loss)
            require(self.adjust == "after", 'adjust must be "after" with head="auto"', got=repr(self.adjust), fix=fix)
        X, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        labels = labels_array(y, "y").astype(np.float64)
        bins = self._take_axis(labels)
        optimization = self._optimization(len(labels))
        random, runtime = self._start()
        scores_bins = head not in ("regression", "gaussian")
        tau: Any = self.tau if scores_bins else None
        judged = auto or tau == "auto" or self.patience is not None
        rows = self._rows(random, X, labels, weight, bins, judged)
        training = (optimization, runtime)
        options: dict[str, Any] = {} if self.loss is None else {"loss": self.loss}
        if not isinstance(self.sigma, str) or self.sigma != "auto":
            options["sigma"] = self.sigma
        if self.decode is not None:
            options["decode"] = self.decode
        for name in ("sigma", "decode"):
            rule = f"{name} must be left out with head={head!r}, which has no bins"
            require(scores_bins or name not in options, rule, got=lambda name=name: repr(options[name]))
        self.estimators_, self.number_, self.share_, self.tau_choice_ = None, None, 0.0, None
        self.choice_, self.trees_ = [], list[HistGradientBoostingRegressor]()
        self.trees_share_: float | None = None
        if auto:
            self.number_, numbers = self._fit_model(rows, bins, "regression", self.weights or "sqrt_inverse", *training)
            held, density = rows.held.any(0), counted(bins, labels, rows.weight)
            forecasts = self._fit_trees(X, rows, runtime, numbers.numpy())
            of_held = forecasts, labels[held], rows.weight[held]
            self.model_, scores = model_of_forecasts(bins, *of_held, density, **options)
            self._choose(*of_held[1:], numbers, scores)
            return self
        if scores_bins:
            options["adjust"] = self.adjust
            options |= {} if tau == "auto" else {"target_prior": "uniform", "tau": tau}
        self.model_, scores = self._fit_model(rows, bins, head, self.weights, *training, **options)
        held = rows.held.any(0)
        if tau == "auto":
            targets = torch.from_numpy(labels[held])
            self.tau_choice_ = self.model_.choose_tau(scores, targets, by=self.by, most_mae=self.most_mae)
            tau = self.tau_choice_.tau
        if scores_bins and self.adjust == "after":
            self.model_.set_prior("uniform", tau)
        self.tau_ = tau
        if held.any():
            read = scores if scores.ndim == 1 else scores[:, 0]
            if scores_bins:
                read = self.model_.readout(scores, scores, scores).prediction
            self._compare(self._on_axis(read).numpy(), labels[held])
        return self

    def _fit_trees(self, X: np.ndarray, rows: Rows, runtime: Runtime, numbers: np.ndarray) -> np.ndarray:
        """Train trees on the rows of each member. Return the best mean of trees and numbers, on the rows held out."""
        forecasts = np.empty(len(rows.labels))
        weight = None if np.ptp(rows.weight) == 0 else rows.weight  # Without weights trees grow faster.
        for own, held in zip(rows.own, rows.held, strict=True):
            trees = HistGradientBoostingRegressor(random_state=runtime.seed)
            own_weight = None if weight is None else weight[own]
            self.trees_.append(trees.fit(X[own], rows.labels[own], sample_weight=own_weight))
            forecasts[held] = trees.predict(X[held])
        judged = rows.held.any(0)
        forecasts, labels, weight = forecasts[judged], rows.labels[judged], rows.weight[judged]
        means = {share: share * forecasts + (1 - share) * numbers for share in SHARES}
        best = min(SHARES, key=lambda share: float(np.average((means[share] - labels) ** 2, weights=weight)))
        self.trees_share_ = best
        return means[best]

    def _inputs(self, X: np.ndarray) -> np.ndarray:
        """Columns, or with ``head="auto"`` the forecast and the number, (N, 2)."""
        columns, number, share = super()._inputs(X), self.number_, self.trees_share_
        if number is None or share is None:
            return columns
        numbers = self._read(columns, lambda x: number(x).prediction).numpy()
        trees = np.mean([trees.predict(X) for trees in self.trees_], 0)
        return np.column_stack([share * trees + (1 - share) * numbers, numbers])

    def _number(self, x: Tensor) -> Tensor | None:
        return None if self.number_ is None else x[:, 1]

    def _of_model(self, x: Tensor) -> Tensor:
        return x[:, :1] if self.trees_ else x

    def predict(self, X: Any) -> np.ndarray:
        """The predicted label of each row, (N,) or (N, K), within the range of the training labels."""
        if (each := self._of_each(X, "predict")) is not None:
            return np.stack(each, 1)
        return super().predict(X)

    def predict_interval(self, X: Any, level: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As of :class:`PriorAdjusted`. The ends are shaped as y was.

        Raises:
            as there. RuntimeError: ``head="regression"`` needs ``calibrate_intervals`` before.
        """
        if (each := self._of_each(X, "predict_interval", level)) is not None:
            lower, upper = np.stack(each, 2)
            return lower, upper
        return super().predict_interval(X, level)

    def calibrate_intervals(self, X: Any, y: Any, level: float = 0.9, **options: Any) -> None:
        """As of :class:`PriorAdjusted`, for each column of y."""
        check_is_fitted(self)
        if self.estimators_ is None:
            return super().calibrate_intervals(X, y, level, **options)
        X, labels = self._table(X, reset=False), labels_array(y, "y")
        require(
            labels.shape == (X.shape[0], len(self.estimators_)), "y must have a column per target", got=labels.shape
        )
        each = copy.deepcopy(self.estimators_)  # so that all are calibrated or none
        for one, column in zip(each, labels.T, strict=True):
            one.calibrate_intervals(X, column, level, **options)
        self.estimators_ = each

    def scores(self, X: Any) -> np.ndarray:
        """As of :class:`PriorAdjusted`. For several targets call it of each of ``estimators_``."""
        check_is_fitted(self)
        rule = "scores needs a regressor of a single target"
        got = self.estimators_ and f"{len(self.estimators_)} targets"
        require(self.estimators_ is None, rule, got=got, fix="Use estimators_[k].scores(X).", error=RuntimeError)
        return super().scores(X)

    def set_prior(self, target_prior: TargetPrior, tau: float = 1.0) -> None:
        """As of :class:`PriorAdjusted`, for each target."""
        check_is_fitted(self)
        if self.estimators_ is None:
            return super().set_prior(target_prior, tau)
        each = copy.deepcopy(self.estimators_)
        for one in each:
            one.set_prior(target_prior, tau)
        self.estimators_ = each

    def _of_each(self, X: Any, method: str, *arguments: Any) -> list[Any] | None:
        """The results of a method of each target's regressor; None for a single target."""
        check_is_fitted(self)
        if self.estimators_ is None:
            return None
        X = self._table(X, reset=False)
        return [getattr(one, method)(X, *arguments) for one in self.estimators_]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
