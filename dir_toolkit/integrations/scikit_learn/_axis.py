"""The label axis that is made where none is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._checks import labels_array, number, require
from ...labels.bins import Bins

_FEWEST_STEPS = 8  # bins of one step of the labels; on fewer the usual spread of labels would cover most of the axis
_MOST_STEPS = 10**6  # from the least label to the largest; rounding hides finer ones


def axis_of(labels: Any, count: int = 100) -> Bins:
    """An axis that begins half a bin below the least label and ends half a bin or more beyond the largest."""
    labels = labels_array(labels, "y").astype(np.float64)
    number("the largest label", float(np.abs(labels).max()), float32=True)
    low, high = float(labels.min()), float(labels.max())
    require(low < high, "y must hold at least two different labels", got=f"only {low:g}")
    step = _step(labels)
    steps = round((high - low) / step) + 1 if step else 0
    width = (high - low) / (count - 1)
    if steps >= _FEWEST_STEPS:
        each = steps // count | 1  # an odd number has a middle
        width, count = each * step, -(-(steps + each // 2) // each)
        if step == 1 and low == round(low):
            start = low - each // 2
            return Bins.uniform(start, start + each * count, width=each, integer=True)
    return Bins.from_edges(low + width * (np.arange(count + 1) - 0.5))


def _step(labels: np.ndarray) -> float:
    """The step from one label to the next where all are multiples of one, counted from the least: 1 for whole numbers,
    whatever their unit. 0 where there is none."""
    values = np.unique(labels)
    values = values[1:] - values[0]
    step = values.min()
    while (steps := values / step)[-1] < _MOST_STEPS:
        rest = np.abs(steps - steps.round())
        if not (between := rest > 1e-3).any():  # multiples but for rounding
            return float(values[-1] / steps[-1].round())
        step *= rest[between].min()  # as Euclid finds the greatest divisor
    return 0.0
