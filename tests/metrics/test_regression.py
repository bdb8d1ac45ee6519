from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import pearsonr

from dir_toolkit import Bins, LabelDensity, RegressionMetrics, regression_metrics
from dir_toolkit.errors import LabelError, ShapeError
from dir_toolkit.metrics import regression

BINS = Bins.uniform(0, 5, width=1)
DENSITY = LabelDensity(BINS, [500, 101, 100, 19, 0])
REGION_OF_BIN = ["many", "many", "medium", "few", "unseen"]


def samples(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = 5 * torch.rand(n, generator=generator, dtype=torch.float64)
    return target + 0.7 * torch.randn(n, generator=generator, dtype=torch.float64), target


MEDIAN = 360 / 500  # of 720 labels, 500 of them in the first bin
HIGH = 1 + 40 / 101 + 1.5 * (1 + 40 / 101 - 180 / 500)  # the upper quartile and 1.5 times the box


def naive_relevance(label: float) -> float:
    u = min(max((label - MEDIAN) / (HIGH - MEDIAN), 0.0), 1.0)
    return 3 * u**2 - 2 * u**3


def naive(pred: torch.Tensor, target: torch.Tensor, floor: float = 0.01) -> dict[str, dict[str, float]]:
    """Every number in plain Python, region by region and sample by sample."""
    pairs = list(zip(pred.double().flatten().tolist(), target.double().flatten().tolist(), strict=True))
    outcome: dict[str, dict[str, float]] = {}
    for region in ("all", "many", "medium", "few", "unseen"):
        by_bin: dict[int, list[tuple[float, float]]] = {}
        for p, t in pairs:
            b = min(int(t), 4)
            if region in ("all", REGION_OF_BIN[b]):
                by_bin.setdefault(b, []).append((p, t))
        inside = [pair for members in by_bin.values() for pair in members]
        n = len(inside)
        row = dict.fromkeys(("mae", "rmse", "gm", "bmae", "bmase", "sera", "bias", "pearson"), math.nan)
        if n:
            sizes = [abs(p - t) for p, t in inside]
            row["mae"] = math.fsum(sizes) / n
            row["rmse"] = math.sqrt(math.fsum(s * s for s in sizes) / n)
            row["gm"] = math.exp(math.fsum(math.log(max(s, floor)) for s in sizes) / n)
            row["bmae"] = sum(sum(abs(p - t) for p, t in m) / len(m) for m in by_bin.values()) / len(by_bin)
            of_median = [sum(abs(MEDIAN - t) for _, t in m) / len(m) for m in by_bin.values()]
            row["bmase"] = row["bmae"] / (sum(of_median) / len(by_bin))
            thresholds = (np.arange(20_000) + 0.5) / 20_000
            squares = np.array([(p - t) ** 2 for p, t in inside])
            passed = np.array([naive_relevance(t) for _, t in inside])[:, None] >= thresholds
            row["sera"] = float((squares[:, None] * passed).sum(0).mean())  # as an integral, known to 1e-4
            row["bias"] = math.fsum(p - t for p, t in inside) / n
            mp, mt = (math.fsum(x) / n for x in zip(*inside, strict=True))
            spread = math.sqrt(sum((p - mp) ** 2 for p, _ in inside) * sum((t - mt) ** 2 for _, t in inside))
            row["pearson"] = sum((p - mp) * (t - mt) for p, t in inside) / spread if spread else math.nan
        outcome[region] = row | {"count": n, "bins": len(by_bin)}
    return outcome


def assert_equals_naive(result: xr.Dataset, expected: dict[str, dict[str, float]], rtol: float = 1e-12) -> None:
    for region, row in expected.items():
        for name, value in row.items():
            given = result[name].sel(region=region).item()
            np.testing.assert_allclose(
                given, value, rtol=1e-4 if name == "sera" else rtol, atol=1e-13, err_msg=f"{name} of {region}"
            )


def of(pred: Any, target: Any, **options: Any) -> xr.Dataset:
    return regression_metrics(torch.as_tensor(pred), torch.as_tensor(target), DENSITY, **options)


def test_values_are_those_worked_out_by_hand() -> None:
    result = of([1.0, 4.0, 2.5], [0.0, 0.0, 2.5])  # errors 1, 4 and 0
    assert result.mae.sel(region=["all", "many", "medium"]).values.tolist() == pytest.approx([5 / 3, 2.5, 0])
    assert result.rmse.sel(region="many").item() == pytest.approx(math.sqrt(17 / 2))
    assert result.gm.sel(region=["many", "medium"]).values.tolist() == pytest.approx([2, 0.01])
    assert result.gm.sel(region="all").item() == pytest.approx((1 * 4 * 0.01) ** (1 / 3))
    assert result.bmae.sel(region="all").item() == pytest.approx((2.5 + 0) / 2)
    assert result.bias.sel(region="many").item() == pytest.approx(2.5)
    assert result["count"].values.tolist() == [3, 2, 1, 0, 0]
    assert result.bins.values.tolist() == [2, 1, 1, 0, 0]
    assert result.bin_count.values.tolist() == [2, 0, 1, 0, 0]
    assert result.bin_region.values.tolist() == REGION_OF_BIN
    assert result.train_count.values.tolist() == [500, 101, 100, 19, 0]


@pytest.mark.parametrize("shape", [(400,), (20, 20), (400, 1), (4, 10, 10)])
def test_everything_equals_a_naive_loop(shape: tuple[int, ...]) -> None:
    pred, target = samples()
    result = of(pred.view(shape), target.view(shape))
    assert_equals_naive(result, naive(pred, target))
    assert result.pearson.sel(region="all").item() == pytest.approx(pearsonr(pred, target).statistic, 1e-12)
    for b in range(5):
        inside = (target >= b) & (target < b + 1)
        assert result.bin_mae[b].item() == pytest.approx((pred - target)[inside].abs().mean().item(), 1e-12)
        assert result.bin_bias[b].item() == pytest.approx((pred - target)[inside].mean().item(), 1e-9)


def test_the_comparison_notices_a_wrong_answer() -> None:
    pred, target = samples()
    result = of(pred, target)
    for name in ("mae", "rmse", "gm", "bmae", "bias", "pearson", "count", "bins"):
        wrong = naive(pred, target)
        wrong["few"][name] += 1e-6
        with pytest.raises(AssertionError, match=f"{name} of few"):
            assert_equals_naive(result, wrong)


def test_the_summary_holds_what_training_watches() -> None:
    metrics = RegressionMetrics(DENSITY)
    metrics.update(torch.tensor([1.0, 4.0, 2.5]), torch.tensor([0.0, 0.0, 2.5]))  # errors 1, 4 and 0
    summary = metrics.summary()
    assert list(summary) == ["mae/all", "mae/many", "mae/medium", "mae/few", "bmae/all"]
    assert {type(value) for value in summary.values()} == {float}
    assert list(summary.values()) == pytest.approx([5 / 3, 2.5, 0, math.nan, 1.25], nan_ok=True)
    assert metrics.selects == RegressionMetrics.selects == "bmae/all"
    assert metrics.selects in summary
    assert all(math.isnan(value) for value in metrics.fresh().summary().values())


def test_one_sample_has_metrics_and_no_correlation() -> None:
    row = of([3.0], [2.0]).sel(region="medium")
    assert [row[name].item() for name in ("mae", "rmse", "gm", "bmae", "bias")] == [1] * 5
    assert math.isnan(row.pearson.item())


@pytest.mark.parametrize("value", [0.0, 0.1, 2.5, 3.3, 1e9, -1e9])
@pytest.mark.parametrize("n", [2, 3, 1000, 100_000])
def test_constant_predictions_have_no_correlation(value: float, n: int) -> None:
    target = 5 * torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bins in (BINS, Bins.uniform(0, 5, count=1)):
        density = LabelDensity.count(target, bins)
        result = regression_metrics(torch.full_like(target, value), target, density)
        assert result.pearson.isnull().all()
        result = regression_metrics(target, torch.full_like(target, 3.3), density)
        assert result.pearson.isnull().all()


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_labels_far_from_zero_keep_their_correlation(offset: float, scale: float) -> None:
    if offset and scale < 1:
        return  # float64 does not tell these labels apart
    pred, target = samples()
    far = Bins.from_edges(BINS.edges * scale + offset)
    result = regression_metrics(
        pred * scale + offset, target * scale + offset, LabelDensity(far, DENSITY.counts), floor=0.01 * scale
    )
    expected = of(pred, target)
    np.testing.assert_allclose(result.pearson, expected.pearson, atol=1e-6)
    np.testing.assert_allclose(result.mae / scale, expected.mae, rtol=1e-6)
    # Nor does it matter that predictions miss the axis by far.
    shifted = regression_metrics(pred + 1e4, target, DENSITY)
    np.testing.assert_allclose(shifted.pearson, expected.pearson, atol=1e-6)


def test_perfect_predictions_correlate_fully() -> None:
    _, target = samples()
    assert of(target, target).pearson.sel(region="all").item() == pytest.approx(1)
    assert of(-target, target).pearson.sel(region="all").item() == pytest.approx(-1)
    assert (of(target, target).pearson.fillna(1) <= 1).all()


def test_the_geometric_mean_has_a_floor() -> None:
    assert RegressionMetrics(DENSITY).floor == 0.01  # a hundredth of a bin
    assert of([2.5, 2.5], [2.5, 2.6], floor=0.1).gm.sel(region="all").item() == pytest.approx(0.1)
    for floor, kind in ((0, ValueError), (-1, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^RegressionMetrics: floor must be"):
            RegressionMetrics(DENSITY, floor=floor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pred", "target", "kind", "message"),
    [
        (
            [1.0, math.nan],
            [1.0, 1.0],
            ValueError,
            r"RegressionMetrics\.update: pred must be finite, got nan at index \[1",
        ),
        ([1.0, math.inf], [1.0, 1.0], ValueError, r"RegressionMetrics\.update: pred must be finite, got inf"),
        ([1.0, 1.0], [1.0, 5.5], LabelError, r"target must lie on the label axis \[0, 5\], got 5\.5 at index \[1\]"),
        ([1.0, 1.0], [1.0, math.inf], LabelError, "target must lie on the label axis"),
        ([1.0, 1.0], [math.nan, 1.0], LabelError, r"target must not be NaN, got nan at index \[0\]"),
        (
            [[1.0], [1.0]],
            [1.0, 1.0],
            ShapeError,
            r"pred and target must have the same shape, .* Use pred\.squeeze\(1\)",
        ),
        (
            [1.0, 1.0],
            [[1.0], [1.0]],
            ShapeError,
            r"pred and target must have the same shape, .* Use target\.squeeze\(1",
        ),
        ([1.0], [1.0, 1.0], ShapeError, "pred and target must have the same shape"),
        ([True], [1.0], TypeError, "pred must be integers or floats"),
        ([1.0], [1j], TypeError, "target must be integers or floats"),
    ],
)
def test_what_is_refused_adds_nothing(pred: Any, target: Any, kind: type[Exception], message: str) -> None:
    metrics = RegressionMetrics(DENSITY)
    metrics.update(*samples())
    before = metrics.sums.clone()
    with pytest.raises(kind, match=message):
        metrics.update(torch.tensor(pred), torch.tensor(target))
    assert torch.equal(metrics.sums, before)


def test_arrays_and_lists_are_taken_as_tensors_are() -> None:
    pred, target = samples()
    expected = regression_metrics(pred, target, DENSITY)
    for kind in (np.asarray, list, lambda values: np.asarray(values, ">f8")):
        assert regression_metrics(kind(pred), kind(target), DENSITY).equals(expected)


def test_arguments_are_checked() -> None:
    where = r"^RegressionMetrics: "
    for value in (None, "abc", ["a", "b"], np.array(["a"])):
        with pytest.raises(ValueError, match=f"{where}density must be a LabelDensity, got"):
            RegressionMetrics(value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^RegressionMetrics\.update: pred must be integers or floats"):
            RegressionMetrics(DENSITY).update(value, torch.ones(3))
        with pytest.raises(TypeError, match=r"^regression_metrics: target must be integers or floats"):
            regression_metrics(torch.ones(3), value, DENSITY)
    for value, got in ((torch.ones(3), "Tensor"), (DENSITY.bins, "<Bins: .*>")):
        with pytest.raises(ValueError, match=rf"LabelDensity, got {got}\. Use LabelDensity\.count\("):
            RegressionMetrics(value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^RegressionMetrics\.merge: other must be a RegressionMetrics, got"):
            RegressionMetrics(DENSITY).merge(value)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"^regression_metrics: pred must hold at least one value, got shape \(0,\)"):
        of(torch.empty(0), torch.empty(0))


def test_only_like_metrics_merge() -> None:
    metrics, classes = RegressionMetrics(DENSITY), Bins.classes(5)
    others = [RegressionMetrics(DENSITY, floor=1), RegressionMetrics(LabelDensity.count([1], classes))]
    for other in others:
        with pytest.raises(ValueError, match=r"^RegressionMetrics\.merge: both must have the same settings, got "):
            metrics.merge(other)
    with pytest.raises(ValueError, match=r"the same settings, got floor=0\.01 and floor=1\.0\."):
        metrics.merge(others[0])


# Maps of one label per pixel, and grids of label axes


def test_maps_are_their_pixels_and_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, target = samples()
    valid = torch.arange(400).view(4, 10, 10) % 7 > 0
    maps, labels = pred.view(4, 10, 10), target.view(4, 10, 10)
    one, pieces = RegressionMetrics(DENSITY), RegressionMetrics(DENSITY)
    one.update(maps[valid], labels[valid])
    assert_equals_naive(one.compute(), naive(pred[valid.flatten()], target[valid.flatten()]))
    monkeypatch.setattr(regression, "_PIECE", 13)
    monkeypatch.setattr(regression, "_SMALL", 0)
    pieces.update(maps[valid], labels[valid])
    assert torch.equal(one.sums, pieces.sums)


# Small batches, which wait to be added together


@pytest.mark.parametrize("sizes", [[1] * 50 + [350], [20] * 17 + [60], [400], [3] * 100 + [100]])
def test_batches_of_any_size_make_the_same_bits(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "_SMALL", 0)
    pred, target = samples()
    whole, split = RegressionMetrics(DENSITY), RegressionMetrics(DENSITY)
    whole.update(pred, target)
    monkeypatch.setattr(regression, "_SMALL", 60)
    for p, t in zip(pred.split(sizes), target.split(sizes), strict=True):
        split.update(p, t)
        assert len(split._waiting) <= regression._MOST_WAITING
        assert all(len(of_bin) <= 60 for of_bin, *_ in split._waiting)
    assert torch.equal(whole.sums, split.sums)
    assert not split._waiting


def test_what_waits_belongs_to_the_metrics_alone() -> None:
    pred, target = (x.double() for x in samples())
    expected = RegressionMetrics(DENSITY)
    expected.update(pred.clone(), target.clone())
    metrics = RegressionMetrics(DENSITY)
    leaf = pred.clone().requires_grad_()
    metrics.update(leaf, target)
    assert not any(x.requires_grad for x in metrics._waiting[0])
    copied, loaded = copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))
    with torch.no_grad():
        leaf.zero_()
    target.zero_()
    merged = metrics.fresh().merge(copied)
    for own in (metrics, copied, loaded, merged):
        assert torch.equal(own.sums, expected.sums)
    metrics.update(pred, pred.clamp(0, 5))
    metrics.sums = torch.zeros_like(expected.sums)
    assert not metrics.sums.any()  # what waited is forgotten too


def test_small_batches_of_mixed_dtypes_and_dropped_targets_add_up() -> None:
    together, alone = (RegressionMetrics(DENSITY, outside="drop", missing="drop") for _ in range(2))
    batches: list[tuple[torch.Tensor, torch.Tensor]] = [
        (torch.tensor([2**24 + 2, 3]), torch.tensor([1, 9])),
        (torch.tensor([0.1, 0.2]), torch.tensor([math.nan, 2.0])),
        (torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float16)),
        (torch.empty(0), torch.empty(0)),
    ]
    for pred, target in batches:
        together.update(pred, target)
        one = alone.fresh()
        one.update(pred, target)
        alone.merge(one)
    assert torch.equal(together.sums, alone.sums)
    assert together.compute().bin_count.values.tolist() == [1, 1, 1, 0, 0]
    assert together.compute().bin_mae[1] == 2**24 + 1  # which float32 would round


OTHER = Bins.from_edges([-10, 0, 4, 5, 20])
GRID = Bins.grid(BINS, OTHER)
JOINT = LabelDensity(GRID, [400, 101, 100, 20, 19, 1, 0, 0, 300, 2, 30, 0, 0, 0, 0, 500, 3, 4, 5, 999])


def joint_samples(n: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    target = torch.stack([5 * torch.rand(n, generator=generator), 30 * torch.rand(n, generator=generator) - 10], 1)
    return (target + torch.randn(n, 2, generator=generator)).double(), target.double()


@pytest.mark.parametrize("floor", [None, 0.3, (0.2, 0.5)])
def test_a_grid_equals_a_naive_loop(floor: Any) -> None:
    pred, target = joint_samples()
    ds = regression_metrics(pred.view(20, 30, 2), target.view(20, 30, 2), JOINT, floor=floor)
    floors = {None: (0.01, 0.07), 0.3: (0.3, 0.3)}.get(floor, floor)  # median widths are 1 and (4 + 10) / 2
    regions = JOINT.regions()
    index = GRID.index(target).tolist()
    for region in ("all", "many", "medium", "few", "unseen"):
        inside = [i for i, b in enumerate(index) if region in ("all", regions[b])]
        cells = sorted({index[i] for i in inside})
        assert ds["count"].sel(region=region) == len(inside)
        assert ds.bins.sel(region=region) == len(cells)
        outcome: dict[str, list[float]] = {name: [] for name in ("mae", "square", "log", "bias", "bmae", "pearson")}
        for k in range(2):
            errors = {i: (pred[i, k] - target[i, k]).item() for i in inside}
            outcome["mae"].append(sum(abs(e) for e in errors.values()) / len(inside))
            outcome["square"].append(sum(e * e for e in errors.values()) / len(inside))
            outcome["log"].append(sum(math.log(max(abs(e), floors[k])) for e in errors.values()) / len(inside))
            outcome["bias"].append(sum(errors.values()) / len(inside))
            means = [np.mean([abs(errors[i]) for i in inside if index[i] == b]) for b in cells]
            # Bins of the second axis are 10, 4, 1 and 15 wide, and those of the first all alike.
            outcome["bmae"].append(float(np.average(means, weights=[(10, 4, 1, 15)[b % 4] for b in cells])))
            outcome["pearson"].append(pearsonr(pred[inside, k], target[inside, k]).statistic)
        expected = {name: sum(outcome[name]) / 2 for name in ("mae", "bias", "bmae", "pearson")}
        expected["rmse"], expected["gm"] = math.sqrt(sum(outcome["square"]) / 2), math.exp(sum(outcome["log"]) / 2)
        for name, value in expected.items():
            np.testing.assert_allclose(ds[name].sel(region=region), value, rtol=1e-11, err_msg=f"{name} of {region}")
        of_axis = {name: outcome[name] for name in ("mae", "bias", "bmae", "pearson")}
        of_axis |= {"rmse": list(map(math.sqrt, outcome["square"])), "gm": list(map(math.exp, outcome["log"]))}
        for name, row in of_axis.items():
            np.testing.assert_allclose(ds[f"axis_{name}"].sel(region=region), row, rtol=1e-11)
    b = index[0]
    here = [i for i in range(600) if index[i] == b]
    np.testing.assert_allclose(ds.bin_mae[b], (pred - target)[here].abs().mean(), rtol=1e-12)
    np.testing.assert_allclose(ds.bin_bias[b], (pred - target)[here].mean(), rtol=1e-11)
    assert (ds.bin_low[7].values.tolist(), ds.bin_high[7].values.tolist()) == ([1, 5], [2, 20])
    np.testing.assert_array_equal(ds.bin_center, GRID.centers)
    assert (ds.axis_gm.attrs["units"], ds.axis_pearson.attrs["units"]) == ("label", "1")


def test_a_grid_of_one_axis_is_that_axis_to_the_bit() -> None:
    pred, target = samples()
    grid = Bins.grid(BINS)
    density = LabelDensity(grid, DENSITY.counts)
    flat, over = of(pred, target), regression_metrics(pred[:, None], target[:, None], density)
    for name in flat.data_vars:
        assert over[name].values.tobytes() == flat[name].values.tobytes(), name
        assert over[name].attrs == flat[name].attrs
    assert over.axis_mae.values.tobytes() == flat.mae.values.tobytes()


def test_grids_merge_and_split_and_know_their_settings() -> None:
    pred, target = joint_samples()
    whole, parts = RegressionMetrics(JOINT), RegressionMetrics(JOINT, floor=None)
    whole.update(pred, target)
    for p, t in zip(pred.split([1, 0, 99, 500]), target.split([1, 0, 99, 500]), strict=True):
        part = parts.fresh()
        part.update(p, t)
        parts.merge(part)
    xr.testing.assert_allclose(parts.compute(), whole.compute(), rtol=1e-12)
    assert whole.floor == parts.fresh().floor == (0.01, 0.07)
    message = r"the same settings, got floor=\(0\.01, 0\.07\) and floor=\(0\.1, 0\.1\)\."
    with pytest.raises(ValueError, match=message):
        whole.merge(RegressionMetrics(JOINT, floor=0.1))
    with pytest.raises(ShapeError, match=r"target must be \(\.\.\., 2\), one number per dimension in the last axis"):
        whole.update(pred[:, 0], target[:, 0])
    with pytest.raises(LabelError, match=r"target\[\.\.\., 1\] must lie on the label axis \[-10, 20\], got 21\.0 at"):
        whole.update(torch.zeros(1, 2), torch.tensor([[1.0, 21.0]]))
    assert whole.sums[0, 0].sum() == 600
    with pytest.raises(ValueError, match="floor must be one number, or one for each of 2 axes, got"):
        RegressionMetrics(JOINT, floor=[0.1])
    with pytest.raises(TypeError, match="floor must be a number, got"):
        RegressionMetrics(DENSITY, floor=[0.1])
    with pytest.raises(ValueError, match="floor must be > 0, got 0"):
        RegressionMetrics(JOINT, floor=[0.1, 0])


def test_bins_may_come_before_their_density() -> None:
    bins = Bins.uniform(0, 6, width=1)
    density, other = LabelDensity.count([1.0, 2.0], bins), LabelDensity.count([1.0], Bins.uniform(0, 3, width=1))
    pred, target = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])
    assert regression_metrics(pred, target, bins, density).identical(regression_metrics(pred, target, density))
    assert RegressionMetrics(bins, density).settings == RegressionMetrics(density).settings
    with pytest.raises(ValueError, match=r"^RegressionMetrics: the density must be over the same bins"):
        RegressionMetrics(bins, other)
    with pytest.raises(TypeError, match=r"^RegressionMetrics: counted must be a LabelDensity, got Bins"):
        RegressionMetrics(density, bins)  # type: ignore[arg-type]


def test_a_constant_median_has_a_bmase_of_one_where_labels_differ_from_it() -> None:
    density = LabelDensity(Bins.classes(3), [50, 30, 20])
    result = regression_metrics(torch.zeros(4), torch.tensor([0.0, 1.0, 2.0, 2.0]), density)
    assert result.bmase.sel(region="all") == 1
    alone = regression_metrics(torch.ones(1), torch.zeros(1), density)
    assert math.isnan(alone.bmase.sel(region="all"))  # one divided by zero


def test_bmase_and_sera_over_a_grid_are_means_over_its_axes() -> None:
    x, y = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    grid = LabelDensity(Bins.grid(BINS, BINS), np.outer(DENSITY.counts, DENSITY.counts).ravel())
    result = regression_metrics(x, y, grid)
    of_axes = [regression_metrics(x[:, k], y[:, k], DENSITY) for k in range(2)]
    expected = np.mean([float(one.sera.sel(region="all")) for one in of_axes])
    assert float(result.sera.sel(region="all")) == pytest.approx(expected, rel=1e-12)
    known = result.axis_bmase.sel(region="all").values
    assert float(result.bmase.sel(region="all")) == pytest.approx(known.mean())


def test_without_training_labels_bmase_and_sera_are_not_known() -> None:
    result = regression_metrics(torch.ones(2), torch.zeros(2), LabelDensity(BINS, [0] * 5))
    assert result[["bmase", "sera"]].to_array().isnull().all()
    assert result.mae.sel(region="all") == 1


def test_a_shallow_copy_and_an_interrupt_neither_lose_nor_repeat_waiting_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = RegressionMetrics(LabelDensity(Bins.uniform(0, 10, count=5), np.full(5, 50)))
    target = torch.linspace(0.5, 9.5, 8)
    metrics.update(target + 1, target)
    shared = copy.copy(metrics)
    assert [int(one.compute()["count"][0]) for one in (shared, metrics, shared)] == [8, 8, 8]
    metrics.update(target, target)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RegressionMetrics, "_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            metrics.compute()
    assert int(metrics.compute()["count"][0]) == 16
