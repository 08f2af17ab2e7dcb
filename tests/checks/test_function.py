"""The masks of the check of the function reach each of torch's kernels."""

import numpy as np
import torch

from compare.checks.heads import patterns
from torch_impl.mask_layout import MaskLayout, examine


def layout(blocked: np.ndarray) -> MaskLayout:
    return examine(torch.from_numpy(blocked)).layout(len(blocked))


def test_the_patterns_are_of_each_kind() -> None:
    layouts = {name: layout(blocked) for name, blocked in patterns(closed=False).items()}
    assert {name: each.kind for name, each in layouts.items()} == {
        "causal": "causal",
        "strips": "strips",
        "wide": "wide",
        "a strip closed": "strips",
    }
    assert all(each.closed is None for each in layouts.values())
    assert all(layout(blocked).closed is not None for blocked in patterns().values())
