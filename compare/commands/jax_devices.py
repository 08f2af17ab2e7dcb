"""Observe what JAX does when the mask and the weights are on two devices.

`XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m compare.commands.jax_devices` prints
the observations as JSON. JAX treats the two host devices like any two devices.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..conversion.convert import torch_to_linen, torch_to_nnx
from ..conversion.tensors import torch_state
from ..proof.cases import NOTEBOOK
from ..runners.notebook_figures import initial_states, inputs
from ..runners.run import NnxAttention, build_linen, build_nnx, linen_mask, linen_template

HOME, OTHER = jax.devices("cpu")


def observe(call: Callable[[], Any], mask: jax.Array) -> dict[str, str]:
    """Run the call; return the devices of the mask, and "works" or the error that JAX raised."""
    try:
        jax.block_until_ready(call())
        result = "works"
    except ValueError as error:
        result = f"ValueError: {error}"
    return {"result": result, "mask": ", ".join(sorted(str(device) for device in mask.devices()))}


def linen_cases() -> dict[str, Any]:
    """Return the observations of the four cases with Linen variables."""
    without_buffer, with_buffer = map(torch_state, initial_states())
    tokens = jax.device_put(inputs(), OTHER)
    model, plain = build_linen(NOTEBOOK, buffer=True), build_linen(NOTEBOOK, buffer=False)
    variables = jax.device_put(
        torch_to_linen(with_buffer, linen_template(NOTEBOOK, buffer=True)), HOME
    )
    moved = jax.device_put(variables, OTHER)
    left_behind = {"params": moved["params"], "buffers": variables["buffers"]}
    constant = jax.device_put(
        torch_to_linen(without_buffer, linen_template(NOTEBOOK, buffer=False)), OTHER
    )
    edited = {**moved, "buffers": {"mask": jnp.zeros_like(moved["buffers"]["mask"])}}
    captured = moved

    @jax.jit
    def closed_over(tokens: jax.Array) -> Any:
        return model.apply(captured, tokens)

    before = closed_over(tokens)
    captured = edited
    return {
        "moved": observe(lambda: model.apply(moved, tokens), moved["buffers"]["mask"]),
        "committed": observe(
            lambda: model.apply(left_behind, tokens), left_behind["buffers"]["mask"]
        ),
        "uncommitted": observe(
            lambda: plain.apply(constant, tokens), linen_mask(NOTEBOOK, constant, buffer=False)
        ),
        "closed_over": {
            "edit_seen": not bool(jnp.array_equal(before, closed_over(tokens))),
            "edit_seen_as_argument": not bool(
                jnp.array_equal(before, jax.jit(model.apply)(edited, tokens))
            ),
        },
    }


def nnx_cases() -> dict[str, Any]:
    """Return the observations of the four cases with NNX models."""
    without_buffer, with_buffer = map(torch_state, initial_states())
    tokens = jax.device_put(inputs(), OTHER)
    model = _moved(torch_to_nnx(with_buffer, build_nnx(NOTEBOOK, buffer=True)))
    plain = _moved(torch_to_nnx(without_buffer, build_nnx(NOTEBOOK, buffer=False)))
    uncommitted = observe(lambda: plain(tokens), plain.mask[...])
    plain.mask = jax.device_put(plain.mask, HOME)
    committed = observe(lambda: plain(tokens), plain.mask[...])

    @jax.jit
    def closed_over(tokens: jax.Array) -> jax.Array:
        return model(tokens)

    @nnx.jit
    def as_argument(model: NnxAttention, tokens: jax.Array) -> jax.Array:
        return model(tokens)

    moved = observe(lambda: model(tokens), model.mask[...])
    before = closed_over(tokens)
    model.mask[...] = jnp.zeros_like(model.mask[...])
    return {
        "moved": moved,
        "committed": committed,
        "uncommitted": uncommitted,
        "closed_over": {
            "edit_seen": not bool(jnp.array_equal(before, closed_over(tokens))),
            "edit_seen_as_argument": not bool(jnp.array_equal(before, as_argument(model, tokens))),
        },
    }


def _moved(model: NnxAttention) -> NnxAttention:
    """Move the model's Params and Buffers to the other device, and switch dropout off."""
    state = nnx.state(model, nnx.Variable)
    nnx.update(model, jax.device_put(state, OTHER))
    model.eval()
    return model


if __name__ == "__main__":
    devices = [str(device) for device in jax.devices("cpu")]
    print(json.dumps({"devices": devices, "linen": linen_cases(), "nnx": nnx_cases()}))
