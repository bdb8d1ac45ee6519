"""Temperature and tau, chosen on validation data.

Held-out data have few rare labels, and may be distributed differently from training data. Every error and every log
score is therefore a weighted sum over bins. The weight of a bin is known beforehand, and is divided among the held-out
labels in the bin or nearest to it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from ..errors import ArgumentError, DirToolkitWarning
from ..labels.bins import Bins, Outside
from ..labels.density import LabelDensity
from ..priors import TIE, TauChoice, at_bound, best_temperature, search_tau
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
    choice, biases = _Choice(model, prior, scores_or_batches, labels, outside).calibrated(bias, by, most_mae)
    readout.bias.copy_(biases)
    model.set_prior("uniform", choice.tau, temperature=choice.temperature)
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
    choose = _Choice(model, prior, scores, labels, outside)
    temperature = readout.adjuster.temperature.item()
    strict = not isinstance(most_mae, str)
    choice = choose.tau(choose.divided(temperature, readout.bias), by, taus, choose.bound(most_mae), strict=strict)
    return replace(choice, temperature=temperature)


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
    """Checked held-out labels and scores."""

    def __init__(self, model: LongTailModel, prior: Tensor, scores: Any, labels: Any, outside: Outside | None) -> None:
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

    def calibration(self, biased: bool, rows: Any = slice(None)) -> tuple[float, Tensor]:
        """The temperature and the biases (B,) with the best log score of the labels' bins, weighted as in training.
        Without ``biased`` the biases are zero."""
        logits, row = self.logits[rows].cpu().double().numpy(), self.row[rows]
        prior = self.prior.numpy()
        offset = self.readout.loss_offset.cpu().double().numpy()
        if biased:  # bins without labels get no weight, as slope_and_bias leaves them out
            prior = np.where(np.bincount(row, minlength=len(prior)) > 0, prior, 0.0)
        weight = row_weights(prior, row, self.bins)
        if not biased:
            return best_temperature(logits, row, weight, offset), torch.zeros_like(self.readout.bias)
        slope, biases = slope_and_bias(logits, row, ratio_window(self.bins), len(row) * weight, offset)
        return at_bound(1 / slope), torch.from_numpy(biases).to(self.readout.bias)

    def calibrated(self, bias: bool | str, by: Any, most_mae: Any) -> tuple[TauChoice, Tensor]:
        """Choose tau and what it is added to: temperature and biases (B,)."""
        bound, start = self.bound(most_mae), self.start(by)
        if self.gains_by_bias(by, bound, start) if isinstance(bias, str) else bias:
            temperature, biases = self.calibration(True)
            strict = isinstance(bias, str) or not isinstance(most_mae, str)
            choice = self.tau(self.divided(temperature, biases), by, None, bound, start, strict=strict)
            return replace(choice, temperature=temperature, biased=True), biases
        with _recorded() as warned:
            temperature, biases = self.calibration(False)
        fitted = self.divided(temperature)
        choice, logits = self.better(fitted, by, None, bound, start)
        if logits is fitted:
            _issue(warned)
        return replace(choice, temperature=temperature if logits is fitted else 1.0), biases

    def better(
        self, fitted: Tensor, by: Any, taus: Any, bound: float | None, start: Mapping[str, float]
    ) -> tuple[TauChoice, Tensor]:
        """Choose tau for logits divided by the fitted temperature and for logits as they are. The choice with the lower
        error and its logits are returned.

        The predicted class under the best tau does not depend on the temperature, which is the fitted one then.
        """
        candidates = []
        for logits in (fitted,) if self.bins.categorical else (fitted, self.logits):
            with _recorded() as warned:
                candidates.append((self.tau(logits, by, taus, bound, start), logits, warned))
        plain = self.readout.judged[1]
        most = math.inf if bound is None else bound * start[plain]  # which the last candidate keeps at tau 0
        choice, logits, warned = min(candidates, key=lambda one: (one[0].after[plain] > most, one[0].after[one[0].by]))
        _issue(warned)
        best = min(each.scores.min() for each, *_ in candidates)
        held = bound if best < choice.after[choice.by] - TIE else None
        return replace(choice, bound=held), logits

    def gains_by_bias(self, by: Any, bound: float | None, start: Mapping[str, float]) -> bool:
        """Whether biases lower the error at the best tau by more than its standard error, where each half of the labels
        is calibrated on the other. Biases that break the bound or have no best temperature gain nothing. Sequences are
        not split. It does not warn.
        """
        _, sequence = np.unique(self.sequence, return_inverse=True)
        middle = np.bincount(sequence, self.row) / np.bincount(sequence)
        first = np.empty(len(middle), dtype=bool)
        first[middle.argsort(kind="stable")] = np.arange(len(first)) % 2 == 0
        if first.all():
            return False
        half = first[sequence]

        def of_halves(biased: bool) -> Tensor:
            logits = torch.empty_like(self.logits)
            for own in (half, ~half):
                temperature, biases = self.calibration(biased, ~own)
                logits[own] = self.divided(temperature, biases)[own]
            return logits

        with _silent():
            without, plain = self.better(of_halves(False), by, _TAUS, bound, start)
            try:
                biased = of_halves(True)
                after = self.tau(biased, by, _TAUS, bound, start, strict=True)
                warnings.filterwarnings("error", ".*the best temperature ", DirToolkitWarning)
                self.tau(self.divided(*self.calibration(True)), by, None, bound, start, strict=True)
            except (ArgumentError, DirToolkitWarning):  # no tau keeps the bound, or no temperature is best
                return False
            gain = self._weighted_errors(plain, without) - self._weighted_errors(biased, after)
        gains = np.bincount(sequence, gain)
        return bool(gains.sum() > math.sqrt(len(gains)) * gains.std(ddof=1))

    def start(self, by: Any) -> dict[str, float]:
        """The errors of the model as trained: at tau 0 and temperature 1, without biases."""
        with _silent():
            return self.tau(self.logits, by, [0.0], None).before

    def divided(self, temperature: float, biases: Tensor | None = None) -> Tensor:
        """The logits at a temperature and biases, (N, B)."""
        logits = self.logits / temperature
        return logits if biases is None else logits + biases.to(logits)

    @torch.no_grad()
    def tau(
        self,
        logits: Tensor,
        by: Any,
        taus: Any,
        bound: float | None,
        start: Mapping[str, float] | None = None,
        *,
        strict: bool = False,
    ) -> TauChoice:
        """Choose tau for calibrated logits. ``start`` are the errors before the adjustment, if not those at tau 0."""
        balanced, plain = self.readout.judged[:2]
        by = balanced if by is None else by
        one_of("by", by, self.readout.judged)
        regions, weight = self._regions(), self._weight()

        def errors_at(tau: float) -> dict[str, float]:
            error = self._errors(logits, tau)
            of_regions = {f"{plain}_{region}": float(error[own].mean()) for region, own in regions.items()}
            squared = {"bmse": float(weight @ error**2), "mse": float((error**2).mean())} if by in _SQUARED else {}
            return {**squared, balanced: float(weight @ error), plain: float(error.mean()), **of_regions}

        limit = None if bound is None else (plain, bound)
        return search_tau(errors_at, taus, by, samples=len(self.row), bound=limit, strict=strict, start=start)

    def bound(self, most_mae: Any) -> float | None:
        """The largest allowed ratio of the error over samples to that before."""
        word("most_mae", most_mae, "auto")
        if isinstance(most_mae, str):
            return None if self.bins.categorical else _MOST_MAE
        return None if most_mae is None else number("most_mae", most_mae, low=1)

    @torch.no_grad()
    def _errors(self, logits: Tensor, tau: float) -> np.ndarray:
        """The error (N,) of each label at a tau, for calibrated logits."""
        adjusted = logits + self.readout.offset_from(self.prior, "uniform", tau).to(logits)
        return self.readout.errors(adjusted, self.labels).double().cpu().numpy()

    def _weighted_errors(self, logits: Tensor, choice: TauChoice) -> np.ndarray:
        """What each label adds to the chosen error, (N,)."""
        error = self._errors(logits, choice.tau) ** (2 if choice.by in _SQUARED else 1)
        return error * (self._weight() if choice.by in (self.readout.judged[0], "bmse") else 1 / len(error))

    def _weight(self) -> np.ndarray:
        density, held = self.readout.density, np.bincount(self.row, minlength=len(self.bins)) > 0
        assert density is not None  # a prior needs a density
        if self.bins.categorical and len(absent := np.flatnonzero(~held)):
            warn(f"no validation label of {len(absent)} of {len(held)} classes, which are ignored.")
        return balanced_weights(self.row, density, self.bins)

    def _regions(self) -> dict[str, np.ndarray]:
        """The labels in each region of the training density that has any."""
        assert self.readout.density is not None
        region = self.readout.density.regions()[self.row]
        return {name: region == name for name in ("many", "medium", "few", "unseen") if (region == name).any()}


@contextmanager
def _silent() -> Iterator[None]:
    """A context for trials, which do not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirToolkitWarning)
        yield


@contextmanager
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
    """A context whose warnings are listed. :func:`_issue` issues them."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned


def _issue(warned: list[warnings.WarningMessage]) -> None:
    for one in warned:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _with_prior(model: LongTailModel) -> ScoreReadout:
    if not isinstance(model.readout, ScoreReadout):
        raise model.readout.cannot("have a prior")
    return model.readout


def held_out(model: nn.Module, batches: Any) -> tuple[Tensor, Tensor]:
    """The scores and labels of all batches. Sequences of one length stay whole, and others become rows."""
    fix = "Use model.calibrate(scores, labels)."
    require(not isinstance(batches, Tensor), "scores need labels", got="labels=None", fix=fix)

    def pair(output: LongTailOutput, labels: Any) -> tuple[Tensor, Tensor]:
        is_tensor(labels=labels)
        scores = output.scores
        if scores.ndim > 2:
            shape = scores.shape[:-1]
            if output.prediction.ndim == scores.ndim:
                shaped((..., output.prediction.shape[-1]), "one per target in the last axis", labels=labels)
                of_targets = [one_per_row("labels", own, shape).view(shape) for own in labels.unbind(-1)]
                labels = torch.stack(of_targets, -1)
            else:
                labels = one_per_row("labels", labels, shape).view(shape)
        return scores, labels.to(scores.device)

    scores, labels = zip(*read_batches(model, batches, pair, labelled=True), strict=True)
    steps = scores[0].ndim - 1
    if len({part.shape[1:] for part in scores}) > 1:
        scores, labels = (tuple(part.flatten(0, steps - 1) for part in parts) for parts in (scores, labels))
    return torch.cat(scores), torch.cat(labels)
