"""`python -m compare port FILE.py`: exit codes, and the lines in the JSON report."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import compare
from compare.cli import app
from compare.commands import ports
from compare.report.model import Table

from ..ports.blocks import inputs, torch_block
from ..support import sections_of

FILE = """
from tests.ports.blocks import LinenBlock, inputs, torch_block as torch_module

dtypes = ()


def flax_module():
    return LinenBlock({arguments})
"""


@pytest.mark.parametrize(("arguments", "code"), [("", 0), ("approximate=True", 1)])
def test_the_verdict_is_the_exit_code(arguments: str, code: int, tmp_path: Path) -> None:
    file, report = tmp_path / "port.py", tmp_path / "report.json"
    file.write_text(FILE.format(arguments=arguments), encoding="utf-8")
    done = CliRunner().invoke(app, ["port", str(file), "--json", str(report)])
    assert done.exit_code == code, done.output
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["held"] is (code == 0)
    if code:
        sources = content["divergence"]["flax_source"]
        assert sources[0].keys() == {"file", "line", "code", "operation", "module"}
        assert "linen.gelu" in sources[0]["code"]
        assert "part first here" in done.output
    else:
        assert content["divergence"] is None


def test_a_record_stands_in_the_place_of_the_torch_module(tmp_path: Path) -> None:
    compare.record(tmp_path / "block.safetensors", torch_block(), inputs(), dtypes=())
    text = (
        "from tests.ports.blocks import LinenBlock as flax_module\nrecord = 'block.safetensors'\n"
    )
    file = tmp_path / "port.py"
    file.write_text(f"{text}dtypes = ()\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["port", str(file)])
    assert done.exit_code == 0, done.output
    file.write_text(f"{text}def inputs(): ...\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["port", str(file)])
    assert done.exit_code == 2
    assert "defines record and inputs(), which it has" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function torch_module()"),
        (
            "from tests.ports.blocks import torch_block as torch_module, inputs\n"
            "flax_module = flax_inputs = to_flax = torch_module",
            "defines flax_inputs() and to_flax(), which are one",
        ),
        ("import nonsense_of_nobody", "cannot be imported (ModuleNotFoundError"),
        ("def torch_module(): 1 / 0\ndef flax_module(): ...\ndef inputs(): ...", "ZeroDivision"),
        (
            "from tests.ports.blocks import torch_block as torch_module, inputs\n"
            "def flax_module(): return 3",
            "cannot be compared: flax_module is of type int",
        ),
    ],
)
def test_what_cannot_be_run_ends_with_2(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "port.py"
    file.write_text(text, encoding="utf-8")
    done = CliRunner().invoke(app, ["port", str(file)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_table_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    bugs = ports.wrong_ports()
    report = ports.Named(is_detected=True, flax=0, torch=None, hint="a", text="")
    monkeypatch.setattr(ports, "judged", lambda *_: report)
    monkeypatch.setattr(ports, "EXAMPLES", ("routing",))
    right, wrong = sections_of(ports.sections(every=10))
    assert right.checks[0].held
    assert right.checks[0].measured == "0 false alarms of 1"
    table, unnamed = wrong.blocks
    count = len(bugs[::10])
    assert isinstance(table, Table)
    assert list(table.rows[-1]) == ["all", count, count, count, 0, count, 0, count]
    assert "A true line is not among the three of its side: " in str(unnamed)
    assert wrong.checks[0].held
