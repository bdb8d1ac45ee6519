"""Every method over every set: each with the same learning rates on validation data, then with several seeds on test.

    python recipes/studies/suite.py --root DIR                                    # tables, series and text: many hours
    python recipes/studies/suite.py --root DIR --sets concrete --methods l1 lds coral --trials 2 --seeds 2 --epochs 10
    python recipes/studies/suite.py --root DIR --minutes 90 --resume --results benchmarks/suite     # one more sitting

DIR holds the folders ``tables``, ``series``, ``text`` and ``utkface``; the data cards say where to get what is in them.
Per set there is one split, and 50 even bins over the range of the training labels, to which others are clipped. Faces
have 32 pixels. airfoil_dir, abalone_dir and concrete_dir are UCI-DIR as far as it is published (Dong et al. 2025,
arXiv:2503.00876): bins of one unit, each with up to four rows to validate and to test, and layers of 20, 30 and 10.

A trial is one learning rate with one value of what else the method has to be chosen, or of the weight decay where it
has nothing else, so that all methods have as many trials. Trials are halved successively and judged by the validation
bMAE, with seed 0. The settings of the best one are trained with all seeds and judged on test. ``--trials 0`` tunes
nothing: all methods have a learning rate of 0.002 and the first value of what is chosen elsewhere. Ensembles are not
tuned: they have the settings of one network, and three trainings per seed. What is of scikit-learn is not tuned, and
reads no text. A method that fails on a set is named, and costs the others nothing.

All trials lie in ``OUT/tune``, and the runs that are judged in a folder of OUT for each budget. The errors of a set are
in ``RESULTS/<set>.csv``, one line per method and seed, and the differences to plain L1, with their intervals, in
``RESULTS/<set>-differences.csv``. Methods that failed are in ``RESULTS/<set>-failed.csv``. With ``--resume`` sets,
methods and seeds can be added; what is in the results already is not run again, even where OUT is new. Results of
other data, rows, epochs or trials need another RESULTS. ``--minutes`` ends a sitting between two runs. Only
one sitting at a time may add to RESULTS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parents[1]))

from command_line import PLACES, parse, refuse, run, shown, too_low, typed_command, unfit_folder, unknown, write


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the sets."""
    sets: tuple[str, ...] = ("house16H", "appliances", "abalone", "rain", "beijing", "cmapss", "emobank", "sts_b_dir")
    """Any of these, airfoil, concrete, utkface, airfoil_dir, abalone_dir and concrete_dir."""
    methods: tuple[str, ...] = ()
    """What to compare, of METHODS in this file; nothing takes all."""
    trials: int = 8
    """How many trials each method has: 2, 4 or 8, or 0 for fixed settings."""
    seeds: int = 5
    """How many seeds the chosen settings are trained with: 0, 1, ..."""
    epochs: int = 40
    """Passes over the training rows of a whole training."""
    rows: int | None = None
    """Most training rows; half as many validate. They are drawn once per set."""
    precision: Literal["float32", "bf16"] = "float32"
    """The precision of the forward pass."""
    minutes: float | None = None
    """Begin no run after so many minutes. What the suite takes is estimated before."""
    resume: bool = False
    """Go on where an earlier suite was stopped, or add to it."""
    out: Path = Path("runs/suite")
    """Folder of all runs."""
    results: Path | None = None
    """Folder of the errors; by default that of all runs."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import json
import shutil
import time
import traceback
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from series import Recurrent
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.errors import SettingsError, StudyError
from dir_toolkit.experiment.backbones import small_resnet
from dir_toolkit.experiment.data.images import SampleSet, Splits
from dir_toolkit.experiment.data.series import beijing, cmapss
from dir_toolkit.experiment.data.tables import standardized, table
from dir_toolkit.experiment.data.text import emobank, sts_b_dir, word_vectors
from dir_toolkit.experiment.data.utkface import utkface
from dir_toolkit.experiment.files import FolderLock
from dir_toolkit.experiment.results.comparison import differences_csv, paired_differences
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.loop import Optimization, predict
from dir_toolkit.experiment.training.provenance import environment
from dir_toolkit.experiment.training.runtime import Runtime, start_runtime
from dir_toolkit.experiment.training.search import search
from dir_toolkit.integrations.scikit_learn import LongTailRegressor, PriorAdjusted
from dir_toolkit.longtail import VotingModel

SCRIPT = "recipes/studies/suite.py"
LABELS = {  # of each table: its file, its label, and the columns that are neither
    "house16H": ("house16H", "Price", ()),
    "appliances": ("appliances_energy", "Appliances", ("rv1", "rv2")),
    "abalone": ("abalone", "Rings", ()),
    "rain": ("rain_ibk", "rain", ("rownames",)),
    "airfoil": ("airfoil", None, ()),
    "concrete": ("concrete", None, ()),
    "airfoil_dir": ("airfoil", None, ()),
    "abalone_dir": ("abalone", "Rings", ()),
    "concrete_dir": ("concrete", None, ()),
}


TEXT = {"emobank": emobank, "sts_b_dir": sts_b_dir}
SERIES: dict[str, Callable[[Path], Splits]] = {"beijing": beijing, "cmapss": cmapss}
FACES = ("utkface",)
UCI_DIR = ("airfoil_dir", "abalone_dir", "concrete_dir")


class Perceptron(nn.Module):
    """From rows (N, F) to features (N, 64)."""

    num_features = 64

    def __init__(self, splits: Splits) -> None:
        super().__init__()
        size = splits.train.inputs.shape[-1]
        self.layers = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU())

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


class SmallPerceptron(nn.Sequential):
    """The network of UCI-DIR, from rows (N, F) to features (N, 10)."""

    num_features = 10

    def __init__(self, splits: Splits) -> None:
        sizes = (splits.train.inputs.shape[-1], 20, 30, 10)
        layers = [(nn.Linear(size, to), nn.ReLU()) for size, to in pairwise(sizes)]
        super().__init__(*(layer for both in layers for layer in both))


def evened(splits: Splits, most: int = 4) -> Splits:
    """The same rows, split anew. Of each whole unit of labels up to ``most`` rows, but at most a third, go to
    validation, and as many to test."""
    parts = (splits.train, splits.val, splits.test)
    rows, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "labels"))
    random, held = np.random.default_rng(0), np.zeros(len(rows), dtype=int)
    for unit in np.unique(np.floor(labels)):
        members = random.permutation(np.flatnonzero(np.floor(labels) == unit))
        count = min(len(members) // 3, most)
        held[members[:count]], held[members[count : 2 * count]] = 1, 2
    train, val, test = (SampleSet(splits.train.inputs, labels[held == i], rows[held == i]) for i in range(3))
    return Splits(train, val, test, splits.source, splits.skipped)


def relabeled(splits: Splits, change: Any) -> Splits:
    train, val, test = (type(p)(p.inputs, change(p.labels), p.rows) for p in (splits.train, splits.val, splits.test))
    return Splits(train, val, test, splits.source, splits.skipped)


def fewer(splits: Splits, rows: int | None) -> Splits:
    """The splits with at most so many training rows, and half as many to validate."""
    if rows is None:
        return splits

    def some(part: SampleSet, most: int) -> SampleSet:
        kept = np.sort(np.random.default_rng(0).permutation(len(part))[:most])
        return type(part)(part.inputs, part.labels[kept], part.rows[kept])

    train, val = some(splits.train, rows), some(splits.val, rows // 2)
    return Splits(train, val, splits.test, splits.source, splits.skipped)


def task_of(name: str, root: Path, rows: int | None) -> Task:
    """A set with its one split, its axis and its network."""
    network: Callable[[Splits], nn.Module]
    if name in LABELS:
        file, label, drop = LABELS[name]
        path = root / "tables" / f"{file}.csv.gz"
        if label is None:  # the first column
            label = pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns[0]
        splits, network = table(path, label, drop=drop), Perceptron
        if name in UCI_DIR:
            splits, network = evened(splits), SmallPerceptron
        if name == "house16H":  # 52 prices are 0, and all others at least 14,999: they would stretch the axis
            # Rounded, since the last digits of a logarithm depend on the processor.
            splits = relabeled(splits, lambda price: np.log1p(np.maximum(price, 14_999)).round(6))
        splits = standardized(splits)
    elif name in SERIES:
        splits, network = standardized(SERIES[name](root / "series")), Recurrent
    elif name in FACES:
        splits, network = utkface(root / "utkface", size=32), lambda _: small_resnet()
    else:
        words, vectors = word_vectors(root / "text")
        splits, network = standardized(pooled(TEXT[name](root / "text", words), vectors)), Perceptron
    splits, folder = fewer(splits, rows), name if rows is None else f"{name}-{rows}-rows"
    low, high = splits.train.labels.min(), splits.train.labels.max()
    splits, bins = relabeled(splits, partial(np.clip, a_min=low, a_max=high)), dt.Bins.uniform(low, high, count=50)
    if name in UCI_DIR:
        bins = dt.Bins.uniform(np.floor(low), np.floor(high) + 1, width=1)
    return Task(lambda _: splits, bins, network, name, "label", folder=folder)


def pooled(splits: Splits, vectors: np.ndarray) -> Splits:
    """The means and the maxima of the word vectors of each sentence; of two, their distances and their products."""
    words = splits.train.inputs
    each, there = vectors[words], (words > 0)[..., None]  # (N, 1 or 2, L, D)
    mean = (each * there).sum(-2) / np.maximum(there.sum(-2), 1)
    read = np.concatenate([mean, np.where(there, each, -10).max(-2) * there.any(-2)], -1)
    if words.ndim == 3:
        read = np.concatenate([np.abs(read[:, 0] - read[:, 1]), read[:, 0] * read[:, 1]], -1)
    inputs = read.astype(np.float32)
    train, val, test = (SampleSet(inputs, part.labels, part.rows) for part in (splits.train, splits.val, splits.test))
    return Splits(train, val, test, splits.source, splits.skipped)


def fitted(trial: Trial, model: Any, own: dict[str, Any], *, sharpness: float | None = None, **options: Any) -> Trained:
    """Train with the learning rate of a trial."""
    decay = own.get("weight_decay", trial.study.optimization.weight_decay)
    optimization = replace(trial.study.optimization, lr=own["lr"], weight_decay=decay, sharpness=sharpness)
    return trial.fit(model, optimization=optimization, **options)


def number(trial: Trial, own: dict[str, Any], loss: str = "weighted_l1", **options: Any) -> Trained:
    return fitted(trial, trial.model(head="regression", loss=loss), own, **options)


def weighed(trial: Trial, own: dict[str, Any]) -> Trained:
    lds = dt.LDS(trial.bins, scheme=own.get("scheme", "sqrt_inverse")).fit(trial.density)
    return fitted(trial, trial.model(head="regression", weights=lds), own, sharpness=own.get("sharpness"))


def dist_loss(trial: Trial, own: dict[str, Any]) -> Trained:
    prior = trial.density.smooth(dt.gaussian(5, 2)).prior()
    loss = dt.losses.DistLoss(trial.bins, prior, coefficient=own["coefficient"])
    return number(trial, own, loss=loss)  # type: ignore[arg-type]


def srl(trial: Trial, own: dict[str, Any]) -> Trained:
    model = trial.model(head="regression")
    loss = dt.losses.SRLLoss(model.num_features, trial.bins, homogeneity=own["homogeneity"], coefficient=0.1)
    return fitted(trial, model, own, loss=loss)


def mixed(trial: Trial, own: dict[str, Any]) -> Trained:
    bandwidth = own["bandwidth"] * float(trial.splits.train.labels.std())
    return number(trial, own, mixing=partial(dt.labels.c_mixup, bandwidth=bandwidth))


def over_bins(trial: Trial, own: dict[str, Any], head: Any = "linear", adjusted: bool = False) -> Trained:
    sigma = own["width"] * float(np.diff(trial.bins.edges)[0])
    options: dict[str, Any] = {"selects": "mae/all"} if adjusted else {}
    trained = fitted(trial, trial.model(head=head, sigma=sigma), own, **options)
    return trial.adjusted(trained) if adjusted else trained


def smoothed(trial: Trial, own: dict[str, Any], lds: bool = False) -> Trained:
    backbone: Any = trial.network()
    fds = dt.FDS(trial.bins, backbone.num_features, momentum=own["momentum"])
    weights = dt.LDS(trial.bins).fit(trial.density) if lds else None
    return fitted(trial, trial.model(backbone, head="regression", fds=fds, weights=weights), own)


def contrasted(trial: Trial, own: dict[str, Any]) -> Trained:
    """The coefficient is in standard deviations of the labels; the published one for ages is 0.2 of them."""
    coefficient = own["coefficient"] * float(trial.splits.train.labels.std())
    loss = dt.losses.ConRLoss(coefficient=coefficient, weights=dt.LDS(trial.bins).fit(trial.density))
    return fitted(trial, trial.model(head="regression"), own, loss=loss)


def calibrated(trial: Trial, own: dict[str, Any], **options: Any) -> Trained:
    """What README does: soft bins, then temperature and tau, by the defaults of ``calibrate`` or these options.

    What is trained does not depend on the options, and is trained once for all of them.
    """
    return calibrate(soft_bins(trial, own), trial, **options)


def soft_bins(trial: Trial, own: dict[str, Any]) -> Trained:
    shared = "-".join(["long_tail_model", *(f"{key}={value}" for key, value in own.items())])
    return fitted(replace(trial, method=shared), trial.model(), own, selects="mae/all")


def calibrate(trained: Trained, trial: Trial, **options: Any) -> Trained:
    val, model = trial.splits.val, trained.model
    assert isinstance(model, dt.LongTailModel)
    scores = predict(model, val, runtime=trial.runtime).scores
    return replace(trained, tau=model.calibrate(scores, val.labels, **options))


def members(trial: Trial, method: str, train: Callable[[Trial], Trained]) -> tuple[list[Any], float]:
    """Networks of a method with seeds that no other seed of the trial has, and the minutes of their trainings."""
    every = []
    for k in range(MEMBERS):
        one = trial.study.trial(trial.task, method, MEMBERS * trial.runtime.seed + k)
        with one.runtime.seeded("network"):
            every.append(train(one))
    return [trained.model for trained in every], sum(trained.minutes for trained in every)


def l1_ensemble(trial: Trial, own: dict[str, Any]) -> Trained:
    models, minutes = members(trial, "l1", partial(number, own=own))
    return Trained(MeanOf(models), "l1", [], 0, minutes)


def ensemble(trial: Trial, own: dict[str, Any], **options: Any) -> Trained:
    """The mean of the distributions of networks of :func:`calibrated`, calibrated as a whole."""
    models, minutes = members(trial, "long_tail_model", partial(soft_bins, own=own))
    return calibrate(Trained(dt.longtail.ensemble(models), "long_tail_model", [], 0, minutes), trial, **options)


class MeanOf(nn.Module):
    """The mean of the predictions of several models."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack([model(rows).prediction for model in self.models]).mean(0)


def voting(trial: Trial, own: dict[str, Any], head: Any = "gaussian") -> Trained:
    backbone: Any = trial.network()
    options = {"density": trial.density, "heads": own["heads"], "head": head}
    model = VotingModel(backbone, backbone.num_features, trial.bins, **options)
    return fitted(trial, model, own, loss=model.criterion)


class OfRows(nn.Module):
    """An estimator of scikit-learn, whatever the shape of its inputs."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.estimator.predict(rows.flatten(1).cpu().numpy())).to(torch.float32)


def of_rows(trial: Trial, own: dict[str, Any], make: Callable[..., Any], weighted: bool = False) -> Trained:
    train = trial.splits.train
    x, y = train.inputs[train.rows].reshape(len(train), -1), train.labels
    weight = {"sample_weight": dt.LDS(trial.bins).fit(trial.density).sample_weight(y)} if weighted else {}
    start = time.perf_counter()
    estimator = make(random_state=trial.runtime.seed).fit(x, y, **weight)
    return Trained(OfRows(estimator), trial.method, [], 0, (time.perf_counter() - start) / 60)


def median(random_state: int) -> DummyRegressor:
    return DummyRegressor(strategy="median")


def adjusted_boosting(random_state: int) -> PriorAdjusted:
    return PriorAdjusted(HistGradientBoostingRegressor(random_state=random_state), random_state=random_state)


def values(name: str, *tried: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in tried)


DECAYS = values("weight_decay", 1e-4, 0.1)
"""The knob of the methods that have none of their own."""

METHODS: dict[str, tuple[tuple[dict[str, Any], ...] | None, Any]] = {
    "l1": (DECAYS, number),
    "mse": (DECAYS, partial(number, loss="weighted_mse")),
    "lds": (values("scheme", "sqrt_inverse", "inverse"), weighed),
    "balanced_mse": (DECAYS, partial(number, loss="balanced_mse")),
    "ccc": (DECAYS, partial(number, loss="ccc_loss")),
    "dist_loss": (values("coefficient", 0.3, 1.0), dist_loss),
    "srl": (values("homogeneity", 0.01, 0.1), srl),
    "c_mixup": (values("bandwidth", 0.03, 0.3), mixed),
    "fds": (values("momentum", 0.5, 0.9), smoothed),
    "lds+fds": (values("momentum", 0.5, 0.9), partial(smoothed, lds=True)),
    "conr": (values("coefficient", 0.1, 0.5), contrasted),
    "bsam": (values("sharpness", 0.02, 0.1), weighed),
    "soft": (values("width", 1.0, 3.0), over_bins),
    "soft+tau": (values("width", 1.0, 3.0), partial(over_bins, adjusted=True)),
    "coral": (values("width", 0.0, 2.0), partial(over_bins, head="coral")),
    "coral+tau": (values("width", 0.0, 2.0), partial(over_bins, head="coral", adjusted=True)),
    "corn": (values("width", 0.0, 2.0), partial(over_bins, head="corn")),
    "uvote": (values("heads", 2, 3), voting),
    "uvote_bins": (values("heads", 2, 3), partial(voting, head="linear")),
    "long_tail_model": (DECAYS, calibrated),
    "long_tail_model+tau": (DECAYS, partial(calibrated, most_mae=None, bias=False)),
    "long_tail_model+bias": (DECAYS, partial(calibrated, most_mae=None, bias=True)),
    "l1_ensemble": (DECAYS, l1_ensemble),
    "long_tail_model_ensemble": (DECAYS, ensemble),
    "long_tail_model_ensemble+bias": (DECAYS, partial(ensemble, most_mae=None, bias=True)),
    "median": (None, partial(of_rows, make=median)),
    "boosting": (None, partial(of_rows, make=HistGradientBoostingRegressor)),
    "boosting_lds": (None, partial(of_rows, make=HistGradientBoostingRegressor, weighted=True)),
    "boosting_adjusted": (None, partial(of_rows, make=adjusted_boosting)),
    "long_tail_regressor": (None, partial(of_rows, make=LongTailRegressor)),
}
"""By name: what is tried beside learning rates, or None where nothing is, and what makes a trial of it."""

TRAINED_AS = {"long_tail_model+tau": "long_tail_model", "long_tail_model+bias": "long_tail_model"}
"""The methods that differ from another in what is done after training alone. They share its trainings."""

MEMBERS_ARE = {
    "l1_ensemble": "l1",
    "long_tail_model_ensemble": "long_tail_model",
    "long_tail_model_ensemble+bias": "long_tail_model+bias",
}
"""The methods whose networks are averaged, with the settings that were chosen for one of them."""

MEMBERS = 3
"""How many networks are averaged."""

RATES = (1e-2, 3e-3, 3e-2, 1e-3)
"""The learning rates of the trials, in their order, so that trials can be added later."""

UNTUNED_RATE = 2e-3
"""The learning rate without trials, that of ``recipes/studies/compare.py``."""


def trials_of(knobs: Sequence[dict[str, Any]], count: int) -> tuple[dict[str, Any], ...]:
    """So many trials of a method.

    All methods have the same learning rates, each equally often. Of the two values of a knob, up to four trials give
    each rate one, and eight cross both with all rates.
    """
    turns = (0, 1, 1, 0, 1, 0, 0, 1)[:count]  # each value has a high and a low rate
    return tuple({"lr": RATES[i % 4], **knobs[turn]} for i, turn in enumerate(turns))


def reads(method: str, name: str) -> bool:
    """Whether a method takes the rows of a set."""
    if METHODS[method][0] is not None or method == "median":
        return True
    return name in LABELS or (name in SERIES and method != "long_tail_regressor")


class OutOfTime(KeyboardInterrupt):
    """The minutes of a sitting are over."""


@dataclass
class Sitting:
    """All that the methods of a sitting share."""

    settings: Settings
    runtime: Runtime
    start: float = field(default_factory=time.monotonic)
    searched: set[Path] = field(default_factory=set)

    def budget(self, task: Task) -> Optimization:
        """About twelve steps per epoch, unless there are many rows."""
        batch = min(max(len(task.data(0).train) // 12, 32), 256)
        return Optimization(epochs=self.settings.epochs, batch_size=batch, weight_decay=1e-4)

    def begin(self) -> None:
        """Called before each run."""
        if self.settings.minutes is not None and time.monotonic() - self.start > 60 * self.settings.minutes:
            raise OutOfTime

    def chosen(self, name: str, task: Task) -> dict[str, Any]:
        """The settings of the best trial of a method on a set."""
        name = MEMBERS_ARE.get(name, name)
        knobs, make = METHODS[name]
        if knobs is None:
            return {}
        if self.settings.trials == 0:
            return {"lr": UNTUNED_RATE, **knobs[0]}

        def score(own: dict[str, Any], epochs: int) -> float:
            self.begin()
            short = replace(self.budget(task), epochs=epochs)
            methods = {name: partial(make, own=own)}
            study = Study(self._trial(task, name, own, epochs), task, methods, self.runtime, short, resume=True)
            try:
                trained = study.trial(task, name, 0).result()
            except Exception as error:  # of any kind: this trial alone fails
                print(traceback.format_exc(), flush=True)
                raise StudyError(f"{type(error).__name__}: {error}") from error
            choice = trained.tau
            return choice.after[choice.by] if choice else min(row["val_bmae"] for row in trained.history)

        count = self.settings.trials
        tried = {"trial": trials_of(knobs, count)}
        folder = self.settings.out / "tune" / task.folder / name / f"{count}-trials-{self.settings.epochs}-epochs"
        identity = {"method": name, "data": task.data(0).train.digest, "precision": self.settings.precision}
        again = self.settings.resume or folder in self.searched  # another method may have these settings, too
        self.searched.add(folder)
        options: Any = {"folder": folder, "resume": again, "fingerprint": identity}
        own = search(tried, score, epochs=self.settings.epochs, **options).settings
        once = self._trial(task, name, own, self.settings.epochs) / task.folder
        shutil.copytree(once, self.place / task.folder, dirs_exist_ok=True)  # its seed 0 is trained already
        return own

    @property
    def place(self) -> Path:
        """Of the runs that are judged on test."""
        return self.settings.out / f"{self.settings.trials}-trials-{self.settings.epochs}-epochs"

    def _trial(self, task: Task, name: str, own: Mapping[str, Any], epochs: int) -> Path:
        label = "-".join(f"{key}={value}" for key, value in own.items())
        return self.settings.out / "tune" / task.folder / TRAINED_AS.get(name, name) / label / f"{epochs}-epochs"

    def todo(self, task: Task, names: Sequence[str]) -> tuple[Results, list[str], dict[str, int]]:
        """The results of a set, the methods that they lack, and the budget of each.

        Raises:
            SettingsError: the results are of another budget or of other data.
        """
        settings = self.settings
        results = Results(settings.results or settings.out, task.title)
        budget = {"rows": len(task.data(0).train), "epochs": settings.epochs, "trials": settings.trials}
        refuse(SCRIPT, results.faults(budget, task.data(0), settings.precision))
        return results, [name for name in names if not results.has(name, settings.seeds)], budget

    def run(self, task: Task, names: Sequence[str]) -> None:
        """Tune the methods on a set, one after the other, train them with all seeds, and add to the results."""
        settings, name = self.settings, task.title
        results, todo, budget = self.todo(task, names)
        if not todo:
            print(f"{name}: all is in {results.path} already", flush=True)
            return
        if "l1" not in todo and results.setting("l1"):
            todo.insert(0, "l1")  # the others are compared with its predictions
        options: dict[str, Any] = {"settings": shown(settings), "command": typed_command(SCRIPT, (*PLACES, "results"))}
        methods: dict[str, Any] = {}
        whole = set()
        study = Study(self.place, task, methods, self.runtime, self.budget(task), resume=True, **options)
        try:
            for method in todo:
                try:
                    known = results.setting(method) or results.setting(MEMBERS_ARE.get(method, method))
                    own = known or self.chosen(method, task)
                except SettingsError as error:  # all its trials failed
                    print(f"{method} on {name} failed: {error}", flush=True)
                    results.fail(method, str(error))
                    continue
                methods[method] = partial(self.one, own=own)
                study.run([method], seeds=settings.seeds)
                if faults := [text for (_, other, _), text in study.failed.items() if other == method]:
                    results.fail(method, faults[0])  # the other seeds alone are no result
                    continue
                results.add(study, method, budget | {"setting": json.dumps(own)})
                whole.add(method)
        finally:
            for key in [key for key in study.runs if key[1] not in whole]:  # half of it tells nothing
                del study.runs[key]
            results.compare(study)

    def one(self, trial: Trial, own: dict[str, Any]) -> Trained:
        self.begin()
        return METHODS[trial.method][1](trial, own=own)

    def estimate(self, tasks: Sequence[Task], names: Sequence[str]) -> float:
        """About how many minutes it all takes, from one epoch of plain L1 on each set."""
        minutes = 0.0
        for task in tasks:
            with TemporaryDirectory() as folder:
                study = Study(
                    folder, task, {"l1": METHODS["l1"][1]}, self.runtime, replace(self.budget(task), epochs=1)
                )
                once = number(study.trial(task, "l1", 0), {"lr": 1e-3}).minutes
            todo = self.todo(task, [name for name in names if reads(name, task.title)])[1]
            # Of n trials all have a quarter of the epochs, about half of them a half, and a quarter all of them.
            tuned = 0.75 * self.settings.trials + self.settings.seeds
            each = [MEMBERS * self.settings.seeds if name in MEMBERS_ARE else tuned for name in todo]
            minutes += once * self.settings.epochs * sum(each)
        return minutes


class Results:
    """The errors of all methods on a set, in two files that every sitting adds to."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.differences = folder / f"{name}.csv", folder / f"{name}-differences.csv"
        self.failed = folder / f"{name}-failed.csv"
        there = self.path.exists()
        self.notes = [line for line in self.path.read_text().splitlines() if line.startswith("#")] if there else []
        self.rows = pd.read_csv(self.path, comment="#") if there else pd.DataFrame()
        there = self.differences.exists()  # a machine that stopped may not have come to it
        self.compared = set(pd.read_csv(self.differences)["method"]) if there else set()

    def faults(self, budget: Mapping[str, int], splits: Splits, precision: str) -> list[str]:
        """Why rows of this budget, these data and this precision cannot be added to the file."""
        got = {
            key: [one for one in self.rows[key].unique() if one != value] for key, value in budget.items()
        } if len(self.rows) else {}  # fmt: skip
        faults = [
            f"{self.path.name} holds results of {key} {others[0]}, and this sitting has {key} {budget[key]}. "
            f"Choose the same, or another --results."
            for key, others in got.items()
            if others
        ]
        if any(digests_of(splits) not in note for note in self.notes):
            faults.append(f"{self.path.name} holds results of other data. Choose another --results.")
        if any(f", {precision} | " not in note for note in self.notes):
            faults.append(
                f"{self.path.name} holds results of another --precision. Choose the same, or another --results."
            )
        return faults

    def _of(self, method: str) -> pd.DataFrame:
        return self.rows[self.rows["method"] == method] if len(self.rows) else self.rows

    def has(self, method: str, seeds: int) -> bool:
        rows = self._of(method)
        return method in self.compared and len(rows) > 0 and set(range(seeds)) <= set(rows["seed"])

    def setting(self, method: str) -> dict[str, Any]:
        """What was chosen for a method in an earlier sitting; nothing if there was none."""
        rows = self._of(method)
        return json.loads(rows["setting"].iloc[0]) if len(rows) else {}

    def add(self, study: Study, method: str, same: Mapping[str, Any]) -> None:
        """Add what a method made on test with each seed."""
        rows = [{**row_of(one.errors), **same} for (_, name, _), one in study.runs.items() if name == method]
        if not rows:
            return
        seconds = 0.0
        if same["trials"]:
            member = MEMBERS_ARE.get(method, method)
            tuned = study.folder.parent / "tune" / study.tasks[0].folder / TRAINED_AS.get(member, member)
            seconds = sum(pd.read_csv(path)["seconds"].iloc[-1] for path in tuned.rglob("history.csv"))
            if member != method and len(one := self._of(member)):
                seconds = one["tuning_seconds"].iloc[0]
        seeds = [seed for _, name, seed in study.runs if name == method]
        new = pd.DataFrame(rows).assign(method=method, seed=seeds, tuning_seconds=seconds)
        self.rows = pd.concat([self.rows, new], ignore_index=True).drop_duplicates(["method", "seed"], keep="last")
        made = environment(study.runtime, study.tasks[0].data(0))
        packages = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        data = digests_of(study.tasks[0].data(0))
        note = f"# {study.command} | {packages} | commit {made['commit']} | {made['device']} | {data}"
        self.notes = list(dict.fromkeys([*self.notes, note]))
        write(self.path, "\n".join([*self.notes, self.rows.to_csv(index=False, float_format="%.6g")]))
        self.fail(method, None)

    def fail(self, method: str, reason: str | None) -> None:
        """Note that a method failed, or with None that it did not."""
        faults = {} if not self.failed.exists() else pd.read_csv(self.failed, index_col="method")["reason"].to_dict()
        faults.pop(method, None)
        faults |= {} if reason is None else {method: reason.splitlines()[-1].strip()}
        if faults or self.failed.exists():
            write(self.failed, pd.Series(faults, name="reason", dtype=str).to_csv(index_label="method"))

    def compare(self, study: Study) -> None:
        """Add the differences to plain L1 and their intervals, over the seeds and test samples of this sitting."""
        methods = {name for _, name, _ in study.runs}
        if "l1" not in methods or len(methods) == 1:
            return
        text = differences_csv(paired_differences(study.result("suite"), "l1"))
        if self.differences.exists():
            old = pd.read_csv(self.differences)
            text += old[~old["method"].isin(methods | {"constant"})].to_csv(index=False, header=False)
        write(self.differences, text)


def digests_of(splits: Splits) -> str:
    return ", ".join(f"{part} {getattr(splits, part).digest}" for part in ("train", "val", "test"))


def row_of(errors: Any) -> dict[str, Any]:
    """The errors of a run on test, NaN where there is none."""
    every, few = errors.sel(region="all"), errors.sel(region="few")
    row = {
        name: every[name].item() if name in every else np.nan for name in ("mae", "bmae", "bmase", "crps", "coverage")
    }
    return row | {"few": few.mae.item(), "seconds": 60 * errors.minutes.item()}


def main(settings: Settings) -> None:
    names = settings.methods or tuple(METHODS)
    faults = unfit_folder("--out", settings.out)
    faults += [] if settings.results is None else unfit_folder("--results", settings.results)
    faults += unknown("--methods", names, METHODS) + unknown("--sets", settings.sets, [*LABELS, *SERIES, *TEXT, *FACES])
    faults += too_low(settings, seeds=1, epochs=1, rows=20)
    if settings.trials not in (0, 2, 4, 8):
        faults.append(f"--trials must be 0, 2, 4 or 8, got {settings.trials}.")
    place = settings.results or settings.out
    there = [path for name in settings.sets if (path := place / f"{name}.csv").exists() and not settings.resume]
    faults += [f"--results must hold no {path.name} yet. Use --resume to add to it." for path in there]
    refuse(SCRIPT, faults)
    # All are read before anything trains or is written.
    tasks = [task_of(name, settings.root, settings.rows) for name in settings.sets]
    place.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(place)
    if not lock.held:
        refuse(SCRIPT, [f"--results must be of no other suite at work, got {place}. Wait for it, or choose another."])
    try:
        sit(settings, names, tasks)
    finally:
        lock.release()
    print(f"All errors: {place}")


def sit(settings: Settings, names: tuple[str, ...], tasks: list[Task]) -> None:
    """Tune and judge all methods, or as many as ``--minutes`` allow."""
    with start_runtime(precision=settings.precision) as runtime:
        sitting = Sitting(settings, runtime)
        for task in tasks:  # what is there already is refused
            Study(sitting.place, task, {}, runtime, Optimization(), resume=settings.resume)
            sitting.todo(task, names)
        if settings.minutes is not None:
            minutes = sitting.estimate(tasks, names)
            print(f"All takes about {minutes:.0f} minutes; this sitting has {settings.minutes:g}.", flush=True)
        try:
            for task in tasks:
                sitting.run(task, [name for name in names if reads(name, task.title)])
        except OutOfTime:
            print(f"The {settings.minutes:g} minutes are over. Go on with --resume.")


if __name__ == "__main__":
    run(main, SETTINGS)
