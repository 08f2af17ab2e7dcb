"""Who computes attention in `python -m compare bench`: the formula, the frameworks' own functions, and ours."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

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
    """What every contestant is given.

    heads: queries, keys and values, (batch, heads, tokens, head_dim), float32.
    cotangent: of their shape.
    mask: (tokens, tokens), nonzero blocks.
    mask_name: what the mask is called; `causal` may be told to those who take that as an argument.
    dtype: in which it is computed.
    device: "cpu" or "cuda".
    """

    heads: tuple[np.ndarray, np.ndarray, np.ndarray]
    cotangent: np.ndarray
    mask: np.ndarray
    mask_name: str
    dtype: str
    device: str


class Contestant(NamedTuple):
    """`make` gives the call that is timed, forward or forward and backward, or raises NotImplementedError."""

    name: str
    make: Callable[[AttentionProblem, bool], Step]


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
    behind = np.subtract.outer(np.arange(num_tokens), np.arange(num_tokens))
    return ((behind < 0) | (behind >= 256)).astype(np.float32)


def _random(num_tokens: int) -> np.ndarray:
    """Close every other block of 64, at random, but none on the diagonal."""
    count = -(-num_tokens // 64)
    closed = np.random.default_rng(1).random((count, count)) < 0.5
    np.fill_diagonal(closed, False)
    return closed.repeat(64, axis=0).repeat(64, axis=1)[:num_tokens, :num_tokens].astype(np.float32)


MASKS: dict[str, Callable[[int], np.ndarray]] = {
    "causal": _causal,
    "window 256": _window,
    "random blocks": _random,
}


def contestants(device: str, *, slow: bool = True) -> Iterator[Contestant]:
    """Yield those that run on the device; `slow` ones are compiled for seconds."""
    yield Contestant("torch formula", partial(_torch, _masked(torch_impl.reference_attention)))
    yield Contestant("torch SDPA is_causal", partial(_torch, _sdpa_causal))
    yield Contestant("torch SDPA mask", partial(_torch, _sdpa_mask))
    if slow:
        yield Contestant("torch flex_attention", partial(_torch, _flex))
    yield Contestant("torch ours", partial(_torch, _masked(torch_impl.masked_attention)))
    yield Contestant("JAX formula", partial(_jax, flax_impl.reference_attention, False))
    yield Contestant("jax.nn", partial(_jax, _jax_nn, True))
    if device == "cuda":
        yield Contestant("jax.nn cudnn", partial(_jax, _jax_cudnn, True))
    yield Contestant("flax.linen", partial(_jax, _flax_linen, True))
    yield Contestant("flax.nnx", partial(_jax, _flax_nnx, True))
    yield Contestant("Flax ours", partial(_jax, flax_impl.masked_attention, False))


TorchAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _torch(
    prepare: Callable[[AttentionProblem, torch.Tensor], TorchAttention],
    given: AttentionProblem,
    backward: bool,
) -> Step:
    dtype = getattr(torch, given.dtype)
    queries, keys, values, cotangent = (
        torch.from_numpy(array).to(given.device, dtype) for array in (*given.heads, given.cotangent)
    )
    attend = prepare(given, torch.from_numpy(given.mask).to(given.device))

    def finish(found: Any) -> Any:
        if given.device == "cuda":
            torch.cuda.synchronize()
        return found

    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return finish(attend(queries, keys, values))

        return forward
    leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    return lambda: finish(torch.autograd.grad(attend(queries, keys, values), leaves, cotangent))


def _masked(
    attend: Callable[..., torch.Tensor],
) -> Callable[[AttentionProblem, torch.Tensor], TorchAttention]:
    return lambda given, mask: partial(attend, mask=mask)


def _sdpa_causal(given: AttentionProblem, mask: torch.Tensor) -> TorchAttention:
    if given.mask_name != "causal":
        raise NotImplementedError("takes no such mask")
    return partial(F.scaled_dot_product_attention, is_causal=True)


def _sdpa_mask(given: AttentionProblem, mask: torch.Tensor) -> TorchAttention:
    return partial(F.scaled_dot_product_attention, attn_mask=mask == 0)


def _flex(given: AttentionProblem, mask: torch.Tensor) -> TorchAttention:
    from torch.nn.attention.flex_attention import create_block_mask

    num_tokens = len(mask)
    if num_tokens < 128:
        raise NotImplementedError("its blocks are of 128 tokens")
    is_open = mask == 0
    blocks = create_block_mask(
        lambda batch, head, query, key: is_open[query, key],
        None,
        None,
        num_tokens,
        num_tokens,
        device=given.device,
    )
    return partial(_compiled_flex(), block_mask=blocks)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _jax(
    attend: Callable[..., jax.Array], tokens_first: bool, given: AttentionProblem, backward: bool
) -> Step:
    """Jit it once for all masks; `tokens_first` want (batch, tokens, heads, head_dim), and are told `is_causal`."""
    device = jax.devices(given.device)[0]

    def put(array: np.ndarray) -> jax.Array:
        array = array.swapaxes(1, 2) if tokens_first else array
        return jax.device_put(
            jnp.asarray(np.ascontiguousarray(array), numpy_dtype(given.dtype)), device
        )

    heads, cotangent = [put(array) for array in given.heads], put(given.cotangent)
    mask = jax.device_put(given.mask, device)
    compiled = jitted(attend, given.mask_name == "causal" if tokens_first else None, backward)
    if backward:
        return lambda: jax.block_until_ready(compiled(*heads, mask, cotangent))
    return lambda: jax.block_until_ready(compiled(*heads, mask))


@cache
def jitted(attend: Callable[..., jax.Array], is_causal: bool | None, backward: bool) -> Any:
    """Return the compiled attention, or the gradient of all three by the cotangent, which then comes last."""
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
        raise NotImplementedError("takes half precision, and no such mask")
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, implementation="cudnn"
    )


def _flax_linen(queries: Any, keys: Any, values: Any, mask: Any, *, is_causal: bool) -> jax.Array:
    return linen.dot_product_attention(queries, keys, values, mask=(mask == 0)[None, None])


def _flax_nnx(queries: Any, keys: Any, values: Any, mask: Any, *, is_causal: bool) -> jax.Array:
    return nnx.dot_product_attention(queries, keys, values, mask=(mask == 0)[None, None])
