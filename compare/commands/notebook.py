"""Run the source notebook cell by cell in PyTorch, Flax Linen and Flax NNX."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint import load_checkpoint, save_checkpoint
from ..conversion.convert import linen_to_torch, nnx_to_torch, torch_to_linen, torch_to_nnx
from ..conversion.tensors import numpy_state, torch_state
from ..proof.cases import FRAMEWORKS, NOTEBOOK, TITLES, Framework, State
from ..report.model import Check, Panels, Section, Table
from ..runners.notebook_figures import (
    PRINT_ROUNDING,
    RowMatch,
    figures,
    initial_states,
    inputs,
    match_rows,
)
from ..runners.run import build_nnx, build_torch, linen_mask, linen_template, run
from .checkpoints import edited_sources
from .devices import cell_6_outcome, mismatch_check

SUFFIX = {"torch": ".pth", "linen": ".msgpack", "nnx": ".orbax"}


def sections() -> Iterator[Section]:
    """Yield a section for each cell that prints something, then one with the count of rows."""
    without_buffer, with_buffer = initial_states()
    plain, buffered = figures()["without_buffer"], figures()["with_buffer"]
    cell_3 = _match("cell 3", without_buffer, plain["output_cell_3_cpu"])
    cell_10 = _match("cell 10", without_buffer, plain["output_cell_10_cuda"])
    cell_15 = _match("cell 15", with_buffer, buffered["output_cell_15_cuda"])
    yield _setup()
    yield _outputs("Cell 3: without buffers, on the CPU", cell_3)
    yield _mismatch()
    yield _outputs("Cell 10: without buffers, on CUDA, the mask moved by hand", cell_10)
    yield _outputs("Cell 15: with the buffer, on CUDA", cell_15)
    yield _state(
        "Cell 17: the state dict without buffers",
        "cell 17",
        without_buffer,
        plain["state_dict_cell_17"],
    )
    yield _state(
        "Cell 18: the state dict with the buffer",
        "cell 18",
        with_buffer,
        buffered["state_dict_cell_18"],
    )
    yield _edit(with_buffer)
    yield _reload(
        "Cell 21: with the buffer the edit is in the checkpoint",
        "cell 21",
        with_buffer,
        buffer=True,
    )
    yield _reload(
        "Cell 22: without buffers the edit is lost", "cell 22", without_buffer, buffer=False
    )
    yield _all_rows([cell_3, cell_10, cell_15])


def _setup() -> Section:
    return Section(
        "The notebook: PyTorch buffers, and their counterparts in Flax",
        [
            f"torch.manual_seed({figures()['torch_manual_seed']}); "
            f"input_embedding_dim {NOTEBOOK.input_embedding_dim}, "
            f"output_embedding_dim {NOTEBOOK.output_embedding_dim}, "
            f"context_length {NOTEBOOK.context_length}, dropout {NOTEBOOK.dropout}. Flax gets "
            f"torch's weights through the converter. The batch has shape {inputs().shape} and "
            "holds these tokens twice:",
            Panels("inputs", {"every implementation": inputs()[0].tolist()}, decimals=2),
            "Dropout was active: the notebook never calls `.eval()`, so its printed outputs are "
            "random, and Flax cannot reproduce torch's random stream. Therefore each printed row "
            "is looked up among the module's outputs under every pattern of dropped attention "
            "weights (2^1 patterns for the first token to 2^6 for the last). The weights that are "
            f"kept are scaled by 1 / (1 - {NOTEBOOK.dropout}). A row must match to the last "
            f"printed decimal ({PRINT_ROUNDING:g}, plus float32 rounding). The rows printed on "
            "CUDA are matched on the CPU.",
        ],
    )


class _Cell(NamedTuple):
    """A cell that printed outputs, and the matches of its rows in each framework."""

    name: str
    rows: dict[Framework, list[RowMatch]]

    def fitting(self, framework: Framework) -> int:
        """Count the rows that match under the same dropout pattern as in torch."""
        pairs = zip(self.rows[framework], self.rows["torch"], strict=True)
        return sum(match.patterns > 0 and match.dropped == torch.dropped for match, torch in pairs)


def _match(name: str, state: State, printed: list[Any]) -> _Cell:
    return _Cell(
        name,
        {framework: match_rows(framework, state, np.array(printed)) for framework in FRAMEWORKS},
    )


def _outputs(title: str, cell: _Cell) -> Section:
    """Show each printed row, its distance to each framework's outputs, and the dropped weights."""
    rows = []
    for matches in zip(*cell.rows.values(), strict=True):
        first = matches[0]
        printed = " ".join(f"{figure:7.4f}" for figure in first.printed)
        distances = (
            f"{match.error * 1e5:.2f}" if match.patterns else "FAILED" for match in matches
        )
        drops = " or ".join(sorted({_drops(match) for match in matches}))
        rows.append([f"{first.batch},{first.token}", printed, *distances, drops])
    section = Section(
        title,
        [
            Table(["row", "printed by the notebook", *FRAMEWORKS, "dropped"], rows),
            "torch, linen, nnx: the distance to the printed row in units of 1e-5. dropped: the "
            "positions of the attention weights that dropout zeroed in the notebook. "
            f"{_same_input(cell.rows['torch'])}",
        ],
    )
    section.checks += [
        _rows_check(f"{cell.name}: output rows", name, [cell]) for name in FRAMEWORKS
    ]
    return section


def _all_rows(cells: list[_Cell]) -> Section:
    checks = [_rows_check("all output rows", name, cells) for name in FRAMEWORKS]
    counts = ", ".join(f"{check.implementation} {check.count}" for check in checks)
    patterns = {match.patterns for cell in cells for rows in cell.rows.values() for match in rows}
    fits = (
        "exactly one dropout pattern"
        if patterns == {1}
        else f"between {min(patterns)} and {max(patterns)} dropout patterns"
    )
    return Section(
        "The notebook's output rows",
        [f"Reproduced: {counts}. Each row matches {fits}."],
        checks,
    )


def _rows_check(name: str, framework: Framework, cells: list[_Cell]) -> Check:
    fitting = sum(cell.fitting(framework) for cell in cells)
    total = sum(len(cell.rows[framework]) for cell in cells)
    return Check(
        name,
        TITLES[framework],
        fitting == total,
        f"{fitting} of {total} rows",
        f"{total} rows, under the same dropout patterns as torch",
        f"{fitting}/{total}",
    )


def _drops(match: RowMatch) -> str:
    return ",".join(map(str, match.dropped)) or "none"


def _same_input(matches: list[RowMatch]) -> str:
    """Say how many rows show that dropout was active: the same input gave another output."""
    tokens = len(matches) // 2
    differing = sum(
        _drops(first) != _drops(second)
        for first, second in zip(matches[:tokens], matches[tokens:], strict=True)
    )
    return (
        f"Both halves of the batch are the same input, yet {differing} of {tokens} rows have other "
        "weights dropped."
    )


def _mismatch() -> Section:
    check = mismatch_check()
    return Section(
        "Cell 6: the module on CUDA, the plain mask still on the CPU",
        [
            f"The notebook: {figures()['error_cell_6']}",
            f"{cell_6_outcome(check)} The JAX counterpart runs on any machine: "
            "python -m compare devices.",
        ],
        [check],
    )


def _state(title: str, cell: str, state: State, printed: dict[str, Any]) -> Section:
    """Show the values of every printed entry in each framework, and check them."""
    buffer = "mask" in state
    tensors = torch_state(state)
    variables = torch_to_linen(tensors, linen_template(NOTEBOOK, buffer=buffer))
    model = torch_to_nnx(tensors, build_nnx(NOTEBOOK, buffer=buffer))
    arrays = {
        "torch": numpy_state(tensors),
        "linen": numpy_state(linen_to_torch(variables)),
        "nnx": numpy_state(nnx_to_torch(model)),
    }
    section = Section(title)
    for key in printed:
        panels = {TITLES[name]: arrays[name][key].tolist() for name in FRAMEWORKS}
        section.blocks.append(Panels(key, panels, decimals=0 if key == "mask" else 4))
    if printed.keys() < state.keys():
        section.blocks.append(
            f"The notebook's output ends before {', '.join(state.keys() - printed.keys())}."
        )
    section.blocks.append(
        "Flax stores a weight as a `kernel` of shape (in, out), transposed back here. "
        + (
            "The mask is `buffers/mask` in Linen and the `Buffer` `mask` in NNX."
            if buffer
            else "None of the three has the mask in its state."
        )
    )
    for name, entries in arrays.items():
        error = max(
            float(np.abs(entries[key].astype(np.float64) - np.array(printed[key])).max())
            for key in printed
        )
        section.blocks.append(
            f"{TITLES[name]}: the largest distance to the printed figures is {error:.2g}."
        )
        section.checks.append(
            Check(
                f"{cell}: state dict",
                TITLES[name],
                entries.keys() == state.keys() and error <= PRINT_ROUNDING,
                f"largest difference {error:.3g}, entries {', '.join(entries)}",
                f"at most {PRINT_ROUNDING:g}, half a unit of the last printed decimal; "
                f"entries {', '.join(state)}",
            )
        )
    return section


def _edit(state: State) -> Section:
    """Edit the mask in each framework; the outputs must not change, as any nonzero entry blocks."""
    sources = edited_sources(NOTEBOOK, state, buffer=True)
    masks = _masks(sources, buffer=True)
    section = Section(
        "Cell 19: edit the mask, 1 -> 2",
        [
            Panels("mask", {TITLES[name]: mask.tolist() for name, mask in masks.items()}),
            "PyTorch: mask[mask == 1] = 2, in place. Linen: new variables. NNX: mask[...] = "
            "jnp.where(mask == 1, 2, mask). Any nonzero entry blocks: the outputs do not change.",
        ],
    )
    expected = np.array(figures()["mask_after_edit_cell_19"])
    section.checks += [
        _mask_check("cell 19: mask edited", name, mask, expected) for name, mask in masks.items()
    ]
    edited = {**state, "mask": 2.0 * state["mask"]}
    for name in FRAMEWORKS:
        before = run(name, NOTEBOOK, state, inputs())
        after = run(name, NOTEBOOK, edited, inputs())
        same = np.array_equal(before, after)
        measured = f"outputs {'' if same else 'not '}bitwise equal before and after"
        section.checks.append(
            Check("cell 19: outputs unchanged", TITLES[name], same, measured, "bitwise equal")
        )
    return section


def _reload(title: str, cell: str, state: State, *, buffer: bool) -> Section:
    """Edit the mask, save in each framework's own format, and load into fresh modules."""
    sources = edited_sources(NOTEBOOK, state, buffer=buffer)
    fresh: dict[str, Any] = {
        "torch": build_torch(NOTEBOOK, buffer=buffer),
        "linen": linen_template(NOTEBOOK, buffer=buffer),
        "nnx": build_nnx(NOTEBOOK, buffer=buffer),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources.items():
            path = save_checkpoint(Path(folder, f"edited{SUFFIX[name]}"), source)
            fresh[name] = load_checkpoint(path, fresh[name])
    masks = _masks(fresh, buffer=buffer)
    formats = ", ".join(f"{TITLES[name]} from {suffix}" for name, suffix in SUFFIX.items())
    section = Section(
        title,
        [
            Panels(
                "mask, reloaded into a fresh module",
                {TITLES[name]: mask.tolist() for name, mask in masks.items()},
            ),
            f"{formats}. Every format, loaded by every framework in new processes: "
            "python -m compare checkpoints.",
        ],
    )
    key = f"reloaded_mask_with{'' if buffer else 'out'}_buffer_{cell.replace(' ', '_')}"
    expected = np.array(figures()[key])
    name = f"{cell}: edit {'kept' if buffer else 'lost'}"
    section.checks += [
        _mask_check(name, framework, mask, expected) for framework, mask in masks.items()
    ]
    return section


def _masks(modules: dict[str, Any], *, buffer: bool) -> dict[str, np.ndarray]:
    """Return the mask that each framework uses. For Linen, `modules` holds the variables."""
    return {
        "torch": modules["torch"].mask.numpy(),
        "linen": np.asarray(linen_mask(NOTEBOOK, modules["linen"], buffer=buffer)),
        "nnx": np.asarray(modules["nnx"].mask[...]),
    }


def _mask_check(name: str, framework: str, mask: np.ndarray, expected: np.ndarray) -> Check:
    same = np.array_equal(mask, expected)
    return Check(
        name,
        TITLES[framework],
        same,
        "as printed" if same else f"{mask.tolist()}",
        "as printed",
    )
