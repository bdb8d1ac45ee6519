from __future__ import annotations

import copy
import json
import pickle
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from dir_toolkit import Bins, DirToolkitWarning, LabelDensity, decode, gaussian, soft_labels
from dir_toolkit.errors import LabelError, ShapeError


def oracle(edges: np.ndarray, label: float) -> int:
    """The bin of one label, -1 beyond the axis, by looking at every bin."""
    if label == edges[-1]:
        return len(edges) - 2
    for i in range(len(edges) - 1):
        if edges[i] <= label < edges[i + 1]:
            return i
    return -1


# Building


def test_uniform_bins_follow_width_or_count() -> None:
    bins = Bins.uniform(0, 117, width=1)
    assert len(bins) == 117
    assert bins == Bins.uniform(0, 117, count=117)
    np.testing.assert_array_equal(bins.edges, np.arange(118))
    np.testing.assert_array_equal(bins.centers, np.arange(117) + 0.5)
    assert not bins.categorical


def test_integer_labels_have_whole_centers() -> None:
    np.testing.assert_array_equal(Bins.uniform(0, 5, width=1, integer=True).centers, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(Bins.uniform(0, 10, width=5, integer=True).centers, [2, 7])
    np.testing.assert_array_equal(Bins.uniform(0, 5, width=2.5, integer=True).centers, [1, 3.5])
    np.testing.assert_array_equal(Bins.uniform(0.5, 2.5, width=1, integer=True).centers, [1, 2])
    np.testing.assert_array_equal(Bins.uniform(0.1, 2, count=2, integer=True).centers, [1, 2])  # 2 closes the axis


@pytest.mark.parametrize(("low", "high", "count"), [(0, 1, 4), (0.2, 0.8, 1), (0.1, 0.9, 1)])
def test_integer_needs_a_whole_number_in_every_bin(low: float, high: float, count: int) -> None:
    with pytest.raises(ValueError, match=r"every bin must hold a whole number, got \[0\..* or integer=False\."):
        Bins.uniform(low, high, count=count, integer=True)


@pytest.mark.parametrize(
    ("low", "high", "width"),
    [(0, 1, 0.1), (-0.3, 0.3, 0.1), (0, 117, 0.5), (1e-9, 2e-9, 1e-10), (1e9, 1e9 + 10, 0.1), (-7, 7, 0.2)],
)
def test_a_label_that_equals_a_decimal_edge_falls_on_its_right_side(low: float, high: float, width: float) -> None:
    bins = Bins.uniform(low, high, width=width)
    written = [float(Decimal(str(low)) + i * Decimal(str(width))) for i in range(len(bins) + 1)]
    expected = [*range(len(bins)), len(bins) - 1]
    assert bins.index(written).tolist() == expected
    assert bins.index(torch.tensor(written, dtype=torch.float64)).tolist() == expected
    if high < 1e6:  # a float32 tells these edges apart
        assert bins.index(np.array(written, dtype=np.float32)).tolist() == expected
        assert bins.index(torch.tensor(written, dtype=torch.float32)).tolist() == expected


def test_tenths_are_the_tenths_one_writes() -> None:
    assert Bins.uniform(0, 1, width=0.1).edges.tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    # The end lies further out than 0.3, where the float32 does.
    bins = Bins.uniform(0, np.float32(0.3), width=np.float32(0.1))
    assert bins.edges.tolist() == [0, 0.1, 0.2, float(np.float32(0.3))]
    assert (bins.relative_widths == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1, "high": 1, "count": 1}, "low must be smaller than high, got low=1 and high=1"),
        ({"low": 0, "high": 1}, "give either width or count, got width=None, count=None"),
        ({"low": 0, "high": 1, "width": 1, "count": 1}, "give either width or count"),
        ({"low": 0, "high": 10, "width": 3}, "width must divide high - low, got 3 in 10. Use count=4, or high=12."),
        ({"low": 0, "high": 1, "width": 1e-9}, "the number of bins must be at most 10,000,000, got 1000000000. Widen"),
        ({"low": 0, "high": 1, "count": 10**9}, "count must be at most 10,000,000, got 1000000000"),
        ({"low": 1, "high": 1.3, "width": 0.1 + 1e-9}, "width must divide high - low, got 0.100000001 in 0.3. Use"),
        ({"low": 0, "high": 0.1 + 1e-9, "width": 0.1}, "width must divide high - low, got 0.1 in 0.100000001. Use"),
        ({"low": -1e308, "high": 1e308, "count": 2}, "low and high must lie within 4e+307 of zero, got 1e+308"),
        ({"low": np.float32(0.7), "high": 0.7, "width": 0.1}, "low must be smaller than high"),
        ({"low": [0], "high": 1, "count": 1}, "low must be a number, got [0]"),
        ({"low": 0, "high": torch.ones(1), "count": 1}, "high must be a number, got tensor([1.])"),
        (
            {"low": torch.zeros((), device="meta"), "high": 1, "count": 1},
            "low must hold values, got a tensor on the meta",
        ),
        ({"low": 1e16, "high": 1e16 + 4, "count": 8}, "bins must be wider than float64 resolves"),
        ({"low": 0, "high": np.inf, "count": 1}, "high must be finite"),
        ({"low": np.nan, "high": 1, "count": 1}, "low must be finite"),
        ({"low": 0, "high": 1, "width": 0}, "width must be > 0"),
        ({"low": 0, "high": 1, "count": 0}, "count must be at least 1"),
        ({"low": "0", "high": 1, "count": 1}, "low must be a number"),
        ({"low": 0, "high": 1, "count": 2.0}, "count must be a whole number"),
        ({"low": 0, "high": 1, "count": True}, "count must be a whole number"),
    ],
)
def test_uniform_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^Bins.uniform: {re.escape(message)}"):
        Bins.uniform(**arguments)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("holder", ["numpy", "torch", "array"])
def test_an_axis_from_the_least_to_the_largest_label_holds_all(dtype: Any, holder: str) -> None:
    for seed in range(60):
        y = (np.random.default_rng(seed).standard_normal(50) * 10 ** (seed % 7 - 3)).astype(dtype)
        low, high = y.min(), y.max()
        if holder == "torch":
            low, high = torch.from_numpy(y).min(), torch.from_numpy(y).max()
        elif holder == "array":
            low, high = np.array(low), np.array(high)
        bins = Bins.uniform(low, high, count=7)
        assert (bins.relative_widths == 1).all()
        for labels in (y, torch.from_numpy(y), y.astype(np.float32), y.astype(np.float64), y.tolist()):
            index = np.asarray(bins.index(labels))
            assert index[y.argmin()] == 0
            assert index[y.argmax()] == 6


def test_a_width_and_bounds_in_float32_give_decimals_that_hold_the_bounds() -> None:
    for low, high in ((0.1, 0.7), (-0.7, 0.3), (0.7, 1.3), (-1.2, -0.1)):
        bins = Bins.uniform(np.float32(low), np.float32(high), width=0.1)
        ends = [float(np.float32(low)), float(np.float32(high))]
        assert bins.index(ends).tolist() == [0, len(bins) - 1]
        assert bins.index(np.array(ends, dtype=np.float32)).tolist() == [0, len(bins) - 1]
        assert bins.edges[1:-1].tolist() == [round(low + 0.1 * i, 1) for i in range(1, len(bins))]
        assert (bins.relative_widths == 1).all()


def test_sentences_never_show_two_numbers_alike() -> None:
    bins = Bins.uniform(-3.899420738, 3.06603670, count=50)
    with pytest.raises(LabelError, match=re.escape("axis [-3.899420738, 3.0660367], got 3.0660367012")):
        bins.index([3.0660367012])


def test_edges_may_be_uneven_negative_and_of_any_scale() -> None:
    for scale in (1e-9, 1.0, 1e9):
        edges = np.array([-3.0, -1.0, 0.0, 0.5, 10.0]) * scale
        for given in (edges, edges.tolist(), torch.from_numpy(edges)):
            bins = Bins.from_edges(given)
            np.testing.assert_array_equal(bins.edges, edges)
            np.testing.assert_allclose(bins.centers, np.array([-2, -0.5, 0.25, 5.25]) * scale, rtol=1e-15)


@pytest.mark.parametrize(
    ("edges", "kind", "message"),
    [
        ([0], ShapeError, r"edges must be one row of at least two numbers, got shape \(1,\)"),
        ([], ShapeError, r"edges must be one row of at least two numbers, got shape \(0,\)"),
        ([[0, 1], [2, 3]], ShapeError, r"edges must be one row of at least two numbers, got shape \(2, 2\)"),
        ([0, 1, 1], ValueError, r"edges must be finite and strictly rising, got 1 followed by 1 at position 1\."),
        ([0, np.nan, 1], ValueError, r"edges must be finite and strictly rising, got 0 followed by nan"),
        ([0, np.inf], ValueError, r"edges must be finite and strictly rising"),
        ([0, 1e308], ValueError, r"edges must lie within 4e\+307 of zero, got 1e\+308"),
        (
            [0, 1.0000001, 1.00000009],
            ValueError,
            r"edges must be .*, got 1\.0000001 followed by 1\.00000009 at position 1\.",
        ),
        (None, TypeError, "edges must be integers or floats"),
        ("ab", TypeError, "edges must be integers or floats"),
    ],
)
def test_from_edges_refuses_bad_edges(edges: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^Bins.from_edges: {message}"):
        Bins.from_edges(edges)


def test_quantile_bins_hold_equal_shares() -> None:
    labels = np.random.default_rng(0).lognormal(size=1000)
    bins = Bins.quantile(labels, 10)
    assert len(bins) == 10
    np.testing.assert_array_equal(np.bincount(bins.index(labels)), 100)
    assert Bins.quantile(torch.from_numpy(labels), 10) == bins
    assert len(Bins.quantile([0, 0, 0, 0, 0, 0, 0, 1, 2], 4)) < 4  # repeats make them fewer


@pytest.mark.parametrize(
    ("labels", "n", "kind", "message"),
    [
        ([1.0, np.nan], 2, LabelError, r"labels must be finite, got nan at index \[1\]"),
        ([1.0, -np.inf], 2, LabelError, r"labels must be finite, got -inf at index \[1\]"),
        ([], 2, ValueError, r"labels must hold at least one value, got shape \(0,\)"),
        ([3.0, 3.0], 2, ValueError, "labels must hold at least two different values, got only 3"),
        ([1.0, 2.0], 0, ValueError, "n must be at least 1, got 0"),
        ([1.0, 2.0], 2.0, TypeError, "n must be a whole number"),
        ("ab", 2, TypeError, "labels must be integers or floats"),
    ],
)
def test_quantile_refuses_bad_arguments(labels: Any, n: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^Bins.quantile: {message}"):
        Bins.quantile(labels, n)


def test_a_class_is_a_bin() -> None:
    bins = Bins.classes(3)
    assert bins.categorical
    assert bins.index([0, 1, 2]).tolist() == [0, 1, 2]
    assert bins.index(torch.tensor([0.0, 2.0])).tolist() == [0, 2]
    assert bins.centers.tolist() == [0, 1, 2]
    with pytest.raises(
        LabelError, match=r"labels must be whole numbers where bins are classes, got 0\.5 at index \[1\]"
    ):
        bins.index([0, 0.5])
    with pytest.raises(LabelError, match=r"labels must lie on the label axis 0 to 2, got 3 at index \[0\]"):
        bins.index([3])
    with pytest.raises(ValueError, match=r"^Bins\.classes: n must be at least 1"):
        Bins.classes(0)
    with pytest.raises(ValueError, match=r"^Bins\.classes: n must be at most 10,000,000, got 1000000000"):
        Bins.classes(10**9)


def test_the_constructor_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"^Bins: edges must be finite and strictly rising"):
        Bins(np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"^Bins: centers must be one finite number per bin, got shape \(2,\)"):
        Bins(np.array([0.0, 1.0]), centers=np.array([0.0, 1.0]))


# Placing labels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_index_agrees_with_looking_at_every_bin_on_random_axes(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        if trial % 2:  # even axes take another way through the code
            bins = Bins.uniform(int(rng.integers(-20, 20)), 30, count=int(rng.integers(1, 40)))
        else:
            bins = Bins.from_edges(np.unique(rng.normal(scale=10.0 ** rng.integers(-9, 9), size=rng.integers(2, 30))))
        edges = bins.edges.astype(dtype)
        spread = edges[-1] - edges[0]
        labels = rng.uniform(edges[0] - spread * (trial % 3), edges[-1] + spread * (trial % 3), size=50)
        labels = np.concatenate([labels.astype(dtype), edges, np.nextafter(edges, dtype(np.inf))[:-1]])
        expected = np.array([oracle(edges, x) for x in labels])
        np.testing.assert_array_equal(bins.index(labels, "drop"), expected)
        np.testing.assert_array_equal(bins.index(torch.from_numpy(labels), "drop").numpy(), expected)
        inside = expected >= 0
        np.testing.assert_array_equal(bins.index(labels[inside]), expected[inside])
        searched = np.clip(np.searchsorted(edges, labels, side="right") - 1, 0, len(bins) - 1)
        np.testing.assert_array_equal(bins.index(labels, "clip"), searched)


def test_the_oracle_tells_bins_apart() -> None:
    edges = np.array([0.0, 1.0, 2.0])
    assert [oracle(edges, x) for x in (-0.1, 0, 0.9, 1, 2, 2.1)] == [-1, 0, 0, 1, 1, -1]


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
    ],
)
def test_every_kind_of_number_is_placed_alike(dtype: str) -> None:
    labels = torch.tensor([0, 1, 5, 9, 10]).to(getattr(torch, dtype))
    assert Bins.uniform(0, 10, width=1).index(labels).tolist() == [0, 1, 5, 9, 9]
    assert Bins.uniform(0, 10, width=1).index(labels).dtype == torch.int64


def test_index_keeps_shape_and_kind_and_leaves_its_input_alone() -> None:
    bins = Bins.uniform(0, 10, width=1)
    for shape in ((), (0,), (3,), (2, 1, 2)):
        array = np.full(shape, 4.5)
        tensor = torch.from_numpy(array)
        assert isinstance(bins.index(array), np.ndarray)
        assert bins.index(array).shape == shape
        assert bins.index(array).dtype == np.int64
        assert bins.index(tensor).shape == shape
        for outside in ("raise", "clip", "drop"):
            bins.index(tensor, outside)
            bins.index(array, outside)
        assert (array == 4.5).all()
    assert bins.index([]).shape == (0,)
    assert bins.index(3.2).item() == 3
    assert bins.index(np.arange(10)[::-2]).tolist() == [9, 7, 5, 3, 1]
    assert bins.index(np.array([1.0, 2.0], dtype=">f8")).tolist() == [1, 2]
    read_only = np.array([1.0, 2.0])
    read_only.setflags(write=False)
    assert bins.index(read_only).tolist() == [1, 2]
    assert bins.index(torch.arange(10.0).reshape(5, 2).T).tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert not bins.index(torch.ones(1, requires_grad=True)).requires_grad


def test_labels_beyond_the_axis_follow_outside() -> None:
    bins = Bins.uniform(-5, 5, width=1)
    labels = [-np.inf, -5.001, -5, 5, 5.001, np.inf]
    for given in (labels, torch.tensor(labels)):
        assert bins.index(given, "clip").tolist() == [0, 0, 0, 9, 9, 9]
        assert bins.index(given, "drop").tolist() == [-1, -1, 0, 9, -1, -1]
        message = (
            r"^Bins\.index: labels must lie on the label axis \[-5, 5\], got -inf at index \[0\] \(4 such labels\)"
        )
        with pytest.raises(LabelError, match=message):
            bins.index(given)
    with pytest.raises(ValueError, match="outside must be one of 'raise', 'clip', 'drop', got 'ignore'"):
        bins.index([0], "ignore")  # type: ignore[call-overload]


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_nan_always_raises_and_says_where(outside: Any) -> None:
    labels = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    for given in (labels, labels.numpy()):
        with pytest.raises(LabelError, match=r"labels must not be NaN, got nan at index \[1, 0\] \(1 such labels\)"):
            Bins.uniform(0, 10, width=1).index(given, outside)


@pytest.mark.parametrize(
    "labels", [None, "abc", ["1"], True, [True], torch.tensor([True]), torch.tensor([1j]), {1: 2}, [1, None]]
)
def test_labels_that_are_no_numbers_are_refused_by_name(labels: Any) -> None:
    with pytest.raises(TypeError, match=r"^Bins\.index: labels must be integers or floats, got (dtype|NoneType|dict)"):
        Bins.uniform(0, 10, width=1).index(labels)


class NoArray:
    """As an xarray.Dataset and an array of CuPy are: it says that it is an array, and then is not."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion is not allowed.")


@pytest.mark.parametrize(
    "labels",
    [
        [torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(5.0, dtype=torch.bfloat16)],
        [torch.tensor(1.0, requires_grad=True), 5.0],
        (torch.tensor(1), np.float32(5)),
        np.array([1.0, 5.0], dtype=np.longdouble),
        torch.tensor([-1.0, -5.0]).neg(),
        torch._neg_view(torch.tensor([-1.0, -5.0])),
        torch.tensor([1j, 5j]).conj().imag.neg(),
        np.ma.array([1.0, 5.0], mask=[False, False]),
    ],
    ids=["bf16", "grad", "mixed", "long", "neg", "view", "imag", "unmasked"],
)
def test_unusual_holders_of_plain_numbers_are_read(labels: Any) -> None:
    bins = Bins.uniform(0, 10, width=1)
    assert bins.index(labels).tolist() == [1, 5]
    assert LabelDensity.count(labels, bins).counts.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_ragged_and_sparse_labels_are_refused_by_name() -> None:
    bins = Bins.uniform(0, 10, width=1)
    masked = np.ma.array([1.0, 2.0], mask=[False, True])
    for labels in (masked, [masked, masked], [1.0, np.ma.masked]):
        with pytest.raises(
            ValueError, match=r"^Bins\.index: labels must not be masked, got masked values\. Use labels"
        ):
            bins.index(labels)
    for labels in (
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        [torch.ones(2).to_sparse()],
    ):
        with pytest.raises(TypeError, match=r"^Bins\.index: labels must be (one )?dense"):
            bins.index(labels)
    with pytest.raises(TypeError, match=r"^Bins\.index: labels must form one array of numbers, got NoArray\. Pass"):
        bins.index(NoArray())
    for outside in ("raise", "clip"):
        with pytest.raises(ValueError, match=r"^Bins\.index: labels must hold values, got a tensor on the meta device"):
            bins.index([torch.zeros((), device="meta")], outside)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="labels must form one array of numbers, got rows of different lengths"):
        bins.index([[1, 2], [3]])
    with pytest.raises(TypeError, match="labels must be dense"):
        bins.index(torch.ones(2).to_sparse())


@pytest.mark.parametrize("outside", ["clip", "drop"])
@pytest.mark.parametrize("bins", [Bins.uniform(0, 10, width=1), Bins.classes(11)], ids=["uniform", "classes"])
def test_clip_and_drop_read_nothing_on_an_accelerator(bins: Bins, outside: Any) -> None:
    # A meta tensor has no values at all: whatever looked at them would raise.
    index = bins.index(torch.empty(4, 3, device="meta"), outside)
    assert index.device.type == "meta"
    assert (index.shape, index.dtype) == ((4, 3), torch.int64)
    with pytest.raises(ValueError, match=r"^Bins\.index: labels must hold values, got a tensor on the meta device"):
        bins.index(torch.empty(4, 3, device="meta"), "raise")


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_index_is_one_graph_and_reads_nothing_when_compiled(outside: Any) -> None:
    bins = Bins.uniform(0, 10, width=1)
    # fullgraph=True refuses whatever brings a value to the host.
    place = torch.compile(lambda x: bins.index(x, outside), fullgraph=True, backend="eager")
    index = place(torch.tensor([0.0, 9.9, 10.0, float("nan"), 12.0]))
    assert index[:4].tolist() == [0, 9, 9, -1]
    assert index[4] == (9 if outside == "clip" else -1)


# Decoding


def test_the_expectation_is_that_worked_out_by_hand() -> None:
    bins = Bins.uniform(0, 30, width=10)  # centres 5, 15, 25
    probabilities = np.array([[1.0, 0, 0], [0.5, 0.25, 0.25], [0, 0, 1]])
    np.testing.assert_allclose(bins.expectation(probabilities), [5, 12.5, 25], rtol=1e-15)
    assert_close(bins.expectation(torch.from_numpy(probabilities)), torch.tensor([5, 12.5, 25]).double())
    assert bins.expectation(torch.from_numpy(probabilities).bfloat16()).dtype == torch.float32
    assert bins.expectation(probabilities.tolist()).shape == (3,)
    assert bins.expectation(np.zeros((0, 3))).shape == (0,)


def test_expectation_equals_a_naive_loop_and_gradients_flow() -> None:
    bins = Bins.from_edges([0, 1, 3, 10])
    logits = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mean = bins.expectation(logits.softmax(-1))
    for i in range(2):
        for j in range(5):
            p = logits.detach()[i, j].softmax(-1).tolist()
            assert mean[i, j].item() == pytest.approx(sum(a * c for a, c in zip(p, (0.5, 2, 6.5), strict=True)), 1e-12)
    assert torch.autograd.gradcheck(lambda x: bins.expectation(x.softmax(-1)), logits)


@pytest.mark.parametrize(
    ("probabilities", "kind", "message"),
    [
        (np.ones((3, 2)) / 2, ShapeError, r"probabilities must be \(\.\.\., 3\), one per bin, got shape \(3, 2\)"),
        (np.float64(1), ShapeError, r"probabilities must be \(\.\.\., 3\), one per bin, got shape \(\)"),
        (
            np.array([0.5, 0.5, 0.5]),
            ValueError,
            r"probabilities must sum to one along the last axis, got sums from 1\.5 to 1\.5",
        ),
        (np.array([np.nan, 0, 1]), ValueError, r"probabilities must be finite, got nan at index \[0\]"),
        (np.array([1.5, -0.5, 0]), ValueError, "probabilities must not be negative, got a minimum of -0.5"),
        (np.array([1, 0, 0]), TypeError, "probabilities must be floats, got dtype torch.int64"),
        (None, TypeError, "probabilities must be integers or floats"),
        ("abc", TypeError, "probabilities must be integers or floats"),
        ([[1.0], [0.5, 0.5]], ValueError, "probabilities must form one array of numbers"),
    ],
)
def test_expectation_refuses_other_shapes(probabilities: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^Bins.expectation: {message}"):
        Bins.classes(3).expectation(probabilities)


# An axis is a value


AXES = [Bins.uniform(0, 1, width=0.1), Bins.from_edges([-1, 0, 5]), Bins.classes(4), Bins.uniform(0, 9, width=3)]


@pytest.mark.parametrize("bins", AXES, ids=repr)
def test_copies_are_equal_and_as_unchangeable(bins: Bins) -> None:
    bins.index(torch.tensor([0.0]), "clip")
    for other in (
        copy.deepcopy(bins),
        copy.copy(bins),
        pickle.loads(pickle.dumps(bins)),
        Bins.from_dict(bins.to_dict()),
        Bins.from_dict(json.loads(json.dumps(bins.to_dict()))),
    ):
        assert other == bins
        assert hash(other) == hash(bins)
        assert repr(other) == repr(bins)
        for array in (other.edges, other.centers):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 7


def test_axes_differ_by_edges_centers_and_kind() -> None:
    axes = [*AXES, Bins.uniform(0, 9, width=3, integer=True), Bins.from_edges(np.arange(5) - 0.5)]
    assert len(set(axes)) == len(axes)
    assert AXES[0] != "axis"
    assert Bins.from_edges([-0.0, 1]) == Bins.from_edges([0.0, 1])
    assert hash(Bins.from_edges([-0.0, 1])) == hash(Bins.from_edges([0.0, 1]))


def test_the_caller_s_edges_stay_his() -> None:
    edges = np.array([0.0, 1.0, 2.0])
    bins = Bins.from_edges(edges)
    edges[1] = 0.5
    assert bins.edges.tolist() == [0, 1, 2]


AXIS = {"edges": [0, 1], "centers": [0.5], "categorical": False, "unbounded": False}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "values must be a dict, got NoneType"),
        ({}, "values must have the keys"),
        ({"edges": [0, 1], "centers": [0.5]}, r"got missing \['categorical', 'unbounded'\], unknown \[\]"),
        (AXIS | {"categorical": 1}, "categorical must be a bool, got int"),
        (AXIS | {"unbounded": None}, "unbounded must be a bool, got NoneType"),
        (AXIS | {"edges": [1, 0]}, "edges must be finite and strictly rising"),
        (AXIS | {"edges": "a"}, "edges must be integers or floats"),
    ],
)
def test_from_dict_refuses_what_to_dict_never_wrote(values: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Bins.from_dict(values)


@pytest.mark.parametrize(
    "axis", [Bins.uniform(0, 60, width=0.5), Bins.uniform(-4, 61, width=1), Bins.classes(61)], ids=repr
)
@pytest.mark.parametrize("label", [26, 60, 0])
def test_a_single_label_is_placed_as_one_of_many(axis: Bins, label: int) -> None:
    expected = axis.index([label, label]).tolist()[0]
    for one in (label, np.float32(label), np.array(label), torch.tensor(label), torch.tensor(float(label))):
        result = axis.index(one)
        assert result.shape == ()
        assert int(result) == expected
        assert LabelDensity.count(np.asarray(one), axis).counts[expected] == 1


@pytest.mark.parametrize(
    ("low", "width", "count"),
    [(0, 0.1, 10), (0, 1 / 51, 51), (1000, 1 / 51, 51), (0, 1e-8, 128), (-91.965355, 4.2529655, 72)],
)
def test_even_edges_in_float32_are_even(low: float, width: float, count: int) -> None:
    steps = np.arange(count + 1, dtype=np.float32) * np.float32(width) + np.float32(low)
    for edges in (torch.linspace(low, low + count * width, count + 1), steps):
        bins = Bins.from_edges(edges)
        assert bins.edges.tolist() == [float(edge) for edge in edges]
        assert bins.relative_widths.tolist() == [1.0] * count
        density = LabelDensity(bins, np.arange(count))
        of_width, of_bins = (
            density.smooth(one).counts for one in (gaussian(5 * width, 2 * width, unit="label"), gaussian(5, 2))
        )
        np.testing.assert_allclose(of_width, of_bins, rtol=1e-2)


def test_uneven_edges_in_float32_stay_uneven() -> None:
    uneven = [np.linspace(0, 1, 11) + 0.0005 * (np.arange(11) > 0), torch.linspace(1000, 1001, 1001)]  # steps of 16 ulp
    uneven.append(torch.linspace(0, 1, 11) + 0.0005 * (torch.arange(11) > 0))
    for edges in uneven:
        assert not (Bins.from_edges(edges).relative_widths == 1).all()


def test_relative_widths_are_ones_on_even_axes_and_classes_and_average_one_on_others():
    even = [Bins.uniform(0, 1, count=7), Bins.uniform(1.7e9, 1.7e9 + 3600, width=60), Bins.classes(3)]
    for bins in even:
        assert (bins.relative_widths == 1).all()
    assert Bins.from_edges([0, 1, 2, 6]).relative_widths.tolist() == [0.5, 0.5, 2.0]
    grid = Bins.grid(Bins.from_edges([0, 1, 4]), Bins.classes(2))
    assert grid.relative_widths.tolist() == [0.5, 0.5, 1.5, 1.5]


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.4, of every mesh of CPUs
def test_a_tensor_on_several_devices_is_refused_by_name() -> None:
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import Replicate, distribute_tensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import Replicate, distribute_tensor

    bins = Bins.uniform(0, 10, width=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        labels, p = (distribute_tensor(x, mesh, [Replicate()]) for x in (torch.ones(3), torch.full((3, 10), 0.1)))
        for call, name in (
            (lambda: bins.index(labels), "Bins.index: labels"),
            (lambda: soft_labels(labels, bins, 2.0), "soft_labels: labels"),
            (lambda: LabelDensity.count(labels, bins), "LabelDensity.count: labels"),
            (lambda: bins.expectation(p), "Bins.expectation: probabilities"),
            (lambda: decode(p, bins, "median"), "decode: probabilities"),
        ):
            with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor, got a DTensor\. Use \w+\.to_local"):
                call()
    finally:
        dist.destroy_process_group()


def test_apples_gpus_get_a_sentence_where_float64_is_needed() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = torch.empty(3, 10, device="mps")
        if torch.__version__ >= "2.5":  # before, moving a fake tensor asks for the real device
            assert decode(p, Bins.uniform(0, 10, width=1), "mode").dtype == torch.float32
        with pytest.raises(ValueError, match=r"bins need a device with float64, got mps\. Widen the bins, or subtract"):
            decode(p, Bins.uniform(1e9, 1e9 + 10, width=1))


def test_axes_that_differ_are_shown_unlike() -> None:
    axes = [
        Bins.uniform(0, 4, width=1),
        Bins.uniform(0, 4, width=1, integer=True),
        Bins.uniform(0, 4.0000001, count=4),
        Bins.from_edges([0, 1, 2.5, 3, 4]),
        Bins.from_edges([0, 1, 2.6, 3, 4]),
        Bins(np.arange(5.0), centers=np.array([0.1, 1, 2, 3])),
        Bins(np.arange(5.0), categorical=True),
        Bins.classes(4),
    ]
    assert len({repr(bins) for bins in axes}) == len(axes)
    assert repr(axes[1]) == "<Bins: 4 of whole numbers from 0 to 4>"
    assert repr(axes[0]) == repr(Bins.from_dict(axes[0].to_dict())) == "<Bins: 4 from 0 to 4>"


@pytest.mark.parametrize("place", ["index", "count", "tensor"])
def test_labels_too_narrow_for_the_axis_are_warned_of_once(place: str) -> None:
    bins = Bins.uniform(1.7e9, 1.7e9 + 3600, width=60)  # where float32 goes in steps of 128
    labels = np.linspace(1.7e9, 1.7e9 + 3600, 50)
    call: Any = {
        "index": bins.index,
        "count": lambda y: LabelDensity.count(y, bins),
        "tensor": lambda y: bins.index(torch.from_numpy(y)),
    }[place]
    call(labels)
    call(labels.astype(np.int64))
    with pytest.warns(DirToolkitWarning, match=r"float32 cannot separate all edges of <Bins: 60 .*, .* float64"):
        call(labels.astype(np.float32))
    call(labels.astype(np.float32))
    near = Bins.uniform(0, 3600, width=60)
    near.index(np.linspace(0, 3600, 9, dtype=np.float32))


def test_rows_tallies_and_tensors_of_an_axis_by_hand() -> None:
    bins, labels = Bins.from_edges([0, 1, 3, 10]), torch.tensor([0.5, 2.0, 2.5, 12.0])
    assert bins.rows(labels, "drop").tolist() == [0, 1, 1, 3]  # the last row is for labels without a bin
    assert bins.rows(labels, "clip").tolist() == [0, 1, 1, 2]
    assert bins.rows(torch.empty(4, device="meta")).shape == (4,)  # labels elsewhere are not looked at
    assert bins.tally(labels, "drop").tolist() == [1, 2, 0]
    assert bins.tally([0.5] * 9 + [3], name="y").tolist() == [9, 0, 1]
    with pytest.raises(LabelError, match=r"^Bins\.tally: y must lie on the label axis \[0, 10\], got 12\.0"):
        bins.tally([0.5] * 9 + [12.0], name="y")
    assert bins.shares(torch.tensor([0.5, 0.5, 0.0]).half()).dtype == torch.float32
    assert_close(bins.tensor("centers", labels), torch.tensor([0.5, 2.0, 6.5]))
    assert bins.tensor("edges", labels) is bins.tensor("edges", labels)  # copied once
    assert (bins.wide_dtype(labels), bins.wide_dtype(labels.double())) == (torch.float32, torch.float64)
    assert Bins.uniform(1e9, 1e9 + 10, width=1).wide_dtype(labels) == torch.float64


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_classes_refuse_integers_below_and_beyond_them_in_every_width(dtype: str) -> None:
    bins, limits = Bins.classes(200), np.iinfo(dtype)
    inside = np.array([0, 7, min(199, limits.max)], dtype=dtype)
    assert bins.index(inside).tolist() == inside.tolist()
    for wrong in {-1, limits.min, limits.max, 200} - set(range(200)):
        if limits.min <= wrong <= limits.max:
            with pytest.raises(LabelError, match=f"got {wrong}"):
                bins.index(np.array([3, wrong], dtype=dtype))


def test_an_expectation_is_that_of_decode_also_under_autocast_and_of_rounded_shares() -> None:
    bins, shares = Bins.uniform(0, 100, count=20), torch.rand(3, 20).softmax(1)
    plain = bins.expectation(shares)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(bins.expectation(shares), plain, rtol=0, atol=0)
    assert_close(decode(shares, bins, "expectation"), plain, rtol=0, atol=0)
    assert_close(bins.expectation(torch.full((20,), 0.05 * 1.0009)), torch.tensor(50.0))
