from __future__ import annotations

import numpy as np
import pytest

from dir_toolkit import Bins, LabelDensity


def density(counts: list[int]) -> LabelDensity:
    return LabelDensity(Bins.uniform(0, len(counts), width=1), counts)


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    result = density([200, 50, 0, 10]).describe()  # too few bins to be smoothed
    numbers = (result.labels, result.bins, result.per_bin, result.empty, result.gap, result.ratio)
    assert numbers == (260, 4, 50, 1, 1, 20)
    assert result.effective == pytest.approx(9 / (1 / 200 + 1 / 50 + 1 / 10))
    assert result.regions == {"many": 1, "medium": 1, "few": 1, "unseen": 1}
    assert result.why is None


def test_uneven_bins_are_compared_per_label_unit() -> None:
    result = LabelDensity(Bins.from_edges([0, 1, 11]), [10, 100]).describe()
    assert result.ratio == 1
    assert result.effective == pytest.approx(110)
    assert result.advice[0] == "Labels are nearly uniform over the axis: plain training is enough."


def test_an_even_spread_is_said_to_be_of_the_bins_that_hold_labels() -> None:
    result = LabelDensity(Bins.uniform(0, 4, width=1), [50, 50, 0, 0]).describe()
    assert result.advice[0] == "Labels are nearly uniform over the bins that hold any: plain training is enough."


def test_a_long_tail_is_weighed_and_scored() -> None:
    tail = np.repeat(np.arange(60), 2000 // (np.arange(60) + 1))
    result = LabelDensity.count(tail, Bins.auto(tail)).describe()
    assert repr(result) == str(result)
    assert f"axis              {len(tail):,} whole numbers from 0 to 59" in str(result)
    assert "- Weight the loss by LDS(bins).fit(labels)" in str(result)
    assert "- Or predict a distribution over bins, LongTailModel(..., bins)" in str(result)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([900] * 5 + [1] * 5, 'Avoid scheme="inverse", or bound it by clip=: a few rare labels would dominate'),
        ([90, 50, 20, 9, 4, 1], "No bin has more than 100 labels: regions(relative=True)"),
        ([3, 2, 1], "Bins hold few labels: use wider bins, or collect more labels."),
        ([20] * 60 + [0] * 6 + [5], "Widen the kernel to bridge empty bins: gaussian(7, 2.8)."),
        ([20] * 20 + [0] * 40 + [5], "No kernel bridges so many empty bins: make bins wider where labels are rare"),
        ([500] + [9] * 20, "74% of the labels lie in one of 21 bins, from 0 to 1: unless they are equal, use narrower"),
    ],
)
def test_the_advice_fits_the_counts(counts: list[int], sentence: str) -> None:
    assert sentence in str(density(counts).describe())


def test_classes_and_grids_have_no_gaps() -> None:
    for bins in (Bins.classes(6), Bins.grid(Bins.classes(2), Bins.uniform(0, 3, width=1))):
        result = LabelDensity(bins, [500, 0, 0, 0, 0, 9]).describe()
        assert result.gap == 0
        assert "predict under a uniform one" in str(result)


def test_there_must_be_a_label() -> None:
    with pytest.raises(ValueError, match=r"^LabelDensity\.describe: at least one label must have been counted"):
        density([0, 0]).describe()
