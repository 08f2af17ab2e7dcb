"""What wrappers put before the names of a module is taken off, or named in one line."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from flax import nnx

import compare
from compare.conversion.wrappers import common_prefix


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 3)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.fc = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def template() -> dict[str, Any]:
    return {"params": {"fc": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}}


WRAPPERS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "parallel": torch.nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda module: torch.compile(torch.nn.DataParallel(module), backend="eager"),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_module_is_what_it_wraps(name: str) -> None:
    inner = Inner()
    wrapped: Any = WRAPPERS[name](inner)
    expected = jnp.asarray(inner.fc.weight.detach().numpy().T)
    variables = compare.torch_to_linen(wrapped, template())
    assert jnp.array_equal(variables["params"]["fc"]["kernel"], expected)
    assert jnp.array_equal(compare.torch_to_nnx(wrapped, Model()).fc.kernel[...], expected)
    mapping = compare.match(wrapped, template())
    assert [row.torch_key for row in mapping.rows] == ["fc.weight", "fc.bias"]
    inner.load_state_dict(compare.linen_to_torch(variables, mapping=mapping))
    compare.torch_to_linen(wrapped, template(), mapping=mapping)


@pytest.mark.parametrize(
    "options",
    [{"rename": {"module.*": "*"}}, {"rename": {"module": ""}}, {"prefix": "module."}],
    ids=str,
)
def test_a_wrapper_that_is_named_is_kept(options: dict[str, Any]) -> None:
    wrapped = torch.nn.DataParallel(Inner())
    for source in (wrapped, wrapped.state_dict()):
        mapping = compare.match(source, template(), **options)
        assert [row.torch_key for row in mapping.rows] == ["module.fc.weight", "module.fc.bias"]
        variables = compare.torch_to_linen(source, template(), mapping=mapping)
        wrapped.load_state_dict(compare.linen_to_torch(variables, mapping=mapping))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.net.", "_orig_mod.module."])
def test_a_prefix_is_named_once_and_taken_off(prefix: str, tmp_path: Path) -> None:
    inner = Inner()
    state = {prefix + key: tensor for key, tensor in inner.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    path = compare.save_checkpoint(tmp_path / "a.safetensors", state)
    calls = [
        lambda **options: compare.match(state, template(), **options),
        lambda **options: compare.torch_to_linen(state, template(), **options),
        lambda **options: compare.torch_to_nnx(state, Model(), **options),
        lambda **options: compare.load_checkpoint(path, template(), **options),
        lambda **options: compare.load_checkpoint(path, Model(), **options),
        lambda **options: compare.load_checkpoint(path, Inner(), **options),
    ]
    for call in calls:
        with pytest.raises((compare.ConversionError, compare.CheckpointError)) as caught:
            call()
        message = str(caught.value)
        assert message.count("unexpected") == 1 and "missing" not in message
        assert f"pass prefix={prefix!r}" in message
        call(prefix=prefix)
    loaded = compare.load_checkpoint(path, Inner(), prefix=prefix.removesuffix("."))
    assert torch.equal(loaded.fc.weight, inner.fc.weight)
    rules = {prefix + "fc": "fc"}
    assert len(compare.match(state, template(), rename=rules).rows) == 2
    assert len(compare.match(state, template(), prefix=prefix, rename={"fc": "fc"}).rows) == 2


def test_a_prefix_without_effect_is_refused(tmp_path: Path) -> None:
    state = Inner().state_dict()
    with pytest.raises(compare.ConversionError, match="no torch name has this prefix"):
        compare.match(state, template(), prefix="module.")
    mapping = compare.match(state, template())
    with pytest.raises(ValueError, match="prefix has no effect beside mapping"):
        compare.torch_to_linen(state, template(), mapping=mapping, prefix="fc.")
    flax = compare.save_checkpoint(tmp_path / "a.msgpack", template())
    with pytest.raises(compare.CheckpointError, match="prefix has no effect"):
        compare.load_checkpoint(flax, template(), prefix="fc.")
    path = compare.save_checkpoint(tmp_path / "a.pth", Inner())
    with pytest.raises(compare.CheckpointError, match="no name in it has"):
        compare.load_checkpoint(path, Inner(), prefix="module.")


def test_two_names_do_not_become_one_without_their_prefix(tmp_path: Path) -> None:
    state = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
    both = state | {f"module.{key}": tensor + 1 for key, tensor in state.items()}
    path = compare.save_checkpoint(tmp_path / "a.pth", both)
    for target in (Inner(), template()):
        with pytest.raises(compare.CheckpointError, match="which would be one"):
            compare.load_checkpoint(path, target, prefix="module.")


@pytest.mark.parametrize(
    ("longer", "shorter", "prefix"),
    [
        (["a.w", "a.b"], ["w", "b"], "a."),
        (["a.b.w", "a.b.v"], ["w"], "a.b."),
        (["a.w", "c.b"], ["w", "b"], ""),
        (["a.w"], ["w", "b"], ""),
        (["a.w", "a.b"], [], ""),
        ([], ["w"], ""),
        (["xw"], ["w"], ""),
    ],
)
def test_which_prefix_all_have(longer: list[str], shorter: list[str], prefix: str) -> None:
    assert common_prefix(longer, shorter) == prefix


def test_an_adapter_is_named_with_the_way_to_merge_it() -> None:
    """As PEFT names what LoRA adds; it is not installed here."""
    source = {
        "base_model.model.fc.base_layer.weight": torch.zeros(4, 3),
        "base_model.model.fc.lora_A.default.weight": torch.zeros(2, 3),
        "base_model.model.fc.lora_B.default.weight": torch.zeros(4, 2),
    }
    template = {"params": {"fc": {"kernel": jnp.zeros((3, 4))}}}
    rename = {"fc.base_layer": "fc"}
    with pytest.raises(compare.ConversionError, match=r"model\.merge_and_unload") as caught:
        compare.match(source, template, prefix="base_model.model.", rename=rename)
    assert len(caught.value.mismatch.unexpected) == 2
    merged = {"fc.weight": torch.zeros(4, 3)}
    assert len(compare.match(merged, template).rows) == 1
