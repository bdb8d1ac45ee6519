from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import weighted_focal_l1, weighted_focal_mse, weighted_huber, weighted_l1, weighted_mse
from dir_toolkit.errors import ShapeError

Loss = Callable[..., Tensor]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focus(e: float, beta: float, gamma: float, variant: str) -> float:
    s = sigmoid(beta * abs(e))
    return (s if variant == "paper" else 2 * s - 1) ** gamma


# Each loss, and what it makes of one error.
LOSSES: dict[str, tuple[Loss, Callable[[float], float]]] = {
    "l1": (weighted_l1, abs),
    "mse": (weighted_mse, lambda e: e * e),
    "huber": (weighted_huber, lambda e: e * e / 2 if abs(e) < 1 else abs(e) - 0.5),
    "huber 3": (
        partial(weighted_huber, delta=3.0),
        lambda e: e * e / 6 if abs(e) < 3 else abs(e) - 1.5,
    ),
    "focal l1": (weighted_focal_l1, lambda e: focus(e, 0.2, 1, "paper") * abs(e)),
    "focal mse": (weighted_focal_mse, lambda e: focus(e, 0.2, 1, "paper") * e * e),
}
for gamma in (0, 0.5, 2):
    for variant in ("paper", "reference"):
        options: dict[str, Any] = {"beta": 0.7, "gamma": gamma, "variant": variant}
        LOSSES[f"focal l1 {variant} {gamma}"] = (
            partial(weighted_focal_l1, **options),
            lambda e, o=options: focus(e, **o) * abs(e),  # type: ignore[misc]
        )
        LOSSES[f"focal mse {variant} {gamma}"] = (
            partial(weighted_focal_mse, **options),
            lambda e, o=options: focus(e, **o) * e * e,  # type: ignore[misc]
        )

each_loss = pytest.mark.parametrize("name", LOSSES)
plain = pytest.mark.parametrize(
    "loss", [weighted_l1, weighted_mse, weighted_huber, weighted_focal_l1, weighted_focal_mse]
)


def naive(one: Callable[[float], float], pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Any:
    """The loss in plain float64 Python, error by error."""
    p, t = pred.flatten().tolist(), target.flatten().tolist()
    w = [1.0] * len(p) if weight is None else weight.flatten().tolist()
    values = [c * one(a - b) for a, b, c in zip(p, t, w, strict=True)]
    if reduction == "none":
        return torch.tensor(values, dtype=torch.float64).view(pred.shape)
    return torch.tensor(sum(values) / (len(values) if reduction == "mean" else 1), dtype=torch.float64)


def samples(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred, target = (3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).unbind()
    return pred, target, torch.rand(shape, generator=generator, dtype=torch.float64)


@each_loss
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_sample_of_weight_zero_leaves_no_trace(name: str, value: float) -> None:
    loss = LOSSES[name][0]
    pred, target, weight = samples(6)
    weight[4] = 0
    pred[4] = value
    pred.requires_grad_()
    result = loss(pred, target, weight, reduction="sum")
    rest = torch.arange(6) != 4
    assert_close(result, loss(pred[rest], target[rest], weight[rest], reduction="sum"), rtol=1e-12, atol=1e-12)
    result.backward()
    assert pred.grad is not None
    assert pred.grad[4] == 0
    assert (pred.grad[rest] != 0).all()


def test_values_by_hand() -> None:
    pred, target = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 4.0, 4.5])  # errors 0, -2, 0.5
    weight = torch.tensor([9.0, 0.5, 2.0])
    assert weighted_l1(pred, target).item() == pytest.approx(2.5 / 3)
    assert weighted_l1(pred, target, weight).item() == pytest.approx((1 + 1) / 3)  # by N, not by the sum of weights
    assert weighted_mse(pred, target, weight, reduction="sum").item() == pytest.approx(2 + 0.5)
    assert weighted_huber(pred, target, reduction="none").tolist() == [0, 1.5, 0.125]
    assert weighted_huber(pred, target, delta=4, reduction="none").tolist() == [0, 0.5, 0.03125]
    expected = [0, 2 * sigmoid(0.4), 0.5 * sigmoid(0.1)]
    assert weighted_focal_l1(pred, target, reduction="none").tolist() == pytest.approx(expected)
    expected = [0, 4 * (2 * sigmoid(0.4) - 1) ** 2, 0.25 * (2 * sigmoid(0.1) - 1) ** 2]
    given = weighted_focal_mse(pred, target, gamma=2, variant="reference", reduction="none")
    assert given.tolist() == pytest.approx(expected)


@each_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(1,), (50,), (7, 3), (2, 4, 5), ()])
def test_every_loss_equals_a_naive_loop(name: str, reduction: str, shape: tuple[int, ...]) -> None:
    loss, one = LOSSES[name]
    pred, target, weight = samples(*shape)
    for w in (None, weight):
        expected = naive(one, pred, target, w, reduction)
        assert_close(loss(pred, target, w, reduction=reduction), expected, rtol=1e-12, atol=1e-12)


def test_the_naive_loop_tells_losses_apart() -> None:
    pred, target, weight = samples(20)
    values = [naive(one, pred, target, weight, "mean").item() for _, one in LOSSES.values()]
    values += [naive(abs, pred, target, None, "mean").item(), naive(abs, pred, target, weight, "sum").item()]
    assert len({round(value, 9) for value in values}) == len(values) - 4  # gamma 0 is the plain loss, four times


def test_torch_s_own_losses_agree() -> None:
    pred, target, _ = samples(40)
    for reduction in ("none", "mean", "sum"):
        ours = partial(assert_close, rtol=1e-13, atol=1e-13)
        ours(weighted_l1(pred, target, reduction=reduction), F.l1_loss(pred, target, reduction=reduction))  # type: ignore[arg-type]
        ours(weighted_mse(pred, target, reduction=reduction), F.mse_loss(pred, target, reduction=reduction))  # type: ignore[arg-type]
        for delta in (0.5, 1.0, 4.0):
            huber = weighted_huber(pred, target, delta=delta, reduction=reduction)  # type: ignore[arg-type]
            ours(huber, F.smooth_l1_loss(pred, target, beta=delta, reduction=reduction))
            ours(huber, F.huber_loss(pred, target, delta=delta, reduction=reduction) / delta)


@each_loss
def test_gradients_agree_with_differences(name: str) -> None:
    loss, _ = LOSSES[name]
    target, weight = torch.zeros(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    pred = torch.tensor([-4.0, -2.0, -0.3, 0.4, 1.7, 5.0], dtype=torch.float64, requires_grad=True)  # off the kinks
    assert torch.autograd.gradcheck(lambda p: loss(p, target, weight), pred)


@pytest.mark.parametrize("loss", [weighted_focal_l1, weighted_focal_mse])
@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("gamma", [0, 0.01, 0.5, 1, 2, 3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_perfect_prediction_has_no_gradient_under_focal_losses(
    loss: Loss, variant: str, gamma: float, dtype: torch.dtype
) -> None:
    pred = torch.tensor([1.0, 2.0, 1e-3], dtype=dtype, requires_grad=True)
    loss(pred, torch.tensor([1.0, 4.0, 0.0]), gamma=gamma, variant=variant).backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    assert pred.grad[0] == 0
    assert pred.grad[1] < 0


@each_loss
def test_weight_two_is_seen_twice_and_weight_zero_is_absent(name: str) -> None:
    loss, _ = LOSSES[name]
    pred, target, weight = samples(10)
    again = torch.cat([torch.arange(10), torch.tensor([3, 7])])
    doubled = weight.clone()
    doubled[[3, 7]] *= 2
    assert_close(
        loss(pred, target, doubled, reduction="sum"), loss(pred[again], target[again], weight[again], reduction="sum")
    )
    weight[4] = 0
    rest = torch.arange(10) != 4
    assert_close(
        loss(pred, target, weight, reduction="sum"), loss(pred[rest], target[rest], weight[rest], reduction="sum")
    )
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert_close(loss(pred, target, weight), loss(pred[order], target[order], weight[order]))


@each_loss
def test_inputs_and_global_state_stay_as_they_are(name: str) -> None:
    loss, _ = LOSSES[name]
    pred, target, weight = samples(10)
    copies = [x.clone() for x in (pred, target, weight)]
    rng = torch.get_rng_state()
    loss(pred, target, weight)
    assert all(map(torch.equal, (pred, target, weight), copies))
    assert torch.equal(torch.get_rng_state(), rng)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_raised_to_float32_before_subtracting(name: str, dtype: torch.dtype) -> None:
    loss, _ = LOSSES[name]
    pred, target = torch.tensor([1000.0, 60000.0]).to(dtype), torch.tensor([1001, 59000])
    result = loss(pred, target, torch.ones(2, dtype=dtype))
    assert result.dtype == torch.float32
    assert_close(result, loss(pred.float(), target.float()))
    assert result.isfinite()
    assert loss(pred, target.double()).dtype == torch.float64


def test_whole_number_targets_are_not_wrapped_around() -> None:
    pred = torch.tensor([250.0, 1.0])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int64):
        target = torch.tensor([255, 2]).to(dtype)
        assert weighted_l1(pred, target, reduction="none").tolist() == [5, 1]
        assert weighted_l1(pred, pred, target).item() == 0


@each_loss
def test_a_prediction_that_is_not_finite_shows(name: str) -> None:
    loss, _ = LOSSES[name]
    assert loss(torch.tensor([1.0, float("nan")]), torch.zeros(2)).isnan()
    assert loss(torch.tensor([1.0, float("inf")]), torch.zeros(2)).isinf()


@plain
def test_values_that_are_not_finite_are_refused_by_name_and_place(loss: Loss) -> None:
    ok, where = torch.ones(2, 2), f"^{loss.__name__}: "
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.tensor([[1.0, 1.0], [value, 1.0]])
        for name, arguments in (("target", (ok, bad)), ("weight", (ok, ok, bad))):
            with pytest.raises(ValueError, match=rf"{where}{name} must be finite, got -?(nan|inf) at index \[1, 0\]"):
                loss(*arguments)
    with pytest.raises(ValueError, match=f"{where}weight must not be negative, got a minimum of -1"):
        loss(ok, ok, torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))


@plain
def test_shapes_never_broadcast_and_the_fix_is_named(loss: Loss) -> None:
    row, column, where = torch.ones(3), torch.ones(3, 1), f"^{loss.__name__}: "
    both = "must have the same shape, got"
    with pytest.raises(
        ShapeError, match=rf"{where}pred and target {both} \(3, 1\) and \(3,\)\. Use pred\.squeeze\(1\)\.$"
    ):
        loss(column, row)
    with pytest.raises(
        ShapeError, match=rf"{where}pred and target {both} \(3,\) and \(3, 1\)\. Use target\.squeeze\(1\)\.$"
    ):
        loss(row, column)
    with pytest.raises(
        ShapeError, match=rf"{where}pred and weight {both} \(3,\) and \(3, 1\)\. Use weight\.squeeze\(1\)\.$"
    ):
        loss(row, row, column)
    for other in (torch.ones(()), torch.ones(1), torch.ones(4), torch.ones(1, 3)):
        with pytest.raises(ShapeError, match=r"Labels are never broadcast: bring both to one shape\.$"):
            loss(row, other)


@plain
def test_empty_raises(loss: Loss) -> None:
    for shape in ((0,), (0, 3)):
        with pytest.raises(ValueError, match=rf"^{loss.__name__}: pred must hold at least one value, got shape \(0,"):
            loss(torch.ones(shape), torch.ones(shape))


@plain
def test_other_kinds_of_arguments_are_refused_by_name(loss: Loss) -> None:
    ok, where = torch.ones(2), f"^{loss.__name__}: "
    for value in ([1.0, 1.0], ok.numpy(), "ab", 1.0):
        for name, arguments in (("pred", (value, ok)), ("target", (ok, value)), ("weight", (ok, ok, value))):
            with pytest.raises(TypeError, match=rf"{where}{name} must be a torch\.Tensor, got .* Use torch\.as_tensor"):
                loss(*arguments)
    with pytest.raises(TypeError, match=f"{where}target must be a torch.Tensor, got NoneType"):
        loss(ok, None)
    for value in (ok.bool(), ok.to(torch.complex64)):
        for name, arguments in (("target", (ok, value)), ("weight", (ok, ok, value))):
            with pytest.raises(TypeError, match=f"{where}{name} must be integers or floats, got dtype torch"):
                loss(*arguments)
    with pytest.raises(TypeError, match=f"{where}pred must be floats, got dtype torch.int64"):
        loss(ok.long(), ok)
    with pytest.raises(TypeError, match=f"{where}weight must be dense"):
        loss(ok, ok, ok.to_sparse())
    with pytest.raises(ValueError, match=f"{where}pred and target must be on the same device, got cpu and meta"):
        loss(ok, ok.to("meta"))
    for value in ("avg", None, True):
        with pytest.raises(ValueError, match=f"{where}reduction must be one of 'none', 'mean', 'sum', got"):
            loss(ok, ok, reduction=value)


def test_settings_are_checked() -> None:
    ok = torch.ones(2)
    for value, kind in ((0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^weighted_huber: delta must be"):
            weighted_huber(ok, ok, delta=value)  # type: ignore[arg-type]
        for loss in (weighted_focal_l1, weighted_focal_mse):
            with pytest.raises(kind, match=f"^{loss.__name__}: beta must be"):
                loss(ok, ok, beta=value)  # type: ignore[arg-type]
            if value != 0:
                with pytest.raises(kind, match=f"^{loss.__name__}: gamma must be"):
                    loss(ok, ok, gamma=value)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=f"^{loss.__name__}: variant must be one of 'paper', 'reference', got"):
                loss(ok, ok, variant="tanh")  # type: ignore[arg-type]


@plain
def test_accelerators_are_not_read_and_the_loss_is_one_graph(loss: Loss) -> None:
    x = torch.ones(3, device="meta")
    assert loss(x, x, x).device.type == "meta"
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    pred, target, weight = samples(5)
    assert_close(compiled(pred, target, weight), loss(pred, target, weight))
