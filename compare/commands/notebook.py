"""The source notebook's story, cell by cell, in PyTorch, Flax Linen and Flax NNX."""

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
from .devices import here, mismatch_check

SUFFIX = {"torch": ".pth", "linen": ".msgpack", "nnx": ".orbax"}


def sections() -> Iterator[Section]:
    """Yield the cells that print something, in the notebook's order, then the count of rows."""
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
            f"torch.manual_seed({figures()['torch_manual_seed']}); input_embedding_dim {NOTEBOOK.input_embedding_dim}, "
            f"output_embedding_dim {NOTEBOOK.output_embedding_dim}, context_length {NOTEBOOK.context_length}, "
            f"dropout {NOTEBOOK.dropout}. Flax gets torch's weights through the converter. "
            f"The batch, {inputs().shape}, is these tokens twice:",
            Panels("inputs", {"every implementation": inputs()[0].tolist()}, decimals=2),
            "Dropout was active: the notebook never calls `.eval()`, so its printed outputs are random, and drawn on "
            "streams that Flax does not have. Each printed row is therefore looked up among the module's outputs "
            "under every pattern of dropped attention weights (2^1 for the first token to 2^6 for the last), kept "
            f"weights scaled by 1 / (1 - {NOTEBOOK.dropout}). It has to fit to the last printed decimal "
            f"({PRINT_ROUNDING:g}, plus float32 rounding). The rows printed on CUDA are matched on the CPU.",
        ],
    )


class _Cell(NamedTuple):
    """A cell that printed outputs, its rows as each implementation matches them."""

    name: str
    rows: dict[Framework, list[RowMatch]]

    def fitting(self, framework: Framework) -> int:
        """Count the rows found, under the same pattern of dropout as in torch."""
        pairs = zip(self.rows[framework], self.rows["torch"], strict=True)
        return sum(match.patterns > 0 and match.dropped == torch.dropped for match, torch in pairs)


def _match(name: str, state: State, printed: list[Any]) -> _Cell:
    return _Cell(
        name,
        {framework: match_rows(framework, state, np.array(printed)) for framework in FRAMEWORKS},
    )


def _outputs(title: str, cell: _Cell) -> Section:
    """Show the printed rows, how near each implementation comes, and which weights dropout took."""
    rows = []
    for found in zip(*cell.rows.values(), strict=True):
        printed = " ".join(f"{figure:7.4f}" for figure in found[0].printed)
        distances = (f"{match.error * 1e5:.2f}" if match.patterns else "FAILED" for match in found)
        drops = " or ".join(sorted({_drops(match) for match in found}))
        rows.append([f"{found[0].batch},{found[0].token}", printed, *distances, drops])
    section = Section(
        title,
        [
            Table(["row", "printed by the notebook", *FRAMEWORKS, "dropped"], rows),
            "torch, linen, nnx: distance to the printed row in units of 1e-5. Dropped: the attention weights that "
            f"dropout took in the notebook. {_same_input(cell.rows['torch'])}",
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
        "exactly one pattern"
        if patterns == {1}
        else f"between {min(patterns)} and {max(patterns)} patterns"
    )
    return Section(
        "The notebook's output rows",
        [f"Reproduced: {counts}. Each row fits {fits} of dropout."],
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
        f"{total} rows, under the same patterns of dropout as torch",
        f"{fitting}/{total}",
    )


def _drops(match: RowMatch) -> str:
    return ",".join(map(str, match.dropped)) or "none"


def _same_input(matches: list[RowMatch]) -> str:
    """Say what shows that dropout was active: one input, several outputs."""
    tokens = len(matches) // 2
    differing = sum(
        _drops(a) != _drops(b) for a, b in zip(matches[:tokens], matches[tokens:], strict=True)
    )
    return f"Both halves of the batch are the same input; {differing} of {tokens} rows differ between them."


def _mismatch() -> Section:
    check = mismatch_check()
    return Section(
        "Cell 6: the module on CUDA, the plain mask still on the CPU",
        [
            f"The notebook: {figures()['error_cell_6']}",
            f"{here(check)} JAX's counterpart runs live on any machine: python -m compare devices.",
        ],
        [check],
    )


def _state(title: str, cell: str, state: State, printed: dict[str, Any]) -> Section:
    """Show every printed entry as each implementation holds it, and its place there."""
    buffer = "mask" in state
    tensors = torch_state(state)
    variables = torch_to_linen(tensors, linen_template(NOTEBOOK, buffer=buffer))
    model = torch_to_nnx(tensors, build_nnx(NOTEBOOK, buffer=buffer))
    held = {"torch": tensors, "linen": linen_to_torch(variables), "nnx": nnx_to_torch(model)}
    arrays = {name: numpy_state(found) for name, found in held.items()}
    section = Section(title)
    for key in printed:
        panels = {TITLES[name]: arrays[name][key].tolist() for name in FRAMEWORKS}
        section.blocks.append(Panels(key, panels, decimals=0 if key == "mask" else 4))
    if printed.keys() < state.keys():
        section.blocks.append(
            f"The notebook's print is cut before {', '.join(state.keys() - printed.keys())}."
        )
    section.blocks.append(
        "Flax keeps a weight as `kernel`, (in, out), here transposed back. The mask is "
        + (
            "`buffers/mask` in Linen and the `Buffer` `mask` in NNX."
            if buffer
            else "in none of the three."
        )
    )
    for name, found in arrays.items():
        error = max(
            float(np.abs(found[key].astype(np.float64) - np.array(printed[key])).max())
            for key in printed
        )
        section.blocks.append(
            f"{TITLES[name]}: largest distance to the printed figures {error:.2g}."
        )
        section.checks.append(
            Check(
                f"{cell}: state dict",
                TITLES[name],
                found.keys() == state.keys() and error <= PRINT_ROUNDING,
                f"largest difference {error:.3g}, entries {', '.join(found)}",
                f"at most {PRINT_ROUNDING:g}, half of the last printed decimal; entries {', '.join(state)}",
            )
        )
    return section


def _edit(state: State) -> Section:
    """Edit the mask in each implementation, and show that the output does not care: nonzero blocks."""
    sources = edited_sources(NOTEBOOK, state, buffer=True)
    masks = _masks(sources, buffer=True)
    section = Section(
        "Cell 19: edit the mask, 1 -> 2",
        [
            Panels("mask", {TITLES[name]: mask.tolist() for name, mask in masks.items()}),
            "PyTorch: mask[mask == 1] = 2, in place. Linen: new variables. NNX: mask[...] = "
            "jnp.where(mask == 1, 2, mask). Any nonzero entry blocks, so the outputs stay as they are.",
        ],
    )
    expected = np.array(figures()["mask_after_edit_cell_19"])
    section.checks += [
        _mask_check("cell 19: mask edited", name, mask, expected) for name, mask in masks.items()
    ]
    edited = {**state, "mask": 2.0 * state["mask"]}
    for name in FRAMEWORKS:
        same = np.array_equal(
            run(name, NOTEBOOK, state, inputs()), run(name, NOTEBOOK, edited, inputs())
        )
        measured = f"outputs {'' if same else 'not '}bitwise equal before and after"
        section.checks.append(
            Check("cell 19: outputs unchanged", TITLES[name], same, measured, "bitwise equal")
        )
    return section


def _reload(title: str, cell: str, state: State, *, buffer: bool) -> Section:
    """Edit, save in each framework's own format, load into fresh modules."""
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
            f"{formats}. Every format, both directions and new processes: python -m compare checkpoints.",
        ],
    )
    key = f"reloaded_mask_with{'' if buffer else 'out'}_buffer_{cell.replace(' ', '_')}"
    expected = np.array(figures()[key])
    name = f"{cell}: edit {'kept' if buffer else 'lost'}"
    section.checks += [
        _mask_check(name, framework, mask, expected) for framework, mask in masks.items()
    ]
    return section


def _masks(held: dict[str, Any], *, buffer: bool) -> dict[str, np.ndarray]:
    """Return the mask that each implementation works with."""
    return {
        "torch": held["torch"].mask.numpy(),
        "linen": np.asarray(linen_mask(NOTEBOOK, held["linen"], buffer=buffer)),
        "nnx": np.asarray(held["nnx"].mask[...]),
    }


def _mask_check(name: str, framework: str, found: np.ndarray, expected: np.ndarray) -> Check:
    same = np.array_equal(found, expected)
    return Check(
        name,
        TITLES[framework],
        same,
        "as printed" if same else f"{found.tolist()}",
        "as printed",
    )
