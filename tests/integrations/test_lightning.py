"""The Lightning callback against the plain loop that FDS documents, bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, Bins, LabelDensity, LongTailModel
from dir_toolkit.errors import CheckpointError, DirToolkitWarning, LabelError, UsageError

pl = pytest.importorskip("lightning.pytorch")

from dir_toolkit.integrations.lightning import FDSCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]

BINS = Bins.uniform(0, 9, width=1)
EPOCHS = 3


class Loader:
    """Batches in one order, which goes on where a checkpoint left it, as Lightning asks of a loader."""

    def __init__(self, *batches: Any, share: slice = slice(0, 8)) -> None:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(48) * 5 % 9 + torch.rand(48, generator=generator)
        x = torch.randn(48, 3, generator=generator) + y[:, None] / 3
        self.batches = batches or [(x[i : i + 8][share], y[i : i + 8][share]) for i in range(0, 48, 8)]
        self.at = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.at = self.at, 0
        for i in range(start, len(self)):
            self.at = (i + 1) % len(self)
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Module(pl.LightningModule):
    def __init__(self, fds: FDS, *, inside: bool = False, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 1)
        fds.attach(self.head, "input")
        if inside:
            self.fds = fds
        self.fails_at, self.steps = fails_at, 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.head(self.body(x))[:, 0] - y).abs().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        if self.steps == self.fails_at:
            raise ArithmeticError("the step failed")
        return self.loss(batch[0], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch[0], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    return pl.Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **settings,
        }
    )


def fitted(
    folder: Path, *callbacks: Any, inside: bool = False, start: Any = None, form: Any = "diagonal", **settings: Any
) -> dict[str, Tensor]:
    """What a fit with the callback comes to, validated in mid-epoch and before it."""
    fds = FDS(BINS, 4, covariance=form, rank=2)
    module = Module(fds, inside=inside)
    options = {"num_sanity_val_steps": 2, "val_check_interval": 2, **settings}
    trainer(folder, FDSCallback(fds), *callbacks, **options).fit(module, Loader(), Loader(), ckpt_path=start)
    return everything(module, fds)


def plain(epochs: int = EPOCHS, accumulate: int = 1) -> dict[str, Tensor]:
    """What the plain loop comes to."""
    fds = FDS(BINS, 4)
    module = Module(fds)
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for i, (x, y) in enumerate(Loader(), 1):
            with fds.labels(y):
                loss = module.loss(x, y) / accumulate
            loss.backward()
            if i % accumulate == 0 or i == 6:
                optimizer.step()
                optimizer.zero_grad()
        fds.end_epoch()
    return everything(module, fds)


def everything(module: nn.Module, fds: FDS) -> dict[str, Tensor]:
    """Weights and statistics."""
    weights = {name: value for name, value in module.state_dict().items() if not name.startswith("fds.")}
    buffers = {f"fds.{name}": value for name, value in fds.named_buffers()}
    return {name: value.clone() for name, value in {**weights, **buffers}.items()} | {"epochs": torch.tensor(fds.epoch)}


def assert_equal_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].numpy().tobytes() == two[name].numpy().tobytes(), name


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_training_is_the_plain_loop_to_the_bit(tmp_path: Path, inside: bool, accumulate: int) -> None:
    got = fitted(tmp_path, inside=inside, accumulate_grad_batches=accumulate)
    assert_equal_bits(got, plain(accumulate=accumulate))
    with pytest.raises(AssertionError):  # and the comparison can fail
        assert_equal_bits(got, plain(epochs=EPOCHS - 1, accumulate=accumulate))


def test_fit_called_twice_goes_on(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    module, callback = Module(fds), FDSCallback(fds)
    for _ in range(2):
        trainer(tmp_path, callback).fit(module, Loader())
    assert_equal_bits(everything(module, fds), plain(2 * EPOCHS))


def test_several_fds_with_labels_of_their_own(tmp_path: Path) -> None:
    def make() -> tuple[Module, list[FDS]]:
        both = [FDS(BINS, 4), FDS(Bins.uniform(0, 18, width=1), 4)]
        module = Module(both[0])
        both[1].attach(module.body[0], "output")
        return module, both

    module, both = make()
    callback = FDSCallback(both, labels_of=[1, lambda batch: 2 * batch[1]])
    trainer(tmp_path, callback).fit(module, Loader())
    expected, oracle = make()
    optimizer = expected.configure_optimizers()
    for _ in range(EPOCHS):
        for x, y in Loader():
            with oracle[0].labels(y), oracle[1].labels(2 * y):
                loss = expected.loss(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for fds in oracle:
            fds.end_epoch()
    for mine, theirs in zip(both, oracle, strict=True):
        assert_equal_bits(everything(module, mine), everything(expected, theirs))


def test_labels_are_read_under_a_key(tmp_path: Path) -> None:
    class Named(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["image"], batch["age"])

    fds = FDS(BINS, 4)
    module = Named(fds)
    loader = Loader(*({"image": x, "age": y} for x, y in Loader()))
    trainer(tmp_path, FDSCallback(fds, "age")).fit(module, loader)
    assert_equal_bits(everything(module, fds), plain())


def test_a_module_that_places_its_labels_itself(tmp_path: Path) -> None:
    class LongTailed(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            density = LabelDensity.count(torch.cat([y for _, y in Loader()]), BINS)
            self.model = LongTailModel(nn.Linear(3, 4), 4, BINS, density=density, fds=FDS(BINS, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(*batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.02)

    module, expected = LongTailed(), LongTailed()
    trainer(tmp_path, FDSCallback(module.model.fds, labels_of=None)).fit(module, Loader())
    optimizer = expected.configure_optimizers()
    for _ in range(EPOCHS):
        for batch in Loader():
            optimizer.zero_grad()
            expected.training_step(batch, 0).backward()
            optimizer.step()
        expected.model.fds.end_epoch()
    weights = [dict(m.named_parameters()) for m in (module, expected)]
    assert_equal_bits(*({name: value.detach() for name, value in w.items()} for w in weights))
    assert module.model.fds.epoch == EPOCHS


# ---- checkpoints ----


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("when", ["in mid-epoch", "at the last step", "at the last validation", "at the end"])
def test_a_resumed_training_is_one_that_never_stopped(tmp_path: Path, inside: bool, when: str) -> None:
    options: dict[str, Any] = {
        "in mid-epoch": {"every_n_train_steps": 9},
        "at the last step": {"every_n_train_steps": 12},
        "at the last validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "at the end": {"every_n_epochs": 2, "save_on_train_epoch_end": True},
    }[when]
    keeps = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, **options)
    expected = fitted(tmp_path, keeps, inside=inside)
    assert_equal_bits(expected, plain())
    (saved,) = [file for file in tmp_path.glob("*.ckpt") if any(f"epoch=1-step={n}.ckpt" == file.name for n in (9, 12))]
    assert_equal_bits(fitted(tmp_path, inside=inside, start=saved), expected)


@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_covariances_of_any_form_are_resumed_in_mid_epoch(tmp_path: Path, form: str) -> None:
    keeps = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=9)
    expected = fitted(tmp_path, keeps, form=form)
    assert int(expected["epochs"]) == EPOCHS
    assert_equal_bits(fitted(tmp_path, form=form, start=tmp_path / "step=9.ckpt"), expected)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    one = trainer(tmp_path, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirToolkitWarning)  # nobody places labels
        one.fit(Module(fds), Loader())
    one.save_checkpoint(tmp_path / "without.ckpt")
    other = FDS(Bins.uniform(0, 18, width=2), 4)
    with_callback = trainer(tmp_path, FDSCallback(other), max_epochs=1)
    with_callback.fit(Module(other), Loader(*((x, 2 * y) for x, y in Loader())))
    with_callback.save_checkpoint(tmp_path / "other.ckpt")
    for name, message in [
        ("without", "the checkpoint must hold FDS statistics, got one that was saved without"),
        ("other", "the saved statistics must be over the same bins"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            fitted(tmp_path, start=tmp_path / f"{name}.ckpt")
    two = FDSCallback([FDS(BINS, 4), FDS(BINS, 4)])
    with pytest.raises(CheckpointError, match="the saved state must be of 2 FDS, got 1"):
        two.load_state_dict(FDSCallback(FDS(BINS, 4)).state_dict())


# ---- two processes ----


def rank_main(rank: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", module="lightning")
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}  # processes are there already
    share = slice(0, 3) if rank == 0 else slice(3, None)  # uneven
    result = {}
    for name in ("outside", "inside", "full", "low_rank"):
        inside, form = name == "inside", name if name in ("full", "low_rank") else "diagonal"
        for start in (None, f"{name}/epoch=1-step=9.ckpt"):
            fds = FDS(BINS, 4, covariance=form, rank=2)  # type: ignore[arg-type]
            module = Module(fds, inside=inside)
            keeps = pl.callbacks.ModelCheckpoint(name, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=9)
            strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
            options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
            trainer(Path(name), FDSCallback(fds), keeps, **options).fit(module, Loader(share=share), ckpt_path=start)
            result[f"{name}, {'resumed' if start else 'whole'}"] = everything(module, fds)
    return result


def test_two_ranks_gather_over_both_and_resume_in_mid_epoch(two_ranks: Callable[..., list[Any]]) -> None:
    first, second = two_ranks(rank_main, timeout=240)
    labels = torch.cat([y for _, y in Loader()])
    count = torch.bincount(labels.long(), minlength=9).double()
    for results in (first, second):
        for name in ("inside", "outside", "full", "low_rank"):
            whole, resumed = results[f"{name}, whole"], results[f"{name}, resumed"]
            assert_equal_bits(whole, first[f"{name}, whole"])
            for key in whole:
                torch.testing.assert_close(resumed[key], whole[key], rtol=1e-5, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(whole["fds.running_count"], count, rtol=1e-12, atol=0)
            assert int(whole["epochs"]) == EPOCHS


# ---- what goes wrong ----


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    module = Module(fds, fails_at=4)
    callback = FDSCallback(fds)
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, callback).fit(module, Loader())
    with pytest.warns(DirToolkitWarning, match="a training pass ran without labels"):
        module.train().loss(*next(iter(Loader())))
    trainer(tmp_path, callback, max_epochs=1).fit(module, Loader())
    assert (fds.epoch, int(fds.statistics()["count"].sum())) == (1, 48)  # none of the epoch that was broken off


def test_an_epoch_that_the_module_cuts_short(tmp_path: Path) -> None:
    class Short(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    fds = FDS(BINS, 4)
    module = Short(fds)
    trainer(tmp_path, FDSCallback(fds), max_epochs=1).fit(module, Loader())
    assert (fds.epoch, int(fds.statistics()["count"].sum())) == (1, 24)
    with pytest.warns(DirToolkitWarning, match="a training pass ran without labels"):
        module.train().loss(*next(iter(Loader())))


@pytest.mark.parametrize(
    ("labels_of", "batch", "error", "message"),
    [
        (
            1,
            {"x": 0, "y": 1},
            ValueError,
            r"a batch must hold its labels under 1, got a dict with the keys \['x', 'y'\]. Pass labels",
        ),
        (1, (torch.ones(2, 3),), ValueError, "under 1, got a tuple of 1"),
        (1, torch.ones(2, 3), ValueError, "under 1, got a Tensor"),
        ("age", (torch.ones(2, 3), torch.ones(2)), ValueError, "under 'age', got a tuple of 2"),
        ("age", {"age": [1, 2]}, TypeError, r"labels must be a torch\.Tensor, got list"),
        (lambda batch: None, (), TypeError, r"labels must be a torch\.Tensor, got NoneType"),
        (1, (torch.ones(2, 3), torch.ones(2, 1)), ValueError, r"same samples.*Use labels.squeeze\(1\)"),
        (1, (torch.ones(2, 3), torch.tensor([1.0, 9.5])), LabelError, "labels must lie on the label axis"),
    ],
)
def test_batches_without_fit_labels_are_refused(
    tmp_path: Path, labels_of: Any, batch: Any, error: type[Exception], message: str
) -> None:
    fds = FDS(BINS, 4)
    with pytest.raises(error, match=message):
        trainer(tmp_path, FDSCallback(fds, labels_of)).fit(Module(fds), Loader(batch))


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    fds = FDS(BINS, 4)
    for arguments, error, message in [
        ((BINS,), TypeError, "fds must be an FDS, got Bins"),
        (([],), ValueError, r"fds must be an FDS or several, got \[\]"),
        ((fds, 1.5), TypeError, "labels_of must be a function of the batch, a key, .*, got 1.5 for 1 FDS"),
        (([fds, fds], [0]), ValueError, r"labels_of must be .*, or a list with one per FDS, got \[0\] for 2 FDS"),
    ]:
        with pytest.raises(error, match=message):
            FDSCallback(*arguments)
    with pytest.raises(UsageError, match=r"fds must be attached to a module of the model.*attach\(model.head"):
        trainer(tmp_path, FDSCallback(fds)).fit(Module(FDS(BINS, 4)), Loader())

    class Iterates(Module):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(UsageError, match="training_step must take the batch, got a dataloader_iter"):
        trainer(tmp_path, FDSCallback(fds)).fit(Iterates(fds), Loader())
