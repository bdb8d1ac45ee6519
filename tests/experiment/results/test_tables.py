from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from dir_toolkit.errors import ResultsError
from dir_toolkit.experiment.results.tables import ResultsTable, as_markdown, as_text, results_table

Run = Callable[[list[float]], xr.Dataset]
Combine = Callable[..., xr.Dataset]


def test_mean_and_spread_are_those_worked_out_by_hand(ds: xr.Dataset) -> None:
    table = results_table(ds)
    assert table.header == ["method", "seeds", "MAE all", "MAE many", "MAE medium", "MAE few", "bMAE all"]
    assert table.counts == ["test samples", "", "9", "4", "3", "2", "9"]
    # vanilla, all: (8 + 12 + 18) / 9 = 4.222 and (12 + 12 + 24) / 9 = 5.333; mean 4.778, sd 1.111 / sqrt(2) = 0.786.
    # many: 2 and 3; medium: 4 and 4; few: 9 and 12; bMAE: 5 and 6.333.
    assert table.rows[0] == [
        "vanilla", "2", "4.78 ± 0.79", "2.50 ± 0.71", "4.00 ± 0.00", "10.50 ± 2.12", "5.67 ± 0.94",
    ]  # fmt: skip


def test_one_seed_has_no_spread_and_a_missing_run_does_not_count(ds: xr.Dataset) -> None:
    assert results_table(ds).rows[1] == ["lds", "1", "3.67", "3.00", "3.00", "6.00", "4.00"]


def test_the_constant_predictor_stands_last(run: Run, combine: Combine) -> None:
    ds = combine({("constant", 0): run([5, 6, 7]), ("b", 0): run([1, 2, 3]), ("a", 0): run([1, 2, 3])})
    assert [row[0] for row in results_table(ds).rows] == ["b", "a", "constant"]


def test_the_caption_names_units_and_spread(ds: xr.Dataset) -> None:
    assert results_table(ds).caption == "age: MAE and bMAE in years; mean ± standard deviation (n - 1) over seeds."
    one = results_table(ds.isel(seed=[0]), columns=[("rmse", "all"), ("pearson", "all")])
    assert one.caption == "age: RMSE in years; one seed per method, so no spread is known."


def test_classification_is_in_percent_by_hand(classes: xr.Dataset) -> None:
    table = results_table(classes)
    assert table.header[2:6] == [f"balanced error {region}" for region in ("all", "many", "medium", "few")]
    assert table.header[6:] == ["error all"]
    assert table.counts == ["test samples", "", "9", "4", "3", "2", "9"]
    # Recalls 1, 2/3, 0 and 1, 1/3, 1/2: balanced errors 4/9 and 7/18, mean 5/12, sd (1/18)/sqrt(2); errors 3/9 twice.
    assert table.rows[0] == [
        "softmax", "2", "41.67 ± 3.93", "0.00 ± 0.00", "50.00 ± 23.57", "75.00 ± 35.36", "33.33 ± 0.00",
    ]  # fmt: skip
    assert [row[0] for row in table.rows] == ["softmax", "adjusted", "constant"]
    said = "digit: balanced error and error in %; mean ± standard deviation (n - 1) over seeds."
    assert table.caption == said


def test_numbers_by_run_stand_without_a_region(classes: xr.Dataset) -> None:
    table = results_table(classes, columns=[("ece", None), ("minutes", None), ("macro_f1", "all")])
    assert table.header == ["method", "seeds", "ECE", "minutes", "macro F1 all"]
    assert table.counts == ["test samples", "", "", "", "9"]
    assert [row[2:4] for row in table.rows] == [["–", "3.50 ± 0.71"], ["6.25", "–"], ["–", "–"]]
    assert table.caption.startswith("digit: ECE and macro F1 in %; mean")


def test_both_families_stand_side_by_side(ds: xr.Dataset) -> None:
    three = ("error", "balanced_error", "macro_f1")
    more = {
        name: (ds["mae"].dims, ds["mae"].notnull().where(ds["mae"].notnull()).values, {"units": "1"}) for name in three
    }
    recall = (ds["bin_mae"].dims, np.where(ds["bin_mae"].notnull(), 0.5, np.nan), {"units": "1"})
    header = results_table(ds.assign(**more, bin_recall=recall, bin_precision=recall)).header
    assert header[2:9] == [
        "MAE all",
        "MAE many",
        "MAE medium",
        "MAE few",
        "bMAE all",
        "balanced error all",
        "balanced error many",
    ]


def test_a_region_that_no_run_was_tested_in_is_left_out(ds: xr.Dataset, classes: xr.Dataset) -> None:
    for whole, column in ((ds, "MAE few"), (classes, "balanced error few")):
        result = whole.copy(deep=True)
        result["bin_count"].loc[{"bin": 2}] = 0
        result["count"].loc[{"region": ["all", "few"]}] -= result["count"].sel(region="few")
        result["bins"].loc[{"region": ["all", "few"]}] -= result["bins"].sel(region="few")
        for name in result.data_vars:
            if result[name].dtype.kind == "f" and "region" in result[name].dims:
                result[name].loc[{"region": "few"}] = np.nan
            elif result[name].dtype.kind == "f" and "bin" in result[name].dims:
                result[name].loc[{"bin": 2}] = np.nan
        assert column in results_table(whole).header
        assert column not in results_table(result).header


@pytest.mark.parametrize("column", ["ece", ("ece", "all"), ("error", None), ("tau", None), (None, None)])
def test_an_unknown_column_of_classification_is_refused(classes: xr.Dataset, column: object) -> None:
    with pytest.raises(
        ValueError, match=r"columns must be .*; with None for the region, \['best_epoch', 'completed', 'ece"
    ):
        results_table(classes, columns=[column])  # type: ignore[list-item]


def test_an_empty_region_and_a_method_without_runs_show_dashes(ds: xr.Dataset) -> None:
    table = results_table(ds.isel(seed=[1]), columns=[("mae", "all"), ("mae", "unseen")])
    assert table.counts == ["test samples", "", "9", "0"]
    assert table.rows[1:] == [["lds", "0", "–", "–"], ["constant", "0", "–", "–"]]


def test_counts_that_differ_are_a_range(ds: xr.Dataset) -> None:
    first = {"method": "vanilla", "seed": 0}
    ds["count"].loc[{**first, "region": ["all", "many"]}] = [1205, 1200]
    ds["bin_count"].loc[{**first, "bin": 0}] = 1200
    assert results_table(ds, columns=[("mae", "many")]).counts == ["test samples", "", "4 to 1,200"]


@pytest.mark.parametrize(
    ("factor", "cell"), [(1e-3, "0.00250"), (1.0, "2.50"), (1e2, "250"), (1e6, "2500000")], ids=str
)
def test_decimals_follow_the_scale_of_the_label(ds: xr.Dataset, factor: float, cell: str) -> None:
    ds["mae"] = ds["mae"] * factor
    ds["mae"].attrs["units"] = "years"
    assert results_table(ds, columns=[("mae", "many")]).rows[0][2].startswith(f"{cell} ± ")


def test_markdown_has_a_row_per_method(run: Run, combine: Combine) -> None:
    ds = combine({("a|b", 0): run([1, 2, 3])})
    assert as_markdown(results_table(ds, columns=[("mae", "many"), ("mae", "few")])) == (
        "| method | seeds | MAE many | MAE few |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| test samples |  | 4 | 2 |\n"
        "| a\\|b | 1 | 1.00 | 3.00 |\n"
        "\n"
        "age: MAE in years; one seed per method, so no spread is known.\n"
    )


def test_text_has_aligned_columns(ds: xr.Dataset) -> None:
    assert as_text(results_table(ds, columns=[("mae", "many")])) == (
        "method        seeds     MAE many\n"
        "test samples                   4\n"
        "--------------------------------\n"
        "vanilla           2  2.50 ± 0.71\n"
        "lds               1         3.00\n"
        "constant          1         5.00\n"
        "age: MAE in years; mean ± standard deviation (n - 1) over seeds.\n"
    )


@pytest.mark.parametrize("column", [("mse", "all"), ("mae", "some"), ("bin_mae", "all"), ("mae",), ("mae", ["all"])])
def test_an_unknown_column_is_refused(ds: xr.Dataset, column: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"results_table: columns must be .* got \('.*Metrics are \['bias', 'bins'"):
        results_table(ds, columns=[column])


def test_columns_are_a_sequence(ds: xr.Dataset) -> None:
    with pytest.raises(TypeError, match="results_table: columns must be a Sequence, got int"):
        results_table(ds, columns=5)  # type: ignore[arg-type]


def test_only_a_result_is_taken(run: Run) -> None:
    with pytest.raises(ResultsError, match="results_table: ds must be a result, got one without 'method'"):
        results_table(run([1, 2, 3]))
    with pytest.raises(TypeError, match=r"ds must be a Dataset, got str"):
        results_table("results.nc")  # type: ignore[arg-type]


def test_cells_that_stand_out_have_asterisks() -> None:
    table = ResultsTable(
        "said.", ["m", "x"], ["n", "2"], [["a", "1"], ["b|c", "3"]], {(0, 1): "better", (1, 1): "worse"}
    )
    assert as_markdown(table) == ("| m | x |\n| --- | ---: |\n| n | 2 |\n| a | **1** |\n| b\\|c | *3* |\n\nsaid.\n")
    assert as_text(table) == "m        x\nn        2\n----------\na    **1**\nb|c    *3*\nsaid.\n"
    assert table.rows == [["a", "1"], ["b|c", "3"]]
