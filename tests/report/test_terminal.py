"""Text in a report: wrapped between words, no character lost, whatever a name holds."""

import io

import pytest

from compare.report.model import Panels, Section, Table
from compare.report.terminal import ReportConsole, print_section


def printed(section: Section) -> str:
    console = ReportConsole()
    console.file = io.StringIO()
    print_section(console, section)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "tab\there and  two spaces " * 2,
        "line one\nline two\n\nline four",
        "x" * 300,
        "[bold]not markup[/] \\[" * 20,
        "vertical\x0btab\u2028separator",
        "",
        "   leading and trailing   ",
    ],
)
def test_any_text_is_printed_whole(text: str) -> None:
    lines = printed(Section("title", [text])).splitlines()[1:]
    assert "".join("".join(lines).split()) == "".join(text.split())
    words = max((len(word) for word in text.split()), default=0)
    assert max(map(len, lines), default=0) <= max(80, words)


def test_names_stay_whole_and_text_wraps() -> None:
    name = "encoder." * 12 + "weight"
    table = Table(["name", "what differs"], [[name, "some words that say it " * 8]])
    lines = printed(Section("title", [table])).splitlines()
    assert any(name in line for line in lines)
    assert max(map(len, lines)) < 160


def test_a_column_of_one_word_does_not_widen_the_table() -> None:
    headings = ["wrong ports", "seen", "Flax line", "torch line", "Flax line first"]
    table = Table(["example", *headings, "torch line first"], [["causal_attention", *[107] * 6]])
    wide = Table([*table.columns, "with a hint"], [[*table.rows[0], 81]])
    for one in (table, wide):
        lines = printed(Section("title", [one])).splitlines()
        assert max(map(len, lines)) <= 80


def test_panels_share_a_line_while_they_fit() -> None:
    weights = [[0.25, 0.5, 0.25, 0.0, 0.0]] * 2
    mask = [[0.0, 1.0, 1.0, 1.0, 1.0]] * 2
    matrices = {"mask": mask, "PyTorch": weights, "Flax Linen": weights, "Flax NNX": weights}
    text = printed(Section("title", [Panels("weights", matrices, decimals=2)]))
    assert max(map(len, text.splitlines())) <= 80
    assert "0 1 1 1 1" in text
    assert text.count("0.25 0.50 0.25 0.00 0.00") == 6
