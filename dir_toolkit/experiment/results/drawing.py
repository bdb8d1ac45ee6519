"""The common parts of all figures: style, one colour per method, checks, and saving.

Each figure function returns a ``matplotlib`` ``Figure`` and never uses pyplot. matplotlib is imported when a figure is
made, so that a result can be read and written without it. Its defaults belong to the user and change only while a
figure is being made or saved.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr
from PIL import Image

from ..._checks import instance, labels_array, missing_package, problem
from ..._files import write_atomically
from ...errors import ShapeError
from .tables import BASELINE

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_svg", "figure_to_tensorboard", "method_colors", "save_figure"]

# For the colour-blind too: Okabe and Ito's colours without the faint yellow and the black, then four of Paul Tol's.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
INK, FAINT, GREY = "#222222", "#d9d9d9", "#777777"
_LOOK: dict[Any, object] = {
    "text.color": INK,
    "figure.facecolor": "white",
    "figure.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 9,
    "xtick.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.labelsize": 9,
    "ytick.labelcolor": INK,
    "ytick.color": GREY,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
}
_WIDTH = 7.0  # inches: 700 pixels at matplotlib's 100 dots per inch
_LEGEND_ROW = 0.2  # inches
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
SPREAD = "mean ± sd over seeds"

Colors = Mapping[str, str]


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """One colour per method, by its place in the order, and grey for the constant predictor.

    Pass the same dict to every figure and each method keeps its colour. A method that the dict lacks gets the colour it
    would have without it.
    """
    names = [method for method in dict.fromkeys(methods) if method != BASELINE]
    return {**{m: PALETTE[i % len(PALETTE)] for i, m in enumerate(names)}, BASELINE: GREY}


def method_dashes(methods: Iterable[str]) -> dict[str, str]:
    """Solid lines, dotted ones once the colours repeat, and dashes for the constant predictor."""
    names = [method for method in dict.fromkeys(methods) if method != BASELINE]
    return {**{m: ("-", ":", "-.")[i // len(PALETTE) % 3] for i, m in enumerate(names)}, BASELINE: "--"}


def figure_svg(figure: Figure, *, name: str = "figure") -> str:
    """A figure as one ``<svg>`` element. Text stays text, nothing is fetched, and equal figures give equal bytes.

    Args:
        name: letters, digits and dashes that are put before every id, so that several figures can stand in one page.
    """
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        text = _saved(figure, "svg", dpi=200, metadata=metadata).decode()
    text = _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text[text.index("<svg") :])
    # Only tags are changed: the text of a label may contain id="x".
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0]), text)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> None:
    """Write a figure atomically, in the format of its suffix (``.svg``, ``.png``, ``.pdf``)."""
    kind = Path(path).suffix[1:].lower()
    content = figure_svg(figure).encode() if kind == "svg" else _saved(figure, kind, dpi=dpi)
    write_atomically(path, lambda file: file.write(content))


def _saved(figure: Figure, kind: str, *, dpi: int, **options: Any) -> bytes:
    """What ``savefig`` writes, which by itself draws a figure once more than is needed to lay it out."""
    from matplotlib import rc_context
    from matplotlib.backend_bases import get_registered_canvas_class

    buffer, engine, own_dpi = io.BytesIO(), figure.get_layout_engine(), figure.dpi
    canvas = get_registered_canvas_class(kind)  # None for a format that savefig refuses
    try:
        if engine is not None and canvas is not None:
            canvas(figure)  # Text is as wide as this canvas draws it.
            figure.dpi = dpi
            engine.execute(figure)
            with rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
                figure.set_layout_engine(None)
        figure.savefig(buffer, format=kind, dpi=dpi, **options)
    finally:
        figure.dpi = own_dpi
        figure.set_layout_engine(engine)
    return buffer.getvalue()


def figure_to_tensorboard(writer: Any, tag: str, path: Path, step: int) -> None:
    """Add a figure that was saved as PNG to TensorBoard, at half its size, without drawing it again.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
    """
    with Image.open(path) as image:
        writer.add_image(tag, np.asarray(image.convert("RGB").reduce(2)), step, dataformats="HWC")  # (H, W, 3)


@contextmanager
def look(grid: Literal["x", "y", "both"] = "y") -> Iterator[None]:
    """The style of all figures, as a decorator of the functions that draw them."""
    try:
        import matplotlib.figure  # noqa: F401
        from matplotlib import rc_context
    except ImportError as error:
        raise missing_package("matplotlib", error) from error
    with rc_context({**_LOOK, "axes.grid.axis": grid}):
        yield


def new_figure(height: float) -> Figure:
    """A figure as wide as all others."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def no_frame(*panels: Axes) -> None:
    """Neither grid nor frame, for panels that are pictures."""
    for axes in panels:
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)


def legend(axes: Axes, loc: Literal["best", "upper right"] = "upper right") -> None:
    """A legend inside a panel."""
    axes.legend(loc=loc, frameon=True, framealpha=0.85, edgecolor="none")


def legend_above(figure: Figure, axes: Axes, handles: Sequence[Artist] = ()) -> None:
    """A legend of ``handles``, or of what stands in ``axes``, over the whole width. A long one makes its own room."""
    labels = [str(handle.get_label()) for handle in handles]
    if not handles:
        handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(len(labels), int(100 / (longest + 7))))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - 2))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)


def stairs(axes: Axes, edges: np.ndarray, counts: np.ndarray, label: str | None) -> None:
    """Counts as touching bars on a log scale that starts below one, so that a bin with a single label can be seen."""
    floor = 0.6
    axes.set_yscale("log")
    axes.stairs(np.maximum(counts, floor), edges, baseline=floor, fill=True, color="#8c8c8c", label=label, zorder=2)
    axes.set_ylim(floor, max(10.0, 2 * float(counts.max())))


def line_and_band(axes: Axes, x: Any, mean: np.ndarray, spread: np.ndarray, color: str, **style: Any) -> None:
    """A line through the means, and a band of one spread either way where there is any."""
    axes.plot(x, mean, color=color, **style)
    if np.isfinite(spread).any():
        axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.16, linewidth=0)


def line_style(i: int, dash: str) -> dict[str, Any]:
    """The look of the ``i``-th line. Its marks at the edge of the axes are drawn whole."""
    return {"marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "linestyle": dash, "clip_on": False, "zorder": 3}


def color_scale(figure: Figure, image: Any, label: str, **place: Any) -> None:
    """A colour bar for an image."""
    bar = figure.colorbar(image, **place)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, color=INK)
    bar.outline.set_visible(False)


def cut_below_zero(axes: Axes) -> None:
    """End the axis at 0, where the values end. A band or a whisker around one may reach below."""
    if axes.get_ylim()[0] < 0:
        axes.set_ylim(bottom=0)


def note_no_runs(axes: Axes) -> None:
    """Write in an empty panel why it is empty."""
    axes.text(0.5, 0.5, "no completed run", transform=axes.transAxes, ha="center", va="center", fontsize=10)


def class_counts(figure: Figure, axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """Training samples of each class, with the names of the classes below: of every class if there is room."""
    stairs(axes, np.arange(len(counts) + 1) - 0.5, counts, None)
    axes.set_ylabel("training\nsamples\n(log scale)")
    step = math.ceil(len(names) / 20)
    shown = names[::step]
    axes.set_xticks(np.arange(0, len(names), step), list(shown))
    axes.set_xlim(-0.5, len(names) - 0.5)
    if max(map(len, shown)) * len(shown) > 70:
        axes.tick_params(axis="x", labelrotation=90)
        figure.set_figheight(figure.get_figheight() + 0.08 * max(map(len, shown)))


def given_colors(colors: Colors | None) -> dict[str, str]:
    """The caller's colours, checked to be known to matplotlib."""
    if colors is None:
        return {}
    from matplotlib.colors import is_color_like

    instance(Mapping, colors=colors)
    for name, color in colors.items():
        if not is_color_like(color):
            fix = 'Use a hex code such as "#0072B2" or a name that matplotlib knows.'
            raise problem(f"colors[{name!r}] must be a color", got=repr(color), fix=fix)
    return dict(colors)


def styles(methods: Iterable[str], colors: Colors | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The colour and the dashes of each method. The caller's colours override the default ones."""
    names = list(methods)
    return {**method_colors(names), **given_colors(colors)}, method_dashes(names)


def styled_methods(ds: xr.Dataset, colors: Colors | None, *, baseline: bool = True) -> dict[str, str]:
    """Colours of the methods that have a completed run. The constant predictor comes last, if it is shown at all."""
    names = ds["method"].values.tolist()
    known, _ = styles(names, colors)
    done = ds["completed"].any("seed").values
    present = [name for name, finished in zip(names, done, strict=True) if finished]
    if not baseline and present != [BASELINE]:
        present = [name for name in present if name != BASELINE]
    return {name: known[name] for name in sorted(present, key=lambda name: name == BASELINE)}


def check_entries(name: str, mapping: Any, *, texts: bool = True) -> None:
    """Raise unless it is a non-empty mapping with text as keys, or with any keys if ``texts`` is False."""
    instance(Mapping, **{name: mapping})
    if not mapping:
        raise problem(f"{name} must hold at least one entry", got="none")
    instance(str, **{f"the name {key!r} in {name}": key for key in mapping if texts})


def checked_names(names: Any, size: int, *, more: bool = False) -> list[str]:
    """The names of ``size`` classes, or with ``more`` of at least that many. Without names the list is empty."""
    if names is None:
        return []
    instance(Sequence, class_names=names)
    if isinstance(names, str) or len(names) < size or (len(names) > size and not more):
        got = repr(names) if isinstance(names, str) else f"{len(names)} names"
        raise problem(f"class_names must be one name per class, {'at least ' * more}{size} of them", got=got)
    instance(str, **{f"class_names[{i}]": name for i, name in enumerate(names)})
    return [literal(name) for name in names]


def checked_row(name: str, values: Any, rule: str, size: int | None = None) -> np.ndarray:
    """``values`` as one row of float64 numbers, at least one, or ``size`` of them."""
    row = labels_array(values, name).astype(np.float64)
    if row.ndim != 1 or row.size == 0 or size not in (None, row.size):
        raise problem(f"{name} must be {rule}", got=row.shape, error=ShapeError)
    return row


def train_counts(ds: xr.Dataset) -> np.ndarray:
    """Training samples of each bin, the mean over completed runs."""
    return ds["train_count"].where(ds["completed"] == 1).mean(("method", "seed")).values


def seeds_text(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _shared_seeds(ds: xr.Dataset) -> int | None:
    """The number of seeds of all methods that have any, if it is the same, whatever the constant predictor has."""
    counts = zip(ds["method"].values.tolist(), ds["completed"].sum("seed").values.tolist(), strict=True)
    numbers = {number for method, number in counts if number and method != BASELINE}
    return numbers.pop() if len(numbers) == 1 else None


def method_label(ds: xr.Dataset, method: str) -> str:
    """The name of a method in a figure, with its number of seeds unless that is the same for all."""
    if _shared_seeds(ds) is not None:
        return literal(method)
    return literal(f"{method} ({seeds_text(int(ds['completed'].sel({'method': method}).sum()))})")


def spread_shown(ds: xr.Dataset) -> str:
    """What a label says about seeds: the number that all methods have, and the spread where there is one."""
    shared = _shared_seeds(ds)
    if shared is not None:
        return f"\n{'mean ± sd over ' * (shared > 1)}{seeds_text(shared)}"
    return f"\n{SPREAD}" if bool((ds["completed"].sum("seed") > 1).any()) else ""


def with_units(name: str, units: str) -> str:
    return literal(f"{name} ({'dimensionless' if units == '1' else units})")


def share_name(name: str, percent: bool) -> str:
    """A name that has its units already, unless it is a share that is shown in percent."""
    return with_units(name, "%") if percent else literal(name)


def literal(text: str) -> str:
    """Text from outside, in which a dollar sign does not start a formula."""
    return text.replace("$", r"\$")


def mean_and_spread(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1) over the first axis, of the rows that have a value, or NaN if none has."""
    known = np.isfinite(rows)
    number = known.sum(0)
    nan = np.full(rows.shape[1:], np.nan)
    mean = np.divide(np.where(known, rows, 0).sum(0), number, out=nan.copy(), where=number > 0)
    squares = (np.where(known, rows - mean, 0) ** 2).sum(0)
    return mean, np.sqrt(np.divide(squares, number - 1, out=nan.copy(), where=number > 1))
