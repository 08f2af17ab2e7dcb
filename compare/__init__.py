"""Compare the PyTorch and the Flax implementations: convert, save, load, prove.

Names are looked up on first use, so that `python -m compare --help` needs no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, open_checkpoint, read_checkpoint, save_checkpoint
    from .checkpoint.convert import convert_checkpoint
    from .checkpoint.errors import CheckpointError, UnverifiedCheckpoint
    from .checkpoint.verify import verify_checkpoint
    from .conversion.convert import linen_to_torch, nnx_to_torch, torch_to_linen, torch_to_nnx
    from .conversion.errors import ConversionError, MappingError, Mismatch, TrainingDifference
    from .conversion.fold import fold
    from .conversion.mapping import Mapping, StateMapping
    from .conversion.match import match
    from .conversion.parts import Split
    from .conversion.proposal import Proposal, suggest
    from .ports.check import assert_port, check_port
    from .ports.errors import PortDiffers, PortError
    from .ports.record import record
    from .ports.report import PortReport

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": ".checkpoint.errors",
    "ConversionError": ".conversion.errors",
    "Mapping": ".conversion.mapping",
    "MappingError": ".conversion.errors",
    "Mismatch": ".conversion.errors",
    "PortDiffers": ".ports.errors",
    "PortError": ".ports.errors",
    "PortReport": ".ports.report",
    "Proposal": ".conversion.proposal",
    "Split": ".conversion.parts",
    "StateMapping": ".conversion.mapping",
    "TrainingDifference": ".conversion.errors",
    "UnverifiedCheckpoint": ".checkpoint.errors",
    "assert_port": ".ports.check",
    "check_port": ".ports.check",
    "convert_checkpoint": ".checkpoint.convert",
    "fold": ".conversion.fold",
    "linen_to_torch": ".conversion.convert",
    "load_checkpoint": ".checkpoint",
    "match": ".conversion.match",
    "nnx_to_torch": ".conversion.convert",
    "open_checkpoint": ".checkpoint",
    "read_checkpoint": ".checkpoint",
    "record": ".ports.record",
    "save_checkpoint": ".checkpoint",
    "suggest": ".conversion.proposal",
    "torch_to_linen": ".conversion.convert",
    "torch_to_nnx": ".conversion.convert",
    "verify_checkpoint": ".checkpoint.verify",
}

__all__ = [
    "CheckpointError",
    "ConversionError",
    "Mapping",
    "MappingError",
    "Mismatch",
    "PortDiffers",
    "PortError",
    "PortReport",
    "Proposal",
    "Split",
    "StateMapping",
    "TrainingDifference",
    "UnverifiedCheckpoint",
    "assert_port",
    "check_port",
    "convert_checkpoint",
    "fold",
    "linen_to_torch",
    "load_checkpoint",
    "match",
    "nnx_to_torch",
    "open_checkpoint",
    "read_checkpoint",
    "record",
    "save_checkpoint",
    "suggest",
    "torch_to_linen",
    "torch_to_nnx",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
