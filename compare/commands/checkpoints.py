"""The mask's life in checkpoints: edited, saved by one implementation, loaded by each in a new process."""

import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from ..checkpoint import save_checkpoint
from ..conversion.convert import torch_to_linen, torch_to_nnx
from ..conversion.tensors import torch_state
from ..proof.cases import FRAMEWORKS, NOTEBOOK, TITLES, Config, State
from ..report.model import Check, Section, Table
from ..runners.notebook_figures import initial_states
from ..runners.run import build_nnx, build_torch, linen_template
from ..subprocesses import ON_CPU, run_module
from .reload import checksum

SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
EDITED, INITIAL = 2.0, 1.0

# (reader, path) -> what the reader found there
Loaded = dict[tuple[str, str], dict[str, Any]]


def sections() -> Iterator[Section | str]:
    """Yield one section for the class with the buffer, one for the class without; before, what is being done."""
    without_buffer, with_buffer = initial_states()
    with tempfile.TemporaryDirectory() as folder:
        yield "saving in every format"
        saved = _save_all(Path(folder), "with", edited_sources(NOTEBOOK, with_buffer, buffer=True))
        lost = _save_all(
            Path(folder), "without", edited_sources(NOTEBOOK, without_buffer, buffer=False)
        )
        yield "loading in new processes"
        loaded = _load_all([*saved.values(), *lost.values()])
        yield _section("with", saved, loaded, checksum(with_buffer), EDITED, _same_bytes(saved))
        yield _section(
            "without", lost, loaded, checksum(without_buffer), INITIAL, _same_bytes(lost)
        )


def edited_sources(config: Config, state: State, *, buffer: bool) -> dict[str, Any]:
    """Return the state in each implementation, its mask edited 1 -> 2 the framework's own way.

    A Linen module without the buffer has no place for the edit: its mask is made anew at every
    call.
    """
    module = build_torch(config, buffer=buffer)
    module.load_state_dict(torch_state(state))
    variables = torch_to_linen(module, linen_template(config, buffer=buffer))
    model = torch_to_nnx(module, build_nnx(config, buffer=buffer))

    module.mask[module.mask == INITIAL] = EDITED
    if buffer:
        variables["buffers"]["mask"] = _edited(variables["buffers"]["mask"])
        model.mask[...] = _edited(model.mask[...])
    else:
        model.mask = _edited(model.mask[...])
    return {"torch": module, "linen": variables, "nnx": model}


def _edited(mask: jax.Array) -> jax.Array:
    return jnp.where(mask == INITIAL, EDITED, mask)


def _save_all(folder: Path, kind: str, sources: dict[str, Any]) -> dict[tuple[str, str], Path]:
    return {
        (suffix, writer): save_checkpoint(folder / f"{kind}-buffer-{writer}{suffix}", source)
        for suffix in SUFFIXES
        for writer, source in sources.items()
    }


def _load_all(paths: list[Path]) -> Loaded:
    """Load every path in one new process for each implementation, two at a time."""

    def load(reader: str) -> list[dict[str, Any]]:
        return run_module("compare.commands.reload", [reader, *map(str, paths)], ON_CPU)

    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(load, FRAMEWORKS)
        return {
            (reader, entry["path"]): entry
            for reader, entries in zip(FRAMEWORKS, found, strict=True)
            for entry in entries
        }


def _section(
    kind: str,
    saved: dict[tuple[str, str], Path],
    loaded: Loaded,
    parameters: str,
    value: float,
    same_bytes: dict[str, bool],
) -> Section:
    """Tabulate what each reader found above the diagonal, and check it."""
    expected = (
        value * torch.triu(torch.ones(NOTEBOOK.context_length, NOTEBOOK.context_length), diagonal=1)
    ).tolist()
    rows = []
    kept = dict.fromkeys(FRAMEWORKS, 0)
    for (suffix, writer), path in saved.items():
        masks = []
        for reader in FRAMEWORKS:
            entry = loaded[reader, str(path)]
            masks.append(f"{entry['mask'][0][1]:g}")
            kept[reader] += entry["mask"] == expected and entry["parameters"] == parameters
        rows.append([suffix, TITLES[writer], *masks])
    fate = "kept" if kind == "with" else "lost"
    section = Section(
        f"Checkpoints {kind} the buffer: the edit is {fate}",
        [
            f"The mask is edited {INITIAL:g} -> {EDITED:g}, saved by each implementation, and loaded by each in a new "
            "process. The entry above the diagonal, as loaded into:",
            Table(["format", "saved by", *(TITLES[reader] for reader in FRAMEWORKS)], rows),
        ],
    )
    for reader in FRAMEWORKS:
        section.checks.append(
            Check(
                f"{kind} buffer: edit {fate}",
                TITLES[reader],
                kept[reader] == len(saved),
                f"{kept[reader]} of {len(saved)} checkpoints",
                f"{value:g} above the diagonal and the same weight bits in {len(saved)}",
                f"{kept[reader]}/{len(saved)}",
            )
        )
    differing = [suffix for suffix, same in same_bytes.items() if not same]
    section.checks.append(
        Check(
            f"{kind} buffer: same bytes",
            "all",
            not differing,
            f"different bytes in {', '.join(differing)}" if differing else "the same bytes",
            f"the same bytes in {', '.join(same_bytes)}, whichever implementation writes them",
            f"{len(same_bytes) - len(differing)}/{len(same_bytes)}",
        )
    )
    return section


def _same_bytes(saved: dict[tuple[str, str], Path]) -> dict[str, bool]:
    """For each single-file format: whether all writers wrote the same bytes."""
    digests: dict[str, set[str]] = {}
    for (suffix, _), path in saved.items():
        if path.is_file():
            digests.setdefault(suffix, set()).add(hashlib.sha256(path.read_bytes()).hexdigest())
    return {suffix: len(found) == 1 for suffix, found in digests.items()}
