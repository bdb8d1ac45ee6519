from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dir_toolkit import Bins, LabelDensity
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.metrics import IntervalMetrics, interval_metrics
from dir_toolkit.metrics._declared import METRICS

BINS = Bins.uniform(0, 4, width=1)
DENSITY = LabelDensity(BINS, [500, 60, 40, 5])


def drawn(samples: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target, near, far = (4 * torch.rand(samples, generator=generator, dtype=torch.float64) for _ in range(3))
    return [torch.minimum(near, far), torch.maximum(near, far), target]


def test_coverage_and_width_are_those_of_a_loop() -> None:
    lower, upper, target = drawn()
    result = interval_metrics(lower, upper, target, DENSITY)
    regions = DENSITY.regions()[BINS.index(target.numpy())]
    for region in ("all", "many", "medium", "few"):
        own = [i for i in range(200) if region in ("all", regions[i])]
        held = [float(lower[i] <= target[i] <= upper[i]) for i in own]
        assert result.coverage.sel(region=region).item() == pytest.approx(np.mean(held), abs=1e-12)
        widths = [float(upper[i] - lower[i]) for i in own]
        assert result.width.sel(region=region).item() == pytest.approx(np.mean(widths), abs=1e-12)
    assert result.coverage.sel(region="unseen").isnull()
    assert METRICS["bin_coverage"].title == "coverage"
    assert result.bin_width.attrs["units"] == "label"


def test_batches_and_objects_merge() -> None:
    whole, first, second = (IntervalMetrics(DENSITY) for _ in range(3))
    parts = drawn()
    whole.update(*parts)
    for metrics, rows in ((first, slice(70)), (second, slice(70, 90)), (second, slice(90, None))):
        metrics.update(*(part[rows].tolist() for part in parts))
    torch.testing.assert_close(first.merge(second).sums, whole.sums, rtol=1e-12, atol=1e-12)


def test_ends_count_as_inside_and_infinite_ones_as_the_end_of_the_axis() -> None:
    lower = torch.tensor([1.0, -math.inf, 3.0, -math.inf, 5.0])
    upper = torch.tensor([2.0, 3.0, math.inf, -1.0, math.inf])
    metrics = IntervalMetrics(DENSITY)
    metrics.update(lower, upper, torch.tensor([1.5, 1.0, 3.5, 0.5, 2.5]))
    np.testing.assert_array_equal(metrics.compute().bin_width, [0, 2, 0, 1])
    np.testing.assert_array_equal(metrics.compute().bin_coverage, [0, 1, 0, 1])
    at_ends = interval_metrics([1.0, 2.0], [2.0, 3.0], [2.0, 2.0], DENSITY)
    assert at_ends.coverage.sel(region="all") == 1


def test_an_interval_of_two_infinite_ends_that_are_equal_has_no_width() -> None:
    ends = torch.tensor([math.inf, -math.inf, 2.0])
    result = interval_metrics(ends, ends, [2.0, 2.0, 2.0], DENSITY).sel(region="all")
    assert result.width == 0
    assert result.coverage == pytest.approx(1 / 3)


def test_targets_beyond_the_axis_follow_outside() -> None:
    clipped, dropped = (
        interval_metrics([0.0, 0.0], [1.0, 9.0], [0.5, 7.0], DENSITY, outside=outside) for outside in ("clip", "drop")
    )
    assert clipped.bin_coverage.values[3] == 1
    assert dropped["count"].sel(region="all") == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], [1.0], [9.0]), LabelError, r"target must lie on the label axis \[0, 4\]"),
        (([0.0], [1.0], [math.nan]), LabelError, "target must not be NaN"),
        (([math.nan], [1.0], [1.0]), ValueError, r"lower must be finite, got nan at index \[0\]"),
        (([0.0], [math.nan], [1.0]), ValueError, "upper must be finite, got nan"),
        (
            ([0.0, 2.0], [1.0, 1.5], [1.0, 1.0]),
            ValueError,
            r"lower must not exceed upper, got 2 and 1.5 at index \[1\]",
        ),
        (([0.0], [1.0], [1.0, 2.0]), ShapeError, "lower and target must have the same shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    metrics = IntervalMetrics(DENSITY)
    with pytest.raises(error, match=rf"^IntervalMetrics\.update: {message}"):
        metrics.update(*arguments)
    assert not metrics.sums.any()


@pytest.mark.usefixtures("unread")
def test_where_values_are_not_looked_at_a_broken_interval_makes_the_width_nan() -> None:
    metrics = IntervalMetrics(DENSITY)
    metrics.update(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.5, 3.5]))
    result = metrics.compute()
    np.testing.assert_array_equal(result.bin_width, [math.nan, math.nan, math.nan, 1])
    assert result["count"].sel(region="all") == 2


def test_a_label_on_an_end_is_covered_whatever_the_precision_of_either() -> None:
    labels = np.array([0.1, 0.3, 1.6, 3.7])
    given = (labels, labels.astype(np.float32), torch.tensor(labels), torch.tensor(labels).float())
    for ends in given:
        for target in given:
            assert interval_metrics(ends, ends, target, DENSITY)["coverage"].sel(region="all") == 1
    whole = np.array([0, 1, 3])
    assert interval_metrics(whole, whole, whole.astype(np.float32), DENSITY)["coverage"].sel(region="all") == 1
    wide = LabelDensity(Bins.uniform(0, 1e5, count=2), [5, 5])
    half = torch.zeros(1, dtype=torch.float16)  # which ends at 65,504
    assert interval_metrics(half, np.array([8e4]), np.array([9e4]), wide)["coverage"].sel(region="all") == 0
    assert interval_metrics(half, np.array([9e4]), np.array([9e4]), wide)["coverage"].sel(region="all") == 1
    above = np.nextafter(labels, 9)
    assert interval_metrics(above, above, labels, DENSITY)["coverage"].sel(region="all") == 0
