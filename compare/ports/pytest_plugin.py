"""A pytest plugin: the fixture `check_port`, the marker `port`, and options for its reports.

It imports no framework before a test asks for the fixture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .report import PortReport

_OPTION, _REPLAY = "--port-report", "--port-replay"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that keeps the reports."""
    parser.getgroup("ports").addoption(
        _OPTION,
        metavar="DIR",
        type=Path,
        help="write a page and a JSON file on each port that a test checks into this folder, and, "
        "if the port differs, a script that checks it again",
    )
    parser.getgroup("ports").addoption(
        _REPLAY,
        metavar="FILE",
        type=Path,
        help="check a port with the inputs and the weights that --port-report kept in this file",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of tests that check a port."""
    config.addinivalue_line("markers", "port: a test that checks a port, by the fixture check_port")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests that use the fixture, so that `-m port` selects them."""
    if "check_port" in getattr(item, "fixturenames", ()):
        item.add_marker("port")


@pytest.fixture
def check_port(request: pytest.FixtureRequest) -> Callable[..., PortReport]:
    """A function that checks a port as `compare.check_port` does, and fails the test if it differs.

    With `--port-report DIR` it writes DIR/TEST.html and DIR/TEST.json, and, if the port differs,
    DIR/replay_TEST.py, which checks it again with the inputs and weights in DIR/TEST.safetensors.
    """
    from .check import check_port as check
    from .errors import PortDiffers
    from .replay import keep, replayed

    count, config = 0, request.config
    folder, replay = config.getoption(_OPTION), config.getoption(_REPLAY)

    def checked(
        torch_module: Any, flax_module: Any, inputs: Any = None, **options: Any
    ) -> PortReport:
        nonlocal count
        count += 1
        if replay is not None:
            torch_module, inputs = replayed(replay, count, torch_module, inputs)
        report = check(torch_module, flax_module, inputs, **options)
        name = re.sub(r"[^\w.-]+", "_", request.node.nodeid) + ("" if count == 1 else f"_{count}")
        if folder is not None:
            _write(folder, name, report)
        if report.held:
            return report
        text = str(report)
        if folder is not None and replay is None and inputs is not None:
            script = keep(
                folder.resolve(),
                name,
                torch_module,
                inputs,
                number=count,
                test=request.node.nodeid,
                root=config.rootpath,
                options=["-p", __name__] if __name__ in config.option.plugins else [],
            )
            text += f"\nTo check it again with these inputs and weights: python {script}"
        raise PortDiffers(text)

    return checked


def _write(folder: Path, name: str, report: PortReport) -> None:
    from ..files.writing import write_text
    from .section import page_of

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(report.as_json(), indent=1))
    write_text(folder / f"{name}.html", page_of(report, name))
