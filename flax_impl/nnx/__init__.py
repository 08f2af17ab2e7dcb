"""Causal self-attention in Flax NNX."""

from .buffer import Buffer
from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers
from .multi_head_attention import CausalMultiHeadAttention

__all__ = [
    "Buffer",
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "CausalMultiHeadAttention",
]
