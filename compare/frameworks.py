"""The frameworks, or what stands in the place of one that is not installed.

With torch alone a module is recorded, and with JAX alone a port is judged by the record. What both
need of the other framework is to ask whether a value is one of its kinds, and none is.
"""

from typing import TYPE_CHECKING, Any

__all__ = [
    "HAS_JAX",
    "HAS_TORCH",
    "SpectralNorm",
    "Tensor",
    "TorchDispatchMode",
    "WeightNorm",
    "_disable_current_modes",
    "flatten_dict",
    "is_lazy",
    "is_parametrized",
    "jax",
    "jnp",
    "linen",
    "meta",
    "nn",
    "nnx",
    "parametrize",
    "prune",
    "remove_spectral_norm",
    "remove_weight_norm",
    "torch",
    "unflatten_dict",
]


class _Kind(type):
    """The kind of classes that stand for what is not there: each name in one is another."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or cls is Absent:
            raise AttributeError(name)
        made = _Kind(name, (Absent,), {"__module__": f"{cls.__module__}{cls.__name__}."})
        setattr(cls, name, made)
        return made


class Absent(metaclass=_Kind):
    """A framework that is not installed, or something in it. Nothing is an instance of it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        name = f"{type(self).__module__}{type(self).__name__}"
        raise ModuleNotFoundError(f"{name} is needed, but not installed", name=name)


def _absent(name: str) -> Any:
    return _Kind(name, (Absent,), {"__module__": ""})


def _inherit(nn: Any, names: tuple[str, ...], bases: tuple[str, ...]) -> None:
    """Let layers that are not there inherit from what torch's own inherit from."""
    kinds = [
        getattr(getattr(nn.modules, home), name) for home, name in (b.split(".") for b in bases)
    ]
    for name in names:
        setattr(nn, name, _Kind(name, tuple(kinds), {"__module__": "torch.nn."}))


def _never(_: object) -> bool:
    """Say that a value has no property of a framework that is not installed."""
    return False


if TYPE_CHECKING:
    HAS_TORCH = HAS_JAX = True
else:
    try:
        import torch

        HAS_TORCH = True
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        HAS_TORCH, torch = False, _absent("torch")
    try:
        import jax

        HAS_JAX = True
    except ModuleNotFoundError as error:
        if error.name != "jax":
            raise
        HAS_JAX, jax, flax = False, _absent("jax"), _absent("flax")

if TYPE_CHECKING or HAS_TORCH:
    import torch
    from torch import Tensor, nn
    from torch.nn.parameter import is_lazy
    from torch.nn.utils import parametrize, prune
    from torch.nn.utils.parametrize import is_parametrized
    from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
    from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
else:
    for names, bases in {
        ("Conv1d", "Conv2d", "Conv3d"): ("conv._ConvNd",),
        ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"): (
            "conv._ConvTransposeNd",
            "conv._ConvNd",
        ),
        ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"): (
            "batchnorm._BatchNorm",
            "batchnorm._NormBase",
        ),
        ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"): (
            "instancenorm._InstanceNorm",
            "batchnorm._NormBase",
        ),
    }.items():
        _inherit(torch.nn, names, bases)
    Tensor, nn, is_lazy, is_parametrized = torch.Tensor, torch.nn, _never, _never
    parametrize, prune = nn.utils.parametrize, nn.utils.prune
    SpectralNorm = remove_spectral_norm = WeightNorm = remove_weight_norm = Absent
    TorchDispatchMode = _disable_current_modes = Absent

if TYPE_CHECKING or HAS_JAX:
    import jax
    import jax.numpy as jnp
    from flax import linen, nnx
    from flax.core import meta
    from flax.traverse_util import flatten_dict, unflatten_dict
else:
    jnp, linen, nnx, meta = jax.numpy, flax.linen, flax.nnx, flax.core.meta
    flatten_dict, unflatten_dict = flax.flatten_dict, flax.unflatten_dict
