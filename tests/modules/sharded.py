"""Convert sharded variables to torch and torch state into a sharded template.

Runs in a process of its own, with two host devices.
"""

import json

import jax
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compare.conversion.convert import linen_to_torch, torch_to_linen
from compare.conversion.errors import ConversionError
from compare.conversion.tensors import numpy_state
from compare.proof.cases import Config
from compare.proof.parity import against_reference
from compare.runners.run import build_linen, build_torch, linen_template

CONFIG = Config(6, 4, 8, 0.1)


def main() -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    by_row, by_column = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), (None, "x"))
    )
    torch.manual_seed(0)
    state = build_torch(CONFIG, buffer=True).state_dict()
    variables = torch_to_linen(state, linen_template(CONFIG, buffer=True))
    sharded = {
        "params": jax.device_put(variables["params"], by_column),
        "buffers": jax.device_put(variables["buffers"], by_row),
    }
    inputs = np.random.default_rng(0).standard_normal((4, 5, 6), dtype=np.float32)
    outputs = jax.jit(build_linen(CONFIG, buffer=True).apply)(
        sharded, jax.device_put(inputs, by_row)
    )
    back = linen_to_torch(sharded)
    placed = torch_to_linen(state, sharded)
    try:
        torch_to_linen(state, sharded, copy=False)
    except ConversionError as error:
        refused = "use copy=True" in str(error)
    print(
        json.dumps(
            {
                "devices": len(sharded["buffers"]["mask"].devices()),
                "round_trip": all(torch.equal(back[key], state[key]) for key in state),
                "placed_like_the_template": placed["buffers"]["mask"].sharding == by_row,
                "sharing_refused": refused,
                "error_over_bound": against_reference(
                    np.asarray(outputs), CONFIG, numpy_state(state), inputs
                ).ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
