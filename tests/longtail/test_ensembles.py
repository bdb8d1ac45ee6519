from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from small_models import AGE_DENSITY, AGES, CLASS_DENSITY, CLASSES, ages, batch, net, seeded
from torch import nn
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.labels.decoding import decode
from dir_toolkit.labels.soft_labels import soft_labels
from dir_toolkit.longtail import LongTailModel, ensemble

PRIOR = AGE_DENSITY.counts @ soft_labels(torch.tensor(AGES.centers), AGES, 2.0, ends="open").numpy()


def several(count: int = 3, bins: dt.Bins = AGES, density: Any = AGE_DENSITY, **options: Any) -> list[LongTailModel]:
    """Models with seeds of their own."""
    return [
        seeded(lambda: LongTailModel(net(), 6, bins, density=density, **options), seed).eval() for seed in range(count)
    ]


@pytest.mark.parametrize("head", ["linear", "cosine", "coral", "corn", "affinity"])
def test_the_distribution_is_the_mean_of_those_of_the_models(head: str) -> None:
    models = [model.double() for model in several(head=head)]
    x = batch()[0].double()
    each = [model(x).distribution.detach().numpy() for model in models]
    out = ensemble(models)(x)
    assert_close(out.distribution.detach().numpy(), np.mean(each, 0), rtol=1e-5, atol=1e-8)
    expected = decode(torch.from_numpy(np.mean(each, 0)), AGES, "median", ends="open")
    assert_close(out.prediction.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*the best temperature")  # of labels that nothing tells
def test_priors_temperatures_and_biases_of_the_models_have_no_influence() -> None:
    models, (x, y) = several(), batch(200)
    before = ensemble(models)(x)
    for model in models:
        model.calibrate([(x, y)], most_mae=None, bias=True)
    assert_close(ensemble(models)(x).distribution, before.distribution)
    mean = ensemble(models)
    mean.set_prior("uniform", 0.7)
    adjusted = before.distribution.detach().numpy() / PRIOR**0.7
    assert_close(
        mean(x).distribution.detach().numpy(),
        (adjusted / adjusted.sum(1, keepdims=True)).astype("f"),
        rtol=1e-4,
        atol=1e-6,
    )


def test_models_that_were_adjusted_in_the_loss_are_averaged_under_the_training_prior() -> None:
    models, x = several(adjust="in_loss", target_prior="uniform", tau=0.5), batch()[0]
    each = [softmax(model(x).scores.detach().numpy() + 0.5 * np.log(PRIOR), 1) for model in models]
    mean = ensemble(models)
    assert_close(mean(x).distribution.detach().numpy(), np.mean(each, 0).astype("f"), rtol=1e-4, atol=1e-6)
    assert mean.settings["adjust"] == "after"


@pytest.mark.parametrize("loss", ["cross_entropy", "crps", "squared_emd", lambda scores, target, weight: scores.mean()])
def test_the_training_prior_and_the_options_are_those_of_the_models(loss: Any) -> None:
    lds = dt.LDS(AGES).fit(AGE_DENSITY)
    first, *others = several(loss=loss, weights=lds, decode="expectation", outside="clip", missing="drop")
    mean = ensemble([first, *others])
    for name in ("decode", "outside", "missing", "sigma", "label_kernel", "prior_kernel"):
        assert mean.settings[name] == first.settings[name], name
    priors = [one.readout.training_prior(one.readout.chosen_kernel("auto"), lds) for one in (mean, first)]  # type: ignore[operator]
    assert torch.equal(*priors)
    assert mean.readout.ends == first.readout.ends


def test_it_is_calibrated_read_and_saved_as_any_model(tmp_path: Path) -> None:
    x, y = batch(300)
    for _ in range(2):
        mean = ensemble(several())
        choice = mean.calibrate([(x, y)])
        mean.calibrate_intervals([(x, y)], level=0.8)
        table = mean.predict(x)
    assert choice.tau == mean.settings["tau"]
    assert set(table) == {"prediction", "lower", "upper", "region"}
    mean.save(tmp_path / "mean.safetensors")
    fresh = ensemble([ages() for _ in range(3)]).backbone
    again = dt.load(tmp_path / "mean.safetensors", fresh, head=nn.Identity())
    assert again.predict(x).identical(table)


def test_it_predicts_without_dropout_and_still_trains() -> None:
    backbone = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5))
    mean = ensemble([LongTailModel(backbone, 6, AGES, density=AGE_DENSITY)] * 2)
    x, y = batch()
    assert torch.equal(mean(x).scores, mean(x).scores)
    assert not any(module.training for module in mean.modules())
    mean.train()(x, y).loss.backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_one_model_twice_is_saved_and_loaded_as_two(tmp_path: Path) -> None:
    model, x = ages().eval(), batch()[0]
    ensemble([model, model]).save(tmp_path / "mean.safetensors")
    backbone = ensemble([ages(), ages()]).backbone
    again = dt.load(tmp_path / "mean.safetensors", backbone, head=nn.Identity())
    assert_close(again(x).distribution, model(x).distribution)


def test_a_state_that_is_refused_leaves_the_fds_of_the_models_alone() -> None:
    mean, other = (ensemble([ages(fds=dt.FDS(AGES, 6)) for _ in range(2)]) for _ in range(2))
    models: Any = mean.backbone.models
    trained: Any = other.backbone.models
    for model in trained:
        model.train()(*batch())
        model.fds.end_epoch()
    state = other.state_dict()
    del state["backbone.models.1.head.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        mean.load_state_dict(state)
    assert all(model.fds.statistics()["count"].sum() == 0 for model in models)
    assert all(model.fds.statistics()["count"].sum() > 0 for model in trained)


def test_models_of_a_smoothed_density_are_averaged_and_warnings_are_not_repeated() -> None:
    models, x = several(density=AGE_DENSITY.smooth(dt.gaussian(5, 2)), prior_kernel=None), batch()[0]
    each = torch.stack([model(x).distribution for model in models])
    assert_close(ensemble(models)(x).distribution, each.mean(0), rtol=1e-4, atol=1e-6)
    with pytest.warns(dt.errors.DirToolkitWarning, match="spreads each label"):
        wide = ages(sigma=9.0)
    ensemble([wide])


def test_classes_sequences_and_inputs_of_several_parts() -> None:
    x = batch()[0]
    of_classes = several(bins=CLASSES, density=CLASS_DENSITY, head="affinity")
    each = torch.stack([model(x).distribution for model in of_classes])
    assert_close(ensemble(of_classes)(x).distribution, each.mean(0), rtol=1e-4, atol=1e-6)
    steps = x.expand(4, *x.shape)
    mean = ensemble(several())
    assert_close(mean(steps).distribution[2], mean(x).distribution)

    class Parts(nn.Module):
        def forward(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
            return parts["a"] * parts["b"]

    joined = ensemble([LongTailModel(Parts(), 3, AGES, density=AGE_DENSITY) for _ in range(2)])
    assert joined({"a": x, "b": x}).prediction.shape == x.shape[:1]


def test_scores_far_apart_stay_finite() -> None:
    models = several(2)
    for model, sign in zip(models, (1, -1), strict=True):
        model.head.weight.data.mul_(1e4 * sign)  # type: ignore[operator, union-attr]
    out = ensemble(models)(batch()[0])
    assert out.scores.isfinite().all()
    assert_close(out.distribution.sum(1), torch.ones(9))


def test_it_is_exported() -> None:
    mean, x = ensemble(several()), batch()[0]
    graph = torch.export.export(mean, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    assert_close(graph(x[:5]).prediction, mean(x[:5]).prediction)


def weighted(high: float) -> LongTailModel:
    """A model with weights over an axis up to ``high``, whose table is the same for all."""
    bins = dt.Bins.uniform(0, high, count=20)
    return ages(weights=dt.LDS(bins).fit(dt.LabelDensity(bins, AGE_DENSITY.counts)))


def narrower() -> LongTailModel:
    bins = dt.Bins.uniform(0, 20, width=2)
    return LongTailModel(net(), 6, bins, density=dt.LabelDensity(bins, np.arange(1, 11)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: ages(head="regression"),
            r"models\[1\] must score bins, without residual, got a PointReadout. Take the",
        ),
        (lambda: ages(residual=True), r"models\[1\] must score bins, without residual, got a Bins"),
        (lambda: ages(sigma=1.0), r"models\[1\] must have the sigma of models\[0\], got another one"),
        (lambda: ages(label_kernel="laplace"), r"models\[1\] must have the label_kernel of"),
        (
            lambda: ages(density=None),
            r"models\[1\] must have the density of models\[0\], got another one. Train all on",
        ),
        (lambda: ages(weights=dt.LDS(AGES).fit(AGE_DENSITY)), r"models\[1\] must have the weights of"),
        (lambda: weighted(40), "must have the weights of models.0., got another one. Train all on"),
        (narrower, r"models\[1\] must be over the same bins"),
        (net, r"models\[1\] must be a LongTailModel"),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(other: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ensemble([weighted(20) if "models.0." in message else ages(), other()])


def test_models_must_be_a_list_with_one_at_least() -> None:
    with pytest.raises(ValueError, match="models must hold at least one"):
        ensemble([])
    with pytest.raises(TypeError, match="models must be"):
        ensemble(ages())  # type: ignore[arg-type]
    alone = several(1)
    assert_close(ensemble(alone)(batch()[0]).distribution, alone[0](batch()[0]).distribution)
    assert ensemble([ages(density=None)]).density is None
