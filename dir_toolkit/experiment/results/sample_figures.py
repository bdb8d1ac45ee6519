"""Figures of single test samples: predicted against true labels, and a few examples with their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..._checks import instance, problem
from ...errors import ResultsError, ShapeError
from ...labels.bins import Bins
from .drawing import (
    INK,
    Colors,
    legend_above,
    literal,
    look,
    new_figure,
    no_frame,
    note_no_runs,
    styled_methods,
    with_units,
)
from .schema import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["example_samples", "examples_figure", "prediction_figure"]

_ACROSS = 3  # panels side by side
_STRETCHES = 12  # of the labels, for the line of means
_LEAST = 5  # samples behind one point of that line
_EACH = 3  # examples of rare labels, and as many of common ones


@look(grid="both")
def prediction_figure(ds: xr.Dataset, *, colors: Colors | None = None) -> Figure:
    """Predicted against true labels, one panel per method, of the first seed that it completed.

    A dot is a test sample. Without errors all would lie on the thin diagonal. The dark line is the mean prediction in
    twelve equal stretches of the true label: where it is flatter than the diagonal, predictions are drawn to common
    labels. The constant predictor is left out.

    Args:
        ds: a result of regression that holds predictions.
    Raises:
        ResultsError: ``ds`` holds no predictions. ValueError: a color is unknown.
    """
    rows = list(_first_runs(ds, colors))
    target = ds["target"].values
    stretches = np.linspace(target.min(), target.max(), _STRETCHES + 1)
    place = np.clip(np.digitize(target, stretches) - 1, 0, _STRETCHES - 1)
    count = np.bincount(place, minlength=_STRETCHES)
    high = -(-max(1, len(rows)) // _ACROSS)
    across = min(_ACROSS, max(1, len(rows)))
    figure = new_figure(0.6 + 2.3 * high)
    first: Axes | None = None
    for i, (method, color, run) in enumerate(rows):
        axes = figure.add_subplot(high, across, i + 1, sharex=first, sharey=first)
        first = axes if first is None else first
        pred = run["prediction"].values
        axes.axline((float(target.mean()),) * 2, slope=1, color=INK, linewidth=0.7, zorder=1)
        axes.scatter(target, pred, s=6, color=color, alpha=0.35, linewidths=0, rasterized=True, zorder=2)
        sums = np.bincount(place, pred, minlength=_STRETCHES)
        mean = np.divide(sums, count, out=np.full(_STRETCHES, np.nan), where=count >= _LEAST)
        axes.plot((stretches[1:] + stretches[:-1]) / 2, mean, color=INK, linewidth=1.6, zorder=3)
        axes.set_title(literal(method))
        axes.tick_params(labelleft=i % _ACROSS == 0, labelbottom=i + across >= len(rows))
    if first is None:
        note_no_runs(figure.add_subplot(1, 1, 1))
    name = with_units(ds.attrs["label_name"], ds.attrs["label_units"])
    figure.supxlabel(f"true {name}")
    figure.supylabel(f"predicted {name}", fontsize=10)
    return figure


def example_samples(ds: xr.Dataset) -> np.ndarray:
    """The test samples that :func:`examples_figure` shows, chosen by their labels alone, whatever was predicted.

    They are of the rarest region and of the most common one that have test samples, leaving bins without training
    labels aside. In each region, its samples are put in the order of their labels, and those at one, three and five
    sixths are taken.

    Args:
        ds: a result of regression that holds predictions.
    Shape:
        (n,) int64 positions along ``sample``, the rare ones first, n at most six.
    """
    check_result(ds, "prediction", kind="regression that holds predictions")
    target = ds["target"].values
    edges = np.append(ds["bin_low"].values, ds["bin_high"].values[-1])
    region_of = ds["bin_region"].values[Bins.from_edges(edges).index(target)]
    tested = [region for region in ("few", "medium", "many") if region in region_of]
    chosen = []
    for region in dict.fromkeys([*tested[:1], *tested[-1:]]):
        members = np.flatnonzero(region_of == region)
        members = members[np.argsort(target[members], kind="stable")]
        ranks = (np.arange(_EACH) * 2 + 1) * len(members) // (2 * _EACH)
        chosen.append(members[np.unique(ranks)])
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


@look()
def examples_figure(ds: xr.Dataset, images: np.ndarray | None = None, *, colors: Colors | None = None) -> Figure:
    """A few test samples with rare labels and a few with common ones: the truth, and what each method said of them.

    A dark line is the true label, and a dot the prediction of the first seed that a method completed. Whiskers are its
    interval, where the method gives one. :func:`example_samples` says which samples are shown.

    Args:
        ds: a result of regression that holds predictions.
        images: a picture of each example, which stands above it.
    Shape:
        images: (n, C, H, W) uint8 for n examples, with C 1 or 3.
    Raises:
        ResultsError: ``ds`` holds no predictions, or no test sample has a label that was trained. ShapeError:
        ``images`` is not one picture per example. ValueError: a color is unknown.
    """
    rows = list(_first_runs(ds, colors))
    chosen = example_samples(ds)
    if not chosen.size:
        raise problem("ds must hold test samples of trained labels", got="none", error=ResultsError)
    figure = new_figure(3.2)
    if images is None:
        axes = figure.add_subplot(1, 1, 1)
    else:
        instance(np.ndarray, images=images)
        if images.ndim != 4 or len(images) != len(chosen) or images.shape[1] not in (1, 3):
            rule = f"one picture (1 or 3, H, W) per example, {len(chosen)} of them"
            raise problem(f"images must be {rule}", got=images.shape, error=ShapeError)
        figure.set_figheight(4.4)
        grid = figure.add_gridspec(2, len(chosen), height_ratios=[1, 2.4])
        for i, image in enumerate(images):
            panel = figure.add_subplot(grid[0, i])
            panel.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            no_frame(panel)
        axes = figure.add_subplot(grid[1, :])
    target = ds["target"].values[chosen]
    place = np.arange(len(chosen))
    truth = "true " + ds.attrs["label_name"]
    axes.hlines(target, place - 0.42, place + 0.42, color=INK, linewidth=1.6, label=literal(truth), zorder=2)
    step = 0.6 / max(1, len(rows))
    level = None
    for i, (method, color, run) in enumerate(rows):
        pred = run["prediction"].values[chosen]
        ends = None
        if "lower" in run and bool(run["lower"].notnull().all()):
            level = run["lower"].attrs["interval_level"]
            ends = np.abs([run[side].values[chosen] - pred for side in ("lower", "upper")])
        x = place + (i - (len(rows) - 1) / 2) * step
        marks: dict[str, Any] = {"fmt": "o", "markersize": 5, "elinewidth": 1.2, "capsize": 2, "zorder": 3}
        axes.errorbar(x, pred, yerr=ends, color=color, label=literal(method), **marks)
    edges = np.append(ds["bin_low"].values, ds["bin_high"].values[-1])
    region_of = ds["bin_region"].values[Bins.from_edges(edges).index(target)]
    axes.set_xticks(place, [f"{region}: {label:.4g}" for region, label in zip(region_of, target, strict=True)])
    axes.set_xlim(-0.5, len(chosen) - 0.5)
    axes.set_xlabel(literal(f"region and true {ds.attrs['label_name']}"))
    said = "" if level is None else f"\nwhiskers: {100 * level:g} % interval"
    axes.set_ylabel(with_units(ds.attrs["label_name"], ds.attrs["label_units"]) + said)
    legend_above(figure, axes)
    return figure


def _first_runs(ds: xr.Dataset, colors: Colors | None) -> Iterator[tuple[str, str, xr.Dataset]]:
    """Each method that has predictions, its colour, and its first run with them, without the constant predictor."""
    check_result(ds, "prediction", kind="regression that holds predictions")
    for method, color in styled_methods(ds, colors, baseline=False).items():
        part = ds.sel({"method": method})
        known = np.flatnonzero(part["prediction"].notnull().all("sample").values)
        if known.size:
            yield method, color, part.isel(seed=known[0])
