"""What several readers are tried with: small JPEG files, and valid bytes gone wrong."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dir_toolkit.experiment.data.images import Splits

CARDS = Path(__file__).parents[3] / "data_cards"


def make_jpeg(seed: int = 0, *, width: int = 16, height: int = 16, quality: int = 90) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def mutated(data: bytes, *, count: int, longest: int = 600, seed: int = 0) -> Iterator[bytes]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            place, kind = int(rng.integers(len(changed) + 1)), rng.integers(3)
            if kind == 0 and place < len(changed):
                changed[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del changed[place : place + int(rng.integers(1, longest))]
            else:
                changed[place:place] = rng.bytes(int(rng.integers(1, longest)))
        yield bytes(changed)


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    return make_jpeg


@pytest.fixture
def mutations() -> Callable[..., Iterator[bytes]]:
    """Valid bytes with a few flipped, cut away or put in, ``count`` times."""
    return mutated


@pytest.fixture
def idx() -> Callable[[np.ndarray], bytes]:
    """The idx file of an array of uint8."""
    return lambda array: bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture(scope="session")
def read_card() -> Callable[..., dict[str, Any]]:
    """The facts in a data card, by its name, after those were checked that every card gives of its reader."""

    def read(name: str, reader: Callable[..., Splits]) -> dict[str, Any]:
        text = (CARDS / f"{name}.md").read_text("utf-8")
        card: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])["dir_toolkit"]
        assert card["reader"] == f"{reader.__module__}.{reader.__name__}"
        assert card["arguments"] == list(inspect.signature(reader).parameters)
        for size in card["splits"].values():
            assert f"{size:,}" in text.split("---\n")[2]
        for part, histogram in (card["label_histogram"] or {}).items():
            assert sum(histogram) == card["splits"][part]
        return card

    return read


def _same_as_card(card: dict[str, Any], splits: Splits, per_bin: int) -> None:
    for name in ("train", "val", "test"):
        data = getattr(splits, name)
        assert len(data) == card["splits"][name]
        assert np.bincount(data.labels.astype(int) // per_bin).tolist() == card["label_histogram"][name]
        assert data.digest == card["digest"].get(name, data.digest)
    label = next(field for field in card["fields"].values() if field.get("label"))
    assert card["fields"]["image"]["type"] == f"{splits.train.images.dtype} {splits.train.images.shape[1:]}"
    assert label["type"] == splits.train.labels.dtype.name
    assert label["range"] == [splits.test.labels.min(), splits.test.labels.max()]
    assert splits.source == card["source"]
    assert splits.skipped == {}


@pytest.fixture(scope="session")
def same_as_card() -> Callable[..., None]:
    """Sizes, histograms (with ``per_bin`` whole labels per bin), digests, types and ranges are those in the card."""
    return _same_as_card
