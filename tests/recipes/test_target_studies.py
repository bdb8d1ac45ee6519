"""The studies of intervals and of target priors, on a small table and on a few sentences."""

from __future__ import annotations

import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import running

pytest.importorskip("sklearn", minversion="1.6")

STUDIES = running.RECIPES / "studies"
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
TINY = ["--root", ".", "--seeds", "1"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning"),  # so few rows teach too little
]


@pytest.fixture(autouse=True)
def sets(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "tables").mkdir()
    (tmp_path / "text").mkdir()
    x = random.exponential(4, 400).round(2)
    table = pd.DataFrame({"Rings": np.ceil(x + random.random(400)), "Sex": "M", "length": x})
    table.to_csv(tmp_path / "tables/abalone.csv.gz", index=False)
    vectors = [" ".join([word, *random.normal(size=5).round(3).astype(str)]) for word in WORDS]
    (tmp_path / "text/glove_100d.txt").write_text("\n".join(vectors))
    rows = [
        f"{i},{part},{3 + random.normal() / 3:.2f},3,3,{' '.join(random.choice(WORDS, 4))}"
        for i, part in enumerate(["train", "dev", "test"] * 140)
    ]
    (tmp_path / "text/emobank.csv").write_text("\n".join(["id,split,V,A,D,text", *rows]))


def test_intervals_end_in_a_table_and_a_picture(tmp_path: Path) -> None:
    outcome = running.run(STUDIES / "intervals.py", tmp_path, *TINY, "--sets", "emobank")
    rows = pd.read_csv(tmp_path / "runs/intervals/rows.csv")
    assert rows.method.nunique() == 5  # no boosting of sentences
    whole = rows[rows.region == "all"].groupby("method").held.mean()
    assert whole["network, per region"] >= 0.85
    table = (tmp_path / "runs/intervals/tables.md").read_text(encoding="utf-8")
    assert table in outcome.out
    assert "| emobank: " in table
    assert (tmp_path / "runs/intervals/intervals.png").stat().st_size > 10_000


def test_new_rows_are_drawn_as_their_shift_says_and_priors_are_judged(tmp_path: Path) -> None:
    words = [*TINY, "--sets", "abalone", "--new", "200"]
    outcome = running.run(STUDIES / "target_priors.py", tmp_path, *words)
    rows = pd.read_csv(tmp_path / "runs/target_priors/rows.csv").set_index("shift")
    assert rows.index.tolist() == ["none", "even", "high", "tilted"]
    assert rows.tv_training["high"] > rows.tv_training["tilted"] > rows.tv_training["none"]
    assert rows.tv_training["high"] > 0.4
    kept = rows[rows.kept | rows.refused]
    np.testing.assert_array_equal(kept.mae_adjusted, kept.mae_trained)
    assert (tmp_path / "runs/target_priors/table.md").read_text(encoding="utf-8") in outcome.out
    assert (tmp_path / "runs/target_priors/target-prior.png").stat().st_size > 5_000


def test_from_elsewhere_calibration_adapts_and_shifts_are_natural(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels rise by the month, of which intervals that are calibrated once hold ever fewer, and adapted ones more."""
    monkeypatch.syspath_prepend(str(STUDIES))
    intervals: Any = runpy.run_path(str(STUDIES / "intervals.py"))
    said = drifting(intervals["Forecasts"], intervals["Part"])
    rows = pd.DataFrame(intervals["judge"]("made", 0, said))
    held = rows[(rows.region == "all") & (rows.method == "network, per region")].groupby("set").held.mean()
    assert held["later, adapted"] > held["later"] + 0.05
    priors: Any = runpy.run_path(str(STUDIES / "target_priors.py"))
    (row,), curves = priors["judge"]("made", 0, said, 200)
    assert (row["shift"], curves) == ("later", {})


@pytest.mark.parametrize(
    ("study", "words", "rule"),
    [
        ("tables", "--methods nonsense", "--methods must name some of .*, got nonsense"),
        ("tables", "--tables moon", "--tables must name some of .*, got moon"),
        ("tables", "--splits 0 --rows 0", "--splits must be at least 1, got 0.\n  --rows must be at least 20, got 0"),
        ("intervals", "--sets moon", "--sets must name some of .*, got moon"),
        ("target_priors", "--seeds 0", "--seeds must be at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(tmp_path: Path, study: str, words: str, rule: str) -> None:
    before = running.files(tmp_path)
    outcome = running.run_here(STUDIES / f"{study}.py", tmp_path, "--root", ".", *words.split())
    assert outcome.code == 1
    assert re.fullmatch(rf"recipes/studies/{study}\.py: these settings cannot run:\n  {rule}\.\n", outcome.err)
    assert running.files(tmp_path) == before


def test_rows_of_tables_are_kept_by_their_settings_and_ratios_are_of_splits(tmp_path: Path) -> None:
    words = ["--root", "tables", "--tables", "abalone", "--methods", "median", "boosting", "--splits", 2, "--rows"]
    for most in (100, 50, 50):
        running.run(STUDIES / "tables.py", tmp_path, *words, most)
    rows = pd.read_csv(tmp_path / "runs/tables/rows.csv")
    assert rows.groupby("rows").size().to_dict() == {50: 4, 100: 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        summary: Any = runpy.run_path(str(STUDIES / "tables.py"))["summary"]
    # The ratios are 2 and 8 on split 0, and 1 and 9 on split 1: geometric means 4 and 3.
    made = [("a", 0, 2.0), ("b", 0, 8.0), ("a", 1, 1.0), ("b", 1, 9.0)]
    lines = [
        {"table": table, "split": split, "method": method, **dict.fromkeys(["mae", "bmae", "few", "seconds"], error)}
        for table, split, ratio in made
        for method, error in (("boosting", 5.0), ("default", 5 * ratio))
    ]
    assert re.search(r"default +3\.500 ± 0\.707 ", summary(pd.DataFrame(lines)))


def test_forecasts_are_made_anew_where_data_or_code_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import forecasts

    def fresh(root: Path, name: str, seed: int, rows: int, data: str, code: str) -> list[Any]:
        made.append((name, rows))
        return []

    made: list[Any] = []
    monkeypatch.setattr(forecasts, "fresh", fresh)
    keep = partial(forecasts.forecasts, tmp_path / "kept")
    for rows in (300, 300, 200):
        keep(tmp_path, "abalone", 0, rows)
        keep(tmp_path, "emobank", 0, rows)  # of which rows says nothing
    assert made == [("abalone", 300), ("emobank", 0), ("abalone", 200)]
    (tmp_path / "others/tables").mkdir(parents=True)
    (tmp_path / "others/tables/abalone.csv.gz").write_bytes(b"others")
    keep(tmp_path / "others", "abalone", 0, 200)
    (tmp_path / "code.py").write_text("")
    monkeypatch.setattr(forecasts, "code", lambda: (tmp_path / "code.py",))
    keep(tmp_path, "abalone", 0, 200)
    assert made[3:] == [("abalone", 200)] * 2


def drifting(forecasts: Any, part: Any) -> Any:
    import dir_toolkit as dt

    random = np.random.default_rng(0)
    bins = dt.Bins.uniform(0, 10, count=20)
    density = dt.LabelDensity(bins, [200] * 10 + [30] * 10)

    def rows(count: int, drift: float) -> Any:
        seen = 4 + random.random(count)
        labels = (seen + drift * np.arange(count) / count + random.normal(size=count) / 4).clip(0, 9.9)
        scores = -((seen[:, None] - bins.centers) ** 2)
        return part(scores, labels, seen[:, None], seen)

    held, later = rows(730, 0.0), rows(2920, 1.2)
    return forecasts(density, density.prior(), "closed", held, {"later": later})
