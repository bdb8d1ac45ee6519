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
