"""All methods for long-tailed ages under one budget: which one should be used?

    python recipes/compare.py                                                       # portraits
    python recipes/compare.py --data utkface --root DIR --methods all --seeds 5     # real faces

Runs are made one after the other, all methods with one seed before the next seed, in ``runs/compare/<data>``. A run
that fails is named at the end and costs the others nothing; ``--resume`` makes up for it, goes on after a stop, and
adds methods and seeds. Several such processes may share a folder, each with methods of its own, those that they start
from included. The result, the table with intervals of the paired differences to the baseline, figures and report cover
all runs in the folder.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import age
from age_methods import GROUPS, METHODS, named, overview, unknown
from command_line import run

if TYPE_CHECKING:  # torch and the toolkit load in main(), so that --help answers at once
    import xarray as xr
    from matplotlib.figure import Figure

    from dir_toolkit.experiment.data.images import Splits
    from dir_toolkit.experiment.results.tables import ResultsTable
    from dir_toolkit.experiment.training.runtime import Runtime


@dataclass(frozen=True)
class Settings(age.Settings):
    """All methods for long-tailed ages under one budget: which one should be used?"""

    methods: tuple[str, ...] = ("all",)
    """What to train, of the names above."""
    seeds: int = 3
    """How many seeds a method is trained with: 0, 1, ..."""
    tune: str = ""
    """Of age.py alone; give what it chose as settings."""
    baseline: str = "vanilla"
    """What the others are compared with."""
    replicates: int = 2000
    """Bootstrap replicates behind each interval."""
    out: Path | None = None
    """Folder of all results; by default runs/compare/<data>."""


def main(settings: Settings) -> None:
    from dir_toolkit.experiment.results.tables import as_text
    from dir_toolkit.experiment.training.runtime import start_runtime

    out = settings.out or Path("runs/compare") / settings.data
    check(settings, out)
    with start_runtime(settings.device, settings.precision) as runtime:
        splits = age.load(settings, runtime)
        todo = [(method, seed) for seed in range(settings.seeds) for method in named(settings.methods)]
        failed = []
        taus = {}
        for done, (method, seed) in enumerate(todo):
            if runtime.is_main:
                print(f"\n{method}, seed {seed} ({done + 1} of {len(todo)})", flush=True)
            try:
                one = age.train(settings, method, replace(runtime, seed=seed), splits, out)
                if one.tau is not None:
                    taus[method, seed] = one.tau
            except Exception as error:
                if runtime.world > 1:  # the other ranks wait for this one
                    raise
                failed.append(f"{method}, seed {seed}: {type(error).__name__}: {error}")
                print(traceback.format_exc(), flush=True)
        if runtime.is_main:
            table = summarise(settings, out, splits, runtime, age.tau_picture(taus), failed)
            print(f"\n{as_text(table)}\nReport: {out / 'report.html'}")
    if failed:
        raise SystemExit("\n  ".join(["recipes/compare.py: these runs failed; --resume tries them again:", *failed]))


def check(settings: Settings, out: Path) -> None:
    """All faults at once, before anything is loaded."""
    faults = unknown("--baseline", [settings.baseline])
    if settings.baseline in GROUPS:
        faults.append(f"--baseline must be one method, got {settings.baseline}.")
    if settings.tune:
        faults.append("--tune is of age.py; give what it chose as settings.")
    if settings.replicates < 100:
        faults.append(f"--replicates must be at least 100, got {settings.replicates}.")
    if settings.baseline in METHODS and settings.baseline not in named(settings.methods) and not settings.resume:
        given = " ".join(settings.methods)
        faults.append(f"--methods must include the baseline {settings.baseline}, got {given}.")
    age.check("recipes/compare.py", replace(settings, tune=""), out, faults)


def summarise(
    settings: Settings,
    out: Path,
    splits: Splits,
    runtime: Runtime,
    pictures: dict[str, Figure],
    failed: list[str],
) -> ResultsTable:
    """All runs in the folder as one result, with its table, figures and report."""
    import dir_toolkit as dt
    from dir_toolkit.errors import SettingsError
    from dir_toolkit.experiment.results.comparison import comparison_table
    from dir_toolkit.experiment.results.schema import load_results
    from dir_toolkit.experiment.results.summary import write_comparison

    errors: dict[tuple[str, int], xr.Dataset] = {}
    others = []
    for method in METHODS:  # in their order
        for path in sorted(out.glob(f"{method}/seed*/results.nc"), key=lambda path: int(path.parent.name[4:])):
            others += [f"{path.parent}: {difference}" for difference in other_budget(settings, path.parent)]
            one = load_results(path)
            errors[method, one["seed"].values.item()] = one.isel({"method": 0, "seed": 0})
    if others:
        rule = "all runs in --out must have had one budget"
        raise SettingsError("\n  ".join([f"recipes/compare.py: {rule}; these had another:", *others]))
    if not any(method == settings.baseline for method, _ in errors):
        rule = f"--baseline must have a finished run in {out}, got {settings.baseline}, which has none"
        fix = "These runs failed; --resume tries them again:" if failed else "Add it to --methods."
        raise SettingsError("\n  ".join([f"recipes/compare.py: {rule}. {fix}", *failed]))
    bins = age.label_axis(settings)
    errors["constant", 0] = age.constant_predictor(splits, bins)
    ds = age.as_result(settings, "comparison of methods", errors, runtime, splits)
    differences = write_comparison(
        out,
        ds,
        baseline=settings.baseline,
        density=dt.LabelDensity.count(splits.train.labels, bins),
        replicates=settings.replicates,
        figures=pictures,
        notes=[*age.NOTES, *(f"Failed: {failure.replace(str(out), 'DIR')}" for failure in failed)],
        titles=age.titles(ds),
        settings=age.shown(settings),
    )
    return comparison_table(ds, differences)


def other_budget(settings: Settings, folder: Path) -> list[str]:
    """In what a run was trained otherwise than the settings say; what was not trained itself has no file to tell."""
    config = folder / "config.json"
    if not config.exists():
        return []
    was = {**asdict(Settings()), **json.loads(config.read_text(encoding="utf-8"))}  # what was not yet a setting then
    names = ["backbone", "loss", "batch_size", "lr", "optimizer", "schedule", "augmentation", "precision", "scheme"]
    names += ["label_sigma"]
    if METHODS[was["method"]].start is None:
        names.append("epochs")
    now = asdict(settings)
    return [f"--{name.replace('_', '-')} {was[name]}, now {now[name]}" for name in names if was[name] != now[name]]


if __name__ == "__main__":
    run(main, Settings, description=f"{Settings.__doc__}\n\n{overview()}")
