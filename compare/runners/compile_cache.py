"""JAX's compilation cache for one run and its child processes: what one has compiled the others only read."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax

# Store every program: by default only those that took a second to compile are kept.
_EVERYTHING = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def compilation_cache() -> Iterator[None]:
    """Cache compiled programs in the user's `jax_compilation_cache_dir`, or in a folder that is removed at the end.

    The settings are also put into the environment, for child processes.
    """
    with tempfile.TemporaryDirectory(
        prefix="attention-parity-jax-", ignore_cleanup_errors=True
    ) as folder:
        settings = {
            "jax_compilation_cache_dir": jax.config.values["jax_compilation_cache_dir"] or folder
        }
        settings |= {
            name: value for name, value in _EVERYTHING.items() if name.upper() not in os.environ
        }
        before = {name: getattr(jax.config, name) for name in settings}
        environment = {name.upper(): os.environ.get(name.upper()) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
                os.environ[name.upper()] = str(value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            for name, text in environment.items():
                os.environ.pop(name, None)
                if text is not None:
                    os.environ[name] = text
