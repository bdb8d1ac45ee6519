"""The depth recipe with settings so small that it only shows its paces."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import running
import torch
from running import Outcome

RECIPE = running.RECIPES / "depth.py"
TINY = ["--scenes", "96", "--size", "16", "--epochs", "3", "--seeds", "1"]


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--scenes", "--epochs")


def test_it_prints_a_row_a_method_and_the_same_again(here: Callable[..., Outcome]) -> None:
    first, second = here(*TINY), here(*TINY)
    assert (first.code, first.err) == (0, "")
    assert first == second
    title, header, counts, *rows = first.out.splitlines()
    assert title.startswith("MAE in metres, mean over 1 seed(s)")
    assert header.split() == ["all", "many", "medium", "few", "unseen", "bMAE"]
    total, *regions = (int(count.replace(",", "")) for count in counts.split()[2:])
    assert total == sum(regions)
    assert [row.split()[0] for row in rows] == ["vanilla", "lds", "lds+fds"]
    assert all(0 < float(value) < 30 for row in rows for value in row.split()[1:])
    assert len({row.split(maxsplit=1)[1] for row in rows}) == 3  # FDS, too, makes a difference


def test_a_size_that_does_not_fit_the_network_ends_in_a_message(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY, "--size", "15", "--epochs", "0")
    assert outcome.code == 1
    assert "--size must be even, got 15." in outcome.err
    assert "--epochs must be at least 1, got 0." in outcome.err
    assert "Traceback" not in outcome.err


def test_pictures_hold_holes_and_a_long_tail_of_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE.parent)
    draw = runpy.run_path(str(RECIPE))["draw"]
    (image, depth), (_, even) = draw(200, 16, 0), draw(200, 16, 0, even=True)
    assert (image.shape, depth.shape) == ((200, 2, 16, 16), (200, 16, 16))
    assert image.isfinite().all()
    hole = depth == 0
    assert 0.03 < hole.double().mean() < 0.07
    assert depth[~hole].min() >= 1
    assert depth.max() <= 29
    assert (depth > 15).double().mean() < (even > 15).double().mean() / 4
    assert torch.equal(depth, draw(200, 16, 0)[1])
