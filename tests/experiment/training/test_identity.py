"""A run goes on with what it was started with, and with nothing else: each argument of all that has settings, changed.

The cases are those of ``tests/test_settings.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.errors import CheckpointError, SettingsError
from dir_toolkit.experiment.data.augment import augment, augment_strongly
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.training.loop import Optimization, fit
from dir_toolkit.experiment.training.runtime import Runtime

_spec = importlib.util.spec_from_file_location("settings_cases", Path(__file__).parents[2] / "test_settings.py")
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["settings_cases"] = cases
_spec.loader.exec_module(cases)

BINS = dt.Bins.uniform(0, 60, width=1)
SAMPLES = 8
LABELS = np.arange(SAMPLES).astype(np.float32) * 5
ROWS = np.arange(SAMPLES)
IMAGES = np.random.default_rng(0).integers(0, 255, (SAMPLES, 1, 16, 16)).astype(np.uint8)
DATA = ImageSet(IMAGES, LABELS, ROWS, content_digest(IMAGES, LABELS, ROWS))


class Tiny(nn.Module):
    def __init__(self, num_features: int = 2, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(256, num_features))
        self.head = nn.Linear(num_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)).squeeze(1)


class Holds:
    """A loss that is the usual one, and has something with settings."""

    def __init__(self, thing: object) -> None:
        self.settings = {"thing": thing}

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return dt.weighted_l1(*arguments, **options)


def train(folder: Path, *, resume: bool = False, thing: object = None, **changes: Any) -> list[dict[str, Any]]:
    """One epoch, with ``thing`` where fit takes it, or held by the loss."""
    model: nn.Module = Tiny()
    arguments: dict[str, Any] = {
        "metrics": dt.RegressionMetrics(dt.LabelDensity.count(LABELS, BINS)),
        "optimization": Optimization(epochs=1, batch_size=SAMPLES),
        "runtime": Runtime(torch.device("cpu"), seed=1),
        "folder": folder,
        "resume": resume,
    }
    if isinstance(thing, dt.LDS):
        arguments["weights"] = thing.fit(LABELS)
    elif isinstance(thing, dt.FDS):
        model = Tiny(thing.num_features)
        thing.attach(model.head, "input")
        arguments["fds"] = thing
    elif isinstance(thing, dt.RegressionMetrics):
        arguments["metrics"] = thing
    elif thing is not None:
        arguments["loss"] = Holds(thing)
    return fit(changes.pop("model", model), DATA, DATA, **{**arguments, **changes})


@pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning")  # of eight labels, or odd settings
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.kind.__name__)
def test_a_run_goes_on_with_the_same_settings_alone(case: Any, tmp_path: Path) -> None:
    train(tmp_path, thing=case.kind(**case.base))
    for name, other in case.others.items():
        try:
            train(tmp_path, resume=True, thing=case.kind(**{**case.base, **other}))
        except CheckpointError as error:
            assert "must be of the same run" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"another {name} was taken")
    assert len(train(tmp_path, resume=True, thing=case.kind(**case.base))) == 1


class OwnLoss(nn.Module):
    def __init__(self, delta: float) -> None:
        super().__init__()
        self.inner = nn.SmoothL1Loss(beta=delta)

    def forward(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return self.inner(output, target)


def scaled(factor: float) -> Any:
    def loss(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return factor * dt.weighted_l1(output, target, weight)

    return loss


def density(last: int) -> dt.LabelDensity:
    return dt.LabelDensity.count([*LABELS, last], BINS)


@pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning")
@pytest.mark.parametrize(
    ("name", "one", "other", "says"),
    [
        ("loss", dt.weighted_l1, dt.weighted_mse, r"loss was '\S*weighted_l1' and is '\S*weighted_mse'"),
        (
            "loss",
            functools.partial(dt.losses.weighted_huber, delta=0.1),
            functools.partial(dt.losses.weighted_huber, delta=10.0),
            r"loss\.keywords\.delta was 0\.1 and is 10\.0",
        ),
        ("loss", functools.partial(dt.weighted_l1), functools.partial(dt.weighted_mse), r"loss\.calls was"),
        ("loss", OwnLoss(1.0), OwnLoss(2.0), r"loss\.children\.inner\.beta was 1\.0 and is 2\.0"),
        ("loss", scaled(1.0), scaled(2.0), r"loss\.takes\.factor was 1\.0 and is 2\.0"),
        ("weights", dt.LDS(BINS).fit(density(1)), dt.LDS(BINS).fit(density(2)), r"weights\.weights was"),
        ("weights", dt.LDS(BINS).fit(density(1)), None, "weights was .* and is None"),
        ("weights_from", 0, 1, "weights_from was 0 and is 1"),
        ("augmentation", True, False, "augmentation was True and is False"),
        ("augmentation", augment, augment_strongly, "augmentation was"),
        ("augmentation", functools.partial(augment, shift=1), functools.partial(augment, shift=2), "shift was 1 and"),
        ("model", Tiny(), Tiny(dropout=0.5), r"model\.backbone\.1\.p was 0\.0 and is 0\.5"),
        ("optimization", Optimization(1, SAMPLES), Optimization(1, SAMPLES, lr=1.0), r"optimization\.lr was"),
        ("fingerprint", {"a": 1}, {"a": 2}, "a was 1 and is 2"),
        ("fingerprint", {"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, r"a\.b was \[1, 2\] and is \[1, 3\]"),
        ("fingerprint", {"a": 1}, {"a": True}, "a was 1 and is True"),
        ("fingerprint", {"a": torch.ones(3)}, {"a": torch.zeros(3)}, r"a was \[1\.0, 1\.0, 1\.0\] and is"),
        ("runtime", Runtime(torch.device("cpu"), seed=1), Runtime(torch.device("cpu"), seed=2), "seed was 1 and is 2"),
    ],
)
def test_functions_and_modules_identify_a_run(tmp_path: Path, name: str, one: Any, other: Any, says: str) -> None:
    train(tmp_path, **{name: one})
    with pytest.raises(CheckpointError, match=says):
        train(tmp_path, resume=True, **{name: other})
    assert len(train(tmp_path, resume=True, **{name: one})) == 1


def test_values_that_equal_nothing_equal_themselves(tmp_path: Path) -> None:
    fingerprint = {"a": float("nan"), "b": (1, 2.0, None), "c": torch.tensor([1.0, float("nan")])}
    train(tmp_path, fingerprint=fingerprint)
    assert len(train(tmp_path, resume=True, fingerprint=fingerprint)) == 1


def test_an_fds_attached_elsewhere_is_another_run(tmp_path: Path) -> None:
    def run(where: str, resume: bool) -> None:
        model, fds = Tiny(), dt.FDS(BINS, 2)
        fds.attach(model.head if where == "input" else model.backbone, where)  # type: ignore[arg-type]
        train(tmp_path, model=model, fds=fds, resume=resume)

    run("input", False)
    with pytest.raises(CheckpointError, match=r"fds_attached was \[\['head', 'input', None\]\] and is \[\['backbone'"):
        run("output", True)
    run("input", True)


def test_a_lambda_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    def loss(delta: float) -> Any:
        return lambda output, target, weight: delta * (output - target).abs().mean()

    with pytest.raises(SettingsError, match=r'loss must .* got a lambda\. .* name it by hand: fingerprint={"loss": '):
        train(tmp_path, loss=loss(1.0))
    assert list(tmp_path.iterdir()) == []
    train(tmp_path, loss=loss(1.0), fingerprint={"loss": "one"})
    with pytest.raises(CheckpointError, match="loss was 'one' and is 'two'"):
        train(tmp_path, resume=True, loss=loss(2.0), fingerprint={"loss": "two"})
    train(tmp_path, resume=True, loss=loss(1.0), fingerprint={"loss": "one"})
