"""A result as a table: methods down, errors across, with the counts and the spread behind every number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from .._checks import problem
from ..labels.density import REGIONS
from .schema import validate_results

__all__ = ["BASELINE", "ResultsTable", "markdown_table", "results_table", "text_table"]

BASELINE = "constant"
"""The name of the constant predictor, which stands last in every table."""

_NAMES = {"mae": "MAE", "rmse": "RMSE", "gm": "GM", "bmae": "bMAE"}
_EMPTY = "–"

Columns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ResultsTable:
    """Cells as text, ready to be laid out.

    Attributes:
        caption: units, and what the spread is.
        header: one name a column; the first column holds methods.
        counts: test samples behind each column, a row below the header.
        rows: one row a method, as long as the header.
    """

    caption: str
    header: list[str]
    counts: list[str]
    rows: list[list[str]]


def results_table(ds: xr.Dataset, *, columns: Columns | None = None) -> ResultsTable:
    """Mean and standard deviation over seeds of chosen metrics in chosen regions.

    Numbers have as many decimals as give the smallest mean of their metric three digits. A region without test samples
    shows a dash, and so does a method of which no run was completed.

    Args:
        ds: a result of the schema in ``results.schema``.
        columns: (metric, region) pairs; None means MAE over all and in every region, and bMAE. A region that no run
            has test samples in is then left out, if it is ``unseen``.
    Raises:
        ValueError: a metric or a region is not in ``ds``. ResultsError: ``ds`` breaks the schema.
    """
    validate_results(ds)
    if columns is None:
        regions = ["all", *(r for r in REGIONS if r != "unseen" or bool(ds["count"].sel(region=r).any()))]
        columns = [*(("mae", region) for region in regions), ("bmae", "all")]
    for column in columns:
        metric, region = column if isinstance(column, (tuple, list)) and len(column) == 2 else (None, None)
        if (
            not isinstance(metric, str)
            or metric not in ds
            or ds[metric].dims != ("method", "seed", "region")
            or region not in ds["region"].values
        ):
            known = sorted(str(name) for name in ds.data_vars if ds[name].dims == ("method", "seed", "region"))
            raise problem(
                "results_table",
                "columns must be (metric, region) pairs of the result",
                got=repr(column),
                fix=f"Metrics are {known}, regions {ds['region'].values.tolist()}.",
            )
    methods = sorted(ds["method"].values.tolist(), key=lambda method: method == BASELINE)
    rows = []
    for method in methods:
        row = ds.sel({"method": method})
        cells = [_mean_and_spread(row[m].sel(region=region).values, _decimals(ds[m])) for m, region in columns]
        rows.append([method, str(int(row["completed"].sum())), *cells])
    header = ["method", "seeds", *(f"{_NAMES.get(metric, metric)} {region}" for metric, region in columns)]
    counts = ["test samples", "", *(count_range(ds["count"].sel(region=region).values) for _, region in columns)]
    return ResultsTable(_caption(ds, columns), header, counts, rows)


def _decimals(values: xr.DataArray) -> int:
    """As many as show three digits of the smallest mean over seeds."""
    finite = np.abs(values.mean("seed").values)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    return min(max(2 - math.floor(math.log10(finite.min())), 0), 6) if finite.size else 2


def _mean_and_spread(values: np.ndarray, decimals: int) -> str:
    """``mean ± sd`` over the seeds that have a value; the mean alone where there is one."""
    values = values[np.isfinite(values)]
    if values.size == 0:
        return _EMPTY
    mean = f"{values.mean():.{decimals}f}"
    return mean if values.size == 1 else f"{mean} ± {values.std(ddof=1):.{decimals}f}"


def count_range(counts: np.ndarray) -> str:
    """Counts of several runs as text: one number, or a range where they differ; runs that have none do not matter."""
    present = counts[counts > 0]
    if present.size == 0:
        return "0"
    low, high = int(present.min()), int(present.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _caption(ds: xr.Dataset, columns: Columns) -> str:
    by_units: dict[str, list[str]] = {}
    for metric, _ in columns:
        names = by_units.setdefault(ds[metric].attrs["units"], [])
        if _NAMES.get(metric, metric) not in names:
            names.append(_NAMES.get(metric, metric))
    units = [f"{' and '.join(names)} in {u}" for u, names in by_units.items() if u != "1"]
    several = bool((ds["completed"].sum("seed") > 1).any())
    spread = "mean ± standard deviation (n - 1) over seeds" if several else "one seed a method, so no spread is known"
    return f"{ds.attrs['label_name']}: " + "; ".join([*units, spread]) + "."


def markdown_table(ds: xr.Dataset, *, columns: Columns | None = None) -> str:
    """:func:`results_table` as Markdown, with its caption below it; ends in a newline."""
    table = results_table(ds, columns=columns)
    lines = [table.header, ["---", *("---:" for _ in table.header[1:])], table.counts, *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{body}\n\n{table.caption}\n"


def text_table(ds: xr.Dataset, *, columns: Columns | None = None) -> str:
    """:func:`results_table` in aligned columns for a terminal; ends in a newline."""
    table = results_table(ds, columns=columns)
    lines = [table.header, table.counts, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    laid = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]
    laid.insert(2, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([*laid, table.caption]) + "\n"
