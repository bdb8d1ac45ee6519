from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dir_toolkit

OPTIONAL = {"xarray", "matplotlib", "pandas", "rich", "PIL", "sklearn", "tensorboard", "torchvision", "timm", "tyro"}


def exported() -> list[str]:
    tree = ast.parse(Path(dir_toolkit.__file__).read_text())
    return [alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def test_every_name_is_public_documented_and_listed_where_it_is_made() -> None:
    names = exported()
    assert {"Bins", "LabelDensity", "LDS", "FDS", "weighted_l1", "RegressionMetrics"} <= set(names)
    assert len(names) == len(set(names))
    for name in names:
        value = getattr(dir_toolkit, name)
        assert value.__doc__, name
        home = sys.modules[value.__module__]
        assert name in home.__all__, name
        assert getattr(home, name) is value


def test_importing_the_package_imports_no_optional_library() -> None:
    code = "import sys, dir_toolkit; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded  # else this test would see nothing
    assert not loaded & OPTIONAL


def test_importing_the_package_takes_little_longer_than_importing_torch() -> None:
    """Neither SciPy nor torch's compiler, each slower than all of ours, is imported before it is used."""
    code = "import sys, torch; old = set(sys.modules); import dir_toolkit; print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "dir_toolkit.labels.bins" in loaded  # else this test would see nothing
    assert not [name for name in loaded if name.startswith(("scipy", "torch._dynamo", "sympy"))]
