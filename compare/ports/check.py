"""Check that a Flax module is the same function as a torch module."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.mapping import StateMapping, require_mapping, slashed
from ..conversion.match import pair
from ..conversion.state_kinds import flax_side
from ..proof.agreement import uncompared
from .adequacy import Adequacy
from .batch import batch_findings, with_more_rows
from .calls import calls_of
from .errors import PortDiffers, PortError, raised_by
from .flax_side import Adapters, cast_call, port_of
from .judge import Judge, nearest, plain_jax, traced_apart
from .report import Divergence, PortReport
from .torch_side import TorchSide
from .weights import Paired, drawn_again, paired

_GIVEN, _DRAWN = "as given", "drawn again"  # the weights
_MAX_PLACES = 3  # that a note names
_DTYPES = ("float32", "bfloat16", "float16")


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
    and each floating input, and the state after the call are compared. The limit is fifty times the
    farthest that torch's own values move if each of its results moves by one unit in the last
    place. Then both are run in the working dtypes. Neither module is changed.

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
        mapping: how the state pairs, from `compare.match`. By default it is paired here; if names
            differ and there is no `rename`, as `compare.suggest` proposes, and the report says so.
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
    ours, theirs = _of_both(outputs)
    known = inspect.signature(pair).parameters
    if unknown := [name for name in rules if name not in known]:
        raise PortError(f"there is no argument {unknown[0]}; rules are those of compare.match")
    adapters = Adapters(flax_inputs, theirs, method, train)
    _require_usable(adapters, torch_module, flax_module)
    side = TorchSide(torch_module, ours, method)
    port = port_of(flax_module, adapters)
    calls = calls_of(inputs)
    with (
        plain_jax("float64"),
        traced_apart(port),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        with raised_by("Flax"):
            template = port.template(cast_call(calls[0], "float64"))
        if mapping is None:
            found = paired(side.module(), port.side(template), rules)
            pairing = found[0] if len(found) == 1 else nearest(found, side, port, template, calls)
        elif rules:
            raise PortError(f"{min(rules)} has no effect beside mapping: give it to compare.match")
        else:
            pairing = Paired(mapping, [], [])
        judge = Judge(side, port, template, pairing.mapping, dtypes)
        judge.suspects = _suspects(pairing.differing)
        trained = {*side.parameters, *_trained_names(template)}
        findings = [
            uncompared("parameters", port.api, name, "one side alone has it")
            for name in pairing.alone
            if name in trained
        ]
        parted: Divergence | None = None
        for label in (_GIVEN, _DRAWN):
            state = _state(side, label)
            for index, call in enumerate(calls):
                case = label if len(calls) == 1 else f"{label}, call {index}"
                findings += judge.findings(state, call, index, case)
                if parted is None and judge.differs:
                    parted = judge.divergence(state, call)
                if label == _DRAWN:
                    of_batch = list(batch_findings(judge, state, call, index, case))
                    findings += of_batch
                    if parted is None and any(not one.held and not one.error for one in of_batch):
                        parted = judge.divergence(state, with_more_rows(call))
        failed = {
            check: [one.case for one in findings if one.check == check and not one.held]
            for check in ("gradients", "state")
        }
        if parted is None and failed["gradients"]:
            trains = _in_training_alone(failed["gradients"])
            parted = judge.gradient_divergence(_state(side, _DRAWN), calls[0], train=trains)
        if parted is None and failed["state"]:
            trains = _in_training_alone(failed["state"])
            names = {case.rpartition(", ")[2] for case in failed["state"]}
            parted = judge.state_divergence(_state(side, _GIVEN), calls[0], names, train=trains)
        parted = parted or judge.lone_casts
        is_held = all(finding.held for finding in findings)
        worth: Adequacy | None = None
        if adequacy and is_held:
            worth = judge.adequacy(_state(side, _DRAWN), calls)
    notes = tuple(_notes(pairing, trained, judge))
    return PortReport(tuple(findings), parted, notes, judge.slip, judge.ulps, worth)


def _notes(pairing: Paired, trained: Collection[str], judge: Judge) -> Iterator[str]:
    yield from pairing.notes
    for line in pairing.differing:
        yield f"the layers say it differently: {line}"
    for name in pairing.alone:
        if name not in trained:
            reason = "which is not trained: the other computes it, or lacks it"
            yield f"one side alone has {name}, {reason}"
    yield from judge.notes
    of_flax = judge.port.widened | (judge.port.casts or {})
    for framework, lines in (("torch", judge.side.widened.lines), ("Flax", of_flax)):
        places, others = list(lines)[:_MAX_PLACES], len(lines) - _MAX_PLACES
        if places:
            more = f" and {others} more" if others > 0 else ""
            yield (
                f"{framework} asks for a narrower dtype in {', '.join(places)}{more}; what is said "
                "of float64 was computed in float64 there, too"
            )


def _require_usable(adapters: Adapters, *modules: Any) -> None:
    """Raise PortError for what says how the modules are called, but cannot."""
    inputs, method, train = adapters.inputs, adapters.method, adapters.train
    for module in modules:
        if method is not None and not callable(getattr(module, str(method), None)):
            raise PortError(f"{type(module).__name__} has no method {method!r}")
    if inputs is not None and not callable(inputs):
        raise PortError(f"flax_inputs is {inputs!r}; expected a function of torch's arguments")
    if train is not None and not isinstance(train, Mapping):
        raise PortError(f"train is {train!r}; expected keywords, such as {{'train': True}}")


def _of_both(outputs: Any) -> tuple[Any, Any]:
    """Return the functions of the outputs of torch and of Flax; one alone is that of Flax."""
    pair = outputs if isinstance(outputs, list | tuple) else (None, outputs)
    if len(pair) != 2 or not all(one is None or callable(one) for one in pair):
        raise PortError(
            f"outputs is {outputs!r}; expected a function of what Flax returns, or two functions, "
            "for torch and for Flax"
        )
    return pair[0], pair[1]


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


def _state(side: TorchSide, label: str) -> dict[str, Tensor]:
    """Return the state dict of this label, in the module's own dtype."""
    module = side.module()
    if label == _DRAWN:
        drawn_again(module)
    return {
        key: tensor.detach()
        for key, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }
