"""Pictures of classification: errors by class, studies, feature spaces, priors, norms and calibration.

Each is a ``matplotlib`` ``Figure``, never pyplot, as in ``results.figures``; shares of one are shown in percent.
"""

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
    FAINT,
    GREY,
    INK,
    MARKERS,
    PALETTE,
    SPREAD,
    Colors,
    color_scale,
    cut_below_zero,
    dressed,
    given_colors,
    legend_above,
    line_and_band,
    literal,
    mean_and_spread,
    new_figure,
    note_no_runs,
    seeds_text,
    spread_shown,
    stairs,
    styled_methods,
    styles,
    train_counts,
    with_units,
)
from .schema import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "bar_figure",
    "class_error_figure",
    "feature_space_figure",
    "norms_figure",
    "reliability_figure",
    "study_figure",
    "tau_figure",
]

_MOST_METHODS = 6  # side by side at one class
_MOST_DOTS = 120
_MOST_BARS = 6  # with room for their names on a line
_MOST_NUMBERS = 12  # classes whose errors are written into a heat map
_MOST_NAMED = 20  # classes in a legend

Panel = tuple[Any, Any, Any, Any]


def class_error_figure(
    ds: xr.Dataset, *, colors: Colors | None = None, class_names: Sequence[str] | None = None
) -> Figure:
    """Error of each class, one minus its recall, for each method, above the training counts of the classes.

    Few methods are dots with whiskers of one standard deviation of the seeds; more than six, or many classes, are a
    heat map of methods and classes. A class without test samples is a gap. The constant predictor, which errs on every
    class but one, is left out. Whiskers are cut at 0 and 100 %.

    Args:
        ds: a result of classification, of the schema in ``results.schema``.
        class_names: of the bins; None shows what each stands for.
    Raises:
        ResultsError: ``ds`` is not of classification. ValueError: there is not one name per class, or a color is
        unknown.
    """
    check_result(ds, "bin_recall", kind="classification")
    centers = [f"{center:g}" for center in ds["bin_center"].values]
    names = _named(class_names, len(centers)) or centers
    rows = []
    for method, color in styled_methods(ds, colors, baseline=False).items():
        part = ds.sel({"method": method})
        done = part["completed"].values == 1
        mean, spread = mean_and_spread(100 - 100 * part["bin_recall"].values[done])
        rows.append((literal(f"{method} ({seeds_text(int(done.sum()))})"), color, mean, spread))
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
            at = place + (i - (len(rows) - 1) / 2) * step
            whisker = spread if np.isfinite(spread).any() else None
            marks: dict[str, Any] = {
                "fmt": MARKERS[i],
                "markersize": 5,
                "elinewidth": 1,
                "capsize": 2,
            }
            dots = top.errorbar(at, mean, yerr=whisker, color=color, label=label, **marks).lines[0]
            dots.set(clip_on=False, zorder=3)  # one at 0 or 100 is seen whole; its whisker ends at the axes
        top.set_ylabel("error of a class (%)" + spread_shown(ds))
        top.set_ylim(0, min(100.0, top.get_ylim()[1]))
        if not rows:
            note_no_runs(top)
        legend_above(figure, top)
    top.tick_params(labelbottom=False)
    _class_counts(figure, below, train_counts(ds), names)
    below.set_xlabel(literal(ds.attrs["label_name"]))
    dressed(figure, [top], grid=not many)
    return dressed(figure, [below])


def _heat_map(figure: Figure, axes: Axes, bar: Axes, rows: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """Methods down, classes across; the numbers are written in where there is room."""
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


def study_figure(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    percent: bool = True,
    colors: Colors | None = None,
) -> Figure:
    """A number of each series against what was varied: a line through the means, its band one sd of the seeds.

    Args:
        curves: by name and varied value: the number of each seed; NaN for a seed that gave none.
        ylabel: what the numbers are, with their units unless ``percent``.
        log_x: the varied values stand on a log scale.
        percent: the numbers are shares of one, shown in percent.
    Raises:
        ValueError: a series is empty, a varied value not finite or, on a log scale, not above 0, or a color is unknown.
        ShapeError: the numbers of a value are not one a seed.
    """
    _filled("curves", curves)
    instance(str, xlabel=xlabel, ylabel=ylabel)
    known, dashes = styles(curves, colors)
    figure = new_figure(3.4)
    axes = figure.add_subplot(1, 1, 1)
    ticks, several = set(), False
    for i, (name, series) in enumerate(curves.items()):
        _filled(f"curves[{name!r}]", series, texts=False)
        xs = sorted(number("a varied value", x, low=0 if log_x else -math.inf, open_low=log_x) for x in series)
        told = {float(x): _by_seed(f"curves[{name!r}][{x!r}]", values, percent) for x, values in series.items()}
        mean, spread = np.array([mean_and_spread(told[x]) for x in xs]).T
        counts = [int(np.isfinite(told[x]).sum()) for x in xs]
        several |= max(counts) > 1
        label = literal(f"{name} ({_seeds_range(counts)})")
        line_and_band(axes, xs, mean, spread, known[name], label=label, **_line(i, dashes[name]))
        ticks |= set(xs)
    if log_x:
        axes.set_xscale("log")
    _value_ticks(axes, sorted(ticks), log_x)
    if percent:
        cut_below_zero(axes)
    axes.set_xlabel(literal(xlabel))
    axes.set_ylabel(_share_name(ylabel, percent) + f"\n{SPREAD}" * several)
    legend_above(figure, axes)
    return dressed(figure, [axes])


def bar_figure(
    values: Mapping[str, Sequence[float]], *, ylabel: str, percent: bool = True, colors: Colors | None = None
) -> Figure:
    """One bar a name: the mean over seeds with a whisker of one standard deviation, and a dot a seed.

    Args:
        values: by name: the number of each seed; NaN for a seed that gave none.
        ylabel: what the numbers are, with their units unless ``percent``.
        percent: the numbers are shares of one, shown in percent.
        colors: by name; None draws all alike, since the names stand below the bars.
    Raises:
        ValueError: there are no names, or a color is unknown. ShapeError: the numbers of a name are not one a seed.
    """
    _filled("values", values)
    instance(str, ylabel=ylabel)
    given = given_colors(colors)
    figure = new_figure(3.2)
    axes = figure.add_subplot(1, 1, 1)
    several = False
    for i, (name, numbers) in enumerate(values.items()):
        told = _by_seed(f"values[{name!r}]", numbers, percent)
        mean, spread = (float(x) for x in mean_and_spread(told))
        several |= not math.isnan(spread)
        whisker = None if math.isnan(spread) else spread
        kit = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
        axes.bar(i, mean, 0.66, color=given.get(name, PALETTE[0]), yerr=whisker, error_kw=kit, zorder=2)
        if told.size > 1:
            spot = i + np.linspace(-0.18, 0.18, told.size)
            axes.scatter(spot, told, s=12, color="white", edgecolors=INK, linewidths=0.7, zorder=4, clip_on=False)
        if not math.isnan(mean):
            top = float(np.nanmax([mean + (whisker or 0.0), *told]))
            text: dict[str, Any] = {
                "xytext": (0, 3),
                "textcoords": "offset points",
                "ha": "center",
                "fontsize": 8,
                "color": INK,
            }
            axes.annotate(f"{mean:.3g}", (i, top), **text)
    width = max(6, 84 // len(values))
    names = [literal(textwrap.fill(name, width) if len(values) <= _MOST_BARS else name) for name in values]
    axes.set_xticks(np.arange(len(names)), names)
    if len(values) > _MOST_BARS:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.margins(y=0.12)
    if percent:
        cut_below_zero(axes)
    axes.set_ylabel(_share_name(ylabel, percent) + "\nmean ± sd, a dot a seed" * several)
    return dressed(figure, [axes])


def feature_space_figure(panels: Mapping[str, Panel], *, class_names: Sequence[str] | None = None) -> Figure:
    """Features in the plane, a dot each in the colour of its class, and prototypes as stars, in panels side by side.

    The legend has the first twenty classes and the number of the others; looks repeat after a hundred classes.

    Args:
        panels: by title: features, labels, and prototypes with their labels, or None; prototypes without labels are
            white. Labels are class indices.
        class_names: by class index; None shows the index.
    Shape:
        features (N, 2), labels (N,), prototypes (P, 2), prototype labels (P,).
    Raises:
        ShapeError: features are not (N, 2), or labels not one each. ValueError: there is no panel, a feature is not
        finite, a label is negative or has no name, or prototypes have labels but no places.
    """
    _filled("panels", panels)
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
        for look in np.unique(looks):
            color, marker = _class_style(int(look))
            dots = features[looks == look]
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
    figure.supxlabel("first feature (dimensionless)", fontsize=10, color=INK)
    figure.supylabel("second feature (dimensionless)", fontsize=10, color=INK)
    names = _named(class_names, max(classes, default=-1) + 1, more=True)
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
    return dressed(figure, axes_of, grid="both")


def tau_figure(
    curves: Mapping[Any, tuple[Any, Any]],
    chosen: Mapping[Any, float],
    *,
    ylabel: str,
    percent: bool = True,
) -> Figure:
    """A score against the strength of logit adjustment, a line a criterion or seed, its chosen strength marked.

    No adjustment, τ = 0, and the one that is consistent with the balanced error, τ = 1, are dotted lines.

    Args:
        curves: by name: the τ tried and the score at each. All scores are of one kind, since they share an axis.
        chosen: by the same names: the τ chosen, which need not be one of those tried.
        ylabel: what the scores are, with their units unless ``percent``.
        percent: the scores are shares of one, shown in percent.
    Raises:
        ValueError: there is no curve, ``chosen`` has other names, or a number is not finite. ShapeError: τ and scores
        are not two equal rows.
    Source:
        Menon et al. 2021 (arXiv:2007.07314).
    """
    _filled("curves", curves, texts=False)
    instance(Mapping, chosen=chosen)
    instance(str, ylabel=ylabel)
    if set(chosen) != set(curves):
        raise problem(f"chosen must have the names {list(curves)}", got=str(list(chosen)))
    figure = new_figure(3.4)
    axes = figure.add_subplot(1, 1, 1)
    names = [str(name) for name in curves]
    colors, dashes = styles(names)
    for i, (key, name) in enumerate(zip(curves, names, strict=True)):
        taus, scores = _pair(f"curves[{key!r}]", curves[key])
        best = number(f"chosen[{key!r}]", chosen[key])
        order = np.argsort(taus)
        taus, scores = taus[order], scores[order] * (100 if percent else 1)
        label = literal(f"{name}: τ = {best:.3g}")
        marker = MARKERS[i % len(MARKERS)]
        height = float(np.interp(best, taus, scores))
        dot: dict[str, Any] = {"color": colors[name], "markeredgecolor": INK, "markersize": 8}
        axes.plot(taus, scores, color=colors[name], linestyle=dashes[name], linewidth=1.4)
        axes.axvline(best, color=colors[name], linewidth=0.7, alpha=0.6)
        axes.plot([best], [height], marker=marker, linestyle="", zorder=4, label=label, **dot)
    for tau, name in ((0, "unadjusted"), (1, "consistent")):
        axes.axvline(tau, color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        axes.annotate(
            name, (tau, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
            fontsize=8, color=GREY,
        )  # fmt: skip
    axes.set_xlabel("strength of the logit adjustment τ (dimensionless)")
    axes.set_ylabel(_share_name(ylabel, percent))
    legend_above(figure, axes)
    return dressed(figure, [axes])


def norms_figure(
    norms: Mapping[str, Any],
    counts: Any,
    *,
    class_names: Sequence[str] | None = None,
    colors: Colors | None = None,
) -> Figure:
    """Lengths of the classifier's rows, by class in falling order of training samples, above their counts.

    Each method's norms are divided by their mean over classes; with several seeds the line is their mean and the band
    one standard deviation. The legend has Pearson's correlation of the norm with the logarithm of the count, over the
    classes that have samples.

    Args:
        norms: by method, of each class, and of each seed where there are several.
        counts: training samples of each class.
        class_names: by class index; None shows the index.
    Shape:
        norms (C,) or (S, C), counts (C,).
    Raises:
        ShapeError: norms are not of as many classes as counts. ValueError: there is no method, a norm is negative or
        not finite, all norms of a method are 0, a count is negative or not finite, there is not one name a class, or a
        color is unknown.
    Source:
        Kang et al. 2020 (arXiv:1910.09217).
    """
    _filled("norms", norms)
    counts = labels_array(counts, "counts").astype(np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise problem("counts must be one number a class, shape (C,)", got=counts.shape, error=ShapeError)
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise problem("counts must be finite and not negative", got=counts.tolist())
    names = _named(class_names, len(counts)) or [str(i) for i in range(len(counts))]
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
        line_and_band(top, place, mean[order], spread[order], known[method], label=label, **_line(i, dashes[method]))
    top.set_ylabel("relative weight norm\n(dimensionless)" + f"\n{SPREAD}" * several)
    top.tick_params(labelbottom=False)
    _class_counts(figure, below, counts[order], [names[i] for i in order])
    below.set_xlabel("class, in falling order of its training samples")
    legend_above(figure, top)
    return dressed(figure, [top, below])


def reliability_figure(curves: Mapping[str, Any], *, colors: Colors | None = None) -> Figure:
    """Accuracy against confidence for each method, above the share of samples at each confidence.

    The legend has the expected calibration error that follows: the mean distance from the diagonal over samples.

    Args:
        curves: by method: a dataset or mapping with ``confidence`` (the mean in each bin), ``accuracy`` and ``count``,
            over bins of equal width from 0 to 1, such as ``CalibrationMetrics.reliability()`` gives; the first two are
            NaN where the count is 0.
    Shape:
        confidence, accuracy, count: (K,), equal within a method.
    Raises:
        ValueError: there is no method, a part is missing or outside [0, 1], a method has no samples, or a color is
        unknown. ShapeError: the parts differ in shape.
    Source:
        Guo et al. 2017, figure 1 (arXiv:1706.04599).
    """
    _filled("curves", curves)
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
        top.plot(100 * confidence[some], 100 * accuracy[some], color=color, label=label, **_line(i, dash))
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
    return dressed(figure, [top, below], grid="both")


def _reliability(method: str, curve: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    """Of norm and log count over the classes with samples."""
    norms, logs = norms[counts > 0], np.log(counts[counts > 0])
    flat = [np.ptp(values) <= 1e-9 * max(1.0, np.abs(values).max(initial=0)) for values in (norms, logs) if values.size]
    if len(flat) < 2 or any(flat):
        return "r undefined"
    return f"r = {np.corrcoef(norms, logs)[0, 1]:.2f}"


def _filled(name: str, mapping: Any, *, texts: bool = True) -> None:
    """A mapping with entries, by names that are text unless they are something else by right."""
    instance(Mapping, **{name: mapping})
    if not mapping:
        raise problem(f"{name} must hold at least one entry", got="none")
    if texts:
        for key in mapping:
            instance(str, **{f"the name {key!r} in {name}": key})


def _by_seed(name: str, values: Any, percent: bool) -> np.ndarray:
    """One number a seed, NaN where it gave none, in percent where asked for."""
    told = labels_array(values, name).astype(np.float64)
    if told.ndim != 1 or told.size == 0:
        raise problem(f"{name} must be one number a seed, shape (S,)", got=told.shape, error=ShapeError)
    if np.isinf(told).any():
        raise problem(f"{name} must be finite or NaN", got=told.tolist())
    return told * 100 if percent else told


def _pair(name: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise problem(f"{name} must be a pair of τ and scores", got=type(pair).__name__, error=TypeError)
    taus, scores = (labels_array(part, f"{name} {what}") for part, what in zip(pair, ("τ", "scores"), strict=True))
    if taus.shape != scores.shape or taus.ndim != 1 or taus.size == 0:
        got = f"{taus.shape} and {scores.shape}"
        raise problem(f"{name} must be τ and scores of one shape (K,)", got=got, error=ShapeError)
    finite(**{f"{name} τ": taus, f"{name} scores": scores})
    return taus.astype(np.float64), scores.astype(np.float64)


def _plane(name: str, places: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points in the plane and the class of each; all of class 0 where there are no labels."""
    points = labels_array(places, name).astype(np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise problem(f"{name} must have the shape (N, 2)", got=points.shape, error=ShapeError)
    finite(**{name: points})
    owners = np.zeros(len(points), dtype=np.int64) if labels is None else labels_array(labels, f"labels of {name}")
    if owners.shape != (len(points),):
        rule = f"{name} must have one label each, shape ({len(points)},)"
        raise problem(rule, got=owners.shape, error=ShapeError)
    if owners.dtype.kind == "f" or (owners < 0).any():
        rule = f"labels of {name} must be class indices, whole numbers from 0"
        raise problem(rule, got=f"dtype {owners.dtype}, minimum {owners.min(initial=0):g}")
    return points, owners


def _class_style(label: int) -> tuple[str, str]:
    """A colour a class, and another marker once the colours repeat."""
    return PALETTE[label % len(PALETTE)], MARKERS[label // len(PALETTE) % len(MARKERS)]


def _line(i: int, dash: str) -> dict[str, Any]:
    """The look of the ``i``-th line, whose marks at the edge of the axes are seen whole."""
    return {"marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "linestyle": dash, "clip_on": False, "zorder": 3}


def _named(names: Any, size: int, *, more: bool = False) -> list[str]:
    """Names of ``size`` classes, or with ``more`` of at least that many; none where they are not given."""
    if names is None:
        return []
    instance(Sequence, class_names=names)
    if isinstance(names, str) or len(names) < size or (len(names) > size and not more):
        got = repr(names) if isinstance(names, str) else f"{len(names)} names"
        rule = f"class_names must be one name a class, {'at least ' * more}{size} of them"
        raise problem(rule, got=got)
    instance(str, **{f"class_names[{i}]": name for i, name in enumerate(names)})
    return [literal(name) for name in names]


def _class_counts(figure: Figure, axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """Training samples of each class, with the names of the classes below."""
    stairs(axes, np.arange(len(counts) + 1) - 0.5, counts, None)
    axes.set_ylabel("training\nsamples\n(log scale)")
    _class_ticks(figure, axes, names)


def _class_ticks(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Every class where there is room, else every so many."""
    step = math.ceil(len(names) / 20)
    axes.set_xticks(np.arange(0, len(names), step), list(names[::step]))
    axes.set_xlim(-0.5, len(names) - 0.5)
    shown = names[::step]
    if max(map(len, shown)) * len(shown) > 70:
        axes.tick_params(axis="x", labelrotation=90)
        figure.set_figheight(figure.get_figheight() + 0.08 * max(map(len, shown)))


def _value_ticks(axes: Axes, values: Sequence[float], log_x: bool) -> None:
    """A tick at every value that was tried, its number left out where it would run into the one before."""
    scaled = np.log(values) if log_x else np.array(values, dtype=np.float64)
    span = float(np.ptp(scaled)) or 1.0
    texts, free = [], -math.inf
    for value, at in zip(values, (scaled - scaled[0]) / span, strict=True):
        text = f"{value:g}"
        half = 0.006 * (len(text) + 1)
        texts.append(text if at - half >= free else "")
        free = at + half if texts[-1] else free
    axes.minorticks_off()
    axes.set_xticks(list(values), texts)


def _seeds_range(counts: Sequence[int]) -> str:
    return seeds_text(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)} seeds"


def _share_name(name: str, percent: bool) -> str:
    return with_units(name, "%") if percent else literal(name)
