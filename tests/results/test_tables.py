from __future__ import annotations

from collections.abc import Callable

import pytest
import xarray as xr

from dir_toolkit.errors import ResultsError
from dir_toolkit.results.tables import markdown_table, results_table, text_table

Run = Callable[[list[float]], xr.Dataset]
Combine = Callable[..., xr.Dataset]


def test_mean_and_spread_by_hand(ds: xr.Dataset) -> None:
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


def test_caption_says_units_and_spread(ds: xr.Dataset) -> None:
    assert results_table(ds).caption == "age: MAE and bMAE in years; mean ± standard deviation (n - 1) over seeds."
    one = results_table(ds.isel(seed=[0]), columns=[("rmse", "all"), ("pearson", "all")])
    assert one.caption == "age: RMSE in years; one seed a method, so no spread is known."


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


def test_markdown(run: Run, combine: Combine) -> None:
    ds = combine({("a|b", 0): run([1, 2, 3])})
    assert markdown_table(ds, columns=[("mae", "many"), ("mae", "few")]) == (
        "| method | seeds | MAE many | MAE few |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| test samples |  | 4 | 2 |\n"
        "| a\\|b | 1 | 1.00 | 3.00 |\n"
        "\n"
        "age: MAE in years; one seed a method, so no spread is known.\n"
    )


def test_text(ds: xr.Dataset) -> None:
    assert text_table(ds, columns=[("mae", "many")]) == (
        "method        seeds     MAE many\n"
        "test samples                   4\n"
        "--------------------------------\n"
        "vanilla           2  2.50 ± 0.71\n"
        "lds               1         3.00\n"
        "constant          1         5.00\n"
        "age: MAE in years; mean ± standard deviation (n - 1) over seeds.\n"
    )


@pytest.mark.parametrize("column", [("mse", "all"), ("mae", "some"), ("bin_mae", "all"), ("mae",)])
def test_an_unknown_column_is_refused(ds: xr.Dataset, column: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"results_table: columns must be .* got \('.*Metrics are \['bias', 'bins'"):
        results_table(ds, columns=[column])


def test_only_a_result_is_taken(run: Run) -> None:
    with pytest.raises(ResultsError, match="dimension 'method' with its coordinate is missing"):
        results_table(run([1, 2, 3]))
    with pytest.raises(TypeError, match=r"ds must be an xarray\.Dataset, got str"):
        results_table("results.nc")  # type: ignore[arg-type]
