"""Check that a Flax module is the same function as a torch module."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from torch import Tensor, nn

from ..conversion.mapping import KeyPath, StateMapping, require_mapping, slashed
from ..conversion.match import pair
from ..conversion.state_kinds import flax_side
from ..conversion.tensors import numpy_to_tensor
from ..proof.agreement import Finding, agreement, same_names, uncompared
from ..proof.cases import Framework
from ..runners.run import jax_on
from .adequacy import Adequacy
from .adequacy import adequacy as adequacy_of
from .calls import Call, calls_of
from .errors import PortDiffers, PortError, raised_by
from .flax_side import SEED as FLAX_SEED
from .flax_side import (
    Adapters,
    Leaves,
    Port,
    cast,
    cast_call,
    gradients_of,
    named,
    on_device,
    port_of,
)
from .perturbed import FACTOR, SAMPLES, Perturbed, deviations
from .report import Divergence, PortReport
from .result import NamedArrays, Result
from .torch_side import SEED, TorchSide
from .trace import divergence, gradient_divergence, outputs_by_name, state_divergence
from .trees import is_float
from .weights import differs_after_a_file, drawn_again, leaves_for, paired, pulled_back

FLOAT64 = (
    f"{FACTOR:g} times the farthest that torch's own values moved in {SAMPLES} runs in which each "
    "result moved by one unit in the last place (compare/ports/perturbed.py)"
)
WORKING = (
    "the float64 limit times the roundoff of the dtype over that of float64, or four times torch's "
    "own error in that dtype, whichever is larger"
)
EQUAL = "exact equality"
_BIASED = (
    "in training, torch's BatchNorm keeps the unbiased variance of a batch of n entries and Flax's "
    "the biased one, (n-1)/n of it; everything else of the running variances agrees"
)
_RANDOM = (
    "training is not compared, because the torch module draws random numbers there that are no "
    "dropout pattern"
)
_RANDOM_FLAX = (
    "training is not compared, because the Flax module draws random numbers there outside of a "
    "Dropout layer"
)
_DTYPES = ("float32", "bfloat16", "float16")
_COARSE = float(np.finfo(np.float32).eps)  # a coarser limit shows no more than float32 would
_UNSTABLE = (
    "torch's own values jump when each of its results moves by one unit in the last place: a "
    "comparison of numbers that are almost equal decides, so that agreement would show nothing; "
    "give inputs without ties"
)
_EMPTY = "torch returns no finite number, so that agreement would show nothing; give other inputs"
_PATTERNS = (
    "with dropout, the same patterns are drawn for both, by the entries "
    "(compare/ports/dropout.py), and float64 alone is compared"
)


def check_port(
    torch_module: nn.Module,
    flax_module: Any,
    inputs: Any,
    *,
    flax_inputs: Callable[..., Any] | None = None,
    outputs: Callable[[Any], Any] | Sequence[Callable[[Any], Any] | None] | None = None,
    method: str | None = None,
    train: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = ("float32",),
    adequacy: bool = False,
    mapping: StateMapping | None = None,
    **rules: Any,
) -> PortReport:
    """Check that a Flax module computes the same as a torch module, and is trained the same.

    The state of the torch module is converted, and both are run in float64 on the same inputs: with
    the weights as they are, and with weights drawn again. Outputs, the gradients by each parameter
    and each floating input, and the state after the call are compared. The limit is how far torch's
    own values move if each of its results moves by one unit in the last place. Then both are run in
    the working dtypes. Neither module is changed.

    Args:
        torch_module: the module that was ported.
        flax_module: a Linen module, or an NNX model, whose own weights do not matter.
        inputs: one call, as torch takes it: an array, a tuple of arguments, or a dict of keywords;
            or a list of calls.
        flax_inputs: a function from torch's arguments to those of Flax (one, a tuple, or a dict of
            keywords), for other layouts: `lambda images: images.transpose(0, 2, 3, 1)`. It is
            given JAX arrays that may be traced.
        outputs: a function from what the Flax module returns to what the torch module returns. A
            pair has one for torch and one for Flax.
        method: the method to call in place of the module itself.
        train: the keywords that make the Flax module train: `{"train": True}`. By default they are
            found by their usual names. An NNX model is also told by `model.train()`.
        dtypes: the working dtypes: "float32", "bfloat16", "float16".
        adequacy: whether to change the Flax module in one place after another, if it holds, and to
            say which changes these inputs would not have noticed.
        mapping: how the state pairs, from `compare.match`. By default it is paired here.
        rules: `rename`, `layouts`, `policy` and the other rules of `compare.match`.

    Returns:
        The report: whether the port holds, each comparison, and what the pass is worth.

    Raises:
        PortError: the modules cannot be compared.
        ConversionError: the state does not pair.
    """
    require_mapping(mapping)
    dtypes = known_dtypes(dtypes)
    if not isinstance(torch_module, nn.Module):
        raise PortError(
            f"torch_module is of type {type(torch_module).__name__}; expected a torch module"
        )
    ours, theirs = outputs if isinstance(outputs, Sequence) else (None, outputs)
    known = inspect.signature(pair).parameters
    if unknown := [name for name in rules if name not in known]:
        raise PortError(f"there is no argument {unknown[0]}; rules are those of compare.match")
    for module in (torch_module, flax_module):
        if method is not None and not callable(getattr(module, method, None)):
            raise PortError(f"{type(module).__name__} has no method {method!r}")
    if train is not None and not isinstance(train, Mapping):
        raise PortError(f"train is {train!r}; expected keywords, such as {{'train': True}}")
    side = TorchSide(torch_module, ours, method)
    port = port_of(flax_module, Adapters(flax_inputs, theirs, method, train))
    calls = calls_of(inputs)
    with _plain_jax("float64"):
        with raised_by("Flax"):
            template = port.template(cast_call(calls[0], "float64"))
        differing: list[str] = []
        alone: list[str] = []
        if mapping is None:
            mapping, differing, alone = paired(side.module("float64"), port.side(template), rules)
        elif rules:
            raise PortError(f"{min(rules)} has no effect beside mapping: give it to compare.match")
        judge = _Judge(side, port, template, mapping, dtypes)
        judge.suspects = _suspects(differing)
        trained = {*side.parameters, *_trained_names(template)}
        findings = [
            uncompared("parameters", port.api, name, "one side alone has it")
            for name in alone
            if name in trained
        ]
        parted: Divergence | None = None
        states = _states(side)
        for label, state in states.items():
            for index, call in enumerate(calls):
                case = label if len(calls) == 1 else f"{label}, call {index}"
                findings += judge.findings(state, call, index, case)
                if parted is None and judge.differs:
                    parted = judge.divergence(state, call)
        failed = {
            check: [one.case for one in findings if one.check == check and not one.held]
            for check in ("gradients", "state")
        }
        if parted is None and failed["gradients"]:
            trains = _in_training_alone(failed["gradients"])
            parted = judge.gradient_divergence(states["drawn again"], calls[0], train=trains)
        if parted is None and failed["state"]:
            trains = _in_training_alone(failed["state"])
            names = {case.rpartition(", ")[2] for case in failed["state"]}
            parted = judge.state_divergence(states["as given"], calls[0], names, train=trains)
        is_held = all(finding.held for finding in findings)
        worth = judge.adequacy(states["drawn again"], calls) if adequacy and is_held else None
    notes = [f"the layers say it differently: {line}" for line in differing]
    notes += [
        f"one side alone has {name}, which is not trained: the other computes it, or lacks it"
        for name in alone
        if name not in trained
    ]
    notes += judge.notes
    return PortReport(tuple(findings), parted, tuple(notes), judge.slip, judge.ulps, worth)


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


def assert_port(torch_module: nn.Module, flax_module: Any, inputs: Any, **options: Any) -> None:
    """Raise PortDiffers with the report's text unless the port holds; see `check_port`.

    Raises:
        PortDiffers: something differs. It is an AssertionError.
    """
    report = check_port(torch_module, flax_module, inputs, **options)
    if not report.held:
        raise PortDiffers(str(report))


def _in_training_alone(cases: Iterable[str]) -> bool:
    return not any(", inference" in case for case in cases)


def _trained_names(template: Any) -> set[str]:
    side = flax_side(template)
    return {slashed(path) for path, kind in side.kinds.items() if kind == "parameter"}


def _suspects(differing: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return the arguments in Flax that differ, by the last step of their layer's name."""
    found: dict[str, frozenset[str]] = {}
    for line in differing:
        name, _, where = line.partition(": ")
        step = name.rpartition(".")[0].rpartition(".")[2]
        words = frozenset(re.findall(r"(\w+)=", where))
        found[step] = found.get(step, frozenset()) | words
    return found


def _states(side: TorchSide) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts to try, in float64, by what they are."""
    return {
        "as given": _tensors(side.module("float64")),
        "drawn again": _tensors(drawn_again(side.module("float64"))),
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        key: tensor.detach()
        for key, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }


class _Judge:
    """Compares the two modules on one state and one call after another."""

    def __init__(
        self,
        side: TorchSide,
        port: Port,
        template: Any,
        mapping: StateMapping,
        dtypes: Sequence[str],
    ) -> None:
        self.side, self.port, self.template, self.mapping = side, port, template, mapping
        self.dtypes = dtypes
        self.slip = self.ulps = 0.0
        self.differs = self.trained_when_differing = False
        self.notes: dict[str, None] = {}
        self.suspects: dict[str, frozenset[str]] = {}
        self._compiled: dict[tuple[int, bool], Callable[..., Any]] = {}
        self._number = 0  # of the call
        self._limits: dict[int, NamedArrays] = {}  # of the outputs in inference, by the call
        self.trained: list[KeyPath] = [
            row.path for row in mapping.rows if row.torch_key in side.parameters
        ]

    def findings(
        self, state: Mapping[str, Tensor], call: Call, number: int, label: str
    ) -> Iterator[Finding]:
        """Yield what was found with these weights and the inputs of the call of this number."""
        self._number = number
        leaves = leaves_for(self.port, self.template, state, self.mapping)
        lost = differs_after_a_file(state, self.port, self.template, self.mapping, leaves)
        reason = f"lost: {', '.join(lost)}" if lost else ""
        yield Finding("checkpoint", self.port.api, label, same_names(lost, ()), EQUAL, reason)
        for train in self._modes(state, call):
            case = f"{label}, {'training' if train else 'inference'}"
            for finding in self._in_float64(state, leaves, call, case, train=train):
                is_told = finding.error in (_EMPTY, _UNSTABLE)
                if finding.check == "outputs" and not (finding.held or is_told or self.differs):
                    self.differs, self.trained_when_differing = True, train
                yield finding

    def _modes(self, state: Mapping[str, Tensor], call: Call) -> tuple[bool, ...]:
        """Return in which modes the modules are compared: also in training, if that differs."""
        inference, training = (self.side.run(state, call, train=train) for train in (False, True))
        again = self.side.run(state, call, seed=SEED + 1)
        if inference.is_random or not _is_equal(inference, again):
            raise PortError(
                "the torch module draws random numbers in inference, which Flax cannot draw alike: "
                "pass them as an input, or fix them"
            )
        if _is_equal(inference, training):
            return (False,)
        again = self.side.run(state, call, train=True, seed=SEED + 1)
        if training.is_random or not _is_equal(training, again):
            self.notes[_RANDOM] = None
            return (False,)
        return (False, True)

    def divergence(self, state: Mapping[str, Tensor], call: Call) -> Divergence:
        """Return where the outputs part first."""
        train = self.trained_when_differing
        leaves, double = self._doubled(state, call)
        return divergence(
            self.side, self.port, state, leaves, double, train=train, suspects=self.suspects
        )

    def _doubled(self, state: Mapping[str, Tensor], call: Call) -> tuple[Leaves, Call]:
        """Return Flax's leaves for the state, and the call, in float64."""
        leaves = leaves_for(self.port, self.template, state, self.mapping)
        return cast(leaves, "float64"), cast_call(call, "float64")

    def state_divergence(
        self, state: Mapping[str, Tensor], call: Call, names: Collection[str], *, train: bool
    ) -> Divergence:
        """Return where the buffers of these names part first."""
        leaves, double = self._doubled(state, call)
        changed = {row.torch_key: row.path for row in self.mapping.rows if row.torch_key in names}
        return state_divergence(
            self.side,
            self.port,
            state,
            leaves,
            double,
            changed,
            train=train,
            suspects=self.suspects,
        )

    def gradient_divergence(
        self, state: Mapping[str, Tensor], call: Call, *, train: bool
    ) -> Divergence | None:
        """Return where the gradients part first."""
        leaves, double = self._doubled(state, call)
        cotangents = _cotangents(self.side.run(state, call, train=train).outputs)
        return gradient_divergence(
            self.side, self.port, state, leaves, double, cotangents, train=train
        )

    def adequacy(self, state: Mapping[str, Tensor], calls: Sequence[Call]) -> Adequacy:
        """Return what the calls notice of changes of the Flax module, in inference."""
        leaves = cast(leaves_for(self.port, self.template, state, self.mapping), "float64")
        doubled = [cast_call(call, "float64") for call in calls]
        functions = [outputs_by_name(self.port, call, train=False) for call in doubled]
        return adequacy_of(functions, leaves, doubled, [self._limits[n] for n in range(len(calls))])

    def _in_float64(
        self, state: Mapping[str, Tensor], leaves: Leaves, call: Call, case: str, *, train: bool
    ) -> Iterator[Finding]:
        cotangents = _cotangents(self.side.run(state, call, train=train).outputs)
        exact = self.side.run(state, call, train=train, cotangents=cotangents)

        def perturbed(mode: Perturbed) -> Result:
            moved = {
                key: mode.moved(tensor) if key in self.side.parameters else tensor
                for key, tensor in state.items()
            }
            inputs = {
                name: mode.moved(numpy_to_tensor(array.astype(np.float64))).numpy()
                for name, array in call.floats.items()
            }
            return self.side.run(
                moved,
                call.replaced(inputs),
                train=train,
                cotangents=cotangents,
                within=lambda: mode,
            )

        doubled, double = cast(leaves, "float64"), cast_call(call, "float64")
        found = self._flax(doubled, double, cotangents, train)
        if exact.drawn:
            again = self._flax(doubled, double, cotangents, train, FLAX_SEED + 1)
            if not _is_equal(found, again):
                self.notes[_RANDOM_FLAX] = None
                return
            self.notes[_PATTERNS] = None
        moved = deviations(perturbed, exact)
        expected = replace(exact, state=self._variances(exact, found, moved))
        if not any(map(shows, exact.outputs.values())):
            yield uncompared("outputs", self.port.api, case, _EMPTY)
        for what in ("outputs", "gradients", "state"):
            limits = {name: FACTOR * size for name, size in getattr(moved, what).items()}
            scale = max(map(largest, getattr(exact, what).values()), default=0.0)
            if unstable := [name for name in limits if limits[name] > _COARSE * scale]:
                for name in unstable:
                    yield uncompared(what, self.port.api, f"{case}, {name}", _UNSTABLE)
                continue
            yield from compared(
                self.port.api,
                what,
                case,
                getattr(found, what),
                getattr(expected, what),
                limits,
                FLOAT64,
            )
        if not train:
            self._limits[self._number] = {
                name: FACTOR * size for name, size in moved.outputs.items()
            }
        self._measure(found.outputs, exact.outputs, moved.outputs)
        eager = self._eager(doubled, double, train)
        limits = {name: FACTOR * size for name, size in moved.outputs.items()}
        yield from compared(self.port.api, "jit", case, eager, found.outputs, limits, FLOAT64)
        for dtype in () if exact.drawn else self.dtypes:
            yield from self._in_dtype(dtype, state, leaves, call, case, exact, moved, train=train)

    def _variances(self, exact: Result, found: Result, moved: Result) -> NamedArrays:
        """Return the state that is expected, with Flax's running variances where Flax has them.

        Of a batch, torch's BatchNorm keeps the unbiased variance, and Flax's the biased one. No
        argument of either changes that, so it is a note and not a difference.
        """
        state = dict(exact.state)
        for name, biased in exact.biased.items():
            other = found.state.get(name)
            limit = FACTOR * moved.state[name]
            if (
                other is not None
                and other.shape == biased.shape
                and not agreement(other, state[name], limit).held
                and agreement(other, biased, limit).held
            ):
                state[name] = biased
                self.notes[_BIASED] = None
        return state

    def _in_dtype(
        self,
        dtype: str,
        state: Mapping[str, Tensor],
        leaves: Leaves,
        call: Call,
        case: str,
        exact: Result,
        moved: Result,
        *,
        train: bool,
    ) -> Iterator[Finding]:
        own = self.side.run(state, call, dtype=dtype, train=train)
        with _plain_jax(dtype):
            outputs = self._eager(cast(leaves, dtype), cast_call(call, dtype), train)
        growth = float(jax.numpy.finfo(dtype).eps) / float(np.finfo(np.float64).eps)
        limits = {}
        for name, array in exact.outputs.items():
            limit = FACTOR * float(moved.outputs[name]) * growth
            if name in own.outputs and own.outputs[name].shape == array.shape:
                error = np.abs(own.outputs[name].astype(np.float64) - array)
                limit = max(
                    limit, 4.0 * float(np.where(np.isfinite(error), error, 0.0).max(initial=0.0))
                )
            limits[name] = np.array(limit)
        yield from compared(
            self.port.api, f"outputs in {dtype}", case, outputs, exact.outputs, limits, WORKING
        )

    def _flax(
        self,
        leaves: Leaves,
        call: Call,
        cotangents: NamedArrays,
        train: bool,
        seed: int = FLAX_SEED,
    ) -> Result:
        def run(
            leaves: Leaves, arrays: dict[str, Any], cotangents: dict[str, Any], seed: Any
        ) -> Any:
            floats = {name: arrays[name] for name in call.floats}
            placed = call.replaced(arrays)
            return gradients_of(
                self.port, leaves, self.trained, placed, floats, cotangents, train=train, seed=seed
            )

        compiled = self._compiled.setdefault((self._number, train), jax.jit(run))
        with raised_by("Flax"):
            outputs, after, by_params, by_inputs = compiled(leaves, call.arrays, cotangents, seed)
        gradients = pulled_back(self.mapping, by_params) | {
            f"input {name}": np.asarray(gradient) for name, gradient in by_inputs.items()
        }
        state = {path: leaf for path, leaf in after.items() if path not in self.trained}
        return Result(_host(outputs), gradients, pulled_back(self.mapping, state))

    def _eager(self, leaves: Leaves, call: Call, train: bool) -> NamedArrays:
        with raised_by("Flax"):
            raw, _ = self.port.apply(leaves, call.replaced(on_device(call.arrays)), train=train)
        return _host(named(raw))

    def _measure(self, found: NamedArrays, exact: NamedArrays, moved: NamedArrays) -> None:
        for name, array in exact.items():
            if name not in found or found[name].shape != array.shape or not is_float(array):
                continue
            size = largest(array)
            if not size:
                which = f"output {name}" if name else "the output"
                self.notes[f"{which} has no finite entry but 0, which shows little"] = None
                continue
            unit = size * float(np.finfo(np.float64).eps)
            with np.errstate(invalid="ignore"):
                difference = np.abs(found[name].astype(np.float64) - array)
            self.ulps = max(self.ulps, float(np.nanmax(difference, initial=0.0)) / unit)
            self.slip = max(self.slip, FACTOR * float(moved[name]) / size)


def compared(
    api: Framework,
    what: str,
    case: str,
    found: NamedArrays,
    expected: NamedArrays,
    limits: NamedArrays,
    why: str,
) -> Iterator[Finding]:
    """Yield a finding for each array: entry by entry, with names and shapes."""
    if what.startswith("outputs") and found.keys() != expected.keys():
        raise PortError(
            f"torch returns {_listed(expected)}, and Flax {_listed(found)}: pass outputs=, a "
            "function from what Flax returns to what torch returns"
        )
    for name, array in expected.items():
        title = f"{case}{f', {name}' if name else ''}"
        if name not in found:
            if what in ("outputs", "gradients"):
                yield uncompared(what, api, title, "Flax has none")
            continue
        other = found[name]
        if other.shape != array.shape:
            reason = f"the shape is {other.shape} in Flax and {array.shape} in torch"
            yield uncompared(what, api, title, reason)
        elif what.startswith("outputs") and _kind(other) != _kind(array):
            reason = f"the dtype is {other.dtype} in Flax and {array.dtype} in torch"
            yield uncompared(what, api, title, reason)
        elif array.size:
            limit = limits.get(name) if is_float(array) else None
            agreed = agreement(other, array, 0.0 if limit is None else float(limit))
            yield Finding(what, api, title, agreed, EQUAL if limit is None else why)


def _listed(arrays: NamedArrays) -> str:
    names = ", ".join(name or "one array" for name in arrays)
    return f"{len(arrays)} arrays ({names})" if len(arrays) > 1 else "one array"


def _kind(array: np.ndarray) -> str:
    """Return whether entries are floating, whole numbers or truth values."""
    return "float" if is_float(array) else "bool" if array.dtype == bool else "whole"


def shows(array: np.ndarray) -> bool:
    """Return whether an array has an entry that can differ from another number."""
    return bool(array.size) and (not is_float(array) or bool(np.isfinite(array).any()))


def largest(array: np.ndarray) -> float:
    """Return the size of the largest finite entry."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def _cotangents(outputs: NamedArrays) -> NamedArrays:
    random = np.random.default_rng(1)
    return {
        name: random.standard_normal(array.shape)
        for name, array in outputs.items()
        if is_float(array)
    }


def _is_equal(one: Result, other: Result) -> bool:
    return all(
        np.array_equal(array, getattr(other, part).get(name), equal_nan=array.dtype.kind == "f")
        for part in ("outputs", "state")
        for name, array in getattr(one, part).items()
        if not name.endswith("num_batches_tracked")
    )


def _host(arrays: Mapping[str, Any]) -> NamedArrays:
    return {name: np.asarray(array) for name, array in arrays.items()}


@contextmanager
def _plain_jax(dtype: str) -> Iterator[None]:
    """Run JAX on the CPU for a dtype, with x64 for float64, and without TF32.

    A module that is run in another dtype than its own needs JAX's usual promotions.
    """
    with (
        jax_on("cpu", np.float64 if dtype == "float64" else np.float32),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
