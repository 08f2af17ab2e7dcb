"""Checkpoints of either implementation, in the formats of both frameworks.

| suffix | format | layout inside | read it with the plain library by |
| --- | --- | --- | --- |
| `.pth`, `.pt` | torch zip | torch state dict | `torch.load(path, weights_only=True)` |
| `.safetensors` | safetensors | torch state dict | `safetensors.torch.load_file(path)` |
| `.msgpack` | Flax msgpack | Linen variables | `flax.serialization.msgpack_restore(data)` |
| `.orbax`, none | Orbax folder | Linen variables | `orbax.checkpoint.StandardCheckpointer().restore(path)` |

What is written depends on the values alone: torch, Linen and NNX write the same files.
"""

from .load import load_checkpoint, read_checkpoint
from .save import save_checkpoint

__all__ = ["load_checkpoint", "read_checkpoint", "save_checkpoint"]
