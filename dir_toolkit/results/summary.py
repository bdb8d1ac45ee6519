"""What a comparison of methods leaves behind: result, table, figures, report and TensorBoard, in one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from .._checks import problem
from ..files import write_atomically
from .drawing import figure_to_tensorboard, save_figure
from .report import write_report
from .schema import save_results, validate_results
from .tables import Columns, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_summary"]

_SUFFIX = ".summary"  # tells our TensorBoard file from others in the folder


def write_summary(
    folder: str | os.PathLike[str],
    ds: xr.Dataset,
    figures: Mapping[str, Figure],
    *,
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    columns: Columns | None = None,
) -> None:
    """Write ``results.nc``, ``table.md``, ``figures/*.png``, ``report.html`` and a TensorBoard file into ``folder``.

    What an earlier call left in the folder is replaced, its TensorBoard file too; figures of other titles stay.

    Args:
        folder: must exist.
        ds: a result of the schema in ``results.schema``.
        figures: by title; a file is named after its title.
        notes, settings, columns: as in :func:`dir_toolkit.results.report.write_report`.
    Raises:
        ResultsError: ``ds`` breaks the schema; nothing is written then. ValueError: two titles differ in punctuation
        only. FileNotFoundError: there is no such folder.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(folder)
    validate_results(ds)
    names = {title: "".join(c if c.isalnum() else "-" for c in title.lower()) for title in figures}
    if len(set(names.values())) < len(names):
        raise problem("write_summary", "titles of figures must give each a file of its own", got=sorted(names.values()))
    table = markdown_table(ds, columns=columns)
    save_results(ds, folder / "results.nc")
    write_atomically(folder / "table.md", lambda file: file.write(table.encode()))
    (folder / "figures").mkdir(exist_ok=True)
    for earlier in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as board:
        board.add_text("results", table)
        for title, figure in figures.items():
            save_figure(figure, folder / "figures" / f"{names[title]}.png")
            figure_to_tensorboard(board, f"figures/{names[title]}", figure, 0)
    write_report(
        folder / "report.html", ds, figures, title=ds.attrs["title"], notes=notes, settings=settings, columns=columns
    )
