"""The site builds without a warning, holds every public name, reads without markup left over, and needs no network."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
    pytest.importorskip(name)

ROOT = Path(__file__).parents[1]

# Markup of the docstrings that Markdown does not know, or that went through as it was.
LEFT_OVER = r":[a-z]+:(`|<code>)|(^|>|\s)\.\. [a-z-]+::|``|\\(frac|sum|mathrm|hat|sigma)|<blockquote|::$|={5}|\\\|"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return built


def pages(site: Path) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def article(page: str) -> str:
    """What the page says, without its navigation and without code."""
    return re.sub(r"<pre.*?</pre>", "", page[page.find("<article") : page.find("</article>")], flags=re.DOTALL)


def left_over(page: str) -> list[str]:
    return [match[0] for match in re.finditer(LEFT_OVER, article(page), flags=re.MULTILINE)]


def loaded_from_elsewhere(page: str) -> list[str]:
    loads = r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    links = r"<link\b(?![^>]*\brel=[\"']?canonical)[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
    return re.findall(loads, page) + re.findall(links, page)


def public_names() -> list[str]:
    """The dotted names of every public module, and of everything in its ``__all__``."""
    names = []
    for path in sorted((ROOT / "dir_toolkit").rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts
        if any(part.startswith("_") for part in module):
            continue
        names.append(".".join(module))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                names += [f"{'.'.join(module)}.{name}" for name in ast.literal_eval(node.value)]
    return names


def test_every_public_name_has_its_place(site: Path) -> None:
    reference = "".join(page for name, page in pages(site).items() if name.startswith("reference/"))
    anchors = set(re.findall(r'\bid="([^"]+)"', reference))
    names = public_names()
    assert {"dir_toolkit.labels.bins.Bins", "dir_toolkit.priors", "dir_toolkit.experiment.data.idx.read_idx"} <= set(
        names
    )
    assert [name for name in names if name not in anchors] == []


def test_the_short_names_lead_to_where_they_are_described(site: Path) -> None:
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "dir_toolkit" / "__init__.py").read_text(encoding="utf-8"))
    made = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    names = [alias.name for node in made for alias in node.names]
    assert names
    assert [name for name in names if not re.search(rf'href="[^"]+#dir_toolkit[\w.]+\.{name}"', page)] == []


def test_the_first_page_is_the_readme(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings
    assert [heading for heading in headings if not re.search(rf"<h2[^>]*>{re.escape(heading)}<", page)] == []


SOUGHT = ("tau", "install", "which method", "missing labels", "how many bins", "heavy tail", "cite")


@pytest.mark.parametrize("sought", SOUGHT)
def test_a_heading_answers_what_newcomers_search_for(site: Path, sought: str) -> None:
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    guide = [entry["title"].lower() for entry in found if not entry["location"].startswith("reference/")]
    assert [entry["title"] for entry in found if entry.get("tags")] == []  # which come before all headings
    assert [title for title in guide if sought in title]
    from_a_folder = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert from_a_folder.startswith("var __index")


def test_names_are_headed_as_users_write_them_and_cards_show_their_front_matter(site: Path) -> None:
    labels = (site / "reference" / "labels.html").read_text(encoding="utf-8")
    assert re.search(r'<h\d id="dir_toolkit.labels.weights.LDS".*?doc-object-name[^>]*>dt\.LDS<', labels, re.DOTALL)
    cards = [page for name, page in pages(site).items() if name.startswith("data_cards/")]
    assert len(cards) == len(list((ROOT / "data_cards").glob("*.md")))
    assert all(re.search(r"<td>license</td>", page) for page in cards)
    assert 'id="tau-slider"' in (site / "concepts.html").read_text(encoding="utf-8")


def test_pages_whose_code_runs_are_notebooks_of_the_same_code(site: Path) -> None:
    notebooks = sorted(site.rglob("*.ipynb"))
    assert {"start", "concepts", "classes"} <= {path.stem for path in notebooks}
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        page = (ROOT / "docs" / path.relative_to(site).with_suffix(".md")).read_text(encoding="utf-8")
        code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        assert code == [block.strip() for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)]
        assert f'href="{path.name}"' in path.with_suffix(".html").read_text(encoding="utf-8")


def test_no_markup_is_left_over(site: Path) -> None:
    assert {name: result for name, page in pages(site).items() if (result := left_over(page))} == {}
    formulas = sum(page.count("<math") for page in pages(site).values())
    assert formulas > 100


@pytest.mark.parametrize(
    "broken",
    [
        ":math:<code>x</code>",
        ":class:`FDS`",
        "<p>.. code-block:: python</p>",
        r"\frac1N",
        "<blockquote>= 0",
        "===== =====",
    ],
)
def test_markup_that_is_left_over_is_found(broken: str) -> None:
    assert left_over(f"<article>{broken}</article>")
    assert not left_over("<article><p>An <code>FDS</code>: 2 .. 3.</p></article>")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    assert {name: result for name, page in pages(site).items() if (result := loaded_from_elsewhere(page))} == {}
    sheets = [sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css")]
    assert sheets
    assert not [sheet for sheet in sheets if re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet)]


@pytest.mark.parametrize(
    "broken",
    [
        '<script src="https://x.org/a.js">',
        '<link rel="stylesheet" href="//x.org/a.css">',
        "<img alt=x src=http://x.org/a.png>",
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(broken: str) -> None:
    assert loaded_from_elsewhere(broken)
    assert not loaded_from_elsewhere('<script src="assets/a.js"><a href="https://arxiv.org">')
