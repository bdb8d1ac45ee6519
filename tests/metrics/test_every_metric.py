"""What all metrics have in common: targets beyond the axis, sums that are kept, and values that are not looked at."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch._subclasses.fake_tensor import FakeTensorMode

from dir_toolkit import Bins, LabelDensity, RegressionMetrics, _memory, regression_metrics
from dir_toolkit.errors import LabelError
from dir_toolkit.metrics._declared import METRICS
from dir_toolkit.metrics.classification import ClassificationMetrics, classification_metrics
from dir_toolkit.metrics.distribution import DistributionMetrics
from dir_toolkit.metrics.intervals import IntervalMetrics
from dir_toolkit.metrics.reliability import CalibrationMetrics, calibration_metrics

BINS = Bins.uniform(0, 4, width=1)
DENSITY = LabelDensity(BINS, [500, 60, 40, 5])
KINDS = ["regression", "distribution", "classification", "calibration"]
Batch = tuple[torch.Tensor, ...]
Metrics = RegressionMetrics | DistributionMetrics | ClassificationMetrics | CalibrationMetrics


def make(kind: str, **settings: Any) -> Any:
    if kind == "calibration":
        return CalibrationMetrics(4, **settings)
    kinds = {
        "regression": RegressionMetrics,
        "distribution": DistributionMetrics,
        "classification": ClassificationMetrics,
    }
    return kinds[kind](DENSITY, **settings)


def batch(kind: str, targets: list[float], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    n, generator = len(targets), torch.Generator().manual_seed(0)
    if kind == "regression":
        return 4 * torch.rand(n, generator=generator, dtype=dtype), torch.tensor(targets, dtype=dtype)
    scores = torch.randn(n, 4, generator=generator, dtype=dtype).softmax(1)
    return scores, torch.tensor(targets).floor().long() if kind == "calibration" else torch.tensor(targets, dtype=dtype)


def samples(kind: str) -> Batch:
    """300 samples in the order of their labels, so that each of two ranks lacks some bins altogether; with weights,
    where the metric takes them."""
    generator = torch.Generator().manual_seed(1)
    pred, target = batch(kind, (4 * torch.rand(300, generator=generator).sort().values).tolist())
    weight = torch.randint(0, 4, (300,), generator=generator)
    return (pred, target, weight) if kind == "calibration" else (pred, target)


def updated(metrics: Metrics, *batches: Batch) -> Any:
    for one in batches:
        metrics.update(*one)
    return metrics


def states(metrics: Metrics) -> list[torch.Tensor]:
    return [getattr(metrics, name) for name in metrics.kept]


def assert_same_states(a: Metrics, b: Metrics) -> None:
    assert [(s.dtype, s.tolist()) for s in states(a)] == [(s.dtype, s.tolist()) for s in states(b)]


def assert_same(a: Metrics, b: Metrics) -> None:
    """The same but for rounding; counts are whole numbers and the same to the bit."""
    for mine, theirs in zip(states(a), states(b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0 if mine.dtype == torch.int64 else 1e-12)
    xr.testing.assert_allclose(a.compute(), b.compute(), rtol=1e-12)


# Declarations


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_as_its_metric_declares_it(kind: str) -> None:
    metrics = updated(make(kind), samples(kind))
    result = metrics.compute()
    declared = {name: metric for metric in metrics.metrics for name in metric.variables}
    counts = {"count", "bins", "bin_count", "train_count"}
    assert set(result.data_vars) - counts == set(declared)
    for name, metric in declared.items():
        values = result[name]
        assert METRICS[name] is metric
        assert metric.title
        assert values.dims == ((metric.variables[name],) if metric.variables[name] else ())
        assert values.attrs["units"] == {"label": "label", "label^2": "label^2", "1": "1", "%": "1"}[metric.unit]
        known = values.values[np.isfinite(values.values)]
        assert known.size
        assert ((known >= metric.low) & (known <= metric.high)).all()
        assert name.removeprefix("bin_") == metric.name
    assert {result[name].attrs["units"] for name in counts & set(result.data_vars)} == {"1"}
    if kind != "calibration":
        watched = {f"{metric.name}/{region}" for metric in metrics.metrics for region in metric.watched}
        assert set(metrics.summary()) <= watched
        assert metrics.selects in metrics.summary()


def test_no_two_metrics_share_a_name() -> None:
    kinds = (RegressionMetrics, DistributionMetrics, IntervalMetrics, ClassificationMetrics, CalibrationMetrics)
    assert len(METRICS) == sum(len(metric.variables) for kind in kinds for metric in kind.metrics)


@pytest.mark.parametrize("kind", ["regression", "distribution", "classification"])
def test_datasets_have_the_bins_their_regions_and_whole_counts(kind: str) -> None:
    metrics = updated(make(kind), batch(kind, [0.5, 0.5, 1.5]))
    result = metrics.compute()
    np.testing.assert_array_equal(result["bin"], np.arange(4))
    np.testing.assert_array_equal(result.bin_low, BINS.edges[:-1])
    np.testing.assert_array_equal(result.bin_high, BINS.edges[1:])
    np.testing.assert_array_equal(result.bin_center, BINS.centers)
    assert {result[name].attrs["units"] for name in ("bin_low", "bin_high", "bin_center")} == {"label"}
    assert result.region.values.tolist() == ["all", "many", "medium", "few", "unseen"]
    assert result.train_count.values.tolist() == [500, 60, 40, 5]
    assert result.bin_count.values.tolist() == [2, 1, 0, 0]
    assert result["count"].values.tolist() == [3, 2, 1, 0, 0]
    assert result.bins.values.tolist() == [2, 1, 1, 0, 0]
    assert {result[name].dtype for name in ("count", "bins", "bin_count", "train_count")} == {np.dtype(np.int64)}
    for name in (metric.name for metric in metrics.metrics if "region" in metric.over):
        assert result[name].sel(region=["few", "unseen"]).isnull().all()  # missing, not zero
    floats = [name for name in result.data_vars if name.startswith("bin_") and result[name].dtype.kind == "f"]
    assert all(bool(result[name][2:].isnull().all()) for name in floats if name != "bin_precision")


@pytest.mark.parametrize("kind", ["regression", "distribution", "classification"])
def test_region_limits_are_chosen_afterwards(kind: str) -> None:
    metrics = updated(make(kind), samples(kind))
    assert metrics.compute().bin_region.values.tolist() == ["many", "medium", "medium", "few"]
    assert metrics.compute(many=10, few=1).bin_region.values.tolist() == ["many"] * 3 + ["medium"]
    assert metrics.compute(many=1000, few=1000).bin_region.values.tolist() == ["few"] * 4
    for name in (metric.name for metric in metrics.metrics if "region" in metric.over):
        assert metrics.compute(many=10, few=1)[name].sel(region="all") == metrics.compute()[name].sel(region="all")
    with pytest.raises(ValueError, match="many must be at least 20, got 10"):
        metrics.compute(many=10)


# Batches, objects and ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[300], [*[1] * 20, 280], [299, 1], [0, 7, 0, 100, 193]])
def test_any_split_into_batches_equals_the_whole(kind: str, sizes: list[int]) -> None:
    whole, one, merged = updated(make(kind), samples(kind)), make(kind), make(kind)
    for part in zip(*(tensor.split(sizes) for tensor in samples(kind)), strict=True):
        one.update(*part)
        assert merged.merge(updated(merged.fresh(), part)) is merged
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    mixed = updated(make(kind), tuple(tensor[order] for tensor in samples(kind)))
    for other in (one, merged, mixed, pickle.loads(pickle.dumps(one))):
        assert_same(other, whole)
    assert one.all_reduce() is one  # does nothing outside torch.distributed
    assert_same(one, whole)  # and asking changes nothing
    wrong = updated(copy.deepcopy(whole), tuple(tensor[:9] for tensor in samples(kind)))
    with pytest.raises(AssertionError):
        assert_same(wrong, whole)


def sharing_main(rank: int) -> list[list[torch.Tensor]]:
    outcome = []
    for kind in KINDS:
        share = (tensor[:213] if rank == 0 else tensor[213:] for tensor in samples(kind))
        metrics = updated(make(kind), *zip(*(tensor.split(64) for tensor in share), strict=True))
        outcome.append(states(metrics.all_reduce()))
    return outcome


def test_two_processes_with_uneven_shares_equal_one(two_ranks: Callable[..., list[Any]]) -> None:
    for shares in two_ranks(sharing_main):
        for kind, sums in zip(KINDS, shares, strict=True):
            both = make(kind)
            for name, tensor in zip(both.kept, sums, strict=True):
                setattr(both, name, tensor)
            assert_same(both, updated(make(kind), samples(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_has_the_settings_and_no_sample(kind: str) -> None:
    metrics = updated(make(kind, outside="drop"), samples(kind))
    before = [state.clone() for state in states(metrics)]
    fresh = metrics.fresh()
    assert fresh.settings == metrics.settings
    assert not any(state.any() for state in states(fresh))
    updated(fresh, samples(kind))
    assert all(torch.equal(a, b) for a, b in zip(states(metrics), before, strict=True))
    empty = updated(make(kind), tuple(tensor[:0] for tensor in samples(kind))).compute()
    floats = [name for name in empty.data_vars if name != "count" and empty[name].dtype.kind == "f"]
    assert all(bool(empty[name].isnull().all()) for name in floats)
    assert not empty["count"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_only_like_metrics_merge(kind: str) -> None:
    for value in (None, "abc", [0, 1], make(KINDS[KINDS.index(kind) - 1])):
        with pytest.raises(TypeError, match=rf"^{type(make(kind)).__name__}\.merge: other must be a "):
            make(kind).merge(value)
    if kind != "calibration":
        with pytest.raises(ValueError, match=r"merge: both must have the same settings, got density="):
            make(kind).merge(type(make(kind))(LabelDensity(BINS, [500, 60, 40, 6])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_wide_whatever_comes_and_inputs_are_left_alone(kind: str, dtype: torch.dtype) -> None:
    pred, target = batch(kind, INSIDE)
    if kind != "regression":
        pred = torch.eye(4)[[0, 1, 2, 2]] * 0.5 + 0.125
    given = pred.to(dtype).requires_grad_()
    before = given.detach().clone()
    metrics = updated(make(kind), (given, target))
    assert {state.dtype for state in states(metrics)} <= {torch.float64, torch.int64}
    assert not any(state.requires_grad for state in states(metrics))
    assert torch.equal(given.detach(), before)
    assert_same(metrics, updated(make(kind), (before.double(), target)))


# Targets beyond the axis

INSIDE, BEYOND = [0.5, 1.5, 3.5, 2.5], [0.5, 1.5, 7.0, 2.5, -3.0]


def test_a_clipped_target_keeps_its_error_and_counts_in_the_end_bin() -> None:
    pred, target = torch.tensor([0.0, 4.0, 4.5]), torch.tensor([-3.0, 3.5, 7.0])
    result = regression_metrics(pred, target, DENSITY, outside="clip")
    assert result.bin_count.values.tolist() == [1, 0, 0, 2]
    assert result.bin_mae.values.tolist() == pytest.approx([3, math.nan, math.nan, (0.5 + 2.5) / 2], nan_ok=True)
    assert result.bin_bias.values.tolist() == pytest.approx([3, math.nan, math.nan, (0.5 - 2.5) / 2], nan_ok=True)
    assert result.mae.sel(region=["all", "many", "few"]).values.tolist() == pytest.approx([2, 3, 1.5])
    assert result.rmse.sel(region="all").item() == pytest.approx(math.sqrt((9 + 0.25 + 6.25) / 3))
    expected = np.corrcoef(pred.numpy(), target.numpy())[0, 1]
    assert result.pearson.sel(region="all").item() == pytest.approx(expected, rel=1e-6)


def test_a_clipped_target_over_a_grid_keeps_its_error_in_each_dimension() -> None:
    grid = Bins.grid(BINS, BINS)
    density = LabelDensity(grid, np.arange(16))
    pred, target = torch.tensor([[0.0, 1.0]]), torch.tensor([[9.0, 1.5]])
    result = regression_metrics(pred, target, density, outside="clip")
    assert result.bin_count.values.nonzero()[0].tolist() == [3 * 4 + 1]
    assert result.axis_mae.sel(region="all").values.tolist() == [9, 0.5]
    dropped = regression_metrics(pred, target, density, outside="drop")
    assert dropped["count"].sel(region="all") == 0


def test_a_clipped_target_is_one_of_the_end_bin_and_of_the_last_class() -> None:
    pred = torch.tensor([0, 0, 3])
    result = classification_metrics(pred, torch.tensor([-1.0, 9.0, 9.0]), DENSITY, outside="clip")
    assert result.bin_count.values.tolist() == [1, 0, 0, 2]
    assert result.bin_recall.values.tolist() == pytest.approx([1, math.nan, math.nan, 0.5], nan_ok=True)
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    clipped = calibration_metrics(p, torch.tensor([-4, 7]), outside="clip")
    xr.testing.assert_identical(clipped, calibration_metrics(p, torch.tensor([0, 1])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_target_counts_nowhere(kind: str) -> None:
    pred, target = batch(kind, BEYOND)
    within = (target >= 0) & (target < 4)
    dropped, without = make(kind, outside="drop"), make(kind)
    dropped.update(pred, target)
    without.update(pred[within], target[within])
    for a, b in zip(states(dropped), states(without), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)
    dropped.update(pred[~within], target[~within])
    xr.testing.assert_allclose(dropped.compute(), without.compute(), rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", ["clip", "drop"])
def test_targets_on_the_axis_are_as_they_were_to_the_bit(kind: str, outside: str) -> None:
    one, other = make(kind), make(kind, outside=outside)
    one.update(*batch(kind, INSIDE))
    other.update(*batch(kind, INSIDE))
    assert_same_states(one, other)
    assert other.fresh().outside == outside
    with pytest.raises(ValueError, match=f"same settings, got outside='raise' and outside='{outside}'"):
        one.merge(other)


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_a_target_beyond_the_axis_is_refused(kind: str) -> None:
    metrics = make(kind)
    with pytest.raises(LabelError, match=r"update: target must "):
        metrics.update(*batch(kind, BEYOND))
    assert not any(state.any() for state in states(metrics))
    with pytest.raises(ValueError, match=r"Metrics: outside must be one of 'raise', 'clip', 'drop', got 'ignore'"):
        make(kind, outside="ignore")


@pytest.mark.parametrize("kind", ["regression", "distribution", "classification"])
@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_nan_is_refused_whatever_outside_says(kind: str, outside: str) -> None:
    metrics = make(kind, outside=outside)
    with pytest.raises(LabelError, match="target must not be NaN"):
        metrics.update(*batch(kind, [0.5, math.nan]))
    assert not any(state.any() for state in states(metrics))


def test_an_infinite_target_has_no_error_that_could_be_counted() -> None:
    metrics = make("regression", outside="clip")
    with pytest.raises(ValueError, match=r"RegressionMetrics\.update: target must be finite, got inf"):
        metrics.update(torch.tensor([1.0]), torch.tensor([math.inf]))
    assert not metrics.sums.any()
    dropped = make("regression", outside="drop")
    dropped.update(torch.tensor([1.0]), torch.tensor([math.inf]))
    assert not dropped.sums.any()


# Values that are not looked at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", ["raise", "clip", "drop"])
def test_sums_are_the_same_where_nothing_is_looked_at(kind: str, outside: str, request: pytest.FixtureRequest) -> None:
    targets = INSIDE if outside == "raise" else BEYOND
    looked = make(kind, outside=outside)
    looked.update(*batch(kind, targets))
    request.getfixturevalue("unread")
    unlooked = make(kind, outside=outside)
    unlooked.update(*batch(kind, targets))
    assert_same_states(looked, unlooked)
    xr.testing.assert_identical(looked.compute(), unlooked.compute())


@pytest.mark.parametrize(
    ("kind", "outside", "bad"),
    [
        ("regression", "raise", [0.5, 9.0, math.nan]),
        ("classification", "raise", [0.5, -9.0, math.nan]),
        ("regression", "clip", [math.nan, 9.0, math.nan]),
        ("classification", "drop", [math.nan, 9.0, math.nan]),
        ("regression", "drop", [math.nan, math.nan, -1.0]),
    ],
)
def test_bad_targets_are_counted_and_told_when_results_are_asked_for(
    kind: str, outside: str, bad: list[float], unread: None
) -> None:
    metrics, other = make(kind, outside=outside), make(kind, outside=outside)
    metrics.update(*batch(kind, INSIDE))
    metrics.compute()
    metrics.update(*batch(kind, bad))
    metrics.update(*batch(kind, INSIDE))  # goes on
    where = type(metrics).__name__
    for asked in ("compute", "all_reduce", *(["confusion_matrix"] if kind == "classification" else [])):
        with pytest.raises(LabelError, match=rf"^{where}\.{asked}: every target must be .*, got 2 that are not\. Rem"):
            getattr(metrics, asked)()
    other.merge(metrics).merge(metrics)
    with pytest.raises(LabelError, match="got 4 that are not"):
        other.compute()
    metrics.fresh().compute()


def test_bad_predictions_are_counted_and_told_when_results_are_asked_for(unread: None) -> None:
    scores, target = batch("classification", INSIDE)
    scores[1, 2] = math.nan
    metrics = make("classification")
    metrics.update(scores, target)
    metrics.update(torch.tensor([4, -1, 2]), torch.tensor([0.5, 0.5, 2.5]))
    rule = r"^ClassificationMetrics\.compute: every prediction must be a bin, or scores that are not NaN, got 3 that"
    with pytest.raises(ValueError, match=rule):
        metrics.compute()
    assert metrics.confusion.sum() == 3 + 1
    assert metrics.confusion[2, 2] >= 1


# Sums that are kept


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_in_inference_mode_goes_on_outside(kind: str) -> None:
    once = batch(kind, INSIDE)
    expected = make(kind)
    expected.update(*once)
    expected.update(*once)
    with torch.inference_mode():
        here, part = make(kind), make(kind)
        here.update(*batch(kind, INSIDE))
        part.update(*batch(kind, INSIDE))
        copied, merged = copy.deepcopy(here), make(kind).merge(part).all_reduce()
        loaded = pickle.loads(pickle.dumps(here))
    for metrics in (here, copied, merged, loaded):
        metrics.update(*once)
        assert_same_states(metrics, expected)
        assert not any(state.is_inference() or state.requires_grad for state in states(metrics))
    with torch.inference_mode():
        here.update(*once)  # and in again
    here.update(*once)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_device_is_no_matter(kind: str) -> None:
    expected = make(kind)
    expected.update(*batch(kind, INSIDE))
    data = batch(kind, INSIDE)
    with torch.device("meta"):
        metrics = make(kind)
        metrics.update(*data)
        result = metrics.merge(metrics.fresh()).compute()
    xr.testing.assert_identical(result, expected.compute())


@pytest.mark.parametrize("kind", KINDS)
def test_the_repr_shows_the_settings(kind: str) -> None:
    metrics = make(kind, outside="clip")
    assert (
        list(metrics.settings)
        == {
            "regression": ["density", "floor", "outside", "missing"],
            "distribution": ["density", "level", "quantile", "pit_bins", "ends", "outside", "missing"],
            "classification": ["density", "regions", "outside", "missing"],
            "calibration": ["num_classes", "num_bins", "outside", "missing"],
        }[kind]
    )
    assert type(metrics)(**metrics.settings).settings == metrics.settings
    assert repr(metrics).startswith(f"{type(metrics).__name__}(")
    assert "outside='clip'" in repr(metrics)


def test_an_object_of_a_subclass_makes_fresh_ones_of_its_kind_and_merges_with_ours() -> None:
    class Own(RegressionMetrics):
        pass

    own = Own(DENSITY)
    assert type(own.fresh()) is Own
    own.merge(make("regression"))
    with pytest.raises(TypeError, match="other must be a RegressionMetrics, got ClassificationMetrics"):
        own.merge(make("classification"))


def rank_main(rank: int) -> list[list[torch.Tensor]]:
    groups = [dist.new_group([r]) for r in range(2)]
    outcome = []
    for kind in KINDS:
        metrics, alone = make(kind), make(kind)
        for target in (metrics, alone):
            target.update(*batch(kind, INSIDE[: 2 + rank]))
        outcome.append(states(alone.all_reduce(group=groups[rank])) + states(metrics.all_reduce(group=None)))
    return outcome


def test_ranks_that_hold_the_same_data_are_left_out_by_a_group(two_ranks: Callable[..., list[Any]]) -> None:
    results = two_ranks(rank_main)
    for i, kind in enumerate(KINDS):
        parts = [make(kind) for _ in range(2)]
        for rank, part in enumerate(parts):
            part.update(*batch(kind, INSIDE[: 2 + rank]))
        both = make(kind).merge(parts[0]).merge(parts[1])
        for rank, part in enumerate(parts):
            expected = states(part) + states(both)
            assert all(torch.equal(a, b) for a, b in zip(results[rank][i], expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_group_is_refused(kind: str) -> None:
    for group in ("world", [0, 1], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(TypeError, match=r"all_reduce: group must be a torch\.distributed\.ProcessGroup that"):
            make(kind).all_reduce(group=group)


def refusing_main(rank: int) -> list[str]:
    metrics = make("regression")
    metrics.update(*batch("regression", INSIDE))
    metrics.refused[0] += rank  # as an accelerator counts them
    with pytest.raises(LabelError) as caught:
        metrics.all_reduce()
    return [str(caught.value)]


def test_what_one_rank_was_handed_every_rank_tells(two_ranks: Callable[..., list[Any]]) -> None:
    for (message,) in two_ranks(refusing_main):
        assert message.startswith("RegressionMetrics.all_reduce: every target must be a label of the axis, got 1 that")


# What cannot be taken


def test_transforms_of_torch_func_are_refused_in_words() -> None:
    pred, target = batch("regression", INSIDE)
    rule = r"^{}\.update: must not be called inside torch\.func transforms, .* Return pred"
    with pytest.raises(RuntimeError, match=rule.format("RegressionMetrics")):
        torch.func.grad(lambda p: make("regression").update(p, target) or p.sum())(pred)
    with pytest.raises(RuntimeError, match=rule.format("RegressionMetrics")):
        torch.func.vmap(lambda p, t: make("regression").update(p, t) or p)(pred, target)
    scores, classes = batch("calibration", INSIDE)
    with pytest.raises(RuntimeError, match=r"^CalibrationMetrics\.update: must not .* Return probabilities"):
        torch.func.grad(lambda p: make("calibration").update(p, classes) or p.sum())(scores)
    with pytest.raises(RuntimeError, match=rule.format("ClassificationMetrics")):
        torch.func.grad(lambda p: make("classification").update(p, target) or p.sum())(scores)


def distributed_main(rank: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, messages = init_device_mesh("cpu", (2,)), []
    for kind in KINDS:
        pred, target = (distribute_tensor(x, mesh, [Shard(0)]) for x in batch(kind, INSIDE))
        with pytest.raises(TypeError) as error:
            make(kind).update(pred, target)
        metrics, whole = make(kind), make(kind)
        metrics.update(pred.to_local(), target.to_local())
        whole.update(*batch(kind, INSIDE))
        for a, b in zip(states(metrics.all_reduce()), states(whole), strict=True):
            torch.testing.assert_close(a, b)
        messages.append(str(error.value))
    return messages


def test_distributed_tensors_are_refused_in_words_that_work(two_ranks: Callable[..., list[Any]]) -> None:
    pytest.importorskip("torch.distributed.tensor")
    for messages in two_ranks(distributed_main):
        for message in messages:
            assert "must be a plain tensor, got a DTensor. Use" in message


class Marked(torch.Tensor):
    """Numbers of the CPU by another name, as masks of torchvision have."""


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_of_tensors_are_taken(kind: str) -> None:
    plain, marked = make(kind), make(kind)
    plain.update(*batch(kind, INSIDE))
    for _ in range(2):
        marked.update(*(x.as_subclass(Marked) for x in batch(kind, INSIDE)))
        assert {type(state) for state in states(marked)} == {torch.Tensor}
    plain.update(*batch(kind, INSIDE))
    assert_same_states(plain, marked)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_update_is_the_plain_one(kind: str) -> None:
    plain, compiled = make(kind), make(kind)
    update = torch.compile(lambda p, t: compiled.update(p, t), backend="eager")
    for _ in range(2):
        plain.update(*batch(kind, INSIDE))
        update(*batch(kind, INSIDE))
    assert_same_states(plain, compiled)


def test_a_device_without_float64_is_refused_in_words() -> None:
    with FakeTensorMode():
        for kind in KINDS:
            pred, target = (torch.empty_like(x, device="mps") for x in batch(kind, INSIDE, torch.float32))
            rule = r"must be on a device with float64, which sums need, got mps\. Use (pred|prob\w+)\.cpu"
            with pytest.raises(ValueError, match=rule):
                make(kind).update(pred, target)


def test_tables_that_do_not_fit_into_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "free_memory", lambda: 2**30)
    classes = Bins.classes(30_000)
    density = LabelDensity(classes, np.ones(30_000, dtype=np.int64))
    rule = (
        r"^ClassificationMetrics: the confusion matrix of 30,000 bins takes 6\.7 GiB, which must be free, got 1\.0 GiB"
    )
    with pytest.raises(ValueError, match=rule):
        ClassificationMetrics(density)
    RegressionMetrics(density)
    with pytest.raises(ValueError, match=r"histograms of 1,000,000 classes in 1,000 bins takes 22\.4 GiB, which must"):
        CalibrationMetrics(1_000_000, num_bins=1_000)
    monkeypatch.setattr(_memory, "free_memory", lambda: None)  # where nothing tells, it is tried
    CalibrationMetrics(1_000_000, num_bins=20)


# Bins of different widths


def test_bmae_weighs_each_bin_by_its_width() -> None:
    uneven = Bins.from_edges([0, 1, 2, 8])
    pred, target = torch.tensor([1.5, 1.5, 8.0]), torch.tensor([0.5, 1.5, 5.0])
    result = regression_metrics(pred, target, LabelDensity(uneven, [200, 30, 60]))
    assert result.bmae.sel(region="all").item() == pytest.approx((1 * 1 + 1 * 0 + 6 * 3) / 8)
    assert result.bmae.sel(region="medium").item() == pytest.approx((1 * 0 + 6 * 3) / 7)
    assert regression_metrics(pred[1:], target[1:], LabelDensity(uneven, [200, 30, 60])).bmae.values[
        0
    ] == pytest.approx(18 / 7)


def test_bmae_over_uneven_bins_is_that_of_fine_even_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    target = 10 * torch.rand(20_000, generator=generator, dtype=torch.float64) ** 3
    pred = target + 0.3 * target * torch.randn(20_000, generator=generator, dtype=torch.float64)
    fine, coarse = Bins.uniform(0, 10, width=0.1), Bins.quantile(target, 40)
    outcome = [regression_metrics(pred, target, LabelDensity.count(target, b)) for b in (fine, coarse)]
    even, quantile = (float(r.bmae.sel(region="all")) for r in outcome)
    assert quantile == pytest.approx(even, rel=0.03)
    assert float(outcome[0].mae.sel(region="all")) < 0.6 * even  # which plain means over quantile bins would give


@pytest.mark.parametrize(
    "bins", [Bins.uniform(0, 0.3, width=0.1), Bins.classes(3), Bins.uniform(1e9, 1e9 + 3, width=1)]
)
def test_bmae_over_even_bins_is_their_plain_mean_to_the_bit(bins: Bins) -> None:
    target = torch.from_numpy(np.repeat(bins.centers, [3, 2, 1]))
    pred = target + torch.tensor([0.1, 0.2, 0.4, 0.3, 0.7, 0.9], dtype=torch.float64)
    result = regression_metrics(pred, target, LabelDensity.count(target, bins))
    assert result.bmae.values[0] == result.bin_mae.values.sum() / 3
