"""Series: the air of Beijing by the hour, and turbofan engines that run to their failure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..._checks import number, one_of, whole
from ._checks import data_error, require_data
from .images import Splits
from .rows import columns_of, find_file, has_columns, lines_of, number_of, numbers_of, splits_of_rows

__all__ = ["BEIJING_FEATURES", "beijing", "cmapss"]

_WEATHER = ("TEMP", "PRES", "DEWP", "RAIN", "WSPM")
BEIJING_FEATURES = (*_WEATHER, "wind east", "wind north", "hour sine", "hour cosine", "year sine", "year cosine")
"""What each hour of :func:`beijing` holds: degrees Celsius, hPa, degrees Celsius, mm, m/s, and unit circles."""
_NUMERIC = ("PM2.5", "year", "month", "day", "hour", *_WEATHER)
_WINDS = ("N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW")
_TEST_FROM = 366 * 24  # hours before the end
_VAL_SHARE = 0.2  # of the hours before it, the last of which validate

_CELLS = 26  # of a line: the engine, the cycle, 3 settings, 21 sensors
_MOST, _MOST_ENGINES = float(np.finfo(np.float32).max), 2**31
_EVERY = 5  # the engine of every fifth number validates


def beijing(root: str | os.PathLike[str], station: str = "Aotizhongxin", *, hours: int = 24) -> Splits:
    """The fine dust (PM2.5) of an hour in Beijing, from the weather of this hour and of those before it.

    The recording runs from March 2013 to February 2017. Its last 366 days are the test, and of the rest the last fifth
    is for validation. A window begins no earlier than the part it belongs to. A missing measurement of the weather is
    filled by the last one before it. An hour without a label is left out and counted, and so is one whose window would
    reach over hours that the file lacks.

    Args:
        root: the folder of the file ``PRSA_Data_<station>_20130301-20170228.csv``, or ``beijing_<station>.csv`` in
            lower case, packed with gzip or not.
        station: the name of the station. Between stations the distribution shifts naturally.
        hours: the length of a window, which ends with the hour of the label.
    Returns:
        Splits with inputs (M, hours, 11) float32, whose features are ``BEIJING_FEATURES``, as a read-only view of
        the series, and labels in µg/m³. ``skipped`` counts hours ``"without label"`` and ``"after a gap"``.
    Raises:
        DataError: the file is missing or damaged, lacks a column, is too short, or holds an hour that does not exist.
    Source:
        Zhang et al. 2017, Cautionary tales on air-quality improvement in Beijing (doi 10.1098/rspa.2017.0457).
    """
    hours = whole("hours", hours, low=1)
    names = (f"PRSA_Data_{station}_20130301-20170228.csv", f"beijing_{station.lower()}.csv")
    path = find_file(root, *names, card="beijing")
    columns = columns_of(path)
    has_columns(columns, (*_NUMERIC, "wd"), path)
    gaps = dict.fromkeys(("PM2.5", *_WEATHER), ("NA",))
    cells = {name: numbers_of(columns[name], name, path, missing=gaps.get(name, ())) for name in _NUMERIC}
    angle = np.array([_WINDS.index(wind) / 16 if wind in _WINDS else np.nan for wind in columns["wd"]]) * 2 * np.pi
    clock = 2 * np.pi * cells["hour"] / 24
    season = 2 * np.pi * (30.44 * (cells["month"] - 1) + cells["day"]) / 365.25
    waves = [wave(x) for x in (angle, clock, season) for wave in (np.sin, np.cos)]
    series = np.stack([_filled(row) for row in (*(cells[name] for name in _WEATHER), *waves)], axis=1)
    windows = _windows(series.astype(np.float32), hours)  # (M, hours, F); window i ends with hour i + hours - 1
    label = cells["PM2.5"][hours - 1 :]
    test = len(series) - _TEST_FROM
    val = int(test * (1 - _VAL_SHARE))
    require_data(val > 0, f"the file must hold more than {_TEST_FROM + 1} hours", got=len(series), source=path)
    spans = ((0, val), (val, test), (test, len(series)))
    parts = [np.arange(first, max(first, last - hours + 1)) for first, last in spans]
    time = _hour_numbers(cells, path)
    breaks = np.concatenate([[0], (np.diff(time) != 1).cumsum()])
    unbroken = breaks[hours - 1 :] == breaks[: max(0, len(breaks) - hours + 1)]
    known = [rows[np.isfinite(label[rows])] for rows in parts]
    complete = [rows[unbroken[rows]] for rows in known]
    total, labelled, used = (sum(map(len, some)) for some in (parts, known, complete))
    skipped = {"without label": total - labelled, "after a gap": labelled - used}
    skipped = {why: count for why, count in skipped.items() if count}
    return splits_of_rows(windows, label, *complete, path=path, source=f"beijing_{station.lower()}", skipped=skipped)


def cmapss(root: str | os.PathLike[str], *, cycles: int = 30, cap: float = 125.0, part: str = "FD001") -> Splits:
    """The cycles that a turbofan engine has left before it fails, from its readings in the last cycles (C-MAPSS).

    Each cycle of a training engine, from the first with a full window on, is a sample. Engines whose number is
    divisible by five are for validation, and the others for training. A test engine is cut short, and its last window
    is a sample.

    Args:
        root: the folder of ``train_FD001.txt``, ``test_FD001.txt`` and ``RUL_FD001.txt``, or of the same with
            ``cmapss_`` before the name, packed with gzip or not.
        cycles: the length of a window, which ends with the cycle of the label. If an engine has fewer cycles, its first
            one is repeated in front.
        cap: the largest label. Higher ones are cut, as usual, since an engine in good order shows no sign of its end.
        part: one of the four sets of the source, ``"FD001"`` to ``"FD004"``.
    Returns:
        Splits with inputs (M, cycles, 24) float32, three settings and 21 sensors, and labels in cycles.
    Raises:
        DataError: a file is missing or damaged, a line has other than 26 numbers, an engine's number is not whole,
            cycles do not count from 1 up, or the remaining lives are negative or not one per test engine.
    Source:
        Saxena et al. 2008, Damage propagation modeling for aircraft engine run-to-failure simulation.
    """
    cycles, cap = whole("cycles", cycles, low=1), number("cap", cap, low=0, open_low=True)
    one_of("part", part, ("FD001", "FD002", "FD003", "FD004"))
    files = [f"{name}_{part}.txt" for name in ("train", "test", "RUL")]
    train_path, test_path, rest_path = (find_file(root, name, f"cmapss_{name}", card="cmapss") for name in files)
    engines, cut = _engines(train_path), _engines(test_path)
    lives = [_line_of_numbers(line, 1, f"{rest_path}, line {i + 1}")[0] for i, line in _data_lines(rest_path, "RUL")]
    got = f"{len(lives)} lives for {len(cut)} engines, the least {min(lives, default=0):g}"
    rule = f"the lives must be >= 0, and as many as the engines in {test_path.name}"
    require_data(len(lives) == len(cut) and min(lives, default=0) >= 0, rule, got=got, source=rest_path)
    inputs, labels, owner = [], [], []
    for engine, readings in engines.items():
        windows = _windows(_lengthened(readings, cycles), cycles)
        inputs.append(windows)
        labels.append(np.arange(len(windows) - 1, -1, -1))
        owner.append(np.full(len(windows), engine))
    inputs += [_windows(_lengthened(readings, cycles), cycles)[-1:] for readings in cut.values()]
    label, engine_of = np.concatenate([*labels, lives]), np.concatenate(owner)
    val = engine_of % _EVERY == 0
    rows = (np.flatnonzero(~val), np.flatnonzero(val), np.arange(len(engine_of), len(label)))
    return splits_of_rows(
        np.concatenate(inputs), label.clip(max=cap), *rows, path=train_path, source=f"cmapss_{part.lower()}"
    )


def _hour_numbers(columns: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """The hours since 1970 of rows with a year, a month, a day and an hour."""
    given = np.stack([columns[name] for name in ("year", "month", "day", "hour")])
    year, month, day, hour = np.clip(given, 0, 9999).astype(np.int64)
    months = (12 * (year - 1970) + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    exists = (year >= 1) & (month >= 1) & (month <= 12) & (days.astype("datetime64[M]") == months) & (hour <= 23)
    for row in np.flatnonzero(~exists | (given != (year, month, day, hour)).any(0))[:1]:
        got = ", ".join(f"{value:g}" for value in given[:, row])
        raise data_error("year, month, day and hour must exist", got=got, source=f"{path}, row {row + 1}")
    return 24 * days.astype(np.int64) + hour


def _windows(series: np.ndarray, length: int) -> np.ndarray:
    """(T - length + 1, length, F), a read-only view of a series (T, F)."""
    if len(series) < length:
        return np.empty((0, length, series.shape[1]), series.dtype)
    return np.lib.stride_tricks.sliding_window_view(series, length, axis=0).swapaxes(1, 2)


def _filled(row: np.ndarray) -> np.ndarray:
    """A row whose gaps hold the last value before them; a gap at the start holds the first value."""
    known = np.isfinite(row)
    if not known.any():
        return np.zeros_like(row)
    last = np.maximum.accumulate(np.where(known, np.arange(len(row)), known.argmax()))
    return row[last]


def _engines(path: Path) -> dict[int, np.ndarray]:
    """The readings (T, 24) of each engine by its number."""
    readings: dict[int, list[np.ndarray]] = {}
    for i, line in _data_lines(path, "unit_number"):
        place = f"{path}, line {i + 1}"
        engine, cycle, *values = _line_of_numbers(line, _CELLS, place)
        is_number = engine % 1 == 0 and 0 <= engine < _MOST_ENGINES
        require_data(is_number, "an engine must have a whole number from 0 on", got=f"{engine:g}", source=place)
        rows = readings.setdefault(int(engine), [])
        rule = f"engine {int(engine)} must go on with cycle {len(rows) + 1}"
        require_data(cycle == len(rows) + 1, rule, got=f"cycle {cycle:g}", source=place)
        rows.append(np.array(values, np.float32))
    require_data(len(readings) > 0, "the file must hold an engine", got="none", source=path)
    return {engine: np.stack(rows) for engine, rows in readings.items()}


def _data_lines(path: Path, heading: str) -> list[tuple[int, str]]:
    """The lines that hold something, by their places; one that names the columns is left out."""
    return [(i, line) for i, line in enumerate(lines_of(path)) if line.strip() and not line.startswith(heading)]


def _line_of_numbers(line: str, count: int, place: str) -> list[float]:
    try:
        values = [number_of(cell) for cell in line.split()]
    except ValueError as error:
        raise data_error("a line must hold numbers", got=error, source=place) from None
    require_data(len(values) == count, f"a line must hold {count} numbers", got=len(values), source=place)
    finite = all(abs(value) <= _MOST for value in values)  # in float32, too
    require_data(finite, "a line must hold finite numbers", got=values, source=place)
    return values


def _lengthened(readings: np.ndarray, cycles: int) -> np.ndarray:
    short = max(0, cycles - len(readings))
    return np.concatenate([np.repeat(readings[:1], short, axis=0), readings])
