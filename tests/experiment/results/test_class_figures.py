from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from dir_toolkit.errors import ResultsError, ShapeError
from dir_toolkit.experiment.results.class_figures import class_error_figure, tau_figure
from dir_toolkit.experiment.results.digit_figures import (
    bar_figure,
    feature_space_figure,
    norms_figure,
    reliability_figure,
    study_figure,
)
from dir_toolkit.experiment.results.drawing import figure_svg, method_colors, save_figure
from dir_toolkit.experiment.results.figures import region_figure
from dir_toolkit.metrics.reliability import CalibrationMetrics

ClassRun = Callable[[list[int]], xr.Dataset]
Combine = Callable[..., xr.Dataset]
NAN = float("nan")
STUDY = {"softmax": {1.0: [0.1, 0.2], 0.25: [0.5, 0.25]}, "affinity": {1.0: [0.1, NAN], 0.25: [0.125, 0.125]}}
CURVE = {"confidence": [NAN, 0.375, 0.75, 1.0], "accuracy": [NAN, 0.5, 0.75, 0.75], "count": [0, 2, 4, 2]}
COUNTS = [10, 1000, 100]


def _panels() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 2)), np.arange(30) % 3
    return {
        "softmax": (features, labels, None, None),
        "centers": (features, labels, features[:3], None),
        "affinity": (features + 9, labels, features[:6], [0, 0, 1, 1, 2, 2]),
    }


def _all(classes: xr.Dataset) -> dict[str, Figure]:
    return {
        "class": class_error_figure(classes),
        "study": study_figure(STUDY, xlabel="share kept", ylabel="balanced error"),
        "bars": bar_figure({"l2, Gaussian": [0.1, 0.2], "l1, Gaussian": [0.9]}, ylabel="balanced error"),
        "space": feature_space_figure(_panels()),
        "tau": tau_figure({0: ([0, 1, 2], [0.3, 0.1, 0.2])}, {0: 1.0}, ylabel="balanced error"),
        "norms": norms_figure({"softmax": [1, 3, 2]}, COUNTS),
        "reliability": reliability_figure({"softmax": CURVE}),
    }


def _texts(figure: Figure) -> str:
    texts = [figure.get_supxlabel(), figure.get_supylabel()]
    return "\n".join(texts + [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())])


def _legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_figure_is_drawn_labels_its_units_and_leaves_matplotlib_alone(
    classes: xr.Dataset, tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    for name, figure in _all(classes).items():
        assert type(figure) is Figure
        assert "(%)" in _texts(figure) or "(dimensionless)" in _texts(figure), name
        for axes in figure.axes:
            assert axes.get_legend() is None  # legends stand outside
        for kind in ("svg", "png"):
            save_figure(figure, tmp_path / f"{name}.{kind}", dpi=50)
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


def test_class_errors_are_those_worked_out_by_hand(classes: xr.Dataset) -> None:
    figure = class_error_figure(classes, class_names=["zero", "one", "two", "$3$", "four"])
    top, below = figure.axes
    assert _legend(figure) == ["softmax (2 seeds)", "adjusted (1 seed)"]
    first, second = (container.lines[0].get_ydata() for container in top.containers)
    np.testing.assert_allclose(first, [0, 50, 75, NAN, NAN])
    np.testing.assert_allclose(second, [25, 100 / 3, 50, NAN, NAN])
    whisker = top.containers[0].lines[2][0].get_segments()[1][:, 1]  # 1/3 and 2/3 wrong: sd 1/(3 sqrt(2))
    np.testing.assert_allclose(whisker, [50 - 100 / 18**0.5, 50 + 100 / 18**0.5])
    assert len(top.containers[1].lines[2]) == 0  # one seed has no whiskers
    assert [label.get_text() for label in below.get_xticklabels()] == ["zero", "one", "two", r"\$3\$", "four"]
    np.testing.assert_array_equal(below.patches[0].get_data().values, [300, 50, 5, 0.6, 0.6])
    assert "log scale" in below.get_ylabel()


def test_many_methods_are_a_heat_map(class_run: ClassRun, combine: Combine) -> None:
    runs = {(f"m{i}", s): class_run([4 - i % 2, 2 - s, 0]) for i in range(16) for s in (0, 1)}
    top, below, bar = class_error_figure(combine(runs)).axes
    shown = top.images[0].get_array()
    assert shown.shape == (16, 5)
    np.testing.assert_allclose(np.asarray(shown)[1, :3], [25, 50, 100])
    assert [label.get_text() for label in top.get_yticklabels()] == [f"m{i}" for i in range(16)]
    texts = [text.get_text() for text in top.texts]
    assert texts[:3] == ["0.0\n±0.0", "50.0\n±23.6", "100.0\n±0.0"]
    assert len(texts) == 16 * 3  # none for classes without test samples
    assert bar.get_ylabel() == "error (%)\nmean ± sd"
    assert len(below.patches) == 1


def test_class_error_of_the_constant_predictor_alone_is_drawn(class_run: ClassRun, combine: Combine) -> None:
    figure = class_error_figure(combine({("constant", 0): class_run([4, 0, 0])}))
    assert _legend(figure) == ["constant (1 seed)"]


def test_without_a_completed_run_the_picture_says_so(class_run: ClassRun, combine: Combine) -> None:
    ds = combine({("a", 0): class_run([4, 2, 0]), ("b", 1): class_run([4, 2, 0])}).isel({"seed": [1], "method": [0]})
    for figure in (class_error_figure(ds), region_figure(ds)):
        assert [text.get_text() for text in figure.axes[0].texts] == ["no completed run"]
        assert figure_svg(figure)


def test_dots_at_the_ends_are_seen_whole_and_whiskers_end_there(class_run: ClassRun, combine: Combine) -> None:
    top = class_error_figure(combine({("a", s): class_run([4, 0, 2 * s]) for s in (0, 1)})).axes[0]
    dots, caps, (whiskers,) = top.containers[0].lines
    np.testing.assert_allclose(dots.get_ydata()[:3], [0, 100, 50])
    assert top.get_ylim() == (0, 100)
    reach = whiskers.get_segments()[2][:, 1]
    assert reach.min() < 0
    assert reach.max() > 100
    assert all(part.get_clip_on() for part in (whiskers, *caps))
    assert not dots.get_clip_on()
    assert dots.get_zorder() > top.spines["bottom"].get_zorder()


def test_shares_start_at_zero_where_a_spread_reaches_below(class_run: ClassRun, combine: Combine) -> None:
    values = [0.0, 0.1]  # mean 5 %, sd 7.1 %
    runs = {("a", s): class_run([4 - s, 3, 2]) for s in (0, 1)}
    for figure in (
        bar_figure({"a": values}, ylabel="error"),
        study_figure({"a": {1: values}}, xlabel="x", ylabel="error"),
        region_figure(combine(runs)),
    ):
        assert figure.axes[0].get_ylim()[0] == 0
    loss = bar_figure({"a": values}, ylabel="loss difference (nats)", percent=False)
    assert loss.axes[0].get_ylim()[0] < 0


def test_class_error_refuses_other_results_and_names(classes: xr.Dataset, ds: xr.Dataset) -> None:
    said = "class_error_figure: ds must be a result of classification, got one without 'bin_recall'"
    with pytest.raises(ResultsError, match=said):
        class_error_figure(ds)
    with pytest.raises(TypeError, match=r"ds must be a Dataset"):
        class_error_figure("results.nc")  # type: ignore[arg-type]
    for names, got in ((["a"], "got 1 names"), ("abcde", "got 'abcde'")):
        with pytest.raises(ValueError, match=f"class_names must be one name per class, 5 of them, {got}"):
            class_error_figure(classes, class_names=names)


DRAWN: dict[str, Callable[..., Figure]] = {
    "study": lambda **more: study_figure(STUDY, **{"xlabel": "x", "ylabel": "y", **more}),
    "bar": lambda **more: bar_figure({"a": [0.1]}, **{"ylabel": "y", **more}),
    "tau": lambda **more: tau_figure({"a": ([0, 1], [1, 2])}, {"a": 1}, **{"ylabel": "y", **more}),
    "norms": lambda **more: norms_figure({"a": [1, 2, 3]}, COUNTS, **more),
    "reliability": lambda **more: reliability_figure({"a": CURVE}, **more),
    "feature_space": lambda **more: feature_space_figure(_panels(), **more),
}


@pytest.mark.parametrize("name", ["study", "bar", "tau", "norms", "reliability"])
def test_what_is_no_color_is_refused(name: str) -> None:
    said = rf"{name}_figure: colors\['a'\] must be a color, got 'nocolor'\. Use a hex code"
    with pytest.raises(ValueError, match=said):
        DRAWN[name](colors={"a": "nocolor"})
    with pytest.raises(TypeError, match="colors must be a Mapping, got str"):
        DRAWN[name](colors="red")
    assert DRAWN[name](colors={"a": "tab:red", "b": "C0"}).axes


def test_what_is_no_color_is_refused_for_a_result_too(classes: xr.Dataset) -> None:
    for draw in (class_error_figure, region_figure):
        with pytest.raises(ValueError, match=rf"{draw.__name__}: colors\['a'\] must be a color, got 3"):
            draw(classes, colors={"a": 3})  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "argument"), [("study", "xlabel"), ("study", "ylabel"), ("bar", "ylabel"), ("tau", "ylabel")]
)
def test_labels_of_axes_that_are_no_text_are_refused(name: str, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{name}_figure: {argument} must be a str, got int"):
        DRAWN[name](**{argument: 3})


@pytest.mark.parametrize("name", ["norms", "feature_space"])
def test_class_names_that_are_no_texts_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}_figure: class_names must be a Sequence, got int"):
        DRAWN[name](class_names=5)
    with pytest.raises(TypeError, match=rf"{name}_figure: class_names\[1\] must be a str, got int"):
        DRAWN[name](class_names=["a", 1, "c"])


def test_names_that_are_no_texts_are_refused() -> None:
    for draw, where in (
        (lambda: bar_figure({1: [0.1]}, ylabel="y"), "bar_figure: the name 1 in values"),  # type: ignore[dict-item]
        (lambda: study_figure({1: {1: [0.1]}}, xlabel="x", ylabel="y"), "study_figure: the name 1 in curves"),  # type: ignore[dict-item]
        (lambda: norms_figure({1: [1, 2, 3]}, COUNTS), "norms_figure: the name 1 in norms"),  # type: ignore[dict-item]
        (lambda: reliability_figure({1: CURVE}), "reliability_figure: the name 1 in curves"),  # type: ignore[dict-item]
        (lambda: feature_space_figure({1: _panels()["softmax"]}), "feature_space_figure: the name 1 in panels"),  # type: ignore[dict-item]
    ):
        with pytest.raises(TypeError, match=f"{where} must be a str, got int"):
            draw()


def test_colours_can_be_handed_over(classes: xr.Dataset) -> None:
    top = class_error_figure(classes, colors={"adjusted": "#000002"}).axes[0]
    usual = method_colors(["softmax"])["softmax"]
    assert [container.lines[0].get_color() for container in top.containers] == [usual, "#000002"]
    study = study_figure(STUDY, xlabel="x", ylabel="y", colors={"affinity": "#000002"}).axes[0]
    assert [line.get_color() for line in study.lines] == [usual, "#000002"]


def test_the_study_figure_is_that_worked_out_by_hand() -> None:
    figure = study_figure(STUDY, xlabel="share kept (dimensionless)", ylabel="balanced error")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0.25, 1.0])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [37.5, 15])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [12.5, 10])
    band = axes.collections[0].get_paths()[0].vertices
    here = band[band[:, 0] == 0.25, 1]  # 50 and 25: sd 25 / sqrt(2)
    assert [here.min(), here.max()] == pytest.approx([37.5 - 25 / 2**0.5, 37.5 + 25 / 2**0.5])
    assert _legend(figure) == ["softmax (2 seeds)", "affinity (1 to 2 seeds)"]
    assert axes.get_xticks().tolist() == [0.25, 1.0]
    assert axes.get_ylabel() == "balanced error (%)\nmean ± sd over seeds"
    assert axes.get_ylim()[0] >= 0


def test_study_in_other_units_and_on_a_log_scale() -> None:
    curves = {"affinity": {0.1: [3.0], 10: [2.0], 1: [1.0]}}
    axes = study_figure(curves, xlabel="σ", ylabel="log loss (nats)", log_x=True, percent=False).axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "1", "10"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3, 1, 2])
    assert axes.get_ylabel() == "log loss (nats)"


def test_numbers_that_would_run_into_each_other_are_left_out() -> None:
    axes = study_figure({"a": {x: [0.5] for x in (0.01, 0.02, 1)}}, xlabel="x", ylabel="y").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.01", "", "1"]


@pytest.mark.parametrize(
    ("curves", "log_x", "error", "said"),
    [
        ({}, False, ValueError, "study_figure: curves must hold at least one entry, got none"),
        ({"a": {}}, False, ValueError, r"curves\['a'\] must hold at least one entry"),
        ([], False, TypeError, "curves must be a Mapping, got list"),
        ({"a": {0: [0.5]}}, True, ValueError, "a varied value must be > 0, got 0"),
        ({"a": {NAN: [0.5]}}, False, ValueError, "a varied value must be finite, got nan"),
        ({"a": {"x": [0.5]}}, False, TypeError, "a varied value must be a number, got 'x'"),
        ({"a": {1: 0.5}}, False, ShapeError, r"curves\['a'\]\[1\] must be one number per seed, shape \(S,\), got \(\)"),
        ({"a": {1: []}}, False, ShapeError, r"must be one number per seed, shape \(S,\), got \(0,\)"),
        ({"a": {1: [np.inf]}}, False, ValueError, r"curves\['a'\]\[1\] must be finite or NaN, got \[inf\]"),
        ({"a": {1: ["x"]}}, False, TypeError, r"curves\['a'\]\[1\] must be integers or floats"),
    ],
)
def test_the_study_figure_refuses_wrong_arguments(curves: Any, log_x: bool, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        study_figure(curves, xlabel="x", ylabel="y", log_x=log_x)


def test_bars_are_those_worked_out_by_hand() -> None:
    axes = bar_figure({"a": [0.1, 0.2], "b": [0.5], "c": [NAN]}, ylabel="error").axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [15, 50, NAN])
    assert [text.get_text() for text in axes.texts] == ["15", "50"]
    np.testing.assert_allclose(axes.collections[-1].get_offsets()[:, 1], [10, 20])
    assert axes.get_ylabel() == "error (%)\nmean ± sd, one dot per seed"
    one = bar_figure({"a": [3.0]}, ylabel="log loss (nats)", percent=False).axes[0]
    assert one.patches[0].get_height() == 3
    assert one.get_ylabel() == "log loss (nats)"
    with pytest.raises(ValueError, match="bar_figure: values must hold at least one entry"):
        bar_figure({}, ylabel="error")
    with pytest.raises(ShapeError, match=r"values\['a'\] must be one number per seed"):
        bar_figure({"a": [[1.0]]}, ylabel="error")  # type: ignore[list-item]


def test_the_feature_space_is_that_worked_out_by_hand() -> None:
    figure = feature_space_figure(_panels(), class_names=["zero", "one", "two"])
    assert [axes.get_title() for axes in figure.axes] == ["softmax", "centers", "affinity"]
    assert all(axes.get_aspect() == 1 for axes in figure.axes)
    assert [len(axes.collections) for axes in figure.axes] == [3, 4, 4]
    features, labels, _, _ = _panels()["softmax"]
    np.testing.assert_array_equal(figure.axes[0].collections[1].get_offsets(), features[labels == 1])
    white, owned = (figure.axes[i].collections[-1].get_facecolors() for i in (1, 2))
    np.testing.assert_array_equal(white, np.ones((1, 4)) if len(white) == 1 else np.ones((3, 4)))
    dots = [collection.get_facecolors()[0, :3] for collection in figure.axes[2].collections[:3]]
    np.testing.assert_allclose(owned[:, :3], np.repeat(dots, 2, axis=0))
    assert _legend(figure) == ["zero", "one", "two", "prototype"]


def test_classes_beyond_ten_have_another_marker() -> None:
    figure = feature_space_figure({"a": (np.zeros((20, 2)), np.arange(20), None, None)})
    handles = figure.legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20


def test_only_classes_that_are_there_are_named() -> None:
    figure = feature_space_figure({"a": (np.zeros((2, 2)), [3, 10**9], np.zeros((1, 2)), [10**12])})
    assert _legend(figure) == ["3", "1000000000", "1000000000000", "prototype"]
    with pytest.raises(ValueError, match="at least 1000000001 of them, got 1 names"):
        feature_space_figure({"a": (np.zeros((1, 2)), [10**9], None, None)}, class_names=["x"])


def test_a_legend_of_many_classes_is_cut() -> None:
    features = np.stack([np.arange(1200), np.zeros(1200)], axis=1)
    figure = feature_space_figure({"a": (features, np.arange(1200), None, None)})
    assert _legend(figure) == [*map(str, range(20)), "and 1,180 more"]
    drawn = figure.axes[0].collections
    assert len(drawn) == 100  # looks
    assert sorted(x for dots in drawn for x in dots.get_offsets()[:, 0]) == list(range(1200))
    twenty = feature_space_figure({"a": (features[:20], np.arange(20), None, None)})
    assert _legend(twenty) == [*map(str, range(20))]


def test_feature_space_takes_tensors_and_no_samples() -> None:
    z = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    figure = feature_space_figure({"a": (z, torch.tensor([0, 1]), None, None)})  # type: ignore[dict-item]
    assert _legend(figure) == ["0", "1"]
    assert feature_space_figure({"a": (np.zeros((0, 2)), np.zeros(0, dtype=int), None, None)}).axes


@pytest.mark.parametrize(
    ("panel", "error", "said"),
    [
        ((np.zeros((3, 3)), [0, 1, 2], None, None), ShapeError, r"features must have the shape \(N, 2\), got \(3, 3\)"),
        ((np.zeros((3, 2)), [0, 1], None, None), ShapeError, r"one label per point, shape \(3,\), got \(2,\)"),
        ((np.zeros((1, 2)), [0.0], None, None), ValueError, "must be class indices, whole numbers from 0"),
        ((np.zeros((1, 2)), [-1], None, None), ValueError, "must be class indices, .* minimum -1"),
        ((np.zeros((1, 2)), [0], None, [0]), ValueError, "must have prototypes for prototype labels"),
        ((np.zeros((1, 2)), [0], np.zeros(2), None), ShapeError, r"prototypes must have the shape \(N, 2\)"),
        ((np.zeros((1, 2)), [0]), TypeError, r"panels\['a'\] must be \(features, labels"),
        (
            (np.zeros((1, 2)), [2], None, None),
            ValueError,
            "class_names must be one name per class, at least 3 of them, got 2 names",
        ),
        ((np.full((1, 2), np.nan), [0], None, None), ValueError, "features must be finite"),
    ],
)
def test_the_feature_space_refuses_wrong_arguments(panel: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        feature_space_figure({"a": panel}, class_names=["x", "y"])


def test_the_tau_figure_is_that_worked_out_by_hand() -> None:
    curves = {"balanced error": ([2, 0, 1], [0.2, 0.4, 0.1]), "ECE": ([0, 1, 2], [0.3, 0.2, 0.4])}
    figure = tau_figure(curves, {"balanced error": 0.5, "ECE": 1}, ylabel="score")
    axes = figure.axes[0]
    assert _legend(figure) == ["balanced error: τ = 0.5", "ECE: τ = 1"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [40, 10, 20])
    dot = axes.lines[2]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == pytest.approx((0.5, 25))  # between those tried
    assert [text.get_text() for text in axes.texts] == ["unadjusted", "consistent"]
    plain = tau_figure({0: ([0, 1], [3.0, 2.0])}, {0: 1}, ylabel="log loss (nats)", percent=False).axes[0]
    np.testing.assert_array_equal(plain.lines[0].get_ydata(), [3, 2])


def test_curves_of_tau_in_one_color_differ_in_their_dashes() -> None:
    curves = {name: ([0, 1], [3.0, 2.0]) for name in ("a, bMAE", "a, MAE", "b, bMAE")}
    axes = tau_figure(
        curves, dict.fromkeys(curves, 1), ylabel="y", colors={"a, bMAE": "red", "a, MAE": "red", "b, bMAE": "blue"}
    ).axes[0]
    drawn = [(line.get_color(), line.get_linestyle()) for line in axes.lines if list(line.get_ydata()) == [300, 200]]
    assert drawn == [("red", "-"), ("red", "--"), ("blue", "-")]


@pytest.mark.parametrize(
    ("curves", "chosen", "error", "said"),
    [
        ({}, {}, ValueError, "tau_figure: curves must hold at least one entry"),
        ({"a": ([0], [1])}, {"b": 1}, ValueError, r"chosen must have the names \['a'\], got \['b'\]"),
        (
            {"a": ([0, 1], [1])},
            {"a": 1},
            ShapeError,
            r"must be τ and scores of one shape \(K,\), got \(2,\) and \(1,\)",
        ),
        ({"a": [0, 1, 2]}, {"a": 1}, TypeError, r"curves\['a'\] must be a pair of τ and scores, got list"),
        ({"a": ([NAN], [1])}, {"a": 1}, ValueError, r"curves\['a'\] τ must be finite, got nan at index \[0\]"),
        ({"a": ([0], [np.inf])}, {"a": 1}, ValueError, r"curves\['a'\] scores must be finite, got inf"),
        ({"a": ([0], [1])}, {"a": NAN}, ValueError, r"chosen\['a'\] must be finite, got nan"),
    ],
)
def test_the_tau_figure_refuses_wrong_arguments(curves: Any, chosen: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tau_figure(curves, chosen, ylabel="score")


def test_norms_are_those_worked_out_by_hand() -> None:
    figure = norms_figure({"softmax": [1, 3, 2], "even": [[2, 2, 2], [5, 5, 5]]}, COUNTS, class_names=["a", "b", "c"])
    top, below = figure.axes
    np.testing.assert_allclose(top.lines[1].get_ydata(), [1.5, 1, 0.5])  # classes b, c, a
    np.testing.assert_allclose(top.lines[2].get_ydata(), [1, 1, 1])
    assert _legend(figure) == ["softmax (r = 1.00)", "even (r undefined)"]
    assert [label.get_text() for label in below.get_xticklabels()] == ["b", "c", "a"]
    np.testing.assert_array_equal(below.patches[0].get_data().values, [1000, 100, 10])
    assert "mean ± sd over seeds" in top.get_ylabel()


def test_correlation_of_norms_leaves_out_classes_without_samples() -> None:
    norms = np.array([0.1, 3.0, 2.0, 2.5, 9.0])
    counts = np.array([10, 1000, 100, 50, 0])
    said = _legend(norms_figure({"a": norms}, counts))[0]
    logs = np.log(counts[:4])
    x, y = norms[:4] - norms[:4].mean(), logs - logs.mean()
    assert said == f"a (r = {(x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()):.2f})"
    assert _legend(norms_figure({"a": [1.0]}, [5]))[0] == "a (r undefined)"
    assert _legend(norms_figure({"a": [1.0, 2.0]}, [0, 0]))[0] == "a (r undefined)"


@pytest.mark.parametrize(
    ("norms", "counts", "error", "said"),
    [
        ({}, COUNTS, ValueError, "norms_figure: norms must hold at least one entry"),
        ({"a": [1, 2]}, COUNTS, ShapeError, r"norms\['a'\] must have the shape \(3,\) or \(S, 3\), got \(1, 2\)"),
        ({"a": [1, 2, NAN]}, COUNTS, ValueError, r"norms\['a'\] must be finite, not negative, and not all 0"),
        ({"a": [0, 0, 0]}, COUNTS, ValueError, "not all 0"),
        ({"a": [1, 2, -1]}, COUNTS, ValueError, "not negative"),
        ({"a": [1, 2, 3]}, [1, 2, -3], ValueError, "counts must be finite and not negative"),
        ({"a": [1, 2, 3]}, [[1, 2, 3]], ShapeError, r"counts must be one number per class, shape \(C,\), got \(1, 3\)"),
    ],
)
def test_norms_that_do_not_fit_are_refused(norms: Any, counts: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        norms_figure(norms, counts)


def test_reliability_is_that_worked_out_by_hand() -> None:
    figure = reliability_figure({"softmax": CURVE})
    top, below = figure.axes
    # Two samples 0.125 off and two 0.25 off, of eight.
    assert _legend(figure) == ["softmax (ECE 9.38 %)"]
    np.testing.assert_allclose(top.lines[0].get_ydata(), [0, 100])
    np.testing.assert_allclose(top.lines[1].get_xdata(), [37.5, 75, 100])
    np.testing.assert_allclose(top.lines[1].get_ydata(), [50, 75, 75])
    np.testing.assert_allclose(below.patches[0].get_data().values, [0, 25, 50, 25])
    np.testing.assert_allclose(below.patches[0].get_data().edges, [0, 25, 50, 75, 100])


def test_reliability_draws_what_the_metrics_give() -> None:
    metrics = CalibrationMetrics(3)
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metrics.update(logits.softmax(1), torch.arange(200) % 3)
    ece = metrics.compute()["ece"].item()
    assert _legend(reliability_figure({"a": metrics.reliability()})) == [f"a (ECE {100 * ece:.2f} %)"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"count": [0, 0, 0, 0]}, ValueError, "count of 'a' must be finite, not negative, and above 0 somewhere"),
        ({"count": [1, 2]}, ShapeError, r"must have parts of one shape \(K,\), got \(4,\) and \(4,\) and \(2,\)"),
        ({"accuracy": [NAN, 50, 75, 75]}, ValueError, r"accuracy of 'a' must lie in \[0, 1\] where there are samples"),
        ({"count": [1, 2, 4, 2]}, ValueError, r"confidence of 'a' must lie in \[0, 1\]"),
    ],
)
def test_the_reliability_diagram_refuses_wrong_arguments(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        reliability_figure({"a": {**CURVE, **change}})
    with pytest.raises(ValueError, match=r"curves\['a'\] must have confidence, accuracy and count, got no 'count'"):
        reliability_figure({"a": {"confidence": [1.0], "accuracy": [1.0]}})


def test_svg_is_the_same_each_time_and_dots_are_an_image() -> None:
    svg = figure_svg(feature_space_figure(_panels()), name="one")
    assert svg == figure_svg(feature_space_figure(_panels()), name="one")
    assert "data:image/png;base64" in svg


def test_hostile_names_are_drawn_as_text() -> None:
    name = '$a_b$ <script> --> " id="x'
    for figure in (
        study_figure({name: {1: [0.5]}}, xlabel="$x$", ylabel="$"),
        bar_figure({name: [0.5]}, ylabel="$"),
        feature_space_figure({name: (np.zeros((1, 2)), [0], None, None)}, class_names=[name]),
        tau_figure({name: ([0, 1], [1, 2])}, {name: 1}, ylabel="$"),
        norms_figure({name: [1, 2, 3]}, COUNTS, class_names=[name] * 3),
        reliability_figure({name: CURVE}),
    ):
        svg = figure_svg(figure)
        assert "<script>" not in svg
        assert "$a_b$" in svg
