"""The declaration of a metric: its name, title, unit, range, and its formula from sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Unit = Literal["label", "label^2", "1", "%"]
Axis = Literal["region", "bin", ""]


@dataclass(frozen=True)
class Metric:
    """The declaration of one reported number. Datasets, results, tables, figures and logs read it.

    Attributes:
        name: the variable that holds it in a dataset.
        title: its name in tables, figures and reports.
        unit: ``"label"`` is the unit of the label, ``"label^2"`` is its square, and ``"1"`` is a plain number. ``"%"``
            is a share, which is stored as a number between 0 and 1 and shown in percent.
        sums: the sums that it is computed from.
        value: the function that turns these sums, in this order, into the number.
        over: ``"region"`` if there is one number per region, ``"bin"`` if there is one per bin, whose variable has
            ``bin_`` before the name, and ``""`` if there is one for all samples. Several may be given.
        mean_over_bins: whether the number of a region is the mean of the numbers of its bins.
        ratio: whether ``value`` returns a numerator and a denominator, whose ratio is the number. It is NaN where the
            denominator is zero.
        pooled: whether sums of the axes of a grid are averaged before ``value`` is applied. Otherwise the numbers of
            the axes are averaged.
        low, high: the range of the number.
        may_be_nan: whether it can be NaN even where there are samples.
        at_empty: the number of a bin without samples, if it is not NaN.
        watched: the regions that training logs after each epoch.
        short: the heading of its column in the log, if the title is too long for one.
    """

    name: str
    title: str
    unit: Unit
    sums: tuple[str, ...]
    value: Callable[..., Any]
    over: tuple[Axis, ...] = ("region",)
    mean_over_bins: bool = False
    ratio: bool = False
    pooled: bool = False
    low: float = -math.inf
    high: float = math.inf
    may_be_nan: bool = False
    at_empty: float = math.nan
    watched: tuple[str, ...] = ()
    short: str = ""

    def of(self, sums: Mapping[str, np.ndarray]) -> Any:
        """The number computed from these sums."""
        return self.value(*(sums[name] for name in self.sums))

    @property
    def variables(self) -> dict[str, Axis]:
        """The variables that hold it, each with its axis."""
        return {f"bin_{self.name}" if axis == "bin" else self.name: axis for axis in self.over}


def stored_unit(unit: str, label_units: str = "label") -> str:
    """The ``units`` attribute of a variable. A metric writes ``"label"``; a result writes its own, such as
    ``"years"``."""
    if unit == "%" or (unit in ("label", "label^2") and label_units == "1"):
        return "1"
    return {"label": label_units, "label^2": f"{label_units}^2"}.get(unit, unit)
