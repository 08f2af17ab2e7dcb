"""Judge the outputs of an implementation by the float64 reference and the rounding bound."""

import numpy as np

from .agreement import Agreement, agreement
from .cases import Config, State
from .reference import attention_stages, causal_mask
from .remembered import remembered
from .rounding_bound import PRECISIONS, Precision, stage_bounds


def against_reference(
    outputs: np.ndarray,
    config: Config,
    state: State,
    inputs: np.ndarray,
    keep: np.ndarray | None = None,
) -> Agreement:
    """Compare outputs with the reference, each entry within what rounding in the inputs' dtype explains.

    Args:
        outputs: (batch, tokens, output_embedding_dim), from any implementation.
        config: for the dropout that `keep` was drawn with.
        state: parameters by torch's names, and the mask; without one it is causal.
        inputs: (batch, tokens, input_embedding_dim), in one of `PRECISIONS`.
        keep: (batch, tokens, tokens), True where dropout kept the weight; None for no dropout.
    """
    exact, limit = exact_and_limit(config, state, inputs, keep)
    return agreement(outputs, exact, limit)


def exact_and_limit(
    config: Config,
    state: State,
    inputs: np.ndarray,
    keep: np.ndarray | None = None,
    precision: Precision | None = None,
    tiles: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference's outputs, and how far from them rounding may carry an implementation.

    Arguments are those of `against_reference`; another precision than that of the inputs' dtype may
    be given, and of how many tiles the implementation's softmax may be put together.
    """
    return _exact_and_limit(
        config, state, inputs, keep, precision or PRECISIONS[inputs.dtype.name], tiles
    )


@remembered
def _exact_and_limit(
    config: Config,
    arrays: dict[str, np.ndarray],
    inputs: np.ndarray,
    keep: np.ndarray | None,
    precision: Precision,
    tiles: int,
) -> tuple[np.ndarray, np.ndarray]:
    mask = arrays.get("mask", causal_mask(config.context_length))
    exact = attention_stages(inputs, arrays, mask, keep, config.dropout, config.num_heads).context
    # The reference rounds too, in float64.
    bounds = [
        stage_bounds(inputs, arrays, mask, each, keep, config.dropout, config.num_heads, tiles)
        for each in (precision, PRECISIONS["float64"])
    ]
    return exact, bounds[0].context + bounds[1].context
