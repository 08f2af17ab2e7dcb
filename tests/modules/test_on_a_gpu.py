"""What only a GPU has: cuDNN's kernels, CUDA graphs, and memory that can be measured."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flax_impl
import torch_impl
from compare.bench.contestants import MASKS as LARGE_MASKS
from compare.checks.fused import masks
from compare.conversion.tensors import numpy_to_tensor, tensor_to_numpy
from compare.dtypes import numpy_dtype
from compare.runners.run import missing_cuda

from .test_fused import judge

TOKENS, WIDTH = 530, 64  # cuDNN takes widths that are multiples of 8
HEADS = np.random.default_rng(3).standard_normal((4, 2, TOKENS, WIDTH))
Attend = Callable[..., jax.Array]
FUSED: Attend = partial(flax_impl.masked_attention, implementation="fused")
HALF = ("bfloat16", "float16")

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    if missing := missing_cuda():
        pytest.skip(missing)
    with jax.default_device(jax.devices("cuda")[0]):
        yield


def mask_of(name: str) -> np.ndarray:
    return masks()[name][:TOKENS, :TOKENS].copy()


def gradients_of_flax(
    heads: jax.Array, mask: jax.Array, attend: Attend = FUSED
) -> tuple[jax.Array, ...]:
    return jax.vjp(lambda *three: attend(*three, mask), *heads[:3])[1](heads[3])


@pytest.mark.parametrize("dtype", HALF)
def test_cudnn_runs_in_half_precision(dtype: str) -> None:
    heads = jnp.asarray(HEADS.astype(numpy_dtype(dtype)))
    program = jax.jit(gradients_of_flax).lower(heads, jnp.asarray(mask_of("causal"))).compile()
    text = program.as_text() or ""
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", masks())
def test_flax_in_half_precision(name: str, dtype: str) -> None:
    heads, mask = HEADS.astype(numpy_dtype(dtype)), mask_of(name)
    outputs = jax.jit(FUSED)(*map(jnp.asarray, heads[:3]), jnp.asarray(mask))
    judge(np.asarray(outputs), heads[:3], mask, dtype)


def gradients_in_flax(attend: Attend, heads: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    arrays = jax.jit(partial(gradients_of_flax, attend=attend))(
        jnp.asarray(heads), jnp.asarray(mask)
    )
    return [np.asarray(array).astype(np.float64) for array in arrays]


def gradients_in_torch(
    attend: Callable[..., torch.Tensor], heads: np.ndarray, mask: np.ndarray, device: str = "cuda"
) -> list[np.ndarray]:
    *leaves, cotangent = (numpy_to_tensor(array).to(device) for array in heads)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = attend(*leaves, torch.from_numpy(mask).to(device))
    gradients = torch.autograd.grad(outputs, leaves, cotangent)
    return [tensor_to_numpy(gradient).astype(np.float64) for gradient in gradients]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["causal", "edited", "window"])
@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_gradients_in_half_precision(framework: str, name: str, dtype: str) -> None:
    """At most twice as far from the exact gradients as the formula's own in the same dtype.

    FlashAttention's tests (Dao-AILab/flash-attention, tests/test_flash_attn.py) use this limit.
    """
    heads, mask = HEADS.astype(numpy_dtype(dtype)), mask_of(name)
    exact = gradients_in_torch(
        torch_impl.reference_attention, heads.astype(np.float64), mask, device="cpu"
    )
    if framework == "torch":
        fused = partial(torch_impl.masked_attention, implementation="fused")
        found = gradients_in_torch(fused, heads, mask)
        formula = gradients_in_torch(torch_impl.reference_attention, heads, mask)
    else:
        found = gradients_in_flax(FUSED, heads, mask)
        formula = gradients_in_flax(flax_impl.reference_attention, heads, mask)
    for which, ours, theirs, expected in zip("qkv", found, formula, exact, strict=True):
        errors = [np.linalg.norm(gradient - expected) for gradient in (ours, theirs)]
        assert errors[0] <= 2 * errors[1], (which, errors)


@pytest.mark.parametrize("name", ["causal", "open", "window", "blocks", "edited"])
@pytest.mark.parametrize("dtype", ["float64", "float32", *HALF])
def test_torch_in_every_dtype(name: str, dtype: str) -> None:
    heads, mask = HEADS[:3].astype(numpy_dtype(dtype)), mask_of(name)
    queries, keys, values = (numpy_to_tensor(array).cuda() for array in heads)
    outputs = torch_impl.masked_attention(
        queries, keys, values, torch.from_numpy(mask).cuda(), implementation="fused"
    )
    judge(tensor_to_numpy(outputs), heads, mask, dtype)


def test_a_captured_graph_obeys_a_mask_that_is_edited_afterwards() -> None:
    module = torch_impl.CausalAttentionWithBuffer(8, 8, 256, 0.0).cuda().eval()
    inputs = torch.randn(2, 200, 8, device="cuda")
    with torch.no_grad():
        before = module(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = module(inputs)
        graph.replay()
        torch.testing.assert_close(outputs, before)
        module.mask[:, 0] = 1.0
        module.mask[0, 0] = 0.0
        graph.replay()
        torch.testing.assert_close(outputs, module(inputs))
    assert not torch.allclose(outputs, before)


@pytest.mark.parametrize("name", LARGE_MASKS)
def test_no_matrix_of_scores_is_kept(name: str) -> None:
    """The formula keeps at least one of every head; here less than half of one is in use."""
    tokens, num_heads = 8192, 8
    heads = np.random.default_rng(0).standard_normal((4, num_heads, tokens, 64), dtype=np.float32)
    mask = LARGE_MASKS[name](tokens)
    scores = num_heads * mask.nbytes

    *leaves, cotangent = (torch.from_numpy(array).cuda() for array in heads)
    queries, keys, values = leaves = [leaf.requires_grad_() for leaf in leaves]
    on_device = torch.from_numpy(mask).cuda()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    outputs = torch_impl.masked_attention(queries, keys, values, on_device, implementation="fused")
    torch.autograd.grad(outputs, leaves, cotangent)
    assert torch.cuda.max_memory_allocated() - held < scores / 2

    program = jax.jit(gradients_of_flax).lower(jnp.asarray(heads), jnp.asarray(mask)).compile()
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < scores / 2
