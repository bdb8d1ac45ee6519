"""Pictures of label densities, errors, features and training; a ``matplotlib`` ``Figure`` each, never pyplot.

matplotlib is imported where a figure is made, so that a result can be read and written without it. Nothing global of it
is touched, but while :func:`figure_svg` writes.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from .._checks import instance, labels_array, number, problem, whole
from ..errors import ShapeError
from ..files import write_atomically
from ..labels.bins import Bins
from ..labels.density import REGIONS, LabelDensity
from .schema import validate_results
from .tables import BASELINE, count_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "density_figure",
    "error_figure",
    "figure_svg",
    "figure_to_tensorboard",
    "history_figure",
    "method_colors",
    "region_figure",
    "save_figure",
    "similarity_figure",
]

# For the colour-blind too: Okabe and Ito's colours without the faint yellow and the black, then four of Paul Tol's.
_PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip
_INK, _FAINT, _GREY = "#222222", "#d9d9d9", "#777777"
_SHADES = {"many": "#dcdcdc", "medium": "#ededed", "few": "#fafafa", "unseen": "#fdeee6"}
_BEFORE, _AFTER = "#D55E00", "#0072B2"
_WIDTH = 7.0  # inches: 700 pixels at matplotlib's 100 dots an inch

Colors = Mapping[str, str]


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """One colour a method by its place in the order, and grey for the constant predictor.

    Hand the same answer to every figure, and a method looks alike in all of them; one that it does not name takes the
    colour it would have had without.
    """
    names = [method for method in dict.fromkeys(methods) if method != BASELINE]
    return {**{m: _PALETTE[i % len(_PALETTE)] for i, m in enumerate(names)}, BASELINE: _GREY}


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
        weights: dimensionless: the loss weight of a label in each bin, such as ``lds(bins.centers)``.
        effective: the smoothed density, over the same bins.
    Shape:
        weights: (B,).
    Raises:
        ShapeError: ``weights`` is not one number a bin. ValueError: ``effective`` is over other bins.
    """
    instance("density_figure", LabelDensity, density=density)
    if effective is not None:
        instance("density_figure", LabelDensity, effective=effective)
    bins = density.bins
    if effective is not None and effective.bins != bins:
        both = f"{effective.bins} and {bins}"
        raise problem("density_figure", "effective must be over the bins of density", got=both)
    if weights is not None:
        weights = _row("density_figure", "weights", weights, len(bins))
    panels = 1 if weights is None else 2
    figure = _figure(3.0 if panels == 1 else 4.4)
    axes = [figure.add_subplot(panels, 1, 1)]
    _stairs(axes[0], bins.edges, density.counts, "labels counted")
    if effective is not None:
        positive = np.where(effective.counts > 0, effective.counts, np.nan)
        axes[0].plot(bins.centers, positive, color=_AFTER, label="effective density (smoothed)")
    axes[0].set_ylabel("labels per bin\n(log scale)")
    _legend(axes[0])
    if weights is not None:
        axes.append(figure.add_subplot(panels, 1, 2, sharex=axes[0]))
        axes[1].axhline(1.0, color=_GREY, linewidth=0.8, linestyle="--")
        axes[1].plot(bins.centers, weights, color=_BEFORE)
        axes[1].set_ylabel("weight of a label\n(dimensionless)")
        axes[1].set_ylim(bottom=0)
        axes[0].tick_params(labelbottom=False)
    axes[-1].set_xlabel(_with_units(label_name, label_units))
    axes[-1].set_xlim(bins.edges[0], bins.edges[-1])
    return _dressed(figure, axes)


def error_figure(ds: xr.Dataset, *, window: int | None = None, colors: Colors | None = None) -> Figure:
    """MAE along the label axis for each method, above the training counts; regions are shaded.

    A line is the mean over seeds, its band one standard deviation of the seeds either way. Bins hold few test samples,
    so lines are running means over ``window`` bins, each bin weighted by its test samples, and the axis says so.

    Args:
        ds: a result of the schema in ``results.schema``.
        window: number of bins averaged, odd; 1 shows every bin as measured. None means 5 where there are 40 bins or
            more, and 1 else.
    Raises:
        ValueError: ``window`` is even or below 1. ResultsError: ``ds`` breaks the schema.
    """
    where = "error_figure"
    validate_results(ds)
    window = whole(where, "window", (5 if ds.sizes["bin"] >= 40 else 1) if window is None else window, low=1)
    if window % 2 == 0:
        raise problem(where, "window must be odd, so that it has a middle", got=window)
    figure = _figure(4.8)
    grid = figure.add_gridspec(2, 1, height_ratios=[2.2, 1])
    top = figure.add_subplot(grid[0])
    axes = [top, figure.add_subplot(grid[1], sharex=top)]
    center = ds["bin_center"].values
    for method, color in _methods(ds, colors).items():
        part = ds.sel({"method": method})
        curves = [
            _running_mean(part["bin_mae"].sel(seed=seed).values, part["bin_count"].sel(seed=seed).values, window)
            for seed in ds["seed"].values[part["completed"].values == 1]
        ]
        mean, spread = _mean_and_spread(np.array(curves))
        style = "--" if method == BASELINE else "-"
        top.plot(center, mean, color=color, linestyle=style, label=_literal(f"{method} ({_seeds(len(curves))})"))
        if len(curves) > 1:
            top.fill_between(center, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)
    units = ds.attrs["label_units"]
    name = "MAE" if window == 1 else f"MAE, mean of {window} bins"
    top.set_ylabel(_with_units(name, units) + _spread_shown(ds))
    top.set_ylim(bottom=0)
    top.tick_params(labelbottom=False)
    low, high = ds["bin_low"].values, ds["bin_high"].values
    train = ds["train_count"].where(ds["completed"] == 1).mean(("method", "seed")).values
    _stairs(axes[1], np.append(low, high[-1]), train, None)
    axes[1].set_ylabel("training\nlabels per bin\n(log scale)")
    axes[1].set_xlabel(_with_units(ds.attrs["label_name"], units))
    axes[1].set_xlim(low[0], high[-1])
    _shade_regions(figure, axes, low, high, ds["bin_region"].values)
    _legend_above(figure, top)
    return _dressed(figure, axes)


def region_figure(ds: xr.Dataset, *, colors: Colors | None = None) -> Figure:
    """MAE of each method over all and in each region with test samples; whiskers are one standard deviation of seeds.

    Args:
        ds: a result of the schema in ``results.schema``.
    Raises:
        ResultsError: ``ds`` breaks the schema.
    """
    validate_results(ds)
    regions = [r for r in ("all", *REGIONS) if bool((ds["count"].sel(region=r) > 0).any())]
    styles = _methods(ds, colors)
    figure = _figure(3.4)
    axes = figure.add_subplot(1, 1, 1)
    place, width = np.arange(len(regions)), 0.84 / max(1, len(styles))
    for i, (method, color) in enumerate(styles.items()):
        part = ds.sel({"method": method, "region": regions})
        seeds = int(part["completed"].sum())
        mean, spread = _mean_and_spread(part["mae"].values[part["completed"].values == 1])
        axes.bar(
            place + (i - (len(styles) - 1) / 2) * width,
            mean,
            width * 0.94,
            color=color,
            zorder=2,
            yerr=spread if seeds > 1 else None,
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
            label=_literal(f"{method} ({_seeds(seeds)})"),
        )
    ticks = []
    for region in regions:
        samples, bins = (count_range(ds[name].sel(region=region).values) for name in ("count", "bins"))
        ticks.append(f"{region}\n{samples} samples\n{bins} bins")
    axes.set_xticks(place, ticks)
    axes.set_xlabel("region, with its test samples and the bins that hold them")
    axes.set_ylabel(_with_units("MAE", ds.attrs["label_units"]) + _spread_shown(ds))
    _legend_above(figure, axes)
    return _dressed(figure, [axes])


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
        mean_before: feature means of each bin; a bin without samples is NaN throughout and stays a gap.
        anchor: a label, in label units; its bin must have samples.
        variance_before: feature variances likewise; give both or neither.
    Shape:
        the four arrays: (B, D).
    Raises:
        ShapeError: shapes differ, or there is not one row a bin. ValueError: the anchor's bin is empty. LabelError: the
        anchor lies beyond the axis.
    Source:
        Yang et al. 2021, figures 4 and 8 (arXiv:2102.09554).
    """
    where = "similarity_figure"
    if (variance_before is None) != (variance_after is None):
        raise problem(where, "variance_before and variance_after must be given both or neither", got="one of them")
    pairs = {"feature means": (mean_before, mean_after)}
    if variance_before is not None and variance_after is not None:
        pairs["feature variances"] = (variance_before, variance_after)
    instance(where, Bins, bins=bins)
    at = int(bins._place(where, [number(where, "anchor", anchor)], "raise", "anchor")[0])
    tables = {}
    for name, pair in pairs.items():
        before, after = (labels_array(where, values, name).astype(np.float64) for values in pair)
        if before.shape != after.shape or before.ndim != 2 or len(before) != len(bins):
            raise problem(
                where,
                f"{name} must have the shape ({len(bins)}, D), before and after alike",
                got=f"{before.shape} and {after.shape}",
                error=ShapeError,
            )
        tables[name] = (_cosines(before), _cosines(after))
        if np.isnan(tables[name][0][at, at]):
            raise problem(where, f"anchor must lie in a bin that has {name}", got=f"{anchor:g}, whose bin is empty")
    figure = _figure(5.6)
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1.25])
    upper, lower = grid[0].subgridspec(1, len(tables)), grid[1].subgridspec(1, 2)
    lines: list[Axes] = []
    for i, (name, (before, after)) in enumerate(tables.items()):
        axes = figure.add_subplot(upper[i], sharey=lines[0] if lines else None)
        axes.axvline(bins.centers[at], color=_GREY, linewidth=0.8, linestyle="--")
        axes.plot(bins.centers, before[at], color=_BEFORE, label="before smoothing")
        axes.plot(bins.centers, after[at], color=_AFTER, label="after smoothing")
        axes.set_title(_literal(f"{name}, against {label_name} {anchor:g}"))
        axes.set_xlabel(_with_units(label_name, label_units))
        axes.set_xlim(bins.edges[0], bins.edges[-1])
        lines.append(axes)
    lines[0].set_ylabel("cosine similarity\n(dimensionless)")
    _legend(lines[0], loc="best")
    before, after = tables["feature means"]
    least = float(np.nanmin([before, after]))
    maps: list[Axes] = []
    for i, (name, values) in enumerate((("before smoothing", before), ("after smoothing", after))):
        axes = figure.add_subplot(lower[i])
        # Bins are drawn one wide each; where they are not, as labels run, the axis is numbered by bin.
        even = np.allclose(np.diff(bins.edges), bins.edges[1] - bins.edges[0])
        span = (bins.edges[0], bins.edges[-1]) if even else (-0.5, len(bins) - 0.5)
        image = axes.imshow(
            values, origin="lower", extent=(*span, *span), vmin=least, vmax=1, cmap="cividis", interpolation="nearest"
        )
        axes.set_facecolor(_FAINT)
        axes.set_title(f"feature means, {name}")
        axes.set_xlabel(_with_units(label_name, label_units) if even else "bin")
        axes.set_ylabel(_with_units(label_name, label_units) if even else "bin")
        maps.append(axes)
    bar = figure.colorbar(image, ax=maps, shrink=0.9)
    bar.set_label("cosine similarity (dimensionless)", color=_INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=_INK)
    bar.outline.set_visible(False)
    _dressed(figure, lines)
    return _dressed(figure, maps, grid=False)


def history_figure(
    histories: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    *,
    label_units: str = "1",
    loss: str = "train/loss",
    metric: str = "val/bmae",
    metric_name: str = "validation bMAE",
    colors: Colors | None = None,
) -> Figure:
    """Training loss and a validation metric by epoch, a line a run; runs of one method share a colour.

    Args:
        histories: by (method, seed): rows with an ``epoch``, as read from ``history.csv``; numbers may still be text,
            and an empty or missing one is a gap.
        loss: the column of the training loss. It is the one each method trains on, so that heights do not compare.
        metric: the column of the metric, in label units.
    Raises:
        ValueError: no row of any run has the column.
    """
    for column in (loss, metric):
        if not any(column in row for rows in histories.values() for row in rows):
            known = sorted({name for rows in histories.values() for row in rows for name in row})
            raise problem(
                "history_figure",
                "histories must have the columns asked for",
                got=f"no {column!r}",
                fix=f"Columns are {known}.",
            )
    colors = {**method_colors(method for method, _ in histories), **(colors or {})}
    figure = _figure(3.2)
    axes = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    named = set()
    for (method, _), rows in histories.items():
        epoch = [_number(row.get("epoch")) for row in rows]
        label = None if method in named else _literal(method)
        named.add(method)
        for panel, column in zip(axes, (loss, metric), strict=True):
            values = [_number(row.get(column)) for row in rows]
            marker = "o" if len(rows) == 1 else None
            panel.plot(epoch, values, color=colors[method], linewidth=1.2, alpha=0.85, marker=marker, label=label)
    axes[0].set_ylabel("training loss, each method's own")
    axes[1].set_ylabel(_with_units(metric_name, label_units))
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.locator_params(axis="x", integer=True)
    _legend_above(figure, axes[0])
    return _dressed(figure, axes)


def figure_svg(figure: Figure, *, name: str = "figure") -> str:
    """A figure as one ``<svg>`` element: text stays text, nothing is fetched, and equal figures give equal bytes.

    Args:
        name: put before every id in it, so that several can stand in one page; letters, digits and dashes.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Only tags are looked at: a label may well read id="x".
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0]), text)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> None:
    """Write a figure as its ending says (``.svg``, ``.png``, ``.pdf``), whole or not at all."""
    kind = Path(path).suffix[1:].lower()
    if kind == "svg":
        content = figure_svg(figure).encode()
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi)
        content = buffer.getvalue()
    write_atomically(path, lambda file: file.write(content))


def figure_to_tensorboard(writer: Any, tag: str, figure: Figure, step: int) -> None:
    """Add a figure to TensorBoard as an image, without pyplot, which ``SummaryWriter.add_figure`` would bring in.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # (H, W, 3)
    writer.add_image(tag, pixels, step, dataformats="HWC")


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise problem(
            "dir_toolkit.results.figures",
            "matplotlib must be installed",
            got="no such package",
            fix='pip install "dir_toolkit[recipes]"',
            error=ImportError,
        ) from error
    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _dressed(figure: Figure, panels: Sequence[Axes], *, grid: bool = True) -> Figure:
    """One look for every panel, set on the panel itself, since matplotlib's defaults belong to the user."""
    for axes in panels:
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom") and grid)
            spine.set_color(_GREY)
        axes.tick_params(labelsize=9, labelcolor=_INK, color=_GREY)
        axes.xaxis.label.set(fontsize=10, color=_INK)
        axes.yaxis.label.set(fontsize=10, color=_INK)
        axes.title.set(fontsize=10, color=_INK)
        axes.set_axisbelow(True)
        if grid:
            axes.grid(visible=True, axis="y", color=_FAINT, linewidth=0.6)
    return figure


def _legend(axes: Axes, loc: Literal["best", "upper right"] = "upper right") -> None:
    axes.legend(loc=loc, fontsize=9, labelcolor=_INK, frameon=True, framealpha=0.85, edgecolor="none")


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(len(labels), int(100 / (longest + 7))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9, labelcolor=_INK, frameon=False)


def _stairs(axes: Axes, edges: np.ndarray, counts: np.ndarray, label: str | None) -> None:
    """Counts as touching bars on a log scale that starts below one, so that a bin with a single label is seen."""
    floor = 0.6
    axes.set_yscale("log")
    axes.stairs(np.maximum(counts, floor), edges, baseline=floor, fill=True, color="#8c8c8c", label=label, zorder=2)
    axes.set_ylim(floor, max(10.0, 2 * float(counts.max())))


def _shade_regions(
    figure: Figure, panels: Sequence[Axes], low: np.ndarray, high: np.ndarray, regions: np.ndarray
) -> None:
    """A shade behind each run of bins of one region, and what the shades mean below the panels."""
    starts = [0, *(np.flatnonzero(regions[1:] != regions[:-1]) + 1), len(regions)]
    for first, last in pairwise(starts):
        for axes in panels:
            axes.axvspan(low[first], high[last - 1], facecolor=_SHADES[str(regions[first])], edgecolor="none", zorder=0)
    from matplotlib.patches import Patch

    present = [region for region in REGIONS if region in regions]
    patches = [Patch(facecolor=_SHADES[region], edgecolor=_GREY, linewidth=0.5) for region in present]
    names = [f"region: {region}" for region in present]
    figure.legend(patches, names, loc="outside lower center", ncols=4, fontsize=9, labelcolor=_INK, frameon=False)


def _methods(ds: xr.Dataset, colors: Colors | None) -> dict[str, str]:
    """Colours of the methods that have a completed run, the constant predictor last."""
    names = ds["method"].values.tolist()
    colors = {**method_colors(names), **(colors or {})}
    done = ds["completed"].any("seed").values
    present = [name for name, finished in zip(names, done, strict=True) if finished]
    return {name: colors[name] for name in sorted(present, key=lambda name: name == BASELINE)}


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _spread_shown(ds: xr.Dataset) -> str:
    return "\nmean ± sd over seeds" if bool((ds["completed"].sum("seed") > 1).any()) else ""


def _with_units(name: str, units: str) -> str:
    return _literal(f"{name} ({'dimensionless' if units == '1' else units})")


def _literal(text: str) -> str:
    """Text from outside, in which a dollar sign is no formula."""
    return text.replace("$", r"\$")


def _row(where: str, name: str, values: np.ndarray, size: int) -> np.ndarray:
    values = labels_array(where, values, name).astype(np.float64)
    if values.shape != (size,):
        raise problem(where, f"{name} must have one number a bin, shape ({size},)", got=values.shape, error=ShapeError)
    return values


def _number(value: object) -> float:
    return float("nan") if value in (None, "") else float(value)  # type: ignore[arg-type]


def _running_mean(mean: np.ndarray, count: np.ndarray, window: int) -> np.ndarray:
    """Means over ``window`` bins weighted by samples; NaN for a bin without samples of its own."""
    kernel = np.ones(window)
    total = np.convolve(np.where(count > 0, mean, 0.0) * count, kernel, mode="full")[window // 2 :][: len(mean)]
    samples = np.convolve(count, kernel, mode="full")[window // 2 :][: len(mean)]
    return np.divide(total, samples, out=np.full(len(mean), np.nan), where=count > 0)


def _mean_and_spread(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1) over the first axis, of the rows that have a value; NaN where none has."""
    known = np.isfinite(rows)
    number = known.sum(0)
    nan = np.full(rows.shape[1:], np.nan)
    mean = np.divide(np.where(known, rows, 0).sum(0), number, out=nan.copy(), where=number > 0)
    squares = (np.where(known, rows - mean, 0) ** 2).sum(0)
    return mean, np.sqrt(np.divide(squares, number - 1, out=nan.copy(), where=number > 1))


def _cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine similarity of every row to every other, (B, B); NaN for rows with NaN or of length zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.full(rows.shape, np.nan), where=length > 0)
    return unit @ unit.T
