"""Image sets with ages and splits in a CSV list: AgeDB-DIR and IMDB-WIKI-DIR."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from ._checks import check_parts, data_error
from .archives import FolderFiles
from .cache import OnError, decode_once, make_splits
from .images import Splits
from .rows import rows_of

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

    The list defines the split of each image, so that skipping an image moves no other. Repeated rows are repeated
    samples. A path in two splits is an error, since a test image would be in training.

    Args:
        listing: the CSV file, in UTF-8, with a header line that names at least the three columns.
        root: the folder from which the paths start. For the published lists this is the folder that holds ``AgeDB``, or
            ``imdb_crop`` and ``wiki_crop``.
        source: the name of the result, for example ``"agedb_dir"``.
        size, cache: as for :func:`dir_toolkit.experiment.data.cache.decode_once`.
        on_error: for missing or damaged images: ``"raise"``, or ``"skip"``, which counts them as ``"missing file"`` or
            ``"unreadable image"``.
    Returns:
        Splits whose labels are ages in years.
    Raises:
        DataError: a column is missing, an age is not a number in [0, 200], a split is not train, val or test, or a path
            leaves ``root`` (by ``..``, a link or as an absolute path), names no file or occurs in two splits; the error
            names the line. Or an image is damaged, or a split is empty.
    Source:
        Yang et al. 2021, section 4 and appendix (arXiv:2102.09554).
    """
    listing, files = Path(listing), FolderFiles(root)
    parts: dict[str, list[tuple[str, float]]] = {"train": [], "val": [], "test": []}
    split_of: dict[str, str] = {}
    missing = 0
    rows = rows_of(listing)
    place, header = next(rows)
    if any(header.count(column) != 1 for column in _COLUMNS):
        raise data_error(
            f"the header must name each of the columns {', '.join(_COLUMNS)} once", got=header, source=place
        )
    columns = [header.index(column) for column in _COLUMNS]
    for place, row in rows:
        age, path, split = (row[column] for column in columns)
        fix = ""
        if not _AGE.fullmatch(age) or float(age) > _OLDEST:
            rule, got = f"age must be a number from 0 to {_OLDEST}, in years", repr(age)
        elif split not in parts:
            rule, got = "split must be train, val or test", repr(split)
        elif path and path != posixpath.normpath(path):
            rule, got = "a path must be written in one way only", repr(path)
            fix = f"Write {posixpath.normpath(path)!r}."
        elif split_of.get(path, split) != split:
            rule, got = "a path must stand in one split", f"{path!r} in {split_of[path]} and {split}"
        elif path in split_of or files.has(path, source=place):
            split_of[path] = split
            parts[split].append((path, float(age)))
            continue
        elif on_error == "skip":
            missing += 1
            continue
        else:
            rule, got = "path must name an image", f"{path!r}, which is not in {files.root}"
            fix = 'Check root, or pass on_error="skip" to leave such rows out.'
        raise data_error(rule, got=got, fix=fix, source=place)
    check_parts(parts, listing)
    decoded = decode_once(files, list(split_of), size=size, cache=cache, on_error=on_error)
    return make_splits(decoded, parts, source=source, skipped={"missing file": missing} if missing else {})
