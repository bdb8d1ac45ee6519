"""The torchmetrics adapter gives the numbers of the metrics behind it, to the bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import xarray as xr
from forked import load
from torch import Tensor

from dir_toolkit import Bins, ClassificationMetrics, LabelDensity, RegressionMetrics
from dir_toolkit.errors import LabelError

torchmetrics = pytest.importorskip("torchmetrics")

from dir_toolkit.integrations.torchmetrics import RegionMetric  # noqa: E402

BINS = Bins.classes(4)
DENSITY = LabelDensity(BINS, [500, 120, 30, 5])
Metrics = RegressionMetrics | ClassificationMetrics


def make(kind: str) -> Metrics:
    return RegressionMetrics(DENSITY) if kind == "regression" else ClassificationMetrics(DENSITY)


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 1, 20, 3)
    if kind == "regression":
        return [
            (4 * torch.rand(n, generator=generator), torch.randint(0, 4, (n,), generator=generator).float())
            for n in sizes
        ]
    return [(torch.randn(n, 4, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in sizes]


def assert_same(numbers: dict[str, Tensor], expected: xr.Dataset) -> None:
    names = {name for name, value in expected.items() if value.dims == ("region",)}
    assert set(numbers) == {f"{name}/{region}" for name in names for region in expected.region.values}
    for key, value in numbers.items():
        name, region = key.split("/")
        want = torch.tensor(float(expected[name].sel(region=region)), dtype=torch.float64)
        assert value.dtype == torch.float64
        assert value.numpy().tobytes() == want.numpy().tobytes(), key


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_update_and_compute_are_those_of_the_metrics(kind: str) -> None:
    metric, oracle = RegionMetric(make(kind)), make(kind)
    for _ in range(2):
        for pred, target in batches(kind):
            metric.update(pred, target)
            oracle.update(pred, target)
        assert_same(metric.compute(), oracle.compute())
        with pytest.raises(AssertionError):  # and the comparison can fail
            assert_same(metric.compute(), make(kind).compute())
        assert_same(pickle.loads(pickle.dumps(metric.clone())).compute(), oracle.compute())
        metric.reset()
        oracle = oracle.fresh()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert_same(metric.compute(), oracle.compute())  # of no sample: counts are 0, the rest NaN


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_forward_returns_the_numbers_of_the_batch_and_merges_it(kind: str) -> None:
    metric, merged = RegionMetric(make(kind)), make(kind)
    for pred, target in batches(kind):
        alone = make(kind)
        alone.update(pred, target)
        assert_same(metric(pred, target), alone.compute())
        merged.merge(alone)
    assert_same(metric.compute(), merged.compute())


def test_limits_and_keys_reach_the_metrics() -> None:
    metric = RegionMetric(make("regression"), keys=["bmae/all", "count/many"], many=10, few=1)
    oracle = make("regression")
    for pred, target in batches("regression"):
        metric.update(pred, target)
        oracle.update(pred, target)
    expected = oracle.compute(many=10, few=1)
    got = metric.compute()
    assert list(got) == ["bmae/all", "count/many"]
    assert got["count/many"].item() == int(expected["count"].sel(region="many"))
    assert got["count/many"].item() > int(oracle.compute()["count"].sel(region="many"))


def test_in_a_collection_it_shares_its_sums_only_with_its_like() -> None:
    wide = Bins.uniform(0, 8, width=2)  # of as many bins, and labels of 0 fall into the first of either
    collection = torchmetrics.MetricCollection(
        {
            "a": RegionMetric(make("regression"), keys=["mae/many"]),
            "b": RegionMetric(make("regression"), keys=["bmae/all"]),
            "c": RegionMetric(RegressionMetrics(LabelDensity(wide, [500, 120, 30, 5])), keys=["mae/few"]),
            "d": RegionMetric(RegressionMetrics(DENSITY, floor=1e-3), keys=["gm/all"]),
        }
    )
    first = (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    rest = [(pred, target) for pred, target in batches("regression")] + [(torch.tensor([1.0]), torch.tensor([1.0]))]
    oracles = {
        "mae/many": make("regression"),
        "mae/few": RegressionMetrics(LabelDensity(wide, [500, 120, 30, 5])),
        "gm/all": RegressionMetrics(DENSITY, floor=1e-3),
    }
    for pred, target in [first, *rest]:
        collection.update(pred, target)
        for oracle in oracles.values():
            oracle.update(pred, target)
    assert sorted(map(sorted, collection.compute_groups.values())) == [["a", "b"], ["c"], ["d"]]
    got = collection.compute()
    assert set(got) == {"mae/many", "bmae/all", "mae/few", "gm/all"}
    for key, oracle in oracles.items():
        name, region = key.split("/")
        want = float(oracle.compute()[name].sel(region=region))
        assert got[key].item() == want or want != want, key


def test_an_update_on_an_accelerator_makes_nothing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = load(str(Path(__file__).parents[1] / "attack" / "test_accelerator.py"))
    monkeypatch.setattr(accelerator.bins_module, "keepable", lambda tensor: True)  # as in its own tests
    job = jobs.measured(lambda: RegionMetric(RegressionMetrics(jobs.density(jobs.BINS))), "pred", "y")
    assert accelerator.watched(job, "cuda", backward=False) == []


def rank_main(rank: int) -> dict[str, Any]:
    result = {}
    for kind in ("regression", "classification"):
        metric = RegionMetric(make(kind))
        for pred, target in batches(kind)[rank::2]:
            metric.update(pred, target)
        result[kind] = metric.compute()
        result[f"{kind} after"] = getattr(metric, make(kind).kept[0])  # a rank's own again
    return result


def test_two_processes_equal_one(two_ranks: Callable[..., list[Any]]) -> None:
    results = two_ranks(rank_main, timeout=240)
    for kind in ("regression", "classification"):
        halves = []
        for rank, result in enumerate(results):
            half = make(kind)
            for pred, target in batches(kind)[rank::2]:
                half.update(pred, target)
            halves.append(half)
            assert torch.equal(result[f"{kind} after"], getattr(half, half.kept[0]))
        for result in results:
            assert_same(result[kind], halves[0].fresh().merge(halves[0]).merge(halves[1]).compute())  # type: ignore[arg-type]


def test_bad_input_is_refused_and_adds_nothing() -> None:
    with pytest.raises(TypeError, match="metrics must be a RegressionMetrics or a ClassificationMetrics, got Bins"):
        RegionMetric(BINS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keys must be out of mae/all, .*, got 'mae/rare'"):
        RegionMetric(make("regression"), keys=["mae/rare"])
    with pytest.raises(ValueError, match=r"keys must be a list of keys, got 'mae/all'\. Use \['mae/all'\]"):
        RegionMetric(make("regression"), keys="mae/all")
    metric = RegionMetric(make("regression"), keys=["count/all"])
    with pytest.raises(LabelError):
        metric.update(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 9.0]))
    metric.update(torch.tensor([1.0]), torch.tensor([1.0]))
    assert metric.compute()["count/all"].item() == 1


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_their_precision_in_a_module_that_is_cast(kind: str, dtype: torch.dtype) -> None:
    metric, oracle = RegionMetric(make(kind)), make(kind)
    data = batches(kind)
    metric.update(*data[0])
    oracle.update(*data[0])
    metric.compute()  # is remembered
    torch.nn.ModuleList([metric]).to(dtype)
    assert_same(metric.compute(), oracle.compute())
    for pred, target in data[1:]:
        metric.update(pred, target)
        oracle.update(pred, target)
    assert_same(metric.compute(), oracle.compute())
    for cast in ("half", "bfloat16", "double"):
        getattr(torch.nn.ModuleList([metric]), cast)()
    metric.set_dtype(dtype)
    assert_same(metric.compute(), oracle.compute())
    metric.reset()
    metric.update(*data[0])
    assert_same(metric.compute(), oracle.fresh().merge(updated(kind, *data[0])).compute())  # type: ignore[arg-type]


def updated(kind: str, pred: Tensor, target: Tensor) -> Any:
    metrics = make(kind)
    metrics.update(pred, target)
    return metrics


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_what_was_made_or_reset_in_inference_mode_goes_on_outside(kind: str) -> None:
    data = batches(kind)
    with torch.inference_mode():
        made = RegionMetric(make(kind))
    reset = RegionMetric(make(kind))
    reset.update(*data[0])
    with torch.inference_mode():
        reset.reset()
        reset.update(*data[0])
    reset.reset()
    for metric in (made, reset):
        with torch.inference_mode():
            metric.reset()
        metric.update(*data[1])
        assert_same(metric.compute(), updated(kind, *data[1]).compute())
        with torch.inference_mode():
            metric(*data[2])
        metric(*data[3])
        metric.update(*data[3])


def test_a_module_moved_to_meta_keeps_its_sums() -> None:
    metric = RegionMetric(make("regression"))
    metric.update(*batches("regression")[0])
    torch.nn.ModuleList([metric]).to("meta").to_empty(device="cpu")
    assert_same(metric.compute(), updated("regression", *batches("regression")[0]).compute())
    with torch.device("meta"):
        made = RegionMetric(make("regression"))
    made.update(*batches("regression")[0])
    assert_same(made.compute(), updated("regression", *batches("regression")[0]).compute())


def test_what_outside_says_is_kept() -> None:
    pred, target = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 9.0])
    for outside, count, mae in (("clip", 2, 4.0), ("drop", 1, 0.0)):
        bins = Bins.uniform(0, 4, width=1)
        metrics = RegressionMetrics(LabelDensity(bins, [500, 120, 30, 5]), outside=outside)  # type: ignore[arg-type]
        metric = RegionMetric(metrics, keys=["count/all", "mae/all"])
        metric.update(pred, target)
        assert {key: value.item() for key, value in metric.compute().items()} == {"count/all": count, "mae/all": mae}


def test_settings_are_shown() -> None:
    metric = RegionMetric(make("regression"), keys=["mae/all"], many=50)
    assert list(metric.settings) == ["metrics", "keys", "many", "few"]
    assert "keys=['mae/all'], many=50, few=20" in repr(metric)


def test_sums_over_another_axis_are_refused() -> None:
    own, other = (
        RegionMetric(RegressionMetrics(LabelDensity(Bins.uniform(0, top, count=4), [9] * 4))) for top in (8, 80)
    )
    own.update(torch.tensor([1.0]), torch.tensor([2.0]))
    other.update(torch.tensor([1.0]), torch.tensor([70.0]))
    alike = own.clone()
    alike.merge_state(own)
    assert alike.compute()["count/all"] == 2
    own.merge_state(other)
    with pytest.raises(ValueError, match="all sums must be of metrics with the same settings"):
        own.compute()
