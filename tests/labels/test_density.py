from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
import xarray as xr

from dir_toolkit import Bins, LabelDensity, gaussian, triangular
from dir_toolkit.errors import LabelError, ShapeError

BINS = Bins.uniform(0, 10, width=1)
LABELS = np.random.default_rng(0).uniform(0, 10, size=(6, 50))
COUNTS = np.histogram(LABELS, BINS.edges)[0]


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        LABELS.ravel().tolist(),
        tuple(LABELS.ravel()),
        torch.from_numpy(LABELS),
        torch.from_numpy(LABELS).requires_grad_(),
        list(LABELS),
        [LABELS[0].tolist(), torch.from_numpy(LABELS[1]), xr.DataArray(LABELS[2:])],
        xr.DataArray(LABELS),
        xr.Variable(("a", "b"), LABELS),
        dask.array.from_array(LABELS, chunks=(4, 7)),
        xr.DataArray(dask.array.from_array(LABELS, chunks=(4, 7))),
        np.asfortranarray(LABELS[::-1, ::-1]),
        LABELS.astype(">f8"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_kinds_of_labels_are_counted_alike(labels: Any) -> None:
    density = LabelDensity.count(labels, BINS)
    np.testing.assert_array_equal(density.counts, COUNTS)
    assert density.counts.dtype == np.int64


def test_generators_nest_and_merge() -> None:
    chunks = (chunk for chunk in np.array_split(LABELS.ravel(), 7))
    density = LabelDensity.count(chunks, BINS)
    assert density == LabelDensity.count(LABELS, BINS)
    assert LabelDensity.count(((row for row in half) for half in (LABELS[:2], LABELS[2:])), BINS) == density
    merged = LabelDensity.count(LABELS[:1], BINS) + LabelDensity.count(LABELS[1:], BINS)
    assert merged == density
    assert merged.counts.dtype == np.int64


def test_one_piece_at_a_time_is_held() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def pieces() -> Iterator[np.ndarray]:
        for _ in range(5):
            assert sum(ref() is not None for ref in alive) <= 1
            piece = np.full(10, 3.0)
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    assert LabelDensity.count(pieces(), BINS).counts[3] == 50
    assert not any(ref() is not None for ref in alive)


def test_blocks_of_dask_are_computed_one_by_one() -> None:
    computed = []

    def block(block_id: tuple[int, ...]) -> np.ndarray:
        computed.append(block_id)
        return np.full((4,), float(block_id[0]))

    lazy = dask.array.map_blocks(block, chunks=((4,) * 5,), dtype=float, meta=np.empty(0))
    assert LabelDensity.count(xr.DataArray(lazy), BINS).counts.tolist() == [4] * 5 + [0] * 5
    assert len(computed) == 5


def test_labels_outside_follow_the_option() -> None:
    labels = [-1.0, 3.0, 12.0]
    assert LabelDensity.count(labels, BINS, outside="clip").counts[[0, 3, 9]].tolist() == [1, 1, 1]
    assert LabelDensity.count(labels, BINS, outside="drop").counts.sum() == 1
    assert LabelDensity.count([99.0], BINS, outside="drop").counts.sum() == 0
    with pytest.raises(LabelError, match="labels must lie on the label axis"):
        LabelDensity.count(labels, BINS)
    with pytest.raises(ValueError, match="outside must be one of"):
        LabelDensity.count(labels, BINS, outside="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_nan_raises(outside: Any) -> None:
    for labels in ([np.nan], torch.tensor([np.nan]), [np.ones(2), np.array([1, np.nan])]):
        with pytest.raises(LabelError, match="labels must not be NaN"):
            LabelDensity.count(labels, BINS, outside=outside)


@pytest.mark.parametrize("labels", [[], np.empty(0), torch.empty(0), iter([]), [[], []], xr.DataArray(np.empty(0))])
def test_no_label_at_all_raises(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"^LabelDensity\.count: labels must hold at least one label, got none\.$"):
        LabelDensity.count(labels, BINS)


@pytest.mark.parametrize(
    "labels", [None, "abc", {1: 2}, 3.0, object(), range(3), (float(x) for x in range(3)), ["a", "b"], [True]]
)
def test_what_is_no_labels_is_refused_by_name(labels: Any) -> None:
    with pytest.raises(TypeError, match=r"labels must be (an array or an iterable of arrays|integers or floats), got"):
        LabelDensity.count(labels, BINS)


@pytest.mark.parametrize("labels", [np.array(["2020-01-01"], dtype="datetime64[D]"), np.ma.array([1, 2], mask=[0, 1])])
def test_dates_and_masked_labels_are_refused_by_name(labels: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"labels must (be integers or floats|not be masked)"):
        LabelDensity.count(labels, BINS)


@pytest.mark.parametrize(
    ("counts", "kind", "message"),
    [
        ([1, 2], ShapeError, r"counts must have one number a bin, shape \(3,\), got \(2,\)"),
        ([1, -2, 0], ValueError, "counts must not be negative, got a minimum of -2"),
        ([1, np.nan, 0], ValueError, r"counts must be finite, got nan at index \[1\]"),
        ([1, np.inf, 0], ValueError, "counts must be finite"),
        ("abc", TypeError, "counts must be integers or floats"),
        ([True, True, True], TypeError, "counts must be integers or floats"),
        ([[1], [1, 2]], ValueError, "counts must form one array of numbers"),
    ],
)
def test_counts_of_one_s_own_are_checked(counts: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^LabelDensity: {message}"):
        LabelDensity(Bins.classes(3), counts)


@pytest.mark.parametrize("bins", [None, 3, [0, 1], "abc"])
def test_bins_must_be_bins(bins: Any) -> None:
    with pytest.raises(TypeError, match=r"^LabelDensity: bins must be a Bins or a BinGrid, got"):
        LabelDensity(bins, np.ones(3))
    with pytest.raises(TypeError, match=r"^LabelDensity\.count: bins must be a Bins or a BinGrid, got"):
        LabelDensity.count([1], bins)


def test_only_densities_over_the_same_bins_add() -> None:
    density = LabelDensity.count(LABELS, BINS)
    with pytest.raises(ValueError, match="only densities over the same bins can be added, got <Bins: 10 from 0 to 10>"):
        density + LabelDensity.count([1], Bins.classes(10))
    with pytest.raises(TypeError):
        density + 1  # type: ignore[operator]


def test_counts_never_change_and_neither_do_those_of_copies() -> None:
    own = np.array([1, 2, 3])
    density = LabelDensity(Bins.classes(3), own)
    own[0] = 9
    assert density.counts.tolist() == [1, 2, 3]
    for other in (density, copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
        assert other == density
        with pytest.raises(ValueError, match="read-only"):
            other.counts[0] = 7
    assert density != LabelDensity(Bins.classes(3), [1, 2, 4])
    assert density != LabelDensity(Bins.uniform(0, 3, width=1), [1, 2, 3])
    with pytest.raises(TypeError, match="unhashable"):
        hash(density)


def test_smoothed_counts_are_an_effective_number_of_labels() -> None:
    density = LabelDensity(Bins.classes(5), [0, 0, 8, 0, 0])
    smoothed = density.smooth(triangular(3))
    np.testing.assert_allclose(smoothed.counts, [0, 2, 4, 2, 0], rtol=1e-14)
    assert smoothed.counts.dtype == np.float64
    assert density.smooth(gaussian(5, 2)).counts.sum() == pytest.approx(8)
    assert density.counts.tolist() == [0, 0, 8, 0, 0]
    with pytest.raises(ValueError, match="kernel must not be longer than the label axis"):
        density.smooth(np.ones(7))


def test_prior_by_hand() -> None:
    density = LabelDensity(Bins.classes(3), [3, 1, 0])
    assert density.prior().tolist() == [0.75, 0.25, 0]
    assert density.prior(floor=1).tolist() == [0.6, 0.2, 0.2]
    assert density.prior(floor=0.5).sum() == pytest.approx(1)
    assert LabelDensity(Bins.classes(2), [0, 0]).prior(floor=1).tolist() == [0.5, 0.5]
    assert LabelDensity(Bins.classes(2), [1e308, 1e308]).prior().tolist() == [0.5, 0.5]
    assert LabelDensity(Bins.classes(2), [2**62, 2**62]).prior(floor=1).tolist() == [0.5, 0.5]
    message = r"^LabelDensity\.prior: at least one label must have been counted, got none\. All labels lay outside"
    with pytest.raises(ValueError, match=message):
        LabelDensity.count([99.0], BINS, outside="drop").prior()
    with pytest.raises(ValueError, match="floor must be >= 0, got -1"):
        density.prior(floor=-1)
    with pytest.raises(TypeError, match="floor must be a number"):
        density.prior(floor="1")  # type: ignore[arg-type]


def test_regions_at_their_very_limits() -> None:
    density = LabelDensity(Bins.classes(8), [101, 100, 99, 20, 19, 1, 0, 10**6])
    expected = ["many", "medium", "medium", "medium", "few", "few", "unseen", "many"]
    assert density.regions().tolist() == expected
    assert density.regions(many=1, few=1).tolist() == ["many"] * 5 + ["medium", "unseen", "many"]
    smoothed = LabelDensity(Bins.classes(3), [100.5, 19.5, 0.25])
    assert smoothed.regions().tolist() == ["many", "few", "few"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"few": 0}, "few must be at least 1, got 0"),
        ({"many": 10, "few": 20}, "many must be at least 20, got 10"),
        ({"many": 1.5}, r"many must be a whole number, got 1\.5"),
        ({"few": None}, "few must be a whole number, got None"),
    ],
)
def test_regions_refuse_other_limits(limits: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^LabelDensity.regions: {message}"):
        LabelDensity(Bins.classes(1), [1]).regions(**limits)
