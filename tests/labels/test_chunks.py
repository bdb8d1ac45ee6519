from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import torch
import xarray as xr

from dir_toolkit import LDS, Bins, LabelDensity
from dir_toolkit.errors import LabelError, NotFittedError

BINS = Bins.uniform(0, 10, width=1)
LABELS = np.random.default_rng(0).uniform(0, 10, (9, 50)) ** 2 / 10


def in_chunks(labels: np.ndarray = LABELS) -> Any:
    return dask.array.from_array(labels, chunks=(4, 20))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("scheme", ["inverse", "sqrt_inverse", "effective_number", "dense"])
def test_weights_of_chunks_are_those_of_the_whole(scheme: Any, scheduler: str) -> None:
    lazy = in_chunks()
    lds = LDS(BINS, scheme=scheme, beta=0.9).fit(lazy)
    weights = lds.sample_weight(xr.DataArray(lazy))
    assert isinstance(weights, dask.array.Array)
    assert weights.chunks == lazy.chunks
    assert weights.dtype == np.float64
    with dask.config.set(scheduler=scheduler):
        np.testing.assert_array_equal(
            weights, LDS(BINS, scheme=scheme, beta=0.9).fit(LABELS).sample_weight(LABELS), strict=True
        )


def test_the_mean_weight_is_one_over_all_chunks_and_not_in_each() -> None:
    skewed = np.sort(LABELS, axis=None)  # rare labels in the last chunks
    lazy = dask.array.from_array(skewed, chunks=50)
    weights = LDS(BINS, scheme="inverse").fit(lazy).sample_weight(lazy)
    assert weights.mean().compute() == pytest.approx(1, rel=1e-6)  # weights of bins are float32
    of_chunks = [chunk.mean() for chunk in np.split(weights.compute(), 9)]
    assert of_chunks[0] < 0.6
    assert of_chunks[-1] > 1.5


def test_nothing_is_read_until_weights_are_computed_and_then_once() -> None:
    read = []

    def block(block_id: tuple[int, ...]) -> np.ndarray:
        read.append(block_id)
        return np.full(1000, float(block_id[0]))

    lazy = dask.array.map_blocks(block, chunks=((1000,) * 6,), dtype=float, meta=np.empty(0))
    lds = LDS(BINS, kernel=None).fit(np.arange(6.0))
    weights = lds.sample_weight(lazy)
    lds.fit([0.5, 1.5, 1.5])  # changes no weights that were given out
    assert read == []
    assert weights.sum().compute() == pytest.approx(6000)
    assert sorted(read) == [(i,) for i in range(6)]


def test_labels_beyond_memory_are_weighed_in_the_memory_of_a_few_chunks(tmp_path: Path) -> None:
    size, chunks = 2**16, 64

    def block(block_id: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(block_id[0]).gamma(2, 1, size).clip(0, 9.9)

    lazy = dask.array.map_blocks(block, chunks=((size,) * chunks,), dtype=float, meta=np.empty(0))

    def stream() -> None:
        lds = LDS(BINS).fit(lazy)
        dask.array.to_npy_stack(tmp_path / "weights", lds.sample_weight(lazy))

    def hold() -> None:
        np.asarray(lazy)

    stream()  # imports what it needs
    assert peak(stream) < lazy.nbytes / 8
    assert peak(hold) > lazy.nbytes  # so that the bound can fail
    written = dask.array.from_npy_stack(tmp_path / "weights")
    assert written.chunks == lazy.chunks
    assert written.mean().compute() == pytest.approx(1, rel=1e-6)


def peak(function: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy hold at once, on one thread.

    Python collects the cycles that dask leaves the later, the more objects other tests keep. So these are set apart.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
    tracemalloc.start()
    try:
        with dask.config.set(scheduler="synchronous"):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.unfreeze()


def test_labels_of_several_axes_have_one_weight_each() -> None:
    grid, pairs = Bins.grid(BINS, BINS), LABELS.reshape(-1, 2)
    lds = LDS(grid, outside="drop").fit(pairs)
    expected = lds.sample_weight(pairs)
    for lazy in (dask.array.from_array(pairs, chunks=(40, 1)), dask.array.from_array(pairs, chunks=(40, 2))):
        weights = lds.sample_weight(lazy)
        assert weights.chunks == (lazy.chunks[0],)
        np.testing.assert_array_equal(weights, expected, strict=True)
    maps = in_chunks(LABELS).reshape(9, 25, 2)
    np.testing.assert_array_equal(lds.sample_weight(maps), expected.reshape(9, 25), strict=True)
    assert lds.sample_weight(dask.array.from_array(pairs[0])).compute() == expected[0]


def test_chunks_of_unknown_size_are_weighed() -> None:
    lazy, lds = in_chunks(), LDS(BINS).fit(LABELS)
    weights = lds.sample_weight(lazy[lazy > 3])
    assert np.isnan(weights.shape[0])
    assert sorted(weights.compute()) == sorted(lds.sample_weight(LABELS[LABELS > 3]))
    assert lds.sample_weight(dask.array.from_array(np.array(3.5))).compute() == lds.sample_weight(3.5)


def test_bad_labels_are_named_with_their_chunk_and_others_follow_the_options() -> None:
    labels = LABELS.copy()
    labels[5, 41] = 12
    labels[0, 0] = np.nan
    fitted = LDS(BINS).fit(LABELS)
    with pytest.raises(LabelError, match=r"labels of chunk \(1, 2\) must lie on the label axis .* at index \[1, 1\]"):
        fitted.sample_weight(in_chunks(labels))[4:].compute()
    with pytest.raises(LabelError, match=r"labels of chunk \(0, 0\) must not be NaN"):
        fitted.sample_weight(in_chunks(labels))[:4].compute()
    options: Any = {"outside": "drop", "missing": "drop"}
    weights = LDS(BINS, **options).fit(in_chunks(labels)).sample_weight(in_chunks(labels)).compute()
    np.testing.assert_array_equal(weights, LDS(BINS, **options).fit(labels).sample_weight(labels), strict=True)
    assert weights[5, 41] == weights[0, 0] == 0
    assert weights.sum() == pytest.approx(labels.size - 2, rel=1e-6)


def test_weights_that_are_not_fitted_are_refused_at_once() -> None:
    with pytest.raises(NotFittedError, match=r"^LDS\.sample_weight: weights are not fitted yet"):
        LDS(BINS).sample_weight(in_chunks())
    with pytest.raises(TypeError, match=r"^LDS\.sample_weight: labels in dask must be an array or a column, got Bag"):
        LDS(BINS).fit(LABELS).sample_weight(pytest.importorskip("dask.bag").from_sequence([1.0, 2.0]))


@pytest.mark.filterwarnings("ignore")  # of a cluster's own
def test_a_cluster_gives_the_same_weights() -> None:
    distributed = pytest.importorskip("distributed")
    lazy = in_chunks()
    with distributed.Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None):
        lds = LDS(BINS).fit(lazy)
        weights = lds.sample_weight(lazy).compute()
    np.testing.assert_array_equal(weights, LDS(BINS).fit(LABELS).sample_weight(LABELS), strict=True)


def table(rows: int = 450) -> Any:
    """Rows in dask, in six partitions, with two labels each."""
    frame = pytest.importorskip("pandas").DataFrame(LABELS.reshape(-1, 2)[: rows // 2], columns=["y", "data"])
    pytest.importorskip("pyarrow")
    return pytest.importorskip("dask.dataframe").from_pandas(frame, npartitions=6)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of dask's own
def test_a_column_of_parquet_gets_a_column_of_weights(tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "labels")
    import dask.dataframe as dd

    lazy = dd.read_parquet(tmp_path / "labels")
    own = lazy.compute()
    density = LabelDensity.count(lazy["y"], BINS)
    assert density == LabelDensity.count(own["y"], BINS)
    lds = LDS(BINS).fit(lazy["y"])
    lazy["weight"] = lds.sample_weight(lazy["y"])  # also where reading one column takes several files at once
    lazy.to_parquet(tmp_path / "weighted")
    written = dd.read_parquet(tmp_path / "weighted")
    assert written.npartitions == 6
    np.testing.assert_array_equal(written["weight"].compute(), LDS(BINS).fit(own["y"]).sample_weight(own["y"]))


def test_columns_of_several_axes_are_labels_too() -> None:
    grid, lazy = Bins.grid(BINS, BINS), table()
    own = lazy.compute()
    assert LabelDensity.count(lazy, grid) == LabelDensity.count(own, grid)
    lds = LDS(grid).fit(lazy)
    lazy["weight"] = lds.sample_weight(lazy)
    np.testing.assert_array_equal(lazy["weight"], lds.sample_weight(own))
    assert LabelDensity.count(lazy[["y", "data"]], BINS) == LabelDensity.count(own, BINS)
    np.testing.assert_array_equal(
        LDS(BINS).fit(own).sample_weight(lazy[["y"]]), LDS(BINS).fit(own).sample_weight(own[["y"]])
    )
    with pytest.raises(LabelError, match=r"labels of a partition must lie on the label axis \[0, 1\]"):
        LDS(Bins.uniform(0, 1, width=0.1)).fit([0.5]).sample_weight(lazy["y"]).compute()


@pytest.mark.parametrize("missing", ["raise", "drop"])
@pytest.mark.parametrize("kind", ["Int64", "Float64", "double[pyarrow]", "int64[pyarrow]", "category"])
def test_columns_of_any_kind_of_number_are_counted_and_weighed(kind: str, missing: Any) -> None:
    table()  # which skips without packages
    import dask.dataframe as dd
    import pandas as pd

    own = pd.Series([1, 2, 2, 4, None if missing == "drop" else 3], dtype=kind, index=list("abcde"))
    lazy = dd.from_pandas(own, npartitions=2)
    options: Any = {"missing": missing}
    density = LabelDensity.count(own, BINS, **options)
    assert LabelDensity.count(lazy, BINS, **options) == density
    lds = LDS(BINS, **options).fit(lazy)
    np.testing.assert_array_equal(lds.sample_weight(lazy), lds.sample_weight(own))
    assert lds.sample_weight(lazy).compute().index.tolist() == list("abcde")


def test_the_index_of_a_column_is_counted_and_weighed() -> None:
    lazy, numbers = table(18).index, np.arange(9)
    lds = LDS(BINS).fit(lazy)
    assert LabelDensity.count(lazy, BINS) == LabelDensity.count(numbers, BINS)
    np.testing.assert_array_equal(lds.sample_weight(lazy), lds.sample_weight(numbers))


def test_an_array_of_zarr_gets_an_array_of_weights(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    xr.Dataset({"y": ("sample", LABELS.ravel())}).chunk(sample=60).to_zarr(tmp_path / "labels.zarr", consolidated=False)
    lazy = xr.open_zarr(tmp_path / "labels.zarr", consolidated=False)
    lds = LDS(BINS).fit(lazy.y)
    weights = lazy.y.copy(data=lds.sample_weight(lazy.y)).to_dataset(name="weight")
    weights.to_zarr(tmp_path / "labels.zarr", mode="a", consolidated=False)
    written = xr.open_zarr(tmp_path / "labels.zarr", consolidated=False)
    assert written.weight.chunks == lazy.y.chunks
    np.testing.assert_array_equal(written.weight, lds.sample_weight(LABELS.ravel()), strict=True)
    assert torch.allclose(lds(torch.from_numpy(LABELS.ravel())).double(), torch.from_numpy(written.weight.values))
