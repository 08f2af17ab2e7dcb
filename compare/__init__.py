"""Compare the PyTorch and the Flax implementations: convert, save, load, prove.

Names are looked up on first use, so that `python -m compare --help` needs no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, open_checkpoint, read_checkpoint, save_checkpoint
    from .checkpoint.convert_file import convert_checkpoint
    from .checkpoint.verify_file import verify_checkpoint
    from .convert import linen_to_torch, nnx_to_torch, torch_to_linen, torch_to_nnx
    from .errors import CheckpointError, ConversionError, MappingError, Mismatch, UnverifiedCheckpoint
    from .mapping import Mapping
    from .matching import match

_HOMES = {
    "CheckpointError": ".errors",
    "ConversionError": ".errors",
    "Mapping": ".mapping",
    "MappingError": ".errors",
    "Mismatch": ".errors",
    "UnverifiedCheckpoint": ".errors",
    "convert_checkpoint": ".checkpoint.convert_file",
    "linen_to_torch": ".convert",
    "load_checkpoint": ".checkpoint",
    "match": ".matching",
    "open_checkpoint": ".checkpoint",
    "nnx_to_torch": ".convert",
    "read_checkpoint": ".checkpoint",
    "save_checkpoint": ".checkpoint",
    "torch_to_linen": ".convert",
    "torch_to_nnx": ".convert",
    "verify_checkpoint": ".checkpoint.verify_file",
}

__all__ = [
    "CheckpointError",
    "ConversionError",
    "Mapping",
    "MappingError",
    "Mismatch",
    "UnverifiedCheckpoint",
    "convert_checkpoint",
    "linen_to_torch",
    "load_checkpoint",
    "match",
    "nnx_to_torch",
    "open_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "torch_to_linen",
    "torch_to_nnx",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
