"""Causal self-attention in PyTorch: the mask as a plain tensor, and as a registered buffer."""

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .attention import causal_mask
from .dispatch import Implementation, check_implementation, dropping, masked_attention
from .validation import check_dropout, check_inputs, check_mask


class _CausalAttention(nn.Module):
    """Causal self-attention with a stored mask. A subclass says how the mask is stored.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of queries, keys, values and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight in training mode.
        qkv_bias: whether the three projections have a bias.
        implementation: which implementation of the attention to use; see `masked_attention`.

    Raises:
        ValueError: on construction, a dropout outside [0, 1] or an unknown implementation;
            on call, inputs or a mask of the wrong shape.
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
        sizes = input_embedding_dim, output_embedding_dim
        self.W_query = nn.Linear(*sizes, bias=qkv_bias)
        self.W_key = nn.Linear(*sizes, bias=qkv_bias)
        self.W_value = nn.Linear(*sizes, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        self._keep_mask(causal_mask(context_length))

    def _keep_mask(self, mask: Shaped[Tensor, "context_length context_length"]) -> None:
        raise NotImplementedError

    def forward(
        self, inputs: Float[Tensor, "*batch tokens input_embedding_dim"]
    ) -> Float[Tensor, "*batch tokens output_embedding_dim"]:
        """Let each token attend to itself and to the tokens before it.

        The formula is `reference_attention` in `attention.py`; `masked_attention` computes it.
        """
        check_inputs(inputs.shape, self.input_embedding_dim, self.context_length)
        check_mask(self.mask.shape, self.context_length)
        queries = self.W_query(inputs)  # (*batch, tokens, output_embedding_dim)
        keys = self.W_key(inputs)
        values = self.W_value(inputs)
        dropout = dropping(self.dropout)
        return masked_attention(queries, keys, values, self.mask, dropout, self.implementation)


class CausalAttentionWithoutBuffers(_CausalAttention):
    """The mask is a plain attribute: `.to()` leaves it behind, and `state_dict` does not have it.

    Arguments and errors are those of `_CausalAttention`.
    """

    def _keep_mask(self, mask: Shaped[Tensor, "context_length context_length"]) -> None:
        self.mask = mask


class CausalAttentionWithBuffer(_CausalAttention):
    """The mask is state: `.to()` moves it, `state_dict` saves it, the optimizer never sees it.

    Arguments and errors are those of `_CausalAttention`.
    """

    def _keep_mask(self, mask: Shaped[Tensor, "context_length context_length"]) -> None:
        self.register_buffer("mask", mask)
