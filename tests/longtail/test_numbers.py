from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_models import AGE_DENSITY, AGES, SPREAD, ages, batch, net, seeded
from torch import nn

from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel, LongTailOutput
from dir_toolkit.losses.gaussian_nll import gaussian_nll
from dir_toolkit.losses.regression import weighted_l1


def test_regression_is_offset_plus_scale_times_head() -> None:
    model = LongTailModel(nn.Flatten(), 3, AGES, head="regression")
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
        model.head.bias.fill_(0.5)
    model.readout.offset.fill_(30)
    model.readout.scale.fill_(2)
    out = model(torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([19.0]))
    assert out.prediction.tolist() == [30 + 2 * (5 - 2 + 0.5)]
    assert out.loss.item() == pytest.approx((37 - 19) * math.sqrt(12) / 20)  # in standard deviations of even labels
    assert {"readout.offset", "readout.scale"} <= set(dict(model.named_buffers()))


def test_regression_is_its_parts_to_the_bit_and_starts_where_labels_are() -> None:
    x, y = batch()
    model = ages(head="regression")
    labels = np.repeat(AGES.centers, AGE_DENSITY.counts)
    spread = math.sqrt(labels.var() + 1 / 12)  # labels are taken to fill their bins
    assert model.readout.scale.item() == pytest.approx(spread, rel=1e-6)
    assert abs(model.readout.offset.item() - np.median(labels)) < 0.5

    parts = seeded(lambda: nn.Sequential(net(), nn.Linear(6, 1), nn.Flatten(0)))
    pred = model.readout.offset + model.readout.scale * parts(x)
    out = model(x, y)
    assert torch.equal(out.scores, pred)
    assert torch.equal(out.prediction, pred)
    assert torch.equal(out.loss, weighted_l1(pred, y) / spread)
    assert out.distribution.shape == (9, 0)
    evenly = seeded(lambda: LongTailModel(net(), 6, AGES, head="regression"))
    assert evenly.readout.offset.item() == pytest.approx(10)
    assert evenly.readout.scale.item() == pytest.approx(20 / math.sqrt(12))


@pytest.mark.parametrize(
    "loss", ["weighted_mse", "weighted_huber", "weighted_focal_l1", "weighted_focal_mse", "balanced_mse"]
)
def test_regression_losses_are_given_by_name(loss: str) -> None:
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
    mean = model.readout.offset + model.readout.scale * raw[:, 0]
    assert torch.equal(out.prediction, mean)
    least = 1e-6 * model.readout.scale.item() ** 2
    torch.testing.assert_close(out.loss, gaussian_nll(out.scores, y, min_variance=least))
    torch.testing.assert_close(out.scores[:, 1].exp(), model.readout.scale**2 * raw[:, 1].exp())
    lower, upper = model.interval(out, 0.6827)  # one standard deviation
    torch.testing.assert_close((upper - lower) / 2, model.readout.scale * (raw[:, 1] / 2).exp(), rtol=1e-3, atol=0)
    assert torch.equal(model.interval(out.scores, 0.6827)[0], lower)


@pytest.mark.filterwarnings("ignore:.*effective sample size")
def test_balanced_mse_integrates_over_the_labels_as_the_loss_sees_them() -> None:
    weights = LDS(AGES, kernel=None, scheme="inverse").fit(AGE_DENSITY)
    model = ages(head="regression", loss="balanced_mse", weights=weights, prior_kernel=None)
    torch.testing.assert_close(model.readout.loss.prior, torch.full((20,), 0.05))


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


def test_the_least_variance_is_of_the_labels_own() -> None:
    for unit in (1.0, 1e-3, 1e-5, 1e5):
        bins = Bins.uniform(0, 20 * unit, count=20)
        density = LabelDensity(bins, AGE_DENSITY.counts)
        model = LongTailModel(net(), 6, bins, density=density, head="gaussian")
        certain = torch.tensor([[5 * unit, -200.0]])
        output = LongTailOutput(torch.zeros(()), certain, certain[:, 0], certain, certain, certain)
        lower, upper = model.interval(output, 0.6827)
        assert ((upper - lower) / 2).item() == pytest.approx(1e-3 * SPREAD * unit, rel=1e-3)


@pytest.mark.parametrize("options", [{"head": "regression", "loss": "weighted_mse"}, {"head": "gaussian"}], ids=str)
def test_labels_whose_squares_leave_float32_are_refused(options: Any) -> None:
    for unit in (1e-18, 1e17):
        density = LabelDensity(Bins.uniform(0, 20 * unit, count=20), AGE_DENSITY.counts)
        with pytest.raises(ValueError, match=r"^LongTailModel: labels must have a spread from 1e-15 to 1e15 for loss="):
            LongTailModel(net(), 6, density.bins, density=density, **options)
    for unit in (1e-15, 1e14):
        x, y = batch()
        density = LabelDensity(Bins.uniform(0, 20 * unit, count=20), AGE_DENSITY.counts)
        model = seeded(lambda density=density: LongTailModel(net(), 6, density.bins, density=density, **options))
        shift = 0 if options["head"] == "regression" else math.log(unit)  # of a log-likelihood
        assert model(x, y * unit).loss.item() - shift == pytest.approx(ages(**options)(x, y).loss.item(), rel=1e-4)
