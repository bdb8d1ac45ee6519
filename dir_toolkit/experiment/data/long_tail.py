"""A long tail cut into balanced classes: which samples are kept, which labels are made wrong, and what is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from ..._checks import instance, label_problem, labels_array, length, number, problem, whole
from ...errors import ShapeError
from .images import ImageSet, Splits, content_digest

__all__ = [
    "balanced_holdout",
    "exponential_profile",
    "long_tail_splits",
    "step_profile",
    "thin",
    "uniform_noise",
]

_Labels = Sequence[int] | np.ndarray | Tensor
_USES = ("holdout", "cap", "thin", "noise", "class")


def step_profile(num_classes: int, retention: float, *, thinned: Iterable[int] | None = None) -> np.ndarray:
    """The share of each class that is kept, where some classes are thinned and the others stay whole.

    Args:
        retention: share kept of the thinned classes, in (0, 1].
        thinned: class indices; None means the first half of the classes, rounded down.
    Shape:
        Returns (num_classes,) float64.
    Raises:
        ValueError: there are no classes, the retention lies outside (0, 1], or a thinned class is none of them.
        TypeError: an argument is no number, or a class no whole number.
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
        if whole("thinned", index, low=0) >= num_classes:
            raise problem(f"thinned must hold classes in 0 to {num_classes - 1}", got=index)
        shares[index] = retention
    return shares


def exponential_profile(num_classes: int, ratio: float) -> np.ndarray:
    r"""The share of each class that is kept, falling by one factor from class to class.

    .. math:: s_c = \rho^{-c / (C - 1)}

    Args:
        ratio: :math:`\rho`, of the first class's share to the last one's, at least 1.
    Shape:
        Returns (num_classes,) float64, from 1 down to ``1 / ratio``.
    Raises:
        ValueError: there are no classes, or the ratio is below one. TypeError: an argument is no number.
    Source:
        Cui et al. 2019, section 5.1 (arXiv:1901.05555).

    >>> exponential_profile(3, 100)
    array([1.  , 0.1 , 0.01])
    """
    num_classes = length("num_classes", num_classes)
    ratio = number("ratio", ratio, low=1)
    return ratio ** -(np.arange(num_classes) / max(num_classes - 1, 1))


def thin(labels: _Labels, shares: Sequence[float] | np.ndarray, *, seed: int) -> np.ndarray:
    """The samples that are kept: of each class its share, rounded to a whole number, but at least one.

    Each class is put in an order that depends on the seed, the class and its size alone, and its first samples are
    kept: what a smaller share keeps, a larger one keeps too.

    Args:
        shares: of the classes 0, 1, ..., each in (0, 1]; see :func:`step_profile` and :func:`exponential_profile`.
        seed: any whole number from 0 on.
    Shape:
        labels: (N,) integers. shares: (C,). Returns (n,) int64, positions in ``labels``, rising.
    Raises:
        LabelError: a label is none of the C classes. ValueError: a share lies outside (0, 1], or the seed is negative.
        ShapeError: labels or shares are not one row. TypeError: labels are no integers, or shares no numbers.

    >>> thin([0, 0, 0, 0, 1, 1], [0.5, 1.0], seed=0)
    array([0, 2, 4, 5])
    """
    kept = _shares(shares)
    classes = _classes(labels, len(kept))
    counts = np.bincount(classes, minlength=len(kept))
    return _first(classes, np.rint(kept * counts).astype(np.int64).clip(1), _seed(seed), "thin")


def uniform_noise(labels: _Labels, rate: float, num_classes: int, *, seed: int) -> np.ndarray:
    """Labels of which exactly ``round(rate * N)`` are wrong, each another class drawn evenly from all others.

    Which ones, and what they become, depends on the seed and N alone: a higher rate leaves the wrong labels of a
    lower one as they are and adds to them.

    Args:
        rate: share of labels made wrong, in [0, 1).
        seed: any whole number from 0 on.
    Shape:
        labels: (N,) integers. Returns (N,) int64.
    Raises:
        LabelError: a label is none of the classes. ValueError: the rate lies outside [0, 1), there are fewer than two
            classes, or the seed is negative. ShapeError: labels are not one row. TypeError: they are no integers.
    Source:
        Hayat et al. 2019, section 4 (arXiv:1901.07711).

    >>> uniform_noise([0, 0, 0, 0, 0], 0.4, 3, seed=0)
    array([2, 2, 0, 0, 0])
    """
    num_classes = whole("num_classes", num_classes, low=2)
    classes = _classes(labels, num_classes)
    count = round(number("rate", rate, low=0, high=1, open_high=True) * len(classes))
    seed = _seed(seed)
    wrong = _order(len(classes), seed, "noise")[:count]
    step = 1 + (_words(len(classes), seed, "class") % np.uint64(num_classes - 1)).astype(np.int64)  # 1 ... C - 1
    noisy = classes.copy()
    noisy[wrong] = (classes[wrong] + step[wrong]) % num_classes
    return noisy


def balanced_holdout(labels: _Labels, per_class: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A validation set with equally many samples of each class, and what is left to train on.

    Args:
        per_class: samples held out of each class 0, 1, ..., up to the largest label; each must keep at least one.
        seed: any whole number from 0 on.
    Shape:
        labels: (N,) integers. Returns (C * per_class,) and (N - C * per_class,) int64, positions in ``labels``, rising.
    Raises:
        ValueError: a class has too few samples; it is named with how many it has. Or an argument is negative.
        LabelError: a label is negative. ShapeError: labels are not one row. TypeError: they are no integers.

    >>> balanced_holdout([0, 0, 0, 1, 1], 1, seed=0)
    (array([0, 4]), array([1, 2, 3]))
    """
    classes = _classes(labels)
    per_class = whole("per_class", per_class, low=0)
    seed = _seed(seed)
    return _hold_out("per_class", classes, per_class, seed)


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
    """A long-tailed, perhaps noisy training set with a balanced and clean validation set and the test set as it is.

    Validation is cut off first (:func:`balanced_holdout`); of what is left each class is cut to ``train_per_class``,
    then to its share (:func:`thin`), then labels are made wrong (:func:`uniform_noise`). So with one seed validation is
    the same under every profile and noise. Training and validation share ``images``.

    Args:
        source: name for the result, ``"mnist"`` for example.
        val_per_class: images of each class held out for validation.
        shares: kept of each class; None keeps all.
        noise: share of training labels made wrong, in [0, 1).
        train_per_class: most training images of a class before it is thinned; None sets no limit.
        seed: of the data, any whole number from 0 on; it has nothing to do with the seed of the training.
    Shape:
        images, test_images: (M, C, H, W) uint8, of one (C, H, W). labels, test_labels: (M,) integers, one an image.
        shares: (number of classes,).
    Returns:
        Splits with class indices, int64, as labels.
    Raises:
        ShapeError: an array has the wrong shape, images and labels differ in length, or shares and classes in number.
        LabelError: a label is negative, or one of the test is no class of ``labels``.
        ValueError: a setting is out of range, or a class has too few images for ``val_per_class``.
        TypeError: images are not uint8, labels no integers, or a setting no number.
    """
    classes = _classes(labels)
    val_per_class, seed = whole("val_per_class", val_per_class, low=0), _seed(seed)
    val, train = _hold_out("val_per_class", classes, val_per_class, seed)
    num_classes = int(classes.max(initial=-1)) + 1
    test_classes = _classes(test_labels, num_classes, "test_labels")
    for name, array, target in (("images", images, classes), ("test_images", test_images, test_classes)):
        instance(np.ndarray, **{name: array})
        if array.ndim != 4 or len(array) != len(target):
            got = f"{array.shape} and {len(target)} labels"
            raise problem(f"{name} must have shape (M, C, H, W), with M labels", got=got, error=ShapeError)
    if images.shape[1:] != test_images.shape[1:]:
        got = f"{images.shape[1:]} and {test_images.shape[1:]}"
        raise problem("images and test_images must be of one shape (C, H, W)", got=got, error=ShapeError)
    if train_per_class is not None:
        most = np.full(num_classes, whole("train_per_class", train_per_class, low=1))
        train = train[_first(classes[train], most, seed, "cap")]
    if shares is not None:
        if len(kept := _shares(shares)) != num_classes:
            got = f"{len(kept)} for {num_classes} classes"
            raise problem("shares must hold one share a class", got=got, error=ShapeError)
        train = train[thin(classes[train], kept, seed=seed)]
    noise = number("noise", noise, low=0, high=1, open_high=True)
    train_classes = uniform_noise(classes[train], noise, num_classes, seed=seed) if noise else classes[train]
    return Splits(
        _image_set(images, train_classes, train),
        _image_set(images, classes[val], val),
        _image_set(test_images, test_classes, np.arange(len(test_classes), dtype=np.int64)),
        source=source,
        skipped={},
    )


def _hold_out(name: str, classes: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # Not a count of every class up to the largest label: that label may be huge.
    present, counts = np.unique(classes, return_counts=True)
    too_few = (present != np.arange(len(present))) | (counts <= per_class)
    if too_few.any():
        at = int(too_few.argmax())
        has = counts[at] if present[at] == at else 0
        rule = f"{name} must leave each class at least one sample"
        raise problem(rule, got=f"{per_class} of class {at}, which has {has}")
    held = _first(classes, np.full(len(present), per_class), seed, "holdout")
    left = np.ones(len(classes), bool)
    left[held] = False
    return held, np.flatnonzero(left)


def _image_set(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> ImageSet:
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


def _first(classes: np.ndarray, most: np.ndarray, seed: int, use: str) -> np.ndarray:
    """Positions, rising, of the first ``most[c]`` samples of each class c in the seed's order."""
    chosen = [np.zeros(0, np.int64)]
    for index, count in enumerate(most):
        members = np.flatnonzero(classes == index)
        chosen.append(members[_order(len(members), seed, use, index)[:count]])
    return np.sort(np.concatenate(chosen))


def _order(length: int, seed: int, use: str, index: int = 0) -> np.ndarray:
    return np.argsort(_words(length, seed, use, index), kind="stable")


def _words(length: int, seed: int, use: str, index: int = 0) -> np.ndarray:
    """Random words, (length,) uint64; raw ones, which no version of NumPy draws otherwise."""
    stream = np.random.SeedSequence([_USES.index(use), index, seed])
    return np.random.Philox(key=stream.generate_state(2, np.uint64)).random_raw(length)


def _seed(seed: object) -> int:
    return whole("seed", seed, low=0)


def _shares(shares: object) -> np.ndarray:
    values = labels_array(shares, "shares").astype(np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise problem("shares must have shape (C,), one a class", got=values.shape, error=ShapeError)
    outside = ~((values > 0) & (values <= 1))
    if outside.any():
        at = int(outside.argmax())
        raise problem("shares must be > 0 and <= 1", got=f"{values[at]:g} of class {at}")
    return values


def _classes(labels: object, num_classes: int | None = None, name: str = "labels") -> np.ndarray:
    """Class indices as int64, in 0 ... num_classes - 1 where that is given."""
    if isinstance(labels, (list, tuple)) and not labels:
        return np.zeros(0, np.int64)
    values = labels_array(labels, name)
    if values.ndim != 1:
        raise problem(f"{name} must have shape (N,)", got=values.shape, error=ShapeError)
    if values.dtype.kind == "f":
        raise problem(f"{name} must be integers, class indices", got=f"dtype {values.dtype}", error=TypeError)
    outside = (values < 0) | (values > (np.iinfo(np.int64).max if num_classes is None else num_classes - 1))
    if outside.any():
        at = int(outside.argmax())
        rule = f"{name} must be class indices, >= 0" + ("" if num_classes is None else f" and < {num_classes}")
        raise label_problem(rule, got=f"{values[at]} at index [{at}] ({int(outside.sum())} such labels)")
    return values.astype(np.int64)
