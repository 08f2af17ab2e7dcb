"""Which tiles of the score matrix have unblocked pairs: decided on the device, in compiled code."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Shaped

from .attention import is_nonzero

ROWS_AT_ONCE = 256  # rows of a mask that are compared with a causal one at a time


class Shape(NamedTuple):
    """The number of queries and keys of a tile."""

    queries: int
    keys: int


# XLA spreads a product over the CPU's cores if it is large, or if there are many heads. A tile of
# many heads has to be small to stay in the cache.
LARGE_TILE, SMALL_TILE = Shape(512, 256), Shape(128, 128)
MAX_HEADS_OF_LARGE_TILES = 16
MIN_TILED_TOKENS = 512  # with fewer, all pairs are one tile


class Tile(NamedTuple):
    """A tile: its first query and key, and the pairs that count as blocked.

    The last tile of a row or column is moved back to end at the last token. The pairs that it
    shares with the tile before count as blocked.
    """

    first_query: Int[Array, ""]
    first_key: Int[Array, ""]
    blocked: Bool[Array, "queries keys"]

    @property
    def is_open(self) -> Bool[Array, ""]:
        """Whether no pair is blocked."""
        return ~self.blocked.any()


def tile_shape(num_tokens: int, num_heads: int | None) -> Shape:
    """Return the shape of the tiles; the number of heads is None where it is not known."""
    if num_tokens < MIN_TILED_TOKENS:
        return Shape(num_tokens, num_tokens)
    is_large = num_heads is not None and num_heads <= MAX_HEADS_OF_LARGE_TILES
    return LARGE_TILE if is_large else SMALL_TILE


def over_strips(
    mask: Shaped[Array, "context_length context_length"],
    num_tokens: int,
    shape: Shape,
    add_strip: Callable[[Int[Array, ""], Bool[Array, " queries"], Callable[..., Any], Any], Any],
    results: Any,
) -> Any:
    """Call `add_strip(first_query, is_new, over_tiles, results)` for each strip of queries.

    `is_new` are the queries that no strip before has had. `over_tiles(add_tile, carry)` calls
    `add_tile(tile, carry)` for each tile of the strip that has an unblocked pair.
    """
    num_strips = -(-num_tokens // shape.queries)

    def body(strip: Int[Array, ""], results: Any) -> Any:
        nominal = strip.astype(jnp.int32) * shape.queries
        first_query = jnp.minimum(nominal, num_tokens - shape.queries)
        is_new = first_query + jnp.arange(shape.queries, dtype=jnp.int32) >= nominal

        def over_tiles(add_tile: Callable[[Tile, Any], Any], carry: Any) -> Any:
            return _over_tiles(mask, num_tokens, shape, first_query, is_new, add_tile, carry)

        return add_strip(first_query, is_new, over_tiles, results)

    return lax.fori_loop(0, num_strips, body, results)


def _over_tiles(
    mask: Shaped[Array, "context_length context_length"],
    num_tokens: int,
    shape: Shape,
    first_query: Int[Array, ""],
    is_new: Bool[Array, " queries"],
    add_tile: Callable[[Tile, Any], Any],
    carry: Any,
) -> Any:
    num_tiles = -(-num_tokens // shape.keys)
    next_tiles = _next_tiles(mask, num_tokens, shape, first_query, is_new)
    # In a program without padding, the compiler need not test for it.
    repeats_queries, repeats_keys = num_tokens % shape.queries, num_tokens % shape.keys

    def next_tile(tile: Int[Array, ""]) -> Int[Array, ""]:
        return next_tiles[tile + 1]

    def step(tile_and_carry: tuple[Int[Array, ""], Any]) -> tuple[Int[Array, ""], Any]:
        tile, carry = tile_and_carry
        nominal = tile * shape.keys
        first_key = jnp.minimum(nominal, num_tokens - shape.keys)
        blocked = is_nonzero(slice_of(mask, (first_query, first_key), shape))
        if repeats_queries:
            blocked |= ~is_new[:, None]
        if repeats_keys:
            blocked |= (first_key + jnp.arange(shape.keys, dtype=jnp.int32) < nominal)[None]
        return next_tile(tile), add_tile(Tile(first_query, first_key, blocked), carry)

    first = next_tile(jnp.int32(-1))
    return lax.while_loop(lambda each: each[0] < num_tiles, step, (first, carry))[1]


def _next_tiles(
    mask: Shaped[Array, "context_length context_length"],
    num_tokens: int,
    shape: Shape,
    first_query: Int[Array, ""],
    is_new: Bool[Array, " queries"],
) -> Int[Array, " tiles_and_one"]:
    """Return at t + 1 the first tile after tile t of the strip that has an unblocked pair."""
    num_tiles = -(-num_tokens // shape.keys)
    rows = slice_of(mask, (first_query, jnp.zeros_like(first_query)), (shape.queries, num_tokens))
    is_open = (~is_nonzero(rows) & is_new[:, None]).any(axis=0)
    is_open = jnp.pad(is_open, (0, num_tiles * shape.keys - num_tokens))
    is_used = is_open.reshape(num_tiles, shape.keys).any(axis=1)
    tiles = jnp.arange(num_tiles, dtype=jnp.int32)[None]
    is_later = tiles > jnp.arange(-1, num_tiles, dtype=jnp.int32)[:, None]
    return jnp.where(is_used[None] & is_later, tiles, num_tiles).min(axis=1)


def slice_of(array: Array, start: tuple[Any, Any], sizes: tuple[int, int]) -> Array:
    """Return a part of a matrix. The start is inside, so that it need not be tested."""
    return lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)


def is_causal(
    mask: Shaped[Array, "context_length context_length"], num_tokens: int
) -> Bool[Array, ""]:
    """Return whether the first `num_tokens` rows and columns of the mask are causal.

    Only a few rows are compared at a time.
    """
    height = min(ROWS_AT_ONCE, num_tokens)

    def rows_are_causal(start: Int[Array, ""]) -> Bool[Array, ""]:
        start = jnp.minimum(start, num_tokens - height)
        blocked = is_nonzero(
            lax.dynamic_slice(mask, (start, jnp.zeros_like(start)), (height, num_tokens))
        )
        query = start + lax.broadcasted_iota(start.dtype, blocked.shape, 0)
        return (blocked == (lax.broadcasted_iota(start.dtype, blocked.shape, 1) > query)).all()

    return lax.map(rows_are_causal, jnp.arange(0, num_tokens, height)).all()
