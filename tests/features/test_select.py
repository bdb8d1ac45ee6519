"""Which part of what a module takes or gives an FDS works on."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, Bins
from dir_toolkit.features.select import picked, replaced

BINS = Bins.uniform(0, 9, width=1)


class Pair(NamedTuple):
    hidden: Tensor
    other: Any = None


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    other: Any = None


@dataclass
class Slotted:
    __slots__ = ("hidden", "other")
    hidden: Tensor
    other: Any


ONE, TWO = torch.ones(2), torch.zeros(2)
WHOLES: list[tuple[Any, Any]] = [
    ((ONE, None), 0),
    ((None, ONE), -1),
    ([ONE, None], 0),
    ({"hidden": ONE, "other": None}, "hidden"),
    ({3: ONE}, 3),
    (Pair(ONE), 0),
    (Pair(ONE), "hidden"),
    (Frozen(ONE), "hidden"),
    (Slotted(ONE, None), "hidden"),
    (torch.max(torch.eye(2), 0), "values"),
]


@pytest.mark.parametrize(("whole", "select"), WHOLES)
def test_a_part_is_replaced_in_a_copy_of_the_same_kind(whole: Any, select: Any) -> None:
    before = picked(whole, select)
    other = replaced(whole, select, TWO)
    assert type(other) is type(whole)
    assert picked(other, select) is TWO
    assert picked(whole, select) is before


def test_a_hugging_face_output_keeps_its_kind_and_its_other_fields() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    whole = outputs.BaseModelOutput(last_hidden_state=ONE, attentions=(TWO,))
    other = replaced(whole, "last_hidden_state", TWO)
    assert type(other) is type(whole)
    assert other.last_hidden_state is other[0] is other["last_hidden_state"] is TWO
    assert other.attentions is whole.attentions
    assert whole[0] is ONE


@pytest.mark.parametrize(
    ("whole", "select", "got"),
    [
        ((ONE, ONE), None, r"features must be a torch\.Tensor, got a tuple of 2\. Pass attach .* as select="),
        ((ONE, ONE), 2, r"which select=2 must select, got a tuple of 2"),
        ({"a": ONE}, "b", r"which select='b' must select, got a dict with the keys \['a'\]"),
        (Frozen(ONE), "other", r"which select='other' must select, got a Frozen"),
        (ONE, "T", r"got a Tensor\. Omit select="),
        (ONE, 0, r"got a Tensor\. Omit select="),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_do(whole: Any, select: Any, got: str) -> None:
    with pytest.raises(TypeError, match=got):
        picked(whole, select)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"features": self.linear(x), "rest": x}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, rest: Tensor, z: Tensor) -> Tensor:
        return self.linear(z).squeeze(1) + rest[:, 0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), Head()

    def forward(self, x: Tensor, by_name: bool = False) -> Tensor:
        out = self.body(x)
        return self.head(out["rest"], z=out["features"]) if by_name else self.head(out["rest"], out["features"])


def test_a_selected_part_is_gathered_and_carried_as_the_features_themselves() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), (torch.arange(40) % 9).float()
    net = Net()
    runs = []
    for where, select, by_name in (("plain", None, False), ("output", "features", False), ("input", 1, False)):
        runs.append((where, select, by_name))
    runs.append(("input", "z", True))
    results = []
    for where, select, by_name in runs:
        one, fds = copy.deepcopy(net), FDS(BINS, 4)
        if where == "plain":
            fds.attach(one.body.linear, "output")
        else:
            fds.attach(getattr(one, "body" if where == "output" else "head"), where, select=select)  # type: ignore[arg-type]
        for _ in range(2):
            with fds.labels(y):
                pred = one(x, by_name)
            fds.end_epoch()
        pred.sum().backward()
        results.append((pred, one.body.linear.weight.grad, fds.statistics()["mean"]))
        assert not torch.equal(pred, net(x))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            assert torch.equal(value, expected)


def test_an_output_that_nothing_changes_is_handed_on_itself() -> None:
    fds, body = FDS(BINS, 4), Body()
    fds.attach(body, "output", select="features")
    outputs: list[Any] = []
    body.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert body.eval()(torch.zeros(2, 3)) is outputs[0]
