"""Which torch layers have a counterpart in Flax, and how compound layers are mapped."""

import re
from collections.abc import Container, Iterator, Mapping
from itertools import chain
from typing import Any

from ..frameworks import is_lazy, is_parametrized, linen, nn, nnx
from .mapping import KeyPath, Left, Row
from .parts import equal_part
from .state_kinds import FlaxSide

SUPPORTED: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.PReLU,
    nn.MultiheadAttention,
    nn.LSTMCell,
    nn.GRUCell,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_CONTAINERS = (
    nn.Module,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)
# Modules of these packages compute something, so their names alone do not say what.
_TORCH_LAYERS = ("torch.nn.modules.", "torch.nn.quant", "torch.nn.qat.", "torch.ao.")
_MENDS: dict[type[nn.Module], str] = {
    nn.LSTM: "its layers pair with cells",
    nn.GRU: "its layers pair with cells",
    nn.EmbeddingBag: "use nn.Embedding and reduce its output",
    nn.TransformerEncoderLayer: "write it with nn.MultiheadAttention, nn.Linear and nn.LayerNorm",
    nn.TransformerDecoderLayer: "write it with nn.MultiheadAttention, nn.Linear and nn.LayerNorm",
}


class KnownState(dict[str, Any]):
    """A state dict whose layers are known.

    Attributes:
        layers: the layers by name.
    """

    def __init__(self, tensors: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> None:
        super().__init__(tensors)
        self.layers = dict(layers)


def layer_types(source: Any) -> dict[str, nn.Module]:
    """Return the layers of a module by name, and those of a state dict if they are known."""
    if isinstance(source, nn.Module):
        return dict(source.named_modules(remove_duplicate=False))
    return source.layers if isinstance(source, KnownState) else {}


def is_conv1d_of_transformers(layer: nn.Module | None) -> bool:
    """Return whether the layer is GPT-2's linear layer, which is stored as (in, out)."""
    kinds = [(kind.__module__, kind.__name__) for kind in type(layer).__mro__]
    return ("transformers.pytorch_utils", "Conv1D") in kinds


def _is_torchs(layer: nn.Module) -> bool:
    """Return whether the layer is one of torch's own that holds state."""
    has_state = any(True for _ in chain(layer.parameters(), layer.buffers()))
    is_torchs = type(layer).__module__.startswith(_TORCH_LAYERS)
    return has_state and is_torchs and type(layer) not in _CONTAINERS


def is_unknown(layer: nn.Module) -> bool:
    """Return whether the layer is one of torch's own that has no counterpart that is known."""
    return _is_torchs(layer) and not isinstance(layer, SUPPORTED)


def refusal(layer: nn.Module) -> str | None:
    """Return why Flax has no layer that computes the same, or None.

    Only layers of torch that hold state are refused. The user writes the Flax counterpart of all
    other modules, and of layers without state.
    """
    name = type(layer).__name__
    if is_parametrized(layer):
        return (
            f"{name} computes a weight from other tensors: pass fold=True, or give "
            "compare.fold(source)"
        )
    if any(map(is_lazy, chain(layer.parameters(), layer.buffers()))):
        return None  # its tensors are refused one by one
    if not _is_torchs(layer):
        return None
    if is_unknown(layer):
        mend = next(
            (mend for layer_type, mend in _MENDS.items() if isinstance(layer, layer_type)),
            "replace it",
        )
        return (
            f"{name} has no counterpart that match knows: {mend}; if your Flax model computes the "
            "same, match its state dict instead: compare.match(source.state_dict(), template)"
        )
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        return (
            f"{name} with track_running_stats=True has no counterpart in Flax: "
            "Flax's InstanceNorm has no running statistics"
        )
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
        return (
            f"{name} with groups={layer.groups} has no counterpart in Flax: "
            "Flax's ConvTranspose has no groups"
        )
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return (
            f"{name} with {layer.num_parameters} slopes has no counterpart in Flax: "
            "Flax's PReLU has one slope"
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"{name} with max_norm changes its weight when called; Flax's Embed does not"
    if isinstance(layer, nn.MultiheadAttention) and layer.bias_k is not None:
        return f"{name} with add_bias_kv=True has no counterpart in Flax"
    if isinstance(layer, nn.MultiheadAttention) and layer.add_zero_attn:
        return f"{name} with add_zero_attn=True has no counterpart in Flax"
    return None


def flax_layouts(layers: Mapping[tuple[str, ...], Any]) -> Mapping[tuple[str, ...], str]:
    """Return the layouts of the kernels whose layout depends on the type of the Flax layer."""
    layouts = {}
    for path, layer in layers.items():
        if isinstance(layer, nnx.ConvTranspose | linen.ConvTranspose):
            layouts[(*path, "kernel")] = "conv" if layer.transpose_kernel else "conv_transpose"
        elif isinstance(layer, nnx.Einsum | linen.Einsum):
            layouts[(*path, "kernel")] = "same"
        elif isinstance(layer, nnx.LinearGeneral | linen.DenseGeneral):
            layouts[(*path, "kernel")] = "general"
    return layouts


_PROJECTIONS = ("query", "key", "value")
_SEPARATE_KEYS = {"query": "q_proj_weight", "key": "k_proj_weight", "value": "v_proj_weight"}
# Flax's names of the gates, in torch's order. NNX says `if_` for `if`, which is a keyword.
_LSTM_GATES = ("i", "f", "g", "o")
_GRU_GATES = ("r", "z", "n")
_RECURRENT = re.compile(r"weight_ih((?:_l\d+(?:_reverse)?)?)")
_LAYER = re.compile(r"((?:weight|bias)_[ih]h)_(l\d+(?:_reverse)?)")


def compound_rows(
    tensors: Mapping[str, Any], names: Mapping[str, str], flax: FlaxSide
) -> tuple[list[Row], list[Left]]:
    """Return the rows of attention layers and recurrent cells, and their entries without a row."""
    rows: list[Row] = []
    left: list[Left] = []
    for key in tensors:
        prefix, leaf = key[: key.rfind(".") + 1], key.rpartition(".")[2]
        name = names[key][: -len(leaf)]
        if leaf in ("in_proj_weight", "q_proj_weight"):
            rows += _attention(prefix, name, leaf == "in_proj_weight", tensors, flax)
        elif fit := _RECURRENT.fullmatch(leaf):
            name = names[key][: -len("weight_ih")]  # see `cell_name`
            cell_rows, cell_left = _cell(prefix, fit[1], name, tensors, flax)
            rows += cell_rows
            left += cell_left
    return rows, left


def _attention(
    prefix: str, name: str, fused: bool, tensors: Mapping[str, Any], flax: FlaxSide
) -> Iterator[Row]:
    for index, projection in enumerate(_PROJECTIONS):
        key = f"{prefix}in_proj_weight" if fused else prefix + _SEPARATE_KEYS[projection]
        part = equal_part(index, len(_PROJECTIONS))
        for path in _only(flax, f"{name}{projection}.kernel", tensors, key):
            shape = tuple(flax.leaves[path].shape)
            yield Row(key, path, "heads_in", part=part if fused else None, shape=shape)
        for path in _only(flax, f"{name}{projection}.bias", tensors, f"{prefix}in_proj_bias"):
            shape = tuple(flax.leaves[path].shape)
            yield Row(f"{prefix}in_proj_bias", path, "heads_bias", part=part, shape=shape)
    for path in _only(flax, f"{name}out.kernel", tensors, f"{prefix}out_proj.weight"):
        yield Row(
            f"{prefix}out_proj.weight", path, "heads_out", shape=tuple(flax.leaves[path].shape)
        )
    for path in _only(flax, f"{name}out.bias", tensors, f"{prefix}out_proj.bias"):
        yield Row(f"{prefix}out_proj.bias", path)


def cell_name(key: str, tensors: Container[str]) -> str:
    """Return the torch key, or how a cell of its own would call this entry of LSTM or GRU layers.

    `lstm.weight_ih_l0` of one layer is `lstm.weight_ih`; of several layers, or of two directions,
    `lstm.l0.weight_ih` or `lstm.l0_reverse.weight_ih`.
    """
    prefix, dot, leaf = key.rpartition(".")
    fit = _LAYER.fullmatch(leaf)
    if fit is None or f"{prefix}{dot}weight_hh_l0" not in tensors:
        return key
    others = (f"{prefix}{dot}weight_hh_{other}" for other in ("l1", "l0_reverse"))
    step = f"{fit[2]}." if any(other in tensors for other in others) else ""
    return f"{prefix}{dot}{step}{fit[1]}"


def _cell(
    prefix: str, suffix: str, name: str, tensors: Mapping[str, Any], flax: FlaxSide
) -> tuple[list[Row], list[Left]]:
    input_weight, hidden_weight, input_bias, hidden_bias = (
        f"{prefix}{leaf}{suffix}" for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    if hidden_weight not in tensors:
        return [], []
    shape: tuple[int, ...] = tuple(getattr(tensors[hidden_weight], "shape", ()))
    count = shape[0] // shape[1] if len(shape) == 2 and shape[1] else 0
    gates = {4: _LSTM_GATES, 3: _GRU_GATES}.get(count, ())
    if f"{name}dense_i.kernel" in flax.by_name and gates:
        keys = input_weight, hidden_weight, input_bias, hidden_bias
        return _dense_cell(name, keys, gates is _GRU_GATES, tensors, flax)
    rows: list[Row] = []
    for index, gate in enumerate(gates):
        part = equal_part(index, count)
        for side, key in (("i", input_weight), ("h", hidden_weight)):
            for path in _only(flax, f"{name}{side}{gate}.kernel", tensors, key) or _only(
                flax, f"{name}{side}{gate}_.kernel", tensors, key
            ):
                rows.append(Row(key, path, "transposed", part=part))
        if gate == "n":
            for side, key in (("i", input_bias), ("h", hidden_bias)):
                rows += [
                    Row(key, path, part=part)
                    for path in _only(flax, f"{name}{side}n.bias", tensors, key)
                ]
            continue
        # torch adds two biases. Flax adds one: to the state in an LSTM, to the input in a GRU.
        side = "h" if gates is _LSTM_GATES else "i"
        for path in _only(flax, f"{name}{side}{gate}.bias", tensors, input_bias):
            rows.append(Row(input_bias, path, part=part, plus=hidden_bias))
    return rows, []


def _dense_cell(
    name: str,
    keys: tuple[str, str, str, str],
    is_gru: bool,
    tensors: Mapping[str, Any],
    flax: FlaxSide,
) -> tuple[list[Row], list[Left]]:
    """Map an NNX cell: one kernel has all gates, and a GRU has no bias inside the reset gate."""
    input_weight, hidden_weight, input_bias, hidden_bias = keys
    rows = [
        Row(input_weight, path, "transposed")
        for path in _only(flax, f"{name}dense_i.kernel", tensors, input_weight)
    ]
    rows += [
        Row(hidden_weight, path, "transposed")
        for path in _only(flax, f"{name}dense_h.kernel", tensors, hidden_weight)
    ]
    for path in _only(flax, f"{name}dense_{'i' if is_gru else 'h'}.bias", tensors, input_bias):
        rows.append(Row(input_bias, path, plus=hidden_bias))
    left = [Left(hidden_bias, "zero:2/3")] if is_gru and hidden_bias in tensors else []
    return rows, left


def _only(flax: FlaxSide, name: str, tensors: Mapping[str, Any], key: str) -> list[KeyPath]:
    """Return the path with that dotted name, if there is exactly one and torch has the key."""
    paths = flax.by_name.get(name, [])
    return paths if len(paths) == 1 and key in tensors else []
