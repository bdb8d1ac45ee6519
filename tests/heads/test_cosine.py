import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.testing import assert_close

from dir_toolkit.errors import ShapeError
from dir_toolkit.heads.cosine import CosineHead


def naive(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    rows = []
    for z in features.tolist():
        row = []
        for w in weight.tolist():
            product = math.fsum(a * b for a, b in zip(z, w, strict=True))
            row.append(scale * product / (math.hypot(*z) * math.hypot(*w)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def sample(*, learn_scale: bool = False) -> tuple[CosineHead, Tensor]:
    torch.manual_seed(0)
    return CosineHead(4, 3, scale=8.0, learn_scale=learn_scale).double(), torch.randn(6, 4, dtype=torch.float64) * 3


def assert_right(scores: Tensor, features: Tensor, weight: Tensor, scale: float) -> None:
    assert_close(scores, naive(features, weight, scale), rtol=1e-12, atol=1e-12)


def test_scores_are_those_worked_out_by_hand() -> None:
    head = CosineHead(2, 2, scale=10.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0.0], [3.0, 4.0]]))
    assert_close(head(torch.tensor([[5.0, 0.0], [0.0, 0.1]])), torch.tensor([[10.0, 6.0], [0.0, 8.0]]))
    assert_close(head(torch.tensor([[5, 0]])), torch.tensor([[10.0, 6.0]]))


@pytest.mark.parametrize("learn_scale", [False, True])
def test_scores_equal_a_naive_loop(learn_scale: bool) -> None:
    head, features = sample(learn_scale=learn_scale)
    scale = math.exp(head.log_scale.item()) if learn_scale else 8.0
    for n in (6, 1):
        assert_right(head(features[:n]), features[:n], head.weight, scale)
    with pytest.raises(AssertionError):
        assert_right(head(features) * (1 + 1e-10), features, head.weight, scale)
    assert_close(head(7 * features), head(features))  # only directions count
    assert head(features[:0]).shape == (0, 3)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_gradients_agree_with_differences(learn_scale: bool) -> None:
    head, features = sample(learn_scale=learn_scale)
    names = [name for name, _ in head.named_parameters()]
    assert names == (["weight", "log_scale"] if learn_scale else ["weight"])

    def scores(z: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(head, dict(zip(names, parameters, strict=True)), (z,))

    assert gradcheck(scores, (features.requires_grad_(), *head.parameters()))


def test_a_zero_feature_has_score_and_gradient_zero() -> None:
    head = CosineHead(3, 2)
    features = torch.tensor([[0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    with torch.no_grad():
        head.weight[1] = 0
    scores = head(features)
    scores.sum().backward()
    assert features.grad is not None
    assert head.weight.grad is not None
    assert scores[:2].tolist() == [[0.0, 0.0]] * 2
    assert scores[2, 1].item() == 0
    assert features.grad[:2].tolist() == [[0.0] * 3] * 2
    assert head.weight.grad[1].tolist() == [0.0] * 3
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-11, 1e20, 1e38])
def test_long_and_short_features_and_weights_have_their_directions(size: float) -> None:
    head, features = CosineHead(4, 3, scale=1.0), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = head(features).detach()
    large = (features.sign() * size * features.abs() / features.abs().max()).requires_grad_()
    head(large).square().sum().backward()
    assert_close(head(large).detach(), expected)
    with torch.no_grad():
        head.weight.mul_(size / head.weight.abs().max())
    assert_close(head(features).detach(), expected)
    plain = features.clone().requires_grad_()
    head(plain).square().sum().backward()
    assert large.grad is not None
    assert plain.grad is not None
    factor = size / features.abs().max()
    assert_close(large.grad * factor, plain.grad, rtol=1e-4, atol=1e-5)


def test_a_learnt_scale_stays_positive() -> None:
    head = CosineHead(3, 2, scale=0.5, learn_scale=True)
    optimizer = torch.optim.SGD([head.log_scale], lr=10.0)
    features = head.weight.detach()[:1]
    for _ in range(20):
        optimizer.zero_grad()
        head(features)[0, 0].backward()  # asks for a smaller one
        optimizer.step()
    assert 0 < head.log_scale.exp().item() < 0.5


def test_half_precision_and_autocast_give_float32_scores() -> None:
    head, features = CosineHead(4, 3), torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(features), head.eval()(features.float()))
        assert head(features.bfloat16()).dtype == torch.float32
    assert copy.deepcopy(head).bfloat16()(features.bfloat16()).dtype == torch.float32


def test_copies_pickles_and_compiled_forms_score_alike() -> None:
    for learn_scale in (False, True):
        head, features = CosineHead(5, 3, learn_scale=learn_scale), torch.randn(7, 5)
        restored = CosineHead(5, 3, scale=1.0, learn_scale=learn_scale)
        restored.load_state_dict(head.state_dict())
        compiled = torch.compile(head, fullgraph=True, backend="eager")
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), restored, compiled):
            assert_close(other(features), head(features))
        assert "learn_scale" in repr(head)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"scale": 0.0}, ValueError, "scale must be > 0, got 0.0"),
        ({"scale": math.inf}, ValueError, "scale must be > 0, got inf"),
        ({"scale": 1e39}, ValueError, "scale must fit into float32, from 1.2e-38 to"),
        ({"scale": 1e-50, "learn_scale": True}, ValueError, "scale must fit into float32"),
        ({"learn_scale": "yes"}, TypeError, "learn_scale must be a bool, got str"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^CosineHead: {message}"):
        CosineHead(**{"num_features": 4, "num_classes": 3, **arguments})


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"^CosineHead: features must be \(N, 4\), got shape \(4,\)"):
        CosineHead(4, 3)(torch.zeros(4))
    with pytest.raises(TypeError, match=r"^CosineHead: features must be integers or floats, got dtype torch.bool"):
        CosineHead(4, 3)(torch.zeros(2, 4, dtype=torch.bool))
