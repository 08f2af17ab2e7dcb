"""Causal self-attention in Flax NNX: the mask as a plain array, and as a `Buffer`."""

from flax import nnx
from jax import Array
from jaxtyping import Float, Shaped

from ..attention import causal_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from ..validation import check_dropout, check_inputs, check_mask
from .buffer import Buffer
from .dropout import dropping


class _CausalAttention(nnx.Module):
    """Causal self-attention with a stored mask. A subclass says how the mask is stored.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight in training mode.
        qkv_bias: whether the three projections have a bias.
        implementation: which implementation of the attention to use; see `masked_attention`.
        rngs: the streams `params` and `dropout`, or a default stream.

    Raises:
        ValueError: on construction, a dropout outside [0, 1] or an unknown implementation;
            on call, inputs or a mask of the wrong shape.
    """

    mask: Buffer | Array

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
        sizes = input_embedding_dim, output_embedding_dim
        self.W_query = nnx.Linear(*sizes, use_bias=qkv_bias, rngs=rngs)
        self.W_key = nnx.Linear(*sizes, use_bias=qkv_bias, rngs=rngs)
        self.W_value = nnx.Linear(*sizes, use_bias=qkv_bias, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self._keep_mask(causal_mask(context_length))

    def _keep_mask(self, mask: Shaped[Array, "context_length context_length"]) -> None:
        raise NotImplementedError

    def __call__(
        self, inputs: Float[Array, "*batch tokens input_embedding_dim"]
    ) -> Float[Array, "*batch tokens output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (*batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        dropout = dropping(self.dropout)
        return masked_attention(queries, keys, values, self.mask[...], dropout, self.implementation)


class CausalAttentionWithoutBuffers(_CausalAttention):
    """The mask is a plain array: no type of Variable, such as `nnx.Param` or `Buffer`, selects it.

    It still is a leaf of `nnx.state(model)`, as NNX counts every array attribute.
    Arguments and errors are those of `_CausalAttention`.
    """

    def _keep_mask(self, mask: Shaped[Array, "context_length context_length"]) -> None:
        self.mask = mask


class CausalAttentionWithBuffer(_CausalAttention):
    """The mask is state: `nnx.split` and checkpoints keep it, `nnx.grad` and optimizers skip it.

    Arguments and errors are those of `_CausalAttention`.
    """

    def _keep_mask(self, mask: Shaped[Array, "context_length context_length"]) -> None:
        self.mask = Buffer(mask)
