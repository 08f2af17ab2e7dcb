"""Propose rename rules for two models whose modules have other names."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..files.printable import shown
from ..frameworks import torch
from .arguments import require_rules
from .errors import TrainingDifference
from .match import is_legacy_mask, pair, torch_name
from .propose import proposed_rules
from .renamed import renamed
from .state_kinds import FlaxSide, flax_side
from .structure import Shape
from .tensors import shape_of
from .wrappers import require_torch, without_wrapper


@dataclass(frozen=True)
class Proposal:
    """Rename rules that `suggest` found, and what they leave open.

    Attributes:
        rename: the rules, for `rename` of `compare.match`.
        in_order: the torch modules that only their order tells from others: look at these.
        open_torch: the torch entries that have no counterpart under these rules.
        open_flax: the Flax entries that have none.
    """

    rename: dict[str, str]
    in_order: tuple[str, ...]
    open_torch: tuple[str, ...]
    open_flax: tuple[str, ...]

    def __str__(self) -> str:
        """Return the rules as an argument to paste, and below it what to look at."""
        lines = [f"rename={json.dumps(self.rename, indent=4, ensure_ascii=False)}"]
        for title, names in (
            ("only their order tells these apart; look at them", self.in_order),
            ("open in torch", self.open_torch),
            ("open in Flax", self.open_flax),
        ):
            if names:
                lines.append(f"{title}: {', '.join(map(shown, names))}")
        return "\n".join(lines)


def suggest(
    source: torch.nn.Module | Mapping[str, Any], template: Any, *, prefix: str = ""
) -> Proposal:
    """Propose the rename rules under which the modules of two models pair.

    Modules are paired by their shapes, their numbers, and names of the field for one thing. These
    are guesses: query and key have the same shape. Look at the rules before you pass them to
    `compare.match`, and compare the outputs of the two models afterwards.

    Args:
        source: a torch module or state dict.
        template: Linen variables or their `jax.eval_shape`, or an NNX model.
        prefix: what the torch names begin with and the Flax names do not.

    Raises:
        TypeError: the source or the template is neither, or the prefix is no text.
        ValueError: no torch name has the prefix.
    """
    require_rules(prefix)
    require_torch(source)
    side = flax_side(template)
    if isinstance(source, torch.nn.Module):
        source = without_wrapper(source, (prefix,))
    every = source.state_dict() if isinstance(source, torch.nn.Module) else source
    tensors = {key: tensor for key, tensor in every.items() if isinstance(key, str)}
    names, _ = renamed(tensors, [], prefix)
    if prefix and all(old == new for old, new in names.items()):
        raise ValueError(f"no torch name has the prefix {prefix!r}: leave it out")
    shapes = {
        names[key]: shape_of(tensor) for key, tensor in tensors.items() if _pairs(key, tensor)
    }
    rules, in_order = proposed_rules(shapes, *_flax_shapes(side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingDifference)
        _, mismatch = pair(source, side, rename=rules, prefix=prefix)
    return Proposal(
        rules,
        tuple(in_order),
        tuple(entry.name for entry in mismatch.unexpected),
        tuple(entry.place for entry in mismatch.missing),
    )


def _pairs(key: str, tensor: Any) -> bool:
    """Return whether the torch entry has a counterpart in Flax: a counter or old mask has none."""
    return not key.endswith("num_batches_tracked") and not is_legacy_mask(key, tensor)


def _flax_shapes(side: FlaxSide) -> tuple[dict[str, Shape], dict[str, str]]:
    """Return the shapes of the Flax entries and their own names, by the names in torch."""
    paths = {torch_name(path, side): path for path in side.leaves}
    return (
        {name: tuple(side.leaves[path].shape) for name, path in paths.items()},
        {name: ".".join(side.names[path]) for name, path in paths.items()},
    )
