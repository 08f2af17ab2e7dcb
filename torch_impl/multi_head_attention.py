"""Causal multi-head self-attention in PyTorch: all heads share one mask, a registered buffer."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .attention import causal_mask
from .call_masks import with_call_masks
from .closed_rows import for_all_heads, guarded_projection
from .dispatch import Implementation, attend, check_implementation, dropping
from .validation import (
    check_dropout,
    check_heads,
    check_inputs,
    check_mask,
    check_scale,
    each_bias,
)


class CausalMultiHeadAttention(nn.Module):
    """Causal attention in several heads: their outputs are concatenated and projected.

    Args:
        input_embedding_dim: width of each input token.
        output_embedding_dim: width of all heads together and of each output token.
        context_length: the largest number of tokens; the mask is (context_length, context_length).
        dropout: probability of dropping an attention weight in training mode.
        num_heads: number of heads; it must divide output_embedding_dim.
        qkv_bias: whether queries, keys and values have a bias; or a tuple of three answers.
        implementation: which implementation of the attention to use; see `masked_attention`.
        out_bias: whether `out_proj` has a bias.
        num_kv_heads: number of heads of keys and values, each for several consecutive heads of
            queries; it must divide num_heads. None is num_heads.
        scale: the factor of the scores; None is 1 / sqrt(head_dim).
        device: where parameters and mask are created; None is torch's default device.
        dtype: the dtype of the parameters; None is torch's default dtype. The mask is float32.

    Raises:
        ValueError: on construction, a dropout outside [0, 1], a num_heads that does not divide
            output_embedding_dim, a num_kv_heads that does not divide num_heads, a qkv_bias of
            another length than three, a scale that is not finite, or an unknown implementation; on
            call, inputs or masks of the wrong shape.

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
        qkv_bias: bool | tuple[bool, bool, bool] = False,
        *,
        implementation: Implementation = "auto",
        out_bias: bool = True,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dropout(dropout)
        check_heads(output_embedding_dim, num_heads, num_kv_heads)
        check_scale(scale)
        check_implementation(implementation)
        super().__init__()
        self.input_embedding_dim = input_embedding_dim
        self.context_length = context_length
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = output_embedding_dim // num_heads
        self.scale = scale
        self.implementation: Implementation = implementation
        kv_dim = self.num_kv_heads * self.head_dim
        bias = each_bias(qkv_bias)
        placed = {"device": device, "dtype": dtype}
        self.W_query = nn.Linear(input_embedding_dim, output_embedding_dim, bias[0], **placed)
        self.W_key = nn.Linear(input_embedding_dim, kv_dim, bias[1], **placed)
        self.W_value = nn.Linear(input_embedding_dim, kv_dim, bias[2], **placed)
        self.out_proj = nn.Linear(output_embedding_dim, output_embedding_dim, out_bias, **placed)
        self.dropout = nn.Dropout(dropout)
        # State: `.to()` moves it, `state_dict` saves it, the optimizer never sees it.
        self.register_buffer("mask", causal_mask(context_length).to(device=device))

    def forward(
        self,
        inputs: Float[Tensor, "*batch queries input_embedding_dim"],
        key: Float[Tensor, "*batch tokens input_embedding_dim"] | None = None,
        value: Float[Tensor, "*batch tokens input_embedding_dim"] | None = None,
        key_padding_mask: Bool[Tensor, "*batch tokens"] | None = None,
        need_weights: bool = False,
        attn_mask: Bool[Tensor, "*batch_heads queries tokens"] | None = None,
        average_attn_weights: bool = True,
    ) -> (
        Float[Tensor, "*batch queries output_embedding_dim"]
        | tuple[
            Float[Tensor, "*batch queries output_embedding_dim"],
            Float[Tensor, "*batch_heads queries tokens"],
        ]
    ):
        """Let each token attend to itself and to the tokens before it, in every head.

        The formula is `reference_attention` in `attention.py`; `attend` computes it. The arguments
        have the names and meanings of `torch.nn.MultiheadAttention`, but `need_weights` is False.

        Args:
            inputs: the tokens that attend. With a `key`, they are the last of its tokens.
            key: what the keys are projected from; None is `inputs`.
            value: what the values are projected from; None is `key`.
            key_padding_mask: True where a key is padding, which no query attends to. A query whose
                keys are all blocked gives NaN, as in the formula.
            need_weights: whether to return the attention weights too, after dropout. Then the
                formula is used.
            attn_mask: True blocks, beside what the stored mask blocks: (queries, tokens), or with
                (*batch, heads) in front, where any axis may be 1, or with (batch * heads).
            average_attn_weights: whether the weights are returned as their mean over the heads.
        """
        key, value = _given(inputs, key, value)
        for name, each in (("inputs", inputs), ("key", key), ("value", value)):
            check_inputs(each.shape, self.input_embedding_dim, self.context_length, name)
        check_mask(self.mask.shape, self.context_length)
        queries = self._split(self.W_query(inputs))  # (*batch, heads, queries, head_dim)
        keys = self._split(self.W_key(key), self.num_heads // self.num_kv_heads)
        values = self._split(self.W_value(value), self.num_heads // self.num_kv_heads)
        mask = with_call_masks(self.mask, attn_mask, key_padding_mask, queries, keys)
        kept: list[Tensor] = []
        dropout = _keeping(self.dropout, kept) if need_weights else dropping(self.dropout)
        context, closed = attend(
            queries, keys, values, mask, dropout, self.implementation, self.scale
        )
        if closed is not None and closed.ndim > 2:
            closed = for_all_heads(closed, context)
        outputs = guarded_projection(self.out_proj, context.transpose(-3, -2).flatten(-2), closed)
        if not need_weights:
            return outputs
        return outputs, kept[0].mean(dim=-3) if average_attn_weights else kept[0]

    def _split(
        self, projected: Float[Tensor, "*batch tokens embed"], copies: int = 1
    ) -> Float[Tensor, "*batch heads tokens head_dim"]:
        """Return the heads, each one `copies` times, as consecutive heads of queries share it."""
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        return heads if copies == 1 else heads.repeat_interleave(copies, dim=-3)


def _keeping(dropout: nn.Module, kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a dropout that also appends the weights that it returns."""

    def drop(weights: Tensor) -> Tensor:
        kept.append(dropout(weights))
        return kept[-1]

    return drop


def _given(inputs: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what keys and values are projected from; a value alone would have no key.

    Raises:
        ValueError: a value without a key, or nested inputs.
    """
    if any(each is not None and each.is_nested for each in (inputs, key, value)):
        raise ValueError(
            "inputs are nested: pad them (`torch.nested.to_padded_tensor`), and give a "
            "key_padding_mask that is True at the padding"
        )
    if key is None and value is not None:
        raise ValueError("value is given without a key: give both, or a key alone")
    key = inputs if key is None else key
    return key, key if value is None else value
