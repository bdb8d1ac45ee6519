"""Transform the columns of a table into inputs of a network."""

from __future__ import annotations

import numpy as np
from sklearn.preprocessing import StandardScaler

_USUAL_DISTANCES = 30  # columns are clipped beyond so many median absolute deviations from the median
_DEVIATIONS = 10  # columns are clipped beyond so many standard deviations from the mean
_PIECES = 12  # pieces per column, with about equal numbers of rows
_MOST_INPUTS = 400  # the largest number of inputs from all columns


class Columns:
    """Clipping, standardization and piecewise linear encoding of columns, fitted to rows.

    Clipping limits the influence of sentinel values such as 9999. Each piece of a column is one input, which rises from
    -1 to 1 within the piece, so that the network can learn steps and bends easily. A constant column stays constant for
    all rows.

    Attributes:
        limits: the clipping bounds, (2, columns).
        scaler: the standardization after clipping.
        cuts: the ends of the pieces of each column; empty for a column with at most two values.
    Source:
        Gorishniy et al. 2022 (arXiv:2203.05556) for the pieces.
    """

    def __init__(self, columns: np.ndarray, weight: np.ndarray) -> None:
        middle = np.array([_median(column, weight) for column in columns.T])
        distance = np.abs(columns - middle)
        usual = np.array([_median(row[row > 0], weight[row > 0]) if row.any() else 0.0 for row in distance.T])
        reach = _USUAL_DISTANCES * usual
        # Arrays, even where scikit-learn is configured to give tables.
        self.scaler = StandardScaler().set_output(transform="default")
        self.scaler.fit(np.clip(columns, middle - reach, middle + reach), sample_weight=weight)
        mean, far = self.scaler.mean_, _DEVIATIONS * self.scaler.scale_
        self.limits = np.array([np.maximum(middle - reach, mean - far), np.minimum(middle + reach, mean + far)])
        pieces = min(_PIECES, _MOST_INPUTS // columns.shape[1])
        ends = np.linspace(0, 1, pieces + 1)
        self.cuts = []
        if pieces > 1:
            self.cuts = [np.unique(_quantiles(column, weight, ends)) for column in self._scaled(columns).T]

    def _scaled(self, columns: np.ndarray) -> np.ndarray:
        return self.scaler.transform(np.clip(columns, *self.limits))

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """The inputs of the network, (N, inputs): the standardized columns, then their pieces."""
        scaled = self._scaled(columns)
        inputs = [scaled]
        for column, cuts in zip(scaled.T, self.cuts, strict=False):
            if len(cuts) > 2:
                inputs.append(2 * np.clip((column[:, None] - cuts[:-1]) / np.diff(cuts), 0, 1) - 1)
        return np.hstack(inputs)


def unlike(inputs: np.ndarray, own: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The held-out rows with an input beyond the range of the training rows by more than half of that range. Errors on
    these few rows would dominate. If all rows are such rows, none is marked."""
    low, high = inputs[own].min(0), inputs[own].max(0)
    margin = (high - low) / 2
    far = held & ((inputs < low - margin) | (inputs > high + margin)).any(1)
    return far if far.sum() < held.sum() else np.zeros_like(far)


def _quantiles(values: np.ndarray, weight: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weighted quantiles: the smallest values at which the cumulative weight reaches these shares."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    return values[order[np.searchsorted(total, shares * total[-1]).clip(max=len(order) - 1)]]


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    return float(_quantiles(values, weight, np.array(0.5)))
