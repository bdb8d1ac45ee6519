"""Text: sentences and pairs of sentences with a continuous label, as numbers of words that have vectors."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..._checks import one_of, whole
from ._checks import require_data
from .images import SampleSet, Splits
from .rows import columns_of, find_file, has_columns, lines_of, numbers_of, splits_of_rows

__all__ = ["emobank", "sts_b_dir", "word_vectors", "words_of"]

_TOKEN = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
_VECTORS = ("glove.6B.100d.txt", "glove_100d.txt")


def words_of(sentence: str) -> list[str]:
    """The words of a sentence in lower case: runs of letters, runs of digits, and other characters one by one.

    >>> words_of("It's 42!")
    ['it', "'", 's', '42', '!']
    """
    return _TOKEN.findall(sentence.lower())


def word_vectors(root: str | os.PathLike[str], name: str | None = None) -> tuple[dict[str, int], np.ndarray]:
    """The number of each word, counted from 1, and the vectors of all words.

    Args:
        name: a file in ``root`` with one word per line, followed by its numbers, packed with gzip or not; by default
            ``glove.6B.100d.txt`` or ``glove_100d.txt``.
    Shape:
        Returns vectors (V + 1, D) float32, whose row 0 is zero and stands for padding.
    Raises:
        DataError: the file is missing or damaged, or a line has fewer or more numbers than the first.
    Source:
        Pennington et al. 2014, GloVe: Global vectors for word representation.
    """
    path = find_file(root, *(_VECTORS if name is None else [name]), card="emobank")
    number: dict[str, int] = {}
    rows: list[np.ndarray] = []
    for i, line in enumerate(lines_of(path)):
        word, *cells = line.rstrip().split(" ")
        rows.append(_vector(cells))
        sound = word not in number and len(rows[-1]) == len(rows[0]) > 0 and bool(np.isfinite(rows[-1]).all())
        rule = f"a line must hold a new word and {len(rows[0]) or 'its'} numbers"
        require_data(sound, rule, got=repr(line[:40]), source=f"{path}, line {i + 1}")
        number[word] = i + 1
    require_data(len(rows) > 0, "the file must hold a word", got="none", source=path)
    return number, np.stack([np.zeros_like(rows[0]), *rows])


def emobank(
    root: str | os.PathLike[str], number: dict[str, int], label: Literal["V", "A", "D"] = "V", *, longest: int = 40
) -> Splits:
    """Sentences of EmoBank with their valence, arousal or dominance as readers judged it, from 1 to 5; most are near 3.

    Args:
        root: the folder of ``emobank.csv``, packed with gzip or not.
        number: the number of each word, from :func:`word_vectors`.
        longest: the number of known words after which a sentence is cut. Unknown words are left out.
    Returns:
        Splits as the authors made them, with inputs (N, longest) int64, the numbers of the words, then zeros.
        ``skipped`` counts the rows of other splits as ``"of another split"``.
    Raises:
        DataError: the file is missing or damaged, lacks a column or a part, or holds a label beyond the scale.
    Source:
        Buechel and Hahn 2017, EmoBank (EACL).
    """
    one_of("label", label, ("V", "A", "D"))
    path = find_file(root, "emobank.csv", card="emobank")
    columns = columns_of(path)
    has_columns(columns, ("split", "text", label), path)
    part = np.array(columns["split"])
    train, val, test = (np.flatnonzero(part == name) for name in ("train", "dev", "test"))
    inputs = _numbers(columns["text"], number, longest)
    labels = numbers_of(columns[label], label, path, within=(1, 5))
    other = len(part) - len(train) - len(val) - len(test)
    skipped = {"of another split": other} if other else {}
    return splits_of_rows(
        inputs, labels, train, val, test, path=path, source=f"emobank_{label.lower()}", skipped=skipped
    )


def sts_b_dir(root: str | os.PathLike[str], number: dict[str, int], *, longest: int = 30) -> Splits:
    """Pairs of sentences with their similarity from 0 to 5, in the long-tailed split of the DIR paper.

    Args:
        root: the folder of ``stsb_dir_train.tsv``, ``stsb_dir_dev.tsv`` and ``stsb_dir_test.tsv``, or of ``train_new``,
            ``dev_new`` and ``test_new.tsv`` as they are published, packed with gzip or not.
        number, longest: as for :func:`emobank`.
    Returns:
        Splits with inputs (N, 2, longest) int64.
    Raises:
        DataError: a file is missing or damaged, lacks a column, or holds a score beyond the scale.
    Source:
        Yang et al. 2021, section 4 (arXiv:2102.09554); Cer et al. 2017 (arXiv:1708.00055).
    """
    sets = []
    for part in ("train", "dev", "test"):
        path = find_file(root, f"stsb_dir_{part}.tsv", f"{part}_new.tsv", card="sts_b_dir")
        columns = columns_of(path, delimiter="\t", quoted=False)
        has_columns(columns, ("sentence1", "sentence2", "score"), path)
        pairs = np.stack([_numbers(columns[name], number, longest) for name in ("sentence1", "sentence2")], axis=1)
        labels = numbers_of(columns["score"], "score", path, within=(0, 5)).astype(np.float32)
        sets.append(SampleSet(pairs, labels, np.arange(len(labels))))
    train, val, test = sets
    return Splits(train, val, test, "sts_b_dir", {})


def _vector(cells: Sequence[str]) -> np.ndarray:
    """(D,) float32: the numbers in these cells, infinite where they are too large; (0,) if one is no number."""
    try:
        with np.errstate(over="ignore"):
            return np.array([] if "_" in "".join(cells) else cells, np.float32)
    except ValueError:
        return np.empty(0, np.float32)


def _numbers(sentences: Sequence[str], number: dict[str, int], longest: int) -> np.ndarray:
    """(N, longest) int64: the numbers of the words that have a vector, then zeros."""
    rows = np.zeros((len(sentences), whole("longest", longest, low=1)), np.int64)
    for row, sentence in zip(rows, sentences, strict=True):
        known = [number[word] for word in words_of(sentence) if word in number][:longest]
        row[: len(known)] = known
    return rows
