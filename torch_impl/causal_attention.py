"""Causal self-attention in PyTorch: the mask as a plain tensor, and as a registered buffer."""

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .attention import causal_mask
from .checks import check_dropout, check_inputs, check_mask
from .dispatch import Implementation, check_implementation, dropping, masked_attention


class CausalAttentionWithoutBuffers(nn.Module):
    """Causal self-attention whose mask is a plain tensor attribute: not moved, not saved.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the most tokens that the mask covers.
        dropout: probability of dropping an attention weight in training mode.
        qkv_bias: whether the three projections have a bias.
        implementation: of the attention, see `masked_attention`.

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
    ) -> None:
        check_dropout(dropout)
        check_implementation(implementation)
        super().__init__()
        self.input_embedding_dim = input_embedding_dim
        self.context_length = context_length
        self.implementation: Implementation = implementation
        self.W_query = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.W_key = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.W_value = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        # A plain attribute: `.to()` leaves it behind and `state_dict` does not know it.
        self.mask = causal_mask(context_length)

    def forward(
        self, inputs: Float[Tensor, "batch tokens input_embedding_dim"]
    ) -> Float[Tensor, "batch tokens output_embedding_dim"]:
        """Attend each token to itself and the tokens before it."""
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        return masked_attention(queries, keys, values, self.mask, dropping(self.dropout), self.implementation)


class CausalAttentionWithBuffer(nn.Module):
    """Causal self-attention whose mask is a registered buffer: moved and saved, never trained.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the most tokens that the mask covers.
        dropout: probability of dropping an attention weight in training mode.
        qkv_bias: whether the three projections have a bias.
        implementation: of the attention, see `masked_attention`.

    Raises:
        ValueError: dropout outside [0, 1] or an unknown implementation; on call, inputs or a mask of the wrong shape.
    """

    mask: Shaped[Tensor, "context_length context_length"]

    def __init__(
        self,
        input_embedding_dim: int,
        output_embedding_dim: int,
        context_length: int,
        dropout: float,
        qkv_bias: bool = False,
        *,
        implementation: Implementation = "auto",
    ) -> None:
        check_dropout(dropout)
        check_implementation(implementation)
        super().__init__()
        self.input_embedding_dim = input_embedding_dim
        self.context_length = context_length
        self.implementation: Implementation = implementation
        self.W_query = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.W_key = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.W_value = nn.Linear(input_embedding_dim, output_embedding_dim, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        # State: `.to()` moves it, `state_dict` keeps it, the optimizer never sees it.
        self.register_buffer("mask", causal_mask(context_length))

    def forward(
        self, inputs: Float[Tensor, "batch tokens input_embedding_dim"]
    ) -> Float[Tensor, "batch tokens output_embedding_dim"]:
        """Attend each token to itself and the tokens before it."""
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        return masked_attention(queries, keys, values, self.mask, dropping(self.dropout), self.implementation)
