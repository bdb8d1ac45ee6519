"""The recipe of sentences, on a few sentences of a few words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import running
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


@pytest.mark.filterwarnings("ignore:.*no label in or near")
def test_pairs_end_in_a_table_a_report_and_a_sentence(here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = here(*TINY, "--methods", "vanilla", "soft+tau")
    assert (outcome.code, outcome.err) == (0, "")
    for method in ("vanilla", "soft+tau", "constant"):
        assert f"\n{method} " in outcome.out
    assert outcome.out.splitlines()[-1].startswith("soft+tau against vanilla: bMAE ")
    assert (tmp_path / "runs/text/sts_b_dir/report.html").exists()


def test_texts_that_are_not_there_end_in_a_message(here: Callable[..., Outcome]) -> None:
    outcome = here(*TINY, "--data", "emobank")
    assert outcome.code == 1
    assert "data_cards/emobank.md tells where to get it." in outcome.err
