"""Causal self-attention in Flax Linen: the mask as a constant, and in the collection `buffers`."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from ..attention import causal_mask
from ..checks import check_dropout, check_inputs, check_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from .dropout import dropping


class CausalAttentionWithoutBuffers(nn.Module):
    """Causal self-attention whose mask is a constant of the module: not moved, not saved.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the most tokens that the mask covers.
        dropout: probability of dropping an attention weight when not deterministic.
        qkv_bias: whether the three projections have a bias.
        implementation: of the attention, see `masked_attention`.

    Raises:
        ValueError: dropout outside [0, 1] or an unknown implementation; on call, inputs of the wrong shape.
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
        # Not in the variables: made anew at every call, so an edit has nowhere to live.
        self.mask = causal_mask(self.context_length)

    def __call__(
        self, inputs: Float[Array, "batch tokens input_embedding_dim"], deterministic: bool = True
    ) -> Float[Array, "batch tokens output_embedding_dim"]:
        """Attend each token to itself and the tokens before it.

        With `deterministic=False` pass `rngs={"dropout": key}` to `apply`.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        queries = self.W_query(inputs)  # (batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        dropout = dropping(self.attention_dropout, deterministic)
        return masked_attention(queries, keys, values, self.mask, dropout, self.implementation)


class CausalAttentionWithBuffer(nn.Module):
    """Causal self-attention whose mask is a variable: moved and saved, never trained.

    The variables are `{"params": {...}, "buffers": {"mask": (context_length, context_length)}}`.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the most tokens that the mask covers.
        dropout: probability of dropping an attention weight when not deterministic.
        qkv_bias: whether the three projections have a bias.
        implementation: of the attention, see `masked_attention`.

    Raises:
        ValueError: dropout outside [0, 1] or an unknown implementation; on call, inputs or a mask of the wrong shape.
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
        # State: `device_put` moves it, checkpoints keep it, the optimizer gets only `params`.
        self.mask = self.variable("buffers", "mask", causal_mask, self.context_length)

    def __call__(
        self, inputs: Float[Array, "batch tokens input_embedding_dim"], deterministic: bool = True
    ) -> Float[Array, "batch tokens output_embedding_dim"]:
        """Attend each token to itself and the tokens before it.

        With `deterministic=False` pass `rngs={"dropout": key}` to `apply`.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.value.shape, self.context_length)
        queries = self.W_query(inputs)  # (batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        dropout = dropping(self.attention_dropout, deterministic)
        return masked_attention(queries, keys, values, self.mask.value, dropout, self.implementation)
