"""Causal self-attention in Flax Linen."""

from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers

__all__ = ["CausalAttentionWithBuffer", "CausalAttentionWithoutBuffers"]
