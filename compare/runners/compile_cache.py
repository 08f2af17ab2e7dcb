"""Share JAX's compilation cache between one run and its child processes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax

# By default, JAX stores only programs that took at least a second to compile.
_STORE_EVERYTHING = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def compilation_cache() -> Iterator[None]:
    """Cache compiled programs in the user's `jax_compilation_cache_dir`, or in a temporary folder.

    The settings are also written to the environment variables, for child processes.
    """
    with tempfile.TemporaryDirectory(
        prefix="attention-parity-jax-", ignore_cleanup_errors=True
    ) as folder:
        settings = {
            "jax_compilation_cache_dir": jax.config.values["jax_compilation_cache_dir"] or folder
        }
        settings |= {
            name: value
            for name, value in _STORE_EVERYTHING.items()
            if name.upper() not in os.environ
        }
        previous_settings = {name: getattr(jax.config, name) for name in settings}
        previous_environment = {name.upper(): os.environ.get(name.upper()) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
                os.environ[name.upper()] = str(value)
            yield
        finally:
            for name, value in previous_settings.items():
                jax.config.update(name, value)
            for name, text in previous_environment.items():
                os.environ.pop(name, None)
                if text is not None:
                    os.environ[name] = text
