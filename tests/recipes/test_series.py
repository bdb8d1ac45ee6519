"""The recipe of series, on a few engines of a few cycles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import running
from running import Outcome

RECIPE = running.RECIPES / "series.py"
TINY = ["--root", ".", "--data", "cmapss", "--epochs", "1", "--seeds", "2"]


@pytest.fixture(autouse=True)
def engines(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def lines(engines: int, life: int) -> str:
        rows = (
            [engine, cycle, *random.random(24).round(3)] for engine in range(1, engines + 1) for cycle in range(1, life)
        )
        return "\n".join(" ".join(map(str, row)) for row in rows)

    (tmp_path / "train_FD001.txt").write_text(lines(10, 70))
    (tmp_path / "test_FD001.txt").write_text(lines(3, 35))
    (tmp_path / "RUL_FD001.txt").write_text("5\n20\n130\n")


@pytest.mark.usefixtures("sketched")  # the recipe of sentences draws the same figures
def test_it_ends_in_a_table_a_report_and_a_sentence(here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = here(*TINY, "--methods", "vanilla", "lds+fds")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\nconstant " in outcome.out
    assert outcome.out.splitlines()[-1].startswith("lds+fds against vanilla: bMAE ")
    assert "of 2 seeds" in outcome.out.splitlines()[-1]
    assert (tmp_path / "runs/series/cmapss/report.html").exists()


def test_series_that_are_not_there_end_in_a_message(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY, "--data", "beijing")
    assert outcome.code == 1
    assert "data_cards/beijing.md tells where to get it." in outcome.err
