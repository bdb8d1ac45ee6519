"""The recipe of two labels with settings so small that it only shows its paces."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import running
import torch
from running import Outcome

RECIPE = running.RECIPES / "two_labels.py"
TINY = ["--samples", "400", "--epochs", "1", "--seeds", "2"]


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--samples", "--epochs")


def test_it_prints_a_row_a_method_and_the_same_again(here: Callable[..., Outcome]) -> None:
    first, second = here(*TINY), here(*TINY)
    assert (first.code, first.err) == (0, "")
    assert first == second
    title, header, counts, *rows = first.out.splitlines()
    assert title.startswith("MAE in years / degrees, mean over 2 seed(s)")
    assert header.split() == ["all", "many", "medium", "few", "unseen"]
    total, *regions = (int(count.replace(",", "")) for count in counts.split()[2:])
    assert (total, sum(regions)) == (8000, 8000)
    assert [row[:14].strip() for row in rows] == ["vanilla", "lds of age", "lds of both"]
    pairs = [cell for row in rows for cell in row[14:].replace("/", " ").split()]
    assert len(pairs) == 3 * 5 * 2
    assert float(pairs[0]) > 0
    assert len({row[14:] for row in rows}) == 3


def test_bad_settings_end_in_a_message(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY, "--samples", "0", "--batch-size", "0")
    assert outcome.code == 1
    for name in ("samples", "batch-size"):
        assert f"--{name} must be at least 1, got 0." in outcome.err


def test_both_labels_have_a_long_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE.parent)
    draw = runpy.run_path(str(RECIPE))["draw"]
    (x, y), (_, even) = draw(4000, 0), draw(4000, 0, even=True)
    assert (x.shape, y.shape) == ((4000, 16), (4000, 2))
    assert x.isfinite().all()
    for labels in (y, even):
        assert ((labels >= torch.tensor([0, -90])) & (labels <= torch.tensor([100, 90]))).all()
    rare = torch.tensor([60.0, 45.0])
    assert (y.abs() > rare).all(1).sum() < 20 < 500 < (even.abs() > rare).all(1).sum()
