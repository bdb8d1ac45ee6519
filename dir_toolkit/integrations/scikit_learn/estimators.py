"""Estimators for scikit-learn: :class:`dir_toolkit.LongTailModel` on a perceptron over the columns of a table."""
# ruff: noqa: N803, N806, since scikit-learn's tables are called X

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from ..._checks import labels_array, number, one_of, require, warn, whole
from ...errors import NonFiniteLossError
from ...experiment.training.optimization import Optimization
from ...experiment.training.runtime import Runtime, chosen_device
from ...experiment.training.steps import Steps
from ...labels.bins import Bins, continuous
from ...labels.decoding import Decoding
from ...labels.density import LabelDensity, crowded_bins
from ...labels.kernels import usual_kernel
from ...labels.weights import LDS, Scheme
from ...longtail import LongTailModel, LongTailOutput
from ...priors import TauChoice, choose_tau, class_prior
from ._axis import axis_of

__all__ = ["LongTailClassifier", "LongTailRegressor"]

_ROWS = 8192  # at a time in prediction, which holds a share of each bin for each row
_USUAL_DISTANCES = 30  # of a column from its median, beyond which it is cut off
_DEVIATIONS = 10  # the same, in standard deviations from the mean
_FEWEST_TO_CHOOSE_FROM = 20  # held-out rows, for a tau that is more than chance


class _LongTailEstimator(BaseEstimator):
    """What both estimators share: how they train and predict. Each has its own signature of settings."""

    hidden: Sequence[int]
    head: Any
    loss: str | Callable[..., Tensor] | None
    weights: Scheme | None
    tau: float | Literal["auto"]
    adjust: Literal["after", "in_loss"]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    validation_fraction: float
    patience: int | None
    random_state: Any
    device: str
    verbose: bool
    model_: LongTailModel

    @property
    def _has_bins(self) -> bool:
        return self.head not in ("regression", "gaussian")

    def _checked(self, X: Any, y: Any, sample_weight: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The columns, labels and weights of the rows of positive weight. A row of weight zero counts as absent."""
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2, **options)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        present = weight > 0
        require(present.any(), "sample_weight must be positive for at least one row", got="zeros")
        return X[present], y[present], weight[present]

    def _tau(self) -> float | Literal["auto"] | None:
        """The checked ``tau``, which is None where there is nothing to adjust."""
        one_of("adjust", self.adjust, ("after", "in_loss"))
        if not isinstance(self.tau, str):
            rule = f'tau must be "auto", which does nothing, with head={self.head!r}, which has no bins'
            require(self._has_bins, rule, got=repr(self.tau))
            return number("tau", self.tau, low=0)
        one_of("tau", self.tau, ("auto",))
        chosen = self.adjust == "after" or not self._has_bins
        require(chosen, 'tau must be a number with adjust="in_loss"', got='"auto"', fix='Use adjust="after".')
        return "auto" if self._has_bins else None

    def _fit(self, columns: np.ndarray, labels: np.ndarray, weight: np.ndarray, bins: Bins, **options: Any) -> None:
        """Train on labels of the axis.

        Args:
            options: those of :class:`LongTailModel` that one of the two estimators has alone.
        """
        tau = self._tau()
        optimization = Optimization(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, weight_decay=self.weight_decay
        )
        fraction = number("validation_fraction", self.validation_fraction, low=0, high=0.5, open_low=True)
        if self.patience is not None:
            whole("patience", self.patience, low=1)
        if self.weights is not None:
            one_of("weights", self.weights, ("inverse", "sqrt_inverse", "effective_number", "dense"))
        random = check_random_state(self.random_state)
        runtime = Runtime(chosen_device(self.device), seed=int(random.randint(2**31 - 1)))

        held = np.zeros(len(labels), dtype=bool)
        if self.patience is not None or tau == "auto":
            held[_validation_rows(random, labels, fraction, bins)] = True
            fix = "Pass patience=None and a number as tau, to train without."
            require(held.any(), "y must hold a label twice, to validate on", got="each once", fix=fix)
        own = ~held
        weight = weight / weight[own].mean()
        self._fit_scaler(columns[own], weight[own])
        scaled = self._scaled(columns)
        held &= ~_unlike(scaled, own, held)
        density = LabelDensity(bins, np.bincount(bins.index(labels[own]), weights=weight[own], minlength=len(bins)))
        density._of_weighted_rows = True
        kernel = usual_kernel(bins)
        smooth = density if kernel is None else density.smooth(kernel)
        lds = None
        if self.weights is not None:
            if self._has_bins:  # bins that the held-out rows left empty are no news
                smooth = LabelDensity(bins, np.maximum(smooth.counts, 1.0))
            lds = LDS(bins, kernel=None, scheme=self.weights).fit(smooth)
            weight = weight * lds.sample_weight(labels)

        def tensors(part: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
            x, y, w = (torch.from_numpy(values[part]).to(runtime.device) for values in (scaled, labels, weight))
            return x.float(), y, w.float()

        with torch.inference_mode(False), torch.enable_grad():
            with runtime.seeded("network"):
                backbone, num_features = self._backbone(columns.shape[1])
                if self._has_bins:
                    options["adjust"] = self.adjust
                    options |= {} if tau == "auto" else {"target_prior": "uniform", "tau": tau}
                elif self.head == "regression":
                    options["prior_kernel"] = None  # The density is smooth already.
                model = LongTailModel(
                    backbone,
                    num_features,
                    bins,
                    density=density if self._has_bins else smooth,
                    head=self.head,
                    loss=self.loss,
                    weights=lds,  # a part of the prior, though the loss is given them together with those of rows
                    **options,
                )
            model = model.to(runtime.device, torch.float32)
            self._train(model, tensors(own), tensors(held) if held.any() else None, optimization, runtime)
        if self.patience is not None and self.best_epoch_ <= 3 < len(self.history_):
            first = f"epoch {self.best_epoch_} of {len(self.history_)} had the least loss on the held-out rows"
            fix = "Lower lr, look for rows unlike all others, or pass patience=None."
            warn(f"{first}, which mostly means that little was learnt. {fix}")
        # In float64 a prediction does not depend on the rows beside it; on the CPU a pickle can be loaded anywhere.
        self.model_ = model.eval().cpu().double()
        self.tau_choice_ = None
        if tau == "auto":
            if (rows := int(held.sum())) < _FEWEST_TO_CHOOSE_FROM:
                warn(f"tau is chosen on {rows} held-out rows, little more than by chance. Pass a number.")
            self.tau_choice_ = self._choose_tau(scaled[held], torch.from_numpy(labels[held]))
            tau = self.tau_choice_.tau
            self.model_.set_prior("uniform", tau)
        self.tau_ = tau
        self._compare(scaled[held], labels[held], labels[own])

    def _fit_scaler(self, columns: np.ndarray, weight: np.ndarray) -> None:
        """Learn how columns are cut off and standardized. Without the cut a sentinel among the rows to train on would
        squeeze all other values together, and one among other rows would reach weights that were never trained."""
        middle = np.array([_median(column, weight) for column in columns.T])
        distance = np.abs(columns - middle)
        usual = np.array(
            [_median(row[row > 0], weight[row > 0]) if row.any() else 0.0 for row in distance.T]
        )  # 0 where a column is constant, which it is then taken to be everywhere
        reach = _USUAL_DISTANCES * usual
        self.scaler_ = StandardScaler().fit(np.clip(columns, middle - reach, middle + reach), sample_weight=weight)
        mean, far = self.scaler_.mean_, _DEVIATIONS * self.scaler_.scale_
        low, high = np.maximum(middle - reach, mean - far), np.minimum(middle + reach, mean + far)
        self.column_limits_ = np.array([low, high])

    def _scaled(self, columns: np.ndarray) -> np.ndarray:
        return self.scaler_.transform(np.clip(columns, *self.column_limits_))

    def _backbone(self, columns: int) -> tuple[nn.Module, int]:
        """A perceptron, and the number of its features."""
        rule, fix = "hidden must be a tuple of whole numbers", "Use (64,) for one layer."
        listed = isinstance(self.hidden, Sequence) and not isinstance(self.hidden, str)
        require(listed, rule, got=repr(self.hidden), fix=fix, error=TypeError)
        widths = [columns, *(whole("hidden", width, low=1) for width in self.hidden)]
        layers = [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
        return nn.Sequential(*layers), widths[-1]

    def _train(
        self,
        model: LongTailModel,
        train: tuple[Tensor, Tensor, Tensor],
        val: tuple[Tensor, Tensor, Tensor] | None,
        optimization: Optimization,
        runtime: Runtime,
    ) -> None:
        """Train with columns, labels and weights. With patience the best weights are kept, else the last."""
        rows = len(train[0])
        steps = Steps(model, optimization, rows, runtime)
        self.history_: list[dict[str, float]] = []
        self.best_epoch_, best, kept = optimization.epochs, math.inf, None

        def loss_of(place: int, indices: Tensor) -> Tensor:
            return model(*(values[indices] for values in train)).loss

        for epoch in range(1, optimization.epochs + 1):
            total = torch.zeros((), dtype=torch.float64, device=runtime.device)
            order = torch.randperm(rows, generator=runtime.generator("order", epoch), device="cpu").to(runtime.device)
            for step in steps.epoch(epoch - 1, order, loss_of):
                total += step.samples * step.loss
            row = {"epoch": epoch, "loss": total.item() / rows}
            if val is not None:
                model.eval()
                with torch.no_grad():
                    row["val_loss"] = model(*val).loss.item()
                model.train()
            self.history_.append(row)
            if self.verbose:
                print(" ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            sound, fix = all(map(math.isfinite, row.values())), "Lower lr, or look for values of X far from all others."
            got = f"{row['loss']:g} in epoch {epoch}"
            require(sound, "the loss must be finite", got=got, fix=fix, error=NonFiniteLossError)
            if self.patience is not None:
                if row["val_loss"] < best:
                    self.best_epoch_, best, kept = epoch, row["val_loss"], copy.deepcopy(model.state_dict())
                elif epoch - self.best_epoch_ >= self.patience:
                    break
        if kept is not None:
            model.load_state_dict(kept)

    @torch.no_grad()
    def _read(self, scaled: np.ndarray, read: Callable[[LongTailOutput], Tensor]) -> Tensor:
        """What ``read`` takes of the output for each row."""
        return torch.cat([read(self.model_(x)) for x in torch.from_numpy(scaled).split(_ROWS)])

    def _predicted(self, X: Any, read: Callable[[LongTailOutput], Tensor]) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self._read(self._scaled(X), read).numpy()

    def _compare(self, scaled: np.ndarray, held: np.ndarray, own: np.ndarray) -> None:
        """Warn where one number predicts the held-out labels as well."""

    @abstractmethod
    def _choose_tau(self, scaled: np.ndarray, labels: Tensor) -> TauChoice:
        """The tau with the least error on the held-out rows."""


class LongTailRegressor(RegressorMixin, _LongTailEstimator):
    """A regressor for long-tailed labels, by the rules of scikit-learn.

    By default it scores the bins of a label axis, is trained on labels that are spread over neighbouring bins, and is
    adjusted towards rare labels after training, as far as is best on a share of the rows that is held out.

    Columns are standardized inside, and cut off far from all values that the rows to train on have. A column that is
    constant in these rows has no effect. Rows are held out evenly along the sorted labels. Held-out rows that are
    unlike all rows to train on do not judge the model.

    Labels that spread over orders of magnitude, such as prices, are best learnt by their logarithm:
    ``TransformedTargetRegressor(LongTailRegressor(), func=numpy.log1p, inverse_func=numpy.expm1)``. A warning says
    where most labels crowd in a few bins, where the best epoch is one of the first three, where few rows choose tau,
    and where one number predicts the held-out rows as well.

    Args:
        hidden: the widths of the hidden layers. ``()`` makes a linear model.
        bins: the label axis, which must hold all labels. None makes one that begins half a bin below the least label,
            so that this label is the middle of its bin, and ends half a bin or more beyond the largest.
        num_bins: the number of bins of the axis that is made. Where the labels are multiples of one step, as whole
            numbers are, and there are 8 steps or more from the least to the largest, each bin holds an odd number of
            steps, so that there may be fewer bins or more.
        head: ``"linear"``, ``"cosine"`` or ``"affinity"``, which score bins; ``"regression"``, which gives one number;
            or ``"gaussian"``, which gives mean and variance.
        loss, sigma, decode: as in :class:`dir_toolkit.LongTailModel`.
        weights: the scheme of :class:`dir_toolkit.LDS` by which the smoothed density of labels weights the loss:
            ``"sqrt_inverse"``, ``"inverse"``, ``"effective_number"`` or ``"dense"``. None weights all labels alike.
            Weights are a part of the prior from which ``tau`` starts, so that with any of them 1 means even labels.
        tau: how far to go towards rare labels. 0 keeps the training prior, and 1 goes all the way to even labels.
            ``"auto"`` takes the value with the least bMAE on the held-out rows, the mean of the bins' mean absolute
            errors. Heads without bins have nothing to adjust.
        adjust: ``"after"`` training, or ``"in_loss"``, which needs a number as ``tau``.
        epochs: the largest number of passes over the rows.
        batch_size: the rows per step.
        lr: the highest learning rate of AdamW. It rises over the first twentieth of all steps and falls as a cosine.
        weight_decay: the pull of weight matrices towards zero.
        validation_fraction: the share of the rows that is held out, in (0, 0.5]. With ``patience=None`` and a number as
            ``tau`` none are.
        patience: the number of epochs without a lower loss on the held-out rows after which training stops. Then the
            weights of the best epoch are taken. None trains all epochs and takes the last weights.
        random_state: decides which rows are held out, the first weights, and the order of the rows.
        device: the device to train on: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``, which takes CUDA where there
            is any. Predictions are made on the CPU.
        verbose: whether to print a line per epoch.
    Attributes:
        bins_: the label axis.
        model_: the :class:`dir_toolkit.LongTailModel` in float64, over standardized columns. ``model_.set_prior`` turns
            its predictions to any other prior.
        column_limits_: where the columns are cut off, (2, columns).
        scaler_: what standardizes the columns after the cut.
        tau_: the strength of the adjustment; None without bins.
        tau_choice_: the :class:`dir_toolkit.priors.TauChoice` that ``"auto"`` made, with its curve; else None.
        history_: one row per epoch, with ``epoch``, ``loss`` and, where rows are held out, ``val_loss``.
        best_epoch_: the epoch of the weights.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    Shape:
        X: (N, columns). y, sample_weight: (N,), one label per row.
    Units:
        those of the labels.
    Raises:
        ValueError: X or y hold NaN or infinity, labels are all equal or too large for float32, there is one row only,
        or y has several columns; a setting is unknown or out of range. LabelError: a label lies beyond ``bins``.
        TypeError: labels are not numbers, or a setting is of another kind. NonFiniteLossError: training diverged.
        NotFittedError of scikit-learn: predictions are asked for before ``fit``.

    >>> X = np.linspace(0, 1, 400)[:, None]
    >>> regressor = LongTailRegressor(epochs=20, random_state=0).fit(X, 60 * X[:, 0] ** 3)
    >>> lower, upper = regressor.predict_interval(X, level=0.9)
    >>> bool((lower <= regressor.predict(X)).all()), len(regressor.bins_)
    (True, 100)
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (64, 64),
        bins: Bins | None = None,
        num_bins: int = 100,
        head: Literal["linear", "cosine", "affinity", "regression", "gaussian"] = "linear",
        loss: str | Callable[..., Tensor] | None = None,
        sigma: float | Literal["auto"] | None = "auto",
        decode: Decoding | None = None,
        weights: Scheme | None = None,
        tau: float | Literal["auto"] = "auto",
        adjust: Literal["after", "in_loss"] = "after",
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
        self.bins = bins
        self.num_bins = num_bins
        self.head = head
        self.loss = loss
        self.sigma = sigma
        self.decode = decode
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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LongTailRegressor:
        """Train on rows X and their labels.

        Args:
            sample_weight: >= 0, and scaled to a mean of one. A row of weight zero counts as absent. The prior that
                predictions are adjusted from counts weights, not rows.
        """
        one_of("head", self.head, ("linear", "cosine", "affinity", "regression", "gaussian"))
        X, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        labels = labels_array(y, "y").astype(np.float64)
        self.bins_ = self._axis(labels)
        options: dict[str, Any] = {} if isinstance(self.sigma, str) and self.sigma == "auto" else {"sigma": self.sigma}
        if self.decode is not None:
            options["decode"] = self.decode
        self._fit(X, labels, weight, self.bins_, **options)
        if self._has_bins and not self.model_.readout.warned_crowded and (crowding := _crowding(labels, self.bins_)):
            warn(crowding)
        return self

    def _axis(self, labels: np.ndarray) -> Bins:
        if self.bins is None:
            return axis_of(labels, whole("num_bins", self.num_bins, low=2))
        number("the largest label", float(np.abs(labels).max()), float32=True)
        varies = labels.min() < labels.max()
        require(varies, "y must hold at least two different labels", got=f"only {labels[0]:g}")
        continuous(self.bins, "Use LongTailClassifier for classes.")
        return self.bins

    def _choose_tau(self, scaled: np.ndarray, labels: Tensor) -> TauChoice:
        return self.model_.choose_tau(self._read(scaled, lambda out: out.scores), labels)

    def _compare(self, scaled: np.ndarray, held: np.ndarray, own: np.ndarray) -> None:
        crowded = self._has_bins and _crowding(own, self.bins_)
        if crowded or len(held) < _FEWEST_TO_CHOOSE_FROM:
            return
        row = self.bins_.index(held)
        alike = 1 / np.bincount(row)[row]  # each bin counts alike, as where rare labels are what matters
        errors = [np.abs(pred - held) for pred in (self._read(scaled, self._label).numpy(), np.median(own))]
        (mean, constant), (balanced, of_constant) = ([np.average(e, weights=w) for e in errors] for w in (None, alike))
        if mean > 1.1 * constant and balanced > of_constant:
            lower = "tau or lr" if self._has_bins else "lr"
            message = f"on {len(held)} held-out rows the mean absolute error is {mean:.3g}, and {constant:.3g} for a "
            message += f"constant, the median label. Lower {lower}, look for mistyped labels, or train on the "
            message += "logarithm of y if it is skewed."
            warn(message)

    def predict(self, X: Any) -> np.ndarray:
        """The label of each row, (N,), which lies on the label axis."""
        return self._predicted(X, self._label)

    def _label(self, output: LongTailOutput) -> Tensor:
        return self._on_axis(output.prediction)

    def _on_axis(self, values: Tensor) -> Tensor:
        return values.clamp(float(self.bins_.edges[0]), float(self.bins_.edges[-1]))

    def predict_interval(self, X: Any, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends, (N,) each, of central intervals that hold a label with the probability ``level``.

        Raises:
            ValueError: the level lies outside (0, 1). RuntimeError: ``head="regression"`` tells no distribution.
        """

        def ends(out: LongTailOutput) -> Tensor:
            return self._on_axis(torch.stack(self.model_.interval(out, level), 1))

        lower, upper = self._predicted(X, ends).T
        return lower, upper


class LongTailClassifier(ClassifierMixin, _LongTailEstimator):
    """A classifier for long-tailed classes, by the rules of scikit-learn.

    By default it is trained by the logit-adjusted loss, so that it predicts as if all classes were equally frequent.
    Columns are standardized and cut off inside, as by :class:`LongTailRegressor`. Rows are held out in proportion to
    the classes, of each of which at least one row is left to train on.

    Args:
        head: ``"linear"``, ``"cosine"`` or ``"affinity"``.
        loss: as in :class:`dir_toolkit.LongTailModel`.
        weights: the scheme of :class:`dir_toolkit.LDS` by which the counts of the classes weight the loss, or None. The
            weights are a part of the prior from which ``tau`` starts.
        tau: how far to go towards rare classes. 0 keeps the training prior, and 1 goes all the way to even classes.
            ``"auto"`` takes the value with the least balanced error on the held-out rows, and needs
            ``adjust="after"``.
        adjust: ``"in_loss"``, or ``"after"`` training. Affinities need the latter, unless ``loss="cross_entropy"``.
        hidden, epochs, batch_size, lr, weight_decay, validation_fraction, patience, random_state, device, verbose: as
            in :class:`LongTailRegressor`.
    Attributes:
        classes_: the classes, in order.
        model_, column_limits_, scaler_, tau_, tau_choice_, history_, best_epoch_, n_features_in_, feature_names_in_: as
            in :class:`LongTailRegressor`.
    Shape:
        X: (N, columns). y, sample_weight: (N,), one class per row, of numbers or strings.
    Raises:
        ValueError: X or y hold NaN or infinity, labels are of one class, of one row or continuous, or y has several
        columns; a setting is unknown or out of range. TypeError: a setting is of another kind. NonFiniteLossError:
        training diverged. NotFittedError of scikit-learn: predictions are asked for before ``fit``.

    >>> X = np.linspace(0, 1, 400)[:, None]
    >>> classifier = LongTailClassifier(epochs=20, random_state=0).fit(X, np.where(X[:, 0] < 0.9, "benign", "rare"))
    >>> classifier.predict([[0.1], [0.99]]).tolist()
    ['benign', 'rare']
    """

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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LongTailClassifier:
        """Train on rows X and their classes; ``sample_weight`` as in :meth:`LongTailRegressor.fit`."""
        one_of("head", self.head, ("linear", "cosine", "affinity"))
        X, y, weight = self._checked(X, y, sample_weight)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        several = len(self.classes_) > 1
        require(several, "y must hold at least two classes", got=f"one class, {self.classes_[0]!r}")
        self._fit(X, labels, weight, Bins.classes(len(self.classes_)))
        return self

    def _choose_tau(self, scaled: np.ndarray, labels: Tensor) -> TauChoice:
        density = self.model_.density
        assert density is not None
        return choose_tau(self._read(scaled, _log_shares), labels, class_prior(density, weights=self.model_.weights))

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, (N,)."""
        place = self._predicted(X, lambda out: out.prediction)
        return self.classes_[place]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, (N, classes), under the prior that predictions are made for."""
        return self._predicted(X, _shares)

    def decision_function(self, X: Any) -> np.ndarray:
        """The log-probability of each class, (N, classes); of two classes the log-odds of the second, (N,)."""
        scores = self._predicted(X, _log_shares)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores


def _crowding(labels: np.ndarray, bins: Bins) -> str:
    """A warning if more than half of the labels share one bin of many and are not all equal there, or nothing."""
    index, counts = bins.index(labels), bins.tally(labels)
    crowded = crowded_bins(bins, counts)
    if not crowded or np.ptp(labels[index == counts.argmax()]) == 0:
        return ""
    return (
        f"{crowded[0]}, where they are hardly told apart. Train on their logarithm, by scikit-learn's "
        "TransformedTargetRegressor(regressor, func=numpy.log1p, inverse_func=numpy.expm1), pass narrower bins there, "
        "or look for mistyped labels."
    )


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    """The least value that half of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(share, share[-1] / 2)]])


def _unlike(scaled: np.ndarray, own: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Rows held out of which a column lies farther off those to train on than half of their range. What a network
    makes of such rows says nothing of how well it has learnt, and few of them outweigh all others. None, if all are."""
    low, high = scaled[own].min(0), scaled[own].max(0)
    margin = (high - low) / 2
    far = held & ((scaled < low - margin) | (scaled > high + margin)).any(1)
    return far if far.sum() < held.sum() else np.zeros_like(far)


def _shares(output: LongTailOutput) -> Tensor:
    return output.distribution


def _log_shares(output: LongTailOutput) -> Tensor:
    shares = _shares(output)
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


def _validation_rows(random: np.random.RandomState, labels: np.ndarray, fraction: float, bins: Bins) -> np.ndarray:
    """Rows to hold out, one of each run along the sorted labels; no class loses its last row."""
    order = np.lexsort((random.random_sample(len(labels)), labels))
    runs = np.array_split(order, max(1, min(len(labels) // 2, round(fraction * len(labels)))))
    rows = np.array([random.choice(run) for run in runs])
    if not bins.categorical:
        return rows
    left = np.delete(labels, rows)
    return rows[np.isin(labels[rows], left)]
