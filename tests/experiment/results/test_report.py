from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from dir_toolkit.errors import ResultsError
from dir_toolkit.experiment.results import report
from dir_toolkit.experiment.results.figures import error_figure, region_figure
from dir_toolkit.experiment.results.report import write_report
from dir_toolkit.experiment.results.tables import ResultsTable

Run = Callable[[list[float]], xr.Dataset]
Combine = Callable[..., xr.Dataset]
HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags, ids, references and text of a page; void elements apart, every tag must be closed."""

    void = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        result = dict(attrs)
        self.ids += [result["id"] or ""] if "id" in result else []
        self.links += [result[name] or "" for name in ("href", "src", "xlink:href") if name in result]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(ds: xr.Dataset, tmp_path: Path) -> tuple[Page, str]:
    ds.attrs |= {"env": '{"torch": "2.13", "gpu": {"name": "none"}}', "digest": "{broken", "epochs": 12}
    path = tmp_path / "report.html"
    figures = {"Error along the axis": error_figure(ds), "Error by region": region_figure(ds)}
    write_report(
        path,
        ds,
        figures,
        title="Ages",
        notes=["A note & more."],
        titles={"lds": "weights < 1 & more"},
        settings={"lr": 0.1, "data": {"root": None, "sizes": [1, 2]}},
    )
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_the_report_holds_everything_a_reader_needs(page: tuple[Page, str]) -> None:
    parsed, _ = page
    for part in (
        "Ages",
        "A note & more.",
        "weights < 1 & more",
        "4.78 ± 0.79",
        "test samples",
        "constant",
        "python recipes/age.py",
        "Error by region",
        "data.root",
        "null",
        "[1, 2]",
        "env.torch",
        "env.gpu.name",
        "{broken",
        "dir_toolkit_version",
        "created",
        "mean ± standard deviation (n - 1) over seeds",
    ):
        assert part in parsed.text, part
    assert parsed.tags.count("svg") == 2


def test_fetches_nothing_and_runs_nothing(page: tuple[Page, str]) -> None:
    parsed, text = page
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert {"script", "link", "iframe", "object"}.isdisjoint(parsed.tags)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(text) < 600_000


def test_ids_are_unique_and_every_reference_meets_one(page: tuple[Page, str]) -> None:
    parsed, text = page
    assert len(parsed.ids) == len(set(parsed.ids)) > 10
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(parsed.ids)


def test_figures_follow_the_dark_mode_of_the_page(page: tuple[Page, str]) -> None:
    _, text = page
    style, figures = text.split("</style>", 1)
    dark = style[style.index("prefers-color-scheme: dark") :]
    used = set(re.findall(r"var\(--c([0-9a-f]{6}), #([0-9a-f]{6})\)", figures))
    assert {"222222", "ffffff", "777777"} <= {name for name, _ in used}
    for name, color in used:
        assert name == color  # by day they look as ever
        assert f"--c{name}: #" in dark


def test_white_text_stays_white_in_the_dark() -> None:
    svg = '<path style="fill: #ffffff; stroke: #222222"/><text style="fill: #ffffff">#ffffff</text>'
    assert report._themed(svg) == (
        '<path style="fill: var(--cffffff, #ffffff); stroke: var(--c222222, #222222)"/>'
        '<text style="fill: #ffffff">#ffffff</text>'
    )


def test_the_same_result_gives_the_same_bytes(ds: xr.Dataset, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, ds, {"Regions": region_figure(ds)}, title="Ages")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_hostile_text_stays_text(run: Run, combine: Combine, tmp_path: Path) -> None:
    ds = combine(
        {(HOSTILE, 0): run([1, 2, 3])},
        title=HOSTILE,
        command=HOSTILE,
        label_name=HOSTILE,
        label_units=HOSTILE,
        attrs={HOSTILE: HOSTILE},
    )
    path = tmp_path / "report.html"
    write_report(path, ds, {HOSTILE: error_figure(ds)}, title=HOSTILE, notes=[HOSTILE], settings={HOSTILE: HOSTILE})
    text = path.read_text(encoding="utf-8")
    assert "script" not in Page(text).tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 8


def test_a_broken_result_writes_nothing(ds: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="'minutes' is missing"):
        write_report(tmp_path / "report.html", ds.drop_vars("minutes"), {}, title="Ages")
    with pytest.raises(TypeError, match=r"notes must be paragraphs, got one text\. Use \[notes\]\."):
        write_report(tmp_path / "report.html", ds, {}, title="Ages", notes="One.")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_cannot_be_drawn_leaves_the_old_report(ds: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    figure = region_figure(ds)
    figure.axes[0].set_ylabel("$\\nosuchcommand$")
    with pytest.raises(ValueError, match="nosuchcommand"):
        write_report(path, ds, {"Regions": figure}, title="Ages")
    assert path.read_text() == "old"


def test_without_jinja2_the_error_says_what_to_install(
    ds: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'jinja2 must be installed, .* pip install "dir_toolkit\[recipes\]"'):
        write_report(tmp_path / "report.html", ds, {}, title="Ages")


def test_another_table_may_be_shown_and_marks_stay_marks(ds: xr.Dataset, tmp_path: Path) -> None:
    marks = {(0, 1): "better", (1, 1): "worse"}
    table = ResultsTable("said.", ["m", "x"], ["n", "2"], [["a", HOSTILE], ["b", "3"], ["c", "4"]], marks)  # type: ignore[arg-type]
    path = tmp_path / "report.html"
    write_report(path, ds, {}, title="Ages", table=table)
    text = path.read_text(encoding="utf-8")
    assert Page(text).tags.count("strong") == Page(text).tags.count("em") == 1
    assert "<strong>&lt;script&gt;" in text
    assert "<em>3</em>" in text
    assert "<td>4</td>" in text
    assert "MAE many" not in text


def test_settings_nested_beyond_measure_are_told_as_they_are(ds: xr.Dataset, tmp_path: Path) -> None:
    deep = '{"a":' * 5_000 + "1" + "}" * 5_000
    circle: dict[str, Any] = {}
    circle["again"] = circle
    write_report(
        tmp_path / "r.html", ds.assign_attrs(note=deep, short='{"a": {"b": 1}}'), {}, title="t", settings=circle
    )
    page = (tmp_path / "r.html").read_text()
    assert deep.replace('"', "&#34;") in page
    assert "short.a.b" in page
