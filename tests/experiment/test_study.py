"""Studies of a small table, of words and of images, whose trainings take a moment."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import dir_toolkit as dt
from dir_toolkit.errors import CheckpointError, LabelError, RunExistsError, SettingsError, StudyError
from dir_toolkit.experiment.data.images import ImageSet, SampleSet, Splits, content_digest
from dir_toolkit.experiment.results.comparison import leading_methods
from dir_toolkit.experiment.results.drawing import method_colors
from dir_toolkit.experiment.results.headline import headline
from dir_toolkit.experiment.results.schema import load_results
from dir_toolkit.experiment.results.tables import as_text, results_table
from dir_toolkit.experiment.study import Study, Task, Trained, Trial
from dir_toolkit.experiment.training.checkpoint import load_checkpoint
from dir_toolkit.experiment.training.loop import Optimization
from dir_toolkit.experiment.training.runtime import Runtime

BINS, CLASSES = dt.Bins.uniform(0, 10, width=1), dt.Bins.classes(3)
BUDGET = Optimization(epochs=2, batch_size=16, lr=0.01)
RUN_FILES = {"config.json", "env.json", "history.csv", "checkpoint-last.pt", "checkpoint-best.pt", "results.nc"}
RUN_FILES |= {"model.safetensors"}
NOT_TRAINED = {"config.json", "results.nc", "model.safetensors"}


def sample_set(count: int, seed: int, *, classes: bool = False, kind: str = "rows") -> SampleSet:
    random = np.random.default_rng(seed)
    labels = np.minimum(random.exponential(2, count), 9.9).astype(np.float32)
    inputs: np.ndarray = (labels[:, None] + random.normal(size=(count, 4))).astype(np.float32)
    if kind == "words":
        inputs = inputs.clip(0, 9).astype(np.int64)
    elif kind == "images":
        inputs = (20 * inputs.clip(0, 9)).astype(np.uint8).repeat(64, 1).reshape(count, 4, 8, 8)
    if classes:
        labels = labels.astype(np.int64).clip(0, 2)
    rows = np.arange(count)
    made = ImageSet if kind == "images" else SampleSet
    return made(inputs, labels, rows, content_digest(inputs, labels, rows))


def splits(**kind: Any) -> Splits:
    return Splits(*(sample_set(count, seed, **kind) for seed, count in enumerate((60, 20, 40))), "table", {"odd": 2})


class Perceptron(nn.Sequential):
    num_features = 8

    def __init__(self, *first: nn.Module) -> None:
        super().__init__(*first, nn.LazyLinear(8), nn.ReLU())
        self(torch.zeros(2, 4) if not first else torch.zeros(2, 4, dtype=torch.int64))


ROWS = Task(lambda seed: splits(), BINS, lambda data: Perceptron(), "Tests", "size", "cm")


def plain(trial: Trial) -> Trained:
    return trial.fit(trial.model(head="regression"))


def weighted(trial: Trial) -> Trained:
    lds = dt.LDS(trial.bins).fit(trial.density)
    return trial.fit(trial.model(head="regression", weights=lds, fds=dt.FDS(trial.bins, 8)))


def soft(trial: Trial) -> Trained:
    return trial.fit(trial.model(sigma=1.0))


def adjusted(trial: Trial) -> Trained:
    return trial.adjusted(trial.trained("soft", epoch="last"))


def retrained(trial: Trial) -> Trained:
    first = trial.trained("soft")
    dt.stage_two(first.model, "crt", seed=trial.runtime.derive("head"))
    sampler = dt.BinSampler(trial.splits.train.labels, trial.bins, q=0.0)
    return trial.fit(first.model, sampler=sampler, optimization=replace(BUDGET, epochs=1), after=first)


METHODS = {"plain": plain, "weighted": weighted, "soft": soft, "adjusted": adjusted, "retrained": retrained}


def study(folder: Path, task: Any = ROWS, methods: Any = METHODS, **options: Any) -> Study:
    options = {"runtime": Runtime(torch.device("cpu")), "optimization": BUDGET, "command": "test", **options}
    return Study(folder, task, methods, settings={"epochs": 2}, **options)


def names(folder: Path) -> set[str]:
    outcome = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in outcome if "events.out" not in name}


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / f"checkpoint-{which}.pt")["model"]


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether all bits are equal, of NaN too."""
    tensors = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
    equal = all(value.numpy().tobytes() == two[name].numpy().tobytes() for name, value in tensors.items())
    return one.keys() == two.keys() and equal


def numbers(ds: xr.Dataset) -> xr.Dataset:
    return ds.drop_vars("minutes").drop_attrs()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    one = study(folder)
    one.run(seeds=2)
    one.report(title="methods", notes=["A note."], titles={"plain": "regression"})
    return folder


def test_it_leaves_the_files_that_are_promised_and_no_others(finished: Path) -> None:
    trained = {f"{name}/seed{seed}/{file}" for name in METHODS for seed in (0, 1) for file in RUN_FILES}
    trained -= {f"adjusted/seed{seed}/{file}" for seed in (0, 1) for file in RUN_FILES - NOT_TRAINED}
    pictures = {"error-by-region", "error-by-size", "label-density-and-lds-weights", "training", "tau-on-validation"}
    pictures |= {"feature-statistics-of-weighted", "interval-coverage-by-region", "predicted-against-true", "examples"}
    summary = {"results.nc", "table.md", "report.html", *(f"figures/{name}.png" for name in pictures)}
    assert names(finished) == trained | summary


def test_a_run_leaves_its_model_as_it_predicts(finished: Path) -> None:
    model = dt.load(finished / "adjusted/seed1/model.safetensors", Perceptron())
    with xr.open_dataset(finished / "results.nc", engine="scipy") as ds:
        run = ds.sel({"method": "adjusted", "seed": 1})
        assert model.settings["tau"] == run["tau"]
        test = torch.from_numpy(splits().test.inputs)
        np.testing.assert_array_equal(model.predict(test)["prediction"], run["prediction"])
    config = json.loads((finished / "adjusted/seed1/config.json").read_text())
    assert config == {"epochs": 2, "method": "adjusted", "after": "soft"}


def test_the_result_holds_every_run_and_the_constant_predictor(finished: Path) -> None:
    ds = load_results(finished / "results.nc")
    assert ds["method"].values.tolist() == [*METHODS, "constant"]
    assert ds["completed"].values.tolist() == [[1, 1]] * 5 + [[1, 0]]
    assert (ds.attrs["title"], ds.attrs["command"], ds.attrs["label_units"]) == ("Tests: methods", "test", "cm")
    for name in METHODS:
        one = load_results(finished / name / "seed1/results.nc")
        part = numbers(ds.sel({"method": [name], "seed": [1]}))
        xr.testing.assert_identical(numbers(one), part[list(numbers(one).data_vars)])
    data = splits()
    off = np.abs(np.median(data.train.labels) - data.test.labels).mean()
    assert ds["mae"].sel({"method": "constant", "seed": 0, "region": "all"}) == pytest.approx(off, rel=1e-6)
    assert ds["tau"].notnull().all("seed").values.tolist() == [False, False, False, True, False, False]
    intervals = ds["lower"].notnull().all("sample").sel(seed=0).values.tolist()
    assert intervals == [False, False, True, True, True, False]
    held = ((ds["lower"] <= ds["target"]) & (ds["target"] <= ds["upper"])).mean("sample")
    held = held.where(ds["lower"].notnull().all("sample"))
    np.testing.assert_allclose(ds["coverage"].sel(region="all"), held)
    assert "coverage all" in as_text(results_table(ds, columns=[("coverage", "all"), ("width", "all")]))
    page = (finished / "report.html").read_text()
    assert f'<p class="lead">{headline(ds)}</p>' in page
    assert "always the median of the training labels" in page
    assert all(part in page for part in ("A note.", "regression", "Tau on validation"))
    assert str(finished) not in page


@pytest.mark.usefixtures("sketched")
def test_distributions_and_calibrated_intervals_are_judged_by_region(tmp_path: Path) -> None:
    task = replace(ROWS, metrics=lambda density: dt.metrics.DistributionMetrics(density))
    calibrated = lambda trial: trial.calibrated(trial.trained("soft", epoch="last"))  # noqa: E731
    one = study(tmp_path, task, {"soft": soft, "calibrated": calibrated}, level=0.5)
    one.run(["soft"])
    one.report(title="x", columns=["mae", "crps", "pit_mean", "bmase", "sera", ("coverage", "all")])
    header = (tmp_path / "table.md").read_text().splitlines()[0]
    assert all(f"| {name} all |" in header for name in ("MAE", "CRPS", "mean PIT", "bMASE", "SERA", "coverage"))
    assert "CRPS few" in header
    history = (tmp_path / "soft/seed0/history.csv").read_text().splitlines()
    assert history[0].split(",")[4:-1] == ["val_crps"]  # which selects the epoch, too
    data = splits()
    density = dt.LabelDensity.count(data.train.labels, BINS)
    one.run(["calibrated"])
    for name in ("soft", "calibrated"):
        model = dt.load(tmp_path / f"{name}/seed0/model.safetensors", Perceptron())
        with torch.no_grad():
            output = model(torch.from_numpy(data.test.inputs))
        errors = one.runs[task, name, 0].errors
        scored = dt.metrics.distribution_metrics(output.distribution, data.test.labels, density, ends="open")
        xr.testing.assert_allclose(errors["crps"], scored["crps"], rtol=1e-5)
        lower, upper = model.interval(output, 0.5)
        held = dt.metrics.interval_metrics(lower, upper, data.test.labels, density)
        xr.testing.assert_allclose(errors["coverage"], held["coverage"])
        assert errors["lower"].attrs["interval_level"] == 0.5
    assert one.result("x")["lower"].attrs["interval_level"] == 0.5  # of both methods
    assert errors["tau"] == model.settings["tau"]
    assert model.settings["temperature"] != 1
    scores, thresholds = model(torch.from_numpy(data.val.inputs)).scores, model.readout.intervals.thresholds.clone()
    model.calibrate_intervals(scores[1::2], data.val.labels[1::2], 0.5)  # those that have not chosen tau
    torch.testing.assert_close(model.readout.intervals.thresholds, thresholds)


def test_a_level_is_a_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="level must be > 0 and < 1, got 90"):
        study(tmp_path, level=90)


def test_settings_budget_and_data_are_kept(finished: Path) -> None:
    config = json.loads((finished / "retrained/seed1/config.json").read_text())
    assert (config["method"], config["after"], config["epochs"], config["lr"]) == ("retrained", "soft", 1, 0.01)
    env = json.loads((finished / "plain/seed0/env.json").read_text())
    assert env["data"]["sizes"] == {"train": 60, "val": 20, "test": 40}
    assert env["data"]["skipped"] == {"odd": 2}


def test_a_method_goes_on_from_the_network_of_another(finished: Path) -> None:
    ds = load_results(finished / "results.nc").sel(seed=0)
    first, second = weights(finished / "soft/seed0", "best"), weights(finished / "retrained/seed0")
    assert {name for name in first if not torch.equal(first[name], second[name])} <= {"head.weight", "head.bias"}
    assert not same(first, second)
    assert ds["minutes"].sel({"method": "retrained"}) > ds["minutes"].sel({"method": "soft"})
    assert ds["minutes"].sel({"method": "adjusted"}) == ds["minutes"].sel({"method": "soft"})
    assert (
        ds["best_epoch"].sel({"method": "adjusted"}) == BUDGET.epochs
    )  # it takes the last epoch, whatever the best is


def test_the_density_alone_is_not_drawn_twice(tmp_path: Path) -> None:
    one = study(tmp_path)
    one.run(["plain"])
    figures = one._figures(one.result("x"), {})
    assert set(figures) == {"Error by region", "Error by size", "Examples", "Predicted against true", "Training"}


def test_a_network_has_another_name_before_and_after_its_adjustment(tmp_path: Path) -> None:
    one = study(tmp_path)
    one.run(["plain", "adjusted", "retrained"])
    histories = one._histories()
    assert list(histories) == [("plain", 0), ("soft", 0), ("adjusted", 0), ("retrained", 0)]
    trained = one.runs[ROWS, "adjusted", 0].trained
    assert trained is not None
    assert trained.tau is not None
    assert histories["soft", 0] is trained.history
    (row,) = histories["adjusted", 0]
    assert (row["epoch"], row["val_bmae"]) == (BUDGET.epochs, trained.tau.after["bmae"])
    ds = one.result("x")
    colors = one._colors(ds, None)
    assert len({colors[name] for name in ("plain", "soft", "adjusted", "retrained")}) == 4
    compared = one._colors(ds, "plain")
    assert compared == method_colors([*leading_methods(ds, "plain"), *ds["method"].values.tolist(), "soft"])


def test_an_earlier_study_is_refused_and_nothing_is_touched(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in names(finished)}
    with pytest.raises(RunExistsError, match=r"must hold no earlier run, .* got .*checkpoint-last\.pt\. Use --r"):
        study(finished)
    assert {name: (finished / name).read_bytes() for name in names(finished)} == before


def test_resumed_it_repeats_nothing_and_adds_seeds(finished: Path, tmp_path: Path, capsys: Any) -> None:
    one = study(tmp_path)
    one.run(["soft", "plain", "soft"])
    assert set(re.findall(r"^(\w+), seed 0 \(\d of 2\)$", capsys.readouterr().out, re.MULTILINE)) == {"soft", "plain"}
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    again = study(tmp_path, resume=True)
    again.run(["plain", "soft"], seeds=2)
    assert capsys.readouterr().out.count("finished before") == 2
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    ds = again.result("again")
    assert ds["method"].values.tolist() == ["plain", "soft", "constant"]
    whole = load_results(finished / "results.nc").sel({"method": ["plain", "soft", "constant"]})
    np.testing.assert_array_equal(ds["prediction"], whole["prediction"])


def test_with_other_settings_a_run_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    study(tmp_path).run(["plain"])
    again = study(tmp_path, optimization=replace(BUDGET, lr=0.5), resume=True)
    again.run(["plain"])
    with pytest.raises(
        StudyError, match=r"no run .* finished:\n  plain, seed 0: CheckpointError: .*lr was 0.01 and is 0.5"
    ):
        again.report(title="x")
    assert not (tmp_path / "results.nc").exists()


def test_stopped_in_mid_run_and_resumed_it_ends_with_equal_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dir_toolkit.experiment.training.log import RunLog

    usual, steps = RunLog.step, []

    def step(self: RunLog) -> None:
        usual(self)
        steps.append(self)
        if len(steps) == 6:  # within the second run
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", step)
    chosen = ["plain", "weighted"]
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path).run(chosen)
    progress = load_checkpoint(tmp_path / "plain/seed0/checkpoint-last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    study(tmp_path, resume=True).run(chosen)
    for name in chosen:
        for which in ("last", "best"):
            assert same(weights(finished / name / "seed0", which), weights(tmp_path / name / "seed0", which))
    assert not same(weights(finished / "plain/seed0"), weights(tmp_path / "weighted/seed0"))


def broken(trial: Trial) -> Trained:
    raise ZeroDivisionError(f"a bug near {trial.folder}")


def diverging(trial: Trial) -> Trained:
    return trial.fit(trial.model(head="regression"), optimization=replace(BUDGET, lr=1e30, clip_norm=None))


@pytest.mark.usefixtures("sketched")
def test_a_run_that_fails_costs_the_others_nothing_and_is_made_up_for(tmp_path: Path, capsys: Any) -> None:
    methods = {"broken": broken, "plain": plain, "diverging": diverging, "after": lambda trial: trial.trained("broken")}
    one = study(tmp_path, methods=methods)
    one.run()
    with pytest.raises(StudyError) as failed:
        one.report(title="x")
    first, *rest = str(failed.value).splitlines()
    assert first == "these runs failed; --resume tries them again:"
    assert [line.split(":")[0].strip() for line in rest] == ["broken, seed 0", "diverging, seed 0", "after, seed 0"]
    assert "NonFiniteLossError" in rest[1]
    assert "Traceback" in capsys.readouterr().out  # where the run stood, for a fault of our own
    ds = load_results(tmp_path / "results.nc")
    assert ds["method"].values.tolist() == ["plain", "constant"]
    assert "broken, seed 0: ZeroDivisionError: a bug near DIR/broken/seed0" in ds.attrs["failed"]
    assert "Failed: broken, seed 0: ZeroDivisionError" in (tmp_path / "report.html").read_text()
    again = study(tmp_path, methods={**methods, "broken": soft, "diverging": soft}, resume=True)
    again.run(["broken", "plain", "after"])
    again.report(title="x")
    assert load_results(tmp_path / "results.nc")["method"].values.tolist() == ["broken", "plain", "after", "constant"]
    assert "Failed:" not in (tmp_path / "report.html").read_text()


def test_an_unknown_method_is_told_with_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"names must be methods of the study, got plian\. Did you mean plain\?"):
        study(tmp_path).run(["plian"])
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        study(tmp_path).run(seeds=0)
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("sketched")
def test_a_baseline_adds_a_comparison(tmp_path: Path) -> None:
    one = study(tmp_path)
    one.run(["plain", "weighted"])
    one.report(title="x", baseline="plain", replicates=100)
    with (tmp_path / "differences.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"plain", "weighted", "constant"}
    assert (tmp_path / "figures/difference-to-plain--mae.png").exists()


def classes_task(seeds: list[int], **options: Any) -> Task:
    def data(seed: int) -> Splits:
        seeds.append(seed)
        made = splits(classes=True)
        return Splits(sample_set(60, 10 + seed, classes=True), made.val, made.test, made.source, {})

    def metrics(density: dt.LabelDensity) -> dt.ClassificationMetrics:
        return dt.ClassificationMetrics(density, regions=["many", "medium", "few"])

    return Task(data, CLASSES, lambda data: Perceptron(), "Tests", "class", metrics=metrics, **options)


def test_classes_train_on_several_tasks(tmp_path: Path) -> None:
    seeds: list[int] = []
    tasks = [classes_task(seeds, folder=name, shown="{method} on " + name) for name in ("a", "b")]
    methods = {
        "softmax": lambda trial: trial.fit(trial.model()),
        "adjusted": lambda trial: trial.adjusted(trial.trained("softmax")),
    }
    one = study(tmp_path, tasks, methods)
    one.run(seeds=2, keep=lambda trial, trained, output: output.features.shape)
    assert seeds == [0, 0, 1, 1]  # each task was asked once for each seed
    assert {run.extra for run in one.runs.values()} == {(40, 8)}
    ds = one.result("x")
    assert ds["method"].values.tolist() == ["softmax on a", "softmax on b", "adjusted on a", "adjusted on b"]
    assert set(ds.attrs["data"]) == {f"{place}, seed {seed}" for place in "ab" for seed in (0, 1)}
    assert (tmp_path / "b/softmax/seed1/checkpoint-last.pt").exists()
    tested = ds["bin_recall"].sel({"method": "softmax on a", "seed": 0}).mean()
    assert ds["balanced_error"].sel({"method": "softmax on a", "seed": 0, "region": "all"}) == pytest.approx(1 - tested)


@pytest.mark.parametrize("kind", ["words", "images"])
def test_words_and_images_are_learnt_too(kind: str, tmp_path: Path) -> None:
    first = nn.Sequential(nn.Embedding(10, 4), nn.Flatten()) if kind == "words" else None

    def network(data: Splits) -> nn.Module:
        if first is not None:
            return Perceptron(first)
        from dir_toolkit.experiment.backbones import small_resnet

        return small_resnet(width=4, in_channels=4)

    one = study(tmp_path, replace(ROWS, data=lambda seed: splits(kind=kind), network=network))
    one.run(["plain", "soft"])
    assert np.isfinite(one.result("x")["mae"].sel(region="all", seed=0)).all()


def rank_main(rank: int) -> dict[str, float]:
    runtime = Runtime(torch.device("cpu"), rank=rank, world=2)
    one = study(Path("two"), methods={"plain": plain, "weighted": weighted}, runtime=runtime)
    one.run()
    return {name: float(run.errors["mae"].sel(region="all")) for (_, name, _), run in one.runs.items()}


def test_two_ranks_equal_one(two_ranks: Callable[..., list[Any]], finished: Path, tmp_path: Path) -> None:
    first, second = two_ranks(rank_main, timeout=300)
    assert first == second
    for name in ("plain", "weighted"):
        own, one = (load_results(place / name / "seed0/results.nc") for place in (tmp_path / "two", finished))
        np.testing.assert_allclose(own["prediction"], one["prediction"], rtol=1e-4)
        assert first[name] == own["mae"].sel(region="all")
        assert "2 processes" in own.attrs["device"]
        assert names(tmp_path / "two" / name) == names(finished / name) - {f"seed1/{file}" for file in RUN_FILES}
    again = study(tmp_path / "two", resume=True)
    again.run(["plain"])
    assert "number of processes was 2 and is 1" in next(iter(again.failed.values()))


def test_a_fault_of_the_data_ends_the_study(tmp_path: Path) -> None:
    def data(seed: int) -> Splits:
        raise CheckpointError("no such data")

    with pytest.raises(CheckpointError, match="no such data"):
        study(tmp_path, replace(ROWS, data=data)).run()


@pytest.mark.usefixtures("sketched")
def test_a_task_whose_labels_are_missing_in_part(tmp_path: Path) -> None:
    parts = splits()
    holes = []
    for part in (parts.train, parts.val, parts.test):
        labels = part.labels.copy()
        labels[::5] = np.nan
        holes.append(SampleSet(part.inputs, labels, part.rows))
    task = replace(ROWS, data=lambda seed: Splits(*holes, source="table", skipped={}), missing="drop")
    calibrated = lambda trial: trial.adjusted(trial.trained("soft"))  # noqa: E731
    one = study(tmp_path, task, {"plain": plain, "soft": soft, "adjusted": calibrated})
    one.run()
    errors = one.runs[task, "soft", 0].errors
    assert errors["count"].sel(region="all") == errors.sizes["sample"] == 32
    assert np.isfinite(errors["target"]).all()
    constant = one.result("x").sel({"method": "constant", "seed": 0})
    assert np.unique(constant["prediction"]) == pytest.approx(np.nanmedian(holes[0].labels))
    assert constant["count"].sel(region="all") == 32
    one.report(title="x")
    assert (tmp_path / "report.html").exists()
    with pytest.raises(LabelError, match=r"labels must not be NaN, .*missing="):
        study(tmp_path / "raise", replace(task, missing="raise"), {"plain": plain}).run()


def test_the_best_epoch_is_that_of_the_error_that_is_named(tmp_path: Path) -> None:
    outcome: list[Trained] = []

    def selected(trial: Trial) -> Trained:
        outcome.append(trial.fit(trial.model(sigma=1.0), selects="mae/all"))
        return outcome[-1]

    study(tmp_path / "a", methods={"one": selected}, optimization=replace(BUDGET, epochs=4, lr=0.1)).run(
        ["one"], seeds=3
    )

    def best(column: str) -> list[int]:
        return [1 + int(np.argmin([row[column] for row in trained.history])) for trained in outcome]

    assert [trained.epoch for trained in outcome] == best("val_mae") != best("val_bmae")
    wrong = study(tmp_path / "b", methods={"one": lambda trial: trial.fit(trial.model(sigma=1.0), selects="rmsle")})
    wrong.run(["one"], seeds=1)
    assert "selects must be one of 'mae/all', 'mae/medium'" in str(wrong.failed)
