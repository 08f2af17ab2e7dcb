"""Causal self-attention in PyTorch. Imports torch, never jax."""

from .attention import causal_mask, masked_attention
from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers

__all__ = [
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "causal_mask",
    "masked_attention",
]
