from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dir_toolkit.errors import ShapeError
from dir_toolkit.experiment.data.digits import digits
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.long_tail import exponential_profile, step_profile


@pytest.fixture(scope="module")
def default() -> Splits:
    return digits()


def test_each_image_is_used_once_and_goes_with_its_label(default: Splits) -> None:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    wanted = sorted(
        (int(label), tuple(np.rint(value * 255 / 16 + 1e-9).astype(int)))
        for value, label in zip(values, labels, strict=True)
    )
    seen = []
    for part in (default.train, default.val, default.test):
        images, classes = part.batch(np.arange(len(part)))
        seen += [(int(c), tuple(image.flatten().tolist())) for image, c in zip(images, classes, strict=True)]
    assert sorted(seen) == wanted
    assert len(seen) == 1797
    assert default.train.images.max() == 255


def test_the_test_set_is_that_worked_out_by_hand(default: Splits) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits(return_X_y=True)[1]
    zeros = sorted(np.flatnonzero(labels == 0), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest())
    images = load_digits(return_X_y=True)[0].reshape(-1, 8, 8)
    chosen = images[sorted(zeros[:50])]
    got = default.test.images[default.test.labels == 0, 0]
    np.testing.assert_array_equal(got, np.floor(chosen * 255 / 16 + 0.5))


def test_evaluation_is_balanced_and_left_alone_by_tail_noise_and_seed(default: Splits) -> None:
    assert np.bincount(default.val.labels).tolist() == [20] * 10
    assert np.bincount(default.test.labels).tolist() == [50] * 10
    hard = digits(shares=step_profile(10, 0.1), noise=0.3)
    assert (hard.val.digest, hard.test.digest) == (default.val.digest, default.test.digest)
    other = digits(seed=1)
    assert other.test.digest == default.test.digest
    assert other.val.digest != default.val.digest
    assert digits(test_per_class=5, val_per_class=1).test.digest != default.test.digest


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"test_per_class": 0}, ValueError, "digits: test_per_class must be at least 1, got 0."),
        ({"test_per_class": 5.5}, TypeError, "digits: test_per_class must be a whole number, got 5.5."),
        ({"test_per_class": 174}, ValueError, "digits: test_per_class must be at most 173, got 174."),
        (
            {"val_per_class": 124},
            ValueError,
            "digits: val_per_class must leave each class at least one sample, got 124 of class 8,",
        ),
        ({"shares": [1.0] * 9}, ShapeError, "digits: shares must hold one share per class, got 9 for 10"),
        ({"noise": -0.1}, ValueError, "digits: noise must be >= 0 and < 1, got -0.1."),
        ({"seed": -1}, ValueError, "digits: seed must be at least 0, got -1."),
    ],
)
def test_digits_refuse_wrong_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        digits(**settings)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"^digits: scikit-learn must be installed, got .*\. pip install"):
        digits()


def test_card_tells_what_the_reader_gives(
    default: Splits, read_card: Callable[..., dict[str, Any]], same_as_card: Callable[..., None]
) -> None:
    card = read_card("digits", digits)
    same_as_card(card, default, 1)
    for name, shares in (("step_0.1", step_profile(10, 0.1)), ("exponential_100", exponential_profile(10, 100))):
        assert np.bincount(digits(shares=shares).train.labels).tolist() == card["long_tails"][name]
