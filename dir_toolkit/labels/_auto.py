"""Bin edges chosen from the steps, the spread and the tails of the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .._checks import digits

_FEWEST, _MOST, _LABELS_PER_BIN = 10, 200, 5  # bins, and labels per bin on average
_LONGEST_TAIL = 8  # the longest tail that gets bins of one width, in interquartile ranges
_PILE, _FAR = 0.1, 0.05  # shares of all labels: the least of a repeated value, and the most of outliers
_REACH = 5  # the farthest that a value of several labels may lie from the others, in ranges of these
_MOST_STEPS = 10**6  # from the smallest label to the largest; finer steps are lost in rounding


class _Scale(NamedTuple):
    """A scale on which bins may have equal widths."""

    name: str
    transform: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def chosen_edges(labels: np.ndarray, eps: float) -> tuple[np.ndarray, str]:
    """The edges (B + 1,) for finite float64 labels (N,) that are not all equal, and the reason for them. Neither steps
    nor even bins are finer than labels whose dtype has this machine epsilon can tell apart."""
    most = int(np.clip(len(labels) // _LABELS_PER_BIN, _FEWEST, _MOST))
    values, counts = np.unique(labels + 0.0, return_counts=True)  # no -0.0
    pile = values[counts.argmax()] if counts.max() >= max(2, _PILE * len(labels)) else np.nan
    own = values[_near(values, counts)]
    step = _step(own)
    finest = eps * 2.0 ** np.floor(np.log2(np.abs(own[[0, -1]]).max()))
    step = step if step >= 0.999 * finest else 0.0  # else it is that of the decimals to which labels are rounded
    if step and (own[-1] - own[0]) / step < most - 0.5:
        start = own[0] if abs(own[0] / step - round(own[0] / step)) > 1e-3 else step * round(own[0] / step)
        edges, made = _even(own, step, start), f"bins of {digits(step)}"
        kind = "whole numbers" if step == 1 and start == round(start) else f"multiples of {digits(step)}"
    else:
        kind = "whole numbers" if step == 1 and own[0] == round(own[0]) else "numbers"
        for scale in _scales(labels, pile):
            own = values[_near(scale.transform(values), counts)]
            rest = scale.transform(labels[(labels != pile) & (labels >= own[0]) & (labels <= own[-1])])
            low, high = scale.transform(own[[0, -1]])
            lower, upper = np.quantile(rest, [0.25, 0.75])
            if max(high - upper, lower - low) <= _LONGEST_TAIL * (upper - lower):
                break
        width = (upper - lower) / len(rest) ** (1 / 3)
        width = float(np.clip(width, (high - low) / most, (high - low) / _FEWEST))
        if scale.name:
            edges = scale.inverse(width * _halves(low, high, width))
            edges = _between_steps(edges, own, step) if step else edges
            widths = np.diff(edges)
            made = f"bins, {widths.min():.3g} to {widths.max():.3g} wide, even in {scale.name} since a tail is long"
        else:
            width = _round_width(width, max((high - low) / most, finest), step)
            edges, made = _even(own, width, 0.0), f"bins of {digits(width)}"
    far = labels[(labels < own[0]) | (labels > own[-1])]
    places = _places(own[0], own[-1])
    why = f"{len(labels):,} {kind} from {own[0]:.{places}g} to {own[-1]:.{places}g}"
    why += f", {np.mean(labels == pile):.0%} of them {pile:.{places}g}" if pile in (0, own[0], own[-1]) else ""
    why += f": {len(edges) - 1} {made}, of which the first and the last are spare."
    for value in _apart(values, counts):
        if own[0] <= value <= own[-1]:
            apart = f" {value:.{places}g} lies apart and is no outlier, since several labels share it"
            why += f"{apart}: drop it if it is a code."
    if len(far):
        why += f" {len(far):,} far off, such as {far[0]:.6g}, count in the end bins: look for mistyped ones."
    return edges, why


def _places(low: float, high: float) -> int:
    """How many digits, at least six, give the distance of both ends to a hundredth."""

    def off(places: int) -> float:
        return abs(float(f"{high:.{places}g}") - float(f"{low:.{places}g}") - (high - low))

    return next((places for places in range(6, 17) if off(places) <= 0.01 * (high - low)), 17)


def _near(values: np.ndarray, counts: np.ndarray, reach: float = _REACH, least: float = 1) -> slice:
    """The sorted values without outliers: a few values more than ``least`` ranges of the others away from these.

    Values that several labels share, such as zero, are outliers only where the distance exceeds ``reach`` ranges.
    """
    first, last = 0, len(values)
    while last - first > 2:
        gaps = np.diff(values[first:last])
        cut = first + 1 + int(gaps.argmax())
        far, left = sorted((slice(first, cut), slice(cut, last)), key=lambda part: part.stop - part.start)
        few = far.stop - far.start <= max(1, len(values) // 100)
        if not few or counts[left].sum() < (1 - _FAR) * counts.sum() or gaps.max() <= least * (gaps.sum() - gaps.max()):
            break
        shared = counts[far].sum() >= _LABELS_PER_BIN * (far.stop - far.start)
        if shared and gaps.max() <= reach * (values[left][-1] - values[left][0]):
            break
        first, last = left.start, left.stop
    return slice(first, last)


def _apart(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Values that several labels share, on either side the outermost: they lie more than half the range of the other
    values away from those."""
    if len(values) < _FEWEST:  # such as grades, which lie apart from one another
        return values[:0]
    near = values[_near(values, counts, 0, 0.5)]
    apart = values[((values < near[0]) | (values > near[-1])) & (counts > 1)]
    return np.unique([*apart[:1], *apart[-1:]])


def _step(values: np.ndarray) -> float:
    """The step of which all distances between these sorted values are multiples, up to rounding. It is 0 if none is."""
    distances = values[1:] - values[0]
    step = np.diff(values).min()
    while (steps := distances / step)[-1] < _MOST_STEPS:
        rest = np.abs(steps - steps.round())
        if not (between := rest > 1e-3).any():
            step = float(distances[-1] / steps[-1].round())
            tidy = float(f"{step:.6g}")
            return tidy if abs(tidy - step) * steps[-1] < 1e-3 * step else step
        step *= rest[between].min()  # Euclid's algorithm
    return 0.0


def _scales(labels: np.ndarray, pile: float) -> Iterator[_Scale]:
    """Candidate scales with their inverses: the labels themselves, and two that shorten tails."""
    middle = np.median(labels)
    yield _Scale("", lambda y: y, lambda z: z)
    if labels.min() > 0:
        yield _Scale("the logarithm", lambda y: np.log(y / middle), lambda z: middle * np.exp(z))
    lower, upper = np.quantile(labels, [0.25, 0.75])
    if lower - (upper - lower) <= pile <= upper + (upper - lower):
        middle = pile
    unit = np.quantile(np.abs(labels - middle)[labels != middle], 0.25)
    name = f"the signed logarithm asinh((y - {middle:.3g})/{unit:.3g})"
    yield _Scale(name, lambda y: np.arcsinh((y - middle) / unit), lambda z: middle + unit * np.sinh(z))


def _halves(low: float, high: float, width: float) -> np.ndarray:
    """Edges midway between multiples of the width, in widths. One bin at each end lies beyond all labels."""
    return np.arange(np.floor(low / width + 0.5) - 1, np.floor(high / width + 0.5) + 3) - 0.5


def _even(values: np.ndarray, width: float, start: float) -> np.ndarray:
    """Edges that are decimals. Bin centres are multiples of the width, counted from the start."""
    halves = _halves(values[0] - start, values[-1] - start, width)
    return np.array([float(Fraction(str(start)) + Fraction(half) * Fraction(str(width))) for half in halves])


def _round_width(width: float, least: float, step: float) -> float:
    """The nearest 1, 2 or 5 times a power of ten that is not below the least width. It is counted in steps if any."""
    width, unit = max(width, least), Fraction(str(step)) if step else Fraction(1)
    exponent = int(np.floor(np.log10(width / float(unit))))
    rounded = [leading * Fraction(10) ** (exponent + more) for more in (0, 1) for leading in (1, 2, 5)]
    if step:
        rounded = [Fraction(3) if steps == 2 else steps for steps in rounded]  # an odd number has a middle
    fit = [float(unit * number) for number in rounded if unit * number >= least]
    return min(fit, key=lambda one: abs(np.log(one / width)))


def _between_steps(edges: np.ndarray, values: np.ndarray, step: float) -> np.ndarray:
    """Edges moved to the middle between two steps."""
    edges = np.unique(values[0] + step * (np.round((edges - values[0]) / step - 0.5) + 0.5))
    if edges[1] > values[0]:
        edges = np.append(edges[0] - step, edges)
    return np.append(edges, edges[-1] + step) if edges[-2] <= values[-1] else edges
