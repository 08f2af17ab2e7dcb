"""Names that differ are proposed by structure, and only proposed."""

import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import linen as nn
from flax import nnx
from typer.testing import CliRunner

import compare
from compare import cli

T = torch.nn


class Block(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        normed = nn.LayerNorm(name="ln_before")(inputs)
        query, key, value = (nn.Dense(8, name=name)(normed) for name in ("wq", "wk", "wv"))
        inputs = inputs + nn.Dense(8, name="attn_out")(query * key + value)
        wide = nn.Dense(32)(nn.LayerNorm(name="ln_after")(inputs))
        return inputs + nn.Dense(8)(nn.relu(wide))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        inputs = nn.Embed(11, 8, name="tok")(tokens)
        inputs += nn.Embed(12, 8, name="pos")(jnp.arange(tokens.shape[-1]))
        for index in range(3):
            inputs = Block(name=f"layers_{index}")(inputs)
        return nn.Dense(11, use_bias=False)(nn.LayerNorm()(inputs))


def torch_block() -> T.Module:
    attention = {f"{name}_proj": T.Linear(8, 8) for name in "vkqo"}
    return T.ModuleDict(
        {
            "norm1": T.LayerNorm(8),
            "attn": T.ModuleDict(attention),
            "norm2": T.LayerNorm(8),
            "mlp": T.Sequential(T.Linear(8, 32), T.ReLU(), T.Linear(32, 8)),
        }
    )


def decoders() -> tuple[T.Module, Any]:
    source = T.ModuleDict(
        {
            "wte": T.Embedding(11, 8),
            "wpe": T.Embedding(12, 8),
            "h": T.ModuleList([torch_block() for _ in range(3)]),
            "ln_f": T.LayerNorm(8),
            "lm_head": T.Linear(8, 11, bias=False),
        }
    )
    tokens = jnp.zeros(6, jnp.int32)
    return source, jax.eval_shape(Decoder().init, jax.random.key(0), tokens)


RULES = {
    "wte": "tok",
    "wpe": "pos",
    "h.*.norm1": "layers_*.ln_before",
    "h.*.norm2": "layers_*.ln_after",
    "h.*.attn.q_proj": "layers_*.wq",
    "h.*.attn.k_proj": "layers_*.wk",
    "h.*.attn.v_proj": "layers_*.wv",
    "h.*.attn.o_proj": "layers_*.attn_out",
    "h.*.mlp.0": "layers_*.Dense_0",
    "h.*.mlp.2": "layers_*.Dense_1",
    "ln_f": "LayerNorm_0",
    "lm_head": "Dense_0",
}


def test_a_decoder_under_other_names() -> None:
    source, template = decoders()
    proposal = compare.suggest(source, template)
    assert proposal == compare.Proposal(RULES, (), (), ())
    assert compare.suggest(source.state_dict(), template).rename == RULES
    wrapped = {f"model.{key}": tensor for key, tensor in source.state_dict().items()}
    assert compare.suggest(wrapped, template, prefix="model.").rename == RULES
    pasted = json.loads(str(proposal).removeprefix("rename="))
    mapping = compare.match(source, template, rename=pasted)
    assert len(mapping.rows) == len(source.state_dict())


def test_it_is_never_applied_unasked() -> None:
    source, template = decoders()
    with pytest.raises(compare.ConversionError, match=r"compare\.suggest\(source, template\)"):
        compare.match(source, template)


def test_what_only_the_order_tells_apart_is_named() -> None:
    source = T.ModuleDict({"b": T.Linear(4, 4), "a": T.Linear(4, 4), "z": T.Linear(4, 5)})
    names = {"Dense_10": 4, "Dense_9": 4, "Dense_11": 5}
    template = {
        "params": {
            name: {"kernel": jnp.zeros((4, size)), "bias": jnp.zeros(size)}
            for name, size in names.items()
        }
    }
    proposal = compare.suggest(source, template)
    assert proposal.rename == {"b": "Dense_9", "a": "Dense_10", "z": "Dense_11"}
    assert proposal.in_order == ("b", "a")
    assert "only their order tells these apart; look at them: b, a" in str(proposal)


def test_what_has_no_counterpart_stays_open() -> None:
    source = T.ModuleDict({"fc": T.Linear(3, 4), "extra": T.Linear(5, 6)})
    template = {
        "params": {
            "dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
            "norm": {"scale": jnp.zeros(6)},
        }
    }
    proposal = compare.suggest(source, template)
    assert proposal.rename == {"fc": "dense"}
    assert proposal.open_torch == ("extra.weight", "extra.bias")
    assert proposal.open_flax == ("params/norm/scale",)
    assert str(proposal).endswith(
        "open in torch: extra.weight, extra.bias\nopen in Flax: params/norm/scale"
    )


def test_attention_cells_and_parameters_of_ones_own() -> None:
    class Own(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = T.Parameter(torch.zeros(1, 1, 6))
            self.attn = T.MultiheadAttention(6, 2)
            self.rnn = T.LSTM(6, 6)
            self.norm = T.Module()
            self.norm.gamma, self.norm.beta = T.Parameter(torch.ones(7)), T.Parameter(torch.ones(7))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.cls = nnx.Param(jnp.zeros((1, 1, 6)))
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.cell = nnx.OptimizedLSTMCell(6, 6, rngs=rngs)
            self.ln = nnx.LayerNorm(7, rngs=rngs)

    source = Own()
    proposal = compare.suggest(source.state_dict(), Model(nnx.Rngs(0)))
    assert proposal.rename == {
        "attn": "attention",
        "rnn": "cell",
        "cls_token": "cls",
        "norm.gamma": "ln.scale",
        "norm.beta": "ln.bias",
    }
    assert (proposal.open_torch, proposal.open_flax) == ((), ())


def test_stages_that_one_side_numbers_through() -> None:
    """As torchvision's ResNet and one in Linen; the numbers of no step are the same."""
    source = T.ModuleDict(
        {
            f"layer{stage}": T.ModuleList(
                [
                    T.ModuleDict({"conv1": T.Conv2d(4, 4, 3), "bn1": T.BatchNorm2d(4)})
                    for _ in range(blocks)
                ]
            )
            for stage, blocks in ((1, 2), (2, 3))
        }
    )
    norm = {name: jnp.zeros(4) for name in ("scale", "bias")}
    template = {
        "params": {
            f"Block_{index}": {
                "Conv_0": {"kernel": jnp.zeros((3, 3, 4, 4)), "bias": jnp.zeros(4)},
                "BatchNorm_0": norm,
            }
            for index in range(5)
        },
        "batch_stats": {
            f"Block_{index}": {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.zeros(4)}}
            for index in range(5)
        },
    }
    proposal = compare.suggest(source, template)
    assert (proposal.open_torch, proposal.open_flax) == ((), ())
    mapping = compare.match(source, template, rename=proposal.rename)
    for row in mapping.rows:
        stage, block = map(int, re.findall(r"\d+", row.torch_key)[:2])
        assert f"Block_{2 * (stage - 1) + block}/" in row.place


def test_a_thousand_modules_take_little_time() -> None:
    sizes = [(3 + index % 50, 4) for index in range(1200)]
    source = {f"block.{i}.fc.weight": torch.zeros(o, n) for i, (n, o) in enumerate(sizes)}
    template = {
        "params": {f"b_{i}": {"up": {"kernel": jnp.zeros(size)}} for i, size in enumerate(sizes)}
    }
    start = time.monotonic()
    proposal = compare.suggest(source, template)
    assert time.monotonic() - start < 10.0
    assert proposal.rename == {"block.*.fc": "b_*.up"}


def test_the_command_prints_an_option_to_paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = decoders()
    variables = Decoder().init(jax.random.key(0), jnp.zeros(6, jnp.int32))
    compare.save_checkpoint(tmp_path / "a.pth", source)
    compare.save_checkpoint(tmp_path / "b.msgpack", variables)
    monkeypatch.chdir(tmp_path)
    failed = CliRunner().invoke(cli.app, ["match", "a.pth", "b.msgpack"])
    assert failed.exit_code == 1
    printed = " ".join(failed.output.replace("│", " ").split())
    (rename,) = re.findall(r"Proposed, to look at: --rename '([^']+)'", printed)
    assert json.loads(rename) == RULES
    done = CliRunner().invoke(cli.app, ["match", "a.pth", "b.msgpack", "--rename", rename])
    assert done.exit_code == 0, done.output


DENSE = {"params": {"b": {"kernel": jnp.zeros((2, 3))}}}


@pytest.mark.parametrize(
    ("source", "template", "rules"),
    [
        ({}, DENSE, {}),
        ({1: torch.zeros(3, 2)}, DENSE, {}),
        ({"a*b.weight": torch.zeros(3, 2)}, DENSE, {}),
        ({"a[0].weight": torch.zeros(3, 2)}, DENSE, {"a[0]": "b"}),
        (T.Linear(2, 3, bias=False), DENSE, {"weight": "b.kernel"}),
        (T.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {}),
        (T.ModuleDict({"a": T.Linear(2, 3)}), nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"a": ""}),
    ],
)
def test_names_at_the_edge(source: Any, template: Any, rules: dict[str, str]) -> None:
    proposal = compare.suggest(source, template)
    assert proposal.rename == rules
    if not proposal.open_torch and not proposal.open_flax:
        layouts = {} if isinstance(source, T.Module) else {"*": "transposed"}
        assert compare.match(source, template, rename=rules, layouts=layouts).rows


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (5, {}, "source is an int; expected a torch module or its state dict"),
        (T.Linear, {}, "source is the class Linear; give an instance"),
        ({}, {"prefix": 3}, "prefix is 3; expected text"),
    ],
)
def test_what_is_no_model(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        compare.suggest(source, DENSE, **options)


def test_a_prefix_that_no_name_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no torch name has the prefix .model\..: leave it"):
        compare.suggest({"fc.weight": torch.zeros(6, 4)}, DENSE, prefix="model.")


def test_a_layer_called_attn_is_no_old_mask() -> None:
    source = T.ModuleDict({"attn": T.Linear(4, 6)})
    template = {"params": {"mha": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}}}
    assert compare.suggest(source, template) == compare.Proposal({"attn": "mha"}, (), (), ())
