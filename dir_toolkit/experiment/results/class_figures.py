"""Figures of errors by class and of the choice of tau. Fractions are shown in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..._checks import finite, instance, number, problem
from ...errors import ShapeError
from .drawing import (
    FAINT,
    GREY,
    INK,
    MARKERS,
    Colors,
    check_entries,
    checked_names,
    checked_row,
    class_counts,
    color_scale,
    legend_above,
    literal,
    look,
    mean_and_spread,
    method_label,
    new_figure,
    no_frame,
    note_no_runs,
    share_name,
    spread_shown,
    styled_methods,
    styles,
    train_counts,
)
from .schema import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_error_figure", "tau_figure"]

_MOST_METHODS = 6  # side by side at one class
_MOST_DOTS = 120
_MOST_NUMBERS = 12  # classes whose errors are written into a heat map


@look()
def class_error_figure(
    ds: xr.Dataset, *, colors: Colors | None = None, class_names: Sequence[str] | None = None
) -> Figure:
    """Error of each class, one minus its recall, for each method, above the training counts of the classes.

    Up to six methods are dots, with whiskers of one standard deviation over the seeds, cut at 0 and 100 %. More
    methods, or many classes, are a heat map of methods and classes. A class without test samples is a gap. The constant
    predictor errs on every class but one and is left out.

    Args:
        ds: a result of classification.
        class_names: one per bin. None shows the label that each bin stands for.
    Raises:
        ResultsError: ``ds`` is not of classification. ValueError: there is not one name per class, or a color is
        unknown.
    """
    check_result(ds, "bin_recall", kind="classification")
    centers = [f"{center:g}" for center in ds["bin_center"].values]
    names = checked_names(class_names, len(centers)) or centers
    rows = []
    for method, color in styled_methods(ds, colors, baseline=False).items():
        part = ds.sel({"method": method})
        done = part["completed"].values == 1
        mean, spread = mean_and_spread(100 - 100 * part["bin_recall"].values[done])
        rows.append((method_label(ds, method), color, mean, spread))
    many = len(rows) > _MOST_METHODS or len(rows) * len(names) > _MOST_DOTS
    height = max(1.3, 0.3 * len(rows))
    figure = new_figure(2.2 + height if many else 4.4)
    heights = [height, 1.2] if many else [2.0, 1.0]
    grid = figure.add_gridspec(2, 2 if many else 1, height_ratios=heights, width_ratios=[40, 1] if many else [1])
    top = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=top)
    if many:
        bar = figure.add_subplot(grid[0, 1])
        _heat_map(figure, top, bar, rows)
    else:
        place, step = np.arange(len(names)), 0.7 / max(1, len(rows))
        for i, (label, color, mean, spread) in enumerate(rows):
            x = place + (i - (len(rows) - 1) / 2) * step
            marks: dict[str, Any] = {"fmt": MARKERS[i], "markersize": 5, "elinewidth": 1, "capsize": 2}
            whisker = spread if np.isfinite(spread).any() else None
            dots = top.errorbar(x, mean, yerr=whisker, color=color, label=label, **marks).lines[0]
            dots.set(clip_on=False, zorder=3)  # a dot at 0 or 100 is drawn whole; its whisker ends at the axes
        top.set_ylabel("error of a class (%)" + spread_shown(ds))
        top.set_ylim(0, min(100.0, top.get_ylim()[1]))
        if not rows:
            note_no_runs(top)
        legend_above(figure, top)
    top.tick_params(labelbottom=False)
    class_counts(figure, below, train_counts(ds), names)
    below.set_xlabel(literal(ds.attrs["label_name"]))
    return figure


def _heat_map(figure: Figure, axes: Axes, bar: Axes, rows: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """A heat map with methods as rows and classes as columns. Numbers are shown if there is room."""
    no_frame(axes)
    mean = np.array([mean for _, _, mean, _ in rows])
    most = float(np.nanmax(mean)) or 1.0  # all classes may be without error
    image = axes.imshow(mean, aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
    axes.set_facecolor(FAINT)
    axes.set_yticks(np.arange(len(rows)), [label for label, *_ in rows])
    several = any(np.isfinite(spread).any() for *_, spread in rows)
    written = mean.shape[1] <= _MOST_NUMBERS
    if written:
        for i, (_, _, values, spreads) in enumerate(rows):
            for j, (value, spread) in enumerate(zip(values, spreads, strict=True)):
                if math.isnan(value):
                    continue
                text = f"{value:.1f}" if math.isnan(spread) else f"{value:.1f}\n±{spread:.1f}"
                ink = "white" if value < most / 2 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=ink, linespacing=0.9)
    name = "\nmean ± sd" if written else "\nmean over seeds"
    color_scale(figure, image, "error (%)" + name * several, cax=bar)


@look()
def tau_figure(
    curves: Mapping[Any, tuple[Any, Any]],
    chosen: Mapping[Any, float],
    *,
    ylabel: str,
    percent: bool = True,
    colors: Colors | None = None,
) -> Figure:
    """A score against the strength of logit adjustment, one line per criterion or seed, and the strength chosen.

    Dotted lines mark τ = 0, which leaves scores as they are, and τ = 1, which is consistent with the balanced error.

    Args:
        curves: for each name, the values of τ and the score at each. All scores must have the same unit, since they
            share an axis.
        chosen: for each name, the chosen τ. It may differ from the values in ``curves``.
        ylabel: the name of the scores, with their unit unless ``percent``.
        percent: whether scores are fractions, which are shown in percent.
        colors: by name. Curves of one color differ in their dashes.
    Raises:
        ValueError: there is no curve, ``chosen`` has other names, a number is not finite, or a color is unknown.
        ShapeError: τ and scores are not two equal rows.
    Source:
        Menon et al. 2021 (arXiv:2007.07314).
    """
    check_entries("curves", curves, texts=False)
    instance(Mapping, chosen=chosen)
    instance(str, ylabel=ylabel)
    if set(chosen) != set(curves):
        raise problem(f"chosen must have the names {list(curves)}", got=str(list(chosen)))
    figure = new_figure(3.4)
    axes = figure.add_subplot(1, 1, 1)
    names = [str(name) for name in curves]
    known, dashes = styles(names, colors)
    used: list[str] = []
    for i, (key, name) in enumerate(zip(curves, names, strict=True)):
        taus, scores = _pair(f"curves[{key!r}]", curves[key])
        best = number(f"chosen[{key!r}]", chosen[key])
        order = np.argsort(taus)
        taus, scores = taus[order], scores[order] * (100 if percent else 1)
        label = literal(f"{name}: τ = {best:.3g}")
        marker = MARKERS[i % len(MARKERS)]
        height = float(np.interp(best, taus, scores))
        color = known[name]
        dash = ("--", ":", "-.")[used.count(color) % 3 - 1] if color in used else dashes[name]
        used.append(color)
        dot: dict[str, Any] = {"color": color, "markeredgecolor": INK, "markersize": 8}
        axes.plot(taus, scores, color=color, linestyle=dash, linewidth=1.4)
        axes.axvline(best, color=color, linewidth=0.7, alpha=0.6)
        axes.plot([best], [height], marker=marker, linestyle="", zorder=4, label=label, **dot)
    for tau, name in ((0, "unadjusted"), (1, "consistent")):
        axes.axvline(tau, color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        axes.annotate(
            name, (tau, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
            fontsize=8, color=GREY,
        )  # fmt: skip
    axes.set_xlabel("strength of the logit adjustment τ (dimensionless)")
    axes.set_ylabel(share_name(ylabel, percent))
    legend_above(figure, axes)
    return figure


def _pair(name: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    """The checked values of tau and scores of one curve."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise problem(f"{name} must be a pair of τ and scores", got=type(pair).__name__, error=TypeError)
    rule = "τ and scores of one shape (K,)"
    taus, scores = (checked_row(f"{name} {what}", part, rule) for part, what in zip(pair, ("τ", "scores"), strict=True))
    if taus.shape != scores.shape:
        raise problem(f"{name} must be {rule}", got=f"{taus.shape} and {scores.shape}", error=ShapeError)
    finite(**{f"{name} τ": taus, f"{name} scores": scores})
    return taus, scores
