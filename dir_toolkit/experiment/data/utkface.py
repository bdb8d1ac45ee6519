"""UTKFace: 23,708 aligned faces with the age in the file name, and the UTKFace-DIR split."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..._home import HOME
from ._checks import data_error
from .archives import Files, FolderFiles, TarFiles
from .cache import OnError, decode_once, make_splits
from .images import Splits

__all__ = ["utkface", "utkface_age", "utkface_dir_split"]

# Two official names have a blank behind the date or lack the point. Their ages are still clear.
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

    Files are split by name first. So a damaged image that is skipped moves no other image to another part.

    Args:
        root: the folder of images; or a folder that holds this folder as ``UTKFace`` or the archive as
            ``UTKFace.tar.gz``; or the archive itself, packed or not. Nothing is extracted.
        size, cache, on_error: as for :func:`dir_toolkit.experiment.data.cache.decode_once`.
    Returns:
        Splits whose labels are ages in years. ``skipped`` counts files by ``"name does not parse"``, ``"age outside
        [0, 117)"`` and ``"unreadable image"``.
    Raises:
        DataError: there are no images, the archive is damaged or hostile, an image is damaged, or a split is empty.
    Source:
        Zhang, Song, Qi 2017, Age Progression/Regression by Conditional Adversarial Autoencoder (arXiv:1702.08423).
    """
    files, paths = _find(Path(root))
    skipped = {"name does not parse": 0, "age outside [0, 117)": 0}
    faces: dict[str, tuple[str, int]] = {}
    for path in paths:
        name = path.rpartition("/")[2]
        age = utkface_age(name)
        if age is None:
            skipped["name does not parse"] += 1
        elif age not in _AGES:
            skipped["age outside [0, 117)"] += 1
        elif name in faces:
            got = f"{faces[name][0]!r} and {path!r}"
            raise data_error("a file name must stand for one face", got=got, source=root)
        else:
            faces[name] = path, age
    split = _split({name: age for name, (_, age) in faces.items()})
    parts = {part: [(faces[name][0], float(faces[name][1])) for name in names] for part, names in split.items()}
    used = {path for members in parts.values() for path, _ in members}
    decoded = decode_once(files, [path for path in paths if path in used], size=size, cache=cache, on_error=on_error)
    skipped = {reason: count for reason, count in skipped.items() if count}
    return make_splits(decoded, parts, source="utkface", skipped=skipped)


def utkface_age(name: str) -> int | None:
    """The age in years in a file name ``<age>_<gender>_<race>_<date>.jpg.chip.jpg``, or None if it does not parse.

    >>> utkface_age("26_1_0_20170116220224657.jpg.chip.jpg"), utkface_age("61_1_20170109150557335.jpg.chip.jpg")
    (26, None)
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def utkface_dir_split(names: Iterable[str]) -> dict[str, list[str]]:
    r"""UTKFace-DIR: a training set with a long tail around 26 years, and a test set as balanced as the faces allow.

    The :math:`k` files of one age are put in the order of the hex SHA-256 of their names in UTF-8. The first
    :math:`\min(20, \lfloor k/3 \rfloor)` are for the test, the next :math:`\min(10, \lfloor k/6 \rfloor)` for
    validation, and of the rest the first :math:`\lceil 600\, e^{-|age - 26| / 11} \rceil` for training. The others are
    not used.

    Args:
        names: file names without folders, each of them once, in any order.
    Returns:
        ``"train"``, ``"val"`` and ``"test"``, each sorted by age and, within an age, in the order above.
    Raises:
        DataError: a name does not parse or occurs twice, or its age lies outside [0, 117).
    """
    ages: dict[str, int] = {}
    for name in names:
        age = utkface_age(name)
        if age is None or age not in _AGES or name in ages:
            rule = "names must occur once and read <age>_<gender>_<race>_<date>.jpg.chip.jpg, with ages in [0, 117)"
            raise data_error(rule, got=repr(name))
        ages[name] = age
    return _split(ages)


def _split(ages: dict[str, int]) -> dict[str, list[str]]:
    """The file names of each part, from the age of each name."""
    by_age: dict[int, list[str]] = {age: [] for age in _AGES}
    for name, age in ages.items():
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


def _find(root: Path) -> tuple[Files, list[str]]:
    """The files, and the names of all of them in the order in which they are read."""
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
    rule = "root must be the archive UTKFace.tar.gz, or a folder that holds it or the images"
    raise data_error(rule, got=root, fix=f"{HOME / 'data_cards/utkface.md'} tells where to get them.")
