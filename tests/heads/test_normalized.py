import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from dir_toolkit.errors import ShapeError
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.heads.normalized import ScaledHead, tau_normalized


def trained(dtype: torch.dtype = torch.float64) -> LinearHead:
    torch.manual_seed(0)
    head = LinearHead(4, 3).to(dtype)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[5.0], [1.0], [0.1]]))
    return head


def naive(weight: Tensor, tau: float) -> Tensor:
    return torch.tensor([[x / math.hypot(*row) ** tau for x in row] for row in weight.tolist()], dtype=torch.float64)


# ---- tau_normalized ----


@pytest.mark.parametrize("tau", [0, 0.5, 1, 3.7])
def test_weights_equal_a_naive_loop(tau: float) -> None:
    head = trained()
    normalized = tau_normalized(head, tau)
    assert_close(normalized.weight.detach(), naive(head.weight, tau), rtol=1e-12, atol=0)
    with pytest.raises(AssertionError):
        assert_close(normalized.weight.detach(), naive(head.weight, tau + 1e-6), rtol=1e-12, atol=0)
    assert type(normalized) is LinearHead
    assert normalized.bias is None
    assert normalized.weight.requires_grad


def test_tau_from_zero_to_one_evens_the_norms_out() -> None:
    head = trained()
    assert torch.equal(tau_normalized(head, 0).weight, head.weight)
    assert_close(tau_normalized(head, 1).weight.norm(dim=1), torch.ones(3, dtype=torch.float64))
    half = tau_normalized(head, 0.5).weight.norm(dim=1)
    assert_close(half, head.weight.norm(dim=1).sqrt())


def test_the_trained_head_and_the_random_state_are_left_alone() -> None:
    head = trained()
    before, state = copy.deepcopy(head.state_dict()), torch.get_rng_state()
    for new in (tau_normalized(head, 0).weight, ScaledHead(head).linear.weight):
        with torch.no_grad():
            new.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert all(p.requires_grad for p in head.parameters())


def test_half_precision_weights_are_normalized_in_float64() -> None:
    head = trained(torch.float32).half()
    expected = naive(head.weight.float(), 1).half()
    assert torch.equal(tau_normalized(head, 1).weight, expected)


def test_what_cannot_be_normalized_is_refused() -> None:
    head = trained(torch.float32)
    with pytest.raises(TypeError, match=r"^tau_normalized: linear must be a Linear, got Identity"):
        tau_normalized(nn.Identity(), 1)  # type: ignore[arg-type]
    for tau in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^tau_normalized: tau must be >= 0, got {tau}"):
            tau_normalized(head, tau)
    with pytest.raises(ValueError, match=r"must fit into torch\.float32, got tau = 400\. Lower tau"):
        tau_normalized(head, 400)
    for factor, tau in ((10.0, 60), (10.0, 39.5), (1e30, 300)):  # zero, subnormal, zero since the power is infinite
        long = LinearHead(4, 3)
        with torch.no_grad():
            long.weight.fill_(0.5).mul_(torch.tensor([[1.0], [1.0], [factor]]))
        with pytest.raises(ValueError, match=rf"must fit into torch\.float32, got tau = {tau}\. Lower tau"):
            tau_normalized(long, tau)
    with pytest.raises(ValueError, match=r"^tau_normalized: weight must hold values, got a tensor on the meta device"):
        tau_normalized(LinearHead(4, 3).to("meta"), 1)
    with torch.no_grad():
        head.weight[1] = 0
    message = r"have a weight that is not zero, got zeros for \[1\] \(1 in all\)\. Train the head first, or pass tau=0"
    with pytest.raises(ValueError, match=message):
        tau_normalized(head, 0.5)
    assert torch.equal(tau_normalized(head, 0).weight, head.weight)
    with torch.no_grad():
        head.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"weight must be finite, got nan at index \[2, 3\]"):
        tau_normalized(head, 0)


# ---- ScaledHead ----


def test_scores_are_those_worked_out_by_hand() -> None:
    linear = nn.Linear(2, 2)
    linear.load_state_dict({"weight": torch.tensor([[1.0, 2.0], [0.0, -1.0]]), "bias": torch.tensor([0.5, 0.0])})
    head = ScaledHead(linear)
    features = torch.tensor([[3.0, 1.0]])
    assert head(features).tolist() == [[5.5, -1.0]]  # scales start at one
    with torch.no_grad():
        head.scale.copy_(torch.tensor([2.0, 3.0]))
    assert head(features).tolist() == [[10.5, -3.0]]  # the bias is not scaled
    assert head(features.long()).tolist() == [[10.5, -3.0]]


@pytest.mark.parametrize("bias", [True, False])
def test_scaling_scores_is_scaling_weights(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3, bias=bias).double()
    head, features = ScaledHead(linear), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        head.scale.copy_(torch.tensor([0.5, 1.0, 4.0]))
        linear.weight.mul_(head.scale[:, None])
    assert_close(head(features), linear(features), rtol=1e-12, atol=1e-12)
    assert gradcheck(head, (features.requires_grad_(),))
    assert head(features[:0]).shape == (0, 3)


def test_only_the_scales_learn() -> None:
    torch.manual_seed(0)
    head, features, labels = ScaledHead(trained()), torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    frozen = copy.deepcopy(head.linear.state_dict())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in head.linear.state_dict().items())
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["scale"]
    assert list(head.state_dict()) == ["scale", "linear.weight", "linear.bias"]
    assert (head.num_features, head.num_classes) == (4, 3)


def test_copies_pickles_and_compiled_forms_score_alike() -> None:
    head, features = ScaledHead(trained(torch.float32)), torch.randn(7, 4)
    restored = ScaledHead(LinearHead(4, 3))
    restored.load_state_dict(head.state_dict())
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), restored, compiled):
        assert_close(other(features), head(features))
    normalized = tau_normalized(trained(torch.float32), 0.5)
    assert_close(pickle.loads(pickle.dumps(normalized))(features), normalized(features))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^ScaledHead: linear must be a Linear, got NoneType"):
        ScaledHead(None)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"^ScaledHead: features must be \(N, 4\), got shape \(5, 3\)"):
        ScaledHead(trained())(torch.zeros(5, 3))
