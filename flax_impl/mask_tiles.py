"""Which tiles of the score matrix a stored mask leaves open: decided on the device, inside the compiled program."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Shaped

from .attention import is_nonzero

ROWS, COLUMNS = 256, 128  # of the blocks that are looked at


class Shape(NamedTuple):
    """How many queries and keys a tile has."""

    queries: int
    keys: int


class Tiling(NamedTuple):
    """The tiles of one shape that have an open entry, in strips of queries; those open everywhere come first.

    Tile `t` of strip `i` begins at query `i * shape.queries` and at key `first[i] + order[i, t] *
    shape.keys`.
    """

    num_strips: Int[Array, ""]
    first: Int[Array, " strips"]
    order: Int[Array, "strips tiles"]
    num_open: Int[Array, " strips"]
    num_tiles: Int[Array, " strips"]


def tile_shapes(num_tokens: int) -> tuple[Shape, ...]:
    """Return the shapes to choose from: a smaller product of matrices is not spread over the CPU's cores."""
    return (
        (Shape(512, 256), Shape(256, 512))
        if num_tokens >= 512
        else (Shape(num_tokens, num_tokens),)
    )


def tilings(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> tuple[Tiling, ...]:
    """Return a tiling for each shape; only the one with the fewest tiles has strips."""
    shapes = tile_shapes(num_tokens)
    some_open, some_blocked = _blocks(mask, num_tokens)
    found = [_tiling(shape, num_tokens, some_open, some_blocked) for shape in shapes]
    best = jnp.argmin(jnp.stack([tiling.num_tiles.sum() for tiling in found]))
    return tuple(
        tiling._replace(num_strips=jnp.where(best == number, tiling.num_strips, 0))
        for number, tiling in enumerate(found)
    )


def is_causal(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> Bool[Array, ""]:
    """Tell whether the mask's first rows and columns block what a causal one does, looking at some rows at a time."""
    height = min(ROWS, num_tokens)

    def look(start: Int[Array, ""]) -> Bool[Array, ""]:
        start = jnp.minimum(start, num_tokens - height)
        blocked = is_nonzero(
            lax.dynamic_slice(mask, (start, jnp.zeros_like(start)), (height, num_tokens))
        )
        behind = start + lax.broadcasted_iota(start.dtype, blocked.shape, 0)
        return (blocked == (lax.broadcasted_iota(start.dtype, blocked.shape, 1) > behind)).all()

    return lax.map(look, jnp.arange(0, num_tokens, height)).all()


def _blocks(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> tuple[Bool[Array, "rows columns"], Bool[Array, "rows columns"]]:
    """Tell of each block whether some entry is open, and whether some is blocked or beyond the last token."""
    height = min(ROWS, num_tokens)
    beyond = -num_tokens % COLUMNS

    def look(start: Int[Array, ""]) -> tuple[Bool[Array, " columns"], Bool[Array, " columns"]]:
        start = jnp.minimum(start, num_tokens - height)  # some of the last rows are looked at twice
        rows = lax.dynamic_slice(mask, (start, jnp.zeros_like(start)), (height, num_tokens))
        count = is_nonzero(rows).sum(axis=0, dtype=jnp.int16)
        some_open = jnp.pad(count < height, (0, beyond)).reshape(-1, COLUMNS).any(axis=1)
        some_blocked = (
            jnp.pad(count > 0, (0, beyond), constant_values=True).reshape(-1, COLUMNS).any(axis=1)
        )
        return some_open, some_blocked

    return lax.map(look, jnp.arange(0, num_tokens, height))


def _tiling(
    shape: Shape,
    num_tokens: int,
    some_open: Bool[Array, "rows columns"],
    some_blocked: Bool[Array, "rows columns"],
) -> Tiling:
    num_strips, num_tiles = -(-num_tokens // shape.queries), -(-num_tokens // shape.keys)
    rows = -(-shape.queries // ROWS)
    columns = -(-shape.keys // COLUMNS)

    def strips(blocks: Bool[Array, "rows columns"]) -> Bool[Array, "strips columns"]:
        beyond = num_strips * rows - blocks.shape[0]
        return jnp.pad(blocks, ((0, beyond), (0, 0))).reshape(num_strips, rows, -1).any(axis=1)

    some_open, some_blocked = strips(some_open), strips(some_blocked)
    first = jnp.argmax(some_open, axis=1)
    # Beyond the last block nothing is open.
    places = first[:, None] + jnp.arange(num_tiles * columns)[None]

    def tiles(blocks: Bool[Array, "strips columns"], beyond: bool) -> Bool[Array, "strips tiles"]:
        taken = jnp.take_along_axis(blocks, places, axis=1, mode="fill", fill_value=beyond)
        return taken.reshape(num_strips, num_tiles, columns).any(axis=2)

    is_used = tiles(some_open, False)
    is_mixed = tiles(some_blocked, True)
    order = jnp.argsort(jnp.where(is_used, is_mixed.astype(jnp.int32), 2), axis=1, stable=True)
    num_used = is_used.sum(axis=1)
    return Tiling(
        jnp.int32(num_strips),
        (first * COLUMNS).astype(jnp.int32),
        order.astype(jnp.int32),
        (is_used & ~is_mixed).sum(axis=1),
        num_used,
    )
