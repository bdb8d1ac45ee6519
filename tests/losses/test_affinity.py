from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit.errors import ShapeError
from dir_toolkit.losses.affinity import affinity_loss


def samples(n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 4


def naive(affinities: Tensor, target: Tensor, margin: float) -> Tensor:
    values = [
        sum(max(0.0, margin + d[j] - d[y]) for j in range(len(d)) if j != y)
        for d, y in zip(affinities.tolist(), target.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def test_values_by_hand() -> None:
    affinities = torch.tensor([[1.0, 0.5, 0.125], [0.25, 0.25, 1.0]])
    values = affinity_loss(affinities, torch.tensor([0, 1]), reduction="none")
    assert values.tolist() == [0.25, 0.75 + 1.5]  # leads of 0.5 and 0.875; of 0 and -0.75
    assert affinity_loss(affinities, torch.tensor([0, 1]), torch.tensor([2, 0])).item() == 0.25


@pytest.mark.parametrize("margin", [0.1, 0.75, 3])
def test_it_equals_a_naive_loop(margin: float) -> None:
    affinities, target = samples()
    expected = naive(affinities, target, margin)
    assert_close(affinity_loss(affinities, target, margin=margin, reduction="none"), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, naive(affinities, target, margin + 0.1))


def test_gradients_agree_with_differences() -> None:
    affinities, target = samples(8)
    assert torch.autograd.gradcheck(lambda d: affinity_loss(d, target, margin=0.4), affinities.requires_grad_())


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
    affinities, target = samples()
    with pytest.raises(
        ShapeError, match=r"^affinity_loss: affinities must be \(N, C\) with C >= 2.*got shape \(30, 1\)"
    ):
        affinity_loss(affinities[:, :1], torch.zeros_like(target))
    for value, kind in ((0, ValueError), (-1, ValueError), (torch.inf, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^affinity_loss: margin must be"):
            affinity_loss(affinities, target, margin=value)  # type: ignore[arg-type]
