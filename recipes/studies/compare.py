"""All methods for long-tailed ages under one budget: which one should be used?

    python recipes/studies/compare.py                                                       # portraits
    python recipes/studies/compare.py --data utkface --root DIR --methods all --seeds 5     # real faces

Runs are made one after the other, all methods with one seed before the next seed, in ``runs/compare/<data>``. A run
that fails is named at the end, and the others go on. ``--resume`` repeats failed runs, continues after a stop, and adds
methods and seeds. Several such processes may share a folder if each has methods of its own, including those that they
start from. The result, the table with intervals of the paired differences to the baseline, the figures and the report
cover all runs in the folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import faces
from command_line import parse, refuse, run

if TYPE_CHECKING:
    from dir_toolkit.experiment.study import Study


@dataclass(frozen=True)
class Run(faces.Run):
    """What is run, and where."""

    baseline: str = "vanilla"
    """The method with which the others are compared."""
    replicates: int = 2000
    """The number of bootstrap replicates per interval."""
    out: Path | None = None
    """Folder of all results; by default runs/compare/<data>."""


@dataclass(frozen=True)
class Settings(Run, faces.Settings):
    """All settings."""


def main(settings: Settings) -> None:
    from dir_toolkit.experiment.training.runtime import start_runtime

    out = settings.out or Path("runs/compare") / settings.data
    refuse("recipes/studies/compare.py", [*faults(settings), *faces.faults(settings, out)])
    with start_runtime(settings.device, settings.precision) as runtime:
        study = faces.study(settings, out, runtime, "compare.py")
        study.run(faces.named(settings.methods), seeds=settings.seeds)
        if runtime.is_main:
            add_finished_runs(study, settings)
        titles = {
            name: method.title for name, method in faces.METHODS.items() if name in {key[1] for key in study.runs}
        }
        study.report(
            title="comparison of methods",
            notes=faces.NOTES,
            titles=titles,
            baseline=settings.baseline,
            replicates=settings.replicates,
        )


def faults(settings: Settings) -> list[str]:
    problems = faces.unknown("--baseline", [settings.baseline])
    if settings.baseline in faces.GROUPS:
        problems.append(f"--baseline must be one method, got {settings.baseline}.")
    if settings.replicates < 100:
        problems.append(f"--replicates must be at least 100, got {settings.replicates}.")
    if (
        settings.baseline in faces.METHODS
        and settings.baseline not in faces.named(settings.methods)
        and not settings.resume
    ):
        problems.append(f"--methods must include the baseline {settings.baseline}, got {' '.join(settings.methods)}.")
    return problems


def add_finished_runs(study: Study, settings: Settings) -> None:
    """Add all runs in the folder to the study, including those of earlier studies and of other processes."""
    from dir_toolkit.errors import SettingsError, StudyError
    from dir_toolkit.experiment.results.schema import load_results
    from dir_toolkit.experiment.study import Run as Finished

    (task,), others = study.tasks, []
    for name in faces.METHODS:
        for path in study.folder.glob(f"{name}/seed*/results.nc"):
            others += [f"{path.parent}: {difference}" for difference in other_budget(settings, path.parent)]
            one, key = load_results(path), (task, name, int(path.parent.name.removeprefix("seed")))
            made = study.runs.get(key)
            study.runs[key] = Finished(one.isel({"method": 0, "seed": 0}), None if made is None else made.trained)
    if others:
        rule = "all runs in --out must have the same budget"
        raise SettingsError("\n  ".join([f"recipes/studies/compare.py: {rule}; these had another one:", *others]))
    if not any(name == settings.baseline for _, name, _ in study.runs):
        rule = f"--baseline must have a finished run in {study.folder}, got {settings.baseline}, which has none"
        fix = "These runs failed; --resume tries them again:" if study.failed else "Add it to --methods."
        failed = [f"{name}, seed {seed}: {why}" for (_, name, seed), why in study.failed.items()]
        raise StudyError("\n  ".join([f"recipes/studies/compare.py: {rule}. {fix}", *failed]))


def other_budget(settings: Settings, folder: Path) -> list[str]:
    """The settings in which a run differs from the present ones. A run that needed no training has no such file."""
    config = folder / "config.json"
    if not config.exists():
        return []
    was = {**asdict(Settings()), **json.loads(config.read_text(encoding="utf-8"))}  # settings that did not exist then
    names = ["backbone", "loss", "batch_size", "lr", "optimizer", "schedule", "augmentation", "precision", "scheme"]
    names += ["compile", "label_sigma"] + ([] if was.get("after") else ["epochs"])
    now = asdict(settings)
    return [f"--{name.replace('_', '-')} {was[name]}, now {now[name]}" for name in names if was[name] != now[name]]


if __name__ == "__main__":
    run(main, parse(Settings, parts=(Run, *faces.PARTS), description=f"{__doc__}\n\n{faces.overview()}"))
