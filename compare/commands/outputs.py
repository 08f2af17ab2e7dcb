"""Compare the outputs of the three implementations on every device, in float64 and float32."""

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
FLAX: tuple[Framework, ...] = ("linen", "nnx")
# Edges of the histogram. Errors outside are counted in the first and the last interval.
ULPS = tuple(4.0**power for power in range(-3, 8))


def sections(device: str | None = None) -> Iterator[Section]:
    """Yield one section per device."""
    for device_name in devices_to_run(device):
        yield _section(device_name)
    missing = missing_cuda()
    if device is not None or not missing:
        return
    skipped = Check(
        "outputs on cuda", "all", None, missing, "a CUDA device that both frameworks see"
    )
    yield Section("Outputs on CUDA", [f"Not yet run on a GPU: {missing}."], [skipped])


def case_state(case: Case, dtype: str) -> State:
    """Return the state of a torch module with the buffer, from a fixed seed, in this dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = build_torch(case.config, buffer=True)
    return numpy_state(module.to(getattr(torch, dtype)).state_dict())


class _Result(NamedTuple):
    """The results of one case in one dtype.

    Attributes:
        case: the name of the case.
        dtype: the dtype of weights, inputs and outputs.
        against_exact: each framework's agreement with the reference.
        against_torch: the agreement of Linen and NNX with torch.
        ulps: the errors of each framework, and "bound", in units of the last place of the exact
            outputs.
    """

    case: str
    dtype: str
    against_exact: dict[Framework, Agreement]
    against_torch: dict[Framework, Agreement]
    ulps: dict[str, np.ndarray]


def _measure(case: Case, dtype: str, device: str) -> _Result:
    state = case_state(case, dtype)
    inputs = case.inputs().astype(dtype)
    outputs = {name: compiled(name, case.config, device)(state, inputs) for name in FRAMEWORKS}
    exact, limit = exact_and_limit(case.config, state, inputs)
    ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.float64)
    ulps: dict[str, np.ndarray] = {
        name: np.abs(array - exact) / ulp for name, array in outputs.items()
    }
    ulps["bound"] = limit / ulp
    return _Result(
        case=case.name,
        dtype=dtype,
        against_exact={name: agreement(array, exact, limit) for name, array in outputs.items()},
        against_torch={name: agreement(outputs[name], outputs["torch"]) for name in FLAX},
        ulps=ulps,
    )


def defaults(device: str) -> Table:
    """Return error/bound with default float32 settings, against the float32 and TF32 bounds."""
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
    """Count the float32 errors of all cases, and the bounds, by their size in ulps."""
    counts = {}
    for name in (*FRAMEWORKS, "bound"):
        ulps = np.concatenate(
            [result.ulps[name].ravel() for result in results if result.dtype == "float32"]
        )
        counts[name] = np.histogram(np.clip(ulps, ULPS[0], ULPS[-1]), ULPS)[0].tolist()
    title = "float32 outputs of all cases: errors and bounds in units of the last place"
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
    section = Section(f"Outputs on {device.upper()}: the same function")
    if device == "cuda":
        section.blocks.append(f"On {torch.cuda.get_device_name()}.")
    section.blocks += [
        "torch, linen, nnx: the largest error against a float64 reference, each entry divided by "
        "its rounding bound. At most 1 is allowed; see compare/proof/rounding_bound.py. max abs, "
        "max rel: the largest difference between Flax and PyTorch for the worse of Linen and NNX, "
        "absolute and divided by the largest output.",
        Table(["case", "dtype", "torch", "linen", "nnx", "max abs", "max rel"], rows),
        _histogram(results),
    ]
    if device == "cuda":
        section.blocks += [
            "float32 with each framework's default settings, against both bounds. Not judged:",
            defaults(device),
        ]
    for name in FRAMEWORKS:
        agreements = [result.against_exact[name] for result in results]
        measured = f"worst error/bound {max(agreed.ratio for agreed in agreements):.2g}"
        count = f"{sum(agreed.held for agreed in agreements)}/{len(agreements)}"
        held = all(agreed.held for agreed in agreements)
        section.checks.append(
            Check(f"outputs on {device}", TITLES[name], held, measured, "at most 1", count)
        )
    for name in FLAX:
        largest = max(
            result.against_torch[name].relative for result in results if result.dtype == "float64"
        )
        section.checks.append(
            Check(
                f"float64 on {device}: as PyTorch",
                TITLES[name],
                largest <= FLOAT64_RELATIVE,
                f"relative difference {largest:.2g}",
                f"at most {FLOAT64_RELATIVE:g}",
            )
        )
    return section
