"""The 1,797 small handwritten digits of scikit-learn, thinned to a long tail, without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..._checks import missing_package, whole
from .images import Splits
from .long_tail import long_tail_splits

__all__ = ["digits"]

_RAREST = 174  # images of the digit 8


def digits(
    *,
    shares: Sequence[float] | np.ndarray | None = None,
    noise: float = 0.0,
    val_per_class: int = 20,
    test_per_class: int = 50,
    seed: int = 0,
) -> Splits:
    """Digits of 8 × 8 pixels with a long tail: the training set is thinned and made noisy, the others stay balanced.

    The images of each digit are put in the order of the hex SHA-256 of their index in scikit-learn's array, which is
    written as a decimal number. The first ones are for the test, whatever the seed is. The rest goes to
    :func:`dir_toolkit.experiment.data.long_tail.long_tail_splits`.

    Args:
        test_per_class: the number of images per digit that are held out for the test; at most 173.
        shares, noise, val_per_class, seed: as for ``long_tail_splits``.
    Shape:
        images: (M, 1, 8, 8) uint8, a bright digit on a dark ground. labels: (N,) int64, 0 to 9. shares: (10,).
    Raises:
        ValueError: a setting is out of range, or a digit has too few images. ShapeError: there are not ten shares.
        TypeError: a setting is not a number. ImportError: scikit-learn is missing.
    Source:
        Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
        (doi:10.24432/C50P49).

    >>> splits = digits(shares=[0.1] * 5 + [1.0] * 5)
    >>> np.bincount(splits.train.labels)
    array([ 11,  11,  11,  11,  11, 112, 111, 109, 104, 110])
    """
    test_per_class = whole("test_per_class", test_per_class, low=1, high=_RAREST - 1)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_package("scikit-learn", error) from None
    values, target = load_digits(return_X_y=True)
    images = ((values.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)  # 0 ... 16 -> 0 ... 255
    labels = target.astype(np.int64)
    order = np.array(sorted(range(len(labels)), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest()))
    test = np.sort(np.concatenate([order[labels[order] == digit][:test_per_class] for digit in range(10)]))
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
