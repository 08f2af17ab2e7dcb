"""The tiles of each strip cover every unblocked pair, and are those that are needed."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_impl.mask_tiles import tile_shapes, tilings


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
@pytest.mark.parametrize(
    "tokens", [5, 511, 512, 513, pytest.param(700, marks=pytest.mark.again), 1100]
)
def test_each_unblocked_pair_is_in_a_tile_and_each_tile_has_one(tokens: int, kind: str) -> None:
    blocked = drawn(kind, tokens)
    found = tilings(jnp.asarray(blocked), tokens)
    assert sum(int(tiling.num_strips) > 0 for tiling in found) == 1
    assert len(found) == len(tile_shapes(tokens)) == (2 if tokens >= 512 else 1)
    for shape, tiling in zip(tile_shapes(tokens), found, strict=True):
        begins = range(0, tokens, shape.queries)
        assert len(tiling.first) == len(begins)
        assert int(tiling.num_strips) in (0, len(begins))
        for strip, begin in enumerate(begins):
            moved = min(begin, tokens - shape.queries)  # the last strip ends at the last query
            left = ~blocked[begin : begin + shape.queries]
            first, order = int(tiling.first[strip]), tiling.order[strip].tolist()
            for index in range(int(tiling.num_tiles[strip])):
                start = first + order[index] * shape.keys
                columns = slice(start, start + shape.keys)
                assert (~blocked[moved : moved + shape.queries, columns]).any()
                if index < int(tiling.num_open[strip]):
                    assert start + shape.keys <= tokens and left[:, columns].all()
                left[:, columns] = False
            assert not left.any()
