from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_models import AGE_DENSITY, AGES, ages, batch, net, same_output, seeded
from torch import Tensor

from dir_toolkit.errors import CheckpointError, NotFittedError
from dir_toolkit.experiment.training.checkpoint import load_checkpoint, save_checkpoint
from dir_toolkit.features.fds import FDS
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel
from dir_toolkit.longtail.model import HeadName
from dir_toolkit.priors import LogitAdjuster

VARIANTS: list[dict[str, Any]] = [
    *({"head": head} for head in get_args(HeadName)),
    {"residual": True, "expectation_weight": 0.1},
    {"target_prior": "uniform", "adjust": "in_loss", "loss": "crps"},
    {"loss": "squared_emd", "label_kernel": "laplace", "sigma": 1.0},
    {"head": "regression", "loss": "balanced_mse"},
]
COMPILED = [*({"head": head} for head in ("regression", "gaussian", "affinity")), VARIANTS[5]]  # each readout


@pytest.mark.parametrize("options", [*VARIANTS, {"target_prior": "uniform", "tau": 0.3, "temperature": 2.0}], ids=str)
def test_a_state_restores_another_model(options: dict[str, Any], tmp_path: Path) -> None:
    x, y = batch(40)
    model = ages(**options, fds=FDS(AGES, 6), weights=LDS(AGES).fit(AGE_DENSITY))
    model(x, y)
    model.fds.end_epoch()
    expected = model(x, y)
    path = tmp_path / "state.pt"
    torch.save(model.state_dict(), path)
    # Another prior, or none, is what a fresh model may have been built with: the state brings its own.
    fresh_options = {k: v for k, v in options.items() if k not in ("target_prior", "adjust", "tau", "temperature")}
    fresh = seeded(
        lambda: LongTailModel(
            net(), 6, AGES, density=AGE_DENSITY, **fresh_options, fds=FDS(AGES, 6), weights=LDS(AGES).fit(y)
        ),
        7,
    )
    fresh.load_state_dict(torch.load(path, weights_only=True))
    same_output(fresh(x, y), expected)
    assert list(fresh.state_dict()) == list(model.state_dict())
    save_checkpoint(path, {"model": model.state_dict()})
    fresh.load_state_dict(load_checkpoint(path)["model"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same_output(copied(x, y), expected)
        assert copied.fds is not model.fds
        copied.fds.end_epoch()  # the copy's own statistics, fed by the copy
        assert copied.fds.epoch == 2
    assert model.fds.epoch == 1
    without = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY))
    without.load_state_dict(model.state_dict())  # needs no statistics
    same_output(without.eval()(x, y), model.eval()(x, y))


def test_a_state_of_another_axis_or_without_statistics_is_refused() -> None:
    other = LongTailModel(net(), 6, Bins.uniform(0, 40, width=2))
    with pytest.raises(
        CheckpointError, match=r"^LongTailModel\.load_state_dict: the saved model must be over the same"
    ):
        ages().load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="the saved model must hold FDS statistics, got none"):
        ages(fds=FDS(AGES, 6)).load_state_dict(ages().state_dict())


def test_a_state_holds_tensors_alone_and_averages_like_one() -> None:
    x, y = batch(40)
    for options in ({}, {"head": "gaussian"}, {"target_prior": "uniform"}):
        model = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY), fds=FDS(AGES, 6))
        before = model.state_dict()
        assert all(isinstance(value, Tensor) for value in before.values())
        model(x, y).loss.backward()
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


def test_a_refused_state_changes_nothing() -> None:
    weighted = ages(weights=LDS(AGES).fit(AGE_DENSITY))
    held = {name: value.clone() for name, value in weighted.state_dict().items()}
    inverse = seeded(lambda: LongTailModel(net(), 6, AGES, weights=LDS(AGES, scheme="inverse").fit(AGE_DENSITY)), 3)
    with pytest.raises(CheckpointError, match="the saved weights must have the same settings"):
        weighted.load_state_dict(inverse.state_dict())
    after = weighted.state_dict()
    assert all(torch.equal(value.nan_to_num(-1), held[name].nan_to_num(-1)) for name, value in after.items())

    model = ages(head="gaussian")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = seeded(lambda: LongTailModel(net(), 6, Bins.uniform(0, 40, width=2), head="gaussian"), 3)
    cut = {**other.state_dict(), "_extra_state": model.get_extra_state()[:50]}
    for state in (other.state_dict(), cut, {**model.state_dict(), "_extra_state": {"bins": {}, "fds": None}}):
        with pytest.raises(CheckpointError, match=r"^LongTailModel\.load_state_dict: the saved"):
            model.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("change", [{"head.weight": None}, {"other": torch.ones(1)}, {"head.bias": torch.ones(2)}])
def test_a_state_that_is_refused_late_changes_nothing_either(change: dict[str, Any], assign: bool) -> None:
    x, y = batch(40)

    def trained(seed: int) -> LongTailModel:
        model = seeded(lambda: LongTailModel(net(), 6, AGES, density=AGE_DENSITY, fds=FDS(AGES, 6)), seed)
        model(x, y)
        model.fds.end_epoch()
        return model

    model, other = trained(0), trained(3)
    state = {k: v for k, v in {**other.state_dict(), **change}.items() if v is not None}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x, y)
    with pytest.raises(RuntimeError):
        model.load_state_dict(state, assign=assign)
    same_output(model(x, y), expected)
    model.fds.drop_epoch()
    assert {k: v.tolist() for k, v in model.state_dict().items() if k != "_extra_state"} == {
        k: v.tolist() for k, v in before.items() if k != "_extra_state"
    }
    model.load_state_dict(other.state_dict(), assign=assign)
    same_output(model(x, y), other(x, y))


@pytest.mark.parametrize("options", [*VARIANTS, {"decode": "expectation"}, {"target_prior": "uniform"}], ids=str)
def test_made_and_called_in_inference_mode_first_a_model_trains_later(options: dict[str, Any]) -> None:
    x, y = batch()
    with torch.inference_mode():
        model = ages(**options).eval()
        model(x, y)
        model.read(torch.randn(3, 6))
    model.backbone = net()
    model.train()(x, y).loss.backward()
    assert model.head.weight.grad is not None
    with torch.inference_mode():
        model.eval()(x, y)
        if options.get("head") not in ("regression", "gaussian"):
            model.set_prior("uniform", 0.5)
    model.train()(x, y).loss.backward()


@pytest.mark.parametrize("options", [*VARIANTS, {"target_prior": "uniform"}], ids=str)
def test_made_without_storage_a_model_is_filled_by_a_state(options: dict[str, Any]) -> None:
    x, y = batch()
    expected = ages(**options)
    with torch.device("meta"):
        empty = ages(**options)
    assert {value.device.type for value in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    assert repr(empty).startswith("LongTailModel(")
    assert empty.state_dict().keys() == expected.state_dict().keys()  # as transformers asks for before it loads
    assert copy.deepcopy(empty).state_dict().keys() == expected.state_dict().keys()
    empty.to_empty(device="cpu").load_state_dict(expected.state_dict())
    same_output(empty(x, y), expected(x, y))
    assigned = ages(**options).to("meta")
    assigned.load_state_dict(expected.state_dict(), assign=True)
    same_output(assigned(x, y), expected(x, y))


@pytest.mark.parametrize(
    "options",
    [
        {"target_prior": "uniform"},
        {"target_prior": "uniform", "adjust": "in_loss"},
        {"head": "regression", "loss": "balanced_mse"},
    ],
)
def test_made_without_storage_a_model_with_weights_is_filled_by_a_state(options: dict[str, Any]) -> None:
    x, y = batch(40)

    def made() -> LongTailModel:
        return LongTailModel(net(), 6, AGES, density=AGE_DENSITY, weights=LDS(AGES).fit(AGE_DENSITY), **options)

    expected = made()
    with torch.device("meta"):
        empty = made()
    empty.load_state_dict(expected.state_dict(), assign=True)
    same_output(empty(x, y), expected(x, y))
    if "target_prior" in options:
        for model in (empty, expected):
            model.set_prior("uniform", 0.5)
        same_output(empty(x, y), expected(x, y))
    weights = LDS(AGES).fit(AGE_DENSITY).to("meta")
    with pytest.raises(NotFittedError):
        LongTailModel(net(), 6, AGES, density=AGE_DENSITY, weights=weights, **options)


@pytest.mark.parametrize("covariance", ["diagonal", "full", "low_rank"])
def test_made_without_storage_a_model_with_statistics_is_filled_by_a_state(covariance: Any) -> None:
    x, y = batch(40)

    def made() -> LongTailModel:
        return ages(fds=FDS(AGES, 6, covariance=covariance, rank=2))

    expected = made()
    expected(x, y)
    expected.fds.end_epoch()
    with torch.device("meta"):
        empty = made()
    assert empty.state_dict().keys() == expected.state_dict().keys()
    with pytest.raises(CheckpointError, match="the saved model must hold FDS statistics, got none"):
        expected.load_state_dict(empty.to_empty(device="meta").state_dict())
    for load in (copy.deepcopy(empty), copy.deepcopy(empty).to_empty(device="cpu")):
        load.load_state_dict(expected.state_dict(), assign=True)
        same_output(load(x, y), expected(x, y))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of operations it does not batch
@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("loss") != "balanced_mse"], ids=str)
def test_gradients_of_each_sample_are_those_of_a_loop(options: dict[str, Any]) -> None:
    x, y = batch(4)
    model = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, parameters, (x[None], y[None]))
        return out.loss

    result = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(4):
        model.zero_grad()
        model(x[[i]], y[[i]]).loss.backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(result[name][i], value.grad)


def test_a_cast_to_half_precision_rounds_no_offset() -> None:
    model = ages(target_prior="uniform", tau=0.7, temperature=1.3, adjust="in_loss", residual=True)
    model.set_prior("uniform", 0.4)
    wide = {name: value.clone() for name, value in model.readout.named_buffers()}
    for dtype in (torch.float16, torch.bfloat16):
        cast = copy.deepcopy(model).to(dtype)
        assert cast.head.weight.dtype == dtype
        own = dict(cast.readout.named_buffers())
        for name in ("adjuster.offset", "adjuster.temperature", "loss_offset", "bias", "reach"):
            assert torch.equal(own[name], wide[name]), name
        assert cast.double().readout.adjuster.offset.dtype == torch.float64
    alone = LogitAdjuster(AGE_DENSITY.prior()).half()
    assert torch.equal(alone.offset, LogitAdjuster(AGE_DENSITY.prior()).offset)
    assert alone(torch.zeros(2, 20, dtype=torch.float16)).dtype == torch.float32


def test_fds_follows_the_model_to_its_device() -> None:
    model = ages(fds=FDS(AGES, 6)).to("meta")
    assert model.fds.covariance.scale.device.type == "meta"
    assert model.double().fds.covariance.scale.dtype == torch.float64


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_scores_are_float32_under_autocast(options: dict[str, Any]) -> None:
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ages(**options)(x, y)
    for name in ("loss", "scores", "prediction", "distribution", "residual"):
        assert getattr(out, name).dtype == torch.float32, name


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_it_is_exported_and_saved(options: dict[str, Any]) -> None:
    x, _ = batch()
    model = ages(**options, fds=FDS(AGES, 6)).eval()
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.4 warns of its own nodes
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=sizes), file)
        file.seek(0)
        exported = torch.export.load(file).module()
    for samples in (2, 9):
        for own, other in zip(model(x[:samples]), exported(x[:samples]), strict=True):
            torch.testing.assert_close(own, other, equal_nan=True)


def test_predictions_and_steps_of_every_readout_are_one_graph() -> None:
    def all_of(x: Tensor, y: Tensor) -> list[Tensor]:
        return [*(model(x).prediction for model in read), *(model(x, y).loss for model in trained)]

    x, y = batch()
    read = [ages(**options, fds=FDS(AGES, 6)).eval() for options in COMPILED]
    others = Bins.from_edges(AGES.edges)  # equal bins, which a graph places labels in by themselves
    trained = [
        *(ages(**options, fds=FDS(AGES, 6)) for options in COMPILED),
        ages(),
        ages(fds=FDS(others, 6), weights=LDS(others).fit(AGE_DENSITY)),
    ]
    trained[0].fds.eval()
    torch.testing.assert_close(torch.compile(all_of, backend="eager", fullgraph=True)(x, y), all_of(x, y))
    assert [model.fds.has_open_epoch for model in trained if model.fds] == [False, True, True, True, True]
