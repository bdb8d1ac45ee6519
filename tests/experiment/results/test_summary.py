from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import xarray as xr
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dir_toolkit as dt
from dir_toolkit.errors import ResultsError
from dir_toolkit.experiment.results import summary
from dir_toolkit.experiment.results.comparison import comparison_table, differences_csv, paired_differences
from dir_toolkit.experiment.results.figures import region_figure
from dir_toolkit.experiment.results.headline import headline
from dir_toolkit.experiment.results.schema import load_results
from dir_toolkit.experiment.results.summary import write_comparison, write_summary
from dir_toolkit.experiment.results.tables import as_markdown, results_table

TITLE = "Error by region (lds+fds)"
NAME = "error-by-region--lds-fds-"


def files(folder: Path) -> set[str]:
    """All of them, TensorBoard's under one name."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"events" if name.startswith("events.out.tfevents.") else name for name in names}


def figures(ds: xr.Dataset) -> dict[str, Figure]:
    return {TITLE: region_figure(ds)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are saved with few dots, which is faster."""
    monkeypatch.setattr(summary, "save_figure", partial(summary.save_figure, dpi=40))


def test_everything_lands_in_one_folder(tmp_path: Path, ds: xr.Dataset) -> None:
    write_summary(tmp_path, ds, figures(ds), notes=["A note."], settings={"epochs": 7}, columns=[("bmae", "few")])
    assert files(tmp_path) == {"results.nc", "table.md", "report.html", f"figures/{NAME}.png", "events"}
    assert load_results(tmp_path / "results.nc")["mae"].equals(ds["mae"])
    table = (tmp_path / "table.md").read_text()
    assert table == as_markdown(results_table(ds, columns=[("bmae", "few")]))
    page = (tmp_path / "report.html").read_text()
    for part in ("A note.", "epochs", TITLE, "bMAE few", ds.attrs["command"]):
        assert part in page
    assert "MAE many" not in page
    assert (tmp_path / f"figures/{NAME}.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_shows_table_and_figures(tmp_path: Path, ds: xr.Dataset) -> None:
    write_summary(tmp_path, ds, figures(ds))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == [f"figures/{NAME}"]
    text = events.Tensors("results/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == as_markdown(results_table(ds))


def test_tensorboard_compares_methods_by_region(tmp_path: Path, ds: xr.Dataset, classes: xr.Dataset) -> None:
    write_summary(tmp_path, ds.assign_coords({"method": ["vanilla", "soft+tau", "constant"]}), {})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        f"test-{metric}-{region}/{method}"
        for metric in ("mae", "bmae")
        for region in ("all", "many", "medium", "few")  # nothing is unseen
        for method in ("vanilla", "soft+tau", "constant")
    }
    (one,) = events.Scalars("test-mae-few/vanilla")
    assert (one.step, one.value) == (0, 10.5)  # of 9 and 12
    (one,) = events.Scalars("test-bmae-all/soft+tau")
    assert one.value == 4.0  # of one seed
    other = tmp_path / "classes"
    other.mkdir()
    write_summary(other, classes, {})
    events = EventAccumulator(str(other))
    events.Reload()
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {
        f"test-{metric}-{region}"
        for metric in ("balanced_error", "error")
        for region in ("all", "many", "medium", "few")
    }


def test_a_method_has_one_color_in_all_figures_of_a_comparison(
    tmp_path: Path, compared: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def noting(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        def noted(ds: xr.Dataset, *, colors: dict[str, str]) -> Figure:
            given.append(colors)
            return draw(ds, colors=colors)

        return noted

    for name in ("region_figure", "cost_figure", "error_figure", "prediction_figure"):
        monkeypatch.setattr(summary, name, noting(getattr(summary, name)))
    monkeypatch.setattr(summary, "write_summary", lambda *_, **__: None)
    write_comparison(tmp_path, compared, methods=["half", "vanilla"], replicates=100)
    assert len(given) == 4
    assert all(colors == given[0] for colors in given)
    assert list(given[0])[:2] == ["half", "vanilla"]


def test_written_again_it_replaces_its_own_and_spares_the_rest(tmp_path: Path, ds: xr.Dataset) -> None:
    other = tmp_path / "events.out.tfevents.1.elsewhere.2.0"
    other.write_bytes(b"of another run")
    write_summary(tmp_path, ds, figures(ds))
    write_summary(tmp_path, ds.sel({"method": ["lds", "constant"]}), {})
    assert other.read_bytes() == b"of another run"
    assert len(list(tmp_path.glob("events*"))) == 2
    assert "vanilla" not in (tmp_path / "table.md").read_text()
    assert load_results(tmp_path / "results.nc")["method"].values.tolist() == ["lds", "constant"]
    assert (tmp_path / f"figures/{NAME}.png").exists()


def test_what_breaks_the_schema_leaves_nothing(tmp_path: Path, ds: xr.Dataset) -> None:
    with pytest.raises(ResultsError, match="completed"):
        write_summary(tmp_path, ds.drop_vars("completed"), figures(ds))
    assert files(tmp_path) == set()


def test_the_folder_must_exist(tmp_path: Path, ds: xr.Dataset) -> None:
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write_summary(tmp_path / "none", ds, {})


def test_figures_never_take_one_anothers_file(tmp_path: Path, ds: xr.Dataset) -> None:
    figure = region_figure(ds)
    with pytest.raises(ValueError, match=r"titles of figures must give each a file of its own, got \['a-b', 'a-b'\]"):
        write_summary(str(tmp_path), ds, {"a b": figure, "A-b": figure})
    assert files(tmp_path) == set()


@pytest.mark.usefixtures("small")
def test_a_comparison_lands_in_one_folder(tmp_path: Path, compared: xr.Dataset) -> None:
    density = dt.LabelDensity(dt.Bins.uniform(0, 5, width=1), [300, 50, 5, 0, 0])
    more = figures(compared)
    result = write_comparison(
        tmp_path,
        compared,
        density=density,
        level=0.9,
        replicates=200,
        seed=3,
        notes=["A note."],
        titles={"half": "errs half as much"},
        figures=more,
    )
    xr.testing.assert_identical(result, paired_differences(compared, level=0.9, replicates=200, seed=3))
    drawn = {
        "label-density",
        "error-by-region",
        "difference-to-vanilla--mae",
        "difference-to-vanilla--bmae",
        "predicted-against-true--some-methods",
        "interval-coverage-by-region",
        "error-and-cost",
        "error-by-age--some-methods",
        NAME,
    }
    others = {"results.nc", "table.md", "report.html", "differences.csv", "events"}
    assert files(tmp_path) == others | {f"figures/{name}.png" for name in drawn}
    xr.testing.assert_identical(load_results(tmp_path / "results.nc"), compared)
    assert (tmp_path / "table.md").read_text() == as_markdown(comparison_table(compared, result))
    assert (tmp_path / "differences.csv").read_text() == differences_csv(result)
    page = (tmp_path / "report.html").read_text()
    assert f'<p class="lead">{headline(compared, level=0.9)}</p>' in page
    for part in (
        "A note.",
        "errs half as much",
        "the 90 % bootstrap interval",
        "<strong>0.516 ± 0.066\n(×0.50)</strong>",
        TITLE,
    ):
        assert part in page
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in drawn}
    text = events.Tensors("results/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == as_markdown(comparison_table(compared, result))


def test_a_comparison_shows_what_there_is(
    tmp_path: Path, compared: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(summary, "write_summary", lambda folder, ds, figures, **_: shown.extend(figures))
    bare = compared.drop_vars(["lower", "upper"])
    bare["minutes"][:] = float("nan")
    write_comparison(tmp_path, bare, baseline="half", replicates=100, methods=["half", "vanilla"])
    assert shown == [
        "Error by region",
        "Difference to half: MAE",
        "Difference to half: bMAE",
        "Error by age, some methods",
        "Predicted against true, some methods",
    ]


def test_a_comparison_that_is_refused_leaves_nothing(tmp_path: Path, ds: xr.Dataset, compared: xr.Dataset) -> None:
    with pytest.raises(ResultsError, match="ds must hold the prediction for each test sample"):
        write_comparison(tmp_path, ds)
    with pytest.raises(ValueError, match=r"write_comparison: methods must be one of 'vanilla', .*, got 'lds'"):
        write_comparison(tmp_path, compared, methods=["lds"], replicates=100)
    with pytest.raises(TypeError, match="methods must be a Sequence, got int"):
        write_comparison(tmp_path, compared, methods=1, replicates=100)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write_comparison(tmp_path / "none", compared, replicates=100)
    assert files(tmp_path) == set()


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")  # what no font has, and no figure room for
@pytest.mark.usefixtures("small")
def test_names_of_any_length_and_kind_leave_whole_files(tmp_path: Path, compared: xr.Dataset) -> None:
    """Longer than a file's name may be, with control characters, line breaks and what a spreadsheet would run."""
    long, odd = "m" * 300, "=HYPERLINK(1)\x01\n\x0bend"
    names = {"vanilla": long, "half": odd}
    ds = compared.assign_coords({"method": [names.get(m, m) for m in compared["method"].values.tolist()]})
    ds = ds.assign_attrs(label_name="age\n" + "ä" * 300)
    write_comparison(tmp_path, ds, baseline=long, replicates=100)
    figures = [path.name for path in (tmp_path / "figures").iterdir()]
    assert len(figures) >= 5
    assert all(len(name.encode()) < 200 for name in figures)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("|")]) == 3 + ds.sizes["method"]
    assert len(table) == 3 + ds.sizes["method"] + 2
    with (tmp_path / "differences.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} >= {f"'{odd}"}
    page = (tmp_path / "report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    assert page.count("<svg") >= 5


def test_titles_that_are_alike_for_long_get_files_of_their_own(tmp_path: Path, ds: xr.Dataset) -> None:
    write_summary(tmp_path, ds, {"t" * 400 + end: region_figure(ds) for end in "ab"})
    assert len(list((tmp_path / "figures").iterdir())) == 2
