"""What may be done with a tensor, and in which precision; what is computed is tested where it is used."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
