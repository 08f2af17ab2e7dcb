"""Lines near a line: where a layer was built, and statements that made no value."""

import ast
import linecache
import re
from functools import lru_cache

from .report import SourceLine

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
            code = linecache.getline(source.file, line).strip()
            found.append(SourceLine(source.file, line, code, "built here", name))
    return found


@lru_cache(maxsize=256)
def _assignments(file: str, line: int, name: str, keywords: frozenset[str]) -> tuple[int, ...]:
    """Return the lines of `self.NAME = …` in the class that the line lies in."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ()
    classes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0)
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
            found.append(SourceLine(before.file, line, code, "makes no value", after.module))
    return found


def returns_of(source: SourceLine) -> list[SourceLine]:
    """Return the lines that return from the function that a line lies in."""
    try:
        tree = ast.parse("".join(linecache.getlines(source.file)))
    except SyntaxError:
        return []
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.lineno <= source.line <= (node.end_lineno or 0)
    ]
    if not functions:
        return []
    innermost = min(functions, key=lambda node: (node.end_lineno or 0) - node.lineno)
    return [
        SourceLine(
            source.file,
            node.lineno,
            linecache.getline(source.file, node.lineno).strip(),
            "returns",
            source.module,
        )
        for node in innermost.body
        if isinstance(node, ast.Return)
    ]


def conditions_of(source: SourceLine) -> list[SourceLine]:
    """Return the lines of the `if` statements that a line lies in, the innermost first."""
    try:
        tree = ast.parse("".join(linecache.getlines(source.file)))
    except SyntaxError:
        return []
    found = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and node.lineno < source.line <= (node.end_lineno or 0)
    ]
    return [
        SourceLine(
            source.file, line, linecache.getline(source.file, line).strip(), "if", source.module
        )
        for line in sorted(found, reverse=True)
    ]


def returned_after(source: SourceLine) -> list[SourceLine]:
    """Return the next line that returns, if it is another one."""
    for line in range(source.line + 1, source.line + 1 + _MAX_BETWEEN):
        code = linecache.getline(source.file, line).strip()
        if code.startswith("return"):
            return [SourceLine(source.file, line, code, "returns", source.module)]
        if code.startswith(("def ", "class ")):
            break
    return []
