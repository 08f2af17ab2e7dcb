"""Same weights, same inputs, three implementations: how far apart, on every device and in two precisions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..cases import CASES, Case
from ..check import Agreement, agreement
from ..convert import StateDict
from ..findings import Cell, Check, Section, Table
from ..parity import against_reference
from ..rounding import FLOAT64_RELATIVE
from ..run import IMPLEMENTATIONS, TITLES, Implementation, build_torch, missing_cuda, run

SEED = 211
DTYPES = ("float64", "float32")


def sections() -> Iterator[Section]:
    """Yield one section a device."""
    yield _section("cpu")
    missing = missing_cuda()
    if not missing:
        yield _section("cuda")
        return
    skipped = Check("outputs on cuda", "all", None, missing, "a CUDA device that both frameworks see")
    yield Section("Outputs on CUDA", [f"Not run: {missing}."], [skipped])


def case_state(case: Case, dtype: str) -> StateDict:
    """Return the state of a torch module with the buffer, seeded, in the given precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = build_torch(case.config, buffer=True)
    return module.to(getattr(torch, dtype)).state_dict()


class _Result(NamedTuple):
    """One case in one precision: each implementation against the reference, Linen and NNX against torch."""

    case: str
    dtype: str
    against_exact: dict[Implementation, Agreement]
    against_torch: dict[Implementation, Agreement]


def _measure(case: Case, dtype: str, device: str) -> _Result:
    state = case_state(case, dtype)
    inputs = case.inputs().astype(dtype)
    found = {name: run(name, case.config, state, inputs, device=device) for name in IMPLEMENTATIONS}
    return _Result(
        case.name,
        dtype,
        {name: against_reference(outputs, case.config, state, inputs) for name, outputs in found.items()},
        {name: agreement(found[name], found["torch"]) for name in ("linen", "nnx")},
    )


def _section(device: str) -> Section:
    results = [_measure(case, dtype, device) for case in CASES for dtype in DTYPES]
    rows: list[list[Cell]] = [
        [
            result.case,
            result.dtype,
            *(agreed.ratio for agreed in result.against_exact.values()),
            max(agreed.absolute for agreed in result.against_torch.values()),
            max(agreed.relative for agreed in result.against_torch.values()),
        ]
        for result in results
    ]
    section = Section(
        f"Outputs on {device.upper()}: the same function",
        [
            *([f"On {torch.cuda.get_device_name()}."] if device == "cuda" else []),
            "Each implementation against a float64 reference: worst error over the rounding bound, entry by entry "
            "(at most 1 holds; compare/rounding.py derives it). Then Flax, the worse of Linen and NNX, against "
            "PyTorch: largest absolute difference, and the same over the largest output.",
            Table(["case", "dtype", "torch", "linen", "nnx", "max abs", "max rel"], rows),
        ],
    )
    for name in IMPLEMENTATIONS:
        agreed = [result.against_exact[name] for result in results]
        measured = f"worst error/bound {max(a.ratio for a in agreed):.2g}"
        count = f"{sum(a.held for a in agreed)}/{len(agreed)}"
        held = all(a.held for a in agreed)
        section.checks.append(Check(f"outputs on {device}", TITLES[name], held, measured, "at most 1", count))
    for name in ("linen", "nnx"):
        apart = max(result.against_torch[name].relative for result in results if result.dtype == "float64")
        section.checks.append(
            Check(
                f"float64 on {device}: as PyTorch",
                TITLES[name],
                apart <= FLOAT64_RELATIVE,
                f"relative difference {apart:.2g}",
                f"at most {FLOAT64_RELATIVE:g}",
            )
        )
    return section
