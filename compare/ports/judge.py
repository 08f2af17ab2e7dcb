"""Compare the two modules on one state and one call after another."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from ..conversion.mapping import KeyPath, StateMapping
from ..frameworks import jax
from ..proof.agreement import Finding, agreement, same_names, uncompared
from ..runners.jax_settings import jax_on
from .adequacy import Adequacy, Asked
from .adequacy import adequacy as adequacy_of
from .calls import Call
from .errors import PortError, raised_by, random_in_inference
from .findings import EQUAL, FLOAT64, WORKING, compared, largest, shows
from .flax_side import SEED as FLAX_SEED
from .flax_side import Leaves, Port, cast, cast_call, gradients_of, named, on_device
from .memory import give_back
from .perturbed import FACTOR
from .reference import DRAWN, GIVEN, Case, Reference, call_in, cotangents_of
from .report import Divergence
from .result import PARTS, NamedArrays, Result, is_equal
from .trace import (
    divergence,
    gradient_divergence,
    lone_casts,
    results_by_name,
    state_divergence,
)
from .trees import is_float
from .weights import Paired, differs_after_a_file, in_float64, leaves_for, pulled_back

_BIASED = (
    "in training, torch's BatchNorm keeps the unbiased variance of a batch of n entries and Flax's "
    "the biased one, (n-1)/n of it; everything else of the running variances agrees"
)
_RANDOM_FLAX = (
    "training is not compared, because the Flax module draws random numbers there outside of a "
    "Dropout layer"
)
_NO_GRADIENTS = (
    "gradients are not compared, because JAX has none of a `while` loop: lax.scan, or a fori_loop "
    "with a fixed number of steps, has"
)
_REVERSE = "Reverse-mode differentiation does not work"  # as JAX says it
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


class Judge:
    """Compares the two modules on one state and one call after another."""

    def __init__(
        self,
        reference: Reference,
        port: Port,
        template: Any,
        mapping: StateMapping,
        dtypes: Sequence[str],
    ) -> None:
        self.reference, self.port = reference, port
        first = cast_call(reference.calls[0], "float64")
        self.template = port.filled(template, first, mapping.by_path)
        self.mapping, self.dtypes = mapping, dtypes
        self.slip = self.ulps = 0.0
        self.differs: Case | None = None
        self.has_gradients = True  # whether JAX has gradients of the module
        self.notes: dict[str, None] = {}
        self.lone_casts: Divergence | None = None
        self.suspects: dict[str, frozenset[str]] = {}
        self._compiled: dict[tuple[int, bool], Callable[..., Any]] = {}
        self.exact: dict[int, NamedArrays] = {}  # torch's outputs in inference, by the call
        self.limits: dict[tuple[int, bool], Result] = {}  # by the call and whether it trains
        self.trained: list[KeyPath] = [
            row.path for row in mapping.rows if row.torch_key in reference.parameters
        ]

    def findings(self, weights: str, number: int, label: str) -> Iterator[Finding]:
        """Yield what was found with these weights and the inputs of the call of this number."""
        if self.reference.is_live and weights == DRAWN:
            yield self._through_a_file(weights, label)
            self._give_back()
        for train, plain in self.reference.modes(weights, number).items():
            title = f"{label}, {'training' if train else 'inference'}"
            for finding in self._in_float64(Case(weights, number, train), title, plain):
                is_told = finding.error in (_EMPTY, _UNSTABLE)
                if finding.check == "outputs" and not (finding.held or is_told or self.differs):
                    self.differs = Case(weights, number, train)
                yield finding
            self._give_back()

    def _give_back(self) -> None:
        if self.reference.is_large:
            give_back()

    def _through_a_file(self, weights: str, label: str) -> Finding:
        """Return whether the state is the same when it is loaded from a file."""
        state = self.reference.state(weights)
        leaves = leaves_for(self.port, self.template, state, self.mapping)
        lost = differs_after_a_file(state, self.port, self.template, self.mapping, leaves)
        reason = f"lost: {', '.join(lost)}" if lost else ""
        return Finding("checkpoint", self.port.api, label, same_names(lost, ()), EQUAL, reason)

    def eager(self, weights: str, call: Call) -> NamedArrays:
        """Return Flax's outputs in inference, in float64 and without `jit`."""
        return self._eager(self._leaves(weights), cast_call(call, "float64"), train=False)

    def divergence(self, case: Case) -> Divergence | None:
        """Return where the outputs part first."""
        double = self._call(case)
        if (traced := self.reference.trace(case)) is None:
            return None
        leaves, suspects = self._leaves(case.weights), self.suspects
        return divergence(traced[0], self.port, leaves, double, train=case.train, suspects=suspects)

    def _call(self, case: Case) -> Call:
        """Return the call of a run, in float64."""
        return cast_call(call_in(self.reference.calls, case), "float64")

    def _leaves(self, weights: str) -> Leaves:
        """Return Flax's leaves for the weights, in float64."""
        state = self.reference.state(weights)
        if any(row.plus for row in self.mapping.rows):  # a sum is to be exact
            state = {key: in_float64(tensor) for key, tensor in state.items()}
        return cast(leaves_for(self.port, self.template, state, self.mapping), "float64")

    def state_divergence(self, case: Case, names: Collection[str]) -> Divergence | None:
        """Return where the buffers of these names part first."""
        changed = {row.torch_key: row.path for row in self.mapping.rows if row.torch_key in names}
        traced = self.reference.trace(case, buffers=tuple(changed))
        if traced is None:
            return None
        leaves, suspects = self._leaves(case.weights), self.suspects
        return state_divergence(
            traced[0],
            self.port,
            leaves,
            self._call(case),
            changed,
            train=case.train,
            suspects=suspects,
        )

    def gradient_divergence(self, case: Case) -> Divergence | None:
        """Return where the gradients part first."""
        traced = self.reference.trace(case, has_gradients=True)
        if traced is None:
            return None
        call, cotangents = self._call(case), cotangents_of(self.reference.outputs(case))
        leaves = self._leaves(case.weights)
        return gradient_divergence(traced, self.port, leaves, call, cotangents, train=case.train)

    def adequacy(self, weights: str) -> Adequacy:
        """Return what the calls notice of changes of the Flax module."""
        asked = [
            self._asked(Case(weights, number, train), limits)
            for (number, train), limits in self.limits.items()
        ]
        return adequacy_of(asked, self._leaves(weights))

    def _asked(self, case: Case, limits: Result) -> Asked:
        call = self._call(case)
        plain = self.reference.modes(case.weights, case.number)[case.train]
        cotangents = cotangents_of(plain.outputs)

        def named(by_path: dict[KeyPath, Any]) -> NamedArrays:
            return pulled_back(self.mapping, by_path, self.reference.reduced)

        return Asked(
            function=results_by_name(self.port, call, self.trained, train=case.train),
            call=call,
            limits=limits,
            cotangents=cotangents,
            trained=self.trained if self.has_gradients and cotangents else [],
            named=named,
        )

    def _in_float64(self, case: Case, title: str, plain: Result) -> Iterator[Finding]:
        train, number = case.train, case.number
        cotangents = cotangents_of(plain.outputs)
        measured = self.reference.exact(case)
        exact, farthest = measured
        limits = {part: _limits(getattr(farthest, part), getattr(exact, part)) for part in PARTS}
        if self.reference.widened and self.port.casts is None:
            jax.clear_caches()  # what was traced before has the casts
            self.port.casts = {}
        doubled = self._leaves(case.weights)
        double = self._call(case)

        def flax(seed: int = FLAX_SEED) -> Result:
            return self._flax(doubled, double, cotangents, case, seed)

        found = flax()
        if not self.has_gradients:
            exact = replace(exact, gradients={})
        if exact.drawn:
            if not is_equal(found, flax(FLAX_SEED + 1)):
                self.notes[_RANDOM_FLAX] = None
                return
            self.notes[_PATTERNS] = None
        expected = replace(exact, state=self._variances(exact, found, limits["state"]))
        if not any(map(shows, exact.outputs.values())):
            yield uncompared("outputs", self.port.api, title, _EMPTY)

        def parted(part: str) -> list[Finding]:
            return list(self._part(part, title, found, expected, limits[part]))

        by_part = {part: parted(part) for part in PARTS}
        if not all(finding.held for finding in by_part["gradients"]):
            limits["gradients"] = _limits(self.reference.surer(case, measured), exact.gradients)
            by_part["gradients"] = parted("gradients")
        findings = [finding for part in PARTS for finding in by_part[part]]
        has_failed = not train and not all(finding.held for finding in findings)
        if has_failed and not is_equal(found, flax(FLAX_SEED + 1)):
            raise PortError(random_in_inference("Flax", "torch"))
        yield from findings
        self.limits[number, train] = Result(limits["outputs"], limits["gradients"], limits["state"])
        if not train:
            self.exact[number] = exact.outputs
        self._measure(found.outputs, exact.outputs, limits["outputs"])
        eager = self._eager(doubled, double, train)
        yield from compared(
            self.port.api, "jit", title, eager, found.outputs, limits["outputs"], FLOAT64
        )
        if self.port.casts:
            traced = self.reference.trace(case)
            lone = traced and lone_casts(traced[0], self.port, doubled, double, train=train)
            places = [line.place for line in lone.flax_source] if lone else []
            reason = f"Flax casts to a narrower dtype where torch does not: {', '.join(places)}"
            agreed = same_names(places, ())
            yield Finding("casts", self.port.api, title, agreed, EQUAL, reason if lone else "")
            self.lone_casts = self.lone_casts or lone
        for dtype in () if exact.drawn else self.dtypes:
            # The modes were told by runs in float32.
            is_run = dtype == "float32"
            own = plain.outputs if is_run else self.reference.outputs(case, dtype)
            with plain_jax(dtype):
                outputs = self._eager(cast(doubled, dtype), cast_call(double, dtype), train)
            wider = _limits_in(dtype, limits["outputs"], own, exact.outputs)
            yield from compared(
                self.port.api, f"outputs in {dtype}", title, outputs, exact.outputs, wider, WORKING
            )

    def _part(
        self, part: str, case: str, found: Result, expected: Result, limits: NamedArrays
    ) -> Iterator[Finding]:
        """Yield what was found of the outputs, the gradients or the state."""
        theirs, ours = getattr(found, part), getattr(expected, part)
        scale = max(map(largest, ours.values()), default=0.0)
        unstable = [name for name in limits if scale and limits[name] > _COARSE * scale]
        for name in unstable:
            yield uncompared(part, self.port.api, f"{case}, {name}", _UNSTABLE)
        ours, theirs = (
            {name: array for name, array in arrays.items() if name not in unstable}
            for arrays in (ours, theirs)
        )
        yield from compared(self.port.api, part, case, theirs, ours, limits, FLOAT64)

    def _variances(self, exact: Result, found: Result, limits: NamedArrays) -> NamedArrays:
        """Return the state that is expected, with Flax's running variances where Flax has them.

        Of a batch, torch's BatchNorm keeps the unbiased variance, and Flax's the biased one. No
        argument of either changes that, so it is a note and not a difference.
        """
        state = dict(exact.state)
        for name, biased in exact.biased.items():
            other = found.state.get(name)
            limit = limits[name]
            if (
                other is not None
                and other.shape == biased.shape
                and not agreement(other, state[name], limit).held
                and agreement(other, biased, limit).held
            ):
                state[name] = biased
                self.notes[_BIASED] = None
        return state

    def _flax(
        self,
        leaves: Leaves,
        call: Call,
        cotangents: NamedArrays,
        case: Case,
        seed: int,
    ) -> Result:
        def run(
            leaves: Leaves, arrays: dict[str, Any], cotangents: dict[str, Any], seed: Any
        ) -> Any:
            names = call.floats if self.has_gradients else ()
            floats = {name: arrays[name] for name in names}
            placed = call.replaced(arrays)
            return gradients_of(
                self.port,
                leaves,
                self.trained if self.has_gradients else [],
                placed,
                floats,
                cotangents,
                train=case.train,
                seed=seed,
            )

        compiled = self._compiled.setdefault((case.number, case.train), jax.jit(run))
        with raised_by("Flax"):
            try:
                made = compiled(leaves, call.arrays, cotangents, seed)
            except ValueError as error:
                if _REVERSE not in str(error) or not self.has_gradients:
                    raise
                self.notes[_NO_GRADIENTS], self.has_gradients = None, False
                self._compiled.clear()
                return self._flax(leaves, call, cotangents, case, seed)
        outputs, after, by_params, by_inputs = jax.block_until_ready(made)
        self._give_back()
        reduced = self.reference.reduced
        by_inputs = {f"input {name}": np.asarray(array) for name, array in by_inputs.items()}
        gradients = pulled_back(self.mapping, by_params, reduced) | reduced(by_inputs)
        state = {path: leaf for path, leaf in after.items() if path not in self.trained}
        after = pulled_back(self.mapping, state, reduced)
        result = Result(_host(outputs), gradients, after)
        self._give_back()
        return result

    def _eager(self, leaves: Leaves, call: Call, train: bool) -> NamedArrays:
        with raised_by("Flax"):
            raw, _ = self.port.apply(leaves, call.replaced(on_device(call.arrays)), train=train)
        return _host(named(raw))

    def _measure(self, found: NamedArrays, exact: NamedArrays, limits: NamedArrays) -> None:
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
            self.slip = max(self.slip, float(limits[name]) / size)


def _limits(moved: NamedArrays, exact: NamedArrays) -> NamedArrays:
    """Return how far the arrays may lie from torch's, by how far torch's own values moved.

    At least as far as the last result moves that made the largest entry; a whole number, as that of
    a saturated tanh, is not moved in the runs.
    """
    eps = float(np.finfo(np.float64).eps)
    return {
        name: FACTOR * np.maximum(size, eps * largest(exact[name])) for name, size in moved.items()
    }


def _limits_in(
    dtype: str, limits: NamedArrays, own: NamedArrays, exact: NamedArrays
) -> NamedArrays:
    """Return the limits in a working dtype, in which torch's own outputs have their own error."""
    growth = float(jax.numpy.finfo(dtype).eps) / float(np.finfo(np.float64).eps)
    wider = {name: np.array(limits[name] * growth) for name in exact}
    for name, array in exact.items():
        if name in own and own[name].shape == array.shape:
            error = np.abs(own[name].astype(np.float64) - array)
            farthest = np.where(np.isfinite(error), error, 0.0).max(initial=0.0)
            wider[name] = np.maximum(wider[name], 4.0 * farthest)
    return wider


def _host(arrays: Mapping[str, Any]) -> NamedArrays:
    return {name: np.asarray(array) for name, array in arrays.items()}


def nearest(found: Sequence[Paired], reference: Reference, port: Port, template: Any) -> Paired:
    """Return the pairing with which the outputs of the first call lie nearest to torch's."""
    expected = reference.outputs(Case(GIVEN, 0))

    def distance(pairing: Paired) -> float:
        judge = Judge(reference, port, template, pairing.mapping, ())
        try:
            outputs = judge.eager(GIVEN, reference.calls[0])
            return max(largest(outputs[name] - array) for name, array in expected.items())
        except (PortError, ValueError, KeyError):
            return inf

    return min(found, key=distance)


@contextmanager
def traced_apart(port: Port) -> Iterator[None]:
    """Let JAX forget what it traced within, if casts were widened there."""
    try:
        yield
    finally:
        if port.casts:
            jax.clear_caches()


@contextmanager
def plain_jax(dtype: str) -> Iterator[None]:
    """Run JAX on the CPU for a dtype, with x64 for float64, and without TF32.

    A module that is run in another dtype than its own needs JAX's usual promotions.
    """
    with (
        jax_on("cpu", np.float64 if dtype == "float64" else np.float32),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
