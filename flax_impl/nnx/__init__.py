"""Causal self-attention in Flax NNX."""

from .buffer import Buffer
from .causal_attention import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers

__all__ = ["Buffer", "CausalAttentionWithBuffer", "CausalAttentionWithoutBuffers"]
