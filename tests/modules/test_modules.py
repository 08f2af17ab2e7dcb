"""All classes refuse bad input, keep their framework's conventions, and obey an edited mask."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

import flax_impl
import torch_impl
from compare.conversion.convert import torch_to_linen, torch_to_nnx
from compare.conversion.tensors import numpy_to_tensor
from compare.proof.cases import PRIME_BIAS
from compare.proof.parity import against_reference
from compare.proof.rounding_bound import FLOAT64_RELATIVE
from compare.runners.run import linen_template
from compare.subprocesses import run_module
from flax_impl.attention import is_nonzero

from ..support import linen_variables, nnx_model, normal, numpy_state_of, torch_module

D, T = PRIME_BIAS.input_embedding_dim, PRIME_BIAS.context_length
NAMES = ("CausalAttentionWithBuffer", "CausalAttentionWithoutBuffers")
LINEN = flax_impl.CausalAttentionWithBuffer(**PRIME_BIAS.arguments)


def build(implementation: str, class_name: str, *arguments: Any) -> Any:
    """Construct one of the six classes."""
    if implementation == "torch":
        return getattr(torch_impl, class_name)(*arguments)
    if implementation == "linen":
        return getattr(flax_impl, class_name)(*arguments)
    return getattr(flax_impl.nnx, class_name)(*arguments, rngs=nnx.Rngs(0))


def call(implementation: str, class_name: str, shape: tuple[int, ...]) -> Any:
    module = build(implementation, class_name, D, 11, T, 0.1)
    if implementation == "torch":
        return module(torch.zeros(shape))
    if implementation == "linen":
        variables = module.init(jax.random.key(0), jnp.zeros((1, T, D)))
        return module.apply(variables, jnp.zeros(shape))
    return module(jnp.zeros(shape))


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("class_name", NAMES)
@pytest.mark.parametrize("implementation", ["torch", "linen", "nnx"])
def test_refuses_an_impossible_dropout(
    implementation: str, class_name: str, dropout: float
) -> None:
    with pytest.raises(
        ValueError, match=rf"dropout is {dropout}; a probability lies between 0 and 1"
    ):
        build(implementation, class_name, D, 11, T, dropout)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, T + 1, D),
            r"inputs have 8 tokens; the mask covers context_length=7.*context_length >= 8",
        ),
        (
            (2, 5, D + 1),
            r"inputs have shape \(2, 5, 14\); expected \(\*batch, tokens, input_embedding_dim=13\)",
        ),
        ((D,), r"inputs have shape \(13,\); expected"),
    ],
)
@pytest.mark.parametrize("class_name", NAMES)
@pytest.mark.parametrize("implementation", ["torch", "linen", "nnx"])
def test_refuses_inputs_that_do_not_fit(
    implementation: str, class_name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(implementation, class_name, shape)


@pytest.mark.parametrize("implementation", ["torch", "linen", "nnx"])
@pytest.mark.parametrize(
    "class_name", [*NAMES, "CausalMultiHeadAttention"], ids=["buffer", "plain", "heads"]
)
def test_an_unknown_implementation_is_refused_when_a_module_is_made(
    class_name: str, implementation: str
) -> None:
    package = {"torch": torch_impl, "linen": flax_impl, "nnx": flax_impl.nnx}[implementation]
    heads = {"num_heads": 1} if class_name == "CausalMultiHeadAttention" else {}
    rngs = {"rngs": nnx.Rngs(0)} if implementation == "nnx" else {}
    with pytest.raises(ValueError, match="implementation is 'flash'; expected one of"):
        getattr(package, class_name)(D, 11, T, 0.1, implementation="flash", **heads, **rngs)


def test_a_class_has_to_say_how_it_keeps_the_mask() -> None:
    arguments = D, 11, T, 0.1
    with pytest.raises(NotImplementedError):
        torch_impl.causal_attention._CausalAttention(*arguments)
    with pytest.raises(NotImplementedError):
        flax_impl.linen.causal_attention._CausalAttention(*arguments).init(
            jax.random.key(0), jnp.zeros((1, T, D))
        )
    with pytest.raises(NotImplementedError):
        flax_impl.nnx.causal_attention._CausalAttention(*arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("heads", [{}, {"num_heads": 1}], ids=["one", "heads"])
def test_without_being_asked_the_projections_have_no_bias(heads: dict[str, int]) -> None:
    name = "CausalMultiHeadAttention" if heads else "CausalAttentionWithBuffer"
    arguments = D, 11, T, 0.1
    module = getattr(torch_impl, name)(*arguments, **heads)
    linen = getattr(flax_impl, name)(*arguments, **heads)
    model = getattr(flax_impl.nnx, name)(*arguments, rngs=nnx.Rngs(0), **heads)
    variables = linen.init(jax.random.key(0), jnp.zeros((1, T, D)))
    for projection in ("W_query", "W_key", "W_value"):
        assert getattr(module, projection).bias is None
        assert getattr(model, projection).bias is None
        assert set(variables["params"][projection]) == {"kernel"}


@pytest.mark.parametrize("shape", [(T, T + 1), (5, 5), (1, 1), (T,)])
def test_refuses_a_mask_that_does_not_fit(shape: tuple[int, ...]) -> None:
    module, variables, model = torch_module(), linen_variables(), nnx_model()
    module.mask = torch.zeros(shape)
    variables["buffers"]["mask"] = jnp.zeros(shape)
    assert isinstance(model.mask, nnx.Variable)
    model.mask.set_value(jnp.zeros(shape))
    inputs = normal(2, 3, D)
    arguments: Any = dict(input_embedding_dim=D, output_embedding_dim=11, context_length=T)
    arguments |= dict(dropout=0.0, num_heads=1)
    heads = torch_impl.CausalMultiHeadAttention(**arguments)
    heads.mask = torch.zeros(shape)
    heads_nnx = flax_impl.nnx.CausalMultiHeadAttention(**arguments, rngs=nnx.Rngs(0))
    heads_nnx.mask.set_value(jnp.zeros(shape))
    heads_linen = flax_impl.CausalMultiHeadAttention(**arguments)
    heads_variables = heads_linen.init(jax.random.key(0), inputs)
    heads_variables["buffers"]["mask"] = jnp.zeros(shape)
    attempts: list[Callable[[], Any]] = [
        lambda: module(torch.from_numpy(inputs)),
        lambda: heads(torch.from_numpy(inputs)),
        lambda: heads_nnx(jnp.asarray(inputs)),
        lambda: heads_linen.apply(heads_variables, inputs),
        lambda: LINEN.apply(variables, inputs),
        lambda: model(jnp.asarray(inputs)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"mask has shape .*; context_length=7 needs \(7, 7\)"):
            attempt()


def test_the_mask_is_a_buffer_and_never_a_parameter() -> None:
    module, variables, model = torch_module(), linen_variables(), nnx_model()
    assert [name for name, _ in module.named_buffers()] == ["mask"]
    assert list(module.state_dict()) == [
        *(
            "mask",
            "W_query.weight",
            "W_query.bias",
            "W_key.weight",
            "W_key.bias",
            "W_value.weight",
            "W_value.bias",
        )
    ]
    assert variables.keys() == {"params", "buffers"}
    assert variables["buffers"].keys() == {"mask"}
    assert variables["params"].keys() == {"W_query", "W_key", "W_value"}
    assert list(nnx.state(model, flax_impl.nnx.Buffer)) == ["mask"]
    assert set(nnx.state(model, nnx.Param)) == {"W_query", "W_key", "W_value"}


def test_without_buffers_the_mask_is_no_state() -> None:
    assert "mask" not in torch_module(buffer=False).state_dict()
    assert linen_variables(buffer=False).keys() == {"params"}
    assert "mask" not in nnx.state(nnx_model(buffer=False), nnx.Variable)


def test_training_mode_follows_each_framework(device: str) -> None:
    """torch and NNX modules train until `eval()`; Linen modules are deterministic by default."""
    inputs = put(normal(3, T, D), device)
    tensor = torch.from_numpy(np.array(inputs)).to(device)
    module, model = torch_module().to(device).train(), nnx_model()
    model.train()
    trained = [module(tensor).detach().cpu().numpy() for _ in range(2)]
    trained += [np.asarray(model(inputs)) for _ in range(2)]
    for key in (0, 1):
        trained.append(
            np.asarray(
                LINEN.apply(linen_variables(), inputs, False, rngs={"dropout": jax.random.key(key)})
            )
        )
    for first, second in zip(trained[::2], trained[1::2], strict=True):
        assert not np.array_equal(first, second)
    module.eval()
    model.eval()
    for forward in (
        lambda: module(tensor).detach().cpu().numpy(),
        lambda: np.asarray(model(inputs)),
        lambda: np.asarray(LINEN.apply(linen_variables(), inputs)),
    ):
        assert np.array_equal(forward(), forward())


def put(array: np.ndarray, device: str) -> jax.Array:
    """Commit the array to the device; arrays that are not committed follow it there."""
    return jax.device_put(array, jax.devices(device)[0])


def agrees(outputs: Any, inputs: Any, mask: np.ndarray | None = None) -> bool:
    """Whether the outputs are those of the seeded module, with this mask if there is one."""
    state = numpy_state_of(PRIME_BIAS, "float32", mask)
    return against_reference(np.asarray(outputs), PRIME_BIAS, state, np.asarray(inputs)).held


def test_jit_obeys_an_edited_mask_without_recompiling(device: str) -> None:
    inputs = put(normal(2, 5, D), device)
    traces = []

    def forward(variables: dict[str, Any], inputs: jax.Array) -> Any:
        traces.append("linen")
        return LINEN.apply(variables, inputs)

    def forward_nnx(model: nnx.Module, inputs: jax.Array) -> Any:
        traces.append("nnx")
        return model(inputs)

    jitted, jitted_nnx = jax.jit(forward), nnx.jit(forward_nnx)
    variables, model = linen_variables(), nnx_model()
    for mask in (np.triu(np.ones((T, T), np.float32), k=1), np.zeros((T, T), np.float32)):
        variables["buffers"]["mask"] = jnp.asarray(mask)
        model.mask[...] = jnp.asarray(mask)
        assert agrees(jitted(variables, inputs), inputs, mask)
        assert agrees(jitted_nnx(model, inputs), inputs, mask)
    assert traces == ["linen", "nnx"]


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_not_the_mask(device: str) -> None:
    module = torch_module().double().to(device)
    module(torch.from_numpy(normal(2, 5, D)).double().to(device)).square().sum().backward()
    assert not module.mask.requires_grad
    with jax.enable_x64(True):
        inputs = put(normal(2, 5, D).astype(np.float64), device)
        variables = torch_to_linen(module, linen_template(PRIME_BIAS, buffer=True))
        model = torch_to_nnx(module, nnx_model())

        def loss(params: Any) -> jax.Array:
            outputs = LINEN.apply({**variables, "params": params}, inputs)
            assert isinstance(outputs, jax.Array)
            return jnp.square(outputs).sum()

        gradients = jax.grad(loss)(variables["params"])
        state = nnx.grad(lambda model: jnp.square(model(inputs)).sum())(model)
    assert "mask" not in state
    for name in ("W_query", "W_key", "W_value"):
        linear = getattr(module, name)
        for leaf, expected in (
            ("kernel", linear.weight.grad.cpu().numpy().T),
            ("bias", linear.bias.grad.cpu().numpy()),
        ):
            for gradient in (gradients[name][leaf], state[name][leaf][...]):
                # A key's bias shifts all scores of a row equally: its exact gradient is 0, and
                # only rounding is left.
                scale = float(linear.weight.grad.abs().max())
                assert np.abs(np.asarray(gradient) - expected).max() <= FLOAT64_RELATIVE * scale


def test_vmap_over_masks_and_inputs(device: str) -> None:
    variables, inputs = linen_variables(), put(normal(3, 2, 5, D), device)
    masks = np.stack([np.triu(np.ones((T, T), np.float32), k=k) for k in (1, 2, T)])

    def forward(mask: jax.Array, inputs: jax.Array) -> Any:
        return LINEN.apply({**variables, "buffers": {"mask": mask}}, inputs)

    mapped = jax.vmap(forward)(jnp.asarray(masks), inputs)
    for outputs, mask, example in zip(mapped, masks, inputs, strict=True):
        assert agrees(outputs, example, mask)


def test_donated_variables(device: str) -> None:
    inputs = put(normal(2, 5, D), device)
    step = jax.jit(
        lambda variables, inputs: (variables, LINEN.apply(variables, inputs)), donate_argnums=0
    )
    donated = jax.device_put(linen_variables(), jax.devices(device)[0])
    variables, outputs = step(donated, inputs)
    assert donated["buffers"]["mask"].is_deleted()
    assert agrees(outputs, inputs)
    assert agrees(step(variables, inputs)[1], inputs)


@pytest.mark.slow
def test_sharded_variables_in_a_child_process() -> None:
    """On two host devices, inputs are split by batch, kernels by column, the mask by row."""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    results = run_module("tests.modules.sharded", environment=environment)
    assert results["devices"] == 2
    assert results["round_trip"]
    assert results["placed_like_the_template"]
    assert results["sharing_refused"]
    assert results["error_over_bound"] <= 1.0


@pytest.mark.parametrize(
    "name",
    [
        *(f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")),
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float4_e2m1fn"),
        *("float16", "bfloat16", "float32", "complex64", "int8", "uint16", "bool"),
    ],
)
def test_what_blocks_is_what_is_not_zero_in_every_dtype(name: str) -> None:
    """Every code of a small dtype, and the odd numbers of a large one; NaN is not 0."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype.itemsize == 1 and dtype.kind != "b":
        codes = np.arange(16 if name.startswith("float4") else 256, dtype=np.uint8).view(dtype)
    else:
        odd = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, np.inf, np.nan]
        with np.errstate(all="ignore"):
            codes = np.array(odd if dtype.kind not in "iu" else [0, 1, 2, 127]).astype(dtype)
    if dtype.kind == "c":
        imaginary = np.zeros_like(codes)
        imaginary.imag = codes.real
        codes = np.concatenate([codes, imaginary])
    expected = np.asarray(codes.astype(np.complex64 if dtype.kind == "c" else np.float32) != 0)
    assert np.array_equal(np.asarray(is_nonzero(jnp.asarray(codes))), expected)
    if hasattr(torch, name):
        assert np.array_equal(numpy_to_tensor(codes).bool().numpy(), expected)
