"""Training, in this process and in processes that the tests start."""

from __future__ import annotations

import copy
import csv
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forked import Forked
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dir_toolkit.decoupling import stage_two
from dir_toolkit.errors import (
    CheckpointError,
    LabelError,
    NonFiniteLossError,
    RunExistsError,
    SettingsError,
    ShapeError,
    UsageError,
)
from dir_toolkit.experiment.data.augment import to_float
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.data.mapped import MappedSet
from dir_toolkit.experiment.training.checkpoint import load_checkpoint
from dir_toolkit.experiment.training.loop import Optimization, evaluate, fit, predict
from dir_toolkit.experiment.training.runtime import Runtime, start_runtime
from dir_toolkit.features.fds import FDS
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.mixing import c_mixup
from dir_toolkit.labels.sampling import BinSampler
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel, LongTailOutput, MultiTargetModel
from dir_toolkit.losses.center import CenterLoss
from dir_toolkit.losses.cross_entropy import cross_entropy
from dir_toolkit.losses.regression import weighted_l1
from dir_toolkit.metrics.classification import ClassificationMetrics, classification_metrics
from dir_toolkit.metrics.regression import RegressionMetrics, regression_metrics

BINS = Bins.uniform(0, 20, width=1)
EPOCHS, BATCH, SAMPLES = 3, 15, 67  # five steps an epoch, the last of seven samples
STEPS = 5
CLASSES = Bins.classes(4)
ONE_EPOCH = Optimization(epochs=1, batch_size=BATCH)


def image_set(samples: int = SAMPLES, seed: int = 0) -> ImageSet:
    random = np.random.default_rng(seed)
    labels = np.minimum(random.exponential(5, samples), 19).astype(np.float32)
    noise = random.integers(0, 60, (samples, 3, 16, 16))
    images = (noise + labels[:, None, None, None] * 9).astype(np.uint8)
    rows = np.arange(samples)
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


class Regressor(nn.Module):
    """Predictions as a plain tensor (N,), about 5."""

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(num_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        return 5 + 5 * self.head(self.backbone(images)).squeeze(1).float()


def tiny_model(*, random: bool = True) -> Regressor:
    """With dropout and BatchNorm, or without, where ranks are to agree with one process."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8) if random else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2 if random else 0.0),
    )
    return Regressor(backbone, 8)


def one_process(seed: int = 3, precision: Any = "float32") -> Runtime:
    return Runtime(torch.device("cpu"), seed=seed, precision=precision)


def metrics_of(data: ImageSet) -> RegressionMetrics:
    return RegressionMetrics(LabelDensity.count(data.labels, BINS))


def train(
    folder: Path,
    runtime: Runtime | None = None,
    *,
    model: Any = None,
    data: ImageSet | None = None,
    val: ImageSet | None = None,
    random: bool = True,
    with_fds: bool = True,
    **changes: Any,
) -> Any:
    """A whole method, LDS and FDS, on 67 images, unless a model is given; returns (model, fds, history)."""
    runtime, data, fds = runtime or one_process(), data or image_set(), None
    arguments: dict[str, Any] = {"metrics": metrics_of(data), "runtime": runtime, "folder": folder}
    if model is None:
        with runtime.seeded("init"):
            model = tiny_model(random=random)
        if with_fds:
            fds = FDS(BINS, num_features=8, momentum=0.5)
            fds.attach(model.head, "input")
        arguments |= {"weights": LDS(BINS).fit(data.labels), "fds": fds, "augmentation": random}
        arguments["optimization"] = Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.01, clip_norm=5.0)
        arguments["fingerprint"] = {"loss": "weighted_l1"}  # since those that act at a call are told from it otherwise
    history = fit(model, data, image_set(31, seed=1) if val is None else val, **{**arguments, **changes})
    return model, fds, history


def class_set(samples: int = SAMPLES, seed: int = 0) -> ImageSet:
    """Grey images of four classes, the first the most frequent; the first pixel of image i is i."""
    random = np.random.default_rng(seed)
    labels = np.minimum(random.geometric(0.5, samples) - 1, 3)
    images = (random.integers(0, 60, (samples, 1, 8, 8)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    images[:, 0, 0, 0] = np.arange(samples)
    rows = np.arange(samples)
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


class Scored(NamedTuple):
    scores: Tensor
    features: Tensor


class Classifier(nn.Module):
    """Scores of a backbone's features, alone or beside the features."""

    def __init__(self, backbone: nn.Module, head: nn.Module, *, return_features: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.return_features = backbone, head, return_features

    def forward(self, images: Tensor) -> Tensor | Scored:
        features = self.backbone(images)
        scores = self.head(features)
        return Scored(scores, features) if self.return_features else scores


def class_model(*, random: bool = False, features: bool = True) -> Classifier:
    """With dropout and BatchNorm, or without."""
    backbone = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6) if random else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2 if random else 0.0),
    )
    return Classifier(backbone, LinearHead(54, 4), return_features=features)


def scored_cross_entropy(output: Scored, target: Tensor, weight: Tensor | None) -> Tensor:
    assert isinstance(output, Scored)
    return cross_entropy(output.scores, target, weight)


class WithCenters(nn.Module):
    """Cross-entropy and center loss, whose centers are trained with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.center = CenterLoss(54, 4, strength=0.1)
        self._calls, self._stop_at = 0, 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"center": self.center}  # where it stops decides no numbers

    def forward(self, output: Scored, target: Tensor, weight: Tensor | None) -> Tensor:
        self._calls += 1
        if self._calls == self._stop_at:
            press_ctrl_c()
        own = self.center(output.features, target, weight)
        return scored_cross_entropy(output, target, weight) + own


def class_metrics(data: ImageSet) -> ClassificationMetrics:
    return ClassificationMetrics(LabelDensity.count(data.labels, CLASSES))


def classify(folder: Path, runtime: Runtime | None = None, *, second_stage: bool = False, **changes: Any) -> Any:
    """A whole method, balanced sampling and deferred weights, on 67 grey images; returns (model, history)."""
    runtime = runtime or one_process()
    data = class_set()
    with runtime.seeded("init"):
        model = class_model(random=second_stage)
    if second_stage:
        stage_two(model, "crt")
    arguments: dict[str, Any] = {
        "metrics": class_metrics(data),
        "loss": scored_cross_entropy,
        "weights": LDS(CLASSES, kernel=None).fit(data.labels),
        "weights_from": 1,
        "sampler": BinSampler(data.labels, CLASSES, q=0.5, num_samples=40, seed=7),
        "runtime": runtime,
        "folder": folder,
        "augmentation": False,
        "optimization": Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.01),
    }
    return model, fit(model, data, class_set(31, seed=1), **{**arguments, **changes})


def binned_model(*, random: bool = True, with_fds: bool = False, **changes: Any) -> LongTailModel:
    """Over the bins of a year."""
    fds = FDS(BINS, num_features=8, momentum=0.5) if with_fds else None
    density = LabelDensity.count(image_set().labels, BINS)
    return LongTailModel(tiny_model(random=random).backbone, 8, BINS, density=density, fds=fds, **changes)


def train_binned(
    folder: Path, runtime: Runtime | None = None, *, random: bool = True, stop_at: int = 0, **changes: Any
) -> Any:
    """A whole method, soft bins, weights of the loss, an offset in each bin and FDS; returns (model, history)."""
    runtime = runtime or one_process()
    with runtime.seeded("init"):
        model = binned_model(random=random, with_fds=True, residual=True, weights=LDS(BINS).fit(image_set().labels))
    calls = [0]

    def criterion(output: LongTailOutput, *arguments: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == stop_at:
            press_ctrl_c()
        return model.criterion(output, *arguments)

    arguments: dict[str, Any] = {
        "metrics": metrics_of(image_set()),
        "loss": criterion if stop_at else model.criterion,
        "fingerprint": {"loss": "criterion"},
        "fds": model.fds,
        "runtime": runtime,
        "folder": folder,
        "augmentation": random,
        "optimization": Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.01),
    }
    return model, fit(model, image_set(), image_set(31, seed=1), **{**arguments, **changes})


def at_call(number: int, act: Callable[[], object]) -> Callable[..., Tensor]:
    """The loss, which acts when it is called for the n-th time."""
    calls = [0]

    def weighted_l1_and_more(*arguments: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == number:
            act()
        return weighted_l1(*arguments)

    return weighted_l1_and_more


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def never() -> None:
    raise AssertionError("a finished run must not train")


def same(a: Any, b: Any) -> bool:
    """Nested states with equal bits; NaN equals NaN."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a if name != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def same_runs(one: Path, two: Path) -> bool:
    return all(
        same(load_checkpoint(one / name), load_checkpoint(two / name))
        for name in ("checkpoint-last.pt", "checkpoint-best.pt")
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def test_the_helper_that_compares_sees_a_difference(whole_run: Path) -> None:
    state = load_checkpoint(whole_run / "checkpoint-last.pt")
    other = load_checkpoint(whole_run / "checkpoint-last.pt")
    assert same(state, other)
    other["model"]["head.bias"] += 1e-6
    assert not same(state, other)


def test_killed_in_mid_epoch_and_resumed_in_a_new_process_gives_equal_bits(tmp_path: Path, whole_run: Path) -> None:
    killed = Forked(__file__, "train_to_step_eight", tmp_path)
    assert (killed.finish(), killed.code) == ([], 9)
    state = load_checkpoint(tmp_path / "checkpoint-last.pt")
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 2)
    resumed = Forked(__file__, "go_on", tmp_path)
    assert (resumed.finish(), resumed.code) == ([], 0)
    assert same_runs(tmp_path, whole_run)


@pytest.mark.parametrize("step", [1, STEPS, 2 * STEPS + 3, EPOCHS * STEPS])
def test_ctrl_c_saves_and_tells_how_to_go_on(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss=at_call(step, press_ctrl_c))
    assert signal.getsignal(signal.SIGINT) is before
    assert "--resume" in capsys.readouterr().out
    _, _, history = train(tmp_path, resume=True)
    assert same_runs(tmp_path, whole_run)
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["val_bmae"]) == history[-1]["val_bmae"]
    assert history[0]["seconds"] < history[1]["seconds"] < history[2]["seconds"]


def test_a_second_ctrl_c_would_kill(tmp_path: Path) -> None:
    handlers = []

    def look() -> None:
        press_ctrl_c()
        handlers.append(signal.getsignal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss=at_call(1, look))
    assert handlers == [signal.SIG_DFL]


@pytest.mark.parametrize("times", [1, 3])
def test_sigterm_saves_as_ctrl_c_does_however_often_it_comes(tmp_path: Path, whole_run: Path, times: int) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss=at_call(8, terminate))
    assert signal.getsignal(signal.SIGTERM) is before
    train(tmp_path, resume=True)
    assert same_runs(tmp_path, whole_run)


def test_a_handler_of_ones_own_for_sigterm_stays(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        train(tmp_path, loss=at_call(1, lambda: signal.raise_signal(signal.SIGTERM)), optimization=ONE_EPOCH)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


@pytest.mark.parametrize("what", ["getsignal", "signal"])
def test_handlers_that_python_did_not_set_are_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As where a host program set its own before it started Python."""
    monkeypatch.setattr(signal, what, lambda *_: None)
    _, _, history = train(tmp_path, optimization=ONE_EPOCH)
    assert len(history) == 1


def test_a_second_training_in_another_thread_is_refused_and_spares_the_first(tmp_path: Path, whole_run: Path) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        try:
            train(tmp_path / "second")
        except BaseException as error:
            refused.append(error)

    def start() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    train(tmp_path / "first", loss=at_call(3, start))
    assert same_runs(tmp_path / "first", whole_run)
    (error,) = refused
    assert isinstance(error, UsageError)
    assert "one thread of a process may train at a time" in str(error)
    assert not (tmp_path / "second").exists()
    second()  # free again
    assert len(refused) == 1
    assert same_runs(tmp_path / "second", whole_run)


def test_the_best_weights_are_loaded_at_the_end(tmp_path: Path) -> None:
    model, _, history = train(tmp_path)
    best = load_checkpoint(tmp_path / "checkpoint-best.pt")
    assert same(dict(model.state_dict()), dict(best["model"]))
    assert best["val_bmae"] == min(row["val_bmae"] for row in history)
    assert history[best["epoch"] - 1]["val_bmae"] == best["val_bmae"]


def test_history_tells_loss_rate_and_errors_by_region(tmp_path: Path) -> None:
    optimization = Optimization(epochs=1, batch_size=BATCH)
    model, _, history = train(tmp_path, optimization=optimization, with_fds=False, weights=None)
    val = image_set(31, seed=1)
    with torch.no_grad():
        pred = model.eval()(to_float(torch.from_numpy(val.images)))
    density = LabelDensity.count(image_set().labels, BINS)
    expected = regression_metrics(pred, torch.from_numpy(val.labels), density)
    (row,) = history
    assert row["val_mae"] == pytest.approx(float(expected.mae.sel(region="all")), rel=1e-6)
    assert row["val_mae_few"] == pytest.approx(float(expected.mae.sel(region="few")), rel=1e-6)
    assert row["val_bmae"] == pytest.approx(float(expected.bmae.sel(region="all")), rel=1e-6)
    assert row["step"] == STEPS
    assert 0 < row["loss"] < 20
    assert list(tmp_path.glob("events*"))


def test_an_existing_run_is_refused(whole_run: Path) -> None:
    with pytest.raises(RunExistsError, match=r"--resume .*another folder") as error:
        train(whole_run)
    assert str(whole_run) in str(error.value)


def test_a_finished_run_returns_its_history_untrained(whole_run: Path) -> None:
    model, _, history = train(whole_run, resume=True, loss=at_call(1, never))
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert same(dict(model.state_dict()), dict(load_checkpoint(whole_run / "checkpoint-best.pt")["model"]))


def test_resuming_nothing_starts_afresh(tmp_path: Path, whole_run: Path) -> None:
    train(tmp_path / "new", resume=True)
    assert same_runs(tmp_path / "new", whole_run)


def test_another_run_is_not_resumed(whole_run: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        train(
            whole_run,
            one_process(seed=4),
            resume=True,
            fingerprint={"loss": "weighted_l1", "data": "faces"},
            optimization=Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.02, clip_norm=5.0),
        )
    for part in ("optimization.lr was 0.01 and is 0.02", "seed was 3 and is 4", "data was 'absent' and is 'faces'"):
        assert part in str(error.value)


def test_another_model_is_not_resumed(whole_run: Path) -> None:
    with pytest.raises(SettingsError, match="fds must be attached"):
        train(whole_run / "other", fds=FDS(BINS, num_features=8, momentum=0.5))
    with pytest.raises(CheckpointError, match=r"model\.backbone\.1 was 'BatchNorm2d' and is 'Identity'; "):
        train(whole_run, random=False, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint-last.pt"
    kept = []

    def nan_in_epoch_two(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        loss = weighted_l1(pred, target, weight)
        if not last.exists():
            return loss
        kept.append(last.read_bytes())
        return loss * (float("nan") if len(kept) == 3 else 1)

    with pytest.raises(NonFiniteLossError) as error:
        train(tmp_path, loss=nan_in_epoch_two)
    assert last.read_bytes() == kept[0]
    for part in ("got nan", "gradient norm of nan", "step 8 of 15", "learning rate", "the end of epoch 1", str(last)):
        assert part in str(error.value)


def test_a_diverging_run_stops_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="no checkpoint yet"):
        train(
            tmp_path,
            with_fds=False,
            optimization=Optimization(epochs=1, batch_size=BATCH, lr=1e38, optimizer="sgd", warmup=0.0),
        )


def test_bf16_trains(tmp_path: Path) -> None:
    model, fds, history = train(tmp_path, one_process(precision="bf16"))
    assert all(np.isfinite(row["loss"]) for row in history)
    assert all(value.dtype != torch.bfloat16 for value in [*model.state_dict().values(), fds.running_mean])


def test_mixed_batches_train_and_are_the_same_again(tmp_path: Path) -> None:
    histories = []
    for name, bandwidth in (("one", 2.0), ("again", 2.0), ("none", None)):
        mixing = None if bandwidth is None else partial(c_mixup, bandwidth=bandwidth)
        histories.append(train(tmp_path / name, mixing=mixing, optimization=ONE_EPOCH)[2])
    losses = [history[-1]["loss"] for history in histories]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(CheckpointError, match="mixing"):
        train(tmp_path / "one", mixing=partial(c_mixup, bandwidth=3.0), optimization=ONE_EPOCH, resume=True)
    with pytest.raises(TypeError, match="mixing must be a Callable, got float"):
        train(tmp_path / "two", mixing=2.0, optimization=ONE_EPOCH)


def test_sharpness_aware_steps_are_the_same_again_and_leave_fds_out(tmp_path: Path) -> None:
    histories = []
    for name, sharpness in (("one", 0.1), ("again", 0.1), ("none", None)):
        optimization = Optimization(epochs=1, batch_size=BATCH, sharpness=sharpness)
        histories.append(train(tmp_path / name, with_fds=False, optimization=optimization)[2])
    losses = [history[-1]["loss"] for history in histories]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(SettingsError, match="fds must be left out with sharpness"):
        train(tmp_path / "fds", optimization=Optimization(epochs=1, batch_size=BATCH, sharpness=0.1))


def test_sgd_with_steps_and_an_augmentation_of_ones_own(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []

    def darken(images: Tensor, *, generator: torch.Generator) -> Tensor:
        seen.append(len(images))
        return images // 2

    optimization = Optimization(
        epochs=1, batch_size=33, lr=0.01, optimizer="sgd", schedule="steps", milestones=(0.5,), warmup=0.0
    )
    _, _, history = train(tmp_path, augmentation=darken, optimization=optimization)
    assert seen == [33, 33]  # and one sample left out, for BatchNorm cannot use it
    assert history[0]["lr"] == pytest.approx(0.001)


def test_all_that_cannot_be_trained_is_told_at_once(tmp_path: Path) -> None:
    model = tiny_model()
    model.fds = FDS(BINS, num_features=8)
    with pytest.raises(SettingsError) as error:
        train(tmp_path, model=model, val=image_set(0), fds=model.fds, optimization=Optimization(batch_size=1))
    for part in ("two images per rank", "val must hold at least one", "not be a submodule of the model"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": "l1"}, TypeError, "loss must be a Callable, got str"),
        ({"weights": 1}, TypeError, "weights must be an LDS, got int"),
        ({"fds": 1}, TypeError, "fds must be an FDS, got int"),
        ({"augmentation": "flip"}, TypeError, "augmentation must be a bool or a Callable, got str"),
        ({"optimization": None}, TypeError, "optimization must be an Optimization, got NoneType"),
        ({"fingerprint": "abc"}, TypeError, "fingerprint must be a Mapping, got str"),
        ({"runtime": "cpu"}, TypeError, "runtime must be a Runtime, got str"),
        (
            {"fingerprint": {"size": np.float64(1)}},
            CheckpointError,
            r"fingerprint\['size'\] must be a tensor or a plain",
        ),
        ({"metrics": "mae"}, TypeError, "metrics must be a RegressionMetrics or .*, got str"),
        ({"sampler": 1}, TypeError, "sampler must be a BinSampler, got int"),
        ({"weights_from": -1}, ValueError, "weights_from must be at least 0, got -1"),
        (
            {"metrics": RegressionMetrics(LabelDensity.count([0], Bins.uniform(0, 1, width=1)))},
            LabelError,
            r"val.labels must lie on the label axis \[0, 1\]",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(
            tmp_path / "run",
            model=tiny_model(),
            **{"loss": at_call(1, never), "optimization": Optimization(batch_size=BATCH), **changes},
        )
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_gradient_is_refused_in_words(tmp_path: Path) -> None:
    def detached(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return weighted_l1(output.detach(), target, weight)

    def by_sample(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return weighted_l1(output, target, weight, reduction="none")

    def number(output: Tensor, target: Tensor, weight: Tensor) -> float:
        return 1.0

    for loss, error, says in (
        (detached, UsageError, "loss must depend on what is trained, got one without a gradient"),
        (by_sample, ShapeError, r"loss must return one number, got shape \(15,\)\. Return the mean"),
        (number, TypeError, "loss must return a tensor, got float"),
    ):
        with pytest.raises(error, match=rf"^fit: {says}"):
            train(tmp_path / loss.__name__, loss=loss)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(UsageError, match=r"^fit: gradients must be on, got torch\.no_grad"):
            train(tmp_path / "off")
    for name, model, says in (
        ("frozen", tiny_model().requires_grad_(False), "model must have parameters that are trained, got none"),
        ("lazy", nn.Sequential(nn.Flatten(), nn.LazyLinear(1)), "model must have weights, got lazy layers"),
    ):
        with pytest.raises(SettingsError, match=says):
            train(tmp_path / name, model=model, optimization=ONE_EPOCH)
        assert not (tmp_path / name).exists()


def test_another_default_device_changes_nothing(tmp_path: Path) -> None:
    """Meta stands for an accelerator; AdamW itself makes tensors there."""
    budget = Optimization(epochs=1, batch_size=BATCH, lr=0.01, optimizer="sgd", momentum=0.0)

    def run(folder: Path, device: str) -> None:
        data, model = image_set(), Regressor(nn.Sequential(nn.Flatten(), nn.Linear(768, 8)), 8)
        arguments: dict[str, Any] = {"metrics": metrics_of(data), "weights": LDS(BINS).fit(data.labels)}
        with torch.device(device), start_runtime("cpu", seed=3) as runtime:
            with runtime.seeded("init"):
                for parameter in model.parameters():
                    nn.init.normal_(parameter, std=0.01)
            fit(model, data, image_set(31, 1), runtime=runtime, folder=folder, optimization=budget, **arguments)
            predict(model, data, runtime=runtime)

    run(tmp_path / "meta", "meta")
    run(tmp_path / "cpu", "cpu")
    assert same_runs(tmp_path / "meta", tmp_path / "cpu")


def test_a_best_epoch_among_the_first_is_told_once(tmp_path: Path) -> None:
    class Worse(nn.Module):
        """Whose predictions run away."""

        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            return 1e3 * self.by.square() * images.new_ones(len(images))

    def away(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return -(output + model.by).mean()

    def run(epochs: int, folder: Path) -> None:
        budget = Optimization(epochs=epochs, batch_size=BATCH, lr=0.01)
        train(folder, model=model, val=image_set(), loss=away, optimization=budget, fingerprint={"loss": "away"})

    model = Worse()
    with pytest.warns(UserWarning, match=r"val_bmae was least at epoch [12] of 8, .* Lower the learning rate") as said:
        run(8, tmp_path / "eight")
    assert len(said) == 1
    model = Worse()
    run(3, tmp_path / "three")


def test_an_error_that_is_never_finite_selects_no_epoch_and_says_so(tmp_path: Path) -> None:
    class OfFew(RegressionMetrics):
        selects = "mae/few"

    counts, val = np.where(np.arange(len(BINS)) < 1, 5, 1000), image_set(31, seed=1)
    val = ImageSet(val.images, val.labels.clip(1.5), val.rows)  # and none of few is left
    with pytest.warns(
        UserWarning, match="val_mae_few was finite after no epoch, and the weights are those of the last"
    ):
        _, _, history = train(tmp_path, val=val, metrics=OfFew(LabelDensity(BINS, counts)), optimization=ONE_EPOCH)
    assert np.isnan(history[-1]["val_mae_few"])
    with pytest.raises(ValueError, match=r"fit: metrics\.selects must be .*mae/all.*, got 'mae/few'"):
        train(tmp_path / "none", metrics=OfFew(LabelDensity(BINS, np.full(len(BINS), 1000))))
    assert not (tmp_path / "none").exists()


def test_only_image_sets_are_taken(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evaluate: data must be a SampleSet, got NoneType"):
        evaluate(tiny_model(), None, metrics=metrics_of(image_set()), runtime=one_process())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fit: val must be a SampleSet, got list\. Use MappedSet\(dataset\)"):
        train(tmp_path, model=tiny_model(), val=[], optimization=Optimization())  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_rank_without_images_to_evaluate_waits_for_the_others(rank: int) -> None:
    data = image_set(2)
    runtime = Runtime(torch.device("cpu"), rank=rank, world=4)
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, images: None if len(images[0]) else never())
    metrics = evaluate(model, data, metrics=metrics_of(data), runtime=runtime)
    assert int(metrics.compute()["count"].sel(region="all")) == (rank == 1)


def test_fit_leaves_global_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(tmp_path, optimization=Optimization(epochs=1, batch_size=BATCH))
    assert torch.equal(torch.rand(1), expected)


def test_evaluate_restores_every_mode() -> None:
    model = tiny_model()
    model.train()
    model.head.eval()
    data = image_set(31)
    metrics = evaluate(model, data, metrics=metrics_of(data), runtime=one_process(), batch_size=8)
    assert model.training
    assert model.backbone.training
    assert not model.head.training
    assert int(metrics.compute()["count"].sel(region="all")) == 31


def test_classes_are_learnt_from_grey_images_and_history_tells_their_errors(tmp_path: Path) -> None:
    budget = Optimization(epochs=6, batch_size=BATCH, lr=0.03)
    model, history = classify(tmp_path, optimization=budget)
    best = load_checkpoint(tmp_path / "checkpoint-best.pt")
    assert best["val_balanced_error"] == min(row["val_balanced_error"] for row in history)
    val = class_set(31, seed=1)
    with torch.no_grad():
        scores = model.eval()(to_float(torch.from_numpy(val.images))).scores
    density = LabelDensity.count(class_set().labels, CLASSES)
    expected = classification_metrics(scores, torch.from_numpy(val.labels), density)
    row = history[best["epoch"] - 1]
    assert row["val_error"] == pytest.approx(expected.error.sel(region="all").item())
    assert [name for name in row if name.startswith("val_")] == [
        *(f"val_balanced_error{region}" for region in ("", "_medium", "_few")),  # no class has 100 images
        "val_error",
    ]
    for region in ("all", "medium", "few"):
        name = "val_balanced_error" if region == "all" else f"val_balanced_error_{region}"
        assert row[name] == pytest.approx(expected.balanced_error.sel(region=region).item(), nan_ok=True)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["val_balanced_error"] < 0.5
    with (tmp_path / "history.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["val_balanced_error"]) == history[-1]["val_balanced_error"]


@pytest.mark.parametrize(("num_samples", "used"), [(40, 40), (31, 30), (100, 100)])
def test_an_epoch_holds_what_the_sampler_says(tmp_path: Path, num_samples: int, used: int) -> None:
    seen: list[int] = []

    def look(images: Tensor, *, generator: torch.Generator) -> Tensor:
        seen.extend(images[:, 0, 0, 0].tolist())
        return images

    sampler = BinSampler(class_set().labels, CLASSES, num_samples=num_samples, seed=2)
    _, history = classify(tmp_path, sampler=sampler, augmentation=look)
    # The last batch of one image is left out, as BatchNorm could not use it.
    assert seen == [i for epoch in range(EPOCHS) for i in sampler.order(epoch)[:used].tolist()]
    steps = (used + BATCH - 1) // BATCH
    assert [row["step"] for row in history] == [steps, 2 * steps, 3 * steps]


def test_a_run_is_resumed_with_its_own_sampler_only(tmp_path: Path) -> None:
    labels = class_set().labels
    budget = Optimization(epochs=1, batch_size=BATCH)
    classify(tmp_path, optimization=budget)
    for other in (BinSampler(labels, CLASSES, q=0.5, num_samples=40, seed=8), None):
        with pytest.raises(CheckpointError, match=r"sampler(\.seed was 7 and is 8| was .* and is None)"):
            classify(tmp_path, optimization=budget, resume=True, sampler=other)
    with pytest.raises(CheckpointError, match="weights_from was 1 and is 2"):
        classify(tmp_path, optimization=budget, resume=True, weights_from=2)
    _, history = classify(tmp_path, optimization=budget, resume=True)
    assert len(history) == 1


def test_each_rank_may_resume_with_its_own_rank_of_the_sampler(tmp_path: Path) -> None:
    def of_rank(rank: int) -> BinSampler:
        return BinSampler(class_set().labels, CLASSES, num_samples=40, rank=rank, world=2)

    budget = Optimization(epochs=1, batch_size=BATCH)
    classify(tmp_path, optimization=budget, sampler=of_rank(0))
    # Rank 0 writes the checkpoint that rank 1 reads; order(epoch) is the same on both.
    _, history = classify(tmp_path, optimization=budget, sampler=of_rank(1), resume=True)
    assert len(history) == 1


def test_a_sampler_that_fills_no_batch_is_refused(tmp_path: Path) -> None:
    sampler = BinSampler(class_set().labels, CLASSES, num_samples=1)
    with pytest.raises(SettingsError, match="two images per rank"):
        classify(tmp_path / "run", sampler=sampler)


@pytest.mark.parametrize("weights_from", [0, 2, EPOCHS])
def test_weights_count_from_their_epoch_on(tmp_path: Path, weights_from: int) -> None:
    weights = LDS(CLASSES, kernel=None).fit(class_set().labels)
    steps = 0

    def loss(output: Scored, target: Tensor, weight: Tensor | None) -> Tensor:
        nonlocal steps
        epoch = steps // 3  # of forty samples
        steps += 1
        if epoch < weights_from:
            assert weight is None
        else:
            assert weight is not None
            assert torch.equal(weight, weights(target))
        return cross_entropy(output.scores, target, weight)

    classify(tmp_path, loss=loss, weights=weights, weights_from=weights_from)
    assert steps == 3 * EPOCHS


def test_parameters_of_a_loss_are_trained_and_resumed_to_the_bit(tmp_path: Path) -> None:
    loss, stopped, resumed = WithCenters(), WithCenters(), WithCenters()
    model, history = classify(tmp_path / "whole", loss=loss)
    assert (loss.center.centers.abs().sum(1) > 0).all()
    stopped._stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        classify(tmp_path / "stopped", loss=stopped)
    assert not torch.equal(stopped.center.centers, loss.center.centers)
    other, again = classify(tmp_path / "stopped", loss=resumed, resume=True)
    assert resumed._calls == 3 * EPOCHS - 5
    assert same_runs(tmp_path / "whole", tmp_path / "stopped")
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(dict(loss.state_dict()), dict(resumed.state_dict()))
    assert same(dict(load_checkpoint(tmp_path / "whole" / "checkpoint-last.pt")["loss"]), dict(loss.state_dict()))
    assert same(history, again)
    finished = WithCenters()
    classify(tmp_path / "whole", loss=finished, resume=True)
    assert finished._calls == 0
    assert same(dict(finished.state_dict()), dict(loss.state_dict()))
    with pytest.raises(CheckpointError, match=r"loss was {'is': '\S*WithCenters'.* and is '\S*scored_cross_entropy'"):
        classify(tmp_path / "whole", resume=True)


def test_gradients_the_model_came_with_do_not_count(tmp_path: Path, whole_run: Path) -> None:
    fresh = tiny_model

    def used(**settings: Any) -> Regressor:
        model = fresh(**settings)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "tiny_model", used)
        train(tmp_path)
    assert same_runs(tmp_path, whole_run)


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_predict_returns_a_row_an_image_in_order(batch_size: int) -> None:
    data = class_set(31)
    model = class_model(random=True)
    model.head.eval()
    images = to_float(torch.from_numpy(data.images))
    with torch.no_grad():
        expected = model.eval()(images)
    model.train()
    model.head.eval()
    result = predict(model, data, runtime=one_process(), batch_size=batch_size)
    assert type(result) is Scored
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert not result.scores.requires_grad
    assert [model.training, model.backbone.training, model.head.training] == [True, True, False]
    model.return_features = False
    scores = predict(model, data, runtime=one_process(), batch_size=batch_size)
    torch.testing.assert_close(scores, expected.scores, rtol=1e-5, atol=1e-6)
    pred = predict(tiny_model(), image_set(5), runtime=one_process(), batch_size=batch_size)
    assert pred.shape == (5,)


def test_predict_needs_an_image_a_rank() -> None:
    for rank in range(2):
        runtime = Runtime(torch.device("cpu"), rank=rank, world=2)
        with pytest.raises(ValueError, match=r"^predict: data must hold at least one image per rank, 2, got 1\."):
            predict(class_model(), class_set(1), runtime=runtime)
    with pytest.raises(ValueError, match="at least one image per rank, 1, got 0"):
        predict(class_model(), class_set(0), runtime=one_process())
    with pytest.raises(TypeError, match=r"^predict: data must be a SampleSet, got list"):
        predict(class_model(), [], runtime=one_process())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^predict: runtime must be a Runtime, got NoneType"):
        predict(class_model(), class_set(1), runtime=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^predict: model must be a Module, got NoneType"):
        predict(None, class_set(1), runtime=one_process())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^predict: batch_size must be at least 1, got 0"):
        predict(class_model(), class_set(1), runtime=one_process(), batch_size=0)


def test_evaluate_takes_scores_from_what_has_them_and_leaves_the_metrics_alone() -> None:
    data = class_set(31)
    model, metrics = class_model(), class_metrics(data)
    result = evaluate(model, data, metrics=metrics, runtime=one_process(), batch_size=8)
    assert int(metrics.confusion.sum()) == 0
    model.return_features = False
    plain = evaluate(model, data, metrics=metrics, runtime=one_process())
    assert torch.equal(result.confusion, plain.confusion)
    assert int(result.confusion.sum()) == 31


@pytest.mark.parametrize("head", ["regression", "gaussian", "linear"])
def test_evaluate_takes_the_prediction_of_what_has_one(head: Any) -> None:
    data = image_set(31)
    model = binned_model(head=head)
    with torch.no_grad():
        out = model.eval()(to_float(torch.from_numpy(data.images)))
    result = evaluate(model, data, metrics=metrics_of(data), runtime=one_process(), batch_size=8)
    expected = metrics_of(data)
    expected.update(out.prediction, torch.from_numpy(data.labels))
    for name in ("mae", "bmae"):
        own, wanted = (float(m.compute()[name].sel(region="all")) for m in (result, expected))
        assert own == pytest.approx(wanted, rel=1e-5)


def test_evaluate_takes_the_scores_of_what_has_them_for_classes() -> None:
    data = class_set(31)
    model = LongTailModel(class_model().backbone, 54, CLASSES)
    result = evaluate(model, data, metrics=class_metrics(data), runtime=one_process(), batch_size=8)
    expected = class_metrics(data)
    with torch.no_grad():
        expected.update(model.eval()(to_float(torch.from_numpy(data.images))).scores, torch.from_numpy(data.labels))
    assert torch.equal(result.confusion, expected.confusion)


@pytest.mark.parametrize("batch_size", [8, 512])
@pytest.mark.parametrize("options", [{"head": "regression"}, {"head": "gaussian"}, {}, {"residual": True}], ids=str)
def test_predict_keeps_the_fields_and_leaves_out_what_the_model_does(options: Any, batch_size: int) -> None:
    data = image_set(31)
    model = binned_model(**options)
    with torch.no_grad():
        expected = model.eval()(to_float(torch.from_numpy(data.images)))
    result = predict(model.train(), data, runtime=one_process(), batch_size=batch_size)
    assert type(result) is LongTailOutput
    assert model.training
    for name in result._fields:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-5, atol=1e-5, equal_nan=name == "loss"
        )
    assert result.loss.isnan()
    assert (result.distribution.shape[1] == 0) == ("head" in options)
    assert (result.residual.shape[1] == 0) == ("residual" not in options)


def test_predict_returns_none_and_plain_tuples_as_the_model_does() -> None:
    class Two(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return images[:, 0, 0, 0], None

    pixels, nothing = predict(Two(), image_set(5), runtime=one_process(), batch_size=2)
    torch.testing.assert_close(pixels, to_float(torch.from_numpy(image_set(5).images))[:, 0, 0, 0])
    assert nothing is None


def test_a_binned_model_learns_and_resumes_to_the_bit(tmp_path: Path) -> None:
    model, history = train_binned(tmp_path / "whole")
    assert history[-1]["loss"] < history[0]["loss"]
    assert model.fds.epoch > 0
    with pytest.raises(KeyboardInterrupt):
        train_binned(tmp_path / "stopped", stop_at=8)
    other, again = train_binned(tmp_path / "stopped", resume=True)
    assert same(history, again)
    assert same_runs(tmp_path / "whole", tmp_path / "stopped")
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(dict(model.fds.state_dict()), dict(other.fds.state_dict()))
    # A finished run gives the best epoch's network, with the statistics it then had.
    third, finished = train_binned(tmp_path / "whole", resume=True, stop_at=1)
    assert same(history, finished)
    assert same(dict(model.state_dict()), dict(third.state_dict()))


def test_a_binned_model_with_another_loss_is_not_resumed(tmp_path: Path) -> None:
    train_binned(tmp_path, fingerprint={})
    other = binned_model(random=True, sigma=0.25)
    with pytest.raises(CheckpointError, match=r"loss was 'LongTailModel\.criterion' and is {'is': 'criterion', 'of'"):
        train_binned(tmp_path, resume=True, loss=other.criterion, fingerprint={})


@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_modes_are_restored_after_an_error(use: str) -> None:
    data = class_set(31)
    model = class_model(random=True)
    model.head.eval()

    def fail(module: nn.Module, inputs: Any, output: Scored) -> Scored:
        if use == "predict":
            raise ValueError("broken")
        return Scored(output.scores * float("nan"), output.features)

    model.register_forward_hook(fail)
    call: Any = predict if use == "predict" else partial(evaluate, metrics=class_metrics(data))
    with pytest.raises(ValueError, match="broken" if use == "predict" else r"nan at index \[0, 0\]"):
        call(model, data, runtime=one_process())
    assert [model.training, model.backbone.training, model.head.training] == [True, True, False]
    assert torch.is_grad_enabled()


def test_two_ranks_with_uneven_shares_step_as_one_process_and_resume_to_the_bit(
    two_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    one, _, history = train(tmp_path / "one", random=False)
    states = two_ranks(run_rank, timeout=120)
    assert same(states[0]["model"], states[1]["model"])
    for name, value in one.state_dict().items():
        torch.testing.assert_close(states[0]["model"][name], value, rtol=1e-4, atol=1e-5)
    for row, expected in zip(states[0]["history"], history, strict=True):
        for name in ("loss", "lr", "val_mae", "val_bmae", "val_mae_few"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    assert same_runs(tmp_path / "two", tmp_path / "two-stopped")
    plain, spread = (gradients(tmp_path / f"one-{factor}", one_process(), spread=factor) for factor in (0.0, 3.0))
    assert len(plain) == STEPS
    assert all(gradient.any() for step in plain for gradient in step)
    assert not torch.allclose(plain[0][2], spread[0][2])
    for state in states:
        torch.testing.assert_close(state["gradients"], plain, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(state["spread"], spread, rtol=1e-11, atol=1e-13)
    with pytest.raises(CheckpointError, match=r"number of processes was 2 and is 1\. .* as many processes"):
        train(tmp_path / "two", random=False, resume=True)
    binned, history = train_binned(tmp_path / "one-binned", random=False)
    expected = predict(binned, image_set(31, seed=1), runtime=one_process())
    for state in states:
        for row, wanted in zip(state["binned"]["history"], history, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            assert row["val_bmae"] == pytest.approx(wanted["val_bmae"], rel=1e-4)
        torch.testing.assert_close(state["binned"]["predicted"][1:], tuple(expected)[1:], rtol=1e-3, atol=1e-4)
    assert same(states[0]["binned"]["predicted"], states[1]["binned"]["predicted"])
    for kind, second_stage in (("classes", False), ("second", True)):
        model, history = classify(tmp_path / f"one-{kind}", second_stage=second_stage)
        expected = predict(model, class_set(31, seed=1), runtime=one_process())
        for state in states:
            for name, value in model.state_dict().items():
                torch.testing.assert_close(state[kind]["model"][name], value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state[kind]["predicted"], tuple(expected), rtol=1e-4, atol=1e-5)
            for row, wanted in zip(state[kind]["history"], history, strict=True):
                assert list(row) == list(wanted)
                for name in row.keys() - {"seconds"}:
                    assert row[name] == pytest.approx(wanted[name], rel=1e-4, nan_ok=True)
        assert same(states[0][kind]["predicted"], states[1][kind]["predicted"])


def test_a_loss_of_pairs_is_taken_as_it_is(tmp_path: Path) -> None:
    """A loss of the batch as a whole, which no sum over samples gives."""
    values: list[float] = []

    def ranking(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is None
        i, j = torch.triu_indices(len(target), len(target), 1)
        loss = ((output[i] - output[j]) - (target[i] - target[j])).abs().mean()
        values.append(loss.item())
        return loss

    seen: list[Tensor] = []
    model, data = tiny_model(random=False), image_set(15)
    first = copy.deepcopy(model)
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(model.head.weight.grad.clone()))
    budget = Optimization(epochs=4, batch_size=BATCH, lr=0.03)
    history = train(tmp_path, model=model, data=data, val=data, loss=ranking, optimization=budget, augmentation=False)[
        2
    ]
    handle.remove()
    ranking(first(to_float(torch.from_numpy(data.images))), torch.from_numpy(data.labels), None).backward()
    torch.testing.assert_close(seen[0], first.head.weight.grad, rtol=1e-4, atol=1e-6)
    assert [row["loss"] for row in history] == pytest.approx(values[:-1], rel=1e-6)
    assert history[-1]["loss"] < history[0]["loss"]


class InDoubles(Regressor):
    """Linear and without chance, so that ranks differ from one process by rounding alone."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Tanh()), 8)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return 5 + 5 * self.head(self.backbone(images.double())).squeeze(1)


def gradients(folder: Path, runtime: Runtime, *, spread: float = 0.0) -> list[list[Tensor]]:
    """Of each parameter in each step of an epoch: weighted samples, the last batch of seven, an odd number.

    Args:
        spread: factor of a term that is made of the model as a whole, whatever samples there are.
    """
    seen: list[list[Tensor]] = []
    with runtime.seeded("init"):
        model = InDoubles()

    def loss(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return weighted_l1(output, target, weight) + spread * model.head.weight.var()

    def note(*_: Any) -> None:
        seen.append([parameter.grad.clone() for parameter in model.parameters()])

    handle = register_optimizer_step_pre_hook(note)
    budget, weights = Optimization(epochs=1, batch_size=BATCH, lr=0.01), LDS(BINS).fit(image_set().labels)
    fingerprint = {"loss": f"spread {spread}"}
    arguments: dict[str, Any] = {"optimization": budget, "weights": weights, "fingerprint": fingerprint}
    train(folder, runtime, model=model, loss=loss if spread else weighted_l1, augmentation=False, **arguments)
    handle.remove()
    return seen


def run_rank(rank: int) -> dict[str, Any]:
    """One of two ranks: a whole run, another that only rank 1 stops and that both resume, and runs of classes."""
    folder = Path.cwd()
    with start_runtime("cpu", seed=3) as runtime:
        assert (runtime.rank, runtime.world) == (rank, 2)
        model, _, history = train(folder / "two", runtime, random=False)
        try:
            train(folder / "two-stopped", runtime, random=False, loss=at_call(8, press_ctrl_c if rank else int))
        except KeyboardInterrupt:
            train(folder / "two-stopped", runtime, random=False, resume=True)
        else:
            raise AssertionError("both ranks must stop")
        result = {"model": model.state_dict(), "history": history}
        result["gradients"] = gradients(folder / "two-gradients", runtime)
        result["spread"] = gradients(folder / "two-spread", runtime, spread=3.0)
        with pytest.raises(CheckpointError, match="number of processes was 1 and is 2"):
            train(folder / "one", runtime, random=False, resume=True)
        model, history = train_binned(folder / "binned", runtime, random=False)
        predicted = predict(model, image_set(31, seed=1), runtime=runtime)
        result["binned"] = {"history": history, "predicted": tuple(predicted)}
        for kind in ("classes", "second"):
            model, history = classify(folder / kind, runtime, second_stage=kind == "second")
            predicted = predict(model, class_set(31, seed=1), runtime=runtime)
            result[kind] = {"model": model.state_dict(), "history": history, "predicted": tuple(predicted)}
    return result


def train_to_step_eight(connection: Any, folder: Path) -> None:
    """What a kill leaves behind."""
    train(folder, loss=at_call(8, lambda: os._exit(9)), checkpoint_minutes=0)


def go_on(connection: Any, folder: Path) -> None:
    train(folder, resume=True)


def partly_missing(folder: Path, val: np.ndarray, weights: LDS | None = None) -> Any:
    """Fit two targets, of which each training sample lacks one."""
    grid = Bins.grid(BINS, BINS)
    y = np.tile(np.array([[3.0, np.nan], [np.nan, 7.0], [2.0, 4.0]], np.float32), (10, 1))
    model = MultiTargetModel.for_labels(nn.Identity(), 3, y, bins=[BINS, BINS], head="regression", missing="drop")
    sets = [MappedSet([(torch.ones(3), label) for label in torch.from_numpy(own)]) for own in (y, val)]
    metrics = RegressionMetrics(LabelDensity.count(y, grid, missing="drop"), missing="drop")
    options: Any = {"loss": model.criterion, "metrics": metrics, "weights": weights, "missing": "drop"}
    return fit(model, *sets, optimization=ONE_EPOCH, runtime=one_process(), folder=folder, **options)


def test_a_validation_set_that_metrics_count_nothing_of_is_refused(tmp_path: Path) -> None:
    lacking = np.array([[3.0, np.nan], [np.nan, 7.0]], np.float32)
    for val in (lacking, np.full_like(lacking, np.nan)):
        with pytest.raises(LabelError, match=r"^fit: val must hold at least one label that metrics count, got none"):
            partly_missing(tmp_path / "refused", val)
    assert not (tmp_path / "refused").exists()
    assert np.isfinite(partly_missing(tmp_path / "run", np.nan_to_num(lacking))[0]["val_bmae"])


def test_weights_over_a_grid_need_all_labels_of_a_sample(tmp_path: Path) -> None:
    grid, val = Bins.grid(BINS, BINS), np.ones((2, 2), np.float32)
    weights = LDS(grid, missing="drop").fit(torch.rand(50, 2) * 20)
    with pytest.raises(LabelError, match=r"^fit: weights over a grid need all labels of a sample or none.*its own wei"):
        partly_missing(tmp_path / "refused", val, weights)
    assert not (tmp_path / "refused").exists()
