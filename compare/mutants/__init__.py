"""Planted bugs: each a change to one line of the sources, of the kind that ports really have."""

from .catalog import MUTANTS, Mutant
from .plant import planted

__all__ = ["MUTANTS", "Mutant", "planted"]
