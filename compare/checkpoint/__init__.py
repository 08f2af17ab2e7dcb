"""Checkpoints of either framework, in the formats of both.

| suffix | format | layout inside | read it with the plain library by |
| --- | --- | --- | --- |
| `.pth`, `.pt`, `.bin` | torch zip | torch state dict | `torch.load(path, weights_only=True)` |
| `.safetensors` | safetensors | torch state dict, or Flax paths | `safetensors.torch.load_file(path)` |
| a folder with `*.safetensors.index.json` | shards | likewise | `safetensors.torch.load_file`, shard by shard |
| `.msgpack` | Flax msgpack | Flax variables | `flax.serialization.msgpack_restore(data)` |
| `.orbax`, none | Orbax folder | Flax variables | `orbax.checkpoint.StandardCheckpointer().restore(path)` |

Each carries a manifest in its own kind of metadata: layout, mapping, dtypes and a checksum of every
tensor.
"""

from .formats import open_checkpoint
from .load import load_checkpoint, read_checkpoint
from .save import save_checkpoint

__all__ = ["load_checkpoint", "open_checkpoint", "read_checkpoint", "save_checkpoint"]
