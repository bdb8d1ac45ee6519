from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.array
import dask.bag
import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch.utils.data import DataLoader, TensorDataset

from dir_toolkit import LDS, Bins, LabelDensity, gaussian, triangular
from dir_toolkit.errors import DirToolkitWarning, LabelError, NotFittedError, ShapeError
from dir_toolkit.labels import counting as module

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


# ---- large arrays ----


UNEVEN = Bins.from_edges([-1, -0.5, 0, 0.1, 0.3, 0.7, 1, 4])


@pytest.mark.parametrize("bins", [UNEVEN, Bins.uniform(-1, 4, count=7), Bins.uniform(-1, 4, width=0.1)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8, ">f4", np.longdouble])
def test_labels_at_and_beside_the_edges_count_where_index_places_them(bins: Bins, dtype: Any) -> None:
    edges = bins.edges.astype(dtype)
    if edges.dtype.kind == "f":
        low, high = np.array([-np.inf, np.inf], dtype)
        edges = np.concatenate([edges, np.nextafter(edges[1:], low), np.nextafter(edges[:-1], high)])
    labels = np.tile(edges[(edges >= -1) & (edges <= 4)], 20)
    index = bins.index(labels)
    expected = [int((index == b).sum()) for b in range(len(bins))]
    assert sum(expected) == labels.size > len(bins)
    assert LabelDensity.count(labels, bins).counts.tolist() == expected


@pytest.mark.parametrize("bins", [BINS, Bins.quantile(LABELS, 6), Bins.quantile(LABELS, 290)])
def test_labels_off_an_axis_that_are_many_follow_the_option(bins: Bins) -> None:
    labels = np.concatenate([LABELS.ravel(), [-5, 50, bins.edges[0], bins.edges[-1]]])
    inside = LabelDensity.count(LABELS.ravel(), bins, outside="drop").counts
    ends = np.zeros_like(inside)
    ends[[0, -1]] = 1
    np.testing.assert_array_equal(LabelDensity.count(labels, bins, outside="drop").counts, inside + ends)
    clipped = LabelDensity.count(LABELS.ravel(), bins, outside="clip").counts
    np.testing.assert_array_equal(LabelDensity.count(labels, bins, outside="clip").counts, clipped + 2 * ends)
    labels[7] = np.nan
    for outside in ("raise", "clip", "drop"):
        with pytest.raises(LabelError, match="labels must"):
            LabelDensity.count(labels, bins, outside=outside)


@pytest.mark.parametrize("layout", [np.asarray, np.asfortranarray, lambda a: a[::-1, ::2], np.ma.array])
def test_an_array_is_counted_in_views_that_stay_in_a_cache(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 40)
    labels, sizes = layout(LABELS), []

    class Watched(Bins):
        def tally(self, labels: np.ndarray, *options: Any, **names: Any) -> np.ndarray:
            sizes.append(labels.size)
            assert np.shares_memory(labels, LABELS) or layout is np.asfortranarray
            return super().tally(labels, *options, **names)

    expected = np.histogram(np.asarray(labels), BINS.edges)[0]
    np.testing.assert_array_equal(LabelDensity.count(labels, Watched(BINS.edges)).counts, expected)
    assert max(sizes) <= 40
    assert sum(sizes) == labels.size
    pairs = np.asarray(LABELS).reshape(-1, 2)
    grid = Bins.grid(BINS, UNEVEN)
    monkeypatch.setattr(module, "_PIECE", 2**17)
    whole = LabelDensity.count(pairs, grid, outside="clip")
    monkeypatch.setattr(module, "_PIECE", 1)  # and no pair is cut
    assert LabelDensity.count(pairs, grid, outside="clip") == whole


def test_an_error_tells_the_place_in_the_whole_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 40)
    labels = LABELS.copy()
    labels[3, 17] = labels[5, 2] = 12
    with pytest.raises(LabelError, match=r"got 12\.0 at index \[3, 17\] \(2 such labels\)"):
        LabelDensity.count(labels, BINS)


# ---- dask ----


def in_chunks(labels: np.ndarray = LABELS) -> Any:
    return dask.array.from_array(labels, chunks=(4, 20))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_each_chunk_is_read_once_and_only_counts_leave_its_task(scheduler: str) -> None:
    read = []

    def block(block_id: tuple[int, ...]) -> np.ndarray:
        read.append(block_id)
        return np.full((1000,), float(block_id[0]))

    lazy = dask.array.map_blocks(block, chunks=((1000,) * 6,), dtype=float, meta=np.empty(0))
    made = []

    class Recorder(dask.callbacks.Callback):
        def _posttask(self, key: Any, result: Any, *_: Any) -> None:
            made.append(np.size(result))

    with Recorder(), dask.config.set(scheduler=scheduler):
        density = LabelDensity.count(xr.DataArray(lazy), BINS)
    assert density.counts.tolist() == [1000] * 6 + [0] * 4
    assert sorted(read) == [(i,) for i in range(6)]
    assert made
    assert max(made) == len(BINS) + 2  # the counts of the bins, of labels at the end, and of all


def test_chunks_of_unknown_size_are_counted() -> None:
    lazy = in_chunks()
    assert np.isnan(lazy[lazy > 3].shape[0])
    assert LabelDensity.count(lazy[lazy > 3], BINS) == LabelDensity.count(LABELS[LABELS > 3], BINS)
    rows = LABELS[:, 0] > 3
    assert LabelDensity.count(lazy[lazy[:, 0] > 3], BINS) == LabelDensity.count(LABELS[rows], BINS)
    with pytest.raises(ValueError, match="labels must hold at least one label, got none"):
        LabelDensity.count(lazy[lazy > 99], BINS)


def test_pairs_of_labels_are_counted_whole() -> None:
    grid, pairs = Bins.grid(BINS, BINS), LABELS.reshape(-1, 2)
    whole = LabelDensity.count(pairs, grid)
    cut = dask.array.from_array(pairs, chunks=(40, 1))
    assert LabelDensity.count(cut, grid) == whole
    some = pairs[:, 0] > 3
    assert LabelDensity.count(cut[cut[:, 0] > 3], grid) == LabelDensity.count(pairs[some], grid)
    message = (
        r"^LabelDensity\.count: the last axis, of 2 numbers per label, must not be in chunks of unknown size, "
        r"got \(nan, nan\)\. Call labels\.compute_chunk_sizes\(\)\.$"
    )
    unknown = cut[:, cut[0] >= 0]
    with pytest.raises(ValueError, match=message):
        LabelDensity.count(unknown, grid)
    unknown.compute_chunk_sizes()
    assert LabelDensity.count(unknown, grid) == whole


def test_a_number_in_dask_is_one_label() -> None:
    assert LabelDensity.count(dask.array.from_array(np.array(3.5)), BINS).counts[3] == 1
    assert LabelDensity.count([in_chunks(), LABELS[0], in_chunks()], BINS).counts.sum() == 650


@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_bad_labels_are_named_with_their_chunk(outside: Any) -> None:
    labels = LABELS.copy()
    labels[5, 41] = np.nan
    with pytest.raises(LabelError, match=r"labels of chunk \(1, 2\) must not be NaN, got nan at index \[1, 1\]"):
        LabelDensity.count(in_chunks(labels), BINS, outside=outside)
    labels[5, 41] = 12
    if outside != "raise":
        expected = LabelDensity.count(labels, BINS, outside=outside)
        assert LabelDensity.count(in_chunks(labels), BINS, outside=outside) == expected
        return
    message = r"labels of chunk \(1, 2\) must lie on the label axis \[0, 10\], got 12\.0 at index \[1, 1\] \(1 such"
    with pytest.raises(LabelError, match=message):
        LabelDensity.count(in_chunks(labels), BINS)


def test_what_is_no_labels_in_dask_is_refused() -> None:
    broken = in_chunks().map_blocks(
        lambda chunk, block_id: chunk.astype(str) if block_id == (1, 0) else chunk, dtype=float, meta=np.empty((0, 0))
    )
    with pytest.raises(TypeError, match=r"labels of chunk \(1, 0\) must be integers or floats, got dtype <U32"):
        LabelDensity.count(broken, BINS)
    with pytest.raises(ShapeError, match=r"labels of chunk \(\d, \d\) must be \(\.\.\., 2\)"):
        LabelDensity.count(in_chunks(), Bins.grid(BINS, BINS))
    message = r"^LabelDensity\.count: labels in dask must be an array or a column, got Bag\. Use \.to_dataframe\(\)\.$"
    with pytest.raises(TypeError, match=message):
        LabelDensity.count(dask.bag.from_sequence([1.0, 2.0]), BINS)


def test_a_chunk_that_fails_raises_its_own_error() -> None:
    def unreadable(chunk: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id == (0, 1):
            raise OSError("disk is gone")
        return chunk

    with pytest.raises(OSError, match=r"^disk is gone$"):
        LabelDensity.count(in_chunks().map_blocks(unreadable, dtype=float, meta=np.empty((0, 0))), BINS)


@pytest.mark.filterwarnings("ignore")  # of a cluster's own
def test_a_cluster_sends_counts_and_no_labels() -> None:
    distributed = pytest.importorskip("distributed")

    def block(block_id: tuple[int, ...]) -> np.ndarray:
        return np.full(100_000, float(block_id[0]))

    def sent() -> int:
        """Bytes that workers have sent until now, to each other and to us."""
        return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())

    lazy = dask.array.map_blocks(block, chunks=((100_000,) * 6,), dtype=float, meta=np.empty(0))
    with (
        dask.config.set({"distributed.scheduler.work-stealing": False}),
        distributed.Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as client,
    ):
        kept = client.persist(lazy)
        for labels in (lazy, kept):  # made when they are counted, or lying with the workers
            before = sent()
            assert LabelDensity.count(xr.DataArray(labels), BINS).counts.tolist() == [100_000] * 6 + [0] * 4
            assert 0 < sent() - before < lazy.nbytes / 1000
        before = sent()
        kept.compute()
        assert sent() - before >= lazy.nbytes
        with pytest.raises(LabelError, match=r"labels of chunk \(5,\) must lie on the label axis \[0, 5\], got 5\.5"):
            LabelDensity.count(lazy + 0.5, Bins.uniform(0, 5, width=1))


# ---- two processes ----


SHARED = Bins.uniform(0, 10, width=1)


def rank_main(rank: int) -> dict[str, Any]:
    ordered = np.sort(LABELS, axis=None)  # so that each rank lacks some bins
    mine = ordered[:213] if rank == 0 else ordered[213:]
    own = LabelDensity.count(mine, SHARED)
    nothing = LabelDensity(SHARED, [0] * 10)
    smoothed = own.smooth(triangular(3)) if rank == 0 else own
    alone, together = [dist.new_group([r]) for r in range(2)][rank], dist.new_group([0, 1])
    other = Bins.uniform(0, 5, count=10) if rank else SHARED
    with pytest.raises(ValueError, match="all ranks must count over the same bins") as caught:
        LabelDensity(other, own.counts).all_reduce()
    return {
        "own": torch.tensor(own.counts),
        "both": torch.tensor(own.all_reduce().counts),
        "one empty": torch.tensor((own if rank else nothing).all_reduce().counts),
        "one smoothed": torch.tensor(smoothed.all_reduce().counts),
        "grid": torch.tensor(LabelDensity(Bins.grid(SHARED), own.counts).all_reduce().counts),
        "a group of one": torch.tensor(own.all_reduce(group=alone).counts),
        "a group of both": torch.tensor(own.all_reduce(group=together).counts),
        "told": str(caught.value),
    }


def test_two_processes_with_uneven_shares_equal_one(two_ranks: Callable[..., list[Any]]) -> None:
    returned = two_ranks(rank_main)
    first, second = (outcome["own"] for outcome in returned)
    assert (first == 0).any()
    assert (second == 0).any()
    for outcome in returned:
        assert outcome["both"].dtype == torch.int64
        assert outcome["both"].tolist() == outcome["grid"].tolist() == COUNTS.tolist()
        assert torch.equal(outcome["one empty"], second)
        assert torch.equal(outcome["a group of one"], outcome["own"])
        assert torch.equal(outcome["a group of both"], outcome["both"])
        smoothed = LabelDensity(SHARED, first.numpy()).smooth(triangular(3)).counts + second.numpy()
        np.testing.assert_allclose(outcome["one smoothed"].numpy(), smoothed, rtol=1e-12)
        assert outcome["told"].endswith("got others on ranks [1] than rank 0.")
    alone = LabelDensity.count(LABELS, BINS)
    assert alone.all_reduce() is alone


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
def test_nan_is_refused(outside: Any) -> None:
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
        ([1, 2], ShapeError, r"counts must be \(3,\), one per bin, got shape \(2,\)"),
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
    with pytest.raises(
        ValueError, match=r"the other density must be over the same bins, got .* for <Bins: 10 from 0 to 10>"
    ):
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


def test_the_prior_is_that_worked_out_by_hand() -> None:
    density = LabelDensity(Bins.classes(3), [3, 1, 0])
    assert density.prior().tolist() == [0.75, 0.25, 0]
    assert density.prior(floor=1).tolist() == [0.6, 0.2, 0.2]
    assert density.prior(floor=0.5).sum() == pytest.approx(1)
    assert LabelDensity(Bins.classes(2), [0, 0]).prior(floor=1).tolist() == [0.5, 0.5]
    assert LabelDensity(Bins.classes(2), [1e308, 1e308]).prior().tolist() == [0.5, 0.5]
    assert LabelDensity(Bins.classes(2), [2**62, 2**62]).prior(floor=1).tolist() == [0.5, 0.5]
    message = r"^LabelDensity\.prior: at least one label must have been counted, got none, all were outside the bins"
    with pytest.raises(ValueError, match=message):
        LabelDensity.count([99.0], BINS, outside="drop").prior()
    with pytest.raises(ValueError, match="floor must be >= 0, got -1"):
        density.prior(floor=-1)
    with pytest.raises(TypeError, match="floor must be a number"):
        density.prior(floor="1")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*effective sample size")
def test_uneven_bins_are_read_by_the_unit() -> None:
    bins = Bins.from_edges([0, 1, 2, 4, 12])
    density = LabelDensity(bins, [30, 10, 20, 80])  # 30, 10, 10, 10 per unit; mean width 3
    assert density.regions(many=50, few=31).tolist() == ["many", "few", "few", "few"]
    assert density.regions(relative=True).tolist() == ["many", "medium", "medium", "medium"]  # 140 in 12 units
    assert LabelDensity(bins, [5, 1, 23, 71]).regions(relative=True, few=13).tolist() == [
        "medium",
        "few",
        "many",
        "many",
    ]
    smoothed = density.smooth(triangular(3)).counts / np.diff(bins.edges)
    np.testing.assert_allclose(smoothed, [25, 15, 10, 10], rtol=1e-12)
    np.testing.assert_allclose(LabelDensity(bins, [0, 0, 0, 8]).prior(floor=3), np.array([1, 1, 2, 8]) / 12)
    labels = np.random.default_rng(0).exponential(10, 50_000)
    labels = labels[labels < 60]
    fine = LDS(Bins.uniform(0, 60, width=1), scheme="inverse").fit(labels)
    for coarse in (Bins.from_edges([0, 1, 2, 5, 10, 20, 60]), Bins.quantile([*labels, 0.0, 60.0], 20)):
        weights = LDS(coarse, kernel=None, scheme="inverse").fit(labels)
        place = np.array([0.5, 7.0, 15.0])
        ratio = weights.sample_weight(place) / fine.sample_weight(place)
        assert ratio.max() / ratio.min() < 2
        assert weights.sample_weight(place)[2] > 2 * weights.sample_weight(place)[0]


def test_a_bin_with_more_than_half_of_the_labels_is_told_once() -> None:
    heavy = np.random.default_rng(1).lognormal(0, 2, 2000)
    bins = Bins.uniform(0, float(np.ceil(heavy.max())), count=50)
    message = (
        r"^(LabelDensity\.count|LDS\.fit): 9\d% of the labels lie in one of 50 bins, from 0 to .* Take the logarithm"
    )
    for count in (lambda: LabelDensity.count(heavy, bins), lambda: LDS(bins).fit(heavy)):
        with pytest.warns(DirToolkitWarning, match=message) as seen:
            count()
        assert len(seen) == 1
    grid = Bins.grid(Bins.classes(2), bins)
    with pytest.warns(DirToolkitWarning, match="of the labels lie in one of 50 bins"):
        LabelDensity.count(np.stack([heavy > 1, heavy], 1).astype(float), grid)
    for quiet in (Bins.quantile(heavy, 20), Bins.uniform(0, float(np.ceil(heavy.max())), count=9)):
        LabelDensity.count(heavy, quiet)
    LabelDensity.count([0] * 90 + [1] * 10, Bins.classes(12))


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (DataLoader(TensorDataset(torch.rand(8, 3), torch.rand(8))), "a DataLoader, whose batches hold inputs too"),
        ((torch.rand(8, 3, 2), torch.rand(8)), r"arrays of shapes \(8, 3, 2\), \(8,\)"),
        ([[torch.rand(8, 3), torch.rand(8)]], r"arrays of shapes \(8, 3\), \(8,\)"),
        (((x, y) for x, y in zip(torch.rand(8, 3), torch.rand(8), strict=True)), "arrays together with single numbers"),
        ([(torch.rand(3), 1.0)], "arrays together with single numbers"),
        (
            iter(DataLoader(TensorDataset(torch.rand(8, 3), torch.rand(8)))),
            "a DataLoader, whose batches hold inputs too",
        ),
        (
            list(DataLoader(TensorDataset(torch.rand(8, 1), torch.rand(8, 1)), 4)),
            r"arrays of shapes \(4, 1\), \(4, 1\)",
        ),
        (((x, x) for x in torch.rand(3, 5)), r"arrays of shapes \(5,\), \(5,\)"),
        ((np.ones((8, 3)), np.ones((8, 1))), r"arrays of shapes \(8, 3\), \(8, 1\)"),
    ],
)
def test_inputs_are_not_counted_with_labels(labels: Any, got: str) -> None:
    message = rf"^LabelDensity\.count: labels must be labels alone.* got {got}\. Pass .*\(y for x, y in loader\)"
    with pytest.raises(TypeError, match=message):
        LabelDensity.count(labels, BINS)


def test_maps_of_one_height_are_labels() -> None:
    maps = [LABELS.ravel()[: 4 * width].reshape(4, width) for width in (5, 7, 7)]
    assert LabelDensity.count(maps, BINS).counts.sum() == 76
    assert LabelDensity.count([LABELS[0], LABELS[0]], BINS).counts.sum() == 2 * len(LABELS[0])


def test_counts_that_int64_cannot_hold_are_refused() -> None:
    most = LabelDensity(Bins.classes(2), np.array([2**63 - 1, 1], dtype=np.uint64))
    assert repr(most) == "<LabelDensity: 9.22337e+18 labels in 2 bins>"
    assert most.prior().tolist() == [1.0, 2.0**-63]
    with pytest.raises(ValueError, match=r"^LabelDensity: counts must add up to less than 2\^63, got more"):
        _ = most + most
    with pytest.raises(ValueError, match=rf"^LabelDensity: counts must be below 2\^63, got {2**63}\. Pass floats"):
        LabelDensity(Bins.classes(2), np.array([2**63, 1], dtype=np.uint64))


# ---- weighted ----


def test_counts_are_weighed_as_the_loss_weighs_them() -> None:
    density = LabelDensity(Bins.classes(3), [900, 100, 0])
    weighted = density.weighted(LDS(Bins.classes(3), scheme="inverse").fit(density))
    np.testing.assert_allclose(weighted.counts, [500, 500, 0], rtol=1e-6)
    assert weighted.counts.dtype == np.float64
    labels = np.random.default_rng(0).exponential(2, 500).clip(0, 10)
    for options in ({}, {"scheme": "dense"}, {"scheme": "none"}, {"clip": (3, 20)}):
        lds = LDS(BINS, **options).fit(labels)
        per_bin = [lds.sample_weight(labels)[BINS.index(labels) == b].sum() for b in range(10)]
        np.testing.assert_allclose(LabelDensity.count(labels, BINS).weighted(lds).counts, per_bin, rtol=1e-12)


def test_weights_over_other_bins_are_averaged_over_evenly_spread_labels() -> None:
    own = LDS(Bins.from_edges([0, 1, 4, 10]), kernel=None, scheme="inverse").fit([0.5] * 8 + [2] * 4 + [5])
    a, b, c = own.table[:-1].double().tolist()
    over = Bins.from_edges([0, 0.5, 3, 10])
    assert LabelDensity(over, [4, 5, 7]).weighted(own).counts.tolist() == pytest.approx(
        [4 * a, 5 * (0.5 * a + 2 * b) / 2.5, 7 * (b + 6 * c) / 7], rel=1e-12
    )
    grid, coarse = Bins.grid(over, Bins.classes(2)), Bins.grid(own.bins, Bins.classes(2))
    joint = LDS(coarse, kernel=None).fit([[0.5, 0]] * 8 + [[2, 1]] * 4 + [[5, 0]])
    points = np.random.default_rng(0).uniform(0, 10, (200_000, 1))
    weights = joint.sample_weight(np.hstack([points, np.ones_like(points)]))
    means = [weights[over.index(points[:, 0]) == i].mean() for i in range(3)]
    given = LabelDensity(grid, [1] * 6).weighted(joint).counts.reshape(3, 2)[:, 1]
    np.testing.assert_allclose(given, means, rtol=0.02)


def test_weights_of_a_shorter_axis_follow_outside() -> None:
    short, long = Bins.uniform(0, 5, width=1), LabelDensity(BINS, [1] * 10)
    labels = [0.5, 0.5, 1.5, 4.5]
    assert long.weighted(LDS(short, kernel=None, outside="drop").fit(labels)).counts[5:].tolist() == [0] * 5
    clipped = LDS(short, kernel=None, outside="clip").fit(labels)
    assert long.weighted(clipped).counts[5:].tolist() == [clipped.table[4].double().item()] * 5
    raising = LDS(short, kernel=None).fit(labels)
    message = r"beyond its axis <Bins: 5 from 0 to 5>, got 1 labels in bin 5 of .* outside=\"clip\"\.$"
    with pytest.raises(ValueError, match=rf"^LabelDensity\.weighted: lds must weigh labels {message}"):
        long.weighted(raising)
    inside = LabelDensity(BINS, [1] * 5 + [0] * 5)
    assert inside.weighted(raising).counts[:5].tolist() == raising.table[:-1].double().tolist()
    # Edges that differ by rounding are one.
    rounded = LDS(Bins.from_edges([0.0, 0.1, 0.3]), kernel=None).fit([0.05, 0.2])
    hardly = LabelDensity(Bins.from_edges([0.0, 0.1, 0.1 + 0.2]), [1, 1])
    assert hardly.weighted(rounded).counts.tolist() == pytest.approx(rounded.table[:-1].tolist(), rel=1e-12)


def test_other_weights_are_refused() -> None:
    density = LabelDensity(BINS, COUNTS)
    with pytest.raises(TypeError, match=r"^LabelDensity\.weighted: lds must be an LDS, got list"):
        density.weighted([1.0] * 10)  # type: ignore[arg-type]
    with pytest.raises(NotFittedError, match=r"^LabelDensity\.weighted: weights are not fitted yet"):
        density.weighted(LDS(BINS))
    with pytest.raises(
        ValueError, match=r"^LabelDensity\.weighted: lds must be of the same kind of labels as the density"
    ):
        density.weighted(LDS(Bins.classes(10)).fit([1]))


def test_limits_of_regions_may_be_larger_than_floats() -> None:
    density = LabelDensity(Bins.classes(3), [0, 1, 2**62])
    assert density.regions(many=10**400, few=1).tolist() == ["unseen", "medium", "medium"]
    assert density.regions(many=10**400, few=10**400).tolist() == ["unseen", "few", "few"]


def test_regions_include_their_very_limits() -> None:
    density = LabelDensity(Bins.classes(8), [101, 100, 99, 20, 19, 1, 0, 10**6])
    expected = ["many", "medium", "medium", "medium", "few", "few", "unseen", "many"]
    assert density.regions().tolist() == expected
    assert density.regions(many=1, few=1).tolist() == ["many"] * 5 + ["medium", "unseen", "many"]
    smoothed = LabelDensity(Bins.classes(3), [100.5, 19.5, 0.25])
    assert smoothed.regions().tolist() == ["many", "few", "few"]


def test_relative_regions_are_those_of_any_number_of_labels() -> None:
    for times in (1, 10**6):
        density = LabelDensity(Bins.classes(4), np.array([30, 8, 2, 0]) * times)  # an even spread gives 10 each
        assert density.regions(relative=True).tolist() == ["many", "medium", "medium", "unseen"]
        assert density.regions(relative=True, many=300, few=21).tolist() == ["medium", "medium", "few", "unseen"]
    assert (LabelDensity(Bins.classes(7), [3] * 7).regions(relative=True) == "medium").all()
    assert LabelDensity(Bins.classes(2), [0, 0]).regions(relative=True).tolist() == ["unseen", "unseen"]
    with pytest.raises(TypeError, match="relative must be a bool, got int"):
        density.regions(relative=1)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("of", [np.asarray, iter, lambda labels: dask.array.from_array(labels, chunks=2)])
def test_labels_at_the_end_of_an_axis_of_whole_numbers_are_told(of: Any) -> None:
    labels, ages = np.array([3.0, 100.0, 99.0, 100.0]), Bins.uniform(0, 100, width=1, integer=True)
    given = (np.array([one]) for one in labels) if of is iter else of(labels)
    with pytest.warns(DirToolkitWarning, match=r"^LabelDensity\.count: labels equal to 100, .* \(2 of them\), count"):
        density = LabelDensity.count(given, ages)
    assert density.counts[-1] == 3
    for bins, outside in (
        (ages, "clip"),
        (Bins.uniform(0, 100, width=1), "raise"),
        (Bins.uniform(0, 101, width=1, integer=True), "raise"),
    ):
        LabelDensity.count(labels, bins, outside=outside)  # type: ignore[arg-type]
    LabelDensity.count([*labels, 500.0], Bins(ages.edges, centers=ages.centers, unbounded=True))
    quarters = Bins([0.0, 0.25, 0.5, 0.75, 1.0], centers=np.array([0.0, 0.25, 0.5, 0.75]))
    LabelDensity.count([0.1, 1.0], quarters)
