"""The suite on one small table."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import running
from running import Outcome, files

RECIPE = running.RECIPES / "studies/suite.py"


def make_table(root: Path, rows: int = 90) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, 3))
    y = 10 * random.exponential(1, rows) + x[:, 0]
    lines = ["strength,a,b,c", *(",".join(f"{v:.6g}" for v in row) for row in np.column_stack([y, x]))]
    (root / "tables").mkdir(parents=True)
    with gzip.open(root / "tables/concrete.csv.gz", "wt") as file:
        file.write("\n".join(lines))


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--sets", "--trials")


def test_methods_are_tuned_alike_and_judged(here: Callable[..., Outcome], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 1, "--epochs", 1, "--out", "out"]
    outcome = here(*words, "--methods", "l1", "uvote_bins", "c_mixup", "boosting_lds")
    assert (outcome.code, outcome.err) == (0, "")
    rows = pd.read_csv(tmp_path / "out/suite.csv")
    assert rows["method"].tolist() == ["l1", "uvote_bins", "c_mixup", "boosting_lds"]
    assert (rows[["mae", "bmae", "bmase"]] > 0).all(axis=None)
    assert "average rank by bMAE over 1 sets" in outcome.out
    assert f"{rows['bmae'][0]:.4f}" in outcome.out.split("All numbers")[1]
    tried = {path.parent.name for path in (tmp_path / "out/concrete/tune").glob("*/search.db")}
    assert tried == {"l1", "uvote_bins", "c_mixup"}
    for method in tried:  # as many trials for each
        assert len(list((tmp_path / "out/concrete/tune" / method).glob("lr=*"))) == 2
    assert (tmp_path / "out/concrete/report.html").exists()

    before = files(tmp_path / "out")
    refused = here(*words, "--methods", "l1")
    assert refused.code == 1
    assert files(tmp_path / "out") == before
    again = here(*words, "--methods", "l1", "coral", "--resume")
    assert (again.code, again.err) == (0, "")
    assert again.out.count("done before") == 2
    more = pd.read_csv(tmp_path / "out/suite.csv")
    assert set(more["method"]) == {*rows["method"], "coral"}
    kept = more.set_index("method").loc[rows["method"], "bmae"]
    np.testing.assert_allclose(kept, rows["bmae"])


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--methods soft wide", "--methods must name some of .* got wide"),
        ("--sets moon", "--sets must name some of .* got moon"),
        ("--trials 3", "--trials must be an even number from 2 on, got 3"),
    ],
)
def test_what_cannot_run_is_told(tmp_path: Path, here: Callable[..., Outcome], words: str, rule: str) -> None:
    pytest.importorskip("optuna")
    outcome = here("--root", "data", *words.split())
    assert outcome.code == 1
    told = rf"recipes/studies/suite\.py: these settings cannot run:\n  {rule}.*\.\n"
    assert re.fullmatch(told, outcome.err), outcome.err
    assert files(tmp_path) == {}
