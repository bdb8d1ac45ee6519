"""The recipe of predictions, on a run that was made in a second and on images that are drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from PIL import Image
from running import Outcome

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import small_resnet
from dir_toolkit.experiment.data.augment import to_float
from dir_toolkit.experiment.data.cache import decode_image

RECIPE = running.RECIPES / "predict.py"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run, as a study leaves it."""
    bins = dt.Bins.uniform(0, 101, width=1, integer=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        density = dt.LabelDensity(bins, np.arange(101)[::-1] * 3 + 1)
        model = dt.LongTailModel(small_resnet(), 128, bins, density=density, target_prior="uniform", tau=0.5)
    folder = tmp_path / "study/soft+tau/seed0"
    folder.mkdir(parents=True)
    model.eval().save(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"data": "utkface", "size": 16, "method": "soft+tau"}))
    return folder


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--run", "--images", "--out")


def test_images_are_predicted_and_those_that_cannot_be_read_are_named(
    finished: Path, tmp_path: Path, here: Callable[..., Outcome]
) -> None:
    photos = running.make_faces(tmp_path / "photos", ages=(3, 90), each=2)
    (photos / "notes.txt").write_text("no image")
    some = next(path for path in sorted(photos.glob("*.jpg")) if path.stat().st_size)
    Image.open(some).save(photos / "last.png")
    outcome = here("--run", finished, "--images", photos, "--out", "ages.csv")
    assert outcome.code == 0
    assert outcome.err.count("is left out, since it is not a complete JPEG or PNG") == 1
    assert "61_1_20170109150557335.jpg.chip.jpg is left out" in outcome.err
    assert "Predictions for 5 of 6 images: ages.csv" in outcome.out
    with (tmp_path / "ages.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = sorted(path.name for path in photos.glob("*.*g") if path.stat().st_size)
    assert [row["file"] for row in rows] == names
    images = torch.stack([torch.from_numpy(decode_image((photos / name).read_bytes(), 16).copy()) for name in names])
    table = dt.load(finished / "model.safetensors", small_resnet()).predict(to_float(images))
    for column in ("prediction", "lower", "upper"):
        np.testing.assert_allclose([float(row[column]) for row in rows], table[column], atol=0.006)
    assert [row["region"] for row in rows] == table.region.values.tolist()


def test_the_backbone_is_that_of_the_run(finished: Path, tmp_path: Path, here: Callable[..., Outcome]) -> None:
    photos = running.make_faces(tmp_path / "photos", ages=(3,), each=1)
    config = {"data": "utkface", "size": 16, "backbone": "no_such_net"}
    (finished / "config.json").write_text(json.dumps(config))
    outcome = here("--run", finished, "--images", photos)
    assert "name must be a model of timm, got 'no_such_net'" in outcome.err or "timm for this version" in outcome.err


def test_what_cannot_be_predicted_is_told_at_once(finished: Path, tmp_path: Path, here: Callable[..., Outcome]) -> None:
    outcome = here("--run", finished.parents[1], "--images", tmp_path / "none")
    assert outcome.code == 1
    assert f"--run must be the folder of one finished run, got {finished.parents[1]}. Use {finished}." in outcome.err
    assert f"--images must be a folder with JPEG or PNG images, got none in {tmp_path / 'none'}." in outcome.err
    outcome = here("--run", tmp_path / "none", "--images", tmp_path)
    assert "Train one with recipes/age.py." in outcome.err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.JPG").write_bytes(b"no image")
    outcome = here("--run", finished, "--images", tmp_path / "broken")
    assert "a.JPG is left out" in outcome.err
    assert "there must be at least one batch, got none" in outcome.err
    assert not (tmp_path / "predictions.csv").exists()
