"""The page of concepts has all parts of each idea, and its pictures are what ``docs/concepts.py`` draws."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "concepts.md").read_text(encoding="utf-8")
IDEAS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
PICTURES = re.findall(r"\]\(concepts/(\w+)\.png\)", PAGE)
PARTS = (
    r"^!\[[^]]{100,}\]\(concepts/\w+\.png\)$|^<!-- tau -->$",
    r"^```math$",
    r"^```python$",
    r"^- ",
    r"^Papers?: \[",
)


def missing(idea: str) -> list[str]:
    """The parts that an idea lacks or has in another order."""
    result, place = [], 0
    if len(re.findall(r"\.(?=\s)", idea.strip().split("\n\n")[0] + "\n")) != 3:
        result.append("three sentences")
    for part in PARTS:
        found = re.compile(part, re.M).search(idea, place)
        place = found.start() if found else place
        result += [] if found else [part]
    return result


@pytest.mark.parametrize("idea", IDEAS)
def test_each_idea_has_three_sentences_a_figure_a_formula_code_pitfalls_and_a_paper(idea: str) -> None:
    assert missing(IDEAS[idea]) == []


def test_what_an_idea_lacks_is_found() -> None:
    idea = IDEAS["Decoupling"]
    assert missing(idea.replace("![", "!(")) == [PARTS[0]]
    assert missing(idea.replace("\n\n![", " One more.\n\n![")) == ["three sentences"]
    assert missing(re.sub(r"^- .*\n", "", idea, flags=re.M)) == [PARTS[3]]


def test_every_picture_is_drawn_and_small() -> None:
    files = {path.stem: path.stat().st_size for path in (DOCS / "concepts").iterdir()}
    assert len(IDEAS) == len(PICTURES) + 1 == 9  # tau has a slider
    assert sorted(files) == sorted(PICTURES)
    assert max(files.values()) < 60_000


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_script_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(str(DOCS))
    script = importlib.import_module("concepts")

    def coarse(picture: Any) -> np.ndarray:  # a text that lies three pixels beside is the same
        return np.asarray(picture.convert("RGB").reduce(8), dtype=float)

    assert set(script.PICTURES) == set(PICTURES)
    made = coarse(script.picture(name))
    shown, other = (
        coarse(image.open(DOCS / "concepts" / f"{one}.png")) for one in (name, PICTURES[PICTURES.index(name) - 1])
    )
    # Of 255: another seed or other fonts change 8, and the most similar two pictures differ by 14.
    assert np.abs(shown - made).mean() < 10 < np.abs(other - made).mean()


def test_the_affinity_head_errs_less_on_rare_classes_and_more_on_the_common_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(DOCS))
    errors = importlib.import_module("concepts").errors_of_affinity(0)
    (softmax_common, softmax_rare), (common, rare) = errors["softmax"], errors["affinity"]
    assert softmax_common < 0.02 < common < 0.08 < rare < 0.14 < softmax_rare
