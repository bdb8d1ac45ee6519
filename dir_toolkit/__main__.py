"""The command ``dir-toolkit``, also ``python -m dir_toolkit``, which runs the recipes."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

from . import __version__
from ._home import HOME

__all__ = ["main", "overview", "recipes"]

_GROUPS = {"recipes": "recipes", "studies, which compare many methods": "recipes/studies"}
_INTEGRATIONS = ("lightgbm", "lightning", "torchmetrics", "transformers")


def recipes(folder: str) -> dict[str, Path]:
    """The files of a folder that can be run, by the names that the command knows."""
    files = sorted((HOME / folder).glob("*.py"))
    scripts = [file for file in files if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    return {file.relative_to(HOME / "recipes").with_suffix("").as_posix(): file for file in scripts}


def overview() -> str:
    """All recipes in groups, one line each: its name, and what its docstring begins with."""
    lines = [
        "usage: dir-toolkit RECIPE [OPTIONS], where --help after a recipe lists its options; or dir-toolkit --version"
    ]
    for title, folder in _GROUPS.items():
        lines += ["", f"{title}:"]
        for name, file in recipes(folder).items():
            about = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
            lines.append(f"  {name:<22} {about.partition(':')[0].rstrip('.')}")
    where = f"Each is a file in {HOME / 'recipes'}.", f"Data cards say where to get data: {HOME / 'data_cards'}."
    return "\n".join([*lines, "", *where])


def main() -> None:
    """Run the recipe that the command line names as Python would run its file, or list all of them, or tell the
    version."""
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        print(f"dir_toolkit {__version__}")
        return
    known = {name: file for folder in _GROUPS.values() for name, file in recipes(folder).items()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        fix = f" Did you mean {' or '.join(near)}?" * bool(near)
        sys.exit(f"dir-toolkit: the recipe must be one that dir-toolkit --help lists, got {name}.{fix}")
    sys.argv[1:] = options
    sys.path.insert(0, str(known[name].parent))
    try:
        runpy.run_path(str(known[name]), run_name="__main__")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        extra = "integrations" if package in _INTEGRATIONS else "recipes"
        sys.exit(f'dir-toolkit {name}: {package} must be installed, got {error}. pip install "dir_toolkit[{extra}]"')


if __name__ == "__main__":
    main()
