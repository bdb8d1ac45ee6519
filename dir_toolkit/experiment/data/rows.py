"""Text files of rows, packed or not: CSV tables by column, and common parts of the readers of such files."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..._checks import whole
from ..._home import HOME
from ._checks import data_error
from .images import SampleSet, Splits

__all__ = [
    "columns_of", "find_file", "has_columns", "lines_of", "number_of", "numbers_of", "rows_of", "seeded_splits",
    "splits_of_rows",
]  # fmt: skip

_MOST_BYTES = 4 * 2**30  # of one file once it is unpacked
_PIECE = 2**24  # bytes read at a time


def find_file(root: str | os.PathLike[str], *names: str, card: str) -> Path:
    """The first of some files, packed with gzip or not, that lies in a folder.

    Raises:
        DataError: none of them is there.
    """
    for name in names:
        for path in (Path(root, name), Path(root, f"{name}.gz")):
            if path.is_file():
                return path
    rule = f"root must be a folder that holds {' or '.join(names)}, packed with gzip or not"
    raise data_error(rule, got=root, fix=f"{HOME / 'data_cards' / card}.md tells where to get it.")


def lines_of(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without their ends. A file that begins as gzip does is unpacked.

    Raises:
        DataError: the file cannot be read, is damaged or cut short, or is not text in UTF-8.
    """
    return [line.removesuffix("\r") for line in _text_of(path).removesuffix("\n").split("\n")]


def columns_of(path: str | os.PathLike[str], *, delimiter: str = ",", quoted: bool = True) -> dict[str, list[str]]:
    """The columns of a CSV file by the names in its first line, as text.

    Args:
        path: in UTF-8, with or without a byte-order mark, packed with gzip or not.
        quoted: whether cells may stand in double quotes.
    Raises:
        DataError: the file cannot be read, is damaged or cut short, or holds no row; or a name occurs twice, or a row
            has another number of cells than the first line. The error names the line.
    """
    path = Path(path)
    first, *rows = [row for _, row in rows_of(path, delimiter=delimiter, quoted=quoted)]
    names = [name.strip() for name in first]
    if twice := {name for name in names if names.count(name) > 1}:
        raise data_error("a column name must occur once", got=repr(min(twice)), source=f"{path}, line 1")
    if not rows:
        raise data_error("the file must hold a row below the names of its columns", got="none", source=path)
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def rows_of(path: Path, *, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[str, list[str]]]:
    """The place and the cells of each row that is not empty, after those of the first line.

    Raises:
        DataError: as :func:`columns_of`, but for what it says of names.
    """
    text = io.StringIO(_text_of(path), newline="")
    reader = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
    try:
        names = next(reader, [])
        yield f"{path}, line 1", names
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if row and len(row) != len(names):
                raise data_error(f"a row must have {len(names)} cells", got=len(row), source=place)
            if row:
                yield place, row
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise data_error("the file must be readable as CSV", got=error, source=place) from None


def has_columns(columns: Mapping[str, Sequence[str]], names: Sequence[str], path: Path) -> None:
    """Raise unless a file has all these columns."""
    if lacking := [name for name in names if name not in columns]:
        raise data_error(f"the file must have a column {lacking[0]!r}", got=", ".join(columns), source=path)


def number_of(cell: str) -> float:
    """The number in a cell, in float64.

    Raises:
        ValueError: the cell holds no number, or one with underscores, which Python alone takes for a number.
    """
    if "_" in cell:
        raise ValueError(f"{cell!r} is no number")
    return float(cell)


def numbers_of(
    cells: Sequence[str],
    column: str,
    path: Path,
    *,
    missing: Sequence[str] = (),
    within: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """The numbers in one column, float64; a cell of ``missing`` becomes NaN.

    Raises:
        DataError: a cell is not a number that is finite in float32, or lies outside ``within``. The error names the
            row, counted from 1 below the names of the columns.
    """
    values = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        with contextlib.suppress(ValueError):
            values[i] = number_of(cell)
    with np.errstate(over="ignore"):
        unfit = ~np.isfinite(values.astype(np.float32)) | (values < within[0]) | (values > within[1])
    for row in np.flatnonzero(unfit).tolist():
        values[row] = np.nan
        if cells[row].strip() not in missing:
            bounds = "" if np.isinf(within[0]) else f" from {within[0]:g} to {within[1]:g}"
            rule, place = f"column {column!r} must hold finite numbers{bounds}", f"{path}, row {row + 1}"
            raise data_error(rule, got=repr(cells[row]), source=place)
    return values


def seeded_splits(inputs: np.ndarray, labels: np.ndarray, *, path: Path, source: str, seed: int) -> Splits:
    """Three fifths of the rows for training and a fifth each for validation and test, drawn by a seed.

    Shape:
        inputs: (N, ...) float32 or int64. labels: (N,).
    """
    order = np.random.default_rng(whole("seed", seed, low=0)).permutation(len(labels))
    train, val = len(order) * 3 // 5, len(order) * 4 // 5
    return splits_of_rows(inputs, labels, order[:train], order[train:val], order[val:], path=path, source=source)


def splits_of_rows(
    inputs: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    test: np.ndarray,
    *,
    path: Path,
    source: str,
    skipped: dict[str, int] | None = None,
) -> Splits:
    """Splits of one array by the numbers of its rows. Labels become float32.

    Raises:
        DataError: a part is empty. The error names ``path``.
    """
    for part, rows in {"train": train, "val": val, "test": test}.items():
        if len(rows) == 0:
            raise data_error(f"the {part} split must hold at least one row", got="none", source=path)
    sets = [SampleSet(inputs, labels[rows].astype(np.float32), rows.astype(np.int64)) for rows in (train, val, test)]
    return Splits(sets[0], sets[1], sets[2], source, skipped or {})


def _text_of(path: Path) -> str:
    """The text of a file, unpacked if it begins as gzip does."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        content = bytearray()
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            while piece := file.read(_PIECE):  # as much memory as it may be is taken in advance
                content += piece
                if len(content) > _MOST_BYTES:
                    raise data_error("a file must hold at most 4 GiB", got="more", source=path)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise data_error("the file must be whole, and text in UTF-8", got=got, source=path) from None
