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


NETWORKS = {
    "vanilla": "vanilla",
    "soft+tau": "one network",
    "soft+ensemble+tau": "mean of five",
    "soft+distilled+tau": "one that learnt from the mean",
}


def test_the_table_of_ensembles_is_that_of_the_runs() -> None:
    runs = pd.read_csv(ROOT / "benchmarks/faces_ensembles.csv", comment="#")
    plain = pd.read_csv(ROOT / "benchmarks/faces_long_training.csv", comment="#").query("method == 'vanilla'")
    page = (ROOT / "docs/ages.md").read_text(encoding="utf-8")
    errors = ["bmae", "mae", "many", "medium", "few"]
    assert set(runs["method"]) == set(NETWORKS)
    for (method, given), own in runs.assign(given=runs["tau"].where(runs["tau_is"] == "given")).groupby(
        ["method", "given"], dropna=False
    ):
        several, tau = len(own) > 1, own["tau"]
        cells = [
            f"{own[error].mean():.2f}"
            + (f" ± {own[error].std():.2f}" if several else "")
            + f" (×{own[error].mean() / plain[error].mean():.2f})"
            for error in errors
        ]
        chosen = f"chosen, {tau.mean():.2f} ± {tau.std():.2f}" if several else f"chosen, {tau.iloc[0]:g}"
        what = "" if method == "vanilla" else chosen if pd.isna(given) else f"{given:g}"
        assert f"| {NETWORKS[method]} | {len(own)} | {what} | {' | '.join(cells)} |\n" in page, (method, given)
