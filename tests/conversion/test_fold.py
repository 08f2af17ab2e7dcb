"""Weight norm, spectral norm, pruning and other parametrizations become plain tensors."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import compare
from compare import ConversionError


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _old(wrap: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return wrap(nn.Linear(4, 3), **arguments)


def _pruned() -> nn.Module:
    module = nn.Linear(4, 3)
    prune.random_unstructured(module, "weight", amount=0.5)
    return module


def _doubled() -> nn.Module:
    module = nn.Linear(4, 3)
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    return module


STORED: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), True),
    "weight norm of columns": (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), True),
    "old weight norm": (lambda: _old(nn.utils.weight_norm), True),
    "old weight norm as a whole": (lambda: _old(nn.utils.weight_norm, dim=None), True),
    "pruning": (_pruned, True),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), False),
    "old spectral norm": (lambda: _old(nn.utils.spectral_norm), False),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), False),
    "another": (_doubled, False),
}
TEMPLATE = {"params": {"fc": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}}}


@pytest.mark.parametrize("as_array", [lambda tensor: tensor.numpy(), jnp.asarray])
@pytest.mark.parametrize("name", [name for name, (_, is_plain) in STORED.items() if is_plain])
def test_parts_may_be_numpy_or_jax_arrays(name: str, as_array: Callable[..., Any]) -> None:
    state = STORED[name][0]().state_dict()
    folded = compare.fold({key: as_array(tensor.detach()) for key, tensor in state.items()})
    torch.testing.assert_close(folded["weight"], compare.fold(state)["weight"], rtol=0, atol=0)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("trained", [True, False])
def test_the_value_of_a_call_is_converted(name: str, trained: bool) -> None:
    torch.manual_seed(0)
    make, state_says_it = STORED[name]
    source = nn.ModuleDict({"fc": make()})
    source["fc"](torch.ones(1, 4))
    source.train(trained)
    before = copy.deepcopy(source.state_dict())
    reference = source["fc"].eval()
    inputs = torch.randn(5, 4)
    expected = reference(inputs).detach()
    source.train(trained)

    folded = compare.fold(source)
    assert set(folded.state_dict()) == {"fc.weight", "fc.bias"}
    assert torch.equal(folded["fc"](inputs), expected)
    assert type(folded["fc"]) is nn.Linear
    assert folded.training is folded["fc"].training is trained
    made = compare.torch_to_linen(source, TEMPLATE, fold=True)
    mapping = compare.match(source, TEMPLATE, fold=True)
    assert {row.torch_key for row in mapping.rows} == {"fc.weight", "fc.bias"}
    weight = folded["fc"].weight.detach().numpy()
    np.testing.assert_array_equal(made["params"]["fc"]["kernel"], weight.T)
    after = source.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())

    state = {key: value.detach() for key, value in source.state_dict().items()}
    if state_says_it:
        np.testing.assert_array_equal(compare.fold(state)["fc.weight"].numpy(), weight)
        from_state = compare.torch_to_linen(
            state, TEMPLATE, fold=True, layouts={"fc.weight": "transposed"}
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, from_state, made))
    else:
        with pytest.raises(ValueError, match=r"fc.weight is stored as .*: fold its module"):
            compare.fold(state)


@pytest.mark.parametrize("name", STORED)
def test_what_is_not_folded_is_named_with_the_mend(name: str) -> None:
    source = nn.ModuleDict({"fc": STORED[name][0]()})
    with pytest.raises(ConversionError) as refused:
        compare.match(source, TEMPLATE)
    text = str(refused.value)
    assert "only a part from which fc.weight is computed" in text
    assert "Pass fold=True" in text
    assert "did you mean" not in text


def test_a_part_never_stands_for_the_whole() -> None:
    for name, key in (("old spectral norm", "weight_orig"), ("old weight norm", "weight_v")):
        source = nn.ModuleDict({"fc": STORED[name][0]()})
        others = {"fc.weight_?": "ignore", "fc.weight_orig": "ignore"}
        policy: Any = {rule: "ignore" for rule in others if not key.endswith(rule[-4:])}
        with pytest.raises(ConversionError, match=r"only a part from which fc\.weight is computed"):
            compare.match(
                source,
                TEMPLATE,
                rename={f"fc.{key}": "fc.kernel"},
                layouts={f"fc.{key}": "transposed"},
                policy=policy,
            )


@pytest.mark.parametrize(("shape", "dim"), [((1, 3), 0), ((3, 1), 1), ((1, 1), 0), ((3, 3), 1)])
def test_the_axis_of_weight_norm_follows_from_the_shapes(shape: tuple[int, int], dim: int) -> None:
    torch.manual_seed(0)
    module = parametrizations.weight_norm(nn.Linear(shape[1], shape[0]), dim=dim)
    assert torch.equal(compare.fold(module.state_dict())["weight"], module.weight)


def test_names_alone_do_not_make_parts() -> None:
    state = {"proj.w_g": torch.ones(3, 4), "proj.w_v": torch.zeros(3, 4)}
    own = {"gate": jnp.zeros((3, 4)), "value": jnp.zeros((3, 4))}
    rename = {"proj.w_g": "gate", "proj.w_v": "value"}
    assert len(compare.match(state, {"params": own}, rename=rename).rows) == 2
    assert compare.fold(state) == state


def test_a_flax_layer_with_the_same_parts_is_paired() -> None:
    source = nn.ModuleDict({"fc": STORED["old weight norm"][0]()})
    own = {"weight_g": jnp.zeros((3, 1)), "weight_v": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}
    made = compare.torch_to_linen(source, {"params": {"fc": own}})
    expected = source.state_dict()["fc.weight_v"].numpy()
    np.testing.assert_array_equal(made["params"]["fc"]["weight_v"], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("is_old", [False, True])
def test_weight_norm_that_flax_stores_as_well(is_old: bool) -> None:
    """As transformers' FlaxWav2Vec2 does; the scale may lack the axes of length 1."""
    convolution = torch.nn.Conv1d(4, 6, 3)
    old: Any = torch.nn.utils.weight_norm
    layer = old(convolution) if is_old else torch.nn.utils.parametrizations.weight_norm(convolution)
    for shape in ((6, 1, 1), (6,)):
        parts = {
            "weight_g": jnp.zeros(shape),
            "weight_v": jnp.zeros((6, 4, 3)),
            "bias": jnp.zeros(6),
        }
        template = {"params": {"conv": parts}}
        module = torch.nn.ModuleDict({"conv": layer})
        mapping = compare.match(module, template)
        variables = compare.torch_to_linen(module, template, mapping=mapping)
        state = module.state_dict()
        keys = sorted(key for key in state if "bias" not in key)
        for key, name in zip(keys, ("weight_g", "weight_v"), strict=True):
            found = np.asarray(variables["params"]["conv"][name])
            assert np.array_equal(found, state[key].numpy().reshape(found.shape))
        back = compare.linen_to_torch(variables, mapping=mapping)
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_parametrization_of_ones_own_is_folded_as_a_module() -> None:
    class Twice(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    folded = compare.fold(module)
    assert torch.equal(folded.weight, module.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_one_method_within_another_is_folded() -> None:
    inner = torch.nn.utils.weight_norm(torch.nn.Linear(4, 3))
    prune.random_unstructured(inner, "weight_v", 0.3)
    outer = prune.random_unstructured(torch.nn.Linear(4, 3), "weight", 0.3)
    torch.nn.utils.weight_norm(outer, "weight_orig")
    for module in (inner, outer):
        outputs = module(torch.ones(1, 4))
        folded = compare.fold(module)
        assert torch.equal(folded(torch.ones(1, 4)), outputs)
        assert folded.state_dict().keys() == {"weight", "bias"}


def test_a_recurrent_layer_that_was_called_is_folded() -> None:
    lstm = torch.nn.LSTM(4, 3)
    module = torch.nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    inputs = torch.ones(2, 1, 4)
    outputs, _ = module(inputs)
    assert torch.equal(compare.fold(module)(inputs)[0], outputs)
