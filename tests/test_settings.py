"""Whatever has settings tells them: each argument of its constructor, once changed, changes ``settings`` and the repr.

A case is a class, the arguments it is made with, and another value for each argument. A class whose constructor has an
argument that its case does not name fails.
"""

import functools
import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dir_toolkit as dt
from dir_toolkit._settings import described
from dir_toolkit.errors import SettingsError

BINS, OTHER_BINS = dt.Bins.uniform(0, 60, width=1), dt.Bins.uniform(0, 60, width=2)
DENSITY, OTHER_DENSITY = dt.LabelDensity(BINS, np.arange(60)), dt.LabelDensity(OTHER_BINS, np.arange(30))


class Case:
    """A class, the arguments it is made with, and another value for each argument.

    Args:
        also: by argument, what else must change with it.
        no_settings: arguments that are no settings, such as a backbone.
    """

    def __init__(self, kind: Any, base: Any, /, *, also: Any = None, no_settings: Any = (), **others: Any) -> None:
        self.kind, self.base, self.no_settings = kind, base, no_settings
        self.others = {name: {name: value, **(also or {}).get(name, {})} for name, value in others.items()}


MODEL_DENSITY = dt.LabelDensity(BINS, np.arange(1, 61))
MODEL = {"backbone": nn.Identity(), "num_features": 4, "bins": BINS, "density": MODEL_DENSITY}
SHAPE, SHAPED = {"num_features": 4, "num_classes": 3}, {"num_features": 5, "num_classes": 4}
DENSE = {"density": DENSITY}
JUDGED = {"density": dt.LabelDensity(BINS, np.arange(60) + 1), "missing": "drop"}
CALIBRATED = {**JUDGED, "regions": ["all"] * 60, "per_region": 0.5, "outside": "clip"}
METRIC: Any = {"no_settings": ("counted",)}  # which is the density where bins come first

# fmt: off
CASES = [
    Case(dt.LDS, {"bins": BINS}, bins=OTHER_BINS, kernel=None, scheme="inverse", edges="zero", order="scheme_first",
         clip=(1, 5), outside="clip", missing="drop", power=0.5, beta=0.9, alpha=0.5, epsilon=0.1),
    Case(dt.BinSampler, {"labels": [0.5, 1.5, 1.5], "bins": BINS}, labels=[0.5, 0.5, 1.5], bins=OTHER_BINS,
         missing="drop", q=0.5, progressive_epochs=3, num_samples=2, replacement=False, seed=1, world=2,
         also={"replacement": {"num_samples": 2}}, no_settings=("rank",)),  # ranks go on from the state of one of them
    Case(dt.Bins, {"edges": np.array([0.0, 1.0, 2.0])}, edges=np.array([0.0, 1.5, 2.0]), centers=np.array([0.0, 1.0]),
         categorical=True, unbounded=True),
    Case(dt.FDS, {"bins": BINS, "num_features": 4, "rank": 2}, bins=OTHER_BINS, num_features=5, momentum=0.5,
         kernel=dt.gaussian(5, 3), covariance="low_rank", map="paper", rank=3, clip=(0.2, 5.0), start_epoch=2,
         shrinkage=1.0, count_weighted=True, edges="mirror", outside="clip", missing="drop", channels="last",
         no_settings=("group",)),
    Case(dt.losses.BatchMCLoss, {}, noise_sigma=2.0, learn=False, gather=True, missing="drop"),
    Case(dt.losses.GaussianMixtureLoss, {"weights": [0.5, 0.5], "means": [1.0, 2.0], "variances": [1.0, 1.0]},
         weights=[0.25, 0.75], means=[1.0, 3.0], variances=[1.0, 2.0], noise_sigma=2.0, learn=False, missing="drop"),
    Case(dt.losses.BinnedIntegrationLoss, {"bins": BINS, "density": np.full(60, 1 / 60)}, density=np.eye(60)[3],
         bins=dt.Bins.uniform(0, 120, width=2), noise_sigma=2.0, learn=False, outside="drop", missing="drop"),
    Case(dt.losses.ConRLoss, {}, base=functools.partial(dt.losses.weighted_huber, delta=2.0), coefficient=2.0,
         omega=2.0, temperature=2.0, eta=2.0, weights=dt.LDS(BINS), missing="drop"),
    Case(dt.losses.DistLoss, {"bins": BINS, "prior": np.full(60, 1 / 60)}, bins=dt.Bins.uniform(0, 120, width=2),
         prior=np.eye(60)[3], coefficient=2.0, squared=True, missing="drop"),
    Case(dt.losses.RankNContrast, {}, temperature=1.0, missing="drop"),
    Case(dt.losses.SRLLoss, {"num_features": 4, "bins": BINS}, num_features=5, bins=OTHER_BINS,
         base=dt.losses.weighted_huber, coefficient=2.0, temperature=2.0, enveloping=2.0, homogeneity=2.0, momentum=0.5,
         num_points=5, seed=1, missing="drop"),
    Case(dt.losses.CenterLoss, {"num_features": 4, "num_classes": 3}, num_classes=4, num_features=5, strength=0.5),
    Case(dt.heads.LinearHead, SHAPE, **SHAPED, bias=False),
    Case(dt.heads.CoralHead, SHAPE, **SHAPED),
    Case(dt.heads.CornHead, SHAPE, **SHAPED),
    Case(dt.heads.CosineHead, SHAPE, **SHAPED, scale=2.0, learn_scale=True),
    Case(dt.heads.NearestMeanHead, SHAPE, **SHAPED, metric="euclidean"),
    Case(dt.heads.ScaledHead, {"linear": nn.Linear(4, 3)}, linear=nn.Linear(4, 3)),
    Case(dt.AffinityHead, SHAPE, **SHAPED, prototypes=2, sigma=2.0, distance="l1", similarity="inverse",
         sigma_mode="first_batch", feature_scale=1.0),
    Case(dt.LongTailModel, MODEL, num_features=5, bins=OTHER_BINS, density=dt.LabelDensity(BINS, np.arange(2, 62)),
         head="cosine", loss="squared_emd", sigma=3.0, label_kernel="laplace", fds=dt.FDS(BINS, 4),
         weights=dt.LDS(BINS).fit(MODEL_DENSITY), target_prior="uniform", tau=0.5, adjust="in_loss", prior_kernel=None,
         temperature=2.0, decode="mode", residual=True, residual_weight=0.2, expectation_weight=0.2, within_axis=True,
         outside="clip", missing="drop", no_settings=("backbone",), also={
             "bins": {"density": None}, "adjust": {"target_prior": "uniform"}, "within_axis": {"head": "regression"},
         }),
    Case(dt.LogitAdjuster, {"prior": [0.2, 0.8]}, prior=[0.3, 0.7], target=[0.5, 0.5], tau=0.5, temperature=2.0),
    Case(dt.RegressionMetrics, DENSE, **JUDGED, floor=0.5, outside="clip", **METRIC),
    Case(dt.ClassificationMetrics, DENSE, **JUDGED, regions=["many", "few"] * 30, outside="drop", **METRIC),
    Case(dt.metrics.IntervalMetrics, DENSE, **JUDGED, outside="clip", **METRIC),
    Case(dt.metrics.DistributionMetrics, DENSE, **JUDGED, level=0.8, quantile=0.5, pit_bins=5, ends="open",
         outside="drop", **METRIC),
    Case(dt.metrics.CalibrationMetrics, {"num_classes": 5}, num_classes=6, num_bins=10, outside="clip", missing="drop"),
    Case(dt.conformal.PointConformal, DENSE, **CALIBRATED),
    Case(dt.conformal.GaussianConformal, DENSE, **CALIBRATED),
    Case(dt.conformal.BinsConformal, DENSE, **CALIBRATED, gamma=0.0, prior=np.full(60, 1 / 60)),
]
# fmt: on
CHANGES = [(case, name) for case in CASES for name in case.others]


def text_of(value: Any) -> str:
    return json.dumps(described("it", value), sort_keys=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind.__name__)
def test_every_argument_has_another_value_to_be_tried(case):
    arguments = {name for name, p in inspect.signature(case.kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
    if case.kind is dt.LongTailModel:  # whose options are those of its readout
        for readout in (dt.longtail.BinsReadout, dt.longtail.PointReadout):
            arguments |= {name for name, p in inspect.signature(readout).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert arguments == {*case.others, *case.no_settings}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind.__name__)
def test_two_made_alike_have_the_same_settings(case):
    torch.manual_seed(0)
    first = case.kind(**case.base)
    torch.manual_seed(1)
    second = case.kind(**case.base)
    assert text_of(first) == text_of(second)
    assert repr(first) == repr(second)


@pytest.mark.parametrize(("case", "name"), CHANGES, ids=lambda x: x if isinstance(x, str) else x.kind.__name__)
def test_another_argument_has_other_settings_and_another_repr(case, name):
    first, second = case.kind(**case.base), case.kind(**{**case.base, **case.others[name]})
    assert text_of(first) != text_of(second)
    assert repr(first) != repr(second)


def test_densities_grids_and_windows_count_by_what_they_hold():
    other = dt.LabelDensity(BINS, np.arange(60)[::-1])  # as many labels
    assert text_of(DENSITY) == text_of(dt.LabelDensity(BINS, DENSITY.counts)) != text_of(other)
    grids = [
        dt.labels.BinGrid(BINS, dt.Bins.classes(3)),
        dt.labels.BinGrid(BINS, dt.Bins.classes(4)),
        dt.labels.BinGrid(BINS),
    ]
    assert len(set(map(text_of, grids))) == len(set(map(repr, grids))) == 3
    assert text_of(grids[0]) == text_of(dt.labels.BinGrid(BINS, dt.Bins.classes(3)))
    windows = [dt.gaussian(5, 2), dt.gaussian(5, 2, folded=True), dt.laplace(5, 2), dt.triangular(5)]
    for made in (dt.LDS, dt.LDS.reference):
        assert len({text_of(made(grids[0], kernel=[w, [1.0]])) for w in windows}) == len(windows)


def test_weights_count_by_what_they_learnt():
    assert text_of(dt.LDS(BINS).fit([1.0, 2.0])) == text_of(dt.LDS(BINS).fit([2.0, 1.0]))
    assert text_of(dt.LDS(BINS).fit([1.0, 2.0])) != text_of(dt.LDS(BINS).fit([1.0, 20.0]))
    assert text_of(dt.LDS(BINS).fit([1.0, 2.0])) != text_of(dt.LDS(BINS))
    assert text_of(dt.LDS.reference(BINS, scheme="inverse")) != text_of(dt.LDS.reference(BINS))


def test_a_partial_counts_by_its_arguments():
    of = functools.partial
    assert text_of(of(dt.losses.weighted_huber, delta=0.1)) == text_of(of(dt.losses.weighted_huber, delta=0.1))
    assert text_of(of(dt.losses.weighted_huber, delta=0.1)) != text_of(of(dt.losses.weighted_huber, delta=10.0))
    assert text_of(of(dt.weighted_l1)) != text_of(of(dt.weighted_mse))


def test_a_lambda_is_refused():
    with pytest.raises(SettingsError, match=r"dir_toolkit: it must have settings that .* got a lambda\. Use a func"):
        text_of(lambda x: x)
    with pytest.raises(SettingsError, match="got a lambda"):
        text_of(functools.partial(lambda x: x))


def test_a_function_made_in_another_counts_by_what_it_takes_from_there():
    def made(number, default):
        def inner(x, d=default):
            return x * number * d

        return inner

    assert text_of(made(1, 2)) == text_of(made(1, 2))
    assert text_of(made(1, 2)) != text_of(made(3, 2))
    assert text_of(made(1, 2)) != text_of(made(1, 3))
    assert text_of(made(np, 2)) == text_of(made(np, 2)) != text_of(made(torch, 2))
    with pytest.raises(SettingsError, match=r"its number\) must have settings that identify"):
        text_of(made(lambda: 1, 2))


def test_modules_without_settings_count_by_their_attributes_buffers_and_children():
    assert text_of(nn.SmoothL1Loss(beta=1.0)) != text_of(nn.SmoothL1Loss(beta=2.0))
    assert text_of(nn.Sequential(nn.Dropout(0.1))) != text_of(nn.Sequential(nn.Dropout(0.2)))
    assert text_of(nn.CrossEntropyLoss(torch.ones(3))) != text_of(nn.CrossEntropyLoss(torch.arange(3.0)))
    assert text_of(nn.Linear(2, 3)) == text_of(nn.Linear(2, 3))


class Hidden(nn.Module):
    def __init__(self, number):
        super().__init__()
        self._number = number


class Frozen(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number), requires_grad=False)


def test_private_attributes_and_frozen_parameters_of_a_module_count():
    assert text_of(Hidden(1.0)) == text_of(Hidden(1.0)) != text_of(Hidden(2.0))
    assert text_of(Frozen(1.0)) == text_of(Frozen(1.0)) != text_of(Frozen(2.0))


def times(function, number):
    @functools.wraps(function)
    def inner(*arguments, **options):
        return number * function(*arguments, **options)

    return inner


@torch.no_grad()
def decorated(x):
    return x


def test_a_function_counts_by_what_its_decorator_takes_too():
    assert text_of(times(dt.weighted_l1, 1.0)) == text_of(times(dt.weighted_l1, 1.0))
    assert text_of(times(dt.weighted_l1, 1.0)) != text_of(times(dt.weighted_l1, 2.0))
    assert text_of(times(dt.weighted_l1, 1.0)) != text_of(dt.weighted_l1)
    assert "decorated" in text_of(decorated)


def test_defaults_that_are_given_by_name_count():
    def made(default):
        def inner(x, *, d=default):
            return x * d

        return inner

    assert text_of(made(1)) == text_of(made(1)) != text_of(made(2))


def test_what_holds_itself_is_refused():
    def itself(x):
        return x and itself(x - 1)

    module = nn.Identity()
    module.others = [module]
    for value in (itself, module):
        with pytest.raises(SettingsError, match=r"dir_toolkit: it .*got something that contains itself"):
            text_of(value)


class Extended(dt.losses.ConRLoss):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra


def test_a_subclass_counts_by_the_arguments_that_it_adds():
    assert text_of(Extended(1.0)) == text_of(Extended(1.0)) != text_of(Extended(2.0))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.tensor([x, 1.0]).to_sparse(),
        lambda x: torch.tensor([x, 1.0]).to(torch.float8_e4m3fn),
        lambda x: torch.tensor([x + 1j]).conj(),
        lambda x: np.array([1j * x]),
        lambda x: torch.tensor([x] * 100).to(torch.bfloat16),
    ],
)
def test_arrays_of_every_kind_count(made):
    assert text_of(made(1.0)) == text_of(made(1.0)) != text_of(made(2.0))


def test_long_arrays_count_by_a_digest():
    a = np.arange(1000.0)
    assert text_of(a) != text_of(a + 1e-9)
    assert len(text_of(a)) < 100
    assert text_of(torch.from_numpy(a)) == text_of(a)
