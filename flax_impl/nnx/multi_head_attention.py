"""Causal multi-head self-attention in Flax NNX: all heads share one mask, a `Buffer`."""

from flax import nnx
from jax import Array
from jaxtyping import Float

from ..attention import causal_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from ..validation import check_dropout, check_heads, check_inputs, check_mask
from .buffer import Buffer
from .dropout import dropping


class CausalMultiHeadAttention(nnx.Module):
    """Causal self-attention in several heads: their outputs are concatenated and projected.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of all heads together and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight in training mode.
        num_heads: number of heads; it must divide output_embedding_dim.
        qkv_bias: whether queries, keys and values have a bias; `out_proj` always has one.
        implementation: which implementation of the attention to use; see `masked_attention`.
        rngs: the streams `params` and `dropout`, or a default stream.

    Raises:
        ValueError: on construction, a dropout outside [0, 1], a num_heads that does not divide
            output_embedding_dim, or an unknown implementation; on call, inputs or a mask of the
            wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.2.
    """

    def __init__(
        self,
        input_embedding_dim: int,
        output_embedding_dim: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        *,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        check_dropout(dropout)
        check_heads(output_embedding_dim, num_heads)
        check_implementation(implementation)
        self.input_embedding_dim = input_embedding_dim
        self.output_embedding_dim = output_embedding_dim
        self.context_length = context_length
        self.num_heads = num_heads
        self.implementation: Implementation = implementation
        self.W_query = nnx.Linear(
            input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs
        )
        self.W_key = nnx.Linear(
            input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs
        )
        self.W_value = nnx.Linear(
            input_embedding_dim, output_embedding_dim, use_bias=qkv_bias, rngs=rngs
        )
        self.out_proj = nnx.Linear(output_embedding_dim, output_embedding_dim, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        # State: `nnx.split` and checkpoints keep it, `nnx.grad` and optimizers skip it.
        self.mask = Buffer(causal_mask(context_length))

    def __call__(
        self, inputs: Float[Array, "batch tokens input_embedding_dim"]
    ) -> Float[Array, "batch tokens output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it, in every head.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self._split(self.W_query(inputs))  # (batch, heads, tokens, head_dim)
        keys = self._split(self.W_key(inputs))
        values = self._split(self.W_value(inputs))
        context = masked_attention(
            queries, keys, values, self.mask[...], dropping(self.dropout), self.implementation
        )
        width = self.output_embedding_dim
        return self.out_proj(context.swapaxes(1, 2).reshape(*inputs.shape[:2], width))

    def _split(
        self, projected: Float[Array, "batch tokens embed"]
    ) -> Float[Array, "batch heads tokens head_dim"]:
        head_dim = self.output_embedding_dim // self.num_heads
        num_heads = projected.shape[2] // head_dim
        return projected.reshape(*projected.shape[:2], num_heads, head_dim).swapaxes(1, 2)
