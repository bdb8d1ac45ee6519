from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dir_toolkit.errors import ResultsError
from dir_toolkit.experiment.results.comparison import paired_differences
from dir_toolkit.experiment.results.comparison_figures import _apart, cost_figure, coverage_figure, difference_figure
from dir_toolkit.experiment.results.drawing import save_figure
from dir_toolkit.experiment.results.figures import region_figure

Run = Callable[..., xr.Dataset]
Combine = Callable[..., xr.Dataset]


def _boxes(figure: Figure, texts: list[matplotlib.text.Text]) -> list[matplotlib.transforms.Bbox]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [text.get_window_extent(canvas.get_renderer()) for text in texts]


def _assert_apart(figure: Figure, *groups: list[matplotlib.text.Text]) -> None:
    """Every text lies on the figure, and none over another of its group."""
    boxes = iter(_boxes(figure, [text for texts in groups for text in texts]))
    for texts in groups:
        assert len(texts) > 1
        _assert_boxes_apart(figure, list(islice(boxes, len(texts))))


def _assert_boxes_apart(figure: Figure, boxes: list[matplotlib.transforms.Bbox]) -> None:
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        for other in boxes[:i]:
            assert not box.overlaps(other)


@pytest.fixture
def crowd(predicted: Run, combine: Combine) -> xr.Dataset:
    """Twenty-five methods with long names that all cost and err about the same."""
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 3, 60).astype(np.float32)
    names = ["vanilla", *(f"soft bins after training τ = 0.{i:02d}" for i in range(24))]
    runs = {}
    for name in names:
        for seed in range(2):
            output = (target + rng.normal(size=60)).astype(np.float32)
            runs[name, seed] = predicted(target, output, half=1.0).assign(minutes=5 + 0.1 * rng.normal())
    runs["constant", 0] = predicted(target, np.full(60, 0.5))
    return combine(runs)


def test_every_figure_is_drawn_labels_its_units_and_leaves_matplotlib_alone(
    compared: xr.Dataset, tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    result = paired_differences(compared, replicates=100)
    for i, figure in enumerate((difference_figure(result), coverage_figure(compared), cost_figure(compared))):
        said = [name for axes in figure.axes for name in (axes.get_xlabel(), axes.get_ylabel())]
        said += [figure.get_supxlabel(), *(axes.get_title() for axes in figure.axes)]
        assert any("(years)" in text for text in said)
        for kind in ("svg", "png"):
            save_figure(figure, tmp_path / f"{i}.{kind}", dpi=40)
            assert (tmp_path / f"{i}.{kind}").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


def test_difference_shows_points_intervals_and_verdicts(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    figure = difference_figure(result)
    assert [axes.get_title() for axes in figure.axes] == ["all", "many", "medium", "few"]
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["half (2 seeds)", "alone (1 seed)"]
    zero, interval, dot, other_interval, other = axes.lines
    assert set(zero.get_xdata()) == {0}
    part = result.isel(column=1).sel({"method": "half"})
    assert dot.get_xdata()[0] == float(part["difference"])
    assert list(interval.get_xdata()) == [float(part["difference_low"]), float(part["difference_high"])]
    assert dot.get_color() == dot.get_markerfacecolor() == "#0072B2"
    assert other.get_color() == other_interval.get_color() == "#D55E00"
    result["difference_high"][1] = 0.5
    hollow = difference_figure(result).axes[0].lines[2]
    assert (hollow.get_color(), hollow.get_markerfacecolor()) == ("#777777", "white")


def test_difference_leaves_out_regions_that_were_not_compared(compared: xr.Dataset) -> None:
    result = paired_differences(compared)
    figure = difference_figure(result, metric="bmae")
    assert [axes.get_title() for axes in figure.axes] == ["all", "few"]
    assert figure.get_supxlabel() == "bMAE minus that of vanilla (years), 95 % interval; left of 0 is better"
    with pytest.raises(ValueError, match=r"regions must be some in which bmae was compared, got \['many'\]"):
        difference_figure(result, metric="bmae", regions=["many"])
    with pytest.raises(ValueError, match="metric must be one of 'mae', 'bmae', got 'rmse'"):
        difference_figure(result, metric="rmse")
    with pytest.raises(ResultsError, match="must be a result of paired_differences, got a dataset without difference"):
        difference_figure(compared)
    with pytest.raises(TypeError, match="regions must be a Sequence, got int"):
        difference_figure(result, regions=1)  # type: ignore[arg-type]


def test_difference_without_others_says_so(compared: xr.Dataset) -> None:
    figure = difference_figure(paired_differences(compared.sel({"method": ["vanilla", "constant"]})))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no completed run"]


def test_coverage_is_that_worked_out_by_hand(compared: xr.Dataset) -> None:
    # "half" errs |e| / 8 times 1.25 and 1.5, within 0.5: of 1 2 1 2 | 4 2 3 | 8 4 eighths those up to 3.2 and 2.67.
    # "alone" errs |e| / 2, within 1.
    figure = coverage_figure(compared)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["half (2 seeds)", "alone (1 seed)"]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_xticklabels()] == ["all", "many", "medium", "few"]
    assert [text.get_text() for text in left.texts] == [
        *("61 ± 8", "100 ± 0", "50 ± 24", "0 ± 0"),
        *("56", "100", "33", "0"),
    ]
    assert [text.get_text() for text in right.texts] == ["1.0"] * 4 + ["2.0"] * 4
    assert [axes.get_title() for axes in figure.axes] == ["samples inside (%), 75 intended", "mean width (years)"]
    shares = left.images[0]
    assert shares.get_array()[0].tolist() == pytest.approx([100 * 11 / 18, 100, 50, 0])
    red, _, blue = shares.cmap(shares.norm(75.0))[:3]
    assert (red, blue) == pytest.approx((1, 1), abs=0.01)  # as promised is white
    assert shares.cmap(shares.norm(50.0))[2] < 0.1  # too few inside is orange
    assert shares.cmap(shares.norm(100.0))[0] < 0.4  # too many are blue


def test_a_result_without_intervals_has_no_coverage_figure(compared: xr.Dataset, ds: xr.Dataset) -> None:
    with pytest.raises(ResultsError, match="coverage_figure: ds must be a result of methods that give intervals"):
        coverage_figure(ds)
    with pytest.raises(ResultsError, match="ds must hold intervals of some method, got NaN alone"):
        coverage_figure(compared.sel({"method": ["vanilla", "constant"]}))


def test_cost_is_that_worked_out_by_hand(compared: xr.Dataset) -> None:
    axes = cost_figure(compared, metric="mae").axes[0]
    dots = {
        tuple(np.round([line.get_xdata()[0], line.get_ydata()[0]], 6))
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }
    assert dots == {(4.0, 0.9375), (6.0, 0.515625)}
    assert [text.get_text() for text in axes.texts] == ["vanilla (3 seeds)", "half (2 seeds)"]
    assert "constant" not in " ".join(text.get_text() for text in axes.texts)
    assert axes.get_ylabel().startswith("MAE all (years)")
    assert axes.get_xlim()[0] == 0


def test_cost_refuses_what_it_cannot_show(compared: xr.Dataset, classes: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"cost_figure: metric must be one of 'bias', 'bmae', .* got 'minutes'"):
        cost_figure(compared, metric="minutes")
    with pytest.raises(ValueError, match=r"region must be one of 'all', .* got 'tail'"):
        cost_figure(compared, region="tail")
    with pytest.raises(ValueError, match="ds must have minutes and bmae in unseen of some method, got none"):
        cost_figure(compared, region="unseen")
    with pytest.raises(ValueError, match=r"colors\['half'\] must be a color"):
        cost_figure(compared, colors={"half": "blurple"})
    with pytest.raises(ResultsError, match="ds must be a result of regression"):
        cost_figure(classes)


def test_names_of_twenty_five_methods_never_overlap(crowd: xr.Dataset) -> None:
    cost = cost_figure(crowd)
    assert len(cost.axes[0].texts) == 25
    _assert_apart(cost, cost.axes[0].texts)
    for figure in (
        difference_figure(paired_differences(crowd, replicates=100)),
        coverage_figure(crowd),
        region_figure(crowd),
    ):
        titles = [axes.title for axes in figure.axes if axes.get_title()]
        groups = [axes.texts for axes in figure.axes if len(axes.texts) > 1] + [titles] * bool(titles)
        _assert_apart(figure, figure.axes[0].get_yticklabels(), *groups)
    two = cost.axes[0].texts[:2]
    two[1].xy = two[0].xy
    with pytest.raises(AssertionError):
        _assert_apart(cost, two)


def test_rows_of_regions_leave_the_constant_predictor_out(crowd: xr.Dataset, compared: xr.Dataset) -> None:
    assert len(region_figure(crowd).axes[0].get_yticklabels()) == 25
    bars = region_figure(compared)
    assert not any("constant" in text.get_text() for text in bars.legends[0].texts)
    assert bars.axes[0].texts[0].get_text().startswith("constant ")


@pytest.mark.parametrize(
    ("wanted", "gap", "expected"),
    [
        ([0.5], 0.1, [0.5]),
        ([0.1, 0.9], 0.2, [0.1, 0.9]),
        ([0.5, 0.5], 0.2, [0.4, 0.6]),
        ([0.0, 0.0, 0.05], 0.1, [0.0, 0.1, 0.2]),
        ([0.95, 1.0], 0.2, [0.8, 1.0]),
        ([0.2, 0.2, 0.2], 0.9, [0.0, 0.5, 1.0]),
    ],
)
def test_places_are_moved_apart_and_stay_near(wanted: list[float], gap: float, expected: list[float]) -> None:
    np.testing.assert_allclose(_apart(np.array(wanted), gap), expected, atol=1e-12)


def test_places_keep_order_and_gap_whatever_is_wanted() -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        places = _apart(np.sort(rng.beta(0.3, 2, n)), 0.03)
        assert places.min() >= 0
        assert places.max() <= 1 + 1e-12
        assert (np.diff(places) >= 0.03 - 1e-12).all()
