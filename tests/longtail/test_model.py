from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from small_models import (
    AGE_DENSITY,
    AGES,
    CLASS_DENSITY,
    CLASSES,
    SPREAD,
    ages,
    batch,
    classes,
    net,
    same_output,
    seeded,
)
from torch import Tensor, nn

from dir_toolkit.errors import LabelError, NotFittedError, ShapeError, UsageError
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.training.loop import Optimization, fit
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.features.fds import FDS
from dir_toolkit.heads.affinity import AffinityHead
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.decoding import decode
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import gaussian, triangular
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel, LongTailOutput
from dir_toolkit.longtail.model import HeadName
from dir_toolkit.losses.cross_entropy import cross_entropy
from dir_toolkit.losses.focal import focal_loss
from dir_toolkit.losses.gaussian_nll import gaussian_nll
from dir_toolkit.losses.regression import weighted_huber
from dir_toolkit.metrics.classification import ClassificationMetrics

HEADS = get_args(HeadName)


def text_of(value: object) -> str:
    """A name of a case that is the same in every process."""
    return re.sub(r" at 0x\w+", "", str(value))[:60]


def class_batch(samples: int = 9) -> tuple[Tensor, Tensor]:
    x, y = batch(samples)
    return x, (y / 5).long()


def each(model: LongTailModel, out: LongTailOutput, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """The loss of each sample by itself, (N,)."""
    alone = [LongTailOutput(out.loss, *(part[[i]] for part in out[1:])) for i in range(len(y))]
    return torch.stack(
        [model.criterion(one, y[[i]], None if weight is None else weight[[i]]) for i, one in enumerate(alone)]
    )


def test_the_comparison_of_outputs_notices_a_wrong_one() -> None:
    out = ages()(batch()[0])
    with pytest.raises(AssertionError):
        same_output(out, out._replace(prediction=out.prediction + 1))
    with pytest.raises(AssertionError):
        same_output(out, out._replace(loss=out.loss + 1 if out.loss == out.loss else torch.zeros(())))


def test_own_losses_and_own_heads_are_taken() -> None:
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

        def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
            return self.factor * weighted_huber(pred, target, weight)

    model = ages(head="regression", loss=Learnt())
    model(x, y).loss.backward()
    assert model.readout.loss.factor.grad.item() == pytest.approx(model(x, y).loss.item())


@pytest.mark.parametrize(
    "make",
    [
        *(partial(ages, head=head) for head in HEADS),
        partial(ages, residual=True),
        partial(ages, target_prior="uniform"),
        *(partial(classes, head=head, target_prior="uniform") for head in ("linear", "cosine", "affinity")),
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
    for features, got in (
        (torch.zeros(2, 5), r"shape \(2, 5\)"),
        (torch.zeros(6), r"shape \(6,\)"),
        ([1.0], r"list\. Let the backbone"),
    ):
        with pytest.raises(
            ShapeError, match=rf"^LongTailModel.*features \(N, 6\), one row per sample, or .*, got {got}"
        ):
            ages().read(features)


VARIANTS: list[dict[str, Any]] = [
    *({"head": head} for head in HEADS),
    {"residual": True, "expectation_weight": 0.1},
    {"target_prior": "uniform", "adjust": "in_loss", "loss": "crps"},
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
    alone = each(model, out, y, weight)
    torch.testing.assert_close(alone.mean(), model.criterion(out, y, weight))
    assert alone[0] == 0
    # A weight of two is the sample seen twice, in whatever order.
    twice = LongTailOutput(out.loss, *(torch.cat([part[[4]], part]) for part in out[1:]))
    torch.testing.assert_close(
        10 * model.criterion(twice, torch.cat([y[[4]], y])),
        9 * model.criterion(out, y, 1 + (torch.arange(len(y)) == 4).float()),
    )
    one = model(x[:1], y[:1])
    assert one.loss.shape == ()
    assert one.prediction.shape == (1,)


@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("loss") != "balanced_mse"], ids=str)
def test_gradients_agree_with_differences(options: dict[str, Any]) -> None:
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
    assert torch.equal(model(x, y, torch.ones(9)).loss, plain(x, y, torch.ones(9)).loss)
    torch.testing.assert_close(plain(x, y, torch.ones(9)).loss, plain(x, y).loss)  # torch adds up in another order
    assert torch.equal(model.criterion(model(x), y), model(x, y).loss)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_reads_no_value(options: dict[str, Any]) -> None:
    x, y = batch()
    model = ages(**options, weights=LDS(AGES).fit(AGE_DENSITY)).to("meta")
    model(x.to("meta"), y.to("meta")).loss.backward()  # reading a value of a meta tensor raises
    assert {parameter.grad.device.type for parameter in model.head.parameters()} == {"meta"}


def test_what_is_not_finite_shows_in_the_loss_and_raises_nowhere() -> None:
    x, y = batch()
    x[3] = math.nan
    for options in VARIANTS:
        out = ages(**options)(x, y)
        assert out.loss.isnan()
        assert out.prediction[3].isnan()
        assert out.prediction[:3].isfinite().all()


def test_labels_on_another_device_are_named() -> None:
    for make in (ages, classes):
        model = make()
        x, _ = batch()
        with pytest.raises(ValueError, match=r"output and labels must be on the same device, got cpu and meta\."):
            model(x, torch.zeros(9, device="meta"))


def in_unit(unit: float, options: dict[str, Any]) -> tuple[LongTailModel, Bins]:
    bins = Bins.uniform(0, 20 * unit, count=20)
    density = LabelDensity(bins, AGE_DENSITY.counts)
    weights = LDS(bins).fit(density)
    return seeded(lambda: LongTailModel(net(), 6, bins, density=density, weights=weights, **options)), bins


UNIT_FREE: list[dict[str, Any]] = [
    *({name: value for name, value in options.items() if name != "sigma"} for options in VARIANTS),
    *({"head": "regression", "loss": f"weighted_{loss}"} for loss in ("mse", "huber", "focal_l1", "focal_mse")),
    {"target_prior": "uniform", "tau": 0.7, "decode": "expectation"},
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
        assert far.readout.offset.item() == offset + 1800


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
        return LongTailModel(backbone, 16, CLASSES, density=density, fds=fds, target_prior="uniform", adjust="in_loss")

    model = seeded(make)
    history = fit(
        model, train, val, metrics=ClassificationMetrics(density), loss=model.criterion, fds=fds,
        optimization=Optimization(epochs=3, batch_size=16, lr=0.02), runtime=Runtime(torch.device("cpu"), seed=3),
        folder=tmp_path / "run", augmentation=False,
    )  # fmt: skip
    assert history[-1]["loss"] < history[0]["loss"]
    assert fds.epoch > 0


FLOAT_DENSITY = AGE_DENSITY.smooth(gaussian(5, 2))

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bins": [1, 2]}, TypeError, "bins must be one label axis, a Bins, got list. For several targets use Multi"),
    ({"density": [1, 2]}, TypeError, "density must be a LabelDensity, got list"),
    ({"density": CLASS_DENSITY}, ValueError, "density must be over the same bins, got"),
    ({"backbone": len}, TypeError, "backbone must be a Module, got builtin"),
    ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
    ({"backbone": LinearHead(3, 6), "num_features": 5}, ShapeError, "num_features must be the backbone's 3, got 5"),
    ({"head": "softmax"}, ValueError, "head must be one of 'regression', 'gaussian', 'linear', 'cosine', 'affinity'"),
    ({"head": nn.Linear(5, 20)}, ShapeError, "head must take the backbone's 6 features, got 5"),
    ({"head": nn.Linear(6, 19)}, ShapeError, r"head must give one score per bin, \(N, 20\), got 19"),
    ({"head": AffinityHead(6, 21)}, ShapeError, r"head must give one score per bin, \(N, 20\), got 21"),
    ({"loss": "l1"}, ValueError, "loss must be one of 'cross_entropy', 'coral_loss', 'crps', 'squared_emd', got 'l1'"),
    ({"head": "regression", "loss": "crps"}, ValueError, "loss must be one of 'weighted_l1', .*'balanced_mse', .*got"),
    ({"head": "gaussian", "loss": "crps"}, ValueError, "loss must be one of 'gaussian_nll', got 'crps'"),
    ({"loss": 3}, TypeError, "loss must be a name or a function, got int"),
    ({"head": "regression", "loss": "balanced_mse", "density": None}, ValueError, 'loss="balanced_mse" needs density'),
    (
        {"target_prior": "uniform", "density": None},
        ValueError,
        "the training prior needs density, got None. Pass density=LabelDensity",
    ),
    ({"target_prior": "uniform", "density": FLOAT_DENSITY}, ValueError, "density must not be smoothed already, got"),
    (
        {"target_prior": "balanced"},
        ValueError,
        "target_prior must be .*'uniform', got 'balanced'. Or pass None",
    ),
    ({"target_prior": [0.5, 0.5]}, ShapeError, r"target_prior must be \(20,\), one share per bin, got shape \(2,\)"),
    ({"target_prior": [1.0] * 20}, ValueError, "target_prior must sum to one, got a sum of 20"),
    ({"tau": -1}, ValueError, r"tau must be >= 0 and <= 1e\+30, got -1"),
    ({"tau": 1e38, "target_prior": "uniform"}, ValueError, r"tau must be >= 0 and <= 1e\+30, got 1e\+38"),
    ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    ({"adjust": "before"}, ValueError, "adjust must be one of 'after', 'in_loss', got 'before'"),
    ({"adjust": "in_loss"}, ValueError, 'adjust="in_loss" needs target_prior, got None'),
    (
        {"adjust": "in_loss", "target_prior": [0.5, 0.5] + [0.0] * 18},
        ValueError,
        "target_prior must be positive with adjust=",
    ),
    (
        {"adjust": "in_loss", "target_prior": "uniform", "loss": cross_entropy},
        ValueError,
        'adjust must be "after" with a loss',
    ),
    ({"prior_kernel": "none"}, ValueError, "prior_kernel must be one of 'auto', got 'none'"),
    ({"prior_kernel": [1, 1], "target_prior": "uniform"}, ValueError, "kernel must have odd length"),
    ({"sigma": -1.0}, ValueError, "sigma must be >= 0 and <= 2000, got -1"),
    ({"sigma": 2001.0}, ValueError, "sigma must be >= 0 and <= 2000, got 2001"),
    ({"sigma": "wide"}, ValueError, "sigma must be one of 'auto', got 'wide'"),
    ({"sigma": 1.0, "loss": "crps"}, ValueError, "sigma must be omitted with a loss of hard labels"),
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

REFUSED += [({"bins": CLASSES, "density": CLASS_DENSITY, **options}, error, rule) for options, error, rule in [
    ({"weights": LDS(AGES)}, ValueError, "weights must be over classes, as the model is, got <Bins: 20"),
    ({"head": "regression"}, ValueError, "head must be one of 'linear', 'cosine', 'affinity', got 'regression'"),
    ({"loss": "crps"}, ValueError, "loss must be one of 'cross_entropy', got 'crps'"),
    ({"head": "affinity", "loss": "crps"}, ValueError, "loss must be one of 'affinity_loss', 'cross_entropy', got"),
    ({"head": "affinity", "adjust": "in_loss", "target_prior": "uniform"}, ValueError, 'adjust must be "after"'),
]]  # fmt: skip

# What each readout takes, and a value of it that is not the default.
PRIOR = {"target_prior": "uniform", "tau": 0.5, "adjust": "in_loss", "prior_kernel": None, "temperature": 2.0}
OF_BINS = {
    **PRIOR, "sigma": 3.0, "label_kernel": "laplace", "decode": "mode", "residual": True, "residual_weight": 0.2,
    "expectation_weight": 0.2,
}  # fmt: skip
OPTIONS: dict[str, tuple[Callable[..., LongTailModel], str, dict[str, Any]]] = {
    "PointReadout": (ages, "regression", {"within_axis": True, "prior_kernel": None}),
    "GaussianReadout": (ages, "gaussian", {"within_axis": True}),
    "BinsReadout": (ages, "linear", OF_BINS),
    "ClassReadout": (classes, "linear", PRIOR),
}


@pytest.mark.parametrize("readout", OPTIONS)
def test_a_readout_takes_its_own_options_and_no_others(readout: str) -> None:
    make, head, options = OPTIONS[readout]
    model = make(head=head, **options)
    assert type(model.readout).__name__ == readout
    assert {name: model.settings[name] for name in options} == options
    for name, value in {**OF_BINS, "within_axis": True, "margin": 3}.items():
        if name not in options:
            rule = rf"{name} must be an option of {readout}, got {name}={value!r}\. It takes {', '.join(options)}\."
            with pytest.raises(TypeError) as error:
                make(head=head, **{name: value})
            assert re.fullmatch(f"LongTailModel: {name} must be .*", str(error.value)), str(error.value)
            assert set(str(error.value).partition("It takes ")[2].rstrip(".").split(", ")) == set(options), rule


@pytest.mark.parametrize(("options", "error", "rule"), REFUSED, ids=text_of)
def test_options_are_refused(options: dict[str, Any], error: type[Exception], rule: str) -> None:
    arguments = {"backbone": net(), "num_features": 6, "bins": AGES, "density": AGE_DENSITY, **options}
    with pytest.raises(error, match=rf"^\w+(\.\w+)?: {rule}"):
        LongTailModel(**arguments)


def test_the_size_of_what_a_backbone_gives_counts() -> None:
    """Some backbones of timm have a last layer behind the features that they count."""
    backbone: Any = net()
    backbone.num_features, backbone.head_hidden_size = 4, 6
    assert LongTailModel(backbone, 6, AGES)(batch()[0]).features.shape == (9, 6)
    with pytest.raises(ShapeError, match="num_features must be the backbone's 4, got 5"):
        LongTailModel(backbone, 5, AGES)


def test_an_fds_serves_one_model() -> None:
    fds = FDS(AGES, 6)
    ages(fds=fds)
    with pytest.raises(ValueError, match=r"fds must not be attached yet.* Make one for each model\."):
        ages(fds=fds)


def test_an_axis_of_few_bins_has_no_window() -> None:
    few = Bins.uniform(0, 3, width=1)  # fewer than the usual window is long
    for options in ({"sigma": 0.5, "target_prior": "uniform"}, {"head": "regression", "loss": "balanced_mse"}):
        model = LongTailModel(net(), 6, few, density=LabelDensity(few, np.array([3, 2, 1])), **options)
        assert model(batch()[0], torch.full((9,), 1.5)).loss.isfinite()


def test_batches_are_refused() -> None:
    x, y = batch()
    model = ages()
    with pytest.raises(ValueError, match=r"^LongTailModel: weight needs labels, got labels=None"):
        model(x, weight=torch.ones(9))
    with pytest.raises(
        ShapeError, match=r"labels must be \(9,\), one per sample, got shape \(9, 1\)\. Use labels\.squeeze"
    ):
        model(x, y[:, None])
    with pytest.raises(ShapeError, match=r"labels must be \(9,\), one per sample, got shape \(9, 4, 4\)"):
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
    with pytest.raises(ShapeError, match=r"head must give one score per bin, \(N, 20\), got shape \(9, 19\)"):
        LongTailModel(net(), 6, AGES, head=nn.Sequential(nn.Linear(6, 19)))(x)
    with pytest.raises(ShapeError, match=r"head must give one score per bin, \(N, 20\), got tuple"):
        LongTailModel(net(), 6, AGES, head=nn.LSTM(6, 20))(x)
    with pytest.raises(ShapeError, match=r"output\.scores must be \(N, 20\), as this .*, got shape \(9, 2\)"):
        model.criterion(ages(head="gaussian")(x), y)


def test_maps_of_features_that_have_their_channels_first_are_refused() -> None:
    model = LongTailModel(nn.Conv2d(3, 6, 1), 6, AGES)
    rule = r"^LongTailModel: backbone must give features \(N, 6\), one .*got shape \(2, 6, 4, 4\)\. .*movedim\(1, -1\)"
    with pytest.raises(ShapeError, match=rule):
        model(torch.zeros(2, 3, 4, 4))
    model.backbone = nn.LSTM(3, 6)
    with pytest.raises(
        ShapeError, match=r"one row per sample, or .*, got tuple\. Let the backbone .* as output\[0\] of a GRU is"
    ):
        model(torch.zeros(2, 3))


def test_what_needs_a_distribution_says_so() -> None:
    x, _ = batch()
    model = ages(head="regression")
    for call, what in (
        (lambda: model.interval(model(x)), "interval: the readout must give intervals of a label, got a PointReadout"),
        (lambda: model.set_prior("uniform"), "set_prior: the readout must have a prior, got a PointReadout"),
        (lambda: classes().interval(classes()(x)), "interval: the readout must give intervals .*, got a ClassReadout"),
    ):
        with pytest.raises(UsageError, match=rf"^LongTailModel\.{what}"):
            call()
    for level in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"^LongTailModel\.interval: level must be > 0 and < 1"):
            ages().interval(ages()(x), level)
    with pytest.raises(ValueError, match=r"^LongTailModel\.set_prior: kernel must be one of 'auto', got 'none'"):
        ages().set_prior("uniform", kernel="none")
    with pytest.raises(ValueError, match="the training prior needs density"):
        LongTailModel(net(), 6, AGES).set_prior("uniform")
    with pytest.raises(ValueError, match=r"^LongTailModel\.set_prior: tau must be >= 0"):
        ages().set_prior("uniform", -1)


def test_repr_tells_the_settings() -> None:
    shown = repr(ages(head="regression"))
    assert "head='regression'" in shown
    assert "loss='weighted_l1', within_axis=False, prior_kernel='auto'" in shown
    assert "loss='cross_entropy', target_prior=None, tau=1.0" in repr(ages())


OVER_CLASSES_TOO: list[tuple[Callable[..., LongTailModel], dict[str, Any]]] = [
    *((ages, options) for options in VARIANTS),
    (ages, {"sigma": None, "decode": "mode"}),
    (ages, {"head": "regression", "loss": weighted_huber}),
    (classes, {}),
    (classes, {"head": "affinity"}),
    (classes, {"target_prior": "uniform", "adjust": "in_loss"}),
    (classes, {"loss": focal_loss}),
]

each_kind = pytest.mark.parametrize(("make", "options"), OVER_CLASSES_TOO, ids=text_of)


def labels_of(make: Callable[..., LongTailModel]) -> tuple[Tensor, Tensor, int]:
    """A batch, and what lies beyond its labels' axis."""
    return (*batch(), 23) if make is ages else (*class_batch(), 5)


@each_kind
def test_a_label_beyond_the_axis_raises_for_every_head(make: Any, options: dict[str, Any]) -> None:
    x, y, beyond = labels_of(make)
    for place in (beyond, -2):
        y[4] = place
        with pytest.raises(LabelError, match=r"labels must lie on the label axis .* at index \[4\]"):
            make(**options)(x, y)


@each_kind
def test_where_labels_are_not_looked_at_one_beyond_makes_the_loss_nan(
    make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, beyond = labels_of(make)
    model = make(**options)
    sound = model(x, y).loss
    for name, module in list(sys.modules.items()):
        for look in ("readable", "has_values"):
            if name.startswith("dir_toolkit.") and hasattr(module, look):
                monkeypatch.setattr(module, look, lambda tensor: False)
    torch.testing.assert_close(model(x, y).loss, sound)
    y[4] = beyond
    assert model(x, y).loss.isnan()
    assert each(model, model(x), y).isnan().tolist() == [i == 4 for i in range(9)]
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
    own, at_end = (each(model, out, labels)[4].item() for labels in (moved, end))
    if options.get("head") == "regression" and not callable(options.get("loss")) and "loss" not in options:
        assert own == pytest.approx(abs(out.scores[4].item() - beyond) / SPREAD, rel=1e-5)
    elif options.get("head") == "gaussian":
        assert own == pytest.approx(gaussian_nll(out.scores[4], moved[4], min_variance=1e-6 * SPREAD**2).item())
    elif options.get("expectation_weight"):
        expected = decode(out.scores.softmax(1), AGES, ends="open")[4].item()
        more = 0.1 / SPREAD * (abs(expected - beyond) - abs(expected - 20)) + 0.1 * (beyond - 20)
        assert own - at_end == pytest.approx(more, rel=1e-4)
    elif options.get("head") != "regression":
        assert own == pytest.approx(at_end)
    with_fds = make(**options, outside="clip", fds=FDS(model.bins, 6, kernel=triangular(3)))
    with_fds(x, moved)
    with_fds.fds.end_epoch()
    assert with_fds.fds.running_count.sum() == 9


def test_an_fds_must_drop_what_the_model_drops() -> None:
    with pytest.raises(ValueError, match="fds must have outside=\"drop\", as the model has, got 'raise'"):
        ages(outside="drop", fds=FDS(AGES, 6))
    x, y = batch(40)
    y[:5] = 99
    model = ages(outside="drop", fds=FDS(AGES, 6, outside="drop"))
    model(x, y).loss.backward()
    model.fds.end_epoch()
    assert model.fds.running_count.sum() == 35


def test_a_model_for_labels_has_their_axis_and_density_and_suits_the_metric() -> None:
    labels = np.random.default_rng(0).exponential(20, 500).round(1)
    model = LongTailModel.for_labels(nn.Linear(3, 8), 8, labels)
    assert model.bins == Bins.auto(labels)
    assert model.bins.why == Bins.auto(labels).why
    assert model.density == LabelDensity.count(labels, model.bins)
    chosen: list[tuple[str, Any, dict[str, Any]]] = [
        ("mae", {}, {"decode": "median"}),
        ("rmse", {"head": "cosine", "sigma": None}, {"decode": "expectation", "sigma": None}),
        ("mse", {"decode": "mode"}, {"decode": "mode"}),
        ("mse", {"head": "regression"}, {"loss": "weighted_mse"}),
        ("bmae", {"head": "regression"}, {"loss": "weighted_l1"}),
        ("mse", {"head": "gaussian"}, {"loss": "gaussian_nll"}),
    ]
    for metric, options, expected in chosen:
        settings = LongTailModel.for_labels(nn.Linear(3, 8), 8, labels, for_metric=metric, **options).settings
        assert {name: settings[name] for name in expected} == expected
    classes = LongTailModel.for_labels(nn.Linear(3, 8), 8, [0, 0, 2, 1], bins=Bins.classes(3))
    assert classes.density == LabelDensity(Bins.classes(3), np.array([2, 1, 1]))
    with pytest.raises(ValueError, match=r"^LongTailModel\.for_labels: for_metric must be left out for classes, got"):
        LongTailModel.for_labels(nn.Linear(3, 8), 8, [0, 1], bins=Bins.classes(3), for_metric="mae")
    with pytest.raises(ValueError, match=r"^LongTailModel\.for_labels: for_metric must be one of 'mae', 'bmae', "):
        LongTailModel.for_labels(nn.Linear(3, 8), 8, labels, for_metric="r2")
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (labels[:, None], {}, ShapeError, r"labels must be \(N,\), .* got shape \(500, 1\)\. Use labels\.squeeze\(1\)"),
        ([1.0, math.nan, 3.0], {"missing": "skip"}, ValueError, "missing must be one of 'raise', 'drop', got 'skip'"),
        (labels, {"weights": LDS(model.bins)}, NotFittedError, "weights are not fitted yet"),
    ]
    for of, options, error, rule in refused:
        with pytest.raises(error, match=rf"^LongTailModel\.for_labels: {rule}"):
            LongTailModel.for_labels(nn.Linear(3, 8), 8, of, **options)
