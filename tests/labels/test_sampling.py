from __future__ import annotations

import copy
import hashlib
import math
import pickle
from collections.abc import Sequence
from itertools import chain, permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from dir_toolkit.errors import CheckpointError, DirToolkitWarning, LabelError, ShapeError
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.kernels import triangular
from dir_toolkit.labels.sampling import BinSampler, bin_probabilities, progressive_probabilities

COUNTS = [0, 60, 25, 0, 10, 5, 0]  # empty bins at both ends and between
BINS = Bins.classes(7)
LABELS = torch.arange(7).repeat_interleave(torch.tensor(COUNTS))[
    torch.randperm(100, generator=torch.Generator().manual_seed(0))
]


def naive_probabilities(counts: Sequence[float], q: float) -> list[float]:
    powers = [n**q if n > 0 else 0.0 for n in counts]
    return [p / sum(powers) for p in powers]


def likely(drawn: Any, probabilities: Sequence[float]) -> bool:
    """Whether numbers drawn may come from these probabilities, by Pearson's test; none where it is zero."""
    seen = np.bincount(np.asarray(drawn), minlength=len(probabilities))
    expected = np.array(probabilities) * seen.sum()
    if len(seen) != len(expected) or seen[expected == 0].any():
        return False
    return bool(chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-4)


# -- probabilities


def test_probabilities_are_those_worked_out_by_hand() -> None:
    assert bin_probabilities([16, 4, 0], 1).tolist() == [0.8, 0.2, 0]
    assert bin_probabilities([16, 4, 0], 0.5).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert bin_probabilities([16, 4, 0], 0).tolist() == [0.5, 0.5, 0]
    assert bin_probabilities([7], 0.3).tolist() == [1]
    assert progressive_probabilities([16, 4, 0], 1, 4).tolist() == pytest.approx([0.7, 0.3, 0])


@pytest.mark.parametrize("q", [0, 0.25, 0.5, 1])
def test_probabilities_equal_a_naive_loop(q: float) -> None:
    smoothed = LabelDensity(BINS, COUNTS).smooth(triangular(3))
    for given in (COUNTS, np.array(COUNTS), torch.tensor(COUNTS, dtype=torch.float16), LabelDensity(BINS, COUNTS)):
        np.testing.assert_allclose(bin_probabilities(given, q), naive_probabilities(COUNTS, q), rtol=1e-12)
    given = bin_probabilities(smoothed, q)
    np.testing.assert_allclose(given, naive_probabilities(smoothed.counts.tolist(), q), rtol=1e-12)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(given, naive_probabilities(smoothed.counts.tolist(), q + 1e-9), rtol=1e-12)
    assert given.dtype == np.float64
    assert given.sum() == pytest.approx(1, abs=1e-15)


def test_counts_whose_sum_lies_beyond_float64_have_probabilities() -> None:
    assert bin_probabilities([1e308, 1e308, 0], 1).tolist() == [0.5, 0.5, 0]
    assert bin_probabilities([1.5e308, 0.5e308], 1).tolist() == pytest.approx([0.75, 0.25], rel=1e-15)
    assert progressive_probabilities([1e308, 1e308], 0, 2).tolist() == [0.5, 0.5]


def test_progressive_probabilities_go_from_one_end_to_the_other() -> None:
    path = [progressive_probabilities(COUNTS, t, 11) for t in range(11)]
    first, last = bin_probabilities(COUNTS, 1), bin_probabilities(COUNTS, 0)
    assert path[0].tolist() == first.tolist()
    assert path[10].tolist() == last.tolist()
    for t, given in enumerate(path):
        np.testing.assert_allclose(given, (1 - t / 10) * first + t / 10 * last, rtol=1e-12)
    assert progressive_probabilities(COUNTS, 0, 1).tolist() == last.tolist()


def test_other_counts_are_refused(not_counts: tuple[Any, type[Exception], str]) -> None:
    counts, kind, message = not_counts
    with pytest.raises(kind, match=f"^bin_probabilities: {message}"):
        bin_probabilities(counts, 1)
    with pytest.raises(kind, match=f"^progressive_probabilities: {message}"):
        progressive_probabilities(counts, 0, 1)


@pytest.mark.parametrize("counts", [[0, 0], LabelDensity(Bins.classes(2), [0, 0])])
def test_counts_of_zero_are_refused(counts: Any) -> None:
    message = "at least one bin must hold a sample, got counts of zero"
    with pytest.raises(ValueError, match=f"^bin_probabilities: {message}"):
        bin_probabilities(counts, 1)
    with pytest.raises(ValueError, match=f"^progressive_probabilities: {message}"):
        progressive_probabilities(counts, 0, 1)


def test_other_q_and_epochs_are_refused() -> None:
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^bin_probabilities: q must be >= 0 and <= 1, got"):
            bin_probabilities(COUNTS, q)
    with pytest.raises(TypeError, match="q must be a number"):
        bin_probabilities(COUNTS, "0")  # type: ignore[arg-type]
    message = r"^progressive_probabilities: epoch must be at most 2, got 3\. Epochs count from 0\."
    with pytest.raises(ValueError, match=message):
        progressive_probabilities(COUNTS, 3, 3)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        progressive_probabilities(COUNTS, -1, 3)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        progressive_probabilities(COUNTS, 0, 0)


# -- frequencies


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_samples_come_as_often_as_their_bin_says(q: float) -> None:
    order = BinSampler(LABELS, BINS, q=q, num_samples=20_000, seed=1).order(3)
    assert order.shape == (20_000,)
    assert order.dtype == torch.int64
    bins = naive_probabilities(COUNTS, q)
    assert likely(LABELS[order], bins)
    assert likely(order, [bins[label] / COUNTS[label] for label in LABELS.tolist()])  # within a bin all alike
    for other in {0.0, 0.5, 1.0} - {q}:
        assert not likely(LABELS[order], naive_probabilities(COUNTS, other))


@pytest.mark.parametrize("epoch", [0, 1, 2, 4, 5, 7])
def test_progressive_samples_come_as_often_as_the_epoch_says(epoch: int) -> None:
    order = BinSampler(LABELS, BINS, progressive_epochs=5, num_samples=20_000).order(epoch)
    expected = [progressive_probabilities(COUNTS, t, 5).tolist() for t in range(5)]
    assert [likely(LABELS[order], p) for p in expected] == [t == min(epoch, 4) for t in range(5)]


def test_without_replacement_each_draw_is_from_what_is_left() -> None:
    labels, q = [0, 0, 0, 1], 0.5
    bins = naive_probabilities([3, 1], q)
    p = [bins[0] / 3] * 3 + [bins[1]]
    sampler = BinSampler(labels, Bins.classes(2), q=q, num_samples=2, replacement=False)
    pairs = list(permutations(range(4), 2))
    drawn = [pairs.index(tuple(sampler.order(epoch).tolist())) for epoch in range(3000)]  # type: ignore[arg-type]
    assert likely(drawn, [p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert not likely(drawn, [1 / 12] * 12)


def test_without_replacement_no_sample_comes_twice() -> None:
    for q in (0.0, 0.5, 1.0):
        order = BinSampler(LABELS, BINS, q=q, num_samples=60, replacement=False).order(0)
        assert len(set(order.tolist())) == 60
    order = BinSampler(LABELS, BINS, q=1, replacement=False).order(0)
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))
    few = BinSampler(LABELS, BINS, q=0, num_samples=20, replacement=False)
    drawn = torch.cat([LABELS[few.order(epoch)] for epoch in range(20)])
    assert (drawn == 5).sum() > 20 * 2  # of five, two an epoch, where plain sampling takes one


def test_reordering_only_warns() -> None:
    message = (
        r"^BinSampler: without replacement every sample is drawn once, .* Use replacement=True, or a smaller num_sam"
    )
    for options in ({"q": 0.5}, {"progressive_epochs": 3}, {"num_samples": 100}):
        with pytest.warns(DirToolkitWarning, match=message) as seen:
            sampler = BinSampler(LABELS, BINS, replacement=False, **options)  # type: ignore[arg-type]
        assert len(seen) == 1
        assert sorted(sampler) == list(range(100))


# -- kinds of labels


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.float64])
def test_continuous_labels_are_placed_by_their_bins(kind: Any, dtype: Any) -> None:
    ages = np.random.default_rng(0).integers(20, 60, size=300).astype(dtype)
    bins = Bins.uniform(0, 100, width=10)
    sampler = BinSampler(kind(ages if kind in (np.array, torch.tensor) else ages.tolist()), bins, num_samples=5000)
    drawn = bins.index(ages[sampler.order(0).numpy()])
    counts = np.histogram(ages, bins.edges)[0]
    assert likely(drawn, naive_probabilities(counts.tolist(), 0))
    assert torch.equal(sampler.order(0), BinSampler(ages.astype(float), bins, num_samples=5000).order(0))


def test_one_sample_is_drawn_each_time() -> None:
    for replacement in (True, False):
        assert list(BinSampler([3.7], Bins.uniform(0, 10, width=1), q=1, replacement=replacement)) == [0]
    assert list(BinSampler([2], Bins.classes(5), num_samples=3)) == [0, 0, 0]


# -- purity


def test_an_order_depends_on_the_settings_and_the_epoch_only() -> None:
    sampler = BinSampler(LABELS, BINS, seed=5)
    first = sampler.order(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        state = torch.get_rng_state()
        list(sampler)
        sampler.set_epoch(7)
        next(iter(sampler))
        assert torch.equal(sampler.order(2), first)
        assert torch.equal(torch.get_rng_state(), state)
    for same in (
        BinSampler(LABELS, BINS, seed=5, rank=1, world=3),
        BinSampler(LABELS.double().requires_grad_(), BINS, seed=5),
        copy.deepcopy(sampler),
        pickle.loads(pickle.dumps(sampler)),
    ):
        assert torch.equal(same.order(2), first)
    for other in (
        sampler.order(3),
        BinSampler(LABELS, BINS, seed=6).order(2),
        BinSampler(LABELS, BINS, q=0.1).order(2),
    ):
        assert not torch.equal(other, first)


def test_an_order_stays_the_same_over_versions() -> None:
    """A resumed run would otherwise go on with another order."""
    labels, bins = [0, 0, 0, 1, 1, 2], Bins.classes(3)
    drawn = BinSampler(labels, bins, num_samples=12).order(0)
    assert drawn.tolist() == [4, 5, 3, 2, 1, 3, 3, 2, 5, 3, 1, 1]
    assert BinSampler(labels, bins, q=1, replacement=False).order(0).tolist() == [4, 3, 0, 2, 5, 1]


# -- passes, ranks and resuming


@pytest.mark.parametrize("num_samples", [100, 101, 7, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_order_out(num_samples: int, world: int) -> None:
    samplers = [BinSampler(LABELS, BINS, num_samples=num_samples, rank=r, world=world) for r in range(world)]
    for epoch in (0, 4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        dealt = [shares[i % world][i // world] for i in range(num_samples)]
        assert dealt == samplers[0].order(epoch).tolist()


def test_a_loader_follows_the_order() -> None:
    sampler = BinSampler(LABELS, BINS, num_samples=50, rank=1, world=2)
    loader = DataLoader(list(range(100)), batch_size=8, sampler=sampler)  # type: ignore[arg-type]
    assert len(loader) == 4
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = [batch.tolist() for batch in loader]
        assert [len(batch) for batch in batches] == [8, 8, 8, 1]
        assert list(chain(*batches)) == sampler.order(epoch)[1::2].tolist()
    with pytest.warns(DirToolkitWarning, match=r"^BinSampler: set_epoch was not called since the last iteration"):
        again = list(loader)
    assert torch.cat(again).tolist() == sampler.order(3)[1::2].tolist()
    assert torch.cat(list(loader)).tolist() == sampler.order(4)[1::2].tolist()  # said once


@pytest.mark.filterwarnings("ignore:BinSampler. set_epoch was not called")
def test_passes_go_on_by_themselves() -> None:
    sampler = BinSampler(LABELS, BINS, progressive_epochs=3)
    orders = [sampler.order(epoch).tolist() for epoch in range(6)]
    assert [list(sampler) for _ in range(3)] == orders[:3]
    passing = iter(sampler)
    assert [next(passing) for _ in range(7)] == orders[3][:7]  # one that is left midway counts, on every rank alike
    assert list(sampler) == orders[4]
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]
    assert list(sampler) == orders[2]
    seen = {index for _ in range(20) for index in sampler}
    assert seen == set(range(100))
    workers = DataLoader(list(range(100)), batch_size=16, sampler=BinSampler(LABELS, BINS), num_workers=1)  # type: ignore[arg-type]
    passes = [list(chain(*(batch.tolist() for batch in workers))) for _ in range(2)]
    assert passes == [BinSampler(LABELS, BINS).order(epoch).tolist() for epoch in range(2)]


def test_one_that_is_shared_out_is_known_by_its_class() -> None:
    """By which Lightning tells whether to share it out."""
    assert not isinstance(BinSampler(LABELS, BINS), DistributedSampler)
    shared = BinSampler(LABELS, BINS, rank=1, world=2)
    for same in (shared, copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert isinstance(same, DistributedSampler)
        assert isinstance(same, BinSampler)
        same.set_epoch(2)
        assert list(same) == BinSampler(LABELS, BINS).order(2)[1::2].tolist()
        assert len(same) == 50


def test_orders_are_made_on_the_cpu_whatever_the_default_device() -> None:
    expected = BinSampler(LABELS, BINS).order(0), BinSampler(LABELS, BINS, q=1, replacement=False).order(0)
    labels = LABELS.tolist()
    with torch.device("meta"):
        drawn = BinSampler(labels, BINS).order(0), BinSampler(labels, BINS, q=1, replacement=False).order(0)
    assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))


def test_uneven_bins_draw_evenly_along_the_axis() -> None:
    uneven = Bins.from_edges([0, 1, 2, 10])
    density = LabelDensity(uneven, [30, 10, 8])
    np.testing.assert_allclose(bin_probabilities(density, 0), [0.1, 0.1, 0.8], rtol=1e-12)
    np.testing.assert_allclose(bin_probabilities(density, 1), np.array([30, 10, 8]) / 48, rtol=1e-12)
    np.testing.assert_allclose(
        bin_probabilities(density, 0.5), np.sqrt([30, 10, 64]) / np.sqrt([30, 10, 64]).sum(), rtol=1e-12
    )
    np.testing.assert_allclose(progressive_probabilities(density, 2, 3), [0.1, 0.1, 0.8], rtol=1e-12)
    labels = [0.5] * 30 + [1.5] * 10 + [5] * 8
    drawn = BinSampler(labels, uneven, num_samples=20_000).order(0)
    assert likely(uneven.index(np.array(labels)[drawn.numpy()]), [0.1, 0.1, 0.8])


@pytest.mark.parametrize("stop", [0, 1, 20, 50])
def test_a_pass_stopped_midway_goes_on_where_it_was(stop: int) -> None:
    whole = BinSampler(LABELS, BINS, progressive_epochs=4, rank=1, world=2, seed=3)
    whole.set_epoch(2)
    expected = list(whole)
    sampler = BinSampler(LABELS, BINS, progressive_epochs=4, rank=1, world=2, seed=3)
    sampler.set_epoch(2)
    passing = iter(sampler)
    first = [next(passing) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    resumed = BinSampler(LABELS, BINS, progressive_epochs=4, rank=1, world=2, seed=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(2)  # as a loop over epochs does
    assert first + list(resumed) == expected
    resumed.set_epoch(2)
    assert list(resumed) == expected  # from the first sample again
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 50 - stop
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert list(resumed) == list(whole)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)  # another epoch starts at its first sample
    whole.set_epoch(3)
    assert list(resumed) == list(whole)


def test_the_state_of_a_resumed_pass_counts_from_its_epoch_s_start() -> None:
    sampler = BinSampler(LABELS, BINS)
    expected = sampler.order(0).tolist()
    for done in range(0, 60, 15):
        passing = iter(sampler)
        drawn = [next(passing) for _ in range(15)]
        assert drawn == expected[done : done + 15]
        state = sampler.state_dict()
        assert state["yielded"] == done + 15
        sampler = BinSampler(LABELS, BINS)
        sampler.load_state_dict(state)
    assert list(sampler) == expected[60:]


def test_what_was_fetched_ahead_is_not_lost() -> None:
    sampler = BinSampler(LABELS, BINS)
    expected = sampler.order(0).tolist()
    batches = iter(BatchSampler(sampler, 10, drop_last=False))
    ahead = [next(batches) for _ in range(5)]
    trained = list(chain(*ahead[:2]))  # the rest waits in the loader's workers
    state = sampler.state_dict()
    assert state["yielded"] == 50
    resumed = BinSampler(LABELS, BINS)
    resumed.load_state_dict(state)
    resumed.start(len(trained))
    assert trained + list(resumed) == expected
    for consumed, message in ((101, "must be at most 100, got 101"), (-1, "must be at least 0")):
        with pytest.raises(ValueError, match=f"^BinSampler.start: consumed {message}"):
            resumed.start(consumed)


def test_the_state_of_one_rank_serves_another() -> None:
    longer, shorter = (BinSampler(LABELS, BINS, num_samples=5, rank=rank, world=2) for rank in range(2))
    list(longer)
    shorter.load_state_dict(longer.state_dict())
    assert list(shorter) == []
    shorter.set_epoch(0)
    assert list(shorter) == shorter.order(0)[1::2].tolist()


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"q": 0.5}, {"progressive_epochs": 2}, {"num_samples": 99}, {"world": 2}]
)
def test_a_state_of_other_settings_is_refused(options: Any) -> None:
    other = BinSampler(LABELS, BINS, **options)
    message = r"^BinSampler.load_state_dict: the state must be of the same settings and labels, got "
    with pytest.raises(CheckpointError, match=message):
        BinSampler(LABELS, BINS).load_state_dict(other.state_dict())


def test_a_state_of_other_labels_or_of_almost_the_same_q_is_refused() -> None:
    state = BinSampler(LABELS, BINS, q=0.5).state_dict()
    same = BinSampler(LABELS.double().numpy(), Bins.classes(7), q=0.5)
    same.load_state_dict(state)
    assert torch.equal(same.order(1), BinSampler(LABELS, BINS, q=0.5).order(1))
    for other in (
        BinSampler(LABELS.flip(0), BINS, q=0.5),
        BinSampler(LABELS, BINS, q=0.5000001),
        BinSampler(LABELS, Bins.classes(8), q=0.5),
    ):
        with pytest.raises(
            CheckpointError, match=r"must be of the same settings and labels, got (labels|q|bins[.a-z]*) was "
        ):
            other.load_state_dict(state)


def test_a_broken_state_is_refused() -> None:
    sampler = BinSampler(LABELS, BINS)
    state = sampler.state_dict()
    for broken, message in (
        ({"epoch": 0}, "state must have the keys"),
        ([], "state must be a dict, got list"),
        ({**state, "epoch": -1}, "epoch must be at least 0"),
        ({**state, "yielded": 1.5}, "yielded must be a whole number"),
        ({**state, "yielded": 101}, "yielded must be at most 100, got 101"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^BinSampler.load_state_dict: {message}"):
            sampler.load_state_dict(broken)  # type: ignore[arg-type]
    assert sampler.state_dict() == state
    assert len(list(sampler)) == 100


# -- what is refused


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (
            [0, 7],
            LabelError,
            r"labels must lie on the label axis 0 to 6, got 7 at index \[1\] \(1 such labels\)\. Count classes",
        ),
        ([0, -1], LabelError, "labels must lie on the label axis"),
        ([0, 0.5], LabelError, "labels must be whole numbers where bins are classes"),
        (torch.tensor([math.nan]), LabelError, "labels must not be NaN"),
        ([math.inf], LabelError, "labels must"),
        ([], ValueError, "labels must hold at least one value"),
        ([[1], [2]], ShapeError, r"labels must be \(N,\), got shape \(2, 1\)"),
        (["a"], TypeError, "labels must be integers or floats"),
        (None, TypeError, "labels must be integers or floats"),
        (torch.zeros(3, device="meta"), ValueError, "labels must hold values, got a tensor on the meta device"),
    ],
)
def test_other_labels_are_refused(labels: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^BinSampler: {message}"):
        BinSampler(labels, BINS)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"bins": 7}, TypeError, "bins must be a Bins, got int"),
        ({"q": 2}, ValueError, "q must be >= 0 and <= 1, got 2"),
        ({"q": 1, "progressive_epochs": 3}, ValueError, "give either q or progressive_epochs, got 1 and 3"),
        ({"progressive_epochs": 0}, ValueError, "progressive_epochs must be at least 1, got 0"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 1.5}, TypeError, r"num_samples must be a whole number, got 1\.5"),
        (
            {"num_samples": 101, "replacement": False},
            ValueError,
            r"num_samples must be at most 100, got 101\. Use replacement=True to draw more",
        ),
        ({"replacement": 1}, TypeError, "replacement must be a bool, got int"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"world": 0}, ValueError, "world must be at least 1, got 0"),
        ({"rank": 2, "world": 2}, ValueError, "rank must be at most 1, got 2"),
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"num_samples": 2, "world": 3}, ValueError, "num_samples must be at least 3, got 2"),
    ],
)
def test_other_options_are_refused(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^BinSampler: {message}"):
        BinSampler(LABELS, **{"bins": BINS, **options})


def test_other_epochs_are_refused() -> None:
    sampler = BinSampler(LABELS, BINS)
    with pytest.raises(ValueError, match=r"^BinSampler.set_epoch: epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(TypeError, match=r"^BinSampler.order: epoch must be a whole number"):
        sampler.order(0.5)  # type: ignore[arg-type]


def test_its_name_tells_its_settings() -> None:
    sampler = BinSampler([0, 1], BINS, q=0.5, seed=2**70, rank=1, world=2)
    digest = hashlib.sha256(bytes(8) + b"\x01" + bytes(7)).hexdigest()[:12]
    expected = (
        f"<BinSampler: labels='2 ({digest})', bins=Bins.classes(7), missing='raise', q=0.5, "
        f"progressive_epochs=None, num_samples=2, "
        f"replacement=True, seed={2**70}, world=2, rank=1>"
    )
    assert repr(sampler) == expected
