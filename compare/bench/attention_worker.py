"""Compute attention once and print the peak memory of this process as JSON.

Usage: `python -m compare.bench.attention_worker FRAMEWORK VARIANT TOKENS BACKWARD`, where FRAMEWORK
is torch or flax, VARIANT is formula or ours, and BACKWARD is True or False.
"""

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
FUNCTION_NAMES = {"formula": "reference_attention", "ours": "masked_attention"}


def main() -> None:
    """Compute attention, and measure the peak after inputs, mask and compiled program exist."""
    framework, variant = sys.argv[1:3]
    tokens, backward = int(sys.argv[3]), sys.argv[4] == "True"
    package = torch_impl if framework == "torch" else flax_impl
    attend = getattr(package, FUNCTION_NAMES[variant])
    heads = np.random.default_rng(0).standard_normal((4, 1, 1, tokens, HEAD_DIM), dtype=np.float32)
    step = (_torch if framework == "torch" else _jax)(attend, heads, tokens, backward)
    gc.collect()
    # Return free memory to the system. Otherwise the attention would reuse it, uncounted.
    ctypes.CDLL(None).malloc_trim(0)
    base = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset VmHWM
    outputs = step()
    arrays = outputs if isinstance(outputs, tuple) else (outputs,)
    output_bytes = sum(array.nbytes for array in arrays)
    print(json.dumps({"bytes": (kilobytes("VmHWM") - base) * 1024 - output_bytes}))


def _torch(
    attend: Callable[..., Any], heads: np.ndarray, tokens: int, backward: bool
) -> Callable[[], Any]:
    queries, keys, values, cotangent = map(torch.from_numpy, heads)
    mask = torch_impl.causal_mask(tokens)
    small = [tensor[..., :256, :] for tensor in (queries, keys, values)]
    attend(*small, mask[:256, :256].clone())  # the first call loads libraries
    if not backward:
        return lambda: attend(queries, keys, values, mask)
    leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    return lambda: torch.autograd.grad(attend(queries, keys, values, mask), leaves, cotangent)


def _jax(
    attend: Callable[..., Any], heads: np.ndarray, tokens: int, backward: bool
) -> Callable[[], Any]:
    arguments = [*map(jnp.asarray, heads[:3]), flax_impl.causal_mask(tokens)]
    if backward:
        arguments.append(jnp.asarray(heads[3]))
    program = jitted(attend, None, backward).lower(*arguments).compile()
    jax.block_until_ready(arguments)
    return lambda: jax.block_until_ready(program(*arguments))


if __name__ == "__main__":
    main()
