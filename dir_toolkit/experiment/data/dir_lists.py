"""Image sets whose ages and splits stand in a CSV list: AgeDB-DIR and IMDB-WIKI-DIR."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from ..._checks import problem
from ...errors import DataError
from .archives import FolderFiles
from .cache import OnError, decode_once, make_splits
from .images import Splits

__all__ = ["dir_list"]

_COLUMNS = ("age", "path", "split")
_OLDEST = 200
_AGE = re.compile(r"[0-9]{1,3}(\.[0-9]*)?")


def dir_list(
    listing: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    source: str,
    size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    on_error: OnError = "raise",
) -> Splits:
    """Images named by a CSV list with the columns ``age,path,split``, as AgeDB-DIR and IMDB-WIKI-DIR are published.

    The list says which part an image belongs to: one that is skipped moves no other. A row that stands twice
    counts twice, but a path in two parts is refused, for it would be tested on what it was trained on.

    Args:
        listing: the CSV file, UTF-8, with a header line that names at least the three columns.
        root: folder from which the paths start; for the published lists, the one that holds ``AgeDB``, or ``imdb_crop``
            and ``wiki_crop``.
        source: name for the result, ``"agedb_dir"`` for example.
        size: height and width of the images, in pixels.
        cache: folder for the decoded images, see :func:`dir_toolkit.experiment.data.cache.decode_once`.
        on_error: what a missing or damaged image does: ``"raise"``, or ``"skip"``, which counts it as ``"missing
            file"`` or ``"unreadable image"``.
    Returns:
        Splits with ages in years as labels.
    Raises:
        DataError: the list, naming its line: a column is missing, an age is not a number in [0, 200], a split is not
            train, val or test, a path leaves ``root`` (by ``..``, a link or as an absolute path), names no file, or
            stands in two splits. Or an image is damaged, or a split is empty.
    Source:
        Yang et al. 2021, section 4 and appendix (arXiv:2102.09554).
    """
    listing, files = Path(listing), FolderFiles(root)
    parts: dict[str, list[tuple[str, float]]] = {"train": [], "val": [], "test": []}
    split_of: dict[str, str] = {}
    missing = 0
    for line, age, path, split in _rows(listing):
        place = f"{listing}, line {line}"
        if not _AGE.fullmatch(age) or float(age) > _OLDEST:
            raise problem(
                f"age must be a number from 0 to {_OLDEST}, in years", got=repr(age), error=DataError, source=place
            )
        if split not in parts:
            raise problem("split must be train, val or test", got=repr(split), error=DataError, source=place)
        if path and path != posixpath.normpath(path):
            raise problem(
                "a path must be written in one way only",
                got=repr(path),
                fix=f"Write {posixpath.normpath(path)!r}.",
                error=DataError,
                source=place,
            )
        if split_of.get(path, split) != split:
            raise problem(
                "a path must stand in one split",
                got=f"{path!r} in {split_of[path]} and {split}",
                error=DataError,
                source=place,
            )
        if path not in split_of and not files.has(path, source=place):
            if on_error == "raise":
                raise problem(
                    "path must name an image",
                    got=f"{path!r}, which is not in {files.root}",
                    fix='Check root, or pass on_error="skip" to leave such rows out.',
                    error=DataError,
                    source=place,
                )
            missing += 1
            continue
        split_of[path] = split
        parts[split].append((path, float(age)))
    for split, rows in parts.items():
        if not rows:
            raise problem(
                f"the {split} split must hold at least one image", got="none", error=DataError, source=str(listing)
            )
    decoded = decode_once(files, list(split_of), size=size, cache=cache, on_error=on_error)
    return make_splits(decoded, parts, source=source, skipped={"missing file": missing} if missing else {})


def _rows(listing: Path) -> Iterator[tuple[int, str, str, str]]:
    """Line number, age, path and split of each row, as text."""
    line = 0
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if missing := [column for column in _COLUMNS if header.count(column) != 1]:
                raise problem(
                    f"the header must name each of the columns {', '.join(_COLUMNS)} once",
                    got=f"{header} ({', '.join(missing)} missing or repeated)",
                    error=DataError,
                    source=f"{listing}, line 1",
                )
            age, path, split = (header.index(column) for column in _COLUMNS)
            line = reader.line_num
            for row in reader:
                line = reader.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    raise problem(
                        f"a row must have {len(header)} columns",
                        got=len(row),
                        error=DataError,
                        source=f"{listing}, line {line}",
                    )
                yield line, row[age], row[path], row[split]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise problem(
            "the list must be readable as CSV in UTF-8",
            got=f"{type(error).__name__}: {error}",
            error=DataError,
            source=f"{listing}, line {line + 1}",
        ) from None
