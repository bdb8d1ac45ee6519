"""UTKFace: 23,708 aligned faces whose age stands in the file name, and the UTKFace-DIR split."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..._checks import problem
from ...errors import DataError
from .archives import Files, FolderFiles, TarFiles
from .cache import OnError, decode_once, make_splits
from .images import Splits

__all__ = ["utkface", "utkface_age", "utkface_dir_split"]

# Two official names have a blank behind the date or lack the point: their ages are as clear as the others'.
_NAME = re.compile(r"([0-9]{1,4})_[01]_[0-4]_[0-9]+ ?\.?jpg\.chip\.jpg")
_AGES = range(117)


def utkface(
    root: str | os.PathLike[str],
    *,
    size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    on_error: OnError = "raise",
) -> Splits:
    """The faces of UTKFace, split as UTKFace-DIR (:func:`utkface_dir_split`).

    Files are split by name first: a damaged image that is skipped moves no other from one part to another.

    Args:
        root: the folder of images, or one that holds it as ``UTKFace`` or the archive as ``UTKFace.tar.gz``, or the
            archive itself, packed or not. Nothing is extracted.
        size: height and width of the images, in pixels.
        cache: folder for the decoded images, see :func:`dir_toolkit.experiment.data.cache.decode_once`.
        on_error: what a damaged image does: ``"raise"``, or ``"skip"``, which counts it as ``"unreadable image"``.
    Returns:
        Splits with ages in years as labels. ``skipped`` counts files by ``"name does not parse"``, ``"age outside
        [0, 117)"`` and ``"unreadable image"``.
    Raises:
        DataError: there are no such images, the archive is damaged or hostile, an image is damaged, a split is empty.
    Source:
        Zhang, Song, Qi 2017, Age Progression/Regression by Conditional Adversarial Autoencoder (arXiv:1702.08423).
    """
    files, names = _find(Path(root))
    paths: dict[str, str] = {}
    skipped = {"name does not parse": 0, "age outside [0, 117)": 0}
    for path in names:
        name = path.rpartition("/")[2]
        age = utkface_age(name)
        if age is None:
            skipped["name does not parse"] += 1
        elif age not in _AGES:
            skipped["age outside [0, 117)"] += 1
        elif name in paths:
            raise problem(
                "a file name must stand for one face",
                got=f"{paths[name]!r} and {path!r}",
                error=DataError,
                source=str(root),
            )
        else:
            paths[name] = path
    split = utkface_dir_split(paths)
    parts = {part: [(paths[name], float(_age(name))) for name in chosen] for part, chosen in split.items()}
    used = {path for faces in parts.values() for path, _ in faces}
    decoded = decode_once(files, [path for path in names if path in used], size=size, cache=cache, on_error=on_error)
    return make_splits(
        decoded, parts, source="utkface", skipped={reason: count for reason, count in skipped.items() if count}
    )


def utkface_age(name: str) -> int | None:
    """The age in years in a file name ``<age>_<gender>_<race>_<date>.jpg.chip.jpg``; None if it does not parse.

    >>> utkface_age("26_1_0_20170116220224657.jpg.chip.jpg"), utkface_age("61_1_20170109150557335.jpg.chip.jpg")
    (26, None)
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def utkface_dir_split(names: Iterable[str]) -> dict[str, list[str]]:
    r"""UTKFace-DIR: a long tail around 26 years to train on, and a test set that is balanced as far as it can be.

    The :math:`k` files of one age are put in order of the SHA-256 (hex) of their names in UTF-8. The first
    :math:`\min(20, \lfloor k/3 \rfloor)` are for the test, the next :math:`\min(10, \lfloor k/6 \rfloor)` for
    validation, and of the rest the first :math:`\lceil 600\, e^{-|age - 26| / 11} \rceil` for training; those beyond
    are not used.

    Args:
        names: of files, without folders; each once, in any order.
    Returns:
        ``"train"``, ``"val"`` and ``"test"``, each by age and, within an age, in the order above.
    Raises:
        DataError: a name does not parse, stands twice, or its age is outside [0, 117).
    """
    by_age: dict[int, list[str]] = {age: [] for age in _AGES}
    seen: set[str] = set()
    for name in names:
        age = _age(name)
        if age not in by_age or name in seen:
            rule = "a name must stand once" if name in seen else "ages must lie in [0, 117)"
            raise problem(rule, got=repr(name), error=DataError)
        seen.add(name)
        by_age[age].append(name)
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for age, group in by_age.items():
        group.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        test = min(20, len(group) // 3)
        val = test + min(10, len(group) // 6)
        train = val + math.ceil(600 * math.exp(-abs(age - 26) / 11))
        split["test"] += group[:test]
        split["val"] += group[test:val]
        split["train"] += group[val:train]
    return split


def _age(name: str) -> int:
    age = utkface_age(name)
    if age is None:
        raise problem("names must read <age>_<gender>_<race>_<date>.jpg.chip.jpg", got=repr(name), error=DataError)
    return age


def _find(root: Path) -> tuple[Files, list[str]]:
    """Where the images are, and all file names there, in the order in which they are read."""
    for archive in (root, root / "UTKFace.tar.gz", root / "UTKFace.tar"):
        if archive.is_file():
            tar = TarFiles(archive)
            return tar, tar.names
    for folder in (root / "UTKFace", root):
        if folder.is_dir():
            files = FolderFiles(folder)
            names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
            faces = [name for name in names if utkface_age(name) is not None]
            for name in faces:
                files.has(name, source=str(folder))
            if faces:
                return files, names
    raise problem(
        "root must be the archive UTKFace.tar.gz, or a folder that holds it or the images",
        got=str(root),
        fix="data_cards/utkface.md tells where to get them.",
        error=DataError,
    )
