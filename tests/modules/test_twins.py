"""The two frameworks' packages match: both take the same arguments under the same names."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest

import flax_impl
import flax_impl.dispatch
import flax_impl.nnx
import torch_impl
import torch_impl.dispatch

ROOT = Path(__file__).parents[2]
CLASSES = ("CausalAttentionWithBuffer", "CausalAttentionWithoutBuffers", "CausalMultiHeadAttention")
FRAMEWORKS_OWN = {"self", "rngs", "name", "parent", "deterministic"}
OF_TORCH = {"device", "dtype"}
OF_FLAX = {"dtype", "param_dtype"} | {
    f"{prefix}{kind}_init" for prefix in ("", "out_") for kind in ("kernel", "bias")
}


def defaults(call: Any) -> dict[str, Any]:
    parameters = inspect.signature(
        call.__init__ if inspect.isclass(call) else call
    ).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in FRAMEWORKS_OWN}


def test_the_twins_are_equal_word_for_word() -> None:
    ours, theirs = (
        (ROOT / package / "validation.py").read_text() for package in ("torch_impl", "flax_impl")
    )
    assert ours == theirs


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_take_the_same_arguments(name: str) -> None:
    own = (OF_TORCH, OF_FLAX) if name == "CausalMultiHeadAttention" else (frozenset(), frozenset())
    expected = defaults(getattr(torch_impl, name))
    assert list(expected)[:3] == ["input_embedding_dim", "output_embedding_dim", "context_length"]
    shared = {key: value for key, value in expected.items() if key not in own[0]}
    assert expected.keys() - shared.keys() == own[0]
    for package in (flax_impl, flax_impl.nnx):
        found = defaults(getattr(package, name))
        assert found.keys() - shared.keys() == own[1]
        assert [key for key in found if key not in own[1]] == list(shared)
        assert {key: found[key] for key in shared} == shared


def test_the_dropout_of_linen_has_its_own_name() -> None:
    arguments = 3, 5, 6, 0.25
    linen = flax_impl.CausalAttentionWithBuffer(*arguments)
    assert linen.dropout == 0.25
    module = inspect.getmodule(type(linen))
    assert module is not None and "attention_dropout" in inspect.getsource(module)
    assert torch_impl.CausalAttentionWithBuffer(*arguments).dropout.p == 0.25


def test_the_functions_take_the_same_arguments() -> None:
    for name in ("masked_attention", "reference_attention", "causal_mask"):
        assert list(defaults(getattr(flax_impl, name))) == list(
            defaults(getattr(torch_impl, name))
        ), name
    assert get_args(flax_impl.dispatch.Implementation) == get_args(
        torch_impl.dispatch.Implementation
    )
