from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from dir_toolkit.errors import ShapeError
from dir_toolkit.experiment.data.augment import augment, augment_strongly, to_float


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photos(count: int = 40, height: int = 6, width: int = 9, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=seeded(9), dtype=torch.uint8)
    return pixels.to(dtype)


def by_hand(images: torch.Tensor, seed: int, flip: bool, shift: int) -> torch.Tensor:
    """One image after the other: mirror, pad by reflection, cut out."""
    mirrored, down, right = torch.rand((3, len(images)), generator=seeded(seed), dtype=torch.float64).numpy()
    result = []
    for i, image in enumerate(images.numpy()):
        if flip and mirrored[i] < 0.5:
            image = image[:, :, ::-1]
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        top = shift - (int(down[i] * (2 * shift + 1)) - shift)
        left = shift - (int(right[i] * (2 * shift + 1)) - shift)
        result.append(padded[:, top : top + image.shape[1], left : left + image.shape[2]])
    return torch.from_numpy(np.stack(result))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(("flip", "shift"), [(False, 0), (True, 0), (False, 5), (True, 4), (True, 1)])
def test_equals_one_image_after_the_other(dtype: torch.dtype, flip: bool, shift: int) -> None:
    images = photos(dtype=dtype)
    result = augment(images, generator=seeded(3), flip=flip, shift=shift)
    assert result.dtype == dtype
    assert result.equal(by_hand(images, 3, flip, shift))
    assert result.equal(images) == (not flip and shift == 0)


def test_a_row_moves_and_flips_as_worked_out_by_hand() -> None:
    row = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).view(1, 1, 1, 4).expand(200, 3, 4, 4)
    moved = {tuple(image[0, 0].tolist()) for image in augment(row, generator=seeded(), flip=False, shift=1)}
    assert moved == {(20, 10, 20, 30), (10, 20, 30, 40), (20, 30, 40, 30)}
    flipped = {tuple(image[0, 0].tolist()) for image in augment(row, generator=seeded(), shift=0)}
    assert flipped == {(10, 20, 30, 40), (40, 30, 20, 10)}


def test_every_move_is_equally_likely_and_flips_are_a_half() -> None:
    image = torch.zeros(6000, 1, 7, 7)
    image[:, :, 3, 3], image[:, :, 3, 2] = 2, 1
    result = augment(image, generator=seeded(), shift=1).flatten(1)
    place = result.argmax(1)
    counts = torch.stack([(place == 7 * y + x).sum() for y in (2, 3, 4) for x in (2, 3, 4)])
    assert counts.sum() == 6000
    assert (counts - 6000 / 9).abs().max() < 5 * (6000 / 9 * 8 / 9) ** 0.5
    left = result.gather(1, (place - 1)[:, None]).sum()  # the lesser pixel is still on the left
    assert abs(left.item() - 3000) < 5 * 1500**0.5


def test_only_the_generator_decides() -> None:
    images = photos()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = augment(images, generator=seeded(1))
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(5)
    assert augment(images, generator=seeded(1)).equal(first)
    assert not augment(images, generator=seeded(2)).equal(first)
    generator = seeded(1)
    augment(images, generator=generator)
    assert not augment(images, generator=generator).equal(first)


def test_settings_draw_equally_many_numbers() -> None:
    ends = []
    for flip, shift in ((True, 4), (False, 0)):
        generator = seeded()
        augment(photos(), generator=generator, flip=flip, shift=shift)
        ends.append(generator.get_state())
    assert ends[0].equal(ends[1])


def test_the_input_is_left_alone() -> None:
    images = photos()
    before = images.clone()
    augment(images, generator=seeded(), flip=False, shift=0).zero_()
    augment(images, generator=seeded())
    to_float(images).zero_()
    assert images.equal(before)


def test_channels_last_and_empty_batches_are_taken() -> None:
    images = photos().contiguous(memory_format=torch.channels_last)
    assert augment(images, generator=seeded()).equal(augment(photos(), generator=seeded()))
    assert augment(photos()[:0], generator=seeded()).shape == (0, 3, 6, 9)
    assert augment(photos(1), generator=seeded()).shape == (1, 3, 6, 9)


@pytest.mark.parametrize(
    ("images", "settings", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8)), {}, TypeError, "images must be a torch.Tensor, got ndarray."),
        (torch.zeros(3, 8, 8), {}, ShapeError, "images must have shape (N, C, H, W), got (3, 8, 8)."),
        (torch.zeros(1, 3, 8, 8).int(), {}, TypeError, "images must be uint8 or floats, got dtype torch.int32."),
        (torch.zeros(1, 3, 8, 4), {}, ValueError, "shift must be smaller than the height and the width, got 4 for"),
        (torch.zeros(1, 3, 8, 8), {"shift": -1}, ValueError, "shift must be at least 0, got -1."),
        (torch.zeros(1, 3, 8, 8), {"shift": 1.5}, TypeError, "shift must be a whole number, got 1.5."),
        (torch.zeros(1, 3, 8, 8), {"flip": "no"}, TypeError, "flip must be a bool, got str."),
        (torch.zeros(1, 3, 8, 8), {"generator": None}, TypeError, "generator must be a Generator, got NoneType."),
    ],
)
def test_augment_refuses_wrong_arguments(
    images: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^augment: " + re.escape(message)):
        augment(images, **{"generator": seeded(), **settings})


def test_to_float_maps_bytes_to_minus_one_to_one() -> None:
    assert to_float(torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[-1.0, 1.0]]
    everything = to_float(torch.arange(256, dtype=torch.uint8))
    assert everything.dtype == torch.float32
    assert (everything + everything.flip(0)).abs().max() < 1e-6
    with pytest.raises(TypeError, match=r"^to_float: images must be uint8, got dtype torch\.float32\."):
        to_float(torch.zeros(3))


def strongly_by_hand(images: torch.Tensor, seed: int) -> torch.Tensor:
    """One image and one pixel after the other, in float64, from the definition."""
    count, _, height, width = images.shape
    draws = torch.rand((8, count), generator=seeded(seed), dtype=torch.float64).numpy()
    result = np.empty(images.shape)
    for i, image in enumerate(images.numpy().astype(float)):
        mirrored, turn, zoom, right, down, light, contrast, gray = draws[:, i]
        angle, zoom = np.radians(15) * (2 * turn - 1), 1 + 0.15 * (2 * zoom - 1)
        for row in range(height):
            for column in range(width):
                # About the middle, in pixels.
                x, y = column - (width - 1) / 2, row - (height - 1) / 2
                x = -x if mirrored < 0.5 else x
                at_x = zoom * (x * np.cos(angle) - y * np.sin(angle)) + (2 * right - 1) * width / 12
                at_y = zoom * (x * np.sin(angle) + y * np.cos(angle)) + (2 * down - 1) * height / 12
                result[i, :, row, column] = bilinear(image, at_y + (height - 1) / 2, at_x + (width - 1) / 2)
        mean = result[i].mean()
        result[i] = (result[i] - mean) * (1 + 0.25 * (2 * contrast - 1)) + mean + 32 * (2 * light - 1)
        if gray < 0.2:
            result[i] = result[i].mean(0)
    return torch.from_numpy(result.clip(0, 255))


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    def reflected(spot: float, size: int) -> float:  # about the outer edges of the border pixels
        spot = (spot + 0.5) % (2 * size)
        return np.clip(min(spot, 2 * size - spot) - 0.5, 0, size - 1)

    y, x = reflected(y, image.shape[1]), reflected(x, image.shape[2])
    top, left = int(y), int(x)
    bottom, right = min(top + 1, image.shape[1] - 1), min(left + 1, image.shape[2] - 1)
    upper = image[:, top, left] * (left + 1 - x) + image[:, top, right] * (x - left)
    lower = image[:, bottom, left] * (left + 1 - x) + image[:, bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)


def test_strong_changes_equal_one_pixel_after_the_other() -> None:
    images = photos(count=20, height=9, width=12)
    result = augment_strongly(images, generator=seeded(4))
    assert result.dtype == torch.uint8
    assert (result - strongly_by_hand(images, 4)).abs().max() < 0.51  # rounding, and float32
    assert (result - strongly_by_hand(images, 5)).abs().max() > 10


def test_strong_changes_come_from_the_generator_alone_and_leave_the_input() -> None:
    images = photos()
    before, state = images.clone(), torch.get_rng_state()
    first = augment_strongly(images, generator=seeded(1))
    assert augment_strongly(images, generator=seeded(1)).equal(first)
    assert not augment_strongly(images, generator=seeded(2)).equal(first)
    assert images.equal(before)
    assert torch.get_rng_state().equal(state)
    assert augment_strongly(images[:0], generator=seeded()).shape == (0, 3, 6, 9)


def test_one_gray_in_five_is_made() -> None:
    result = augment_strongly(photos(count=2000), generator=seeded())
    gray = (result == result[:, :1]).flatten(1).all(1).sum().item()
    assert abs(gray - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("images", "settings", "error", "message"),
    [
        (photos(1)[0], {}, ShapeError, "images must have shape (N, C, H, W), got (3, 6, 9)."),
        (torch.zeros(1, 3, 8, 8), {}, TypeError, "images must be uint8, got dtype torch.float32."),
        (photos(1), {"generator": None}, TypeError, "generator must be a Generator, got NoneType."),
    ],
)
def test_augment_strongly_refuses_wrong_arguments(
    images: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^augment_strongly: " + re.escape(message)):
        augment_strongly(images, **{"generator": seeded(), **settings})
