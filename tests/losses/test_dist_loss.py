from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from loss_tester import Batch, LossTester
from torch import Tensor
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import ShapeError
from dir_toolkit.losses import DistLoss, dist_loss

AXIS = dt.Bins.from_edges([0, 1, 3, 4, 10])
PRIOR = [0.5, 0.3, 0.0, 0.2]


def quantile(level: float) -> float:
    """Where the cumulative distribution, a line in each bin, reaches a level."""
    return float(np.interp(level, [0, 0.5, 0.8, 1], [0, 1, 3, 10]) if level <= 0.8 else 4 + (level - 0.8) / 0.2 * 6)


class TestDistLoss(LossTester):
    function, module, whole = staticmethod(dist_loss), DistLoss, True
    variants = {
        "absolute": {"bins": AXIS, "prior": PRIOR},
        "squared": {"bins": AXIS, "prior": PRIOR, "squared": True},
        "weak": {"bins": AXIS, "prior": PRIOR, "coefficient": 0.3},
    }

    def batch(self, n: int = 12) -> Batch:
        generator = torch.Generator().manual_seed(0)
        pred, target = (10 * torch.rand(2, n, generator=generator, dtype=torch.float64)).unbind()
        return {"rows": pred, "target": target, "weight": torch.linspace(0, 2, n, dtype=torch.float64)}

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        power = 2 if options.get("squared") else 1
        p, y = batch["rows"].tolist(), batch["target"].tolist()
        w = batch["weight"].tolist() if weighted else [1.0] * len(p)
        there = [i for i in range(len(p)) if w[i] > 0]
        values = [0.0] * len(p)
        for rank, i in enumerate(sorted(there, key=p.__getitem__)):
            q = quantile((rank + 0.5) / len(there))
            own, drawn = abs(p[i] - y[i]) ** power, abs(p[i] - q) ** power
            values[i] = w[i] * (own + options.get("coefficient", 1.0) * drawn)
        return torch.tensor(values, dtype=torch.float64)


def test_the_paper_s_labels_of_a_batch() -> None:
    """Labels 1, 3, 4, 6 that a batch of seven is expected to hold once, twice, three times and once."""
    narrow = dt.Bins.from_edges([0.999, 1.001, 2.999, 3.001, 3.999, 4.001, 5.999, 6.001])
    prior = np.array([1, 0, 2, 0, 3, 0, 1]) / 7
    pred = torch.tensor([5.0, 2.0, 6.0, 3.0, 2.0, 7.0, 1.0], dtype=torch.float64)
    values = dist_loss(pred, pred, bins=narrow, prior=prior, reduction="none")
    expected = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # from 4, 3, 4, 4, 3, 6, 1
    assert_close(values, expected, rtol=0, atol=2e-3)


def test_a_sample_of_the_prior_costs_little_and_a_shrunken_one_what_it_misses() -> None:
    y = torch.from_numpy(np.random.default_rng(0).exponential(2, 4000))
    bins = dt.Bins.uniform(0, 40, width=0.1)
    term = partial(dist_loss, bins=bins, prior=dt.LabelDensity.count(y, bins).prior())
    assert term(y, y).item() < 0.05
    middle = y.median().expand(4000)
    assert term(middle, middle).item() == pytest.approx((y - y.median()).abs().mean().item(), rel=0.01)


def test_noisy_predictions_are_spread_as_labels_are() -> None:
    """Of the predictions a (y + noise), the absolute error shrinks, and the distribution does not."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2000, generator=generator, dtype=torch.float64)
    noisy = y + torch.randn(2000, generator=generator, dtype=torch.float64)
    bins = dt.Bins.uniform(-6, 6, width=0.1)
    prior = dt.LabelDensity.count(y, bins).prior()
    factors = torch.linspace(0.2, 1.2, 51, dtype=torch.float64)
    best = [
        factors[torch.stack([dist_loss(a * noisy, y, bins=bins, prior=prior, coefficient=c) for a in factors]).argmin()]
        for c in (0.0, 0.2, 100.0)
    ]
    assert best[0] < best[1] < best[2]
    assert best[0].item() == pytest.approx(0.5, abs=0.05)
    assert best[2].item() == pytest.approx(0.5**0.5, abs=0.03)  # the spread of the labels


def test_arguments_are_checked() -> None:
    pred, given = torch.rand(4), {"bins": AXIS, "prior": PRIOR}

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=f"^dist_loss: {match}"):
            dist_loss(pred, pred, **{**given, **changes})
        with pytest.raises(kind, match=f"^DistLoss: {match}"):
            DistLoss(**{**given, **changes})

    refused(ShapeError, r"prior must be \(4,\), one share of labels per bin, got shape \(2,\)", prior=[0.5, 0.5])
    refused(ValueError, "prior must sum to one", prior=[0.5, 0.3, 0.0, 0.5])
    refused(ValueError, "coefficient must be >= 0, got -1", coefficient=-1)
    refused(TypeError, "squared must be a bool, got int", squared=1)
    refused(ValueError, "bins must", bins=dt.Bins.classes(4))
    with pytest.raises(ShapeError, match=r"^dist_loss: pred must be \(N,\), got shape \(2, 2\)"):
        dist_loss(torch.rand(2, 2), torch.rand(2, 2), **given)  # type: ignore[arg-type]
