"""The site's pages, made of what is there: README, change log, data cards, and one page a room of the package."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docstrings import mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tutorials import CELL, gallery

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dir_toolkit"

# The order of reading; rooms that are not named here follow.
ROOMS = (
    "labels", "features", "heads", "losses", "priors", "target_prior", "conformal", "decoupling", "longtail", "metrics",
    "integrations", "experiment",
)  # fmt: skip


# Where to read on, at the top of a room's page.
READ_ON = {
    "labels": "concepts.md#bins-and-how-wide", "features": "concepts.md#fds-feature-distribution-smoothing",
    "heads": "concepts.md#affinity", "losses": "concepts.md#balanced-mse", "longtail": "start.md",
    "priors": "concepts.md#soft-labels-tau-and-priors", "target_prior": "target-prior.md", "conformal": "intervals.md",
    "decoupling": "concepts.md#decoupling", "metrics": "concepts.md#why-averages-mislead",
    "integrations": "running.md#other-libraries", "experiment": "running.md",
}  # fmt: skip
# Pages whose code runs from top to bottom, which are notebooks as well.
NOTEBOOKS = ("concepts.md", "porting.md", "faq.md", *gallery())
GUIDE = ("concepts", "which-method", "methods", "jobs", "running", "porting", "beside", "faq", "glossary")
MEASURED = ("ages", "digits", "fds", "tables", "intervals", "target-prior", "defaults", "speed")
AT_ROOT = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [
        {"dir_toolkit": "index.md"},
        {"Getting started": "start.md"},
        {"Gallery": ["gallery.md", *(page for page in gallery() if page.startswith("tutorials/"))]},
        {"Guide": [f"{name}.md" for name in GUIDE if (ROOT / "docs" / f"{name}.md").exists()]},
        {"Measured": [f"{name}.md" for name in MEASURED]},
        {"Reference": ["reference/index.md", *(f"reference/{room}.md" for room in rooms())]},
        {"Data": [f"data_cards/{card.name}" for card in sorted((ROOT / "data_cards").glob("*.md"))]},
        {"Project": ["architecture.md", "guarantees.md", "citing.md", *AT_ROOT[:3]]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in (*sorted((ROOT / "data_cards").glob("*.*")), *(ROOT / name for name in AT_ROOT)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for name in NOTEBOOKS:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name.replace(".md", ".ipynb"), content=_notebook(text)))
    files.append(File.generated(config, "reference/index.md", content=_names()))
    for room, modules in rooms().items():
        files.append(File.generated(config, f"reference/{room}.md", content=_page(room, modules)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas in the form that GitHub knows, as MathML; the slider of tau; what a data card says before its title."""
    if page.file.src_uri.startswith("data_cards/"):
        facts = {name: value for name, value in page.meta.items() if name != "dir_toolkit"}
        rows = "".join(f"| {name} | {value} |\n" for name, value in _facts(facts | page.meta["dir_toolkit"]))
        opening = r"\A(#.+?\n\n(?:!\[.+?\n\n)?.+?\n\n)"  # the title, the samples where a card has some, a paragraph
        page.meta.pop("tags", None)  # any word of theirs would come before every heading of the guide in a search
        page.meta["search"] = {"boost": 0.5}
        return re.sub(opening, lambda m: f"{m[1]}| fact | |\n|---|---|\n{rows}\n", markdown, flags=re.S)
    page.meta["search"] = {"boost": 0.5 if page.file.src_uri.startswith("reference/") else 2}
    markdown = markdown.replace("](docs/", "](")
    above = "../" * page.file.src_uri.count("/")  # from the page to the site's root
    markdown = markdown.replace(f"]({above}../", f"]({above}")
    if page.file.src_uri in NOTEBOOKS:
        notebook = page.file.name + ".ipynb"
        markdown = markdown.replace("\n\n", f"\n\n[As a notebook]({notebook})\n\n", 1)
    markdown = markdown.replace("<!-- tau -->", (ROOT / "docs/tau.html").read_text("utf-8"))
    markdown = re.sub(r"^```math\n(.*?)```$", lambda m: mathml(m[1], "block"), markdown, flags=re.M | re.S)
    return re.sub(r"\$`([^`]+)`\$", lambda m: mathml(m[1]), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names that ``import dir_toolkit as dt`` gives are headed so; the gallery's list is a grid."""
    if page.file.src_uri == "gallery.md":
        html = html.replace("<ul>", '<ul class="gallery">')
    if page.file.src_uri.startswith("reference/"):
        for path, name in _everyday().items():
            heading = rf'(id="{re.escape(path)}" class="doc doc-heading">.*?doc-object-name[^>]*>){name}<'
            html = re.sub(heading, rf"\g<1>dt.{name}<", html, flags=re.S)
    return html


def _notebook(text: str) -> str:
    """A page as a Jupyter notebook, without what its code printed."""
    cells = []
    for i, part in enumerate(CELL.split(text)):
        cell: dict[str, Any] = {"id": f"cell{i}", "metadata": {}, "source": (part or "").strip()}
        code = {"cell_type": "code", "outputs": [], "execution_count": None}
        if i % 3 < 2:  # the third is what the code printed
            cells.append(cell | (code if i % 3 else {"cell_type": "markdown"}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})


def _facts(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The front matter of a data card as rows."""
    for name, value in values.items():
        if isinstance(value, dict) and any(isinstance(part, (dict, list)) for part in value.values()):
            yield from _facts(value, f"{before}{name}, ")
        else:
            value = [f"{key}: {part}" for key, part in value.items()] if isinstance(value, dict) else value
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{before}{name}".replace("_", " "), text


def rooms() -> dict[str, list[str]]:
    """The public modules of each room, dotted, in the order of reading."""
    result: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1].startswith("_"):
            continue
        modules = result.setdefault(parts[1], [])
        if not parts[-1].startswith("_"):
            modules.append(".".join(parts))
    order = [*(room for room in ROOMS if room in result), *sorted(result.keys() - set(ROOMS))]
    return {room: result[room] for room in order}


def _page(room: str, modules: list[str]) -> str:
    """A room with its modules; a room of one module is that module."""
    alone, everyday = f"dir_toolkit.{room}", _everyday()
    made = [(path, f"dt.{name}" if path in everyday else name) for module in modules for path, name in _public(module)]
    guide = READ_ON.get(room, "methods.md")
    front = f"# {room}\n\nSee also [the guide](../{guide}).\n\n{_table(made)}\n"
    front += f"::: {alone}\n    options:\n      show_root_heading: false\n"
    if modules == [alone]:
        return front
    return f"{front}      members: false\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def _names() -> str:
    """Everything that ``import dir_toolkit as dt`` gives, with where it is made and what it is."""
    title = "# Names\n\nWhat `import dir_toolkit as dt` gives; the pages beside it hold the rest.\n\n"
    return title + _table([(path, f"dt.{name}") for path, name in _everyday().items()])


@cache
def _everyday() -> dict[str, str]:
    """The names in ``dt``, by where each is made."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    made = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {f"dir_toolkit.{node.module}.{alias.name}": alias.name for node in made for alias in node.names}


def _public(module: str) -> Iterator[tuple[str, str]]:
    """The classes and functions of a module that are public, with their places."""
    names: list[str] = []
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
    made = dict.fromkeys(node.name for node in _tree(module).body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    return ((f"{module}.{name}", name) for name in made if name in names)


@cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _table(made: list[tuple[str, str]]) -> str:
    """What each name is, in a sentence."""
    rows = [f"| [`{shown}`][{path}] | {_summary(*path.rsplit('.', 1))} |" for path, shown in made]
    return "\n".join(["| name | what it is |", "|---|---|", *rows]) + "\n" if rows else ""


def _summary(module: str, name: str) -> str:
    """The first sentence of a docstring."""
    for node in reversed(_tree(module).body):  # the last of a name, since overloads say nothing
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            first = (ast.get_docstring(node) or "").partition("\n\n")[0]
            text = re.sub(r":math:`([^`]+)`", lambda m: mathml(m[1]), " ".join(first.split()))
            text = re.sub(r"(`+[^`]+`+)|\|", lambda m: m[1] or r"\|", text)  # inside code a bar needs no backslash
            return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    raise ValueError(f"{module} makes no {name}.")
