"""Random changes of a whole batch of images at once, each image on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._checks import instance, is_tensor, problem, whole
from ...errors import ShapeError

__all__ = ["augment", "augment_strongly", "to_float"]


def augment(images: Tensor, *, generator: torch.Generator, flip: bool = True, shift: int = 4) -> Tensor:
    """Each image mirrored left to right with probability one half, then moved by a whole number of pixels each way.

    What a shift uncovers is filled by reflection about the border pixels, as ``numpy.pad(mode="reflect")`` does. Three
    numbers an image are drawn whatever the settings, so a generator is left in the same state by all of them.

    Args:
        generator: the only source of randomness; on the device of ``images``, or on the CPU.
        flip: whether to mirror at all.
        shift: the farthest move, in pixels, up, down, left and right; smaller than either side. Each whole number from
            ``-shift`` to ``shift`` is equally likely.
    Shape:
        images: (N, C, H, W), uint8 or any float. Returns the same shape and dtype, a copy.
    Raises:
        ShapeError: images have another number of axes. TypeError: images are neither uint8 nor floats, the generator is
        none, flip is no bool or shift no whole number. ValueError: shift is negative or as large as a side.

    >>> images = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 2, 3)
    >>> augment(images, generator=torch.Generator().manual_seed(0), flip=False, shift=0).equal(images)
    True
    """
    _check_images(images)
    instance(torch.Generator, generator=generator)
    instance(bool, flip=flip)
    shift = whole("shift", shift, low=0)
    count, channels, height, width = images.shape
    if shift >= min(height, width):
        raise problem("shift must be smaller than the height and the width", got=f"{shift} for {height}x{width}")
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
    """Each image mirrored, turned, zoomed and moved, and its light and colors changed: for long trainings.

    Evenly drawn: a mirror image with probability one half; a turn of up to 15 degrees, a zoom of up to 15 % and a move
    of up to a twelfth of the side, each way; brightness up to an eighth of the range of values, each way; contrast
    about the image's mean between 75 and 125 %; all colors replaced by their mean with probability one fifth. What
    turns and moves uncover is filled by reflection. Eight numbers an image are drawn.

    Args:
        generator: the only source of randomness; on the device of ``images``, or on the CPU.
    Shape:
        images: (N, C, H, W) uint8. Returns the same shape and dtype, a copy; values are rounded and cut to 0 ... 255.
    Raises:
        ShapeError: images have another number of axes. TypeError: they are not uint8, or the generator is none.

    >>> images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    >>> augment_strongly(images, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([1, 3, 8, 8])
    """
    _check_images(images)
    if images.dtype != torch.uint8:
        raise problem("images must be uint8", got=f"dtype {images.dtype}", error=TypeError)
    instance(torch.Generator, generator=generator)
    count, _, height, width = images.shape
    if count == 0:
        return images.clone()
    draws = torch.rand((8, count), generator=generator, device=generator.device, dtype=torch.float64)
    draws = draws.float().to(images.device)
    mirror = torch.where(draws[0] < 0.5, -1.0, 1.0)
    angle, zoom, right, down, light, contrast = (2 * draws[1:7] - 1).unbind()
    angle, zoom = math.radians(15) * angle, 1 + 0.15 * zoom
    # Where each pixel of the result is read, in units of half a side; a turn must not shear what is not square.
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
    """uint8 images as float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1; the input is not written to.

    Raises:
        TypeError: images are not uint8.

    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([-1.0000, -0.6000,  1.0000])
    """
    is_tensor(images=images)
    if images.dtype != torch.uint8:
        raise problem("images must be uint8", got=f"dtype {images.dtype}", error=TypeError)
    return images.float().div_(127.5).sub_(1)


def _check_images(images: Tensor) -> None:
    is_tensor(images=images)
    if images.ndim != 4:
        raise problem("images must have shape (N, C, H, W)", got=tuple(images.shape), error=ShapeError)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise problem("images must be uint8 or floats", got=f"dtype {images.dtype}", error=TypeError)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Positions before the first or after the last pixel, folded back about it."""
    index = index.abs()
    return torch.where(index >= length, 2 * (length - 1) - index, index)
