"""A number and a distribution over bins, averaged in proportions that suit held-out rows."""
# ruff: noqa: N803, since scikit-learn's tables are called X

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ..._checks import number, one_of, require, warn
from ...labels.bins import Bins, continuous
from ...labels.density import LabelDensity
from ...longtail import LongTailModel
from ...longtail.calibration import balanced_weights
from ...longtail.readouts import TargetPrior, interquartile_range
from ...target_prior import PriorEstimate
from ._windows import LogShares, Windows

TAUS = np.linspace(0, 1.5, 16)  # that are tried together with each share of the number
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST = 20  # held-out rows, on which errors say more than chance does


class Blended(RegressorMixin):
    """Mixin: prediction = share_ * number + (1 - share_) * model, whose bins are adjusted by ``tau_``."""

    bins: Bins | None
    tau: float | Literal["auto"]
    by: Literal["bmae", "mae", "bmse", "mse"]
    most_mae: float | None
    bins_: Bins
    label_range_: np.ndarray
    model_: LongTailModel
    share_: float
    tau_: float | None
    choice_: list[dict[str, float]]

    def _check_choice(self) -> None:
        one_of("by", self.by, ("bmae", "mae", "bmse", "mse"))
        if self.most_mae is not None:
            number("most_mae", self.most_mae, low=1)

    def _take_axis(self, labels: np.ndarray) -> Bins:
        """The axis of these labels, and the range that predictions are held to."""
        number("the largest label", float(np.abs(labels).max()), float32=True)
        require(labels.min() < labels.max(), "y must hold at least two different labels", got=f"only {labels[0]:g}")
        bins = self.bins
        if bins is None:
            bins = Bins.auto(labels)
        continuous(bins, "Use LongTailClassifier for classes.")
        bins.index(labels)  # Labels beyond the axis are refused before anything has changed.
        ends = float(bins.edges[0]), float(bins.edges[-1])
        self.bins_, self.label_range_ = bins, np.clip([labels.min(), labels.max()], *ends)
        return bins

    def _held_out_weight(self, labels: np.ndarray) -> np.ndarray:
        """The weight of each held-out label, (N,), as in :meth:`dir_toolkit.LongTailModel.choose_tau`."""
        assert self.model_.density is not None
        return balanced_weights(self.bins_.index(labels), self.model_.density, self.bins_)

    def _choose(self, labels: np.ndarray, weight: np.ndarray, numbers: Tensor | None, scores: Tensor) -> None:
        """Take the share of the number and the tau of the bins that suit the held-out rows best, by their weights."""
        of_bins, index, candidates = self._held_out_weight(labels), self.bins_.index(labels), []
        balanced = of_bins * weight  # with each bin's total kept
        balanced *= (np.bincount(index, of_bins) / np.bincount(index, balanced).clip(1e-300))[index]
        for tau in TAUS.tolist() if isinstance(self.tau, str) else [self.tau]:
            self.model_.set_prior("uniform", tau)
            binned = self.model_.readout(scores, scores, scores).prediction
            for share in SHARES if numbers is not None else (0.0,):
                blend = binned if numbers is None else share * numbers + (1 - share) * binned
                error = np.abs(self._on_axis(blend).numpy() - labels)
                errors = {"mae": np.average(error, weights=weight), "bmae": balanced @ error}
                errors |= {"mse": np.average(error**2, weights=weight), "bmse": balanced @ error**2}
                candidates.append({"share": share, "tau": tau, **{name: float(x) for name, x in errors.items()}})
        least = min(row["mae"] for row in candidates)
        most = math.inf if self.most_mae is None else self.most_mae * least
        order = labels.argsort()
        total = weight[order].cumsum()
        median = labels[order][np.searchsorted(total, total[-1] / 2)]
        most = max(least, min(most, float(np.average(np.abs(labels - median), weights=weight))))
        best = min((row for row in candidates if row["mae"] <= most), key=lambda row: row[self.by])
        self.choice_, self.share_, self.tau_ = candidates, best["share"], best["tau"]
        self.model_.set_prior("uniform", best["tau"])

    def _compare(self, pred: np.ndarray, labels: np.ndarray) -> None:
        """Warn where a constant predicts the held-out labels better."""
        if len(labels) < FEWEST:
            return
        weight = self._held_out_weight(labels)
        errors = [np.abs(one - labels) for one in (pred, np.median(labels))]
        (mean, constant), (balanced, of_constant) = ([np.average(e, weights=w) for e in errors] for w in (None, weight))
        if mean > 1.1 * constant and balanced > of_constant:
            lower = "lr" if self.tau_ is None else "tau or lr"
            message = f"on {len(labels)} held-out rows the mean absolute error is {mean:.3g}, and {constant:.3g} for a "
            warn(f"{message}constant, the median label. Lower {lower}, or look for mistyped labels.")

    _predicted: Callable[..., np.ndarray]  # of X and what reads the inputs of each row
    _number: Callable[[Tensor], Tensor | None]  # of each row (N,), if there is one
    _of_model: Callable[[Tensor], Tensor]  # what of the inputs the model takes

    def _label(self, x: Tensor) -> Tensor:
        label, number = self.model_(self._of_model(x)).prediction, self._number(x)
        return self._on_axis(label if number is None else self.share_ * number + (1 - self.share_) * label)

    def _on_axis(self, values: Tensor) -> Tensor:
        return values.clamp(*self.label_range_.tolist())

    def predict(self, X: Any) -> np.ndarray:
        """The label of each row, (N,), which lies on the label axis and in the range of the labels of training."""
        return self._predicted(X, self._label)

    def predict_interval(self, X: Any, level: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends, (N,) each, of intervals that hold a label with the probability ``level``.

        They are those of ``calibrate_intervals``, which may reach beyond the labels of training, even to infinity.
        Before, they are the central intervals of the bins, or of the Gaussian, in the range of the labels of training.
        They are widened to the prediction where it lies outside.

        Args:
            level: in (0, 1); None is the calibrated one, and 0.9 before.
        Raises:
            NotFittedError: it is not fitted. ValueError: the level lies outside (0, 1), or is not the calibrated one.
            RuntimeError: the prior was set after calibration.
        """

        check_is_fitted(self)
        calibrated = self.model_.readout.intervals.known(level)

        def ends(x: Tensor) -> Tensor:
            lower, upper = self.model_.interval(self.model_(self._of_model(x)), level)
            label = self._label(x)
            if not calibrated:
                lower, upper = self._on_axis(lower), self._on_axis(upper)
            return torch.stack([lower.minimum(label), upper.maximum(label)], 1)

        lower, upper = self._predicted(X, ends).T
        return lower, upper

    def calibrate_intervals(self, X: Any, y: Any, level: float = 0.9, **options: Any) -> None:
        """Calibrate ``predict_interval``, so that it holds a share ``level`` of the labels of each region.

        Args:
            X: rows that were not used in ``fit``.
            y: their labels.
            level: the coverage, in (0, 1).
            options: those of :meth:`dir_toolkit.LongTailModel.calibrate_intervals`, which has the same errors.
        """
        scores = torch.from_numpy(self.scores(X))
        self.model_.calibrate_intervals(scores, y, level, **options)

    def scores(self, X: Any) -> np.ndarray:
        """The scores of each row under the training prior, for :func:`dir_toolkit.estimate_prior`.

        Shape:
            Returns (N, B) with bins.
        Raises:
            NotFittedError: it is not fitted.
        """
        return self._predicted(X, lambda x: self.model_(self._of_model(x)).scores)

    def set_prior(self, target_prior: TargetPrior, tau: float = 1.0) -> None:
        """Predict under this prior, by the bins alone, since a number keeps the prior that it was trained under.
        An estimate that was not accepted changes nothing.

        Args:
            target_prior: as in :meth:`dir_toolkit.LongTailModel.set_prior`; a prior is (B,), with the sum one.
            tau: >= 0, the strength of the adjustment.
        Raises:
            as :meth:`dir_toolkit.LongTailModel.set_prior`.
        """
        check_is_fitted(self)
        if isinstance(target_prior, PriorEstimate) and not target_prior.accepted:
            return
        self.model_.set_prior(target_prior, tau)
        self.share_, self.tau_ = 0.0, tau


def counted(bins: Bins, labels: np.ndarray, weight: np.ndarray) -> LabelDensity:
    """The density of labels, each of which counts by its weight."""
    density = LabelDensity(bins, np.bincount(bins.index(labels), weights=weight, minlength=len(bins)))
    density._of_weighted_rows = density._warned_crowded = True
    return density


def usual_sigma(bins: Bins, density: LabelDensity) -> float | Literal["auto"]:
    """Width of the label kernel: two bins; for equal bins at most IQR/1.35."""
    if not (bins.relative_widths == 1).all():
        return "auto"
    return min(2 * float(np.diff(bins.edges)[0]), interquartile_range(bins, density) / 1.35)


def model_of_forecasts(
    bins: Bins, forecasts: np.ndarray, labels: np.ndarray, weight: np.ndarray, density: LabelDensity, **options: Any
) -> tuple[LongTailModel, Tensor]:
    """A model that takes forecasts for features, and leave-one-out scores of these rows.

    Args:
        bins, density: the axis, and the labels of all rows.
        forecasts: of held-out rows, (N,). labels, weight: of the same rows.
        options: of the readout.
    """
    options.setdefault("sigma", usual_sigma(bins, density))
    model = LongTailModel(nn.Identity(), 1, bins, density=density, head=nn.Identity(), **options).cpu()
    values = torch.from_numpy(labels)
    target = model.readout.target(model._placed(values, bins.place(values, model.outside, model.missing)))
    model.head = head = Windows(torch.from_numpy(forecasts), values, torch.from_numpy(weight), target, bins)
    return model.double().eval(), head.log_shares


def model_of_shares(
    bins: Bins, shares: np.ndarray, labels: np.ndarray, density: LabelDensity, by: Any, **options: Any
) -> tuple[LongTailModel, Tensor]:
    """A model that takes shares of bins for features, with the temperature that suits these rows, and their scores."""
    options |= {"density": density, "head": nn.Identity(), "sigma": None}
    model = LongTailModel(nn.Identity(), len(bins), bins, **options).cpu()
    model.head = head = LogShares(torch.from_numpy(density.prior(floor=1.0)), len(labels))
    scores = head(torch.from_numpy(shares))
    model.calibrate(scores, torch.from_numpy(labels), by=by, most_mae=None, bias=False)
    return model.double().eval(), scores
