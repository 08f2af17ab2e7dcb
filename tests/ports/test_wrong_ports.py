"""The examples hold, their wrong ports are seen, and the true lines are named."""

import pytest

from compare.commands.port import report_of
from compare.ports.right_ports import RightPort, drawn, known
from compare.ports.wrong_ports import EXAMPLES, WrongPort, judged, reported, text_of, wrong_ports

from ..record_tables import record

BUGS = {bug.name: bug for bug in wrong_ports()}
# One of each kind that the method treats in its own way. A plain run takes one of them.
DRAWN = (
    "chosen probabilities not renormalized",  # nothing where torch has a statement
    *(
        pytest.param(name, marks=pytest.mark.again)
        for name in (
            "branch cut from the gradient",
            "features concatenated in the wrong order",
            "padding mask inverted",
            "candidate through a sigmoid",  # a step of a scan
            "dilation forgotten, padding reduced to keep the shape",  # where the layer is built
            "momentum 0.1 copied from PyTorch's convention",
        )
    ),
)


def test_each_bug_changes_one_place() -> None:
    for bug in wrong_ports():
        assert bug.example in EXAMPLES
        assert bug.text() != text_of(bug.example)
        assert sum(bug.torch in line for line in text_of(bug.example).splitlines()) == 1
        assert bug.flax_line() > bug.torch_line()
    with pytest.raises(ValueError, match="routing has 'nonsense' 0 times"):
        WrongPort("routing", "", "nonsense", "", "", "").text()


def test_each_style_changes_its_example() -> None:
    styles, sizes = known()
    for change in (*styles, *sizes):
        text = RightPort(change.example, [change], 0).text()
        compile(text, change.name, "exec")
        assert text != text_of(change.example)
    ports = [drawn(number) for number in range(208)]
    texts = {port.text() for port in ports}
    assert len(texts) == len(ports)
    for text in texts:
        compile(text, "drawn", "exec")
    used = {(port.example, change.name) for port in ports for change in port.changes}
    assert used == {(one.example, one.name) for one in (*styles, *sizes)}


def test_all_drawn_right_ports_of_the_record_hold() -> None:
    drawn_and_examples = f"0 false alarms of {len(EXAMPLES) + 208}"
    assert record("ports")["sections"][0]["blocks"] == [drawn_and_examples]


@pytest.mark.slow
@pytest.mark.again
@pytest.mark.parametrize("number", range(0, 208, 26))
def test_a_drawn_right_port_holds(number: int) -> None:
    port = drawn(number)
    report = reported(port.example, port.text(), report_of)
    assert report.held, f"{port}\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_the_true_lines_are_named(name: str) -> None:
    found = judged(BUGS[name], report_of)
    assert found.is_detected
    assert found.flax is not None, found.text
    assert found.torch is not None, found.text


@pytest.mark.slow
def test_a_mask_is_blamed_before_what_is_made_of_it() -> None:
    found = judged(BUGS["the mask is made again at each call instead of read"], report_of)
    assert (found.flax, found.torch) == (0, 0), found.text
