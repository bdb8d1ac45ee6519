from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_tester import Batch, LossTester
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from dir_toolkit.errors import ShapeError
from dir_toolkit.losses.center import CenterLoss, center_loss

CENTERS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def samples(n: int = 20, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features, classes of which the fourth is never met, and centers."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 3, generator=generator, dtype=dtype)
    target = torch.tensor([0, 1, 0, 2, 0])[torch.arange(n) % 5]
    return features, target, torch.randn(4, 3, generator=generator, dtype=dtype)


def module(centers: Tensor, strength: float = 1.0) -> CenterLoss:
    center = CenterLoss(*centers.T.shape, strength=strength).to(centers.dtype)
    center.load_state_dict({"centers": centers})
    return center


def made(centers: Tensor | None = None) -> CenterLoss:
    return module(CENTERS if centers is None else centers)


class TestCenterLoss(LossTester):
    function, module = staticmethod(center_loss), staticmethod(made)
    variants = {"some": {"centers": CENTERS}, "others": {"centers": CENTERS.flip(0)}}
    rows, reads, classes = "features", "features", True

    def batch(self, n: int = 12) -> Batch:
        features, target, _ = samples(n)
        weight = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
        return {"rows": features, "target": target, "weight": weight}

    def oracle(self, rows: list[float], target: int, centers: Tensor) -> float:
        return sum((a - b) ** 2 for a, b in zip(rows, centers[target].tolist(), strict=True)) / 2


def paper_step(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
    """Equation 4 of Wen et al., class by class."""
    step = torch.zeros_like(centers)
    for j in range(len(centers)):
        mine = features[target == j]
        step[j] = (centers[j] - mine).sum(0) / (1 + len(mine))
    return step


def test_values_are_those_worked_out_by_hand() -> None:
    features, centers = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert center_loss(features, torch.tensor([1, 0]), centers=centers, reduction="none").tolist() == [0, 12.5]
    assert center_loss(features, torch.tensor([0, 1]), torch.tensor([2, 1]), centers=centers).item() == (5 + 4) / 2


@pytest.mark.parametrize("strength", [1.0, 0.003, 40.0])
def test_the_centers_move_as_the_paper_moves_them_whatever_the_strength(strength: float) -> None:
    features, target, centers = samples()
    center = module(centers, strength)
    optimizer = torch.optim.SGD(center.parameters(), lr=0.5)
    expected = centers.clone()
    for _ in range(3):
        optimizer.zero_grad()
        center(features, target).backward()
        assert center.centers.grad is not None
        assert_close(center.centers.grad, paper_step(features, target, expected), rtol=1e-12, atol=1e-12)
        optimizer.step()
        expected -= 0.5 * paper_step(features, target, expected)
    assert_close(center.centers.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(center.centers[3], centers[3])  # no sample, no step


def test_the_derivative_is_what_the_docstring_says_the_gradient_is_not() -> None:
    features, target, centers = samples()
    centers.requires_grad_()
    center_loss(features, target, centers=centers).backward()
    count = torch.bincount(target, minlength=4)[:, None]
    assert centers.grad is not None
    scaled = centers.grad * len(target) / (1 + count)
    assert_close(scaled, paper_step(features, target, centers.detach()), rtol=1e-12, atol=1e-12)


def test_a_sample_pulls_its_center_as_so_many_samples_as_its_weight_says() -> None:
    def pull(features: list[float], weight: list[float] | None) -> float:
        center, rows = CenterLoss(1, 1).double(), torch.tensor(features, dtype=torch.float64)[:, None]
        target = torch.zeros(len(features), dtype=torch.int64)
        center(rows, target, None if weight is None else torch.tensor(weight, dtype=torch.float64)).backward()
        assert center.centers.grad is not None
        return center.centers.grad.item()

    assert pull([3.0, 6.0], [2.0, 0.5]) == pytest.approx(-(2 * 3 + 0.5 * 6) / 3.5)
    assert pull([3.0, 6.0], [2.0, 1.0]) == pytest.approx(pull([3.0, 3.0, 6.0], None))
    assert pull([3.0, math.nan], [1.0, 0.0]) == pytest.approx(pull([3.0], None))


def test_weights_that_balance_classes_keep_centers_within_their_features() -> None:
    generator = torch.Generator().manual_seed(0)
    center = CenterLoss(2, 3, strength=0.003)
    features, target = torch.randn(32, 2, generator=generator) + 5, torch.tensor([0] * 24 + [1] * 7 + [2])
    weight = 1 / target.bincount()[target]
    weight = weight * 32 / weight.sum()
    optimizer = torch.optim.SGD(center.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        center(features, target, weight).backward()
        optimizer.step()
    means = torch.stack([features[target == j].mean(0) for j in range(3)])
    assert_close(center.centers.detach(), means, rtol=0, atol=1e-3)


def test_rare_classes_find_their_center_as_frequent_ones_do() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    center = CenterLoss(2, 3, strength=0.01)
    optimizer = torch.optim.SGD(center.parameters(), lr=0.5)
    target = torch.tensor([0] * 60 + [1] * 3 + [2])
    for _ in range(30):
        features = means[target] + 0.1 * torch.randn(64, 2, generator=generator)
        optimizer.zero_grad()
        center(features, target).backward()
        optimizer.step()
    assert_close(center.centers.detach(), means, rtol=0, atol=0.3)


def test_the_module_starts_at_zero_and_survives_copies() -> None:
    center = CenterLoss(3, 4, strength=0.5)
    assert center.centers.tolist() == [[0] * 3] * 4
    assert repr(center) == "CenterLoss(num_features=3, num_classes=4, strength=0.5)"
    features, target, centers = samples(dtype=torch.float32)
    center.load_state_dict({"centers": centers})
    loss = center(features, target)
    scaled = module(centers.double(), 0.3)
    assert_close(scaled(features.double(), target), 0.3 * module(centers.double())(features.double(), target))
    assert list(center.state_dict()) == ["centers"]
    compiled = torch.compile(center, fullgraph=True, backend="eager")
    assert torch.equal(compiled(features, target), loss)
    half = copy.deepcopy(center).half()
    half(features.half(), target).backward()
    assert half(features.half(), target).dtype == torch.float32
    assert half.centers.grad is not None
    assert half.centers.grad.dtype == torch.float16


def test_arguments_are_checked() -> None:
    features, target, centers = samples()
    where = "^center_loss: "
    with pytest.raises(TypeError, match=where + r"centers must be a torch\.Tensor, got ndarray"):
        center_loss(features, target, centers=centers.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=where + "centers must be floats, got dtype torch.int64"):
        center_loss(features, target, centers=centers.long())
    with pytest.raises(ShapeError, match=where + r"centers must be \(C, D\), got shape \(3,\)"):
        center_loss(features, target, centers=centers[0])
    with pytest.raises(ShapeError, match=where + r"features must be \(N, 3\), as the centers are, got shape \(20, 2\)"):
        center_loss(features[:, :2], target, centers=centers)
    with pytest.raises(ValueError, match=where + "features and centers must be on the same device, got cpu and meta"):
        center_loss(features, target, centers=centers.to("meta"))
    for name in ("num_classes", "num_features"):
        sizes = {"num_classes": 2, "num_features": 2}
        with pytest.raises(ValueError, match=f"^CenterLoss: {name} must be at least 1, got 0"):
            CenterLoss(**{**sizes, name: 0})
        with pytest.raises(TypeError, match=rf"^CenterLoss: {name} must be a whole number, got 2\.0"):
            CenterLoss(**{**sizes, name: 2.0})  # type: ignore[arg-type]
    for value, kind in ((0, ValueError), (-1, ValueError), (torch.nan, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^CenterLoss: strength must be"):
            CenterLoss(2, 2, strength=value)  # type: ignore[arg-type]
    for value in (1e39, 1e-50):
        with pytest.raises(ValueError, match=r"^CenterLoss: strength must fit into float32"):
            CenterLoss(2, 2, strength=value)  # type: ignore[arg-type]


SHARES = (slice(0, 13), slice(13, 20))  # uneven


def rank_main(rank: int) -> Tensor | None:
    features, target, centers = samples()
    center, mine = module(centers, 0.1), SHARES[rank]
    parallel = DistributedDataParallel(center)  # which averages as long as it lives
    parallel(features[mine], target[mine]).backward()
    return center.centers.grad


def test_two_processes_average_what_each_makes_of_its_own_batch(two_ranks: Callable[..., list[Any]]) -> None:
    features, target, centers = samples()
    parts = [paper_step(features[s], target[s], centers) for s in SHARES]
    for grad in two_ranks(rank_main):
        assert_close(grad, (parts[0] + parts[1]) / 2, rtol=1e-12, atol=1e-12)
