from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_tester import Batch, LossTester
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import losses
from dir_toolkit.errors import ShapeError
from dir_toolkit.losses import weighted_focal_l1, weighted_focal_mse, weighted_huber, weighted_l1, weighted_mse


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focus(e: float, beta: float = 0.2, gamma: float = 1, variant: str = "paper") -> float:
    s = sigmoid(beta * abs(e))
    return (s if variant == "paper" else 2 * s - 1) ** gamma


FOCAL = {
    f"{variant} {gamma}": {"beta": 0.7, "gamma": gamma, "variant": variant}
    for gamma in (0.5, 2)
    for variant in ("paper", "reference")
}


class PointTester(LossTester):
    """The losses of one file: each has a line for what it makes of one error."""

    def batch(self, n: int = 12) -> Batch:
        generator = torch.Generator().manual_seed(0)
        pred, target = (3 * torch.randn(2, n, generator=generator, dtype=torch.float64)).unbind()
        return {"rows": pred, "target": target, "weight": torch.rand(n, generator=generator, dtype=torch.float64) + 0.1}

    def oracle(self, rows: float, target: float, **options: Any) -> float:
        return self.of_error(rows - target, **options)

    def of_error(self, e: float, **options: Any) -> float:
        raise NotImplementedError

    @pytest.mark.parametrize("shape", [(7, 3), (2, 4, 5), ()])
    def test_any_shape_is_taken_element_by_element(self, options: Any, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        pred, target, weight = torch.rand(3, *shape, generator=generator, dtype=torch.float64).unbind()
        for reduction in ("none", "mean", "sum"):
            flat = self.function(pred.flatten(), target.flatten(), weight.flatten(), reduction=reduction, **options)
            given = self.function(pred, target, weight, reduction=reduction, **options)
            assert_close(given, flat.view(shape) if reduction == "none" else flat, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("label", [0.0, 0.01, 4.0, 10.0])
    def test_a_prediction_that_runs_away_is_brought_back(self, options: Any, label: float) -> None:
        target = torch.tensor([label])
        for away in (-1e7, -1e4, 1e4, 1e7):
            pred = torch.tensor([away], requires_grad=True)
            value = self.function(pred, target, **options)
            value.backward()
            assert value.isfinite()
            assert value > self.function(target, target, **options)
            assert pred.grad is not None
            assert pred.grad.sign().item() == math.copysign(1, away)

    def test_lower_precision_is_raised_before_subtracting(self, options: Any) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            pred, target = torch.tensor([1000.0, 60000.0]).to(dtype), torch.tensor([1001, 59000])
            result = self.function(pred, target, torch.ones(2, dtype=dtype), **options)
            assert_close(result, self.function(pred.float(), target.float(), **options))
            assert result.isfinite()
            assert self.function(pred, target.double(), **options).dtype == torch.float64

    def test_shapes_never_broadcast_and_the_fix_is_named(self) -> None:
        row, column, where = torch.ones(3), torch.ones(3, 1), f"^{self.function.__name__}: "
        both = "must have the same shape, got"
        with pytest.raises(ShapeError, match=rf"{where}pred and target {both} \(3, 1\) and \(3,\)\. Use pred\.squeeze"):
            self.function(column, row)
        for other in (torch.ones(()), torch.ones(1), torch.ones(4), torch.ones(1, 3)):
            with pytest.raises(ShapeError, match=r"Labels are never broadcast: bring both to one shape\.$"):
                self.function(row, other)


class TestL1(PointTester):
    function, module = staticmethod(weighted_l1), losses.WeightedL1

    def of_error(self, e: float) -> float:
        return abs(e)


class TestMSE(PointTester):
    function, module = staticmethod(weighted_mse), losses.WeightedMSE

    def of_error(self, e: float) -> float:
        return e * e


class TestHuber(PointTester):
    function, module = staticmethod(weighted_huber), losses.WeightedHuber
    variants = {"one": {}, "three": {"delta": 3.0}}

    def of_error(self, e: float, delta: float = 1.0) -> float:
        return e * e / (2 * delta) if abs(e) < delta else abs(e) - delta / 2


class TestFocalL1(PointTester):
    function, module = staticmethod(weighted_focal_l1), losses.WeightedFocalL1
    variants = {"default": {}, "plain": {"gamma": 0}, **FOCAL}

    def of_error(self, e: float, **options: Any) -> float:
        return focus(e, **options) * abs(e)


class TestFocalMSE(PointTester):
    function, module = staticmethod(weighted_focal_mse), losses.WeightedFocalMSE
    variants = {"default": {}, "plain": {"gamma": 0}, **FOCAL}

    def of_error(self, e: float, **options: Any) -> float:
        return focus(e, **options) * e * e


def test_values_are_those_worked_out_by_hand() -> None:
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


def test_torch_s_own_losses_agree() -> None:
    pred, target = TestL1().batch(40)["rows"], TestL1().batch(40)["target"]
    for reduction in ("none", "mean", "sum"):
        ours = partial(assert_close, rtol=1e-13, atol=1e-13)
        ours(weighted_l1(pred, target, reduction=reduction), F.l1_loss(pred, target, reduction=reduction))  # type: ignore[arg-type]
        ours(weighted_mse(pred, target, reduction=reduction), F.mse_loss(pred, target, reduction=reduction))  # type: ignore[arg-type]
        for delta in (0.5, 1.0, 4.0):
            huber = weighted_huber(pred, target, delta=delta, reduction=reduction)  # type: ignore[arg-type]
            ours(huber, F.smooth_l1_loss(pred, target, beta=delta, reduction=reduction))
            ours(huber, F.huber_loss(pred, target, delta=delta, reduction=reduction) / delta)


@pytest.mark.parametrize("loss", [weighted_focal_l1, weighted_focal_mse])
@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_perfect_prediction_has_no_gradient_under_focal_losses(
    loss: Callable[..., Tensor], variant: str, dtype: torch.dtype
) -> None:
    for gamma in (0, 0.01, 0.5, 1, 2, 3.5):
        pred = torch.tensor([1.0, 2.0, 1e-3], dtype=dtype, requires_grad=True)
        loss(pred, torch.tensor([1.0, 4.0, 0.0]), gamma=gamma, variant=variant).backward()
        assert pred.grad is not None
        assert pred.grad.isfinite().all()
        assert pred.grad[0] == 0
        assert pred.grad[1] < 0


def test_whole_number_targets_are_not_wrapped_around() -> None:
    pred = torch.tensor([250.0, 1.0])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int64):
        target = torch.tensor([255, 2]).to(dtype)
        assert weighted_l1(pred, target, reduction="none").tolist() == [5, 1]
        assert weighted_l1(pred, pred, target).item() == 0


def test_options_are_checked_by_the_function_and_by_the_module_s_constructor() -> None:
    ok = torch.ones(2)
    for value, kind in ((0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^weighted_huber: delta must be"):
            weighted_huber(ok, ok, delta=value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^WeightedHuber: delta must be"):
            losses.WeightedHuber(delta=value)  # type: ignore[arg-type]
        for loss, module in (
            (weighted_focal_l1, losses.WeightedFocalL1),
            (weighted_focal_mse, losses.WeightedFocalMSE),
        ):
            for name in ("beta", *(["gamma"] if value != 0 else [])):
                with pytest.raises(kind, match=f"^{loss.__name__}: {name} must be"):
                    loss(ok, ok, **{name: value})  # type: ignore[operator]
                with pytest.raises(kind, match=f"^{module.__name__}: {name} must be"):
                    module(**{name: value})
            with pytest.raises(ValueError, match=f"^{loss.__name__}: variant must be one of 'paper', 'reference', got"):
                loss(ok, ok, variant="tanh")  # type: ignore[operator]
