"""What the multi-head class may be given, beside the library's own attention or in its programs."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import compare
import flax_impl
import torch_impl
from compare.proof.agreement import agreement

WIDTH, CONTEXT, HEADS, BATCH = 12, 10, 3, 2
SIZES: dict[str, Any] = dict(
    input_embedding_dim=WIDTH,
    output_embedding_dim=WIDTH,
    context_length=CONTEXT,
    dropout=0.0,
    num_heads=HEADS,
    qkv_bias=True,
)
RANDOM = np.random.default_rng(0)
# A constant that is added to all keys would change no weight: the three have nothing in common.
INPUTS, MEMORY, MEMORY_OF_VALUES = RANDOM.standard_normal((3, BATCH, 7, WIDTH))
BLOCKED = (RANDOM.random((BATCH, HEADS, 7, 7)) < 0.3) & ~np.eye(7, dtype=bool)
CAUSAL = np.triu(np.ones((7, 7), bool), 1)
PADDING = np.zeros((BATCH, 7), bool)
PADDING[1, 5:] = True


def close(found: Any, expected: Any) -> None:
    """Two float64 computations of outputs of this size; a wrong argument changes a first digit."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert agreement(found, expected, 1e-13 * float(np.nanmax(np.abs(expected)))).held


def torch_pair() -> tuple[Any, torch.nn.MultiheadAttention]:
    """Our module and torch's, with the same weights, in float64."""
    torch.manual_seed(0)
    ours = torch_impl.CausalMultiHeadAttention(**SIZES, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    layers = [ours.W_query, ours.W_key, ours.W_value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return ours, theirs


@pytest.mark.parametrize("average", [True, False])
def test_torch_calls_are_those_of_its_own_attention(average: bool) -> None:
    ours, theirs = torch_pair()
    inputs, key, value = map(torch.from_numpy, (INPUTS, MEMORY, MEMORY_OF_VALUES))
    causal, padding = map(torch.from_numpy, (CAUSAL, PADDING))
    blocked = torch.from_numpy(BLOCKED).flatten(0, 1)
    options = {"need_weights": True, "average_attn_weights": average}
    found = ours(inputs, key, value, padding, attn_mask=blocked, **options)
    expected = theirs(inputs, key, value, padding, attn_mask=blocked | causal, **options)
    for one, other in zip(found, expected, strict=True):
        close(one.detach(), other.detach())


def flax_arguments() -> dict[str, Any]:
    allowed = jnp.asarray(~BLOCKED & ~PADDING[:, None, None, :])
    return {
        "inputs_k": jnp.asarray(MEMORY),
        "inputs_v": jnp.asarray(MEMORY_OF_VALUES),
        "mask": allowed,
    }


def as_theirs(params: Any) -> Any:
    """Give Flax's attention our kernels: it keeps the heads apart."""
    head_dim = WIDTH // HEADS
    names = {"query": "W_query", "key": "W_key", "value": "W_value"}
    theirs = {
        name: {
            "kernel": params[ours]["kernel"].reshape(WIDTH, HEADS, head_dim),
            "bias": params[ours]["bias"].reshape(HEADS, head_dim),
        }
        for name, ours in names.items()
    }
    out = params["out_proj"]
    return {
        **theirs,
        "out": {"kernel": out["kernel"].reshape(HEADS, head_dim, WIDTH), "bias": out["bias"]},
    }


def test_linen_calls_are_those_of_its_own_attention() -> None:
    with jax.enable_x64(True):
        module = flax_impl.CausalMultiHeadAttention(**SIZES, param_dtype=jnp.float64)
        inputs, call = jnp.asarray(INPUTS), flax_arguments()
        variables = module.init(jax.random.key(0), inputs)
        found, sown = module.apply(
            variables, inputs, **call, sow_weights=True, mutable=["intermediates"]
        )
        library = nn.MultiHeadDotProductAttention(HEADS, dtype=jnp.float64, deterministic=True)
        call["mask"] &= jnp.asarray(~CAUSAL)[None, None]
        expected, theirs = library.apply(
            {"params": as_theirs(variables["params"])},
            inputs,
            **call,
            sow_weights=True,
            mutable=["intermediates"],
        )
    close(found, expected)
    (one,), (other,) = (
        jax.tree.leaves(tree["intermediates"], is_leaf=lambda leaf: isinstance(leaf, tuple))
        for tree in (sown, theirs)
    )
    close(one[0], other[0])


def test_nnx_calls_are_those_of_its_own_attention() -> None:
    with jax.enable_x64(True):
        model = flax_impl.nnx.CausalMultiHeadAttention(
            **SIZES, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        inputs, call = jnp.asarray(INPUTS), flax_arguments()
        library = nnx.MultiHeadAttention(
            HEADS, WIDTH, dtype=jnp.float64, param_dtype=jnp.float64, decode=False, rngs=nnx.Rngs(1)
        )
        nnx.update(library, nnx.State(as_theirs(nnx.to_pure_dict(nnx.state(model, nnx.Param)))))
        found, sown = nnx.capture(model, nnx.Intermediate)(inputs, **call, sow_weights=True)
        call["mask"] &= jnp.asarray(~CAUSAL)[None, None]
        captured: Any = nnx.capture(library, nnx.Intermediate)
        expected, theirs = captured(inputs, **call, sow_weights=True)
    close(found, expected)
    (one,), (other,) = jax.tree.leaves(sown), jax.tree.leaves(theirs)
    close(one, other)


def test_grouped_heads_are_torchs_own() -> None:
    torch.manual_seed(0)
    module = torch_impl.CausalMultiHeadAttention(
        12, 24, CONTEXT, 0.0, 6, num_kv_heads=2, scale=0.3, out_bias=False, dtype=torch.float64
    )
    inputs = torch.from_numpy(INPUTS)
    queries, keys, values = (
        layer(inputs).unflatten(-1, (-1, 4)).transpose(1, 2)
        for layer in (module.W_query, module.W_key, module.W_value)
    )
    context = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=0.3, enable_gqa=True
    )
    expected = module.out_proj(context.transpose(1, 2).flatten(2))
    close(module(inputs).detach(), expected.detach())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_kv_heads": 2}, "num_heads=3 cannot share num_kv_heads=2: give a number"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"num_kv_heads": True}, "num_kv_heads=True"),
        ({"scale": float("nan")}, "scale is nan; expected a finite number, or None"),
        ({"scale": "2"}, "scale is '2'"),
        ({"scale": 10**400}, "scale is 1000"),
        ({"qkv_bias": [True, False, True]}, r"qkv_bias is \[True"),
        ({"qkv_bias": (True, False)}, r"qkv_bias is \(True, False\); expected True or False"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    for build in (
        torch_impl.CausalMultiHeadAttention,
        flax_impl.CausalMultiHeadAttention,
        lambda **options: flax_impl.nnx.CausalMultiHeadAttention(**options, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match=message):
            build(**{**SIZES, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"value": (2, 7, WIDTH)}, "value is given without a key"),
        ({"key": (2, 7, WIDTH + 1)}, r"key has shape \(2, 7, 13\); expected \(\*batch"),
        ({"key": (2, CONTEXT + 1, WIDTH)}, "key has 11 tokens; the mask covers context_length=10"),
        ({"key": (2, 6, WIDTH)}, "queries, keys and values have the shapes"),
        ({"key": (2, 7, WIDTH), "value": (2, 6, WIDTH)}, "queries, keys and values have"),
        ({"mask": (7, 6)}, r"mask has shape \(7, 6\); expected \(2, 3, 7, 7\), .* or \(7, 7\)"),
        ({"mask": (2, 7, 7)}, r"mask has shape \(2, 7, 7\); expected \(2, 3, 7, 7\)"),
        ({"mask": (3, 3, 7, 7)}, r"mask has shape \(3, 3, 7, 7\); expected"),
    ],
)
def test_calls_that_do_not_fit_are_refused(given: dict[str, tuple[int, ...]], message: str) -> None:
    module = torch_impl.CausalMultiHeadAttention(**SIZES)
    names = {"mask": "attn_mask"}
    tensors = {
        names.get(name, name): torch.zeros(shape, dtype=torch.bool if name == "mask" else None)
        for name, shape in given.items()
    }
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(2, 7, WIDTH), **tensors)
    names = {"key": "inputs_k", "value": "inputs_v"}
    arrays = {names.get(name, name): jnp.ones(shape) for name, shape in given.items()}
    flax_message = message.replace("value is", "inputs_v is").replace("a key", "inputs_k")
    flax_message = flax_message.replace("key has", "inputs_k has")
    model: Any = flax_impl.nnx.CausalMultiHeadAttention(**SIZES, rngs=nnx.Rngs(0))
    linen = flax_impl.CausalMultiHeadAttention(**SIZES)
    inputs = jnp.zeros((2, 7, WIDTH))
    variables = linen.init(jax.random.key(0), inputs)
    for call in (model, lambda *args, **more: linen.apply(variables, *args, **more)):
        with pytest.raises(ValueError, match=flax_message):
            call(inputs, **arrays)


@pytest.mark.parametrize(
    "name",
    [
        *("decode", "kdim", "vdim", "in_kv_features", "qkv_features", "out_features"),
        *("normalize_qk", "attention_fn", "force_fp32_for_softmax", "add_bias_kv", "add_zero_attn"),
        *("precision", "qkv_dot_general", "broadcast_dropout", "qkv_sharding"),
        *("is_causal", "batch_first", "inputs_kv", "dropout_rng", "keep_rngs", "kernel_metadata"),
    ],
)
def test_what_is_left_out_is_not_taken(name: str) -> None:
    """torch_impl/README.md lists it; a word that is not taken is not ignored either."""
    given: dict[str, Any] = {**SIZES, name: 1}
    for build in (
        torch_impl.CausalMultiHeadAttention,
        flax_impl.CausalMultiHeadAttention,
        flax_impl.nnx.CausalMultiHeadAttention,
    ):
        with pytest.raises(TypeError, match=name):
            build(**given)


def test_a_call_that_gives_deterministic_by_its_place_is_refused() -> None:
    module, inputs = flax_impl.CausalMultiHeadAttention(**SIZES), jnp.zeros((2, 7, WIDTH))
    variables = module.init(jax.random.key(0), inputs)
    with pytest.raises(TypeError, match="inputs_k is True: give `deterministic` by its name"):
        module.apply(variables, inputs, True)


def test_the_linen_module_says_whether_weights_are_dropped() -> None:
    """`nn.remat` makes the arguments of a call arrays, so that a field has to say it."""
    inputs, rngs = jnp.ones((2, 7, WIDTH)), {"dropout": jax.random.key(1)}
    given: dict[str, Any] = {**SIZES, "dropout": 0.5}
    module = flax_impl.CausalMultiHeadAttention(**given)
    variables = module.init(jax.random.key(0), inputs)
    expected = module.apply(variables, inputs, deterministic=False, rngs=rngs)
    remat: Any = nn.remat(flax_impl.CausalMultiHeadAttention)
    found = remat(**given, deterministic=False).apply(variables, inputs, rngs=rngs)
    assert (np.asarray(found) == np.asarray(expected)).all()
    idle = module.clone(deterministic=False).apply(variables, inputs, deterministic=True)
    assert (np.asarray(idle) == np.asarray(module.apply(variables, inputs))).all()


@pytest.mark.parametrize("scale", [np.float64(0.3), np.float32(0.3), 1])
def test_a_number_of_numpy_leaves_the_dtype(scale: float) -> None:
    """On many tokens, so that the fused paths take them."""
    shape = (1, 2, 800, 4)
    ones = jnp.ones(shape, jnp.bfloat16)
    found = flax_impl.masked_attention(ones, ones, ones, flax_impl.causal_mask(800), scale=scale)
    assert found.dtype == jnp.bfloat16
    one = torch.ones(shape, dtype=torch.bfloat16)
    out = torch_impl.masked_attention(one, one, one, torch_impl.causal_mask(800), scale=scale)
    assert out.dtype == torch.bfloat16


def test_a_large_scale_stays_within_float16() -> None:
    """Multiplied by the queries, 8 * 9216 would leave the dtype."""
    heads = np.full((3, 1, 1, 800, 64), 12.0, np.float16)
    mask = flax_impl.causal_mask(800)
    for implementation in ("reference", "fused"):
        options: Any = {"implementation": implementation, "scale": 1.0}
        q, k, v = map(torch.from_numpy, heads)
        stored = torch_impl.causal_mask(800)
        assert torch_impl.masked_attention(q, k, v, stored, **options).isfinite().all()
        queries, keys, values = map(jnp.asarray, heads)
        found = flax_impl.masked_attention(queries, keys, values, mask, **options)
        assert bool(jnp.isfinite(found).all())


def test_a_row_that_is_closed_in_one_head_leaves_the_others_gradients() -> None:
    blocked = torch.zeros(1, HEADS, 7, 7, dtype=torch.bool)
    blocked[0, 1, 4] = True
    gradients: list[Any] = []
    for implementation in get_args(torch_impl.dispatch.Implementation):
        torch.manual_seed(0)
        module = torch_impl.CausalMultiHeadAttention(**SIZES, implementation=implementation)
        module(torch.from_numpy(INPUTS).float(), attn_mask=blocked).nansum().backward()
        gradients.append(module.out_proj.weight.grad)
    for found in gradients[1:]:
        assert (found.isnan() == gradients[0].isnan()).all()
    assert gradients[0].isnan().sum() == WIDTH * WIDTH // HEADS


def test_a_mask_of_the_call_has_the_batch_of_the_keys() -> None:
    module = torch_impl.CausalMultiHeadAttention(**SIZES, dtype=torch.float64)
    inputs, memory, padding = map(torch.from_numpy, (INPUTS[:1], MEMORY, PADDING))
    found = module(inputs, memory, key_padding_mask=padding)
    close(
        found.detach(),
        module(inputs.expand(2, -1, -1), memory, key_padding_mask=padding).detach(),
    )


def test_fewer_queries_take_the_librarys_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    queries, keys = torch.randn(2, 3, 150, 8).double(), torch.randn(2, 3, 180, 8).double()
    mask = torch_impl.causal_mask(180)
    found = torch_impl.masked_attention(queries, keys, keys, mask)
    assert len(calls) == 1
    expected = torch_impl.reference_attention(queries, keys, keys, mask)
    close(found, expected)


def test_nested_tensors_are_refused() -> None:
    module = torch_impl.CausalMultiHeadAttention(**SIZES)
    nested = torch.nested.nested_tensor(
        [torch.zeros(4, WIDTH), torch.zeros(6, WIDTH)], layout=torch.jagged
    )
    with pytest.raises(ValueError, match="key_padding_mask"):
        module(nested)
    with pytest.raises(ValueError, match="key_padding_mask"):
        module(torch.zeros(2, 3, WIDTH), nested)


def test_masks_of_numbers_are_refused_where_true_blocks() -> None:
    module = torch_impl.CausalMultiHeadAttention(**SIZES)
    for name, shape in (("attn_mask", (7, 7)), ("key_padding_mask", (2, 7))):
        with pytest.raises(
            ValueError, match=f"{name} has dtype torch.float32; expected torch.bool"
        ):
            module(torch.zeros(2, 7, WIDTH), **{name: torch.zeros(shape)})
        with pytest.raises(TypeError, match=f"{name} is a ndarray; expected a torch.Tensor"):
            module(torch.zeros(2, 7, WIDTH), **{name: np.zeros(shape, bool)})
    with pytest.raises(ValueError, match=r"key_padding_mask, .* has shape \(3, 1, 1, 7\)"):
        module(torch.zeros(2, 7, WIDTH), key_padding_mask=torch.zeros(3, 7, dtype=torch.bool))


def test_a_module_with_partitioned_kernels_takes_torch_weights() -> None:
    partitioned = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = flax_impl.CausalMultiHeadAttention(
        **SIZES,
        kernel_init=partitioned,
        out_kernel_init=nn.with_partitioning(nn.initializers.zeros, ("model", None)),
    )
    inputs = jnp.asarray(INPUTS, jnp.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), inputs)
    source = torch_impl.CausalMultiHeadAttention(**SIZES)
    variables = compare.torch_to_linen(source, template)
    specs: Any = nn.get_partition_spec(variables)
    assert specs["params"]["W_key"]["kernel"] == PartitionSpec(None, "model")
    assert specs["params"]["out_proj"]["kernel"] == PartitionSpec("model", None)
    assert specs["buffers"]["mask"] == PartitionSpec()
    expected = source(torch.from_numpy(np.array(inputs))).detach()
    outputs: Any = module.apply(variables, inputs)
    limit = 1e-5 * float(expected.abs().max())  # float32
    assert agreement(np.asarray(outputs), expected.numpy(), limit).held


def test_skip_init_builds_the_module_without_its_numbers() -> None:
    source = torch_impl.CausalMultiHeadAttention(**SIZES)
    module = torch.nn.utils.skip_init(torch_impl.CausalMultiHeadAttention, **SIZES)
    module.load_state_dict(source.state_dict())
    inputs = torch.from_numpy(INPUTS).float()
    assert torch.equal(module(inputs), source(inputs))


@pytest.mark.parametrize("training", [False, True])
def test_a_mask_of_the_call_takes_every_path(training: bool) -> None:
    """On many tokens torch has a kernel for it, in evaluation; the formula is the same function."""
    torch.manual_seed(0)
    module = torch_impl.CausalMultiHeadAttention(8, 8, 200, 0.0, 2, dtype=torch.float64)
    reference = torch_impl.CausalMultiHeadAttention(
        8, 8, 200, 0.0, 2, implementation="reference", dtype=torch.float64
    )
    reference.load_state_dict(module.state_dict())
    inputs = torch.randn(2, 180, 8, dtype=torch.float64)
    padding = torch.zeros(2, 180, dtype=torch.bool)
    padding[1, 150:] = True
    outputs = []
    for each in (module, reference):
        with torch.set_grad_enabled(training):
            one = inputs.clone().requires_grad_(training)
            out = each(one, key_padding_mask=padding)
        if training:
            out.square().sum().backward()
        outputs.append([out.detach(), one.grad if training else out.detach()])
    for found, expected in zip(*outputs, strict=True):
        close(found, expected)


def test_the_masks_of_a_call_are_compiled_and_exported() -> None:
    torch.manual_seed(0)
    module = torch_impl.CausalMultiHeadAttention(WIDTH, WIDTH, 200, 0.0, HEADS).eval()
    inputs, padding = torch.randn(2, 150, WIDTH), torch.zeros(2, 150, dtype=torch.bool)
    padding[1, 140:] = True
    expected = module(inputs, key_padding_mask=padding).detach()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    limit = float(expected.abs().max()) * 1e-5  # float32: a mask left out is 1e-1
    assert agreement(
        compiled(inputs, key_padding_mask=padding).detach().numpy(),
        expected.detach().numpy(),
        limit,
    ).held
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2, max=199)
    exported = torch.export.export(
        module,
        (inputs,),
        {"key_padding_mask": padding},
        dynamic_shapes={"inputs": {0: batch, 1: tokens}, "key_padding_mask": {0: batch, 1: tokens}},
    ).module()
    few, fewer = inputs[:1, :30], padding[:1, :30]
    assert agreement(
        exported(few, key_padding_mask=fewer).detach().numpy(),
        module(few, key_padding_mask=fewer).detach().numpy(),
        limit,
    ).held
