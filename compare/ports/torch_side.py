"""Run copies of the torch module: outputs, gradients and state after the call."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np

from ..conversion.state_kinds import torch_kinds
from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..conversion.wrappers import without_wrapper
from ..frameworks import Tensor, nn, torch
from .calls import Call
from .dropout import SharedPatterns
from .errors import PortError, raised_by
from .perturbed import Perturbed
from .result import NamedArrays, Result
from .torch_dtypes import Widened, in_float64
from .trees import arrays_of_output

Outputs = Callable[[Any], Any]
SEED = 0  # of torch's own random operations, so that every run draws the same


class TorchSide:
    """A torch module that is run in any dtype without being changed.

    Args:
        module: the module.
        outputs: a function that is applied to what it returns.
        method: the name of the method to call.

    Attributes:
        given: the module itself.
        parameters: the names of what is trained.
        size: how many entries its state has.
        widened: where the module asks for a narrower dtype than that of a run in float64.
    """

    def __init__(self, module: nn.Module, outputs: Outputs | None, method: str | None) -> None:
        self.given = without_wrapper(module)
        state = [one for one in self.given.state_dict().values() if isinstance(one, Tensor)]
        if any(one.is_meta for one in state):
            raise PortError("the torch module is on the meta device, without data: load its state")
        self.size = sum(one.numel() for one in state)
        self._outputs, self._method = outputs, method
        self.widened = Widened()
        kinds = torch_kinds(self.given)
        self.parameters = [key for key, kind in kinds.items() if kind == "parameter"]

    def module(
        self, dtype: str | None = None, state: Mapping[str, Tensor] | None = None
    ) -> nn.Module:
        """Return a copy of the module on the CPU, with the tensors of a state dict.

        Args:
            dtype: the dtype of its floating tensors. Default: as they are.
            state: tensors to set, by their names.

        Raises:
            PortError: it cannot be copied.
        """
        try:
            module = copy.deepcopy(self.given)
        except Exception as error:  # a module may hold anything
            raise PortError(
                f"the torch module cannot be copied ({type(error).__name__}: {error}): leave what "
                "cannot be copied, such as open files and results with a gradient, out of it"
            ) from error
        module.to("cpu", None if dtype is None else getattr(torch, dtype))
        if state is not None:
            with torch.no_grad():
                for key, tensor in module.state_dict(keep_vars=True).items():
                    if key in state:
                        tensor.copy_(state[key])
        return module

    def run(
        self,
        state: Mapping[str, Tensor],
        call: Call,
        *,
        dtype: str = "float64",
        train: bool = False,
        cotangents: NamedArrays | None = None,
        mode: Perturbed | None = None,
        seed: int = SEED,
    ) -> Result:
        """Call a copy of the module.

        Args:
            state: the tensors of its state dict.
            call: the inputs.
            dtype: the dtype of floating inputs and tensors.
            train: whether in training mode.
            cotangents: what the outputs are multiplied with, by name, for gradients of the sum.
            mode: what moves the parameters and the results of the forward and the backward pass.
            seed: the seed of torch's own random operations.
        """
        module = self.module(dtype, state).train(train)
        if mode is not None:
            self._move(module, mode)
        inputs = placed_inputs(call, dtype, has_gradients=True)
        placed = call.replaced(passed(inputs))
        counts: dict[str, int] = {}
        with (
            in_float64(self.widened) if dtype == "float64" else nullcontext(),
            plain_kernels(),
            torch.random.fork_rng(devices=[]),
            _counting(module, counts),
            nullcontext() if mode is None else mode,
            SharedPatterns() as patterns,
        ):
            torch.manual_seed(seed)
            tensors = tensors_of(self.called(module, placed))
            gradients = (
                {} if cotangents is None else self._gradients(module, inputs, tensors, cotangents)
            )
        after = {
            key: tensor_to_numpy(tensor).copy()
            for key, tensor in module.state_dict().items()
            if isinstance(tensor, Tensor) and key not in self.parameters
        }
        outputs = {name: tensor_to_numpy(tensor).copy() for name, tensor in tensors.items()}
        biased = _biased(module, state, after, counts)
        return Result(outputs, gradients, after, biased, patterns.drawn, patterns.is_foreign)

    def _move(self, module: nn.Module, mode: Perturbed) -> None:
        with torch.no_grad():
            for key, tensor in module.state_dict(keep_vars=True).items():
                if key in self.parameters:
                    mode.move(tensor)

    def called(self, module: nn.Module, call: Call) -> Any:
        """Return what the module returns for tensors, as it is to be compared."""
        function = module if self._method is None else getattr(module, self._method)
        with raised_by("torch"):
            raw = function(*call.args, **call.kwargs)
            return raw if self._outputs is None else self._outputs(raw)

    def _gradients(
        self,
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        cotangents: NamedArrays,
    ) -> NamedArrays:
        """Return the gradients by parameters and floating inputs; zeros where there is none."""
        named = dict(module.named_parameters())
        variables = {key: named[key] for key in self.parameters if key in named} | {
            f"input {name}": tensor for name, tensor in inputs.items() if tensor.requires_grad
        }
        variables = {name: tensor for name, tensor in variables.items() if tensor.requires_grad}
        total = weighted_sum(outputs, cotangents)
        if not isinstance(total, Tensor) or not variables:
            return {name: np.zeros(tensor.shape) for name, tensor in variables.items()}
        found = torch.autograd.grad(total, list(variables.values()), allow_unused=True)
        return {
            name: np.zeros(tensor.shape) if gradient is None else tensor_to_numpy(gradient)
            for (name, tensor), gradient in zip(variables.items(), found, strict=True)
        }


def placed_inputs(call: Call, dtype: str, *, has_gradients: bool) -> dict[str, Tensor]:
    """Return copies of the arrays of a call as tensors, floating ones in the dtype."""
    inputs = {name: numpy_to_tensor(array.copy()) for name, array in call.arrays.items()}
    for name in call.floats:
        inputs[name] = inputs[name].to(getattr(torch, dtype)).requires_grad_(has_gradients)
    return inputs


def passed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the module is given: copies, which it may change in place."""
    return {
        name: tensor.clone() if tensor.requires_grad else tensor for name, tensor in inputs.items()
    }


def weighted_sum(outputs: Mapping[str, Tensor], cotangents: NamedArrays) -> Any:
    """Return the sum of the outputs times their cotangents; 0 if none depends on a parameter."""
    return sum(
        (outputs[name] * numpy_to_tensor(cotangents[name]).to(outputs[name].dtype)).sum()
        for name in cotangents
        if outputs[name].requires_grad
    )


def tensors_of(raw: Any) -> dict[str, Tensor]:
    """Return the tensors of an output by name, numbers as tensors."""
    named = arrays_of_output(raw, "torch", "tensor")
    return {name: _real(value) for name, value in named.items()}


def _real(value: Any) -> Tensor:
    """Return a tensor or number as a tensor of real numbers: parts of complex ones are an axis."""
    if isinstance(value, float | complex) and not isinstance(value, np.generic):
        value = torch.as_tensor(
            value, dtype=torch.result_type(torch.ones((), dtype=torch.float64), value)
        )
    tensor = torch.as_tensor(value)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@contextmanager
def _counting(module: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Count over how many entries each BatchNorm takes its statistics."""
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):

            def count(layer: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                counts[name] = args[0].numel() // max(args[0].shape[1], 1)

            handles.append(layer.register_forward_pre_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _biased(
    module: nn.Module,
    before: Mapping[str, Tensor],
    after: NamedArrays,
    counts: Mapping[str, int],
) -> NamedArrays:
    """Return the running variances after the call, had they been made of biased variances."""
    found: NamedArrays = {}
    for name, count in counts.items():
        layer = module.get_submodule(name)
        key = f"{name}.running_var" if name else "running_var"
        momentum: Any = layer.momentum
        if key in after and key in before and layer.training and momentum and count > 1:
            old = (1.0 - momentum) * tensor_to_numpy(before[key]).astype(after[key].dtype)
            found[key] = old + (after[key] - old) * (count - 1) / count
    return found


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Run torch without the fast paths that hide the values between."""
    before = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        yield
