from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_tester import Batch, LossTester, close

from dir_toolkit.errors import ShapeError
from dir_toolkit.losses import FocalLoss, cross_entropy, focal_loss


class TestFocalLoss(LossTester):
    function, module = staticmethod(focal_loss), FocalLoss
    variants = {
        "default": {},
        "gamma 0": {"gamma": 0},
        "gamma 0.3": {"gamma": 0.3},
        "gamma 5.5": {"gamma": 5.5},
        "alpha": {"gamma": 1, "alpha": [0.25, 1.0, 0.5, 3.0]},
    }
    rows, reads, classes = "logits", "scores", True

    def batch(self, n: int = 12) -> Batch:
        generator = torch.Generator().manual_seed(0)
        rows = 2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        return {"rows": rows, "target": torch.arange(n) % 4, "weight": weight}

    def oracle(self, rows: list[float], target: int, gamma: float = 2, alpha: Any = (1, 1, 1, 1)) -> float:
        p = math.exp(rows[target]) / sum(math.exp(x) for x in rows)
        return -alpha[target] * (1 - p) ** gamma * math.log(p)


def test_values_are_those_worked_out_by_hand() -> None:
    logits, target = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]]), torch.tensor([0, 1])  # p = 3/4 and 1/4
    values = focal_loss(logits, target, alpha=[1.0, 4.0], reduction="none")
    assert values.tolist() == pytest.approx([math.log(4 / 3) / 16, 4 * 9 / 16 * math.log(4)])
    weight = torch.tensor([2.0, 0.0])
    assert focal_loss(logits, target, weight, gamma=1).item() == pytest.approx(math.log(4 / 3) / 4)


def test_gamma_zero_is_cross_entropy() -> None:
    batch = TestFocalLoss().batch()
    close(focal_loss(batch["rows"], batch["target"], gamma=0), cross_entropy(batch["rows"], batch["target"]), 0)


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


def test_options_are_checked() -> None:
    logits, target = TestFocalLoss().batch()["rows"], TestFocalLoss().batch()["target"]
    for value, kind in ((-1, ValueError), (torch.nan, ValueError), (torch.inf, ValueError), ("2", TypeError)):
        with pytest.raises(kind, match=r"^focal_loss: gamma must be"):
            focal_loss(logits, target, gamma=value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^FocalLoss: gamma must be"):
            FocalLoss(gamma=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^focal_loss: alpha must not be negative, got -1 for class 1"):
        focal_loss(logits, target, alpha=[1, -1, 1, 1])
    with pytest.raises(ValueError, match=r"^FocalLoss: alpha must not be negative, got -1 for class 1"):
        FocalLoss(alpha=[1, -1, 1, 1])
    with pytest.raises(ShapeError, match=r"^focal_loss: alpha must be \(4,\), one value per class, got shape \(\)"):
        focal_loss(logits, target, alpha=0.25)
    with pytest.raises(ShapeError, match=r"^FocalLoss: alpha must be \(4,\), one value per class, got shape \(3,\)"):
        FocalLoss(alpha=torch.ones(3))(logits, target)
