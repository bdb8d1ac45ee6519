"""The recipe of a table with settings so small that it only shows its paces."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import running
from running import Outcome

pytest.importorskip("sklearn", minversion="1.6")

RECIPE = running.RECIPES / "table.py"
TINY = ["--samples", "600", "--trees", "3"]


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--samples", "--file", "--label")


@pytest.mark.filterwarnings("ignore:LongTailRegressor.* on .* held-out rows")  # so few rows teach it too little
@pytest.mark.parametrize("own", [False, True])
def test_it_ends_in_a_table_a_report_and_a_sentence(
    own: bool, here: Callable[..., Outcome], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if own:
        request.getfixturevalue("sketched")  # the other report has the same figures
        random = np.random.default_rng(0)
        rows = [f"{x:.2f},{'ab'[i % 2]},{x + random.random():.2f}" for i, x in enumerate(random.exponential(4, 300))]
        (tmp_path / "own.csv").write_text("\n".join(["size,kind,price", *rows]))
    words = ["--file", "own.csv", "--label", "price"] if own else []
    outcome = here(*TINY, *words, "--seeds", 1)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    names = ["boosting", "boosting, LDS", "network, LDS", "boosting, adjusted", "LongTailRegressor"]
    assert [line.split(", seed")[0] for line in lines[:5]] == names
    assert "bins of" in outcome.out
    assert lines[-1].startswith("LongTailRegressor against boosting: bMAE ")
    assert f'<p class="lead">{lines[-1]}</p>' in (tmp_path / "runs/table/report.html").read_text()


def test_bad_settings_end_in_a_message(here: Callable[..., Outcome]) -> None:
    for given, messages in (
        (("--samples", "0", "--trees", "0"), ("--samples must be at least 1, got 0.", "--trees must be at least 1")),
        (("--label", "y"), ("--label needs --file.",)),
        (("--file", "no.csv"), ("--file needs --label",)),
    ):
        outcome = here(*TINY, *given)
        assert outcome.code == 1
        assert all(message in outcome.err for message in messages)


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
    correlations = [abs(np.corrcoef(column, np.log1p(y))[0, 1]) for column in x.T]
    assert min(correlations[:8]) > 0.15 > 0.03 > max(correlations[8:])
    np.testing.assert_array_equal(y, draw(20000, 0)[1])
