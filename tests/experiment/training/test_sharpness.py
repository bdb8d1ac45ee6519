from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.experiment.training.sharpness import BSAM, uphill

BINS = dt.Bins.uniform(0, 5, width=1)
MATRIX = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def closed(optimizer: Any, loss_of: Any) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def test_steps_on_a_quadratic_are_those_of_the_formula() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = BSAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), rho=0.3)
    expected, velocity, a = w.detach().numpy().copy(), np.zeros(2), MATRIX.numpy()
    for _ in range(10):
        before = expected @ a @ expected / 2
        gradient = a @ expected
        velocity = 0.9 * velocity + a @ (expected + 0.3 * gradient / np.linalg.norm(gradient))
        expected = expected - 0.1 * velocity
        loss = optimizer.step(closed(optimizer, lambda: w @ MATRIX @ w / 2))
        assert loss.item() == pytest.approx(before)  # that of the first pass
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-6)


def test_both_passes_have_the_weights_of_the_label_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = torch.rand(40, generator=generator, dtype=torch.float64) ** 3 * 5
    lds = dt.LDS(BINS, kernel=None).fit(y)
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = BSAM(torch.optim.SGD([w], lr=0.05), rho=0.1)
    counts = np.bincount(y.int().numpy(), minlength=5)
    weights = counts[y.int().numpy()] ** -0.5
    weights = weights / weights.mean()

    def gradient(place: np.ndarray) -> np.ndarray:
        return 2 * (weights[:, None] * x.numpy() * (x.numpy() @ place - y.numpy())[:, None]).mean(0)

    expected = np.zeros(3)
    for _ in range(5):
        first = gradient(expected)
        expected = expected - 0.05 * gradient(expected + 0.1 * first / np.linalg.norm(first))
        optimizer.step(closed(optimizer, lambda: dt.weighted_mse(x @ w, y, lds(y))))
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-5)


def test_without_a_way_uphill_it_is_the_base_optimizer() -> None:
    runs = []
    for make in (partial(BSAM, rho=1e-12), lambda base: base):
        w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = make(torch.optim.Adam([w], lr=0.1))
        for _ in range(5):
            optimizer.step(closed(optimizer, lambda w=w: w @ MATRIX @ w / 2))
        runs.append(w.detach())
    assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-9)


def test_a_sharp_minimum_is_left() -> None:
    """At 0 a minimum that is narrower than the way uphill, in a wide valley."""

    def loss_of(w: Tensor) -> Tensor:
        return (0.1 * (w - 2).square() - 0.5 * torch.exp(-(w.square()) / 0.05)).sum()

    ends = []
    for rho in (1e-9, 0.5):
        w = nn.Parameter(torch.tensor([0.02], dtype=torch.float64))
        optimizer = BSAM(torch.optim.SGD([w], lr=0.02), rho=rho)
        for _ in range(300):
            optimizer.step(closed(optimizer, lambda w=w: loss_of(w)))
        ends.append(w.item())
    assert abs(ends[0]) < 0.1
    assert ends[1] > 0.4


def test_parameters_come_back_to_the_bit_and_statistics_move_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[2].bias.requires_grad_(False)
    x = torch.randn(8, 3)
    model(x).square().mean().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with uphill(model.parameters(), 0.5, model):
        moved = torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()])
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
        model(x)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    optimizer = BSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    optimizer.step(closed(optimizer, lambda: model(x).square().mean()))
    once = 0.9 * before["1.running_mean"] + 0.1 * (x @ before["0.weight"].T + before["0.bias"]).mean(0)
    assert_close(model[1].running_mean, once)
    assert model[1].num_batches_tracked == before["1.num_batches_tracked"] + 1


def test_schedulers_and_states_go_through_to_the_base() -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = BSAM(torch.optim.SGD([w], lr=0.5, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    closure = closed(optimizer, lambda: w @ MATRIX @ w / 2)
    optimizer.step(closure)
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    state = copy.deepcopy(optimizer.state_dict())
    twin = nn.Parameter(w.detach().clone())
    other = BSAM(torch.optim.SGD([twin], lr=9.0))
    other.load_state_dict(state)
    other.step(closed(other, lambda: twin @ MATRIX @ twin / 2))
    optimizer.step(closure)
    assert torch.equal(twin, w)


def test_a_copy_steps_on_its_own_parameters() -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = type("Own", (BSAM,), {})(torch.optim.SGD([w], lr=0.5, momentum=0.9), rho=0.2)
    optimizer.step(closed(optimizer, lambda: w @ MATRIX @ w / 2))
    twin, other = copy.deepcopy((w, optimizer))
    before = w.detach().clone()
    other.step(closed(other, lambda: twin @ MATRIX @ twin / 2))
    assert torch.equal(w, before)
    optimizer.step(closed(optimizer, lambda: w @ MATRIX @ w / 2))
    assert torch.equal(twin, w)
    assert other.rho == 0.2
    assert type(other) is type(optimizer)


def test_a_plain_loop_learns_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=generator)
    y = 2.5 + 2 * torch.tanh(x[:, 0])
    lds = dt.LDS(BINS).fit(y)
    torch.manual_seed(0)
    model = dt.LongTailModel(nn.Linear(3, 8), 8, BINS, head="regression")
    optimizer = BSAM(torch.optim.Adam(model.parameters(), 0.05), rho=0.02, model=model)
    for _ in range(80):
        optimizer.step(closed(optimizer, lambda: model(x, y, lds(y)).loss))
    assert dt.weighted_l1(model(x).prediction, y).item() < 0.4


def test_arguments_are_checked() -> None:
    w = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"^BSAM: base must be an? Optimizer, got list"):
        BSAM([w])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^BSAM: rho must be > 0, got 0"):
        BSAM(base, rho=0)
    with pytest.raises(TypeError, match=r"model must be an? Module, got int"):
        BSAM(base, model=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"closure must be a function .* got NoneType\. Call step\(closure\)"):
        BSAM(base).step()
