"""Random augmentation of batches of images, drawn independently for each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._checks import instance, is_tensor, require, whole

__all__ = ["augment", "augment_strongly", "to_float"]


def augment(images: Tensor, *, generator: torch.Generator, flip: bool = True, shift: int = 4) -> Tensor:
    """Each image is mirrored with probability one half and then moved by a whole number of pixels each way.

    The pixels that a move uncovers are filled by reflection about the border pixels, as ``numpy.pad(mode="reflect")``
    does. Three numbers per image are drawn for all settings, so that they leave the generator in the same state.

    Args:
        generator: the only source of randomness, on the device of ``images`` or on the CPU.
        flip: whether images are mirrored, left to right, at all.
        shift: the farthest move up, down, left and right, in pixels. It is smaller than the height and the width, and
            each whole number from ``-shift`` to ``shift`` is equally likely.
    Shape:
        images: (N, C, H, W), uint8 or floats. Returns a copy of the same shape and dtype.
    Raises:
        ShapeError: images do not have four axes.
        TypeError: images are neither uint8 nor floats, or another argument has the wrong type.
        ValueError: shift is negative, or not smaller than the height and the width.

    >>> images = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 2, 3)
    >>> augment(images, generator=torch.Generator().manual_seed(0), flip=False, shift=0).equal(images)
    True
    """
    _check_batch(images, generator, floats=True)
    instance(bool, flip=flip)
    shift = whole("shift", shift, low=0)
    count, channels, height, width = images.shape
    fits = shift < min(height, width)
    require(fits, "shift must be smaller than the height and the width", got=f"{shift} for {height}x{width}")
    draws = torch.rand((3, count), generator=generator, device=generator.device, dtype=torch.float64).to(images.device)
    mirrored = draws[0] < 0.5
    moves = (draws[1:] * (2 * shift + 1)).long() - shift
    y = _reflect(torch.arange(height, device=images.device) - moves[0, :, None], height)  # (N, H)
    x = _reflect(torch.arange(width, device=images.device) - moves[1, :, None], width)  # (N, W)
    if flip:
        x = torch.where(mirrored[:, None], width - 1 - x, x)
    source = (y[:, :, None] * width + x[:, None, :]).view(count, 1, height * width)
    flat = images.reshape(count, channels, height * width)
    return flat.gather(2, source.expand(-1, channels, -1)).view(images.shape)


def augment_strongly(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Strong augmentation for long trainings: each image is mirrored, rotated, zoomed, moved and changed in color.

    All changes are uniformly distributed. An image is mirrored with probability one half. It is rotated by up to 15
    degrees, zoomed by up to 15 % and moved by up to a twelfth of its side, each in both directions. Its brightness
    changes by up to an eighth of the range of values, and its contrast, about the mean of the image, by up to 25 %.
    With probability one fifth all colors are replaced by their mean. Uncovered pixels are filled by reflection. Eight
    numbers per image are drawn.

    Args:
        generator: the only source of randomness, on the device of ``images`` or on the CPU.
    Shape:
        images: (N, C, H, W) uint8. Returns a copy of the same shape and dtype; values are rounded and cut to [0, 255].
    Raises:
        ShapeError: images do not have four axes. TypeError: they are not uint8, or there is no generator.

    >>> images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    >>> augment_strongly(images, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([1, 3, 8, 8])
    """
    _check_batch(images, generator)
    count, _, height, width = images.shape
    if count == 0:
        return images.clone()
    draws = torch.rand((8, count), generator=generator, device=generator.device, dtype=torch.float64)
    draws = draws.float().to(images.device)
    mirror = torch.where(draws[0] < 0.5, -1.0, 1.0)
    angle, zoom, right, down, light, contrast = (2 * draws[1:7] - 1).unbind()
    angle, zoom = math.radians(15) * angle, 1 + 0.15 * zoom
    # Where each pixel of the result is read, in units of half a side. A turn must not shear images that are not square.
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [mirror * cos, -sin * height / width, right / 6, mirror * sin * width / height, cos, down / 6]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), list(images.shape), align_corners=False)
    result = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    mean = result.mean((1, 2, 3), keepdim=True)
    contrast, light = (x.view(count, 1, 1, 1) for x in (1 + 0.25 * contrast, 32 * light))
    result = (result - mean) * contrast + mean + light
    gray = (draws[7] < 0.2).view(count, 1, 1, 1)
    result = torch.where(gray, result.mean(1, keepdim=True), result)
    return result.round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Images of uint8 as float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1. The input does not change.

    Raises:
        TypeError: images are not uint8.

    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([-1.0000, -0.6000,  1.0000])
    """
    _check_dtype(images)
    return images.float().div_(127.5).sub_(1)


def _check_batch(images: Tensor, generator: torch.Generator, *, floats: bool = False) -> None:
    _check_dtype(images, floats=floats)
    require(images.ndim == 4, "images must have shape (N, C, H, W)", got=images.shape)
    instance(torch.Generator, generator=generator)


def _check_dtype(images: Tensor, *, floats: bool = False) -> None:
    is_tensor(images=images)
    known = images.dtype == torch.uint8 or (floats and images.is_floating_point())
    require(known, f"images must be uint8{' or floats' if floats else ''}", got=images.dtype)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Positions before the first pixel or after the last one are folded back about it."""
    index = index.abs()
    return torch.where(index >= length, 2 * (length - 1) - index, index)
