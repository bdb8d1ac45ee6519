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
_TAUS = np.linspace(0, 1.5, 16)  # that are tried together with each share of the number
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ALIKE = 1.02  # the ratio of held-out errors up to which chance may tell them apart
_FEWEST = 20  # held-out rows, on which errors say more than chance does


class LongTailRegressor(RegressorMixin, LongTailEstimator):
    """A regressor for long-tailed labels, by the rules of scikit-learn.

    Two networks are trained by default. One gives a number, and its absolute errors are weighted by LDS. The other
    scores the bins of a label axis, and is adjusted towards rare labels after training by ``tau``. A prediction is the
    mean of both in proportions that, like ``tau``, are chosen on rows that were held out. Their mean absolute error
    must keep within ``most_mae`` and not exceed that of a constant, the median label. Among the choices whose bMAE is
    then within 2 % of the least, the one with the least mean absolute error is taken.

    Each network is the mean of a few members. Each member is trained without a share of the rows, by which it is judged
    and which no other member lacks, so that all rows judge and all rows are learnt from.

    Columns are standardized inside, cut off far from most values that the rows to train on have, and cut into pieces.
    A column that is constant in these rows has no effect. Held-out rows that are unlike all rows to train on do not
    judge a member. A warning says where the mean of held-out errors is larger than that of a constant.

    Labels of several targets, (N, K), are learnt by a regressor each.

    Args:
        hidden: the widths of the hidden layers. ``()`` makes a linear model.
        bins: the label axis, which must hold all labels. None takes :meth:`dir_toolkit.Bins.auto`.
        head: ``"auto"``, which is both networks as above; ``"regression"``, which gives one number; ``"linear"``,
            ``"cosine"`` or ``"affinity"``, which score bins; or ``"gaussian"``, which gives mean and variance.
        loss: of the bins, or of the head that is named, as in :class:`dir_toolkit.LongTailModel`.
        sigma, decode: as in :class:`dir_toolkit.LongTailModel`.
        weights: the scheme of :class:`dir_toolkit.LDS` by which the smoothed density of labels weights the loss:
            ``"sqrt_inverse"``, ``"inverse"``, ``"effective_number"`` or ``"dense"``. None weights all labels alike, but
            the number of ``head="auto"`` by ``"sqrt_inverse"``. Weights are a part of the prior from which ``tau``
            starts, so that with any of them 1 means even labels.
        tau: how far to go towards rare labels. 0 keeps the training prior, and 1 goes all the way to even labels.
            ``"auto"`` takes the value that suits the held-out rows best. Heads without bins have nothing to adjust.
        by: what ``"auto"`` judges by: ``"bmae"``, the mean absolute error with each bin counting alike, or ``"mae"``.
        most_mae: the most that the mean absolute error over held-out rows may be, as a factor >= 1 of the least that is
            found with ``head="auto"``, and of that at tau 0 with other heads; None sets no limit.
        adjust: ``"after"`` training, or ``"in_loss"``, which needs a number as ``tau``.
        members: how many networks are averaged; 1 with ``"cosine"`` and ``"affinity"``, whose scores cannot be. With
            one a share of the rows is held out and lost to training. Several hold out an equal part of the rows each.
        epochs: the largest number of passes over the rows.
        batch_size: the rows per step; ``"auto"`` takes a twentieth of all, but 32 at least and 512 at most.
        lr: the highest learning rate of AdamW. It rises over the first twentieth of all steps and falls as a cosine.
        weight_decay: the pull of weight matrices towards zero.
        validation_fraction: the share of the rows that is held out with ``members=1``, in (0, 0.5]. Where a number is
            passed as ``tau``, no ``head`` is to be chosen and ``patience=None``, none are held out.
        patience: the number of epochs without a lower loss on any member's held-out rows after which training stops.
            Then the weights of each member's best epoch are taken. None trains all epochs and takes the last weights.
        random_state: decides which rows are held out, the first weights, and the order of the rows.
        device: the device to train on: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``, which takes CUDA where there
            is any. Predictions are made on the CPU.
        verbose: whether to print a line per epoch.
    Attributes:
        bins_: the label axis.
        model_: the :class:`dir_toolkit.LongTailModel` in float64, over the inputs that ``columns_`` makes of a table.
            ``model_.set_prior`` turns its part of the predictions to any other prior.
        number_: the model of the number, and None unless ``head="auto"``; share_: what it weighs in predictions.
        tau_: the strength of the adjustment; None without bins.
        tau_choice_: the :class:`dir_toolkit.priors.TauChoice` of a head that scores bins, with its curve; else None.
        choice_: what ``head="auto"`` chose from, a list of rows with ``share``, ``tau``, ``mae`` and ``bmae``.
        history_: one row per epoch, with ``epoch``, ``loss`` and, where rows are held out, ``val_loss``.
        best_epochs_: the epoch of the weights of each member. This and ``history_`` are those of ``model_``.
        estimators_: of several targets, the regressor of each, which has the attributes above; None for one target.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    Shape:
        X: (N, columns), dense or sparse; it is trained on as a dense one. y: (N,), or (N, K) for several targets;
        sample_weight: (N,). Predictions are shaped as y.
    Units:
        those of the labels.
    Raises:
        ValueError: X or y hold NaN or infinity, labels are all equal or too large for float32, or there is one row
        only; a setting is unknown or out of range. LabelError: a label lies beyond ``bins``.
        TypeError: labels are not numbers, or a setting is of another kind. NonFiniteLossError: training diverged.
        NotFittedError of scikit-learn: predictions are asked for before ``fit``.

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
        by: Literal["bmae", "mae"] = "bmae",
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
            sample_weight: >= 0, and scaled to a mean of one. A row of weight zero counts as absent. The prior that
                predictions are adjusted from counts weights, not rows.
        """
        self.estimators_: list[LongTailRegressor] | None = None
        if np.ndim(y) == 2:
            values, targets = self._table(X, y=y, y_numeric=True, multi_output=True)
            if targets.shape[1] > 1:
                self.estimators_ = [clone(self).fit(values, column, sample_weight) for column in targets.T]
                return self
            y = targets[:, 0]
        one_of("head", self.head, _HEADS)
        one_of("by", self.by, ("bmae", "mae"))
        if self.most_mae is not None:
            number("most_mae", self.most_mae, low=1)
        auto = self.head == "auto"
        head = "linear" if auto else self.head
        self._check_settings(head)
        X, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        labels = labels_array(y, "y").astype(np.float64)
        bins = self._axis(labels)
        bins.index(labels)  # Labels beyond the axis are refused before anything has changed.
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
        """Of held-out labels, such that each bin that has training labels counts by its width."""
        assert self.model_.density is not None
        widths = np.where(self.model_.density.counts > 0, self.bins_.relative_widths, 0.0)
        return row_weights(widths, self.bins_.index(labels), self.bins_)

    def _choose(self, labels: np.ndarray, numbers: Tensor, scores: Tensor) -> float:
        """The share of the number and the tau of the bins that suit the held-out rows best."""
        weight, found = self._held_out_weight(labels), []
        for tau in _TAUS.tolist() if isinstance(self.tau, str) else [self.tau]:
            if self.adjust == "after":
                self.model_.set_prior("uniform", tau)
            binned = self.model_.readout(scores, scores, scores).prediction
            for share in _SHARES:
                error = np.abs(self._on_axis(share * numbers + (1 - share) * binned).numpy() - labels)
                found.append({"share": share, "tau": tau, "mae": float(error.mean()), "bmae": float(weight @ error)})
        least = min(row["mae"] for row in found)
        most = math.inf if self.most_mae is None else self.most_mae * least
        most = max(least, min(most, float(np.abs(labels - np.median(labels)).mean())))
        allowed = [row for row in found if row["mae"] <= most]
        good = _ALIKE * min(row[self.by] for row in allowed)
        best = min((row for row in allowed if row[self.by] <= good), key=lambda row: row["mae"])
        self.choice_, self.share_ = found, best["share"]
        return best["tau"]

    def _compare(self, pred: np.ndarray, labels: np.ndarray) -> None:
        """Warn where a constant predicts the held-out labels better."""
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
        """The label of each row, shaped as y was, which lies on the label axis and in the range of the labels of
        training."""
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
        """Lower and upper ends, shaped as y was, of central intervals that hold a label with the probability ``level``.

        They are those of the bins, or of the Gaussian, and are widened to the prediction where it lies outside.

        Raises:
            ValueError: the level lies outside (0, 1). RuntimeError: ``head="regression"`` tells no distribution.
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
        """What the regressor of each target answers; None if there is one target."""
        check_is_fitted(self)
        if self.estimators_ is None:
            return None
        X = self._table(X, reset=False)
        return [getattr(one, method)(X, *arguments) for one in self.estimators_]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
