"""The page on FDS shows what its runs say."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_and_the_correlations_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes/studies"), str(ROOT / "recipes"), *sys.path])
    from where_fds_pays import compared

    table, goes = compared(pd.read_csv(ROOT / "benchmarks/where_fds_pays.csv"))
    page = (ROOT / "docs/fds.md").read_text(encoding="utf-8")
    assert table in page
    assert all(f"- {line}\n" in page for line in goes.splitlines())


def test_the_long_training_on_faces_is_that_of_the_runs() -> None:
    runs = pd.read_csv(ROOT / "benchmarks/faces_long_training.csv", comment="#").set_index(["method", "seed"])
    page = (ROOT / "docs/fds.md").read_text(encoding="utf-8")
    for method in ("lds", "fds", "fds-permuted", "fds-noise"):
        own, plain = runs.loc[method], runs.loc["vanilla"]
        assert list(own.index) == list(plain.index) == list(range(10))
        ratio = own / plain
        means, errors = ratio.mean(), ratio.std() / len(ratio) ** 0.5
        of = {name: f"{means[name]:.3f} ± {errors[name]:.3f}" for name in ("bmae", "few", "many")}
        fell = (own.bmae < plain.bmae).sum()
        bmae = f"{own.bmae.mean():.2f} ± {own.bmae.std():.2f}"
        assert f"| {method} | {bmae} | {of['bmae']} | {fell} of 10 | {of['few']} | {of['many']} |\n" in page
