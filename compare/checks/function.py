"""`masked_attention` itself: masks of every dtype, and what the modules do not reach."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

import torch_impl

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..proof.cases import Framework, Trial
from ..runners.attend import Attention, Heads

IMPLEMENTATIONS = ("reference", "fused")
_AUTO_AND_FORMULA: tuple[Literal["auto"], Literal["reference"]] = ("auto", "reference")
# torch takes each of its kernels, and the last word of a packed mask is partial.
TOKENS, HEAD_DIM = 200, 4
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
    heads = _draw(TOKENS)
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
        tiny = _filled(patterns()["window"], (1e-30,), "float32")
        expected = run(half, (tiny != 0).astype(np.float32), implementation)
        agreed = agreement(run(half, tiny, implementation), expected, 0.0)
        yield finding("smaller than the inputs' dtype", implementation, agreed)
        yield from _edge_cases(run, implementation, finding)
        yield from _closed_gradients(run, implementation, finding)
        if framework == "torch":
            yield from _some_gradients(run, implementation, finding)
    if framework == "torch":
        yield finding("autocast", "bfloat16", _autocast(heads, device))


def patterns() -> dict[str, np.ndarray]:
    """Return which pairs are blocked, (TOKENS, TOKENS), by name; each has a closed row."""
    positions = np.arange(TOKENS)
    distance = positions[:, None] - positions
    window = (distance < 0) | (distance >= 20)
    wide = np.random.default_rng(5).random((TOKENS, TOKENS)) < 0.5
    causal = distance < 0
    for blocked in (window, wide, causal):
        blocked[70] = True
    return {"causal": causal, "window": window, "wide": wide}


MakeFinding = Callable[..., Finding]


def _edge_cases(run: Attention, implementation: str, finding: MakeFinding) -> Iterator[Finding]:
    """One token, dropout of everything, and a key of inf that is blocked."""
    one = _draw(1)
    for name, entry, expected in (
        ("open", 0.0, one[2]),
        ("closed", 1.0, np.full_like(one[2], np.nan)),
    ):
        outputs = run(one, np.full((1, 1), entry, np.float32), implementation)
        agreed = agreement(outputs, expected, 0.0)
        yield finding("one token", f"{implementation}, {name}", agreed)
    for tokens in (1, TOKENS):
        heads, open_mask = _draw(tokens), np.zeros((tokens, tokens), np.float32)
        outputs = run(heads, open_mask, implementation, lambda weights: weights * 0.0)
        agreed = agreement(outputs, np.zeros_like(heads[2]), 0.0)
        yield finding("dropout of everything", f"{implementation}, {tokens} tokens", agreed)
    queries, keys, values = heads = _draw(TOKENS)
    causal = np.triu(np.ones((TOKENS, TOKENS), np.float32), 1)
    expected = run(heads, causal, implementation)[:, :-1]
    for name, entry in (("inf", np.inf), ("NaN", np.nan)):
        changed = keys.copy()
        changed[:, -1] = entry
        outputs = run([queries, changed, values], causal, implementation)[:, :-1]
        agreed = agreement(outputs, expected, _limit(heads))
        yield finding(
            f"a key of {name} behind the mask", implementation, agreed, tolerances.TWO_RUNS
        )


def _closed_gradients(
    run: Attention, implementation: str, finding: MakeFinding
) -> Iterator[Finding]:
    """Where a row is closed, the values' gradient is NaN, and its query and keys have none of it.

    The weights of the row are NaN, and the gradient of its scores is 0, because all are blocked.
    """
    heads = _draw(TOKENS, np.float64)
    cotangent = np.random.default_rng(2).standard_normal(heads[2].shape)
    without = cotangent.copy()
    without[:, 70] = 0.0
    for pattern, blocked in patterns().items():
        opened = blocked.copy()
        opened[70] = False
        closed = run.gradients(heads, blocked.astype(np.float32), cotangent, implementation)
        expected = run.gradients(heads, opened.astype(np.float32), without, implementation)
        expected[2] = np.full_like(expected[2], np.nan)
        for name, gradient, wanted in zip(
            ("queries", "keys", "values"), closed, expected, strict=True
        ):
            case = f"{implementation}, {pattern}, {name}"
            limit = 0.0 if name == "values" else _gradient_limit(heads, cotangent)
            agreed = agreement(gradient, wanted, limit)
            yield finding("gradients beside a closed row", case, agreed, tolerances.TWO_RUNS)


def _limit(heads: Heads) -> float:
    """Return a bound on the difference of two outputs, each a mean of values.

    A score has a relative error of HEAD_DIM + 3 roundings, a weight twice that of its score and of
    the sum of the weights, and the output that of a sum of at most TOKENS products.
    """
    queries, keys, values = (np.abs(array).max() for array in heads)
    scores = HEAD_DIM**0.5 * queries * keys
    roundings = 2 * (HEAD_DIM + 3) * scores + 2 * TOKENS + 6
    return float(2 * roundings * np.finfo(heads[0].dtype).eps * values)


def _gradient_limit(heads: Heads, cotangent: np.ndarray) -> float:
    """Return a bound on the rounding of two float64 gradients of the same terms.

    Each entry is a sum of at most TOKENS products, each a weight of at most 1, times the difference
    of two dot products of `cotangent` and values, times a key or query: at most this in size.
    """
    largest = 2 * HEAD_DIM * np.abs(cotangent).max() * np.abs(heads[2]).max()
    largest *= max(np.abs(heads[0]).max(), np.abs(heads[1]).max()) / HEAD_DIM**0.5
    roundings = 2 * (2 * TOKENS + 4 * HEAD_DIM + 20)
    return float(roundings * TOKENS * largest * np.finfo(np.float64).eps)


def _some_gradients(run: Attention, implementation: str, finding: MakeFinding) -> Iterator[Finding]:
    """Where only some of the gradients are needed, they are those that come with the others."""
    heads = _draw(TOKENS, np.float64)
    cotangent = np.random.default_rng(2).standard_normal(heads[2].shape)
    for pattern, blocked in patterns().items():
        blocked[70] = False
        mask = blocked.astype(np.float32)
        every = run.gradients(heads, mask, cotangent, implementation)
        for needed in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            for twice in (False, True):
                some = run.some_gradients(
                    heads, mask, cotangent, implementation, needed, twice=twice
                )
                agreed = max(
                    (
                        agreement(gradient, every[index], _gradient_limit(heads, cotangent))
                        for index, gradient in zip(needed, some, strict=True)
                    ),
                    key=lambda agreed: agreed.ratio,
                )
                case = f"{implementation}, {pattern}, {needed}{', to be differentiated' * twice}"
                yield finding("some of the gradients", case, agreed, tolerances.TWO_RUNS)


def _autocast(heads: Heads, device: str) -> Agreement:
    """Compare the bits under autocast with those of the formula: the kernels are not used there."""
    queries, keys, values = (numpy_to_tensor(array).to(device) for array in heads)
    mask = torch.from_numpy(patterns()["window"]).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        automatic, formula = (
            torch_impl.masked_attention(queries, keys, values, mask, implementation=chosen)
            for chosen in _AUTO_AND_FORMULA
        )
    if automatic.dtype != formula.dtype:
        return same_names([str(automatic.dtype)], [str(formula.dtype)])
    open_rows = ~patterns()["window"].all(axis=1)
    return identical(*(tensor_to_numpy(outputs)[:, open_rows] for outputs in (automatic, formula)))


def _draw(tokens: int, dtype: Any = np.float32) -> Heads:
    """Draw queries, keys and values, (1, tokens, HEAD_DIM)."""
    random = np.random.default_rng(1)
    return [random.standard_normal((1, tokens, HEAD_DIM)).astype(dtype) for _ in range(3)]


def _filled(blocked: np.ndarray, values: tuple[float, ...], dtype: str) -> np.ndarray:
    """Return a mask of a dtype with these values, in turn, where it blocks; -0.0 is open."""
    mask = np.zeros(blocked.shape, dtype)
    if mask.dtype.kind == "f":
        mask = -mask
    mask[blocked] = np.resize(np.array(values, dtype), int(blocked.sum()))
    return mask
