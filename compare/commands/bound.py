"""Test the rounding bound with random weights, inputs and masks in every dtype."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..dtypes import numpy_dtype
from ..proof.agreement import agreement
from ..proof.cases import FRAMEWORKS, TITLES, Config, State, draw_parameters
from ..proof.parity import exact_and_limit
from ..proof.reference import attention_stages, causal_mask
from ..proof.rounding_bound import PRECISIONS, overflow
from ..report.model import Cell, Check, Section, Table
from ..runners.run import compiled

# (configuration, tokens). Few shapes, to save compile time; in most, tokens < context_length.
SHAPES = (
    (Config(3, 5, 6, 0.0), 6),
    (Config(13, 11, 7, 0.0, qkv_bias=True), 5),
    (Config(1, 2, 3, 0.0), 2),
    (Config(29, 17, 19, 0.0, qkv_bias=True), 11),
    (Config(61, 31, 67, 0.0, qkv_bias=True), 53),
)
# Scales of the weights; the inputs are standard normal. The largest makes some float16 scores
# overflow.
SCALES = (0.01, 0.3, 1.0, 60.0)
# A relative error that is small enough for a linear response, and well above float64 rounding.
SLIP = 1e-6


@dataclass
class BoundCounts:
    """The results of one dtype.

    Attributes:
        cases: how many cases were drawn.
        outside: how many were skipped because the dtype may overflow.
        ratios: error/bound of every case, by framework.
        slips: the smallest relative error of the scores that exceeds the bound, by configuration.
    """

    cases: int = 0
    outside: int = 0
    ratios: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    slips: dict[Config, float] = field(default_factory=lambda: defaultdict(lambda: float("inf")))


def sections(cases: int, seed: int = 0) -> Iterator[Section | str]:
    """Run random cases; yield progress messages, then one section with a row for each dtype."""
    random = np.random.default_rng(seed)
    runners = {(name, shape): compiled(name, shape[0]) for shape in SHAPES for name in FRAMEWORKS}
    counts = {dtype: BoundCounts() for dtype in PRECISIONS}
    for index in range(cases):
        if index % 20 == 0:
            yield f"{index} of {cases} cases"
        dtype = list(PRECISIONS)[index % len(PRECISIONS)]
        shape = SHAPES[random.integers(len(SHAPES))]
        _run_case(counts[dtype], dtype, shape, runners, random)
    yield _section(counts, seed)


def draw(
    config: Config, tokens: int, dtype: str, random: np.random.Generator
) -> tuple[State, np.ndarray]:
    """Draw weights, a mask and inputs.

    The weights have one of the scales. The mask is causal or has a random share of blocked entries.
    """
    scale = SCALES[random.integers(len(SCALES))]
    state = draw_parameters(config, random, scale)
    square = config.context_length, config.context_length
    mask = (
        causal_mask(config.context_length)
        if random.random() < 0.5
        else random.random(square) < random.random()
    )
    rounded = {key: value.astype(numpy_dtype(dtype)) for key, value in state.items()}
    rounded["mask"] = np.asarray(mask, dtype=np.float32)
    inputs = random.standard_normal((2, tokens, config.input_embedding_dim)).astype(
        numpy_dtype(dtype)
    )
    return rounded, inputs


def _run_case(
    counts: BoundCounts,
    dtype: str,
    shape: tuple[Config, int],
    runners: dict,
    random: np.random.Generator,
) -> None:
    """Run one random case in each framework; record error/bound and the smallest slip caught."""
    config, tokens = shape
    state, inputs = draw(config, tokens, dtype, random)
    counts.cases += 1
    if overflow(inputs, state, state["mask"], PRECISIONS[dtype]):
        counts.outside += 1
        return
    exact, limit = exact_and_limit(config, state, inputs)
    for name in FRAMEWORKS:
        counts.ratios[name].append(
            agreement(runners[name, shape](state, inputs), exact, limit).ratio
        )
    slipped = {
        key: value.astype(np.float64) * (1 + SLIP if "query" in key else 1)
        for key, value in state.items()
    }
    wrong = attention_stages(inputs, slipped, state["mask"]).context
    error_per_slip = np.abs(wrong - exact) / SLIP
    sensitivity = np.nanmax(error_per_slip / limit, initial=0.0)
    if sensitivity:
        counts.slips[config] = min(counts.slips[config], float(1 / sensitivity))


def _section(counts: dict[str, BoundCounts], seed: int) -> Section:
    rows: list[list[Cell]] = []
    total = sum(dtype_counts.cases for dtype_counts in counts.values())
    section = Section(f"The rounding bound under {total} random cases")
    for dtype, dtype_counts in counts.items():
        ratios = dtype_counts.ratios
        worst = {name: max(ratios[name], default=float("nan")) for name in FRAMEWORKS}
        rows.append([dtype, dtype_counts.cases, dtype_counts.outside, *worst.values()])
        for name, ratio in worst.items():
            section.checks.append(
                Check(
                    f"bound holds in {dtype}",
                    TITLES[name],
                    ratio <= 1.0,
                    f"worst error/bound {ratio:.2g} of {len(ratios[name])}",
                    "at most 1",
                )
            )
    section.blocks = [
        f'Seed {seed}. "outside" counts the cases in which the dtype may overflow; they are not '
        "compared. The last columns show the worst error/bound of each framework.",
        Table(["dtype", "cases", "outside", *FRAMEWORKS], rows),
        "What the bound would catch: the smallest relative error of the scores that exceeds it, in "
        "the most sensitive case of each size. Above 1 the bound is too wide to check the scores "
        "in that dtype.",
        Table(["tokens", "head_dim", *PRECISIONS], _slip_rows(counts)),
    ]
    return section


def _slip_rows(counts: dict[str, BoundCounts]) -> list[list[Cell]]:
    return [
        [
            tokens,
            config.output_embedding_dim,
            *(dtype_counts.slips[config] for dtype_counts in counts.values()),
        ]
        for config, tokens in SHAPES
    ]
