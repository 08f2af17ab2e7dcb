"""Ports of transformers: bugs are planted into copies, and their lines looked for."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compare import cli
from compare.ports import library_ports
from compare.ports.report import Divergence, PortReport, SourceLine
from tests.ports import blocks

RECORD = Path(cli.__file__).parent / "records/library-ports-cpu.json"


def test_the_record_is_of_every_model() -> None:
    record = json.loads(RECORD.read_text())
    assert record["held"] is True and record["command"] == "compare ports --libraries"
    (table,) = (block for block in record["sections"][0]["blocks"] if "rows" in block)
    assert [row[0] for row in table["rows"]] == [port.model for port in library_ports.PORTS]


def test_what_it_needs_is_named() -> None:
    done = CliRunner().invoke(cli.app, ["ports", "--libraries", "--every", "2"])
    assert done.exit_code == 2 and "leave one out" in done.output
    if not find_spec("transformers"):
        done = CliRunner().invoke(cli.app, ["ports", "--libraries"])
        assert done.exit_code == 2
        assert "pip install transformers==4.57.1" in " ".join(done.output.replace("│", " ").split())


def test_a_bug_is_planted_into_a_copy() -> None:
    text = "WIDTH = 8"
    with library_ports.planted(blocks, ("import", "import"), (text, "WIDTH = 5")) as (wrong, line):
        assert wrong.WIDTH == 5 and blocks.WIDTH == 8
        assert Path(str(blocks.__file__)).read_text().split("\n")[line - 1].startswith(text)
        assert wrong.__name__ in sys.modules
    assert wrong.__name__ not in sys.modules
    with (
        pytest.raises(ValueError, match="has no 'nothing'"),
        library_ports.planted(blocks, ("nothing", "x")),
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
