"""What a checkpoint must hold before anything of it is used; changed, it is refused or goes on soundly."""

from __future__ import annotations

import copy
import math
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dir_toolkit.errors import CheckpointError
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.training.checkpoint import load_checkpoint, save_checkpoint
from dir_toolkit.experiment.training.loop import Optimization, fit
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.features.fds import FDS
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.weights import LDS
from dir_toolkit.losses.center import CenterLoss
from dir_toolkit.losses.regression import weighted_l1
from dir_toolkit.metrics.regression import RegressionMetrics

BINS = Bins.uniform(0, 20, width=1)
RUNTIME = Runtime(torch.device("cpu"), seed=3)
EPOCHS, STOP = 3, 3  # two steps per epoch
LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"


@cache
def image_set(samples: int, seed: int = 0) -> ImageSet:
    random = np.random.default_rng(seed)
    labels = np.minimum(random.exponential(5, samples), 19).astype(np.float32)
    images = (random.integers(0, 60, (samples, 3, 16, 16)) + labels[:, None, None, None] * 9).astype(np.uint8)
    rows = np.arange(samples)
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


class Tiny(nn.Module):
    """A regressor one of whose layers is never used, so that the optimizer remembers nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.BatchNorm1d(4))
        self.head, self.unused = nn.Linear(4, 1), nn.Linear(1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return 5 + self.head(self.backbone(images)).squeeze(1)


class Stops(nn.Module):
    """A loss with parameters, and settings, that stops the run at a step."""

    def __init__(self, spot: int = 0) -> None:
        super().__init__()
        self.center = CenterLoss(1, 1)
        self._at, self._calls = spot, 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"center": self.center}  # where it stops decides no numbers

    def forward(self, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        self._calls += 1
        if self._calls == self._at:
            raise KeyboardInterrupt
        bias = self.center.centers.sum()
        return weighted_l1(output + bias, target, weight)


def train(folder: Path, *, stop: int = 0, resume: bool = False, model: nn.Module | None = None, **changes: Any) -> Any:
    data, runtime = image_set(40), RUNTIME
    with runtime.seeded("init"):
        model = model or Tiny()
    fds = FDS(BINS, num_features=4)
    if "fds" not in changes:
        fds.attach(model.head, "input")
    arguments: dict[str, Any] = {
        "metrics": RegressionMetrics(LabelDensity.count(data.labels, BINS)),
        "loss": Stops(stop),
        "weights": LDS(BINS).fit(data.labels),
        "fds": fds,
        "runtime": runtime,
        "folder": folder,
        "resume": resume,
        "augmentation": False,
        "checkpoint_minutes": 0,
        "optimization": Optimization(epochs=EPOCHS, batch_size=20, lr=0.01),
    }
    return model, fit(model, data, image_set(10, seed=1), **{**arguments, **changes})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder of a run stopped in its second epoch, and its checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        train(folder, stop=STOP + 1)
    return {"folder": folder, **{name: load_checkpoint(folder / name) for name in (LAST, BEST)}}


@pytest.fixture
def resumed(tmp_path: Path, stopped: dict[str, Any]) -> Callable[..., Any]:
    """Resume from states as they are, or changed."""

    def go_on(last: Any = None, best: Any = None, **changes: Any) -> Any:
        for name, state in ((LAST, last), (BEST, best)):
            if state is None:
                shutil.copy(stopped["folder"] / name, tmp_path)
            else:
                save_checkpoint(tmp_path / name, state)
        return train(tmp_path, resume=True, **changes)

    return go_on


def spot(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place; ``...`` for none at all."""
    state = copy.deepcopy(state)
    inside = spot(state, path[:-1])
    if value is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return state


def places(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    result = [path] if path else []
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return result + [place for key, item in items for place in places(item, (*path, key))]


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "seconds": 0} for row in history]


def test_what_was_not_changed_goes_on(resumed: Callable[..., Any], tmp_path: Path) -> None:
    _, history = resumed()
    whole = train(tmp_path / "whole")[1]
    assert repr(untimed(history)) == repr(untimed(whole))  # NaN equals NaN


NAN = float("nan")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("format",), ..., r"must be of format 3, got none\. Go on with the release"),
        (("format",), 1, "must be of format 3, got format 1"),
        (("format",), 4, "got format 4"),
        (("format",), True, "got format True"),
        (("fingerprint",), [1], "no settings of a run"),
        (("fingerprint",), ..., "no settings of a run"),
        (("fingerprint",), {"seed": torch.ones(3)}, "no settings of a run"),
        (("fingerprint",), {1: 2}, "no settings of a run"),
        (("fingerprint", "seed"), 4, "seed was 4 and is 3"),
        (("fingerprint", "seed"), ..., "seed was 'absent' and is 3"),
        (("fingerprint", "optimization"), 1, "optimization was 1 and is {"),
        (("model",), ..., "no 'model'"),
        (("model",), 5, "a int as the state of a module"),
        (("model",), {}, "must fit this model, got .*Missing key"),
        (("model", "head.weight"), torch.ones(2, 2), "must fit this model, got .*size mismatch"),
        (("model", "head.weight"), 3, "must fit this model"),
        (("model", "head.weight"), ..., "must fit this model"),
        (("loss",), None, "no loss with parameters"),
        (("loss",), ..., "no 'loss'"),
        (("loss",), {}, "must fit this model"),
        (("optimizer",), ..., "no 'optimizer'"),
        (("optimizer",), None, "no state of an optimizer"),
        (("optimizer", "param_groups"), ..., "no state of an optimizer"),
        (("optimizer", "param_groups"), [], "an optimizer of other parameters"),
        (("optimizer", "param_groups"), [1, 2], "no state of an optimizer"),
        (("optimizer", "state"), {}, "a state of the optimizer for other parameters"),
        (("optimizer", "state"), [], "a state of the optimizer for other parameters"),
        (("optimizer", "state", 0), ..., "a state of the optimizer for other parameters"),
        (("optimizer", "state", 0), [], "a state of another optimizer"),
        (("optimizer", "state", 0, "exp_avg"), ..., "a state of another optimizer"),
        (("optimizer", "state", 0, "exp_avg"), torch.ones(2), "exp_avg of the optimizer in another shape"),
        (("optimizer", "state", 0, "exp_avg"), 1.0, "exp_avg of the optimizer in another shape"),
        (("optimizer", "state", 0, "exp_avg"), torch.full((4, 768), NAN), "exp_avg of the optimizer that is not fin"),
        (("optimizer", "state", 0, "exp_avg"), torch.ones(4, 768, dtype=torch.int64), "exp_avg .* as torch.int64"),
        (("optimizer", "state", 0, "step"), torch.tensor(-3.0), "step -3 of the optimizer"),
        (("optimizer", "state", 0, "step"), torch.tensor(1e6), r"step 1e\+06 of the optimizer"),
        (("ranks",), ..., "no 'ranks'"),
        (("ranks",), [], "other than 1 ranks"),
        (("ranks",), {}, "other than 1 ranks"),
        (("ranks", 0), 3, "a rank with other entries"),
        (("ranks", 0, "fds"), ..., "a rank with other entries"),
        (("ranks", 0, "fds"), {}, "must fit this model"),
        (("ranks", 0, "fds"), 4, "a int as the state of a module"),
        (
            ("ranks", 0, "fds", "running_count"),
            torch.full((20,), -1.0),
            "running_count of an FDS that no features have",
        ),
        (("ranks", 0, "fds", "running_mean"), torch.full((20, 4), math.inf), "running_mean of an FDS that no features"),
        (("ranks", 0, "loss_sum"), "1", "'1' as a sum of losses"),
        (("ranks", 0, "loss_sum"), NAN, "nan as a sum of losses"),
        (("ranks", 0, "threads"), 0, "0 threads"),
        (("progress",), ..., "no 'progress'"),
        (("progress",), [], "a place in the run with other entries"),
        (("progress", "__class__"), 1, "a place in the run with other entries"),
        (("progress", "end_epoch"), 1, "a place in the run with other entries"),
        (("progress", "step"), ..., "a place in the run with other entries"),
        (("progress", "epoch"), "1", "epoch '1' and step 1 of 3 times 2"),
        (("progress", "epoch"), 1.0, "epoch 1.0 and step"),
        (("progress", "epoch"), -1, "epoch -1 and step"),
        (("progress", "epoch"), 2, "a history of other than 2 rows"),
        (("progress", "epoch"), 3, "epoch 3 and step 1"),
        (("progress", "step"), 10**6, "epoch 1 and step 1000000 of 3 times 2"),
        (("progress", "step"), -3, "epoch 1 and step -3"),
        (("progress", "seconds"), "long", "'long' seconds"),
        (("progress", "seconds"), -1.0, "-1.0 seconds"),
        (("progress", "seconds"), math.inf, "inf seconds"),
        (("progress", "history"), "rows", "a history of other than 1 rows"),
        (("progress", "history"), [], "a history of other than 1 rows"),
        (("progress", "history", 0), 1, "a history whose row 1 is none of this run"),
        (("progress", "history", 0), {"epoch": 1}, "a history whose row 1"),
        (("progress", "history", 0, "more"), 1, "a history whose row 1"),
        (("progress", "history", 0, 5), 1, "a history whose row 1"),
        (("progress", "history", 0, "epoch"), 2, "a history whose row 1"),
        (("progress", "history", 0, "step"), 1, "a history whose row 1"),
        (("progress", "history", 0, "loss"), "low", "a history whose row 1"),
        (("progress", "history", 0, "val_bmae"), ..., "a history whose row 1"),
        (("more",), 1, "'more' besides"),
    ],
    ids=lambda value: "".join(f"[{key}]" for key in value) if isinstance(value, tuple) else None,
)
def test_a_checkpoint_of_another_structure_is_refused_and_nothing_changed(
    resumed: Callable[..., Any], stopped: dict[str, Any], path: tuple[Any, ...], value: Any, says: str
) -> None:
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=says) as error:
        resumed(changed(stopped[LAST], path, value), model=model)
    assert LAST in str(error.value)
    for name, kept in model.state_dict().items():
        assert torch.equal(kept, before[name]), name


@pytest.mark.parametrize("value", [..., None, -1, {"a": torch.ones(2)}], ids=repr)
def test_any_place_may_hold_anything(resumed: Callable[..., Any], stopped: dict[str, Any], value: Any) -> None:
    """Only our own error comes out, or a run that goes on to its end."""
    refused = 0
    for path in places({key: item for key, item in stopped[LAST].items() if key != "fingerprint"}):
        if path[:2] == ("optimizer", "state") and path[2:3] in [(1,), (2,), (3,), (4,)]:
            continue  # parameters like those before and after
        try:
            resumed(changed(stopped[LAST], path, value))
        except CheckpointError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("format",), ..., "must be of format 3, got none"),
        (("fingerprint", "seed"), 4, "seed was 4 and is 3"),
        (("epoch",), 2, "of epoch 2, not epoch"),
        (("epoch",), "1", "of epoch '1', not epoch"),
        (("val_bmae",), 99.0, "val_bmae 99.0 of epoch"),
        (("val_bmae",), ..., "no 'val_bmae'"),
        (("model",), ..., "no 'model'"),
        (("model", "head.weight"), torch.ones(3), "must fit this model"),
    ],
)
def test_the_best_weights_are_of_the_same_run(
    resumed: Callable[..., Any], stopped: dict[str, Any], path: tuple[Any, ...], value: Any, says: str, tmp_path: Path
) -> None:
    resumed()
    best = load_checkpoint(tmp_path / BEST)
    save_checkpoint(tmp_path / BEST, changed(best, path, value))
    with pytest.raises(CheckpointError, match=says) as error:
        train(tmp_path, resume=True)
    assert BEST in str(error.value)


def test_the_best_weights_of_another_run_are_not_taken(resumed: Callable[..., Any], tmp_path: Path) -> None:
    resumed()
    train(tmp_path / "other", optimization=Optimization(epochs=EPOCHS, batch_size=20, lr=0.02))
    (tmp_path / BEST).write_bytes((tmp_path / "other" / BEST).read_bytes())
    with pytest.raises(
        CheckpointError, match=rf"{BEST} must be of the same run, got optimization\.lr was 0\.02 and is"
    ):
        train(tmp_path, resume=True)


def test_better_weights_of_an_epoch_done_again_are_taken(resumed: Callable[..., Any], tmp_path: Path) -> None:
    """As a kill between the two checkpoints leaves them, where the epoch is not found again to the bit."""
    resumed()
    best = load_checkpoint(tmp_path / BEST)
    better = {**best, "epoch": 3, "val_bmae": best["val_bmae"] / 2}
    better["model"]["head.bias"] += 1
    save_checkpoint(tmp_path / BEST, better)
    model, _ = train(tmp_path, resume=True)
    assert torch.equal(model.head.bias, better["model"]["head.bias"])


def test_another_number_of_threads_is_told(resumed: Callable[..., Any], stopped: dict[str, Any]) -> None:
    threads = torch.get_num_threads() + 1
    with pytest.warns(UserWarning, match=rf"used {threads} threads and goes on with .*set_num_threads\({threads}\)"):
        resumed(changed(stopped[LAST], ("ranks", 0, "threads"), threads))


def test_values_nested_beyond_all_measure_are_refused(tmp_path: Path, stopped: dict[str, Any]) -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    torch.save({**stopped[LAST], "fingerprint": {"deep": deep}}, tmp_path / LAST)
    sys.setrecursionlimit(usual)
    with pytest.raises(CheckpointError):
        train(tmp_path, resume=True)


def test_a_run_with_sgd_goes_on(tmp_path: Path) -> None:
    options = {"optimization": Optimization(epochs=EPOCHS, batch_size=20, lr=0.01, optimizer="sgd")}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=STOP + 1, **options)
    _, history = train(tmp_path, resume=True, **options)
    assert repr(untimed(history)) == repr(untimed(train(tmp_path / "whole", **options)[1]))


def test_the_model_as_it_was_left_may_go_on(tmp_path: Path) -> None:
    """As in a notebook, where nobody makes it anew, nor its FDS."""
    model, fds = Tiny(), FDS(BINS, num_features=4)
    fds.attach(model.head, "input")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=STOP + 1, model=model, fds=fds)
    assert fds.running_count.sum() > 0
    train(tmp_path, resume=True, model=model, fds=fds)
