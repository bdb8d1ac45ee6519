"""Training; also a program that the tests start: ``python test_loop.py <what> <folder> [rank]``."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dir_toolkit.backbones import ImageRegressor
from dir_toolkit.data.augment import to_float
from dir_toolkit.data.images import ImageSet, content_digest
from dir_toolkit.errors import CheckpointError, LabelError, NonFiniteLossError, RunExistsError, SettingsError
from dir_toolkit.features.fds import FDS
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.weights import LDS
from dir_toolkit.losses.regression import weighted_l1
from dir_toolkit.metrics.regression import RegressionMetrics, regression_metrics
from dir_toolkit.training.checkpoint import load_checkpoint
from dir_toolkit.training.loop import Optimization, evaluate, fit
from dir_toolkit.training.runtime import Runtime, start_runtime

BINS = Bins.uniform(0, 20, width=1)
EPOCHS, BATCH, SAMPLES = 3, 15, 67  # five steps an epoch, the last of seven samples
STEPS = 5


def image_set(samples: int = SAMPLES, seed: int = 0) -> ImageSet:
    random = np.random.default_rng(seed)
    labels = np.minimum(random.exponential(5, samples), 19).astype(np.float32)
    noise = random.integers(0, 60, (samples, 3, 16, 16))
    images = (noise + labels[:, None, None, None] * 9).astype(np.uint8)
    rows = np.arange(samples)
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


def tiny_model(*, random: bool = True) -> ImageRegressor:
    """With dropout and BatchNorm, or without, where ranks are to agree with one process."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8) if random else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2 if random else 0.0),
    )
    backbone.num_features = 8  # type: ignore[assignment]
    return ImageRegressor(backbone, offset=5.0, scale=5.0)


def one_process(seed: int = 3, precision: Any = "float32") -> Runtime:
    return Runtime(torch.device("cpu"), seed=seed, precision=precision)


def metrics_of(data: ImageSet) -> RegressionMetrics:
    return RegressionMetrics(BINS, LabelDensity.count(data.labels, BINS))


def train(
    folder: Path, runtime: Runtime | None = None, *, random: bool = True, with_fds: bool = True, **changes: Any
) -> Any:
    """A whole method, LDS and FDS, on 67 images; returns (model, fds, history)."""
    runtime = runtime or one_process()
    data = image_set()
    with runtime.seeded("init"):
        model = tiny_model(random=random)
    fds = FDS(BINS, num_features=8, momentum=0.5) if with_fds else None
    if fds is not None:
        fds.attach(model.head, "input")
    arguments: dict[str, Any] = {
        "metrics": metrics_of(data),
        "weights": LDS(BINS).fit(data.labels),
        "fds": fds,
        "runtime": runtime,
        "folder": folder,
        "augmentation": random,
        "optimization": Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.01, clip_norm=5.0),
    }
    history = fit(model, data, image_set(31, seed=1), **{**arguments, **changes})
    return model, fds, history


def at_call(number: int, act: Callable[[], object]) -> Callable[..., Tensor]:
    """The loss, which acts when it is called for the n-th time."""
    calls = [0]

    def weighted_l1_and_more(*arguments: Tensor, reduction: str) -> Tensor:
        calls[0] += 1
        if calls[0] == number:
            act()
        return weighted_l1(*arguments, reduction=reduction)  # type: ignore[arg-type]

    weighted_l1_and_more.__name__ = "weighted_l1"
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


def program(what: str, folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", __file__, what, str(folder), *arguments]


def test_the_helper_that_compares_sees_a_difference(whole_run: Path) -> None:
    state = load_checkpoint(whole_run / "checkpoint-last.pt")
    other = load_checkpoint(whole_run / "checkpoint-last.pt")
    assert same(state, other)
    other["model"]["head.bias"] += 1e-6
    assert not same(state, other)


def test_killed_in_mid_epoch_and_resumed_in_a_new_process_gives_equal_bits(tmp_path: Path, whole_run: Path) -> None:
    killed = subprocess.run(program("killed", tmp_path), check=False)
    assert killed.returncode == 9
    state = load_checkpoint(tmp_path / "checkpoint-last.pt")
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 2)
    subprocess.run(program("resumed", tmp_path), check=True)
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
    expected = regression_metrics(pred, torch.from_numpy(val.labels), BINS, density)
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
            fingerprint={"data": "faces"},
            optimization=Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.02, clip_norm=5.0),
        )
    for part in ("optimization.lr was 0.01 and is 0.02", "seed was 3 and is 4", "data was 'absent' and is 'faces'"):
        assert part in str(error.value)


def test_another_model_is_not_resumed(whole_run: Path) -> None:
    data = image_set()
    model = tiny_model(random=False)
    fds = FDS(BINS, num_features=8, momentum=0.5)
    with pytest.raises(SettingsError, match="fds must be attached"):
        train(whole_run / "other", fds=fds)
    fds.attach(model.head, "input")
    with pytest.raises(CheckpointError, match="must fit this model"):
        fit(
            model,
            data,
            image_set(31, seed=1),
            metrics=metrics_of(data),
            weights=LDS(BINS).fit(data.labels),
            fds=fds,
            runtime=one_process(),
            folder=whole_run,
            resume=True,
            optimization=Optimization(epochs=EPOCHS, batch_size=BATCH, lr=0.01, clip_norm=5.0),
        )


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint-last.pt"
    kept = []

    def nan_in_epoch_two(pred: Tensor, target: Tensor, weight: Tensor, *, reduction: str) -> Tensor:
        loss = weighted_l1(pred, target, weight, reduction="sum")
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


def test_sgd_with_steps_and_an_augmentation_of_ones_own(tmp_path: Path) -> None:
    seen = []

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
    data, empty = image_set(), image_set(0)
    model = tiny_model()
    model.fds = FDS(BINS, num_features=8)
    with pytest.raises(SettingsError) as error:
        fit(
            model,
            data,
            empty,
            metrics=metrics_of(data),
            fds=model.fds,
            runtime=one_process(),
            folder=tmp_path,
            optimization=Optimization(batch_size=1),
        )
    for part in ("two images a rank", "val must hold at least one", "no part of the model"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": "l1"}, TypeError, "loss must be a Callable, got str"),
        ({"weights": 1}, TypeError, "weights must be an LDS, got int"),
        ({"fds": 1}, TypeError, "fds must be an FDS, got int"),
        ({"augmentation": "flip"}, TypeError, "augmentation must be a bool, got str"),
        ({"optimization": None}, TypeError, "optimization must be an Optimization, got NoneType"),
        ({"fingerprint": "abc"}, TypeError, "fingerprint must be a Mapping, got str"),
        ({"runtime": "cpu"}, TypeError, "runtime must be a Runtime, got str"),
        (
            {"fingerprint": {"size": np.float64(1)}},
            CheckpointError,
            r"fingerprint\['size'\] must be a tensor or a plain",
        ),
        ({"metrics": "mae"}, TypeError, "metrics must be a RegressionMetrics or a ClassificationMetrics, got str"),
        ({"sampler": 1}, TypeError, "sampler must be a BinSampler, got int"),
        ({"weights_from": -1}, ValueError, "weights_from must be at least 0, got -1"),
        (
            {"metrics": RegressionMetrics(few := Bins.uniform(0, 1, width=1), LabelDensity.count([0], few))},
            LabelError,
            r"val.labels must lie on the label axis \[0, 1\]",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    data = image_set()
    arguments: dict[str, Any] = {
        "metrics": metrics_of(data),
        "loss": at_call(1, never),
        "optimization": Optimization(batch_size=BATCH),
        "runtime": one_process(),
        "folder": tmp_path / "run",
    }
    with pytest.raises(error, match=message):
        fit(tiny_model(), data, image_set(31, seed=1), **{**arguments, **changes})
    assert list(tmp_path.iterdir()) == []


def test_only_image_sets_are_taken(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evaluate: data must be an ImageSet, got NoneType"):
        evaluate(tiny_model(), None, metrics=metrics_of(image_set()), runtime=one_process())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fit: val must be an ImageSet, got list"):
        fit(
            tiny_model(),
            image_set(),
            [],  # type: ignore[arg-type]
            metrics=metrics_of(image_set()),
            optimization=Optimization(),
            runtime=one_process(),
            folder=tmp_path,
        )


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


def test_two_ranks_with_uneven_shares_step_as_one_process_and_resume_to_the_bit(tmp_path: Path) -> None:
    one, _, history = train(tmp_path / "one", random=False)
    ranks = [subprocess.Popen(program("rank", tmp_path, str(rank))) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(states[0]["model"], states[1]["model"])
    for name, value in one.state_dict().items():
        torch.testing.assert_close(states[0]["model"][name], value, rtol=1e-4, atol=1e-5)
    for row, expected in zip(states[0]["history"], history, strict=True):
        for name in ("loss", "lr", "val_mae", "val_bmae", "val_mae_few"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    assert same_runs(tmp_path / "two", tmp_path / "two-stopped")


def run_rank(folder: Path, rank: int) -> None:
    """One of two ranks: a whole run, and another that only rank 1 stops and that both resume."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with start_runtime("cpu", seed=3) as runtime:
        assert (runtime.rank, runtime.world) == (rank, 2)
        model, _, history = train(folder / "two", runtime, random=False)
        try:
            train(folder / "two-stopped", runtime, random=False, loss=at_call(8, press_ctrl_c if rank else int))
        except KeyboardInterrupt:
            train(folder / "two-stopped", runtime, random=False, resume=True)
        else:
            raise AssertionError("both ranks must stop")
        torch.save({"model": model.state_dict(), "history": history}, folder / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # taking gloo down can hang


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "killed":
        train(place, loss=at_call(8, lambda: os._exit(9)), checkpoint_minutes=0)
    elif what == "resumed":
        train(place, resume=True)
    else:
        run_rank(place, int(sys.argv[3]))
