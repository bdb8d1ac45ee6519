"""JPEG files decoded once into one uint8 array on disk, which every later run maps into memory."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ..._checks import length, one_of, problem
from ...errors import DataError, SettingsError
from ..files import one_at_a_time, progress_bar, write_atomically
from .archives import Files
from .images import ImageSet, Splits, content_digest

__all__ = ["Decoded", "OnError", "decode_jpeg", "decode_once", "make_splits"]

OnError = Literal["raise", "skip"]
_VERSION = 1  # of the decoding; a new one leaves older files unused
_MOST_PIXELS = 2**26
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Decoded:
    """Decoded images.

    Attributes:
        images: (M, 3, size, size) uint8, a read-only memmap.
        rows: name -> row of ``images``; a file that could not be decoded is not in it.
    """

    images: np.ndarray
    rows: dict[str, int]


def decode_once(
    files: Files,
    names: Sequence[str],
    *,
    size: int,
    cache: str | os.PathLike[str] | None = None,
    on_error: OnError = "raise",
) -> Decoded:
    """Decode images into a file of the cache folder, or map the file that an earlier call left there.

    The file's name is the SHA-256 of the images' names and bytes, ``size`` and the version of this reader, so changed
    images are decoded anew. It is written under another name and moved into place when whole. Of several processes one
    decodes and the others wait, on a lock that dies with its holder; where the system has no locks, each decodes for
    itself, to the same end. A file of the wrong length or kind is replaced.

    Args:
        names: of the images, in the order of ``files``; no name twice.
        size: height and width of the decoded images, in pixels.
        cache: folder; None takes ``$DIR_TOOLKIT_CACHE``, or else ``~/.cache/dir_toolkit``.
        on_error: what a damaged image does: ``"raise"``, or ``"skip"``, which leaves it out of ``rows``.
    Raises:
        DataError: an image cannot be decoded, or a file cannot be read. ImportError: Pillow is missing.
    """
    size = length("size", size)
    one_of("on_error", on_error, ("raise", "skip"))
    if not names:
        raise problem("names must hold at least one image", got="none", error=DataError)
    facts = json.dumps([_VERSION, size, files.digest(names), list(names)])
    folder = _default_folder() if cache is None else Path(cache)
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.npy"
    shape = (len(names), 3, size, size)
    if (faults := _stored_faults(path, shape, names)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path.with_suffix(".lock")) as alone:
            if alone:  # what a process that was killed left; without locks others may be at work
                for left in path.parent.glob(f".{path.stem}.*.tmp"):
                    left.unlink()
            if (faults := _stored_faults(path, shape, names)) is None:
                faults = _build(path, shape, files, names, on_error)
    if faults and on_error == "raise":
        raise _unreadable(*next(iter(faults.items())))
    images = np.memmap(path, np.uint8, "r", offset=len(_header(shape)), shape=shape)
    return Decoded(images, {name: row for row, name in enumerate(names) if name not in faults})


def make_splits(
    decoded: Decoded, parts: Mapping[str, Sequence[tuple[str, float]]], *, source: str, skipped: dict[str, int]
) -> Splits:
    """Splits from the names and labels of each part; names that could not be decoded are left out and counted.

    Raises:
        DataError: a part has no image.
    """
    counts, sets = dict(skipped), {}
    for part in ("train", "val", "test"):
        kept = [(decoded.rows[name], label) for name, label in parts[part] if name in decoded.rows]
        if not kept:
            raise problem(f"the {part} split must hold at least one image", got="none", error=DataError, source=source)
        if lost := len(parts[part]) - len(kept):
            counts["unreadable image"] = counts.get("unreadable image", 0) + lost
        rows = np.array([row for row, _ in kept], np.int64)
        labels = np.array([label for _, label in kept], np.float32)
        sets[part] = ImageSet(decoded.images, labels, rows, content_digest(decoded.images, labels, rows))
    return Splits(**sets, source=source, skipped=counts)


def decode_jpeg(data: bytes, size: int) -> np.ndarray:
    """One JPEG as RGB, at ``size`` by ``size`` pixels whatever its proportions.

    The decoder first halves the image, up to three times and not below ``size``; Lanczos resampling does the rest.
    An orientation noted in EXIF is not applied.

    Shape:
        Returns (3, size, size) uint8.
    Raises:
        ValueError: the data are no whole JPEG, or more than 67,108,864 pixels. ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
        from PIL.JpegImagePlugin import JpegImageFile
    except ImportError:
        raise problem(
            "reading images needs Pillow", fix='pip install "dir_toolkit[recipes]"', error=ImportError
        ) from None
    try:
        # Not Image.open, which only warns of a decompression bomb and would try every other format on hostile bytes.
        with JpegImageFile(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            if pixels > _MOST_PIXELS:
                raise ValueError(f"{pixels:,} pixels, at most {_MOST_PIXELS:,} are decoded")
            image.draft("RGB", (size, size))
            small = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from None
    return np.asarray(small).transpose(2, 0, 1)


def _build(path: Path, shape: tuple[int, ...], files: Files, names: Sequence[str], on_error: OnError) -> dict[str, str]:
    """Decode all, write the array and beside it why some images could not be decoded; returns the latter."""
    faults: dict[str, str] = {}

    def write(array: BinaryIO) -> None:
        array.write(_header(shape))
        for name, image in _progress(_decode_all(files.read(names), shape[-1]), len(names)):
            if isinstance(image, str):
                if on_error == "raise":
                    raise _unreadable(name, image)
                faults[name] = image
                image = np.zeros(shape[1:], np.uint8)
            array.write(image.tobytes())
        # In place before the array is, which alone makes the pair valid.
        write_atomically(_notes(path), lambda notes: notes.write(json.dumps(faults).encode()))

    write_atomically(path, write)
    return faults


def _decode_all(files: Iterable[tuple[str, bytes]], size: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each name with its image or with what is wrong with it, in order; a few hundred files are held at a time."""

    def decode(file: tuple[str, bytes]) -> tuple[str, np.ndarray | str]:
        try:
            return file[0], decode_jpeg(file[1], size)
        except ValueError as error:
            return file[0], str(error)

    files = iter(files)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter's lock
        while chunk := list(itertools.islice(files, _CHUNK)):
            yield from pool.map(decode, chunk)


def _stored_faults(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> dict[str, str] | None:
    """What the cache knows of undecodable images; None where its files are missing or not as they were written."""
    header = _header(shape)
    try:
        with path.open("rb") as file:
            whole_file = os.fstat(file.fileno()).st_size == len(header) + int(np.prod(shape))
            if not whole_file or file.read(len(header)) != header:
                return None
        faults = json.loads(_notes(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(faults, dict) or not faults.keys() <= set(names):
        return None
    return faults


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _notes(path: Path) -> Path:
    return path.with_suffix(".json")


def _unreadable(name: str, reason: str) -> Exception:
    return problem(
        "the image must be a whole JPEG",
        got=reason,
        error=DataError,
        fix='Replace the file, or pass on_error="skip" to leave such files out.',
        source=name,
    )


def _default_folder() -> Path:
    named = os.environ.get("DIR_TOOLKIT_CACHE")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "dir_toolkit"
    except RuntimeError:  # neither HOME nor a user of this number, as in some containers
        raise problem(
            "there must be a folder to keep decoded images in",
            got=f"DIR_TOOLKIT_CACHE={named}" if named else "no home folder",
            fix="Set the environment variable DIR_TOOLKIT_CACHE to a folder, or pass cache=...",
            error=SettingsError,
        ) from None


def _progress(images: Iterator[tuple[str, np.ndarray | str]], total: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """The same, with a bar on a terminal where rich is installed."""
    bar = progress_bar()
    if bar is None:
        yield from images
        return
    with bar:
        yield from bar.track(images, total=total, description="decoding images once")
