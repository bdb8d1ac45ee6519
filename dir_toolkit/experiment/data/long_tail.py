"""Make balanced classes long-tailed: thinning, label noise and held-out sets.

All choices depend on a seed, a whole number of at least 0, which is independent of the seed of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from ..._checks import instance, length, number, problem, require, whole
from ...errors import LabelError, ShapeError
from ._checks import check_array, check_each, row
from .images import ImageSet, Splits

__all__ = ["balanced_holdout", "exponential_profile", "long_tail_splits", "step_profile", "thin", "uniform_noise"]

_Labels = Sequence[int] | np.ndarray | Tensor
_USES = ("holdout", "cap", "thin", "noise", "class")


def step_profile(num_classes: int, retention: float, *, thinned: Iterable[int] | None = None) -> np.ndarray:
    """The share of each class that is kept, where some classes are thinned and the others stay whole.

    Args:
        retention: the share that is kept of each thinned class, in (0, 1].
        thinned: class indices; None means the first half of the classes, rounded down.
    Shape:
        Returns (num_classes,) float64.
    Raises:
        ValueError: there are no classes, the retention lies outside (0, 1], or a thinned class does not exist.
        TypeError: an argument is not a number, or a class is not a whole number.
    Source:
        Hayat et al. 2019, section 4, where the digits 0 to 4 of MNIST are thinned (arXiv:1901.07711).

    >>> step_profile(4, 0.1, thinned=[0, 2])
    array([0.1, 1. , 0.1, 1. ])
    """
    shares = np.ones(length("num_classes", num_classes))
    retention = number("retention", retention, low=0, high=1, open_low=True)
    thinned = range(len(shares) // 2) if thinned is None else thinned
    instance(Iterable, thinned=thinned)
    for index in thinned:
        shares[whole("thinned", index, low=0, high=len(shares) - 1)] = retention
    return shares


def exponential_profile(num_classes: int, ratio: float) -> np.ndarray:
    r"""The share of each class that is kept, which falls by the same factor from class to class.

    .. math:: s_c = \rho^{-c / (C - 1)}

    Args:
        ratio: :math:`\rho`, the share of the first class divided by the share of the last, at least 1.
    Shape:
        Returns (num_classes,) float64, from 1 down to ``1 / ratio``.
    Raises:
        ValueError: there are no classes, or the ratio is below one. TypeError: an argument is not a number.
    Source:
        Cui et al. 2019, section 5.1 (arXiv:1901.05555).

    >>> exponential_profile(3, 100)
    array([1.  , 0.1 , 0.01])
    """
    num_classes = length("num_classes", num_classes)
    ratio = number("ratio", ratio, low=1)
    return ratio ** -(np.arange(num_classes) / max(num_classes - 1, 1))


def thin(labels: _Labels, shares: Sequence[float] | np.ndarray, *, seed: int) -> np.ndarray:
    """The samples that are kept: the share of each class, rounded to a whole number of samples, but at least one.

    Each class is put in an order that depends only on the seed, the class and its size, and its first samples are kept.
    So a larger share keeps everything that a smaller share keeps.

    Args:
        shares: one share per class, each in (0, 1]; see :func:`step_profile` and :func:`exponential_profile`.
    Shape:
        labels: (N,) integers. shares: (C,). Returns (n,) int64, positions in ``labels`` in rising order.
    Raises:
        LabelError: a label is not one of the C classes.
        ValueError: a share lies outside (0, 1], or the seed is negative.
        ShapeError: labels or shares are not one row. TypeError: labels are not integers, or shares are not numbers.

    >>> thin([0, 0, 0, 0, 1, 1], [0.5, 1.0], seed=0)
    array([0, 2, 4, 5])
    """
    fractions = row("shares", shares).astype(np.float64)
    check_each("shares must be > 0 and <= 1", fractions, (fractions > 0) & (fractions <= 1))
    classes, seed = _classes(labels, len(fractions)), whole("seed", seed, low=0)
    counts = np.bincount(classes, minlength=len(fractions))
    return _first(classes, np.rint(fractions * counts).astype(np.int64).clip(1), seed, "thin")


def uniform_noise(labels: _Labels, rate: float, num_classes: int, *, seed: int) -> np.ndarray:
    """Labels of which exactly ``round(rate * N)`` are wrong; each becomes another class, drawn evenly from the rest.

    The seed and N alone decide which labels become wrong and what they become. A higher rate keeps the wrong labels of
    a lower rate and adds to them.

    Args:
        rate: the share of labels that are made wrong, in [0, 1).
    Shape:
        labels: (N,) integers. Returns (N,) int64.
    Raises:
        LabelError: a label is not one of the classes.
        ValueError: the rate lies outside [0, 1), there are fewer than two classes, or the seed is negative.
        ShapeError: labels are not one row. TypeError: labels are not integers.
    Source:
        Hayat et al. 2019, section 4 (arXiv:1901.07711).

    >>> uniform_noise([0, 0, 0, 0, 0], 0.4, 3, seed=0)
    array([2, 2, 0, 0, 0])
    """
    num_classes = whole("num_classes", num_classes, low=2)
    classes = _classes(labels, num_classes)
    count = round(number("rate", rate, low=0, high=1, open_high=True) * len(classes))
    seed = whole("seed", seed, low=0)
    wrong = _order(len(classes), seed, "noise")[:count]
    step = 1 + (_words(len(classes), seed, "class") % np.uint64(num_classes - 1)).astype(np.int64)  # 1 ... C - 1
    noisy = classes.copy()
    noisy[wrong] = (classes[wrong] + step[wrong]) % num_classes
    return noisy


def balanced_holdout(labels: _Labels, per_class: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A validation set with equally many samples of each class, and the remaining samples, which are for training.

    Args:
        per_class: how many samples of each class 0, 1, ... are held out. Each class, up to the largest label, must keep
            at least one.
    Shape:
        labels: (N,) integers. Returns (C * per_class,) and (N - C * per_class,) int64, both positions in ``labels`` in
        rising order.
    Raises:
        ValueError: a class has too few samples; it is named with its number of samples. Or an argument is negative.
        LabelError: a label is negative. ShapeError: labels are not one row. TypeError: labels are not integers.

    >>> balanced_holdout([0, 0, 0, 1, 1], 1, seed=0)
    (array([0, 4]), array([1, 2, 3]))
    """
    return _hold_out(_classes(labels), "per_class", per_class, seed)


def long_tail_splits(
    images: np.ndarray,
    labels: _Labels,
    test_images: np.ndarray,
    test_labels: _Labels,
    *,
    source: str,
    val_per_class: int,
    shares: Sequence[float] | np.ndarray | None = None,
    noise: float = 0.0,
    train_per_class: int | None = None,
    seed: int = 0,
) -> Splits:
    """A long-tailed, perhaps noisy training set with a clean, balanced validation set and the given test set.

    The validation set is cut off first (:func:`balanced_holdout`). Of the rest, each class is cut to
    ``train_per_class`` and then to its share (:func:`thin`), and last some labels are made wrong
    (:func:`uniform_noise`). So one seed gives the same validation set for every profile and every noise. Training and
    validation share ``images``.

    Args:
        source: the name of the result, for example ``"mnist"``.
        val_per_class: the number of images per class that are held out for validation.
        shares: the share of each class that is kept; None keeps everything. See :func:`step_profile` and
            :func:`exponential_profile`.
        noise: the share of training labels that are made wrong, in [0, 1).
        train_per_class: the largest number of training images per class before it is thinned; None sets no limit.
    Shape:
        images, test_images: (M, C, H, W) uint8, with the same (C, H, W). labels, test_labels: (M,) integers, one per
        image. shares: (number of classes,).
    Returns:
        Splits whose labels are class indices, int64.
    Raises:
        ShapeError: an array has the wrong shape, or images and labels, or shares and classes, differ in number.
        LabelError: a label is negative, or a test label is a class that ``labels`` do not have.
        ValueError: a setting is out of range, or a class has too few images for ``val_per_class``.
        TypeError: images are not uint8, labels are not integers, or a setting is not a number.
    """
    classes = _classes(labels)
    val, train = _hold_out(classes, "val_per_class", val_per_class, seed)
    num_classes = int(classes.max(initial=-1)) + 1
    test_classes = _classes(test_labels, num_classes, "test_labels")
    for name, array, target in (("images", images, classes), ("test_images", test_images, test_classes)):
        check_array(name, array, 4, np.uint8)
        expected = (len(target), *images.shape[1:])
        require(array.shape == expected, f"{name} must have shape {expected}, one image per label", got=array.shape)
    most = len(classes) if train_per_class is None else whole("train_per_class", train_per_class, low=1)
    train = train[_first(classes[train], np.full(num_classes, most), seed, "cap")]
    fractions = np.ones(num_classes) if shares is None else row("shares", shares)
    fits, got = len(fractions) == num_classes, f"{len(fractions)} for {num_classes} classes"
    require(fits, "shares must hold one share per class", got=got, error=ShapeError)
    train = train[thin(classes[train], fractions, seed=seed)]
    noise = number("noise", noise, low=0, high=1, open_high=True)
    train_classes = uniform_noise(classes[train], noise, num_classes, seed=seed) if noise else classes[train]
    return Splits(
        ImageSet(images, train_classes, train),
        ImageSet(images, classes[val], val),
        ImageSet(test_images, test_classes, np.arange(len(test_classes), dtype=np.int64)),
        source=source,
        skipped={},
    )


def _hold_out(classes: np.ndarray, name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the held-out and of the other samples. The user calls the number per class ``name``."""
    count, seed = whole(name, count, low=0), whole("seed", seed, low=0)
    present, counts = np.unique(classes, return_counts=True)  # the largest label may be huge, so bincount is not used
    too_few = (present != np.arange(len(present))) | (counts <= count)
    if too_few.any():
        index = int(too_few.argmax())
        got = f"{count} of class {index}, which has {counts[index] if present[index] == index else 0}"
        raise problem(f"{name} must leave each class at least one sample", got=got)
    held = _first(classes, np.full(len(present), count), seed, "holdout")
    left = np.ones(len(classes), bool)
    left[held] = False
    return held, np.flatnonzero(left)


def _first(classes: np.ndarray, most: np.ndarray, seed: int, use: str) -> np.ndarray:
    """Positions, in rising order, of the first ``most[c]`` samples of each class c in the order that the seed gives."""
    chosen = [np.zeros(0, np.int64)]
    for index, count in enumerate(most):
        members = np.flatnonzero(classes == index)
        chosen.append(members[_order(len(members), seed, use, index)[:count]])
    return np.sort(np.concatenate(chosen))


def _order(length: int, seed: int, use: str, index: int = 0) -> np.ndarray:
    return np.argsort(_words(length, seed, use, index), kind="stable")


def _words(length: int, seed: int, use: str, index: int = 0) -> np.ndarray:
    """Random words, (length,) uint64. They are raw, since every version of NumPy draws the same raw words."""
    stream = np.random.SeedSequence([_USES.index(use), index, seed])
    return np.random.Philox(key=stream.generate_state(2, np.uint64)).random_raw(length)


def _classes(labels: object, num_classes: int | None = None, name: str = "labels") -> np.ndarray:
    """Class indices as int64, each in [0, num_classes) if there is such a limit."""
    values = row(name, labels)
    whole_numbers = values.dtype.kind != "f" or len(values) == 0  # an empty list has no integers
    require(whole_numbers, f"{name} must be integers, class indices", got=values.dtype)
    most = np.iinfo(np.int64).max if num_classes is None else num_classes - 1
    rule = f"{name} must be class indices, >= 0" + ("" if num_classes is None else f" and < {num_classes}")
    check_each(rule, values, (values >= 0) & (values <= most), LabelError)
    return values.astype(np.int64)
