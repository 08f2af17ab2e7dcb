"""The fused attention: outputs, gradients and mask edits, at sizes that need several tiles."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical
from ..proof.cases import Config, Framework, Trial, draw
from ..proof.parity import exact_and_limit
from ..proof.rounding_bound import PRECISIONS, most_tiles
from ..runners.differentiate import gradient, hessian_vector
from ..runners.run import compiled, ready_torch
from .gradients import derivative_problem, exact_derivatives

# Not multiples of the tile sizes: the last strip of queries and the last tile of keys are partial.
TOKENS, CONTEXT_LENGTH = 600, 640


def check_fused(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare outputs in float64 and float32, gradients in float64, and outputs after mask edits.

    Only the trial's number of heads is used.
    """
    heads = 2 if trial.config.num_heads is None else trial.config.num_heads
    config = Config(5, 4 * heads, CONTEXT_LENGTH, 0.0, num_heads=heads, implementation="fused")
    causal = draw(config, TOKENS, np.random.default_rng(7), batch=1)
    tiles = most_tiles(TOKENS)
    for dtype in ("float64", "float32"):
        forward = compiled(framework, config, device)  # one program for all masks
        for name, mask in masks().items():
            masked = causal.masked(f"fused, {name}", mask).rounded(dtype)
            exact, limit = exact_and_limit(config, masked.state, masked.inputs, tiles=tiles)
            agreed = agreement(forward(masked.state, masked.inputs), exact, limit)
            yield Finding(f"fused in {dtype}", framework, masked.name, agreed, tolerances.OUTPUT)
    yield from _gradients(framework, causal.masked("fused, blocks", masks()["blocks"]), device)
    yield from _half_precision(framework, device)
    yield from _second_derivatives(framework, device)
    if framework == "torch":  # torch has a kernel for each of these masks, and caches its analysis
        yield from _gradients(framework, causal, device)
        yield from _gradients(framework, causal.masked("fused, window", masks()["window"]), device)
        yield from _edits(causal.rounded("float32"), device)
        yield from _lengths(causal.rounded("float32"), device)


def masks() -> dict[str, np.ndarray]:
    """Return masks of every kind by name, (CONTEXT_LENGTH, CONTEXT_LENGTH) float32.

    The two with "rows closed" in their name block whole rows.
    """
    random = np.random.default_rng(11)
    positions = np.arange(CONTEXT_LENGTH)
    distance = positions[:, None] - positions  # how far the key lies before the query
    causal = (distance < 0).astype(np.float32)
    outside_window = (distance < 0) | (distance >= 100)
    blocks = np.kron(random.random((20, 20)) < 0.5, np.ones((32, 32))).astype(np.float32)
    np.fill_diagonal(blocks, 0.0)
    closed = causal.copy()
    closed[[3, 300, 301, 599]] = -2.0
    late = causal.copy()  # the second half of the rows, in turn, does not see the first tile
    late[300::2, :520] = np.where(positions < 520, 1.0, causal)[300::2, :520]
    late[300:521:2, 0] = 0.0
    edited = causal.copy()
    edited[5, 590], edited[400, 3], edited[402, 301] = 0.0, 0.5, np.float32(1e-42)
    edited[401, 302] = np.nan
    return {
        "causal": causal,
        "open": np.zeros_like(causal),
        "window": outside_window.astype(np.float32),
        "blocks": blocks,
        "rows closed": closed,
        "window, rows closed": np.where((positions % 97 == 3)[:, None], 1.0, outside_window).astype(
            np.float32
        ),
        "edited": edited,
        "late": late,
        "subnormal": causal * np.float32(1e-42),
    }


def _gradients(framework: Framework, trial: Trial, device: str) -> Iterator[Finding]:
    problem = derivative_problem(trial)
    gradients = gradient(framework, problem, device)
    for name, exact in exact_derivatives(problem).items():
        # The fused path needs one more logarithm and exponential for the weights than the formula.
        agreed = agreement(gradients[name], exact.value.value, tolerances.regrouped(exact.value))
        yield Finding(
            "fused gradients",
            framework,
            f"{trial.name}, {name}",
            agreed,
            tolerances.FUSED_GRADIENT,
        )


def _half_precision(framework: Framework, device: str) -> Iterator[Finding]:
    """Compare Flax's outputs in half precision, which it computes in float32, and rounds once.

    The projections are the identity, so that they round nothing. torch's kernels round more often.
    """
    if framework == "torch":
        return
    config = Config(4, 4, CONTEXT_LENGTH, 0.0, implementation="fused")
    causal = draw(config, TOKENS, np.random.default_rng(7), batch=1)
    identity = {f"{name}.weight": np.eye(4) for name in ("W_query", "W_key", "W_value")}
    shifted = causal._replace(state={**causal.state, **identity}, inputs=causal.inputs + 1.0)
    forward = compiled(framework, config, device)
    for dtype in ("bfloat16", "float16"):
        rounded = shifted.rounded(dtype)
        wide = rounded.rounded("float32")
        exact, limit = exact_and_limit(config, wide.state, wide.inputs, tiles=most_tiles(TOKENS))
        once = PRECISIONS[dtype].roundoff * (np.abs(exact) + limit)
        agreed = agreement(forward(rounded.state, rounded.inputs), exact, limit + once)
        yield Finding(f"fused in {dtype}", framework, causal.name, agreed, tolerances.ROUNDED_ONCE)


def _second_derivatives(framework: Framework, device: str) -> Iterator[Finding]:
    """Compare the derivatives of the fused path, on few tokens, with the written-out ones."""
    config = Config(5, 4, 7, 0.0, num_heads=2, implementation="fused")
    causal = draw(config, 6, np.random.default_rng(13), batch=1)
    edited = causal.mask.copy()
    edited[5, 1], edited[0, 3] = 2.0, 0.0
    masks = {"edited": edited}
    if framework == "torch":  # it has a kernel for each of these masks; Flax has one program
        masks |= {"causal": causal.mask, "open": np.zeros_like(causal.mask)}
    for name, mask in masks.items():
        problem = derivative_problem(causal.masked(name, mask))
        products = hessian_vector(framework, problem, device)
        for key, exact in exact_derivatives(problem).items():
            second = exact.tangent
            agreed = agreement(products[key], second.value, 2 * tolerances.regrouped(second))
            yield Finding(
                "fused Hessian-vector products",
                framework,
                f"{name}, {key}",
                agreed,
                tolerances.FUSED_HESSIAN,
            )


def _lengths(trial: Trial, device: str) -> Iterator[Finding]:
    """Use one mask with two numbers of tokens that fill the same words: each has its own layout."""
    mask = np.zeros_like(trial.mask)
    mask[5, 5] = 1.0
    trial = trial.masked("one mask, 127 and 128 tokens", mask)
    module = ready_torch(trial.config, trial.state, device, None)
    inputs = numpy_to_tensor(trial.inputs).to(device)
    with torch.no_grad():
        for tokens in (127, 128, 127):
            outputs = tensor_to_numpy(module(inputs[:, :tokens]))
            agreed = _against_exact(outputs, trial, trial.inputs[:, :tokens])
            case = f"{trial.name}: {tokens}"
            yield Finding("fused: other lengths", "torch", case, agreed, tolerances.OUTPUT)
            new = ready_torch(trial.config, trial.state, device, None)
            agreed = identical(outputs, tensor_to_numpy(new(inputs[:, :tokens])))
            yield Finding("fused: other lengths", "torch", case, agreed, tolerances.BITS)


def _against_exact(outputs: np.ndarray, trial: Trial, inputs: np.ndarray) -> Agreement:
    """Compare with the reference: another module would find the same analysis of the mask."""
    tiles = most_tiles(inputs.shape[1])
    exact, limit = exact_and_limit(trial.config, trial.state, inputs, tiles=tiles)
    return agreement(outputs, exact, limit)


def _edits(trial: Trial, device: str) -> Iterator[Finding]:
    """Edit a mask after its first use: the next call must be right, with a new tensor's bits."""
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

    def at_the_end() -> None:
        module.mask[TOKENS - 1, :64] = 1.0

    def moved() -> None:
        module.mask[:, :8], module.mask[:, 200:208] = 1.0, 0.0

    def swapped() -> None:
        module.mask[:128] = module.mask[:128].roll(64, 0)

    def neighbors_swapped() -> None:
        module.mask[304:306] = module.mask[304:306].flip(0)

    def to_a_fraction() -> None:
        module.mask[100, 3] = 0.5

    causal = numpy_to_tensor(trial.mask).to(device).clone()
    narrow, blocks = torch.ones_like(window), torch.ones_like(window)
    narrow[:, :8] = 0.0
    for start in range(0, len(blocks), 64):
        blocks[start : start + 64, start : start + 64] = 0.0
    before = {
        "edited in its last row": causal,
        "open keys moved": narrow,
        "blocks swapped": blocks,
        "neighboring rows swapped": window,
        "blocked by a fraction": causal,
    }
    edits: dict[str, Callable[[], None]] = {
        "edited in place": in_place,
        "edited in its last row": at_the_end,
        "open keys moved": moved,
        "blocks swapped": swapped,
        "neighboring rows swapped": neighbors_swapped,
        "blocked by a fraction": to_a_fraction,
        "copied over": by_copy,
        "loaded": by_load,
    }
    if device == "cpu":  # other devices do not detect writes that leave the version unchanged
        edits["written through .data"] = by_data
    with torch.no_grad():
        for name, edit in edits.items():
            module.mask.copy_(before.get(name, module.mask))
            module(inputs)
            edit()
            outputs = tensor_to_numpy(module(inputs))
            edited = trial.masked(trial.name, tensor_to_numpy(module.mask))
            agreed = _against_exact(outputs, edited, trial.inputs)
            yield Finding(f"fused: mask {name}", "torch", trial.name, agreed, tolerances.OUTPUT)
            module.mask = module.mask.clone()
            agreed = identical(outputs, tensor_to_numpy(module(inputs)))
            yield Finding(f"fused: mask {name}", "torch", trial.name, agreed, tolerances.BITS)
