from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

import dir_toolkit as dt
from dir_toolkit.errors import LabelError, ResultsError, ShapeError
from dir_toolkit.experiment.results.digit_figures import feature_space_figure
from dir_toolkit.experiment.results.drawing import figure_svg, method_colors, save_figure
from dir_toolkit.experiment.results.figures import (
    density_figure,
    error_figure,
    history_figure,
    region_figure,
    similarity_figure,
)

Run = Callable[[list[float]], xr.Dataset]
Combine = Callable[..., xr.Dataset]
BINS = dt.Bins.uniform(0, 8, width=1)
HISTORY = {
    (method, seed): [{"epoch": str(i), "loss": 1.0 / (i + 1), "val_bmae": ""} for i in range(3)]
    for method in ("vanilla", "lds")
    for seed in (0, 1)
}


def _means(empty: int = 6) -> np.ndarray:
    means = np.random.default_rng(0).normal(size=(8, 4)) + 2
    means[empty] = np.nan
    return means


def _density() -> dt.LabelDensity:
    return dt.LabelDensity(BINS, np.array([100, 50, 20, 10, 5, 1, 0, 1]))


def _all(ds: xr.Dataset) -> dict[str, Figure]:
    density = _density()
    return {
        "density": density_figure(
            density, np.ones(8), effective=density.smooth(dt.gaussian(3, 1)), label_name="age", label_units="years"
        ),
        "error": error_figure(ds),
        "region": region_figure(ds),
        "similarity": similarity_figure(
            _means(),
            _means(5),
            BINS,
            anchor=3,
            variance_before=_means() ** 2,
            variance_after=_means() ** 2,
            label_name="age",
            label_units="years",
        ),
        "history": history_figure(HISTORY, label_units="years"),
    }


def _texts(figure: Figure) -> str:
    return "\n".join(text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()))


def test_every_figure_is_drawn_labels_its_units_and_leaves_matplotlib_alone(ds: xr.Dataset, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name, figure in _all(ds).items():
        assert type(figure) is Figure
        assert "(years)" in _texts(figure), name
        for kind in ("svg", "png"):
            save_figure(figure, tmp_path / f"{name}.{kind}", dpi=50)
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


def test_nothing_imports_pyplot_and_reading_a_result_does_not_import_matplotlib() -> None:
    program = """
import sys
import dir_toolkit
assert "xarray" not in sys.modules and "matplotlib" not in sys.modules
from dir_toolkit.experiment.results import comparison_figures, digit_figures, drawing, figures
from dir_toolkit.experiment.results import report, schema, summary, tables
assert "matplotlib" not in sys.modules and "jinja2" not in sys.modules
figure = figures.density_figure(dir_toolkit.LabelDensity.count([0, 1], dir_toolkit.Bins.classes(2)))
drawing.figure_svg(figure)
drawing.figure_svg(digit_figures.feature_space_figure({"a": ([[0, 1]], [0], [[1, 0]], [0])}))
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, ds: xr.Dataset) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = (np.zeros((1, 2)), [0], None, None)
    for draw in (
        lambda: region_figure(ds),
        lambda: region_figure(ds, colors={"vanilla": "red"}),
        lambda: feature_space_figure({"a": panel}),
    ):
        with pytest.raises(ImportError, match=r'matplotlib must be installed, .* pip install "dir_toolkit\[recipes\]"'):
            draw()


def test_density_shows_counts_the_effective_density_and_weights() -> None:
    density = _density()
    assert len(density_figure(density).axes) == 1
    upper, lower = density_figure(density, np.arange(8.0), effective=density.smooth(dt.triangular(3))).axes
    assert len(upper.lines) == 1
    assert len(upper.patches) == 1
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), density.smooth(dt.triangular(3)).counts)
    np.testing.assert_array_equal(lower.lines[1].get_ydata(), np.arange(8.0))


def test_density_refuses_other_bins_and_shapes() -> None:
    said = r"density_figure: weights must be one number per bin, shape \(8,\), got \(7,\)"
    with pytest.raises(ShapeError, match=said):
        density_figure(_density(), np.ones(7))
    with pytest.raises(ValueError, match="density_figure: effective must be over the bins of density"):
        density_figure(_density(), effective=dt.LabelDensity.count([0], dt.Bins.classes(1)))
    with pytest.raises(TypeError, match="density_figure: density must be a LabelDensity, got ndarray"):
        density_figure(np.ones(8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="density_figure: weights must be integers or floats"):
        density_figure(_density(), np.array(["1"] * 8))


def test_tensors_with_gradients_are_drawn_too() -> None:
    assert density_figure(_density(), torch.ones(8, requires_grad=True)).axes  # type: ignore[arg-type]
    means = torch.from_numpy(_means()).bfloat16().requires_grad_()
    assert similarity_figure(means, means, BINS, anchor=3).axes  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [error_figure, region_figure])
def test_only_a_result_is_drawn(draw: Callable[[Any], Figure], run: Run) -> None:
    with pytest.raises(ResultsError, match=r"ds must be a result.*, got one without 'method'"):
        draw(run([1, 2, 3]))
    with pytest.raises(TypeError, match=r"ds must be a Dataset, got str"):
        draw("results.nc")


def test_error_has_a_line_a_method_and_a_band_where_seeds_are_several(ds: xr.Dataset) -> None:
    top, below = error_figure(ds).axes
    assert [line.get_label() for line in top.lines] == ["vanilla (2 seeds)", "lds (1 seed)", "_constant"]
    assert len(top.collections) == 1
    band = top.collections[0].get_paths()[0].vertices
    first = band[band[:, 0] == 0, 1]  # MAE 2 and 3 in the first bin: sd sqrt(1/2)
    assert [first.min(), first.max()] == pytest.approx([2.5 - 0.5**0.5, 2.5 + 0.5**0.5])
    np.testing.assert_array_equal(top.lines[0].get_ydata(), [2.5, 4.0, 10.5, np.nan, np.nan])
    assert top.get_ylabel() == "MAE (years)\nmean ± sd over seeds"
    assert top.get_ylim() == (
        0,
        pytest.approx(error_figure(ds.sel({"method": ["vanilla", "lds"]})).axes[0].get_ylim()[1]),
    )
    assert [text.get_text() for text in top.texts] == ["constant"]
    assert "log scale" in below.get_ylabel()


def test_seeds_that_all_methods_share_are_said_once(ds: xr.Dataset) -> None:
    for seeds, said in (([0], "1 seed"), ([0, 1], "mean ± sd over 2 seeds")):
        some = ds.sel({"method": ["vanilla", "constant"], "seed": seeds})
        for figure in (error_figure(some), region_figure(some)):
            assert figure.axes[0].get_ylabel() == f"MAE (years)\n{said}"
            assert "vanilla" in [text.get_text() for legend in figure.legends for text in legend.texts]


def test_a_constant_beyond_the_axis_is_a_number_at_its_end(ds: xr.Dataset) -> None:
    axes = region_figure(ds).axes[0]
    assert [text.get_text() for text in axes.texts][-1] == "constant 20 ↑"
    assert axes.get_ylim()[1] < 20
    assert [text.get_text() for text in axes.texts][1] == "constant 5"
    assert len(axes.collections) == 1 + 3  # whiskers of vanilla; steps over all, many and medium


def test_error_says_how_it_smooths_and_weighs_bins_by_their_samples(ds: xr.Dataset) -> None:
    top = error_figure(ds, window=3).axes[0]
    assert "mean of 3 bins" in top.get_ylabel()
    # lds: bins 3, 3, 6 with 4, 3, 2 samples
    np.testing.assert_allclose(top.lines[1].get_ydata(), [3, 33 / 9, 21 / 5, np.nan, np.nan])
    for window, said in ((2, "must be odd"), (0, "at least 1")):
        with pytest.raises(ValueError, match=said):
            error_figure(ds, window=window)


def test_region_has_a_bar_a_method_and_region_with_counts_below(ds: xr.Dataset) -> None:
    axes = region_figure(ds).axes[0]
    assert len(axes.patches) == 2 * 4
    assert [bar.get_height() for bar in axes.patches[4:8]] == pytest.approx([33 / 9, 3, 3, 6])
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks[:2] == ["all\n9 samples\n3 bins", "many\n4 samples\n1 bins"]
    whiskers = [bars.errorbar is not None for bars in axes.containers if isinstance(bars, BarContainer)]
    assert whiskers == [True, False]  # for the method with two seeds alone


def test_region_shows_classification_in_percent_without_the_constant_predictor(classes: xr.Dataset) -> None:
    axes = region_figure(classes).axes[0]
    assert axes.get_ylabel() == "balanced error (%)\nmean ± sd over seeds"
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([500 / 12, 0, 50, 75, 1300 / 36, 25, 100 / 3, 50])
    other = region_figure(classes, metric="macro_f1").axes[0]
    assert other.get_ylabel().startswith("macro F1 (%)")
    for metric in ("mae", "bin_recall", 3):
        with pytest.raises(ValueError, match=r"region_figure: metric must be one of \['balanced_error', 'bins'"):
            region_figure(classes, metric=metric)  # type: ignore[arg-type]


def test_region_of_many_methods_has_a_row_each(run: Run, combine: Combine) -> None:
    ds = combine({(f"m{i}", s): run([1.0 + i + s, 2.0, 3.0]) for i in range(9) for s in (0, 1)})
    figure = region_figure(ds, metric="bmae")
    assert len(figure.axes) == 4
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == [f"m{i}" for i in range(9)]
    np.testing.assert_allclose([line.get_xdata()[0] for line in first.lines], [(6.5 + i) / 3 for i in range(9)])
    assert figure.get_supxlabel() == "bMAE (years), mean ± sd over 2 seeds"
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["all", "many", "medium", "few"]


def test_without_a_completed_run_the_picture_says_so(run: Run, combine: Combine) -> None:
    ds = combine({("a", 0): run([1, 2, 3]), ("b", 1): run([1, 2, 3])}).isel({"seed": [1], "method": [0]})
    for figure in (error_figure(ds), region_figure(ds)):
        assert [text.get_text() for text in figure.axes[0].texts] == ["no completed run"]


def test_texts_histories_and_colors_are_checked(ds: xr.Dataset) -> None:
    with pytest.raises(TypeError, match="density_figure: label_name must be a str, got int"):
        density_figure(_density(), label_name=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="similarity_figure: label_units must be a str, got int"):
        similarity_figure(_means(), _means(), BINS, anchor=3, label_units=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="history_figure: metric_name must be a str, got int"):
        history_figure(HISTORY, metric_name=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="history_figure: histories must be a Mapping, got list"):
        history_figure([])  # type: ignore[arg-type]
    for key in ("vanilla", (1, 0), ("vanilla",)):
        with pytest.raises(TypeError, match=r"histories must be given by \(method, seed\), got "):
            history_figure({key: []})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"history_figure: colors\['lds'\] must be a color, got 'nocolor'"):
        history_figure(HISTORY, colors={"lds": "nocolor"})
    with pytest.raises(ValueError, match=r"error_figure: colors\['lds'\] must be a color, got None"):
        error_figure(ds, colors={"lds": None})  # type: ignore[dict-item]


def test_error_figures_are_of_regression(classes: xr.Dataset) -> None:
    with pytest.raises(
        ResultsError, match="error_figure: ds must be a result of regression, got one without 'bin_mae'"
    ):
        error_figure(classes)


def test_history_shows_shares_in_percent() -> None:
    rows = [{"epoch": 0, "loss": 1.0, "val": 0.25}, {"epoch": 1, "loss": 0.5, "val": ""}]
    axes = history_figure({("a", 0): rows}, loss="loss", metric="val", metric_name="error", percent=True).axes
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [1.0, 0.5])
    np.testing.assert_array_equal(axes[1].lines[0].get_ydata(), [25.0, np.nan])
    assert axes[1].get_ylabel() == "error (%)"


def test_colours_that_repeat_come_with_another_line() -> None:
    names = [f"m{i}" for i in range(16)]
    axes = history_figure(
        {(name, 0): [{"epoch": 0, "loss": 1, "val": 1}] for name in names}, loss="loss", metric="val"
    ).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes[0].lines}
    assert len(looks) == 16


def test_one_method_with_one_seed_is_drawn(run: Run, combine: Combine) -> None:
    ds = combine({("only", 3): run([1, 2, 3])})
    assert error_figure(ds).axes[0].get_ylabel() == "MAE (years)\n1 seed"
    assert len(region_figure(ds).axes[0].patches) == 4


def test_similarity_is_that_worked_out_by_hand() -> None:
    before = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [np.nan, np.nan]])
    after = np.ones((4, 2))
    figure = similarity_figure(before, after, dt.Bins.uniform(0, 4, width=1), anchor=0.5)
    line, left, right = figure.axes[:3]
    np.testing.assert_allclose(line.lines[1].get_ydata(), [1, 0, 0.5**0.5, np.nan], atol=1e-15)
    np.testing.assert_allclose(line.lines[2].get_ydata(), 1)
    assert left.images[0].get_array().shape == right.images[0].get_array().shape == (4, 4)
    assert len(figure.axes) == 4  # the colour bar is the fourth
    uneven = similarity_figure(before, after, dt.Bins.from_edges([0, 1, 2, 4, 9]), anchor=0.5)
    assert uneven.axes[1].get_xlabel() == "bin"


def test_similarity_refuses_what_it_cannot_compare() -> None:
    means = _means()
    with pytest.raises(ShapeError, match=r"feature means must have the shape \(8, D\)"):
        similarity_figure(means[:7], means[:7], BINS, anchor=1)
    with pytest.raises(ValueError, match="anchor must lie in a bin that has feature means, got 6, whose bin is empty"):
        similarity_figure(means, means, BINS, anchor=6)
    with pytest.raises(ValueError, match="must be given both or neither"):
        similarity_figure(means, means, BINS, anchor=1, variance_before=means)
    with pytest.raises(LabelError, match=r"similarity_figure: anchor must lie on the label axis \[0, 8\], got 9.0"):
        similarity_figure(means, means, BINS, anchor=9)
    with pytest.raises(TypeError, match=r"anchor must be a number, got \[1\]"):
        similarity_figure(means, means, BINS, anchor=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bins must be a Bins, got int"):
        similarity_figure(means, means, 8, anchor=1)  # type: ignore[arg-type]


def test_history_has_a_line_a_run_and_one_name_a_method() -> None:
    figure = history_figure(HISTORY)
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vanilla", "lds"]
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert np.isnan(figure.axes[1].lines[0].get_ydata()).all()
    with pytest.raises(ValueError, match=r"got no 'lost'\. Columns are \['epoch', 'loss', 'val_bmae'\]"):
        history_figure(HISTORY, loss="lost")


def test_colours_can_be_handed_over(ds: xr.Dataset) -> None:
    colors = {"vanilla": "#000001", "lds": "#000002", "constant": "#000003"}
    assert [line.get_color() for line in error_figure(ds, colors=colors).axes[0].lines] == list(colors.values())
    some = {"lds": "#000002"}
    assert [line.get_color() for line in error_figure(ds, colors=some).axes[0].lines][1] == "#000002"
    assert history_figure(HISTORY, colors=some).axes[0].lines[0].get_color() == method_colors(["vanilla"])["vanilla"]


def test_hostile_names_are_drawn_as_text(run: Run, combine: Combine) -> None:
    ds = combine({('$a_b$ <script> --> " id="x', 0): run([1, 2, 3])}, label_name="$x$", label_units="$")
    for figure in (error_figure(ds), region_figure(ds)):
        svg = figure_svg(figure)
        assert "<script>" not in svg
        assert "$a_b$" in svg
        assert "$" in _texts(figure)
