"""A regressor for tables with long-tailed labels."""
# ruff: noqa: N803, N806, since scikit-learn's tables are called X

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import RegressorMixin, clone
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..._checks import labels_array, number, one_of, require, warn
from ...labels.bins import Bins, continuous
from ...labels.decoding import Decoding
from ...labels.weights import Scheme
from ...longtail.calibration import row_weights
from ._estimator import LongTailEstimator

__all__ = ["LongTailRegressor"]

_HEADS = ("auto", "linear", "cosine", "affinity", "regression", "gaussian")
_TAUS = np.linspace(0, 1.5, 16)  # candidates, each with every share of the number
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ALIKE = 1.02  # ratios of held-out errors up to this may be due to chance
_FEWEST = 20  # the smallest number of held-out rows for a warning


class LongTailRegressor(RegressorMixin, LongTailEstimator):
    """A scikit-learn regressor for long-tailed labels.

    By default it trains two networks. The first predicts a number, with an absolute error weighted by LDS. The second
    predicts a distribution over bins, which is adjusted towards rare labels by ``tau``. The prediction is a weighted
    mean of both. The weight and ``tau`` are chosen on held-out rows by the smallest bMAE. Their mean absolute error
    must not exceed ``most_mae`` nor that of the median label. Among choices with a bMAE within 2 % of the smallest, the
    one with the smallest mean absolute error is taken.

    Each network is the mean of several members. Each member holds out a different fold of the rows for validation, so
    that all rows are used both for training and for validation.

    Columns are clipped, standardized and encoded piecewise linearly. A column that is constant in training has no
    effect. Held-out rows far outside the range of the training rows are not used for validation. A warning is issued if
    the held-out error is larger than that of a constant.

    For several targets, (N, K), one regressor per target is trained.

    Args:
        hidden: the widths of the hidden layers. ``()`` is a linear model.
        bins: the label axis, which must hold all labels. None takes :meth:`dir_toolkit.Bins.auto`.
        head: ``"auto"``, the two networks above; ``"regression"``, which predicts a number; ``"linear"``, ``"cosine"``
            or ``"affinity"``, which score bins; or ``"gaussian"``, which predicts mean and variance.
        loss: the loss of the bins, or of the named head, as in :class:`dir_toolkit.LongTailModel`.
        sigma, decode: as in :class:`dir_toolkit.LongTailModel`.
        weights: the scheme of :class:`dir_toolkit.LDS` for loss weights: ``"sqrt_inverse"``, ``"inverse"``,
            ``"effective_number"`` or ``"dense"``. None means equal weights, except for the number of ``head="auto"``,
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
        model_: the :class:`dir_toolkit.LongTailModel` in float64, on inputs transformed by ``columns_``.
            ``model_.set_prior`` changes the prior of its part of the predictions.
        number_: the model of the number, or None unless ``head="auto"``. share_: its weight in predictions.
        tau_: the strength of the adjustment; None without bins.
        tau_choice_: the :class:`dir_toolkit.priors.TauChoice` of a head that scores bins; else None.
        choice_: the candidates of ``head="auto"``, a list of dicts with ``share``, ``tau``, ``mae``, ``bmae``,
            ``mse`` and ``bmse``.
        history_: one dict per epoch, with ``epoch``, ``loss`` and, if rows are held out, ``val_loss``.
        best_epochs_: the best epoch of each member. This and ``history_`` are those of ``model_``.
        estimators_: one regressor per target, with the attributes above; None for a single target.
        n_features_in_, feature_names_in_: as in scikit-learn.
    Shape:
        X: (N, columns), dense or sparse; it is converted to dense. y: (N,), or (N, K) for several targets;
            sample_weight: (N,). Predictions have the shape of y.
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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LongTailRegressor:
        """Train on rows X and their labels.

        Args:
            sample_weight: >= 0, scaled to a mean of one. A row of weight zero is ignored. The training prior counts
                weights, not rows.
        """
        self.estimators_: list[LongTailRegressor] | None = None
        if np.ndim(y) == 2:
            values, targets = self._table(X, y=y, y_numeric=True, multi_output=True)
            if targets.shape[1] > 1:
                self.estimators_ = [clone(self).fit(values, column, sample_weight) for column in targets.T]
                return self
            y = targets[:, 0]
        one_of("head", self.head, _HEADS)
        one_of("by", self.by, ("bmae", "mae", "bmse", "mse"))
        if self.most_mae is not None:
            number("most_mae", self.most_mae, low=1)
        auto = self.head == "auto"
        head = "linear" if auto else self.head
        self._check_settings(head)
        X, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        labels = labels_array(y, "y").astype(np.float64)
        bins = self._axis(labels)
        bins.index(labels)  # raises for labels beyond the axis before anything changes
        ends = float(bins.edges[0]), float(bins.edges[-1])
        self.bins_, self.label_range_ = bins, np.clip([labels.min(), labels.max()], *ends)
        optimization = self._optimization(len(labels))
        random, runtime = self._start()
        scores_bins = head not in ("regression", "gaussian")
        tau: Any = self.tau if scores_bins else None
        judged = auto or tau == "auto" or self.patience is not None
        rows = self._rows(random, X, labels, weight, bins, judged)
        training = (optimization, runtime)
        options: dict[str, Any] = {} if self.loss is None else {"loss": self.loss}
        self.number_, self.share_, self.tau_choice_ = None, 0.0, None
        self.choice_: list[dict[str, float]] = []
        if auto:
            self.number_, numbers = self._fit_model(rows, bins, "regression", self.weights or "sqrt_inverse", *training)
        if not isinstance(self.sigma, str) or self.sigma != "auto":
            options["sigma"] = self.sigma
        if self.decode is not None:
            options["decode"] = self.decode
        if scores_bins:
            options["adjust"] = self.adjust
            options |= {} if tau == "auto" else {"target_prior": "uniform", "tau": tau}
        self.model_, scores = self._fit_model(rows, bins, head, self.weights, *training, **options)
        held = rows.held.any(0)
        if auto:
            tau = self._choose(labels[held], numbers, scores)
        elif tau == "auto":
            targets = torch.from_numpy(labels[held])
            self.tau_choice_ = self.model_.choose_tau(scores, targets, by=self.by, most_mae=self.most_mae)
            tau = self.tau_choice_.tau
        if scores_bins and self.adjust == "after":
            self.model_.set_prior("uniform", tau)
        self.tau_ = tau
        if not auto and held.any():
            read = scores if scores.ndim == 1 else scores[:, 0]
            if scores_bins:
                read = self.model_.readout(scores, scores, scores).prediction
            self._compare(self._on_axis(read).numpy(), labels[held])
        return self

    def _axis(self, labels: np.ndarray) -> Bins:
        number("the largest label", float(np.abs(labels).max()), float32=True)
        require(labels.min() < labels.max(), "y must hold at least two different labels", got=f"only {labels[0]:g}")
        if self.bins is None:
            return Bins.auto(labels)
        continuous(self.bins, "Use LongTailClassifier for classes.")
        return self.bins

    def _held_out_weight(self, labels: np.ndarray) -> np.ndarray:
        """Weights of held-out labels, such that each bin with training labels has a weight proportional to its
        width."""
        assert self.model_.density is not None
        widths = np.where(self.model_.density.counts > 0, self.bins_.relative_widths, 0.0)
        return row_weights(widths, self.bins_.index(labels), self.bins_)

    def _choose(self, labels: np.ndarray, numbers: Tensor, scores: Tensor) -> float:
        """Choose the share of the number and the tau of the bins on held-out rows."""
        weight, candidates = self._held_out_weight(labels), []
        for tau in _TAUS.tolist() if isinstance(self.tau, str) else [self.tau]:
            if self.adjust == "after":
                self.model_.set_prior("uniform", tau)
            binned = self.model_.readout(scores, scores, scores).prediction
            for share in _SHARES:
                error = np.abs(self._on_axis(share * numbers + (1 - share) * binned).numpy() - labels)
                errors = {"mae": error.mean(), "bmae": weight @ error}
                errors |= {"mse": (error**2).mean(), "bmse": weight @ error**2}
                candidates.append({"share": share, "tau": tau, **{name: float(x) for name, x in errors.items()}})
        least = min(row["mae"] for row in candidates)
        most = math.inf if self.most_mae is None else self.most_mae * least
        most = max(least, min(most, float(np.abs(labels - np.median(labels)).mean())))
        allowed = [row for row in candidates if row["mae"] <= most]
        good = _ALIKE * min(row[self.by] for row in allowed)
        best = min((row for row in allowed if row[self.by] <= good), key=lambda row: row["mae"])
        self.choice_, self.share_ = candidates, best["share"]
        return best["tau"]

    def _compare(self, pred: np.ndarray, labels: np.ndarray) -> None:
        """Warn if a constant predicts the held-out labels better."""
        if len(labels) < _FEWEST:
            return
        weight = self._held_out_weight(labels)
        errors = [np.abs(one - labels) for one in (pred, np.median(labels))]
        (mean, constant), (balanced, of_constant) = ([np.average(e, weights=w) for e in errors] for w in (None, weight))
        if mean > 1.1 * constant and balanced > of_constant:
            lower = "lr" if self.tau_ is None else "tau or lr"
            message = f"on {len(labels)} held-out rows the mean absolute error is {mean:.3g}, and {constant:.3g} for a "
            warn(f"{message}constant, the median label. Lower {lower}, or look for mistyped labels.")

    def predict(self, X: Any) -> np.ndarray:
        """The predicted label of each row, in the shape of y, within the range of the training labels."""
        if (each := self._of_each(X, "predict")) is not None:
            return np.stack(each, 1)
        return self._predicted(X, self._label)

    def _label(self, x: Tensor) -> Tensor:
        label = self.model_(x).prediction
        if self.number_ is not None:
            label = self.share_ * self.number_(x).prediction + (1 - self.share_) * label
        return self._on_axis(label)

    def _on_axis(self, values: Tensor) -> Tensor:
        return values.clamp(*self.label_range_.tolist())

    def predict_interval(self, X: Any, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Central prediction intervals with the probability ``level``: lower and upper ends, in the shape of y.

        They are those of the distribution over bins, or of the Gaussian, extended to the prediction if it lies outside.

        Raises:
            ValueError: the level lies outside (0, 1). RuntimeError: ``head="regression"`` predicts no distribution.
        """
        if (each := self._of_each(X, "predict_interval", level)) is not None:
            lower, upper = np.stack(each, 2)
            return lower, upper

        def ends(x: Tensor) -> Tensor:
            lower, upper = self.model_.interval(self.model_(x), level)
            label = self._label(x)
            return torch.stack([self._on_axis(lower).minimum(label), self._on_axis(upper).maximum(label)], 1)

        lower, upper = self._predicted(X, ends).T
        return lower, upper

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
