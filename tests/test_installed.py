"""What is not code comes along with the package, wherever it was imported from, and so do recipes and data cards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

import dir_toolkit
from dir_toolkit.__main__ import main
from dir_toolkit._home import HOME

CARRIED = ("recipes", "data_cards")
"""The folders that a wheel holds inside the package."""


@pytest.mark.parametrize("name", ["py.typed", "experiment/results/report.html.jinja"])
def test_the_package_holds_its_files(name: str) -> None:
    assert resources.files(dir_toolkit).joinpath(name).is_file()


def test_the_distribution_has_the_version_of_the_package() -> None:
    assert metadata.version("dir_toolkit") == dir_toolkit.__version__


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """What ``dir-toolkit`` ends with."""
    monkeypatch.setattr(sys, "argv", ["dir-toolkit", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A folder that holds package, recipes and data cards as an installed wheel does."""
    home = tmp_path / "site" / "dir_toolkit"
    for source, goal in ((Path(dir_toolkit.__file__).parent, home), *((HOME / n, home / n) for n in CARRIED)):
        shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__", *CARRIED))
    return home.parent


def started(wheel: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with these words, where such a wheel is installed and far from a checkout."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=wheel.parent,
        env={**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_lists_all_recipes_in_groups_with_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dir-toolkit"])
    main()
    listed = capsys.readouterr().out
    names = re.findall(r"^  (\S+) +\w.{10,60}$", listed, flags=re.MULTILINE)
    assert {"age", "mnist", "table", "predict", "studies/compare"} <= set(names)
    assert not {"command_line", "comparing", "studies/faces"} & set(names)
    assert re.findall(r"^(\w+).*:$", listed, flags=re.MULTILINE) == ["recipes", "studies"]
    assert (HOME / "data_cards" / "mnist.md").is_file()
    assert listed.endswith(f"{HOME / 'data_cards'}.\n")


def test_the_command_tells_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dir-toolkit", "--version"])
    main()
    assert capsys.readouterr().out == f"dir_toolkit {dir_toolkit.__version__}\n"


def test_a_recipe_of_another_name_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "dir-toolkit: the recipe must be one that dir-toolkit --help lists, got mnsit. Did you mean mnist?"
    assert called(monkeypatch, "mnsit") == message


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "command_line", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    message = str(called(monkeypatch, "age"))
    assert re.fullmatch(r'dir-toolkit age: tyro must be installed, .*\. pip install "dir_toolkit\[recipes]"', message)


def test_a_missing_library_of_the_integrations_is_one_of_that_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    monkeypatch.setitem(sys.modules, "lightning", None)
    message = str(called(monkeypatch, "with_lightning"))
    assert message.startswith("dir-toolkit with_lightning: lightning must be installed, ")
    assert message.endswith('pip install "dir_toolkit[integrations]"')


@pytest.mark.parametrize("words", ["age --help", "studies/compare --help"])
def test_an_installed_recipe_answers_help_in_words_of_the_command(words: str, wheel: Path) -> None:
    pytest.importorskip("tyro")
    done = started(wheel, "-m", "dir_toolkit", *words.split())
    assert (done.returncode, done.stderr) == (0, "")
    name = words.split()[0]
    assert f"usage: dir-toolkit {name} " in done.stdout
    assert f"    dir-toolkit {name} --data utkface" in done.stdout
    assert ("torchrun --nproc_per_node 2 -m dir_toolkit age ..." in done.stdout) == (name == "age")
    assert not re.search(r"\w\.(py|md)\b", done.stdout)


def test_an_installed_recipe_runs_and_says_how_it_was_called(wheel: Path) -> None:
    for name in ("tyro", "sklearn", "matplotlib", "jinja2"):
        pytest.importorskip(name)
    words = "mnist --epochs 1 --methods softmax --out run"
    done = started(wheel, "-W", "error", "-m", "dir_toolkit", *words.split())
    assert (done.returncode, done.stderr) == (0, "")
    report = (wheel.parent / "run" / "report.html").read_text(encoding="utf-8")
    assert "dir-toolkit mnist --epochs 1 --methods softmax --out DIR" in report
    assert "recipes/" not in report

    again = started(wheel, "-m", "dir_toolkit", *words.split())
    assert again.returncode == 1
    refused = started(wheel, "-m", "dir_toolkit", "mnist", "--root", "nowhere")
    assert refused.stderr.startswith("dir-toolkit mnist: these settings cannot run:\n  --root must name")
    assert refused.returncode == 1


@pytest.mark.parametrize("folder", [HOME / "recipes", Path(dir_toolkit.__file__).parent], ids=["recipes", "package"])
def test_files_that_are_named_come_along(folder: Path) -> None:
    named = {
        name
        for path in folder.rglob("*.py")
        for name in re.findall(
            r"\b(?:recipes|data_cards|docs|tests|benchmarks)/[\w/]+\.\w+", path.read_text(encoding="utf-8")
        )
    }
    assert named
    assert [name for name in named if not name.startswith(("recipes/", "data_cards/"))] == []
    assert [name for name in named if not (HOME / name).is_file()] == []
