"""The errors for ports that differ, and for those that cannot be judged."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..conversion.errors import ConversionError
from ..frameworks import jax
from .values import is_somebodys

_TRACED = (jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError)
_MAX_TEXT = 400


class PortError(ValueError):
    """The two modules cannot be compared; the message says why, and what to do."""


@contextmanager
def raised_by(framework: str) -> Iterator[None]:
    """Raise PortError for what the module of a framework raises, with the line that raised it."""
    try:
        yield
    except (PortError, ConversionError):
        raise
    except Exception as error:  # a module may raise anything
        lines = [
            f" at {Path(frame.filename).name}:{frame.lineno}: {frame.line}"
            for frame in traceback.extract_tb(error.__traceback__)
            if is_somebodys(frame.filename)
        ]
        advice = (
            ". Its Python code asks for a value that JAX traces: use jnp.where or jax.lax.cond"
            if isinstance(error, _TRACED)
            else ""
        )
        text = str(error).split("\n\n")[0].partition("\nThe error occurred while")[0][:_MAX_TEXT]
        where = "".join(lines[-1:])
        raise PortError(
            f"the {framework} module raised {type(error).__name__}{where} ({text}){advice}"
        ) from error


class PortDiffers(AssertionError):
    """The two modules differ; the message is the report."""


def random_in_inference(framework: str, other: str) -> str:
    """Return why a module that is random in inference cannot be compared."""
    return (
        f"the {framework} module draws random numbers in inference, which {other} cannot draw "
        "alike: pass them as an input, or fix them"
    )
