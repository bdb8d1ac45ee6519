from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import dir_toolkit as dt
from dir_toolkit.errors import ResultsError
from dir_toolkit.experiment.results.comparison import (
    comparison_table,
    differences_csv,
    leading_methods,
    paired_differences,
)
from dir_toolkit.experiment.results.tables import as_markdown, as_text

Run = Callable[..., xr.Dataset]
Combine = Callable[..., xr.Dataset]
EVERY = tuple((metric, region) for metric in ("mae", "bmae") for region in ("all", "many", "medium", "few"))
NAMES = [f"{name}{end}" for name in ("difference", "ratio") for end in ("", "_low", "_high")]


def _of(result: xr.Dataset, method: str, metric: str = "mae", region: str = "all") -> dict[str, float]:
    pairs = list(zip(result["metric"].values.tolist(), result["region"].values.tolist(), strict=True))
    part = result.sel({"method": method}).isel(column=pairs.index((metric, region)))
    return {name: float(part[name]) for name in NAMES}


def test_differences_are_those_worked_out_by_hand(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    # |error| / 4: 1 2 1 2 | 4 2 3 | 8 4 sum to 27; over 9 samples 0.75, times 1.25 and 1.5 for seeds 1 and 2.
    shared = 0.75 * (1.25 + 1.5) / 2
    assert _of(result, "half")["difference"] == pytest.approx(-shared / 2, abs=1e-12)
    # One bin each: (6/4 + 9/3 + 12/2) / 4 / 3 = 0.875.
    assert _of(result, "half", "bmae")["difference"] == pytest.approx(-0.875 * 1.375 / 2, abs=1e-12)
    assert _of(result, "half", "mae", "few")["difference"] == pytest.approx(-1.5 * 1.375 / 2, abs=1e-12)
    assert result["seeds"].values.tolist() == [3, 2, 1, 0, 3]
    assert result["difference"].attrs["units"] == "years"
    assert result["ratio"].attrs["units"] == "1"


def test_half_of_every_error_is_half_in_every_replicate(compared: xr.Dataset) -> None:
    # Seeds and samples are the same on both sides, so the ratio cannot vary.
    result = paired_differences(compared)
    for metric, region in (("mae", "all"), ("bmae", "all"), ("mae", "few")):
        part = _of(result, "half", metric, region)
        np.testing.assert_allclose([part[n] for n in NAMES[3:]], 0.5, atol=1e-12)
        assert part["difference_low"] < part["difference"] < part["difference_high"] < 0


def test_the_baseline_against_itself_is_exactly_zero(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    assert _of(result, "vanilla") == {**dict.fromkeys(NAMES[:3], 0.0), **dict.fromkeys(NAMES[3:], 1.0)}


def _many(predicted: Run, combine: Combine, *, seeds: int = 4, n: int = 300, **scales: float) -> xr.Dataset:
    """Methods whose errors are theirs times a seed's times a sample's, the last shared by all of them."""
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 3, n).astype(np.float32)
    shared = rng.normal(size=n)
    runs = {}
    for method, scale in scales.items():
        for seed in range(seeds):
            noise = 0.8 * shared + 0.6 * rng.normal(size=n)
            error = scale * (1 + 0.03 * rng.normal()) * noise
            runs[method, seed] = predicted(target, (target + error).astype(np.float32))
    return combine(runs)


def test_points_are_the_differences_of_the_result(predicted: Run, combine: Combine) -> None:
    ds = _many(predicted, combine, vanilla=1.0, better=0.7, other=1.1)
    result = paired_differences(ds, metrics=EVERY, replicates=100)
    means = ds.mean("seed")
    for method in ("better", "other"):
        for metric, region in EVERY:
            part, both = _of(result, method, metric, region), means[metric].sel(region=region)
            mine, theirs = float(both.sel({"method": method})), float(both.sel({"method": "vanilla"}))
            assert part["difference"] == pytest.approx(mine - theirs, abs=1e-6)
            assert part["ratio"] == pytest.approx(mine / theirs, abs=1e-6)
    with pytest.raises(AssertionError):  # the comparison above tells other methods apart
        assert _of(result, "better")["difference"] == pytest.approx(_of(result, "other")["difference"], abs=1e-6)


def test_a_clear_gap_excludes_zero_and_equal_methods_include_it(predicted: Run, combine: Combine) -> None:
    ds = _many(predicted, combine, vanilla=1.0, better=0.6, same=1.0, worse=1.6)
    result = paired_differences(ds)
    for metric, region in (("mae", "all"), ("bmae", "all"), ("mae", "few")):
        better, same, worse = (_of(result, m, metric, region) for m in ("better", "same", "worse"))
        assert better["difference_high"] < 0 < worse["difference_low"]
        assert same["difference_low"] < 0 < same["difference_high"]
        assert better["ratio_high"] < 1 < worse["ratio_low"]


def test_replicates_are_those_of_a_naive_loop(compared: xr.Dataset) -> None:
    # The naive loop draws samples one at a time with another generator: intervals agree but for the draws.
    rng = np.random.default_rng(5)
    target = compared["target"].values
    pair = compared["prediction"].sel({"method": ["alone", "vanilla"], "seed": 2}).values.astype(np.float64)
    error = np.abs(pair - target)
    drawn = []
    for _ in range(4000):
        picked: list[int] = []
        weight: list[float] = []
        for age in range(3):
            inside = np.flatnonzero(np.floor(target) == age)
            picked += rng.choice(inside, len(inside) - 1).tolist()
            weight += [len(inside) / (len(inside) - 1)] * (len(inside) - 1)
        drawn.append(sum(w * (error[0, i] - error[1, i]) for i, w in zip(picked, weight, strict=True)) / 9)
    part = _of(paired_differences(compared, replicates=20000), "alone")
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert [part["difference_low"], part["difference_high"]] == pytest.approx([low, high], abs=0.02)
    assert high - low > 0.1


def test_the_draws_have_the_variance_of_a_mean(predicted: Run, combine: Combine) -> None:
    # Three seeds differ by a constant: the standard error over seeds is sd(n - 1) / sqrt(3), not smaller.
    target = np.full(40, 0.5)
    offsets = {("vanilla", s): 1.0 for s in range(3)} | {("a", s): 1.0 + (s - 1) / 2 for s in range(3)}
    ds = combine({key: predicted(target, target + offset) for key, offset in offsets.items()})
    wide = _of(paired_differences(ds, level=0.5, replicates=5000), "a")
    # Two of three drawn: the mean of the draws is ±0.5 (1/9 each), ±0.25 (2/9 each) and 0 (3/9).
    assert (wide["difference_low"], wide["difference_high"]) == pytest.approx((-0.25, 0.25), abs=1e-6)
    assert _of(paired_differences(ds, level=0.9, replicates=5000), "a")["difference_high"] == pytest.approx(0.5)


@pytest.mark.parametrize("seeds", [1, 5])
def test_intervals_cover_the_truth_about_as_often_as_they_say(predicted: Run, combine: Combine, seeds: int) -> None:
    # Ten methods like the baseline, in a few worlds: the true difference over seeds and samples is 0.
    covered = []
    bins = np.repeat([0.5, 1.5, 2.5], 60)
    for world in range(6 if seeds == 1 else 3):
        rng = np.random.default_rng([world, seeds])
        shared = rng.normal(size=bins.size)
        runs = {}
        for method in ("vanilla", *"abcdefghij"):
            for seed in range(seeds):
                scale = 1 + (0.05 * rng.normal() if seeds > 1 else 0.0)
                error = scale * (shared + rng.normal(size=bins.size))
                runs[method, seed] = predicted(bins, bins + error)
        result = paired_differences(combine(runs), metrics=[("mae", "all")], level=0.8, replicates=300)
        inside = (result["difference_low"] < 0) & (result["difference_high"] > 0)
        covered.append(float(inside[1:].mean()))
    assert 0.65 < np.mean(covered) < 0.97


def test_classes_vary_as_shares_of_their_samples_do(combine: Combine) -> None:
    tested = {0: (400, {"a": 100, "b": 60}), 1: (100, {"a": 10, "b": 40})}  # samples, and wrong answers of each method
    target = torch.cat([torch.full((n,), c) for c, (n, _) in tested.items()])

    def run(method: str) -> xr.Dataset:
        wrong = torch.cat([torch.arange(n) < of[method] for n, of in tested.values()])
        density = dt.LabelDensity(dt.Bins.classes(2), torch.tensor([200, 200]))
        return dt.classification_metrics(torch.where(wrong, 1 - target, target), target, density)

    ds = combine({(method, 0): run(method) for method in "ab"}, label_units="1")
    columns = [("balanced_error", "all"), ("error", "all")]
    result = paired_differences(ds, "a", metrics=columns, replicates=4000)
    assert set(_of(result, "a", "error").values()) == {0.0, 1.0}
    for name, shares in (("balanced_error", (0.5, 0.5)), ("error", (0.8, 0.2))):
        part = _of(result, "b", name)
        expected, variance = 0.0, 0.0
        for share, (n, wrong) in zip(shares, tested.values(), strict=True):
            expected += share * (wrong["b"] - wrong["a"]) / n
            variance += share**2 * sum(k / n * (1 - k / n) / (n - 1) for k in wrong.values())
        assert part["difference"] == pytest.approx(expected, abs=1e-12)
        reach = 1.96 * variance**0.5
        ends = [part["difference_low"] - expected, part["difference_high"] - expected]
        np.testing.assert_allclose(ends, [-reach, reach], rtol=0.1)


def test_one_seed_tells_the_variation_of_samples_alone(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    assert result.attrs["resampled"].endswith("of one seed, test samples alone: alone")
    assert result.attrs["baseline"] == "vanilla"
    several = paired_differences(compared.sel({"method": ["vanilla", "half"]}))
    assert several.attrs["resampled"] == "seeds, and test samples within their bins"
    part = _of(result, "alone")
    assert part["difference_low"] < part["difference"] < part["difference_high"]


def test_the_constant_predictor_meets_every_seed(compared: xr.Dataset) -> None:
    errors = np.abs(0.5 - compared["target"].values)
    mean = float(compared["mae"].sel({"method": "vanilla", "region": "all"}).mean())
    assert _of(paired_differences(compared), "constant")["difference"] == pytest.approx(errors.mean() - mean, abs=1e-6)
    turned = paired_differences(compared, "constant")
    assert _of(turned, "vanilla")["difference"] == pytest.approx(mean - errors.mean(), abs=1e-6)


def test_methods_without_predictions_or_regions_without_samples_are_nan(compared: xr.Dataset) -> None:
    result = paired_differences(compared, metrics=[("mae", "all"), ("bmae", "unseen")])
    assert all(np.isnan(_of(result, "plain")[name]) for name in NAMES)
    assert all(np.isnan(_of(result, "half", "bmae", "unseen")[name]) for name in NAMES)
    assert not np.isnan(_of(result, "half")["difference"])


def test_a_perfect_baseline_has_no_ratio(predicted: Run, combine: Combine) -> None:
    target = np.array([0.5, 0.25, 1.5])
    ds = combine({("vanilla", 0): predicted(target, target), ("a", 0): predicted(target, target + 0.5)})
    part = _of(paired_differences(ds), "a")
    assert part["difference"] == 0.5
    assert np.isnan(part["ratio"])
    assert np.isnan(part["ratio_high"])


def test_draws_repeat_and_do_not_depend_on_the_other_methods(predicted: Run, combine: Combine) -> None:
    ds = _many(predicted, combine, n=60, vanilla=1.0, other=0.8, half=0.5)
    before = ds.copy(deep=True)
    result = paired_differences(ds)
    xr.testing.assert_identical(result, paired_differences(ds))
    fewer = paired_differences(ds.sel({"method": ["half", "vanilla"]}))
    np.testing.assert_allclose(fewer["difference_low"][0], result["difference_low"][2], atol=1e-12)
    assert not np.array_equal(paired_differences(ds, seed=1)["difference_low"][2], result["difference_low"][2])
    xr.testing.assert_identical(ds, before)


def test_blocks_of_replicates_do_not_matter(compared: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paired_differences(compared)
    monkeypatch.setattr("dir_toolkit.experiment.results.comparison._BLOCK", 1000)
    xr.testing.assert_allclose(paired_differences(compared), whole, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "lds"}, r"paired_differences: baseline must be one of 'vanilla', 'half', .* got 'lds'"),
        ({"metrics": [("rmse", "all")]}, r"paired_differences: a metric must be one of 'mae', 'bmae', got 'rmse'"),
        ({"metrics": [("mae", "tail")]}, r"paired_differences: a region must be one of 'all', .* got 'tail'"),
        ({"metrics": ["mae"]}, r"metrics must be \(metric, region\) pairs, got 'mae'"),
        ({"metrics": []}, "metrics must hold at least one pair, got none"),
        ({"replicates": 99}, "replicates must be at least 100, got 99"),
        ({"level": 1}, "level must be > 0 and < 1, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"baseline": "plain"}, "'plain' must have predictions to be compared with, got a baseline without any"),
    ],
)
def test_wrong_arguments_are_refused(compared: xr.Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_differences(compared, **changes)


def test_other_kinds_are_refused(compared: xr.Dataset, ds: xr.Dataset) -> None:
    with pytest.raises(TypeError, match="metrics must be a Sequence, got int"):
        paired_differences(compared, metrics=3)  # type: ignore[arg-type]
    with pytest.raises(ResultsError, match=r"ds must hold the prediction for each test sample, got none\. Give target"):
        paired_differences(ds)
    with pytest.raises(ResultsError, match="ds must be a result, got one without 'completed'"):
        paired_differences(compared.drop_vars("completed"))


def test_the_table_is_that_worked_out_by_hand(compared: xr.Dataset) -> None:
    result = paired_differences(compared, metrics=[("mae", "all"), ("mae", "few")])
    table = comparison_table(compared, result)
    assert table.header == ["method", "seeds", "MAE all", "MAE few", "minutes"]
    assert table.counts == ["test samples", "", "9", "2", ""]
    # 0.75 times 1, 1.25, 1.5 has the mean 0.9375 and sd 0.1875; of the half, 0.375 times 1.25 and 1.5.
    assert table.rows[0] == ["vanilla", "3", "0.938 ± 0.188", "1.875 ± 0.375", "4.00 ± 1.00"]
    assert table.rows[1] == ["half", "2", "0.516 ± 0.066 (×0.50)", "1.031 ± 0.133 (×0.50)", "6.00 ± 0.00"]
    assert table.rows[2][2] == "1.500 (×1.33)"
    assert table.rows[3] == ["plain", "1", "0.750", "1.500", "–"]
    assert {cell: mark for cell, mark in table.marks.items() if cell[0] < 4} == {
        (1, 2): "better",
        (1, 3): "better",
        (2, 2): "worse",
        (2, 3): "worse",
    }
    for part in (
        "age: MAE in years",
        "ratio to vanilla",
        "Bold: better than vanilla; italics: worse",
        "the 95 % bootstrap interval of the paired difference excludes 0",
        "With one shared seed an interval is of the test samples alone: alone.",
    ):
        assert part in table.caption
    assert "| **0.516 ± 0.066 (×0.50)** |" in as_markdown(table)
    assert "| *1.500 (×1.33)* |" in as_markdown(table)
    assert "  **0.516 ± 0.066 (×0.50)**  " in as_text(table)


def test_table_without_minutes_has_no_such_column(compared: xr.Dataset) -> None:
    compared["minutes"][:] = np.nan
    result = paired_differences(compared, metrics=[("bmae", "all")])
    assert comparison_table(compared, result).header == ["method", "seeds", "bMAE all"]


def test_table_refuses_what_does_not_belong(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    with pytest.raises(ValueError, match="comparison_table: differences must be of the methods of ds"):
        comparison_table(compared.isel(method=[0, 1]), result)
    with pytest.raises(ResultsError, match="must be a result of paired_differences, got a dataset without ratio"):
        comparison_table(compared, result.drop_vars("ratio"))
    with pytest.raises(TypeError, match="differences must be a Dataset, got dict"):
        comparison_table(compared, {})  # type: ignore[arg-type]


def test_the_csv_holds_every_difference(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    rows = list(csv.DictReader(io.StringIO(differences_csv(result))))
    assert len(rows) == result.sizes["method"] * result.sizes["column"]
    row = next(r for r in rows if r["method"] == "half" and (r["metric"], r["region"]) == ("mae", "few"))
    assert row["seeds"] == "2"
    assert row["baseline"] == "vanilla"
    for name in NAMES:
        assert float(row[name]) == pytest.approx(_of(result, "half", "mae", "few")[name], rel=1e-5)
    assert {r["difference"] for r in rows if r["method"] == "plain"} == {""}
    with pytest.raises(ResultsError, match="differences_csv: differences must be a result of paired_differences"):
        differences_csv(result.drop_attrs())


def test_leading_methods_are_the_best_of_each_region(
    run: Callable[[list[float]], xr.Dataset], combine: Combine
) -> None:
    errors = {
        "vanilla": [2, 8, 20], "few": [9, 9, 1], "middling": [3, 5, 6], "worst": [9, 9, 9], "many": [1, 9, 9],
        "best": [3, 3, 6],
    }  # fmt: skip
    ds = combine({(m, 0): run([float(e) for e in es]) for m, es in errors.items()} | {("constant", 0): run([0, 0, 0])})
    assert leading_methods(ds) == ["vanilla", "few", "middling", "worst", "many", "best"]
    assert leading_methods(ds, most=4) == ["vanilla", "few", "many", "best"]
    assert leading_methods(ds, most=5) == ["vanilla", "few", "middling", "many", "best"]
    assert leading_methods(ds, "worst", most=2) == ["worst", "best"]
    assert leading_methods(ds, most=1) == ["vanilla"]
    with pytest.raises(ValueError, match=r"leading_methods: baseline must be one of 'vanilla', .*, got 'lds'"):
        leading_methods(ds, "lds")
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        leading_methods(ds, most=0)


def test_leading_methods_are_of_regression(classes: xr.Dataset) -> None:
    with pytest.raises(ResultsError, match="leading_methods: ds must be a result of regression"):
        leading_methods(classes, "softmax")


def test_the_axis_may_be_of_any_edges(combine: Combine) -> None:
    bins = dt.Bins.from_edges([0, 0.3, 4.0, 9.0])
    target = np.array([0.1, 0.3, 3.9, 9.0], dtype=np.float32)  # the end of the axis is in the last bin
    runs = {}
    for seed, method in enumerate(("vanilla", "a")):
        output = target + np.float32(seed + 1) * np.array([1, 1, 1, 3], dtype=np.float32)
        result = dt.regression_metrics(
            torch.from_numpy(output), torch.from_numpy(target), dt.LabelDensity(bins, [200, 30, 3])
        )
        years = {"units": "label"}
        runs[method, 0] = result.assign(target=("sample", target, years), prediction=("sample", output, years))
    result = paired_differences(combine(runs))
    assert _of(result, "a")["difference"] == pytest.approx(6 / 4, abs=1e-6)
    # A bin weighs by its width in the bMAE.
    assert _of(result, "a", "bmae")["difference"] == pytest.approx((0.3 + 3.7 + 3 * 5) / 9, abs=1e-6)
