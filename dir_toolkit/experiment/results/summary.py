"""All files of a comparison of methods: its result, table, figures, report and TensorBoard events, in one folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..._checks import instance, one_of, problem
from ..._files import write_atomically
from ...labels.density import LabelDensity
from ...metrics._declared import WATCHED
from .comparison import comparison_table, differences_csv, leading_methods, paired_differences
from .comparison_figures import cost_figure, coverage_figure, difference_figure
from .drawing import figure_to_tensorboard, method_colors, save_figure
from .figures import density_figure, error_figure, region_figure
from .headline import headline
from .report import write_report
from .sample_figures import prediction_figure
from .schema import save_results, validate_results
from .tables import Columns, ResultsTable, as_markdown, results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_comparison", "write_summary"]

_LONGEST = 150  # bytes of the name of a figure's file
_SUFFIX = ".summary"  # the end of our TensorBoard file, which other programs in the folder do not use


def write_summary(
    folder: str | os.PathLike[str],
    ds: xr.Dataset,
    figures: Mapping[str, Figure],
    *,
    notes: Sequence[str] = (),
    titles: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    columns: Columns | None = None,
    table: ResultsTable | None = None,
) -> None:
    """Write ``results.nc``, ``table.md``, ``figures/*.png``, ``report.html`` and a TensorBoard file into ``folder``.

    TensorBoard shows the table and the figures. Its scalars are means over seeds of the metrics that are watched in
    training. Their tags are ``test-<metric>-<region>/<method>``, so that each section of the page compares the methods
    in one region.

    The files that an earlier call left in the folder are replaced. Figures of other titles stay.

    Args:
        folder: must exist.
        ds: a result.
        figures: by title, after which their files are named.
        titles: a few words on each method.
        notes, settings, columns, table: as in :func:`dir_toolkit.experiment.results.report.write_report`.
    Raises:
        ResultsError: ``ds`` breaks the schema. ValueError: two titles differ in punctuation only. FileNotFoundError:
        there is no such folder. Nothing is written then.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(folder)
    validate_results(ds)
    names = {title: _file_name(title) for title in figures}
    if len(set(names.values())) < len(names):
        raise problem("titles of figures must give each a file of its own", got=sorted(names.values()))
    table = results_table(ds, columns=columns) if table is None else table
    text = as_markdown(table)
    save_results(ds, folder / "results.nc")
    write_atomically(folder / "table.md", lambda file: file.write(text.encode()))
    (folder / "figures").mkdir(exist_ok=True)
    for earlier in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        with suppress(PermissionError):  # on Windows, while TensorBoard reads it
            earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as board:
        board.add_text("results", text)
        for tag, mean in _scalars(ds):
            board.add_scalar(tag, mean, 0)
        for title, figure in figures.items():
            path = folder / "figures" / f"{names[title]}.png"
            save_figure(figure, path)
            figure_to_tensorboard(board, f"figures/{names[title]}", path, 0)
    write_report(
        folder / "report.html",
        ds,
        figures,
        title=ds.attrs["title"],
        notes=notes,
        titles=titles,
        settings=settings,
        table=table,
    )


def _file_name(title: str) -> str:
    """Letters, digits and dashes. A title too long for a file system is cut and gets a digest."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(title.encode()).hexdigest()[:12]
    return f"{name.encode()[:_LONGEST].decode(errors='ignore')}-{digest}"


def _scalars(ds: xr.Dataset) -> Iterator[tuple[str, float]]:
    """Tags and means over seeds of the metrics that training watches, by region, without those that no run has."""
    for metric in (name for name in WATCHED if name in ds):
        means = ds[metric].mean("seed").transpose("region", "method").values
        for region, row in zip(ds["region"].values.tolist(), means, strict=True):
            for method, mean in zip(ds["method"].values.tolist(), row.tolist(), strict=True):
                if np.isfinite(mean):
                    yield f"test-{metric}-{region}/{method}", mean


def write_comparison(
    folder: str | os.PathLike[str],
    ds: xr.Dataset,
    *,
    baseline: str = "vanilla",
    density: LabelDensity | None = None,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    figures: Mapping[str, Figure] | None = None,
    notes: Sequence[str] = (),
    titles: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Compare methods with a baseline, and write what :func:`write_summary` writes, and ``differences.csv``.

    The report begins with :func:`dir_toolkit.experiment.results.headline.headline`. The table is that of
    :func:`dir_toolkit.experiment.results.comparison.comparison_table`. Figures show regions, differences, the error
    along the axis, predictions against labels, coverage if a method gives intervals, and cost if minutes are known.

    Args:
        folder: must exist.
        ds: a result of regression that holds predictions.
        density: the density of the training labels. None leaves its figure out.
        level, replicates, seed: as in :func:`dir_toolkit.experiment.results.comparison.paired_differences`.
        methods: the methods in the figures of errors along the axis and of predictions, which have no room for many.
            None takes :func:`dir_toolkit.experiment.results.comparison.leading_methods`.
        figures: further figures by title, which come last.
        notes, titles, settings: as in :func:`write_summary`.
    Returns:
        the differences, as ``paired_differences`` gives them.
    Raises:
        As ``paired_differences`` and ``write_summary`` do, and ValueError: one of ``methods`` is unknown. Nothing is
        written then.
    """
    validate_results(ds)
    differences = paired_differences(ds, baseline, level=level, replicates=replicates, seed=seed)
    methods = leading_methods(ds, baseline) if methods is None else methods
    instance(Sequence, methods=methods)
    for method in methods:
        one_of("methods", method, ds["method"].values.tolist())
    name, units = ds.attrs["label_name"], ds.attrs["label_units"]
    everyone = ds["method"].values.tolist()
    colors = method_colors([*methods, *everyone])  # those shown along the axis come first, so that no two are alike
    pictures: dict[str, Figure] = {"Error by region": region_figure(ds, colors=colors)}
    pictures[f"Difference to {baseline}: MAE"] = difference_figure(differences)
    pictures[f"Difference to {baseline}: bMAE"] = difference_figure(differences, metric="bmae")
    shown = ds.sel({"method": list(methods)})
    pictures[f"Error by {name}, some methods"] = error_figure(shown, colors=colors)
    pictures["Predicted against true, some methods"] = prediction_figure(shown, colors=colors)
    if "lower" in ds and bool(ds["lower"].notnull().any()):
        pictures["Interval coverage by region"] = coverage_figure(ds)
    if bool(ds["minutes"].notnull().any()):
        pictures["Error and cost"] = cost_figure(ds, colors=colors)
    if density is not None:
        pictures["Label density"] = density_figure(density, label_name=name, label_units=units)
    pictures |= figures or {}
    table = comparison_table(ds, differences)
    text = differences_csv(differences)
    notes = [headline(ds, baseline, level=level), *notes]
    write_summary(folder, ds, pictures, notes=notes, titles=titles, settings=settings, table=table)
    write_atomically(Path(folder) / "differences.csv", lambda file: file.write(text.encode()))
    return differences
