"""The three implementations compute the same function under any mask."""

import numpy as np
import pytest
import torch

from compare.proof.agreement import agreement
from compare.proof.cases import (
    CASES,
    FRAMEWORKS,
    PRIME,
    PRIME_BIAS,
    Case,
    Config,
    Framework,
    draw,
)
from compare.proof.rounding_bound import FLOAT64_RELATIVE
from compare.runners.run import run

from ..support import judge, normal, numpy_state_of

DTYPES = ("float32", "float64")
T = PRIME.context_length

# Written row by row: 0 is open, any other value blocks.
RECTANGLE = [
    [0, 0, 0, 0, 1, 1, 1],
    [0, 0, 0, 0, 1, 1, 1],
    [0, 0, 0, 0, 1, 1, 1],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
]
SIGNS = [
    [0, -1, 1e-30, 0, 1, 0, 3],
    [1, 0, 0, -2, 1e-45, 1, 0],
    [0, 0.5, 0, 0, 7, 0, 0],
    [-0.0, 1, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 0, 1, 1],
    [0, 1, 0, 1, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 1],
]
CAUSAL = np.triu(np.ones((T, T), dtype=np.float32), k=1)
ROW_CLOSED = CAUSAL.copy()
ROW_CLOSED[2] = 1
MASKS = {
    "edited": 2 * CAUSAL,
    "rectangle": np.array(RECTANGLE, dtype=np.float32),
    "any nonzero": np.array(SIGNS, dtype=np.float32),
    "open": np.zeros((T, T), dtype=np.float32),
    "row closed": ROW_CLOSED,
    "closed": np.ones((T, T), dtype=np.float32),
    "bool": np.array(RECTANGLE, dtype=bool),
    "int8": (2 * CAUSAL).astype(np.int8),
    "float16": (2 * CAUSAL).astype(np.float16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-"))
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.slow
def test_within_the_rounding_bound_of_the_reference(
    name: Framework, case: Case, dtype: str, device: str
) -> None:
    result = judge(
        name, case.config, numpy_state_of(case.config, dtype), case.inputs().astype(dtype), device
    )
    assert result.held, result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-"))
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_float64_equals_torch(name: Framework, case: Case, device: str) -> None:
    state, inputs = numpy_state_of(case.config, "float64"), case.inputs().astype(np.float64)
    torch_outputs = run("torch", case.config, state, inputs, device=device)
    result = agreement(run(name, case.config, state, inputs, device=device), torch_outputs)
    assert result.relative <= FLOAT64_RELATIVE, result


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tokens", [5, T])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_obeys_any_mask(name: Framework, tokens: int, mask: np.ndarray, device: str) -> None:
    state = numpy_state_of(PRIME_BIAS, "float32", mask)
    result = judge(
        name, PRIME_BIAS, state, normal(2, tokens, PRIME_BIAS.input_embedding_dim), device
    )
    assert result.held, result


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_closed_row_is_nan_and_no_other(name: Framework, device: str) -> None:
    state = numpy_state_of(PRIME, "float32", MASKS["row closed"])
    outputs = run(name, PRIME, state, normal(2, 5, PRIME.input_embedding_dim), device=device)
    assert np.isnan(outputs[:, 2]).all()
    assert np.isfinite(np.delete(outputs, 2, axis=1)).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_empty_inputs_give_empty_outputs(
    name: Framework, shape: tuple[int, int], device: str
) -> None:
    inputs = np.zeros((*shape, PRIME.input_embedding_dim), dtype=np.float32)
    outputs = run(name, PRIME, numpy_state_of(PRIME, "float32"), inputs, device=device)
    assert outputs.shape == (*shape, PRIME.output_embedding_dim)
    assert outputs.dtype == np.float32


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_without_the_buffer_it_is_the_same_function(name: Framework, device: str) -> None:
    state = numpy_state_of(PRIME, "float32")
    inputs = normal(2, 5, PRIME.input_embedding_dim)
    without = {key: tensor for key, tensor in state.items() if key != "mask"}
    with_buffer, plain = (
        run(name, PRIME, each, inputs, device=device) for each in (state, without)
    )
    assert np.array_equal(with_buffer, plain)


def test_torch_keeps_the_seeded_stream() -> None:
    """Only the Linear layers for query, key and value draw random numbers, in that order."""
    torch.manual_seed(5)
    expected = [torch.nn.Linear(13, 11, bias=True).weight for _ in range(3)]
    torch.manual_seed(5)
    from torch_impl import CausalAttentionWithBuffer

    module = CausalAttentionWithBuffer(13, 11, 7, 0.1, qkv_bias=True)
    for linear, weight in zip(
        (module.W_query, module.W_key, module.W_value), expected, strict=True
    ):
        assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_heads_without_a_batch_or_tokens(name: Framework, shape: tuple[int, int]) -> None:
    trial = draw(Config(4, 6, 5, 0.0, num_heads=2), 4, np.random.default_rng(0)).rounded("float32")
    outputs = run(name, trial.config, trial.state, np.zeros((*shape, 4), np.float32))
    assert outputs.shape == (*shape, 6)
