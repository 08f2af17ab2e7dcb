"""What must be equal bit for bit if a multi-head module is given an argument in another form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

import flax_impl
import torch_impl

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..dtypes import numpy_dtype
from ..proof.cases import Config, Framework, Trial
from ..runners.jax_settings import jax_on
from ..runners.run import build_linen, ready_linen, ready_nnx, ready_torch

Pair = tuple[np.ndarray, np.ndarray]  # what was found, and what is expected


def _torch_facts(trial: Trial) -> dict[str, Pair]:
    """Return the facts of masks, weights, dtype and device in PyTorch."""
    module: Any = ready_torch(trial.config, trial.state, "cpu", None)
    inputs = numpy_to_tensor(trial.inputs)
    batch, tokens, _ = inputs.shape
    heads = trial.config.num_heads or 1
    random = np.random.default_rng(4)
    pairs = torch.from_numpy(random.random((batch, heads, tokens, tokens)) < 0.3)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[0, 1:3] = True
    wide = padding[:, None, None]
    with torch.no_grad():
        found = {
            "padding": (
                module(inputs, key_padding_mask=padding),
                module(inputs, attn_mask=wide),
            ),
            "both masks": (
                module(inputs, attn_mask=pairs, key_padding_mask=padding),
                module(inputs, attn_mask=pairs | wide),
            ),
            "one axis of batch and heads": (
                module(inputs, attn_mask=pairs.flatten(0, 1)),
                module(inputs, attn_mask=pairs),
            ),
            "no batch, padding": (
                module(inputs[0], key_padding_mask=padding[0]),
                module(inputs[0], attn_mask=wide[0]),
            ),
            "a key alone": (module(inputs, inputs + 1), module(inputs, inputs + 1, inputs + 1)),
            "the mean of the weights": (
                module(inputs, need_weights=True)[1],
                module(inputs, need_weights=True, average_attn_weights=False)[1].mean(-3),
            ),
        }
        dropped: Any = ready_torch(trial.config, trial.state, "cpu", trial.keep)
        _, weights = dropped(inputs, need_weights=True, average_attn_weights=False)
    arrays = {
        name: (tensor_to_numpy(one), tensor_to_numpy(other)) for name, (one, other) in found.items()
    }
    arrays["weights after dropout"] = tensor_to_numpy(weights != 0), _kept(trial)
    return {**arrays, **_torch_factory(trial.config)}


def _torch_factory(config: Config) -> dict[str, Pair]:
    """Return what `device` and `dtype` do."""
    build = torch_impl.CausalMultiHeadAttention
    half = build(**config.arguments, dtype=torch.bfloat16).state_dict()
    abstract = build(**config.arguments, device="meta").state_dict()
    dtypes = {str(tensor.dtype) for name, tensor in half.items() if name != "mask"}
    return {
        "dtype of the parameters": _is(dtypes == {"torch.bfloat16"}),
        "dtype of the mask": _is(half["mask"].dtype == torch.float32),
        "device": _is({tensor.device.type for tensor in abstract.values()} == {"meta"}),
    }


def _linen_facts(trial: Trial) -> dict[str, Pair]:
    """Return the facts of masks, dropout, dtypes and initializers in Linen."""
    config, inputs = trial.config, trial.inputs
    module: Any = build_linen(config, buffer=True)
    with jax_on("cpu", np.float64):
        apply, variables = ready_linen(config, trial.state, None)
        dropped, _ = ready_linen(config, trial.state, trial.keep)
        masks = [apply(variables, inputs, mask=mask) for mask in _equal_masks(trial)]
        _, sown = dropped(variables, inputs, sow_weights=True, mutable=["intermediates"])
    weights = sown["intermediates"]["attention_weights"][0]
    _, wide = ready_linen(config, trial.rounded("float32").state, None)
    _, half = ready_linen(config, trial.rounded("bfloat16").state, None)
    first = jnp.asarray(inputs, jnp.float32)
    computed = module.clone(dtype=jnp.bfloat16).apply(wide, first)
    made = module.clone(**INITIALIZERS, param_dtype=jnp.bfloat16).init(jax.random.key(0), first)
    partitioned = linen.with_partitioning(linen.initializers.ones, (None, "model"))
    abstract = jax.eval_shape(module.clone(kernel_init=partitioned).init, jax.random.key(0), first)
    return {
        "a mask of numbers": (np.asarray(masks[0]), np.asarray(masks[1])),
        "weights after dropout": (np.asarray(weights) != 0, _kept(trial)),
        "dtype": (np.asarray(computed), np.asarray(module.apply(half, first.astype("bfloat16")))),
        "initializers": _initialized(config, made["params"]),
        "the mask's dtype": _is(made["buffers"]["mask"].dtype == jnp.float32),
        "partitioned kernels": _is(
            linen.get_partition_spec(abstract)["params"]["W_query"]["kernel"] == SPEC
        ),
    }


def _nnx_facts(trial: Trial) -> dict[str, Pair]:
    """Return the facts of masks, dropout, dtypes and initializers in NNX."""
    config, inputs = trial.config, trial.inputs
    build: Any = flax_impl.nnx.CausalMultiHeadAttention
    with jax_on("cpu", np.float64):
        model: Any = ready_nnx(config, trial.state, None)
        dropped: Any = ready_nnx(config, trial.state, trial.keep)
        masks = [model(jnp.asarray(inputs), mask=mask) for mask in _equal_masks(trial)]
        captured: Any = nnx.capture(dropped, nnx.Intermediate)
        _, sown = captured(jnp.asarray(inputs), sow_weights=True)
        weights = nnx.to_pure_dict(sown)["attention_weights"][0]
    first = jnp.asarray(inputs, jnp.float32)
    wide, half = (ready_nnx(config, trial.rounded(d).state, None) for d in ("float32", "bfloat16"))
    computing = build(**config.arguments, dtype=jnp.bfloat16, deterministic=True, rngs=nnx.Rngs(0))
    nnx.update(computing, nnx.state(wide, (nnx.Param, flax_impl.nnx.Buffer)))
    made = build(**config.arguments, **INITIALIZERS, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    partitioned = nnx.with_partitioning(nnx.initializers.ones, (None, "model"))
    with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        sharded = build(**config.arguments, kernel_init=partitioned, rngs=nnx.Rngs(0))
    specs: Any = nnx.get_partition_spec(nnx.state(sharded, nnx.Param))
    return {
        "a mask of numbers": (np.asarray(masks[0]), np.asarray(masks[1])),
        "weights after dropout": (np.asarray(weights) != 0, _kept(trial)),
        "dtype": (np.asarray(computing(first)), np.asarray(half(first.astype("bfloat16")))),
        "initializers": _initialized(config, nnx.to_pure_dict(nnx.state(made, nnx.Param))),
        "the mask's dtype": _is(made.mask.dtype == jnp.float32),
        "partitioned kernels": _is(specs["W_query"]["kernel"].get_value() == SPEC),
        "a mode from the start": _is(
            computing.dropout.deterministic and not made.dropout.deterministic
        ),
        **_nnx_dropout(wide, first),
    }


def _nnx_dropout(model: Any, inputs: jax.Array) -> dict[str, Pair]:
    """Return what `deterministic` and `rngs` of a call do; the module is in evaluation mode."""

    def training(seed: int) -> np.ndarray:
        return np.asarray(model(inputs, deterministic=False, rngs=nnx.Rngs(seed)))

    evaluated, count = np.asarray(model(inputs)), int(model.dropout.rngs.count[...])
    trained, again = training(3), training(3)
    facts = {
        "dropout of the call's streams": (trained, again),
        "dropout of other streams": _is(bool((trained != training(4)).any())),
        "dropout asked for": _is(bool((trained != evaluated).any())),
        "the module's stream is not drawn from": _is(int(model.dropout.rngs.count[...]) == count),
    }
    model.train()
    facts["no dropout asked for"] = np.asarray(model(inputs, deterministic=True)), evaluated
    model.eval()
    return facts


SPEC = jax.sharding.PartitionSpec(None, "model")
INITIALIZERS: dict[str, Any] = {
    "kernel_init": jax.nn.initializers.constant(2.0),
    "bias_init": jax.nn.initializers.constant(3.0),
    "out_kernel_init": jax.nn.initializers.constant(4.0),
    "out_bias_init": jax.nn.initializers.constant(5.0),
}


def _initialized(config: Config, params: Any) -> Pair:
    """Return the smallest and largest entry of each bfloat16 parameter, and as INITIALIZERS say."""
    found, expected = [], []
    for layer, (_, _, has_bias) in config.layers.items():
        values = (
            {"kernel": 4.0, "bias": 5.0} if layer == "out_proj" else {"kernel": 2.0, "bias": 3.0}
        )
        for name in ("kernel", "bias") if has_bias else ("kernel",):
            array = np.asarray(params[layer][name])
            found += [array.min(), array.max()]
            expected += [values[name]] * 2
    return np.asarray(found), np.asarray(expected, numpy_dtype("bfloat16"))


def _equal_masks(trial: Trial) -> tuple[jax.Array, jax.Array]:
    """Return a mask of numbers, and the same mask of flags."""
    batch, tokens, _ = trial.inputs.shape
    flags = np.random.default_rng(4).random((batch, 1, 1, tokens)) < 0.7
    return jnp.asarray(flags * 2.5, jnp.float32), jnp.asarray(flags)


def _kept(trial: Trial) -> np.ndarray:
    """Return which weights are neither blocked nor dropped."""
    tokens = trial.inputs.shape[1]
    assert trial.keep is not None
    return trial.keep & (trial.mask[:tokens, :tokens] == 0)


def _is(fact: bool) -> Pair:
    return np.array([bool(fact)]), np.array([True])


ARGUMENT_FACTS: dict[Framework, Callable[[Trial], dict[str, Pair]]] = {
    "torch": _torch_facts,
    "linen": _linen_facts,
    "nnx": _nnx_facts,
}
