"""Predictions against labels, and a few examples."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
import xarray as xr

from dir_toolkit.errors import ResultsError, ShapeError
from dir_toolkit.experiment.results.drawing import method_colors
from dir_toolkit.experiment.results.sample_figures import example_samples, examples_figure, prediction_figure


def test_predictions_are_those_of_the_first_seed_and_the_line_is_their_mean(
    predicted: Callable[..., xr.Dataset], combine: Callable[..., xr.Dataset]
) -> None:
    target = np.repeat(np.arange(12) * 0.25 + 0.05, 5)  # five samples per stretch, but for the last label alone
    runs = {("plain", s): predicted(target, target + 1 + s) for s in (0, 1)}
    runs |= {("late", 1): predicted(target, 2 * target), ("constant", 0): predicted(target, np.full(60, 1.0))}
    before = dict(matplotlib.rcParams)
    figure = prediction_figure(combine(runs), colors={"late": "#000002"})
    assert dict(matplotlib.rcParams) == before
    plain, late = figure.axes
    assert [plain.get_title(), late.get_title()] == ["plain", "late"]
    np.testing.assert_allclose(plain.collections[0].get_offsets(), np.stack([target, target + 1], 1), rtol=1e-6)
    diagonal, mean = plain.lines
    assert diagonal.get_slope() == 1
    np.testing.assert_allclose(mean.get_ydata(), np.unique(target) + 1, rtol=1e-6)
    np.testing.assert_allclose(late.collections[0].get_facecolor()[0][:3], [0, 0, 2 / 255])
    assert figure.get_supxlabel() == "true age (years)"


def test_examples_are_chosen_by_label_alone(compared: xr.Dataset) -> None:
    # few: labels 2.5 and 2.25 at positions 7 and 8; many: 0.25, 0.5, 0.5, 0.75 at 1, 0, 3, 2
    assert example_samples(compared).tolist() == [8, 7, 1, 3, 2]
    assert example_samples(compared.sel({"method": ["plain", "half"]})).tolist() == [8, 7, 1, 3, 2]
    unseen = compared.assign_coords(bin_region=("bin", np.array(["unseen"] * 5)))
    assert example_samples(unseen).tolist() == []
    with pytest.raises(ResultsError, match="examples_figure: ds must hold test samples of trained labels"):
        examples_figure(unseen)


def test_examples_show_truth_predictions_and_intervals(compared: xr.Dataset) -> None:
    images = np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2)
    figure = examples_figure(compared, images)
    *pictures, axes = figure.axes
    assert len(pictures) == 5
    np.testing.assert_array_equal(pictures[1].images[0].get_array(), images[1].transpose(1, 2, 0))
    assert [text.get_text() for text in axes.get_xticklabels()][:3] == ["few: 2.25", "few: 2.5", "many: 0.25"]
    names = ["true age", "vanilla", "half", "alone"]  # "plain" has no predictions
    assert [text.get_text() for text in figure.legends[0].texts] == names
    half = axes.containers[1].lines
    chosen = compared.sel({"method": "half", "seed": 1}).isel(sample=example_samples(compared))
    np.testing.assert_allclose(half[0].get_ydata(), chosen["prediction"])
    ends = np.array([segment[:, 1] for segment in half[2][0].get_segments()])
    np.testing.assert_allclose(ends, np.stack([chosen["lower"], chosen["upper"]], 1), rtol=1e-6)
    assert half[0].get_color() == method_colors(compared["method"].values)["half"]
    assert axes.get_ylabel() == "age (years)\nwhiskers: 75 % interval"


def test_what_does_not_fit_is_refused(compared: xr.Dataset, ds: xr.Dataset) -> None:
    for draw in (prediction_figure, examples_figure, example_samples):
        with pytest.raises(ResultsError, match=r"ds must be a result of regression that holds predictions, got one w"):
            draw(ds)  # type: ignore[operator]
    for draw in (prediction_figure, examples_figure):
        with pytest.raises(ValueError, match=rf"{draw.__name__}: colors\['a'\] must be a color, got 3"):
            draw(compared, colors={"a": 3})  # type: ignore[operator]
    with pytest.raises(TypeError, match="examples_figure: images must be a ndarray, got str"):
        examples_figure(compared, "faces")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"images must be one picture \(1 or 3, H, W\) per example, 5 of them, got"):
        examples_figure(compared, np.zeros((4, 3, 2, 2), np.uint8))
