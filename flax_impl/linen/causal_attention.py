"""Causal self-attention in Flax Linen: the mask as a constant, and in the collection `buffers`."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from ..attention import causal_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from ..validation import check_dropout, check_inputs, check_mask
from .dropout import dropping


class _CausalAttention(nn.Module):
    """Causal self-attention with a stored mask. A subclass says how the mask is stored.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight when not deterministic.
        qkv_bias: whether the three projections have a bias.
        implementation: which implementation of the attention to use; see `masked_attention`.

    Raises:
        ValueError: on construction, a dropout outside [0, 1] or an unknown implementation;
            on call, inputs or a mask of the wrong shape.
    """

    input_embedding_dim: int
    output_embedding_dim: int
    context_length: int
    dropout: float
    qkv_bias: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_implementation(self.implementation)
        super().__post_init__()

    def setup(self) -> None:
        self.W_query = nn.Dense(self.output_embedding_dim, use_bias=self.qkv_bias)
        self.W_key = nn.Dense(self.output_embedding_dim, use_bias=self.qkv_bias)
        self.W_value = nn.Dense(self.output_embedding_dim, use_bias=self.qkv_bias)
        self.attention_dropout = nn.Dropout(self.dropout)  # `dropout` names the field
        self._keep_mask()

    def _keep_mask(self) -> None:
        raise NotImplementedError

    def __call__(
        self, inputs: Float[Array, "*batch tokens input_embedding_dim"], deterministic: bool = True
    ) -> Float[Array, "*batch tokens output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it.
        With `deterministic=False` pass `rngs={"dropout": key}` to `apply`.
        """
        mask = self.mask.value if isinstance(self.mask, nn.Variable) else self.mask
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (*batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        dropout = dropping(self.attention_dropout, deterministic)
        return masked_attention(queries, keys, values, mask, dropout, self.implementation)


class CausalAttentionWithoutBuffers(_CausalAttention):
    """The mask is a constant, not a variable: every call makes it anew, and an edit is lost.

    Arguments and errors are those of `_CausalAttention`.
    """

    def _keep_mask(self) -> None:
        self.mask = causal_mask(self.context_length)


class CausalAttentionWithBuffer(_CausalAttention):
    """The mask is a variable: `device_put` moves it, checkpoints save it, the optimizer skips it.

    The variables are `{"params": {...}, "buffers": {"mask": (context_length, context_length)}}`.
    Arguments and errors are those of `_CausalAttention`.
    """

    def _keep_mask(self) -> None:
        self.mask = self.variable("buffers", "mask", causal_mask, self.context_length)
