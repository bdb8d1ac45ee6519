from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import Bins, cross_entropy, logit_adjusted_cross_entropy
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.losses.distribution import crps, soft_cross_entropy, squared_emd

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
    at, f = limits(bins, torch.zeros((), dtype=torch.float64)).tolist(), cumulative(softmax(s))
    value = max(at[0] - y, 0) + max(y - at[-1], 0)
    for b in range(len(s)):
        low, high = at[b], at[b + 1]
        cut = min(max(y, low), high)
        for start, end in ((low, cut), (cut, high)):
            if start < end:
                step = float(start >= y)
                slope = (f[b + 1] - f[b]) / (high - low)
                value += quad(lambda t, b=b, c=step, k=slope, a=low: (f[b] + k * (t - a) - c) ** 2, start, end)[0]
    return value


def emd(s: list[float], t: list[float], bins: Bins | None = None) -> float:
    at = None if bins is None else limits(bins, torch.zeros((), dtype=torch.float64)).tolist()
    f, g = cumulative(softmax(s)), cumulative(t)
    ways = [1.0 if at is None else (at[b + 2] + at[b + 1]) / 2 - (at[b + 1] + at[b]) / 2 for b in range(len(s) - 1)]
    return sum(ways[b] * (f[b + 1] - g[b + 1]) ** 2 for b in range(len(s) - 1))


# Each loss of (logits, labels), and what it makes of one sample in plain Python; targets are soft labels.
def with_targets(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_labels(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
        return loss(logits, soft_labels(labels, UNEVEN, 1.5), weight=weight, **options)

    return of_labels


def one_target(one: Callable[..., float], **options: Any) -> Callable[[list[float], float], float]:
    return lambda s, y: one(s, soft_labels(torch.tensor(y, dtype=torch.float64), UNEVEN, 1.5).tolist(), **options)


Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Loss, Callable[[list[float], float], float]]] = {
    "soft": (with_targets(soft_cross_entropy), one_target(soft_ce)),
    "adjusted": (with_targets(partial(soft_cross_entropy, prior=PRIOR)), one_target(soft_ce, tau=1.0)),
    "adjusted 0.4": (with_targets(partial(soft_cross_entropy, prior=PRIOR, tau=0.4)), one_target(soft_ce, tau=0.4)),
    "crps": (lambda s, y, w=None, **o: crps(s, y, w, bins=UNEVEN, **o), partial(ranked, bins=UNEVEN)),
    "emd": (with_targets(squared_emd), one_target(emd)),
    "emd in units": (with_targets(partial(squared_emd, bins=UNEVEN)), one_target(emd, bins=UNEVEN)),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def samples(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=generator, dtype=torch.float64)
    labels = -3 + 23 * rand(shape) ** 3
    return 3 * torch.randn(*shape, 5, generator=generator, dtype=torch.float64), labels, rand(shape)


def naive(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    one = LOSSES[name][1]
    rows = zip(logits.reshape(-1, 5).tolist(), labels.flatten().tolist(), strict=True)
    return torch.tensor([one(s, y) for s, y in rows], dtype=torch.float64).reshape(labels.shape)


def test_values_by_hand() -> None:
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


@each_loss
@pytest.mark.parametrize("shape", [(1,), (30,), (2, 3), (2, 2, 3), ()])
def test_every_loss_equals_a_naive_loop(name: str, shape: tuple[int, ...]) -> None:
    logits, labels, weight = samples(*shape)
    loss, values = LOSSES[name][0], naive(name, logits, labels)
    assert_exact(loss(logits, labels, reduction="none"), values)
    assert_exact(loss(logits, labels), values.mean())
    assert_exact(loss(logits, labels, weight, reduction="none"), values * weight)
    assert_exact(loss(logits, labels, weight), (values * weight).mean())
    assert_exact(loss(logits, labels, weight, reduction="sum"), (values * weight).sum())


def test_the_naive_loops_tell_losses_apart() -> None:
    logits, labels, _ = samples(10)
    values = [naive(name, logits, labels).mean().item() for name in LOSSES]
    assert len({round(value, 6) for value in values}) == len(values)


@each_loss
def test_gradients_agree_with_differences(name: str) -> None:
    logits, labels, weight = samples(6)
    weight[2] = 0
    assert torch.autograd.gradcheck(lambda s: LOSSES[name][0](s, labels, weight), logits.requires_grad_())


def test_the_score_s_gradient_to_labels_agrees_with_differences() -> None:
    logits, labels, _ = samples(6)
    assert torch.autograd.gradcheck(lambda y: crps(logits, y, bins=UNEVEN), labels.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_classes_are_the_classification_path_to_the_bit(dtype: torch.dtype, reduction: Any) -> None:
    logits, _, weight = samples(33)
    classes = torch.arange(33) % 5
    paths: list[tuple[Loss, Loss]] = [
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


def test_classes_of_every_pixel() -> None:
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


@each_loss
def test_weight_two_is_seen_twice_and_weight_zero_is_absent(name: str) -> None:
    loss = LOSSES[name][0]
    logits, labels, weight = samples(10)
    again = torch.cat([torch.arange(10), torch.tensor([3, 7])])
    doubled = weight.clone()
    doubled[[3, 7]] *= 2
    twice = loss(logits[again], labels[again], weight[again], reduction="sum")
    assert_exact(loss(logits, labels, doubled, reduction="sum"), twice)
    weight[4] = 0
    broken = logits.clone()
    broken[4] = torch.tensor([torch.nan, torch.inf, 0, -torch.inf, 1e300])
    broken.requires_grad_()
    rest = torch.arange(10) != 4
    value = loss(broken, labels, weight, reduction="sum")
    assert_exact(value, loss(logits[rest], labels[rest], weight[rest], reduction="sum"))
    value.backward()
    assert broken.grad is not None
    assert broken.grad[4].tolist() == [0] * 5
    assert broken.grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_raised_and_inputs_stay_as_they_are(name: str, dtype: torch.dtype) -> None:
    loss = LOSSES[name][0]
    logits, labels, weight = (x.to(dtype) for x in samples(8))
    copies = [x.clone() for x in (logits, labels, weight)]
    value = loss(logits, labels, weight)
    assert value.dtype == torch.float32
    assert_close(value, loss(logits.float(), labels, weight.float()))
    assert all(map(torch.equal, (logits, labels, weight), copies))
    assert loss(logits, labels.double(), weight).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(loss(logits, labels, weight), value)


@each_loss
def test_large_logits_lose_nothing_and_broken_ones_show(name: str) -> None:
    loss = LOSSES[name][0]
    logits = torch.zeros(2, 5)
    logits[0, 3], logits[1, 3] = 1e4, -1e4
    logits.requires_grad_()
    values = loss(logits, torch.tensor([2.0, 2.0]), reduction="none")
    values.sum().backward()
    assert values.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    for value in (torch.nan, torch.inf):
        broken = logits.detach().clone()
        broken[1, 0] = value
        assert loss(broken, torch.tensor([2.0, 2.0]), reduction="none").isnan().tolist() == [False, True]


def test_impossible_bins_cost_where_the_target_has_mass() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[0.5, 0.5, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, 0]]
    assert soft_cross_entropy(logits, torch.tensor([[0.5, 0.25, 0.25]])).item() == torch.inf


@each_loss
def test_one_graph_that_reads_no_values(name: str) -> None:
    if "adjusted" in name:
        loss: Loss = with_targets(partial(soft_cross_entropy, prior=torch.tensor(PRIOR)))
        elsewhere: Loss = with_targets(partial(soft_cross_entropy, prior=torch.tensor(PRIOR, device="meta")))
    else:
        loss = elsewhere = LOSSES[name][0]
    logits, labels, weight = samples(4)
    assert elsewhere(logits.to("meta"), labels.to("meta"), weight.to("meta")).device.type == "meta"
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_exact(compiled(logits, labels, weight), loss(logits, labels, weight))


CALLS: dict[str, Callable[..., Tensor]] = {
    "soft_cross_entropy": soft_cross_entropy,
    "crps": lambda s, t, w=None, **o: crps(s, t, w, bins=UNEVEN, **o),
    "squared_emd": lambda s, t, w=None, **o: squared_emd(s, t, w, bins=UNEVEN, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_refused_by_name(name: str) -> None:
    loss, where = CALLS[name], f"^{name}: "
    logits, labels, weight = samples(3)
    ranks = name == "crps"
    target, other = (labels, "target") if ranks else (soft_labels(labels, UNEVEN, 1), "target")
    for value in (None, [1.0], logits.numpy()):
        with pytest.raises(TypeError, match=where + r"logits must be a torch\.Tensor"):
            loss(value, target)
        with pytest.raises(TypeError, match=where + rf"{other} must be a torch\.Tensor"):
            loss(logits, value)
    with pytest.raises(TypeError, match=where + "logits must be floats, got dtype torch.int64"):
        loss(logits.long(), target)
    with pytest.raises(TypeError, match=where + rf"{other} must be .*, got dtype torch\.bool"):
        loss(logits, target > 0)
    with pytest.raises(TypeError, match=where + "weight must be integers or floats, got dtype torch.bool"):
        loss(logits, target, weight > 0)
    with pytest.raises(ShapeError, match=where + r"logits must have .* in the last axis, got shape \(\)"):
        loss(torch.tensor(1.0), torch.tensor(1.0))
    shape = r"\(3,\)" if ranks else r"\(3, 5\)"
    rule = rf"{other} must be {shape} for logits of shape \(3, 5\), got shape"
    for bad in (target[:2], target[None]):
        with pytest.raises(ShapeError, match=where + rule):
            loss(logits, bad)
    with pytest.raises(ShapeError, match=where + rf"{rule} .*, 1\)\. Use {other}\.squeeze\({1 if ranks else 2}\)\.$"):
        loss(logits, target.unsqueeze(-1))
    with pytest.raises(
        ShapeError, match=where + r"weight must be \(3,\) for .*, got shape \(3, 1\)\. Use weight\.squeeze\(1\)\.$"
    ):
        loss(logits, target, weight[:, None])
    with pytest.raises(ValueError, match=where + f"logits and {other} must be on the same device, got cpu and meta"):
        loss(logits, target.to("meta"))
    with pytest.raises(ValueError, match=where + r"logits must hold at least one value, got shape \(0, 5\)"):
        loss(logits[:0], target[:0])
    with pytest.raises(ValueError, match=where + "reduction must be one of 'none', 'mean', 'sum', got 'avg'"):
        loss(logits, target, reduction="avg")
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match=where + rf"weight must be finite, got {broken} at index \[1\]"):
            loss(logits, target, torch.tensor([1, broken, 1]))
    with pytest.raises(ValueError, match=where + "weight must not be negative, got a minimum of -1"):
        loss(logits, target, -torch.ones(3))


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
    for call, fix in ((crps, "Use soft_cross_entropy"), (squared_emd, "Use bins=None if the classes have an order")):
        given = labels if call is crps else target
        with pytest.raises(
            ValueError, match=rf"^{call.__name__}: bins must not be classes, .*, got Bins\.classes\(5\)\. {fix}"
        ):
            call(logits, given, bins=Bins.classes(5))
        with pytest.raises(TypeError, match=f"^{call.__name__}: bins must be a Bins, got int"):
            call(logits, given, bins=5)  # type: ignore[arg-type]
        with pytest.raises(
            ShapeError, match=rf"^{call.__name__}: logits must have 4 values in the last axis, got shape \(3, 5\)"
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
