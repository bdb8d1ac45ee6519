"""Forecasts of networks for rows that they have not seen, on real sets, for the studies of intervals and priors.

The root holds ``tables/``, ``series/``, ``utkface/`` and ``text/`` with the sets of the data cards under these names.
For tables and series a seed draws the training rows, at most ``rows`` and half of all. The network is
``LongTailRegressor(bins=Bins.auto(y), head="linear", tau=0)``, the mean of four networks. For faces and sentences a
seed draws the network, and withholds a fifth of the training part from it. The network has the weights of its last
epoch. The validation and test parts together are the unseen rows, and their labels are nearly uniform.
``beijing_time`` trains on earlier years. Its last year (``beijing_year``) and the last year of another station
(``beijing_station``) are the rows from elsewhere.

A study keeps forecasts in a folder, from which later runs and the other study read them, unless the data files, the
package or the scripts have changed since.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
from joblib import Memory
from sklearn.ensemble import HistGradientBoostingRegressor
from tables import FILES, read
from text import Reader

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import small_resnet
from dir_toolkit.experiment.data.images import SampleSet, Splits
from dir_toolkit.experiment.data.series import beijing
from dir_toolkit.experiment.data.text import emobank, sts_b_dir, word_vectors
from dir_toolkit.experiment.data.utkface import utkface
from dir_toolkit.experiment.training.checkpoint import load_checkpoint
from dir_toolkit.experiment.training.loop import Optimization, fit, predict
from dir_toolkit.experiment.training.runtime import start_runtime
from dir_toolkit.integrations.scikit_learn import LongTailRegressor

SETS = ("house16H", "abalone", "appliances", "rain", "beijing", "beijing_time", "utkface", "sts_b", "emobank")
NETWORKS = ("utkface", "sts_b", "emobank")


class Part(NamedTuple):
    """Rows that the network has not seen: its scores (N, B), the labels (N,), the features (N, D), and the predictions
    of gradient boosting (N,), which are NaN where it was not trained."""

    scores: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    boosted: np.ndarray


class Forecasts(NamedTuple):
    """The density of the training labels, the prior under which the network was trained (B,), the ends of its bins, and
    the unseen rows: from the source of the training rows, and from elsewhere, by name. If the former are distributed
    differently from the training rows, ``withheld`` holds unseen rows that are not."""

    density: dt.LabelDensity
    prior: np.ndarray
    ends: Any
    held: Part
    elsewhere: dict[str, Part]
    withheld: Part | None = None

    @property
    def bins(self) -> dt.Bins:
        assert isinstance(self.density.bins, dt.Bins)
        return self.density.bins


def forecasts(folder: Path, root: Path, name: str, seed: int, rows: int) -> Forecasts:
    """The forecasts of a set and a seed, which the folder keeps for as long as data and code stay the same."""
    most = 0 if name in NETWORKS else rows  # networks read all rows
    kept = Memory(folder, verbose=0).cache(fresh, ignore=["root"])
    return kept(root, name, seed, most, digest_of(files_of(root, name)), digest_of(code()))


def fresh(root: Path, name: str, seed: int, rows: int, data: str, code: str) -> Forecasts:
    """``data`` and ``code`` only tell forecasts apart."""
    return of_network(root, name, seed) if name in NETWORKS else of_table(root, name, seed, rows)


def files_of(root: Path, name: str) -> tuple[Path, ...]:
    """The files of a set."""
    if name in NETWORKS:
        folder = root / ("utkface" if name == "utkface" else "text")
        return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    if name.startswith("beijing"):
        return tuple(sorted((root / "series").glob("beijing*")))
    return (root / "tables" / f"{FILES.get(name, name)}.csv.gz",)


def code() -> tuple[Path, ...]:
    """The source of the package and of what is imported here."""
    here = Path(__file__)
    package = sorted(Path(dt.__file__).parent.rglob("*.py"))
    return (here, here.with_name("tables.py"), here.parents[1] / "text.py", *package)


@cache
def digest_of(files: tuple[Path, ...]) -> str:
    """Of the names and the contents."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def of_table(root: Path, name: str, seed: int, rows: int) -> Forecasts:
    rng = np.random.default_rng(seed)
    (x, y), others, elsewhere = rows_of(root, name, rng)
    chosen = rng.permutation(len(y))[:rows]
    x, y = x[chosen], y[chosen]
    trees = HistGradientBoostingRegressor(random_state=seed).fit(x, y)
    network: Any = LongTailRegressor(bins=dt.Bins.auto(y), head="linear", tau=0.0, random_state=seed).fit(x, y)
    model = network.model_

    def part(x: np.ndarray, y: np.ndarray) -> Part:
        return Part(network._predicted(x, lambda x: model(x).scores), y, x, trees.predict(x))

    return made(model, part(*others), {key: part(*both) for key, both in elsewhere.items()})


def of_network(root: Path, name: str, seed: int) -> Forecasts:
    splits, bins, backbone, options, epochs = task(root, name)
    order = np.random.default_rng(seed).permutation(len(splits.train))
    withheld, train = (chosen(splits.train, np.sort(rows)) for rows in np.split(order, [len(order) // 5]))
    density = dt.LabelDensity.count(train.labels, bins, outside="clip")
    with start_runtime("cpu", "float32", seed=seed) as runtime, TemporaryDirectory() as folder:
        with runtime.seeded("network"):
            body = backbone()
            model = dt.LongTailModel(body, body.num_features, bins, density=density, outside="clip", **options)
            fit(
                model, train, splits.val, metrics=dt.RegressionMetrics(density, outside="clip"),
                loss=model.criterion, optimization=Optimization(epochs=epochs, batch_size=128, lr=2e-3),
                runtime=runtime, folder=Path(folder), augmentation=name == "utkface",
            )  # fmt: skip
        model.load_state_dict(load_checkpoint(Path(folder) / "checkpoint-last.pt")["model"])

        def part(*sets: SampleSet) -> Part:
            outputs = [predict(model, one, runtime=runtime) for one in sets]
            scores, features = (
                np.concatenate([getattr(one, key).numpy() for one in outputs]) for key in ("scores", "features")
            )
            labels = np.concatenate([one.labels for one in sets]).astype(float)
            return Part(scores, labels, features, np.full(len(labels), np.nan))

        return made(model, part(splits.val, splits.test), {}, part(withheld))


def chosen(whole: SampleSet, rows: np.ndarray) -> SampleSet:
    return type(whole)(whole.inputs, whole.labels[rows], whole.rows[rows])


def made(model: Any, held: Part, elsewhere: dict[str, Part], withheld: Part | None = None) -> Forecasts:
    readout = model.readout
    prior = readout.training_prior(readout.chosen_kernel("auto"), None).numpy()
    return Forecasts(model.density, prior, readout.ends, held, elsewhere, withheld)


@cache
def task(root: Path, name: str) -> tuple[Splits, dt.Bins, Any, dict[str, Any], int]:
    """The splits of a set, its axis, a function that makes its backbone, the options of its model, and its epochs."""
    if name == "utkface":
        axis = dt.Bins.uniform(0, 117, width=1, integer=True)
        return utkface(root / "utkface", size=32), axis, lambda: small_resnet(width=16), {"sigma": 2.0}, 5
    number, vectors = word_vectors(root / "text")
    if name == "sts_b":
        axis = dt.Bins.uniform(0, 5, width=0.1)
        return sts_b_dir(root / "text", number), axis, lambda: Reader(vectors, pairs=True), {}, 4
    axis = dt.Bins.uniform(1, 5, width=0.1)
    return emobank(root / "text", number), axis, lambda: Reader(vectors, pairs=False), {}, 4


def rows_of(root: Path, name: str, rng: np.random.Generator) -> tuple[Any, Any, dict[str, Any]]:
    """Inputs and labels of the training rows, of the unseen rows, and of those from elsewhere by name."""
    if not name.startswith("beijing"):
        x, y = read(root / "tables", name)
        return *halved((x, np.log1p(y) if name == "appliances" else y), rng), {}
    parts, far = (beijing(root / "series", station, hours=1) for station in ("Aotizhongxin", "Wanshouxigong"))
    train, val, test, other = (
        (part.inputs[part.rows][:, 0], part.labels) for part in (parts.train, parts.val, parts.test, far.test)
    )
    if name == "beijing_time":
        return train, val, {"beijing_year": test, "beijing_station": other}
    return *halved([np.concatenate(part) for part in zip(train, val, test, strict=True)], rng), {}


def halved(parts: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Two random halves of the same rows of each array; those of a :class:`Part` are parts."""
    make = getattr(type(parts), "_make", list)
    first, second = np.array_split(rng.permutation(len(parts[1])), 2)
    return make(part[first] for part in parts), make(part[second] for part in parts)
