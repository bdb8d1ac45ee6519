import numpy as np
import pytest
import torch

from dir_toolkit.errors import CheckpointError, ShapeError
from dir_toolkit.features.matrix_moments import BinScatters, SubspaceMoments
from dir_toolkit.features.moments import BinMoments


def naive(features: np.ndarray, index: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and unbiased variance of each bin, one bin at a time."""
    count = np.array([(index == b).sum() for b in range(num_bins)])
    mean = np.array([features[index == b].mean(0) if n else np.zeros(features.shape[1]) for b, n in enumerate(count)])
    variance = np.array(
        [
            features[index == b].var(0, ddof=1) if n > 1 else np.full(features.shape[1], np.nan)
            for b, n in enumerate(count)
        ]
    )
    return count, mean, variance


def sample(seed: int = 0, n: int = 200, num_bins: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64) * 5 + 1e4
    index = torch.randint(0, num_bins - 1, (n,), generator=generator)  # the last bin stays empty
    return features, index


def assert_same(moments: BinMoments, features: torch.Tensor, index: torch.Tensor, rtol: float = 1e-12) -> None:
    count, mean, variance = naive(features.numpy(), index.numpy(), len(moments.count))
    np.testing.assert_array_equal(moments.count.numpy(), count)
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=rtol)
    np.testing.assert_allclose(moments.variance().numpy(), variance, rtol=1e3 * rtol)


def test_more_samples_than_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    features, index = sample()
    monkeypatch.setattr("dir_toolkit.features.moments.PIECE", 20)
    moments = BinMoments(7, 3)
    moments.update(features, index)
    assert_same(moments, features, index)


def test_comparing_helper_notices_a_wrong_answer() -> None:
    features, index = sample()
    moments = BinMoments(7, 3)
    moments.update(features, index)
    moments.mean[0] += 1e-3
    with pytest.raises(AssertionError):
        assert_same(moments, features, index)


@pytest.mark.parametrize("pieces", [1, 2, 7, 200])
def test_any_split_into_batches_gives_the_moments_of_the_whole(pieces: int) -> None:
    features, index = sample()
    moments = BinMoments(7, 3)
    for x, i in zip(features.chunk(pieces), index.chunk(pieces), strict=True):
        moments.update(x, i)
    assert_same(moments, features, index)


def test_order_does_not_matter() -> None:
    features, index = sample()
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
    moments = BinMoments(7, 3)
    for place in order.chunk(9):
        moments.update(features[place], index[place])
    assert_same(moments, features, index)


def test_merging_two_equals_one() -> None:
    features, index = sample()
    first, second = BinMoments(7, 3), BinMoments(7, 3)
    first.update(features[:30], index[:30])
    second.update(features[30:], index[30:])
    assert_same(first.merge(second), features, index)


def test_samples_without_a_bin_are_left_out() -> None:
    features, index = sample()
    hidden = index.clone()
    hidden[::3] = -1
    hidden[1::3] = 7
    moments = BinMoments(7, 3)
    moments.update(features, hidden)
    assert_same(moments, features[2::3], index[2::3])


def test_an_empty_batch_changes_nothing() -> None:
    features, index = sample()
    moments = BinMoments(7, 3)
    moments.update(features, index)
    moments.update(features[:0], index[:0])
    assert_same(moments, features, index)


def test_half_precision_features_are_summed_in_float64() -> None:
    features = torch.full((1000, 1), 3.0, dtype=torch.bfloat16)
    moments = BinMoments(1, 1)
    moments.update(features, torch.zeros(1000, dtype=torch.int64))
    assert moments.count.item() == 1000  # a bfloat16 counter would stop at 256
    assert moments.mean.dtype == torch.float64
    assert moments.mean.item() == 3.0


def test_features_are_not_written_to() -> None:
    features, index = sample()
    before = features.clone()
    BinMoments(7, 3).update(features, index)
    assert torch.equal(features, before)


def test_state_dict_restores_to_the_bit() -> None:
    features, index = sample()
    moments, restored = BinMoments(7, 3), BinMoments(7, 3)
    moments.update(features[:50], index[:50])
    restored.load_state_dict(moments.state_dict())
    for m in (moments, restored):
        m.update(features[50:], index[50:])
    assert torch.equal(moments.mean, restored.mean)
    assert torch.equal(moments.deviations, restored.deviations)


def test_objects_and_states_of_another_size_are_refused() -> None:
    moments = BinMoments(7, 3)
    with pytest.raises(ShapeError, match=r"^BinMoments.merge: both must have the same bins"):
        moments.merge(BinMoments(7, 4))
    with pytest.raises(CheckpointError, match=r"^BinMoments.load_state_dict: the saved state .* missing \['count'"):
        moments.load_state_dict({})
    with pytest.raises(CheckpointError, match=r"count must be torch.int64 of shape \(7,\), got torch.int64"):
        moments.load_state_dict(BinMoments(6, 3).state_dict())
    with pytest.raises(CheckpointError, match=r"mean must be floats of shape \(7, 3\), got torch.int64"):
        moments.load_state_dict({**moments.state_dict(), "mean": torch.zeros(7, 3).long()})
    with pytest.raises(CheckpointError, match=r"deviations must not be negative, got a minimum of -1"):
        moments.load_state_dict({**moments.state_dict(), "deviations": -torch.ones(7, 3)})
    with pytest.raises(TypeError, match="the saved state must be a dict, got list"):
        moments.load_state_dict([])


def assert_scatters(scatters: BinScatters, features: torch.Tensor, index: torch.Tensor) -> None:
    """Against numpy's covariance, one bin at a time."""
    scatters.settle()
    count, mean, _ = naive(features.numpy(), index.numpy(), 7)
    np.testing.assert_array_equal(scatters.count.numpy(), count)
    np.testing.assert_allclose(scatters.mean.numpy(), mean, rtol=1e-12)
    for b, n in enumerate(count):
        expected = np.cov(features[index == b].numpy().T) * (n - 1) if n > 1 else np.zeros((3, 3))
        np.testing.assert_allclose(scatters.deviations[b].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [1, 2, 7, 200])
@pytest.mark.parametrize("room", [2, 100, 10**6])
def test_scatters_of_any_split_are_those_of_the_whole(pieces: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dir_toolkit.features.matrix_moments.PIECE", room)
    features, index = sample()
    index[::10] = -1
    index[5::10] = 7
    scatters, keep = BinScatters(7, 3), (index >= 0) & (index < 7)
    for x, i in zip(features.chunk(pieces), index.chunk(pieces), strict=True):
        held = x.clone()
        scatters.update(held, i)
        held.zero_()  # what a layer after the hook does to features is not seen
    assert_scatters(scatters, features[keep], index[keep])


def test_comparing_scatters_notices_a_wrong_answer() -> None:
    features, index = sample()
    scatters = BinScatters(7, 3)
    scatters.update(features, index)
    scatters.settle().deviations[0, 0, 1] += 1e-3
    with pytest.raises(AssertionError):
        assert_scatters(scatters, features, index)


def test_scatters_merge_and_are_restored_to_the_bit() -> None:
    features, index = sample()
    first, second = BinScatters(7, 3), BinScatters(7, 3)
    first.update(features[:30], index[:30])
    second.update(features[30:], index[30:])
    first.merge(second)
    assert_scatters(first, features, index)
    restored = BinScatters(7, 3)
    restored.update(features, index)  # held until now, and given up
    restored.load_state_dict(first.state_dict())
    assert torch.equal(restored.settle().deviations, first.deviations)
    with pytest.raises(ShapeError, match=r"both must have the same bins and features, got \(7, 3, 3\) and \(7, 3\)"):
        first.merge(BinMoments(7, 3))


def test_pooled_scatter_of_a_subspace_is_about_the_means_of_bins() -> None:
    features, index = sample()
    moments = SubspaceMoments(7, 3, 2)
    for x, i in zip(features.chunk(3), index.chunk(3), strict=True):
        moments.update(x, i)
    moments.all_reduce()
    within = features - torch.stack([features[index == b].mean(0) for b in index.tolist()])
    torch.testing.assert_close(moments.pooled_scatter(), within.T @ within, rtol=1e-9, atol=1e-9)


def test_states_of_another_subspace_are_refused() -> None:
    moments = SubspaceMoments(7, 3, 2, basis=torch.eye(3, dtype=torch.float64)[:, :2])
    state = moments.state_dict()
    with pytest.raises(CheckpointError, match=r"^SubspaceMoments.load_state_dict: basis must be floats"):
        moments.load_state_dict({**state, "basis": torch.eye(3)})
    with pytest.raises(CheckpointError, match=r"missing \['count'\]"):
        moments.load_state_dict({**state, "within": {"mean": torch.zeros(7, 2), "deviations": torch.zeros(7, 2, 2)}})
    with pytest.raises(CheckpointError, match=r"unknown \['beyond'\]"):
        moments.load_state_dict({**state, "beyond": state["within"]})


def test_states_of_other_batches_that_are_held_are_refused() -> None:
    scatters, (features, index) = BinScatters(7, 3), sample()
    scatters.update(features, index)
    state = scatters.state_dict()
    assert state["held"].shape == features.shape
    with pytest.raises(ValueError, match=r"missing \['held_index'\]"):
        scatters.load_state_dict({name: value for name, value in state.items() if name != "held_index"})
    with pytest.raises(CheckpointError, match=r"held must be floats of shape \(200, 3\), got torch.float64 of shape"):
        scatters.load_state_dict({**state, "held": features[:, :2]})
    with pytest.raises(CheckpointError, match="held_index must be at most 7, got a maximum of 8"):
        scatters.load_state_dict({**state, "held_index": torch.full_like(index, 8)})


@pytest.mark.parametrize("kind", [BinMoments, BinScatters])
def test_batches_may_come_within_inference_mode_and_after_it(kind: type[BinMoments]) -> None:
    features, index = sample()
    with torch.inference_mode():
        moments, other = kind(7, 3), kind(7, 3)
        moments.load_state_dict(kind(7, 3).state_dict())
        moments.update(features[:20].clone(), index[:20].clone())
        other.update(features[20:40].clone(), index[20:40].clone())
        moments.merge(other)
    moments.update(features[40:], index[40:])
    whole = kind(7, 3)
    whole.update(features, index)
    for one in (moments, whole):
        one.merge(kind(7, 3))  # which takes in what is held
    torch.testing.assert_close(moments.deviations, whole.deviations, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-12, atol=1e-12)
