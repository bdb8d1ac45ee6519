"""Timing side by side: what is compared runs in turn, so that a drifting machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def medians(functions: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each function over ``repeats`` rounds, in each of which every function runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def line(what: str, ratio: float, goal: str = "") -> str:
    """One row of a benchmark's output."""
    return f"{what:<58} {ratio:8.2f}x" + (f"  goal {goal}" if goal else "")
