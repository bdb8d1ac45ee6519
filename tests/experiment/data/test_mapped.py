"""Any map-style dataset in training: dicts as inputs, labels per step, some of them missing."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dir_toolkit import FDS, LDS, Bins, LabelDensity, LongTailModel, RegressionMetrics, weighted_l1
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.experiment.data.images import SampleSet
from dir_toolkit.experiment.data.mapped import MappedSet
from dir_toolkit.experiment.training.loop import Optimization, evaluate, fit, predict
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.losses import WeightedL1

BINS = Bins.uniform(0, 10, width=1)
CPU = Runtime(torch.device("cpu"), seed=3)
STEPS = Optimization(epochs=2, batch_size=8)


def series(samples: int = 20, seed: int = 0) -> list[Any]:
    """Sequences with a mask of their own, and one label per step, about a third of them missing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, 2, generator=generator)
    y = (5 + 2 * x.sum(2)).clamp(0, 10)
    y[torch.rand(y.shape, generator=generator) < 0.3] = torch.nan
    return [({"x": x[i], "mask": torch.ones(5, dtype=torch.bool)}, y[i]) for i in range(samples)]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return 5 + self.head(self.body(inputs["x"])[0]).squeeze(2) * inputs["mask"]


class Stops(list):  # type: ignore[type-arg]
    """A dataset that fails once, after so many samples."""

    left = 10**9

    def __getitem__(self, place: Any) -> Any:
        Stops.left -= 1
        if Stops.left == 0:
            raise OSError("the disk is gone")
        return super().__getitem__(place)


def loaded(dataset: Any, batches: list[list[int]], workers: int = 0) -> DataLoader[Any]:
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers)


def train(folder: Path, data: Any, loader: Any = None, **options: Any) -> tuple[list[dict[str, Any]], nn.Module, FDS]:
    labels = torch.stack([y for _, y in series()])
    density = LabelDensity.count(labels, BINS, missing="drop")
    model, fds = Tagger(), FDS(BINS, 4, missing="drop")
    fds.attach(model.head, "input")
    history = fit(
        model, MappedSet(data, loader=loader), MappedSet(series(seed=1), loader=loader),
        folder=folder, runtime=CPU, optimization=STEPS, fds=fds,
        metrics=RegressionMetrics(density, missing="drop"), weights=LDS(BINS, missing="drop").fit(density),
        augmentation=False, checkpoint_minutes=0, missing="drop", **options,
    )  # fmt: skip
    return history, model, fds


@pytest.mark.parametrize("loader", [None, loaded])
def test_a_training_that_was_broken_off_ends_with_the_same_bits(tmp_path: Path, loader: Any) -> None:
    history, model, fds = train(tmp_path / "whole", series())
    assert fds.statistics()["count"].sum() > 0
    assert [row["val_mae"] == row["val_mae"] for row in history] == [True, True]
    Stops.left = 20 + 20 + 12  # read for its labels, an epoch, and a step of the next
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "broken", Stops(series()), loader)
    again, other, _ = train(tmp_path / "broken", Stops(series()), loader, resume=True)
    assert_same(again, history)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_same(history: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [{**row, "seconds": 0} for row in history] == [{**row, "seconds": 0} for row in expected]


def test_workers_change_nothing(tmp_path: Path) -> None:
    history, model, _ = train(tmp_path / "here", series())
    again, other, _ = train(tmp_path / "workers", series(), partial(loaded, workers=1))
    assert_same(again, history)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("loader", "error", "sentence"),
    [
        (
            lambda data, batches: DataLoader(data, batch_size=7),
            ShapeError,
            r"batch 1 must hold 20 samples, got 7\. Use",
        ),
        (lambda data, batches: [], ShapeError, "loader must make 1 batches, got 0"),
        (lambda data, batches: [*loaded(data, batches)] * 2, ShapeError, "batch 2 must hold 0 samples, got 20"),
        (lambda data, batches: [torch.zeros(20)], TypeError, "a batch must be a pair of inputs and a tensor of labels"),
        ("loader", TypeError, "loader must be a Callable, got str"),
    ],
)
def test_a_loader_that_makes_other_batches_is_refused(loader: Any, error: Any, sentence: str) -> None:
    with pytest.raises(error, match=f"^MappedSet: {sentence}"):
        MappedSet(series(), loader=loader)


def plain(folder: Path, data: Any, runtime: Runtime = CPU, **options: Any) -> tuple[list[dict[str, Any]], nn.Module]:
    """Without FDS and weights, whose sums are of other orders on other ranks."""
    density = LabelDensity.count(torch.stack([y for _, y in series()]), BINS, missing="drop")
    model, metrics = Tagger(), RegressionMetrics(density, missing="drop")
    given: Any = {"augmentation": False, "missing": "drop", "runtime": runtime, "optimization": STEPS, **options}
    return fit(model, MappedSet(data), MappedSet(series(seed=1)), folder=folder, metrics=metrics, **given), model


def uneven() -> list[Any]:
    """Of every second sample all labels but one are missing, so that ranks differ, and a batch may have none."""
    data = series()
    for _, y in data[1::2]:
        y[1:] = torch.nan
    return data


def run_rank(rank: int) -> dict[str, Any]:
    history, model = plain(Path("run"), uneven(), Runtime(torch.device("cpu"), rank, 2, seed=3))
    return {"history": history, "model": model.state_dict()}


def test_two_ranks_take_the_mean_over_the_labels_that_are_there(two_ranks: Any, tmp_path: Path) -> None:
    history, model = plain(tmp_path / "one", uneven())
    for state in two_ranks(run_rank, timeout=120):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state["model"][name], value, rtol=1e-4, atol=1e-6)
        for row, expected in zip(state["history"], history, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["val_mae"] == pytest.approx(expected["val_mae"], rel=1e-5)


def test_the_loss_in_the_history_is_the_mean_over_the_labels_of_the_epoch(tmp_path: Path) -> None:
    still: Any = {"optimization": Optimization(epochs=1, batch_size=8, lr=1e-12)}
    (row,), model = plain(tmp_path, uneven(), **still)
    x, y = torch.stack([i["x"] for i, _ in uneven()]), torch.stack([y for _, y in uneven()])
    error = (model({"x": x, "mask": torch.ones(20, 5)}) - y).abs()
    assert row["loss"] == pytest.approx(error[~y.isnan()].mean().item(), rel=1e-5)


def test_missing_labels_are_refused_by_name_unless_all_drop_them(tmp_path: Path) -> None:
    data, none = series(), [(x, y * torch.nan) for x, y in series()]
    density = LabelDensity.count(torch.stack([y for _, y in data]), BINS, missing="drop")
    for error, sentence, given, options in (
        (
            LabelError,
            r"train\.labels must not be NaN, got \d+ that are\. Pass missing=\"drop\"",
            data,
            {"missing": "raise"},
        ),
        (LabelError, "train must hold at least one label that is not missing, got 100 that are", none, {}),
        (ValueError, "missing must be one of 'raise', 'drop', got 'skip'", data, {"missing": "skip"}),
        (
            ValueError,
            'weights must have missing="drop", as the training has',
            data,
            {"weights": LDS(BINS).fit(density)},
        ),
        (ValueError, "loss must have missing=\"drop\", as the training has, got 'raise'", data, {"loss": WeightedL1()}),
    ):
        with pytest.raises(error, match=f"^fit: {sentence}"):
            plain(tmp_path / "none", given, **options)
    assert not (tmp_path / "none").exists()
    histories = [
        plain(tmp_path / str(i), data, loss=loss)[0]
        for i, loss in enumerate((weighted_l1, WeightedL1(missing="drop"), partial(weighted_l1, missing="drop")))
    ]
    assert_same(histories[0], histories[1])
    assert_same(histories[0], histories[2])


def test_arrays_with_missing_labels_train_as_the_samples_that_have_one(tmp_path: Path) -> None:
    inputs, labels = np.random.default_rng(0).random((20, 3), np.float32), np.arange(20, dtype=np.float32) / 2
    labels[5] = np.nan
    data = SampleSet(inputs, labels, np.arange(20))
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    fds = FDS(BINS, 4, missing="drop")
    model = LongTailModel.for_labels(backbone, 4, labels, bins=BINS, missing="drop", fds=fds)
    metrics = RegressionMetrics(model.density, missing="drop")
    options: Any = {"metrics": metrics, "optimization": STEPS, "runtime": CPU, "augmentation": False, "missing": "drop"}
    history = fit(model, data, data, folder=tmp_path, loss=model.criterion, fds=fds, **options)
    assert fds.statistics()["count"].sum() > 0
    assert all(np.isfinite(row["loss"]) for row in history)
    assert evaluate(model, data, metrics=metrics, runtime=CPU).compute()["count"].sel(region="all") == 19


def test_it_is_evaluated_and_predicted_from_as_its_samples_are() -> None:
    model, data = Tagger().eval(), series()
    held = MappedSet(data)
    x, y = {"x": torch.stack([i["x"] for i, _ in data]), "mask": torch.ones(20, 5)}, torch.stack([y for _, y in data])
    with torch.no_grad():
        pred = model(x)
    assert torch.equal(predict(model, held, runtime=CPU, batch_size=7), pred)
    density = LabelDensity.count(y, BINS, missing="drop")
    result = evaluate(model, held, metrics=RegressionMetrics(density, missing="drop"), runtime=CPU).compute()
    there = ~y.isnan()
    assert result.mae.sel(region="all").item() == pytest.approx((pred - y)[there].abs().mean().item(), rel=1e-6)
    with pytest.raises(LabelError, match="target must not be NaN"):
        evaluate(model, held, metrics=RegressionMetrics(density), runtime=CPU)


def test_a_list_of_pairs_trains_as_the_arrays_that_it_was_made_of(tmp_path: Path) -> None:
    inputs, labels = np.random.default_rng(0).random((20, 3), np.float32), np.arange(20, dtype=np.float32) / 2
    arrays = SampleSet(inputs, labels, np.arange(20))
    pairs = MappedSet([(x, y) for x, y in zip(inputs, labels, strict=True)])
    histories = []
    for i, data in enumerate((arrays, pairs)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
        metrics = RegressionMetrics(LabelDensity.count(labels, BINS))
        options: Any = {"metrics": metrics, "optimization": STEPS, "runtime": CPU, "augmentation": False}
        histories.append(fit(model, data, data, folder=tmp_path / str(i), **options))
        histories[-1] = [{k: v for k, v in row.items() if k != "seconds"} for row in histories[-1]]
    assert histories[0] == histories[1]


def test_its_digest_tells_other_samples_and_what_is_no_dataset_is_refused() -> None:
    data = series()
    assert MappedSet(data).digest == MappedSet(series()).digest != MappedSet(data[::-1]).digest
    assert MappedSet(data, digest="0" * 64).digest == "0" * 64
    data[3][0]["x"][0, 0] += 1
    assert MappedSet(data).digest != MappedSet(series()).digest
    with pytest.raises(TypeError, match=r"^MappedSet: dataset must have a length and samples by number, got set"):
        MappedSet({1, 2})
    with pytest.raises(TypeError, match="a batch must be a pair of inputs and a tensor of labels, got Tensor"):
        MappedSet([torch.zeros(2)])
    with pytest.raises(LabelError, match="labels must not be infinite"):
        MappedSet([(torch.zeros(2), float("inf"))])
    with pytest.raises(ValueError, match="digest must be 64 hexadecimal digits"):
        MappedSet(data, digest="abc")


def test_names_of_inputs_tell_samples_apart_and_positions_lie_within() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    one, other = MappedSet([({"a": a, "b": b}, 1.0)]), MappedSet([({"b": a, "a": b}, 1.0)])
    assert one.digest != other.digest
    for position in (-1, 1):
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 1\)"):
            one.batch(np.array([position]))
