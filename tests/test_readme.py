"""The README's example runs, its paths exist, and it stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_the_other_and_print_errors_by_region(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        if "print(" not in example:
            continue
        assert [region for region in ("all", "many", "medium", "few", "unseen") if region not in printed] == []
    assert {"tau", "fds", "scores"} <= set(names)


def test_every_file_it_names_exists() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named = re.findall(
        r"`((?:tests|dir_toolkit|recipes|benchmarks|data_cards|labels|features|heads|losses|metrics)/[\w/.]+)`", README
    )
    assert linked
    assert named
    missing = [
        name for name in {*linked, *named} if not ((ROOT / name).exists() or (ROOT / "dir_toolkit" / name).exists())
    ]
    assert not missing


def test_it_stays_under_200_lines() -> None:
    assert README.count("\n") < 200


def test_the_command_that_ci_runs_is_the_one_that_is_printed() -> None:
    assert re.search(r"^python -m pip install .* && python -m pytest$", README, flags=re.MULTILINE)
