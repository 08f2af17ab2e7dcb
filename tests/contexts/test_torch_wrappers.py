"""Our module wrapped, rewritten, trained and shared as other programs do, beside the formula."""

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from .torch_formula import FEATURES, LENGTHS, WIDTH, assert_same, inputs, masks, pair

Context = Callable[[Any, int], Any]


def passes(module: Any, tokens: int) -> Any:
    """The outputs, and the gradients of every parameter that is trained."""
    outputs = module(inputs(tokens))
    trained = [each for each in module.parameters() if each.requires_grad]
    return outputs, torch.autograd.grad(outputs.nan_to_num().square().sum(), trained)


def spectral_norm(module: Any, tokens: int) -> Any:
    torch.manual_seed(1)
    parametrizations.spectral_norm(module.W_query)
    parametrizations.spectral_norm(module.out_proj)
    return passes(module, tokens), module.eval()(inputs(tokens))


def pruned(module: Any, tokens: int) -> Any:
    for layer in (module.W_key, module.out_proj):
        prune.l1_unstructured(layer, "weight", amount=0.3)
    found = passes(module, tokens)
    prune.remove(module.out_proj, "weight")
    return found, module(inputs(tokens))


class LowRank(nn.Module):
    """LoRA: the layer stays frozen, and a product of two narrow matrices is added."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        generator = torch.Generator().manual_seed(2)
        widths = layer.in_features, layer.out_features
        draw = (torch.randn(2, width, generator=generator, dtype=torch.float64) for width in widths)
        self.down, self.up = map(nn.Parameter, draw)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens) + tokens @ self.down.mT @ self.up


def low_rank(module: Any, tokens: int) -> Any:
    module.W_query, module.out_proj = LowRank(module.W_query), LowRank(module.out_proj)
    return passes(module, tokens)


def trained_by_lbfgs(module: Any, tokens: int) -> Any:
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2)

    def closure() -> Any:
        optimizer.zero_grad()
        size = module(inputs(tokens)).nan_to_num().square().sum()
        size.backward()
        return size

    return optimizer.step(closure), [parameter.detach() for parameter in module.parameters()]


def as_a_vector(module: Any, tokens: int) -> Any:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 2.0, module.parameters())
    return vector, module(inputs(tokens))


def parallel_over_data(module: Any, tokens: int) -> Any:
    return nn.DataParallel(module)(inputs(tokens))


def sequential(module: Any, tokens: int) -> Any:
    between = nn.Linear(WIDTH, FEATURES, dtype=torch.float64)
    nn.init.constant_(between.weight, 0.1)
    nn.init.zeros_(between.bias)
    return nn.Sequential(module, between, module)(inputs(tokens))


def in_threads(module: Any, tokens: int) -> Any:
    found: dict[int, Tensor] = {}
    copies = [copy.deepcopy(module) for _ in range(4)]

    def run(index: int) -> None:
        for _ in range(3):
            copies[index].mask = masks()[("causal", "edited", "closed", "edited")[index]]
            found[index] = copies[index](inputs(tokens)).detach()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(4)]


def loaded_by_assignment(module: Any, tokens: int) -> Any:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.device("meta"):
        empty = copy.deepcopy(module).to("meta")
    empty.load_state_dict(state, assign=True)
    return empty(inputs(tokens))


CONTEXTS: list[Context] = [
    spectral_norm,
    pruned,
    low_rank,
    trained_by_lbfgs,
    as_a_vector,
    parallel_over_data,
    sequential,
    in_threads,
    loaded_by_assignment,
]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "mask", [pytest.param("causal", marks=pytest.mark.again), "edited", "closed"]
)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_it_is_the_formula(tokens: int, mask: str, context: Context) -> None:
    found, expected = (context(module, tokens) for module in pair(mask, "auto"))
    assert_same(found, expected, tokens)


@pytest.mark.parametrize("mask", ["causal", "edited"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_quantized_for_inference(tokens: int, mask: str) -> None:
    """The layers take int8; a value between two steps may be rounded to either."""
    found: list[Tensor] = []
    contexts: list[Tensor] = []
    for module in pair(mask, "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its next quantization
            quantized = torch.ao.quantization.quantize_dynamic(module.float().eval(), {nn.Linear})
        quantized.out_proj.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
        found.append(quantized(inputs(tokens).float()))
        weight = quantized.out_proj.weight().dequantize()
    span = contexts[0].max().clamp(min=0) - contexts[0].min().clamp(max=0)
    one_step = span / 127 * weight.abs().sum(dim=1).max()  # torch reduces the range to 7 bits
    difference = (found[0] - found[1]).abs().max()
    assert difference <= one_step < found[1].abs().max()
