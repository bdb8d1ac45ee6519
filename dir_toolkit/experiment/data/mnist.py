"""MNIST: 70,000 handwritten digits from four idx files, which can be cut to a long tail, and how to get the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..._checks import instance
from ..._home import HOME
from ._checks import data_error, require_data
from .idx import read_idx
from .images import Splits
from .long_tail import long_tail_splits

__all__ = ["download_mnist", "mnist"]


class _Official(NamedTuple):
    """The SHA-256 of one of the four files as it was published, unpacked and packed."""

    unpacked: str
    packed: str


_FILES = {
    "train-images-idx3-ubyte": _Official(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte": _Official(
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "t10k-images-idx3-ubyte": _Official(
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte": _Official(
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}
_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
_TIMEOUT = 30  # seconds without a byte
_SIDE = 28
_DIGITS = 10
_MOST_BYTES = 2**28


def mnist(
    root: str | os.PathLike[str],
    *,
    shares: Sequence[float] | np.ndarray | None = None,
    noise: float = 0.0,
    train_per_class: int | None = None,
    val_per_class: int = 500,
    verify: bool = False,
    seed: int = 0,
) -> Splits:
    """MNIST with a long tail: the training set is thinned and made noisy, and the test set is whole.

    A balanced validation set is cut from the training part first, see
    :func:`dir_toolkit.experiment.data.long_tail.long_tail_splits`.

    Args:
        root: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two files of ``t10k``,
            each with or without ``.gz``. Where both are there, the packed file is read. :func:`download_mnist` fetches
            them.
        verify: whether the four files must be the official ones, by the SHA-256 of their unpacked contents.
        shares, noise, train_per_class, val_per_class, seed: as for ``long_tail_splits``.
    Shape:
        images: (M, 1, 28, 28) uint8, a bright digit on a dark ground. labels: (N,) int64, 0 to 9. shares: (10,).
    Raises:
        DataError: a file is missing or damaged, or does not hold uint8 images of 28 × 28 pixels or labels from 0 to 9;
            there are not as many images as labels; or ``verify`` finds a file that is not the official one.
        ShapeError: there are not ten shares. ValueError: a setting is out of range, or a digit has too few images.
        TypeError: a setting is not a number, or ``verify`` is not a bool.
    Source:
        LeCun, Bottou, Bengio, Haffner 1998, Gradient-based learning applied to document recognition.
        The thinning: Hayat et al. 2019, section 4 (arXiv:1901.07711).
    """
    instance(bool, verify=verify)
    folder = Path(root)
    paths = {name: _find(folder, name) for name in _FILES}
    if missing := [name for name, path in paths.items() if path is None]:
        rule, got = (
            "root must hold the four files of MNIST, with or without .gz",
            f"{folder} without {', '.join(missing)}",
        )
        raise data_error(rule, got=got, fix="download_mnist(root) fetches them.")
    arrays = {name: _read(path, name, verify=verify) for name, path in paths.items() if path is not None}
    for part in ("train", "t10k"):
        images, labels = len(arrays[f"{part}-images-idx3-ubyte"]), len(arrays[f"{part}-labels-idx1-ubyte"])
        got = f"{images:,} and {labels:,} of {part}"
        require_data(images == labels, "there must be as many images as labels", got=got, source=folder)
    return long_tail_splits(
        arrays["train-images-idx3-ubyte"],
        arrays["train-labels-idx1-ubyte"],
        arrays["t10k-images-idx3-ubyte"],
        arrays["t10k-labels-idx1-ubyte"],
        source="mnist",
        val_per_class=val_per_class,
        shares=shares,
        noise=noise,
        train_per_class=train_per_class,
        seed=seed,
    )


def download_mnist(root: str | os.PathLike[str]) -> None:
    """Fetch those of the four files of MNIST that are missing, packed, from two public mirrors in turn.

    pooch fetches them, and a file gets its name only if its SHA-256 is the official one. Files that are already there,
    packed or not, are kept. They must be official as well.

    Args:
        root: the folder, which is made if it does not exist.
    Raises:
        DataError: a file that is already there is damaged or not the official one; then nothing is fetched. Or no
            mirror gave a file; the error holds the answer of each.
        OSError: the folder cannot be made or written to. ImportError: pooch is not installed.
    """
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for name in _FILES:
        if (path := _find(folder, name)) is None:
            missing.append(name)
        else:
            _read(path, name, verify=True)
    for name in missing:
        _from_mirrors(name, folder)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _read(path: Path, name: str, *, verify: bool) -> np.ndarray:
    """Images as (M, 1, 28, 28) or labels as (M,), both as uint8."""
    array = read_idx(path, max_bytes=_MOST_BYTES)
    images = "images" in name
    shape, text = ((_SIDE, _SIDE), f"(M, {_SIDE}, {_SIDE})") if images else ((), "(M,)")
    if array.dtype != np.uint8 or array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        raise data_error(f"the array must be uint8 {text}", got=f"{array.dtype} {array.shape}", source=path)
    if not images and array.max() >= _DIGITS:
        first = int((array >= _DIGITS).argmax())
        place = f"{path}, byte {8 + first:,}"  # behind four bytes and one axis of four bytes
        raise data_error(f"labels must be 0 to {_DIGITS - 1}", got=array[first], source=place)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    official = _FILES[name].unpacked
    if verify and (digest := hashlib.sha256(header + array.tobytes()).hexdigest()) != official:
        rule = f"SHA-256 of the unpacked file must be the official {official}"
        fix = "Move it away and call download_mnist(root), or pass verify=False to read it as it is."
        raise data_error(rule, got=digest, fix=fix, source=path)
    return array[:, None] if images else array


def _from_mirrors(name: str, folder: Path) -> None:
    """Fetch one file from the first mirror that gives it."""
    import pooch
    import requests

    faults = []
    for mirror in _MIRRORS:
        url = f"{mirror}{name}.gz"
        try:
            fetch = pooch.HTTPDownloader(timeout=_TIMEOUT)
            pooch.retrieve(url, f"sha256:{_FILES[name].packed}", f"{name}.gz", folder, downloader=fetch)
            return
        except (requests.RequestException, ValueError) as error:  # ValueError: the file has another SHA-256
            faults.append(f"{url}: {str(error) or type(error).__name__}")
    fix = f"Try again later, or put the file into root by hand; {HOME / 'data_cards/mnist.md'} tells where it is."
    raise data_error(f"one of the mirrors must give {name}.gz", got="; ".join(faults), fix=fix)
