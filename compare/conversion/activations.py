"""Compare an activation of torch with the function that an NNX model stores for it."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..frameworks import jax, linen, nn, nnx, torch
from .difference import Difference

# Between what float32 rounds in a function of one number and what another function differs by.
_ROUNDING = float(np.sqrt(np.finfo(np.float32).eps))
_LAYERS = (linen.Module, nnx.Module)
# Activations that compute each entry from this entry alone.
_OF_ENTRIES = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
    *(nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU),
    *(nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
    nn.Threshold,
)


# torch's activation: the name of Flax's function, torch's argument, Flax's argument, its default.
_ACTIVATIONS: tuple[tuple[type[nn.Module], str, str, str, Any], ...] = (
    (nn.GELU, "gelu", "approximate", "approximate", True),
    (nn.LeakyReLU, "leaky_relu", "negative_slope", "negative_slope", 0.01),
    (nn.ELU, "elu", "alpha", "alpha", 1.0),
    (nn.CELU, "celu", "alpha", "alpha", 1.0),
)


# torch's activation: the names of Flax's functions that compute the same, the first the usual one.
_FUNCTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.CELU: ("celu",),
    nn.ELU: ("elu",),
    nn.GELU: ("gelu",),
    nn.GLU: ("glu",),
    nn.Hardsigmoid: ("hard_sigmoid",),
    nn.Hardswish: ("hard_silu", "hard_swish"),
    nn.Hardtanh: ("hard_tanh",),
    nn.LeakyReLU: ("leaky_relu",),
    nn.LogSigmoid: ("log_sigmoid",),
    nn.LogSoftmax: ("log_softmax",),
    nn.Mish: ("mish",),
    nn.ReLU: ("relu",),
    nn.ReLU6: ("relu6",),
    nn.SELU: ("selu",),
    nn.Sigmoid: ("sigmoid",),
    nn.SiLU: ("silu", "swish"),
    nn.Softmax: ("softmax",),
    nn.Softmax2d: ("softmax",),
    nn.Softmin: (),
    nn.Softplus: ("softplus",),
    nn.Softsign: ("soft_sign",),
    nn.Tanh: ("tanh",),
}
_KNOWN_FUNCTIONS = {name for names in _FUNCTIONS.values() for name in names}


def activation_differences(layer: nn.Module, function: Any) -> Iterator[Difference]:
    """Compare an activation of torch with a function of Flax, or a `partial` of it.

    What is known of both is compared first. If that says nothing, and the activation is one of
    single entries, both are computed.
    """
    known = list(_known_differences(layer, function))
    yield from known
    if not known and isinstance(layer, _OF_ENTRIES) and not isinstance(function, _LAYERS):
        yield from _computed_difference(layer, function)


def _computed_difference(layer: nn.Module, function: Any) -> Iterator[Difference]:
    """Compute both for numbers around 0; a function that takes no array is none of these."""
    numbers = np.linspace(-8.0, 8.0, 120, dtype=np.float32).reshape(2, 3, 20)
    try:
        with torch.no_grad():
            ours = copy.deepcopy(layer).eval()(torch.from_numpy(numbers.copy())).numpy()
        theirs = np.asarray(function(jax.numpy.asarray(numbers)))
    except Exception:  # the function may be anything
        return
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, _ROUNDING, _ROUNDING):
        found = getattr(function, "__name__", type(function).__name__)
        yield Difference(
            "type",
            str(layer),
            found,
            "give a function that computes the same in Flax",
        )


def _known_differences(layer: nn.Module, function: Any) -> Iterator[Difference]:
    """Compare by names and arguments, so that the mend can be told."""
    keywords: Mapping[str, Any] = {}
    if isinstance(function, partial):
        function, keywords = function.func, function.keywords
    found, wanted_names = getattr(function, "__name__", ""), _FUNCTIONS.get(type(layer))
    if wanted_names is not None and found in _KNOWN_FUNCTIONS and found not in wanted_names:
        usual = f"nnx.{wanted_names[0]}" if wanted_names else "a function that computes the same"
        mend = f"give {usual} in Flax"
        yield Difference("type", type(layer).__name__, found, mend)
    if isinstance(layer, nn.Softplus) and found == "softplus" and layer.beta != 1:
        yield Difference("beta", f"beta={layer.beta!r}", "softplus, of beta=1", "scale it in Flax")
    for layer_type, name, fact, flax_name, default in _ACTIVATIONS:
        if isinstance(layer, layer_type) and getattr(function, "__name__", "") == name:
            ours, theirs = getattr(layer, fact), keywords.get(flax_name, default)
            wanted = ours == "tanh" if layer_type is nn.GELU else ours
            if wanted != theirs:
                yield Difference(
                    fact,
                    f"{fact}={ours!r}",
                    f"{flax_name}={theirs!r}",
                    f"give partial({name}, {flax_name}={wanted!r}) in Flax",
                )
