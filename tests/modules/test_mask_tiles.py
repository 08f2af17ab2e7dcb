"""The tiles of each strip cover every unblocked pair, and are those that are needed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from flax_impl.mask_tiles import Tile, over_strips, tile_shape


def drawn(kind: str, tokens: int) -> np.ndarray:
    """Return which pairs are blocked."""
    random = np.random.default_rng(tokens)
    behind = np.arange(tokens)[:, None] - np.arange(tokens)
    if kind == "window":
        return (behind < 0) | (behind > 130)
    blocked = np.ones((tokens, tokens), bool)
    if kind == "one key each":
        blocked[np.arange(tokens), random.integers(0, tokens, tokens)] = False
    elif kind == "blocks":
        for row, column in random.integers(0, tokens, (6, 2)):
            blocked[row : row + 300, column : column + 300] = False
    return blocked


@pytest.mark.parametrize("kind", ["window", "one key each", "blocks", "closed"])
@pytest.mark.parametrize("num_heads", [1, 17])
@pytest.mark.parametrize(
    "tokens", [5, 511, 512, 513, pytest.param(700, marks=pytest.mark.again), 1100]
)
def test_each_unblocked_pair_is_in_one_tile_and_each_tile_has_one(
    tokens: int, num_heads: int, kind: str
) -> None:
    blocked = drawn(kind, tokens)
    shape = tile_shape(tokens, num_heads)
    assert shape == (
        (tokens, tokens) if tokens < 512 else (512, 256) if num_heads == 1 else (128, 128)
    )

    def add_tile(tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        times, is_needed = carry
        start = tile.first_query, tile.first_key
        open_pairs = lax.dynamic_slice(times, start, shape) + (~tile.blocked).astype(jnp.int32)
        assert tile.blocked.shape == shape
        return lax.dynamic_update_slice(times, open_pairs, start), is_needed & ~tile.blocked.all()

    def add_strip(_first: Any, _is_new: Any, over_tiles: Any, carry: Any) -> Any:
        return over_tiles(add_tile, carry)

    times, is_needed = over_strips(
        jnp.asarray(blocked),
        tokens,
        shape,
        add_strip,
        (jnp.zeros((tokens, tokens), jnp.int32), jnp.array(True)),
    )
    assert np.array_equal(times, ~blocked)
    assert is_needed


def test_many_heads_and_an_unknown_number_have_small_tiles() -> None:
    assert tile_shape(1024, 16) == (512, 256)
    assert tile_shape(1024, 17) == tile_shape(1024, None) == (128, 128)
