from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import dir_toolkit
from dir_toolkit.experiment.data.images import ImageSet, Splits, content_digest
from dir_toolkit.experiment.training import provenance
from dir_toolkit.experiment.training.provenance import environment, write_json
from dir_toolkit.experiment.training.runtime import Runtime


def splits(**skipped: int) -> Splits:
    def image_set(samples: int) -> ImageSet:
        images, labels, rows = np.zeros((samples, 3, 2, 2), np.uint8), np.ones(samples, np.float32), np.arange(samples)
        return ImageSet(images, labels, rows, content_digest(images, labels, rows))

    return Splits(image_set(3), image_set(2), image_set(1), source="made up", skipped=skipped)


def place_package_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package lay in this folder."""
    monkeypatch.setattr(provenance, "__file__", str(folder / "dir_toolkit/experiment/training/provenance.py"))
    monkeypatch.setattr(provenance, "_commit", provenance._commit.__wrapped__)  # of this folder, not of a cache


def make_checkout(folder: Path) -> str:
    """A git repository with one commit; returns the commit's first twelve digits."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    git = ["git", "-C", str(folder), *identity]
    (folder / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
    return head.stdout.strip()


def test_what_a_result_depends_on_is_plain_and_complete() -> None:
    data = splits(missing=4)
    env = environment(Runtime(torch.device("cpu"), world=2), data)
    assert json.loads(json.dumps(env)) == env
    assert env["versions"]["torch"] == torch.__version__
    assert env["versions"]["dir_toolkit"] == dir_toolkit.__version__
    assert env["device"].startswith("cpu (")
    assert "2 processes, " in env["device"]
    assert env["device"].endswith(", float32")
    assert env["data"]["source"] == "made up"
    assert env["data"]["sizes"] == {"train": 3, "val": 2, "test": 1}
    assert env["data"]["digests"]["val"] == data.val.digest
    assert env["data"]["skipped"] == {"missing": 4}


def test_numbers_and_nouns_agree() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        device = environment(Runtime(torch.device("cpu")), splits())["device"]
    finally:
        torch.set_num_threads(threads)
    assert "1 process, 1 thread, " in device


def test_the_commit_is_that_of_the_checkout_and_tells_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_checkout(tmp_path)
    place_package_at(tmp_path, monkeypatch)
    assert environment(Runtime(torch.device("cpu")), splits())["commit"] == head
    (tmp_path / "file").write_text("two")
    assert environment(Runtime(torch.device("cpu")), splits())["commit"] == f"{head}-dirty"


def test_an_installed_package_does_not_name_the_commit_of_the_project_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkout(tmp_path)
    (tmp_path / "venv").mkdir()
    place_package_at(tmp_path / "venv", monkeypatch)
    assert environment(Runtime(torch.device("cpu")), splits())["commit"] == "unknown"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path)
    place_package_at(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(Runtime(torch.device("cpu")), splits())["commit"] == "unknown"


def test_json_makes_its_folder_and_writes_paths_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "config.json"
    write_json(str(path), {"out": Path("runs"), "sizes": (1, 2), "none": None})
    assert json.loads(path.read_text()) == {"out": "runs", "sizes": [1, 2], "none": None}
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]
