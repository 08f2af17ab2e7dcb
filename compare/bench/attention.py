"""Attention in both frameworks beside their peers, interleaved in one run: time, error and memory."""

import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import numpy_dtype
from ..proof.agreement import agreement
from ..proof.reference import masked_attention
from ..proof.rounding_bound import PRECISIONS, attention_bounds, most_tiles
from ..report.model import Block, Cell, Check, Curves, Section, Table
from ..subprocesses import ON_CPU, run_module
from .contestants import AttentionProblem, Contestant, Step, contestants, draw_problem

TOKENS: tuple[int, ...] = (6, 256, 512, 1024, 2048, 4096)
WINDOW = "window 256"
QUICK_TOKENS = (6, 1024)
MASKS: tuple[str, ...] = ("causal", WINDOW, "random blocks")
HEADS, HEAD_DIM = 12, 64
NOTEBOOK_SHAPE = (2, 1, 6, 5)
LONGEST = 1.0  # seconds a step may be expected to take, from half the tokens, to be timed
SAMPLE = 0.01  # seconds that one measurement takes at least
MEMORY_OF = ("torch formula", "torch ours", "flax formula", "flax ours")
MEMORY_TOKENS, MEMORY_FORWARD, MEMORY_BACKWARD = 8192, 64e6, 200e6
MANY_ROUNDS = 1024  # up to so many tokens rounds are short, and thrice as many
OURS = ("torch ours", "Flax ours")


class BenchmarkCase(NamedTuple):
    """One shape, mask, dtype and direction."""

    mask: str
    dtype: str
    backward: bool
    tokens: int


class Timed(NamedTuple):
    """What one contestant needed: seconds a step, each round, and for the first call; or why it did not run."""

    seconds: list[float]
    first: float
    ratio: float  # error over bound, of the outputs
    why_not: str = ""


Times = dict[BenchmarkCase, dict[str, Timed]]


def sections(
    quick: bool, rounds: int, device: str | None = None, plot: Path | None = None
) -> Iterator[Section | str]:
    """Yield the times, the figures to reach and the memory; on the way, what is being timed."""
    place = device or "cpu"
    tokens, masks, dtypes = TOKENS, MASKS, ["float32", "bfloat16"]
    if quick:
        tokens, masks, dtypes = QUICK_TOKENS, ("causal",), ["float32"]
    times: Times = {}
    for dtype in dtypes:
        for mask in masks:
            for backward in (False, True):
                for size in tokens:
                    run = BenchmarkCase(mask, dtype, backward, size)
                    if mask == "causal" or size > 256:
                        yield f"{size} tokens, {mask}, {dtype}, {_pass(backward)}"
                        smaller = times.get(run._replace(tokens=size // 2), {})
                        times[run] = _time(run, place, rounds, smaller, slow=not quick)
                section = _times_section(times, mask, dtype, backward)
                if plot is not None and (mask, dtype) == ("causal", "float32"):
                    _draw(section, plot, backward)
                yield section
    yield _figures(times)
    if place == "cpu":
        yield "memory at 8192 tokens"
        yield _memory()


def _draw(section: Section, plot: Path, backward: bool) -> None:
    """Save the section's curves: those of the forward pass under the name given, the others beside it."""
    from ..report.plots import save  # matplotlib, which nothing else here needs

    for curves in section.blocks:
        if isinstance(curves, Curves):
            save(curves, plot.with_stem(f"{plot.stem}-backward") if backward else plot)


def _pass(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def _time(
    run: BenchmarkCase, device: str, rounds: int, smaller: dict[str, Timed], *, slow: bool
) -> dict[str, Timed]:
    """Time every contestant in turn, round by round; not those for which half the tokens took too long."""
    shape = NOTEBOOK_SHAPE if run.tokens == 6 else (1, HEADS, run.tokens, HEAD_DIM)
    problem = draw_problem(shape, run.mask, run.dtype, device)
    exact = None if run.backward else _exact(problem)
    found: dict[str, Timed] = {}
    steps: dict[str, tuple[Step, int]] = {}
    for contestant, given in _given(problem, run, slow=slow):
        half = smaller.get(contestant.name)
        if half is not None and half.seconds and 4 * min(half.seconds) > LONGEST:
            found[contestant.name] = Timed([], 0.0, 0.0, f"would take over {LONGEST:g} s")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a peer's compiler deprecates
                step = contestant.make(given, run.backward)
                first, outputs = _clocked(step)
        except Exception as error:  # a peer may refuse for any reason of its own
            found[contestant.name] = Timed(
                [], 0.0, 0.0, f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
            )
            continue
        ratio = (
            _ratio(outputs, contestant.name, *exact)
            if exact is not None and given is problem
            else 0.0
        )
        found[contestant.name] = Timed([], first, ratio)
        steps[contestant.name] = step, max(1, round(SAMPLE / _clocked(step)[0]))
        del outputs
    for _ in range(rounds if run.tokens > MANY_ROUNDS else 3 * rounds):
        for name, (step, repeats) in steps.items():
            step()  # alone pays for caches and memory that the one before it has left cold
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            found[name].seconds.append((time.perf_counter() - begin) / repeats)
    return found


def _clocked(step: Step) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = step()
    return time.perf_counter() - begin, found


def _given(
    problem: AttentionProblem, run: BenchmarkCase, *, slow: bool
) -> Iterator[tuple[Contestant, AttentionProblem]]:
    """Yield who is timed, and on what; beside a window also ours under a causal mask, for the ratio of the two."""
    for contestant in contestants(problem.device, slow=slow):
        yield contestant, problem
    if run.mask == WINDOW:
        causal = draw_problem(problem.cotangent.shape, "causal", run.dtype, problem.device)
        for contestant in contestants(problem.device, slow=False):
            if contestant.name in OURS:
                yield contestant._replace(name=f"{contestant.name}, causal"), causal


def _exact(given: AttentionProblem) -> tuple[np.ndarray, np.ndarray]:
    """Return the first head's exact outputs from what its entries round to, and the bound of their error."""
    dtype = numpy_dtype(given.dtype)
    queries, keys, values = (array[0, 0].astype(dtype).astype(np.float64) for array in given.heads)
    tiles = most_tiles(len(given.mask))
    stages = masked_attention(queries, keys, values, given.mask)
    bound = attention_bounds(stages, (0.0, 0.0, 0.0), PRECISIONS[given.dtype], tiles=tiles)
    return stages.context, bound.context


def _ratio(outputs: Any, name: str, exact: np.ndarray, bound: np.ndarray) -> float:
    found = (
        outputs.float().cpu().numpy()
        if name.startswith("torch")
        else np.asarray(outputs).astype(np.float64)
    )
    tokens_first = name.startswith(("jax.nn", "flax."))
    return agreement(found[0, :, 0] if tokens_first else found[0, 0], exact, bound).ratio


def _median(times: Times, run: BenchmarkCase, name: str) -> float | None:
    seconds = times[run][name].seconds if run in times and name in times[run] else []
    return statistics.median(seconds) if seconds else None


def _times_section(times: Times, mask: str, dtype: str, backward: bool) -> Section:
    runs = [run for run in times if run[:3] == (mask, dtype, backward)]
    names = list(dict.fromkeys(name for run in runs for name in times[run]))
    sizes = [str(run.tokens) for run in runs]
    rows: list[list[Cell]] = []
    spreads: list[list[Cell]] = []
    first: list[list[Cell]] = []
    errors: list[list[Cell]] = []
    skipped: dict[str, str] = {}
    for name in names:
        timed = [times[run].get(name) or Timed([], 0.0, 0.0) for run in runs]
        rows.append([name, *(_milliseconds(entry) for entry in timed)])
        spreads.append([name, *(_spread(entry) for entry in timed)])
        first.append([name, *(f"{entry.first:.2f}" if entry.seconds else "" for entry in timed)])
        errors.append([name, *(f"{entry.ratio:.2g}" if entry.seconds else "" for entry in timed)])
        if reasons := [entry.why_not for entry in timed if entry.why_not]:
            skipped[name] = reasons[-1]
    section = Section(f"{mask}, {dtype}, {_pass(backward)}: milliseconds by tokens")
    blocks: list[Block] = [Table(["ms", *sizes], rows)]
    blocks += [
        "Half the distance of the quartiles, in percent of the median.",
        Table(["spread, %", *sizes], spreads),
    ]
    blocks += ["Seconds of the first call, with compilation.", Table(["s", *sizes], first)]
    if not backward:
        blocks += [
            "Error over rounding bound (compare/proof/rounding_bound.py), first head.",
            Table(["ratio", *sizes], errors),
        ]
    if skipped:
        blocks.append(
            "Not run: " + "; ".join(f"{name} ({why})" for name, why in skipped.items()) + "."
        )
    section.blocks = [*blocks, *_curves(times, runs, names, section.title)]
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


def _curves(times: Times, runs: list[BenchmarkCase], names: list[str], title: str) -> list[Block]:
    """Return time against tokens, without the notebook's size, whose shape is another; the slope is of the last two."""
    runs = [run for run in runs if run.tokens > 6]
    series = {}
    for name in names:
        found = {run.tokens: _median(times, run, name) for run in runs}
        timed = [(tokens, seconds) for tokens, seconds in found.items() if seconds is not None]
        if len(timed) > 1:
            (fewer, before), (more, after) = timed[-2:]
            slope = np.log2(after / before) / np.log2(more / fewer)
            points = [
                float("nan") if seconds is None else 1e3 * seconds for seconds in found.values()
            ]
            series[f"{name}, slope {slope:.1f}"] = points
    sizes = [float(run.tokens) for run in runs]
    return [Curves(title, "tokens", "ms", sizes, series, sizes, log_x=True)] if series else []


class Figure(NamedTuple):
    """A ratio of two times that is to be reached: at most, or at least."""

    name: str
    over: tuple[BenchmarkCase, str]
    under: tuple[BenchmarkCase, str]
    limit: float
    at_most: bool


def _wanted() -> Iterator[Figure]:
    for backward in (False, True):
        for size in (1024, 2048):
            run = BenchmarkCase("causal", "float32", backward, size)
            name = f"{size}, {_pass(backward)}"
            sdpa = run, "torch SDPA is_causal"
            yield Figure(
                f"torch ours / SDPA is_causal, {name}",
                (run, OURS[0]),
                sdpa,
                (1.05, 1.10)[backward],
                True,
            )
            yield Figure(
                f"Flax ours / SDPA is_causal, {name}",
                (run, OURS[1]),
                sdpa,
                (1.25, 1.6)[backward],
                True,
            )
            yield Figure(
                f"jax.nn / Flax ours, {name}",
                (run, "jax.nn"),
                (run, OURS[1]),
                (4.0, 3.0)[backward],
                False,
            )
        for ours in OURS:
            window = BenchmarkCase(WINDOW, "float32", backward, 4096)
            name = f"{ours}: causal / {WINDOW}, 4096, {_pass(backward)}"
            yield Figure(
                name, (window, f"{ours}, causal"), (window, ours), (4.0, 3.0)[backward], False
            )
            smallest = BenchmarkCase("causal", "float32", backward, 6)
            formula = "torch formula" if ours == OURS[0] else "JAX formula"
            name = f"{ours} / formula, 6, {_pass(backward)}"
            yield Figure(name, (smallest, ours), (smallest, formula), 1.1, True)


def _figures(times: Times) -> Section:
    """Return the ratios that are to be reached, of the medians, and what each is."""
    section = Section("Ratios of medians")
    rows: list[list[Cell]] = []
    for figure in _wanted():
        over, under = _median(times, *figure.over), _median(times, *figure.under)
        if over is None or under is None:
            continue
        ratio = over / under
        limit = f"{'at most' if figure.at_most else 'at least'} {figure.limit:g}"
        held = ratio <= figure.limit if figure.at_most else ratio >= figure.limit
        rows.append([figure.name, f"{ratio:.2f}", limit])
        section.checks.append(Check(figure.name, "all", held, f"{ratio:.2f}", limit))
    section.blocks = [Table(["ratio", "found", "wanted"], rows)]
    return section


def _memory() -> Section:
    section = Section(f"Working memory at {MEMORY_TOKENS} tokens, one head, float32, causal mask")
    rows: list[list[Cell]] = []
    for name in MEMORY_OF:
        cells: list[Cell] = [name]
        for backward, limit in ((False, MEMORY_FORWARD), (True, MEMORY_BACKWARD)):
            arguments = [name, str(MEMORY_TOKENS), str(backward)]
            used = run_module("compare.bench.attention_worker", arguments, ON_CPU)["bytes"]
            cells.append(f"{used / 1e6:.0f} MB")
            if name.endswith("ours"):
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
        "The most that the process held above inputs, mask and outputs, each in a process of its own.",
        Table(["", "forward", "forward + backward"], rows),
    ]
    return section
