from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from loss_tester import Batch, LossTester
from torch import Tensor, nn
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import DirToolkitWarning, ShapeError
from dir_toolkit.losses import CCCLoss, ccc_loss


def coefficient(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> float:
    """Lin's coefficient from means, variances and the covariance, as NumPy has them."""
    moments = np.cov(pred.numpy(), target.numpy(), aweights=None if weight is None else weight.numpy(), ddof=0)
    means = [np.average(x.numpy(), weights=None if weight is None else weight.numpy()) for x in (pred, target)]
    return float(2 * moments[0, 1] / (moments[0, 0] + moments[1, 1] + (means[0] - means[1]) ** 2))


class TestCCCLoss(LossTester):
    function, module, whole, needs_two = staticmethod(ccc_loss), CCCLoss, True, True

    def batch(self, n: int = 12) -> Batch:
        generator = torch.Generator().manual_seed(0)
        pred, target = (3 * torch.randn(2, n, generator=generator, dtype=torch.float64) + 5).unbind()
        return {"rows": pred, "target": target, "weight": torch.linspace(0, 2, n, dtype=torch.float64)}

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        """Squared errors, in proportion, that sum to the complement of the coefficient."""
        weight = batch["weight"] if weighted else torch.ones(len(batch["rows"]), dtype=torch.float64)
        values = weight * (batch["rows"] - batch["target"]).square()
        return values / values.sum() * (1 - coefficient(batch["rows"], batch["target"], weight)) * weight.sum()


def test_limits_are_those_worked_out_by_hand() -> None:
    y = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert ccc_loss(y, y).item() == 0
    assert ccc_loss(torch.full_like(y, 3.0), y).item() == pytest.approx(1)  # the mean of the labels
    assert ccc_loss(6 - y, y).item() == pytest.approx(2)  # mirrored at the mean
    away = ccc_loss(y + 10, y).item()
    assert away == pytest.approx(100 / (2 * np.var(y.numpy()) + 100))
    assert ccc_loss(100 * y + 7, 100 * y + 57).item() == pytest.approx(ccc_loss(y, y + 0.5).item())  # without unit
    assert ccc_loss(torch.full((3,), 4.0), torch.full((3,), 4.0)).item() == 0


def test_shrinking_costs_more_than_under_the_squared_error() -> None:
    """Of predictions a (y + noise) the squared error is least at a = s / (s + v), and this loss at its square root."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4000, generator=generator, dtype=torch.float64)
    noisy = y + torch.randn(4000, generator=generator, dtype=torch.float64)
    factors = torch.linspace(0.1, 1.2, 111, dtype=torch.float64)
    squared = factors[torch.stack([dt.weighted_mse(a * noisy, y) for a in factors]).argmin()]
    concordant = factors[torch.stack([ccc_loss(a * noisy, y) for a in factors]).argmin()]
    assert squared.item() == pytest.approx(0.5, abs=0.03)
    assert concordant.item() == pytest.approx(0.5**0.5, abs=0.03)  # where the variances are equal


def test_columns_are_judged_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target, weight = torch.rand(3, 8, 2, generator=generator, dtype=torch.float64).unbind()
    one, two = (ccc_loss(pred[:, k], target[:, k], weight[:, k]) for k in (0, 1))
    assert_close(ccc_loss(pred, target, weight), (one + two) / 2)


def test_a_batch_of_one_is_told_and_one_number_is_refused() -> None:
    pred = torch.tensor([2.0], requires_grad=True)
    with pytest.warns(DirToolkitWarning, match="^ccc_loss: a batch of one sample has no spread"):
        value = ccc_loss(pred, torch.tensor([1.0]))
    (grad,) = torch.autograd.grad(value, pred)
    assert value.item() == 1
    assert grad.item() == 0
    with pytest.raises(ShapeError, match=r"^ccc_loss: pred must be \(N,\) or \(N, K\), got shape \(\)"):
        ccc_loss(torch.tensor(1.0), torch.tensor(2.0))


def test_a_model_of_one_number_takes_it_by_name_in_any_unit() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    values = []
    for unit in (1.0, 1e4):
        y = unit * (2 + x[:, 0])
        torch.manual_seed(0)
        bins = dt.Bins.uniform(-2 * unit, 6 * unit, count=40)
        options: Any = {"head": "regression", "loss": "ccc_loss"}
        model = dt.LongTailModel(nn.Linear(3, 4), 4, bins, density=dt.LabelDensity.count(y, bins), **options)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            loss = model(x, y).loss
            loss.backward()
            optimizer.step()
        values.append(loss.item())
    assert values[0] < 0.01
    assert values[1] == pytest.approx(values[0], rel=0.05, abs=1e-5)


def test_the_unit_of_labels_does_not_matter_even_where_squares_leave_float32() -> None:
    labels = torch.tensor([1.0, 2.0, 3.0])
    for unit in (1e-30, 1e-21, 1e-19, 1.0, 1e20, 1e35):
        assert ccc_loss(torch.full((3,), 2.0) * unit, labels * unit).item() == pytest.approx(1)
        pred = ((labels + 1) * unit).requires_grad_()
        loss = ccc_loss(pred, labels * unit)
        assert loss.item() == pytest.approx(3 / 7)
        loss.backward()
        assert pred.grad is not None
        assert_close((pred.grad.double() * unit).float(), gradient_of(labels + 1, labels))


def gradient_of(pred: Tensor, labels: Tensor) -> Tensor:
    pred = pred.detach().requires_grad_()
    ccc_loss(pred, labels).backward()
    assert pred.grad is not None
    return pred.grad
