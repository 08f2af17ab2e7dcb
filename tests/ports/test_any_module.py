"""Modules of all kinds are judged, or refused with what to do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import compare
from compare import PortError, PortReport

GIVEN = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)


class Torch(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function = torch.nn.Linear(4, 4), function

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.function(self.fc, inputs)


class Flax(linen.Module):
    function: Callable[..., Any]

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        return self.function(linen.Dense(4, name="fc"), inputs)


def check(ours: Callable[..., Any], theirs: Callable[..., Any] | None = None) -> PortReport:
    return compare.check_port(Torch(ours), Flax(theirs or ours), GIVEN, dtypes=())


def plain(fc: Any, inputs: Any) -> Any:
    return fc(inputs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda fc, x: torch.fft.fft(fc(x)), lambda fc, x: jnp.fft.fft(fc(x))),
        (lambda fc, x: fc(x.mul_(2)), lambda fc, x: fc(x * 2)),
        (lambda fc, x: torch.log(x + fc(x)), lambda fc, x: jnp.log(x + fc(x))),  # NaN on both
        (lambda fc, x: {"a": fc(x)}, plain),
        (
            lambda fc, x: fc(x).masked_fill(x > 0, torch.finfo(x.dtype).min).softmax(-1),
            lambda fc, x: jax.nn.softmax(jnp.where(x > 0, jnp.finfo(x.dtype).min, fc(x))),
        ),
        (
            lambda fc, x: torch.tanh(19.08 + 0.01 * torch.tanh(fc(x))),
            lambda fc, x: jnp.tanh(19.08 + 0.01 * jnp.tanh(fc(x))),
        ),
        (
            lambda fc, x: fc(x) * (torch.arange(4.0) / 2 % 1 == 0),  # whole numbers are exact
            lambda fc, x: fc(x) * (jnp.arange(4.0) / 2 % 1 == 0),
        ),
    ],
    ids=[
        "complex",
        "in place",
        "nan",
        "one array in a dict",
        "the smallest number behind a mask",
        "saturated",
        "numbers that are asked for equality",
    ],
)
def test_what_holds(ours: Any, theirs: Any) -> None:
    report = check(ours, theirs)
    assert report.held, str(report)
    assert report.slip < 1e-12


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (plain, lambda fc, x: fc(x).T, r"the shape is \(4, 2\) in Flax and \(2, 4\) in torch"),
        (
            lambda fc, x: fc(x) > 0,
            lambda fc, x: (fc(x) > 0) * 1,
            "the dtype is int.* and bool in t",
        ),
        (lambda fc, x: torch.fft.fft(fc(x)), lambda fc, x: jnp.fft.fft(fc(x)).conj(), "expected"),
        (
            lambda fc, x: fc(x) + (fc(x) - fc(x) * 0.1 * 10 == 0),
            lambda fc, x: fc(x) + (fc(x) - fc(x) * 0.1 * 10 == 0),
            "give inputs without ties",
        ),
    ],
    ids=["shape", "dtype", "imaginary parts", "a jump"],
)
def test_what_differs(ours: Any, theirs: Any, message: str) -> None:
    report = check(ours, theirs)
    assert not report.held
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(report))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (lambda fc, x: fc(x[:, :3]), plain, r"torch module raised RuntimeError at test_any_module"),
        (plain, lambda fc, x: fc(x) + jnp.ones(7), "the Flax module raised ValueError at test_any"),
        (plain, lambda fc, x: 2 * fc(x) if x.sum() > 0 else fc(x), "use jnp.where or jax.lax.cond"),
        (lambda fc, x: (fc(x), x), lambda fc, x: {"a": fc(x), "b": x}, "pass outputs="),
    ],
    ids=["torch raises", "flax raises", "control flow", "structure"],
)
def test_what_is_refused(ours: Any, theirs: Any, message: str) -> None:
    with pytest.raises(PortError, match=message):
        check(ours, theirs)


@pytest.mark.parametrize("given", [np.full((2, 4), np.nan), np.zeros((0, 4))])
def test_outputs_that_show_nothing_do_not_hold(given: np.ndarray) -> None:
    report = compare.check_port(Torch(plain), Flax(plain), given, dtypes=())
    assert not report.held
    assert "torch returns no finite number, so that agreement would show nothing" in str(report)
    assert report.divergence is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ["int32"]}, "dtypes is .*; expected names among float32, bfloat16, float16"),
        ({"method": "nope"}, "Torch has no method 'nope'"),
        ({"renme": {}}, "there is no argument renme"),
        ({"train": 3}, "train is 3; expected keywords"),
        ({"method": 3}, "Torch has no method 3"),
        ({"flax_inputs": 3}, "flax_inputs is 3; expected a function"),
        ({"outputs": []}, "expected a function of what Flax returns, or two functions"),
        ({"outputs": "ab"}, "outputs is 'ab'; expected a function"),
        ({"outputs": (lambda raw: raw.nope, None)}, "has no attribute 'nope'"),
        ({"inputs": torch.ones(2, 4, device="meta")}, "the input: a meta tensor has no values"),
        ({"inputs": (np.array([None]),)}, "input 0 has dtype object: give numbers"),
    ],
)
def test_arguments_of_other_kinds_are_named(options: dict[str, Any], message: str) -> None:
    given = {"inputs": GIVEN} | options
    with pytest.raises(PortError, match=message):
        compare.check_port(Torch(plain), Flax(plain), **given)
    assert compare.check_port(Torch(plain), Flax(plain), GIVEN, dtypes="float16").held


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(mode: Any) -> None:
    with mode():
        assert compare.check_port(Torch(plain), Flax(plain), GIVEN, dtypes=()).held
        assert not torch.is_grad_enabled()


def test_a_compiled_module_is_taken_and_one_without_data_refused() -> None:
    compiled: Any = torch.compile(Torch(plain), backend="eager")
    assert compare.check_port(compiled, Flax(plain), GIVEN, dtypes=()).held
    with pytest.raises(PortError, match="on the meta device, without data"):
        compare.check_port(Torch(plain).to("meta"), Flax(plain), GIVEN)


class Words(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


class NnxWords(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(11, 4, rngs=nnx.Rngs(0))

    def __call__(self, ids: Any) -> jax.Array:
        return self.embed(ids)


def test_a_layer_that_keeps_its_dtype_works_in_float64() -> None:
    ids = np.array([[0, 3, 10]])
    report = compare.check_port(Words(), NnxWords(), ids)
    assert report.held, str(report)
    assert report.ulps == 0


class Averaged(torch.nn.Module):
    usage: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usage", torch.rand(64, generator=torch.Generator().manual_seed(0)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.usage.mul_(0.9).add_(0.05).mul_(1.1)
        return inputs.exp()


class FlaxAveraged(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any, train: bool = False) -> Any:
        usage = self.variable("buffers", "usage", jnp.zeros, (64,))
        if train:
            usage.value = 0.99 * usage.value + 0.055
        return jnp.exp(inputs)


def test_what_is_written_in_place_may_round_otherwise() -> None:
    report = compare.check_port(Averaged(), FlaxAveraged(), GIVEN, dtypes=())
    assert report.held, str(report)
    assert any("training, usage" in one.case for one in report.findings), str(report)


class TorchTable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(inputs) * torch.arange(1.0, 5.0, dtype=inputs.dtype)


class FlaxTable(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        table = self.variable("constants", "table", lambda: jnp.arange(1.0, 5.0))
        return linen.Dense(4, name="fc")(inputs) * table.value


def test_what_flax_alone_has_keeps_the_value_that_it_is_made_with() -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(TorchTable(), FlaxTable(), inputs, dtypes=())
    assert report.held, str(report)
    assert "one side alone has constants/table" in str(report)
