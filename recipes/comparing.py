"""Common parts of recipes: the methods for text and series, a study of them on one task, and a table of errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from command_line import shown, typed_command
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import start_runtime


class Permuted(dt.FDS):
    """A control for FDS: features are smoothed by the labels of other samples of the batch."""

    def labels(self, labels: Tensor) -> Any:
        return super().labels(labels[torch.randperm(len(labels))])


class Noisy(dt.FDS):
    """A control for FDS: noise as large as what FDS would change, feature by feature."""

    def _carried(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        size = (super()._carried(features, rows, axis) - features).detach().square().mean(0).sqrt()
        return features + size * torch.randn_like(features)


def methods(loss: str, selects: str | None = None, fds: type[dt.FDS] = dt.FDS) -> dict[str, Callable[[Trial], Trained]]:
    """Regression with a loss, alone, with LDS weights, with FDS or with both; two controls for FDS; and soft bins
    adjusted by the prior.

    Args:
        selects: the validation error that selects the epoch; None takes the bMAE.
        fds: the class of the methods with FDS.
    """

    def regression(trial: Trial, *, lds: bool = False, smooths: type[dt.FDS] | None = None) -> Trained:
        weights = dt.LDS(trial.bins).fit(trial.density) if lds else None
        model = trial.model(head="regression", loss=loss, outside="clip", weights=weights)
        if smooths is None:
            return trial.fit(model, selects=selects)
        # A model hands its own FDS bins in place of labels, and a control could not permute these.
        smoothing = smooths(trial.bins, model.num_features, outside="clip")
        smoothing.attach(model.head, "input")
        return trial.fit(model, fds=smoothing, selects=selects)

    return {
        "vanilla": regression,
        "lds": lambda trial: regression(trial, lds=True),
        "fds": lambda trial: regression(trial, smooths=fds),
        "lds+fds": lambda trial: regression(trial, lds=True, smooths=fds),
        "permuted": lambda trial: regression(trial, smooths=Permuted),
        "noise": lambda trial: regression(trial, smooths=Noisy),
        "soft+tau": lambda trial: trial.adjusted(trial.fit(trial.model(outside="clip"), selects="mae/all")),
    }


def compare(
    recipe: str,
    task: Task,
    settings: Any,
    out: Path,
    *,
    loss: str,
    optimization: Optimization,
    selects: str | None = None,
) -> Study:
    """Train the methods on a task, write a table and figures, and compare the last method with the first."""
    with start_runtime() as runtime:
        study = Study(
            out,
            task,
            methods(loss, selects),
            runtime,
            optimization,
            settings=shown(settings),
            command=typed_command(recipe),
            resume=settings.resume,
        )
        study.run(settings.methods, seeds=settings.seeds)
        study.report(title="methods")
        study.verdict(settings.methods[-1], settings.methods[0])
        return study


def errors_by_region(table: Mapping[str, Sequence[xr.Dataset]]) -> str:
    """A table of the MAE in each region and the bMAE per method, averaged over runs, and of the test samples."""
    first = next(iter(table.values()))[0]
    names, counts = [*map(str, first.region.values), "bMAE"], [f"{count:,}" for count in first["count"].values]
    lines = [["", *names], ["test samples", *counts]]
    for method, runs in table.items():
        means = np.mean([[*run.mae.values, run.bmae.values[0]] for run in runs], axis=0)
        lines.append([method, *(f"{mean:.2f}" for mean in means)])
    return "\n".join(f"{line[0]:14}" + "".join(f"{cell:>9}" for cell in line[1:]) for line in lines)


def paired_differences(study: Study, pairs: Iterable[tuple[str, str]]) -> str:
    """The differences in test MSE of methods and baselines over seeds, mean ± standard error, and how often it fell."""
    mse = {
        (name, seed, region): float(one.errors.rmse.sel(region=region)) ** 2
        for (_, name, seed), one in study.runs.items()
        for region in ("all", "few")
    }
    lines = []
    for method, baseline in pairs:
        for region in ("all", "few"):
            seeds = sorted({seed for name, seed, _ in mse if name == method and (baseline, seed, region) in mse})
            by_seed = np.array([mse[method, seed, region] - mse[baseline, seed, region] for seed in seeds])
            if len(seeds) > 1:
                error = by_seed.std(ddof=1) / len(seeds) ** 0.5
                better = f"smaller in {(by_seed < 0).sum()} of {len(seeds)} seeds"
                lines.append(f"{method} minus {baseline}, MSE {region}: {by_seed.mean():.3f} ± {error:.3f}, {better}")
    return "\n".join(lines)
