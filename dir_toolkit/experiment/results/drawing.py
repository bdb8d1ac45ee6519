"""What all figures share: one look, one colour a method, and the ways to write a figure down."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from ..._checks import instance, problem
from ..files import write_atomically
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
_WIDTH = 7.0  # inches: 700 pixels at matplotlib's 100 dots an inch
_LEGEND_ROW = 0.2  # inches
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
SPREAD = "mean ± sd over seeds"

Colors = Mapping[str, str]


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """One colour a method by its place in the order, and grey for the constant predictor.

    Hand the same answer to every figure, and a method looks alike in all of them; one that it does not name takes the
    colour it would have had without.
    """
    names = [method for method in dict.fromkeys(methods) if method != BASELINE]
    return {**{m: PALETTE[i % len(PALETTE)] for i, m in enumerate(names)}, BASELINE: GREY}


def method_dashes(methods: Iterable[str]) -> dict[str, str]:
    """Solid lines, dotted once the colours of :func:`method_colors` repeat, and dashes for the constant predictor."""
    names = [method for method in dict.fromkeys(methods) if method != BASELINE]
    return {**{m: ("-", ":", "-.")[i // len(PALETTE) % 3] for i, m in enumerate(names)}, BASELINE: "--"}


def figure_svg(figure: Figure, *, name: str = "figure") -> str:
    """A figure as one ``<svg>`` element: text stays text, nothing is fetched, and equal figures give equal bytes.

    Args:
        name: put before every id in it, so that several can stand in one page; letters, digits and dashes.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=200, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text[text.index("<svg") :])
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


def new_figure(height: float) -> Figure:
    _installed()
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _installed() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise problem(
            "matplotlib must be installed",
            got="no such package",
            fix='pip install "dir_toolkit[recipes]"',
            error=ImportError,
        ) from error


def dressed(figure: Figure, panels: Sequence[Axes], *, grid: bool | Literal["both"] = True) -> Figure:
    """One look for every panel, set on the panel itself, since matplotlib's defaults belong to the user."""
    for axes in panels:
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom") and bool(grid))
            spine.set_color(GREY)
        axes.tick_params(labelsize=9, labelcolor=INK, color=GREY)
        axes.xaxis.label.set(fontsize=10, color=INK)
        axes.yaxis.label.set(fontsize=10, color=INK)
        axes.title.set(fontsize=10, color=INK)
        axes.set_axisbelow(True)
        if grid:
            axes.grid(visible=True, axis="both" if grid == "both" else "y", color=FAINT, linewidth=0.6)
    return figure


def legend(axes: Axes, loc: Literal["best", "upper right"] = "upper right") -> None:
    axes.legend(loc=loc, fontsize=9, labelcolor=INK, frameon=True, framealpha=0.85, edgecolor="none")


def legend_above(figure: Figure, axes: Axes, handles: Sequence[Artist] = ()) -> None:
    """A legend over the whole width, of what stands in ``axes``, or of ``handles``; a long one makes its room."""
    labels = [str(handle.get_label()) for handle in handles]
    if not handles:
        handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(len(labels), int(100 / (longest + 7))))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - 2))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=9, labelcolor=INK, frameon=False)


def stairs(axes: Axes, edges: np.ndarray, counts: np.ndarray, label: str | None) -> None:
    """Counts as touching bars on a log scale that starts below one, so that a bin with a single label is seen."""
    floor = 0.6
    axes.set_yscale("log")
    axes.stairs(np.maximum(counts, floor), edges, baseline=floor, fill=True, color="#8c8c8c", label=label, zorder=2)
    axes.set_ylim(floor, max(10.0, 2 * float(counts.max())))


def line_and_band(axes: Axes, x: Any, mean: np.ndarray, spread: np.ndarray, color: str, **style: Any) -> None:
    """A line through the means, and a band of one spread either way where there is any."""
    axes.plot(x, mean, color=color, **style)
    if np.isfinite(spread).any():
        axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.16, linewidth=0)


def color_scale(figure: Figure, image: Any, label: str, **place: Any) -> None:
    bar = figure.colorbar(image, **place)
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)


def cut_below_zero(axes: Axes) -> None:
    """Shares have no values below 0, but a band or whisker around one may reach there."""
    if axes.get_ylim()[0] < 0:
        axes.set_ylim(bottom=0)


def note_no_runs(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no completed run", transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=10)


def given_colors(colors: Colors | None) -> dict[str, str]:
    """The colours that were handed over, each of which matplotlib knows."""
    if colors is None:
        return {}
    instance(Mapping, colors=colors)
    _installed()
    from matplotlib.colors import is_color_like

    for name, color in colors.items():
        if not is_color_like(color):
            fix = 'Use a hex code such as "#0072B2" or a name that matplotlib knows.'
            raise problem(f"colors[{name!r}] must be a color", got=repr(color), fix=fix)
    return dict(colors)


def styles(methods: Iterable[str], colors: Colors | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Colours, those handed over before our own, and dashes of the lines."""
    names = list(methods)
    return {**method_colors(names), **given_colors(colors)}, method_dashes(names)


def styled_methods(ds: xr.Dataset, colors: Colors | None, *, baseline: bool = True) -> dict[str, str]:
    """Colours of the methods that have a completed run, the constant predictor last, if at all."""
    names = ds["method"].values.tolist()
    known, _ = styles(names, colors)
    done = ds["completed"].any("seed").values
    present = [name for name, finished in zip(names, done, strict=True) if finished]
    if not baseline and present != [BASELINE]:
        present = [name for name in present if name != BASELINE]
    return {name: known[name] for name in sorted(present, key=lambda name: name == BASELINE)}


def train_counts(ds: xr.Dataset) -> np.ndarray:
    """Training samples of each bin, the mean over completed runs."""
    return ds["train_count"].where(ds["completed"] == 1).mean(("method", "seed")).values


def seeds_text(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def spread_shown(ds: xr.Dataset) -> str:
    return f"\n{SPREAD}" if bool((ds["completed"].sum("seed") > 1).any()) else ""


def with_units(name: str, units: str) -> str:
    return literal(f"{name} ({'dimensionless' if units == '1' else units})")


def literal(text: str) -> str:
    """Text from outside, in which a dollar sign is no formula."""
    return text.replace("$", r"\$")


def mean_and_spread(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1) over the first axis, of the rows that have a value; NaN where none has."""
    known = np.isfinite(rows)
    number = known.sum(0)
    nan = np.full(rows.shape[1:], np.nan)
    mean = np.divide(np.where(known, rows, 0).sum(0), number, out=nan.copy(), where=number > 0)
    squares = (np.where(known, rows - mean, 0) ** 2).sum(0)
    return mean, np.sqrt(np.divide(squares, number - 1, out=nan.copy(), where=number > 1))
