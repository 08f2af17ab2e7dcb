"""Lines near a line: where a layer was built, and statements that made no value."""

import ast
import linecache
import re
from functools import lru_cache
from typing import Any

from .report import SourceLine
from .values import source_line

_CALLED = re.compile(r"self\.(\w+)(?:\[[^\]]*\])?\(")
_READ = re.compile(r"self\.(\w+)")
_ASSIGNED = re.compile(r"[\w.,\[\] ]+ [-+*/@]?= ")
_MAX_BETWEEN = 4


def built_at(source: SourceLine, keywords: frozenset[str] = frozenset()) -> list[SourceLine]:
    """Return the lines where the layers that a line calls were built: `self.conv = …`.

    Args:
        source: the line of the call.
        keywords: arguments of the layer that are suspected; their lines come first.
    """
    found = []
    names = [*_CALLED.findall(source.code), *_READ.findall(source.code)]
    for name in dict.fromkeys(names):
        for line in _assignments(source.file, source.line, name, keywords):
            found.append(source_line(source.file, line, "built here", name))
    return found


@lru_cache(maxsize=64)
def _nodes(file: str) -> tuple[ast.AST, ...]:
    """Return the syntax nodes of a file; none if it is no Python."""
    try:
        return tuple(ast.walk(ast.parse("".join(linecache.getlines(file)))))
    except SyntaxError:
        return ()


def _within(node: Any, line: int) -> bool:
    """Return whether a line lies in the statement of a node."""
    return bool(node.lineno <= line <= (node.end_lineno or 0))


@lru_cache(maxsize=256)
def _assignments(file: str, line: int, name: str, keywords: frozenset[str]) -> tuple[int, ...]:
    """Return the lines of `self.NAME = …` in the class that the line lies in."""
    classes = [
        node for node in _nodes(file) if isinstance(node, ast.ClassDef) and _within(node, line)
    ]
    if not classes:
        return ()
    lines: list[int] = []
    for node in ast.walk(classes[-1]):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(one, ast.Attribute) and one.attr == name for one in targets) or (
            node in classes[-1].body
            and any(isinstance(one, ast.Name) and one.id == name for one in targets)
        ):
            calls = [child for child in ast.walk(node) if isinstance(child, ast.Call)]
            lines += [
                keyword.value.lineno
                for call in calls
                for keyword in call.keywords
                if keyword.arg in keywords
            ]
            lines.append(node.lineno)
    return tuple(dict.fromkeys(lines))


def between(before: SourceLine, after: SourceLine, made: set[tuple[str, int]]) -> list[SourceLine]:
    """Return the statements between two lines that made no value: what was left out may be there.

    Args:
        before: the line of the last value that both sides have.
        after: the line of the first value that differs.
        made: the files and lines of all values.
    """
    if before.file != after.file or not 1 < after.line - before.line <= _MAX_BETWEEN:
        return []
    found = []
    for line in range(before.line + 1, after.line):
        code = linecache.getline(before.file, line).strip()
        if _ASSIGNED.match(code) and not code.startswith("#") and (before.file, line) not in made:
            found.append(source_line(before.file, line, "makes no value", after.module))
    return found


def returns_of(source: SourceLine) -> list[SourceLine]:
    """Return the lines that return from the function that a line lies in."""
    functions = [
        node
        for node in _nodes(source.file)
        if isinstance(node, ast.FunctionDef) and _within(node, source.line)
    ]
    if not functions:
        return []
    innermost = min(functions, key=lambda node: (node.end_lineno or 0) - node.lineno)
    return [
        source_line(source.file, node.lineno, "returns", source.module)
        for node in innermost.body
        if isinstance(node, ast.Return)
    ]


def conditions_of(source: SourceLine) -> list[SourceLine]:
    """Return the lines of the `if` statements that a line lies in, the innermost first."""
    found = [
        node.lineno
        for node in _nodes(source.file)
        if isinstance(node, ast.If) and node.lineno < source.line and _within(node, source.line)
    ]
    return [
        source_line(source.file, line, "if", source.module) for line in sorted(found, reverse=True)
    ]


def returned_after(source: SourceLine) -> list[SourceLine]:
    """Return the next line that returns, if it is another one."""
    for line in range(source.line + 1, source.line + 1 + _MAX_BETWEEN):
        code = linecache.getline(source.file, line).strip()
        if code.startswith("return"):
            return [source_line(source.file, line, "returns", source.module)]
        if code.startswith(("def ", "class ")):
            break
    return []
