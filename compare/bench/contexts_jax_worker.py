"""Print the times of our module and of the formula's on a mesh of all host devices, as JSON.

Usage: `python -m compare.bench.contexts_jax_worker TOKENS ROUNDS`, with XLA_FLAGS for the devices.
"""

import json
import re
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_impl import CausalMultiHeadAttention

from .turns import median_milliseconds

BATCH, HEADS, WIDTH = 16, 4, 64


def programs(module: CausalMultiHeadAttention) -> dict[str, Any]:
    """Return what is compiled and timed, functions of the variables and the inputs."""

    def loss(variables: Any, inputs: Array) -> Array:
        outputs: Any = module.apply(variables, inputs)
        return outputs.sum()

    return {"forward pass": module.apply, "gradient": jax.grad(loss)}


def on_the_mesh(mesh: Mesh, tokens: int, rounds: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the median times of ours and the formula in ms, and our all-gathers."""
    inputs = jax.random.normal(jax.random.key(0), (BATCH, tokens, WIDTH))
    inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    compiled: dict[str, list[Any]] = {}
    for implementation in ("auto", "reference"):
        module = CausalMultiHeadAttention(
            WIDTH, WIDTH, tokens, 0.0, HEADS, implementation=implementation
        )
        variables = module.init(jax.random.key(1), jnp.ones((1, 4, WIDTH)))
        variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        for name, program in programs(module).items():
            executable = jax.jit(program).lower(variables, inputs).compile()
            compiled.setdefault(name, []).append((executable, variables))
    times: dict[str, Any] = {}
    gathers: dict[str, int] = {}
    for name, pair in compiled.items():
        text = pair[0][0].as_text() or ""
        gathers[name] = len(re.findall(r" all-gather(?:-start)?\(", text))
        calls = [partial(_run, executable, variables, inputs) for executable, variables in pair]
        times[name] = median_milliseconds(calls, rounds)
    return times, gathers


def _run(executable: Any, variables: Any, inputs: Array) -> None:
    jax.block_until_ready(executable(variables, inputs))


def compile_times(tokens: int) -> dict[str, list[float]]:
    """Return the least of three times of compiling ours and the formula, in seconds."""
    found: dict[str, list[float]] = {}
    inputs = jnp.ones((1, tokens, WIDTH))
    for implementation in ("auto", "reference"):
        module = CausalMultiHeadAttention(
            WIDTH, WIDTH, tokens, 0.0, HEADS, implementation=implementation
        )
        variables = module.init(jax.random.key(1), inputs[:, :4])
        for name, program in programs(module).items():
            seconds = []
            for _ in range(3):
                jax.clear_caches()
                begin = time.perf_counter()
                jax.jit(program).lower(variables, inputs).compile()
                seconds.append(time.perf_counter() - begin)
            found.setdefault(name, []).append(min(seconds))
    return found


def main() -> None:
    """Time the programs on all devices; on one device, also time their compilation."""
    tokens, rounds = map(int, sys.argv[1:])
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    times, gathers = on_the_mesh(mesh, tokens, rounds)
    compiling = compile_times(tokens) if devices == 1 else {}
    print(
        json.dumps({"devices": devices, "times": times, "gathers": gathers, "compile": compiling})
    )


if __name__ == "__main__":
    main()
