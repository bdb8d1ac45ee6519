from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit.errors import ShapeError
from dir_toolkit.losses.cross_entropy import cross_entropy
from dir_toolkit.losses.focal import focal_loss

ALPHA = [0.25, 1.0, 0.0, 3.0]


def samples(n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 4


def naive(logits: Tensor, target: Tensor, gamma: float, alpha: list[float]) -> Tensor:
    values = []
    for s, y in zip(logits.tolist(), target.tolist(), strict=True):
        p = math.exp(s[y]) / sum(math.exp(x) for x in s)
        values.append(-alpha[y] * (1 - p) ** gamma * math.log(p))
    return torch.tensor(values, dtype=torch.float64)


def test_values_by_hand() -> None:
    logits, target = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]]), torch.tensor([0, 1])  # p = 3/4, 1/4
    values = focal_loss(logits, target, alpha=[1.0, 4.0], reduction="none")
    assert values.tolist() == pytest.approx([math.log(4 / 3) / 16, 4 * 9 / 16 * math.log(4)])
    weight = torch.tensor([2.0, 0.0])
    assert focal_loss(logits, target, weight, gamma=1).item() == pytest.approx(math.log(4 / 3) / 4)


@pytest.mark.parametrize("gamma", [0, 0.3, 1, 2, 5.5])
def test_it_equals_a_naive_loop(gamma: float) -> None:
    logits, target = samples()
    for alpha in (None, ALPHA):
        expected = naive(logits, target, gamma, alpha or [1.0] * 4)
        assert_close(
            focal_loss(logits, target, gamma=gamma, alpha=alpha, reduction="none"), expected, rtol=1e-12, atol=1e-12
        )
    assert not torch.allclose(naive(logits, target, gamma, [1.0] * 4), naive(logits, target, gamma + 1, [1.0] * 4))


@pytest.mark.parametrize("gamma", [0, 0.3, 1, 2])
def test_gradients_agree_with_differences(gamma: float) -> None:
    logits, target = samples(6)
    assert torch.autograd.gradcheck(lambda s: focal_loss(s, target, gamma=gamma, alpha=ALPHA), logits.requires_grad_())


def test_gamma_zero_is_cross_entropy() -> None:
    logits, target = samples()
    assert_close(focal_loss(logits, target, gamma=0), cross_entropy(logits, target), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0, 0.01, 0.5, 1, 2, 3.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_certain_sample_has_a_finite_gradient(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(8, 3, dtype=dtype)
    logits[:, 0] = torch.tensor([0.0, 5.0, 12.0, 16.0, 20.0, 40.0, 1e4, -1e4])
    logits.requires_grad_()
    values = focal_loss(logits, torch.zeros(8, dtype=torch.int64), gamma=gamma, reduction="none")
    values.sum().backward()
    assert values.isfinite().all()
    assert values[6] == 0
    assert values[7].item() == pytest.approx(1e4, rel=1e-3)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[6].tolist() == [0, 0, 0]
    assert logits.grad[0, 0] < 0


def test_settings_are_checked() -> None:
    logits, target = samples()
    for value, kind in ((-1, ValueError), (torch.nan, ValueError), (torch.inf, ValueError), ("2", TypeError)):
        with pytest.raises(kind, match=r"^focal_loss: gamma must be"):
            focal_loss(logits, target, gamma=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^focal_loss: alpha must not be negative, got -1 for class 1"):
        focal_loss(logits, target, alpha=[1, -1, 1, 1])
    with pytest.raises(ValueError, match=r"^focal_loss: alpha must be finite, got nan at index \[0\]"):
        focal_loss(logits, target, alpha=torch.tensor([torch.nan, 1, 1, 1]))
    with pytest.raises(ShapeError, match=r"^focal_loss: alpha must be \(4,\), one value per class, got shape \(\)"):
        focal_loss(logits, target, alpha=0.25)
