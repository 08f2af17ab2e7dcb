"""What two layers say differently is found exactly where they compute something else."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import compare
from compare import ConversionError
from compare.conversion.stated import Difference, differences

RNGS = nnx.Rngs(0)


def stated(torch_layer: torch.nn.Module, flax_layer: Any) -> dict[str, Difference]:
    return {found.fact: found for found in differences(torch_layer, flax_layer)}


def pick(random: np.random.Generator, *choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def outputs(module: torch.nn.Module, model: Any, size: int, rank: int) -> tuple[Any, Any]:
    """What both give for one drawn input of this size, channels last; a message if one raises."""
    drawn = np.random.default_rng(size).standard_normal((2, *[size] * rank, 2))
    try:
        found = module(torch.from_numpy(drawn).movedim(-1, 1)).movedim(1, -1).detach().numpy()
    except RuntimeError:  # torch reflects at most size - 1 values, and wraps at most size
        return None, None
    return found, np.asarray(model(jnp.asarray(drawn)))


def is_same(module: torch.nn.Module, model: Any, rank: int) -> bool:
    """Whether both give the same for inputs of many sizes, up to the rounding of float64."""
    for size in range(7, 13):
        found, expected = outputs(module, model, size, rank)
        if found is None:
            continue
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=1e-12):
            return False
    return True


def filled(module: torch.nn.Module, model: Any) -> None:
    """Give the NNX model the weights of the torch module, whatever else both say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        template = nnx.state(model)
        layouts = {"weight": "conv_transpose"} if isinstance(model, nnx.ConvTranspose) else {}
        mapping = compare.match(module, template, layouts=layouts)
        compare.torch_to_nnx(module, model, mapping=mapping)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.again), 2])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_convolutions(seed: int, rank: int) -> None:
    random = np.random.default_rng([seed, rank])
    window = tuple(map(int, random.integers(1, 4, rank)))
    stride, dilation = (tuple(map(int, random.integers(1, 3, rank))) for _ in range(2))
    mode = pick(random, "zeros", "zeros", "circular", "reflect", "replicate")
    same = tuple(step * (size - 1) // 2 for step, size in zip(dilation, window, strict=True))
    padding = pick(random, same, same, 0, 1, *(["same"] if max(stride) == 1 else []))
    kind: Any = torch.nn.Conv1d if rank == 1 else torch.nn.Conv2d
    groups = pick(random, 1, 2)
    module = kind(
        2, 4, window, stride, padding, dilation, groups, padding_mode=mode, dtype=torch.float64
    )
    pads = [(pad, pad) for pad in same]
    model = nnx.Conv(
        2,
        4,
        window,
        strides=pick(random, stride, stride, 1),
        padding=pick(random, pads, "SAME", "VALID", 1, "CIRCULAR", "REFLECT"),
        kernel_dilation=pick(random, dilation, dilation, 1),
        feature_group_count=groups,
        param_dtype=jnp.float64,
        rngs=RNGS,
    )
    filled(module, model)
    assert (not stated(module, model)) == is_same(module, model, rank)


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", [(0, 1)], [(1, 0)], "CIRCULAR"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch copies
def test_even_windows_have_more_on_one_side(mode: Any, padding: Any) -> None:
    module = torch.nn.Conv1d(2, 4, 2, padding="same", padding_mode=mode, dtype=torch.float64)
    model = nnx.Conv(2, 4, (2,), padding=padding, param_dtype=jnp.float64, rngs=RNGS)
    filled(module, model)
    expected = {"zeros": ("SAME", [(0, 1)]), "circular": ("CIRCULAR",)}[mode]
    assert (not stated(module, model)) == is_same(module, model, 1) == (padding in expected)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_transposed_convolutions(seed: int) -> None:
    random = np.random.default_rng(seed)
    window, stride, dilation = (int(random.integers(1, top)) for top in (5, 4, 3))
    padding = int(random.integers(0, dilation * (window - 1) // 2 + 1))
    more = int(random.integers(0, max(stride, dilation)))
    module = torch.nn.ConvTranspose1d(
        2, 2, window, stride, padding, more, dilation=dilation, dtype=torch.float64
    )
    far = dilation * (window - 1)
    model = nnx.ConvTranspose(
        2,
        2,
        (window,),
        strides=stride,
        padding=pick(random, [(far - padding, far - padding + more)], "SAME", "VALID", "CIRCULAR"),
        kernel_dilation=(dilation,),
        param_dtype=jnp.float64,
        rngs=RNGS,
    )
    filled(module, model)
    assert (not stated(module, model)) == is_same(module, model, 1)


@pytest.mark.parametrize(
    ("module", "model", "facts"),
    [
        (torch.nn.LayerNorm(4), nnx.LayerNorm(4, rngs=RNGS), {"eps"}),
        (torch.nn.LayerNorm(4), nnx.LayerNorm(4, epsilon=1e-5, rngs=RNGS), set()),
        (
            torch.nn.LayerNorm((2, 4)),
            nnx.LayerNorm(4, epsilon=1e-5, rngs=RNGS),
            {"normalized_shape"},
        ),
        (torch.nn.LayerNorm(4, bias=False), nnx.RMSNorm(4, epsilon=1e-5, rngs=RNGS), {"type"}),
        (torch.nn.RMSNorm(4), nnx.RMSNorm(4, epsilon=2.0**-23, rngs=RNGS), set()),
        (torch.nn.RMSNorm(4), nnx.RMSNorm(4, rngs=RNGS), {"eps"}),
        (torch.nn.GroupNorm(2, 4), nnx.GroupNorm(4, 4, epsilon=1e-5, rngs=RNGS), {"num_groups"}),
        (torch.nn.BatchNorm1d(4), nnx.BatchNorm(4, rngs=RNGS), {"momentum"}),
        (torch.nn.BatchNorm1d(4), nnx.BatchNorm(4, momentum=0.9, rngs=RNGS), set()),
        (torch.nn.BatchNorm1d(4, momentum=None), nnx.BatchNorm(4, rngs=RNGS), {"momentum"}),
        (torch.nn.Dropout(0.1), nnx.Dropout(0.2), {"p"}),
        (torch.nn.Dropout(0.1), nnx.Dropout(0.1), set()),
        (torch.nn.Dropout(0.1), nn.Dropout(0.2), {"p"}),
        (torch.nn.GELU(), nnx.gelu, {"approximate"}),
        (torch.nn.GELU("tanh"), nnx.gelu, set()),
        (torch.nn.ReLU(), nnx.tanh, {"type"}),
        (torch.nn.SiLU(), nnx.swish, set()),
        (torch.nn.Hardswish(), nnx.hard_silu, set()),
        (torch.nn.ELU(), nnx.relu, {"type"}),
        (torch.nn.Softplus(2.0), nnx.softplus, {"beta"}),
        (torch.nn.Softplus(), nnx.softplus, set()),
        (torch.nn.ReLU(), lambda inputs: inputs, {"type"}),
        (torch.nn.ReLU(), lambda inputs: (inputs + abs(inputs)) / 2, set()),
        (torch.nn.ReLU(), lambda inputs, more: inputs, set()),
        (torch.nn.Identity(), nnx.relu, {"type"}),
        (torch.nn.Identity(), nnx.Linear(4, 4, rngs=RNGS), set()),
        (torch.nn.Hardtanh(-2, 2), nnx.hard_tanh, {"type"}),
        (torch.nn.Hardtanh(inplace=True), nnx.hard_tanh, set()),
        (torch.nn.Softshrink(), nnx.relu, {"type"}),
        (torch.nn.RReLU(0.2, 0.2), partial(nnx.leaky_relu, negative_slope=0.2), set()),
        (torch.nn.Threshold(0.0, 0.0), nnx.relu, set()),
        (torch.nn.Softmin(-1), nnx.softmax, {"type"}),
        (torch.nn.Softmax(-1), nnx.softmax, set()),
        (torch.nn.GELU(), partial(nnx.gelu, approximate=False), set()),
        (torch.nn.LeakyReLU(), nnx.leaky_relu, set()),
        (torch.nn.LeakyReLU(0.2), nnx.leaky_relu, {"negative_slope"}),
        (torch.nn.ELU(2.0), partial(nnx.elu, alpha=2.0), set()),
        (torch.nn.ReLU(), nnx.relu, set()),
        (torch.nn.Linear(4, 4), nnx.Linear(4, 4, rngs=RNGS), set()),
        (
            torch.nn.MultiheadAttention(4, 2, dropout=0.1),
            nnx.MultiHeadAttention(1, 4, decode=False, rngs=RNGS),
            {"num_heads", "dropout"},
        ),
        (
            torch.nn.Conv1d(2, 2, 1),
            nnx.Conv(2, 2, (1,), input_dilation=2, rngs=RNGS),
            {"input_dilation"},
        ),
        (
            torch.nn.Conv1d(2, 2, 1),
            nnx.Conv(2, 2, (1,), mask=jnp.ones((1, 2, 2)), rngs=RNGS),
            {"mask"},
        ),
    ],
)
def test_other_layers(module: torch.nn.Module, model: Any, facts: set[str]) -> None:
    assert set(stated(module, model)) == facts


class Strided(nn.Module):
    padding: Any = "SAME"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.Conv(4, (3, 3), strides=2, padding=self.padding, name="c")(inputs)


def strided() -> torch.nn.Module:
    return torch.nn.ModuleDict({"c": torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)})


def test_a_linen_module_is_compared_when_it_is_given() -> None:
    source, inputs = strided(), jnp.ones((1, 8, 8, 3))
    template = jax.eval_shape(Strided().init, jax.random.key(0), inputs)
    compare.match(source, template)
    with pytest.raises(ValueError, match=r"give inputs=\(…,\)"):
        compare.match(source, template, module=Strided())
    with pytest.raises(ValueError, match="cannot be called with these inputs"):
        compare.match(source, template, module=Strided(), inputs=(3, 4))
    message = r"c\.padding: computes something else: padding=\(1, 1\) in torch, padding='SAME'"
    for given in ((inputs,), {"inputs": inputs}):
        with pytest.raises(compare.ConversionError, match=message):
            compare.match(source, template, module=Strided(), inputs=given)
    mended = Strided(((1, 1), (1, 1)))
    assert len(compare.match(source, template, module=mended, inputs=(inputs,)).rows) == 2


class Model(nnx.Module):
    def __init__(self, padding: Any = "SAME") -> None:
        self.c = nnx.Conv(3, 4, (3, 3), strides=2, padding=padding, rngs=nnx.Rngs(0))


def test_what_the_message_advises_works() -> None:
    source = strided()
    with pytest.raises(compare.ConversionError, match="computes something else") as caught:
        compare.torch_to_nnx(source, Model())
    assert "give padding=((1, 1), (1, 1)) in Flax" in str(caught.value)
    assert "policy={'c.padding': 'ignore'}" in str(caught.value)
    compare.torch_to_nnx(source, Model(((1, 1), (1, 1))))
    with pytest.raises(ConversionError, match="computes something else: padding"):
        compare.match(source, Model(), policy={"c.padding": "verify"})
    allowed = compare.match(source, Model(), policy={"c.padding": "ignore"})
    compare.torch_to_nnx(source, Model(), mapping=allowed)
    with pytest.raises(compare.ConversionError, match="this policy fits nothing"):
        compare.match(source, Model(((1, 1), (1, 1))), policy={"c.padding": "ignore"})


def test_layers_are_compared_under_their_new_names() -> None:
    source = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU(), torch.nn.Dropout(0.3))
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=RNGS), nnx.gelu, nnx.Dropout(0.3))
    with pytest.raises(compare.ConversionError, match=r"1\.approximate: computes something else"):
        compare.match(source, model, rename={"*": "layers.*"})


class Embedded(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4, **options)


@pytest.mark.parametrize("fact", ["padding_idx", "scale_grad_by_freq"])
@pytest.mark.parametrize("has_layer", [False, True])
def test_what_changes_training_alone_is_a_warning(fact: str, has_layer: bool) -> None:
    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))

    source = Embedded(**{fact: 1})
    template: Any = Flax() if has_layer else {"params": {"embed": {"embedding": jnp.ones((5, 4))}}}
    with pytest.warns(compare.TrainingDifference, match=rf"embed\.{fact}: trained differently"):
        compare.match(source, template)
    compare.match(source, template, policy={f"embed.{fact}": "ignore"})
    with pytest.raises(compare.ConversionError, match=rf"embed\.{fact}"):
        compare.match(source, template, policy={f"embed.{fact}": "refuse"})
    compare.match(Embedded(), template)


class Positions(torch.nn.Module):
    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.positions = torch.nn.Parameter(torch.rand(5, 4), requires_grad=trained)


def test_a_frozen_parameter_pairs_with_a_buffer_and_is_named_among_parameters() -> None:
    frozen, trained = Positions(trained=False), Positions(trained=True)
    buffers = {"buffers": {"positions": jnp.ones((5, 4))}}
    params = {"params": {"positions": jnp.ones((5, 4))}}
    (row,) = compare.match(frozen, buffers).rows
    assert row.kind == "buffer"
    with pytest.raises(compare.ConversionError, match="one is trained, the other is not"):
        compare.match(trained, buffers)
    with pytest.warns(compare.TrainingDifference, match="positions: requires_grad=False in torch"):
        compare.match(frozen, params)
    compare.match(frozen, params, policy={"positions.requires_grad": "ignore"})
    compare.match(trained, params)


class Attention(nnx.Module):
    def __init__(self) -> None:
        self.attn = nnx.MultiHeadAttention(1, 4, decode=False, rngs=nnx.Rngs(0))


def test_heads_that_differ_are_said_once_and_may_be_allowed() -> None:
    source = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(4, 2)})
    with pytest.raises(compare.ConversionError, match="2 heads in torch and 1 in Flax") as caught:
        compare.match(source, Attention())
    assert "policy={'attn.num_heads': 'ignore'}" in str(caught.value)
    assert len(caught.value.mismatch.refused) == 1
    assert compare.match(source, Attention(), policy={"attn.num_heads": "ignore"}).rows


def test_a_layer_without_state_pairs_beside_those_that_have_some() -> None:
    source = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.LeakyReLU(0.2), torch.nn.Linear(3, 4)
    )
    rngs = nnx.Rngs(0)
    template = nnx.Sequential(
        nnx.Linear(2, 3, rngs=rngs), nnx.leaky_relu, nnx.Linear(3, 4, rngs=rngs)
    )
    rename = compare.suggest(source, template).rename
    for rules in (rename, {**rename, "1": "layers.1"}, {"*": "layers.*"}):
        with pytest.raises(ConversionError, match=r"1\.negative_slope: computes something else"):
            compare.match(source, template, rename=rules)
    source[1] = torch.nn.LeakyReLU(0.01)
    assert len(compare.match(source, template, rename=rename).rows) == 4


def test_numbers_of_numpy_are_numbers() -> None:
    source = torch.nn.Conv1d(2, 3, 3, padding=1)
    template = nnx.Conv(2, 3, (3,), padding=cast("Any", np.int64(1)), rngs=nnx.Rngs(0))
    assert compare.match(source, template).rows
