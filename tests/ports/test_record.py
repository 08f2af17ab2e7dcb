"""Records: a torch module is run in one environment, and its port is judged in another."""

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import linen
from safetensors.numpy import load_file, save_file

import compare
from compare.conversion.errors import ConversionError
from compare.files.errors import FileError
from compare.ports.record_file import RecordFile, _checksum
from compare.ports.recorded import RecordedReference
from compare.ports.reference import DRAWN, GIVEN, Case
from compare.ports.sketch import MAX_ENTRIES, sketched

from .blocks import LinenBlock, NnxBlock, inputs, torch_block

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Blocker())
"""
TORCH = """
import numpy as np, torch, compare


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)
        self.drop, self.out = torch.nn.Dropout(0.3), torch.nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor([1.5, 2.0]).repeat(3))

    def forward(self, inputs):
        hidden = torch.nn.functional.gelu(self.norm(self.fc(inputs)))
        return self.out(self.drop(hidden)) * self.scale


inputs = np.random.default_rng(0).standard_normal((5, 4)).astype("float32")
compare.record("net.safetensors", Net(), inputs)
compare.record("conv.safetensors", torch.nn.Conv2d(2, 2, 2), np.ones((1, 2, 3, 3), "float32"))
"""
FLAX = """
import compare, jax.numpy as jnp
from flax import linen as nn


class Net(nn.Module):
    approximate: bool

    @nn.compact
    def __call__(self, inputs, train=False):
        scale = self.variable("buffers", "scale", jnp.ones, 6)
        hidden = nn.Dense(6, name="fc")(inputs)
        hidden = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm")(hidden)
        hidden = nn.gelu(hidden, approximate=self.approximate)
        hidden = nn.Dropout(0.3, deterministic=not train)(hidden)
        return nn.Dense(6, name="out")(hidden) * scale.value


compare.assert_port("net.safetensors", Net(False))
compare.assert_port(
    "conv.safetensors",
    nn.Conv(2, (2, 2), padding="VALID"),
    flax_inputs=lambda images: images.transpose(0, 2, 3, 1),
    outputs=lambda images: images.transpose(0, 3, 1, 2),
)
report = compare.check_port("net.safetensors", Net(True))
print(report.divergence.torch_source[0].code)
print(report.divergence.flax_source[0].code)
"""


def alone(script: str, blocked: set[str], folder: Path) -> str:
    """Return what a script prints where these packages are not installed."""
    file = folder / "script.py"
    file.write_text(script, encoding="utf-8")
    start = f"{BLOCKED.format(blocked=blocked)}\nimport runpy\nrunpy.run_path('script.py')\n"
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_each_half_needs_its_own_framework_alone(tmp_path: Path) -> None:
    others = {"isal", "matplotlib", "optax", "orbax", "tensorstore"}
    alone(TORCH, {"jax", "jaxlib", "flax", "msgpack", "scipy", *others}, tmp_path)
    assert alone(FLAX, {"torch", "isal", "jinja2", "matplotlib"}, tmp_path).splitlines() == [
        "hidden = torch.nn.functional.gelu(self.norm(self.fc(inputs)))",
        "hidden = nn.gelu(hidden, approximate=self.approximate)",
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "block.safetensors"
    return compare.record(path, torch_block(), inputs())


@pytest.mark.parametrize("port", [LinenBlock(), NnxBlock()], ids=["linen", "nnx"])
def test_a_right_port_holds(port: Any, recorded: Path) -> None:
    report = compare.check_port(recorded, port)
    assert report.held, str(report)
    assert 0 < report.slip < 1e-12
    assert {finding.check for finding in report.findings} == {
        *("batch", "outputs", "gradients", "state", "jit", "outputs in float32")
    }


@pytest.mark.slow
def test_the_lines_are_those_of_the_module(recorded: Path) -> None:
    port = LinenBlock(factor=0.5)
    live = compare.check_port(torch_block(), port, inputs()).divergence
    with pytest.raises(compare.PortDiffers):
        compare.assert_port(recorded, port)
    assert compare.check_port(recorded, port).divergence == live


class Wide(torch.nn.Module):
    """Its weight has more entries than a record keeps of a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(160, 160, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(inputs))


class FlaxWide(linen.Module):
    cuts: bool = False

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        dense = linen.Dense(160, use_bias=False, name="fc")
        hidden = dense(inputs)
        if self.cuts:
            hidden = hidden.at[0, 0].set(jax.lax.stop_gradient(hidden[0, 0]))
        return linen.tanh(hidden)


def test_a_large_gradient_is_compared_by_sums(tmp_path: Path) -> None:
    given = np.random.default_rng(0).standard_normal((3, 160)).astype(np.float32)
    path = compare.record(tmp_path / "wide.safetensors", Wide(), given, dtypes=())
    exact = RecordedReference(path).exact(Case(GIVEN, 0)).result
    assert exact.gradients["fc.weight"].size <= MAX_ENTRIES < 160 * 160
    assert compare.check_port(path, FlaxWide(), dtypes=()).held
    wrong = compare.check_port(path, FlaxWide(cuts=True), dtypes=())
    failed = {finding.case for finding in wrong.findings if not finding.held}
    assert "as given, inference, fc.weight" in failed


def test_sums_see_what_lies_beside_numbers_that_are_not_finite() -> None:
    mask = np.triu(np.full((200, 200), -np.inf), 1)
    (sums,) = sketched({"a": mask}).values()
    for place, value in (((4, 4), 1.0), ((4, 5), np.nan), ((4, 5), np.inf), ((5, 4), -np.inf)):
        edited = mask.copy()
        edited[place] = value
        assert not np.array_equal(sketched({"a": edited})["a"], sums)
    assert np.isfinite(sums).all()


class Block(torch.nn.Module):
    """As many parameters for a token as in a block of 100 million at 256 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixed, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        heads = self.mixed(inputs).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        attended = torch.softmax(heads[0] @ heads[1].mT, -1) @ heads[2]
        hidden = inputs + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(torch.nn.functional.gelu(self.up(hidden)))


def test_a_record_is_at_most_half_larger_than_large_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compare.ports.record._MIN_KEPT", 0)  # which small weights are below
    block = Block(512)
    path = compare.record(tmp_path / "block.safetensors", block, torch.rand(1, 44, 512))
    weights = sum(parameter.nbytes for parameter in block.parameters())
    assert weights < path.stat().st_size < 1.5 * weights
    trace, _ = RecordedReference(path).trace(Case(GIVEN, 0)) or pytest.fail("there is no trace")
    assert {value.is_whole for value in trace.values} == {True, False}


def test_sums_see_one_entry_and_two_that_change_places() -> None:
    array = np.random.default_rng(0).standard_normal(3 * MAX_ENTRIES + 5)
    (sums,) = sketched({"a": array}).values()
    for edit in ([7], [3, 4], [0, 40_000]):
        edited = array.copy()
        edited[edit] = edited[edit][::-1] if len(edit) > 1 else edited[edit] * (1 + 1e-12)
        assert not np.array_equal(sketched({"a": edited})["a"], sums)
    assert np.allclose(sketched({"a": 2 * array})["a"], 2 * sums, rtol=1e-14)


def test_arguments_and_dtypes_come_back(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
            self.tied = self.fc

        def forward(self, pair: Any, scale: float, *, flags: Any) -> Any:
            first, second = pair
            return {"a": self.tied(first) * scale, "b": second + 1, "c": flags["on"]}

    pair = (torch.ones(1, 2, dtype=torch.bfloat16), torch.arange(3))
    call = {
        "pair": pair,
        "scale": 0.5,
        "flags": {"on": np.array([True]), "name": "\x1b", "no": None},
    }
    path = compare.record(tmp_path / "nested.safetensors", Nested(), call, dtypes="bfloat16")
    reference = RecordedReference(path)
    (again,) = reference.calls
    assert again.kwargs["scale"] == 0.5
    assert isinstance(again.kwargs["pair"], tuple)
    assert again.kwargs["pair"][0].dtype.name == "bfloat16"
    assert again.kwargs["flags"] == {"on": np.array([True]), "name": "\x1b", "no": None}
    state = reference.state(DRAWN)
    assert state["tied.weight"] is state["fc.weight"]
    assert state["fc.weight"].dtype.name == "bfloat16"
    assert reference.outputs(Case(GIVEN, 0), "bfloat16").keys() == {"a", "b", "c"}
    with pytest.raises(compare.PortError, match="no outputs in float16: record them with"):
        reference.outputs(Case(GIVEN, 0), "float16")


def test_numbers_of_numpy_are_taken(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            groups: Any = np.int64(2)
            self.norm = torch.nn.GroupNorm(groups, 4)

        def forward(self, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.norm(inputs) * scale

    given = np.ones((1, 4), np.float32), np.float32(2.0)
    path = compare.record(tmp_path / "scaled.safetensors", Scaled(), given, dtypes=())
    assert RecordedReference(path).calls[0].arrays["1"].shape == ()


def test_outputs_and_a_method_are_given_to_both(tmp_path: Path) -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def encode(self, inputs: torch.Tensor) -> Any:
            return {"hidden": self.fc(inputs), "name": "encoder"}

    class FlaxEncoder(linen.Module):
        def setup(self) -> None:
            self.fc = linen.Dense(4)

        def encode(self, inputs: Any) -> Any:
            return self.fc(inputs), inputs

    given = np.ones((1, 4), np.float32)
    path = compare.record(
        tmp_path / "encoder.safetensors",
        Encoder(),
        given,
        outputs=lambda made: made["hidden"],
        method="encode",
        dtypes=(),
    )
    compare.assert_port(path, FlaxEncoder(), outputs=lambda made: made[0], method="encode")


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    path, given = tmp_path / "m.safetensors", np.ones((1, 2), np.float32)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
    refused: tuple[tuple[Any, Any, str], ...] = (
        (normed, given, r"record compare\.fold\(torch_module\)"),
        (torch.nn.Linear, given, "expected a torch module"),
        (torch.nn.Linear(2, 2), (given, object()), "an argument is .*object"),
        (torch.nn.Linear(2, 2), (), r"the torch module raised TypeError"),
        (torch.nn.Linear(2, 2), (given, float("inf")), "an argument is inf"),
        (torch.nn.Embedding(5, 3, max_norm=1.0), given, "max_norm changes its weight"),
    )
    for module, call, message in refused:
        with pytest.raises(compare.PortError, match=message):
            compare.record(path, module, call)
        assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match="is a folder"):
        compare.record(tmp_path, torch.nn.Linear(2, 2), given)


def test_what_has_no_effect_is_refused(recorded: Path) -> None:
    for options in ({"inputs": inputs()}, {"outputs": (abs, None)}):
        with pytest.raises(compare.PortError, match=r"give them to compare\.record"):
            compare.check_port(recorded, LinenBlock(), **options)
    with pytest.raises(FileNotFoundError):
        compare.check_port(recorded.with_name("none.safetensors"), LinenBlock())


def test_other_draws_are_refused(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(spreads: Any, arrays: Any) -> Any:
        return ((name, np.zeros_like(arrays[name])) for name in spreads)

    monkeypatch.setattr("compare.ports.recorded.draw", draw)
    with pytest.raises(compare.PortError, match="draws other weights"):
        RecordedReference(recorded).state(DRAWN)


def edited(path: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    """Write a copy of a record with another head."""
    head = copy.deepcopy(json.loads(RecordFile(path)._file.metadata()["attention-parity record"]))
    edit(head)
    text, arrays = json.dumps(head), load_file(path)
    metadata = {"attention-parity record": text, "attention-parity sha256": _checksum(text, arrays)}
    save_file(arrays, target, metadata)
    return target


def ask_all(path: Path) -> None:
    """Ask a record all that a judge asks."""
    reference = RecordedReference(path)
    reference.source()
    for case in [*reference._cases]:
        reference.state(case.weights)
        reference.modes(case.weights, case.number)
        reference.exact(case)
        reference.trace(case, has_gradients=True)
    compare.check_port(path, LinenBlock(factor=0.5), dtypes=())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda head: head.update(version=2), "a record of version 2"),
        (lambda head: head.pop("cases"), "no sound record"),
        (lambda head: head["cases"][0]["trace"]["values"][9].__setitem__(1, [9]), "come later"),
        (
            lambda head: head["cases"][0]["trace"]["values"][9].__setitem__(4, [1 << 40]),
            "is too large|cannot reshape",
        ),
        (lambda head: head["layers"].update(x={"type": "Exec"}), "layer x is not known"),
        (lambda head: head["names"].update({"state/": ["\x1b[31m"]}), "no sound record"),
        (
            lambda head: head["calls"].append({"args": {"tuple": []}, "kwargs": {"dict": {}}}),
            "its runs",
        ),
    ],
)
def test_a_damaged_head_is_refused(
    edit: Callable[[Any], None], message: str, recorded: Path, tmp_path: Path
) -> None:
    path = edited(recorded, tmp_path / "bad.safetensors", edit)
    with pytest.raises(compare.PortError, match=message) as raised:
        ask_all(path)
    assert "\x1b" not in str(raised.value)


def test_other_files_are_no_records(tmp_path: Path, recorded: Path) -> None:
    checkpoint = compare.save_checkpoint(tmp_path / "a.safetensors", torch.nn.Linear(2, 2))
    (tmp_path / "b.safetensors").write_bytes(b"\x00" * 100)
    raw = recorded.read_bytes()
    (tmp_path / "c.safetensors").write_bytes(raw[:-10])
    (tmp_path / "d.safetensors").write_bytes(raw[:-10] + bytes([raw[-10] ^ 1]) + raw[-9:])
    for path in (checkpoint, *(tmp_path / f"{name}.safetensors" for name in "bcd")):
        with pytest.raises(compare.PortError, match="no sound record"):
            RecordedReference(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="regular file"):
        RecordedReference(tmp_path / "pipe")


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Return every place in nested lists and dicts, as a container and a key."""
    places = [*tree.items()] if isinstance(tree, dict) else [*enumerate(tree)]
    return [
        *((tree, key) for key, _ in places),
        *(one for _, value in places if isinstance(value, dict | list) for one in _nodes(value)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.again) for n in (1, 2))])
@pytest.mark.filterwarnings("ignore")
def test_drawn_damage_ends_in_errors_of_ours(seed: int, recorded: Path, tmp_path: Path) -> None:
    draw = random.Random(seed)
    others: list[Any] = [None, -1, 1 << 62, 1.5, "x", [], {}, [1, 2], {"array": "0"}, True, [[]]]

    def damage(head: Any) -> None:
        part = head[draw.choice(sorted(head))] if draw.random() < 0.5 else head
        places = _nodes(part) if isinstance(part, dict | list) and part else _nodes(head)
        container, key = draw.choice(places)
        container[key] = draw.choice(others)

    for _ in range(60):
        path = edited(recorded, tmp_path / "bad.safetensors", damage)
        try:
            reference = RecordedReference(path)
            reference.source()
            for case in [*reference._cases]:
                reference.modes(case.weights, case.number)
                reference.exact(case)
                reference.trace(case, has_gradients=True)
        except (compare.PortError, ConversionError, FileError):
            continue
