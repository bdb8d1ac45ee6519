"""The callback of the Hugging Face Trainer against the plain loop that FDS documents, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, Bins
from dir_toolkit.errors import CheckpointError, DirToolkitWarning, LabelError, UsageError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dir_toolkit.integrations.transformers import FDSCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true but no accelerator:UserWarning")

BINS = Bins.uniform(0, 9, width=1)
EPOCHS = 3


def data() -> list[dict[str, Tensor]]:
    """48 samples, six batches of eight."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) * 5 % 9 + torch.rand(48, generator=generator)
    x = torch.randn(48, 3, generator=generator) + y[:, None] / 3
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


class Model(nn.Module):
    def __init__(self, fds: FDS, *, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 1)
        fds.attach(self.head, "input")
        self.fails_at, self.steps = fails_at, 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise ArithmeticError("the step failed")
        pred = self.head(self.body(x))[:, 0]
        return {"loss": (pred - labels).abs().mean(), "pred": pred}


class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
    """A Trainer that does not shuffle, whatever its version calls the setting."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder: Path, model: nn.Module, *callbacks: Any, train: Any = None, **settings: Any) -> Any:
    options = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **settings,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **options)
    return InOrder(
        model, args, train_dataset=data() if train is None else train, eval_dataset=data(), callbacks=list(callbacks)
    )


def fitted(
    folder: Path, start: Any = None, resume_from: Any = None, form: Any = "diagonal", **settings: Any
) -> dict[str, Tensor]:
    """What training with the callback comes to, evaluated in mid-epoch."""
    fds = FDS(BINS, 4, covariance=form, rank=2)
    model = Model(fds)
    callback = FDSCallback(fds, resume_from=resume_from)
    trainer(folder, model, callback, **settings).train(resume_from_checkpoint=start)
    return everything(model, fds)


def plain(epochs: int = EPOCHS, accumulate: int = 1) -> dict[str, Tensor]:
    """What the plain loop comes to."""
    fds = FDS(BINS, 4)
    model = Model(fds)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    x, y = (torch.stack([row[name] for row in data()]) for name in ("x", "labels"))
    for _ in range(epochs):
        for i in range(6):
            labels = y[8 * i : 8 * i + 8]
            with fds.labels(labels):
                loss = model(x[8 * i : 8 * i + 8], labels)["loss"] / min(accumulate, 6 - i // accumulate * accumulate)
            loss.backward()
            if (i + 1) % accumulate == 0 or i == 5:
                optimizer.step()
                optimizer.zero_grad()
        fds.end_epoch()
    return everything(model, fds)


def everything(model: nn.Module, fds: FDS) -> dict[str, Tensor]:
    """Weights and statistics."""
    buffers = {f"fds.{name}": value for name, value in fds.named_buffers()}
    return {name: value.clone() for name, value in {**model.state_dict(), **buffers}.items()} | {
        "epochs": torch.tensor(fds.epoch)
    }


def assert_equal_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].numpy().tobytes() == two[name].numpy().tobytes(), name


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_training_is_the_plain_loop_to_the_bit(tmp_path: Path, accumulate: int) -> None:
    got = fitted(tmp_path, gradient_accumulation_steps=accumulate, eval_steps=1)
    assert_equal_bits(got, plain(accumulate=accumulate))
    with pytest.raises(AssertionError):  # and the comparison can fail
        assert_equal_bits(got, plain(epochs=EPOCHS - 1, accumulate=accumulate))


def test_train_called_twice_goes_on(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    model = Model(fds)
    callback = FDSCallback(fds, labels_of=lambda inputs: inputs["labels"])
    for _ in range(2):
        trainer(tmp_path, model, callback).train()
    assert_equal_bits(everything(model, fds), plain(2 * EPOCHS))
    with pytest.warns(DirToolkitWarning, match="a training pass ran without labels"):  # no hook is left
        model.train()(torch.ones(2, 3), torch.ones(2))


def test_a_pretrained_model_is_driven_and_saved(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=8, hidden_dim=8, n_layers=1, n_heads=2, max_position_embeddings=4, num_labels=1
    )
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(config)
    fds = FDS(BINS, 8)
    fds.attach(model.classifier, "input")
    rows = [{"input_ids": torch.tensor([1, i % 9]), "labels": row["labels"]} for i, row in enumerate(data())]
    settings = {"save_strategy": "epoch", "eval_strategy": "no", "num_train_epochs": 2}
    trainer(tmp_path, model, FDSCallback(fds), train=rows, **settings).train()
    assert fds.epoch == 2
    assert int(fds.statistics()["count"].sum()) == 48
    assert (tmp_path / "checkpoint-12" / "fds.pt").exists()
    again = transformers.DistilBertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert_equal_bits(dict(again.state_dict()), dict(model.state_dict()))


# ---- checkpoints ----


@pytest.mark.parametrize("step", [9, 12], ids=["in mid-epoch", "at the last step"])
def test_a_resumed_training_is_one_that_never_stopped(tmp_path: Path, step: int) -> None:
    expected = fitted(tmp_path, save_strategy="steps", save_steps=3)
    assert_equal_bits(expected, plain())
    start = tmp_path / f"checkpoint-{step}"
    assert_equal_bits(fitted(tmp_path, start=str(start), save_strategy="steps", save_steps=3), expected)
    elsewhere = shutil.copytree(start, tmp_path / "elsewhere")
    there = fitted(tmp_path / "new", start=str(elsewhere), resume_from=elsewhere)
    assert_equal_bits(there, expected)


@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_covariances_of_any_form_are_resumed_in_mid_epoch(tmp_path: Path, form: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 9}
    expected = fitted(tmp_path, form=form, **options)
    assert int(expected["epochs"]) == EPOCHS
    assert_equal_bits(fitted(tmp_path, form=form, start=str(tmp_path / "checkpoint-9"), **options), expected)


def test_a_resumed_training_after_an_epoch(tmp_path: Path) -> None:
    expected = fitted(tmp_path, save_strategy="epoch")
    assert_equal_bits(fitted(tmp_path, start=str(tmp_path / "checkpoint-12"), save_strategy="epoch"), expected)


def test_an_epoch_that_is_begun_again_is_gathered_anew(tmp_path: Path) -> None:
    fitted(tmp_path, save_strategy="steps", save_steps=3, num_train_epochs=1)
    again = fitted(tmp_path, start=str(tmp_path / "checkpoint-3"), ignore_data_skip=True, num_train_epochs=1)
    assert (int(again["epochs"]), int(again["fds.running_count"].sum())) == (1, 24)  # the Trainer stops at six steps


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path / "one", save_strategy="epoch", num_train_epochs=1)
    fitted(tmp_path / "two", save_strategy="epoch", num_train_epochs=1, learning_rate=0.5)
    here, other = (tmp_path / name / "checkpoint-6" for name in ("one", "two"))
    with pytest.raises(CheckpointError, match=r"must be those of the checkpoint, got those of another"):
        fitted(tmp_path / "two", start=str(here))
    (other / "fds.pt").unlink()
    with pytest.raises(CheckpointError, match=r"must hold FDS statistics, got no file .*fds.pt'. Pass resume_from="):
        fitted(tmp_path / "two", start=str(other))


# ---- two processes ----


def rank_main(rank: int) -> dict[str, Any]:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"
    }  # fmt: skip
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 9, "ddp_backend": "gloo"}
    folder = Path("run").absolute()
    return {
        "whole": fitted(folder, **options),
        "resumed": fitted(folder, start=str(folder / "checkpoint-9"), **options),
    }


def test_two_ranks_gather_over_both_and_resume_in_mid_epoch(two_ranks: Callable[..., list[Any]]) -> None:
    first, second = two_ranks(rank_main, timeout=240)
    count = torch.bincount(torch.stack([row["labels"] for row in data()]).long(), minlength=9).double()
    expected = plain()
    for results in (first, second):
        assert_equal_bits(results["whole"], first["whole"])
        for name in expected:
            torch.testing.assert_close(results["whole"][name], expected[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(results["resumed"][name], expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results["resumed"]["fds.running_count"], count, rtol=1e-12, atol=0)


# ---- what goes wrong ----


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    model = Model(fds, fails_at=4)
    callback = FDSCallback(fds)
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, model, callback, eval_strategy="no").train()
    with pytest.warns(DirToolkitWarning, match="a training pass ran without labels"):
        model.train().head(model.body(torch.ones(2, 3)))
    trainer(tmp_path, model, callback, num_train_epochs=1).train()
    assert (fds.epoch, int(fds.statistics()["count"].sum())) == (1, 48)  # none of the epoch that was broken off


@pytest.mark.parametrize(
    ("labels_of", "change", "error", "message"),
    [
        (
            "age",
            lambda y: y,
            ValueError,
            r"a batch must hold its labels under 'age', got a dict with the keys \['labels', 'x'\]",
        ),
        (0, lambda y: y, ValueError, "a batch must hold its labels under 0"),
        (lambda inputs: 1.0, lambda y: y, TypeError, r"labels must be a torch\.Tensor, got float"),
        ("labels", lambda y: y[None], ValueError, r"same samples.*Use labels.squeeze\(1\)"),
        ("labels", lambda y: y + 9, LabelError, "labels must lie on the label axis"),
    ],
)
def test_batches_without_fit_labels_are_refused(
    tmp_path: Path, labels_of: Any, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    fds = FDS(BINS, 4)
    rows = [{"x": row["x"], "labels": change(row["labels"])} for row in data()]
    with pytest.raises(error, match=message):
        trainer(tmp_path, Model(fds), FDSCallback(fds, labels_of), train=rows).train()


def test_labels_that_the_trainer_keeps_to_itself(tmp_path: Path) -> None:
    class NoLabels(Model):
        def forward(self, x: Tensor, age: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return self.head(self.body(x))[:, 0]

    def loss(pred: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return (pred - labels).abs().mean()

    fds = FDS(BINS, 4)
    rows = [{**row, "age": row["labels"]} for row in data()]
    settings = {"eval_strategy": "no", "label_names": ["labels"], "remove_unused_columns": False}
    for labels_of in ("labels", "age"):
        args = trainer(tmp_path, nn.Identity(), **settings).args
        one = InOrder(
            NoLabels(fds), args, train_dataset=rows, callbacks=[FDSCallback(fds, labels_of)], compute_loss_func=loss
        )
        if labels_of == "labels":
            with pytest.raises(ValueError, match=r"under 'labels', got a dict with the keys \['age', 'x'\]"):
                one.train()
        else:
            one.train()
    assert fds.epoch == EPOCHS


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    with pytest.raises(TypeError, match="fds must be an FDS, got Bins"):
        FDSCallback(BINS)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fds must be attached to a module of the model, got one that is not att"):
        trainer(tmp_path, Model(FDS(BINS, 4)), FDSCallback(fds)).train()
    model = Model(fds)
    model.register_module("fds", fds)
    with pytest.raises(UsageError, match="fds must not be a submodule of the model, whose buffers"):
        trainer(tmp_path, model, FDSCallback(fds)).train()
    trainer(tmp_path, model).save_model(str(tmp_path / "saved"))
    one = trainer(tmp_path, Model(fds), FDSCallback(fds))
    one.args._n_gpu = 2
    with pytest.raises(UsageError, match="each process must train on one GPU, got 2 in one"):
        FDSCallback(fds).on_train_begin(one.args, one.state, one.control, model=one.model)
