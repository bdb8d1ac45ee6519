from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from loss_tester import Batch, LossTester
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit.errors import DirToolkitWarning, ShapeError
from dir_toolkit.losses.rank_n_contrast import RankNContrast, rank_n_contrast


def samples(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features, and whole-number labels with many ties."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.randint(0, 6, (n,), generator=generator)


def naive(features: Tensor, labels: Tensor, weight: Tensor | None = None, temperature: float = 2.0) -> Tensor:
    """The formula, pair by pair; samples of weight zero are left out."""
    n = len(features)
    z, y = features.tolist(), labels.reshape(n, -1).tolist()
    w = [1.0] * n if weight is None else weight.tolist()
    there = [i for i in range(n) if w[i] > 0]

    def similarity(i: int, j: int) -> float:
        return -math.dist(z[i], z[j]) / temperature

    def distance(i: int, j: int) -> float:
        return sum(abs(a - b) for a, b in zip(y[i], y[j], strict=True))

    values = [0.0] * n
    for i in there:
        others = [j for j in there if j != i]
        for j in others:
            further = [k for k in others if distance(i, k) >= distance(i, j)]
            terms = [math.exp(similarity(i, k)) for k in further]
            values[i] += w[i] * (math.log(sum(terms)) - similarity(i, j)) / len(others)
    return torch.tensor(values, dtype=torch.float64)


class TestRankNContrast(LossTester):
    function, module = staticmethod(rank_n_contrast), RankNContrast
    variants = {"default": {}, "cold": {"temperature": 0.3}}
    rows, reads = "features", "features"
    whole = several = needs_two = True

    def batch(self, n: int = 12) -> Batch:
        features, labels = samples(n)
        return {"rows": features, "target": labels, "weight": torch.linspace(0, 2, n, dtype=torch.float64)}

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        return naive(batch["rows"], batch["target"], batch["weight"] if weighted else None, **options)


def same(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_values_are_those_worked_out_by_hand() -> None:
    features, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([10, 20, 50])
    # From 0 the others lie at 1 and 3, from 1 at 1 and 2, from 3 at 2 and 3; the further one contributes log 1.
    expected = [math.log(1 + math.exp(-gap)) / 2 for gap in (2, 1, 1)]
    given = rank_n_contrast(features, labels, temperature=1.0, reduction="none")
    assert given.tolist() == pytest.approx(expected)
    weight = torch.tensor([3.0, 1.0, 1.0])
    total = 3 * expected[0] + expected[1] + expected[2]
    assert rank_n_contrast(features, labels, weight, temperature=1.0).item() == pytest.approx(total / 3)  # by N


def test_two_samples_have_nothing_to_contrast() -> None:
    features = torch.tensor([[0.0], [1.0]], requires_grad=True)
    loss = rank_n_contrast(features, torch.tensor([1.0, 2.0]))
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert features.grad.tolist() == [[0.0], [0.0]]


def test_labels_may_differ_in_several_directions_or_all_be_equal_or_unique() -> None:
    features, labels = samples()
    for other in (
        torch.stack([labels, labels.flip(0), labels * 0], 1),
        labels[:, None],
        torch.zeros(12),
        torch.arange(12.0, dtype=torch.float64).square(),
    ):
        same(rank_n_contrast(features, other, reduction="none"), naive(features, other))
    same(rank_n_contrast(features, labels[:, None]), rank_n_contrast(features, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_features_have_a_finite_gradient(dtype: torch.dtype) -> None:
    features = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [4.0, 2.0]], dtype=dtype, requires_grad=True)
    rank_n_contrast(features, torch.arange(4)).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad[3, 0] != 0


def test_far_features_neither_overflow_nor_vanish() -> None:
    features = torch.tensor([[0.0], [3e4], [1e4]], requires_grad=True)  # the last two in the wrong order
    loss = rank_n_contrast(features, torch.tensor([0, 1, 2]), reduction="none")
    assert_close(loss[0].item(), 2e4 / 2 / 2)
    loss[0].backward()
    assert features.grad is not None
    assert_close(features.grad.flatten().tolist(), [0.0, 0.25, -0.25])


def test_order_does_not_matter_and_learning_orders_features() -> None:
    features, labels = samples()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    values = rank_n_contrast(features, labels, reduction="none")
    same(rank_n_contrast(features[order], labels[order], reduction="none"), values[order])
    points = torch.randn(20, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    ranks = torch.arange(20.0)[:, None]
    optimizer = torch.optim.Adam([points], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        rank_n_contrast(points, ranks).backward()
        optimizer.step()
    apart = torch.stack([torch.cdist(x, x).flatten() for x in (points.detach(), ranks)])
    assert torch.corrcoef(apart)[0, 1] > 0.95


def test_a_weight_scales_an_anchor_and_zero_leaves_no_trace() -> None:
    features, labels = samples()
    weight = torch.ones(12, dtype=torch.float64)
    plain = rank_n_contrast(features, labels, weight, reduction="none")
    weight[3] = 2
    same(rank_n_contrast(features, labels, weight, reduction="sum"), plain.sum() + plain[3])
    weight[5] = 0
    assert rank_n_contrast(features[4:6], labels[4:6], weight[4:6]).item() == 0  # one left, which has no pair


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_batch_of_one_adds_nothing_and_is_told(reduction: Any) -> None:
    features, labels = samples(1)
    features.requires_grad_()
    with pytest.warns(DirToolkitWarning, match="RankNContrast: a batch of one sample has no pair"):
        value = RankNContrast()._reduced(features, labels, torch.ones(1), reduction)
    assert value.sum().item() == 0
    assert value.shape == ((1,) if reduction == "none" else ())
    (grad,) = torch.autograd.grad(value.sum(), features)
    assert torch.equal(grad, torch.zeros_like(features))


def test_arguments_are_checked() -> None:
    features, labels = samples()

    def refused(kind: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(kind, match="^rank_n_contrast: " + match):
            rank_n_contrast(*arguments, **options)

    refused(ShapeError, r"features must be \(N, D\), one row per sample, got shape \(12,\)", features[:, 0], labels)
    refused(ShapeError, r"features must be .* Use features\.flatten\(1\)", features[:, :, None], labels)
    refused(ShapeError, r"target must be \(12,\), one value per sample, got shape \(11,\)", features, labels[1:])
    refused(ShapeError, r"target must be \(12,\), .* got shape \(11, 2\)", features, torch.ones(11, 2))
    refused(ValueError, r"target must hold at least one value, got shape \(12, 0\)", features, torch.ones(12, 0))
    for value, kind in (
        (0, ValueError),
        (-1, ValueError),
        (torch.nan, ValueError),
        (1e-50, ValueError),
        ("1", TypeError),
    ):
        refused(kind, "temperature must", features, labels, temperature=value)
        with pytest.raises(kind, match=r"^RankNContrast: temperature must"):
            RankNContrast(temperature=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_that_differ_by_rounding_are_tied(dtype: torch.dtype) -> None:
    features, labels = samples(6, dtype)[0], torch.arange(6, dtype=dtype)
    whole = rank_n_contrast(features, labels)
    for unit in (0.1, 0.01, 0.3):
        assert_close(rank_n_contrast(features, labels * unit), whole)
    # Equal labels are tied, also where rounding is coarse, and labels without weight do not make it so.
    far = torch.tensor([1, 1, 3, 4, 1, 2], dtype=dtype)
    assert_close(rank_n_contrast(features, far * 1e8), rank_n_contrast(features, far))
    weight = torch.tensor([1, 1, 1, 1, 1, 0], dtype=dtype)
    absent = torch.tensor([0, 1, 2, 3, 4, 1e12], dtype=dtype)
    assert_close(rank_n_contrast(features, absent, weight), rank_n_contrast(features, labels, weight))


def test_a_large_label_ties_no_others_and_whole_numbers_are_exact() -> None:
    features = samples(8, torch.float64)[0].float()
    labels = torch.tensor([1, 2, 3.5, 4, 6, 8, 15, 7.2e7]) / 8  # which float32 holds
    alone, beside = (rank_n_contrast(features, y, reduction="none")[:7] for y in (labels, labels.double()))
    assert_close(alone, beside.float())
    whole = torch.tensor([0, 1, 3, 10, 12, 13, 17, 20])
    expected = rank_n_contrast(features, whole)
    for given in (whole + 5_000_000, whole.float() + 5_000_000):
        assert_close(rank_n_contrast(features, given), expected)


def test_time_stamps_are_compared_exactly_and_ties_of_half_precision_are_ties() -> None:
    features, order = samples(12, torch.float64)[0], torch.arange(12)
    expected = rank_n_contrast(features, order)
    assert_close(rank_n_contrast(features, 1_700_000_000 + 10 * order), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert_close(rank_n_contrast(features, (0.1 * order).to(dtype)), expected)
