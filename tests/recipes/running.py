"""Recipes as a user would start them, and what they leave behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr

from dir_toolkit.experiment.training.checkpoint import load_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
RUN_FILES = {  # of one run of any recipe
    "config.json",
    "env.json",
    "history.csv",
    "checkpoint-last.pt",
    "checkpoint-best.pt",
    "results.nc",
    "events",
}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def environment(folder: Path) -> dict[str, str]:
    """One thread, so that sums are always taken in one order, and a cache of its own."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DIR_TOOLKIT_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(script: Path, folder: Path, *words: object, python: tuple[str, ...] = ("-W", "error")) -> Outcome:
    """``python recipes/<script>`` with these words, in a folder, to its end."""
    done = subprocess.run(
        [sys.executable, *python, str(script), *map(str, words)],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def run(script: Path, folder: Path, *words: object) -> Outcome:
    """A recipe that must end well."""
    outcome = start(script, folder, *words)
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    return outcome


def check_help_answers_without_torch(script: Path, folder: Path, *words: str) -> None:
    """``--help`` names all these words, and imports no package that takes seconds."""
    outcome = start(script, folder, "--help", python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in outcome.err.splitlines()}
    assert outcome.code == 0
    assert "tyro" in imported
    assert not {"torch", "xarray", "matplotlib", "dir_toolkit"} & imported
    assert all(word in outcome.out for word in words)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder by name, TensorBoard's under one."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"events\.out\.tfevents\..*", "events", name): content for name, content in found.items()}


def numbers(ds: xr.Dataset) -> xr.Dataset:
    """A result without what may differ between two runs of the same thing."""
    return ds.drop_vars("minutes").drop_attrs()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, the optimizer's state and FDS statistics."""

    def walk(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(item, f"{name}.{i}")

    found: dict[str, torch.Tensor] = {}
    walk(load_checkpoint(path), "")
    return found


def layout(path: Path) -> set[tuple[str, torch.Size, torch.dtype]]:
    """Name, shape and type of all tensors of a checkpoint, those of any rank under the name of the first."""
    return {(re.sub(r"^\.ranks\.\d+", ".ranks.0", name), t.shape, t.dtype) for name, t in tensors(path).items()}


def equal_bits(one: Path, two: Path) -> bool:
    a, b = tensors(one), tensors(two)
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)
