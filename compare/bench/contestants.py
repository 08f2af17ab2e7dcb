"""The attention functions of `compare bench attention`.

They are the formula, the functions of the frameworks, and ours.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import linen, nnx

import flax_impl
import torch_impl

from ..dtypes import numpy_dtype

Step = Callable[[], Any]


class AttentionProblem(NamedTuple):
    """The input of every contestant.

    heads: queries, keys and values, each (batch, heads, tokens, head_dim), float32.
    cotangent: the cotangent of the outputs, of the same shape and dtype.
    mask: (tokens, tokens); a nonzero entry blocks.
    mask_name: a key of MASKS; "causal" allows a contestant to use its `is_causal` argument.
    dtype: the dtype of the computation.
    device: "cpu" or "cuda".
    """

    heads: tuple[np.ndarray, np.ndarray, np.ndarray]
    cotangent: np.ndarray
    mask: np.ndarray
    mask_name: str
    dtype: str
    device: str


class Contestant(NamedTuple):
    """One attention function.

    name: its name in tables.
    framework: "torch" or "jax".
    make: takes the problem and whether to run the backward pass too, and returns the call to time.
        It raises NotImplementedError if the function does not support the problem.
    is_ours: whether it is `masked_attention` of this repository.
    tokens_first: whether its arrays are (batch, tokens, heads, head_dim).
    """

    name: str
    framework: Literal["torch", "jax"]
    make: Callable[[AttentionProblem, bool], Step]
    is_ours: bool = False
    tokens_first: bool = False


def draw_problem(
    shape: tuple[int, ...], mask_name: str, dtype: str, device: str
) -> AttentionProblem:
    """Draw standard normal queries, keys, values and cotangent."""
    random = np.random.default_rng(0)
    queries, keys, values, cotangent = (
        random.standard_normal(shape, dtype=np.float32) for _ in range(4)
    )
    return AttentionProblem(
        (queries, keys, values), cotangent, MASKS[mask_name](shape[-2]), mask_name, dtype, device
    )


def _causal(num_tokens: int) -> np.ndarray:
    return np.triu(np.ones((num_tokens, num_tokens), np.float32), 1)


def _window(num_tokens: int) -> np.ndarray:
    distance = np.subtract.outer(np.arange(num_tokens), np.arange(num_tokens))
    return ((distance < 0) | (distance >= 256)).astype(np.float32)


def _random(num_tokens: int) -> np.ndarray:
    """Block half of the 64 x 64 tiles at random, but none on the diagonal."""
    count = -(-num_tokens // 64)
    is_blocked = np.random.default_rng(1).random((count, count)) < 0.5
    np.fill_diagonal(is_blocked, False)
    pairs = is_blocked.repeat(64, axis=0).repeat(64, axis=1)
    return pairs[:num_tokens, :num_tokens].astype(np.float32)


MASKS: dict[str, Callable[[int], np.ndarray]] = {
    "causal": _causal,
    "window 256": _window,
    "random blocks": _random,
}


def contestants(device: str, *, slow: bool = True) -> Iterator[Contestant]:
    """Yield the contestants that run on the device; `slow` includes those that compile long."""
    yield _torch_contestant("torch formula", _with_mask(torch_impl.reference_attention))
    yield _torch_contestant("torch SDPA is_causal", _sdpa_causal)
    yield _torch_contestant("torch SDPA mask", _sdpa_mask)
    if slow:
        yield _torch_contestant("torch flex_attention", _flex)
    yield _torch_contestant("torch ours", _with_mask(torch_impl.masked_attention), is_ours=True)
    yield _jax_contestant("JAX formula", flax_impl.reference_attention)
    yield _jax_contestant("jax.nn", _jax_nn, tokens_first=True)
    if device == "cuda":
        yield _jax_contestant("jax.nn cudnn", _jax_cudnn, tokens_first=True)
    yield _jax_contestant("flax.linen", _flax_linen, tokens_first=True)
    yield _jax_contestant("flax.nnx", _flax_nnx, tokens_first=True)
    yield _jax_contestant("Flax ours", flax_impl.masked_attention, is_ours=True)


TorchAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Returns the attention function for a problem and its mask on the device.
TorchPrepare = Callable[[AttentionProblem, torch.Tensor], TorchAttention]


def _torch_contestant(name: str, prepare: TorchPrepare, *, is_ours: bool = False) -> Contestant:
    return Contestant(name, "torch", partial(_torch_step, prepare), is_ours)


def _jax_contestant(
    name: str,
    attend: Callable[..., jax.Array],
    *,
    is_ours: bool = False,
    tokens_first: bool = False,
) -> Contestant:
    make = partial(_jax_step, attend, tokens_first)
    return Contestant(name, "jax", make, is_ours, tokens_first)


def _torch_step(prepare: TorchPrepare, problem: AttentionProblem, backward: bool) -> Step:
    dtype = getattr(torch, problem.dtype)
    queries, keys, values, cotangent = (
        torch.from_numpy(array).to(problem.device, dtype)
        for array in (*problem.heads, problem.cotangent)
    )
    attend = prepare(problem, torch.from_numpy(problem.mask).to(problem.device))

    def finish(outputs: Any) -> Any:
        if problem.device == "cuda":
            torch.cuda.synchronize()
        return outputs

    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return finish(attend(queries, keys, values))

        return forward
    leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    return lambda: finish(torch.autograd.grad(attend(queries, keys, values), leaves, cotangent))


def _with_mask(attend: Callable[..., torch.Tensor]) -> TorchPrepare:
    return lambda problem, mask: partial(attend, mask=mask)


def _sdpa_causal(problem: AttentionProblem, mask: torch.Tensor) -> TorchAttention:
    if problem.mask_name != "causal":
        raise NotImplementedError("supports only a causal mask")
    return partial(F.scaled_dot_product_attention, is_causal=True)


def _sdpa_mask(problem: AttentionProblem, mask: torch.Tensor) -> TorchAttention:
    return partial(F.scaled_dot_product_attention, attn_mask=mask == 0)


def _flex(problem: AttentionProblem, mask: torch.Tensor) -> TorchAttention:
    from torch.nn.attention.flex_attention import create_block_mask

    num_tokens = len(mask)
    if num_tokens < 128:
        raise NotImplementedError("needs at least 128 tokens, the size of its blocks")
    is_open = mask == 0
    blocks = create_block_mask(
        lambda batch, head, query, key: is_open[query, key],
        None,
        None,
        num_tokens,
        num_tokens,
        device=problem.device,
    )
    return partial(_compiled_flex(), block_mask=blocks)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _jax_step(
    attend: Callable[..., jax.Array], tokens_first: bool, problem: AttentionProblem, backward: bool
) -> Step:
    """Return the jitted call; only `tokens_first` functions take the argument `is_causal`."""
    device = jax.devices(problem.device)[0]

    def put(array: np.ndarray) -> jax.Array:
        array = array.swapaxes(1, 2) if tokens_first else array
        return jax.device_put(
            jnp.asarray(np.ascontiguousarray(array), numpy_dtype(problem.dtype)), device
        )

    heads, cotangent = [put(array) for array in problem.heads], put(problem.cotangent)
    mask = jax.device_put(problem.mask, device)
    compiled = jitted(attend, problem.mask_name == "causal" if tokens_first else None, backward)
    if backward:
        return lambda: jax.block_until_ready(compiled(*heads, mask, cotangent))
    return lambda: jax.block_until_ready(compiled(*heads, mask))


@cache
def jitted(attend: Callable[..., jax.Array], is_causal: bool | None, backward: bool) -> Any:
    """Return the jitted attention, cached so that all masks share one compilation.

    With `backward`, return its vector-Jacobian product for queries, keys and values; the cotangent
    is then the last argument.
    """
    call = attend if is_causal is None else partial(attend, is_causal=is_causal)
    if not backward:
        return jax.jit(call)

    def gradient(
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        cotangent: jax.Array,
    ) -> Any:
        return jax.vjp(lambda *heads: call(*heads, mask), queries, keys, values)[1](cotangent)

    return jax.jit(gradient)


def _jax_nn(queries: Any, keys: Any, values: Any, mask: Any, *, is_causal: bool) -> jax.Array:
    if is_causal:
        return jax.nn.dot_product_attention(
            queries, keys, values, is_causal=True, implementation="xla"
        )
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=(mask == 0)[None, None], implementation="xla"
    )


def _jax_cudnn(queries: Any, keys: Any, values: Any, mask: Any, *, is_causal: bool) -> jax.Array:
    if queries.dtype not in (jnp.bfloat16, jnp.float16) or not is_causal:
        raise NotImplementedError("supports only half precision and a causal mask")
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, implementation="cudnn"
    )


def _flax_linen(queries: Any, keys: Any, values: Any, mask: Any, *, is_causal: bool) -> jax.Array:
    return linen.dot_product_attention(queries, keys, values, mask=(mask == 0)[None, None])


def _flax_nnx(queries: Any, keys: Any, values: Any, mask: Any, *, is_causal: bool) -> jax.Array:
    return nnx.dot_product_attention(queries, keys, values, mask=(mask == 0)[None, None])
