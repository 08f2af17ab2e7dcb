"""The source notebook's printed figures, and how a printed row is recognized under dropout.

The notebook never calls `.eval()`, so its outputs have dropout active, on random streams that Flax
cannot share. But a row has few attention weights: each printed row must be what the module gives
under *some* pattern of kept weights, scaled by 1 / (1 - dropout). All patterns are run through the
module.
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

# The notebook prints four decimals, so a figure lies within half a unit of the last one printed.
PRINT_ROUNDING = 0.5e-4


class RowMatch(NamedTuple):
    """One printed row, and the patterns of dropout under which the module gives it.

    `dropped` are the positions of the best pattern, `patterns` how many fit, `error` and `limit`
    the distance of the best one from the printed figures and the one allowed.
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
    """Return the notebook's figures; cell numbers are the notebook's."""
    return json.loads(
        files("compare").joinpath("data/notebook_figures.json").read_text(encoding="utf-8")
    )


def inputs() -> np.ndarray:
    """Return the notebook's batch: the same six tokens twice, (2, 6, 3) float32."""
    tokens = np.array(figures()["inputs"], dtype=np.float32)
    return np.stack([tokens, tokens])


def initial_states() -> tuple[State, State]:
    """Return the notebook's initial weights, without and with the buffer, drawn as it drew them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(figures()["torch_manual_seed"])
        without = build_torch(NOTEBOOK, buffer=False)
        torch.rand(1)
        with_buffer = build_torch(NOTEBOOK, buffer=True)
        return numpy_state(without.state_dict()), numpy_state(with_buffer.state_dict())


def match_rows(
    framework: Framework, state: State, printed: np.ndarray, device: str = "cpu"
) -> list[RowMatch]:
    """Find each printed row, (2, 6, 5), among the module's outputs under every pattern of dropout."""
    tokens = inputs()[0]
    num_tokens = len(tokens)
    keep = _patterns(num_tokens)  # (patterns, keys)
    every_query = np.repeat(keep[:, None, :], num_tokens, axis=1)  # (patterns, queries, keys)
    batch = np.repeat(tokens[None], len(keep), axis=0)
    found = run(framework, NOTEBOOK, state, batch, device=device, keep=every_query).astype(
        np.float64
    )
    rounding = _rounding(state, batch, every_query)
    matches = []
    for row in np.ndindex(*printed.shape[:2]):
        # Behind the causal mask a weight is 0, dropped or not: such patterns are counted once.
        visible = np.flatnonzero(keep[:, row[1] + 1 :].all(axis=1))
        errors = np.abs(found[visible, row[1]] - printed[row])
        limits = PRINT_ROUNDING + rounding[visible, row[1]]
        fits = (errors <= limits).all(axis=1)
        best = int(np.argmin(errors.max(axis=1)))
        matches.append(
            RowMatch(
                batch=row[0],
                token=row[1],
                printed=tuple(printed[row].tolist()),
                dropped=tuple(np.flatnonzero(~keep[visible[best]]).tolist()),
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
    """Return what float32 rounding may add: once in the notebook's run, once in ours."""
    mask = causal_mask(NOTEBOOK.context_length)
    return (
        2.0
        * stage_bounds(batch, state, mask, PRECISIONS["float32"], keep, NOTEBOOK.dropout).context
    )
