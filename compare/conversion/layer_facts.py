"""What the layers of a torch module say besides their tensors, as JSON for a manifest, and back."""

from collections.abc import Mapping
from typing import Any

from ..files.printable import kind_of
from ..frameworks import HAS_TORCH, nn, torch
from .layers import SUPPORTED

Facts = dict[str, Any]

_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("eps", "momentum", "track_running_stats")
# The first type that fits a layer counts; layers of other types say nothing.
_FACTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Embedding: ("padding_idx", "scale_grad_by_freq"),
    nn.MultiheadAttention: ("num_heads", "dropout"),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d), (*_CONV, "_reversed_padding_repeated_twice")
    ),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*_CONV, "output_padding")
    ),
    nn.LayerNorm: ("eps", "normalized_shape"),
    nn.RMSNorm: ("eps", "normalized_shape"),
    nn.GroupNorm: ("eps", "num_groups", "num_channels"),
    **dict.fromkeys(
        (
            *(nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        _NORM,
    ),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ("p",)),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.CELU: ("alpha",),
}
_FACTS |= {layer_type: () for layer_type in SUPPORTED if layer_type not in _FACTS}
_TYPES = {layer_type.__name__: layer_type for layer_type in _FACTS}
LAYER_BYTES = 4096  # more than a layer without tensors takes
_WINDOWS = ("kernel_size", "stride", "dilation", "output_padding")


def facts_of(module: nn.Module) -> dict[str, Facts]:
    """Return the type and the facts of every layer whose type is known, by name."""
    return {
        name: _facts(layer, layer_type)
        for name, layer in module.named_modules(remove_duplicate=False)
        if (layer_type := next((known for known in _FACTS if isinstance(layer, known)), None))
    }


def _facts(layer: Any, layer_type: type[nn.Module]) -> Facts:
    facts: Facts = {"type": layer_type.__name__}
    facts |= {fact: getattr(layer, fact) for fact in _FACTS[layer_type]}
    if layer_type is nn.RMSNorm and layer.eps is None:
        weight = layer.weight
        facts["eps"] = torch.finfo(torch.float32 if weight is None else weight.dtype).eps
    return facts


def require_valid(stored: Any) -> None:
    """Raise ValueError unless this is what `facts_of` returns, from JSON. No layer is made."""
    if not isinstance(stored, Mapping):
        raise ValueError(f"its layers are {kind_of(stored)}, not names with facts")
    for name, facts in stored.items():
        kind = str(facts.get("type")) if isinstance(facts, Mapping) else ""
        layer_type = _TYPES.get(kind)
        if layer_type is None or facts.keys() != {"type", *_FACTS[layer_type]}:
            raise ValueError(f"what it says of the layer {name} is not known")
        rank = int(kind[-2]) if kind.startswith("Conv") else 0
        for fact in _FACTS[layer_type]:
            if not _is_valid(fact, _value(facts[fact]), rank):
                raise ValueError(f"the layer {name} has {fact}={facts[fact]!r}")


def layers_from(stored: Mapping[str, Facts]) -> dict[str, nn.Module]:
    """Return layers without tensors that say what `facts_of` stored, which must be valid."""
    return {name: _layer(facts) for name, facts in stored.items()}


def _layer(facts: Facts) -> Any:
    layer_type = _TYPES[facts["type"]]
    layer: Any = object.__new__(layer_type)
    if HAS_TORCH:
        nn.Module.__init__(layer)
    else:
        layer.parameters = layer.buffers = tuple  # none
    for fact in _FACTS[layer_type]:
        setattr(layer, fact, _value(facts[fact]))
    return layer


def _value(value: Any) -> Any:
    """Return a value as a layer has it: JSON has lists for tuples."""
    return tuple(value) if isinstance(value, list) else value


def _is_valid(fact: str, value: Any, rank: int) -> bool:
    """Return whether a fact has a value that its type of layer can have."""
    if fact == "padding" and isinstance(value, str):
        return value in ("same", "valid")
    if fact in (*_WINDOWS, "padding"):
        return _are_sizes(value) and len(value) == rank
    if fact == "_reversed_padding_repeated_twice":
        return _are_sizes(value) and len(value) == 2 * rank
    if fact == "normalized_shape":
        return _are_sizes(value)
    if fact in ("padding_mode", "approximate"):
        return isinstance(value, str)
    if fact in ("scale_grad_by_freq", "track_running_stats"):
        return type(value) is bool
    if fact in ("groups", "num_groups", "num_channels", "num_heads"):
        return type(value) is int and value > 0
    if fact == "padding_idx":
        return value is None or type(value) is int
    if fact == "momentum" and value is None:
        return True
    return type(value) in (int, float)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and size >= 0 for size in value)
