"""State that moves and is saved with a module but is never trained."""

from flax import nnx


class Buffer(nnx.Variable):
    """The NNX counterpart of `torch.nn.Module.register_buffer`.

    Optimizers and `nnx.grad` select `nnx.Param`, so they skip it. `nnx.state(model, Buffer)`
    selects it. Source: Flax documentation, "Migrating from PyTorch to JAX/Flax", on buffers.
    """


def _name_collection() -> None:
    """Let `nnx.bridge` give this type to Linen's collection `buffers`, and the other way.

    Another library may have taken the name: then that library's type stays.
    """
    try:
        nnx.register_variable_name("buffers", Buffer)
    except ValueError:
        return


_name_collection()
