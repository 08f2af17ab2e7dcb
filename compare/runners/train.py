"""Train with each framework's own tools: `torch.optim`, Optax, and Optax in `nnx.Optimizer`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from ..conversion.convert import linen_to_torch
from ..conversion.tensors import numpy_state, numpy_to_tensor, tensor_to_numpy
from ..proof.cases import Framework
from ..proof.reference_training import CLIP_EPS, SGD, Course, Recipe, TrainingRun
from .jax_settings import jax_on
from .run import TorchFunction, linen_apply, ready_linen, ready_nnx, ready_torch


class Trained(NamedTuple):
    """A training run, and the mask at its end."""

    run: TrainingRun
    mask: np.ndarray


def train(framework: Framework, course: Course, recipe: Recipe, device: str = "cpu") -> Trained:
    """Train one implementation on the device, "cpu" or "cuda", in the course's dtype."""
    if framework == "torch":
        return _train_torch(course, recipe, device)
    # Optax raises a float to an int32 power, which strict dtype promotion rejects.
    with jax_on(device, course.inputs.dtype), jax.numpy_dtype_promotion("standard"):
        return (_train_linen if framework == "linen" else _train_nnx)(course, recipe)


def torch_optimizer(recipe: Recipe, module: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for the module's parameters; buffers are not among them."""
    if recipe is SGD:
        return torch.optim.SGD(
            module.parameters(),
            recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
    return torch.optim.AdamW(
        module.parameters(),
        recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )


def optax_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return the same optimizer in Optax, chained with clipping and, for SGD, weight decay."""
    if recipe is SGD:
        return optax.chain(
            clip_grad_norm(recipe.max_norm),
            optax.add_decayed_weights(recipe.weight_decay),
            optax.sgd(recipe.learning_rate, momentum=recipe.momentum),
        )
    first, second = recipe.betas
    return optax.chain(
        clip_grad_norm(recipe.max_norm),
        optax.adamw(
            recipe.learning_rate, first, second, eps=recipe.eps, weight_decay=recipe.weight_decay
        ),
    )


def clip_grad_norm(max_norm: float) -> optax.GradientTransformation:
    """Clip as torch does: it adds 1e-6 to the norm, `optax.clip_by_global_norm` does not."""

    def clip(updates: Any, _parameters: Any) -> Any:
        if not jax.tree.leaves(updates):
            return updates
        with jax.numpy_dtype_promotion("standard"):
            norm = _norm(jnp.stack([_norm(update) for update in jax.tree.leaves(updates)]))
            factor = jnp.minimum(1.0, max_norm / (norm + CLIP_EPS))
            return jax.tree.map(lambda update: (update * factor).astype(update.dtype), updates)

    return optax.stateless(clip)


def _norm(values: jax.Array) -> jax.Array:
    """Return the Euclidean norm; the square of a single entry, which may overflow, is not taken."""
    return jnp.abs(values).reshape(()) if values.size == 1 else jnp.sqrt(jnp.sum(values**2))


def _train_torch(course: Course, recipe: Recipe, device: str) -> Trained:
    start = course.start
    state = {key: array.copy() for key, array in start.state.items()}  # the optimizer changes it
    module = ready_torch(start.config, state, device, None).train()
    optimizer = torch_optimizer(recipe, module)
    losses, history = [], []
    steps = (
        numpy_to_tensor(array).to(device) for array in (course.inputs, course.targets, course.keeps)
    )
    for inputs, targets, keep in zip(*steps, strict=True):
        module.dropout = TorchFunction(partial(_drop_torch, keep, start.config.dropout))  # type: ignore[assignment]
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(module(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.max_norm)
        optimizer.step()
        losses.append(loss.item())
        history.append(
            {
                name: tensor_to_numpy(value.detach()).copy()
                for name, value in module.named_parameters()
            }
        )
    return _trained(losses, history, tensor_to_numpy(module.mask.detach()))


def _drop_torch(keep: torch.Tensor, rate: float, weights: torch.Tensor) -> torch.Tensor:
    return torch.where(keep, weights / (1.0 - rate), 0.0)


def _train_linen(course: Course, recipe: Recipe) -> Trained:
    start = course.start
    _, variables = ready_linen(start.config, start.state, None)
    parameters, buffers = variables["params"], {"buffers": variables["buffers"]}
    optimizer = optax_optimizer(recipe)
    state = optimizer.init(parameters)

    @jax.jit
    def step(
        parameters: Any, buffers: Any, state: Any, inputs: Any, targets: Any, keep: Any
    ) -> Any:
        def mean_squared(parameters: Any) -> jax.Array:
            outputs = linen_apply(start.config, keep, buffer=True)(
                {"params": parameters, **buffers}, inputs
            )
            return jnp.mean((outputs - targets) ** 2)

        loss, gradient = jax.value_and_grad(mean_squared)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return loss, optax.apply_updates(parameters, updates), state

    losses, history = [], []
    for inputs, targets, keep in zip(course.inputs, course.targets, course.keeps, strict=True):
        loss, parameters, state = step(parameters, buffers, state, inputs, targets, keep)
        losses.append(float(loss))
        history.append(_torch_names(parameters))
    return _trained(losses, history, np.asarray(buffers["buffers"]["mask"]))


class _Keep(nnx.Variable):
    """The dropout pattern of the current step."""


def _train_nnx(course: Course, recipe: Recipe) -> Trained:
    start = course.start
    model = ready_nnx(start.config, start.state, None)
    pattern = _Keep(jnp.asarray(course.keeps[0]))
    model.dropout = _NnxPattern(pattern, start.config.dropout)  # type: ignore[assignment]
    optimizer = nnx.Optimizer(model, optax_optimizer(recipe), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, inputs: Any, targets: Any) -> Any:
        def mean_squared(model: Any) -> jax.Array:
            return jnp.mean((model(inputs) - targets) ** 2)

        loss, gradient = nnx.value_and_grad(mean_squared)(model)
        optimizer.update(model, gradient)
        return loss

    cached_step = nnx.cached_partial(step, model, optimizer)  # traverses the model's graph once
    losses, history = [], []
    for inputs, targets, keep in zip(course.inputs, course.targets, course.keeps, strict=True):
        pattern[...] = jnp.asarray(keep)
        losses.append(float(cached_step(inputs, targets)))
        history.append(_torch_names(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    return _trained(losses, history, np.asarray(model.mask[...]))


class _NnxPattern(nnx.Module):
    """Dropout with the pattern that is stored in a variable."""

    def __init__(self, keep: _Keep, rate: float) -> None:
        self.keep = keep
        self.rate = rate

    def __call__(self, weights: jax.Array) -> jax.Array:
        return jnp.where(self.keep[...], weights / (1.0 - self.rate), 0.0)


def _torch_names(parameters: Any) -> dict[str, np.ndarray]:
    return numpy_state(linen_to_torch({"params": parameters}))


def _trained(
    losses: list[float], history: list[dict[str, np.ndarray]], mask: np.ndarray
) -> Trained:
    stacked = {name: np.stack([parameters[name] for parameters in history]) for name in history[0]}
    return Trained(TrainingRun(np.array(losses), stacked), mask)
