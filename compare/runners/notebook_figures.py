"""The figures that the source notebook printed, and the dropout patterns that reproduce its rows.

The notebook never calls `.eval()`, so dropout was active in its outputs. Flax cannot reproduce
torch's random numbers. But a row has few attention weights, so every dropout pattern can be tried:
the module must give each printed row under *some* pattern of kept weights, scaled by
1 / (1 - dropout).
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch

from ..conversion.tensors import numpy_state
from ..proof.cases import NOTEBOOK, Framework, State
from ..proof.reference import causal_mask
from ..proof.rounding_bound import PRECISIONS, stage_bounds
from .run import build_torch, run

# The notebook prints four decimals, so a value lies within half a unit of the last decimal.
PRINT_ROUNDING = 0.5e-4


class RowMatch(NamedTuple):
    """One printed row, and the dropout patterns under which the module gives it.

    Attributes:
        batch: the index of the row in the batch.
        token: the index of the row among the tokens.
        printed: the printed figures.
        dropped: the positions that the best pattern drops.
        patterns: the number of patterns that fit.
        error: the largest distance of the best pattern's outputs from the printed figures.
        limit: the largest distance that is allowed.
    """

    batch: int
    token: int
    printed: tuple[float, ...]
    dropped: tuple[int, ...]
    patterns: int
    error: float
    limit: float


@cache
def figures() -> dict[str, Any]:
    """Return the notebook's figures; the cell numbers are those of the notebook."""
    return json.loads(
        files("compare").joinpath("data/notebook_figures.json").read_text(encoding="utf-8")
    )


def inputs() -> np.ndarray:
    """Return the notebook's batch: the same six tokens twice, (2, 6, 3) float32."""
    tokens = np.array(figures()["inputs"], dtype=np.float32)
    return np.stack([tokens, tokens])


def initial_states() -> tuple[State, State]:
    """Return the notebook's initial states, without and with the buffer, drawn in its order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(figures()["torch_manual_seed"])
        without = build_torch(NOTEBOOK, buffer=False)
        torch.rand(1)
        with_buffer = build_torch(NOTEBOOK, buffer=True)
        return numpy_state(without.state_dict()), numpy_state(with_buffer.state_dict())


def match_rows(
    framework: Framework, state: State, printed: np.ndarray, device: str = "cpu"
) -> list[RowMatch]:
    """Match the printed rows, (2, 6, 5), with the module's outputs under every dropout pattern."""
    tokens = inputs()[0]
    num_tokens = len(tokens)
    keep = _patterns(num_tokens)  # (patterns, keys)
    keep_per_query = np.repeat(keep[:, None, :], num_tokens, axis=1)  # (patterns, queries, keys)
    repeated = np.repeat(tokens[None], len(keep), axis=0)
    outputs = run(framework, NOTEBOOK, state, repeated, device=device, keep=keep_per_query)
    outputs = outputs.astype(np.float64)
    rounding = _rounding(state, repeated, keep_per_query)
    matches = []
    for batch, token in np.ndindex(*printed.shape[:2]):
        # The causal mask makes the weights of later tokens 0, dropped or not. Of the patterns that
        # differ only there, one is counted.
        distinct = np.flatnonzero(keep[:, token + 1 :].all(axis=1))
        row = printed[batch, token]
        errors = np.abs(outputs[distinct, token] - row)
        limits = PRINT_ROUNDING + rounding[distinct, token]
        fits = (errors <= limits).all(axis=1)
        best = int(np.argmin(errors.max(axis=1)))
        matches.append(
            RowMatch(
                batch=batch,
                token=token,
                printed=tuple(row.tolist()),
                dropped=tuple(np.flatnonzero(~keep[distinct[best]]).tolist()),
                patterns=int(fits.sum()),
                error=float(errors[best].max()),
                limit=float(limits[best].max()),
            )
        )
    return matches


def _patterns(num_tokens: int) -> np.ndarray:
    """Return every pattern of kept keys, (2 ** num_tokens, num_tokens) bool."""
    return (np.arange(2**num_tokens)[:, None] >> np.arange(num_tokens) & 1).astype(bool)


def _rounding(state: State, batch: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return the error that float32 rounding explains: once in the notebook's run, once in ours."""
    mask = causal_mask(NOTEBOOK.context_length)
    bounds = stage_bounds(batch, state, mask, PRECISIONS["float32"], keep, NOTEBOOK.dropout)
    return 2.0 * bounds.context
