"""A model whose labels are missing in part: as without these samples, in loss and gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, LDS, Bins, LabelDensity, LongTailModel
from dir_toolkit.errors import LabelError

NAN = float("nan")
AXIS, CLASSES = Bins.uniform(0, 20, width=1), Bins.classes(5)
HEADS: list[Any] = [
    (AXIS, {"head": "linear"}),
    (AXIS, {"head": "linear", "loss": "crps", "residual": True, "expectation_weight": 0.1}),
    (AXIS, {"head": "regression"}),
    (AXIS, {"head": "regression", "loss": "balanced_mse"}),
    (AXIS, {"head": "gaussian"}),
    (CLASSES, {"head": "linear"}),
    (CLASSES, {"head": "affinity"}),
]


def drawn(bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(12, 3, generator=generator), torch.rand(12, generator=generator) * len(bins)
    labels = labels.floor() if bins.categorical else labels
    there = torch.rand(12, generator=generator) < 0.6
    return x, labels.masked_fill(~there, NAN), there


def made(bins: Bins, **options: Any) -> LongTailModel:
    torch.manual_seed(0)
    density = LabelDensity(bins, np.arange(1, len(bins) + 1) ** 2)
    return LongTailModel(nn.Linear(3, 4), 4, bins, density=density, weights=LDS(bins).fit(density), **options)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:.*sigma.*")
@pytest.mark.filterwarnings("ignore:.*nothing is smoothed.*")
@pytest.mark.parametrize(("bins", "options"), HEADS)
@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_loss_and_gradients_are_those_without_the_missing_labels(
    bins: Bins, options: Any, outside: Any, monkeypatch: Any
) -> None:
    x, labels, there = drawn(bins)
    model = made(bins, missing="drop", outside=outside, **options)
    without = made(bins, outside=outside, **options)
    for weight in (None, torch.arange(12.0)):
        expected = without(x[there], labels[there] if not bins.categorical else labels[there].long(),
                           None if weight is None else weight[there]).loss  # fmt: skip
        right = gradients(without, expected)
        for readable in (None, lambda tensor: False):  # as on an accelerator, where nothing is looked at
            with monkeypatch.context() as patch:
                for module in ("labels.bins", "losses._inputs", "longtail.model", "_checks") if readable else ():
                    patch.setattr(f"dir_toolkit.{module}.readable", readable)
                loss = model(x, labels, weight).loss
                torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
                torch.testing.assert_close(model.criterion(model(x), labels, weight), expected, rtol=2e-6, atol=2e-6)
                torch.testing.assert_close(gradients(model, loss), right, rtol=1e-5, atol=1e-6)
    with pytest.raises(LabelError, match="labels must not be NaN"):
        without(x, labels)
    none = model(x, torch.full((12,), NAN)).loss
    assert none.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model, none))
    if options != {"head": "affinity"}:  # whose diversity is no matter of labels
        assert none == 0


@pytest.mark.parametrize("own_bins", [False, True])
def test_its_fds_gathers_only_samples_that_have_a_label(own_bins: bool) -> None:
    x, labels, there = drawn(AXIS)
    fds = FDS(Bins.uniform(0, 20, width=2) if own_bins else AXIS, 4, missing="drop")
    model = made(AXIS, missing="drop", fds=fds)
    for _ in range(2):
        model(x, labels)
        fds.end_epoch()
    assert fds.statistics()["count"].sum() == there.sum()
    with pytest.raises(ValueError, match='fds must have missing="drop", as the model has'):
        made(AXIS, missing="drop", fds=FDS(AXIS, 4))


def test_tau_is_chosen_on_the_labels_that_are_there() -> None:
    x, labels, there = drawn(AXIS)
    model = made(AXIS, missing="drop")
    scores = model(x).scores.detach()
    taus = [0.0, 0.5, 1.0]
    one, other = model.choose_tau(scores, labels, taus=taus), model.choose_tau(scores[there], labels[there], taus=taus)
    assert one.tau == other.tau


def test_dropped_labels_need_no_place_on_the_axis_of_weights() -> None:
    bins, narrow = Bins.uniform(0, 100, width=1), Bins.uniform(18, 80, width=1)
    known = torch.linspace(20, 79, 40)
    density, weights = LabelDensity.count(known, bins), LDS(narrow).fit(known)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for options, label in (({"missing": "drop"}, torch.nan), ({"outside": "drop"}, 120.0)):
        model: Any = LongTailModel(nn.Identity(), 4, bins, density=density, weights=weights, **options)
        loss = model(x, torch.tensor([20.0, label, 40.0])).loss
        kept = model(x[[0, 2]], torch.tensor([20.0, 40.0])).loss
        expected = kept if "missing" in options else kept * 2 / 3  # others count as samples
        torch.testing.assert_close(loss, expected)
