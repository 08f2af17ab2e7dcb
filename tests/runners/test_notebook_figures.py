"""Each implementation reproduces the notebook's 36 printed rows and both its state dicts."""

import numpy as np
import pytest
import torch

import compare
from compare.commands import notebook
from compare.conversion.tensors import torch_state
from compare.proof.cases import FRAMEWORKS, NOTEBOOK, Framework
from compare.runners.notebook_figures import PRINT_ROUNDING, figures, initial_states, match_rows
from compare.runners.run import build_nnx, linen_template

CELLS = {
    "3": (0, figures()["without_buffer"]["output_cell_3_cpu"]),
    "10": (0, figures()["without_buffer"]["output_cell_10_cuda"]),
    "15": (1, figures()["with_buffer"]["output_cell_15_cuda"]),
}


@pytest.mark.parametrize(("state", "printed"), CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_printed_row_fits_exactly_one_pattern_of_dropout(
    name: Framework, state: int, printed: list, device: str
) -> None:
    matches = match_rows(name, initial_states()[state], np.array(printed), device)
    assert len(matches) == 12
    assert [match.patterns for match in matches] == [1] * 12, matches


def test_the_three_find_the_same_patterns_and_dropout_was_active() -> None:
    state, printed = initial_states()[0], np.array(CELLS["10"][1])
    dropped = {
        name: [match.dropped for match in match_rows(name, state, printed)] for name in FRAMEWORKS
    }
    assert dropped["torch"] == dropped["linen"] == dropped["nnx"]
    assert dropped["torch"][:6] != dropped["torch"][6:], (
        "the two inputs are the same, so only dropout can make a difference"
    )


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_printed_digit_off_by_two_fits_nothing(name: Framework) -> None:
    printed = np.array(CELLS["3"][1])
    printed[1, 5, 2] += 2e-4
    matches = match_rows(name, initial_states()[0], printed)
    assert [match.patterns > 0 for match in matches] == [True] * 11 + [False]


@pytest.mark.parametrize(
    ("index", "printed"),
    [
        (0, figures()["without_buffer"]["state_dict_cell_17"]),
        (1, figures()["with_buffer"]["state_dict_cell_18"]),
    ],
    ids=["17", "18"],
)
def test_printed_state_dicts(index: int, printed: dict) -> None:
    buffer = index == 1
    state = initial_states()[index]
    variables = compare.torch_to_linen(torch_state(state), linen_template(NOTEBOOK, buffer=buffer))
    model = compare.torch_to_nnx(torch_state(state), build_nnx(NOTEBOOK, buffer=buffer))
    for key, rows in printed.items():
        name = key.removesuffix(".weight")
        if key == "mask":
            arrays = [state[key], variables["buffers"]["mask"], model.mask[...]]
        else:
            kernels = variables["params"][name]["kernel"], getattr(model, name).kernel[...]
            arrays = [state[key], *(kernel.T for kernel in kernels)]
        for array in arrays:
            error = np.abs(np.asarray(array, dtype=np.float64) - np.array(rows)).max()
            assert error <= PRINT_ROUNDING


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    initial_states()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_the_story_holds_and_says_how_rows_are_matched() -> None:
    sections = list(notebook.sections())
    checks = [check for section in sections for check in section.checks]
    assert [check for check in checks if check.held is False] == []
    assert [check.count for check in checks if check.name == "all output rows"] == ["36/36"] * 3
    assert {check.name for check in checks if check.held is None} <= {"cell 6: mask left on CPU"}
    text = " ".join(block for block in sections[0].blocks if isinstance(block, str))
    assert "Dropout was active" in text
    assert "every pattern of dropped attention weights" in text
