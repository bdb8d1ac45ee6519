"""FDS against oracles, and the faults of public FDS code, each pinned by a test that would find it."""

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dir_toolkit import FDS, Bins, gaussian
from dir_toolkit._state import pack, unpack
from dir_toolkit.errors import CheckpointError, DirToolkitWarning, LabelError, ShapeError
from dir_toolkit.features._inputs import placed
from dir_toolkit.labels.kernels import smoothing_matrix

BINS = Bins.uniform(0, 9, width=1)
FORMS: list[Any] = ["diagonal", "full", "low_rank"]


def batch(seed: int = 0, n: int = 90, num_features: int = 4) -> tuple[Tensor, Tensor]:
    """Features whose mean and spread differ from bin to bin, and labels that fill all nine bins."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 9).double()
    features = torch.randn(n, num_features, generator=generator, dtype=torch.float64)
    return features * (1 + labels[:, None] / 5) + labels[:, None].sin() * 3, labels


def trained(fds: FDS, *batches: tuple[Tensor, Tensor]) -> FDS:
    for features, labels in batches:
        fds.update(features, labels)
        fds.end_epoch()
    return fds


# ---- what it computes ----


def public_code(epochs: list[tuple[Tensor, Tensor]], features: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """What the public DIR code computes when every bin is filled, written as loops over bins from its description:
    a window folded by its reflecting filter, mirrored ends, unbiased variance, the first epoch whole."""
    window = gaussian(5, 2, folded=True)
    window = window / window.sum()
    mean, variance = np.zeros((9, features.shape[1])), np.ones((9, features.shape[1]))
    for number, (z, y) in enumerate(epochs):
        for b in range(9):
            here = z[y.long() == b].numpy()
            share = 0 if number == 0 else momentum
            mean[b] = (1 - share) * here.mean(0) + share * mean[b]
            variance[b] = (1 - share) * here.var(0, ddof=1) + share * variance[b]
    out = features.clone()
    mirrored = [2, 1, *range(9), 7, 6]
    for b in range(9):
        near = [mirrored[b + k] for k in range(5)]
        smooth_mean = sum(w * mean[i] for w, i in zip(window, near, strict=True))
        smooth_variance = sum(w * variance[i] for w, i in zip(window, near, strict=True))
        ratio = np.clip(smooth_variance / variance[b], 0.1, 10)
        for row in torch.nonzero(labels.long() == b).flatten().tolist():
            out[row] = torch.from_numpy((features[row].numpy() - mean[b]) * np.sqrt(ratio) + smooth_mean)
    return out


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_reference_calibrates_as_the_public_code_does(epochs: int, momentum: float) -> None:
    batches = [batch(seed) for seed in range(epochs)]
    features, labels = batch(99)
    fds = trained(FDS.reference(BINS, 4, momentum=momentum), *batches)
    expected = public_code(batches, features, labels, momentum)
    torch.testing.assert_close(fds.calibrate(features, labels), expected, rtol=1e-12, atol=1e-12)
    narrow = fds.calibrate(features.float(), labels)
    torch.testing.assert_close(narrow, expected.float(), rtol=1e-6, atol=2e-6)
    with pytest.raises(AssertionError):  # and the comparison can fail
        torch.testing.assert_close(trained(FDS(BINS, 4), *batches).calibrate(features, labels), expected)


def test_empty_bins_lend_nothing_and_change_nothing() -> None:
    features, labels = batch()
    keep = (labels != 3) & (labels != 4)
    fds = trained(FDS(BINS, 4, kernel=[1, 1, 1]), (features[keep], labels[keep]))
    s = fds.statistics()
    torch.testing.assert_close(s["smoothed_mean"][2], (s["mean"][1] + s["mean"][2]) / 2)  # not pulled towards 0
    torch.testing.assert_close(s["smoothed_variance"][5], (s["variance"][5] + s["variance"][6]) / 2)
    assert s["count"][3] == 0
    assert s["mean"][3].isnan().all()
    out = fds.calibrate(features, labels)
    assert torch.equal(out[~keep], features[~keep])
    assert not torch.equal(out[keep], features[keep])


def test_a_bin_of_one_sample_is_moved_and_borrows_the_smoothed_variance() -> None:
    features, labels = batch()
    keep = labels != 3
    keep[3] = True
    fds = trained(FDS(BINS, 4, kernel=[1, 1, 1]), (features[keep], labels[keep]))
    s = fds.statistics()
    assert s["variance"][3].isnan().all()
    torch.testing.assert_close(s["smoothed_variance"][3], (s["variance"][2] + s["variance"][4]) / 2)
    out = fds.calibrate(features, labels)
    moved = features[3] - s["mean"][3] + s["smoothed_mean"][3]
    torch.testing.assert_close(out[3], moved)
    assert not torch.allclose(out[3], features[3])


def test_a_label_axis_with_a_single_filled_bin_is_left_alone() -> None:
    features = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.full((5,), 4.0)
    fds = trained(FDS(BINS, 4, kernel=[1, 1, 1]), (features, labels))
    torch.testing.assert_close(fds.calibrate(features, labels), features)


def test_momentum_weighs_the_old_statistics() -> None:
    first, second = batch(1), batch(2)
    fds = trained(FDS(BINS, 4, momentum=0.75), first)
    old = fds.statistics()["mean"]
    new = trained(FDS(BINS, 4), second).statistics()["mean"]
    trained(fds, second)
    torch.testing.assert_close(fds.statistics()["mean"], 0.75 * old + 0.25 * new)


def test_a_bin_first_seen_later_takes_its_first_epoch_whole_and_others_keep_theirs() -> None:
    features, labels = batch()
    late = labels == 8
    fds = trained(FDS(BINS, 4), (features[~late], labels[~late]), (features[late], labels[late]))
    s = fds.statistics()
    torch.testing.assert_close(s["mean"][8], features[late].mean(0))
    torch.testing.assert_close(s["mean"][0], features[labels == 0].mean(0))


def test_shrinkage_pulls_each_variance_to_the_pooled_one() -> None:
    features, labels = batch()
    keep = labels != 3
    keep[3] = True
    features, labels = features[keep], labels[keep]
    plain = trained(FDS(BINS, 4), (features, labels)).statistics()
    s = trained(FDS(BINS, 4, shrinkage=20.0), (features, labels)).statistics()
    degrees = (plain["count"] - 1)[:, None]
    pooled = (degrees * plain["variance"].nan_to_num()).sum(0) / degrees.sum()
    torch.testing.assert_close(s["variance"][0], (9 * plain["variance"][0] + 20 * pooled) / 29)
    torch.testing.assert_close(s["variance"][3], pooled)  # one sample: nothing of its own


def test_count_weighted_smoothing_follows_the_larger_bins() -> None:
    features, labels = batch()
    keep = (labels != 3) | (torch.arange(90) < 20)  # two samples of label 3, ten of the others
    features, labels = features[keep], labels[keep]
    s = trained(FDS(BINS, 4, kernel=[1, 1, 1], count_weighted=True), (features, labels)).statistics()
    torch.testing.assert_close(s["smoothed_mean"][3], (10 * s["mean"][2] + 2 * s["mean"][3] + 10 * s["mean"][4]) / 22)


def test_start_epoch_delays_calibration() -> None:
    features, labels = batch()
    fds = FDS(BINS, 4, start_epoch=2)
    for changed in (False, False, True):
        assert torch.equal(fds.calibrate(features, labels), features) != changed
        trained(fds, (features, labels))


def test_over_one_bin_nothing_changes() -> None:
    features, labels = batch()
    fds = trained(FDS(Bins.uniform(0, 9, count=1), 4, kernel=[1.0]), (features, labels))
    torch.testing.assert_close(fds.calibrate(features, labels), features)


def test_clip_bounds_the_ratio_of_variances() -> None:
    features, labels = batch()
    features[labels == 4] *= 100
    fds = trained(FDS(BINS, 4, clip=(0.5, 2.0)), (features, labels))
    assert fds.covariance.scale.max().item() == pytest.approx(2**0.5, rel=1e-15)  # vectorized roots may be an ulp off
    assert fds.covariance.scale.min().item() == pytest.approx(0.5**0.5, rel=1e-15)


def test_statistics_used_do_not_move_within_an_epoch() -> None:
    """Public code: "last epoch" buffers alias the running ones."""
    fds = trained(FDS(BINS, 4), batch(1))
    features, labels = batch(2)
    before = fds.calibrate(features, labels)
    for seed in (3, 4):
        fds.update(*batch(seed))
    assert torch.equal(fds.calibrate(features, labels), before)
    fds.end_epoch()
    assert not torch.equal(fds.calibrate(features, labels), before)


def test_float_labels_that_share_a_bin_are_all_counted() -> None:
    """Public code: labels 3.1 and 3.9 overwrite each other."""
    features, _ = batch(n=4)
    fds = trained(FDS(BINS, 4), (features, torch.tensor([3.0, 3.1, 3.9, 3.999])))
    assert fds.statistics()["count"].tolist() == [0, 0, 0, 4, 0, 0, 0, 0, 0]
    torch.testing.assert_close(fds.statistics()["mean"][3], features.mean(0))


@pytest.mark.parametrize("company", [0.0, 8.0])
def test_labels_beyond_the_axis_fare_alike_in_any_company(company: float) -> None:
    """Public code: kept where the batch also holds the last label, else dropped."""
    features, _ = batch(n=3)
    labels = torch.tensor([20.0, company, 3.0])
    clipped, dropped = FDS(BINS, 4, outside="clip"), FDS(BINS, 4, outside="drop")
    assert trained(clipped, (features, labels)).statistics()["count"].sum() == 3
    assert trained(dropped, (features, labels)).statistics()["count"].sum() == 2
    assert torch.equal(dropped.calibrate(features, labels)[0], features[0])
    with pytest.raises(LabelError, match=r"must lie on the label axis \[0, 9\], got 20.0 at index \[0\]"):
        FDS(BINS, 4).update(features, labels)


def test_every_end_of_an_epoch_counts() -> None:
    """Public code: an epoch counter once out of step silently ends all updates."""
    fds = trained(FDS(BINS, 4, momentum=0.0), *[batch(s) for s in range(3)])
    fds.load_state_dict(trained(FDS(BINS, 4, momentum=0.0), batch(7)).state_dict())
    assert fds.epoch == 1
    features, labels = batch(8)
    trained(fds, (features, labels))
    torch.testing.assert_close(fds.statistics()["mean"][0], features[labels == 0].mean(0))


# ---- hooks ----


class Net(nn.Module):
    """A small regressor with the parts that bring FDS code to fall: ReLU, BatchNorm, Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze(1)


def net_data(n: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, generator=generator), (torch.arange(n) % 9).float()


def make(where: str = "input", **settings: object) -> tuple[Net, FDS]:
    torch.manual_seed(0)
    net, fds = Net(), FDS(BINS, 4, rank=2, **settings)  # type: ignore[arg-type]
    fds.attach(net.head if where == "input" else net.body, where)  # type: ignore[arg-type]
    return net, fds


def run_epoch(net: nn.Module, fds: FDS, x: Tensor, y: Tensor) -> Tensor:
    with fds.labels(y):
        loss = (net(x) - y).square().mean()
        loss.backward()
    fds.end_epoch()
    return loss


@pytest.mark.parametrize("where", ["input", "output"])
def test_a_hook_gathers_and_calibrates_in_one_pass(where: str) -> None:
    """Public code: a whole second pass in training mode, which also moves BatchNorm twice."""
    net, fds = make(where)
    x, y = net_data()
    twin = copy.deepcopy(net.body)
    twin._forward_hooks.clear()
    run_epoch(net, fds, x, y)
    assert net.body[1].num_batches_tracked == 1
    z = twin(x)
    torch.testing.assert_close(fds.statistics()["mean"][2], z[y == 2].double().mean(0))
    twin_z = twin(x)
    seen = []
    net.head.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    with fds.labels(y):
        net(x)
    torch.testing.assert_close(seen[0], fds.calibrate(twin_z, y).detach())
    # gathered before calibration, not after
    gathered = fds._moments.mean[2]
    torch.testing.assert_close(gathered, twin_z[y == 2].double().mean(0))


def test_both_places_of_a_hook_agree() -> None:
    (net, fds), (twin, twin_fds) = make("input"), make("output")
    x, y = net_data()
    for _ in range(2):
        assert torch.equal(run_epoch(net, fds, x, y), run_epoch(twin, twin_fds, x, y))


def test_gradient_reaches_the_backbone_scaled_by_the_calibration() -> None:
    """Public code: writes into the features in place, which breaks backward after ReLU."""
    net, fds = make()
    x, y = net_data()
    run_epoch(net, fds, x, y)
    net.zero_grad()
    with fds.labels(y):
        net(x).sum().backward()
    twin = copy.deepcopy(net.body)
    twin.zero_grad()
    z = twin(x)
    row = BINS.index(y)
    z.backward(net.head.weight.detach() * fds.covariance.scale.float()[row])
    for p, q in zip(net.body.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    features, labels = batch(n=9)
    fds64 = trained(FDS(BINS, 4), batch())
    assert torch.autograd.gradcheck(lambda f: fds64.calibrate(f, labels), features.requires_grad_())


def test_features_are_never_written_to() -> None:
    fds = trained(FDS(BINS, 4), batch())
    features, labels = batch(5)
    before, version = features.clone(), features._version
    out = fds.calibrate(features, labels)
    fds.update(features, labels)
    assert torch.equal(features, before)
    assert features._version == version
    assert out.data_ptr() != features.data_ptr()


def test_nothing_happens_in_eval_mode_or_outside_labels_or_after_removal() -> None:
    net, fds = make()
    x, y = net_data()
    run_epoch(net, fds, x, y)
    plain = copy.deepcopy(net)
    plain.head._forward_pre_hooks.clear()
    net.eval()
    plain.eval()
    with fds.labels(y):
        assert torch.equal(net(x), plain(x))
    assert int(fds._moments.count.sum()) == 0
    net.train()
    plain.train()
    with pytest.warns(DirToolkitWarning, match="ran without labels"):
        assert torch.equal(net(x), plain(x))
    fds.eval()
    with fds.labels(y):
        assert torch.equal(net(x), plain(x))
    net, fds = Net(), FDS(BINS, 4)
    handle = fds.attach(net.head, "input")
    handle.remove()
    net(x)
    assert int(fds._moments.count.sum()) == 0


class NoSync(TorchDispatchMode):
    """Fails on operations that would wait for an accelerator; counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        name = func.name()
        for banned in ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero"):
            assert banned not in name, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_step_never_waits_for_the_device_and_does_not_loop_over_bins() -> None:
    """Public code: a Python loop over labels, with a sync for each."""
    calls = []
    for num_bins in (9, 900):
        bins = Bins.uniform(0, num_bins, width=1)
        fds = FDS(bins, 4)
        layer = nn.Identity()
        fds.attach(layer, "input")
        features, labels = torch.randn(1800, 4), torch.arange(1800) % num_bins
        trained(fds, (features, labels))
        with fds.labels(labels), NoSync() as mode:
            layer(features)
        calls.append(mode.calls)
    assert calls[0] == calls[1]
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.unique(labels)


def test_placing_labels_on_an_accelerator_never_waits_for_it() -> None:
    """A meta tensor stands for one on an accelerator: reading its values would raise."""
    labels = torch.empty(90, device="meta")
    assert placed(labels, BINS, "raise").device.type == "meta"
    with pytest.raises(ValueError, match="labels must hold values, got a tensor on the meta device"):
        BINS.index(labels, outside="raise")  # this one has to look


class Depth(nn.Module):
    """Maps of four channels, and a 1x1 convolution that reads a label off each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())[:, 0]


@pytest.mark.parametrize("where", ["input", "output"])
def test_a_hook_on_a_convolution_calibrates_the_channels_of_each_pixel(where: Any) -> None:
    torch.manual_seed(0)
    net, fds = Depth().double(), FDS(BINS, 4, outside="drop")
    plain = copy.deepcopy(net)
    fds.attach(net.head if where == "input" else net.body, where)
    x, y = torch.randn(6, 2, 8, 5, dtype=torch.float64), (torch.arange(240.0).view(6, 8, 5) % 9)
    y[:, 0] = -1  # pixels without a label
    with fds.labels(y):
        assert torch.equal(net(x), plain(x))
    fds.end_epoch()
    assert fds.statistics()["count"].sum() == (y >= 0).sum()
    before = plain.body(x) if where == "output" else plain.body(x).relu()
    with fds.labels(y):
        pred = net(x)
    s = fds.statistics()
    ratio = (s["smoothed_variance"] / s["variance"]).clamp(*fds.covariance.settings.clip).sqrt()
    expected = before.clone()
    for n, i, j in itertools.product(range(6), range(8), range(5)):
        b = int(y[n, i, j])
        if b >= 0:
            expected[n, :, i, j] = (before[n, :, i, j] - s["mean"][b]) * ratio[b] + s["smoothed_mean"][b]
    expected = plain.head(expected.relu() if where == "output" else expected)[:, 0]
    torch.testing.assert_close(pred, expected, rtol=1e-12, atol=1e-12)
    pred.sum().backward()
    assert net.body.weight.grad is not None
    assert net.body.weight.grad.isfinite().all()


def test_labels_of_another_resolution_are_refused_with_what_to_do() -> None:
    fds, maps = FDS(BINS, 4), torch.zeros(3, 4, 8, 5)
    message = r"same samples, got \(3, 4, 8, 5\) and \(3, 16, 10\)\. Resize the labels to \(8, 5\) by their nearest"
    with pytest.raises(ShapeError, match=message):
        fds.update(maps, torch.zeros(3, 16, 10))
    fds.update(maps, nn.functional.interpolate(torch.zeros(3, 16, 10)[:, None], (8, 5))[:, 0])
    grid = FDS(Bins.grid(BINS, BINS), 4)
    with pytest.raises(ShapeError, match=r"same samples.* Resize the labels to \(8, 5\) .*, or attach where"):
        grid.update(maps, torch.zeros(3, 16, 10, 2))


# ---- grids of label axes ----

GRID = Bins.grid(BINS, Bins.uniform(0, 4, width=1))
WINDOWS = (gaussian(5, 2), gaussian(3, 1))


def joint_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """As ``batch``, with a second dimension; joint bins have three samples each, and three of them none."""
    features, labels = batch(seed, n=9 * 12)
    labels = torch.stack([labels, torch.arange(9 * 12).div(9, rounding_mode="floor") % 4], 1)
    keep = (labels[:, 0] != 4) | (labels[:, 1] == 2)
    return features[keep], labels[keep]


@pytest.mark.parametrize("count_weighted", [False, True])
def test_statistics_over_a_grid_are_smoothed_by_the_product_of_windows(count_weighted: bool) -> None:
    features, labels = joint_batch()
    fds = trained(FDS(GRID, 4, kernel=WINDOWS, count_weighted=count_weighted), (features, labels))
    s = fds.statistics()
    index = GRID.index(labels)
    matrices = [smoothing_matrix(n, w) for n, w in zip(GRID.shape, WINDOWS, strict=True)]
    for b in range(len(GRID)):
        weighted, total = torch.zeros(4, dtype=torch.float64), 0.0
        for other in range(len(GRID)):
            here = features[index == other]
            if len(here):
                (i, j), (k, m) = divmod(b, 4), divmod(other, 4)
                share = matrices[0][i, k] * matrices[1][j, m] * (len(here) if count_weighted else 1)
                weighted, total = weighted + share * here.mean(0), total + share
        torch.testing.assert_close(s["smoothed_mean"][b], weighted / total, rtol=1e-12, atol=1e-12)
    assert (s["count"] == 0).sum() == 3
    unseen = torch.tensor([[4.0, 0.0]])
    assert torch.equal(fds.calibrate(features[:1], unseen), features[:1])
    assert not torch.equal(fds.calibrate(features, labels), features)
    assert not any("smoothing" in name for name in fds.state_dict())


def test_a_grid_of_one_axis_is_that_axis_to_the_bit() -> None:
    batches = [batch(seed) for seed in range(3)]
    flat = trained(FDS(BINS, 4, shrinkage=3.0), *batches)
    over = trained(FDS(Bins.grid(BINS), 4, shrinkage=3.0), *((z, y[:, None]) for z, y in batches))
    features, labels = batch(9)
    assert torch.equal(over.calibrate(features, labels[:, None]), flat.calibrate(features, labels))
    for name, value in flat.state_dict().items():
        if name != "_extra_state":  # which tells the bins
            assert value.numpy().tobytes() == over.state_dict()[name].numpy().tobytes()
    matrix = torch.from_numpy(smoothing_matrix(9, gaussian(5, 2)))
    share = (flat.running_count > 0).double()[:, None].expand(9, 4)
    plain = (matrix @ flat.running_mean) / (matrix @ share)
    torch.testing.assert_close(flat.statistics()["smoothed_mean"], plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_maps_and_checkpoints_over_a_grid(form: Any) -> None:
    features, labels = joint_batch()
    maps, of_pixels = features.view(3, 3, 11, 4).movedim(3, 1), labels.view(3, 3, 11, 2)
    fds, wide, other = (FDS(GRID, 4, kernel=WINDOWS, covariance=form, rank=2) for _ in range(3))
    trained(fds, *[(features, labels)] * 2)
    trained(wide, *[(maps, of_pixels)] * 2)
    expected = fds.calibrate(features, labels).view(3, 3, 11, 4).movedim(3, 1)
    torch.testing.assert_close(wide.calibrate(maps, of_pixels), expected)
    other.load_state_dict(fds.state_dict())
    assert torch.equal(other.calibrate(features, labels), fds.calibrate(features, labels))
    assert not torch.equal(fds.calibrate(features, labels), features)


def test_mistakes_over_a_grid_are_refused() -> None:
    features, labels = joint_batch()
    fds = FDS(GRID, 4, kernel=WINDOWS)
    with pytest.raises(CheckpointError, match="the saved statistics must be over the same bins, got <BinGrid"):
        fds.set_extra_state(pack(unpack(fds.get_extra_state()) | {"bins": Bins.grid(BINS).settings}))
    with pytest.raises(
        ShapeError, match=r"labels must be \(N, 2\), or \(N, \.\.\., 2\) for one label per step or.*got shape \(90"
    ):
        fds.update(features, labels[:90, 0])
    with pytest.raises(ShapeError, match=r"labels must be \(\.\.\., 2\), one number per dimension"):
        fds.update(features, torch.zeros(len(features), 3))
    with pytest.raises(ValueError, match=r"^FDS: kernel must not be longer than the label axis, got 5 values for 4"):
        FDS(GRID, 4, kernel=gaussian(5, 2))


@pytest.mark.parametrize("form", FORMS)
def test_an_epoch_that_ends_in_inference_mode_is_like_any_other(form: Any) -> None:
    plain, inferring = (FDS(BINS, 4, covariance=form, rank=2) for _ in range(2))
    for seed in range(3):
        trained(plain, batch(seed))
        inferring.update(*batch(seed))
        with torch.inference_mode():
            inferring.end_epoch()
    features, labels = batch(9)
    carried = inferring.calibrate(features.requires_grad_(), labels)
    carried.sum().backward()
    assert torch.equal(carried, plain.calibrate(features, labels))


# ---- company: autocast, compile, checkpointing, copies, checkpoints ----


def test_autocast_keeps_the_dtype_of_features_and_float64_statistics() -> None:
    net, fds = make()
    x, y = net_data(900)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), fds.labels(y):
            loss = (net(x) - y).square().mean()
        loss.backward()
        fds.end_epoch()
    assert fds.statistics()["count"].sum() == 900
    assert fds.running_mean.dtype == torch.float64
    half = torch.randn(90, 4).bfloat16()
    out = fds.calibrate(half, net_data()[1])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, fds.calibrate(half.float(), net_data()[1]).bfloat16())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's own tracing
@pytest.mark.parametrize("form", FORMS)
def test_compiled_after_attaching_it_gives_the_same_steps(form: str) -> None:
    x, y = net_data()
    (net, fds), (twin, twin_fds) = make(covariance=form), make(covariance=form)
    compiled = torch.compile(twin, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(run_epoch(net, fds, x, y), run_epoch(compiled, twin_fds, x, y))
    torch.testing.assert_close(fds.running_mean, twin_fds.running_mean)
    assert twin_fds.epoch == 3


class Calling(nn.Module):
    """A small regressor that calls FDS in its forward."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.fds = nn.Linear(3, 4), nn.Linear(4, 1), FDS(BINS, 4, rank=2, **settings)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.fds(self.body(x), y)).squeeze(1)


def test_called_in_a_forward_it_does_what_a_hook_does() -> None:
    called, hooked, place = FDS(BINS, 4), FDS(BINS, 4), nn.Identity()
    hooked.attach(place, "output")
    for seed in range(3):
        features, labels = batch(seed)
        with hooked.labels(labels):
            expected = place(features)
        assert torch.equal(called(features, labels), expected)
        assert called.has_open_epoch
        called.end_epoch()
        hooked.end_epoch()
    assert not torch.equal(expected, features)
    assert called.eval()(features) is features
    assert not called.has_open_epoch
    with pytest.raises(TypeError, match=r"^FDS: labels must be a torch\.Tensor, got NoneType"):
        called.train()(features)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's own tracing
@pytest.mark.parametrize(
    "settings", [{}, {"start_epoch": 2, "outside": "drop"}, *({"covariance": form} for form in FORMS[1:])], ids=str
)
def test_a_model_that_calls_it_is_compiled_whole_and_has_the_same_epochs(settings: dict[str, Any]) -> None:
    torch.compiler.reset()  # what torch learnt of other models' sizes
    whole, beyond = "covariance" not in settings, 3 * ("outside" in settings)
    nets = plain, twin = Calling(**settings), Calling(**settings)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=counter, fullgraph=whole)
    x, y = net_data()
    for epoch in range(4):
        for size in (90, 60):
            outputs = [net(x[:size] + epoch, y[:size] + beyond) for net in (plain, compiled)]
            torch.testing.assert_close(*outputs)
            for output in outputs:
                output.square().mean().backward()
        for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        counts = [unpack(net.fds.get_extra_state())["counters"] for net in nets]
        assert counts[0].tolist() == counts[1].tolist()
        for net in nets:
            net.fds.end_epoch()
        expected = plain.fds.statistics()
        torch.testing.assert_close(twin.fds.statistics(), expected, rtol=1e-9, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))
        assert not twin.fds.has_open_epoch
        for net in nets:
            net.train()
    if whole:
        assert counter.frame_count == 3  # batches of one size, of any size, and eval mode


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's own tracing
def test_bad_labels_and_arguments_of_a_compiled_step_are_told() -> None:
    x, y = net_data()
    net = Calling()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    compiled(x, y + 3)
    with pytest.raises(LabelError, match=r"^FDS.end_epoch: labels must lie on the label axis .*, got 20 that do not"):
        net.fds.end_epoch()
    with pytest.raises(ShapeError, match=r"^FDS: features and labels must have the same samples"):
        torch.compile(net, backend="eager")(x, y[1:])


def test_the_state_of_an_epoch_before_calibration_starts_undoes_the_maps() -> None:
    fds, (features, labels) = FDS(BINS, 4, start_epoch=2), batch()
    states = [trained(fds, batch(seed)).state_dict() for seed in range(2)]
    net = torch.compile(fds, backend="eager", fullgraph=True)
    assert not torch.equal(net(features, labels), features)
    fds.load_state_dict(states[0])
    assert torch.equal(net(features, labels), features)


def test_attached_after_the_first_compiled_call_it_says_so() -> None:
    x, y = net_data()
    net, fds = Net(), FDS(BINS, 4)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    fds.attach(net.head, "input")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fds.labels(y):
            compiled(x)
    ran = int(fds._moments.count.sum()) == 90
    warned = any("no attached module ran" in str(w.message) for w in caught)
    assert ran != warned  # torch versions differ in whether the hook fires: it works, or it is told


@pytest.mark.parametrize("form", FORMS)
def test_a_hooked_model_can_be_pickled_and_copied(form: str) -> None:
    net, fds = make(covariance=form)
    x, y = net_data()
    for _ in range(2):
        run_epoch(net, fds, x, y)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)  # our own file, of a moment ago
    twin = copy.deepcopy(net)
    for other in (again, twin):
        (hook,) = other.head._forward_pre_hooks.values()
        assert hook.fds is not fds
        assert torch.equal(other.eval()(x), net.eval()(x))
        z = net.body(x)
        assert torch.equal(hook.fds.calibrate(z, y), fds.calibrate(z, y))
        assert not torch.equal(fds.calibrate(z, y), z)


def test_checkpoint_in_mid_epoch_restores_to_the_bit(tmp_path: Path) -> None:
    fds = trained(FDS(BINS, 4), batch(0))
    fds.update(*batch(1))
    torch.save(fds.state_dict(), tmp_path / "fds.pt")
    restored = FDS(BINS, 4)
    restored.load_state_dict(torch.load(tmp_path / "fds.pt", weights_only=True))
    features, labels = batch(5)
    for f in (fds, restored):
        f.update(*batch(2))
        f.end_epoch()
    assert torch.equal(fds.calibrate(features, labels), restored.calibrate(features, labels))
    assert restored.epoch == fds.epoch == 2
    with pytest.raises(ValueError, match="must be over the same bins"):
        FDS(Bins.uniform(0, 90, width=10), 4).load_state_dict(fds.state_dict())


def test_all_tensors_follow_the_module_but_statistics_stay_float64() -> None:
    """Public code: a kernel that is no buffer, and a hard-coded device."""
    fds = trained(FDS(BINS, 4), batch()).half()
    assert {b.dtype for b in fds.buffers()} == {torch.float64}
    features, labels = batch()
    torch.testing.assert_close(
        fds.calibrate(features, labels), trained(FDS(BINS, 4), batch()).calibrate(features, labels)
    )
    assert {b.device.type for b in fds.to("meta").buffers()} == {"meta"}
    assert fds._moments.mean.device.type == fds._unplaced.device.type == "meta"  # which collectives are run on
    assert fds.smoothing.sum().item() == pytest.approx(1)


# ---- two processes ----


def rank_main(rank: int) -> dict[str, Any]:
    features, labels = batch()
    mine = slice(0, 20) if rank == 0 else slice(20, None)  # uneven; and rank 0 alone holds label 8
    hide = (labels == 8) & (torch.arange(90) >= 20)
    result = {}
    for form in FORMS:
        alone = (features[mine][~hide[mine]], labels[mine][~hide[mine]])
        fds = trained(FDS(BINS, 4, covariance=form, rank=2), alone, alone)

        # inside the wrapped module too, whose buffers DistributedDataParallel overwrites with rank 0's
        net, inside = make(covariance=form)
        net.register_module("fds", inside)
        wrapped = nn.parallel.DistributedDataParallel(net)
        x, y = net_data()
        net.body[1].eval()
        for _ in range(2):
            with inside.labels(y[mine]):
                wrapped(x[mine]).sum().backward()
            inside.end_epoch()
        result[form] = {"alone": without_signs(fds.statistics()), "inside": without_signs(inside.statistics())}
    return result


def sharded_main(rank: int) -> dict[str, Any]:
    """Inside the sharded module, of which FSDP2 leaves buffers alone."""
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which is not written to here
    mine, result = slice(0, 45) if rank == 0 else slice(45, None), {}
    for form in FORMS:
        net, fds = make(covariance=form)
        net.register_module("fds", fds)
        net.body[1].eval()
        fully_shard(net.body)
        fully_shard(net)
        x, y = net_data()
        losses = []
        for _ in range(2):
            with fds.labels(y[mine]):
                loss = net(x[mine]).square().mean()
            loss.backward()
            losses.append(loss.detach())
            fds.end_epoch()
        net.load_state_dict(net.state_dict())
        result[form] = {"loss": torch.stack(losses), **without_signs(fds.statistics())}
    return result


def test_two_ranks_with_sharded_parameters_equal_one(two_ranks: Callable[..., list[Any]]) -> None:
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("torch 2.6 is the first with FSDP2 in public")
    states = two_ranks(sharded_main)
    x, y = net_data()
    for form in FORMS:
        net, fds = make(covariance=form)
        net.body[1].eval()
        losses = []
        for _ in range(2):
            with fds.labels(y):
                losses.append(net(x).square().mean().detach())
            fds.end_epoch()
        loss = torch.stack([state[form].pop("loss") for state in states]).mean(0)
        torch.testing.assert_close(loss, torch.stack(losses), rtol=1e-5, atol=1e-6)
        for name, value in without_signs(fds.statistics()).items():
            for state in states:
                torch.testing.assert_close(state[form][name], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)


def without_signs(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of low rank with eigenvectors whose largest entry is positive, since their signs are arbitrary."""
    if "basis" in statistics:
        basis = statistics["basis"]
        turn = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()[0]
        statistics["basis"] = basis * turn
        for name in ("covariance", "smoothed_covariance"):
            statistics[name] = statistics[name] * turn[:, None] * turn
    return statistics


def test_two_processes_with_uneven_shares_equal_one(two_ranks: Callable[..., list[Any]]) -> None:
    features, labels = batch()
    keep = ~((labels == 8) & (torch.arange(90) >= 20))
    states = two_ranks(rank_main)
    for form in FORMS:
        alone = trained(FDS(BINS, 4, covariance=form, rank=2), *[(features[keep], labels[keep])] * 2)
        net, fds = make(covariance=form)
        net.body[1].eval()
        x, y = net_data()
        for _ in range(2):
            with fds.labels(y):
                net(x)
            fds.end_epoch()
        for name, expected, tolerance in (("alone", alone, 1e-12), ("inside", fds, 1e-6)):
            for key, value in without_signs(expected.statistics()).items():
                for state in states:
                    torch.testing.assert_close(
                        state[form][name][key], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=key
                    )


# ---- what is told, and what is refused ----


def our_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, DirToolkitWarning)]


def test_forgetting_labels_warns_once() -> None:
    net, _ = make()
    x, _ = net_data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            net(x)
    assert len(our_warnings(caught)) == 1
    assert "Run it inside `with fds.labels(y):`" in our_warnings(caught)[0]


def test_labels_around_a_model_that_places_its_own_do_not_warn() -> None:
    net, fds = make()
    x, y = net_data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fds.labels(y), fds.labels(y):
            net(x)
        with fds.labels(y):
            pass
    assert ["no attached module ran" in message for message in our_warnings(caught)] == [True]  # of the last


@pytest.mark.parametrize("validates", [True, False])
def test_forgetting_the_end_of_more_than_one_epoch_warns_once(validates: bool) -> None:
    net, fds = make()
    x, y = net_data()
    run_epoch(net, fds, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(6):
            net.train()
            with fds.labels(y):
                net(x)
            if validates:
                net.eval()
                net(x)
            if epoch == 0:
                assert not our_warnings(caught)
    assert len(our_warnings(caught)) == 1
    assert "Call fds.end_epoch() once after each training epoch" in our_warnings(caught)[0]


def test_a_whole_correct_training_warns_of_nothing() -> None:
    net, fds = make()
    x, y = net_data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            net.train()
            run_epoch(net, fds, x, y)
            net.eval()
            net(x)
    assert our_warnings(caught) == []


def test_end_of_an_epoch_without_features_or_with_broken_ones_is_refused_and_changes_nothing() -> None:
    fds = trained(FDS(BINS, 4), batch())
    before = {k: v.clone() for k, v in fds.statistics().items()}
    with pytest.raises(ValueError, match="features must be gathered before an epoch ends"):
        fds.end_epoch()
    features, labels = batch(1)
    features[12, 0] = torch.nan  # label 3
    fds.update(features, labels)
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinity in bins \[3\]"):
        fds.end_epoch()
    for name, value in fds.statistics().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)
    assert fds.epoch == 1
    trained(fds, batch(2))
    assert fds.epoch == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1.0"),
        ({"momentum": float("nan")}, "momentum must be"),
        ({"clip": (2.0, 1.0)}, r"clip must be a pair \(low, high\)"),
        ({"clip": 3}, r"clip must be a pair \(low, high\)"),
        ({"start_epoch": 0}, "start_epoch must be at least 1"),
        ({"shrinkage": -1.0}, "shrinkage must be >= 0"),
        ({"kernel": [1.0, 1.0]}, "kernel must have odd length"),
        ({"kernel": np.ones(11)}, "kernel must not be longer than the label axis, got 11 values for 9 bins"),
        ({"covariance": "other"}, "covariance must be one of 'diagonal'"),
        ({"outside": "ignore"}, "outside must be one of"),
        ({"edges": "wrap"}, "edges must be one of"),
        ({"num_features": 0}, "num_features must be at least 1"),
        ({"count_weighted": "no"}, "count_weighted must be a bool, got str"),
        ({"group": "data"}, "group must be a torch.distributed.ProcessGroup that this rank is in, or None, got 'data'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FDS(BINS, **{"num_features": 4, **settings})


def test_bad_calls_are_refused_with_what_to_do() -> None:
    fds = FDS(BINS, 4)
    features, labels = batch()
    with pytest.raises(TypeError, match="bins must be a Bins or a BinGrid, got int"):
        FDS(9, 4)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"same samples, got \(90, 4\) and \(90, 1\)\. Use labels\.squeeze\(1\)"):
        fds.update(features, labels[:, None])
    with pytest.raises(ShapeError, match=r"features must be \(N, 4, \.\.\.\) or \(N, \.\.\., 4\), got shape \(90, 3\)"):
        fds.update(features[:, :3], labels)
    with pytest.raises(ShapeError, match="features and labels must have the same samples"):
        fds.update(features, labels[:1])
    with pytest.raises(TypeError, match=r"features must be floats, got dtype torch\.int64"):
        fds.update(features.long(), labels)
    with pytest.raises(TypeError, match="features must be dense"):
        fds.update(features.to_sparse(), labels)
    with pytest.raises(CheckpointError, match=r"FDS.set_extra_state: the saved state must be the bytes .*got NoneType"):
        fds.set_extra_state(None)  # type: ignore[arg-type]
    state = unpack(fds.get_extra_state())
    with pytest.raises(ValueError, match=r"the saved state must have the keys .* got missing \['moments'\]"):
        fds.set_extra_state(pack({name: value for name, value in state.items() if name != "moments"}))
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        fds.update(features, [1, 2])  # type: ignore[arg-type]
    broken = labels.clone()
    broken[5] = torch.nan
    with pytest.raises(LabelError, match=r"labels must not be NaN, got nan at index \[5\]"):
        fds.update(features, broken)
    with pytest.raises(TypeError, match="module must be a Module, got str"):
        fds.attach("fc", "input")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="where must be one of 'input', 'output'"):
        fds.attach(nn.Identity(), "inside")  # type: ignore[arg-type]
    layer = nn.Identity()
    fds.attach(layer, "input")
    with pytest.raises(TypeError, match="which select=0 must select, got a tuple of 0"), fds.labels(labels):
        layer(input=features)
    pair = nn.Module()
    pair.forward = lambda x: (x, x)  # type: ignore[method-assign]
    fds.attach(pair, "output")
    with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got a tuple of 2"), fds.labels(labels):
        pair(features)
    assert int(fds._moments.count.sum()) == 0


def test_a_single_sample_is_enough() -> None:
    fds = trained(FDS(BINS, 4), (torch.ones(1, 4), torch.tensor([3.0])))
    assert torch.equal(fds.calibrate(torch.ones(1, 4), torch.tensor([3.0])), torch.ones(1, 4))
