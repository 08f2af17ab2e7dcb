"""Causal self-attention in Flax Linen."""

from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers
from .multi_head_attention import CausalMultiHeadAttention

__all__ = ["CausalAttentionWithBuffer", "CausalAttentionWithoutBuffers", "CausalMultiHeadAttention"]
