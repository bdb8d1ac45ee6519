from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from matplotlib.figure import Figure

from dir_toolkit.errors import CheckpointError, DirToolkitError, NonFiniteLossError, RunExistsError, SettingsError
from dir_toolkit.experiment.results.drawing import save_figure
from dir_toolkit.experiment.training.search import STATE, Search, search, search_figure

pytestmark = pytest.mark.usefixtures("unsynced_database")

KNOBS: dict[str, Any] = {
    "lr": [{"lr": lr} for lr in (1, 2, 4)],
    "window": [{"size": 3, "sigma": 1.0}, {"size": 5, "sigma": 2.0}],
}


def run(settings: dict[str, Any], epochs: int) -> float:
    return abs(settings["lr"] - 2) + abs(settings["sigma"] - 2) + 1 / epochs


def searched(folder: Path, function: Callable[..., Any] = run, knobs: Any = KNOBS, **options: Any) -> Search:
    return search(knobs, function, **{"epochs": 12, "folder": folder, **options})


def states(result: Search) -> list[str]:
    return [trial.state.name for trial in result.study.trials]


def recorded(calls: list[Any], function: Callable[..., Any] = run) -> Callable[..., float]:
    def remembered(settings: dict[str, Any], epochs: int) -> Any:
        calls.append((settings["lr"], settings["sigma"], epochs))
        return function(settings, epochs)

    return remembered


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, list[Any]]:
    """A search that was never stopped, and its calls."""
    calls: list[Any] = []
    return searched(tmp_path_factory.mktemp("whole"), recorded(calls)), calls


def test_the_best_of_those_that_were_trained_to_the_end(whole: tuple[Search, list[Any]]) -> None:
    result, calls = whole
    assert result.settings == {"lr": 2, "size": 5, "sigma": 2.0}
    assert result.score == pytest.approx(1 / 12)
    assert len(result.study.trials) == 6
    # The first is the best so far; (4, 1.0) and (4, 2.0) are in the worse half at a quarter of the epochs already.
    assert [call for call in calls if call[:2] == (1, 1.0)] == [(1, 1.0, 3), (1, 1.0, 6), (1, 1.0, 12)]
    assert [call for call in calls if call[0] == 4] == [(4, 1.0, 3), (4, 2.0, 3)]
    assert states(result)[-2:] == ["PRUNED", "PRUNED"]


@pytest.mark.parametrize(("epochs", "budgets"), [(1, [1]), (2, [1, 2]), (7, [1, 3, 7]), (20, [5, 10, 20])])
def test_a_single_candidate_is_trained_for_ever_more_epochs(tmp_path: Path, epochs: int, budgets: list[int]) -> None:
    calls: list[Any] = []
    result = searched(tmp_path, recorded(calls), {"all": [{"lr": 2, "sigma": 2.0}]}, epochs=epochs)
    assert [call[2] for call in calls] == budgets
    assert result.settings == {"lr": 2, "sigma": 2.0}


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_search_that_was_stopped_repeats_nothing_and_ends_alike(
    tmp_path: Path, stop: int, whole: tuple[Search, list[Any]]
) -> None:
    expected, calls = whole
    first: list[Any] = []

    def stopped(settings: dict[str, Any], epochs: int) -> float:
        if len(first) == stop:
            raise KeyboardInterrupt
        return run(settings, epochs)

    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "stopped", recorded(first, stopped))
    rest: list[Any] = []
    result = searched(tmp_path / "stopped", recorded(rest), resume=True)
    assert first[:-1] + rest == calls  # the run that was stopped is made again
    assert result.settings == expected.settings
    assert states(result) == states(expected)
    if stop == 4:
        again: list[Any] = []
        assert searched(tmp_path / "stopped", recorded(again), resume=True).settings == expected.settings
        assert again == []


@contextmanager
def killed_before(which: Callable[[str], bool], count: int = 1) -> Iterator[list[str]]:
    """A context that ends the search before the statement so many that changes its file, of those that fit. What is not
    committed by then is lost, as in a process that is killed. Yields the statements that fit."""
    met: list[str] = []

    def execute(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.lstrip().startswith(("SELECT", "PRAGMA")) and which(statement):
            met.append(statement)
            if len(met) == count:
                raise KeyboardInterrupt

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", execute)
    with suppress(KeyboardInterrupt):
        yield met
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", execute)


def test_a_search_that_is_killed_before_any_change_of_its_file_ends_alike(tmp_path: Path) -> None:
    """The second of two candidates is in the worse half."""
    knobs, calls = {"all": [{"lr": 2, "sigma": 2.0}, {"lr": 4, "sigma": 2.0}]}, []
    with killed_before(lambda statement: "INTO trials" in statement):
        searched(tmp_path / "new", knobs=knobs, epochs=2)
    with killed_before(lambda statement: True, count=0) as changes:
        expected = searched(shutil.copytree(tmp_path / "new", tmp_path / "whole"), knobs=knobs, epochs=2, resume=True)
    assert len(changes) > 10
    assert states(expected) == ["COMPLETE", "PRUNED"]
    for count in range(1, len(changes) + 1):
        folder = shutil.copytree(tmp_path / "new", tmp_path / str(count))
        with killed_before(lambda statement: True, count) as met:
            searched(folder, knobs=knobs, epochs=2, resume=True)
        assert met == changes[:count]
        result = searched(folder, recorded(calls), knobs, epochs=2, resume=True)
        assert (result.settings, result.score) == (expected.settings, expected.score)
        assert states(result) == states(expected), met[-1]
    assert (4, 2.0, 2) not in calls


def test_a_search_that_is_killed_while_its_file_is_made_goes_on_ever_after(tmp_path: Path) -> None:
    with killed_before(lambda statement: statement.lstrip().startswith("CREATE UNIQUE INDEX")) as met:
        searched(tmp_path)
    assert len(met) == 1
    with killed_before(lambda statement: "INTO trials" in statement):
        searched(tmp_path, resume=True)
    for _ in range(2):
        assert searched(tmp_path, resume=True).settings == {"lr": 2, "size": 5, "sigma": 2.0}


def test_what_fails_is_never_the_best_and_other_errors_end_the_search(tmp_path: Path) -> None:
    def fails(settings: dict[str, Any], epochs: int) -> float:
        if settings["lr"] == 2:
            if settings["sigma"] == 2:
                raise NonFiniteLossError("fit: the loss must be finite, got nan.")
            return float("nan") if epochs == 12 else 0.0
        return run(settings, epochs)

    result = searched(tmp_path / "some", fails)
    assert result.settings == {"lr": 1, "size": 5, "sigma": 2.0}
    messages = {trial.user_attrs["message"] for trial in result.study.trials if trial.state.name == "FAIL"}
    assert messages == {"its score is nan", "NonFiniteLossError: fit: the loss must be finite, got nan."}

    def broken(settings: dict[str, Any], epochs: int) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        searched(tmp_path / "broken", broken)

    def diverges(settings: dict[str, Any], epochs: int) -> float:
        raise NonFiniteLossError(f"fit: {settings['lr']} is too much")

    with pytest.raises(SettingsError, match=r"(?s)^search: all 6 candidates failed:\n  lr=1 .*: fit: 4 is too much"):
        searched(tmp_path / "all", diverges)


def test_a_search_is_never_overwritten_nor_taken_for_another(tmp_path: Path) -> None:
    searched(tmp_path, fingerprint={"data": "faces"})
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(RunExistsError, match=r"^search: a search is never overwritten, got one in .*resume=True"):
        searched(tmp_path)
    for changes, says in (
        ({"epochs": 6}, "epochs was 12 and is 6"),
        ({"knobs": {"lr": KNOBS["lr"]}}, "knobs"),
        ({"fingerprint": {"data": "digits"}}, "data was 'faces' and is 'digits'"),
    ):
        options: dict[str, Any] = {"fingerprint": {"data": "faces"}, **changes}
        with pytest.raises(CheckpointError, match=rf"search\.db must be of the same search, got .*{says}"):
            searched(tmp_path, resume=True, **options)
    assert (tmp_path / STATE).read_bytes() == before
    with pytest.raises(DirToolkitError, match="epochs must be at least 1"):
        searched(tmp_path / "none", epochs=0)


@pytest.mark.parametrize("content", [b"mine", b""])
def test_a_damaged_state_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    if not content:  # an empty file is a database without tables, as a search that was killed at once leaves it
        assert searched(tmp_path, resume=True).settings["lr"] == 2
        return
    with pytest.raises(
        CheckpointError, match=r"^search: .*search\.db must be the whole state of a search, got .*not a"
    ):
        searched(tmp_path, resume=True)
    assert (tmp_path / STATE).read_bytes() == content
    folder = tmp_path / "file"
    folder.write_text("mine")
    with pytest.raises(OSError, match="must be a folder, or lie in one"):
        searched(folder)


def test_curves_are_drawn_and_optuna_speaks_on_no_stream(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = searched(tmp_path)
    streams = capfd.readouterr()
    assert streams.err == ""
    assert streams.out.count("\n") == sum(len(trial.intermediate_values) for trial in result.study.trials)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    figure = search_figure(result, score_name="validation bMAE ($)")
    assert type(figure) is Figure
    save_figure(figure, tmp_path / "search.png", dpi=50)
    (axes,) = figure.axes
    lines = {tuple(line.get_xdata()): line.get_ydata() for line in axes.lines}
    assert len(axes.lines) == 6
    np.testing.assert_allclose(lines[3, 6, 12], result.study.trials[3].intermediate_values[12], atol=3)
    assert axes.get_ylabel() == r"validation bMAE (\$)"
