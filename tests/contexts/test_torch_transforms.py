"""Our module in what PyTorch does to a module, beside the formula: the values are the same."""

import copy
import io
import pickle
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state
from torch.utils.checkpoint import checkpoint

from torch_impl.dispatch import MIN_FUSED_TOKENS

from .torch_formula import CONTEXT_LENGTH, LENGTHS, assert_same, inputs, masks, pair

Context = Callable[[Any, Tensor], Any]


def gradients(module: nn.Module, outputs: Tensor) -> list[Tensor]:
    parameters = [each for each in module.parameters() if each.requires_grad]
    return list(torch.autograd.grad(outputs.square().sum(), parameters))


def train(module: Any, given: Tensor) -> Any:
    outputs = module(given)
    return outputs, gradients(module, outputs)


def without_gradients(module: Any, given: Tensor) -> Any:
    with torch.no_grad():
        return module(given)


def infer_edit_train(module: Any, given: Tensor) -> Any:
    with torch.inference_mode():
        first = module(given).clone()
        module.mask[60:, 5] = 1.0
    return first, train(module, given)


def a_mask_of_inference(module: Any, given: Tensor) -> Any:
    with torch.inference_mode():
        module.mask = module.mask.clone()
        module(given)
    return train(module, given)


def checkpointed(module: Any, given: Tensor) -> Any:
    given = given.requires_grad_()
    results = []
    for is_reentrant in (True, False):
        outputs = checkpoint(module, given, use_reentrant=is_reentrant)
        outputs.square().sum().backward()
        results.append(outputs)
    return results, given.grad


def with_another_mask(module: Any, given: Tensor) -> Any:
    outputs = functional_call(module, {"mask": masks()["edited"].double()}, (given,))
    return outputs, gradients(module, outputs), module(given)


def saved_on_the_cpu(module: Any, given: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return train(module, given)


def with_anomaly_detection(module: Any, given: Tensor) -> Any:
    if module(given).isnan().any():  # which it would refuse, in both
        return given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        with torch.autograd.detect_anomaly():
            return train(module, given)


def deterministic(module: Any, given: Tensor) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return train(module, given)
    finally:
        torch.use_deterministic_algorithms(False)


def partly_frozen(module: Any, given: Tensor) -> Any:
    for name in ("W_query", "out_proj"):
        module.get_submodule(name).requires_grad_(False)
    return train(module, given)


def expanded_and_strided(module: Any, given: Tensor) -> Any:
    return [
        train(module, given[:1].expand(3, -1, -1)),
        train(module, given.mT.contiguous().mT),
        train(module, given.flip(0)[::2]),
        train(module, given[:0]),
        module(given[:, :0]),
    ]


def copied(module: Any, given: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(torch.load(file), assign=True)
    return [train(each, given) for each in (loaded, pickle.loads(pickle.dumps(module)))]


def mapped(module: Any, given: Tensor) -> Any:
    many = torch.stack([given, given.flip(1), given + 1], dim=2)
    outputs = torch.vmap(module, in_dims=2, out_dims=1)(many)
    return outputs, gradients(module, outputs)


def mapped_twice(module: Any, given: Tensor) -> Any:
    many = torch.stack([torch.stack([given, given + 1]), torch.stack([given.flip(1), given - 1])])
    return torch.vmap(torch.vmap(module))(many)


def an_ensemble(module: Any, given: Tensor) -> Any:
    members = [module, copy.deepcopy(module), copy.deepcopy(module)]
    for member, mask in zip(members[1:], masks().values(), strict=False):
        member.mask = mask.double()
    parameters, buffers = stack_module_state(members)

    def call(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(members[0], (parameters, buffers), (given,))

    outputs = torch.vmap(call)(parameters, buffers)
    return outputs, torch.autograd.grad(outputs.square().sum(), list(parameters.values()))


def gradients_per_sample(module: Any, given: Tensor) -> Any:
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],)).square().sum()

    return torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, given)


def pushed_forward(module: Any, given: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            dual = module(forward_ad.make_dual(given, given.flip(0)))
            first = forward_ad.unpack_dual(dual).tangent
        return first, torch.func.jvp(module, (given,), (given.flip(0),))


def linearized(module: Any, given: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the names in torch's own graph
        outputs, push = torch.func.linearize(module, given)
        return outputs, push(given.flip(0))


def pulled_back(module: Any, given: Tensor) -> Any:
    outputs, pull = torch.func.vjp(module, given)  # type: ignore[misc]
    return outputs, pull(outputs.detach().nan_to_num())


def second_derivatives(module: Any, given: Tensor) -> Any:
    def loss(given: Tensor) -> Tensor:
        return module(given).square().sum()

    along = given.flip(0)
    return [
        torch.autograd.functional.hvp(loss, given, along)[1],
        torch.autograd.functional.vhp(loss, given, along)[1],
        torch.func.jvp(torch.func.grad(loss), (given,), (along,))[1],
        torch.func.grad(lambda at: (torch.func.grad(loss)(at) * along).sum())(given),
    ]


def jacobians(module: Any, given: Tensor) -> Any:
    def last(given: Tensor) -> Tensor:
        return module(given)[:, -1, 0]

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # torch has no batching rule for one of its own
        return [
            torch.autograd.functional.jacobian(last, given, vectorize=True),
            torch.func.jacrev(last)(given),
            torch.func.jacfwd(lambda at: last(torch.cat([given[:, :-1], at], dim=1)))(
                given[:, -1:]
            ),
        ]


def a_batch_of_gradients(module: Any, given: Tensor) -> Any:
    outputs = module(given.requires_grad_())
    cotangents = torch.stack([torch.ones_like(outputs), outputs.detach().nan_to_num()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.autograd.grad(outputs, given, cotangents, is_grads_batched=True)


def edited_before_backward(module: Any, given: Tensor) -> Any:
    results = []
    for edit in ("in place", "data", "NumPy"):
        outputs = module(given)
        with torch.no_grad():
            if edit == "in place":
                module.mask[70, 2] = 1.0
            elif edit == "data":
                module.mask.data[71, 2] = 1.0
            else:
                module.mask.numpy()[72, 2] = 1.0
        results.append(gradients(module, outputs))
    return results, module(given)


def edited_by_a_thread(module: Any, given: Tensor) -> Any:
    outputs = module(given)
    thread = threading.Thread(target=lambda: module.mask.fill_(0.0))
    thread.start()
    thread.join()
    return gradients(module, outputs), module(given)


def two_entries_swapped(module: Any, given: Tensor) -> Any:
    before = module(given)
    module.mask.numpy()[60, [58, 70]] = module.mask.numpy()[60, [70, 58]]
    return before, module(given)


def with_normed_weights(module: Any, given: Tensor) -> Any:
    for name in ("W_query", "out_proj"):
        nn.utils.parametrizations.weight_norm(module.get_submodule(name))
    return train(module, given)


def averaged(module: Any, given: Tensor) -> Any:
    model = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    with torch.no_grad():
        module.mask[80, 1] = 1.0
    model.update_parameters(module)
    model.update_parameters(module)
    return model(given)


def stepped(module: Any, given: Tensor) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        module(given).nansum().backward()
        optimizer.step()
    return list(module.parameters())


CONTEXTS: list[Context] = [
    train,
    without_gradients,
    infer_edit_train,
    a_mask_of_inference,
    checkpointed,
    with_another_mask,
    saved_on_the_cpu,
    with_anomaly_detection,
    deterministic,
    partly_frozen,
    expanded_and_strided,
    copied,
    mapped,
    mapped_twice,
    an_ensemble,
    gradients_per_sample,
    pushed_forward,
    linearized,
    pulled_back,
    second_derivatives,
    jacobians,
    a_batch_of_gradients,
    edited_before_backward,
    edited_by_a_thread,
    two_entries_swapped,
    with_normed_weights,
    averaged,
    stepped,
]
CASES = [
    pytest.param(
        implementation,
        tokens,
        mask,
        marks=()
        if (implementation, tokens, mask) == ("auto", LENGTHS[1], "edited")
        else pytest.mark.again,
    )
    for implementation in ("auto", "fused")
    for tokens in LENGTHS
    for mask in ("causal", "edited", "closed")
]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda each: each.__name__)
@pytest.mark.parametrize(("implementation", "tokens", "mask"), CASES)
def test_it_is_the_formula(implementation: Any, tokens: int, mask: str, context: Context) -> None:
    found, expected = (context(module, inputs(tokens)) for module in pair(mask, implementation))
    assert_same(found, expected, tokens)


@pytest.mark.again
@pytest.mark.parametrize("seed", range(100))
def test_it_is_the_formula_at_drawn_lengths(seed: int) -> None:
    draw = random.Random(seed)
    context, mask = draw.choice(CONTEXTS), draw.choice([*masks()])
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's forward mode, about itself
    implementation: Any = draw.choice(["auto", "fused"])
    limit = draw.choice([1, 8, 64, MIN_FUSED_TOKENS, 192, CONTEXT_LENGTH])
    tokens = min(max(1, limit + draw.randint(-2, 2)), CONTEXT_LENGTH)
    found, expected = (context(module, inputs(tokens)) for module in pair(mask, implementation))
    assert_same(found, expected, tokens)


def test_gradients_of_gradients_are_checked_by_torch() -> None:
    module = pair("edited", "fused")[0]
    given = inputs(4, 1).requires_grad_()
    assert torch.autograd.gradcheck(module, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(module, given)
