"""Estimate the label prior of unlabelled data from the scores of a model (label shift).

The prior of new data may differ from that of training. It can be estimated from forecasts under label shift: the shares
of labels change, but inputs of one label do not. Pass the estimate to :meth:`dir_toolkit.LongTailModel.set_prior`, or
its ``source`` and ``prior`` to :func:`dir_toolkit.adjust_logits` as the prior and the target. Both change nothing where
the estimate was not accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import distributions, finite, instance, labels_array, not_empty, number, require, warn
from .labels.bins import Bins
from .labels.kernels import gaussian, smooth_axes

__all__ = ["PriorEstimate", "estimate_prior"]

_SIGMA, _SIZE = 1.5, 13  # of the window that smooths ratios, in bins
_RIDGE = 0.1  # on the biases of the calibration, against the sum of the samples' log losses
_STEPS, _STILL = 1000, 1e-6  # the largest number of steps, and the total change below which the prior has converged
_MOST_LOG = math.log(1e3)  # the temperature is from a thousandth to a thousand
_LEAST = 1e-12  # the smallest probability
_FOLDS = 5
_SURE = 2.0  # standard errors, by which an estimate must explain data better that it was not made of
_BLOCK = 2048  # rows whose probabilities fit the caches


@dataclass(frozen=True, eq=False)
class PriorEstimate:
    """The result of :func:`estimate_prior`. It prints as a few sentences.

    Attributes:
        prior: (B,) float64, the prior to predict under: ``estimated`` if it was accepted, else ``source``.
        estimated: (B,) float64, the estimate from the unlabelled data.
        source: (B,) float64, the mean of the calibrated forecasts for the held-out data. A model's training prior is
            another: the smoothed shares of its training labels. ``model.set_prior(estimate.source)`` therefore changes
            forecasts by their ratio; ``model.set_prior(None)`` predicts as trained.
        curve: (K,) float64, read-only: before each step, the gain in log-likelihood of the unlabelled data over
            ``source``, in nats per sample.
        converged: whether the last step changed less than a millionth of the prior. At most 1000 steps are made.
        auc: the AUC of a classifier between weighted held-out features and unlabelled features. It is about 0.5 under
            label shift, and None without features.
        refused: whether ``auc`` was above the limit.
        gain, gain_error: the gain in log-likelihood over ``source``, in nats per sample, of estimates from one half of
            the unlabelled data on the other half, and its standard error over unlabelled and held-out rows. The error
            holds for independent samples and is too small for others.
        shifted: whether the gain is above twice its standard error.
        accepted: whether ``shifted``, and the estimate was not refused.
        bbse: (B,) float64, a second estimate by black-box shift estimation, for classes with labels; else None.
    """

    estimated: Tensor
    source: Tensor
    curve: np.ndarray
    converged: bool
    auc: float | None
    refused: bool
    bbse: Tensor | None
    gain: float
    gain_error: float

    @property
    def shifted(self) -> bool:
        """Whether the shares of labels differ from those of the source by more than chance explains."""
        return self.gain > _SURE * self.gain_error

    @property
    def accepted(self) -> bool:
        return self.shifted and not self.refused

    @property
    def prior(self) -> Tensor:
        return self.estimated if self.accepted else self.source

    def __repr__(self) -> str:
        def moved(other: Tensor) -> str:
            return f"a total variation of {0.5 * float((self.estimated - other).abs().sum()):.3f}"

        ended = "" if self.converged else ", which have not converged"
        sentences = [
            f"The estimate differs from the source prior by {moved(self.source)} after {len(self.curve)} steps{ended}."
        ]
        verdict = "a shift" if self.shifted else "no significant shift, and the source prior is used"
        sentences.append(
            f"On the other half of the data it gains {self.gain:.3f} ± {self.gain_error:.3f} nats per sample: "
            f"{verdict}."
        )
        if self.bbse is not None:
            sentences.append(f"The estimate by BBSE differs from it by {moved(self.bbse)}.")
        if self.auc is None:
            sentences.append("Without features it is not checked that only the shares of labels have shifted.")
        else:
            verdict = (
                "more than the shares has shifted, and the source prior is used"
                if self.refused
                else "it passes the check"
            )
            sentences.append(
                f"A classifier between weighted held-out and unlabelled data has an AUC of {self.auc:.2f}: {verdict}."
            )
        return " ".join(sentences)


def estimate_prior(
    scores: Any,
    *,
    source: Any,
    labels: Any = None,
    bins: Bins | None = None,
    features: Any = None,
    source_features: Any = None,
    max_auc: float = 0.65,
) -> PriorEstimate:
    r"""Estimate the label prior of unlabelled data by expectation maximization on a model's forecasts.

    With s the mean forecast for held-out data, t starts as s, and each step takes

    .. math:: n_b = \frac1N \sum_i \frac{p_{ib}\, t_b / s_b}{\sum_j p_{ij}\, t_j / s_j}, \qquad
              t_b \leftarrow s_b \frac{(K n)_b}{(K s)_b}

    and divides t by its sum. Over a continuous axis K is a Gaussian window of 1.5 bins. Without it t would concentrate
    on single bins. Over classes K is the identity.

    An estimate from one half of the unlabelled data is tested on the other half, and the other way round. If its gain
    over s is not above two standard errors, the shift is not significant, and the prior stays ``source``. The standard
    error counts the noise of the unlabelled and of the held-out forecasts, which are taken as independent samples.
    ``model.set_prior(estimate)`` then predicts as trained, and ``model.set_prior(estimate.estimated)`` uses it anyway.

    If labels of the held-out data are given, they first calibrate the forecasts, by a temperature and a bias per bin,
    smoothed by K. The held-out data must come from the training distribution, and must not have been used for training.

    The estimate is valid only if inputs of one label are distributed as in training. Features allow a check: a
    cross-validated logistic regression classifies held-out rows, each weighted by t/s of its label, against unlabelled
    rows. If its AUC is above ``max_auc``, a warning is issued and the prior is ``source``.

    Args:
        scores: the model's scores of the unlabelled data under its training prior: logits, or probabilities of bins.
            Scores without negative values are treated as probabilities. With ``adjust="in_loss"`` scores of a
            ``LongTailModel`` are under the target prior, and those of an affinity head are no logits: pass its
            ``output.distribution`` after ``model.set_prior(None)``. If ``calibrate`` has set a bias, also pass labels.
        source: scores of held-out data, of the same kind.
        labels: the labels of the held-out data, in label units.
        bins: the label axis; None means classes.
        features, source_features: the features of the unlabelled and the held-out data, for the check. It also needs
            labels.
        max_auc: the limit of the check, in [0.5, 1]; at 1 it refuses nothing. The gain is tested all the same.
    Shape:
        scores: (N, B). source: (M, B). labels: (M,). features: (N, D). source_features: (M, D).
    Raises:
        ShapeError: shapes do not fit. ValueError: there is no sample, a score or feature is not finite, scores that are
        not negative do not sum to one, or only some of the arguments of the check are given. LabelError: a label is NaN
        or lies beyond the axis.
    Source:
        Saerens et al. 2002, doi:10.1162/089976602753284446, for the steps; Alexandari et al. 2020 (arXiv:1901.06852)
        for the calibration and the source prior; Silverman et al. 1990, doi:10.1111/j.2517-6161.1990.tb01788.x, for a
        smoothed step; Lipton et al. 2018 (arXiv:1802.03916) for BBSE.

    >>> held_out = ([[0.9, 0.1]] * 3 + [[0.1, 0.9]]) * 50
    >>> estimate = estimate_prior([[0.9, 0.1], [0.1, 0.9]] * 100, source=held_out)
    >>> estimate.source.numpy().round(3).tolist(), estimate.prior.numpy().round(3).tolist()
    ([0.7, 0.3], [0.35, 0.65])
    """
    if bins is not None:
        instance(Bins, bins=bins)
    logits = _logits("scores", scores, None if bins is None else len(bins))
    bins = Bins.classes(logits.shape[1]) if bins is None else bins
    held = _logits("source", source, len(bins))
    max_auc = number("max_auc", max_auc, low=0.5, high=1)
    row = None if labels is None else bins.index(labels_array(labels))
    if row is not None:
        require(row.shape == held.shape[:1], f"labels must be ({len(held)},), one per row of source", got=row.shape)
    checked = [row is not None, features is not None, source_features is not None]
    together = all(checked) or not any(checked[1:])
    require(together, "features, source_features and labels must come together", got="a part")

    window = ratio_window(bins)
    slope, bias = 1.0, np.zeros(logits.shape[1])
    if row is not None:
        # On an axis all bins compete, since estimates were no better without those that hold no label.
        slope, bias = slope_and_bias(held, row, window, np.ones(len(row)), all_compete=len(window) > 1)
    p, held_p = _softmax(slope * logits + bias), _softmax(slope * held + bias)
    mean = held_p.mean(0).clip(_LEAST)
    mean /= mean.sum()
    t, curve, converged = _steps(p, mean, window)
    gains, ratio = _held_out_gains(p, mean, window)
    # As the mean of ratio under the source is one, the gain falls as the held-out forecasts raise that mean.
    spread = [values.var(ddof=1) / len(values) if len(values) > 1 else math.inf for values in (gains, held_p @ ratio)]
    error = math.sqrt(sum(spread))
    bbse = None if row is None or not bins.categorical else torch.from_numpy(_bbse(p, held_p, row))

    auc = None
    if features is not None and row is not None:
        new = _matrix("features", features, len(logits), None)
        old = _matrix("source_features", source_features, len(held), new.shape[1])
        auc = _auc(new, old, (t / mean)[row])
    refused = auc is not None and auc > max_auc
    if refused:
        warn(
            f"more has shifted than the shares of labels, since a classifier between the data has an AUC of "
            f"{auc:.2f} above {max_auc:g}. The source prior is used. Pass estimated to set_prior to use it anyway."
        )
    source_prior, estimated = torch.from_numpy(mean), torch.from_numpy(t)
    curve.setflags(write=False)
    return PriorEstimate(
        estimated, source_prior, curve, converged, auc, refused, bbse, float(gains.mean()), float(error)
    )


def _steps(p: np.ndarray, source: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """The estimate, the curve of gains, and whether it converged."""
    smooth_source, t, curve = _smooth(source, window), source, []
    for _ in range(_STEPS):
        ratio = t / source
        mixed = (p @ ratio).clip(_LEAST)
        curve.append(np.log(mixed).mean())
        n = ratio * (p.T @ (1 / mixed)) / len(p)
        before, t = t, source * _smooth(n, window) / smooth_source
        t = t / t.sum()
        if np.abs(t - before).sum() / 2 < _STILL:
            return t, np.array(curve), True
    return t, np.array(curve), False


def _held_out_gains(p: np.ndarray, source: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much an estimate from the other half explains each sample better than the source does, (N,), and the mean
    ratio of both estimates to the source, (B,)."""
    first = np.random.default_rng(0).permutation(len(p)) < len(p) / 2
    gains, ratios = np.zeros(len(p)), np.zeros(len(source))
    for half in (first, ~first) if len(p) > 1 else ():
        ratio = _steps(p[~half], source, window)[0] / source
        gains[half] = np.log((p[half] @ ratio).clip(_LEAST))
        ratios += ratio / 2
    return gains, ratios


def _smooth(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    return smooth_axes(values, [window], edges="reflect")


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def ratio_window(bins: Bins) -> np.ndarray:
    """The window that smooths ratios and biases over a continuous axis."""
    return np.ones(1) if bins.categorical else gaussian(min(_SIZE, len(bins) - 1 + len(bins) % 2), _SIGMA)


def slope_and_bias(
    logits: np.ndarray,
    row: np.ndarray,
    window: np.ndarray,
    weight: np.ndarray,
    offset: float | np.ndarray = 0.0,
    *,
    all_compete: bool = False,
    slope: float | None = None,
) -> tuple[float, np.ndarray]:
    """The slope (one over the temperature) and the biases (B,) of ``slope * logits + bias + offset`` that maximise the
    likelihood of these labels, each counted by its weight (N,), with a ridge penalty on the biases before smoothing.
    ``slope`` fixes the slope.

    Bins without labels do not compete with the others, unless all do. Their biases are interpolated on an axis, and
    zero for classes.
    """
    from scipy.optimize import minimize

    size = logits.shape[1]
    held = (np.bincount(row, minlength=size) > 0) | all_compete
    logits = logits[:, held]
    logits = logits - logits.max(1, keepdims=True)  # so that no slope makes them overflow
    offset = np.broadcast_to(offset, size)[held]
    mine = logits[np.arange(len(row)), held.cumsum()[row] - 1]
    counts = np.bincount(row, weight, minlength=size)[held]

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        factor, bias = np.exp(point[0]), _smooth(point[1:], window)[held]
        total = -weight @ (factor * mine) - (bias + offset) @ counts + _RIDGE / 2 * (point[1:] @ point[1:])
        by_slope, excess = -weight @ mine, np.zeros(size)
        excess[held] = -counts
        for start in range(0, len(logits), _BLOCK):
            here, w = logits[start : start + _BLOCK], weight[start : start + _BLOCK]
            p = factor * here + (bias + offset)
            most = p.max(1)
            np.exp(p - most[:, None], out=p)
            norm = p.sum(1)
            total += w @ (np.log(norm) + most)
            p *= (w / norm)[:, None]
            by_slope += np.einsum("ij,ij", p, here)  # without BLAS, whose threads would wait for each other
            excess[held] += p.sum(0)
        by_bias = _smooth(excess, window) + _RIDGE * point[1:]  # smoothing is its own transpose
        return total, np.concatenate([[factor * by_slope], by_bias])

    first = (-_MOST_LOG, _MOST_LOG) if slope is None else (np.log(slope),) * 2
    bounds = [first, *[(None, None)] * size]
    best = minimize(loss, np.zeros(1 + size), jac=True, method="L-BFGS-B", bounds=bounds).x
    bias = np.where(held, _smooth(best[1:], window), 0.0)
    if len(window) > 1:
        bias = np.interp(np.arange(size), np.flatnonzero(held), bias[held])
    return float(np.exp(best[0])), bias


def _bbse(p: np.ndarray, held_p: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Black-box shift estimation: ratios with which labelled forecasts have the mean of the unlabelled forecasts."""
    of_class = np.eye(p.shape[1])[row]
    ratio = np.linalg.lstsq(held_p.T @ of_class / len(row), p.mean(0), rcond=None)[0]
    shares = (ratio * of_class.mean(0)).clip(0)
    return shares / shares.sum()


def _auc(features: np.ndarray, source_features: np.ndarray, weight: np.ndarray) -> float:
    """The AUC of a cross-validated logistic regression between weighted source features and features."""
    from scipy.optimize import minimize
    from scipy.special import expit

    x = np.concatenate([source_features, features])
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    x = np.hstack([x, np.ones((len(x), 1))])
    sign = np.repeat([-1.0, 1.0], [len(source_features), len(features)])
    w = np.concatenate([weight / weight.mean(), np.ones(len(features))])
    w[sign > 0] *= len(source_features) / len(features)  # both sides have equal total weight
    fold = np.random.default_rng(0).permutation(len(x)) % _FOLDS
    scores = np.empty(len(x))
    for k in range(_FOLDS):
        here, own = x[fold != k], (sign * w)[fold != k]

        def loss(b: np.ndarray, here: np.ndarray = here, own: np.ndarray = own) -> tuple[float, np.ndarray]:
            margin = np.sign(own) * (here @ b)
            value = np.abs(own) @ np.logaddexp(0, -margin) + b[:-1] @ b[:-1] / 2
            return value, np.append(b[:-1], 0) - here.T @ (own * expit(-margin))

        scores[fold == k] = x[fold == k] @ minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    order = np.argsort(scores[sign < 0])
    below = np.append(0, (weight / weight.sum())[order].cumsum())  # the share of the source below each of its scores
    ends = [np.searchsorted(scores[sign < 0][order], scores[sign > 0], side=side) for side in ("left", "right")]
    return float(below[ends].mean())


def _matrix(name: str, values: Any, rows: int | None, columns: int | None) -> np.ndarray:
    array = labels_array(values, name).astype(np.float64)
    sound = array.ndim == 2 and rows in (None, len(array)) and columns in (None, array.shape[1])
    require(sound, f"{name} must be ({rows or 'N'}, {columns or 'B'})", got=array.shape)
    not_empty(**{name: array})
    finite(**{name: array})
    return array


def _logits(name: str, scores: Any, count: int | None) -> np.ndarray:
    """Checked scores (N, B), logits or probabilities, as logits."""
    values = _matrix(name, scores, None, count)
    if (values < 0).any():
        return values
    half = isinstance(scores, Tensor) and scores.is_floating_point() and scores.itemsize < 4
    distributions(zeros=False, **{name: scores.detach() if half else torch.from_numpy(values)})
    if half:  # their sums differ from one by what they are rounded by
        values = values / values.sum(1, keepdims=True)
    return np.log(values.clip(_LEAST))
