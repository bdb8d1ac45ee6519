"""The age recipe, started as a user would start it, on a few faces. What studies promise, tests/experiment tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import running
import xarray as xr
from forked import Forked
from running import RUN_FILES, Outcome, equal_bits, files, layout, numbers, run_here
from sketching import sketch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dir_toolkit.experiment.results.schema import load_results
from dir_toolkit.experiment.training.log import RunLog

RECIPE = running.RECIPES / "age.py"
QUICK = ["--data", "utkface", "--root", "faces", "--size", 16, "--epochs", 2, "--batch-size", 8]
METHODS = ["--methods", "vanilla", "lds+fds"]
FIGURES = {"error-by-age", "error-by-region", "label-density-and-lds-weights", "training"}
FIGURES |= {"feature-statistics-of-lds-fds", "predicted-against-true", "examples"}

run = partial(running.run, RECIPE)


def scalars(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished study, named by an absolute path, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    running.make_faces(folder / "faces")
    return folder / "made", run(folder, *QUICK, *METHODS, "--out", folder / "made").out


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--methods", "kernel-sigma", "soft bins")


def test_the_command_of_the_readme_is_the_default(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Portraits are drawn, and plain regression, LDS and the default model are trained for twelve epochs."""
    from dir_toolkit.experiment.study import Study

    asked: dict[str, object] = {}

    def noted(self: Study, names: tuple[str, ...], *, seeds: int) -> None:
        self.tasks[0].data(0)  # type: ignore[index]
        asked.update(names=names, seeds=seeds, budget=self.optimization)

    monkeypatch.setattr("dir_toolkit.experiment.data.portraits.portraits", lambda size: asked.update(side=size))
    monkeypatch.setattr(Study, "run", noted)
    monkeypatch.setattr(Study, "report", lambda self, **_: asked.update(folder=self.folder))
    assert here().code == 0
    budget = asked.pop("budget")
    assert (budget.epochs, budget.batch_size, budget.lr) == (12, 128, 2e-3)  # type: ignore[attr-defined]
    names = ("vanilla", "lds", "soft", "soft+tau")
    assert asked == {"names": names, "seeds": 1, "side": 32, "folder": Path("runs/age/portraits")}


def test_a_run_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, output = finished
    runs = {f"{method}/seed0/{name}" for method in ("vanilla", "lds+fds") for name in RUN_FILES}
    summary = {"results.nc", "table.md", "report.html", "events"}
    assert set(files(out)) == runs | summary | {f"figures/{name}.png" for name in FIGURES}
    assert "utkface: 20 samples to train on, 8 to validate, 16 to test; 1 skipped: name does not parse" in output
    assert str(out / "report.html") in output
    last = output.rstrip().splitlines()[-1]
    assert "MAE" in last
    assert f'<p class="lead">{last}</p>' in (out / "report.html").read_text()


def test_the_result_is_of_ages_and_holds_the_constant_predictor(finished: tuple[Path, str]) -> None:
    out, output = finished
    ds = load_results(out / "results.nc")
    assert ds["method"].values.tolist() == ["vanilla", "lds+fds", "constant"]
    assert (ds.sizes["bin"], ds.attrs["label_units"], ds.sizes["sample"]) == (117, "years", 16)
    for table in (output, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert "constant" in table


def test_tensorboard_holds_every_curve_and_figure(finished: tuple[Path, str]) -> None:
    out, _ = finished
    tags = {
        "train/loss",
        "train/lr",
        "val/mae/all",
        "val/mae/few",
        "val/bmae/all",
    }  # so few faces are of no other region
    events = scalars(out / "lds+fds/seed0")
    assert set(events.Tags()["scalars"]) == tags
    assert [event.step for event in events.Scalars("val/bmae/all")] == [3, 6]
    assert set(scalars(out).Tags()["images"]) == {f"figures/{name}" for name in FIGURES}


def test_no_result_tells_where_things_lie_on_this_machine(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for path in (out / "results.nc", out / "vanilla/seed0/results.nc", out / "report.html", out / "table.md"):
        for place in (out.parent, RECIPE.parents[1], Path.home(), sys.prefix):
            assert f"{place}/".encode() not in path.read_bytes(), (path, place)
    words = ["python recipes/age.py", *QUICK, *METHODS, "--out", "DIR"]
    command = " ".join(map(str, words)).replace("--root faces", "--root DIR")
    assert load_results(out / "results.nc").attrs["command"] == command


def test_an_earlier_run_is_refused_and_nothing_is_touched(
    finished: tuple[Path, str], here: Callable[..., Outcome]
) -> None:
    out, _ = finished
    before = files(out)
    outcome = here(*QUICK, "--methods", "lds", "vanilla", "--out", out)
    assert outcome.code == 1
    assert re.fullmatch(r".* must hold no earlier run.* got .*checkpoint-last\.pt\. Use --resume.*\n", outcome.err)
    assert files(out) == before


def stopped_main(connection: Connection, folder: Path, words: list[str]) -> None:
    """A process that is interrupted when the first epoch of the second method has ended."""
    usual = RunLog.end_epoch

    def end_epoch(self: RunLog, row: dict[str, Any], *, best: bool) -> None:
        usual(self, row, best=best)
        if row["epoch"] == 1:
            signal.raise_signal(signal.SIGINT)

    pytest.MonkeyPatch().setattr(RunLog, "end_epoch", end_epoch)
    connection.send(run_here(RECIPE, folder, *words))


def test_stopped_and_resumed_in_a_new_process_it_ends_with_equal_bits(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    whole, _ = finished
    shutil.copytree(whole.parent / "faces", tmp_path / "faces")
    shutil.copytree(whole / "vanilla", tmp_path / "made/vanilla")
    words = [*map(str, QUICK), *METHODS, "--resume", "--out=made"]
    process = Forked(__file__, "stopped_main", tmp_path, words)
    stopped = process.receive()
    process.finish()
    made = tmp_path / "made"
    assert (stopped.code, stopped.err) == (130, "")
    assert stopped.out.rstrip().endswith("Continue with --resume.")
    assert set(files(made / "lds+fds/seed0")) == RUN_FILES - {"results.nc", "model.safetensors"}
    assert not (made / "results.nc").exists()
    done = files(made / "vanilla")
    outcome = run(tmp_path, *words)
    assert outcome.out.count("finished before: best val_bmae") == 1
    for name in ("checkpoint-last.pt", "checkpoint-best.pt"):
        assert equal_bits(whole / "lds+fds/seed0" / name, made / "lds+fds/seed0" / name)
    assert not equal_bits(whole / "lds+fds/seed0" / name, made / "vanilla/seed0" / name)
    one, two = (load_results(place / "results.nc") for place in (whole, made))
    xr.testing.assert_identical(numbers(one), numbers(two))
    assert two.attrs["command"].endswith("--resume --out=DIR")
    assert (whole / "table.md").read_text() == (made / "table.md").read_text()
    # What was finished is not touched; and every epoch stands in TensorBoard once.
    assert files(made / "vanilla") == done
    events = scalars(made / "lds+fds/seed0").Scalars("val/bmae/all")  # of two files that may be of one second
    assert sorted(event.step for event in events) == [3, 6]


def as_torchrun_starts_it(connection: Connection, folder: Path, rank: int, port: int) -> None:
    """One of two processes, which know each other from what torchrun puts into their environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
    sketch(pytest.MonkeyPatch())
    connection.send(run(folder, *QUICK, "--methods", "lds+fds", "--out", "made").out)


def test_two_processes_leave_the_same_files(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0].parent / "faces", tmp_path / "faces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pair = [Forked(__file__, "as_torchrun_starts_it", tmp_path, rank, port) for rank in range(2)]
    (output,), (nothing,) = (process.finish() for process in pair)
    assert [process.code for process in pair] == [0, 0], output + nothing
    assert (output.count("lds+fds, seed 0"), nothing) == (1, "")
    assert set(files(tmp_path / "made")) == {name for name in files(finished[0]) if not name.startswith("vanilla/")}
    for name in ("checkpoint-last.pt", "checkpoint-best.pt"):
        result = layout(tmp_path / "made/lds+fds/seed0" / name)
        assert result == layout(finished[0] / "lds+fds/seed0" / name)
        assert result != layout(finished[0] / "vanilla/seed0" / name)
    ds, whole = (load_results(place / "results.nc") for place in (tmp_path / "made", finished[0]))
    assert "2 processes" in ds.attrs["device"]
    xr.testing.assert_identical(
        ds["bin_count"].sel({"method": "lds+fds"}), whole["bin_count"].sel({"method": "lds+fds"})
    )


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--methods vanila", r".*names must be methods of the study, got vanila\. Did you mean vanilla\?"),
        ("--seeds 0", r".*seeds must be at least 1.*"),
        ("--lr -1", r"Optimization: 1 setting is wrong:\n  lr must be > 0.*"),
        ("--device cuda:99", r"start_runtime: device cuda:99 must exist on this machine.*"),
        ("--root nowhere --data utkface", r"\w+: root must be .*nowhere.*"),
        ("--root nowhere", r"recipes/age\.py: these settings cannot run:\n  --root must name the folder.*"),
    ],
)
def test_bad_settings_end_in_a_message(tmp_path: Path, here: Callable[..., Outcome], words: str, rule: str) -> None:
    outcome = here(*words.split())
    assert outcome.code == 1
    assert re.fullmatch(rf"{rule}\n", outcome.err), outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_fault_of_our_own_keeps_its_traceback(here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("dir_toolkit.experiment.data.portraits.portraits", broken)
    with pytest.raises(ValueError, match="a bug"):
        here()


def test_a_file_in_the_place_of_the_folder_ends_in_a_message(here: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        outcome = here("--epochs", 1, "--out", out)
        assert outcome.code == 1
        assert outcome.err.splitlines()[1] == f"  --out must be a folder, got {out}, where taken is a file."
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_told(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    outcome = here("--out", "made")
    assert outcome.code == 1
    assert outcome.err.endswith("  --out must be a folder that can be written to, got made, where . cannot.\n")


def test_a_reader_who_stops_reading_ends_it_quietly(tmp_path: Path) -> None:
    words = [sys.executable, "-u", str(RECIPE), "--help"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()


def test_settings_are_kept_for_the_reader(finished: tuple[Path, str]) -> None:
    config = json.loads((finished[0] / "lds+fds/seed0/config.json").read_text())
    assert (config["method"], config["epochs"], config["size"], config["momentum"]) == ("lds+fds", 2, 16, 0.9)
