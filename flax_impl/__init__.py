"""Causal self-attention in Flax: Linen here, NNX in `flax_impl.nnx`. Imports jax, never torch."""

from . import linen, nnx
from .linen import CausalAttentionWithBuffer, CausalAttentionWithoutBuffers
from .masked_attention import causal_mask, masked_attention

__all__ = [
    "CausalAttentionWithBuffer",
    "CausalAttentionWithoutBuffers",
    "causal_mask",
    "linen",
    "masked_attention",
    "nnx",
]
