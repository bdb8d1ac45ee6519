"""The 1,797 small handwritten digits that come with scikit-learn, cut to a long tail; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..._checks import problem, whole
from .images import Splits
from .long_tail import long_tail_splits

__all__ = ["digits"]


def digits(
    *,
    shares: Sequence[float] | np.ndarray | None = None,
    noise: float = 0.0,
    val_per_class: int = 20,
    test_per_class: int = 50,
    seed: int = 0,
) -> Splits:
    """Digits of 8 × 8 pixels with a long tail: test and validation balanced and clean, training thinned and made noisy.

    The images of each digit are put in order of the SHA-256 (hex) of their index in scikit-learn's array, written in
    decimals. The first are the test, whatever the seed; the rest is cut by
    :func:`dir_toolkit.experiment.data.long_tail.long_tail_splits`.

    Args:
        shares: kept of each digit's training images; None keeps all.
        noise: share of training labels made wrong, in [0, 1).
        val_per_class: images of each digit held out for validation.
        test_per_class: images of each digit held out for the test; 174 to 183 there are.
        seed: of the data, any whole number from 0 on; it has nothing to do with the seed of the training.
    Shape:
        images: (M, 1, 8, 8) uint8, grey, the digit bright. labels: (N,) int64, 0 to 9. shares: (10,).
    Raises:
        ValueError: a setting is out of range, or a digit has too few images. ShapeError: shares are not ten.
        TypeError: a setting is no number. ImportError: scikit-learn is missing.
    Source:
        Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
        (doi:10.24432/C50P49).

    >>> splits = digits(shares=[0.1] * 5 + [1.0] * 5)
    >>> np.bincount(splits.train.labels)
    array([ 11,  11,  11,  11,  11, 112, 111, 109, 104, 110])
    """
    test_per_class = whole("test_per_class", test_per_class, low=1)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise problem(
            "the images come from scikit-learn", fix='pip install "dir_toolkit[recipes]"', error=ImportError
        ) from None
    values, target = load_digits(return_X_y=True)
    images = ((values.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)  # 0 ... 16 -> 0 ... 255
    labels = target.astype(np.int64)
    counts = np.bincount(labels)
    if test_per_class >= counts.min():
        at = int(counts.argmin())
        rule = "test_per_class must leave each class at least one sample"
        raise problem(rule, got=f"{test_per_class} of class {at}, which has {counts[at]}")
    order = np.array(sorted(range(len(labels)), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest()))
    test = np.sort(np.concatenate([order[labels[order] == digit][:test_per_class] for digit in range(len(counts))]))
    rest = np.setdiff1d(order, test)
    return long_tail_splits(
        images[rest],
        labels[rest],
        images[test],
        labels[test],
        source="digits",
        val_per_class=val_per_class,
        shares=shares,
        noise=noise,
        seed=seed,
    )
