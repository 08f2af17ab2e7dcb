"""Fused attention equals the formula in each framework under any mask, also an edited one."""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

import compare
import flax_impl
import torch_impl
from compare.bench import attention
from compare.checkpoint import load_checkpoint, save_checkpoint
from compare.checks.determinism import with_inductor
from compare.checks.fused import masks
from compare.conversion.convert import linen_to_torch, nnx_to_torch
from compare.conversion.mapping import ROWS
from compare.conversion.tensors import numpy_to_tensor, tensor_to_numpy, torch_state
from compare.dtypes import numpy_dtype
from compare.proof import tolerances
from compare.proof.agreement import agreement
from compare.proof.cases import Config, draw
from compare.proof.reference import masked_attention as exact_attention
from compare.proof.reference_gradient import attention_forward, attention_gradient
from compare.proof.rounding_bound import PRECISIONS, attention_bounds, most_tiles
from compare.proof.running_error import Bounded
from compare.report.model import Curves, Table
from compare.runners.run import build_nnx, build_torch, linen_template
from compare.subprocesses import child_environment
from flax_impl.mask_tiles import is_causal
from torch_impl import mask_layout
from torch_impl.dispatch import Implementation
from torch_impl.fused import kernel_layout

from ..support import same_bits, sections_of, sum_of_squares

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

# Three strips of queries in torch, two strips and three tiles in Flax. The last ones are not whole.
TORCH_TOKENS, FLAX_TOKENS = 300, 530
RANDOM = np.random.default_rng(0)
HEADS = RANDOM.standard_normal((4, 2, FLAX_TOKENS, 8))
MASK = masks()["causal"]


@st.composite
def drawn_masks(draw: Any, tokens: int) -> np.ndarray:
    """A band, blocks, noise or an open mask; then some open or blocked rows and columns.

    Blocked entries may be NaN, infinite, negative or subnormal.
    """
    behind = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    kind = draw(st.sampled_from(["causal", "band", "blocks", "noise", "open"]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = {
        "causal": behind < 0,
        "band": (behind < -draw(st.integers(0, 300))) | (behind > draw(st.integers(0, 300))),
        "blocks": np.kron(random.random((11, 11)) < 0.7, np.ones((49, 49)))[:tokens, :tokens] > 0,
        "noise": random.random((tokens, tokens)) < draw(st.sampled_from([0.01, 0.5, 0.99])),
        "open": np.zeros((tokens, tokens), dtype=bool),
    }[kind]
    mask = mask.astype(np.float32)
    for row in draw(st.lists(st.integers(0, tokens - 1), max_size=3)):
        mask[row] = draw(st.sampled_from([0.0, 1.0]))
    for column in draw(st.lists(st.integers(0, tokens - 1), max_size=3)):
        mask[:, column] = draw(st.sampled_from([0.0, -3.0]))
    if draw(st.booleans()):
        mask[mask != 0] *= draw(st.sampled_from([1e-42, np.nan, -np.inf]))
    return mask


def judge(outputs: np.ndarray, heads: np.ndarray, mask: np.ndarray, dtype: str = "float64") -> None:
    """Compare the outputs with the exact ones, within the rounding bounds of both."""
    queries, keys, values = (array.astype(np.float64) for array in heads)
    stages = exact_attention(queries, keys, values, mask)
    tiles = most_tiles(len(mask))
    bounds = [
        attention_bounds(stages, (0.0, 0.0, 0.0), PRECISIONS[name], tiles=tiles)
        for name in (dtype, "float64")
    ]
    result = agreement(
        outputs.astype(np.float64), stages.context, bounds[0].context + bounds[1].context
    )
    assert result.held, result


def in_torch(heads: np.ndarray, mask: np.ndarray, **more: Any) -> np.ndarray:
    queries, keys, values = map(torch.from_numpy, heads)
    return torch_impl.masked_attention(
        queries, keys, values, torch.from_numpy(mask), **more
    ).numpy()


FLAX = jax.jit(partial(flax_impl.masked_attention, implementation="fused"))


def in_flax(
    heads: np.ndarray, mask: np.ndarray, attend: Callable[..., jax.Array] = FLAX
) -> np.ndarray:
    with jax.enable_x64(heads.dtype == np.float64):
        return np.asarray(attend(*map(jnp.asarray, heads), jnp.asarray(mask)))


@settings(max_examples=20)
@given(drawn_masks(TORCH_TOKENS))
@pytest.mark.slow
def test_torch_under_any_mask(mask: np.ndarray) -> None:
    heads = HEADS[:3, :, :TORCH_TOKENS]
    judge(in_torch(heads, mask, implementation="fused"), heads, mask)


# One test alone uses this function, and counts its compiled programs.
ANY_MASK: Any = jax.jit(partial(flax_impl.masked_attention, implementation="fused"))


@settings(max_examples=15)
@given(drawn_masks(FLAX_TOKENS))
@pytest.mark.slow
def test_flax_under_any_mask(mask: np.ndarray) -> None:
    judge(in_flax(HEADS[:3], mask, ANY_MASK), HEADS[:3], mask)
    assert ANY_MASK._cache_size() == 1, "a new mask was compiled again"


@pytest.mark.parametrize("closed_rows", [512, FLAX_TOKENS])
def test_flax_strips_without_a_tile(closed_rows: int) -> None:
    mask = masks()["causal"].copy()
    mask[:closed_rows] = 1.0
    judge(in_flax(HEADS[:3], mask), HEADS[:3], mask)


def with_sinks() -> np.ndarray:
    """Return a mask that opens the first four keys and the last 32: two ranges for each strip."""
    behind = np.subtract.outer(np.arange(TORCH_TOKENS), np.arange(TORCH_TOKENS))
    is_open = (behind >= 0) & ((behind < 32) | (np.arange(TORCH_TOKENS) < 4))
    return (~is_open).astype(np.float32)


def test_torch_strips_of_several_ranges() -> None:
    heads, mask = HEADS[:, :, :TORCH_TOKENS], with_sinks()
    queries, keys, values = map(torch.from_numpy, heads[:3])
    layout = kernel_layout(queries, keys, values, torch.from_numpy(mask))
    assert layout is not None and layout.kind == "strips"
    assert layout.strips[-1].keys == ((0, 4), (225, 300))
    judge(in_torch(heads[:3], mask, implementation="fused"), heads[:3], mask)
    judge_gradients(torch_gradients(heads, mask), heads, mask)


def judge_gradients(gradients: list[np.ndarray], heads: np.ndarray, mask: np.ndarray) -> None:
    """Compare gradients with the exact ones.

    If a row has no open key, the gradient of the values is NaN, and only that one.
    """
    closed = (mask != 0).all(axis=1)
    opened = np.where(closed[:, None], 0.0, mask)
    width = heads.shape[-1]
    select = np.eye(3 * width).reshape(3, width, 3 * width)
    arrays = {f"W_{name}.weight": select[i] for i, name in enumerate(("query", "key", "value"))}
    arrays["inputs"] = np.concatenate(list(heads[:3]), axis=-1)
    lifted = {name: Bounded.exact(array) for name, array in arrays.items()}
    cotangent = Bounded.exact(np.where(closed[:, None], 0.0, heads[3]))
    exact = attention_gradient(lifted, attention_forward(lifted, opened), cotangent)["inputs"]
    parts = np.split(exact.value, 3, axis=-1), np.split(tolerances.regrouped(exact), 3, axis=-1)
    for name, gradient, expected, limit in zip("qkv", gradients, *parts, strict=True):
        if name == "v" and closed.any():
            assert np.isnan(gradient).all()
            continue
        agreed = agreement(gradient, expected, limit)
        assert agreed.held, (name, agreed)


def torch_gradients(
    heads: np.ndarray, mask: np.ndarray, *, twice: bool = False
) -> list[np.ndarray]:
    leaves = [torch.tensor(array, requires_grad=True) for array in heads[:3]]
    queries, keys, values = leaves
    outputs = torch_impl.masked_attention(
        queries, keys, values, torch.from_numpy(mask), implementation="fused"
    )
    cotangent = torch.from_numpy(heads[3])
    gradients = torch.autograd.grad(outputs, leaves, cotangent, create_graph=twice)
    if twice:
        gradients = torch.autograd.grad(sum_of_squares(gradients), leaves)
    return [gradient.detach().numpy() for gradient in gradients]


def flax_gradient(attend: Callable[..., jax.Array], heads: jax.Array, mask: jax.Array) -> Any:
    return jax.vjp(lambda *three: attend(*three, mask), *heads[:3])[1](heads[3])


FLAX_GRADIENT = jax.jit(
    partial(flax_gradient, partial(flax_impl.masked_attention, implementation="fused"))
)


@settings(max_examples=15)
@given(drawn_masks(TORCH_TOKENS))
@pytest.mark.slow
def test_torch_gradients_under_any_mask(mask: np.ndarray) -> None:
    heads = HEADS[:, :, :TORCH_TOKENS]
    judge_gradients(torch_gradients(heads, mask), heads, mask)


@settings(max_examples=8)
@given(drawn_masks(FLAX_TOKENS))
@pytest.mark.slow
def test_flax_gradients_under_any_mask(mask: np.ndarray) -> None:
    with jax.enable_x64(True):
        gradients = FLAX_GRADIENT(jnp.asarray(HEADS), jnp.asarray(mask))
        arrays = [np.asarray(gradient) for gradient in gradients]
    judge_gradients(arrays, HEADS, mask)


@pytest.mark.parametrize("shape", [(5, 4), (3, 130, 4), (2, 3, 129, 4), (2, 1, 2, 130, 4)])
@pytest.mark.slow
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    heads = np.random.default_rng(1).standard_normal((3, *shape))
    for name in ("causal", "window"):
        mask = masks()[name][: shape[-2] + 3, : shape[-2] + 3].copy()
        for outputs in (in_torch(heads, mask, implementation="fused"), in_flax(heads, mask)):
            judge(outputs, heads, mask[: shape[-2], : shape[-2]])


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 130, 4), (2, 3, 130, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    heads, mask = np.zeros((3, *shape), np.float32), MASK.copy()
    for outputs in (in_torch(heads, mask, implementation="fused"), in_flax(heads, mask)):
        assert outputs.shape == shape


@pytest.mark.parametrize("implementation", ["reference", "fused", "auto"])
def test_a_mask_that_does_not_cover_the_tokens(implementation: Any) -> None:
    heads = HEADS[:3].astype(np.float32)
    too_small = r"mask has shape .*; 530 tokens need at least \(530, 530\)"
    of_other_tokens = r"mask has shape \(1, 640, 640\); expected \(2, 530, 530\), the shape of"
    masks = {
        too_small: (MASK[:100, :100], MASK[:, :100], MASK[0]),
        of_other_tokens: (MASK[None],),
    }
    for message, mask in [(text, mask) for text, each in masks.items() for mask in each]:
        calls: list[tuple[Callable[..., Any], list[Any]]] = [
            (torch_impl.masked_attention, list(map(torch.from_numpy, (*heads, mask.copy())))),
            (flax_impl.masked_attention, list(map(jnp.asarray, (*heads, mask)))),
        ]
        for attend, arguments in calls:
            with pytest.raises(ValueError, match=message):
                attend(*arguments, implementation=implementation)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.again)]
)
@pytest.mark.parametrize("name", masks())
@pytest.mark.slow
def test_lower_precision(name: str, dtype: str) -> None:
    mask = masks()[name][:FLAX_TOKENS, :FLAX_TOKENS].copy()
    rounded = HEADS[:3].astype(numpy_dtype(dtype))
    queries, keys, values = (numpy_to_tensor(array) for array in rounded)
    outputs = torch_impl.masked_attention(
        queries, keys, values, torch.from_numpy(mask), implementation="fused"
    )
    judge(tensor_to_numpy(outputs), rounded, mask, dtype)
    judge(np.asarray(FLAX(*map(jnp.asarray, rounded), jnp.asarray(mask))), rounded, mask, dtype)


@pytest.mark.parametrize("name", ["causal", "window"])
def test_torch_second_derivatives(name: str) -> None:
    heads, mask = HEADS[:, :, :150], masks()[name][:150, :150].copy()
    leaves = [torch.tensor(array, requires_grad=True) for array in heads[:3]]
    queries, keys, values = leaves
    outputs = torch_impl.reference_attention(queries, keys, values, torch.from_numpy(mask))
    first = torch.autograd.grad(outputs, leaves, torch.from_numpy(heads[3]), create_graph=True)
    expected = torch.autograd.grad(sum_of_squares(first), leaves)
    for ours, wanted in zip(torch_gradients(heads, mask, twice=True), expected, strict=True):
        assert np.array_equal(ours, wanted.numpy()), "the bits differ from the reference's"


@pytest.mark.slow
def test_flax_second_derivatives() -> None:
    mask = jnp.asarray(masks()["window"][:110, :110])

    def products(implementation: Literal["fused", "reference"]) -> list[jax.Array]:
        def scalar(queries: jax.Array) -> jax.Array:
            return (attend(queries, keys, values, mask) * cotangent).sum()

        attend = partial(flax_impl.masked_attention, implementation=implementation)
        gradient = jax.grad(scalar)
        reverse = jax.grad(lambda at: (gradient(at) * along).sum())(queries)
        forward = jax.jvp(lambda at: attend(at, keys, values, mask), (queries,), (along,))[1]
        return [jax.jvp(gradient, (queries,), (along,))[1], reverse, forward]

    with jax.enable_x64(True):
        queries, keys, values, cotangent = jnp.asarray(HEADS[:, :, :110])
        along = cotangent[::-1]
        *second, forward = zip(products("fused"), products("reference"), strict=True)
        for ours, expected in second:
            assert np.array_equal(ours, expected), "the bits differ from the reference's"
        ours, expected = forward  # ours is compiled
        assert np.abs(ours - expected).max() <= 110 * 2.0**-52 * np.abs(expected).max()


@pytest.mark.slow
def test_flax_under_transforms() -> None:
    heads, two = HEADS[:3].astype(np.float32), [masks()["window"], masks()["blocks"]]
    stacked = jnp.stack([jnp.asarray(mask[:FLAX_TOKENS, :FLAX_TOKENS]) for mask in two])
    attend = partial(flax_impl.masked_attention, implementation="fused")
    together = jax.jit(jax.vmap(attend))(*map(jnp.asarray, heads), stacked)
    for batch in range(2):
        judge(np.asarray(together[batch]), heads[:, batch], np.asarray(stacked[batch]), "float32")


SHARDED = """
import json, jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
from flax_impl import causal_mask, masked_attention, reference_attention
heads = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 530, 8), dtype=np.float32))
mask = causal_mask(530)
def gradient(attend, queries, keys, values, cotangent, mask):
    return jax.vjp(lambda *three: attend(*three, mask), queries, keys, values)[1](cotangent)
mesh = Mesh(np.array(jax.devices()), ("heads",))
fused = partial(gradient, partial(masked_attention, implementation="fused"))
specs = {"in_specs": (P("heads"),) * 4 + (P(),), "out_specs": P("heads")}
sharded = jax.jit(jax.shard_map(fused, mesh=mesh, **specs))(*heads, mask)
alone = jax.jit(fused)(*heads, mask)
same = [bool((one == other).all()) for one, other in zip(sharded, alone)]
print(json.dumps([len(jax.devices()), *same]))
"""


@pytest.mark.slow
def test_flax_sharded_over_devices() -> None:
    environment = child_environment(
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    )
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, True, True, True]


@pytest.mark.slow
def test_half_precision_asks_cudnn_only_if_the_mask_is_causal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    heads = jnp.asarray(HEADS[:3].astype(ml_dtypes.bfloat16))
    calls = [
        jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{name}")
        for name in ("", "Backward")
    ]

    def gradient(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> Any:
        attend = partial(flax_impl.masked_attention, mask=mask, implementation="fused")
        return jax.grad(lambda *three: attend(*three).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            queries, keys, values
        )

    mask = jnp.asarray(masks()["edited"])
    program = jax.export.export(jax.jit(gradient), platforms=["cuda"], disabled_checks=calls)(
        *heads, mask
    )
    text = program.mlir_module()
    assert "fmhaSoftmaxBackward" in text
    assert "stablehlo.case" in text, "the program does not read the mask when it runs"
    gradients = jax.jit(gradient)(*heads, mask)  # on the CPU the program uses tiles only
    assert all(np.isfinite(array.astype(jnp.float32)).all() for array in gradients)


def test_is_causal_looks_at_every_entry() -> None:
    causal = flax_impl.causal_mask(703)
    jitted = jax.jit(is_causal, static_argnums=1)
    for tokens in (1, 5, 256, 700):
        assert jitted(causal, tokens)
        assert jitted(-2.0 * causal, tokens)
        assert jitted(causal.at[tokens, 0].set(1.0), tokens), "this entry is beyond the tokens"
        assert not jitted(causal.at[tokens - 1, 0].set(1e-42), tokens)
    assert not jitted(causal.at[3, 699].set(0.0), 700)


NOT_FINITE = [
    (which, at, value)
    for which in range(3)
    for at in (0, 299)
    for value in (np.nan, np.inf, -np.inf)
]


@pytest.mark.parametrize("which, at, value", NOT_FINITE)
def test_what_is_not_finite(which: int, at: int, value: float) -> None:
    """In torch an entry is finite exactly where the formula's is.

    In Flax a row that the mask keeps from the value may be finite where the formula is not.
    """
    heads = HEADS[:3, :1, :TORCH_TOKENS].copy()
    heads[which, 0, at, 3] = value
    for name in ("causal", "open", "window"):
        mask = masks()[name][:TORCH_TOKENS, :TORCH_TOKENS].copy()
        formula = in_torch(heads, mask, implementation="reference")[0]
        in_flax_too = in_flax(heads, mask)[0]
        for implementation in ("fused", "auto"):
            in_torch_too = in_torch(heads, mask, implementation=implementation)[0]
            assert np.array_equal(np.isfinite(in_torch_too), np.isfinite(formula))
        seen = np.ones(TORCH_TOKENS, bool) if which == 0 else mask[:, at] == 0
        assert np.array_equal(np.isfinite(in_flax_too[seen]), np.isfinite(formula[seen]))
        assert not (np.isfinite(formula) & ~np.isfinite(in_flax_too)).any(), (
            "an entry is lost that is finite in the formula"
        )


def test_the_bound_of_the_scores_is_that_of_the_queries_and_keys() -> None:
    """No score exceeds head_dim max|q| max|k|; the values only have to be finite."""
    largest = torch.finfo(torch.float32).max
    ones, large = torch.ones(3, 4), torch.full((3, 4), largest / 16)

    def takes(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        return kernel_layout(queries, keys, values, torch_impl.causal_mask(3)) is not None

    assert takes(large, ones, large)
    assert takes(large, ones * 4, ones)
    assert not takes(large, ones * 4.1, ones)
    assert not takes(large, large, ones)
    assert not takes(ones, ones, ones * torch.inf)


def test_scores_that_overflow_are_the_formulas() -> None:
    heads = np.abs(HEADS[:3, :, :TORCH_TOKENS]).astype(np.float32) * np.float32(1e25)
    heads[1] *= -1.0
    mask = masks()["causal"][:TORCH_TOKENS, :TORCH_TOKENS].copy()
    assert np.isnan(in_torch(heads, mask, implementation="fused")).all(), "every score is -inf"
    assert np.isnan(in_flax(heads, mask)).all()


def test_scores_beyond_float16_are_the_formulas() -> None:
    """The formula keeps its scores in float16, where 70 * 70 * 16 is inf; a kernel does not."""
    heads, mask = torch.full((1, 130, 16), 70.0, dtype=torch.half), torch_impl.causal_mask(130)
    for implementation in ("auto", "fused", "reference"):
        outputs = torch_impl.masked_attention(heads, heads, heads, mask, None, implementation)
        assert outputs.isnan().any()


@pytest.mark.parametrize("tokens", [pytest.param(530, marks=pytest.mark.again), 800])
def test_flax_gradients_where_the_last_strip_overlaps(tokens: int) -> None:
    """The last strip of queries is moved back over rows whose pairs in it may be blocked."""
    mask = np.triu(np.ones((tokens, tokens), np.float32), 1)
    closed = mask.copy()
    closed[tokens - 520] = 1.0
    heads = np.random.default_rng(4).standard_normal((4, 1, tokens, 8)).astype(np.float32)
    heads[:2] *= 12.0  # scores whose exponentials overflow beside another row's
    fused = jax.jit(partial(flax_gradient, FLAX))
    formula = jax.jit(partial(flax_gradient, flax_impl.reference_attention))
    for each in (mask, closed):
        pairs = zip(fused(heads, each), formula(heads, each), strict=True)
        for found, expected in pairs:
            assert np.array_equal(np.isnan(found), np.isnan(expected))
            scale = np.nanmax(np.abs(expected), initial=1.0)
            # Both sides sum `tokens` products of rounded weights; the scores reach 12 * 12 * 30.
            limit = tokens * 2.0**-24 * scale * 100
            assert np.nanmax(np.abs(found - expected), initial=0.0) <= limit


@pytest.mark.parametrize("name", masks())
def test_an_edit_before_the_backward_pass(name: str) -> None:
    """The gradient is that of the mask as it was in the forward pass, as in the formula."""
    gradients: list[torch.Tensor] = []
    for is_edited in (False, True):
        queries, keys, values = (torch.tensor(array[:, :130]) for array in HEADS[:3])
        queries.requires_grad_()
        mask = torch.from_numpy(masks()[name][:130, :130].copy())
        outputs = torch_impl.masked_attention(queries, keys, values, mask, implementation="fused")
        if is_edited:
            mask[129, 0] = 1.0
        gradients += torch.autograd.grad(outputs.sum(), queries)
    assert torch.equal(*gradients)


def test_a_mask_made_in_inference_mode() -> None:
    with torch.inference_mode():
        mask = torch.from_numpy(masks()["window"][:130, :130].copy())
    heads = [torch.tensor(array[:, :130], requires_grad=True) for array in HEADS[:3]]
    queries, keys, values = heads
    outputs = torch_impl.masked_attention(queries, keys, values, mask, implementation="fused")
    outputs.sum().backward()
    assert queries.grad is not None and queries.grad.isfinite().all()


def test_flax_heads_that_are_not_alike_are_the_formulas() -> None:
    queries, keys, values = jnp.asarray(HEADS[:3], jnp.float32)
    mask = jnp.asarray(masks()["causal"])
    for others in ((keys, values.astype(jnp.bfloat16)), (keys[:1], values[:1])):
        with jax.numpy_dtype_promotion("standard"):
            found = flax_impl.masked_attention(queries, *others, mask, implementation="fused")
            expected = flax_impl.reference_attention(queries, *others, mask)
        assert found.dtype == expected.dtype and jnp.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["causal", "closed"])
@pytest.mark.parametrize("implementation", ["auto", "fused", "reference"])
def test_values_may_have_fewer_heads_than_keys(kind: str, implementation: Any) -> None:
    size = 130
    generator = np.random.default_rng(0)
    queries, keys = generator.standard_normal((2, 2, 4, size, 8))
    values = generator.standard_normal((2, 2, size, 8))
    mask = np.triu(np.ones((size, size)), 1)
    if kind == "closed":
        mask[3] = 1
    arrays = queries, keys, values, mask
    tensors: Any = [torch.from_numpy(array) for array in arrays]
    attend: Any = torch_impl.masked_attention
    of_torch = attend(*tensors, implementation=implementation).numpy()
    with jax.enable_x64(True):
        on_device: Any = [jnp.asarray(array) for array in arrays]
        attend = flax_impl.masked_attention
        in_flax = implementation if implementation == "reference" else "fused"
        of_flax = attend(*on_device, implementation=in_flax)
    repeated: Any = [queries, keys, values.repeat(2, 1), mask]
    repeated = [torch.from_numpy(array) for array in repeated]
    expected = torch_impl.reference_attention(*repeated).numpy()
    for found in (of_torch, np.asarray(of_flax)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_numpy_mask_is_not_narrowed(implementation: Any) -> None:
    """Without x64, JAX would make 0 of 1e-50 and of 2**32."""
    causal = np.triu(np.ones((40, 40)), 1) > 0
    queries, keys, values = jnp.asarray(HEADS[:3, :, :40], jnp.float32)
    attend = partial(flax_impl.masked_attention, queries, keys, values)
    expected = attend(flax_impl.causal_mask(40), implementation=implementation)
    for value in (1e-50, 2**32):
        mask: Any = np.where(causal, value, 0)
        found = attend(mask, implementation=implementation)
        assert np.array_equal(found, expected)


def edits() -> dict[str, Callable[[torch_impl.CausalAttentionWithBuffer], Any]]:
    window = torch.from_numpy(masks()["window"])

    def in_place(module: Any) -> None:
        module.mask[200, 100] = 1.0

    def through_a_view(module: Any) -> None:
        module.mask.T[100, 200] = 1.0

    def through_data(module: Any) -> None:
        module.mask.data[200, 100] = 1.0

    def other_data(module: Any) -> None:
        module.mask.data = window.clone()

    def through_numpy(module: Any) -> None:
        module.mask.numpy()[200, 100] = 1.0

    def swapped(module: Any) -> None:
        module.mask.data[200, [100, 202]] = module.mask.data[200, [202, 100]]

    def swapped_in_two_rows(module: Any) -> None:
        module.mask.data[[100, 200], 150] = module.mask.data[[200, 100], 150]

    def same_sum(module: Any) -> None:
        module.mask = module.mask.long()
        module(torch.zeros(1, TORCH_TOKENS, 8))
        module.mask.data[10, 200], module.mask.data[10, 202] = 0, 2

    def to_another_and_back(module: Any) -> None:
        module.to(torch.float64).mask.fill_(0.0)
        module.to(torch.float32)

    def to_bool(module: Any) -> None:
        module.mask = module.mask.bool()
        module.mask[200, 100] = True

    return {
        "in place": in_place,
        "a view": through_a_view,
        ".data": through_data,
        "two swapped": swapped,
        "two swapped in a column": swapped_in_two_rows,
        "the same sum": same_sum,
        "other .data": other_data,
        "NumPy": through_numpy,
        "copy_": lambda module: module.mask.copy_(window),
        "load_state_dict": lambda module: module.load_state_dict(
            {**module.state_dict(), "mask": window}
        ),
        "assigned": lambda module: module.load_state_dict(
            {**module.state_dict(), "mask": window}, assign=True
        ),
        ".to()": to_another_and_back,
        "another dtype": to_bool,
    }


@pytest.mark.parametrize("name", edits())
def test_torch_sees_every_edit(name: str) -> None:
    torch.manual_seed(0)
    module = torch_impl.CausalAttentionWithBuffer(8, 8, 640, 0.0, implementation="fused")
    inputs = torch.randn(1, TORCH_TOKENS, 8)
    with torch.no_grad():
        before = module(inputs)
        edits()[name](module)
        after = module(inputs)
        module.implementation = "reference"
        judge_same(after, module(inputs))
    assert not torch.equal(before, after)


def judge_same(outputs: torch.Tensor, formula: torch.Tensor) -> None:
    """Allow the kernel's rounding; an ignored edit would move whole weights."""
    assert float((outputs - formula).abs().max()) < 2.0**-24 * TORCH_TOKENS


def test_torch_looks_at_a_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counted(*args: torch.Tensor) -> Any:
        looked.append(1)
        return examine(*args)

    examine = mask_layout.examine
    monkeypatch.setattr(mask_layout, "examine", counted)
    module = torch_impl.CausalMultiHeadAttention(8, 8, 640, 0.0, 2)
    inputs = torch.randn(1, TORCH_TOKENS, 8)
    for _ in range(3):
        module(inputs).sum().backward()
    assert len(looked) == 1
    module.mask[3, 2] = 1.0
    module(inputs)
    module(inputs)
    assert len(looked) == 2
    for tokens in (200, 201, *range(130, 150), TORCH_TOKENS, 200):
        module(inputs[:, :tokens])
    assert len(looked) == 2, "a mask is examined once for all numbers of tokens"
    copied = copy.deepcopy(module)
    copied(inputs)
    assert len(looked) == 2, "a mask that blocks the same pairs need not be examined"
    copied.mask[3, 1] = 1.0
    copied(inputs)
    assert len(looked) == 3
    assert len(mask_layout._cache[module.mask].layouts) == mask_layout.MAX_CACHED_LENGTHS
    with torch.inference_mode():
        module.mask = module.mask.clone()
        module(inputs)
        module.mask[5, 2] = 1.0  # inference tensors have no version
        edited = module(inputs)
        module.implementation = "reference"
        judge_same(edited, module(inputs))


@pytest.mark.parametrize("size", [1, 7, 8, 65, 512, 513])
def test_every_entry_is_packed(size: int) -> None:
    """The packed words of two masks are the same only if the same pairs are blocked."""
    random = np.random.default_rng(size)
    mask = torch.from_numpy(random.random((size, size)) < 0.5)
    packed = mask_layout.pack(mask)
    set_bits = sum((word % 2**64).bit_count() for word in packed.flatten().tolist())
    assert torch.equal(mask_layout.unpack(packed, size), mask)
    for tokens in {1, size // 2, size - 1, size} - {0}:
        first = mask_layout.pack(mask[:tokens, :tokens])
        assert torch.equal(mask_layout.first_packed(packed, tokens), first)
    assert set_bits == int(mask.sum()), "each blocked pair has a bit of its own"
    for row, column in random.integers(size, size=(40, 2)).tolist():
        edited = mask.clone()
        edited[row, column] = ~edited[row, column]
        assert not torch.equal(mask_layout.pack(edited), packed)
        assert torch.equal(mask_layout.pack(edited.T.contiguous().T), mask_layout.pack(edited))
        two, power = edited.to(torch.complex64) * 1e-45j, torch.float8_e5m2
        assert torch.equal(mask_layout.pack(two), mask_layout.pack(edited.to(power)))


def test_torch_transforms_are_not_fooled() -> None:
    module = torch_impl.CausalAttentionWithBuffer(8, 8, 640, 0.0, implementation="fused")
    inputs = torch.randn(1, TORCH_TOKENS, 8)
    two = torch.stack([torch.from_numpy(masks()[name]) for name in ("causal", "window")])
    with torch.no_grad():
        module(inputs)
        called = [torch.func.functional_call(module, {"mask": mask}, (inputs,)) for mask in two]
        mapped = torch.vmap(
            lambda mask: torch.func.functional_call(module, {"mask": mask}, (inputs,))
        )(two)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, and Python's `if` on shapes
            traced: Any = torch.jit.trace(module, (inputs,), check_trace=False)
        module.mask.copy_(two[1])
        for mask, one, other in zip(two, called, mapped, strict=True):
            formula = torch.func.functional_call(
                torch_impl.CausalAttentionWithBuffer(8, 8, 640, 0.0, implementation="reference"),
                {**module.state_dict(), "mask": mask},
                (inputs,),
            )
            judge_same(one, formula)
            judge_same(other, formula)
        judge_same(traced(inputs), called[1])
    with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        dual = torch.autograd.forward_ad.make_dual(inputs, torch.ones_like(inputs))
        assert torch.autograd.forward_ad.unpack_dual(module(dual)).tangent is not None


@pytest.mark.slow
def test_torch_compiled_obeys_an_edit() -> None:
    module = torch_impl.CausalAttentionWithBuffer(8, 8, 640, 0.0, implementation="fused")
    inputs = torch.randn(1, TORCH_TOKENS, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning
        )
        compiled_module = torch.compile(module, fullgraph=True)
        judge_same(with_inductor(lambda: compiled_module(inputs)), module(inputs))
        module.mask[200:, 100] = 1.0
        judge_same(compiled_module(inputs), module(inputs))


def test_dropout_takes_the_formula() -> None:
    queries, keys, values = map(torch.from_numpy, HEADS[:3, :, :TORCH_TOKENS])
    mask, dropout = torch.from_numpy(MASK), torch.nn.Dropout(0.3)
    drawn = []
    for implementation in get_args(Implementation):
        torch.manual_seed(3)
        drawn.append(
            torch_impl.masked_attention(queries, keys, values, mask, dropout, implementation)
        )
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    module = torch_impl.CausalAttentionWithBuffer(8, 8, 640, 0.3, implementation="fused")
    seen: list[torch.Size] = []
    module.dropout.register_forward_hook(
        lambda _module, _inputs, weights: seen.append(weights.shape)
    )
    module.eval()(torch.randn(1, TORCH_TOKENS, 8))
    assert seen == [(1, TORCH_TOKENS, TORCH_TOKENS)], "the hook did not see the weights"


@pytest.mark.parametrize(
    ("tokens", "implementation", "is_asked"),
    [(4, "fused", True), (4, "auto", False), (128, "auto", True), (128, "reference", False)],
)
def test_which_implementation_asks_for_the_kernels(
    tokens: int, implementation: Any, is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch_impl.dispatch, "kernel_layout", lambda *_: asked.append(tokens))
    ones, mask = torch.ones(1, tokens, 2), torch_impl.causal_mask(tokens)
    torch_impl.masked_attention(ones, ones, ones, mask, implementation=implementation)
    assert asked == [tokens] * is_asked


@pytest.mark.parametrize(
    ("tokens", "implementation", "is_fused"),
    [(4, "fused", True), (4, "auto", False), (768, "auto", True), (768, "reference", False)],
)
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (1, 1, 1)])
def test_which_implementation_takes_tiles(
    leading: tuple[int, ...],
    tokens: int,
    implementation: Any,
    is_fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def attend(_queries: Any, _keys: Any, values: jax.Array, _mask: Any) -> jax.Array:
        taken.append(tokens)
        return values

    monkeypatch.setattr(flax_impl.fused, "_attend", attend)
    heads = jnp.ones((*leading, tokens, 2))
    mask = flax_impl.causal_mask(tokens)
    out = flax_impl.masked_attention(heads, heads, heads, mask, implementation=implementation)
    assert out.shape == heads.shape
    assert taken == [tokens] * is_fused


def test_single_precision_is_computed_in_single_precision() -> None:
    """Also where JAX has 64 bits."""
    with jax.enable_x64(True):
        queries, keys, values = jnp.asarray(HEADS[:3, :, :8], jnp.float32)
        mask = jnp.zeros((8, 8), jnp.float32)
        out, logsumexp = flax_impl.fused._forward(queries, keys, values, mask)
    assert (out.dtype, logsumexp.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize(
    ("dtype", "width", "value_width", "device", "is_taken"),
    [
        ("bfloat16", 8, 8, "gpu", True),
        ("float16", 128, 128, "gpu", True),
        ("float32", 8, 8, "gpu", False),
        ("bfloat16", 12, 12, "gpu", False),
        ("bfloat16", 7, 7, "gpu", False),
        ("bfloat16", 136, 136, "gpu", False),
        ("bfloat16", 8, 16, "gpu", False),
        ("bfloat16", 8, 8, "cpu", False),
    ],
)
def test_what_cudnn_takes(
    dtype: str,
    width: int,
    value_width: int,
    device: str,
    is_taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    queries, values = (jnp.zeros((2, 16, size), dtype) for size in (width, value_width))
    assert flax_impl.fused._cudnn_supports(queries, values) is is_taken


@pytest.mark.parametrize("name", ["causal", "edited"])
def test_what_is_given_to_cudnn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here the formula takes cuDNN's place."""

    def attend(*heads: jax.Array, implementation: str, is_causal: bool = False) -> jax.Array:
        assert implementation == "cudnn"
        tokens = heads[0].shape[1]
        mask = flax_impl.causal_mask(tokens) if is_causal else jnp.zeros((tokens, tokens))
        queries, keys, values = (jnp.moveaxis(array, 1, 2) for array in heads)
        return jnp.moveaxis(flax_impl.reference_attention(queries, keys, values, mask), 2, 1)

    monkeypatch.setattr(
        flax_impl.fused.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args)
    )
    monkeypatch.setattr(flax_impl.fused.jax.nn, "dot_product_attention", attend)
    mask = masks()[name]
    judge(in_flax(HEADS[:3], mask, flax_impl.fused._cudnn_if_causal), HEADS[:3], mask)


@pytest.mark.parametrize(
    "make",
    [
        torch_impl.CausalMultiHeadAttention,
        flax_impl.CausalMultiHeadAttention,
        partial(flax_impl.nnx.CausalMultiHeadAttention, rngs=nnx.Rngs(0)),
    ],
)
def test_what_a_module_refuses(make: Any) -> None:
    with pytest.raises(
        ValueError, match="output_embedding_dim=10 cannot be divided into num_heads=4"
    ):
        make(8, 10, 16, 0.1, 4)
    for num_heads in (0, 2.5, True, "2", None):
        with pytest.raises(ValueError, match=f"num_heads={num_heads}"):
            make(8, 10, 16, 0.1, num_heads)
    with pytest.raises(ValueError, match="implementation is 'flash'; expected one of"):
        make(8, 8, 16, 0.1, 4, implementation="flash")
    with pytest.raises(ValueError, match="dropout is 2"):
        make(8, 8, 16, 2, 4)
    with pytest.raises(ValueError, match="dropout is None; a probability lies between 0 and 1"):
        make(8, 8, 16, None, 4)


@pytest.mark.parametrize("package", [torch_impl, flax_impl])
def test_what_the_function_refuses(package: Any) -> None:
    ones = torch.ones if package is torch_impl else jnp.ones
    heads, mask = [ones((1, 4, 2))] * 3, ones((3, 3))
    with pytest.raises(ValueError, match="implementation is 'flash'; expected one of"):
        package.masked_attention(*heads, ones((4, 4)), implementation="flash")
    with pytest.raises(ValueError, match="mask"):
        package.masked_attention(*heads, mask)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".msgpack", ".orbax"])
def test_heads_through_every_format(suffix: str, tmp_path: Path) -> None:
    config = Config(8, 8, 12, 0.0, qkv_bias=True, num_heads=2)
    trial = draw(config, 12, np.random.default_rng(3)).masked(
        "edited", np.eye(12, k=3, dtype=np.float32) * -2.0
    )
    trial = trial.rounded("float32")
    path = save_checkpoint(tmp_path / f"heads{suffix}", torch_state(trial.state))
    module = build_torch(config, buffer=True)
    load_checkpoint(path, module)
    variables = load_checkpoint(path, linen_template(config, buffer=True))
    model = build_nnx(config, buffer=True)
    load_checkpoint(path, model)
    for back in (module.state_dict(), linen_to_torch(variables), nnx_to_torch(model)):
        assert set(back) == set(trial.state)
        assert all(
            same_bits(tensor_to_numpy(back[name]), array) for name, array in trial.state.items()
        )


def test_heads_are_matched_by_name() -> None:
    config = Config(8, 8, 12, 0.0, qkv_bias=True, num_heads=2)
    table = compare.match(
        build_torch(config, buffer=True).state_dict(), linen_template(config, buffer=True)
    )
    assert {row.torch_key: row.path for row in table.rows} == {
        row.torch_key: row.linen_path for row in ROWS
    }


@pytest.mark.slow
@pytest.mark.again
def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention, "QUICK_TOKENS", (32, 64))
    monkeypatch.setattr(attention, "MEMORY_OF", (("torch", "ours"),))
    monkeypatch.setattr(attention, "SAMPLE", 1e-4)
    picture = tmp_path / "bench.png"
    sections = sections_of(attention.sections(True, 1, plot=picture))
    assert [section.title.split(",")[0] for section in sections[:2]] == ["causal", "causal"]
    (table, _, _, _, _, _, errors, curves) = sections[0].blocks
    assert isinstance(table, Table) and isinstance(errors, Table) and isinstance(curves, Curves)
    names = [row[0] for row in table.rows]
    assert {
        "torch formula",
        "torch SDPA is_causal",
        "torch ours",
        "JAX formula",
        "jax.nn",
        "Flax ours",
    } <= set(names)
    ratios = [float(str(value)) for row in errors.rows for value in row[1:]]
    assert all(0.0 < ratio <= 1.0 for ratio in ratios), "an error exceeds its bound"
    assert [name.split(", ")[0] for name in curves.series] == names
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bench-backward.png").is_file()
    assert [check.name for check in sections[-1].checks][:2] == [
        "memory, torch ours, forward",
        "memory, torch ours, forward + backward",
    ]
