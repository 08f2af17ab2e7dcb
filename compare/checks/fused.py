"""The fused attention: outputs, gradients and edits of the mask, at sizes where its kernels and tiles are at work."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical
from ..proof.cases import Config, Framework, Trial, draw
from ..proof.parity import exact_and_limit
from ..proof.rounding_bound import most_tiles
from ..runners.differentiate import gradient
from ..runners.run import compiled, ready_torch
from .gradients import derivative_problem, exact_derivatives

# The last strip of queries and the last tile of keys are not whole ones.
TOKENS, CONTEXT_LENGTH = 600, 640


def check_fused(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Yield findings in float64 and float32, of gradients in float64, and of edits; the trial tells how many heads."""
    heads = 2 if trial.config.num_heads is None else trial.config.num_heads
    config = Config(5, 4 * heads, CONTEXT_LENGTH, 0.0, num_heads=heads, implementation="fused")
    causal = draw(config, TOKENS, np.random.default_rng(7), batch=1)
    tiles = most_tiles(TOKENS)
    for dtype in ("float64", "float32"):
        call = compiled(framework, config, device)  # one program, whatever the mask
        for name, mask in masks().items():
            given = causal.masked(f"fused, {name}", mask).rounded(dtype)
            exact, limit = exact_and_limit(config, given.state, given.inputs, tiles=tiles)
            agreed = agreement(call(given.state, given.inputs), exact, limit)
            yield Finding(f"fused in {dtype}", framework, given.name, agreed, tolerances.OUTPUT)
    yield from _gradients(framework, causal.masked("fused, blocks", masks()["blocks"]), device)
    if framework == "torch":  # which has a kernel for each of them, and remembers what it looked at
        yield from _gradients(framework, causal, device)
        yield from _gradients(framework, causal.masked("fused, window", masks()["window"]), device)
        yield from _edits(causal.rounded("float32"), device)


def masks() -> dict[str, np.ndarray]:
    """Return masks of every kind, (CONTEXT_LENGTH, CONTEXT_LENGTH), float32; two of them close whole rows."""
    random = np.random.default_rng(11)
    rows = np.arange(CONTEXT_LENGTH)
    behind = rows[:, None] - rows
    causal = (behind < 0).astype(np.float32)
    blocks = np.kron(random.random((20, 20)) < 0.5, np.ones((32, 32))).astype(np.float32)
    np.fill_diagonal(blocks, 0.0)
    closed = causal.copy()
    closed[[3, 300, 301, 599]] = -2.0
    edited = causal.copy()
    edited[5, 590], edited[400, 3], edited[402, 301] = 0.0, 0.5, np.float32(1e-42)
    return {
        "causal": causal,
        "open": np.zeros_like(causal),
        "window": ((behind < 0) | (behind >= 100)).astype(np.float32),
        "blocks": blocks,
        "rows closed": closed,
        "window, rows closed": np.where(
            (rows % 97 == 3)[:, None], 1.0, (behind < 0) | (behind >= 100)
        ).astype(np.float32),
        "edited": edited,
    }


def _gradients(framework: Framework, trial: Trial, device: str) -> Iterator[Finding]:
    problem = derivative_problem(trial)
    found = gradient(framework, problem, device)
    for name, entry in exact_derivatives(problem).items():
        # The weights come out of one more logarithm and exponential than the formula has.
        agreed = agreement(found[name], entry.value.value, tolerances.regrouped(entry.value))
        yield Finding(
            "fused gradients",
            framework,
            f"{trial.name}, {name}",
            agreed,
            tolerances.FUSED_GRADIENT,
        )


def _edits(trial: Trial, device: str) -> Iterator[Finding]:
    """Edit the mask after it was used: the next call must give the bits that a new tensor gives."""
    module = ready_torch(trial.config, trial.state, device, None)
    inputs = numpy_to_tensor(trial.inputs).to(device)
    window = torch.from_numpy(masks()["window"]).to(device)

    def in_place() -> None:
        module.mask[400, 3] = 1.0

    def by_copy() -> None:
        module.mask.copy_(window)

    def by_load() -> None:
        module.load_state_dict({**module.state_dict(), "mask": torch.zeros_like(window)})

    def by_data() -> None:
        module.mask.data[300, 2], module.mask.data[7, 8] = 1.0, 0.0

    edits: dict[str, Callable[[], None]] = {
        "edited in place": in_place,
        "copied over": by_copy,
        "loaded": by_load,
    }
    if device == "cpu":  # elsewhere a write that goes round the version is not seen
        edits["written through .data"] = by_data
    with torch.no_grad():
        module(inputs)
        for name, edit in edits.items():
            edit()
            found = tensor_to_numpy(module(inputs))
            module.mask = module.mask.clone()
            agreed = identical(found, tensor_to_numpy(module(inputs)))
            yield Finding(f"fused: mask {name}", "torch", trial.name, agreed, tolerances.BITS)
