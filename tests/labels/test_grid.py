"""Grids of label axes, and what counts and weighs over them: a grid of one axis must be that axis, to the bit."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.ndimage import correlate1d

from dir_toolkit import LDS, Bins, LabelDensity, gaussian, triangular
from dir_toolkit.errors import CheckpointError, LabelError, ShapeError
from dir_toolkit.labels.grid import BinGrid

AGE, POSE, SEX = Bins.uniform(0, 10, width=1), Bins.from_edges([-90, -30, 0, 5, 45, 90, 100]), Bins.classes(2)
GRID = Bins.grid(AGE, POSE, SEX)
RNG = np.random.default_rng(0)
LABELS = np.stack([RNG.gamma(2, 1.2, 400).clip(0, 10), RNG.uniform(-90, 100, 400), RNG.integers(0, 2, 400)], -1)


def oracle(grid: BinGrid, labels: np.ndarray) -> list[int]:
    """Joint bins by a loop over labels and all joint bins."""
    cells = list(itertools.product(*(range(len(axis)) for axis in grid.axes)))
    result = []
    for label in labels:
        cell = tuple(int(axis.index([value])[0]) for axis, value in zip(grid.axes, label, strict=True))
        result.append(cells.index(cell))
    return result


# Building and placing


def test_a_grid_places_labels_as_worked_out_by_hand() -> None:
    grid = Bins.grid(Bins.classes(2), Bins.uniform(0, 3, width=1))
    assert (len(grid), grid.shape) == (6, (2, 3))
    assert grid.axes == (Bins.classes(2), Bins.uniform(0, 3, width=1))
    assert grid.centers.tolist() == [[0, 0.5], [0, 1.5], [0, 2.5], [1, 0.5], [1, 1.5], [1, 2.5]]
    assert grid.index([[0, 0], [1, 0], [1, 2.5], [0, 3]]).tolist() == [0, 3, 5, 2]
    assert repr(grid) == "<BinGrid: Bins.classes(2) x <Bins: 3 from 0 to 3>>"


def test_index_is_that_of_a_naive_loop_in_every_form() -> None:
    expected = oracle(GRID, LABELS)
    assert len(set(expected)) > 30
    assert GRID.index(LABELS).tolist() == expected
    assert GRID.index(LABELS.tolist()).tolist() == expected
    assert GRID.index(np.asfortranarray(LABELS)).tolist() == expected
    for dtype in (torch.float64, torch.float32):
        index = GRID.index(torch.from_numpy(LABELS).to(dtype))
        assert (index.tolist(), index.dtype) == (expected, torch.int64)
    maps = GRID.index(torch.from_numpy(LABELS).view(4, 10, 10, 3))
    assert (maps.shape, maps.flatten().tolist()) == ((4, 10, 10), expected)
    assert GRID.index(LABELS[0]).shape == ()
    assert GRID.index(np.empty((0, 3))).shape == (0,)
    assert GRID.index(GRID.centers).tolist() == list(range(len(GRID)))


def test_labels_and_tensors_that_come_in_are_not_written_to() -> None:
    labels = torch.from_numpy(LABELS.copy()).requires_grad_()
    GRID.index(labels, "clip")
    assert torch.equal(labels.detach(), torch.from_numpy(LABELS))


def test_labels_outside_follow_the_option_on_each_axis() -> None:
    grid = Bins.grid(AGE, Bins.uniform(0, 2, width=1))
    labels = [[-1.0, 1.5], [3.0, 9.0], [3.0, 1.0], [99.0, -99.0]]
    assert grid.index(labels, "clip").tolist() == [1, 7, 7, 18]
    assert grid.index(labels, "drop").tolist() == [-1, -1, 7, -1]
    message = r"^BinGrid\.index: labels\[\.\.\., 1\] must lie on the label axis \[0, 2\], got 9\.0 at index \[1\] \(1 "
    with pytest.raises(LabelError, match=message + "such labels.*pass outside="):
        grid.index([[0.0, 0.0], labels[1]])
    with pytest.raises(ValueError, match="outside must be one of"):
        grid.index(labels, "ignore")  # type: ignore[call-overload]


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_nan_and_broken_classes_raise_by_dimension(outside: Any) -> None:
    with pytest.raises(LabelError, match=r"labels\[\.\.\., 1\] must not be NaN, got nan at index \[0\]"):
        GRID.index([[1.0, np.nan, 0.0]], outside)
    with pytest.raises(LabelError, match=r"labels\[\.\.\., 2\] must be whole numbers"):
        GRID.index(torch.tensor([[1.0, 0.0, 0.5]]), outside)


@pytest.mark.parametrize("labels", [np.zeros((5, 2)), np.zeros((3, 1)), np.zeros(4), np.array(1.0), torch.zeros(3, 4)])
def test_the_last_axis_must_be_the_dimensions(labels: Any) -> None:
    with pytest.raises(ShapeError, match=r"labels must be \(\.\.\., 3\), one number per dimension in the last"):
        GRID.index(labels)


def test_placing_labels_on_an_accelerator_never_waits_for_it() -> None:
    """A meta tensor stands for one on an accelerator: reading its values would raise."""
    labels = torch.empty(9, 3, device="meta")
    assert GRID.index(labels, "drop").device.type == "meta"
    assert GRID.rows(labels, "raise").shape == (9,)
    with pytest.raises(ValueError, match="must hold values, got a tensor on the meta device"):
        GRID.index(labels)  # this one has to look


def test_what_is_no_axis_or_too_many_bins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^(Bins\.)?grid: axes must hold at least one Bins, got none"):
        Bins.grid()
    with pytest.raises(TypeError, match=r"^(Bins\.)?grid: axes\[1\] must be a Bins, got int"):
        Bins.grid(AGE, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^(Bins\.)?grid: axes\[0\] must be a Bins, got BinGrid"):
        Bins.grid(GRID)  # type: ignore[arg-type]
    message = r"^(Bins\.)?grid: the number of joint bins must be at most 10,000,000, got 16000000\. Widen the bins"
    with pytest.raises(ValueError, match=message):
        Bins.grid(Bins.classes(4000), Bins.classes(4000))


def test_copies_are_equal_and_centers_never_change() -> None:
    for other in (copy.deepcopy(GRID), pickle.loads(pickle.dumps(GRID)), BinGrid.from_dict(GRID.to_dict())):
        assert other == GRID
        assert hash(other) == hash(GRID)
    assert Bins.grid(POSE, AGE) != Bins.grid(AGE, POSE)
    assert Bins.grid(AGE) != AGE
    with pytest.raises(ValueError, match="read-only"):
        GRID.centers[0, 0] = 3
    with pytest.raises(ValueError, match=r"BinGrid\.from_dict: values must have the keys \['axes'\], got missing"):
        BinGrid.from_dict({"edges": []})
    with pytest.raises(TypeError, match=r"BinGrid\.from_dict: axes must be a list or a tuple, got int"):
        BinGrid.from_dict({"axes": 3})


def test_code_that_knows_one_axis_is_told_so() -> None:
    assert not hasattr(GRID, "edges")
    with pytest.raises(AttributeError, match=r"edges belong to one axis, .* Use grid\.axes\[0\]\."):
        _ = GRID.edges


# Decoding


def test_expectation_is_that_of_a_naive_sum() -> None:
    shares = torch.rand(7, 2, len(GRID), dtype=torch.float64).softmax(-1)
    naive = sum(shares[..., b, None] * torch.from_numpy(GRID.centers[b].copy()) for b in range(len(GRID)))
    torch.testing.assert_close(GRID.expectation(shares), naive, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(GRID.expectation(shares.numpy()), naive, rtol=1e-12, atol=1e-12)
    assert GRID.expectation(shares.float()).dtype == torch.float32
    assert GRID.expectation(shares[0, 0]).shape == (3,)
    shares.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: GRID.expectation(logits.softmax(-1)), shares[:1, :1])


def test_expectation_refuses_what_is_no_distribution() -> None:
    with pytest.raises(ShapeError, match=r"^BinGrid\.expectation: probabilities must be \(\.\.\., 120\), one per bin"):
        GRID.expectation(torch.ones(3, 12) / 12)
    with pytest.raises(ValueError, match="must sum to one along the last axis"):
        GRID.expectation(torch.ones(120))
    with pytest.raises(TypeError, match="probabilities must be floats"):
        GRID.expectation(torch.ones(120, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be integers or floats"):
        GRID.expectation("abc")  # type: ignore[call-overload]


# One axis


@pytest.mark.parametrize("axis", [AGE, POSE, SEX, Bins.uniform(0.3, 7.1, count=40)])
def test_a_grid_of_one_axis_is_that_axis_to_the_bit(axis: Bins) -> None:
    grid = Bins.grid(axis)
    labels = torch.from_numpy(RNG.choice(axis.centers, 300))
    assert torch.equal(grid.index(labels[:, None]), axis.index(labels))
    assert grid.centers[:, 0].tolist() == axis.centers.tolist()
    shares = torch.rand(50, len(axis)).softmax(-1)
    assert torch.equal(grid.expectation(shares)[:, 0], axis.expectation(shares))
    window = triangular(3 if len(axis) > 2 else 1)
    one, joint = LabelDensity.count(labels, axis), LabelDensity.count(labels[:, None], grid)
    assert joint.counts.tobytes() == one.counts.tobytes()
    assert joint.smooth(window).counts.tobytes() == one.smooth(window).counts.tobytes()
    assert joint.prior(floor=1).tobytes() == one.prior(floor=1).tobytes()
    assert joint.regions(many=9, few=3).tolist() == one.regions(many=9, few=3).tolist()
    for scheme in ("inverse", "sqrt_inverse", "effective_number", "dense"):
        flat, over = (LDS(bins, kernel=window, scheme=scheme) for bins in (axis, grid))
        assert torch.equal(over.fit(joint)(labels[:, None]), flat.fit(one)(labels))
    for reference in ("inverse", "sqrt_inverse"):
        flat, over = (LDS.reference(bins, kernel=window, scheme=reference) for bins in (axis, grid))
        assert torch.equal(over.fit(joint)(labels[:, None]), flat.fit(one)(labels))


# Counting


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        LABELS.tolist(),
        torch.from_numpy(LABELS),
        LABELS.reshape(4, 10, 10, 3),
        [LABELS[:150], torch.from_numpy(LABELS[150:])],
        (chunk for chunk in np.array_split(LABELS, 7)),
        xr.DataArray(LABELS),
        dask.array.from_array(LABELS, chunks=(90, 1)),
        xr.DataArray(dask.array.from_array(LABELS, chunks=(150, 2))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_kinds_of_labels_are_counted_alike(labels: Any) -> None:
    density = LabelDensity.count(labels, GRID)
    expected = np.bincount(oracle(GRID, LABELS), minlength=len(GRID))
    assert density.counts.tolist() == expected.tolist()
    assert (
        density.counts.reshape(GRID.shape).sum((1, 2)).tolist() == LabelDensity.count(LABELS[:, 0], AGE).counts.tolist()
    )


def test_blocks_of_dask_stay_blocks() -> None:
    heights = []

    def block(block_id: tuple[int, int]) -> np.ndarray:
        heights.append(block_id[0])
        return np.full((4, 1), float(block_id[1]))

    lazy = dask.array.map_blocks(block, chunks=((4,) * 5, (1, 1)), dtype=float, meta=np.empty((0, 0)))
    counts = LabelDensity.count(lazy, Bins.grid(Bins.classes(2), Bins.classes(2))).counts
    assert counts.tolist() == [0, 20, 0, 0]
    assert sorted(heights) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_counting_refuses_what_it_refuses_on_an_axis() -> None:
    assert LabelDensity.count([[99.0, 0.0, 0.0], [1.0, 0.0, 0.0]], GRID, outside="drop").counts.sum() == 1
    with pytest.raises(LabelError, match=r"^LabelDensity\.count: labels\[\.\.\., 0\] must lie on the label axis"):
        LabelDensity.count([[99.0, 0.0, 0.0]], GRID)
    with pytest.raises(ValueError, match="labels must hold at least one label"):
        LabelDensity.count(np.empty((0, 3)), GRID)
    with pytest.raises(ShapeError, match=r"^LabelDensity\.count: labels must be \(\.\.\., 3\)"):
        LabelDensity.count(LABELS[:, 0], GRID)
    with pytest.raises(ShapeError, match=r"counts must be \(B,\), one per bin, got shape \(10, 6, 2\)"):
        LabelDensity(GRID, np.ones(GRID.shape))
    with pytest.raises(ValueError, match="the other density must be over the same bins"):
        LabelDensity.count(LABELS[:, :1], Bins.grid(AGE)) + LabelDensity.count(LABELS[:, 0], AGE)


# Smoothing and weights

GRID2 = Bins.grid(AGE, POSE)
DENSITY = LabelDensity.count(LABELS[:, :2], GRID2)


@pytest.mark.parametrize(("edges", "mode"), [("reflect", "reflect"), ("mirror", "mirror"), ("zero", "constant")])
def test_smoothing_is_scipy_s_along_each_axis(edges: Any, mode: str) -> None:
    wide, narrow = gaussian(5, 2), triangular(3)
    widths = GRID2.relative_widths.reshape(GRID2.shape)
    counts = DENSITY.counts.reshape(GRID2.shape) / widths
    for kernel, windows in ((wide, (wide, wide)), ((wide, narrow), (wide, narrow)), (([1.0], narrow), ([1.0], narrow))):
        expected = counts
        for axis, window in enumerate(windows):
            expected = correlate1d(expected, np.divide(window, np.sum(window)), axis=axis, mode=mode)
        smoothed = DENSITY.smooth(kernel, edges=edges)
        assert smoothed.counts.tobytes() == (expected * widths).tobytes()
        assert smoothed.bins == GRID2
    assert (DENSITY.smooth(wide).counts / widths.ravel()).sum() == pytest.approx(counts.sum())
    assert DENSITY.smooth(np.stack([narrow, narrow])) == DENSITY.smooth(narrow)


def test_smoothing_is_that_worked_out_by_hand() -> None:
    density = LabelDensity(Bins.grid(Bins.classes(3), Bins.classes(3)), [0, 0, 0, 0, 16, 0, 0, 0, 0])
    assert density.smooth([triangular(3)] * 2).counts.tolist() == [1, 2, 1, 2, 4, 2, 1, 2, 1]


def test_one_window_smooths_the_continuous_axes_only() -> None:
    grid = Bins.grid(AGE, SEX, POSE)
    counts = np.arange(len(grid))
    density = LabelDensity(grid, counts)
    expected = density.smooth([triangular(3), [1.0], triangular(3)])
    assert density.smooth(triangular(3)) == expected
    assert density.smooth([triangular(3), triangular(1), triangular(3)]) == expected
    for made, window in ((LDS, gaussian(5, 2)), (LDS.reference, gaussian(5, 2, folded=True))):
        windows = made(grid).kernels
        assert [of_axis.tolist() for of_axis in windows] == [window.tolist(), [1.0], window.tolist()]
        assert [of_axis.tolist() for of_axis in made(grid, kernel=window).kernels] == [w.tolist() for w in windows]
        assert made(Bins.grid(SEX, Bins.classes(9))).kernels is None
    shares = LDS(Bins.grid(SEX, Bins.uniform(0, 1, count=10)), scheme="inverse").fit([[0, 0.5]] * 90 + [[1, 0.5]] * 9)
    assert shares(torch.tensor([[0.0, 0.5], [1.0, 0.5]])).tolist() == pytest.approx([0.55, 5.5], rel=1e-3)


def test_one_window_for_a_grid_of_classes_is_refused() -> None:
    grid = Bins.grid(Bins.classes(3), Bins.classes(3))
    message = r"^LDS: kernel must be None for a grid of classes.* got one window\. .* or one window per axis\."
    with pytest.raises(ValueError, match=message):
        LDS(grid, kernel=triangular(3))
    assert LDS(grid, kernel=[triangular(3), [1.0]]).kernels is not None
    assert LDS(Bins.grid(Bins.classes(3)), kernel=triangular(3)).kernels is not None


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (gaussian(7, 2), r"kernel must not be longer than the label axis, got 7 values for 6 bins"),
        (
            [gaussian(3, 1)] * 3,
            r"kernel must be one window, or one for each of 2 label axes, got 3 windows\. Use \[1\.0\]",
        ),
        ((gaussian(3, 1), [1.0, 1.0]), "kernel must have odd length"),
        ((gaussian(3, 1), 1.0), r"kernel must be a row of numbers, got shape \(\)"),
        ([], "kernel must be a row of numbers"),
        (3.0, "kernel must be a row of numbers"),
    ],
)
def test_windows_are_checked(kernel: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^LabelDensity\.smooth: {message}"):
        DENSITY.smooth(kernel)
    with pytest.raises((TypeError, ValueError), match=rf"^LDS: {message}"):
        LDS(GRID2, kernel=kernel)
    with pytest.raises(ValueError, match="kernel must be a row of numbers, got shape"):
        LDS(AGE, kernel=[[1.0, 2.0, 1.0]])


@pytest.mark.parametrize("order", ["smooth_first", "scheme_first"])
def test_weights_are_those_of_a_naive_loop(order: Any) -> None:
    window = gaussian(3, 1)
    lds = LDS(GRID2, kernel=(window, [1.0]), scheme="sqrt_inverse", order=order).fit(LABELS[:, :2])
    counts = (DENSITY.counts / GRID2.relative_widths).reshape(GRID2.shape)
    before = np.sqrt(counts) if order == "scheme_first" else counts
    smoothed = correlate1d(before, window / window.sum(), axis=0, mode="reflect")
    density = (smoothed if order == "scheme_first" else np.sqrt(smoothed)).ravel()
    index = oracle(GRID2, LABELS[:, :2])
    naive = np.array([1 / density[i] for i in index])
    naive *= len(naive) / naive.sum()
    np.testing.assert_allclose(lds.sample_weight(LABELS[:, :2]), naive, rtol=1e-6)  # the table is float32
    weights = lds(torch.from_numpy(LABELS[:, :2]).view(4, 100, 2))
    assert (weights.shape, weights.dtype) == ((4, 100), torch.float32)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)


def test_labels_twice_weigh_as_labels_counted_twice() -> None:
    twice = LDS(GRID2, kernel=triangular(3)).fit(LabelDensity(GRID2, DENSITY.counts * 2))
    seen = LDS(GRID2, kernel=triangular(3)).fit(np.concatenate([LABELS, LABELS])[:, :2])
    assert twice.table.numpy().tobytes() == seen.table.numpy().tobytes()  # the last weight is NaN


def test_state_and_dropped_labels_over_a_grid() -> None:
    lds = LDS(GRID2, kernel=triangular(3), outside="drop").fit(DENSITY)
    assert lds(torch.tensor([[0.5, 1.0], [-1.0, 1.0], [5.0, 500.0]]))[1:].tolist() == [0, 0]
    other = LDS(GRID2, kernel=triangular(3), outside="drop")
    other.load_state_dict(lds.state_dict())
    assert torch.equal(other.table, lds.table)
    assert "kernel=[[0.5, 1.0, 0.5], [0.5, 1.0, 0.5]]" in repr(lds)
    with pytest.raises(CheckpointError, match="the saved weights must be over the same bins, got <BinGrid"):
        LDS(Bins.grid(POSE, AGE), kernel=triangular(3)).load_state_dict(lds.state_dict())
    with pytest.raises(CheckpointError, match="the saved weights must be over the same bins"):
        LDS(Bins.classes(60)).load_state_dict(lds.state_dict())
    with pytest.raises(ValueError, match="the density must be over the same bins"):
        LDS(GRID2, kernel=None).fit(LabelDensity.count([1], AGE))
    with pytest.raises(ShapeError, match=r"^LDS: labels must be \(\.\.\., 2\)"):
        lds(torch.zeros(4))


# One label a pixel


def test_maps_of_labels_are_counted_and_weighed_like_their_pixels() -> None:
    maps = torch.from_numpy(LABELS[:, 0]).view(4, 10, 10)
    density = LabelDensity.count(maps, AGE)
    assert density == LabelDensity.count(maps.flatten(), AGE)
    lds = LDS(AGE).fit(density)
    assert torch.equal(lds(maps), lds(maps.flatten()).view(4, 10, 10))
    holes = maps.clone()
    holes[:, 0] = -1
    dropping = LDS(AGE, outside="drop").fit(holes)
    assert torch.equal(dropping.table[:-1], LDS(AGE).fit(holes[:, 1:]).table[:-1])
    weights = dropping(holes)
    assert not weights[:, 0].any()
    assert weights[:, 1:].mean().item() == pytest.approx(1, abs=1e-6)
