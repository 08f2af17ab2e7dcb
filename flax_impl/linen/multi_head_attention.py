"""Causal multi-head self-attention in Flax Linen: all heads share one mask in `buffers`."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
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
from .dropout import dropping


class CausalMultiHeadAttention(nn.Module):
    """Causal attention in several heads: their outputs are concatenated and projected.

    The variables are `{"params": {...}, "buffers": {"mask": (context_length, context_length)}}`.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of all heads together and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight when not deterministic.
        num_heads: number of heads; it must divide output_embedding_dim.
        qkv_bias: whether queries, keys and values have a bias; or a tuple of three answers.
        implementation: which implementation of the attention to use; see `masked_attention`.
        out_bias: whether `out_proj` has a bias.
        num_kv_heads: number of heads of keys and values, each for several consecutive heads of
            queries; it must divide num_heads. None is num_heads.
        scale: the factor of the scores; None is 1 / sqrt(head_dim).
        dtype: the dtype of the computation; None is that to which inputs and parameters promote.
        param_dtype: the dtype of the parameters. The mask is float32.
        kernel_init: initializer of the kernels, such as one of `flax.linen.with_partitioning`; None
            is that of `flax.linen.Dense`.
        bias_init: initializer of the biases.
        out_kernel_init: initializer of the kernel of `out_proj`; None is kernel_init.
        out_bias_init: initializer of the bias of `out_proj`; None is bias_init.
        deterministic: whether no weight is dropped where the call does not say; None is True.

    Raises:
        ValueError: on construction, a dropout outside [0, 1], a num_heads that does not divide
            output_embedding_dim, a num_kv_heads that does not divide num_heads, a qkv_bias of
            another length than three, a scale that is not finite, or an unknown implementation; on
            call, inputs or masks of the wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.2.
    """

    input_embedding_dim: int
    output_embedding_dim: int
    context_length: int
    dropout: float
    num_heads: int
    qkv_bias: bool | tuple[bool, bool, bool] = False
    implementation: Implementation = "auto"
    out_bias: bool = True
    num_kv_heads: int | None = None
    scale: float | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer | None = None  # the library's own cannot be pickled
    bias_init: Initializer = nn.initializers.zeros_init()
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_heads(self.output_embedding_dim, self.num_heads, self.num_kv_heads)
        each_bias(self.qkv_bias)
        check_scale(self.scale)
        check_implementation(self.implementation)
        super().__post_init__()

    def setup(self) -> None:
        width = self.output_embedding_dim
        kv_dim = width // self.num_heads * (self.num_kv_heads or self.num_heads)
        bias = each_bias(self.qkv_bias)
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        kernel_init = self.kernel_init or nn.linear.default_kernel_init
        projection = partial(dense, kernel_init=kernel_init, bias_init=self.bias_init)
        self.W_query = projection(width, use_bias=bias[0])
        self.W_key = projection(kv_dim, use_bias=bias[1])
        self.W_value = projection(kv_dim, use_bias=bias[2])
        self.out_proj = dense(
            width,
            use_bias=self.out_bias,
            kernel_init=self.out_kernel_init or kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
        )
        self.attention_dropout = nn.Dropout(self.dropout)  # `dropout` names the field
        # State: `device_put` moves it, checkpoints save it, the optimizer gets only `params`.
        self.mask = self.variable("buffers", "mask", causal_mask, self.context_length)

    def __call__(
        self,
        inputs: Float[Array, "*batch queries input_embedding_dim"],
        inputs_k: Float[Array, "*batch tokens input_embedding_dim"] | None = None,
        inputs_v: Float[Array, "*batch tokens input_embedding_dim"] | None = None,
        *,
        mask: Shaped[Array, "*batch_heads queries tokens"] | None = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "*batch queries output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it, in every head.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it. The
        arguments have the names and meanings of `flax.linen.MultiHeadDotProductAttention`.

        Args:
            inputs: the tokens that attend. With `inputs_k`, they are the last of its tokens.
            inputs_k: what the keys are projected from; None is `inputs`.
            inputs_v: what the values are projected from; None is `inputs_k`.
            mask: 0 or False blocks, beside what the stored mask blocks: (queries, tokens), or with
                (*batch, heads) in front, where any axis may be 1. A query whose keys are all
                blocked gives NaN, as in the formula. With a mask, the formula is used.
            deterministic: whether no weight is dropped; None is the module's. With False, pass
                `rngs={"dropout": key}` to `apply`.
            sow_weights: whether to sow the attention weights, after dropout, as `attention_weights`
                in the collection `intermediates`. Then the formula is used.
        """
        if deterministic is None:
            deterministic = self.deterministic is not False
        inputs_k, inputs_v = given(inputs, inputs_k, inputs_v)
        for name, each in (("inputs", inputs), ("inputs_k", inputs_k), ("inputs_v", inputs_v)):
            check_inputs(each.shape, self.input_embedding_dim, self.context_length, name)
        check_mask(self.mask.value.shape, self.context_length)
        queries = self._split(self.W_query(inputs))  # (*batch, heads, queries, head_dim)
        copies = self.num_heads // (self.num_kv_heads or self.num_heads)
        keys = self._split(self.W_key(inputs_k), copies)
        values = self._split(self.W_value(inputs_v), copies)
        pairs = with_call_mask(self.mask.value, mask, queries, keys)
        dropout = dropping(self.attention_dropout, deterministic)
        if sow_weights:
            dropout = self._sowing(deterministic)
        context = masked_attention(
            queries, keys, values, pairs, dropout, self.implementation, self.scale
        )
        context = context.swapaxes(-3, -2)  # (*batch, queries, heads, head_dim)
        return self.out_proj(context.reshape(*context.shape[:-2], self.output_embedding_dim))

    def _sowing(self, deterministic: bool) -> Callable[[Array], Array]:
        """Return a dropout that also sows the weights that it returns."""

        def drop(weights: Array) -> Array:
            dropped = self.attention_dropout(weights, deterministic=deterministic)
            self.sow("intermediates", "attention_weights", dropped)
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
