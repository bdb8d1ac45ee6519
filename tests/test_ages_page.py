"""The page on ages shows what its runs say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["faces_long_training", "faces_rivals_16_pixels"])
def test_the_tables_are_those_of_the_runs(name: str) -> None:
    runs = pd.read_csv(ROOT / f"benchmarks/{name}.csv", comment="#").set_index(["method", "seed"])
    page = (ROOT / "docs/ages.md").read_text(encoding="utf-8").replace("*", "")
    plain = runs.loc["vanilla"]
    for method in runs.index.unique("method"):
        own = runs.loc[method]
        ratio = own.mean() / plain.loc[own.index].mean()
        of = [f"{own[error].mean():.2f} ± {own[error].std():.2f} (×{ratio[error]:.2f})" for error in runs.columns]
        of = [text.split(" (")[0] for text in of] if method == "vanilla" else of
        assert f"| {method} | {len(own)} | {' | '.join(of)} |\n" in page, method
