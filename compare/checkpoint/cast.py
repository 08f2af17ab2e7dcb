"""Tensors in another floating dtype, cast only because it was asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np

from ..errors import CheckpointError, shown
from ..mapping import Mapping as Table
from ..mapping import Path
from ..transfer import numpy_dtype
from .manifest import LayoutName, is_mask
from .spec import FLOATS, Spec
from .stored import Tensors


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
            with np.errstate(over="ignore"):
                found = piece.astype(numpy_dtype(self.dtype))
            if bool((np.isfinite(piece) & ~np.isfinite(found)).any()):
                name = shown("/".join(map(str, path)))
                raise CheckpointError(
                    self.path, f"{name} has numbers beyond {self.dtype}", key=name, expected=f"numbers of {self.dtype}",
                    found=f"up to {float(np.nanmax(np.abs(piece.astype(np.float64)))):.3g}",
                    mend="choose bfloat16 or float32",
                )  # fmt: skip
            yield found

    def _cast(self, path: Path) -> bool:
        kind = self.source.kinds.get(path, "unknown")
        return self.source.specs[path].dtype in FLOATS and not is_mask(path, kind)
