"""Pictures of a search for settings; a ``matplotlib`` ``Figure`` each, never pyplot, as in ``results.figures``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._checks import instance
from ..training.selection import Selection
from .drawing import GREY, INK, PALETTE, dressed, legend_above, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["tuning_figure"]

_BEST = PALETTE[1]
_ACROSS = 3  # panels of settings in a row, at most
_ROOM = 0.12  # so that no dot lies below a cross
_MOST_TICKS = 6  # with room for numbers below a panel
_WIDEST = 18  # characters beside a panel
_LONGEST = 70  # characters of the best settings in the legend


def tuning_figure(selection: Selection, *, score_name: str = "score", budget_name: str = "budget") -> Figure:
    """Score against budget, a line a candidate, above a panel for each setting that was varied.

    The panels show the score of each candidate at the largest budget that it reached, against the setting's value; the
    larger that budget, the darker the dot, since scores of unequal budgets do not compare. Positive numbers that differ
    by 20 times or more stand on a log scale, words and mixed values side by side. Runs that failed are crosses at the
    edge. Scores are means over seeds.

    Args:
        score_name: what the score is, with its units.
        budget_name: what budgets count, such as "epochs".
    """
    instance(Selection, selection=selection)
    instance(str, score_name=score_name, budget_name=budget_name)
    curves = [selection.curve(candidate) for candidate in range(len(selection.candidates))]
    best = selection.ranking[0]
    budgets = sorted({budget for curve in curves for budget, _ in curve})
    settings = _varied(selection.candidates)
    rows = math.ceil(len(settings) / _ACROSS)
    across = math.ceil(len(settings) / rows) if rows else 1
    figure = new_figure(3.0 + 1.9 * rows)
    grid = figure.add_gridspec(1 + rows, across, height_ratios=[2.2] + [1.5] * rows)
    top = figure.add_subplot(grid[0, :])
    shades = dict(zip(budgets, _shades(len(budgets)), strict=True))
    _draw_curves(top, curves, best, shades, selection.minimize)
    top.set_xlabel(literal(budget_name))
    top.set_ylabel(literal(score_name))
    panels: list[Axes] = []
    for place, name in enumerate(settings):
        panel = figure.add_subplot(grid[1 + place // across, place % across], sharey=panels[0] if panels else None)
        _draw_setting(panel, name, selection, curves, shades)
        panel.set_xlabel(literal(name))
        if place % across == 0:
            panel.set_ylabel(literal(textwrap.fill(score_name, _WIDEST)))
        else:
            panel.tick_params(labelleft=False)
        panels.append(panel)
    legend_above(figure, top, _legend(selection, curves, shades, budget_name))
    return dressed(figure, [top, *panels])


def _varied(candidates: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for candidate in candidates for name in candidate)
    return [name for name in names if len({repr(candidate.get(name)) for candidate in candidates}) > 1]


def _shades(number: int) -> list[tuple[float, float, float]]:
    """Greys from light to nearly black."""
    return [(level, level, level) for level in np.linspace(0.75, 0.2, number)] if number > 1 else [(0.2, 0.2, 0.2)]


def _draw_curves(axes: Axes, curves: list[Any], best: int, shades: dict[int, Any], minimize: bool) -> None:
    edge = 1.0 if minimize else 0.0
    for candidate, curve in enumerate(curves):
        first = candidate == best
        budget, score = (list(column) for column in zip(*curve, strict=True))
        line: dict[str, Any] = {"color": _BEST, "linewidth": 2, "zorder": 4}
        if not first:
            line = {"color": GREY, "linewidth": 1, "alpha": 0.7, "zorder": 2}
        axes.plot(budget, score, **line)
        for x, y in zip(budget, score, strict=True):
            if math.isnan(y):
                axes.plot(x, edge, transform=axes.get_xaxis_transform(), clip_on=False, **_cross())
            else:
                color = _BEST if first else shades[x]
                axes.plot(x, y, "o", markersize=5 if first else 4, color=color, zorder=5 if first else 3)
    axes.set_xscale("log")
    axes.set_xticks(list(shades), [f"{budget:g}" for budget in shades])
    axes.minorticks_off()
    axes.margins(y=_ROOM)


def _draw_setting(axes: Axes, name: str, selection: Selection, curves: list[Any], shades: dict[int, Any]) -> None:
    values: list[Any] = [candidate.get(name) for candidate in selection.candidates]
    best = selection.ranking[0]
    numbers = all(type(value) in (int, float) for value in values)
    if numbers:
        places = [float(value) for value in values]
        if min(places) > 0 and max(places) >= 20 * min(places):
            axes.set_xscale("log")
            axes.minorticks_off()
        ticks = sorted(set(places))
        if len(ticks) <= _MOST_TICKS:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        order = list(dict.fromkeys(map(str, values)))
        places = [float(order.index(str(value))) for value in values]
        axes.set_xticks(range(len(order)), [literal(word) for word in order])
        if sum(map(len, order)) > _WIDEST:
            axes.tick_params(axis="x", labelrotation=20)
        axes.set_xlim(-0.5, len(order) - 0.5)
    for candidate in sorted(range(len(curves)), key=lambda candidate: candidate == best):
        budget, score = curves[candidate][-1]
        if math.isnan(score):
            edge = 1.0 if selection.minimize else 0.0
            axes.plot(places[candidate], edge, transform=axes.get_xaxis_transform(), clip_on=False, **_cross())
        else:
            color, size = (_BEST, 7) if candidate == best else (shades[budget], 5)
            axes.plot(
                places[candidate],
                score,
                "o",
                markersize=size,
                color=color,
                markeredgecolor="white",
                markeredgewidth=0.6,
            )
    axes.margins(y=_ROOM)


def _cross() -> dict[str, Any]:
    return {"marker": "x", "color": INK, "markersize": 6, "linestyle": "none", "zorder": 6}


def _legend(selection: Selection, curves: list[Any], shades: dict[int, Any], budget_name: str) -> list[Any]:
    from matplotlib.lines import Line2D

    words = ", ".join(f"{name} {value}" for name, value in selection.best.items())
    words = words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
    handles = [Line2D([], [], color=_BEST, marker="o", label=literal(f"best: {words}"))]
    reached = {curve[-1][0] for curve in curves}
    for budget, shade in shades.items():
        if budget in reached:
            label = literal(f"{budget_name} reached: {budget}")
            handles.append(Line2D([], [], color=shade, marker="o", linestyle="none", label=label))
    if any(math.isnan(curve[-1][1]) for curve in curves):
        handles.append(Line2D([], [], label="failed", **_cross()))
    return handles
