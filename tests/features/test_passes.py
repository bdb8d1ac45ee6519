"""Activation checkpointing, which runs a part of a forward again: the labels are those of that forward."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dir_toolkit import FDS, Bins
from dir_toolkit.errors import DirToolkitWarning, UsageError
from dir_toolkit.features import passes

BINS = Bins.uniform(0, 9, width=1)
KINDS = ["reentrant", "plain", "nested", "whole"]


class Net(nn.Module):
    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "reentrant":
            return checkpoint(self.head, self.body(x), use_reentrant=True).squeeze(1)
        if self.kind == "plain":
            return checkpoint(self.head, self.body(x), use_reentrant=False).squeeze(1)
        if self.kind == "nested":
            inner = lambda z: checkpoint(self.head, z, use_reentrant=False)  # noqa: E731
            return checkpoint(lambda x: inner(self.body(x)), x, use_reentrant=False).squeeze(1)
        if self.kind == "whole":
            return checkpoint(lambda x: self.head(self.body(x)), x, use_reentrant=False).squeeze(1)
        return self.head(self.body(x)).squeeze(1)


def view(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 3, generator=generator), 9 * torch.rand(30, generator=generator)


def made(kind: str | None, where: Any = "input", **settings: Any) -> tuple[Net, FDS]:
    torch.manual_seed(0)
    net, fds = Net(kind), FDS(BINS, 4, rank=2, **settings)
    fds.attach(net.head if where == "input" else net.body, where)
    for epoch in range(2):
        with fds.labels(view(epoch)[1]):
            net(view(epoch)[0])
        fds.end_epoch()
    fds.warns_of_forgotten_end = False  # more than one epoch is gathered here
    return net, fds


def losses(net: Net, fds: FDS, *seeds: int) -> list[Tensor]:
    torch.manual_seed(1)
    out = []
    for seed in seeds:
        x, y = view(seed)
        with fds.labels(y):
            out.append((net(x) - y).square().mean())
    return out


def gradients(net: Net, backward: Any, fds: FDS, *seeds: int) -> list[Tensor]:
    net.zero_grad()
    backward(*losses(net, fds, *seeds))
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def summed(*losses: Tensor) -> None:
    sum(losses).backward()  # type: ignore[union-attr]


def forwards(*losses: Tensor) -> None:
    for loss in losses:
        loss.backward()


def backwards(*losses: Tensor) -> None:
    for loss in reversed(losses):
        loss.backward()


def twice(*losses: Tensor) -> None:
    sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
    sum(losses).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "where", "early_stop"),  # forms differ in what they gather, not in when
    [
        *(("diagonal", where, early_stop) for where in ("input", "output") for early_stop in (True, False)),
        ("full", "input", True),
        ("low_rank", "output", False),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_several_views_in_one_loss_have_the_gradient_of_the_plain_model(
    kind: str, early_stop: bool, where: str, form: str
) -> None:
    (net, fds), (twin, twin_fds) = made(None, where, covariance=form), made(kind, where, covariance=form)
    with set_checkpoint_early_stop(early_stop):
        for backward in (summed, forwards, backwards, twice):
            plain, again = (gradients(n, backward, f, 5, 6, 7) for n, f in ((net, fds), (twin, twin_fds)))
            assert len(plain) == len(again) > 0
            for p, q in zip(plain, again, strict=True):
                torch.testing.assert_close(p, q)
    assert torch.equal(fds._moments.count, twin_fds._moments.count)


def test_the_comparison_notices_a_wrong_answer() -> None:
    net, fds = made(None)
    one, other = (gradients(net, summed, fds, *seeds) for seeds in ((5, 6), (5, 7)))
    assert not torch.allclose(one[0], other[0])


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_first_epoch_and_with_passes_without_labels_too(kind: str) -> None:
    results = []
    for one in (None, kind):
        torch.manual_seed(0)
        net, fds = Net(one), FDS(BINS, 4)
        fds.attach(net.head, "input")
        x, y = view(5)
        for epoch in range(3):
            torch.manual_seed(epoch)
            net.zero_grad()
            with fds.labels(y):
                loss = net(x).sum()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DirToolkitWarning)
                loss = loss + net(view(6)[0]).square().sum()
                with fds.labels(view(7)[1]):  # which are not looked at
                    loss.backward()
            fds.end_epoch()
        results.append([p.grad for p in net.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", ["reentrant", "plain"])
def test_labels_of_the_same_features_may_change_between_steps(kind: str) -> None:
    (net, fds), (twin, twin_fds) = made(None), made(kind)
    for n in (net, twin):
        n.head[1].p = 0.0
    x, _ = view(5)
    for seed in range(3):
        _, y = view(seed)
        for n, f in ((net, fds), (twin, twin_fds)):
            n.zero_grad()
            with f.labels(y):
                loss = n(x).square().sum()
            loss.backward()
        torch.testing.assert_close(net.body[0].weight.grad, twin.body[0].weight.grad)


@pytest.mark.parametrize("kind", ["reentrant", "plain"])
def test_equal_features_with_other_labels_in_one_loss_are_refused(kind: str) -> None:
    net, fds = made(kind)
    net.head[1].p = 0.0
    x, y = view(5)
    with fds.labels(y):
        loss = net(x).sum()
    with fds.labels(9 - y):
        loss = loss + net(x).sum()
    with pytest.raises(UsageError, match=r"^FDSInputHook: .* got two with equal features and different labels"):
        loss.backward()


def test_a_backward_that_computes_other_features_is_refused() -> None:
    net, fds = made("plain")
    x, y = view(5)
    with fds.labels(y):
        loss = net(x).sum()
    with torch.no_grad():
        net.body[0].weight.mul_(2)
        fds._passes._kept[-1].mark += 1e6
    with pytest.raises(UsageError, match=r"^FDSInputHook: .* got features of none of the latest forwards\. Keep"):
        loss.backward()


@pytest.mark.parametrize("kind", ["reentrant", "plain"])
def test_backward_after_the_end_of_the_epoch_is_refused(kind: str) -> None:
    net, fds = made(kind)
    x, y = view(5)
    with fds.labels(y):
        loss = net(x).sum()
    fds.end_epoch()
    with pytest.raises(UsageError, match=r"^FDSInputHook: .* must run before end_epoch\(\) and load_state_dict"):
        loss.backward()


def test_a_model_switched_to_eval_before_backward_is_carried_as_it_was() -> None:
    (net, fds), (twin, twin_fds) = made(None), made("plain")
    for n, f in ((net, fds), (twin, twin_fds)):
        n.head[1].p = 0.0
        (loss,) = losses(n, f, 5)
        n.eval()
        loss.backward()
    torch.testing.assert_close(net.head[0].weight.grad, twin.head[0].weight.grad)


def test_a_teacher_in_eval_mode_stays_untouched() -> None:
    (net, fds), (twin, twin_fds) = made(None), made("plain")
    x, y = view(5)
    for n, f in ((net, fds), (twin, twin_fds)):
        n.eval()
        with f.labels(y):
            n(x).sum().backward()
    torch.testing.assert_close(net.head[0].weight.grad, twin.head[0].weight.grad)


def test_forwards_that_none_can_repeat_are_not_kept_and_others_in_bounded_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, fds = made(None)
    losses(net, fds, 5, 6)
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # else each forward may be in a checkpoint
        assert not fds._passes._kept
    monkeypatch.setattr(passes, "_MOST", 3)
    net, fds = made("plain")
    losses(net, fds, *range(9))
    assert len(fds._passes._kept) <= 3
    monkeypatch.setattr(passes, "_MOST_NUMBERS", 1)
    losses(net, fds, *range(9))
    assert len(fds._passes._kept) == 2


def test_maps_of_pixels_are_found_again() -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        body, head, fds = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 1, 1), FDS(BINS, 4)
        fds.attach(head, "input")
        run = (lambda z: checkpoint(head, z, use_reentrant=False)) if checkpointed else head  # noqa: B023
        x, y = torch.randn(3, 5, 2, 6, 6), 9 * torch.rand(3, 5, 6, 6)
        for _ in range(2):
            body.zero_grad(), head.zero_grad()
            loss = torch.zeros(())
            for view in range(3):
                with fds.labels(y[view]):
                    loss = loss + run(body(x[view])).square().mean()
            loss.backward()
            fds.end_epoch()
        results.append((head.weight.grad, body.weight.grad))
    torch.testing.assert_close(*results)


def test_a_copy_finds_its_own_forwards() -> None:
    net, fds = made("plain")
    losses(net, fds, 5)
    twin = copy.deepcopy(net)
    (hook,) = twin.head._forward_pre_hooks.values()
    summed(*losses(twin, hook.fds, 6, 7))
    assert any(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


class Calling(nn.Module):
    """A checkpoint around FDS, called in a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.fds = nn.Linear(3, 4), nn.Linear(4, 1), FDS(BINS, 4)

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.fds(self.body(x).relu(), y))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(self.part, x, y, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's own tracing
@pytest.mark.parametrize("compiled", ["none", "model", "part"])
def test_called_in_a_checkpoint_it_counts_once_also_in_compiled_graphs(compiled: str) -> None:
    plain, net = Calling(), Calling()
    step: Any = net
    if compiled == "model":
        step = torch.compile(net, backend="aot_eager", fullgraph=True)
    elif compiled == "part":
        net.part = torch.compile(net.part, backend="aot_eager")  # type: ignore[method-assign]
    for seed in range(2):
        x, y = view(seed)
        plain.part(x, y).square().mean().backward()
        step(x, y).square().mean().backward()
        assert torch.equal(net.fds._moments.count, plain.fds._moments.count)
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        plain.fds.end_epoch()
        net.fds.end_epoch()
