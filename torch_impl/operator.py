"""The kernels as one operator of torch, for programs that are compiled or mapped.

`torch.compile` and `torch.func.vmap` run Python before there are values. The operator is called
when there are, and then asks what `kernel_layout` asks. Its outputs are the attention's output and
what the backward pass needs: the logsumexp of the scores, and which pairs were blocked.

Source: PyTorch documentation, "PyTorch Custom Operators".
"""

from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .closed_rows import find_closed, guarded_attention
from .fused import Heads, forward, gradients, keeps_logsumexp, kernel_layout
from .mask_layout import pack, unpack
from .private_api import softmax_backward


def operator_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Compute `reference_attention` when the values are known."""
    if torch.compiler.is_compiling():
        return masked_attention_operator(queries, keys, values, mask)[0]
    return _Operator.apply(queries, keys, values, mask)[0]


@torch.library.custom_op("torch_impl::masked_attention", mutates_args=())
def masked_attention_operator(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attention's output, the logsumexp of the scores, and the packed mask.

    The logsumexp is 0 where the backward pass does not need it.
    """
    num_tokens = queries.shape[-2]
    with without_autocast(queries):
        layout = kernel_layout(queries, keys, values, mask)
        if layout is None:
            closed = find_closed(mask[:num_tokens, :num_tokens])
            out, logsumexp = guarded_attention(queries, keys, values, mask, closed), None
        else:
            out, logsumexp = forward(queries, keys, values, layout)
    like_out, like_logsumexp, _ = _without_values(queries, keys, values, mask)
    if logsumexp is None:
        logsumexp = torch.zeros_like(like_logsumexp)
    packed = pack(mask[:num_tokens, :num_tokens])
    return _laid_out(out, like_out), _laid_out(logsumexp, like_logsumexp), packed


@masked_attention_operator.register_fake
def _without_values(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (queries.shape[-2] + 7) // 8
    dtype = torch.promote_types(queries.dtype, torch.float32)
    logsumexp = queries.new_empty(queries.shape[:-1], dtype=dtype)
    return _empty(queries), logsumexp, mask.new_empty((groups, groups), dtype=torch.int64)


@torch.library.custom_op("torch_impl::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    packed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    heads, blocked = (queries, keys, values), unpack(packed, queries.shape[-2])
    with without_autocast(queries):
        layout = kernel_layout(*heads, blocked)
        if layout is None:
            grads = _formula_gradients(*heads, blocked, grad)
        else:
            kept = (out, logsumexp) if keeps_logsumexp(queries, layout) else ()
            grads = gradients(heads, layout, grad, kept)
    grad_queries, grad_keys, grad_values = (_laid_out(each, _empty(each)) for each in grads)
    return grad_queries, grad_keys, grad_values


@masked_attention_backward.register_fake
def _(grad: Tensor, *heads_and_kept: Tensor) -> Heads:
    return _empty(grad), _empty(grad), _empty(grad)


class _Operator(torch.autograd.Function):
    """The operator with its gradients, as the transforms of `torch.func` take them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return masked_attention_operator(queries, keys, values, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_OperatorBackward.apply(grad, *ctx.saved_tensors), None


class _OperatorBackward(torch.autograd.Function):
    """The gradients, and the formula's second derivatives, which can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*grad_and_saved: Tensor) -> Heads:
        return masked_attention_backward(*grad_and_saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Heads) -> None:
        ctx.save_for_backward(*inputs[:4], inputs[6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *grad_and_heads, packed = ctx.saved_tensors
        blocked = unpack(packed, grads[0].shape[-2])

        def formula(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return guarded_attention(queries, keys, values, blocked, find_closed(blocked))

        def gradients_of_formula(grad: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(formula, *heads)[1](grad)

        second = torch.func.vjp(gradients_of_formula, *grad_and_heads)[1](grads)
        return *second, None, None, None


def _compiled_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *masked_attention_backward(grad, *ctx.saved_tensors), None


masked_attention_operator.register_autograd(
    _compiled_backward, setup_context=_Operator.setup_context
)


def _formula_gradients(
    queries: Tensor, keys: Tensor, values: Tensor, blocked: Tensor, grad: Tensor
) -> Heads:
    """Return the gradients of `reference_attention`. An operator cannot ask autograd for them."""
    scale = queries.shape[-1] ** 0.5
    scores = (queries @ keys.mT).masked_fill(blocked, -torch.inf)
    weights = torch.softmax(scores / scale, dim=-1)
    grad_weights = grad @ values.mT
    grad_scores = softmax_backward(grad_weights, weights, -1, weights.dtype) / scale
    grad_scores = grad_scores.masked_fill(blocked, 0.0)
    return grad_scores @ keys, grad_scores.mT @ queries, weights.mT @ grad


def _map_forward(
    info: Any, in_dims: tuple[int | None, ...], *heads_and_mask: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    *heads, mask = _batched(info, in_dims, heads_and_mask)
    if in_dims[3] is None:
        return masked_attention_operator(*heads, mask[0]), (0, 0, None)
    each = [masked_attention_operator(*one) for one in zip(*heads, mask, strict=True)]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0)


def _map_backward(
    info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *others, packed = _batched(info, in_dims, tensors)
    if in_dims[6] is None:
        return masked_attention_backward(*others, packed[0]), (0, 0, 0)
    each = [masked_attention_backward(*one) for one in zip(*others, packed, strict=True)]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0)


masked_attention_operator.register_vmap(_map_forward)
masked_attention_backward.register_vmap(_map_backward)


def _batched(
    info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]
) -> list[Tensor]:
    """Return the tensors with the mapped dimension first; a tensor without one is repeated."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def _empty(like: Tensor) -> Tensor:
    """Return an empty tensor with heads after tokens in memory, as the projections have them."""
    if like.ndim < 3:
        return like.new_empty(like.shape)
    return like.new_empty(like.transpose(-3, -2).shape).transpose(-3, -2)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the memory layout that was announced. An output is never an input."""
    is_as_announced = all(
        size == 1 or stride == expected
        for size, stride, expected in zip(like.shape, tensor.stride(), like.stride(), strict=True)
    )
    return tensor if is_as_announced else like.copy_(tensor)
