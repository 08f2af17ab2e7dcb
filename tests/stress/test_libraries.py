"""Models of other libraries: a recorded command, and its verdicts."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from typer.testing import CliRunner

from compare import cli
from compare.report.model import Section
from compare.stress import libraries
from compare.stress.library_names import PAIRS, NamedPair

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
        monkeypatch.setattr(libraries, "_classes", list)
        monkeypatch.setattr(libraries, "version", lambda _: "0")
        found: list[Any] = [item for item in libraries.sections() if isinstance(item, Section)]
        assert found[1].checks[0].held is held
        assert found[1].checks[0].measured == f"{2 if held else 0} of 2 modules"


@pytest.mark.slow
def test_some_classes() -> None:
    pytest.importorskip("transformers", minversion="4.57")
    if not find_spec("transformers.models.bert.modeling_flax_bert"):
        pytest.skip("this version of transformers has no classes in Flax")
    for name, architecture in (("FlaxBertModel", "bert"), ("FlaxGPT2LMHeadModel", "gpt2")):
        assert libraries._converted(name, architecture).outcome == "same"
