"""Causal self-attention in Flax NNX: the mask as a plain array, and as a `Buffer`."""

from flax import nnx
from jax import Array
from jaxtyping import Float

from ..attention import causal_mask
from ..checks import check_dropout, check_inputs, check_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from .buffer import Buffer
from .dropout import dropping


class CausalAttentionWithoutBuffers(nnx.Module):
    """Causal self-attention whose mask is a plain array attribute, no `nnx.Variable`.

    NNX counts any array attribute among a module's leaves, so the mask is in `nnx.state(model)`; but
    no filter by type, such as `nnx.state(model, nnx.Param, Buffer)`, selects it.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the most tokens that the mask covers.
        dropout: probability of dropping an attention weight in training mode.
        qkv_bias: whether the three projections have a bias.
        implementation: of the attention, see `masked_attention`.
        rngs: the streams `params` and `dropout`, or a default stream.

    Raises:
        ValueError: dropout outside [0, 1] or an unknown implementation; on call, inputs or a mask of the wrong shape.
    """

    def __init__(
        self,
        input_embedding_dim: int,
        output_embedding_dim: int,
        context_length: int,
        dropout: float,
        qkv_bias: bool = False,
        *,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        check_dropout(dropout)
        check_implementation(implementation)
        self.input_embedding_dim = input_embedding_dim
        self.context_length = context_length
        self.implementation: Implementation = implementation
        self.W_query = nnx.Linear(input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs)
        self.W_key = nnx.Linear(input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs)
        self.W_value = nnx.Linear(input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        # A plain attribute: a filter for Params and Buffers leaves it behind.
        self.mask = causal_mask(context_length)

    def __call__(
        self, inputs: Float[Array, "batch tokens input_embedding_dim"]
    ) -> Float[Array, "batch tokens output_embedding_dim"]:
        """Attend each token to itself and the tokens before it."""
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        return masked_attention(queries, keys, values, self.mask, dropping(self.dropout), self.implementation)


class CausalAttentionWithBuffer(nnx.Module):
    """Causal self-attention whose mask is a `Buffer`: moved and saved, never trained.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the most tokens that the mask covers.
        dropout: probability of dropping an attention weight in training mode.
        qkv_bias: whether the three projections have a bias.
        implementation: of the attention, see `masked_attention`.
        rngs: the streams `params` and `dropout`, or a default stream.

    Raises:
        ValueError: dropout outside [0, 1] or an unknown implementation; on call, inputs or a mask of the wrong shape.
    """

    def __init__(
        self,
        input_embedding_dim: int,
        output_embedding_dim: int,
        context_length: int,
        dropout: float,
        qkv_bias: bool = False,
        *,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        check_dropout(dropout)
        check_implementation(implementation)
        self.input_embedding_dim = input_embedding_dim
        self.context_length = context_length
        self.implementation: Implementation = implementation
        self.W_query = nnx.Linear(input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs)
        self.W_key = nnx.Linear(input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs)
        self.W_value = nnx.Linear(input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        # State: `nnx.split` and checkpoints keep it, `nnx.grad` and the optimizer pass it by.
        self.mask = Buffer(causal_mask(context_length))

    def __call__(
        self, inputs: Float[Array, "batch tokens input_embedding_dim"]
    ) -> Float[Array, "batch tokens output_embedding_dim"]:
        """Attend each token to itself and the tokens before it."""
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        return masked_attention(queries, keys, values, self.mask[...], dropping(self.dropout), self.implementation)
