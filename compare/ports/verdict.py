"""Judge a port by what torch gives: pair the state, compare the calls, find where they part."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..conversion.mapping import StateMapping, slashed
from ..conversion.state_kinds import flax_side
from ..proof.agreement import uncompared
from .adequacy import Adequacy
from .batch import batch_findings
from .errors import PortError, raised_by
from .flax_side import Port, cast_call
from .judge import Judge, nearest, plain_jax, traced_apart
from .reference import DRAWN, GIVEN, Case, Reference
from .report import Divergence, PortReport
from .weights import Paired, paired

_MAX_PLACES = 3  # that a note names


def report_of(
    reference: Reference,
    port: Port,
    mapping: StateMapping | None,
    rules: Mapping[str, Any],
    dtypes: Sequence[str],
    *,
    adequacy: bool,
) -> PortReport:
    """Return the report of a port; see `compare.check_port`."""
    calls = reference.calls
    with plain_jax("float64"), traced_apart(port):
        with raised_by("Flax"):
            template = port.template(cast_call(calls[0], "float64"))
        if mapping is None:
            found = paired(reference.source(), port.side(template), rules)
            pairing = found[0] if len(found) == 1 else nearest(found, reference, port, template)
        elif rules:
            raise PortError(f"{min(rules)} has no effect beside mapping: give it to compare.match")
        else:
            pairing = Paired(mapping, [], [])
        judge = Judge(reference, port, template, pairing.mapping, dtypes)
        judge.suspects = _suspects(pairing.differing)
        trained = {*reference.parameters, *_trained_names(template)}
        findings = [
            uncompared("parameters", port.api, name, "one side alone has it")
            for name in pairing.alone
            if name in trained
        ]
        parted: Divergence | None = None
        for weights in (GIVEN, DRAWN):
            for number in range(len(calls)):
                case = weights if len(calls) == 1 else f"{weights}, call {number}"
                findings += judge.findings(weights, number, case)
                if parted is None and judge.differs:
                    parted = judge.divergence(judge.differs)
                if weights == DRAWN:
                    of_batch = list(batch_findings(judge, weights, number, case))
                    findings += of_batch
                    if parted is None and any(not one.held and not one.error for one in of_batch):
                        parted = judge.divergence(Case(weights, number, is_longer=True))
        failed = {
            check: [one.case for one in findings if one.check == check and not one.held]
            for check in ("gradients", "state")
        }
        if parted is None and failed["gradients"]:
            trains = _in_training_alone(failed["gradients"])
            parted = judge.gradient_divergence(Case(DRAWN, 0, trains))
        if parted is None and failed["state"]:
            trains = _in_training_alone(failed["state"])
            names = {case.rpartition(", ")[2] for case in failed["state"]}
            parted = judge.state_divergence(Case(GIVEN, 0, trains), names)
        parted = parted or judge.lone_casts
        is_held = all(finding.held for finding in findings)
        worth: Adequacy | None = None
        if adequacy and is_held:
            worth = judge.adequacy(DRAWN)
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
    yield from judge.reference.notes
    yield from judge.notes
    of_flax = judge.port.widened | (judge.port.casts or {})
    for framework, lines in (("torch", judge.reference.widened), ("Flax", of_flax)):
        places, others = list(lines)[:_MAX_PLACES], len(lines) - _MAX_PLACES
        if places:
            more = f" and {others} more" if others > 0 else ""
            yield (
                f"{framework} asks for a narrower dtype in {', '.join(places)}{more}; what is said "
                "of float64 was computed in float64 there, too"
            )


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
