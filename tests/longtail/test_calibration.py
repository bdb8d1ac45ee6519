from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dir_toolkit.errors import DirToolkitWarning, LabelError, ShapeError, UsageError
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.decoding import decode
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import triangular
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel
from dir_toolkit.longtail.calibration import held_out, row_weights
from dir_toolkit.metrics.regression import regression_metrics
from dir_toolkit.priors import best_temperature, choose_tau, class_prior

AGES = Bins.uniform(0, 20, width=1)

AGE_DENSITY = LabelDensity(AGES, np.arange(1, 21)[::-1] ** 2)

LARGE = LabelDensity(AGES, 10 * AGE_DENSITY.counts)  # a test set has labels in each of its bins


def net(num_features: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, num_features), nn.Tanh())


def ages(bins: Bins = AGES, density: LabelDensity | None = AGE_DENSITY, **options: Any) -> LongTailModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LongTailModel(net(), 6, bins, density=density, **options).eval()
    if hasattr(model.head, "weight"):
        with torch.no_grad():
            model.head.weight.mul_(4)  # so that scores differ
    return model


def batch(samples: int = 60) -> tuple[Tensor, Tensor]:
    """Three labels and more in each bin."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=generator)
    return x, torch.arange(samples) % 20 + 0.99 * torch.rand(samples, generator=generator)


def naive_weights(share: np.ndarray, row: np.ndarray, categorical: bool) -> np.ndarray:
    weight = np.zeros(len(row))
    for b in np.flatnonzero(share):
        distance = np.abs(row - b)
        reach = 0 if categorical else np.sort(distance)[: min(3, len(row))][-1]
        if (near := distance <= reach).any():
            weight[near] += share[b] / near.sum()
    return weight / weight.sum()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.booleans(), st.integers(0, 2**13 - 1))
def test_each_bin_is_judged_by_its_own_labels_or_by_the_three_nearest(
    rows: list[int], categorical: bool, present: int
) -> None:
    bins, row = Bins.classes(13) if categorical else Bins.uniform(0, 13, width=1), np.array(rows)
    share = np.linspace(1, 2, 13) * (present >> np.arange(13) & 1)
    share[row[0]] = 3
    expected = naive_weights(share, row, categorical)
    np.testing.assert_allclose(row_weights(share, row, bins), expected, rtol=1e-12, atol=1e-15)


def test_weights_of_labels_worked_out_by_hand() -> None:
    bins = Bins.uniform(0, 6, width=1)
    # Bins 0 and 1 have three labels; bin 3 has one, so that the three of bin 1 count there, too. Bin 5 is nearest to
    # that one, and takes those of bin 1 as well.
    weight = row_weights(np.array([1.0, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1, 3]), bins)
    np.testing.assert_allclose(weight, np.array([1 / 3] * 3 + [1 / 3 + 1 / 2] * 3 + [1 / 2]) / 4, rtol=1e-12)


def bits(model: LongTailModel) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def error_under(
    model: LongTailModel, scores: Tensor, y: Tensor, by: str, tau: float, kernel: Any = "auto", *, of_mean: Any = None
) -> float:
    """Of a copy of the model that predicts under the uniform prior with this tau."""
    one = copy.deepcopy(model)
    one.set_prior("uniform", tau, kernel=kernel)
    shares = one.readout.adjuster(one.readout.logits(scores)).softmax(1)
    pred = decode(shares, AGES, of_mean or one.readout.decoding, ends=one.readout.ends)
    return float(regression_metrics(pred, y, AGE_DENSITY)[by].sel(region="all"))


TAU_MODELS: list[dict[str, Any]] = [
    {},
    {"head": "affinity", "decode": "expectation"},
    {"target_prior": "uniform", "tau": 0.8, "adjust": "in_loss"},
    {"target_prior": "uniform", "tau": 1.7, "temperature": 2.5, "decode": "mode"},
]


@pytest.mark.parametrize("by", ["bmae", "mae"])
@pytest.mark.parametrize("options", TAU_MODELS, ids=str)
def test_tau_is_the_one_with_the_least_error(options: dict[str, Any], by: Any) -> None:
    """Where each bin has three held-out labels, bMAE is that of the metrics."""
    x, y = batch(67)
    model = ages(**options)
    scores = model(x).scores
    for kernel in ("auto", None, triangular(3)):
        before = bits(model)
        choice = model.choose_tau(scores, y, by=by, taus=(taus := [0, 0.3, 1.0, 2.5]), kernel=kernel)
        assert bits(model) == before
        expected = [error_under(model, scores.detach(), y, by, tau, kernel) for tau in taus]
        np.testing.assert_allclose(choice.scores, expected, rtol=1e-6)
        assert (choice.tau, choice.by, choice.samples) == (taus[int(np.argmin(expected))], by, 67)
        assert choice.temperature == options.get("temperature", 1.0)
        assert choice.taus.tolist() == taus
        assert choice.scores.max() - choice.scores.min() > 0.05  # so that another curve would have been seen
        assert not any(curve.flags.writeable for curve in choice.curves.values())


def test_the_oracle_of_tau_sees_another_decoding() -> None:
    x, y = batch()
    model = ages()
    scores = model(x).scores.detach()
    result = model.choose_tau(scores, y, taus=[0.5]).scores[0]
    assert error_under(model, scores, y, "bmae", 0.5) == pytest.approx(result, rel=1e-6)
    assert error_under(model, scores, y, "bmae", 0.5, of_mean="expectation") != pytest.approx(result, rel=1e-3)


def test_tau_is_that_worked_out_by_hand() -> None:
    bins = Bins.uniform(0, 4, width=2)  # centres 1 and 3
    model = LongTailModel(
        nn.Flatten(), 1, bins, density=LabelDensity(bins, np.array([9, 1])), sigma=0, decode="mode", prior_kernel=None
    )
    # The log-odds of the second bin rise by tau log 9: at 0.25 two of its three labels of 3 are found, at 1 all are,
    # but one of the three labels of 1 is lost.
    gap = math.log(9) * torch.tensor([-2.0, -2.0, -0.5, -0.2, -0.2, -0.6])
    scores, labels = torch.stack([-gap / 2, gap / 2], 1), torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    choice = model.choose_tau(scores, labels, taus=[0.0, 0.25, 1.0])
    np.testing.assert_allclose(choice.scores, [1.0, 1 / 3, 1 / 3], rtol=1e-6)
    assert choice.tau == 0.25  # of two middles the lower
    # Five more labels of 1 found anyway: bins still count alike, samples do not.
    more = torch.cat([scores, scores[:1].expand(5, 2)]), torch.cat([labels, labels[:1].expand(5)])
    np.testing.assert_allclose(model.choose_tau(*more, taus=[0.0, 1.0]).scores, [1.0, 0.5 * 2 / 8], rtol=1e-6)
    np.testing.assert_allclose(model.choose_tau(*more, taus=[0.0, 1.0], by="mae").scores, [6 / 11, 2 / 11], rtol=1e-6)


def test_a_bin_without_held_out_labels_counts_as_often_as_a_test_set_has_labels_there() -> None:
    bins = Bins.uniform(0, 4, width=1)
    density = LabelDensity(bins, np.array([60, 6, 1, 1]))
    model = LongTailModel(nn.Flatten(), 4, bins, density=density, sigma=0, decode="mode")
    labels = torch.tensor([0.5, 0.5, 0.5, 2.5, 2.5, 2.5])
    choice = model.choose_tau(torch.tensor([[9.0, 0, 0, 0]]).repeat(6, 1), labels, taus=[0.0])  # predicts 0.5
    # A third as many labels as those of training have one in bin 1 and in bin 3 with these probabilities. The labels
    # of both occupied bins represent bin 1, and those of bin 2 represent bin 3.
    second, last = 1 - math.exp(-2), 1 - math.exp(-1 / 3)
    expected = 2 * (1 + second / 2 + last) / (2 + second + last)
    assert choice.scores[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*the best temperature lies at:dir_toolkit.errors.DirToolkitWarning")
@pytest.mark.parametrize("by", ["mse", "bmse"])
def test_squared_errors_are_judged_as_absolute_ones_are(by: str) -> None:
    x, labels = batch()
    model = ages(decode="expectation")
    scores = model(x).scores
    choice = model.choose_tau(scores, labels, by=by, taus=[0, 0.5, 1.0])
    weights = np.full(len(labels), 1 / len(labels))
    if by == "bmse":
        held = model.bins.index(labels)
        weights = row_weights(np.ones(20), held.numpy(), AGES)
    for tau, judged in zip(choice.taus, choice.scores, strict=True):
        model.set_prior("uniform", float(tau))
        error = (model(x).prediction - labels).detach().double().numpy()
        assert judged == pytest.approx(weights @ error**2, rel=1e-5)
    assert choice.tau == choice.taus[choice.scores.argmin()]
    assert "bmse" not in model.choose_tau(scores, labels, taus=[0, 1]).curves
    assert {"bMSE", "MSE"} <= set(str(choice).replace(",", "").split())


def test_errors_are_told_by_region_of_the_training_labels() -> None:
    x, y = batch()
    model = ages()
    scores = model(x).scores.detach()
    choice = model.choose_tau(scores, y, taus=[0.0, 0.5])
    model.set_prior("uniform", 0.5)
    of_regions = regression_metrics(model(x).prediction, y, AGE_DENSITY)["mae"]
    assert list(choice.curves) == ["bmae", "mae", "mae_many", "mae_medium", "mae_few"]
    for name in ("many", "medium", "few"):
        assert choice.curves[f"mae_{name}"][1] == pytest.approx(float(of_regions.sel(region=name)), rel=1e-5)


def test_tau_of_one_sample_of_half_precision_and_of_whole_labels() -> None:
    x, y = batch()
    model = ages(head="affinity")
    out = model(x)
    choice = model.choose_tau(out.scores, y)
    assert (len(choice.taus), choice.taus[-1]) == (61, 3.0)
    assert choice.scores[list(choice.taus).index(choice.tau)] == pytest.approx(choice.scores.min())
    half = model.choose_tau(out.scores.half(), y.long(), taus=[0.5])
    whole = model.choose_tau(out.scores.half().float(), y.floor(), taus=[0.5])
    assert half.scores.tolist() == whole.scores.tolist()
    one = model.choose_tau(out.scores[:1], y[:1], taus=[0.5])
    wanted = error_under(model, out.scores[:1].detach(), y[:1], "mae", 0.5)
    assert one.scores[0] == pytest.approx(wanted, rel=1e-6)
    assert out.scores.requires_grad  # and the choice needed none
    double = model.choose_tau(out.scores.double(), y.double(), taus=[0.5])
    assert double.scores[0] == pytest.approx(error_under(model, out.scores.detach().double(), y, "bmae", 0.5))


CLASSES = Bins.classes(3)
CLASS_DENSITY = LabelDensity(CLASSES, np.array([800, 150, 50]))


@pytest.mark.parametrize("options", [{}, {"target_prior": "uniform", "adjust": "in_loss"}], ids=str)
def test_tau_of_classes_is_that_of_choose_tau(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 3, generator=generator), torch.arange(90) % 3
    weights = LDS(CLASSES, kernel=None, scheme="sqrt_inverse").fit(CLASS_DENSITY)
    model = ages(CLASSES, CLASS_DENSITY, weights=weights, **options)
    scores = model(x).scores.detach()
    prior = class_prior(CLASS_DENSITY, weights=weights)
    expected = choose_tau(scores + model.readout.loss_offset, y, prior)
    choice = model.choose_tau(scores, y)
    np.testing.assert_allclose(choice.scores, expected.scores, rtol=1e-9)
    assert (choice.tau, choice.by, expected.by) == (expected.tau, "balanced_error", "balanced_error")
    with pytest.warns(DirToolkitWarning, match=r"^LongTailModel\.choose_tau: no validation label of 1 of 3 classes"):
        assert model.choose_tau(scores[y > 0], y[y > 0], taus=[0.0]).samples == 60


def drawn(bins: Bins, prior: np.ndarray, samples: int, heat: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x = label + noise with labels of a prior, and the logits under AGE_DENSITY's prior times ``heat``."""
    generator = np.random.default_rng(seed)
    y = bins.centers[generator.choice(len(bins), samples, p=prior)]
    x = y + 2 * generator.standard_normal(samples)
    logits = -((x[:, None] - bins.centers) ** 2) / 8 + np.log(AGE_DENSITY.prior())
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(heat * logits)


@pytest.mark.parametrize("even", [False, True], ids=["as in training", "even"])
def test_held_out_labels_may_be_distributed_otherwise(even: bool) -> None:
    """The logits of a perfect model, made too sure: temperature undoes it, and tau is one."""
    prior = np.full(20, 1 / 20) if even else AGE_DENSITY.prior()
    _, y, logits = drawn(AGES, prior, 3000, heat=1.7)
    model = ages(sigma=None).double()
    choice = model.calibrate(logits, y, most_mae=None, bias=False)
    assert choice.temperature == pytest.approx(1.7, rel=0.1)
    assert choice.tau == pytest.approx(1, abs=0.2)
    assert model.settings["temperature"] == choice.temperature
    assert model.settings["tau"] == choice.tau
    assert model.readout.adjuster.temperature.item() == pytest.approx(choice.temperature)


def test_a_smooth_bias_of_the_logits_is_undone_where_there_is_one() -> None:
    _, y, logits = drawn(AGES, AGE_DENSITY.prior(), 1000, heat=1.7)
    wave = torch.from_numpy(2 * np.sin(np.arange(20) / 3))
    model = ages(density=LARGE, sigma=None).double()
    choice = model.calibrate(logits + wave, y, most_mae=None, bias="auto")
    assert choice.biased
    assert "at temperature 1." in str(choice)
    assert " with a bias, chosen on 1,000 labels" in str(choice)
    assert choice.temperature == pytest.approx(1.7, rel=0.1)
    assert choice.tau == pytest.approx(1, abs=0.2)
    common = slice(0, 12)  # where labels are enough
    rest = (model.readout.bias.double() + wave / choice.temperature)[common]
    assert (rest - rest.mean()).abs().max() < 0.35
    bias, offset = model.readout.bias.clone(), model.readout.adjuster.offset.clone()
    assert model.choose_tau(logits + wave, y).tau == choice.tau
    model.set_prior(None)
    assert torch.equal(model.readout.adjuster.offset, bias)
    model.set_prior("uniform", choice.tau)
    assert torch.equal(model.readout.adjuster.offset, offset)
    plain, other = ages(density=LARGE, sigma=None).double(), ages(density=LARGE, sigma=None).double()
    few = slice(0, 200)
    choices = [
        one.calibrate(logits[few], y[few], most_mae=None, bias=bias)
        for one, bias in ((plain, "auto"), (model, False), (other, False))
    ]
    assert not any(one.biased for one in choices)
    assert bits(plain) == bits(model) == bits(other)
    with pytest.warns(DirToolkitWarning, match="the best temperature lies at or below"):
        assert not other.calibrate(logits[:1], y[:1], most_mae=None, bias="auto").biased


def test_a_bias_is_not_learnt_from_bins_without_labels() -> None:
    random, prior = np.random.default_rng(0), AGE_DENSITY.prior()
    classes = Bins.classes(20)
    y = random.choice(20, 600, p=prior)
    y = y[(y < 4) | (y > 8)]
    logits = torch.from_numpy(3 * np.eye(20)[y] + random.standard_normal((len(y), 20)) * 3**0.5 + np.log(prior))
    model = LongTailModel(net(), 6, classes, density=LabelDensity(classes, AGE_DENSITY.counts)).eval().double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.calibrate(logits, torch.from_numpy(y), bias="auto")
        model.calibrate(logits, torch.from_numpy(y), bias=np.bool_(True))  # type: ignore[arg-type]
    assert sum("which are ignored" in str(one.message) for one in caught) == len(caught) == 2  # trials warn of nothing
    absent = np.setdiff1d(np.arange(20), y)
    assert {4, 5, 6, 7, 8} <= set(absent)
    assert not model.readout.bias[absent].any()
    assert model.readout.bias.sum().item() == pytest.approx(0, abs=0.01)
    assert 0.05 < model.readout.bias.abs().max() < 1

    _, y, logits = drawn(AGES, prior, 600, heat=1.0)
    kept = (y < 4) | (y >= 9)
    axis = ages(sigma=None).double()
    axis.calibrate(logits[kept], y[kept], most_mae=None, bias=True)
    bias = axis.readout.bias
    ends = bias[[3, 9]]
    assert ends.min() - 1e-9 <= bias[4:9].min() <= bias[4:9].max() <= ends.max() + 1e-9
    assert bias[3:10].abs().max() < 0.7


@pytest.mark.filterwarnings("ignore:.*the best (tau|temperature):dir_toolkit.errors.DirToolkitWarning")
def test_a_bias_must_pay_by_more_than_its_error_and_is_not_judged_within_a_sequence() -> None:
    def biased(y: Tensor, logits: Tensor) -> bool:
        return ages(density=LARGE, sigma=None).double().calibrate(logits, y, most_mae=None, bias="auto").biased

    exact = [drawn(AGES, AGE_DENSITY.prior(), 50, heat=1.0, seed=seed)[1:] for seed in range(9)]
    assert sum(biased(*own) for own in exact) <= 3
    for seed in (1, 5, 7):
        _, y, logits = drawn(AGES, AGE_DENSITY.prior(), 40, heat=1.0, seed=seed)
        labels, scores = y[:, None].repeat(1, 9), logits[:, None].repeat(1, 9, 1)
        assert not biased(labels, scores)
        assert biased(labels.flatten(), scores.flatten(0, 1))  # rows that are equal in both halves
    x, y = batch(40)
    sequences = (x.view(10, 4, 3), y.view(10, 4))
    scores, labels = held_out(ages(), [sequences, sequences])
    assert (scores.shape, labels.shape) == ((20, 4, 20), (20, 4))
    assert held_out(ages(), [sequences, (x[None], y[None])])[0].shape == (80, 20)


def test_what_a_bias_costs_counts_from_the_calibration_without_it() -> None:
    _, y, logits = drawn(AGES, AGE_DENSITY.prior(), 100, heat=1.0, seed=1)
    plain, model = (ages(sigma=None).double() for _ in range(2))
    before = plain.calibrate(logits, y, most_mae=None, bias=False).before
    choice = model.calibrate(logits, y, most_mae=None, bias=True)
    assert choice.before == before
    assert f"MAE from {before['mae']:.3g} to {choice.after['mae']:.3g}" in str(choice)
    assert choice.curves["mae"][0] != before["mae"]
    _, y, logits = drawn(AGES, AGE_DENSITY.prior(), 60, heat=1.0, seed=8)
    with pytest.raises(
        ValueError, match=r"the MAE at some tau must be at most 1\.33, got at least 1\.37\. .* or bias=False"
    ):
        model.calibrate(logits, y, bias=True, most_mae=1.0)
    assert not model.calibrate(logits, y, bias="auto", most_mae=1.0).biased


def test_weights_and_what_the_loss_adjusts_belong_to_the_temperature() -> None:
    _, y, logits = drawn(AGES, AGE_DENSITY.prior(), 3000, heat=1.0)
    weights = LDS(AGES, kernel=None).fit(AGE_DENSITY)
    learnt = {"weights": AGE_DENSITY.weighted(weights).prior(), "adjust": np.ones(20)}
    for options in ({"weights": weights}, {"adjust": "in_loss", "target_prior": "uniform"}):
        model = ages(sigma=None, **options).double()
        scores = logits + torch.from_numpy(np.log(learnt[next(iter(options))] / AGE_DENSITY.prior()))
        choice = model.calibrate(3 * scores, y, by="mae", most_mae=None, bias=False)
        assert choice.temperature == pytest.approx(3, rel=0.1)


def test_the_price_is_bounded() -> None:
    _, y, scores = drawn(AGES, AGE_DENSITY.prior(), 300, heat=1.0)
    model = ages(sigma=None).double()
    free = model.choose_tau(scores, y)
    mae = free.curves["mae"]
    factor = (1 + free.after["mae"] / mae[0]) / 2
    assert factor > 1.01  # so that the bound binds
    bounded = model.choose_tau(scores, y, most_mae=factor)
    allowed = mae <= factor * mae[0]
    assert bounded.after["mae"] <= factor * bounded.before["mae"]
    assert bounded.after["bmae"] == pytest.approx(free.scores[allowed].min())
    assert model.choose_tau(scores, y, most_mae=1, by="mae").after["mae"] == pytest.approx(mae.min())
    with pytest.raises(ValueError, match=r"taus must hold one with a MAE of at most .*, got at least .*\. Begin them"):
        model.choose_tau(scores, y, most_mae=1.0, taus=[2.5, 3.0])


def hard(samples: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels of AGE_DENSITY's prior, and the right logits of inputs that tell them only to this noise."""
    generator, prior = np.random.default_rng(seed), AGE_DENSITY.prior()
    y = AGES.centers[generator.choice(20, samples, p=prior)]
    x = y + noise * generator.standard_normal(samples)
    return torch.from_numpy(y), torch.from_numpy(-((x[:, None] - AGES.centers) ** 2) / (2 * noise**2) + np.log(prior))


def choice_of(scores: Tensor, y: Tensor, model: LongTailModel | None = None, **options: Any) -> Any:
    model = ages(density=LARGE, sigma=None).double() if model is None else model
    return model.calibrate(scores, y, **options)


def test_by_default_the_mae_rises_by_at_most_a_tenth() -> None:
    (y, scores), (new, of_new) = hard(1000, 6.0), hard(3000, 6.0, seed=1)
    choices, rises = {}, {}
    for most_mae in ("auto", 1.1, None):
        model = ages(density=LARGE, sigma=None).double()
        errors = [(model.readout(of_new, of_new, of_new).prediction - new).abs().mean()]
        choices[most_mae] = model.calibrate(scores, y, **({} if most_mae == "auto" else {"most_mae": most_mae}))
        errors.append((model.readout(of_new, of_new, of_new).prediction - new).abs().mean())
        rises[most_mae] = float(errors[1] / errors[0])
    own, same, free = choices.values()
    assert str(own) == str(same)
    assert own.after["mae"] <= 1.1 * own.before["mae"]
    assert own.after["bmae"] < 0.85 * own.before["bmae"]
    assert free.after["mae"] > 1.2 * free.before["mae"]
    assert free.after["bmae"] < own.after["bmae"]
    assert rises["auto"] < 1.15
    assert rises[None] > 1.2
    assert str(own).endswith(". Bounded by most_mae=1.1; most_mae=None chooses without.")
    assert "most_mae" not in str(free)
    assert ages(density=LARGE, sigma=None).double().choose_tau(scores, y).bound is None  # it has no bound by default


def test_without_bound_and_bias_the_choice_is_that_of_temperature_and_tau_alone() -> None:
    y, scores = hard(300, 6.0)
    model, other = (ages(density=LARGE, sigma=None).double() for _ in range(2))
    choice = model.calibrate(scores, y, most_mae=None, bias=False)
    row = AGES.index(y).numpy()
    weight = row_weights(AGE_DENSITY.prior(), row, AGES)
    temperature = best_temperature(scores.numpy(), row, weight, np.zeros(20))
    tau = other.choose_tau(scores / temperature, y).tau
    other.set_prior("uniform", tau, temperature=temperature)
    assert (choice.temperature, choice.tau) == (temperature, tau)
    assert bits(model) == bits(other)


def accurate(samples: int, sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of AGE_DENSITY's prior, and the logits of a network that tells them to a tenth of a bin, and was trained
    with labels that are spread by sigma."""
    generator = np.random.default_rng(seed)
    x = AGES.centers[generator.choice(20, samples, p=AGE_DENSITY.prior())] + generator.random(samples) - 0.5
    y = np.clip(x + 0.1 * generator.standard_normal(samples), 0, 20)
    return torch.from_numpy(y), torch.from_numpy(-((x[:, None] - AGES.centers) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"bias": False, "most_mae": None}, {"bias": True, "most_mae": None}], ids=str
)
@pytest.mark.parametrize(("sigma", "fits"), [(1.0, False), (3.0, True)])
def test_a_temperature_that_raises_the_error_is_not_set(sigma: float, fits: bool, options: dict[str, Any]) -> None:
    """The log score asks for shares as narrow as a bin, whose median tells no more than the bin."""
    (y, scores), (new, of_new) = accurate(1000, sigma, 0), accurate(3000, sigma, 1)
    model = ages(density=LARGE, sigma=None).double()
    before = (model.readout(of_new, of_new, of_new).prediction - new).abs().mean()
    choice = model.calibrate(scores, y, **options)
    after = (model.readout(of_new, of_new, of_new).prediction - new).abs().mean()
    assert (choice.temperature < 0.1) is fits
    assert fits or choice.temperature == 1
    assert after < (0.6 if fits else 1.05) * before
    assert choice.after["mae"] / choice.before["mae"] == pytest.approx((after / before).item(), rel=0.15)


@pytest.mark.filterwarnings("ignore:.*the best tau is:dir_toolkit.errors.DirToolkitWarning")  # of shares in one bin
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_of_both_temperatures_the_lower_error_is_chosen(sigma: float) -> None:
    y, scores = accurate(200, sigma, 0)
    model = ages(density=LARGE, sigma=None).double()
    row = AGES.index(y).numpy()
    of_bin = row_weights(AGE_DENSITY.prior(), row, AGES)
    heats = (best_temperature(scores.numpy(), row, of_bin, np.zeros(20)), 1.0)
    taus = [0.0, 0.5, 1.0]
    choices = [model.choose_tau(scores / heat, y, taus=taus) for heat in heats]
    choice = model.calibrate(scores, y, most_mae=None, bias=False)
    best = int(sigma < 2)
    assert choices[best].after["bmae"] < 0.8 * choices[1 - best].after["bmae"]
    assert choice.temperature == heats[best]
    assert choice.before == choices[1].before
    assert choice.curves["bmae"][[0, 10, 20]].tolist() == choices[best].scores.tolist()


def test_a_bound_that_only_temperature_one_keeps_is_told() -> None:
    y, scores = hard(300, 6.0)
    free, bounded = (choice_of(2 * scores, y, bias=False, most_mae=most_mae) for most_mae in (None, 1.0))
    assert (free.temperature, bounded.temperature) == (pytest.approx(1.9, rel=0.1), 1)
    assert bounded.after["mae"] <= bounded.before["mae"] == free.before["mae"]
    assert free.after["bmae"] < bounded.after["bmae"]
    assert (free.bound, bounded.bound) == (None, 1)


def test_a_fitted_temperature_with_the_lower_error_that_breaks_the_bound_is_not_set() -> None:
    y, scores = hard(6, 2.0, seed=3)
    free, bounded = (
        choice_of(3 * scores, y, ages(sigma=None).double(), bias=False, most_mae=most_mae) for most_mae in (None, 1.1)
    )
    assert free.after["mae"] > 1.1 * free.before["mae"]
    assert free.after["bmae"] < bounded.after["bmae"]
    assert bounded.after["mae"] <= 1.1 * bounded.before["mae"]
    assert (bounded.temperature, bounded.bound) == (1, 1.1)


def test_the_bound_is_told_if_it_changed_the_temperature_alone() -> None:
    y, scores = hard(40, 6.0, seed=59)
    free, bounded = (choice_of(2 * scores, y, bias=False, most_mae=most_mae) for most_mae in (None, 1.05))
    assert free.temperature != bounded.temperature
    assert free.after["bmae"] < bounded.after["bmae"] == bounded.scores.min()
    assert (free.bound, bounded.bound) == (None, 1.05)


def test_only_the_temperature_that_is_set_causes_a_warning() -> None:
    y = torch.from_numpy(np.repeat(AGES.centers, 3) + np.tile([-0.3, 0.0, 0.3], 20))
    scores = -((y[:, None] - torch.tensor(AGES.centers)) ** 2) / 2
    row = AGES.index(y).numpy()
    assert best_temperature(scores.numpy(), row, row_weights(AGE_DENSITY.prior(), row, AGES), np.zeros(20)) < 0.0011
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice_of(scores, y, most_mae=None, bias=False).temperature == 1


@pytest.mark.filterwarnings("ignore:.*no validation label:dir_toolkit.errors.DirToolkitWarning")
@pytest.mark.parametrize("mode", [False, True], ids=["classes", "mode"])
def test_the_temperature_of_a_most_probable_bin_is_the_fitted_one(mode: bool) -> None:
    _, y, logits = drawn(AGES, AGE_DENSITY.prior(), 500, heat=3.0, seed=10)
    classes = LabelDensity(Bins.classes(20), LARGE.counts)
    model = ages(density=LARGE, sigma=None, decode="mode") if mode else ages(classes.bins, classes)
    choice = choice_of(logits, y if mode else AGES.index(y), model.double(), most_mae=None, bias=False)
    assert choice.temperature == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"most_mae": 1.0}, {"by": "error"}, {"most_mae": 1.1}], ids=str)
def test_an_adjusted_loss_over_classes_keeps_the_bound_and_never_raises_the_error(options: dict[str, Any]) -> None:
    """Its offset stays undivided, so that a temperature changes what is predicted at tau 0."""
    generator, set_to_one = np.random.default_rng(24), 0
    for _ in range(8):
        y = generator.choice(3, 300, p=CLASS_DENSITY.prior())
        scores = -(((y + 0.8 * generator.standard_normal(300))[:, None] - np.arange(3)) ** 2) / 2
        model = ages(CLASSES, CLASS_DENSITY, target_prior="uniform", adjust="in_loss").double()
        choice = choice_of(torch.from_numpy(scores), torch.from_numpy(y), model, bias=False, **options)
        set_to_one += choice.temperature == 1
        assert choice.after[choice.by] <= choice.before[choice.by]
        assert choice.after["error"] <= options.get("most_mae", math.inf) * choice.before["error"]
    assert bool(options) <= set_to_one < 8


def test_a_bias_competes_with_the_better_temperature() -> None:
    y, scores = accurate(60, 1.0, seed=0)
    wave = torch.from_numpy(0.5 * np.sin(np.arange(20) / 3))
    choice = choice_of(scores + wave, y, most_mae=None)
    assert (choice.biased, choice.temperature) == (False, 1)


def test_calibrating_in_threads_leaves_warnings_alone() -> None:
    y, scores = hard(60, 2.0)
    before, filters = warnings.showwarning, list(warnings.filters)
    models = [ages(density=LARGE, sigma=None).double() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: model.calibrate(scores, y), models))
    assert warnings.showwarning is before
    assert list(warnings.filters) == filters
    with pytest.warns(UserWarning, match="later"):
        warnings.warn("later", UserWarning, stacklevel=1)


def test_the_bound_of_classes_is_none_by_default() -> None:
    generator, prior = np.random.default_rng(0), CLASS_DENSITY.prior()
    y = generator.choice(3, 1000, p=prior)
    off = (y + generator.standard_normal(1000))[:, None] - np.arange(3)
    scores, labels = torch.from_numpy(np.log(prior) - off**2 / 2), torch.from_numpy(y)
    models = [ages(CLASSES, CLASS_DENSITY).double() for _ in range(3)]
    options: list[dict[str, Any]] = [{}, {"most_mae": None, "bias": "auto"}, {"most_mae": 1.1}]
    own, free, bounded = (one.calibrate(scores, labels, **each) for one, each in zip(models, options, strict=True))
    assert str(own) == str(free)
    assert bits(models[0]) == bits(models[1])
    assert own.after["error"] > 1.1 * own.before["error"]
    assert (own.bound, bounded.bound) == (None, 1.1)


HOSTILE: dict[str, Tensor] = {
    "one label": torch.tensor([3.5]),
    "two": torch.tensor([3.5, 17.0]),
    "one bin": torch.linspace(3.1, 3.9, 40),
    "one rare bin": torch.full((40,), 19.2),
    "both ends": torch.tensor([0.0, 20.0] * 10),
    "missing": torch.where(torch.arange(60) % 3 > 0, torch.nan, torch.arange(60) % 20 + 0.5),
    "sequences": (torch.arange(60) % 20 + 0.5).view(10, 6),
    "one sequence": (torch.arange(6) * 3.0).view(1, 6),
}


@pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning")
@pytest.mark.parametrize("labels", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("by", [None, "mae", "mse"])
def test_a_bound_that_none_asked_for_never_raises(labels: Tensor, by: Any) -> None:
    generator, known = torch.Generator().manual_seed(0), labels.nan_to_num(5.0).double()[..., None]
    noise = torch.randn(*labels.shape, 20, generator=generator).double()
    centers = torch.tensor(AGES.centers)
    for scores in (0 * noise, noise[..., :1, :].expand_as(noise), noise, 1e30 * noise, -50 * (known - centers).abs()):
        for options in ({}, {"bias": False}, {"bias": True}):
            model = ages(sigma=None, decode="expectation", missing="drop").double()
            choice = model.calibrate(scores, labels, by=by, **options)  # type: ignore[arg-type]
            limit = 1.1 * choice.before["mae"]
            assert choice.after["mae"] <= (max(limit, choice.curves["mae"].min()) if options.get("bias") else limit)
            assert "bias" in options or choice.after[choice.by] <= choice.before[choice.by]


@pytest.mark.filterwarnings("ignore:.*the best (tau|temperature):dir_toolkit.errors.DirToolkitWarning")
def test_a_bias_that_breaks_the_bound_at_each_tau_raises_only_if_the_bound_was_asked_for() -> None:
    y, scores = hard(5, 3.0, seed=37)
    with pytest.raises(ValueError, match=r"with a bias the MAE at some tau must be at most 2\.11, got at least 2\.36"):
        ages(sigma=None).double().calibrate(scores, y, bias=True, most_mae=1.1)
    choice = ages(sigma=None).double().calibrate(scores, y, bias=True)
    assert choice.biased
    assert choice.after["mae"] == choice.curves["mae"].min() > 1.1 * choice.before["mae"]
    assert choice.bound is None
    assert not ages(sigma=None).double().calibrate(scores, y).biased
    y, scores = hard(7, 6.0, seed=95)  # another tau has the least bMAE
    choice = ages(sigma=None).double().calibrate(scores, y, bias=True)
    assert choice.after["mae"] > 1.1 * choice.before["mae"]
    assert choice.curves["bmae"].min() < choice.after["bmae"]
    assert "Bounded" not in str(choice)


def test_a_bias_that_replaces_the_scores_is_not_chosen() -> None:
    """The scores tell nothing of a label and are no prior: a bias then asks for any large temperature."""
    generator = np.random.default_rng(0)
    y = torch.from_numpy(AGES.centers[generator.choice(20, 300, p=AGE_DENSITY.prior())])
    scores = torch.from_numpy(0.5 * generator.standard_normal((300, 20)) - 0.1 * np.arange(20))
    model = ages(density=LARGE, sigma=None).double()
    assert not model.calibrate(scores, y).biased
    with pytest.warns(DirToolkitWarning, match="the best temperature lies at or above 1000"):
        model.calibrate(scores, y, bias=True)


def reader() -> LongTailModel:
    """A model whose inputs are its scores."""
    return LongTailModel(nn.Sequential(nn.Dropout(0.5)), 20, AGES, density=AGE_DENSITY, head=nn.Identity()).double()


def test_calibration_reads_batches_as_it_reads_scores() -> None:
    _, y, x = drawn(AGES, np.full(20, 1 / 20), 60, heat=1.0)
    model, other = reader(), reader().eval()
    model.train().backbone.eval()
    other.calibrate(x, y, most_mae=1.2, bias=False)
    choice = model.calibrate([(x[:50], y[:50]), [x[50:], y[50:]]], most_mae=1.2, bias=False)
    assert bits(model) == bits(other)
    assert model.training
    assert not model.backbone.training
    assert torch.equal(model.eval()(x).prediction, other(x).prediction)
    assert str(choice).startswith(f"tau {choice.tau:g} at temperature {choice.temperature:.3g}, chosen on 60 labels, ")
    assert f"takes bMAE from {choice.before['bmae']:.3g} to {choice.after['bmae']:.3g}, MAE from " in str(choice)
    assert ", MAE of few from " in str(choice) == repr(choice)


@pytest.mark.filterwarnings("ignore:.*the best temperature lies at:dir_toolkit.errors.DirToolkitWarning")
def test_labels_may_be_no_tensors() -> None:
    x, labels = batch(40)
    model, other = ages(), ages()
    scores = model(x).scores
    for choose in ("choose_tau", "calibrate"):
        choices = [getattr(one, choose)(scores, own) for one, own in ((model, labels), (other, labels.tolist()))]
        assert choices[0].tau == choices[1].tau
    assert choices[0].tau == ages().calibrate(scores, labels.numpy()).tau


def test_tau_is_chosen_with_labels_beyond_the_axis() -> None:
    x, y = batch()
    model = ages()
    scores = model(x).scores.detach()
    moved = y.clone()
    moved[:3] = 24.5
    kept = model.choose_tau(scores[3:], y[3:], taus=[0.3, 1.0])
    dropped = model.choose_tau(scores, moved, taus=[0.3, 1.0], outside="drop")
    np.testing.assert_allclose(dropped.scores, kept.scores)
    ages_dropping = ages(outside="drop")
    np.testing.assert_allclose(ages_dropping.choose_tau(scores, moved, taus=[0.3, 1.0]).scores, kept.scores)
    clipped = model.choose_tau(scores, moved, taus=[0.3, 1.0], outside="clip", by="mae")
    model.set_prior("uniform", 0.3)
    error = (decode(model.readout.adjuster(scores).softmax(1), AGES, "median", ends="open") - moved).abs().mean()
    assert clipped.scores[0] == pytest.approx(error.item(), rel=1e-5)
    with pytest.raises(LabelError, match=r"^LongTailModel\.choose_tau: labels must lie"):
        model.choose_tau(scores, moved)
    with pytest.raises(ValueError, match="at least one label must lie on the axis"):
        model.choose_tau(scores, y + 100, outside="drop")


def test_a_tau_at_the_end_of_its_range_is_told() -> None:
    scores = -torch.arange(20.0).repeat(12, 1) / 2  # all for the commonest bins, while all labels are of the rarest
    with pytest.warns(DirToolkitWarning, match=r"^LongTailModel\.choose_tau: the best tau is the largest of those"):
        assert ages(decode="expectation").choose_tau(2 * scores, torch.full((12,), 19.5)).tau == 3.0
    with pytest.warns(DirToolkitWarning, match=r"^choose_tau: the best tau is the largest of those tried, 3\."):
        result = choose_tau(
            torch.tensor([[9.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 0]), [0.7, 0.3], by="log_loss", temperature=1.0
        )
    assert result.tau == 3.0


def test_what_tau_cannot_be_chosen_from_is_refused() -> None:
    x, y = batch()
    model = ages()
    scores = model(x).scores.detach()
    broken = scores.clone()
    broken[2, 1] = math.nan
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (
            lambda: model.choose_tau(scores, y, by="rmse"),
            ValueError,
            "by must be one of 'bmae', 'mae', 'bmse', 'mse', got",
        ),
        (lambda: model.choose_tau([1.0], y), TypeError, r"scores must be a torch\.Tensor, got list"),
        (lambda: model.choose_tau(scores, ["1.0"]), TypeError, "labels must be integers or floats, got dtype <U3"),
        (
            lambda: model.choose_tau(scores > 0, y),
            TypeError,
            r"scores must be integers or floats, got dtype torch\.bool",
        ),
        (lambda: model.choose_tau(scores[:, :5], y), ShapeError, r"scores must be \(N, 20\), .* got shape \(60, 5\)"),
        (
            lambda: model.choose_tau(scores, y[:, None]),
            ShapeError,
            r"labels must be \(60,\), one per row of scores, got",
        ),
        (lambda: model.choose_tau(scores, y[:8]), ShapeError, r"labels must be \(60,\), one per row of scores"),
        (lambda: model.choose_tau(scores[:0], y[:0]), ValueError, "at least one label must lie on the axis, got none"),
        (lambda: model.choose_tau(broken, y), ValueError, r"scores must be finite, got nan at index \[2, 1\]"),
        (lambda: model.choose_tau(scores, y + 20), LabelError, r"labels must lie on the label axis \[0, 20\]"),
        (lambda: model.choose_tau(scores, y * math.nan), LabelError, "labels must not be NaN"),
        (lambda: model.choose_tau(scores, y, taus=[]), ValueError, "taus must hold at least one value"),
        (lambda: model.choose_tau(scores, y, taus=[1, 0]), ValueError, "taus must be one row, rising and not negative"),
        (lambda: model.choose_tau(scores, y, taus=[-1, 0]), ValueError, "taus must be one row, rising"),
        (lambda: model.choose_tau(scores, y, taus=[math.inf]), ValueError, "taus must be finite, got inf"),
    ]
    for call, error, rule in cases:
        with pytest.raises(error, match=rf"^LongTailModel\.choose_tau: {rule}"):
            call()
    with pytest.raises(ValueError, match="kernel must have odd length"):
        model.choose_tau(scores, y, kernel=[1, 1])
    with pytest.raises(ValueError, match=r"^LongTailModel\.choose_tau: the training prior needs density, got None"):
        ages(density=None).choose_tau(scores, y)
    for other in (ages(head="regression"), ages(head="gaussian")):
        with pytest.raises(UsageError, match=r"^LongTailModel\.choose_tau: the readout must have a prior, got a \w+Re"):
            other.choose_tau(scores, y)
    _, y, scores = drawn(AGES, AGE_DENSITY.prior(), 60, heat=1.0)
    model = reader()
    before = bits(model)
    pairs: list[tuple[Callable[[], object], type[Exception], str]] = [
        (
            lambda: model.calibrate(scores),
            ValueError,
            r"scores need labels, got labels=None\. Pass scores and labels\.",
        ),
        (
            lambda: model.calibrate(scores[:, :3], y),
            ShapeError,
            r"scores must be \(N, 20\), .*\[\(inputs, labels\)\]",
        ),
        (lambda: model.calibrate(model(scores), y), TypeError, r".*got LongTailOutput\. Use output\.scores\.$"),
        *(
            (lambda b=b: model.calibrate(b), TypeError, f"a batch must be a pair of inputs and labels, got {got}")
            for b, got in (
                ((scores, y), r"Tensor\. Pass a DataLoader of pairs, or \[\(inputs, labels\)\]\."),
                ([{"x": scores, "y": y}], "dict"),
                ([(scores, y, y)], r"3 values\. Join"),
            )
        ),
        (lambda: model.calibrate([]), ValueError, "there must be at least one batch, got none"),
        (lambda: model.calibrate(3), TypeError, r"a tensor or a loader of batches is needed, got int\. Use a DataL"),
        (lambda: model.calibrate(scores, y, most_mae=0.9), ValueError, r"most_mae must be >= 1, got 0\.9"),
        (lambda: model.calibrate(scores, y, most_mae="none"), ValueError, "most_mae must be one of 'auto', got 'none'"),
        (lambda: model.calibrate(scores, y, bias="yes"), ValueError, "bias must be one of 'auto', got 'yes'"),
        (lambda: model.calibrate(scores, y, by="error"), ValueError, "by must be one of .*'bmse', 'mse', got 'error'"),
        (lambda: model.calibrate(scores, y + 20), LabelError, r"labels must lie on the label axis \[0, 20\]"),
    ]
    for call, error, rule in pairs:
        with pytest.raises(error, match=rf"^LongTailModel\.calibrate: {rule}"):
            call()
    assert bits(model) == before


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    bins = Bins.uniform(0, 10, width=1)
    model = LongTailModel(nn.Linear(2, 4), 4, bins, density=LabelDensity(bins, np.arange(20, 10, -1)))
    random = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(400, 10, generator=random), 10 * torch.rand(400, generator=random)
    model.calibrate_intervals(scores, labels)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DirToolkitWarning)
        with pytest.raises(DirToolkitWarning, match="intervals were calibrated under another prior"):
            model.calibrate(scores, labels, most_mae=None, bias=True)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if isinstance(before[key], Tensor))
