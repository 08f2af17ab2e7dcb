"""The derivatives of masked attention, written out to check the frameworks' gradients."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from .dual_numbers import Dual
from .reference import query_factor
from .running_error import Bounded

Number = TypeVar("Number", Bounded, Dual)


def attention_forward(
    arrays: Mapping[str, Number],
    mask: np.ndarray,
    keep: np.ndarray | None = None,
    rate: float = 0.0,
    num_heads: int | None = None,
    scale: float | None = None,
) -> dict[str, Number]:
    """Return the stages of masked attention by name.

    The names are queries (times the factor that makes the scale), keys, values, weights, dropped
    (the weights after dropout), context and outputs. With several heads, every stage except the
    outputs has a head axis before the tokens, a head of keys is repeated for its queries, and the
    outputs are those of `out_proj`.

    Args:
        arrays: `inputs` (batch, tokens, input_embedding_dim), `W_query.weight` (out, in), ...,
            `W_query.bias` if there is one. All parameters may have an additional leading axis; the
            stages then have it too.
        mask: (context_length, context_length); nonzero blocks. Every row leaves some entry open.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
        rate: the probability that `keep` was drawn with.
        num_heads: the argument of `CausalMultiHeadAttention`; None for the classes with a single
            head.
        scale: the factor of the scores; None is 1 / sqrt(head_dim).
    """
    inputs = arrays["inputs"]
    tokens = inputs.shape[-2]
    opened = (mask[:tokens, :tokens] if mask.ndim == 2 else mask) == 0
    queries, keys, values = (
        _project(inputs, arrays, name) for name in ("W_query", "W_key", "W_value")
    )
    if num_heads is not None:
        copies = queries.shape[-1] // keys.shape[-1]
        queries = queries.split(num_heads)
        keys, values = (
            stage.split(num_heads // copies).repeated(copies) for stage in (keys, values)
        )
    if scale is not None:
        queries = queries.scaled(query_factor(scale, queries.shape[-1]), roundings=4)
    scores = (queries @ keys.mT).scaled(queries.shape[-1] ** -0.5, roundings=4)
    exponentials = scores.shifted(opened).exp().kept(opened)
    weights = exponentials / exponentials.sum(-1, keepdims=True)
    dropped = _dropped(weights, keep, rate)
    context = dropped @ values
    outputs = context if num_heads is None else _project(context.merged(), arrays, "out_proj")
    return {
        "queries": queries,
        "keys": keys,
        "values": values,
        "weights": weights,
        "dropped": dropped,
        "context": context,
        "outputs": outputs,
    }


def attention_gradient(
    arrays: Mapping[str, Number],
    stages: Mapping[str, Number],
    cotangent: Number,
    keep: np.ndarray | None = None,
    rate: float = 0.0,
    num_heads: int | None = None,
    scale: float | None = None,
) -> dict[str, Number]:
    """Return the gradient of sum(outputs * cotangent) with respect to every entry of `arrays`.

    Let w be the weights before dropout, D the dropout and g the cotangent. The gradient of the
    values is D(w)^T g. That of the weights is a = D(g values^T). That of the scores, before they
    are divided by sqrt(head_dim), is w (a - sum(a w)) / sqrt(head_dim).

    Args:
        arrays: the argument of `attention_forward`.
        stages: the stages that it returned.
        cotangent: (batch, tokens, output_embedding_dim).
        keep: the argument of `attention_forward`.
        rate: the argument of `attention_forward`.
        num_heads: the argument of `attention_forward`.
        scale: the argument of `attention_forward`.
    """
    gradient: dict[str, Number] = {}
    if num_heads is not None:
        rows = cotangent.rows()
        gradient["out_proj.weight"] = rows.mT @ stages["context"].merged().rows()
        if "out_proj.bias" in arrays:
            gradient["out_proj.bias"] = rows.sum(-2)
        cotangent = (rows @ arrays["out_proj.weight"]).batched(cotangent.shape[-3]).split(num_heads)
    weights = stages["weights"]
    weights_gradient = _dropped(cotangent @ stages["values"].mT, keep, rate)
    scores_gradient = weights * (
        weights_gradient - (weights_gradient * weights).sum(-1, keepdims=True)
    )
    scores_gradient = scores_gradient.scaled(stages["queries"].shape[-1] ** -0.5, roundings=4)
    queries_gradient = scores_gradient @ stages["keys"]
    if scale is not None:
        factor = query_factor(scale, queries_gradient.shape[-1])
        queries_gradient = queries_gradient.scaled(factor, roundings=4)
    projected_gradients = {
        "W_query": queries_gradient,
        "W_key": scores_gradient.mT @ stages["queries"],
        "W_value": stages["dropped"].mT @ cotangent,
    }
    inputs_gradients = []
    for name, projected in projected_gradients.items():
        if num_heads is not None:
            kv_heads = arrays[f"{name}.weight"].shape[-2] // projected.shape[-1]
            projected = projected.summed_copies(num_heads // kv_heads).merged()
        rows = projected.rows()
        gradient[f"{name}.weight"] = rows.mT @ arrays["inputs"].rows()
        if f"{name}.bias" in arrays:
            gradient[f"{name}.bias"] = rows.sum(-2)
        inputs_gradients.append((rows @ arrays[f"{name}.weight"]).batched(projected.shape[-3]))
    gradient["inputs"] = inputs_gradients[0] + inputs_gradients[1] + inputs_gradients[2]
    return gradient


def _project(inputs: Number, arrays: Mapping[str, Number], name: str) -> Number:
    projected = inputs.rows() @ arrays[f"{name}.weight"].mT
    if f"{name}.bias" in arrays:
        projected = projected + arrays[f"{name}.bias"].spread(before=1)
    return projected.batched(inputs.shape[-3])


def _dropped(weights: Number, keep: np.ndarray | None, rate: float) -> Number:
    return weights if keep is None else weights.kept(keep).scaled(1.0 / (1.0 - rate), roundings=3)
