from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loss_tester import Batch, LossTester
from torch import Tensor, nn
from torch.testing import assert_close

import dir_toolkit as dt
from dir_toolkit.errors import ShapeError
from dir_toolkit.losses import SRLLoss, srl_loss

AXIS = dt.Bins.from_edges([0, 1, 3, 4, 10, 12])
T = [(c - 0.5) / (11 - 0.5) for c in (0.5, 2, 3.5, 7, 11)]


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POINTS = rows(20, 1) / rows(20, 1).norm(dim=1, keepdim=True)
SURROGATE = rows(5, 2)
SURROGATE[3] = 0


def unit(v: list[float]) -> list[float]:
    size = math.hypot(*v)
    return [x / size for x in v]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


class TestSRLLoss(LossTester):
    function, module, whole = staticmethod(srl_loss), None, True
    rows, reads = "features", "features"
    base = {"bins": AXIS, "points": POINTS}
    variants = {
        "alone": base,
        "surrogate": {**base, "surrogate": SURROGATE},
        "contrast": {**base, "surrogate": SURROGATE, "enveloping": 0.0, "homogeneity": 0.0, "temperature": 0.5},
        "smooth": {**base, "surrogate": SURROGATE, "homogeneity": 2.0},
    }

    def batch(self, n: int = 12) -> Batch:
        labels = torch.tensor([0.2, 2.0, 2.9, 10.5, 0.7, 1.5, 11.0, 2.2, 0.1, 10.1, 1.1, 0.9], dtype=torch.float64)
        return {"rows": rows(n, 0), "target": labels[:n], "weight": torch.linspace(0.1, 2, n, dtype=torch.float64)}

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        tau, env, homo = (
            options.get("temperature", 0.1),
            options.get("enveloping", 1.0),
            options.get("homogeneity", 0.1),
        )
        b = [AXIS.index(y) for y in batch["target"].numpy()]
        w = batch["weight"].tolist() if weighted else [1.0] * len(b)
        z = [unit(row) for row in batch["rows"].tolist()]
        trace: dict[int, list[float]] = {}
        for k in range(5):
            own = [i for i in range(len(b)) if b[i] == k and w[i] > 0]
            if own:
                trace[k] = unit([sum(w[i] * z[i][d] for i in own) for d in range(3)])
            elif "surrogate" in options and k != 3:
                trace[k] = unit(SURROGATE[k].tolist())
        uncovered = 1 - sum(max(dot(p, s) for s in trace.values()) for p in POINTS.tolist()) / len(POINTS)
        known = sorted(trace)
        speed = sum(math.dist(trace[k], trace[j]) ** 2 / (T[k] - T[j]) for j, k in itertools.pairwise(known))
        values = []
        for i in range(len(b)):
            scores = {k: dot(z[i], s) / tau for k, s in trace.items()}
            contrast = math.log(sum(map(math.exp, scores.values()))) - scores[int(b[i])]
            values.append(w[i] * (contrast + env * uncovered + homo * speed))
        return torch.tensor(values, dtype=torch.float64)

    def test_gradients_agree_with_differences(self, options: Any) -> None:
        """The contrast holds the means still, so that differences see it only with means of the surrogate alone."""
        batch = self.batch(6)
        geometry = {**options, "temperature": 1e6}
        plain = batch["rows"].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: self.call(geometry, {**batch, "rows": x}), plain)

    def test_the_oracle_tells_variants_apart(self) -> None:
        batch = self.batch(self.n)
        sums = [round(self.each(options, batch).sum().item(), 9) for options in self.variants.values()]
        assert len(set(sums)) == len(sums)


def circle(bins: int, angle: float) -> Tensor:
    place = torch.arange(bins, dtype=torch.float64) * angle / (bins - 1)
    return torch.stack([place.cos(), place.sin()], 1)


def geometry(z: Tensor, **scales: float) -> float:
    """One of the two terms, for one feature in each bin."""
    axis = dt.Bins.uniform(0, len(z), width=1)
    u = torch.arange(200000, dtype=torch.float64) * 2 * math.pi / 200000
    points = torch.stack([u.cos(), u.sin()], 1)
    y = torch.arange(len(z), dtype=torch.float64) + 0.5
    own = {"enveloping": 0.0, "homogeneity": 0.0}
    terms = [srl_loss(z, y, bins=axis, points=points, **{**own, **more}).item() for more in (scales, {})]
    return terms[0] - terms[1]


def test_both_terms_have_their_closed_forms_on_a_circle() -> None:
    # Means all around: a point is at most pi / B away from the next, and the mean of its cosine is that of an arc.
    step = math.pi / 12
    around = circle(12, 2 * math.pi * 11 / 12)
    assert geometry(around, enveloping=1.0) == pytest.approx(1 - math.sin(step) / step, abs=1e-6)
    assert geometry(circle(12, 0.0), enveloping=1.0) == pytest.approx(1.0, abs=1e-6)  # all in one place
    # An even arc has the squared length, for many bins, and any other speed costs more.
    for angle in (0.5, math.pi):
        chord = 2 * math.sin(angle / 22)
        assert geometry(circle(12, angle), homogeneity=1.0) == pytest.approx((11 * chord) ** 2)
    uneven = torch.linspace(0, 1, 12, dtype=torch.float64) ** 2 * math.pi
    uneven_arc = torch.stack([uneven.cos(), uneven.sin()], 1)
    assert geometry(uneven_arc, homogeneity=1.0) > geometry(circle(12, math.pi), homogeneity=1.0) * 1.2


def test_the_surrogate_follows_batches_in_training_and_is_in_the_state() -> None:
    loss = SRLLoss(3, AXIS, momentum=0.75)
    output = SimpleNamespace(prediction=torch.zeros(2), features=torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    loss(output, torch.tensor([0.5, 2.0]))
    assert loss.surrogate[:2].tolist() == [[1, 0, 0], [0, 1, 0]]  # a first mean is taken whole
    assert (loss.surrogate[2:] == 0).all()
    output.features = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 1.0]])
    loss(output, torch.tensor([0.5, 0.7]))
    assert_close(loss.surrogate[:2], torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]))
    other = SRLLoss(3, AXIS, momentum=0.75, seed=5)
    other.load_state_dict(loss.state_dict())
    for twin in (other, copy.deepcopy(loss)):
        before = twin.surrogate.clone()
        assert torch.equal(
            twin.eval()(output, torch.tensor([3.5, 11.0])), loss.eval()(output, torch.tensor([3.5, 11.0]))
        )
        assert torch.equal(twin.surrogate, before)
    assert_close(loss.points.norm(dim=1), torch.ones(1000))


def test_the_module_adds_the_function_to_its_base_and_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = 6 + 5 * torch.tanh(x[:, 0])
    torch.manual_seed(0)
    model = dt.LongTailModel(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8)), 8, AXIS, head="regression")
    loss = SRLLoss(8, AXIS, base=dt.weighted_mse, coefficient=0.5)
    surrogate = torch.zeros(5, 8)
    out = model(x)
    expected = dt.weighted_mse(out.prediction, y) + 0.5 * srl_loss(
        out.features, y, bins=AXIS, points=loss.points, surrogate=surrogate
    )
    assert_close(loss(out, y), expected)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
    assert value < expected / 3
    assert dt.weighted_l1(model(x).prediction, y).item() < 1


def test_a_missing_label_leaves_no_trace_in_the_module() -> None:
    loss, other = (SRLLoss(3, AXIS, missing=missing) for missing in ("drop", "raise"))  # type: ignore[arg-type]
    features, y = rows(4, 3).float(), torch.tensor([0.5, torch.nan, 2.0, 11.0])
    output = SimpleNamespace(prediction=torch.arange(4.0), features=features)
    there = ~y.isnan()
    part = SimpleNamespace(prediction=output.prediction[there], features=features[there])
    assert_close(loss(output, y), other(part, y[there]))
    assert_close(loss.surrogate, other.surrogate)


def test_arguments_are_checked() -> None:
    given: dict[str, Any] = {"features": rows(4, 0), "target": torch.rand(4), "bins": AXIS, "points": POINTS}

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=f"^srl_loss: {match}"):
            srl_loss(**{**given, **changes})

    refused(ShapeError, r"points must be \(P, 3\), as the features are", points=POINTS[:, :2])
    refused(ShapeError, r"surrogate must be \(5, 3\), one row per bin", surrogate=SURROGATE[:3])
    refused(ValueError, "bins must", bins=dt.Bins.classes(5))
    for name in ("enveloping", "homogeneity", "temperature"):
        refused(ValueError, f"{name} must", **{name: -1.0})
    for name, value in (("momentum", 1), ("num_points", 0), ("seed", -1), ("num_features", 0), ("coefficient", -1)):
        with pytest.raises(ValueError, match=f"^SRLLoss: {name} must"):
            SRLLoss(**{"num_features": 3, "bins": AXIS, name: value})  # type: ignore[arg-type]


def test_the_axis_counts_from_zero_to_one_wherever_it_lies() -> None:
    features, at = torch.eye(3), torch.tensor([0.5, 1.5, 5.5], dtype=torch.float64)
    plain = srl_loss(features, at, bins=dt.Bins.uniform(0, 10, width=1), points=features)
    for start, width in ((1.7e9, 10.0), (2000.0, 0.01), (2000.0, 1e-4)):
        bins = dt.Bins.uniform(start, start + 10 * width, width=width)
        assert_close(srl_loss(features, start + width * at, bins=bins, points=features), plain)


def test_a_seed_may_be_a_number_of_numpy() -> None:
    given, plain = (SRLLoss(2, AXIS, seed=seed) for seed in (np.int64(3), 3))
    assert torch.equal(given.points, plain.points)


@pytest.mark.parametrize(
    "edges", [-np.geomspace(1e6, 1e-3, 50), [0, 1e9, 1e9 + 1, 1e9 + 2]], ids=["towards zero", "far from zero"]
)
def test_bins_that_are_narrow_beside_the_axis_have_their_distance(edges: Any) -> None:
    bins = dt.Bins.from_edges(edges)
    turned = torch.stack([torch.arange(len(bins)).cos(), torch.arange(len(bins)).sin()], 1).double()
    at = torch.tensor(bins.centers)
    options: Any = {"bins": bins, "points": turned, "enveloping": 0.0, "reduction": "none"}
    steps = np.square(np.diff(turned, axis=0)).sum(1) / (np.diff(bins.centers) / np.ptp(bins.centers))
    for dtype in (torch.float64, torch.float32):
        features = turned.to(dtype, copy=True).requires_grad_()
        values = srl_loss(features, at, homogeneity=1.0, **options) - srl_loss(features, at, homogeneity=0.0, **options)
        assert_close(values.detach(), torch.full_like(values, steps.sum()), rtol=1e-4, atol=0)
        values.sum().backward()
        assert features.grad is not None
        assert features.grad.isfinite().all()
