from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_tester import Batch, LossTester
from torch import Tensor
from torch.testing import assert_close

from dir_toolkit import LDS, Bins, LabelDensity, losses
from dir_toolkit.errors import ShapeError
from dir_toolkit.heads.cosine import CosineHead
from dir_toolkit.losses.cross_entropy import (
    balanced_cross_entropy,
    cross_entropy,
    equalization_loss,
    ldam_loss,
    logit_adjusted_cross_entropy,
    pairwise_cross_entropy,
)

COUNTS = [400, 60, 30, 9, 1]
PRIOR = [n / 500 for n in COUNTS]
MARGINS = torch.randn(5, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
MARGINS[1, 2] = MARGINS[4, 0] = -torch.inf
ALPHA = [0.5, 1.0, 0.0, 2.0, 3.0]
prior = torch.tensor(PRIOR, dtype=torch.float64)
assert_exact = partial(assert_close, rtol=1e-12, atol=1e-12)


# Each paper's own formula for one sample: scores s and true class y, in plain Python.
def softmax_loss(s: list[float], y: int) -> float:
    return -math.log(math.exp(s[y]) / sum(math.exp(x) for x in s))


def smoothed(s: list[float], y: int, share: float) -> float:
    return sum(((1 - share) * (j == y) + share / len(s)) * softmax_loss(s, j) for j in range(len(s)))


def adjusted(s: list[float], y: int, tau: float) -> float:
    others = ((PRIOR[j] / PRIOR[y]) ** tau * math.exp(s[j] - s[y]) for j in range(len(s)) if j != y)
    return math.log(1 + sum(others))


def paired(s: list[float], y: int) -> float:
    others = (math.exp(MARGINS[y, j]) * math.exp(s[j] - s[y]) for j in range(len(s)) if j != y)
    return ALPHA[y] * math.log(1 + sum(others))


def balanced(s: list[float], y: int) -> float:
    return softmax_loss(s, y) / PRIOR[y] / len(s)


def ldam(s: list[float], y: int, top: float, scale: float) -> float:
    unit = top / max(n**-0.25 for n in COUNTS)
    own = math.exp(scale * (s[y] - unit * COUNTS[y] ** -0.25))
    return -math.log(own / (own + sum(math.exp(scale * s[j]) for j in range(len(s)) if j != y)))


def equalized(s: list[float], y: int) -> float:
    kept = [1 - (PRIOR[j] < 0.1) * (1 - (j == y)) for j in range(len(s))]
    return -math.log(math.exp(s[y]) / sum(w * math.exp(x) for w, x in zip(kept, s, strict=True)))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "plain": cross_entropy,
    "smoothed": partial(cross_entropy, label_smoothing=0.3),
    "adjusted": partial(logit_adjusted_cross_entropy, prior=PRIOR),
    "adjusted 0.4": partial(logit_adjusted_cross_entropy, prior=PRIOR, tau=0.4),
    "pairwise": partial(pairwise_cross_entropy, margins=MARGINS, alpha=ALPHA),
    "balanced": partial(balanced_cross_entropy, prior=PRIOR),
    "ldam": partial(ldam_loss, counts=COUNTS),
    "ldam 2": partial(ldam_loss, counts=COUNTS, max_margin=0.2, scale=2),
    "equalized": partial(equalization_loss, prior=PRIOR, threshold=0.1),
}
each_loss = pytest.mark.parametrize("name", LOSSES)

# The same losses as members of the family: what scales the logits, Delta, and alpha.
MEMBERS: dict[str, tuple[float, Tensor, Any]] = {
    "plain": (1, torch.zeros(5, 5), None),
    "adjusted": (1, (prior / prior[:, None]).log(), None),
    "adjusted 0.4": (1, 0.4 * (prior / prior[:, None]).log(), None),
    "balanced": (1, torch.zeros(5, 5), 1 / (5 * prior)),
    "ldam": (30, (30 * 0.5 * prior.pow(-0.25) / prior.min() ** -0.25)[:, None].expand(5, 5), None),
    "ldam 2": (2, (2 * 0.2 * prior.pow(-0.25) / prior.min() ** -0.25)[:, None].expand(5, 5), None),
    "equalized": (1, torch.where(prior < 0.1, -torch.inf, 0.0).expand(5, 5), None),
}


def samples(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.rand(n, 5, generator=generator, dtype=torch.float64) - 1
    return logits, torch.arange(n) % 5, torch.rand(n, generator=generator, dtype=torch.float64)


class ClassTester(LossTester):
    rows, reads, classes = "logits", "scores", True

    def batch(self, n: int = 12) -> Batch:
        logits, target, weight = samples(n)
        return {"rows": logits, "target": target, "weight": weight + 0.1}


class TestCrossEntropy(ClassTester):
    function, module = staticmethod(cross_entropy), losses.CrossEntropy
    variants = {"plain": {}, "smoothed": {"label_smoothing": 0.3}}

    def oracle(self, rows: list[float], target: int, label_smoothing: float = 0) -> float:
        return smoothed(rows, target, label_smoothing)


class TestLogitAdjusted(ClassTester):
    function, module = staticmethod(logit_adjusted_cross_entropy), losses.LogitAdjustedCrossEntropy
    variants = {"one": {"prior": PRIOR}, "0.4": {"prior": PRIOR, "tau": 0.4}}
    floor = None

    def oracle(self, rows: list[float], target: int, prior: list[float], tau: float = 1) -> float:
        return adjusted(rows, target, tau)


class TestPairwise(ClassTester):
    function, module = staticmethod(pairwise_cross_entropy), losses.PairwiseCrossEntropy
    variants = {"default": {"margins": MARGINS, "alpha": ALPHA}}

    def oracle(self, rows: list[float], target: int, margins: Tensor, alpha: list[float]) -> float:
        return paired(rows, target)


class TestBalanced(ClassTester):
    function, module = staticmethod(balanced_cross_entropy), losses.BalancedCrossEntropy
    variants = {"default": {"prior": PRIOR}}

    def oracle(self, rows: list[float], target: int, prior: list[float]) -> float:
        return balanced(rows, target)


class TestLDAM(ClassTester):
    function, module = staticmethod(ldam_loss), losses.LDAMLoss
    variants = {"default": {"counts": COUNTS}, "two": {"counts": COUNTS, "max_margin": 0.2, "scale": 2}}

    def oracle(
        self, rows: list[float], target: int, counts: list[int], max_margin: float = 0.5, scale: float = 30
    ) -> float:
        return ldam(rows, target, max_margin, scale)

    def wild(self, rows: Tensor, size: float) -> Tensor:
        return rows.sign()  # cosines end at one


class TestEqualization(ClassTester):
    function, module = staticmethod(equalization_loss), losses.EqualizationLoss
    variants = {"default": {"prior": PRIOR, "threshold": 0.1}}

    def oracle(self, rows: list[float], target: int, prior: list[float], threshold: float) -> float:
        return equalized(rows, target)


def test_values_are_those_worked_out_by_hand() -> None:
    logits, target = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]).double(), torch.tensor([0, 0])
    log4, log43 = math.log(4), math.log(4 / 3)
    assert cross_entropy(logits, target, reduction="none").tolist() == pytest.approx([log4, log43])
    assert cross_entropy(logits, target, torch.tensor([3, 3])).item() == pytest.approx(1.5 * (log4 + log43))
    assert cross_entropy(logits, target, label_smoothing=1).item() == pytest.approx((log4 + log43) / 2)
    # Priors 3/4 and 1/4 take the first sample's odds of 3 to 1 back to even.
    values = logit_adjusted_cross_entropy(logits, target, [0.75, 0.25], reduction="none")
    assert values.tolist() == pytest.approx([math.log(2), math.log(10 / 9)])
    values = balanced_cross_entropy(logits, target, prior=[0.75, 0.25], reduction="none")
    assert values.tolist() == pytest.approx([log4 / 1.5, log43 / 1.5])


@pytest.mark.parametrize("name", MEMBERS)
def test_every_named_loss_is_a_member_of_the_family(name: str) -> None:
    logits, target, weight = samples()
    scale, margins, alpha = MEMBERS[name]
    member = pairwise_cross_entropy(scale * logits, target, margins=margins.double(), alpha=alpha, weight=weight)
    assert_exact(LOSSES[name](logits, target, weight=weight), member)


def test_adjusting_the_loss_is_cross_entropy_of_shifted_logits() -> None:
    logits, target, _ = samples()
    for tau in (0.0, 0.5, 1.0, 3.0):
        for smoothing in (0.0, 0.1):
            shifted = F.cross_entropy(logits + tau * prior.log(), target, label_smoothing=smoothing)
            assert_exact(logit_adjusted_cross_entropy(logits, target, prior, tau, label_smoothing=smoothing), shifted)


def test_torch_s_cross_entropy_agrees() -> None:
    logits, target, _ = samples()
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.2, 1.0):
            options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
            assert_exact(cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options))


def test_settings_that_leave_plain_cross_entropy() -> None:
    logits, target, weight = samples()
    plain, uniform = cross_entropy(logits, target, weight), [0.2] * 5
    assert_exact(logit_adjusted_cross_entropy(logits, target, PRIOR, 0, weight=weight), plain)
    assert_exact(logit_adjusted_cross_entropy(logits, target, uniform, 2, weight=weight), plain)
    assert_exact(balanced_cross_entropy(logits, target, prior=uniform, weight=weight), plain)
    assert_exact(equalization_loss(logits, target, prior=PRIOR, threshold=0, weight=weight), plain)
    assert_exact(equalization_loss(logits, target, prior=PRIOR, threshold=1, drop=0, weight=weight), plain)
    assert_exact(ldam_loss(logits, target, counts=COUNTS, max_margin=0, scale=1, weight=weight), plain)
    assert_exact(
        ldam_loss(logits, target, counts=COUNTS, weight=weight), ldam_loss(logits, target, counts=PRIOR, weight=weight)
    )


def test_gradients_to_margins_and_prior_agree_with_differences() -> None:
    logits, target, _ = samples(6)
    margins = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.ones(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, a: pairwise_cross_entropy(logits, target, margins=m, alpha=a), (margins, alpha)
    )


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_lose_nothing(name: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 5, dtype=dtype)
    large = 1.0 if name.startswith("ldam") else 1e4  # cosines end at one
    logits[0, 3], logits[1, 3] = large, -large
    logits.requires_grad_()
    target = torch.tensor([3, 3])
    values = LOSSES[name](logits, target, reduction="none")
    values.sum().backward()
    assert values.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    if name in ("plain", "adjusted", "equalized"):
        assert values[0] == 0
        assert values[1].item() == pytest.approx(1e4, rel=5e-3)


def test_impossible_classes_drop_out() -> None:
    logits, target, _ = samples(4)  # the fifth class is nobody's
    masked = logits.clone()
    masked[:, 4] = -torch.inf
    assert_exact(cross_entropy(masked, target), cross_entropy(logits[:, :4], target))
    assert cross_entropy(masked, target.new_full((4,), 4)).item() == torch.inf
    assert cross_entropy(masked, target, label_smoothing=0.1).item() == torch.inf
    alone = torch.full((5, 5), -torch.inf)
    assert pairwise_cross_entropy(logits, target, margins=alone).item() == 0


def test_the_diagonal_of_the_margins_is_not_used() -> None:
    logits, target, _ = samples()
    other = MARGINS.clone().fill_diagonal_(torch.nan).requires_grad_()
    loss = pairwise_cross_entropy(logits, target, margins=other)
    assert_exact(loss, pairwise_cross_entropy(logits, target, margins=MARGINS))
    loss.backward()
    assert other.grad is not None
    assert other.grad.diagonal().tolist() == [0] * 5


def test_one_class_loses_nothing() -> None:
    logits, target = torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)
    assert cross_entropy(logits, target) == 0
    assert logit_adjusted_cross_entropy(logits, target, [1.0]) == 0
    assert pairwise_cross_entropy(logits, target, margins=torch.zeros(1, 1)) == 0
    assert ldam_loss(logits, target, counts=[7]) == 0


def test_equalization_draws_for_every_sample_and_class_from_its_generator_alone() -> None:
    n, even = 4000, [0.2] * 5
    logits, target = torch.zeros(n, 5), torch.arange(n) % 5
    loss = partial(equalization_loss, logits, target, prior=even, threshold=0.3, drop=0.25, reduction="none")
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    values = loss(generator=generator)
    assert torch.equal(values, loss(generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(values, loss(generator=generator))
    assert torch.equal(torch.get_rng_state(), state)
    kept = values.exp().round()  # classes left in the denominator, the true one among them
    assert kept.unique().tolist() == [1, 2, 3, 4, 5]
    share = (kept - 1).mean().item() / 4
    assert share == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / (4 * n)))


def test_effective_number_weights_come_from_the_label_axis() -> None:
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))
    weights = LDS(Bins.classes(5), kernel=None, scheme="effective_number", beta=0.99).fit(labels)
    expected = np.array([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS])
    expected /= (expected * COUNTS).sum() / 500  # mean one over the samples
    assert weights(torch.arange(5)).tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    logits = torch.zeros(500, 5)
    assert cross_entropy(logits, labels, weights(labels)).item() == pytest.approx(math.log(5), rel=1e-6)


def test_the_prior_of_a_density_serves() -> None:
    logits, target, _ = samples()
    density = LabelDensity(Bins.classes(5), np.array(COUNTS))
    assert_exact(
        logit_adjusted_cross_entropy(logits, target, density.prior()),
        logit_adjusted_cross_entropy(logits, target, prior),
    )
    unseen = LabelDensity(Bins.classes(5), np.array([5, 3, 2, 1, 0]))
    with pytest.raises(
        ValueError, match=r"prior must be positive, got 0 for class 4\. Use dt\.class_prior\(counts\), which floors"
    ):
        logit_adjusted_cross_entropy(logits, target, unseen.prior())
    assert logit_adjusted_cross_entropy(logits, target, unseen.prior(floor=1)).isfinite()


def test_settings_are_checked() -> None:
    logits, target, _ = samples()
    for value, kind in ((-0.1, ValueError), (1.1, ValueError), (torch.nan, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^cross_entropy: label_smoothing must be"):
            cross_entropy(logits, target, label_smoothing=value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^logit_adjusted_cross_entropy: label_smoothing must be"):
            logit_adjusted_cross_entropy(logits, target, PRIOR, label_smoothing=value)  # type: ignore[arg-type]
        for name in ("threshold", "drop"):
            with pytest.raises(kind, match=f"^equalization_loss: {name} must be"):
                equalization_loss(logits, target, prior=PRIOR, **{"threshold": 0.1, name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^logit_adjusted_cross_entropy: tau must be >= 0 and <= 1e\+30"):
        logit_adjusted_cross_entropy(logits, target, PRIOR, 1e38)
    for value, kind in ((-0.1, ValueError), (torch.inf, ValueError), (None, TypeError)):
        with pytest.raises(kind, match=r"^logit_adjusted_cross_entropy: tau must be"):
            logit_adjusted_cross_entropy(logits, target, PRIOR, value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^ldam_loss: max_margin must be"):
            ldam_loss(logits, target, counts=COUNTS, max_margin=value)  # type: ignore[arg-type]
        with pytest.raises(kind, match=r"^ldam_loss: scale must be"):
            ldam_loss(logits, target, counts=COUNTS, scale=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ldam_loss: scale must be > 0, got 0"):
        ldam_loss(logits, target, counts=COUNTS, scale=0)
    for value in (1e39, 1e-50):
        with pytest.raises(ValueError, match=r"^ldam_loss: scale must fit into float32"):
            ldam_loss(logits, target, counts=COUNTS, scale=value)


def test_margins_are_for_cosines() -> None:
    logits, target, weight = samples()
    fix = r"Use CosineHead\(num_features, num_classes, scale=1\)\.$"
    for value in (1.01, -3.0, torch.inf):
        bad = logits.clone()
        bad[3, 2] = value
        with pytest.raises(ValueError, match=rf"^ldam_loss: logits must be cosines, in \[-1, 1\], got one of .*{fix}"):
            ldam_loss(bad, target, counts=COUNTS)
        weight[3] = 0
        assert ldam_loss(bad, target, counts=COUNTS, weight=weight).isfinite()  # a sample that is left out
    bad[3, 2] = 1.0005  # as rounding makes them
    assert ldam_loss(bad, target, counts=COUNTS).isfinite()
    head = CosineHead(4, 5, scale=1)
    assert ldam_loss(head(1e3 * torch.eye(4)), torch.arange(4), counts=COUNTS).isfinite()


@pytest.mark.parametrize(
    "loss", [logit_adjusted_cross_entropy, balanced_cross_entropy, partial(equalization_loss, threshold=0.1)]
)
def test_priors_are_checked(loss: Callable[..., Tensor]) -> None:
    logits, target, _ = samples()
    with pytest.raises(ValueError, match=r"prior must be positive, got 0 for class 1\. Use dt\.class_prior\(counts\)"):
        loss(logits, target, prior=[1.0, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(
        ValueError, match=r"prior must be positive, got -0\.5 for class 4\. Use dt\.class_prior\(counts\)"
    ):
        loss(logits, target, prior=torch.tensor([0.5, 0.25, 0.5, 0.25, -0.5]))
    with pytest.raises(ValueError, match=r"prior must sum to one, got a sum of 500\. Use dt\.class_prior\(counts\)"):
        loss(logits, target, prior=COUNTS)
    with pytest.raises(ShapeError, match=r"prior must be \(5,\), one value per class, got shape \(2,\)"):
        loss(logits, target, prior=[0.5, 0.5])


def test_counts_alpha_margins_and_generators_are_checked() -> None:
    logits, target, _ = samples()
    with pytest.raises(ValueError, match=r"^ldam_loss: counts must be positive, got 0 for class 4\. Raise the counts"):
        ldam_loss(logits, target, counts=[3, 2, 1, 1, 0])
    where = "^pairwise_cross_entropy: "
    with pytest.raises(ValueError, match=where + "alpha must not be negative, got -1 for class 0"):
        pairwise_cross_entropy(logits, target, margins=MARGINS, alpha=[-1, 1, 1, 1, 1])
    with pytest.raises(TypeError, match=where + r"margins must be a torch\.Tensor, got ndarray"):
        pairwise_cross_entropy(logits, target, margins=MARGINS.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=where + "margins must be integers or floats, got dtype torch.bool"):
        pairwise_cross_entropy(logits, target, margins=MARGINS > 0)
    with pytest.raises(
        ShapeError, match=where + r"margins must be \(5, 5\), true class by other class, got shape \(5,"
    ):
        pairwise_cross_entropy(logits, target, margins=MARGINS[0])
    with pytest.raises(ValueError, match=where + "logits and margins must be on the same device, got cpu and meta"):
        pairwise_cross_entropy(logits, target, margins=MARGINS.to("meta"))
    for value in (torch.nan, torch.inf):
        bad = MARGINS.clone()
        bad[2, 3] = bad[4, 1] = value
        with pytest.raises(ValueError, match=where + rf"margins must be finite or -inf, got {value} at index \[2, 3\]"):
            pairwise_cross_entropy(logits, target, margins=bad)
    loss = partial(equalization_loss, logits, target, prior=PRIOR, threshold=0.1, drop=0.5)
    with pytest.raises(ValueError, match=r"^equalization_loss: generator must be given where drop .*, got None\. Use"):
        loss()
    with pytest.raises(TypeError, match=r"^equalization_loss: generator must be a Generator, got int"):
        loss(generator=3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^equalization_loss: generator must be on the device type of the logits, got cpu"
    ):
        equalization_loss(
            logits.to("meta"), target.to("meta"), prior=PRIOR, threshold=0.1, drop=0.5, generator=torch.Generator()
        )


def gaussians(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Points of three classes with one covariance."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    noise = torch.randn(len(target), 2, generator=generator, dtype=torch.float64)
    return MEANS[target] + noise @ CHOLESKY.T, target


MEANS = torch.tensor([[0.0, 0.0], [1.5, 0.5], [0.3, 1.8]], dtype=torch.float64)
CHOLESKY = torch.tensor([[1.0, 0.0], [0.4, 0.8]], dtype=torch.float64)


def balanced_error(pred: Tensor, target: Tensor) -> float:
    return float(np.mean([(pred[target == y] != y).double().mean().item() for y in range(3)]))


def test_on_gaussians_both_adjustments_reach_the_bayes_rule_of_the_balanced_error() -> None:
    counts = [18000, 1600, 400]
    share = torch.tensor(counts, dtype=torch.float64) / 20000
    x, target = gaussians(counts, seed=0)
    test_x, test_target = gaussians([10000, 10000, 10000], seed=1)
    # One covariance S: the rule is argmax of x' S^-1 m - m' S^-1 m / 2, linear in x.
    pull = torch.cholesky_solve(MEANS.T, CHOLESKY)  # (2, 3)
    bayes = (test_x @ pull - (MEANS * pull.T).sum(1) / 2).argmax(1)

    def scores_after(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weight = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)  # two slopes and a bias a class
        optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(x @ weight[:2] + weight[2], target)
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return test_x @ weight[:2] + weight[2]

    in_training = scores_after(partial(logit_adjusted_cross_entropy, prior=share)).argmax(1)
    plain = scores_after(cross_entropy)
    afterwards = (plain - share.log()).argmax(1)
    best = balanced_error(bayes, test_target)
    assert balanced_error(in_training, test_target) == pytest.approx(best, abs=0.01)
    assert balanced_error(afterwards, test_target) == pytest.approx(best, abs=0.01)
    assert (in_training == afterwards).double().mean() > 0.97
    assert balanced_error(plain.argmax(1), test_target) > best + 0.1  # unadjusted, the rare classes are lost
