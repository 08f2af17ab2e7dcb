"""Replace a module's functions and classes by changed copies for a while."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

PROJECT = ("compare", "flax_impl", "torch_impl")


@contextmanager
def planted(module_name: str, changes: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Change the module's source by regular expressions, and use its definitions everywhere.

    The original definitions are restored at the end.

    Args:
        module_name: the module whose source is changed.
        changes: pairs of a pattern and its replacement.

    Raises:
        ValueError: a pattern does not match the source, so it would change nothing.
    """
    module = import_module(module_name)
    changed = _changed_definitions(module, changes)
    replacements = {
        id(value): changed[name]
        for name, value in vars(module).items()
        if not name.startswith("__") and name in changed and changed[name] is not value
    }
    originals = [
        (user, name, value)
        for user in _project_modules()
        for name, value in vars(user).items()
        if id(value) in replacements
    ]
    try:
        for user, name, value in originals:
            setattr(user, name, replacements[id(value)])
        _clear_jit_caches()
        yield
    finally:
        for user, name, value in originals:
            setattr(user, name, value)
        _clear_jit_caches()


def _project_modules() -> list[ModuleType]:
    """Return the imported modules of the project."""
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] in PROJECT]


def _clear_jit_caches() -> None:
    """Clear the caches of the project's jitted functions, which hold the replaced definitions."""
    for value in [value for module in _project_modules() for value in vars(module).values()]:
        function = value.fun if isinstance(value, jax.custom_jvp) else value
        if isinstance(function, jax.stages.Wrapped):
            function.clear_cache()  # type: ignore[attr-defined]


def _changed_definitions(module: ModuleType, changes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Run the changed source of the module, and return what it defines."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    for pattern, replacement in changes:
        source, count = re.subn(pattern, replacement, source)
        if not count:
            raise ValueError(
                f"{module.__name__} does not match {pattern!r}, so this bug cannot be planted; "
                "update it in compare/mutants"
            )
    namespace = {
        name: vars(module)[name] for name in ("__name__", "__package__", "__file__", "__spec__")
    }
    exec(compile(source, module.__file__, "exec"), namespace)
    return namespace
