"""Each framework's own dropout: its keep rate, its scale, and the independence of neighbors."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..conversion.tensors import tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical
from ..proof.cases import Framework, Trial
from ..runners.run import build_linen, build_nnx, build_torch, linen_template

SHAPES = {
    ("batch", "queries", "keys"): (64, 64, 128),
    ("batch", "heads", "queries", "keys"): (8, 8, 64, 128),
}


def check_dropout(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Apply the module's dropout to an array of ones, in training and in evaluation mode.

    The rate is the trial's; the seed is fixed.
    """
    rate = trial.config.dropout
    axes = _axes(trial)
    dropped = _drop(framework, trial, device, training=True)
    kept = dropped != 0

    def finding(name: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"dropout: {name}", framework, f"rate {rate}", agreed, why)

    yield finding("keep rate", _count_agreement(kept, 1.0 - rate), tolerances.BINOMIAL)
    if kept.any():
        scaled = dropped[kept].astype(np.float64) * (1.0 - rate)
        yield finding(
            "scale",
            agreement(scaled, np.ones_like(scaled), tolerances.dropout_scale()),
            tolerances.SCALE,
        )
    equal_probability = rate**2 + (1.0 - rate) ** 2
    for axis, name in enumerate(axes):
        # The pairs are disjoint, so they are independent of each other.
        even, odd = (
            np.take(kept, range(start, kept.shape[axis], 2), axis=axis) for start in (0, 1)
        )
        yield finding(
            f"neighbors along the {name}",
            _count_agreement(even == odd, equal_probability),
            tolerances.BINOMIAL,
        )
    evaluated = _drop(framework, trial, device, training=False)
    yield finding(
        "none in eval",
        identical(evaluated, np.ones(SHAPES[axes], dtype=np.float32)),
        tolerances.BITS,
    )


def _axes(trial: Trial) -> tuple[str, ...]:
    """Return the axes of the attention weights."""
    return next(axes for axes in SHAPES if ("heads" in axes) == bool(trial.config.num_heads))


def _count_agreement(events: np.ndarray, probability: float) -> Agreement:
    """Compare the number of true events with the binomial distribution."""
    count, expected, limit = tolerances.binomial_distance(
        int(events.sum()), events.size, probability
    )
    return agreement(np.array([count]), np.array([expected]), limit)


def _drop(framework: Framework, trial: Trial, device: str, *, training: bool) -> np.ndarray:
    """Return an array of ones after the module's dropout."""
    shape = SHAPES[_axes(trial)]
    if framework == "torch":
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            module = build_torch(trial.config, buffer=True).train(training)
            return tensor_to_numpy(module.dropout(torch.ones(shape, device=device)))
    ones = jax.device_put(jnp.ones(shape), jax.devices(device)[0])
    if framework == "nnx":
        model = build_nnx(trial.config, buffer=True)
        model.set_attributes(deterministic=not training)
        return np.asarray(model.dropout(ones))
    linen = build_linen(trial.config, buffer=True)
    buffers = {
        "buffers": {
            "mask": jnp.zeros(linen_template(trial.config, buffer=True)["buffers"]["mask"].shape)
        }
    }

    def drop(module: object) -> jax.Array:
        return module.attention_dropout(ones, deterministic=not training)  # type: ignore[attr-defined]

    return np.asarray(linen.apply(buffers, method=drop, rngs={"dropout": jax.random.key(0)}))
