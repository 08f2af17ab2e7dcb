"""Planted bugs: small changes to the sources, of the kinds that real ports have."""

from .catalog import MUTANTS, READERS
from .mutant import Mutant
from .plant import planted

__all__ = ["MUTANTS", "READERS", "Mutant", "planted"]
