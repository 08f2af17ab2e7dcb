"""Is the bound a bound? Drawn weights, inputs and masks in every dtype, each implementation against the reference."""

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

# Few shapes, so that compiling does not take the time; tokens < context_length in most.
SHAPES = (
    (Config(3, 5, 6, 0.0), 6),
    (Config(13, 11, 7, 0.0, qkv_bias=True), 5),
    (Config(1, 2, 3, 0.0), 2),
    (Config(29, 17, 19, 0.0, qkv_bias=True), 11),
    (Config(61, 31, 67, 0.0, qkv_bias=True), 53),
)
# Of the weights; the inputs are standard normal. The largest sends some float16 scores out of
# range.
SCALES = (0.01, 0.3, 1.0, 60.0)
# A slip small enough to be linear in, large enough to stand clear of float64 rounding.
SLIP = 1e-6


@dataclass
class BoundCounts:
    """What the cases of one dtype gave; `slips` by shape, the smallest."""

    cases: int = 0
    outside: int = 0
    ratios: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    slips: dict[Config, float] = field(default_factory=lambda: defaultdict(lambda: float("inf")))


def sections(cases: int, seed: int = 0) -> Iterator[Section | str]:
    """Draw the cases and yield one section with a row for each dtype; on the way, how many are done."""
    random = np.random.default_rng(seed)
    runners = {(name, shape): compiled(name, shape[0]) for shape in SHAPES for name in FRAMEWORKS}
    tallies = {dtype: BoundCounts() for dtype in PRECISIONS}
    for index in range(cases):
        if index % 20 == 0:
            yield f"{index} of {cases} cases"
        dtype = list(PRECISIONS)[index % len(PRECISIONS)]
        shape = SHAPES[random.integers(len(SHAPES))]
        _judge(tallies[dtype], dtype, shape, runners, random)
    yield _section(tallies, seed)


def draw(
    config: Config, tokens: int, dtype: str, random: np.random.Generator
) -> tuple[State, np.ndarray]:
    """Draw weights at one of the scales, a mask with any share of open entries or the causal one, and inputs."""
    scale = SCALES[random.integers(len(SCALES))]
    state = draw_parameters(config, random, scale)
    square = config.context_length, config.context_length
    mask = (
        causal_mask(config.context_length)
        if random.random() < 0.5
        else random.random(square) < random.random()
    )
    arrays = {key: value.astype(numpy_dtype(dtype)) for key, value in state.items()}
    arrays["mask"] = np.asarray(mask, dtype=np.float32)
    inputs = random.standard_normal((2, tokens, config.input_embedding_dim)).astype(
        numpy_dtype(dtype)
    )
    return arrays, inputs


def _judge(
    tally: BoundCounts,
    dtype: str,
    shape: tuple[Config, int],
    runners: dict,
    random: np.random.Generator,
) -> None:
    """Run one case in each implementation; keep error over bound, and the slip that the bound would catch."""
    state, inputs = draw(*shape, dtype, random)
    tally.cases += 1
    if overflow(inputs, state, state["mask"], PRECISIONS[dtype]):
        tally.outside += 1
        return
    exact, limit = exact_and_limit(shape[0], state, inputs)
    for name in FRAMEWORKS:
        tally.ratios[name].append(
            agreement(runners[name, shape](state, inputs), exact, limit).ratio
        )
    slipped = {
        key: value.astype(np.float64) * (1 + SLIP if "query" in key else 1)
        for key, value in state.items()
    }
    moved = np.abs(attention_stages(inputs, slipped, state["mask"]).context - exact) / SLIP
    caught = np.nanmax(moved / limit, initial=0.0)
    if caught:
        tally.slips[shape[0]] = min(tally.slips[shape[0]], float(1 / caught))


def _section(tallies: dict[str, BoundCounts], seed: int) -> Section:
    rows: list[list[Cell]] = []
    section = Section(
        f"The rounding bound under {sum(tally.cases for tally in tallies.values())} drawn cases"
    )
    for dtype, tally in tallies.items():
        worst = {name: max(tally.ratios[name], default=float("nan")) for name in FRAMEWORKS}
        rows.append([dtype, tally.cases, tally.outside, *worst.values()])
        for name, ratio in worst.items():
            section.checks.append(
                Check(
                    f"bound holds in {dtype}",
                    TITLES[name],
                    ratio <= 1.0,
                    f"worst error/bound {ratio:.2g} of {len(tally.ratios[name])}",
                    "at most 1",
                )
            )
    section.blocks = [
        f"Seed {seed}. Outside: cases in which the dtype may overflow, not compared. Then the worst error over the "
        "bound of each implementation.",
        Table(["dtype", "cases", "outside", *FRAMEWORKS], rows),
        "What the bound would catch: the smallest relative slip of the scores that leaves it, in the case of each "
        "size that shows it best. Above 1 the bound says nothing of the scores in that dtype.",
        Table(["tokens", "head_dim", *PRECISIONS], _slips(tallies)),
    ]
    return section


def _slips(tallies: dict[str, BoundCounts]) -> list[list[Cell]]:
    return [
        [tokens, config.output_embedding_dim, *(tally.slips[config] for tally in tallies.values())]
        for config, tokens in SHAPES
    ]
