from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import ShapeError
from dir_toolkit.heads import CoralHead, CornHead
from dir_toolkit.losses import coral_loss, cross_entropy

BINS = dt.Bins.uniform(0, 5, width=1)
COUNTS = np.array([60, 25, 10, 4, 1])
KINDS = pytest.mark.parametrize("kind", [CoralHead, CornHead])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sample(kind: Any, classes: int = 5) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    head = kind(4, classes).double()
    with torch.no_grad():
        head.bias.add_(torch.randn(classes - 1))
    return head, torch.randn(7, 4, dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def coral_above(head: CoralHead, z: list[float]) -> list[float]:
    """P(y > b) for b = 0, 1, ..., by the paper's equation."""
    beta = [head.bias[0].item()]
    for g in head.bias[1:].tolist():
        beta.append(beta[-1] - math.log1p(math.exp(g)))
    return [sigmoid(dot(head.weight[0].tolist(), z) + b) for b in beta]


def corn_conditional(head: CornHead, z: list[float]) -> list[float]:
    """P(y > b | y > b - 1) for b = 0, 1, ..."""
    return [sigmoid(dot(w, z) + b) for w, b in zip(head.weight.tolist(), head.bias.tolist(), strict=True)]


def test_coral_scores_are_the_logs_of_differences() -> None:
    head, features = sample(CoralHead)
    expected = []
    for z in features.tolist():
        above = [1.0, *coral_above(head, z), 0.0]
        expected.append([math.log(above[b] - above[b + 1]) for b in range(5)])
    assert_close(head(features), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_corn_scores_are_the_logs_of_products() -> None:
    head, features = sample(CornHead)
    expected = []
    for z in features.tolist():
        asked = [*corn_conditional(head, z), 0.0]
        expected.append([math.log(math.prod(asked[:b]) * (1 - asked[b])) for b in range(5)])
    assert_close(head(features), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_coral_loss_is_the_paper_s() -> None:
    head, features = sample(CoralHead)
    target, weight = torch.arange(7) % 5, torch.linspace(0.5, 2, 7, dtype=torch.float64)
    total = 0.0
    for z, y, w in zip(features.tolist(), target.tolist(), weight.tolist(), strict=True):
        for b, p in enumerate(coral_above(head, z)):
            total -= w * math.log(p if y > b else 1 - p)
    assert_close(coral_loss(head(features), target, weight).item(), total / 7, rtol=1e-12, atol=0)


def test_cross_entropy_of_corn_is_the_paper_s_loss() -> None:
    head, features = sample(CornHead)
    target = torch.arange(7) % 5
    total, asked = 0.0, 0
    for b in range(4):  # the subset of samples that lie above the border before
        for z, y in zip(features.tolist(), target.tolist(), strict=True):
            if y > b - 1:
                p = corn_conditional(head, z)[b]
                total -= math.log(p if y > b else 1 - p)
                asked += 1
    assert_close(cross_entropy(head(features), target).item() * 7 / asked, total / asked, rtol=1e-12, atol=0)


@KINDS
def test_shares_start_even_sum_to_one_and_stay_in_order_when_wild(kind: Any) -> None:
    for classes in (1, 2, 3, 50):
        head = kind(4, classes)
        assert_close(head(torch.zeros(2, 4)).exp(), torch.full((2, classes), 1 / classes))
        with torch.no_grad():
            head.bias.normal_(std=30)
        features = 100 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        scores = head(features.requires_grad_())
        assert scores.isfinite().all()
        assert_close(scores.double().exp().sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-4, atol=1e-4)
        scores.sum().backward()
        assert features.grad is not None
        assert features.grad.isfinite().all()
        assert head(features[:0]).shape == (0, classes)


@KINDS
@pytest.mark.parametrize("weighted", [False, True])
def test_without_features_the_least_loss_is_at_the_weighted_shares_of_labels(kind: Any, weighted: bool) -> None:
    head, y = kind(1, 5).double(), torch.arange(5).repeat_interleave(torch.from_numpy(COUNTS))
    weight = dt.LDS(dt.Bins.classes(5), kernel=None, scheme="sqrt_inverse").fit(y)(y).double() if weighted else None
    features, optimizer = torch.zeros(len(y), 1, dtype=torch.float64), torch.optim.LBFGS(head.parameters(), 1, 200)
    loss = coral_loss if kind is CoralHead else cross_entropy

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(head(features), y, weight)
        value.backward()
        return value

    optimizer.step(closure)
    shares = COUNTS**0.5 if weighted else COUNTS.astype(float)
    assert_close(head(features[:1])[0].exp(), torch.from_numpy(shares / shares.sum()), rtol=0, atol=1e-4)


@KINDS
@pytest.mark.parametrize("sigma", ["auto", None])
def test_prior_intervals_and_weights_apply_as_to_any_head(kind: Any, sigma: Any) -> None:
    """A head that knows the training prior alone answers evenly at tau 1."""
    density = dt.LabelDensity(BINS, COUNTS)
    name = "coral" if kind is CoralHead else "corn"
    options = {"density": density, "head": name, "sigma": 0.7 if sigma else None}
    model = dt.LongTailModel(nn.Identity(), 1, BINS, **options)  # type: ignore[arg-type]
    assert isinstance(model.head, kind)
    assert model.readout.loss_name == ("coral_loss" if kind is CoralHead else "cross_entropy")
    prior = model.readout.training_prior("auto", None)  # type: ignore[operator]
    above = prior.flip(0).cumsum(0).flip(0)
    with torch.no_grad():
        if kind is CoralHead:
            place = above[1:].logit()
            model.head.bias.copy_(torch.cat([place[:1], (-place.diff()).expm1().log()]))
        else:
            model.head.bias.copy_((above[1:] / above[:-1]).logit())
    x = torch.zeros(3, 1)
    assert_close(model(x).distribution[0].double(), prior, rtol=1e-5, atol=1e-6)
    model.set_prior("uniform", 1.0)
    assert_close(model(x).distribution, torch.full((3, 5), 0.2), rtol=1e-5, atol=1e-6)
    lower, upper = model.interval(model(x), 0.5)
    assert ((lower > 0) & (upper < 5)).all()
    y = torch.tensor([0.5, 2.5, 4.5])
    one, two = (model(x, y, weight).loss for weight in (torch.ones(3), torch.tensor([2.0, 1.0, 1.0])))
    assert_close(two - one, model(x[:1], y[:1]).loss / 3)


@KINDS
def test_a_model_learns_and_reads_rare_labels(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = 2.5 + 2.4 * torch.tanh(x[:, 0])
    torch.manual_seed(0)
    model = dt.LongTailModel(nn.Linear(3, 8), 8, BINS, head="coral" if kind is CoralHead else "corn", sigma=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    assert dt.weighted_l1(model(x).prediction, y).item() < 0.35
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@KINDS
def test_gradients_copies_and_compiled_forms(kind: Any) -> None:
    head, features = sample(kind)
    names = [name for name, _ in head.named_parameters()]

    def scores(z: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(head, dict(zip(names, parameters, strict=True)), (z,))

    assert gradcheck(scores, (features.clone().requires_grad_(), *head.parameters()))
    restored = kind(4, 5).double()
    restored.load_state_dict(head.state_dict())
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), restored, compiled):
        assert_close(other(features), head(features))
    low = copy.deepcopy(head).bfloat16()(features.bfloat16())
    assert low.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.float()(features.float()), restored.float()(features.float()))


@KINDS
def test_wrong_arguments_are_refused(kind: Any) -> None:
    name = kind.__name__
    with pytest.raises(ValueError, match=f"^{name}: num_classes must be at least 1, got 0"):
        kind(4, 0)
    with pytest.raises(ShapeError, match=rf"^{name}: features must be \(N, 4\), got shape \(4,\)"):
        kind(4, 3)(torch.zeros(4))
