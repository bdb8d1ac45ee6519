"""How much of the code checks arguments: at most 12 % of the lines of each room. Docstrings, comments and blank lines
are not counted, and neither is ``_checks.py``, where checks are made."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import dir_toolkit

ROOT = Path(dir_toolkit.__file__).parent
CHECKS = ("check_", "_check", "require")


def span(*nodes: ast.stmt) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def code_lines(text: str, tree: ast.Module) -> set[int]:
    words = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    return lines - span(
        *(node for node in words if isinstance(node.value, ast.Constant) and type(node.value.value) is str)
    )


def check_lines(tree: ast.Module) -> set[int]:
    """Raises with the conditions that lead to them, calls of what ``_checks`` or ``_inputs`` hold, and whole functions
    that are named as checks."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    helpers = {
        name.asname or name.name
        for node in imports
        for name in node.names
        if (node.module or "").split(".")[-1] in ("_checks", "_inputs")
    }

    def is_check(node: ast.AST) -> bool:
        if isinstance(node, ast.If):
            return isinstance(node.body[-1], ast.Raise)
        if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Name):
                return called.id in helpers or called.id.startswith(CHECKS)
            return isinstance(called, ast.Attribute) and called.attr.startswith(CHECKS[:2])
        return isinstance(node, ast.Raise) or (isinstance(node, ast.FunctionDef) and node.name.startswith(CHECKS))

    result = [node for node in ast.walk(tree) if is_check(node)]
    # Of a condition only its own branch counts, and not the one after else.
    return {
        line
        for node in result
        if isinstance(node, ast.stmt)
        for line in range(node.lineno, ((node.body[-1] if isinstance(node, ast.If) else node).end_lineno or 0) + 1)
    }


def test_at_most_12_percent_of_the_code_of_each_room_checks_arguments() -> None:
    code: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    for path in ROOT.rglob("*.py"):
        if path.name != "_checks.py":
            text, (room, *deeper) = path.read_text("utf-8"), path.relative_to(ROOT).parts
            tree = ast.parse(text)
            room = "top" if not deeper else f"{room}/{deeper[0]}" if room == "experiment" and deeper[1:] else room
            lines = code_lines(text, tree)
            code[room] += len(lines)
            checks[room] += len(check_lines(tree) & lines)
    shares = {room: round(100 * checks[room] / lines, 2) for room, lines in code.items()}
    assert {room: share for room, share in shares.items() if share > 12} == {}
    assert len(shares) >= 10
    assert sum(checks.values()) > 1000  # that the count counts
