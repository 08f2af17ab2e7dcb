"""Causal self-attention in PyTorch. Imports torch, never jax."""

from .attention import causal_mask, reference_attention
from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers
from .dispatch import masked_attention
from .multi_head_attention import CausalMultiHeadAttention

__all__ = [
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "CausalMultiHeadAttention",
    "causal_mask",
    "masked_attention",
    "reference_attention",
]
