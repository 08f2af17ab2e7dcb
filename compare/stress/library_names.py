"""Pairs of models of other libraries whose modules have other names, with the true names."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_DISTILBERT = {
    "transformer.layer": "encoder.layer",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_CLIP = {
    "encoder.layer.": "vision_model.encoder.layers.",
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
}


class NamedPair(NamedTuple):
    """A torch model, the shapes of a Flax model, and the true name of each module of torch.

    Attributes:
        name: the name of the pair.
        models: makes the torch model and the Flax variables.
        true_name: the name in Flax of a module in torch; None if Flax has no such module.
    """

    name: str
    models: Callable[[], tuple[torch.nn.Module, Any]]
    true_name: Callable[[str], str | None]


def _torchvision(name: str) -> torch.nn.Module:
    model: torch.nn.Module = getattr(import_module("torchvision.models"), name)()
    return model


def _shapes(init: Any, *inputs: Any, **options: Any) -> Any:
    return jax.eval_shape(lambda key: init(key, *inputs, **options), jax.random.key(0))


def _flax_of_transformers(name: str, **sizes: Any) -> Any:
    library = import_module("transformers")
    flax_class = getattr(library, name)
    return variables_of(flax_class(flax_class.config_class(**sizes)))


def variables_of(model: Any) -> Any:
    """Return the variables of a Flax model of transformers, which may hold its params alone."""
    return model.params if "params" in model.params else {"params": model.params}


def _torch_of_transformers(name: str, **options: Any) -> torch.nn.Module:
    library = import_module("transformers")
    torch_class = getattr(library, name)
    more = {key: options.pop(key) for key in ("add_pooling_layer",) if key in options}
    model: torch.nn.Module = torch_class(torch_class.config_class(**options), **more)
    return model


_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
_TEXT = {"vocab_size": 61, "max_position_embeddings": 40}
_IMAGE = {"image_size": 32, "patch_size": 8}


def _replaced(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _place(name: str, blocks: tuple[int, ...]) -> tuple[int, str, str]:
    """Return the number of the block of a ResNet, counted through, its part, and what follows."""
    stage, block, part, *rest = name.removeprefix("layer").split(".")
    return sum(blocks[: int(stage) - 1]) + int(block), part, "".join(rest)


def _jax_resnet(size: int) -> NamedPair:
    blocks = _BLOCKS[size]

    def models() -> tuple[torch.nn.Module, Any]:
        module = getattr(import_module("jax_resnet"), f"ResNet{size}")(n_classes=1000)
        return _torchvision(f"resnet{size}"), _shapes(module.init, jnp.zeros((1, 64, 64, 3)))

    def true_name(name: str) -> str:
        if name in ("conv1", "bn1"):
            return f"layers_0.ConvBlock_0.{'Conv_0' if name == 'conv1' else 'BatchNorm_0'}"
        if name == "fc":
            return f"layers_{sum(blocks) + 3}"
        index, part, rest = _place(name, blocks)
        layer = "Conv_0" if part.startswith("conv") or rest == "0" else "BatchNorm_0"
        if part == "downsample":
            return f"layers_{index + 2}.ResNetSkipConnection_0.ConvBlock_0.{layer}"
        return f"layers_{index + 2}.ConvBlock_{int(part[-1]) - 1}.{layer}"

    return NamedPair(f"torchvision ResNet-{size}, jax-resnet", models, true_name)


def _flaxmodels_resnet(size: int) -> NamedPair:
    blocks, block = _BLOCKS[size], "BasicBlock" if size < 50 else "Bottleneck"

    def models() -> tuple[torch.nn.Module, Any]:
        library = import_module("flaxmodels")
        module = getattr(library, f"ResNet{size}")(output="logits", pretrained=None)
        image = jnp.zeros((1, 64, 64, 3))
        return _torchvision(f"resnet{size}"), _shapes(module.init, image, train=False)

    def true_name(name: str) -> str:
        if name in ("conv1", "bn1", "fc"):
            return {"conv1": "Conv_0", "bn1": "BatchNorm_0", "fc": "Dense_0"}[name]
        index, part, rest = _place(name, blocks)
        layer = "Conv" if part.startswith("conv") or rest == "0" else "BatchNorm"
        skip = 2 if size < 50 else 3
        number = skip if part == "downsample" else int(part[-1]) - 1
        return f"{block}_{index}.{layer}_{number}"

    return NamedPair(f"torchvision ResNet-{size}, flaxmodels", models, true_name)


def _flaxmodels_vgg(name: str) -> NamedPair:
    layers = [
        f"conv{stage}_{index}"
        for stage, count in enumerate(_CONVOLUTIONS[name], 1)
        for index in range(1, count + 1)
    ]

    def models() -> tuple[torch.nn.Module, Any]:
        library = import_module("flaxmodels")
        module = getattr(library, name.upper())(output="logits", pretrained=None, num_classes=1000)
        image = jnp.zeros((1, 224, 224, 3))
        return _torchvision(name), _shapes(module.init, image, train=False)

    def true_name(module: str) -> str:
        if module.startswith("classifier"):
            return {"0": "fc6", "3": "fc7", "6": "fc8"}[module.rpartition(".")[2]]
        source = _torchvision(name)
        convolutions = [
            key for key, layer in source.named_modules() if isinstance(layer, torch.nn.Conv2d)
        ]
        return layers[convolutions.index(module)]

    return NamedPair(f"torchvision {name.upper()}, flaxmodels", models, true_name)


def _hugging_face_resnet(name: str) -> str | None:
    if name in ("conv1", "bn1"):
        return f"embedder.embedder.{'convolution' if name == 'conv1' else 'normalization'}"
    if name == "fc":
        return None
    stage, block, part, *rest = name.removeprefix("layer").split(".")
    layer = "convolution" if part.startswith("conv") or rest == ["0"] else "normalization"
    inner = "shortcut" if part == "downsample" else f"layer.{int(part[-1]) - 1}"
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{inner}.{layer}"


def _distilbert_of(name: str) -> str | None:
    if "token_type" in name:
        return None
    return _replaced(name, {new: old for old, new in _DISTILBERT.items()})


def _clip_of(name: str) -> str | None:
    if name.startswith("embeddings"):
        return None
    return "vision_model.post_layernorm" if name == "layernorm" else _replaced(name, _CLIP)


def _xglm_of(name: str) -> str | None:
    if "embed_positions" in name:
        return None
    return re.sub(r"^decoder\.", "", name.replace("decoder.final_layer_norm", "layer_norm"))


_OPT = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
}
_XGLM = {"num_layers": 3, "attention_heads": 4, "d_model": 32}

PAIRS = (
    *map(_jax_resnet, _BLOCKS),
    *map(_flaxmodels_resnet, _BLOCKS),
    *map(_flaxmodels_vgg, _CONVOLUTIONS),
    NamedPair(
        "torchvision ResNet-50, transformers",
        lambda: (_torchvision("resnet50"), _flax_of_transformers("FlaxResNetModel")),
        _hugging_face_resnet,
    ),
    NamedPair(
        "DistilBERT, BERT in Flax",
        lambda: (
            _torch_of_transformers("DistilBertModel", **_DISTIL, **_TEXT),
            _flax_of_transformers("FlaxBertModel", **_BERT, **_TEXT),
        ),
        lambda name: _replaced(name, _DISTILBERT),
    ),
    NamedPair(
        "BERT, DistilBERT in Flax",
        lambda: (
            _torch_of_transformers("BertModel", add_pooling_layer=False, **_BERT, **_TEXT),
            _flax_of_transformers("FlaxDistilBertModel", **_DISTIL, **_TEXT),
        ),
        _distilbert_of,
    ),
    NamedPair(
        "OPT, XGLM in Flax",
        lambda: (
            _torch_of_transformers("OPTModel", **_OPT, **_TEXT, ffn_dim=48),
            _flax_of_transformers("FlaxXGLMModel", **_XGLM, **_TEXT, ffn_dim=48),
        ),
        _xglm_of,
    ),
    NamedPair(
        "ViT, CLIP's vision in Flax",
        lambda: (
            _torch_of_transformers("ViTModel", add_pooling_layer=False, **_BERT, **_IMAGE),
            _flax_of_transformers("FlaxCLIPVisionModel", **_BERT, **_IMAGE),
        ),
        _clip_of,
    ),
)
