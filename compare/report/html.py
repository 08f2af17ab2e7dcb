"""Render a report as one printable HTML page that needs no network and no script."""

import re
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .model import VERDICTS, Grid, Report, Table
from .plots import picture
from .terminal import MAX_ROWS, cell_text


def html(report: Report, shows_all: bool = False) -> str:
    """Return the page. All text is escaped, because names and errors may contain any characters.

    Long tables are cut, unless `shows_all` is True.
    """
    environment = Environment(
        loader=PackageLoader("compare.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count()
    environment.filters["picture"] = lambda block: Markup(picture(block, next(numbers)))
    environment.filters["cell"] = cell_text
    environment.filters["prose"] = prose
    environment.tests["words"] = lambda block: isinstance(block, str)
    environment.tests["digits"] = lambda cell: bool(re.fullmatch(r"[-+0-9.,e/ ]+", str(cell)))
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["grid"] = lambda block: isinstance(block, Grid)
    return environment.get_template("page.html").render(
        report=report, verdicts=VERDICTS, max_rows=None if shows_all else MAX_ROWS
    )


def prose(text: str) -> Markup:
    """Return text as HTML: `code` in backticks, and powers such as 2^6 raised."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\b(\d+)\^(-?\d+)\b", r"\1<sup>\2</sup>", escaped))
