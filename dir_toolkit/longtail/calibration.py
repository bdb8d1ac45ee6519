"""Temperature and tau, chosen on validation data.

Held-out data have few rare labels, and may be distributed differently from training data. Every error and every log
score is therefore a weighted sum over bins. The weight of a bin is known beforehand, and is divided among the held-out
labels in the bin or nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import (
    as_tensors,
    finite,
    instance,
    is_tensor,
    number,
    on_host,
    one_of,
    real,
    require,
    shaped,
    warn,
    word,
)
from .._numerics import wide_dtype
from ..errors import ArgumentError
from ..labels.bins import Bins, Outside
from ..labels.density import LabelDensity
from ..priors import (
    TIE,
    TauChoice,
    best_temperature,
    search_tau,
    warn_of_tau,
    warn_of_temperature,
    within_bounds,
)
from ..target_prior import ratio_window, slope_and_bias
from .prediction import read_batches
from .readouts import LongTailOutput, PriorKernel, ScoreReadout
from .rows import as_rows, one_per_row

if TYPE_CHECKING:
    from .model import LongTailModel

__all__ = ["Judged"]

Judged = Literal["bmae", "mae", "bmse", "mse", "balanced_error", "error"]

_SQUARED = ("bmse", "mse")
_MOST_MAE = 1.1  # the bound of the MAE by default, on an axis
_TAUS = np.linspace(0, 3, 16)  # at which calibrations are compared
_REGIONS = ("many", "medium", "few", "unseen")
_NEAREST = 3  # the number of labels that represent a bin
_TEST_SHARE = 1 / 3  # labels of the test set that is assumed, per training label
OF_MODEL = "output.scores of this model; calibrate takes inputs as [(inputs, labels)]"  # what scores are


def calibrate(
    model: LongTailModel,
    scores_or_batches: Any,
    labels: Any,
    *,
    by: Judged | None,
    most_mae: float | Literal["auto"] | None,
    bias: bool | Literal["auto"],
    outside: Outside | None,
) -> TauChoice:
    bias = bool(bias) if isinstance(bias, np.bool_) else bias
    instance((bool, str), bias=bias)
    word("bias", bias, "auto")
    readout = _with_prior(model)
    if labels is None:
        scores_or_batches, labels = held_out(model, scores_or_batches)
    prior = readout.training_prior(readout.chosen_kernel("auto"), model.weights)
    choose = _Choice(model, prior, scores_or_batches, labels, outside, by, most_mae)
    choice, biases = choose.calibrated(bias)
    warn_of_temperature(choice.temperature, choose.logits.cpu().numpy())  # as errors these come before any change
    warn_of_tau(choice)
    readout.set_prior("uniform", choice.tau, "auto", choice.temperature, model.weights, biases)
    return choice


def choose_tau(
    model: LongTailModel,
    scores: Tensor,
    labels: Any,
    *,
    by: Judged | None,
    taus: Sequence[float] | np.ndarray | None,
    most_mae: float | Literal["auto"] | None,
    kernel: PriorKernel,
    outside: Outside | None,
) -> TauChoice:
    readout = _with_prior(model)
    prior = readout.training_prior(readout.chosen_kernel(kernel), model.weights)
    choose = _Choice(model, prior, scores, labels, outside, by, most_mae)
    temperature = readout.adjuster.temperature.item()
    choice = choose.tau(choose.divided(temperature, readout.bias), taus, strict=choose.asked)
    return warn_of_tau(replace(choice, temperature=temperature))


def row_weights(share: np.ndarray, row: np.ndarray, bins: Bins) -> np.ndarray:
    """The weights (N,) of labels in these bins, such that each bin has its share as total weight. They are float64 and
    sum to one.

    A bin with fewer than three labels is represented by the labels of a window of bins around it that holds three. A
    class is represented by its own labels alone, and is ignored if it has none.

    Shape:
        share: (B,). row: (N,) int64.
    """
    placed, counted = np.sort(row), np.flatnonzero(share)
    ends = np.full(_NEAREST, np.inf)
    around = np.searchsorted(placed, counted)[:, None] + np.arange(2 * _NEAREST)  # (bins, 2 * _NEAREST)
    distance = np.abs(np.concatenate([-ends, placed, ends])[around] - counted[:, None])
    reach = np.zeros(len(counted)) if bins.categorical else np.sort(distance)[:, _NEAREST - 1]
    start, stop = np.searchsorted(placed, counted - reach), np.searchsorted(placed, counted + reach, side="right")
    of_each = share[counted] / (stop - start).clip(1)
    steps = np.bincount(start, of_each, len(row) + 1) - np.bincount(stop, of_each, len(row) + 1)
    weight = steps.cumsum()[np.searchsorted(placed, row)]
    return weight / weight.sum()


def balanced_weights(row: np.ndarray, density: LabelDensity, bins: Bins) -> np.ndarray:
    """The weights (N,) with which errors of held-out labels in these bins estimate the error over bins of a test set.
    They sum to one.

    A bin counts by its width. If it has no held-out label, this is multiplied by the probability that a test set a
    third as large as the training set has a label there.

    Shape:
        row: (N,) int64, over the bins of the density.
    """
    held = np.bincount(row, minlength=len(bins)) > 0
    share = np.where(held, 1.0, -np.expm1(-_TEST_SHARE * density.counts))
    return row_weights(share * bins.relative_widths, row, bins)


class _Choice:
    """Checked held-out labels and scores, and what judges them.

    Attributes:
        logits, labels, row: of each label, (N, B), (N,) and (N,).
        by: the error to minimise. most: the largest allowed ratio of the error over samples to that before; None
            means any. asked: whether it was asked for.
        start: the errors before, if they are not those at tau 0.
    """

    def __init__(
        self,
        model: LongTailModel,
        prior: Tensor,
        scores: Any,
        labels: Any,
        outside: Outside | None,
        by: Judged | None,
        most_mae: float | str | None,
    ) -> None:
        self.readout, self.bins, self.prior = _with_prior(model), model.bins, prior
        outside = model.outside if outside is None else outside
        is_tensor(scores=scores)
        real(scores=scores)
        (labels,) = as_tensors(labels=labels)
        scores, shape = as_rows(scores, 1)
        shaped(("N", len(self.bins)), OF_MODEL, scores=scores)
        labels = one_per_row("labels", labels, shape) if len(shape) > 1 else labels
        shaped(scores.shape[:1], "one per row of scores", labels=labels)
        scores = scores.detach().to(wide_dtype(scores))
        finite(scores=on_host("scores", scores))
        row = self.bins.index(on_host("labels", labels), outside, missing=model.missing)
        held = row >= 0
        require(bool(held.any()), "at least one label must lie on the axis", got="none")
        self.row = row[held].numpy()
        self.sequence = np.arange(len(row))[held.numpy()] // (len(row) // shape[0])
        self.logits, self.labels = (
            self.readout.logits(scores[held.to(scores.device)]),
            labels[held.to(labels.device)].to(scores.device),
        )
        density = self.readout.density
        assert density is not None  # a prior needs a density
        present = np.bincount(self.row, minlength=len(self.bins)) > 0
        if self.bins.categorical and not present.all():
            warn(f"no validation label of {(~present).sum()} of {len(present)} classes, which are ignored.")
        self.weight, region = balanced_weights(self.row, density, self.bins), density.regions()[self.row]
        # The labels in each region of the training density that has any.
        self.regions = {name: own for name in _REGIONS if (own := region == name).any()}
        self.balanced, self.plain = self.readout.judged[:2]
        self.by = self.balanced if by is None else by
        one_of("by", self.by, self.readout.judged)
        word("most_mae", most_mae, "auto")
        self.asked = not isinstance(most_mae, str)
        if isinstance(most_mae, str):
            self.most = None if self.bins.categorical else _MOST_MAE
        else:
            self.most = None if most_mae is None else number("most_mae", most_mae, low=1)
        self.start: Mapping[str, float] | None = None

    def calibrated(self, bias: bool | str) -> tuple[TauChoice, Tensor]:
        """The choice of temperature and tau, and the biases (B,)."""
        self.start = self.tau(self.logits, [0.0]).before
        if isinstance(bias, str):
            best = self.biased_if_it_pays() or self.best(False)
        else:
            best = self.best(bias, strict=self.asked)
        return best.choice, best.biases

    def fit(self, biased: bool, rows: Any, temperature: float | None) -> tuple[float, Tensor]:
        """The temperature, unless it is given, and the biases (B,) with the best log score of the labels' bins,
        weighted as in training. Without ``biased`` the biases are zero."""
        logits, row = self.logits[rows].cpu().double().numpy(), self.row[rows]
        prior = self.prior.numpy()
        offset = self.readout.loss_offset.cpu().double().numpy()
        if biased:  # bins without labels get no weight, as slope_and_bias leaves them out
            prior = np.where(np.bincount(row, minlength=len(prior)) > 0, prior, 0.0)
        weight, biases = row_weights(prior, row, self.bins), torch.zeros_like(self.readout.bias)
        if biased:
            slope = None if temperature is None else 1 / temperature
            window, counts = ratio_window(self.bins), len(row) * weight
            slope, of_bins = slope_and_bias(logits, row, window, counts, offset, slope=slope)
            return 1 / slope, torch.from_numpy(of_bins).to(biases)
        return best_temperature(logits, row, weight, offset) if temperature is None else temperature, biases

    def at(self, temperature: float | None, biased: bool, half: np.ndarray | None) -> _Best:
        """Choose tau at a temperature or at the fitted one. Of two halves each is calibrated on the other."""
        logits = torch.empty_like(self.logits)
        for own in [np.ones(len(self.row), dtype=bool)] if half is None else [half, ~half]:
            used, biases = self.fit(biased, own if half is None else ~own, temperature)
            logits[own] = self.divided(used, biases)[own]
        choice = self.tau(logits, None if half is None else _TAUS)
        return _Best(replace(choice, temperature=used, biased=biased), logits, biases)

    def best(self, biased: bool, half: np.ndarray | None = None, *, strict: bool = False) -> _Best:
        """Choose tau at the fitted temperature and at temperature 1. Of the choices that keep the bound, the one with
        the lower error is taken. Without biases temperature 1 always keeps it, at tau 0. If no choice keeps it, this
        raises if ``strict``.

        For a most probable class or bin a temperature only rescales tau, unless the loss was adjusted. There
        temperature 1 competes only if the fitted one breaks the bound or raises the error.
        """
        assert self.start is not None
        most = math.inf if self.most is None else self.most * self.start[self.plain]

        def rank(one: _Best) -> tuple[float, float]:
            samples = one.choice.after[self.plain]
            return (samples if samples > most else 0.0), one.choice.after[self.by]

        fitted = best = self.at(None, biased, half)
        mode = self.bins.categorical or self.readout.decoding == "mode"
        if mode and rank(fitted) <= (0.0, self.start[self.by] + TIE):
            return fitted
        one = self.at(1.0, biased, half)
        (beyond, error), of_fitted = rank(one), rank(fitted)
        if (beyond, error + TIE) < of_fitted:
            best = one
        if strict and rank(best)[0] > 0:
            self.tau(best.logits, best.choice.taus, strict=True)  # raises, and says what would keep the bound
        least = min(fitted.choice.scores.min(), one.choice.scores.min())
        held = rank(best)[0] == 0 and least < best.choice.after[self.by] - TIE
        return replace(best, choice=replace(best.choice, bound=self.most if held else None))

    def biased_if_it_pays(self) -> _Best | None:
        """The best choice with biases, if they lower the error at the best tau by more than its standard error, where
        each half of the labels is calibrated on the other. Biases that break the bound or have no best temperature gain
        nothing. Sequences are not split.
        """
        _, sequence = np.unique(self.sequence, return_inverse=True)
        middle = np.bincount(sequence, self.row) / np.bincount(sequence)
        first = np.empty(len(middle), dtype=bool)
        first[middle.argsort(kind="stable")] = np.arange(len(first)) % 2 == 0
        if first.all():
            return None
        try:
            before, after = (self.best(biased, first[sequence], strict=True) for biased in (False, True))
            gains = np.bincount(sequence, self._weighted_errors(before) - self._weighted_errors(after))
            if gains.sum() <= math.sqrt(len(gains)) * gains.std(ddof=1):
                return None
            best = self.best(True, strict=True)
        except ArgumentError:  # no tau keeps the bound
            return None
        return best if within_bounds(best.choice.temperature) else None

    def divided(self, temperature: float, biases: Tensor) -> Tensor:
        """The logits at a temperature and biases, (N, B)."""
        return self.logits / temperature + biases.to(self.logits)

    @torch.no_grad()
    def tau(self, logits: Tensor, taus: Any = None, *, strict: bool = False) -> TauChoice:
        """Choose tau for calibrated logits. If no tau keeps the bound, it raises if ``strict``, and otherwise takes
        the least error over samples."""

        def errors_at(tau: float) -> dict[str, float]:
            error = self._errors(logits, tau)
            errors = {self.balanced: float(self.weight @ error), self.plain: float(error.mean())}
            errors |= {f"{self.plain}_{region}": float(error[own].mean()) for region, own in self.regions.items()}
            squared = {"bmse": float(self.weight @ error**2), "mse": float((error**2).mean())}
            return {**squared, **errors} if self.by in _SQUARED else errors

        bound = None if self.most is None else (self.plain, self.most)
        return search_tau(errors_at, taus, self.by, samples=len(self.row), bound=bound, strict=strict, start=self.start)

    @torch.no_grad()
    def _errors(self, logits: Tensor, tau: float) -> np.ndarray:
        """The error (N,) of each label at a tau, for calibrated logits."""
        adjusted = logits + self.readout.offset_from(self.prior, "uniform", tau).to(logits)
        return self.readout.errors(adjusted, self.labels).double().cpu().numpy()

    def _weighted_errors(self, best: _Best) -> np.ndarray:
        """What each label adds to the chosen error, (N,)."""
        error = self._errors(best.logits, best.choice.tau) ** (2 if self.by in _SQUARED else 1)
        return error * (self.weight if self.by in (self.balanced, "bmse") else 1 / len(error))


@dataclass(frozen=True)
class _Best:
    """A choice, with the calibrated logits (N, B) and the biases (B,) that it was made for."""

    choice: TauChoice
    logits: Tensor
    biases: Tensor


def _with_prior(model: LongTailModel) -> ScoreReadout:
    if not isinstance(model.readout, ScoreReadout):
        raise model.readout.cannot("have a prior")
    return model.readout


def held_out(model: nn.Module, batches: Any) -> tuple[Tensor, Tensor]:
    """The scores and labels of all batches. Sequences of one length stay whole, and others become rows."""
    fix = "Pass scores and labels."
    require(not isinstance(batches, Tensor), "scores need labels", got="labels=None", fix=fix)

    def pair(output: LongTailOutput, labels: Any) -> tuple[Tensor, Tensor]:
        is_tensor(labels=labels)
        shape = output.prediction.shape[:-1] if several else output.prediction.shape
        if len(shape) > 1 and several:
            shaped((..., output.prediction.shape[-1]), "one per target in the last axis", labels=labels)
            of_targets = [one_per_row("labels", own, shape).view(shape) for own in labels.unbind(-1)]
            labels = torch.stack(of_targets, -1)
        elif len(shape) > 1:
            labels = one_per_row("labels", labels, shape).view(shape)
        dims.append(len(shape))
        return output.scores, labels.to(output.scores.device)

    several, dims = hasattr(model, "targets"), list[int]()
    scores, labels = zip(*read_batches(model, batches, pair, labelled=True), strict=True)
    if len({part.shape[1:] for part in scores}) > 1:
        scores, labels = (tuple(part.flatten(0, dims[0] - 1) for part in parts) for parts in (scores, labels))
    return torch.cat(scores), torch.cat(labels)
