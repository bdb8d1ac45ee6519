"""The Trainer recipe with settings so small that it only shows its paces."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import running
import torch
from running import Outcome

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

RECIPE = running.RECIPES / "with_transformers.py"
TINY = ["--samples", "400", "--epochs", "2"]


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--samples", "--epochs")


def test_it_prints_a_row_per_method(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY)
    assert outcome.code == 0, outcome.err
    title, header, *rows = outcome.out.splitlines()
    assert title.endswith("2 epochs")
    assert header.split() == ["all", "many", "medium", "few", "unseen", "bMAE"]
    assert [row.split()[0] for row in rows] == ["vanilla", "lds", "lds+fds"]
    assert len({row.split(maxsplit=1)[1] for row in rows}) == 3  # FDS, too, makes a difference


def test_few_are_old_unless_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE.parent)
    draw = runpy.run_path(str(RECIPE))["draw"]
    (words, age), (_, even) = draw(4000, 0), draw(4000, 0, even=True)
    assert (words.shape, age.shape) == ((4000, 12), (4000,))
    assert words.unique().tolist() == list(range(60))
    assert ((age >= 0) & (age <= 100) & (even >= 0) & (even <= 100)).all()
    assert (age > 70).sum() < 200 < 1000 < (even > 70).sum()
    assert torch.equal(age, draw(4000, 0)[1])
