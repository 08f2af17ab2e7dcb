"""The judge rejects wrong arrays, the reference is the formula, and the bound is a bound."""

from typing import Any

import mpmath
import numpy as np
import pytest

from compare.commands import bound, outputs
from compare.dtypes import numpy_dtype
from compare.mutants import MUTANTS, planted
from compare.proof.agreement import agreement
from compare.proof.cases import CASES, FRAMEWORKS, Config
from compare.proof.parity import against_reference, exact_and_limit
from compare.proof.reference import attention_stages, masked_attention
from compare.proof.rounding_bound import EXP_ULPS, PRECISIONS, overflow
from compare.report.model import Section, Table
from compare.runners.run import run

from ..support import normal, numpy_state_of

hypothesis = pytest.importorskip("hypothesis")
assume, given, settings, st = (
    hypothesis.assume,
    hypothesis.given,
    hypothesis.settings,
    hypothesis.strategies,
)

ONES = np.ones((2, 3))


def changed(value: float) -> np.ndarray:
    array = ONES.copy()
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("found", "expected", "limit"),
    [
        (changed(np.nan), ONES, 1.0),
        (ONES, changed(np.nan), 1.0),
        (changed(np.nan), ONES, np.inf),
        (np.full((2, 3), np.nan), ONES, np.nan),
        (changed(np.inf), ONES, np.inf),
        (changed(np.inf), changed(-np.inf), np.inf),
        (changed(np.nextafter(1.0, 2.0)), ONES, 0.0),
        (changed(1.0 + 2e-3), ONES, 1e-3),
        (changed(1.1), ONES, np.nan),
        (changed(1.1), ONES, np.inf),
        (ONES, ONES, None),
        (ONES + np.array([1.0, -1.0, 0.0]), ONES, 0.5),
        (np.array([3.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]), 0.5),
    ],
    ids=[
        *(
            "nan found",
            "nan expected",
            "nan under an infinite limit",
            "all nan",
            "inf found",
            "inf of the other sign",
        ),
        *(
            "an ulp against a limit of 0",
            "twice the limit",
            "nan limit",
            "infinite limit",
            "no limit",
            "errors that cancel",
            "a permutation",
        ),
    ],
)
def test_the_judge_fails(found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    assert not agreement(found, expected, limit).held


def test_one_ulp_beyond_the_limit_fails_and_at_it_holds() -> None:
    limit = 2.0**-20
    assert agreement(np.array([1.0 + limit]), np.array([1.0]), limit).held
    assert not agreement(np.array([1.0 + limit * (1 + 2.0**-30)]), np.array([1.0]), limit).held


def test_one_wrong_entry_counts_the_same_among_a_million() -> None:
    for size in (1, 10**6):
        array = np.zeros(size)
        array[size // 2] = 1.5
        assert agreement(array, np.zeros(size), 1.0).ratio == 1.5
    with pytest.raises(ValueError, match="dimensions"):
        agreement(np.ones(1), np.zeros(1), np.ones((2, 1)))


def test_the_judge_names_the_worst_entry() -> None:
    result = agreement(changed(1.25), ONES, 0.125)
    assert (result.absolute, result.ratio, result.index) == (0.25, 2.0, (1, 2))
    assert not result.held


def test_matching_nan_and_inf_hold() -> None:
    special = np.array([np.nan, np.inf, -np.inf, -0.0])
    assert agreement(special, np.array([np.nan, np.inf, -np.inf, 0.0]), 0.0).held


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        agreement(np.zeros((0, 3)), np.zeros((0, 3)), 1.0)
    with pytest.raises(ValueError, match="a limit is negative"):
        agreement(ONES, ONES, -1.0)
    with pytest.raises(ValueError, match=r"cannot compare shapes \(2, 3\) and \(3,\)"):
        agreement(ONES, np.ones(3), 1.0)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_the_reference_is_the_formula_to_50_digits(leading: tuple[int, ...]) -> None:
    """mpmath adds one weight at a time, with and without dropout."""
    tokens, head_dim, rate = 3, 5, 0.25
    queries, keys, values = (
        normal(*leading, tokens, head_dim, seed=seed).astype(np.float64) for seed in range(3)
    )
    mask = np.array([[0, 1, 0, 1], [0, 0, 2, 1], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=np.float32)
    keep = np.random.default_rng(4).random((*leading, tokens, tokens)) >= rate
    for kept, dropped in ((None, 0.0), (keep, rate)):
        outputs = masked_attention(queries, keys, values, mask, kept, dropped).context
        assert outputs.shape == values.shape
        for index in np.ndindex(*leading, tokens):
            expected = _row(
                queries[index],
                keys[index[:-1]],
                values[index[:-1]],
                mask[index[-1]],
                np.ones(tokens, bool) if kept is None else kept[index],
                dropped,
            )
            # float64 sums of at most 5 terms, then an exp, a quotient and 3 terms more: under 64
            # roundings of entries that stay below 8.
            assert np.abs(outputs[index] - expected).max() <= 64 * 2.0**-53 * 8


def _row(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    blocked: np.ndarray,
    keep: np.ndarray,
    rate: float,
) -> np.ndarray:
    """One row of attention in 50 digits, rounded to float64 at the end."""
    with mpmath.workdps(50):
        opened = [j for j in range(len(keys)) if blocked[j] == 0]
        dots = {j: mpmath.fdot(map(mpmath.mpf, query), map(mpmath.mpf, keys[j])) for j in opened}
        raised = {j: mpmath.exp(dots[j] / mpmath.sqrt(len(query))) for j in opened}
        total = mpmath.fsum(raised.values()) * (1 - mpmath.mpf(rate))
        mixed = [
            mpmath.fsum(raised[j] * mpmath.mpf(values[j, e]) for j in opened if keep[j]) / total
            for e in range(values.shape[1])
        ]
        return np.array([float(entry) for entry in mixed])


# Each size is compiled again, so there are few examples. `python -m compare bound` draws thousands.
@settings(max_examples=8)
@given(
    sizes=st.tuples(*(st.integers(1, 17) for _ in range(3))),
    batch=st.integers(1, 3),
    slack=st.integers(0, 3),
    bias=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 8.0]),
    opened=st.floats(0.0, 1.0),
    dtype=st.sampled_from(list(PRECISIONS)),
    seed=st.integers(0, 2**16),
)
@pytest.mark.again
@pytest.mark.slow
def test_no_implementation_exceeds_the_bound(
    sizes: tuple[int, int, int],
    batch: int,
    slack: int,
    bias: bool,
    scale: float,
    opened: float,
    dtype: str,
    seed: int,
) -> None:
    embed, head, tokens = sizes
    config = Config(embed, head, tokens + slack, 0.1, bias)
    random = np.random.default_rng(seed)
    mask = (random.random((tokens + slack, tokens + slack)) > opened).astype(np.float32)
    state = numpy_state_of(config, dtype, mask)
    inputs = (scale * random.standard_normal((batch, tokens, embed))).astype(numpy_dtype(dtype))
    assume(not overflow(inputs, state, mask, PRECISIONS[dtype]))
    for name in FRAMEWORKS:
        result = against_reference(run(name, config, state, inputs), config, state, inputs)
        assert result.held, (name, result)


def test_the_bound_is_not_vacuous() -> None:
    """A 1 % mistake in the scale exceeds the float32 bound; a 1e-9 mistake exceeds float64's."""
    for dtype, slip in (("float32", 1.01), ("float64", 1 + 1e-9)):
        for case in CASES:
            if case.tokens == 1:  # softmax of one score is 1, whatever the scale
                continue
            state, inputs = numpy_state_of(case.config, dtype), case.inputs().astype(dtype)
            slipped = {**state, "W_query.weight": slip * state["W_query.weight"]}
            if case.config.qkv_bias:
                slipped["W_query.bias"] = slip * state["W_query.bias"]
            wrong = attention_stages(inputs, slipped, slipped["mask"]).context
            assert not against_reference(wrong, case.config, state, inputs).held, case.name


def test_exp_is_as_accurate_as_the_bound_assumes(device: str) -> None:
    import jax
    import jax.numpy as jnp
    import torch

    arguments = np.concatenate([np.linspace(-80, 0, 400_001), -np.geomspace(1e-8, 80, 400_000)])
    for dtype in (np.float32, np.float64):
        rounded = arguments.astype(dtype)
        exact = np.exp(rounded.astype(np.longdouble))
        ulp = np.spacing(exact.astype(dtype)).astype(np.longdouble)
        with jax.enable_x64(True):
            ours = np.asarray(jnp.exp(jax.device_put(rounded, jax.devices(device)[0])))
        for result in (torch.exp(torch.from_numpy(rounded).to(device)).cpu().numpy(), ours):
            assert result.dtype == dtype
            assert float((np.abs(result - exact) / ulp).max()) <= EXP_ULPS


@pytest.mark.slow
def test_the_campaign_counts_every_case_and_sees_a_bound_that_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *_, section = bound.sections(cases=12, seed=3)
    assert isinstance(section, Section)
    table = section.blocks[1]
    assert isinstance(table, Table)
    assert [row[1] for row in table.rows] == [3, 3, 3, 3]
    assert len(section.checks) == 12
    assert all(check.held for check in section.checks)

    def far_too_strict(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        exact, limit = exact_and_limit(*arguments)
        return exact, limit / 1e6

    monkeypatch.setattr(bound, "exact_and_limit", far_too_strict)
    *_, section = bound.sections(cases=12, seed=3)
    assert isinstance(section, Section)
    assert not any(check.held for check in section.checks)


@pytest.mark.slow
def test_tf32_lies_between_the_two_bounds() -> None:
    """Emulated TF32, with 11-bit operands of the scores, exceeds float32's bound but not TF32's."""
    mutants = [mutant for mutant in MUTANTS if mutant.name == "TF32 left on"]
    for mutant in mutants:
        with planted(mutant.module, mutant.changes):
            rows = outputs.defaults("cpu").rows
        ratios = np.array([row[2:] for row in rows if row[1] == mutant.implementation])
        assert (ratios[:, 0] > 1.0).any()
        assert (ratios[:, 1] <= 1.0).all()
