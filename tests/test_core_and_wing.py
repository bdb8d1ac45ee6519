"""The core works without the wing and without any extra, and never imports the wing."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import dir_toolkit

NEEDED = {"torch", "numpy", "scipy", "xarray"}
LATE = {"safetensors"}  # imported where they are used
EXTRAS = [
    "tensorboard",
    "tyro",
    "rich",
    "PIL",
    "matplotlib",
    "jinja2",
    "sklearn",
    "optuna",
    "pooch",
    "timm",
    "torchvision",
    "lightning",
    "transformers",
    "torchmetrics",
    "lightgbm",
    "safetensors",
    "dask",
]
ROOT = Path(dir_toolkit.__file__).parent
CORE = [
    name
    for _, name, _ in pkgutil.walk_packages([str(ROOT)], "dir_toolkit.")
    if not name.startswith(("dir_toolkit.experiment", "dir_toolkit.integrations"))
]
OPTIONAL = {"xarray", "pandas", "matplotlib", "rich", "PIL", "sklearn", "tensorboard", "torchvision", "timm", "tyro"}
FRESH = """
import importlib, sys
import torch
print(*sys.modules)
import dir_toolkit
print(*sys.modules)

for name in [name for name in sys.modules if name.partition(".")[0] == "dir_toolkit"]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(%r))  # so that importing one of them fails
for name in %r:
    importlib.import_module(name)
import dir_toolkit as dt
bins = dt.Bins.uniform(0, 9, width=1)
labels = torch.arange(9.0)
density = dt.LabelDensity.count(labels, bins)
model = dt.LongTailModel(torch.nn.Linear(2, 3), 3, bins, density=density, weights=dt.LDS(bins).fit(labels))
output = model(torch.zeros(9, 2), labels)
output.loss.backward()
print(*dt.regression_metrics(output.prediction, labels, density).data_vars)
"""


def imported(file: Path) -> Iterator[str]:
    """The full name of each module that a file imports, wherever in it."""
    package = [dir_toolkit.__name__, *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*start, *filter(None, [node.module])])
            yield from (".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names)


@pytest.mark.parametrize("name", CORE)
def test_no_module_of_the_core_imports_the_wing_or_a_library_that_it_does_not_need(name: str) -> None:
    path = ROOT.joinpath(*name.split(".")[1:])
    names = list(imported(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")))
    assert [other for other in names if other.startswith("dir_toolkit.experiment")] == []
    known = NEEDED | LATE | set(sys.stdlib_module_names) | {"dir_toolkit", ""}
    assert {other.partition(".")[0] for other in names} - known == set()


def test_a_wing_that_the_core_would_import_is_seen() -> None:
    assert any(
        name.startswith("dir_toolkit.experiment") for name in imported(ROOT / "experiment" / "training" / "loop.py")
    )


def test_a_process_imports_little_with_the_package_and_trains_without_the_wing_and_the_extras() -> None:
    """The package imports no optional library, and neither SciPy nor torch's compiler, each slower than all of ours,
    before it is used. The core then trains where the wing and the extras are blocked."""
    assert set(EXTRAS) & set(packages_distributions())  # else this test would see nothing
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH % (["dir_toolkit.experiment", *EXTRAS], CORE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    by_torch, loaded, metrics = (set(line.split()) for line in done.stdout.splitlines())
    assert "torch" in by_torch
    assert "dir_toolkit.labels.bins" in loaded - by_torch
    assert not {name.partition(".")[0] for name in loaded} & OPTIONAL
    assert not [name for name in loaded - by_torch if name.startswith(("scipy", "torch._dynamo", "sympy"))]
    assert {"mae", "bmae"} <= metrics
