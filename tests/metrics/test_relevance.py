from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dir_toolkit import Bins, LabelDensity
from dir_toolkit.metrics import Relevance


def test_the_cubic_is_that_worked_out_by_hand() -> None:
    relevance = Relevance(-4.0, 0.0, 2.0)
    labels = torch.tensor([-9.0, -4.0, -2.0, 0.0, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    assert relevance(labels).tolist() == [1, 1, 0.5, 0, 3 / 16 - 2 / 64, 0.5, 1, 1]


def test_the_ends_are_those_of_a_box_plot_of_the_labels() -> None:
    labels = np.random.default_rng(0).exponential(size=20_000)
    result = Relevance.of(LabelDensity.count(labels, Bins.uniform(0, 20, width=0.01)))
    first, median, third = np.quantile(labels, [0.25, 0.5, 0.75])
    assert result.median == pytest.approx(median, abs=0.01)
    assert result.high == pytest.approx(labels[labels <= third + 1.5 * (third - first)].max(), abs=0.02)
    assert result.low == -math.inf  # no label lies below the whisker
    mirrored = Relevance.of(LabelDensity.count(-labels, Bins.uniform(-20, 0, width=0.01)))
    assert (mirrored.low, mirrored.high) == (pytest.approx(-result.high, abs=0.02), math.inf)


def test_whole_numbers_lie_in_the_middle_of_their_bins() -> None:
    counts = [1, 10, 40, 10, 1, 0, 0, 1]
    result = Relevance.of(LabelDensity(Bins.uniform(0, 8, width=1, integer=True), counts))
    assert result.median == pytest.approx(2, abs=0.05)
    assert result.low < 0.5 < 3.5 < result.high < 4.5
    assert Relevance.of(LabelDensity(Bins.classes(3), [2, 6, 2])).median == 1


def test_a_grid_has_no_relevance() -> None:
    with pytest.raises(ValueError, match=r"^Relevance\.of: density must be over one axis, got <?BinGrid"):
        Relevance.of(LabelDensity(Bins.grid(Bins.classes(2), Bins.classes(2)), [1, 2, 3, 4]))


def test_the_median_between_two_heaps_is_that_of_quantiles() -> None:
    density = LabelDensity(Bins.uniform(0, 10, width=1), [50, *[0] * 8, 50])
    assert Relevance.of(density).median == 1
