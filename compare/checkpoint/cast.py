"""Tensors in another floating dtype, cast only because it was asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np

from ..conversion.errors import shown
from ..conversion.mapping import Mapping as Table
from ..conversion.mapping import Path
from ..dtypes import FLOATING, FLOATS, numpy_dtype
from .errors import CheckpointError
from .manifest import LayoutName, is_mask
from .spec import Spec
from .stored import Tensors


def cast_array(path: FilePath, name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array in another floating dtype.

    Raises:
        CheckpointError: a finite number that the dtype holds only as an infinite one.
    """
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if bool((np.isfinite(array) & ~np.isfinite(found)).any()):
        raise CheckpointError(
            path, f"{shown(name)} has numbers beyond {dtype}", key=name, expected=f"numbers of {dtype}",
            found=f"up to {float(np.nanmax(np.abs(array.astype(np.float64)))):.3g}",
            mend="choose bfloat16 or float32",
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Cast:
    """Tensors whose floating numbers, but those of masks, are cast when they are asked for."""

    source: Tensors
    dtype: str
    path: FilePath

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise CheckpointError(
                self.path, f"cannot be cast to {self.dtype}", expected=f"one of {', '.join(FLOATS)}", found=self.dtype
            )

    @property
    def layout(self) -> LayoutName:
        """As the source."""
        return self.source.layout

    @property
    def kinds(self) -> Mapping[Path, str]:
        """As the source."""
        return self.source.kinds

    @property
    def aliases(self) -> Mapping[Path, Path]:
        """As the source."""
        return self.source.aliases

    @property
    def mapping(self) -> Table | None:
        """As the source."""
        return self.source.mapping

    @property
    def specs(self) -> Mapping[Path, Spec]:
        """The specs with the dtype cast to."""
        return {
            path: spec._replace(dtype=self.dtype) if self._cast(path) else spec
            for path, spec in self.source.specs.items()
        }

    def pieces(self, path: Path) -> Iterable[np.ndarray]:
        """Return the pieces, cast.

        Raises:
            CheckpointError: a finite number that the dtype holds only as an infinite one.
        """
        for piece in self.source.pieces(path):
            if not self._cast(path):
                yield piece
                continue
            yield cast_array(self.path, "/".join(map(str, path)), piece, numpy_dtype(self.dtype))

    def _cast(self, path: Path) -> bool:
        kind = self.source.kinds.get(path, "unknown")
        return self.source.specs[path].dtype in FLOATING and not is_mask(path, kind)
