"""The site's pages, made of what is there: README, change log, data cards, and one page a room of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docstrings import mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dir_toolkit"

# The order of reading; rooms that are not named here follow.
ROOMS = (
    "labels", "features", "heads", "losses", "priors", "target_prior", "conformal", "decoupling", "longtail", "metrics",
    "integrations", "experiment",
)  # fmt: skip


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [
        {"dir_toolkit": "index.md"},
        {"Methods": "methods.md"},
        {"From a file to a model": "jobs.md"},
        {"Recipes and runs": "running.md"},
        {"Measured": ["ages.md", "digits.md", "tables.md", "intervals.md", "target-prior.md", "speed.md"]},
        {"Guarantees": "guarantees.md"},
        {"Reference": ["reference/index.md", *(f"reference/{room}.md" for room in rooms())]},
        {"Data": [f"data_cards/{card.name}" for card in sorted((ROOT / "data_cards").glob("*.md"))]},
        {"Changes": "CHANGELOG.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in (*sorted((ROOT / "data_cards").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CITATION.cff"):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "reference/index.md", content=_names()))
    for room, modules in rooms().items():
        files.append(File.generated(config, f"reference/{room}.md", content=_page(room, modules)))
    return files


def rooms() -> dict[str, list[str]]:
    """The public modules of each room, dotted, in the order of reading."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1].startswith("_"):
            continue
        modules = found.setdefault(parts[1], [])
        if not parts[-1].startswith("_"):
            modules.append(".".join(parts))
    order = [*(room for room in ROOMS if room in found), *sorted(found.keys() - set(ROOMS))]
    return {room: found[room] for room in order}


def _page(room: str, modules: list[str]) -> str:
    """A room with its modules; a room of one module is that module."""
    alone = f"dir_toolkit.{room}"
    if modules == [alone]:
        return f"# {room}\n\n::: {alone}\n    options:\n      show_root_heading: false\n"
    front = f"# {room}\n\n::: {alone}\n    options:\n      show_root_heading: false\n      members: false\n\n"
    return front + "\n".join(f"::: {module}\n" for module in modules)


def _names() -> str:
    """Everything that ``import dir_toolkit as dt`` gives, with where it is made and what it is."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    lines = ["# Names", "", "What `import dir_toolkit as dt` gives; the pages beside it hold the rest.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                path = f"dir_toolkit.{node.module}.{alias.name}"
                lines.append(f"| [`dt.{alias.name}`][{path}] | {_summary(node.module, alias.name)} |")
    return "\n".join(lines) + "\n"


def _summary(module: str | None, name: str) -> str:
    """The first sentence of a docstring."""
    path = PACKAGE.joinpath(*str(module).split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            first = (ast.get_docstring(node) or "").partition("\n\n")[0]
            text = re.sub(r":math:`([^`]+)`", lambda m: mathml(m[1]), " ".join(first.split()))
            return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    raise ValueError(f"{path} makes no {name}.")
