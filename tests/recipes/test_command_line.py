"""What all recipes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
PROGRAM = """
import sys
from dataclasses import dataclass
sys.path.insert(0, {recipes!r})
from command_line import parse, run

@dataclass
class Settings:
    number: int = 0

def main(settings):
    print("2.5 ± 0.1 at τ = 1", flush=True)
    raise OSError("no τ")

run(main, parse(Settings))
"""


def test_a_terminal_that_is_not_of_utf_8_shows_what_it_can() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(recipes=str(RECIPES))],
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [b"2.5 \xb1 0.1 at ? = 1"]
    assert done.stderr.startswith(b"OSError: no ?. Files written before are intact")
    assert done.returncode == 1
