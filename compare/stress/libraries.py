"""Models that others wrote in both frameworks: what is converted, and which names are proposed.

transformers 4.57, the last version with classes in Flax, has a converter of its own, which gives
the right leaves. jax-resnet, flaxmodels and transformers' Flax classes name the modules of models
that torchvision and transformers have in torch in their own ways.
"""

import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from ..conversion.convert import torch_to_linen
from ..conversion.errors import ConversionError
from ..conversion.groups import rules_of
from ..conversion.match import match
from ..conversion.proposal import suggest
from ..conversion.renamed import renamed
from ..report.model import Block, Cell, Check, Section, Table
from .library_names import PAIRS, NamedPair, variables_of

_AUTO = "transformers.models.auto.modeling_flax_auto"
# These combine two models of the others.
_COMBINED = ("encoder-decoder", "vision-text-dual-encoder")
# Sizes by the names that configurations give them, so that all classes are built in two minutes.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "image_size"), 32),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), 99),
    **dict.fromkeys(("patch_size", "d_kv", "head_dim", "groups_width"), 8),
    **{"num_key_value_heads": 2, "rotary_dim": 4, "num_mel_bins": 16, "word_embed_proj_dim": 32},
    **{"hidden_sizes": [16, 32], "depths": [2, 1], "num_feat_extract_layers": 2},
    **{"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3)},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"relative_attention_num_buckets": 8, "block_size": 4, "num_random_blocks": 1},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    **{"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
}
# What compare.match must be told, by architecture. Each is what its error says.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "gpt2": {"layouts": {"*.c_*.weight": "i o -> o i"}},
    "big_bird": {"policy": {"bert.pooler.*": "ignore"}},
    **{
        name: {"policy": {"*embed_positions.weight": "verify"}}
        for name in ("marian", "pegasus", "roformer")
    },
}
_CLIP = jnp.clip
_BIAS = {"final_logits_bias.kind": "ignore"}  # of zeros: a buffer in torch, trained in Flax


class Head(NamedTuple):
    """What became of one class of transformers.

    Attributes:
        architecture: the name of its configuration.
        leaves: the number of its leaves.
        arguments: what compare.match was told.
        outcome: `same`, or what is not.
    """

    architecture: str
    leaves: int
    arguments: Mapping[str, Any]
    outcome: str


def sections() -> Iterator[Section | str]:
    """Yield progress messages, a section of transformers' heads, and one of proposed names."""
    heads = []
    for name, architecture in _classes():
        yield f"libraries: {name}"
        heads.append((name, _converted(name, architecture)))
    yield _heads_section(heads)
    found = []
    for pair in PAIRS:
        yield f"libraries: {pair.name}"
        found.append(_proposed(pair))
    yield _names_section(found)


def _classes() -> list[tuple[str, str]]:
    """Return the Flax classes of transformers with their architectures, in order."""
    auto = import_module(_AUTO)
    found: dict[str, str] = {}
    for name, models in vars(auto).items():
        if name.startswith("FLAX_") and name.endswith("MAPPING_NAMES"):
            for architecture, model in models.items():
                one = model if isinstance(model, str) else model[0]
                found.setdefault(one, architecture.replace("gpt-sw3", "gpt2"))
    known = {name: kind for name, kind in found.items() if not kind.endswith(_COMBINED)}
    return sorted(known.items(), key=lambda item: (item[1], item[0]))


def _configuration(architecture: str) -> Any:
    transformers = import_module("transformers")
    config = transformers.CONFIG_MAPPING[architecture]()
    for part in (config, *(getattr(config, f"{name}_config", None) for name in ("text", "vision"))):
        for name, value in _SMALL.items():
            is_own = hasattr(part, name) and not isinstance(
                getattr(type(part), name, None), property
            )
            if is_own:
                setattr(part, name, value)
    if architecture in ("resnet", "regnet", "albert"):
        config.embedding_size = 16
    if architecture in ("resnet", "regnet"):
        config.stage_names = ["stem", "stage1", "stage2"]
    return config


def _converted(name: str, architecture: str) -> Head:
    """Convert one class with drawn weights, and compare with transformers' own converter."""
    transformers = import_module("transformers")
    loader = import_module("transformers.modeling_flax_pytorch_utils")
    arguments: dict[str, Any] = {
        key: dict(value) for key, value in _ARGUMENTS.get(architecture, {}).items()
    }
    try:
        config = _configuration(architecture)
        source = getattr(transformers, name.removeprefix("Flax"))(config).eval()
        _draw(source)
        with patch.object(jnp, "clip", _clip):
            model = getattr(transformers, name)(config)
    except Exception as error:  # of transformers itself, with this version of JAX or torch
        return Head(architecture, 0, {}, f"cannot be built: {type(error).__name__}")
    if "final_logits_bias" in source.state_dict():
        arguments["policy"] = {**arguments.get("policy", {}), **_BIAS}
    variables = variables_of(model)
    expected = loader.convert_pytorch_state_dict_to_flax(source.state_dict(), model)
    wanted = flatten_dict(expected if "params" in expected else {"params": expected})
    try:
        try:
            mapping = match(source, variables)
        except ConversionError:
            if not arguments:
                raise
            mapping = match(source, variables, **arguments)
        else:
            arguments = {}
        found = flatten_dict(torch_to_linen(source, variables, mapping=mapping))
    except ConversionError as error:
        return Head(architecture, len(wanted), arguments, f"refused: {str(error)[:200]}")
    differing = [
        "/".join(path)
        for path in found
        if path not in wanted or np.asarray(found[path]).tobytes() != wanted[path].tobytes()
    ]
    outcome = f"{differing[0]} and {len(differing) - 1} more differ" if differing else "same"
    return Head(architecture, len(found), arguments, outcome)


def _clip(array: Any, *limits: Any, a_min: Any = None, a_max: Any = None) -> Any:
    """Take the keywords that T5 passes, which JAX 0.10 no longer has."""
    return _CLIP(array, *(limits or (a_min, a_max)))


def _draw(source: torch.nn.Module) -> None:
    """Draw what is trained, and running statistics; tables that are computed stay."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        for name, buffer in source.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)


def _heads_section(heads: list[tuple[str, Head]]) -> Section:
    rows: list[list[Cell]] = []
    for architecture in dict.fromkeys(head.architecture for _, head in heads):
        own = [head for _, head in heads if head.architecture == architecture]
        arguments = max((head.arguments for head in own), key=lambda each: len(str(each)))
        built = [head for head in own if not head.outcome.startswith("cannot be built")]
        same = sum(head.outcome == "same" for head in built)
        leaves = sum(head.leaves for head in built)
        told = ", ".join(f"{name}={value}" for name, value in arguments.items())
        rows.append([architecture, len(own), len(built), same, f"{leaves:,}", told])
    bad = [
        f"{name}: {head.outcome}"
        for name, head in heads
        if head.outcome != "same" and not head.outcome.startswith("cannot be built")
    ]
    unbuilt = [name for name, head in heads if head.outcome.startswith("cannot be built")]
    packages = "transformers", "torchvision", "jax-resnet", "flaxmodels"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    blocks: list[Block] = [
        f"{versions}. "
        "Classes of transformers in both frameworks, small, with drawn weights. Same: the leaves "
        "are those of transformers' own converter, bit for bit.",
        Table(["architecture", "classes", "built", "same", "leaves", "told"], rows),
        *bad,
        f"Not built with these versions: {', '.join(unbuilt)}." if unbuilt else "All built.",
    ]
    section = Section("Classes of transformers", blocks)
    count = len(heads) - len(unbuilt)
    measured = f"{count - len(bad)} of {count} classes"
    section.checks.append(Check("the loader's leaves", "all", not bad, measured, "every class"))
    return section


class _Names(NamedTuple):
    pair: NamedPair
    modules: int
    right: int
    rules: int
    in_order: int
    left_open: tuple[int, int]


def _proposed(pair: NamedPair) -> _Names:
    """Ask for names, and compare each module's with the true one."""
    source, variables = pair.models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proposal = suggest(source, variables)
    modules = dict.fromkeys(
        key.rpartition(".")[0] for key in source.state_dict() if not key.endswith("tracked")
    )
    names, _ = renamed(modules, rules_of(proposal.rename), "")
    true = {module: pair.true_name(module) for module in modules}
    judged = [module for module in modules if true[module] is not None]
    right = sum(names[module] == true[module] for module in judged)
    left = len(proposal.open_torch), len(proposal.open_flax)
    return _Names(pair, len(judged), right, len(proposal.rename), len(proposal.in_order), left)


def _names_section(found: list[_Names]) -> Section:
    rows: list[list[Cell]] = [
        [one.pair.name, one.modules, one.right, one.rules, one.in_order, *one.left_open]
        for one in found
    ]
    columns = ["models", "modules", "right", "rules", "by order", "open in torch", "open in Flax"]
    modules, right = sum(one.modules for one in found), sum(one.right for one in found)
    section = Section(
        "Names that differ",
        [
            "What compare.suggest proposes for the modules of a torch model in a Flax model of "
            "another library. By order: modules that only their order tells apart.",
            Table(columns, rows),
        ],
    )
    measured = f"{right:,} of {modules:,} modules"
    section.checks.append(Check("right names", "all", right == modules, measured, "every module"))
    return section
