from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dir_toolkit import Bins, LabelDensity, LongTailModel, adjust_logits, estimate_prior
from dir_toolkit.errors import DirToolkitWarning, LabelError, ShapeError

BINS = Bins.uniform(0, 10, count=40)
TRAINING = np.array([0.7, 0.2, 0.1])
SHIFTED = np.array([0.2, 0.3, 0.5])


def classes(n: int, prior: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 2) of three Gaussian classes, and their classes."""
    random = np.random.default_rng(seed)
    label = random.choice(3, n, p=prior)
    return random.normal(size=(n, 2)) + np.array([[0, 0], [2, 0], [0, 2]])[label], label


def class_scores(x: np.ndarray) -> np.ndarray:
    """The log-posteriors under the training prior, but for a constant per point."""
    return -((x[:, None] - np.array([[0, 0], [2, 0], [0, 2]])) ** 2).sum(-1) / 2 + np.log(TRAINING)


def labels(n: int, low: float, high: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels on [0, 10] from a triangle that falls or rises, and one noisy look at each, (n, 1)."""
    random = np.random.default_rng(seed)
    grid = BINS.centers
    density = low + (high - low) * grid / 10
    y = grid[random.choice(40, n, p=density / density.sum())]
    return y[:, None] + 0.5 * random.normal(size=(n, 1)), y


def axis_scores(x: np.ndarray) -> np.ndarray:
    """The log-posteriors under the falling triangle."""
    return -((x - BINS.centers) ** 2) / (2 * 0.5**2) + np.log(1.05 - BINS.centers / 10)


def variation(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).sum() / 2)


HELD_X, HELD_Y = classes(4000, TRAINING, 0)
NEW_X, NEW_Y = classes(4000, SHIFTED, 1)


# Recovery


def test_two_classes_have_the_prior_worked_out_by_hand() -> None:
    """Likelihood ratios 9/7 to 1/3 and 1/7 to 3: their slopes in t cancel where t is 0.35."""
    estimate = estimate_prior([[0.9, 0.1], [0.1, 0.9]], source=[[0.9, 0.1]] * 3 + [[0.1, 0.9]])
    assert estimate.source.tolist() == pytest.approx([0.7, 0.3])
    assert estimate.estimated.tolist() == pytest.approx([0.35, 0.65], abs=1e-5)
    gain = (math.log(0.35 * 9 / 7 + 0.65 / 3) + math.log(0.35 / 7 + 0.65 * 3)) / 2
    assert estimate.curve[[0, -1]].tolist() == pytest.approx([0, gain], abs=1e-6)


@pytest.mark.parametrize("distort", [False, True])
def test_classes_of_known_posteriors_are_recovered(distort: bool) -> None:
    """Also where the scores are too sharp and lean to a class, which held-out labels tell."""
    change = (lambda s: 2 * s + np.array([0.0, 1.0, -1.0])) if distort else (lambda s: s)
    held, new = change(class_scores(HELD_X)), change(class_scores(NEW_X))
    estimate = estimate_prior(new, source=held, labels=HELD_Y)
    truth = np.bincount(NEW_Y) / 4000
    assert estimate.converged
    assert variation(estimate.prior, truth) < 0.02 < 0.4 < variation(estimate.source, truth)
    assert variation(estimate.bbse, truth) < 0.05
    assert (np.diff(estimate.curve) > -1e-9).all()  # the likelihood never falls
    if distort:
        assert variation(estimate_prior(new, source=held).prior, truth) > 0.03


def test_an_axis_is_recovered_and_an_unshifted_one_is_left_as_it_is() -> None:
    held_x, held_y = labels(2000, 1.05, 0.05, 0)
    for seed, (low, high) in enumerate([(1.05, 0.05), (0.05, 1.05), (1, 1)]):
        new_x, _ = labels(2000, low, high, seed + 1)
        estimate = estimate_prior(axis_scores(new_x), source=axis_scores(held_x), labels=held_y, bins=BINS)
        truth = low + (high - low) * BINS.centers / 10
        assert variation(estimate.prior, truth / truth.sum()) < 0.06
        assert estimate.bbse is None
        assert estimate.prior.sum().item() == pytest.approx(1, abs=1e-12)
    plain = estimate_prior(axis_scores(new_x), source=axis_scores(held_x))  # the same as classes, without a window
    assert variation(plain.prior, truth / truth.sum()) > 0.2


def test_logits_probabilities_and_kinds_of_arrays_say_the_same() -> None:
    logits, held = torch.from_numpy(class_scores(NEW_X[:200])), torch.from_numpy(class_scores(HELD_X[:200]))
    of_logits = estimate_prior(logits, source=held)
    of_shares = estimate_prior(logits.softmax(1).tolist(), source=held.softmax(1).numpy(), bins=Bins.classes(3))
    assert of_shares.prior.numpy() == pytest.approx(of_logits.prior.numpy(), abs=1e-9)
    assert of_logits.prior.dtype == torch.float64
    assert not of_logits.curve.flags.writeable


def test_the_estimate_is_what_a_model_or_logits_are_set_to() -> None:
    estimate = estimate_prior(class_scores(NEW_X), source=class_scores(HELD_X), labels=HELD_Y)
    adjusted = adjust_logits(torch.from_numpy(class_scores(NEW_X)), TRAINING, target=estimate.prior)
    wrong = (adjusted.argmax(1).numpy() != NEW_Y).mean()
    assert wrong < 0.8 * (class_scores(NEW_X).argmax(1) != NEW_Y).mean()
    for bins, option in ((Bins.classes(3), {}), (Bins.uniform(0, 3, count=3), {"sigma": None})):
        model = LongTailModel(nn.Identity(), 2, bins, density=LabelDensity(bins, [70, 20, 10]), **option)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))  # negative, so that scores are logits
        scores = model(torch.zeros(9, 2)).scores
        estimate = estimate_prior(scores, source=scores, bins=bins)
        target = estimate.estimated
        assert not estimate.shifted
        model.set_prior(target)
        offset = model.readout.adjuster.offset.detach().double()
        assert offset.numpy() == pytest.approx((target.log() - torch.tensor([0.7, 0.2, 0.1]).log()).numpy(), abs=1e-6)
        model.set_prior(estimate)  # no shift, so as trained
        assert not model.readout.adjuster.offset.any()


def test_forecasts_of_a_model_that_adjusts_in_its_loss_are_those_of_its_distribution() -> None:
    held, new = (torch.from_numpy(class_scores(x)).float() for x in (HELD_X, NEW_X))
    density = LabelDensity(Bins.classes(3), [70, 20, 10])
    options: dict[str, Any] = {"density": density, "head": nn.Identity(), "target_prior": "uniform"}
    model = LongTailModel(nn.Identity(), 3, Bins.classes(3), adjust="in_loss", **options)
    prior = torch.tensor([0.7, 0.2, 0.1])  # its scores are those of even classes
    held, new = held - prior.log(), new - prior.log()
    model.set_prior(None)
    estimate = estimate_prior(model(new).distribution, source=model(held).distribution)
    expected = estimate_prior(new + prior.log(), source=held + prior.log())
    np.testing.assert_allclose(estimate.estimated, expected.estimated, atol=1e-5)
    np.testing.assert_allclose(estimate.source, expected.source, atol=1e-5)
    assert variation(estimate.prior, SHIFTED) < 0.05 < variation(estimate_prior(new, source=held).estimated, SHIFTED)


def test_a_model_that_adjusts_in_its_loss_takes_an_estimate() -> None:
    bins, density = Bins.classes(3), LabelDensity(Bins.classes(3), [70, 20, 10])
    options: dict[str, Any] = {"density": density, "head": nn.Identity(), "adjust": "in_loss"}
    estimate = estimate_prior(class_scores(NEW_X), source=class_scores(HELD_X))
    model = LongTailModel(nn.Identity(), 3, bins, target_prior=estimate, **options)
    other = LongTailModel(nn.Identity(), 3, bins, target_prior=estimate.estimated, **options)
    assert torch.equal(model.readout.loss_offset, other.readout.loss_offset)
    unshifted = estimate_prior(class_scores(HELD_X), source=class_scores(HELD_X))
    with pytest.raises(ValueError, match='"in_loss" needs target_prior, got an estimate that was not accepted'):
        LongTailModel(nn.Identity(), 3, bins, target_prior=unshifted, **options)


def test_the_gain_is_that_of_estimates_from_the_other_half() -> None:
    """Sure where a shift is, by many standard errors, and not sure where none is, whatever the draw."""
    held = class_scores(HELD_X)
    estimate = estimate_prior(class_scores(NEW_X), source=held, labels=HELD_Y)
    assert estimate.gain > 10 * estimate.gain_error > 0
    assert estimate.accepted
    assert estimate.gain < estimate.curve[-1]  # what an estimate says of its own data flatters it
    sure = 0
    for seed in range(20):
        same = estimate_prior(class_scores(classes(400, TRAINING, 10 + seed)[0]), source=held, labels=HELD_Y)
        sure += same.shifted
        assert same.shifted or same.prior is same.source
    assert sure <= 2
    one = estimate_prior([[0.9, 0.1]], source=[[0.9, 0.1], [0.1, 0.9]])
    assert (one.gain, one.gain_error, one.shifted) == (0, math.inf, False)


def test_many_rows_against_few_held_out_ones_are_no_shift_by_chance() -> None:
    """The noise of 300 held-out rows is no shift of 2000 new ones, while an even prior is one."""
    bins = Bins.uniform(0, 10, count=40)
    falling = np.exp(-bins.centers / 2.5) / np.exp(-bins.centers / 2.5).sum()

    def draw(n: int, prior: np.ndarray, random: np.random.Generator) -> np.ndarray:
        x = bins.centers[random.choice(40, n, p=prior)] + random.normal(size=n)
        return np.log(falling) - 0.5 * (x[:, None] - bins.centers) ** 2

    accepted = np.zeros(2, int)
    for seed in range(20):
        random = np.random.default_rng(seed)
        held = draw(300, falling, random)
        for i, prior in enumerate((falling, np.full(40, 1 / 40))):
            accepted[i] += estimate_prior(draw(2000, prior, random), source=held, bins=bins).accepted
    assert accepted[0] <= 2
    assert accepted[1] == 20


# The check


def test_a_shift_of_labels_passes_the_check() -> None:
    given: dict[str, Any] = {"source": class_scores(HELD_X), "labels": HELD_Y, "source_features": HELD_X}
    estimate = estimate_prior(class_scores(NEW_X), features=NEW_X, **given)
    assert estimate.auc is not None
    assert abs(estimate.auc - 0.5) < 0.05
    assert not estimate.refused
    assert estimate.prior is estimate.estimated
    assert "it passes the check" in str(estimate) == repr(estimate)


def test_a_shift_of_features_is_refused_unless_told_otherwise() -> None:
    moved = NEW_X + np.array([0.0, 2.0])
    given: dict[str, Any] = {"source": class_scores(HELD_X), "labels": HELD_Y, "source_features": HELD_X}
    with pytest.warns(DirToolkitWarning, match=r"^estimate_prior: .* AUC of 0\.\d\d above 0\.65\. .* Pass estimated"):
        estimate = estimate_prior(class_scores(moved), features=moved, **given)
    assert estimate.refused
    assert estimate.prior is estimate.source
    assert "the source prior is used" in str(estimate)
    checked = estimate_prior(class_scores(moved), features=moved, max_auc=1, **given)
    assert checked.auc == estimate.auc
    assert torch.equal(checked.prior, estimate.estimated)


def test_the_auc_is_that_of_a_naive_count_of_pairs() -> None:
    """One feature, by which the classifier can only order the rows."""
    random = np.random.default_rng(0)
    held, new = random.normal(size=(300, 1)), random.normal(size=(200, 1)) + 1
    scores = np.array([[0.6, 0.4]])
    estimate = estimate_prior(
        scores.repeat(200, 0), source=scores.repeat(300, 0), labels=[0, 0, 0, 1, 1] * 60,
        features=new, source_features=held, max_auc=1,
    )  # fmt: skip
    assert estimate.auc == pytest.approx((new > held.T).mean(), abs=0.01)


def test_the_text_explains_the_estimate() -> None:
    estimate = estimate_prior(class_scores(NEW_X), source=class_scores(HELD_X), labels=HELD_Y)
    steps = len(estimate.curve)
    pattern = rf"The estimate differs from the source prior by a total variation of 0\.\d+ after {steps} steps\. "
    pattern += r"On the other half of the data it gains 0\.\d+ ± 0\.\d+ nats per sample: a shift\. "
    pattern += r"The estimate by BBSE differs from it by .* Without features it is not checked"
    assert np.array_equal(estimate.curve, np.sort(estimate.curve))
    assert re.match(pattern, str(estimate))


# Bad input


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"scores": [[0.5, math.nan]]}, ValueError, r"^estimate_prior: scores must be finite, got nan at index"),
        ({"scores": np.zeros((0, 2))}, ValueError, "scores must hold at least one value"),
        ({"scores": [0.5, 0.5]}, ShapeError, r"scores must be \(N, B\), got shape \(2,\)"),
        ({"scores": [[0.5, 0.6]]}, ValueError, "scores must sum to one along the last axis, got .* distribution of"),
        ({"source": [[0.2, 0.3, 0.5]]}, ShapeError, r"source must be \(N, 2\), got shape \(1, 3\)"),
        ({"bins": Bins.classes(3)}, ShapeError, r"scores must be \(N, 3\), got shape \(2, 2\)"),
        ({"bins": 2}, TypeError, "bins must be a Bins, got int"),
        ({"labels": [0, 2]}, LabelError, "labels must"),
        ({"labels": [0, 1, 1]}, ShapeError, r"labels must be \(2,\), one per row of source, got shape \(3,\)"),
        ({"features": [[1.0], [2.0]]}, ValueError, "features, source_features and labels must come together"),
        ({"features": [[1.0], [math.inf]], "source_features": [[1.0], [2.0]]}, ValueError, "features must be finite"),
        (
            {"features": [[1.0], [2.0]], "source_features": [[1.0, 2.0], [2.0, 1.0]]},
            ShapeError,
            r"source_features must be \(2, 1\), got shape \(2, 2\)",
        ),
        ({"max_auc": 2}, ValueError, "max_auc must be >= 0.5 and <= 1, got 2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {"scores": [[0.5, 0.5], [0.9, 0.1]], "source": [[0.5, 0.5], [0.9, 0.1]], "labels": [0, 1]}
    given |= changed
    with pytest.raises(error, match=match):
        estimate_prior(given.pop("scores"), **given)


def test_probabilities_in_half_precision_are_probabilities() -> None:
    scores = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    exact = estimate_prior(scores, source=scores).estimated
    for dtype in (torch.bfloat16, torch.float16):
        half = estimate_prior(scores.to(dtype), source=scores.to(dtype)).estimated
        np.testing.assert_allclose(half, exact, atol=0.01)
