"""What must hold whatever the labels, axes and splits are.

``pytest tests/attack/test_properties.py --mutations 10000`` draws 2,500 other examples of each.
"""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dir_toolkit as dt
from dir_toolkit.features.matrix_moments import BinScatters, SubspaceMoments
from dir_toolkit.features.moments import BinMoments

attack = settings.get_profile("attack")
inside = st.floats(0, 10, allow_subnormal=False)
labels = st.lists(inside, min_size=1, max_size=40)
tenths = st.lists(st.integers(0, 100).map(lambda n: n / 10), min_size=1, max_size=40)
cuts = st.lists(st.integers(0, 40), max_size=4)
counts = st.lists(st.integers(0, 1000), min_size=10, max_size=10)
TEN = dt.Bins.uniform(0, 10, width=1)


@st.composite
def axes(draw: st.DrawFn) -> dt.Bins:
    """Any kind of axis from 0 to 10."""
    if draw(st.booleans()):
        return dt.Bins.uniform(0, 10, count=draw(st.integers(1, 50)))
    between = draw(st.lists(st.floats(0.01, 9.99), max_size=12, unique=True))
    return dt.Bins.from_edges([0.0, *sorted(between), 10.0])


def pieces(values: Any, spot: list[int]) -> list[Any]:
    """The same values in order, cut anywhere, some pieces empty."""
    places = [0, *sorted(min(place, len(values)) for place in spot), len(values)]
    return [values[start:end] for start, end in itertools.pairwise(places)]


@attack
@given(axes(), labels)
def test_a_label_lies_between_the_edges_of_its_bin(bins: dt.Bins, some: list[float]) -> None:
    index = bins.index(some)
    array = np.array(some)
    last = index == len(bins) - 1
    assert (bins.edges[index] <= array).all()
    assert ((array < bins.edges[index + 1]) | (last & (array == 10))).all()
    assert (bins.index(torch.tensor(some, dtype=torch.float64)).numpy() == index).all()
    wide = bins.centers < bins.edges[1:]  # between neighbouring numbers there is no middle
    assert (bins.index(bins.centers) == np.arange(len(bins)))[wide].all()
    assert (bins.index(bins.edges[:-1]) == np.arange(len(bins))).all()


@attack
@given(axes(), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_beyond_the_axis_labels_are_clipped_or_dropped(bins: dt.Bins, some: list[float]) -> None:
    array = np.array(some)
    beyond = (array < 0) | (array > 10)
    assert (bins.index(some, "clip") == bins.index(array.clip(0, 10))).all()
    assert ((bins.index(some, "drop") == -1) == beyond).all()


@attack
@given(axes(), st.integers(0, 2**31))
def test_the_expectation_lies_on_the_axis_and_is_a_plain_sum(bins: dt.Bins, seed: int) -> None:
    shares = torch.rand(3, len(bins), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    expected = bins.expectation(shares)
    assert ((expected >= bins.edges[0]) & (expected <= bins.edges[-1])).all()
    plain = [math.fsum(p * c for p, c in zip(row, bins.centers, strict=True)) for row in shares.tolist()]
    np.testing.assert_allclose(expected.numpy(), plain, rtol=1e-12)


@attack
@given(labels, st.integers(1, 10))
def test_quantile_bins_hold_every_label_they_were_made_of(some: list[float], n: int) -> None:
    some = [*some, 0.0, 10.0]
    bins = dt.Bins.quantile(some, n)
    assert 1 <= len(bins) <= n
    assert (bins.index(some) >= 0).all()


@attack
@given(axes(), axes(), labels)
def test_a_joint_bin_is_the_pair_of_bins(one: dt.Bins, two: dt.Bins, some: list[float]) -> None:
    pairs = np.stack([some, some[::-1]], -1)
    index = dt.Bins.grid(one, two).index(pairs)
    assert (index == one.index(pairs[:, 0]) * len(two) + two.index(pairs[:, 1])).all()


@attack
@given(axes(), labels, cuts, st.randoms(use_true_random=False))
def test_counting_in_pieces_in_any_order_and_merging_is_counting(
    bins: dt.Bins, some: list[float], spot: list[int], chance: Any
) -> None:
    whole = dt.LabelDensity.count(some, bins)
    split = [part for part in pieces(some, spot) if part]
    assert dt.LabelDensity.count((np.array(part) for part in split), bins) == whole
    chance.shuffle(split)
    merged = [dt.LabelDensity.count(part, bins) for part in split]
    assert reduce(lambda a, b: a + b, merged) == whole
    assert reduce(lambda a, b: b + a, reversed(merged)) == whole
    assert whole.counts.sum() == len(some)


@attack
@given(counts, st.sampled_from([1, 3, 5, 7, 9]), st.floats(0.1, 10))
def test_reflected_smoothing_keeps_the_total_and_zero_edges_never_add(some: list[int], size: int, sigma: float) -> None:
    density = dt.LabelDensity(TEN, np.array(some))
    kernels = [dt.gaussian(size, sigma), dt.triangular(size), dt.laplace(size, sigma)]
    for kernel in kernels:
        assert (kernel == kernel[::-1]).all()
        assert kernel[size // 2] == kernel.max() == 1
        smooth = density.smooth(kernel)
        np.testing.assert_allclose(smooth.counts.sum(), sum(some), rtol=1e-12)
        assert density.smooth(kernel, edges="zero").counts.sum() <= sum(some) * (1 + 1e-12)
        padded = np.pad(np.array(some, dtype=float), size // 2, mode="symmetric")
        np.testing.assert_allclose(smooth.counts, np.convolve(padded, kernel / kernel.sum(), "valid"), atol=1e-9)


@attack
@given(labels, st.sampled_from(["inverse", "sqrt_inverse"]), st.floats(0.5, 3))
def test_weights_average_one_and_fall_with_the_density(some: list[float], scheme: Any, sigma: float) -> None:
    kernel = dt.gaussian(5, sigma)
    lds = dt.LDS(TEN, kernel=kernel, scheme=scheme).fit(some)
    weight = lds(torch.tensor(some, dtype=torch.float64)).double().numpy()
    np.testing.assert_allclose(weight.mean(), 1, rtol=1e-5)
    smooth = dt.LabelDensity.count(some, TEN).smooth(kernel).counts[TEN.index(some)]
    plain = smooth ** (-1.0 if scheme == "inverse" else -0.5)
    np.testing.assert_allclose(weight, plain / plain.mean(), rtol=1e-5)


@attack
@given(st.integers(1, 40), cuts, st.integers(0, 2**31), st.sampled_from([0.0, 1e4]), st.randoms(use_true_random=False))
def test_moments_in_any_split_are_those_of_one_pass(
    n: int, spot: list[int], seed: int, shift: float, chance: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 2, generator=generator, dtype=torch.float64) + shift
    index = torch.randint(-1, 4, (n,), generator=generator)
    streamed, parts = BinMoments(4, 2), []
    for part in pieces(torch.arange(n), spot):
        streamed.update(features[part], index[part])
        parts.append(BinMoments(4, 2))
        parts[-1].update(features[part], index[part])
    chance.shuffle(parts)
    merged = reduce(lambda a, b: a.merge(b), parts, BinMoments(4, 2))
    for result in (streamed, merged):
        for b in range(4):
            mine = features[index == b].numpy()
            assert result.count[b] == len(mine)
            if len(mine):
                np.testing.assert_allclose(result.mean[b], mine.mean(0), rtol=1e-12, atol=1e-12)
            if len(mine) > 1:
                np.testing.assert_allclose(result.variance()[b], mine.var(0, ddof=1), rtol=1e-7, atol=1e-12)


@attack
@given(st.integers(1, 40), cuts, st.integers(0, 2**31), st.sampled_from([0.0, 1e4]), st.randoms(use_true_random=False))
def test_scatters_in_any_split_are_those_of_one_pass_also_within_a_subspace(
    n: int, spot: list[int], seed: int, shift: float, chance: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64) + shift
    index = torch.randint(-1, 4, (n,), generator=generator)
    basis = torch.linalg.qr(torch.randn(3, 2, generator=generator, dtype=torch.float64))[0]
    streamed, subspace, parts = BinScatters(4, 3), SubspaceMoments(4, 3, 2, basis=basis), []
    for part in pieces(torch.arange(n), spot):
        streamed.update(features[part], index[part])
        subspace.update(features[part], index[part])
        parts.append(BinScatters(4, 3))
        parts[-1].update(features[part], index[part])
    chance.shuffle(parts)
    merged = reduce(lambda a, b: a.merge(b), parts, BinScatters(4, 3))
    subspace.all_reduce()  # takes in the batches that are held
    along, pooled = basis.numpy(), np.zeros((3, 3))
    for b in range(4):
        mine = features[index == b].numpy()
        own = np.cov(mine.T, bias=True) * len(mine) if len(mine) else np.zeros((3, 3))
        pooled += own
        for result in (streamed.settle(), merged):
            assert result.count[b] == len(mine)
            np.testing.assert_allclose(result.deviations[b], own, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(subspace.within.deviations[b], along.T @ own @ along, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(subspace.pooled_scatter(), pooled, rtol=1e-7, atol=1e-7 * max(1.0, shift))


def assert_close(one: Any, two: Any) -> None:
    for name in one.data_vars:
        atol = 1e-4 if name == "pearson" else 1e-9  # of sums over the axis, where a few values hardly differ
        np.testing.assert_allclose(one[name].values, two[name].values, rtol=1e-9, atol=atol, err_msg=str(name))


@attack
@given(tenths, cuts, st.integers(0, 2**31))
def test_regression_metrics_do_not_know_batches_or_order(some: list[float], spot: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.tensor(some, dtype=torch.float64)
    pred = target + torch.randn(len(some), generator=generator, dtype=torch.float64)
    density = dt.LabelDensity.count(some, TEN)
    whole = dt.regression_metrics(pred, target, density)
    order = torch.randperm(len(some), generator=generator)
    metrics = dt.RegressionMetrics(density)
    for part in pieces(order, spot):
        if len(part):
            other = metrics.fresh()
            other.update(pred[part], target[part])
            metrics.merge(other)
    assert_close(metrics.compute(), whole)
    np.testing.assert_allclose(whole["mae"].sel(region="all"), (pred - target).abs().mean(), rtol=1e-12)


@attack
@given(st.integers(1, 40), cuts, st.integers(0, 2**31))
def test_classification_metrics_do_not_know_batches_or_order(n: int, spot: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bins = dt.Bins.classes(5)
    pred, target = torch.randint(0, 5, (2, n), generator=generator)
    density = dt.LabelDensity.count(target, bins)
    whole = dt.classification_metrics(pred, target, density)
    metrics = dt.ClassificationMetrics(density)
    for part in pieces(torch.randperm(n, generator=generator), spot):
        other = metrics.fresh()
        other.update(pred[part], target[part])
        metrics.merge(other)
    assert_close(metrics.compute(), whole)
    np.testing.assert_allclose(whole["error"].sel(region="all"), (pred != target).double().mean(), rtol=1e-12)


@attack
@given(st.integers(1, 40), cuts, st.integers(0, 2**31), st.integers(1, 20))
def test_calibration_metrics_do_not_know_batches_or_order(n: int, spot: list[int], seed: int, num_bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = (3 * torch.randn(n, 4, generator=generator, dtype=torch.float64)).softmax(1)
    target = torch.randint(0, 4, (n,), generator=generator)
    weight = torch.randint(1, 4, (n,), generator=generator).double()
    whole = dt.metrics.calibration_metrics(shares, target, weight=weight, num_bins=num_bins)
    metrics = dt.metrics.CalibrationMetrics(4, num_bins=num_bins)
    for part in pieces(torch.randperm(n, generator=generator), spot):
        other = metrics.fresh()
        other.update(shares[part], target[part], weight[part])
        metrics.merge(other)
    assert_close(metrics.compute(), whole)
    often = weight.long()  # weight two is a sample seen twice
    seen = dt.metrics.calibration_metrics(
        shares.repeat_interleave(often, 0), target.repeat_interleave(often), num_bins=num_bins
    )
    assert_close(seen, whole)
