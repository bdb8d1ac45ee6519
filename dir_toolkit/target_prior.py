"""The prior of data that have no labels yet, estimated from the scores that a model gives them.

A model that was trained on one prior meets data under another. The forecasts for these data tell the other prior, as
long as each label still looks as it did, so that only the shares of labels have shifted. Hand the estimate to
:meth:`dir_toolkit.LongTailModel.set_prior` or to :func:`dir_toolkit.adjust_logits` as the target.
"""

from __future__ import annotations

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
_STEPS, _STILL = 1000, 1e-6  # at most so many; still is a prior of which less than this moves in a step
_LEAST = 1e-12  # a share
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class PriorEstimate:
    """What :func:`estimate_prior` found. Its ``str`` tells all in a sentence or two.

    Attributes:
        prior: (B,) float64, the prior to predict under. It is ``estimated``, or ``source`` where the check has refused
            the estimate.
        estimated: (B,) float64, what the unlabelled data say.
        source: (B,) float64, the mean of the calibrated forecasts for the held-out data.
        curve: (K,) float64, read-only: before each step, by how much the current prior explains the unlabelled data
            better than ``source`` does, in nats per sample.
        converged: whether less than a millionth of the prior moved in the last step. At most 1000 steps are made.
        auc: how well a classifier tells held-out features, weighted by the estimate, from unlabelled ones. It is about
            0.5 where only the shares of labels have shifted, and None where no features were given.
        refused: whether ``auc`` was above the limit, so that ``prior`` is ``source``.
        bbse: (B,) float64, a second estimate by another method, for classes with labels; else None.
    """

    prior: Tensor
    estimated: Tensor
    source: Tensor
    curve: np.ndarray
    converged: bool
    auc: float | None
    refused: bool
    bbse: Tensor | None

    def __str__(self) -> str:
        def moved(other: Tensor) -> str:
            return f"a total variation of {0.5 * float((self.estimated - other).abs().sum()):.3f}"

        ended = "" if self.converged else ", which have not converged"
        told = [
            f"The estimate differs from the source prior by {moved(self.source)} after {len(self.curve)} steps{ended}."
        ]
        if self.bbse is not None:
            told.append(f"The estimate by BBSE differs from it by {moved(self.bbse)}.")
        if self.auc is None:
            told.append("Without features nothing tells whether only the shares of labels have shifted.")
        else:
            verdict = "more than shares has shifted, and the source prior stays" if self.refused else "it is accepted"
            told.append(
                f"A classifier tells the weighted held-out data from the unlabelled with AUC {self.auc:.2f}: {verdict}."
            )
        return " ".join(told)


def estimate_prior(
    scores: Any,
    *,
    source: Any,
    labels: Any = None,
    bins: Bins | None = None,
    features: Any = None,
    source_features: Any = None,
    max_auc: float = 0.75,
) -> PriorEstimate:
    r"""The prior under which unlabelled data were drawn, by expectation-maximization on a model's forecasts for them.

    With s the mean forecast for held-out data, t starts as s, and each step takes

    .. math:: n_b = \frac1N \sum_i \frac{p_{ib}\, t_b / s_b}{\sum_j p_{ij}\, t_j / s_j}, \qquad
              t_b \leftarrow s_b \frac{(K n)_b}{(K s)_b}

    and divides t by its sum. Over a continuous axis K is a Gaussian window of 1.5 bins. Without it the steps run into
    single bins even where no shift is. Over classes K is the identity.

    Labels of the held-out data calibrate the forecasts first, by a temperature and a bias for each bin, which K makes
    smooth. The held-out data must come from the training distribution, and training must not have seen them.

    The estimate is right only as long as inputs of one label look as they did in training. Features allow a check: a
    logistic regression, cross-validated, tells held-out rows, each weighted by t/s of its label, from unlabelled rows.
    If its AUC is above ``max_auc``, a warning is issued and the prior stays ``source``.

    Args:
        scores: of the unlabelled data, as the model gives them under its training prior: logits, or the probabilities
            of bins. Scores of which none is negative are taken for probabilities.
        source: scores of the same kind, of held-out data.
        labels: of the held-out data, in label units.
        bins: the label axis; None means classes.
        features, source_features: of the unlabelled and the held-out data, for the check, which needs labels, too.
        max_auc: the limit of the check; 1 accepts every estimate.
    Shape:
        scores: (N, B). source: (M, B). labels: (M,). features: (N, D). source_features: (M, D).
    Raises:
        ShapeError: shapes do not fit. ValueError: there is no sample, a score or feature is not finite, scores that are
        not negative do not sum to one, or only a part of what the check needs is given. LabelError: a label is NaN or
        lies beyond the axis.
    Source:
        Saerens et al. 2002, doi:10.1162/089976602753284446, for the steps; Alexandari et al. 2020 (arXiv:1901.06852)
        for the calibration and the source prior; Silverman et al. 1990, doi:10.1111/j.2517-6161.1990.tb01788.x, for a
        smoothed step; Lipton et al. 2018 (arXiv:1802.03916) for BBSE.

    >>> held_out = [[0.9, 0.1]] * 3 + [[0.1, 0.9]]
    >>> estimate = estimate_prior([[0.9, 0.1], [0.1, 0.9]], source=held_out)
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

    window = np.ones(1) if bins.categorical else gaussian(min(_SIZE, len(bins) - 1 + len(bins) % 2), _SIGMA)
    slope, bias = (1.0, 0.0) if row is None else _calibration(held, row, window)
    p, held_p = _softmax(slope * logits + bias), _softmax(slope * held + bias)
    mean = held_p.mean(0).clip(_LEAST)
    mean /= mean.sum()
    t, curve, converged = _steps(p, mean, window)
    bbse = None if row is None or not bins.categorical else torch.from_numpy(_bbse(p, held_p, row))

    auc = None
    if features is not None and row is not None:
        new = _matrix("features", features, len(logits), None)
        old = _matrix("source_features", source_features, len(held), new.shape[1])
        auc = _auc(new, old, (t / mean)[row])
    refused = auc is not None and auc > max_auc
    if refused:
        warn(
            f"more has shifted than the shares of labels, since a classifier tells the data apart with an AUC of "
            f"{auc:.2f} above {max_auc:g}. The source prior stays. Pass max_auc=1 to adjust all the same."
        )
    source_prior, estimated = torch.from_numpy(mean), torch.from_numpy(t)
    curve.setflags(write=False)
    prior = source_prior if refused else estimated
    return PriorEstimate(prior, estimated, source_prior, curve, converged, auc, refused, bbse)


def _steps(p: np.ndarray, source: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """The estimate, what each step gains, and whether the last one moved next to nothing."""
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


def _smooth(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    return smooth_axes(values, [window], edges="reflect")


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _calibration(logits: np.ndarray, row: np.ndarray, window: np.ndarray) -> tuple[float, np.ndarray]:
    """The slope (one over the temperature) and the biases (B,) under which these labels are likeliest, but for a ridge
    on what is smoothed into the biases."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    mine, counts = logits[np.arange(len(row)), row], np.bincount(row, minlength=logits.shape[1])

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = np.exp(at[0]), _smooth(at[1:], window)
        scaled = slope * logits + bias
        norm = logsumexp(scaled, axis=1)
        p = np.exp(scaled - norm[:, None])
        total = norm.sum() - slope * mine.sum() - bias @ counts + _RIDGE / 2 * (at[1:] @ at[1:])
        by_slope = slope * ((p * logits).sum() - mine.sum())
        by_bias = _smooth(p.sum(0) - counts, window) + _RIDGE * at[1:]  # smoothing is its own transpose
        return total, np.concatenate([[by_slope], by_bias])

    bounds = [(-5.0, 5.0), *[(None, None)] * logits.shape[1]]
    found = minimize(loss, np.zeros(1 + logits.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(np.exp(found[0])), _smooth(found[1:], window)


def _bbse(p: np.ndarray, held_p: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Black-box shift estimation: ratios under which labelled forecasts have the mean of the unlabelled ones."""
    of_class = np.eye(p.shape[1])[row]
    ratio = np.linalg.lstsq(held_p.T @ of_class / len(row), p.mean(0), rcond=None)[0]
    shares = (ratio * of_class.mean(0)).clip(0)
    return shares / shares.sum()


def _auc(features: np.ndarray, source_features: np.ndarray, weight: np.ndarray) -> float:
    """How well a cross-validated logistic regression tells weighted source features from the others."""
    from scipy.optimize import minimize
    from scipy.special import expit

    x = np.concatenate([source_features, features])
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    x = np.hstack([x, np.ones((len(x), 1))])
    sign = np.repeat([-1.0, 1.0], [len(source_features), len(features)])
    w = np.concatenate([weight / weight.mean(), np.ones(len(features))])
    w[sign > 0] *= len(source_features) / len(features)  # both sides weigh alike
    fold = np.random.default_rng(0).permutation(len(x)) % _FOLDS
    said = np.empty(len(x))
    for k in range(_FOLDS):
        here, own = x[fold != k], (sign * w)[fold != k]

        def loss(b: np.ndarray, here: np.ndarray = here, own: np.ndarray = own) -> tuple[float, np.ndarray]:
            margin = np.sign(own) * (here @ b)
            value = np.abs(own) @ np.logaddexp(0, -margin) + b[:-1] @ b[:-1] / 2
            return value, np.append(b[:-1], 0) - here.T @ (own * expit(-margin))

        said[fold == k] = x[fold == k] @ minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    order = np.argsort(said[sign < 0])
    below = np.append(0, (weight / weight.sum())[order].cumsum())  # the share of the source below each of its scores
    ends = [np.searchsorted(said[sign < 0][order], said[sign > 0], side=side) for side in ("left", "right")]
    return float(below[ends].mean())


def _matrix(name: str, values: Any, rows: int | None, columns: int | None) -> np.ndarray:
    array = labels_array(values, name).astype(np.float64)
    sound = array.ndim == 2 and rows in (None, len(array)) and columns in (None, array.shape[1])
    require(sound, f"{name} must be ({rows or 'N'}, {columns or 'B'})", got=array.shape)
    not_empty(**{name: array})
    finite(**{name: array})
    return array


def _logits(name: str, scores: Any, count: int | None) -> np.ndarray:
    """Scores (N, B), which are logits or probabilities, as logits."""
    values = _matrix(name, scores, None, count)
    if (values < 0).any():
        return values
    distributions(zeros=False, **{name: torch.from_numpy(values)})
    return np.log(values.clip(_LEAST))
