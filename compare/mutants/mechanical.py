"""Mechanical bugs: every small change of the syntax tree, one at a time.

cosmic-ray starts Python anew for each change, and mutmut leaves decorated functions and class
bodies alone; neither deletes statements or exchanges arguments.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# Functions of two arguments that may be exchanged.
COMMUTATIVE = {"equal", "max", "maximum", "min", "minimum"}
# Statements that do not run, or whose absence Python itself reports when the module is imported.
NOT_DELETED = (
    *(ast.Pass, ast.Import, ast.ImportFrom, ast.Assert, ast.Global, ast.Nonlocal),
    *(ast.FunctionDef, ast.ClassDef, ast.Try),
)
# Fields that hold types, which the program does not run.
ANNOTATIONS = {"annotation", "returns", "type_params"}


@dataclass(frozen=True)
class _Site:
    """A node that may be changed, the field that holds it, and the statement around it."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    function: str
    lines: range

    def put(self, node: ast.AST) -> None:
        """Set the field, or its entry if it is a list."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


@dataclass(frozen=True)
class MechanicalMutant:
    """One changed version of a file.

    Attributes:
        file: the path from the repository's root.
        line: the number of the changed line in the original.
        lines: the lines of the statement around the change.
        name: the file, the function and the code before and after; it survives moved lines.
    """

    file: str
    line: int
    lines: range
    name: str
    _tree: ast.Module
    _site: _Site
    _changed: ast.AST | None

    def source(self) -> str:
        """Return the source of the whole file with the change."""
        self._site.put(self._changed or ast.Pass())
        changed = ast.unparse(ast.fix_missing_locations(self._tree))
        self._site.put(self._site.node)
        return changed


def mechanical_mutants(file: str, source: str) -> Iterator[MechanicalMutant]:
    """Yield every mutant of a file, in the order of its lines.

    Messages, docstrings, annotations, imports, `__all__` and the `return None` at the end of a
    function are left as they are.

    Args:
        file: the path from the repository's root, for the names.
        source: the text of the file.
    """
    tree = ast.parse(source)
    names: Counter[str] = Counter()
    for site in _sites(tree, "", range(0)):
        before = ast.unparse(site.node)
        for changed in _replacements(site.node):
            after = ast.unparse(ast.fix_missing_locations(changed)) if changed else "(deleted)"
            if before == after:
                continue  # f(x, x) with its arguments exchanged
            name = f"{file} {site.function}: {_short(before)} -> {_short(after)}"
            names[name] += 1
            ordinal = f" ({names[name]})" if names[name] > 1 else ""
            yield MechanicalMutant(
                file, _line(site.node), site.lines, name + ordinal, tree, site, changed
            )


def _sites(node: ast.AST, function: str, lines: range) -> Iterator[_Site]:
    """Yield every statement and expression below a node that may be changed."""
    for field, value in ast.iter_fields(node):
        if field in ANNOTATIONS or isinstance(node, ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_docstring(child):
                continue
            if isinstance(child, ast.stmt):
                lines = range(child.lineno, (child.end_lineno or child.lineno) + 1)
            if _says_nothing(child, node):
                continue
            yield _Site(child, node, field, index, function, lines)
            if isinstance(child, ast.Raise | ast.Import | ast.ImportFrom | ast.Assert):
                continue
            inner = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{function}.{child.name}" if function else child.name
            yield from _sites(child, inner, lines)


def _replacements(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what a node is replaced with; None deletes a statement."""
    match node:
        case ast.AnnAssign(value=None):
            pass  # the field of a class
        case ast.If():
            yield None
            yield ast.If(_negated(node.test), node.body, node.orelse)
        case ast.With():
            yield ast.If(ast.Constant(True), node.body, [])
        case ast.stmt() if not isinstance(node, NOT_DELETED):
            yield None
        case ast.FunctionDef() | ast.ClassDef():
            yield from _without_each(node, "decorator_list")
        case ast.Compare(ops=[operator]):
            yield ast.Compare(node.left, [COMPARISONS[type(operator)]()], node.comparators)
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            yield from _without_each(node, "values")
        case ast.UnaryOp():
            yield node.operand
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.comprehension():
            yield from _without_each(node, "ifs")
        case ast.Slice():
            yield from (_with(node, end, None) for end in ("lower", "upper") if _has(node, end))
        case ast.Constant():
            yield from _other_constants(node.value)
        case ast.Call():
            yield from _other_calls(node)


def _negated(test: ast.expr) -> ast.expr:
    return test.operand if _is_not(test) else ast.UnaryOp(ast.Not(), test)  # type: ignore[attr-defined]


def _is_not(test: ast.expr) -> bool:
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def _other_constants(value: object) -> Iterator[ast.Constant]:
    """Yield the neighbors of a number, or the other truth value."""
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield from (ast.Constant(value + 1), ast.Constant(value - 1))
    elif isinstance(value, float):
        yield ast.Constant(value + 1)


def _other_calls(call: ast.Call) -> Iterator[ast.AST]:
    """Yield a call with two neighboring arguments exchanged, one left out, or no call at all."""
    arguments = call.args
    commutes = ast.unparse(call.func).rpartition(".")[2] in COMMUTATIVE
    if not commutes and not any(isinstance(argument, ast.Starred) for argument in arguments):
        for index in range(len(arguments) - 1):
            swapped = list(arguments)
            swapped[index : index + 2] = reversed(arguments[index : index + 2])
            yield ast.Call(call.func, swapped, call.keywords)
    yield from _without_each(call, "keywords")
    if isinstance(call.func, ast.Attribute) and not arguments and not call.keywords:
        yield call.func.value
    elif len(arguments) == 1 and not call.keywords and not isinstance(arguments[0], ast.Starred):
        yield call.func.value if _is_method(call) else arguments[0]  # type: ignore[attr-defined]


def _is_method(call: ast.Call) -> bool:
    """Return whether a call is a method's of a value that is itself computed: `x.mT.to(y)`."""
    return isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Name)


def _without_each(node: ast.AST, field: str) -> Iterator[ast.AST]:
    """Yield copies of a node without each one of the entries of a list."""
    entries = getattr(node, field)
    for index in range(len(entries)):
        yield _with(node, field, [*entries[:index], *entries[index + 1 :]])


def _with(node: ast.AST, field: str, value: object) -> ast.AST:
    """Return a copy of a node with another value in one field."""
    changed = copy(node)
    setattr(changed, field, value)
    return changed


def _has(node: ast.AST, field: str) -> bool:
    return getattr(node, field) is not None


def _is_docstring(node: ast.AST) -> bool:
    """Return whether a statement is a string alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _says_nothing(node: ast.AST, parent: ast.AST) -> bool:
    """Return whether a statement lists the public names, or returns None where a function ends."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "__all__"
    ends = isinstance(parent, ast.FunctionDef) and parent.body[-1] is node
    return ends and isinstance(node, ast.Return) and ast.unparse(node) in ("return", "return None")


def _line(node: Any) -> int:
    """Return the number of a node's first line; a list of conditions has that of its target."""
    return getattr(node, "lineno", None) or getattr(node, "target", node).lineno


def _short(code: str) -> str:
    """Return the first line of some code."""
    first, *others = code.split("\n")
    return f"{first} …" if others else first
