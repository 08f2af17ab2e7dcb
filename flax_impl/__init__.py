"""Causal self-attention in Flax: Linen here, NNX in `flax_impl.nnx`. Imports jax, never torch."""

from . import linen, nnx
from .attention import causal_mask, masked_attention
from .linen import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers

__all__ = [
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "causal_mask",
    "linen",
    "masked_attention",
    "nnx",
]
