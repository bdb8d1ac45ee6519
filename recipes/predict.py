"""Predictions for new images: with intervals and regions, from a finished run of a recipe on faces.

    python recipes/age.py --data utkface --root DIR
    python recipes/predict.py --run runs/age/utkface/soft+tau/seed0 --images photos

The last line writes ``predictions.csv`` with one row per JPEG or PNG below ``photos``. The region says whether training
labels were many or few in the bin of the prediction. Images that cannot be read are named and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from command_line import parse, refuse, run, unfit_folder


@dataclass(frozen=True)
class Settings:
    run: Path
    """Folder of one finished run: of a method and a seed."""
    images: Path
    """Folder of JPEG and PNG images, cut as those of the training were."""
    out: Path = Path("predictions.csv")
    """The file to write, which is replaced if it exists."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import json

import numpy as np
import torch
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import backbone_of
from dir_toolkit.experiment.data.augment import to_float
from dir_toolkit.experiment.data.cache import decode_image
from dir_toolkit.experiment.training.runtime import chosen_device

BATCH = 256


def batches(files: list[Path], size: int, read: list[Path]) -> Iterator[Tensor]:
    """Batches of images, prepared as in training. The files that could be decoded are added to ``read``."""
    for start in range(0, len(files), BATCH):
        images = []
        for file in files[start : start + BATCH]:
            try:
                images.append(decode_image(file.read_bytes(), size))
                read.append(file)
            except (OSError, ValueError) as error:
                print(f"{file} is left out, since it is not a complete JPEG or PNG: {error}", file=sys.stderr)
        if images:
            yield to_float(torch.from_numpy(np.stack(images)))


def main(settings: Settings) -> None:
    faults, saved = unfit_folder("--out", settings.out.parent), settings.run / "model.safetensors"
    if not saved.is_file():
        finished = sorted(settings.run.rglob("model.safetensors"))
        fix = f" Use {finished[0].parent}." if finished else " Train one with recipes/age.py."
        faults.append(f"--run must be the folder of one finished run, got {settings.run}.{fix}")
    files = sorted(file for file in settings.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        faults.append(f"--images must be a folder with JPEG or PNG images, got none in {settings.images}.")
    refuse("recipes/predict.py", faults)
    config = json.loads((settings.run / "config.json").read_text(encoding="utf-8"))
    read: list[Path] = []
    size = config["size"] or (32 if config["data"] == "portraits" else 64)
    model = dt.load(saved, backbone_of(config.get("backbone", "small_resnet")).to(chosen_device(settings.device)))
    table = model.predict(batches(files, size, read)).to_dataframe()
    table.insert(0, "file", [file.relative_to(settings.images).as_posix() for file in read])
    table.to_csv(settings.out, index=False, float_format="%.2f")
    print(f"Predictions for {len(table):,} of {len(files):,} images: {settings.out}")


if __name__ == "__main__":
    run(main, SETTINGS)
