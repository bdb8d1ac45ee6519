"""The README's examples run, what pages name exists, and the README stays short."""

import os
import re
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import dir_toolkit as dt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # which pytest's importlib mode does not

import tutorials  # noqa: E402

REAL = Path(os.environ.get("DIR_TOOLKIT_DATA", ROOT.parent / "shared" / "data"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# What makes the guide's example small enough for a test.
SMALLER = {"portraits(4000, 1010, 1010)": "portraits(101, 535, 101)", "epochs=20": "epochs=1"}


def words(text: str) -> list[str]:
    return re.sub(r"NaN|nan|[\d.,]*\d", "#", text).split()  # digits differ between machines


def test_the_examples_run_and_print_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    first, *others = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(first, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```\n(.*?)```", README.partition("It prints")[2].partition("##")[0], flags=re.DOTALL)

    assert words(printed)[: len(words(shown))] == words(shown)
    assert [region for region in ("all", "many", "medium", "few", "unseen") if region not in printed] == []
    before, after = map(float, re.findall(r"bMAE from (\S+) to ([\d.]*\d)", printed)[0])
    assert after < 0.9 * before
    for example in others:
        exec(compile(example, "README.md", "exec"), names)
    assert {"table", "fds"} <= set(names)


def smaller(code: str) -> str:
    for whole, part in SMALLER.items():
        code = code.replace(whole, part)
    return code


@pytest.mark.parametrize("page", ["start", "concepts", "porting", "faq"])
def test_the_code_of_the_guide_runs_and_prints_what_it_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "safetensors", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert len(tutorials.CELL.findall(text)) > 4
    warnings.simplefilter("ignore", dt.errors.DirToolkitWarning)
    for shown, printed in tutorials.run(text, smaller):
        if page == "start":
            assert words(printed)[:10] == words(shown)[:10]
        else:
            assert printed.split() == shown.split()
    pictures = [Path(link) for link in tutorials.PICTURE.findall(text)]
    drawn = {path.name for path in pictures if path.parent.name != "concepts"}  # tests/test_concepts.py draws these
    assert drawn <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("page", [page for page in tutorials.gallery() if page != "start.md"])
def test_a_page_of_the_gallery_prints_what_it_shows_and_draws_its_picture(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for package in re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    shown, printed = map("".join, zip(*tutorials.run(text), strict=True))
    assert words(printed) == words(shown)
    was, now = ([float(number) for number in re.findall(r"\d+\.?\d*", one)] for one in (shown, printed))
    assert len(was) > 4
    # Training differs a little between machines, and one error of few labels may differ much.
    assert statistics.median(abs(a - b) / max(abs(a), 0.1) for a, b in zip(was, now, strict=True)) < 0.1
    assert Path(tutorials.PICTURE.findall(text)[0]).name in {path.name for path in tmp_path.iterdir()}


def test_the_gallery_shows_each_tutorial_by_a_small_copy_of_its_picture() -> None:
    image = pytest.importorskip("PIL.Image")
    pages = tutorials.gallery()
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert written
    assert written <= set(pages)
    for page in pages:
        path = ROOT / "docs" / page
        small = tutorials.small(path.parent / tutorials.PICTURE.findall(path.read_text(encoding="utf-8"))[0])
        shown = image.open(ROOT / "docs" / tutorials.thumbnail(page)).convert("RGB")
        assert shown.size == small.size
        assert np.abs(np.asarray(shown, dtype=float) - np.asarray(small)).mean() < 2, page


@pytest.mark.parametrize("card", ["digits", "portraits"])
def test_the_samples_in_a_data_card_are_those_of_its_reader(card: str) -> None:
    for package in ("PIL", "sklearn"):
        pytest.importorskip(package)
    path = ROOT / "data_cards" / f"{card}.png"
    assert f"({path.name})" in path.with_suffix(".md").read_text(encoding="utf-8")
    shown = np.asarray(pytest.importorskip("PIL.Image").open(path).convert("RGB"), dtype=float)
    made = np.asarray(tutorials.samples(card))
    assert shown.shape == made.shape
    assert np.abs(shown - made).mean() < 8  # of 255: the file has 96 colours
    assert np.abs(shown - made[:, ::-1]).mean() > 20


@pytest.mark.skipif(not (REAL / "tables").is_dir(), reason="the real tables, series and texts are not there")
@pytest.mark.parametrize("job", ["table", "sentences", "series"])
def test_the_jobs_from_a_raw_file_run(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = blocks[["table", "sentences", "series"].index(job)].replace('"data/', f'"{REAL.as_posix()}/')
    assert len(code.split("\n")) < 30
    for usual, brief in (  # a part of an epoch shows that it runs
        (r"range\(\d\)", "range(1)"),
        (r"randperm\(len\(y\)\)", "randperm(len(y))[:1000]"),
        (r'"absolute_error"', '"absolute_error", max_iter=5'),
        (r"Regressor\(random_state=0", "Regressor(random_state=0, epochs=1"),
    ):
        code = re.sub(usual, brief, code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dt.errors.DirToolkitWarning)
        exec(compile(code, "jobs.md", "exec"), {"__name__": "jobs"})
    assert "'few': " in capsys.readouterr().out.splitlines()[-1]


def test_the_code_that_averages_networks_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8").split("## Several networks")[1].split("\n## ")[0]
    torch.manual_seed(0)
    x, y = torch.randn(4000, 3), 20 * torch.rand(4000) ** 2

    def untrained() -> dt.LongTailModel:
        return dt.LongTailModel.for_labels(torch.nn.Linear(3, 8), 8, y, bins=dt.Bins.uniform(0, 20, width=1))

    names: dict[str, Any] = {"torch": torch, "dt": dt, "x": x, "y": y, "validation": (x, y)}
    names |= {"untrained": untrained, "trained": lambda model: model}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dt.errors.DirToolkitWarning)  # that inputs tell nothing
        exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), names)
    assert capsys.readouterr().out.count("chosen on 4,000 labels") == 2
    assert len(names["models"]) == 5
    said = names["teacher"](x).distribution
    far, near = ((m(x).scores.softmax(1) - said).abs().mean() for m in (untrained(), names["student"]))
    assert near < far / 2


@pytest.mark.filterwarnings("ignore:The inplace keyword", "ignore:Consolidated metadata")  # of dask and of zarr
def test_the_code_for_labels_in_dask_weighs_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pyarrow", "zarr"):
        pytest.importorskip(package)
    dd, pd = pytest.importorskip("dask.dataframe"), pytest.importorskip("pandas")
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8").split("## Labels that do not fit")[1]
    monkeypatch.chdir(tmp_path)
    labels = np.random.default_rng(0).gamma(4, 8, 10_000).clip(0, 119)
    dd.from_pandas(pd.DataFrame({"y": labels}), npartitions=4).to_parquet("data/labels")
    xr.Dataset({"y": ("sample", labels)}).chunk(sample=2500).to_zarr("data/labels.zarr")
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), {"__name__": "jobs"})
    assert "10000 labels in 120 bins" in capsys.readouterr().out
    expected = dt.LDS(dt.Bins.uniform(0, 120, width=1)).fit(labels).sample_weight(labels)
    np.testing.assert_array_equal(dd.read_parquet("data/weighted")["weight"].compute(), expected)
    np.testing.assert_array_equal(xr.open_zarr("data/weights.zarr")["weight"], expected)


def test_the_code_of_the_page_on_runs_trains_on_sequences_with_missing_labels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "running.md").read_text("utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "running.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "chosen on 1," in printed  # some 1,700 of the 2,400 labels of validation are there
    assert "(sample: 100, step: 24)" in printed
    errors = (names["model"].eval()(names["x"][200:]).prediction - names["y"][200:]).abs()
    assert errors.nanmean() < 0.7 * (names["y"][200:] - names["y"][:200].nanmedian()).abs().nanmean()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_file_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text)
    named = re.findall(
        r"`((?:tests|dir_toolkit|recipes|benchmarks|data_cards|labels|features|heads|losses|metrics)/[\w/.]+)`", text
    )
    assert linked or named
    places = (ROOT, page.parent, ROOT / "dir_toolkit")
    assert [name for name in {*linked, *named} if not any((place / name).exists() for place in places)] == []


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000
    assert max(map(len, README.splitlines())) <= 120


def test_the_command_that_ci_runs_is_the_one_that_is_printed() -> None:
    assert re.search(r"^python -m pip install .* && python -m pytest$", README, flags=re.MULTILINE)
