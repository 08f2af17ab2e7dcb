"""Checks of the modules' arguments. Each error message gives the numbers that do not fit."""

from collections.abc import Sequence
from itertools import zip_longest
from math import isfinite
from numbers import Integral, Real


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless 0 <= dropout <= 1 (NaN is refused too)."""
    try:
        is_probability = 0.0 <= dropout <= 1.0
    except TypeError:  # of what is no number
        is_probability = False
    if not is_probability:
        raise ValueError(f"dropout is {dropout}; a probability lies between 0 and 1")


def check_inputs(
    shape: Sequence[int], input_embedding_dim: int, context_length: int, name: str = "inputs"
) -> None:
    """Raise ValueError unless shape is (*batch, tokens <= context_length, input_embedding_dim)."""
    has = "have" if name == "inputs" else "has"
    if len(shape) < 2 or shape[-1] != input_embedding_dim:
        raise ValueError(
            f"{name} {has} shape {tuple(shape)}; "
            f"expected (*batch, tokens, input_embedding_dim={input_embedding_dim})"
        )
    if shape[-2] > context_length:
        raise ValueError(
            f"{name} {has} {shape[-2]} tokens; the mask covers context_length={context_length}: "
            f"shorten the {name}, or build the module with context_length >= {shape[-2]}"
        )


def check_mask(shape: Sequence[int], context_length: int) -> None:
    """Raise ValueError unless the mask is (context_length, context_length)."""
    if tuple(shape) != (context_length, context_length):
        raise ValueError(
            f"mask has shape {tuple(shape)}; context_length={context_length} needs "
            f"({context_length}, {context_length}): give the module a mask of that shape"
        )


def check_heads(output_embedding_dim: int, num_heads: int, num_kv_heads: int | None = None) -> None:
    """Raise ValueError unless num_heads divides the width, and num_kv_heads divides num_heads."""
    if not _divides(num_heads, output_embedding_dim):
        raise ValueError(
            f"output_embedding_dim={output_embedding_dim} cannot be divided into "
            f"num_heads={num_heads}: give a width that is a multiple of the number of heads"
        )
    if num_kv_heads is not None and not _divides(num_kv_heads, num_heads):
        raise ValueError(
            f"num_heads={num_heads} cannot share num_kv_heads={num_kv_heads}: give a number of "
            "heads of keys and values that divides the number of heads"
        )


def _divides(divisor: int, number: int) -> bool:
    is_whole = isinstance(divisor, Integral) and not isinstance(divisor, bool)
    return is_whole and divisor >= 1 and number % divisor == 0


def each_bias(qkv_bias: bool | tuple[bool, bool, bool]) -> tuple[bool, bool, bool]:
    """Return whether queries, keys and values have a bias; raise ValueError unless it is said."""
    each = qkv_bias if isinstance(qkv_bias, tuple) else (qkv_bias,) * 3
    if len(each) != 3 or isinstance(qkv_bias, list):
        raise ValueError(
            f"qkv_bias is {qkv_bias!r}; expected True or False, or a tuple of three of them: "
            "for queries, keys and values"
        )
    return bool(each[0]), bool(each[1]), bool(each[2])


def check_scale(scale: float | None) -> None:
    """Raise ValueError unless the scale is None or a finite number."""
    try:
        is_finite = isinstance(scale, Real) and not isinstance(scale, bool) and isfinite(scale)
    except OverflowError:  # of a whole number that is larger than any float
        is_finite = False
    if scale is not None and not is_finite:
        raise ValueError(
            f"scale is {scale!r}; expected a finite number, or None for 1 / sqrt(head_dim)"
        )


def check_pairs(shape: Sequence[int], expected: Sequence[int], name: str) -> None:
    """Raise ValueError unless a mask is (queries, keys) or has all axes of the attention weights.

    Each axis may be 1. Three axes for four are refused: the first may be the batch or the heads.
    """
    pairs = zip(shape[::-1], expected[::-1], strict=False)
    if len(shape) not in (2, len(expected)) or any(one not in (1, two) for one, two in pairs):
        raise ValueError(
            f"{name} has shape {tuple(shape)}; expected {tuple(expected)}, the shape of the "
            f"attention weights, where any axis may be 1, or {tuple(expected[-2:])}"
        )


def weights_shape(queries: Sequence[int], keys: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the attention weights; heads of queries may share one of keys."""
    leading = zip_longest(queries[-3::-1], keys[-3::-1], fillvalue=1)
    return *[two if one == 1 else one for one, two in leading][::-1], queries[-2], keys[-2]


def check_covered(shape: Sequence[int], queries: Sequence[int], keys: Sequence[int]) -> None:
    """Raise ValueError unless the mask covers the attention weights of queries and keys.

    It has a row and a column for every key. With more than two axes, it broadcasts to the weights.
    """
    num_tokens = keys[-2]
    if len(shape) > 2:
        check_pairs(shape, weights_shape(queries, keys), "mask")
    elif len(shape) != 2 or min(shape) < num_tokens:
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
