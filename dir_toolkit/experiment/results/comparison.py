"""Paired comparisons of methods with a baseline, with bootstrap intervals over seeds and test samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ..._checks import instance, number, one_of, problem, whole
from ...errors import ResultsError
from ...labels.bins import Bins
from ...metrics.regression import RegressionMetrics
from .schema import check_result
from .tables import BASELINE, Columns, Mark, ResultsTable, results_table

__all__ = ["comparison_table", "differences_csv", "leading_methods", "paired_differences"]

PAIRED = tuple(metric.name for metric in RegressionMetrics.metrics if metric.sums == ("abs", "count"))
"""The metrics that are a weighted mean of absolute errors, and so can be drawn again sample by sample."""

_OF_CLASSES = ("balanced_error", "error")

_DEFAULT = (("bmae", "all"), ("mae", "all"), ("mae", "many"), ("mae", "medium"), ("mae", "few"), ("bmae", "few"))
_NUMBERS = tuple(f"{name}{end}" for name in ("difference", "ratio") for end in ("", "_low", "_high"))
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters that a spreadsheet treats as a formula
_BLOCK = 2**22  # counts drawn at a time


def paired_differences(
    ds: xr.Dataset,
    baseline: str = "vanilla",
    *,
    metrics: Sequence[tuple[str, str]] = _DEFAULT,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    r"""Difference of every method to a baseline, and ratio, with bootstrap intervals over seeds and test samples.

    Runs are paired: a method and the baseline are compared over the seeds that both completed, and in each replicate
    both are judged by the same seeds and the same test samples. Every percentile interval holds both sources of
    variation. Only the interval of a method with one shared seed is of the test samples alone.

    Test samples are drawn within their bins, so that each replicate has every bin with as many samples as the test set.
    bMAE is a mean over bins, and a replicate without the rare ones would be another metric. Of n samples, or seeds,
    n - 1 are drawn, and each counts n / (n - 1) times. If n were drawn, intervals of few samples would be too narrow,
    since the variance of their mean would be (n - 1) / n times too small. A sample alone in its bin never varies.

    No seed changes the constant predictor, so it is paired with every seed of the other side.

    A result of classification holds no predictions, only the recall of each class. There the samples of each run are
    drawn by themselves. Intervals are then too wide, not too narrow, where methods err on the same samples.

    Args:
        ds: a result of regression that holds predictions, or of classification. Methods without predictions are NaN
            and have 0 seeds.
        metrics: (metric, region) pairs, with the metric ``"mae"`` or ``"bmae"``. A result of classification needs pairs
            with ``"balanced_error"`` or ``"error"``, which the default does not hold.
        replicates: at least 100.
        level: the level of each interval. Of many intervals, some exclude 0 by chance.
        seed: the seed of the bootstrap. The replicates of a method do not depend on the other methods.
    Shape:
        ``difference``, ``difference_low``, ``difference_high``, ``ratio``, ``ratio_low``, ``ratio_high`` over (method,
        column), with coordinates ``metric`` and ``region`` along ``column``. ``seeds``, those shared, over (method).
    Units:
        differences are in label units, method minus baseline, so that below 0 is better. Ratios are method by baseline.
    Raises:
        ResultsError: ``ds`` holds no predictions, or none for the baseline. ValueError: the baseline, a metric or a
        region is unknown, or a number is out of range.
    Source:
        Rao and Wu 1988, Resampling inference with complex survey data, for drawing n - 1 within strata.
    """
    check_result(ds)
    classes = "bin_recall" in ds
    if not classes and "prediction" not in ds:
        rule, fix = "ds must hold the prediction for each test sample", "Give target and prediction to combine_runs."
        raise problem(rule, got="none", fix=fix, error=ResultsError)
    methods = ds["method"].values.tolist()
    one_of("baseline", baseline, methods)
    columns = _columns(metrics, ds, _OF_CLASSES if classes else PAIRED)
    replicates = whole("replicates", replicates, low=100)
    level = number("level", level, low=0, high=1, open_low=True, open_high=True)
    whole("seed", seed, low=0)

    known = (ds["completed"].values == 1) if classes else np.isfinite(ds["prediction"].values[..., 0])
    run_of = np.full(known.shape, -1)  # the row in the errors of known runs
    run_of[known] = np.arange(known.sum())
    for i in [i for i, method in enumerate(methods) if method == BASELINE and known[i].any()]:
        run_of[i] = run_of[i].max()
    base = methods.index(baseline)
    if (run_of[base] < 0).all():
        got = "a baseline without any"
        raise problem(f"{baseline!r} must have predictions to be compared with", got=got, error=ResultsError)
    bins = Bins.from_edges(np.append(ds["bin_low"].values, ds["bin_high"].values[-1]))
    if classes:
        counts = ds["bin_count"].values[known]  # (P, B)
        tested = counts[0]
    else:
        target = ds["target"].values
        errors = np.abs(ds["prediction"].values[known].astype(np.float64) - target)  # (P, N)
        place = bins.index(target)
        tested = np.bincount(place, minlength=len(bins))
    even = bins.relative_widths
    weights = {name: tested if name in ("mae", "error") else even for name, _ in columns}
    shares = np.stack([_bin_shares(ds, weights[metric], region, tested > 0) for metric, region in columns])  # (C, B)
    if classes:
        point, drawn = _class_replicates(1 - ds["bin_recall"].values[known], counts, shares, replicates, seed)
    else:
        point, drawn = _replicates(errors, place, shares, replicates, seed)

    numbers = {name: np.full((len(methods), len(columns)), np.nan) for name in _NUMBERS}
    seeds = np.zeros(len(methods), dtype=np.int64)
    ends = [(1 - level) / 2, (1 + level) / 2]
    for i in range(len(methods)):
        shared = (run_of[base] >= 0) & (run_of[i] >= 0)
        seeds[i] = n = shared.sum()
        if n == 0:
            continue
        counts = _redrawn(np.random.default_rng([seed, 1]), n, replicates)  # equal seeds are drawn equally
        mine, theirs = run_of[i][shared], run_of[base][shared]
        once = (point[:, mine].mean(-1), point[:, theirs].mean(-1))
        again = tuple(np.einsum("rcs,rs->rc", drawn[..., runs], counts) / n for runs in (mine, theirs))
        for name, compare in (("difference", np.subtract), ("ratio", _ratio)):
            numbers[name][i] = compare(*once)
            numbers[f"{name}_low"][i], numbers[f"{name}_high"][i] = np.quantile(compare(*again), ends, axis=0)
    units = "1" if classes else ds.attrs["label_units"]
    alone = [method for method, n in zip(methods, seeds, strict=True) if n == 1]
    sources = "seeds, and test samples within their bins"
    return xr.Dataset(
        {
            **{n: (("method", "column"), v, {"units": "1" if "ratio" in n else units}) for n, v in numbers.items()},
            "seeds": ("method", seeds, {"units": "1"}),
        },
        coords={
            "method": ds["method"].values,
            "metric": ("column", np.array([metric for metric, _ in columns])),
            "region": ("column", np.array([region for _, region in columns])),
        },
        attrs={
            "baseline": baseline,
            "level": level,
            "replicates": replicates,
            "draws_seed": seed,
            "label_name": ds.attrs["label_name"],
            "label_units": units,
            "resampled": f"{sources}; of one seed, test samples alone: {', '.join(alone)}" if alone else sources,
        },
    )


def _columns(metrics: Any, ds: xr.Dataset, known: Sequence[str]) -> list[tuple[str, str]]:
    """The checked pairs of metric and region."""
    instance(Sequence, metrics=metrics)
    columns = []
    for column in metrics:
        if not isinstance(column, (tuple, list)) or len(column) != 2:
            raise problem("metrics must be (metric, region) pairs", got=repr(column))
        one_of("a metric", column[0], known)
        one_of("a region", column[1], ds["region"].values.tolist())
        columns.append((column[0], column[1]))
    if not columns:
        raise problem("metrics must hold at least one pair", got="none")
    return columns


def _bin_shares(ds: xr.Dataset, weights: np.ndarray, region: str, tested: np.ndarray) -> np.ndarray:
    """The weight of each bin's mean error, (B,): a share of ``weights`` for the bins of the region that have samples.

    All are NaN if the region has no test sample.
    """
    inside = tested if region == "all" else tested & (ds["bin_region"].values == region)
    shares = np.where(inside, weights, 0.0)
    return shares / shares.sum() if shares.any() else np.full(len(shares), np.nan)


def _replicates(
    rows: np.ndarray, place: np.ndarray, shares: np.ndarray, replicates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each column of each run as measured, (C, P), and as drawn again, (R, C, P), from the runs' errors (P, N)."""
    empty = np.isnan(shares[:, 0])
    point = np.zeros((len(shares), len(rows)))
    drawn = np.zeros((replicates, *point.shape))
    rng = np.random.default_rng([seed, 0])
    for b in np.unique(place):
        members = rows[:, place == b]  # (P, n)
        used = np.flatnonzero(np.nan_to_num(shares[:, b]))
        point[used] += shares[used, b, None] * members.mean(1)
        step = max(1, _BLOCK // members.shape[1])
        for first in range(0, replicates, step):
            counts = _redrawn(rng, members.shape[1], min(step, replicates - first))
            means = counts @ members.T / members.shape[1]  # (r, P)
            for c in used:
                drawn[first : first + step, c] += shares[c, b] * means
    point[empty], drawn[:, empty] = np.nan, np.nan
    return point, drawn


def _class_replicates(
    errors: np.ndarray, counts: np.ndarray, shares: np.ndarray, replicates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`_replicates` gives, from the share of wrong answers of each run and class (P, B), and its samples."""
    used = np.nan_to_num(shares).any(0)
    errors, counts, shares = errors[:, used], counts[:, used], shares[:, used]
    fewer = np.maximum(counts - 1, 1)
    drawn = np.random.default_rng([seed, 0]).binomial(fewer, errors, size=(replicates, *errors.shape)) / fewer
    drawn = np.where(counts > 1, drawn, errors)  # a sample alone in its class never varies
    return shares @ errors.T, np.einsum("rpb,cb->rcp", drawn, shares)


def _redrawn(rng: np.random.Generator, n: int, replicates: int) -> np.ndarray:
    """The weight of each of n samples in each replicate, (R, n), summing to n."""
    if n == 1:
        return np.ones((replicates, 1))
    return rng.multinomial(n - 1, np.full(n, 1 / n), size=replicates) * (n / (n - 1))


def _ratio(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.divide(mine, theirs, out=np.full(mine.shape, np.nan), where=theirs > 0)


def check_differences(differences: object) -> None:
    """Raise unless ``differences`` is a result of :func:`paired_differences`."""
    instance(xr.Dataset, differences=differences)
    assert isinstance(differences, xr.Dataset)
    missing = [name for name in (*_NUMBERS, "seeds", "metric", "region") if name not in differences]
    missing += [name for name in ("baseline", "level") if name not in differences.attrs]
    if missing:
        got = f"a dataset without {', '.join(missing)}"
        raise problem("differences must be a result of paired_differences", got=got, error=ResultsError)


def comparison_table(ds: xr.Dataset, differences: xr.Dataset) -> ResultsTable:
    """Mean and standard deviation over seeds for each compared column, the ratio to the baseline, and minutes.

    A cell is bold if the interval of the difference lies below 0, which means that the method is better than the
    baseline, and in italics if it lies above. The caption says so. ``results.tables.as_markdown`` and ``as_text`` lay
    the table out.

    Args:
        ds: the result that was compared.
        differences: its result of :func:`paired_differences`.
    Raises:
        ResultsError: ``differences`` is something else. ValueError: its methods are not those of ``ds``.
    """
    check_result(ds)
    check_differences(differences)
    methods, compared = ds["method"].values.tolist(), differences["method"].values.tolist()
    if set(methods) != set(compared):
        raise problem("differences must be of the methods of ds", got=f"{compared} and {methods}")
    metrics, regions = (differences[name].values.tolist() for name in ("metric", "region"))
    columns: Columns = list(zip(metrics, regions, strict=True))
    timed = bool(ds["minutes"].notnull().any())
    plain = results_table(ds, columns=[*columns, ("minutes", None)] if timed else columns)
    baseline = differences.attrs["baseline"]
    rows: list[list[str]] = []
    marks: dict[tuple[int, int], Mark] = {}
    for i, row in enumerate(plain.rows):
        part = differences.sel({"method": row[0]})
        cells = list(row)
        for j, ratio in enumerate(part["ratio"].values, 2):
            if row[0] != baseline and np.isfinite(ratio):
                cells[j] += f" (×{ratio:.2f})"
            if part["difference_high"].values[j - 2] < 0:
                marks[i, j] = "better"
            elif part["difference_low"].values[j - 2] > 0:
                marks[i, j] = "worse"
        rows.append(cells)
    caption = f"{plain.caption} {_explained(differences)}"
    return ResultsTable(caption, plain.header, plain.counts, rows, marks)


def _explained(differences: xr.Dataset) -> str:
    """A sentence on what brackets, bold and italics mean."""
    attrs = differences.attrs
    sentence = (
        f"In brackets: ratio to {attrs['baseline']}, over the seeds that both have. Bold: better than "
        f"{attrs['baseline']}; italics: worse; that is, the {100 * attrs['level']:g} % bootstrap interval of the "
        "paired difference excludes 0. Each interval stands by itself: of many, some exclude 0 by chance."
    )
    others = differences["method"] != attrs["baseline"]
    alone = differences["method"].values[((differences["seeds"] == 1) & others).values]
    if alone.size:
        sentence += f" With one shared seed an interval is of the test samples alone: {', '.join(alone)}."
    return sentence


def differences_csv(differences: xr.Dataset) -> str:
    """Differences as CSV, one line for each method and column. What is not known is empty.

    A name that a spreadsheet would take for a formula, such as ``=a+b``, gets an apostrophe in front.

    Raises:
        ResultsError: ``differences`` is not a result of :func:`paired_differences`.
    """
    check_differences(differences)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "baseline", "metric", "region", "seeds", *_NUMBERS])
    writer.writerows(_csv_rows(differences))
    return text.getvalue()


def _csv_rows(differences: xr.Dataset) -> Iterator[list[object]]:
    for method in differences["method"].values.tolist():
        part = differences.sel({"method": method})
        for j in range(differences.sizes["column"]):
            numbers = [float(part[name].values[j]) for name in _NUMBERS]
            head = [method, differences.attrs["baseline"], *(str(part[n].values[j]) for n in ("metric", "region"))]
            head = [f"'{text}" if text.startswith(_FORMULA) else text for text in head]
            yield [*head, int(part["seeds"]), *("" if np.isnan(x) else f"{x:.6g}" for x in numbers)]


def leading_methods(ds: xr.Dataset, baseline: str = "vanilla", *, most: int = 6) -> list[str]:
    """The baseline and the best methods, in the order of ``ds``, for figures without room for all.

    They are the method with the least mean bMAE over all, those with the least MAE in the few-shot region, over all and
    in the many-shot region, and then others by their bMAE. The constant predictor is never among them.

    Args:
        ds: a result of regression.
        most: the number of methods at most, with the baseline.
    Raises:
        ResultsError: ``ds`` is not of regression. ValueError: the baseline is unknown, or ``most`` is below 1.
    """
    check_result(ds, "mae", "bmae", kind="regression")
    methods = ds["method"].values.tolist()
    one_of("baseline", baseline, methods)
    whole("most", most, low=1)

    def ranked(metric: str, region: str) -> list[str]:
        means = ds[metric].sel(region=region).mean("seed").values
        return [methods[i] for i in np.argsort(means) if np.isfinite(means[i]) and methods[i] != BASELINE]

    by_bmae = ranked("bmae", "all")
    firsts = [method for region in ("few", "all", "many") for method in ranked("mae", region)[:1]]
    chosen = list(dict.fromkeys([baseline, *by_bmae[:1], *firsts, *by_bmae]))[:most]
    return [method for method in methods if method in chosen]
