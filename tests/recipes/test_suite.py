"""The suite on one small table."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import running
from running import Outcome, files

import dir_toolkit as dt
from dir_toolkit.experiment.files import FolderLock
from dir_toolkit.experiment.study import Trained, Trial

RECIPE = running.RECIPES / "studies/suite.py"


def make_table(root: Path, rows: int = 90, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, 3))
    y = 10 * random.exponential(1, rows) + x[:, 0]
    lines = ["strength,a,b,c", *(",".join(f"{v:.6g}" for v in row) for row in np.column_stack([y, x]))]
    (root / "tables").mkdir(parents=True)
    with gzip.open(root / "tables/concrete.csv.gz", "wt") as file:
        file.write("\n".join(lines))


def test_help_answers_without_torch(tmp_path: Path) -> None:
    running.check_help_answers_without_torch(RECIPE, tmp_path, "--sets", "--trials")


def errors(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, comment="#")


@pytest.mark.usefixtures("unsynced_database")
def test_methods_are_tuned_alike_and_judged_and_later_sittings_add_to_the_results(
    here: Callable[..., Outcome], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 1, "--epochs", 1]
    names = ["l1", "lds+fds", "long_tail_model", "boosting_lds"]
    outcome = here(*words, "--out", "out", "--results", "kept", "--methods", *names)
    assert (outcome.code, outcome.err) == (0, "")
    rows = errors(tmp_path / "kept/concrete.csv")
    assert rows["method"].tolist() == names
    assert (rows[["mae", "bmae", "bmase"]] > 0).all(axis=None)
    assert rows["crps"].notna().tolist() == [name == "long_tail_model" for name in names]
    tuned = set(names) - {"boosting_lds"}
    for method in tuned:  # as many trials for each
        assert len(list((tmp_path / "out/tune/concrete" / method).glob("lr=*"))) == 2
    assert outcome.out.count("This run was finished before") == len(tuned)  # the best trial is seed 0
    note = (tmp_path / "kept/concrete.csv").read_text().splitlines()[0]
    assert re.match(r"# python recipes/studies/suite.py .*\| commit \S+ \|.*train [0-9a-f]{64}", note)
    assert str(tmp_path) not in note
    differences = pd.read_csv(tmp_path / "kept/concrete-differences.csv").query("metric == 'bmae' and region == 'all'")
    of_lds = differences.set_index("method").loc["lds+fds"]
    bmae = rows.set_index("method")["bmae"]
    np.testing.assert_allclose(of_lds["ratio"], bmae["lds+fds"] / bmae["l1"], rtol=1e-4)
    assert of_lds["ratio_low"] < of_lds["ratio_high"]

    before = files(tmp_path)
    refused = here(*words, "--out", "new", "--results", "kept", "--methods", "l1")
    assert refused.code == 1
    assert files(tmp_path) == before
    more = ["--out", "new", "--results", "kept", "--resume", "--methods", *names]
    assert "all is in kept/concrete.csv already" in here(*words, *more).out
    stopped = here(*words, *more, "coral", "--minutes", 0)
    assert re.search(r"All takes about \d+ minutes.*\n(.*\n)*The 0 minutes are over", stopped.out)
    assert errors(tmp_path / "kept/concrete.csv").equals(rows)
    for other, fault in ((["--epochs", 2], "of epochs 1, and this sitting has epochs 2"), ([], "of other data")):
        if not other:
            make_table(tmp_path / "others", seed=1)
            other = ["--root", "others"]
        mixed = here(*words, *more, "coral", *other, "--out", "mixed")
        assert mixed.code == 1
        assert f"concrete.csv holds results {fault}" in mixed.err
    added = here(*words, *more, "coral", "--seeds", 1)
    assert (added.code, added.err) == (0, "")
    after = errors(tmp_path / "kept/concrete.csv").set_index("method")
    assert set(after.index) == {*names, "coral"}
    np.testing.assert_allclose(after.loc[names, "bmae"], bmae)  # l1 was trained again, for the differences
    compared = pd.read_csv(tmp_path / "kept/concrete-differences.csv")["method"]
    assert {"lds+fds", "coral"} <= set(compared)


@pytest.mark.usefixtures("unsynced_database")
def test_without_trials_all_methods_have_the_same_fixed_settings_and_other_results(
    here: Callable[..., Outcome], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    words = ["--root", "data", "--sets", "concrete", "--seeds", 2, "--epochs", 1, "--out", "out", "--results", "kept"]
    outcome = here(*words, "--trials", 0, "--methods", "l1", "lds", "corn", "boosting")
    assert (outcome.code, outcome.err) == (0, "")
    rows = errors(tmp_path / "kept/concrete.csv")
    settings = {"l1": {"weight_decay": 1e-4}, "lds": {"scheme": "sqrt_inverse"}, "corn": {"width": 0.0}}
    expected = {method: {"lr": 2e-3, **own} for method, own in settings.items()} | {"boosting": {}}
    assert dict(zip(rows["method"], rows["setting"].map(json.loads), strict=True)) == expected
    assert rows["seed"].tolist() == [0, 1] * 4
    assert (rows[["trials", "tuning_seconds"]] == 0).all(axis=None)
    assert not (tmp_path / "out/tune").exists()
    refused = here(*words, "--trials", 2, "--resume", "--methods", "srl")
    assert "concrete.csv holds results of trials 0, and this sitting has trials 2" in refused.err


@pytest.mark.parametrize(("count", "rates"), [(2, 2), (4, 4), (8, 4)])
def test_every_method_has_the_same_learning_rates_equally_often(count: int, rates: int) -> None:
    pytest.importorskip("optuna")
    suite = runpy.run_path(str(RECIPE))
    for knobs in (knobs for knobs, _ in suite["METHODS"].values() if knobs is not None):
        trials = suite["trials_of"](knobs, count)
        tried = [trial["lr"] for trial in trials]
        expected = [1e-2, 3e-3, 3e-2, 1e-3][:rates]
        assert sorted(tried) == sorted(expected * (len(trials) // rates))
        assert len({tuple(trial.items()) for trial in trials}) == len(trials) == count
        assert trials[: count // 2] == suite["trials_of"](knobs, count // 2)[: count // 2]  # more trials only add
        for knob in knobs:
            met = {trial["lr"] for trial in trials if knob.items() <= trial.items()}
            assert len(met) == len(trials) / len(knobs)  # at 8 trials each value meets each rate


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--methods soft wide", "--methods must name some of .* got wide"),
        ("--sets moon", "--sets must name some of .* got moon"),
        ("--trials 3", "--trials must be 0, 2, 4 or 8, got 3"),
    ],
)
def test_what_cannot_run_is_told(tmp_path: Path, here: Callable[..., Outcome], words: str, rule: str) -> None:
    pytest.importorskip("optuna")
    outcome = here("--root", "data", *words.split())
    assert outcome.code == 1
    expected = rf"recipes/studies/suite\.py: these settings cannot run:\n  {rule}.*\.\n"
    assert re.fullmatch(expected, outcome.err), outcome.err
    assert files(tmp_path) == {}


def test_a_missing_file_of_a_later_set_is_found_before_anything_trains(
    tmp_path: Path, here: Callable[..., Outcome]
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    outcome = here("--root", "data", "--sets", "concrete", "rain", "--methods", "l1", "--epochs", 1, "--trials", 2)
    assert outcome.code == 1
    assert "rain_ibk.csv.gz" in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("unsynced_database")
def test_a_method_that_breaks_costs_the_others_nothing_and_a_prior_is_adjusted_after_the_least_mae(
    tmp_path: Path, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    fit, selects = Trial.fit, set()

    def watched(trial: Trial, model: Any, **options: Any) -> Trained:
        selects.add((trial.method, options.get("selects")))
        return fit(trial, model, **options)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trial, "fit", watched)
    monkeypatch.setattr(dt.losses, "DistLoss", broken)
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 1, "--epochs", 1, "--out", "out"]
    outcome = here(*words, "--methods", "dist_loss", "soft+tau", "soft")
    assert outcome.code == 0, outcome.err
    assert "RuntimeError: out of memory" in outcome.out
    assert errors(tmp_path / "out/concrete.csv")["method"].tolist() == ["soft+tau", "soft"]
    (failed,) = pd.read_csv(tmp_path / "out/concrete-failed.csv").itertuples()
    assert failed.method == "dist_loss"
    assert "out of memory" in failed.reason
    assert selects == {("soft+tau", "mae/all"), ("soft", None)}


@pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning")  # the table has little to learn
@pytest.mark.usefixtures("unsynced_database")
def test_methods_that_differ_after_training_alone_share_their_trainings(
    tmp_path: Path, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data", rows=300)
    fit, folders = Trial.fit, []

    def watched(trial: Trial, model: Any, **options: Any) -> Trained:
        if not (trial.folder / "history.csv").exists():
            folders.append(trial.folder)
        return fit(trial, model, **options)

    monkeypatch.setattr(Trial, "fit", watched)
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 2, "--epochs", 2]
    names = ["l1", "long_tail_model", "long_tail_model+bias"]
    outcome = here(*words, "--out", "out", "--results", "kept", "--methods", *names)
    assert (outcome.code, outcome.err) == (0, "")
    assert len(folders) == len(set(folders))
    assert sum("long_tail_model" in folder.parts for folder in folders) in (
        3,
        4,
    )  # two of half the epochs, then the best
    assert not any("long_tail_model+bias" in folder.parts for folder in folders)
    together = errors(tmp_path / "kept/concrete.csv")
    assert len(together) == 2 * len(names)
    alone = here(*words, "--out", "new", "--results", "other", "--methods", "l1", "long_tail_model+bias")
    assert alone.code == 0
    part = errors(tmp_path / "other/concrete.csv")
    same = ["mae", "bmae", "few", "setting", "method", "seed"]
    expected = together[together["method"] != "long_tail_model"].reset_index(drop=True)
    pd.testing.assert_frame_equal(part[same], expected[same])


@pytest.mark.filterwarnings("ignore::dir_toolkit.errors.DirToolkitWarning")  # the table has little to learn
@pytest.mark.usefixtures("unsynced_database")
def test_ensembles_average_networks_of_other_seeds_with_the_settings_of_one(
    tmp_path: Path, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data", rows=300)
    fit, seeds = Trial.fit, []

    def watched(trial: Trial, model: Any, **options: Any) -> Trained:
        if not (trial.folder / "history.csv").exists() and "tune" not in trial.folder.parts:
            seeds.append((trial.folder.parent.name.partition("-")[0], trial.runtime.seed))
        return fit(trial, model, **options)

    monkeypatch.setattr(Trial, "fit", watched)
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 2, "--epochs", 2, "--results", "kept"]
    names = ["l1", "long_tail_model", "l1_ensemble", "long_tail_model_ensemble", "long_tail_model_ensemble+bias"]
    assert here(*words, "--out", "out", "--methods", *names[:2], "long_tail_model+bias").code == 0
    seeds.clear()
    outcome = here(*words, "--out", "new", "--resume", "--methods", *names[2:])
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(set(seeds)) == [(kind, seed) for kind in ("l1", "long_tail_model") for seed in range(6)]
    assert len(seeds) == 12  # each is trained once, and nothing is tuned again
    assert not (tmp_path / "new/tune").exists()
    made = errors(tmp_path / "kept/concrete.csv").set_index(["method", "seed"])
    for name in names[2:]:
        member = name.replace("_ensemble", "")
        assert made.loc[(name, 1), "setting"] == made.loc[(member, 1), "setting"]
        assert made.loc[(name, 1), "tuning_seconds"] == made.loc[(member, 1), "tuning_seconds"]
        assert made.loc[(name, 1), "mae"] != made.loc[(member, 1), "mae"]
    # Without results of the networks that are averaged their settings are searched for, once.
    alone = here(*words[:-1], "other", "--out", "alone", "--methods", "l1_ensemble", "l1")
    assert (alone.code, alone.err) == (0, "")
    of_ensemble, of_one = (errors(tmp_path / "other/concrete.csv").query("method == @name") for name in names[2::-2])
    assert of_ensemble["setting"].tolist() == of_one["setting"].tolist()
    assert (of_ensemble["tuning_seconds"].to_numpy() == of_one["tuning_seconds"].to_numpy()).all()


def test_uci_dir_is_judged_on_evenly_spread_labels(tmp_path: Path) -> None:
    make_table(tmp_path, rows=300)
    task = runpy.run_path(str(RECIPE))["task_of"]("concrete_dir", tmp_path, None)
    splits = task.data(0)
    parts = (splits.train, splits.val, splits.test)
    assert sorted(np.concatenate([part.rows for part in parts])) == list(range(300))
    units = [np.unique(np.floor(part.labels), return_counts=True) for part in parts]
    of_train = dict(zip(*units[0], strict=True))
    for unit, count in zip(*units[2], strict=True):
        assert count == min(4, (2 * count + of_train[unit]) // 3)
    assert [len(units[1][0]), units[1][1].tolist()] == [len(units[2][0]), units[2][1].tolist()]
    assert np.diff(task.bins.edges).tolist() == [1.0] * len(task.bins)
    assert [layer.out_features for layer in task.network(splits) if hasattr(layer, "out_features")] == [20, 30, 10]


@pytest.mark.usefixtures("unsynced_database")
def test_faces_are_read_and_compared(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    pytest.importorskip("optuna")
    running.make_faces(tmp_path / "data/utkface/UTKFace", ages=(3, 20, 40, 60, 90))
    words = ["--root", "data", "--sets", "utkface", "--trials", 2, "--seeds", 1, "--epochs", 1, "--rows", 20]
    outcome = here(*words, "--precision", "bf16", "--out", "out", "--methods", "l1", "median")
    assert (outcome.code, outcome.err) == (0, "")
    rows = errors(tmp_path / "out/utkface.csv")
    assert (rows["rows"] == 20).all()
    assert (rows[["mae", "bmae"]] > 0).all(axis=None)
    assert ", bf16 | train" in (tmp_path / "out/utkface.csv").read_text().splitlines()[0]
    other = here(*words, "--resume", "--out", "out", "--methods", "l1", "median", "mse")
    assert other.code == 1
    assert "utkface.csv holds results of another --precision. Choose the same" in other.err


@pytest.mark.skipif(os.name != "posix", reason="other systems cannot lock a folder")
def test_two_sittings_at_once_do_not_write_to_the_same_results(tmp_path: Path, here: Callable[..., Outcome]) -> None:
    make_table(tmp_path / "data")
    (tmp_path / "kept").mkdir()
    lock = FolderLock(tmp_path / "kept")
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 1, "--epochs", 1, "--methods", "median"]
    refused = here(*words, "--results", "kept")
    assert refused.code == 1
    assert "--results must be of no other suite at work, got kept. Wait for it" in refused.err
    lock.release()
    assert here(*words, "--results", "kept").code == 0


@pytest.mark.usefixtures("unsynced_database")
def test_a_sitting_that_ends_inside_a_method_leaves_nothing_of_it(
    tmp_path: Path, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    make_table(tmp_path / "data")
    fit = Trial.fit

    def stopped(trial: Trial, model: Any, **options: Any) -> Trained:
        if (trial.method, trial.runtime.seed) == ("mse", 1):
            raise KeyboardInterrupt
        return fit(trial, model, **options)

    monkeypatch.setattr(Trial, "fit", stopped)
    words = ["--root", "data", "--sets", "concrete", "--trials", 2, "--seeds", 2, "--epochs", 1, "--out", "out"]
    assert here(*words, "--methods", "l1", "median", "mse").code == 130
    assert errors(tmp_path / "out/concrete.csv")["method"].unique().tolist() == ["l1", "median"]
    assert "mse" not in set(pd.read_csv(tmp_path / "out/concrete-differences.csv")["method"])
