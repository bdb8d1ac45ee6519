from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from dir_toolkit.experiment.results import drawing
from dir_toolkit.experiment.results.drawing import figure_svg, figure_to_tensorboard, method_colors, save_figure
from dir_toolkit.experiment.results.figures import error_figure, region_figure


def test_a_method_has_one_colour_wherever_it_stands() -> None:
    colors = method_colors(["vanilla", "constant", "lds"])
    assert colors == method_colors(["constant", "vanilla", "lds"])
    assert len(set(method_colors(map(str, range(10))).values())) == 11


def test_svg_is_the_same_each_time_and_ids_carry_the_name(ds: xr.Dataset) -> None:
    svg = figure_svg(error_figure(ds), name="one")
    assert svg == figure_svg(error_figure(ds), name="one")
    assert svg.startswith("<svg")
    assert 'id="one-figure_1"' in svg
    assert "<metadata" not in svg
    assert set(_ids(svg)).isdisjoint(_ids(figure_svg(error_figure(ds), name="two")))


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_a_figure_is_saved_as_matplotlib_would_and_is_left_as_it_was(ds: xr.Dataset, tmp_path: Path, kind: str) -> None:
    figure, same = region_figure(ds), region_figure(ds)
    engine, dpi = figure.get_layout_engine(), figure.dpi
    save_figure(figure, tmp_path / f"one.{kind}", dpi=50)
    assert figure.get_layout_engine() is engine
    assert figure.dpi == dpi
    if kind == "png":
        same.savefig(tmp_path / "two.png", dpi=50)
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def _ids(svg: str) -> list[str]:
    return [part.split('"')[0] for part in svg.split(' id="')[1:]]


def test_tensorboard_gets_the_picture(ds: xr.Dataset, tmp_path: Path) -> None:
    added: list[tuple[Any, ...]] = []

    class Writer:
        def add_image(self, tag: str, image: np.ndarray, step: int, *, dataformats: str) -> None:
            added.append((tag, image, step, dataformats))

    save_figure(region_figure(ds), tmp_path / "region.png")
    figure_to_tensorboard(Writer(), "figures/region", tmp_path / "region.png", 3)
    tag, image, step, dataformats = added[0]
    assert (tag, step, dataformats) == ("figures/region", 3, "HWC")
    assert image.shape == (340, 700, 3)
    assert image.dtype == np.uint8
    assert image.min() < 100 < image.max() == 255


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svg"
    path.write_text("old")

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("cannot draw")

    monkeypatch.setattr(drawing, "figure_svg", fail)
    with pytest.raises(RuntimeError, match="cannot draw"):
        save_figure(Figure(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]
