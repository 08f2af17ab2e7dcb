"""Checks of the modules' arguments. Each error message gives the numbers that do not fit."""

from collections.abc import Sequence
from itertools import zip_longest
from numbers import Integral


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless 0 <= dropout <= 1 (NaN is refused too)."""
    try:
        is_probability = 0.0 <= dropout <= 1.0
    except TypeError:  # of what is no number
        is_probability = False
    if not is_probability:
        raise ValueError(f"dropout is {dropout}; a probability lies between 0 and 1")


def check_inputs(shape: Sequence[int], input_embedding_dim: int, context_length: int) -> None:
    """Raise ValueError unless shape is (batch, tokens <= context_length, input_embedding_dim)."""
    if len(shape) != 3 or shape[2] != input_embedding_dim:
        raise ValueError(
            f"inputs have shape {tuple(shape)}; "
            f"expected (batch, tokens, input_embedding_dim={input_embedding_dim})"
        )
    if shape[1] > context_length:
        raise ValueError(
            f"inputs have {shape[1]} tokens; the mask covers context_length={context_length}: "
            f"shorten the inputs, or build the module with context_length >= {shape[1]}"
        )


def check_mask(shape: Sequence[int], context_length: int) -> None:
    """Raise ValueError unless the mask is (context_length, context_length)."""
    if tuple(shape) != (context_length, context_length):
        raise ValueError(
            f"mask has shape {tuple(shape)}; context_length={context_length} needs "
            f"({context_length}, {context_length}): give the module a mask of that shape"
        )


def check_heads(output_embedding_dim: int, num_heads: int) -> None:
    """Raise ValueError unless num_heads is a whole number that divides output_embedding_dim."""
    is_whole = isinstance(num_heads, Integral) and not isinstance(num_heads, bool)
    if not is_whole or num_heads < 1 or output_embedding_dim % num_heads:
        raise ValueError(
            f"output_embedding_dim={output_embedding_dim} cannot be divided into "
            f"num_heads={num_heads}: give a width that is a multiple of the number of heads"
        )


def check_covered(shape: Sequence[int], num_tokens: int) -> None:
    """Raise ValueError unless the mask has a row and a column for every token."""
    if len(shape) != 2 or min(shape) < num_tokens:
        raise ValueError(
            f"mask has shape {tuple(shape)}; {num_tokens} tokens need at least "
            f"({num_tokens}, {num_tokens}): give a larger mask, or fewer tokens"
        )


def check_shapes(queries: Sequence[int], keys: Sequence[int], values: Sequence[int]) -> None:
    """Raise ValueError unless these are shapes of queries that attend to keys and values.

    There may be fewer queries than keys. The leading dimensions broadcast.
    """
    shapes = queries, keys, values
    fits = (
        min(map(len, shapes)) >= 2
        and queries[-1] == keys[-1]
        and queries[-2] <= keys[-2] == values[-2]
        and all(
            len({*sizes} - {1}) <= 1
            for sizes in zip_longest(*(shape[-3::-1] for shape in shapes), fillvalue=1)
        )
    )
    if not fits:
        raise ValueError(
            f"queries, keys and values have the shapes {tuple(queries)}, {tuple(keys)} and "
            f"{tuple(values)}; expected (*batch, queries, head_dim), (*batch, tokens, head_dim) "
            "and (*batch, tokens, value_dim), with no more queries than tokens, and in "
            "(batch, heads, ...) as many heads of queries as of keys and values, or a multiple"
        )
