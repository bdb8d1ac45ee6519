"""Tables: the rows of a CSV file with one numeric label per row."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..._checks import warn
from ._checks import require_data
from .images import SampleSet, Splits
from .rows import columns_of, has_columns, number_of, numbers_of, seeded_splits

__all__ = ["standardized", "table"]

_MOST_WORDS = 100  # that one column may hold


def table(path: str | os.PathLike[str], label: str, *, drop: Collection[str] = (), seed: int = 0) -> Splits:
    """A CSV file with a label in one column and features in all others, split by a seed.

    A column of numbers is one feature. A column in which any cell is not a number is one feature per different cell,
    which is 1 in the rows of this cell and 0 in the others; the cells are sorted. A warning is issued if most cells of
    such a column are numbers.

    Args:
        path: the file, with the names of the columns in its first line, packed with gzip or not.
        label: the name of the column that holds the labels.
        drop: the names of columns that are neither label nor feature, or one such name.
        seed: the seed of the split. Three fifths of the rows are for training, a fifth each for validation and test.
    Returns:
        Splits with inputs (N, F) float32 as the file has them; :func:`standardized` scales them.
    Raises:
        DataError: a column is not there, no feature is left, a label is not a finite number, a number is missing among
            numbers, or a column of words holds more than 100 different ones. Or the file is damaged or has fewer than 5
            rows.

    >>> table("abalone.csv.gz", "Rings").train.inputs.shape                                         # doctest: +SKIP
    (4177, 10)
    """
    path, drop = Path(path), [drop] if isinstance(drop, str) else drop
    columns = columns_of(path)
    has_columns(columns, (label, *drop), path)
    labels = numbers_of(columns.pop(label), label, path)
    features = [_features(cells, name, path) for name, cells in columns.items() if name not in drop]
    some, got = len(features) > 0 and len(labels) >= 5, f"{len(features)} and {len(labels)}"
    require_data(some, "the table must have a feature and at least 5 rows", got=got, source=path)
    inputs = np.concatenate(features, axis=1).astype(np.float32)
    return seeded_splits(inputs, labels, path=path, source=path.name.split(".")[0], seed=seed)


def standardized(splits: Splits) -> Splits:
    """The same samples with each feature shifted and scaled to mean 0 and standard deviation 1 over the training part.

    The last axis of the inputs holds the features. A feature that is constant in training becomes 0 there.
    """
    inputs = splits.train.inputs.astype(np.float64)
    seen = inputs[splits.train.rows].reshape(-1, inputs.shape[-1])
    mean, spread = np.nanmean(seen, 0), np.nanstd(seen, 0)
    scaled = ((inputs - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)
    train, val, test = (SampleSet(scaled, part.labels, part.rows) for part in (splits.train, splits.val, splits.test))
    return Splits(train, val, test, splits.source, splits.skipped)


def _features(cells: list[str], name: str, path: Path) -> np.ndarray:
    """(N, 1) numbers, or (N, W) of zeros and ones."""
    if odd := [cell for cell in cells if _is_word(cell)]:
        words = sorted(set(cells))
        numeric = len(odd) + sum(cell.strip() == "" for cell in cells) < len(cells) / 2
        mend = f"Mend its {len(odd)} cells that are no numbers, such as {odd[0]!r}" if numeric else ""
        rule = f"column {name!r} must hold at most {_MOST_WORDS} different words"
        fix = f"{mend}, or pass drop=[{name!r}]." if numeric else f"Pass drop=[{name!r}]."
        require_data(len(words) <= _MOST_WORDS, rule, got=len(words), fix=fix, source=path)
        if numeric:
            result = f"the {len(words)} different cells of column {name!r} become one feature each"
            warn(f"{path}: {result}. {mend}, if they should be.")
        return (np.array(cells)[:, None] == np.array(words)).astype(np.float64)
    return numbers_of(cells, name, path)[:, None]


def _is_word(cell: str) -> bool:
    try:
        number_of(cell)
    except ValueError:
        return cell.strip() != ""
    return False
