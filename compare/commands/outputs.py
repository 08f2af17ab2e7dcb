"""Same weights, same inputs, three implementations: how far apart, on every device and in two precisions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..conversion.tensors import numpy_state
from ..proof.agreement import Agreement, agreement
from ..proof.cases import CASES, FRAMEWORKS, TITLES, Case, Framework, State
from ..proof.parity import exact_and_limit
from ..proof.rounding_bound import FLOAT64_RELATIVE, PRECISIONS, TF32
from ..report.model import Cell, Check, Histogram, Section, Table
from ..runners.run import build_torch, compiled, devices_to_run, missing_cuda, run

SEED = 211
DTYPES = ("float64", "float32")
# What is less counts as the first, what is more as the last.
ULPS = tuple(4.0**power for power in range(-3, 8))


def sections(device: str | None = None) -> Iterator[Section]:
    """Yield one section a device."""
    for each in devices_to_run(device):
        yield _section(each)
    missing = missing_cuda()
    if device is not None or not missing:
        return
    skipped = Check(
        "outputs on cuda", "all", None, missing, "a CUDA device that both frameworks see"
    )
    yield Section("Outputs on CUDA", [f"Not yet run on a GPU: {missing}."], [skipped])


def case_state(case: Case, dtype: str) -> State:
    """Return the state of a torch module with the buffer, seeded, in the given precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = build_torch(case.config, buffer=True)
    return numpy_state(module.to(getattr(torch, dtype)).state_dict())


class _Result(NamedTuple):
    """One case in one precision: each implementation against the reference, Linen and NNX against torch.

    `ulps` holds the errors of each implementation, and the `bound`, in units of the last place of
    the exact outputs.
    """

    case: str
    dtype: str
    against_exact: dict[Framework, Agreement]
    against_torch: dict[Framework, Agreement]
    ulps: dict[str, np.ndarray]


def _measure(case: Case, dtype: str, device: str) -> _Result:
    state = case_state(case, dtype)
    inputs = case.inputs().astype(dtype)
    found = {name: compiled(name, case.config, device)(state, inputs) for name in FRAMEWORKS}
    exact, limit = exact_and_limit(case.config, state, inputs)
    ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.float64)
    return _Result(
        case.name,
        dtype,
        {name: agreement(outputs, exact, limit) for name, outputs in found.items()},
        {name: agreement(found[name], found["torch"]) for name in ("linen", "nnx")},
        {
            **{name: np.abs(outputs - exact) / ulp for name, outputs in found.items()},
            "bound": limit / ulp,
        },
    )


def defaults(device: str) -> Table:
    """Return the worst error of each implementation's default float32 over the bounds of float32 and of TF32."""
    rows: list[list[Cell]] = []
    for case in CASES:
        state, inputs = case_state(case, "float32"), case.inputs()
        for name in FRAMEWORKS:
            outputs = run(name, case.config, state, inputs, device=device, matmul="default")
            ratios = []
            for precision in (PRECISIONS["float32"], TF32):
                exact, limit = exact_and_limit(case.config, state, inputs, precision=precision)
                ratios.append(agreement(outputs, exact, limit).ratio)
            rows.append([case.name, name, *ratios])
    return Table(["case", "implementation", "over float32's", "over TF32's"], rows)


def _histogram(results: list[_Result]) -> Histogram:
    """Count how far the float32 outputs of all cases are from the reference, and how far they may be, in ulps."""
    counts = {}
    for name in (*FRAMEWORKS, "bound"):
        ulps = np.concatenate(
            [result.ulps[name].ravel() for result in results if result.dtype == "float32"]
        )
        counts[name] = np.histogram(np.clip(ulps, ULPS[0], ULPS[-1]), ULPS)[0].tolist()
    title = "float32 outputs of all cases: error in units of the last place, and the bound"
    return Histogram(title, "ulps", list(ULPS), counts)


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
            "(at most 1 holds; see compare/proof/rounding_bound.py). Then Flax, the worse of Linen and NNX, against "
            "PyTorch: largest absolute difference, and the same over the largest output.",
            Table(["case", "dtype", "torch", "linen", "nnx", "max abs", "max rel"], rows),
        ],
    )
    section.blocks.append(_histogram(results))
    if device == "cuda":
        section.blocks += [
            "float32 with each framework's default settings, against both bounds; not judged:"
        ]
        section.blocks.append(defaults(device))
    for name in FRAMEWORKS:
        agreed = [result.against_exact[name] for result in results]
        measured = f"worst error/bound {max(a.ratio for a in agreed):.2g}"
        count = f"{sum(a.held for a in agreed)}/{len(agreed)}"
        held = all(a.held for a in agreed)
        section.checks.append(
            Check(f"outputs on {device}", TITLES[name], held, measured, "at most 1", count)
        )
    for name in ("linen", "nnx"):
        apart = max(
            result.against_torch[name].relative for result in results if result.dtype == "float64"
        )
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
