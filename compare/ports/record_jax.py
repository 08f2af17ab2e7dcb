"""Record every value that a JAX function computes, with the line of the module that made it.

The function is traced to a jaxpr, whose equations are evaluated one by one in a single compiled
program that returns all of their results. What is called within (`jit`, `remat`, functions with
custom gradients) is looked into; a `scan` gives the values of each step. Which branch a `cond`
takes, and how many steps a `while` makes, is asked of a first run; then the branch is looked into,
and the loop is a scan. Within a scan they stay whole, because each step may do otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from .report import SourceLine
from .values import Trace, Value, lines_of_frames

# The parameter in which a primitive that calls a function has the function's jaxpr.
CALLED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
}
# What has gradients of its own, or steps, which are not looked into for gradients.
_WHOLE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "scan")
_MAX_STEPS = 512  # of a `while` that is looked into
_MAX_RUNS = 5  # what lies deeper in branches and loops is not looked into
Lines = tuple[SourceLine, ...]  # the innermost first
_Way = tuple[int, ...]  # the equations that led to one, and itself
_Atom = tuple[Any, int | None]  # a value while it is traced, and its index in the trace


class _Meta:
    """What is known of a value before the program runs.

    `steps` has the numbers of steps of the scans that it is in, the outer one first; `scan` tells
    the scans apart. `carried` is the value that the step before hands on as this one.
    """

    def __init__(
        self,
        operation: str,
        lines: Lines,
        parents: tuple[int, ...],
        depends: bool,
    ) -> None:
        self.operation, self.lines = operation, lines
        self.parents, self.depends = parents, depends
        self.steps: list[int] = []
        self.scan = 0
        self.carried: int | None = None


def record(function: Callable[..., Mapping[str, Any]], *arguments: Any) -> Trace:
    """Return the values that the function computes.

    Args:
        function: a function that returns arrays by name.
        arguments: its arguments: trees of arrays.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    flat = jax.tree.leaves(arguments)
    choices: dict[_Way, int] = {}
    for _ in range(_MAX_RUNS):
        recorder = _Recorder(choices)

        def run(*flat: Any, recorder: _Recorder = recorder) -> tuple[list[Any], dict[str, Any]]:
            recorder.start()
            recorder.run(closed, flat)
            asked = {str(number): one for number, one in enumerate(recorder.asked.values())}
            return recorder.results, asked

        results, answers = jax.jit(run)(*flat)
        if not answers:
            break
        choices |= {way: int(answers[str(number)]) for number, way in enumerate(recorder.asked)}
    trace, places = _unrolled(recorder.metas, results)
    trace.outputs = {
        name: places[index][-1]
        for name, index in zip(shape, recorder.outputs, strict=True)
        if index is not None and index in places
    }
    return trace


def record_gradients(
    function: Callable[..., Mapping[str, Any]],
    cotangents: Mapping[str, np.ndarray],
    *arguments: Any,
) -> tuple[Trace, dict[int, np.ndarray]]:
    """Return the values that the function computes, and the gradients by the floating ones.

    What has a gradient of its own, and the steps of a scan, are not looked into.

    Args:
        function: a function that returns arrays by name.
        cotangents: what the outputs are multiplied with, by name, for the gradient of the sum.
        arguments: its arguments: trees of arrays.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    flat = jax.tree.leaves(arguments)
    recorder = _Recorder()

    def total(shifts: dict[int, Any], *flat: Any) -> tuple[Any, list[Any]]:
        recorder.start(shifts)
        outputs = dict(zip(shape, recorder.run(closed, flat), strict=True))
        products = [(outputs[name] * cotangents[name]).sum() for name in cotangents]
        return sum(products, jnp.zeros(())), recorder.results

    _, shapes = jax.eval_shape(total, {}, *flat)
    shifts = {
        index: jnp.zeros(one.shape, one.dtype)
        for index, one in enumerate(shapes)
        if jnp.issubdtype(one.dtype, jnp.floating)
    }
    gradients, results = jax.jit(jax.grad(total, has_aux=True))(shifts, *flat)
    trace = Trace()
    for meta, result in zip(recorder.metas, results, strict=True):
        array = np.asarray(result)
        trace.add(_value(array, meta, meta.parents))
    return trace, {index: np.asarray(gradient) for index, gradient in gradients.items()}


def _unrolled(
    metas: Sequence["_Meta"], results: Sequence[Any]
) -> tuple[Trace, dict[int, list[int]]]:
    """Return the values in the order of execution, each step of a scan by itself."""
    trace = Trace()
    places: dict[int, list[int]] = {}
    begin = 0
    while begin < len(metas):
        end = begin + 1
        if metas[begin].steps:  # the values of one scan lie together
            while end < len(metas) and metas[end].scan == metas[begin].scan:
                end += 1
        arrays = [np.asarray(results[index]) for index in range(begin, end)]
        flat = [
            array.reshape(-1, *array.shape[len(meta.steps) :]) if meta.steps else array[None]
            for meta, array in zip(metas[begin:end], arrays, strict=True)
        ]
        for step in range(max(map(len, flat))):
            for index, slices in zip(range(begin, end), flat, strict=True):
                if step >= len(slices):
                    continue
                meta = metas[index]
                value = _value(slices[step], meta, _parents(meta, step, places))
                places.setdefault(index, []).append(trace.add(value))
        begin = end
    return trace, places


def _parents(meta: _Meta, step: int, places: Mapping[int, list[int]]) -> tuple[int, ...]:
    """Return the values that one step of a value is made of; all steps of a scan, after it."""
    if meta.carried is not None and step:
        return (places[meta.carried][step - 1],) if meta.carried in places else ()
    found: list[int] = []
    for parent in meta.parents:
        steps = places.get(parent, [])
        is_step = bool(meta.steps) and len(steps) > 1
        found += steps[min(step, len(steps) - 1) :][:1] if is_step else steps
    return tuple(dict.fromkeys(found))


class _Recorder:
    """Evaluates jaxprs and keeps each result, with what is known of it.

    Args:
        choices: the branches that are taken, and the numbers of steps, where they are known. None
            if they are not to be asked.
    """

    def __init__(self, choices: Mapping[_Way, int] | None = None) -> None:
        self.choices = choices
        self.start()

    def start(self, shifts: Mapping[int, Any] | None = None) -> None:
        """Forget what was recorded. What is given is added to the results of these indices."""
        self.metas: list[_Meta] = []
        self.results: list[Any] = []
        self.outputs: list[int | None] = []
        self.asked: dict[_Way, Any] = {}
        self.way: _Way = ()
        self.shifts = shifts

    def run(self, closed: ClosedJaxpr, flat: Sequence[Any]) -> list[Any]:
        """Evaluate the jaxpr for these arguments, and return its outputs."""
        atoms = [self.add(leaf, _Meta("", (), (), True)) for leaf in flat]
        constants = [self.add(leaf, _Meta("", (), (), False)) for leaf in closed.consts]
        outputs = self.evaluate(closed.jaxpr, constants, atoms, ())
        self.outputs = [index for _, index in outputs]
        return [value for value, _ in outputs]

    def add(self, result: Any, meta: _Meta) -> _Atom:
        """Record a result, and return it with its index."""
        index = len(self.metas)
        is_key = jnp.issubdtype(jnp.result_type(result), jax.dtypes.extended)
        if self.shifts is not None and index in self.shifts and not is_key:
            result = result + self.shifts[index]
        self.metas.append(meta)
        self.results.append(jnp.zeros(0) if is_key else result)
        return result, index

    def evaluate(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[_Atom],
        arguments: Sequence[_Atom],
        caller: Lines,
    ) -> list[_Atom]:
        """Evaluate a jaxpr; lines of equations that are not known are those of the caller."""
        known: dict[Any, _Atom] = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> _Atom:
            return (atom.val, None) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            lines = lines_of_equation(equation) or caller
            outputs = self._apply(equation, inputs, lines)
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, inputs: list[_Atom], lines: Lines) -> list[_Atom]:
        before, self.way = self.way, (*self.way, id(equation))
        try:
            return self._applied(equation, inputs, lines)
        finally:
            self.way = before

    def _applied(self, equation: Any, inputs: list[_Atom], lines: Lines) -> list[_Atom]:
        name = equation.primitive.name
        is_whole = self.shifts is not None and name in _WHOLE
        if name in CALLED and CALLED[name] in equation.params and not is_whole:
            jaxpr, constants = inner_of(equation)
            count = len(jaxpr.invars)
            return self.evaluate(
                jaxpr,
                [(leaf, None) for leaf in constants],
                inputs[-count:] if count else [],
                lines,
            )
        if name == "scan" and not is_whole:
            return self._scan(equation.params, inputs, lines)
        if name in ("cond", "while") and self.choices is not None and self.shifts is None:
            if (choice := self.choices.get(self.way)) is not None:
                chosen = self._branch if name == "cond" else self._loop
                found = chosen(equation.params, inputs, lines, choice)
                if found is not None:
                    return found
            else:
                values = [value for value, _ in inputs]
                self.asked[self.way] = values[0] if name == "cond" else _count(equation, values)
        results = bound(equation, [value for value, _ in inputs])
        return [self.add(result, self._meta(name, lines, inputs)) for result in results]

    def _meta(self, name: str, lines: Lines, inputs: Sequence[_Atom]) -> _Meta:
        parents = tuple(dict.fromkeys(index for _, index in inputs if index is not None))
        depends = any(self.metas[index].depends for index in parents)
        return _named(name, lines, parents, depends)

    def _branch(
        self, params: Mapping[str, Any], inputs: list[_Atom], lines: Lines, choice: int
    ) -> list[_Atom]:
        """Evaluate the branch of a `cond` that is taken."""
        branches = params["branches"]
        taken: ClosedJaxpr = branches[min(max(choice, 0), len(branches) - 1)]
        constants = [(leaf, None) for leaf in taken.consts]
        return self.evaluate(taken.jaxpr, constants, inputs[1:], lines)

    def _loop(
        self, params: Mapping[str, Any], inputs: list[_Atom], lines: Lines, steps: int
    ) -> list[_Atom] | None:
        """Evaluate a `while` as a scan, if it has not too many steps."""
        begin, fixed = params["cond_nconsts"], params["body_nconsts"]
        if steps > _MAX_STEPS:
            return None
        if not steps:
            return inputs[begin + fixed :]
        scan = {
            "num_consts": fixed,
            "num_carry": len(inputs) - begin - fixed,
            "jaxpr": params["body_jaxpr"],
            "length": steps,
            "reverse": False,
        }
        return self._scan(scan, inputs[begin:], lines)

    def _scan(self, params: Mapping[str, Any], inputs: list[_Atom], lines: Lines) -> list[_Atom]:
        """Evaluate a scan whose steps also give every value within the step."""
        fixed, carried = params["num_consts"], params["num_carry"]
        body: ClosedJaxpr = params["jaxpr"]
        within = _Recorder()

        def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
            within.start()
            leaves = [*(value for value, _ in inputs[:fixed]), *carry, *xs]
            atoms = [within.add(leaf, _Meta("", (), (), True)) for leaf in leaves]
            constants = [(leaf, None) for leaf in body.consts]
            found = within.evaluate(body.jaxpr, constants, atoms, lines)
            within.outputs = [index for _, index in found]
            outputs = [value for value, _ in found]
            return outputs[:carried], (outputs[carried:], within.results)

        initial = [value for value, _ in inputs[fixed : fixed + carried]]
        xs = [value for value, _ in inputs[fixed + carried :]]
        carry, (ys, every) = jax.lax.scan(
            step, initial, xs, length=params["length"], reverse=params["reverse"]
        )
        outer = tuple(dict.fromkeys(index for _, index in inputs if index is not None))
        depends = any(self.metas[index].depends for index in outer)
        begin = len(self.metas)
        count = len(within.metas)
        for number in range(count):
            meta = within.metas[number]
            is_root = number < len(inputs)
            parents = (
                tuple(index for _, index in inputs[number : number + 1] if index is not None)
                if is_root
                else tuple(begin + parent for parent in meta.parents)
            )
            stacked = _Meta(meta.operation, meta.lines, parents, depends and meta.depends)
            stacked.steps = [params["length"], *meta.steps]
            stacked.scan = begin
            if fixed <= number < fixed + carried:
                handed = within.outputs[number - fixed]
                stacked.carried = None if handed is None else begin + handed
            self.add(every[number], stacked)
        results: list[_Atom] = []
        for position, result in enumerate([*carry, *ys]):
            made = within.outputs[position]
            parents = outer if made is None else (begin + made,)
            results.append(self.add(result, _named("scan", lines, parents, depends)))
        return results


def _count(equation: Any, inputs: Sequence[Any]) -> Any:
    """Return how many steps a `while` makes."""
    params = equation.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    test, step = jaxpr_as_fun(params["cond_jaxpr"]), jaxpr_as_fun(params["body_jaxpr"])
    of_test, of_step = inputs[:first], inputs[first : first + second]

    def again(state: tuple[Any, list[Any]]) -> Any:
        return test(*of_test, *state[1])[0]

    def advanced(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        return state[0] + 1, list(step(*of_step, *state[1]))

    return jax.lax.while_loop(again, advanced, (0, list(inputs[first + second :])))[0]


def bound(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """Return the results of an equation for these inputs."""
    found = equation.primitive.get_bind_params(equation.params)
    # JAX before 0.10 returns functions beside the parameters.
    functions, params = found if isinstance(found, tuple) else ((), found)
    with equation.ctx.manager:
        result = equation.primitive.bind(*functions, *inputs, **params)
    return list(result) if equation.primitive.multiple_results else [result]


def inner_of(equation: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the jaxpr that an equation calls, and its constants."""
    inner = equation.params[CALLED[equation.primitive.name]]
    return (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, [])


def _named(operation: str, lines: Lines, parents: tuple[int, ...], depends: bool) -> _Meta:
    """Return what is known of the result of an operation, whose name its lines then have."""
    lines = tuple(replace(line, operation=operation) for line in lines)
    return _Meta(operation, lines, parents, depends)


def _value(array: np.ndarray, meta: _Meta, parents: tuple[int, ...]) -> Value:
    first = next(iter(meta.lines), None)
    return Value(array, meta.operation, first, parents, meta.depends, meta.lines[1:])


def lines_of_equation(equation: Any) -> Lines:
    """Return the lines of somebody's module that the equation comes from, the innermost first."""
    traceback = equation.source_info.traceback
    frames = (
        (frame.file_name, frame.line_num) for frame in (traceback.frames if traceback else ())
    )
    module = str(equation.source_info.name_stack)
    return lines_of_frames(frames, equation.primitive.name, module)
