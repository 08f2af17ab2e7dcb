"""Run our modules on a mesh of four host devices, in a process of its own.

Prints one line of JSON: for each case, whether the values are those of one device, and how many
collective operations of each kind the compiled program has.
"""

import json
import os
import re
import sys
from functools import partial
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_impl
from flax_impl.fused import kernels_take

TOKENS, FEATURES = 800, 16
ALL_BATCHES = (8, 4)  # 32 and 16 heads: the tiles are small, and large
COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute")
PARTS: dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]] = {
    "data": (("data",), (4,), PartitionSpec("data")),
    "model": (("model",), (4,), PartitionSpec()),
    "both": (("data", "model"), (2, 2), PartitionSpec("data")),
}


def counts(compiled: Any) -> dict[str, int]:
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


def same(found: Any, expected: Any) -> bool:
    """Compare in float64: sums of TOKENS terms, and of 32 heads."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    limit = 64 * 32 * TOKENS * 2.0**-53
    return all(
        np.allclose(one, other, rtol=0.0, atol=limit * max(1.0, float(np.abs(other).max())))
        for one, other in pairs
    )


def functions(module: Any) -> dict[str, Any]:
    def loss(variables: Any, inputs: Array) -> Array:
        return jnp.square(module.apply(variables, inputs)).sum()

    def pushed(variables: Any, inputs: Array) -> Any:
        return jax.jvp(partial(module.apply, variables), (inputs,), (inputs[..., ::-1],))

    return {"forward": module.apply, "gradient": jax.grad(loss, argnums=1), "pushed": pushed}


def placed(variables: Any, mesh: Any, axes: tuple[str, ...]) -> Any:
    """Shard the heads over the axis `model`, if there is one; the rest is on every device."""

    def place(path: Any, leaf: Array) -> Array:
        names = [str(key.key) for key in path]
        spec = PartitionSpec()
        if "model" in axes and names[-1] == "kernel":
            is_last = names[-2] == "out_proj"
            spec = PartitionSpec("model", None) if is_last else PartitionSpec(None, "model")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, variables)


def built(implementation: Any, batch: int, **options: Any) -> tuple[Any, Any, Array]:
    """Return a module with 4 heads, its variables and inputs."""
    module = flax_impl.CausalMultiHeadAttention(
        FEATURES, FEATURES, 1024, 0.0, 4, implementation=implementation, **options
    )
    inputs = jax.random.normal(jax.random.key(0), (batch, TOKENS, FEATURES))
    return module, module.init(jax.random.key(1), inputs[:, :4]), inputs


def compiled_by_shardings(implementation: Any, batches: tuple[int, ...]) -> dict[str, Any]:
    results = {}
    for batch in batches:
        module, variables, inputs = built(implementation, batch)
        for part, (axes, shape, spec) in PARTS.items():
            mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
            arguments = (
                placed(variables, mesh, axes),
                jax.device_put(inputs, NamedSharding(mesh, spec)),
            )
            for name, function in functions(module).items():
                if name == "pushed" and (part, batch) != ("data", 8):
                    continue
                compiled = jax.jit(function).lower(*arguments).compile()
                is_same = same(compiled(*arguments), jax.jit(function)(variables, inputs))
                results[f"{name} {part} {batch}"] = {"same": is_same, **counts(compiled)}
    return results


def explicit(implementation: Any) -> dict[str, Any]:
    module, variables, inputs = built(implementation, 8)
    expected = {name: each(variables, inputs) for name, each in functions(module).items()}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    results = {}
    with jax.set_mesh(mesh):
        arguments = (
            jax.device_put(variables, NamedSharding(mesh, PartitionSpec())),
            jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data"))),
        )
        for name, function in functions(module).items():
            found = jax.jit(function)(*arguments)
            first = jax.tree.leaves(found)[0]
            is_sharded = first.sharding.spec[0] == "data"
            results[f"explicit {name}"] = {"same": same(found, expected[name]) and is_sharded}
        rows = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(None, "data")))
        results["explicit tokens"] = {"same": not kernels_take(rows, rows, rows)}
    return results


def grouped(implementation: Any) -> dict[str, Any]:
    """Two heads of keys, each for two of queries, on two devices of an explicit axis."""
    module, variables, inputs = built(implementation, 4, num_kv_heads=2)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def place(path: Any, leaf: Array) -> Array:
        names = [str(key.key) for key in path]
        is_split = names[-1] == "kernel" and names[-2] != "out_proj"
        spec = PartitionSpec(None, "model") if is_split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        given = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(module.apply)(jax.tree_util.tree_map_with_path(place, variables), given)
    return {"explicit grouped": {"same": same(found, module.apply(variables, inputs))}}


def mapped_by_hand(implementation: Any) -> dict[str, Any]:
    """`shard_map`, also with a mask for each device."""
    module, variables, inputs = built(implementation, 4)
    masks = jnp.stack([variables["buffers"]["mask"]] * 4).at[1:, 5:, 3].set(1.0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, each = PartitionSpec(), PartitionSpec("data")

    def with_mask(mask: Array, inputs: Array) -> Any:
        return module.apply({**variables, "buffers": {"mask": mask[0]}}, inputs)

    def of_all(masks: Array, inputs: Array) -> Array:
        return jnp.concatenate([with_mask(masks[index : index + 1], inputs) for index in range(4)])

    results = {}
    for check in (True, False):
        mapped = partial(jax.shard_map, mesh=mesh, out_specs=each, check_vma=check)
        rows = mapped(module.apply, in_specs=(everywhere, each))
        own_mask = mapped(with_mask, in_specs=(each, everywhere))
        for name, found, expected in (
            ("forward", rows(variables, inputs), module.apply(variables, inputs)),
            ("mask", own_mask(masks, inputs), of_all(masks, inputs)),
            (
                "gradient",
                jax.jit(jax.grad(lambda inputs: jnp.square(own_mask(masks, inputs)).sum()))(inputs),  # noqa: B023
                jax.grad(lambda inputs: jnp.square(of_all(masks, inputs)).sum())(inputs),
            ),
        ):
            results[f"shard_map {name} {check}"] = {"same": same(found, expected)}
    spread = jax.pmap(lambda inputs: module.apply(variables, inputs))(inputs[:, None])
    results["pmap"] = {"same": same(spread[:, 0], module.apply(variables, inputs))}
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    implementation = sys.argv[1]
    print(
        json.dumps(
            {
                **compiled_by_shardings(implementation, ALL_BATCHES[: int(sys.argv[2])]),
                **explicit(implementation),
                **grouped(implementation),
                **mapped_by_hand(implementation),
            }
        )
    )
