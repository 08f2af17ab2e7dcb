"""One page that holds a whole report: it needs no network, no script, and prints."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..findings import Grid, Report, Table
from .pictures import picture
from .terminal import VERDICTS, cell_text


def html(report: Report) -> str:
    """Return the page; all text is escaped, for names and errors may hold anything."""
    environment = Environment(
        loader=PackageLoader("compare.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    numbers = iter(range(10**6))
    environment.filters["picture"] = lambda block: Markup(picture(block, next(numbers)))
    environment.filters["cell"] = cell_text
    environment.tests["words"] = lambda block: isinstance(block, str)
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["grid"] = lambda block: isinstance(block, Grid)
    return environment.get_template("page.html").render(
        report=report,
        verdicts=VERDICTS,
        places=list(dict.fromkeys(check.implementation for check in report.checks)),
        names=list(dict.fromkeys(check.name for check in report.checks)),
        found={(check.name, check.implementation): check for check in report.checks},
        counts={word: sum(check.held is held for check in report.checks) for held, word in VERDICTS.items()},
    )
