"""The masks of the check of the function reach each of torch's kernels."""

import torch

from compare.checks.heads import patterns
from torch_impl.mask_layout import examine


def test_the_patterns_are_of_each_kind() -> None:
    layouts = {
        name: examine(torch.from_numpy(blocked)) for name, blocked in patterns(closed=False).items()
    }
    assert {name: layout.kind for name, layout in layouts.items()} == {
        "causal": "causal",
        "strips": "strips",
        "wide": "wide",
        "a strip closed": "strips",
    }
    assert not any(layout.closed_rows for layout in layouts.values())
    assert all(examine(torch.from_numpy(blocked)).closed_rows for blocked in patterns().values())
