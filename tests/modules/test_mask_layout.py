"""What is known of a mask is of this mask: in any order of lengths, and on devices without a look.

On a device other than the CPU, a mask is examined once for each version. Here the CPU takes that
way, too.
"""

import pytest
import torch

from torch_impl import mask_layout
from torch_impl.mask_layout import MaskLayout

SIZE = 1300


def masks(size: int = SIZE) -> dict[str, torch.Tensor]:
    causal = torch.ones(size, size).triu(1)
    window = causal + torch.ones(size, size).tril(-100)
    edited, late, closed = causal.clone(), causal.clone(), causal.clone()
    edited[5, 2] = -1.0
    late[size - 1, 0] = 1.0
    closed[70] = 1.0
    return {
        "causal": causal,
        "open": torch.zeros(size, size),
        "window": window,
        "edited": edited,
        "late": late,
        "closed": closed,
    }


def assert_is_of(layout: MaskLayout, mask: torch.Tensor, tokens: int) -> None:
    """Every unblocked pair is in a strip, and the copies are of the mask."""
    blocked = mask[:tokens, :tokens].bool()
    if layout.blocked is None:
        expected = torch.ones(tokens, tokens).triu(1) if layout.kind == "causal" else blocked * 0
        assert torch.equal(blocked, expected.bool())
        return
    assert torch.equal(layout.blocked, blocked)
    closed = blocked.all(dim=1, keepdim=True)
    assert (layout.closed is None) == (not closed.any())
    assert layout.closed is None or torch.equal(layout.closed, closed)
    covered = torch.zeros_like(blocked)
    for strip in layout.strips:
        for start, stop in strip.keys:
            covered[strip.start : strip.stop, start:stop] = True
    assert not (~blocked & ~covered).any()


@pytest.mark.parametrize("is_on_cpu", [True, False])
@pytest.mark.parametrize("name", masks())
def test_it_is_of_the_mask_at_every_length(
    name: str, is_on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_layout, "_is_on_cpu", lambda mask: is_on_cpu)
    mask = masks()[name]
    for tokens in (1, 130, 1024, 1025, SIZE, 131, 64, 8):
        assert_is_of(mask_layout.mask_layout(mask, tokens), mask, tokens)
    mask[90, 3] = 2.0
    for tokens in (SIZE, 80, 91):
        assert_is_of(mask_layout.mask_layout(mask, tokens), mask, tokens)
    with torch.inference_mode():
        inferred = mask.clone()
        for tokens in (130, 131):
            assert_is_of(mask_layout.mask_layout(inferred, tokens), inferred, tokens)


@pytest.mark.parametrize("name", masks())
def test_a_mask_of_other_size_is_another_mask(name: str) -> None:
    """Both fill the same words, and the larger one blocks nothing beyond the smaller one."""
    smaller = masks(1021)[name]
    larger = torch.zeros(1024, 1024)
    larger[:1021, :1021] = smaller
    for mask in (smaller, larger):
        assert_is_of(mask_layout.mask_layout(mask, len(mask)), mask, len(mask))
