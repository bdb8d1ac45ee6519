from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import dir_toolkit as dt
from dir_toolkit.conformal import BinsConformal, GaussianConformal, PointConformal, conformal_interval, label_regions
from dir_toolkit.errors import LabelError, ShapeError

BINS = dt.Bins.uniform(0, 10, width=1)
DENSITY = dt.LabelDensity(BINS, [200, 200, 200, 50, 50, 50, 9, 9, 0, 0])
REGION = np.array(["many"] * 3 + ["medium"] * 3 + ["few"] * 4)
OPEN = [-math.inf, *range(1, 10), math.inf]
NO_WARNING = pytest.mark.filterwarnings("ignore:.*calibration samples, and level")
KINDS = (PointConformal, GaussianConformal, BinsConformal)


def forecasts(kind: type, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Forecasts that err more and are too low where labels are rare."""
    mean = labels - rng.exponential(0.1 + labels / 3) + 0.2
    if kind is PointConformal:
        return mean
    if kind is GaussianConformal:
        return np.stack([mean, rng.normal(0, 0.5, len(labels))], 1)
    scores = np.exp(-((BINS.centers - mean[:, None]) ** 2) / 2)
    return scores / scores.sum(1, keepdims=True)


def drawn(kind: type, per_region: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """So many samples of each region, with labels anywhere in it."""
    labels = np.concatenate([rng.uniform(low, high, per_region) for low, high in ((0, 3), (3, 6), (6, 10))])
    return forecasts(kind, labels, rng), labels


def calibrated(kind: type, *batches: tuple[Any, Any], **options: Any) -> Any:
    calibration = kind(DENSITY, **options)
    for output, labels in batches:
        calibration.update(output, labels)
    return calibration


@NO_WARNING
@pytest.mark.parametrize("samples", [5, 20, 200])
def test_each_region_is_covered_as_often_as_asked(samples: int) -> None:
    """Over 2,000 calibrations at once, each with two regions of its own; bounds are four standard deviations wide."""
    rng, repetitions, level = np.random.default_rng(samples), 2000, 0.9
    bins = dt.Bins.uniform(0, 2 * repetitions, width=1)
    density, region = dt.LabelDensity(bins, np.ones(len(bins), dtype=int)), np.arange(len(bins))
    each, one = (np.repeat(region, n) for n in (samples, 1))
    scale = np.tile([1.0, 5.0], repetitions)
    errors, new = scale[each] * rng.exponential(size=len(each)), scale * rng.exponential(size=len(one))
    covered = []
    for regions in (region, region // 2):  # a threshold per region, and one for both
        calibration = PointConformal(density, regions=regions)
        calibration.update(bins.centers[each] + errors, bins.centers[each])
        covered.append((new <= -calibration.thresholds(level)).reshape(-1, 2).mean(0))
    slack = 4 * math.sqrt(level * (1 - level) / repetitions)
    most = 1.0 if samples == 5 else level + 1 / (samples + 1)
    assert (covered[0] >= level - slack).all()
    assert (covered[0] <= most + slack).all()
    assert level - slack <= covered[1].mean() <= level + 1 / (2 * samples + 1) + slack
    assert covered[1][1] < level - slack  # one threshold for all misses those that err most


def naive_threshold(scores: list[float], level: float) -> float:
    rank = math.floor(round((1 - level) * (len(scores) + 1), 9))
    return sorted(scores)[rank - 1] if rank else -math.inf


def naive_score(kind: type, output: np.ndarray, label: float) -> float:
    if kind is PointConformal:
        return -abs(label - output)
    if kind is GaussianConformal:
        variance = math.exp(output[1])
        return -((label - output[0]) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2
    b = min(int(label + 1e-9), 9)
    return math.log(output[b]) - 0.5 * math.log(max(DENSITY.counts[b], 1) / np.maximum(DENSITY.counts, 1).sum())


@NO_WARNING
@pytest.mark.parametrize("kind", KINDS)
def test_sets_and_hulls_are_those_of_a_loop_over_labels(kind: type) -> None:
    rng = np.random.default_rng(0)
    output, labels = drawn(kind, 12, rng)
    new, _ = drawn(kind, 5, rng)
    grid = np.arange(0, 10, 0.05) if kind is BinsConformal else np.arange(-30, 40, 0.05)
    bin_of = np.clip(np.floor(grid + 1e-9).astype(int), 0, 9)
    for level in (0.5, 0.8, 0.9, 0.95):  # 12 samples are too few for the last
        calibration = calibrated(kind, (output, labels))
        scores = [naive_score(kind, x, y) for x, y in zip(output, labels, strict=True)]
        bins = np.minimum(labels.astype(int), 9)
        known = {
            name: naive_threshold([s for s, b in zip(scores, bins, strict=True) if REGION[b] == name], level)
            for name in np.unique(REGION)
        }
        sets, (lower, upper) = calibration.sets(new, level), calibration.interval(new, level)
        for i, x in enumerate(new):
            held = np.array([naive_score(kind, x, y) >= known[REGION[b]] for y, b in zip(grid, bin_of, strict=True)])
            mean = x[0] if kind is GaussianConformal else x
            best = [b + 0.5 if kind is BinsConformal else np.clip(mean, *OPEN[b : b + 2]) for b in range(10)]
            assert sets[i].tolist() == [naive_score(kind, x, best[b]) >= known[REGION[b]] for b in range(10)]
            if held.any():
                ends = np.clip([lower[i], upper[i]], grid[0], grid[-1])
                assert ends == pytest.approx(grid[held][[0, -1]], abs=0.0501)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_samples_give_all_labels_of_the_region_and_one_warning(kind: type) -> None:
    output, labels = drawn(kind, 30, np.random.default_rng(1))
    keep = np.append(np.arange(60), np.arange(60, 68))  # 8 of the few, where level 0.9 needs 9
    calibration = calibrated(kind, (output[keep], labels[keep]))
    said = "region 'few' has 8 calibration samples, and level 0.9 needs 9, so that sets hold all of these labels"
    with pytest.warns(dt.DirToolkitWarning, match=said):
        thresholds = calibration.thresholds(0.9)
    assert (np.isneginf(thresholds) == (REGION == "few")).all()
    assert calibration.sets(output)[:, 6:].all()
    lower, upper = calibration.interval(output)
    assert (upper == (10 if kind is BinsConformal else math.inf)).all()
    assert (lower > -math.inf).all()
    calibration.update(output[68:69], labels[68:69])
    assert np.isfinite(calibration.thresholds(0.9)).all()


def test_no_sample_of_a_region_is_too_few() -> None:
    output, labels = drawn(PointConformal, 30, np.random.default_rng(1))
    calibration = calibrated(PointConformal, (output, labels), regions=DENSITY.regions())
    with pytest.warns(dt.DirToolkitWarning, match="region 'unseen' has 0 calibration samples"):
        thresholds = calibrated(
            PointConformal, (output[:60], labels[:60]), regions=np.where(REGION == "few", "unseen", REGION)
        ).thresholds()
    assert np.isneginf(thresholds[6:]).all()
    assert calibration.counts().keys() == {"many", "medium", "few", "unseen"}


@pytest.mark.parametrize("kind", KINDS)
def test_one_threshold_for_all_is_that_of_one_region(kind: type) -> None:
    batch = drawn(kind, 40, np.random.default_rng(2))
    own = calibrated(kind, batch).thresholds(0.8)
    together = calibrated(kind, batch, per_region=0.0).thresholds(0.8)
    assert together.tolist() == calibrated(kind, batch, regions=["all"] * 10).thresholds(0.8).tolist()
    between = calibrated(kind, batch, per_region=0.25).thresholds(0.8)
    np.testing.assert_allclose(between, 0.25 * own + 0.75 * together)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_sums_equal_the_whole(kind: type) -> None:
    output, labels = drawn(kind, 40, np.random.default_rng(3))
    whole = calibrated(kind, (output, labels))
    order = np.random.default_rng(4).permutation(len(labels))
    parts = [(output[part], labels[part]) for part in np.split(order, [0, 7, 50])]
    chunked = calibrated(kind, *parts)
    merged = calibrated(kind, *parts[:2]) + calibrated(kind, *parts[2:])
    for other in (chunked, merged, whole.all_reduce()):
        assert other.thresholds(0.7).tolist() == whole.thresholds(0.7).tolist()
        assert other.counts() == whole.counts() == {"few": 40, "many": 40, "medium": 40}


@NO_WARNING
@pytest.mark.parametrize("per_region", [0.0, 1.0])
def test_adapted_sets_hold_their_level_in_each_region_whatever_comes(per_region: float) -> None:
    """Half of the new forecasts are 30 off, and adapted sets miss 10 % all the same."""
    rng, level, rate = np.random.default_rng(8), 0.9, 0.1
    calibration = calibrated(PointConformal, drawn(PointConformal, 30, rng), per_region=per_region)
    labels = rng.uniform(0, 10, 300)
    output, row = labels + 30 * (rng.random(300) < 0.5), BINS.index(labels)
    before, missed = calibration.thresholds(level), np.empty(300, bool)
    for i in range(300):
        missed[i] = not calibration.sets(output[i : i + 1], level)[0, row[i]]
        calibration.adapt(output[i : i + 1], labels[i : i + 1], level, rate=rate)
    for region in np.unique(REGION):
        own = REGION[row] == region
        assert abs(missed[own].mean() - 0.1) <= (level + rate) / (rate * own.sum())
    assert (np.abs(labels - output) > -before[row]).mean() > 0.4
    summed = PointConformal(DENSITY, per_region=per_region) + calibration
    assert summed.thresholds(level).tolist() == calibration.thresholds(level).tolist()


@NO_WARNING
def test_each_missed_label_lowers_the_miss_rate_of_its_region_alone() -> None:
    calibration = calibrated(
        PointConformal, ([1.0] * 99 + [4.0] * 99, [*(1 + np.arange(99) / 99), *(4 + np.arange(99) / 99)])
    )
    before = calibration.thresholds(0.9)
    calibration.adapt([1.0, 1.0], [2.5, 1.1], 0.9, rate=0.095)  # of common labels one is missed, and one is held
    after = calibration.thresholds(0.9)
    assert (before[:3] - after[:3]).round(4).tolist() == [0.0808] * 3  # from the 10th to the 2nd smallest of 99 scores
    assert (before == after)[3:].all()


def ranks(rank: int) -> Any:
    output, labels = drawn(PointConformal, 40, np.random.default_rng(5))
    own = [slice(0, 13), slice(13, None)][rank]
    together = calibrated(PointConformal, (output[own], labels[own])).all_reduce()
    same = together.thresholds() == calibrated(PointConformal, (output, labels)).thresholds()
    with pytest.raises(ValueError, match="only calibrations with the same settings can be added, got per_region was"):
        calibrated(PointConformal, per_region=float(rank)).all_reduce()
    return bool(same.all())


def test_ranks_calibrate_together(two_ranks: Any) -> None:
    assert two_ranks(ranks) == [True, True]


def test_calibrations_of_other_settings_are_not_added() -> None:
    with pytest.raises(ValueError, match="only calibrations with the same settings can be added, got per_region was 0"):
        PointConformal(DENSITY) + PointConformal(DENSITY, per_region=0.5)
    with pytest.raises(TypeError, match="unsupported operand"):
        PointConformal(DENSITY) + GaussianConformal(DENSITY)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rounding_takes_no_label_out_that_lies_on_the_threshold(dtype: torch.dtype) -> None:
    """A forecast that is always the same ties all samples of a bin, which would be lost together."""
    labels = torch.arange(10.0).repeat(20)
    point = torch.full((200,), 3.3, dtype=dtype)
    shares = (torch.arange(1, 11) / 55).to(dtype).repeat(200, 1)
    lower, upper = conformal_interval(point, point, labels, DENSITY, per_region=0.0)
    held = ((lower <= labels) & (labels <= upper)).double().mean()
    assert held >= 0.9
    sets = calibrated(BinsConformal, (shares, labels)).sets(shares)
    assert sets.gather(1, labels.long()[:, None]).double().mean() >= 0.9


def test_the_set_of_a_forecast_that_fits_no_label_is_around_the_best_one() -> None:
    gaussian = calibrated(GaussianConformal, ([[2.5, -8.0]] * 40, np.full(40, 2.5)), per_region=0.0)
    lower, upper = gaussian.interval([[4.0, 5.0]])
    assert (lower, upper) == (4, 4)
    assert not gaussian.sets([[4.0, 5.0]]).any()
    bins = calibrated(BinsConformal, (np.eye(10)[[2] * 40], np.full(40, 2.5)), per_region=0.0, gamma=0.0)
    flat = np.full((1, 10), 0.09) + 0.1 * np.eye(10)[4]
    assert [end.tolist() for end in bins.interval(flat)] == [[4], [5]]


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_in_blocks_are_those_of_all_forecasts_at_once(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = drawn(kind, 40, np.random.default_rng(9))
    calibration = calibrated(kind, batch)
    whole = calibration.interval(batch[0])
    monkeypatch.setattr("dir_toolkit.conformal._BLOCK", 7)
    for end, same in zip(calibration.interval(batch[0]), whole, strict=True):
        assert end.tolist() == same.tolist()
    assert [end.shape for end in calibration.interval(batch[0][:0])] == [(0,), (0,)]


def test_the_interval_ends_where_the_axis_ends() -> None:
    flat, at_end = np.full((40, 3), 1 / 3), np.full(40, 2.5)
    for unbounded, ends in ((False, [0, 3]), (True, [-np.inf, np.inf])):
        density = dt.LabelDensity(dt.Bins([0.0, 1.0, 2.0, 3.0], unbounded=unbounded), [9, 9, 9])
        calibration = BinsConformal(density)
        calibration.update(flat, at_end)
        assert [end[0] for end in calibration.interval(flat)] == ends


def test_end_bins_without_training_labels_leave_intervals_finite_and_coverage_as_asked() -> None:
    """Of the rare labels 4 % lie beyond the axis, and then 20 %; over 400 calibrations with 60 rare labels each."""
    bins = dt.Bins(np.arange(8.0), unbounded=True)
    density = dt.LabelDensity(bins, [0, 500, 500, 9, 9, 9, 0])
    rng, level = np.random.default_rng(0), 0.9

    def drawn(n: int, beyond: float) -> tuple[np.ndarray, np.ndarray]:
        labels = np.where(rng.random(n) < beyond, rng.choice([-5.0, 50.0], n), rng.uniform(3, 6, n))
        scores = -((bins.centers - np.clip(labels, 0, 7)[:, None] + rng.normal(0, 1, (n, 1))) ** 2)
        return np.exp(scores) / np.exp(scores).sum(1, keepdims=True), labels

    new, y = drawn(4000, 0.04)
    held, finite = [], []
    for _ in range(400):
        calibration = BinsConformal(density, regions=["rare"] * 7)
        calibration.update(*drawn(60, 0.04))
        lower, upper = calibration.interval(new, level)
        held.append(((lower <= y) & (y <= upper)).mean())
        finite.append(np.isfinite(lower).all() and np.isfinite(upper).all())
    assert np.mean(held) >= level - 4 * np.std(held) / 20
    assert 0.9 < np.mean(finite) < 1  # more than 10 % beyond the axis are seen by chance in some
    calibration = BinsConformal(density, regions=["rare"] * 7)
    calibration.update(*drawn(1000, 0.2))
    lower, upper = calibration.interval(new, level)
    assert (lower == -math.inf).all()
    assert (upper == math.inf).all()


def test_where_no_set_holds_anything_the_interval_is_the_most_probable_bin() -> None:
    calibration = BinsConformal(dt.LabelDensity(dt.Bins(np.arange(5.0), unbounded=True), [0, 50, 50, 0]))
    output = np.tile([0.1, 0.2, 0.6, 0.1], (40, 1))
    calibration.update(output, np.full(40, 2.5))
    calibration.adapt(output, np.full(40, 2.5), rate=0.9)  # what is held raises the share that may be missed
    assert (calibration.thresholds() == math.inf).all()
    assert [end[0] for end in calibration.interval(output)] == [2, 3]


def test_uneven_bins_are_judged_per_label_unit_and_by_their_prior() -> None:
    bins = dt.Bins.from_edges([0.0, 1.0, 4.0])
    density, output = dt.LabelDensity(bins, [90, 10]), [[0.5, 0.5]] * 20
    plain, divided = (BinsConformal(density, regions=["all"] * 2, gamma=g, prior=[0.8, 0.2]) for g in (0.0, 0.5))
    for calibration in (plain, divided):
        calibration.update(output, [0.5] * 20)
    assert plain.thresholds() == pytest.approx([math.log(0.5), math.log(0.5 * 3)])
    assert divided.thresholds() == pytest.approx([math.log(0.5), math.log(0.5 * 3 * math.sqrt(0.2 / 0.8))])


def test_tensors_are_answered_by_tensors_and_all_else_by_numpy() -> None:
    output, labels = drawn(PointConformal, 40, np.random.default_rng(6))
    expected = conformal_interval(output, output, labels, DENSITY)
    assert all(isinstance(end, np.ndarray) for end in expected)
    ends = conformal_interval(torch.tensor(output).requires_grad_(), output.tolist(), torch.tensor(labels), DENSITY)
    for end, same in zip(ends, expected, strict=True):
        assert isinstance(end, torch.Tensor)
        assert end.tolist() == same.tolist()
    assert conformal_interval(torch.tensor(output).float(), output, labels, DENSITY)[0].dtype == torch.float32
    assert conformal_interval([3], output, labels, DENSITY)[0].dtype == np.float64


def test_labels_beyond_the_axis_follow_outside() -> None:
    output, labels = np.full(40, 9.0), np.full(40, 9.5)
    beyond = [np.append(output, [9.0] * 20), np.append(labels, [14.0] * 20)]
    with pytest.raises(dt.LabelError, match=r"PointConformal.update: labels must lie on the label axis \[0, 10\]"):
        calibrated(PointConformal, beyond)
    dropped, clipped = (calibrated(PointConformal, beyond, regions=["all"] * 10, outside=o) for o in ("drop", "clip"))
    assert dropped.thresholds()[0] == -0.5
    assert clipped.thresholds()[0] == -5  # errors stay exact


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "level 0": (lambda c: c.thresholds(0), ValueError, "PointConformal.thresholds: level must be > 0 and < 1, got 0"),
    "level 1": (lambda c: c.interval([1.0], 1), ValueError, "level must be > 0 and < 1, got 1"),
    "no sample": (lambda c: PointConformal(DENSITY).interval([1.0]), ValueError, "there must be calibration samples"),
    "NaN": (lambda c: c.update([math.nan], [1.0]), ValueError, r"output must be finite, got nan at index \[0\]"),
    "NaN, new": (lambda c: c.interval([math.nan]), ValueError, "output must be finite"),
    "NaN label": (lambda c: c.update([1.0], [math.nan]), dt.LabelError, "labels must not be NaN"),
    "shapes": (lambda c: c.update([1.0], [1.0, 2.0]), ShapeError, r"labels must be \(1,\), one per forecast"),
    "columns": (lambda c: c.update([[1.0]], [1.0]), ShapeError, r"output must be \(N,\), got shape \(1, 1\)"),
    "Gaussian": (lambda c: GaussianConformal(DENSITY).update([1.0], [1.0]), ShapeError, r"output must be \(N, 2\)"),
    "no distribution": (
        lambda c: BinsConformal(DENSITY).update(np.ones((1, 10)), [1.0]),
        ValueError,
        "BinsConformal.update: output must sum to one",
    ),
    "one row": (
        lambda c: BinsConformal(DENSITY).update(np.full(10, 0.1), [1.0]),
        ShapeError,
        r"output must be \(N, 10\), a distribution over the bins",
    ),
    "regions": (lambda c: PointConformal(DENSITY, regions=["a"]), ShapeError, r"regions must be \(10,\) names or"),
    "share": (lambda c: PointConformal(DENSITY, per_region=2), ValueError, "per_region must be >= 0 and <= 1"),
    "gamma": (lambda c: BinsConformal(DENSITY, gamma=-1), ValueError, "gamma must be >= 0 and <= 1"),
    "prior": (lambda c: BinsConformal(DENSITY, prior=[1.0]), ShapeError, r"prior must be \(10,\), one share per bin"),
    "prior of zero": (lambda c: BinsConformal(DENSITY, prior=np.eye(10)[0]), ValueError, "prior must be positive"),
    "grid": (
        lambda c: PointConformal(dt.LabelDensity(dt.Bins.grid(BINS), DENSITY.counts)),
        ValueError,
        "density must be over one axis",
    ),
    "rate": (lambda c: c.adapt([1.0], [1.0], rate=0), ValueError, "PointConformal.adapt: rate must be > 0 and <= 1"),
    "level to adapt to": (lambda c: c.adapt([1.0], [1.0], 1.0), ValueError, "adapt: level must be > 0 and < 1, got 1"),
    "NaN to adapt to": (lambda c: c.adapt([math.nan], [1.0]), ValueError, "adapt: output must be finite"),
    "classes": (
        lambda c: PointConformal(dt.LabelDensity(dt.Bins.classes(2), [1, 1])).update([0.5], [1]),
        ValueError,
        "bins must cut a continuous label axis",
    ),
    "order": (
        lambda c: BinsConformal(dt.LabelDensity(dt.Bins.classes(2), [1, 1])).interval([[0.5, 0.5]]),
        ValueError,
        r"bins must cut a continuous label axis for an interval.* Use sets\(output, level\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong: str) -> None:
    call, error, message = WRONG[wrong]
    calibration = calibrated(PointConformal, ([1.0] * 20, [1.5] * 20))
    with pytest.raises(error, match=message):
        call(calibration)
    assert calibration.counts()["many"] == 20  # nothing was added
    assert not calibration._moved.any()


def test_bins_without_a_training_label_belong_to_the_rarest_region_that_has_any() -> None:
    bins = dt.Bins.uniform(0, 4, width=1)
    for counts, rarest in (([0, 200, 5, 0], "few"), ([0, 200, 50, 0], "medium"), ([0, 200, 300, 0], "many")):
        regions = label_regions(dt.LabelDensity(bins, np.array(counts)))
        assert regions[0] == regions[3] == rarest
        assert regions[1] == "many"


def test_float32_ends_hold_float64_labels_on_an_edge() -> None:
    bins, labels = dt.Bins.uniform(0, 1, count=10), np.repeat(np.arange(10) / 10, 40)
    shares = torch.eye(10)[bins.index(labels)] * 0.9 + 0.01
    calibration = BinsConformal(dt.LabelDensity(bins, [500] * 10))
    calibration.update(shares, labels)
    lower, upper = calibration.interval(shares)
    assert ((lower.numpy() <= labels) & (labels <= upper.numpy())).all()


@NO_WARNING
@pytest.mark.parametrize("kind", [PointConformal, GaussianConformal, BinsConformal])
@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_missing_labels_are_left_out_where_that_is_asked_for(kind: type, outside: Any) -> None:
    output, labels = drawn(kind, 30, np.random.default_rng(0))
    gone = np.arange(len(labels)) % 4 == 1
    holes = np.where(gone, np.nan, labels)
    one = calibrated(kind, (output, holes), missing="drop", outside=outside)
    rest = calibrated(kind, (output[~gone], labels[~gone]), outside=outside)
    assert np.array_equal(one.thresholds(0.8), rest.thresholds(0.8))
    assert one.counts() == rest.counts()
    with pytest.raises(LabelError, match=r"labels must not be NaN, .*missing="):
        calibrated(kind, (output, holes), outside=outside)
    with pytest.raises(ValueError, match="missing must be one of 'raise', 'drop', got 'skip'"):
        kind(DENSITY, missing="skip")
    with pytest.raises(ValueError, match="there must be calibration samples, got none"):
        calibrated(kind, (output, holes * np.nan), missing="drop").thresholds()
    if kind is PointConformal:
        given = conformal_interval(output[:3], output, holes, DENSITY, 0.8, missing="drop", outside=outside)
        assert np.array_equal(given, rest.interval(output[:3], 0.8))
