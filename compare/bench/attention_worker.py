"""Attend once in a process of its own and print its peak memory: `memory_worker NAME TOKENS BACKWARD`, as JSON."""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flax_impl
import torch_impl

from .contestants import jitted
from .streaming_worker import kilobytes

HEAD_DIM = 64


def main() -> None:
    """Attend, the peak counted from here on: inputs, the mask and the compiled program are there already."""
    name, tokens, backward = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
    framework, which = name.split(" ")
    attend = getattr(torch_impl if framework == "torch" else flax_impl, WHICH[which])
    heads = np.random.default_rng(0).standard_normal((4, 1, 1, tokens, HEAD_DIM), dtype=np.float32)
    step = (_torch if framework == "torch" else _jax)(attend, heads, tokens, backward)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # else free memory that the process still has would not be counted
    base = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    found = step()
    results = sum(array.nbytes for array in (found if isinstance(found, tuple) else (found,)))
    print(json.dumps({"bytes": (kilobytes("VmHWM") - base) * 1024 - results}))


WHICH = {"formula": "reference_attention", "ours": "masked_attention"}


def _torch(
    attend: Callable[..., Any], heads: np.ndarray, tokens: int, backward: bool
) -> Callable[[], Any]:
    queries, keys, values, cotangent = map(torch.from_numpy, heads)
    mask = torch_impl.causal_mask(tokens)
    small = [tensor[..., :256, :] for tensor in (queries, keys, values)]
    attend(*small, mask[:256, :256].clone())  # loads what is loaded at the first call
    if not backward:
        return lambda: attend(queries, keys, values, mask)
    leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    return lambda: torch.autograd.grad(attend(queries, keys, values, mask), leaves, cotangent)


def _jax(
    attend: Callable[..., Any], heads: np.ndarray, tokens: int, backward: bool
) -> Callable[[], Any]:
    given = [
        *map(jnp.asarray, heads[:3]),
        flax_impl.causal_mask(tokens),
        *([jnp.asarray(heads[3])] * backward),
    ]
    program = jitted(attend, None, backward).lower(*given).compile()
    jax.block_until_ready(given)
    return lambda: jax.block_until_ready(program(*given))


if __name__ == "__main__":
    main()
