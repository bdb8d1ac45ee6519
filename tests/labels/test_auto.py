from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dir_toolkit as dt
from dir_toolkit import Bins, LabelDensity, decode, soft_labels
from dir_toolkit.errors import LabelError

RANDOM = np.random.default_rng(0)
RAIN = np.where(RANDOM.random(3000) < 0.3, 0.0, RANDOM.gamma(0.4, 20, 3000).round(1))
PRICES = RANDOM.lognormal(11, 1.2, 2000).round()
RETURNS = RANDOM.standard_t(3, 3000) / 100


def all_held(labels: Any) -> Bins:
    """The axis for labels, in none of whose spare bins one lies."""
    bins = Bins.auto(labels)
    counts = bins.tally(np.asarray(labels))
    assert bins.unbounded
    assert counts[[0, -1]].tolist() == [0, 0]
    assert counts[1] > 0 < counts[-2]
    return bins


def test_whole_numbers_have_a_bin_each() -> None:
    ages = RANDOM.integers(1, 90, 1000)
    bins = all_held(ages)
    np.testing.assert_array_equal(bins.edges, np.arange(ages.min() - 1, ages.max() + 3) - 0.5)
    assert bins.why == (
        f"1,000 whole numbers from {ages.min()} to {ages.max()}: {len(bins)} bins of 1, "
        "of which the first and the last are spare."
    )
    few = all_held(ages[:100])  # too few labels for a bin per year
    np.testing.assert_array_equal(np.diff(few.edges), 10)
    np.testing.assert_array_equal(few.centers % 10, 0)


def test_labels_in_steps_have_a_bin_per_step() -> None:
    similarity = RANDOM.integers(0, 26, 400) * 0.2
    for labels in (similarity, similarity.astype(np.float32)):
        bins = all_held(labels)
        np.testing.assert_array_equal(bins.edges, [round(0.2 * k - 0.3, 1) for k in range(29)])
        assert "multiples of 0.2 from 0 to 5: 28 bins of 0.2" in str(bins.why)
    assert "multiples of 10 from" in str(all_held(10 * RANDOM.geometric(0.1, 2000)).why)
    np.testing.assert_allclose(all_held([0.3, 0.7] * 9).edges, [-0.3, 0.1, 0.5, 0.9, 1.3])
    np.testing.assert_array_equal(Bins.auto([0.5, 2.5, 1.5] * 9).centers, [-0.5, 0.5, 1.5, 2.5, 3.5])


def test_even_bins_are_round_and_follow_number_and_spread() -> None:
    few, many = (all_held(RANDOM.normal(0, 1, n)) for n in (300, 30000))
    assert (np.diff(few.edges).round(9) == 0.2).all()
    assert (np.diff(many.edges).round(9) == 0.05).all()
    assert few.edges[0] == round(few.edges[0], 1)
    assert 0.0 in few.centers.round(12)
    assert len(Bins.auto(RANDOM.random(10**5))) <= 203
    assert 9 <= len(Bins.auto(RANDOM.random(12))) <= 15


def test_a_long_tail_of_positive_labels_makes_bins_even_in_the_logarithm() -> None:
    bins = all_held(PRICES + 0.25)
    ratios = bins.edges[1:] / bins.edges[:-1]
    np.testing.assert_allclose(ratios, ratios[0])
    assert "even in the logarithm since a tail is long" in str(bins.why)
    assert LabelDensity.count(PRICES, bins).counts.max() < 0.1 * len(PRICES)


@pytest.mark.parametrize(("start", "length"), [(1e6, 1), (1.7e9, 5000), (1e12, 3e6)])
def test_the_rounding_of_float32_is_no_step_of_the_labels(start: float, length: float) -> None:
    labels = (start + length * RANDOM.random(3000)).astype(np.float32)
    different = np.unique(labels)
    bins = all_held(labels)
    assert "multiples" not in str(bins.why)
    assert (LabelDensity.count(labels, bins).counts[1:-1] > 0).all()
    assert np.diff(bins.edges).min() >= np.diff(different).min()
    low, high = re.findall(r"from (\S+) to (\S+):", str(bins.why))[0]
    assert float(high) - float(low) == pytest.approx(np.ptp(different), rel=0.02)


def test_steps_and_outliers_of_float32_are_those_of_the_labels() -> None:
    mistyped = Bins.auto(np.append(np.arange(18, 90, dtype=np.float32).repeat(9), [np.float32(1e30)]))
    assert "whole numbers from 18 to 89: 74 bins of 1," in str(mistyped.why)
    tenths = (1e6 + RANDOM.integers(0, 50, 3000) / 10).astype(np.float32)
    assert "multiples of 0.1 from 1000000 to 1000004.9" in str(Bins.auto(tenths).why)
    half = torch.linspace(1000, 1300, 2000).bfloat16()  # 4 apart up to 1024, and 8 beyond
    assert np.diff(Bins.auto(half).edges).min() >= 8
    for ulps in (1, 3):  # of float64, where nothing is rounded
        fine = 1 + 2.0**-52 * ulps * np.arange(20)
        assert f"multiples of {2.0**-52 * ulps:g}"[:18] in str(Bins.auto(np.repeat(fine, 9)).why)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_few_values_side_by_side_in_their_dtype_make_an_axis(dtype: Any) -> None:
    for start in (1.0, 3.0, -590322.9, 1e12, 1e-5):
        if dtype == np.float16 and not 1e-4 < abs(start) < 6e4:
            continue
        # Edges are float64, in which there is nothing between two of its own.
        steps = np.arange(6) * (8 if dtype == np.float64 else 1)
        values = (dtype(start) + steps * np.spacing(np.abs(dtype(start)))).astype(dtype)
        for count in range(2, 7):
            for repeats in (1, 50, 1000):
                bins = Bins.auto(np.repeat(values[:count], repeats))
                assert 3 <= len(bins) <= 203


def test_a_pile_of_zeros_has_a_bin_that_is_symmetric_about_it() -> None:
    bins = all_held(RAIN)
    assert "% of them 0" in str(bins.why)
    assert "signed logarithm asinh((y - 0)/" in str(bins.why)
    low, high = bins.edges[bins.index([0.0])[0] :][:2]
    assert -low == pytest.approx(high)
    assert high < 0.5


def test_one_label_is_no_pile() -> None:
    """Of ten labels or fewer each is a tenth."""
    few = [0.0, 0.3, 1.7, 2.9, 3.1, 4.4, 5.2, 6.9]
    assert "of them" not in str(Bins.auto(few).why)
    assert "22% of them 0" in str(Bins.auto([0.0, *few]).why)


def test_tails_on_both_sides_are_shortened_alike() -> None:
    bins = all_held(np.concatenate([RETURNS, -RETURNS]))
    np.testing.assert_allclose(bins.edges, -bins.edges[::-1], atol=1e-12)
    assert np.diff(bins.edges).min() < np.ptp(RETURNS) / 200


def test_counts_with_a_long_tail_have_edges_between_whole_numbers() -> None:
    bins = all_held(RANDOM.negative_binomial(0.3, 0.002, 2000))
    np.testing.assert_array_equal(bins.edges % 1, 0.5)
    assert np.diff(bins.edges).min() <= 3
    assert np.diff(bins.edges).max() > 50


@pytest.mark.parametrize("typo", [999, -1e30, 3e38])
def test_mistyped_labels_count_in_the_end_bins_and_leave_the_axis_as_it_is(typo: float) -> None:
    ages = np.append(RANDOM.integers(18, 90, 600), [18, 89])
    clean, mistyped = Bins.auto(ages), Bins.auto(np.append(ages, [typo, typo]))
    assert mistyped == clean
    assert f"2 far off, such as {typo:.6g}, count in the end bins: look for mistyped ones." in str(mistyped.why)
    assert (mistyped.relative_widths == 1).all()
    density = LabelDensity.count(np.append(ages, typo), mistyped)
    assert density.counts[-1 if typo > 0 else 0] == 1
    weights = dt.LDS(mistyped).fit(density)(torch.tensor([typo], dtype=torch.float64))
    assert weights.isfinite().all()


def test_rare_labels_are_not_taken_for_mistyped_ones() -> None:
    claims = np.where(RANDOM.random(5000) < 0.98, 0.0, RANDOM.uniform(1000, 1100, 5000))
    assert "far off" not in str(all_held(claims).why)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_distant_value_that_several_labels_share_is_no_outlier(value: float) -> None:
    labels = 2 + RANDOM.random(1000)
    bins = all_held(np.append(labels, [value] * 5))
    assert (bins.relative_widths == 1).all()
    text = f"{value:g} lies apart and is no outlier, since several labels share it: drop it if it is a code."
    assert text in str(bins.why)
    density = LabelDensity.count(np.append(labels, [value] * 5), bins)
    apart = density.smooth().counts[bins.index([value])[0]]  # no common label is in reach of its window
    assert apart <= 5
    for rare in ([value] * 4, [value, value / 2 + 0.1] * 2):  # is mistyped, or is several values
        assert Bins.auto(np.append(labels, rare)) == Bins.auto(labels)


def test_a_shared_value_far_beyond_the_others_stays_an_outlier() -> None:
    labels = RANDOM.random(1000)
    bins = Bins.auto(np.append(labels, [-999.0] * 20))
    assert bins == Bins.auto(labels)
    assert "20 far off, such as -999, count in the end bins" in str(bins.why)
    both = Bins.auto(np.concatenate([labels, [-999.0], [-3.0] * 8]))
    assert "-3 lies apart" in str(both.why)
    assert "1 far off, such as -999" in str(both.why)


def test_codes_that_the_axis_reaches_are_named_also_where_bins_are_even_in_a_logarithm() -> None:
    said = "lies apart and is no outlier, since several labels share it"
    whole, spread = np.arange(2000.0) % 1001, RANDOM.gamma(2, 10, 2000)
    assert f"-999 {said}" in str(Bins.auto(np.append(whole, [-999] * 20)).why)
    assert f" 400 {said}" in str(Bins.auto(np.append(spread, [400] * 5)).why)
    for few in (2, 4):  # too few for a bin of their own, and still on the axis
        assert f"-700 {said}" in str(Bins.auto(np.append(whole, [-700] * few)).why)
    both = str(Bins.auto(np.concatenate([whole, [-999] * 20, [9999] * 20])).why)
    assert f" -999 {said}" in both
    assert f" 9999 {said}" in both
    mistyped = str(Bins.auto(np.concatenate([RANDOM.random(1000), [4.0] * 8, [-2.9]])).why)
    assert f" 4 {said}" in mistyped
    assert f"-2.9 {said}" not in mistyped
    for labels in (whole, spread, np.append(np.arange(2000) % 5, [8] * 9)):
        assert said not in str(Bins.auto(labels).why)


def test_labels_at_the_ends_decode_to_themselves() -> None:
    labels = torch.tensor(PRICES)
    bins = Bins.auto(labels)
    ends = torch.stack([labels.min(), labels.max()])
    soft = soft_labels(ends, bins, 2.0, unit="bin", ends="open")
    slack = torch.tensor(np.diff(bins.edges)[bins.index(ends)])
    assert ((decode(soft, bins, "median", ends="open") - ends).abs() < slack).all()


def test_the_axis_is_free_of_the_unit() -> None:
    for labels in (RANDOM.normal(size=500), PRICES, RAIN, RETURNS):
        one, other = Bins.auto(labels), Bins.auto(labels * 1e5)
        np.testing.assert_allclose(other.edges, one.edges * 1e5, rtol=1e-9, atol=1e-9)


def test_labels_of_any_dtype_and_container() -> None:
    ages = RANDOM.integers(18, 90, 600)
    expected = Bins.auto(ages)
    for same in (ages.tolist(), torch.tensor(ages), torch.tensor(ages).half(), ages.astype(np.float16)[:, None]):
        assert Bins.auto(same) == expected
    for same in (pd.Series(ages, dtype="Int64"), pd.Series(ages, dtype="category").astype(float), ages.astype(">f4")):
        assert Bins.auto(same) == expected
    extremes = np.array([1e-30, 3e38, 1, 2, 3] * 5, np.float32)
    assert Bins.auto(extremes).tally(extremes).sum() == 25


def test_new_labels_beyond_the_axis_fall_into_the_end_bins() -> None:
    bins = Bins.auto(np.arange(100))
    for outside in ("raise", "clip", "drop"):
        assert bins.index(torch.tensor([-50.0, 1e9]), outside).tolist() == [0, len(bins) - 1]
        assert bins.tally([-50.0, 1e9], outside).sum() == 2
    with pytest.raises(LabelError, match=r"Bins\.index: labels must not be NaN"):
        bins.index([np.nan])
    assert Bins.from_dict(bins.to_dict()) == bins != Bins(bins.edges)
    for other in (copy.deepcopy(bins), pickle.loads(pickle.dumps(bins))):
        assert other == bins
        assert other.why == bins.why


def test_a_model_clips_labels_beyond_an_unbounded_axis() -> None:
    bins = Bins.auto(np.arange(100.0))
    model = dt.LongTailModel(torch.nn.Identity(), 2, bins)
    at_end, beyond = (model(torch.ones(1, 2), torch.tensor([y])).loss for y in (float(bins.edges[-1]), 1e30))
    assert at_end == beyond


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1.0, np.nan, np.inf, 2.0], LabelError, r"finite, got nan at index \[1\] \(2 such labels\)\. Remove these"),
        ([3.0], ValueError, "at least two different values, got only 3"),
        ([0.1] * 9, ValueError, r"at least two different values, got only 0\.1"),
        ([], ValueError, "at least one value"),
        (["old", "young"], TypeError, "integers or floats, got dtype <U5"),
        ([True, False], TypeError, "integers or floats, got dtype bool"),
    ],
)
def test_labels_that_make_no_axis_are_refused(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^Bins\.auto: labels must (be|hold) " + message):
        Bins.auto(labels)


def test_float32_labels_get_the_axis_of_their_decimals() -> None:
    labels = np.random.default_rng(1).uniform(900, 915, 3000).round(1)
    assert Bins.auto(labels.astype(np.float32)) == Bins.auto(labels)


def test_an_unbounded_axis_has_no_bin_for_infinity() -> None:
    bins = Bins.auto(np.random.default_rng(0).random(500))
    assert bins.index(torch.tensor([-9.0, 9.0])).tolist() == [0, len(bins) - 1]
    for infinite in (-math.inf, math.inf):
        with pytest.raises(LabelError, match="labels must lie"):
            bins.index(torch.tensor([0.5, infinite]))
