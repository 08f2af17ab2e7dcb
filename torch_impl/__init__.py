"""Causal self-attention in PyTorch. Imports torch, never jax."""

from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers
from .masked_attention import causal_mask, masked_attention

__all__ = [
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "causal_mask",
    "masked_attention",
]
