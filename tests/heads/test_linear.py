import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dir_toolkit.errors import ShapeError
from dir_toolkit.heads.affinity import AffinityHead
from dir_toolkit.heads.cosine import CosineHead
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.heads.nearest_mean import NearestMeanHead
from dir_toolkit.heads.normalized import ScaledHead


def test_scores_are_those_worked_out_by_hand() -> None:
    head = LinearHead(2, 2)
    head.load_state_dict({"weight": torch.tensor([[1.0, 2.0], [0.0, -1.0]]), "bias": torch.tensor([0.5, 0.0])})
    assert head(torch.tensor([[3.0, 1.0]])).tolist() == [[5.5, -1.0]]
    assert head(torch.tensor([[3, 1]])).tolist() == [[5.5, -1.0]]  # whole numbers are raised to floats


def test_it_is_the_linear_layer_it_replaces() -> None:
    torch.manual_seed(0)
    head = LinearHead(5, 3)
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    features = torch.randn(7, 5)
    assert torch.equal(head(features), layer(features))
    assert isinstance(head, nn.Linear)
    assert list(head.state_dict()) == ["weight", "bias"]
    assert list(LinearHead(5, 3, bias=False).state_dict()) == ["weight"]
    assert (head.num_features, head.num_classes) == (5, 3)


def test_copies_pickles_and_compiled_forms_score_alike() -> None:
    head, features = LinearHead(5, 3), torch.randn(7, 5)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), compiled):
        assert_close(other(features), head(features))
    assert head(features[:0]).shape == (0, 3)


@pytest.mark.parametrize("kind", [LinearHead, lambda d, c: ScaledHead(LinearHead(d, c))], ids=["linear", "scaled"])
def test_scores_are_of_the_wider_dtype_and_at_least_float32(kind: Any) -> None:
    torch.manual_seed(0)
    head, features = kind(5, 3), torch.randn(7, 5)
    expected = copy.deepcopy(head).double()(features.double())
    assert head(features.double()).dtype == torch.float64
    assert_close(head(features.double()), expected, rtol=1e-12, atol=1e-12)
    assert_close(copy.deepcopy(head).double()(features), expected, rtol=1e-12, atol=1e-12)
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(head(features.to(half)), head(features.to(half).float()))
        low = copy.deepcopy(head).to(half)(features.to(half))
        assert low.dtype == torch.float32
        assert_close(low, expected.float(), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # left to itself
        for given in (features, features.bfloat16()):
            assert_close(head(given), expected.to(head(given).dtype), rtol=2e-2, atol=2e-2)
        assert LinearHead(5, 3)(features).dtype == torch.bfloat16
        assert head(features.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3), ValueError, "num_features must be at least 1, got 0"),
        ((5, 0), ValueError, "num_classes must be at least 1, got 0"),
        ((5, 2.0), TypeError, "num_classes must be a whole number, got 2.0"),
    ],
)
def test_wrong_counts_are_refused(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^LinearHead: {message}"):
        LinearHead(*arguments)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^LinearHead: bias must be a bool, got int"):
        LinearHead(5, 3, bias=1)  # type: ignore[arg-type]
    head = LinearHead(5, 3)
    with pytest.raises(ShapeError, match=r"^LinearHead: features must be \(N, 5\), got shape \(2, 4\)"):
        head(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"got shape \(2, 5, 1, 1\)\. Use features\.flatten\(1\)"):
        head(torch.zeros(2, 5, 1, 1))
    with pytest.raises(TypeError, match=r"features must be a torch.Tensor, got list"):
        head([[0.0] * 5])
    with pytest.raises(TypeError, match=r"features must be integers or floats, got dtype torch.complex64"):
        head(torch.zeros(2, 5, dtype=torch.complex64))


def test_features_on_another_device_are_refused_by_every_head() -> None:
    mean = NearestMeanHead(5, 2)
    mean.update(torch.eye(5)[:2], torch.arange(2))
    mean.finish()
    for head in (LinearHead(5, 2), ScaledHead(LinearHead(5, 2)), CosineHead(5, 2), AffinityHead(5, 2), mean):
        name = type(head).__name__
        rule = (
            rf"^{name}: (weight|means) and features must be on the same device, got cpu and meta\. Use features\.to\("
        )
        with pytest.raises(ValueError, match=rule):
            head(torch.zeros(3, 5, device="meta"))
