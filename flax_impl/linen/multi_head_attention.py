"""Causal multi-head self-attention in Flax Linen: all heads share one mask in `buffers`."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from ..attention import causal_mask
from ..dispatch import Implementation, check_implementation, masked_attention
from ..validation import check_dropout, check_heads, check_inputs, check_mask
from .dropout import dropping


class CausalMultiHeadAttention(nn.Module):
    """Causal self-attention in several heads: their outputs are concatenated and projected.

    The variables are `{"params": {...}, "buffers": {"mask": (context_length, context_length)}}`.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of all heads together and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight when not deterministic.
        num_heads: number of heads; it must divide output_embedding_dim.
        qkv_bias: whether queries, keys and values have a bias; `out_proj` always has one.
        implementation: which implementation of the attention to use; see `masked_attention`.

    Raises:
        ValueError: on construction, a dropout outside [0, 1], a num_heads that does not divide
            output_embedding_dim, or an unknown implementation; on call, inputs or a mask of the
            wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.2.
    """

    input_embedding_dim: int
    output_embedding_dim: int
    context_length: int
    dropout: float
    num_heads: int
    qkv_bias: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_heads(self.output_embedding_dim, self.num_heads)
        check_implementation(self.implementation)
        super().__post_init__()

    def setup(self) -> None:
        self.W_query = nn.Dense(self.output_embedding_dim, use_bias=self.qkv_bias)
        self.W_key = nn.Dense(self.output_embedding_dim, use_bias=self.qkv_bias)
        self.W_value = nn.Dense(self.output_embedding_dim, use_bias=self.qkv_bias)
        self.out_proj = nn.Dense(self.output_embedding_dim)
        self.attention_dropout = nn.Dropout(self.dropout)  # `dropout` names the field
        # State: `device_put` moves it, checkpoints save it, the optimizer gets only `params`.
        self.mask = self.variable("buffers", "mask", causal_mask, self.context_length)

    def __call__(
        self, inputs: Float[Array, "batch tokens input_embedding_dim"], deterministic: bool = True
    ) -> Float[Array, "batch tokens output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it, in every head.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it.
        With `deterministic=False` pass `rngs={"dropout": key}` to `apply`.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.value.shape, self.context_length)
        queries = self._split(self.W_query(inputs))  # (batch, heads, tokens, head_dim)
        keys = self._split(self.W_key(inputs))
        values = self._split(self.W_value(inputs))
        dropout = dropping(self.attention_dropout, deterministic)
        context = masked_attention(
            queries, keys, values, self.mask.value, dropout, self.implementation
        )
        width = self.output_embedding_dim
        return self.out_proj(context.swapaxes(1, 2).reshape(*inputs.shape[:2], width))

    def _split(
        self, projected: Float[Array, "batch tokens embed"]
    ) -> Float[Array, "batch heads tokens head_dim"]:
        head_dim = self.output_embedding_dim // self.num_heads
        num_heads = projected.shape[2] // head_dim
        return projected.reshape(*projected.shape[:2], num_heads, head_dim).swapaxes(1, 2)
