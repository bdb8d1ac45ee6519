"""A result as a table: methods down, metrics across, with the counts and the spread behind each number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..._checks import instance, problem
from ...labels.density import REGIONS
from ...metrics._declared import METRICS, WATCHED
from .schema import check_result

__all__ = ["BASELINE", "ResultsTable", "as_markdown", "as_text", "results_table", "verdict"]

BASELINE = "constant"
"""The name of the constant predictor, which is the last row of every table."""

_EMPTY = "–"

_BY_RUN = ("method", "seed")

Columns = Sequence[tuple[str, str | None] | str]
Mark = Literal["better", "worse"]


@dataclass(frozen=True)
class ResultsTable:
    """Cells as text, ready to be laid out.

    Attributes:
        caption: the units, and what the spread is.
        header: one name per column. The first column holds methods.
        counts: the test samples behind each column, for a row below the header.
        rows: one row per method, as long as the header.
        marks: the cells that stand out, by (row, column). ``better`` is bold and ``worse`` is in italics.
    """

    caption: str
    header: list[str]
    counts: list[str]
    rows: list[list[str]]
    marks: dict[tuple[int, int], Mark] = field(default_factory=dict)


def results_table(ds: xr.Dataset, *, columns: Columns | None = None) -> ResultsTable:
    """Mean and standard deviation over seeds of chosen metrics in chosen regions.

    Metrics that are shares are in percent with two decimals. Other numbers have as many decimals as give the smallest
    mean of their metric three digits. A region without test samples shows a dash, and so does a method of which no run
    was completed.

    Args:
        ds: a result.
        columns: (metric, region) pairs, with None for the region of a variable over method and seed alone, such as
            ``("ece", None)``; or names of metrics, such as ``"crps"`` or ``"coverage"``, which stand for all regions
            with test samples. None takes the metrics that training watches: for regression the MAE over all and in
            every region with test samples, and the bMAE; for classification the balanced error over all and in every
            such region, and the error.
    Raises:
        ValueError: a metric or a region is not in ``ds``.
    """
    check_result(ds)
    columns = default_columns(ds) if columns is None else columns
    instance(Sequence, columns=columns)
    pairs: list[Any] = [pair for column in columns for pair in _over_regions(ds, column)]
    for column in pairs:
        metric, region = column if isinstance(column, (tuple, list)) and len(column) == 2 else (None, None)
        dims = _BY_RUN if region is None else (*_BY_RUN, "region")
        known_metric = isinstance(metric, str) and metric in ds.data_vars and ds[metric].dims == dims
        known_region = region is None or (isinstance(region, str) and region in ds["region"].values)
        if not known_metric or not known_region:
            by_region, by_run = (
                sorted(str(name) for name in ds.data_vars if ds[name].dims == dims)
                for dims in ((*_BY_RUN, "region"), _BY_RUN)
            )
            raise problem(
                "columns must be (metric, region) pairs of the result",
                got=repr(column),
                fix=f"Metrics are {by_region}, regions {ds['region'].values.tolist()}; with None for the region, "
                f"{by_run}.",
            )
    cells, finished = [_cells(ds, metric, region) for metric, region in pairs], ds["completed"].sum("seed").values
    names = sorted(enumerate(ds["method"].values.tolist()), key=lambda method: method[1] == BASELINE)
    rows = [[name, str(int(finished[i])), *(column[i] for column in cells)] for i, name in names]
    header = ["method", "seeds", *(" ".join(filter(None, (title(metric), region))) for metric, region in pairs)]
    tested = ["" if r is None else count_range(ds["count"].sel(region=r).values) for _, r in pairs]
    counts = ["test samples", "", *tested]
    return ResultsTable(_caption(ds, pairs), header, counts, rows)


def verdict(ds: xr.Dataset, method: str, baseline: str) -> str:
    """One sentence on what a method did to the errors of all bins alike, and of rare and of common labels.

    Each change is that of the mean over seeds. An error that no run has is left out.

    Args:
        ds: a result of regression.
    """
    runs = ds.sel({"method": [baseline, method]})
    clauses = []
    for name, metric, region in (("bMAE", "bmae", "all"), ("MAE few", "mae", "few"), ("MAE many", "mae", "many")):
        before, after = runs[metric].sel(region=region).values
        paired = np.isfinite(before) & np.isfinite(after)
        if paired.any():
            change = np.nanmean(after) / np.nanmean(before) - 1
            less = int((after < before)[paired].sum())
            clauses.append(f"{name} {change:+.0%} (less in {less} of {int(paired.sum())} seeds)")
    return f"{method} against {baseline}: {', '.join(clauses)}."


def default_columns(ds: xr.Dataset) -> Columns:
    """The metrics that training watches and every method has, in the regions where it does so and ``unseen``, if they
    have test samples."""
    watched = {name: metric.watched for name, metric in WATCHED.items() if name in ds and not metric.may_be_nan}
    regions = _tested(ds)
    return [(n, region) for n, some in watched.items() for region in regions if region in some or len(some) > 1]


def _over_regions(ds: xr.Dataset, column: Any) -> Sequence[Any]:
    return [(column, region) for region in _tested(ds)] if isinstance(column, str) else [column]


def _tested(ds: xr.Dataset) -> list[str]:
    return ["all", *(region for region in REGIONS if bool(ds["count"].sel(region=region).any()))]


def title(metric: str) -> str:
    """What tables and figures call a metric, or any other variable of a result."""
    other = "τ" if metric == "tau" else metric.replace("_", " ")
    return METRICS[metric].title if metric in METRICS else other


def shown_in_percent(metric: str) -> bool:
    """Whether a variable is a share of one."""
    return metric in METRICS and METRICS[metric].unit == "%"


def _cells(ds: xr.Dataset, metric: str, region: str | None) -> list[str]:
    """One column of the table."""
    values = (ds[metric] if region is None else ds[metric].sel(region=region)).values  # (method, seed)
    if shown_in_percent(metric):
        return [_mean_and_spread(row * 100, 2) for row in values]
    decimals = decimals_of(ds[metric])
    return [_mean_and_spread(row, decimals) for row in values]


def decimals_of(values: xr.DataArray) -> int:
    """The number of decimals that gives the smallest mean over seeds three digits."""
    finite = np.abs(values.mean("seed").values)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    return min(max(2 - math.floor(math.log10(finite.min())), 0), 6) if finite.size else 2


def _mean_and_spread(values: np.ndarray, decimals: int) -> str:
    """``mean ± sd`` over the seeds that have a value, or the mean alone if there is one such seed."""
    values = values[np.isfinite(values)]
    if values.size == 0:
        return _EMPTY
    mean = f"{values.mean():.{decimals}f}"
    return mean if values.size == 1 else f"{mean} ± {values.std(ddof=1):.{decimals}f}"


def count_range(counts: np.ndarray) -> str:
    """The counts of several runs as one number, or as a range if they differ. Runs without any do not matter."""
    present = counts[counts > 0]
    if present.size == 0:
        return "0"
    low, high = int(present.min()), int(present.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _caption(ds: xr.Dataset, columns: Sequence[tuple[str, str | None]]) -> str:
    """A sentence with the units of the columns and the meaning of the spread."""
    by_units: dict[str, list[str]] = {}
    for metric, _ in columns:
        names = by_units.setdefault("%" if shown_in_percent(metric) else ds[metric].attrs["units"], [])
        if title(metric) not in names:
            names.append(title(metric))
    units = [f"{_listed(names)} in {u}" for u, names in by_units.items() if u != "1" and names != ["minutes"]]
    several = bool((ds["completed"].sum("seed") > 1).any())
    spread = "mean ± standard deviation (n - 1) over seeds" if several else "one seed per method, so no spread is known"
    return f"{ds.attrs['label_name']}: " + "; ".join([*units, spread]) + "."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def as_markdown(table: ResultsTable) -> str:
    """A table as Markdown, with its caption below."""
    rows = _marked(table)
    lines = [table.header, ["---", *("---:" for _ in table.header[1:])], table.counts, *rows]
    body = "\n".join("| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{body}\n\n{_one_line(table.caption)}\n"


def as_text(table: ResultsTable) -> str:
    """A table in aligned columns for a terminal, with marks as in Markdown."""
    lines = [[_one_line(cell) for cell in line] for line in (table.header, table.counts, *_marked(table))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    laid = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]
    laid.insert(2, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([*laid, _one_line(table.caption)]) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _marked(table: ResultsTable) -> list[list[str]]:
    """The rows, with asterisks around each cell that stands out."""
    rows = [list(row) for row in table.rows]
    for (i, j), mark in table.marks.items():
        stars = "**" if mark == "better" else "*"
        rows[i][j] = f"{stars}{rows[i][j]}{stars}"
    return rows
