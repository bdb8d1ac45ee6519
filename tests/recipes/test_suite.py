"""The suite on one small table."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import running
from running import Outcome, files

import dir_toolkit as dt
from dir_toolkit.experiment.study import Trained, Trial

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


def test_a_missing_file_of_a_later_set_is_found_before_anything_trains(
    tmp_path: Path, here: Callable[..., Outcome]
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    outcome = here("--root", "data", "--sets", "concrete", "rain", "--methods", "l1", "--epochs", 1, "--trials", 2)
    assert outcome.code == 1
    assert "rain_ibk.csv.gz" in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("sketched")
def test_a_method_that_breaks_costs_the_others_nothing_and_a_prior_is_adjusted_after_the_least_mae(
    tmp_path: Path, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    fit, selects = Trial.fit, set()

    def watched(trial: Trial, model: Any, **options: Any) -> Trained:
        selects.add((trial.method, options.get("selects")))
        return fit(trial, model, **options)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trial, "fit", watched)
    monkeypatch.setattr(dt.losses, "DistLoss", broken)
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 1, "--epochs", 1, "--out", "out"]
    outcome = here(*words, "--methods", "dist_loss", "soft+tau", "soft")
    assert outcome.code == 0, outcome.err
    assert "RuntimeError: out of memory" in outcome.out
    assert pd.read_csv(tmp_path / "out/suite.csv")["method"].tolist() == ["soft+tau", "soft"]
    assert selects == {("soft+tau", "mae/all"), ("soft", None)}
