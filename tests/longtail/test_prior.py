from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dir_toolkit.errors import (
    DirToolkitWarning,
    LabelError,
    NotFittedError,
    ShapeError,
    UsageError,
)
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.decoding import decode
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import triangular
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel
from dir_toolkit.metrics.regression import regression_metrics
from dir_toolkit.priors import adjust_logits, choose_tau, class_prior

AGES = Bins.uniform(0, 20, width=1)

AGE_DENSITY = LabelDensity(AGES, np.arange(1, 21)[::-1] ** 2)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def net(num_features: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, num_features), nn.Tanh())


def ages(**options: Any) -> LongTailModel:
    arguments = {"density": AGE_DENSITY, **options}
    return seeded(lambda: LongTailModel(net(), 6, AGES, **arguments))


def batch(samples: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    return x, (20 * torch.rand(samples, generator=generator)).clamp_max(19.9)


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
    unspread = {} if bins.categorical else {"sigma": None}
    options = {"density": density, **unspread, "prior_kernel": None, **options}
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
def test_who_learns_nothing_answers_with_the_target_whatever_the_weights(bins: Bins, options: Any, adjust: Any) -> None:
    y = skewed(bins)
    weights = None
    if options is not None:
        if bins.categorical and "bins" in options:
            pytest.skip("classes cut their axis in one way")
        weights = LDS(**{"bins": bins, **options}).fit(y)
    one = torch.ones(1, 1, dtype=torch.float64)
    even = torch.ones(4).double() / 4 if bins.categorical else torch.tensor(np.diff(bins.edges) / 12)
    rising = [0.1, 0.2, 0.3, 0.4]
    model = learnt_without_a_clue(y, bins, weights=weights, target_prior="uniform", adjust=adjust)
    torch.testing.assert_close(model(one).distribution[0], even, rtol=1e-4, atol=1e-5)
    model.set_prior(rising)
    torch.testing.assert_close(model(one).distribution[0], torch.tensor(rising).double(), rtol=1e-4, atol=1e-5)
    if adjust == "in_loss":
        model = learnt_without_a_clue(y, bins, weights=weights, target_prior=rising, adjust=adjust)
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
@pytest.mark.parametrize(("scheme", "kernel"), [(None, None), ("sqrt_inverse", triangular(3))], ids=["no", "weights"])
@pytest.mark.parametrize("options", SPREADS, ids=str)
@pytest.mark.parametrize("bins", AXES.values(), ids=list(AXES))
def test_who_learns_nothing_answers_with_the_target_however_labels_are_spread(
    bins: Bins, options: dict[str, Any], scheme: Any, kernel: Any, adjust: Any
) -> None:
    if bins.categorical and options:
        pytest.skip("classes are not spread")
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
            nn.Identity(), 1, bins, density=density, weights=weights, target_prior=target, adjust=adjust, **options
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
    model = learnt_without_a_clue(y, bins, sigma=1.5, prior_kernel="auto", weights=weights, target_prior="uniform")
    shares = model(torch.ones(1, 1, dtype=torch.float64)).distribution[0]
    torch.testing.assert_close(shares, torch.full((7,), 1 / 7).double(), rtol=1e-4, atol=0)


def test_a_bin_that_less_than_one_label_reaches_is_filled_up_to_one_of_its_own_weight() -> None:
    counts = np.array([90, 30, 6, 0, 0, 0, 0, 0, 0, 0, 2, 0])
    bins = Bins.uniform(0, 12, width=1)
    density = LabelDensity(bins, counts)
    weights = LDS(bins, kernel=triangular(3), scheme="sqrt_inverse").fit(density)
    with pytest.warns(DirToolkitWarning, match="no label in or near 3 of 12 bins"):
        model = LongTailModel(
            nn.Identity(), 1, bins, density=density, sigma=0.5, weights=weights, target_prior="uniform"
        )
    spread = soft_labels(torch.tensor(bins.centers), bins, 0.5, ends="open").numpy()
    table = weights(torch.tensor(bins.centers)).numpy()
    reached, learnt = counts @ spread, (counts * table) @ spread
    expected = np.where(reached >= 1, learnt, learnt + (1 - reached) * table)
    expected /= expected.sum()
    np.testing.assert_allclose(model.readout.adjuster.offset.numpy(), -np.log(expected), rtol=1e-5)
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
        model = LongTailModel(
            nn.Identity(), 1, Bins.classes(3), density=density, weights=weights, target_prior="uniform"
        )
    expected = torch.tensor([5.0, 5.0, 2.5]) / 12.5
    torch.testing.assert_close(model.readout.adjuster.offset, -expected.log())
    with pytest.warns(DirToolkitWarning, match="no sample of class 2"):
        torch.testing.assert_close(class_prior(density, weights=weights).float(), expected)


def test_weights_that_are_not_known_yet_leave_no_prior() -> None:
    with pytest.raises(NotFittedError):
        ages(target_prior="uniform", weights=LDS(AGES))
    ages(weights=LDS(AGES))  # none is asked for yet


def test_even_means_over_the_axis_at_every_strength() -> None:
    density = LabelDensity(UNEVEN, np.array([10, 20, 10, 80]))  # evenly spread over the axis
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    for tau in (0.0, 0.4, 1.0, 2.0):
        model = LongTailModel(nn.Identity(), 1, UNEVEN, density=density, sigma=None, target_prior="uniform", tau=tau)
        out = model(x)
        torch.testing.assert_close(out.distribution, out.scores.softmax(1))  # nothing to correct
    model.set_prior(None)
    torch.testing.assert_close(model(x).distribution, out.distribution)


def test_the_default_prior_is_spread_as_labels_are_and_the_kernel_can_be_chosen() -> None:
    x, _ = batch()
    for spread, sigma in (({}, 2.0), ({"sigma": 0.8, "label_kernel": "laplace"}, 0.8), ({"loss": "crps"}, None)):
        model = ages(target_prior="uniform", decode="expectation", **spread)
        scores = model(x).scores
        of_centers = soft_labels(
            torch.tensor(AGES.centers), AGES, sigma, kernel=model.readout.label_kernel, ends="open"
        ).numpy()
        assert (AGE_DENSITY.counts @ of_centers >= 1).all()
        for kernel, density in (
            ("auto", LabelDensity(AGES, AGE_DENSITY.counts @ of_centers)),
            (None, AGE_DENSITY),
            (triangular(3), AGE_DENSITY.smooth(triangular(3))),
        ):
            expected = adjust_logits(scores, class_prior(density)).softmax(1)
            model.set_prior("uniform", kernel=kernel)
            torch.testing.assert_close(model(x).distribution, expected)
            same = ages(target_prior="uniform", prior_kernel=kernel, decode="expectation", **spread)
            assert torch.equal(same(x).distribution, model(x).distribution)
            same.set_prior("uniform")  # which takes the model's own
            assert torch.equal(same(x).distribution, model(x).distribution)


def test_bins_without_labels_are_told_once() -> None:
    bins = Bins.classes(4)
    density = LabelDensity(bins, np.array([3, 2, 1, 0]))
    with pytest.warns(DirToolkitWarning, match="no label in or near 1 of 4 bins; the prior takes each to have one"):
        model = LongTailModel(net(), 6, bins, density=density, target_prior="uniform")
    model.set_prior("uniform", 0.5)  # pytest would raise a second warning
    assert torch.isfinite(model.readout.adjuster.offset).all()


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
        found = choose_tau(
            torch.tensor([[9.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 0]), [0.7, 0.3], by="log_loss", temperature=1.0
        )
    assert found.tau == 3.0


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
            r"scores must be \(N, 20\), got shape \(9, 5\)",
        ),
        (
            lambda: model.choose_tau(scores, y[:, None]),
            ShapeError,
            r"labels must be \(9,\), one per row of scores, got shape \(9, 1\)",
        ),
        (
            lambda: model.choose_tau(scores, y[:8]),
            ShapeError,
            r"labels must be \(9,\), one per row of scores, got shape \(8,\)",
        ),
        (lambda: model.choose_tau(scores[:0], y[:0]), ValueError, "at least one label must lie on the axis, got none"),
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
    with pytest.raises(ValueError, match=r"^LongTailModel\.choose_tau: target_prior needs density, got None"):
        ages(density=None).choose_tau(scores, y)
    over_classes = LongTailModel(net(), 6, Bins.classes(4))
    for other in (ages(head="regression"), ages(head="gaussian"), over_classes):
        rule = (
            r"the readout must choose tau on a continuous axis, got a \w+Readout\. For classes use dir_toolkit\.choose"
        )
        with pytest.raises(UsageError, match=rf"^LongTailModel\.choose_tau: {rule}"):
            other.choose_tau(scores, y)
