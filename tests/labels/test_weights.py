from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d, gaussian_filter1d
from scipy.signal.windows import triang
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Ridge

from dir_toolkit import LDS, Bins, LabelDensity, gaussian, laplace, triangular, weighted_l1
from dir_toolkit.errors import CheckpointError, DirToolkitWarning, LabelError, NotFittedError, ShapeError
from dir_toolkit.labels.kernels import smooth

SCHEMES = ("none", "inverse", "sqrt_inverse", "effective_number", "dense")


def labels_of(counts: Any) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def table(lds: LDS) -> np.ndarray:
    """The weight of each bin."""
    return lds.table[:-1].double().numpy()


def average_one(raw: Any, counts: Any) -> np.ndarray:
    raw, counts = np.asarray(raw, dtype=float), np.asarray(counts)
    return raw * counts.sum() / (raw * counts).sum()


# Each scheme by hand


@pytest.mark.parametrize(
    ("options", "raw"),
    [
        ({"scheme": "none"}, [1, 1, 1]),
        ({"scheme": "inverse"}, [1 / 4, 1 / 1, 1 / 5]),
        ({"scheme": "inverse", "power": 0}, [1, 1, 1]),
        ({"scheme": "inverse", "power": 0.25}, [4**-0.25, 1, 5**-0.25]),
        ({"scheme": "sqrt_inverse"}, [1 / 2, 1, 1 / np.sqrt(5)]),
        ({"scheme": "effective_number", "beta": 0.5}, [0.5 / (1 - 1 / 16), 0.5 / 0.5, 0.5 / (1 - 1 / 32)]),
        ({"scheme": "effective_number", "beta": 0}, [1, 1, 1]),
        ({"scheme": "dense", "alpha": 1, "epsilon": 0.1}, [1 - 3 / 4, 1, 0.1]),
        ({"scheme": "dense", "alpha": 0.5}, [1 - 0.5 * 3 / 4, 1, 0.5]),
        ({"scheme": "inverse", "clip": (2, 4)}, [1 / 4, 1 / 2, 1 / 4]),
        ({"scheme": "sqrt_inverse", "clip": (2, 4), "order": "scheme_first"}, [1 / 2, 1 / np.sqrt(2), 1 / 2]),
    ],
)
def test_schemes_without_smoothing_by_hand(options: dict[str, Any], raw: list[float]) -> None:
    counts = [4, 1, 5]
    lds = LDS(Bins.classes(3), kernel=None, **options).fit(labels_of(counts))
    np.testing.assert_allclose(table(lds), average_one(raw, counts), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "q"),
    [
        # The window 1/4 1/2 1/4 over 4 1 5 8 4; its ends reflect (b a | a b), mirror or see nothing.
        ({"edges": "reflect"}, [13 / 4, 11 / 4, 19 / 4, 25 / 4, 20 / 4]),
        ({"edges": "mirror"}, [10 / 4, 11 / 4, 19 / 4, 25 / 4, 24 / 4]),
        ({"edges": "zero"}, [9 / 4, 11 / 4, 19 / 4, 25 / 4, 16 / 4]),
    ],
)
def test_smoothing_before_the_scheme_by_hand(options: dict[str, Any], q: list[float]) -> None:
    counts = [4, 1, 5, 8, 4]
    lds = LDS(Bins.classes(5), kernel=triangular(3), **options)
    np.testing.assert_allclose(table(lds.fit(labels_of(counts))), average_one(np.array(q) ** -0.5, counts), rtol=1e-6)
    lds = LDS(Bins.classes(5), kernel=triangular(3), scheme="inverse", clip=(3, 5), **options)
    expected = average_one(1 / np.clip(q, 3, 5), counts)
    np.testing.assert_allclose(table(lds.fit(labels_of(counts))), expected, rtol=1e-6)


def test_smoothing_after_the_scheme_by_hand() -> None:
    counts = [4, 1, 9]
    lds = LDS(Bins.classes(3), kernel=triangular(3), order="scheme_first").fit(labels_of(counts))
    # Roots 2 1 3, smoothed: (2+4+1)/4, (2+2+3)/4, (1+6+3)/4.
    np.testing.assert_allclose(table(lds), average_one([4 / 7, 4 / 7, 4 / 10], counts), rtol=1e-6)


# What holds for all of them


@pytest.mark.filterwarnings("ignore:.*effective sample size")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", [None, gaussian(5, 2), laplace(3, 1)], ids=["none", "gaussian", "laplace"])
@pytest.mark.parametrize("order", ["smooth_first", "scheme_first"])
def test_weights_are_finite_positive_and_average_one(scheme: Any, kernel: Any, order: Any) -> None:
    if (scheme, order) == ("dense", "scheme_first"):
        return
    rng = np.random.default_rng(0)
    for _ in range(6):
        counts = rng.integers(0, rng.choice([2, 30, 500]), size=rng.integers(5, 40))
        counts[rng.integers(len(counts))] += 1
        bins, labels = Bins.classes(len(counts)), labels_of(counts)
        lds = LDS(bins, kernel=kernel, scheme=scheme, order=order).fit(labels)
        weights = lds(torch.from_numpy(labels))
        assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
        assert np.isfinite(table(lds)).all()
        assert (table(lds) > 0).all()
        # Order does not matter, nor does the way labels are handed over, nor whether all are seen twice.
        if kernel is None:
            unseen = table(lds)[counts == 0]
            assert (unseen >= table(lds)[counts > 0].max() * (1 - 1e-6)).all()
        shuffled = rng.permutation(labels)
        for same in (shuffled.tolist(), torch.from_numpy(shuffled), LabelDensity.count(labels, bins)):
            other = LDS(bins, kernel=kernel, scheme=scheme, order=order).fit(same)
            assert torch.equal(other.table[:-1], lds.table[:-1])
        if scheme not in ("effective_number",):  # which is not linear in the counts, on purpose
            twice = LDS(bins, kernel=kernel, scheme=scheme, order=order).fit(np.concatenate([labels, labels]))
            np.testing.assert_allclose(table(twice), table(lds), rtol=1e-5)


def test_weights_make_the_loss_see_all_labels_alike() -> None:
    labels = torch.tensor([0.0] * 30 + [1.0] * 3)
    weights = LDS(Bins.classes(2), kernel=None, scheme="inverse").fit(labels)(labels)
    assert weights[:30].sum() == pytest.approx(weights[30:].sum())
    assert weighted_l1(torch.zeros(33), labels, weights) == pytest.approx(0.5)


def test_one_label_weighs_one_and_unseen_bins_at_least_as_much() -> None:
    for scheme in SCHEMES:
        lds = LDS(Bins.uniform(0, 20, width=1), scheme=scheme).fit([7.5])
        assert lds(torch.tensor([7.5])).item() == pytest.approx(1)
        assert (table(lds) >= 1 - 1e-6).all()


def test_fitting_anew_forgets_the_old_labels_and_inputs_stay_as_they_are() -> None:
    lds = LDS(Bins.classes(5), kernel=triangular(3))
    first = labels_of([5, 1, 1, 1, 1])
    before = first.copy()
    assert lds.fit(first) is lds
    np.testing.assert_array_equal(first, before)
    expected = LDS(Bins.classes(5), kernel=triangular(3)).fit(labels_of([1, 1, 1, 1, 5]))
    assert torch.equal(lds.fit(labels_of([1, 1, 1, 1, 5])).table[:-1], expected.table[:-1])


def test_forward_keeps_shape_and_sample_weight_gives_numpy() -> None:
    lds = LDS(Bins.uniform(0, 10, width=1)).fit([1.0, 1.0, 5.0])
    for shape in ((), (0,), (3,), (2, 4, 5)):
        weights = lds(torch.full(shape, 5.0))
        assert (weights.shape, weights.dtype) == (shape, torch.float32)
        assert not weights.requires_grad
        given = lds.sample_weight(np.full(shape, 5.0))
        assert (given.shape, given.dtype) == (shape, np.float64)
        np.testing.assert_allclose(given, weights.numpy())
    assert lds.sample_weight(torch.tensor([5.0])).tolist() == lds.sample_weight([5.0]).tolist()
    compiled = torch.compile(lds, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.tensor([1.0, 5.0])), lds(torch.tensor([1.0, 5.0])))


@pytest.mark.filterwarnings("ignore:.*effective sample size")
def test_sample_weight_serves_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = np.clip(np.exp(x[:, 0]) + 0.1 * rng.normal(size=300) + 0.5, 0, 20)
    weight = LDS(Bins.uniform(0, 20, width=1), scheme="inverse").fit(y).sample_weight(y)
    assert weight.mean() == pytest.approx(1, abs=1e-6)
    rare = y > 5
    for model in (Ridge(), GradientBoostingRegressor(n_estimators=5, max_depth=2, random_state=0)):
        plain = np.abs(model.fit(x, y).predict(x) - y)[rare].mean()
        assert np.abs(model.fit(x, y, sample_weight=weight).predict(x) - y)[rare].mean() < plain


# The public code's numbers


def public_weights(labels: np.ndarray, num_bins: int, scheme: str, window: np.ndarray | None) -> np.ndarray:
    """What the public recipe gives each label, worked out label by label in plain Python."""
    last = num_bins - 1
    counts = [0] * num_bins
    for label in labels:
        counts[min(last, int(label))] += 1
    if scheme == "sqrt_inverse":
        values = [float(np.sqrt(n)) for n in counts]
    else:
        values = [float(min(max(n, 5), 1000)) for n in counts]
    if window is not None:
        half = len(window) // 2
        smoothed = []
        for b in range(num_bins):
            total = sum(window[half + d] * values[b + d] for d in range(-half, half + 1) if 0 <= b + d <= last)
            # Sums that are whole but for rounding would make truncation a matter of luck.
            assert scheme == "sqrt_inverse" or abs(total - round(total)) > 1e-9
            smoothed.append(float(int(total)) if scheme == "inverse" else total)
        values = smoothed
    weights = [1 / values[min(last, int(label))] for label in labels]
    return np.array(weights) * len(weights) / sum(weights)


def folded(size: int, sigma: float) -> np.ndarray:
    impulse = gaussian_filter1d([float(i == size // 2) for i in range(size)], sigma)
    return impulse / max(impulse)


@pytest.mark.parametrize(
    ("scheme", "kernel", "window"),
    [
        ("sqrt_inverse", gaussian(5, 2, folded=True), folded(5, 2)),
        ("sqrt_inverse", gaussian(9, 1, folded=True), folded(9, 1)),
        ("sqrt_inverse", triangular(5), triang(5)),
        ("sqrt_inverse", laplace(5, 2), np.exp(-np.abs(np.arange(-2, 3)) / 2)),
        ("sqrt_inverse", None, None),
        ("inverse", gaussian(5, 2, folded=True), folded(5, 2)),
        ("inverse", gaussian(9, 1, folded=True), folded(9, 1)),
        ("inverse", laplace(5, 2), np.exp(-np.abs(np.arange(-2, 3)) / 2)),
        ("inverse", None, None),
    ],
)
def test_reference_gives_the_public_code_s_numbers(scheme: Any, kernel: Any, window: Any) -> None:
    rng = np.random.default_rng(0)
    ages = np.concatenate([rng.gamma(6, 6, size=5000), rng.uniform(0, 140, size=40)])  # some beyond 121
    lds = LDS.reference(Bins.uniform(0, 121, width=1), kernel=kernel, scheme=scheme).fit(ages)
    expected = public_weights(ages, 121, scheme, window)
    np.testing.assert_allclose(lds.sample_weight(ages), expected, rtol=1e-6)
    np.testing.assert_allclose(lds(torch.from_numpy(ages)).numpy(), expected, rtol=1e-6)


def test_reference_rounds_whole_sums_as_the_public_code_does() -> None:
    # A triangle over whole counts gives whole sums but for rounding, which the public code hands to SciPy as integers.
    counts = np.random.default_rng(0).integers(0, 40, size=60)
    smoothed = convolve1d(np.clip(counts, 5, 1000), weights=triang(5), mode="constant")
    assert smoothed.dtype.kind == "i"
    lds = LDS.reference(Bins.classes(60), kernel=triangular(5), scheme="inverse").fit(labels_of(counts))
    np.testing.assert_allclose(table(lds), average_one(1 / smoothed, counts), rtol=1e-6)


def test_the_reference_oracle_depends_on_everything_it_should() -> None:
    labels = np.random.default_rng(0).gamma(6, 6, size=2000)
    base = public_weights(labels, 121, "inverse", folded(5, 2))
    for other in (
        public_weights(labels, 121, "sqrt_inverse", folded(5, 2)),
        public_weights(labels, 121, "inverse", folded(5, 1)),
        public_weights(labels, 121, "inverse", None),
        public_weights(labels, 40, "inverse", folded(5, 2)),
    ):
        assert not np.allclose(base, other, rtol=1e-3)


def test_the_reference_has_its_defaults_and_refuses_the_rest() -> None:
    lds = LDS.reference(Bins.uniform(0, 121, width=1))
    assert (lds.scheme, lds.edges, lds.order, lds.outside, lds.clip) == (
        "sqrt_inverse",
        "zero",
        "scheme_first",
        "clip",
        None,
    )
    assert LDS.reference(Bins.classes(9), scheme="inverse").clip == (5, 1000)
    with pytest.raises(ValueError, match=r"^LDS\.reference: scheme must be one of 'inverse', 'sqrt_inverse', got 'den"):
        LDS.reference(Bins.classes(9), scheme="dense")  # type: ignore[arg-type]


# What is smoothed unless told otherwise


def test_classes_have_no_neighbours_unless_a_window_is_given_for_them() -> None:
    labels = labels_of([100, 10, 100, 10, 100])
    for bins in (Bins.classes(5), Bins.classes(7)):
        weights, counts = table(LDS(bins, scheme="inverse").fit(labels)), np.bincount(labels)
        np.testing.assert_allclose(weights[:5], average_one(1 / counts, counts), rtol=1e-6)
    given = LDS(Bins.classes(5), scheme="inverse", kernel=gaussian(5, 2)).fit(labels)
    assert np.ptp(table(given)) < 0.3
    roots = LDS.reference(Bins.classes(5)).fit(labels)
    np.testing.assert_allclose(table(roots), average_one(np.bincount(labels) ** -0.5, np.bincount(labels)), rtol=1e-6)


def test_an_axis_shorter_than_the_usual_window_is_not_smoothed() -> None:
    for count in (1, 4):
        bins = Bins.uniform(0, count, width=1)
        fitted = LDS(bins, scheme="inverse").fit([0.5])
        assert torch.equal(fitted.table[:-1], LDS(bins, kernel=None, scheme="inverse").fit([0.5]).table[:-1])
        assert LDS.reference(bins).kernels is None
    bins = Bins.uniform(0, 5, width=1)
    for usual, window in ((LDS(bins), gaussian(5, 2)), (LDS.reference(bins), gaussian(5, 2, folded=True))):
        assert usual.kernels is not None
        assert [of_axis.tolist() for of_axis in usual.kernels] == [window.tolist()]


# Labels beyond the axis


def test_labels_beyond_the_axis_follow_outside() -> None:
    bins, labels = Bins.uniform(0, 10, width=1), [1.0, 1.0, 9.5]
    beyond = torch.tensor([-3.0, 9.5, 42.0])
    with pytest.raises(LabelError, match="labels must lie on the label axis"):
        LDS(bins).fit(labels)(beyond)
    with pytest.raises(LabelError, match="labels must lie on the label axis"):
        LDS(bins).fit([42.0])
    clipped = LDS(bins, outside="clip").fit(labels)
    assert torch.equal(clipped(beyond), clipped(torch.tensor([0.0, 9.5, 10.0])))
    dropped = LDS(bins, outside="drop").fit([*labels, 42.0])
    assert dropped(beyond)[[0, 2]].tolist() == [0, 0]
    assert dropped(beyond)[1] > 0
    np.testing.assert_allclose(dropped.sample_weight(beyond), dropped(beyond).numpy())
    assert np.average(table(dropped)[[1, 9]], weights=[2, 1]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="at least one label must lie on the label axis, got none"):
        LDS(bins, outside="drop").fit([42.0])
    for outside in ("raise", "clip", "drop"):
        with pytest.raises(LabelError, match="labels must not be NaN"):
            LDS(bins, outside=outside).fit(labels)(torch.tensor([np.nan]))  # type: ignore[arg-type]


def test_an_accelerator_is_not_read() -> None:
    for outside in ("raise", "clip", "drop"):
        lds = LDS(Bins.uniform(0, 10, width=1), outside=outside).fit([1.0])  # type: ignore[arg-type]
        assert lds(torch.empty(3, device="meta")).shape == (3,)


def test_a_label_that_cannot_be_placed_weighs_nan_where_labels_are_not_read() -> None:
    lds = LDS(Bins.uniform(0, 10, width=1)).fit([1.0])
    compiled = torch.compile(lds, fullgraph=True, backend="eager")  # which reads no values either
    weights = compiled(torch.tensor([1.0, 42.0, float("nan")]))
    assert weights.isnan().tolist() == [False, True, True]


# State


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_goes_through_a_file_and_copies_are_apart() -> None:
    bins = Bins.uniform(0, 10, width=1)
    lds = LDS(bins).fit([1.0, 1.0, 5.0])
    other = LDS(bins)
    other.load_state_dict(through_a_file(lds.state_dict()))
    labels = torch.tensor([1.0, 5.0, 9.0])
    assert torch.equal(other(labels), lds(labels))
    twin = copy.deepcopy(lds)
    twin.fit([9.0])
    assert torch.equal(other(labels), lds(labels))
    unfitted = LDS(bins).fit([1.0])
    unfitted.load_state_dict(through_a_file(LDS(bins).state_dict()))
    with pytest.raises(NotFittedError):
        unfitted(labels)


@pytest.mark.filterwarnings("ignore:.*effective sample size", "ignore:.*lie in one of")
@pytest.mark.parametrize("scheme", ["inverse", "sqrt_inverse", "dense"])
@pytest.mark.parametrize("of", ["quantile", "by_hand"])
def test_uneven_bins_weigh_as_fine_even_ones_do(scheme: Any, of: str) -> None:
    """Of a density that is straight within each coarse bin, so that a bin's mean is the density at its middle."""
    labels = 60 * np.sqrt((np.arange(200_000) + 0.5) / 200_000)
    fine, cuts = Bins.uniform(0, 60, width=0.5), [0, 1, 2, 5, 10, 20, 60]
    coarse = Bins.quantile([0.0, *labels, 60.0], 20) if of == "quantile" else Bins.from_edges(cuts)
    middles = (coarse.edges[:-1] + coarse.edges[1:]) / 2
    middles, counts = middles[1:], coarse.index(labels)  # a density near zero has the most error
    exact = 60 / middles if scheme == "inverse" else np.sqrt(60 / middles) if scheme == "sqrt_inverse" else None
    result = [LDS(bins, kernel=None, scheme=scheme).fit(labels).sample_weight(middles) for bins in (coarse, fine)]
    if exact is None:  # dense: falls in a straight line with the density
        place = [np.polyfit(middles, weights / weights.max(), 1) for weights in result]
        for weights, line in zip(result, place, strict=True):
            np.testing.assert_allclose(weights / weights.max(), np.polyval(line, middles), atol=0.02)
        return
    least = min(np.bincount(counts)[1:].min(), np.histogram(labels, fine.edges)[0][fine.index(middles)].min())
    for weights in result:
        np.testing.assert_allclose(weights / weights[-1], exact / exact[-1], rtol=2 / np.sqrt(least))


@pytest.mark.filterwarnings("ignore:.*effective sample size")
@pytest.mark.parametrize("bins", [Bins.uniform(0, 12, width=1), Bins.uniform(0, 1.2, count=12), Bins.classes(12)])
def test_even_bins_and_classes_weigh_by_their_counts_to_the_bit(bins: Bins) -> None:
    counts = np.array([900, 411, 3, 0, 17, 57, 1, 2, 333, 77, 5, 23])
    density = LabelDensity(bins, counts)
    roots = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 1.0)
    expected = roots * (counts.sum() / (counts * roots).sum())
    assert np.array_equal(table(LDS(bins, kernel=None).fit(density)), torch.tensor(expected).float().double().numpy())
    smoothed = smooth(counts, gaussian(5, 2))
    assert np.array_equal(density.smooth(gaussian(5, 2)).counts, smoothed)
    weights = 1 / smoothed
    expected = weights * (counts.sum() / (counts * weights).sum())
    of_lds = LDS(bins, kernel=gaussian(5, 2), scheme="inverse").fit(density)
    assert np.array_equal(table(of_lds), torch.tensor(expected).float().double().numpy())


def test_counts_whose_sum_lies_beyond_float64_are_weighed() -> None:
    density = LabelDensity(Bins.classes(2), [1.5e308, 1e308])
    np.testing.assert_allclose(table(LDS(density.bins, scheme="inverse").fit(density)), [5 / 6, 5 / 4], rtol=1e-6)


def test_state_is_saved_whatever_the_default_device() -> None:
    labels, bins = torch.tensor([1.0, 5.0]), Bins.uniform(0, 10, width=1)
    fitted = LDS(bins).fit(labels)
    with torch.device("meta"):
        state = fitted.state_dict()
        lost = LDS(bins).fit([1.0, 5.0])
    other = LDS(bins)
    other.load_state_dict(state)
    assert torch.equal(other(labels), fitted(labels))
    with pytest.raises(NotFittedError, match=r"^LDS\.sample_weight: weights are not fitted yet"):
        lost.sample_weight(labels)


def test_a_state_set_by_hand_is_checked() -> None:
    lds = LDS(Bins.uniform(0, 10, width=1))
    lds.set_extra_state(lds.get_extra_state())
    with pytest.raises(CheckpointError, match=r"^LDS\S*: the saved weights must have the same settings, got scheme"):
        lds.set_extra_state(LDS(lds.bins, scheme="inverse").get_extra_state())


def test_state_holds_tensors_only_and_of_one_shape() -> None:
    lds = LDS(Bins.uniform(0, 10, width=1))
    before = {name: value.shape for name, value in lds.state_dict().items()}
    lds.fit([1.0, 5.0])
    assert {name: value.shape for name, value in lds.state_dict().items()} == before
    assert all(type(value) is torch.Tensor for value in lds.state_dict().values())


@pytest.mark.parametrize(
    "options",
    [
        {"outside": "drop"},
        {"kernel": triangular(3)},
        {"scheme": "inverse"},
        {"edges": "zero"},
        {"order": "scheme_first"},
        {"clip": (1, 5)},
        {"power": 0.5},
        {"beta": 0.9},
        {"alpha": 0.5},
        {"epsilon": 0.1},
    ],
)
def test_weights_of_other_settings_are_refused_and_change_nothing(options: Any) -> None:
    bins = Bins.uniform(0, 10, width=1)
    own, other = LDS(bins).fit([1.0, 1.0, 5.0]), LDS(bins, **options).fit([1.0, 7.0, 7.0])
    before = own.table.clone()
    message = rf"^LDS\S*: the saved weights must have the same settings, got {next(iter(options))} was"
    with pytest.raises(CheckpointError, match=message):
        own.load_state_dict(other.state_dict())
    assert torch.equal(own.table[:-1], before[:-1])
    assert own._fitted


def test_damaged_states_are_refused_and_change_nothing() -> None:
    bins = Bins.uniform(0, 10, width=1)
    own, state = LDS(bins).fit([1.0, 1.0, 5.0]), LDS(bins).fit([7.0]).state_dict()
    before = own.table.clone()
    broken = state["table"].clone()
    broken[3] = torch.nan
    for bad, kind in (
        ({**state, "table": broken}, CheckpointError),
        ({**state, "table": -state["table"]}, CheckpointError),
        ({**state, "table": state["table"][:4]}, RuntimeError),
        ({**state, "_extra_state": state["_extra_state"][:40]}, CheckpointError),
        ({**state, "_extra_state": {"fitted": True}}, CheckpointError),
        ({"table": state["table"]}, RuntimeError),
        ({"_extra_state": state["_extra_state"]}, RuntimeError),
        ({**state, "more": before}, RuntimeError),
    ):
        with pytest.raises(kind):
            own.load_state_dict(bad)
        assert torch.equal(own.table[:-1], before[:-1])
    loose = LDS(bins)
    loose.load_state_dict({"table": state["table"]}, strict=False)
    assert torch.equal(loose(torch.tensor([2.0])), LDS(bins).fit([7.0])(torch.tensor([2.0])))
    with pytest.raises(CheckpointError, match="must be finite and not negative"):
        loose.load_state_dict({"table": broken}, strict=False)


def test_weights_that_were_lost_on_the_meta_device_are_not_known() -> None:
    bins, labels = Bins.uniform(0, 10, width=1), torch.tensor([1.0])
    with torch.device("meta"):
        lds = LDS(bins)
    lds.fit([1.0, 5.0])
    lds.to_empty(device="cpu")
    with pytest.raises(NotFittedError):
        lds(labels)
    state = LDS(bins).fit([1.0, 5.0]).state_dict()
    for assign in (False, True):
        other = LDS(bins).to("meta") if assign else lds
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(labels), LDS(bins).fit([1.0, 5.0])(labels))
    with pytest.raises(RuntimeError, match=r"on the meta device, which holds no weights\. Pass assign=True"):
        LDS(bins).to("meta").load_state_dict(LDS(bins).fit([1.0]).state_dict())


def test_weights_made_in_inference_mode_serve_training() -> None:
    labels = torch.tensor([1.0, 5.0])
    with torch.inference_mode():
        lds = LDS(Bins.uniform(0, 10, width=1)).fit(labels).double().float()
        lds(labels)
    pred = torch.zeros(2, requires_grad=True)
    weighted_l1(pred, labels, lds(labels)).backward()
    assert lds.fit([2.0]) is lds


def test_half_precision_does_not_make_weights_infinite() -> None:
    lds = LDS(Bins.classes(10), kernel=None, scheme="inverse")
    with pytest.warns(DirToolkitWarning, match="effective sample size"):
        lds.fit([0] * 400_000 + [1, 3])
    assert lds.half()(torch.tensor([1])).item() > 100_000
    assert lds.bfloat16().table.dtype == torch.float32


def test_few_labels_that_rule_the_loss_are_told_once() -> None:
    bins = Bins.classes(3)
    message = r"^LDS\.fit: .* effective sample size to 4\.5 of 1002 .* Use scheme=\"sqrt_inverse\", a wider"
    with pytest.warns(DirToolkitWarning, match=message) as seen:
        LDS(bins, scheme="inverse").fit([0] * 1000 + [1, 2])
    assert len(seen) == 1
    LDS(bins, scheme="inverse", clip=(100, 1000)).fit([0] * 1000 + [1, 2])


def test_a_beta_that_makes_no_difference_is_told_and_its_advice_helps() -> None:
    counts = [900_000, 700_000, 60_000]
    density = LabelDensity(Bins.classes(3), counts)
    with pytest.warns(DirToolkitWarning, match=r"^LDS\.fit: beta=0\.999 is too small for 900000 labels") as seen:
        LDS(density.bins, scheme="effective_number").fit(density)
    beta = float(re.search(r"such as (0\.\d+)\.", str(seen[0].message))[1])
    assert np.ptp(table(LDS(density.bins, scheme="effective_number", beta=beta).fit(density))) > 1
    LDS(density.bins, scheme="effective_number", beta=0).fit(density)


def test_many_bins_are_weighed_at_once() -> None:
    bins = Bins.uniform(0, 100_000, width=1)
    labels = np.random.default_rng(0).uniform(0, 100_000, 300_000)
    assert LDS(bins).fit(labels).sample_weight(labels).mean() == pytest.approx(1, abs=1e-6)


def test_dtype_and_device_follow() -> None:
    lds = LDS(Bins.uniform(0, 10, width=1)).fit([1.0, 5.0])
    assert lds.double()(torch.tensor([1.0])).dtype == torch.float64
    assert lds.to(torch.float16)(torch.tensor([1.0])).dtype == torch.float32
    assert lds.fit([1.0]).table.dtype == torch.float32
    assert not list(lds.parameters())


@pytest.mark.parametrize("bins", [Bins.uniform(0, 20, width=2), Bins.uniform(0, 20, width=1), Bins.classes(10)])
def test_weights_of_another_axis_are_refused(bins: Bins) -> None:
    state = LDS(bins).fit([1]).state_dict()
    with pytest.raises(ValueError, match=r"^LDS\S*: the saved weights must be over the same bins, got <?Bins"):
        LDS(Bins.uniform(0, 10, width=1)).load_state_dict(state)


@pytest.mark.parametrize("extra", [5, {}, {"fitted": True}, {"fitted": True, "bins": 3}, {"fitted": True, "bins": {}}])
def test_a_damaged_state_is_refused_by_name(extra: Any) -> None:
    state = LDS(Bins.classes(5)).fit([1]).state_dict() | {"_extra_state": extra}
    with pytest.raises((TypeError, ValueError), match=r"^(LDS\.load_state_dict|Bins\.from_dict): "):
        LDS(Bins.classes(5)).load_state_dict(state)


# Refusals


def test_weights_that_are_not_fitted_are_refused() -> None:
    lds = LDS(Bins.classes(5))
    with pytest.raises(
        NotFittedError, match=r"^LDS: weights are not fitted yet\. Call lds\.fit\(training_labels\) firs"
    ):
        lds(torch.tensor([1]))
    with pytest.raises(NotFittedError, match=r"^LDS\.sample_weight: weights are not fitted yet\. Call lds\.fit"):
        lds.sample_weight([1])
    assert "fitted=False" in repr(lds)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"kernel": [1, 1]}, ValueError, "kernel must have odd length, so that it has a middle, got 2 values"),
        ({"kernel": np.ones(7)}, ValueError, "kernel must not be longer than the label axis, got 7 values for 6 bins"),
        ({"kernel": "gaussian"}, TypeError, "kernel must be a window, \"auto\" or None, got 'gaussian'. Use dir_"),
        ({"kernel": [[1]]}, ShapeError, "kernel must be a row of numbers"),
        ({"scheme": "sqrt_inv"}, ValueError, "scheme must be one of 'none', 'inverse', 'sqrt_inverse'"),
        ({"edges": "constant"}, ValueError, "edges must be one of 'reflect', 'mirror', 'zero'"),
        ({"order": None}, ValueError, "order must be one of 'smooth_first', 'scheme_first', got None"),
        ({"outside": True}, ValueError, "outside must be one of 'raise', 'clip', 'drop', got True"),
        ({"clip": (5, 1)}, ValueError, "clip must be a pair (low, high) with 0 <= low < high, got (5, 1)"),
        ({"clip": 5}, ValueError, "clip must be a pair (low, high) with 0 <= low < high, got 5"),
        ({"power": 2}, ValueError, "power must be >= 0 and <= 1, got 2"),
        ({"beta": 1}, ValueError, "beta must be >= 0 and < 1, got 1"),
        ({"alpha": -1}, ValueError, "alpha must be >= 0, got -1"),
        ({"epsilon": 0}, ValueError, "epsilon must be > 0, got 0"),
        ({"beta": "0.9"}, TypeError, "beta must be a number, got '0.9'"),
        (
            {"scheme": "dense", "order": "scheme_first"},
            ValueError,
            'scheme "dense" is defined on a density, so it needs',
        ),
    ],
)
def test_settings_are_checked(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^LDS: " + re.escape(message)):
        LDS(Bins.classes(6), **options)


def test_arguments_are_checked() -> None:
    bins = Bins.classes(6)
    for value in (None, 6, [0, 1, 2], "abc"):
        with pytest.raises(TypeError, match=r"^LDS: bins must be a Bins or a BinGrid, got"):
            LDS(value)  # type: ignore[arg-type]
    for value in ([1.0], np.ones(1), None, "abc", 1):
        with pytest.raises(TypeError, match=r"^LDS: labels must be a torch\.Tensor, got .* Use torch\.as_tensor"):
            LDS(bins).fit([1])(value)
    with pytest.raises(ValueError, match=r"^LDS\.fit: the density must be over the same bins, got Bins\.classes\(7\)"):
        LDS(bins).fit(LabelDensity.count([1], Bins.classes(7)))
    with pytest.raises(ValueError, match="labels must hold at least one label"):
        LDS(bins).fit([])
    with pytest.raises(TypeError, match="labels must be an array or an iterable of arrays, got str"):
        LDS(bins).fit("abc")


def test_a_density_too_faint_for_a_finite_weight_is_refused() -> None:
    lds = LDS(Bins.classes(2), kernel=None, scheme="inverse")
    faint = LabelDensity(Bins.classes(2), np.array([1.0, 1e-320]))
    with pytest.raises(ValueError, match=r"^LDS\.fit: every weight must be finite"):
        lds.fit(faint)


def test_a_smoothed_density_is_not_smoothed_again() -> None:
    bins = Bins.uniform(0, 10, width=1)
    density = LabelDensity.count([1.0, 1.0, 5.0], bins).smooth(gaussian(5, 2))
    with pytest.raises(ValueError, match=r"LDS\.fit: the density must not be smoothed.* or kernel=None"):
        LDS(bins).fit(density)
    assert LDS(bins, kernel=None).fit(density).sample_weight([1.0])[0] > 0


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_an_unbounded_axis_weighs_the_bins_of_a_density_beyond_it(outside: Any) -> None:
    labels = np.random.default_rng(0).exponential(8, 3000)
    lds = LDS(Bins(np.arange(21.0), unbounded=True), outside=outside).fit(labels)
    wide = Bins.uniform(0, 100, width=1)
    sums = np.bincount(wide.index(labels), weights=lds.sample_weight(labels), minlength=100)
    np.testing.assert_allclose(LabelDensity.count(labels, wide).weighted(lds).counts, sums, rtol=1e-5)
    assert sums[20:].max() > 0
