"""Checkpoints of PyTorch and Flax, in the file formats of both.

| suffix | format | content | the format's own library reads it with |
| --- | --- | --- | --- |
| `.pth`, `.pt`, `.bin` | torch zip | torch state dict | `torch.load(path, weights_only=True)` |
| `.safetensors` | safetensors | torch or Flax names | `safetensors.torch.load_file(path)` |
| folder with an index | shards | torch or Flax names | `load_file`, shard by shard |
| `.msgpack` | Flax msgpack | Flax variables | `flax.serialization.msgpack_restore(data)` |
| `.orbax`, none | Orbax folder | Flax variables | `StandardCheckpointer().restore(path)` |

`.ckpt` and `.pth.tar` are torch zips too. The index of a folder of shards is a file
`*.safetensors.index.json`. Each format stores a manifest where its library does not return it: the
layout, the mapping, and dtype, shape and checksum of every tensor.
"""

from .formats import open_checkpoint
from .load import load_checkpoint, read_checkpoint
from .save import save_checkpoint

__all__ = ["load_checkpoint", "open_checkpoint", "read_checkpoint", "save_checkpoint"]
