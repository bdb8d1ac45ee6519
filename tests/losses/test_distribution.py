from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loss_tester import Batch, LossTester
from scipy.integrate import quad
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from dir_toolkit import Bins, logit_adjusted_cross_entropy
from dir_toolkit.errors import DirToolkitWarning, LabelError, ShapeError
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.losses import cross_entropy
from dir_toolkit.losses.balanced_mse import BinnedIntegrationLoss
from dir_toolkit.losses.distribution import (
    CRPS,
    CoralLoss,
    SoftCrossEntropy,
    SquaredEMD,
    coral_loss,
    crps,
    soft_cross_entropy,
    squared_emd,
)

UNEVEN = Bins.from_edges([-3, -1, 0, 0.1, 4, 20])
AGES = Bins.uniform(0, 5, width=1, integer=True)
PRIOR = [0.4, 0.3, 0.2, 0.08, 0.02]
assert_exact = partial(assert_close, rtol=1e-12, atol=1e-12)


def softmax(s: list[float]) -> list[float]:
    total = sum(map(math.exp, s))
    return [math.exp(x) / total for x in s]


def cumulative(p: list[float]) -> list[float]:
    return [sum(p[:b]) for b in range(len(p) + 1)]


def soft_ce(s: list[float], t: list[float], tau: float = 0.0) -> float:
    p = softmax([x + tau * math.log(q) for x, q in zip(s, PRIOR, strict=True)])
    return -sum(t[b] * math.log(p[b]) for b in range(len(s)))


def ranked(s: list[float], y: float, bins: Bins) -> float:
    """The integral of (F - [t >= y])^2, bin by bin, cut at the label."""
    ends, f = limits(bins, torch.zeros((), dtype=torch.float64)).tolist(), cumulative(softmax(s))
    value = max(ends[0] - y, 0) + max(y - ends[-1], 0)
    for b in range(len(s)):
        low, high = ends[b], ends[b + 1]
        cut = min(max(y, low), high)
        for start, end in ((low, cut), (cut, high)):
            if start < end:
                step = float(start >= y)
                slope = (f[b + 1] - f[b]) / (high - low)
                value += quad(lambda t, b=b, c=step, k=slope, a=low: (f[b] + k * (t - a) - c) ** 2, start, end)[0]
    return value


def emd(s: list[float], t: list[float], bins: Bins | None = None) -> float:
    ends = None if bins is None else limits(bins, torch.zeros((), dtype=torch.float64)).tolist()
    f, g = cumulative(softmax(s)), cumulative(t)
    ways = [
        1.0 if ends is None else (ends[b + 2] + ends[b + 1]) / 2 - (ends[b + 1] + ends[b]) / 2
        for b in range(len(s) - 1)
    ]
    return sum(ways[b] * (f[b + 1] - g[b + 1]) ** 2 for b in range(len(s) - 1))


def coral(s: list[float], t: list[float]) -> float:
    f, g = cumulative(softmax(s)), cumulative(t)
    return -sum(g[b] * math.log(f[b]) + (1 - g[b]) * math.log(1 - f[b]) for b in range(1, len(s)))


def samples(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=generator, dtype=torch.float64)
    labels = -3 + 23 * rand(shape) ** 3
    return 3 * torch.randn(*shape, 5, generator=generator, dtype=torch.float64), labels, rand(shape)


class BinTester(LossTester):
    """Targets are soft labels."""

    rows, reads, soft, several = "logits", "scores", True, True

    def batch(self, n: int = 12) -> Batch:
        logits, labels, weight = samples(n)
        target = soft_labels(labels, UNEVEN, 1.5) if self.soft else labels
        return {"rows": logits, "target": target, "weight": weight + 0.1}

    @pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3), ()])
    def test_any_number_of_axes_is_taken(self, options: Any, shape: tuple[int, ...]) -> None:
        logits, labels, weight = samples(*shape)
        target = soft_labels(labels, UNEVEN, 1.5) if self.soft else labels
        flat_target = target.reshape(-1, 5) if self.soft else target.flatten()
        flat = self.function(logits.reshape(-1, 5), flat_target, weight.flatten(), reduction="none", **options)
        assert_exact(self.function(logits, target, weight, reduction="none", **options), flat.reshape(shape))
        assert_exact(self.function(logits, target, weight, **options), flat.mean())


class TestSoftCrossEntropy(BinTester):
    function, module = staticmethod(soft_cross_entropy), SoftCrossEntropy
    variants = {"plain": {}, "adjusted": {"prior": PRIOR}, "0.4": {"prior": PRIOR, "tau": 0.4}}
    floor = None

    def oracle(self, rows: list[float], target: list[float], prior: Any = None, tau: float = 1) -> float:
        return soft_ce(rows, target, 0 if prior is None else tau)


class TestCoralLoss(BinTester):
    function, module, floor = staticmethod(coral_loss), CoralLoss, 0.0

    def oracle(self, rows: list[float], target: list[float]) -> float:
        return coral(rows, target)

    def test_classes_are_taken_as_distributions_of_one_bin(self) -> None:
        logits, _, weight = samples(12)
        classes = torch.arange(12) % 5
        hard = torch.nn.functional.one_hot(classes, 5).double()
        assert_exact(coral_loss(logits, classes, weight), coral_loss(logits, hard, weight))

    def test_an_impossible_bin_costs_nothing_where_the_target_agrees(self) -> None:
        logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
        value = coral_loss(logits, torch.tensor([[0.5, 0.5, 0.0]]))
        value.backward()
        assert value.item() == pytest.approx(math.log(2))
        assert torch.equal(logits.grad, torch.zeros(1, 3))


class TestCRPS(BinTester):
    function, module, soft = staticmethod(crps), CRPS, False
    variants = {"default": {"bins": UNEVEN}}

    def oracle(self, rows: list[float], target: float, bins: Bins) -> float:
        return ranked(rows, target, bins)


class TestSquaredEMD(BinTester):
    function, module = staticmethod(squared_emd), SquaredEMD
    variants = {"steps": {}, "label units": {"bins": UNEVEN}}

    def oracle(self, rows: list[float], target: list[float], bins: Bins | None = None) -> float:
        return emd(rows, target, bins)


def test_values_are_those_worked_out_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0, -torch.inf]])
    target = torch.tensor([[0.5, 0.5, 0.0]])
    assert soft_cross_entropy(logits, target).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert soft_cross_entropy(logits, target, torch.tensor([3.0])).item() == pytest.approx(1.5 * math.log(16 / 3))
    assert squared_emd(logits, target).item() == pytest.approx(0.25**2)
    bins = Bins.from_edges([0, 1, 4, 9])  # centres 0.5, 2.5, 6.5
    assert squared_emd(logits, torch.tensor([[0.0, 0.0, 1.0]]), bins=bins).item() == pytest.approx(2 * 0.75**2 + 4 * 1)
    # Uniform on [0, 2]: F = t / 2. Label 0: 2/3; label 1: twice 1/12; label 2: as label 0.
    bins, even = Bins.uniform(0, 2, width=1), torch.zeros(3, 2).double()
    values = crps(even, torch.tensor([0.0, 1.0, 2.0]), bins=bins, reduction="none")
    assert values.tolist() == pytest.approx([2 / 3, 1 / 6, 2 / 3])
    # All in the bin [0, 1): a label beyond it costs its way to the bin, and a third of the bin.
    values = crps(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1.7]), bins=bins)
    assert values.item() == pytest.approx(0.7 + 1 / 3)


def test_the_score_s_gradient_to_labels_agrees_with_differences() -> None:
    logits, labels, _ = samples(6)
    assert torch.autograd.gradcheck(lambda y: crps(logits, y, bins=UNEVEN), labels.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_classes_are_the_classification_path_to_the_bit(dtype: torch.dtype, reduction: Any) -> None:
    logits, _, weight = samples(33)
    classes = torch.arange(33) % 5
    paths: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (soft_cross_entropy, cross_entropy),
        (
            partial(soft_cross_entropy, prior=PRIOR, tau=0.7),
            partial(logit_adjusted_cross_entropy, prior=PRIOR, tau=0.7),
        ),
    ]
    for ours, theirs in paths:
        gradients = []
        for loss, target in ((theirs, classes), (ours, classes), (ours, soft_labels(classes, Bins.classes(5), None))):
            x = logits.to(dtype).requires_grad_()
            value = loss(x, target, weight=weight.to(dtype), reduction=reduction)
            value.sum().backward()
            gradients.append((value.detach(), x.grad))
        for value, gradient in gradients[1:]:
            assert torch.equal(value, gradients[0][0])
            assert torch.equal(gradient, gradients[0][1])  # type: ignore[arg-type]


def test_classes_of_every_pixel_are_scored() -> None:
    logits, _, weight = samples(2, 3, 4)
    classes = torch.arange(24).reshape(2, 3, 4) % 5
    flat = cross_entropy(logits.reshape(-1, 5), classes.flatten(), weight.flatten(), reduction="none")
    assert torch.equal(soft_cross_entropy(logits, classes, weight, reduction="none"), flat.reshape(2, 3, 4))
    assert torch.equal(soft_cross_entropy(logits, classes, weight), flat.mean())


def test_a_uniform_prior_and_tau_zero_adjust_nothing() -> None:
    logits, labels, _ = samples(10)
    target = soft_labels(labels, UNEVEN, 1.5)
    plain = soft_cross_entropy(logits, target)
    assert_exact(soft_cross_entropy(logits, target, prior=[0.2] * 5), plain)
    assert_exact(soft_cross_entropy(logits, target, prior=PRIOR, tau=0), plain)
    assert torch.equal(soft_cross_entropy(logits, target, tau=3), plain)


def test_the_score_of_whole_number_ages() -> None:
    logits, _, _ = samples(6)
    labels = torch.tensor([0, 1, 4, 5, 2, 3])  # 5 is on the axis, half a year beyond the last limit
    expected = [ranked(s, y, AGES) for s, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert crps(logits, labels, bins=AGES, reduction="none").tolist() == pytest.approx(expected, rel=1e-12)
    certain = torch.full((5, 5), -torch.inf).fill_diagonal_(0)
    assert crps(certain, torch.arange(5), bins=AGES, reduction="none").tolist() == pytest.approx([1 / 12] * 5)


def test_every_loss_is_least_where_the_distribution_is_the_truth() -> None:
    bins, truth = Bins.uniform(0, 4, width=1), torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
    labels = (torch.arange(400) + 0.5).double() / 100  # evenly over the axis
    share = truth.repeat_interleave(100) / 100

    def best(loss: Callable[[Tensor], Tensor]) -> Tensor:
        logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(logits)
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return logits.detach().softmax(0)

    near = partial(assert_close, rtol=0, atol=1e-3)
    near(best(lambda s: soft_cross_entropy(s[None], truth[None])), truth)
    near(best(lambda s: squared_emd(s[None], truth[None], bins=bins)), truth)
    near(best(lambda s: crps(s.expand(400, 4), labels, share, bins=bins, reduction="sum")), truth)


def test_impossible_bins_cost_where_the_target_has_mass() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[0.5, 0.5, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, 0]]
    assert soft_cross_entropy(logits, torch.tensor([[0.5, 0.25, 0.25]])).item() == torch.inf


CALLS: dict[str, Callable[..., Tensor]] = {
    "soft_cross_entropy": soft_cross_entropy,
    "crps": lambda s, t, w=None, **o: crps(s, t, w, bins=UNEVEN, **o),
    "squared_emd": lambda s, t, w=None, **o: squared_emd(s, t, w, bins=UNEVEN, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_that_do_not_fit_the_logits_are_refused_with_the_fix(name: str) -> None:
    loss, where = CALLS[name], f"^{name}: "
    logits, labels, weight = samples(3)
    ranks = name == "crps"
    target = labels if ranks else soft_labels(labels, UNEVEN, 1)
    with pytest.raises(ShapeError, match=where + r"logits must be \(\.\.\., [B5]\), one value per bin, got shape \(\)"):
        loss(torch.tensor(1.0), torch.tensor(1.0))
    shape = r"\(3,\)" if ranks else r"\(3, 5\)"
    rule = rf"target must be {shape}, .*logits.*, got shape"
    for bad in (target[:2], target[None]):
        with pytest.raises(ShapeError, match=where + rule):
            loss(logits, bad)
    with pytest.raises(ShapeError, match=where + rf"{rule} .*, 1\)\. Use target\.squeeze\({1 if ranks else 2}\)\.$"):
        loss(logits, target.unsqueeze(-1))
    rule = r"weight must be \(3,\), one value per row of logits, got shape \(3, 1\)\. Use weight\.squeeze\(1\)\.$"
    with pytest.raises(ShapeError, match=where + rule):
        loss(logits, target, weight[:, None])


@pytest.mark.parametrize("name", ["soft_cross_entropy", "squared_emd"])
def test_targets_must_be_distributions(name: str) -> None:
    loss, where, logits = CALLS[name], f"^{name}: ", torch.zeros(2, 5)
    target = torch.full((2, 5), 0.2)
    with pytest.raises(ValueError, match=where + "target must sum to one along the last axis, got sums from 2 to 2"):
        loss(logits, 2 * target)
    with pytest.raises(ValueError, match=where + "target must not be negative, got a minimum of -0.5"):
        loss(logits, torch.tensor([[1.5, -0.5, 0, 0, 0]] * 2))
    target[1, 3] = torch.nan
    with pytest.raises(ValueError, match=where + r"target must be finite, got nan at index \[1, 3\]"):
        loss(logits, target)
    loss(logits.to("meta"), target.to("meta"))  # not looked at


def test_other_targets_and_axes_are_refused_by_name() -> None:
    logits, labels, _ = samples(3)
    target = soft_labels(labels, UNEVEN, 1)
    with pytest.raises(LabelError, match=r"^soft_cross_entropy: target must hold class indices from 0 to 4, got 5"):
        soft_cross_entropy(logits, torch.tensor([0, 5, 1]))
    with pytest.raises(TypeError, match=r"^soft_cross_entropy: target must hold class indices as int64, got dtype"):
        soft_cross_entropy(logits, torch.tensor([0, 4, 1], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"^squared_emd: target must be floats, got dtype torch\.int64\. Use soft_lab"):
        squared_emd(logits, torch.tensor([0, 4, 1]))
    for value in (-3.1, 21.0, math.nan, math.inf):
        with pytest.raises(LabelError, match=r"^crps: target must .*, got .* at index \[2\]"):
            crps(logits, torch.tensor([0, 1, value]), bins=UNEVEN)
    for call, fix in ((crps, "Use soft_cross_entropy"), (squared_emd, "Use bins=None for ordinal classes")):
        given = labels if call is crps else target
        with pytest.raises(
            ValueError, match=rf"^{call.__name__}: bins must cut a continuous .*, got Bins\.classes\(5\)\. {fix}"
        ):
            call(logits, given, bins=Bins.classes(5))
        with pytest.raises(TypeError, match=f"^{call.__name__}: bins must be a Bins, got int"):
            call(logits, given, bins=5)  # type: ignore[arg-type]
        with pytest.raises(
            ShapeError, match=rf"^{call.__name__}: logits must be \(\.\.\., 4\), one value per bin, got shape \(3, 5\)"
        ):
            call(logits, given, bins=Bins.uniform(-4, 24, count=4))


def test_prior_and_tau_are_checked() -> None:
    logits, labels, _ = samples(3)
    where = "^soft_cross_entropy: "
    for target in (soft_labels(labels, UNEVEN, 1), torch.tensor([0, 1, 2])):
        loss = partial(soft_cross_entropy, logits, target)
        with pytest.raises(ValueError, match=where + r"prior must be positive, got 0 for class 1"):
            loss(prior=[1.0, 0.0, 0.0, 0.0, 0.0])
        with pytest.raises(ValueError, match=where + r"prior must sum to one, got a sum of 5"):
            loss(prior=torch.ones(5))
        with pytest.raises(ShapeError, match=where + r"prior must be \(5,\), one value per class, got shape \(2,\)"):
            loss(prior=[0.5, 0.5])
        for value, kind in ((-0.1, ValueError), (1e38, ValueError), (torch.inf, ValueError), (None, TypeError)):
            with pytest.raises(kind, match=where + "tau must be"):
                loss(tau=value)  # type: ignore[arg-type]


AXIS = Bins.uniform(0, 10, count=5)


def on_axis(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores, labels = 2 * torch.randn(n, 5, generator=generator), 10 * torch.rand(n, generator=generator) ** 2
    return scores, labels, torch.rand(n, generator=generator) + 0.5


def test_labels_beyond_the_axis_count_as_outside_says() -> None:
    scores, labels, weight = on_axis()
    far = labels.clone()
    far[2], far[5] = 12.5, -3.0
    inside = torch.tensor([i not in (2, 5) for i in range(8)])
    ends = far.clamp(0, 10)
    for w in (None, weight):
        clipped = crps(scores, far, w, bins=AXIS, outside="clip", reduction="none")
        at_end = crps(scores, ends, w, bins=AXIS, reduction="none")
        assert_close(clipped, at_end + (far - ends).abs() * (1 if w is None else w))  # its error is exact
        own = scores.clone().requires_grad_()
        dropped = crps(own, far, w, bins=AXIS, outside="drop", reduction="none")
        assert_close(dropped, clipped * inside)
        dropped.sum().backward()
        assert own.grad is not None
        assert torch.equal((own.grad != 0).any(1), inside)
        assert_close(crps(scores, far, w, bins=AXIS, outside="drop"), dropped.detach().mean())  # by N
        with pytest.raises(LabelError, match=r"^crps: target must lie on .*got 12\.5 at index \[2\] \(2 such"):
            crps(scores, far, w, bins=AXIS)
    assert_close(crps(scores, far, inside.float(), bins=AXIS), crps(scores, far, bins=AXIS, outside="drop"))
    broken = far.clone()
    broken[0] = torch.nan
    for outside in ("raise", "clip", "drop"):
        with pytest.raises(LabelError, match="target must not be NaN"):
            crps(scores, broken, bins=AXIS, outside=outside)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crps: outside must be one of 'raise', 'clip', 'drop', got 'skip'"):
        crps(scores, far, bins=AXIS, outside="skip")  # type: ignore[arg-type]


def test_where_values_are_not_looked_at_a_label_beyond_the_axis_shows() -> None:
    scores, labels, weight = on_axis()
    labels[2] = 12.5

    def of(outside: str, loss: Callable[..., Tensor]) -> Tensor:
        return vmap(lambda s, y, w: loss(s, y, w, outside))(scores, labels, weight)

    def by_crps(s: Tensor, y: Tensor, w: Tensor, outside: Any) -> Tensor:
        return crps(s[None], y[None], w[None], bins=AXIS, outside=outside)

    def by_bins(s: Tensor, y: Tensor, w: Tensor, outside: Any) -> Tensor:
        return BinnedIntegrationLoss(AXIS, [0.2] * 5, outside=outside, learn=False)(s[:1], y[None], w[None])

    for loss in (by_crps, by_bins):
        assert of("raise", loss).isnan().tolist() == [i == 2 for i in range(8)]
        assert of("drop", loss)[2] == 0
        assert of("clip", loss)[2] > 0


@pytest.mark.parametrize("loss", [soft_cross_entropy, squared_emd])
def test_a_dropped_label_s_row_of_zeros_adds_nothing(loss: Callable[..., Tensor]) -> None:
    scores, labels, _ = on_axis()
    target = soft_labels(labels, AXIS, 1.0, outside="drop")
    target[3] = 0
    for value in (0.5, torch.nan, torch.inf):
        scores[3] = value
        own = scores.clone().requires_grad_()
        values = loss(own, target, reduction="none")
        values.sum().backward()
        assert values[3] == 0
        assert own.grad is not None
        assert (own.grad[3] == 0).all()
        assert values[:3].min() > 0
        rest = torch.arange(8) != 3
        assert_close(values[rest], loss(scores[rest], target[rest], reduction="none"))
    target[3, 0] = 0.5
    with pytest.raises(ValueError, match="target must sum to one along the last axis"):
        loss(scores, target)


def test_crps_resolves_an_axis_far_from_zero() -> None:
    scores = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    near = 3600 * torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = 1.7e9
    far = crps(scores, near + start, bins=Bins.uniform(start, start + 3600, width=60), reduction="none")
    expected = crps(scores, near, bins=Bins.uniform(0, 3600, width=60), reduction="none")
    assert_close(far, expected, rtol=1e-5, atol=1e-4)
    with pytest.warns(DirToolkitWarning):  # float32 does not tell such labels apart
        rounded = crps(scores, (near + start).float(), bins=Bins.uniform(start, start + 3600, width=60), outside="clip")
    assert rounded.isfinite()
