"""Causal multi-head self-attention in PyTorch: all heads share one mask, a registered buffer."""

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .attention import causal_mask
from .closed_rows import guarded_projection
from .dispatch import Implementation, attend, check_implementation, dropping
from .validation import check_dropout, check_heads, check_inputs, check_mask


class CausalMultiHeadAttention(nn.Module):
    """Causal self-attention in several heads: their outputs are concatenated and projected.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of all heads together and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight in training mode.
        num_heads: number of heads; it must divide output_embedding_dim.
        qkv_bias: whether queries, keys and values have a bias; `out_proj` always has one.
        implementation: which implementation of the attention to use; see `masked_attention`.

    Raises:
        ValueError: on construction, a dropout outside [0, 1], a num_heads that does not divide
            output_embedding_dim, or an unknown implementation; on call, inputs or a mask of the
            wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.2.
    """

    mask: Shaped[Tensor, "context_length context_length"]

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
    ) -> None:
        check_dropout(dropout)
        check_heads(output_embedding_dim, num_heads)
        check_implementation(implementation)
        super().__init__()
        self.input_embedding_dim = input_embedding_dim
        self.context_length = context_length
        self.num_heads = num_heads
        self.head_dim = output_embedding_dim // num_heads
        self.implementation: Implementation = implementation
        self.W_query = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.W_key = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.W_value = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.out_proj = nn.Linear(output_embedding_dim, output_embedding_dim)
        self.dropout = nn.Dropout(dropout)
        # State: `.to()` moves it, `state_dict` saves it, the optimizer never sees it.
        self.register_buffer("mask", causal_mask(context_length))

    def forward(
        self, inputs: Float[Tensor, "batch tokens input_embedding_dim"]
    ) -> Float[Tensor, "batch tokens output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it, in every head.

        The formula is `reference_attention` in `attention.py`; `attend` computes it.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self._split(self.W_query(inputs))  # (batch, heads, tokens, head_dim)
        keys = self._split(self.W_key(inputs))
        values = self._split(self.W_value(inputs))
        context, closed = attend(
            queries, keys, values, self.mask, dropping(self.dropout), self.implementation
        )
        return guarded_projection(self.out_proj, context.transpose(1, 2).flatten(2), closed)

    def _split(
        self, projected: Float[Tensor, "batch tokens embed"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        return projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
