"""Pictures of label densities, errors, feature statistics and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..._checks import instance, labels_array, number, problem, whole
from ...errors import ShapeError
from ...labels.bins import Bins
from ...labels.density import REGIONS, LabelDensity
from .drawing import (
    FAINT,
    GREY,
    INK,
    Colors,
    checked_row,
    color_scale,
    cut_below_zero,
    legend,
    legend_above,
    line_and_band,
    literal,
    look,
    mean_and_spread,
    method_dashes,
    method_label,
    new_figure,
    no_frame,
    note_no_runs,
    spread_shown,
    stairs,
    styled_methods,
    styles,
    train_counts,
    with_units,
)
from .schema import check_result
from .tables import BASELINE, count_range, shown_in_percent, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["density_figure", "error_figure", "history_figure", "region_figure", "similarity_figure"]

_SHADES = {"many": "#dcdcdc", "medium": "#ededed", "few": "#fafafa", "unseen": "#fdeee6"}
_MOST_BARS = 8  # side by side in one region
_BEFORE, _AFTER = "#D55E00", "#0072B2"


@look()
def density_figure(
    density: LabelDensity,
    weights: np.ndarray | None = None,
    *,
    effective: LabelDensity | None = None,
    label_name: str = "label",
    label_units: str = "1",
) -> Figure:
    """Labels counted per bin as bars, the effective density as a line, and the weight of a label in a panel below.

    Args:
        density: as counted.
        weights: dimensionless: the loss weight of a label in each bin, such as :class:`dir_toolkit.LDS` gives.
        effective: the smoothed density, over the same bins.
    Shape:
        weights: (B,).
    Raises:
        ShapeError: ``weights`` is not one number per bin. ValueError: ``effective`` is over other bins.
    """
    instance(LabelDensity, density=density)
    instance(str, label_name=label_name, label_units=label_units)
    if effective is not None:
        instance(LabelDensity, effective=effective)
    bins = density.bins
    if effective is not None and effective.bins != bins:
        both = f"{effective.bins} and {bins}"
        raise problem("effective must be over the bins of density", got=both)
    if weights is not None:
        weights = checked_row("weights", weights, f"one number per bin, shape ({len(bins)},)", len(bins))
    panels = 1 if weights is None else 2
    figure = new_figure(3.0 if panels == 1 else 4.4)
    axes = [figure.add_subplot(panels, 1, 1)]
    stairs(axes[0], bins.edges, density.counts, "labels counted")
    if effective is not None:
        positive = np.where(effective.counts > 0, effective.counts, np.nan)
        axes[0].plot(bins.centers, positive, color=_AFTER, label="effective density (smoothed)")
    axes[0].set_ylabel("labels per bin\n(log scale)")
    legend(axes[0])
    if weights is not None:
        axes.append(figure.add_subplot(panels, 1, 2, sharex=axes[0]))
        axes[1].axhline(1.0, color=GREY, linewidth=0.8, linestyle="--")
        axes[1].plot(bins.centers, weights, color=_BEFORE)
        axes[1].set_ylabel("weight of a label\n(dimensionless)")
        axes[1].set_ylim(bottom=0)
        axes[0].tick_params(labelbottom=False)
    axes[-1].set_xlabel(with_units(label_name, label_units))
    axes[-1].set_xlim(bins.edges[0], bins.edges[-1])
    return figure


@look()
def error_figure(ds: xr.Dataset, *, window: int | None = None, colors: Colors | None = None) -> Figure:
    """MAE along the label axis for each method, above the training counts, with shaded regions.

    A line is the mean over seeds, and its band is one standard deviation of the seeds either way. Bins hold few test
    samples, so lines are running means over ``window`` bins, each bin weighted by its test samples. The axis says so.
    The constant predictor is a thin line beside other methods, and the axis ends where they end.

    Args:
        ds: a result of regression.
        window: the odd number of bins averaged; 1 shows every bin as measured. None takes 5 if there are 40 bins or
            more, and else 1.
    Raises:
        ValueError: ``window`` is even or below 1, or a color is unknown. ResultsError: ``ds`` is not of regression.
    """
    check_result(ds, "bin_mae", kind="regression")
    window = whole("window", (5 if ds.sizes["bin"] >= 40 else 1) if window is None else window, low=1)
    if window % 2 == 0:
        raise problem("window must be odd, so that it has a middle", got=window)
    figure = new_figure(4.8)
    grid = figure.add_gridspec(2, 1, height_ratios=[2.2, 1])
    top = figure.add_subplot(grid[0])
    axes = [top, figure.add_subplot(grid[1], sharex=top)]
    center = ds["bin_center"].values
    dashes = method_dashes(ds["method"].values.tolist())
    constant: np.ndarray | None = None
    shown = styled_methods(ds, colors)
    for method, color in shown.items():
        part = ds.sel({"method": method})
        curves = [
            _running_mean(part["bin_mae"].sel(seed=seed).values, part["bin_count"].sel(seed=seed).values, window)
            for seed in ds["seed"].values[part["completed"].values == 1]
        ]
        mean, spread = mean_and_spread(np.array(curves))
        if method == BASELINE and len(shown) > 1:
            constant = mean
            continue
        label = method_label(ds, method)
        line_and_band(top, center, mean, spread, color, linestyle=dashes[method], label=label)
    if not top.lines:
        note_no_runs(top)
    units = ds.attrs["label_units"]
    name = "MAE" if window == 1 else f"MAE, mean of {window} bins"
    top.set_ylabel(with_units(name, units) + spread_shown(ds))
    top.set_ylim(bottom=0)
    if constant is not None:
        _constant_line(top, center, constant, shown[BASELINE])
    top.tick_params(labelbottom=False)
    low, high = ds["bin_low"].values, ds["bin_high"].values
    stairs(axes[1], np.append(low, high[-1]), train_counts(ds), None)
    axes[1].set_ylabel("training\nlabels per bin\n(log scale)")
    axes[1].set_xlabel(with_units(ds.attrs["label_name"], units))
    axes[1].set_xlim(low[0], high[-1])
    _shade_regions(figure, axes, low, high, ds["bin_region"].values)
    legend_above(figure, top)
    return figure


@look()
def region_figure(ds: xr.Dataset, *, metric: str | None = None, colors: Colors | None = None) -> Figure:
    """A metric of each method over all and in each region with test samples. Whiskers are one sd over the seeds.

    Up to eight methods are bars side by side. More are rows, with one column per region. The constant predictor would
    dwarf the others. Beside bars it is a thin line with its number, which stands at the top where the line lies beyond
    the axis. It is left out of error rates, and if there are more than eight methods with it.

    Args:
        ds: a result.
        metric: a variable of ``ds`` over ``region``. None takes the MAE, or the balanced error if there is no MAE.
    Raises:
        ValueError: ``ds`` has no such metric, or a color is unknown.
    """
    check_result(ds)
    metric = ("mae" if "mae" in ds else "balanced_error") if metric is None else metric
    if not isinstance(metric, str) or metric not in ds or ds[metric].dims != ("method", "seed", "region"):
        known = sorted(str(name) for name in ds.data_vars if ds[name].dims == ("method", "seed", "region"))
        raise problem(f"metric must be one of {known}", got=repr(metric))
    regions = [r for r in ("all", *REGIONS) if bool((ds["count"].sel(region=r) > 0).any())]
    percent = shown_in_percent(metric)
    bars: list[tuple[str, str, np.ndarray, np.ndarray | None]] = []
    constant: np.ndarray | None = None
    crowded = int(ds["completed"].any("seed").sum()) > _MOST_BARS
    for method, color in styled_methods(ds, colors, baseline=not percent and not crowded).items():
        part = ds.sel({"method": method, "region": regions})
        seeds = int(part["completed"].sum())
        mean, spread = mean_and_spread(part[metric].values[part["completed"].values == 1] * (100 if percent else 1))
        if method == BASELINE and bars:
            constant = mean
        else:
            bars.append((method_label(ds, method), color, mean, spread if seeds > 1 else None))
    name = with_units(title(metric), "%" if percent else ds[metric].attrs["units"])
    ticks = []
    for region in regions:
        samples, bins = (count_range(ds[name].sel(region=region).values) for name in ("count", "bins"))
        ticks.append(f"{region}\n{samples} samples\n{bins} bins")
    if len(bars) > _MOST_BARS:
        return _region_rows(bars, ticks, name + spread_shown(ds).replace("\n", ", "))
    figure = new_figure(3.4)
    axes = figure.add_subplot(1, 1, 1)
    place, width = np.arange(len(regions)), 0.84 / max(1, len(bars))
    for i, (label, color, mean, whisker) in enumerate(bars):
        axes.bar(
            place + (i - (len(bars) - 1) / 2) * width,
            mean,
            width * 0.94,
            color=color,
            zorder=2,
            yerr=whisker,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            label=label,
        )
    if not bars:
        note_no_runs(axes)
    if percent:
        cut_below_zero(axes)
    if constant is not None:
        _constant_steps(axes, constant, styled_methods(ds, colors)[BASELINE])
    axes.set_xticks(place, ticks)
    axes.set_xlabel("region, with its test samples and the bins that hold them")
    axes.set_ylabel(name + spread_shown(ds))
    legend_above(figure, axes)
    return figure


def _constant_line(axes: Axes, center: np.ndarray, mean: np.ndarray, color: str) -> None:
    """The constant predictor as a thin line with its name, as far as it lies within the axis of the other methods."""
    limit = axes.get_ylim()[1]
    axes.plot(center, mean, color=color, linewidth=0.9, linestyle="--", zorder=1, label="_constant")
    axes.set_ylim(0, limit)
    inside = np.flatnonzero(mean <= limit)
    if inside.size:
        last = inside[-1]
        late = center[last] > (center[0] + center[-1]) / 2
        place: dict[str, Any] = {"ha": "right" if late else "left", "va": "top", "textcoords": "offset points"}
        axes.annotate(BASELINE, (center[last], mean[last]), (-7 if late else 7, 0), fontsize=8, color=color, **place)


def _constant_steps(axes: Axes, mean: np.ndarray, color: str) -> None:
    """The constant predictor as a thin line with its number at each region."""
    limit = axes.get_ylim()[1] * 1.08
    axes.set_ylim(0, limit)
    for place, value in enumerate(mean):
        if np.isnan(value):
            continue
        if value <= limit:
            axes.hlines(value, place - 0.45, place + 0.45, color=color, linewidth=0.9, linestyle="--", zorder=3)
        words = f"{BASELINE} {value:.3g}" + " ↑" * bool(value > limit)
        where: dict[str, Any] = {"xytext": (0, 3 if value < 0.94 * limit else -10), "textcoords": "offset points"}
        where["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # it may stand on a bar
        axes.annotate(words, (place + 0.45, min(value, limit)), ha="right", fontsize=7.5, color=color, **where)


def _region_rows(
    bars: Sequence[tuple[str, str, np.ndarray, np.ndarray | None]], titles: Sequence[str], name: str
) -> Figure:
    """Methods down, regions across, one dot for each."""
    figure = new_figure(1.3 + 0.22 * len(bars))
    panels: list[Axes] = []
    row = np.arange(len(bars))
    for j, heading in enumerate(titles):
        first = panels[0] if panels else None
        axes = figure.add_subplot(1, len(titles), j + 1, sharex=first, sharey=first)
        for i, (_, color, mean, whisker) in enumerate(bars):
            error = None if whisker is None else whisker[j]
            axes.errorbar(mean[j], i, xerr=error, fmt="o", markersize=5, color=color, ecolor=INK, elinewidth=1)
        axes.set_title(heading, fontsize=8)  # five stand side by side
        axes.grid(visible=True, axis="both")
        axes.tick_params(labelleft=not panels)
        panels.append(axes)
    panels[0].set_yticks(row, [label for label, *_ in bars])
    panels[0].set_ylim(len(bars) - 0.5, -0.5)
    if panels[0].get_xlim()[0] > 0:
        panels[0].set_xlim(left=0)
    figure.supxlabel(name)
    return figure


@look()
def similarity_figure(
    mean_before: np.ndarray,
    mean_after: np.ndarray,
    bins: Bins,
    *,
    anchor: float,
    variance_before: np.ndarray | None = None,
    variance_after: np.ndarray | None = None,
    label_name: str = "label",
    label_units: str = "1",
) -> Figure:
    """Cosine similarity of the features of one bin to those of every other, before and after smoothing over bins.

    Above, the anchor's bin against all, for feature means and, where given, variances. Below, the means of every bin
    against every other.

    Args:
        mean_before: feature means of each bin. A bin without samples is NaN throughout and stays a gap.
        anchor: a label, in label units, whose bin has samples.
        variance_before: feature variances likewise. Give both or neither.
    Shape:
        the four arrays: (B, D).
    Raises:
        ShapeError: shapes differ, or there is not one row per bin. ValueError: the anchor's bin is empty. LabelError:
        the anchor lies beyond the axis.
    Source:
        Yang et al. 2021, figures 4 and 8 (arXiv:2102.09554).
    """
    if (variance_before is None) != (variance_after is None):
        raise problem("variance_before and variance_after must be given both or neither", got="one of them")
    pairs = {"feature means": (mean_before, mean_after)}
    if variance_before is not None and variance_after is not None:
        pairs["feature variances"] = (variance_before, variance_after)
    instance(Bins, bins=bins)
    instance(str, label_name=label_name, label_units=label_units)
    anchor_bin = int(bins.index([number("anchor", anchor)], name="anchor")[0])
    tables = {}
    for name, pair in pairs.items():
        before, after = (labels_array(values, name).astype(np.float64) for values in pair)
        if before.shape != after.shape or before.ndim != 2 or len(before) != len(bins):
            raise problem(
                f"{name} must have the shape ({len(bins)}, D), before and after alike",
                got=f"{before.shape} and {after.shape}",
                error=ShapeError,
            )
        tables[name] = (_cosines(before), _cosines(after))
        if np.isnan(tables[name][0][anchor_bin, anchor_bin]):
            raise problem(f"anchor must lie in a bin that has {name}", got=f"{anchor:g}, whose bin is empty")
    figure = new_figure(5.6)
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1.25])
    upper, lower = grid[0].subgridspec(1, len(tables)), grid[1].subgridspec(1, 2)
    lines: list[Axes] = []
    for i, (name, (before, after)) in enumerate(tables.items()):
        axes = figure.add_subplot(upper[i], sharey=lines[0] if lines else None)
        axes.axvline(bins.centers[anchor_bin], color=GREY, linewidth=0.8, linestyle="--")
        axes.plot(bins.centers, before[anchor_bin], color=_BEFORE, label="before smoothing")
        axes.plot(bins.centers, after[anchor_bin], color=_AFTER, label="after smoothing")
        axes.set_title(literal(f"{name}, against {label_name} {anchor:g}"))
        axes.set_xlabel(with_units(label_name, label_units))
        axes.set_xlim(bins.edges[0], bins.edges[-1])
        lines.append(axes)
    lines[0].set_ylabel("cosine similarity\n(dimensionless)")
    legend(lines[0], loc="best")
    before, after = tables["feature means"]
    least = float(np.nanmin([before, after]))
    maps: list[Axes] = []
    for i, (name, values) in enumerate((("before smoothing", before), ("after smoothing", after))):
        axes = figure.add_subplot(lower[i])
        # The image draws all bins equally wide. If they are not, the axis has their numbers in place of labels.
        even = np.allclose(np.diff(bins.edges), bins.edges[1] - bins.edges[0])
        span = (bins.edges[0], bins.edges[-1]) if even else (-0.5, len(bins) - 0.5)
        image = axes.imshow(
            values, origin="lower", extent=(*span, *span), vmin=least, vmax=1, cmap="cividis", interpolation="nearest"
        )
        axes.set_facecolor(FAINT)
        axes.set_title(f"feature means, {name}")
        axes.set_xlabel(with_units(label_name, label_units) if even else "bin")
        axes.set_ylabel(with_units(label_name, label_units) if even else "bin")
        maps.append(axes)
    color_scale(figure, image, "cosine similarity (dimensionless)", ax=maps, shrink=0.9)
    no_frame(*maps)
    return figure


@look()
def history_figure(
    histories: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    *,
    label_units: str = "1",
    loss: str = "loss",
    metric: str = "val_bmae",
    metric_name: str = "validation bMAE",
    percent: bool = False,
    colors: Colors | None = None,
) -> Figure:
    """Training loss and a validation metric by epoch, one line per run. Runs of one method share a colour.

    Args:
        histories: by (method, seed), rows with an ``epoch``, as read from ``history.csv``. Numbers may still be text,
            and an empty or missing one is a gap.
        loss: the column of the training loss. Each method has its own loss, so their heights cannot be compared.
        metric: the column of the metric, in label units.
        percent: whether the metric is a share, such as an error rate, which is shown in percent.
    Raises:
        ValueError: no row of any run has the column, or a color is unknown.
    """
    instance(Mapping, histories=histories)
    for key in histories:
        if not isinstance(key, tuple) or len(key) != 2 or not isinstance(key[0], str):
            raise problem("histories must be given by (method, seed)", got=repr(key), error=TypeError)
    instance(str, label_units=label_units, metric_name=metric_name)
    for column in (loss, metric):
        if not any(column in row for rows in histories.values() for row in rows):
            columns = sorted({name for rows in histories.values() for row in rows for name in row})
            raise problem(
                "histories must have the columns asked for", got=f"no {column!r}", fix=f"Columns are {columns}."
            )
    known, dashes = styles((method for method, _ in histories), colors)
    figure = new_figure(3.2)
    axes = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    named = set()
    for (method, _), rows in histories.items():
        epoch = [_number(row.get("epoch")) for row in rows]
        label = None if method in named else literal(method)
        named.add(method)
        for panel, column in zip(axes, (loss, metric), strict=True):
            scale = 100 if percent and column == metric else 1
            values = [_number(row.get(column)) * scale for row in rows]
            marker = "o" if len(rows) == 1 else None
            style: dict[str, Any] = {"color": known[method], "linestyle": dashes[method], "linewidth": 1.2}
            panel.plot(epoch, values, marker=marker, label=label, alpha=0.85, **style)
    axes[0].set_ylabel("training loss, each method's own")
    axes[1].set_ylabel(with_units(metric_name, "%" if percent else label_units))
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.locator_params(axis="x", integer=True)
    legend_above(figure, axes[0])
    return figure


def _shade_regions(
    figure: Figure, panels: Sequence[Axes], low: np.ndarray, high: np.ndarray, regions: np.ndarray
) -> None:
    """Shade the bins of each region, and say below the panels what the shades mean."""
    starts = [0, *(np.flatnonzero(regions[1:] != regions[:-1]) + 1), len(regions)]
    for first, last in pairwise(starts):
        for axes in panels:
            axes.axvspan(low[first], high[last - 1], facecolor=_SHADES[str(regions[first])], edgecolor="none", zorder=0)
    from matplotlib.patches import Patch

    present = [region for region in REGIONS if region in regions]
    patches = [Patch(facecolor=_SHADES[region], edgecolor=GREY, linewidth=0.5) for region in present]
    names = [f"region: {region}" for region in present]
    figure.legend(patches, names, loc="outside lower center", ncols=4, frameon=False)


def _number(value: object) -> float:
    return float("nan") if value in (None, "") else float(value)  # type: ignore[arg-type]


def _running_mean(mean: np.ndarray, count: np.ndarray, window: int) -> np.ndarray:
    """Means over ``window`` bins weighted by samples, and NaN for a bin without samples of its own."""
    kernel = np.ones(window)
    total = np.convolve(np.where(count > 0, mean, 0.0) * count, kernel, mode="full")[window // 2 :][: len(mean)]
    samples = np.convolve(count, kernel, mode="full")[window // 2 :][: len(mean)]
    return np.divide(total, samples, out=np.full(len(mean), np.nan), where=count > 0)


def _cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine similarity of every row to every other, (B, B), and NaN for rows with NaN or of length zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.full(rows.shape, np.nan), where=length > 0)
    return unit @ unit.T
