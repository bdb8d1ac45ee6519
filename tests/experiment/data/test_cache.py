"""Decoding once: what is decoded, where it is kept, and that nothing torn or damaged is ever trusted."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dir_toolkit.errors import DataError, SettingsError
from dir_toolkit.experiment.data import cache as cache_module
from dir_toolkit.experiment.data.archives import FolderFiles
from dir_toolkit.experiment.data.cache import Decoded, decode_image, decode_once, make_splits

NAMES = [f"{i}.jpg" for i in range(5)]


@pytest.fixture
def files(tmp_path: Path, jpeg: Callable[..., bytes]) -> FolderFiles:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        (folder / name).write_bytes(jpeg(seed))
    return FolderFiles(folder)


@pytest.fixture
def refuse_to_decode(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch_off() -> None:
        def fail(*_: Any) -> None:
            raise AssertionError("decoded again")

        monkeypatch.setattr(cache_module, "decode_image", fail)

    return switch_off


def kept(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def test_images_are_decoded_to_channels_first_rgb() -> None:
    out = io.BytesIO()
    Image.new("RGB", (200, 100), (250, 128, 3)).save(out, "JPEG", quality=100)
    image = decode_image(out.getvalue(), 24)
    assert image.shape == (3, 24, 24)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.reshape(3, -1).astype(int), np.tile([[250], [128], [3]], 24 * 24), atol=3)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (16, 16)).save(out, "JPEG")
    assert decode_image(out.getvalue(), 8).shape == (3, 8, 8)


def test_sixteen_bits_of_grey_become_eight() -> None:
    ramp, images = np.linspace(0, 65535, 64).reshape(8, 8), []
    for pixels in ((ramp / 257).round().astype(np.uint8), ramp.astype(np.uint16)):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        images.append(decode_image(out.getvalue(), 8).astype(int))
    np.testing.assert_allclose(images[1], images[0], atol=1)
    assert images[1].max() == 255


def test_size_of_the_image_keeps_every_pixel(jpeg: Callable[..., bytes]) -> None:
    data = jpeg(3)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_image(data, 16), np.asarray(image).transpose(2, 0, 1))


def test_a_giant_image_is_not_decoded(jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_PIXELS", 16 * 15)
    with pytest.raises(ValueError, match="256 pixels, at most 240 are decoded"):
        decode_image(jpeg(), 8)


def test_a_bomb_of_one_header_is_not_decoded(jpeg: Callable[..., bytes]) -> None:
    data = bytearray(jpeg())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="4,294,836,225 pixels"):
        decode_image(bytes(data), 8)


def test_other_formats_are_refused() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "BMP")
    for data in (out.getvalue(), b"", b"\xff\xd8"):
        with pytest.raises(ValueError, match=r"\w"):
            decode_image(data, 8)


def test_png_is_read_as_rgb() -> None:
    out, colours = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    Image.fromarray(colours).save(out, "PNG")
    np.testing.assert_array_equal(decode_image(out.getvalue(), 8), colours[..., :3].transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"\w"):
        decode_image(out.getvalue()[:-40], 8)


def test_mutated_jpeg_gives_an_image_or_a_value_error(
    jpeg: Callable[..., bytes], mutations: Callable[..., Iterator[bytes]]
) -> None:
    results = {True: 0, False: 0}
    for changed in mutations(jpeg(), count=400, longest=40):
        try:
            assert decode_image(changed, 8).shape == (3, 8, 8)
            results[True] += 1
        except ValueError:
            results[False] += 1
    assert min(results.values()) > 20


def test_without_pillow_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, jpeg: Callable[..., bytes]
) -> None:
    data = jpeg()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'Pillow must be installed, .* pip install "dir_toolkit\[recipes\]"'):
        decode_image(data, 8)


def test_rows_hold_the_images(files: FolderFiles, tmp_path: Path) -> None:
    decoded = decode_once(files, NAMES, size=8, cache=tmp_path / "cache")
    assert decoded.images.shape == (5, 3, 8, 8)
    assert not decoded.images.flags.writeable
    assert decoded.rows == {name: i for i, name in enumerate(NAMES)}
    for name, data in files.read(NAMES):
        np.testing.assert_array_equal(decoded.images[decoded.rows[name]], decode_image(data, 8))
    np.testing.assert_array_equal(np.load(next((tmp_path / "cache").glob("*.npy"))), decoded.images)


def test_a_second_call_does_not_decode(
    files: FolderFiles, tmp_path: Path, refuse_to_decode: Callable[[], None]
) -> None:
    first = decode_once(files, NAMES, size=8, cache=tmp_path / "cache").images
    refuse_to_decode()
    np.testing.assert_array_equal(decode_once(files, NAMES, size=8, cache=tmp_path / "cache").images, first)
    for other in ({"size": 9}, {"names": NAMES[:4]}):
        with pytest.raises(AssertionError, match="decoded again"):
            decode_once(files, **{"names": NAMES, "size": 8, "cache": tmp_path / "cache", **other})


def test_changed_bytes_are_decoded_anew(files: FolderFiles, tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    before = decode_once(files, NAMES, size=8, cache=tmp_path / "cache").images[0].copy()
    (files.root / NAMES[0]).write_bytes(jpeg(99))
    after = decode_once(files, NAMES, size=8, cache=tmp_path / "cache").images[0]
    assert (before != after).any()


def test_writes_nothing_outside_the_cache(files: FolderFiles, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    decode_once(files, NAMES, size=8, cache=tmp_path / "a" / "cache")
    new = {path for path in tmp_path.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert new - {tmp_path / "a"} == {tmp_path / "a" / "cache", *(tmp_path / "a" / "cache").iterdir()}
    assert kept(tmp_path / "a" / "cache") == [".json", ".lock", ".npy"]


def test_the_default_folder_follows_the_environment(
    files: FolderFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIR_TOOLKIT_CACHE", str(tmp_path / "named"))
    decode_once(files, NAMES, size=8)
    assert ".npy" in kept(tmp_path / "named")
    monkeypatch.delenv("DIR_TOOLKIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    decode_once(files, NAMES, size=8)
    assert ".npy" in kept(tmp_path / "home" / ".cache" / "dir_toolkit")


def test_default_folder_of_a_user_with_or_without_a_home(
    files: FolderFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIR_TOOLKIT_CACHE", "~/named")
    decode_once(files, NAMES, size=8)
    assert ".npy" in kept(tmp_path / "home" / "named")

    def nobody(*_: Any) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("DIR_TOOLKIT_CACHE")
    with pytest.raises(
        SettingsError, match=r"^decode_once: .* got no home folder\. Set .* DIR_TOOLKIT_CACHE to a folder"
    ):
        decode_once(files, NAMES, size=8)
    monkeypatch.setenv("DIR_TOOLKIT_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(SettingsError, match="got DIR_TOOLKIT_CACHE=~nobody-of-this-name/x"):
        decode_once(files, NAMES, size=8)


@pytest.mark.parametrize("what", ["cut", "grown", "dtype", "empty", "gone", "notes", "notes gone", "other notes"])
def test_a_damaged_cache_is_rebuilt(files: FolderFiles, tmp_path: Path, what: str) -> None:
    whole = decode_once(files, NAMES, size=8, cache=tmp_path / "cache").images.copy()
    array = next((tmp_path / "cache").glob("*.npy"))
    notes = array.with_suffix(".json")
    data = array.read_bytes()
    changed = {"cut": data[:-1], "grown": data + b"\0", "dtype": data.replace(b"|u1", b"|i1"), "empty": b""}
    if what in changed:
        array.write_bytes(changed[what])
    elif what == "gone":
        array.unlink()
    elif what == "notes gone":
        notes.unlink()
    else:
        notes.write_text('{"7.jpg": "no such image"}' if what == "other notes" else "{")
    decoded = decode_once(files, NAMES, size=8, cache=tmp_path / "cache")
    np.testing.assert_array_equal(decoded.images, whole)
    assert array.read_bytes() == data
    assert json.loads(notes.read_text()) == {}


def test_what_a_killed_process_left_is_cleared_away(files: FolderFiles, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    decode_once(files, NAMES, size=8, cache=folder)
    array = next(folder.glob("*.npy"))
    array.rename(folder / f".{array.name}.0123456789abcdef.tmp")
    (folder / ".other.npy.0123456789abcdef.tmp").touch()
    decode_once(files, NAMES, size=8, cache=folder)
    assert [path.name for path in folder.glob(".*")] == [".other.npy.0123456789abcdef.tmp"]


def build(root: Path, folder: Path, start: Any, answers: Any) -> None:
    start.wait()
    answers.put(decode_once(FolderFiles(root), NAMES, size=8, cache=folder).images.tobytes())


def hold(root: Path, folder: Path, building: Any) -> None:
    """Start to build, and hang in the midst of it."""

    def hang(*_: Any) -> None:
        building.set()
        threading.Event().wait()

    cache_module.decode_image = hang
    decode_once(FolderFiles(root), NAMES, size=8, cache=folder)


def test_two_processes_build_at_once_after_a_third_was_killed_at_it(files: FolderFiles, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    building, start, answers = context.Event(), context.Barrier(3), context.Queue()
    arguments = (files.root, tmp_path / "cache")
    holder = context.Process(target=hold, args=(*arguments, building))
    both = [context.Process(target=build, args=(*arguments, start, answers)) for _ in range(2)]
    for process in (holder, *both):
        process.start()
    assert building.wait(60)
    assert ".tmp" in kept(tmp_path / "cache")
    start.wait(60)
    holder.kill()
    one, two = (answers.get(timeout=60) for _ in both)
    for process in (holder, *both):
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert one == two == decode_once(files, NAMES, size=8, cache=tmp_path / "alone").images.tobytes()
    assert kept(tmp_path / "cache") == [".json", ".lock", ".npy"]


def test_without_locks_every_process_decodes(
    files: FolderFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_to_decode: Callable[[], None]
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    decode_once(files, NAMES, size=8, cache=tmp_path / "cache")
    refuse_to_decode()
    assert decode_once(files, NAMES, size=8, cache=tmp_path / "cache").rows


def test_damaged_image_raises_or_is_left_out(
    files: FolderFiles, tmp_path: Path, refuse_to_decode: Callable[[], None]
) -> None:
    damaged = files.root / NAMES[2]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"2\.jpg: the image must be a whole JPEG, got .*truncated"):
        decode_once(files, NAMES, size=8, cache=tmp_path / "cache")
    assert kept(tmp_path / "cache") == [".lock"]
    decoded = decode_once(files, NAMES, size=8, cache=tmp_path / "cache", on_error="skip")
    assert list(decoded.rows.items()) == [("0.jpg", 0), ("1.jpg", 1), ("3.jpg", 3), ("4.jpg", 4)]
    refuse_to_decode()
    assert decode_once(files, NAMES, size=8, cache=tmp_path / "cache", on_error="skip").rows == decoded.rows
    with pytest.raises(DataError, match=r"2\.jpg: the image must be a whole JPEG"):
        decode_once(files, NAMES, size=8, cache=tmp_path / "cache")


def test_wrong_settings_are_refused(files: FolderFiles, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        decode_once(files, NAMES, size=0, cache=tmp_path)
    with pytest.raises(ValueError, match="on_error must be one of"):
        decode_once(files, NAMES, size=8, cache=tmp_path, on_error="ignore")
    with pytest.raises(DataError, match="at least one image"):
        decode_once(files, [], size=8, cache=tmp_path)


def test_progress_shows_only_on_a_terminal(
    files: FolderFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    decode_once(files, NAMES, size=8, cache=tmp_path / "quiet")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    decode_once(files, NAMES, size=8, cache=tmp_path / "shown")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    decode_once(files, NAMES, size=8, cache=tmp_path / "no rich")
    assert kept(tmp_path / "shown") == kept(tmp_path / "no rich")


def test_splits_leave_out_and_count(files: FolderFiles, tmp_path: Path) -> None:
    images = np.arange(3 * 3, dtype=np.uint8).reshape(3, 3, 1, 1)
    decoded = Decoded(images, {"a": 2, "b": 0, "c": 1})
    parts = {"train": [("a", 30.0), ("lost", 31.0)], "val": [("b", 1.5)], "test": [("c", 90.0), ("a", 30.0)]}
    splits = make_splits(decoded, parts, source="list", skipped={"missing file": 2})
    assert splits.skipped == {"missing file": 2, "unreadable image": 1}
    assert splits.test.rows.tolist() == [1, 2]
    assert splits.test.labels.tolist() == [90.0, 30.0]
    assert len({splits.train.digest, splits.val.digest, splits.test.digest}) == 3
    with pytest.raises(DataError, match="list: the val split must hold at least one image"):
        make_splits(decoded, {**parts, "val": [("lost", 1.0)]}, source="list", skipped={})
