"""Judge the outputs of an implementation by the float64 reference and the rounding bound."""

import numpy as np

from .cases import Config
from .check import Agreement, agreement
from .convert import StateDict
from .reference import attention_stages
from .rounding import UNIT_ROUNDOFF, context_bound
from .transfer import tensor_to_numpy


def against_reference(
    outputs: np.ndarray, config: Config, state: StateDict, inputs: np.ndarray, keep: np.ndarray | None = None
) -> Agreement:
    """Compare outputs with the reference, each entry within what rounding in the inputs' dtype explains.

    Args:
        outputs: (batch, tokens, output_embedding_dim), from any implementation.
        config: for the dropout that `keep` was drawn with.
        state: the torch state dict; a state without a mask is causal.
        inputs: (batch, tokens, input_embedding_dim), float32 or float64.
        keep: (batch, tokens, tokens), True where dropout kept the weight; None for no dropout.
    """
    arrays = {key: tensor_to_numpy(tensor) for key, tensor in state.items()}
    causal = np.triu(np.ones((config.context_length, config.context_length)), k=1)
    mask = arrays.get("mask", causal)
    exact = attention_stages(inputs, arrays, mask, keep, config.dropout).context
    # The reference rounds too, in float64.
    roundoffs = UNIT_ROUNDOFF[inputs.dtype.name], UNIT_ROUNDOFF["float64"]
    limit = sum(context_bound(inputs, arrays, mask, roundoff, keep, config.dropout) for roundoff in roundoffs)
    return agreement(outputs, exact, limit)
