"""Kernels of a state dict that fit in two layouts: which they are, and how to say which it is."""

import glob
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from .errors import MismatchEntry

_MEANINGS = {
    "transposed": "if torch's are (out, in), as nn.Linear's",
    "same": "if they are (in, out), as those of transformers' Conv1D",
    "heads_in": "if torch's are (heads * head_dim, embed), as nn.Linear's",
    "heads_out": "if torch's are (embed, heads * head_dim), as nn.Linear's",
    "conv": "if they are of a convolution",
    "conv_transpose": "if of a ConvTranspose, and Flax's has transpose_kernel=False",
}
TURNED = "i o -> o i"
Choice = tuple[str, ...]
OURS = ("W_query.weight", "W_key.weight", "W_value.weight")


class Undecided(Exception):
    """The kernel fits in more than one layout, and no layer says which it is.

    Attributes:
        choice: the layouts, the usual one first.
    """

    def __init__(self, *choice: str) -> None:
        super().__init__(" or ".join(choice))
        self.choice: Choice = choice


def matrix_layout(torch_shape: Sequence[int], flax_shape: Sequence[int]) -> str:
    """Return the layout in which a matrix fits a kernel.

    Raises:
        Undecided: it is square.
    """
    if tuple(torch_shape) != tuple(flax_shape) or tuple(flax_shape) == (1, 1):
        return "transposed"
    if len(set(flax_shape)) > 1:
        return "same"
    raise Undecided("transposed", "same")


def is_of_our_attention(key: str, tensors: Collection[str]) -> bool:
    """Return whether the key is of the attention classes, whose projections are nn.Linear."""
    prefix = "".join(key.rpartition(".")[0].rpartition(".")[:2])
    return all(prefix + name in tensors for name in OURS)


def questions(
    asked: Mapping[str, tuple[Choice, str]],
    decided: Mapping[str, str],
    keys: Iterable[str],
) -> list[MismatchEntry]:
    """Return one entry for each kind of choice. Its mend is the argument that makes the choice.

    Args:
        asked: the torch keys to be asked about, each with its layouts and its Flax path.
        decided: the layout of each matrix that fits in one layout alone.
        keys: all torch keys.
    """
    entries = []
    for choice in dict.fromkeys(choice for choice, _ in asked.values()):
        names = [key for key, (one, _) in asked.items() if one == choice]
        known = _evidence(decided) if "same" in choice else ""
        teller = "the Flax side" if TURNED in choice else "a state dict"
        # The layout of all other matrices is given first.
        first, *rest = reversed(choice) if known and {*decided.values()} == {"same"} else choice
        fitting = patterns(names, keys)
        argument = json.dumps(dict.fromkeys(fitting, first), ensure_ascii=False)
        others = f", nor {len(names) - 1:,} more" if len(names) > 1 else ""
        meanings = [_meaning(first), *(f'"{layout}" {_meaning(layout)}' for layout in rest)]
        entries.append(
            MismatchEntry(
                names[0],
                asked[names[0]][1],
                reason=f"{teller} does not say how this kernel is laid out{others}{known}",
                mend=f"pass layouts={argument} (convert and verify: --layout-of NAME=LAYOUT) "
                + "; ".join(meanings),
                choices=tuple(dict.fromkeys(fitting, layout) for layout in (first, *rest)),
            )
        )
    return entries


def _meaning(layout: str) -> str:
    torch_axes, _, flax_axes = layout.partition(" -> ")
    if layout == TURNED:
        return "if Flax's are (out, in), as those of transformers' FlaxConv1D"
    return f"if torch's axes are ({torch_axes})" if flax_axes else _MEANINGS[layout]


def _evidence(decided: Mapping[str, str]) -> str:
    """Return what the other matrices show, each of which fits in one layout alone."""
    said = ""
    for layout in ("same", "transposed"):
        fitting = [key for key, name in decided.items() if name == layout]
        if fitting:
            more = f" and {len(fitting) - 1:,} more fit" if len(fitting) > 1 else " fits"
            said += f'; {fitting[0]}{more} only as "{layout}"'
    return said


def patterns(names: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Return patterns that together fit these names, and no other key."""
    wanted = {*names}
    others = [key for key in keys if key not in wanted]
    fits_others: dict[str, bool] = {}
    chosen: dict[str, None] = {}
    for name in names:
        steps = name.split(".")
        for pattern in (
            ".".join(["*", *map(glob.escape, steps[-2:])]),
            ".".join("*" if step.isdigit() else glob.escape(step) for step in steps),
            glob.escape(name),
        ):
            if pattern not in fits_others:
                fits_others[pattern] = any(fnmatchcase(key, pattern) for key in others)
            if fnmatchcase(name, pattern) and not fits_others[pattern]:
                chosen[pattern] = None
                break
    return list(chosen)
