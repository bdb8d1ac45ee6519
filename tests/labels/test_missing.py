"""Missing labels: where missing="drop" is passed, everything answers as if they were not there."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from dir_toolkit import LDS, Bins, LabelDensity
from dir_toolkit.errors import LabelError
from dir_toolkit.labels import BinSampler, soft_labels

NAN = float("nan")
BINS = Bins.uniform(0, 10, width=1)
AXES = [BINS, Bins.from_edges([0, 1, 4, 10]), Bins.classes(10), Bins.grid(BINS, Bins.classes(3))]
OUTSIDE: list[Any] = ["raise", "clip", "drop"]


def drawn(bins: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which some are missing, on a grid in one dimension or in both, and which of them are there."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, (60, len(bins.axes))).astype(float)
    labels[generator.random(labels.shape) < 0.3] = NAN
    there = ~np.isnan(labels).any(1)
    return (labels if len(bins.axes) > 1 else labels[:, 0]), there


def unseen(function: Any, *args: Any) -> Any:
    """What a function answers where values are not looked at, as on an accelerator."""
    return torch.compile(function, fullgraph=True, backend="eager")(*args)


@pytest.mark.parametrize("bins", AXES, ids=str)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_missing_labels_have_no_bin_and_the_others_keep_theirs(bins: Any, outside: Any) -> None:
    labels, there = drawn(bins)
    index = bins.index(labels, outside, missing="drop")
    assert (index[~there] == -1).all()
    assert_array_equal(index[there], bins.index(labels[there], outside))
    assert_array_equal(bins.index(torch.from_numpy(labels), outside, missing="drop").numpy(), index)
    assert_array_equal(bins.tally(labels, outside, missing="drop"), bins.tally(labels[there], outside))
    rows = bins.rows(torch.from_numpy(labels), outside, missing="drop")
    assert_array_equal(rows.numpy(), np.where(there, index, len(bins)))
    with pytest.raises(LabelError, match=r"must not be NaN.*pass missing="):
        bins.index(labels, outside)


def test_where_nothing_is_looked_at_missing_and_refused_labels_are_told_apart() -> None:
    labels = torch.tensor([1.0, NAN, 12.0])
    for missing, outside, expected in (
        ("drop", "raise", [1, -1, -2]),
        ("drop", "clip", [1, -1, 9]),
        ("drop", "drop", [1, -1, -1]),
        ("raise", "drop", [1, -2, -1]),
        ("raise", "clip", [1, -2, 9]),
    ):
        place = lambda y, m=missing, o=outside: BINS.place(y, o, m)  # noqa: E731
        assert unseen(place, labels).tolist() == expected
        index = lambda y, m=missing, o=outside: BINS.index(y, o, missing=m)  # noqa: E731
        assert unseen(index, labels).tolist() == [max(i, -1) for i in expected]
    grid = Bins.grid(BINS, BINS)
    pairs = torch.tensor([[1.0, 1.0], [NAN, 1.0], [12.0, NAN], [12.0, 1.0]])
    assert unseen(lambda y: grid.place(y, "raise", "drop"), pairs).tolist() == [11, -1, -2, -2]
    assert unseen(lambda y: BINS.rows(y, "raise", "drop"), labels).tolist() == [1, 10, 11]
    with pytest.raises(LabelError, match="whole numbers"):
        Bins.classes(3).index([0.5, NAN], missing="drop")


def test_only_labels_that_are_there_are_counted() -> None:
    dask = pytest.importorskip("dask.array")
    labels, there = drawn(BINS)
    expected = LabelDensity.count(labels[there], BINS)
    for given in (labels, torch.from_numpy(labels), [labels[:7], labels[7:]], dask.from_array(labels, chunks=9)):
        assert LabelDensity.count(given, BINS, missing="drop") == expected
    with pytest.raises(ValueError, match="at least one label must lie on the label axis"):
        LDS(BINS, missing="drop").fit([NAN, NAN])
    with pytest.raises(ValueError, match=r"^LabelDensity\.count: missing must be one of 'raise', 'drop', got 'skip'"):
        LabelDensity.count(labels, BINS, missing="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_missing_labels_weigh_nothing(outside: Any) -> None:
    labels, there = drawn(BINS)
    lds, without = LDS(BINS, missing="drop", outside=outside).fit(labels), LDS(BINS, outside=outside).fit(labels[there])
    assert_array_equal(lds.sample_weight(labels)[there], without.sample_weight(labels[there]))
    assert_array_equal(lds.sample_weight(labels)[~there], 0)
    weights = lds(torch.from_numpy(labels))
    assert_array_equal(weights.numpy()[there], without(torch.from_numpy(labels[there])).numpy())
    assert_array_equal(weights.numpy()[~there], 0)
    assert_array_equal(unseen(lds, torch.from_numpy(labels)).numpy(), weights.numpy())
    beyond = unseen(lds, torch.tensor([NAN, 12.0])).tolist()
    assert beyond[0] == 0
    assert str(beyond[1]) == {"raise": "nan", "clip": str(lds(torch.tensor(9.5)).item()), "drop": "0.0"}[outside]
    with pytest.raises(LabelError, match="NaN"):
        without(torch.from_numpy(labels))


@pytest.mark.parametrize("sigma", [None, 0.7])
def test_missing_labels_are_spread_over_nothing(sigma: float | None) -> None:
    labels, there = (torch.from_numpy(part) for part in drawn(BINS))
    spread = soft_labels(labels, BINS, sigma, missing="drop")
    assert torch.equal(spread[there], soft_labels(labels[there], BINS, sigma))
    assert (spread[~there] == 0).all()
    assert torch.equal(unseen(lambda y: soft_labels(y, BINS, sigma, missing="drop"), labels), spread)
    refused = unseen(lambda y: soft_labels(y, BINS, sigma, missing="drop"), torch.tensor([NAN, 12.0]))
    assert refused.isnan().all(1).tolist() == [False, True]


def test_samples_without_a_label_are_never_drawn() -> None:
    labels, there = drawn(BINS)
    places = np.flatnonzero(there)
    for settings in ({}, {"q": 0.5, "replacement": False, "num_samples": 20}, {"progressive_epochs": 3}):
        sampler = BinSampler(labels, BINS, missing="drop", seed=3, **settings)  # type: ignore[arg-type]
        without = BinSampler(labels[there], BINS, seed=3, **settings)  # type: ignore[arg-type]
        for epoch in range(3):
            assert_array_equal(sampler.order(epoch).numpy(), places[without.order(epoch).numpy()])
    assert len(sampler) == there.sum()
    assert sampler.num_labels == len(labels)
    with pytest.raises(ValueError, match="at least one that is not missing, got 2 that are"):
        BinSampler([NAN, NAN], BINS, missing="drop")
    with pytest.raises(LabelError, match="NaN"):
        BinSampler(labels, BINS)
