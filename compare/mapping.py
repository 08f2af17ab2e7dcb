"""Where each entry of the attention classes lives: torch key, Linen path, NNX path, layout, kind."""

from typing import Any, Literal, NamedTuple

Path = tuple[Any, ...]  # names, or integers within an NNX list


class Row(NamedTuple):
    """One tensor in its three places.

    `layout` is `transposed` where torch stores (out, in) and Flax (in, out).
    `required` entries exist in every class and configuration.
    """

    torch_key: str
    linen_path: Path
    nnx_path: Path
    layout: Literal["same", "transposed"]
    kind: Literal["parameter", "buffer"]
    required: bool


def _projection(name: str) -> tuple[Row, Row]:
    kernel, bias = (name, "kernel"), (name, "bias")
    return (
        Row(f"{name}.weight", ("params", *kernel), kernel, "transposed", "parameter", True),
        Row(f"{name}.bias", ("params", *bias), bias, "same", "parameter", False),
    )


# In the order of the torch state dict.
ROWS: tuple[Row, ...] = (
    Row("mask", ("buffers", "mask"), ("mask",), "same", "buffer", False),
    *_projection("W_query"),
    *_projection("W_key"),
    *_projection("W_value"),
)
