from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from small_models import AGE_DENSITY, AGES, ages, batch, net, seeded
from torch import Tensor, nn
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import ArgumentError, LabelError, ShapeError
from dir_toolkit.labels.soft_labels import limits, soft_labels
from dir_toolkit.longtail import VotingModel, VotingOutput
from dir_toolkit.longtail.voting import _spread

HEADS = pytest.mark.parametrize("head", ["gaussian", "linear", "corn"])
COUNTS = AGE_DENSITY.counts.astype(float)


def voting(**options: Any) -> VotingModel:
    return seeded(lambda: VotingModel(net(), 6, AGES, density=AGE_DENSITY, **options))


def inverse_weights(power: float, y: Tensor) -> np.ndarray:
    """By the formula, without smoothing."""
    weights = COUNTS**-power
    weights /= (COUNTS * weights).sum() / COUNTS.sum()
    return weights[AGES.index(y.numpy())]


def test_gaussian_heads_have_the_loss_and_the_vote_of_the_formula() -> None:
    x, y = batch()
    model = voting(kernel=None, heads=4).double()
    own = torch.linspace(0.5, 2, len(y)).double()
    for weight in (None, own):
        out = model(x.double(), y.double(), weight)
        scores = out.scores.detach().numpy()
        losses = []
        for m in range(4):
            mean, log_variance = scores[:, m].T
            least = 1e-6 * model.members[m].readout.spread ** 2  # type: ignore[operator, union-attr]
            variance = np.exp(log_variance) + least
            nll = ((y.numpy() - mean) ** 2 / variance + np.log(2 * np.pi * variance)) / 2
            given = 1 if weight is None else weight.numpy()
            losses.append(np.mean(given * inverse_weights(m / 3, y) * nll))
        assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-6)
    most_certain = (scores[:, :, 1]).argmin(1)
    assert out.most_certain.tolist() == most_certain.tolist()
    assert_close(out.prediction.detach(), torch.from_numpy(scores[np.arange(len(y)), most_certain, 0]))
    assert_close(out.spread, out.scores[..., 1].detach().div(2).exp(), rtol=1e-3, atol=1e-6)


def test_heads_over_bins_train_and_predict_under_priors_of_their_own() -> None:
    x, y = batch()
    model = voting(head="linear", heads=3).double()
    out = model(x.double(), y.double())
    prior = COUNTS @ soft_labels(torch.tensor(AGES.centers), AGES, 2.0, ends="open").numpy()
    prior /= prior.sum()
    target = soft_labels(y.double(), AGES, 2.0, ends="open").numpy()
    place = limits(AGES, torch.zeros((), dtype=torch.float64), ends="open").numpy()
    middles, widths = (place[1:] + place[:-1]) / 2, np.diff(place)
    losses, spreads = [], []
    for m, tau in enumerate((0, 0.5, 1)):
        scores = out.scores[:, m].detach().numpy()
        losses.append(-(target * log_softmax(scores + tau * np.log(prior), axis=1)).sum(1).mean())
        p = softmax(scores, axis=1)
        spreads.append(np.sqrt(p @ (middles**2 + widths**2 / 12) - (p @ middles) ** 2))
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-6)
    assert_close(out.spread, torch.from_numpy(np.stack(spreads, 1)), rtol=1e-5, atol=1e-6)
    most_certain = np.argmin(spreads, 0)
    assert out.most_certain.tolist() == most_certain.tolist()
    rows = softmax(out.scores.detach().numpy()[np.arange(len(y)), most_certain], axis=1)
    assert_close(out.distribution.detach(), torch.from_numpy(rows))


@HEADS
def test_one_head_is_the_plain_model(head: Any) -> None:
    x, y = batch()
    plain, model = ages(head=head), voting(head=head, heads=1)
    model.backbone.load_state_dict(plain.backbone.state_dict())
    model.members[0].head.load_state_dict(plain.head.state_dict())  # type: ignore[union-attr]
    expected, out = plain(x, y), model(x, y)
    assert_close(out.loss, expected.loss)
    assert_close(out.prediction, expected.prediction)
    for own, other in zip(model.interval(out, 0.8), plain.interval(expected, 0.8), strict=True):
        assert_close(own, other)
    assert (out.most_certain == 0).all()


@HEADS
def test_it_trains_as_one_module_and_its_state_comes_back(head: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=generator)
    y = 10 + 5 * torch.tanh(x[:, 0])
    model = voting(head=head)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    first = dt.weighted_l1(model(x).prediction, y).item()
    assert_close(model.criterion(model(x), y), model(x, y).loss)
    for _ in range(50):
        optimizer.zero_grad()
        loss = model(x, y).loss
        loss.backward()
        optimizer.step()
    assert dt.weighted_l1(model(x).prediction, y).item() < min(1.5, first / 2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    other = voting(head=head)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(twin(x).prediction, model(x).prediction)
    lower, upper = model.interval(model(x))
    assert (lower < upper).all()
    assert "heads=3" in repr(model)


def test_rare_labels_are_predicted_by_heads_of_rare_labels() -> None:
    """Inputs without any information: under its own prior each head answers with another middle, the last even."""
    density = dt.LabelDensity(AGES, np.array([100] * 4 + [1] * 16))
    model = VotingModel(nn.Identity(), 1, AGES, density=density, head="linear", sigma=None)
    y = torch.from_numpy(np.repeat(AGES.centers, density.counts)).float()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    x = torch.zeros(len(y), 1)
    for _ in range(150):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    shares = density.prior()
    for m, tau in enumerate((0, 0.5, 1)):
        own = model(x[:1]).scores[0, m].softmax(0).double()
        assert_close(own, torch.from_numpy(shares ** (1 - tau) / (shares ** (1 - tau)).sum()), rtol=0.3, atol=0.01)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^VotingModel: heads must be at most 100, got 4611686018427387904"):
        voting(heads=2**62)
    with pytest.raises(ValueError, match=r"^VotingModel: heads must be at least 1, got 0"):
        voting(heads=0)
    with pytest.raises(ValueError, match=r"^VotingModel: head must be one of 'gaussian', 'linear'"):
        voting(head="regression")
    with pytest.raises(TypeError, match=r"sigma must be an option of GaussianReadout"):
        voting(sigma=1.0)
    with pytest.raises(TypeError, match=r"nonsense must be an option of BinsReadout"):
        voting(head="linear", nonsense=1)
    for name in ("target_prior", "tau", "adjust"):
        with pytest.raises(TypeError, match=rf"{name} must be an option of GaussianReadout"):
            voting(**{name: None})
        with pytest.raises(ValueError, match=rf"^VotingModel: {name} must be left out, got {name}=None"):
            voting(head="linear", **{name: None})
    rule = r"^VotingModel: fds must be left out, got one\. Call fds\.attach\(model\.backbone, "
    with pytest.raises(ValueError, match=rule):
        voting(fds=dt.FDS(AGES, 6))
    weights = dt.LDS(AGES).fit(AGE_DENSITY)
    with pytest.raises(ValueError, match=r"^VotingModel: weights must be left out, got weights="):
        voting(weights=weights)
    assert all(member.weights is weights for member in voting(head="linear", weights=weights).members)
    for kernel in ("nonsense", None):
        with pytest.raises(ValueError, match=r'^VotingModel: kernel must be left out for head="linear", got '):
            voting(head="linear", kernel=kernel)
    model, (x, y) = voting(), batch()
    with pytest.raises(ShapeError, match=r"output.scores must be"):
        model.criterion(voting(heads=2)(x), y)
    with pytest.raises(TypeError, match=r"output must be a VotingOutput, got Tensor"):
        model.criterion(x, y)  # type: ignore[arg-type]
    with pytest.raises(LabelError, match=r"labels"):
        model(x, y + 100)
    clipped = voting(outside="clip")
    assert clipped(x, y + 100).loss.isfinite()
    assert isinstance(clipped(x), VotingOutput)
    assert math.isnan(clipped(x).loss.item())


def test_fds_calibrates_what_the_backbone_gives() -> None:
    """As the refusal of ``fds`` says."""
    model, fds, (x, y) = voting(), dt.FDS(AGES, 6), batch(200)
    fds.attach(model.backbone, "output")
    outputs = []
    for _ in range(2):
        with fds.labels(y):
            outputs.append(model(x, y))
        fds.end_epoch()
    plain, smoothed = outputs
    assert not torch.allclose(smoothed.features, plain.features)
    smoothed.loss.backward()
    assert model.backbone[0].weight.grad.abs().sum() > 0


def test_whole_weights_and_axes_of_large_numbers_lose_nothing() -> None:
    bins = dt.Bins.uniform(100_000, 100_020, width=0.5)
    density = dt.LabelDensity(bins, torch.arange(1, 41))
    x, y = torch.randn(4, 3), torch.tensor([100_001.0, 100_019.0, 100_017.0, 100_003.0], dtype=torch.float64)
    assert VotingModel(nn.Linear(3, 6), 6, bins, density=density, head="linear")(x).spread.isfinite().all()
    model = VotingModel(nn.Linear(3, 6), 6, bins, density=density)
    assert_close(model(x, y, torch.tensor([1, 1, 1, 0])).loss, model(x, y, torch.tensor([1.0, 1, 1, 0])).loss)


def test_classes_and_sequences_are_refused() -> None:
    classes = dt.Bins.classes(3)
    with pytest.raises(ArgumentError, match="bins must cut a continuous label axis"):
        VotingModel(nn.Linear(3, 6), 6, classes, density=dt.LabelDensity(classes, [3, 2, 1]), head="linear")
    bins = dt.Bins.uniform(0, 20, width=1)
    model = VotingModel(nn.Linear(3, 6), 6, bins, density=dt.LabelDensity(bins, torch.arange(1, 21)))
    with pytest.raises(ShapeError, match=r"features must be \(N, 6\)"):
        model(torch.randn(2, 5, 3))


def test_the_same_head_votes_under_autocast() -> None:
    bins = dt.Bins.uniform(0, 100, width=1)
    model: Any = VotingModel(nn.Identity(), 4, bins, density=dt.LabelDensity.count(bins.centers, bins), head="linear")
    labels = torch.full((3,), 92.3)
    scores = torch.stack([soft_labels(labels, bins, sigma, ends="open") for sigma in (2.0, 1.5, 1.0)], 1).log()
    with torch.no_grad():
        outputs = [
            member.readout(scores[:, m].clamp_min(-80), torch.zeros(3, 4), torch.zeros(3, 4))
            for m, member in enumerate(model.members)
        ]
    plain = [_spread(*pair) for pair in zip(model.members, outputs, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        half = [_spread(*pair) for pair in zip(model.members, outputs, strict=True)]
    for one, other in zip(plain, half, strict=True):
        assert other.dtype == torch.float32
        assert_close(one, other)


def test_intervals_of_gaussian_heads_stay_on_the_axis_if_predictions_do() -> None:
    model = voting(within_axis=True)
    out = model(100 * batch()[0])
    lower, upper = model.interval(out)
    first, last = AGES.edges[[0, -1]]
    assert ((first <= lower) & (upper <= last)).all()
    assert ((lower <= out.prediction) & (out.prediction <= upper)).all()
    lower, upper = voting().interval(voting()(100 * batch()[0]))
    assert (lower < first).any() or (upper > last).any()


def test_a_weight_needs_labels() -> None:
    x, y = batch()
    with pytest.raises(ArgumentError, match="weight needs labels, got labels=None"):
        voting()(x, None, torch.ones(len(y)))


@pytest.mark.parametrize("label", [math.nan, 500.0, -3.0])
def test_weights_take_the_labels_that_the_heads_drop_or_clip(label: float) -> None:
    x, y = batch()
    y[0] = label
    placing: Any = {"missing": "drop"} if math.isnan(label) else {"outside": "clip"}
    for bins in (AGES, dt.Bins.uniform(0, 20, width=2)):  # the weights' own axis, too
        lds = dt.LDS(bins).fit(batch(200)[1])
        model = voting(head="linear", weights=lds, **placing)
        assert_close(model(x, y, torch.ones(len(y))).loss, model(x, y).loss)
        twice = model(x, y, torch.full((len(y),), 2.0)).loss
        assert_close(twice, 2 * model(x, y).loss)


def test_it_is_exported_and_saved_for_batches_of_any_size(tmp_path: Path) -> None:
    model = voting().eval()
    sizes = ({0: torch.export.Dim("samples", min=2)},)
    torch.export.save(torch.export.export(model, (batch(8)[0],), dynamic_shapes=sizes), tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    x = batch(5)[0]
    assert_close(again(x).prediction, model(x).prediction)
    assert torch.equal(again(x).most_certain, model(x).most_certain)
