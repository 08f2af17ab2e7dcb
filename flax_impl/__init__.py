"""Causal self-attention in Flax: Linen here, NNX in `flax_impl.nnx`. Imports jax, never torch."""

from . import linen, nnx
from .attention import causal_mask, reference_attention
from .dispatch import masked_attention
from .linen import (
    CausalAttentionWithBuffer,
    CausalAttentionWithoutBuffers,
    CausalMultiHeadAttention,
)

__all__ = [
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "CausalMultiHeadAttention",
    "causal_mask",
    "linen",
    "masked_attention",
    "nnx",
    "reference_attention",
]
