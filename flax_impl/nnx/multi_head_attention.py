"""Causal multi-head self-attention in Flax NNX: all heads share one mask, a `Buffer`."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Float, Shaped

from ..attention import causal_mask, repeated
from ..call_masks import given, with_call_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from ..validation import (
    check_dropout,
    check_heads,
    check_inputs,
    check_mask,
    check_scale,
    each_bias,
)
from .buffer import Buffer
from .dropout import dropping


class CausalMultiHeadAttention(nnx.Module):
    """Causal attention in several heads: their outputs are concatenated and projected.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of all heads together and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight in training mode.
        num_heads: number of heads; it must divide output_embedding_dim.
        qkv_bias: whether queries, keys and values have a bias; or a tuple of three answers.
        implementation: which implementation of the attention to use; see `masked_attention`.
        out_bias: whether `out_proj` has a bias.
        num_kv_heads: number of heads of keys and values, each for several consecutive heads of
            queries; it must divide num_heads. None is num_heads.
        scale: the factor of the scores; None is 1 / sqrt(head_dim).
        dtype: the dtype of the computation; None is that to which inputs and parameters promote.
        param_dtype: the dtype of the parameters. The mask is float32.
        kernel_init: initializer of the kernels, such as one of `flax.nnx.with_partitioning`; None
            is that of `flax.nnx.Linear`.
        bias_init: initializer of the biases.
        out_kernel_init: initializer of the kernel of `out_proj`; None is kernel_init.
        out_bias_init: initializer of the bias of `out_proj`; None is bias_init.
        deterministic: whether the module starts in evaluation mode, without dropout.
        rngs: the streams `params` and `dropout`, or a default stream.

    Raises:
        ValueError: on construction, a dropout outside [0, 1], a num_heads that does not divide
            output_embedding_dim, a num_kv_heads that does not divide num_heads, a qkv_bias of
            another length than three, a scale that is not finite, or an unknown implementation; on
            call, inputs or masks of the wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.2.
    """

    def __init__(
        self,
        input_embedding_dim: int,
        output_embedding_dim: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool | tuple[bool, bool, bool] = False,
        *,
        implementation: Implementation = "auto",
        out_bias: bool = True,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        out_kernel_init: Initializer | None = None,
        out_bias_init: Initializer | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        check_dropout(dropout)
        check_heads(output_embedding_dim, num_heads, num_kv_heads)
        check_scale(scale)
        check_implementation(implementation)
        self.input_embedding_dim = input_embedding_dim
        self.output_embedding_dim = output_embedding_dim
        self.context_length = context_length
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = scale
        self.implementation: Implementation = implementation
        kv_dim = output_embedding_dim // num_heads * self.num_kv_heads
        bias = each_bias(qkv_bias)
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kernel_init = kernel_init or nnx.nn.linear.default_kernel_init
        projection = partial(linear, kernel_init=kernel_init, bias_init=bias_init)
        self.W_query = projection(input_embedding_dim, output_embedding_dim, use_bias=bias[0])
        self.W_key = projection(input_embedding_dim, kv_dim, use_bias=bias[1])
        self.W_value = projection(input_embedding_dim, kv_dim, use_bias=bias[2])
        self.out_proj = linear(
            output_embedding_dim,
            output_embedding_dim,
            use_bias=out_bias,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
        )
        self.dropout = nnx.Dropout(dropout, deterministic=deterministic, rngs=rngs)
        # State: `nnx.split` and checkpoints keep it, `nnx.grad` and optimizers skip it.
        self.mask = Buffer(causal_mask(context_length))

    def __call__(
        self,
        inputs: Float[Array, "*batch queries input_embedding_dim"],
        inputs_k: Float[Array, "*batch tokens input_embedding_dim"] | None = None,
        inputs_v: Float[Array, "*batch tokens input_embedding_dim"] | None = None,
        *,
        mask: Shaped[Array, "*batch_heads queries tokens"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "*batch queries output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it, in every head.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it. The
        arguments have the names and meanings of `flax.nnx.MultiHeadAttention`.

        Args:
            inputs: the tokens that attend. With `inputs_k`, they are the last of its tokens.
            inputs_k: what the keys are projected from; None is `inputs`.
            inputs_v: what the values are projected from; None is `inputs_k`.
            mask: 0 or False blocks, beside what the stored mask blocks: (queries, tokens), or with
                (*batch, heads) in front, where any axis may be 1. A query whose keys are all
                blocked gives NaN, as in the formula. With a mask, the formula is used.
            deterministic: whether no weight is dropped; None is the module's mode.
            rngs: the streams of the dropout; None is the module's own.
            sow_weights: whether to sow the attention weights, after dropout, as `attention_weights`
                of the type `nnx.Intermediate`. Then the formula is used.
        """
        inputs_k, inputs_v = given(inputs, inputs_k, inputs_v)
        for name, each in (("inputs", inputs), ("inputs_k", inputs_k), ("inputs_v", inputs_v)):
            check_inputs(each.shape, self.input_embedding_dim, self.context_length, name)
        check_mask(self.mask.shape, self.context_length)
        queries = self._split(self.W_query(inputs))  # (*batch, heads, queries, head_dim)
        copies = self.num_heads // self.num_kv_heads
        keys = self._split(self.W_key(inputs_k), copies)
        values = self._split(self.W_value(inputs_v), copies)
        pairs = with_call_mask(self.mask[...], mask, queries, keys)
        dropout = dropping(self.dropout, deterministic, rngs)
        if sow_weights:
            dropout = self._sowing(dropout)
        context = masked_attention(
            queries, keys, values, pairs, dropout, self.implementation, self.scale
        )
        context = context.swapaxes(-3, -2)  # (*batch, queries, heads, head_dim)
        return self.out_proj(context.reshape(*context.shape[:-2], self.output_embedding_dim))

    def _sowing(self, dropout: Callable[[Array], Array] | None) -> Callable[[Array], Array]:
        """Return a dropout that also sows the weights that it returns."""

        def drop(weights: Array) -> Array:
            dropped = weights if dropout is None else dropout(weights)
            self.sow(nnx.Intermediate, "attention_weights", dropped)
            return dropped

        return drop

    def _split(
        self, projected: Float[Array, "*batch tokens embed"], copies: int = 1
    ) -> Float[Array, "*batch heads tokens head_dim"]:
        """Return the heads, each one `copies` times, as consecutive heads of queries share it."""
        head_dim = self.output_embedding_dim // self.num_heads
        num_heads = projected.shape[-1] // head_dim
        heads = projected.reshape(*projected.shape[:-1], num_heads, head_dim).swapaxes(-3, -2)
        return heads if copies == 1 else repeated(heads, copies)
