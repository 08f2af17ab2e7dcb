"""With extreme inputs and any mask, NaN and infinities stand where the formula puts them.

Inputs are of any magnitude from subnormal to infinite, and NaN and -0.0 are among them.
"""

from typing import Any

import numpy as np
import pytest

from compare.dtypes import numpy_dtype
from compare.proof.agreement import agreement
from compare.proof.cases import FRAMEWORKS, Config, Trial, draw
from compare.proof.parity import against_reference
from compare.proof.reference import attention_stages
from compare.proof.rounding_bound import PRECISIONS, overflow
from compare.runners.run import run

hypothesis = pytest.importorskip("hypothesis")
assume, given, st = hypothesis.assume, hypothesis.given, hypothesis.strategies

CONFIG, TOKENS = Config(3, 5, 6, 0.1, qkv_bias=True), 4
SUBNORMAL_TO_HUGE = (
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1e-38,
    1e-10,
    1.0,
    -3.0,
    1e4,
    1e10,
    -1e19,
    1e30,
    -1e30,
)
MASK_VALUES = {
    "float32": (0.0, -0.0, 1e-45, 1.0, -2.0, np.inf, np.nan),
    "float16": (0.0, 6e-8, 2.0),
    "bfloat16": (0.0, -0.0, 3.0),
    "bool": (False, True),
    "int8": (0, 1, -128),
    "int32": (0, -1, 2**31 - 1),
    "uint8": (0, 255),
}


@st.composite
def trials(draw_value: Any, values: tuple[float, ...]) -> Trial:
    """A trial with some of these values in its inputs, and a mask of any pattern and dtype."""
    trial = draw(CONFIG, TOKENS, np.random.default_rng(draw_value(st.integers(0, 2**16))))
    for _ in range(draw_value(st.integers(0, 5))):
        place = tuple(draw_value(st.integers(0, size - 1)) for size in trial.inputs.shape)
        trial.inputs[place] = draw_value(st.sampled_from(values))
    dtype = draw_value(st.sampled_from(list(MASK_VALUES)))
    entries = st.lists(st.sampled_from(MASK_VALUES[dtype]), min_size=36, max_size=36)
    mask = np.array(draw_value(entries), dtype=np.float64).reshape(6, 6).astype(numpy_dtype(dtype))
    return trial._replace(state={**trial.state, "mask": mask})


@given(trial=trials(SUBNORMAL_TO_HUGE), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
@pytest.mark.slow
def test_finite_inputs_stay_within_the_bound(trial: Trial, dtype: str) -> None:
    with np.errstate(over="ignore"):
        rounded = trial.rounded(dtype)
    state = rounded.state
    assume(
        np.isfinite(rounded.inputs).all()
        and not overflow(rounded.inputs, state, state["mask"], PRECISIONS[dtype])
    )
    for name in FRAMEWORKS:
        outputs = run(name, CONFIG, rounded.state, rounded.inputs)
        agreed = against_reference(outputs, CONFIG, rounded.state, rounded.inputs)
        assert agreed.held, (name, agreed)


@given(
    trial=trials((*SUBNORMAL_TO_HUGE[:9], np.inf, -np.inf, np.nan)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@pytest.mark.slow
def test_nan_and_inf_stand_where_the_formula_puts_them(trial: Trial, dtype: str) -> None:
    rounded = trial.rounded(dtype)
    state = rounded.state
    with np.errstate(invalid="ignore"):
        expected = attention_stages(rounded.inputs, state, state["mask"]).context
    for name in FRAMEWORKS:
        outputs = run(name, CONFIG, rounded.state, rounded.inputs)
        agreed = agreement(pattern(outputs), pattern(expected), 0.0)
        assert agreed.held, (name, agreed)


def pattern(array: np.ndarray) -> np.ndarray:
    """Return 3 for NaN, 1 for inf, -1 for -inf, 0 for a number."""
    array = array.astype(np.float64)
    return np.where(np.isnan(array), 3.0, np.isposinf(array) * 1.0 - np.isneginf(array))


def test_the_documented_difference_where_a_dot_product_overflows() -> None:
    """PyTorch adds partial sums of both signs to inf - inf; XLA adds in another order."""
    trial = draw(Config(3, 5, 6, 0.0, qkv_bias=True), TOKENS, np.random.default_rng(0))
    trial.inputs[:, 3, 2] = -1e30
    state, rounded = trial.rounded("float32").state, trial.rounded("float32")
    assert overflow(rounded.inputs, state, state["mask"], PRECISIONS["float32"])
    for name in FRAMEWORKS:
        outputs = run(name, CONFIG, rounded.state, rounded.inputs)
        assert np.isfinite(outputs[:, :3]).all(), "only the row that overflows may differ"
