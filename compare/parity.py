"""Judge the outputs of an implementation by the float64 reference and the rounding bound."""

import numpy as np

from .cases import Config
from .check import Agreement, agreement
from .convert import StateDict
from .reference import attention_stages
from .rounding import PRECISIONS, context_bound
from .transfer import numpy_state


def against_reference(
    outputs: np.ndarray, config: Config, state: StateDict, inputs: np.ndarray, keep: np.ndarray | None = None
) -> Agreement:
    """Compare outputs with the reference, each entry within what rounding in the inputs' dtype explains.

    Args:
        outputs: (batch, tokens, output_embedding_dim), from any implementation.
        config: for the dropout that `keep` was drawn with.
        state: the torch state dict; a state without a mask is causal.
        inputs: (batch, tokens, input_embedding_dim), in one of `PRECISIONS`.
        keep: (batch, tokens, tokens), True where dropout kept the weight; None for no dropout.
    """
    arrays = numpy_state(state)
    causal = np.triu(np.ones((config.context_length, config.context_length)), k=1)
    mask = arrays.get("mask", causal)
    exact = attention_stages(inputs, arrays, mask, keep, config.dropout).context
    # The reference rounds too, in float64.
    precisions = PRECISIONS[inputs.dtype.name], PRECISIONS["float64"]
    limit = sum(context_bound(inputs, arrays, mask, precision, keep, config.dropout) for precision in precisions)
    return agreement(outputs, exact, limit)
