from __future__ import annotations

import pytest
import torch
from loss_tester import Batch, LossTester

from dir_toolkit.errors import ShapeError
from dir_toolkit.losses import AffinityLoss, affinity_loss


class TestAffinityLoss(LossTester):
    function, module = staticmethod(affinity_loss), AffinityLoss
    variants = {"default": {}, "small": {"margin": 0.1}, "large": {"margin": 3}}
    rows, reads, classes = "affinities", "scores", True

    def batch(self, n: int = 12) -> Batch:
        generator = torch.Generator().manual_seed(0)
        rows = torch.rand(n, 4, generator=generator, dtype=torch.float64)
        weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        return {"rows": rows, "target": torch.arange(n) % 4, "weight": weight}

    def oracle(self, rows: list[float], target: int, margin: float = 0.75) -> float:
        return sum(max(0.0, margin + d - rows[target]) for j, d in enumerate(rows) if j != target)


def test_values_are_those_worked_out_by_hand() -> None:
    affinities = torch.tensor([[1.0, 0.5, 0.125], [0.25, 0.25, 1.0]])
    values = affinity_loss(affinities, torch.tensor([0, 1]), reduction="none")
    assert values.tolist() == [0.25, 0.75 + 1.5]  # leads of 0.5 and 0.875; of 0 and -0.75
    assert affinity_loss(affinities, torch.tensor([0, 1]), torch.tensor([2, 0])).item() == 0.25


def test_a_lead_beyond_the_margin_costs_nothing_and_pulls_nothing() -> None:
    affinities = torch.tensor([[0.9, 0.1, 0.05]], requires_grad=True)
    loss = affinity_loss(affinities, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert affinities.grad is not None
    assert affinities.grad.tolist() == [[0, 0, 0]]


def test_a_class_that_scores_minus_infinity_costs_the_others_nothing() -> None:
    affinities = torch.tensor([[0.5, 0.5, -torch.inf]], requires_grad=True)
    loss = affinity_loss(affinities, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0.75
    assert affinities.grad is not None
    assert affinities.grad.tolist() == [[-1, 1, 0]]


def test_arguments_are_checked() -> None:
    affinities, target = TestAffinityLoss().batch()["rows"], TestAffinityLoss().batch()["target"]
    with pytest.raises(ShapeError, match=r"^affinity_loss: affinities must be \(N, C\) with C >= 2.*shape \(12, 1\)"):
        affinity_loss(affinities[:, :1], torch.zeros_like(target))
    for value, kind in ((0, ValueError), (-1, ValueError), (torch.inf, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^affinity_loss: margin must be"):
            affinity_loss(affinities, target, margin=value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^AffinityLoss: margin must be"):
            AffinityLoss(margin=value)  # type: ignore[arg-type]
