from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import laplace, norm, triang
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import Bins
from dir_toolkit.errors import LabelError
from dir_toolkit.labels.soft_labels import limits, soft_labels

AGES = Bins.uniform(0, 117, width=1, integer=True)
YEARS = Bins.uniform(0, 20, width=1)
UNEVEN = Bins.from_edges([-3, -1, 0, 0.1, 4, 20])
AXES = {"ages": AGES, "decades": Bins.uniform(0, 120, width=10, integer=True), "years": YEARS, "uneven": UNEVEN}
# Each of standard deviation one.
KERNELS = {
    "gaussian": norm,
    "laplace": laplace(scale=math.sqrt(0.5)),
    "triangular": triang(c=0.5, loc=-math.sqrt(6), scale=2 * math.sqrt(6)),
}
each_axis = pytest.mark.parametrize("axis", AXES)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def knots(bins: Bins) -> list[float]:
    """Edges, half a unit lower where whole numbers are the labels."""
    whole = bins.centers[0] != (bins.edges[0] + bins.edges[1]) / 2
    return [edge - 0.5 * whole for edge in bins.edges.tolist()]


def naive(label: float, bins: Bins, sigma: float, kernel: str) -> list[float]:
    at = knots(bins)
    label = min(max(label, at[0]), at[-1])
    mass = [
        KERNELS[kernel].cdf((high - label) / sigma) - KERNELS[kernel].cdf((low - label) / sigma)
        for low, high in pairwise(at)
    ]
    return [m / sum(mass) for m in mass]


def labels_on(bins: Bins, n: int = 25) -> Tensor:
    low, high = bins.edges[0], bins.edges[-1]
    share = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([torch.tensor([low, high, bins.centers[1], bins.edges[2]]), low + share * (high - low)])


def test_kernels_of_the_oracle_have_standard_deviation_one_and_differ() -> None:
    assert [k.std() for k in KERNELS.values()] == pytest.approx([1, 1, 1])
    rows = {tuple(naive(26, AGES, 2, kernel)) for kernel in KERNELS}
    assert len(rows) == 3


def test_values_by_hand() -> None:
    # A triangle of half-width 2 about 2: of [1.5, 2.5) 1 - 2 * (1.5 / 2)^2 / 2, and of each neighbour half of the rest
    # but for the (0.5 / 2)^2 / 2 beyond it.
    bins = Bins.uniform(0, 5, width=1, integer=True)
    soft = soft_labels(torch.tensor([2.0]).double(), bins, 2 / math.sqrt(6), kernel="triangular")
    tail = 0.5 * 0.25**2
    middle = 0.5 * 0.75**2
    assert_close(
        soft, torch.tensor([[tail, middle - tail, 1 - 2 * middle, middle - tail, tail]]).double(), atol=1e-15, rtol=0
    )
    # Two bins with a Laplace kernel on the edge between them: half each, whatever their widths.
    soft = soft_labels(torch.tensor(1.0), Bins.from_edges([-50, 1, 200]), 1, kernel="laplace")
    assert_close(soft, torch.tensor([0.5, 0.5]))


@each_axis
@each_kernel
@pytest.mark.parametrize("sigma", [0.05, 0.7, 2, 30])
def test_rows_equal_a_naive_loop(axis: str, kernel: Any, sigma: float) -> None:
    labels = labels_on(AXES[axis])
    expected = torch.tensor([naive(y, AXES[axis], sigma, kernel) for y in labels.tolist()], dtype=torch.float64)
    soft = soft_labels(labels, AXES[axis], sigma, kernel=kernel)
    assert_close(soft, expected, rtol=0, atol=1e-12)
    assert_close(soft_labels(labels.float(), AXES[axis], sigma, kernel=kernel), expected.float(), rtol=0, atol=1e-4)


@each_kernel
def test_a_whole_number_label_is_spread_alike_to_both_sides(kernel: Any) -> None:
    for sigma in (0.3, 1.0, 2.0, 7.0):
        soft = soft_labels(torch.tensor([58]), AGES, sigma, kernel=kernel)[0]
        assert torch.equal(soft[:58].flip(0), soft[59:])  # also far out, where the mass is tiny
        assert soft.argmax() == 58
    assert soft_labels(torch.tensor([58]), AGES, 2)[0, 70] > 0


@each_axis
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_sum_to_one_at_every_width(axis: str, kernel: Any, dtype: torch.dtype) -> None:
    bins = AXES[axis]
    labels = labels_on(bins).to(dtype).clamp(bins.edges[0], bins.edges[-1])
    for sigma in (1e-30, 1e-3, 0.5, 3, 100 * (bins.edges[-1] - bins.edges[0])):
        soft = soft_labels(labels, bins, sigma, kernel=kernel)
        assert soft.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (soft >= 0).all()
        assert_close(soft.sum(-1), torch.ones(len(labels), dtype=soft.dtype))


@pytest.mark.parametrize("sigma", [None, 0, 0.0])
def test_no_width_is_one_hot(sigma: float | None) -> None:
    for bins in (AGES, UNEVEN):
        labels = labels_on(bins)
        hot = torch.nn.functional.one_hot(bins.index(labels), len(bins))
        assert torch.equal(soft_labels(labels, bins, sigma), hot.double())
        assert torch.equal(soft_labels(labels.float(), bins, sigma), hot.float())
    assert soft_labels(torch.tensor([2, 0]), Bins.classes(3), sigma).tolist() == [[0, 0, 1], [1, 0, 0]]


@each_kernel
def test_narrow_kernels_become_one_hot_and_wide_ones_flat(kernel: Any) -> None:
    labels = torch.tensor([0.5, 7.2, 19.9])
    assert_close(soft_labels(labels, YEARS, 1e-4, kernel=kernel), soft_labels(labels, YEARS, None))
    assert_close(
        soft_labels(labels.double(), YEARS, 1990, kernel=kernel), torch.full((3, 20), 0.05).double(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 3, 4)])
def test_any_shape_of_labels(shape: tuple[int, ...]) -> None:
    labels = (torch.arange(math.prod(shape)) * 7 % 117).reshape(shape)
    copy = labels.clone()
    soft = soft_labels(labels, AGES, 2)
    assert soft.shape == (*shape, 117)
    for one, row in zip(labels.flatten(), soft.reshape(-1, 117), strict=True):
        assert torch.equal(soft_labels(one, AGES, 2), row)
    assert torch.equal(labels, copy)


@each_axis
def test_limits_have_the_centres_in_the_middle(axis: str) -> None:
    bins = AXES[axis]
    at = limits(bins, torch.zeros((), dtype=torch.float64))
    assert at.tolist() == pytest.approx(knots(bins))
    assert_close((at[1:] + at[:-1]) / 2, torch.tensor(bins.centers), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.float16, torch.int64):
        assert limits(bins, torch.zeros((), dtype=dtype)).dtype == torch.float32


def test_limits_stay_the_edges_where_moved_ones_would_not_rise() -> None:
    edges = torch.tensor([0.0, 10.0, 11.0, 21.0])
    bins = Bins(edges.numpy(), centers=torch.tensor([9.5, 10.5, 11.5]).numpy())
    assert torch.equal(limits(bins, edges), edges)
    bins = Bins(edges.numpy(), centers=torch.tensor([5.4, 10.5, 15.6]).numpy())
    assert limits(bins, edges).tolist() == pytest.approx([0.4, 10.2, 10.8, 20.6])


def test_labels_off_the_axis_are_refused_by_name_and_place() -> None:
    for sigma in (None, 2.0):
        for value, rule in (
            (117.5, r"must lie on the label axis \[0, 117\], got 117.5"),
            (math.nan, "must not be NaN"),
        ):
            with pytest.raises(LabelError, match=rf"^soft_labels: labels {rule}.* at index \[1\]"):
                soft_labels(torch.tensor([3.0, value]), AGES, sigma)


def test_other_arguments_are_refused_by_name() -> None:
    labels, where = torch.tensor([3.0]), "^soft_labels: "
    with pytest.raises(TypeError, match=where + r"labels must be a torch\.Tensor, got list"):
        soft_labels([3.0], AGES, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=where + "labels must be integers or floats, got dtype torch.bool"):
        soft_labels(labels > 0, AGES, 2)
    with pytest.raises(TypeError, match=where + "bins must be a Bins, got ndarray"):
        soft_labels(labels, AGES.edges, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=where + "kernel must be one of 'gaussian', 'laplace', 'triangular', got 'box"):
        soft_labels(labels, AGES, 2, kernel="box")  # type: ignore[arg-type]
    for value in (-1, math.nan, math.inf, 11701):
        with pytest.raises(ValueError, match=where + rf"sigma must be >= 0 and <= 11700, got {value}"):
            soft_labels(labels, AGES, value)
    with pytest.raises(TypeError, match=where + "sigma must be a number, got '2'"):
        soft_labels(labels, AGES, "2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=where + "sigma must fit into float32"):
        soft_labels(labels, AGES, 1e-50)
    with pytest.raises(
        ValueError, match=where + r"sigma must be None or 0 where bins are classes, .*, got 2\.0\. Smooth classes by"
    ):
        soft_labels(torch.tensor([1]), Bins.classes(3), 2)
    with pytest.raises(LabelError, match=where + "labels must be whole numbers where bins are classes"):
        soft_labels(torch.tensor([1.5]), Bins.classes(3), None)


@pytest.mark.parametrize("sigma", [None, 2.0])
def test_one_graph_that_reads_no_values(sigma: float | None) -> None:
    assert soft_labels(torch.ones(3, device="meta"), AGES, sigma).shape == (3, 117)
    compiled = torch.compile(lambda y: soft_labels(y, AGES, sigma), fullgraph=True, backend="eager")
    labels = torch.tensor([3.0, 26.5])
    assert_close(compiled(labels), soft_labels(labels, AGES, sigma))
    refused = compiled(torch.tensor([3.0, -1.0]))
    assert refused.isnan().all(1).tolist() == [False, True]  # as on accelerators

    class Spread(torch.nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return soft_labels(y, AGES, sigma)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.4 warns of its own nodes
        exported = torch.export.export(Spread(), (labels,), strict=False).module()
    assert_close(exported(labels + 1), soft_labels(labels + 1, AGES, sigma))
