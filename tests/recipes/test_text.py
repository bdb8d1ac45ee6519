"""The recipe of sentences, on a few sentences of a few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import running
import xarray as xr
from running import Outcome

RECIPE = running.RECIPES / "text.py"
TINY = ["--root", ".", "--epochs", "1", "--seeds", "1"]
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture(autouse=True)
def texts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(random.choice(WORDS, 4))

    vectors = [" ".join([word, *random.normal(size=5).round(3).astype(str)]) for word in WORDS]
    (tmp_path / "glove_100d.txt").write_text("\n".join(vectors))
    for part in ("train", "dev", "test"):
        rows = [f"{sentence()}\t{sentence()}\t{5 * random.random():.1f}" for _ in range(140)]
        (tmp_path / f"stsb_dir_{part}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]))


@pytest.mark.usefixtures("sketched")
def test_pairs_end_in_a_table_a_report_and_paired_differences(here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = here(*TINY, "--seeds", 2, "--methods", "vanilla", "permuted")
    assert (outcome.code, outcome.err) == (0, "")
    for method in ("vanilla", "permuted", "constant"):
        assert f"\n{method} " in outcome.out
    folder = tmp_path / "runs/text/sts_b_dir"
    mse = xr.load_dataset(folder / "results.nc", engine="scipy")["rmse"].sel(region="all") ** 2
    by_seed = (mse.sel({"method": "permuted"}) - mse.sel({"method": "vanilla"})).values
    assert f"permuted minus vanilla, MSE all: {by_seed.mean():.3f} ± {np.ptp(by_seed) / 2:.3f}, " in outcome.out
    assert f"smaller in {(by_seed < 0).sum()} of 2 seeds" in outcome.out
    assert (folder / "report.html").exists()


def test_texts_that_are_not_there_end_in_a_message(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY, "--data", "emobank")
    assert outcome.code == 1
    assert "data_cards/emobank.md tells where to get it." in outcome.err
