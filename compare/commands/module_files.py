"""Find the files of Python modules without running them."""

import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path


def module_files(sources: Iterable[str]) -> Iterator[Path]:
    """Yield the files from which `package.module:name` will be imported, packages included."""
    for source in sources:
        places: list[str] | None = [str(Path.cwd()), *sys.path]
        for step in source.partition(":")[0].split("."):
            spec = PathFinder.find_spec(step, places)
            if spec is None:
                break
            if spec.origin is not None and spec.has_location:
                yield Path(spec.origin)
            places = spec.submodule_search_locations
