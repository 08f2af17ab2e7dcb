"""Our module wrapped, rewritten, trained and shared as other programs do, beside the formula."""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import checkpoint

from .torch_formula import FEATURES, LENGTHS, WIDTH, assert_same, inputs, masks, pair

Context = Callable[[Any, int], Any]


def loss(module: Any, tokens: int) -> Tensor:
    return module(inputs(tokens)).nan_to_num().square().sum()


def passes(module: Any, tokens: int) -> Any:
    """The outputs, and the gradients of every parameter that is trained."""
    outputs = module(inputs(tokens))
    trained = [each for each in module.parameters() if each.requires_grad]
    return outputs, torch.autograd.grad(outputs.nan_to_num().square().sum(), trained)


def trained(module: Any, optimizer: torch.optim.Optimizer, tokens: int, steps: int) -> Any:
    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(module, tokens)
        value.backward()
        return value

    values = [optimizer.step(closure) for _ in range(steps)]
    return values, [parameter.detach() for parameter in module.parameters()]


def spectral_norm(module: Any, tokens: int) -> Any:
    torch.manual_seed(1)
    parametrizations.spectral_norm(module.W_query)
    parametrizations.spectral_norm(module.out_proj)
    return passes(module, tokens), module.eval()(inputs(tokens))


def weight_norm(module: Any, tokens: int) -> Any:
    parametrizations.weight_norm(module.W_value)
    parametrizations.weight_norm(module.out_proj)
    found = passes(module, tokens)
    parametrize.remove_parametrizations(module.out_proj, "weight")
    return found, module(inputs(tokens))


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


def frozen_but_for_one_layer(module: Any, tokens: int) -> Any:
    module.requires_grad_(False).W_key.requires_grad_(True)
    loss(module, tokens).backward()
    return [each.grad for each in module.parameters() if each.grad is not None]


def trained_by_lbfgs(module: Any, tokens: int) -> Any:
    return trained(module, torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2), tokens, 1)


def trained_by_adamw(module: Any, tokens: int) -> Any:
    return trained(module, torch.optim.AdamW(module.parameters(), lr=1e-3), tokens, 2)


def averaged(module: Any, tokens: int) -> Any:
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    module.mask = masks()["edited"].double()
    with torch.no_grad():
        module.W_query.weight.mul_(2.0)
    average.update_parameters(module)
    average.update_parameters(module)
    return average.module.mask, average(inputs(tokens))


def as_a_vector(module: Any, tokens: int) -> Any:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 2.0, module.parameters())
    return vector, module(inputs(tokens))


def checkpointed(module: Any, tokens: int) -> Any:
    found = []
    for use_reentrant in (False, True):
        given = inputs(tokens).requires_grad_()
        out = checkpoint.checkpoint(module, given, use_reentrant=use_reentrant)
        out.nan_to_num().square().sum().backward()
        found += [out, given.grad]
    return found


def offloaded(module: Any, tokens: int) -> Any:
    with torch.autograd.graph.save_on_cpu(), _anomalies():
        loss(module, tokens).backward()
    return [each.grad for each in module.parameters()]


def _anomalies() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        return torch.autograd.detect_anomaly(check_nan=False)


def with_another_mask(module: Any, tokens: int) -> Any:
    return torch.func.functional_call(module, {"mask": masks()["edited"]}, (inputs(tokens),))


def parallel_over_data(module: Any, tokens: int) -> Any:
    return nn.DataParallel(module)(inputs(tokens))


def copied(module: Any, tokens: int) -> Any:
    module(inputs(tokens))  # what is cached must not be copied as if it were the copy's
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ]
    for each in copies:
        each.mask[tokens // 2 :, 1] = 1.0
    return [each(inputs(tokens)) for each in (*copies, module)]


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


def deterministic(module: Any, tokens: int) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return passes(module, tokens)
    finally:
        torch.use_deterministic_algorithms(False)


def loaded_by_assignment(module: Any, tokens: int) -> Any:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.device("meta"):
        empty = copy.deepcopy(module).to("meta")
    empty.load_state_dict(state, assign=True)
    return empty(inputs(tokens))


CONTEXTS: list[Context] = [
    spectral_norm,
    weight_norm,
    pruned,
    low_rank,
    frozen_but_for_one_layer,
    trained_by_lbfgs,
    trained_by_adamw,
    averaged,
    as_a_vector,
    checkpointed,
    offloaded,
    with_another_mask,
    parallel_over_data,
    copied,
    sequential,
    in_threads,
    deterministic,
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
