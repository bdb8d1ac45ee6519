"""What may be done with a tensor, and in which precision; what is computed is tested where it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dir_toolkit as dt
from dir_toolkit import losses
from dir_toolkit._numerics import has_values, keepable, readable


def test_values_are_looked_at_only_where_that_costs_nothing_and_breaks_nothing() -> None:
    x, seen = torch.ones(2), []
    assert readable(x)
    assert readable(torch.nn.Parameter(x))
    assert not readable(x.to("meta"))
    assert not has_values(x.to("meta"))

    def look(y: torch.Tensor) -> torch.Tensor:
        seen.append([readable(t) for t in (x, y, x + y)])  # x comes from outside
        return (x * y).sum()

    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    torch.func.jvp(look, (x,), (x,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        look(torch.ones(2))
    assert seen == [[False] * 3] * 4
    assert torch.compile(lambda y: y + readable(y), fullgraph=True, backend="eager")(x).tolist() == [1, 1]


def test_only_tensors_that_outlive_the_call_are_keepable() -> None:
    kept = []
    assert keepable(torch.ones(2))
    assert keepable(torch.nn.Parameter(torch.ones(2)))
    with torch.inference_mode():
        kept.append(keepable(torch.ones(2)))
    with FakeTensorMode():
        kept.append(keepable(torch.ones(2)))
    torch.func.grad(lambda y: (kept.append(keepable(y)), y.sum())[1])(torch.ones(2))
    assert kept == [False] * 3


def test_buffers_are_not_rounded_where_the_default_dtype_is_half_precision() -> None:
    bins = dt.Bins.uniform(0, 10, width=1)
    density = dt.LabelDensity(bins, 7 * np.arange(10, 0, -1) + 3)
    prior = density.prior()
    heads: Any = ("linear", "cosine", "affinity", "regression", "gaussian")

    def made() -> list[nn.Module]:
        models = [dt.LongTailModel(nn.Identity(), 4, bins, density=density, head=head) for head in heads]
        return [
            *models,
            dt.LongTailModel(nn.Identity(), 4, bins, density=density, target_prior="uniform"),
            dt.LogitAdjuster(prior, temperature=1.37),
            dt.LDS(bins).fit(density),
            dt.heads.NearestMeanHead(4, 10),
            losses.LogitAdjustedCrossEntropy(prior),
            losses.BalancedCrossEntropy(prior),
            losses.DistLoss(bins, prior),
            losses.BatchMCLoss(2.3, learn=False),
            losses.BatchMCLoss(),
            losses.BinnedIntegrationLoss(bins, density, learn=False),
            losses.GaussianMixtureLoss.fit(bins.centers),
            losses.SRLLoss(4, bins),
        ]

    plain = made()
    try:
        torch.set_default_dtype(torch.bfloat16)
        narrow = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(plain, narrow, strict=True):
        for (name, buffer), same in zip(one.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(same, buffer, rtol=0, atol=0, equal_nan=True, msg=f"{name} of {one}")
    assert narrow[9](torch.zeros(2, 10), torch.tensor([0, 9])).isfinite()
