"""What a torch module gives, computed here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..frameworks import Tensor, nn, torch
from .calls import Call
from .errors import PortError, random_in_inference
from .memory import LARGE, give_back
from .perturbed import FIRST, SAMPLES, Perturbed, keep_farthest
from .reference import DRAWN, Case, Exact, call_in, cotangents_of, draw, spread_of
from .result import NamedArrays, Result, is_equal
from .sketch import MAX_ENTRIES, sketched
from .torch_side import SEED, TorchSide
from .torch_trace import torch_trace
from .values import Gradients, Trace

_RANDOM = (
    "training is not compared, because the torch module draws random numbers there that are no "
    "dropout pattern"
)
_SKETCHED = (
    f"the module is large: gradients and buffers of more than {MAX_ENTRIES:,} entries are compared "
    "as weighted sums of neighbours"
)
_DTYPES = ("float32", "bfloat16", "float16")


class LiveReference:
    """A torch module that is run.

    Args:
        side: the module.
        calls: the calls.
        reduced: what gradients and state are compared as; by default as they are, or as sums if
            the module is large.
    """

    is_live = True

    def __init__(
        self,
        side: TorchSide,
        calls: Sequence[Call],
        reduced: Callable[[NamedArrays], NamedArrays] | None = None,
    ) -> None:
        self.side, self.calls = side, calls
        self.parameters = side.parameters
        self.is_large = side.size > LARGE
        self.notes: dict[str, None] = {}
        if self.is_large and reduced is None:
            self.notes[_SKETCHED], reduced = None, sketched
        self.reduced = reduced or (lambda arrays: arrays)
        # Of the last weights and call alone: a large model has no room for more.
        self.state = lru_cache(maxsize=1)(self._state)
        self.modes = lru_cache(maxsize=1)(self._modes)

    @property
    def widened(self) -> dict[str, None]:
        """The lines that ask for a narrower dtype, as far as they have run."""
        return self.side.widened.lines

    def source(self) -> nn.Module:
        """Return the module."""
        return self.side.module()

    def _state(self, weights: str) -> Mapping[str, Tensor]:
        module = drawn_again(self.side.module()) if weights == DRAWN else self.side.given
        return {
            key: tensor.detach().cpu()
            for key, tensor in module.state_dict().items()
            if isinstance(tensor, Tensor)
        }

    def _modes(self, weights: str, number: int) -> dict[bool, Result]:
        """Return what torch gives in inference, and in training if that differs."""
        run = partial(self.side.run, self.state(weights), self.calls[number], dtype="float32")
        inference, training, again = run(), run(train=True), run(seed=SEED + 1)
        if inference.is_random or not is_equal(inference, again):
            raise PortError(random_in_inference("torch", "Flax"))
        if is_equal(inference, training):
            return {False: inference}
        again = run(train=True, seed=SEED + 1)
        if training.is_random or not is_equal(training, again):
            self.notes[_RANDOM] = None
            return {False: inference}
        return {False: inference, True: training}

    def exact(self, case: Case, *, samples: int = FIRST) -> Exact:
        """Return the run in float64, and how far it moves: gradients in so many samples."""
        exact = Exact(self._in_float64(case, None), Result({}, {}, {}))
        for seed in range(SAMPLES):
            self._sample(case, exact, seed, has_gradients=seed < samples)
        if self.is_large:
            give_back()
        return exact

    def surer(self, case: Case, exact: Exact) -> NamedArrays:
        """Return how far the gradients move in all samples."""
        for seed in range(FIRST, SAMPLES):
            self._sample(case, exact, seed, has_gradients=True)
        return exact.farthest.gradients

    def _sample(self, case: Case, exact: Exact, seed: int, *, has_gradients: bool) -> None:
        moved = self._in_float64(case, Perturbed(seed), has_gradients=has_gradients)
        keep_farthest(exact.farthest, moved, exact.result)

    def _in_float64(
        self, case: Case, mode: Perturbed | None, *, has_gradients: bool = True
    ) -> Result:
        """Run the module, with its tensors and inputs moved by the mode as well."""
        state, call = self.state(case.weights), call_in(self.calls, case)
        cotangents = cotangents_of(self.modes(case.weights, case.number)[case.train].outputs)
        if mode is not None:
            inputs = {name: array.astype(np.float64) for name, array in call.floats.items()}
            for array in inputs.values():
                mode.move(numpy_to_tensor(array))
            call = call.replaced(inputs)
        result = self.side.run(
            state,
            call,
            train=case.train,
            cotangents=cotangents if has_gradients else None,
            mode=mode,
        )
        return self._reduced(result)

    def outputs(self, case: Case, dtype: str = "float64") -> NamedArrays:
        """Return the outputs in a dtype."""
        state, call = self.state(case.weights), call_in(self.calls, case)
        outputs = self.side.run(state, call, dtype=dtype, train=case.train).outputs
        if self.is_large:
            give_back()
        return outputs

    def trace(
        self, case: Case, *, has_gradients: bool = False, buffers: Sequence[str] = ()
    ) -> tuple[Trace, Gradients]:
        """Return the values of the run, and gradients by them."""
        state, call = self.state(case.weights), call_in(self.calls, case)
        cotangents = cotangents_of(self.outputs(case)) if has_gradients else None
        trace, gradients = torch_trace(
            self.side, state, call, train=case.train, cotangents=cotangents
        )
        return trace.following(buffers), gradients

    def _reduced(self, result: Result) -> Result:
        gradients, state = self.reduced(result.gradients), self.reduced(result.state)
        return replace(result, gradients=gradients, state=state)


def drawn_again(module: nn.Module) -> nn.Module:
    """Return the module with parameters drawn again, in place; buffers stay."""
    floating = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point()
    }
    arrays = {name: tensor_to_numpy(parameter) for name, parameter in floating.items()}
    spreads = {name: spread_of(array) for name, array in arrays.items()}
    with torch.no_grad():
        for name, entries in draw(spreads, arrays):
            floating[name].copy_(numpy_to_tensor(entries))
    return module


def known_dtypes(dtypes: Sequence[str]) -> tuple[str, ...]:
    """Return the working dtypes; one name is one of them.

    Raises:
        PortError: one is not known.
    """
    names = (dtypes,) if isinstance(dtypes, str) else dtypes
    if not isinstance(names, Sequence) or not all(
        isinstance(name, str) and name in _DTYPES for name in names
    ):
        raise PortError(f"dtypes is {dtypes!r}; expected names among {', '.join(_DTYPES)}")
    return tuple(names)
