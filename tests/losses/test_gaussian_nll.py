from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_tester import Batch, LossTester
from scipy.stats import norm
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import weighted_mse
from dir_toolkit.errors import ShapeError
from dir_toolkit.losses.gaussian_nll import GaussianNLL, gaussian_interval, gaussian_nll


def samples(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = 2 * torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    target = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return pred, target, torch.rand(shape, generator=generator, dtype=torch.float64)


class TestGaussianNLL(LossTester):
    function, module = staticmethod(gaussian_nll), GaussianNLL
    variants = {
        "default": {},
        "beta 0.5": {"beta": 0.5, "min_variance": 1e-6},
        "beta 1": {"beta": 1},
        "wide": {"min_variance": 0.5},
    }
    rows, reads, floor, several = "pred", "scores", None, True

    def batch(self, n: int = 12) -> Batch:
        pred, target, weight = samples(n)
        pred[:, 1].clamp_(-3)  # densities far out are zero in plain Python
        return {"rows": pred, "target": target, "weight": weight + 0.1}

    def oracle(self, rows: list[float], target: float, beta: float = 0, min_variance: float = 1e-20) -> float:
        variance = math.exp(rows[1]) + min_variance
        density = math.exp(-((target - rows[0]) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        return variance**beta * -math.log(density)

    def test_gradients_agree_with_differences(self, options: Any) -> None:
        if "beta" not in options:  # whose factor lets no gradient through
            super().test_gradients_agree_with_differences(options)

    def wild(self, rows: Tensor, size: float) -> Tensor:
        return torch.stack([rows[:, 0].sign() * size, rows[:, 1]], 1)


@pytest.mark.parametrize("label", [0.0, 0.01, 4.0, 10.0])
def test_a_prediction_that_runs_away_is_brought_back(label: float) -> None:
    target = torch.tensor([label])
    for away in (-1e7, -1e4, 1e4, 1e7):
        pred = torch.tensor([[away, 0.0]], requires_grad=True)
        value = gaussian_nll(pred, target)
        value.backward()
        assert value.isfinite()
        assert value > gaussian_nll(torch.tensor([[label, 0.0]]), target)
        assert pred.grad is not None
        assert pred.grad[0, 0].sign().item() == math.copysign(1, away)


@pytest.mark.parametrize("shape", [(7, 3), (2, 4, 5), ()])
def test_any_shape_of_labels_is_taken(shape: tuple[int, ...]) -> None:
    pred, target, weight = samples(*shape)
    flat = gaussian_nll(pred.reshape(-1, 2), target.flatten(), weight.flatten(), reduction="none")
    assert torch.equal(gaussian_nll(pred, target, weight, reduction="none"), flat.view(shape))


def test_values_are_those_worked_out_by_hand() -> None:
    pred, target = torch.tensor([[3.0, 0.0], [1.0, math.log(4.0)]]), torch.tensor([3.0, 5.0])
    half = math.log(2 * math.pi) / 2
    expected = [half, 16 / 8 + math.log(2) + half]
    assert gaussian_nll(pred, target, reduction="none").tolist() == pytest.approx(expected, rel=1e-5)
    assert gaussian_nll(pred, target).item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    weighted = gaussian_nll(pred, target, torch.tensor([0.5, 2.0]), reduction="sum")
    assert weighted.item() == pytest.approx(0.5 * expected[0] + 2 * expected[1], rel=1e-5)
    assert gaussian_nll(pred[1:], target[1:], beta=0.5).item() == pytest.approx(2 * expected[1], rel=1e-5)


def test_torch_s_own_loss_agrees() -> None:
    pred, target, _ = samples(40)
    expected = F.gaussian_nll_loss(pred[:, 0], target, pred[:, 1].exp(), full=True)
    assert_close(gaussian_nll(pred, target, min_variance=1e-30), expected, rtol=1e-12, atol=1e-12)


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
    for bad in (target, target[:, None], pred[:3], pred.T, torch.ones(())):
        with pytest.raises(ShapeError, match=where + r"pred must be \(4, 2\), a mean and a log-variance .* got shape"):
            gaussian_nll(bad, target)
    with pytest.raises(
        ShapeError, match=where + r"target and weight must have the same shape, got \(4,\) and \(4, 1\)"
    ):
        gaussian_nll(pred, target, weight[:, None])
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


def test_the_interval_has_gradients_and_is_one_graph() -> None:
    pred, _, _ = samples(6)
    ends = torch.compile(gaussian_interval, fullgraph=True, backend="eager")(pred)
    assert_close(ends, gaussian_interval(pred))
    for end in (0, 1):
        assert torch.autograd.gradcheck(lambda p, end=end: gaussian_interval(p, 0.8)[end], pred.requires_grad_())
