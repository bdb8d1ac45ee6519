"""The columns of a table as a network takes them."""

from __future__ import annotations

import numpy as np
from sklearn.preprocessing import StandardScaler

_USUAL_DISTANCES = 30  # of a column from its median, beyond which it is cut off
_DEVIATIONS = 10  # the same, in standard deviations from the mean
_PIECES = 12  # that a column is cut into, with about as many rows in each
_MOST_INPUTS = 400  # into which all columns may be cut together


class Columns:
    """Learns how columns are cut off, standardized and cut into pieces.

    Without the cut a sentinel among the rows would squeeze all other values together. Each piece of a column is one
    input, which rises from -1 to 1 within it, so that the network learns steps and bends at once. A column that is
    constant stays so everywhere.

    Attributes:
        limits: where columns are cut off, (2, columns).
        scaler: what standardizes the columns after the cut.
        cuts: per column, the ends of its pieces; none for one of two values or less.
    Source:
        Gorishniy et al. 2022 (arXiv:2203.05556) for the pieces.
    """

    def __init__(self, columns: np.ndarray, weight: np.ndarray) -> None:
        middle = np.array([_median(column, weight) for column in columns.T])
        distance = np.abs(columns - middle)
        usual = np.array([_median(row[row > 0], weight[row > 0]) if row.any() else 0.0 for row in distance.T])
        reach = _USUAL_DISTANCES * usual
        self.scaler = StandardScaler().fit(np.clip(columns, middle - reach, middle + reach), sample_weight=weight)
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
        found = [scaled]
        for column, cuts in zip(scaled.T, self.cuts, strict=False):
            if len(cuts) > 2:
                found.append(2 * np.clip((column[:, None] - cuts[:-1]) / np.diff(cuts), 0, 1) - 1)
        return np.hstack(found)


def unlike(inputs: np.ndarray, own: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Rows held out of which an input lies farther off those to train on than half of their range. What a network
    makes of such rows says nothing of how well it has learnt, and few of them outweigh all others. None, if all are."""
    low, high = inputs[own].min(0), inputs[own].max(0)
    margin = (high - low) / 2
    far = held & ((inputs < low - margin) | (inputs > high + margin)).any(1)
    return far if far.sum() < held.sum() else np.zeros_like(far)


def _quantiles(values: np.ndarray, weight: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The least values that these shares of the weight do not exceed."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    return values[order[np.searchsorted(total, shares * total[-1]).clip(max=len(order) - 1)]]


def _median(values: np.ndarray, weight: np.ndarray) -> float:
    return float(_quantiles(values, weight, np.array(0.5)))
