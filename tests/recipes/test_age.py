"""The age recipe, started as a user would start it. One small run is shared; portraits are always 4,000 faces."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import running
import torch
import xarray as xr
from PIL import Image
from running import RUN_FILES, Outcome, environment, equal_bits, files, numbers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dir_toolkit.results.schema import load_results, validate_results

RECIPE = running.RECIPES / "age.py"
QUICK = ["--size", "16", "--epochs", "2", "--batch-size", "1024", "--seeds", "1"]
METHODS = ["--methods", "vanilla", "lds+fds"]
FIGURES = {"error-by-age", "error-by-region", "label-density-and-lds-weights", "training"}


recipe, run = partial(running.start, RECIPE), partial(running.run, RECIPE)


def scalars(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished comparison, named by an absolute path, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "made", run(folder, *QUICK, *METHODS, "--out", folder / "made").out


@pytest.fixture(scope="module")
def stopped(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The same comparison, its second method stopped by Ctrl-C once its first epoch was told."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(finished[0] / "vanilla", folder / "made" / "vanilla")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(RECIPE), *QUICK, *METHODS, "--resume", "--out=made"],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if re.match(r" +1 ", line):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    return folder, Outcome(process.returncode, told + out, err)


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--methods", "kernel-sigma")


def test_a_run_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, told = finished
    figures = {f"figures/{name}.png" for name in (*FIGURES, "feature-statistics-of-lds-fds")}
    runs = {f"{method}/seed0/{name}" for method in ("vanilla", "lds+fds") for name in RUN_FILES}
    assert set(files(out)) == runs | figures | {"results.nc", "table.md", "report.html", "events"}
    assert str(out / "report.html") in told


def test_the_result_follows_the_schema_and_holds_the_constant_predictor(finished: tuple[Path, str]) -> None:
    out, told = finished
    ds = load_results(out / "results.nc")
    validate_results(ds)
    assert ds["method"].values.tolist() == ["vanilla", "lds+fds", "constant"]
    assert ds["completed"].values.tolist() == [[1], [1], [1]]
    assert (ds.sizes["bin"], ds.attrs["label_units"]) == (101, "years")
    assert ds["count"].sel({"method": "vanilla", "seed": 0, "region": "all"}) == 1010
    for table in (told, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert "constant" in table
    for method in ("vanilla", "lds+fds"):
        one = load_results(out / method / "seed0" / "results.nc")
        xr.testing.assert_identical(numbers(one), numbers(ds.sel({"method": [method]})))


def test_the_constant_predictor_is_the_training_median(finished: tuple[Path, str]) -> None:
    ds = load_results(finished[0] / "results.nc").sel({"method": "constant", "seed": 0})
    test_ages, count = ds["bin_center"].values, ds["train_count"].values
    median = np.median(np.repeat(test_ages, count))
    np.testing.assert_allclose(ds["bin_mae"], np.abs(test_ages - median), atol=1e-5)


def test_settings_and_versions_are_kept(finished: tuple[Path, str]) -> None:
    out, _ = finished
    config = json.loads((out / "lds+fds/seed0/config.json").read_text())
    assert (config["method"], config["epochs"], config["size"], config["momentum"]) == ("lds+fds", 2, 16, 0.9)
    env = json.loads((out / "lds+fds/seed0/env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
    assert env["data"]["sizes"] == {"train": 4000, "val": 505, "test": 1010}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in env["data"]["digests"].values())


def test_tensorboard_holds_every_curve_and_figure(finished: tuple[Path, str]) -> None:
    out, _ = finished
    tags = {"train/loss", "train/lr", "val/mae/all", "val/mae/many", "val/mae/medium", "val/mae/few", "val/bmae/all"}
    for method in ("vanilla", "lds+fds"):
        events = scalars(out / method / "seed0")
        assert set(events.Tags()["scalars"]) == tags
        assert [event.step for event in events.Scalars("val/bmae/all")] == [4, 8]
    shown = set(scalars(out).Tags()["images"])
    assert shown == {f"figures/{name}" for name in (*FIGURES, "feature-statistics-of-lds-fds")}


def test_no_result_tells_where_things_lie_on_this_machine(finished: tuple[Path, str]) -> None:
    out, _ = finished
    results = [out / "results.nc", out / "vanilla/seed0/results.nc", out / "report.html", out / "table.md"]
    for path in results:
        content = path.read_bytes()
        for place in (out.parent, RECIPE.parents[1], Path.home(), sys.prefix):
            assert f"{place}/".encode() not in content, (path, place)
    command = " ".join(["python recipes/age.py", *QUICK, *METHODS, "--out DIR"])
    assert load_results(out / "results.nc").attrs["command"] == command
    assert str(out.parent).encode() in (out / "vanilla/seed0/config.json").read_bytes()


def test_an_earlier_run_is_refused_and_nothing_is_touched(
    finished: tuple[Path, str], here: Callable[..., Outcome]
) -> None:
    out, _ = finished
    before = files(out)
    outcome = here(*QUICK, "--methods", "lds", "vanilla", "--out", out)
    assert outcome.code == 1
    assert re.fullmatch(
        r"recipes/age\.py: --out must hold no earlier run.* got .*checkpoint-last\.pt\. Go on with --resume.*\n",
        outcome.err,
    )
    assert files(out) == before


def test_resuming_with_other_settings_is_refused_and_told_which(
    finished: tuple[Path, str], here: Callable[..., Outcome]
) -> None:
    out, _ = finished
    before = files(out)
    outcome = here(*QUICK, *METHODS, "--lr", 0.5, "--kernel-size", 9, "--out", out, "--resume")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    for part in ("optimization.lr was 0.002 and is 0.5", "kernel_size was 5 and is 9", "another folder"):
        assert part in outcome.err
    assert files(out) == before


def test_ctrl_c_saves_and_tells_how_to_go_on(stopped: tuple[Path, Outcome]) -> None:
    folder, outcome = stopped
    assert (outcome.code, outcome.err) == (130, "")
    assert "finished before: best val_bmae" in outcome.out
    assert outcome.out.rstrip().endswith("Go on with --resume.")
    assert set(files(folder / "made/lds+fds/seed0")) == RUN_FILES - {"results.nc"}
    assert not (folder / "made/results.nc").exists()


def test_resumed_it_ends_as_if_it_had_not_been_stopped(
    finished: tuple[Path, str], stopped: tuple[Path, Outcome]
) -> None:
    (whole, _), (folder, _) = finished, stopped
    done = files(folder / "made/vanilla")
    outcome = run(folder, *QUICK, *METHODS, "--resume", "--out=made")
    assert outcome.out.count("finished before: best val_bmae") == 1
    for name in ("checkpoint-last.pt", "checkpoint-best.pt"):
        assert equal_bits(whole / "lds+fds/seed0" / name, folder / "made/lds+fds/seed0" / name)
    assert not equal_bits(whole / "lds+fds/seed0" / name, folder / "made/vanilla/seed0" / name)
    one, two = (load_results(place / "results.nc") for place in (whole, folder / "made"))
    xr.testing.assert_identical(numbers(one), numbers(two))
    assert two.attrs["command"].endswith("--resume --out=DIR")
    assert (whole / "table.md").read_text() == (folder / "made/table.md").read_text()
    # What was finished is not touched; and every epoch stands in TensorBoard once.
    assert files(folder / "made/vanilla") == done
    assert [event.step for event in scalars(folder / "made/lds+fds/seed0").Scalars("val/bmae/all")] == [4, 8]


def test_all_bad_settings_are_told_at_once(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    words = "--seeds 0 --size 3 --epochs 0 --lr -1 --methods lds lds --kernel-size 4 --fds-momentum 2 --root x"
    outcome = here(*words.split())
    assert outcome.code == 1
    first, *faults = outcome.err.splitlines()
    assert first == "recipes/age.py: these settings cannot run:"
    told = "\n".join(faults)
    for part in (
        "--root needs",
        "--methods must",
        "--seeds must",
        "--size must",
        "epochs must",
        "lr must",
        "size must be odd",
    ):
        assert part in told
    assert "momentum must be" in told
    assert files(tmp_path) == {}


@pytest.mark.parametrize("data", ["utkface", "agedb"])
def test_a_missing_folder_of_images_is_told_in_one_line(here: Callable[..., Outcome], data: str) -> None:
    outcome = here("--data", data, "--root", "nowhere")
    assert outcome.code == 1
    assert re.fullmatch(r"\w+: root must be .*nowhere.*\n", outcome.err)


def test_a_package_that_is_missing_is_told_in_one_line(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    outcome = here("--backbone", "resnet18")
    assert outcome.code == 1
    assert re.fullmatch(r'timm_backbone: .* pip install "dir_toolkit\[models\]".\n', outcome.err)


def test_a_device_that_is_missing_is_told_in_one_line(here: Callable[..., Outcome]) -> None:
    outcome = here("--device", "cuda:99")
    assert outcome.code == 1
    assert re.fullmatch(r"start_runtime: device cuda:99 must exist on this machine.*\n", outcome.err)


def test_a_fault_of_our_own_keeps_its_traceback(here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("dir_toolkit.data.portraits.portraits", broken)
    with pytest.raises(ValueError, match="a bug"):
        here()


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((24, 24)).save(out, "JPEG")
    return out.getvalue()


def test_a_folder_of_utkface(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    root = tmp_path / "faces" / "UTKFace"
    root.mkdir(parents=True)
    for age in (3, 40, 41, 90):
        for i in range(12):
            (root / f"{age}_{i % 2}_{i % 5}_2017{i:04d}.jpg.chip.jpg").write_bytes(jpeg(100 * age + i))
    (root / "61_1_20170109150557335.jpg.chip.jpg").write_bytes(jpeg(0))
    words = ["--data", "utkface", "--root", "faces", "--size", 16, "--epochs", 1, "--batch-size", 8]
    outcome = here(*words, "--methods", "lds+fds")
    assert (outcome.code, outcome.err) == (0, "")
    assert "20 faces to train on, 8 to validate, 16 to test; 1 skipped: name does not parse" in outcome.out
    ds = load_results(tmp_path / "runs/age/utkface/results.nc")
    assert (ds.sizes["bin"], int(ds["bin_count"].sel({"method": "constant"}).sum())) == (117, 16)
    assert ds.attrs["command"].startswith("python recipes/age.py --data utkface --root DIR --size 16")


def test_a_list_of_agedb(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    rows = ["age,path,split"]
    (tmp_path / "AgeDB").mkdir()
    for i, split in enumerate(["train"] * 8 + ["val"] * 2 + ["test"] * 3):
        (tmp_path / "AgeDB" / f"{i}.jpg").write_bytes(jpeg(i))
        rows.append(f"{20 + i % 3},AgeDB/{i}.jpg,{split}")
    rows.append("50,AgeDB/none.jpg,train")
    (tmp_path / "agedb.csv").write_text("\n".join(rows))
    words = [
        "--data",
        "agedb",
        "--root",
        ".",
        "--size",
        16,
        "--epochs",
        1,
        "--batch-size",
        4,
        "--methods",
        "unsmoothed",
    ]
    refused = here(*words)
    assert refused.code == 1
    assert re.fullmatch(r"agedb.csv, line 15: path must name an image.*\n", refused.err)
    outcome = here(*words, "--on-error", "skip", "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "8 faces to train on, 2 to validate, 3 to test; 1 skipped: missing file" in outcome.out
    assert load_results(tmp_path / "out/results.nc")["method"].values.tolist() == ["unsmoothed", "constant"]


def test_two_processes_leave_the_same_files_and_come_close(finished: tuple[Path, str], tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    outcome = recipe(tmp_path, *QUICK, "--methods", "lds+fds", "--out", "made", python=launch)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("lds+fds, seed 0") == 1
    assert set(files(tmp_path / "made")) == {name for name in files(finished[0]) if not name.startswith("vanilla/")}
    one, two = (
        load_results(place / "results.nc").sel({"method": "lds+fds"}) for place in (finished[0], tmp_path / "made")
    )
    assert "2 processes" in two.attrs["device"]
    xr.testing.assert_identical(one["bin_count"], two["bin_count"])
    # Batch statistics are each rank's own and augmentation is drawn anew, so that the numbers are not the same.
    for name in ("mae", "bmae"):
        np.testing.assert_allclose(two[name].sel(region="all"), one[name].sel(region="all"), rtol=0.1)


def test_a_file_in_the_place_of_the_folder_ends_in_a_message(here: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    outcome = here("--epochs", 1, "--out", "taken")
    assert outcome.code == 1
    assert "NotADirectoryError" in outcome.err
    assert "Traceback" not in outcome.err
    assert (tmp_path / "taken").read_text() == "mine"
