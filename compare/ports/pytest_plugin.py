"""A pytest plugin: the fixture `check_port`, the marker `port` and the option `--port-report`.

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

_OPTION = "--port-report"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that keeps the reports."""
    parser.getgroup("ports").addoption(
        _OPTION,
        metavar="DIR",
        type=Path,
        help="write a page and a JSON file on each port that a test checks into this folder",
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

    With `--port-report DIR` it writes DIR/TEST.html and DIR/TEST.json.
    """
    from .check import check_port as check
    from .errors import PortDiffers

    count = 0

    def checked(
        torch_module: Any, flax_module: Any, inputs: Any = None, **options: Any
    ) -> PortReport:
        nonlocal count
        count += 1
        report = check(torch_module, flax_module, inputs, **options)
        folder = request.config.getoption(_OPTION)
        if folder is not None:
            name = re.sub(r"[^\w.-]+", "_", request.node.nodeid)
            _write(folder, name if count == 1 else f"{name}_{count}", report)
        if not report.held:
            raise PortDiffers(str(report))
        return report

    return checked


def _write(folder: Path, name: str, report: PortReport) -> None:
    from ..files.writing import write_text
    from .section import page_of

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(report.as_json(), indent=1))
    write_text(folder / f"{name}.html", page_of(report, name))
