"""The result of an experiment as one ``xarray.Dataset``: its parts and what each of them means.

Dimensions
    ``method``   the methods compared, as text, in the order given. ``sel`` has an argument of that name, so select with
                 ``ds.sel({"method": "lds"})``
    ``seed``     the seeds tried, int64, rising
    ``region``   ``all``, then ``many``, ``medium``, ``few`` and ``unseen``: parts of the label axis by training count
    ``bin``      int64, 0 ... B - 1: the bins of the label axis
    ``sample``   the test samples in the order of the test set, without a coordinate. A result has it only if it holds
                 predictions.

Coordinates along ``bin``
    ``bin_low``, ``bin_high``   float64, label units; a bin holds ``low <= label < high`` and touches the next one
    ``bin_center``              float64, label units; what a bin stands for when it is decoded
    ``bin_region``              text, one of the four regions

Variables, all measured on test data unless said otherwise
    A result holds at least one of the metrics that :mod:`dir_toolkit.metrics` declares, over (method, seed) and
    ``region``, ``bin`` or nothing else. Its unit and its range are those of the declaration; a share is stored as a
    number between 0 and 1. A result also holds

    ``count``, ``bins``    over (method, seed, region), int64: test samples, and bins that hold any
    ``bin_count``          over (method, seed, bin), int64: test samples
    ``train_count``        over (method, seed, bin), int64: training samples
    ``minutes``            over (method, seed), float64: time spent training
    ``best_epoch``         over (method, seed), float64 (a whole number), from 1: the epoch chosen on validation data
    ``completed``          over (method, seed), int8: 1 for a finished run, 0 for one that is missing

    A result of regression may hold its samples:

    ``target``             over (sample) alone, float32 or float64, label units: every run saw the same samples
    ``prediction``         over (method, seed, sample), float32, label units. It is there if ``target`` is.
    ``lower``, ``upper``   over (method, seed, sample), float32, label units: an interval that is meant to hold the
                           label with the probability in their attribute ``interval_level``. Both are there or neither.

    Other variables may stand beside these, over the same dimensions and with units.

Units
    Every variable, and every coordinate in label units, has a ``units`` attribute: ``label_units`` or their square,
    ``min`` for ``minutes``, and ``1`` for a number without a unit.

Counts and NaN
    A float is NaN where there is nothing to say and nowhere else: in regions and bins without test samples (count 0);
    in a missing run, all of whose counts are 0; where a metric declares that it may be unknown, as ``pearson`` is if
    predictions or labels do not vary, ``coverage`` if a method gives no intervals, and ``bin_precision`` if a bin was
    never predicted (a bin that was predicted but has no test samples has precision 0); in a number per run that a
    method does not have, such as the ``minutes`` of a constant predictor; in ``prediction`` if a run kept none; and in
    ``lower`` and ``upper`` if a method gives no interval. A run has predictions and intervals for all samples or for
    none. No number is infinite. Counts over regions add up to ``all``, and counts over bins to their regions. A run
    that has predictions was tested on ``target``: its counts are those of these labels, and its MAE over all is theirs,
    to a thousandth of the label axis.

Attributes
    ``title``, ``created`` (ISO 8601, with its time zone), ``dir_toolkit_version``, ``command``, ``label_name`` and
    ``label_units``, all of them text. Any others are text or numbers.

In a file
    A result is written through xarray's scipy engine as NetCDF-3, whole or not at all. NetCDF-3 has no int64: whole
    numbers are int32 in the file and int64 again once loaded. Attributes that are neither text nor numbers are written
    as JSON and stay text.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from ... import __version__
from ..._checks import instance, problem, whole
from ..._files import naming, write_atomically
from ...errors import ResultsError
from ...labels.bins import Bins
from ...labels.density import REGIONS
from ...metrics._declared import METRICS
from ...metrics._metric import stored_unit

__all__ = ["ALL_REGIONS", "combine_runs", "load_results", "save_results", "validate_results"]

ALL_REGIONS = ("all", *REGIONS)

_RUN = ("method", "seed")
_DIMS = (*_RUN, "region", "bin")


class _Variable(NamedTuple):
    """What the schema asks of a variable: ``axis`` is the one besides method and seed, and ``kind`` that of its dtype;
    the rest is as a metric declares it."""

    axis: str
    kind: str = "f"
    unit: str = "1"
    low: float = -math.inf
    high: float = math.inf
    may_be_nan: bool = False
    at_empty: float = math.nan


_COUNTS = {"count": "region", "bins": "region", "bin_count": "bin", "train_count": "bin"}
_COMMON = {
    **{name: _Variable(axis, "i", low=0) for name, axis in _COUNTS.items()},
    "minutes": _Variable("", unit="min"),
    "best_epoch": _Variable(""),
    "completed": _Variable("", "i", low=0, high=1),
}
_BY_SAMPLE = dict.fromkeys(("target", "prediction", "lower", "upper"), _Variable("sample", unit="label"))
_VARIABLES = {
    **{
        name: _Variable(m.variables[name], "f", m.unit, m.low, m.high, m.may_be_nan, m.at_empty)
        for name, m in METRICS.items()
    },
    **_COMMON,
    **_BY_SAMPLE,
}
_COORDS = {"bin_low": "f", "bin_high": "f", "bin_center": "f", "bin_region": "U"}
_KINDS = {"f": "floats", "i": "whole numbers", "U": "text"}
_TEXTS = ("title", "created", "dir_toolkit_version", "command", "label_name", "label_units")


def combine_runs(
    runs: Mapping[tuple[str, int], xr.Dataset],
    *,
    title: str,
    command: str,
    label_name: str,
    label_units: str,
    attrs: Mapping[str, object] | None = None,
) -> xr.Dataset:
    """One result from the runs of several methods and seeds.

    Args:
        runs: by (method, seed), the datasets that the metrics gave. They have variables over ``region`` and ``bin``,
            and may have ``minutes``, ``best_epoch`` and others without a dimension. These are NaN in runs that lack
            them, and so are metrics that may be unknown, as ``coverage`` is. They may also hold ``target``,
            ``prediction``, ``lower`` and ``upper`` over ``sample``. A part of an earlier result,
            ``result.sel({"method": ..., "seed": ...})``, is such a run, too. Combinations that are not given become
            missing runs.
        command: what a reader would type to get the same result.
        label_units: what the unit "label" of the metrics stands for.
        attrs: further provenance, such as versions, devices and digests of the data.
    Raises:
        ResultsError: runs differ in their bins or variables, or the result breaks the schema. It names every fault.
        TypeError: a key is not a pair of a text and a whole number, or a run is not a Dataset.
    """
    instance(Mapping, runs=runs)
    if attrs is not None:
        instance(Mapping, attrs=attrs)
    if not runs:
        raise problem("runs must hold at least one run", got="none", error=ResultsError)
    for key, run in runs.items():
        if not isinstance(key, tuple) or len(key) != 2:
            raise problem("runs must be given by (method, seed)", got=repr(key), error=TypeError)
        instance(str, method=key[0])
        whole("seed", key[1])
        instance(xr.Dataset, **{f"runs[{key!r}]": run})
    first = next(iter(runs.values()))
    examples = {str(name): run.variables[name] for run in reversed(list(runs.values())) for name in run.data_vars}
    faults = [f"{key}: {fault}" for key, run in runs.items() for fault in _misfits(run, first, examples)]
    if faults:
        raise _all_of("every run must have the same axes and variables", faults)
    methods = list(dict.fromkeys(method for method, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    sizes = {"method": len(methods), "seed": len(seeds), **first.sizes}
    sizes |= {"sample": examples["target"].size} if "target" in examples else {}
    variables: dict[str, Any] = {}
    for name in dict.fromkeys([*map(str, first.data_vars), *examples, "minutes", "best_epoch", "completed"]):
        example = examples.get(name, xr.Variable((), np.nan))
        if name == "target":
            labels = example.values.astype(np.float32 if example.dtype == np.float32 else np.float64)
            variables[name] = ("sample", labels, {"units": "label", **example.attrs})
            continue
        dims = (*_RUN, *example.dims)
        counted = _kind(name, example) == "i" and (name in _VARIABLES or all(name in run for run in runs.values()))
        kind = np.int64 if counted else np.float32 if name in _BY_SAMPLE else np.float64
        values = np.full([sizes[d] for d in dims], 0 if counted else np.nan, dtype=kind)
        for (method, seed), run in runs.items():
            if name in run:
                values[methods.index(method), seeds.index(seed)] = run.variables[name].values
            elif name == "completed":
                values[methods.index(method), seeds.index(seed)] = 1
        declared = {"units": _VARIABLES[name].unit} if name in _VARIABLES else {}
        values = values.astype(np.int8) if name == "completed" else values
        variables[name] = (dims, values, {**declared, **example.attrs})
    axes = {name: first.variables[name] for name in ("region", "bin", *_COORDS)}
    result = xr.Dataset(
        variables,
        coords={
            "method": np.array(methods, dtype=str),
            "seed": np.array(seeds, dtype=np.int64),
            **{name: (axis.dims, axis.values, axis.attrs) for name, axis in axes.items()},
        },
        attrs={
            "title": title,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "dir_toolkit_version": __version__,
            "command": command,
            "label_name": label_name,
            "label_units": label_units,
            **(attrs or {}),
        },
    )
    for variable in result.variables.values():
        if "units" in variable.attrs:
            variable.attrs["units"] = stored_unit(variable.attrs["units"], label_units)
    validate_results(result)
    return result


def _misfits(run: xr.Dataset, first: xr.Dataset, examples: Mapping[str, xr.Variable]) -> Iterator[str]:
    """The faults that keep a run from being combined with the first one, and with the first that has each variable."""
    for name in ("region", "bin", *_COORDS):
        if name not in run.coords:
            yield f"coordinate {name!r} is missing"
        elif name in first.coords and not np.array_equal(run.variables[name].values, first.variables[name].values):
            yield f"coordinate {name!r} differs from the first run's"
    for name in sorted(map(str, set(run.data_vars) ^ set(first.data_vars))):
        known = _VARIABLES.get(name, _Variable(""))
        if examples[name].dims and name not in _BY_SAMPLE and not known.may_be_nan:  # others may be missing
            yield f"{name!r} is in {'this' if name in run else 'the first'} run only"
    for name in sorted(map(str, run.data_vars)):
        dims, dtype = run.variables[name].dims, run.variables[name].dtype
        if dims != examples[name].dims:
            yield f"{name!r} is over {dims}, in the first run that has it over {examples[name].dims}"
        if _kind(name, examples[name]) == "i" and dtype.kind not in "iub":
            yield f"{name!r} must be whole numbers, got {dtype}"
    for name in [name for name in _BY_SAMPLE if name in run]:
        example = examples[name]
        if run.variables[name].dims == example.dims and run.variables[name].shape != example.shape:
            yield f"{name!r} has {run.variables[name].size} samples, in the first run that has it {example.size}"
        elif name == "target" and not np.array_equal(run.variables[name].values, example.values):
            yield "'target' differs from that of the first run that has it: predictions must be in one order"
        if name != "target" and "target" not in run:
            yield f"{name!r} must stand beside 'target'"
        level, other = (array.attrs.get("interval_level") for array in (run.variables[name], example))
        if level != other:
            yield f"{name!r} has interval_level {level}, in the first run that has it {other}"


def _kind(name: str, example: xr.Variable) -> str:
    """The kind of dtype that the schema asks of a variable, or its own if the schema does not know it."""
    return _VARIABLES[name].kind if name in _VARIABLES else "i" if example.dtype.kind in "iub" else "f"


def validate_results(ds: xr.Dataset) -> None:
    """Check a result against the schema that this module's documentation writes down.

    Raises:
        ResultsError: names every fault, not the first alone. TypeError: ``ds`` is not a Dataset.
    """
    instance(xr.Dataset, ds=ds)
    faults = list(_faults(ds))
    if faults:
        raise _all_of("ds must follow the schema of dir_toolkit.experiment.results.schema", faults)


def check_result(ds: xr.Dataset, *names: str, kind: str = "") -> None:
    """Raise unless ``ds`` has what each result has, and ``names``, which one of this kind has.

    What makes, writes or reads a result checks all of it. What is given one asks only for what it needs.
    """
    instance(xr.Dataset, ds=ds)
    missing = [name for name in (*_DIMS, "bin_region", "count", "completed", *names) if name not in ds.variables]
    if missing:
        rule = f"ds must be a result{f' of {kind}' if kind else ''}"
        raise problem(
            rule, got=f"one without {missing[0]!r}", fix="Use combine_runs or load_results.", error=ResultsError
        )


def _all_of(rule: str, faults: list[str]) -> Exception:
    listed = "".join(f"\n  - {fault}" for fault in faults)
    return problem(rule, got=f"{len(faults)} fault{'s' * (len(faults) > 1)}:{listed}", error=ResultsError)


def _faults(ds: xr.Dataset) -> Iterator[str]:
    """Every fault of a result, in words."""
    for name in _TEXTS:
        if not isinstance(ds.attrs.get(name), str):
            yield f"attribute {name!r} must be text, got {ds.attrs.get(name)!r}"
    if isinstance(ds.attrs.get("created"), str) and not _is_moment(ds.attrs["created"]):
        yield f"attribute 'created' must be an ISO 8601 time with its zone, got {ds.attrs['created']!r}"
    missing = [name for name in _DIMS if name not in ds.dims or name not in ds.coords]
    for name in missing:
        yield f"dimension {name!r} with its coordinate is missing"
    empty = [name for name in (*_DIMS, "sample") if name not in missing and ds.sizes.get(name) == 0]
    for name in empty:
        yield f"dimension {name!r} must not be empty"
    if missing or empty:
        return
    yield from _axis_faults(ds)
    if METRICS.keys().isdisjoint(ds.data_vars):
        yield "variables must hold a metric that dir_toolkit.metrics declares, got none"
    sound: set[str] = set()
    for name in dict.fromkeys([*_COMMON, *map(str, ds.data_vars)]):
        faults = list(_variable_faults(ds, name))
        yield from faults
        if not faults:
            sound.add(name)
    if tuple(ds.variables["region"].values) == ALL_REGIONS:
        yield from _number_faults(ds, sound)
        yield from _sample_faults(ds, sound)


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _axis_faults(ds: xr.Dataset) -> Iterator[str]:
    """Faults of the coordinates."""
    if tuple(ds.variables["region"].values) != ALL_REGIONS:
        yield f"coordinate 'region' must be {ALL_REGIONS}, got {tuple(map(str, ds.variables['region'].values))}"
    if not np.array_equal(ds.variables["bin"].values, np.arange(ds.sizes["bin"])):
        yield f"coordinate 'bin' must be 0 ... {ds.sizes['bin'] - 1}"
    seeds = ds.variables["seed"].values
    if seeds.dtype.kind != "i" or (np.diff(seeds) <= 0).any():
        yield f"coordinate 'seed' must be rising whole numbers, got {seeds.tolist()}"
    methods = ds.variables["method"].values
    if not all(isinstance(m, str) for m in methods) or len(set(methods)) < len(methods):
        yield f"coordinate 'method' must be text without repeats, got {methods.tolist()}"
    sound = set()
    for name, kind in _COORDS.items():
        if name not in ds.coords or ds.variables[name].dims != ("bin",):
            yield f"coordinate {name!r} over ('bin',) is missing"
        elif not _of_kind(ds.variables[name], kind):
            yield f"coordinate {name!r} must be {_KINDS[kind]}, got {ds.variables[name].dtype}"
        else:
            sound.add(name)
            units, expected = ds.variables[name].attrs.get("units"), ds.attrs.get("label_units")
            if kind == "f" and units != expected:
                yield f"coordinate {name!r} must have units {expected!r}, got {units!r}"
    if {"bin_low", "bin_high", "bin_center"} <= sound:
        low, high, center = (ds.variables[name].values for name in ("bin_low", "bin_high", "bin_center"))
        if not _sound_edges(ds):
            yield "bin edges must be finite and rising, each bin starting where the last one ends"
        elif not ((low <= center) & (center <= high)).all():
            yield "coordinate 'bin_center' must lie within its bin"
    if "bin_region" in sound and not set(ds.variables["bin_region"].values) <= set(REGIONS):
        unknown = sorted(set(map(str, ds.variables["bin_region"].values)) - set(REGIONS))
        yield f"coordinate 'bin_region' must be of {REGIONS}, got {unknown}"


def _of_kind(array: xr.Variable, kind: str) -> bool:
    if kind == "U":
        return all(isinstance(value, str) for value in array.values.ravel())
    return array.dtype.kind == kind


def _variable_faults(ds: xr.Dataset, name: str) -> Iterator[str]:
    """Faults of one variable because of which its numbers are not checked."""
    if name not in ds.data_vars:
        yield f"variable {name!r} is missing"
        return
    array, asked = ds.variables[name], _VARIABLES.get(name)
    allowed: set[tuple[str, ...]] = {_RUN, (*_RUN, "region"), (*_RUN, "bin")}
    if asked:
        allowed = {("sample",) if name == "target" else _RUN + ((asked.axis,) if asked.axis else ())}
    if array.dims not in allowed:
        yield f"variable {name!r} must be over {' or '.join(map(str, sorted(allowed)))}, got {array.dims}"
    if array.dtype.kind not in (asked.kind if asked else "fi"):
        yield f"variable {name!r} must be {_KINDS[asked.kind] if asked else 'numbers'}, got {array.dtype}"
    units, expected = array.attrs.get("units"), asked and stored_unit(asked.unit, str(ds.attrs.get("label_units")))
    if not isinstance(units, str) or (expected and units != expected):
        yield f"variable {name!r} must have units{f' {expected!r}' if expected else ''}, got {units!r}"


def _number_faults(ds: xr.Dataset, sound: set[str]) -> Iterator[str]:
    """Faults in the values of the variables whose form is sound."""
    for name in sorted(sound):
        array, asked = ds.variables[name], _VARIABLES.get(name, _Variable(""))
        if array.dtype.kind == "f" and np.isinf(array.values).any():
            yield f"variable {name!r} must be finite or NaN"
        elif name != "completed" and ((array.values < asked.low) | (array.values > asked.high)).any():
            kind = (
                "not be negative"
                if (asked.low, asked.high) == (0, math.inf)
                else f"lie in [{asked.low:g}, {asked.high:g}]"
            )
            yield f"variable {name!r} must {kind}, got values from {array.min().item():g} to {array.max().item():g}"
        if array.dtype.kind == "f":
            yield from _missing_faults(ds, sound, name)
    yield from _sum_faults(ds, sound)


def _missing_faults(ds: xr.Dataset, sound: set[str], name: str) -> Iterator[str]:
    """Faults of one variable in where it is NaN."""
    dims, values, asked = ds.variables[name].dims, ds.variables[name].values, _VARIABLES.get(name)
    known = ~np.isnan(values)
    at_empty = asked.at_empty if asked else math.nan
    for axis, count in (("region", "count"), ("bin", "bin_count")):
        if axis not in dims or count not in sound:
            continue
        empty = ds.variables[count].values == 0
        if (empty & known & (values != at_empty)).any():
            allowed = "NaN" if math.isnan(at_empty) else f"{at_empty:g} or NaN"
            yield f"variable {name!r} must be {allowed} where {count!r} is 0"
        if asked and not asked.may_be_nan and (~empty & ~known).any():
            yield f"variable {name!r} must not be NaN where {count!r} is above 0"
    by_run = dims == _RUN or not math.isnan(at_empty)  # counts say nothing about these
    if by_run and "completed" in sound and known[ds.variables["completed"].values == 0].any():
        yield f"variable {name!r} must be NaN where 'completed' is 0"


def _sum_faults(ds: xr.Dataset, sound: set[str]) -> Iterator[str]:
    """Faults of counts beside each other, and beside the runs that were completed."""
    values = {name: ds.variables[name].values for name in sound}
    for name in ("count", "bins"):
        if name in sound and (values[name][..., 0] != values[name][..., 1:].sum(-1)).any():
            yield f"variable {name!r} over the regions must add up to 'all'"
    if {"count", "bin_count"} <= sound and "bin_region" in ds.coords and ds.variables["bin_region"].dims == ("bin",):
        for region in REGIONS:
            here, place = (ds.variables["bin_region"] == region).values, ALL_REGIONS.index(region)
            if (values["bin_count"][..., here].sum(-1) != values["count"][..., place]).any():
                yield f"variable 'bin_count' over the bins of region {region!r} must add up to 'count'"
    if "completed" not in sound:
        return
    completed = values["completed"]
    if not np.isin(completed, [0, 1]).all():
        yield "variable 'completed' must be 0 or 1"
    for name in (name for name in _COUNTS if name in sound):
        if values[name][completed == 0].any():
            yield f"variable {name!r} must be 0 where 'completed' is 0"
    if "count" in sound and (values["count"][completed == 1, 0] == 0).any():
        yield "variable 'count' must be above 0 where 'completed' is 1"


def _sample_faults(ds: xr.Dataset, sound: set[str]) -> Iterator[str]:
    """Faults of predictions and intervals. They show if samples are not in the order of ``target``."""
    held = [name for name in _BY_SAMPLE if name in ds.data_vars]
    for one, other in (("target", "prediction"), ("lower", "upper")):
        if (one in held) != (other in held):
            yield f"variables {one!r} and {other!r} must be given both or neither"
    if "lower" in held and "prediction" not in held:
        yield "variables 'lower' and 'upper' must stand beside 'prediction'"
    if "prediction" in held and "mae" not in ds:
        yield "variable 'prediction' must be in a result of regression"
    levels = [ds.variables[name].attrs.get("interval_level") for name in ("lower", "upper") if name in held]
    if levels and not (isinstance(levels[0], (int, float)) and 0 < levels[0] < 1 and levels[0] == levels[-1]):
        yield f"variables 'lower' and 'upper' must have one interval_level between 0 and 1, got {levels}"
    needed = {"target", "prediction", "mae", "count", "bin_count", "completed"}
    edges = (
        np.append(ds.variables["bin_low"].values, ds.variables["bin_high"].values[-1:]) if _sound_edges(ds) else None
    )
    if not needed <= sound or edges is None:
        return
    target = ds.variables["target"].values
    if not np.isfinite(target).all() or (place := Bins.from_edges(edges).index(target, "drop")).min() < 0:
        yield "variable 'target' must be finite and on the label axis"
        return
    runs = {}
    for name in ("prediction", "lower", "upper"):
        if name in sound:
            finite = np.isfinite(ds.variables[name].values)
            runs[name] = finite.all(-1)
            if (finite.any(-1) != runs[name]).any():
                yield f"variable {name!r} must be finite for all samples of a run, or NaN for all"
    known = runs["prediction"]
    if (known & (ds.variables["completed"].values != 1)).any():
        yield "variable 'prediction' must be NaN where 'completed' is 0"
    if (ds.variables["bin_count"].values[known] != np.bincount(place, minlength=ds.sizes["bin"])).any():
        yield "variable 'bin_count' must count the labels in 'target' in every run that has predictions"
    errors = np.array(
        [np.abs(row.astype(np.float64) - target).mean() for row in ds.variables["prediction"].values[known]]
    )
    off = np.abs(errors - ds.variables["mae"].values[..., 0][known])
    if (off > 1e-3 * (edges[-1] - edges[0])).any():
        yield f"variable 'mae' over all must be that of 'prediction' and 'target', is off by up to {np.nanmax(off):g}"
    if {"lower", "upper"} <= runs.keys():
        if (runs["lower"] != runs["upper"]).any() or (runs["lower"] & ~known).any():
            yield "variables 'lower' and 'upper' must be NaN in the same runs, and where 'prediction' is"
        elif (ds.variables["lower"].values[runs["lower"]] > ds.variables["upper"].values[runs["lower"]]).any():
            yield "variable 'lower' must not be above 'upper'"


def _sound_edges(ds: xr.Dataset) -> bool:
    """Whether the bins can be built again from their edges."""
    if not all(name in ds.coords and ds.variables[name].dims == ("bin",) for name in ("bin_low", "bin_high")):
        return False
    low, high = ds.variables["bin_low"].values, ds.variables["bin_high"].values
    if low.dtype.kind != "f" or high.dtype.kind != "f":
        return False
    return bool(np.isfinite([low, high]).all() and (low < high).all() and np.array_equal(low[1:], high[:-1]))


def save_results(ds: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a result to a NetCDF-3 file, whole or not at all.

    Raises:
        ResultsError: ``ds`` breaks the schema, a whole number does not fit 32 bits, or NetCDF-3 cannot hold something
        that stands beside the schema. TypeError: ``ds`` is not a Dataset.
    """
    validate_results(ds)
    faults = []
    for name, array in ds.variables.items():
        if array.dtype.kind == "i" and array.size and np.abs(array.values.astype(np.float64)).max() >= 2**31:
            faults.append(f"{name!r} holds {max(array.values.ravel(), key=abs)}, beyond the 32 bits of NetCDF-3")
    if faults:
        raise _all_of("whole numbers must fit 32 bits", faults)
    narrow = ds.assign({n: a.astype(np.int32) for n, a in ds.data_vars.items() if a.dtype == np.int64})
    narrow = narrow.assign_coords({n: ds[n].astype(np.int32) for n in ("seed", "bin")})
    narrow.attrs = {str(name): _plain(value) for name, value in ds.attrs.items()}
    try:
        content = narrow.to_netcdf(engine="scipy")
    except (ValueError, TypeError) as error:
        rule = "what stands beside the schema must fit NetCDF-3"
        raise problem(rule, got=str(error), error=ResultsError) from error
    with naming(path):
        write_atomically(path, lambda file: file.write(content))


def _plain(value: object) -> str | float:
    """An attribute as NetCDF-3 can hold it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31):
        return value
    return json.dumps(value, default=str)


def load_results(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a result into memory and check it.

    Raises:
        ResultsError: the file is damaged or is not a result. FileNotFoundError: there is no such file.
    """
    content = Path(path).read_bytes()
    shown = os.fspath(path)
    try:
        # units may be "days" or "days since ...", which xarray would otherwise turn into durations and dates.
        with xr.open_dataset(io.BytesIO(content), engine="scipy", decode_times=False) as file:
            ds = file.load()
    except Exception as error:  # scipy answers a damaged file with nearly any exception
        raise problem(
            f"{shown} must be a whole NetCDF-3 file",
            got=f"{type(error).__name__}: {error}",
            fix="Remove it and run again.",
            error=ResultsError,
        ) from error
    ds.attrs = {name: value.item() if isinstance(value, np.generic) else value for name, value in ds.attrs.items()}
    wide: dict[Any, Any] = {n: a.astype(np.int64) for n, a in ds.data_vars.items() if a.dtype == np.int32}
    ds = ds.assign(wide).assign_coords({n: a.astype(np.int64) for n, a in ds.coords.items() if a.dtype == np.int32})
    faults = list(_faults(ds))
    if faults:
        raise _all_of(f"{shown} must follow the schema of dir_toolkit.experiment.results.schema", faults)
    return ds
