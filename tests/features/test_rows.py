"""FDS on sequences, maps and volumes of either layout: as on the rows that they hold."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dir_toolkit import FDS, Bins
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.features.rows import as_rows, beside

BINS = Bins.uniform(0, 9, width=1)
STEPS = [(7,), (3, 5), (2, 3, 2)]


def made(form: Any = "diagonal", **settings: Any) -> FDS:
    """An FDS that carries features."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(90) % 9).double()
    fds = FDS(BINS, 4, covariance=form, rank=2, outside="drop", **settings)
    for _ in range(2):
        features = torch.randn(90, 4, generator=generator, dtype=torch.float64)
        fds.update(features * (1 + labels[:, None] / 5) + labels[:, None].sin(), labels)
        fds.end_epoch()
    return fds


def drawn(steps: tuple[int, ...], *, per_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, *steps, D) with labels, some of them beyond the axis, and one label per step."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(5, *steps, 4, generator=generator, dtype=torch.float64)
    labels = 12 * torch.rand(5, *(steps if per_step else ()), generator=generator) - 1
    each = labels if per_step else labels.view(5, *[1] * len(steps)).expand(5, *steps)
    return features, labels, each


@pytest.mark.parametrize("form", ["diagonal", "full", "low_rank"])
@pytest.mark.parametrize("channels", ["first", "last"])
def test_steps_and_pixels_are_gathered_and_carried_as_rows_are(form: Any, channels: str) -> None:
    fds = made(form)
    for steps in STEPS:
        for per_step in (False, True):
            features, labels, each = drawn(steps, per_step=per_step)
            given = (features.movedim(-1, 1) if channels == "first" else features).requires_grad_()
            carried = fds.calibrate(given, labels)
            assert carried.shape == given.shape
            back = carried.movedim(1, -1) if channels == "first" else carried
            expected = fds.calibrate(features.reshape(-1, 4), each.reshape(-1))
            torch.testing.assert_close(back.reshape(-1, 4), expected, rtol=1e-12, atol=1e-12)
            (gradient,) = torch.autograd.grad(carried.sum(), given)
            assert gradient.shape == given.shape
            rows = copy.deepcopy(fds)
            rows.warns_of_forgotten_end = False  # it sees a sample per step
            fds.update(given, labels)
            rows.update(features.reshape(-1, 4), each.reshape(-1))
            fds.end_epoch()
            rows.end_epoch()
            for name, value in rows.statistics().items():
                torch.testing.assert_close(fds.statistics()[name], value, equal_nan=True)


def test_rows_go_back_to_the_form_that_they_came_in() -> None:
    features = torch.arange(24.0).view(2, 3, 4)
    rows, index, back = as_rows(features, torch.tensor([5, 6]), 1)
    assert rows[1].tolist() == [1, 5, 9]  # the second step of the first sample
    assert index.tolist() == [5, 5, 5, 5, 6, 6, 6, 6]
    assert torch.equal(back(rows), features)
    of_sample, of_step = torch.arange(6.0).view(2, 3), torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(beside(features, of_sample, 1), of_sample[:, :, None])
    assert torch.equal(beside(features, of_step, 1), of_step.movedim(2, 1))


def test_where_both_layouts_fit_the_earlier_features_decide() -> None:
    square, labels = torch.randn(5, 4, 4, dtype=torch.float64), torch.arange(5.0)
    fds = made()
    with pytest.raises(ShapeError, match=r'in either the second or the last axis.*\(5, 4, 4\).*channels="first"'):
        fds.update(square, labels)
    first, last = made(channels="first"), made(channels="last")
    fds.update(torch.zeros(5, 4, 2), labels)
    assert torch.equal(fds.calibrate(square, labels), first.calibrate(square, labels))
    fds.update(torch.zeros(5, 2, 4), labels)
    assert torch.equal(fds.calibrate(square, labels), last.calibrate(square, labels))
    assert not torch.equal(first.calibrate(square, labels), last.calibrate(square, labels))
    labels_tell = made()  # only one layout has these steps
    labels_tell.update(torch.zeros(5, 4, 3, 4), torch.zeros(5, 4, 3))
    assert labels_tell._layout == "last"


def test_features_that_fit_no_label_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^FDS: channels must be one of 'first', 'last', got 'middle'"):
        FDS(BINS, 4, channels="middle")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"features must be \(N, \.\.\., 4\), got shape \(5, 4, 3\)"):
        made(channels="last").update(torch.zeros(5, 4, 3), torch.zeros(5))
    with pytest.raises(ShapeError, match=r"features must be \(N, 4, \.\.\.\) or \(N, \.\.\., 4\), got shape \(4,\)"):
        made().update(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"same samples, got \(5, 3, 4\) and \(5, 2\)\. Resize the labels to \(3,\)"):
        made().update(torch.zeros(5, 3, 4), torch.zeros(5, 2))
    with pytest.raises(ShapeError, match=r"labels must be \(N,\), or \(N, \.\.\.\) for one label per step or pixel"):
        made().update(torch.zeros(5, 4), torch.tensor(1.0))


class Tagger(nn.Module):
    """A recurrent network that gives a label to each step, or to each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(2, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0]).squeeze(-1)


@pytest.mark.parametrize("per_step", [False, True])
def test_a_recurrent_network_trains_the_same_from_either_end_of_the_hook(per_step: bool) -> None:
    torch.manual_seed(0)
    net = Tagger()
    twin = copy.deepcopy(net)
    fds, other = FDS(BINS, 4, outside="drop"), FDS(BINS, 4, outside="drop")
    fds.attach(net.head, "input")
    other.attach(twin.body, "output", select=0)
    x, y = torch.randn(8, 6, 2), 11 * torch.rand(8, 6) - 1
    y = y if per_step else y[:, 0]
    for _ in range(3):
        losses = []
        for one, of in ((net, fds), (twin, other)):
            with of.labels(y):
                pred = one(x)
            losses.append((pred - (y if per_step else y[:, None])).square().mean())
            one.zero_grad()
            losses[-1].backward()
            of.end_epoch()
        assert torch.equal(*losses)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert fds.statistics()["count"].sum() == ((y >= 0) & (y <= 9)).sum() * (1 if per_step else 6)


def test_a_head_that_runs_twice_counts_both_views_of_each_sample() -> None:
    fds, head = FDS(BINS, 4), nn.Linear(4, 1)
    fds.attach(head, "input")
    views, y = torch.randn(2, 6, 4), torch.arange(6.0)
    with fds.labels(y):
        for view in views:
            head(view)
    fds.end_epoch()
    assert fds.statistics()["count"].tolist() == [2] * 6 + [0] * 3
    torch.testing.assert_close(fds.statistics()["mean"][:6], views.double().mean(0))
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with fds.labels(y):
        for view in views:
            head(view)
    for view, carried in zip(views, seen, strict=True):
        assert torch.equal(carried, fds.calibrate(view, y))
        assert not torch.equal(carried, view)


def test_steps_without_a_label_are_neither_gathered_nor_carried() -> None:
    features, labels, _ = drawn((7,), per_step=True)
    labels = labels.clamp(0, 9)
    there = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    holes = labels.masked_fill(~there, torch.nan)
    fds = FDS(BINS, 4, missing="drop")
    without = copy.deepcopy(fds)
    for _ in range(2):
        fds.update(features, holes)
        fds.end_epoch()
        without.update(features[there], labels[there])
        without.end_epoch()
    assert torch.equal(fds.statistics()["count"], without.statistics()["count"])
    carried = fds.calibrate(features, holes)
    assert torch.equal(carried[~there], features[~there])
    torch.testing.assert_close(carried[there], without.calibrate(features[there], labels[there]))
    with pytest.raises(LabelError, match="labels must not be NaN"):
        FDS(BINS, 4).update(features, holes)


def test_where_nothing_is_looked_at_the_end_of_an_epoch_tells_of_refused_labels(monkeypatch: Any) -> None:
    monkeypatch.setattr("dir_toolkit.labels.bins.readable", lambda tensor: False)
    labels = torch.tensor([1.0, torch.nan, 12.0, 3.0])
    for missing, outside, refused in (
        ("drop", "raise", 1),
        ("raise", "clip", 1),
        ("raise", "raise", 2),
        ("drop", "drop", 0),
    ):
        fds = FDS(BINS, 4, missing=missing, outside=outside)  # type: ignore[arg-type]
        fds.update(torch.ones(4, 4), labels)
        if refused:
            with pytest.raises(LabelError, match=f"got {refused} that do not"):
                fds.end_epoch()
        else:
            fds.end_epoch()
            assert fds.statistics()["count"].sum() == 2
