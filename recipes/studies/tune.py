"""Settings of one method on faces: chosen on validation by successive halving, and then trained with.

    python recipes/studies/tune.py --methods soft --knobs sigma lr                                   # portraits
    python recipes/studies/tune.py --data utkface --root DIR --methods soft+tau --knobs sigma        # real faces

Every combination of the knobs is trained for a quarter of the epochs, the better ones for a half, the best for all. The
tau of a method that is adjusted after training needs no knob, since every candidate is judged at its best tau. The
trials lie in ``runs/tune/<data>/tune``, and the table, figures and report of the choice lie beside that folder.
``--resume`` continues after a stop. ``recipes/studies/compare.py`` has the chosen settings as options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faces
from command_line import parse, refuse, run
from faces import METHODS, Method, named

KNOBS: dict[str, tuple[dict[str, Any], ...]] = {
    "kernel": tuple(
        {"kernel_size": n, "kernel_sigma": sigma} for n, sigma in ((3, 1.0), (5, 2.0), (9, 4.0), (15, 6.0))
    ),
    "sigma": tuple({"label_sigma": sigma} for sigma in (2.0, 3.0, 5.0, 8.0)),
    "scheme": tuple({"scheme": scheme} for scheme in ("inverse", "sqrt_inverse", "effective_number", "dense")),
    "momentum": tuple({"fds_momentum": momentum} for momentum in (0.0, 0.5, 0.9)),
    "lr": tuple({"lr": lr} for lr in (1e-3, 2e-3, 4e-3)),
}
"""The candidates of each knob. A candidate is one setting, or several that are varied together."""


@dataclass(frozen=True)
class Run(faces.Run):
    """What is run, and where."""

    methods: tuple[str, ...] = ("default",)
    """One method."""
    seeds: int = 1
    """The number of seeds after the choice; candidates are trained with seed 0."""
    knobs: tuple[str, ...] = ("sigma",)
    """The knobs to choose: kernel, sigma, scheme, momentum or lr."""
    out: Path | None = None
    """Folder of all results; by default runs/tune/<data>."""


@dataclass(frozen=True)
class Settings(Run, faces.Settings):
    """All settings."""


def main(settings: Settings) -> None:
    from dir_toolkit.errors import SettingsError
    from dir_toolkit.experiment.training.runtime import start_runtime
    from dir_toolkit.experiment.training.search import search, search_figure

    out = settings.out or Path("runs/tune") / settings.data
    refuse("recipes/studies/tune.py", [*faults(settings), *faces.faults(settings, out)])
    (name,) = named(settings.methods)
    with start_runtime(settings.device, settings.precision) as runtime:
        if runtime.world > 1:
            rule = "recipes/studies/tune.py must run in one process"
            raise SettingsError(f"{rule}; drop torchrun, and train with what it chose afterwards.")

        def score(chosen: dict[str, Any], epochs: int) -> float:
            """The least validation bMAE of a candidate, or that at its best tau."""
            trial = replace(settings, **chosen, epochs=epochs, resume=True)
            place = out / "tune" / "-".join(f"{knob}={value}" for knob, value in chosen.items()) / f"{epochs}-epochs"
            study = faces.study(trial, place, runtime, "tune.py")
            trained = study.trial(study.tasks[0], name, 0).result()  # type: ignore[index]
            if trained.tau is not None:
                return float(trained.tau.scores.min())
            return min(row["val_bmae"] for row in trained.history)

        study = faces.study(settings, out, runtime, "tune.py")  # which refuses an existing study
        fingerprint = {
            "method": name,
            **{k: str(v) for k, v in study.settings.items() if k not in ("methods", "seeds")},
        }
        tried = {knob: KNOBS[knob] for knob in settings.knobs}
        options: dict[str, Any] = {"epochs": settings.epochs, "folder": out / "tune", "resume": settings.resume}
        choice = search(tried, score, fingerprint=fingerprint, **options)
        best = ", ".join(f"--{knob.replace('_', '-')} {value}" for knob, value in choice.settings.items())
        study = faces.study(replace(settings, **choice.settings, resume=True), out, runtime, "tune.py")
        study.say(f"Chosen on validation: {best}.")
        study.run([name], seeds=settings.seeds)
        study.report(
            title=f"{name}, tuned",
            figures={"Settings tried on validation": search_figure(choice, score_name="validation bMAE (years)")},
            notes=[*faces.NOTES, f"Chosen on validation: {best}."],
            titles={name: METHODS[name].title},
        )


def faults(settings: Settings) -> list[str]:
    problems = []
    if len(named(settings.methods)) != 1:
        problems.append("--methods must name one method, for each has settings of its own.")
    knobs = settings.knobs
    if not knobs or not set(knobs) <= set(KNOBS) or len(set(knobs)) < len(knobs):
        problems.append(f"--knobs must name some of {', '.join(KNOBS)}, each once, got {' '.join(knobs) or 'none'}.")
    elif idle := [knob for knob in knobs if not moved(knob, settings.methods)]:
        problems.append(f"--knobs {' '.join(idle)} would change nothing in {' '.join(settings.methods)}.")
    return problems


def moved(knob: str, methods: Sequence[str]) -> bool:
    """Whether a knob changes the training of one of the methods, or of one that they start from."""
    names = [name for name in named(methods) if name in METHODS]
    names += [start for name in names if (start := METHODS[name].start) is not None]

    def smooths(method: Method, unless: str) -> bool:
        return method.fds is not None and unless not in method.fds

    used: dict[str, Callable[[Method], bool]] = {
        "kernel": lambda method: method.weights == "smoothed" or smooths(method, "kernel"),
        "sigma": lambda method: (
            method.head not in ("regression", "gaussian") and method.loss != "crps" and not method.hard
        ),
        "scheme": lambda method: method.weights is not None and method.scheme is None,
        "momentum": lambda method: smooths(method, "momentum"),
        "lr": lambda method: True,
    }
    return any(used[knob](METHODS[name]) for name in names) or not names


if __name__ == "__main__":
    run(main, parse(Settings, parts=(Run, *faces.PARTS), description=f"{__doc__}\n\n{faces.overview()}"))
