"""`masked_attention` itself: masks of every dtype, and what the modules do not reach."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import flax_impl
from torch_impl.dispatch import Implementation

from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, same_names
from ..proof.cases import Framework, Trial
from ..proof.reference import causal_mask
from ..runners.attend import Attention
from ..runners.jax_settings import jax_on
from . import torch_function
from .heads import (
    TOKENS,
    MakeFinding,
    draw_heads,
    gradient_limit,
    output_limit,
    patterns,
)

LAST = 130  # of the tokens: one of torch's strips is cut
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "fused")
# What may stand where a mask blocks, by dtype; every entry but 0 does.
BLOCKING: dict[str, tuple[float, ...]] = {
    "bool": (True,),
    "uint8": (255,),
    "int8": (-128,),
    "int32": (-3,),
    "int64": (2**40,),
    "float16": (6e-8,),
    "float32": (-2.5, 1e-42, np.nan, -np.inf),
    "float64": (5e-324,),
}


def check_function(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare masks of every dtype with the same mask of 0 and 1, then gradients and edge cases.

    Nothing of the trial is used.
    """

    def finding(name: str, case: str, agreed: Agreement, why: str = tolerances.BITS) -> Finding:
        return Finding(f"function: {name}", framework, case, agreed, why)

    run = Attention(framework, device)
    heads = draw_heads(TOKENS)
    for implementation in IMPLEMENTATIONS:
        for pattern, blocked in patterns().items():
            case = f"{implementation}, {pattern}"
            expected = run(heads, blocked.astype(np.float32), implementation)
            for dtype, values in BLOCKING.items():
                mask = _filled(blocked, values, dtype)
                before = mask.tobytes()
                outputs = run(heads, mask, implementation)
                agreed = agreement(outputs, expected, 0.0)
                yield finding("masks of every dtype", f"{case}, {dtype}", agreed)
                unchanged = same_names([str(mask.tobytes() == before)], ["True"])
                yield finding("the mask stays as it is", f"{case}, {dtype}", unchanged)
        half = [array.astype(np.float16) for array in heads]
        tiny = _filled(patterns()["strips"], (1e-30,), "float32")
        expected = run(half, (tiny != 0).astype(np.float32), implementation)
        agreed = agreement(run(half, tiny, implementation), expected, 0.0)
        yield finding("smaller than the inputs' dtype", implementation, agreed)
        mixed = [*heads[:2], heads[2].astype(np.float16)]
        if framework != "torch":  # whose products refuse them
            with jax.numpy_dtype_promotion("standard"):
                found, formula = (
                    run(mixed, tiny, chosen).dtype.name for chosen in (implementation, "reference")
                )
            agreed = same_names([found], [formula])
            yield finding("values of another dtype", implementation, agreed)
        yield from _edge_cases(run, implementation, finding)
        yield from _closed_gradients(run, implementation, finding)
        if framework == "torch":
            yield from torch_function.some_gradients(run, implementation, finding)
            yield from torch_function.views(run, implementation, finding)
            yield from torch_function.edits_between_passes(implementation, device, finding)
            agreed = torch_function.traced(heads, implementation)
            yield finding("traced", implementation, agreed, tolerances.TWO_RUNS)
            agreed = torch_function.forward_mode(implementation, device)
            yield finding("forward mode", implementation, agreed, tolerances.TWO_RUNS)
    if framework != "torch":
        yield finding("forward mode of the formula", "reference", _forward_mode(device))
    if framework == "torch":
        yield from torch_function.overflow(run, finding)
        yield from torch_function.values_out_of_range(run, finding)
        yield finding("autocast", "bfloat16", torch_function.autocast(heads, device))
        agreed = torch_function.autocast_of_a_closed_row(device)
        yield finding("autocast", "a closed row", agreed, tolerances.NAMES)
        yield from torch_function.second_derivatives_of_closed_rows(device, finding)


def _forward_mode(device: str) -> Agreement:
    """Differentiate Flax's formula forward, which its fused path refuses, on many tokens."""
    tokens = flax_impl.dispatch.MIN_FUSED_TOKENS + 1
    heads = tuple(jnp.asarray(array) for array in draw_heads(tokens))
    mask = flax_impl.causal_mask(tokens)

    def chosen(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return flax_impl.masked_attention(queries, keys, values, mask, None, "reference")

    def formula(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return flax_impl.reference_attention(queries, keys, values, mask)

    with jax_on(device):
        found, expected = (
            np.asarray(jax.jvp(attend, heads, heads)[1]) for attend in (chosen, formula)
        )
    return agreement(found, expected, 0.0)


def _edge_cases(
    run: Attention, implementation: Implementation, finding: MakeFinding
) -> Iterator[Finding]:
    """One token, dropout of everything, and a key of inf that is blocked."""
    none = draw_heads(0)
    outputs = run(none, np.zeros((3, 3), np.float32), implementation)
    agreed = same_names([str(outputs.shape)], [str(none[2].shape)])
    yield finding("no token", implementation, agreed)
    one = draw_heads(1)
    for name, entry, expected in (
        ("open", 0.0, one[2]),
        ("closed", 1.0, np.full_like(one[2], np.nan)),
    ):
        outputs = run(one, np.full((1, 1), entry, np.float32), implementation)
        # Not exact: CUDA's fused kernel makes a float32 product of several in TF32.
        agreed = agreement(outputs, expected, output_limit(one))
        yield finding("one token", f"{implementation}, {name}", agreed, tolerances.TWO_RUNS)
    yield from other_shapes(run, implementation, finding)
    for tokens in (1, TOKENS):
        heads, open_mask = draw_heads(tokens), np.zeros((tokens, tokens), np.float32)
        outputs = run(heads, open_mask, implementation, lambda weights: weights * 0.0)
        agreed = agreement(outputs, np.zeros_like(heads[2]), 0.0)
        yield finding("dropout of everything", f"{implementation}, {tokens} tokens", agreed)
    far = [array.copy() for array in draw_heads(TOKENS, np.float64)]
    far[0][..., 0], far[1][..., 0] = 30.0, -60.0  # every score is near -900, whose exponential is 0
    for pattern, blocked in patterns().items():
        mask = blocked.astype(np.float32)
        found, formula = (run(far, mask, chosen) for chosen in (implementation, "reference"))
        agreed = agreement(found, formula, output_limit(far))
        yield finding(
            "scores far below 0", f"{implementation}, {pattern}", agreed, tolerances.TWO_RUNS
        )
    queries, keys, values = heads = draw_heads(TOKENS)
    causal = causal_mask(TOKENS).astype(np.float32)
    expected = run(heads, causal, implementation)[:, :-1]
    for name, entry in (("inf", np.inf), ("NaN", np.nan)):
        changed = keys.copy()
        changed[:, -1] = entry
        outputs = run([queries, changed, values], causal, implementation)[:, :-1]
        agreed = agreement(outputs, expected, output_limit(heads))
        yield finding(
            f"a key of {name} behind the mask", implementation, agreed, tolerances.TWO_RUNS
        )


def other_shapes(
    run: Attention, implementation: Implementation, finding: MakeFinding
) -> Iterator[Finding]:
    """Fewer queries are the last tokens; consecutive heads of queries share a head of keys.

    So both are rows and heads of the attention that has as many of each.
    """
    heads = draw_heads(TOKENS)
    mask = patterns()["wide"].astype(np.float32)
    every = run(heads, mask, implementation)
    for count in (1, LAST):
        last = [heads[0][:, -count:], *heads[1:]]
        agreed = agreement(run(last, mask, implementation), every[:, -count:], output_limit(heads))
        yield finding("fewer queries", f"{implementation}, {count}", agreed, tolerances.TWO_RUNS)
    if implementation == "fused":  # with fewer queries both are the formula
        yield from _last_gradients(run, finding)
    many = [np.stack([array, array[:, ::-1]] * 2, axis=1) for array in heads]
    groups = [many[0], *(array[:, :2] for array in many[1:])]
    causal = causal_mask(TOKENS).astype(np.float32)
    repeated = [many[0], *(array[:, (0, 0, 1, 1)] for array in many[1:])]
    agreed = agreement(
        run(groups, causal, implementation), run(repeated, causal, implementation), 0.0
    )
    yield finding("grouped heads", implementation, agreed)


def _last_gradients(run: Attention, finding: MakeFinding) -> Iterator[Finding]:
    """The gradients of the last rows are those of all rows whose other cotangents are 0."""
    heads = draw_heads(TOKENS, np.float64)
    mask = np.tril(patterns()["wide"], 60).astype(np.float32)  # without a closed row
    cotangent = np.random.default_rng(3).standard_normal(heads[2].shape)
    cotangent[:, :-LAST] = 0.0
    expected = run.gradients(heads, mask, cotangent, "fused")
    expected[0] = expected[0][:, -LAST:]
    last = [heads[0][:, -LAST:], *heads[1:]]
    found = run.gradients(last, mask, cotangent[:, -LAST:], "fused")
    limit = gradient_limit(heads, cotangent)
    for name, one, other in zip("qkv", found, expected, strict=True):
        agreed = agreement(one, other, limit)
        yield finding("gradients of fewer queries", f"to {name}", agreed, tolerances.TWO_RUNS)


def _closed_gradients(
    run: Attention, implementation: Implementation, finding: MakeFinding
) -> Iterator[Finding]:
    """Where a row is closed, the values' gradient is NaN, and its query and keys have none of it.

    The weights of the row are NaN, and the gradient of its scores is 0, because all are blocked.
    """
    heads = draw_heads(TOKENS, np.float64)
    cotangent = np.random.default_rng(2).standard_normal(heads[2].shape)
    opened = patterns(closed=False)
    first_strip = opened["strips"].copy()
    first_strip[:64] = True
    closing = {**patterns(), "strips, the first closed": first_strip}
    for pattern, blocked in closing.items():
        without = cotangent * ~blocked.all(axis=1, keepdims=True)
        closed = run.gradients(heads, blocked.astype(np.float32), cotangent, implementation)
        mask = opened[pattern.partition(",")[0]].astype(np.float32)
        expected = run.gradients(heads, mask, without, implementation)
        expected[2] = np.full_like(expected[2], np.nan)
        for name, gradient, wanted in zip(
            ("queries", "keys", "values"), closed, expected, strict=True
        ):
            case = f"{implementation}, {pattern}, {name}"
            limit = 0.0 if name == "values" else gradient_limit(heads, cotangent)
            agreed = agreement(gradient, wanted, limit)
            yield finding("gradients beside a closed row", case, agreed, tolerances.TWO_RUNS)


def _filled(blocked: np.ndarray, values: tuple[float, ...], dtype: str) -> np.ndarray:
    """Return a mask of a dtype with these values, in turn, where it blocks; -0.0 is open."""
    mask = np.zeros(blocked.shape, dtype)
    if mask.dtype.kind == "f":
        mask = -mask
    mask[blocked] = np.resize(np.array(values, dtype), int(blocked.sum()))
    return mask
