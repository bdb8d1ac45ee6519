"""What counting a hundred million labels costs, against np.histogram over the same edges within one run.

    python benchmarks/density.py

Labels lie in a file of 400 MB, mapped into memory, and the same behind a dask-backed xarray. Memory is what a fresh
process takes at most on top of what it held before, the mapped file apart. Linux only. Takes about a minute.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import dask.array
import numpy as np
import xarray as xr
from timing import Report, medians, milliseconds

import dir_toolkit as dt

NUM_LABELS, NUM_BINS, CHUNK = 100_000_000, 121, 5_000_000
EVEN = dt.Bins.uniform(0, NUM_BINS, width=1)
# Its edges are float32, since labels are compared with edges in their own precision, and by NumPy in float64.
UNEVEN = dt.Bins.from_edges(np.linspace(0, 11, NUM_BINS + 1, dtype=np.float32) ** 2)


def write(path: Path) -> None:
    labels = np.lib.format.open_memmap(path, "w+", np.float32, (NUM_LABELS,))
    generator = np.random.default_rng(0)
    for start in range(0, NUM_LABELS, CHUNK):
        labels[start : start + CHUNK] = generator.gamma(4, 8, CHUNK).clip(0, NUM_BINS)


def lazily(path: Path) -> xr.DataArray:
    """The labels chunk by chunk, each read when it is asked for."""

    def read(block_id: tuple[int, ...]) -> np.ndarray:
        return np.load(path, mmap_mode="r")[block_id[0] * CHUNK : (block_id[0] + 1) * CHUNK]

    chunks = ((CHUNK,) * (NUM_LABELS // CHUNK),)
    return xr.DataArray(dask.array.map_blocks(read, chunks=chunks, dtype=np.float32, meta=np.empty(0, np.float32)))


def ways(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Counts of the same labels, by name."""
    labels, lazy = np.load(path, mmap_mode="r"), lazily(path)
    return {
        "np.histogram": lambda: np.histogram(labels, EVEN.edges)[0],
        "memmap": lambda: dt.LabelDensity.count(labels, EVEN).counts,
        "np.histogram, uneven": lambda: np.histogram(labels, UNEVEN.edges)[0],
        "memmap, uneven": lambda: dt.LabelDensity.count(labels, UNEVEN).counts,
        "dask.array.histogram": lambda: dask.array.histogram(lazy.data, EVEN.edges)[0].compute(),
        "dask": lambda: dt.LabelDensity.count(lazy, EVEN).counts,
    }


def held() -> float:
    """MiB that this process holds now, mapped files apart."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def extra_memory(function: Callable[[], object]) -> float:
    """The most MiB that a call holds on top of what was held before, looked at each millisecond."""
    before, most, done = held(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return most[0]


def main(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.npy"
        write(path)
        functions = ways(path)
        counts = {name: function() for name, function in functions.items()}
        for name in functions:
            np.testing.assert_array_equal(counts[name], counts["np.histogram" + ", uneven" * ("uneven" in name)])
        times = medians(functions, repeats=7, warmup=0)
        for ours, theirs in (
            ("memmap", "np.histogram"),
            ("memmap, uneven", "np.histogram, uneven"),
            ("dask", "dask.array.histogram"),
        ):
            detail = milliseconds({ours: times[ours], theirs: times[theirs]})
            what = f"LabelDensity.count of a {ours} / {theirs}, {NUM_LABELS:,} labels"
            report.add(what, times[ours] / times[theirs], "<= 1.1", detail)
        for name in functions:
            command = [sys.executable, __file__, name, str(path)]
            extra = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            goal = "" if "histogram" in name else "<= 64"
            report.add(f"peak memory of counting, {name}", extra, goal, unit="MiB")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(extra_memory(ways(Path(sys.argv[2]))[sys.argv[1]]))
    else:
        main(Report())
