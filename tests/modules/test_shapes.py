"""Queries that are fewer than the keys, and heads that share keys, in every path."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flax_impl
import torch_impl
from compare.checks.fused import masks
from compare.checks.heads import output_limit
from compare.proof import reference
from compare.proof.agreement import agreement
from torch_impl.dispatch import IMPLEMENTATIONS

TOKENS = 140
RANDOM = np.random.default_rng(5)
MASK = masks()["window"][:TOKENS, :TOKENS].copy()


def in_torch(heads: list[np.ndarray], implementation: Any) -> np.ndarray:
    queries, keys, values = map(torch.from_numpy, heads)
    return torch_impl.masked_attention(
        queries, keys, values, torch.from_numpy(MASK), implementation=implementation
    ).numpy()


def in_flax(heads: list[np.ndarray], implementation: Any) -> np.ndarray:
    with jax.enable_x64(True):
        queries, keys, values = map(jnp.asarray, heads)
        mask = jnp.asarray(MASK)
        return np.asarray(
            flax_impl.masked_attention(queries, keys, values, mask, implementation=implementation)
        )


Attend = Callable[[list[np.ndarray], Any], np.ndarray]
BOTH = [pytest.param(in_torch, id="torch"), pytest.param(in_flax, id="flax")]


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize(
    ("queries", "keys", "values"),
    [
        ((2, 1, 4), (2, TOKENS, 4), (2, TOKENS, 4)),
        ((2, 130, 4), (2, TOKENS, 4), (2, TOKENS, 4)),
        ((2, 0, 4), (2, TOKENS, 4), (2, TOKENS, 4)),
        ((3, 4), (TOKENS, 4), (TOKENS, 4)),
        ((2, TOKENS, 4), (2, TOKENS, 4), (2, TOKENS, 6)),
        ((2, TOKENS, 4), (1, TOKENS, 4), (1, TOKENS, 4)),
        ((2, 6, TOKENS, 4), (2, 3, TOKENS, 4), (2, 3, TOKENS, 4)),
        ((2, 6, 5, 4), (1, 3, TOKENS, 4), (2, 1, TOKENS, 4)),
        ((2, 6, TOKENS, 4), (2, 1, TOKENS, 4), (2, 1, TOKENS, 4)),
    ],
)
def test_it_is_the_formula_of_the_last_tokens(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    values: tuple[int, ...],
    attend: Attend,
    implementation: Any,
) -> None:
    heads = [RANDOM.standard_normal(shape) for shape in (queries, keys, values)]
    found = attend(heads, implementation)
    query_heads, key_heads, value_heads = [
        array.repeat(queries[-3] // array.shape[-3], axis=-3) if array.ndim == 4 else array
        for array in heads
    ]
    exact = reference.masked_attention(query_heads, key_heads, value_heads, MASK).context
    assert found.shape == exact.shape
    if found.size:
        agreed = agreement(found, exact, output_limit(heads))
        assert agreed.held, agreed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize(
    ("queries", "keys", "values"),
    [
        ((2, 7, 4), (2, 6, 4), (2, 6, 4)),  # more queries than tokens
        ((2, 6, 4), (2, 6, 4), (2, 5, 4)),
        ((2, 6, 4), (2, 6, 3), (2, 6, 3)),
        ((4, 6, 4), (2, 6, 4), (2, 6, 4)),  # the first may be the batch
        ((1, 4, 6, 4), (1, 3, 6, 4), (1, 3, 6, 4)),
        ((1, 2, 6, 4), (1, 4, 6, 4), (1, 4, 6, 4)),
        ((3, 4, 6, 4), (2, 4, 6, 4), (2, 4, 6, 4)),
        ((1, 4, 6, 4), (1, 0, 6, 4), (1, 0, 6, 4)),
        ((4,), (4,), (4,)),
    ],
)
def test_other_shapes_are_refused(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    values: tuple[int, ...],
    attend: Attend,
    implementation: Any,
) -> None:
    heads = [np.ones(shape) for shape in (queries, keys, values)]
    with pytest.raises(ValueError, match="queries, keys and values have the shapes") as caught:
        attend(heads, implementation)
    assert f"{queries}, {keys} and {values}" in str(caught.value)


def test_a_mask_too_small_for_the_keys_is_refused() -> None:
    heads = [np.ones((1, 4)), np.ones((TOKENS + 1, 4)), np.ones((TOKENS + 1, 4))]
    for attend in (in_torch, in_flax):
        with pytest.raises(ValueError, match=rf"{TOKENS + 1} tokens need at least"):
            attend(heads, "auto")


def test_one_token_at_a_time_is_the_whole_sequence() -> None:
    """A cache of keys: the outputs of each step are the rows of one call."""
    heads = [RANDOM.standard_normal((2, 20, 4)) for _ in range(3)]
    for attend in (in_torch, in_flax):
        whole = attend(heads, "reference")
        for step in (1, 2, 19, 20):
            queries, keys, values = heads[0][:, step - 1 : step], *(a[:, :step] for a in heads[1:])
            row = attend([queries, keys, values], "reference")
            assert agreement(row[:, 0], whole[:, step - 1], output_limit(heads)).held
