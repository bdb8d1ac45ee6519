from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_tester import Batch, LossTester, close, rows_at
from scipy.integrate import quad
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dir_toolkit import Bins, LabelDensity, weighted_mse
from dir_toolkit.errors import DirToolkitError, DirToolkitWarning, LabelError, ShapeError
from dir_toolkit.losses import (
    BatchMCLoss,
    BinnedIntegrationLoss,
    GaussianMixtureLoss,
    batch_mc_loss,
    binned_integration_loss,
    gaussian_mixture_loss,
)

BINS = Bins.uniform(-4, 4, width=0.5)
PRIOR = np.array([1, 0, 2, 6, 10, 9, 8, 7, 6, 5, 4, 2, 2, 1, 1, 0]) / 64  # which float32 holds
LIMITS = list(zip(BINS.edges[:-1].tolist(), BINS.edges[1:].tolist(), strict=True))
MIXTURE = ([0.25, 0.75], [-1.5, 0.5], [0.25, 2.0])
PLANE = ([0.5, 0.25, 0.25], [[0, 1], [-1, 0.5], [2, 2]], [[0.5, 1], [2, 0.25], [1, 0.75]])

# Each form of the loss, built with a noise that float32 holds, and the dimensions of its labels.
FORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "batch": (BatchMCLoss, ()),
    "batch of 3-D labels": (BatchMCLoss, (3,)),
    "mixture": (lambda **options: GaussianMixtureLoss(*MIXTURE, **options), ()),
    "mixture of 2-D labels": (lambda **options: GaussianMixtureLoss(*PLANE, **options), (2,)),
    "bins": (lambda **options: BinnedIntegrationLoss(BINS, PRIOR, **options), ()),
}
each_form = pytest.mark.parametrize("form", FORMS)


def samples(form: str, n: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, *FORMS[form][1])
    pred, target = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    return pred, target, 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)


def built(form: str, noise_sigma: float = 0.75, **options: Any) -> Any:
    """In float64, the noise too."""
    loss: Any = FORMS[form][0](noise_sigma=noise_sigma, **options).double()
    if loss.learn:
        nn.init.constant_(loss.log_sigma, math.log(noise_sigma))
    return loss


def normal(y: float, mean: float, variance: float) -> float:
    return math.exp(-((y - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def normals(y: list[float], mean: list[float], variance: list[float]) -> float:
    return math.prod(normal(*numbers) for numbers in zip(y, mean, variance, strict=True))


def mean_normal(mean: float, variance: float, low: float, high: float) -> float:
    """The mean of the density between two limits."""
    low, high, scale = low - mean, high - mean, math.sqrt(2 * variance)
    low, high = (low, high) if high > 0 else (-high, -low)  # to the side where tails are small
    if low > 0:
        return (math.erfc(low / scale) - math.erfc(high / scale)) / (2 * (high - low))
    return (math.erf(high / scale) - math.erf(low / scale)) / (2 * (high - low))


def rows(x: Tensor) -> list[list[float]]:
    return x.reshape(len(x), -1).tolist()


def naive(loss: Any, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Each sample's loss by the formula with all its constants, in plain float64 Python."""
    variance = loss.noise_sigma.item() ** 2
    weights = [1.0] * len(pred) if weight is None else weight.tolist()
    values = []
    for p, y, w in zip(rows(pred), rows(target), weights, strict=True):
        noise = [variance] * len(p)
        if isinstance(loss, BatchMCLoss):
            integral = sum(v * normals(other, p, noise) for other, v in zip(rows(target), weights, strict=True))
        elif isinstance(loss, GaussianMixtureLoss):
            shares, means, variances = loss.weights.tolist(), rows(loss.means), rows(loss.variances)
            parts = list(zip(shares, means, variances, strict=True))
            integral = sum(k * normals(p, mean, [v + variance for v in own]) for k, mean, own in parts)
            middle = np.average(means, 0, shares)
            total = np.average(np.square(np.array(means) - middle) + np.array(variances), 0, shares)
            background = normals(p, middle.tolist(), (total + 2 * variance).tolist())
            integral = (1 - 1e-9) * integral + 1e-9 * background
        else:
            integral = sum(
                k * mean_normal(p[0], variance, *own) for k, own in zip(loss.prior.tolist(), LIMITS, strict=True)
            )
            integral = (1 - 1e-9) * integral + 1e-9 * normal(p[0], 0, 8**2 + 2 * variance)
        values.append(w * 2 * variance * (-math.log(normals(y, p, noise)) + math.log(integral)))
    return torch.tensor(values, dtype=torch.float64)


class FormTester(LossTester):
    """A form as a function, of a given noise; its module is built by ``FORMS`` without learning it."""

    form = "batch"
    floor = None

    def batch(self, n: int = 12) -> Batch:
        pred, target, weight = samples(self.form, n)
        return {"rows": pred, "target": target, "weight": weight}

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        loss = built(self.form, options["noise_sigma"], learn=False)
        return naive(loss, batch["rows"], batch["target"], batch["weight"] if weighted else None)


class TestBatch(FormTester):
    function, module = staticmethod(batch_mc_loss), partial(BatchMCLoss, learn=False)
    variants = {"0.75": {"noise_sigma": 0.75}, "2": {"noise_sigma": 2.0}}
    whole = needs_two = True

    def test_weight_two_is_seen_twice(self, options: Any) -> None:
        batch = self.batch()
        batch["weight"][[3, 7]] = 2.0
        again = rows_at(
            {**batch, "weight": torch.where(batch["weight"] == 2, 1.0, batch["weight"])}, [*range(12), 3, 7]
        )
        close(self.call(options, batch, reduction="sum"), self.call(options, again, reduction="sum"))


class TestBatchOfRows(TestBatch):
    form, several = "batch of 3-D labels", True


class TestMixture(FormTester):
    form, function = "mixture", staticmethod(gaussian_mixture_loss)
    module = partial(GaussianMixtureLoss, learn=False)
    parts = dict(zip(("weights", "means", "variances"), MIXTURE, strict=True))
    variants = {"0.75": {**parts, "noise_sigma": 0.75}, "2": {**parts, "noise_sigma": 2.0}}
    copies = True


class TestMixtureOfRows(TestMixture):
    form, several = "mixture of 2-D labels", True
    parts = dict(zip(("weights", "means", "variances"), PLANE, strict=True))
    variants = {"0.75": {**parts, "noise_sigma": 0.75}}


class TestBins(FormTester):
    form, function = "bins", staticmethod(binned_integration_loss)
    module = partial(BinnedIntegrationLoss, learn=False)
    variants = {"0.75": {"bins": BINS, "density": PRIOR, "noise_sigma": 0.75}}
    copies = True


@each_form
def test_labels_of_other_shapes_and_with_gradients_are_refused(form: str) -> None:
    loss = FORMS[form][0]()
    where, (pred, target, weight) = f"^{type(loss).__name__}: ", samples(form)
    with pytest.raises(ShapeError, match=where + r"pred must be \(N.*\), got shape \(\)"):
        loss(pred.sum(), target.sum())
    with pytest.raises(ShapeError, match=where + r"pred must be \(N.*\), got shape \(9, 2, 2\)"):
        loss(torch.ones(9, 2, 2), torch.ones(9, 2, 2))
    with pytest.raises(ShapeError, match=where + r"weight must be \(9,\), one value per sample, got shape \(9, 1\)"):
        loss(pred, target, weight[:, None])
    with pytest.raises(ValueError, match=where + "target must hold labels, which have no gradient"):
        loss(pred, target.requires_grad_())


@pytest.mark.parametrize("sigma", [torch.ones(1), torch.tensor(1), "1"])
def test_the_noise_of_a_function_is_a_number_or_a_tensor_of_no_dimension(sigma: Any) -> None:
    pred, target, _ = samples("batch")
    with pytest.raises((ShapeError, TypeError), match=r"^batch_mc_loss: noise_sigma must be (a num|floats|\()"):
        batch_mc_loss(pred, target, noise_sigma=sigma)
    learnt = torch.tensor(0.75, requires_grad=True)
    batch_mc_loss(pred, target, noise_sigma=learnt).backward()
    assert learnt.grad is not None
    assert learnt.grad != 0


def test_a_missing_label_leaves_no_trace_where_labels_are_dropped() -> None:
    drop = BinnedIntegrationLoss(BINS, PRIOR, learn=False, outside="drop")
    pred, target, weight = samples("bins")
    weight[3] = 0
    missing = target.clone()
    missing[3] = torch.nan
    assert torch.equal(drop(pred, missing, weight), drop(pred, target, weight))


def test_values_are_those_worked_out_by_hand() -> None:
    batch = BatchMCLoss(noise_sigma=2.0, learn=False)
    pred, target = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])
    # Squared distances to the two labels: 0 and 16, 9 and 1; 2 sigma² = 8.
    expected = [8 * math.log(1 + math.exp(-2)), 8 * math.log(1 + math.exp(-1))]
    assert batch._reduced(pred, target, None, "none").tolist() == pytest.approx(expected, rel=1e-6)
    assert batch(pred, target).item() == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert batch._reduced(pred, target, None, "sum").item() == pytest.approx(sum(expected), rel=1e-6)

    mixture = GaussianMixtureLoss([1.0], [0.0], [3.0], noise_sigma=1.0)
    expected_one = 2 * (0.5 * (3 - 2) ** 2 - math.log(2) - 9 / 8)
    assert mixture(torch.tensor([3.0]), torch.tensor([2.0])).item() == pytest.approx(expected_one, rel=1e-6)

    bins = BinnedIntegrationLoss(Bins.uniform(0, 3, width=1), [0.5, 0.0, 0.5], noise_sigma=1.0)
    # Between 0 and 1, and between 2 and 3, as seen from 1: Phi(0) - Phi(-1) and Phi(2) - Phi(1).
    mass = 0.5 * (0.3413447461 + 0.1359051220)
    expected_one = 2 * (0.5 + math.log(math.sqrt(2 * math.pi)) + math.log(mass))
    assert bins(torch.tensor([1.0]), torch.tensor([0.0])).item() == pytest.approx(expected_one, abs=1e-6)


def test_the_batch_form_is_cross_entropy_over_the_labels() -> None:
    pred, target, _ = samples("batch", 30)
    target = target.round()  # with repeats
    loss = built("batch", 0.5)
    logits = -(pred[:, None] - target).square() / (2 * 0.5**2)
    expected = 2 * 0.5**2 * F.cross_entropy(logits, torch.arange(30))
    assert_close(loss(pred, target), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["mixture", "bins"])
def test_the_integral_is_the_one_that_quadrature_finds(form: str) -> None:
    pred, target, _ = samples(form, 4)
    if form == "mixture":
        loss, tolerance = built(form), 1e-9

        def density(y: float) -> float:
            return sum(w * normal(y, m, v) for w, m, v in zip(*MIXTURE, strict=True))
    else:  # narrow bins, a smooth density

        def density(y: float) -> float:
            return 0.3 * normal(y, -1, 0.5) + 0.7 * normal(y, 1, 1)

        bins = Bins.uniform(-8, 8, count=640)
        prior = np.array([density(c) for c in bins.centers])
        loss, tolerance = BinnedIntegrationLoss(bins, prior / prior.sum(), noise_sigma=0.75, learn=False).double(), 1e-4
    values = []
    for p, y in zip(pred.tolist(), target.tolist(), strict=True):
        integral = quad(lambda x, p=p: normal(x, p, 0.75**2) * density(x), -12, 12, points=[p], limit=200)[0]
        values.append(2 * 0.75**2 * (-math.log(normal(y, p, 0.75**2)) + math.log(integral)))
    given = loss._reduced(pred, target, None, "none")
    assert_close(given, torch.tensor(values, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def big_sample(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rare = torch.rand(n, generator=generator) < 0.2
    return torch.where(rare, 9.0, 2.0) + torch.randn(n, generator=generator) * torch.where(rare, 2.0, 1.0)


def test_the_three_forms_agree_on_a_large_sample() -> None:
    target = big_sample(1500)
    pred = 0.8 * target + 1
    bins = Bins.uniform(-5, 25, width=0.02)
    binned = BinnedIntegrationLoss(bins, LabelDensity.count(target, bins), noise_sigma=1.0)._reduced(
        pred, target, None, "none"
    )
    batch = BatchMCLoss(1.0)._reduced(pred, target, None, "none") - 2 * math.log(1500)
    assert_close(batch, binned, rtol=0, atol=5e-3)  # a label is up to 0.01 from its bin's center
    body = target < 13  # beyond, too few samples tell the density

    def distance(components: int) -> float:
        mixture = GaussianMixtureLoss.fit(target, components=components, noise_sigma=1.0)
        return (mixture._reduced(pred, target, None, "none") - binned)[body].abs().mean().item()

    assert distance(2) < 0.03
    assert distance(1) > 0.3


@pytest.mark.parametrize("form", ["batch", "mixture", "bins"])
def test_the_prediction_is_balanced_where_mse_shrinks_it_toward_the_frequent(form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(1000, generator=generator, dtype=torch.float64)  # standard deviation 1, all of it imbalance
    seen = target + torch.randn(1000, generator=generator, dtype=torch.float64)  # noise of standard deviation 1
    bins = Bins.uniform(-5, 5, width=0.1)
    losses: dict[str, Callable[..., Tensor]] = {
        "batch": BatchMCLoss(1.0, learn=False),
        "mixture": GaussianMixtureLoss([1.0], [0.0], [1.0], noise_sigma=1.0, learn=False),
        "bins": BinnedIntegrationLoss(bins, LabelDensity.count(target, bins), noise_sigma=1.0, learn=False),
    }

    def best_slope(loss: Callable[..., Tensor]) -> float:
        slopes = torch.linspace(0.3, 1.5, 25, dtype=torch.float64)
        return slopes[torch.stack([loss(slope * seen, target) for slope in slopes]).argmin()].item()

    assert best_slope(weighted_mse) == pytest.approx(0.5, abs=0.051)
    assert best_slope(losses[form]) == pytest.approx(1.0, abs=0.101)


@each_form
def test_gradients_agree_with_differences(form: str) -> None:
    loss = built(form)
    pred, target, weight = samples(form, 5)
    weight[2] = 0

    def likelihood(pred: Tensor, log_sigma: Tensor) -> Tensor:
        """The loss without its factor, through which no gradient goes."""
        values = torch.func.functional_call(loss, {"log_sigma": log_sigma}, (pred, target, weight))
        return values / (2 * log_sigma.exp().square()).detach()

    log_sigma = torch.tensor(math.log(0.75), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(likelihood, (pred.requires_grad_(), log_sigma))


@each_form
def test_no_gradient_goes_through_the_factor(form: str) -> None:
    loss = built(form)
    pred, target, _ = samples(form)
    loss(pred, target).backward()
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            other = built(form, 0.75 * math.exp(sign * step))
            values.append(other(pred, target) / (2 * other.noise_sigma.square()))
    assert loss.log_sigma.grad.item() == pytest.approx(
        2 * 0.75**2 * ((values[0] - values[1]) / (2 * step)).item(), 1e-4
    )
    fixed = built(form, learn=False)
    assert list(fixed.parameters()) == []
    assert_close(fixed(pred, target), loss(pred, target).detach(), rtol=1e-6, atol=1e-6)


@each_form
def test_a_learnt_noise_finds_the_likelier_one_and_stays_positive(form: str) -> None:
    loss = built(form, 10.0)
    generator = torch.Generator().manual_seed(0)
    shape = (60, *FORMS[form][1])
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    pred = target + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.2)
    for _ in range(75):
        optimizer.zero_grad()
        loss(pred, target).backward()
        optimizer.step()
    assert 0.1 < loss.noise_sigma.item() < 0.7


@pytest.mark.parametrize("noise_sigma", [None, 1.0])
def test_a_batch_of_one_adds_nothing_and_says_so(noise_sigma: float | None) -> None:
    loss = BatchMCLoss(noise_sigma)
    pred = torch.ones(1, requires_grad=True)
    with pytest.warns(DirToolkitWarning, match=r"^BatchMCLoss: a batch of one label .* has zero loss\. Drop a last"):
        value = loss(pred, torch.zeros(1))
    value.backward()
    assert value == 0
    assert pred.grad == 0
    assert loss.log_sigma.grad == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirToolkitWarning)
        assert loss(torch.ones(1, 3), torch.zeros(1, 3)) == 0
        assert loss(torch.full((1,), torch.inf), torch.zeros(1)).isnan()
    for form in ("mixture", "bins"):
        pred, target, _ = samples(form, 1)
        assert_close(built(form)._reduced(pred, target, None, "none"), naive(built(form), pred, target))


@each_form
def test_the_module_survives_copies_and_changes_nothing(form: str) -> None:
    pred, target, weight = samples(form)
    loss, copies, rng = built(form), [pred.clone(), target.clone(), weight.clone()], torch.get_rng_state()
    result = loss(pred, target, weight)
    assert all(map(torch.equal, (pred, target, weight), copies))
    assert torch.equal(torch.get_rng_state(), rng)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(pred, target, weight), result)
    other = built(form, 2.0)
    assert other(pred, target, weight) != result
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(pred, target, weight), result)
    assert repr(other).startswith(type(loss).__name__)
    assert "noise_sigma=2.0, learn=True" in repr(other)
    meta = [x.to("meta") for x in (pred, target, weight)]
    assert copy.deepcopy(loss).to("meta")(*meta).device.type == "meta"  # no value is looked at
    pred.requires_grad_()
    assert torch.equal(loss(pred, target.requires_grad_(), weight), result)
    with pytest.raises(ValueError, match=r"target must hold labels, which have no gradient, .* Pass pred first\.$"):
        loss(pred.detach(), target, weight)


def test_modules_of_every_form_are_one_graph() -> None:
    losses, data = [built(form) for form in FORMS], [samples(form) for form in FORMS]
    compiled = torch.compile(
        lambda data: [loss(*own) for loss, own in zip(losses, data, strict=True)], fullgraph=True, backend="eager"
    )
    assert compiled(data) == [loss(*own) for loss, own in zip(losses, data, strict=True)]


def test_the_states_hold_what_the_losses_know() -> None:
    assert list(BatchMCLoss(1.0).state_dict()) == ["log_sigma"]
    assert list(BatchMCLoss().state_dict()) == ["log_sigma", "unit"]
    assert list(BatchMCLoss(1.0, learn=False).state_dict()) == ["sigma"]
    assert list(GaussianMixtureLoss(*PLANE).state_dict()) == ["log_sigma", "weights", "means", "variances"]
    assert list(BinnedIntegrationLoss(BINS, PRIOR).state_dict()) == ["log_sigma", "prior"]
    assert (
        repr(BatchMCLoss(0.5, learn=False))
        == "BatchMCLoss(gather=False, missing='raise', noise_sigma=0.5, learn=False)"
    )
    expected = (
        "weights=[0.25, 0.75], means=[-1.5, 0.5], variances=[0.25, 2.0], missing='raise', noise_sigma=None, learn=True"
    )
    assert repr(GaussianMixtureLoss(*MIXTURE)) == f"GaussianMixtureLoss({expected})"
    assert repr(BinnedIntegrationLoss(BINS, PRIOR)).startswith("BinnedIntegrationLoss(bins=<Bins: 16 from -4 to 4>, de")
    assert BatchMCLoss(0.1, learn=False).noise_sigma == torch.tensor(0.1)
    assert_close(BatchMCLoss(0.1).noise_sigma.detach(), torch.tensor(0.1))


def test_fit_finds_the_mixture_that_labels_were_drawn_from() -> None:
    target = big_sample(20000)
    loss = GaussianMixtureLoss.fit(target, components=2, noise_sigma=0.5, learn=False)
    order = loss.means.argsort()
    assert_close(loss.weights[order], torch.tensor([0.8, 0.2]), rtol=0, atol=0.02)
    assert_close(loss.means[order], torch.tensor([2.0, 9.0]), rtol=0, atol=0.15)
    assert_close(loss.variances[order], torch.tensor([1.0, 4.0]), rtol=0, atol=0.4)
    assert loss.noise_sigma == 0.5
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("components", [1, 4, 8])
def test_fit_keeps_the_moments_and_gains_by_components(components: int) -> None:
    target = big_sample(3000).double()
    loss = GaussianMixtureLoss.fit(target, components=components).double()
    assert loss.weights.sum().item() == pytest.approx(1, abs=1e-6)
    mean = (loss.weights * loss.means).sum()
    second = (loss.weights * (loss.variances + loss.means.square())).sum()
    assert_close(mean, target.mean(), rtol=1e-5, atol=1e-5)
    assert_close(second - mean.square(), target.var(correction=0), rtol=1e-4, atol=1e-4)

    def likelihood(mixture: GaussianMixtureLoss) -> float:
        parts = zip(mixture.weights.tolist(), mixture.means.tolist(), mixture.variances.tolist(), strict=True)
        densities = sum(w * np.exp(-((target.numpy() - m) ** 2) / (2 * v)) / math.sqrt(v) for w, m, v in parts)
        return float(np.log(densities).mean())

    if components > 1:
        assert likelihood(loss) > likelihood(GaussianMixtureLoss.fit(target, components=1)) + 0.2


def test_fit_depends_on_labels_and_seed_alone() -> None:
    target = big_sample(500)
    rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = GaussianMixtureLoss.fit(target, components=5)
    for labels in (target.flip(0), target.numpy(), target.tolist()):
        again = GaussianMixtureLoss.fit(labels, components=5)
        assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert np.array_equal(np.random.get_state()[1], rng[1])  # noqa: NPY002
    # Labels in other units, far from zero.
    shifted = GaussianMixtureLoss.fit(1000 + 4 * target.double(), components=5)
    assert_close(shifted.means, 1000 + 4 * first.means, rtol=1e-5, atol=1e-5)
    assert_close(shifted.variances, 16 * first.variances, rtol=1e-3, atol=1e-3)


def test_fit_takes_labels_of_several_numbers_and_repeated_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(2000, 2, generator=generator)
    labels[:500] = labels[:500] * torch.tensor([0.5, 2.0]) + torch.tensor([10.0, -5.0])
    loss = GaussianMixtureLoss.fit(labels, components=2)
    order = loss.means[:, 0].argsort()
    assert_close(loss.means[order], torch.tensor([[0.0, 0.0], [10.0, -5.0]]), rtol=0, atol=0.3)
    assert_close(loss.variances[order], torch.tensor([[1.0, 1.0], [0.25, 4.0]]), rtol=0, atol=0.6)
    ages = np.repeat([1, 26, 27, 60], [100, 500, 300, 2])
    for components in (2, 4):  # as many as there are ages
        loss = GaussianMixtureLoss.fit(ages, components=components, least_variance=1e-3)
        assert (loss.variances >= 0.999e-3 * ages.var()).all()
        assert all(x.isfinite().all() for x in loss.buffers())


SHARES = (slice(0, 13), slice(13, 20))  # uneven


def rank_main(rank: int) -> tuple[list[Tensor], Tensor, Tensor]:
    pred, target, weight = samples("batch of 3-D labels", 20)
    loss, mine = built("batch of 3-D labels", gather=True), SHARES[rank]
    own = pred[mine].requires_grad_()
    parallel = DistributedDataParallel(loss)
    plain = loss(own.detach(), target[mine]).detach() * len(own)
    value = parallel(own, target[mine], weight[mine]) * len(own)
    (value * 2 / 20).backward()  # as the training loop does
    assert own.grad is not None
    return [plain, value.detach()], own.grad / 2, loss.log_sigma.grad


def test_two_processes_make_the_loss_of_the_whole_batch(two_ranks: Callable[..., list[Any]]) -> None:
    pred, target, weight = samples("batch of 3-D labels", 20)
    loss = built("batch of 3-D labels", gather=True)  # which alone has nobody to ask
    pred.requires_grad_()
    expected = loss(pred, target, weight)
    expected.backward()
    returned = two_ranks(rank_main)
    plain = loss(pred, target)
    close = {"rtol": 1e-12, "atol": 1e-12}
    assert_close(sum(values[0] for values, _, _ in returned) / 20, plain.detach(), **close)
    assert_close(sum(values[1] for values, _, _ in returned) / 20, expected.detach(), **close)
    assert_close(torch.cat([grad for _, grad, _ in returned]), pred.grad, **close)
    for _, _, by_sigma in returned:
        assert_close(by_sigma, loss.log_sigma.grad, **close)
    alone = built("batch of 3-D labels")
    parts = sum(alone._reduced(pred[s], target[s], weight[s], "sum") for s in SHARES)
    assert not torch.allclose(parts / 20, expected)


@each_form
def test_settings_are_checked(form: str) -> None:
    build = FORMS[form][0]
    where = f"^{type(build()).__name__}: "
    for value in (0, -1, 1e-19, 1e19, math.nan, math.inf):
        with pytest.raises(ValueError, match=where + "noise_sigma must be >= 1e-18 and <= 1e\\+18, got"):
            build(noise_sigma=value)
    with pytest.raises(TypeError, match=where + "noise_sigma must be a number"):
        build(noise_sigma="1")
    with pytest.raises(TypeError, match=where + "learn must be a bool"):
        build(learn=1)
    for value in (1e-18, 1e18):
        pred, target, _ = samples(form)
        assert build(noise_sigma=value, learn=False)(value * pred.float(), value * target.float()).isfinite()


def test_gather_is_a_switch() -> None:
    with pytest.raises(TypeError, match=r"^BatchMCLoss: gather must be a bool, got int"):
        BatchMCLoss(gather=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mixture", "error", "message"),
    [
        (([[1.0]], [0.0], [1.0]), ShapeError, r"weights must be \(K,\), got shape \(1, 1\)"),
        (([], [], []), ValueError, "weights must hold at least one value"),
        (
            ([0.5, 0.5], [0.0], [1.0, 1.0]),
            ShapeError,
            r"means must be \(2,\), one row for each of the weights, got shape \(1,\)",
        ),
        (([0.5, 0.5], [0.0, 1.0], 1.0), ShapeError, r"variances must be \(2,\), .*, got shape \(\)"),
        (([1.0], [[0.0, 1.0]], [1.0]), ShapeError, r"variances must be \(1, 2\), .*, got shape \(1,\)"),
        (([1.0], np.ones((1, 0)), np.ones((1, 0))), ValueError, "means must hold at least one value"),
        (([1.0], [math.nan], [1.0]), ValueError, "means must be finite, got nan"),
        (([1.0], [1e300], [1.0]), ValueError, "means must be finite, got inf"),
        (([1.0], [0.0], [-1.0]), ValueError, "variances must not be negative, got a minimum of -1"),
        (([1.5, -0.5], [0.0, 1.0], [1.0, 1.0]), ValueError, "weights must not be negative"),
        (([1.0, 1.0], [0.0, 1.0], [1.0, 1.0]), ValueError, "weights must sum to one, got a sum of 2. Divide"),
        ((["a"], [0.0], [1.0]), TypeError, "weights must be integers or floats"),
    ],
)
def test_mixtures_are_checked(mixture: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^GaussianMixtureLoss: {message}") as caught:
        GaussianMixtureLoss(*mixture)
    assert isinstance(caught.value, DirToolkitError)


def test_the_label_must_have_the_mixture_s_dimensions() -> None:
    with pytest.raises(ShapeError, match=r"^GaussianMixtureLoss: pred must be \(N, 2\), got shape \(4, 3\)"):
        GaussianMixtureLoss(*PLANE)(torch.ones(4, 3), torch.ones(4, 3))
    with pytest.raises(ShapeError, match=r"^GaussianMixtureLoss: pred must be \(N,\), got shape \(4, 1\)"):
        GaussianMixtureLoss(*MIXTURE)(torch.ones(4, 1), torch.ones(4, 1))
    with pytest.raises(ShapeError, match=r"^BinnedIntegrationLoss: pred must be \(N,\), got shape \(4, 1\)"):
        BinnedIntegrationLoss(BINS, PRIOR)(torch.ones(4, 1), torch.ones(4, 1))


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([], {}, ValueError, "labels must hold at least one value"),
        ([1.0, math.nan], {}, ValueError, r"labels must be finite, got nan at index \[1\]"),
        ([3.0, 3.0], {}, ValueError, "labels must hold at least two different values, got only 3"),
        ([[1.0, 3.0], [2.0, 3.0]], {}, ValueError, "labels must hold at least two .*, got only 3 in column 1"),
        ([[[1.0]]], {}, ShapeError, r"labels must be \(N,\) or \(N, D\), got shape \(1, 1, 1\)"),
        ([1.0, 2.0, 2.0], {"components": 3}, ValueError, r"components must be at most 2, got 3\. This is the number"),
        ([1.0, 2.0], {"components": 0}, ValueError, "components must be at least 1, got 0"),
        ([1.0, 2.0], {"components": 1, "seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ([1.0, 2.0], {"components": 1, "least_variance": 0}, ValueError, "least_variance must be > 0 and .*, got 0"),
        (["a"], {}, TypeError, "labels must be integers or floats"),
    ],
)
def test_labels_to_fit_are_checked(labels: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^GaussianMixtureLoss\.fit: {message}") as caught:
        GaussianMixtureLoss.fit(labels, **options)
    assert isinstance(caught.value, DirToolkitError)


def test_a_density_gives_its_prior() -> None:
    density = LabelDensity(BINS, np.round(PRIOR * 64).astype(np.int64))
    assert_close(BinnedIntegrationLoss(BINS, density).prior, BinnedIntegrationLoss(BINS, PRIOR).prior)
    effective = LabelDensity(BINS, PRIOR * 10)  # in float64, as smoothed ones are
    assert_close(BinnedIntegrationLoss(BINS, effective).prior, BinnedIntegrationLoss(BINS, torch.tensor(PRIOR)).prior)


@pytest.mark.parametrize(
    ("bins", "density", "error", "message"),
    [
        (BINS, None, TypeError, r"density must be a LabelDensity.*, got NoneType\. Use LabelDensity\.count"),
        (BINS, "uniform", TypeError, "density must be a LabelDensity.*, got str"),
        (BINS, LabelDensity.count([1], Bins.uniform(0, 8, width=0.5)), ValueError, "density must be over the same"),
        (BINS, LabelDensity(BINS, np.zeros(16)), ValueError, "at least one label must have been counted, got none"),
        (BINS, PRIOR[1:], ShapeError, r"density must be \(16,\), one share of labels per bin, got shape \(15,\)"),
        (BINS, PRIOR * 64, ValueError, "density must sum to one, got a sum of 64"),
        (BINS, np.where(PRIOR == 0, -PRIOR.max(), PRIOR), ValueError, "density must not be negative"),
        (BINS, PRIOR * np.nan, ValueError, "density must be finite"),
        ("bins", PRIOR, TypeError, "bins must be a Bins, got str"),
        (Bins.classes(16), PRIOR, ValueError, r"bins must cut a continuous .*, got Bins.classes\(16\)\. For classes"),
    ],
)
def test_densities_are_checked(bins: Any, density: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^BinnedIntegrationLoss: {message}") as caught:
        BinnedIntegrationLoss(bins, density)
    assert isinstance(caught.value, DirToolkitError)


LONG_TAIL = 10 * torch.rand(2000, generator=torch.Generator().manual_seed(0)) ** 3
FINE = Bins.uniform(0, 10, width=0.05)
RUNNING: dict[str, Callable[[], Any]] = {
    "bins": lambda: BinnedIntegrationLoss(FINE, LabelDensity.count(LONG_TAIL, FINE), learn=False),
    "bins of which one holds all": lambda: BinnedIntegrationLoss(FINE, np.eye(200)[7], learn=False),
    "uneven bins": lambda: BinnedIntegrationLoss(Bins.from_edges([0, 1, 10]), [0.9, 0.1], noise_sigma=0.3, learn=False),
    "whole numbers": lambda: BinnedIntegrationLoss(
        Bins.uniform(0, 10, width=1, integer=True), np.eye(10)[0] * 0.8 + 0.02, learn=False
    ),
    "mixture": lambda: GaussianMixtureLoss.fit(LONG_TAIL, components=4, learn=False),
    "spikes": lambda: GaussianMixtureLoss([0.5, 0.5], [2.0, 5.0], [0.0, 0.0], learn=False),
    "a spike": lambda: GaussianMixtureLoss([1.0], [2.0], [0.0], noise_sigma=1.0, learn=False),
}


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("form", RUNNING)
def test_a_prediction_that_runs_away_is_brought_back(form: str, unit: float) -> None:
    """In float32, from a thousand and a million axes away on either side."""
    loss = RUNNING[form]()
    sigma = loss.noise_sigma.item()
    if unit != 1:
        if not isinstance(loss, BinnedIntegrationLoss):
            loss = GaussianMixtureLoss(
                loss.weights, loss.means * unit, loss.variances * unit**2, noise_sigma=sigma * unit, learn=False
            )
        else:
            bins = Bins(loss.bins.edges * unit, centers=loss.bins.centers * unit)
            loss = BinnedIntegrationLoss(bins, loss.prior, noise_sigma=sigma * unit, learn=False)
    away = torch.tensor([-1e7, -1e4, -100.0, 100.0, 1e4, 1e7]) * unit
    for label in (0.0, 0.01, 0.37, 5.0, 9.99, 10.0, 12.0):
        target = torch.tensor(label * unit)

        def values(pred: Tensor, target: Tensor = target) -> Tensor:
            return loss._reduced(pred, target.expand(len(pred)), None, "none")

        near = values(target + torch.arange(-12, 13) * sigma * unit).min()
        pred = away.clone().requires_grad_()
        far = values(pred)
        far.sum().backward()
        assert (far > near).all()
        assert pred.grad is not None
        assert torch.equal(pred.grad.sign(), away.sign())
        # Nowhere does it fall below what it is within a few sigma of the label or of the ends.
        assert values(torch.linspace(-40, 50, 500) * unit).min() > near - 60 * (sigma * unit) ** 2


def test_the_bound_is_what_the_report_asks_for() -> None:
    loss = BinnedIntegrationLoss(FINE, LabelDensity.count(LONG_TAIL, FINE), noise_sigma=1.0, learn=False)
    pred = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([pred], lr=0.5)
    for _ in range(600):
        optimizer.zero_grad()
        loss(pred, torch.tensor([0.01])).backward()
        optimizer.step()
    assert -8 < pred.item() < 0.1


def test_gradients_far_out_are_those_of_float64() -> None:
    for form in FORMS:
        pred, target, _ = samples(form)
        for away in (3.0, 30.0, 1e3, 1e5):
            grads = []
            for dtype in (torch.float32, torch.float64):
                own = (pred.sign() * away).to(dtype).requires_grad_()
                loss = FORMS[form][0](noise_sigma=0.5, learn=False).to(dtype)
                loss._reduced(own, target.float().to(dtype), None, "sum").backward()
                assert own.grad is not None
                grads.append(own.grad.double())
            assert_close(grads[0], grads[1], rtol=2e-4, atol=2e-3)


def test_bins_far_narrower_than_the_noise_lose_no_digits() -> None:
    bins = Bins.uniform(-4, 4, count=40_000)
    shares = np.exp(-(bins.centers**2) / 2)
    shares /= shares.sum()
    pred, target, _ = (x.float() for x in samples("bins"))
    wide = BinnedIntegrationLoss(bins, shares, noise_sigma=1.0).double()
    narrow = BinnedIntegrationLoss(bins, shares, noise_sigma=1.0)
    assert_close(narrow(pred, target).double(), wide(pred.double(), target.double()), rtol=0, atol=2e-5)
    spike = BinnedIntegrationLoss(bins, (np.arange(40_000) == 20_000).astype(float), noise_sigma=100.0).double()
    center = torch.tensor(bins.centers[20_000])
    pred, target = pred.double(), target.double()
    expected = weighted_mse(pred, target) - weighted_mse(pred, center.expand(9))
    assert_close(spike(pred, target), expected, rtol=1e-4, atol=1e-4)  # but for the background


@each_form
def test_tiny_and_huge_noise_has_finite_gradients(form: str) -> None:
    for noise_sigma in (1e-18, 1e-12, 1e-9, 1e-6, 1e6, 1e12, 1e18):
        loss = FORMS[form][0](noise_sigma=noise_sigma)
        for scale in (1.0, noise_sigma):
            pred, target, _ = (x.float() * scale for x in samples(form))
            pred.requires_grad_()
            loss(pred, target).backward()
            assert pred.grad is not None
            assert pred.grad.isfinite().all()
            assert loss.log_sigma.grad.isfinite().all()


def test_noise_starts_at_a_tenth_of_the_labels_spread() -> None:
    binned = BinnedIntegrationLoss(FINE, LabelDensity.count(LONG_TAIL, FINE))
    mixture = GaussianMixtureLoss.fit(LONG_TAIL)
    batch = BatchMCLoss()
    assert batch.noise_sigma.isnan()
    batch(torch.zeros(2000), LONG_TAIL)
    for loss in (binned, mixture, batch):
        assert loss.noise_sigma.item() == pytest.approx(0.1 * LONG_TAIL.std(correction=0).item(), rel=1e-3)
    with pytest.raises(ValueError, match="noise_sigma must be given where the mixture has no spread"):
        GaussianMixtureLoss([1.0], [2.0], [0.0])


def test_the_first_batch_of_different_labels_sets_the_noise_once() -> None:
    loss, y = BatchMCLoss(), torch.tensor([1.0, 3.0, 7.0])
    assert loss(torch.zeros(3), torch.ones(3)).isfinite()  # all alike
    assert loss.noise_sigma.isnan()
    loss.eval()
    loss(torch.zeros(3), 100 * y)  # a batch to validate on keeps nothing
    assert loss.noise_sigma.isnan()
    loss.train()
    with torch.inference_mode():
        assert BatchMCLoss()(torch.zeros(3), y).isfinite()
        loss(torch.zeros(4), torch.tensor([1.0, 3.0, 7.0, torch.nan]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    expected = 0.1 * y.std(correction=0)
    assert_close(loss.noise_sigma.detach(), expected)
    loss(torch.zeros(3), 100 * y).backward()
    assert_close(loss.noise_sigma.detach(), expected)
    twin = BatchMCLoss()
    twin.load_state_dict(loss.state_dict())
    twin(torch.zeros(3), 100 * y)
    assert_close(twin.noise_sigma.detach(), expected)


@pytest.mark.parametrize("unit", [1e-5, 1e5])
def test_defaults_are_free_of_the_label_s_unit(unit: float) -> None:
    pred, target, _ = samples("bins", 200)
    target = target.clamp(-4, 4)
    scaled = Bins.from_edges(BINS.edges * unit)
    pairs = [
        (BatchMCLoss(), BatchMCLoss()),
        (GaussianMixtureLoss.fit(target), GaussianMixtureLoss.fit(target * unit)),
        (BinnedIntegrationLoss(BINS, PRIOR), BinnedIntegrationLoss(scaled, PRIOR)),
    ]
    for one, other in pairs:
        assert_close(other(pred * unit, target * unit) / unit**2, one(pred, target), rtol=1e-4, atol=1e-5)
        assert_close(other.noise_sigma / unit, one.noise_sigma, rtol=1e-4, atol=0)


def test_labels_beyond_the_axis_follow_outside() -> None:
    pred, target, weight = samples("bins")
    far = target.clone()
    far[2], far[5] = 4.5, -9.0
    inside = torch.tensor([i not in (2, 5) for i in range(9)])
    clip, drop, refuse = (
        BinnedIntegrationLoss(BINS, PRIOR, noise_sigma=0.75, learn=False, outside=outside).double()
        for outside in ("clip", "drop", "raise")
    )
    for w in (None, weight):
        exact = clip._reduced(pred, far, w, "none")
        assert_close(exact, naive(clip, pred, far, w), rtol=1e-10, atol=1e-10)  # its error is as it is
        own = pred.clone().requires_grad_()
        dropped = drop._reduced(own, far, w, "none")
        assert_close(dropped, exact * inside)
        dropped.sum().backward()
        assert own.grad is not None
        assert torch.equal(own.grad != 0, inside)
        with pytest.raises(LabelError, match=r"^BinnedIntegrationLoss: target must lie on .*got 4\.5 at index \[2\]"):
            refuse(pred, far, w)
    assert_close(refuse(pred, far, inside.double()), clip(pred, far, inside.double()))
    assert_close(refuse(pred, target), clip(pred, target))


def test_buffers_keep_their_digits_in_half_precision() -> None:
    loss = GaussianMixtureLoss([1.0], [1001.0], [0.1]).bfloat16()
    assert loss.means.dtype == torch.float32
    assert loss.means == 1001
    assert loss.log_sigma.dtype == torch.bfloat16


def rank_with_its_own_labels(rank: int) -> Tensor:
    loss = BatchMCLoss()
    y = samples("batch", 20)[1][SHARES[rank]]
    loss(torch.zeros_like(y), y).backward()
    return loss.noise_sigma.detach()


def test_two_processes_start_from_the_spread_of_all_labels(two_ranks: Callable[..., list[Any]]) -> None:
    expected = (0.1 * samples("batch", 20)[1].std(correction=0)).float()
    for noise_sigma in two_ranks(rank_with_its_own_labels):
        assert_close(noise_sigma, expected)


def test_a_compiled_loss_takes_its_noise_from_the_first_batch_too() -> None:
    pred, target, _ = (x.float() for x in samples("batch"))
    loss = BatchMCLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_close(compiled(pred, target), BatchMCLoss()(pred, target))
    assert_close(loss.noise_sigma.detach(), 0.1 * target.std(correction=0))
    compiled(pred, 100 * target)
    assert_close(loss.noise_sigma.detach(), 0.1 * target.std(correction=0))


class Elements(TorchDispatchMode):
    """Counts the elements that operations put out, other than views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.count += out.numel()
        return out


@pytest.mark.parametrize("learn", [True, False])
def test_bins_cost_few_passes_over_the_samples_and_bins(learn: bool) -> None:
    target = LONG_TAIL[:256]
    loss = BinnedIntegrationLoss(FINE, LabelDensity.count(LONG_TAIL, FINE), learn=learn)
    pred = (target + 0.1).requires_grad_()
    loss(pred, target).backward()  # what is kept is made
    with Elements() as elements:
        loss(pred, target).backward()
    assert elements.count < 25 * 256 * 201


def test_the_bins_have_second_derivatives() -> None:
    loss = built("bins", learn=False)
    pred, target, _ = samples("bins", 5)
    assert torch.autograd.gradgradcheck(lambda p: loss(p, target), (pred.requires_grad_(),))


@pytest.mark.parametrize("noise_sigma", [1e-4, 0.3, 40.0, 4e5, 4e8])
def test_bins_of_all_widths_give_the_exact_integral(noise_sigma: float) -> None:
    """Narrow ones next to wide ones, as seen with noise narrower than all of them and wider than all of them."""
    edges = [0, 1e-6, 2e-6, 3e-3, 0.5, 2, 2.001, 7, 10]
    prior = np.array([0.1, 0, 0.3, 0.05, 0.1, 0.4, 0.05, 0])
    loss = BinnedIntegrationLoss(Bins.from_edges(edges), prior, noise_sigma=noise_sigma, learn=False).double()
    sigma = loss.noise_sigma.item()
    pred = torch.tensor([0.0, 1e-6, 0.2, 2.0005, 6, 9.5, 12, -1], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.0, 1e-6, 2e-3, 2.0005, 6, 8, 10, 0], dtype=torch.float64)
    values = loss._reduced(pred, target, None, "none")
    grads = torch.autograd.grad(values.sum(), pred)[0]
    with mpmath.workdps(50):
        scale, parts = mpmath.mpf(sigma), [float(p) for p in loss.prior]

        def exact(p: Any, y: float) -> Any:
            def phi(x: Any) -> Any:
                return mpmath.erfc(-(mpmath.mpf(x) - p) / scale / mpmath.sqrt(2)) / 2

            def tail(x: Any) -> Any:
                return mpmath.erfc((mpmath.mpf(x) - p) / scale / mpmath.sqrt(2)) / 2

            def mass(low: float, high: float) -> Any:
                return tail(low) - tail(high) if low > p else phi(high) - phi(low)

            bins = zip(parts, edges[:-1], edges[1:], strict=True)
            inside = sum(k * mass(low, high) / (mpmath.mpf(high) - low) for k, low, high in bins)
            wide = mpmath.npdf(p, 5, mpmath.sqrt(100 + 2 * scale**2))
            total = (1 - mpmath.mpf("1e-9")) * inside + mpmath.mpf("1e-9") * wide
            return 2 * scale**2 * (mpmath.log(total) - mpmath.log(mpmath.npdf(y, p, scale)))

        for p, y, value, grad in zip(pred.tolist(), target.tolist(), values.tolist(), grads.tolist(), strict=True):
            assert value == pytest.approx(float(exact(mpmath.mpf(p), y)), rel=1e-9, abs=4e-11 * sigma**2)
            slope = float(mpmath.diff(lambda rows_at, y=y: exact(rows_at, y), mpmath.mpf(p)))
            assert grad == pytest.approx(slope, rel=1e-6, abs=4e-11 * sigma)


@pytest.mark.parametrize("learn", [True, False])
def test_modules_of_losses_work_under_torch_func(learn: bool) -> None:
    outputs, labels, _ = (x.float() for x in samples("bins", 8))
    for loss in (
        BatchMCLoss(learn=learn),
        BatchMCLoss(0.5, learn=learn),
        BinnedIntegrationLoss(BINS, PRIOR, learn=learn),
        GaussianMixtureLoss([1.0], [2.0], [3.0], learn=learn),
    ):
        for mode in (True, False):
            loss.train(mode)
            own = outputs.clone().requires_grad_()
            loss(own, labels).backward()
            assert_close(grad(lambda p, loss=loss: loss(p, labels))(outputs), own.grad)
            if learn:
                params = {name: p.detach() for name, p in loss.named_parameters()}
                of_params = grad(lambda p, loss=loss: functional_call(loss, p, (outputs, labels)))(params)
                assert_close(of_params["log_sigma"], loss.log_sigma.grad)
                loss.log_sigma.grad = None
        both = vmap(grad(lambda p, y, loss=loss: loss(p, y)))(outputs.view(2, 4), labels.view(2, 4))
        each = [
            grad(lambda p, y, loss=loss: loss(p, y))(*half)
            for half in zip(outputs.view(2, 4), labels.view(2, 4), strict=True)
        ]
        assert_close(both, torch.stack(each))


def test_a_mixture_is_fitted_to_the_labels_that_are_there() -> None:
    labels = np.array([0.0, np.nan, 0.0, 1.0, 1.0, 20.0, np.nan, 21.0])
    loss = GaussianMixtureLoss.fit(labels, components=2, missing="drop")
    assert torch.equal(loss.means, GaussianMixtureLoss.fit(labels[~np.isnan(labels)], components=2).means)
    assert loss.missing == "drop"
    with pytest.raises(ValueError, match="labels must hold at least one value"):
        GaussianMixtureLoss.fit([np.nan, np.nan], missing="drop")
    with pytest.raises(ValueError, match="labels must be finite"):
        GaussianMixtureLoss.fit(labels)


def test_a_mixture_is_not_fitted_with_an_array_for_what_missing_labels_do() -> None:
    with pytest.raises(
        ValueError, match=r"^GaussianMixtureLoss\.fit: missing must be one of 'raise', 'drop', got array"
    ):
        GaussianMixtureLoss.fit([0.0, 1.0, 2.0], components=1, missing=np.array(["drop", "raise"]))


def test_a_mixture_takes_labels_whose_squared_distances_are_zero() -> None:
    mixture = GaussianMixtureLoss.fit([0.0, 1e-170, 1.0], components=3)
    assert mixture(torch.tensor([0.1, 0.9]), torch.tensor([0.0, 1.0])).isfinite()


def test_a_mixture_far_from_zero_is_not_rounded() -> None:
    labels = np.random.default_rng(0).normal(0, 100, 500)
    options: Any = {"components": 3, "noise_sigma": 10.0, "learn": False}
    near, far = (GaussianMixtureLoss.fit(labels + start, **options) for start in (0, 1.7e9))
    assert (near.means.dtype, far.means.dtype) == (torch.float32, torch.float64)
    assert_close((far.means - 1.7e9).float(), near.means, rtol=1e-5, atol=1e-5)
    target = torch.tensor(labels + 1.7e9)
    pred = target + 5
    expected = near(pred - 1.7e9, target - 1.7e9)
    for loss in (far, far.float(), copy.deepcopy(far).half()):
        assert_close(loss(pred, target), expected, rtol=1e-6, atol=0)
    parts = {name: getattr(far, name).numpy() for name in ("weights", "means", "variances")}
    assert_close(gaussian_mixture_loss(pred, target, **parts, noise_sigma=10.0), expected, rtol=1e-6, atol=0)
