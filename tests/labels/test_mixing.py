from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import ShapeError
from dir_toolkit.labels import c_mixup

GROUPS, COPIES = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), 200


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(bandwidth: float, alpha: float, repeats: int = 10) -> Tensor:
    """Rows of one-hot groups after mixing, of samples of each group, (groups, draws, groups)."""
    x, y = torch.eye(3, dtype=torch.float64).repeat(COPIES, 1), GROUPS.repeat(COPIES)
    rows = [c_mixup(x, y, bandwidth=bandwidth, alpha=alpha, generator=source(seed))[0] for seed in range(repeats)]
    return torch.cat(rows).unflatten(0, (-1, 3)).transpose(0, 1)


@pytest.mark.parametrize("bandwidth", [0.8, 2.0])
def test_partners_are_drawn_as_the_kernel_says(bandwidth: float) -> None:
    rows = drawn(bandwidth, 2.0)
    for i, own in enumerate(GROUPS.tolist()):
        chances = [math.exp(-((own - other) ** 2) / (2 * bandwidth**2)) for other in GROUPS.tolist()]
        for j in range(3):
            expected = chances[j] / sum(chances)
            partner = rows[i, :, j] > 0 if j != i else rows[i, :, i] == 1
            spread = math.sqrt(expected * (1 - expected) / partner.numel())
            assert abs(partner.double().mean().item() - expected) < 5 * spread + 1e-12


@pytest.mark.parametrize("alpha", [0.5, 2.0, 20.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    rows = drawn(1e6, alpha)
    shares = torch.cat([rows[i, :, i][rows[i, :, i] < 1] for i in range(3)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(variance / len(shares)))
    assert shares.var().item() == pytest.approx(variance, rel=0.1)


def test_inputs_and_labels_are_mixed_alike_and_nothing_leaves_their_range() -> None:
    y = torch.rand(50, 2, generator=source()) * 10
    held = {"a": y * 3 + 1, "b": (y[:, :1], y.double())}
    mixed, labels = c_mixup(held, y, bandwidth=1.0, generator=source(1))
    assert_close(mixed["a"], labels * 3 + 1)
    assert_close(mixed["b"][0], labels[:, :1])
    assert_close(mixed["b"][1].float(), labels)
    assert not torch.equal(labels, y)
    assert ((labels >= y.amin(0)) & (labels <= y.amax(0))).all()
    assert torch.equal(held["a"], y * 3 + 1)  # what was handed in stays
    again = c_mixup(held, y, bandwidth=1.0, generator=source(1))[1]
    assert torch.equal(again, labels)


def test_mixing_has_the_right_limits() -> None:
    y = torch.tensor([0, 1, 5, 40])
    x = torch.eye(4)
    near, labels = c_mixup(x, y, bandwidth=1e-3, generator=source())
    assert torch.equal(near, x)
    assert torch.equal(labels, y.float())
    alone = c_mixup(x[:1], y[:1], bandwidth=1.0, generator=source())
    assert torch.equal(alone[0], x[:1])
    far = [c_mixup(x, y, bandwidth=1e9, alpha=1e4, generator=source(seed))[0] for seed in range(400)]
    assert_close(torch.stack(far).mean(0), 0.5 * torch.eye(4) + 0.125, atol=0.06, rtol=0)  # half of one, drawn evenly


def test_a_missing_label_is_no_one_s_partner() -> None:
    y = torch.tensor([1.0, torch.nan, 1.0, 2.0])
    x = torch.eye(4)
    for seed in range(20):
        mixed, labels = c_mixup(x, y, bandwidth=5.0, generator=source(seed))
        assert torch.equal(mixed[1], x[1])
        assert torch.equal(labels.isnan(), y.isnan())
        assert (mixed[[0, 2, 3], 1] == 0).all()


def test_gradients_reach_features_and_the_mean_label_is_kept() -> None:
    x = torch.rand(6, 3, requires_grad=True)
    y = torch.arange(6.0)
    mixed, _ = c_mixup(x, y, bandwidth=2.0, generator=source())
    mixed.sum().backward()
    assert x.grad is not None
    assert_close(x.grad.sum().item(), 18.0)
    moved = np.mean([c_mixup(x, y, bandwidth=1e9, generator=source(s))[1].mean().item() for s in range(300)])
    assert moved == pytest.approx(2.5, abs=0.1)


def test_weights_and_bins_take_mixed_labels() -> None:
    y = torch.rand(100, generator=source()) * 5
    bins = dt.Bins.uniform(0, 5, width=1)
    _, labels = c_mixup(y[:, None], y, bandwidth=0.5, generator=source())
    assert dt.LDS(bins).fit(y)(labels).isfinite().all()


def test_wrong_arguments_are_refused() -> None:
    x, y = torch.rand(4, 2), torch.rand(4)

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        given = {"inputs": x, "labels": y, "bandwidth": 1.0, "generator": source(), **changes}
        with pytest.raises(kind, match=f"^c_mixup: {match}"):
            c_mixup(**given)

    refused(
        ShapeError, r"inputs must be \(3, \.\.\.\), one entry for each of the labels, got shape \(4, 2\)", labels=y[:3]
    )
    refused(ShapeError, r"labels must be \(N,\) or \(N, K\)", labels=y[:, None, None])
    refused(TypeError, "inputs must be floats, got dtype torch.int64", inputs=x.long())
    refused(TypeError, "inputs must be a tensor, or hold tensors, got str", inputs="x")
    refused(ValueError, "labels must hold at least one value", inputs=x[:0], labels=y[:0])
    for name, value in itertools.product(("bandwidth", "alpha"), (0, -1.0, torch.nan)):
        refused(ValueError, f"{name} must be > 0", **{name: value})
    refused(TypeError, "generator must be a Generator", generator=3)


def test_numbers_that_both_samples_have_stay_as_they_are() -> None:
    """Also infinite ones, such as those of a mask of attention."""
    x = torch.tensor([[0.0, -torch.inf], [1.0, -torch.inf]])
    mixed, _ = c_mixup(x, torch.tensor([3.0, 3.5]), bandwidth=9.0, generator=source())
    assert (mixed[:, 1] == -torch.inf).all()
    assert mixed[:, 0].isfinite().all()
    alone, _ = c_mixup(x, torch.tensor([0.0, 50.0]), bandwidth=0.1, generator=source())
    assert torch.equal(alone, x)


def test_equal_features_share_the_gradient_with_their_partners() -> None:
    labels = torch.arange(6.0)
    grads = []
    for noise in (0.0, 1e-7):
        x = (noise * torch.arange(6.0))[:, None].requires_grad_()
        mixed, _ = c_mixup(x, labels, bandwidth=3.0, generator=source())
        (mixed[:, 0] * torch.arange(1.0, 7.0)).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert_close(*grads)
    assert not torch.equal(grads[0][:, 0], torch.arange(1.0, 7.0))
