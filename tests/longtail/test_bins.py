from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from small_models import AGE_DENSITY, AGES, SPREAD, ages, batch, net, seeded
from torch import nn

from dir_toolkit.errors import DirToolkitWarning
from dir_toolkit.features.fds import FDS
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.decoding import decode
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.longtail import LongTailModel, LongTailOutput
from dir_toolkit.longtail.readouts import Placed
from dir_toolkit.losses.distribution import crps
from dir_toolkit.losses.regression import weighted_l1


def test_the_loss_is_that_worked_out_by_hand() -> None:
    bins = Bins.uniform(0, 4, width=2)
    density = LabelDensity(bins, np.array([3, 1]))
    model = LongTailModel(nn.Flatten(), 1, bins, density=density, sigma=0, target_prior="uniform", decode="expectation")
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
    settings = {
        "target_prior": "uniform",
        "tau": 0.6,
        "adjust": adjust,
        "expectation_weight": 0.3,
        "decode": "expectation",
    }
    model = ages(**settings).double()
    out = model(x.double(), y.double(), weight := torch.linspace(0.5, 2, len(y)).double())
    spread = np.zeros(20)
    for count, center in zip(AGE_DENSITY.counts, AGES.centers, strict=True):
        spread += count * soft_labels(torch.tensor(center), AGES, 2.0, ends="open").numpy()
    prior = spread / spread.sum()
    centers = [0, *AGES.centers[1:-1], 20]  # of bins that reach a year beyond the axis
    moved = (0.6 * np.log(prior)).astype(np.float32).astype(np.float64)
    values, expected = [], []
    for i in range(len(y)):
        s = out.scores[i].detach().numpy()
        seen = s + moved if adjust == "in_loss" else s
        target = soft_labels(y[i].double(), AGES, 2.0, ends="open").numpy()
        off = abs(softmax(seen) @ centers - y[i].item())
        values.append(weight[i].item() * (-(target * log_softmax(seen)).sum() + 0.3 * off / SPREAD))
        expected.append(softmax(s if adjust == "in_loss" else s - moved) @ centers)
    assert out.loss.item() == pytest.approx(np.mean(values), rel=1e-12)
    np.testing.assert_allclose(out.prediction.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["expectation", "median", "mode"])
def test_predictions_are_decoded(kind: Any) -> None:
    out = ages(decode=kind)(batch()[0])
    assert torch.equal(out.prediction, decode(out.distribution, AGES, kind, ends="open"))
    if kind == "median":
        assert torch.equal(ages()(batch()[0]).prediction, out.prediction)


@pytest.mark.parametrize("integer", [False, True])
def test_labels_at_both_ends_of_the_axis_are_reached(integer: bool) -> None:
    """A head that gives exactly the soft labels it is trained on, where many labels lie at either end."""
    axis = Bins.uniform(0, 20, width=1, integer=integer)
    y = torch.arange(20.0) if integer else torch.tensor([0.0, 0.2, 0.6, 1.0, 10.0, 19.1, 19.9, 20.0])
    model = LongTailModel(nn.Identity(), 20, axis, density=LabelDensity.count(y, axis), head=nn.Identity())
    scores = model.readout.target(Placed(axis.index(y), y, y)).clamp_min(1e-30).log()
    torch.testing.assert_close(model(scores).prediction, y, rtol=0, atol=1e-4 if integer else 0.04)
    lower, upper = model.interval(model(scores), 0.9)
    assert ((lower <= y + 1e-4) & (y <= upper + 1e-4) & (lower >= axis.edges[0] - 0.5) & (upper <= 20)).all()
    hard = LongTailModel(nn.Identity(), 20, axis, head=nn.Identity(), sigma=None)
    assert hard(100 * torch.eye(20)).prediction.tolist() == axis.centers.tolist()


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        ("linear", "cross_entropy"),
        ("linear", "crps"),
        ("cosine", "squared_emd"),
        ("affinity", "cross_entropy"),
        ("affinity", "squared_emd"),
    ],
)
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
    target = soft_labels(y, AGES, 2.0, ends="open")
    torch.testing.assert_close(out.loss, -(target * out.scores.log().log_softmax(1)).sum(1).mean())


def test_an_affinity_of_zero_has_finite_slopes() -> None:
    model = ages(head="affinity")
    far = 100 * torch.ones(2, 6)
    model.backbone = nn.Identity()
    model(far.requires_grad_(), torch.tensor([1.0, 2.0])).loss.backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    assert model.head.weight.grad.isfinite().all()


def test_intervals_hold_their_share() -> None:
    model = ages(target_prior="uniform")
    out = model(batch()[0])
    lower, upper = model.interval(out, level=0.5)
    again = model.interval(out.distribution, level=0.5)
    assert torch.equal(lower, again[0])
    assert torch.equal(upper, again[1])
    wide = model.interval(out)
    assert (wide[0] < lower).all()
    assert (upper < wide[1]).all()
    assert ((lower <= out.prediction) & (out.prediction <= upper)).all()


def test_residual_is_an_offset_in_the_decoded_bin() -> None:
    bins = Bins.uniform(0, 20, width=10)
    x, y = batch()
    make = lambda: LongTailModel(net(), 6, bins, sigma=None, residual=True, residual_weight=0.3)  # noqa: E731
    model = seeded(make)
    out = model(x, y)
    assert out.residual.shape == (9, 2)
    assert torch.equal(out.residual, 5 * model.readout.residual(out.features).tanh())
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
    assert model.readout.reach.tolist() == [5.5, 5.5]  # from 4.5 up to 10, which the bin does not hold any more


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
        for _ in range(100):
            optimizer.zero_grad()
            model(x, y).loss.backward()
            optimizer.step()
        return weighted_l1(model(x).prediction, y).item()

    coarse = error(False)
    assert coarse > 2  # the mean distance to the centre of a bin of ten is 2.5
    assert error(True) < coarse / 2


def test_an_offset_in_a_bin_does_not_hide_scores_that_are_not_finite() -> None:
    model = ages(residual=True)
    model.head.weight.data[0] = math.nan
    out = model(batch()[0])
    assert out.residual.isfinite().all()
    assert out.prediction.isnan().all()


def test_residuals_read_calibrated_features_too() -> None:
    x, y = batch(40)
    model = ages(fds=FDS(AGES, 6, momentum=0.0), residual=True)
    before = model(x, y).residual
    model.fds.end_epoch()
    assert not torch.equal(model(x, y).residual, before)


def test_two_bins_are_two_bins_wherever_they_lie() -> None:
    bins = Bins.from_edges(np.geomspace(1, 1e6, 61))
    model = LongTailModel(nn.Identity(), 60, bins, loss="cross_entropy")
    y = torch.tensor([2.0, 20.0, 200.0, 3e5])
    target = soft_labels(y, bins, 2.0, unit="bin", ends="open")
    scores = target.log()
    out = LongTailOutput(torch.zeros(()), scores, y, scores, target, torch.zeros(4, 0))
    entropy = -(target * target.clamp_min(1e-30).log()).sum(1)
    torch.testing.assert_close(model.criterion(out, y), entropy.mean(), rtol=1e-4, atol=1e-4)
    for i in range(4):
        alone = LongTailOutput(out.loss, *(part[[i]] for part in out[1:]))
        torch.testing.assert_close(model.criterion(alone, y[[i]]), entropy[i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(target, bins, "median", ends="open"), y, rtol=0.05, atol=0)


def test_labels_whose_density_was_warned_of_are_not_told_again() -> None:
    bins, labels = Bins.uniform(0, 1000, count=50), [1.0] * 90 + [25.0, 900.0]
    with pytest.warns(DirToolkitWarning, match=r"^LabelDensity\.count: 98% of the labels lie in one of 50 bins"):
        density = LabelDensity.count(labels, bins)
    LongTailModel(net(), 6, bins, density=density)
    with pytest.warns(DirToolkitWarning, match=r"sigma=30 is larger than the interquartile range"):
        LongTailModel(net(), 6, bins, density=density, sigma=30)  # of one's own choice
    with pytest.warns(DirToolkitWarning, match=r"sigma=40 is larger than the interquartile range"):
        LongTailModel(net(), 6, bins, density=LabelDensity(bins, density.counts))


def test_labels_narrower_than_they_are_spread_are_told() -> None:
    bins = Bins.uniform(0, 1000, count=50)
    density = LabelDensity(bins, np.array([900, 60] + [1] * 48))
    with pytest.warns(DirToolkitWarning, match=r"sigma=40 is larger than the interquartile range of the lab"):
        LongTailModel(net(), 6, bins, density=density)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LongTailModel(net(), 6, bins, density=density, sigma=1.0)
        LongTailModel(net(), 6, bins, density=density, head="regression")
        LongTailModel(net(), 6, bins, density=density, loss="crps")


def test_soft_labels_as_wide_as_the_axis_are_told() -> None:
    with pytest.warns(DirToolkitWarning, match=r"sigma=2 spreads each .* an axis 1 long.*bins=Bins\.classes\(n\)"):
        LongTailModel(net(), 6, Bins.uniform(0, 1, count=10), sigma=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LongTailModel(net(), 6, Bins.uniform(0, 1, count=10)).readout.sigma == pytest.approx(0.2)  # two bins
        LongTailModel(net(), 6, Bins.uniform(0, 1, count=10), loss="crps")
