from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from dir_toolkit.experiment.results.drawing import figure_svg, save_figure
from dir_toolkit.experiment.results.selection_figures import tuning_figure
from dir_toolkit.experiment.training.selection import Selection, grid, successive_halving

VALUES = {
    "lr": (1e-4, 1e-3, 1e-2, 1e-1),
    "tau": (0, 0.5),
    "loss": ("ce", "k$l"),
    "fixed": (1,),
    "steps": (None, [1, 2]),
}


def search(values: dict[str, Any] | None = None, **options: Any) -> Selection:
    def run(candidate: dict[str, Any], budget: int, seed: int) -> float:
        if candidate.get("lr") == 1e-1:
            return math.nan
        return sum(i * len(str(value)) for i, value in enumerate(candidate.values())) + 1 / budget

    settings = {"reduction": 2, "budgets": (2, 4, 8), "say": None, **options}
    return successive_halving(grid(VALUES if values is None else values), run, **settings)


def test_it_is_drawn_labels_its_units_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figure = tuning_figure(search(), score_name="bMAE (years)", budget_name="epochs")
    assert type(figure) is Figure
    for kind in ("svg", "png"):
        save_figure(figure, tmp_path / f"tuning.{kind}", dpi=50)
        assert (tmp_path / f"tuning.{kind}").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before
    assert [axes.get_xlabel() for axes in figure.axes] == ["epochs", "lr", "tau", "loss", "steps"]
    assert figure.axes[0].get_ylabel() == "bMAE (years)"
    assert figure.axes[1].get_xscale() == "log"
    assert figure.axes[2].get_xscale() == "linear"
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["ce", r"k\$l"]


def test_each_candidate_stands_once_in_each_panel_where_its_score_is() -> None:
    selection = search()
    figure = tuning_figure(selection)
    curves = [selection.curve(i) for i in range(len(selection.candidates))]
    good = sorted(curve[-1][1] for curve in curves if not math.isnan(curve[-1][1]))
    for panel in figure.axes[1:]:
        dots = [line for line in panel.lines if line.get_marker() == "o"]
        assert sorted(line.get_ydata()[0] for line in dots) == good
        assert sum(line.get_marker() == "x" for line in panel.lines) == len(curves) - len(good)
    best = figure.axes[2].lines[-1]  # drawn last, so that no other hides it
    assert best.get_xdata()[0] == selection.best["tau"]
    assert best.get_ydata()[0] == selection.best_score


def test_the_legend_names_the_best_and_what_is_shown() -> None:
    def legend(selection: Selection) -> list[str]:
        return [text.get_text() for text in tuning_figure(selection, budget_name="epochs").legends[0].get_texts()]

    texts = legend(search())
    assert texts[0].startswith("best: lr ")
    assert texts[1:] == ["epochs reached: 2", "epochs reached: 4", "epochs reached: 8", "failed"]
    assert legend(search({"tau": (0, 1)}, budgets=(3,))) == ["best: tau 0", "epochs reached: 3"]
    assert legend(search({"a" * 90: (0, 1)}))[0].endswith("…")


@pytest.mark.parametrize("values", [{}, {"tau": (0,)}, {"tau": (0, 1)}, {f"s{i}": (0, i + 1) for i in range(5)}])
def test_any_number_of_settings(values: dict[str, Any]) -> None:
    figure = tuning_figure(search(values, minimize=False))
    assert len(figure.axes) == 1 + sum(len(found) > 1 for found in values.values())
    figure_svg(figure)


def test_equal_searches_give_equal_bytes() -> None:
    assert figure_svg(tuning_figure(search())) == figure_svg(tuning_figure(search()))
    assert figure_svg(tuning_figure(search())) != figure_svg(tuning_figure(search(minimize=False)))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="tuning_figure: selection must be a Selection, got list"):
        tuning_figure([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="score_name must be a str"):
        tuning_figure(search(), score_name=None)  # type: ignore[arg-type]
