"""Our module compiled, exported, traced, without values, and under the eyes of hooks."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as hooks_of_modules
from torch.utils.flop_counter import FlopCounterMode

import torch_impl
from torch_impl.operator import masked_attention_operator, operator_attention

from .test_torch_transforms import gradients
from .torch_formula import (
    CONTEXT_LENGTH,
    FEATURES,
    LENGTHS,
    assert_same,
    inputs,
    masks,
    ours,
    pair,
)

SHORT, LONG = LENGTHS


class Count:
    """A backend that runs the graph as it is, counts the graphs and keeps their text."""

    def __init__(self) -> None:
        self.graphs = 0
        self.text = ""

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.graphs += 1
        self.text += graph.code
        return graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compilers, about themselves
        yield


@pytest.mark.parametrize(
    "mask",
    ["edited", *(pytest.param(name, marks=pytest.mark.again) for name in ("causal", "closed"))],
)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_compiled_with_gradients(tokens: int, mask: str) -> None:
    module, formula = pair(mask, "auto")
    given = inputs(tokens)
    with quiet():
        compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
        for is_edited in (False, True):
            outputs = compiled(given)
            expected = formula(given)
            assert_same(
                (outputs, gradients(module, outputs)),
                (expected, gradients(formula, expected)),
                tokens,
            )
            if not is_edited:
                for each in (module, formula):
                    each.get_buffer("mask")[60:, 5] = 1.0


def test_an_edit_between_the_passes_of_a_compiled_module() -> None:
    module, formula = pair("edited", "auto")
    given = inputs(LONG)
    with quiet():
        compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
        found = []
        for each, call in ((module, compiled), (formula, formula)):
            outputs = call(given)
            with torch.no_grad():
                each.get_buffer("mask")[70, 2] = 1.0
            found.append(gradients(each, outputs))
    assert_same(found[0], found[1], LONG)


def test_as_many_graphs_as_the_formula() -> None:
    graphs = []
    for module in pair("causal", "auto"):
        count = Count()
        compiled: Any = torch.compile(module, backend=count)
        for tokens in (20, 60, SHORT, LONG, 200):
            with torch.no_grad(), quiet():
                assert_same(compiled(inputs(tokens)), module(inputs(tokens)), tokens)
        graphs.append(count.graphs)
        assert ("torch_impl.masked_attention" in count.text) == (len(graphs) == 1)
    assert graphs[0] == graphs[1] == 2, "one for the first length, one for any length"


def test_a_dimension_that_is_marked_as_dynamic() -> None:
    module = pair("causal", "auto")[0]
    given = inputs(20)
    torch._dynamo.mark_dynamic(given, 1, min=2, max=CONTEXT_LENGTH - 1)
    compiled: Any = torch.compile(module, backend=Count(), fullgraph=True)
    with torch.no_grad(), quiet():
        assert_same(compiled(given), module(given), 20)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.again)])
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param({1: Dim("tokens", min=2, max=CONTEXT_LENGTH - 1)}, marks=pytest.mark.again),
        {1: Dim.AUTO},
        {0: Dim("batch", min=2, max=9), 1: Dim("tokens", min=2, max=CONTEXT_LENGTH - 1)},
        pytest.param({1: Dim.DYNAMIC}, marks=pytest.mark.again),
    ],
    ids=["tokens", "AUTO", "batch and tokens", "DYNAMIC"],
)
def test_exported_for_any_number_of_tokens(shapes: Any, strict: bool) -> None:
    module, formula = pair("edited", "auto")
    with quiet():
        exported = torch.export.export(
            module.eval(), (inputs(20),), dynamic_shapes=(shapes,), strict=strict
        ).module()
        for tokens in (20, SHORT, LONG, 254):
            assert_same(exported(inputs(tokens)), formula(inputs(tokens)), tokens)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_into_a_graph(mode: Any, tokens: int) -> None:
    module, formula = pair("edited", "auto")
    state = {**dict(module.named_parameters()), "mask": module.mask}

    def call(state: dict[str, Any], given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, state, (given,))

    graph = make_fx(call, tracing_mode=mode)(state, inputs(tokens))
    assert_same(graph(state, inputs(tokens)), formula(inputs(tokens)), tokens)


def test_traced_by_jit_and_run_at_another_length() -> None:
    module, formula = pair("edited", "auto")
    with quiet():
        traced: Any = torch.jit.trace(module, (inputs(LONG),), check_trace=False)
        assert_same(traced(inputs(LONG)), formula(inputs(LONG)), LONG)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_without_values(tokens: int) -> None:
    with torch.device("meta"):
        outputs = ours()(torch.rand(2, tokens, FEATURES))
    assert outputs.is_meta and outputs.shape == (2, tokens, 8)
    with FakeTensorMode():
        assert ours()(torch.rand(2, tokens, FEATURES)).shape == (2, tokens, 8)


def forward_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_forward_hook(lambda *_: seen.append("hook"))


def forward_pre_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_forward_pre_hook(lambda *_: seen.append("hook"))


def backward_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_full_backward_hook(lambda *_: seen.append("hook"))


def backward_pre_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_full_backward_pre_hook(lambda *_: seen.append("hook"))


def another_forward(module: nn.Module, seen: list[str]) -> None:
    forward = module.forward
    module.forward = lambda weights: seen.append("hook") or forward(weights)  # type: ignore[func-returns-value]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(
    "listen", [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, another_forward]
)
def test_idle_dropout_is_still_there(
    listen: Callable[[nn.Module, list[str]], None], tokens: int
) -> None:
    module = pair("causal", "auto")[0]
    seen: list[str] = []
    listen(module.get_submodule("dropout"), seen)
    module(inputs(tokens).requires_grad_()).sum().backward()
    assert seen == ["hook"]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_hook_of_all_modules_sees_the_same_modules(tokens: int) -> None:
    calls: list[list[str]] = []
    for module in pair("causal", "auto"):
        seen: list[str] = []
        handle = hooks_of_modules.register_module_forward_hook(
            lambda each, *_, seen=seen: seen.append(type(each).__name__)
        )
        module(inputs(tokens))
        handle.remove()
        calls.append(seen[:-1])  # the last one is the attention itself
    assert calls[0] == calls[1]
    assert "Dropout" in calls[0]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_same_operations_are_counted(tokens: int) -> None:
    counts = []
    for module in pair("edited", "auto"):
        with FlopCounterMode(display=False) as counter:
            module(inputs(tokens)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("tokens", LENGTHS)
def test_autocast(tokens: int, mask: str, dtype: torch.dtype) -> None:
    """Judged against float64, in units of the dtype's rounding: the weights of a row sum to 1."""
    module, formula = (each.float() for each in pair(mask, "auto"))
    exact = pair(mask, "reference")[1]
    given = inputs(tokens)
    expected = exact(given)
    with torch.autocast("cpu", dtype):
        found, theirs = (each(given.float()) for each in (module, formula))
    assert found.dtype == theirs.dtype == dtype
    for outputs in (found, theirs):
        assert torch.equal(outputs.isnan(), expected.isnan())
        error = (outputs.double() - expected).nan_to_num().abs().max()
        # Three roundings of inputs, projections and weights, in sums of 8 and fewer terms.
        assert error <= 64 * torch.finfo(dtype).eps * expected.nan_to_num().abs().max()
    found.sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in module.parameters())


def test_autocast_leaves_float64_alone() -> None:
    queries, keys, values = torch.randn(3, 1, LONG, 4, dtype=torch.float64)
    mask = masks()["edited"]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = torch_impl.masked_attention(queries, keys, values, mask)
    assert_same(outputs, torch_impl.reference_attention(queries, keys, values, mask), LONG)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_heads_are_split_by_their_width(tokens: int) -> None:
    """A projection that has some of the heads, as in tensor parallelism, has whole heads."""
    module = torch_impl.CausalMultiHeadAttention(6, 8, 256, 0.0, 2).double()
    given = inputs(tokens)
    whole = module(given)
    parts = []
    for heads in (slice(0, 4), slice(4, 8)):
        first = copy.deepcopy(module)
        for name in ("W_query", "W_key", "W_value"):
            layer = first.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight[heads].detach())  # type: ignore[index]
        first.out_proj.weight = nn.Parameter(module.out_proj.weight[:, heads].detach())
        parts.append(first(given) - first.out_proj.bias)
    assert_same(parts[0] + parts[1] + module.out_proj.bias, whole, tokens)


def test_a_mask_that_is_open_or_has_closed_rows_in_an_operator() -> None:
    """Every kind of layout, and what is not finite, in the compiled program's operator."""
    for mask in (torch.zeros(256, 256), *masks().values(), torch.ones(256, 256)):
        for value in (1.0, torch.inf, torch.nan):
            heads = [inputs(LONG)[0, :, :4].clone().requires_grad_() for _ in range(3)]
            with torch.no_grad():
                heads[2][3, 1] = value
            attend: list[Any] = [operator_attention, torch_impl.reference_attention]
            outputs = [each(*heads, mask) for each in attend]
            grads = [torch.autograd.grad(each.sum(), heads) for each in outputs]
            assert_same((outputs[0], grads[0]), (outputs[1], grads[1]), LONG)


def test_the_operators_pass_torchs_own_checks() -> None:
    heads = [inputs(LONG)[0, :, :4].clone().requires_grad_() for _ in range(3)]
    for name in ("causal", "edited"):  # the checks do not take NaN for equal
        torch.library.opcheck(
            masked_attention_operator, (*heads, masks()[name]), atol=1e-12, rtol=1e-12
        )


@pytest.mark.parametrize(
    ("where", "taken"),
    [
        ("eager", "fused"),
        ("autocast", "fused"),
        ("vmap", "operator"),
        ("per sample", "operator"),
        ("jvp", None),
        ("counted", None),
        ("hooked", None),
        ("dropped", None),
    ],
)
def test_who_computes_it(where: str, taken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pair("edited", "auto")[0].float()
    calls: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    for name in ("fused", "operator"):
        function = getattr(torch_impl.dispatch, f"{name}_attention")
        monkeypatch.setattr(torch_impl.dispatch, f"{name}_attention", recorded(name, function))
    given = inputs(LONG).float()
    if where == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            module(given)
    elif where == "vmap":
        torch.vmap(lambda one: module(one[None]))(given)
    elif where == "per sample":
        torch.vmap(torch.func.grad(lambda one: module(one[None]).sum()))(given)
    elif where == "jvp":
        with quiet():
            torch.func.jvp(module, (given,), (given,))
    elif where == "counted":
        with FlopCounterMode(display=False):
            module(given)
    else:
        module.dropout.p = 0.1 if where == "dropped" else 0.0
        if where == "hooked":
            module.dropout.register_forward_hook(lambda *_: None)
        module(given)
    assert calls == ([taken] if taken else [])
