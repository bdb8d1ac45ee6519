from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dir_toolkit.errors import DirToolkitWarning, LabelError, ShapeError
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import triangular
from dir_toolkit.labels.weights import LDS
from dir_toolkit.priors import (
    LogitAdjuster,
    TauChoice,
    adjust_logits,
    choose_tau,
    class_prior,
    fit_temperature,
    pointwise_mutual_information,
)

MEANS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
PRIOR = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)
TARGETS = [(1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7), (0.9, 0.08, 0.02), (0.5, 0.5, 0.0)]


def samples(n: int, prior: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of three Gaussian classes of unit variance, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.as_tensor(prior, dtype=torch.float64), n, True, generator=generator)
    return MEANS[labels] + torch.randn(n, 2, generator=generator, dtype=torch.float64), labels


def log_posterior(points: Tensor, prior: Any) -> Tensor:
    """Bayes' rule in closed form."""
    joint = -((points[:, None] - MEANS) ** 2).sum(-1) / 2 + torch.as_tensor(prior, dtype=torch.float64).log()
    return joint - joint.exp().sum(-1, keepdim=True).log()


def naive_adjusted(logits: Tensor, prior: Any, target: Any, tau: float) -> Tensor:
    rows = [
        [
            s - tau * math.log(p) + (0.0 if target is None else math.log(t))
            for s, p, t in zip(row, prior, target or prior, strict=True)
        ]
        for row in logits.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


# -- class_prior


def test_the_class_prior_is_that_worked_out_by_hand() -> None:
    assert class_prior([6, 3, 1]).tolist() == [0.6, 0.3, 0.1]
    assert class_prior([6, 3, 1], floor=2).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert class_prior([3, 0, 1], floor=0).tolist() == [0.75, 0, 0.25]
    assert class_prior(torch.tensor([7])).tolist() == [1]
    assert class_prior([1e308, 1e308]).tolist() == [0.5, 0.5]  # of which the sum lies beyond float64
    for counts in ([6, 3, 1], (6, 3, 1), np.array([6, 3, 1], np.uint8), torch.tensor([6, 3, 1], dtype=torch.bfloat16)):
        prior = class_prior(counts)
        assert prior.tolist() == [0.6, 0.3, 0.1]
        assert prior.dtype == torch.float64


def test_class_prior_of_a_density_is_its_prior() -> None:
    density = LabelDensity(Bins.classes(4), [50, 30, 15, 5])
    for given in (density, density.smooth(triangular(3))):
        assert class_prior(given).tolist() == given.prior(floor=1).tolist()
        assert class_prior(given.counts).tolist() == given.prior(floor=1).tolist()


def test_weights_of_one_change_no_prior_where_widths_differ() -> None:
    uneven = Bins.from_edges([0, 1, 2, 8])
    density = LabelDensity(uneven, [30, 0, 2])
    alike = LDS(uneven, kernel=None, scheme="none").fit(density)
    for weights in (None, alike):
        with pytest.warns(DirToolkitWarning, match="no sample of class 1; "):
            prior = class_prior(density, weights=weights, floor=4)
        assert prior.tolist() == pytest.approx([30 / 40.5, 1.5 / 40.5, 9 / 40.5])


def test_classes_without_a_sample_are_named_in_one_warning() -> None:
    with pytest.warns(
        DirToolkitWarning, match=r"^class_prior: no sample of classes 1, 3; .* each to have 1\.$"
    ) as seen:
        assert class_prior([8, 0, 1, 0]).tolist() == pytest.approx([8 / 11, 1 / 11, 1 / 11, 1 / 11])
    assert len(seen) == 1
    with pytest.warns(DirToolkitWarning, match="no sample of class 1; "):
        class_prior(LabelDensity(Bins.classes(2), [3, 0]))
    with pytest.warns(DirToolkitWarning, match=r"classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(40 in all\); "):
        class_prior([0] * 40)


def test_class_prior_refuses_other_counts(not_counts: tuple[Any, type[Exception], str]) -> None:
    counts, kind, message = not_counts
    with pytest.raises(kind, match=f"^class_prior: {message}"):
        class_prior(counts)


def test_class_prior_refuses_a_floor_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"^class_prior: floor must be >= 0, got -1"):
        class_prior([1], floor=-1)
    with pytest.raises(ValueError, match="at least one label must have been counted"):
        class_prior([0, 0], floor=0)


# -- adjust_logits


def test_adjusted_logits_are_those_worked_out_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    prior = [0.5, 0.25, 0.25]
    expected = [1 + math.log(2), 2 + math.log(4), 3 + math.log(4)]
    assert adjust_logits(logits, prior)[0].tolist() == pytest.approx(expected)
    assert adjust_logits(logits, prior, tau=0).tolist() == logits.tolist()
    expected = [1 + math.log(2) / 2 + math.log(0.2), 2 + math.log(2) + math.log(0.8), -math.inf]
    assert adjust_logits(logits, prior, target=[0.2, 0.8, 0], tau=0.5)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("target", [None, *TARGETS[:3]])
@pytest.mark.parametrize("tau", [0, 0.3, 1, 2.5])
def test_adjusting_equals_a_naive_loop(target: Any, tau: float) -> None:
    logits = log_posterior(samples(20, PRIOR)[0], PRIOR)
    expected = naive_adjusted(logits, PRIOR.tolist(), target, tau)
    kind = "uniform" if target is None else target
    given = adjust_logits(logits, PRIOR, target=kind, tau=tau)
    assert_close(given, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):  # the comparison sees a wrong tau
        assert_close(adjust_logits(logits, PRIOR, target=kind, tau=tau + 1e-9), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_exact_logits_adjusted_to_any_prior_are_its_posterior(target: tuple[float, ...]) -> None:
    points, _ = samples(500, PRIOR)
    for constant in (0.0, 7.0):  # logits are known up to a constant
        given = adjust_logits(log_posterior(points, PRIOR) + constant, PRIOR, target=target).log_softmax(-1)
        assert_close(given, log_posterior(points, target), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_adjusted_decisions_err_as_bayes_does(target: tuple[float, ...]) -> None:
    """The Bayes error under the target prior by quadrature, the classifier's on samples drawn under it."""
    n = 40_000
    points, labels = samples(n, target, seed=1)
    wrong = adjust_logits(log_posterior(points, PRIOR), PRIOR, target=target).argmax(1) != labels
    step = 0.02
    axis = torch.arange(-5, 7, step, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = (-((grid[:, None] - MEANS) ** 2).sum(-1) / 2).exp() / (2 * math.pi) * torch.tensor(target)
    bayes = 1 - density.max(1).values.sum().item() * step**2
    assert wrong.double().mean().item() == pytest.approx(bayes, abs=4 * math.sqrt(bayes * (1 - bayes) / n))
    if target != tuple(PRIOR.tolist()):
        plain = (log_posterior(points, PRIOR).argmax(1) != labels).double().mean().item()
        assert plain > bayes + 0.05


def test_adjustments_undo_and_compose() -> None:
    logits = log_posterior(samples(50, PRIOR)[0], PRIOR)
    uniform, other = [1 / 3] * 3, [0.2, 0.3, 0.5]
    same = adjust_logits(logits, PRIOR, target=PRIOR)
    assert_close(same.softmax(-1), logits.softmax(-1), rtol=1e-12, atol=0)
    balanced = adjust_logits(logits, PRIOR)
    assert_close(balanced.softmax(-1), adjust_logits(logits, PRIOR, target=uniform).softmax(-1), rtol=1e-12, atol=0)
    assert_close(adjust_logits(balanced, uniform).softmax(-1), balanced.softmax(-1), rtol=1e-12, atol=0)
    there = adjust_logits(logits, PRIOR, target=other)
    assert_close(adjust_logits(there, other, target=PRIOR), logits, rtol=1e-12, atol=1e-12)
    assert_close(adjust_logits(balanced, uniform, target=other).softmax(-1), there.softmax(-1), rtol=1e-12, atol=0)
    halves = adjust_logits(adjust_logits(logits, PRIOR, tau=0.5), PRIOR, tau=0.5)
    assert_close(halves, balanced, rtol=1e-12, atol=1e-12)


def test_shapes_and_dtypes_follow_and_inputs_are_left_alone() -> None:
    prior = torch.tensor([0.7, 0.2, 0.1])
    for shape in ((3,), (1, 3), (0, 3), (2, 5, 3)):
        logits = torch.randn(shape)
        before = logits.clone()
        assert adjust_logits(logits, prior).shape == shape
        assert torch.equal(logits, before)
    assert prior.tolist() == torch.tensor([0.7, 0.2, 0.1]).tolist()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        logits = torch.tensor([[3, -2, 1]], dtype=dtype)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        for given in (adjust_logits(logits, prior), LogitAdjuster(prior)(logits)):
            assert given.dtype == expected
        assert pointwise_mutual_information(logits, prior).dtype == expected
    assert adjust_logits(torch.zeros(4, 1), [1.0]).tolist() == [[0.0]] * 4
    nan = adjust_logits(torch.tensor([[math.nan, 0, 0]]), prior)
    assert nan.isnan().tolist() == [[True, False, False]]


def test_gradients_agree_with_differences() -> None:
    logits = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = [0.2, 0.2, 0.6]
    assert torch.autograd.gradcheck(lambda x: adjust_logits(x, PRIOR, target=target, tau=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: pointwise_mutual_information(x, PRIOR), logits)
    prior = PRIOR.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: adjust_logits(logits.detach(), p / p.sum()), prior)


BAD_PRIORS: list[tuple[Any, type[Exception], str]] = [
    (
        [0.5, 0.5, 0.0],
        ValueError,
        r"prior must be positive, got 0 for class 2\. Use dt\.class_prior\(counts\), which floors counts",
    ),
    ([0.7, 0.5, -0.2], ValueError, "prior must be positive, got -0.2 for class 2"),
    ([6, 3, 1], ValueError, r"prior must sum to one, got a sum of 10\. Use dt\.class_prior\(counts\)"),
    ([0.5, 0.3, 0.1], ValueError, "prior must sum to one, got a sum of 0.9"),
    ([0.5, math.nan, 0.5], ValueError, r"prior must be finite, got nan at index \[1\]"),
    ([[0.5, 0.5]], ShapeError, r"prior must be \(C,\), one share per class, got shape \(1, 2\)"),
    ([], ValueError, "prior must hold at least one value"),
    ("uniform", TypeError, "prior must be integers or floats"),
    (torch.tensor([True]), TypeError, "prior must be integers or floats, got dtype torch.bool"),
    ([0.5, 0.5], ShapeError, r"logits must be \((N|\.\.\.), 2\), one per class of the prior, got shape \(1, 3\)"),
]


@pytest.mark.parametrize(("prior", "kind", "message"), BAD_PRIORS)
def test_a_prior_must_be_one(prior: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^adjust_logits: {message}"):
        adjust_logits(torch.zeros(1, 3), prior)
    with pytest.raises(kind, match=f"^pointwise_mutual_information: {message}"):
        pointwise_mutual_information(torch.zeros(1, 3), prior)
    with pytest.raises(kind, match=f"^LogitAdjuster: {message}"):
        LogitAdjuster(prior)(torch.zeros(1, 3))
    with pytest.raises(kind, match=f"^choose_tau: {message}"):
        choose_tau(torch.zeros(1, 3), torch.tensor([0]), prior)


def test_a_prior_may_be_off_by_rounding() -> None:
    adjust_logits(torch.zeros(1, 2), [0.50004, 0.50004])
    with pytest.raises(ValueError, match="prior must sum to one"):
        adjust_logits(torch.zeros(1, 2), [0.5001, 0.5001])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": "balanced"}, ValueError, "target must be one of 'uniform', got 'balanced'"),
        ({"target": [0.5, 0.5]}, ShapeError, r"target must be \(3,\), one per class of the prior, got shape \(2,\)"),
        ({"target": [1.2, -0.2, 0]}, ValueError, "target must not be negative, got -0.2 for class 1"),
        ({"target": [1, 1, 1]}, ValueError, "target must sum to one, got a sum of 3"),
        ({"target": None}, TypeError, "target must be integers or floats"),
        ({"tau": -1}, ValueError, r"tau must be >= 0 and <= 1e\+30, got -1"),
        ({"tau": math.inf}, ValueError, r"tau must be >= 0 and <= 1e\+30, got inf"),
        ({"tau": 1e38}, ValueError, r"tau must be >= 0 and <= 1e\+30, got 1e\+38"),
        ({"tau": "1"}, TypeError, "tau must be a number"),
    ],
)
def test_other_targets_and_taus_are_refused(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^adjust_logits: {message}"):
        adjust_logits(torch.zeros(1, 3), PRIOR, **options)
    with pytest.raises(kind, match=f"^LogitAdjuster: {message}"):
        LogitAdjuster(PRIOR, **options)


@pytest.mark.parametrize(
    ("logits", "kind", "message"),
    [
        ([[0.0] * 3], TypeError, r"logits must be a torch.Tensor, got list\. Use torch.as_tensor\(logits\)\."),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "logits must be integers or floats"),
        (torch.tensor(1.0), ShapeError, r"logits must be \(\.\.\., 3\), one per class of the prior, got shape \(\)"),
        (torch.zeros(3, 1), ShapeError, r"logits must be \(\.\.\., 3\), one per class of the prior"),
    ],
)
def test_other_logits_are_refused(logits: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^adjust_logits: {message}"):
        adjust_logits(logits, PRIOR)
    with pytest.raises(kind, match=f"^LogitAdjuster: {message}"):
        LogitAdjuster(PRIOR)(logits)


def test_pointwise_mutual_information_is_the_evidence() -> None:
    independent = PRIOR.log().expand(4, 3) + 5  # the posterior is the prior, whatever the input
    assert_close(
        pointwise_mutual_information(independent, PRIOR), torch.zeros(4, 3, dtype=torch.float64), atol=1e-12, rtol=0
    )
    points, _ = samples(50, PRIOR)
    evidence = log_posterior(points, PRIOR) - PRIOR.log()
    given = pointwise_mutual_information(log_posterior(points, PRIOR) - 3, PRIOR)
    assert_close(given, evidence, rtol=1e-12, atol=1e-12)
    # Averaged under the posterior it is a divergence from the prior; exp of it under the prior averages one.
    assert ((given.exp() * PRIOR).sum(-1) - 1).abs().max() < 1e-12
    assert ((log_posterior(points, PRIOR).exp() * given).sum(-1) >= 0).all()


# -- fit_temperature


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float, weight: list[float]) -> float:
    total = 0.0
    for row, label, w in zip(logits.tolist(), labels.tolist(), weight, strict=True):
        scaled = [s / temperature for s in row]
        total += w * (math.log(sum(math.exp(s) for s in scaled)) - scaled[label])
    return total / sum(weight)


def test_the_temperature_is_that_worked_out_by_hand() -> None:
    logits = torch.tensor([[4.0, 0.0]]).repeat(4, 1)
    labels = torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(4 / math.log(3), rel=1e-12)
    weighted = fit_temperature(logits, labels, weight=torch.tensor([1.0, 1, 0, 1]))
    assert weighted == pytest.approx(4 / math.log(2), rel=1e-12)
    huge = torch.tensor([1e308, 1e308, 0, 1e308], dtype=torch.float64)  # of which the sum lies beyond float64
    assert fit_temperature(logits, labels, weight=huge) == pytest.approx(4 / math.log(2), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_is_a_minimum_of_a_naive_likelihood(dtype: torch.dtype) -> None:
    points, labels = samples(60, [0.4, 0.3, 0.3])
    logits = (3 * log_posterior(points, [0.4, 0.3, 0.3])).to(dtype)
    weight = torch.rand(60, generator=torch.Generator().manual_seed(2))
    for w in (None, weight):
        shares = [1.0] * 60 if w is None else w.tolist()
        best = fit_temperature(logits, labels, weight=w)
        least = negative_log_likelihood(logits, labels, best, shares)
        for factor in (1 - 1e-4, 1 + 1e-4):
            assert negative_log_likelihood(logits, labels, best * factor, shares) > least
        rise = [negative_log_likelihood(logits, labels, best * factor, shares) for factor in (1 - 1e-5, 1 + 1e-5)]
        assert rise[0] == pytest.approx(rise[1], abs=1e-13)


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_temperature_recovers_what_logits_were_multiplied_by(factor: float) -> None:
    points, labels = samples(20_000, PRIOR)
    logits = log_posterior(points, PRIOR)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)
    exact = fit_temperature(factor * logits, labels) / factor
    assert exact == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


def test_temperature_does_not_depend_on_shift_or_order() -> None:
    points, labels = samples(100, [0.4, 0.3, 0.3])
    logits = 2 * log_posterior(points, [0.4, 0.3, 0.3])
    best = fit_temperature(logits, labels)
    twice = fit_temperature(torch.cat([logits, logits[:30]]), torch.cat([labels, labels[:30]]))
    weight = torch.ones(100, dtype=torch.float16)
    weight[:30] = 2
    assert fit_temperature(logits, labels, weight=weight) == pytest.approx(twice, rel=1e-10)
    assert twice != pytest.approx(best, rel=1e-6)
    weight[:] = 1
    weight[:30] = 0
    assert fit_temperature(logits, labels, weight=weight) == pytest.approx(
        fit_temperature(logits[30:], labels[30:]), rel=1e-10
    )
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert fit_temperature(logits[order], labels[order]) == pytest.approx(best, rel=1e-10)
    assert fit_temperature(logits + torch.arange(100)[:, None], labels) == pytest.approx(best, rel=1e-10)
    assert fit_temperature(logits.clone().requires_grad_(), labels.int()) == best


def test_a_temperature_without_optimum_warns() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    lower = r"^fit_temperature: the best temperature lies at or below 0\.001, since every label has the largest logit"
    with pytest.warns(DirToolkitWarning, match=lower) as seen:
        assert fit_temperature(logits, torch.tensor([0, 1])) == 1e-3
    assert len(seen) == 1
    with pytest.warns(DirToolkitWarning, match=lower):
        assert fit_temperature(logits[:1], torch.tensor([0])) == 1e-3
    with pytest.warns(DirToolkitWarning, match=lower):
        assert fit_temperature(1e-6 * logits.repeat(3, 1), torch.tensor([0, 1, 0, 0, 0, 1])) == 1e-3
    with pytest.warns(DirToolkitWarning, match=r"lies at or above 1000, since the logits tell no more than chance"):
        assert fit_temperature(logits[:1], torch.tensor([1])) == 1e3
    with pytest.warns(DirToolkitWarning, match="the logits of each sample are all equal"):
        assert fit_temperature(torch.tensor([[0.1], [0.3], [1e6]]).repeat(1, 7), torch.tensor([0, 1, 6])) == 1
    with pytest.warns(DirToolkitWarning, match="the logits of each sample are all equal"):
        assert fit_temperature(torch.tensor([[0.3]]), torch.tensor([0])) == 1


BAD_DATA: list[tuple[Any, Any, type[Exception], str]] = [
    ([[0.0]], torch.tensor([0]), TypeError, "logits must be a torch.Tensor, got list"),
    (torch.zeros(2, 2), [0, 1], TypeError, "labels must be a torch.Tensor, got list"),
    (torch.zeros(2, 2), torch.zeros(2, 1).long(), ShapeError, r"labels must be \(2,\), one per row of logits, got"),
    (torch.zeros(2), torch.zeros(2).long(), ShapeError, r"logits must be \(N, C\), got shape \(2,\)"),
    (torch.zeros(0, 2), torch.zeros(0).long(), ValueError, "logits must hold at least one value"),
    (torch.zeros(2, 2), torch.zeros(2), TypeError, r"labels must be integers, .*float32\. Use labels.long\(\)\."),
    (torch.zeros(2, 2), torch.tensor([True, False]), TypeError, "labels must be integers, got dtype torch.bool"),
    (
        torch.zeros(3, 2),
        torch.tensor([0, 2, -1]),
        LabelError,
        r"labels must hold class indices from 0 to 1, got 2 at index \[1\] \(2 such values\)",
    ),
    (torch.tensor([[0, math.inf]]), torch.tensor([0]), ValueError, r"logits must be finite, got inf at index \[0, 1\]"),
    (torch.tensor([[math.nan, 0]]), torch.tensor([0]), ValueError, "logits must be finite, got nan"),
    (
        torch.zeros(1, 2, device="meta"),
        torch.tensor([0]),
        ValueError,
        "logits must hold values, got a tensor on the me",
    ),
    (
        torch.zeros(1, 2),
        torch.tensor([0], device="meta"),
        ValueError,
        "labels must hold values, got a tensor on the me",
    ),
]


@pytest.mark.parametrize(("logits", "labels", "kind", "message"), BAD_DATA)
def test_other_held_out_data_are_refused(logits: Any, labels: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^fit_temperature: {message}"):
        fit_temperature(logits, labels)
    with pytest.raises(kind, match=f"^choose_tau: {message}"):
        choose_tau(logits, labels, [0.5, 0.5])


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        ([1, 1], TypeError, "weight must be a torch.Tensor"),
        (torch.ones(2, 1), ShapeError, r"weight must be \(2,\), one per label, got shape \(2, 1\)"),
        (torch.tensor([1, -1]), ValueError, "weight must not be negative"),
        (torch.tensor([1, math.nan]), ValueError, "weight must be finite"),
        (torch.zeros(2), ValueError, "at least one weight must be positive, got zeros"),
        (torch.tensor([True, True]), TypeError, "weight must be integers or floats"),
        (torch.ones(2, device="meta"), ValueError, "weight must hold values, got a tensor on the meta device"),
    ],
)
def test_other_weights_are_refused(weight: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^fit_temperature: {message}"):
        fit_temperature(torch.eye(2), torch.tensor([0, 1]), weight=weight)


# -- choose_tau


def naive_criterion(by: str, adjusted: Tensor, labels: Tensor) -> float:
    """Plain Python, a class at a time."""
    rows, classes = adjusted.tolist(), labels.tolist()
    probabilities = [[math.exp(s - max(row)) for s in row] for row in rows]
    probabilities = [[p / sum(row) for p in row] for row in probabilities]
    present = sorted(set(classes))
    own = {c: [i for i, label in enumerate(classes) if label == c] for c in present}

    def right(i: int) -> bool:
        return rows[i].index(max(rows[i])) == classes[i]

    if by == "balanced_error":
        return sum(sum(not right(i) for i in own[c]) / len(own[c]) for c in present) / len(present)
    if by == "log_loss":
        losses = [-math.log(probabilities[i][classes[i]]) for i in range(len(rows))]
        return sum(sum(losses[i] for i in own[c]) / len(own[c]) for c in present) / len(present)
    total = 0.0
    for b in range(15):
        gap = 0.0
        for c in present:
            inside = [i for i in own[c] if b / 15 < max(probabilities[i]) <= (b + 1) / 15]
            gap += sum(right(i) - max(probabilities[i]) for i in inside) / len(own[c]) / len(present)
        total += abs(gap)
    return total


@pytest.mark.parametrize("by", ["balanced_error", "log_loss", "ece"])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_criteria_equal_naive_loops(by: Any, temperature: float) -> None:
    points, labels = samples(150, [0.5, 0.3, 0.2])
    logits = log_posterior(points, PRIOR)
    taus = [0.0, 0.4, 1.0, 1.7]
    choice = choose_tau(logits, labels, PRIOR, by=by, taus=taus, temperature=temperature)
    expected = [naive_criterion(by, logits / temperature - tau * PRIOR.log(), labels) for tau in taus]
    np.testing.assert_allclose(choice.scores, expected, rtol=1e-12, atol=1e-12)
    assert len(set(expected)) == len(taus)  # else a wrong tau would not be seen
    assert (choice.tau, choice.temperature, choice.by) == (taus[int(np.argmin(expected))], temperature, by)


def test_balanced_error_of_the_worked_example() -> None:
    # 10, 20 and 30 samples with 1, 10 and 20 right: Menon et al.'s measure makes (9/10 + 10/20 + 10/30) / 3 of them.
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
    pred = torch.tensor([0] * 1 + [1] * 9 + [1] * 10 + [2] * 10 + [2] * 20 + [0] * 10)
    choice = choose_tau(torch.eye(3)[pred], labels, [1 / 3] * 3, taus=[0.0])
    assert choice.scores.tolist() == pytest.approx([0.5778], abs=5e-5)
    assert choice.tau == 0


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("shares", [PRIOR.tolist(), [1 / 3] * 3])
def test_exact_posteriors_want_tau_one(factor: float, shares: list[float]) -> None:
    """Whatever the scale of the logits, and whatever the validation set's own prior."""
    points, labels = samples(20_000, shares, seed=3)
    logits = factor * log_posterior(points, PRIOR)
    for by in ("log_loss", "ece"):
        choice = choose_tau(logits, labels, PRIOR, by=by)  # type: ignore[arg-type]
        assert choice.tau == pytest.approx(1, abs=0.15), by
        assert choice.temperature == pytest.approx(factor, rel=0.1)
    choice = choose_tau(logits, labels, PRIOR, temperature=factor)
    at_one = choice.scores[np.flatnonzero(choice.taus == 1)].item()
    assert choice.scores.min() <= at_one <= choice.scores.min() + 0.01  # a flat optimum, which the choice lies on
    assert choice.tau == pytest.approx(1, abs=0.4)
    assert choice.scores[0] > at_one + 0.1
    plain = choose_tau(logits, labels, PRIOR)
    assert plain.temperature == 1
    assert plain.tau == pytest.approx(factor, abs=0.4 * factor)


def test_the_choice_holds_its_curve() -> None:
    points, labels = samples(300, PRIOR)
    logits = log_posterior(points, PRIOR)
    choice = choose_tau(logits, labels, PRIOR)
    np.testing.assert_allclose(choice.taus, np.arange(61) * 0.05, atol=1e-15)
    assert choice.scores.shape == (61,)
    assert choice.taus.dtype == choice.scores.dtype == np.float64
    for array in (choice.taus, choice.scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        choice.tau = 2.0  # type: ignore[misc]
    assert isinstance(pickle.loads(pickle.dumps(choice)), TauChoice)
    adjuster = LogitAdjuster(PRIOR, tau=choice.tau, temperature=choice.temperature)
    wrong = naive_criterion("balanced_error", adjuster(logits), labels)
    assert wrong == pytest.approx(choice.scores.min(), abs=1e-9)
    # A validation set with one class's samples twice says the same.
    more = labels == 2
    again = choose_tau(torch.cat([logits, logits[more]]), torch.cat([labels, labels[more]]), PRIOR)
    np.testing.assert_allclose(again.scores, choice.scores, rtol=1e-12)
    assert again.tau == choice.tau


def test_of_equally_good_taus_the_middle_of_the_longest_run_is_taken() -> None:
    # A balanced pair: class 1 is chosen once tau log 3 passes its sample's margin.
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    prior, step = [0.75, 0.25], 2 / math.log(3)
    taus = np.array([0, 0.1, 0.2, 0.3, 0.6, 0.9, 1.1, 1.2]) * step
    choice = choose_tau(logits, labels, prior, taus=taus)
    assert choice.scores.tolist() == [0.5, 0, 0, 0, 0, 0, 0.5, 0.5]
    assert choice.tau == taus[3]
    assert choose_tau(logits, labels, prior, taus=taus[:5]).tau == taus[2]  # of two middles the lower one
    assert choose_tau(logits, labels, prior, taus=taus[:1]).tau == 0
    # Class 0 is lost before class 1 is won, which makes two runs.
    logits = torch.tensor([[0.6, 0.0], [1.4, 0.0]], dtype=torch.float64)
    taus = np.array([0, 0.1, 0.5, 0.8, 0.9, 1.0]) * step
    choice = choose_tau(logits, labels, prior, taus=taus)
    assert choice.scores.tolist() == [0.5, 0.5, 1, 0.5, 0.5, 0.5]
    assert choice.tau == taus[4]
    assert choose_tau(logits, labels, prior, taus=taus[:5]).tau == taus[0]  # of equally long runs the first


def test_absent_classes_are_left_out_with_a_warning() -> None:
    message = r"^choose_tau: no validation label of class 2; the criterion leaves them out\.$"
    points, labels = samples(40, [0.5, 0.5, 0])
    logits = log_posterior(points, PRIOR)
    with pytest.warns(DirToolkitWarning, match=message) as seen:
        choice = choose_tau(logits, labels, PRIOR, taus=[0.0, 1.0])
    assert len(seen) == 1
    expected = [naive_criterion("balanced_error", logits - tau * PRIOR.log(), labels) for tau in (0, 1)]
    assert choice.scores.tolist() == pytest.approx(expected)
    with pytest.warns(DirToolkitWarning, match="no validation label of classes 0, 1;"):
        choice = choose_tau(torch.zeros(1, 3), torch.tensor([2]), PRIOR)
    assert choice.scores.tolist() == [1.0] + [0.0] * 60
    with pytest.warns(DirToolkitWarning) as seen:
        choice = choose_tau(torch.eye(3)[:1], torch.tensor([0]), PRIOR, by="log_loss")
    assert [str(w.message).partition(":")[0] for w in seen] == ["choose_tau"] * 2
    assert choice.temperature == 1e-3
    assert np.isfinite(choice.scores).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"by": "accuracy"}, ValueError, "by must be one of 'balanced_error', 'log_loss', 'ece', got 'accuracy'"),
        ({"taus": []}, ValueError, "taus must hold at least one value"),
        (
            {"taus": [0, 1, 1]},
            ValueError,
            r"taus must be one row, rising and not negative, at most 1e\+30, got \[0.0, 1.0, 1.0\]",
        ),
        ({"taus": [0, 1e38]}, ValueError, "taus must be one row, rising and not negative, at most"),
        ({"taus": [-1, 0]}, ValueError, "taus must be one row, rising and not negative"),
        ({"taus": [[0, 1]]}, ValueError, "taus must be one row"),
        ({"taus": [0, math.nan]}, ValueError, "taus must be finite"),
        ({"taus": 1.0}, ValueError, "taus must be one row"),
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    ],
)
def test_choose_tau_refuses_other_options(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^choose_tau: {message}"):
        choose_tau(torch.eye(2), torch.tensor([0, 1]), [0.5, 0.5], **options)


def test_choose_tau_reads_the_prior() -> None:
    with pytest.raises(ValueError, match=r"^choose_tau: prior must hold values, got a tensor on the meta device"):
        choose_tau(torch.eye(2), torch.tensor([0, 1]), torch.ones(2, device="meta") / 2)


def test_choose_tau_leaves_its_inputs_alone() -> None:
    logits, labels, taus = torch.eye(2)[[0, 0, 1]].requires_grad_(), torch.tensor([0, 1, 1]), np.array([0.0, 1.0])
    before, state = logits.detach().clone(), torch.get_rng_state()
    choose_tau(logits, labels, [0.7, 0.3], taus=taus, by="ece")
    fit_temperature(logits, labels)
    assert torch.equal(logits.detach(), before)
    assert labels.tolist() == [0, 1, 1]
    assert torch.equal(torch.get_rng_state(), state)
    taus[0] = 0.5  # still the caller's to write to


# -- LogitAdjuster


@pytest.mark.parametrize("target", ["uniform", [0.2, 0.8, 0.0]])
def test_the_module_does_what_the_function_does(target: Any) -> None:
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    adjuster = LogitAdjuster(PRIOR, target=target, tau=0.7, temperature=1.6)
    assert_close(adjuster(logits), adjust_logits(logits / 1.6, PRIOR, target=target, tau=0.7))
    assert adjuster.offset.shape == (3,)
    assert adjuster.offset.dtype == torch.float32
    assert not list(adjuster.parameters())
    assert str(adjuster).startswith("LogitAdjuster(offset=[")
    assert str(adjuster).endswith(", temperature=1.6)")
    model = nn.Sequential(nn.Linear(2, 3), adjuster)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    assert_close(model(x), adjust_logits(model[0](x) / 1.6, PRIOR, target=target, tau=0.7))
    model(x)[:, :2].sum().backward()
    assert torch.isfinite(model[0].weight.grad).all()


def test_a_state_dict_brings_everything() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    adjuster = LogitAdjuster(PRIOR, tau=0.7, temperature=1.6)
    file = io.BytesIO()
    torch.save(adjuster.state_dict(), file)
    file.seek(0)
    other = LogitAdjuster([1 / 3] * 3)
    assert not torch.equal(other(logits), adjuster(logits))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(logits), adjuster(logits))
    with pytest.raises(RuntimeError, match="size mismatch for offset"):
        LogitAdjuster([0.5, 0.5]).load_state_dict(adjuster.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(adjuster))(logits), adjuster(logits))


def test_the_module_can_be_exported_for_any_batch_size() -> None:
    model = nn.Sequential(nn.Linear(2, 3), LogitAdjuster(PRIOR, target=[0.2, 0.3, 0.5], tau=0.8, temperature=2)).eval()
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for n in (7, 2, 3):
        assert_close(exported.module()(x[:n]), model(x[:n]), rtol=0, atol=0)


def test_the_module_refuses_a_temperature_of_zero() -> None:
    for temperature in (0, -1, math.nan):
        with pytest.raises(ValueError, match=r"^LogitAdjuster: temperature must be > 0, got"):
            LogitAdjuster(PRIOR, temperature=temperature)
    for temperature in (1e39, 1e-50):
        with pytest.raises(ValueError, match=r"^LogitAdjuster: temperature must fit into float32"):
            LogitAdjuster(PRIOR, temperature=temperature)


def test_the_module_refuses_logits_on_another_device() -> None:
    rule = r"^LogitAdjuster: offset and logits must be on the same device, got cpu and meta\. Use logits\.to\("
    with pytest.raises(ValueError, match=rule):
        LogitAdjuster(PRIOR)(torch.zeros(1, 3, device="meta"))
