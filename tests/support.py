"""Helpers that several test modules share."""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
import torch

from compare.conversion.convert import StateDict, torch_to_linen, torch_to_nnx
from compare.conversion.tensors import numpy_state
from compare.proof.agreement import Agreement
from compare.proof.cases import PRIME_BIAS, Config, Framework, State
from compare.proof.parity import against_reference
from compare.report.model import Section
from compare.runners.run import (
    NnxAttention,
    TorchAttention,
    build_nnx,
    build_torch,
    linen_template,
    run,
)


def torch_module(
    config: Config = PRIME_BIAS, *, buffer: bool = True, seed: int = 0
) -> TorchAttention:
    torch.manual_seed(seed)
    return build_torch(config, buffer=buffer).eval()


def linen_variables(config: Config = PRIME_BIAS, *, buffer: bool = True) -> dict[str, Any]:
    return torch_to_linen(
        torch_module(config, buffer=buffer), linen_template(config, buffer=buffer)
    )


def nnx_model(config: Config = PRIME_BIAS, *, buffer: bool = True) -> NnxAttention:
    model = torch_to_nnx(torch_module(config, buffer=buffer), build_nnx(config, buffer=buffer))
    model.eval()
    return model


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def state_of(config: Config, dtype: str, mask: np.ndarray | None = None) -> StateDict:
    """A seeded state in this dtype, with this mask if there is one."""
    state = dict(torch_module(config).to(getattr(torch, dtype)).state_dict())
    return state if mask is None else {**state, "mask": torch.from_numpy(mask)}


def numpy_state_of(config: Config, dtype: str, mask: np.ndarray | None = None) -> State:
    """The same state as NumPy arrays."""
    return numpy_state(state_of(config, dtype, mask))


def judge(
    implementation: Framework,
    config: Config,
    state: State,
    inputs: np.ndarray,
    device: str = "cpu",
    keep: np.ndarray | None = None,
) -> Agreement:
    """Run one implementation and compare it with the reference."""
    outputs = run(implementation, config, state, inputs, device=device, keep=keep)
    return against_reference(outputs, config, state, inputs, keep)


def sections_of(parts: Iterable[Section | str]) -> list[Section]:
    """The sections that a command yields, without its progress messages."""
    return [part for part in parts if not isinstance(part, str)]


def sum_of_squares(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Add the squares of all entries, tensor by tensor."""
    return reduce(torch.add, ((tensor**2).sum() for tensor in tensors))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit: NaN payloads, -0.0 and subnormals included."""
    left, right = np.asarray(left), np.asarray(right)
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )
