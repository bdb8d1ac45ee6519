"""The tests of the recipes share ``running.py``, which pytest's importlib mode does not put on the path."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from running import Outcome


@pytest.fixture
def here(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """The test module's RECIPE within this process, which spares the seconds in which torch is loaded, in tmp_path."""
    script = request.module.RECIPE
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIR_TOOLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script

    def run_here(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
        message: object = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            message = end.code
        told = capsys.readouterr()
        if isinstance(message, str):  # which Python then writes to stderr, as its exit code is 1
            return Outcome(1, told.out, f"{told.err}{message}\n")
        return Outcome(message or 0, told.out, told.err)

    return run_here
