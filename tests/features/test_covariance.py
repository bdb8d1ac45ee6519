"""FDS with full and low-rank covariances."""

import copy
import ctypes
import re
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dir_toolkit import FDS, Bins, _memory
from dir_toolkit.errors import DirToolkitWarning
from dir_toolkit.features.covariance import BinCovariance, Settings
from dir_toolkit.features.maps import covariance_map
from dir_toolkit.features.matrix_covariance import FullCovariance, LowRankCovariance

BINS = Bins.uniform(0, 5, width=1)
FORMS = ["full", "low_rank"]


def batch(seed: int = 0, n: int = 400, num_features: int = 6) -> tuple[Tensor, Tensor]:
    """Correlated features whose mean and covariance differ from bin to bin, and labels in four of the five bins."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 5).double()
    labels[labels == 3] = 4.0
    mixing = torch.randn(5, num_features, num_features, generator=generator, dtype=torch.float64)
    mixing = torch.eye(num_features, dtype=torch.float64) + mixing / 3
    noise = torch.randn(n, num_features, generator=generator, dtype=torch.float64)
    return torch.einsum("nij,nj->ni", mixing[labels.long()], noise) + labels[:, None].sin(), labels


def make(form: Any, num_features: int = 6, **settings: Any) -> FDS:
    return FDS(BINS, num_features, covariance=form, rank=2, kernel=[1, 2, 1], **settings)


def trained(fds: FDS, *batches: tuple[Tensor, Tensor]) -> FDS:
    for features, labels in batches:
        fds.update(features, labels)
        fds.end_epoch()
    return fds


def scatter(features: Tensor) -> Tensor:
    return torch.from_numpy(np.cov(features.numpy().T))


def assert_carried(fds: FDS, features: Tensor, labels: Tensor) -> None:
    """The mapped sample of each bin has the smoothed mean and covariance, computed here bin by bin."""
    mapped = fds.calibrate(features, labels)
    present = [0, 1, 2, 4]
    mean = {b: features[labels == b].mean(0) for b in present}
    spread = {b: scatter(features[labels == b]) for b in present}
    windows: dict[int, dict[int, int]] = {0: {0: 3, 1: 1}, 1: {0: 1, 1: 2, 2: 1}, 2: {1: 1, 2: 2}, 4: {4: 3}}
    for b, window in windows.items():  # at the ends the window is reflected
        total = sum(window.values())
        own = mapped[labels == b]
        torch.testing.assert_close(own.mean(0), sum(w * mean[k] for k, w in window.items()) / total)
        expected = sum(w * spread[k] for k, w in window.items()) / total
        torch.testing.assert_close(scatter(own), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("map", ["paper", "transport"])
def test_mapped_samples_have_the_smoothed_covariance(map: Any) -> None:
    features, labels = batch()
    fds = trained(make("full", map=map, shrinkage=0, clip=(0.0, 1e6)), (features, labels))
    assert_carried(fds, features, labels)
    with pytest.raises(AssertionError):  # variances alone do not carry covariances
        assert_carried(trained(make("diagonal"), (features, labels)), features, labels)


def test_transport_moves_features_least() -> None:
    """Of all maps that carry the covariance there: those are S'^(1/2) Q S^(-1/2) for orthogonal Q; Q = 1, the paper's,
    is among them."""
    generator = torch.Generator().manual_seed(0)
    features, labels = batch()
    features = features[labels == 1] - features[labels == 1].mean(0)
    sigma, smoothed = scatter(features), scatter(batch(1)[0])
    inverse = covariance_map(sigma, torch.eye(6).double(), clip=(0.0, 1e6), map="paper")  # S^(-1/2)
    half = torch.linalg.inv(covariance_map(smoothed, torch.eye(6).double(), clip=(0.0, 1e6), map="paper"))

    def moved(matrix: Tensor) -> float:
        torch.testing.assert_close(matrix @ sigma @ matrix.T, smoothed, rtol=1e-6, atol=1e-6)
        return float((features @ matrix.T - features).square().sum())

    least = moved(covariance_map(sigma, smoothed, clip=(0.0, 1e6), map="transport"))
    assert least < 0.99 * moved(half @ inverse)
    for near in (0.01, 1.0) * 25:  # little turns of the transport itself, and any orthogonal matrix
        noise = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        turn = torch.linalg.matrix_exp(near * (noise - noise.T)) if near < 1 else torch.linalg.qr(noise).Q
        own = torch.linalg.inv(half) @ covariance_map(sigma, smoothed, clip=(0.0, 1e6), map="transport")
        assert least < moved(half @ (turn @ own if near < 1 else turn @ inverse))


class Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("map", "clip", "decompositions"),
    [
        ("transport", (0.0, 1e6), 4),
        ("paper", (0.0, 1e6), 8),
        ("transport", (0.999, 1.001), 7),
        ("paper", (0.999, 1.001), 11),
    ],
)
def test_decompositions_of_an_epoch_and_products_of_a_step(form: str, map: Any, clip: Any, decompositions: int) -> None:
    features, labels = batch()
    fds = trained(make(form, map=map, clip=clip), (features, labels))
    fds.update(features, labels)
    with Count() as count:
        fds.end_epoch()
    # One a bin with statistics for the transport, two for the paper's map, one more to clip, which bin 4, alone, needs
    # not; of low rank, besides, that which finds the subspace.
    assert count.of["aten::_linalg_eigh"] == decompositions + (form == "low_rank")
    some = labels < 2
    with Count() as count:
        fds.calibrate(features[some], labels[some])
    products = sum(count.of[f"aten::{name}"] for name in ("mm", "addmm", "bmm"))
    assert products == (2 if form == "full" else 3)  # one a bin present; or into the subspace, within and back


@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
def test_of_one_feature_full_covariance_is_the_diagonal_form(shrinkage: float) -> None:
    batches = [tuple(x[:, :1] if x.ndim == 2 else x for x in batch(seed)) for seed in range(3)]
    forms = [trained(FDS(BINS, 1, covariance=form, shrinkage=shrinkage), *batches) for form in ("diagonal", "full")]
    features, labels = batches[0]
    diagonal, full = (fds.calibrate(features, labels) for fds in forms)
    torch.testing.assert_close(full, diagonal, rtol=1e-8, atol=1e-8)
    assert not torch.equal(full, features)


def test_running_covariance_follows_momentum_and_shrinkage() -> None:
    first, second = batch(1), batch(2)
    fds = trained(make("full", momentum=0.75, shrinkage=7.0), first, second)
    running, count = {}, {}
    for b in (0, 1, 2, 4):
        (x, y), (v, w) = first, second
        running[b] = 0.75 * scatter(x[y == b]) + 0.25 * scatter(v[w == b])
        count[b] = float((y == b).sum())
    pooled = sum((count[b] - 1) * running[b] for b in running) / sum(n - 1 for n in count.values())
    s = fds.statistics()
    for b in running:
        expected = ((count[b] - 1) * running[b] + 7 * pooled) / (count[b] - 1 + 7)
        torch.testing.assert_close(s["covariance"][b], expected)
        torch.testing.assert_close(s["variance"][b], expected.diagonal())
    assert s["covariance"][3].isnan().all()


def test_shrinkage_is_by_default_the_side_of_the_matrices() -> None:
    assert [make(form).covariance.shrinkage for form in ("diagonal", "full", "low_rank")] == [0.0, 6.0, 2.0]


def test_bins_of_fewer_samples_than_features_have_bounded_maps() -> None:
    features, labels = batch(num_features=40)
    few = torch.cat([torch.arange(3), torch.arange(5, 400)])
    few = few[(labels[few] != 0) | (few == 0)]  # one sample of bin 0; fewer than 40 of some others follow
    few = few[(labels[few] != 1) | (few < 30)]
    fds = trained(make("full", 40), (features[few], labels[few]))
    assert fds.statistics()["count"][:2].tolist() == [1, 6]
    values = torch.linalg.svdvals(fds.covariance.matrix)
    assert values.max() <= 10**0.5 * (1 + 1e-6)
    assert values.min() >= 0.1**0.5 * (1 - 1e-6)
    assert fds.calibrate(features, labels).isfinite().all()
    unshrunk = trained(make("full", 40, shrinkage=0), (features[few], labels[few]))
    # a singular covariance is known to rounding only, which differs from processor to processor
    assert torch.linalg.svdvals(unshrunk.covariance.matrix).max() <= 10**0.5 * (1 + 1e-2)


def test_low_rank_maps_of_few_samples_are_bounded_and_shrunk_as_an_oracle_shrinks() -> None:
    features, labels = batch(num_features=40)
    few = (labels > 1) | (torch.arange(400) < 11)  # three samples of bin 0 and of bin 1
    features, labels = features[few], labels[few]
    fds = FDS(BINS, 40, covariance="low_rank", rank=8, kernel=[1, 2, 1], momentum=0.0)
    s = trained(fds, *[(features, labels)] * 2).statistics()
    assert s["count"][:2].tolist() == [3, 2]
    within = fds.covariance.matrix[:-1] + fds.covariance.scale[:-1, :, None] * torch.eye(8)
    for values in (torch.linalg.svdvals(within), fds.covariance.scale):
        assert values.max() <= 10**0.5 * (1 + 1e-6)
        assert values.min() >= 0.1**0.5 * (1 - 1e-6)
    assert fds.calibrate(features, labels).isfinite().all()
    present = [0, 1, 2, 4]
    spread = {b: scatter(features[labels == b] @ s["basis"]) for b in present}
    rest = {b: (features[labels == b].var(0).sum() - spread[b].trace()) / 32 for b in present}
    degrees = {b: float((labels == b).sum()) - 1 for b in present}
    for values, name in ((spread, "covariance"), (rest, "rest")):
        pooled = sum(degrees[b] * values[b] for b in present) / sum(degrees.values())
        for b in present:
            shrunk = (degrees[b] * values[b] + 8 * pooled) / (degrees[b] + 8)
            torch.testing.assert_close(s[name][b], shrunk, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_features_that_never_vary_are_left_alone(form: str) -> None:
    features, labels = batch()
    features[:, 2] = 0
    fds = trained(make(form), *[(features, labels)] * 2)
    torch.testing.assert_close(fds.calibrate(features, labels)[:, 2], features[:, 2], rtol=0, atol=1e-4)


def test_low_rank_is_the_map_of_its_own_covariances() -> None:
    """Against the full maps of the matrices that the low-rank form stands for."""
    batches = [batch(seed) for seed in range(3)]
    fds = trained(make("low_rank"), *batches)
    s = fds.statistics()
    q = s["basis"]
    torch.testing.assert_close(q.T @ q, torch.eye(2, dtype=torch.float64))
    own = torch.eye(6, dtype=torch.float64)
    features, labels = batches[0]
    carried = fds.calibrate(features, labels)
    for b in (0, 1, 2, 4):
        sigma, smoothed = (
            q @ s[f"{kind}covariance"][b] @ q.T + s[f"{kind}rest"][b] * (own - q @ q.T) for kind in ("", "smoothed_")
        )
        torch.testing.assert_close(sigma.diagonal(), s["variance"][b])
        matrix = covariance_map(sigma, smoothed, clip=(0.1, 10.0), map="transport")
        expected = (features[labels == b] - s["mean"][b]) @ matrix.T + s["smoothed_mean"][b]
        torch.testing.assert_close(carried[labels == b], expected, rtol=1e-6, atol=1e-6)


def test_low_rank_keeps_the_leading_directions_and_the_total_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q
    labels = (torch.arange(500) % 5).double()
    strong = torch.randn(500, 2, generator=generator, dtype=torch.float64) * (3 + labels[:, None])
    features = strong @ directions.T + 0.1 * torch.randn(500, 6, generator=generator, dtype=torch.float64)
    fds = trained(make("low_rank", shrinkage=0), *[(features, labels)] * 2)
    s = fds.statistics()
    overlap = torch.linalg.svdvals(s["basis"].T @ directions)
    torch.testing.assert_close(overlap, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)
    for b in range(5):
        total = features[labels == b].var(0).sum()
        kept = s["covariance"][b].trace() + 4 * s["rest"][b]
        torch.testing.assert_close(kept, total)
        torch.testing.assert_close(s["variance"][b].sum(), total)


def test_low_rank_moves_means_only_in_the_first_epoch_that_it_calibrates() -> None:
    features, labels = batch()
    fds = trained(make("low_rank"), (features, labels))
    s = fds.statistics()
    step = (s["smoothed_mean"] - s["mean"])[labels.long()]
    torch.testing.assert_close(fds.calibrate(features, labels), features + step)
    trained(fds, (features, labels))
    assert not torch.allclose(fds.calibrate(features, labels), features + step)


@pytest.mark.parametrize("form", FORMS)
def test_samples_without_a_bin_are_neither_counted_nor_moved(form: str) -> None:
    features, labels = batch()
    beyond = labels.clone()
    beyond[::4] = 99.0
    keep = beyond < 99
    dropping, plain = make(form, outside="drop"), make(form)
    trained(dropping, *[(features, beyond)] * 2)
    trained(plain, *[(features[keep], labels[keep])] * 2)
    for name, value in plain.statistics().items():
        torch.testing.assert_close(dropping.statistics()[name], value, equal_nan=True)
    out = dropping.calibrate(features, beyond)
    assert torch.equal(out[~keep], features[~keep])
    torch.testing.assert_close(out[keep], plain.calibrate(features[keep], labels[keep]))
    empty = plain.calibrate(features[:0], labels[:0])
    assert empty.shape == (0, 6)


@pytest.mark.parametrize("form", ["diagonal", *FORMS])
def test_rows_of_ignored_and_of_refused_labels_are_the_identity(form: str) -> None:
    features, labels = batch()
    fds = make(form)
    trained(fds, *[(features, labels)] * 2)
    for row in (len(fds.bins), len(fds.bins) + 1):
        rows = torch.full((len(features),), row)
        torch.testing.assert_close(fds.covariance.calibrate(features, rows, 1), features, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["diagonal", *FORMS])
@pytest.mark.parametrize("per_pixel", [False, True])
def test_maps_equal_their_pixels_taken_one_by_one(form: str, per_pixel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 6, 2, 3, generator=generator, dtype=torch.float64)
    labels = (torch.arange(20) % 5).double()
    if per_pixel:
        labels = torch.randint(0, 5, (20, 2, 3), generator=generator).double()
    wide = labels if per_pixel else labels[:, None, None].expand(20, 2, 3)
    pixels, pixel_labels = features.permute(0, 2, 3, 1).reshape(-1, 6), wide.reshape(-1)
    maps = trained(make(form), *[(features, labels)] * 2)
    flat = trained(make(form), *[(pixels, pixel_labels)] * 2)
    for name, value in flat.statistics().items():
        torch.testing.assert_close(maps.statistics()[name], value)
    expected = flat.calibrate(pixels, pixel_labels).view(20, 2, 3, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps.calibrate(features, labels), expected)
    assert not torch.allclose(expected, features)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_features_through_the_map(form: str) -> None:
    features, labels = batch()
    fds = trained(make(form), *[(features, labels)] * 2)
    some = features[:7].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fds.calibrate(x, labels[:7]), some)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_features_is_kept(form: str, dtype: torch.dtype) -> None:
    features, labels = batch()
    fds = trained(make(form), *[(features, labels)] * 2)
    narrow = fds.calibrate(features.to(dtype), labels)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.double(), fds.calibrate(features, labels), rtol=3e-2, atol=5e-2)
    assert all(buffer.dtype == torch.float64 for buffer in fds.half().buffers())


@pytest.mark.parametrize("form", ["diagonal", *FORMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_every_bit_is_the_same(form: str, dtype: torch.dtype) -> None:
    features, labels = batch()
    features = (features + 12).to(dtype)
    plain, under = make(form), make(form)
    trained(plain, *[(features, labels)] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        trained(under, *[(features, labels)] * 2)
        carried = under.calibrate(features, labels)
        maps = under.calibrate(features[:, :, None, None], labels)
        assert (features.float() @ features.float().T).dtype == torch.bfloat16  # autocast is on
    for name, value in plain.statistics().items():
        torch.testing.assert_close(under.statistics()[name], value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(carried, plain.calibrate(features, labels))
    assert torch.equal(maps[:, :, 0, 0], carried)


@pytest.mark.parametrize("form", FORMS)
def test_eval_mode_leaves_features_alone(form: str) -> None:
    features, labels = batch()
    fds = trained(make(form), *[(features, labels)] * 2).eval()
    assert fds.calibrate(features, labels) is features


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_state_goes_on_in_mid_epoch_to_the_bit(form: str, epochs: int) -> None:
    """Also as if it had never been saved."""
    (features, labels), more = batch(), batch(9)
    fds, never = (trained(make(form), *[batch(seed) for seed in range(epochs)]) for _ in range(2))
    for one in (fds, never):
        one.update(features, labels)
    again = make(form)
    again.load_state_dict(copy.deepcopy(fds.state_dict()))
    assert torch.equal(again.calibrate(features, labels), fds.calibrate(features, labels))
    for one in (fds, again, never):
        one.update(*more)
        one.end_epoch()
        trained(one, batch(10))
    for name, value in fds.statistics().items():
        for other in (again, never):
            torch.testing.assert_close(other.statistics()[name], value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.calibrate(features, labels), fds.calibrate(features, labels))
    assert not torch.equal(fds.calibrate(features, labels), features)


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_epoch_is_dropped_and_leaves_the_statistics(form: str) -> None:
    features, labels = batch()
    fds = trained(make(form), *[(features, labels)] * 2)
    before = fds.statistics()
    broken = features.clone()
    broken[11, 0] = torch.inf
    fds.update(broken, labels)
    with pytest.raises(ValueError, match=r"FDS.end_epoch: features must be finite, got NaN or infinity in bins \[1\]"):
        fds.end_epoch()
    for name, value in fds.statistics().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    trained(fds, (features, labels))


def test_more_matrices_than_memory_are_refused_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=r"^FDS: covariance 'full' over 5 bins of 100000 features takes 3725.3 GiB, which must be free, got .* "
        r'GiB. Pass covariance="low_rank" or "diagonal", or wider bins.$',
    ):
        FDS(BINS, 100_000, covariance="full")
    with pytest.raises(
        ValueError,
        match=r"^FDS: covariance 'low_rank' over 5 bins of 1000000 features takes .* GiB, which must be free, got .* "
        r'GiB. Pass a smaller rank, covariance="diagonal", or wider bins.$',
    ):
        FDS(BINS, 1_000_000, covariance="low_rank")
    for form, size in (("full", 900), ("low_rank", 2_000)):
        monkeypatch.setattr(_memory, "free_memory", lambda: None)  # a machine that does not say is taken to have enough
        stated = make(form, size).covariance.most_bytes
        monkeypatch.setattr(_memory, "free_memory", lambda: stated - 1)  # noqa: B023
        with pytest.raises(ValueError, match=f"covariance '{form}' over 5 bins of {size} features"):
            make(form, size)
        monkeypatch.setattr(_memory, "free_memory", lambda: stated)  # noqa: B023
        make(form, size)


TAKES: dict[str, tuple[int, int, int]] = {"full": (200, 64, 2), "low_rank": (100, 160, 40)}  # bins, features, rank


def peak() -> int:
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])


def smooth_twice(form: Any, num_bins: int, num_features: int, rank: int) -> None:
    y = torch.arange(num_bins).repeat_interleave(4)
    fds = FDS(Bins.classes(num_bins), num_features, covariance=form, rank=rank)
    for _ in range(2):
        fds.update(torch.randn(len(y), num_features), y)
        fds.end_epoch()
        fds.calibrate(torch.randn(9, num_features), y[:9])


def measure(connection: Connection) -> None:
    warnings.simplefilter("ignore", DirToolkitWarning)  # that classes are not smoothed
    # By M_MMAP_THRESHOLD the allocator gives large arrays back at once: else gaps between them count.
    ctypes.CDLL(None).mallopt(-3, 1_000_000)
    for form, sizes in TAKES.items():
        smooth_twice(form, 5, 6, 2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
        before = peak()
        smooth_twice(form, *sizes)
        connection.send(peak() - before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_memory_is_taken_than_stated() -> None:
    all_taken = Forked(__file__, "measure").finish()
    for (form, (num_bins, num_features, rank)), taken in zip(TAKES.items(), all_taken, strict=True):
        bins = Bins.uniform(0, num_bins, width=1)
        stated = FDS(bins, num_features, covariance=form, rank=rank).covariance.most_bytes  # type: ignore[arg-type]
        assert stated / 3 < taken <= stated, form


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"FDS: covariance must be one of .*, got 'half'"):
        make("half")
    with pytest.raises(ValueError, match=r"FDS: map must be one of 'paper', 'transport', got 'rotation'"):
        make("full", map="rotation")
    with pytest.raises(ValueError, match=r'FDS: rank must be below num_features 2, got 2\. Pass covariance="full"\.'):
        make("low_rank", 2)
    with pytest.raises(ValueError, match="FDS: rank must be at least 1, got 0"):
        FDS(BINS, 6, covariance="low_rank", rank=0)


def test_settings_tell_the_form_apart() -> None:
    assert "(covariance): FullCovariance(6 directions, map='paper', clip=(0.1, 10.0), shrinkage=6.0)" in repr(
        make("full", map="paper")
    )
    assert isinstance(make("full").covariance, FullCovariance)
    assert isinstance(make("low_rank").covariance, LowRankCovariance)
    with pytest.raises(TypeError):
        BinCovariance(5, 6, Settings(), shrinkage=0.0).moments()  # type: ignore[abstract]
