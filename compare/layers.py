"""The layers of torch that have a counterpart in Flax, and why others have none."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from torch import nn

from .mapping import Path

SUPPORTED: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.PReLU, nn.MultiheadAttention, nn.LSTMCell, nn.GRUCell),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_MENDS: dict[type[nn.Module], str] = {
    nn.LSTM: "use nn.LSTMCell, layer by layer",
    nn.GRU: "use nn.GRUCell, layer by layer",
    nn.EmbeddingBag: "use nn.Embedding and reduce its output",
}


def layer_types(source: Any) -> dict[str, nn.Module]:
    """Return the layers of a module by their names; none of a state dict."""
    return dict(source.named_modules(remove_duplicate=False)) if isinstance(source, nn.Module) else {}


def refusal(layer: nn.Module) -> str:
    """Say why Flax has no layer that computes the same, or nothing. Modules of the user's own are theirs to write."""
    own = list(layer.parameters(recurse=False)) + list(layer.buffers(recurse=False))
    name = type(layer).__name__
    if not own or not type(layer).__module__.startswith("torch.nn.modules"):
        return ""
    if not isinstance(layer, SUPPORTED):
        mend = next((mend for kind, mend in _MENDS.items() if isinstance(layer, kind)), "replace it")
        return f"{name} has no counterpart in Flax: {mend}"
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        return f"{name} with track_running_stats=True has no counterpart in Flax, whose InstanceNorm keeps none"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        return f"{name} with groups={layer.groups} has no counterpart in Flax, whose ConvTranspose has no groups"
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return f"{name} with {layer.num_parameters} slopes has no counterpart in Flax, whose PReLU has one"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"{name} with max_norm changes its weight when called, which Flax's Embed does not"
    if isinstance(layer, nn.MultiheadAttention) and layer.bias_k is not None:
        return f"{name} with add_bias_kv=True has no counterpart in Flax"
    if isinstance(layer, nn.MultiheadAttention) and layer.add_zero_attn:
        return f"{name} with add_zero_attn=True has no counterpart in Flax"
    return ""


def nnx_layouts(model: nnx.Module) -> Mapping[Path, str]:
    """Return the layouts of the kernels whose NNX layer says more than their name does."""
    found = {}
    for path, layer in nnx.iter_graph(model):
        if isinstance(layer, nnx.ConvTranspose):
            found[(*path, "kernel")] = "conv" if layer.transpose_kernel else "conv_transpose"
        elif isinstance(layer, nnx.Einsum):
            found[(*path, "kernel")] = "same"
        elif isinstance(layer, nnx.LinearGeneral):
            found[(*path, "kernel")] = "general"
    return found
