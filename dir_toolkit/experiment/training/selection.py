"""Settings are chosen by their scores after little training first, then after more for those that did well."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._checks import caller, instance, number, problem, whole
from ...errors import CheckpointError, DirToolkitError, RunExistsError, SettingsError
from .provenance import write_json

__all__ = ["Selection", "grid", "successive_halving"]

_STATE = "selection.json"
_VERSION = 1
_MOST = 10_000
_COLUMNS = ("candidate", "rung", "budget", "seed", "score", "status", "seconds", "message")
_KINDS = {"candidate": int, "rung": int, "budget": int, "seed": int, "status": str, "message": str, "scores": dict}


@dataclass(frozen=True)
class Selection:
    """What :func:`successive_halving` found."""

    candidates: tuple[dict[str, Any], ...]
    """The settings that were tried, in the order given."""
    table: list[dict[str, Any]]
    """A row a run, in the order they were made, of plain values: ``candidate`` (its place, from 0), a column for each
    setting, ``rung`` (from 1), ``budget``, ``seed``, ``score`` (NaN where it failed), a column ``score/<name>`` for
    each further score, ``status`` ("ok" or "failed"), ``seconds`` and ``message`` (of the failure)."""
    minimize: bool
    """Whether a lower score is better."""

    @property
    def best(self) -> dict[str, Any]:
        """The candidate with the best score among those with the largest budget; one that failed is never it."""
        return copy.deepcopy(self.candidates[self.ranking[0]])

    @property
    def best_score(self) -> float:
        """Of the best candidate at its largest budget, the mean over seeds."""
        return self.curve(self.ranking[0])[-1][1]

    @property
    def ranking(self) -> list[int]:
        """Places of all candidates, best first: by budget reached, then by score; failed ones last."""
        curves = [self.curve(candidate) for candidate in range(len(self.candidates))]

        def order(candidate: int) -> tuple[bool, int, float, int]:
            budget, score = curves[candidate][-1]
            failed = math.isnan(score)
            return failed, -budget, 0.0 if failed else score if self.minimize else -score, candidate

        return sorted(range(len(curves)), key=order)

    def curve(self, candidate: int) -> list[tuple[int, float]]:
        """Budgets and scores of a candidate, each the mean over seeds; NaN where a seed failed."""
        scores: dict[int, list[float]] = {}
        for row in self.table:
            if row["candidate"] == candidate:
                scores.setdefault(row["budget"], []).append(row["score"])
        return [(budget, _mean(found)) for budget, found in scores.items()]


def successive_halving(
    candidates: Sequence[Mapping[str, Any]],
    run: Callable[[dict[str, Any], int, int], float | Mapping[str, float]],
    *,
    budgets: Sequence[int] = (3, 6, 12),
    reduction: int = 3,
    seeds: Sequence[int] = (0,),
    minimize: bool = True,
    score: str | None = None,
    folder: Path | None = None,
    resume: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    say: Callable[[str], object] | None = print,
) -> Selection:
    """Run all candidates on the least budget, the best 1 / ``reduction`` of them on the next, and so on.

    Of n candidates ``max(1, n // reduction)`` go on; where two score alike, the earlier. A single one that is left goes
    straight to the largest budget. A run that ends in an error of ours (``NonFiniteLossError``), or in a score that
    is NaN or infinite, has failed: it ranks last, goes no further, spares its candidate the other seeds, and its
    message is kept; other errors end the search. After each run the state is written to ``folder/selection.json``, so
    that a search that was stopped goes on without repeating one.

    Nothing is known here of training: ``run`` decides whether a larger budget goes on from a checkpoint or starts
    afresh. A schedule that ends with the budget, as a cosine does, needs a fresh start, since its first 3 of 12 epochs
    are not its 3 of 3. Score on validation data, never on test data. Search on one process; ``run`` may start ranks.

    Args:
        candidates: settings by name, None, bool, int, float, str, and lists, tuples or dicts of them; see :func:`grid`.
        run: called as ``run(candidate, budget, seed)``; returns the score, or several by name.
        budgets: rising whole numbers, such as epochs.
        reduction: at least 2.
        seeds: each candidate is run with each; its score is the mean.
        score: which decides, where ``run`` returns several.
        folder: of the search; made if missing. None keeps no state.
        resume: go on where the folder holds a search.
        fingerprint: plain values that tell this search from others: what all its runs share.
        say: is told each step in words; None is silent.
    Raises:
        SettingsError: all candidates failed. RunExistsError: the folder holds a search and ``resume`` is false.
        CheckpointError: that search is damaged, or had other candidates, budgets, seeds or ways to score.
        ValueError: there is no candidate, two are alike, one holds what is not plain; a setting has the name of a
        column of :attr:`Selection.table`; budgets do not rise; seeds repeat; there is no folder to resume from; ``run``
        returns several scores and ``score`` names none of them. TypeError: an argument or a score is of another kind.
    Source:
        Jamieson and Talwalkar 2016 (arXiv:1502.07943), with the fixed reduction of Li et al. 2018 (arXiv:1603.06560).

    >>> def run(candidate, epochs, seed):
    ...     return abs(candidate["lr"] - 2) + 1 / epochs
    >>> found = successive_halving(grid({"lr": (1, 2, 4)}), run, say=None)
    >>> found.best, [(row["lr"], row["budget"]) for row in found.table]
    ({'lr': 2}, [(1, 3), (2, 3), (4, 3), (2, 12)])
    """
    tried = _checked_candidates(candidates)
    instance(Callable, run=run)
    budgets = _whole_numbers("budgets", budgets, low=1)
    if any(after <= before for before, after in itertools.pairwise(budgets)):
        raise problem("budgets must rise", got=budgets)
    seeds = _whole_numbers("seeds", seeds, low=0)
    if len(set(seeds)) < len(seeds):
        raise problem("seeds must differ", got=seeds)
    reduction = whole("reduction", reduction, low=2)
    instance(bool, minimize=minimize, resume=resume)
    if score is not None:
        instance(str, score=score)
    if say is not None:
        instance(Callable, say=say)
    if resume and folder is None:
        raise problem("folder must be given to resume", got="None")
    fingerprint = {} if fingerprint is None else fingerprint
    instance(Mapping, fingerprint=fingerprint)
    _plain("fingerprint", dict(fingerprint))
    identity = {
        "candidates": list(tried),
        "budgets": budgets,
        "reduction": reduction,
        "seeds": seeds,
        "minimize": minimize,
        "score": score,
        "fingerprint": dict(fingerprint),
    }
    state = _State(None if folder is None else Path(folder) / _STATE, identity)
    state.open(resume)

    def tell(message: str) -> None:
        if say is not None:
            say(message)

    table: list[dict[str, Any]] = []
    alive, rung = list(range(len(tried))), 0
    while alive and rung < len(budgets):
        count = f"{len(alive)} candidate{'s' * (len(alive) != 1)}"
        tell(f"rung {rung + 1} of {len(budgets)}: {count}, budget {budgets[rung]}")
        means = {}
        for candidate in alive:
            told: list[float] = []
            for seed in seeds:
                row, old = state.find(candidate, budgets[rung], seed), True
                if row is None:
                    row, old = _row(run, tried[candidate], budgets[rung], seed, score), False
                    state.add({"candidate": candidate, "rung": rung + 1, **row})
                value = math.nan if row["score"] is None else row["score"]
                further = {f"score/{name}": math.nan if x is None else x for name, x in row["scores"].items()}
                kept = {name: row[name] for name in ("status", "seconds", "message")}
                place = {"rung": rung + 1, "budget": budgets[rung], "seed": seed, "score": value}
                table.append({"candidate": candidate, **copy.deepcopy(tried[candidate]), **place, **further, **kept})
                told.append(value)
                name = _words(tried[candidate]) + f", seed {seed}" * (len(seeds) > 1)
                what = f"failed, {row['message'].splitlines()[0]}" if math.isnan(value) else f"{value:.4g}"
                when = "done before" if old else f"{row['seconds']:.0f} s"
                tell(f"  {name}: {what} ({when})")
                if math.isnan(value):
                    break
            means[candidate] = _mean(told)
        good = [candidate for candidate in alive if not math.isnan(means[candidate])]
        good.sort(key=lambda candidate: means[candidate] if minimize else -means[candidate])
        alive = sorted(good[: max(1, len(alive) // reduction)])
        rung = max(rung + 1, len(budgets) - 1) if len(alive) == 1 else rung + 1

    selection = Selection(tried, table, minimize)
    if math.isnan(selection.best_score):
        failures = [f"{_words(tried[row['candidate']])}: {row['message']}" for row in table if row["message"]]
        raise SettingsError("\n  ".join([f"{caller()[0]}: all {len(tried)} candidates failed:", *failures]))
    tell(f"best: {_words(selection.best)}, {selection.best_score:.4g}")
    return selection


def grid(
    values: Mapping[str, Sequence[Any]], *, sample: int | None = None, seed: int = 0
) -> tuple[dict[str, Any], ...]:
    """Every combination of the values of several settings; the last setting varies fastest.

    Args:
        values: of each setting, by its name.
        sample: take so many of the combinations at random, in the grid's order; all where there are no more.
        seed: of the sample.
    Raises:
        ValueError: a setting has no value, or one twice, or one that is not plain; its name is that of a column of
        :attr:`Selection.table` or no identifier; there are more than 10,000 combinations and no ``sample``.

    >>> grid({"sigma": (1, 2), "tau": (0, 0.3)})
    ({'sigma': 1, 'tau': 0}, {'sigma': 1, 'tau': 0.3}, {'sigma': 2, 'tau': 0}, {'sigma': 2, 'tau': 0.3})
    """
    instance(Mapping, values=values)
    seed = whole("seed", seed, low=0)
    choices: dict[str, list[Any]] = {}
    for name, given in values.items():
        _setting_name(name)
        if isinstance(given, str) or not isinstance(given, Sequence):
            fix = f"Use ({given!r},) for one value."
            raise problem(f"{name} must be a sequence", got=type(given).__name__, fix=fix, error=TypeError)
        if not given:
            raise problem(f"{name} must have at least one value", got="none")
        choices[name] = list(given)
        _plain(name, choices[name])
        _no_twins(f"values of {name}", choices[name])
    total = math.prod(len(found) for found in choices.values())
    wanted = total if sample is None else min(whole("sample", sample, low=1), total)
    if wanted > _MOST:
        raise problem(f"there must be at most {_MOST:,} combinations", got=f"{wanted:,}", fix="Set a sample.")
    if total > sys.maxsize:
        raise problem(f"values must have at most {sys.maxsize:,} combinations", got=f"{total:,}")
    chosen = range(total) if wanted == total else sorted(random.Random(seed).sample(range(total), wanted))
    return tuple(_combination(choices, place) for place in chosen)


def _combination(choices: dict[str, list[Any]], place: int) -> dict[str, Any]:
    """The combination at a place of the grid, without making those before it."""
    picked = {}
    for name in reversed(choices):
        place, digit = divmod(place, len(choices[name]))
        picked[name] = copy.deepcopy(choices[name][digit])
    return {name: picked[name] for name in choices}


def _row(
    run: Callable[..., Any], candidate: dict[str, Any], budget: int, seed: int, score: str | None
) -> dict[str, Any]:
    """One run, as plain values; a score that is NaN or infinite is None."""
    started, message, found = time.monotonic(), "", None
    try:
        found = run(copy.deepcopy(candidate), budget, seed)
    except DirToolkitError as error:
        message = f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - started, 3)
    scores: dict[str, float | None] = {}
    if isinstance(found, Mapping):
        scores = {str(name): _score(f"the score {name!r}", value) for name, value in found.items()}
        if score not in scores:
            fix = "Name the one that decides by score=."
            raise problem(f"score must be one of {list(scores)}", got=repr(score), fix=fix)
        value = scores[score]
    elif score is not None and not message:
        rule = "run must return scores by name where score names one"
        raise problem(rule, got=type(found).__name__, error=TypeError)
    else:
        value = None if message else _score("what run returns", found)
    if value is None and not message:
        message = "its score is NaN or infinite"
    status = "failed" if value is None else "ok"
    return {
        "budget": budget,
        "seed": seed,
        "score": value,
        "scores": scores,
        "status": status,
        "seconds": seconds,
        "message": message,
    }


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(score / len(scores) for score in scores)  # a sum of what diverged may be too large for a float


def _score(name: str, value: Any) -> float | None:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # of torch and NumPy
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return number(name, value)


class _State:
    """The rows of a search, in a file where there is a folder."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self._path, self._identity = path, identity
        self._rows: dict[tuple[int, int, int], dict[str, Any]] = {}

    def find(self, candidate: int, budget: int, seed: int) -> dict[str, Any] | None:
        return self._rows.get((candidate, budget, seed))

    def add(self, row: dict[str, Any]) -> None:
        self._rows[row["candidate"], row["budget"], row["seed"]] = row
        if self._path is not None:
            state = {"version": _VERSION, "settings": self._identity, "rows": list(self._rows.values())}
            write_json(self._path, state)

    def open(self, resume: bool) -> None:
        """Start afresh, or from the rows in the file."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # before anything is trained
        except (FileExistsError, NotADirectoryError):
            got = f"{self._path.parent}, where a file is in its way"
            raise problem("folder must be a folder", got=got) from None
        if not self._path.exists():
            return
        if not resume:
            raise problem(
                "a search is never overwritten",
                got=f"one in {self._path.parent}",
                fix="Go on with it by resume=True, or choose another folder.",
                error=RunExistsError,
            )
        try:
            state = json.loads(self._path.read_bytes())
            settings, rows = state["settings"], state["rows"]
            sound = state["version"] == _VERSION and isinstance(settings, dict) and all(map(_is_row, rows))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            sound = False
        if not sound:
            raise problem(
                f"{self._path} must be the whole state of a search",
                got="a damaged one, or one of another version",
                fix="Put an intact copy in its place, or choose another folder.",
                error=CheckpointError,
            )
        differ = [
            name if name in ("candidates", "fingerprint") else f"{name} ({settings.get(name)} then, {now} now)"
            for name, now in self._identity.items()
            if _text(settings.get(name)) != _text(now)
        ]
        if differ:
            raise problem(
                f"{self._path} must be of the same search",
                got=f"other {', '.join(differ)}",
                fix="Go on with what it was started with, or choose another folder.",
                error=CheckpointError,
            )
        self._rows = {(row["candidate"], row["budget"], row["seed"]): row for row in rows}


def _is_row(row: Any) -> bool:
    """Whether a row from a file is one that :func:`_row` could have made."""
    if any(type(row[name]) is not kind for name, kind in _KINDS.items()):
        return False
    if any(not _is_score(value) for value in (row["score"], *row["scores"].values())):
        return False
    failed = row["score"] is None
    told = row["status"] == ("failed" if failed else "ok") and bool(row["message"]) == failed
    return told and row["seconds"] is not None and _is_score(row["seconds"])


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _checked_candidates(candidates: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    if isinstance(candidates, (str, Mapping)) or not isinstance(candidates, Sequence):
        raise problem("candidates must be a sequence of dicts", got=type(candidates).__name__, error=TypeError)
    if not candidates:
        raise problem("candidates must hold at least one", got="none")
    for place, candidate in enumerate(candidates):
        instance(Mapping, **{f"candidates[{place}]": candidate})
        for name, value in candidate.items():
            _setting_name(name)
            _plain(f"candidates[{place}][{name!r}]", value)
    _no_twins("candidates", [dict(candidate) for candidate in candidates])
    return tuple(copy.deepcopy(dict(candidate)) for candidate in candidates)


def _setting_name(name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier() or name in _COLUMNS:
        taken = ", ".join(_COLUMNS)
        raise problem(f"a setting must be named by an identifier other than {taken}", got=repr(name))


def _plain(name: str, value: Any) -> None:
    """What JSON gives back as it was, tuples apart."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return
    if type(value) in (list, tuple):
        for place, item in enumerate(value):
            _plain(f"{name}[{place}]", item)
        return
    if type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            _plain(f"{name}[{key!r}]", item)
        return
    rule = f"{name} must be None, a bool, a finite number, a str, or lists and dicts of them"
    got = repr(value) if type(value) is float else type(value).__name__
    raise problem(rule, got=got, fix="Use .item() for a number of NumPy or torch.")


def _no_twins(name: str, values: Sequence[Any]) -> None:
    seen: dict[str, int] = {}
    for place, value in enumerate(values):
        first = seen.setdefault(_text(value), place)
        if first != place:
            raise problem(f"{name} must differ", got=f"{value!r} at {first} and {place}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _whole_numbers(name: str, values: Sequence[int], *, low: int) -> list[int]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or len(values) == 0:
        raise problem(f"{name} must be a sequence of whole numbers", got=repr(values), error=TypeError)
    return [whole(name, value, low=low) for value in values]


def _words(candidate: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in candidate.items()) or "no settings"
