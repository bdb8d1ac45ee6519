"""Profiles by hand, thinning and noise that nest, and the splits made of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.long_tail import (
    balanced_holdout,
    exponential_profile,
    long_tail_splits,
    step_profile,
    thin,
    uniform_noise,
)

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [40, 30, 20, 11]))
META = torch.zeros(2, dtype=torch.int64, device="meta")


def pictures(labels: Any, value: int = 0) -> np.ndarray:
    """One image per label, each with its own position as its pixels."""
    return np.arange(value, value + len(labels) * 4, dtype=np.int64).astype(np.uint8).reshape(-1, 1, 2, 2)


def splits_of(**changes: Any) -> Splits:
    test = np.repeat(np.arange(4), 3)
    data = {"images": pictures(LABELS), "labels": LABELS, "test_images": pictures(test), "test_labels": test}
    return long_tail_splits(**{**data, "source": "x", "val_per_class": 5, "seed": 3, **changes})


def test_the_step_profile_is_that_worked_out_by_hand() -> None:
    assert step_profile(10, 0.025).tolist() == [0.025] * 5 + [1.0] * 5
    assert step_profile(3, 0.1).tolist() == [0.1, 1, 1]  # by default the first half, rounded down
    assert step_profile(1, 0.1).tolist() == [1]
    assert step_profile(3, 0.5, thinned=iter([2])).tolist() == [1, 1, 0.5]
    assert step_profile(3, 1, thinned=[]).tolist() == [1, 1, 1]
    assert step_profile(3, 0.5, thinned=np.array([0, 0])).dtype == np.float64


def test_the_exponential_profile_is_that_worked_out_by_hand() -> None:
    assert exponential_profile(3, 4).tolist() == [1, 0.5, 0.25]
    assert exponential_profile(1, 100).tolist() == [1]
    assert exponential_profile(5, 1).tolist() == [1] * 5
    shares = exponential_profile(10, 100)
    assert shares[[0, -1]] == pytest.approx([1, 0.01], abs=1e-15)
    assert shares[1:] / shares[:-1] == pytest.approx(100 ** (-1 / 9), rel=1e-12)


def test_thin_keeps_rounded_shares_and_at_least_one() -> None:
    rows = thin(LABELS, [0.5, 0.1, 0.001, 1.0], seed=0)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert np.bincount(LABELS[rows]).tolist() == [20, 3, 1, 11]
    assert thin(LABELS, np.ones(4), seed=0).tolist() == list(range(101))
    assert thin([1], [0.5, 0.5], seed=0).tolist() == [0]  # of class 0 there is none
    assert thin([], [0.5], seed=0).shape == (0,)


def test_thin_nests_and_follows_the_seed() -> None:
    kept = [set(thin(LABELS, np.full(4, share), seed=1).tolist()) for share in (0.01, 0.1, 0.4, 0.41, 0.9, 1.0)]
    for fewer, more in itertools.pairwise(kept):
        assert fewer <= more
    assert thin(LABELS, np.full(4, 0.4), seed=1).tolist() == sorted(kept[2])
    assert set(thin(LABELS, np.full(4, 0.4), seed=2).tolist()) != kept[2]
    # A class is thinned alike whatever becomes of the others.
    other = set(thin(LABELS, [0.4, 1.0, 0.1, 0.2], seed=1).tolist())
    assert {i for i in other if LABELS[i] == 0} == {i for i in kept[2] if LABELS[i] == 0}


def test_thin_chooses_evenly() -> None:
    labels = np.zeros(20, np.int64)
    counts = np.zeros(20)
    for seed in range(400):
        counts[thin(labels, [0.25], seed=seed)] += 1
    assert counts.sum() == 400 * 5
    assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)  # five standard deviations


def test_random_choices_stay_as_recorded() -> None:
    assert thin(np.zeros(8, int), [0.5], seed=7).tolist() == [0, 3, 5, 7]
    assert uniform_noise(np.zeros(8, int), 0.5, 10, seed=7).tolist() == [6, 5, 7, 0, 0, 0, 0, 4]


def test_noise_is_exact_nests_and_hits_all_other_classes() -> None:
    clean = LABELS.copy()
    noisy = {rate: uniform_noise(LABELS, rate, 4, seed=5) for rate in (0.0, 0.1, 0.3, 0.5, 0.99)}
    for rate, labels in noisy.items():
        assert labels.dtype == np.int64
        assert (labels != LABELS).sum() == round(rate * 101)
        assert labels.min() >= 0
        assert labels.max() <= 3
    wrong = noisy[0.1] != LABELS
    assert (noisy[0.5][wrong] == noisy[0.1][wrong]).all()
    assert (clean == LABELS).all()
    assert noisy[0.0] is not LABELS
    many = uniform_noise(np.full(4000, 1), 0.75, 4, seed=0)
    assert np.abs(np.bincount(many) - [1000, 1000, 1000, 1000]).max() < 5 * np.sqrt(3000 * 2 / 9)
    assert uniform_noise([], 0.5, 2, seed=0).shape == (0,)
    assert uniform_noise([1], 0.6, 2, seed=0).tolist() == [0]


def test_holdout_is_balanced_and_whole() -> None:
    val, train = balanced_holdout(LABELS, 10, seed=0)
    assert np.bincount(LABELS[val]).tolist() == [10] * 4
    assert sorted([*val, *train]) == list(range(101))
    assert val.dtype == train.dtype == np.int64
    assert (np.diff(val) > 0).all()
    assert (np.diff(train) > 0).all()
    assert set(balanced_holdout(LABELS, 3, seed=0)[0]) <= set(val)
    assert set(balanced_holdout(LABELS, 10, seed=1)[0]) != set(val)
    assert balanced_holdout(LABELS, 0, seed=0)[0].shape == (0,)


@pytest.mark.parametrize("kind", [list, np.uint8, np.int16, ">i4", torch.tensor])
def test_labels_of_any_integer_kind(kind: Any) -> None:
    labels = np.arange(12) % 3
    given = labels.astype(kind) if isinstance(kind, (str, type)) and kind is not list else kind(labels)
    assert thin(given, [0.5] * 3, seed=0).tolist() == thin(labels, [0.5] * 3, seed=0).tolist()
    assert uniform_noise(given, 0.5, 3, seed=0).tolist() == uniform_noise(labels, 0.5, 3, seed=0).tolist()
    assert balanced_holdout(given, 2, seed=0)[0].tolist() == balanced_holdout(labels, 2, seed=0)[0].tolist()


def test_global_random_numbers_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    splits_of(shares=np.full(4, 0.5), noise=0.2)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_splits_share_images_and_hold_out_first() -> None:
    plain = splits_of()
    assert plain.train.images is plain.val.images
    assert plain.train.labels.dtype == np.int64
    assert (plain.source, plain.skipped) == ("x", {})
    assert (len(plain.train), len(plain.val), len(plain.test)) == (81, 20, 12)
    for part in (plain.train, plain.val):
        assert (part.labels == LABELS[part.rows]).all()
    hard = splits_of(shares=[1.0, 0.5, 0.2, 0.1], noise=0.4)
    assert (hard.val.digest, hard.test.digest) == (plain.val.digest, plain.test.digest)
    assert not set(hard.val.rows) & set(hard.train.rows)
    true = LABELS[hard.train.rows]
    assert np.bincount(true).tolist() == [35, 12, 3, 1]  # of 35, 25, 15, 6; 12.5 is rounded to the even 12
    assert (hard.train.labels != true).sum() == round(0.4 * 51)
    assert (hard.test.labels == np.repeat(np.arange(4), 3)).all()


def test_splits_cap_before_thinning() -> None:
    splits = splits_of(train_per_class=10, shares=np.array([0.5, 0.1, 1.0, 1.0]))
    assert np.bincount(splits.train.labels).tolist() == [5, 1, 10, 6]
    fewer = splits_of(train_per_class=10)
    assert set(splits.train.rows) <= set(fewer.train.rows) <= set(splits_of().train.rows)


def test_splits_follow_their_seed() -> None:
    assert splits_of().train.digest == splits_of().train.digest
    assert splits_of(seed=4).val.digest != splits_of().val.digest
    assert splits_of(seed=4).test.digest == splits_of().test.digest


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (step_profile, (0, 0.5), ValueError, "num_classes must be at least 1, got 0."),
        (step_profile, (10, 0), ValueError, "retention must be > 0 and <= 1, got 0."),
        (step_profile, (10, 1.5), ValueError, "retention must be > 0 and <= 1, got 1.5."),
        (step_profile, (10, "a"), TypeError, "retention must be a number, got 'a'."),
        (exponential_profile, (0, 2), ValueError, "num_classes must be at least 1, got 0."),
        (exponential_profile, (3, 0.5), ValueError, "ratio must be >= 1, got 0.5."),
        (exponential_profile, (3, float("inf")), ValueError, "ratio must be >= 1, got inf"),
        (thin, (META, [1.0]), ValueError, "labels must hold values, got a tensor on the meta device."),
        (thin, ([0], [0.0]), ValueError, "shares must be > 0 and <= 1, got 0.0 at index [0] (1 such values)."),
        (thin, ([0], [1, np.nan]), ValueError, "shares must be > 0 and <= 1, got nan at index [1] (1 such values)."),
        (thin, ([0], []), LabelError, "labels must be class indices, >= 0 and < 0, got 0 at index [0]"),
        (thin, ([0], 0.5), ShapeError, "shares must have shape (N,), got ()."),
        (thin, ([0], ["a"]), TypeError, "shares must be integers or floats"),
        (thin, ([[0]], [1]), ShapeError, "labels must have shape (N,), got (1, 1)."),
        (thin, ([0.0], [1]), TypeError, "labels must be integers, class indices, got dtype float64."),
        (thin, ([0, 1, 2], [1]), LabelError, "labels must be class indices, >= 0 and < 1, got 1 at index [1] (2 such"),
        (thin, ([0, -1], [1]), LabelError, "labels must be class indices, >= 0 and < 1, got -1 at index [1] (1 such"),
        (uniform_noise, ([0], 1, 2), ValueError, "rate must be >= 0 and < 1, got 1."),
        (uniform_noise, ([0], -0.1, 2), ValueError, "rate must be >= 0 and < 1, got -0.1."),
        (uniform_noise, ([0], 0.1, 1), ValueError, "num_classes must be at least 2, got 1."),
        (uniform_noise, ([2], 0.1, 2), LabelError, "labels must be class indices, >= 0 and < 2, got 2 at index [0]"),
        (
            balanced_holdout,
            (LABELS, 11),
            ValueError,
            "per_class must leave each class at least one sample, got 11 of cl",
        ),
        (
            balanced_holdout,
            ([0, 0, 10**17], 1),
            ValueError,
            "per_class must leave each class at least one sample, got 1",
        ),
        (
            balanced_holdout,
            ([1], 0),
            ValueError,
            "per_class must leave each class at least one sample, got 0 of class 0",
        ),
        (balanced_holdout, ([0], -1), ValueError, "per_class must be at least 0, got -1."),
        (balanced_holdout, ([-1], 0), LabelError, "labels must be class indices, >= 0, got -1 at index [0] (1 such"),
    ],
)
def test_profiles_and_thinning_refuse_wrong_arguments(
    function: Callable[..., object], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    seed = {} if function in (step_profile, exponential_profile) else {"seed": 0}
    with pytest.raises(error, match=f"^{function.__name__}: {re.escape(message)}"):
        function(*arguments, **seed)


@pytest.mark.parametrize(
    ("thinned", "error", "message"),
    [
        (range(5), ValueError, "thinned must be at most 3, got 4."),
        ([-1], ValueError, "thinned must be at least 0, got -1."),
        (3, TypeError, "thinned must be an Iterable, got int."),
        ([0.5], TypeError, "thinned must be a whole number, got 0.5."),
    ],
)
def test_step_profile_refuses_other_classes(thinned: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^step_profile: {message}"):
        step_profile(4, 0.5, thinned=thinned)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_seeds_are_whole_numbers(seed: Any, error: type[Exception]) -> None:
    calls = (
        lambda: thin([0], [1], seed=seed),
        lambda: uniform_noise([0], 0.1, 2, seed=seed),
        lambda: balanced_holdout([0], 0, seed=seed),
        lambda: splits_of(seed=seed),
    )
    for call in calls:
        with pytest.raises(error, match=rf": seed must be (at least 0|a whole number), got {seed}\."):
            call()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"val_per_class": 25},
            ValueError,
            "val_per_class must leave each class at least one sample, got 25 of class 2,",
        ),
        ({"shares": [1.0] * 3}, ShapeError, "shares must hold one share per class, got 3 for 4 classes."),
        ({"noise": 1.0}, ValueError, "noise must be >= 0 and < 1, got 1.0."),
        ({"train_per_class": 0}, ValueError, "train_per_class must be at least 1, got 0"),
        (
            {"images": pictures([0])},
            ShapeError,
            "images must have shape (101, 1, 2, 2), one image per label, got (1, 1, 2, 2).",
        ),
        (
            {"test_images": pictures([4]), "test_labels": [4]},
            LabelError,
            "test_labels must be class indices, >= 0 and < 4, got 4 at index [0] (1 such values).",
        ),
        (
            {"test_images": np.zeros((12, 1, 3, 3), np.uint8)},
            ShapeError,
            "test_images must have shape (12, 1, 2, 2), one image per label, got (12, 1, 3, 3).",
        ),
        ({"images": [0]}, TypeError, "images must be a NumPy array of uint8, got list."),
    ],
)
def test_splits_refuse_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^long_tail_splits: " + re.escape(message)):
        splits_of(**changes)
