"""Print the times of our attention and of the library's in torch's contexts, as JSON.

Usage: `python -m compare.bench.contexts_torch_worker TOKENS ROUNDS`.
"""

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_impl import CausalMultiHeadAttention

from .turns import median_milliseconds

HEADS, HEAD_DIM = 12, 64
WIDTH = HEADS * HEAD_DIM
GROWING = 40  # calls, each with one token more


class Library(nn.Module):
    """Our module's projections around the kernel that takes the mask for causal."""

    def __init__(self, ours: CausalMultiHeadAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, inputs: Tensor) -> Tensor:
        """Let each token attend to itself and to the tokens before it."""
        queries, keys, values = (
            layer(inputs).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
            for layer in (self.ours.W_query, self.ours.W_key, self.ours.W_value)
        )
        dropped = self.ours.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, dropout_p=dropped
        )
        output: Tensor = self.ours.out_proj(context.transpose(1, 2).flatten(2))
        return output


def _train(module: Any, inputs: Tensor) -> None:
    module(inputs).sum().backward()


def _infer(module: Any, inputs: Tensor) -> None:
    with torch.no_grad():
        module(inputs)


def _under_autocast(run: Callable[[Any, Tensor], None]) -> Callable[[Any, Tensor], None]:
    def call(module: Any, inputs: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            run(module, inputs)

    return call


def _mapped(module: Any, inputs: Tensor) -> None:
    with torch.no_grad():
        torch.vmap(module)(torch.stack([inputs, inputs, inputs]))


def _per_sample(module: Any, inputs: Tensor) -> None:
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, sample: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (sample,)).sum()

    samples = torch.stack([inputs, inputs])
    torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)


def _growing(module: Any, inputs: Tensor) -> None:
    with torch.no_grad():
        for tokens in range(inputs.shape[1] - GROWING, inputs.shape[1]):
            module(inputs[:, :tokens])


def main() -> None:
    """Time each context."""
    tokens, rounds = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")  # of torch, about its own kernel under vmap
    torch.manual_seed(0)
    inputs = torch.rand(1, tokens, WIDTH)
    runs: dict[str, tuple[Callable[[Any, Tensor], None], float, bool]] = {
        "compiled, inference": (_infer, 0.0, True),
        "compiled, training": (_train, 0.0, True),
        "autocast, inference": (_under_autocast(_infer), 0.0, False),
        "autocast, training": (_under_autocast(_train), 0.0, False),
        "vmap over 3 batches": (_mapped, 0.0, False),
        "gradients of 2 samples": (_per_sample, 0.0, False),
        "training with dropout": (_train, 0.1, False),
        "a growing prompt": (_growing, 0.0, False),
    }
    results = {}
    for name, (run, dropped, is_compiled) in runs.items():
        ours = CausalMultiHeadAttention(WIDTH, WIDTH, tokens, dropped, HEADS).train(dropped > 0)
        modules: list[Any] = [ours, Library(ours).train(dropped > 0)]
        if is_compiled:
            modules = [torch.compile(module) for module in modules]
        results[name] = median_milliseconds(
            [partial(run, module, inputs) for module in modules], rounds
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
