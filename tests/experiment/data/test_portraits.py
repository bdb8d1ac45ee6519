from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.experiment.data import portraits as module
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.portraits import draw_portraits, portraits
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity

AGES = np.arange(140) % 101


@pytest.fixture(scope="module")
def default() -> Splits:
    return portraits()


def test_the_first_images_stay_the_same_when_there_are_more() -> None:
    few, more = portraits(70, 5, 3), portraits(140, 8, 101)  # across the border of a chunk of 64
    for split in ("train", "val", "test"):
        a, b = getattr(few, split), getattr(more, split)
        assert np.array_equal(a.images, b.images[: len(a)])
        assert np.array_equal(a.labels, b.labels[: len(a)])
        assert a.digest != b.digest


def test_an_image_depends_on_its_own_age_and_position_alone() -> None:
    whole = draw_portraits(AGES, size=16)
    assert np.array_equal(draw_portraits(AGES[67:], size=16, first=67), whole[67:])
    other = AGES.copy()
    other[3] = 90
    drawn = draw_portraits(other, size=16)
    assert np.flatnonzero((drawn != whole).any((1, 2, 3))).tolist() == [3]


def test_seeds_splits_and_positions_give_different_faces_of_one_age() -> None:
    age = np.full(2, 40)
    drawn = [draw_portraits(age, seed=s, split=p) for s in (0, 1) for p in ("train", "val", "test")]
    faces = np.concatenate(drawn).reshape(12, -1)
    assert len(np.unique(faces, axis=0)) == 12
    assert np.array_equal(draw_portraits(age), drawn[0])


@pytest.mark.parametrize("size", [16, 33, 64])
def test_images_have_their_shape_dtype_and_contents(size: int) -> None:
    images = draw_portraits([0, 50.5, 100], size=size)
    assert images.shape == (3, 3, size, size)
    assert images.dtype == np.uint8
    assert images.std((1, 2, 3)).min() > 15
    assert draw_portraits(np.zeros(0), size=size).shape == (0, 3, size, size)


def test_a_portrait_is_the_same_face_at_any_size() -> None:
    small = draw_portraits(AGES[:40], size=16).astype(float)
    large = draw_portraits(AGES[:40], size=64).astype(float).reshape(40, 3, 16, 4, 16, 4).mean((3, 5))
    match = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, large, strict=True)]
    stranger = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, large[1:], strict=False)]
    assert min(match) > 0.9
    assert np.median(stranger) < 0.6


def test_random_numbers_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    draw_portraits([1, 2])
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_training_ages_follow_the_profile(default: Splits) -> None:
    profile = np.exp(-np.abs(np.arange(101) - 26) / 10) + 0.02
    for seed in (0, 1):
        for length in (300, 4000):
            count = np.bincount(module._ages("train", length, seed).astype(int), minlength=101)
            assert np.abs(count - length * profile / profile.sum()).max() < 2.5
    count = np.bincount(default.train.labels.astype(int), minlength=101)
    assert [(count > 100).sum(), ((count >= 20) & (count <= 100)).sum(), (count < 20).sum()] == [13, 37, 51]
    assert count.min() >= 1
    assert max(count[0], count[100]) < 20


def test_evaluation_ages_are_balanced(default: Splits) -> None:
    assert np.bincount(default.val.labels.astype(int)).tolist() == [5] * 101
    assert np.bincount(default.test.labels.astype(int)).tolist() == [10] * 101
    assert default.test.labels[:4].tolist() == [0, 37, 74, 10]  # multiples of 37, less 101 where beyond


def test_labels_can_be_learnt_but_not_perfectly() -> None:
    ages, unseen = np.arange(707) % 101, np.arange(202) % 101
    pixels = [draw_portraits(a, size=16, split=s) / 127.5 - 1 for a, s in ((ages, "train"), (unseen, "test"))]
    fit, check = (p.reshape(len(p), -1) for p in pixels)
    dual = np.linalg.solve(fit @ fit.T + 30 * np.eye(len(fit)), ages - 50)
    error = np.abs(check @ (fit.T @ dual) + 50 - unseen).mean()
    constant = np.abs(unseen - 50).mean()
    assert 5 < error < 0.6 * constant


def test_the_apparent_age_spreads_with_age() -> None:
    draws = module._Draws(module._raw(0, "train", "face", 0, 4000, module._DRAWS))
    apparent = module._Look(np.full((4000, 1, 1), 40, np.float32), draws).age.ravel()
    # draws are cut at 2.5 standard deviations, which leaves 0.955 of the spread 1.2 + 0.075 * 40 = 4.2
    assert apparent.std() == pytest.approx(4.2, rel=0.05)
    assert apparent.mean() == pytest.approx(40, abs=0.3)
    assert apparent.dtype == np.float32


def test_random_words_are_uniform_and_independent_of_the_count() -> None:
    words = module._unit(module._raw(5, "val", "face", 0, 500, 8))
    assert np.array_equal(module._unit(module._raw(5, "val", "face", 100, 7, 8)), words[100:107])
    assert 0 < words.min() < words.max() < 1
    assert words.mean() == pytest.approx(0.5, abs=0.02)
    grain = module._grain(0, "train", 0, (50, 3, 17, 17))
    assert grain.std() == pytest.approx(1, abs=0.02)
    assert grain.mean() == pytest.approx(0, abs=0.02)
    assert np.array_equal(module._grain(0, "train", 20, (3, 3, 17, 17)), grain[20:23])


def test_shapes_are_those_worked_out_by_hand() -> None:
    canvas = object.__new__(module._Canvas)
    canvas.pixel = np.full((1, 1, 1), 0.5, np.float32)
    canvas.u = np.array([[[0.0, 3.0, 3.0, 0.0]]], np.float32)
    canvas.v = np.array([[[0.0, 0.0, 4.0, 2.0]]], np.float32)
    assert canvas.distance(canvas.u, 0, 0, 2, 2)[0, 0, 1:] == pytest.approx([1, 3, 0], abs=1e-5)  # a circle: r - 2
    assert canvas.edge(np.array([-1, -0.25, 0, 0.125, 0.25])) == pytest.approx(
        np.array([1, 1, 0.5, 0.25, 0]).reshape(1, 1, 5)
    )
    assert canvas.spot(canvas.u, 0, 0, 6, 4)[0, 0].tolist() == [1, 0.5625, 0, 0.5625]
    # Lines of half length 2 and width 1: a point upon one, one past its end by 1, one far away, one 2 beside it.
    assert canvas.stroke(canvas.u, 0, 0, 2, 1)[0, 0].tolist() == [1, 0.5, 0, 0]
    assert canvas.upright(canvas.u, 0, 0, 2, 1)[0, 0].tolist() == [1, 0, 0, 1]
    assert canvas.stroke(canvas.u, 0, 0, 3, 1, bend=4)[0, 0].tolist() == [1, 0, 1, 0]
    one, other = np.array([1.0, 0.0, 3.0]), np.array([3.0, 0.0, 1.0])
    assert module._join(one, other, 1.0).tolist() == [1, -0.25, 1]


@pytest.mark.parametrize(
    ("ages", "settings", "error", "message"),
    [
        ([[1, 2]], {}, ShapeError, "ages must have shape (N,), got (1, 2)."),
        (["old"], {}, TypeError, "ages must be integers or floats"),
        ([5, 101], {}, LabelError, "ages must lie in 0 to 100, got 101.0 at index [1] (1 such values)."),
        ([-0.5], {}, LabelError, "ages must lie in 0 to 100, got -0.5 at index [0] (1 such values)."),
        ([float("nan")], {}, LabelError, "ages must lie in 0 to 100, got nan at index [0] (1 such values)."),
        ([5], {"size": 15}, ValueError, "size must be at least 16, got 15."),
        ([5], {"seed": -1}, ValueError, "seed must be at least 0, got -1."),
        ([5], {"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5."),
        ([5], {"first": -1}, ValueError, "first must be at least 0, got -1."),
        ([5], {"split": "dev"}, ValueError, "split must be one of 'train', 'val', 'test', got 'dev'."),
    ],
)
def test_draw_portraits_refuses_wrong_arguments(
    ages: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^draw_portraits: " + re.escape(message)):
        draw_portraits(ages, **settings)


@pytest.mark.parametrize("name", ["n_train", "n_val", "n_test", "seed", "size"])
def test_portraits_refuse_wrong_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^portraits: {name} must be at least (0|16), got -1\."):
        portraits(**{name: -1})


def test_card_tells_what_the_reader_gives(
    default: Splits, read_card: Callable[..., dict[str, Any]], same_as_card: Callable[..., None]
) -> None:
    card = read_card("portraits", portraits)
    same_as_card(card, default, 10)
    density = LabelDensity.count(default.train.labels, Bins.uniform(0, 101, width=1, integer=True))
    regions = density.regions(many=100, few=20)
    for region, ages in card["regions"]["ages"].items():
        assert (regions == region).sum() == ages
    for region, images in card["regions"]["test"].items():
        assert (regions[default.test.labels.astype(int)] == region).sum() == images
