from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small_models import AGE_DENSITY, AGES, ages, batch, net
from torch import Tensor, nn

from dir_toolkit.errors import DirToolkitWarning, NotFittedError
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import triangular
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel
from dir_toolkit.priors import adjust_logits, class_prior

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


@pytest.mark.parametrize(
    ("bins", "options", "adjust"),  # each two of them meet
    [
        (bins, options, ("after", "in_loss")[(i + j) % 2])
        for i, bins in enumerate((Bins.classes(4), FOUR, UNEVEN))
        for j, options in enumerate(WEIGHTS if i else WEIGHTS[:-1])  # classes cut their axis in one way
    ],
    ids=str,
)
def test_who_learns_nothing_answers_with_the_target_whatever_the_weights(bins: Bins, options: Any, adjust: Any) -> None:
    y = skewed(bins)
    weights = None
    if options is not None:
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

AXES = {"even": Bins.uniform(0, 14, count=7), "integer": SEVENS, "uneven": STRETCHED}

SPREADS: list[dict[str, Any]] = [
    {},
    {"sigma": 0.7},
    {"sigma": 0.7, "label_kernel": "laplace"},
    {"sigma": None},
    {"loss": "squared_emd"},
    {"loss": "squared_emd", "sigma": 0.7},
    {"loss": "crps"},
]
WAYS = [(False, "after"), (True, "in_loss"), (True, "after"), (False, "in_loss")]  # whether weighted, and adjust


@pytest.mark.filterwarnings("ignore:.*spreads each label")  # on an axis so short
@pytest.mark.parametrize(
    ("bins", "options", "weighted", "adjust"),  # each two of them meet
    [
        *((Bins.classes(7), {}, *way) for way in WAYS),  # which are not spread
        *(
            (bins, options, *WAYS[(3 * i + j) % 4])
            for i, options in enumerate(SPREADS)
            for j, bins in enumerate(AXES.values())
            # the optimum of CRPS is not the shares of labels that all lie on whole numbers
            if options != {"loss": "crps"} or bins is not SEVENS
        ),
    ],
    ids=str,
)
def test_who_learns_nothing_answers_with_the_target_however_labels_are_spread(
    bins: Bins, options: dict[str, Any], weighted: bool, adjust: Any
) -> None:
    counts = np.array([100, 40, 9, 3, 30, 6, 2])
    y = torch.from_numpy(np.repeat(bins.centers, counts))
    if bins.categorical:
        y = y.long()
    elif options == {"loss": "crps"}:
        # As of labels that lie evenly in each bin, of which its optimum is the shares: within a bin CRPS is a cubic of
        # the label, which Gauss's two points integrate.
        from_middle = torch.tensor([-1.0, 1.0]) / math.sqrt(12) * limits(bins, y).diff()[:, None]
        y = (torch.tensor(bins.centers)[:, None] + from_middle).repeat_interleave(torch.tensor(counts), 0).flatten()
    density = LabelDensity.count(y, bins)
    weights = LDS(bins, kernel=triangular(3), scheme="sqrt_inverse").fit(density) if weighted else None
    one = torch.ones(1, 1, dtype=torch.float64)
    shares = torch.arange(1, 8).double() / 28
    even = torch.tensor(bins.relative_widths).double() / 7
    same = partial(torch.testing.assert_close, rtol=1e-4, atol=0)
    for target, expected, other, then in (("uniform", even, shares, shares), (shares, shares, "uniform", even)):
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


def test_bins_whose_labels_have_no_weight_count_as_one_label_of_the_smallest_weight() -> None:
    """Weights over a narrower axis leave out what lies beyond it."""
    narrow = LDS(Bins.uniform(0, 15, width=1), kernel=None, scheme="inverse", outside="drop")
    weights = narrow.fit(AGES.centers.repeat(AGE_DENSITY.counts))
    table = weights(torch.tensor(AGES.centers)).numpy()
    assert (table[15:] == 0).all()
    for options in ({"prior_kernel": None}, {"sigma": None}, {}, {"adjust": "in_loss"}):
        model = ages(weights=weights, target_prior="uniform", **options)
        offset = (model.readout.adjuster.offset - model.readout.loss_offset).double().numpy()
        prior = np.exp(-offset)
        if options in ({"prior_kernel": None}, {"sigma": None}):  # labels are not spread
            assert prior[15:] / prior[0] == pytest.approx(table[:15].min() / (400 * table[0]), rel=1e-4)
        assert (prior > 0).all()
        np.testing.assert_allclose(prior.sum(), 1, rtol=1e-5)
    x, y = batch(300)
    noisy = y + 2 * x[:, 0]
    choice = model.calibrate(-(torch.tensor(AGES.centers) - noisy[:, None]).abs(), y)
    assert np.isfinite(choice.scores).all()
    assert model(x).prediction.isfinite().all()


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
    with pytest.warns(DirToolkitWarning, match="no label in or near 1 of 4 bins; in the prior each has a count of one"):
        model = LongTailModel(net(), 6, bins, density=density, target_prior="uniform")
    model.set_prior("uniform", 0.5)  # pytest would raise a second warning
    assert torch.isfinite(model.readout.adjuster.offset).all()
