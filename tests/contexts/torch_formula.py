"""The yardstick in PyTorch: the formula as a plain module, with the names of ours."""

from typing import Any

import torch
from torch import Tensor, nn

import torch_impl

FEATURES, WIDTH, CONTEXT_LENGTH, HEADS = 6, 8, 256, 2
LENGTHS = (100, 140)  # on both sides of `MIN_FUSED_TOKENS`


class Formula(nn.Module):
    """Causal self-attention in two heads, written as one reads it."""

    W_query: nn.Linear
    W_key: nn.Linear
    W_value: nn.Linear
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("W_query", "W_key", "W_value"):
            setattr(self, name, nn.Linear(FEATURES, WIDTH, bias=False))
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("mask", torch_impl.causal_mask(CONTEXT_LENGTH))

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.shape[1]
        queries, keys, values = (
            layer(inputs).unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )
        scores = queries @ keys.mT / (WIDTH // HEADS) ** 0.5
        blocked = self.mask[:tokens, :tokens].bool()
        weights = self.dropout(scores.masked_fill(blocked, -torch.inf).softmax(dim=-1))
        return self.out_proj((weights @ values).transpose(1, 2).flatten(2))


def ours(implementation: torch_impl.dispatch.Implementation = "auto") -> nn.Module:
    return torch_impl.CausalMultiHeadAttention(
        FEATURES, WIDTH, CONTEXT_LENGTH, 0.0, HEADS, implementation=implementation
    )


def masks() -> dict[str, Tensor]:
    causal = torch_impl.causal_mask(CONTEXT_LENGTH)
    edited, closed = causal.clone(), causal.clone()
    edited[50:, 3] = 2.0
    edited[7, 9] = 0.0
    closed[90] = 1.0
    return {"causal": causal, "edited": edited, "closed": closed}


def pair(mask: str, implementation: torch_impl.dispatch.Implementation) -> list[Any]:
    """Return our module and the formula, in float64, with the same weights and mask."""
    torch.manual_seed(0)
    formula = Formula()
    formula.mask = masks()[mask]
    module = ours(implementation)
    module.load_state_dict(formula.state_dict())
    return [module.double(), formula.double()]


def inputs(tokens: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, FEATURES, dtype=torch.float64, generator=generator)


def assert_same(found: object, expected: object, tokens: int) -> None:
    """Compare in float64: sums of `tokens` terms, in a chain of fewer than 64 operations."""
    assert same(found, expected, tokens)


def same(found: object, expected: object, tokens: int) -> bool:
    """Return whether all tensors are the same, as `assert_same` says."""
    ours, theirs = _leaves(found), _leaves(expected)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        size = other.nan_to_num().abs().max().item() if other.numel() else 0.0
        limit = 64 * tokens * 2.0**-53 * max(1.0, size)
        if not torch.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True):
            return False
    return True


def _leaves(tree: object) -> list[Tensor]:
    return [
        leaf.detach() for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)
    ]
