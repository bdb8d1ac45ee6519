"""Search for settings on validation data, by optuna and successive halving."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._checks import caller, instance, missing_package, problem, require, whole
from ..._settings import described, differing
from ...errors import CheckpointError, DirToolkitError, RunExistsError, SettingsError
from ..files import naming
from ..results.drawing import GREY, PALETTE, legend_above, literal, look, new_figure

try:
    import optuna
    import sqlalchemy
except ImportError as error:
    raise missing_package("optuna", error) from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STATE", "Search", "search", "search_figure"]

STATE = "search.db"
"""The file with the state of a search in its folder."""

_REDUCTION = 2  # of the candidates at each number of epochs, one in so many goes on


@dataclass(frozen=True)
class Search:
    """The result of :func:`search`."""

    settings: dict[str, Any]
    """The settings with the best score of all candidates that were trained to the end."""
    score: float
    """Their score."""
    study: optuna.Study
    """One trial per candidate: ``study.trials_dataframe()`` tabulates them, and optuna's dashboard reads the file."""


def search(
    knobs: Mapping[str, Sequence[Mapping[str, Any]]],
    run: Callable[[dict[str, Any], int], float],
    *,
    epochs: int,
    folder: Path,
    resume: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
) -> Search:
    """Search by successive halving: all candidates train for a quarter of the epochs, the better ones for a half, the
    best for all.

    Candidates run one after the other. At a quarter and at a half of the epochs a candidate continues only if it is in
    the better half of the candidates so far, as in optuna's ``SuccessiveHalvingPruner``. A candidate fails if its run
    raises an error of this package, such as ``NonFiniteLossError``, or its score is not finite; any other error ends
    the search. The state is saved in ``search.db``, so that a search continues without repeating runs wherever it was
    stopped or killed.

    Each number of epochs needs a new training, since a cosine schedule depends on it. The score must come from
    validation data, never from test data.

    Args:
        knobs: for each name the alternatives to try, each a dict of settings. All combinations are candidates.
        run: called as ``run(settings, epochs)``; returns the score. Lower is better.
        epochs: the number of epochs of a whole training.
        folder: the folder of the search, which is created if missing.
        resume: whether to continue a search in the folder.
        fingerprint: plain values that identify this search.
    Raises:
        SettingsError: all candidates failed. RunExistsError: the folder holds a search and ``resume`` is false.
        CheckpointError: that search is damaged, or had other knobs, epochs or another fingerprint.
    Source:
        Li et al. 2018, "A system for massively parallel hyperparameter tuning" (arXiv:1810.05934).
    """
    instance(Mapping, knobs=knobs)
    epochs = whole("epochs", epochs, low=1)
    budgets = sorted({max(1, epochs // 4), max(1, epochs // 2), epochs})
    choices = {knob: {_words(settings): dict(settings) for settings in tried} for knob, tried in knobs.items()}
    axes = {knob: optuna.distributions.CategoricalDistribution(list(words)) for knob, words in choices.items()}
    path = Path(folder) / STATE
    free, fix = resume or not path.exists(), "Go on with it by resume=True, or choose another folder."
    require(free, "a search is never overwritten", got=f"one in {folder}", fix=fix, error=RunExistsError)
    with naming(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)  # before anything is trained
    identity = described("fingerprint", {"knobs": knobs, "epochs": epochs, **(fingerprint or {})})
    study = _opened(path, identity)
    for values in itertools.product(*choices.values()):
        params = dict(zip(choices, values, strict=True))
        _try(study, params, axes, partial(run, _settings(params, choices)), budgets)
    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if not complete:
        stopped = "it was stopped early"
        failures = [f"{_name(t.params)}: {t.user_attrs.get('message', stopped)}" for t in study.trials]
        raise SettingsError("\n  ".join([f"{caller()[0]}: all {len(study.trials)} candidates failed:", *failures]))
    best = study.best_trial
    assert best.value is not None
    return Search(_settings(best.params, choices), best.value, study)


@look()
def search_figure(result: Search, *, score_name: str) -> Figure:
    """The score of each candidate against epochs, with the candidates' settings as names.

    Args:
        score_name: the name of the score, with its unit.
    """
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    best = result.study.best_trial.number
    for trial in result.study.get_trials(deepcopy=False):
        name, steps = literal(_name(trial.params)), sorted(trial.intermediate_values)
        scores = [trial.intermediate_values[step] for step in steps]
        if trial.number == best:
            axes.plot(steps, scores, "o-", color=PALETTE[1], linewidth=2.5, label=f"best: {name}")
            continue
        axes.plot(steps, scores, "o-", color=GREY, linewidth=1.0)
        if steps:
            axes.annotate(name, (steps[-1], scores[-1]), fontsize="x-small", color=GREY)
    axes.set_xlabel("epochs")
    axes.set_ylabel(literal(score_name))
    legend_above(figure, axes)
    return figure


def _try(
    study: optuna.Study,
    params: dict[str, str],
    axes: dict[str, Any],
    run: Callable[[int], float],
    budgets: Sequence[int],
) -> None:
    """Run one candidate to its end, or resume it."""
    earlier = next((trial for trial in study.trials if trial.params == params), None)
    if earlier is not None and earlier.state.is_finished():
        print(f"  {_name(params)}: done before", flush=True)
        return
    if earlier is None:  # not by study.ask, which adds a trial and its settings one after the other
        running = optuna.trial.TrialState.RUNNING
        study.add_trial(optuna.trial.create_trial(state=running, params=params, distributions=axes))
        earlier = study.trials[-1]
    trial, known = optuna.trial.Trial(study, earlier._trial_id), earlier.intermediate_values
    for epochs in budgets:
        try:
            score = known[epochs] if epochs in known else float(run(epochs))
            message = "" if math.isfinite(score) else f"its score is {score}"
        except DirToolkitError as error:
            message = f"{type(error).__name__}: {error}"
        if message:
            print(f"  {_name(params)}: failed, {message.splitlines()[0]}", flush=True)
            trial.set_user_attr("message", message)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        print(f"  {_name(params)}: {score:.4g} after {epochs} epochs", flush=True)
        if epochs not in known:
            trial.report(score, epochs)
        if epochs < budgets[-1] and not _among_the_best(study, epochs, score):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
    study.tell(trial, score)


def _among_the_best(study: optuna.Study, epochs: int, score: float) -> bool:
    """Whether a candidate goes on after so many epochs. optuna's pruner would say the same, but only once: a candidate
    that was killed after its answer, and before it was obeyed, went on."""
    known = [trial.intermediate_values for trial in study.trials]
    scores = sorted(values[epochs] for values in known if epochs in values)
    return score <= scores[max(len(scores) // _REDUCTION, 1) - 1]


def _opened(path: Path, identity: dict[str, Any]) -> optuna.Study:
    """A new search, or the search in the file, which must have the same identity."""
    try:
        with _quiet():
            # Without a pool, so that no connection stays open when the search is over.
            pool = {"poolclass": sqlalchemy.pool.NullPool}
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=pool)
            # Not by load_if_exists: it relies on an index, which a file lacks whose making was killed.
            make = optuna.load_study if storage.get_all_studies() else optuna.create_study
            study = make(storage=storage, study_name="search")
        text = study.user_attrs.get("settings")
        saved = identity if text is None else json.loads(text)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, ValueError) as error:
        rule, fix = f"{path} must be the whole state of a search", "Put an intact copy there, or choose another folder."
        raise problem(rule, got=str(error).splitlines()[0], fix=fix, error=CheckpointError) from error
    differs = differing(saved, json.loads(json.dumps(identity)))
    fix = "Go on with what it was started with, or choose another folder."
    require(not differs, f"{path} must be of the same search", got=differs, fix=fix, error=CheckpointError)
    study.set_user_attr("settings", json.dumps(identity))
    return study


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without optuna's output on stderr."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _name(params: Mapping[str, str]) -> str:
    return " ".join(params.values()) or "no settings"


def _settings(params: Mapping[str, str], choices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {name: value for knob, words in params.items() for name, value in choices[knob][words].items()}
