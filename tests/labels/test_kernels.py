from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.signal.windows import triang
from scipy.stats import laplace as laplace_distribution
from scipy.stats import norm

from dir_toolkit import FDS, LDS, Bins, LabelDensity, LongTailModel, gaussian, laplace, triangular
from dir_toolkit.errors import ShapeError
from dir_toolkit.labels.kernels import smooth, smooth_rows, smoothing_matrix, smoothing_window, usual_kernel

EDGES = ("reflect", "mirror", "zero")


def naive(values: np.ndarray, window: np.ndarray, edges: str) -> np.ndarray:
    """The smoothing sum, neighbour by neighbour."""
    last, half = len(values) - 1, len(window) // 2
    out = np.zeros(len(values))
    for b in range(len(values)):
        for d in range(-half, half + 1):
            place = b + d
            if not 0 <= place <= last:
                if edges == "zero":
                    continue
                step = 1 if edges == "reflect" else 0
                place = -place - step if place < 0 else 2 * last - place + step
            out[b] += window[half + d] / sum(window) * values[place]
    return out


def test_gaussian_values_of_the_paper_s_formula_and_of_the_public_code() -> None:
    np.testing.assert_allclose(gaussian(5, 2), [0.607, 0.882, 1, 0.882, 0.607], atol=5e-4)
    np.testing.assert_allclose(gaussian(5, 2, folded=True), [0.858, 0.946, 1, 0.946, 0.858], atol=5e-4)
    for size, sigma in ((1, 1), (5, 0.5), (9, 3), (21, 40)):
        d = np.arange(size) - size // 2
        np.testing.assert_allclose(gaussian(size, sigma), norm.pdf(d / sigma) / norm.pdf(0), rtol=1e-14)
        impulse = gaussian_filter1d([float(x == 0) for x in d], sigma)
        np.testing.assert_allclose(gaussian(size, sigma, folded=True), impulse / max(impulse), rtol=1e-14)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 31])
def test_triangular_and_laplace_equal_their_closed_forms(size: int) -> None:
    np.testing.assert_array_equal(triangular(size), triang(size))
    d = np.arange(size) - size // 2
    for scale in (0.3, 1, 7):
        expected = laplace_distribution.pdf(d, scale=scale) / laplace_distribution.pdf(0, scale=scale)
        np.testing.assert_allclose(laplace(size, scale), expected, rtol=1e-14)


@pytest.mark.parametrize("width", [1e-300, 1e-320, 1e-160, 1e-3])
def test_the_narrowest_windows_are_one_bin(width: float) -> None:
    for window in (gaussian(5, width), gaussian(5, width, folded=True), laplace(5, width)):
        np.testing.assert_array_equal(window, [0, 0, 1, 0, 0])


@pytest.mark.parametrize("window", [lambda n: gaussian(n, 2), triangular, lambda n: laplace(n, 2)])
def test_windows_need_a_middle(window: Any) -> None:
    for size, fix in ((4, "Use 3"), (2, "Use 1")):
        with pytest.raises(ValueError, match=f"size must be odd, so that the window has a middle, got {size}. {fix}"):
            window(size)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
            window(size)
    for size in (5.0, "5", None, True, np.nan):
        with pytest.raises(TypeError, match="size must be a whole number"):
            window(size)


@pytest.mark.parametrize("width", [0, -1, np.nan, np.inf])
def test_windows_need_a_positive_width(width: float) -> None:
    with pytest.raises(ValueError, match=r"^gaussian: sigma must be > 0"):
        gaussian(5, width)
    with pytest.raises(ValueError, match=r"^laplace: scale must be > 0"):
        laplace(5, width)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("window", [gaussian(5, 2), triangular(7), laplace(3, 1), np.array([1.0]), gaussian(9, 4)])
def test_smooth_equals_a_naive_loop(window: np.ndarray, edges: Any) -> None:
    values = np.random.default_rng(0).exponential(size=9)
    expected = naive(values, window, edges)
    np.testing.assert_allclose(smooth(values, window, edges=edges), expected, rtol=1e-13)
    np.testing.assert_allclose(smooth(values, (7 * window).tolist(), edges=edges), expected, rtol=1e-13)
    np.testing.assert_allclose(smooth(torch.from_numpy(values), torch.from_numpy(window), edges=edges), expected)
    np.testing.assert_allclose(smoothing_matrix(9, window, edges=edges) @ values, expected, rtol=1e-13)
    columns = smooth(np.stack([values, 2 * values], 1), window, edges=edges)
    np.testing.assert_allclose(columns, np.stack([expected, 2 * expected], 1), rtol=1e-13)


def test_the_naive_loop_knows_the_edges_apart() -> None:
    values, window = np.array([4.0, 2.0, 0.0]), np.array([1.0, 2.0, 1.0])
    assert naive(values, window, "reflect").tolist() == [3.5, 2, 0.5]
    assert naive(values, window, "mirror").tolist() == [3, 2, 1]
    assert naive(values, window, "zero").tolist() == [2.5, 2, 0.5]


@pytest.mark.parametrize("size", [1, 3, 9, 11])
def test_reflecting_keeps_the_sum_and_a_constant(size: int) -> None:
    values = np.random.default_rng(1).exponential(size=11)
    assert smooth(values, gaussian(size, 3)).sum() == pytest.approx(values.sum(), 1e-13)
    np.testing.assert_allclose(smooth(np.full(11, 2.0), gaussian(size, 3)), 2, rtol=1e-14)
    np.testing.assert_allclose(smoothing_matrix(11, gaussian(size, 3)).sum(0), 1, rtol=1e-13)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("bins", [1, 2, 5, 6, 40])
@pytest.mark.parametrize("size", [1, 3, 5, 39])
@pytest.mark.parametrize("shape", [(), (4,), (3, 2)])
def test_rows_are_smoothed_as_arrays_are(edges: Any, bins: int, size: int, shape: tuple[int, ...]) -> None:
    if size > bins:
        return
    values = np.random.default_rng(0).normal(size=(bins, *shape))
    window = gaussian(size, 1.7)
    given = torch.from_numpy(values)
    smoothed = smooth_rows(given, smoothing_window(window, bins), edges)
    np.testing.assert_allclose(smoothed, smooth(values, window, edges=edges), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(given, values)
    if size == 39:
        other = "zero" if edges != "zero" else "mirror"
        assert not np.allclose(smoothed, smooth(values, window, edges=other), rtol=1e-3)
    assert smooth_rows(given.float(), smoothing_window(window, bins), edges).dtype == torch.float32


def test_rows_are_smoothed_in_little_memory() -> None:
    rows = torch.ones(100_000, 4, dtype=torch.float64)
    window = smoothing_window(gaussian(5, 2), len(rows))
    torch.testing.assert_close(smooth_rows(rows, window, "reflect"), rows)


def test_the_usual_kernel_depends_on_the_number_of_bins() -> None:
    assert usual_kernel(Bins.classes(100)) is None
    assert usual_kernel(Bins.uniform(0, 4, width=1)) is None
    assert np.array_equal(usual_kernel(Bins.uniform(0, 5, width=1)), gaussian(5, 2))
    of_axes = usual_kernel(Bins.grid(Bins.uniform(0, 5, width=1), Bins.classes(9)))
    assert [window.tolist() for window in of_axes] == [gaussian(5, 2).tolist(), [1.0]]


def test_smooth_leaves_its_inputs_alone() -> None:
    values, window = np.arange(5), gaussian(3, 1)
    before = window.copy()
    smooth(values, window)
    assert values.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(window, before)


@pytest.mark.parametrize(
    ("kernel", "kind", "message"),
    [
        ([1, 1], ValueError, "kernel must have odd length, so that it has a middle, got 2 values"),
        ([1, 2, 3], ValueError, r"kernel must be symmetric, got \[1\.0, 2\.0, 3\.0\]"),
        ([1, np.nan, 1], ValueError, "kernel must be finite, not negative, and positive in the middle"),
        ([np.inf], ValueError, "kernel must be finite, not negative, and positive in the middle"),
        ([-1, 3, -1], ValueError, "kernel must be finite, not negative, and positive in the middle"),
        ([1, 0, 1], ValueError, "kernel must be finite, not negative, and positive in the middle"),
        (
            np.ones(7),
            ValueError,
            r"kernel must not be longer than the label axis, got 7 values for 6 bins\. Use at most 5",
        ),
        ([], ShapeError, r"kernel must be a row of numbers, got shape \(0,\)"),
        (3.0, ShapeError, r"kernel must be a row of numbers, got shape \(\)"),
        ([[1, 2, 1]], ShapeError, r"kernel must be a row of numbers, got shape \(1, 3\)"),
        ([[1, 2], [1]], ValueError, "kernel must form one array of numbers"),
        ("gaussian", TypeError, "kernel must be integers or floats"),
        (None, TypeError, "kernel must be integers or floats"),
        (np.array([1j]), TypeError, "kernel must be integers or floats"),
    ],
)
def test_windows_of_one_s_own_are_checked(kernel: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^smooth: {message}"):
        smooth(np.ones(6), kernel)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "values must be integers or floats"),
        ("abc", "values must be integers or floats"),
        ([[1], [1, 2]], "values must form one array"),
        ([], r"values must hold at least one value, got shape \(0,\)"),
        (torch.ones(3).to_sparse(), "values must be dense"),
    ],
)
def test_smooth_refuses_other_values(values: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^smooth: {message}"):
        smooth(values, [1.0])


def test_smooth_and_its_matrix_refuse_other_settings() -> None:
    with pytest.raises(ValueError, match=r"^smooth: edges must be one of 'reflect', 'mirror', 'zero', got 'wrap'"):
        smooth(np.ones(3), [1.0], edges="wrap")  # type: ignore[arg-type]
    for number in (None, "3", 3.0):
        with pytest.raises(TypeError, match=r"^smoothing_matrix: num_bins must be a whole number"):
            smoothing_matrix(number, [1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [0.1, 0.2, 0.7, 1.0, 3.0, 2500.0])
def test_windows_in_label_units_are_those_in_bins(width: float) -> None:
    bins = Bins.uniform(0, 20 * width, count=20)
    density = LabelDensity(bins, np.arange(20) ** 2)
    in_bins = (gaussian(5, 2), gaussian(5, 2, folded=True), laplace(5, 2), triangular(5))
    in_labels = (
        gaussian(5 * width, 2 * width, unit="label"),
        gaussian(5 * width, 2 * width, folded=True, unit="label"),
        laplace(5 * width, 2 * width, unit="label"),
        triangular(5 * width, unit="label"),
    )
    for one, other in zip(in_bins, in_labels, strict=True):
        np.testing.assert_array_equal(other.over(bins), one)
        np.testing.assert_array_equal(density.smooth(other).counts, density.smooth(one).counts)
        assert LDS(bins, kernel=other).settings["kernel"].tolist() == one.tolist()
        assert FDS(bins, 2, kernel=other).settings["kernel"].tolist() == one.tolist()


def test_a_window_in_label_units_fits_any_width() -> None:
    window = gaussian(10, 4, unit="label")
    assert [len(window.over(Bins.uniform(0, 60, width=width))) for width in (0.5, 1, 2, 3, 4, 30)] == [
        21,
        11,
        5,
        3,
        3,
        1,
    ]
    assert pickle.loads(pickle.dumps(window)) == window != gaussian(10, 5, unit="label")
    grid = Bins.grid(Bins.uniform(0, 60, width=2), Bins.uniform(0, 60, width=5))
    assert [len(part) for part in LDS(grid, kernel=window).kernels or ()] == [5, 3]
    density = LabelDensity(bins := Bins.uniform(0, 60, width=2), np.arange(30) ** 2 + 1)
    offsets = []
    for kernel in (window, gaussian(5, 2)):
        model = LongTailModel(torch.nn.Identity(), 2, bins, density=density)
        model.set_prior("uniform", 1.0, kernel=kernel)
        offsets.append(model.readout.adjuster.offset.tolist())
    assert offsets[0] == offsets[1]


def test_a_window_in_label_units_needs_bins_of_one_width() -> None:
    for bins in (Bins.from_edges([0, 1, 3, 9]), Bins.classes(9)):
        with pytest.raises(
            ValueError, match=r"^LDS: a kernel in label units needs bins of one width, and not classes, got"
        ):
            LDS(bins, kernel=gaussian(3, 1, unit="label"))
    with pytest.raises(TypeError, match=r"^smooth: kernel must be integers or floats, got LabelWindow"):
        smooth(np.ones(9), gaussian(3, 1, unit="label"))
    with pytest.raises(ValueError, match=r"^gaussian: unit must be one of 'label', 'bin', got 'years'"):
        gaussian(3, 1, unit="years")  # type: ignore[call-overload]
    for size, sigma in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="must be > 0"):
            gaussian(size, sigma, unit="label")


def test_a_window_that_is_too_long_is_told_in_its_own_unit() -> None:
    bins = Bins.uniform(0, 100, width=5)
    with pytest.raises(ValueError, match=r"got 41 bins for an axis of 20\. Use a size of at most 95\.$"):
        LDS(bins, kernel=gaussian(200, 10, unit="label"))
    assert LDS(bins, kernel=gaussian(95, 10, unit="label")).fit([3.0, 50.0]).sample_weight([3.0])[0] > 0
