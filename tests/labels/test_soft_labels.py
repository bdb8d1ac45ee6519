from __future__ import annotations

import importlib
import math
import warnings
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import laplace, norm, triang
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import Bins
from dir_toolkit.errors import LabelError
from dir_toolkit.labels.decoding import decode, interval, quantiles
from dir_toolkit.labels.soft_labels import limits, soft_labels, spread_counts

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
    """The kernel, cut off on both sides as far away as the nearer end is, or within the end bin."""
    place = knots(bins)
    label = min(max(label, (place[0] + place[1]) / 2), (place[-2] + place[-1]) / 2)
    reach = min(label - place[0], place[-1] - label)
    cdf = KERNELS[kernel].cdf([min(max(k - label, -reach), reach) / sigma for k in place])
    mass = [high - low for low, high in pairwise(cdf)]
    return [m / sum(mass) for m in mass]


def labels_on(bins: Bins, n: int = 25) -> Tensor:
    low, high = bins.edges[0], bins.edges[-1]
    share = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([torch.tensor([low, high, bins.centers[1], bins.edges[2]]), low + share * (high - low)])


def test_kernels_of_the_oracle_have_standard_deviation_one_and_differ() -> None:
    assert [k.std() for k in KERNELS.values()] == pytest.approx([1, 1, 1])
    rows = {tuple(naive(26, AGES, 2, kernel)) for kernel in KERNELS}
    assert len(rows) == 3


def test_values_are_those_worked_out_by_hand() -> None:
    # A triangle of half-width 2 about 2: of [1.5, 2.5) 1 - 2 * (1.5 / 2)^2 / 2, and of each neighbour half of the rest
    # but for the (0.5 / 2)^2 / 2 beyond it.
    bins = Bins.uniform(0, 5, width=1, integer=True)
    soft = soft_labels(torch.tensor([2.0]).double(), bins, 2 / math.sqrt(6), kernel="triangular")
    tail = 0.5 * 0.25**2
    middle = 0.5 * 0.75**2
    assert_close(
        soft, torch.tensor([[tail, middle - tail, 1 - 2 * middle, middle - tail, tail]]).double(), atol=1e-15, rtol=0
    )
    # The nearer end of the axis cuts the kernel off on both sides: half of label 1 is in [0, 1) and half in [1, 2).
    soft = soft_labels(torch.tensor([1.0, 0.5, 0.0]), Bins.uniform(0, 5, width=1), 2)
    assert_close(soft, torch.tensor([[0.5, 0.5, 0, 0, 0], [1.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]]))
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
def test_rows_sum_to_one_at_every_width(axis: str, kernel: Any) -> None:
    bins = AXES[axis]
    sigmas = (1e-30, 1e-3, 0.5, 3, 100 * (bins.edges[-1] - bins.edges[0]))
    for dtype, sigma in product((torch.float64, torch.float32, torch.float16, torch.bfloat16), sigmas):
        labels = labels_on(bins).to(dtype).clamp(bins.edges[0], bins.edges[-1])
        soft = soft_labels(labels, bins, sigma, kernel=kernel)
        assert soft.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (soft >= 0).all()
        assert_close(soft.sum(-1), torch.ones(len(labels), dtype=soft.dtype))


@pytest.mark.parametrize("sigma", [None, 0, 0.0])
def test_labels_without_width_are_one_hot(sigma: float | None) -> None:
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
    middle, near = torch.tensor(10.0).double(), torch.tensor(2.0).double()
    assert_close(soft_labels(middle, YEARS, 1990, kernel=kernel), torch.full((20,), 0.05).double(), rtol=0.02, atol=0)
    flat = torch.tensor([0.25] * 4 + [0.0] * 16).double()  # as far to one side as to the other
    assert_close(soft_labels(near, YEARS, 1990, kernel=kernel), flat, rtol=0.02, atol=0)


@each_kernel
@pytest.mark.parametrize("sigma", [0.3, 2, 7, 100])
def test_a_soft_label_decodes_to_its_label_up_to_the_ends(kernel: Any, sigma: float) -> None:
    labels = torch.linspace(0, 20, 201, dtype=torch.float64)
    soft = soft_labels(labels, YEARS, sigma, kernel=kernel)
    reached = labels.clamp(0.5, 19.5)  # what a distribution over bins that end with the axis can stand for
    edges = torch.arange(1, 20).double() * 10
    for point in ("median", "expectation"):
        result = decode(soft, YEARS, point)  # type: ignore[arg-type]
        assert_close(result[edges.long()], reached[edges.long()], rtol=0, atol=1e-9)
        # Between edges a bin's mass is taken to lie evenly in it, which a kernel narrower than the bin does not.
        assert (result - reached).abs().max() < (0.25 if sigma < 1 else 0.13)
    whole = torch.arange(118).double()
    for point in ("median", "expectation"):
        result = decode(soft_labels(whole, AGES, sigma, kernel=kernel), AGES, point)  # type: ignore[arg-type]
        assert_close(result, whole.clamp_max(116), rtol=0, atol=1e-9)


@each_kernel
@pytest.mark.parametrize("sigma", [2, 7])
def test_with_open_ends_a_soft_label_decodes_to_itself_everywhere(kernel: Any, sigma: float) -> None:
    labels = torch.linspace(0, 20, 201, dtype=torch.float64)
    soft = soft_labels(labels, YEARS, sigma, kernel=kernel, ends="open")
    edges = torch.arange(21) * 10  # both ends of the axis among them
    median, mean = decode(soft, YEARS, "median", ends="open"), decode(soft, YEARS, ends="open")
    assert_close(median[edges], labels[edges], rtol=0, atol=1e-9)
    assert_close(mean[[0, -1]], labels[[0, -1]], rtol=0, atol=1e-9)
    for decoded in (median, mean):  # between edges, and in the end bins, mass does not lie as evenly as it counts
        assert (decoded - labels).abs().max() < 0.14


@each_kernel
def test_labels_at_the_ends_of_uneven_and_coarse_axes_decode_to_themselves(kernel: Any) -> None:
    log, decades = Bins.from_edges(np.geomspace(1, 1e4, 41)), Bins.uniform(0, 120, width=10, integer=True)
    for bins, ends in ((log, [1.0, 1e4]), (UNEVEN, [-3.0, 20.0]), (decades, [0.0, 119.0])):
        labels = torch.tensor(ends, dtype=torch.float64)
        soft = soft_labels(labels, bins, 2, kernel=kernel, unit="bin", ends="open")
        decoded = decode(soft, bins, "median", ends="open")
        # Decades of whole numbers end at -0.5 and 119.5, half a number beyond the labels.
        assert_close(decoded, labels, rtol=0, atol=0.51 if bins is decades else 1e-6)


def test_open_ends_are_those_worked_out_by_hand() -> None:
    # Bins [-1, 1), [1, 2), [2, 3), [3, 5): label 0 has all of its mass around it in the first one.
    bins = Bins.uniform(0, 4, width=1)
    soft = soft_labels(torch.tensor([0.0, 1.0, 4.0]), bins, 100, ends="open")
    assert_close(soft, torch.tensor([[1.0, 0, 0, 0], [0.5, 0.25, 0.25, 0], [0, 0, 0, 1.0]]), rtol=0, atol=1e-3)
    shares = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.2, 0.8]])
    assert_close(quantiles(shares, bins, [0.125, 0.375, 0.75], ends="open")[0], torch.tensor([0.0, 0.5, 2.0]))
    lower, upper = interval(shares, bins, 0.8, ends="open")
    assert_close(torch.stack([lower, upper], 1), torch.tensor([[0.0, 2.6], [2.5, 4.0]]))  # held to the axis
    assert_close(decode(shares, bins, ends="open"), torch.tensor([0.25 * 1.5 + 0.25 * 2.5, 0.2 * 2.5 + 0.8 * 4]))
    assert torch.equal(decode(shares, bins, "mode", ends="open"), decode(shares, bins, "mode"))
    assert torch.equal(limits(bins, shares, ends="open"), torch.tensor([-1.0, 1, 2, 3, 5]))


@each_kernel
def test_zeros_decode_to_zero_where_the_least_label_is_a_middle(kernel: Any) -> None:
    bins = Bins.uniform(-0.5, 99.5, width=1)
    soft = soft_labels(torch.zeros(1), bins, 2.0, kernel=kernel)
    assert [decode(soft, bins, point).item() for point in ("median", "expectation", "mode")] == [0, 0, 0]  # type: ignore[arg-type]


# Sigma in bins


@each_kernel
def test_bins_are_the_unit_that_an_even_axis_has_anyway(kernel: Any) -> None:
    for bins, width in ((YEARS, 1), (Bins.uniform(0, 120, width=10, integer=True), 10)):
        labels = labels_on(bins)
        for sigma in (0.5, 2.0):
            in_bins = soft_labels(labels, bins, sigma, kernel=kernel, unit="bin")
            assert torch.equal(in_bins, soft_labels(labels, bins, sigma * width, kernel=kernel))


@each_kernel
def test_a_kernel_in_bins_follows_uneven_ones(kernel: Any) -> None:
    log = Bins.from_edges(torch.logspace(0, 6, 61, dtype=torch.float64))
    even = Bins.uniform(0, 60, width=1)
    place = torch.tensor([0.5, 1.0, 7.3, 30.0, 59.2], dtype=torch.float64)
    whole = place.floor().long()
    edges = torch.tensor(log.edges)
    labels = edges[whole] + (place - whole) * edges.diff()[whole]  # as far along the axis, counted in bins
    assert_close(
        soft_labels(labels, log, 2, kernel=kernel, unit="bin"),
        soft_labels(place, even, 2, kernel=kernel),
        rtol=0,
        atol=1e-9,
    )
    labels = torch.tensor([2.0, 20.0, 200.0, 2e5])
    median = decode(soft_labels(labels, log, 2, kernel=kernel, unit="bin"), log, "median")
    assert_close(median, labels, rtol=0.02, atol=0)  # with two median widths, 465, they are 315, 322, 401 and 2e5


def test_a_sigma_in_bins_has_its_own_limit() -> None:
    log = Bins.from_edges([1, 10, 1000])
    assert soft_labels(torch.ones(1), log, 200, unit="bin").shape == (1, 2)
    with pytest.raises(ValueError, match=r"^soft_labels: sigma must be >= 0 and <= 200, got 201"):
        soft_labels(torch.ones(1), log, 201, unit="bin")
    with pytest.raises(ValueError, match=r"^soft_labels: unit must be one of 'label', 'bin', got 'bins'"):
        soft_labels(torch.ones(1), log, 1, unit="bins")  # type: ignore[arg-type]


# Labels beyond the axis


@pytest.mark.parametrize(("sigma", "bins", "unit"), [(None, YEARS, "bin"), (2.0, YEARS, "label"), (2.0, UNEVEN, "bin")])
def test_clip_spreads_the_end_and_drop_leaves_a_row_of_zeros(sigma: float | None, bins: Bins, unit: Any) -> None:
    spread: Any = partial(soft_labels, bins=bins, sigma=sigma, unit=unit)
    low, high = bins.edges[0].item(), bins.edges[-1].item()
    labels = torch.tensor([low - 7, 3.0, high + 1e6, math.inf, -math.inf])
    ends = torch.tensor([low, 3.0, high, high, low])
    assert torch.equal(spread(labels, outside="clip"), spread(ends))
    dropped = spread(labels, outside="drop")
    assert torch.equal(dropped[1], spread(ends)[1])
    assert dropped.sum(-1).tolist() == pytest.approx([0, 1, 0, 0, 0])
    for outside in ("clip", "drop"):
        with pytest.raises(LabelError, match=r"^soft_labels: labels must not be NaN, got nan at index \[1\]"):
            spread(torch.tensor([low, math.nan]), outside=outside)
    torch._dynamo.reset()
    ways = ("clip", "drop")
    compiled = torch.compile(lambda y: [spread(y, outside=o) for o in ways], fullgraph=True, backend="eager")
    assert_close(compiled(labels), [spread(labels, outside=outside) for outside in ways])
    for rows in compiled(torch.full((5,), torch.nan)):  # as on accelerators
        assert rows.isnan().all()
    with pytest.raises(ValueError, match=r"^soft_labels: outside must be one of 'raise', 'clip', 'drop', got 'nan'"):
        spread(labels, outside="nan")


@pytest.mark.parametrize(("outside", "row"), [("clip", [0, 0, 1]), ("drop", [0, 0, 0])])
def test_classes_beyond_the_last_are_clipped_or_dropped(outside: Any, row: list[int]) -> None:
    classes = Bins.classes(3)
    assert soft_labels(torch.tensor([5, 1]), classes, None, outside=outside).tolist() == [row, [0, 1, 0]]
    with pytest.raises(LabelError, match="labels must be whole numbers"):
        soft_labels(torch.tensor([0.5]), classes, None, outside=outside)


# Axes far from zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("unit", ["label", "bin"])
def test_an_axis_far_from_zero_is_resolved_as_one_at_zero(dtype: torch.dtype, unit: Any) -> None:
    start = 1_700_000_000
    near, far = Bins.uniform(0, 3600, width=60), Bins.uniform(start, start + 3600, width=60)
    labels = torch.arange(0, 3600, 37)
    sigma = 2 if unit == "bin" else 120
    expected = soft_labels(labels.double(), near, sigma, unit=unit)
    soft = soft_labels(labels.to(dtype) + start, far, sigma, unit=unit)
    assert soft.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(soft.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 3, 4)])
def test_any_shape_of_labels_is_taken(shape: tuple[int, ...]) -> None:
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
    place = limits(bins, torch.zeros((), dtype=torch.float64))
    assert place.tolist() == pytest.approx(knots(bins))
    assert_close((place[1:] + place[:-1]) / 2, torch.tensor(bins.centers), rtol=1e-12, atol=1e-12)
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
        ValueError, match=where + r"sigma must be None or 0 where bins are classes, got 2\.0\. For classes use"
    ):
        soft_labels(torch.tensor([1]), Bins.classes(3), 2)
    with pytest.raises(LabelError, match=where + "labels must be whole numbers where bins are classes"):
        soft_labels(torch.tensor([1.5]), Bins.classes(3), None)


@pytest.mark.parametrize("sigma", [None, 2.0])
def test_soft_labels_are_one_graph_that_reads_no_values(sigma: float | None) -> None:
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


@each_kernel
@pytest.mark.parametrize(
    "bins",
    [
        Bins.uniform(0, 117, width=1, integer=True),
        Bins.uniform(0, 300, width=1),
        Bins.from_edges(np.geomspace(1, 300, 200)),
        Bins.from_edges([0.0, 1.0, 3.0, 4.0, 120.0]),
        Bins.uniform(0, 1, count=1),
    ],
    ids=["integer", "even", "log", "uneven", "one"],
)
def test_counts_are_spread_as_the_labels_at_the_centres_are(bins: Bins, kernel: Any) -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (2, len(bins))).astype(float)
    for sigma, unit, ends in product((1e-3, 0.5, 2.0, 40.0), ("label", "bin"), ("closed", "open")):
        soft = soft_labels(torch.tensor(bins.centers), bins, sigma, kernel=kernel, unit=unit, ends=ends).numpy()
        spread = spread_counts(counts, bins, sigma, kernel=kernel, unit=unit, ends=ends)
        np.testing.assert_allclose(spread, counts @ soft, rtol=1e-12, atol=1e-12)


def test_counts_of_very_many_bins_are_spread_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    bins, cells = Bins.uniform(0, 100_000, width=1), []
    module = importlib.import_module("dir_toolkit.labels.soft_labels")  # the package holds the function by this name
    masses = module._masses

    def watched(*args: Any) -> Tensor:
        mass = masses(*args)
        cells.append(mass.numel())
        return mass

    monkeypatch.setattr(module, "_masses", watched)
    spread = spread_counts(np.ones(len(bins)), bins, 2.0, kernel="gaussian", unit="label", ends="closed")
    np.testing.assert_allclose(spread[100:-100], 1, rtol=1e-12)
    assert sum(cells) < 200 * len(bins)  # far from its label a kernel is not computed
    one = np.zeros(len(bins))
    one[len(bins) // 2] = 7
    assert spread_counts(one, bins, 20_000.0, kernel="gaussian", unit="label", ends="closed").sum() == pytest.approx(
        7, rel=1e-12
    )
    assert max(cells) < 2**21  # 16 MB


def test_limits_are_a_copy() -> None:
    bins, shares = Bins.uniform(0, 30, width=10), torch.tensor([0.2, 0.5, 0.3])
    before = decode(shares, bins, "median")
    for ends in ("closed", "open"):
        limits(bins, shares, ends=ends).zero_()  # type: ignore[arg-type]
    assert_close(decode(shares, bins, "median"), before, rtol=0, atol=0)
