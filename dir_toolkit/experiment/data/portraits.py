"""Synthetic portraits: faces of ages 0 to 100 drawn from ellipses and strokes, with a long tail at both ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from ..._checks import one_of, whole
from ...errors import LabelError
from ._checks import check_each, row
from .images import ImageSet, Splits

__all__ = ["draw_portraits", "portraits"]

_Number = np.ndarray | float
_SPLITS = ("train", "val", "test")
_OLDEST = 100
_DRAWS = 128  # random numbers per image; a multiple of four, the size of a Philox block
_CHUNK_PIXELS = 1 << 16  # drawn at once, so that the working arrays stay in the cache of the processor

_SKIN = [[248, 221, 202], [236, 194, 165], [220, 170, 132], [190, 135, 96], [146, 97, 66], [98, 64, 46]]
_HAIR = [[28, 23, 24], [52, 35, 27], [92, 60, 38], [140, 88, 48], [176, 96, 52], [214, 176, 112]]
_IRIS = [[66, 42, 28], [104, 70, 38], [92, 112, 72], [86, 128, 168]]
_GREY = [226, 226, 228]


def portraits(n_train: int = 4000, n_val: int = 505, n_test: int = 1010, *, size: int = 32, seed: int = 0) -> Splits:
    """Portraits with long-tailed training ages and balanced validation and test ages.

    Training ages, from 0 to 100, follow ``exp(-|age - 26| / 10) + 0.02`` as closely as whole numbers allow, for every
    number of images. With 4,000 images each age occurs, 13 ages more than 100 times and about half of them fewer than
    20 times. Validation and test go through all ages in turn, so multiples of 101 are balanced exactly. An image and
    its age depend only on the seed, the split, the size and the position, so the first k images stay the same when n
    grows.

    Args:
        size: the height and the width, in pixels, at least 16.
        seed: a whole number of at least 0.
    Units:
        labels are ages in years, whole numbers held as float32.
    Raises:
        ValueError: a length or the seed is negative, or the size is below 16.

    >>> splits = portraits(200, 101, 101)
    >>> splits.train.images.shape, splits.test.labels[:4].tolist()
    ((200, 3, 32, 32), [0.0, 37.0, 74.0, 10.0])
    """
    seed, size = whole("seed", seed, low=0), whole("size", size, low=16)
    lengths = {"n_train": n_train, "n_val": n_val, "n_test": n_test}
    counts = [whole(name, length, low=0) for name, length in lengths.items()]
    train, val, test = (_image_set(name[2:], count, size, seed) for name, count in zip(lengths, counts, strict=True))
    return Splits(train, val, test, source="portraits", skipped={})


def draw_portraits(
    ages: Sequence[float] | np.ndarray, *, size: int = 32, seed: int = 0, split: str = "train", first: int = 0
) -> np.ndarray:
    r"""One portrait per age.

    A face looks like its *apparent* age, :math:`age + \mathcal N(0, 1.2 + 0.075\,age)`. Every cue of age (head and
    eyes, grey hair, hairline, lines, folds, spots, sagging, glasses) follows the apparent age with noise of its own.
    Skin, hair style, pose, light, background and pixel noise do not depend on the age.

    Pixels are computed with + - * / and square roots only, which IEEE arithmetic rounds in the same way everywhere. So
    the images are the same whichever vector instructions a processor has.

    Args:
        size: the height and the width, in pixels, at least 16.
        split: ``"train"``, ``"val"`` or ``"test"``; each split has random numbers of its own.
        first: the position of the first image in its split: ``draw_portraits(ages[5:], first=5)`` equals
            ``draw_portraits(ages)[5:]``.
    Shape:
        ages: (N,), integers or floats. Returns (N, 3, size, size) uint8 in the order red, green, blue.
    Units:
        ages: years, 0 to 100.
    Raises:
        ShapeError: ages are not one row. LabelError: an age lies outside [0, 100] or is NaN.
        ValueError: the split is unknown, the seed or ``first`` is negative, or the size is below 16.
        TypeError: ages are not numbers, or another argument is not a whole number.

    >>> draw_portraits([0, 50, 100], size=16).shape
    (3, 3, 16, 16)
    """
    years = row("ages", ages).astype(np.float64)
    check_each(f"ages must lie in 0 to {_OLDEST}", years, (years >= 0) & (years <= _OLDEST), LabelError)
    size, first = whole("size", size, low=16), whole("first", first, low=0)
    seed = whole("seed", seed, low=0)
    one_of("split", split, _SPLITS)
    images = np.empty((len(years), 3, size, size), dtype=np.uint8)
    chunk = max(1, _CHUNK_PIXELS // size**2)
    for start in range(0, len(years), chunk):
        part = years[start : start + chunk]
        draws = _Draws(_raw(seed, split, "face", first + start, len(part), _DRAWS))
        drawn = _portrait(_pixels(part), draws, size)
        drawn += draws.amount(1.5, 5.0)[..., None] * _grain(seed, split, first + start, drawn.shape)
        images[start : start + chunk] = np.rint(drawn.clip(0, 255))
    return images


def _image_set(split: str, length: int, size: int, seed: int) -> ImageSet:
    labels, rows = _ages(split, length, seed), np.arange(length, dtype=np.int64)
    images = draw_portraits(labels, size=size, seed=seed, split=split)
    return ImageSet(images, labels, rows)


def _ages(split: str, length: int, seed: int) -> np.ndarray:
    position = np.arange(length)
    if split != "train":
        return (position * 37 % (_OLDEST + 1)).astype(np.float32)
    # Steps of the golden ratio spread evenly over [0, 1) at every length, so scarce ages occur in proportion.
    offset = _unit(_raw(seed, split, "age", 0, 1, 4))[0, 0]
    density = np.exp(-np.abs(np.arange(_OLDEST + 1) - 26) / 10) + 0.02
    steps = np.cumsum(density) / density.sum()
    return np.searchsorted(steps[:-1], (offset + position * 0.6180339887498949) % 1, side="right").astype(np.float32)


def _raw(seed: int, split: str, use: str, first: int, count: int, width: int) -> np.ndarray:
    """Random words (count, width). Row i is the same for every count, and the width is a multiple of four."""
    stream = np.random.SeedSequence([("age", "face", "grain").index(use), _SPLITS.index(split), seed])
    philox = np.random.Philox(key=stream.generate_state(2, np.uint64), counter=first * width // 4)
    return philox.random_raw(count * width).reshape(count, width)


def _unit(raw: np.ndarray) -> np.ndarray:
    """Words as float64 in (0, 1)."""
    return ((raw >> np.uint64(12)) + 0.5) * 2.0**-52


def _grain(seed: int, split: str, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """Pixel noise of unit variance: the sum of two random bytes per value, so one word gives four values."""
    count, values = shape[0], int(np.prod(shape[1:]))
    raw = _raw(seed, split, "grain", first, count, -(-values // 16) * 4)
    pairs = raw.astype("<u8").view(np.uint8).reshape(count, -1, 2)[:, :values]
    return ((pairs[..., 0].astype(np.float32) + pairs[..., 1] - 255) * np.float32(1 / 104.5)).reshape(shape)


class _Draws:
    """Random numbers that are handed out column by column, one number per image, as (N, 1, 1) float32."""

    def __init__(self, raw: np.ndarray) -> None:
        self.columns = iter(_unit(raw).T)

    def amount(self, low: float, high: float) -> np.ndarray:
        return _pixels(low + (high - low) * next(self.columns))

    def spread(self, sigma: float) -> np.ndarray:
        return _pixels(sigma * ndtri(next(self.columns)).clip(-2.5, 2.5))

    def chance(self, probability: np.ndarray | float) -> np.ndarray:
        return (self.amount(0, 1) < probability).astype(np.float32)

    def colour(self, palette: list[list[int]], position: np.ndarray, jitter: float) -> np.ndarray:
        """(N, 3, 1, 1): the colour at a position in [0, 1] along a palette, with each channel jittered."""
        place = position[:, 0, 0].clip(0, 1) * (len(palette) - 1)
        channels = [np.interp(place, np.arange(len(palette)), channel) for channel in zip(*palette, strict=True)]
        return _pixels(np.stack(channels, 1)) + np.stack([self.spread(jitter)[:, 0] for _ in range(3)], 1)[..., None]


def _pixels(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[..., None, None]


def _ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """A ramp that is 0 below ``low`` and 1 above ``high``, and smooth between them."""
    t = ((value - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def _join(one: np.ndarray, other: np.ndarray, soft: float) -> np.ndarray:
    """The signed distance to two shapes that are grown together, with a rounded joint."""
    t = (0.5 + 0.5 / soft * (other - one)).clip(0, 1)
    return other + t * (one - other) - soft * t * (1 - t)


def _between(t: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * t


class _Canvas:
    """The images of one chunk, and where each pixel lies in its face.

    Attributes:
        rgb: (N, 3, S, S) float32, 0 to 255; it is painted in place.
        u, v: (N, S, S), the distances to the right of and below the middle of the face, which is about 1.4 high.
        pixel: (N, 1, 1), the width of a pixel in these units, which is the softness of every edge.
    """

    def __init__(self, draws: _Draws, size: int) -> None:
        axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
        zoom, tilt = 0.94 + draws.spread(0.055), draws.spread(0.07)
        x, y = axis[None, None, :] - draws.spread(0.05), axis[None, :, None] - draws.spread(0.045)
        cos = zoom / np.sqrt(1 + tilt * tilt)
        self.u, self.v = cos * (x + tilt * y), cos * (y - tilt * x)
        self.pixel = zoom * np.float32(2 / size)
        self.turn = draws.spread(0.045)  # of the head to one side; it moves everything in the face
        self.across = np.abs(self.u - self.turn)  # both halves of the face at once
        light, slope = draws.spread(0.5), draws.amount(0.0, 0.35)
        self.light = (light * self.u - 0.5 * self.v) * slope  # (N, S, S), brighter where positive
        start, end = draws.colour([[60, 70, 90], [200, 200, 195]], draws.amount(0, 1), 16), draws.spread(18)[..., None]
        self.rgb = np.broadcast_to(start + end * self.v[:, None], (len(zoom), 3, size, size)).copy()

    def paint(self, cover: np.ndarray, colour: np.ndarray) -> None:
        self.rgb += cover[:, None] * (colour - self.rgb)

    def dim(self, cover: np.ndarray, by: np.ndarray | float) -> None:
        """Darken as a crease or a shadow does: blue and green become darker than red."""
        shade = (cover * by)[:, None]
        self.rgb *= 1 - shade * np.array([0.8, 1.0, 1.05], dtype=np.float32)[:, None, None]

    def edge(self, distance: np.ndarray, soft: float = 1.0) -> np.ndarray:
        """How much of a pixel a shape covers, given the signed distance."""
        return (0.5 - distance / (self.pixel * soft)).clip(0, 1)

    def distance(self, x: np.ndarray, cu: _Number, cv: _Number, a: _Number, b: _Number) -> np.ndarray:
        """The signed distance to an ellipse, which is exact on the ellipse and of first order near it."""
        p, q = (x - cu) / a, (self.v - cv) / b
        level = np.sqrt(p * p + q * q)
        return level * (level - 1) / (np.sqrt((p / a) ** 2 + (q / b) ** 2) + 1e-6)

    def spot(self, x: np.ndarray, cu: _Number, cv: _Number, a: _Number, b: _Number) -> np.ndarray:
        """A soft ellipse, which is 1 in the middle and 0 at the rim."""
        p, q = (x - cu) / a, (self.v - cv) / b
        fade = (1 - p * p - q * q).clip(0, None)
        return fade * fade

    def stroke(
        self,
        x: np.ndarray,
        cu: _Number,
        cv: _Number,
        half: _Number,
        width: _Number,
        *,
        lean: _Number = 0.0,
        bend: _Number = 0.0,
    ) -> np.ndarray:
        """A line with half length ``half`` and slope ``lean``. ``bend`` lowers its ends, or raises them if negative."""
        along = x - cu
        off = self.v - cv - lean * along - bend * (along / half) ** 2
        past = (np.abs(along) - half).clip(0, None)
        return self.edge(np.sqrt(past * past + off * off) - width)

    def upright(
        self, x: np.ndarray, cu: _Number, cv: _Number, half: _Number, width: _Number, *, lean: _Number = 0.0
    ) -> np.ndarray:
        """A line that runs down and moves outward by ``lean`` per unit of height."""
        along = self.v - cv
        off = x - cu - lean * along
        past = (np.abs(along) - half).clip(0, None)
        return self.edge(np.sqrt(past * past + off * off) - width)


def _portrait(age: np.ndarray, draws: _Draws, size: int) -> np.ndarray:
    """Portraits (N, 3, size, size) float32, about 0 to 255, for ages (N, 1, 1)."""
    look = _Look(age, draws)
    canvas = _Canvas(draws, size)
    hair = _Hair(look, draws)
    hair.behind(canvas)
    _shoulders(canvas, look, draws)
    _head(canvas, look, draws)
    _skin_marks(canvas, look, draws)
    _nose_and_mouth(canvas, look, draws)
    _eyes(canvas, look, draws, hair.colour)
    _creases(canvas, look, draws)
    hair.above(canvas)
    _glasses(canvas, look, draws)
    canvas.rgb *= (draws.amount(0.86, 1.1) * (1 + canvas.light))[:, None]
    return canvas.rgb


class _Look:
    """How old a face looks, and the proportions that several of its parts share. Every field is (N, 1, 1)."""

    def __init__(self, age: np.ndarray, draws: _Draws) -> None:
        self.age = (age + draws.spread(1.0) * (1.2 + 0.075 * age)).clip(0, 110)
        self.grown = np.sqrt((self.age / 19).clip(0, 1)) + draws.spread(0.05)  # proportions stop changing at 19
        self.sag = self.cue(draws, 45, 95, 9)
        self.tone = draws.amount(0, 1)
        self.skin = draws.colour(_SKIN, self.tone, 5)
        self.wide = 1 + draws.spread(0.04)
        self.head = _between(self.grown, 0.59, 0.50) * self.wide
        self.jaw = _between(self.grown, 0.47, 0.40) * self.wide * (1 + draws.spread(0.06))
        self.chin = _between(self.grown, 0.58, 0.72) + draws.spread(0.025)
        self.eye = _between(self.grown, 0.15, -0.04) + draws.spread(0.015)
        self.apart = _between(self.grown, 0.255, 0.215) + draws.spread(0.012)
        self.nose = self.eye + _between(self.grown, 0.16, 0.29) + draws.spread(0.015)
        self.mouth = self.nose + _between(self.grown, 0.12, 0.17) + draws.spread(0.012)

    def cue(self, draws: _Draws, low: float, high: float, noise: float) -> np.ndarray:
        """A sign of age from 0 to 1 that begins between two ages, by chance earlier or later."""
        return _ramp(self.age + draws.spread(noise), low, high)


class _Hair:
    """Colour, cut and hairline. One part is drawn behind the head and one part over it."""

    def __init__(self, look: _Look, draws: _Draws) -> None:
        natural = draws.colour(_HAIR, draws.amount(0, 1) * _between(_ramp(look.tone, 0.2, 0.8), 1, 0.35), 3)
        grey = look.cue(draws, 32, 74, 8) * draws.amount(0.75, 1.0)
        self.colour = natural + grey[..., None] * (_pixels(np.full((1, 3), _GREY)) - natural)
        self.look = look
        self.length = draws.chance(0.45) * draws.amount(0.25, 1.0) * _ramp(look.age, 1.5, 5)
        balding = (1 - self.length).clip(0.15, 1) * draws.amount(0.25, 1.0)
        self.bald = look.cue(draws, 24, 80, 8) * balding
        self.thick = _between(_ramp(look.age + draws.spread(0.8), 0.0, 3.5), 0.25, 1.0)
        self.volume = draws.amount(0.03, 0.11) * _between(self.thick, 0.4, 1.0) * (1 - 0.6 * self.bald)
        self.parting, self.fringe = draws.spread(0.2), draws.spread(0.05)
        self.strands = draws.amount(14, 26)

    def behind(self, canvas: _Canvas) -> None:
        look, length = self.look, self.length
        reach = _between(length, 0.1, 0.62)
        back = canvas.distance(canvas.u, 0, reach - 0.2, look.head + 0.06 + 0.1 * length, reach + 0.30)
        canvas.paint(canvas.edge(back) * (length > 0), self.colour * 0.8)

    def above(self, canvas: _Canvas) -> None:
        look = self.look
        middle = _between(look.grown, -0.10, -0.15)
        cap = canvas.distance(canvas.u, 0, middle, look.head + self.volume, 0.57 + self.volume)
        top = _between(look.grown, -0.38, -0.45) + self.fringe - 0.36 * self.bald
        open_u = canvas.turn * 0.7 + self.parting * 0.3
        face = canvas.distance(canvas.u, open_u, top + 0.62, _between(self.bald, 0.88, 0.97) * look.head, 0.62)
        sides = _between(self.length, 0.05, 0.45) + 0.05 * look.grown
        cover = canvas.edge(np.maximum(cap, -face)) * canvas.edge(canvas.v - sides, 4)
        wave = canvas.u * self.strands + canvas.v * 3
        strand = np.abs(wave - np.floor(wave) - 0.5)  # a triangle wave from 0 to 0.5
        canvas.paint(cover * self.thick * (1 - 0.35 * self.bald), self.colour)
        canvas.dim(cover, (0.24 * strand + 0.25 * _ramp(canvas.v, -0.5, 0.3)) * self.thick)


def _shoulders(canvas: _Canvas, look: _Look, draws: _Draws) -> None:
    cloth = draws.colour([[40, 44, 60], [150, 50, 50], [70, 110, 80], [215, 215, 210]], draws.amount(0, 1), 22)
    neck = _between(look.grown, 0.17, 0.22)
    canvas.paint(canvas.upright(canvas.u, 0, look.chin, 0.25, neck), look.skin * 0.70)
    width = _between(look.grown, 0.62, 0.95)
    canvas.paint(canvas.edge(canvas.distance(canvas.u, 0, look.chin + 0.52, width, 0.38)), cloth)


def _head(canvas: _Canvas, look: _Look, draws: _Draws) -> None:
    ear = _between(look.grown, 0.10, 0.12) + 0.03 * look.cue(draws, 50, 95, 8)
    ears = canvas.distance(np.abs(canvas.u), look.head * 0.99, look.eye + 0.10, 0.07, ear)
    canvas.paint(canvas.edge(ears), look.skin * 0.88)
    middle = _between(look.grown, -0.10, -0.15)
    low = 0.21
    skull = canvas.distance(canvas.u, 0, middle, look.head, 0.57)
    jaw = canvas.distance(canvas.u, canvas.turn * 0.4, low, look.jaw, look.chin - low)
    jowl = _between(look.sag, 0.08, 0.17)
    outer = _between(look.sag, 0.62, 0.93) * look.jaw
    sagging = canvas.distance(canvas.across, outer - jowl, look.chin - 0.06 - jowl, jowl, jowl)
    head = _join(_join(skull, jaw, 0.06), sagging, 0.06)
    canvas.paint(canvas.edge(head), look.skin)
    canvas.dim(canvas.edge(head) * (1 + head / 0.25).clip(0, 1), 0.30)  # rounder towards the rim
    canvas.dim(canvas.spot(canvas.across, look.apart, look.eye - 0.01, 0.19, 0.15), _between(look.grown, 0.05, 0.18))
    blush = canvas.spot(canvas.across, look.apart + 0.07, look.nose + 0.02, 0.17, 0.15)
    young = 1 - _ramp(look.age, 2, 30)
    canvas.paint(blush * (0.10 + 0.35 * young), look.skin * 0.6 + _pixels(np.array([[95.0, 25, 30]])))


def _skin_marks(canvas: _Canvas, look: _Look, draws: _Draws) -> None:
    strength = look.cue(draws, 52, 96, 9)
    for _ in range(4):
        side, height = draws.amount(-0.3, 0.3), draws.amount(-0.45, 0.45)
        radius = draws.amount(0.035, 0.075)
        canvas.dim(canvas.spot(canvas.u, side, height, radius * 1.3, radius), strength * draws.amount(0.1, 0.6))


def _nose_and_mouth(canvas: _Canvas, look: _Look, draws: _Draws) -> None:
    broad = _between(look.grown, 0.065, 0.085) + 0.02 * look.sag + draws.spread(0.01)
    wing = canvas.spot(canvas.across, broad, look.nose, 0.045, 0.05)
    canvas.dim(wing, 0.42)
    bridge = canvas.upright(canvas.u - canvas.turn, draws.spread(0.01) + 0.05, look.nose - 0.12, 0.09, 0.012, lean=0.2)
    canvas.dim(bridge, 0.20 * look.grown.clip(0, 1))
    tip = canvas.spot(canvas.u, canvas.turn * 1.3, look.nose - 0.03, broad, 0.06)
    canvas.rgb *= (1 + 0.12 * tip)[:, None]
    wide = _between(look.grown, 0.12, 0.175) + draws.spread(0.012)
    thin = 1 - 0.6 * look.cue(draws, 35, 90, 10)
    smile = 0.012 + draws.spread(0.022)
    lip = look.skin * np.array([0.80, 0.52, 0.52], dtype=np.float32)[:, None, None] + draws.amount(0, 22)[..., None]
    middle = canvas.u - canvas.turn
    full = _between(look.grown, 0.05, 0.042) * thin * (1 + draws.spread(0.15))
    bow = smile * (canvas.across / wide) ** 2
    lips = canvas.edge(canvas.distance(canvas.across, 0, look.mouth - bow.clip(-0.05, 0.05), wide, full))
    canvas.paint(0.8 * lips, lip)
    canvas.dim(canvas.stroke(middle, 0, look.mouth, wide, 0.009, bend=-smile), 0.65)
    canvas.dim(canvas.spot(canvas.u, canvas.turn, look.mouth + 0.10, wide * 0.8, 0.04), 0.22)


def _eyes(canvas: _Canvas, look: _Look, draws: _Draws, hair: np.ndarray) -> None:
    wide = _between(look.grown, 0.125, 0.105) * (1 + draws.spread(0.05))
    tall = _between(look.grown, 0.098, 0.060) * (1 - 0.30 * look.sag) * (1 + draws.spread(0.08))
    white = canvas.edge(canvas.distance(canvas.across, look.apart, look.eye, wide, tall))
    canvas.paint(white, _pixels(np.array([[238.0, 234, 230]])) - 14 * look.sag[..., None])
    gaze = draws.spread(0.012)
    pupil = look.apart + gaze * np.where(canvas.u > canvas.turn, 1, -1).astype(np.float32)
    radius = _between(look.grown, 0.070, 0.055)
    iris = canvas.edge(canvas.distance(canvas.across, pupil, look.eye - 0.005, radius, radius))
    colour = draws.colour(_IRIS, draws.amount(0, 1) * (1 - 0.8 * look.tone), 8)
    canvas.paint(iris * white, colour)
    dark = canvas.edge(canvas.distance(canvas.across, pupil, look.eye - 0.005, radius * 0.5, radius * 0.5))
    canvas.dim(dark * white, 0.85)
    lid = canvas.stroke(canvas.across, look.apart, look.eye - tall, wide, 0.013, bend=tall * 0.9)
    canvas.dim(lid, 0.72)
    hood = canvas.stroke(
        canvas.across,
        look.apart + 0.03,
        look.eye - tall * 1.2,
        wide * 1.15,
        0.006 + 0.03 * look.sag,
        bend=tall * 1.2,
        lean=0.35 * look.sag,
    )
    canvas.paint(hood * 0.75 * look.sag, look.skin * 0.86)
    raised = _between(look.grown, 0.15, 0.14) + draws.spread(0.014)
    brow = canvas.stroke(
        canvas.across,
        look.apart + 0.01,
        look.eye - raised,
        wide * 1.1,
        draws.amount(0.010, 0.026),
        bend=draws.amount(0.01, 0.05),
    )
    canvas.paint(brow * _between(look.grown, 0.2, 0.85), hair * 0.85)


def _creases(canvas: _Canvas, look: _Look, draws: _Draws) -> None:
    forehead = look.cue(draws, 32, 82, 9) * draws.amount(0.5, 1.0)
    for line in range(3):
        height = look.eye - 0.23 - 0.075 * line + draws.spread(0.008)
        half = draws.amount(0.16, 0.30)
        middle, bend = canvas.turn + draws.spread(0.03), draws.spread(0.015)
        crease = canvas.stroke(canvas.u, middle, height, half, 0.007, bend=bend)
        canvas.dim(crease, 0.42 * forehead * draws.amount(0.5, 1.0))
    crow = look.cue(draws, 36, 84, 9) * draws.amount(0.5, 1.0)
    for lean in (-0.35, 0.15, 0.55):
        height = look.eye + 0.05 * lean
        canvas.dim(canvas.stroke(canvas.across, look.apart + 0.165, height, 0.045, 0.006, lean=lean), 0.45 * crow)
    frown = look.cue(draws, 38, 86, 10) * draws.amount(0.3, 1.0)
    canvas.dim(canvas.upright(canvas.across, 0.035, look.eye - 0.10, 0.05, 0.006), 0.45 * frown)
    bag = look.cue(draws, 34, 84, 9) * draws.amount(0.4, 1.0)
    canvas.dim(canvas.stroke(canvas.across, look.apart - 0.01, look.eye + 0.125, 0.095, 0.010, bend=-0.04), 0.42 * bag)
    fold = look.cue(draws, 30, 80, 9) * draws.amount(0.6, 1.0)
    length = (look.mouth - look.nose) * 0.5 + 0.03
    canvas.dim(canvas.upright(canvas.across, 0.175, look.nose + length * 0.8, length, 0.009, lean=0.42), 0.50 * fold)
    droop = look.cue(draws, 50, 94, 9) * draws.amount(0.5, 1.0)
    canvas.dim(canvas.upright(canvas.across, 0.205, look.mouth + 0.085, 0.06, 0.009, lean=0.15), 0.5 * droop)
    hollow = look.cue(draws, 55, 98, 9) * draws.amount(0.4, 1.0)
    canvas.dim(canvas.spot(canvas.across, look.jaw * 0.82, look.mouth - 0.03, 0.12, 0.2), 0.35 * hollow)
    neck = look.cue(draws, 48, 92, 9)
    canvas.dim(canvas.upright(np.abs(canvas.u), 0.07, look.chin + 0.10, 0.08, 0.008), 0.4 * neck)


def _glasses(canvas: _Canvas, look: _Look, draws: _Draws) -> None:
    worn = draws.chance(_between(_ramp(look.age, 5, 75), 0.03, 0.55))
    radius = draws.amount(0.135, 0.165)
    ring = canvas.distance(canvas.across, look.apart, look.eye + 0.01, radius * 1.1, radius)
    bridge = canvas.stroke(canvas.across, 0, look.eye - 0.02, look.apart - radius * 1.1, 0.010)
    side = canvas.stroke(canvas.across, look.head * 0.9, look.eye - 0.02, 0.10, 0.010)
    frame = np.maximum(canvas.edge(np.abs(ring) - 0.013), np.maximum(bridge, side))
    colour = draws.colour([[22, 22, 26], [90, 60, 40], [150, 130, 90]], draws.amount(0, 1), 6)
    canvas.paint(worn * frame * 0.9, colour)
