"""Which tiles of the score matrix have unblocked pairs: decided on the device, in compiled code."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Shaped

from .attention import is_nonzero

BLOCK_ROWS, BLOCK_COLUMNS = 256, 128  # the mask is summarised in blocks of this size


class Shape(NamedTuple):
    """The number of queries and keys of a tile."""

    queries: int
    keys: int


TILE_SHAPES = (Shape(512, 256), Shape(256, 512))
MIN_TILED_TOKENS = 512  # with fewer, all pairs are one tile


class Tiling(NamedTuple):
    """The tiles of one shape that have an unblocked pair, for each strip of queries.

    Tile `t` of strip `i` begins at query `i * shape.queries` and at key `first[i] + order[i, t] *
    shape.keys`. The first `num_open[i]` tiles of a strip have no blocked pair.
    """

    num_strips: Int[Array, ""]
    first: Int[Array, " strips"]
    order: Int[Array, "strips tiles"]
    num_open: Int[Array, " strips"]
    num_tiles: Int[Array, " strips"]


def tile_shapes(num_tokens: int) -> tuple[Shape, ...]:
    """Return the tile shapes to choose from.

    They are large, because XLA does not spread a smaller matrix product over the CPU's cores.
    """
    return TILE_SHAPES if num_tokens >= MIN_TILED_TOKENS else (Shape(num_tokens, num_tokens),)


def tilings(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> tuple[Tiling, ...]:
    """Return a tiling for each shape. All but the one with the fewest tiles have no strips."""
    some_open, some_blocked = _blocks(mask, num_tokens)
    candidates = [
        _tiling(shape, num_tokens, some_open, some_blocked) for shape in tile_shapes(num_tokens)
    ]
    best = jnp.argmin(jnp.stack([tiling.num_tiles.sum() for tiling in candidates]))
    return tuple(
        tiling._replace(num_strips=jnp.where(best == index, tiling.num_strips, 0))
        for index, tiling in enumerate(candidates)
    )


def is_causal(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> Bool[Array, ""]:
    """Return whether the first `num_tokens` rows and columns of the mask are causal.

    Only a few rows are compared at a time.
    """
    height = min(BLOCK_ROWS, num_tokens)

    def rows_are_causal(start: Int[Array, ""]) -> Bool[Array, ""]:
        start = jnp.minimum(start, num_tokens - height)
        blocked = is_nonzero(
            lax.dynamic_slice(mask, (start, jnp.zeros_like(start)), (height, num_tokens))
        )
        query = start + lax.broadcasted_iota(start.dtype, blocked.shape, 0)
        return (blocked == (lax.broadcasted_iota(start.dtype, blocked.shape, 1) > query)).all()

    return lax.map(rows_are_causal, jnp.arange(0, num_tokens, height)).all()


def _blocks(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> tuple[Bool[Array, "rows columns"], Bool[Array, "rows columns"]]:
    """Return for each block whether some pair is unblocked, and whether some is blocked.

    Columns after the last token count as blocked.
    """
    height = min(BLOCK_ROWS, num_tokens)
    padding = -num_tokens % BLOCK_COLUMNS

    def summarise(start: Int[Array, ""]) -> tuple[Bool[Array, " columns"], Bool[Array, " columns"]]:
        start = jnp.minimum(start, num_tokens - height)  # the last two blocks of rows may overlap
        rows = lax.dynamic_slice(mask, (start, jnp.zeros_like(start)), (height, num_tokens))
        num_blocked = is_nonzero(rows).sum(axis=0, dtype=jnp.int16)
        some_open = (
            jnp.pad(num_blocked < height, (0, padding)).reshape(-1, BLOCK_COLUMNS).any(axis=1)
        )
        is_blocked = jnp.pad(num_blocked > 0, (0, padding), constant_values=True)
        return some_open, is_blocked.reshape(-1, BLOCK_COLUMNS).any(axis=1)

    return lax.map(summarise, jnp.arange(0, num_tokens, height))


def _tiling(
    shape: Shape,
    num_tokens: int,
    some_open: Bool[Array, "rows columns"],
    some_blocked: Bool[Array, "rows columns"],
) -> Tiling:
    """Return the tiling of one shape, from what `_blocks` returns."""
    num_strips, num_tiles = -(-num_tokens // shape.queries), -(-num_tokens // shape.keys)
    rows_per_tile = -(-shape.queries // BLOCK_ROWS)
    columns_per_tile = -(-shape.keys // BLOCK_COLUMNS)

    def strips(blocks: Bool[Array, "rows columns"]) -> Bool[Array, "strips columns"]:
        padding = num_strips * rows_per_tile - blocks.shape[0]
        padded = jnp.pad(blocks, ((0, padding), (0, 0)))
        return padded.reshape(num_strips, rows_per_tile, -1).any(axis=1)

    some_open, some_blocked = strips(some_open), strips(some_blocked)
    first = jnp.argmax(some_open, axis=1)  # the first block of columns with an unblocked pair
    columns = first[:, None] + jnp.arange(num_tiles * columns_per_tile)[None]

    def tiles(blocks: Bool[Array, "strips columns"], default: bool) -> Bool[Array, "strips tiles"]:
        """Group the blocks into tiles. Blocks after the last one have the default value."""
        shifted = jnp.take_along_axis(blocks, columns, axis=1, mode="fill", fill_value=default)
        return shifted.reshape(num_strips, num_tiles, columns_per_tile).any(axis=2)

    is_used = tiles(some_open, False)
    is_mixed = tiles(some_blocked, True)
    # Open tiles come first, then mixed ones; unused ones come last.
    order = jnp.argsort(jnp.where(is_used, is_mixed.astype(jnp.int32), 2), axis=1, stable=True)
    num_used = is_used.sum(axis=1)
    return Tiling(
        jnp.int32(num_strips),
        (first * BLOCK_COLUMNS).astype(jnp.int32),
        order.astype(jnp.int32),
        (is_used & ~is_mixed).sum(axis=1),
        num_used,
    )
