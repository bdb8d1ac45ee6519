"""The tests of the recipes share ``running.py``, which pytest's importlib mode does not put on the path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from running import Outcome, run_here


@pytest.fixture
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The test module's RECIPE within this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return partial(run_here, request.module.RECIPE, tmp_path)
