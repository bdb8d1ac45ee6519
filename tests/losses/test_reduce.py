"""What every loss over classes promises alike; its formula is tested beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.losses._inputs import checked_prior, per_class
from dir_toolkit.losses._loss import reduce
from dir_toolkit.losses.affinity import affinity_loss
from dir_toolkit.losses.center import CenterLoss, center_loss
from dir_toolkit.losses.cross_entropy import (
    balanced_cross_entropy,
    cross_entropy,
    equalization_loss,
    ldam_loss,
    logit_adjusted_cross_entropy,
    pairwise_cross_entropy,
)
from dir_toolkit.losses.focal import focal_loss

Loss = Callable[..., Tensor]
C = 4
PRIOR = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
CENTERS = torch.linspace(-1, 1, C * C, dtype=torch.float64).view(C, C)
ROWS = {"affinity_loss": "affinities", "center_loss": "features", "CenterLoss": "features"}


def centered(features: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    centers = CENTERS.to(features) if features.is_floating_point() else CENTERS
    return center_loss(features, target, *args, centers=centers, **kwargs)


def center_module(features: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    module = CenterLoss(C, C).double()
    module.load_state_dict({"centers": CENTERS})
    module = module.to(features) if features.is_floating_point() else module
    return module(features, target, *args, **kwargs)


# By the name that errors give; each is called with (rows, target, weight, reduction=).
LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "logit_adjusted_cross_entropy": lambda s, y, w=None, **k: logit_adjusted_cross_entropy(
        s, y, PRIOR.to(s), weight=w, **k
    ),
    "pairwise_cross_entropy": lambda s, y, w=None, **k: pairwise_cross_entropy(s, y, w, margins=CENTERS.to(s), **k),
    "balanced_cross_entropy": lambda s, y, w=None, **k: balanced_cross_entropy(s, y, w, prior=PRIOR.to(s), **k),
    "ldam_loss": lambda s, y, w=None, **k: ldam_loss(s.clamp(-1, 1), y, w, counts=PRIOR.to(s), **k),  # cosines
    "equalization_loss": lambda s, y, w=None, **k: equalization_loss(s, y, w, prior=PRIOR.to(s), threshold=0.2, **k),
    "focal_loss": focal_loss,
    "affinity_loss": affinity_loss,
    "center_loss": centered,
    "CenterLoss": center_module,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def samples(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, C, generator=generator, dtype=torch.float64)
    target = torch.randint(C, (n,), generator=generator)
    return rows, target, torch.rand(n, generator=generator, dtype=torch.float64)


def test_reduce_by_hand() -> None:
    values, weight = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 0, 2])
    assert reduce(values, None, "mean") == 3
    assert reduce(values, weight, "none").tolist() == [1, 0, 12]
    assert reduce(values, weight, "sum") == 13
    assert reduce(values, weight, "mean") == pytest.approx(13 / 3)  # by N, not by the sum of weights


@each_loss
def test_reductions_weights_and_order(name: str) -> None:
    loss = LOSSES[name]
    rows, target, weight = samples()
    plain = loss(rows, target, reduction="none")
    assert plain.shape == (12,)
    assert (plain > 0).sum() > 6
    close = partial(assert_close, rtol=1e-12, atol=1e-12)
    close(loss(rows, target, weight, reduction="none"), plain * weight)
    close(loss(rows, target, weight, reduction="sum"), (plain * weight).sum())
    close(loss(rows, target, weight), (plain * weight).sum() / 12)
    close(loss(rows, target), plain.mean())
    again = torch.cat([torch.arange(12), torch.tensor([3, 7])])
    doubled = weight.clone()
    doubled[[3, 7]] *= 2
    twice = loss(rows[again], target[again], weight[again], reduction="sum")
    close(loss(rows, target, doubled, reduction="sum"), twice)
    weight[4] = 0
    rest = torch.arange(12) != 4
    close(loss(rows, target, weight, reduction="sum"), loss(rows[rest], target[rest], weight[rest], reduction="sum"))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    close(loss(rows, target, weight), loss(rows[order], target[order], weight[order]))
    close(loss(rows[:1], target[:1]), plain[0])


@each_loss
def test_gradients_to_the_rows_agree_with_differences(name: str) -> None:
    rows, target, weight = samples(5)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, target, weight), rows.requires_grad_())


@each_loss
def test_inputs_and_global_state_stay_as_they_are(name: str) -> None:
    inputs = samples()
    copies = [x.clone() for x in inputs]
    rng = torch.get_rng_state()
    LOSSES[name](*inputs)
    assert all(map(torch.equal, inputs, copies))
    assert torch.equal(torch.get_rng_state(), rng)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    rows, target, weight = samples()
    rows = rows.to(dtype)
    result = LOSSES[name](rows, target, weight.to(dtype))
    assert result.dtype == torch.float32
    assert_close(result, LOSSES[name](rows.float(), target, weight.to(dtype).float()), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LOSSES[name](rows, target).dtype == torch.float32
    assert LOSSES[name](rows.double(), target, weight.float()).dtype == torch.float64


@each_loss
def test_rows_that_are_not_finite_show(name: str) -> None:
    rows, target, _ = samples()
    rows[2, (target[2] + 1) % C] = torch.nan
    assert LOSSES[name](rows, target).isnan()
    rows[2, (target[2] + 1) % C] = torch.inf
    assert name == "ldam_loss" or not LOSSES[name](rows, target).isfinite()


@each_loss
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_a_sample_of_weight_zero_leaves_no_trace(name: str, value: float) -> None:
    rows, target, weight = samples()
    weight[4] = 0
    rest = torch.arange(12) != 4
    bad = rows.clone()
    bad[4, target[4]] = value
    bad.requires_grad_()
    rest_rows = rows[rest].requires_grad_()
    loss = LOSSES[name](bad, target, weight, reduction="sum")
    expected = LOSSES[name](rest_rows, target[rest], weight[rest], reduction="sum")
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    assert bad.grad is not None
    assert bad.grad[4].tolist() == [0.0] * C
    assert_close(bad.grad[rest], rest_rows.grad, rtol=1e-12, atol=1e-12)
    assert LOSSES[name](bad, target, weight.float(), reduction="none")[4] == 0


@each_loss
def test_bad_values_are_refused_by_name_and_place(name: str) -> None:
    loss, where = LOSSES[name], f"^{name}: "
    rows, target, weight = samples()
    for value in (-1, C, -100):
        bad = target.clone()
        bad[[5, 8]] = value
        rule = rf"target must hold class indices from 0 to 3, got {value} at index \[5\] \(2 such values\)\. Count"
        with pytest.raises(LabelError, match=where + rule):
            loss(rows, bad)
    for value in (torch.nan, torch.inf):
        bad = weight.clone()
        bad[3] = value
        with pytest.raises(ValueError, match=rf"{where}weight must be finite, got (nan|inf) at index \[3\]"):
            loss(rows, target, bad)
    with pytest.raises(ValueError, match=f"{where}weight must not be negative, got a minimum of -1"):
        loss(rows, target, -torch.ones(12))


@each_loss
def test_shapes_that_do_not_fit_are_refused_with_the_fix(name: str) -> None:
    loss, where, kind = LOSSES[name], f"^{name}: ", ROWS.get(name, "logits")
    rows, target, weight = samples()
    for bad in (rows[0], rows[None]):
        with pytest.raises(ShapeError, match=rf"{where}{kind} must be \(N, [CD]\), one (column|row) per .*, got shape"):
            loss(bad, target)
    one = r"must be \(12,\), one value per sample, got shape "
    for bad, fix in (
        (target[:, None], r"\(12, 1\)\. Use target\.squeeze\(1\)"),
        (rows, r"\(12, 4\)\. Use target\.argmax\(1\) on one-hot rows"),
        (target[:5], r"\(5,\)\. Labels are never broadcast: bring both to one length"),
    ):
        with pytest.raises(ShapeError, match=where + "target " + one + fix):
            loss(rows, bad)
    for bad, fix in (
        (weight[:, None], r"\(12, 1\)\. Use weight\.squeeze\(1\)"),
        (weight[:C], r"\(4,\)\. Use weight\[target\] for one weight per class"),
        (weight[0], r"\(\)\. Labels are never broadcast"),
    ):
        with pytest.raises(ShapeError, match=where + "weight " + one + fix):
            loss(rows, target, bad)
    with pytest.raises(ValueError, match=rf"{where}{kind} must hold at least one value, got shape \(0, 4\)"):
        loss(rows[:0], target[:0])


@each_loss
def test_other_kinds_of_arguments_are_refused_by_name(name: str) -> None:
    loss, where, kind = LOSSES[name], f"^{name}: ", ROWS.get(name, "logits")
    rows, target, weight = samples()
    with pytest.raises(TypeError, match=f"{where}{kind} must be floats, got dtype torch.int64"):
        loss(rows.long(), target)
    for bad in (target.double(), target.int(), target == 1):
        with pytest.raises(
            TypeError, match=rf"{where}target must hold class indices as int64, got .* target\.long\(\)"
        ):
            loss(rows, bad)
    for arguments, argument in (((rows, target.numpy()), "target"), ((rows, target, 1.0), "weight")):
        with pytest.raises(TypeError, match=rf"{where}{argument} must be a torch\.Tensor, got"):
            loss(*arguments)
    for bad in (weight > 0, weight.to(torch.complex64)):
        with pytest.raises(TypeError, match=f"{where}weight must be integers or floats, got dtype"):
            loss(rows, target, bad)
    with pytest.raises(ValueError, match=f"{where}{kind} and target must be on the same device, got cpu and meta"):
        loss(rows, target.to("meta"))
    for value in ("avg", None, True):
        with pytest.raises(ValueError, match=f"{where}reduction must be one of 'none', 'mean', 'sum', got"):
            loss(rows, target, reduction=value)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "CenterLoss"])
def test_the_loss_is_one_graph(name: str) -> None:
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    assert_close(compiled(*samples()), LOSSES[name](*samples()), rtol=0, atol=0)


@each_loss
def test_accelerators_are_not_read(name: str) -> None:
    rows, target, weight = (x.to("meta") for x in samples())
    if name == "CenterLoss":
        assert CenterLoss(C, C).to("meta")(rows, target, weight).device.type == "meta"
    else:
        assert LOSSES[name](rows, target, weight).device.type == "meta"


def test_one_value_a_class_may_come_as_any_array() -> None:
    scores = torch.zeros(2, 3)
    locked = np.array([3, 2, 1])[::-1]
    locked.setflags(write=False)
    for value in (torch.tensor([1, 2, 3]), [1, 2, 3], (1.0, 2.0, 3.0), locked, locked.astype(np.uint64)):
        assert per_class("counts", value, scores).tolist() == [1, 2, 3]
    assert per_class("counts", torch.tensor([1, 2, 3]), scores).dtype == torch.float32
    assert per_class("counts", torch.tensor([1, 2, 3]), scores.double()).dtype == torch.float64
    assert per_class("counts", [1, 2, 3], scores.to("meta")).device.type == "meta"


def test_one_value_a_class_is_checked() -> None:
    scores = torch.zeros(2, 3)
    check = partial(per_class, "p", logits=scores)
    for value in ([1.0, 2.0], torch.ones(3, 1), 1.0, torch.ones(2)):
        with pytest.raises(ShapeError, match=r"^\S+: p must be \(3,\), one value per class, got shape"):
            check(value)
    for value in ([1.0, torch.nan, 1.0], torch.tensor([1.0, torch.inf, 1.0])):
        with pytest.raises(ValueError, match=r"^\S+: p must be finite, got (nan|inf) at index \[1\]"):
            check(value)
    with pytest.raises(ValueError, match=r"^\S+: p must not be negative, got -2 for class 2\.$"):
        check([0, 0, -2])
    with pytest.raises(ValueError, match=r"^\S+: p must be positive, got 0 for class 1\. Mend it\.$"):
        check([1, 0, 0], positive="Mend it.")
    for value in ("abc", None, torch.ones(3) > 0):
        with pytest.raises(TypeError, match=r"^\S+: p must be integers or floats, got (dtype|NoneType)"):
            check(value)
    with pytest.raises(ValueError, match=r"^\S+: logits and p must be on the same device, got cpu and meta"):
        check(torch.ones(3, device="meta"))


def test_a_prior_comes_as_any_array_and_is_checked() -> None:
    scores = torch.zeros(2, 3)
    for value in (torch.tensor([0.5, 0.25, 0.25]), [0.5, 0.25, 0.25], np.array([0.5, 0.25, 0.25])):
        assert checked_prior(value, scores).tolist() == [0.5, 0.25, 0.25]
    with pytest.raises(
        ValueError, match=r"^\S+: prior must be positive, got 0 for class 1\. Use dt\.class_prior\(counts\)"
    ):
        checked_prior([0.5, 0, 0.5], scores)
    with pytest.raises(
        ValueError, match=r"^\S+: prior must sum to one, got a sum of 6\. Use dt\.class_prior\(counts\)"
    ):
        checked_prior([1, 2, 3], scores)
    with pytest.raises(ShapeError, match=r"^\S+: prior must be \(3,\), one value per class, got shape \(2,\)"):
        checked_prior([0.5, 0.5], scores)
