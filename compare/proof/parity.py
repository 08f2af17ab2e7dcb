"""Compare the outputs of an implementation with the reference, within the rounding bound."""

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
    """Compare outputs with the reference; the limit of each entry is its rounding bound.

    Args:
        outputs: (batch, tokens, output_embedding_dim), from any implementation.
        config: the constructor arguments; `keep` was drawn with their dropout.
        state: the parameters by their torch names, and the mask; without one it is causal.
        inputs: (batch, tokens, input_embedding_dim), in one of the dtypes of `PRECISIONS`.
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
    """Return the reference outputs, and the largest error that rounding explains in each entry.

    Args:
        config: as for `against_reference`.
        state: as for `against_reference`.
        inputs: as for `against_reference`.
        keep: as for `against_reference`.
        precision: how the implementation rounds; None takes the precision of the inputs' dtype.
        tiles: the largest number of tiles in which the implementation computes its softmax; 0 if
            it computes each row at once.
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
    exact = attention_stages(inputs, arrays, mask, keep, *config.options).context
    # The reference rounds too, in float64.
    bounds = [
        stage_bounds(inputs, arrays, mask, rounding, keep, *config.options, tiles=tiles)
        for rounding in (precision, PRECISIONS["float64"])
    ]
    return exact, bounds[0].context + bounds[1].context
