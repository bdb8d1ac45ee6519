"""The study of where FDS pays, on one small table, and its figures on made-up statistics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import running
import torch
from running import Outcome
from test_suite import make_table

import dir_toolkit as dt
from dir_toolkit.experiment.study import Trained, Trial

RECIPE = running.RECIPES / "studies/where_fds_pays.py"
sys.path[:0] = [str(running.RECIPES), str(RECIPE.parent)]


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--rows", "--seeds")


@pytest.mark.usefixtures("sketched")
def test_each_case_has_a_line_with_paired_ratios_and_figures(here: Callable[..., Outcome], tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    words = ["--root", "data", "--sets", "concrete", "--rows", 30, "--epochs", 2, "--methods", "vanilla", "fds"]
    assert here(*words, "--seeds", 1).code == 0
    outcome = here(*words, "--seeds", 2, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    rows = pd.read_csv(tmp_path / "runs/fds/runs.csv")
    assert list(zip(rows.method, rows.seed, strict=True)) == [
        ("vanilla", 0), ("fds", 0), ("vanilla", 1), ("fds", 1)
    ]  # fmt: skip
    figures = rows[["agreement", "noise", "size"]]
    assert figures[rows.method == "fds"].notna().all(axis=None)
    assert figures[rows.method == "vanilla"].isna().all(axis=None)
    ratios = rows[rows.method == "fds"].bmae.to_numpy() / rows[rows.method == "vanilla"].bmae.to_numpy()
    cell = f"{ratios.mean():.3f} ± {ratios.std(ddof=1) / 2**0.5:.3f}"
    assert f"| concrete | 30 | 50 | {cell} |" in (tmp_path / "runs/fds/cases.md").read_text()
    reach = (rows.bmae / rows.bin_width)[rows.method == "vanilla"].mean()
    skill = (1 - rows.mae / rows.mae_of_median)[rows.method == "vanilla"].mean()
    assert f" | {reach:.2f} | {skill:.2f} |\n" in (tmp_path / "runs/fds/cases.md").read_text()


@pytest.mark.usefixtures("sketched")
def test_a_run_that_is_stopped_after_its_first_epoch_keeps_its_figures(
    here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(tmp_path / "data")
    words = ["--root", "data", "--sets", "concrete", "--rows", 30, "--epochs", 2, "--seeds", 1]
    words += ["--methods", "vanilla", "lds+fds", "--resume", "--out"]
    assert here(*words, "whole").code == 0
    labels = dt.FDS.labels

    def stopped(fds: dt.FDS, *arguments: Any) -> Any:
        if fds.epoch == 1:
            raise KeyboardInterrupt
        return labels(fds, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dt.FDS, "labels", stopped)
        assert here(*words, "stopped").code == 130
    for _ in range(2):  # of a finished run, too
        assert here(*words, "stopped").code == 0
        whole, rows = (pd.read_csv(tmp_path / name / "runs.csv") for name in ("whole", "stopped"))
        assert rows["noise"].notna().tolist() == [False, True]
        pd.testing.assert_frame_equal(rows, whole, check_exact=True)
        (tmp_path / "stopped/runs.csv").unlink()


def test_settings_that_would_fail_after_hours_are_refused_at_once(here: Callable[..., Outcome], tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    (tmp_path / "runs/fds").mkdir(parents=True)
    (tmp_path / "runs/fds/runs.csv").write_text("kept")
    outcome = here("--root", "data", "--sets", "concrete", "--rows", 30, "--methods", "fds")
    assert outcome.code == 1
    assert "--methods must name vanilla, with which all are compared, got fds." in outcome.err
    assert "--out must hold no runs.csv yet. Use --resume to add to it." in outcome.err
    assert (tmp_path / "runs/fds/runs.csv").read_text() == "kept"
    outcome = here("--root", "data", "--sets", "concrete", "airfoil", "--epochs", 1, "--seeds", 1, "--out", "new")
    assert outcome.code == 1
    assert "airfoil.csv.gz" in outcome.err
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("sketched")
def test_what_is_named_twice_is_trained_once(here: Callable[..., Outcome], tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    words = ["--root", "data", "--sets", "concrete", "concrete", "--rows", 30, 30, "--epochs", 1, "--seeds", 1]
    assert here(*words, "--methods", "vanilla", "vanilla").code == 0
    assert len(pd.read_csv(tmp_path / "runs/fds/runs.csv")) == 1


@pytest.mark.parametrize("broken", [("fds",), ("vanilla", "fds")])
def test_runs_that_fail_are_named_at_the_end_and_cost_the_others_nothing(
    here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]
) -> None:
    make_table(tmp_path / "data")
    fit = Trial.fit

    def breaking(trial: Trial, model: Any, **options: Any) -> Trained:
        if trial.method in broken:
            raise RuntimeError("out of memory")
        return fit(trial, model, **options)

    monkeypatch.setattr(Trial, "fit", breaking)
    words = ["--root", "data", "--sets", "concrete", "--rows", 30, "--epochs", 1, "--seeds", 1]
    outcome = here(*words, "--methods", "vanilla", "fds")
    assert outcome.code == 1
    assert "these runs failed; --resume tries them again:\n  concrete, 30 rows, " in outcome.err
    assert "fds, seed 0: RuntimeError: out of memory" in outcome.err
    table = tmp_path / "runs/fds/runs.csv"
    assert (pd.read_csv(table)["method"].tolist() if table.exists() else []) == ["vanilla"] * ("vanilla" not in broken)


def statistics(slope: float, samples: int) -> dict[str, torch.Tensor]:
    """Of an FDS over 50 bins, with a feature of unit variance around a mean that rises with the label or does not."""
    random, bins = np.random.default_rng(0), dt.Bins.uniform(0, 1, count=50)
    labels = torch.from_numpy(np.repeat(bins.centers, samples)).float()
    features = slope * labels[:, None] + torch.from_numpy(random.standard_normal((len(labels), 200))).float()
    fds = dt.FDS(bins, 200)
    fds.update(features, labels)
    fds.end_epoch()
    return fds.statistics()


def test_noise_is_above_one_where_bins_differ_by_chance_alone_and_small_where_their_means_rise() -> None:
    from where_fds_pays import figures

    by_chance, rising = figures(statistics(0, samples=20)), figures(statistics(200, samples=20))
    assert by_chance["noise"] > 1
    assert rising["noise"] < 0.2
    assert by_chance["agreement"] < 0.5 < 0.95 < rising["agreement"]
    assert by_chance["size"] == pytest.approx((1 / 20) ** 0.5, rel=0.2)  # nearly the whole error of a mean
