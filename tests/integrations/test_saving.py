"""What saves, averages and exports models takes those of this package as it takes any other, each by its own way."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dir_toolkit as dt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true but no accelerator:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]

BINS, CLASSES = dt.Bins.uniform(0, 60, width=2), dt.Bins.classes(4)


def data(n: int = 48) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)  # and no torch, which may be building on the meta device
    y = 60 * random.random(n) ** 2
    x = random.normal(size=(n, 6)) + y[:, None] / 20
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def model(kind: str, seed: int = 0) -> dt.LongTailModel:
    """One of each kind of model, in its last detail equal but for its weights, which the seed decides."""
    torch.manual_seed(seed)
    _, y = data()
    bins = CLASSES if kind == "classes" else BINS
    labels = (y / 16).long() if kind == "classes" else y
    options: dict[str, Callable[[], dict[str, Any]]] = {
        "default": lambda: {"target_prior": "uniform", "tau": 0.5},
        "fds": lambda: {"fds": dt.FDS(BINS, 8), "target_prior": "uniform"},
        "fds, low rank": lambda: {"fds": dt.FDS(BINS, 8, covariance="low_rank", rank=2)},
        "weights": lambda: {"weights": dt.LDS(BINS).fit(y), "residual": True, "decode": "expectation"},
        "balanced": lambda: {"head": "regression", "loss": "balanced_mse"},
        "gaussian": lambda: {"head": "gaussian"},
        "affinity": lambda: {"head": "affinity", "loss": "crps"},
        "classes": lambda: {"head": "cosine", "target_prior": "uniform", "adjust": "in_loss"},
    }
    backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    density = dt.LabelDensity.count(labels, bins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dir_toolkit.longtail.readouts.warn", lambda *_: None)  # of bins that so few labels leave empty
        return dt.LongTailModel(backbone, 8, bins, density=density, **options[kind]())


KINDS = ["default", "fds", "fds, low rank", "weights", "balanced", "gaussian", "affinity", "classes"]
FEW = ["fds", "weights", "balanced", "classes"]  # whose state is each of another kind, where a test takes long


def labels_of(net: dt.LongTailModel) -> Tensor:
    return (data()[1] / 16).long() if net.bins.categorical else data()[1]


def train(net: dt.LongTailModel, epochs: int = 2) -> None:
    """Move weights, and statistics where there are any."""
    x, y = data()[0], labels_of(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.arange(48).split(16):
            optimizer.zero_grad()
            net.train()(x[rows], y[rows]).loss.backward()
            optimizer.step()
        if net.fds is not None:
            net.fds.end_epoch()
    net.eval()


def everything(net: nn.Module) -> dict[str, Tensor]:
    """All that a model knows and says, weights, statistics and answers, by name."""
    result = {name: value.clone() for name, value in net.state_dict().items() if "_extra_state" not in name}
    for name, part in net.named_modules():
        fds = getattr(part, "fds", None)
        if isinstance(fds, dt.FDS):
            result |= {f"{name} fds {key}": torch.as_tensor(value) for key, value in fds.statistics().items()}
            result[f"{name} fds epoch"] = torch.tensor(fds.epoch)
        if isinstance(part, dt.LongTailModel):
            x, y = data()[0], labels_of(part)
            with torch.no_grad():
                output = copy.deepcopy(part).eval()(x, y)
            result |= {f"{name} says {key}": value for key, value in output._asdict().items()}
    return result


def assert_alike(one: nn.Module, other: nn.Module, **tolerance: Any) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


def round_trip(save: Callable[[nn.Module, str], Any], load: Callable[[nn.Module, str], Any], path: Path, kind: str):
    """Save a trained model, load it into a fresh one, and see them go on alike."""
    net, fresh = model(kind), model(kind, seed=1)
    train(net)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_alike(net, fresh)
    save(net, str(path))
    load(fresh, str(path))
    assert_alike(net, fresh)
    train(net)
    train(fresh)
    assert_alike(net, fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_hold_tensors_alone_and_keep_their_shapes_while_training(kind: str) -> None:
    net = model(kind)
    before = {name: (value.shape, value.dtype) for name, value in net.state_dict().items()}
    assert all(type(value) is Tensor for value in net.state_dict().values())
    if "low rank" not in kind:
        train(net)
        assert {name: (value.shape, value.dtype) for name, value in net.state_dict().items()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_saves_a_model_and_loads_it(kind: str, tmp_path: Path) -> None:
    st = pytest.importorskip("safetensors.torch")
    round_trip(st.save_model, st.load_model, tmp_path / "model.safetensors", kind)


def parts() -> dict[str, Callable[[], nn.Module]]:
    """Every class of the package that has a state, as a model may hold it."""
    _, y = data()
    density = dt.LabelDensity.count(y, BINS)
    return {
        "LDS": lambda: dt.LDS(BINS).fit(y),
        "LDS, inverse": lambda: dt.LDS(BINS, scheme="inverse", clip=(1, 5), outside="clip").fit(y),
        "LinearHead": lambda: dt.heads.LinearHead(8, 30),
        "CosineHead": lambda: dt.heads.CosineHead(8, 30),
        "AffinityHead": lambda: dt.AffinityHead(8, 4),
        "LogitAdjuster": lambda: dt.LogitAdjuster([0.5, 0.25, 0.25]),
        "BatchMCLoss": lambda: dt.losses.BatchMCLoss(noise_sigma=2.0),
        "BinnedIntegrationLoss": lambda: dt.losses.BinnedIntegrationLoss(BINS, density),
        "CenterLoss": lambda: dt.losses.CenterLoss(8, 4),
    }


@pytest.mark.parametrize("name", list(parts()))
def test_heads_losses_and_weights_inside_a_model_are_saved_with_it(name: str, tmp_path: Path) -> None:
    st = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    one, other = (nn.ModuleDict({"body": nn.Linear(2, 2), "part": parts()[name]()}) for _ in range(2))
    st.save_model(one, str(tmp_path / "model.safetensors"))
    st.load_model(other, str(tmp_path / "model.safetensors"))
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert type(value) is Tensor
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)


# ---- averages ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm_averages_a_model_with_fds(kind: str, version: str) -> None:
    utils = pytest.importorskip("timm.utils")
    if "low rank" in kind:
        pytest.skip("an average needs statistics of one shape; low rank grows while it gathers")
    net = model(kind)
    average = getattr(utils, version)(net, decay=0.5)
    before = {name: value.clone() for name, value in net.named_parameters()}
    train(net)
    average.update(net)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, (before[name] + net.get_parameter(name)) / 2)
    x, y = data()[0], labels_of(net)
    assert average.module(x, y).loss.isfinite()


# ---- export ----


@pytest.mark.parametrize("kind", ["default", "fds, low rank", "balanced", "classes"])  # tests/longtail has the others
def test_exported_programs_are_saved(kind: str) -> None:
    net = model(kind)
    train(net)
    x, _ = data()
    program = torch.export.export(net, (x[:4],), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()(x)
    expected = net(x)
    assert type(loaded) is dt.LongTailOutput
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(loaded, name), value, equal_nan=True)


# ---- accelerate ----


@pytest.mark.parametrize("kind", FEW)
def test_accelerate_saves_a_model_and_goes_on(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    st = pytest.importorskip("safetensors.torch")

    def run(net: nn.Module) -> tuple[Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1e-3))

    def save(net: nn.Module, path: str) -> None:
        accelerator, _ = run(net)
        accelerator.save_state(path)

    def load(net: nn.Module, path: str) -> None:
        accelerator, _ = run(net)
        accelerator.load_state(path)

    round_trip(save, load, tmp_path / "state", kind)
    round_trip(
        lambda net, path: run(net)[0].save_model(net, path),
        lambda net, path: st.load_model(net, f"{path}/model.safetensors"),
        tmp_path / "model",
        kind,
    )


# ---- Hugging Face ----


class Wrapped(nn.Module):
    """As one hands a model to the Trainer."""

    def __init__(self, net: dt.LongTailModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return self.net(x, labels)


@pytest.mark.parametrize("kind", FEW)
def test_the_hugging_face_trainer_saves_evaluates_and_resumes(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from dir_toolkit.integrations.transformers import FDSCallback

    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        loss_free = prediction.predictions
        return {"mae": float(np.abs(loss_free[1] - prediction.label_ids).mean())}

    def trainer(folder: str, seed: int, **more: Any) -> tuple[Any, Wrapped]:
        net = Wrapped(model(kind, seed))
        x, y = data()[0], labels_of(net.net)
        rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=20,
            save_steps=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            eval_strategy="epoch",
            label_names=["labels"],
            **more,
        )
        fds = net.net.fds
        callbacks = [] if fds is None else [FDSCallback(fds, labels_of=None)]
        one = transformers.Trainer(
            net, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics, callbacks=callbacks
        )
        return one, net

    whole, net = trainer("whole", 0)
    whole.train()
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"checkpoint-3", "checkpoint-12"}
    result = whole.evaluate()
    scores, prediction = seen[-1].predictions[:2]
    assert len(scores) == len(prediction) == 48
    assert result["eval_mae"] >= 0
    again, resumed = trainer("again", 1)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9")) if net.net.fds is None else None
    if net.net.fds is None:
        assert_alike(net, resumed, rtol=1e-6, atol=1e-6)
    whole.save_model(str(tmp_path / "saved"))
    fresh = Wrapped(model(kind, seed=2))
    st = pytest.importorskip("safetensors.torch")
    st.load_model(fresh, str(tmp_path / "saved" / "model.safetensors"))
    assert_alike(net, fresh)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fds" not in kind])
def test_pretrained_models_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PreTrainedConfig):  # type: ignore[misc, name-defined]
        model_type = "long_tailed"

    class Pretrained(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = model(kind, seed=len(created))
            created.append(self)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return self.net(x, labels)

    created: list[Any] = []
    one = Pretrained(Config())
    train(one.net)
    one.save_pretrained(tmp_path)
    other = Pretrained.from_pretrained(tmp_path)
    assert len(created) == 2
    assert_alike(one, other)


# ---- Lightning ----


@pytest.mark.parametrize("kind", FEW)
def test_lightning_validates_first_and_trains_then(kind: str, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    hints = pytest.importorskip("lightning.fabric.utilities.warnings")
    warnings.simplefilter("ignore", hints.PossibleUserWarning)  # pytest's marker would import it before the skip

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, seed: int = 0) -> None:
            super().__init__()
            self.net = model(kind, seed)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(*batch).loss

        def on_train_epoch_end(self) -> None:
            if self.net.fds is not None:
                self.net.fds.end_epoch()

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val", self.net(*batch).loss)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def trainer(**tolerance: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        return pl.Trainer(default_root_dir=tmp_path, max_epochs=2, **quiet, **tolerance)

    module = Module()
    rows = torch.utils.data.TensorDataset(data()[0], labels_of(module.net))
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    first = trainer(enable_checkpointing=False)
    first.validate(module, loader, verbose=False)  # in inference mode, before any training
    first.fit(module, loader, loader)
    assert np.isfinite(float(first.callback_metrics["val"]))
    alone = Module()
    trainer(enable_checkpointing=False).fit(alone, loader)
    assert_alike(module.net, alone.net, rtol=1e-6, atol=1e-6)
    first.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module(seed=1)
    loaded.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert_alike(module.net, loaded.net)
    half = Module()
    in_half = torch.utils.data.TensorDataset(data()[0].bfloat16(), labels_of(half.net))
    low = trainer(precision="bf16-true", enable_checkpointing=False)
    low.fit(half, torch.utils.data.DataLoader(in_half, batch_size=16), loader)
    assert next(half.net.parameters()).dtype in (torch.bfloat16, torch.float32)
    assert np.isfinite(float(low.callback_metrics["val"]))
