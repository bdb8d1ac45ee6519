from __future__ import annotations

from pathlib import Path

import pytest
import xarray as xr
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dir_toolkit.errors import ResultsError
from dir_toolkit.results.figures import region_figure
from dir_toolkit.results.schema import load_results
from dir_toolkit.results.summary import write_summary
from dir_toolkit.results.tables import markdown_table

TITLE = "Error by region (lds+fds)"
NAME = "error-by-region--lds-fds-"


def files(folder: Path) -> set[str]:
    """All of them, TensorBoard's under one name."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"events" if name.startswith("events.out.tfevents.") else name for name in names}


def figures(ds: xr.Dataset) -> dict[str, Figure]:
    return {TITLE: region_figure(ds)}


def test_everything_lands_in_one_folder(tmp_path: Path, ds: xr.Dataset) -> None:
    write_summary(tmp_path, ds, figures(ds), notes=["A note."], settings={"epochs": 7}, columns=[("bmae", "few")])
    assert files(tmp_path) == {"results.nc", "table.md", "report.html", f"figures/{NAME}.png", "events"}
    assert load_results(tmp_path / "results.nc")["mae"].equals(ds["mae"])
    table = (tmp_path / "table.md").read_text()
    assert table == markdown_table(ds, columns=[("bmae", "few")])
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
    assert text == markdown_table(ds)


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
