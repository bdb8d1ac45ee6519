"""Any map-style dataset in training: dicts as inputs, labels per step, some of them missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, LDS, Bins, LabelDensity, RegressionMetrics
from dir_toolkit.errors import LabelError
from dir_toolkit.experiment.data.images import SampleSet
from dir_toolkit.experiment.data.mapped import MappedSet
from dir_toolkit.experiment.training.loop import Optimization, evaluate, fit, predict
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.losses import weighted_l1

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


def loss(pred: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return weighted_l1(pred, labels, weight)  # a weight of zero, which LDS gives, is a missing label


class Stops(list):  # type: ignore[type-arg]
    """A dataset that fails once, after so many samples."""

    left = 10**9

    def __getitem__(self, place: Any) -> Any:
        Stops.left -= 1
        if Stops.left == 0:
            raise OSError("the disk is gone")
        return super().__getitem__(place)


def train(folder: Path, data: Any, **options: Any) -> tuple[list[dict[str, Any]], nn.Module, FDS]:
    labels = torch.stack([y for _, y in series()])
    density = LabelDensity.count(labels, BINS, missing="drop")
    model, fds = Tagger(), FDS(BINS, 4, missing="drop")
    fds.attach(model.head, "input")
    history = fit(
        model, MappedSet(data), MappedSet(series(seed=1)), folder=folder, runtime=CPU, optimization=STEPS, fds=fds,
        metrics=RegressionMetrics(density, missing="drop"), weights=LDS(BINS, missing="drop").fit(density), loss=loss,
        augmentation=False, checkpoint_minutes=0, **options,
    )  # fmt: skip
    return history, model, fds


def test_a_training_that_was_broken_off_ends_with_the_same_bits(tmp_path: Path) -> None:
    history, model, fds = train(tmp_path / "whole", series())
    assert fds.statistics()["count"].sum() > 0
    assert [row["val_mae"] == row["val_mae"] for row in history] == [True, True]
    Stops.left = 20 + 20 + 12  # read for its labels, an epoch, and a step of the next
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "broken", Stops(series()))
    again, other, _ = train(tmp_path / "broken", Stops(series()), resume=True)
    for row, expected in zip(again, history, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


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
