"""Pair the names of a torch and a Flax model, and save the mapping for `convert` and `verify`."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.errors import CheckpointError
from ..checkpoint.formats import open_checkpoint
from ..checkpoint.load import named, side_of
from ..conversion.errors import ConversionError, Mismatch
from ..conversion.layers import KnownState
from ..conversion.mapping import StateMapping
from ..conversion.match import match
from ..conversion.proposal import suggest
from ..conversion.suggest import MAX_RULES
from ..report.model import Block, Cell, Check, Section, Table
from .inspect_module import imported


def sections(
    source: str,
    like: str,
    save: Path | None = None,
    rules: Mapping[str, Any] | None = None,
    select: Sequence[str] = (),
    memory: int | None = None,
) -> Iterator[Section | str]:
    """Yield a progress message, then one section with the table of names.

    Args:
        source: a checkpoint, or `package.module:name`, which is imported.
        like: one of the other framework.
        save: the JSON file that the mapping is written to.
        rules: `rename`, `policy` and so on, as `compare.match` takes them.
        select: the part of the source that holds the state, if it is a checkpoint.
        memory: the most bytes that what is read and held at once may take.
    """
    yield f"matching {source} and {like}"
    mapping = mapping_of(source, like, rules or {}, select, memory, imports=True)
    if save is not None:
        mapping.save(save)
    yield _section(source, like, mapping, save)


def mapping_of(
    source: str,
    like: str,
    rules: Mapping[str, Any],
    select: Sequence[str] = (),
    memory: int | None = None,
    *,
    imports: bool = False,
) -> StateMapping:
    """Pair two checkpoints, or also modules if `imports`.

    The other arguments are those of `sections`.

    Raises:
        CheckpointError: both are of one framework, or they do not pair under these rules.
    """
    with ExitStack() as opened:
        sides = [
            imported(name)
            if imports and ":" in name and not Path(name).exists()
            else _side(name, part, memory, opened)
            for name, part in ((source, select), (like, ()))
        ]
    torch_sides = [side for side in sides if _is_torch(side)]
    if len(torch_sides) != 1:
        found = "two of torch" if torch_sides else "two of Flax"
        raise CheckpointError(
            like,
            f"and {source} are {found}",
            expected="one of torch and one of Flax",
            found=found,
            mend="name a checkpoint or module of the other framework",
            is_usage=True,
        )
    (flax_side,) = (side for side in sides if not _is_torch(side))
    try:
        return match(torch_sides[0], flax_side, **rules)
    except ConversionError as error:
        hint = error.hint + _proposed(error.mismatch, torch_sides[0], flax_side, rules)
        raise CheckpointError.unfit(
            source, f"does not pair with {like}", error.mismatch, hint
        ) from error


def _side(name: str, select: Sequence[str], memory: int | None, opened: ExitStack) -> Any:
    """Return what `compare.match` takes: the names and shapes of a checkpoint."""
    stored = opened.enter_context(open_checkpoint(name, memory, select=select))
    return named(stored) if stored.layout == "torch" else side_of(stored)


def _proposed(mismatch: Mismatch, torch_side: Any, flax_side: Any, rules: Mapping[str, Any]) -> str:
    """Return the proposal of `compare.suggest` where names are missing, as an option to paste."""
    if rules.get("rename") or not (mismatch.missing and mismatch.unexpected):
        return ""
    proposal = suggest(torch_side, flax_side, prefix=rules.get("prefix", ""))
    if not 0 < len(proposal.rename) <= MAX_RULES:
        return ""
    rename = json.dumps(proposal.rename, ensure_ascii=False)
    _, *open_lines = str(proposal).split("}\n", 1)
    return "\n".join(("", f"Proposed, to look at: --rename {shlex.quote(rename)}", *open_lines))


def _is_torch(side: Any) -> bool:
    """Return whether it is a torch module, or the state dict of a file."""
    return isinstance(side, torch.nn.Module | KnownState)


def _section(source: str, like: str, mapping: StateMapping, save: Path | None) -> Section:
    rows: list[list[Cell]] = [[row.source, row.place, row.kind, row.how] for row in mapping.rows]
    blocks: list[Block] = [Table(["torch", "Flax", "kind", "layout"], rows)]
    blocks += [
        f"{item.torch_key} exists on one side only and is left out ({item.policy})."
        for item in mapping.left
    ]
    if save is not None:
        blocks.append(f"The mapping is in {save}: give it to convert or verify with --map.")
    check = Check("paired", "all", True, f"{len(rows)} pairs", "every entry has a counterpart")
    return Section(f"{source} and {like}", blocks, [check])
