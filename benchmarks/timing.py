"""Timing side by side: what is compared runs in turn, so that a drifting machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def medians(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function over ``repeats`` rounds, in each of which every function runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = clock()
            function()
            taken = clock() - start
            if turn >= warmup:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def milliseconds(seconds: Mapping[str, float]) -> str:
    """Times of several things in one line."""
    return ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())


@dataclass(frozen=True)
class Row:
    """One ratio, or one figure with its unit, and what it ought to be."""

    what: str
    value: float
    unit: str = "x"
    goal: str = ""
    """Such as ``<= 3``."""
    detail: str = ""

    @property
    def verdict(self) -> str:
        if not self.goal:
            return ""
        sign, bound = self.goal.split()
        met = self.value <= float(bound) if sign == "<=" else self.value >= float(bound)
        return "met" if met else "missed"


@dataclass
class Report:
    """Prints rows as they come, and keeps them."""

    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, value: float, goal: str = "", detail: str = "", *, unit: str = "x") -> None:
        row = Row(what, value, unit, goal, detail)
        self.rows.append(row)
        outcome = f"  goal {goal}: {row.verdict}" if goal else ""
        print(f"{what:<72} {value:9.2f} {unit:<4}{outcome}", flush=True)
        if detail:
            print(f"    {detail}", flush=True)

    def leave_out(self, package: str) -> None:
        """Say that a rival cannot be measured here."""
        print(f"{package} is not installed, so that what is compared with it is left out.", flush=True)
