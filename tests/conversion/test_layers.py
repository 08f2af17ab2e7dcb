"""Every known layer agrees in outputs and gradients, in float64, at random sizes."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import compare
from compare.conversion.apply_mapping import flax_from_torch
from compare.conversion.errors import ConversionError
from compare.conversion.layouts import ALL, layout, to_flax, to_torch
from compare.conversion.mapping import Left, StateMapping

from .layer_cases import LAYERS, Case

# The threshold of LAPACK's own tests (TESTING/dtest.in): an error above 30 roundings is a bug.
LAPACK_THRESHOLD = 30.0
U32, U64 = np.finfo(np.float32).eps / 2, np.finfo(np.float64).eps / 2


pytestmark = pytest.mark.usefixtures("float64_by_default")

# A plain run takes two of four layers, in one of the two APIs in turn; the fuzz takes them all.
FLAVORS = [
    pytest.param(name, flavor, marks=[pytest.mark.again] * ((index + turn) % 2 or index % 4 > 1))
    for index, name in enumerate(LAYERS)
    for turn, flavor in enumerate(("linen", "nnx"))
]


@pytest.mark.parametrize(("name", "flavor"), FLAVORS)
@pytest.mark.slow
def test_outputs_and_gradients_agree(name: str, flavor: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    case = _drawn(name, random)
    if name == "gru" and flavor == "nnx":
        assert isinstance(case.torch, torch.nn.GRUCell)
        with torch.no_grad():
            case.torch.bias_hh[-case.torch.hidden_size :] = 0
    if flavor == "nnx" and case.nnx is None:
        return
    expected, limit = _outputs(case), _limit(case)
    cotangent = random.standard_normal(expected.shape)
    mapping, outputs, gradients = (_linen if flavor == "linen" else _nnx)(case, cotangent)
    assert np.abs(outputs - expected).max(initial=0) <= limit
    wanted, bounds = _torch_gradients(case, mapping, cotangent, gradients)
    for path in wanted:
        error = np.abs(np.asarray(gradients[path]) - wanted[path]).max(initial=0)
        assert error <= bounds[path], path
    _assert_the_way_back(case, mapping, flavor)
    _assert_every_entry(case, mapping, flavor, tmp_path)


def _drawn(name: str, random: np.random.Generator) -> Case:
    case = LAYERS[name](random)
    with torch.no_grad():
        for parameter in case.torch.parameters():
            parameter.copy_(torch.from_numpy(random.standard_normal(tuple(parameter.shape))))
    return case


def _tensors(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.from_numpy(array).to(dtype) if array.dtype.kind == "f" else torch.from_numpy(array)
        for array in case.inputs
    ]


def _outputs(case: Case, dtype: torch.dtype = torch.float64) -> np.ndarray:
    module = case.torch.to(dtype)
    with torch.no_grad():
        outputs = case.call_torch(module, *_tensors(case, dtype)).double().numpy()
    return outputs


def _limit(case: Case) -> float:
    """The largest error that float64 rounding may cause.

    It is torch's own error in float32, scaled to float64 and multiplied by LAPACK's threshold. The
    error in float32 includes the rounding of the weights, so it reflects the conditioning. It
    counts as at least one rounding of the largest output.
    """
    exact = _outputs(case)
    saved = {key: tensor.clone() for key, tensor in case.torch.state_dict().items()}
    rounding = np.abs(_outputs(case, torch.float32) - exact).max(initial=0) * (U64 / U32)
    case.torch.to(torch.float64).load_state_dict(saved)
    return LAPACK_THRESHOLD * float(max(rounding, U64 * np.abs(exact).max(initial=0)))


def _linen(case: Case, cotangent: np.ndarray) -> tuple[StateMapping, np.ndarray, dict]:
    inputs = [jnp.asarray(array) for array in case.inputs]
    method = case.call_linen
    template = jax.eval_shape(lambda: _init(case, inputs))
    mapping = compare.match(case.torch, template, layouts=case.layouts)
    variables = compare.torch_to_linen(case.torch, template, mapping=mapping)
    outputs = method(case.linen, variables, *inputs)

    def loss(params: Any) -> Any:
        return (method(case.linen, {**variables, "params": params}, *inputs) * cotangent).sum()

    gradients = flatten_dict({"params": jax.grad(loss)(variables["params"])})
    return mapping, np.asarray(outputs), gradients


def _init(case: Case, inputs: list[Any]) -> Any:
    """Initialize through the same call, so that cells get their arguments in order."""

    class Recorder:
        def apply(self, _: Any, *arguments: Any, **keywords: Any) -> Any:
            self.variables = case.linen.init(jax.random.key(0), *arguments, **keywords)
            return case.linen.apply(self.variables, *arguments, **keywords)

    recorder = Recorder()
    case.call_linen(recorder, None, *inputs)
    return recorder.variables


def _nnx(case: Case, cotangent: np.ndarray) -> tuple[StateMapping, np.ndarray, dict]:
    inputs = [jnp.asarray(array) for array in case.inputs]
    layouts = {} if "conv_transpose" in str(type(case.nnx)).lower() else case.layouts
    mapping = compare.match(case.torch, case.nnx, layouts=layouts)
    model = compare.torch_to_nnx(case.torch, case.nnx, mapping=mapping)
    outputs = case.call_nnx(model, *inputs)
    gradients = nnx.grad(lambda model: (case.call_nnx(model, *inputs) * cotangent).sum())(model)
    return (
        mapping,
        np.asarray(outputs),
        {path: leaf.get_value() for path, leaf in nnx.to_flat_state(gradients)},
    )


def _torch_gradients(
    case: Case, mapping: StateMapping, cotangent: np.ndarray, gradients: Mapping
) -> tuple[dict[Any, np.ndarray], dict[Any, float]]:
    """Return torch's gradients in Flax's layout, and a limit for each as in `_limit`."""
    exact = _flax_gradients(case, mapping, cotangent, gradients, torch.float64)
    saved = {key: tensor.clone() for key, tensor in case.torch.state_dict().items()}
    single = _flax_gradients(case, mapping, cotangent, gradients, torch.float32)
    case.torch.to(torch.float64).load_state_dict(saved)
    bounds = {}
    for path, array in exact.items():
        rounding = np.abs(single[path] - array).max(initial=0) * (U64 / U32)
        bounds[path] = LAPACK_THRESHOLD * float(max(rounding, U64 * np.abs(array).max(initial=0)))
    return exact, bounds


def _flax_gradients(
    case: Case, mapping: StateMapping, cotangent: np.ndarray, gradients: Mapping, dtype: torch.dtype
) -> dict[Any, np.ndarray]:
    module = case.torch.to(dtype)
    module.zero_grad()
    (
        case.call_torch(module, *_tensors(case, dtype)) * torch.from_numpy(cotangent).to(dtype)
    ).sum().backward()
    tensors = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assert parameter.grad is not None
        tensors[name] = parameter.grad.double()
    # Each term of a sum has the gradient of the sum.
    single = tuple(replace(row, plus=None) for row in mapping.rows)
    arrays, mismatch = flax_from_torch(
        tensors, gradients, StateMapping(single, flax=mapping.flax), copy=True
    )
    assert not (mismatch.missing or mismatch.misshaped or mismatch.refused), mismatch
    return {path: np.asarray(array) for path, array in arrays.items()}


def _assert_the_way_back(case: Case, mapping: StateMapping, flavor: str) -> None:
    """Every bit returns to torch, except where two biases were added."""
    if flavor == "linen":
        template = jax.eval_shape(
            lambda: _init(case, [jnp.asarray(array) for array in case.inputs])
        )
        state = compare.linen_to_torch(
            compare.torch_to_linen(case.torch, template, mapping=mapping), mapping=mapping
        )
    else:
        state = compare.nnx_to_torch(case.nnx, mapping=mapping)
    added = {row.plus for row in mapping.rows} | {row.torch_key for row in mapping.rows if row.plus}
    for key, tensor in case.torch.state_dict().items():
        if key not in added and key not in mapping.left_keys():
            assert torch.equal(state[key], tensor), key
    case.torch.load_state_dict(state, strict=not mapping.left_keys())
    assert StateMapping.from_json(mapping.as_json()) == mapping


def _assert_every_entry(case: Case, mapping: StateMapping, flavor: str, folder: Path) -> None:
    """Every public function gives the same arrays; without the mapping, it may also refuse."""
    state = {key: tensor.clone() for key, tensor in case.torch.state_dict().items()}
    target = (
        _init(case, [jnp.asarray(array) for array in case.inputs])
        if flavor == "linen"
        else case.nnx
    )
    given: dict[str, Any] = {"mapping": mapping}
    to_flax: Any = compare.torch_to_linen if flavor == "linen" else compare.torch_to_nnx
    to_torch: Any = compare.linen_to_torch if flavor == "linen" else compare.nnx_to_torch
    expected = _arrays(to_flax(case.torch, target, **given))
    ours = compare.save_checkpoint(folder / "ours.safetensors", case.torch)
    torch.save(state, folder / "plain.pth")
    relaid = compare.convert_checkpoint(ours, folder / "flax.safetensors", layout="flax", **given)
    assert relaid.mapping == mapping
    for entry in (
        lambda options: to_flax(case.torch, target, **options),
        lambda options: to_flax(state, target, **options),
        lambda options: compare.load_checkpoint(ours, target, **options),
        lambda options: compare.load_checkpoint(folder / "plain.pth", target, **options),
        lambda _: compare.load_checkpoint(folder / "flax.safetensors", target),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", compare.UnverifiedCheckpoint)
            assert _same(_arrays(entry(given)), expected)
            if any(name.startswith("flatten") for name in case.layouts.values()):
                continue  # no layer says that an image is flattened
            try:
                found = entry({})
            except (compare.ConversionError, compare.CheckpointError):
                continue
        assert _same(_arrays(found), expected)
    compare.save_checkpoint(folder / "back.safetensors", to_flax(case.torch, target, **given))
    wanted = to_torch(to_flax(case.torch, target, **given), **given)
    case.torch.load_state_dict(wanted, strict=not mapping.left_keys())
    wanted = {key: tensor.clone() for key, tensor in case.torch.state_dict().items()}
    for file in ("flax.safetensors", "back.safetensors"):
        compare.load_checkpoint(folder / file, case.torch, **given)
        for key, tensor in case.torch.state_dict().items():
            assert torch.equal(tensor, wanted[key]), (file, key)


def _arrays(target: Any) -> dict[Any, np.ndarray]:
    flat = (
        nnx.to_flat_state(nnx.state(target, nnx.Not(nnx.RngState)))
        if isinstance(target, nnx.Module)
        else flatten_dict(target).items()
    )
    return {
        path: np.asarray(leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf)
        for path, leaf in flat
    }


def _same(found: dict[Any, np.ndarray], expected: dict[Any, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[path], expected[path]) for path in expected
    )


def test_momentum_is_the_other_share_and_the_variance_is_another() -> None:
    """torch's momentum 0.1 is Flax's 0.9; torch keeps the unbiased variance, Flax the biased."""
    inputs = np.random.default_rng(0).standard_normal((7, 3))
    norm = torch.nn.BatchNorm1d(3, momentum=0.1)
    flax = nn.BatchNorm(
        use_running_average=False, momentum=0.9, epsilon=1e-5, param_dtype=jnp.float64
    )
    variables = compare.torch_to_linen(norm, jax.eval_shape(flax.init, jax.random.key(0), inputs))
    _, updated = flax.apply(variables, inputs, mutable=["batch_stats"])
    norm(torch.from_numpy(inputs))
    statistics = updated["batch_stats"]
    assert norm.running_mean is not None and norm.running_var is not None
    assert np.allclose(statistics["mean"], norm.running_mean, rtol=0, atol=LAPACK_THRESHOLD * U64)
    kept = 0.9 * 1.0
    unbiased = (norm.running_var.numpy() - kept) / 0.1
    biased = (np.asarray(statistics["var"]) - kept) / 0.1
    assert np.allclose(unbiased * 6 / 7, biased, rtol=0, atol=10 * LAPACK_THRESHOLD * U64)
    table = compare.match(norm, variables)
    assert table.left == (Left("num_batches_tracked", "ignore"),)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            torch.nn.LSTM(2, 3),
            "0: LSTM has no counterpart that match knows: its layers pair",
        ),
        (torch.nn.EmbeddingBag(2, 3), "0: EmbeddingBag has no counterpart that match knows"),
        (torch.nn.RNNCell(2, 3), "0: RNNCell has no counterpart that match knows: replace it"),
        (
            torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            "track_running_stats=True",
        ),
        (torch.nn.ConvTranspose1d(4, 4, 3, groups=2), "groups=2 has no counterpart"),
        (torch.nn.PReLU(3), "3 slopes has no counterpart"),
        (torch.nn.Embedding(3, 4, max_norm=1.0), "max_norm changes its weight when called"),
        (
            torch.nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "add_bias_kv=True has no counterpart",
        ),
        (
            torch.nn.TransformerEncoderLayer(8, 2),
            "0: TransformerEncoderLayer has no counterpart that match knows: write it with",
        ),
        (torch.nn.TransformerDecoderLayer(8, 2), "0: TransformerDecoderLayer has no counterpart"),
        (torch.nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5]), "0: AdaptiveLogSoftmaxWithLoss has no"),
        (
            torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)),
            "computes a weight from other tensors: pass fold=True",
        ),
        (torch.ao.quantization.FakeQuantize(), "0: FakeQuantize has no counterpart"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_layers_without_a_counterpart_are_refused_by_name(
    layer: torch.nn.Module, message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        compare.match(torch.nn.Sequential(layer), {"params": {}})


def test_what_a_refusal_advises_works() -> None:
    """A state dict has no layers, so a Flax model of the user's own can take its names."""
    layer = torch.nn.RNNCell(2, 3)
    names = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    template = {"params": {key: jax.ShapeDtypeStruct(shape, "f4") for key, shape in names.items()}}
    with pytest.raises(
        ConversionError, match=r"compare\.match\(source\.state_dict\(\), template\)"
    ):
        compare.match(layer, template)
    assert len(compare.match(layer.state_dict(), template).rows) == 4


def test_a_lazy_layer_is_asked_for_its_values_alone() -> None:
    layer = torch.nn.LazyInstanceNorm2d(affine=True, track_running_stats=True)
    with pytest.raises(ConversionError, match="a lazy layer has no values yet") as caught:
        compare.match(layer, {"params": {}})
    assert "has no counterpart in Flax" not in str(caught.value)


@pytest.mark.parametrize("layer", [torch.nn.GELU(), torch.nn.LocalResponseNorm(2)])
def test_a_layer_without_state_is_not_looked_at(layer: torch.nn.Module) -> None:
    assert compare.match(torch.nn.Sequential(layer), {"params": {}}).rows == ()


def test_a_gru_cell_keeps_the_hidden_bias_of_its_new_gate() -> None:
    """The other two thirds are added to the input's bias, so they come back as zeros."""
    cell = torch.nn.GRUCell(2, 3)
    flax = nn.GRUCell(3)
    carry, inputs = jnp.ones((1, 3)), jnp.ones((1, 2))
    template = jax.eval_shape(flax.init, jax.random.key(0), carry, inputs)
    table = compare.match(cell, template)
    state = compare.linen_to_torch(
        compare.torch_to_linen(cell, template, mapping=table), mapping=table
    )
    assert torch.equal(state["bias_hh"][:6], torch.zeros(6))
    assert torch.equal(state["bias_hh"][6:], cell.bias_hh.detach()[6:])
    assert torch.equal(state["bias_ih"][:6], (cell.bias_ih + cell.bias_hh).detach()[:6])
    back = torch.nn.GRUCell(2, 3)
    back.load_state_dict(state)
    inputs_and_state = torch.ones(1, 2), torch.ones(1, 3)
    limit = LAPACK_THRESHOLD * 2.0**-24
    assert torch.allclose(cell(*inputs_and_state), back(*inputs_and_state), rtol=0, atol=limit)


def test_the_hidden_bias_that_nnx_lacks_is_refused_unless_zero() -> None:
    cell, model = torch.nn.GRUCell(2, 3), nnx.GRUCell(2, 3, rngs=nnx.Rngs(0))
    mapping = compare.match(cell, model)
    with pytest.raises(
        ConversionError, match="bias_hh: part 2 of 3 is not zero, and Flax adds nothing there"
    ):
        compare.torch_to_nnx(cell, model, mapping=mapping)


def test_each_layout_is_what_its_table_says() -> None:
    there = np.arange(2 * 3 * 5 * 7)
    conv, heads = there.reshape(2, 3, 5, 7), there.reshape(6, 35)
    expected = {
        ("same", conv.shape): (conv, conv),
        ("transposed", (35, 6)): (heads, heads.T),
        ("conv", (5, 7, 3, 2)): (conv, np.einsum("oihw->hwio", conv)),
        ("conv_transpose", (5, 7, 2, 3)): (
            conv,
            np.einsum("iohw->hwio", conv)[::-1, ::-1],
        ),
        ("heads_in", (35, 2, 3)): (heads, np.einsum("hde->ehd", heads.reshape(2, 3, 35))),
        ("heads_out", (5, 7, 6)): (heads, np.einsum("ehd->hde", heads.reshape(6, 5, 7))),
        ("heads_bias", (6, 35)): (there, heads),
        ("scalar", ()): (there[:1], there[0]),
        ("flatten:5,7,3", (105, 2)): (
            there.reshape(2, 105),
            np.einsum("ochw->hwco", there.reshape(2, 5, 7, 3)).reshape(105, 2),
        ),
        ("permuted:2,0,1", (5, 2, 21)): (
            there.reshape(2, 21, 5),
            there.reshape(2, 21, 5).transpose(2, 0, 1),
        ),
        ("(h d) e -> e h d", (35, 2, 3)): (heads, np.einsum("hde->ehd", heads.reshape(2, 3, 35))),
    }
    for (name, shape), (in_torch, in_flax) in expected.items():
        chosen = layout(name, shape)
        assert chosen.torch_shape == in_torch.shape, name
        assert np.array_equal(to_flax(chosen, in_torch), in_flax), name
        assert np.array_equal(to_torch(chosen, np.asarray(in_flax)), in_torch), name
    assert {name.partition(":")[0] for name, _ in expected} == {
        name.partition(":")[0] for name in ALL
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("scalar", (1,)),
        ("heads_bias", (2, 3, 4)),
        ("heads_in", (2, 3)),
        ("heads_out", (2, 3)),
        ("transposed", (2, 3, 4)),
        ("conv", (2, 3)),
        ("conv_transpose", (2, 3, 4, 5, 6, 7)),
        ("permuted:0,1", (2, 3, 4)),
        ("permuted:0,0", (2, 3)),
        ("flatten:2,3", (5, 2)),
    ],
)
def test_a_layout_of_another_rank_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"the layout {name.partition(':')[0]} needs an array"):
        layout(name, shape)


@pytest.mark.parametrize("name", ALL)
def test_a_layout_moves_every_value_to_one_place(name: str) -> None:
    shapes = {
        **{
            "same": (2, 3),
            "transposed": (2, 3),
            "conv": (2, 3, 5, 7),
            "conv_transpose": (2, 3, 5, 7),
            "scalar": (),
        },
        **{"heads_in": (5, 2, 3), "heads_out": (2, 3, 5), "heads_bias": (2, 3)},
        **{"flatten:C,H,W": (2 * 3 * 5, 7), "permuted:2,0,1": (2, 3, 5)},
        "(h d) e -> e h d": (5, 2, 3),
    }
    chosen = layout(name.replace("C,H,W", "2,3,5"), shapes[name])
    there = np.arange(np.prod(chosen.torch_shape)).reshape(chosen.torch_shape)
    back = to_torch(chosen, to_flax(chosen, there))
    assert to_flax(chosen, there).shape == shapes[name]
    assert np.array_equal(back, there)
    assert torch.equal(
        to_torch(chosen, to_flax(chosen, torch.from_numpy(there))), torch.from_numpy(there)
    )
