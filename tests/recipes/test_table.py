"""The recipe of a table with settings so small that it only shows its paces."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import running
from running import Outcome

pytest.importorskip("sklearn", minversion="1.6")

RECIPE = running.RECIPES / "tabular.py"
TINY = ["--samples", "1500", "--trees", "3", "--epochs", "2"]


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--samples", "--trees", "--seeds")


@pytest.mark.filterwarnings("ignore:LongTailRegressor.* on .* held-out rows")  # so few rows teach it too little
@pytest.mark.parametrize("installed", [False, True])
def test_it_prints_a_row_a_method(
    installed: bool, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("lightgbm")
    else:
        monkeypatch.setitem(sys.modules, "lightgbm", None)
    outcome = here(*TINY, "--seeds", 2 if installed else 1)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    rows = lines[-5 - installed :]
    assert lines[0].startswith("lightgbm is left out") != installed
    assert lines[-6 - installed].split()[-6:] == ["bMAE", "all", "many", "medium", "few", "unseen"]
    names = ["boosting", "boosting, LDS", *["lightgbm, LDS"] * installed, "perceptron", "perceptron, LDS"]
    assert [row[:18].strip() for row in rows] == [*names, "LongTailRegressor"]
    assert len({row[18:] for row in rows}) == len(rows)
    for row in rows:
        means, spreads = zip(*re.findall(r"(\S+) ± (\S+)", row), strict=True)
        assert len(means) == 7
        assert all(0 < float(mean) < 60 for mean in means)
        assert all(np.isfinite(float(spread)) == installed for spread in spreads)


def test_bad_settings_end_in_a_message(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY, "--samples", "0")
    assert outcome.code == 1
    assert "labels must hold at least one" in outcome.err


def test_stays_have_a_long_tail_and_findings_tell_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE.parent)
    draw = runpy.run_path(str(RECIPE))["draw"]
    (x, y), (_, even) = draw(20000, 0), draw(20000, 1, even=True)
    assert (x.shape, y.shape) == ((20000, 12), (20000,))
    assert np.isfinite(x).all()
    for stays in (y, even):
        assert ((stays >= 0) & (stays <= 60)).all()
    assert abs(y.mean() - 6) < 0.2
    assert abs(even.mean() - 30) < 0.5
    assert (y > 40).mean() < 0.005 < 0.3 < (even > 40).mean()
    told = [abs(np.corrcoef(column, np.log1p(y))[0, 1]) for column in x.T]
    assert min(told[:8]) > 0.15 > 0.03 > max(told[8:])
    np.testing.assert_array_equal(y, draw(20000, 0)[1])
