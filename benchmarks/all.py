"""All benchmarks of time and memory, one after the other, as one table and one xarray result.

    python benchmarks/all.py

Prints ratios as they come and writes ``table.md``, ``results.nc`` and the pictures of growth.py into
``runs/benchmarks``. Each runs in a process of its own, since threads that one leaves behind slow the next. Takes about
a quarter of an hour on two idle CPU cores, 400 MB of disk for a while, and Linux. Rivals are measured where they are
installed: ``pip install denseweight mapie torchvision tsai``.
"""

from __future__ import annotations

import argparse
import importlib
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from timing import Report, Row

NAMES = ("startup", "lds", "density", "fds", "heads", "losses", "images", "conformal", "regressor", "growth")
OUT = Path("runs/benchmarks")


def as_markdown(rows: dict[str, list[Row]], machine: str) -> str:
    lines = [machine, "", "| benchmark | what | value | goal | |", "|---|---|---:|---|---|"]
    for name, those in rows.items():
        lines += [f"| {name} | {row.what} | {row.value:.2f} {row.unit} | {row.goal} | {row.verdict} |" for row in those]
    return "\n".join(lines) + "\n"


def as_result(rows: dict[str, list[Row]], machine: str) -> xr.Dataset:
    """Over ``row``: the value, with benchmark, what, unit, goal and detail beside it."""
    flat = [(name, row) for name, those in rows.items() for row in those]
    words = {field: [getattr(row, field) for _, row in flat] for field in ("what", "unit", "goal", "detail", "verdict")}
    return xr.Dataset(
        {"value": ("row", np.array([row.value for _, row in flat]))},
        coords={"benchmark": ("row", [name for name, _ in flat]), **{k: ("row", v) for k, v in words.items()}},
        attrs={"title": "dir_toolkit benchmarks", "machine": machine},
    )


def measured(name: str) -> list[Row]:
    report = Report()
    importlib.import_module(name).main(report)
    return report.rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    machine = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, numpy {np.__version__}, "
        f"Python {platform.python_version()}, CPU"
    )
    print(machine)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in NAMES:
        print(f"\n{name}", flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows[name] = process.submit(measured, name).result()
        (OUT / "table.md").write_text(as_markdown(rows, machine), encoding="utf-8")
        as_result(rows, machine).to_netcdf(OUT / "results.nc", engine="scipy")


if __name__ == "__main__":
    main()
