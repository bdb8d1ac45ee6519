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
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
import running
import torch
import xarray as xr
from PIL import Image
from running import RUN_FILES, Outcome, environment, equal_bits, files, layout, numbers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dir_toolkit.decoupling import stage_two
from dir_toolkit.errors import SettingsError
from dir_toolkit.experiment.results.schema import load_results, validate_results
from dir_toolkit.experiment.training.checkpoint import load_checkpoint, save_checkpoint
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.labels.density import LabelDensity

sys.path.insert(0, str(running.RECIPES))  # as Python does for a script

import age
import age_methods
from age_methods import GROUPS, WINNER, named

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
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--methods", "kernel-sigma", "soft bins")


def test_a_run_leaves_the_files_that_are_promised_and_no_others(finished: tuple[Path, str]) -> None:
    out, told = finished
    figures = {f"figures/{name}.png" for name in (*FIGURES, "feature-statistics-of-lds-fds")}
    runs = {f"{method}/seed0/{name}" for method in ("vanilla", "lds+fds") for name in RUN_FILES}
    assert set(files(out)) == runs | figures | {"results.nc", "table.md", "report.html", "events"}
    assert told.rstrip().endswith(f"tensorboard --logdir {out}")
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
    words = (
        "--seeds 0 --size 3 --epochs 0 --lr -1 --kernel-size 4 --fds-momentum 2 --root x --listing y --tau -1 "
        "--label-sigma nan --stage-two-epochs 0 --checkpoint-minutes -1 --tune sigma,smoothing --methods"
    )
    outcome = here(*words.split())
    assert outcome.code == 1
    first, *faults = outcome.err.splitlines()
    assert first == "recipes/age.py: these settings cannot run:"
    told = "\n".join(faults)
    for part in (
        "--root needs",
        "--listing needs",
        "--methods must name a method, got none",
        "--tune must name some of kernel, sigma, scheme, momentum, lr, tau, each once, separated by commas, got",
        "--tune needs one method",
        "--tau needs a method that is adjusted after training",
        "--tau must be finite and at least 0, got -1",
        "--label-sigma must be finite and at least 0, got nan",
        "--stage-two-epochs must be at least 1, got 0",
        "--checkpoint-minutes must",
        "--seeds must",
        "--size must",
        "epochs must",
        "lr must",
        "size must be odd",
    ):
        assert part in told
    assert "momentum must be" in told
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--methods soft --tune width", "--tune must name some of .* got width"),
        ("--methods soft --tune sigma,lr,sigma", "--tune must name some of .* each once, .* got sigma,lr,sigma"),
        ("--methods soft bins --tune lr", "--tune needs one method in --methods, for each has settings of its own"),
        ("--tune lr", "--tune needs one method"),
        ("--methods soft --tune tau", "--tune tau needs a method that is adjusted after training, such as soft.tau"),
        ("--methods soft+tau --tau 1 --tune tau", "--tune tau needs .*, and no --tau"),
        ("--methods soft --tune lr,kernel,momentum", "--tune kernel,momentum would change nothing in soft"),
        ("--methods vanilla --tune sigma", "--tune sigma would change nothing in vanilla"),
        ("--methods rrt --tune scheme", "--tune scheme would change nothing in rrt"),
        ("--methods vanilla soft --tau 0.5", "--tau needs a method that is adjusted after training"),
        ("--methods soft+tau --tau nan", "--tau must be finite and at least 0, got nan"),
    ],
)
def test_what_cannot_be_tuned_or_adjusted_is_told(
    tmp_path: Path, here: Callable[..., Outcome], words: str, rule: str
) -> None:
    outcome = here(*words.split())
    assert outcome.code == 1
    assert re.fullmatch(rf"recipes/age\.py: these settings cannot run:\n  {rule}.*\.\n", outcome.err), outcome.err
    assert files(tmp_path) == {}


def test_several_processes_cannot_tune() -> None:
    two = Runtime(torch.device("cpu"), world=2)
    with pytest.raises(SettingsError, match="--tune must run in one process; drop torchrun, and use it afterwards"):
        age.tune(age.Settings(methods=("soft",), tune="lr"), two, None, Path("nowhere"))


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


def test_a_model_of_timm_is_trained_stopped_and_resumed(
    here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    words = [*QUICK, "--methods", "vanilla", "--backbone", "mobilenetv3_small_050"]
    assert here(*words, "--out", "whole").code == 0
    with monkeypatch.context() as patched:
        press = partial(signal.raise_signal, signal.SIGINT)
        patched.setattr("dir_toolkit.experiment.training.log.RunLog.end_epoch", lambda *_, **__: press())
        assert here(*words, "--out", "made").code == 130
    assert not (tmp_path / "made/results.nc").exists()
    assert here(*words, "--out", "made", "--resume").code == 0
    assert equal_bits(*(tmp_path / place / "vanilla/seed0/checkpoint-last.pt" for place in ("whole", "made")))
    one, two = (load_results(tmp_path / place / "results.nc") for place in ("whole", "made"))
    xr.testing.assert_identical(numbers(one), numbers(two))
    config = json.loads((tmp_path / "made/vanilla/seed0/config.json").read_text())
    assert config["backbone"] == "mobilenetv3_small_050"


def test_a_device_that_is_missing_is_told_in_one_line(here: Callable[..., Outcome]) -> None:
    outcome = here("--device", "cuda:99")
    assert outcome.code == 1
    assert re.fullmatch(r"start_runtime: device cuda:99 must exist on this machine.*\n", outcome.err)


def test_a_fault_of_our_own_keeps_its_traceback(here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("dir_toolkit.experiment.data.portraits.portraits", broken)
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
    for years in (3, 40, 41, 90):
        for i in range(12):
            (root / f"{years}_{i % 2}_{i % 5}_2017{i:04d}.jpg.chip.jpg").write_bytes(jpeg(100 * years + i))
    (root / "61_1_20170109150557335.jpg.chip.jpg").write_bytes(jpeg(0))
    words = [
        "--data",
        "utkface",
        "--root",
        "faces",
        "--size",
        16,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--augmentation",
        "strong",
    ]
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


def test_two_processes_leave_the_same_files_and_come_close(
    finished: tuple[Path, str], tmp_path: Path, here: Callable[..., Outcome]
) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    outcome = recipe(tmp_path, *QUICK, "--methods", "lds+fds", "--out", "made", python=launch)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("lds+fds, seed 0") == 1
    assert set(files(tmp_path / "made")) == {name for name in files(finished[0]) if not name.startswith("vanilla/")}
    for name in ("checkpoint-last.pt", "checkpoint-best.pt"):
        found = layout(tmp_path / "made/lds+fds/seed0" / name)
        assert found == layout(finished[0] / "lds+fds/seed0" / name)
        assert found != layout(finished[0] / "vanilla/seed0" / name)
    refused = here(*QUICK, "--methods", "lds+fds", "--out", "made", "--resume")
    assert refused.code == 1
    assert "number of processes was 2 and is 1. Resume with the settings and as many processes" in refused.err
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
    for out in ("taken", "taken/below"):
        outcome = here("--epochs", 1, "--out", out)
        assert outcome.code == 1
        _, told = outcome.err.splitlines()
        assert told == f"  --out must be a folder, got {out}, where taken is a file."
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_told(
    here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    outcome = here("--out", "made")
    assert outcome.code == 1
    assert outcome.err.endswith("  --out must be a folder that can be written to, got made, where . cannot.\n")


def test_a_method_that_is_not_known_is_told_with_what_was_meant(here: Callable[..., Outcome]) -> None:
    outcome = here("--methods", "vanila", "soft", "xyz", "--tune", "sigma")
    assert outcome.code == 1
    assert outcome.err.splitlines()[1:] == [
        "  --methods must name methods that --help lists, got vanila. Did you mean vanilla?",
        "  --methods must name methods that --help lists, got xyz.",
        "  --tune needs one method in --methods, for each has settings of its own.",
    ]


def test_help_says_what_every_method_is(here: Callable[..., Outcome]) -> None:
    told = " ".join(here("--help").out.split())  # however wide the terminal
    for name, method in age_methods.METHODS.items():
        assert f" {name} {method.title} " in told
    for name, words in (("default", "soft+tau, which did best"), ("all", "all methods but"), ("fds-study", "the var")):
        assert f" {name} {words}" in told
        assert name in age_methods.GROUPS


def test_a_reader_who_stops_reading_ends_it_quietly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", str(RECIPE), "--help"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()


# ---- the methods ----

AXIS = age.label_axis(age.Settings())
# All ages, after a tail of them.
AGES = np.append(np.minimum(np.random.default_rng(0).exponential(20, 500), 100).astype(np.int64), np.arange(101))
DENSITY = LabelDensity.count(AGES, AXIS)


def test_the_names_of_methods_are_all_known() -> None:
    assert {name for group in GROUPS.values() for name in group} == set(age_methods.METHODS)
    assert named(age.Settings().methods) == ["vanilla", "lds", WINNER]
    assert named(["soft", "all", "soft"]) == ["soft", *(name for name in GROUPS["all"] if name != "soft")]
    titles = [method.title for method in age_methods.METHODS.values()]
    assert len(set(titles)) == len(titles)
    for method in age_methods.METHODS.values():
        assert method.start is None or age_methods.METHODS[method.start].start is None
        assert not method.tau or method.start is not None


def step(name: str, model: torch.nn.Module, fds: object, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One step of what a method minimises, as the training loop does it."""
    loss = age_methods.objective(age_methods.METHODS[name], model, DENSITY)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    with fds.labels(labels) if fds is not None else nullcontext():
        output = model(images)
    value = loss(output, labels, None)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert 0 < norm.item() < float("inf")
    optimizer.step()
    return value.detach()


@pytest.mark.parametrize("name", age_methods.METHODS)
def test_every_method_trains_and_predicts_ages(name: str) -> None:
    settings, method = age.Settings(), age_methods.METHODS[name]
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(24, 3, 16, 16, generator=generator) - 1
    labels = torch.from_numpy(AGES[:24]).float()
    runtime = Runtime(torch.device("cpu"))
    model, fds = age.fresh(settings, age_methods.METHODS[method.start or name], runtime, DENSITY)
    assert (fds is None) == (age_methods.METHODS[method.start or name].fds is None)
    for _ in range(3):  # epochs of one step; features are calibrated in the second and third
        assert step(method.start or name, model, fds, images, labels).isfinite()
        if fds is not None:
            fds.end_epoch()
    if method.tau:
        model.set_prior("uniform", model.choose_tau(model.eval()(images).scores, labels).tau)
    elif method.start is not None:
        stage_two(model, "rrt" if method.head == "regression" else "crt", seed=0)
        before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        assert step(name, model, fds, images, labels).isfinite()
        moved = {key for key in before if not torch.equal(before[key], model.state_dict()[key])}
        assert moved == {"head.weight", "head.bias"}
    with torch.no_grad():
        output = model.eval()(images)
    assert output.prediction.shape == (24,)
    assert output.prediction.isfinite().all()
    held = age.by_sample(model, output, AGES[:24])
    assert set(held) - {"lower", "upper"} == {"target", "prediction"}
    assert ("lower" in held) == (method.head != "regression" or method.tau)
    if "lower" in held:
        assert (held["lower"][1] <= held["upper"][1]).all()


def test_settings_reach_the_network() -> None:
    def of(name: str, **settings: object) -> object:
        runtime = Runtime(torch.device("cpu"))
        return age.fresh(replace(age.Settings(), **settings), age_methods.METHODS[name], runtime, DENSITY)

    assert of("soft", label_sigma=3.5)[0].sigma == 3.5
    assert of("bins", label_sigma=3.5)[0].sigma is None
    assert of("vanilla", loss="focal-mse")[0].settings["loss"] == "weighted_focal_mse"
    assert of("fds", fds_momentum=0.25, fds_shrinkage=3.0)[1].extra_repr().count("momentum=0.25") == 1
    assert of("vanilla")[1] is None


# ---- methods that go on from others, and settings chosen on validation ----

SHORT = ["--size", 16, "--epochs", 1, "--batch-size", 1024]


def test_a_method_goes_on_from_the_run_of_another(here: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = here(*SHORT, "--methods", "soft+tau", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    kept = {name for name in files(out) if "/seed0/" in name}
    assert kept == {f"soft/seed0/{name}" for name in RUN_FILES - {"results.nc"}} | {"soft+tau/seed0/results.nc"}
    assert load_results(out / "results.nc")["method"].values.tolist() == ["soft+tau", "constant"]
    trained = files(out / "soft")
    chosen = load_results(out / "soft+tau/seed0/results.nc")
    assert chosen["tau"].values.item() in np.linspace(0, 3, 61)

    # Its network is there: nothing of it is trained again, whatever starts from it.
    methods = ["vanilla", "soft", "soft+tau", "soft+crt"]
    words = [*SHORT, "--stage-two-epochs", 4, "--methods", *methods, "--resume", "--out", out]
    outcome = here(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("finished before") == 3
    assert {name: content for name, content in files(out / "soft").items() if name in trained} == trained
    ds = load_results(out / "results.nc").sel({"seed": 0})
    assert ds["method"].values.tolist() == [*methods, "constant"]
    soft, crt = (load_checkpoint(out / f"{name}/seed0/checkpoint-last.pt")["model"] for name in ("soft", "soft+crt"))
    differ = {name for name, value in soft.items() if torch.is_tensor(value) and not torch.equal(value, crt[name])}
    assert differ == {"head.weight", "head.bias"}
    assert len((out / "soft+crt/seed0/history.csv").read_text().splitlines()) == 1 + 4
    assert ds["minutes"].sel({"method": "soft+crt"}) > ds["minutes"].sel({"method": "soft"})
    assert ds["minutes"].sel({"method": "soft+tau"}) == ds["minutes"].sel({"method": "soft"})
    assert ds["tau"].notnull().values.tolist() == [False, False, True, False, False]
    assert ds["tau"].sel({"method": "soft+tau"}) == chosen["tau"].values.item()

    # Each face is told, and its interval where the head tells a distribution.
    assert ds.sizes["sample"] == 1010
    off = np.abs(ds["prediction"] - ds["target"]).mean("sample")
    np.testing.assert_allclose(off, ds["mae"].sel(region="all"), rtol=1e-5)
    assert ds["lower"].attrs["interval_level"] == 0.9
    assert ds["lower"].notnull().all("sample").values.tolist() == [False, True, True, True, False]
    assert (ds["lower"] <= ds["upper"]).sel({"method": ["soft", "soft+tau", "soft+crt"]}).all()

    # What follows without training is made anew, in the run's own result, too; tau 0 adjusts nothing.
    outcome = here(*words, "--tau", 0)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("finished before") == 5
    again = load_results(out / "results.nc").sel({"seed": 0})
    one = load_results(out / "soft+tau/seed0/results.nc").sel({"seed": 0, "method": "soft+tau"})
    assert (again["tau"].sel({"method": "soft+tau"}), one["tau"]) == (0, 0)
    for name in ("prediction", "lower", "upper"):
        np.testing.assert_array_equal(again[name].sel({"method": "soft+tau"}), again[name].sel({"method": "soft"}))
        np.testing.assert_array_equal(one[name], again[name].sel({"method": "soft"}))
    assert not np.array_equal(again["prediction"].sel({"method": "soft"}), ds["prediction"].sel({"method": "soft+tau"}))

    # It goes on from the last epoch, whatever the best one is.
    best = load_checkpoint(out / "soft/seed0/checkpoint-best.pt")
    best["model"]["head.bias"][0] += 50
    save_checkpoint(out / "soft/seed0/checkpoint-best.pt", best)
    outcome = here(*SHORT, "--stage-two-epochs", 4, "--methods", "soft+tau", "--tau", 0, "--resume", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    last = load_results(out / "soft+tau/seed0/results.nc").sel({"seed": 0, "method": "soft+tau"})
    np.testing.assert_array_equal(last["prediction"], one["prediction"])


def test_settings_are_chosen_on_validation_and_used(here: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*SHORT, "--methods", "soft+tau", "--tune", "sigma,tau", "--out", out]
    outcome = here(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert (out / "tune/tuning.png").stat().st_size > 1000
    storage = f"sqlite:///{out / 'tune/search.db'}"
    scores = [trial.value for trial in optuna.load_study(study_name="search", storage=storage).trials]
    assert len(scores) == 4
    sigmas = [settings["label_sigma"] for settings in age.TUNABLE["sigma"]]
    chosen = sigmas[int(np.argmin(scores))]
    assert f"Chosen on validation from 4 settings: --label-sigma {chosen}. Curves: " in outcome.out
    page = (out / "report.html").read_text()
    assert "Settings tried on validation" in page
    assert f"Chosen on validation from 4 settings: --label-sigma {chosen}." in page
    assert "LDS weights" not in page  # which soft has not
    # The run has the chosen settings: at the same epochs and seed it is the winning trial again.
    assert json.loads((out / "soft/seed0/config.json").read_text())["label_sigma"] == chosen
    name = "soft/seed0/checkpoint-best.pt"
    same = [equal_bits(out / name, out / f"tune/label_sigma={sigma}/1-epochs" / name) for sigma in sigmas]
    assert same == [sigma == chosen for sigma in sigmas]
    history = (out / "soft/seed0/history.csv").read_text()
    assert min(scores) <= float(history.splitlines()[1].split(",")[history.split(",").index("val_bmae")])

    before = files(out)
    refused = here(*words)
    assert refused.code == 1
    assert re.fullmatch(r"recipes/age\.py: --out must hold no earlier run.* Go on with --resume.*\n", refused.err)
    assert files(out) == before
    outcome = here(*words, "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("done before") == 4
    assert outcome.out.count("finished before") == 1
    after = files(out)
    assert set(after) == set(before)
    assert {name for name in before if "checkpoint" in name or "search" in name if before[name] != after[name]} == set()


def test_a_search_alone_is_not_overwritten_either(here: Callable[..., Outcome], tmp_path: Path) -> None:
    state = tmp_path / "out/tune/search.db"
    state.parent.mkdir(parents=True)
    state.write_text("mine")
    words = [*SHORT, "--methods", "soft", "--tune", "sigma", "--out", "out"]
    outcome = here(*words)
    assert outcome.code == 1
    assert re.fullmatch(
        r"recipes/age\.py: --out must hold no earlier run.* got out/tune/search\.db\. .*\n", outcome.err
    )
    outcome = here(*words, "--resume")
    assert outcome.code == 1
    assert re.fullmatch(r"search: out/tune/search\.db must be the whole state.*\n", outcome.err)
    assert state.read_text() == "mine"
