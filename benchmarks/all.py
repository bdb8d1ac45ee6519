"""All benchmarks, one after the other, as one table and one xarray result.

    python benchmarks/all.py                     # or: python benchmarks/all.py fds losses

Prints ratios as they come and writes ``table.md``, ``results.nc`` and the pictures of growth.py into
``runs/benchmarks``. Takes about twelve minutes on two idle CPU cores, 400 MB of disk for a while, and Linux.
"""

from __future__ import annotations

import argparse
import importlib
import platform
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from timing import Report, Row

NAMES = ("startup", "lds", "density", "fds", "heads", "losses", "images")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*NAMES, "growth"]
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(known)}; by default all")
    names = parser.parse_args().names or known
    if unknown := set(names) - set(known):
        parser.error(f"names must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    machine = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, numpy {np.__version__}, "
        f"Python {platform.python_version()}, CPU"
    )
    print(machine)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in names:
        print(f"\n{name}", flush=True)
        module = importlib.import_module(name)
        if name == "growth":
            module.main()
            continue
        report = Report()
        module.main(report)
        rows[name] = report.rows
        (OUT / "table.md").write_text(as_markdown(rows, machine), encoding="utf-8")
        as_result(rows, machine).to_netcdf(OUT / "results.nc", engine="scipy")


if __name__ == "__main__":
    main()
