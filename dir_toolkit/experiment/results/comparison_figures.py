"""Figures of many methods: differences to a baseline, coverage of intervals, and cost.

Methods are rows, so that many long names are readable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..._checks import instance, one_of, problem
from ...errors import ResultsError
from ...labels.bins import Bins
from ...labels.density import REGIONS
from .comparison import PAIRED, check_differences
from .drawing import (
    GREY,
    INK,
    PALETTE,
    Colors,
    legend_above,
    literal,
    look,
    mean_and_spread,
    method_label,
    new_figure,
    no_frame,
    note_no_runs,
    seeds_text,
    spread_shown,
    styled_methods,
    with_units,
)
from .schema import check_result
from .tables import BASELINE, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_figure", "coverage_figure", "difference_figure"]

_ROW = 0.22  # inches
_VERDICTS = {"better": PALETTE[0], "worse": PALETTE[1], "interval holds 0": GREY}
_SHORT_TO_LONG = ("#E69F00", "#FFFFFF", "#56B4E9")  # light enough for numbers on it
_FAR = 25.0  # percentage points


@look(grid="both")
def difference_figure(
    differences: xr.Dataset, *, metric: str = "mae", regions: Sequence[str] = ("all", "many", "medium", "few")
) -> Figure:
    """Difference of each method to the baseline, with its interval: methods down, regions across, the best on top.

    Dots are filled if their interval excludes 0, and hollow otherwise. Methods are ordered by the first region. The
    baseline is the line at 0. The constant predictor would dwarf the rest and is left out, and so are methods that were
    not compared.

    Args:
        differences: what :func:`dir_toolkit.experiment.results.comparison.paired_differences` gives.
        metric: ``"mae"`` or ``"bmae"``.
        regions: the regions to show. One that was not compared, or has no test samples, is left out.
    Raises:
        ResultsError: ``differences`` is something else. ValueError: the metric was compared in none of the regions.
    """
    check_differences(differences)
    one_of("metric", metric, PAIRED)
    instance(Sequence, regions=regions)
    pairs = list(zip(differences["metric"].values.tolist(), differences["region"].values.tolist(), strict=True))
    places = [pairs.index((metric, region)) for region in regions if (metric, region) in pairs]
    columns = [j for j in places if differences["difference"][:, j].notnull().any()]
    if not columns:
        raise problem(f"regions must be some in which {metric} was compared", got=repr(regions))
    baseline, level = differences.attrs["baseline"], differences.attrs["level"]
    by_method = differences["difference"].values[:, columns[0]]
    methods = differences["method"].values.tolist()
    order = [i for i in np.argsort(by_method) if np.isfinite(by_method[i]) and methods[i] not in (baseline, BASELINE)]
    names = [literal(f"{methods[i]} ({seeds_text(int(differences['seeds'][i]))})") for i in order]
    figure = new_figure(1.7 + _ROW * max(2, len(order)))
    panels: list[Axes] = []
    for j in columns:
        axes = figure.add_subplot(1, len(columns), len(panels) + 1, sharey=panels[0] if panels else None)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
        values, low, high = (differences[f"difference{end}"].values[order, j] for end in ("", "_low", "_high"))
        for row, (value, least, most) in enumerate(zip(values, low, high, strict=True)):
            verdict = "better" if most < 0 else "worse" if least > 0 else "interval holds 0"
            color = _VERDICTS[verdict]
            fill = "white" if verdict == "interval holds 0" else color
            axes.plot([least, most], [row, row], color=color, linewidth=1.4, zorder=2)
            axes.plot([value], [row], "o", markersize=5, color=color, markerfacecolor=fill, zorder=3)
        axes.set_title(pairs[j][1])
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelleft=not panels)
        panels.append(axes)
    _rows(panels[0], names)
    if not order:
        note_no_runs(panels[0])
    name = with_units(f"{title(metric)} minus that of {baseline}", differences.attrs["label_units"])
    figure.supxlabel(f"{name}, {100 * level:g} % interval; left of 0 is better")
    _legend(figure, panels[0], {word: ("o", color, word in ("better", "worse")) for word, color in _VERDICTS.items()})
    return figure


@look()
def coverage_figure(ds: xr.Dataset) -> Figure:
    """Share of the test samples inside their interval, and the intervals' mean width: methods down, regions across.

    Methods that give no intervals are left out. Numbers are means over seeds, and shares have one standard deviation
    beside. A share is white if it is as intended, orange if fewer samples lie inside, and blue if more do.

    Args:
        ds: a result of regression.
    Raises:
        ResultsError: ``ds`` holds no intervals.
    """
    check_result(ds, "lower", kind="methods that give intervals")
    target, lower, upper = (ds[name].values.astype(np.float64) for name in ("target", "lower", "upper"))
    known = np.asarray(np.isfinite(lower).all(-1))  # (M, S)
    rows = [i for i in range(ds.sizes["method"]) if known[i].any()]
    if not rows:
        raise problem("ds must hold intervals of some method", got="NaN alone", error=ResultsError)
    edges = np.append(ds["bin_low"].values, ds["bin_high"].values[-1])
    region_of = ds["bin_region"].values[Bins.from_edges(edges).index(ds["target"].values)]
    regions = [region for region in ("all", *REGIONS) if region == "all" or region in region_of]
    level = 100 * ds["lower"].attrs["interval_level"]
    figure = new_figure(1.1 + 0.26 * max(2, len(rows)))
    from matplotlib.colors import LinearSegmentedColormap

    panels: list[Axes] = []
    for values in (100.0 * ((lower <= target) & (target <= upper)), upper - lower):
        axes = figure.add_subplot(1, 2, len(panels) + 1, sharey=panels[0] if panels else None)
        means = np.zeros((len(rows), len(regions)))
        spreads = np.zeros_like(means)
        for j, region in enumerate(regions):
            here = slice(None) if region == "all" else region_of == region
            for row, i in enumerate(rows):
                means[row, j], spreads[row, j] = mean_and_spread(values[i][known[i]][:, here].mean(-1))
        if panels:
            shades: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": 3 * max(means.max(), 1e-9)}  # pale
            heading = with_units("mean width", ds.attrs["label_units"])
        else:
            colors = LinearSegmentedColormap.from_list("coverage", _SHORT_TO_LONG)
            shades = {"cmap": colors, "vmin": level - _FAR, "vmax": level + _FAR}
            heading = f"samples inside (%), {level:g} intended"
        axes.imshow(means, aspect="auto", interpolation="nearest", **shades)
        digits = max(0, 1 - math.floor(math.log10(means.min()))) if means.min() > 0 else 0
        for row, j in np.ndindex(*means.shape):
            words = f"{means[row, j]:.{digits if panels else 0}f}"
            if not panels and np.isfinite(spreads[row, j]):
                words += f" ± {spreads[row, j]:.0f}"
            axes.text(j, row, words, ha="center", va="center", fontsize=8, color="black")
        axes.set_title(heading)
        axes.set_xticks(range(len(regions)), regions)
        no_frame(axes)
        axes.set_xticks(np.arange(1, len(regions)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="both", length=0, labelleft=not panels)
        panels.append(axes)
    _rows(panels[0], [method_label(ds, ds["method"].values[i]) for i in rows])
    below = "orange: fewer inside than intended; blue: more" + spread_shown(ds).replace("\n", "; ")
    figure.supxlabel(below, fontsize=9)
    return figure


@look(grid="both")
def cost_figure(ds: xr.Dataset, *, metric: str = "bmae", region: str = "all", colors: Colors | None = None) -> Figure:
    """Error of each method against the minutes it trained. Names stand beside, in the order of the errors.

    Dots are means over seeds, and whiskers are one standard deviation. A method without minutes, such as the constant
    predictor, is left out.

    Args:
        ds: a result of regression.
        metric: a variable of ``ds`` over ``region``, in units of the label.
    Raises:
        ResultsError: ``ds`` is not of regression. ValueError: ``ds`` has no such metric or region, no method has both
        minutes and the metric, or a color is unknown.
    """
    check_result(ds, "mae", kind="regression")
    by_region = [str(n) for n in ds.data_vars if ds[n].dims == ("method", "seed", "region") and ds[n].dtype.kind == "f"]
    one_of("metric", metric, sorted(by_region))
    one_of("region", region, ds["region"].values.tolist())
    dots = []
    for method, color in styled_methods(ds, colors).items():
        part = ds.sel({"method": method})
        minutes, error = (mean_and_spread(part[n].values) for n in ("minutes", metric))
        column = ds["region"].values.tolist().index(region)
        error = (error[0][column], error[1][column])
        if np.isfinite([minutes[0], error[0]]).all():
            dots.append((method, color, minutes, error))
    if not dots:
        raise problem(f"ds must have minutes and {metric} in {region} of some method", got="none")
    dots.sort(key=lambda dot: -float(dot[3][0]))
    height = max(2.6, 0.19 * len(dots))
    figure = new_figure(height + 0.9)
    axes = figure.add_subplot(1, 1, 1)
    for _, color, minutes, error in dots:
        whiskers = {"xerr": minutes[1], "yerr": error[1]}
        known: dict[str, Any] = {name: float(spread) for name, spread in whiskers.items() if np.isfinite(spread)}
        axes.errorbar(float(minutes[0]), float(error[0]), fmt="o", markersize=5.5, color=color, elinewidth=0.7, **known)
    axes.margins(x=0.08, y=0.08)
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    wanted = np.array([(float(error[0]) - low) / (high - low) for *_, error in dots])
    # Worst first, as axes fractions fall: names keep that order, and are moved apart where errors are close.
    places = _apart(wanted[::-1], 0.17 / height)[::-1]
    edge = axes.get_xlim()[1]
    for (method, color, minutes, error), fraction in zip(dots, places, strict=True):
        height_at = low + fraction * (high - low)
        path = [float(minutes[0]), edge], [float(error[0]), height_at]
        axes.plot(*path, color=color, linewidth=0.6, alpha=0.6, zorder=1)
        text: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(method_label(ds, method), (edge, height_at), annotation_clip=False, **text)
    axes.set_xlim(right=edge)
    several = spread_shown(ds)
    name = " ".join([title(metric), region])
    axes.set_ylabel(with_units(name, ds[metric].attrs["units"]) + several)
    axes.set_xlabel("time spent training (min)" + several.replace("\n", ", "))
    return figure


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Rising places in [0, 1] that are near the wanted ones and at least ``gap`` apart, or even if that does not fit.

    Neighbours that are too close form a block about the mean of what they want, as in isotonic regression.
    """
    n = len(wanted)
    gap = min(gap, 1 / max(1, n - 1))
    blocks: list[tuple[float, int]] = []  # where the first of a block would stand, and how many there are
    for i, place in enumerate(wanted):
        start, size = float(place) - gap * i, 1
        while blocks and blocks[-1][0] >= start:
            before, more = blocks.pop()
            start, size = (before * more + start * size) / (more + size), more + size
        blocks.append((start, size))
    starts = np.repeat([start for start, _ in blocks], [size for _, size in blocks])
    return np.clip(starts, 0, max(0.0, 1 - gap * (n - 1))) + gap * np.arange(n)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of a panel with these names, the first at the top."""
    axes.set_yticks(np.arange(len(names)), list(names))
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)


def _legend(figure: Figure, axes: Axes, marks: dict[str, tuple[str, str, bool]]) -> None:
    """Add a legend for marker, color and filling."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=mark, color=color, markerfacecolor=color if full else "white", label=word)
        for word, (mark, color, full) in marks.items()
    ]
    legend_above(figure, axes, handles)
