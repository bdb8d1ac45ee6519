"""Studies: compare several methods on one task with one budget, with one folder per run.

A method is a function from a :class:`Trial` to the result of :meth:`Trial.fit`. Methods are given in a dict::

    def weighted(trial):
        lds = dt.LDS(trial.bins).fit(trial.density)
        return trial.fit(trial.model(head="regression", weights=lds))

    study = Study("runs/mine", task, {"plain": plain, "weighted": weighted}, runtime, Optimization(epochs=12))
    study.run(seeds=3)
    study.report(title="Mine")

A stopped study continues with ``resume=True``, without repeating finished runs. If a run fails, the others still run,
and the failure is reported at the end. Under ``torchrun`` every rank makes the same calls, and rank 0 writes.
"""

from __future__ import annotations

import difflib
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import nn

from .._checks import number, one_of, problem, whole
from ..errors import RunExistsError, SettingsError, StudyError
from ..labels.bins import Bins, Missing
from ..labels.density import LabelDensity
from ..labels.weights import LDS
from ..longtail import LongTailModel
from ..longtail.readouts import ScoreReadout
from ..metrics.classification import ClassificationMetrics
from ..metrics.distribution import DistributionMetrics, distribution_metrics
from ..metrics.intervals import IntervalMetrics, interval_metrics
from ..metrics.regression import RegressionMetrics, regression_metrics
from ..priors import TauChoice
from .data.images import ImageSet, Splits
from .results.class_figures import class_error_figure, tau_figure
from .results.comparison import comparison_table, leading_methods
from .results.comparison_figures import coverage_figure
from .results.drawing import method_colors
from .results.figures import density_figure, error_figure, history_figure, region_figure, similarity_figure
from .results.headline import headline
from .results.sample_figures import example_samples, examples_figure, prediction_figure
from .results.schema import combine_runs, save_results
from .results.summary import write_comparison, write_summary
from .results.tables import BASELINE, Columns, as_text, default_columns, results_table, verdict
from .training.checkpoint import load_checkpoint
from .training.loop import Metrics, Optimization, fit, predict
from .training.provenance import environment, write_json
from .training.runtime import Runtime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Run", "Study", "Task", "Trained", "Trial"]

_LAST = "checkpoint-last.pt"
_JUDGED = {"bmae": "bMAE", "mae": "MAE"}  # what the figure of tau shows
_MOST_IN_A_FIGURE = {"history": 16, "classes": 16}  # methods


@dataclass(frozen=True, eq=False)
class Task:
    """A learning task: data, label axis and network.

    Attributes:
        data: a function from a seed to the three parts, which may be the same for all seeds. Images, rows or sequences.
        bins: the label axis. Classes make it a classification task.
        network: a function that makes a new backbone, a module with ``num_features``.
        title: the name of the task in results.
        label_name, label_units: the name and the unit of the label; "1" means no unit.
        metrics: made from the density of the training labels, for what training watches and selects by; None takes the
            kind that the axis asks for. What results hold besides does not depend on it.
        augmentation: as in :func:`dir_toolkit.experiment.training.loop.fit`; None flips and shifts images only.
        missing: ``"drop"`` if labels of any part may be NaN. Density, models, training and metrics then drop them.
        measure: a function from a trial, its trained network and the network's output on the test set to further
            variables of the result.
        folder: the subfolder of the study for runs on this task.
        shown: the name of a method on this task in results, if a study has several tasks.
    """

    data: Callable[[int], Splits]
    bins: Bins
    network: Callable[[Splits], nn.Module]
    title: str
    label_name: str
    label_units: str = "1"
    metrics: Callable[[LabelDensity], Metrics] | None = None
    augmentation: bool | Callable[..., torch.Tensor] | None = None
    missing: Missing = "raise"
    measure: Callable[[Trial, Trained, Any], Mapping[str, Any]] | None = None
    folder: str = ""
    shown: str = "{method}"


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network.

    Attributes:
        model: the model, with the weights of ``epoch``.
        method: the name of the method that trained it.
        history: one row per epoch; for a method with two stages, of the second stage.
        epoch: the epoch of the weights, counted from 1.
        minutes: the training time of all stages.
        weights, fds: the LDS and the FDS of the training.
        tau: the choice of tau for its prior; None without adjustment.
    """

    model: nn.Module
    method: str
    history: list[dict[str, Any]]
    epoch: int
    minutes: float
    weights: LDS | None = None
    fds: Any = None
    tau: TauChoice | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """The result of one method with one seed.

    Attributes:
        errors: the errors on the test set; for continuous labels also each sample's prediction and interval.
        trained: the training without its model, which may be large; None if the result was read from a file.
        extra: the value of ``keep`` of :meth:`Study.run`.
    """

    errors: xr.Dataset
    trained: Trained | None = None
    extra: Any = None


@dataclass(frozen=True, eq=False)
class Trial:
    """One method with one seed on one task, the argument of a method. :class:`Study` makes it.

    Attributes:
        runtime: the runtime, with the seed of the run.
        density: the density of the training labels.
    """

    study: Study
    task: Task
    method: str
    runtime: Runtime
    splits: Splits
    density: LabelDensity

    @property
    def bins(self) -> Bins:
        return self.task.bins

    @property
    def folder(self) -> Path:
        return self.study.folder / self.task.folder / self.method / f"seed{self.runtime.seed}"

    def network(self) -> nn.Module:
        """A new backbone."""
        return self.task.network(self.splits)

    def metrics(self) -> Metrics:
        """Without samples."""
        if self.task.metrics is not None:
            return self.task.metrics(self.density)
        kind = ClassificationMetrics if self.bins.categorical else RegressionMetrics
        return kind(self.density, missing=self.task.missing)

    def model(self, backbone: Any = None, **options: Any) -> LongTailModel:
        """A :class:`dir_toolkit.LongTailModel` with these options, on this backbone or a new one."""
        backbone = self.network() if backbone is None else backbone
        return LongTailModel(
            backbone,
            backbone.num_features,
            self.bins,
            density=self.density,
            **{"missing": self.task.missing, **options},
        )

    def fit(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., torch.Tensor] | None = None,
        optimization: Optimization | None = None,
        after: Trained | None = None,
        selects: str | None = None,
        **options: Any,
    ) -> Trained:
        """Train a model in this run's folder, or resume it, by :func:`dir_toolkit.experiment.training.loop.fit`.

        Args:
            loss: by default the ``criterion`` of a :class:`dir_toolkit.LongTailModel`, with its weights and FDS.
            optimization: None means that of the study.
            after: the training of the first stage, whose minutes are added.
            selects: the validation error that selects the best epoch; None takes that of the metrics. For a model whose
                prior is adjusted afterwards use ``"mae/all"``, since before the adjustment an untrained network can
                have the smallest bMAE.
            options: weights, weights_from, sampler, fds, augmentation and fingerprint, as in ``fit``.
        """
        study = self.study
        optimization = study.optimization if optimization is None else optimization
        if isinstance(model, LongTailModel):
            loss = model.criterion if loss is None else loss
            options = {"weights": model.weights, "fds": model.fds, **options}
        if loss is not None:
            options["loss"] = loss
        if self.runtime.is_main and not (self.folder / _LAST).exists():
            plan = {"method": self.method, "after": None if after is None else after.method, **asdict(optimization)}
            write_json(self.folder / "config.json", {**study.settings, **plan})
            write_json(self.folder / "env.json", environment(self.runtime, self.splits))
        metrics = self.metrics()
        if selects is not None:
            one_of("selects", selects, tuple(metrics.summary()))
            metrics.selects = selects  # type: ignore[misc]  # of this object alone
        history = fit(
            model.to(self.runtime.device),
            self.splits.train,
            self.splits.val,
            metrics=metrics,
            optimization=optimization,
            runtime=self.runtime,
            folder=self.folder,
            resume=True,  # a method may continue another's network; the study itself refuses earlier runs
            checkpoint_minutes=study.checkpoint_minutes,
            **{"augmentation": self.task.augmentation, "missing": self.task.missing, **options},
        )
        column = "val_" + metrics.selects.removesuffix("/all").replace("/", "_")
        best = min(history, key=lambda row: (math.isnan(row[column]), row[column]))["epoch"]
        minutes = history[-1]["seconds"] / 60 + (0 if after is None else after.minutes)
        return Trained(model, self.method, history, best, minutes, options.get("weights"), options.get("fds"))

    def trained(self, method: str, *, epoch: Literal["best", "last"] = "best") -> Trained:
        """The network of another method with this seed, trained if necessary, with its best or its last weights."""
        other = replace(self, method=method)
        self.study.say(f"{self.method} goes on from {method}:")
        result = other.result()
        if epoch == "best":
            return result
        result.model.load_state_dict(load_checkpoint(other.folder / _LAST)["model"])
        return replace(result, epoch=len(result.history))

    def adjusted(self, trained: Trained, *, tau: float | None = None) -> Trained:
        """A :class:`dir_toolkit.LongTailModel` adjusted to a uniform prior, with tau chosen on validation data.

        Args:
            tau: the strength of the adjustment; None chooses it.
        """
        model: Any = trained.model
        labels = torch.from_numpy(self.splits.val.labels).to(self.runtime.device)
        scores, taus = predict(model, self.splits.val, runtime=self.runtime).scores, None if tau is None else [tau]
        choice = model.choose_tau(scores, labels, taus=taus)
        self.study.say(f"tau {choice.tau:g}" + ", chosen on validation" * (tau is None))
        model.set_prior("uniform", choice.tau)
        return replace(trained, tau=choice)

    def calibrated(self, trained: Trained) -> Trained:
        """A :class:`dir_toolkit.LongTailModel` with intervals calibrated at the level of the study. If the head scores
        bins, every second validation sample is used to choose temperature and tau. The other samples calibrate.

        Coverage is guaranteed only if validation data did not select the epoch: use ``trained(method, epoch="last")``.
        """
        model: Any = trained.model
        labels = torch.from_numpy(self.splits.val.labels).to(self.runtime.device)
        scores, choice, first = predict(model, self.splits.val, runtime=self.runtime).scores, trained.tau, 0
        if isinstance(model.readout, ScoreReadout):
            choice, first = model.calibrate(scores[::2], labels[::2], most_mae=None, bias=False), 1
            self.study.say(str(choice))
        model.calibrate_intervals(scores[first :: 1 + first], labels[first :: 1 + first], self.study.level)
        return replace(trained, tau=choice)

    def result(self) -> Trained:
        """Run the method on this trial."""
        with self.runtime.seeded("network"):
            return self.study.methods[self.method](self)

    def errors(self, trained: Trained, output: Any) -> xr.Dataset:
        """The errors of the network's output on the test set."""
        test, metrics = self.splits.test, self.metrics()
        if isinstance(metrics, DistributionMetrics):
            metrics = RegressionMetrics(self.density, outside=metrics.outside, missing=metrics.missing)
        by_class = isinstance(trained.model, LongTailModel) and self.bins.categorical
        part = output.distribution if by_class else getattr(output, metrics.takes, output)
        metrics.update(part, torch.from_numpy(test.labels).to(self.runtime.device))
        errors = metrics.compute().assign(minutes=trained.minutes, best_epoch=trained.epoch)
        if trained.tau is not None:
            errors = errors.assign(tau=((), trained.tau.tau, {"units": "1"}))
        if not self.bins.categorical and part.ndim == 1:
            columns: dict[str, Any] = {"target": ("sample", test.labels), "prediction": ("sample", part.cpu().numpy())}
            model: Any = trained.model
            options: Any = {"outside": metrics.outside, "missing": metrics.missing}
            if isinstance(model, LongTailModel) and output.distribution.shape[1]:
                ends: Any = model.readout.ends
                shares = output.distribution.cpu()
                scored = distribution_metrics(shares, test.labels, self.density, ends=ends, **options)
                errors = errors.assign(_declared(scored, DistributionMetrics))
            if isinstance(model, LongTailModel) and model.readout.has_interval:
                level = self.study.level
                lower, upper = (side.cpu() for side in model.interval(output, level))
                held = interval_metrics(lower, upper, test.labels, self.density, **options)
                errors = errors.assign(_declared(held, IntervalMetrics))
                first, last = self.bins.edges[[0, -1]]  # results must be finite
                lower, upper = lower.masked_fill(lower.isinf(), first), upper.masked_fill(upper.isinf(), last)
                for side, values in (("lower", lower), ("upper", upper)):
                    columns[side] = ("sample", values.numpy(), {"interval_level": level})
            there = ~np.isnan(test.labels)  # samples without a label have no error
            errors = errors.assign(
                {name: (dim, values[there], *rest) for name, (dim, values, *rest) in columns.items()}
            )
        return errors if self.task.measure is None else errors.assign(self.task.measure(self, trained, output))


@dataclass(eq=False)
class Study:
    """Several methods on one task, or on several tasks with the same axis.

    Attributes:
        folder: the folder of all results. Runs are in ``<task's folder>/<method>/seed<k>``.
        methods: functions by name, from a :class:`Trial` to the result of :meth:`Trial.fit`, or of
            :meth:`Trial.trained` or :meth:`Trial.adjusted` if nothing is trained.
        optimization: the budget of all methods.
        settings: plain values for each run's ``config.json`` and the report.
        command: the command that reproduces the result.
        resume: whether to continue an earlier study in the folder, and to add methods and seeds to it.
        checkpoint_minutes: the longest time between two checkpoints.
        level: the level of all intervals in results, in (0, 1), whether they are calibrated or not.
        runs: finished runs, by task, method and seed.
        failed: the errors of failed runs, by task, method and seed.
    """

    folder: Any
    tasks: Any
    methods: Mapping[str, Callable[[Trial], Trained]]
    runtime: Runtime
    optimization: Optimization
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    resume: bool = False
    checkpoint_minutes: float = 5.0
    level: float = 0.9
    runs: dict[tuple[Task, str, int], Run] = field(default_factory=dict)
    failed: dict[tuple[Task, str, int], str] = field(default_factory=dict)
    _data: dict[tuple[Task, int], tuple[Splits, LabelDensity]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.level = number("level", self.level, low=0, high=1, open_low=True, open_high=True)
        self.tasks = [self.tasks] if isinstance(self.tasks, Task) else list(self.tasks)
        earlier = [path for task in self.tasks for path in sorted((self.folder / task.folder).glob(f"*/seed*/{_LAST}"))]
        if earlier and not self.resume:
            raise RunExistsError(
                f"{self.folder} must hold no earlier run, since runs are never overwritten, got {earlier[0]}. "
                "Use --resume to continue it, which also adds methods and seeds, or choose another folder."
            )

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.runtime.is_main:
            print(text, flush=True)

    def trial(self, task: Task, method: str, seed: int) -> Trial:
        """The argument of a method."""
        if (task, seed) not in self._data:
            splits = task.data(seed)
            train, val, test = (f"{len(part):,}" for part in (splits.train, splits.val, splits.test))
            skipped = "".join(f"; {count} skipped: {why}" for why, count in splits.skipped.items())
            self.say(f"{splits.source}: {train} samples to train on, {val} to validate, {test} to test{skipped}")
            self._data[task, seed] = splits, LabelDensity.count(splits.train.labels, task.bins, missing=task.missing)
        return Trial(self, task, method, replace(self.runtime, seed=seed), *self._data[task, seed])

    def run(
        self,
        names: Sequence[str] | None = None,
        *,
        seeds: int = 1,
        keep: Callable[[Trial, Trained, Any], Any] | None = None,
    ) -> None:
        """Train and test methods, seed by seed.

        Args:
            names: the names of methods to run; None means all.
            seeds: the number of seeds, which are 0, 1, ...
            keep: a function from a trial, its trained network and the network's output on the test set to ``extra`` of
                :class:`Run`.
        Raises:
            SettingsError: a name is unknown.
        """
        names = list(self.methods if names is None else dict.fromkeys(names))
        seeds = whole("seeds", seeds, low=1)
        if strange := [name for name in names if name not in self.methods]:
            near = difflib.get_close_matches(strange[0], self.methods, n=2)
            fix = f"Did you mean {' or '.join(near)}?" if near else f"They are {', '.join(self.methods)}."
            raise problem("names must be methods of the study", got=strange[0], fix=fix, error=SettingsError)
        todo = [(task, name, seed) for seed in range(seeds) for name in names for task in self.tasks]
        for done, (task, name, seed) in enumerate(todo, 1):
            trial = self.trial(task, name, seed)
            self.say(f"\n{task.shown.format(method=name)}, seed {seed} ({done} of {len(todo)})")
            try:
                self.runs[task, name, seed] = self._run(trial, keep)
                self.failed.pop((task, name, seed), None)
            except Exception as error:
                if self.runtime.world > 1:  # the other ranks wait for this rank
                    raise
                self.failed[task, name, seed] = f"{type(error).__name__}: {error}"
                self.say(traceback.format_exc())

    def _run(self, trial: Trial, keep: Callable[[Trial, Trained, Any], Any] | None) -> Run:
        """Train or load one run, measure it on the test set, and write its result."""
        trained = trial.result()
        output = predict(trained.model, trial.splits.test, runtime=trial.runtime)
        errors = trial.errors(trained, output)
        path = trial.folder / "results.nc"
        # A finished run keeps its provenance. Results without training are always computed again.
        if self.runtime.is_main and (trained.method != trial.method or not path.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            if trained.method != trial.method:
                plan = {"method": trial.method, "after": trained.method}
                write_json(trial.folder / "config.json", {**self.settings, **plan})
            if isinstance(trained.model, LongTailModel):
                trained.model.save(trial.folder / "model.safetensors")
            title = f"{trial.task.title}: {trial.method}, seed {trial.runtime.seed}"
            runs = {(trial.method, trial.runtime.seed): errors}
            save_results(self._combined(runs, title, environment(trial.runtime, trial.splits)), path)
        extra = None if keep is None else keep(trial, trained, output)
        return Run(errors, replace(trained, model=nn.Identity()), extra)

    def _combined(self, runs: Mapping[tuple[str, int], xr.Dataset], title: str, attrs: Mapping[str, Any]) -> xr.Dataset:
        task = self.tasks[0]  # type: ignore[index]
        label = {"label_name": task.label_name, "label_units": task.label_units}
        return combine_runs(runs, title=title, command=self.command, attrs=attrs, **label)

    def _finished(self) -> Iterator[tuple[str, Task, str, int]]:
        """The name of each run in results and its key, in the order of ``methods``."""
        for name in self.methods:
            for task in self.tasks:  # type: ignore[union-attr]
                for seed in sorted(seed for own, method, seed in self.runs if own is task and method == name):
                    yield task.shown.format(method=name), task, name, seed

    def result(self, title: str) -> xr.Dataset:
        """All finished runs as one result. For continuous labels it includes a constant predictor, the median label.

        Raises:
            StudyError: no run was finished.
        """
        runs = {(shown, seed): self.runs[task, name, seed].errors for shown, task, name, seed in self._finished()}
        if not runs:
            raise self._failure("no run of the study was finished")
        (task, _), (splits, density) = next(iter(self._data.items()))
        attrs = environment(self.runtime, splits)
        if len({id(splits) for splits, _ in self._data.values()}) > 1:
            each = {
                (task.folder, seed): environment(self.runtime, s)["data"] for (task, seed), (s, _) in self._data.items()
            }
            attrs["data"] = {f"{place or 'data'}, seed {seed}": data for (place, seed), data in each.items()}
        if not task.bins.categorical:
            target = splits.test.labels
            median = np.full_like(target, np.nanmedian(splits.train.labels))
            errors = regression_metrics(median, target, density, missing=task.missing)
            there = ~np.isnan(target)
            samples = {"target": ("sample", target[there]), "prediction": ("sample", median[there])}
            runs[BASELINE, 0] = errors.assign(samples)
        if self.failed:
            attrs["failed"] = self._failures()
        return self._combined(runs, title, attrs)

    def report(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        title: str,
        figures: Mapping[str, Figure] | None = None,
        notes: Sequence[str] = (),
        titles: Mapping[str, str] | None = None,
        columns: Columns | None = None,
        baseline: str | None = None,
        replicates: int = 2000,
    ) -> None:
        """Write the result, its table, figures and report, and print the table and who won.

        Args:
            folder: None means the study's folder.
            title: the title of the result, after that of the task.
            figures: further figures, by title.
            notes, titles, columns: as in :func:`dir_toolkit.experiment.results.summary.write_summary`.
            baseline: the method to compare the others with, run by run, by
                :func:`dir_toolkit.experiment.results.summary.write_comparison`; None compares only the best method
                with the first, in the :func:`dir_toolkit.experiment.results.headline.headline`.
            replicates: the number of bootstrap replicates for the intervals of that comparison.
        Raises:
            StudyError: a run failed. The finished runs are reported before.
        """
        if not self.runtime.is_main:
            return
        out = Path(self.folder if folder is None else folder)
        task = self.tasks[0]  # type: ignore[index]
        ds = self.result(f"{task.title}: {title}")
        lead = headline(ds, baseline)
        notes = [*notes, *(f"Failed: {failure}" for failure in self._failures())]
        out.mkdir(parents=True, exist_ok=True)
        if titles is not None and BASELINE in ds["method"]:
            titles = {**titles, BASELINE: "no training: always the median of the training labels"}
        colors = self._colors(ds, baseline)
        extras: dict[str, Any] = {"notes": notes, "titles": titles, "settings": self.settings}
        if baseline is None:
            figures = {**self._figures(ds, colors), **(figures or {})}
            if columns is None and not task.bins.categorical:
                columns = [*default_columns(ds), *([("tau", None)] if "tau" in ds else [])]
                if np.allclose(ds["mae"], ds["bmae"], rtol=1e-6, atol=0, equal_nan=True):
                    columns = [column for column in columns if column[0] != "bmae"]
                    notes.append("bMAE equals MAE here, since all bins that are tested have equally many samples.")
            extras["notes"] = [lead, *notes]
            write_summary(out, ds, figures, columns=columns, **extras)
            table = results_table(ds, columns=columns)
        else:
            figures = {**self._examples(ds, colors), **self._tau_figure(colors), **(figures or {})}
            density = next(iter(self._data.values()))[1]
            extras |= {"density": density, "figures": figures, "replicates": replicates}
            table = comparison_table(ds, write_comparison(out, ds, baseline=baseline, **extras))
        self.say(
            f"\n{as_text(table)}\nFigures, settings and what the methods are: {out / 'report.html'}\n"
            f"All numbers: {out / 'results.nc'}. Curves: tensorboard --logdir {out}\n{lead}"
        )
        if self.failed:
            raise self._failure("these runs failed; --resume tries them again")

    def verdict(self, method: str, baseline: str) -> None:
        """Print one sentence on the errors of a method and the baseline, if both have a finished run."""
        if method != baseline and {method, baseline} <= {name for _, name, _ in self.runs}:
            self.say(verdict(self.result("verdict"), method, baseline))

    def _failures(self) -> list[str]:
        """One line per failed run, without paths of this machine."""
        return [
            f"{task.shown.format(method=name)}, seed {seed}: {why}".replace(str(self.folder), "DIR")
            for (task, name, seed), why in self.failed.items()
        ]

    def _failure(self, what: str) -> StudyError:
        return StudyError("\n  ".join([f"{what}:" if self.failed else f"{what}.", *self._failures()]))

    def _colors(self, ds: xr.Dataset, baseline: str | None) -> dict[str, str]:
        """One colour per method in all figures, those of a comparison too, and for networks that others go on from."""
        first = [] if baseline is None else leading_methods(ds, baseline)
        return method_colors([*first, *ds["method"].values.tolist(), *(name for name, _ in self._histories())])

    def _histories(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """The training of each network under the name of the method that trained it. A network that was adjusted
        afterwards has one row more, under its own name: its validation error after the adjustment."""
        histories: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for shown, task, name, seed in self._finished():
            if (trained := self.runs[task, name, seed].trained) is None:
                continue
            place = task.shown.format(method=trained.method)
            histories.setdefault((place, seed), trained.history)
            if place != shown and trained.tau is not None:
                after = {f"val_{key}": value for key, value in trained.tau.after.items()}
                histories[shown, seed] = [{"epoch": trained.epoch, **after}]
        return histories

    def _figures(self, ds: xr.Dataset, colors: dict[str, str]) -> dict[str, Figure]:
        """The figures of the report, by title."""
        task = self.tasks[0]  # type: ignore[index]
        label = {"label_name": task.label_name, "label_units": task.label_units}
        extras: dict[str, Any] = {"colors": colors}
        histories = self._histories()
        if task.bins.categorical:
            few = ds.sizes["method"] <= _MOST_IN_A_FIGURE["classes"]
            figures = {f"Error by {task.label_name}": class_error_figure(ds, colors=colors)} if few else {}
            extras |= {"metric": "val_balanced_error", "metric_name": "validation balanced error", "percent": True}
        else:
            figures = {
                "Error by region": region_figure(ds, colors=colors),
                f"Error by {task.label_name}": error_figure(ds, window=min(5, len(task.bins)), colors=colors),
                **self._examples(ds, colors),
                **self._density_figure(label),
            }
            if "prediction" in ds:
                figures["Predicted against true"] = prediction_figure(self._few(ds), colors=colors)
            if "lower" in ds and bool(ds["lower"].notnull().any()):
                figures["Interval coverage by region"] = coverage_figure(ds)
            density = next(iter(self._data.values()))[1]
            if task.metrics is not None and isinstance(task.metrics(density), DistributionMetrics):
                extras |= {"metric": "val_crps", "metric_name": "validation CRPS"}
        if 0 < len({shown for shown, _ in histories}) <= _MOST_IN_A_FIGURE["history"]:
            figures["Training"] = history_figure(histories, label_units=task.label_units, **extras)
        return {**figures, **self._tau_figure(colors), **self._statistics_figures(label)}

    def _examples(self, ds: xr.Dataset, colors: dict[str, str]) -> dict[str, Figure]:
        """A few examples with what the leading methods say of them, if there are predictions."""
        if "prediction" not in ds or not (chosen := example_samples(ds)).size:
            return {}
        test = next(iter(self._data.values()))[0].test
        images = None
        if isinstance(test, ImageSet):
            images = test.batch(np.flatnonzero(~np.isnan(test.labels))[chosen])[0].numpy()
        return {"Examples": examples_figure(self._few(ds), images, colors=colors)}

    def _few(self, ds: xr.Dataset) -> xr.Dataset:
        """The leading methods, for figures without room for all."""
        return ds.sel({"method": leading_methods(ds, ds["method"].values[0].item())})

    def _trained(self) -> Iterator[tuple[str, Any, str, int]]:
        """Runs of this process: the name in results, the run, its method and seed."""
        for shown, task, name, seed in self._finished():
            if (run := self.runs[task, name, seed]).trained is not None:
                yield shown, run, name, seed

    def _density_figure(self, label: dict[str, Any]) -> dict[str, Figure]:
        """The density of training labels and the LDS weights, if a method has them. The figure of errors along the axis
        has the counts alone."""
        density = next(iter(self._data.values()))[1]
        every = [run.trained.weights for _, run, _, _ in self._trained()]
        smooth = [weights for weights in every if weights is not None and weights.kernels[0] is not None]
        if not smooth:
            return {}
        each = smooth[0].sample_weight(density.bins.centers)
        effective = density.smooth(smooth[0].kernels[0])
        return {"Label density and LDS weights": density_figure(density, each, effective=effective, **label)}

    def _tau_figure(self, colors: dict[str, str]) -> dict[str, Figure]:
        """The bMAE and the MAE on validation data against tau for each method, as means over seeds."""
        task = self.tasks[0]  # type: ignore[index]
        choices: dict[str, list[TauChoice]] = {}
        for shown, run, _, _ in self._trained():
            if run.trained.tau is not None and len(run.trained.tau.taus) > 1:  # tau was chosen, not given
                choices.setdefault(shown, []).append(run.trained.tau)
        if not choices or task.bins.categorical:
            return {}
        drawn = {f"{name}, {title}": (many, key) for name, many in choices.items() for key, title in _JUDGED.items()}
        colors = {f"{name}, {title}": colors[name] for name in choices for title in _JUDGED.values()}
        curves = {
            name: (many[0].taus, np.mean([c.curves[key] for c in many], 0)) for name, (many, key) in drawn.items()
        }
        chosen = {name: float(np.mean([c.tau for c in many])) for name, (many, _) in drawn.items()}
        ylabel = f"validation error ({task.label_units})"
        return {"Tau on validation": tau_figure(curves, chosen, ylabel=ylabel, percent=False, colors=colors)}

    def _statistics_figures(self, label: dict[str, Any]) -> dict[str, Figure]:
        """The similarity of feature statistics to those of the most frequent label, before and after smoothing."""
        density, figures = next(iter(self._data.values()))[1], {}
        bins: Any = density.bins
        for shown, run, name, seed in self._trained():
            if seed == 0 and run.trained.fds is not None and run.trained.method == name:
                s = {key: value.cpu().numpy() for key, value in run.trained.fds.statistics().items()}
                figures[f"Feature statistics of {shown}"] = similarity_figure(
                    s["mean"],
                    s["smoothed_mean"],
                    bins,
                    anchor=bins.centers[density.counts.argmax()],
                    variance_before=s["variance"],
                    variance_after=s["smoothed_variance"],
                    **label,
                )
        return figures


def _declared(ds: xr.Dataset, kind: type[DistributionMetrics] | type[IntervalMetrics]) -> xr.Dataset:
    """The declared variables of metrics, without counts."""
    return ds[[name for metric in kind.metrics for name in metric.variables]]
