"""The package's docstrings as Markdown: roles become links, formulas MathML, sections what griffe reads."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from typing import Any

import griffe
from latex2mathml.converter import convert

_DIRECTIVE = re.compile(r"^( *)\.\. (math|code-block)::(.*)\n((?:\1 +.*\n|\s*\n)*)", re.MULTILINE)
_LISTING = re.compile(r"^([A-Z][^.:\n]*)\n((?: {4}.*\n|\s*\n)+)", re.MULTILINE)
_GRID = re.compile(r"^( *)(=+)( +)=+\n((?:.*\n)+?)\1=+ +=+ *\n(?! *\S)", re.MULTILINE)
_COMPARISON = re.compile(r"(?<=: )>(?=[= ])|^>(?=[= ])", re.MULTILINE)
_LITERAL = re.compile(r"^( *)(\S.*):: *\n((?: *\n|\1 +.*\n)+)", re.MULTILINE)
_DOCTEST = re.compile(r"^( *)(>>> .*\n(?:\1\S.*\n|\1 +\S.*\n)*)", re.MULTILINE)
_ROLE = re.compile(r":(math|class|func|meth|mod|attr):`([^`]+)`")
_ENTRY = re.compile(r"(?:^|(?<=[.;] ))([a-z]\w*(?:, [a-z]\w*)*): |(?<=\. )(Returns) ", re.MULTILINE)
_SECTION = re.compile(
    r"^(Args|Attributes|Returns|Yields|Raises|Shape|Units|Source):\n((?: +.*\n|\s*\n)*)", re.MULTILINE
)
_IDENTIFIER = re.compile(r"\b(arXiv|doi):(10\.\S+\w|\d+\.\d+)")
_RAISED = re.compile(r"(?:^|(?<=[.;,]\s))(\w+Error(?:,\s+\w+Error)*):\s")

# What browsers do not do by themselves: spaces about the names of functions, and letters that are set otherwise.
_REWRITTEN = {
    r"<m[io]>([a-zA-Z]{2,})</m[io]>(?=<mo[^>]*>&#x00028;)": r'<mo lspace="0.167em" rspace="0">\1</mo>',
    r"<m[io]>([a-zA-Z]{2,})</m[io]>": r'<mo lspace="0.167em" rspace="0.167em">\1</mo>',
    r'<mi mathvariant="script">N</mi>': "<mi>𝒩</mi>",
    r'<mn mathvariant="bold">1</mn>': "<mn>𝟏</mn>",
}


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded, when names can be looked up."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        errors = {name: error for name, error in pkg["errors"].members.items() if not error.is_alias and error.is_class}
        for thing in _things(pkg):
            if isinstance(thing, griffe.Module):  # so that what a function raises is known where it is not imported
                for name in errors.keys() - thing.members.keys():
                    thing.set_member(name, griffe.Alias(name, errors[name]))
                    thing.imports[name] = errors[name].path  # so that no page lists it again
            if thing.docstring:
                thing.docstring.value = translate(thing.docstring.value, thing)
            if isinstance(thing, griffe.Function):
                thing.returns = _inlined(thing.returns, pkg)
                for parameter in thing.parameters:
                    parameter.annotation = _inlined(parameter.annotation, pkg)
                    parameter.default = _inlined(parameter.default, pkg)
            elif isinstance(thing, griffe.Attribute):
                if thing.is_public and not thing.docstring and isinstance(thing.parent, griffe.Module):
                    thing.docstring = griffe.Docstring("A short name; signatures write it out.", parent=thing)
                thing.annotation = _inlined(thing.annotation, pkg)


def translate(text: str, thing: griffe.Object) -> str:
    """The docstring of a thing, in Markdown with the sections of griffe's Google style."""
    text = inspect.cleandoc(text) + "\n"
    text = _LISTING.sub(lambda m: f"**{m[1]}**\n" + _fence("", "text", m[2].replace("``", "")), text)
    text = _GRID.sub(_table, text)
    text = _COMPARISON.sub(r"\\>", text)
    text = _DOCTEST.sub(lambda m: _fence(m[1], "pycon", m[2]), text)
    text = _DIRECTIVE.sub(_directive, text)
    text = _LITERAL.sub(lambda m: f"{m[1]}{m[2]}:\n\n" + _fence(m[1], "python", m[3]), text)
    text = _ROLE.sub(lambda m: mathml(m[2]) if m[1] == "math" else _link(m[2], thing), text)
    return _SECTION.sub(lambda m: _section(m, thing), text).strip()


def mathml(formula: str, display: str = "inline") -> str:
    """A formula as MathML on one line: named functions spaced as such, letters of their own for script and bold."""
    formula = re.sub(r"\\mathrm\{(\w\w+)\}", r"\\operatorname{\1}", " ".join(formula.split()))
    markup = convert(formula, display=display).replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
    for name, rewritten in _REWRITTEN.items():
        markup = re.sub(name, rewritten, markup)
    # Python-Markdown takes a line that begins with a formula for a block.
    return markup if display == "block" else f"<span>{markup}</span>"


def _things(thing: griffe.Object) -> Iterator[griffe.Object]:
    yield thing
    for member in list(thing.members.values()):
        if not member.is_alias:
            yield from _things(member)


def _inlined(expression: Any, pkg: griffe.Module) -> Any:
    """An annotation or a default in which the package's own short names for types and values are written out."""
    if isinstance(expression, list):
        return [_inlined(part, pkg) for part in expression]
    if isinstance(expression, griffe.ExprName):
        named = _find(expression.canonical_path, pkg)
        return _inlined(named.value, pkg) if isinstance(named, griffe.Attribute) and named.value else expression
    if isinstance(expression, griffe.Expr):
        parts = {field.name: _inlined(getattr(expression, field.name), pkg) for field in fields(expression)}
        return replace(expression, **parts)
    return expression


def _find(path: str, pkg: griffe.Module) -> griffe.Object | None:
    """What a dotted path within the package names, wherever it was imported from."""
    try:
        result = pkg.modules_collection[path]
        return result.final_target if result.is_alias else result
    except (KeyError, griffe.AliasResolutionError):
        return None


def _fence(indent: str, language: str, code: str) -> str:
    return textwrap.indent(f"\n```{language}\n{textwrap.dedent(code).strip()}\n```\n\n", indent)


def _table(match: re.Match[str]) -> str:
    """A simple table of two columns, with a head or without."""
    indent, rule, gap, body = match.groups()
    width = len(rule + gap)
    head: list[list[str]] = [["", ""]]
    rows: list[list[str]] = []
    for line in textwrap.dedent(body).splitlines():
        if line.startswith("=="):
            head, rows = rows, []
        elif line[:width].strip():
            rows.append([line[:width].strip(), line[width:].strip()])
        else:
            rows[-1][1] += " " + line.strip()
    cells = [*head, ["---", "---"], *rows]
    return "\n" + "".join(f"{indent}| {first} | {second} |\n" for first, second in cells) + "\n"


def _directive(match: re.Match[str]) -> str:
    indent, kind, first, rest = match.groups()
    if kind == "math":
        return f"\n{indent}{mathml(first + ' ' + rest, 'block')}\n\n"
    return _fence(indent, first.strip(), rest)


def _link(role: str, thing: griffe.Object) -> str:
    """A link to what a role names, looked up from where it stands; autorefs complains of what it does not know."""
    name = role.lstrip("~")
    shown = name.rpartition(".")[2] if role.startswith("~") or name.startswith("dir_toolkit.") else name
    first, _, rest = name.partition(".")
    path = name if first == "dir_toolkit" else ".".join(filter(None, (thing.resolve(first), rest)))
    result = _find(path, thing.package)
    return f"[`{shown}`][{result.path if result else path}]"


def _section(match: re.Match[str], thing: griffe.Object) -> str:
    """Arguments, attributes and errors as lists that griffe reads; the sections it does not know as text."""
    title, body = match[1], textwrap.dedent(match[2]).strip()
    if title == "Raises":
        before, *raised = _RAISED.split(body)
        if not before:
            items = [
                f"{name}: " + " ".join(why.split()).rstrip(" ;,")
                for names, why in zip(raised[::2], raised[1::2], strict=True)
                for name in re.split(r",\s+", names)
            ]
            return "\nRaises:\n" + textwrap.indent("\n".join(items), "    ") + "\n\n"
    if title == "Source":
        body = _IDENTIFIER.sub(_cited, body)
    if title in ("Args", "Attributes"):
        known = {parameter.name for parameter in thing.parameters} if title == "Args" else None
        entries = [(name, what) for names, what in _entries(body, known) for name in names.split(", ")]
        items = [f"{name}: {what}" if name else what for name, what in entries]
        return f"\n{title}:\n" + textwrap.indent("\n".join(items), "    ") + "\n\n"
    if title == "Shape":
        body = "\n".join(f"- **{names}**: {what}" if names else f"{what}\n" for names, what in _entries(body))
    return f'\n<p><span class="doc-section-title">{title}:</span></p>\n\n{body}\n\n'


def _cited(match: re.Match[str]) -> str:
    return f"[{match[0]}](https://{'arxiv.org/abs' if match[1] == 'arXiv' else 'doi.org'}/{match[2]})"


def _entries(body: str, known: Collection[str] | None = None) -> list[tuple[str, str]]:
    """What is said of each name or list of names that open a line or a sentence, of ``known`` names alone if given.

    What is said before the first has the name "".
    """
    starts = [m for m in _ENTRY.finditer(body) if known is None or (m[1] and known >= set(m[1].split(", ")))]
    edges = [m.start() for m in starts] + [len(body)]
    said = [(m[1] or m[2], body[m.end() : end]) for m, end in zip(starts, edges[1:], strict=True)]
    lead = [("", body[: edges[0]])] if edges[0] else []
    return [(name, re.sub(r"\n *", "\n    ", what.strip().rstrip(";"))) for name, what in lead + said]
