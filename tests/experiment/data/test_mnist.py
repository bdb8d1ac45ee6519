"""MNIST from small idx files made here, downloads through pooch with a false network, and the data card."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from dir_toolkit.errors import DataError, LabelError, ShapeError
from dir_toolkit.experiment.data import mnist as module
from dir_toolkit.experiment.data.long_tail import exponential_profile, step_profile
from dir_toolkit.experiment.data.mnist import download_mnist, mnist

REPOSITORY = Path(__file__).parents[3]
CARD_TEXT = (REPOSITORY / "data_cards" / "mnist.md").read_text("utf-8")
REAL = Path(os.environ.get("DIR_TOOLKIT_MNIST", REPOSITORY.parent / "shared" / "data" / "mnist"))
LABELS = {"train": np.arange(60, dtype=np.uint8) % 10, "t10k": np.arange(20, dtype=np.uint8) % 10}


@pytest.fixture
def small_files(idx: Callable[[np.ndarray], bytes]) -> dict[str, bytes]:
    """The four files, unpacked, with pixels that tell label and position."""
    files = {}
    for part, labels in LABELS.items():
        pixels = np.zeros((len(labels), 28, 28), np.uint8)
        pixels[:, 0, 0], pixels[:, 0, 1] = labels, np.arange(len(labels))
        files[f"{part}-images-idx3-ubyte"] = idx(pixels)
        files[f"{part}-labels-idx1-ubyte"] = idx(labels)
    return files


@pytest.fixture
def folder(tmp_path: Path, small_files: dict[str, bytes]) -> Path:
    for name, data in small_files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    return tmp_path


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, small_files: dict[str, bytes]) -> dict[str, bytes]:
    """As if the small files were the ones published; their packed bytes by name."""
    packed = {name: gzip.compress(data, mtime=0) for name, data in small_files.items()}
    facts = {
        name: module._Official(hashlib.sha256(data).hexdigest(), hashlib.sha256(packed[name]).hexdigest())
        for name, data in small_files.items()
    }
    monkeypatch.setattr(module, "_FILES", facts)
    return packed


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """url -> bytes, an exception, or a status; pooch and the rest of requests are the real ones."""
    answers, asked = {}, []

    def send(adapter: Any, request: Any, *, timeout: float, **options: Any) -> requests.Response:
        asked.append(request.url)
        assert timeout == module._TIMEOUT
        given = answers.get(request.url, 404)
        if isinstance(given, Exception):
            raise given
        response = requests.Response()
        response.url, response.request = request.url, request
        response.status_code, body = (given, b"none") if isinstance(given, int) else (200, given)
        response.raw = io.BytesIO(body)
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    answers["asked"] = asked
    return answers


def urls(name: str) -> list[str]:
    return [f"{mirror}{name}.gz" for mirror in module._MIRRORS]


def fill(network: dict[str, Any], packed: dict[str, bytes], mirror: int = 0) -> None:
    network.update({urls(name)[mirror]: data for name, data in packed.items()})


def test_images_go_with_their_labels(folder: Path) -> None:
    splits = mnist(folder, val_per_class=2)
    assert (splits.source, splits.skipped) == ("mnist", {})
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40, 20, 20)
    for part, labels in (("train", LABELS["train"]), ("val", LABELS["train"]), ("test", LABELS["t10k"])):
        data = getattr(splits, part)
        images, classes = data.batch(np.arange(len(data)))
        assert images.shape == (len(data), 1, 28, 28)
        assert (images[:, 0, 0, 0] == classes).all()
        assert (images[:, 0, 0, 1].numpy() == data.rows).all()
        assert (labels[data.rows] == data.labels).all()
    assert splits.train.images is splits.val.images


def test_settings_reach_the_splits(folder: Path) -> None:
    splits = mnist(folder, val_per_class=1, train_per_class=4, shares=step_profile(10, 0.5), noise=0.2, seed=5)
    true = LABELS["train"][splits.train.rows]
    assert np.bincount(true).tolist() == [2] * 5 + [4] * 5
    assert (splits.train.labels != true).sum() == 6
    assert splits.val.digest != mnist(folder, val_per_class=1).val.digest


def test_packed_and_plain_files_give_the_same(
    folder: Path, small_files: dict[str, bytes], idx: Callable[[np.ndarray], bytes]
) -> None:
    packed = mnist(folder, val_per_class=2)
    for name, data in small_files.items():
        (folder / f"{name}.gz").unlink()
        (folder / name).write_bytes(data)
    plain = mnist(str(folder), val_per_class=2)
    assert plain.train.digest == packed.train.digest
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(9 - LABELS["train"])))
    assert mnist(folder, val_per_class=2).train.digest != plain.train.digest  # the packed file is the one read


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    (folder / "train-images-idx3-ubyte.gz").unlink()
    message = (
        f"got {folder} without train-images-idx3-ubyte, t10k-labels-idx1-ubyte. download_mnist(root) fetches them."
    )
    with pytest.raises(DataError, match="^mnist: root must hold the four files .*" + re.escape(message)):
        mnist(folder)
    with pytest.raises(DataError, match="root must hold the four files"):
        mnist(folder / "none")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((60, 28, 27), np.uint8), "must be uint8 (M, 28, 28), got uint8 (60, 28, "),
        ("train-images-idx3-ubyte", np.zeros((60, 784), np.uint8), "must be uint8 (M, 28, 28), got uint8 (60, 784)."),
        ("t10k-labels-idx1-ubyte", np.zeros((20, 1), np.uint8), "the array must be uint8 (M,), got uint8 (20, 1)."),
        ("t10k-labels-idx1-ubyte", np.arange(20, dtype=np.uint8), "byte 18: labels must be 0 to 9, got 10."),
        ("train-labels-idx1-ubyte", np.zeros(59, np.uint8), "as many images as labels, got 60 and 59 of train."),
        ("t10k-images-idx3-ubyte", np.zeros((21, 28, 28), np.uint8), "as many images as labels, got 21 and 20 of t10k"),
    ],
)
def test_other_arrays_are_refused(
    folder: Path, name: str, array: np.ndarray, message: str, idx: Callable[[np.ndarray], bytes]
) -> None:
    (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    with pytest.raises(DataError, match=re.escape(message)):
        mnist(folder, val_per_class=1)


def test_other_types_of_numbers_are_refused(folder: Path) -> None:
    data = bytes([0, 0, 9, 1, 0, 0, 0, 20]) + bytes(20)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"the array must be uint8 \(M,\), got int8 \(20,\)\."):
        mnist(folder, val_per_class=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"shares": [1.0] * 9}, ShapeError, "shares must hold one share per class, got 9 for 10 classes"),
        ({"shares": [0.0] * 10}, ValueError, "shares must be > 0 and <= 1, got 0.0 at index [0] (10 such values)"),
        ({"noise": 1.5}, ValueError, "noise must be >= 0 and < 1, got 1.5"),
        ({"noise": "much"}, TypeError, "noise must be a number, got 'much'"),
        ({"val_per_class": 6}, ValueError, "got 6 of class 0, which has 6"),
        ({"train_per_class": 0}, ValueError, "train_per_class must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"verify": 1}, TypeError, "mnist: verify must be a bool, got int"),
    ],
)
def test_wrong_settings_are_refused(
    folder: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        mnist(folder, **{"val_per_class": 2, **settings})


def test_a_digit_that_is_missing_in_training_is_named(folder: Path, idx: Callable[[np.ndarray], bytes]) -> None:
    labels = LABELS["train"].clip(0, 8)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(LabelError, match="test_labels must be class indices, >= 0 and < 9, got 9"):
        mnist(folder, val_per_class=1)


def test_verify_looks_at_what_is_inside(
    folder: Path, official: dict[str, bytes], small_files: dict[str, bytes]
) -> None:
    digest = mnist(folder, val_per_class=2, verify=True).train.digest
    name = "t10k-images-idx3-ubyte"
    (folder / f"{name}.gz").unlink()
    (folder / name).write_bytes(small_files[name])
    assert mnist(folder, val_per_class=2, verify=True).train.digest == digest
    changed = bytearray(small_files[name])
    changed[-1] += 1
    (folder / name).write_bytes(changed)
    assert mnist(folder, val_per_class=2).train.digest == digest
    got = hashlib.sha256(changed).hexdigest()
    with pytest.raises(DataError, match=f"{name}: SHA-256 of the unpacked file must be the official .*, got {got}"):
        mnist(folder, val_per_class=2, verify=True)


def test_downloaded_files_are_read(tmp_path: Path, official: dict[str, bytes], network: dict[str, Any]) -> None:
    fill(network, official)
    root = tmp_path / "new" / "mnist"
    download_mnist(root)
    assert sorted(path.name for path in root.iterdir()) == sorted(f"{name}.gz" for name in official)
    assert len(mnist(root, val_per_class=2, verify=True).train) == 40
    asked = len(network["asked"])
    assert asked == 4
    download_mnist(root)  # everything is there
    assert len(network["asked"]) == asked


def test_download_keeps_what_is_there(
    folder: Path, official: dict[str, bytes], network: dict[str, Any], small_files: dict[str, bytes]
) -> None:
    kept, plain = folder / "train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte"
    before = kept.read_bytes()
    (folder / f"{plain}.gz").unlink()
    (folder / plain).write_bytes(small_files[plain])
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    fill(network, official)
    download_mnist(folder)
    assert network["asked"] == [urls("t10k-images-idx3-ubyte")[0]]
    assert kept.read_bytes() == before
    assert not (folder / f"{plain}.gz").exists()


def test_download_overwrites_nothing(
    folder: Path, official: dict[str, bytes], network: dict[str, Any], idx: Callable[[np.ndarray], bytes]
) -> None:
    other = folder / "train-labels-idx1-ubyte.gz"
    other.write_bytes(gzip.compress(idx(9 - LABELS["train"])))
    before = other.read_bytes()
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    fill(network, official)
    with pytest.raises(DataError, match="SHA-256 of the unpacked file must be the official"):
        download_mnist(folder)
    assert (other.read_bytes(), network["asked"]) == (before, [])


FAULTS = {
    "digest": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA256 hash of downloaded file .* does not match"),
    "large": (lambda data: data + b"\0", "SHA256 hash of downloaded file .* does not match"),
    "short": (lambda data: data[:-1], "SHA256 hash of downloaded file .* does not match"),
    "missing": (lambda data: 404, "404 Client Error"),
    "timeout": (lambda data: requests.Timeout("timed out"), "timed out"),
    "no network": (lambda data: requests.ConnectionError("no route"), "no route"),
    "silent": (lambda data: requests.RequestException(), "RequestException"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_download_takes_the_next_mirror(
    tmp_path: Path, official: dict[str, bytes], network: dict[str, Any], fault: str
) -> None:
    make, _ = FAULTS[fault]
    fill(network, official, mirror=1)
    network.update({urls(name)[0]: make(data) for name, data in official.items()})
    download_mnist(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        f"{name}.gz": data for name, data in official.items()
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_download_names_what_each_mirror_did(
    tmp_path: Path, official: dict[str, bytes], network: dict[str, Any], fault: str
) -> None:
    make, message = FAULTS[fault]
    first = "train-images-idx3-ubyte"
    network[urls(first)[0]] = make(official[first])
    network[urls(first)[1]] = 500
    one, two = (re.escape(url) for url in urls(first))
    whole = (
        rf"^download_mnist: one of the mirrors must give {first}\.gz, got {one}: {message}.*; {two}: 500 Server Error"
    )
    with pytest.raises(DataError, match=whole):
        download_mnist(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mirrors_speak_https() -> None:
    assert len(set(module._MIRRORS)) == 2
    assert all(re.fullmatch("https://.*/", mirror) for mirror in module._MIRRORS)


@pytest.fixture
def card(read_card: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return read_card("mnist", mnist)


def test_the_card_matches_the_reader(card: dict[str, Any]) -> None:
    assert card["source"] == "mnist"
    assert card["files"] == {
        name: {"unpacked": facts.unpacked, "packed": facts.packed} for name, facts in module._FILES.items()
    }
    whole = np.array(card["label_histogram"]["train"])
    for name, shares in (("step_0.1", step_profile(10, 0.1)), ("exponential_100", exponential_profile(10, 100))):
        assert np.rint(whole * shares).astype(int).tolist() == card["long_tails"][name]
    for mirror in module._MIRRORS:
        assert mirror in CARD_TEXT


def test_card_matches_what_the_reader_gives(folder: Path, card: dict[str, Any]) -> None:
    train = mnist(folder, val_per_class=2).train
    assert card["fields"]["image"]["type"] == f"{train.images.dtype} {train.images.shape[1:]}"
    assert card["fields"]["label"]["type"] == train.labels.dtype.name
    assert card["fields"]["label"]["range"] == [0, 9]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the files of MNIST; name their folder in DIR_TOOLKIT_MNIST")
def test_the_card_matches_the_real_files(card: dict[str, Any], same_as_card: Callable[..., None]) -> None:
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        module._read(module._find(REAL, name), name, verify=True)
    splits = mnist(REAL)
    same_as_card(card, splits, 1)
    for name, shares in (("step_0.1", step_profile(10, 0.1)), ("exponential_100", exponential_profile(10, 100))):
        thinned = mnist(REAL, shares=shares)
        assert np.bincount(thinned.train.labels).tolist() == card["long_tails"][name]
        assert thinned.val.digest == splits.val.digest
