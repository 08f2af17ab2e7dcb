"""Models of other libraries: a recorded command, and its verdicts."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from typer.testing import CliRunner

from compare import cli
from compare.ports.report import Divergence, PortReport, SourceLine
from compare.report.model import Section
from compare.stress import libraries, library_ports
from compare.stress.library_names import PAIRS, NamedPair
from tests.ports import blocks

RECORD = Path(libraries.__file__).parents[1] / "records/libraries-cpu.json"


def test_the_record_is_of_every_class_and_name() -> None:
    record = json.loads(RECORD.read_text())
    assert record["held"] is True and record["command"] == "compare fuzz --libraries"
    classes, names = (
        next(block for block in section["blocks"] if "rows" in block)
        for section in record["sections"]
    )
    assert len(classes["rows"]) >= 34
    assert len(names["rows"]) == len(PAIRS)


def test_it_names_the_packages_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("jax_resnet"):
        pytest.skip("they are installed")
    done = CliRunner().invoke(cli.app, ["fuzz", "--libraries"])
    printed = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2
    assert "pip install transformers==4.57.1 torchvision jax-resnet flaxmodels" in printed
    done = CliRunner().invoke(cli.app, ["fuzz", "--libraries", "--layers", "3"])
    assert done.exit_code == 2 and "leave one out" in done.output


def test_the_true_names() -> None:
    by_name = {pair.name: pair for pair in PAIRS}
    for name, module, true in (
        ("torchvision ResNet-50, jax-resnet", "layer2.0.conv3", "layers_5.ConvBlock_2.Conv_0"),
        ("torchvision ResNet-18, flaxmodels", "layer2.0.downsample.1", "BasicBlock_2.BatchNorm_2"),
        ("torchvision ResNet-50, transformers", "fc", None),
        (
            "torchvision ResNet-50, transformers",
            "layer3.1.bn2",
            "encoder.stages.2.layers.1.layer.1.normalization",
        ),
        (
            "BERT, DistilBERT in Flax",
            "encoder.layer.2.attention.output.LayerNorm",
            "transformer.layer.2.sa_layer_norm",
        ),
        ("OPT, XGLM in Flax", "decoder.final_layer_norm", "layer_norm"),
        ("ViT, CLIP's vision in Flax", "layernorm", "vision_model.post_layernorm"),
    ):
        assert by_name[name].true_name(module) == true


def named(true: dict[str, str]) -> NamedPair:
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(3, 4)})
    variables = {
        "params": {
            name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
            for name, shape in {"x": (2, 3), "y": (3, 4)}.items()
        }
    }
    return NamedPair("two", lambda: (source, variables), true.__getitem__)


def test_a_wrong_name_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for true, held in (({"a": "x", "b": "y"}, True), ({"a": "y", "b": "x"}, False)):
        monkeypatch.setattr(libraries, "PAIRS", [named(true)])
        monkeypatch.setattr(library_ports, "PORTS", ())
        monkeypatch.setattr(libraries, "_classes", list)
        monkeypatch.setattr(libraries, "version", lambda _: "0")
        found: list[Any] = [item for item in libraries.sections() if isinstance(item, Section)]
        assert found[1].checks[0].held is held
        assert found[1].checks[0].measured == f"{2 if held else 0} of 2 modules"


def test_a_bug_is_planted_into_a_copy() -> None:
    text = "WIDTH = 8"
    with library_ports.planted(blocks, text, "WIDTH = 5") as (wrong, line):
        assert wrong.WIDTH == 5 and blocks.WIDTH == 8
        assert Path(str(blocks.__file__)).read_text().split("\n")[line - 1].startswith(text)
        assert wrong.__name__ in sys.modules
    assert wrong.__name__ not in sys.modules
    with (
        pytest.raises(ValueError, match="has no 'nothing'"),
        library_ports.planted(blocks, "nothing", "x"),
    ):
        pass


def test_at_which_place_the_line_is_named() -> None:
    port = library_ports.PORTS[0]
    lines = tuple(SourceLine(f"/a/{file}", 7, "", "") for file in ("b.py", "modeling_flax_bert.py"))
    report = PortReport((), Divergence("outputs", (), lines, (), ""))
    for wrong, line, place in ((report, 7, "second"), (report, 8, ""), ("an error", 7, "")):
        judged = library_ports._Judged(port, PortReport(()), wrong, line)
        assert library_ports._place(judged.wrong, judged) == place
        (found,) = library_ports._section([judged]).checks[1:]
        assert found.held is bool(place)


@pytest.mark.slow
def test_some_classes() -> None:
    pytest.importorskip("transformers", minversion="4.57")
    if not find_spec("transformers.models.bert.modeling_flax_bert"):
        pytest.skip("this version of transformers has no classes in Flax")
    for name, architecture in (("FlaxBertModel", "bert"), ("FlaxGPT2LMHeadModel", "gpt2")):
        assert libraries._converted(name, architecture).outcome == "same"
