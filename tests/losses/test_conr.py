from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_tester import Batch, LossTester
from torch import Tensor, nn
from torch.testing import assert_close

from dir_toolkit import LDS, Bins, weighted_l1
from dir_toolkit.errors import ShapeError
from dir_toolkit.losses import conr, weighted_huber
from dir_toolkit.losses.conr import ConRLoss


def conr_loss(*args: Any, omega: float = 1.0, eta: float = 0.01, **options: Any) -> Tensor:
    """With the scales of the paper, labels in years."""
    return conr.conr_loss(*args, omega=omega, eta=eta, **options)


def samples(n: int = 14, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Samples of which some are confused, some have no neighbor, and the last two are neither."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (n,), generator=generator)
    pred = labels + torch.randint(-2, 3, (n,), generator=generator) * 0.75
    labels[-1], pred[-2:] = 90, torch.tensor([50.0, 90.0])
    return {
        "features": torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype),
        "target": labels,
        "pred": pred.to(dtype),
        "push_weight": torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) + 0.5,
    }


def naive(
    features: Tensor,
    target: Tensor,
    pred: Tensor,
    weight: Tensor | None = None,
    *,
    push_weight: Tensor | None = None,
    omega: float = 1.0,
    temperature: float = 0.2,
    eta: float = 0.01,
) -> Tensor:
    """The formula, pair by pair; samples of weight zero are left out."""
    n = len(features)
    z, y, p = features.tolist(), target.tolist(), pred.tolist()
    w = [1.0] * n if weight is None else weight.tolist()
    r = [1.0] * n if push_weight is None else push_weight.tolist()

    def likeness(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(z[i], z[j], strict=True))
        return math.exp(dot / math.hypot(*z[i]) / math.hypot(*z[j]) / temperature)

    values = [0.0] * n
    for j in range(n):
        others = [k for k in range(n) if k != j and w[k] > 0 and w[j] > 0]
        positives = [k for k in others if abs(y[j] - y[k]) <= omega]
        negatives = [k for k in others if abs(y[j] - y[k]) > omega and abs(p[j] - p[k]) <= omega]
        if not positives or not negatives:
            continue
        pull = sum(likeness(j, k) for k in positives)
        push = sum(r[j] * math.exp(eta * abs(y[j] - y[k])) * likeness(j, k) for k in negatives)
        values[j] = w[j] * sum(-math.log(likeness(j, k) / (pull + push)) for k in positives) / len(positives)
    return torch.tensor(values, dtype=torch.float64)


def same(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def output(**parts: Any) -> SimpleNamespace:
    return SimpleNamespace(prediction=parts["pred"], features=parts["features"])


class TestConR(LossTester):
    function = staticmethod(conr.conr_loss)
    variants = {
        name: {"omega": 1.0, "eta": 0.01, **options}
        for name, options in {
            "paper": {},
            "wide": {"omega": 2.5},
            "warm": {"temperature": 0.7},
            "steep": {"eta": 0.5},
            "flat": {"eta": 0.0},
        }.items()
    }
    rows, n = "features", 14
    whole = needs_two = True

    def batch(self, n: int = 14) -> Batch:
        parts = samples(n)
        return {"rows": parts.pop("features"), "weight": torch.linspace(0, 2, n, dtype=torch.float64), **parts}

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        given = {"features" if name == "rows" else name: x for name, x in batch.items()}
        return naive(**{**given, "weight": batch["weight"] if weighted else None}, **options)


def test_values_are_those_worked_out_by_hand() -> None:
    features = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 5.0], [4.0, 0.0]], dtype=torch.float64)
    labels, pred = torch.tensor([10.0, 10.5, 30.0, 80.0]), torch.tensor([12.0, 20.0, 12.5, 50.0])
    # Only the first and the third are confused, and only the first has a positive: the second, of cosine 1.
    push = 3.0 * math.exp(0.1 * 20)  # times exp(0), the cosine being 0
    expected = math.log((math.exp(1 / 0.5) + push) / math.exp(1 / 0.5))
    r = torch.tensor([3.0, 7.0, 7.0, 7.0])
    given = conr_loss(features, labels, pred=pred, push_weight=r, eta=0.1, temperature=0.5, reduction="none")
    assert given.tolist() == pytest.approx([expected, 0, 0, 0])
    given = conr_loss(
        features, labels, weight=torch.tensor([2.0, 1, 1, 1]), pred=pred, push_weight=r, eta=0.1, temperature=0.5
    )
    assert given.item() == pytest.approx(2 * expected / 4)  # by N


def test_labels_on_the_threshold_are_alike() -> None:
    features, pred, labels = torch.ones(3, 2), torch.zeros(3), torch.tensor([0, 0, 1])
    assert conr_loss(features, labels, pred=pred).item() == 0
    beyond = conr_loss(features, labels, pred=pred, omega=0.99, eta=0.0).item()
    assert beyond == pytest.approx(2 * math.log(2) / 3)
    assert conr_loss(features, labels, pred=torch.tensor([0, 0, 1.0]), omega=0.99).item() == 0  # none confused


def test_gradients_agree_with_differences_and_reach_features_alone() -> None:
    parts = samples(9)
    weight = torch.linspace(0, 2, 9, dtype=torch.float64)
    for name in ("features", "pred", "push_weight"):
        parts[name].requires_grad_()
    rest = {name: value.detach() for name, value in parts.items() if name != "features"}
    assert torch.autograd.gradcheck(lambda z: conr_loss(z, weight=weight, **rest), parts["features"])
    conr_loss(**parts, weight=weight).backward()
    assert parts["features"].grad is not None
    assert parts["features"].grad.abs().sum() > 0
    assert parts["pred"].grad is None
    assert parts["push_weight"].grad is None


@pytest.mark.parametrize("case", ["no anchor", "one sample", "no positive"])
def test_without_an_anchor_the_loss_and_its_gradient_are_zero(case: str) -> None:
    n = 1 if case == "one sample" else 4
    features = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(n) * 10.0
    pred = torch.zeros(n) if case == "no positive" else labels.clone()
    loss = conr_loss(features, labels, pred=pred)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert (features.grad == 0).all()


def test_a_step_pulls_what_is_alike_and_pushes_what_is_confused() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 4, generator=generator).requires_grad_()
    labels, pred = torch.tensor([20.0, 20, 20, 70, 70, 70]), torch.full((6,), 30.0)
    optimizer = torch.optim.Adam([features], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        conr_loss(features, labels, pred=pred).backward()
        optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features, dim=2).detach()
    assert cosine[:3, :3].min() > 0.9
    assert cosine[:3, 3:].max() < -0.2


def test_a_rarer_anchor_and_a_grosser_confusion_push_harder() -> None:
    parts = samples()
    values = conr_loss(**parts, reduction="none")
    anchors = values > 0
    more = conr_loss(**{**parts, "push_weight": parts["push_weight"] * 2}, reduction="none")
    assert (more[anchors] > values[anchors]).all()
    assert (conr_loss(**parts, eta=0.1, reduction="none")[anchors] > values[anchors]).all()
    none = conr_loss(**{**parts, "push_weight": torch.zeros(14)}, reduction="none")
    assert (none[anchors] < values[anchors]).all()
    assert none.isfinite().all()
    far = conr_loss(torch.eye(3), torch.tensor([0, 0, 1e6]), pred=torch.zeros(3), eta=1.0, reduction="none")
    assert_close(far, torch.tensor([1e6, 1e6, 0.0]))  # exp(1e6) overflows


def test_order_length_and_views_do_not_matter() -> None:
    parts = samples()
    values = conr_loss(**parts, reduction="none")
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    same(conr_loss(**{k: v[order] for k, v in parts.items()}, reduction="none"), values[order])
    scale = torch.logspace(-6, 6, 14, dtype=torch.float64)[:, None]
    same(conr_loss(**{**parts, "features": parts["features"] * scale}, reduction="none"), values)
    views = {k: torch.cat([v, v]) for k, v in parts.items()}
    twice = conr_loss(**views, reduction="none")
    same(twice, naive(**views))
    features, labels, pred = torch.eye(3), torch.arange(3) * 10, torch.zeros(3)
    assert conr_loss(features, labels, pred=pred).item() == 0  # no positive
    assert conr_loss(features.repeat(2, 1), labels.repeat(2), pred=pred.repeat(2)).item() > 0  # the other view is one


def test_a_weight_scales_an_anchor_and_zero_leaves_no_trace() -> None:
    parts = samples()
    plain = conr_loss(**parts, reduction="none")
    anchor = int(plain.argmax())
    weight = torch.ones(14, dtype=torch.float64)
    weight[anchor] = 2
    same(conr_loss(**parts, weight=weight, reduction="sum"), plain.sum() + plain[anchor])
    weight[anchor] = 0
    rest = torch.arange(14) != anchor
    expected = conr_loss(**{k: v[rest] for k, v in parts.items()}, weight=weight[rest], reduction="sum")
    assert not torch.allclose(expected, plain.sum() - plain[anchor])  # it was a partner, too
    for value in (torch.inf, torch.nan):
        parts["features"][anchor] = value
        parts["pred"][anchor] = value
        leaf = parts["features"].clone().requires_grad_()
        loss = conr_loss(**{**parts, "features": leaf}, weight=weight, reduction="sum")
        same(loss, expected)
        loss.backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[anchor] == 0).all()


def test_features_of_zero_have_no_gradient_and_broken_ones_show() -> None:
    parts = samples()
    anchor = int(conr_loss(**parts, reduction="none").argmax())
    parts["features"][anchor] = 0
    leaf = parts["features"].clone().requires_grad_()
    conr_loss(**{**parts, "features": leaf}).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[anchor] == 0).all()
    for value in (torch.nan, torch.inf):
        parts["features"][anchor] = value
        assert not conr_loss(**parts).isfinite()
    alone = {**parts, "target": torch.arange(14.0), "omega": 0.5}  # without an anchor, but gradients are NaN, too
    assert conr_loss(**alone).isnan()
    parts = samples()
    parts["pred"][anchor] = torch.nan  # alike to none
    assert conr_loss(**parts, reduction="none")[anchor] == 0


def test_the_module_adds_conr_to_its_base() -> None:
    parts = samples()
    out, labels, weight = output(**parts), parts["target"], torch.linspace(0, 2, 14, dtype=torch.float64)
    lds = LDS(Bins.from_edges(list(range(101))), outside="clip").fit(labels)
    settings: dict[str, float] = {"omega": 2.0, "temperature": 0.5, "eta": 0.2}
    loss = ConRLoss(weighted_huber, coefficient=4.0, weights=lds, **settings)
    parts["push_weight"] = lds(labels)
    extra = conr_loss(**parts, weight=weight, **settings)
    base = weighted_huber(out.prediction, labels, weight)
    for twin in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        same(twin(out, labels, weight), base + 4 * extra)
    twin = ConRLoss(weighted_huber, weights=LDS(Bins.from_edges(list(range(101))), outside="clip"))
    twin.load_state_dict(loss.state_dict())
    assert twin.weights is not None
    assert torch.equal(twin.weights(labels), lds(labels))
    plain = ConRLoss(coefficient=0.0)
    same(plain(out, labels), weighted_l1(out.prediction, labels))
    scales = "omega=None, temperature=0.2, eta=None, weights=None, missing='raise'"
    assert repr(plain) == f"ConRLoss(base=weighted_l1, coefficient=0.0, {scales})"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return weighted_l1(pred, target, weight) * self.log_scale.exp()


def test_a_base_with_parameters_is_trained_and_the_prediction_gets_the_base_s_gradient() -> None:
    parts = samples()
    loss = ConRLoss(Scaled(), omega=1.0)
    assert [name for name, _ in loss.named_parameters()] == ["base.log_scale"]
    assert repr(loss).count("base") == 1
    pred = parts["pred"].requires_grad_()
    features = parts["features"].requires_grad_()
    loss(output(**parts), parts["target"]).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (pred, features, *loss.parameters()))


@pytest.mark.parametrize("name", ["omega", "temperature", "eta", "coefficient"])
def test_settings_are_checked(name: str) -> None:
    values: list[tuple[Any, type[Exception]]] = [(-1, ValueError), (torch.nan, ValueError), ("1", TypeError)]
    values += [(1e39, ValueError)]
    if name in ("omega", "temperature"):
        values.append((0, ValueError))
    for value, kind in values:
        with pytest.raises(kind, match=f"^ConRLoss: {name} must"):
            ConRLoss(**{name: value})
        if name != "coefficient":
            with pytest.raises(kind, match=f"^conr_loss: {name} must"):
                conr_loss(**samples(), **{name: value})


def test_the_module_s_parts_are_checked() -> None:
    parts = samples()
    with pytest.raises(TypeError, match=r"^ConRLoss: base must be callable, got str"):
        ConRLoss("l1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^ConRLoss: weights must be an LDS, got Tensor"):
        ConRLoss(weights=torch.ones(3))  # type: ignore[arg-type]
    loss: Callable[..., Tensor] = ConRLoss()
    with pytest.raises(
        TypeError, match=r"^ConRLoss: output must hold a torch.Tensor as prediction, got Tensor\. Let the"
    ):
        loss(parts["pred"], parts["target"])
    with pytest.raises(TypeError, match=r"^ConRLoss: output must hold a torch.Tensor as features, got SimpleNamespace"):
        loss(SimpleNamespace(prediction=parts["pred"]), parts["target"])


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_defaults_follow_the_spread_of_the_labels(unit: float) -> None:
    parts = samples(40)
    weight = torch.linspace(0, 2, 40, dtype=torch.float64)
    there = parts["target"][1:].double()
    omega = 0.05 * there.std(correction=0).item()
    expected = conr_loss(**parts, weight=weight, omega=omega, eta=0.01 / omega)
    assert expected > 0
    scaled = {**parts, "target": parts["target"] * unit, "pred": parts["pred"] * unit}
    assert_close(conr.conr_loss(**scaled, weight=weight), expected, rtol=1e-6, atol=0)
    loss = ConRLoss()(output(**scaled), scaled["target"], weight)
    base = weighted_l1(scaled["pred"], scaled["target"], weight)
    assert_close(
        loss - base, conr.conr_loss(**{**scaled, "push_weight": None}, weight=weight), rtol=1e-6, atol=1e-6 * unit
    )
    alike = {**scaled, "target": torch.ones(40)}
    assert conr.conr_loss(**alike).item() == 0  # all are positives


def test_features_are_one_row_per_sample() -> None:
    parts = samples()
    with pytest.raises(
        ShapeError, match=r"^conr_loss: features must be \(N, D\), one row per sample, got shape \(3,\)"
    ):
        conr_loss(**{**parts, "features": parts["features"][0]})
    for name in ("pred", "push_weight"):
        with pytest.raises(TypeError, match=rf"^conr_loss: {name} must be a torch\.Tensor, got list"):
            conr_loss(**{**parts, name: [1.0] * 14})
        with pytest.raises(ShapeError, match=rf"^conr_loss: {name} must be \(14,\), .*\(13,\)"):
            conr_loss(**{**parts, name: torch.ones(13)})
    with pytest.raises(ValueError, match=r"^conr_loss: push_weight must not be negative, got a minimum of -1"):
        conr_loss(**{**parts, "push_weight": -torch.ones(14)})
    parts["push_weight"][4] = torch.nan
    with pytest.raises(ValueError, match=r"^conr_loss: push_weight must be finite, got nan at index \[4\]"):
        conr_loss(**parts)


def test_its_module_drops_missing_labels_from_both_terms() -> None:
    features, labels, pred = torch.randn(6, 3), torch.tensor([1.0, 1.2, torch.nan, 8.0, 8.1, 3.0]), torch.rand(6)
    there = ~labels.isnan()
    bins = Bins.uniform(0, 10, width=1)
    lds = LDS(bins, missing="drop").fit(labels)
    loss, plain = (ConRLoss(omega=1.0, weights=lds, missing=missing) for missing in ("drop", "raise"))
    output = SimpleNamespace(prediction=pred, features=features)
    rest = SimpleNamespace(prediction=pred[there], features=features[there])
    torch.testing.assert_close(loss(output, labels), plain(rest, labels[there]))
    with pytest.raises(
        ValueError, match=r'^ConRLoss: weights must have missing="drop", as the loss has, got \'raise\''
    ):
        ConRLoss(weights=LDS(bins).fit(labels[there]), missing="drop")
    with pytest.raises(ValueError, match="target must be finite, got nan at index"):
        ConRLoss(omega=1.0)(output, labels)
    with pytest.raises(ValueError, match=r"^ConRLoss: missing must be one of 'raise', 'drop', got 'skip'"):
        ConRLoss(missing="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_that_are_just_omega_apart_are_similar_in_every_unit(dtype: torch.dtype) -> None:
    features, labels = torch.eye(4, dtype=dtype), torch.tensor([2, 3, 9, 10], dtype=dtype)
    whole = conr_loss(features, labels, pred=torch.full_like(labels, 5), omega=1.0, eta=0.0, reduction="none")
    assert_close(whole, torch.full_like(labels, math.log(3)))  # one positive and two negatives, all alike
    for unit in (0.1, 0.01, 1e-3, 0.3):
        given = {"pred": torch.full_like(labels, 5 * unit), "omega": unit, "eta": 0.0, "reduction": "none"}
        assert_close(conr_loss(features, labels * unit, **given), whole)


def test_whole_numbers_far_from_zero_are_compared_exactly() -> None:
    features, labels = torch.eye(4), torch.tensor([0.0, 1.0, 3.0, 10.0])
    near, far = (conr_loss(features, labels + at, pred=torch.zeros(4), eta=0.0, reduction="none") for at in (0, 5e6))
    assert_close(far, near)
    stamps = 1_700_000_000 + labels.long()
    assert_close(conr_loss(features, stamps, pred=torch.zeros(4), eta=0.0, reduction="none"), near)
    default = conr.conr_loss(features, labels, pred=torch.zeros(4))
    assert_close(conr.conr_loss(features, stamps, pred=torch.zeros(4)), default)
    assert (near > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("unit", [1e18, 1e19, 1e-21, 1e-23])
def test_defaults_follow_labels_whose_squares_leave_float32(unit: float) -> None:
    parts = samples(40)
    plain = conr.conr_loss(**{**parts, "target": parts["target"].float()})
    assert plain > 0
    scaled = conr.conr_loss(**{**parts, "target": (parts["target"] * unit).float(), "pred": parts["pred"] * unit})
    assert_close(scaled, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("label", [math.nan, 500.0])
def test_a_label_of_weight_zero_needs_no_place_on_the_axis_of_the_weights(label: float) -> None:
    parts = samples(40)
    labels, bins = parts["target"].double(), Bins.uniform(-100, 100, width=1)
    loss = ConRLoss(weights=LDS(bins).fit(labels), omega=parts.get("omega", 1.0))
    weight = torch.ones(40, dtype=torch.float64)
    weight[3] = 0
    without = loss(output(**parts), labels, weight)
    assert without > ConRLoss(coefficient=0.0)(output(**parts), labels, weight)
    masked = labels.clone()
    masked[3] = label
    assert_close(loss(output(**parts), masked, weight), without)
    assert loss(output(**parts), torch.full_like(labels, label), torch.zeros_like(weight)).item() == 0
