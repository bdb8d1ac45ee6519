"""What several readers are tried with: small JPEG files, and valid bytes gone wrong."""

import io

import numpy as np
import pytest
from PIL import Image


def make_jpeg(seed=0, *, width=16, height=16, quality=90):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def mutated(data, *, count, longest=600, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(changed) + 1)), rng.integers(3)
            if kind == 0 and at < len(changed):
                changed[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del changed[at : at + int(rng.integers(1, longest))]
            else:
                changed[at:at] = rng.bytes(int(rng.integers(1, longest)))
        yield bytes(changed)


@pytest.fixture
def jpeg():
    return make_jpeg


@pytest.fixture
def mutations():
    """Valid bytes with a few flipped, cut away or put in, ``count`` times."""
    return mutated
