from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import dir_toolkit as dt
from dir_toolkit.errors import ResultsError
from dir_toolkit.experiment.results.schema import combine_runs, load_results, save_results, validate_results
from dir_toolkit.experiment.results.tables import results_table
from dir_toolkit.metrics.classification import classification_metrics
from dir_toolkit.metrics.regression import regression_metrics

REGRESSION = [name for metric in dt.RegressionMetrics.metrics for name in metric.variables]
CLASSIFICATION = [name for metric in dt.ClassificationMetrics.metrics for name in metric.variables]
Combine = Callable[..., xr.Dataset]
Run = Callable[[list[float]], xr.Dataset]


def test_runs_stand_at_their_method_and_seed(ds: xr.Dataset) -> None:
    assert ds["method"].values.tolist() == ["vanilla", "lds", "constant"]
    assert ds["seed"].values.tolist() == [0, 1]
    assert ds["mae"].dims == ("method", "seed", "region")
    assert ds["bin_mae"].dims == ("method", "seed", "bin")
    # (4·3 + 3·4 + 2·12) / 9 and (3 + 4 + 12) / 3
    vanilla = ds.sel({"method": "vanilla", "seed": 1, "region": "all"})
    assert vanilla["mae"].item() == pytest.approx(48 / 9, abs=1e-12)
    assert vanilla["bmae"].item() == pytest.approx(19 / 3, abs=1e-12)
    assert vanilla["minutes"].item() == 4.0
    assert vanilla["best_epoch"].item() == 5.0


def test_missing_runs_are_nan_with_count_zero(ds: xr.Dataset) -> None:
    assert ds["completed"].values.tolist() == [[1, 1], [1, 0], [1, 0]]
    missing = ds.sel({"method": "lds", "seed": 1})
    for name, array in missing.data_vars.items():
        empty = array.isnull() if array.dtype.kind == "f" else array == 0
        assert bool(empty.all()), name
    assert np.isnan(ds["minutes"].sel({"method": "constant"}).values).all()


def test_an_empty_region_is_missing_and_not_zero(ds: xr.Dataset) -> None:
    unseen = ds.sel(region="unseen")
    assert bool(unseen["mae"].isnull().all())
    assert bool((unseen["count"] == 0).all())


def test_units_of_labels_replace_the_metrics_placeholder_and_the_runs_stay_as_they_were(
    run: Run, combine: Combine
) -> None:
    one = run([1.0, 2.0, 3.0])
    before = one.copy(deep=True)
    ds = combine({("a", 0): one})
    assert ds["mae"].attrs["units"] == ds["bin_low"].attrs["units"] == "years"
    xr.testing.assert_identical(one, before)


def test_parts_of_a_result_combine_to_the_result(ds: xr.Dataset, combine: Combine) -> None:
    parts = {(m, int(s)): ds.sel({"method": m, "seed": s}) for m in ds["method"].values for s in ds["seed"].values}
    again = combine(parts)
    again.attrs = dict(ds.attrs)
    xr.testing.assert_identical(again, ds)


def test_seeds_are_sorted_and_methods_are_not(run: Run, combine: Combine) -> None:
    ds = combine({("b", 5): run([1, 1, 1]), ("a", 2): run([2, 2, 2]), ("b", 2): run([3, 3, 3])})
    assert ds["method"].values.tolist() == ["b", "a"]
    assert ds["seed"].values.tolist() == [2, 5]
    assert ds["mae"].sel(region="all").values.tolist()[0] == [3.0, 1.0]


def test_what_the_metrics_give_combines(combine: Combine) -> None:
    bins = dt.Bins.uniform(0, 4, width=1)
    density = dt.LabelDensity(bins, np.array([200, 30, 3, 0]))
    one = regression_metrics(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.5, 1.5, 3.5]), density)
    ds = combine({("constant", 0): one})
    assert ds["mae"].sel(region="all").item() == pytest.approx(0.5)
    assert ds["bin_region"].values.tolist() == ["many", "medium", "few", "unseen"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_saved_result_loads_as_it_was(run: Run, combine: Combine, tmp_path: Path, seeds: int) -> None:
    runs = {("soft bins, τ", s): run([1.0 + s, 2.0, 3.0]).assign(minutes=0.5) for s in range(seeds)}
    ds = combine(
        runs, label_units="days since 2000-01-01", attrs={"epochs": 12, "lr": 2e-3, "note": "ä\nb", "nothing": ""}
    )
    save_results(ds, tmp_path / "results.nc")
    loaded = load_results(tmp_path / "results.nc")
    xr.testing.assert_identical(loaded, ds)
    assert {n: a.dtype.kind for n, a in loaded.data_vars.items()} == {n: a.dtype.kind for n, a in ds.data_vars.items()}
    assert loaded["count"].dtype == np.int64
    assert loaded["completed"].dtype == np.int8
    assert type(loaded.attrs["epochs"]) is int
    save_results(loaded, tmp_path / "again.nc")
    assert (tmp_path / "again.nc").stat().st_size > 0
    xr.testing.assert_identical(load_results(tmp_path / "again.nc"), ds)


def test_other_attributes_become_json(ds: xr.Dataset, tmp_path: Path) -> None:
    ds.attrs |= {
        "env": {"torch": "2.13", "cuda": None},
        "methods": ["a", "b"],
        "deterministic": True,
        "big": 2**40,
        "scalar": np.float64(0.5),
    }
    save_results(ds, tmp_path / "r.nc")
    attrs = load_results(tmp_path / "r.nc").attrs
    assert attrs["env"] == '{"torch": "2.13", "cuda": null}'
    assert attrs["methods"] == '["a", "b"]'
    assert attrs["deterministic"] == "true"
    assert attrs["big"] == str(2**40)
    assert attrs["scalar"] == 0.5


def test_a_whole_number_beyond_32_bits_is_refused(ds: xr.Dataset, tmp_path: Path) -> None:
    ds["train_count"] = ds["train_count"].where(ds["train_count"] == 0, 2**31)
    with pytest.raises(ResultsError, match=r"fit 32 bits, got 1 fault:\n  - 'train_count' holds 2147483648"):
        save_results(ds, tmp_path / "r.nc")
    assert list(tmp_path.iterdir()) == []


def test_a_result_of_classification_holds_its_metrics(classes: xr.Dataset) -> None:
    one = classes.sel({"method": "softmax", "seed": 1})
    assert one["error"].sel(region="all").item() == pytest.approx(3 / 9, abs=1e-12)
    assert one["balanced_error"].sel(region="all").item() == pytest.approx((0 + 2 / 3 + 1 / 2) / 3, abs=1e-12)
    assert one["macro_f1"].sel(region="all").item() == pytest.approx((1 + 2 / 4 + 2 / 3) / 3, abs=1e-12)
    np.testing.assert_array_equal(one["bin_precision"].values, [1, 1, 1, 0, np.nan])
    missing = classes.sel({"method": "adjusted", "seed": 1})
    assert all(bool(missing[name].isnull().all()) for name in CLASSIFICATION)


def test_what_the_classification_metrics_give_combines(combine: Combine) -> None:
    bins = dt.Bins.classes(4)
    density = dt.LabelDensity(bins, np.array([200, 30, 3, 0]))
    one = classification_metrics(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1, 1]), density)
    ds = combine({("softmax", 0): one, ("softmax", 2): one})
    assert set(CLASSIFICATION) <= set(ds.data_vars)
    assert not set(REGRESSION) & set(ds.data_vars)
    assert ds["balanced_error"].sel(region="all").values.tolist() == [[0.25, 0.25]]


def test_a_result_may_be_of_both_families(run: Run, class_run: Callable[[list[int]], xr.Dataset]) -> None:
    beside = class_run([4, 2, 0])
    one = run([1, 2, 3]).assign({name: beside[name].variable for name in CLASSIFICATION})
    ds = combine_runs({("soft bins", 0): one}, title="t", command="c", label_name="age", label_units="years")
    assert {*REGRESSION, *CLASSIFICATION} <= set(ds.data_vars)


def test_a_classification_result_survives_a_file(classes: xr.Dataset, tmp_path: Path) -> None:
    save_results(classes, tmp_path / "results.nc")
    xr.testing.assert_identical(load_results(tmp_path / "results.nc"), classes)


def test_a_number_by_run_may_be_missing_in_some(class_run: Callable[[list[int]], xr.Dataset], combine: Combine) -> None:
    ece = ((), 0.5, {"units": "1"})
    kept = ((), 3, {"units": "1"})
    runs = {("a", 0): class_run([4, 2, 0]), ("b", 0): class_run([4, 2, 0]).assign(ece=ece, kept=kept)}
    ds = combine(runs)
    np.testing.assert_array_equal(ds["ece"].values, [[np.nan], [0.5]])
    np.testing.assert_array_equal(ds["kept"].values, [[np.nan], [3.0]])
    runs["a", 0] = runs["a", 0].assign(ece=("region", np.full(5, np.nan)), kept=kept)
    with pytest.raises(ResultsError, match=r"\('b', 0\): 'ece' is over \(\), in the first run that has it over"):
        combine(runs)
    runs["a", 0] = runs["a", 0].drop_vars("ece")
    assert combine(runs)["kept"].dtype == np.int64  # no run lacks it


def _drop(*names: str) -> Callable[[xr.Dataset], xr.Dataset]:
    return lambda ds: ds.drop_vars(list(names))


def _set(name: str, value: object, **where: object) -> Callable[[xr.Dataset], xr.Dataset]:
    def change(ds: xr.Dataset) -> xr.Dataset:
        ds[name].loc[where] = value
        return ds

    return change


def _attr(name: str, value: object, of: str | None = None) -> Callable[[xr.Dataset], xr.Dataset]:
    def change(ds: xr.Dataset) -> xr.Dataset:
        (ds if of is None else ds[of]).attrs[name] = value
        return ds

    return change


_HERE = {"method": "vanilla", "seed": 0}
FAULTS: list[tuple[Callable[[xr.Dataset], xr.Dataset], str]] = [
    (_drop("minutes"), "variable 'minutes' is missing"),
    (_drop(*REGRESSION), "variables must hold a metric that dir_toolkit.metrics declares, got none"),
    (_drop("bin_low"), r"coordinate 'bin_low' over \('bin',\) is missing"),
    (_drop("region"), "dimension 'region' with its coordinate is missing"),
    (lambda ds: ds.isel(method=[]), "dimension 'method' must not be empty"),
    (lambda ds: ds.isel(bin=[]), "dimension 'bin' must not be empty"),
    (lambda ds: ds.isel(region=[1, 0, 2, 3, 4]), "coordinate 'region' must be"),
    (lambda ds: ds.isel(bin=[0, 2, 1, 3, 4]), r"coordinate 'bin' must be 0 \.\.\. 4"),
    (lambda ds: ds.isel(seed=[1, 0]), "coordinate 'seed' must be rising whole numbers"),
    (lambda ds: ds.assign_coords(method=["a", "a", "b"]), "coordinate 'method' must be text without repeats"),
    (lambda ds: ds.assign(mae=ds["mae"].isel(seed=0)), "variable 'mae' must be over"),
    (lambda ds: ds.assign(count=ds["count"].astype(float).assign_attrs(units="1")), "'count' must be whole numbers"),
    (lambda ds: ds.assign_coords(bin_low=("bin", list("abcde"))), "coordinate 'bin_low' must be floats"),
    (lambda ds: ds.assign(more=("bin", np.ones(5), {"units": "1"})), "variable 'more' must be over"),
    (_set("count", -4, **_HERE, region="many"), "variable 'count' must not be negative, got values from -4 to"),
    (_set("train_count", -1, **_HERE, bin=0), "variable 'train_count' must not be negative"),
    (_set("mae", 0.0, **_HERE, region="unseen"), "variable 'mae' must be NaN where 'count' is 0"),
    (_set("mae", np.nan, **_HERE, region="many"), "variable 'mae' must not be NaN where 'count' is above 0"),
    (_set("bin_mae", 0.0, **_HERE, bin=3), "variable 'bin_mae' must be NaN where 'bin_count' is 0"),
    (_set("bin_bias", np.nan, **_HERE, bin=0), "variable 'bin_bias' must not be NaN where 'bin_count' is above 0"),
    (_set("rmse", np.inf, **_HERE, region="many"), "variable 'rmse' must be finite or NaN"),
    (_set("gm", -1.0, **_HERE, region="many"), "variable 'gm' must not be negative, got values from -1 to"),
    (_set("bias", -np.inf, **_HERE, region="many"), "variable 'bias' must be finite or NaN"),
    (lambda ds: ds.assign_coords(bin_low=ds["bin_low"] * 0.5), "bin edges must be finite and rising"),
    (_set("bin_high", 0.0, bin=0), "bin edges must be finite and rising"),
    (_set("bin_center", 9.0, bin=0), "coordinate 'bin_center' must lie within its bin"),
    (_set("bin_region", "head", bin=0), r"coordinate 'bin_region' must be of .*, got \['head'\]"),
    (_set("bin_region", "few", bin=0), "'bin_count' over the bins of region 'many' must add up to 'count'"),
    (_set("count", 5, **_HERE, region="many"), "variable 'count' over the regions must add up to 'all'"),
    (_set("bins", 5, **_HERE, region="many"), "variable 'bins' over the regions must add up to 'all'"),
    (_set("pearson", 1.5, **_HERE, region="all"), r"variable 'pearson' must lie in \[-1, 1\]"),
    (_set("minutes", 1.0, method="lds", seed=1), "variable 'minutes' must be NaN where 'completed' is 0"),
    (_drop("bin_region"), r"coordinate 'bin_region' over \('bin',\) is missing"),
    (_set("completed", 2, **_HERE), "variable 'completed' must be 0 or 1"),
    (_set("completed", 0, **_HERE), "variable 'count' must be 0 where 'completed' is 0"),
    (_set("completed", 1, method="lds", seed=1), "variable 'count' must be above 0 where 'completed' is 1"),
    (lambda ds: ds.assign(mae=ds["mae"].drop_attrs()), "variable 'mae' must have units 'years', got None"),
    (_attr("units", "months", "bin_mae"), "variable 'bin_mae' must have units 'years', got 'months'"),
    (_attr("units", "s", "minutes"), "variable 'minutes' must have units 'min', got 's'"),
    (_attr("units", "months", "bin_center"), "coordinate 'bin_center' must have units 'years', got 'months'"),
    *(
        (
            lambda ds, n=n: ds.drop_attrs(deep=False).assign_attrs({k: v for k, v in ds.attrs.items() if k != n}),
            f"attribute '{n}' must be text, got None",
        )
        for n in ("title", "created", "dir_toolkit_version", "command", "label_name", "label_units")
    ),
    (_attr("created", "yesterday"), "attribute 'created' must be an ISO 8601 time with its zone"),
    (_attr("created", "2026-01-01T00:00:00"), "attribute 'created' must be an ISO 8601 time with its zone"),
]


def test_results_without_a_fault_pass_and_stay_as_they_are(
    ds: xr.Dataset, classes: xr.Dataset, compared: xr.Dataset
) -> None:
    for sound in (ds, classes, compared):
        before = sound.copy(deep=True)
        validate_results(sound)
        xr.testing.assert_identical(sound, before)


@pytest.mark.parametrize(("break_it", "said"), FAULTS, ids=[said[:60] for _, said in FAULTS])
def test_each_fault_is_reported(ds: xr.Dataset, break_it: Callable[[xr.Dataset], xr.Dataset], said: str) -> None:
    with pytest.raises(ResultsError, match=said):
        validate_results(break_it(ds))


_MISSING = {"method": "adjusted", "seed": 1}
CLASS_FAULTS: list[tuple[Callable[[xr.Dataset], xr.Dataset], str]] = [
    (_set("error", 1.5, method="softmax", seed=0, region="all"), r"variable 'error' must lie in \[0, 1\]"),
    (_set("macro_f1", -0.5, method="softmax", seed=0, region="all"), r"variable 'macro_f1' must lie in \[0, 1\]"),
    (_set("bin_recall", np.inf, method="softmax", seed=0, bin=0), "variable 'bin_recall' must be finite or NaN"),
    (_set("bin_recall", np.nan, method="softmax", seed=0, bin=0), "'bin_recall' must not be NaN where 'bin_count'"),
    (_set("bin_recall", 0.0, method="softmax", seed=0, bin=3), "'bin_recall' must be NaN where 'bin_count' is 0"),
    (_set("bin_precision", 0.5, method="softmax", seed=0, bin=4), "'bin_precision' must be 0 or NaN where 'bin_count'"),
    (_set("bin_precision", 0.0, **_MISSING, bin=4), "'bin_precision' must be NaN where 'completed' is 0"),
    (_set("ece", 0.5, **_MISSING), "'ece' must be NaN where 'completed' is 0"),
    (_attr("units", "%", "balanced_error"), "variable 'balanced_error' must have units '1', got '%'"),
]


@pytest.mark.parametrize(("break_it", "said"), CLASS_FAULTS, ids=[said[:60] for _, said in CLASS_FAULTS])
def test_each_fault_of_classification_is_reported(
    classes: xr.Dataset, break_it: Callable[[xr.Dataset], xr.Dataset], said: str
) -> None:
    with pytest.raises(ResultsError, match=said):
        validate_results(break_it(classes))


_HALF = {"method": "half", "seed": 1}
SAMPLE_FAULTS: list[tuple[Callable[[xr.Dataset], xr.Dataset], str]] = [
    (_drop("target"), "variables 'target' and 'prediction' must be given both or neither"),
    (_drop("prediction", "lower", "upper"), "variables 'target' and 'prediction' must be given both or neither"),
    (_drop("upper"), "variables 'lower' and 'upper' must be given both or neither"),
    (_drop("prediction"), "variables 'lower' and 'upper' must stand beside 'prediction'"),
    (_attr("interval_level", 0.5, "upper"), r"must have one interval_level between 0 and 1, got \[0.75, 0.5\]"),
    (lambda ds: ds.assign({n: ds[n].assign_attrs(interval_level=1) for n in ("lower", "upper")}), "got \\[1, 1\\]"),
    (_attr("units", "months", "prediction"), "variable 'prediction' must have units 'years', got 'months'"),
    (lambda ds: ds.assign(target=ds["prediction"]), r"variable 'target' must be over \('sample',\)"),
    (lambda ds: ds.assign(lower=ds["target"]), r"variable 'lower' must be over \('method', 'seed', 'sample'\)"),
    (lambda ds: ds.isel(sample=[]), "dimension 'sample' must not be empty"),
    (_set("target", np.nan, sample=0), "variable 'target' must be finite and on the label axis"),
    (_set("target", 6.0, sample=0), "variable 'target' must be finite and on the label axis"),
    (_set("target", 4.5, sample=0), "'bin_count' must count the labels in 'target' in every run that has predictions"),
    (_set("prediction", np.nan, **_HALF, sample=0), "'prediction' must be finite for all samples of a run, or NaN for"),
    (_set("prediction", np.inf, **_HALF, sample=0), "variable 'prediction' must be finite or NaN"),
    (_set("prediction", 1.0, method="half", seed=0), "variable 'prediction' must be NaN where 'completed' is 0"),
    (_set("prediction", 4.0, **_HALF, sample=0), "'mae' over all must be that of 'prediction' and 'target', is off by"),
    (_set("lower", np.nan, **_HALF), "'lower' and 'upper' must be NaN in the same runs, and where 'prediction' is"),
    (
        lambda ds: _set("upper", 1.0, method="half", seed=0)(_set("lower", 1.0, method="half", seed=0)(ds)),
        "in the same",
    ),
    (_set("lower", 4.5, **_HALF, sample=0), "variable 'lower' must not be above 'upper'"),
    (lambda ds: ds.drop_vars([*REGRESSION, "lower", "upper"]), "'prediction' must be in a result of regression"),
]


@pytest.mark.parametrize(("break_it", "said"), SAMPLE_FAULTS, ids=[said[:60] for _, said in SAMPLE_FAULTS])
def test_each_fault_of_samples_is_reported(
    compared: xr.Dataset, break_it: Callable[[xr.Dataset], xr.Dataset], said: str
) -> None:
    with pytest.raises(ResultsError, match=said):
        validate_results(break_it(compared))


def test_predictions_in_another_order_are_found_out(compared: xr.Dataset) -> None:
    order = [8, 1, 2, 3, 4, 5, 6, 7, 0]
    for name in ("prediction", "lower", "upper"):
        compared[name] = compared[name].isel(sample=order)
    with pytest.raises(ResultsError, match="'mae' over all must be that of 'prediction' and 'target'"):
        validate_results(compared)


def test_runs_with_and_without_predictions_and_intervals_stand_side_by_side(compared: xr.Dataset) -> None:
    assert compared["target"].dims == ("sample",)
    assert compared["target"].dtype == np.float64
    assert compared["prediction"].dims == ("method", "seed", "sample")
    output = {name: compared[name].notnull().all("sample").values.tolist() for name in ("prediction", "lower", "upper")}
    assert output["prediction"] == [
        [True] * 3,
        [False, True, True],
        [False, False, True],
        [False] * 3,
        [True, False, False],
    ]
    assert (
        output["lower"]
        == output["upper"]
        == [[False] * 3, [False, True, True], [False, False, True], [False] * 3, [False] * 3]
    )
    assert {compared[name].dtype for name in output} == {np.dtype(np.float32)}
    assert compared["lower"].attrs == {"units": "years", "interval_level": 0.75}


def test_predictions_survive_a_file_and_combine_again(compared: xr.Dataset, combine: Combine, tmp_path: Path) -> None:
    save_results(compared, tmp_path / "results.nc")
    loaded = load_results(tmp_path / "results.nc")
    xr.testing.assert_identical(loaded, compared)
    assert loaded["prediction"].dtype == np.float32
    parts = {(m, int(s)): loaded.sel({"method": m, "seed": s}) for m in loaded["method"].values for s in (0, 1, 2)}
    again = combine(parts)
    again.attrs = dict(compared.attrs)
    xr.testing.assert_identical(again, compared)


def test_samples_that_do_not_fit_together_are_refused(predicted: Callable[..., xr.Dataset], combine: Combine) -> None:
    target = np.array([0.5, 1.5, 2.5])
    one = predicted(target, target + 1, half=1.0)
    turned = predicted(target[::-1].copy(), target + 1)
    short = predicted(target[:2], target[:2], half=1.0)
    short["lower"].attrs["interval_level"] = 0.5
    with pytest.raises(ResultsError, match="every run must have the same axes and variables") as caught:
        combine({("a", 0): one, ("b", 0): turned, ("c", 0): short, ("d", 0): one.drop_vars("target")})
    for part in (
        "('b', 0): 'target' differs from that of the first run that has it: predictions must be in one order",
        "('c', 0): 'target' has 2 samples, in the first run that has it 3",
        "('c', 0): 'prediction' has 2 samples",
        "('c', 0): 'lower' has interval_level 0.5, in the first run that has it 0.75",
        "('d', 0): 'prediction' must stand beside 'target'",
    ):
        assert part in str(caught.value)


def test_labels_keep_the_precision_that_decides_their_bins(
    predicted: Callable[..., xr.Dataset], combine: Combine
) -> None:
    for given, kept in ((np.float32, np.float32), (np.float64, np.float64), (np.int64, np.float64)):
        target = np.array([0, 1, 2], dtype=given)
        assert (
            combine({("a", 0): predicted(target.astype(float), target + 0.5).assign(target=("sample", target))})[
                "target"
            ].dtype
            == kept
        )


def test_a_bin_that_was_never_predicted_has_no_precision(classes: xr.Dataset) -> None:
    place = {"method": "softmax", "seed": 0, "bin": 2}
    classes["bin_precision"].loc[place] = np.nan
    assert validate_results(classes) is None
    classes["bin_recall"].loc[place] = np.nan
    with pytest.raises(ResultsError, match="'bin_recall' must not be NaN where 'bin_count' is above 0"):
        validate_results(classes)


def test_all_faults_are_reported_at_once(ds: xr.Dataset) -> None:
    del ds.attrs["title"]
    ds["train_count"][0, 0, 0] = -1
    ds["mae"].attrs.clear()
    with pytest.raises(ResultsError) as caught:
        validate_results(ds.drop_vars("minutes"))
    text = str(caught.value)
    assert "got 4 faults" in text
    for part in ("'title'", "'minutes' is missing", "'mae' must have units", "'train_count' must not be negative"):
        assert part in text


def test_pearson_may_be_missing_where_there_are_samples_and_others_may_stand_beside(ds: xr.Dataset) -> None:
    ds["pearson"][:] = np.nan
    ds["sharpness"] = (("method", "seed", "region"), ds["mae"].values * 0, {"units": "1"})
    validate_results(ds)
    del ds["sharpness"].attrs["units"]
    with pytest.raises(ResultsError, match="sharpness"):
        validate_results(ds)


def test_only_a_dataset_is_taken() -> None:
    with pytest.raises(TypeError, match=r"validate_results: ds must be a Dataset, got dict"):
        validate_results({})  # type: ignore[arg-type]


def test_runs_that_do_not_fit_together_are_refused(run: Run, combine: Combine) -> None:
    one = run([1, 2, 3])
    other = run([1, 2, 3]).drop_vars("gm").assign(extra=("region", np.ones(5)))
    other = other.assign_coords(bin_high=other["bin_high"] + 1).assign(count=other["count"].astype(float))
    with pytest.raises(ResultsError, match="every run must have the same axes and variables") as caught:
        combine({("a", 0): one, ("b", 1): other})
    text = str(caught.value)
    for part in (
        "('b', 1): coordinate 'bin_high' differs",
        "'gm' is in the first run only",
        "'extra' is in this run only",
        "'count' must be whole numbers, got float64",
    ):
        assert part in text
    assert "('a', 0)" not in text
    with pytest.raises(ResultsError, match="coordinate 'region' is missing"):
        combine({("a", 0): one.drop_vars("region")})
    with pytest.raises(ResultsError, match="runs must hold at least one run"):
        combine_runs({}, title="", command="", label_name="", label_units="")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("vanilla", r"runs must be given by \(method, seed\), got 'vanilla'"),
        (("vanilla", 0, 1), r"runs must be given by \(method, seed\)"),
        ((None, 0), "method must be a str, got NoneType"),
        (("vanilla", 0.5), "seed must be a whole number, got 0.5"),
        (("vanilla", "0"), "seed must be a whole number, got '0'"),
    ],
)
def test_runs_under_other_keys_are_refused(run: Run, combine: Combine, key: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        combine({key: run([1, 2, 3])})


def test_runs_that_are_no_datasets_are_refused(run: Run, combine: Combine) -> None:
    with pytest.raises(TypeError, match=r"runs\[\('b', 0\)\] must be a Dataset, got NoneType"):
        combine({("a", 0): run([1, 2, 3]), ("b", 0): None})
    with pytest.raises(TypeError, match="runs must be a Mapping, got list"):
        combine([run([1, 2, 3])])
    with pytest.raises(TypeError, match="attrs must be a Mapping, got str"):
        combine({("a", 0): run([1, 2, 3])}, attrs="torch")


@pytest.mark.parametrize(
    "beside",
    [
        lambda ds: ds.assign(sharpness=ds["pearson"].astype(np.float16)),
        lambda ds: ds.assign_attrs({"torch/cuda": "12"}),
        lambda ds: ds.assign_coords(note=("bin", np.array([object()] * 5))),
    ],
)
def test_what_netcdf_cannot_hold_is_our_error(
    ds: xr.Dataset, tmp_path: Path, beside: Callable[[xr.Dataset], xr.Dataset]
) -> None:
    with pytest.raises(ResultsError, match="save_results: what stands beside the schema must fit NetCDF-3, got"):
        save_results(beside(ds), tmp_path / "r.nc")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.nc"
    path.write_bytes(b"not a netcdf file")
    with pytest.raises(ResultsError, match=r"load_results: .*bad\.nc must be a whole NetCDF-3 file"):
        load_results(path)
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(path, engine="scipy")
    with pytest.raises(ResultsError, match=r"load_results: .*bad\.nc must follow the schema"):
        load_results(path)
    with pytest.raises(FileNotFoundError):
        load_results(tmp_path / "gone.nc")


def test_damaged_files_raise_our_error_or_none(ds: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "r.nc"
    save_results(ds, path)
    good = path.read_bytes()
    rng = random.Random(0)
    refused = []
    for i in range(60):  # tests/attack/test_mutations.py tries more
        bad = bytearray(good)
        if i % 3 == 0:
            for _ in range(rng.randint(1, 4)):
                bad[rng.randrange(min(len(bad), 4000))] ^= 1 << rng.randrange(8)
        elif i % 3 == 1:
            del bad[rng.randrange(len(bad) - 8) :]
        else:
            spot = rng.randrange(len(bad))
            bad[spot:spot] = rng.randbytes(rng.randint(1, 64))
        path.write_bytes(bad)
        try:
            load_results(path)
        except ResultsError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("r.nc" in message for message in refused)


def test_every_cut_file_is_refused(ds: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "r.nc"
    save_results(ds, path)
    good = path.read_bytes()
    for length in range(0, len(good) - 8, 97):
        path.write_bytes(good[:length])
        with pytest.raises(ResultsError, match=r"r\.nc"):
            load_results(path)


def test_a_failed_save_leaves_the_old_file(ds: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.nc"
    save_results(ds, path)
    good = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_results(ds, path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["r.nc"]


def test_saving_changes_nothing_in_memory(ds: xr.Dataset, tmp_path: Path) -> None:
    ds.attrs["env"] = {"a": 1}
    before: Any = ds.copy(deep=True)
    save_results(ds, tmp_path / "r.nc")
    xr.testing.assert_identical(ds, before)
    assert ds["count"].dtype == np.int64


def test_a_result_written_before_a_metric_was_declared_still_loads(ds: xr.Dataset, tmp_path: Path) -> None:
    older = ds.drop_vars(["pearson", "gm", "bin_bias"])
    save_results(older, tmp_path / "results.nc")
    loaded = load_results(tmp_path / "results.nc")
    xr.testing.assert_identical(loaded, older)
    assert results_table(loaded).rows == results_table(ds).rows
    one = {("lds", 0): loaded.sel({"method": "lds", "seed": 0})}
    again = combine_runs(one, title="t", command="c", label_name="age", label_units="years")
    assert "pearson" not in again


def test_units_follow_the_declaration(run: Run, combine: Combine) -> None:
    one = run([1.0, 2.0, 3.0])
    squared = one.assign(spread=("region", one["mae"].values ** 2, {"units": "label^2"}))
    assert combine({("a", 0): squared})["spread"].attrs["units"] == "years^2"
    assert combine({("a", 0): one})["mae"].attrs["units"] == "years"
    assert combine({("a", 0): squared}, label_units="1")["spread"].attrs["units"] == "1"
