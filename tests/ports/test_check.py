"""`check_port`: a right port holds, a wrong one is named to the line, and nothing is changed."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import compare
from compare import PortDiffers, PortError, PortReport
from compare.ports.section import page_of

from . import blocks
from .blocks import LinenBlock, NnxBlock, inputs, torch_block

SOURCE = Path(blocks.__file__)


def line_of(mark: str) -> int:
    """The line of the blocks that ends with the mark."""
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return number


def first_lines(report: PortReport) -> tuple[int, int]:
    parted = report.divergence
    assert parted is not None
    return parted.torch_source[0].line, parted.flax_source[0].line


@pytest.mark.parametrize("port", [LinenBlock(), NnxBlock()], ids=["linen", "nnx"])
def test_a_right_port_holds(port: Any) -> None:
    module, given = torch_block(), inputs()
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    report = compare.check_port(module, port, given)
    assert report.held, str(report)
    assert "The port is the same function" in str(report)
    assert 0 < report.ulps < 50
    assert report.slip < 1e-12
    assert report.divergence is None
    assert "keeps the unbiased variance" in report.notes[0]
    checks = {finding.check for finding in report.findings}
    assert checks == {
        *("batch", "checkpoint", "outputs", "gradients", "state", "jit", "outputs in float32")
    }
    assert any(finding.case.endswith(", input 0") for finding in report.findings)
    assert module.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert np.array_equal(given, inputs())


@pytest.mark.parametrize(
    ("port", "torch_mark", "flax_mark", "hint"),
    [
        pytest.param(*case, id=name, marks=() if name == "roll" else pytest.mark.again)
        for name, case in {
            "gelu": (LinenBlock(approximate=True), "TORCH GELU", "FLAX GELU", "another variant"),
            "factor": (LinenBlock(factor=0.5), "TORCH RESIDUAL", "FLAX FACTOR", "times 0.5"),
            "roll": (NnxBlock(shift=1), "TORCH RESIDUAL", "FLAX ROLL", "rolled by 1 along axis 1"),
        }.items()
    ],
)
def test_the_first_lines_that_differ_are_named(
    port: Any, torch_mark: str, flax_mark: str, hint: str
) -> None:
    report = compare.check_port(torch_block(), port, inputs())
    assert not report.held
    assert first_lines(report) == (line_of(torch_mark), line_of(flax_mark)), str(report)
    assert report.divergence is not None
    assert hint in report.divergence.hint
    assert "The outputs part first here:" in str(report)
    assert f"<code>{report.divergence.flax_source[0].code}" in report._repr_html_()
    found = report.as_json()
    assert found["held"] is False
    assert found["divergence"]["flax_source"][0]["file"] == str(SOURCE)


def test_a_momentum_differs_in_the_state_alone() -> None:
    report = compare.check_port(torch_block(), LinenBlock(momentum=0.99), inputs())
    assert {finding.check for finding in report.findings if not finding.held} == {"state"}


def test_an_assertion_has_the_report() -> None:
    compare.assert_port(torch_block(), LinenBlock(), inputs(), dtypes=())
    with pytest.raises(PortDiffers, match="The port differs: "):
        compare.assert_port(torch_block(), LinenBlock(approximate=True), inputs(), dtypes=())


class TorchImages(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        features = self.conv(images) * scale
        return {"features": features, "mean": features.mean((2, 3))}


class FlaxImages(linen.Module):
    @linen.compact
    def __call__(self, images: Any, scale: float = 1.0) -> tuple[Any, Any]:
        features = linen.Conv(4, (3, 3), strides=2, padding=1, name="conv")(images) * scale
        return features, features.mean((1, 2))


def test_other_layouts_and_structures() -> None:
    images = np.random.default_rng(1).standard_normal((2, 3, 8, 6)).astype(np.float32)

    def to_flax(images: Any, scale: float = 1.0) -> Any:
        return (images.transpose(0, 2, 3, 1), scale)

    report = compare.check_port(
        TorchImages(),
        FlaxImages(),
        [(images[:1], 2.0), {"images": images, "scale": 0.5}],
        flax_inputs=to_flax,
        outputs=lambda found: {"features": found[0].transpose(0, 3, 1, 2), "mean": found[1]},
        dtypes=("float32", "bfloat16"),
    )
    assert report.held, str(report)
    assert any("call 1" in finding.case for finding in report.findings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": []}, "inputs is an empty list"),
        ({"torch_module": 3}, "torch_module is of type int; expected a torch module"),
        ({"flax_module": 3}, "flax_module is of type int; expected a Linen module or an NNX"),
        (
            {"outputs": lambda _: (jnp.ones(1), jnp.ones(1))},
            "torch returns one array, and Flax 2 arrays .* pass outp",
        ),
        ({"outputs": lambda _: None}, "the Flax module returns NoneType, in which there is no"),
    ],
)
def test_what_cannot_be_compared(options: dict[str, Any], message: str) -> None:
    given = {"torch_module": torch_block(), "flax_module": LinenBlock(), "inputs": inputs()}
    with pytest.raises(PortError, match=message):
        compare.check_port(**{**given, **options})


def test_a_state_that_does_not_pair_is_an_error_of_the_converter() -> None:
    port = nnx.Linear(blocks.WIDTH, blocks.WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(compare.ConversionError, match=r"compare\.suggest\(torch_module, template"):
        compare.check_port(torch_block(), port, inputs())
    report = compare.check_port(
        torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 8)})["fc"], port, inputs(), dtypes=()
    )
    assert report.held, str(report)


class Dropped(torch.nn.Module):
    def __init__(self, always: bool, rate: float = 0.3) -> None:
        super().__init__()
        self.fc, self.always, self.rate = torch.nn.Linear(4, 4), always, rate

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        is_on = self.training or self.always
        return torch.nn.functional.dropout(self.fc(inputs), self.rate, is_on)


class FlaxDropped(linen.Module):
    rate: float = 0.5
    is_drawn_elsewhere: bool = False

    @linen.compact
    def __call__(self, inputs: Any, deterministic: bool = True) -> Any:
        outputs = linen.Dense(4, name="fc")(inputs)
        if self.is_drawn_elsewhere and not deterministic:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 0.5, outputs.shape)
            return 2 * jnp.where(keep, outputs, 0)
        return linen.Dropout(self.rate)(outputs, deterministic=deterministic)


class NnxDropped(nnx.Module):
    def __init__(self, rate: float) -> None:
        rngs = nnx.Rngs(0)
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.dropout(self.fc(inputs))


@pytest.mark.parametrize("make", [FlaxDropped, pytest.param(NnxDropped, marks=pytest.mark.again)])
def test_dropout_has_the_same_patterns_on_both_sides(make: Any) -> None:
    given = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(Dropped(always=False), make(0.3), given, dtypes=())
    assert report.held, str(report)
    assert any("training" in finding.case for finding in report.findings)
    assert "the same patterns are drawn for both" in report.notes[0]
    assert report.slip < 1e-12
    report = compare.check_port(Dropped(always=False), make(0.4), given, dtypes=())
    assert {one.case.split(", ")[1] for one in report.findings if not one.held} == {"training"}
    assert not compare.check_port(Dropped(always=True), make(0.3), given, dtypes=()).held


class DroppedChannels(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout2d(images, 0.5, self.training)


class FlaxDroppedChannels(linen.Module):
    shared: tuple[int, ...] = (1, 2)

    @linen.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        dropout = linen.Dropout(0.5, broadcast_dims=self.shared, deterministic=not train)
        return dropout(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def test_a_pattern_may_be_shared_along_axes() -> None:
    images = np.random.default_rng(0).standard_normal((4, 6, 3, 3))
    report = compare.check_port(DroppedChannels(), FlaxDroppedChannels(), images, dtypes=())
    assert report.held, str(report)
    assert not compare.check_port(DroppedChannels(), FlaxDroppedChannels(()), images).held


class Noisy(torch.nn.Module):
    """Drops by a pattern that is not of what it drops, or adds noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.noise:
            return inputs + self.noise * torch.randn_like(inputs)
        keep = inputs.new_empty((len(inputs), 1)).bernoulli_(0.5) if self.training else 0.5
        return 2 * inputs.exp() * keep


class Exponential(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        return jnp.exp(inputs)


class TorchList(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs).tanh()
        return inputs


class LinenList(linen.Module):
    order: tuple[int, int] = (0, 1)

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        blocks = [linen.Dense(4, name=f"blocks_{index}") for index in (0, 1)]
        for index in self.order:
            inputs = jnp.tanh(blocks[index](inputs))
        return inputs


def test_names_are_paired_as_proposed() -> None:
    given = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(TorchList(), LinenList(), given, dtypes=())
    assert report.held, str(report)
    note = 'names are paired as compare.suggest proposes: rename={"blocks.*": "blocks_*"}'
    assert note in report.notes
    report = compare.check_port(TorchList(), LinenList((1, 0)), given, dtypes=())
    assert not report.held
    assert note in report.notes
    with pytest.raises(
        compare.ConversionError, match=r"unexpected blocks\.0\.weight .* did you mean"
    ):
        compare.check_port(TorchList(), LinenList(), given, rename={})


class RandomInInference(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        return jnp.exp(inputs) + jax.random.normal(self.make_rng("noise"), inputs.shape)


def test_what_is_random_otherwise_is_not_compared() -> None:
    given = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(Noisy(0.0), Exponential(), given, dtypes=())
    assert report.held, str(report)
    assert "the torch module draws random numbers there that are no" in report.notes[0]
    port = FlaxDropped(is_drawn_elsewhere=True)
    report = compare.check_port(Dropped(always=False), port, given, dtypes=())
    assert report.held, str(report)
    assert "the Flax module draws random numbers there outside of a Dropout" in report.notes[0]
    with pytest.raises(PortError, match="draws random numbers in inference"):
        compare.check_port(Noisy(0.1), Exponential(), given)
    with pytest.raises(PortError, match="the Flax module draws random numbers in inference"):
        compare.check_port(Noisy(0.0), RandomInInference(), given)


def test_a_parameter_of_one_side_alone_is_a_finding() -> None:
    port = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    given = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(torch.nn.Linear(4, 4), port, given, dtypes=())
    assert [one.case for one in report.findings if one.check == "parameters"] == ["bias"]
    assert not report.held


class Masked(torch.nn.Module):
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.register_buffer("mask", torch.triu(torch.ones(3, 3), 1).bool())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scores = (inputs @ inputs.mT).masked_fill(self.mask, -torch.inf)
        return self.fc(torch.softmax(scores, dim=-1) @ inputs)


class FlaxMasked(linen.Module):
    diagonal: int = 0

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        mask = jnp.tril(jnp.ones((3, 3), bool), self.diagonal)
        scores = jnp.where(mask, inputs @ inputs.mT, -jnp.inf)
        return linen.Dense(4, name="fc")(linen.softmax(scores) @ inputs)


def test_a_buffer_that_flax_computes_is_a_note() -> None:
    given = np.random.default_rng(0).standard_normal((2, 3, 4))
    report = compare.check_port(Masked(), FlaxMasked(), given)
    assert report.held, str(report)
    assert report.notes == (
        "one side alone has mask, which is not trained: the other computes it, or lacks it",
    )
    report = compare.check_port(Masked(), FlaxMasked(diagonal=1), given, dtypes=())
    assert report.divergence is not None
    assert "tril" in str(report.divergence), str(report)


def test_a_small_slip_is_seen() -> None:
    slip = 1e-12
    report = compare.check_port(torch_block(), LinenBlock(factor=1 + slip), inputs(), dtypes=())
    failed = {finding.check for finding in report.findings if not finding.held}
    assert {"outputs", "gradients"} <= failed


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.LSTM(4, 3, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.cell(inputs)[0]


class FlaxRecurrent(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        return linen.RNN(linen.OptimizedLSTMCell(3, name="cell"))(inputs)


def test_both_biases_of_torch_have_the_gradient_of_the_one_in_flax() -> None:
    given = np.random.default_rng(0).standard_normal((2, 5, 4))
    report = compare.check_port(Recurrent(), FlaxRecurrent(), given, dtypes=())
    assert report.held, str(report)
    cases = " ".join(finding.case for finding in report.findings if finding.check == "gradients")
    assert "cell.bias_ih_l0" in cases
    assert "cell.bias_hh_l0" in cases


class TorchTwice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def normalized(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs / inputs.pow(2).mean(-1, keepdim=True).sqrt()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.normalized(inputs))
        outputs = inputs + hidden
        ready = self.normalized(outputs)
        return self.second(ready)


def normalized(inputs: Any) -> Any:
    return inputs / jnp.sqrt(jnp.square(inputs).mean(-1, keepdims=True))


class FlaxTwice(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        hidden = linen.Dense(4, name="first")(normalized(inputs))
        outputs = inputs + hidden
        del outputs
        ready = normalized(hidden)
        return linen.Dense(4, name="second")(ready)


def test_a_line_that_was_right_elsewhere_is_innocent() -> None:
    given = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(TorchTwice(), FlaxTwice(), given, dtypes=())
    assert report.divergence is not None
    parted = report.divergence
    assert "ready = self.normalized(outputs)" in [line.code for line in parted.torch_source]
    assert parted.flax_source[0].code == "ready = normalized(hidden)", str(report)


class TorchRows(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in inputs:
            hidden = torch.tanh(self.fc(row))
            scaled = hidden / hidden.abs().sum()
            rows.append(scaled.cumsum(0))
        return torch.stack(rows)


class FlaxRows(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        def one(hidden: Any) -> Any:
            scaled = hidden / jnp.abs(hidden).max()
            return jnp.cumsum(scaled)

        return jax.vmap(one)(jnp.tanh(linen.Dense(4, name="fc")(inputs)))


def test_a_loop_against_vmap() -> None:
    given = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(TorchRows(), FlaxRows(), given, dtypes=())
    assert report.divergence is not None
    parted = report.divergence
    assert parted.torch_source[0].code == "scaled = hidden / hidden.abs().sum()", str(report)
    assert parted.flax_source[0].code == "scaled = hidden / jnp.abs(hidden).max()", str(report)


def test_the_lines_of_both_runs_lie_side_by_side() -> None:
    report = compare.check_port(torch_block(), LinenBlock(factor=0.5), inputs(), dtypes=())
    assert report.divergence is not None
    steps = report.divergence.steps
    parts = [step for step in steps if not step.is_equal]
    assert [step.is_equal for step in steps] == [True] * (len(steps) - len(parts)) + [False] * len(
        parts
    )
    assert parts[0].torch is not None
    assert "TORCH RESIDUAL" in parts[0].torch.code
    assert parts[-1].error is not None
    assert parts[-1].error > 1e-3
    for step in steps[: -len(parts)]:
        assert step.torch is not None
        assert step.flax is not None
    page = page_of(report, "block")
    assert "The lines of both runs side by side" in page
    assert "<svg" in page
    assert not re.search(r"(src|href)=.?https?:", page), "the page needs a network"
    shown = report._repr_html_()
    assert shown.count("#d8f0d8") == len(steps) - len(parts)
    assert shown.count("#f8d8d0") == len(parts)
    assert len(report.as_json()["divergence"]["steps"]) == len(steps)
