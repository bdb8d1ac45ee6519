"""A cache of decoded images: one uint8 array on disk, which later runs map into memory."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ..._checks import length, missing_package, one_of, problem
from ..._files import write_atomically
from ...errors import SettingsError
from ..files import one_at_a_time, progress_bar
from ._checks import check_parts, data_error, require_data
from .archives import Files
from .images import ImageSet, Splits

__all__ = ["Decoded", "OnError", "decode_image", "decode_once", "make_splits"]

OnError = Literal["raise", "skip"]
_VERSION = 2  # of the decoding; a new version leaves older files unused
_MOST_PIXELS = 2**26
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Decoded:
    """Decoded images.

    Attributes:
        images: (M, 3, size, size) uint8, a read-only memmap.
        rows: the row in ``images`` per name; files that could not be decoded have none.
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

    The file is named by the SHA-256 of the names and bytes of the images, of ``size`` and of the version of this
    reader, so changed images are decoded again. It is written atomically. One process decodes while the others wait for
    a lock. On systems without locks every process decodes, with the same result. A file of the wrong length or type is
    replaced.

    Args:
        names: the names of the images in the order of ``files``, each of them once.
        size: the height and the width of the decoded images, in pixels.
        cache: the folder; None means ``$DIR_TOOLKIT_CACHE``, or ``~/.cache/dir_toolkit`` if that is not set.
        on_error: for damaged images: ``"raise"``, or ``"skip"``, which omits them from ``rows``.
    Raises:
        DataError: an image cannot be decoded, or a file cannot be read. ImportError: Pillow is missing.
    """
    size = length("size", size)
    one_of("on_error", on_error, ("raise", "skip"))
    require_data(len(names) > 0, "names must hold at least one image", got="none")
    facts = json.dumps([_VERSION, size, files.digest(names), list(names)])
    folder = _default_folder() if cache is None else Path(cache)
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.npy"
    shape = (len(names), 3, size, size)
    if (faults := _stored_faults(path, shape, names)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path.with_suffix(".lock")) as alone:
            # Files of killed processes are removed. Without locks other processes may still write them.
            for left in folder.glob(f".{path.stem}.*.tmp") if alone else ():
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
    """Splits from the names and labels of each part. Names that could not be decoded are omitted and counted.

    Raises:
        DataError: a part has no image.
    """
    readable = {part: [member for member in members if member[0] in decoded.rows] for part, members in parts.items()}
    check_parts(readable, source)
    sets = {}
    for part, members in readable.items():
        rows = np.array([decoded.rows[name] for name, _ in members], np.int64)
        labels = np.array([label for _, label in members], np.float32)
        sets[part] = ImageSet(decoded.images, labels, rows)
    lost = sum(map(len, parts.values())) - sum(map(len, readable.values()))
    return Splits(**sets, source=source, skipped={**skipped, "unreadable image": lost} if lost else dict(skipped))


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode a JPEG or PNG as RGB, resized to ``size`` by ``size`` pixels.

    The decoder first halves a JPEG up to three times, but not below ``size``. Lanczos resampling does the rest. An
    orientation in the EXIF data is not applied, and neither is transparency.

    Shape:
        Returns (3, size, size) uint8.
    Raises:
        ValueError: the data are not a complete JPEG or PNG, or have more than 67,108,864 pixels. ImportError: Pillow is
        missing.
    """
    try:
        from PIL import Image
        from PIL.JpegImagePlugin import JpegImageFile
        from PIL.PngImagePlugin import PngImageFile
    except ImportError as error:
        raise missing_package("Pillow", error) from None
    try:
        # Image.open would only warn of a decompression bomb, and would try every other format on hostile bytes.
        kind = PngImageFile if data.startswith(b"\x89PNG") else JpegImageFile
        with kind(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            if pixels > _MOST_PIXELS:
                raise ValueError(f"{pixels:,} pixels, at most {_MOST_PIXELS:,} are decoded")
            image.draft("RGB", (size, size))
            if image.mode.startswith("I"):  # 16 bits of grey, which convert would clip to 8
                image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
            small = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from None
    return np.asarray(small).transpose(2, 0, 1)


def _build(path: Path, shape: tuple[int, ...], files: Files, names: Sequence[str], on_error: OnError) -> dict[str, str]:
    """Decode all images and write the array, and beside it why some images could not be decoded; returns the latter."""
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
        # The notes come first, since the array in its place makes the pair valid.
        write_atomically(_notes(path), lambda notes: notes.write(json.dumps(faults).encode()))

    write_atomically(path, write)
    return faults


def _decode_all(files: Iterable[tuple[str, bytes]], size: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each name in order, with its image or an error text. A few hundred files are in memory at a time."""

    def decode(file: tuple[str, bytes]) -> tuple[str, np.ndarray | str]:
        try:
            return file[0], decode_image(file[1], size)
        except ValueError as error:
            return file[0], str(error)

    files = iter(files)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter's lock
        while chunk := list(itertools.islice(files, _CHUNK)):
            yield from pool.map(decode, chunk)


def _stored_faults(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> dict[str, str] | None:
    """Why some images could not be decoded, or None if the files are missing or not as they were written."""
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
    fix = 'Replace the file, or pass on_error="skip" to leave such files out.'
    return data_error("the image must be a whole JPEG", got=reason, fix=fix, source=name)


def _default_folder() -> Path:
    named = os.environ.get("DIR_TOOLKIT_CACHE")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "dir_toolkit"
    except RuntimeError:  # neither HOME nor a user of this number, as in some containers
        got = f"DIR_TOOLKIT_CACHE={named}" if named else "no home folder"
        fix = "Set the environment variable DIR_TOOLKIT_CACHE to a folder, or pass cache=..."
        raise problem("there must be a folder for decoded images", got=got, fix=fix, error=SettingsError) from None


def _progress(images: Iterator[tuple[str, np.ndarray | str]], total: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """The same, with a progress bar if there is a terminal for it."""
    bar = progress_bar()
    with bar or nullcontext():
        yield from bar.track(images, total, description="decoding images once") if bar else images
