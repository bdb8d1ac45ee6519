"""Settings of one method, chosen on a few validation faces and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import running
from running import RUN_FILES, Outcome, equal_bits, files, make_faces

RECIPE = running.RECIPES / "studies/tune.py"


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--knobs", "momentum", "soft+tau", "─ fds options ─")


@pytest.mark.filterwarnings("ignore:.* the best tau is the largest")  # of one epoch
@pytest.mark.usefixtures("sketched", "unsynced_database")
def test_settings_are_chosen_on_validation_and_used(here: Callable[..., Outcome], tmp_path: Path) -> None:
    make_faces(tmp_path / "faces", ages=range(2, 117, 4), each=6)
    words = ["--data", "utkface", "--root", "faces", "--size", 16, "--epochs", 1, "--batch-size", 64]
    words += ["--methods", "soft+tau", "--knobs", "sigma", "--out", "out"]
    outcome = here(*words)
    assert (outcome.code, outcome.err) == (0, "")
    out = tmp_path / "out"
    # The run has the chosen settings: at the same epochs and seed it is the winning candidate again.
    chosen = json.loads((out / "soft/seed0/config.json").read_text())["label_sigma"]
    assert f"Chosen on validation: --label-sigma {chosen}." in outcome.out
    name = "soft/seed0/checkpoint-best.pt"
    same = {s: equal_bits(out / name, out / f"tune/label_sigma={s}/1-epochs" / name) for s in (2.0, 3.0, 5.0, 8.0)}
    assert same == {s: s == chosen for s in same}
    assert (out / "figures/settings-tried-on-validation.png").exists()
    assert f"Chosen on validation: --label-sigma {chosen}." in (out / "report.html").read_text()

    before = files(out)
    refused = here(*words)
    assert "must hold no earlier run" in refused.err
    assert files(out) == before
    outcome = here(*words, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("done before") == 4
    after = files(out)
    kept = RUN_FILES - {"results.nc", "model.safetensors", "events"}
    kept = {key for key in before if any(key.endswith(part) for part in kept)}
    assert kept <= {key for key in before if before[key] == after[key]}


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--methods soft --knobs width", "--knobs must name some of .* got width"),
        ("--methods soft --knobs sigma lr sigma", "--knobs must name some of .* each once, got sigma lr sigma"),
        ("--methods soft bins --knobs lr", "--methods must name one method, for each has settings of its own"),
        ("--methods soft --knobs lr kernel momentum", "--knobs kernel momentum would change nothing in soft"),
        ("--methods vanilla --knobs sigma", "--knobs sigma would change nothing in vanilla"),
        ("--methods rrt --knobs scheme", "--knobs scheme would change nothing in rrt"),
    ],
)
def test_what_cannot_be_tuned_is_told(tmp_path: Path, here: Callable[..., Outcome], words: str, rule: str) -> None:
    import re

    pytest.importorskip("optuna")
    outcome = here(*words.split())
    assert outcome.code == 1
    expected = rf"recipes/studies/tune\.py: these settings cannot run:\n  {rule}.*\.\n"
    assert re.fullmatch(expected, outcome.err), outcome.err
    assert files(tmp_path) == {}
