"""Planted bugs: small changes to the sources, of the kinds that real ports have."""

from .argument_bugs import ARGUMENT_BUGS
from .catalog import MUTANTS, READERS
from .mutant import Mutant
from .plant import planted

__all__ = ["ARGUMENT_BUGS", "MUTANTS", "READERS", "Mutant", "planted"]
