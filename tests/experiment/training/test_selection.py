from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dir_toolkit.errors import (
    CheckpointError,
    DirToolkitError,
    LabelError,
    NonFiniteLossError,
    RunExistsError,
    SettingsError,
)
from dir_toolkit.experiment.training.selection import Selection, grid, successive_halving

NINE = grid({"a": tuple(range(9))})


def run(candidate: dict[str, Any], budget: int, seed: int) -> float:
    return abs(candidate["a"] - 5) + 1 / budget


def search(candidates: Any = NINE, function: Callable[..., Any] = run, **options: Any) -> Selection:
    return successive_halving(candidates, function, **{"say": None, **options})


def test_rungs_by_hand() -> None:
    found = search(reduction=3, budgets=(1, 2, 4))
    rungs: dict[int, list[int]] = {}
    for row in found.table:
        rungs.setdefault(row["budget"], []).append(row["a"])
    assert rungs == {1: list(range(9)), 2: [4, 5, 6], 4: [5]}
    assert found.best == {"a": 5}
    assert found.best_score == 0.25
    assert found.ranking == [5, 4, 6, 3, 7, 2, 8, 1, 0]
    assert found.curve(4) == [(1, 2.0), (2, 1.5)]
    assert found.table[-1] == {
        **{"candidate": 5, "a": 5, "rung": 3, "budget": 4, "seed": 0, "score": 0.25},
        **{"status": "ok", "seconds": found.table[-1]["seconds"], "message": ""},
    }


@pytest.mark.parametrize(("number", "reduction"), [(1, 2), (2, 3), (5, 2), (9, 2), (10, 4)])
def test_as_many_survive_as_the_reduction_says(number: int, reduction: int) -> None:
    found = search(grid({"a": tuple(range(number))}), budgets=(1, 2, 3, 4), reduction=reduction)
    budgets = [row["budget"] for row in found.table]
    expected, alive = {}, number
    for budget in (1, 2, 3, 4):
        if alive > 1 or budget == 4 or budget == 1:
            expected[budget] = alive
        alive = max(1, alive // reduction)
    assert {budget: budgets.count(budget) for budget in set(budgets)} == expected


def test_one_that_is_left_goes_straight_to_the_largest_budget() -> None:
    assert [row["budget"] for row in search(NINE[:2], budgets=(1, 2, 3, 4)).table] == [1, 1, 4]


def test_of_equals_the_earlier_goes_on() -> None:
    found = search(function=lambda c, budget, seed: 1.0, budgets=(1, 2, 4))
    assert [row["a"] for row in found.table if row["budget"] == 2] == [0, 1, 2]
    assert found.best == {"a": 0}


def test_a_higher_score_may_be_better() -> None:
    assert search(minimize=False).best == {"a": 0}
    assert search(function=lambda c, budget, seed: math.inf if c["a"] == 3 else c["a"], minimize=False).best == {"a": 8}


def test_the_score_is_the_mean_over_seeds() -> None:
    scores = {(0, 0): 1.0, (0, 1): 4.0, (1, 0): 2.0, (1, 1): 2.0}
    found = search(NINE[:2], lambda c, budget, seed: scores[c["a"], seed], seeds=(0, 1), budgets=(1,))
    assert found.best == {"a": 1}
    assert found.curve(0) == [(1, 2.5)]
    assert [row["seed"] for row in found.table] == [0, 1, 0, 1]
    assert search(NINE[:2], lambda c, budget, seed: 1e308 / (c["a"] + 1), seeds=(0, 1)).best == {"a": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, NonFiniteLossError("fit: the loss is nan."), "late"])
def test_what_fails_is_the_worst_and_told(bad: object) -> None:
    def failing(candidate: dict[str, Any], budget: int, seed: int) -> float:
        if candidate["a"] == 5 and (bad != "late" or budget > 1):
            if isinstance(bad, Exception):
                raise bad
            return bad if isinstance(bad, float) else math.nan
        return run(candidate, budget, seed)

    found = search(function=failing, budgets=(1, 2, 4), seeds=(3, 4))
    assert found.best == {"a": 4}
    assert found.ranking[-1] == 5
    rows = [row for row in found.table if row["a"] == 5]
    failed = rows[-1]
    assert (failed["status"], failed["seed"]) == ("failed", 3)  # the other seed is spared
    assert math.isnan(failed["score"])
    assert len(rows) == (3 if bad == "late" else 1)
    message = "NonFiniteLossError: fit: the loss is nan." if isinstance(bad, Exception) else "NaN or infinite"
    assert message in failed["message"]


def test_the_only_survivor_fails_late() -> None:
    found = search(NINE[:2], lambda c, budget, seed: math.nan if budget > 3 else c["a"], budgets=(3, 6))
    assert found.best == {"a": 1}
    assert found.best_score == 1


def test_all_fail() -> None:
    def failing(candidate: dict[str, Any], budget: int, seed: int) -> float:
        raise LabelError(f"label {candidate['a']}")

    with pytest.raises(SettingsError, match=r"all 2 candidates failed:\n  a=0: LabelError: label 0\n  a=1: LabelError"):
        search(NINE[:2], failing)


def test_errors_of_others_end_the_search(tmp_path: Path) -> None:
    def failing(candidate: dict[str, Any], budget: int, seed: int) -> float:
        if candidate["a"] == 2:
            raise ZeroDivisionError
        return run(candidate, budget, seed)

    with pytest.raises(ZeroDivisionError):
        search(function=failing, folder=tmp_path)
    assert len(json.loads((tmp_path / "selection.json").read_bytes())["rows"]) == 2


@pytest.mark.parametrize("stop", range(13))
def test_a_search_that_was_stopped_anywhere_repeats_nothing(tmp_path: Path, stop: int) -> None:
    calls: list[tuple[int, int, int]] = []

    def stopping(candidate: dict[str, Any], budget: int, seed: int) -> dict[str, float]:
        if len(calls) == stop and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        calls.append((candidate["a"], budget, seed))
        value = math.nan if candidate["a"] == 4 else run(candidate, budget, seed)
        return {"mae": value, "bmae": math.inf if candidate["a"] == 6 else 0.1}

    stopped: list[bool] = []
    options: dict[str, Any] = {"folder": tmp_path / "new", "budgets": (1, 2, 4), "score": "mae"}
    options["fingerprint"] = {"data": "abc", "shape": (1, 2)}
    with pytest.raises(KeyboardInterrupt):
        search(function=stopping, **options)
    found = search(function=stopping, **options, resume=True)
    assert len(calls) == len(set(calls)) == 13
    whole = search(function=lambda *args: stopping(*args), **{**options, "folder": None})
    for row in (*found.table, *whole.table):
        row["seconds"] = 0
    assert repr(found) == repr(whole)


def test_what_run_does_to_its_candidate_is_not_seen(tmp_path: Path) -> None:
    def spoiling(candidate: dict[str, Any], budget: int, seed: int) -> float:
        candidate["steps"].append(budget)
        return 1.0

    given = [{"steps": [1]}, {"steps": [2]}]
    found = search(given, spoiling, folder=tmp_path)
    assert given == [{"steps": [1]}, {"steps": [2]}]
    found.best["steps"].append(3)
    assert found.best == {"steps": [1]}


def test_numbers_of_numpy_and_torch_are_scores() -> None:
    for kind in (np.float32, np.int64, torch.tensor, np.array, int):
        found = search(NINE[:2], lambda c, budget, seed, kind=kind: kind(c["a"]))
        assert found.best == {"a": 0}
        assert type(found.best_score) is float
    assert search(NINE[:2], lambda c, budget, seed: torch.tensor([math.nan, 1.0])[c["a"]]).best == {"a": 1}


def test_further_scores_become_columns() -> None:
    found = search(NINE[:2], lambda c, budget, seed: {"mae": c["a"], "few": math.nan}, score="mae")
    assert found.table[1]["score/mae"] == found.table[1]["score"] == 1
    assert math.isnan(found.table[0]["score/few"])


def test_candidates_may_differ_in_their_settings() -> None:
    found = search([{}, {"a": 1}, {"b": None}], lambda c, budget, seed: len(c))
    assert found.best == {}


def test_progress_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines: list[str] = []
    candidates = grid({"a": (5, 6), "b": ("x",)})

    def failing(candidate: dict[str, Any], budget: int, seed: int) -> float:
        if candidate["a"] == 6:
            raise NonFiniteLossError("fit: nan.\n  more")
        return 0.5

    options: dict[str, Any] = {"folder": tmp_path, "budgets": (2, 4)}
    search(candidates, failing, say=lines.append, **options)
    assert lines == [
        "rung 1 of 2: 2 candidates, budget 2",
        "  a=5 b=x: 0.5 (0 s)",
        "  a=6 b=x: failed, NonFiniteLossError: fit: nan. (0 s)",
        "rung 2 of 2: 1 candidate, budget 4",
        "  a=5 b=x: 0.5 (0 s)",
        "best: a=5 b=x, 0.5",
    ]
    assert capsys.readouterr().out == ""
    successive_halving(candidates, failing, resume=True, **options)
    assert "a=6 b=x: failed, NonFiniteLossError: fit: nan. (done before)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"candidates": []}, ValueError, "candidates must hold at least one, got none"),
        ({"candidates": {"a": 1}}, TypeError, "candidates must be a sequence of dicts, got dict"),
        ({"candidates": [3]}, TypeError, r"candidates\[0\] must be a Mapping, got int"),
        ({"candidates": [{"a": 1}, {"a": 2}, {"a": 1}]}, ValueError, "candidates must differ, got {'a': 1} at 0 and 2"),
        ({"candidates": [{"a": np.float64(1)}]}, ValueError, r"candidates\[0\]\['a'\] must be None.*got float64"),
        ({"candidates": [{"a": (1, math.inf)}]}, ValueError, r"\['a'\]\[1\] must be None.*finite number.*got inf"),
        ({"candidates": [{"a": {"b": {1}}}]}, ValueError, r"\['a'\]\['b'\] must be None.*got set"),
        ({"candidates": [{"seed": 1}]}, ValueError, "a setting must be named by an identifier other than .*got 'seed'"),
        ({"candidates": [{"a b": 1}]}, ValueError, "a setting must be named by an identifier"),
        ({"candidates": [{1: 1}]}, ValueError, "a setting must be named by an identifier"),
        ({"function": 3}, TypeError, "run must be a Callable"),
        ({"budgets": ()}, TypeError, "budgets must be a sequence of whole numbers"),
        ({"budgets": 3}, TypeError, "budgets must be a sequence of whole numbers"),
        ({"budgets": (3, 3)}, ValueError, r"budgets must rise, got \[3, 3\]"),
        ({"budgets": (0, 3)}, ValueError, "budgets must be at least 1"),
        ({"budgets": (1.5,)}, TypeError, "budgets must be a whole number"),
        ({"seeds": (1, 1)}, ValueError, r"seeds must differ, got \[1, 1\]"),
        ({"seeds": (-1,)}, ValueError, "seeds must be at least 0"),
        ({"reduction": 1}, ValueError, "reduction must be at least 2"),
        ({"minimize": 1}, TypeError, "minimize must be a bool"),
        ({"score": 1}, TypeError, "score must be a str"),
        ({"say": 1}, TypeError, "say must be a Callable"),
        ({"resume": True}, ValueError, "folder must be given to resume"),
        ({"fingerprint": {"a": torch.ones(1)}}, ValueError, r"fingerprint\['a'\] must be None"),
        ({"fingerprint": []}, TypeError, "fingerprint must be a Mapping"),
        ({"function": lambda c, b, s: None}, TypeError, "what run returns must be a number, got None"),
        ({"function": lambda c, b, s: torch.ones(2)}, TypeError, "what run returns must be a number"),
        ({"function": lambda c, b, s: {"mae": 1}}, ValueError, r"score must be one of \['mae'\], got None"),
        ({"function": lambda c, b, s: {"mae": "x"}}, TypeError, "the score 'mae' must be a number"),
        ({"score": "mae"}, TypeError, "run must return scores by name where score names one, got float"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        search(**options)
    assert isinstance(caught.value, DirToolkitError)


def test_a_folder_that_cannot_be_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(ValueError, match=r"^successive_halving: folder must be a folder, got .*file is in its way"):
            search(folder=folder, function=lambda *run: pytest.fail("it was trained"))


def test_a_search_is_never_overwritten_and_never_mixed(tmp_path: Path) -> None:
    search(folder=tmp_path)
    with pytest.raises(RunExistsError, match="a search is never overwritten"):
        search(folder=tmp_path)
    before = (tmp_path / "selection.json").read_bytes()
    for change, told in [
        ({"candidates": NINE[:8]}, "other candidates"),
        ({"candidates": [{"a": float(c["a"])} for c in NINE]}, "other candidates"),
        ({"budgets": (3, 6)}, r"other budgets \(\[3, 6, 12\] then, \[3, 6\] now\)"),
        ({"seeds": (1,), "reduction": 2}, "other reduction .*, seeds "),
        ({"minimize": False}, "other minimize"),
        ({"score": "mae"}, "other score"),
        ({"fingerprint": {"data": "other"}}, "other fingerprint"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            search(folder=tmp_path, resume=True, **change)  # type: ignore[arg-type]
    assert (tmp_path / "selection.json").read_bytes() == before
    assert search(folder=tmp_path, resume=True, function=lambda *args: 1 / 0).best == {"a": 5}


def test_damaged_states_are_refused_with_our_own_error(tmp_path: Path) -> None:
    def once(path: Path) -> str:
        """Go on from it; the answer must be right, or the file refused."""
        try:
            found = search(NINE[:3], folder=path.parent, resume=True, function=lambda *args: 1.0)
        except (CheckpointError, SettingsError):
            return "refused"
        assert len(found.table) == 4
        return "read"

    good = tmp_path / "good" / "selection.json"
    search(NINE[:3], folder=good.parent)
    content, path = good.read_bytes(), tmp_path / "selection.json"
    state = json.loads(content)
    row = state["rows"][0]
    assert once(good) == "read"
    rng = np.random.default_rng(0)
    for _ in range(150):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        for bad in (
            bytes(flipped),
            content[: rng.integers(len(content) - 1)],
            content + bytes([rng.integers(33, 256)]),
        ):
            path.write_bytes(bad)
            once(path)
    for change in (
        {"score": None},
        {"score": "1"},
        {"score": 10**400},
        {"score": True},
        {"score": math.nan},
        {"status": "failed"},
        {"message": "late"},
        {"candidate": "0"},
        {"scores": []},
        {"scores": {"mae": "x"}},
        {"seconds": None},
    ):
        path.write_text(json.dumps({**state, "rows": [{**row, **change}]}))
        assert once(path) == "refused", change
    for bad in (
        [],
        {},
        3,
        {**state, "version": 2},
        {**state, "rows": 3},
        {**state, "rows": [[]]},
        {**state, "rows": ["x"]},
    ):
        path.write_text(json.dumps(bad))
        assert once(path) == "refused", bad
    path.write_text("[" * 100_000)
    assert once(path) == "refused"


def test_grid_by_hand() -> None:
    assert grid({"a": (1, 2), "b": ["x", ""], "c": [None]}) == (
        {"a": 1, "b": "x", "c": None},
        {"a": 1, "b": "", "c": None},
        {"a": 2, "b": "x", "c": None},
        {"a": 2, "b": "", "c": None},
    )
    assert grid({}) == ({},)


def test_a_sample_is_of_the_grid_in_its_order_and_follows_the_seed() -> None:
    values = {"a": tuple(range(10)), "b": tuple(range(10)), "c": (0, 1)}
    whole = list(grid(values))
    samples = [grid(values, sample=20, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    for sample in samples:
        places = [whole.index(candidate) for candidate in sample]
        assert places == sorted(set(places))
        assert len(places) == 20
    assert list(grid(values, sample=1000)) == whole
    huge = {name: tuple(range(1000)) for name in "abcdef"}
    assert len(grid(huge, sample=5)) == 5


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        (3, {}, TypeError, "grid: values must be a Mapping"),
        ({"a": 1}, {}, TypeError, r"a must be a sequence, got int. Use \(1,\) for one value"),
        ({"a": "cosine"}, {}, TypeError, r"a must be a sequence, got str. Use \('cosine',\)"),
        ({"a": ()}, {}, ValueError, "a must have at least one value"),
        ({"a": (1, 2, 1)}, {}, ValueError, "values of a must differ, got 1 at 0 and 2"),
        ({"a": (math.nan,)}, {}, ValueError, r"a\[0\] must be None.*got nan"),
        ({"budget": (1,)}, {}, ValueError, "a setting must be named"),
        ({"a": range(101), "b": range(100)}, {}, ValueError, "at most 10,000 combinations, got 10,100. Set a sample"),
        ({"a": range(101), "b": range(101)}, {"sample": 10_001}, ValueError, "at most 10,000 .* got 10,001"),
        ({name: range(100) for name in "abcdefghij"}, {"sample": 3}, ValueError, "at most .* combinations"),
        ({"a": (1,)}, {"sample": 0}, ValueError, "sample must be at least 1"),
        ({"a": (1,)}, {"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_wrong_grids(values: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grid(values, **options)
