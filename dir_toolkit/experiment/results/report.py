"""A result as one page that opens anywhere: table, figures, settings and provenance in a single HTML file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from typing import TYPE_CHECKING

import xarray as xr

from ..._checks import missing_package, problem
from ..._files import write_atomically
from .drawing import figure_svg
from .schema import validate_results
from .tables import Columns, ResultsTable, results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

_SHOWN_ELSEWHERE = ("title", "command", "label_name", "label_units")
_THEMED = ("222222", "d9d9d9", "777777", "ffffff", "8c8c8c", "dcdcdc", "ededed", "fafafa", "fdeee6", "332288", "882255")
"""Colours of figures that have another value in the dark. White text stands on a colour and stays white."""
_DEEPEST = 20  # levels of settings that are shown one by one


def write_report(
    path: str | os.PathLike[str],
    ds: xr.Dataset,
    figures: Mapping[str, Figure],
    *,
    title: str,
    notes: Sequence[str] = (),
    titles: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
    columns: Columns | None = None,
    table: ResultsTable | None = None,
) -> None:
    """Write a result as one HTML file, whole or not at all. The file fetches nothing and runs no script.

    Args:
        ds: a result. Its attributes are shown as provenance.
        figures: by title, in the order of the page.
        notes: paragraphs of plain text. The first stands above the table, the others below.
        titles: a few words on each method, shown below the table.
        settings: the settings of the experiment. Nested ones are shown as ``outer.inner``.
        columns: the columns of the table, as in :func:`results_table`.
        table: a table to show instead of that of ``columns``.
    Raises:
        ResultsError: ``ds`` breaks the schema. TypeError: ``notes`` is one text. ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_package("jinja2", error) from error
    validate_results(ds)
    if isinstance(notes, str):
        raise problem("notes must be paragraphs", got="one text", fix="Use [notes].", error=TypeError)
    provenance = {str(name): value for name, value in ds.attrs.items() if name not in _SHOWN_ELSEWHERE}
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(template).render(
        title=title,
        command=ds.attrs["command"],
        notes=notes,
        methods=dict(titles or {}),
        table=results_table(ds, columns=columns) if table is None else table,
        figures=[
            (name, _themed(figure_svg(figure, name=f"figure{i}")))
            for i, (name, figure) in enumerate(figures.items(), 1)
        ],
        settings=list(_flat(settings or {})),
        provenance=list(_flat(provenance)),
    )
    write_atomically(path, lambda file: file.write(page.encode()))


def _themed(svg: str) -> str:
    """The figure with variables of the page in place of the colours that change in the dark."""

    def variables(tag: re.Match[str]) -> str:
        white = "" if tag[0].startswith("<text") else "|ffffff"
        known = "|".join(color for color in _THEMED if color != "ffffff") + white
        return re.sub(rf"(?<=[ :])#({known})(?=[;\"])", r"var(--c\1, #\1)", tag[0])

    return re.sub(r"<[^>]*>", variables, svg)


def _flat(values: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Names and values as text, nested ones under dotted names. Text that is a JSON object is read as one."""
    for name, value in values.items():
        read = value
        if isinstance(value, str) and value.startswith("{"):
            with suppress(ValueError, RecursionError):
                read = json.loads(value)
        if isinstance(read, Mapping) and read and depth < _DEEPEST:
            yield from _flat(read, f"{prefix}{name}.", depth + 1)
            continue
        try:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
        except (ValueError, RecursionError):  # it holds itself, or is nested too deep
            text = "..."
        yield f"{prefix}{name}", text
