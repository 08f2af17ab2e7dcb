"""Torch files that together hold one state dict, with an index that says which holds what."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ...conversion.mapping import KeyPath
from ...files.memory import Budget
from ...files.printable import shown
from ...files.reading import Snapshot
from ..errors import CheckpointError
from ..reader import ArrayAndChecksum, Reader
from ..tensors import Spec
from . import torch_zip


def open_(
    path: Path,
    shards: Sequence[Path],
    weight_map: Mapping[str, str],
    budget: Budget,
    index_state: Mapping[Path, Any],
) -> Reader:
    """Open the shards. Values are read on demand.

    Args:
        path: the index, or its folder.
        shards: the files.
        weight_map: the name of the file of each tensor.
        budget: the limit of what is read and held.
        index_state: the index, and its state when it was read.

    Raises:
        CheckpointError: a shard is no torch file, or a tensor is not where the index says.
        FileError: what they contain does not fit the budget.
    """
    holders: dict[KeyPath, Reader] = {}
    specs: dict[KeyPath, Spec] = {}
    aliases: dict[KeyPath, KeyPath] = {}
    states = dict(index_state)
    with ExitStack() as opened:
        for shard in shards:
            reader = opened.enter_context(torch_zip.open_(shard, budget))
            states |= reader.snapshot.states
            for key in (*reader.specs, *reader.aliases):
                if weight_map.get(str(key[0])) != shard.name:
                    expected = weight_map.get(str(key[0]), "no file")
                    raise elsewhere(path, str(key[0]), expected, shard.name)
            specs |= reader.specs
            aliases |= reader.aliases
            holders |= dict.fromkeys(reader.specs, reader)
        for name, file in weight_map.items():
            if (name,) not in specs and (name,) not in aliases:
                raise elsewhere(path, name, file, "other tensors")
        ordered = {(name,): specs[(name,)] for name in weight_map if (name,) in specs}
        reader = TorchShardsReader(
            holders, path, "torch", ordered, None, aliases, budget=budget, snapshot=Snapshot(states)
        )
        opened.pop_all()
    return reader


def elsewhere(path: Path, key: str, expected: str, found: str) -> CheckpointError:
    """Return the error that a tensor is not in the file that the index names."""
    return CheckpointError(
        path,
        f"{shown(key)} is not in {shown(expected)}, although the index says so"
        if found == "other tensors"
        else f"{shown(key)} is in {shown(found)}",
        key=key,
        expected=f"it in {shown(expected)}, as the index says",
        found=shown(found),
        mend="take the index and all shards from one place",
    )


class TorchShardsReader(Reader):
    """Several open torch files. `holders` has the one of each tensor."""

    format = "sharded"

    def __init__(self, holders: Mapping[KeyPath, Reader], *header: Any, **more: Any) -> None:
        super().__init__(*header, **more)
        self._holders = holders

    def _holder(self, path: KeyPath) -> Reader:
        holder = self._holders[path]
        holder.mapped = self.mapped
        return holder

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Return the values of one tensor, as its file's reader does."""
        return self._holder(path).read_tensor(path)

    def parts(self, path: KeyPath) -> Iterator[np.ndarray]:
        """Yield one tensor in consecutive flat parts."""
        self._require_open()
        return self._holder(path).parts(path)

    def _held_bytes(self, path: KeyPath) -> int:
        return self._holder(path)._held_bytes(path)

    def _extra_bytes(self, path: KeyPath) -> int:
        return self._holder(path)._extra_bytes(path)

    def close(self) -> None:
        """Close the files."""
        for holder in {id(holder): holder for holder in self._holders.values()}.values():
            holder.__exit__()
