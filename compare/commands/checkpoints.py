"""Edit the mask, save it in every format, and load it in new processes of every framework."""

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

# (reader, path) -> what `reload.py` prints for that path
Loaded = dict[tuple[str, str], dict[str, Any]]


def sections() -> Iterator[Section | str]:
    """Yield progress messages, then a section for the class with the buffer and one without."""
    without_buffer, with_buffer = initial_states()
    with tempfile.TemporaryDirectory() as folder:
        yield "saving in every format"
        buffered = edited_sources(NOTEBOOK, with_buffer, buffer=True)
        plain = edited_sources(NOTEBOOK, without_buffer, buffer=False)
        paths_with = _save_all(Path(folder), "with", buffered)
        paths_without = _save_all(Path(folder), "without", plain)
        yield "loading in new processes"
        loaded = _load_all([*paths_with.values(), *paths_without.values()])
        yield _section("with", paths_with, loaded, checksum(with_buffer), EDITED)
        yield _section("without", paths_without, loaded, checksum(without_buffer), INITIAL)


def edited_sources(config: Config, state: State, *, buffer: bool) -> dict[str, Any]:
    """Return the state in each framework, with its mask edited from 1 to 2 the framework's own way.

    Linen variables without the buffer cannot hold the edit: the module makes the mask anew at
    every call.
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
    """Load every path in one new process per framework, two processes at a time."""

    def load(reader: str) -> list[dict[str, Any]]:
        return run_module("compare.commands.reload", [reader, *map(str, paths)], ON_CPU)

    with ThreadPoolExecutor(max_workers=2) as pool:
        loaded = pool.map(load, FRAMEWORKS)
        return {
            (reader, entry["path"]): entry
            for reader, entries in zip(FRAMEWORKS, loaded, strict=True)
            for entry in entries
        }


def _section(
    kind: str,
    saved: dict[tuple[str, str], Path],
    loaded: Loaded,
    parameters: str,
    value: float,
) -> Section:
    """Tabulate the mask entry that each reader loaded, and check masks, parameters and bytes."""
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
            f"The mask is edited from {INITIAL:g} to {EDITED:g}, saved by each framework, and "
            "loaded by each in a new process. The columns show the entry above the diagonal after "
            "loading.",
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
    same_bytes = _same_bytes(saved)
    differing = [suffix for suffix, same in same_bytes.items() if not same]
    section.checks.append(
        Check(
            f"{kind} buffer: same bytes",
            "all",
            not differing,
            f"different bytes in {', '.join(differing)}" if differing else "the same bytes",
            f"the same bytes in {', '.join(same_bytes)}, whichever framework writes them",
            f"{len(same_bytes) - len(differing)}/{len(same_bytes)}",
        )
    )
    return section


def _same_bytes(saved: dict[tuple[str, str], Path]) -> dict[str, bool]:
    """Return for each single-file format whether all writers wrote the same bytes."""
    digests: dict[str, set[str]] = {}
    for (suffix, _), path in saved.items():
        if path.is_file():
            digests.setdefault(suffix, set()).add(hashlib.sha256(path.read_bytes()).hexdigest())
    return {suffix: len(values) == 1 for suffix, values in digests.items()}
