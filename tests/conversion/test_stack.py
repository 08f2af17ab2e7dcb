"""Layers that torch numbers, and that Flax stacks with `nn.scan` or `nnx.vmap`."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import compare
from compare import ConversionError

STACK = {"layers.*": "layers"}
F64: Any = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class TorchLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4, eps=1e-6)


class Torch(torch.nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(TorchLayer() for _ in range(count))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = layer.norm(inputs + torch.tanh(layer.fc(inputs)))  # type: ignore[operator]
        outputs: torch.Tensor = self.head(inputs)
        return outputs


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, None]:
        hidden = jnp.tanh(nn.Dense(4, **F64, name="fc")(inputs))
        norm = nn.LayerNorm(**F64, use_fast_variance=False, name="norm")
        return norm(inputs + hidden), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        scan = nn.scan(
            LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        hidden, _ = scan(name="layers")(inputs)
        outputs: jax.Array = nn.Dense(2, **F64, name="head")(hidden)
        return outputs


class Nnx(nnx.Module):
    def __init__(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def build(rngs: nnx.Rngs) -> "NnxLayer":
            return NnxLayer(rngs)

        self.layers = build(nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)


def torch_model() -> Torch:
    torch.manual_seed(0)
    model = Torch().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_scanned_layers_compute_the_same(tmp_path: Path) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        source, model = torch_model(), Linen()
        inputs = np.random.default_rng(0).normal(size=(5, 4))
        template = jax.eval_shape(model.init, jax.random.key(0), inputs)
        mapping = compare.match(source, template, stack=STACK)
        made = compare.torch_to_linen(source, template, mapping=mapping)
        expected = source(torch.from_numpy(inputs)).detach().numpy()
        outputs: Any = model.apply(made, inputs)
        np.testing.assert_allclose(outputs, expected, rtol=1e-11, atol=1e-13)

        state = source.state_dict()
        back = compare.linen_to_torch(made, mapping=mapping)
        assert all(torch.equal(back[key], value) for key, value in state.items())
        assert len(back) == len(state)
        assert "stacked transposed" in str(mapping)
        assert "layers.0.fc.weight … layers.2.fc.weight" in str(mapping)
        assert compare.StateMapping.from_json(json.loads(json.dumps(mapping.as_json()))) == mapping

        path = compare.save_checkpoint(tmp_path / "state.safetensors", source, mapping=mapping)
        loaded = compare.load_checkpoint(path, template)
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, made))
        compare.convert_checkpoint(path, tmp_path / "state.msgpack")
        compare.convert_checkpoint(tmp_path / "state.msgpack", tmp_path / "back.pth")
        assert not compare.verify_checkpoint(path, tmp_path / "back.pth")
        assert not compare.verify_checkpoint(path, tmp_path / "state.msgpack", mapping=mapping)
        target = Torch().double()
        compare.load_checkpoint(tmp_path / "state.msgpack", target)
        assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())


def test_mapped_layers_of_nnx() -> None:
    source, model = torch_model().float(), Nnx()
    mapping = compare.match(source, model, stack=STACK)
    compare.torch_to_nnx(source, model, mapping=mapping)
    weights = [layer.get_parameter("fc.weight").detach().numpy().T for layer in source.layers]
    kernels = nnx.to_pure_dict(nnx.state(model))["layers"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernels, np.stack(weights))
    back = compare.nnx_to_torch(model, mapping=mapping)
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())


def test_the_stack_is_suggested_and_can_be_pasted() -> None:
    with pytest.raises(ConversionError) as refused:
        compare.match(torch_model().float(), Nnx())
    (argument,) = re.findall(r"Pass stack=({.*?})", str(refused.value))
    assert json.loads(argument) == STACK


def test_a_state_dict_is_asked_about_all_of_its_squares() -> None:
    source, model = torch_model().float(), Nnx()
    with pytest.raises(ConversionError) as refused:
        compare.match(source.state_dict(), model, stack=STACK)
    (text,) = re.findall(r"layouts=({.*?})", str(refused.value))
    layouts = json.loads(text)
    mapping = compare.match(source.state_dict(), model, stack=STACK, layouts=layouts)
    assert mapping == compare.match(source, model, stack=STACK)


def test_a_layer_that_says_something_else_is_named_whichever_it_is() -> None:
    source = torch_model().float()
    source.layers[1].norm.eps = 1e-3  # type: ignore[union-attr]
    with pytest.raises(ConversionError, match=r"layers\.1\.norm\.eps: computes something else"):
        compare.match(source, Nnx(), stack=STACK)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"blocks.*": "layers"}, "blocks.*: this stack fits no key"),
        ({"layers.*": "blocks"}, "the stack blocks.fc.weight could be nothing in Flax"),
        ({"layers": "layers"}, "layers: this stack fits no key"),
    ],
)
def test_a_stack_that_does_not_fit_is_refused(stack: dict[str, str], message: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)):
        compare.match(torch_model().float(), Nnx(), stack=stack)


def test_layers_of_two_layouts_are_no_stack() -> None:
    class Conv1D(torch.nn.Module):
        """The linear layer of transformers, which stores (in, out)."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                torch.nn.Parameter(torch.ones(4, 4)),
                torch.nn.Parameter(torch.ones(4)),
            )

    Conv1D.__module__ = "transformers.pytorch_utils"
    source = Torch()
    source.layers[1].fc = Conv1D()
    with pytest.raises(
        ConversionError, match=r"laid out as transposed, and layers\.1\.fc\.weight as"
    ):
        compare.match(source, Nnx(), stack=STACK)


def test_other_numbers_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"the mapping stacks 4 tensors; this is \(3, 4"):
        compare.match(Torch(4), Nnx(), stack=STACK)
    state = {key: value for key, value in Torch().state_dict().items() if ".1." not in key}
    with pytest.raises(ConversionError, match=r"stands for the numbers \[0, 2\]"):
        compare.match(state, Nnx(), stack=STACK)
    source = Torch()
    source.layers[2].double()
    mapping = compare.match(source, Nnx(), stack=STACK)
    with pytest.raises(ConversionError, match="its parts have different dtypes"):
        compare.torch_to_nnx(source, Nnx(), mapping=mapping)
    source.layers[2].fc = torch.nn.Linear(4, 5)
    with pytest.raises(ConversionError, match=r"layers.2.fc.weight has shape \(5, 4\)"):
        compare.match(source, Nnx(), stack=STACK)


@pytest.mark.parametrize("stack", [["b", "a"], "a", [1], ["a", 2]])
def test_a_stack_that_is_none_is_no_mapping(stack: Any) -> None:
    row = {"torch_key": "a", "path": ["params", "a"], "stack": stack}
    with pytest.raises(ValueError, match="has the stack"):
        compare.StateMapping.from_json({"flax": "linen", "rows": [row], "left": []})
