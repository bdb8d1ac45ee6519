"""How long a user waits before anything happens: the import, over that of torch, and ``--help``.

    python benchmarks/startup.py

Every measurement is a fresh process. Takes half a minute on two CPU cores.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from timing import Report, medians, milliseconds

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main(report: Report) -> None:
    commands = {
        "import torch": ("-c", "import torch"),
        "import dir_toolkit": ("-c", "import dir_toolkit"),
        "recipes/age.py --help": (str(RECIPES / "age.py"), "--help"),
        "recipes/mnist.py --help": (str(RECIPES / "mnist.py"), "--help"),
    }
    times = medians({name: partial(python, *command) for name, command in commands.items()}, repeats=9, warmup=1)
    detail = milliseconds(times)
    report.add(
        "import dir_toolkit / import torch", times["import dir_toolkit"] / times["import torch"], "<= 1.1", detail
    )
    for name in ("recipes/age.py --help", "recipes/mnist.py --help"):
        report.add(name, times[name], "<= 0.3", unit="s")


if __name__ == "__main__":
    main(Report())
