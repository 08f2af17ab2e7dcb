"""Put a changed copy of a module's functions and classes in the place of the true ones, for as long as wanted."""

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
    """Run the module's source, changed by regular expressions, and use what it defines everywhere.

    Raises:
        ValueError: a pattern is not in the source, so that nothing would be changed.
    """
    module = import_module(module_name)
    broken = _changed(module, changes)
    kept: list[tuple[ModuleType, str, Any]] = []
    replacements = {
        id(value): broken[name]
        for name, value in vars(module).items()
        if not name.startswith("__") and name in broken and broken[name] is not value
    }
    for user in [user for name, user in list(sys.modules.items()) if name.split(".")[0] in PROJECT]:
        kept += [
            (user, name, value) for name, value in vars(user).items() if id(value) in replacements
        ]
    try:
        for user, name, value in kept:
            setattr(user, name, replacements[id(value)])
        _forget_compiled()
        yield
    finally:
        for user, name, value in kept:
            setattr(user, name, value)
        _forget_compiled()


def _forget_compiled() -> None:
    """Clear the caches of the project's jitted functions: they hold what the functions called before."""
    modules = [
        module for name, module in list(sys.modules.items()) if name.split(".")[0] in PROJECT
    ]
    for value in [value for module in modules for value in vars(module).values()]:
        if isinstance(value, jax.stages.Wrapped):
            value.clear_cache()  # type: ignore[attr-defined]


def _changed(module: ModuleType, changes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    for pattern, replacement in changes:
        source, count = re.subn(pattern, replacement, source)
        if not count:
            raise ValueError(
                f"{module.__name__} has nothing like {pattern!r}; the mutant does not apply"
            )
    namespace = {
        name: vars(module)[name] for name in ("__name__", "__package__", "__file__", "__spec__")
    }
    exec(compile(source, module.__file__, "exec"), namespace)
    return namespace
