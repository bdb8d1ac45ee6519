from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.errors import UsageError
from dir_toolkit.longtail import LongTailModel

AGES = dt.Bins.uniform(0, 20, width=1)
AGE_DENSITY = dt.LabelDensity(AGES, np.arange(1, 21)[::-1] ** 2)
X = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))


def ages(bins: dt.Bins = AGES, density: Any = AGE_DENSITY, backbone: nn.Module | None = None, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)) if backbone is None else backbone
        model = LongTailModel(backbone, 6, bins, density=density, **options)
        with torch.no_grad():
            next(model.head.parameters()).mul_(9)
    return model


@pytest.mark.parametrize("head", ["linear", "gaussian"])
def test_a_table_of_predictions_intervals_and_regions(head: str) -> None:
    model = ages(head=head)
    model.backbone[0].eval()
    table = model.predict(X, level=0.8)
    assert (model.training, model.backbone[0].training, model.backbone[1].training) == (True, False, True)
    output = model.eval()(X)
    lower, upper = model.interval(output, 0.8)
    for name, expected in (("prediction", output.prediction), ("lower", lower), ("upper", upper)):
        np.testing.assert_array_equal(table[name], expected.detach())
        assert table[name].dims == ("sample",)
    regions = AGE_DENSITY.regions()[AGES.index(output.prediction.detach(), "clip")]
    assert table.region.values.tolist() == regions.tolist()
    assert len(set(regions)) > 1
    assert table.lower.attrs == {"interval_level": 0.8}
    pytest.importorskip("pandas")
    assert list(table.to_dataframe().columns) == ["prediction", "lower", "upper", "region"]
    assert model.predict(X).upper.attrs == {"interval_level": 0.9}


class Named(nn.Module):
    """Takes a dict of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 6)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.layer(inputs["x"])


def test_batches_of_all_kinds_are_read_alike() -> None:
    y = torch.arange(11)
    model = ages()
    expected = model.predict(X)
    loaders: list[Any] = [
        [X[:4], X[4:]],
        [[X[:4]], (X[4:],)],
        [(X[:4], y[:4]), [X[4:], y[4:]]],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 4),
        (part for part in X.split(3)),
    ]
    for loader in loaders:
        np.testing.assert_allclose(model.predict(loader).prediction, expected.prediction, rtol=1e-5)
    named = ages(backbone=Named())
    pairs = [({"x": X[:4]}, y[:4]), {"x": X[4:]}]
    np.testing.assert_allclose(named.predict(pairs).prediction, named.predict([{"x": X}]).prediction, rtol=1e-5)


def test_a_readout_without_an_interval_has_no_ends() -> None:
    classes = dt.Bins.classes(4)
    of_classes = ages(classes, dt.LabelDensity(classes, np.array([300, 50, 10, 0])))
    table = of_classes.predict(X)
    assert list(table.data_vars) == ["prediction", "region"]
    assert table.prediction.dtype == np.int64
    assert list(ages(density=None, head="regression").predict(X).data_vars) == ["prediction"]
    for model in (of_classes, ages(head="regression")):
        with pytest.raises(UsageError, match=r"^LongTailModel\.predict: the readout must give intervals of a label"):
            model.predict(X, level=0.9)
    model = ages(head="regression").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few samples
        model.calibrate_intervals(model(X).scores, torch.linspace(0, 19, 11), 0.7, per_region=0)
    table = model.predict(X)
    np.testing.assert_array_equal(table.lower, model.interval(model(X))[0].detach())
    assert table.lower.attrs["interval_level"] == pytest.approx(0.7)


def test_arrays_and_tables_are_told_how_to_become_tensors() -> None:
    for kind in (lambda x: x.numpy(), lambda x: pytest.importorskip("pandas").DataFrame(x.numpy())):
        with pytest.raises(TypeError, match=r"got (ndarray|DataFrame)\. Use a tensor: ") as caught:
            ages().predict(kind(X))
        code = str(caught.value).partition("tensor: ")[2].rstrip(".")
        assert torch.equal(eval(code, {"torch": torch, "numpy": np, "inputs": kind(X)}), X)


def test_what_cannot_be_predicted_is_told_and_modes_come_back() -> None:
    model = ages()
    with pytest.raises(ValueError, match=r"^LongTailModel\.predict: level must be > 0 and < 1, got 2"):
        model.predict(X, level=2)
    with pytest.raises(ValueError, match=r"^LongTailModel\.predict: predictions must be finite, got nan at index \["):
        model.predict(torch.where(X > 2, X, torch.nan))
    with pytest.raises(TypeError, match=r"^LongTailModel\.predict: a tensor or a loader of batches is needed, got int"):
        model.predict(3)
    with pytest.raises(TypeError, match=r"is needed, got dict\. Use a DataLoader, or \[\(inputs, labels\)\]"):
        model.predict({"x": X})
    with pytest.raises(TypeError, match=r"a batch must be inputs, or a pair of inputs and labels, got 3 values\. Join"):
        model.predict([(X, X, X)])
    with pytest.raises(ValueError, match=r"^LongTailModel\.predict: there must be at least one batch, got none"):
        model.predict([])
    assert model.training
