from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import weighted_mse
from dir_toolkit.errors import ShapeError
from dir_toolkit.losses.gaussian_nll import gaussian_interval, gaussian_nll


def samples(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = 2 * torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    target = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return pred, target, torch.rand(shape, generator=generator, dtype=torch.float64)


def naive(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, beta: float = 0.0, min_variance: float = 1e-20
) -> Tensor:
    """Each label's loss in plain float64 Python."""
    weights = torch.ones_like(target) if weight is None else weight
    values = []
    for (mean, raw), y, w in zip(
        pred.reshape(-1, 2).tolist(), target.reshape(-1).tolist(), weights.reshape(-1).tolist(), strict=True
    ):
        variance = math.exp(raw) + min_variance
        density = math.exp(-((y - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        values.append(w * variance**beta * -math.log(density))
    return torch.tensor(values, dtype=torch.float64).reshape(target.shape)


def test_values_by_hand() -> None:
    pred, target = torch.tensor([[3.0, 0.0], [1.0, math.log(4.0)]]), torch.tensor([3.0, 5.0])
    half = math.log(2 * math.pi) / 2
    expected = [half, 16 / 8 + math.log(2) + half]
    assert gaussian_nll(pred, target, reduction="none").tolist() == pytest.approx(expected, rel=1e-5)
    assert gaussian_nll(pred, target).item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    weighted = gaussian_nll(pred, target, torch.tensor([0.5, 2.0]), reduction="sum")
    assert weighted.item() == pytest.approx(0.5 * expected[0] + 2 * expected[1], rel=1e-5)
    assert gaussian_nll(pred[1:], target[1:], beta=0.5).item() == pytest.approx(2 * expected[1], rel=1e-5)


@pytest.mark.parametrize("shape", [(1,), (50,), (7, 3), (2, 4, 5), ()])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("min_variance", [1e-6, 0.5])
def test_it_equals_a_naive_loop(shape: tuple[int, ...], beta: float, min_variance: float) -> None:
    pred, target, weight = samples(*shape)
    pred[..., 1].clamp_(-3)  # densities far out are zero in plain Python
    settings: dict[str, Any] = {"beta": beta, "min_variance": min_variance}
    for w in (None, weight):
        expected = naive(pred, target, w, **settings)
        close = {"rtol": 1e-12, "atol": 1e-12}
        assert_close(gaussian_nll(pred, target, w, **settings, reduction="none"), expected, **close)
        assert_close(gaussian_nll(pred, target, w, **settings), expected.mean(), **close)
        assert_close(gaussian_nll(pred, target, w, **settings, reduction="sum"), expected.sum(), **close)


def test_the_naive_loop_tells_settings_apart() -> None:
    pred, target, weight = samples(20)
    pred[..., 1].clamp_(-3)
    settings: list[dict[str, Any]] = [{}, {"beta": 0.5}, {"beta": 1}, {"min_variance": 0.5}, {"weight": weight}]
    assert len({round(naive(pred, target, **options).sum().item(), 6) for options in settings}) == len(settings)
    assert not torch.allclose(naive(pred.flip(-1), target), naive(pred, target))


def test_torch_s_own_loss_agrees() -> None:
    pred, target, _ = samples(40)
    expected = F.gaussian_nll_loss(pred[:, 0], target, pred[:, 1].exp(), full=True)
    assert_close(gaussian_nll(pred, target, min_variance=1e-30), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("min_variance", [1e-6, 0.5])
def test_gradients_agree_with_differences(min_variance: float) -> None:
    pred, target, weight = samples(6)
    assert torch.autograd.gradcheck(
        lambda p: gaussian_nll(p, target, weight, min_variance=min_variance), pred.requires_grad_()
    )
    for end in (0, 1):
        assert torch.autograd.gradcheck(lambda p, end=end: gaussian_interval(p, 0.8)[end], pred)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_beta_scales_each_sample_s_gradient_and_lets_none_through(beta: float) -> None:
    pred, target, _ = samples(8)
    plain, scaled = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    gaussian_nll(plain, target).backward()
    gaussian_nll(scaled, target, beta=beta).backward()
    assert plain.grad is not None
    assert scaled.grad is not None
    assert_close(scaled.grad, plain.grad * pred[:, 1:].exp() ** beta, rtol=1e-12, atol=1e-12)


def test_with_beta_one_the_mean_learns_as_under_half_the_squared_error() -> None:
    pred, target, weight = samples(8)
    pred.requires_grad_()
    gaussian_nll(pred, target, weight, beta=1).backward()
    mean = pred.detach()[:, 0].requires_grad_()
    (weighted_mse(mean, target, weight) / 2).backward()
    assert pred.grad is not None
    assert mean.grad is not None
    assert_close(pred.grad[:, 0], mean.grad, rtol=1e-12, atol=1e-12)


def test_the_best_variance_is_the_squared_error() -> None:
    error = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    pred = torch.stack([torch.zeros(3, dtype=torch.float64), error.square().log()], 1).requires_grad_()
    gaussian_nll(pred, error).backward()
    assert pred.grad is not None
    assert_close(pred.grad[:, 1], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_raised_and_far_values_stay_finite(dtype: torch.dtype) -> None:
    pred, target = torch.tensor([[1000.0, -80.0], [2.0, 80.0]]).to(dtype).requires_grad_(), torch.tensor([1001, 1])
    result = gaussian_nll(pred, target, torch.ones(2, dtype=dtype))
    assert result.dtype == torch.float32
    assert result.isfinite()
    result.backward()
    assert pred.grad is not None
    assert_close(result, gaussian_nll(pred.float(), target.float()))
    assert gaussian_nll(pred, target.double()).dtype == torch.float64
    extreme = torch.tensor([[0.0, -1e4], [0.0, 1e4]], requires_grad=True)
    result = gaussian_nll(extreme, torch.zeros(2), min_variance=1e-4, reduction="none")
    assert_close(result, torch.tensor([math.log(1e-4), 1e4]) / 2 + math.log(2 * math.pi) / 2)
    result.sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.tolist() == [[0, 0], [0, 0.5]]
    assert all(end.dtype == torch.float32 for end in gaussian_interval(pred))


def test_weight_two_is_seen_twice_and_weight_zero_is_absent() -> None:
    pred, target, weight = samples(10)
    again = torch.cat([torch.arange(10), torch.tensor([3, 7])])
    doubled = weight.clone()
    doubled[[3, 7]] *= 2
    assert_close(
        gaussian_nll(pred, target, doubled, reduction="sum"),
        gaussian_nll(pred[again], target[again], weight[again], reduction="sum"),
    )
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert_close(gaussian_nll(pred, target, weight), gaussian_nll(pred[order], target[order], weight[order]))
    rest = torch.arange(10) != 4
    weight[4] = 0
    for value in (torch.nan, torch.inf, -torch.inf):
        pred[4] = value
        own = pred.clone().requires_grad_()
        result = gaussian_nll(own, target, weight, beta=0.5, reduction="sum")
        expected = gaussian_nll(pred[rest], target[rest], weight[rest], beta=0.5, reduction="sum")
        assert_close(result, expected)
        result.backward()
        assert own.grad is not None
        assert (own.grad[4] == 0).all()
        assert (own.grad[rest] != 0).all()


def test_inputs_stay_as_they_are_and_the_loss_is_one_graph() -> None:
    pred, target, weight = samples(10)
    copies, rng = [x.clone() for x in (pred, target, weight)], torch.get_rng_state()
    result = gaussian_nll(pred, target, weight)
    lower, upper = gaussian_interval(pred)
    assert all(map(torch.equal, (pred, target, weight), copies))
    assert torch.equal(torch.get_rng_state(), rng)
    x = torch.ones(3, device="meta")
    assert gaussian_nll(torch.ones(3, 2, device="meta"), x, x).device.type == "meta"
    compiled = torch.compile(gaussian_nll, fullgraph=True, backend="eager")
    assert_close(compiled(pred, target, weight), result)
    ends = torch.compile(gaussian_interval, fullgraph=True, backend="eager")(pred)
    assert_close(ends, (lower, upper))


def test_a_prediction_that_is_not_finite_shows() -> None:
    assert gaussian_nll(torch.tensor([[torch.nan, 0.0]]), torch.zeros(1)).isnan()
    assert gaussian_nll(torch.tensor([[torch.inf, 0.0]]), torch.zeros(1)).isinf()
    assert gaussian_nll(torch.tensor([[0.0, torch.nan]]), torch.zeros(1)).isnan()


@pytest.mark.parametrize("level", [1e-9, 0.5, 0.9, 0.999999, 1 - 2**-53])
def test_the_interval_is_that_of_the_normal_distribution(level: float) -> None:
    pred, _, _ = samples(5, 2)
    lower, upper = gaussian_interval(pred, level, min_variance=0.25)
    expected = norm(pred[..., 0], (pred[..., 1].exp() + 0.25).sqrt())
    assert lower.shape == upper.shape == (5, 2)
    assert_close(lower, torch.from_numpy(expected.ppf((1 - level) / 2)), rtol=1e-9, atol=1e-9)
    assert_close(upper, torch.from_numpy(expected.isf((1 - level) / 2)), rtol=1e-9, atol=1e-9)


def test_the_interval_holds_as_many_labels_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(20000, 2, generator=generator)
    target = pred[:, 0] + torch.randn(20000, generator=generator) * (pred[:, 1] / 2).exp()
    for level in (0.5, 0.9):
        lower, upper = gaussian_interval(pred, level)
        assert ((lower <= target) & (target <= upper)).float().mean().item() == pytest.approx(level, abs=0.01)


def test_arguments_are_checked() -> None:
    pred, target, weight = samples(4)
    where = "^gaussian_nll: "
    for value in (torch.nan, torch.inf):
        bad = torch.tensor([1.0, value, 1.0, 1.0])
        with pytest.raises(ValueError, match=where + r"target must be finite, got (nan|inf) at index \[1\]"):
            gaussian_nll(pred, bad)
        with pytest.raises(ValueError, match=where + r"weight must be finite, got (nan|inf) at index \[1\]"):
            gaussian_nll(pred, target, bad)
    with pytest.raises(ValueError, match=where + "weight must not be negative"):
        gaussian_nll(pred, target, -weight)
    for bad in (target, target[:, None], pred[:3], pred.T, torch.ones(())):
        with pytest.raises(ShapeError, match=where + r"pred must be \(4, 2\), a mean and a log-variance .* got shape"):
            gaussian_nll(bad, target)
    with pytest.raises(
        ShapeError, match=where + r"target and weight must have the same shape, got \(4,\) and \(4, 1\)"
    ):
        gaussian_nll(pred, target, weight[:, None])
    with pytest.raises(ValueError, match=where + r"target must hold at least one value, got shape \(0,\)"):
        gaussian_nll(pred[:0], target[:0])
    with pytest.raises(TypeError, match=where + "pred must be floats, got dtype torch.int64"):
        gaussian_nll(pred.long(), target)
    with pytest.raises(TypeError, match=where + "target must be integers or floats, got dtype torch.bool"):
        gaussian_nll(pred, target > 0)
    with pytest.raises(TypeError, match=where + r"target must be a torch\.Tensor, got ndarray"):
        gaussian_nll(pred, target.numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=where + "pred and target must be on the same device, got cpu and meta"):
        gaussian_nll(pred, target.to("meta"))
    with pytest.raises(ValueError, match=where + "reduction must be one of 'none', 'mean', 'sum', got 'avg'"):
        gaussian_nll(pred, target, reduction="avg")  # type: ignore[arg-type]
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=where + "beta must be >= 0 and <= 1, got"):
            gaussian_nll(pred, target, beta=value)
    for value in (0, -1, math.nan):
        with pytest.raises(ValueError, match=where + "min_variance must be > 0, got"):
            gaussian_nll(pred, target, min_variance=value)


def test_the_interval_s_arguments_are_checked() -> None:
    pred, _, _ = samples(4)
    where = "^gaussian_interval: "
    for level in (0, 1, -0.5, 90, math.nan):
        with pytest.raises(ValueError, match=where + "level must be > 0 and < 1, got"):
            gaussian_interval(pred, level)
    with pytest.raises(TypeError, match=where + "level must be a number"):
        gaussian_interval(pred, "90 %")  # type: ignore[arg-type]
    for bad in (pred[:, 0], pred[:, :1], torch.ones(())):
        with pytest.raises(ShapeError, match=where + r"pred must be \(\.\.\., 2\), a mean and a log-variance"):
            gaussian_interval(bad)
    with pytest.raises(TypeError, match=where + "pred must be floats"):
        gaussian_interval(pred.long())
    with pytest.raises(TypeError, match=where + r"pred must be a torch\.Tensor, got list"):
        gaussian_interval(pred.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=where + "min_variance must be > 0, got 0"):
        gaussian_interval(pred, min_variance=0)


@pytest.mark.parametrize("unit", [1e-5, 1e5])
def test_defaults_are_free_of_the_label_s_unit(unit: float) -> None:
    pred, target, _ = samples(8)
    scaled = torch.stack([pred[:, 0] * unit, pred[:, 1] + 2 * math.log(unit)], 1).float()
    given = gaussian_nll(scaled, (target * unit).float())
    assert_close(given, (gaussian_nll(pred, target) + math.log(unit)).float(), rtol=1e-5, atol=1e-5)
    for end, own in zip(gaussian_interval(scaled), gaussian_interval(pred), strict=True):
        assert_close(end, (own * unit).float(), rtol=1e-4, atol=1e-5 * unit)
