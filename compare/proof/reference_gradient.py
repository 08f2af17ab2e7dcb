"""The derivatives of masked attention, written out: against these the gradients of the frameworks are judged."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from .dual_numbers import Dual
from .running_error import Bounded

Number = TypeVar("Number", Bounded, Dual)


def attention_forward(
    given: Mapping[str, Number],
    mask: np.ndarray,
    keep: np.ndarray | None = None,
    rate: float = 0.0,
    num_heads: int | None = None,
) -> dict[str, Number]:
    """Return the stages of masked attention: queries, keys, values, weights, dropped, context, outputs.

    With heads, all but the outputs have these before the tokens; the outputs are those of
    `out_proj`.

    Args:
        given: `inputs` (batch, tokens, input_embedding_dim), `W_query.weight` (out, in), ...,
            `W_query.bias` if any; the parameters may all have one leading axis more, and then the
            stages have it.
        mask: (context_length, context_length); nonzero blocks, leaving something open in every row.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
        rate: the probability that `keep` was drawn with.
        num_heads: as of `CausalMultiHeadAttention`; None for the classes with one head.
    """
    inputs = given["inputs"]
    tokens = inputs.shape[-2]
    opened = mask[:tokens, :tokens] == 0
    queries, keys, values = (
        _project(inputs, given, name) for name in ("W_query", "W_key", "W_value")
    )
    if num_heads is not None:
        queries, keys, values = (stage.split(num_heads) for stage in (queries, keys, values))
    scores = (queries @ keys.mT).scaled(queries.shape[-1] ** -0.5, roundings=4)
    exponentials = scores.shifted(opened).exp().kept(opened)
    weights = exponentials / exponentials.sum(-1, keepdims=True)
    dropped = _dropped(weights, keep, rate)
    context = dropped @ values
    outputs = context if num_heads is None else _project(context.merged(), given, "out_proj")
    return {
        **{"queries": queries, "keys": keys, "values": values, "weights": weights},
        **{"dropped": dropped, "context": context, "outputs": outputs},
    }


def attention_gradient(
    given: Mapping[str, Number],
    stages: Mapping[str, Number],
    cotangent: Number,
    keep: np.ndarray | None = None,
    rate: float = 0.0,
    num_heads: int | None = None,
) -> dict[str, Number]:
    """Return the gradient of sum(outputs * cotangent) by everything in `given`.

    With w the weights before dropout, D what dropout does and g the cotangent: values get D(w)^T g;
    w gets a = D(g values^T); the scores before softmax get w (a - sum(a w)) / sqrt(head_dim).

    Args:
        given: as `attention_forward` was given.
        stages: what it returned.
        cotangent: (batch, tokens, output_embedding_dim).
        keep: as `attention_forward` was given.
        rate: likewise.
        num_heads: likewise.
    """
    gradient: dict[str, Number] = {}
    if num_heads is not None:
        rows = cotangent.rows()
        gradient["out_proj.weight"] = rows.mT @ stages["context"].merged().rows()
        gradient["out_proj.bias"] = rows.sum(-2)
        cotangent = (rows @ given["out_proj.weight"]).batched(cotangent.shape[-3]).split(num_heads)
    weights = stages["weights"]
    to_weights = _dropped(cotangent @ stages["values"].mT, keep, rate)
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdims=True))
    to_scores = to_scores.scaled(stages["queries"].shape[-1] ** -0.5, roundings=4)
    to_projected = {
        "W_query": to_scores @ stages["keys"],
        "W_key": to_scores.mT @ stages["queries"],
        "W_value": stages["dropped"].mT @ cotangent,
    }
    by_inputs = []
    for name, arrived in to_projected.items():
        if num_heads is not None:
            arrived = arrived.merged()
        rows = arrived.rows()
        gradient[f"{name}.weight"] = rows.mT @ given["inputs"].rows()
        if f"{name}.bias" in given:
            gradient[f"{name}.bias"] = rows.sum(-2)
        by_inputs.append((rows @ given[f"{name}.weight"]).batched(arrived.shape[-3]))
    gradient["inputs"] = by_inputs[0] + by_inputs[1] + by_inputs[2]
    return gradient


def _project(inputs: Number, given: Mapping[str, Number], name: str) -> Number:
    projected = inputs.rows() @ given[f"{name}.weight"].mT
    if f"{name}.bias" in given:
        projected = projected + given[f"{name}.bias"].spread(before=1)
    return projected.batched(inputs.shape[-3])


def _dropped(weights: Number, keep: np.ndarray | None, rate: float) -> Number:
    return weights if keep is None else weights.kept(keep).scaled(1.0 / (1.0 - rate), roundings=3)
