"""Sizes on the far side of every constant in the sources: tokens, heads, batch and head_dim."""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from typing import NamedTuple

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding, agreement
from ..proof.cases import Config, Framework, Trial, draw
from ..proof.parity import exact_and_limit
from ..proof.rounding_bound import most_tiles
from ..runners.run import compiled

_MOST_TOKENS = 2048  # a larger constant is not a number of tokens
_MANY_HEADS = 17


class Size(NamedTuple):
    """The sizes of one run, and the implementation that runs."""

    tokens: int
    batch: int
    heads: int
    head_dim: int
    implementation: str

    def __str__(self) -> str:
        return (
            f"{self.implementation}, {self.tokens} tokens, batch {self.batch}, "
            f"{self.heads} heads of {self.head_dim}"
        )


def constants(package: str) -> dict[str, int]:
    """Return the constants of a package that may be a limit of a size, by module and name."""
    root = import_module(package)
    names = [module.name for module in walk_packages(root.__path__, f"{package}.")]
    return {
        f"{name}.{constant}": value
        for name in names
        for constant, value in vars(import_module(name)).items()
        if constant.isupper() and type(value) is int and 1 < value <= _MOST_TOKENS
    }


def sizes(framework: Framework) -> list[Size]:
    """Return sizes on both sides of each constant of the framework's package."""
    package = "torch_impl" if framework == "torch" else "flax_impl"
    limits = sorted({*constants(package).values()})
    chosen = []
    for index, limit in enumerate(limits):
        more, width = limit + 1, (3, 65)[index % 2]
        batch = (3, 1, 2)[index % 3]
        chosen.append(Size(more, batch if more < 200 else 1, 1, width, "fused"))
        if more < 300:  # the formula's path takes longer
            chosen.append(Size(more, batch, 2, width, "reference"))
    threshold = constants(package)[f"{package}.dispatch.MIN_FUSED_TOKENS"]
    chosen += [Size(tokens, 1, 1, 4, "auto") for tokens in (threshold - 1, threshold)]
    if framework == "torch":  # two wide strips; in Flax it is as one tile and a half
        rows = constants(package)[f"{package}.mask_layout.ROWS_AT_ONCE"]
        chosen.append(Size(2 * rows + 1, 1, 1, 3, "fused"))
    else:  # two tiles, the second of which is short by a half, or by a part of that
        tile = constants(package)[f"{package}.mask_tiles.MIN_TILED_TOKENS"]
        chosen += [Size(2 * tile - short, 1, 1, 3, "fused") for short in (tile // 4, tile // 20)]
        chosen.append(Size(tile + 1, 1, _MANY_HEADS, 2, "fused"))
    many = [limit for name, limit in constants(package).items() if "HEADS" in name]
    chosen += [Size(130, 1, heads + 1, 3, "fused") for heads in many or [_MANY_HEADS]]
    chosen.append(Size(7, _MANY_HEADS, _MANY_HEADS, 2, "reference"))
    return chosen


def check_sizes(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare outputs in float64 at sizes on both sides of each constant, under three masks.

    Nothing of the trial is used.
    """
    for size in sizes(framework):
        config = Config(
            5,
            size.heads * size.head_dim,
            size.tokens + 3,
            0.0,
            num_heads=size.heads,
            implementation=size.implementation,  # type: ignore[arg-type]
        )
        causal = draw(config, size.tokens, np.random.default_rng(3), batch=size.batch)
        edited = causal.mask.copy()
        edited[size.tokens - 1, 1] = edited[size.tokens // 2, 0] = 2.0
        edited[1, size.tokens - 1] = 0.0
        forward = compiled(framework, config, device)  # one program for all masks
        first_two = np.ones_like(causal.mask)
        first_two[:, :2] = 0.0
        masks = {"causal": causal.mask, "edited": edited, "only the first two": first_two}
        if size.implementation == "fused":
            masks["open"] = np.zeros_like(causal.mask)
        for name, mask in masks.items():
            masked = causal.masked(f"{size}, {name}", mask)
            tiles = most_tiles(size.tokens)
            exact, limit = exact_and_limit(config, masked.state, masked.inputs, tiles=tiles)
            agreed = agreement(forward(masked.state, masked.inputs), exact, limit)
            yield Finding("sizes", framework, masked.name, agreed, tolerances.OUTPUT)
