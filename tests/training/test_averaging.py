from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dir_toolkit.errors import CheckpointError
from dir_toolkit.training.averaging import WeightAverage
from dir_toolkit.training.checkpoint import load_checkpoint, save_checkpoint


class Everything(nn.Module):
    """Tied and frozen parameters, running statistics, an integer, a constant and a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.frozen = nn.Linear(2, 1).requires_grad_(False)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.body[2].weight
        self.register_buffer("constant", torch.tensor([0.1, 1 / 3, 7.0]))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("cache", torch.tensor([2.0]), persistent=False)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def step(model: nn.Module, seed: int) -> None:
    """Move everything that training moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    model.body(torch.randn(5, 3, generator=generator, dtype=model.body[0].weight.dtype))  # running statistics


def naive(history: list[dict[str, Tensor]], decay: float, warm: bool) -> dict[str, Tensor]:
    """The average, one number after the other."""
    found = {}
    for name, first in history[0].items():
        if not first.is_floating_point() or not first.isfinite().all():
            found[name] = history[-1][name]
            continue
        rows = [states[name].flatten().tolist() for states in history]
        values = rows[0]
        for t, row in enumerate(rows[1:], 1):
            d = min(decay, t / (t + 9)) if warm else decay
            values = [d * mean + (1 - d) * value for mean, value in zip(values, row, strict=True)]
        found[name] = torch.tensor(values, dtype=first.dtype).reshape(first.shape)
    return found


@pytest.mark.parametrize(("decay", "warm"), [(0.9, False), (0.9, True), (0.2, True), (0.0, False)])
def test_average_is_that_of_a_naive_loop(decay: float, warm: bool) -> None:
    model = Everything().double()
    average = WeightAverage(model, decay, warm=warm)
    history = [tensors(model)]
    for seed in range(12):
        step(model, seed)
        average.update()
        history.append(tensors(model))
    expected = naive(history, decay, warm)
    with average.applied():
        found = tensors(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    wrong = naive(history, 0.5, warm)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found["tied.bias"], wrong["tied.bias"], rtol=1e-12, atol=1e-12)


def test_own_weights_come_back_to_the_bit_whatever_happens_inside() -> None:
    model = Everything()
    average = WeightAverage(model, 0.5)
    step(model, 0)
    average.update()
    before, addresses = tensors(model), [value.data_ptr() for value in model.parameters()]

    def use() -> None:
        with average.applied() as same:
            assert same is model
            assert not equal(tensors(model), before)
            step(model, 1)  # in training mode: the integer counts on, the statistics move
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert equal(tensors(model), before)
    assert [value.data_ptr() for value in model.parameters()] == addresses
    assert not equal(tensors(model), {name: value + 1 for name, value in before.items()})


def test_what_never_moves_keeps_its_bits_and_what_has_no_mean_is_the_models_own() -> None:
    model = Everything()
    average = WeightAverage(model, 0.9)
    before = tensors(model)
    for seed in range(30):
        step(model, seed)
        average.update()
    with average.applied():
        inside = tensors(model)
    for name in ("constant", "mask", "cache", "frozen.weight"):
        assert torch.equal(inside[name], before[name]), name
    assert inside["body.1.num_batches_tracked"] == 30


def test_tied_parameters_are_averaged_once() -> None:
    model = Everything()
    average = WeightAverage(model, 0.5, warm=False)
    assert "tied.weight" not in average.state_dict()["average"]
    with average.applied():
        assert model.tied.weight is model.body[2].weight


def test_half_precision_is_averaged_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.999, warm=False)
    nn.init.ones_(model.weight)
    for _ in range(1000):
        average.update()
    found = average.state_dict()["average"]["weight"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1 - 0.999**1000, abs=1e-4)  # in bfloat16 it would stop at 1/4
    with average.applied():
        assert model.weight.dtype == torch.bfloat16
        assert torch.equal(model.weight, found.bfloat16())


def test_a_model_may_change_its_dtype() -> None:
    model = nn.Linear(2, 1)
    average = WeightAverage(model)
    model.double()
    average.update()
    assert average.state_dict()["average"]["weight"].dtype == torch.float64


def test_checkpoint_goes_on_with_equal_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything()
    average = WeightAverage(model, 0.9)
    for seed in range(3):
        step(model, seed)
        average.update()
    save_checkpoint(tmp_path / "a.pt", {"model": model.state_dict(), "average": average.state_dict()})
    saved = load_checkpoint(tmp_path / "a.pt")
    other = Everything()
    resumed = WeightAverage(other, 0.9)
    other.load_state_dict(saved["model"])
    other.frozen.load_state_dict(model.frozen.state_dict())
    resumed.load_state_dict(saved["average"])
    assert resumed.updates == 3
    for seed in range(3, 6):
        for one, its in ((model, average), (other, resumed)):
            step(one, seed)
            its.update()
    assert equal(average.state_dict()["average"], resumed.state_dict()["average"])


def test_states_are_copies() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.5)
    state = average.state_dict()
    average.load_state_dict(state)
    kept = state["average"]["weight"].clone()
    nn.init.constant_(model.weight, 9.0)
    average.update()
    assert torch.equal(state["average"]["weight"], kept)


def test_deep_copy_keeps_the_pair() -> None:
    model = Everything()
    average = WeightAverage(model, 0.5)
    other, its = copy.deepcopy((model, average))
    assert its.model is other
    before = average.state_dict()["average"]
    step(other, 0)
    its.update()
    assert (its.updates, average.updates) == (1, 0)
    assert equal(average.state_dict()["average"], before)
    assert not equal(its.state_dict()["average"], before)


def test_no_graph_is_kept_and_training_goes_on() -> None:
    model = nn.Linear(2, 1)
    average = WeightAverage(model)
    model(torch.ones(1, 2)).sum().backward()
    average.update()
    with average.applied():
        assert torch.is_grad_enabled()
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(value.requires_grad for value in average.state_dict()["average"].values())
    assert model.weight.grad is not None
    model(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.ReLU(), {}, ValueError, "WeightAverage: model must hold finite floats to average, got none in ReLU"),
        (nn.LazyLinear(1), {}, ValueError, "model must have values in all its parameters, got none in 'weight'"),
        (nn.Linear(1, 1, device="meta"), {}, ValueError, "got none in 'weight'. Load the weights"),
        (nn.Linear(1, 1), {"decay": 1}, ValueError, "decay must be >= 0 and < 1, got 1"),
        (nn.Linear(1, 1), {"decay": "slow"}, TypeError, "decay must be a number"),
        (nn.Linear(1, 1), {"warm": 1}, TypeError, "warm must be a bool"),
        (torch.ones(1), {}, TypeError, "model must be a Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_wrong_arguments(model: nn.Module, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightAverage(model, **options)  # type: ignore[arg-type]


def test_wrong_times() -> None:
    model = nn.Linear(2, 1)
    average = WeightAverage(model)
    with average.applied():
        with pytest.raises(RuntimeError, match="update: the model must have its own weights, got the averaged ones"):
            average.update()
        with pytest.raises(RuntimeError, match="applied: it must not be nested"), average.applied():
            pass
    average.update()
    model.weight = nn.Parameter(torch.ones(1, 3))
    for use in (average.update, lambda: average.applied().__enter__()):
        with pytest.raises(RuntimeError, match=r"keep 'weight' torch.float32 of shape \(1, 2\), got .* \(1, 3\)"):
            use()
    del model.weight
    with pytest.raises(RuntimeError, match="got absent"):
        average.update()


def test_wrong_states() -> None:
    average = WeightAverage(nn.Linear(2, 1))
    state = average.state_dict()
    before = average.state_dict()["average"]
    with pytest.raises(ValueError, match="state must have the keys"):
        average.load_state_dict({"updates": 1})
    with pytest.raises(ValueError, match="updates must be at least 0"):
        average.load_state_dict({**state, "updates": -1})
    with pytest.raises(TypeError, match="average must be a Mapping"):
        average.load_state_dict({**state, "average": 3})
    for wrong in ({}, {**before, "more": before["bias"]}, {**before, "weight": torch.ones(3)}, {**before, "bias": 1}):
        with pytest.raises(CheckpointError, match="average must be of this model, with "):
            average.load_state_dict({"updates": 1, "average": wrong})
    assert average.updates == 0
    assert equal(average.state_dict()["average"], before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_step_waits_for_the_device_and_averages_follow_the_model() -> None:
    model = Everything()
    average = WeightAverage(model, 0.9)
    model.cuda()
    average.update()
    try:
        torch.cuda.set_sync_debug_mode("error")
        average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.state_dict()["average"]["constant"].is_cuda
