from __future__ import annotations

import copy
import io
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from dir_toolkit.errors import (
    CheckpointError,
    DirToolkitWarning,
    LabelError,
    NotFittedError,
    ShapeError,
    UsageError,
)
from dir_toolkit.experiment.backbones import ImageClassifier
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.training.checkpoint import load_checkpoint, save_checkpoint
from dir_toolkit.experiment.training.loop import Optimization, fit
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.features.fds import FDS
from dir_toolkit.heads.affinity import AffinityHead
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.decoding import decode
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import gaussian, triangular
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel, LongTailOutput
from dir_toolkit.losses.affinity import affinity_loss
from dir_toolkit.losses.cross_entropy import cross_entropy, logit_adjusted_cross_entropy
from dir_toolkit.losses.distribution import crps
from dir_toolkit.losses.focal import focal_loss
from dir_toolkit.losses.gaussian_nll import gaussian_nll
from dir_toolkit.losses.regression import weighted_huber, weighted_l1
from dir_toolkit.metrics.classification import ClassificationMetrics
from dir_toolkit.metrics.regression import regression_metrics
from dir_toolkit.priors import adjust_logits, choose_tau, class_prior

AGES = Bins.uniform(0, 20, width=1)
CLASSES = Bins.classes(4)
AGE_DENSITY = LabelDensity(AGES, np.arange(1, 21)[::-1] ** 2)
CLASS_DENSITY = LabelDensity(CLASSES, np.array([40, 9, 4, 1]))
MIDDLE = np.average(AGES.centers, weights=AGE_DENSITY.counts)
SPREAD = math.sqrt(np.average((AGES.centers - MIDDLE) ** 2, weights=AGE_DENSITY.counts) + 1 / 12)
HEADS = ("regression", "gaussian", "linear", "cosine", "affinity")


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def net(num_features: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, num_features), nn.Tanh())


def ages(**options: Any) -> LongTailModel:
    arguments = {"density": AGE_DENSITY, **options}
    return seeded(lambda: LongTailModel(net(), 6, AGES, **arguments))


def classes(**options: Any) -> LongTailModel:
    arguments = {"density": CLASS_DENSITY, **options}
    return seeded(lambda: LongTailModel(net(), 6, CLASSES, **arguments))


def batch(samples: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    return x, (20 * torch.rand(samples, generator=generator)).clamp_max(19.9)


def class_batch(samples: int = 9) -> tuple[Tensor, Tensor]:
    x, y = batch(samples)
    return x, (y / 5).long()


def same_output(a: LongTailOutput, b: LongTailOutput) -> None:
    for name, one, other in zip(a._fields, a, b, strict=True):
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0)), name


def test_comparing_outputs_can_fail() -> None:
    out = ages()(batch()[0])
    with pytest.raises(AssertionError):
        same_output(out, out._replace(prediction=out.prediction + 1))
    with pytest.raises(AssertionError):
        same_output(out, out._replace(loss=out.loss + 1 if out.loss == out.loss else torch.zeros(())))


# ---- classes are classification, to the bit ----


def test_classes_with_a_linear_head_are_the_classifier_to_the_bit() -> None:
    x, y = class_batch()
    model = classes()

    def make() -> ImageClassifier:
        backbone = net()
        backbone.num_features = 6  # type: ignore[assignment]
        return ImageClassifier(backbone, LinearHead(6, 4))

    plain = seeded(make)
    out, scores = model(x, y), plain(x)
    assert torch.equal(out.scores, scores)
    assert torch.equal(out.loss, cross_entropy(scores, y))
    assert torch.equal(out.prediction, scores.argmax(1))
    assert out.prediction.dtype == torch.int64
    assert torch.equal(out.distribution, scores.softmax(1))
    weight = torch.linspace(0.5, 2, len(y))
    assert torch.equal(model(x, y, weight).loss, cross_entropy(scores, y, weight))
    out.loss.backward()
    cross_entropy(scores, y).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("target", ["uniform", [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.0, 0.0]])
@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_an_adjusted_model_is_adjusted_logits_to_the_bit(target: Any, tau: float) -> None:
    x, _ = class_batch()
    prior = class_prior(CLASS_DENSITY)
    for model in (classes(prior=target, tau=tau), classes()):
        model.set_prior(target, tau)
        out = model(x)
        adjusted = adjust_logits(out.scores, prior, target=target, tau=tau)
        assert torch.equal(out.distribution, adjusted.softmax(1))
        assert torch.equal(out.prediction, adjusted.argmax(1))
    model.set_prior(None)
    assert torch.equal(model(x).distribution, out.scores.softmax(1))


def test_adjusted_in_the_loss_is_the_logit_adjusted_loss_to_the_bit() -> None:
    x, y = class_batch()
    model = classes(prior="uniform", tau=0.7, adjust="in_loss")
    out = model(x, y)
    assert torch.equal(out.loss, logit_adjusted_cross_entropy(out.scores, y, class_prior(CLASS_DENSITY), 0.7))
    assert torch.equal(out.distribution, out.scores.softmax(1))
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    towards = classes(prior=shares, tau=0.7, adjust="in_loss")
    expected = cross_entropy(
        out.scores - adjust_logits(torch.zeros(4), class_prior(CLASS_DENSITY), target=shares, tau=0.7), y
    )
    assert torch.equal(towards(x, y).loss, expected)


def test_a_prior_chosen_later_undoes_the_one_in_the_loss() -> None:
    x, y = class_batch()
    prior = class_prior(CLASS_DENSITY)
    model = classes(prior="uniform", tau=0.7, adjust="in_loss")
    scores, loss = model(x).scores, model(x, y).loss
    model.set_prior("uniform", 0.7)
    assert torch.equal(model(x).distribution, scores.softmax(1))
    model.set_prior(None)
    torch.testing.assert_close(model(x).distribution, (scores + 0.7 * prior.log().float()).softmax(1))
    model.set_prior("uniform", 0.5)
    torch.testing.assert_close(model(x).distribution, (scores + 0.2 * prior.log().float()).softmax(1))
    assert torch.equal(model(x, y).loss, loss)  # what training sees has not changed


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_affinity_over_classes_is_its_loss_and_diversity_to_the_bit(reduction: Any) -> None:
    x, y = class_batch()
    model = classes(head="affinity")
    out = model(x)
    assert isinstance(model.head, AffinityHead)
    assert model.head.num_prototypes == 5
    assert torch.equal(out.scores, model.head(out.features))
    expected = affinity_loss(out.scores, y, reduction=reduction)
    expected = expected + (len(y) if reduction == "sum" else 1) * model.head.diversity()
    assert torch.equal(model.criterion(out, y, reduction=reduction), expected)
    assert torch.equal(out.prediction, out.scores.argmax(1))
    torch.testing.assert_close(out.distribution, out.scores / out.scores.sum(1, keepdim=True))


def test_temperature_divides_scores_first() -> None:
    x, _ = class_batch()
    model = classes(temperature=2.0)
    model.set_prior("uniform", 0.5)  # the temperature stays
    out = model(x)
    assert torch.equal(out.distribution, adjust_logits(out.scores / 2, class_prior(CLASS_DENSITY), tau=0.5).softmax(1))
    model.set_prior("uniform", 0.5, temperature=4.0)
    assert torch.equal(
        model(x).distribution, adjust_logits(out.scores / 4, class_prior(CLASS_DENSITY), tau=0.5).softmax(1)
    )


# ---- weights are a part of the training prior ----

UNEVEN = Bins.from_edges([0.0, 1.0, 3.0, 4.0, 12.0])
FOUR = Bins.uniform(0, 12, count=4)
OTHER_AXIS = Bins.uniform(0, 12, width=1)  # other bins of the same axis as FOUR and UNEVEN
WEIGHTS: list[dict[str, Any] | None] = [
    None,
    *(
        {"scheme": scheme, "kernel": None}
        for scheme in ("none", "inverse", "sqrt_inverse", "effective_number", "dense")
    ),
    {"scheme": "sqrt_inverse", "kernel": triangular(3)},
    {"scheme": "inverse", "kernel": triangular(3)},
    {"scheme": "inverse", "kernel": None, "bins": OTHER_AXIS},
]


def skewed(bins: Bins) -> Tensor:
    """Labels ever fewer from bin to bin; on an axis they lie evenly in each bin."""
    if bins.categorical:
        return torch.arange(4).repeat_interleave(torch.tensor([100, 40, 9, 3]))
    of_unit = torch.tensor([33, 14, 4, 1])[torch.from_numpy(bins.index(OTHER_AXIS.centers))]
    return torch.from_numpy(OTHER_AXIS.centers.copy()).repeat_interleave(of_unit)


def learnt_without_a_clue(y: Tensor, bins: Bins, **options: Any) -> LongTailModel:
    """A model of one constant feature, trained to its optimum."""
    density = LabelDensity.count(y, bins)
    options = {"density": density, "sigma": None, "prior_kernel": None, **options}
    return learn_without_a_clue(LongTailModel(nn.Identity(), 1, bins, **options), y)


def learn_without_a_clue(model: LongTailModel, y: Tensor) -> LongTailModel:
    model.double()
    x = torch.ones(len(y), 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        model.head.parameters(), max_iter=400, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x, y).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval()


@pytest.mark.parametrize("adjust", ["after", "in_loss"])
@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("bins", [Bins.classes(4), FOUR, UNEVEN], ids=["classes", "even", "uneven"])
def test_who_learns_nothing_answers_with_the_prior_whatever_the_weights(bins: Bins, options: Any, adjust: Any) -> None:
    y = skewed(bins)
    weights = None
    if options is not None:
        if bins.categorical and "bins" in options:
            pytest.skip("classes cut their axis in one way")
        weights = LDS(**{"bins": bins, **options}).fit(y)
    one = torch.ones(1, 1, dtype=torch.float64)
    even = torch.ones(4).double() / 4 if bins.categorical else torch.tensor(np.diff(bins.edges) / 12)
    rising = [0.1, 0.2, 0.3, 0.4]
    model = learnt_without_a_clue(y, bins, weights=weights, prior="uniform", adjust=adjust)
    torch.testing.assert_close(model(one).distribution[0], even, rtol=1e-4, atol=1e-5)
    model.set_prior(rising)
    torch.testing.assert_close(model(one).distribution[0], torch.tensor(rising).double(), rtol=1e-4, atol=1e-5)
    if adjust == "in_loss":
        model = learnt_without_a_clue(y, bins, weights=weights, prior=rising, adjust=adjust)
        torch.testing.assert_close(model(one).distribution[0], torch.tensor(rising).double(), rtol=1e-4, atol=1e-5)
        model.set_prior("uniform")
        torch.testing.assert_close(model(one).distribution[0], even, rtol=1e-4, atol=1e-5)


SEVENS = Bins.uniform(0, 7, width=1, integer=True)
STRETCHED = Bins.from_edges([0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 11.0, 12.0])
AXES = {"classes": Bins.classes(7), "even": Bins.uniform(0, 14, count=7), "integer": SEVENS, "uneven": STRETCHED}
SPREADS: list[dict[str, Any]] = [
    {},
    {"sigma": 0.7},
    {"sigma": 0.7, "label_kernel": "laplace"},
    {"sigma": None},
    {"loss": "squared_emd"},
    {"loss": "squared_emd", "sigma": 0.7},
    {"loss": "crps"},
]


@pytest.mark.filterwarnings("ignore:.*spreads each label")  # on an axis so short
@pytest.mark.parametrize("adjust", ["after", "in_loss"])
@pytest.mark.parametrize("kernel", [None, triangular(3)], ids=["counts", "smoothed"])
@pytest.mark.parametrize("scheme", [None, "inverse", "sqrt_inverse", "effective_number"])
@pytest.mark.parametrize("options", SPREADS, ids=str)
@pytest.mark.parametrize("bins", AXES.values(), ids=list(AXES))
def test_who_learns_nothing_answers_with_the_target_however_labels_are_spread(
    bins: Bins, options: dict[str, Any], scheme: Any, kernel: Any, adjust: Any
) -> None:
    if bins.categorical and options != {"sigma": None}:
        pytest.skip("classes are not spread")
    if scheme is None and kernel is not None:
        pytest.skip("no weights to smooth")
    counts = np.array([100, 40, 9, 3, 30, 6, 2])
    y = torch.from_numpy(np.repeat(bins.centers, counts))
    if bins.categorical:
        y = y.long()
    elif options == {"loss": "crps"}:
        if bins is SEVENS:
            pytest.skip("the optimum of CRPS is not the shares of labels that all lie on whole numbers")
        # As of labels that lie evenly in each bin, of which its optimum is the shares: within a bin CRPS is a cubic of
        # the label, which Gauss's two points integrate.
        from_middle = torch.tensor([-1.0, 1.0]) / math.sqrt(12) * limits(bins, y).diff()[:, None]
        y = (torch.tensor(bins.centers)[:, None] + from_middle).repeat_interleave(torch.tensor(counts), 0).flatten()
    weights = None if scheme is None else LDS(bins, kernel=kernel, scheme=scheme).fit(LabelDensity.count(y, bins))
    one = torch.ones(1, 1, dtype=torch.float64)
    shares = torch.arange(1, 8).double() / 28
    even = torch.tensor(bins.relative_widths).double() / 7
    same = partial(torch.testing.assert_close, rtol=1e-4, atol=0)
    for target, expected, other, then in (("uniform", even, shares, shares), (shares, shares, "uniform", even)):
        density = LabelDensity.count(y, bins)
        model = LongTailModel(
            nn.Identity(), 1, bins, density=density, weights=weights, prior=target, adjust=adjust, **options
        )
        learn_without_a_clue(model, y)
        same(model(one).distribution[0], expected)
        model.set_prior(other)
        same(model(one).distribution[0], then)


def test_weights_over_bins_of_their_own_belong_to_the_prior_that_is_spread() -> None:
    coarse = Bins.from_edges([0.0, 4.0, 8.0, 14.0])
    bins = AXES["even"]
    y = torch.from_numpy(np.repeat(bins.centers, [100, 40, 9, 3, 30, 6, 2]))
    weights = LDS(coarse, kernel=None, scheme="inverse").fit(y)
    model = learnt_without_a_clue(y, bins, sigma=1.5, prior_kernel="auto", weights=weights, prior="uniform")
    shares = model(torch.ones(1, 1, dtype=torch.float64)).distribution[0]
    torch.testing.assert_close(shares, torch.full((7,), 1 / 7).double(), rtol=1e-4, atol=0)


def test_a_bin_that_less_than_one_label_reaches_is_filled_up_to_one_of_its_own_weight() -> None:
    counts = np.array([90, 30, 6, 0, 0, 0, 0, 0, 0, 0, 2, 0])
    bins = Bins.uniform(0, 12, width=1)
    density = LabelDensity(bins, counts)
    weights = LDS(bins, kernel=triangular(3), scheme="sqrt_inverse").fit(density)
    with pytest.warns(DirToolkitWarning, match="no label in or near 4 of 12 bins"):
        model = LongTailModel(nn.Identity(), 1, bins, density=density, sigma=0.5, weights=weights, prior="uniform")
    spread = soft_labels(torch.tensor(bins.centers), bins, 0.5).numpy()
    table = weights(torch.tensor(bins.centers)).numpy()
    reached, learnt = counts @ spread, (counts * table) @ spread
    expected = np.where(reached >= 1, learnt, learnt + (1 - reached) * table)
    expected /= expected.sum()
    np.testing.assert_allclose(model.adjuster.offset.numpy(), -np.log(expected), rtol=1e-5)
    assert ((reached > 0) & (reached < 1) & (counts == 0)).any()
    assert (reached >= 1).sum() == 4


def test_the_oracle_without_a_clue_sees_a_double_correction() -> None:
    y = skewed(FOUR)
    weights = LDS(FOUR, kernel=None, scheme="inverse").fit(y)
    model = learnt_without_a_clue(y, FOUR, weights=weights)
    one = torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(model(one).distribution[0], torch.full((4,), 0.25).double(), rtol=1e-5, atol=1e-6)
    model.weights = None  # the prior as if the loss had had none
    model.set_prior("uniform")
    assert model(one).distribution[0, 3] > 0.7


def test_classes_adjusted_by_hand_take_the_weights_into_the_prior() -> None:
    y = skewed(Bins.classes(4))
    weights = LDS(Bins.classes(4), kernel=None, scheme="sqrt_inverse").fit(y)
    model = learnt_without_a_clue(y, Bins.classes(4), weights=weights)
    scores = model(torch.ones(len(y), 1, dtype=torch.float64)).scores
    prior = class_prior(LabelDensity.count(y, Bins.classes(4)), weights=weights)
    adjusted = adjust_logits(scores, prior).softmax(1)
    torch.testing.assert_close(adjusted, torch.full_like(adjusted, 0.25), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.softmax(1)[0], prior, rtol=1e-4, atol=1e-5)


def test_a_bin_without_labels_counts_as_one_label_of_its_weight() -> None:
    density = LabelDensity(Bins.classes(3), np.array([8, 2, 0]))
    weights = LDS(Bins.classes(3), kernel=None, scheme="inverse").fit(density)  # 8 : 2 : 2 labels, so 0.625, 2.5, 2.5
    with pytest.warns(DirToolkitWarning, match="no label in or near 1 of 3 bins"):
        model = LongTailModel(nn.Identity(), 1, Bins.classes(3), density=density, weights=weights, prior="uniform")
    expected = torch.tensor([5.0, 5.0, 2.5]) / 12.5
    torch.testing.assert_close(model.adjuster.offset, -expected.log())
    with pytest.warns(DirToolkitWarning, match="no sample of class 2"):
        torch.testing.assert_close(class_prior(density, weights=weights).float(), expected)


@pytest.mark.filterwarnings("ignore:.*effective sample size")
def test_balanced_mse_integrates_over_the_labels_as_the_loss_sees_them() -> None:
    weights = LDS(AGES, kernel=None, scheme="inverse").fit(AGE_DENSITY)
    model = ages(head="regression", loss="balanced_mse", weights=weights, prior_kernel=None)
    torch.testing.assert_close(model.loss.prior, torch.full((20,), 0.05))


def test_weights_that_are_not_known_yet_leave_no_prior() -> None:
    with pytest.raises(NotFittedError):
        ages(prior="uniform", weights=LDS(AGES))
    ages(weights=LDS(AGES))  # none is asked for yet


def test_even_means_over_the_axis_at_every_strength() -> None:
    density = LabelDensity(UNEVEN, np.array([10, 20, 10, 80]))  # evenly spread over the axis
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    for tau in (0.0, 0.4, 1.0, 2.0):
        model = LongTailModel(nn.Identity(), 1, UNEVEN, density=density, sigma=None, prior="uniform", tau=tau)
        out = model(x)
        torch.testing.assert_close(out.distribution, out.scores.softmax(1))  # nothing to correct
    model.set_prior(None)
    torch.testing.assert_close(model(x).distribution, out.distribution)


# ---- a continuous axis ----


def test_a_value_worked_out_by_hand() -> None:
    bins = Bins.uniform(0, 4, width=2)
    density = LabelDensity(bins, np.array([3, 1]))
    model = LongTailModel(nn.Flatten(), 1, bins, density=density, sigma=0, prior="uniform", decode="expectation")
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[math.log(3)], [0.0]]))  # shares of 3/4 and 1/4, as in training
        model.head.bias.zero_()
    out = model(torch.ones(1, 1), torch.tensor([3.5]))
    torch.testing.assert_close(out.distribution, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(out.prediction, torch.tensor([2.0]))
    torch.testing.assert_close(out.loss, torch.tensor(math.log(4)))
    model.set_prior()
    torch.testing.assert_close(model(torch.ones(1, 1)).prediction, torch.tensor([1.5]))  # 3/4 * 1 + 1/4 * 3


@pytest.mark.parametrize("adjust", ["after", "in_loss"])
def test_loss_and_expectation_equal_a_naive_loop(adjust: Any) -> None:
    x, y = batch()
    settings = {"prior": "uniform", "tau": 0.6, "adjust": adjust, "expectation_weight": 0.3, "decode": "expectation"}
    model = ages(**settings).double()
    out = model(x.double(), y.double(), weight := torch.linspace(0.5, 2, len(y)).double())
    spread = np.zeros(20)
    for count, center in zip(AGE_DENSITY.counts, AGES.centers, strict=True):
        spread += count * soft_labels(torch.tensor(center), AGES, 2.0).numpy()
    prior = spread / spread.sum()
    moved = (0.6 * np.log(prior)).astype(np.float32).astype(np.float64)
    values, expected = [], []
    for i in range(len(y)):
        s = out.scores[i].detach().numpy()
        seen = s + moved if adjust == "in_loss" else s
        target = soft_labels(y[i].double(), AGES, 2.0).numpy()
        off = abs(softmax(seen) @ AGES.centers - y[i].item())
        values.append(weight[i].item() * (-(target * log_softmax(seen)).sum() + 0.3 * off / SPREAD))
        expected.append(softmax(s if adjust == "in_loss" else s - moved) @ AGES.centers)
    assert out.loss.item() == pytest.approx(np.mean(values), rel=1e-12)
    np.testing.assert_allclose(out.prediction.detach().numpy(), expected, rtol=1e-12)


def test_the_default_prior_is_spread_as_labels_are_and_the_kernel_can_be_chosen() -> None:
    x, _ = batch()
    for spread, sigma in (({}, 2.0), ({"sigma": 0.8, "label_kernel": "laplace"}, 0.8), ({"loss": "crps"}, None)):
        model = ages(prior="uniform", decode="expectation", **spread)
        scores = model(x).scores
        of_centers = soft_labels(torch.tensor(AGES.centers), AGES, sigma, kernel=model.label_kernel).numpy()
        assert (AGE_DENSITY.counts @ of_centers >= 1).all()
        for kernel, density in (
            ("auto", LabelDensity(AGES, AGE_DENSITY.counts @ of_centers)),
            (None, AGE_DENSITY),
            (triangular(3), AGE_DENSITY.smooth(triangular(3))),
        ):
            expected = adjust_logits(scores, class_prior(density)).softmax(1)
            model.set_prior("uniform", kernel=kernel)
            torch.testing.assert_close(model(x).distribution, expected)
            same = ages(prior="uniform", prior_kernel=kernel, decode="expectation", **spread)
            assert torch.equal(same(x).distribution, model(x).distribution)
            same.set_prior("uniform")  # which takes the model's own
            assert torch.equal(same(x).distribution, model(x).distribution)


@pytest.mark.parametrize("how", ["expectation", "median", "mode"])
def test_predictions_are_decoded(how: Any) -> None:
    out = ages(decode=how)(batch()[0])
    assert torch.equal(out.prediction, decode(out.distribution, AGES, how))
    if how == "median":
        assert torch.equal(ages()(batch()[0]).prediction, out.prediction)


@pytest.mark.parametrize("head", ["linear", "cosine", "affinity"])
@pytest.mark.parametrize("loss", ["cross_entropy", "crps", "squared_emd"])
def test_heads_over_bins_learn_the_label(head: Any, loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    y = 10 + 5 * torch.tanh(x[:, 0])
    model = ages(head=head, loss=loss)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    first = weighted_l1(model(x).prediction, y).item()
    for _ in range(80):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    assert weighted_l1(model(x).prediction, y).item() < min(1.5, first / 2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_named_losses_are_the_functions() -> None:
    x, y = batch()
    out = ages(loss="crps")(x, y)
    torch.testing.assert_close(out.loss, crps(out.scores, y, bins=AGES) / SPREAD)
    model = ages(head="affinity")
    assert model.head.num_prototypes == 1
    out = model(x, y)
    target = soft_labels(y, AGES, 2.0)
    torch.testing.assert_close(out.loss, -(target * out.scores.log().log_softmax(1)).sum(1).mean())


def test_an_affinity_of_zero_has_finite_slopes() -> None:
    model = ages(head="affinity")
    far = 100 * torch.ones(2, 6)
    model.backbone = nn.Identity()
    model(far.requires_grad_(), torch.tensor([1.0, 2.0])).loss.backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    assert model.head.weight.grad.isfinite().all()


def test_own_loss_and_own_head() -> None:
    x, y = class_batch()
    out = classes(loss=focal_loss)(x, y)
    assert torch.equal(out.loss, focal_loss(out.scores, y))
    x, y = batch()
    model = seeded(lambda: LongTailModel(net(), 6, AGES, head=nn.Sequential(nn.ReLU(), nn.Linear(6, 20))))
    assert model(x, y).scores.shape == (9, 20)

    class Learnt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None, *, reduction: Any) -> Tensor:
            return self.factor * weighted_huber(pred, target, weight, reduction=reduction)

    model = ages(head="regression", loss=Learnt())
    model(x, y).loss.backward()
    assert model.loss.factor.grad.item() == pytest.approx(model(x, y).loss.item())


# ---- tau, chosen on validation data ----


def bits(model: LongTailModel) -> dict[str, bytes]:
    """Parameters and buffers, those of FDS left out."""
    return {
        name: value.numpy().tobytes() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }


def error_under(
    model: LongTailModel, scores: Tensor, y: Tensor, by: str, tau: float, kernel: Any = "auto", *, of_mean: Any = None
) -> float:
    """Of a copy of the model that predicts under the uniform prior with this tau."""
    one = copy.deepcopy(model)
    one.set_prior("uniform", tau, kernel=kernel)
    pred = decode(one.adjuster(one._logits(scores)).softmax(1), AGES, of_mean or one.decoding)
    return float(regression_metrics(pred, y, AGE_DENSITY)[by].sel(region="all"))


TAU_MODELS: list[dict[str, Any]] = [
    {},
    {"head": "affinity", "decode": "expectation"},
    {"prior": "uniform", "tau": 0.8, "adjust": "in_loss"},
    {"prior": "uniform", "tau": 1.7, "temperature": 2.5, "decode": "mode"},
]


@pytest.mark.parametrize("by", ["bmae", "mae"])
@pytest.mark.parametrize("options", TAU_MODELS, ids=str)
def test_tau_is_the_one_with_the_least_error(options: dict[str, Any], by: Any) -> None:
    x, y = batch(60)
    model = ages(**options).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that scores differ
    scores = model(x).scores
    for kernel in ("auto", None, triangular(3)):
        before = bits(model)
        choice = model.choose_tau(scores, y, by=by, taus=(taus := [0, 0.3, 1.0, 2.5]), kernel=kernel)
        assert bits(model) == before
        expected = [error_under(model, scores.detach(), y, by, tau, kernel) for tau in taus]
        np.testing.assert_allclose(choice.scores, expected, rtol=1e-6)
        assert (choice.tau, choice.by) == (taus[int(np.argmin(expected))], by)
        assert choice.temperature == options.get("temperature", 1.0)
        assert choice.taus.tolist() == taus
        assert choice.scores.max() - choice.scores.min() > 0.05  # so that another curve would have been seen
        assert not choice.scores.flags.writeable


def test_the_oracle_of_tau_sees_another_decoding() -> None:
    x, y = batch(60)
    model = ages()
    scores = model(x).scores.detach()
    found = model.choose_tau(scores, y, taus=[0.5]).scores[0]
    assert error_under(model, scores, y, "bmae", 0.5) == pytest.approx(found, rel=1e-6)
    assert error_under(model, scores, y, "bmae", 0.5, of_mean="expectation") != pytest.approx(found, rel=1e-3)


def test_a_tau_worked_out_by_hand() -> None:
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


def test_tau_of_one_sample_of_half_precision_and_of_whole_labels() -> None:
    x, y = batch(30)
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


def test_what_tau_cannot_be_chosen_from_is_refused() -> None:
    x, y = batch()
    model = ages()
    scores = model(x).scores.detach()
    broken = scores.clone()
    broken[2, 1] = math.nan
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: model.choose_tau(scores, y, by="rmse"), ValueError, "by must be one of 'bmae', 'mae', got 'rmse'"),
        (lambda: model.choose_tau([1.0], y), TypeError, r"scores must be a torch\.Tensor, got list"),
        (lambda: model.choose_tau(scores, [1.0]), TypeError, r"labels must be a torch\.Tensor, got list"),
        (
            lambda: model.choose_tau(scores > 0, y),
            TypeError,
            r"scores must be integers or floats, got dtype torch\.bool",
        ),
        (
            lambda: model.choose_tau(scores[:, :5], y),
            ShapeError,
            r"scores must be \(N, 20\) and labels \(N,\), got \(9, 5\) and \(9,\)",
        ),
        (lambda: model.choose_tau(scores, y[:, None]), ShapeError, r"scores must be .* got \(9, 20\) and \(9, 1\)"),
        (lambda: model.choose_tau(scores, y[:8]), ShapeError, r"scores must be .* got \(9, 20\) and \(8,\)"),
        (lambda: model.choose_tau(scores[:0], y[:0]), ValueError, "labels must hold at least one value"),
        (lambda: model.choose_tau(broken, y), ValueError, r"scores must be finite, got nan at index \[2, 1\]"),
        (lambda: model.choose_tau(scores, y + 20), LabelError, r"labels must lie on the label axis \[0, 20\]"),
        (lambda: model.choose_tau(scores, y * math.nan), LabelError, "labels must not be NaN"),
        (lambda: model.choose_tau(scores, y, taus=[]), ValueError, "taus must hold at least one value"),
        (lambda: model.choose_tau(scores, y, taus=[1, 0]), ValueError, "taus must be one row, rising and not negative"),
        (lambda: model.choose_tau(scores, y, taus=[-1, 0]), ValueError, "taus must be one row, rising and not neg"),
        (lambda: model.choose_tau(scores, y, taus=[math.inf]), ValueError, "taus must be finite, got inf"),
    ]
    for call, error, rule in cases:
        with pytest.raises(error, match=rf"^LongTailModel\.choose_tau: {rule}"):
            call()
    with pytest.raises(ValueError, match="kernel must have odd length"):
        model.choose_tau(scores, y, kernel=[1, 1])
    with pytest.raises(ValueError, match=r"^LongTailModel\.choose_tau: a prior needs density, got None"):
        ages(density=None).choose_tau(scores, y)
    for head in ("regression", "gaussian"):
        with pytest.raises(UsageError, match=rf"the head must score bins of a continuous axis, got '{head}'"):
            ages(head=head).choose_tau(scores, y)
    rule = r"got 'classes'\. For classes use dir_toolkit\.choose_tau\."
    with pytest.raises(ValueError, match=rule) as told:
        classes().choose_tau(torch.zeros(9, 4), class_batch()[1])
    assert not isinstance(told.value, UsageError)


# ---- features that were kept ----


@pytest.mark.parametrize(
    "make",
    [
        *(partial(ages, head=head) for head in HEADS),
        partial(ages, residual=True),
        partial(ages, prior="uniform"),
        *(partial(classes, head=head, prior="uniform") for head in ("linear", "cosine", "affinity")),
    ],
    ids=lambda make: f"{make.func.__name__}-{make.keywords}",
)
def test_features_are_read_as_forward_reads_them(make: Callable[[], LongTailModel]) -> None:
    model = make()
    out = model(batch()[0])
    same_output(model.read(out.features), out)
    own = out.features.detach()
    model.read(own).scores.sum().backward()  # what a head beside the backbone learns from
    assert model.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.backbone.parameters())


def test_features_are_read_without_calibration() -> None:
    x, y = batch(40)
    model = ages(fds=FDS(AGES, 6, momentum=0.0))
    model(x, y)
    model.fds.end_epoch()
    calibrated = model(x, y)
    assert not torch.equal(model.read(calibrated.features).scores, calibrated.scores)
    plain = model.eval()(x)
    same_output(model.read(plain.features), plain)


def test_features_of_another_shape_are_refused() -> None:
    for features, got in ((torch.zeros(2, 5), r"\(2, 5\)"), (torch.zeros(6), r"\(6,\)"), ([1.0], r"list\.$")):
        with pytest.raises(ShapeError, match=rf"^LongTailModel.*features \(N, 6\), one row a sample, got {got}"):
            ages().read(features)


# ---- regression and Gaussian heads ----


def test_regression_is_offset_plus_scale_times_head() -> None:
    model = LongTailModel(nn.Flatten(), 3, AGES, head="regression")
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
        model.head.bias.fill_(0.5)
    model.offset.fill_(30)
    model.scale.fill_(2)
    out = model(torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([19.0]))
    assert out.prediction.tolist() == [30 + 2 * (5 - 2 + 0.5)]
    assert out.loss.item() == pytest.approx((37 - 19) * math.sqrt(12) / 20)  # in standard deviations of even labels
    assert {"offset", "scale"} <= set(dict(model.named_buffers()))


def test_regression_is_its_parts_to_the_bit_and_starts_where_labels_are() -> None:
    x, y = batch()
    model = ages(head="regression")
    labels = np.repeat(AGES.centers, AGE_DENSITY.counts)
    spread = math.sqrt(labels.var() + 1 / 12)  # labels are taken to fill their bins
    assert model.scale.item() == pytest.approx(spread, rel=1e-6)
    assert abs(model.offset.item() - np.median(labels)) < 0.5

    parts = seeded(lambda: nn.Sequential(net(), nn.Linear(6, 1), nn.Flatten(0)))
    pred = model.offset + model.scale * parts(x)
    out = model(x, y)
    assert torch.equal(out.scores, pred)
    assert torch.equal(out.prediction, pred)
    assert torch.equal(out.loss, weighted_l1(pred, y) / spread)
    assert out.distribution.shape == (9, 0)
    evenly = seeded(lambda: LongTailModel(net(), 6, AGES, head="regression"))
    assert evenly.offset.item() == pytest.approx(10)
    assert evenly.scale.item() == pytest.approx(20 / math.sqrt(12))


@pytest.mark.parametrize(
    "loss", ["weighted_mse", "weighted_huber", "weighted_focal_l1", "weighted_focal_mse", "balanced_mse"]
)
def test_regression_losses_by_name(loss: str) -> None:
    x, y = batch()
    model = ages(head="regression", loss=loss)
    out = model(x, y)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


def test_gaussian_head_is_in_label_units() -> None:
    x, y = batch()
    model = ages(head="gaussian")
    out = model(x, y)
    raw = model.head(out.features)
    mean = model.offset + model.scale * raw[:, 0]
    assert torch.equal(out.prediction, mean)
    least = 1e-6 * model.scale.item() ** 2
    torch.testing.assert_close(out.loss, gaussian_nll(out.scores, y, min_variance=least))
    torch.testing.assert_close(out.scores[:, 1].exp(), model.scale**2 * raw[:, 1].exp())
    lower, upper = model.interval(out, 0.6827)  # one standard deviation
    torch.testing.assert_close((upper - lower) / 2, model.scale * (raw[:, 1] / 2).exp(), rtol=1e-3, atol=0)
    assert torch.equal(model.interval(out.scores, 0.6827)[0], lower)


def test_intervals_hold_their_share() -> None:
    model = ages(prior="uniform")
    out = model(batch()[0])
    lower, upper = model.interval(out, level=0.5)
    again = model.interval(out.distribution, level=0.5)
    assert torch.equal(lower, again[0])
    assert torch.equal(upper, again[1])
    wide = model.interval(out)
    assert (wide[0] < lower).all()
    assert (upper < wide[1]).all()
    assert ((lower <= out.prediction) & (out.prediction <= upper)).all()


# ---- residuals ----


def test_residual_is_an_offset_in_the_decoded_bin() -> None:
    bins = Bins.uniform(0, 20, width=10)
    x, y = batch()
    make = lambda: LongTailModel(net(), 6, bins, sigma=None, residual=True, residual_weight=0.3)  # noqa: E731
    model = seeded(make)
    out = model(x, y)
    assert out.residual.shape == (9, 2)
    assert torch.equal(out.residual, 5 * model.residual(out.features).tanh())
    values = []
    for i in range(9):
        b = int(out.distribution[i, 0] < 0.5)  # of the median
        assert out.prediction[i].item() == pytest.approx(bins.centers[b] + out.residual[i, b].item(), rel=1e-6)
        own = int(y[i] >= 10)
        off = abs(out.residual[i, own].item() - (y[i].item() - bins.centers[own]))
        values.append(-out.scores[i].log_softmax(0)[own].item() + 0.3 * off / 10)  # in widths of the bin
    assert out.loss.item() == pytest.approx(np.mean(values), rel=1e-5)


def test_residual_of_the_mode_is_of_its_bin_wherever_its_center_lies() -> None:
    bins = Bins(np.array([0.0, 10, 11, 21]), centers=np.array([7.4, 10.0, 20.9]))
    assert bins.centers[1] < limits(bins, torch.zeros(()))[1]  # so that a search would miss the bin
    model = seeded(lambda: LongTailModel(net(), 6, bins, sigma=None, residual=True, decode="mode"))
    model.head.bias.data[1] += 0.5
    out = model(batch()[0])
    b = out.distribution.argmax(1)
    assert (b == 1).any()
    expected = torch.tensor(bins.centers).float()[b] + out.residual.gather(1, b[:, None]).squeeze(1)
    assert torch.equal(out.prediction, expected)


def test_residual_of_whole_numbers_reaches_every_label_of_its_bin() -> None:
    model = LongTailModel(net(), 6, Bins.uniform(0, 20, width=10, integer=True), sigma=None, residual=True)
    assert model.reach.tolist() == [5.5, 5.5]  # from 4.5 up to 10, which the bin does not hold any more


def test_residual_pays_where_bins_are_coarse() -> None:
    bins = Bins.uniform(0, 100, width=10)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 1, generator=generator)
    y = 100 * x.squeeze(1)

    def error(residual: bool) -> float:
        def make() -> LongTailModel:
            backbone = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            return LongTailModel(backbone, 32, bins, sigma=None, residual=residual, decode="mode")

        model = seeded(make)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(300):
            optimizer.zero_grad()
            model(x, y).loss.backward()
            optimizer.step()
        return weighted_l1(model(x).prediction, y).item()

    coarse = error(False)
    assert coarse > 2  # the mean distance to the centre of a bin of ten is 2.5
    assert error(True) < coarse / 2


# ---- the criterion ----

VARIANTS: list[dict[str, Any]] = [
    *({"head": head} for head in HEADS),
    {"residual": True, "expectation_weight": 0.1},
    {"prior": "uniform", "adjust": "in_loss", "loss": "crps"},
    {"loss": "squared_emd", "label_kernel": "laplace", "sigma": 1.0},
    {"head": "regression", "loss": "balanced_mse"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_criterion_on_a_plain_output_is_the_loss(options: dict[str, Any]) -> None:
    x, y = batch()
    model = ages(**options)
    weight = torch.linspace(0, 2, len(y))
    out = model(x)
    assert out.loss.isnan()
    same_output(model(x, y, weight), out._replace(loss=model.criterion(out, y, weight)))
    each = model.criterion(out, y, weight, reduction="none")
    torch.testing.assert_close(each.mean(), model.criterion(out, y, weight))
    torch.testing.assert_close(each.sum(), model.criterion(out, y, weight, reduction="sum"))
    assert each[0] == 0
    # A weight of two is the sample seen twice, in whatever order.
    twice = LongTailOutput(out.loss, *(torch.cat([part[[4]], part]) for part in out[1:]))
    torch.testing.assert_close(
        model.criterion(twice, torch.cat([y[[4]], y]), reduction="sum"),
        model.criterion(out, y, 1 + (torch.arange(len(y)) == 4).float(), reduction="sum"),
    )
    one = model(x[:1], y[:1])
    assert one.loss.shape == ()
    assert one.prediction.shape == (1,)


@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("loss") != "balanced_mse"], ids=str)
def test_gradients(options: dict[str, Any]) -> None:
    x, y = batch(4)
    model = ages(**options).double()
    # Features and not inputs, since a median steps where its bin changes; the loss does not.
    assert torch.autograd.gradcheck(lambda x: model(x, y.double()).loss, (x.double().requires_grad_(),))


def test_whole_numbers_are_labels_too() -> None:
    x, y = batch()
    for options in VARIANTS:
        model = ages(**options)
        torch.testing.assert_close(model(x, y.long()).loss, model(x, y.floor()).loss)


def test_weights_are_applied_where_none_are_given() -> None:
    x, y = batch()
    weights = LDS(AGES).fit(AGE_DENSITY)
    model, plain = ages(weights=weights), ages()
    assert torch.equal(model(x, y).loss, plain(x, y, weights(y)).loss)
    assert torch.equal(model(x, y, torch.ones(9)).loss, plain(x, y).loss)
    assert torch.equal(model.criterion(model(x), y), model(x, y).loss)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_reads_no_value(options: dict[str, Any]) -> None:
    x, y = batch()
    model = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY)).to("meta")
    model(x.to("meta"), y.to("meta")).loss.backward()  # reading a value of a meta tensor raises


def test_what_is_not_finite_shows_in_the_loss_and_raises_nowhere() -> None:
    x, y = batch()
    x[3] = math.nan
    for options in VARIANTS:
        out = ages(**options)(x, y)
        assert out.loss.isnan()
        assert out.prediction[3].isnan()
        assert out.prediction[:3].isfinite().all()


def test_an_offset_in_a_bin_does_not_hide_scores_that_are_not_finite() -> None:
    model = ages(residual=True)
    model.head.weight.data[0] = math.nan
    out = model(batch()[0])
    assert out.residual.isfinite().all()
    assert out.prediction.isnan().all()


# ---- labels beyond the axis ----

OVER_CLASSES_TOO: list[tuple[Callable[..., LongTailModel], dict[str, Any]]] = [
    *((ages, options) for options in VARIANTS),
    (ages, {"sigma": None, "decode": "mode"}),
    (ages, {"head": "regression", "loss": weighted_huber}),
    (classes, {}),
    (classes, {"head": "affinity"}),
    (classes, {"prior": "uniform", "adjust": "in_loss"}),
    (classes, {"loss": focal_loss}),
]
each_kind = pytest.mark.parametrize(("make", "options"), OVER_CLASSES_TOO, ids=str)


def labels_of(make: Callable[..., LongTailModel]) -> tuple[Tensor, Tensor, int]:
    """A batch, and what lies beyond its labels' axis."""
    return (*batch(), 23) if make is ages else (*class_batch(), 5)


@each_kind
def test_a_label_beyond_the_axis_raises_for_every_head(make: Any, options: dict[str, Any]) -> None:
    x, y, beyond = labels_of(make)
    for at in (beyond, -2):
        y[4] = at
        with pytest.raises(LabelError, match=r"labels must lie on the label axis .* at index \[4\]"):
            make(**options)(x, y)


@each_kind
def test_where_labels_are_not_looked_at_one_beyond_makes_the_loss_nan(
    make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, beyond = labels_of(make)
    model = make(**options)
    sound = model(x, y).loss
    for module in ("longtail", "_checks", "labels.bins", "labels.soft_labels", "losses.distribution", "losses._inputs"):
        name = f"dir_toolkit.{module}"
        for look in ("readable", "has_values"):
            if hasattr(sys.modules[name], look):
                monkeypatch.setattr(sys.modules[name], look, lambda tensor: False)
    torch.testing.assert_close(model(x, y).loss, sound)
    y[4] = beyond
    assert model(x, y).loss.isnan()
    each = model.criterion(model(x), y, reduction="none")
    assert each.isnan().tolist() == [i == 4 for i in range(9)]
    for outside in ("clip", "drop"):
        other = make(**options, outside=outside)
        assert other(x, y).loss.isfinite()
        if make is ages:
            assert other(x, torch.where(torch.arange(9) == 4, math.nan, y)).loss.isnan()


@each_kind
def test_a_dropped_label_counts_nowhere(make: Any, options: dict[str, Any]) -> None:
    x, y, beyond = labels_of(make)
    model = make(**options, outside="drop")
    torch.testing.assert_close(model(x, y).loss, make(**options)(x, y).loss)
    moved = y.clone()
    moved[4] = beyond
    weight = torch.linspace(0.5, 2, 9)
    without = weight * (torch.arange(9) != 4)
    expected = make(**options).criterion(model(x), y, without)
    torch.testing.assert_close(model.criterion(model(x), moved, weight), expected)
    own = make(**options, outside="drop", weights=LDS(model.bins).fit(model.density))
    torch.testing.assert_close(own(x, moved).loss, own.criterion(own(x), y, own.weights(y) * (torch.arange(9) != 4)))
    if make is ages:
        with pytest.raises(LabelError, match="labels must not be NaN"):
            model(x, y * math.nan)


@each_kind
def test_a_clipped_label_is_in_the_end_bin_and_its_error_is_exact(make: Any, options: dict[str, Any]) -> None:
    x, y, beyond = labels_of(make)
    model = make(**options, outside="clip")
    torch.testing.assert_close(model(x, y).loss, make(**options)(x, y).loss)
    out = model(x)
    moved, end = y.clone(), y.clone()
    moved[4], end[4] = beyond, 3 if make is classes else 20
    each, at_end = (model.criterion(out, labels, reduction="none")[4].item() for labels in (moved, end))
    if options.get("head") == "regression" and not callable(options.get("loss")) and "loss" not in options:
        assert each == pytest.approx(abs(out.scores[4].item() - beyond) / SPREAD, rel=1e-5)
    elif options.get("head") == "gaussian":
        assert each == pytest.approx(gaussian_nll(out.scores[4], moved[4], min_variance=1e-6 * SPREAD**2).item())
    elif options.get("expectation_weight"):
        expected = decode(out.scores.softmax(1), AGES)[4].item()
        more = 0.1 / SPREAD * (abs(expected - beyond) - abs(expected - 20)) + model.residual_weight * (beyond - 20)
        assert each - at_end == pytest.approx(more, rel=1e-4)
    elif options.get("head") != "regression":
        assert each == pytest.approx(at_end)
    with_fds = make(**options, outside="clip", fds=FDS(model.bins, 6, kernel=triangular(3)))
    with_fds(x, moved)
    with_fds.fds.end_epoch()
    assert with_fds.fds.running_count.sum() == 9


def test_tau_is_chosen_with_labels_beyond_the_axis() -> None:
    x, y = batch(60)
    model = ages().eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
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
    error = (decode(model.adjuster(scores).softmax(1), AGES, "median") - moved).abs().mean()
    assert clipped.scores[0] == pytest.approx(error.item(), rel=1e-5)
    with pytest.raises(LabelError, match=r"^LongTailModel\.choose_tau: labels must lie"):
        model.choose_tau(scores, moved)
    with pytest.raises(ValueError, match="at least one label must lie on the axis"):
        model.choose_tau(scores, y + 100, outside="drop")


def test_predictions_of_one_number_are_held_to_the_axis_on_request() -> None:
    x, y = batch()
    for head in ("regression", "gaussian"):
        model, held = (ages(head=head, within_axis=within) for within in (False, True))
        for one in (model, held):
            with torch.no_grad():
                one.head.bias[0] += torch.tensor(20.0)
        far = model(x, y)
        assert (far.prediction > 20).all()
        out = held(x, y)
        assert torch.equal(out.prediction, torch.full((9,), 20.0))
        assert torch.equal(out.loss, far.loss)  # which still points back
        assert torch.equal(out.scores, far.scores)
    assert held.interval(out)[1].max() <= 20
    for make in (ages, classes):
        with pytest.raises(ValueError, match="within_axis must be left out for heads that score bins, whose pred"):
            make(within_axis=True)


def test_an_fds_must_drop_what_the_model_drops() -> None:
    with pytest.raises(ValueError, match="fds must have outside=\"drop\", as the model has, got 'raise'"):
        ages(outside="drop", fds=FDS(AGES, 6))
    x, y = batch(40)
    y[:5] = 99
    model = ages(outside="drop", fds=FDS(AGES, 6, outside="drop"))
    model(x, y).loss.backward()
    model.fds.end_epoch()
    assert model.fds.running_count.sum() == 35


def test_labels_on_another_device_are_named() -> None:
    for make in (ages, classes):
        model = make()
        x, _ = batch()
        with pytest.raises(ValueError, match=r"scores and labels must be on the same device, got cpu and meta\."):
            model(x, torch.zeros(9, device="meta"))


# ---- free of the label's unit ----


def in_unit(unit: float, options: dict[str, Any]) -> tuple[LongTailModel, Bins]:
    bins = Bins.uniform(0, 20 * unit, count=20)
    density = LabelDensity(bins, AGE_DENSITY.counts)
    weights = LDS(bins).fit(density)
    return seeded(lambda: LongTailModel(net(), 6, bins, density=density, weights=weights, **options)), bins


UNIT_FREE: list[dict[str, Any]] = [
    *({name: value for name, value in options.items() if name != "sigma"} for options in VARIANTS),
    *({"head": "regression", "loss": f"weighted_{loss}"} for loss in ("mse", "huber", "focal_l1", "focal_mse")),
    {"prior": "uniform", "tau": 0.7, "decode": "expectation"},
]


@pytest.mark.parametrize("options", UNIT_FREE, ids=str)
@pytest.mark.parametrize("unit", [2.0**-17, 1e-5, 1e5])
def test_labels_in_another_unit_make_the_same_model(options: dict[str, Any], unit: float) -> None:
    x, y = batch(64)

    def trained(unit: float) -> tuple[LongTailModel, LongTailOutput]:
        model, _ = in_unit(unit, options)
        model = model.double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            model(x.double(), unit * y.double()).loss.backward()
            optimizer.step()
        return model, model.eval()(x.double())

    (model, out), (other, scaled) = trained(1.0), trained(unit)
    torch.testing.assert_close(scaled.prediction / unit, out.prediction, rtol=1e-4, atol=1e-4)
    if options.get("head") != "regression":
        for one, same in zip(other.interval(scaled), model.interval(out), strict=True):
            torch.testing.assert_close(one / unit, same, rtol=1e-4, atol=1e-4)
    for name, parameter in other.named_parameters():
        if "log_sigma" not in name:
            torch.testing.assert_close(parameter, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-5)


def test_the_least_variance_is_of_the_labels_own() -> None:
    for unit in (1.0, 1e-3, 1e-5, 1e5):
        model, _ = in_unit(unit, {"head": "gaussian"})
        certain = torch.tensor([[5 * unit, -200.0]])
        output = LongTailOutput(torch.zeros(()), certain, certain[:, 0], certain, certain, certain)
        lower, upper = model.interval(output, 0.6827)
        assert ((upper - lower) / 2).item() == pytest.approx(1e-3 * SPREAD * unit, rel=1e-3)


@pytest.mark.parametrize("head", ["linear", "regression", "gaussian"])
def test_an_axis_far_from_zero_is_told_apart_as_finely_as_one_at_zero(head: Any) -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    offset = 1.7e9
    near, far = (
        seeded(lambda low=low: LongTailModel(net(), 6, Bins.uniform(low, low + 3600, width=60), head=head))
        for low in (0, offset)
    )
    with torch.no_grad():
        a, b = near.eval()(x), far.eval()(x)
    assert b.prediction.dtype == torch.float64
    torch.testing.assert_close(b.prediction - offset, a.prediction.double(), rtol=0, atol=0.1)
    assert len(b.prediction.unique()) > 190
    y = offset + 3600 * torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(far(x, y).loss.float(), near(x, (y - offset).float()).loss, rtol=1e-4, atol=1e-4)
    rounded = far.bfloat16()
    assert rounded(x.bfloat16()).prediction.dtype == torch.float64
    assert (rounded(x.bfloat16()).prediction - offset).abs().max() < 3600 * 3
    far.float().half().float()
    if head != "linear":
        assert far.offset.item() == offset + 1800


# ---- how far labels are spread ----


def test_two_bins_are_two_bins_wherever_they_lie() -> None:
    bins = Bins.from_edges(np.geomspace(1, 1e6, 61))
    model = LongTailModel(nn.Identity(), 60, bins, loss="cross_entropy")
    y = torch.tensor([2.0, 20.0, 200.0, 3e5])
    target = soft_labels(y, bins, 2.0, unit="bin")
    scores = target.log()
    out = LongTailOutput(torch.zeros(()), scores, y, scores, target, torch.zeros(4, 0))
    entropy = -(target * target.clamp_min(1e-30).log()).sum(1)
    torch.testing.assert_close(model.criterion(out, y, reduction="none"), entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(target, bins, "median"), y, rtol=0.05, atol=0)


def test_labels_whose_density_was_warned_of_are_not_told_again() -> None:
    bins, labels = Bins.uniform(0, 1000, count=50), [1.0] * 90 + [25.0, 900.0]
    with pytest.warns(DirToolkitWarning, match=r"^LabelDensity\.count: 98% of the labels lie in one of 50 bins"):
        density = LabelDensity.count(labels, bins)
    LongTailModel(net(), 6, bins, density=density)
    with pytest.warns(DirToolkitWarning, match=r"sigma=30 spreads each label wider than the middle half"):
        LongTailModel(net(), 6, bins, density=density, sigma=30)  # of one's own choice
    with pytest.warns(DirToolkitWarning, match=r"sigma=40 spreads each label wider than the middle half"):
        LongTailModel(net(), 6, bins, density=LabelDensity(bins, density.counts))


def test_labels_narrower_than_they_are_spread_are_told() -> None:
    bins = Bins.uniform(0, 1000, count=50)
    density = LabelDensity(bins, np.array([900, 60] + [1] * 48))
    with pytest.warns(DirToolkitWarning, match=r"sigma=40 spreads each label wider than the middle half of all lab"):
        LongTailModel(net(), 6, bins, density=density)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LongTailModel(net(), 6, bins, density=density, sigma=1.0)
        LongTailModel(net(), 6, bins, density=density, head="regression")
        LongTailModel(net(), 6, bins, density=density, loss="crps")


def test_a_tau_at_the_end_of_its_range_is_told() -> None:
    scores = -torch.arange(20.0).repeat(12, 1) / 2  # all for the commonest bins, while all labels are of the rarest
    with pytest.warns(DirToolkitWarning, match=r"^LongTailModel\.choose_tau: the best tau is the largest of those"):
        assert ages(decode="expectation").choose_tau(2 * scores, torch.full((12,), 19.5)).tau == 3.0
    with pytest.warns(DirToolkitWarning, match=r"^choose_tau: the best tau is the largest of those tried, 3\."):
        found = choose_tau(
            torch.tensor([[9.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 0]), [0.7, 0.3], by="log_loss", temperature=1.0
        )
    assert found.tau == 3.0


# ---- calibrated features ----


def test_labels_reach_fds_in_training_only() -> None:
    x, y = batch(40)
    fds = FDS(AGES, 6, momentum=0.0)
    model = ages(fds=fds)
    assert model.fds is fds
    assert not any(module is fds for module in model.modules())
    before = model(x, y)
    fds.end_epoch()
    alone = FDS(AGES, 6, momentum=0.0)
    alone.update(before.features.detach(), y)
    alone.end_epoch()
    for name, value in fds.statistics().items():
        torch.testing.assert_close(value, alone.statistics()[name], equal_nan=True)
    after = model(x, y)
    assert torch.equal(after.features, before.features)
    assert torch.equal(after.scores, model.head(alone.calibrate(before.features, y)))
    assert not torch.equal(after.scores, before.scores)
    with fds.labels(y):  # as the training loop does
        assert torch.equal(model(x).scores, after.scores)
    model.eval()
    assert torch.equal(model(x, y).scores, before.scores)


def test_residuals_read_calibrated_features_too() -> None:
    x, y = batch(40)
    model = ages(fds=FDS(AGES, 6, momentum=0.0), residual=True)
    before = model(x, y).residual
    model.fds.end_epoch()
    assert not torch.equal(model(x, y).residual, before)


def trained_with_fds(
    x: Tensor, y: Tensor, model: LongTailModel, call: Callable[..., LongTailOutput]
) -> dict[str, Tensor]:
    for _ in range(2):
        call(x, y).loss.backward()
        model.fds.end_epoch()
    return {**model.fds.statistics(), "prediction": model.eval()(x).prediction.detach()}


def rank_main(rank: int) -> dict[str, Any]:
    x, y = batch(40)
    mine = slice(0, 13) if rank == 0 else slice(13, None)
    model = ages(fds=FDS(AGES, 6))
    wrapped = nn.parallel.DistributedDataParallel(model)
    return trained_with_fds(x[mine], y[mine], model, wrapped)


def test_two_ranks_with_uneven_shares_gather_what_one_does(two_ranks: Callable[..., list[Any]]) -> None:
    x, y = batch(40)
    model = ages(fds=FDS(AGES, 6))
    expected = trained_with_fds(x, y, model, model)
    states = two_ranks(rank_main)
    for state in states:
        for name in model.fds.statistics():
            torch.testing.assert_close(state[name], expected[name], rtol=1e-6, atol=1e-7, equal_nan=True)
    prediction = torch.cat([state["prediction"] for state in states])
    torch.testing.assert_close(prediction, expected["prediction"])


# ---- state ----


@pytest.mark.parametrize("options", [*VARIANTS, {"prior": "uniform", "tau": 0.3, "temperature": 2.0}], ids=str)
def test_state_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    x, y = batch(40)
    model = ages(**options, fds=FDS(AGES, 6), weights=LDS(AGES).fit(AGE_DENSITY))
    model(x, y)
    model.fds.end_epoch()
    expected = model(x, y)
    path = tmp_path / "state.pt"
    torch.save(model.state_dict(), path)
    # Another prior, or none, is what a fresh model may have been built with: the state brings its own.
    fresh_options = {k: v for k, v in options.items() if k not in ("prior", "adjust", "tau", "temperature")}
    fresh = seeded(
        lambda: LongTailModel(
            net(), 6, AGES, density=AGE_DENSITY, **fresh_options, fds=FDS(AGES, 6), weights=LDS(AGES).fit(y)
        ),
        7,
    )
    fresh.load_state_dict(torch.load(path, weights_only=True))
    same_output(fresh(x, y), expected)
    assert list(fresh.state_dict()) == list(model.state_dict())
    save_checkpoint(path, {"model": model.state_dict()})
    fresh.load_state_dict(load_checkpoint(path)["model"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same_output(copied(x, y), expected)
        assert copied.fds is not model.fds
        copied.fds.end_epoch()  # the copy's own statistics, fed by the copy
        assert copied.fds.epoch == 2
    assert model.fds.epoch == 1
    without = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY))
    without.load_state_dict(model.state_dict())  # needs no statistics
    same_output(without.eval()(x, y), model.eval()(x, y))


def test_a_state_of_another_axis_or_without_statistics_is_refused() -> None:
    other = LongTailModel(net(), 6, Bins.uniform(0, 40, width=2))
    with pytest.raises(
        CheckpointError, match=r"^LongTailModel\.load_state_dict: the saved model must be over the same"
    ):
        ages().load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="the saved model must hold FDS statistics, got none"):
        ages(fds=FDS(AGES, 6)).load_state_dict(ages().state_dict())


def test_a_state_holds_tensors_alone_and_averages_like_one() -> None:
    x, y = batch(40)
    for options in ({}, {"head": "gaussian"}, {"prior": "uniform"}):
        model = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY), fds=FDS(AGES, 6))
        before = model.state_dict()
        assert all(isinstance(value, Tensor) for value in before.values())
        model(x, y).loss.backward()
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


def test_a_refused_state_changes_nothing() -> None:
    weighted = ages(weights=LDS(AGES).fit(AGE_DENSITY))
    held = {name: value.clone() for name, value in weighted.state_dict().items()}
    inverse = seeded(lambda: LongTailModel(net(), 6, AGES, weights=LDS(AGES, scheme="inverse").fit(AGE_DENSITY)), 3)
    with pytest.raises(CheckpointError, match="the saved weights must be of the same settings"):
        weighted.load_state_dict(inverse.state_dict())
    after = weighted.state_dict()
    assert all(torch.equal(value.nan_to_num(-1), held[name].nan_to_num(-1)) for name, value in after.items())

    model = ages(head="gaussian")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = seeded(lambda: LongTailModel(net(), 6, Bins.uniform(0, 40, width=2), head="gaussian"), 3)
    cut = {**other.state_dict(), "_extra_state": model.get_extra_state()[:50]}
    for state in (other.state_dict(), cut, {**model.state_dict(), "_extra_state": {"bins": {}, "fds": None}}):
        with pytest.raises(CheckpointError, match=r"^LongTailModel\.load_state_dict: the saved"):
            model.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("change", [{"head.weight": None}, {"other": torch.ones(1)}, {"head.bias": torch.ones(2)}])
def test_a_state_that_is_refused_late_changes_nothing_either(change: dict[str, Any], assign: bool) -> None:
    x, y = batch(40)

    def trained(seed: int) -> LongTailModel:
        model = seeded(lambda: LongTailModel(net(), 6, AGES, density=AGE_DENSITY, fds=FDS(AGES, 6)), seed)
        model(x, y)
        model.fds.end_epoch()
        return model

    model, other = trained(0), trained(3)
    state = {k: v for k, v in {**other.state_dict(), **change}.items() if v is not None}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x, y)
    with pytest.raises(RuntimeError):
        model.load_state_dict(state, assign=assign)
    same_output(model(x, y), expected)
    model.fds.drop_epoch()
    assert {k: v.tolist() for k, v in model.state_dict().items() if k != "_extra_state"} == {
        k: v.tolist() for k, v in before.items() if k != "_extra_state"
    }
    model.load_state_dict(other.state_dict(), assign=assign)
    same_output(model(x, y), other(x, y))


@pytest.mark.parametrize("options", [*VARIANTS, {"decode": "expectation"}, {"prior": "uniform"}], ids=str)
def test_made_and_called_in_inference_mode_first_a_model_trains_later(options: dict[str, Any]) -> None:
    x, y = batch()
    with torch.inference_mode():
        model = ages(**options).eval()
        model(x, y)
        model.read(torch.randn(3, 6))
    model.backbone = net()
    model.train()(x, y).loss.backward()
    assert model.head.weight.grad is not None
    with torch.inference_mode():
        model.eval()(x, y)
        if model.decoding != "mode" and options.get("head") not in ("regression", "gaussian"):
            model.set_prior("uniform", 0.5)
    model.train()(x, y).loss.backward()


@pytest.mark.parametrize("options", [*VARIANTS, {"prior": "uniform"}], ids=str)
def test_made_without_storage_a_model_is_filled_by_a_state(options: dict[str, Any]) -> None:
    x, y = batch()
    expected = ages(**options)
    with torch.device("meta"):
        empty = ages(**options)
    assert {value.device.type for value in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    assert repr(empty).startswith("LongTailModel(")
    assert empty.state_dict().keys() == expected.state_dict().keys()  # as transformers asks for before it loads
    assert copy.deepcopy(empty).state_dict().keys() == expected.state_dict().keys()
    empty.to_empty(device="cpu").load_state_dict(expected.state_dict())
    same_output(empty(x, y), expected(x, y))
    assigned = ages(**options).to("meta")
    assigned.load_state_dict(expected.state_dict(), assign=True)
    same_output(assigned(x, y), expected(x, y))


@pytest.mark.parametrize(
    "options",
    [{"prior": "uniform"}, {"prior": "uniform", "adjust": "in_loss"}, {"head": "regression", "loss": "balanced_mse"}],
)
def test_made_without_storage_a_model_with_weights_is_filled_by_a_state(options: dict[str, Any]) -> None:
    x, y = batch(40)

    def made() -> LongTailModel:
        return LongTailModel(net(), 6, AGES, density=AGE_DENSITY, weights=LDS(AGES).fit(AGE_DENSITY), **options)

    expected = made()
    with torch.device("meta"):
        empty = made()
    empty.load_state_dict(expected.state_dict(), assign=True)
    same_output(empty(x, y), expected(x, y))
    if "prior" in options:
        for model in (empty, expected):
            model.set_prior("uniform", 0.5)
        same_output(empty(x, y), expected(x, y))
    weights = LDS(AGES).fit(AGE_DENSITY).to("meta")
    with pytest.raises(NotFittedError):
        LongTailModel(net(), 6, AGES, density=AGE_DENSITY, weights=weights, **options)


@pytest.mark.parametrize("covariance", ["diagonal", "full", "low_rank"])
def test_made_without_storage_a_model_with_statistics_is_filled_by_a_state(covariance: Any) -> None:
    x, y = batch(40)

    def made() -> LongTailModel:
        return ages(fds=FDS(AGES, 6, covariance=covariance, rank=2))

    expected = made()
    expected(x, y)
    expected.fds.end_epoch()
    with torch.device("meta"):
        empty = made()
    assert empty.state_dict().keys() == expected.state_dict().keys()
    with pytest.raises(CheckpointError, match="the saved model must hold FDS statistics, got none"):
        expected.load_state_dict(empty.to_empty(device="meta").state_dict())
    for load in (copy.deepcopy(empty), copy.deepcopy(empty).to_empty(device="cpu")):
        load.load_state_dict(expected.state_dict(), assign=True)
        same_output(load(x, y), expected(x, y))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of operations it does not batch
@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("loss") != "balanced_mse"], ids=str)
def test_gradients_of_each_sample_are_those_of_a_loop(options: dict[str, Any]) -> None:
    x, y = batch(4)
    model = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, parameters, (x[None], y[None]))
        return out.loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(4):
        model.zero_grad()
        model(x[[i]], y[[i]]).loss.backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(found[name][i], value.grad)


def test_fds_follows_the_model_to_its_device() -> None:
    model = ages(fds=FDS(AGES, 6)).to("meta")
    assert model.fds.covariance.scale.device.type == "meta"
    assert model.double().fds.covariance.scale.dtype == torch.float64


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_scores_are_float32_under_autocast(options: dict[str, Any]) -> None:
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ages(**options)(x, y)
    for name in ("loss", "scores", "prediction", "distribution", "residual"):
        assert getattr(out, name).dtype == torch.float32, name


@pytest.mark.parametrize("options", VARIANTS[:6], ids=str)
def test_export_and_compile(options: dict[str, Any]) -> None:
    x, y = batch()
    model = ages(**options, fds=FDS(AGES, 6)).eval()
    torch.compiler.reset()  # else all models together compile one forward too often
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.4 warns of its own nodes
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=sizes), file)
        file.seek(0)
        exported = torch.export.load(file).module()
    for samples in (2, 9):
        for own, other in zip(model(x[:samples]), exported(x[:samples]), strict=True):
            torch.testing.assert_close(own, other, equal_nan=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).prediction, model(x).prediction)
    plain = ages(**options)
    step = torch.compile(plain, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(x, y).loss, plain(x, y).loss)


def class_images(samples: int, seed: int) -> ImageSet:
    random = np.random.default_rng(seed)
    labels = np.minimum(random.geometric(0.5, samples) - 1, 3)
    images = (random.integers(0, 60, (samples, 1, 4, 4)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    rows = np.arange(samples)
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


def test_the_training_loop_takes_its_criterion_and_fds(tmp_path: Path) -> None:
    train, val = class_images(64, 0), class_images(32, 1)
    density = LabelDensity.count(train.labels, CLASSES)
    fds = FDS(CLASSES, 16, kernel=triangular(3))

    def make() -> LongTailModel:
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU())
        return LongTailModel(backbone, 16, CLASSES, density=density, fds=fds, prior="uniform", adjust="in_loss")

    model = seeded(make)
    history = fit(
        model, train, val, metrics=ClassificationMetrics(density), loss=model.criterion, fds=fds,
        optimization=Optimization(epochs=3, batch_size=16, lr=0.02), runtime=Runtime(torch.device("cpu"), seed=3),
        folder=tmp_path / "run", augmentation=False,
    )  # fmt: skip
    assert history[-1]["loss"] < history[0]["loss"]
    assert fds.epoch > 0


# ---- what is told, and what is refused ----


def test_bins_without_labels_are_told_once() -> None:
    density = LabelDensity(CLASSES, np.array([3, 2, 1, 0]))
    with pytest.warns(DirToolkitWarning, match="no label in or near 1 of 4 bins; the prior takes each to have one"):
        model = LongTailModel(net(), 6, CLASSES, density=density, prior="uniform")
    model.set_prior("uniform", 0.5)  # pytest would raise a second warning
    assert torch.isfinite(model.adjuster.offset).all()


def test_soft_labels_as_wide_as_the_axis_are_told() -> None:
    with pytest.warns(DirToolkitWarning, match="sigma=2 spreads each label over most of an axis 1 long"):
        LongTailModel(net(), 6, Bins.uniform(0, 1, count=10), sigma=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LongTailModel(net(), 6, Bins.uniform(0, 1, count=10)).sigma == pytest.approx(0.2)  # two bins
        LongTailModel(net(), 6, Bins.uniform(0, 1, count=10), loss="crps")


FLOAT_DENSITY = AGE_DENSITY.smooth(gaussian(5, 2))
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bins": [1, 2]}, TypeError, "bins must be one label axis, a Bins, got list. One label a sample: use"),
    ({"density": [1, 2]}, TypeError, "density must be a LabelDensity, got list"),
    ({"density": CLASS_DENSITY}, ValueError, "density must be over the same bins, got"),
    ({"backbone": len}, TypeError, "backbone must be a Module, got builtin"),
    ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
    ({"backbone": LinearHead(3, 6), "num_features": 5}, ShapeError, "num_features must be the backbone's 3, got 5"),
    ({"head": "softmax"}, ValueError, "head must be one of 'regression', 'gaussian', 'linear', 'cosine', 'affinity'"),
    ({"head": nn.Linear(5, 20)}, ShapeError, "head must take the backbone's 6 features, got 5"),
    ({"head": nn.Linear(6, 19)}, ShapeError, r"head must give one score a bin, \(N, 20\), got 19"),
    ({"head": AffinityHead(6, 21)}, ShapeError, r"head must give one score a bin, \(N, 20\), got 21"),
    ({"loss": "l1"}, ValueError, "loss must be one of 'cross_entropy', 'crps', 'squared_emd', got 'l1'"),
    ({"head": "regression", "loss": "crps"}, ValueError, "loss must be one of 'weighted_l1', .*'balanced_mse', got"),
    ({"head": "gaussian", "loss": "crps"}, ValueError, "loss must be one of 'gaussian_nll', got 'crps'"),
    ({"loss": 3}, TypeError, "loss must be a name or a function, got int"),
    ({"head": "regression", "loss": "balanced_mse", "density": None}, ValueError, 'loss="balanced_mse" needs density'),
    ({"prior": "uniform", "density": None}, ValueError, "a prior needs density, got None. Pass density=LabelDensity"),
    ({"prior": "uniform", "density": FLOAT_DENSITY}, ValueError, "density must be as counted, to be smoothed, got"),
    ({"prior": "balanced"}, ValueError, "prior must be one of 'uniform', got 'balanced'"),
    ({"prior": [0.5, 0.5]}, ShapeError, r"prior must be \(20,\), one share a bin, got shape \(2,\)"),
    ({"prior": [1.0] * 20}, ValueError, "prior must sum to one, got a sum of 20"),
    ({"tau": -1}, ValueError, r"tau must be >= 0 and <= 1e\+30, got -1"),
    ({"tau": 1e38, "prior": "uniform"}, ValueError, r"tau must be >= 0 and <= 1e\+30, got 1e\+38"),
    ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    ({"adjust": "before"}, ValueError, "adjust must be one of 'after', 'in_loss', got 'before'"),
    ({"adjust": "in_loss"}, ValueError, 'adjust="in_loss" needs a prior, got None'),
    ({"adjust": "in_loss", "prior": [0.5, 0.5] + [0.0] * 18}, ValueError, "prior must be positive with adjust="),
    (
        {"adjust": "in_loss", "prior": "uniform", "loss": cross_entropy},
        ValueError,
        'adjust must be "after" with a loss',
    ),
    ({"prior_kernel": "none"}, ValueError, "prior_kernel must be one of 'auto', got 'none'"),
    ({"prior_kernel": [1, 1], "prior": "uniform"}, ValueError, "kernel must have odd length"),
    ({"sigma": -1.0}, ValueError, "sigma must be >= 0 and <= 2000, got -1"),
    ({"sigma": 2001.0}, ValueError, "sigma must be >= 0 and <= 2000, got 2001"),
    ({"sigma": "wide"}, ValueError, "sigma must be one of 'auto', got 'wide'"),
    ({"sigma": 1.0, "loss": "crps"}, ValueError, "sigma must be left out with a loss that takes labels as they are"),
    ({"label_kernel": "box"}, ValueError, "label_kernel must be one of 'gaussian', 'laplace', 'triangular'"),
    ({"decode": "mean"}, ValueError, "decode must be one of 'expectation', 'median', 'mode', got 'mean'"),
    ({"residual": 1}, TypeError, "residual must be a bool, got int"),
    ({"residual_weight": -1}, ValueError, "residual_weight must be >= 0, got -1"),
    ({"expectation_weight": math.inf}, ValueError, "expectation_weight must be >= 0, got inf"),
    ({"weights": 2}, TypeError, "weights must be an LDS, got int"),
    ({"fds": 2}, TypeError, "fds must be an FDS, got int"),
    ({"weights": LDS(Bins.grid(AGES, AGES))}, ValueError, "weights must be over a continuous label axis, as the model"),
    ({"fds": FDS(CLASSES, 6, kernel=[1.0])}, ValueError, "fds must be over a continuous label axis, as the model is"),
    ({"fds": FDS(AGES, 5)}, ShapeError, "fds must be over the backbone's 6 features, got 5"),
]
NUMBERS = "must be left out for head='regression', without bins"
REFUSED += [({"head": "regression", name: value}, ValueError, f"{name} {NUMBERS}") for name, value in {
    "sigma": 1.0, "residual": True, "expectation_weight": 0.1, "decode": "mode", "prior": "uniform",
    "adjust": "in_loss", "tau": 0, "temperature": 0}.items()]  # fmt: skip
OVER_CLASSES = "must be left out for classes, which have no distances"
REFUSED += [({"bins": CLASSES, "density": CLASS_DENSITY, **options}, error, rule) for options, error, rule in [
    ({"sigma": 2.0}, ValueError, f"sigma {OVER_CLASSES}, got 2.0"),
    ({"weights": LDS(AGES)}, ValueError, "weights must be over classes, as the model is, got <Bins: 20"),
    ({"decode": "median"}, ValueError, f"decode {OVER_CLASSES}, got 'median'"),
    ({"residual": True}, ValueError, f"residual {OVER_CLASSES}, got True"),
    ({"expectation_weight": 0.1}, ValueError, f"expectation_weight {OVER_CLASSES}, got 0.1"),
    ({"head": "regression"}, ValueError, "head must score classes, which are no numbers.*Use head='linear'"),
    ({"head": "gaussian"}, ValueError, "head must score classes"),
    ({"loss": "crps"}, ValueError, "loss must be one of 'cross_entropy', got 'crps'"),
    ({"head": "affinity", "loss": "crps"}, ValueError, "loss must be one of 'affinity_loss', 'cross_entropy', got"),
    ({"head": "affinity", "adjust": "in_loss", "prior": "uniform"}, ValueError, 'adjust must be "after"'),
]]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "rule"), REFUSED, ids=lambda value: str(value)[:60])
def test_options_are_refused(options: dict[str, Any], error: type[Exception], rule: str) -> None:
    arguments = {"backbone": net(), "num_features": 6, "bins": AGES, "density": AGE_DENSITY, **options}
    with pytest.raises(error, match=rf"^\w+(\.\w+)?: {rule}"):
        LongTailModel(**arguments)


def test_an_fds_serves_one_model() -> None:
    fds = FDS(AGES, 6)
    ages(fds=fds)
    with pytest.raises(ValueError, match=r"fds must not be attached yet.* Make one for each model\."):
        ages(fds=fds)


def test_harmless_options_are_taken() -> None:
    classes(sigma=None, decode="mode")
    classes(sigma=0)
    ages(sigma=None)
    ages(head="regression", sigma=None)
    few = Bins.uniform(0, 3, width=1)  # fewer than the usual window is long
    for options in ({"sigma": 0.5, "prior": "uniform"}, {"head": "regression", "loss": "balanced_mse"}):
        LongTailModel(net(), 6, few, density=LabelDensity(few, np.array([3, 2, 1])), **options)


def test_batches_are_refused() -> None:
    x, y = batch()
    model = ages()
    with pytest.raises(ValueError, match=r"^LongTailModel: weight needs labels, got labels=None"):
        model(x, weight=torch.ones(9))
    with pytest.raises(
        ShapeError, match=r"labels must be \(9,\), one a sample, got shape \(9, 1\)\. Use labels\.squeeze"
    ):
        model(x, y[:, None])
    with pytest.raises(ShapeError, match=r"labels must be \(9,\), one a sample, got shape \(9, 4, 4\)"):
        model(x, torch.zeros(9, 4, 4))
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        model(x, [1.0] * 9)
    with pytest.raises(LabelError, match=r"labels must lie on the label axis \[0, 20\], got [23]\d\."):
        model(x, y + 21)
    with pytest.raises(LabelError, match="labels must not be NaN"):
        model(x, y * math.nan)
    with pytest.raises(ShapeError, match="weight"):
        model(x, y, torch.ones(8))
    with pytest.raises(ValueError, match="at least one"):
        model(x[:0], y[:0])
    assert model(x[:0]).prediction.shape == (0,)
    with pytest.raises(TypeError, match=r"^LongTailModel\.criterion: output must be a LongTailOutput, got Tensor"):
        model.criterion(x, y)
    with pytest.raises(ValueError, match="reduction must be one of"):
        model.criterion(model(x), y, reduction="all")
    with pytest.raises(ShapeError, match=r"head must give one score a bin, \(N, 20\), got shape \(9, 19\)"):
        LongTailModel(net(), 6, AGES, head=nn.Sequential(nn.Linear(6, 19)))(x)
    with pytest.raises(ShapeError, match=r"head must give one score a bin, \(N, 20\), got tuple"):
        LongTailModel(net(), 6, AGES, head=nn.LSTM(6, 20))(x)
    with pytest.raises(ShapeError, match=r"output must be this model's, with scores \(N, 20\), got shape \(9, 2\)"):
        model.criterion(ages(head="gaussian")(x), y)


def test_maps_of_features_are_refused() -> None:
    model = LongTailModel(nn.Conv2d(3, 6, 1), 6, AGES)
    rule = (
        r"^LongTailModel: backbone must give features \(N, 6\), one row a sample, got \(2, 6, 4, 4\)\. Pool over pixels"
    )
    with pytest.raises(ShapeError, match=rule):
        model(torch.zeros(2, 3, 4, 4))
    model.backbone = nn.LSTM(3, 6)
    with pytest.raises(ShapeError, match="one row a sample, got tuple"):
        model(torch.zeros(2, 3))


def test_what_needs_a_distribution_says_so() -> None:
    x, _ = batch()
    model = ages(head="regression")
    with pytest.raises(
        UsageError, match=r"^LongTailModel\.interval: the head must tell a distribution, got 'regression'"
    ):
        model.interval(model(x))
    with pytest.raises(
        UsageError, match=r"^LongTailModel\.set_prior: only heads that score bins have a prior, got 'reg"
    ):
        model.set_prior("uniform")
    for level in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"^LongTailModel\.interval: level must be > 0 and < 1"):
            ages().interval(ages()(x), level)
    with pytest.raises(ValueError, match="bins must not be classes"):
        classes().interval(classes()(x))
    with pytest.raises(ValueError, match=r"^LongTailModel\.set_prior: kernel must be one of 'auto', got 'none'"):
        ages().set_prior("uniform", kernel="none")
    with pytest.raises(ValueError, match="a prior needs density"):
        LongTailModel(net(), 6, AGES).set_prior("uniform")
    with pytest.raises(ValueError, match=r"^LongTailModel\.set_prior: tau must be >= 0"):
        ages().set_prior("uniform", -1)


def test_repr_tells_the_settings() -> None:
    shown = repr(ages(head="regression"))
    assert "head='regression', loss='weighted_l1'" in shown
    assert "head='linear', loss='cross_entropy', sigma='auto', label_kernel='gaussian', fds=None" in repr(ages())
