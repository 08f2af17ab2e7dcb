"""A kernel that fits in two layouts is asked about, and the answer of the message works."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner

import compare
from compare import cli
from compare.conversion.errors import ConversionError
from compare.conversion.undecided import patterns


def zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


def answers(message: str) -> dict[str, str]:
    """Return the layouts that the message gives, put together."""
    return {
        pattern: layout
        for found in re.findall(r"layouts=(\{[^}]*\})", message)
        for pattern, layout in json.loads(found).items()
    }


# A file of GPT-2 of two blocks: transformers' Conv1D stores (in, out), the head is an nn.Linear.
SHAPES = {"attn.c_attn": (4, 12), "attn.c_proj": (4, 4), "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}
GPT2 = {
    f"h.{block}.{name}.weight": torch.randn(shape)
    for block in range(2)
    for name, shape in SHAPES.items()
}
TREE: dict[str, Any] = {}
for block in range(2):
    for name, shape in SHAPES.items():
        part, leaf = name.split(".")
        TREE.setdefault(f"h_{block}", {}).setdefault(part, {})[leaf] = {"kernel": shape}
RENAME = {"h.*": "h_*"}


def test_the_answer_of_the_message_is_the_right_one() -> None:
    template = zeros({"params": TREE})
    with pytest.raises(ConversionError) as caught:
        compare.match(GPT2, template, rename=RENAME)
    message = str(caught.value)
    assert (
        "h.0.attn.c_proj.weight: a state dict does not say how this kernel is laid out" in message
    )
    assert ', nor 1 more; h.0.attn.c_attn.weight and 5 more fit only as "same": pass' in message
    assert message.count("\n! ") == 1, "one line for all of them"
    assert answers(message) == {"h.*.attn.c_proj.weight": "same"}
    mapping = compare.match(GPT2, template, rename=RENAME, layouts=answers(message))
    variables = compare.torch_to_linen(GPT2, template, mapping=mapping)
    for key, tensor in GPT2.items():
        place = mapping.by_key[key][0].path
        array: Any = variables
        for step in place:
            array = array[step]
        assert np.array_equal(array, tensor)


def test_mixed_evidence_is_said_and_nothing_is_concluded() -> None:
    state = GPT2 | {"head.weight": torch.randn(7, 4)}
    template = zeros({"params": TREE | {"head": {"kernel": (4, 7)}}})
    with pytest.raises(ConversionError, match=r'head.weight fits only as "transposed"') as caught:
        compare.match(state, template, rename=RENAME)
    assert '"same" if they are (in, out)' in str(caught.value)


@pytest.mark.parametrize(
    ("torch_shape", "flax_shape", "choices"),
    [
        ((4, 4), (4, 4), {"transposed", "same"}),
        ((4, 4, 3), (3, 4, 4), {"conv", "conv_transpose"}),
        ((4, 4, 3, 3), (3, 3, 4, 4), {"conv", "conv_transpose"}),
    ],
)
def test_what_fits_twice_is_asked_about(
    torch_shape: tuple[int, ...], flax_shape: tuple[int, ...], choices: set[str]
) -> None:
    state, template = {"fc.weight": torch.randn(torch_shape)}, {"fc": {"kernel": flax_shape}}
    with pytest.raises(ConversionError, match="a state dict does not say") as caught:
        compare.torch_to_linen(state, zeros({"params": template}))
    assert all(f'"{layout}"' in str(caught.value) for layout in choices)
    arrays = {
        layout: compare.torch_to_linen(
            state, zeros({"params": template}), layouts={"fc.weight": layout}
        )["params"]["fc"]["kernel"]
        for layout in choices
    }
    one, other = arrays.values()
    assert one.shape == other.shape == flax_shape
    assert not np.array_equal(one, other)


def test_square_attention_is_asked_about() -> None:
    state = {"attn.query.weight": torch.randn(4, 4)}
    template = zeros({"params": {"attn": {"query": {"kernel": (4, 2, 2)}}}})
    with pytest.raises(ConversionError, match="does not say") as caught:
        compare.match(state, template)
    mapping = compare.match(state, template, layouts=answers(str(caught.value)))
    assert mapping.rows[0].layout == "heads_in"


def test_a_layer_of_flax_says_what_a_convolution_is() -> None:
    model = nnx.Conv(3, 3, (2,), use_bias=False, rngs=nnx.Rngs(0))
    weight = torch.randn(3, 3, 2)
    compare.torch_to_nnx({"weight": weight}, model)
    assert np.array_equal(model.kernel[...], weight.permute(2, 1, 0))


def test_one_by_one_fits_once() -> None:
    state, template = {"fc.weight": torch.ones(1, 1)}, zeros({"params": {"fc": {"kernel": (1, 1)}}})
    assert compare.match(state, template).rows[0].layout == "transposed"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_a_module_says_of_which_layers_it_is(suffix: str, tmp_path: Path) -> None:
    linear = torch.nn.Linear(4, 4)
    conv = torch.nn.Conv1d(4, 4, 3, padding=1)

    class Model(nnx.Module):
        def __init__(self, padding: Any) -> None:
            self.lin = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.conv = nnx.Conv(4, 4, (3,), padding=padding, rngs=nnx.Rngs(0))

    module = torch.nn.ModuleDict({"lin": linear, "conv": conv})
    path = compare.save_checkpoint(tmp_path / f"module{suffix}", module)
    model = compare.load_checkpoint(path, Model(1))
    assert np.array_equal(model.lin.kernel[...], linear.weight.detach().T)
    with pytest.raises(compare.CheckpointError, match=r"conv.padding: computes something else"):
        compare.load_checkpoint(path, Model("VALID"))
    compare.load_checkpoint(path, Model("VALID"), policy={"conv.padding": "ignore"})
    again = compare.convert_checkpoint(path, tmp_path / f"again{suffix}")
    assert again.checked
    compare.load_checkpoint(tmp_path / f"again{suffix}", Model(1))
    bare = compare.save_checkpoint(tmp_path / f"bare{suffix}", module.state_dict())
    with pytest.raises(compare.CheckpointError, match="a state dict does not say") as caught:
        compare.load_checkpoint(bare, Model(1))
    layouts = answers(str(caught.value))
    assert layouts == {"lin.weight": "transposed"}
    loaded = compare.load_checkpoint(bare, Model(1), layouts=layouts)
    assert np.array_equal(loaded.lin.kernel[...], linear.weight.detach().T)


def test_layouts_without_effect_are_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 3)
    path = compare.save_checkpoint(tmp_path / "state.pth", module)
    with pytest.raises(compare.CheckpointError, match="layouts has no effect"):
        compare.load_checkpoint(path, module, layouts={"weight": "same"})
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    mapping = compare.match(module, model)
    with pytest.raises(ValueError, match="layouts has no effect beside mapping"):
        compare.torch_to_nnx(module, model, mapping=mapping, layouts={"weight": "same"})


def test_transformers_conv1d_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the name and module of the real one, which is not installed here."""

    class Conv1D(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4))

    Conv1D.__module__ = "transformers.pytorch_utils"
    module = torch.nn.ModuleDict({"fc": Conv1D()})
    mapping = compare.match(module, zeros({"params": {"fc": {"kernel": (4, 4)}}}))
    assert mapping.rows[0].layout == "same"


def test_conv1d_beside_kernels_that_lie_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlaxConv1D of transformers stores (out, in); a square kernel does not show it."""

    class Conv1D(torch.nn.Module):
        def __init__(self, outer: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, outer))

    Conv1D.__module__ = "transformers.pytorch_utils"
    module = torch.nn.ModuleDict({"c_attn": Conv1D(12), "c_proj": Conv1D(4)})
    shapes = {"c_attn": {"kernel": (12, 4)}, "c_proj": {"kernel": (4, 4)}}
    template = zeros({"params": shapes})
    with pytest.raises(compare.ConversionError, match="as those of transformers' FlaxConv1D") as e:
        compare.match(module, template)
    (asked,) = e.value.mismatch.refused
    argument = json.loads(asked.mend.split("layouts=")[1].split(" (convert")[0])
    assert argument == {"c_attn.weight": "i o -> o i", "c_proj.weight": "i o -> o i"}
    variables = compare.torch_to_linen(
        module, template, mapping=compare.match(module, template, layouts=argument)
    )
    for name in shapes:
        kernel = np.asarray(variables["params"][name]["kernel"])
        assert np.array_equal(kernel, module.state_dict()[f"{name}.weight"].numpy().T)
    with pytest.raises(compare.ConversionError, match="c_proj"):  # one alone leaves the other open
        compare.match(module, template, layouts={"c_attn.weight": "transposed"})
    known = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    assert compare.match(module["c_proj"], known).rows[0].layout == "same"


def test_patterns_fit_these_names_alone() -> None:
    names = [f"h.{block}.attn.proj.weight" for block in range(12)]
    assert patterns(names, names) == ["*.attn.proj.weight".replace("attn.", "")]
    others = ["h.0.mlp.proj.weight"]
    assert patterns(names, [*names, *others]) == ["h.*.attn.proj.weight"]
    some = names[:2]
    assert patterns(some, names) == some
    assert patterns(["a[0].weight"], ["a[0].weight"]) == ["a[[]0].weight"]


@pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
def test_the_answer_on_the_command_line(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"fc.weight": weight}, tmp_path / "a.pth")
    like = {"params": {"fc": {"kernel": jnp.zeros((4, 4))}}}
    compare.save_checkpoint(tmp_path / "like.msgpack", like)
    names = [str(tmp_path / name) for name in ("a.pth", "b.msgpack")]
    like_it = ["--like", str(tmp_path / "like.msgpack")]

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, list(arguments))
        return done.exit_code, " ".join(done.output.replace("│", " ").split())

    code, printed = run("convert", *names, *like_it)
    assert code == 1
    assert "--layout-of NAME=LAYOUT" in printed
    assert not Path(names[1]).exists()
    (answer,) = answers(printed).items()
    code, printed = run("convert", *names, *like_it, "--layout-of", "=".join(answer))
    assert code == 0, printed
    loaded = compare.load_checkpoint(names[1], like)
    assert np.array_equal(loaded["params"]["fc"]["kernel"], weight.T)
    code, printed = run("verify", *names)
    assert code == 1
    assert "--layout-of" in printed
    assert run("verify", *names, "--layout-of", "fc.weight=transposed")[0] == 0
    assert run("verify", *names, "--layout-of", "fc.weight=same")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "a.pth", "b.msgpack", "--layout-of", "x=same"], "without like"),
        (["verify", "a.pth", "a.pth", "--layout-of", "x=same"], "layouts has no effect"),
        (["verify", "a.pth", "a.pth", "--layout-of", "same"], "say NAME=LAYOUT"),
        (["verify", "a.pth", "a.pth", "--layout-of", "x=turned"], "there is no layout 'turned'"),
    ],
)
def test_what_the_command_line_refuses(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compare.save_checkpoint("a.pth", torch.nn.Linear(2, 2))
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())


def test_a_kernel_of_one_axis_has_one_layout() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(3))

    target = {"params": {"o": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    mapping = compare.match(torch.nn.ModuleDict({"o": Own()}), target)
    assert [row.layout for row in mapping.rows] == ["same"]
