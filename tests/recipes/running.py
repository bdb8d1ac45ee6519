"""Recipes as a user would start them, and what they leave behind."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from dir_toolkit.experiment.training.checkpoint import load_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
RUN_FILES = {  # of one run of any recipe
    "config.json",
    "env.json",
    "history.csv",
    "checkpoint-last.pt",
    "checkpoint-best.pt",
    "results.nc",
    "model.safetensors",
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


def run_here(script: Path, folder: Path, *words: object) -> Outcome:
    """The same within this process, which spares the seconds in which torch is loaded."""
    out, err, message = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("DIR_TOOLKIT_CACHE", str(folder / "cache"))
        patch.syspath_prepend(script.parent)  # as Python does for a script
        patch.setattr(sys, "argv", [str(script), *map(str, words)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            message = end.code
    if isinstance(message, str):  # which Python then writes to stderr, as its exit code is 1
        return Outcome(1, out.getvalue(), f"{err.getvalue()}{message}\n")
    return Outcome(message or 0, out.getvalue(), err.getvalue())


def run(script: Path, folder: Path, *words: object) -> Outcome:
    """A recipe that must end well, within this process."""
    outcome = run_here(script, folder, *words)
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


def make_faces(root: Path, ages: Iterable[int] = (3, 40, 41, 90), each: int = 12) -> Path:
    """A folder of UTKFace with so many images for each age, and one whose name does not parse."""
    root.mkdir(parents=True)
    for years in ages:
        for i in range(each):
            random = np.random.default_rng(100 * years + i)
            pixels = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((24, 24))
            out = io.BytesIO()
            pixels.save(out, "JPEG")
            (root / f"{years}_{i % 2}_{i % 5}_2017{i:04d}.jpg.chip.jpg").write_bytes(out.getvalue())
    (root / "61_1_20170109150557335.jpg.chip.jpg").write_bytes(b"")
    return root


def make_mnist(root: Path, train: int = 6, test: int = 2) -> None:
    """The four files of MNIST with so many training and test images of each digit."""
    root.mkdir()
    for part, count in (("train", 10 * train), ("t10k", 10 * test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (root / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder by name, TensorBoard's under one."""
    result = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"events\.out\.tfevents\..*", "events", name): content for name, content in result.items()}


def numbers(ds: xr.Dataset) -> xr.Dataset:
    """A result without what may differ between two runs of the same thing."""
    return ds.drop_vars("minutes").drop_attrs()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, the optimizer's state and FDS statistics."""

    def walk(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            result[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(item, f"{name}.{i}")

    result: dict[str, torch.Tensor] = {}
    walk(load_checkpoint(path), "")
    return result


def layout(path: Path) -> set[tuple[str, torch.Size, torch.dtype]]:
    """Name, shape and type of all tensors of a checkpoint, those of any rank under the name of the first."""
    return {(re.sub(r"^\.ranks\.\d+", ".ranks.0", name), t.shape, t.dtype) for name, t in tensors(path).items()}


def equal_bits(one: Path, two: Path) -> bool:
    a, b = tensors(one), tensors(two)
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)
