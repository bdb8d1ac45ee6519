"""What holds of every loss of the package."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.losses.balanced_mse import BatchMCLoss, BinnedIntegrationLoss, GaussianMixtureLoss
from dir_toolkit.losses.center import CenterLoss, center_loss
from dir_toolkit.losses.conr import ConRLoss, conr_loss
from dir_toolkit.losses.cross_entropy import (
    balanced_cross_entropy,
    cross_entropy,
    equalization_loss,
    ldam_loss,
    logit_adjusted_cross_entropy,
    pairwise_cross_entropy,
)
from dir_toolkit.losses.distribution import crps, soft_cross_entropy, squared_emd
from dir_toolkit.losses.rank_n_contrast import rank_n_contrast
from dir_toolkit.losses.regression import (
    weighted_focal_l1,
    weighted_focal_mse,
    weighted_huber,
    weighted_l1,
    weighted_mse,
)

BINS = dt.Bins.uniform(0, 10, count=5)
PRIOR = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
MARGINS = torch.zeros(5, 5)
CENTERS = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))

# Each is called with what a network puts out, labels and weights.
POINTS: dict[str, Callable[..., Tensor]] = {
    "l1": weighted_l1,
    "mse": weighted_mse,
    "huber": weighted_huber,
    "focal l1": weighted_focal_l1,
    "focal mse": weighted_focal_mse,
    "mixture": GaussianMixtureLoss([0.5, 0.5], [2.0, 5.0], [0.0, 1.0], learn=False),
    "bins": BinnedIntegrationLoss(BINS, PRIOR, learn=False),
    "bins, others dropped": BinnedIntegrationLoss(BINS, PRIOR, learn=False, outside="drop"),
}
PAIRS: dict[str, Callable[..., Tensor]] = {"gaussian_nll": dt.gaussian_nll}
SCORES: dict[str, Callable[..., Tensor]] = {
    "crps": lambda s, y, w=None, **how: crps(s, y, w, bins=BINS, **how),
    "crps, others dropped": lambda s, y, w=None, **how: crps(s, y, w, bins=BINS, outside="drop", **how),
    "soft cross-entropy": lambda s, y, w=None, **how: soft_cross_entropy(s, soft(y), w, prior=PRIOR, **how),
    "squared_emd": lambda s, y, w=None, **how: squared_emd(s, soft(y), w, bins=BINS, **how),
}
CLASSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "adjusted": lambda s, y, w=None, **how: logit_adjusted_cross_entropy(s, y, PRIOR, weight=w, **how),
    "pairwise": lambda s, y, w=None, **how: pairwise_cross_entropy(s, y, w, margins=MARGINS, **how),
    "balanced": lambda s, y, w=None, **how: balanced_cross_entropy(s, y, w, prior=PRIOR, **how),
    "ldam": lambda s, y, w=None, **how: ldam_loss(s.tanh(), y, w, counts=PRIOR, **how),
    "equalization": lambda s, y, w=None, **how: equalization_loss(s, y, w, prior=PRIOR, threshold=0.2, **how),
    "focal": dt.focal_loss,
    "affinity": dt.affinity_loss,
    "center": lambda z, y, w=None, **how: center_loss(z, y, w, centers=CENTERS, **how),
}
WHOLE: dict[str, Callable[..., Tensor]] = {  # of the batch as a whole
    "batch": lambda z, y, w=None, **how: BatchMCLoss()(z[:, 0], y, w, **how),
    "conr": lambda z, y, w=None, **how: conr_loss(z, y, w, pred=y.flip(0), omega=1.0, **how),
    "rank-n-contrast": rank_n_contrast,
    "conr and l1": lambda z, y, w=None, **how: ConRLoss()(SimpleNamespace(prediction=z[:, 0], features=z), y, w, **how),
}
ALL = {**POINTS, **PAIRS, **SCORES, **CLASSES, **WHOLE}


def soft(labels: Tensor) -> Tensor:
    return dt.soft_labels(labels, BINS, 1.0, outside="drop")


def samples(name: str, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n,) if name in POINTS else (n, 2) if name in PAIRS else (n, 5)
    outputs = 2 * torch.randn(shape, generator=generator)
    labels = 10 * torch.rand(n, generator=generator) ** 2
    if name in CLASSES:
        labels = torch.randint(0, 5, (n,), generator=generator)
    return outputs, labels, torch.rand(n, generator=generator) + 0.5


@pytest.mark.parametrize("name", [*POINTS, *PAIRS, *SCORES, *CLASSES])
def test_gradients_of_each_sample_are_those_of_a_loop(name: str) -> None:
    loss = ALL[name]
    outputs, labels, weight = samples(name)

    def of_one(output: Tensor, label: Tensor, w: Tensor) -> Tensor:
        return loss(output[None], label[None], w[None])

    expected = []
    for row in zip(outputs, labels, weight, strict=True):
        own = row[0].clone().requires_grad_()
        of_one(own, *row[1:]).backward()
        expected.append(own.grad)
    given = vmap(grad(of_one))(outputs, labels, weight)
    assert_close(given, torch.stack(expected))  # type: ignore[arg-type]
    # Weights that are learnt.
    by_weight = grad(lambda w: loss(outputs, labels, w, reduction="sum"))(weight)
    assert_close(by_weight, loss(outputs, labels, reduction="none"))


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_a_batch_are_autograd_s(name: str) -> None:
    outputs, labels, weight = samples(name)
    own = outputs.clone().requires_grad_()
    ALL[name](own, labels, weight).backward()
    assert_close(grad(ALL[name])(outputs, labels, weight), own.grad)


@pytest.mark.parametrize("learn", [True, False])
def test_modules_of_losses_work_under_torch_func(learn: bool) -> None:
    outputs, labels, _ = samples("l1")
    for loss in (
        BatchMCLoss(learn=learn),
        BatchMCLoss(0.5, learn=learn),
        BinnedIntegrationLoss(BINS, PRIOR, learn=learn),
        GaussianMixtureLoss([1.0], [2.0], [3.0], learn=learn),
    ):
        for mode in (True, False):
            loss.train(mode)
            own = outputs.clone().requires_grad_()
            loss(own, labels).backward()
            assert_close(grad(lambda p, loss=loss: loss(p, labels))(outputs), own.grad)
            if learn:
                params = {name: p.detach() for name, p in loss.named_parameters()}
                of_params = grad(lambda p, loss=loss: functional_call(loss, p, (outputs, labels)))(params)
                assert_close(of_params["log_sigma"], loss.log_sigma.grad)
                loss.log_sigma.grad = None
        both = vmap(grad(lambda p, y, loss=loss: loss(p, y)))(outputs.view(2, 4), labels.view(2, 4))
        each = [
            grad(lambda p, y, loss=loss: loss(p, y))(*half)
            for half in zip(outputs.view(2, 4), labels.view(2, 4), strict=True)
        ]
        assert_close(both, torch.stack(each))


@pytest.mark.parametrize("name", [*POINTS, *PAIRS, *SCORES])
def test_a_missing_label_of_weight_zero_leaves_no_trace(name: str) -> None:
    """On the CPU as on an accelerator, where labels are not looked at."""
    if name in ("soft cross-entropy", "squared_emd"):
        pytest.skip("their targets are distributions")
    outputs, labels, weight = samples(name)
    weight[3] = 0
    missing = labels.clone()
    missing[3] = torch.nan
    a, b = outputs.clone().requires_grad_(), outputs.clone().requires_grad_()
    one, other = ALL[name](a, labels, weight), ALL[name](b, missing, weight)
    assert torch.equal(one, other)
    one.backward()
    other.backward()
    assert a.grad is not None
    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target must be finite|must not be NaN"):
        ALL[name](outputs, missing)


@pytest.mark.parametrize("name", WHOLE)
def test_a_missing_label_of_weight_zero_is_not_compared_with(name: str) -> None:
    outputs, labels, weight = samples(name)
    weight[3] = 0
    missing = labels.clone()
    missing[3] = torch.nan
    if name == "conr":
        pytest.skip("here its predictions are labels")
    assert torch.equal(ALL[name](outputs, missing, weight), ALL[name](outputs, labels, weight))


@pytest.mark.parametrize("name", ALL)
def test_a_mask_of_booleans_is_refused_with_the_way_out(name: str) -> None:
    outputs, labels, weight = samples(name)
    with pytest.raises(
        TypeError, match=r"weight must be integers or floats, got dtype torch\.bool\. Use weight\.float"
    ):
        ALL[name](outputs, labels, weight > 1)
    assert ALL[name](outputs, labels, (weight > 1).float()).isfinite()


@pytest.mark.parametrize("name", [*POINTS, *PAIRS])
@pytest.mark.parametrize("label", [0.0, 0.01, 4.0, 10.0])
def test_a_prediction_that_runs_away_is_brought_back(name: str, label: float) -> None:
    """From as far as a million axes; Balanced MSE is tried harder in its own tests."""
    target = torch.tensor([label])
    for away in (-1e7, -1e4, 1e4, 1e7):
        pred = torch.tensor([away] if name in POINTS else [[away, 0.0]], requires_grad=True)
        near = torch.tensor([label] if name in POINTS else [[label, 0.0]])
        value = ALL[name](pred, target)
        value.backward()
        assert value.isfinite()
        assert value > ALL[name](near, target)
        assert pred.grad is not None
        assert pred.grad.flatten()[0].sign() == np.sign(away)


@pytest.mark.parametrize("name", [*SCORES, *CLASSES])
def test_scores_at_the_ends_of_their_range_are_brought_back(name: str) -> None:
    outputs, labels, _ = samples(name)
    floor = ALL[name](outputs, labels, reduction="none") * 0 if name != "adjusted" else None
    for size in (1e3, 1e6, 1e15):
        wild = (outputs.sign() * size).requires_grad_()
        values = ALL[name](wild, labels, reduction="none")
        assert values.isfinite().all()
        assert floor is None or (values >= floor - 1e-5).all()
        values.sum().backward()
        assert wild.grad is not None
        assert wild.grad.isfinite().all()


@pytest.mark.parametrize("name", WHOLE)
def test_losses_of_a_batch_are_bounded_below(name: str) -> None:
    outputs, labels, _ = samples(name)
    for size in (1e3, 1e6):
        wild = (outputs.sign() * size).requires_grad_()
        value = ALL[name](wild, labels)
        assert value.isfinite()
        assert value > -1e-4
        value.backward()
        assert wild.grad is not None
        assert wild.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 7, 5)])
def test_features_of_sequences_are_to_be_flattened_with_their_labels(shape: tuple[int, ...]) -> None:
    features, labels = torch.randn(shape), torch.rand(shape[:-1])
    last = len(shape) - 2
    advice = rf"Use features\.flatten\(0, {last}\) and target\.flatten\(\)\.$"
    with pytest.raises(ShapeError, match=advice):
        conr_loss(features, labels, pred=labels)
    with pytest.raises(ShapeError, match=advice):
        rank_n_contrast(features, labels)
    conr_loss(features.flatten(0, last), labels.flatten(), pred=labels.flatten())
    rank_n_contrast(features.flatten(0, last), labels.flatten())
    with pytest.raises(ShapeError, match=r"Use features\.flatten\(1\)\.$"):
        rank_n_contrast(features, labels[:, 0].flatten()[:4])
    classes = (labels * 5).long()
    with pytest.raises(ShapeError, match=rf"Use logits\.flatten\(0, {last}\) and target\.flatten\(\)\.$"):
        cross_entropy(features, classes)
    maps = features.movedim(-1, 1)
    advice = rf"Use logits\.movedim\(1, -1\)\.flatten\(0, {last}\) and target\.flatten\(\)\.$"
    with pytest.raises(ShapeError, match=advice):
        cross_entropy(maps, classes)
    given = cross_entropy(maps.movedim(1, -1).flatten(0, last), classes.flatten())
    assert_close(given, nn.functional.cross_entropy(maps, classes))


def test_rows_of_classes_get_the_advice_that_fits_them() -> None:
    scores = torch.zeros(3, 5)
    one_hot = torch.eye(5, dtype=torch.int64)[:3]
    with pytest.raises(ShapeError, match=r"Use target\.argmax\(1\) on one-hot rows\.$"):
        cross_entropy(scores, one_hot)
    several = one_hot.clone()
    several[1, 3] = 1
    for target in (several, torch.zeros_like(one_hot)):
        with pytest.raises(ShapeError, match=r"of several classes at once .*binary_cross_entropy_with_logits\.$"):
            cross_entropy(scores, target)


def test_labels_beyond_the_axis_count_as_outside_says() -> None:
    scores, labels, weight = samples("crps")
    far = labels.clone()
    far[2], far[5] = 12.5, -3.0
    inside = torch.tensor([i not in (2, 5) for i in range(8)])
    ends = far.clamp(0, 10)
    for w in (None, weight):
        clipped = crps(scores, far, w, bins=BINS, outside="clip", reduction="none")
        at_end = crps(scores, ends, w, bins=BINS, reduction="none")
        assert_close(clipped, at_end + (far - ends).abs() * (1 if w is None else w))  # its error is exact
        own = scores.clone().requires_grad_()
        dropped = crps(own, far, w, bins=BINS, outside="drop", reduction="none")
        assert_close(dropped, clipped * inside)
        dropped.sum().backward()
        assert own.grad is not None
        assert torch.equal((own.grad != 0).any(1), inside)
        assert_close(crps(scores, far, w, bins=BINS, outside="drop"), dropped.detach().mean())  # by N
        with pytest.raises(LabelError, match=r"^crps: target must lie on .*got 12\.5 at index \[2\] \(2 such"):
            crps(scores, far, w, bins=BINS)
    assert_close(crps(scores, far, inside.float(), bins=BINS), crps(scores, far, bins=BINS, outside="drop"))
    broken = far.clone()
    broken[0] = torch.nan
    for outside in ("raise", "clip", "drop"):
        with pytest.raises(LabelError, match="target must not be NaN"):
            crps(scores, broken, bins=BINS, outside=outside)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crps: outside must be one of 'raise', 'clip', 'drop', got 'skip'"):
        crps(scores, far, bins=BINS, outside="skip")  # type: ignore[arg-type]


def test_where_values_are_not_looked_at_a_label_beyond_the_axis_shows() -> None:
    scores, labels, weight = samples("crps")
    labels[2] = 12.5

    def of(outside: str, loss: Callable[..., Tensor]) -> Tensor:
        return vmap(lambda s, y, w: loss(s, y, w, outside))(scores, labels, weight)

    def by_crps(s: Tensor, y: Tensor, w: Tensor, outside: Any) -> Tensor:
        return crps(s[None], y[None], w[None], bins=BINS, outside=outside)

    def by_bins(s: Tensor, y: Tensor, w: Tensor, outside: Any) -> Tensor:
        return BinnedIntegrationLoss(BINS, PRIOR, outside=outside, learn=False)(s[:1], y[None], w[None])

    for loss in (by_crps, by_bins):
        assert of("raise", loss).isnan().tolist() == [i == 2 for i in range(8)]
        assert of("drop", loss)[2] == 0
        assert of("clip", loss)[2] > 0


@pytest.mark.parametrize("loss", [soft_cross_entropy, squared_emd])
def test_a_dropped_label_s_row_of_zeros_adds_nothing(loss: Callable[..., Tensor]) -> None:
    scores, labels, _ = samples("crps")
    target = soft(labels)
    target[3] = 0
    for value in (0.5, torch.nan, torch.inf):
        scores[3] = value
        own = scores.clone().requires_grad_()
        values = loss(own, target, reduction="none")
        values.sum().backward()
        assert values[3] == 0
        assert own.grad is not None
        assert (own.grad[3] == 0).all()
        assert values[:3].min() > 0
        rest = torch.arange(8) != 3
        assert_close(values[rest], loss(scores[rest], target[rest], reduction="none"))
    target[3, 0] = 0.5
    with pytest.raises(ValueError, match="target must sum to one along the last axis"):
        loss(scores, target)


def test_crps_resolves_an_axis_far_from_zero() -> None:
    scores = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    near = 3600 * torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = 1.7e9
    far = crps(scores, near + start, bins=dt.Bins.uniform(start, start + 3600, width=60), reduction="none")
    expected = crps(scores, near, bins=dt.Bins.uniform(0, 3600, width=60), reduction="none")
    assert_close(far, expected, rtol=1e-5, atol=1e-4)
    with pytest.warns(dt.DirToolkitWarning):  # float32 does not tell such labels apart
        rounded = crps(
            scores, (near + start).float(), bins=dt.Bins.uniform(start, start + 3600, width=60), outside="clip"
        )
    assert rounded.isfinite()


@pytest.mark.parametrize("name", ALL)
def test_losses_follow_a_default_device(name: str) -> None:
    if name == "batch":
        pytest.skip("made in its call")
    outputs, labels, weight = samples(name)
    expected = ALL[name](outputs, labels, weight)
    with torch.device("meta"):
        assert torch.equal(ALL[name](outputs, labels, weight), expected)


def test_learnt_numbers_have_a_dimension_that_can_be_sharded() -> None:
    learnt = [
        BatchMCLoss().log_sigma,
        GaussianMixtureLoss([1.0], [2.0], [3.0]).log_sigma,
        BinnedIntegrationLoss(BINS, PRIOR).log_sigma,
        dt.AffinityHead(4, 3, sigma_mode="learnt").log_sigma,
        dt.CosineHead(4, 3, learn_scale=True).log_scale,
    ]
    assert [tuple(number.shape) for number in learnt] == [(1,)] * 5
    for made in (CenterLoss(4, 3), dt.ScaledHead(nn.Linear(4, 3))):
        assert all(parameter.ndim > 0 for parameter in made.parameters())
