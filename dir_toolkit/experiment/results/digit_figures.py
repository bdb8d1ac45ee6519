"""Figures of studies, feature spaces, norms and calibration. Fractions are shown in percent."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..._checks import finite, instance, labels_array, number, problem
from ...errors import ShapeError
from .drawing import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    SPREAD,
    Colors,
    check_entries,
    checked_names,
    checked_row,
    class_counts,
    cut_below_zero,
    given_colors,
    legend_above,
    line_and_band,
    line_style,
    literal,
    look,
    mean_and_spread,
    new_figure,
    seeds_text,
    share_name,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bar_figure", "feature_space_figure", "norms_figure", "reliability_figure", "study_figure"]

_MOST_BARS = 6  # with room for their names on a line
_MOST_NAMED = 20  # classes in a legend

Panel = tuple[Any, Any, Any, Any]


@look()
def study_figure(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    percent: bool = True,
    colors: Colors | None = None,
) -> Figure:
    """Each series against the varied value: a line through the means, and a band of one standard deviation over seeds.

    Args:
        curves: by name and varied value, one number per seed. NaN stands for a seed without a number.
        ylabel: the name of the numbers, with their units unless ``percent``.
        log_x: whether the varied values are on a log scale.
        percent: whether the numbers are shares of one, which are shown in percent.
    Raises:
        ValueError: a series is empty, a varied value is not finite or, on a log scale, not above 0, or a color is
        unknown. ShapeError: the numbers of a value are not one per seed.
    """
    check_entries("curves", curves)
    instance(str, xlabel=xlabel, ylabel=ylabel)
    known, dashes = styles(curves, colors)
    figure = new_figure(3.4)
    axes = figure.add_subplot(1, 1, 1)
    ticks, several = set(), False
    for i, (name, series) in enumerate(curves.items()):
        check_entries(f"curves[{name!r}]", series, texts=False)
        xs = sorted(number("a varied value", x, low=0 if log_x else -math.inf, open_low=log_x) for x in series)
        by_x = {float(x): _by_seed(f"curves[{name!r}][{x!r}]", values, percent) for x, values in series.items()}
        mean, spread = np.array([mean_and_spread(by_x[x]) for x in xs]).T
        counts = [int(np.isfinite(by_x[x]).sum()) for x in xs]
        several |= max(counts) > 1
        label = literal(f"{name} ({_seeds_range(counts)})")
        line_and_band(axes, xs, mean, spread, known[name], label=label, **line_style(i, dashes[name]))
        ticks |= set(xs)
    if log_x:
        axes.set_xscale("log")
    _value_ticks(axes, sorted(ticks), log_x)
    if percent:
        cut_below_zero(axes)
    axes.set_xlabel(literal(xlabel))
    axes.set_ylabel(share_name(ylabel, percent) + f"\n{SPREAD}" * several)
    legend_above(figure, axes)
    return figure


@look()
def bar_figure(
    values: Mapping[str, Sequence[float]], *, ylabel: str, percent: bool = True, colors: Colors | None = None
) -> Figure:
    """One bar per name: the mean over seeds, with a whisker of one standard deviation and a dot per seed.

    Args:
        values: by name, one number per seed. NaN stands for a seed without a number.
        ylabel: the name of the numbers, with their units unless ``percent``.
        percent: whether the numbers are shares of one, which are shown in percent.
        colors: by name. None uses one color, since the names are below the bars.
    Raises:
        ValueError: there are no names, or a color is unknown. ShapeError: the numbers of a name are not one per seed.
    """
    check_entries("values", values)
    instance(str, ylabel=ylabel)
    given = given_colors(colors)
    figure = new_figure(3.2)
    axes = figure.add_subplot(1, 1, 1)
    several = False
    for i, (name, numbers) in enumerate(values.items()):
        each = _by_seed(f"values[{name!r}]", numbers, percent)
        mean, spread = (float(x) for x in mean_and_spread(each))
        several |= not math.isnan(spread)
        whisker = None if math.isnan(spread) else spread
        kit = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
        axes.bar(i, mean, 0.66, color=given.get(name, PALETTE[0]), yerr=whisker, error_kw=kit, zorder=2)
        if each.size > 1:
            spot = i + np.linspace(-0.18, 0.18, each.size)
            axes.scatter(spot, each, s=12, color="white", edgecolors=INK, linewidths=0.7, zorder=4, clip_on=False)
        if not math.isnan(mean):
            top = float(np.nanmax([mean + (whisker or 0.0), *each]))
            place: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{mean:.3g}", (i, top), fontsize=8, **place)
    width = max(6, 84 // len(values))
    names = [literal(textwrap.fill(name, width) if len(values) <= _MOST_BARS else name) for name in values]
    axes.set_xticks(np.arange(len(names)), names)
    if len(values) > _MOST_BARS:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.margins(y=0.12)
    if percent:
        cut_below_zero(axes)
    axes.set_ylabel(share_name(ylabel, percent) + "\nmean ± sd, one dot per seed" * several)
    return figure


@look(grid="both")
def feature_space_figure(panels: Mapping[str, Panel], *, class_names: Sequence[str] | None = None) -> Figure:
    """Features in the plane as dots in the colours of their classes, and prototypes as stars, in panels side by side.

    The legend has the first twenty classes and the number of the others. Looks repeat after a hundred classes.

    Args:
        panels: by title, the features, their labels, and the prototypes and their labels, or None for each of these.
            Labels are class indices. Prototypes without labels are white.
        class_names: by class index. None shows the index.
    Shape:
        features (N, 2), labels (N,), prototypes (P, 2), prototype labels (P,).
    Raises:
        ShapeError: features are not (N, 2), or there is not one label per feature. ValueError: there is no panel, a
        feature is not finite, a label is negative or has no name, or prototypes have labels but no places.
    """
    check_entries("panels", panels)
    columns = len(panels) if len(panels) <= 3 else 2 if len(panels) == 4 else 3
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(0.6 + lines * (7.4 / columns + 0.2 if columns > 1 else 5.2))
    from matplotlib.lines import Line2D

    axes_of: list[Axes] = []
    classes: set[int] = set()
    starred = False
    for i, (title, panel) in enumerate(panels.items()):
        if not isinstance(panel, (tuple, list)) or len(panel) != 4:
            rule = f"panels[{title!r}] must be (features, labels, prototypes or None, prototype labels or None)"
            raise problem(rule, got=type(panel).__name__, error=TypeError)
        axes = figure.add_subplot(lines, columns, i + 1)
        features, labels = _plane(f"panels[{title!r}]: features", panel[0], panel[1])
        looks = labels % (len(PALETTE) * len(MARKERS))
        for style in np.unique(looks):
            color, marker = _class_style(int(style))
            dots = features[looks == style]
            axes.scatter(
                dots[:, 0], dots[:, 1], s=5, color=color, marker=marker, alpha=0.55, linewidths=0, rasterized=True
            )
        classes |= set(labels.tolist())
        if panel[2] is not None:
            starred = True
            places, owners = _plane(f"panels[{title!r}]: prototypes", panel[2], panel[3])
            fills = ["white" if panel[3] is None else _class_style(int(owner))[0] for owner in owners]
            axes.scatter(
                places[:, 0], places[:, 1], s=110, marker="*", c=fills, edgecolors="black", linewidths=0.8, zorder=3
            )
            classes |= set() if panel[3] is None else set(owners.tolist())
        elif panel[3] is not None:
            raise problem(f"panels[{title!r}] must have prototypes for prototype labels", got="None")
        axes.set_title(literal(title))
        axes.set_aspect("equal", adjustable="datalim")
        axes_of.append(axes)
    figure.supxlabel("first feature (dimensionless)")
    figure.supylabel("second feature (dimensionless)")
    names = checked_names(class_names, max(classes, default=-1) + 1, more=True)
    handles = []
    for label in sorted(classes)[:_MOST_NAMED]:
        color, marker = _class_style(label)
        name = names[label] if names else str(label)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", label=name))
    if len(classes) > _MOST_NAMED:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(classes) - _MOST_NAMED:,} more"))
    if starred:
        ring: dict[str, Any] = {"marker": "*", "markersize": 11, "markerfacecolor": "white", "markeredgecolor": "black"}
        handles.append(Line2D([], [], linestyle="", label="prototype", **ring))
    if handles:
        legend_above(figure, axes_of[0], handles)
    return figure


@look()
def norms_figure(
    norms: Mapping[str, Any], counts: Any, *, class_names: Sequence[str] | None = None, colors: Colors | None = None
) -> Figure:
    """Lengths of the classifier's rows, by class in falling order of training samples, above these counts.

    Each method's norms are divided by their mean over classes. If there are several seeds, the line is their mean and
    the band one standard deviation. The legend has Pearson's correlation of the norm with the logarithm of the count,
    over the classes that have samples.

    Args:
        norms: by method, one norm per class, or one per seed and class.
        counts: training samples of each class.
        class_names: by class index. None shows the index.
    Shape:
        norms (C,) or (S, C), counts (C,).
    Raises:
        ShapeError: norms are not of as many classes as counts. ValueError: there is no method, a norm is negative or
        not finite, all norms of a method are 0, a count is negative or not finite, there is not one name per class, or
        a color is unknown.
    Source:
        Kang et al. 2020 (arXiv:1910.09217).
    """
    check_entries("norms", norms)
    counts = checked_row("counts", counts, "one number per class, shape (C,)")
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise problem("counts must be finite and not negative", got=counts.tolist())
    names = checked_names(class_names, len(counts)) or [str(i) for i in range(len(counts))]
    known, dashes = styles(norms, colors)
    order = np.argsort(-counts, kind="stable")
    place = np.arange(len(counts))
    figure = new_figure(4.4)
    grid = figure.add_gridspec(2, 1, height_ratios=[2, 1])
    top = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=top)
    several = False
    top.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    for i, (method, values) in enumerate(norms.items()):
        rows = np.atleast_2d(labels_array(values, f"norms[{method!r}]").astype(np.float64))
        if rows.ndim != 2 or rows.shape[1] != len(counts) or len(rows) == 0:
            rule = f"norms[{method!r}] must have the shape ({len(counts)},) or (S, {len(counts)})"
            raise problem(rule, got=rows.shape, error=ShapeError)
        if not (np.isfinite(rows) & (rows >= 0)).all() or not (rows.sum(1) > 0).all():
            rule = f"norms[{method!r}] must be finite, not negative, and not all 0"
            raise problem(rule, got=rows.tolist())
        mean, spread = mean_and_spread(rows / rows.mean(1, keepdims=True))
        label = literal(f"{method} ({_correlation(mean, counts)})")
        several |= len(rows) > 1
        line_and_band(
            top, place, mean[order], spread[order], known[method], label=label, **line_style(i, dashes[method])
        )
    top.set_ylabel("relative weight norm\n(dimensionless)" + f"\n{SPREAD}" * several)
    top.tick_params(labelbottom=False)
    class_counts(figure, below, counts[order], [names[i] for i in order])
    below.set_xlabel("class, in falling order of its training samples")
    legend_above(figure, top)
    return figure


@look(grid="both")
def reliability_figure(curves: Mapping[str, Any], *, colors: Colors | None = None) -> Figure:
    """Accuracy against confidence for each method, above the share of samples at each confidence.

    The legend has the expected calibration error, which is the mean distance of the samples from the diagonal.

    Args:
        curves: by method, what ``CalibrationMetrics.reliability()`` gives: a dataset or mapping with ``confidence``
            (the mean in each bin), ``accuracy`` and ``count`` over bins of equal width from 0 to 1. The first two are
            NaN where the count is 0.
    Shape:
        confidence, accuracy, count: (K,), equal within a method.
    Raises:
        ValueError: there is no method, a part is missing or outside [0, 1], a method has no samples, or a color is
        unknown. ShapeError: the parts differ in shape.
    Source:
        Guo et al. 2017, figure 1 (arXiv:1706.04599).
    """
    check_entries("curves", curves)
    known, dashes = styles(curves, colors)
    figure = new_figure(6.0)
    grid = figure.add_gridspec(2, 1, height_ratios=[3.2, 1])
    top = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=top)
    top.plot([0, 100], [0, 100], color=GREY, linewidth=0.9, linestyle="--")
    for i, (method, curve) in enumerate(curves.items()):
        confidence, accuracy, count = _reliability(method, curve)
        share, some = count / count.sum(), count > 0
        error = float((share * np.abs(accuracy - confidence))[some].sum())
        color, dash = known[method], dashes[method]
        label = literal(f"{method} (ECE {100 * error:.2f} %)")
        top.plot(100 * confidence[some], 100 * accuracy[some], color=color, label=label, **line_style(i, dash))
        edges = np.linspace(0, 100, len(count) + 1)
        below.stairs(100 * share, edges, color=color, linestyle=dash, linewidth=1.3)
    top.set_xlim(0, 100)
    top.set_ylim(0, 100)
    top.tick_params(labelbottom=False)
    top.set_ylabel("accuracy (%)")
    below.set_ylim(bottom=0)
    below.set_ylabel("share of\nsamples (%)")
    below.set_xlabel("confidence (%)")
    legend_above(figure, top)
    return figure


def _reliability(method: str, curve: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The checked confidence, accuracy and count of one method."""
    parts = []
    for name in ("confidence", "accuracy", "count"):
        if not isinstance(curve, (Mapping, xr.Dataset)) or name not in curve:
            raise problem(f"curves[{method!r}] must have confidence, accuracy and count", got=f"no {name!r}")
        part = curve[name]
        part = part.values if isinstance(part, xr.DataArray) else part
        parts.append(labels_array(part, f"{name} of {method!r}").astype(np.float64))
    confidence, accuracy, count = parts
    if not confidence.shape == accuracy.shape == count.shape or count.ndim != 1:
        shapes = " and ".join(str(part.shape) for part in parts)
        rule = f"curves[{method!r}] must have parts of one shape (K,)"
        raise problem(rule, got=shapes, error=ShapeError)
    if not (np.isfinite(count) & (count >= 0)).all() or count.sum() == 0:
        rule = f"count of {method!r} must be finite, not negative, and above 0 somewhere"
        raise problem(rule, got=count.tolist())
    for name, part in (("confidence", confidence), ("accuracy", accuracy)):
        inside = (part >= 0) & (part <= 1)
        if not inside[count > 0].all():
            raise problem(f"{name} of {method!r} must lie in [0, 1] where there are samples", got=part.tolist())
    return confidence, accuracy, count


def _correlation(norms: np.ndarray, counts: np.ndarray) -> str:
    """The correlation of norm and log count over the classes with samples."""
    norms, logs = norms[counts > 0], np.log(counts[counts > 0])
    flat = [np.ptp(values) <= 1e-9 * max(1.0, np.abs(values).max(initial=0)) for values in (norms, logs) if values.size]
    if len(flat) < 2 or any(flat):
        return "r undefined"
    return f"r = {np.corrcoef(norms, logs)[0, 1]:.2f}"


def _by_seed(name: str, values: Any, percent: bool) -> np.ndarray:
    """One number per seed, or NaN, optionally in percent."""
    each = checked_row(name, values, "one number per seed, shape (S,)")
    if np.isinf(each).any():
        raise problem(f"{name} must be finite or NaN", got=each.tolist())
    return each * 100 if percent else each


def _plane(name: str, places: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points in the plane and the class of each, which is 0 if there are no labels."""
    points = labels_array(places, name).astype(np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise problem(f"{name} must have the shape (N, 2)", got=points.shape, error=ShapeError)
    finite(**{name: points})
    owners = np.zeros(len(points), dtype=np.int64) if labels is None else labels_array(labels, f"labels of {name}")
    if owners.shape != (len(points),):
        rule = f"{name} must have one label per point, shape ({len(points)},)"
        raise problem(rule, got=owners.shape, error=ShapeError)
    if owners.dtype.kind == "f" or (owners < 0).any():
        rule = f"labels of {name} must be class indices, whole numbers from 0"
        raise problem(rule, got=f"dtype {owners.dtype}, minimum {owners.min(initial=0):g}")
    return points, owners


def _class_style(label: int) -> tuple[str, str]:
    """One colour per class, and another marker once the colours repeat."""
    return PALETTE[label % len(PALETTE)], MARKERS[label // len(PALETTE) % len(MARKERS)]


def _value_ticks(axes: Axes, values: Sequence[float], log_x: bool) -> None:
    """A tick at every value. Its label is omitted if it would overlap the one before."""
    scaled = np.log(values) if log_x else np.array(values, dtype=np.float64)
    span = float(np.ptp(scaled)) or 1.0
    texts, free = [], -math.inf
    for value, place in zip(values, (scaled - scaled[0]) / span, strict=True):
        text = f"{value:g}"
        half = 0.006 * (len(text) + 1)
        texts.append(text if place - half >= free else "")
        free = place + half if texts[-1] else free
    axes.minorticks_off()
    axes.set_xticks(list(values), texts)


def _seeds_range(counts: Sequence[int]) -> str:
    return seeds_text(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)} seeds"
