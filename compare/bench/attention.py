"""Measure time, error and memory of attention in both frameworks against their peers.

The contestants are timed in turn, in one run.
"""

import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..dtypes import numpy_dtype
from ..proof.agreement import agreement
from ..proof.reference import masked_attention
from ..proof.rounding_bound import PRECISIONS, attention_bounds, most_tiles
from ..report.model import Block, Cell, Check, ContestantStyle, Curves, Section, Table
from ..subprocesses import ON_CPU, run_module
from .contestants import AttentionProblem, Contestant, Step, contestants, draw_problem

TOKENS: tuple[int, ...] = (6, 256, 512, 1024, 2048, 4096)
WINDOW = "window 256"
QUICK_TOKENS = (6, 1024)
GPU_TOKENS = (*QUICK_TOKENS, 4096)
MASKS: tuple[str, ...] = ("causal", WINDOW, "random blocks")
HEADS, HEAD_DIM = 12, 64
NOTEBOOK_SHAPE = (2, 1, 6, 5)
LONGEST = 1.0  # seconds; a step expected to take longer, judged by half the tokens, is not timed
SAMPLE = 0.01  # seconds; the least duration of one measurement
MEMORY_OF = (("torch", "formula"), ("torch", "ours"), ("flax", "formula"), ("flax", "ours"))
MEMORY_TOKENS, MEMORY_FORWARD, MEMORY_BACKWARD = 8192, 64e6, 200e6  # limits in bytes
MANY_ROUNDS = 1024  # up to this many tokens, three times as many rounds


class BenchmarkCase(NamedTuple):
    """One shape, mask, dtype and direction."""

    mask: str
    dtype: str
    backward: bool
    tokens: int


class Timed(NamedTuple):
    """The times of one contestant in one case.

    seconds: of one step, one entry for each round; empty if the contestant was not timed.
    first_call: seconds of the first call, including compilation.
    ratio: the error of the outputs over its rounding bound.
    why_not: why it was not run.
    """

    contestant: Contestant
    seconds: list[float]
    first_call: float = 0.0
    ratio: float = 0.0
    why_not: str | None = None


Times = dict[BenchmarkCase, dict[str, Timed]]


def sections(
    quick: bool, rounds: int, device: str | None = None, plot: Path | None = None
) -> Iterator[Section | str]:
    """Yield the progress, and sections with the times, the ratios and the memory."""
    device = device or "cpu"
    tokens, masks, dtypes = TOKENS, MASKS, ["float32", "bfloat16"]
    if quick and device == "cpu":
        tokens, masks, dtypes = QUICK_TOKENS, ("causal",), ["float32"]
    elif quick:
        tokens, masks = GPU_TOKENS, ("causal",)
    times: Times = {}
    for dtype in dtypes:
        for mask in masks:
            for backward in (False, True):
                for size in tokens:
                    case = BenchmarkCase(mask, dtype, backward, size)
                    if mask == "causal" or size > 256:
                        yield f"{size} tokens, {mask}, {dtype}, {_pass(backward)}"
                        half = times.get(case._replace(tokens=size // 2), {})
                        # On a GPU torch multiplies float32 as float32, and JAX as TF32 unless told.
                        with jax.default_matmul_precision("highest"):
                            times[case] = _time(case, device, rounds, half, slow=not quick)
                section = _times_section(times, mask, dtype, backward)
                if plot is not None and (mask, dtype) == ("causal", "float32"):
                    _draw(section, plot, backward)
                yield section
    yield _ratios(times, device)
    if device == "cpu":
        yield "memory at 8192 tokens"
        yield _memory()


def _draw(section: Section, plot: Path, backward: bool) -> None:
    """Save the curves of a section to `plot`; the backward pass gets "-backward" in its name."""
    from ..report.plots import save  # imports matplotlib, which only --plot and --html need

    for block in section.blocks:
        if isinstance(block, Curves):
            save(block, plot.with_stem(f"{plot.stem}-backward") if backward else plot)


def _pass(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def _time(
    case: BenchmarkCase, device: str, rounds: int, half: dict[str, Timed], *, slow: bool
) -> dict[str, Timed]:
    """Time the contestants in turn, round by round.

    `half` has the times for half the tokens. A contestant that needs four times as long is skipped
    if that exceeds LONGEST.
    """
    shape = NOTEBOOK_SHAPE if case.tokens == 6 else (1, HEADS, case.tokens, HEAD_DIM)
    problem = draw_problem(shape, case.mask, case.dtype, device)
    exact = None if case.backward else _exact(problem)
    times: dict[str, Timed] = {}
    steps: dict[str, tuple[Step, int]] = {}
    for contestant, contestant_problem in _contestants_and_problems(problem, case, slow=slow):
        name = contestant.name
        if name in half and half[name].seconds and 4 * min(half[name].seconds) > LONGEST:
            reason = f"would take over {LONGEST:g} s"
            times[name] = Timed(contestant, [], why_not=reason)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside the compilers of peers
                step = contestant.make(contestant_problem, case.backward)
                first_call, outputs = _clocked(step)
        except Exception as error:  # a peer may raise anything
            first_line = str(error).partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}"[:200]
            times[name] = Timed(contestant, [], why_not=reason)
            continue
        ratio = 0.0
        if exact is not None and contestant_problem is problem:
            ratio = _ratio(outputs, contestant, *exact)
        times[name] = Timed(contestant, [], first_call, ratio)
        steps[name] = step, max(1, round(SAMPLE / _clocked(step)[0]))
        del outputs
    for _ in range(rounds if case.tokens > MANY_ROUNDS else 3 * rounds):
        for name, (step, repeats) in steps.items():
            step()  # untimed: warms up the caches and memory that the previous contestant evicted
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].seconds.append((time.perf_counter() - begin) / repeats)
    return times


def _clocked(step: Step) -> tuple[float, Any]:
    begin = time.perf_counter()
    outputs = step()
    return time.perf_counter() - begin, outputs


def _contestants_and_problems(
    problem: AttentionProblem, case: BenchmarkCase, *, slow: bool
) -> Iterator[tuple[Contestant, AttentionProblem]]:
    """Yield each contestant with its problem.

    For the window mask, also yield ours with a causal mask: the ratio of the two is checked.
    """
    for contestant in contestants(problem.device, slow=slow):
        yield contestant, problem
    if case.mask == WINDOW:
        causal = draw_problem(problem.cotangent.shape, "causal", case.dtype, problem.device)
        for contestant in contestants(problem.device, slow=False):
            if contestant.is_ours:
                yield contestant._replace(name=f"{contestant.name}, causal"), causal


def _exact(problem: AttentionProblem) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact outputs of the first head for the rounded inputs, and their error bound."""
    dtype = numpy_dtype(problem.dtype)
    queries, keys, values = (
        array[0, 0].astype(dtype).astype(np.float64) for array in problem.heads
    )
    tiles = most_tiles(len(problem.mask))
    stages = masked_attention(queries, keys, values, problem.mask)
    bound = attention_bounds(stages, (0.0, 0.0, 0.0), PRECISIONS[problem.dtype], tiles=tiles)
    return stages.context, bound.context


def _ratio(outputs: Any, contestant: Contestant, exact: np.ndarray, bound: np.ndarray) -> float:
    """Return the error over its bound, for the first head."""
    if contestant.framework == "torch":
        array = outputs.float().cpu().numpy()
    else:
        array = np.asarray(outputs).astype(np.float64)
    first_head = array[0, :, 0] if contestant.tokens_first else array[0, 0]
    return agreement(first_head, exact, bound).ratio


def _median(times: Times, case: BenchmarkCase, name: str) -> float | None:
    timed = times.get(case, {}).get(name)
    return statistics.median(timed.seconds) if timed and timed.seconds else None


def _times_section(times: Times, mask: str, dtype: str, backward: bool) -> Section:
    cases = [case for case in times if case[:3] == (mask, dtype, backward)]
    by_name = {name: timed.contestant for case in cases for name, timed in times[case].items()}
    sizes = [str(case.tokens) for case in cases]
    medians: list[list[Cell]] = []
    spreads: list[list[Cell]] = []
    first_calls: list[list[Cell]] = []
    errors: list[list[Cell]] = []
    skipped: dict[str, str] = {}
    for name, contestant in by_name.items():
        timed = [times[case].get(name) or Timed(contestant, []) for case in cases]
        medians.append([name, *(_milliseconds(entry) for entry in timed)])
        spreads.append([name, *(_spread(entry) for entry in timed)])
        first_calls.append(
            [name, *(f"{entry.first_call:.2f}" if entry.seconds else "" for entry in timed)]
        )
        errors.append([name, *(f"{entry.ratio:.2g}" if entry.seconds else "" for entry in timed)])
        if reasons := [entry.why_not for entry in timed if entry.why_not]:
            skipped[name] = reasons[-1]
    section = Section(f"{mask}, {dtype}, {_pass(backward)}: milliseconds by tokens")
    section.blocks = [
        Table(["ms", *sizes], medians),
        "Spread: half the interquartile range, in percent of the median.",
        Table(["spread, %", *sizes], spreads),
        "Seconds of the first call, including compilation.",
        Table(["s", *sizes], first_calls),
    ]
    if not backward:
        section.blocks += [
            "Error over the rounding bound (compare/proof/rounding_bound.py), first head.",
            Table(["ratio", *sizes], errors),
        ]
    if skipped:
        reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
        section.blocks.append(f"Not run: {'; '.join(reasons)}.")
    section.blocks += _curves(times, cases, by_name, section.title)
    return section


def _milliseconds(timed: Timed) -> str:
    if not timed.seconds:
        return ""
    median = statistics.median(timed.seconds)
    return f"{1e3 * median:.{3 if median < 1e-3 else 1}f}"


def _spread(timed: Timed) -> str:
    if len(timed.seconds) < 2:
        return ""
    low, median, high = statistics.quantiles(timed.seconds, n=4)
    return f"{50 * (high - low) / median:.0f}"


def _curves(
    times: Times, cases: list[BenchmarkCase], by_name: dict[str, Contestant], title: str
) -> list[Block]:
    """Return time against tokens, with the slope between the last two sizes of each contestant.

    The notebook's 6 tokens are left out, because their shape is a different one.
    """
    cases = [case for case in cases if case.tokens > 6]
    series: dict[str, list[float]] = {}
    styles: dict[str, ContestantStyle] = {}
    for name, contestant in by_name.items():
        medians = {case.tokens: _median(times, case, name) for case in cases}
        timed = [(tokens, seconds) for tokens, seconds in medians.items() if seconds is not None]
        if len(timed) > 1:
            (fewer, before), (more, after) = timed[-2:]
            slope = np.log2(after / before) / np.log2(more / fewer)
            label = f"{name}, slope {slope:.1f}"
            series[label] = [
                float("nan") if seconds is None else 1e3 * seconds for seconds in medians.values()
            ]
            styles[label] = ContestantStyle(contestant.framework, contestant.is_ours)
    if not series:
        return []
    sizes = [float(case.tokens) for case in cases]
    return [Curves(title, "tokens", "ms", sizes, series, sizes, log_x=True, contestants=styles)]


class RatioLimits(NamedTuple):
    """The required ratios of times in one direction: at most the first two, at least the others."""

    torch_to_sdpa: float
    flax_to_sdpa: float
    jax_nn_to_flax: float
    causal_to_window: float


FORWARD_LIMITS = RatioLimits(
    torch_to_sdpa=1.05, flax_to_sdpa=1.25, jax_nn_to_flax=4.0, causal_to_window=4.0
)
BACKWARD_LIMITS = RatioLimits(
    torch_to_sdpa=1.10, flax_to_sdpa=1.6, jax_nn_to_flax=3.0, causal_to_window=3.0
)


class Figure(NamedTuple):
    """A ratio of two median times and its limit, which is a maximum or a minimum."""

    name: str
    over: tuple[BenchmarkCase, str]
    under: tuple[BenchmarkCase, str]
    limit: float
    at_most: bool


def _required_ratios() -> Iterator[Figure]:
    for backward in (False, True):
        limits = BACKWARD_LIMITS if backward else FORWARD_LIMITS
        for size in (1024, 2048):
            case = BenchmarkCase("causal", "float32", backward, size)
            name = f"{size}, {_pass(backward)}"
            sdpa, torch_ours = (case, "torch SDPA is_causal"), (case, "torch ours")
            jax_nn, flax_ours = (case, "jax.nn"), (case, "Flax ours")
            yield Figure(
                f"torch ours / SDPA is_causal, {name}", torch_ours, sdpa, limits.torch_to_sdpa, True
            )
            yield Figure(
                f"Flax ours / SDPA is_causal, {name}", flax_ours, sdpa, limits.flax_to_sdpa, True
            )
            yield Figure(
                f"jax.nn / Flax ours, {name}", jax_nn, flax_ours, limits.jax_nn_to_flax, False
            )
        window = BenchmarkCase(WINDOW, "float32", backward, 4096)
        smallest = BenchmarkCase("causal", "float32", backward, 6)
        for ours, formula in (("torch ours", "torch formula"), ("Flax ours", "JAX formula")):
            yield Figure(
                f"{ours}: causal / {WINDOW}, 4096, {_pass(backward)}",
                (window, f"{ours}, causal"),
                (window, ours),
                limits.causal_to_window,
                False,
            )
            name = f"{ours} / formula, 6, {_pass(backward)}"
            yield Figure(name, (smallest, ours), (smallest, formula), 1.1, True)


def _ratios(times: Times, device: str) -> Section:
    """Return the section with the ratios of medians; on a CPU they are compared with limits."""
    section = Section("Ratios of medians")
    rows: list[list[Cell]] = []
    for figure in _required_ratios():
        over, under = _median(times, *figure.over), _median(times, *figure.under)
        if over is None or under is None:
            continue
        ratio = over / under
        if device != "cpu":
            rows.append([figure.name, f"{ratio:.2f}", "not set"])
            continue
        limit = f"{'at most' if figure.at_most else 'at least'} {figure.limit:g}"
        held = ratio <= figure.limit if figure.at_most else ratio >= figure.limit
        rows.append([figure.name, f"{ratio:.2f}", limit])
        section.checks.append(Check(figure.name, "all", held, f"{ratio:.2f}", limit))
    section.blocks = [Table(["ratio", "found", "wanted"], rows)]
    return section


def _memory() -> Section:
    section = Section(f"Working memory at {MEMORY_TOKENS} tokens, one head, float32, causal mask")
    rows: list[list[Cell]] = []
    for framework, variant in MEMORY_OF:
        name = f"{framework} {variant}"
        cells: list[Cell] = [name]
        for backward, limit in ((False, MEMORY_FORWARD), (True, MEMORY_BACKWARD)):
            arguments = [framework, variant, str(MEMORY_TOKENS), str(backward)]
            used = run_module("compare.bench.attention_worker", arguments, ON_CPU)["bytes"]
            cells.append(f"{used / 1e6:.0f} MB")
            if variant == "ours":
                check = Check(
                    f"memory, {name}, {_pass(backward)}",
                    "all",
                    used < limit,
                    f"{used / 1e6:.0f} MB",
                    f"under {limit / 1e6:.0f} MB",
                )
                section.checks.append(check)
        rows.append(cells)
    section.blocks = [
        "Peak memory on top of inputs, mask and outputs. Each value is from its own process.",
        Table(["", "forward", "forward + backward"], rows),
    ]
    return section
