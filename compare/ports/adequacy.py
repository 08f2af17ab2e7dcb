"""Say which statements of a Flax module these inputs do not test.

The module's jaxpr is changed in one place at a time: a literal, the order of operands, a
comparison, an axis, an operation left out, a parameter. All of these mutants are one compiled
program, in which a number selects the mutant. A mutant whose outputs, gradients and state, in
inference and in training, stay within the limits of the check would have passed it. If inputs that
are drawn here tell it from the module, the given inputs are too weak; if they do not, it may be the
same function.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ..conversion.mapping import KeyPath, slashed
from ..proof.agreement import agreement
from .calls import Call
from .record_jax import CALLED, bound, inner_of, lines_of_equation
from .report import SourceLine
from .result import PARTS, NamedArrays, Result
from .trees import is_float

_DRAWS = 3
_COMPARED = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ge", "ne": "gt"}
_ARITHMETIC = ("add", "sub", "mul", "div", "max", "min", "pow", *_COMPARED)
_ORDERED = ("sub", "div", "pow", "dot_general", "concatenate", "select_n", *_COMPARED)
_KEPT = ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "copy_p")
_REDUCED = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumprod", "cummax")


class Mutant(NamedTuple):
    """One change of the program.

    Attributes:
        what: what was changed.
        line: the line of the module that it stands for; None for a parameter.
    """

    what: str
    line: SourceLine | None

    def __str__(self) -> str:
        if self.line is None:
            return self.what
        return f"{self.line.file}:{self.line.line}: {self.line.code}  ({self.what})"


_Key = tuple[Mutant, int]


@dataclass(frozen=True)
class Adequacy:
    """Which mutants of a program some inputs would have noticed.

    Attributes:
        noticed: how many they notice.
        missed: those that they do not notice, though other inputs do.
        alike: how many neither these inputs nor the drawn ones tell from the module.
    """

    noticed: int
    missed: tuple[Mutant, ...]
    alike: int

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        missed = [
            {"what": mutant.what, "line": None if mutant.line is None else asdict(mutant.line)}
            for mutant in self.missed
        ]
        return {"noticed": self.noticed, "missed": missed, "alike": self.alike}

    @property
    def verdict(self) -> str:
        """How many mutants are noticed, in one sentence."""
        total = self.noticed + len(self.missed)
        return (
            f"Of {total} mutants of the Flax module, these inputs notice {self.noticed}; "
            f"{self.alike} more are the same function, as far as drawn inputs tell."
        )

    @property
    def lines(self) -> list[str]:
        """What is not noticed, each line and change once, wherever it was called from."""
        return list(dict.fromkeys(map(str, self.missed)))

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"  not noticed: {line}" for line in self.lines)])


class _Mutated:
    """Evaluates a jaxpr with the mutant of a number in the place of its equation.

    Args:
        selected: the number of the mutant, which may be traced; -1 for none.
    """

    def __init__(self, selected: Any) -> None:
        self.selected = selected
        self.mutants: list[Mutant] = []

    def choose(self, result: Any, other: Any, what: str, line: SourceLine | None) -> Any:
        """Return the result, or the other one if this mutant is selected."""
        self.mutants.append(Mutant(what, line))
        is_selected = self.selected == len(self.mutants) - 1
        if isinstance(is_selected, bool):  # what is not selected would take part in gradients
            return other if is_selected else result
        return jnp.where(is_selected, other, result)

    def evaluate(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[Any],
        arguments: Sequence[Any],
        caller: SourceLine | None = None,
    ) -> list[Any]:
        """Return the outputs of the jaxpr."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))
        for equation in jaxpr.eqns:
            inputs = [
                atom.val if isinstance(atom, Literal) else known[atom] for atom in equation.invars
            ]
            line = next(iter(lines_of_equation(equation)), caller)
            results = self._apply(equation, inputs, line)
            known |= dict(zip(equation.outvars, results, strict=True))
        return [atom.val if isinstance(atom, Literal) else known[atom] for atom in jaxpr.outvars]

    def _apply(self, equation: Any, inputs: list[Any], line: SourceLine | None) -> list[Any]:
        name = equation.primitive.name
        if name in CALLED and CALLED[name] in equation.params:
            jaxpr, constants = inner_of(equation)
            count = len(jaxpr.invars)
            return self.evaluate(jaxpr, constants, inputs[-count:] if count else [], line)
        if name == "scan":
            return self._scan(equation, inputs, line)
        results = bound(equation, inputs)
        if line is None or len(results) != 1:
            return results
        result = results[0]
        for what, other in _changes(equation, inputs):
            if jnp.shape(other) == jnp.shape(result):
                result = self.choose(result, other.astype(result.dtype), what, line)
        return [result]

    def _scan(self, equation: Any, inputs: list[Any], line: SourceLine | None) -> list[Any]:
        params = equation.params
        fixed, carried = params["num_consts"], params["num_carry"]
        body: ClosedJaxpr = params["jaxpr"]
        begin = len(self.mutants)

        def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            del self.mutants[begin:]  # a body may be traced more than once
            found = self.evaluate(body.jaxpr, body.consts, [*inputs[:fixed], *carry, *xs], line)
            return found[:carried], found[carried:]

        carry, ys = jax.lax.scan(
            step,
            inputs[fixed : fixed + carried],
            inputs[fixed + carried :],
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carry, *ys]


def _changes(equation: Any, inputs: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield what else the equation may give, with what was changed."""
    name = equation.primitive.name
    if name in _KEPT:
        return
    for place, atom in enumerate(equation.invars):
        if isinstance(atom, Literal) and name in _ARITHMETIC and np.ndim(atom.val) == 0:
            changed = _next(atom.val)
            others = [*inputs[:place], changed, *inputs[place + 1 :]]
            yield f"{atom.val} made {changed}", bound(equation, others)[0]
    last = inputs[-2:]
    if name in _ORDERED and len(last) == 2 and jnp.shape(last[0]) == jnp.shape(last[1]):
        exchanged = [*inputs[:-2], *last[::-1]]
        yield f"operands of {name} exchanged", bound(equation, exchanged)[0]
    if name in _COMPARED:
        other = getattr(jax.lax, f"{_COMPARED[name]}_p")
        yield f"{name} made {_COMPARED[name]}", other.bind(*inputs)
    if name in _REDUCED:
        yield from _along_others(equation, inputs)
    result = equation.outvars[0].aval
    for atom, value in zip(equation.invars, inputs, strict=True):
        is_same = atom.aval.shape == result.shape and atom.aval.dtype == result.dtype
        if is_same and not isinstance(atom, Literal):
            yield f"{name} left out", jnp.asarray(value)
            break


def _along_others(equation: Any, inputs: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the reduction along other axes of the same lengths."""
    params, (operand,) = equation.params, inputs[:1]
    axes = params.get("axes", (params.get("axis"),))
    for axis in range(jnp.ndim(operand)):
        if len(axes) == 1 and axis not in axes and operand.shape[axis] == operand.shape[axes[0]]:
            moved = jnp.swapaxes(operand, axis, axes[0])
            yield f"along axis {axis} in place of {axes[0]}", bound(equation, [moved])[0]


def _next(value: Any) -> Any:
    """Return a number near the given one, of its dtype."""
    array = np.asarray(value)
    if array.dtype == bool:
        return ~array
    changed = array + 1 if array.dtype.kind in "iu" or not array else array * 1.25
    return changed.astype(array.dtype)


class Asked(NamedTuple):
    """A run that is asked whether it notices a mutant.

    Attributes:
        function: a function of the leaves and of the call's arrays: outputs by name, and the state
            after the call by path.
        call: the call.
        limits: how far outputs, gradients and state may lie from the module's.
        cotangents: what the outputs are multiplied with for gradients, by name.
        trained: the paths by which there are gradients.
        named: takes arrays by path, and returns them by the names of the limits.
    """

    function: Callable[..., tuple[Mapping[str, Any], Mapping[KeyPath, Any]]]
    call: Call
    limits: Result
    cotangents: NamedArrays
    trained: Collection[KeyPath]
    named: Callable[[dict[KeyPath, Any]], NamedArrays]


def adequacy(asked: Sequence[Asked], leaves: Mapping[KeyPath, Any]) -> Adequacy:
    """Return which mutants of a module some runs notice, with the state in the leaves."""
    missed: dict[_Key, bool] = {}  # whether drawn inputs see it
    seen: set[_Key] = set()
    programs = [_Program(one, leaves) for one in asked]
    for program in programs:
        arrays = program.asked.call.arrays
        drawn = [(other, program.run(other, -1)) for other in _drawn(program.asked.call)]
        for number, key in enumerate(program.keys):
            if program.differs(program.run(arrays, number), program.kept):
                seen.add(key)
            elif not missed.get(key):
                missed[key] = any(
                    program.differs(program.run(other, number), base) for other, base in drawn
                )
    for program in programs:  # the backward pass of few, because it takes longer
        seen |= program.seen_by_gradients(missed.keys() - seen)
    unseen = {key: is_told for key, is_told in missed.items() if key not in seen}
    told = [mutant for (mutant, _), is_told in unseen.items() if is_told]
    return Adequacy(len(seen), tuple(dict.fromkeys(told)), len(unseen) - len(told))


class _Program:
    """The mutants of a run as one compiled program.

    Attributes:
        kept: what the module gives without a mutant.
        keys: for each mutant, what it changes, and how many before it change the same.
    """

    def __init__(self, asked: Asked, leaves: Mapping[KeyPath, Any]) -> None:
        self.asked, self.leaves = asked, leaves
        traced = jax.make_jaxpr(asked.function, return_shape=True)
        self._closed, self._shape = traced(leaves, asked.call.arrays)
        self._mutants: list[Mutant] = []
        self._compiled = jax.jit(self._mutated)
        self.kept = self.run(asked.call.arrays, -1)
        counts: Counter[Mutant] = Counter()
        self.keys: list[_Key] = []
        for mutant in self._mutants:
            self.keys.append((mutant, counts[mutant]))
            counts[mutant] += 1

    def run(self, arrays: Mapping[str, Any], selected: int) -> Result:
        """Return what the module gives with the mutant of this number."""
        outputs, after = self._compiled(selected, self.leaves, arrays)
        host = {name: np.asarray(array) for name, array in outputs.items()}
        return Result(host, {}, self.asked.named(dict(after)))

    def differs(self, found: Result, kept: Result) -> bool:
        """Return whether outputs or state lie beyond the limits."""
        return any(
            _differs(getattr(found, part), getattr(kept, part), getattr(self.asked.limits, part))
            for part in PARTS
        )

    def seen_by_gradients(self, keys: Collection[_Key]) -> set[_Key]:
        """Return those of the mutants whose gradients differ from the module's."""
        chosen = {number: key for number, key in enumerate(self.keys) if key in keys}
        if not chosen or not self.asked.trained:
            return set()
        kept = self._gradients(-1)
        return {
            key
            for number, key in chosen.items()
            if _differs(self._gradients(number), kept, self.asked.limits.gradients)
        }

    def _mutated(
        self, selected: Any, leaves: Mapping[KeyPath, Any], arrays: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[KeyPath, Any]]:
        evaluator = _Mutated(selected)
        flat = jax.tree.leaves((leaves, arrays))
        for place, (path, *_) in enumerate(path for path, _ in jax.tree.leaves_with_path(leaves)):
            if is_float(flat[place]):
                what = f"parameter {slashed(path.key)} made 1 % larger"
                flat[place] = evaluator.choose(flat[place], 1.01 * flat[place], what, None)
        results = evaluator.evaluate(self._closed.jaxpr, self._closed.consts, flat)
        self._mutants = evaluator.mutants
        return jax.tree.unflatten(jax.tree.structure(self._shape), results)

    def _gradients(self, selected: int) -> NamedArrays:
        """Return the gradients with the mutant of this number, which alone is evaluated."""
        leaves, call = dict(self.leaves), self.asked.call

        def total(params: Mapping[KeyPath, Any], inputs: Mapping[str, Any]) -> Any:
            outputs, _ = self._mutated(selected, leaves | dict(params), call.arrays | dict(inputs))
            cotangents = self.asked.cotangents
            return sum((outputs[name] * array).sum() for name, array in cotangents.items())

        params = {path: leaves[path] for path in self.asked.trained}
        by_params, by_inputs = jax.grad(total, argnums=(0, 1))(params, dict(call.floats))
        of_inputs = {f"input {name}": np.asarray(array) for name, array in by_inputs.items()}
        return self.asked.named(dict(by_params)) | of_inputs


def _drawn(call: Call) -> Iterator[dict[str, np.ndarray]]:
    """Yield other inputs of the same shapes and ranges."""
    for seed in range(_DRAWS):
        random = np.random.default_rng(seed)
        arrays = {}
        for name, array in call.arrays.items():
            if is_float(array):
                spread = float(array.std()) or 1.0
                drawn = array.mean() + spread * random.standard_normal(array.shape)
            elif array.dtype == bool:
                drawn = random.integers(0, 2, array.shape)
            else:
                low, high = min(array.min(), 0), max(array.max(), 1)  # a mask may be all 1
                drawn = random.integers(low, high + 1, array.shape)
            arrays[name] = drawn.astype(array.dtype)
        yield arrays


def _differs(found: NamedArrays, kept: NamedArrays, limits: NamedArrays) -> bool:
    """Return whether arrays lie beyond the limits."""
    for name, array in kept.items():
        if not is_float(array):
            if not np.array_equal(found[name], array):
                return True
        elif name in limits and not agreement(found[name], array, float(limits[name])).held:
            return True
    return False
