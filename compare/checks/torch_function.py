"""What only torch's `masked_attention` has: views, frozen inputs, autocast, edits, overflow."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch.autograd import forward_ad

import torch_impl
from torch_impl.dispatch import Implementation

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..runners.attend import Attention, Heads
from .heads import (
    CLOSED_ROW,
    HEAD_DIM,
    TOKENS,
    MakeFinding,
    draw_heads,
    gradient_limit,
    output_limit,
    patterns,
)

_AUTO_AND_FORMULA: tuple[Implementation, ...] = ("auto", "reference")


def some_gradients(
    run: Attention, implementation: Implementation, finding: MakeFinding
) -> Iterator[Finding]:
    """Where only some of the gradients are needed, they are those that come with the others."""
    heads = draw_heads(TOKENS, np.float64)
    cotangent = np.random.default_rng(2).standard_normal(heads[2].shape)
    for pattern, blocked in patterns(closed=False).items():
        mask = blocked.astype(np.float32)
        every = run.gradients(heads, mask, cotangent, implementation)
        for needed in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            for twice in (False, True):
                some = run.some_gradients(
                    heads, mask, cotangent, implementation, needed, twice=twice
                )
                agreed = max(
                    (
                        agreement(gradient, every[index], gradient_limit(heads, cotangent))
                        for index, gradient in zip(needed, some, strict=True)
                    ),
                    key=lambda agreed: agreed.ratio,
                )
                case = f"{implementation}, {pattern}, {needed}{', to be differentiated' * twice}"
                yield finding("some of the gradients", case, agreed, tolerances.TWO_RUNS)


def autocast(heads: Heads, device: str) -> Agreement:
    """Compare the bits under autocast with those of the formula: the kernels are not used there."""
    queries, keys, values = (numpy_to_tensor(array).to(device) for array in heads)
    mask = torch.from_numpy(patterns()["strips"]).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        automatic, formula = (
            torch_impl.masked_attention(queries, keys, values, mask, implementation=chosen)
            for chosen in _AUTO_AND_FORMULA
        )
    if automatic.dtype != formula.dtype:
        return same_names([str(automatic.dtype)], [str(formula.dtype)])
    open_rows = ~patterns()["strips"].all(axis=1)
    return identical(*(tensor_to_numpy(outputs)[:, open_rows] for outputs in (automatic, formula)))


def views(
    run: Attention, implementation: Implementation, finding: MakeFinding
) -> Iterator[Finding]:
    """Give heads that lie in memory in other ways: the outputs and gradients are as before."""
    heads = draw_heads(TOKENS, np.float64)
    cotangent = np.random.default_rng(2).standard_normal(heads[2].shape)
    for pattern, blocked in {
        **patterns(closed=False),
        "open": np.zeros((TOKENS, TOKENS), bool),
    }.items():
        mask = blocked.astype(np.float32)
        outputs = run(heads, mask, implementation)
        gradients = run.gradients(heads, mask, cotangent, implementation)
        for name, laid in LAYOUTS.items():
            tensors = [laid(torch.from_numpy(array)).requires_grad_() for array in heads]
            queries, keys, values = tensors
            result = torch_impl.masked_attention(
                queries,
                keys,
                values,
                torch.from_numpy(mask),
                None,
                implementation,
            )
            found = torch.autograd.grad(result, tensors, laid(torch.from_numpy(cotangent)))
            case = f"{implementation}, {pattern}, {name}"
            agreed = agreement(_plain(result), outputs, output_limit(heads))
            yield finding("views", case, agreed, tolerances.TWO_RUNS)
            for one, expected in zip(found, gradients, strict=True):
                agreed = agreement(_plain(one), expected, gradient_limit(heads, cotangent))
                yield finding("gradients of views", case, agreed, tolerances.TWO_RUNS)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


def _with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2].detach()


def _four_axes(tensor: torch.Tensor) -> torch.Tensor:
    return _transposed(tensor)[None].detach()


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(1, 0, 2).contiguous().permute(1, 0, 2)[None, None].detach()


LAYOUTS = {
    "transposed": _transposed,
    "with gaps": _with_gaps,
    "four axes, transposed": _four_axes,
    "five axes, tokens first": _tokens_first,
}


def _plain(tensor: torch.Tensor) -> np.ndarray:
    """Return the values with three axes, as the heads have."""
    return tensor_to_numpy(tensor.detach().reshape(1, TOKENS, HEAD_DIM).contiguous())


def overflow(run: Attention, finding: MakeFinding) -> Iterator[Finding]:
    """Let scores overflow, before or after the scale: NaN and inf lie as in the formula."""
    drawn = [np.sign(array) for array in draw_heads(TOKENS)]
    below = [-np.abs(drawn[0]), np.abs(drawn[1]), drawn[2]]
    for name, factor, signs in (
        ("before the scale alone", 1.2e19, drawn),
        ("after it too", 1e25, drawn),
        ("below 0", 1e25, below),
    ):
        heads = [signs[0] * np.float32(factor), signs[1] * np.float32(factor), signs[2]]
        for pattern, blocked in patterns().items():
            mask = blocked.astype(np.float32)
            fused, formula = (run(heads, mask, chosen) for chosen in ("fused", "reference"))
            agreed = agreement(fused, formula, output_limit(signs))
            yield finding("overflow", f"{name}, {pattern}", agreed, tolerances.TWO_RUNS)


def values_out_of_range(run: Attention, finding: MakeFinding) -> Iterator[Finding]:
    """Give a value of NaN or inf that most rows do not see: it reaches them through 0 * NaN."""
    for entry in (np.nan, np.inf):
        queries, keys, values = heads = draw_heads(TOKENS)
        changed = values.copy()
        changed[:, -1, 0] = entry
        for pattern, blocked in patterns(closed=False).items():
            mask = blocked.astype(np.float32)
            fused, formula = (
                run([queries, keys, changed], mask, chosen) for chosen in ("fused", "reference")
            )
            agreed = agreement(fused, formula, output_limit(heads))
            yield finding(f"a value of {entry}", pattern, agreed, tolerances.TWO_RUNS)


def edits_between_passes(
    implementation: Implementation, device: str, finding: MakeFinding
) -> Iterator[Finding]:
    """Edit the mask between the passes: an error, or the gradient of the mask as it was."""
    cases = [(name, dtype) for name in patterns(closed=False) for dtype in ("float32", "bool")]
    for pattern, dtype in cases:
        gradients: list[np.ndarray] = []
        for is_edited in (False, True):
            blocked = patterns(closed=False)[pattern]
            queries, keys, values = (
                numpy_to_tensor(array).to(device).requires_grad_() for array in draw_heads(TOKENS)
            )
            mask = torch.from_numpy(blocked.astype(dtype)).to(device)
            outputs = torch_impl.masked_attention(
                queries,
                keys,
                values,
                mask,
                None,
                implementation,
            )
            if is_edited:
                mask[:, :32] = mask[:, :32] == 0
            try:
                (gradient,) = torch.autograd.grad(outputs.sum(), [queries])
            except RuntimeError:  # torch's, about an in-place operation
                gradient = torch.as_tensor(gradients[0])
            gradients.append(tensor_to_numpy(gradient))
        agreed = identical(gradients[1], gradients[0])
        case = f"{implementation}, {pattern}, {dtype}"
        yield finding("an edit between the passes", case, agreed)


def second_derivatives_of_closed_rows(device: str, finding: MakeFinding) -> Iterator[Finding]:
    """Differentiate twice beside a closed row: NaN is where the formula has it."""
    for pattern, blocked in patterns().items():
        places = []
        for implementation in ("fused", "reference"):
            queries, keys, values = tensors = [
                numpy_to_tensor(array).to(device).requires_grad_()
                for array in draw_heads(TOKENS, np.float64)
            ]
            mask = torch.from_numpy(blocked).to(device)
            outputs = torch_impl.masked_attention(queries, keys, values, mask, None, implementation)
            first = torch.autograd.grad(outputs.square().sum(), tensors, create_graph=True)
            total = torch.stack([each.square().sum() for each in first]).sum()
            second = torch.autograd.grad(total, tensors)
            places.append(np.stack([np.isnan(tensor_to_numpy(each)) for each in second]))
        yield finding("second derivatives beside a closed row", pattern, identical(*places))


def autocast_of_a_closed_row(device: str) -> Agreement:
    """Call a module under autocast: `out_proj` keeps autocast's dtype beside a closed row."""
    dtypes = []
    for closes in (False, True):
        module = torch_impl.CausalMultiHeadAttention(HEAD_DIM, HEAD_DIM, TOKENS, 0.0, 1)
        if closes:
            module.mask[CLOSED_ROW] = 1.0
        inputs = numpy_to_tensor(draw_heads(TOKENS)[0]).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            dtypes.append(str(module.to(device)(inputs).dtype))
    return same_names(dtypes[1:], dtypes[:1])


def forward_mode(implementation: Implementation, device: str) -> Agreement:
    """Compare a forward-mode derivative with that of the formula."""
    heads = draw_heads(TOKENS, np.float64)
    tensors = [numpy_to_tensor(array).to(device) for array in heads]
    mask = torch.from_numpy(patterns(closed=False)["causal"].astype(np.float32)).to(device)
    tangents = []
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's forward mode uses a deprecated part of torch
        chosen: Implementation
        for chosen in (implementation, "reference"):
            queries, keys, values = (
                forward_ad.make_dual(tensor, tensor.flip(-1)) for tensor in tensors
            )
            outputs = torch_impl.masked_attention(queries, keys, values, mask, None, chosen)
            tangents.append(tensor_to_numpy(forward_ad.unpack_dual(outputs).tangent))
    return agreement(tangents[0], tangents[1], gradient_limit(heads, heads[0]))


def traced(heads: Heads, implementation: Implementation) -> Agreement:
    """Trace the function under one mask, and run the traced program under another."""
    queries, keys, values = map(numpy_to_tensor, heads)
    masks = [torch.from_numpy(patterns(closed=False)[name].astype(np.float32)) for name in _TRACED]

    def attend(mask: torch.Tensor) -> torch.Tensor:
        return torch_impl.masked_attention(queries, keys, values, mask, None, implementation)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of what it cannot see
        program = torch.jit.trace(attend, (masks[0],), check_trace=False)
        found, expected = tensor_to_numpy(program(masks[1])), tensor_to_numpy(attend(masks[1]))
    return agreement(found, expected, output_limit(heads))


_TRACED = ("causal", "wide")
