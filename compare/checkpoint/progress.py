"""How far one is through the tensors of a checkpoint."""

from collections.abc import Callable, Iterable
from threading import Lock

import numpy as np

from ..conversion.mapping import Path
from .stored import Tensors

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Tell nobody."""


class Watched:
    """Tensors that tell how many of their bytes have been asked for."""

    def __init__(self, tensors: Tensors, progress: Progress) -> None:
        self.layout, self.specs, self.kinds = tensors.layout, tensors.specs, tensors.kinds
        self.aliases, self.mapping = tensors.aliases, tensors.mapping
        self._tensors, self._progress, self._done, self._lock = tensors, progress, 0, Lock()
        self._total = sum(spec.nbytes for spec in tensors.specs.values())

    def pieces(self, path: Path) -> Iterable[np.ndarray]:
        """Return the pieces, each counted once it was used."""
        for piece in self._tensors.pieces(path):
            yield piece
            with self._lock:
                self._done += piece.nbytes
                self._progress(self._done, self._total)
