"""Every method over every set, each with the same number of trials on validation data, then with several seeds on test.

    python recipes/studies/suite.py --root DIR                                    # tables, series and text: many hours
    python recipes/studies/suite.py --root DIR --sets concrete --methods l1 lds coral --trials 2 --seeds 2 --epochs 10

DIR holds the folders ``tables``, ``series`` and ``text``; the data cards say where to get what is in them. Per set
there is one split, and 50 even bins over the range of the training labels, to which others are clipped. A trial is one
learning rate with one value of what else the method has to be chosen; trials are halved successively and judged by
the validation bMAE, with seed 0. The settings of the best one are trained with all seeds and judged on test. Boosting
is not tuned, and reads no text. A method that fails on a set is named, and costs the others nothing. Results lie in
``OUT/<set>``, and the errors of all runs in ``OUT/suite.csv``. ``--resume`` goes on after a stop, and adds sets,
methods and seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from command_line import parse, refuse, run, shown, typed_command, unfit_folder


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the sets."""
    sets: tuple[str, ...] = ("house16H", "appliances", "abalone", "rain", "beijing", "cmapss", "emobank", "sts_b_dir")
    """Any of these, airfoil and concrete."""
    methods: tuple[str, ...] = ()
    """What to compare, of METHODS in this file; nothing takes all."""
    trials: int = 8
    """How many trials each method has; an even number."""
    seeds: int = 5
    """How many seeds the chosen settings are trained with: 0, 1, ..."""
    epochs: int = 40
    """Passes over the training rows of a whole training."""
    resume: bool = False
    """Go on where an earlier suite in --out was stopped."""
    out: Path = Path("runs/suite")
    """Folder of all results."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import time
import traceback

import numpy as np
import pandas as pd
import torch
from series import Recurrent
from sklearn.ensemble import HistGradientBoostingRegressor
from text import Reader
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.errors import SettingsError, StudyError
from dir_toolkit.experiment.data.images import SampleSet, Splits
from dir_toolkit.experiment.data.series import beijing, cmapss
from dir_toolkit.experiment.data.tables import standardized, table
from dir_toolkit.experiment.data.text import emobank, sts_b_dir, word_vectors
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import Runtime, start_runtime
from dir_toolkit.experiment.training.search import search
from dir_toolkit.longtail import VotingModel

LABELS = {  # of each table: its file, its label, and the columns that are neither
    "house16H": ("house16H", "Price", ()),
    "appliances": ("appliances_energy", "Appliances", ("rv1", "rv2")),
    "abalone": ("abalone", "Rings", ()),
    "rain": ("rain_ibk", "rain", ("rownames",)),
    "airfoil": ("airfoil", None, ()),
    "concrete": ("concrete", None, ()),
}


TEXT = {"emobank": emobank, "sts_b_dir": sts_b_dir}
SERIES: dict[str, Callable[[Path], Splits]] = {"beijing": beijing, "cmapss": cmapss}


class Perceptron(nn.Module):
    """From rows (N, F) to features (N, 64)."""

    num_features = 64

    def __init__(self, splits: Splits) -> None:
        super().__init__()
        size = splits.train.inputs.shape[-1]
        self.layers = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU())

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


def relabeled(splits: Splits, change: Any) -> Splits:
    train, val, test = (SampleSet(p.inputs, change(p.labels), p.rows) for p in (splits.train, splits.val, splits.test))
    return Splits(train, val, test, splits.source, splits.skipped)


def task_of(name: str, root: Path) -> Task:
    """A set with its one split, its axis and its network."""
    network: Callable[[Splits], nn.Module]
    if name in LABELS:
        file, label, drop = LABELS[name]
        path = root / "tables" / f"{file}.csv.gz"
        if label is None:  # the first column
            label = pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns[0]
        splits, network = table(path, label, drop=drop), Perceptron
        if name == "house16H":
            splits = relabeled(splits, np.log1p)
        splits = standardized(splits)
    elif name in SERIES:
        splits, network = standardized(SERIES[name](root / "series")), Recurrent
    else:
        words, vectors = word_vectors(root / "text")
        splits, network = TEXT[name](root / "text", words), partial(_reader, vectors)
    low, high = splits.train.labels.min(), splits.train.labels.max()
    splits, bins = relabeled(splits, partial(np.clip, a_min=low, a_max=high)), dt.Bins.uniform(low, high, count=50)
    return Task(lambda _: splits, bins, network, name, "label", folder=name)


def _reader(vectors: np.ndarray, splits: Splits) -> Reader:
    return Reader(vectors, pairs=splits.train.inputs.ndim == 3)


def fitted(trial: Trial, model: Any, own: dict[str, Any], *, sharpness: float | None = None, **options: Any) -> Trained:
    """Train with the learning rate of a trial."""
    how = replace(trial.study.optimization, lr=own["lr"], sharpness=sharpness)
    return trial.fit(model, optimization=how, **options)


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


def voting(trial: Trial, own: dict[str, Any], head: Any = "gaussian") -> Trained:
    backbone: Any = trial.network()
    options = {"density": trial.density, "heads": own["heads"], "head": head}
    model = VotingModel(backbone, backbone.num_features, trial.bins, **options)
    return fitted(trial, model, own, loss=model.criterion)


class Boosted(nn.Module):
    """Gradient boosting, whatever the shape of its inputs."""

    def __init__(self, trees: Any) -> None:
        super().__init__()
        self.trees = trees

    def forward(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.trees.predict(rows.flatten(1).cpu().numpy())).to(rows)


def boosting(trial: Trial, own: dict[str, Any], weighted: bool = False) -> Trained:
    train = trial.splits.train
    x, y = train.inputs[train.rows].reshape(len(train), -1), train.labels
    weight = dt.LDS(trial.bins).fit(trial.density).sample_weight(y) if weighted else None
    start = time.perf_counter()
    trees = HistGradientBoostingRegressor(random_state=trial.runtime.seed).fit(x, y, weight)
    return Trained(Boosted(trees), trial.method, [], 0, (time.perf_counter() - start) / 60)


def values(name: str, *tried: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in tried)


METHODS: dict[str, tuple[tuple[dict[str, Any], ...] | None, Any]] = {
    "l1": (({},), number),
    "mse": (({},), partial(number, loss="weighted_mse")),
    "lds": (values("scheme", "sqrt_inverse", "inverse"), weighed),
    "balanced_mse": (({},), partial(number, loss="balanced_mse")),
    "ccc": (({},), partial(number, loss="ccc_loss")),
    "dist_loss": (values("coefficient", 0.3, 1.0), dist_loss),
    "srl": (values("homogeneity", 0.01, 0.1), srl),
    "c_mixup": (values("bandwidth", 0.03, 0.3), mixed),
    "bsam": (values("sharpness", 0.02, 0.1), weighed),
    "soft": (values("width", 1.0, 3.0), over_bins),
    "soft+tau": (values("width", 1.0, 3.0), partial(over_bins, adjusted=True)),
    "coral": (values("width", 0.0, 2.0), partial(over_bins, head="coral")),
    "coral+tau": (values("width", 0.0, 2.0), partial(over_bins, head="coral", adjusted=True)),
    "corn": (values("width", 0.0, 2.0), partial(over_bins, head="corn")),
    "uvote": (values("heads", 2, 3), voting),
    "uvote_bins": (values("heads", 2, 3), partial(voting, head="linear")),
    "boosting": (None, boosting),
    "boosting_lds": (None, partial(boosting, weighted=True)),
}
"""By name: what is tried beside learning rates, or None where nothing is, and what makes a trial of it."""


def chosen(name: str, task: Task, settings: Settings, runtime: Runtime, how: Optimization) -> dict[str, Any]:
    """The settings of the best trial of a method on a set."""
    knobs, make = METHODS[name]
    if knobs is None:
        return {}
    place = settings.out / task.folder / "tune" / name
    count = settings.trials // len(knobs)
    rates = np.geomspace(3e-4, 1e-2, count).tolist() if count > 1 else [2e-3]

    def score(own: dict[str, Any], epochs: int) -> float:
        label = "-".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in own.items()
        )
        short = replace(how, epochs=epochs)
        methods = {name: partial(make, own=own)}
        study = Study(place / label / f"{epochs}-epochs", task, methods, runtime, short, resume=True)
        try:
            trained = study.trial(task, name, 0).result()
        except Exception as error:  # of any kind: this trial alone fails
            print(traceback.format_exc(), flush=True)
            raise StudyError(f"{type(error).__name__}: {error}") from error
        return float(trained.tau.scores.min()) if trained.tau else min(row["val_bmae"] for row in trained.history)

    lrs = values("lr", *(float(f"{rate:.2g}") for rate in rates))
    told = {"method": name, "set": task.title, "data": task.data(0).train.digest}
    return search(
        {"lr": lrs, "own": knobs}, score, epochs=how.epochs, folder=place, resume=settings.resume, fingerprint=told
    ).settings


def rows_of(study: Study) -> list[dict[str, Any]]:
    """The errors of each run on test."""
    rows = []
    for (task, name, seed), one in study.runs.items():
        every, few = one.errors.sel(region="all"), one.errors.sel(region="few")
        row = {"set": task.title, "method": name, "seed": seed, "mae": every.mae.item(), "bmae": every.bmae.item()}
        row |= {"few": few.mae.item(), "bmase": every.bmase.item(), "minutes": one.errors.minutes.item()}
        row |= {key: every[key].item() for key in ("crps", "coverage") if key in every}
        rows.append(row)
    return rows


def ranks(rows: pd.DataFrame) -> str:
    """Means over seeds by set and method, and the average rank of each method over the sets that all were run on, by
    bMAE, with the interval that holds 95 % of the averages over sets drawn again."""
    groups = rows.groupby(["set", "method"], sort=False)[["mae", "bmae", "few", "bmase"]]
    means = groups.mean()
    spread = groups.std().map(lambda value: "" if np.isnan(value) else f" ± {value:.4f}")  # one seed has none
    parts = [means.map("{:.4f}".format) + spread]
    rank = means["bmae"].unstack("method").dropna().rank(axis=1)  # sets by methods
    drawn = np.random.default_rng(0).integers(0, max(len(rank), 1), (2000, len(rank)))
    if len(rank):
        low, high = np.percentile(rank.to_numpy()[drawn].mean(1), [2.5, 97.5], axis=0)
        columns = {f"average rank by bMAE over {len(rank)} sets": rank.mean(), "from": low, "to": high}
        parts.append(pd.DataFrame(columns, index=rank.columns).sort_values(next(iter(columns))).round(2))
    return "\n\n".join(part.to_string() for part in parts)


def main(settings: Settings) -> None:
    names = settings.methods or tuple(METHODS)
    faults = unfit_folder("--out", settings.out)
    faults += [f"--methods must name some of {', '.join(METHODS)}, got {n}." for n in names if n not in METHODS]
    known = [*LABELS, *SERIES, *TEXT]
    faults += [
        f"--sets must name some of {', '.join(known)}, got {name}." for name in settings.sets if name not in known
    ]
    if settings.trials < 2 or settings.trials % 2:
        faults.append(f"--trials must be an even number from 2 on, got {settings.trials}.")
    refuse("recipes/studies/suite.py", faults)
    path = settings.out / "suite.csv"
    with start_runtime() as runtime:
        how = Optimization(epochs=settings.epochs, batch_size=128, weight_decay=1e-4)
        for task in [task_of(name, settings.root) for name in settings.sets]:  # all are read before anything trains
            name = task.title
            options: dict[str, Any] = {
                "settings": shown(settings),
                "command": typed_command("recipes/studies/suite.py"),
            }
            Study(settings.out, task, {}, runtime, how, resume=settings.resume)  # refuses what is there already
            own, notes = {}, []
            for method in names:
                if name in TEXT and METHODS[method][0] is None:
                    continue
                try:
                    own[method] = chosen(method, task, settings, runtime, how)
                except SettingsError as error:  # all its trials failed
                    notes.append(f"{method} failed: {error}")
                else:
                    notes.append(f"{method}: {', '.join(f'{k} {v}' for k, v in own[method].items()) or 'not tuned'}.")
            methods = {method: partial(METHODS[method][1], own=chose) for method, chose in own.items()}
            study = Study(settings.out, task, methods, runtime, how, resume=True, **options)
            study.run(seeds=settings.seeds)
            baseline = "l1" if "l1" in own and len(own) > 1 else None
            try:
                study.report(settings.out / name, title="suite", notes=notes, baseline=baseline)
            except StudyError as error:  # some runs failed; the others are written
                print(error)
            earlier = pd.read_csv(path) if path.exists() else pd.DataFrame()
            if study.runs:
                rows = pd.concat([earlier, pd.DataFrame(rows_of(study))], ignore_index=True)
                rows.drop_duplicates(["set", "method", "seed"], keep="last").to_csv(path, index=False)
    if not path.exists():
        raise StudyError("no run of the suite was finished.")
    print(f"\n{ranks(pd.read_csv(path))}\nAll runs: {path}")


if __name__ == "__main__":
    run(main, SETTINGS)
